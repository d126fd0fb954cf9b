"""Stage 3, bin: for each tile, the rows that may touch it, front to back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rapfast.reference.constants import TILE


@torch.no_grad()
def bin_tiles(
    means2d: Tensor,
    radii: Tensor,
    depths: Tensor,
    image_ids: Tensor,
    n_images: int,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Intersect boxes with 16 x 16 tiles and sort by image, tile, depth, row.

    Args:
        means2d: [R, 2] pixels. radii: [R, 2] int32, 0 for a row that is not drawn. depths: [R].
        image_ids: [R] int64. Rows of an image are in Gaussian order, which breaks ties of depth.

    Returns:
        tiles_per_gauss [R] int32; isect_ids [S] int64: image, tile and the float32 bits of depth,
        from high to low; flatten_ids [S] int32: rows; isect_offsets [I, tile_height, tile_width]
        int32: where a tile's rows start.
    """
    tile_width, tile_height = math.ceil(width / TILE), math.ceil(height / TILE)
    n_tiles = tile_width * tile_height
    grid = torch.tensor([tile_width, tile_height], device=means2d.device)
    reach = radii.to(means2d.dtype)
    lo = torch.minimum(torch.floor((means2d - reach) / TILE).clamp(min=0), grid).long()  # inclusive
    hi = torch.minimum(torch.ceil((means2d + reach) / TILE).clamp(min=0), grid).long()  # exclusive
    span = torch.where((radii > 0).all(-1, keepdim=True), hi - lo, 0)
    counts = span.prod(-1)

    # Emit the rows front to back, then bring equal tiles together with a stable sort: depth order,
    # and row order among equal depths, survive inside each tile.
    front_to_back = torch.sort(depths, stable=True).indices
    repeats = counts[front_to_back]
    rows = torch.repeat_interleave(front_to_back, repeats)
    first = torch.repeat_interleave(torch.cumsum(repeats, 0) - repeats, repeats)
    nth = torch.arange(len(rows), device=rows.device) - first  # of the tiles of its row
    tile_x = lo[rows, 0] + nth % span[rows, 0]
    tile_y = lo[rows, 1] + nth // span[rows, 0]
    tiles = image_ids[rows] * n_tiles + tile_y * tile_width + tile_x
    tiles, order = torch.sort(tiles, stable=True)
    rows = rows[order]

    images, tile_ids = tiles // max(n_tiles, 1), tiles % max(n_tiles, 1)
    depth_bits = depths[rows].float().view(torch.int32).long() & 0xFFFFFFFF
    isect_ids = (images << (32 + n_tiles.bit_length())) | (tile_ids << 32) | depth_bits
    per_tile = torch.bincount(tiles, minlength=n_images * n_tiles)
    offsets = (torch.cumsum(per_tile, 0) - per_tile).reshape(n_images, tile_height, tile_width)
    return counts.int(), isect_ids, rows.int(), offsets.int()
