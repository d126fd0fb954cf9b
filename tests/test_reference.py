"""The reference against gsplat's own torch functions, scalar Python and hand-computed pixels."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from reference_scenes import CAMERA_MODELS, PARAMETERS, make_scene, one_gaussian
from torch import Tensor

from rapfast import reference
from rapfast.reference.blend import blend
from rapfast.reference.color import spherical_harmonics

# The package exports functions of the same names, so the modules are fetched by path.
blend_module = importlib.import_module("rapfast.reference.blend")
project_module = importlib.import_module("rapfast.reference.project")

ALPHA_CUT = 1 / 255


def blend_pixels(opacities: list[float], colors: list[list[float]], **kwargs: Any) -> Any:
    """Round Gaussians of deviation 2 pixels on the centre of pixel (0, 0), in list order: 16 x 16."""
    n = len(opacities)
    return blend(
        torch.full((n, 2), 0.5, dtype=torch.float64),
        torch.tensor([[0.25, 0.0, 0.25]], dtype=torch.float64).repeat(n, 1),
        torch.tensor(opacities, dtype=torch.float64),
        torch.tensor(colors, dtype=torch.float64),
        torch.arange(n, dtype=torch.int32),
        torch.zeros(1, 1, 1, dtype=torch.int32),
        16,
        16,
        **kwargs,
    )


# ------------------------------------------------------------------ against gsplat's torch functions


@pytest.fixture
def gsplat_torch() -> ModuleType:
    pytest.importorskip("gsplat", reason="gsplat is absent: its torch functions are not compared")
    return importlib.import_module("gsplat.cuda._torch_impl")


@pytest.mark.parametrize("camera_model", CAMERA_MODELS)
def test_projection_equals_gsplats(gsplat_torch: ModuleType, camera_model: str) -> None:
    scene = make_scene(300, n_cameras=3, camera_model=camera_model, seed=1)
    # wide enough that some means lie outside the image, where the Jacobian is clamped
    scene["means"][:, :2] *= 2
    covars, _ = gsplat_torch._quat_scale_to_covar_preci(scene["quats"], scene["scales"], compute_preci=False)
    radii, means2d, depths, conics, compensations = gsplat_torch._fully_fused_projection(
        scene["means"],
        covars,
        scene["viewmats"],
        scene["Ks"],
        scene["width"],
        scene["height"],
        calc_compensations=True,
        camera_model=camera_model,
    )
    # An opacity just above 1 has gsplat's fixed extent of 3.33 deviations; dividing it out of the
    # antialiased opacity leaves the compensation.
    arguments = [
        None if x is None else x[None]
        for x in (scene["means"], scene["quats"], scene["scales"], torch.full((300,), 1.01).double())
    ] + [scene["viewmats"][None], scene["Ks"][None], scene["width"], scene["height"]]
    classic = reference.project(*arguments, camera_model=camera_model)
    visible = (radii > 0).all(-1)
    assert 100 < visible.sum() < 900 - 100
    assert torch.equal(visible.nonzero(), torch.stack([classic.camera_ids, classic.gaussian_ids], 1))
    torch.testing.assert_close(classic.radii, radii[visible])
    torch.testing.assert_close(classic.means2d, means2d[visible])
    torch.testing.assert_close(classic.depths, depths[visible])
    torch.testing.assert_close(classic.conics, conics[visible])
    smooth = reference.project(*arguments, camera_model=camera_model, rasterize_mode="antialiased")
    ids = smooth.camera_ids, smooth.gaussian_ids
    torch.testing.assert_close(smooth.opacities / 1.01, compensations[ids])
    assert (smooth.opacities < 1).any()


def test_tiles_equal_gsplats(gsplat_torch: ModuleType) -> None:
    g = torch.Generator().manual_seed(2)
    n_images, n, width, height = 2, 40, 70, 50
    means2d = torch.rand(n_images, n, 2, generator=g) * 120 - 25
    radii = torch.randint(0, 30, (n_images, n, 2), generator=g, dtype=torch.int32)
    depths = torch.rand(n_images, n, generator=g) + 0.1
    expected = gsplat_torch._isect_tiles(means2d, radii, depths, 16, 5, 4)
    offsets = gsplat_torch._isect_offset_encode(expected[1], n_images, 5, 4)
    image_ids = torch.arange(n_images).repeat_interleave(n)
    tiles_per_gauss, isect_ids, flatten_ids, isect_offsets = reference.bin_tiles(
        means2d.reshape(-1, 2), radii.reshape(-1, 2), depths.reshape(-1), image_ids, 2, width, height
    )
    assert torch.equal(tiles_per_gauss.reshape(n_images, n), expected[0])
    assert torch.equal(isect_ids, expected[1])
    assert torch.equal(flatten_ids, expected[2])
    assert torch.equal(isect_offsets, offsets)
    assert isect_offsets.dtype == flatten_ids.dtype == tiles_per_gauss.dtype == torch.int32


@pytest.mark.parametrize("degree", range(5))
def test_spherical_harmonics_equal_gsplats(gsplat_torch: ModuleType, degree: int) -> None:
    g = torch.Generator().manual_seed(degree)
    dirs = torch.randn(50, 3, generator=g, dtype=torch.float64)
    coeffs = torch.randn(50, 25, 3, generator=g, dtype=torch.float64)
    expected = gsplat_torch._spherical_harmonics(degree, dirs, coeffs)
    torch.testing.assert_close(spherical_harmonics(degree, dirs, coeffs), expected)


# ---------------------------------------------------------------------------- against scalar Python


def associated_legendre(degree: int, order: int, x: float) -> float:
    """P_l^m with the Condon-Shortley sign, by the upward recurrence in l."""
    value = (-1) ** order * math.prod(range(1, 2 * order, 2)) * (1 - x * x) ** (order / 2)
    below = 0.0
    for l in range(order + 1, degree + 1):  # noqa: E741
        value, below = ((2 * l - 1) * x * value - (l + order - 1) * below) / (l - order), value
    return value


def test_spherical_harmonics_equal_their_definition() -> None:
    g = torch.Generator().manual_seed(0)
    for direction in torch.nn.functional.normalize(torch.randn(5, 3, generator=g).double(), dim=-1):
        x, y, z = direction.tolist()
        phi, expected = math.atan2(y, x), []
        for degree in range(5):
            for order in range(-degree, degree + 1):
                m = abs(order)
                scale = (2 * degree + 1) / (4 * math.pi)
                scale *= math.factorial(degree - m) / math.factorial(degree + m)
                angle = math.sin(m * phi) if order < 0 else math.cos(m * phi)
                root = math.sqrt(2 * scale) if m else math.sqrt(scale)
                expected.append(root * associated_legendre(degree, m, z) * angle)
        bases = spherical_harmonics(4, 7 * direction, torch.eye(25).double()[..., None].expand(-1, -1, 3))
        torch.testing.assert_close(bases[:, 0], torch.tensor(expected, dtype=torch.float64))


def rotate(q: list[float], v: list[float]) -> list[float]:
    """v turned by the quaternion q of any length: q v q* / |q|^2."""

    def product(a: list[float], b: list[float]) -> list[float]:
        return [
            a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
            a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
            a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
            a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
        ]

    turned = product(product(q, [0, *v]), [q[0], -q[1], -q[2], -q[3]])
    return [x / sum(c * c for c in q) for x in turned[1:]]


def brute_force(scene: dict[str, Any], camera: int, mode: str, antialiased: bool) -> Tensor:
    """One view with no tile, no box, no matrix: scalars, and Jacobians by central differences.

    [H, W, D + 1]: the channels of the render mode over black, then alpha.
    """
    V, K = scene["viewmats"][camera].tolist(), scene["Ks"][camera].tolist()
    width, height, model = scene["width"], scene["height"], scene["camera_model"]
    fx, fy, cx, cy = K[0][0], K[1][1], K[0][2], K[1][2]

    def apply(v: list[float], translate: bool = True) -> list[float]:
        return [sum(V[i][k] * v[k] for k in range(3)) + translate * V[i][3] for i in range(3)]

    def pixel(p: list[float]) -> list[float]:
        if model == "ortho":
            return [fx * p[0] + cx, fy * p[1] + cy]
        if model == "pinhole":
            return [fx * p[0] / p[2] + cx, fy * p[1] / p[2] + cy]
        r = math.hypot(p[0], p[1])
        theta = math.atan2(r, p[2])
        return [fx * p[0] * theta / r + cx, fy * p[1] * theta / r + cy]

    splats = []
    for n in range(len(scene["means"])):
        p = apply(scene["means"][n].tolist())
        at = list(p)
        if model == "pinhole":  # where the Jacobian is taken: up to 15 % of the image outside it
            at[0] = p[2] * min(max(p[0] / p[2], (-cx - 0.15 * width) / fx), (1.15 * width - cx) / fx)
            at[1] = p[2] * min(max(p[1] / p[2], (-cy - 0.15 * height) / fy), (1.15 * height - cy) / fy)
        a = b = c = 0.0
        for k in range(3):  # the covariance is the sum of its three axes' outer products
            axis = rotate(scene["quats"][n].tolist(), [float(k == 0), float(k == 1), float(k == 2)])
            axis = [scene["scales"][n, k].item() * x for x in apply(axis, translate=False)]
            h = 1e-4
            ahead = pixel([x + h * d for x, d in zip(at, axis, strict=True)])
            behind = pixel([x - h * d for x, d in zip(at, axis, strict=True)])
            u, v = ((x - y) / (2 * h) for x, y in zip(ahead, behind, strict=True))
            a, b, c = a + u * u, b + u * v, c + v * v
        sharp, det = a * c - b * b, (a + 0.3) * (c + 0.3) - b * b
        opacity = scene["opacities"][n].item() * (math.sqrt(max(0, sharp / det)) if antialiased else 1)
        color = scene["colors"][n].tolist()
        channels = {"RGB": color, "D": [p[2]], "RGB+D": [*color, p[2]]}[mode]
        splats.append((p[2], pixel(p), ((c + 0.3) / det, -b / det, (a + 0.3) / det), opacity, channels))
    splats.sort(key=lambda s: s[0])

    image = []
    for i in range(height):
        for j in range(width):
            out, light = [0.0] * len(splats[0][4]), 1.0
            for _, (x, y), (a, b, c), opacity, channels in splats:
                u, v = j + 0.5 - x, i + 0.5 - y
                alpha = min(0.999, opacity * math.exp(-(a * u * u + 2 * b * u * v + c * v * v) / 2))
                if alpha < ALPHA_CUT:
                    continue
                if light * (1 - alpha) <= 1e-4:
                    break
                out = [o + alpha * light * d for o, d in zip(out, channels, strict=True)]
                light *= 1 - alpha
            image.append([*out, 1 - light])
    return torch.tensor(image, dtype=torch.float64).reshape(height, width, -1)


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("camera_model", CAMERA_MODELS)
def test_images_equal_scalar_python(camera_model: str, antialiased: bool) -> None:
    scene = make_scene(40, n_cameras=2, camera_model=camera_model, seed=3)
    scene["means"][:8, :2] *= 2.5  # centres outside the image
    scene["opacities"][8:24] = 0.97  # a heap in front of which pixels stop
    scene["means"][8:24, :2] *= 0.2
    rasterize_mode = "antialiased" if antialiased else "classic"
    for mode in ("RGB", "D", "RGB+D"):
        colors, alphas, _ = reference.rasterization(**scene, render_mode=mode, rasterize_mode=rasterize_mode)
        for camera in range(2):
            expected = brute_force(scene, camera, mode, antialiased)
            actual = torch.cat([colors[camera], alphas[camera]], -1)
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
            assert expected[..., -1].min() < 0.5 and expected[..., -1].max() > 0.99


def test_sh_images_equal_images_of_evaluated_colors() -> None:
    scene = make_scene(20, n_cameras=2, sh_degree=3, seed=4)
    rendered = reference.rasterization(**scene)[0]
    centers = torch.linalg.inv(scene["viewmats"])[:, :3, 3]
    dirs = scene["means"] - centers[:, None]
    colors = spherical_harmonics(3, dirs, scene["colors"].expand(2, -1, -1, -1)) + 0.5
    assert (colors < 0).any(), "the clamp at 0 must be seen"
    scene |= {"colors": colors.clamp(min=0), "sh_degree": None}
    torch.testing.assert_close(reference.rasterization(**scene)[0], rendered)


# --------------------------------------------------------------------------------- pixels by hand


@pytest.mark.parametrize("eps2d", [0.0, 0.3])
@pytest.mark.parametrize("antialiased", [False, True])
def test_single_gaussian_by_hand(eps2d: float, antialiased: bool) -> None:
    mode = "antialiased" if antialiased else "classic"
    colors, alphas, meta = reference.rasterization(**one_gaussian(eps2d=eps2d), rasterize_mode=mode)
    peak = 0.8 * (4 / (4 + eps2d) if antialiased else 1)  # sqrt(det 16 / det (4 + eps)^2)
    for i, j in ((8, 8), (8, 11), (5, 12), (8, 0), (0, 0)):
        alpha = peak * math.exp(-((i - 8) ** 2 + (j - 8) ** 2) / (2 * (4 + eps2d)))
        alpha = alpha if alpha >= ALPHA_CUT else 0
        assert alphas[0, i, j, 0].item() == pytest.approx(alpha, abs=1e-14)
        assert colors[0, i, j].tolist() == pytest.approx([0.25 * alpha, 0.5 * alpha, alpha])
    extend = math.sqrt(2 * math.log(255 * peak))
    assert meta["radii"].tolist() == [[math.ceil(extend * math.sqrt(4 + eps2d))] * 2]
    assert meta["means2d"].tolist() == [[8.5, 8.5]]
    assert meta["depths"].tolist() == [2.0]
    assert meta["conics"][0].tolist() == pytest.approx([1 / (4 + eps2d), 0, 1 / (4 + eps2d)])
    assert meta["opacities"].tolist() == pytest.approx([peak])


def test_expected_depth_is_the_depth() -> None:
    image, alphas, _ = reference.rasterization(**one_gaussian(), render_mode="ED")
    assert image[0, 8, 8].item() == pytest.approx(2)
    assert image[0, 0, 0].item() == 0 and alphas[0, 0, 0].item() == 0


def test_box_ends_at_33_deviations_above_opacity_1() -> None:
    radii = reference.rasterization(**one_gaussian(opacities=torch.tensor([50.0]).double()))[2]["radii"]
    assert radii.tolist() == [[math.ceil(3.33 * 2)] * 2]


def test_alpha_is_capped() -> None:
    colors, alphas = blend_pixels([1.0], [[1.0]])
    assert alphas[0, 0, 0].item() == pytest.approx(0.999, abs=1e-15)
    assert colors[0, 0, 0].item() == pytest.approx(0.999, abs=1e-15)
    assert blend_pixels([1.0], [[1.0]], alpha_cap=0.99)[1][0, 0, 0].item() == pytest.approx(0.99)
    assert blend_pixels([0.5], [[1.0]], alpha_cap=0.99)[1][0, 0, 0].item() == pytest.approx(0.5)


def test_alpha_cut_is_inclusive() -> None:
    assert blend_pixels([ALPHA_CUT], [[1.0]])[1][0, 0, 0].item() == pytest.approx(ALPHA_CUT)
    just_below = math.nextafter(ALPHA_CUT, 0)
    assert blend_pixels([just_below], [[1.0]])[1].count_nonzero() == 0


@pytest.mark.parametrize("chunk", [1, 2, 3, 256])
def test_stop_excludes_the_gaussian_that_crosses_and_all_behind(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(blend_module, "BLEND_CHUNK", chunk)
    colors = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]
    # T: 0.001, then 0.0005; 0.95 would leave 2.5e-5: it and the faint one behind it are not drawn
    image, alphas = blend_pixels([0.999, 0.5, 0.95, 0.1], colors)
    assert image[0, 0, 0].tolist() == pytest.approx([0.999, 0.0005, 0, 0], abs=1e-15)
    assert alphas[0, 0, 0].item() == pytest.approx(0.9995, abs=1e-15)
    # reaching 1e-4 exactly is stopping: (1 - 0.75)^6 = 2^-12, then to 2^-14 = 6.1e-5
    image, alphas = blend_pixels([0.75] * 8, [[1.0]] * 8)
    assert alphas[0, 0, 0].item() == 1 - 2**-12


def test_exact_threshold_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend_module, "T_STOP", 0.25)
    assert blend_pixels([0.5, 0.5, 0.125], [[1.0]] * 3)[1][0, 0, 0].item() == 0.5


def test_negative_sigma_is_skipped() -> None:
    means2d, opacities = torch.full((1, 2), 8.0).double(), torch.tensor([0.5]).double()
    conics = torch.tensor([[0.1, 0.3, 0.1]]).double()  # indefinite: sigma < 0 along one diagonal
    _, alphas = blend(
        *(means2d, conics, opacities, torch.ones(1, 1).double()),
        *(torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32), 16, 16),
    )
    assert alphas[0, 4, 11] == 0 and alphas[0, 9, 9] > 0


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_scene(60, seed=5)
    whole = reference.rasterization(**scene)
    monkeypatch.setattr(blend_module, "BLEND_CHUNK", 7)
    parts = reference.rasterization(**scene)
    torch.testing.assert_close(parts[:2], whole[:2], atol=1e-14, rtol=0)


def test_order_is_depth_as_a_real_number_then_index() -> None:
    def order(depths: list[float]) -> list[int]:
        n = len(depths)
        return reference.bin_tiles(
            torch.full((n, 2), 4.0).double(),
            torch.ones(n, 2, dtype=torch.int32),
            torch.tensor(depths, dtype=torch.float64),
            torch.zeros(n, dtype=torch.int64),
            *(1, 16, 16),
        )[2].tolist()

    assert order([3.0, 1.0, 2.0]) == [1, 2, 0]
    assert order([2.0, 1.0, 2.0, 1.0]) == [1, 3, 0, 2]
    assert order([1.0, -1.0, 0.0, -2.0, -0.0]) == [3, 1, 2, 4, 0]
    # float64 depths that are one float32
    assert order([1 + 2e-12, 1 + 1e-12]) == [1, 0]


# ------------------------------------------------------------------------------------------ culling


def visible(scene: dict[str, Any], **options: Any) -> int:
    return len(reference.rasterization(**(scene | options))[2]["gaussian_ids"])


def test_near_and_far_planes_are_inclusive() -> None:
    scene = one_gaussian()
    assert visible(scene, near_plane=2.0) == visible(scene, far_plane=2.0) == 1
    assert visible(scene, near_plane=2.0001) == visible(scene, far_plane=1.9999) == 0


def test_radius_clip_is_inclusive() -> None:
    radius = int(reference.rasterization(**one_gaussian())[2]["radii"][0, 0])
    assert visible(one_gaussian(), radius_clip=radius - 0.5) == 1
    assert visible(one_gaussian(), radius_clip=float(radius)) == 0
    flat = one_gaussian(scales=torch.tensor([[0.1, 0.01, 0.1]]).double())
    assert visible(flat, radius_clip=3.0) == 1, "one radius above the clip is enough"


def test_a_box_that_only_touches_the_image_is_culled() -> None:
    radius = int(reference.rasterization(**one_gaussian())[2]["radii"][0, 0])
    for axis in range(2):
        for edge, outward in ((0.0, -1.0), (17.0, 1.0)):
            scene = one_gaussian()
            scene["Ks"][0, axis, 2] = edge + outward * radius
            assert visible(scene) == 0
            scene["Ks"][0, axis, 2] -= outward * 0.01
            assert visible(scene) == 1


def test_faint_gaussians_are_culled_by_the_opacity_that_is_drawn() -> None:
    faint = torch.tensor([0.0041]).double()
    assert visible(one_gaussian(opacities=faint)) == 1
    assert visible(one_gaussian(opacities=faint, eps2d=0.3), rasterize_mode="antialiased") == 0


def test_covars_replace_quats_and_scales_and_only_their_upper_triangle_is_read() -> None:
    scene = make_scene(25, n_cameras=2, seed=6)
    expected = reference.rasterization(**scene)
    covars = project_module._covariance(scene["quats"], scene["scales"])
    covars = covars + torch.tril(torch.full((3, 3), 77.0).double(), -1)
    without = reference.rasterization(**(scene | {"covars": covars, "quats": None, "scales": None}))
    torch.testing.assert_close(without[:2], expected[:2])
    nan_below = covars.clone()
    nan_below[:, 2, 0] = torch.nan
    again = reference.rasterization(**(scene | {"covars": nan_below}))
    assert torch.equal(again[0], without[0])
    assert again[2]["n_invalid"].sum() == 0


def test_radii_saturate() -> None:
    scene = one_gaussian(scales=torch.full((1, 3), 1e9).double())
    meta = reference.rasterization(**scene)[2]
    assert meta["radii"].tolist() == [[2**31 - 1] * 2]
    assert meta["tiles_per_gauss"].tolist() == [4]


# ----------------------------------------------------------------------------- shapes, modes and meta


def test_batches_equal_loops() -> None:
    scenes = [make_scene(15, n_cameras=2, sh_degree=1, seed=s) for s in range(6)]
    batched = scenes[0] | {name: torch.stack([s[name] for s in scenes]).unflatten(0, (2, 3)) for name in PARAMETERS}
    backgrounds = torch.rand(2, 3, 2, 3, dtype=torch.float64)
    colors, alphas, meta = reference.rasterization(**batched, backgrounds=backgrounds)
    dense = reference.rasterization(**batched, backgrounds=backgrounds, packed=False)
    assert colors.shape == (2, 3, 2, 19, 21, 3) and alphas.shape == (2, 3, 2, 19, 21, 1)
    assert torch.equal(dense[0], colors) and torch.equal(dense[1], alphas)
    assert meta["n_batches"] == 6 and meta["n_cameras"] == 2
    for s, scene in enumerate(scenes):
        for c in range(2):
            alone = scene | {"viewmats": scene["viewmats"][c, None], "Ks": scene["Ks"][c, None]}
            background = backgrounds[s // 3, s % 3, c, None]
            one = reference.rasterization(**alone, backgrounds=background, packed=False)
            assert torch.equal(colors[s // 3, s % 3, c], one[0][0])
            assert torch.equal(alphas[s // 3, s % 3, c], one[1][0])
            of_image = (meta["batch_ids"] == s) & (meta["camera_ids"] == c)
            ids = meta["gaussian_ids"][of_image]
            assert torch.equal(ids, (one[2]["radii"][0] > 0).all(-1).nonzero()[:, 0])
            assert torch.equal(meta["means2d"][of_image], one[2]["means2d"][0, ids])
            assert torch.equal(dense[2]["conics"][s // 3, s % 3, c], one[2]["conics"][0])


@pytest.mark.parametrize("packed", [True, False])
def test_meta_has_gsplats_keys_shapes_and_dtypes(packed: bool) -> None:
    scene = make_scene(15, n_cameras=2, width=40, height=33, seed=12, dtype=torch.float32)
    scene["means"][:4, 2] = -1  # some are culled
    meta = reference.rasterization(**scene, packed=packed)[2]
    m, s = len(meta["radii"]), len(meta["flatten_ids"])
    rows = (m,) if packed else (2, 15)
    shapes = {
        "radii": (*rows, 2),
        "means2d": (*rows, 2),
        "depths": rows,
        "conics": (*rows, 3),
        "opacities": rows,
        "tiles_per_gauss": rows,
        "isect_ids": (s,),
        "flatten_ids": (s,),
        "isect_offsets": (2, 3, 3),
        "n_invalid": (2,),
    }
    dtypes = dict.fromkeys(("radii", "tiles_per_gauss", "flatten_ids", "isect_offsets"), torch.int32)
    dtypes |= dict.fromkeys(("isect_ids", "n_invalid"), torch.int64)
    ids = ("batch_ids", "camera_ids", "gaussian_ids")
    if packed:
        shapes |= dict.fromkeys(ids, rows)
        dtypes |= dict.fromkeys(ids, torch.int64)
        assert (meta["radii"] > 0).all()
    else:
        assert all(meta[key] is None for key in ids)
        culled = (meta["radii"] == 0).all(-1)
        assert culled[:, :4].all() and not culled.all()
        for key in ("means2d", "depths", "conics", "opacities", "tiles_per_gauss"):
            assert meta[key][culled].count_nonzero() == 0, key
    for key, shape in shapes.items():
        assert meta[key].shape == shape, key
        assert meta[key].dtype == dtypes.get(key, torch.float32), key
    numbers = {"width": 40, "height": 33, "tile_size": 16, "tile_width": 3, "tile_height": 3}
    numbers |= {"n_batches": 1, "n_cameras": 2}
    assert {key: meta[key] for key in numbers} == numbers
    assert set(meta) == set(shapes) | set(ids) | set(numbers)
    # every row named by a tile's list covers that tile, and the lists are complete
    assert meta["tiles_per_gauss"].sum() == s
    counts = torch.bincount(meta["flatten_ids"], minlength=meta["tiles_per_gauss"].numel())
    assert torch.equal(counts, meta["tiles_per_gauss"].flatten().long())


@pytest.mark.parametrize("mode", ["RGB", "D", "ED", "RGB+D", "RGB+ED"])
def test_modes_and_backgrounds(mode: str) -> None:
    scene = make_scene(10, n_cameras=2, channels=5, seed=13)
    rgb_d, alphas, _ = reference.rasterization(**scene, render_mode="RGB+D")
    rgb, depth = rgb_d[..., :5], rgb_d[..., 5:]
    background = torch.rand(2, 5, dtype=torch.float64)
    image = torch.rand(2, 19, 21, 5, dtype=torch.float64)
    for given, spread in ((None, 0), (background, background[:, None, None]), (image, image)):
        actual, actual_alphas, _ = reference.rasterization(**scene, render_mode=mode, backgrounds=given)
        parts = [rgb + (1 - alphas) * spread] if "RGB" in mode else []
        if mode.endswith("ED"):
            parts.append(torch.where(alphas > 0, depth / alphas, 0))
        elif mode.endswith("D"):
            parts.append(depth)
        torch.testing.assert_close(actual, torch.cat(parts, -1))
        assert torch.equal(actual_alphas, alphas)


def test_colors_per_camera_and_many_channels() -> None:
    scene = make_scene(10, n_cameras=2, channels=512, seed=14)
    shared, _, _ = reference.rasterization(**scene)
    assert shared.shape == (2, 19, 21, 512)
    few = reference.rasterization(**(scene | {"colors": scene["colors"][:, 100:103]}))[0]
    torch.testing.assert_close(shared[..., 100:103], few)
    per_camera = torch.stack([scene["colors"], 2 * scene["colors"]])
    both, _, _ = reference.rasterization(**(scene | {"colors": per_camera}))
    torch.testing.assert_close(both[0], shared[0])
    torch.testing.assert_close(both[1], 2 * shared[1])


def test_empty_sizes() -> None:
    for packed in (True, False):
        colors, alphas, meta = reference.rasterization(**make_scene(0, n_cameras=2), packed=packed)
        assert colors.shape == (2, 19, 21, 3) and alphas.count_nonzero() == 0
        assert meta["n_invalid"].tolist() == [0, 0]
        no_cameras = make_scene(5)
        no_cameras |= {name: no_cameras[name][:0] for name in ("viewmats", "Ks")}
        for mode in ("RGB", "RGB+ED"):
            colors, alphas, meta = reference.rasterization(**no_cameras, packed=packed, render_mode=mode)
            assert colors.shape[:3] == (0, 19, 21) and alphas.shape == (0, 19, 21, 1)
            assert meta["isect_offsets"].shape == (0, 2, 2)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (16, 16), (17, 15), (33, 1)])
def test_images_of_any_size_are_crops_of_larger_ones(width: int, height: int) -> None:
    # ortho: the image size does not enter the projection
    scene = make_scene(30, width=48, height=48, camera_model="ortho", seed=15)
    scene["Ks"][:, :2, 2] = torch.tensor([6.0, 5.0])
    whole = reference.rasterization(**scene)[0]
    crop = reference.rasterization(**(scene | {"width": width, "height": height}))[0]
    torch.testing.assert_close(crop, whole[:, :height, :width])
    assert crop.count_nonzero() > 0


def test_permutation_quaternion_sign_and_length_and_zero_opacity_change_nothing() -> None:
    scene = make_scene(30, seed=16)
    expected = reference.rasterization(**scene)[0]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    permuted = scene | {name: scene[name][order] for name in PARAMETERS[:5]}
    torch.testing.assert_close(reference.rasterization(**permuted)[0], expected)
    turned = reference.rasterization(**(scene | {"quats": -3.7 * scene["quats"]}))[0]
    torch.testing.assert_close(turned, expected)
    more = {name: torch.cat([scene[name], scene[name] * 1.01]) for name in PARAMETERS[:5]}
    more["opacities"][30:] = 0
    torch.testing.assert_close(reference.rasterization(**(scene | more))[0], expected)


@pytest.mark.parametrize("camera_model", CAMERA_MODELS)
def test_float32_is_close_to_float64(camera_model: str) -> None:
    scene = make_scene(60, n_cameras=2, sh_degree=3, camera_model=camera_model, seed=17)
    exact = reference.rasterization(**scene, render_mode="RGB+D")
    single = {k: x.float() if isinstance(x, Tensor) else x for k, x in scene.items()}
    rough = reference.rasterization(**single, render_mode="RGB+D")
    assert rough[0].dtype == rough[1].dtype == torch.float32
    # A pixel whose alpha lies on the cut may jump by 1/255 of a colour: rare, so the mean sees it not.
    assert (rough[0] - exact[0]).abs().mean() < 1e-6
    assert (rough[0] - exact[0]).abs().max() < 0.02
