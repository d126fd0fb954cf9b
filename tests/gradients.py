"""What the tests of gradients share: leaves, a loss that sees every number, and comparisons that tell all figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rapfast import rasterization


class Bounds(NamedTuple):
    """Of the comparison of two gradients of one input."""

    sum: float  # sum of absolute differences over that of absolute values
    norm: float  # relative difference of the norms
    worst: float  # largest difference over largest value


def random_like(*images: Tensor) -> list[Tensor]:
    """The same random numbers on every device: their sum with the images sees every channel of every pixel."""
    g = torch.Generator().manual_seed(3)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in images]


def weights_of(images: Tensor, alphas: Tensor, render_mode: str = "RGB") -> list[Tensor]:
    """The same; what belongs to an expected depth, a quotient by alpha, is multiplied by alpha. To be computed once and
    given to all whose gradients are compared: their own alphas would differ in the pixels whose decisions differ."""
    v_images, v_alphas = random_like(images.detach(), alphas.detach())
    if render_mode.endswith("ED"):
        v_images[..., -1:] *= alphas.detach()
    return [v_images, v_alphas]


def gradients(
    inputs: dict[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    weights: list[Tensor] | None = None,
    render: Callable[..., Any] = rasterization,
    absgrad: bool = True,
    **options: Any,
) -> tuple[dict[str, Tensor | None], list[Tensor]]:
    """Gradients of every input, of means2d, and absgrad, on the CPU in float64; and the weights of the loss."""
    leaves = {k: x.detach().to(device, dtype).clone().requires_grad_() for k, x in inputs.items()}
    images, alphas, meta = render(**leaves, **options, absgrad=absgrad)
    meta["means2d"].retain_grad()
    weights = weights or weights_of(images, alphas, options.get("render_mode", "RGB"))
    v_images, v_alphas = (w.to(x) for w, x in zip(weights, (images, alphas), strict=True))
    ((images * v_images).sum() + (alphas * v_alphas).sum()).backward()
    found = {k: leaf.grad for k, leaf in leaves.items()} | {"means2d": meta["means2d"].grad}
    if absgrad:
        found["absgrad"] = meta["means2d"].absgrad
    return {k: None if x is None else x.detach().double().cpu() for k, x in found.items()}, [w.cpu() for w in weights]


def compare(got: dict[str, Tensor | None], want: dict[str, Tensor | None], bounds: Bounds) -> set[str]:
    """Asserts that all gradients agree within the bounds; tells the figures of all inputs where one does not. Returns
    the names of those that are not all zero."""
    lines, failed, compared = [], False, set()
    for name, expected in want.items():
        found = got[name]
        if expected is None or not expected.any():
            is_zero = found is None or not found.any()
            failed |= not is_zero
            lines.append(f"{name}: expected none, {'found none' if is_zero else 'found one'}")
            continue
        if found is None or found.shape != expected.shape:
            failed = True
            lines.append(
                f"{name}: expected {list(expected.shape)}, found {None if found is None else list(found.shape)}"
            )
            continue
        difference = (found - expected).abs()
        figures = Bounds(
            float(difference.sum() / expected.abs().sum()),
            float((found.norm() / expected.norm() - 1).abs()),
            float(difference.max() / expected.abs().max()),
        )
        within = all(figure <= bound for figure, bound in zip(figures, bounds, strict=True))  # NaN is not
        failed |= not within
        at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        lines.append(
            f"{name}: sum {figures.sum:.1e}, norm {figures.norm:.1e}, worst {figures.worst:.1e} at {at}: found "
            f"{float(found[at]):.6g}, expected {float(expected[at]):.6g}{'' if within else '   <-- too much'}"
        )
        compared.add(name)
    assert not failed, "\n".join([f"allowed: {bounds}", *lines])
    return compared
