"""The least time that each step of a forward call can take on an H200: from what is counted of a workload, the bytes
and operations that the step cannot do without, and the time these take at what the chip was measured to reach.

Only what a step must do counts: every input read once, every output written once, however often a kernel comes back to
either; of blending, the records that put something into a pixel. A floor is therefore nothing that a kernel could
reach, but what is left between the two is all there is to gain without another algorithm.

All formulas are per view. Operations are instructions of one lane; a fused multiply-add is one.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch

from rapfast import ops

BYTES_PER_SECOND = 4.25e12
"""A device-to-device copy, read and written bytes together."""
OPERATIONS_PER_SECOND = 63.7e12 / 2
"""float32 instructions of a lane: half of 63.7 TFLOP/s, in which a multiply-add counts twice."""
EX2_PER_SECOND = 4.1e12
LAUNCH_SECONDS = 3.2e-6

_SORTS = ((0.3e6, 70.0, 39.0), (1e6, 83.0, 47.0), (2.5e6, 144.0, 82.0), (20e6, 643.0, 338.0))
"""CUB's radix sort of u32 keys with u32 values: number of pairs, microseconds for 32 and for 16 key bits."""

GROUP = 32  # cameras that share one load of a Gaussian: csrc/cuda/project.cu
TILE, CELL = 16, 4  # pixels per side: a tile, and the part of it for which a record is passed over or not
ALPHA_CUT, STOP, ALPHA_CAP = 1 / 255, 1e-4, 0.999

OTHER_STEPS = {
    "prepare": "project",
    "tally": "bin",
    "count": "bin",
    "publish": "bin",
    "copy_cameras": "project",
    "store_views": "color",
}
"""Steps that a way of doing it needs and the work does not: they have a stage and no floor."""

SAME_WORK = {"group": "emit", "sort": "depth"}
"""Steps of calls with few records a region, and those of other calls that do the same work in the other order."""


class Work(NamedTuple):
    """What is counted of one workload: means over the views of a batch."""

    views: int  # of the batch
    gaussians: int
    records: float  # pairs that passed the frustum test: rows of every later stage, dead ones included
    visible: float  # pairs that passed the full test too
    seen: float  # Gaussians that are visible in at least one view, divided by the views
    rows: float  # (record, tile row) pairs of the boxes
    intersections: float  # (record, tile) pairs after the exact test
    walked: float  # of them those that come before every pixel of the tile has stopped
    cells: float  # (record, 4x4 cell of a tile) pairs that draw in at least one pixel
    drawn: float  # (record, pixel) pairs that are drawn
    tiles: int
    pixels: int
    channels: int  # blended ones, depth included
    coefficients: int  # of spherical harmonics a channel; 0: colours are given


class Floor(NamedTuple):
    """Of one step, per view."""

    stage: str
    bytes: float
    operations: float = 0.0
    ex2: float = 0.0

    def limits(self) -> dict[str, float]:
        """Microseconds per view by what sets them."""
        return {
            "bytes": 1e6 * self.bytes / BYTES_PER_SECOND,
            "operations": 1e6 * self.operations / OPERATIONS_PER_SECOND,
            "ex2": 1e6 * self.ex2 / EX2_PER_SECOND,
        }

    @property
    def us(self) -> float:
        return max(self.limits().values())


def sort_us(pairs: float, bits: int) -> float:
    """Microseconds that CUB's sort of ``pairs`` u32 keys and values by ``bits`` bits was measured to take, launches and
    the gaps between them included: between the measured sizes and key lengths on straight lines, over the largest in
    proportion. No floor: a sort of one's own may beat it."""
    passes = math.ceil(bits / 8)

    def at(row: tuple[float, float, float]) -> float:
        return row[2] + (row[1] - row[2]) * (passes - 2) / 2

    if pairs <= _SORTS[0][0]:
        return at(_SORTS[0])
    for low, high in zip(_SORTS, _SORTS[1:], strict=False):
        if pairs <= high[0]:
            return at(low) + (at(high) - at(low)) * (pairs - low[0]) / (high[0] - low[0])
    return at(_SORTS[-1]) * pairs / _SORTS[-1][0]


def floors(w: Work) -> dict[str, Floor]:
    """Each step of a call in its order; the names are those of `measure.step_ms`."""
    words = w.gaussians / 32  # one bit for each (Gaussian, view) pair
    stride = w.channels if w.channels < 3 else 4 * math.ceil(w.channels / 4)  # floats in a row of colours
    found = {
        # 44 bytes of mean, quaternion, scale and opacity, once for each group of cameras; a bit out. About 60
        # operations for the test of one pair: 9 to rotate the mean, a reciprocal, two projections, two radii with
        # their roots, ten comparisons.
        "cull": Floor("project", 44 * w.gaussians / min(w.views, GROUP) + 4 * words, 60 * w.gaussians),
    }
    # Bits in, and the parameters of what is seen, once for all views; out record, radii, Gaussian and what it is
    # sorted by, 32 + 8 + 4 + 4 bytes, and the box of its tiles, 8. About 180 operations: covariance 60, into the view
    # and through the Jacobian 60, inverse, radii and bounds 60.
    n_bytes = 4 * words + 44 * w.seen + 56 * w.records
    operations = 180 * w.records
    if w.coefficients or w.channels <= 4:
        # Coefficients or colours in, once for all views, a row of colours out. The basis takes about three operations
        # a term beyond the constant one; then a multiply-add for each coefficient.
        k = w.coefficients
        n_bytes += (12 * k if k else 4 * w.channels) * w.seen + 4 * stride * w.visible
        operations += (20 + 3 * (k - 1) + 3 * k) * w.visible if k else 0
    found["record"] = Floor("project", n_bytes, operations)
    if not w.coefficients and w.channels > 4:
        # Colours, two indices and the opacity in, a row of colours out.
        found["given_color"] = Floor("color", (4 * w.channels + 8 + 4 + 4 * stride) * w.visible)
    # A key of 32 bits in, of what is visible an item of 64 out, and three times in and out: four passes of eight bits.
    found["depth"] = Floor("bin", 4 * w.records + (8 + 3 * 16) * w.visible)
    # Item, box and record in, in the order of depth. Which tiles are reached takes about 30 operations for the ellipse
    # and 40 for its columns in one row of tiles. The pairs by region in between are a way of doing it.
    found["emit"] = Floor("bin", (8 + 8 + 32) * w.visible, 30 * w.visible + 40 * w.rows)
    # Each tile's records out, and where they begin.
    found["deal"] = Floor("bin", 4 * w.intersections + 8 * w.tiles)
    found |= {
        # List, record and colours of what is walked in, once a tile; pixels out. In every pixel of a cell that a
        # record reaches: 3 operations for the distance and what two pixels share of the exponent, 2 for the rest of
        # it, one ex2, 7 for alpha, its cut and cap and the transmittance, and one for each channel. To find out which
        # of the sixteen cells are reached takes about 60.
        "blend": Floor(
            "blend",
            (4 + 32 + 4 * stride) * w.walked + 4 * (w.channels + 1) * w.pixels,
            (12 + w.channels) * CELL**2 * w.cells + 60 * w.walked,
            CELL**2 * w.cells,
        ),
    }
    return found


def backward_floors(w: Work) -> dict[str, Floor]:
    """Each step of going back, to every parameter of the scene, in its order. The gradients of the images are given."""
    stride = w.channels if w.channels < 3 else 4 * math.ceil(w.channels / 4)
    row = 4 + 4 * math.ceil(w.channels / 4)  # floats of a record's gradient: conic, opacity, colour
    words, rows_out = w.gaussians / 32, w.gaussians / w.views  # whoever is not seen gets a gradient too: 0
    k, d = w.coefficients, w.channels
    found = {
        # What the forward reads, and of each pixel the image's gradient, the final transmittance and the last record's
        # place; out a row and a mean's gradient a record. In every pixel of a cell that a record reaches: 8 operations
        # to find alpha again; the weight's gradient, one for each channel; 8 to go back through the transmittance; 6
        # for the moments; one for each channel's gradient; and one for each of the 6 + D sums over pixels. An ex2 and a
        # reciprocal, which take the same unit.
        "blend_bwd": Floor(
            "blend",
            (4 + 32 + 4 * stride) * w.walked + 4 * (d + 2) * w.pixels + 4 * (row + 2) * w.records,
            (28 + 3 * d) * CELL**2 * w.cells + 60 * w.walked,
            2 * CELL**2 * w.cells,
        ),
    }
    if k:
        # The colour's part of each record's row in; coefficients and means of what is seen in, once for all views;
        # gradients of both out. Colours once more, then three operations a coefficient for its own gradient, three for
        # the basis', three a term for the direction's.
        found["sh_bwd"] = Floor(
            "color",
            16 * w.records + 4 * words + (12 * k + 12) * w.seen + (12 * k + 12) * rows_out,
            (40 + 6 * (k - 1) + 9 * k) * w.visible,
        )
    else:
        found["given_bwd"] = Floor("color", 4 * stride * w.records + 4 * words + 4 * d * rows_out, d * w.visible)
    # Conic, opacity and mean's gradient of each record in; parameters of what is seen in, once for all views; their
    # gradients out. Of the projection's 120 operations each again, and about two to go back.
    found["project_bwd"] = Floor("project", 24 * w.records + 4 * words + 44 * w.seen + 44 * rows_out, 360 * w.visible)
    return found


def total_us(w: Work) -> float:
    """Microseconds per view of all steps."""
    return sum(floor.us for floor in floors(w).values())


def launch_us(w: Work, launches: float) -> float:
    """Microseconds per view in which a call's kernels can be launched, which no GPU work can hide where it is less."""
    return 1e6 * LAUNCH_SECONDS * launches / w.views


def cub_sorts_us(w: Work) -> float:
    """Microseconds per view that CUB would take to sort the call's records by depth, 32 bits, and its pairs by tile."""
    bits = math.ceil(math.log2(w.views * w.tiles + 1))  # of a tile among those of all views
    by_depth = sort_us(w.records * w.views, 32)
    return (by_depth + sort_us(w.intersections * w.views, bits)) / w.views


# --- counting --------------------------------------------------------------------------------------------------------

_PAIRS_AT_ONCE = {"cuda": 1 << 26, "cpu": 1 << 22}  # (record, pixel) pairs, a few floats each


def count(arguments: dict[str, Any]) -> Work:
    """Counts a call of ``rasterization`` with these arguments, which rapfast has answered before: of one scene,
    pinhole, not antialiased or that too, on either device."""
    scene = [arguments[name][None].contiguous() for name in ("means", "quats", "scales")]
    opacities, viewmats, Ks = (arguments[name][None].contiguous() for name in ("opacities", "viewmats", "Ks"))
    width, height, sh_degree = arguments["width"], arguments["height"], arguments["sh_degree"]
    antialiased = arguments.get("rasterize_mode", "classic") == "antialiased"
    projected = ops.project(*scene, None, opacities, viewmats, Ks, width, height, antialiased=antialiased)
    tiles = ops.bin(projected, width, height)
    views, n = viewmats.shape[1], arguments["means"].shape[0]
    grid = torch.tensor([math.ceil(width / TILE), math.ceil(height / TILE)])

    low = ((projected.records[:, 1] - projected.radii[:, 1]) / TILE).floor().clamp(0, int(grid[1]))
    high = ((projected.records[:, 1] + projected.radii[:, 1]) / TILE).ceil().clamp(0, int(grid[1]))
    walked, cells, drawn = _walk(projected, tiles, width, height)
    with_depth = "D" in arguments.get("render_mode", "RGB").removeprefix("RGB")
    channels = 3 if sh_degree is not None else arguments["colors"].shape[-1]
    return Work(
        views=views,
        gaussians=n,
        records=_rows_in_use(arguments, scene, antialiased, len(projected.radii)) / views,
        visible=len(projected.radii) / views,
        seen=len(projected.gaussian_ids.unique()) / views,
        rows=float((high - low).double().sum()) / views,
        intersections=len(tiles.tile_records) / views,
        walked=walked / views,
        cells=cells / views,
        drawn=drawn / views,
        tiles=int(grid.prod()),
        pixels=width * height,
        channels=channels + with_depth,
        coefficients=0 if sh_degree is None else (sh_degree + 1) ** 2,
    )


def _rows_in_use(arguments: dict[str, Any], scene: list[torch.Tensor], antialiased: bool, visible: int) -> int:
    """Records of the call, with those that are dead: on the CPU there are none."""
    if scene[0].device.type != "cuda":
        return visible
    names = "colors", "opacities", "viewmats", "Ks"
    colors, opacities, viewmats, Ks = (arguments[name][None].contiguous() for name in names)
    rendered = ops.render(
        *scene, None, opacities, colors, viewmats, Ks, None, arguments["width"], arguments["height"],
        camera_model="pinhole", antialiased=antialiased, eps2d=0.3, near_plane=0.01, far_plane=1e10, radius_clip=0.0,
        sh_degree=arguments["sh_degree"], render_mode="RGB", alpha_cap=ALPHA_CAP,
    )  # fmt: skip
    return rendered.n_records


def _walk(projected: ops.Records, tiles: Any, width: int, height: int) -> tuple[int, int, int]:
    """Blends once more in plain torch, a few tiles at a time, and counts: (record, tile) pairs walked, (record,
    cell) pairs reached, (record, pixel) pairs drawn."""
    device = projected.records.device
    tiles_x, tiles_y = math.ceil(width / TILE), math.ceil(height / TILE)
    begins, lengths = tiles.tile_offsets[:-1], tiles.tile_offsets.diff()
    # cell by cell, so that its pixels lie side by side
    pixel = torch.arange(TILE**2, device=device)
    cell, inside, per_side = pixel // CELL**2, pixel % CELL**2, TILE // CELL
    columns = cell % per_side * CELL + inside % CELL
    rows = cell // per_side * CELL + inside // CELL

    order = lengths.argsort(descending=True)
    order = order[: int((lengths > 0).sum())]
    longest = lengths[order].tolist()
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    first = 0
    while first < len(order):
        length = longest[first]
        some = order[first : first + max(1, _PAIRS_AT_ONCE[device.type] // (TILE**2 * length))]
        first += len(some)
        tile = some % (tiles_x * tiles_y)
        place = torch.arange(length, device=device)
        listed = place < lengths[some][:, None]  # [T, L]
        at = (begins[some][:, None] + place).clamp(max=len(tiles.tile_records) - 1)
        image = some // (tiles_x * tiles_y)
        record = projected.records[projected.image_offsets[image][:, None] + tiles.tile_records[at]]
        x, y, a, b, c, opacity = (record[..., i, None] for i in range(6))  # [T, L, 1]
        column = (tile % tiles_x * TILE)[:, None] + columns  # [T, 256]
        row = (tile // tiles_x * TILE)[:, None] + rows
        dx, dy = x - (column[:, None] + 0.5), y - (row[:, None] + 0.5)
        power = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (opacity * torch.exp(-power)).clamp(max=ALPHA_CAP)
        exists = ((column < width) & (row < height))[:, None]
        hit = (alpha >= ALPHA_CUT) & (power >= 0) & listed[..., None] & exists
        left = torch.cumprod(torch.where(hit, 1 - alpha, 1.0), dim=1)
        # a pixel goes on until the first record that would leave it too dark, which is not drawn
        alive = torch.cat([exists, left[:, :-1] > STOP], dim=1) & exists
        hit &= alive
        counts[0] += (alive.any(-1) & listed).sum()
        counts[1] += hit.unflatten(-1, (-1, CELL**2)).any(-1).sum()
        counts[2] += (hit & (left > STOP)).sum()
    walked, cells, drawn = counts.tolist()
    return walked, cells, drawn


# --- which kernel is which step --------------------------------------------------------------------------------------


def steps(kernels: list[str]) -> list[str]:
    """Names the steps of one call from the names of its kernels, in the order they ran: rapfast's as in its source,
    without "_kernel"; sorts and scans of CUB, and what torch runs, by what they follow."""
    names, before = [], None
    for kernel in kernels:
        kind = next((kind for part, kind in _FOREIGN.items() if part in kernel), None)
        own = re.search(r"rapfast::.*?(\w+?)_kernel\b", kernel)
        if kind is None and own:
            before = own[1]
            names.append(before)
        else:
            kind = kind or "other"
            names.append(f"{kind} after {before}" if before else kind)
    return names


# CUB's first: rapfast's types stand in their names.
_FOREIGN = {"DeviceRadixSort": "sort", "DeviceScan": "scan", "cub::": "cub", "Memcpy": "copy", "Memset": "clear"}
