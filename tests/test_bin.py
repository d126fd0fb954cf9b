"""Stage 3, bin: what each tile lists, and in which order."""

from __future__ import annotations

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
