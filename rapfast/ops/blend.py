"""Stage 4: front-to-back compositing of each tile's records."""

from __future__ import annotations

from torch import Tensor

from rapfast.ops._library import address, define, native, native_arguments
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


def _cpu(records, record_colors, image_offsets, tile_offsets, tile_records, width, height, alpha_cap):
    colors, alphas = _allocate(record_colors, image_offsets, width, height)
    tiles_x, tiles_y = tile_grid(width, height)
    native.blend(
        **native_arguments(records),
        n_images=image_offsets.shape[0] - 1,
        width=width,
        height=height,
        tiles_x=tiles_x,
        tiles_y=tiles_y,
        n_channels=record_colors.shape[1],
        alpha_cap=alpha_cap,
        records=address(records),
        record_colors=address(record_colors),
        image_offsets=address(image_offsets),
        tile_offsets=address(tile_offsets),
        tile_records=address(tile_records),
        colors=address(colors),
        alphas=address(alphas),
    )
    return colors, alphas


blend_op = define(
    "blend(Tensor records, Tensor record_colors, Tensor image_offsets, Tensor tile_offsets, Tensor tile_records, "
    "int width, int height, float alpha_cap) -> (Tensor, Tensor)",
    _cpu,
    _fake,
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
