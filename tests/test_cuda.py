"""What only a GPU can get wrong: streams, devices, work of uncommon shape, bits that must not move.

That the pixels are right is tested beside the CPU's in the other files, and here in float32 against the CPU's float64.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_scenes import BATCH_OPTIONS, DEVICE, ON_CUDA, random_backgrounds, render, render_all
from renderer_scenes import LONG_SLEEP, SIZE, assert_all_same
from scenes import (
    HEIGHT,
    WIDTH,
    Scene,
    assert_close_outside_band,
    assert_same,
    covariances,
    flat,
    make_scene,
    spots,
)
from torch import Tensor

import rapfast
from rapfast import PostProcess, ops, rasterization

pytestmark = pytest.mark.cuda

native_render = importlib.import_module("rapfast.ops.render")  # the package's attribute is the function

SHORT_SLEEP = 100_000_000  # clock cycles, about 0.06 seconds


# Pixels: the GPU's float32 may err at most twice as much as the CPU's.


def assert_matches_cpu(scene: Scene, size: tuple[int, int] = SIZE, **options: Any) -> None:
    """``scene`` is float32 on the CPU; tensors among the options too."""
    expected_depth = str(options.get("render_mode")).endswith("ED")

    def pixels(device: torch.device | str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        moved = {k: v.to(device, dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        colors, alphas, meta = rasterization(*scene.to(device, dtype), *size, **moved)
        if expected_depth:  # the accumulated depth: its quotient by a small alpha has that alpha's error
            colors = torch.cat([colors[..., :-1], colors[..., -1:] * alphas], -1)
        return torch.cat([colors, alphas], -1).cpu(), meta["n_invalid"].cpu()

    got, n_invalid = pixels(DEVICE, torch.float32)
    own, own_invalid = pixels("cpu", torch.float32)
    true, _ = pixels("cpu", torch.float64)
    assert_close_outside_band(got, own, true)
    assert_same(n_invalid, own_invalid)


@pytest.mark.parametrize("kind", [None, "color", "image"])
@pytest.mark.parametrize("render_mode", ["RGB", "D", "ED", "RGB+D", "RGB+ED"])
@pytest.mark.parametrize("rasterize_mode", ["classic", "antialiased"])
@pytest.mark.parametrize("camera_model", ["pinhole", "ortho", "fisheye"])
def test_models_modes_and_backgrounds(camera_model, rasterize_mode, render_mode, kind):
    scene = make_scene(400, 2, sh_degree=2, dtype=torch.float32)
    assert_matches_cpu(
        scene, sh_degree=2, camera_model=camera_model, rasterize_mode=rasterize_mode, render_mode=render_mode,
        backgrounds=random_backgrounds(scene, kind),
    )  # fmt: skip


@pytest.mark.parametrize("per_camera", [False, True], ids=["shared", "per camera"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 40, 512])
def test_channel_counts(channels, per_camera):
    scene = make_scene(200, 2, channels=channels, per_camera=per_camera, dtype=torch.float32)
    for mode in ("RGB", "RGB+D"):
        assert_matches_cpu(scene, render_mode=mode, backgrounds=random_backgrounds(scene, "color", channels))


@pytest.mark.parametrize("per_camera", [False, True], ids=["shared", "per camera"])
@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("n_bases", [25, 30])
def test_sh_degrees(n_bases, sh_degree, per_camera):
    scene = make_scene(200, 2, batch=(2,), sh_degree=4, n_bases=n_bases, per_camera=per_camera, dtype=torch.float32)
    assert_matches_cpu(scene, sh_degree=sh_degree)


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (33, 1), (8, 8), (9, 7), (16, 16), (17, 33), (257, 129)], ids=str)
@pytest.mark.parametrize("camera_model", ["pinhole", "ortho", "fisheye"])
def test_image_sizes(camera_model, size):
    scene = make_scene(300, 2, width=size[0], height=size[1], dtype=torch.float32)
    assert_matches_cpu(scene, size, camera_model=camera_model, render_mode="RGB+ED")


@pytest.mark.parametrize("batch", [(1,), (3,), (2, 3)], ids=str)
def test_batch_dimensions_and_covars(batch):
    scene = make_scene(150, 2, batch=batch, dtype=torch.float32)
    assert_matches_cpu(scene)
    without = scene._replace(quats=torch.ones_like(scene.quats), scales=torch.ones_like(scene.scales))
    assert_matches_cpu(without, covars=covariances(scene))


@pytest.mark.parametrize("n", [1, 31, 32, 33, 255, 257, 20_000])
def test_gaussian_counts(n):
    scene = make_scene(n, 2, dtype=torch.float32)
    scene.scales.mul_(min(1.0, 300 / n))
    assert_matches_cpu(scene)


@pytest.mark.parametrize(
    "post",
    [
        PostProcess(clamp=(0.1, 0.5), size=(20, 37)),
        PostProcess(size=(50, 80), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
        PostProcess(size=(HEIGHT, 20)),
    ],
    ids=str,
)
def test_postprocess(post):
    scene = make_scene(300, 2, batch=(2,), sh_degree=1, dtype=torch.float32)
    assert_matches_cpu(scene, sh_degree=1, postprocess=post, backgrounds=random_backgrounds(scene, "image"))


# Work of uncommon shape.


def test_twenty_thousand_gaussians_in_one_tile():
    g = torch.Generator().manual_seed(1)
    n = 20_000
    centers = (16 + 16 * torch.rand(n, 2, generator=g)).tolist()
    scene = spots(
        centers, [1.5] * n, (0.004 + 0.01 * torch.rand(n, generator=g)).tolist(), [2.0] * n,
        torch.rand(n, 3, generator=g).tolist(), 48, 48, dtype=torch.float32,
    )  # fmt: skip
    assert_matches_cpu(scene, (48, 48), camera_model="ortho")  # all at one depth: drawn by index


@pytest.mark.parametrize("n", [1, 100])
def test_gaussians_over_every_tile(n):
    """8160 tiles each, more rows of tiles than a warp has lanes."""
    size = (1920, 1080)
    g = torch.Generator().manual_seed(2)
    centers = (torch.tensor(size) * torch.rand(n, 2, generator=g)).tolist()
    scene = spots(
        centers, [4000.0] * n, [0.02] * n, torch.linspace(1, 9, n).tolist(), torch.rand(n, 3, generator=g).tolist(),
        *size, dtype=torch.float32,
    )  # fmt: skip
    assert_matches_cpu(scene, size, camera_model="ortho")
    rendered = render(scene.to(DEVICE), size, camera_model="ortho")
    assert rendered.n_intersections == n * 120 * 68


def test_opaque_stacks():
    """1000 opaque Gaussians on one another, nearest last: only the alpha cap lets the second one through."""
    n = 1000
    scene = spots(
        [(20.5, 20.5)] * n, [30.0] * n, [1.0] * n, torch.linspace(9, 1, n).tolist(), [(0.5, 0.2, 0.1)] * n, 41, 41,
        dtype=torch.float32,
    )  # fmt: skip
    assert_matches_cpu(scene, (41, 41), camera_model="ortho")
    alphas = rasterization(*scene.to(DEVICE), 41, 41, camera_model="ortho")[1]
    assert abs(float(alphas[0, 20, 20, 0]) - 0.999) < 1e-6
    assert float(alphas.max()) < 1


def test_many_cameras_of_many_scenes():
    """More images than a group of cameras holds, and groups that are not full."""
    scene = make_scene(60, 70, batch=(3,), sh_degree=1, width=20, height=18, **ON_CUDA)
    batch = render_all(scene, (20, 18), sh_degree=1)
    for b, c in ((0, 0), (0, 31), (0, 32), (1, 63), (1, 64), (2, 0), (2, 69)):
        alone = Scene(*(x[b] for x in scene)).image(c)
        assert_all_same([x[b, c : c + 1] for x in batch], render_all(alone, (20, 18), sh_degree=1))


# A batch is its views and a call is repeatable, bit by bit.


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("options", BATCH_OPTIONS.values(), ids=BATCH_OPTIONS.keys())
@pytest.mark.parametrize("c", [1, 2, 3, 8, 40])
def test_batch_equals_loop(c, options, batch):
    options = dict(options)
    channels, kind = options.pop("channels", 3), options.pop("kind", None)
    size = (50, 30)
    scene = make_scene(
        250, c, batch=batch, channels=channels, sh_degree=options.get("sh_degree"), width=50, height=30, **ON_CUDA
    )
    backgrounds = random_backgrounds(scene, kind, channels, size)
    together = render_all(scene, size, backgrounds=backgrounds, **options)
    assert bool(together[1].any())
    for k in range(0, c, 1 if c <= 8 else 13):
        own = None if backgrounds is None else backgrounds.narrow(len(batch), k, 1)
        alone = render_all(scene.image(k), size, backgrounds=own, **options)
        assert_all_same([x.narrow(len(batch), k, 1) for x in together], alone)


def test_per_camera_colors_equal_their_views():
    scene = make_scene(250, 40, channels=6, per_camera=True, **ON_CUDA)
    together = render_all(scene)
    for k in (0, 31, 32, 39):
        alone = scene.image(k)._replace(colors=scene.colors[k : k + 1])
        assert_all_same([x[k : k + 1] for x in together], render_all(alone))


def test_repeatable_with_other_work_between():
    """The same bits five times, whatever else the GPU does and whatever the allocator hands out."""
    scene = make_scene(20_000, 4, sh_degree=3, width=320, height=200, **ON_CUDA)
    other = make_scene(3000, 2, channels=40, width=64, height=300, **ON_CUDA)
    first = render_all(scene, (320, 200), sh_degree=3, render_mode="RGB+ED")
    side = torch.cuda.Stream()
    a = torch.rand(2048, 2048, device=DEVICE)
    for k in range(5):
        with torch.cuda.stream(side):
            for _ in range(10):
                a = (a @ a).clamp(0, 1)  # runs beside the next render
        kept = torch.empty((k + 1) * 1_234_567, device=DEVICE)
        rasterization(*other, 64, 300)
        assert_all_same(render_all(scene, (320, 200), sh_degree=3, render_mode="RGB+ED"), first)
        del kept
    side.synchronize()


def test_stages_one_by_one_equal_the_whole():
    """The operators of the stages, which tests and gradients use, draw what the one native call draws."""
    scene = make_scene(2000, 3, sh_degree=3, **ON_CUDA)
    background = torch.rand(3, 3, device=DEVICE)
    s = flat(scene)
    projected = ops.project(s.means, s.quats, s.scales, None, s.opacities, s.viewmats, s.Ks, *SIZE)
    colors = ops.color(s.means, s.viewmats, s.Ks, s.colors, projected, *SIZE, sh_degree=3, render_mode="RGB+ED")
    tiles = ops.bin(projected, *SIZE)
    blended, alphas = ops.blend(projected, colors, tiles, *SIZE)
    image, alphas = ops.composite(blended, alphas, n_color_channels=3, backgrounds=background, expected_depth=True)
    want = rasterization(*scene, *SIZE, sh_degree=3, render_mode="RGB+ED", backgrounds=background)
    assert_same(image, want[0])
    assert_same(alphas, want[1])
    for key, value in (("radii", projected.radii), ("depths", projected.records[:, 6])):
        assert_same(want[2][key], value.contiguous())


# Streams and threads.


def test_side_stream_waits_for_nothing_but_its_own():
    """Inputs that exist only once the side stream's earlier work is done, and outputs that are read on it."""
    scene = make_scene(2000, 2, sh_degree=2, **ON_CUDA)
    backgrounds = torch.rand(2, 3, device=DEVICE)
    options = {"sh_degree": 2, "render_mode": "RGB+ED"}
    want = render_all(scene, backgrounds=backgrounds, **options)
    late = Scene(*(torch.full_like(x, math.nan) for x in scene))
    late_backgrounds = torch.full_like(backgrounds, math.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SHORT_SLEEP)
        for x, y in zip((*late, late_backgrounds), (*scene, backgrounds), strict=True):
            x.copy_(y)
        got = render_all(late, backgrounds=late_backgrounds, **options)
        copies = [x.clone() for x in got]
    torch.cuda.current_stream().wait_stream(side)
    assert_all_same(copies, want)


def test_side_stream_runs_beside_the_default_stream():
    """A call on a side stream is done while the default stream is still busy: neither waits for the other."""
    scene = make_scene(2000, 2, sh_degree=2, **ON_CUDA)
    options = {"sh_degree": 2, "backgrounds": torch.rand(2, 3, device=DEVICE)}
    want = rasterization(*scene, *SIZE, **options)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # so that no memory need be asked of the driver below, which may wait for all streams
            rasterization(*scene, *SIZE, **options)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(LONG_SLEEP)
    busy.record()
    with torch.cuda.stream(side):
        got = rasterization(*scene, *SIZE, **options)[0]
    side.synchronize()
    still_busy = not busy.query()
    torch.cuda.synchronize()
    assert still_busy, "the call waited for the default stream"
    assert_same(got, want)


def test_threads_with_streams_of_their_own():
    scenes = [make_scene(1500, 2, sh_degree=1, seed=k, **ON_CUDA) for k in range(4)]
    want = [render_all(scene, sh_degree=1) for scene in scenes]
    torch.cuda.synchronize()
    errors: list[BaseException] = []
    start = threading.Barrier(len(scenes))

    def work(k: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                start.wait(30)
                for _ in range(10):
                    assert_all_same(render_all(scenes[k], sh_degree=1), want[k])
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(scenes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


# Devices.


def second_gpu() -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", 1)


@pytest.mark.parametrize("current", [0, 1])
def test_tensors_on_a_device_that_is_not_current(current):
    """Results of cuda:1 are those of cuda:0, and the current device stays what it was."""
    other = second_gpu()
    scene = make_scene(1500, 3, sh_degree=2, **ON_CUDA)
    backgrounds = torch.rand(3, 3, device=DEVICE)
    options = {"sh_degree": 2, "render_mode": "RGB+ED"}
    want = [x.cpu() for x in render_all(scene, backgrounds=backgrounds, **options)]
    torch.cuda.set_device(current)
    try:
        for device in (other, DEVICE, other):
            got = render_all(scene.to(device), backgrounds=backgrounds.to(device), **options)
            assert torch.cuda.current_device() == current
            assert all(x.device == device for x in got)
            assert_all_same([x.cpu() for x in got], want)
    finally:
        torch.cuda.set_device(0)


def test_stages_on_a_device_that_is_not_current():
    other = second_gpu()

    def run(device: torch.device) -> list[Tensor]:
        s = flat(make_scene(500, 2, sh_degree=1, dtype=torch.float32, device=device))
        r = ops.project(s.means, s.quats, s.scales, None, s.opacities, s.viewmats, s.Ks, *SIZE)
        colors = ops.color(s.means, s.viewmats, s.Ks, s.colors, r, *SIZE, sh_degree=1)
        tiles = ops.bin(r, *SIZE)
        blended, alphas = ops.blend(r, colors, tiles, *SIZE)
        out = ops.composite(blended, alphas, n_color_channels=3, postprocess=PostProcess(size=(20, 30)))
        assert torch.cuda.current_device() == 0
        assert all(x.device == device for x in (*r, colors, *tiles, *out))
        return [x.cpu() for x in (*r, colors, *tiles, blended, alphas, *out)]

    assert_all_same(run(other), run(DEVICE))


def test_side_stream_of_another_device():
    other = second_gpu()
    scene = make_scene(1000, 2, dtype=torch.float32, device=other)
    want = rasterization(*scene, *SIZE)[0]
    torch.cuda.synchronize(other)
    late = Scene(*(torch.full_like(x, math.nan) for x in scene))
    torch.cuda.synchronize(other)
    with torch.cuda.stream(torch.cuda.Stream(other)):
        torch.cuda._sleep(SHORT_SLEEP)
        for x, y in zip(late, scene, strict=True):
            x.copy_(y)
        torch.cuda.set_device(0)  # the stream stays cuda:1's current one
        got = rasterization(*late, *SIZE)[0]
    torch.cuda.set_device(0)
    torch.cuda.synchronize(other)
    assert_same(got, want)


def test_calls_leave_the_current_device_alone():
    current = torch.cuda.current_device()
    rasterization(*make_scene(50, 1, **ON_CUDA), *SIZE)
    assert torch.cuda.current_device() == current


# Refusals.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_are_refused_in_a_sentence(dtype):
    scene = make_scene(20, 1, device=DEVICE).to(dtype)
    with pytest.raises(TypeError) as caught:
        rasterization(*scene, *SIZE)
    message = str(caught.value)
    assert message.startswith("means must be") and "float32" in message
    assert f"got {str(dtype)[6:]} [20, 3] on cuda:0" in message


@pytest.mark.parametrize("name", [*Scene._fields, "covars", "backgrounds"])
def test_mixed_devices_are_refused_by_name(name):
    scene = make_scene(20, 1, **ON_CUDA)
    options = {"covars": covariances(scene)} if name == "covars" else {}
    options["backgrounds"] = torch.rand(1, 3, device=DEVICE)
    tensors = {**scene._asdict(), **options}
    tensors[name] = tensors[name].cpu()
    blamed = "quats" if name == "means" else name
    here, there = ("cpu", "cuda:0") if name == "means" else ("cuda:0", "cpu")
    with pytest.raises(ValueError, match=rf"^{blamed} must be float32 .* on {here} \(as means\), got .* on {there}"):
        rasterization(**tensors, width=WIDTH, height=HEIGHT)


def test_two_gpus_in_one_call_are_refused():
    scene = make_scene(20, 1, **ON_CUDA)
    other = second_gpu()
    with pytest.raises(ValueError, match=r"viewmats must be .* on cuda:0 \(as means\), got .* on cuda:1"):
        rasterization(*scene._replace(viewmats=scene.viewmats.to(other)), *SIZE)


def test_too_many_pairs_are_refused():
    """By one native call, before anything of their size is allocated: tests/test_split.py has the whole."""
    scene = make_scene(1, 1, **ON_CUDA)
    n, c = 1 << 20, 1 << 12
    wide = Scene(*(x.expand(n, *x.shape[1:]) for x in scene[:5]), *(x.expand(c, *x.shape[1:]) for x in scene[5:]))
    with pytest.raises(RuntimeError, match="means and viewmats make 4294967296 .* render fewer cameras at a time"):
        render(wide)


# Numbers that are none.


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("camera_model", ["pinhole", "ortho", "fisheye"])
def test_random_poison_counts_as_on_the_cpu(camera_model, seed):
    """Numbers of every kind in random places of every input: never a number that is none in the picture, and the
    CPU's counts."""
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-30, -1e-30, 1e12, -1e12, 1e30, -1e30])
    scene = make_scene(400, 3, sh_degree=2, seed=seed, dtype=torch.float32)
    for x in scene[:5]:
        places = torch.randint(x.numel(), (max(1, x.numel() // 60),), generator=g)
        x.view(-1)[places] = values[torch.randint(len(values), places.shape, generator=g)]
    scene.viewmats[2].view(-1)[seed] = math.nan if seed % 2 else math.inf
    options = {"sh_degree": 2, "camera_model": camera_model, "render_mode": "RGB+D"}
    colors, alphas, meta = rasterization(*scene.to(DEVICE), *SIZE, **options)
    want, want_alphas, want_meta = rasterization(*scene, *SIZE, **options)
    assert int(want_meta["n_invalid"].sum()) > 400
    assert_same(meta["n_invalid"].cpu(), want_meta["n_invalid"])
    assert bool(alphas.isfinite().all()) and float(alphas.min()) >= 0 and float(alphas.max()) < 1
    assert bool(colors.isfinite().all())
    assert not alphas[2].any()
    scale = want.abs().amax().clamp(min=1)
    for got, expected in ((alphas.cpu(), want_alphas), (colors.cpu() / scale, want / scale)):
        far = (got - expected).abs() > 1e-4
        assert int(far.sum()) <= 0.005 * far.numel(), f"{int(far.sum())} of {far.numel()} values differ"


def test_everything_non_finite():
    scene = Scene(*(torch.full_like(x, math.nan) for x in make_scene(100, 2, **ON_CUDA)))
    colors, alphas, meta = rasterization(*scene, *SIZE, render_mode="RGB+ED")
    assert not colors.any() and not alphas.any()
    assert meta["n_invalid"].tolist() == [100, 100]


# What torch sees of the operator.


@pytest.mark.parametrize("options", BATCH_OPTIONS.values(), ids=BATCH_OPTIONS.keys())
def test_opcheck(options, monkeypatch):
    """The schema tells what is written and what aliases; the fake implementation knows the shapes."""
    options = dict(options)
    channels, kind = options.pop("channels", 3), options.pop("kind", None)
    options["antialiased"] = options.pop("rasterize_mode", "classic") == "antialiased"
    scene = make_scene(100, 2, channels=channels, sh_degree=options.get("sh_degree"), **ON_CUDA)
    calls: list[tuple[Any, ...]] = []
    operator = native_render.render_op

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(native_render, "is_watched", lambda tensors: True)  # else no operator is called
    monkeypatch.setattr(native_render, "render_op", record)
    render(scene, backgrounds=random_backgrounds(scene, kind, channels), keep_state=True, **options)
    torch.library.opcheck(operator, calls[-1], test_utils=("test_schema", "test_faketensor"))


# Processes.

FORKED = """
import os, sys, torch, rapfast
from rapfast._native import _C
assert not torch.cuda.is_initialized(), "import made CUDA calls"

def picture():
    g = torch.Generator().manual_seed(0)
    means = (torch.rand(100, 3, generator=g) + torch.tensor([-0.5, -0.5, 2.0])).cuda()
    quats = torch.ones(100, 4).cuda()
    K = torch.tensor([[[40.0, 0, 20], [0, 40, 15], [0, 0, 1]]]).cuda()
    scales, opacities = torch.full((100, 3), 0.05).cuda(), torch.full((100,), 0.5).cuda()
    colors, alphas, _ = rapfast.rasterization(
        means, quats, scales, opacities, means, torch.eye(4)[None].cuda(), K, 40, 30)
    return float(colors.sum()), float(alphas.max())

child = os.fork()
if child == 0:
    try:
        total, top = picture()
        os._exit(0 if top > 0.1 else 2)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)
status = os.waitpid(child, 0)[1]
assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
assert not torch.cuda.is_initialized()
print(picture()[1] > 0.1)
"""


def test_import_makes_no_cuda_call_and_a_forked_child_can_render():
    root = str(Path(rapfast.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
