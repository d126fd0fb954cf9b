"""Renderer, and calls in CUDA graphs: the bits of an eager call, and never a wrong picture where there is too little
room."""

from __future__ import annotations

import gc
import importlib
import math
import threading
import warnings
from typing import Any

import pytest
import torch
from network_scenes import CUDA16, CUDA32, color_net, make_appearance, rap_scene
from scenes import HEIGHT, WIDTH, Scene, assert_same, flat, make_scene
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import rapfast
from rapfast import PostProcess, Renderer, ops, rasterization
from rapfast.ops import state as native_state
from rapfast.ops.split import TooLarge

SIZE = (WIDTH, HEIGHT)
LONG_SLEEP = 2_000_000_000  # clock cycles, about 1.1 seconds

native_render = importlib.import_module("rapfast.ops.render")  # the package's attribute is the function


def gaussians(scene: Scene, sh: bool = True) -> rapfast.Scene:
    return rapfast.Scene(*scene[:4], sh=scene.colors if sh else None)


def fitted(scene: Scene, **options: Any) -> Renderer:
    renderer = Renderer(gaussians(scene), len(scene.viewmats), *SIZE, **options)
    renderer.fit(scene.viewmats, scene.Ks)
    return renderer


def moved(scene: Scene, seed: int) -> Scene:
    """The same Gaussians seen by other cameras."""
    other = make_scene(1, len(scene.viewmats), seed=seed, dtype=scene.means.dtype, device=scene.means.device)
    return scene._replace(viewmats=other.viewmats, Ks=other.Ks)


def copies(tensors: Any) -> list[Tensor]:
    return [x.clone() for x in tensors]


def assert_all_same(got: Any, want: Any) -> None:
    for x, y in zip(got, want, strict=True):
        assert_same(x, y)


def cuda_scene(n: int = 500, c: int = 3, **options: Any) -> Scene:
    return make_scene(n, c, dtype=torch.float32, device="cuda", **options)


# On every device.

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lower degree": {"sh_degree": 1},
    "depth": {"render_mode": "RGB+ED", "rasterize_mode": "antialiased"},
    "ortho": {"camera_model": "ortho", "render_mode": "D", "near_plane": 1.0, "far_plane": 3.0, "radius_clip": 2.0},
    "halves": {"postprocess": PostProcess(size=(17, 41), dtype=torch.float16, layout="CHW", clamp=(0.0, 0.5))},
    "bytes": {"postprocess": PostProcess(dtype=torch.uint8), "alpha_cap": 0.9, "eps2d": 0.1},
    "normalised": {"postprocess": PostProcess(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))},
}


def direct(scene: Scene, c: int | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """The first c views by `rasterization`."""
    options = {"sh_degree": 2, **options}
    if options.get("backgrounds") is not None:
        options["backgrounds"] = options["backgrounds"][:c]
    return rasterization(*scene[:5], scene.viewmats[:c], scene.Ks[:c], *SIZE, **options)[:2]


@pytest.mark.parametrize("kind", [None, "color", "image"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_draws_what_rasterization_draws(options, kind, device):
    scene = make_scene(300, 3, sh_degree=2, dtype=torch.float32, device=device)
    shape = (3, HEIGHT, WIDTH, 3) if kind == "image" else (3, 3)
    backgrounds = None if kind is None else torch.rand(shape, device=device)
    renderer = fitted(scene, backgrounds=backgrounds, **options)
    for views in (scene, moved(scene, 1)):
        for c in (1, 2, 3, 0):
            got = renderer.render(views.viewmats[:c], views.Ks[:c])
            assert_all_same(got, direct(views, c, backgrounds=backgrounds, **options))
    renderer.check()
    assert int(renderer.overflow) == 0


def test_given_colors(device):
    scene = make_scene(200, 2, channels=5, dtype=torch.float32, device=device)
    renderer = Renderer(gaussians(scene, sh=False), 2, *SIZE, colors=scene.colors)
    renderer.fit(scene.viewmats, scene.Ks)
    assert_all_same(renderer.render(scene.viewmats, scene.Ks), direct(scene, sh_degree=None))


def test_values_changed_in_place_are_seen(device):
    scene = make_scene(200, 2, sh_degree=2, dtype=torch.float32, device=device)
    renderer = fitted(scene)
    before = copies(renderer.render(scene.viewmats, scene.Ks))
    scene.opacities.mul_(0.5)
    after = renderer.render(scene.viewmats, scene.Ks)
    assert not torch.equal(before[1], after[1])
    assert_all_same(after, direct(scene))


def test_tensors_that_do_not_lie_in_order(device):
    scene = make_scene(200, 2, sh_degree=2, dtype=torch.float32, device=device)
    turned = Scene(*(x.mT.contiguous().mT if x.dim() > 1 else x[::1] for x in scene))
    assert not turned.means.is_contiguous()
    renderer = fitted(turned)
    assert_all_same(renderer.render(turned.viewmats, turned.Ks), direct(scene))


def test_float64_on_the_cpu():
    scene = make_scene(100, 2, sh_degree=2)
    got = fitted(scene).render(scene.viewmats, scene.Ks)
    assert got[0].dtype == torch.float64
    assert_all_same(got, direct(scene))


def test_wrong_arguments_are_named(device):
    scene = make_scene(20, 2, sh_degree=1, dtype=torch.float32, device=device)
    given = gaussians(scene)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "scene must be a rapfast.Scene, got ", {"scene": scene.means}),
        (ValueError, "max_views must be between 1 and ", {"max_views": 0}),
        (TypeError, "max_views must be a whole number, got ", {"max_views": 1.5}),
        (ValueError, "width must be between 1 and ", {"width": 0}),
        (ValueError, "sh_degree must be between 0 and 1, got 2", {"sh_degree": 2}),
        (ValueError, "sh_degree must be None where colors are given, got 1", {"colors": scene.means, "sh_degree": 1}),
        (ValueError, r"colors must be float32 \[20, D\] ", {"colors": scene.means[:5]}),
        (ValueError, "colors must be .* for a scene without", {"scene": gaussians(scene, sh=False)}),
        (ValueError, r"backgrounds must be float32 \[2, 3\] or ", {"backgrounds": scene.means[:1]}),
        (ValueError, "render_mode must be one of ", {"render_mode": "X"}),
        (TypeError, "postprocess must be a rapfast.PostProcess", {"postprocess": 1}),
        (TypeError, "capacity must be .records, intersections. or None, got int 5", {"capacity": 5}),
        (ValueError, "capacity's number of intersections must be between 0 and ", {"capacity": (5, -1)}),
    ]
    for error, message, changed in cases:
        with pytest.raises(error, match=message):
            Renderer(**{"scene": given, "max_views": 2, "width": 9, "height": 8, **changed})
    renderer = Renderer(given, 1, *SIZE)
    for call in (renderer.render, renderer.fit):
        with pytest.raises(ValueError, match="viewmats must hold at most max_views = 1 cameras, got 2"):
            call(scene.viewmats, scene.Ks)
        with pytest.raises(ValueError, match=r"Ks must be float32 \[1, 3, 3\] "):
            call(scene.viewmats[:1], scene.Ks)
        with pytest.raises(TypeError, match="viewmats must be float32 .* got NoneType|viewmats must be .* got None"):
            call(None, scene.Ks)
    with pytest.raises(ValueError, match="headroom must be at least 1, got 0.5"):
        renderer.fit(scene.viewmats[:1], scene.Ks[:1], headroom=0.5)
    with pytest.raises(ValueError, match="n_views must be between 1 and 1, got 2"):
        renderer.capture(2)


@pytest.mark.parametrize("name", ["scales", "viewmats"])
def test_a_wanted_gradient_is_refused(name, device):
    scene = make_scene(20, 2, sh_degree=2, dtype=torch.float32, device=device)
    renderer = fitted(scene)
    getattr(scene, name).requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^{name} requires a gradient, which rapfast.rasterization has"):
        renderer.render(scene.viewmats, scene.Ks)
    with torch.no_grad():
        renderer.render(scene.viewmats, scene.Ks)


def test_the_cpu_has_no_graphs_and_makes_room_itself():
    scene = make_scene(20, 1, sh_degree=2, dtype=torch.float32)
    renderer = fitted(scene)
    assert renderer.capacity is None and renderer.fit(scene.viewmats, scene.Ks) is None
    with pytest.raises(RuntimeError, match="capture needs a scene on a CUDA device, this one is on cpu"):
        renderer.capture()
    with pytest.raises(ValueError, match="capacity must be None for a scene on cpu"):
        Renderer(gaussians(scene), 1, *SIZE, capacity=(5, 5))


# Graphs of the renderer's own.


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_replays_equal_eager_calls(options):
    scene = cuda_scene(sh_degree=2)
    backgrounds = torch.rand(3, 3, device="cuda")
    renderer = fitted(scene, backgrounds=backgrounds, **options)
    for c in (3, 1):
        renderer.capture(c)
    for seed in (1, 2, 3):
        views = moved(scene, seed)
        for c in (1, 2, 3):  # two views have no graph
            got = renderer.render(views.viewmats[:c], views.Ks[:c])
            assert_all_same(got, direct(views, c, backgrounds=backgrounds, **options))
    renderer.check()


@pytest.mark.cuda
def test_replays_see_a_changed_scene():
    scene = cuda_scene(sh_degree=2)
    renderer = fitted(scene)
    renderer.capture()
    scene.means.add_(0.05)
    scene.colors.mul_(0.5)
    assert_all_same(renderer.render(scene.viewmats, scene.Ks), direct(scene))


@pytest.mark.cuda
def test_fitting_anew_forgets_graphs():
    scene = cuda_scene(sh_degree=2)
    renderer = Renderer(gaussians(scene), 3, *SIZE, capacity=(1, 1))
    renderer.capture()
    assert renderer.render(scene.viewmats, scene.Ks)[1].isnan().all()
    with pytest.raises(RuntimeError, match="was not drawn"):
        renderer.check()
    records, intersections = renderer.fit(scene.viewmats[:1], scene.Ks[:1])
    assert (records, intersections) == renderer.capacity
    for capture in (False, True):
        if capture:
            renderer.capture()
        assert_all_same(renderer.render(scene.viewmats, scene.Ks), direct(scene))
    renderer.check()


@pytest.mark.cuda
def test_a_capacity_serves_another_renderer():
    scene = cuda_scene(sh_degree=2)
    other = Renderer(gaussians(scene), 3, *SIZE, capacity=fitted(scene).capacity)
    other.capture()
    assert_all_same(other.render(scene.viewmats, scene.Ks), direct(scene))


@pytest.mark.cuda
def test_room_must_be_known():
    scene = cuda_scene(20, 1, sh_degree=2)
    renderer = Renderer(gaussians(scene), 1, *SIZE)
    for call in (lambda: renderer.render(scene.viewmats, scene.Ks), renderer.capture):
        with pytest.raises(RuntimeError, match="must know how much room the views need: call fit"):
            call()


@pytest.mark.cuda
def test_two_renderers_in_turn():
    scenes = [cuda_scene(400, 2, sh_degree=2, seed=k) for k in range(2)]
    renderers = [fitted(scene) for scene in scenes]
    for renderer in renderers:
        renderer.capture()
    want = [direct(scene) for scene in scenes]
    for _ in range(3):
        got = [renderer.render(scene.viewmats, scene.Ks) for renderer, scene in zip(renderers, scenes, strict=True)]
        for x, y in zip(got, want, strict=True):
            assert_all_same(x, y)


@pytest.mark.cuda
@pytest.mark.parametrize("captured", [False, True])
def test_calls_on_several_streams(captured):
    """The memory is one: a call on another stream waits for the last one's. Cameras come late on their stream."""
    scene = cuda_scene(5000, 3, sh_degree=2)
    renderer = fitted(scene)
    if captured:
        renderer.capture()
    streams = [torch.cuda.Stream() for _ in range(3)]
    views = [moved(scene, k) for k in range(6)]
    want = [direct(v) for v in views]
    torch.cuda.synchronize()
    got = []
    for k, v in enumerate(views):
        with torch.cuda.stream(streams[k % 3]):
            late = [torch.full_like(x, math.nan) for x in (v.viewmats, v.Ks)]
            torch.cuda._sleep(20_000_000)
            for x, y in zip(late, (v.viewmats, v.Ks), strict=True):
                x.copy_(y)
            got.append(copies(renderer.render(*late)))
    torch.cuda.synchronize()
    for x, y in zip(got, want, strict=True):
        assert_all_same(x, y)


@pytest.mark.cuda
def test_threads_with_a_renderer_each():
    """Also while another thread captures."""
    scenes = [cuda_scene(800, 2, sh_degree=2, seed=k) for k in range(3)]
    want = [direct(scene) for scene in scenes]
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work(k: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                renderer = fitted(scenes[k])
                for _ in range(20):
                    assert_all_same(renderer.render(scenes[k].viewmats, scenes[k].Ks), want[k])
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(scenes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.cuda
@pytest.mark.parametrize("captured", [False, True])
def test_a_call_waits_for_nothing(captured):
    """It returns while the GPU has not begun."""
    scene = cuda_scene(sh_degree=2)
    renderer = fitted(scene)
    if captured:
        renderer.capture()
    renderer.render(scene.viewmats, scene.Ks)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(LONG_SLEEP)
    busy.record()
    got = renderer.render(scene.viewmats, scene.Ks)
    assert not busy.query()
    assert_all_same(got, direct(scene))


@pytest.mark.cuda
def test_memory_returns_with_the_renderer():
    scene = cuda_scene(sh_degree=2)
    fitted(scene)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    renderer = fitted(scene)
    renderer.capture()
    held = torch.cuda.memory_allocated()
    assert held > before
    for _ in range(3):
        renderer.render(scene.viewmats, scene.Ks)
    assert torch.cuda.memory_allocated() == held
    del renderer
    gc.collect()
    assert torch.cuda.memory_allocated() == before


# Too little room.


def assert_poisoned(x: Tensor) -> None:
    assert x.isnan().all() if x.is_floating_point() else not x.any()


@pytest.mark.cuda
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("short", ["records", "intersections", "both"])
@pytest.mark.parametrize(
    "post",
    [
        None,
        PostProcess(layout="CHW"),
        PostProcess(size=(7, 9), dtype=torch.float16),  # an odd number of halves
        PostProcess(size=(7, 9), dtype=torch.uint8),
    ],
    ids=str,
)
def test_overflow_is_never_a_picture(post, short, captured):
    """All outputs of the call are NaN or 0, whatever stood there; check tells and forgets; views that fit are drawn."""
    scene = cuda_scene(1000, 3, sh_degree=2)
    away = scene._replace(viewmats=scene.viewmats.clone())
    away.viewmats[:, 2, 3] -= 100  # behind the cameras
    probe = Renderer(gaussians(scene), 3, *SIZE)
    records, intersections = probe.fit(scene.viewmats, scene.Ks, headroom=1)
    capacity = (10 if short != "intersections" else records, 10 if short != "records" else intersections)
    renderer = Renderer(gaussians(scene), 3, *SIZE, capacity=capacity, postprocess=post)
    if captured:
        renderer.capture()
    empty = copies(renderer.render(away.viewmats, away.Ks))
    renderer.check()
    assert_all_same(empty, direct(away, postprocess=post))
    for x in renderer.render(scene.viewmats, scene.Ks):
        assert_poisoned(x)
    assert int(renderer.overflow) == 1
    assert_all_same(renderer.render(away.viewmats, away.Ks), empty)
    assert int(renderer.overflow) == 1  # until somebody has looked
    with pytest.raises(RuntimeError, match=rf"needed up to \d+ records .* there is room for {capacity[0]} and "):
        renderer.check()
    renderer.check()
    assert int(renderer.overflow) == 0


@pytest.mark.cuda
def test_room_where_regions_are_more_than_tiles():
    """Small Gaussians where four regions meet: boxes touch all four, ellipses fewer tiles. Both need room."""
    generator, n = torch.Generator().manual_seed(2), 20_000
    means = torch.randn(n, 3, generator=generator) * 0.04 + torch.tensor([0.0, 0.0, 10.0])
    scene = rapfast.Scene(
        means, torch.randn(n, 4, generator=generator), torch.full((n, 3), 0.004), torch.rand(n, generator=generator),
        sh=torch.rand(n, 1, 3, generator=generator),
    )  # fmt: skip
    viewmats, Ks = torch.eye(4)[None], torch.tensor([[[512.0, 0.0, 256.0], [0.0, 512.0, 256.0], [0.0, 0.0, 1.0]]])
    records = ops.project(
        *(x[None] for x in (scene.means, scene.quats, scene.scales)), None, scene.opacities[None], viewmats[None],
        Ks[None], 512, 512, antialiased=True,
    )  # fmt: skip
    center, radii = records.records[:, :2], records.radii
    first, end = ((center - radii) / 16).floor().clamp(0, 32), ((center + radii) / 16).ceil().clamp(0, 32)
    region = torch.tensor([8, 4])
    n_regions = int(((end / region).ceil() - (first / region).floor()).prod(1).sum())
    assert n_regions > len(ops.bin(records, 512, 512).tile_records) + 5000
    options = {"sh_degree": 0, "rasterize_mode": "antialiased"}
    renderer = Renderer(scene.to("cuda"), 1, 512, 512, **options)
    renderer.fit(viewmats.cuda(), Ks.cuda(), headroom=1)
    images, _ = renderer.render(viewmats.cuda(), Ks.cuda())
    renderer.check()
    s = scene.to("cuda")
    want = rasterization(
        s.means, s.quats, s.scales, s.opacities, s.sh, viewmats.cuda(), Ks.cuda(), 512, 512, **options
    )[0]  # fmt: skip
    assert_same(images, want)


@pytest.mark.cuda
def test_as_many_regions_as_a_call_draws_and_more():
    """8192x4096 pixels are 4096 regions: the last size that is drawn at once. The next comes in bands, without
    gradients."""
    scene = cuda_scene(50, 1, sh_degree=0, width=8192, height=4096)
    scene = scene._replace(means=scene.means * 0.2)  # within the image: what is beyond depends on where its edge is
    images, alphas, _ = rasterization(*scene, 8192, 4096, sh_degree=0)
    assert float(alphas.sum()) > 0 and bool(images.isfinite().all())
    larger = rasterization(*scene, 8192, 4112, sh_degree=0)
    assert_all_same((larger[0][:, :4096], larger[1][:, :4096]), (images, alphas))
    leaf = scene.means.clone().requires_grad_()
    assert_same(rasterization(leaf, *scene[1:], 8192, 4096, sh_degree=0)[0], images)
    with pytest.raises(TooLarge, match="8192x4112 pixels are 4160 regions of 128x64, and a native call draws at"):
        rasterization(leaf, *scene[1:], 8192, 4112, sh_degree=0)


@pytest.mark.cuda
def test_room_that_just_suffices():
    """The counts themselves are enough and one less is not."""
    scene = cuda_scene(1000, 2, sh_degree=2)
    s = flat(scene)
    exact = ops.render(*native_arguments(s), **SETTINGS)
    counts = exact.n_records, exact.n_intersections
    want = direct(scene)
    for less, drawn in (((0, 0), True), ((1, 0), False), ((0, 1), False)):
        capacity = counts[0] - less[0], counts[1] - less[1]
        renderer = Renderer(gaussians(scene), 2, *SIZE, capacity=capacity)
        got = renderer.render(scene.viewmats, scene.Ks)
        assert int(renderer.overflow) == (not drawn)
        if drawn:
            assert_all_same(got, want)
        else:
            for x in got:
                assert_poisoned(x)


# In the caller's own graphs.

SETTINGS: dict[str, Any] = {
    "camera_model": "pinhole", "antialiased": False, "eps2d": 0.3, "near_plane": 0.01, "far_plane": 1e10,
    "radius_clip": 0.0, "sh_degree": 2, "render_mode": "RGB", "alpha_cap": 0.999,
}  # fmt: skip


def native_arguments(s: Scene) -> tuple[Any, ...]:
    return s.means, s.quats, s.scales, None, s.opacities, s.colors, s.viewmats, s.Ks, None, *SIZE


@pytest.mark.cuda
def test_renderer_in_a_graph_of_the_callers():
    """With other work before and behind it; the cameras are computed in the graph."""
    scene = cuda_scene(sh_degree=2)
    renderer = fitted(scene)
    shift = torch.zeros(3, device="cuda")

    def work() -> tuple[Tensor, Tensor]:
        viewmats = scene.viewmats.clone()
        viewmats[:, :3, 3] += shift
        images, alphas = renderer.render(viewmats, scene.Ks)
        return images * 2, alphas + 1

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        images, alphas = work()
    for k in range(3):
        shift.fill_(0.1 * k)
        graph.replay()
        want = work()
        assert_all_same((images, alphas), want)
        assert_all_same((want[0] / 2,), direct(scene._replace(viewmats=shifted(scene.viewmats, 0.1 * k)))[:1])
    renderer.check()
    shift.fill_(0)
    scene.scales.fill_(3.0)  # each on many more tiles than there is room for
    graph.replay()
    assert int(renderer.overflow)
    assert_poisoned(images)


@pytest.mark.cuda
def test_room_for_many_views_serves_fewer():
    """Scratch of every number of views fits in that of the most: `ops.render` refuses where it does not."""
    scene = cuda_scene(c=33, sh_degree=2)
    renderer = fitted(scene)
    for c in (*range(1, 5), 15, 16, 17, 32, 33):
        assert_all_same(renderer.render(scene.viewmats[:c], scene.Ks[:c]), direct(scene, c))
    renderer.check()


def shifted(viewmats: Tensor, by: float) -> Tensor:
    out = viewmats.clone()
    out[:, :3, 3] += by
    return out


RASTER_OPTIONS: dict[str, dict[str, Any]] = {
    "sh": {"sh_degree": 2},
    "depth": {"sh_degree": 2, "render_mode": "RGB+ED", "packed": False},
    "background": {"sh_degree": 2, "kind": "image", "rasterize_mode": "antialiased"},
    "post": {
        "sh_degree": 2,
        "kind": "color",
        "postprocess": PostProcess(size=(20, 31), mean=(0.1,) * 3, std=(2.0,) * 3),
    },
    "batched": {"sh_degree": 1, "batch": (2,)},
    "channels": {"channels": 7},
}


@pytest.mark.cuda
@pytest.mark.parametrize("options", RASTER_OPTIONS.values(), ids=RASTER_OPTIONS.keys())
def test_rasterization_in_a_graph(options):
    """Its replays are the eager call's bits, and its meta that of the last replay, at every look."""
    options = dict(options)
    shape = {"batch": options.pop("batch", ()), "channels": options.pop("channels", 3)}
    kind = options.pop("kind", None)
    scene = cuda_scene(400, 2, sh_degree=options.get("sh_degree"), **shape)
    scene.means[..., 0, 0] = math.nan
    if kind is not None:
        options["backgrounds"] = torch.rand((2, HEIGHT, WIDTH, 3) if kind == "image" else (2, 3), device="cuda")
    rasterization(*scene, *SIZE, **options)  # shows how much room is needed
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        images, alphas, meta = rasterization(*scene, *SIZE, **options)
        with pytest.raises(RuntimeError, match="look after a replay"):
            meta["radii"]
    seen = None
    for k in range(3):
        scene.viewmats[..., 0, 3] += 0.05 * k
        graph.replay()
        want = rasterization(*scene, *SIZE, **options)
        assert_all_same((images, alphas), want[:2])
        assert int(meta["overflowed"]) == 0
        assert meta["n_invalid"].tolist() == want[2]["n_invalid"].tolist() != [0, 0]
        for key, value in want[2].items():
            if isinstance(value, Tensor):
                assert_same(meta[key], value)
        assert seen is None or k < 2 or not torch.equal(seen, meta["means2d"])
        seen = meta["means2d"].clone()


@pytest.mark.cuda
def test_a_plan_that_gives_way_disturbs_no_capture():
    """More forms of call than are kept, each with graphs of its own: the oldest's are destroyed while another is
    captured."""
    scene = cuda_scene(400, 1, sh_degree=1)
    native_render._plan.cache_clear()
    most = native_render._plan.cache_info().maxsize
    for width in range(40, 40 + most):
        for _ in range(6):
            rasterization(*scene, width, 30, sh_degree=1)
    graph, size = torch.cuda.CUDAGraph(), (40 + most - 1, 30)
    with torch.cuda.graph(graph):  # a plan with fixed room, where there are as many as are kept
        images = rasterization(*scene, *size, sh_degree=1)[0]
    graph.replay()
    assert native_render._plan.cache_info().currsize == most
    assert_same(images, rasterization(*scene, *size, sh_degree=1)[0])


@pytest.mark.cuda
def test_overflow_of_rasterization_in_a_graph():
    """The room is what was learnt. Views that want more are NaN and counted as such, until they fit again."""
    scene = cuda_scene(20_000, 2, sh_degree=2)
    learnt = native_render._learnt
    native_render._learnt = type(learnt)()
    try:
        away = scene.viewmats.clone()
        away[:, 2, 3] -= 100
        near, viewmats = scene.viewmats.clone(), scene.viewmats
        viewmats.copy_(away)
        for _ in range(2 * native_render._Learnt._WINDOW):
            rasterization(*scene, *SIZE, sh_degree=2)  # the room shrinks to nearly nothing
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            images, alphas, meta = rasterization(*scene, *SIZE, sh_degree=2)
        for k in range(2):
            viewmats.copy_(near)
            graph.replay()
            assert images.isnan().all() and alphas.isnan().all()
            assert int(meta["overflowed"]) == 1
            assert meta["n_invalid"].tolist() == [0, 0] and len(meta["gaussian_ids"]) == 0
            assert not meta["isect_offsets"].any()
            viewmats.copy_(away)
            graph.replay()
            assert not images.any() and not alphas.any() and int(meta["overflowed"]) == 0, k
    finally:
        native_render._learnt = learnt


@pytest.mark.cuda
def test_a_capacity_given_to_the_operator():
    """In a graph it need not be learnt."""
    scene = cuda_scene(1000, 2, sh_degree=2)
    s = flat(scene)
    want = ops.render(*native_arguments(s), keep_state=True, **SETTINGS)
    counts = want.n_records, want.n_intersections
    for capacities, drawn in ((counts, True), ((counts[0], counts[1] - 1), False)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ops.render(*native_arguments(s), keep_state=True, capacities=capacities, **SETTINGS)
        graph.replay()
        assert (got.n_records, got.n_intersections) == (-1, -1)
        assert got.status.tolist() == [*counts, not drawn]
        transmittances, last_ids = ops.state_pixels(got)
        if drawn:
            assert_all_same((got.images, got.alphas), (want.images, want.alphas))
            assert_all_same(ops.state_pixels(got), ops.state_pixels(want))
            assert_all_same(ops.state_records(got), ops.state_records(want))
        else:
            for x in (got.images, got.alphas, transmittances, last_ids, got.n_invalid):
                assert_poisoned(x)
            assert len(ops.state_records(got).records) == 0


@pytest.mark.cuda
def test_what_a_graph_cannot_do_is_a_sentence():
    scene = cuda_scene(60, 2, sh_degree=2)
    post = PostProcess(mean=(0.125, 0.25, 0.375), std=(0.5, 0.625, 0.75))  # numbers of no other test
    renderer = fitted(scene)
    unseen = make_scene(61, 2, sh_degree=2, width=33, height=35, dtype=torch.float32, device="cuda")
    rasterization(*scene, *SIZE, sh_degree=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="no call has shown how much room 2 images of 33x35 pixels of 61 "):
            rasterization(*unseen, 33, 35, sh_degree=2)
        with pytest.raises(RuntimeError, match="numbers .0.125, 0.25, 0.375. of postprocess are not on cuda:0 yet"):
            rasterization(*scene, *SIZE, sh_degree=2, postprocess=post)
        for name, call in (
            ("fit", lambda: renderer.fit(scene.viewmats, scene.Ks)),
            ("check", renderer.check),
            ("capture", renderer.capture),
        ):
            with pytest.raises(RuntimeError, match=f"{name} cannot be called while a CUDA graph is captured"):
                call()
        images, _ = renderer.render(scene.viewmats, scene.Ks)
    graph.replay()
    assert_same(images, direct(scene)[0])


@pytest.mark.cuda
@pytest.mark.parametrize("form", [CUDA16, CUDA32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("c", [2, 130])
def test_colour_network_in_a_graph(c, form):
    """130 views are more than one launch takes as its arguments. Maps and cameras may change, weights are kept."""
    a = make_appearance(150, c)
    scene = rap_scene(a, color_net(form), form)
    cameras = [x.float().cuda() for x in (a.viewmats, a.Ks)]
    maps = a.maps.to("cuda", torch.float16 if form.half else torch.float32)
    options = {"map_ids": [i % 2 for i in range(c)], "view_weights": [0.5 + i / c for i in range(c)]}
    options["precision"] = form.precision
    with torch.no_grad():
        scene.render(*cameras, *SIZE, feature_maps=maps, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            images, alphas, meta = scene.render(*cameras, *SIZE, feature_maps=maps, **options)
        for _ in range(3):
            cameras[0][:, 0, 3] += 0.1
            maps.mul_(0.7)
            graph.replay()
            want = scene.render(*cameras, *SIZE, feature_maps=maps, **options)
            assert_all_same((images, alphas), want[:2])
            assert int(meta["overflowed"]) == 0


# Parts of a call, for the caller that splits it.

BAND_SIZE = (50, 75)  # 5 rows of tiles, the last of 11 pixels


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"render_mode": "RGB+ED"}, {"render_mode": "D"}, {"kind": "image"}], ids=str)
@pytest.mark.parametrize("cuts", [(0, 5), (0, 1, 5), (0, 2, 3, 4, 5), (0, 4, 5)], ids=str)
def test_bands_of_tile_rows_make_the_whole(cuts, options):
    """Bit by bit, with all that is kept of pixels. Records are the whole view's."""
    options = dict(options)
    width, height = BAND_SIZE
    scene = flat(cuda_scene(600, 2, sh_degree=2, width=width, height=height))
    background = torch.rand(2, height, width, 3, device="cuda") if options.pop("kind", None) else None
    settings = {**SETTINGS, "keep_state": True, **options}

    def draw(rows: slice, **more: Any) -> Any:
        arguments = native_arguments(scene)[:8]
        own = None if background is None else background[:, rows].contiguous()
        return ops.render(*arguments, own, *BAND_SIZE, **settings, **more)

    whole = draw(slice(None))
    bands = [
        draw(slice(16 * first, 16 * end), tile_rows=(first, end - first))
        for first, end in zip(cuts, cuts[1:], strict=False)
    ]
    assert_same(torch.cat([band.images for band in bands], 1), whole.images)
    assert_same(torch.cat([band.alphas for band in bands], 1), whole.alphas)
    for parts, want in zip(zip(*map(ops.state_pixels, bands), strict=True), ops.state_pixels(whole), strict=True):
        assert_same(torch.cat(parts, 1), want)
    for band in bands:
        assert band.n_records == whole.n_records
        assert_all_same(ops.state_records(band), ops.state_records(whole))

    def n_listed(rendered: Any) -> int:
        sizes = rendered.sizes
        n_tiles = sizes.n_images * -(-sizes.width // 16) * sizes.n_tile_rows
        return int(native_state.state_part(rendered.state, sizes, "tile_offsets", torch.int64, n_tiles + 1)[-1])

    assert sum(map(n_listed, bands)) == n_listed(whole)


@pytest.mark.cuda
def test_rows_that_are_not_there_are_refused():
    scene = flat(cuda_scene(20, 1, sh_degree=2))
    for rows in ((-1, 2), (0, 4), (3, 1), (1, 0)):
        with pytest.raises(ValueError, match=r"tile_rows must be \(first, count\) of 3 rows of tiles, got "):
            ops.render(*native_arguments(scene), tile_rows=rows, **SETTINGS)
    with pytest.raises(ValueError, match="postprocess.size must be None with tile_rows"):
        ops.render(*native_arguments(scene), tile_rows=(0, 1), postprocess=PostProcess(size=(3, 3)), **SETTINGS)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "post", [None, PostProcess(dtype=torch.float16), PostProcess(layout="CHW", size=(9, 8))], ids=str
)
def test_outputs_in_memory_of_the_callers(post):
    scene = flat(cuda_scene(300, 2, sh_degree=2))
    want = ops.render(*native_arguments(scene), postprocess=post, **SETTINGS)
    images = torch.empty((4, *want.images.shape[1:]), dtype=want.images.dtype, device="cuda")
    height, width = (HEIGHT, WIDTH) if post is None or post.size is None else post.size
    alphas = torch.empty((4, height, width, 1), device="cuda")
    for x in (images, alphas):
        x.fill_(7)
    got = ops.render(*native_arguments(scene), postprocess=post, out=(images[1:3], alphas[1:3]), **SETTINGS)
    assert got.images.data_ptr() == images[1].data_ptr()
    assert_all_same((images[1:3], got.alphas), (want.images, want.alphas))
    for x in (images, alphas):
        assert (x[0] == 7).all() and (x[3] == 7).all()


@pytest.mark.cuda
def test_a_call_that_would_take_too_much_allocates_nothing(monkeypatch):
    """It tells what it would take, which is what it takes."""
    monkeypatch.setattr(native_render, "_learnt", type(native_render._learnt)())
    scene = flat(cuda_scene(3000, 4, sh_degree=2))
    settings = {**SETTINGS, "postprocess": PostProcess(dtype=torch.uint8)}
    wanted = []
    for _ in range(2):  # by a guess; with the room known
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with pytest.raises(TooLarge, match=r"the call needs \d+ bytes, more than 1000") as caught:
            ops.render(*native_arguments(scene), max_bytes=1000, **settings)
        assert torch.cuda.max_memory_allocated() == before
        wanted.append(caught.value.n_bytes)
        ops.render(*native_arguments(scene), **settings)
    torch.cuda.reset_peak_memory_stats()
    rendered = ops.render(*native_arguments(scene), max_bytes=wanted[-1], **settings)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    assert abs(used - wanted[-1]) <= 512 * 8  # each allocation is rounded up
    assert (rendered.images != 0).any()
    with pytest.raises(TooLarge):
        ops.render(*native_arguments(scene), max_bytes=wanted[-1] - 1, **settings)


@pytest.mark.cuda
def test_too_much_is_known_after_one_overflow(monkeypatch):
    """What a call turned out to need is remembered where it is refused."""
    monkeypatch.setattr(native_render, "_learnt", type(native_render._learnt)())
    scene = flat(cuda_scene(3000, 4, sh_degree=2))
    scene.scales.add_(1.0)  # more intersections than the first guess
    with pytest.raises(TooLarge) as probe:
        ops.render(*native_arguments(scene), max_bytes=1, **SETTINGS)
    guess = probe.value.n_bytes
    with pytest.raises(TooLarge) as first:
        ops.render(*native_arguments(scene), max_bytes=guess, **SETTINGS)
    assert first.value.n_bytes > guess
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with pytest.raises(TooLarge) as second:
        ops.render(*native_arguments(scene), max_bytes=guess, **SETTINGS)
    assert second.value.n_bytes == first.value.n_bytes
    assert torch.cuda.max_memory_allocated() == before


# The operator, the shorter way past it, and graphs that calls are launched by.


@pytest.mark.cuda
@pytest.mark.parametrize("options", RASTER_OPTIONS.values(), ids=RASTER_OPTIONS.keys())
def test_calls_that_come_again(options, monkeypatch):
    """A loop's calls become graphs; each draws the bits of a call that is none. Cameras and values change, and so do
    the camera tensors, results kept for a while, and what the memory held."""
    plans = []
    plan = native_render._plan
    monkeypatch.setattr(native_render, "_plan", lambda *form: plans.append(plan(*form)) or plans[-1])
    options = dict(options)
    shape = {"batch": options.pop("batch", ()), "channels": options.pop("channels", 3)}
    kind, size = options.pop("kind", None), (320, 200)  # large enough for blocks of their own in torch's allocator
    scene = cuda_scene(6_000, 2, sh_degree=options.get("sh_degree"), width=size[0], height=size[1], **shape)
    if kind is not None:
        options["backgrounds"] = torch.rand((2, size[1], size[0], 3) if kind == "image" else (2, 3), device="cuda")
    opacities = scene.opacities.clone()
    cameras = []
    for k in range(40):
        viewmats = scene.viewmats.clone()
        viewmats[..., 0, 3] += 0.01 * k
        cameras.append({"viewmats": viewmats, "Ks": scene.Ks.clone()})

    def draw(k: int) -> Any:
        scene.opacities.copy_(opacities * 0.99**k)
        return rasterization(*scene._replace(**cameras[k]), *size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(native_render, "_plan", plan.__wrapped__)  # always a new one, which has no graph
        wants = [draw(k)[:2] for k in range(40)]
    for k, want in enumerate(wants):
        got = draw(k)
        assert_all_same(got[:2], want)
        if k == 20:
            kept = got  # the next ones lie elsewhere
    assert_all_same(kept[:2], wants[20])
    assert_same(kept[2]["n_invalid"], got[2]["n_invalid"])
    assert sum(p.n_graphs for p in {id(p): p for p in plans}.values()) > 0


class Seen(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A subclass, as tracers and quantisers make them."""


def test_who_watches():
    plain = torch.ones(2)
    watched: list[bool] = []

    def look(x: Tensor) -> Tensor:
        watched.append(native_render.is_watched((x, None)))
        return x + 1

    look(plain)
    look(torch.nn.Parameter(plain))
    with torch.no_grad(), torch.inference_mode(), torch.device("cpu"):
        look(plain)
    assert not any(watched)
    watched.clear()
    with Seen():
        look(plain)
    with FakeTensorMode() as mode:
        look(mode.from_tensor(plain))
    look(plain.as_subclass(Labelled))
    torch.func.vmap(look)(plain)
    torch.func.grad(lambda x: look(x).sum())(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(look, (plain,), check_trace=False)
    make_fx(look)(plain)
    assert len(watched) == 7 and all(watched)


@pytest.mark.cuda
def test_whoever_watches_sees_the_operator():
    """A plain call goes past torch's dispatcher, and draws the same."""
    scene = cuda_scene(sh_degree=2)
    want = rasterization(*scene, *SIZE, sh_degree=2)
    with Seen() as seen:
        got = rasterization(*scene, *SIZE, sh_degree=2)
    assert "rapfast::render" in seen.names
    assert_all_same(got[:2], want[:2])
    assert_same(got[2]["means2d"], want[2]["means2d"])


@pytest.mark.cuda
@pytest.mark.parametrize("fixed_room", [False, True])
def test_opcheck_of_the_operator(fixed_room, monkeypatch):
    scene = flat(cuda_scene(100, 2, sh_degree=2))
    calls: list[tuple[Any, ...]] = []
    operator = native_render.render_op

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(native_render, "is_watched", lambda tensors: True)
    monkeypatch.setattr(native_render, "render_op", record)
    ops.render(*native_arguments(scene), **SETTINGS)
    names = [argument.name for argument in operator._schema.arguments]
    arguments = dict(zip(names, calls[-1], strict=True)) | {"fixed_room": fixed_room}
    torch.library.opcheck(operator, tuple(arguments.values()), test_utils=("test_schema", "test_faketensor"))
