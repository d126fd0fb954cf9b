"""Renderer: the bits of an eager call, and never a wrong picture where there is too little room."""

from __future__ import annotations

import gc
import math
import threading
from typing import Any

import pytest
import torch
from renderer_scenes import (
    LONG_SLEEP,
    SETTINGS,
    SIZE,
    assert_all_same,
    assert_poisoned,
    copies,
    cuda_scene,
    direct,
    fitted,
    gaussians,
    moved,
    native_arguments,
)
from scenes import HEIGHT, WIDTH, Scene, assert_same, flat, make_scene

import rapfast
from rapfast import PostProcess, Renderer, ops, rasterization

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
