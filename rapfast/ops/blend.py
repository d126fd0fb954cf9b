"""Stage 4: front-to-back compositing of each tile's records."""

from __future__ import annotations

import torch
from torch import Tensor

from rapfast.ops._library import address, aligned, cpu_arguments, cuda_arguments, define, native
from rapfast.ops.bin import Tiles, tile_grid
from rapfast.ops.project import Records


def _allocate(record_colors: Tensor, image_offsets: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    n_images = image_offsets.shape[0] - 1
    return (
        record_colors.new_empty((n_images, height, width, record_colors.shape[1])),
        record_colors.new_empty((n_images, height, width, 1)),
    )


def _fake(records, record_colors, image_offsets, tile_offsets, tile_records, width, height, alpha_cap):
    return _allocate(record_colors, image_offsets, width, height)


def _arguments(
    colors, alphas, records, record_colors, image_offsets, tile_offsets, tile_records, width, height, alpha_cap
):
    tiles_x, tiles_y = tile_grid(width, height)
    return {
        "n_images": image_offsets.shape[0] - 1,
        "width": width,
        "height": height,
        "tiles_x": tiles_x,
        "tiles_y": tiles_y,
        "n_channels": colors.shape[-1],
        "alpha_cap": alpha_cap,
        "records": address(records),
        "record_colors": address(record_colors),
        "color_stride": record_colors.shape[1],
        "image_offsets": address(image_offsets),
        "tile_offsets": address(tile_offsets),
        "tile_records": address(tile_records),
        "colors": address(colors),
        "alphas": address(alphas),
    }


def _cpu(*inputs):
    record_colors, image_offsets, width, height = inputs[1], inputs[2], inputs[5], inputs[6]
    out = _allocate(record_colors, image_offsets, width, height)
    native.blend(**cpu_arguments(record_colors), **_arguments(*out, *inputs))
    return out


def _cuda(records, record_colors, image_offsets, *inputs):
    out = _allocate(record_colors, image_offsets, inputs[2], inputs[3])
    # 16-byte loads want aligned records and rows of whole quads. Both names live until the launch.
    records = aligned(records)
    stride = native.color_stride(record_colors.shape[1])
    record_colors = torch.nn.functional.pad(record_colors, (0, stride - record_colors.shape[1]))
    native.blend_cuda(**cuda_arguments(records), **_arguments(*out, records, record_colors, image_offsets, *inputs))
    return out


blend_op = define(
    "blend(Tensor records, Tensor record_colors, Tensor image_offsets, Tensor tile_offsets, Tensor tile_records, "
    "int width, int height, float alpha_cap) -> (Tensor, Tensor)",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


def blend(
    projected: Records,
    record_colors: Tensor,  # [M, D]
    tiles: Tiles,
    width: int,
    height: int,
    *,
    alpha_cap: float = 0.999,
) -> tuple[Tensor, Tensor]:
    """Blended colours [I, H, W, D] without background, and alphas [I, H, W, 1]."""
    return blend_op(
        projected.records, record_colors, projected.image_offsets, tiles.tile_offsets, tiles.tile_records,
        width, height, alpha_cap,
    )  # fmt: skip
