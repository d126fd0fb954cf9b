"""Stage 3: which records each tile draws, front to back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rapfast.ops._library import TILE_SIZE, address, cpu_arguments, cuda_arguments, define, native, scratch
from rapfast.ops.project import Records

# Intersections that may be allocated before their number is known: untouched pages cost nothing.
_FREE_CAPACITY = 1 << 24


class Tiles(NamedTuple):
    """Per tile the records that reach it, by depth, ties by Gaussian."""

    tile_offsets: Tensor  # [I * tiles_y * tiles_x + 1] int64, row-major tiles
    tile_records: Tensor  # [n] int32, relative to the image's first record


def tile_grid(width: int, height: int) -> tuple[int, int]:
    """Number of tile columns and rows of an image."""
    return -(-width // TILE_SIZE), -(-height // TILE_SIZE)


def _allocate(image_offsets: Tensor, tiles_x: int, tiles_y: int, capacity: int) -> Tiles:
    n_tiles = (image_offsets.shape[0] - 1) * tiles_x * tiles_y
    return Tiles(
        tile_offsets=image_offsets.new_empty((n_tiles + 1,)),
        tile_records=image_offsets.new_empty((capacity,), dtype=torch.int32),
    )


def _fake(records, radii, image_offsets, tiles_x, tiles_y, first_tile_row, capacity):
    return tuple(_allocate(image_offsets, tiles_x, tiles_y, capacity))


def _arguments(out, records, radii, image_offsets, tiles_x, tiles_y, first_tile_row, capacity):
    return {
        "n_images": image_offsets.shape[0] - 1,
        "tiles_x": tiles_x,
        "tiles_y": tiles_y,
        "first_tile_row": first_tile_row,
        "record_capacity": records.shape[0],
        "capacity": capacity,
        "records": address(records),
        "radii": address(radii),
        "image_offsets": address(image_offsets),
        "tile_offsets": address(out.tile_offsets),
        "tile_records": address(out.tile_records),
    }


def _cpu(records, radii, image_offsets, tiles_x, tiles_y, first_tile_row, capacity):
    out = _allocate(image_offsets, tiles_x, tiles_y, capacity)
    arguments = _arguments(out, records, radii, image_offsets, tiles_x, tiles_y, first_tile_row, capacity)
    native.bin(**cpu_arguments(records), **arguments)
    return tuple(out)


def _cuda(records, radii, image_offsets, tiles_x, tiles_y, first_tile_row, capacity):
    out = _allocate(image_offsets, tiles_x, tiles_y, capacity)
    size = native.bin_scratch_size(
        n_images=image_offsets.shape[0] - 1,
        tiles_x=tiles_x,
        tiles_y=tiles_y,
        record_capacity=records.shape[0],
        capacity=capacity,
    )
    room, counts = scratch(records, size), image_offsets.new_zeros((2,))
    native.bin_cuda(
        **cuda_arguments(records),
        **_arguments(out, records, radii, image_offsets, tiles_x, tiles_y, first_tile_row, capacity),
        scratch=address(room),
        counts=address(counts),
    )
    # Where there was too little room: how much to come again with.
    out.tile_offsets[-1] = torch.where(counts[1] > capacity, counts[1], out.tile_offsets[-1])
    return tuple(out)


bin_op = define(
    "bin(Tensor records, Tensor radii, Tensor image_offsets, int tiles_x, int tiles_y, int first_tile_row, "
    "int capacity) -> (Tensor, Tensor)",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


def _all_fake(records, radii, image_offsets, tiles_x, tiles_y, first_tile_row):
    return tuple(_allocate(image_offsets, tiles_x, tiles_y, torch.library.get_ctx().new_dynamic_size()))


def _all(records, radii, image_offsets, tiles_x, tiles_y, first_tile_row):
    out = _with_room(records, radii, image_offsets, tiles_x, tiles_y, first_tile_row, None)
    return out.tile_offsets, out.tile_records


# As many rows as there are pairs: what a compiler can trace, since no size is read in between.
bin_all_op = define(
    "bin_all(Tensor records, Tensor radii, Tensor image_offsets, int tiles_x, int tiles_y, int first_tile_row) "
    "-> (Tensor, Tensor)",
    fake=_all_fake,
    cpu=_all,
    cuda=_all,
)


def bin(
    projected: Records,
    width: int,
    height: int,
    *,
    tile_rows: tuple[int, int] | None = None,
    capacity: int | None = None,
) -> Tiles:
    """Lists the records of each tile.

    ``tile_rows`` are the first row of tiles and the one behind the last; without them all rows are listed. The
    lists of a band of rows are those of the whole, numbered from the band's first tile on. ``capacity`` is the
    number of (tile, record) pairs to make room for at first; with too little room the stage runs again, and
    the lists are the same for every value.

    Raises: ValueError for rows that the image does not have; RuntimeError on a GPU for more than 4096 regions of 128x64
    pixels, or more than 2^31 - 1 pairs.
    """
    tiles_x, tiles_y = tile_grid(width, height)
    first, end = tile_rows or (0, tiles_y)
    if not 0 <= first <= end <= tiles_y:
        raise ValueError(f"tile_rows must lie within 0 and {tiles_y} and not descend, got {tile_rows}")
    arguments = projected.records, projected.radii, projected.image_offsets, tiles_x, end - first, first
    if torch.compiler.is_compiling():
        return Tiles(*bin_all_op(*arguments))
    return _with_room(*arguments, capacity)


def _with_room(
    records: Tensor, radii: Tensor, image_offsets: Tensor, tiles_x: int, tiles_y: int, first_tile_row: int,
    capacity: int | None,
) -> Tiles:  # fmt: skip
    if capacity is None:
        free = _FREE_CAPACITY if records.device.type == "cpu" else 0
        capacity = max(free, 4 * records.shape[0])
        if records.is_cuda:
            capacity = min(capacity, (1 << 31) - 1)
    arguments = records, radii, image_offsets, tiles_x, tiles_y, first_tile_row
    while True:
        out = Tiles(*bin_op(*arguments, capacity))
        n = int(out.tile_offsets[-1])
        if n <= capacity:
            return out._replace(tile_records=out.tile_records[:n])
        if n >= 1 << 31 and records.is_cuda:
            raise RuntimeError(f"a GPU lists at most 2^31 - 1 pairs of tiles and records in one call, got {n}")
        capacity = n
