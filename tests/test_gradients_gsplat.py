"""The same gradients as gsplat 1.5.3 on a GPU, in value and in magnitude.

Both err in float32, and decide a few pixels otherwise (tests/test_gsplat_parity.py). On an H200 the absolute
differences summed to 1e-5 of the gradient, of few inputs to 2e-4; the largest ones come from those pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from scenes import Scene, covariances, make_scene
from torch import Tensor

from rapfast import rasterization

pytestmark = pytest.mark.cuda

WIDTH, HEIGHT = 320, 200
SUM = 5e-4  # sum of absolute differences over that of absolute values
NORM = 2e-4  # relative difference of the norms
WORST = 5e-3  # largest difference over largest value


@pytest.fixture(scope="module")
def gsplat() -> ModuleType:
    """gsplat 1.5.3, compiled; the first use of a fresh install compiles for minutes."""
    module = pytest.importorskip("gsplat", reason="needs gsplat (the extra 'bench')")
    if module.__version__ != "1.5.3":
        pytest.skip(f"compares with gsplat 1.5.3, found {module.__version__}")
    return module


def gradients(
    render: Callable[..., Any], scene: Scene, more: dict[str, Tensor], device: str, **options: Any
) -> dict[str, Tensor]:
    """Of every input, and of means2d: of a random sum of all channels of all pixels."""
    leaves = {k: x.detach().to(device).requires_grad_() for k, x in (scene._asdict() | more).items()}
    images, alphas, meta = render(**leaves, **options, width=WIDTH, height=HEIGHT, absgrad=True)
    meta["means2d"].retain_grad()
    g = torch.Generator().manual_seed(3)
    v_images, v_alphas = (torch.randn(x.shape, generator=g).to(device) for x in (images, alphas))
    if options["render_mode"].endswith("ED"):  # a quotient by a small alpha
        v_images[..., -1:] *= alphas.detach() > 0.05
    ((images * v_images).sum() + (alphas * v_alphas).sum()).backward()
    found = {k: leaf.grad for k, leaf in leaves.items()}
    return found | {"means2d": meta["means2d"].grad, "absgrad": meta["means2d"].absgrad}


CASES = [
    # camera model, rasterize mode, render mode, SH degree, packed, with covars
    ("pinhole", "classic", "RGB", 3, True, False),
    ("pinhole", "classic", "D", 2, True, False),
    ("pinhole", "antialiased", "RGB+ED", None, False, False),
    ("pinhole", "antialiased", "ED", None, False, True),
    ("ortho", "classic", "RGB+D", None, False, False),
    ("ortho", "antialiased", "RGB", 3, True, False),
    ("fisheye", "classic", "RGB", 4, True, True),
    ("fisheye", "antialiased", "RGB+ED", None, False, False),
]


@pytest.mark.parametrize(("camera_model", "rasterize_mode", "render_mode", "sh_degree", "packed", "with_covars"), CASES)
def test_every_gradient(
    gsplat: ModuleType, camera_model: str, rasterize_mode: str, render_mode: str, sh_degree: int | None, packed: bool,
    with_covars: bool,
) -> None:  # fmt: skip
    scene = make_scene(6000, 3, sh_degree=sh_degree, width=WIDTH, height=HEIGHT, dtype=torch.float32)
    scene.scales.mul_(0.35)
    if camera_model == "ortho":
        scene.Ks[..., :2, :2] *= 0.25
    more = {"covars": covariances(scene)} if with_covars else {}
    if not packed:  # gsplat takes no backgrounds with packed tensors
        more["backgrounds"] = torch.rand(3, scene.colors.shape[-1])
    options = {
        "camera_model": camera_model,
        "rasterize_mode": rasterize_mode,
        "render_mode": render_mode,
        "sh_degree": sh_degree,
        "packed": packed,
    }
    want = gradients(gsplat.rasterization, scene, more, "cuda", **options)
    got = gradients(rasterization, scene, more, "cpu", **options)
    compared = set()
    for name, expected in want.items():
        if expected is None or not expected.any():
            assert name == "Ks" or got[name] is None or not got[name].any(), f"gsplat has no gradient of {name}"
            continue
        found, expected = got[name].double(), expected.double().cpu()
        if name == "viewmats":  # gsplat inverts all of it for the directions, so that its last row gets some too
            found, expected = found[..., :3, :], expected[..., :3, :]
        difference = (found - expected).abs()
        for what, value, bound in (
            ("sum of differences", difference.sum() / expected.abs().sum(), SUM),
            ("difference of norms", (found.norm() / expected.norm() - 1).abs(), NORM),
            ("largest difference", difference.max() / expected.abs().max(), WORST),
        ):
            assert float(value) <= bound, f"{name}: {what} {float(value):.1e}, allowed {bound}"
        compared.add(name)
    wanted = {"means", "opacities", "viewmats", "means2d", "absgrad"} | set(more) - {"backgrounds"}
    wanted |= set() if with_covars else {"quats", "scales"}
    wanted |= {"colors", *more} if render_mode not in ("D", "ED") else set()
    assert compared == wanted
