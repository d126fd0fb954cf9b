"""The third output of :func:`rapfast.rasterization`: gsplat's ``meta``, made from this call's records.

Its tensors are built the first time they are asked for, so a caller that ignores them pays nothing. They come
from the records the call kept and never from its inputs, which an optimizer may have changed since.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from typing import Any

import torch
from torch import Tensor

from rapfast.ops._library import RECORD_FIELDS, TILE_SIZE
from rapfast.ops.bin import tile_grid
from rapfast.ops.project import Records

_FIELD = {name: column for column, name in enumerate(RECORD_FIELDS)}


class Meta(dict):
    """A dict whose entries may be functions that are called, once, on the first look."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, _Lazy):
            value = value.make()
            super().__setitem__(key, value)
        return value

    def __iter__(self) -> Iterator[str]:
        # Overridden so that dict(meta) and {**meta} go through __getitem__ instead of copying the slots.
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        return self.get(key, default)

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
        return Meta(super().items())

    def __repr__(self) -> str:
        return f"Meta({', '.join(self)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self.items()),)


class _Lazy:
    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def build_meta(
    make_records: Callable[[], Records],
    n_invalid: Tensor,
    batch_dims: tuple[int, ...],
    n_cameras: int,
    n_gaussians: int,
    width: int,
    height: int,
    packed: bool,
) -> Meta:
    """The meta of one call, with gsplat 1.5.3's keys, shapes and dtypes, and ``n_invalid`` [..., C] (int64):
    Gaussians of each view that were culled because they are not finite or degenerate.

    ``make_records`` gives the call's records, when the first entry that needs them is asked for.

    Packed, per-record tensors are [M, ...] in order of image, then Gaussian. Dense, they are [..., C, N, ...] and
    0 where the Gaussian is not visible. The tile entries follow gsplat's bounding-box rule.
    """
    batch = 1
    for n in batch_dims:
        batch *= n
    n_images = batch * n_cameras
    tiles_x, tiles_y = tile_grid(width, height)

    @functools.cache
    def projected() -> Records:
        return make_records()

    def per_record(values: Tensor) -> Tensor:
        return values.clone() if packed else dense(values)

    def dense(values: Tensor) -> Tensor:
        out = values.new_zeros((n_images * n_gaussians, *values.shape[1:]))
        out[image_ids() * n_gaussians + projected().gaussian_ids] = values
        return out.reshape(*batch_dims, n_cameras, n_gaussians, *values.shape[1:])

    def image_ids() -> Tensor:
        counts = projected().image_offsets.diff()
        return torch.repeat_interleave(torch.arange(n_images, device=n_invalid.device), counts)

    def flat_ids() -> Tensor:
        """What flatten_ids index: rows of the packed tensors, or of the dense ones flattened."""
        if packed:
            return torch.arange(projected().records.shape[0], dtype=torch.int32, device=n_invalid.device)
        return (image_ids() * n_gaussians + projected().gaussian_ids).to(torch.int32)

    def boxes() -> Tensor:
        """[M, 4] tile columns [x0, x1) and rows [y0, y1) of each record's box."""
        low = torch.floor(projected().records[:, :2] / TILE_SIZE - projected().radii / TILE_SIZE)
        high = torch.ceil(projected().records[:, :2] / TILE_SIZE + projected().radii / TILE_SIZE)
        limit = projected().records.new_tensor([tiles_x, tiles_y])
        return torch.cat([low.clamp(min=0).minimum(limit), high.clamp(min=0).minimum(limit)], dim=1).long()

    def tiles_per_record() -> Tensor:
        x0, y0, x1, y1 = boxes().unbind(1)
        return (x1 - x0) * (y1 - y0)

    def intersections() -> tuple[Tensor, Tensor, Tensor]:
        x0, y0, x1, _ = boxes().unbind(1)
        counts = tiles_per_record()
        depths = projected().records[:, _FIELD["depth"]]
        # Emitted front to back, then sorted stably by tile: within a tile the order is the one drawn in, depths as
        # real numbers (their bits would put negative ones last) and ties by Gaussian.
        order = torch.sort(depths, stable=True).indices
        ends = counts[order].cumsum(0)
        row = torch.repeat_interleave(order, counts[order])
        first = torch.repeat_interleave(ends - counts[order], counts[order])
        place = torch.arange(row.shape[0], device=n_invalid.device) - first
        columns = (x1 - x0)[row]
        tile = (y0[row] + place // columns) * tiles_x + x0[row] + place % columns
        image = image_ids()[row]
        image_tile, order = torch.sort(image * (tiles_x * tiles_y) + tile, stable=True)
        row, tile, image = row[order], tile[order], image[order]
        # gsplat's key: image | tile | the 32 bits of the depth.
        tile_bits = (tiles_x * tiles_y).bit_length()
        depth_bits = depths[row].float().view(torch.int32).long() & 0xFFFFFFFF
        keys = (image << (32 + tile_bits)) | (tile << 32) | depth_bits
        offsets = torch.bincount(image_tile, minlength=n_images * tiles_x * tiles_y)
        offsets = (offsets.cumsum(0) - offsets).to(torch.int32)
        return keys, flat_ids()[row], offsets.reshape(*batch_dims, n_cameras, tiles_y, tiles_x)

    meta = Meta()

    def lazy(key: str, make: Callable[[], Any]) -> None:
        meta[key] = _Lazy(make)

    def column(name: str) -> Callable[[], Tensor]:
        return lambda: per_record(projected().records[:, _FIELD[name]])

    def intersection(index: int) -> Callable[[], Tensor]:
        def make() -> Tensor:
            for key, value in zip(("isect_ids", "flatten_ids", "isect_offsets"), intersections(), strict=True):
                dict.__setitem__(meta, key, value)
            return dict.__getitem__(meta, ("isect_ids", "flatten_ids", "isect_offsets")[index])

        return make

    if packed:
        lazy("batch_ids", lambda: image_ids() // n_cameras)
        lazy("camera_ids", lambda: image_ids() % n_cameras)
        lazy("gaussian_ids", lambda: projected().gaussian_ids.long())
    else:
        meta.update(batch_ids=None, camera_ids=None, gaussian_ids=None)
    lazy("radii", lambda: per_record(projected().radii))
    lazy("means2d", lambda: per_record(projected().records[:, :2]))
    lazy("depths", column("depth"))
    lazy("conics", lambda: per_record(projected().records[:, _FIELD["conic_a"] : _FIELD["conic_c"] + 1]))
    lazy("opacities", column("opacity"))
    meta.update(tile_width=tiles_x, tile_height=tiles_y)
    lazy("tiles_per_gauss", lambda: per_record(tiles_per_record().to(torch.int32)))
    lazy("isect_ids", intersection(0))
    lazy("flatten_ids", intersection(1))
    lazy("isect_offsets", intersection(2))
    meta.update(width=width, height=height, tile_size=TILE_SIZE, n_batches=batch, n_cameras=n_cameras)
    meta["n_invalid"] = n_invalid.reshape(*batch_dims, n_cameras)
    return meta
