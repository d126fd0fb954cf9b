"""What a native call leaves on the GPU: one buffer, its state, and what is cut out of it.

csrc/render.h has the parts (`StateLayout`) and says which of them `keep_state` adds.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rapfast.ops._library import RECORD_FIELDS, TILE_SIZE, native
from rapfast.ops.project import Records, without_dead


class Sizes(NamedTuple):
    """Of one native call, in the order of RenderSizes in csrc/render.h."""

    n_scenes: int
    n_cameras: int
    n_gaussians: int
    width: int
    height: int
    n_channels: int
    record_capacity: int
    capacity: int
    keep_state: bool
    first_tile_row: int
    n_tile_rows: int

    @property
    def n_images(self) -> int:
        return self.n_scenes * self.n_cameras

    @property
    def rows(self) -> int:
        """Of pixels, in the rows of tiles that are drawn."""
        return pixel_rows(self.height, self.first_tile_row, self.n_tile_rows)


def pixel_rows(height: int, first_tile_row: int, n_tile_rows: int) -> int:
    return min(TILE_SIZE * n_tile_rows, height - TILE_SIZE * first_tile_row)


@lru_cache(maxsize=256)
def layout(sizes: Sizes) -> dict[str, int]:
    return native.state_layout(**sizes._asdict())


class Rendered(NamedTuple):
    """What one call leaves."""

    images: Tensor  # [I, h, w, D] or [I, D, h, w]
    alphas: Tensor  # [I, h, w, 1] or [I, 1, h, w]
    state: Tensor  # [bytes] uint8, opaque: see n_invalid, state_records and state_pixels
    sizes: Sizes
    n_records: int  # rows in use, dead ones included; -1 with fixed_room: only the state knows
    n_intersections: int  # room that its pairs need: those of tiles, or of regions, where these are more
    n_visible: int = 0  # records that are not dead, with keep_state

    @property
    def n_invalid(self) -> Tensor:
        """[I] int64, Gaussians of each image culled as non-finite or degenerate. Memory of the state."""
        return part(self, "n_invalid", torch.int64, self.sizes.n_images)

    @property
    def status(self) -> Tensor:
        """[3] int64: records and room for pairs wanted, and, with fixed_room, 1 where there was too little room for
        them and all outputs are NaN or 0. Memory of the state."""
        return part(self, "status", torch.int64, 3)


def state_part(state: Tensor, sizes: Sizes, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """A part of a call's state, by its name in StateLayout of csrc/render.h."""
    begin, size = layout(sizes)[name], dtype.itemsize * math.prod(shape)
    return state[begin : begin + size].view(dtype).reshape(shape)


def part(rendered: Rendered, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return state_part(rendered.state, rendered.sizes, name, dtype, *shape)


def state_records(rendered: Rendered, records: Tensor | None = None) -> Records:
    """The visible pairs of a call, cut out of its state. Reads no input of the call.

    Of a call in a CUDA graph they are those of the last replay, and none where that had too little room. ``records``
    are the rows in use [M, 8] as a part of a graph; without them those of the state.
    """
    n = rendered.n_records
    if n < 0 and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "how many records a call has is not known while it is captured in a CUDA graph: look after a replay"
        )
    # The stream that reads may not be the one that rendered, whose allocator would hand the state on.
    rendered.state.record_stream(torch.cuda.current_stream(rendered.state.device))
    if n < 0:
        n_records, _, overflowed = rendered.status.tolist()
        n = 0 if overflowed else n_records
    return without_dead(
        Records(
            records=part(rendered, "records", torch.float32, n, len(RECORD_FIELDS)) if records is None else records,
            radii=part(rendered, "radii", torch.int32, n, 2),
            gaussian_ids=part(rendered, "gaussian_ids", torch.int32, n),
            image_offsets=part(rendered, "image_offsets", torch.int64, rendered.sizes.n_images + 1),
            n_invalid=rendered.n_invalid,
        )
    )


def state_rows(rendered: Rendered) -> tuple[Tensor, Tensor]:
    """gaussian_ids [M] int32 of the rows in use, dead ones included, and where each image's begin [I + 1] int64."""
    rendered.state.record_stream(torch.cuda.current_stream(rendered.state.device))
    return (
        part(rendered, "gaussian_ids", torch.int32, rendered.n_records),
        part(rendered, "image_offsets", torch.int64, rendered.sizes.n_images + 1),
    )


def state_pixels(rendered: Rendered) -> tuple[Tensor, Tensor]:
    """Of a call with ``keep_state``: final transmittance [I, H, W], and the place of each pixel's last record in
    its tile's list [I, H, W] int32, -1 where no record reached it."""
    shape = (rendered.sizes.n_images, rendered.sizes.rows, rendered.sizes.width)
    return (
        part(rendered, "transmittances", torch.float32, *shape),
        part(rendered, "last_ids", torch.int32, *shape),
    )
