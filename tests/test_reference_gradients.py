"""The reference's gradients by gradcheck, and that bad input reaches neither pixels nor gradients."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from reference_scenes import CAMERA_MODELS, PARAMETERS, make_scene, one_gaussian
from torch import Tensor

from rapfast import reference
from rapfast.reference.blend import blend

# The package exports a function of this name, so the module is fetched by path.
project_module = importlib.import_module("rapfast.reference.project")


# ------------------------------------------------------------------------------ invalid and degenerate


def spoiled(dtype: torch.dtype) -> tuple[dict[str, Any], list[int], list[int]]:
    """A scene whose first Gaussians are each bad in another way: it, the invalid, the merely unseen."""
    scene = make_scene(30, n_cameras=2, sh_degree=1, seed=7, dtype=dtype)
    big = torch.finfo(dtype).max ** 0.75
    bad = {
        0: ("means", (0, torch.nan)),
        1: ("means", (2, torch.inf)),
        2: ("quats", (slice(None), 0.0)),
        3: ("quats", (1, torch.nan)),
        4: ("quats", (slice(None), big)),
        5: ("scales", (0, torch.inf)),
        6: ("scales", (slice(None), big)),  # its covariance overflows
        7: ("opacities", ((), torch.nan)),
        8: ("opacities", ((), -torch.inf)),
        9: ("colors", ((0, 0), torch.nan)),
        10: ("colors", ((3, 2), -torch.inf)),
        11: ("opacities", ((), 0.0)),
        12: ("opacities", ((), -1.0)),
        13: ("means", (2, -5.0)),
    }
    scene["means"][:11, :2] *= 0.2  # seen by both cameras, so that a bad colour is looked at
    for n, (name, (index, value)) in bad.items():
        scene[name][n][index] = value
    return scene, list(range(11)), [11, 12, 13]


@pytest.mark.parametrize("camera_model", CAMERA_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invalid_gaussians_are_dropped_counted_and_get_zero_gradients(dtype: torch.dtype, camera_model: str) -> None:
    scene, invalid, unseen = spoiled(dtype)
    scene["camera_model"] = camera_model
    bad = len(invalid) + len(unseen)
    clean = scene | {name: scene[name][bad:] for name in PARAMETERS[:5]}
    for name in PARAMETERS:
        scene[name].requires_grad_()
    options = {"render_mode": "RGB+ED", "rasterize_mode": "antialiased"}
    colors, alphas, meta = reference.rasterization(**scene, **options)
    expected = reference.rasterization(**clean, **options)
    torch.testing.assert_close((colors, alphas), expected[:2], atol=1e-6, rtol=1e-5)
    assert meta["n_invalid"].tolist() == [len(invalid)] * 2
    assert expected[2]["n_invalid"].tolist() == [0, 0]

    (colors.square().sum() + alphas.square().sum()).backward()
    for name in PARAMETERS:
        assert scene[name].grad.isfinite().all(), name
        assert scene[name].grad.abs().sum() > 0, name
    for name in PARAMETERS[:5]:
        assert scene[name].grad[:bad].count_nonzero() == 0, name


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"scales": [[0.0, 0.0, 0.0]]}, "point"),
        ({"scales": [[0.1, 0.0, 0.0]]}, "needle"),
        ({"scales": [[1e-16, 1.0, 1.0]], "eps2d": 0.0}, "conic near overflow"),
        ({"scales": [[0.0, 0.0, 0.0]], "eps2d": 0.0}, "no area"),
        ({"means": [[0.0, 0.0, 0.0]], "near_plane": 0.0}, "at the camera"),
        ({"means": [[0.0, 0.0, 1e-30]], "near_plane": 0.0}, "just before the camera"),
        ({"opacities": [1e30]}, "opacity far above 1"),
        ({"means": [[0.0, 0.0, 2.0]], "quats": [[1e-15, 0.0, 0.0, 0.0]]}, "short quaternion"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
@pytest.mark.parametrize("camera_model", CAMERA_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_gaussians_give_finite_outputs_and_gradients(
    dtype: torch.dtype, camera_model: str, changes: dict[str, Any], label: str
) -> None:
    scene = one_gaussian(camera_model=camera_model, sh_degree=2)
    scene["colors"] = torch.full((1, 9, 3), 0.1)
    scene |= {k: torch.tensor(v) if isinstance(v, list) else v for k, v in changes.items()}
    for name in PARAMETERS:
        scene[name] = scene[name].to(dtype).requires_grad_()
    for mode in ("classic", "antialiased"):
        colors, alphas, meta = reference.rasterization(**scene, rasterize_mode=mode, render_mode="RGB+ED")
        assert colors.isfinite().all() and alphas.isfinite().all()
        for key in ("means2d", "conics", "depths", "opacities"):
            assert meta[key].isfinite().all()
        if label == "conic near overflow" and dtype == torch.float32:
            continue  # d conic / d covariance is conic^2, which has no float32 value
        (colors.sum() + alphas.sum()).backward()
        for name in PARAMETERS:
            grad = scene[name].grad
            assert grad is None or grad.isfinite().all(), name


def test_misses_of_a_needle_give_no_nan_gradient() -> None:
    means2d = torch.tensor([[8.5, 8.5]], requires_grad=True)
    conics = torch.tensor([[3e38, 0.0, 0.1]], requires_grad=True)  # a dx overflows next to the mean
    opacities = torch.tensor([0.5], requires_grad=True)
    image, alphas = blend(
        *(means2d, conics, opacities, torch.ones(1, 2)),
        *(torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32), 16, 16),
    )
    assert alphas[0, 8, 8] == 0.5 and alphas.isfinite().all()
    (image.sum() + alphas.sum()).backward()
    for leaf in (means2d, conics, opacities):
        assert leaf.grad.isfinite().all()


def test_covariances_without_an_ellipse_are_culled_but_not_invalid() -> None:
    covars = -0.01 * torch.eye(3).double()[None]  # negative definite: its determinant is above 0
    meta = reference.rasterization(**one_gaussian(covars=covars))[2]
    assert len(meta["radii"]) == 0 and meta["n_invalid"].tolist() == [0]
    # a variance of 4e-310 pixels^2: its reciprocal overflows
    covars = torch.diag(torch.tensor([1e-312, 0.01, 0.01]).double())[None]
    meta = reference.rasterization(**one_gaussian(covars=covars))[2]
    assert len(meta["radii"]) == 0 and meta["n_invalid"].tolist() == [0]
    # in pixels^2 (focal 40, depth 2): variances 4 and -2, blurred by 0.3: determinant below 0
    covars = torch.diag(torch.tensor([0.01, -0.005, 0.01])).double()[None]
    meta = reference.rasterization(**one_gaussian(covars=covars, eps2d=0.3))[2]
    assert len(meta["radii"]) == 0 and meta["n_invalid"].tolist() == [0]
    # variances 4 and -0.2: above 0 once blurred, so classic draws it; antialiased compensates by 0
    covars[0, 1, 1] = -0.0005
    scene = one_gaussian(covars=covars, eps2d=0.3)
    assert len(reference.rasterization(**scene)[2]["radii"]) == 1
    meta = reference.rasterization(**scene, rasterize_mode="antialiased")[2]
    assert len(meta["radii"]) == 0 and meta["n_invalid"].tolist() == [0]


def test_invalid_is_counted_before_anything_is_culled() -> None:
    behind, faint = torch.tensor([[0.0, 0.0, -2.0]]).double(), torch.tensor([0.001]).double()
    zero = torch.zeros(1, 4).double()
    for changes in ({"means": behind}, {"opacities": faint}):
        meta = reference.rasterization(**one_gaussian(quats=zero, **changes))[2]
        assert meta["n_invalid"].tolist() == [1]
        meta = reference.rasterization(**one_gaussian(**changes))[2]
        assert meta["n_invalid"].tolist() == [0]


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("viewmats", (0, 0), torch.nan),
        ("viewmats", (2, 3), torch.inf),
        ("viewmats", (slice(0, 3), slice(0, 3)), 0.0),
        ("viewmats", (1, slice(0, 3)), 0.0),
        ("Ks", (0, 0), 0.0),
        ("Ks", (1, 1), -5.0),
        ("Ks", (0, 2), torch.nan),
    ],
)
def test_unusable_views_are_empty_and_leave_the_others_alone(name: str, index: Any, value: float) -> None:
    scene = make_scene(20, n_cameras=3, sh_degree=1, seed=8)
    expected = reference.rasterization(**scene)
    scene[name][1][index] = value
    for parameter in PARAMETERS:
        scene[parameter].requires_grad_()
    colors, alphas, meta = reference.rasterization(**scene)
    assert meta["n_invalid"].tolist() == [0, 20, 0]
    assert colors[1].count_nonzero() == alphas[1].count_nonzero() == 0
    assert torch.equal(colors[[0, 2]], expected[0][[0, 2]])
    colors.sum().backward()
    for parameter in PARAMETERS:
        assert scene[parameter].grad.isfinite().all(), parameter
    assert scene["viewmats"].grad[1].count_nonzero() == 0


def test_bad_colors_do_not_matter_where_only_depth_is_drawn() -> None:
    scene = make_scene(10, seed=9)
    scene["colors"][:] = torch.nan
    image, _, meta = reference.rasterization(**scene, render_mode="ED")
    assert image.max() > 1 and meta["n_invalid"].sum() == 0
    image, alphas, meta = reference.rasterization(**scene)
    assert image.count_nonzero() == alphas.count_nonzero() == 0
    assert meta["n_invalid"].item() == len(meta["opacities"]) > 0
    assert meta["opacities"].count_nonzero() == 0 and (meta["radii"] > 0).all()


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("camera_model", "rasterize_mode", "sh_degree", "n_cameras", "with_covars"),
    [
        ("pinhole", "classic", 1, 2, False),
        ("pinhole", "antialiased", 4, 1, False),
        ("ortho", "classic", None, 2, False),
        ("fisheye", "antialiased", 2, 1, False),
        ("pinhole", "antialiased", None, 2, True),
    ],
)
def test_gradcheck_of_every_input(
    camera_model: str,
    rasterize_mode: str,
    sh_degree: int | None,
    n_cameras: int,
    with_covars: bool,
) -> None:
    scene = make_scene(3, n_cameras, sh_degree, width=9, height=7, seed=10, camera_model=camera_model)
    scene["means"][1:, :2] *= 0.3
    scene["scales"] *= 1.5
    if camera_model != "ortho":  # past the Jacobian's clamp, reaching into the image
        scene["means"][0] = torch.tensor([2.6, 0.3, 2.5])
        scene["scales"][0] = torch.tensor([1.0, 0.8, 0.6])
    scene["backgrounds"] = torch.full((n_cameras, 3), 0.3, dtype=torch.float64)
    names = [*PARAMETERS, "backgrounds"]
    if with_covars:
        scene["covars"] = project_module._covariance(scene["quats"], scene["scales"])
        names = [name for name in names if name not in ("quats", "scales")] + ["covars"]

    def render(*leaves: Tensor) -> Tensor:
        arguments = scene | dict(zip(names, leaves, strict=True))
        colors, alphas, _ = reference.rasterization(**arguments, rasterize_mode=rasterize_mode, render_mode="RGB+ED")
        return torch.cat([colors, alphas], -1)

    leaves = [scene[name].clone().requires_grad_() for name in names]
    image = render(*leaves)
    assert (image[..., -1] > 0.02).float().mean() > 0.3
    # a few random sums of all pixels' channels see every pixel, at a hundredth of the time
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(3, *image.shape, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: (weights * render(*leaves)).sum((1, 2, 3, 4)),
        leaves,
        eps=1e-6,
        atol=1e-5,
        rtol=1e-5,
    )
    grads = torch.autograd.grad((weights[0] * image).sum(), leaves)
    for name, grad in zip(names, grads, strict=True):
        assert grad.abs().max() > 1e-2, name


def test_alpha_cap_passes_no_gradient() -> None:
    scene = one_gaussian(opacities=torch.tensor([1.5]).double().requires_grad_())
    colors, _, _ = reference.rasterization(**scene)
    grad = torch.autograd.grad(colors[0, 8, 8].sum(), scene["opacities"], retain_graph=True)[0]
    assert grad.item() == 0
    assert torch.autograd.grad(colors[0, 8, 11].sum(), scene["opacities"])[0].item() > 0


@pytest.mark.parametrize("packed", [True, False])
def test_means2d_keeps_its_gradient_and_absgrad(packed: bool) -> None:
    scene = make_scene(12, n_cameras=2, width=8, height=6, seed=11)
    scene["means"].requires_grad_()
    colors, _, meta = reference.rasterization(**scene, packed=packed, absgrad=True)
    means2d = meta["means2d"]
    means2d.retain_grad()
    # sum over pixels of the absolute gradient of each pixel's own loss
    expected = torch.zeros_like(means2d)
    for pixel in colors.square().sum(-1).flatten():
        (grad,) = torch.autograd.grad(pixel, means2d, retain_graph=True)
        expected += grad.abs()
    means2d.absgrad.zero_()
    colors.square().sum().backward()
    assert means2d.grad.shape == means2d.shape and means2d.grad.abs().sum() > 0
    torch.testing.assert_close(means2d.absgrad, expected)
    assert (means2d.absgrad > 2 * means2d.grad.abs()).any()


@pytest.mark.parametrize("n", [0, 5])
def test_backward_works_where_nothing_is_seen(n: int) -> None:
    scene = make_scene(n)
    scene["means"] = (scene["means"] * torch.tensor([1.0, 1.0, -1.0])).requires_grad_()
    colors, alphas, _ = reference.rasterization(**scene)
    assert colors.count_nonzero() == 0
    (colors.sum() + alphas.sum()).backward()
    assert scene["means"].grad.count_nonzero() == 0
