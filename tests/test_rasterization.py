"""The whole call: every form of input against the reference, and a batch against its views."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import pytest
import torch
from scenes import (
    HEIGHT,
    WIDTH,
    Scene,
    assert_close64,
    assert_close_outside_band,
    assert_same,
    covariances,
    make_scene,
    skip_unsupported,
)
from torch import Tensor

from rapfast import PostProcess, rasterization

MODELS = ["pinhole", "ortho", "fisheye"]
MODES = ["RGB", "D", "ED", "RGB+D", "RGB+ED"]
RASTERIZE_MODES = ["classic", "antialiased"]
SIZES = [(1, 1), (1, 17), (16, 16), (17, 33), (WIDTH, HEIGHT)]


def assert_matches_reference(scene: Scene, size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> None:
    """Colours, alphas and the count of invalid Gaussians, in float64."""
    colors, alphas, meta = rasterization(*scene, *size, **options)
    want_colors, want_alphas, want_meta = rasterization(*scene, *size, backend="reference", **options)
    assert_close64(colors, want_colors)
    assert_close64(alphas, want_alphas)
    assert_same(meta["n_invalid"], want_meta["n_invalid"])
    assert colors.is_contiguous()


def random_backgrounds(scene: Scene, kind: str | None, size: tuple[int, int], channels: int = 3) -> Tensor | None:
    if kind is None:
        return None
    g = torch.Generator().manual_seed(5)
    image = (size[1], size[0]) if kind == "image" else ()
    shape = (*scene.Ks.shape[:-2], *image, channels)
    return torch.rand(shape, generator=g, dtype=torch.float64).to(scene.means)


@pytest.mark.parametrize("kind", [None, "color", "image"])
@pytest.mark.parametrize("render_mode", MODES)
@pytest.mark.parametrize("rasterize_mode", RASTERIZE_MODES)
@pytest.mark.parametrize("camera_model", MODELS)
def test_models_modes_and_backgrounds(camera_model, rasterize_mode, render_mode, kind, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(200, 2, sh_degree=1, width=40, height=33, device=device)
    assert_matches_reference(
        scene,
        (40, 33),
        camera_model=camera_model,
        rasterize_mode=rasterize_mode,
        render_mode=render_mode,
        backgrounds=random_backgrounds(scene, kind, (40, 33)),
        sh_degree=1,
    )


@pytest.mark.parametrize("per_camera", [False, True], ids=["shared", "per camera"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("sh_degree", [None, 0, 3])
def test_batch_dimensions(sh_degree, batch, per_camera, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(
        120, 2, batch=batch, sh_degree=sh_degree, per_camera=per_camera, width=33, height=16, device=device
    )
    backgrounds = random_backgrounds(scene, "color" if per_camera else "image", (33, 16))
    assert_matches_reference(scene, (33, 16), sh_degree=sh_degree, backgrounds=backgrounds, render_mode="RGB+ED")


@pytest.mark.parametrize("degree", range(5))
@pytest.mark.parametrize("n_bases", [25, 30])
def test_sh_degrees_below_the_stored_one(degree, n_bases, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(150, 2, sh_degree=4, n_bases=n_bases, device=device)
    assert_matches_reference(scene, sh_degree=degree)


@pytest.mark.parametrize("per_camera", [False, True], ids=["shared", "per camera"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 32, 33, 512])
def test_channel_counts(channels, per_camera, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(100, 2, channels=channels, per_camera=per_camera, width=33, height=20, device=device)
    backgrounds = random_backgrounds(scene, "color", (33, 20), channels)
    assert_matches_reference(scene, (33, 20), backgrounds=backgrounds, render_mode="RGB+D")


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("camera_model", MODELS)
def test_image_sizes(camera_model, size, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(200, 2, width=size[0], height=size[1], device=device)
    colors, alphas, _ = rasterization(*scene, *size, camera_model=camera_model, render_mode="RGB+ED")
    assert colors.shape == (2, size[1], size[0], 4)
    assert alphas.shape == (2, size[1], size[0], 1)
    assert_matches_reference(scene, size, camera_model=camera_model, render_mode="RGB+ED")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("camera_model", MODELS)
def test_covars(camera_model, packed, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(200, 2, batch=(2,), device=device)
    covars = covariances(scene)
    without = scene._replace(quats=None, scales=None)
    assert_matches_reference(without, covars=covars, camera_model=camera_model, packed=packed)
    got, _, _ = rasterization(*without, WIDTH, HEIGHT, covars=covars, camera_model=camera_model)
    want, _, _ = rasterization(*scene, WIDTH, HEIGHT, camera_model=camera_model)
    assert_close64(got, want)
    # As gsplat: covars win over quats and scales.
    both, _, _ = rasterization(*scene, WIDTH, HEIGHT, covars=covars, camera_model=camera_model)
    assert_same(both, got)


@pytest.mark.parametrize(
    "post",
    [
        PostProcess(),
        PostProcess(clamp=(0.0, 0.5), size=(20, 37)),
        PostProcess(size=(50, 80), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), layout="CHW"),
        PostProcess(layout="CHW"),
    ],
    ids=str,
)
@pytest.mark.parametrize("render_mode", ["RGB", "RGB+ED"])
def test_postprocess(render_mode, post, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(200, 2, batch=(2,), sh_degree=2, device=device)
    assert_matches_reference(
        scene,
        sh_degree=2,
        render_mode=render_mode,
        backgrounds=random_backgrounds(scene, "image", (WIDTH, HEIGHT)),
        postprocess=post,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.float32], ids=str)
def test_postprocess_dtypes(dtype, device):
    """Exactly what torch makes of the float picture."""
    scene = make_scene(200, 2, dtype=torch.float32, device=device)
    picture, alphas, _ = rasterization(*scene, WIDTH, HEIGHT)
    got, got_alphas, _ = rasterization(*scene, WIDTH, HEIGHT, postprocess=PostProcess(dtype=dtype))
    want = (255 * picture + 0.5).clamp(0, 255).to(dtype) if dtype == torch.uint8 else picture.to(dtype)
    assert_same(got, want)
    assert_same(got_alphas, alphas)


@pytest.mark.parametrize("rasterize_mode", RASTERIZE_MODES)
@pytest.mark.parametrize("camera_model", MODELS)
@pytest.mark.parametrize("opaque", [False, True])
def test_float32_errs_as_little_as_the_reference(opaque, camera_model, rasterize_mode, device):
    scene = make_scene(700, 2, sh_degree=3, dtype=torch.float32, seed=7)
    if opaque:
        scene.opacities[:] = 1.0
    scene = scene.to(device)
    options = {"camera_model": camera_model, "rasterize_mode": rasterize_mode, "sh_degree": 3}

    def render(scene: Scene, **more: Any) -> Tensor:
        return torch.cat(rasterization(*scene, WIDTH, HEIGHT, **options, **more)[:2], -1)

    own = render(scene, backend="reference")
    true = render(scene.to(torch.float64), backend="reference")
    assert_close_outside_band(render(scene), own, true)


# A batch is its views, bit by bit.


def render_all(scene: Scene, size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> list[Tensor]:
    colors, alphas, meta = rasterization(*scene, *size, **options)
    keys = ("n_invalid", "radii", "means2d", "depths", "conics", "opacities", "tiles_per_gauss")
    return [colors, alphas, *(meta[key] for key in keys)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("camera_model", MODELS)
@pytest.mark.parametrize("c", [1, 2, 3, 8, 70])
def test_batch_equals_loop(c, camera_model, dtype, device):
    skip_unsupported(device, dtype)
    scene = make_scene(300, c, sh_degree=2, dtype=dtype, width=50, height=30, device=device)
    options = {"sh_degree": 2, "camera_model": camera_model, "render_mode": "RGB+ED", "packed": False}
    batch = render_all(scene, (50, 30), **options)
    for k in range(c):
        for together, alone in zip(batch, render_all(scene.image(k), (50, 30), **options), strict=True):
            assert_same(together[k : k + 1], alone)


def test_batch_equals_loop_with_many_gaussians(device):
    """More Gaussians than one work item of any stage takes."""
    scene = make_scene(5000, 3, channels=5, dtype=torch.float32, device=device)
    batch = render_all(scene, packed=False)
    for k in range(3):
        for together, alone in zip(batch, render_all(scene.image(k), packed=False), strict=True):
            assert_same(together[k : k + 1], alone)


def test_scenes_of_a_batch_equal_themselves_alone(device):
    scene = make_scene(200, 2, batch=(2, 3), sh_degree=1, dtype=torch.float32, device=device)
    batch = render_all(scene, sh_degree=1, packed=False)
    for i, j in itertools.product(range(2), range(3)):
        alone = render_all(Scene(*(x[i, j] for x in scene)), sh_degree=1, packed=False)
        for together, single in zip(batch, alone, strict=True):
            assert_same(together[i, j], single)


def test_packed_is_a_layout_of_meta(device):
    scene = make_scene(200, 2, dtype=torch.float32, device=device)
    for got, want in zip(
        rasterization(*scene, WIDTH, HEIGHT, packed=True)[:2],
        rasterization(*scene, WIDTH, HEIGHT, packed=False)[:2],
        strict=True,
    ):
        assert_same(got, want)


def test_repeated_runs_are_equal(device):
    scene = make_scene(2000, 3, sh_degree=3, dtype=torch.float32, device=device)
    first = render_all(scene, sh_degree=3)
    for _ in range(5):
        for got, want in zip(render_all(scene, sh_degree=3), first, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("hints", [{"channel_chunk": 1}, {"segmented": True}, {"absgrad": True}, {"sparse_grad": True}])
def test_hints_change_nothing(hints, device):
    scene = make_scene(100, 2, dtype=torch.float32, device=device)
    got = rasterization(*scene, WIDTH, HEIGHT, **hints)
    assert_same(got[0], rasterization(*scene, WIDTH, HEIGHT)[0])


# Memory layouts.


def strided_variants(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x of other memory layouts."""
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype, device=x.device)
    padded[..., 1:-2] = x
    doubled = x.repeat_interleave(2, dim=0)
    big = torch.cat([torch.full_like(x, math.nan), x])
    return {
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced last": padded[..., 1:-2],
        "every second": doubled[::2],
        "offset": big[x.shape[0] :],
    }


@pytest.mark.parametrize("layout", ["transposed", "sliced last", "every second", "offset"])
@pytest.mark.parametrize("name", Scene._fields)
def test_strides_are_accepted(name, layout, device):
    scene = make_scene(60, 2, sh_degree=1, dtype=torch.float32, device=device)
    want = render_all(scene, sh_degree=1)
    variant = strided_variants(getattr(scene, name))[layout]
    assert_same(variant.contiguous(), getattr(scene, name))
    for got, expected in zip(render_all(scene._replace(**{name: variant}), sh_degree=1), want, strict=True):
        assert_same(got, expected)


def test_expanded_inputs_are_accepted(device):
    scene = make_scene(60, 2, dtype=torch.float32, device=device)
    scene = scene._replace(
        scales=scene.scales[:1, :1].expand(60, 3),
        opacities=torch.tensor(0.5, device=device).expand(60),
        colors=scene.colors[:1].expand(60, 3),
        Ks=scene.Ks[:1].expand(2, 3, 3),
    )
    backgrounds = torch.rand(3, device=device).expand(2, 3)
    want = Scene(*(x.contiguous() for x in scene))
    got = rasterization(*scene, WIDTH, HEIGHT, backgrounds=backgrounds)
    assert_same(got[0], rasterization(*want, WIDTH, HEIGHT, backgrounds=backgrounds.contiguous())[0])
    batched = Scene(*(x.expand(2, 3, *x.shape) for x in want))
    images = rasterization(*batched, WIDTH, HEIGHT)[0]
    single = rasterization(*want, WIDTH, HEIGHT)[0]
    assert_same(images, single.expand_as(images).contiguous())


def test_inputs_are_not_changed(device):
    """The color stage takes records out in place: only ever its own."""
    scene = make_scene(60, 2, dtype=torch.float32, device=device)
    scene.colors[3] = math.nan
    copies = Scene(*(x.clone() for x in scene))
    backgrounds = torch.rand(2, 3, device=device)
    kept = backgrounds.clone()
    rasterization(*scene, WIDTH, HEIGHT, backgrounds=backgrounds)
    for x, y in zip((*scene, backgrounds), (*copies, kept), strict=True):
        assert_same(x, y)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(context, device):
    scene = make_scene(60, 2, sh_degree=1, dtype=torch.float32, device=device)
    want = render_all(scene, sh_degree=1)
    with context():
        got = render_all(scene, sh_degree=1)
    for x, y in zip(got, want, strict=True):
        assert_same(x, y)


def test_inference_tensors_are_accepted(device):
    with torch.inference_mode():
        scene = make_scene(60, 2, dtype=torch.float32, device=device)
    got = rasterization(*scene, WIDTH, HEIGHT)[0]
    assert_same(got, rasterization(*make_scene(60, 2, dtype=torch.float32, device=device), WIDTH, HEIGHT)[0])


def test_autocast_changes_nothing(device):
    scene = make_scene(60, 2, sh_degree=2, dtype=torch.float32, device=device)
    want = render_all(scene, sh_degree=2, render_mode="RGB+ED")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = render_all(scene, sh_degree=2, render_mode="RGB+ED")
    for x, y in zip(got, want, strict=True):
        assert_same(x, y)


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_default_dtype_changes_nothing(default, device):
    scene = make_scene(60, 2, dtype=torch.float32, device=device)
    post = PostProcess(mean=(0.1,) * 3, std=(0.3,) * 3)
    want = render_all(scene, postprocess=post)
    torch.set_default_dtype(default)
    try:
        got = render_all(scene, postprocess=post)
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(got, want, strict=True):
        assert_same(x, y)


# Nothing, or next to nothing, to draw.


@pytest.mark.parametrize("backend", ["rapfast", "reference"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("b", "c", "n"), [(1, 2, 0), (1, 0, 5), (0, 2, 5), (0, 0, 0)])
def test_empty_inputs(b, c, n, packed, backend, device):
    scene = make_scene(max(n, 1), max(c, 1), batch=(max(b, 1),), sh_degree=1, dtype=torch.float32, device=device)
    scene = Scene(*(x[:b, :n] for x in scene[:5]), *(x[:b, :c] for x in scene[5:]))
    for post in (None, PostProcess(size=(5, 6), layout="CHW", dtype=torch.float16)):
        colors, alphas, meta = rasterization(
            *scene, 20, 18, sh_degree=1, packed=packed, render_mode="RGB+ED", backend=backend, postprocess=post
        )
        assert colors.shape == ((b, c, 18, 20, 4) if post is None else (b, c, 4, 5, 6))
        assert alphas.shape == ((b, c, 18, 20, 1) if post is None else (b, c, 1, 5, 6))
        assert not colors.any() and not alphas.any()
    assert meta["n_invalid"].tolist() == [[0] * c] * b
    assert meta["radii"].shape == ((0, 2) if packed else (b, c, n, 2))
    assert meta["isect_offsets"].shape == (b, c, 2, 2)
    assert meta["isect_ids"].shape == meta["flatten_ids"].shape == (0,)
    dict(meta)  # every entry can be made


@pytest.mark.parametrize("backend", ["rapfast", "reference"])
@pytest.mark.parametrize("kind", [None, "color", "image"])
def test_nothing_visible_is_background(kind, backend, device):
    scene = make_scene(50, 2, dtype=torch.float32, device=device)
    scene.means[:, 2] -= 100
    backgrounds = random_backgrounds(scene, kind, (WIDTH, HEIGHT))
    colors, alphas, meta = rasterization(
        *scene, WIDTH, HEIGHT, backgrounds=backgrounds, render_mode="RGB+ED", backend=backend
    )
    assert not alphas.any() and not colors[..., 3].any()
    if backgrounds is None:
        assert not colors.any()
    else:
        want = backgrounds if kind == "image" else backgrounds[:, None, None].expand(2, HEIGHT, WIDTH, 3)
        assert_same(colors[..., :3].contiguous(), want.contiguous())
    assert len(meta["gaussian_ids"]) == 0


def test_one_visible(device):
    """One of fifty in front of the camera: the picture is that of it alone."""
    scene = make_scene(50, 1, dtype=torch.float32, device=device)
    scene.means[:, 2] -= 100
    scene.means[17] = 0
    scene.viewmats[0] = torch.eye(4, device=device)
    scene.viewmats[0, 2, 3] = 3.0
    colors, alphas, meta = rasterization(*scene, WIDTH, HEIGHT)
    assert meta["gaussian_ids"].tolist() == [17]
    assert bool(alphas.any())
    alone = scene._replace(**{k: getattr(scene, k)[17:18] for k in Scene._fields[:5]})
    assert_same(colors, rasterization(*alone, WIDTH, HEIGHT)[0])


def test_native_is_much_faster_than_the_reference():
    """A vectorised backend, not a loop in Python: 20 times at least."""
    scene = make_scene(10_000, 1, sh_degree=0, width=213, height=120, dtype=torch.float32)
    scene.scales.mul_(0.3)
    args = (*scene, 213, 120)
    rasterization(*args, sh_degree=0)
    native = []
    for _ in range(3):
        started = time.perf_counter()
        colors, _, _ = rasterization(*args, sh_degree=0)
        native.append(time.perf_counter() - started)
    started = time.perf_counter()
    want, _, _ = rasterization(*args, sh_degree=0, backend="reference")
    assert time.perf_counter() - started > 20 * min(native)
    assert float((colors - want).abs().mean()) < 1e-6


@pytest.mark.parametrize("sh_degree", [None, 2])
@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("batch", [(3,), (2, 2)], ids=str)
def test_colors_of_one_scene_expanded_over_all(sh_degree, channels, batch, device):
    """As a copy for each scene, bit by bit, whole or split; and without the copies."""
    if sh_degree is not None and channels != 3:
        pytest.skip("spherical harmonics have three channels")
    size = (33, 20)
    scene = make_scene(
        400, 2, batch=batch, sh_degree=sh_degree, channels=channels, width=33, height=20, dtype=torch.float32,
        device=device,
    )  # fmt: skip
    one = scene.colors[(0,) * len(batch)].clone()
    shared = scene._replace(colors=one.expand(*batch, *one.shape))
    copied = scene._replace(colors=shared.colors.contiguous())
    expected, alphas, _ = rasterization(*copied, *size, sh_degree=sh_degree)
    for options in ({}, {"max_memory": 1_200_000 if (channels, batch) == (32, (2, 2)) else 900_000}):
        images, found_alphas, _ = rasterization(*shared, *size, sh_degree=sh_degree, **options)
        assert torch.equal(images, expected) and torch.equal(found_alphas, alphas)
    assert not torch.equal(expected[(0,) * len(batch)], expected[(1,) + (0,) * (len(batch) - 1)])


@pytest.mark.parametrize(("channels", "sh_degree"), [(3, None), (6, None), (3, 2)])
@pytest.mark.parametrize("batch", [(3,), (2, 2), (1, 3)], ids=str)
def test_gradients_of_expanded_colors_are_summed_over_the_scenes(batch, channels, sh_degree, device):
    size, dtype = (33, 20), torch.float64 if device.type == "cpu" else torch.float32
    scene = make_scene(
        200, 2, batch=batch, sh_degree=sh_degree, channels=channels, width=33, height=20, dtype=dtype, device=device,
    )  # fmt: skip
    one = scene.colors[(0,) * len(batch)].clone().requires_grad_()
    copies = one.detach().expand(*batch, *one.shape).contiguous().requires_grad_()
    images, _, _ = rasterization(*scene._replace(colors=one.expand(*batch, *one.shape)), *size, sh_degree=sh_degree)
    expected, _, _ = rasterization(*scene._replace(colors=copies), *size, sh_degree=sh_degree)
    assert torch.equal(images, expected)
    weights = torch.rand(images.shape, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)
    (images * weights).sum().backward()
    (expected * weights).sum().backward()
    summed = copies.grad.sum(tuple(range(len(batch))))
    assert torch.allclose(one.grad, summed, rtol=1e-5, atol=1e-6 * float(summed.abs().max()))
    assert float((copies.grad[(0,) * len(batch)] - one.grad).abs().max()) > 0.1 * float(one.grad.abs().max())
