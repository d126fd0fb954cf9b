"""Small scenes for the tests of the reference, as arguments of its rasterization()."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CAMERA_MODELS = ("pinhole", "ortho", "fisheye")
PARAMETERS = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks")


def make_scene(
    n: int = 30,
    n_cameras: int = 1,
    sh_degree: int | None = None,
    channels: int = 3,
    width: int = 21,
    height: int = 19,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    camera_model: str = "pinhole",
) -> dict[str, Any]:
    """Gaussians in front of slightly turned cameras: the arguments of rasterization()."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    means = (rand(n, 3) - 0.5) * torch.tensor([3.0, 3.0, 2.0]) + torch.tensor([0.0, 0.0, 3.0])
    turn = (rand(n_cameras, 3) - 0.5) * 0.4
    zero = torch.zeros(n_cameras, dtype=torch.float64)
    x, y, z = turn.unbind(-1)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    viewmats = torch.eye(4, dtype=torch.float64).repeat(n_cameras, 1, 1)
    viewmats[:, :3, :3] = torch.linalg.matrix_exp(skew)
    viewmats[:, :3, 3] = (rand(n_cameras, 3) - 0.5) * 0.3
    focal = (0.3 if camera_model == "ortho" else 0.85) * width
    K = torch.tensor([[focal, 0, width / 2 + 0.3], [0, 1.1 * focal, height / 2 - 0.2], [0, 0, 1]])
    if sh_degree is None:
        colors = rand(n, channels)
    else:
        colors = rand(n, (sh_degree + 1) ** 2 + 1, 3) - 0.5  # one basis more than is used
    tensors = {
        "means": means,
        "quats": rand(n, 4) - 0.5,
        "scales": 0.05 + 0.25 * rand(n, 3),
        "opacities": 0.02 + 0.96 * rand(n),
        "colors": colors,
        "viewmats": viewmats,
        "Ks": K.repeat(n_cameras, 1, 1),
    }
    scene: dict[str, Any] = {name: x.to(dtype) for name, x in tensors.items()}
    return scene | {
        "width": width,
        "height": height,
        "sh_degree": sh_degree,
        "camera_model": camera_model,
    }


def one_gaussian(**changes: Any) -> dict[str, Any]:
    """A ball of deviation 0.1 at depth 2 before a camera of focal length 40, on pixel (8, 8)'s centre:
    deviation 2 pixels, and with eps2d = 0 a variance of exactly 4 up to the perspective's second axis.
    """
    double = {"dtype": torch.float64}
    scene = {
        "means": torch.tensor([[0.0, 0.0, 2.0]], **double),
        "quats": torch.tensor([[1.0, 0.0, 0.0, 0.0]], **double),
        "scales": torch.full((1, 3), 0.1, **double),
        "opacities": torch.tensor([0.8], **double),
        "colors": torch.tensor([[0.25, 0.5, 1.0]], **double),
        "viewmats": torch.eye(4, **double)[None],
        "Ks": torch.tensor([[[40.0, 0, 8.5], [0, 40.0, 8.5], [0, 0, 1]]], **double),
        "width": 17,
        "height": 17,
        "eps2d": 0.0,
    }
    return scene | changes
