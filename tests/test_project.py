"""Stage 1, project, against the reference and against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scenes import (
    ALPHA_CUT,
    HEIGHT,
    WIDTH,
    Scene,
    assert_close64,
    assert_same,
    covariances,
    flat,
    make_scene,
    reference_records,
    skip_unsupported,
    spots,
)

from rapfast import ops, reference
from rapfast.ops.project import Records

MODELS = ["pinhole", "ortho", "fisheye"]
SIZES = [(1, 1), (1, 17), (16, 16), (17, 33), (WIDTH, HEIGHT)]


def project_op(s: Scene, covars: Any = None, size=(WIDTH, HEIGHT), **options: Any) -> Records:
    s = flat(s)
    if covars is not None:
        return ops.project(s.means, None, None, covars, s.opacities, s.viewmats, s.Ks, *size, **options)
    return ops.project(s.means, s.quats, s.scales, None, s.opacities, s.viewmats, s.Ks, *size, **options)


def project_reference(
    s: Scene, covars: Any = None, size=(WIDTH, HEIGHT), antialiased: bool = False, **options: Any
) -> reference.Records:
    s = flat(s)
    options["rasterize_mode"] = "antialiased" if antialiased else "classic"
    return reference.project(s.means, s.quats, s.scales, s.opacities, s.viewmats, s.Ks, *size, covars=covars, **options)


def assert_equal64(got: Records, want: reference.Records) -> None:
    """The same records in the same order, integers exactly."""
    got_ref = reference_records(got, want.n_invalid.shape[1])
    for name in ("batch_ids", "camera_ids", "gaussian_ids", "radii", "n_invalid"):
        assert_same(getattr(got_ref, name), getattr(want, name))
    for name in ("means2d", "depths", "conics", "opacities"):
        assert_close64(getattr(got_ref, name), getattr(want, name))


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("camera_model", MODELS)
def test_float64_equals_reference(camera_model, antialiased, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(600, 3, batch=(2,), device=device)
    options = {"camera_model": camera_model, "antialiased": antialiased}
    got = project_op(scene, **options)
    assert 0 < len(got.records) < 2 * 3 * 600
    assert_equal64(got, project_reference(scene, **options))


@pytest.mark.parametrize("camera_model", MODELS)
def test_covars_replace_quats_and_scales(camera_model, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(400, 2, device=device)
    covars = covariances(flat(scene))
    got = project_op(scene, covars, camera_model=camera_model)
    assert_equal64(got, project_reference(scene, covars, camera_model=camera_model))
    assert_equal64(got, project_reference(scene, camera_model=camera_model))
    # The lower triangle is not read.
    lower = torch.tril(torch.full_like(covars, math.nan), -1)
    assert_same(project_op(scene, covars.triu() + lower, camera_model=camera_model).records, got.records)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("camera_model", MODELS)
def test_image_sizes(camera_model, size, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(300, 2, width=size[0], height=size[1], device=device)
    got = project_op(scene, size=size, camera_model=camera_model)
    assert_equal64(got, project_reference(scene, size=size, camera_model=camera_model))


@pytest.mark.parametrize(
    "options",
    [
        {"near_plane": 1.5},
        {"far_plane": 2.5},
        {"near_plane": 1.5, "far_plane": 2.5},
        {"near_plane": -3.0, "camera_model": "ortho"},
        {"near_plane": -3.0, "camera_model": "pinhole"},
        {"near_plane": -3.0, "camera_model": "fisheye"},
        {"radius_clip": 4.0},
        {"radius_clip": 1e9},
        {"eps2d": 0.0},
        {"eps2d": 0.0, "antialiased": True},
        {"eps2d": 5.0, "antialiased": True},
    ],
    ids=str,
)
def test_options(options, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(500, 2, device=device)
    assert_equal64(project_op(scene, **options), project_reference(scene, **options))


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("camera_model", MODELS)
def test_float32_errs_as_little_as_the_reference(camera_model, antialiased, device):
    """At most twice the float32 reference's own error; culls and radii differ in few records."""
    scene = make_scene(2000, 3, dtype=torch.float32, device=device)
    options = {"camera_model": camera_model, "antialiased": antialiased}
    got = reference_records(project_op(scene, **options), 3)
    own = project_reference(scene, **options)
    true = project_reference(scene.to(torch.float64), **options)

    def rows(r: reference.Records) -> dict[tuple[int, int], int]:
        return {key: row for row, key in enumerate(zip(r.camera_ids.tolist(), r.gaussian_ids.tolist(), strict=True))}

    got_rows, own_rows, true_rows = rows(got), rows(own), rows(true)
    flipped = len(got_rows.keys() ^ true_rows.keys())
    assert flipped <= math.ceil(1e-3 * len(true_rows))
    common = sorted(got_rows.keys() & own_rows.keys() & true_rows.keys())
    g, o, t = (torch.tensor([r[key] for key in common]) for r in (got_rows, own_rows, true_rows))
    radii = (got.radii[g] - true.radii[t]).abs()
    assert int(radii.max()) <= 1
    assert int((radii > 0).sum()) <= math.ceil(1e-3 * radii.numel())
    for name in ("means2d", "depths", "conics", "opacities"):
        x, y, z = getattr(got, name)[g], getattr(own, name)[o], getattr(true, name)[t]
        # Relative to a record's own largest entry; a conic's entries share its scale. Pixels count from 1.
        scale = z.abs() if z.dim() == 1 else z.abs().amax(-1, keepdim=True)
        scale = scale.clamp(min=1.0) if name == "means2d" else scale
        error, bound = ((v.double() - z).abs() / scale for v in (x, y))
        allowed = max(2 * float(bound.max()), 1e-6)
        assert float(error.max()) <= allowed, name
        # The largest errors are few: the typical one must not grow either.
        assert float(error.mean()) <= max(2 * float(bound.mean()), 1e-7), name


def test_records_are_ordered_by_image_then_gaussian(device):
    got = project_op(make_scene(500, 3, batch=(2,), dtype=torch.float32, device=device))
    assert got.image_offsets[0] == 0 and got.image_offsets[-1] == len(got.records)
    assert bool((got.image_offsets.diff() >= 0).all())
    for begin, end in zip(got.image_offsets[:-1].tolist(), got.image_offsets[1:].tolist(), strict=True):
        assert bool((got.gaussian_ids[begin:end].diff() > 0).all())
    assert got.radii.dtype == got.gaussian_ids.dtype == torch.int32
    assert got.image_offsets.dtype == got.n_invalid.dtype == torch.int64


@pytest.mark.parametrize("capacity", [0, 1, 7, 1000, 1_000_000])
def test_capacity_changes_nothing(capacity, device):
    scene = make_scene(300, 2, dtype=torch.float32, device=device)
    for got, want in zip(project_op(scene, capacity=capacity), project_op(scene), strict=True):
        assert_same(got, want)


def test_one_gaussian_by_hand(device):
    """A Gaussian on the optical axis: sigma' = focal x sigma / z, blurred by eps2d."""
    s = make_scene(1, 1, dtype=torch.float32)
    K = torch.tensor([[[50.0, 0, 40], [0, 60, 24], [0, 0, 1]]])
    s = s._replace(
        means=torch.tensor([[0.0, 0, 5]]),
        quats=torch.tensor([[2.0, 0, 0, 0]]),
        scales=torch.tensor([[0.2, 0.3, 9.0]]),
        opacities=torch.tensor([0.8]),
        viewmats=torch.eye(4)[None],
        Ks=K,
    ).to(device)
    got = project_op(s, size=(80, 48))
    x, y, a, b, c, opacity, depth, compensation = got.records[0].tolist()
    var_x, var_y = (50 * 0.2 / 5) ** 2, (60 * 0.3 / 5) ** 2
    assert (x, y, depth, b) == (40, 24, 5, 0)
    assert opacity == pytest.approx(0.8)
    assert a == pytest.approx(1 / (var_x + 0.3), rel=1e-6)
    assert c == pytest.approx(1 / (var_y + 0.3), rel=1e-6)
    sharp = math.sqrt(var_x * var_y / ((var_x + 0.3) * (var_y + 0.3)))
    assert compensation == pytest.approx(sharp, rel=1e-6)
    extend = math.sqrt(2 * math.log(0.8 * 255))
    assert got.radii[0].tolist() == [
        math.ceil(extend * math.sqrt(var_x + 0.3)),
        math.ceil(extend * math.sqrt(var_y + 0.3)),
    ]
    antialiased = project_op(s, size=(80, 48), antialiased=True)
    assert antialiased.records[0, 5].item() == pytest.approx(0.8 * sharp, rel=1e-6)


@pytest.mark.parametrize(("opacity", "extend"), [(1.0, math.sqrt(2 * math.log(255))), (5.0, 3.33), (0.02, None)])
def test_bounds_follow_opacity(opacity, extend, device):
    """3.33 sigma at most, less for what fades under 1/255 earlier (Radl et al. 2024)."""
    extend = extend or math.sqrt(2 * math.log(opacity * 255))
    s = spots([(8, 8)], [10.0], [opacity], [1.0], [(1.0,)], dtype=torch.float32, device=device)
    radius = math.ceil(extend * math.sqrt(100.3))
    got = project_op(s, size=(16, 16), camera_model="ortho")
    assert got.radii.tolist() == [[radius, radius]]


@pytest.mark.parametrize("x", [-3.999, -4.001, 19.999, 20.001])
def test_cull_at_the_image_edge(x, device):
    """Kept while the box overlaps the image: radius 4, image 0..16."""
    s = spots([(x, 8)], [0.8], [1.0], [1.0], [(1.0,)], dtype=torch.float32, device=device)
    got = project_op(s, size=(16, 16), camera_model="ortho")
    assert len(got.records) == (1 if -4 < x < 20 else 0)
    if len(got.records):
        assert got.radii.tolist() == [[4, 4]]


@pytest.mark.parametrize(("factor", "seen"), [(0.9999, 0), (1.0001, 1)])
def test_faint_gaussians_are_culled(factor, seen, device):
    s = spots([(8, 8)], [2.0], [factor * ALPHA_CUT], [1.0], [(1.0,)], dtype=torch.float32, device=device)
    got = project_op(s, size=(16, 16), camera_model="ortho")
    assert len(got.records) == seen
    assert got.n_invalid.tolist() == [0]


def test_near_and_far_are_inclusive(device):
    depths = [0.999, 1.0, 2.0, 3.0, 3.001]
    s = spots([(8, 8)] * 5, [2.0] * 5, [1.0] * 5, depths, [(1.0,)] * 5, dtype=torch.float32, device=device)
    got = project_op(s, size=(16, 16), camera_model="ortho", near_plane=1.0, far_plane=3.0)
    assert got.gaussian_ids.tolist() == [1, 2, 3]
    assert got.records[:, 6].tolist() == [1.0, 2.0, 3.0]


def test_radius_clip_needs_both_radii_small(device):
    s = spots([(8, 8)] * 2, [0.5] * 2, [1.0] * 2, [1.0] * 2, [(1.0,)] * 2, dtype=torch.float32)
    s.scales[1, 0] = 3.0
    got = project_op(s.to(device), size=(16, 16), camera_model="ortho", radius_clip=4.0)
    assert got.gaussian_ids.tolist() == [1]


@pytest.mark.parametrize("camera_model", MODELS)
def test_frustum_test_drops_nothing(camera_model, device):
    """The cheap test before the projection must keep all that the projection keeps: Gaussians far off
    axis, long needles, sheared and scaled cameras."""
    skip_unsupported(device, torch.float64)
    scene = make_scene(3000, 4, seed=11)
    g = torch.Generator().manual_seed(1)
    scene.means.mul_(3)
    scene.scales.mul_(torch.exp(3 * torch.rand(3000, 3, generator=g, dtype=torch.float64)))
    scene.viewmats[1, :3, :3] *= 3.0
    scene.viewmats[2, :3, :3] += 0.3 * torch.randn(3, 3, generator=g, dtype=torch.float64)
    scene.Ks[3, 0, 2] += 200
    scene = scene.to(device)
    got = project_op(scene, camera_model=camera_model)
    assert_equal64(got, project_reference(scene, camera_model=camera_model))


@pytest.mark.parametrize("camera_model", MODELS)
@pytest.mark.parametrize(("n", "c"), [(1, 1), (31, 33), (513, 2), (1023, 9), (2049, 40), (5000, 1)])
def test_odd_numbers_of_gaussians_and_cameras(n, c, camera_model, device):
    """The GPU cuts both into runs: every pair is in one of them, at its place, and its record is that of the view
    alone, bit by bit."""
    scene = make_scene(n, c, batch=(2,), dtype=torch.float32)
    scene.means.mul_(1.5)  # a part is out of sight
    scene.means[:, 30::97, 1] = math.nan
    scene.opacities[1, 31::53] = math.inf
    got = project_op(scene.to(device), camera_model=camera_model)
    own = project_op(scene.to(torch.float64), camera_model=camera_model)
    assert got.n_invalid.tolist() == own.n_invalid.tolist()
    if n > 100:
        assert 0.03 < len(own.records) / (2 * n * c) < 0.9
    for b, k in {(0, 0), (0, c - 1), (1, c // 2), (1, c - 1)}:
        one = Scene(*(x[b] for x in scene)).image(k).to(device)
        alone = project_op(one, camera_model=camera_model)
        begin, end = got.image_offsets[b * c + k : b * c + k + 2].tolist()
        for name in ("records", "radii", "gaussian_ids"):
            assert_same(getattr(got, name)[begin:end], getattr(alone, name))
        # float32 may decide otherwise at an edge, of which there are few.
        true = own.image_offsets[b * c + k : b * c + k + 2].tolist()
        ids = set(own.gaussian_ids[true[0] : true[1]].tolist())
        assert len(ids ^ set(alone.gaussian_ids.tolist())) <= 1 + n // 1000


@pytest.mark.parametrize("focal", [0.15, 0.25, 0.5, 2.0])
def test_fisheye_bound_drops_nothing(focal, device):
    """Fields of view from 29 degrees to nearly all around, where the bound must give way: against a camera whose
    image is so large that it culls nothing, with the edges of the small one applied afterwards."""
    width, height = 120, 70
    scene = make_scene(4000, 3, width=width, height=height, seed=5)
    scene.means.mul_(2)
    scene.scales.mul_(0.5)
    scene.Ks[:, 0, 0] = scene.Ks[:, 1, 1] = focal * width
    scene.Ks[1, 0, 2] = -20.0  # a principal point outside
    scene = scene.to(torch.float32).to(device)
    far = 4000
    wide = scene._replace(Ks=scene.Ks.clone())
    wide.Ks[:, :2, 2] += far
    options = {"camera_model": "fisheye"}
    everything = project_op(wide, size=(width + 2 * far, height + 2 * far), **options)
    x, y = (everything.records[:, i].double() - far for i in (0, 1))
    rx, ry = (everything.radii[:, i].double() for i in (0, 1))
    # Where the last bits decide, both are right.
    margin = 1e-2
    inside = (x + rx > margin) & (x - rx < width - margin) & (y + ry > margin) & (y - ry < height - margin)
    counts = everything.image_offsets.diff()
    images = torch.repeat_interleave(torch.arange(3, device=counts.device), counts)
    want = set(zip(images[inside].tolist(), everything.gaussian_ids[inside].tolist(), strict=True))
    got = project_op(scene, size=(width, height), **options)
    rows = torch.repeat_interleave(torch.arange(3, device=counts.device), got.image_offsets.diff())
    assert len(want) > 100
    assert want <= set(zip(rows.tolist(), got.gaussian_ids.tolist(), strict=True))


# Each of these makes Gaussian 3 invalid in every view.
BAD_GAUSSIANS = [
    (name, value) for name in ("means", "quats", "scales", "opacities") for value in (math.nan, math.inf, -math.inf)
] + [("quats", 0.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "value"), BAD_GAUSSIANS)
def test_invalid_gaussians_are_counted(name, value, dtype, device):
    skip_unsupported(device, dtype)
    scene = make_scene(50, 2, dtype=dtype)
    if value == 0.0:
        scene.quats[3] = 0.0
    else:
        getattr(scene, name)[3].view(-1)[-1] = value
    scene = scene.to(device)
    got = project_op(scene)
    assert got.n_invalid.tolist() == [1, 1]
    assert 3 not in got.gaussian_ids.tolist()
    assert bool(got.records.isfinite().all())
    assert_same(got.n_invalid.view(1, 2), project_reference(scene).n_invalid)


@pytest.mark.parametrize("entry", range(9))
def test_invalid_covariances_are_counted(entry, device):
    scene = make_scene(50, 2, dtype=torch.float32)
    covars = covariances(flat(scene))
    covars[0, 3].view(-1)[entry] = math.nan
    got = project_op(scene.to(device), covars.to(device))
    is_read = entry in (0, 1, 2, 4, 5, 8)
    assert got.n_invalid.tolist() == ([1, 1] if is_read else [0, 0])


def test_negative_definite_covariance_is_never_drawn(device):
    scene = make_scene(50, 2, dtype=torch.float32, device=device)
    covars = -10 * covariances(flat(scene)) - 10 * torch.eye(3, device=device)
    got = project_op(scene, covars)
    assert len(got.records) == 0
    assert_same(got.n_invalid.view(1, 2), project_reference(scene, covars).n_invalid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-79, 1e-30, 3e-12, 1e4, 1e18, 1e30, 1e160])
def test_extreme_scales(scale, dtype, device):
    """Zero, negative, tiny and huge scales: drawn or counted, as the reference has it, never NaN."""
    skip_unsupported(device, dtype)
    scene = make_scene(50, 2, dtype=dtype)
    scene.scales[:25] = torch.tensor(scale, dtype=dtype)  # 1e160 is infinite in float32
    scene = scene.to(device)
    for options in ({}, {"eps2d": 0.0}, {"antialiased": True}, {"camera_model": "ortho"}):
        got = project_op(scene, **options)
        want = project_reference(scene, **options)
        assert bool(got.records.isfinite().all())
        assert_same(got.n_invalid.view(1, 2), want.n_invalid)
        assert_same(got.gaussian_ids.long(), want.gaussian_ids)
        assert bool((got.radii > 0).all())


def test_radii_saturate(device):
    """A radius beyond int32 is the largest int32, not a negative number."""
    skip_unsupported(device, torch.float64)
    scene = make_scene(10, 1, device=device)
    scene.scales[:] = 1e12
    got = project_op(scene)
    assert len(got.records) > 0
    assert bool((got.radii == 2**31 - 1).all())
    assert_equal64(got, project_reference(scene))


def poison_view(scene: Scene, what: str) -> Scene:
    """Camera 1 made unusable."""
    scene = Scene(*(x.clone() for x in scene))
    if what == "singular":
        scene.viewmats[1, 2, :3] = scene.viewmats[1, 1, :3]
    elif what == "zero":
        scene.viewmats[1] = 0
    elif what == "overflow":
        scene.viewmats[1, :3, :3] *= 1e20 if scene.means.dtype == torch.float32 else 1e150
    elif what.startswith("viewmat "):
        scene.viewmats[1, 1, int(what[-1])] = float(what.split()[1])
    elif what.startswith("K "):
        scene.Ks[1, int(what[-2]), int(what[-1])] = float(what.split()[1])
    return scene


@pytest.mark.parametrize(
    "what",
    ["singular", "zero", "overflow", "viewmat nan 0", "viewmat inf 3", "viewmat -inf 1"]
    + ["K nan 00", "K inf 11", "K nan 02", "K -inf 12", "K 0 00", "K 0 11", "K -50 00", "K nan 22"],
)
def test_unusable_cameras_see_nothing(what, device):
    """All Gaussians of such a view are counted as invalid; the other views do not notice."""
    scene = make_scene(60, 3, dtype=torch.float32, device=device)
    good, bad = project_op(scene), project_op(poison_view(scene, what))
    assert bad.n_invalid.tolist() == [0, 60, 0]
    counts, before = bad.image_offsets.diff().tolist(), good.image_offsets.diff().tolist()
    assert counts == [before[0], 0, before[2]]
    assert_same(project_reference(poison_view(scene, what)).n_invalid, bad.n_invalid.view(1, 3))


def test_last_row_of_viewmat_and_skew_are_not_read(device):
    scene = make_scene(60, 2, dtype=torch.float32, device=device)
    want = project_op(scene)
    scene.viewmats[:, 3] = math.nan
    scene.Ks[:, 0, 1] = 7.0
    for got, expected in zip(project_op(scene), want, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize(("n", "c", "b"), [(0, 2, 1), (5, 0, 1), (5, 2, 0), (0, 0, 0)])
def test_empty(n, c, b, device):
    s = make_scene(max(n, 1), max(c, 1), batch=(max(b, 1),), dtype=torch.float32, device=device)
    s = Scene(*(x[:b, :n] for x in s[:5]), *(x[:b, :c] for x in s[5:]))
    got = ops.project(s.means, s.quats, s.scales, None, s.opacities, s.viewmats, s.Ks, 20, 10)
    assert got.records.shape == (0, 8)
    assert got.image_offsets.tolist() == [0] * (b * c + 1)
    assert got.n_invalid.tolist() == [0] * (b * c)
