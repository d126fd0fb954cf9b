"""Stage 4, blend: every tile's rows, front to back, over black."""

from __future__ import annotations

import torch
from torch import Tensor

from rapfast.reference.constants import ALPHA_CAP, ALPHA_CUT, BLEND_CHUNK, T_STOP, TILE


def blend(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    colors: Tensor,
    flatten_ids: Tensor,
    isect_offsets: Tensor,
    width: int,
    height: int,
    *,
    alpha_cap: float = ALPHA_CAP,
    absgrad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Alpha-composite every tile's rows in list order over black.

    Args:
        means2d: [R, 2]. conics: [R, 3]. opacities: [R]. colors: [R, D].
        flatten_ids: [S] int32 rows, front to back within a tile.
        isect_offsets: [I, tile_height, tile_width] int32 start of each tile in flatten_ids.
        alpha_cap: upper bound of a single alpha.
        absgrad: [R, 2] to which backward adds, pixel by pixel, the absolute gradient of means2d
            (AbsGS, arXiv 2404.10484).

    Returns:
        colors [I, H, W, D] and alphas [I, H, W, 1] = 1 - transmittance.
    """
    n_images, tile_height, tile_width = isect_offsets.shape
    starts = [*isect_offsets.flatten().tolist(), len(flatten_ids)]
    within = torch.arange(TILE, dtype=means2d.dtype, device=means2d.device) + 0.5
    tiles = []
    for t in range(len(starts) - 1):
        rows = flatten_ids[starts[t] : starts[t + 1]].long()
        px = within + TILE * (t % tile_width)
        py = within + TILE * (t // tile_width % tile_height)
        pixels = torch.stack([px.repeat(TILE), py.repeat_interleave(TILE)], -1)
        tiles.append(_blend_tile(pixels, rows, means2d, conics, opacities, colors, alpha_cap, absgrad))
    channels = colors.shape[-1] + 1
    if not tiles:
        image = colors.new_zeros(n_images, height, width, channels)
    else:
        image = torch.stack(tiles).reshape(*isect_offsets.shape, TILE, TILE, channels)
        image = image.transpose(2, 3).reshape(n_images, tile_height * TILE, -1, channels)
        image = image[:, :height, :width]  # the last tiles may reach over the edge
    return image[..., :-1], image[..., -1:]


def _blend_tile(
    pixels: Tensor,  # [P, 2] centres
    rows: Tensor,  # [L] int64, front to back
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    colors: Tensor,
    alpha_cap: float,
    absgrad: Tensor | None,
) -> Tensor:
    """Colour and alpha of one tile's pixels, [P, D + 1]."""
    out = colors.new_zeros(len(pixels), colors.shape[-1])
    T = means2d.new_ones(len(pixels))  # transmittance: the light that still comes through
    stopped = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    for ids in rows.split(BLEND_CHUNK):  # l Gaussians at a time, T carried from chunk to chunk
        if stopped.all():
            break
        alpha = _alphas(pixels, ids, means2d, conics, opacities, alpha_cap, absgrad)  # [P, l]
        after = T[:, None] * torch.cumprod(1 - alpha, -1)  # [P, l] T behind each Gaussian
        chain = torch.cat([T[:, None], after], -1)  # [P, l + 1] T before each, and behind the last
        # T never grows, so those drawn are all before the first that would leave too little light
        drawn = (after > T_STOP) & ~stopped[:, None]
        out = out + torch.where(drawn, alpha * chain[:, :-1], 0) @ colors[ids]
        T = chain.gather(-1, drawn.sum(-1, keepdim=True))[:, 0]
        stopped = stopped | (chain[:, -1] <= T_STOP)
    return torch.cat([out, 1 - T[:, None]], -1)


def _alphas(
    pixels: Tensor,
    ids: Tensor,
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    alpha_cap: float,
    absgrad: Tensor | None,
) -> Tensor:
    """min(cap, opacity exp(-sigma)) at pixels [P] of Gaussians ids [l]: [P, l], 0 where skipped.

    Skipped where sigma < 0 (rounding, or a conic that is not positive definite) or alpha < 1/255.
    """
    dx, dy = (pixels[:, None] - means2d[ids]).unbind(-1)
    if absgrad is not None and dx.requires_grad:
        for axis, offset in enumerate((dx, dy)):

            def add(gradient: Tensor, axis: int = axis) -> None:
                absgrad[:, axis].index_add_(0, ids, gradient.abs().sum(0))

            offset.register_hook(add)

    def evaluate(dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = conics[ids].unbind(-1)
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        return sigma, (opacities[ids] * torch.exp(-sigma)).clamp(max=alpha_cap)

    sigma, alpha = evaluate(dx, dy)
    hit = (sigma >= 0) & (alpha >= ALPHA_CUT)  # written so that NaN misses
    if alpha.requires_grad:
        # Autograd multiplies a miss's zero gradient by exp(-sigma) and a * dx, which may be
        # infinite: misses are evaluated at offset 0 instead.
        alpha = evaluate(torch.where(hit, dx, 0), torch.where(hit, dy, 0))[1]
    return torch.where(hit, alpha, 0)
