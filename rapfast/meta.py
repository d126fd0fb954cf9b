"""The third output of :func:`rapfast.rasterization`: gsplat's ``meta``, made from this call's records.

Its tensors are built the first time they are asked for, so a caller that ignores them pays nothing. They come
from the records the call kept and never from its inputs, which an optimizer may have changed since.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rapfast.ops._library import RECORD_FIELDS, TILE_SIZE
from rapfast.ops.bin import tile_grid
from rapfast.ops.project import Records

_FIELD = {name: column for column, name in enumerate(RECORD_FIELDS)}


_LAZY = object()
"""Stands in a Meta for an entry that has not been asked for."""


class Meta(dict):
    """A dict some of whose entries are made, once, on the first look."""

    def __init__(
        self, entries: dict[str, Any], maker: Any = None, is_live: bool = False, is_of_graph: bool = False
    ) -> None:
        """``maker`` has an attribute for each lazy entry. ``is_live``: each look makes an entry anew, for the next one
        may find another. ``is_of_graph``: entries are part of an autograd graph."""
        super().__init__(entries)
        self._maker = maker
        self.is_live = is_live
        self._is_of_graph = is_of_graph
        self.means2d_of_views: tuple[Tensor, ...] | None = None  # see `rapfast.rasterization.rasterize_colored`

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is _LAZY:
            if self.is_live:
                return getattr(copy.copy(self._maker), key)
            value = self._made(key)
            super().__setitem__(key, value)
        return value

    def _made(self, key: str) -> Any:
        if not self._is_of_graph or torch.is_grad_enabled():
            return getattr(self._maker, key)
        # It is kept, and who looks at it next may want its gradient.
        with torch.inference_mode(False), torch.enable_grad():
            return getattr(self._maker, key)

    def __iter__(self) -> Iterator[str]:
        # Overridden so that dict(meta) and {**meta} go through __getitem__ instead of copying the slots.
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            value = self[key]
            del self[key]
            return value
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        key = next(reversed(self))
        return key, self.pop(key)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return ValuesView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return ItemsView(self)

    def copy(self) -> Meta:
        copied = Meta(dict(super().items()), self._maker, self.is_live, self._is_of_graph)
        copied.means2d_of_views = self.means2d_of_views
        return copied

    def __repr__(self) -> str:
        return f"Meta({', '.join(self)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self.items()),)


class _Maker:
    """Makes each lazy entry, under the entry's name, from the records of one call."""

    def __init__(
        self,
        make_records: Callable[[], Records],
        make_n_invalid: Callable[[], Tensor],
        make_overflowed: Callable[[], Tensor] | None,
        image_dims: tuple[int, ...],
        n_gaussians: int,
        tiles: tuple[int, int],
        packed: bool,
        make_means2d: Callable[[], Tensor] | None,
    ) -> None:
        self._make_records = make_records
        self._make_means2d = make_means2d
        self._make_n_invalid = make_n_invalid
        self._make_overflowed = make_overflowed
        self._image_dims = image_dims
        self._n_gaussians = n_gaussians
        self._tiles_x, self._tiles_y = tiles
        self._packed = packed

    @property
    def n_invalid(self) -> Tensor:
        return self._make_n_invalid().reshape(self._image_dims)

    @property
    def overflowed(self) -> Tensor:
        return self._make_overflowed()

    @cached_property
    def _projected(self) -> Records:
        return self._make_records()

    @property
    def _n_cameras(self) -> int:
        return self._image_dims[-1]

    @property
    def _n_images(self) -> int:
        return math.prod(self._image_dims)

    @property
    def _device(self) -> torch.device:
        return self._projected.records.device

    @cached_property
    def _image_ids(self) -> Tensor:
        counts = self._projected.image_offsets.diff()
        return torch.repeat_interleave(torch.arange(self._n_images, device=self._device), counts)

    def _per_record(self, values: Tensor) -> Tensor:
        if self._packed:
            return values.clone()
        out = values.new_zeros((self._n_images * self._n_gaussians, *values.shape[1:]))
        out[self._image_ids * self._n_gaussians + self._projected.gaussian_ids] = values
        return out.reshape(*self._image_dims, self._n_gaussians, *values.shape[1:])

    def _column(self, first: str, last: str | None = None) -> Tensor:
        if last is None:
            return self._per_record(self._projected.records[:, _FIELD[first]])
        return self._per_record(self._projected.records[:, _FIELD[first] : _FIELD[last] + 1])

    @property
    def batch_ids(self) -> Tensor:
        return self._image_ids // self._n_cameras

    @property
    def camera_ids(self) -> Tensor:
        return self._image_ids % self._n_cameras

    @property
    def gaussian_ids(self) -> Tensor:
        return self._projected.gaussian_ids.long()

    @property
    def radii(self) -> Tensor:
        return self._per_record(self._projected.radii)

    @property
    def means2d(self) -> Tensor:
        return self._column("x", "y") if self._make_means2d is None else self._make_means2d()

    @property
    def depths(self) -> Tensor:
        return self._column("depth")

    @property
    def conics(self) -> Tensor:
        return self._column("conic_a", "conic_c")

    @property
    def opacities(self) -> Tensor:
        return self._column("opacity")

    @property
    def _boxes(self) -> Tensor:
        """[M, 4] tile columns [x0, x1) and rows [y0, y1) of each record's box."""
        means2d, radii = self._projected.records[:, :2], self._projected.radii
        low = torch.floor(means2d / TILE_SIZE - radii / TILE_SIZE)
        high = torch.ceil(means2d / TILE_SIZE + radii / TILE_SIZE)
        limit = means2d.new_tensor([self._tiles_x, self._tiles_y])
        return torch.cat([low.clamp(min=0).minimum(limit), high.clamp(min=0).minimum(limit)], dim=1).long()

    @property
    def tiles_per_gauss(self) -> Tensor:
        x0, y0, x1, y1 = self._boxes.unbind(1)
        return self._per_record(((x1 - x0) * (y1 - y0)).to(torch.int32))

    @property
    def isect_ids(self) -> Tensor:
        return self._intersections[0]

    @property
    def flatten_ids(self) -> Tensor:
        return self._intersections[1]

    @property
    def isect_offsets(self) -> Tensor:
        return self._intersections[2]

    @cached_property
    def _intersections(self) -> tuple[Tensor, Tensor, Tensor]:
        projected, tiles_x, n_tiles = self._projected, self._tiles_x, self._tiles_x * self._tiles_y
        x0, y0, x1, y1 = self._boxes.unbind(1)
        counts = (x1 - x0) * (y1 - y0)
        depths = projected.records[:, _FIELD["depth"]]
        # Emitted front to back, then sorted stably by tile: within a tile the order is the one drawn in, depths as
        # real numbers (their bits would put negative ones last) and ties by Gaussian.
        order = torch.sort(depths, stable=True).indices
        ends = counts[order].cumsum(0)
        row = torch.repeat_interleave(order, counts[order])
        first = torch.repeat_interleave(ends - counts[order], counts[order])
        place = torch.arange(row.shape[0], device=self._device) - first
        columns = (x1 - x0)[row]
        tile = (y0[row] + place // columns) * tiles_x + x0[row] + place % columns
        image = self._image_ids[row]
        image_tile, order = torch.sort(image * n_tiles + tile, stable=True)
        row, tile, image = row[order], tile[order], image[order]
        # gsplat's key: image | tile | the 32 bits of the depth.
        depth_bits = depths[row].float().view(torch.int32).long() & 0xFFFFFFFF
        keys = (image << (32 + n_tiles.bit_length())) | (tile << 32) | depth_bits
        # What flatten_ids index: rows of the packed tensors, or of the dense ones flattened.
        flat = row if self._packed else image * self._n_gaussians + projected.gaussian_ids[row]
        offsets = torch.bincount(image_tile, minlength=self._n_images * n_tiles)
        offsets = (offsets.cumsum(0) - offsets).to(torch.int32)
        return keys, flat.to(torch.int32), offsets.reshape(*self._image_dims, self._tiles_y, tiles_x)


def build_meta(
    make_records: Callable[[], Records],
    make_n_invalid: Callable[[], Tensor],
    batch_dims: tuple[int, ...],
    n_cameras: int,
    n_gaussians: int,
    width: int,
    height: int,
    packed: bool,
    make_overflowed: Callable[[], Tensor] | None = None,
    make_means2d: Callable[[], Tensor] | None = None,
) -> Meta:
    """The meta of one call, with gsplat 1.5.3's keys, shapes and dtypes, and ``n_invalid`` [..., C] (int64):
    Gaussians of each view that were culled because they are not finite or degenerate.

    The functions give the call's records and counts, when the first entry that needs them is asked for. That of a
    call captured in a CUDA graph has ``make_overflowed``: each entry is then of the last replay at each look, and
    ``overflowed`` (int64 [], on the device) is 1 where that had too little room and drew nothing but NaN. That of a
    call that wants gradients has ``make_means2d``, which gives the tensor of the graph; its other entries of floats are
    part of the graph too, also where they are first looked at under `torch.no_grad()`.

    Packed, per-record tensors are [M, ...] in order of image, then Gaussian. Dense, they are [..., C, N, ...] and
    0 where the Gaussian is not visible. The tile entries follow gsplat's bounding-box rule.
    """
    tiles = tiles_x, tiles_y = tile_grid(width, height)
    image_dims = (*batch_dims, n_cameras)
    maker = _Maker(
        make_records, make_n_invalid, make_overflowed, image_dims, n_gaussians, tiles, packed, make_means2d
    )
    ids = _LAZY if packed else None
    entries = {
        "batch_ids": ids,
        "camera_ids": ids,
        "gaussian_ids": ids,
        "radii": _LAZY,
        "means2d": _LAZY,
        "depths": _LAZY,
        "conics": _LAZY,
        "opacities": _LAZY,
        "tile_width": tiles_x,
        "tile_height": tiles_y,
        "tiles_per_gauss": _LAZY,
        "isect_ids": _LAZY,
        "flatten_ids": _LAZY,
        "isect_offsets": _LAZY,
        "width": width,
        "height": height,
        "tile_size": TILE_SIZE,
        "n_batches": math.prod(batch_dims),
        "n_cameras": n_cameras,
        "n_invalid": _LAZY,
    }
    if make_overflowed is not None:
        entries["overflowed"] = _LAZY
    return Meta(entries, maker, is_live=make_overflowed is not None, is_of_graph=make_means2d is not None)
