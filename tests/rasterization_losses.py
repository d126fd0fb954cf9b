"""A loss of everything that rasterization draws, and its leaves."""

from __future__ import annotations

from typing import Any

import torch
from reference_scenes import PARAMETERS
from torch import Tensor


def leaves_of(scene: dict[str, Any], *more: str) -> dict[str, Tensor]:
    """Fresh leaves of every parameter there is, in order."""
    return {name: scene[name].detach().clone().requires_grad_() for name in (*PARAMETERS, *more)}


def weights_like(*images: Tensor) -> list[Tensor]:
    """Random numbers: their sum with the images sees every channel of every pixel."""
    g = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in images]


def loss_of(images: Tensor, alphas: Tensor) -> Tensor:
    v_images, v_alphas = weights_like(images, alphas)
    return (images * v_images).sum() + (alphas * v_alphas).sum()


def assert_gradient(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    """Entry by entry, relative to the entry, with a floor a thousand times below a typical one."""
    assert got.shape == want.shape and got.dtype == want.dtype, what
    assert bool(got.isfinite().all()), what
    assert float(want.abs().max()) > 0, f"{what}: there is nothing to compare"
    floor = 1e-3 * float(want.abs().mean())
    worst = float(((got - want).abs() / want.abs().clamp(min=floor)).max())
    assert worst <= tolerance, f"{what} differs by {worst} of the gradient, allowed {tolerance}"
