"""Stage 3, bin: what each tile lists, and in which order."""

from __future__ import annotations

import importlib
import math
import random
from typing import Any

import pytest
import torch
from scenes import (
    ALPHA_CUT,
    HEIGHT,
    WIDTH,
    Scene,
    assert_same,
    flat,
    make_scene,
    reference_records,
    skip_unsupported,
)
from torch import Tensor

from rapfast import ops, reference
from rapfast.ops.bin import tile_grid
from rapfast.ops.project import Records

bin_module = importlib.import_module("rapfast.ops.bin")  # the package's attribute is the function
SIZES = [(1, 1), (1, 17), (16, 16), (17, 33), (WIDTH, HEIGHT), (130, 90)]


def project(s: Scene, size: tuple[int, int], **options: Any) -> Records:
    s = flat(s)
    return ops.project(s.means, s.quats, s.scales, None, s.opacities, s.viewmats, s.Ks, *size, **options)


def boxes(records: Records, size: tuple[int, int]) -> list[list[int]]:
    """Per tile the records whose box reaches it, by the reference; rows of the packed tensors."""
    r = reference_records(records, 1)
    n_images = len(records.image_offsets) - 1
    _, _, rows, offsets = reference.bin_tiles(r.means2d, r.radii, r.depths, r.batch_ids, n_images, *size)
    return split(rows, torch.cat([offsets.flatten().long(), torch.tensor([len(rows)], device=rows.device)]))


def split(rows: Tensor, offsets: Tensor) -> list[list[int]]:
    rows, offsets = rows.tolist(), offsets.tolist()
    return [rows[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def bin_rows(records: Records, size: tuple[int, int], **options: Any) -> list[list[int]]:
    """What the operator lists per tile, as rows of the packed tensors."""
    tiles = ops.bin(records, *size, **options)
    grid = tile_grid(*size)
    n_tiles = grid[0] * grid[1]
    lists = split(tiles.tile_records, tiles.tile_offsets)
    firsts = records.image_offsets.tolist()
    return [[firsts[t // n_tiles] + row for row in rows] for t, rows in enumerate(lists)]


def drawn_in_tile(records: Records, rows: list[int], tile: int, size: tuple[int, int]) -> Tensor:
    """[len(rows)] whether each reaches alpha >= 1/255 at a pixel of the tile, in float64."""
    grid = tile_grid(*size)
    tile %= grid[0] * grid[1]
    r = records.records[rows].double()
    device = r.device
    x = 16.0 * (tile % grid[0]) + torch.arange(16, device=device) + 0.5
    y = 16.0 * (tile // grid[0]) + torch.arange(16, device=device) + 0.5
    dx = x[x < size[0]] - r[:, 0, None, None]
    dy = y[y < size[1], None] - r[:, 1, None, None]
    a, b, c, opacity = (r[:, k, None, None] for k in (2, 3, 4, 5))
    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    return ((opacity * torch.exp(-sigma) >= ALPHA_CUT) & (sigma >= 0)).flatten(1).any(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_lists_are_the_boxes_less_what_draws_nothing(size, dtype, device):
    """Every list is the reference's list, in its order, without some records that hold no pixel with
    alpha >= 1/255; no record that draws is ever missing."""
    skip_unsupported(device, dtype)
    scene = make_scene(300, 2, batch=(2,), width=size[0], height=size[1], dtype=dtype, device=device)
    records = project(scene, size)
    got, box = bin_rows(records, size), boxes(records, size)
    assert len(got) == len(box) == 4 * tile_grid(*size)[0] * tile_grid(*size)[1]
    n_box = n_dropped = 0
    for tile, (rows, all_rows) in enumerate(zip(got, box, strict=True)):
        kept = set(rows)
        assert rows == [row for row in all_rows if row in kept]
        dropped = [row for row in all_rows if row not in kept]
        if dropped:
            assert not drawn_in_tile(records, dropped, tile, size).any()
        n_box += len(all_rows)
        n_dropped += len(dropped)
    if size == (130, 90):  # the finer test must be worth its name
        assert n_dropped > 0.1 * n_box


def test_needles_and_faint_gaussians_lose_no_pixel(device):
    """Long thin Gaussians at every angle, just above the cut: the hardest case for the tile test."""
    size = (128, 96)
    scene = make_scene(500, 1, width=size[0], height=size[1], dtype=torch.float32, seed=3)
    scene.scales[:, 0] = 1.0
    scene.scales[:, 1:] = 1e-3
    scene.opacities[::2] = 1.02 * ALPHA_CUT
    records = project(scene.to(device), size)
    for tile, (rows, all_rows) in enumerate(zip(bin_rows(records, size), boxes(records, size), strict=True)):
        kept = set(rows)
        dropped = [row for row in all_rows if row not in kept]
        assert not dropped or not drawn_in_tile(records, dropped, tile, size).any()


def test_depth_order_and_ties(device):
    """Depth ascending; equal depths by Gaussian."""
    scene = make_scene(300, 1, dtype=torch.float32)
    scene.viewmats[0] = torch.eye(4)
    scene.viewmats[0, 2, 3] = 4.0
    scene.means[:, 2] = scene.means[:, 2].round()  # five depths
    records = project(scene.to(device), (WIDTH, HEIGHT))
    depths = records.records[:, 6].tolist()
    assert 2 <= len(set(depths)) <= 5
    lists = bin_rows(records, (WIDTH, HEIGHT))
    assert max(map(len, lists)) > 20
    for rows in lists:
        assert rows == sorted(rows, key=lambda row: (depths[row], row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_negative_depths_sort_as_numbers(dtype, device):
    skip_unsupported(device, dtype)
    scene = make_scene(300, 1, dtype=dtype)
    scene.viewmats[0, 2, 3] = 0.0
    scene.means[:4, 2] = torch.tensor([0.0, -0.0, 1e-42, -1e-42])
    scene.means[:4, :2] = 0.0
    scene.viewmats[0] = torch.eye(4)
    scene.opacities[:4] = 0.5
    records = project(scene.to(device), (WIDTH, HEIGHT), camera_model="ortho", near_plane=-10.0)
    depths = records.records[:, 6].tolist()
    assert min(depths) < 0 < max(depths)
    assert {0, 1, 2, 3} <= set(records.gaussian_ids.tolist())
    for rows in bin_rows(records, (WIDTH, HEIGHT)):
        assert rows == sorted(rows, key=lambda row: (depths[row], row))


def test_removed_records_reach_no_tile(device):
    """Opacity 0 is how the color stage takes a record out."""
    records = project(make_scene(50, 1, dtype=torch.float32, device=device), (WIDTH, HEIGHT))
    before = bin_rows(records, (WIDTH, HEIGHT))
    records.records[::2, 5] = 0.0
    after = bin_rows(records, (WIDTH, HEIGHT))
    assert after == [[row for row in rows if row % 2] for rows in before]


@pytest.mark.parametrize("capacity", [0, 1, 100, 1_000_000])
def test_capacity_changes_nothing(capacity, device):
    records = project(make_scene(300, 2, dtype=torch.float32, device=device), (WIDTH, HEIGHT))
    for got, want in zip(
        ops.bin(records, WIDTH, HEIGHT, capacity=capacity), ops.bin(records, WIDTH, HEIGHT), strict=True
    ):
        assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_band_lists_what_the_whole_lists_in_its_rows(dtype, device):
    skip_unsupported(device, dtype)
    size = (130, 90)
    columns, rows = tile_grid(*size)
    records = project(make_scene(300, 2, width=size[0], height=size[1], dtype=dtype, device=device), size)
    whole = bin_rows(records, size)
    for first, end in [(0, rows), (0, 1), (1, 4), (rows - 1, rows), (3, 3)]:
        tiles = ops.bin(records, *size, tile_rows=(first, end))
        band = split(tiles.tile_records, tiles.tile_offsets)
        want = [
            [row - records.image_offsets[image].item() for row in whole[image * rows * columns + tile]]
            for image in range(2)
            for tile in range(first * columns, end * columns)
        ]
        assert band == want
        assert any(want) or first == end


@pytest.mark.parametrize("tile_rows", [(-1, 2), (2, 1), (0, 7)])
def test_a_band_outside_the_image_is_refused(tile_rows, device):
    records = project(make_scene(10, 1, dtype=torch.float32, device=device), (130, 90))
    with pytest.raises(ValueError, match="tile_rows must lie within 0 and 6"):
        ops.bin(records, 130, 90, tile_rows=tile_rows)


def blobs(
    centers: Tensor, sigma: float | Tensor, depths: Tensor, size: tuple[int, int], *, images: list[int] | None = None,
    opacity: float = 0.9,
) -> Records:  # fmt: skip
    """Round Gaussians at these pixels, as records; ``images`` are the numbers of records of each image."""
    n = len(centers)
    sigma = torch.as_tensor(sigma, dtype=torch.float32).expand(n)
    records = torch.zeros(n, 8)
    records[:, :2] = centers
    records[:, 2] = records[:, 4] = 1 / sigma**2
    records[:, 5], records[:, 6], records[:, 7] = opacity, depths, 1.0
    radii = (3.33 * sigma).ceil().int()[:, None].expand(n, 2).contiguous()
    offsets = torch.tensor([0, *(images or [n])]).cumsum(0)
    return Records(records, radii, torch.arange(n, dtype=torch.int32), offsets, torch.zeros(len(offsets) - 1).long())


def to(records: Records, device: torch.device) -> Records:
    return Records(*(x.to(device) for x in records))


def random_blobs(n: int, size: tuple[int, int], seed: int, **options: Any) -> Records:
    """Of all sizes, mostly small ones, some depths equal."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(n, 2, generator=generator) * torch.tensor(size) * 1.2 - 0.1 * torch.tensor(size)
    sigma = 0.6 * (0.25 * max(size)) ** torch.rand(n, generator=generator) ** 6
    depths = torch.randint(1, max(2, n // 2), (n,), generator=generator) / 7.0
    return blobs(centers, sigma, depths, size, **options)


def one_pile(n: int, size: tuple[int, int]) -> Records:
    """All in one tile; more equal depths than a warp or a block of the sort holds."""
    depths = torch.randint(1, 6, (n,), generator=torch.Generator().manual_seed(n)).float()
    return blobs(torch.full((n, 2), 24.0), 0.8, depths, size)


def assert_lists_agree(records: Records, size: tuple[int, int]) -> None:
    """The GPU's lists are the CPU's, but for records that draw nothing in the tile."""
    want, got = bin_rows(records, size), bin_rows(to(records, torch.device("cuda")), size)
    assert len(got) == len(want)
    for tile, (rows, expected) in enumerate(zip(got, want, strict=True)):
        if rows == expected:
            continue
        doubtful = sorted(set(rows) ^ set(expected))
        assert len(doubtful) <= 2
        assert not drawn_in_tile(records, doubtful, tile, size).any()
        assert [row for row in rows if row not in doubtful] == [row for row in expected if row not in doubtful]


# Regions of 8x4 tiles: two, and few; more, where records come by depth first, pairs with 256, 2048 and 4096 digits.
GRIDS = [(100, 90), (500, 400), (1000, 900), (1500, 1000), (2100, 2080), (3000, 2900), (4112, 4100)]


@pytest.mark.cuda
@pytest.mark.parametrize("size", GRIDS, ids=lambda s: f"{s[0]}x{s[1]}")
def test_lists_are_the_cpus(size):
    """Several images of a few blocks each, empty ones among them, for each way the tiles are sorted."""
    images = [5000, 0, 1, 4096, 0, 12000]
    assert_lists_agree(random_blobs(sum(images), size, seed=size[0], images=images), size)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 4095, 4096, 4097, 8192, 70_001])
@pytest.mark.parametrize("size", [(40, 30), (1000, 900)], ids=["small", "large"])
def test_a_pile_in_one_tile_lists_all_by_depth(n, size, device):
    """Counts around a warp, a block and many blocks, every pair in the same tile."""
    records = to(one_pile(n, size), device)
    depths = records.records[:, 6].cpu()
    columns, rows = tile_grid(size[0], size[1])
    tiles = ops.bin(records, *size)
    assert_same(tiles.tile_records, torch.sort(depths, stable=True).indices.int().to(device))
    want = torch.zeros(columns * rows + 1, dtype=torch.long)
    want[columns + 2 :] = n
    assert_same(tiles.tile_offsets, want.to(device))


@pytest.mark.parametrize("n", [2, 40, 5000])
def test_depths_that_are_no_numbers_come_last(n, device):
    """A record has none by projection; the operator's caller may."""
    depths = torch.rand(n, generator=torch.Generator().manual_seed(1)) + 1
    depths[1::3] = math.nan
    depths[0] = math.inf
    records = to(blobs(torch.full((n, 2), 24.0), 0.8, depths, (40, 30)), device)
    order = torch.sort(torch.where(depths.isnan(), math.inf, depths), stable=True).indices
    order = torch.cat((order[~depths[order].isnan()], order[depths[order].isnan()]))
    assert_same(ops.bin(records, 40, 30).tile_records, order.int().to(device))


def spread_depths(n: int, kind: str) -> Tensor:
    """Of real numbers; or nine tenths of them as good as the same, of few values or of many, between others."""
    generator = torch.Generator().manual_seed(n)
    depths = 0.1 + 100 * torch.rand(n, generator=generator) ** 4
    if kind != "spread":
        values = 40 if kind == "few close" else 1 << 20
        close = torch.rand(n, generator=generator) < 0.9
        depths[close] = 7.0 + torch.randint(0, values, (n,), generator=generator)[close] * 2.0**-21
    return depths


@pytest.mark.parametrize("kind", ["spread", "few close", "many close"])
@pytest.mark.parametrize("n", [100, 1000, 6000, 20_000, 100_000])
@pytest.mark.parametrize("size", [(40, 30), (1000, 900)], ids=["small", "large"])
def test_lists_of_any_length_and_depths_are_in_order(n, kind, size, device):
    """Around what is sorted in shared memory at once, and what lies in one bucket of nearly the same depth. In the
    larger image the list is as long in few slices of depth, and so much longer than a list is expected to be."""
    records = to(blobs(torch.full((n, 2), 24.0), 0.8, depths := spread_depths(n, kind), size), device)
    assert_same(ops.bin(records, *size).tile_records, torch.sort(depths, stable=True).indices.int().to(device))


@pytest.mark.cuda
@pytest.mark.parametrize("size", [(1000, 900), (100, 90)], ids=["by region", "by depth"])
def test_lists_of_many_records_are_the_cpus(size):
    """So many that chunks of them are larger, and more slices of their regions are made than of few; and so many for a
    few regions that they come by depth first."""
    generator = torch.Generator().manual_seed(8)
    images = [150_000, 1, 0, 120_000]
    n = sum(images)
    centers = torch.rand(n, 2, generator=generator) * torch.tensor(size)
    depths = torch.randint(1, n // 3, (n,), generator=generator) / 7.0
    assert_lists_agree(blobs(centers, 0.8, depths, size, images=images), size)


def test_every_record_in_another_image(device):
    """More images than a warp has lanes, most with one record, some with none."""
    images = [i % 3 > 0 for i in range(150)]
    n = sum(images)
    records = blobs(torch.full((n, 2), 8.0), 0.8, torch.ones(n), (32, 16), images=[int(i) for i in images])
    tiles = ops.bin(to(records, device), 32, 16)
    assert tiles.tile_records.tolist() == [0] * n
    assert torch.diff(tiles.tile_offsets).view(-1, 2).tolist() == [[int(i), 0] for i in images]


@pytest.mark.parametrize("size", GRIDS, ids=lambda s: f"{s[0]}x{s[1]}")
def test_records_over_all_tiles(size, device):
    """Each is in every list, in front of or behind the small ones by depth."""
    n = 40 if size[0] < 2000 else 5
    generator = torch.Generator().manual_seed(1)
    depths = torch.rand(2 * n, generator=generator)
    sigma = torch.tensor([1e4, 0.8]).repeat(n)
    records = to(blobs(torch.full((2 * n, 2), 8.0), sigma, depths, size), device)
    tiles = ops.bin(records, *size)
    columns, rows = tile_grid(*size)
    order = torch.sort(depths).indices.int().to(device)
    assert_same(tiles.tile_records[: 2 * n], order)  # all of them begin in the first tile
    others = tiles.tile_records[2 * n :].view(columns * rows - 1, n)
    assert_same(others, order[order % 2 == 0].expand_as(others))


@pytest.mark.parametrize("angle", [0.0, 0.02, 0.6, 1.55])
def test_counts_and_lists_agree_on_ellipses_that_graze_tiles(angle, device):
    """The rows of tiles of a region are asked for side by side, and in a band of one row another of the four: where
    the edge of an ellipse lies on the border of a tile to the last bit, a formula that rounded differently in one of
    these places would show."""
    size = (480, 400)
    generator = torch.Generator().manual_seed(5)
    n = 3000
    c, s = math.cos(angle), math.sin(angle)
    long = 30 + 60 * torch.rand(n, generator=generator)
    narrow = 20 + 40 * torch.rand(n, generator=generator)
    xx, yy, xy = c * c * long**2 + s * s * narrow**2, s * s * long**2 + c * c * narrow**2, c * s * (long**2 - narrow**2)
    det = xx * yy - xy * xy
    opacity = 0.004 + 0.99 * torch.rand(n, generator=generator)
    extent = (2 * torch.log(opacity * 255)).sqrt().clamp(max=3.33)
    # The right or the lower edge at a pixel's centre, the last of a tile, plus or minus the slack, as nearly as
    # float32 has it.
    border = (
        16.0 * torch.randint(0, 30, (n, 2), generator=generator)
        + torch.tensor([-0.5, 0.5])[torch.randint(0, 2, (n, 2), generator=generator)]
    )
    reach = (2 * torch.log(opacity * 255) + 0.01).sqrt()
    slack = torch.tensor([-0.01, 0.01])[torch.randint(0, 2, (n, 2), generator=generator)]
    centers = border + slack - torch.stack((reach * xx.sqrt(), reach * yy.sqrt()), 1)
    records = blobs(centers, 1.0, torch.rand(n, generator=generator) + 1, size)
    records.records[:, 2], records.records[:, 3], records.records[:, 4] = yy / det, -xy / det, xx / det
    records.records[:, 5] = opacity
    records.radii[:, 0], records.radii[:, 1] = (extent * xx.sqrt()).ceil().int(), (extent * yy.sqrt()).ceil().int()
    records = to(records, device)
    columns, rows = tile_grid(*size)
    whole = ops.bin(records, *size)
    assert len(whole.tile_records) > 20 * n
    lists = split(whole.tile_records, whole.tile_offsets)
    for row in range(rows):
        band = ops.bin(records, *size, tile_rows=(row, row + 1))
        assert split(band.tile_records, band.tile_offsets) == lists[row * columns : (row + 1) * columns]


@pytest.mark.cuda
@pytest.mark.parametrize("size", GRIDS, ids=lambda s: f"{s[0]}x{s[1]}")
def test_memory_of_the_caller_matters_nothing(size, monkeypatch):
    """Whatever the scratch memory holds, with room to spare, with just enough and with too little: the same lists,
    or none and the number of pairs; nothing is written behind the room."""
    device = torch.device("cuda")
    records = to(random_blobs(9000, size, seed=3, images=[4000, 5000]), device)
    want = ops.bin(records, *size)
    n = len(want.tile_records)
    columns, rows = tile_grid(*size)
    native_arguments, scratch = bin_module._arguments, bin_module.scratch
    roomy = torch.empty(0)

    def with_guard(out: bin_module.Tiles, *rest: Any) -> dict[str, Any]:
        nonlocal roomy
        roomy = torch.full((len(out.tile_records) + 1000,), -7, dtype=torch.int32, device=device)
        return native_arguments(out._replace(tile_records=roomy), *rest)

    monkeypatch.setattr(bin_module, "_arguments", with_guard)
    for fill in (0, 0x5A, 0xFF):
        monkeypatch.setattr(bin_module, "scratch", lambda like, size, fill=fill: scratch(like, size).fill_(fill))
        for capacity in (n + 100_000, 3 << 20, n, n - 1, n // 2, 0, n):  # chunks of two sizes
            tensors = records.records, records.radii, records.image_offsets
            offsets, _ = torch.ops.rapfast.bin(*tensors, columns, rows, 0, capacity)
            written = roomy[:capacity]
            assert bool((roomy[capacity:] == -7).all())
            if capacity >= n:
                assert int(offsets[-1]) == n
                assert_same(offsets, want.tile_offsets)
                assert_same(written[:n], want.tile_records)
                assert bool((written[n:] == -7).all())
            else:
                told = int(offsets[-1])  # what to come again with, which may still be too little, but not twice
                assert capacity < told <= n
                assert not offsets[:-1].any()
                assert bool((written == -7).all())
                assert int(torch.ops.rapfast.bin(*tensors, columns, rows, 0, told)[0][-1]) == n


@pytest.mark.skipif(not hasattr(bin_module.native, "bin_scratch_size"), reason="built without CUDA")
def test_scratch_for_many_images_serves_fewer():
    """Whichever way each is ordered in: `Renderer` makes it once, for the most views. Needs no GPU."""
    pick = random.Random(0)
    for _ in range(3000):
        tiles_x, tiles_y, images = pick.randrange(1, 260), pick.randrange(1, 140), pick.randrange(1, 41)
        room = {"record_capacity": int(10 ** pick.uniform(0, 6.7)), "capacity": int(10 ** pick.uniform(0, 7.5))}

        def size(n: int, tiles_x: int = tiles_x, tiles_y: int = tiles_y, room: dict[str, int] = room) -> int:
            return bin_module.native.bin_scratch_size(n_images=n, tiles_x=tiles_x, tiles_y=tiles_y, **room)

        assert size(pick.randrange(1, images + 1)) <= size(images), (tiles_x, tiles_y, images, room)


def test_nothing_to_list(device):
    scene = make_scene(10, 2, dtype=torch.float32, device=device)
    records = project(scene, (WIDTH, HEIGHT), near_plane=1e9)
    tiles = ops.bin(records, WIDTH, HEIGHT)
    assert tiles.tile_offsets.tolist() == [0] * (2 * 5 * 3 + 1)
    assert tiles.tile_records.shape == (0,)


@pytest.mark.parametrize(
    ("size", "grid"), [((1, 1), (1, 1)), ((16, 16), (1, 1)), ((17, 32), (2, 2)), ((75, 41), (5, 3))]
)
def test_tile_grid(size, grid):
    assert tile_grid(*size) == grid
