"""What must hold for any scene: properties of the renderer, tried on scenes that hypothesis draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scenes import HEIGHT, WIDTH, Scene, assert_same, make_scene
from torch import Tensor

from rapfast import ops, rasterization

# The device fixture is the same for every example. Examples are the same in every run.
PROPERTY = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 10**6)
models = st.sampled_from(["pinhole", "ortho", "fisheye"])
modes = st.sampled_from(["classic", "antialiased"])


def draw(seed: int, device: torch.device, n: int = 150, c: int = 2, **options: Any) -> Scene:
    return make_scene(n, c, seed=seed, dtype=torch.float32, device=device, **options)


def render(scene: Scene, size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> Tensor:
    """Colours, depth and alpha [..., C, H, W, D + 2]."""
    colors, alphas, _ = rasterization(*scene, *size, render_mode="RGB+D", **options)
    return torch.cat([colors, alphas], -1)


def take(scene: Scene, rows: Tensor) -> Scene:
    """The Gaussians of these indices, in their order."""
    return scene._replace(**{name: getattr(scene, name)[rows] for name in Scene._fields[:5]})


def append(scene: Scene, other: Scene) -> Scene:
    return scene._replace(
        **{name: torch.cat([getattr(scene, name), getattr(other, name)]) for name in Scene._fields[:5]}
    )


def assert_nearly(got: Tensor, want: Tensor, tolerance: float = 2e-5, band: float = 2e-3) -> None:
    """Equal within rounding, but for a capped share of pixels in which a cut or a stop fell differently."""
    error = (got - want).abs().amax(-1) / want.abs().amax().clamp(min=1)
    assert float(error.max()) < 0.02
    assert int((error > tolerance).sum()) <= math.ceil(band * error.numel())


@PROPERTY
@given(seed=seeds, camera_model=models, rasterize_mode=modes)
def test_order_of_gaussians_does_not_matter(seed, camera_model, rasterize_mode, device):
    """Depths differ, so the picture is the same bit by bit: each pixel sums the same list."""
    scene = draw(seed, device)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(seed)).to(device)
    options = {"camera_model": camera_model, "rasterize_mode": rasterize_mode}
    depths = rasterization(*scene, WIDTH, HEIGHT, packed=False, **options)[2]["depths"]
    if any(len(row[row > 0].unique()) < len(row[row > 0]) for row in depths):
        return  # two Gaussians at the very same depth: their order is that of their indices
    assert_same(render(take(scene, order), **options), render(scene, **options))


@PROPERTY
@given(seed=seeds)
def test_order_among_equal_depths_is_that_of_the_indices(seed, device):
    """All Gaussians in one plane: moving a copy of the scene behind itself changes nothing before it."""
    scene = draw(seed, device, c=1)
    scene.viewmats[0] = torch.eye(4, device=device)
    scene.viewmats[0, 2, 3] = 3.0
    scene.means[:, 2] = 0.0
    order = torch.randperm(150, generator=torch.Generator().manual_seed(seed)).to(device)
    # Depths that rise with the index give the same order as no depths at all.
    shuffled = take(scene, order)
    spread = shuffled._replace(means=shuffled.means.clone())
    spread.means[:, 2] = torch.arange(150, device=device) * 1e-5
    got = render(shuffled, camera_model="ortho")
    want = render(spread, camera_model="ortho")
    assert_nearly(got[..., [0, 1, 2, 4]], want[..., [0, 1, 2, 4]])


@PROPERTY
@given(seed=seeds, place=st.integers(0, 150), opacity=st.sampled_from([0.0, 0.0039, -0.5, -0.0]))
def test_gaussians_of_zero_opacity_change_nothing(seed, place, opacity, device):
    scene = draw(seed, device)
    ghost = draw(seed + 1, device, n=20)
    ghost = ghost._replace(opacities=torch.full_like(ghost.opacities, opacity))
    rows = torch.arange(170, device=device)
    rows = torch.cat([rows[:place], rows[150:], rows[place:150]])
    assert_same(render(take(append(scene, ghost), rows)), render(scene))


@PROPERTY
@given(seed=seeds, factor=st.floats(0.01, 100.0))
def test_sign_and_length_of_quaternions_do_not_matter(seed, factor, device):
    scene = draw(seed, device)
    want = render(scene)
    assert_same(render(scene._replace(quats=-scene.quats)), want)
    assert_nearly(render(scene._replace(quats=factor * scene.quats)), want)


@PROPERTY
@given(seed=seeds, power=st.integers(-20, 20))
def test_powers_of_two_scale_quaternions_exactly(seed, power, device):
    scene = draw(seed, device)
    assert_same(render(scene._replace(quats=2.0**power * scene.quats)), render(scene))


@PROPERTY
@given(
    seed=seeds,
    place=st.integers(0, 150),
    name=st.sampled_from(["means", "quats", "scales", "opacities", "colors"]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_an_invalid_gaussian_changes_nothing_and_is_counted(seed, place, name, value, device):
    scene = draw(seed, device)
    bad = draw(seed + 1, device, n=1)
    bad = bad._replace(means=torch.zeros_like(bad.means), opacities=torch.ones_like(bad.opacities))
    seen = rasterization(*bad, WIDTH, HEIGHT, packed=False)[2]["radii"].amax(-1)[:, 0] > 0
    getattr(bad, name).view(-1)[-1] = value
    rows = torch.arange(151, device=device)
    rows = torch.cat([rows[:place], rows[150:], rows[place:150]])
    poisoned = take(append(scene, bad), rows)
    assert_same(render(poisoned), render(scene))
    n_invalid = rasterization(*poisoned, WIDTH, HEIGHT)[2]["n_invalid"]
    # A colour is looked at only where the Gaussian is seen.
    assert n_invalid.tolist() == (seen.long().tolist() if name == "colors" else [1, 1])


@PROPERTY
@given(seed=seeds, camera_model=models)
def test_moving_scene_and_cameras_together_changes_nothing(seed, camera_model, device):
    """By whole numbers that float32 adds exactly to coordinates on a coarse grid."""
    scene = draw(seed, device)
    scene = scene._replace(means=(scene.means * 256).round() / 256)
    shift = torch.tensor([8.0, -16.0, 4.0], device=device)
    moved = scene._replace(means=scene.means + shift, viewmats=scene.viewmats.clone())
    moved.viewmats[:, :3, 3] -= (scene.viewmats[:, :3, :3] @ shift[:, None])[..., 0]
    got, want = (render(s, camera_model=camera_model) for s in (moved, scene))
    # The camera's own translation is rounded at the size of the shift: 2^-20 of a world unit.
    assert_nearly(got, want, tolerance=1e-3, band=1e-2)


@PROPERTY
@given(seed=seeds, record_capacity=st.integers(0, 400), capacity=st.integers(0, 5000))
def test_capacities_change_nothing(seed, record_capacity, capacity, device):
    s = Scene(*(x[None] for x in draw(seed, device)))
    arguments = (s.means, s.quats, s.scales, None, s.opacities, s.viewmats, s.Ks, WIDTH, HEIGHT)
    images = []
    for rooms in ({}, {"capacity": record_capacity}):
        records = ops.project(*arguments, **rooms)
        colors = ops.color(s.means, s.viewmats, s.Ks, s.colors, records, WIDTH, HEIGHT, sh_degree=None)
        tiles = ops.bin(records, WIDTH, HEIGHT, **({"capacity": capacity} if rooms else {}))
        images.append(ops.blend(records, colors, tiles, WIDTH, HEIGHT))
    for got, want in zip(images[1], images[0], strict=True):
        assert_same(got, want)


@PROPERTY
@given(seed=seeds, camera_model=models, rasterize_mode=modes, opaque=st.booleans())
def test_alphas_and_colors_stay_in_their_ranges(seed, camera_model, rasterize_mode, opaque, device):
    """Alpha in [0, 1), colours between 0 and alpha times the largest, over white between both."""
    scene = draw(seed, device, channels=3)
    if opaque:
        scene.opacities[:] = 1.0
    options = {"camera_model": camera_model, "rasterize_mode": rasterize_mode}
    colors, alphas, _ = rasterization(*scene, WIDTH, HEIGHT, **options)
    assert float(alphas.min()) >= 0 and float(alphas.max()) < 1
    assert float(colors.min()) >= 0
    assert bool((colors <= alphas * scene.colors.amax(0) + 1e-5).all())
    white = torch.ones(2, 3, device=device)
    over, _, _ = rasterization(*scene, WIDTH, HEIGHT, backgrounds=white, **options)
    assert float(over.min()) >= float(scene.colors.min()) - 1e-5
    assert float(over.max()) <= 1 + 1e-5
    torch.testing.assert_close(over, colors + (1 - alphas), atol=1e-6, rtol=0)


@PROPERTY
@given(seed=seeds, factor=st.sampled_from([0.5, 2.0, 4.0]))
def test_colors_act_linearly(seed, factor, device):
    """Powers of two scale every product and sum exactly."""
    scene = draw(seed, device)
    got = rasterization(*scene._replace(colors=factor * scene.colors), WIDTH, HEIGHT)[0]
    assert_same(got, factor * rasterization(*scene, WIDTH, HEIGHT)[0])


@PROPERTY
@given(seed=seeds, camera_model=models, c=st.integers(1, 5), n=st.integers(0, 300))
def test_batch_equals_loop(seed, camera_model, c, n, device):
    scene = draw(seed, device, n=max(n, 1), c=c)
    scene = take(scene, torch.arange(n, device=device))
    batch = render(scene, camera_model=camera_model)
    for k in range(c):
        assert_same(batch[k : k + 1], render(scene.image(k), camera_model=camera_model))


@PROPERTY
@given(seed=seeds, width=st.integers(1, 60), height=st.integers(1, 60))
def test_a_smaller_image_is_a_crop(seed, width, height, device):
    """Same intrinsics, fewer pixels: what remains is the same, where the frustum's clamps do not act
    (an orthographic camera has none)."""
    scene = draw(seed, device)
    whole = render(scene, (60, 60), camera_model="ortho")
    part = render(scene, (width, height), camera_model="ortho")
    assert_same(part, whole[:, :height, :width].contiguous())


@PROPERTY
@given(seed=seeds)
def test_expected_depth_lies_between_the_depths(seed, device):
    scene = draw(seed, device)
    colors, alphas, meta = rasterization(*scene, WIDTH, HEIGHT, render_mode="ED")
    depths = meta["depths"]
    drawn = alphas[..., 0] > 0
    assert float(colors[..., 0][drawn].min()) >= float(depths.min()) * (1 - 1e-5)
    assert float(colors.max()) <= float(depths.max()) * (1 + 1e-5)
    assert not colors[..., 0][~drawn].any()


@pytest.mark.parametrize("seed", range(3))
def test_a_view_that_sees_nothing_between_views_that_do(seed, device):
    scene = draw(seed, device, c=3)
    scene.viewmats[1, 2, 3] = -100.0
    batch = render(scene)
    assert not batch[1].any()
    for k in (0, 2):
        assert_same(batch[k : k + 1], render(scene.image(k)))
