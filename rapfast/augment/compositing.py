"""From refined pictures to frames of a film: the one composite over the background, bytes, and a film's colours."""

from __future__ import annotations

import torch
from torch import Tensor

# ITU-R BT.709, limited range: Y' in 16..235, Cb and Cr in 16..240.
_KR, _KB = 0.2126, 0.0722
_RGB_TO_YCBCR = (
    (219 * _KR, 219 * (1 - _KR - _KB), 219 * _KB),
    (-112 * _KR / (1 - _KB), -112 * (1 - _KR - _KB) / (1 - _KB), 112.0),
    (112.0, -112 * (1 - _KR - _KB) / (1 - _KR), -112 * _KB / (1 - _KR)),
)


def composite(pictures: Tensor, alphas: Tensor, backgrounds: Tensor, *, premultiplied: bool) -> Tensor:
    """pictures x alpha + background x (1 - alpha), alpha applied once: float32 [F, S, 3, H, W].

    Args:
        pictures: [F, S, 3, H, W] with white at 1, of F frames in S sets.
        alphas: [F, S, 1, H, W] as rendered.
        backgrounds: [F, H, W, 3], uint8 or floating in 0..1, of all sets.
        premultiplied: pictures come from the rasterizer, in whose sums of weight x colour the alpha is already; those
            of a refiner are not.
    """
    pictures, alphas = pictures.float(), alphas.float()  # a refiner may work in half precision
    behind = backgrounds.permute(0, 3, 1, 2)[:, None]
    behind = behind.float() / 255 if behind.dtype == torch.uint8 else behind.float()
    if premultiplied:
        return torch.addcmul(pictures + behind, behind, alphas, value=-1)
    return torch.lerp(behind.expand_as(pictures), pictures, alphas)


def even(size: int) -> int:
    """What H.264 makes of a side."""
    return size + size % 2


def to_yuv420(pictures: Tensor) -> Tensor:
    """[..., 3, H, W] with white at 1 -> uint8 [..., 3/2 h, w]: the planes Y', Cb and Cr of BT.709 in limited range.

    A film has even sides h and w: an odd one is padded by repeating its last pixel. Chroma is the mean of 2x2 pixels,
    so it lies in their middle (4:2:0 with chroma location "center", which films say). NaN is black.
    """
    lead, (height, width) = pictures.shape[:-3], pictures.shape[-2:]
    rgb = pictures.reshape(-1, 3, height, width).clamp(0, 1).nan_to_num(0)
    if height % 2 or width % 2:
        rgb = torch.nn.functional.pad(rgb, (0, width % 2, 0, height % 2), mode="replicate")
    r, g, b = rgb.unbind(1)
    matrix = _RGB_TO_YCBCR
    luma = 16.5 + matrix[0][0] * r + matrix[0][1] * g + matrix[0][2] * b
    r, g, b = torch.nn.functional.avg_pool2d(rgb, 2).unbind(1)
    planes = [luma.to(torch.uint8).flatten(1)]
    for row in matrix[1:]:
        planes.append((128.5 + row[0] * r + row[1] * g + row[2] * b).to(torch.uint8).flatten(1))
    h, w = even(height), even(width)
    return torch.cat(planes, 1).reshape(*lead, h * 3 // 2, w)
