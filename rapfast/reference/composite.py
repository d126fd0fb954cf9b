"""Stage 5, composite: background, expected depth, and the caller's post-processing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from rapfast.reference.constants import ED_MIN_ALPHA

if TYPE_CHECKING:
    from rapfast.postprocess import PostProcess


def composite(
    colors: Tensor,
    alphas: Tensor,
    *,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    postprocess: PostProcess | None = None,
) -> tuple[Tensor, Tensor]:
    """Finish the images: background, then expected depth, then post-processing.

    Args:
        colors: [I, H, W, D] over black, depth last where the mode has it. alphas: [I, H, W, 1].
        backgrounds: [I, Dc] or [I, H, W, Dc], Dc being the channels of colour. Depth has background
            0, so modes "D" and "ED" do not read it.
        postprocess: clamp -> bilinear resize (align_corners=False, no antialias) -> (x - mean) /
            std -> layout -> dtype. clamp, mean and std touch colour only. uint8 is
            trunc(clamp(255 x + 0.5, 0, 255)). Alphas are resized and laid out with the colours and
            keep their dtype.

    Returns:
        colors [I, H', W', D] (or [I, D, H', W'] for layout "CHW") and alphas alike.
    """
    has_depth = render_mode != "RGB"
    depth = colors[..., -1:] if has_depth else colors[..., :0]
    rgb = colors[..., :-1] if has_depth else colors
    if backgrounds is not None and rgb.shape[-1]:
        if backgrounds.dim() == 2:
            backgrounds = backgrounds[:, None, None]
        rgb = rgb + (1 - alphas) * backgrounds
    if render_mode in ("ED", "RGB+ED"):
        depth = depth / alphas.clamp(min=ED_MIN_ALPHA)
    if postprocess is None:
        return torch.cat([rgb, depth], -1), alphas

    if postprocess.clamp is not None:
        rgb = rgb.clamp(*postprocess.clamp)
    if postprocess.size is not None:
        planes = torch.cat([rgb, depth, alphas], -1).permute(0, 3, 1, 2)
        planes = F.interpolate(planes, size=postprocess.size, mode="bilinear", align_corners=False, antialias=False)
        channels = [rgb.shape[-1], depth.shape[-1], 1]
        rgb, depth, alphas = planes.permute(0, 2, 3, 1).split(channels, -1)
    if rgb.shape[-1] and postprocess.mean is not None:
        rgb = rgb - rgb.new_tensor(postprocess.mean)
    if rgb.shape[-1] and postprocess.std is not None:
        rgb = rgb / rgb.new_tensor(postprocess.std)
    colors = torch.cat([rgb, depth], -1)
    if postprocess.layout == "CHW":
        colors, alphas = (x.permute(0, 3, 1, 2).contiguous() for x in (colors, alphas))
    if postprocess.dtype == torch.uint8:
        colors = (255 * colors + 0.5).clamp(0, 255).trunc()
    return colors.to(postprocess.dtype or colors.dtype), alphas
