"""Backward of stage 4: from gradients of blended images to those of records and their colours."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rapfast.ops._library import address, cpu_arguments, define, native
from rapfast.ops.bin import Tiles, tile_grid


class BlendGradients(NamedTuple):
    """Gradients of the inputs of the blend stage."""

    records: Tensor  # [M, 8], 0 for depth and compensation, which the blend does not read
    record_colors: Tensor  # [M, D]
    means2d_abs: Tensor  # [M, 2] sum over pixels of |gradient of mean2d|; [0, 2] where not wanted


def _allocate(records: Tensor, record_colors: Tensor, absgrad: bool) -> BlendGradients:
    return BlendGradients(
        records=records.new_empty(records.shape),
        record_colors=record_colors.new_empty(record_colors.shape),
        means2d_abs=records.new_empty((records.shape[0] if absgrad else 0, 2)),
    )


def _fake(
    records, record_colors, image_offsets, tile_offsets, tile_records, v_colors, v_alphas, width, height, alpha_cap,
    absgrad,
):  # fmt: skip
    return tuple(_allocate(records, record_colors, absgrad))


def _cpu(
    records, record_colors, image_offsets, tile_offsets, tile_records, v_colors, v_alphas, width, height, alpha_cap,
    absgrad,
):  # fmt: skip
    out = _allocate(records, record_colors, absgrad)
    tiles_x, tiles_y = tile_grid(width, height)
    native.blend_bwd(
        **cpu_arguments(records),
        n_images=image_offsets.shape[0] - 1,
        width=width,
        height=height,
        tiles_x=tiles_x,
        tiles_y=tiles_y,
        n_channels=record_colors.shape[1],
        alpha_cap=alpha_cap,
        records=address(records),
        record_colors=address(record_colors),
        color_stride=record_colors.shape[1],
        image_offsets=address(image_offsets),
        tile_offsets=address(tile_offsets),
        tile_records=address(tile_records),
        v_colors=address(v_colors),
        v_alphas=address(v_alphas),
        **{f"v_{name}": address(tensor) for name, tensor in out._asdict().items()},
    )
    return tuple(out)


blend_bwd_op = define(
    "blend_bwd(Tensor records, Tensor record_colors, Tensor image_offsets, Tensor tile_offsets, Tensor tile_records, "
    "Tensor v_colors, Tensor v_alphas, int width, int height, float alpha_cap, bool absgrad) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_cpu,
)


def blend_bwd(
    records: Tensor,  # [M, 8] as blended
    record_colors: Tensor,  # [M, D]
    image_offsets: Tensor,  # [I + 1] int64
    tiles: Tiles,
    v_colors: Tensor,  # [I, H, W, D]
    v_alphas: Tensor,  # [I, H, W, 1]
    *,
    alpha_cap: float,
    absgrad: bool = False,
) -> BlendGradients:
    """Gradients of the records and their colours. Sums run in a fixed order: the bits do not depend on threads."""
    height, width = v_colors.shape[1:3]
    return BlendGradients(*blend_bwd_op(
        records, record_colors, image_offsets, *tiles, v_colors, v_alphas, width, height, alpha_cap, absgrad
    ))  # fmt: skip
