"""The benchmark suite: its scenes' statistics, the records of a reduced run, and the report made from records."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rapfast

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "scenes.py").is_file():
    pytest.skip("bench/ is part of the repository, not of the source distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import cases, floors, measure, report, report_runs, scenes  # noqa: E402

# --- scenes ----------------------------------------------------------------------------------------------------------

# Means over the batch of 8 for one Gaussian, which do not depend on N: visible share and intersections per Gaussian of
# docs/benchmarks.md's scenes, which have 0.0804 M tiles in 200 k Gaussians and 2.64 M in 2.79 M.
ROOM_VISIBLE, ROOM_TILES = 0.0598, 0.0804e6 / 200e3
OUTDOOR_VISIBLE, OUTDOOR_TILES = 0.219, 2.64e6 / 2.795e6


@pytest.mark.parametrize(
    ("make", "cameras", "visible", "tiles"),
    [
        (scenes.room, scenes.room_cameras, ROOM_VISIBLE, ROOM_TILES),
        (scenes.outdoor, scenes.outdoor_cameras, OUTDOOR_VISIBLE, OUTDOOR_TILES),
    ],
)
def test_a_view_sees_what_the_measured_scenes_show(make, cameras, visible, tiles) -> None:
    n = 40_000
    found = scenes.statistics(make(n), cameras(8))
    assert float(found.visible_share.mean()) == pytest.approx(visible, rel=0.1)
    assert float(found.intersections.double().mean()) / n == pytest.approx(tiles, rel=0.1)


def test_statistics_are_those_of_the_call() -> None:
    scene, cameras = scenes.room(3000), scenes.room_cameras(3, 100, 70)
    found = scenes.statistics(scene, cameras)
    _, _, meta = rapfast.rasterization(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.sh, cameras.viewmats, cameras.Ks, 100, 70,
        sh_degree=3, packed=False,
    )  # fmt: skip
    assert found.intersections.tolist() == meta["tiles_per_gauss"].sum(1).tolist()
    visible = (meta["radii"] > 0).all(-1).double().mean(1)
    torch.testing.assert_close(found.visible_share, visible)


@pytest.mark.parametrize("make", [scenes.room, scenes.outdoor])
def test_scenes_are_seeded_and_valid(make) -> None:
    first, again, other = make(5000), make(5000), make(5000, seed=1)
    assert len(first) == 5000 and first.sh_degree == 3 and first.dtype == torch.float32
    assert first.valid().all()
    for name in ("means", "quats", "scales", "opacities", "sh"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("cameras", [scenes.room_cameras, scenes.outdoor_cameras])
def test_the_views_of_a_batch_are_the_first_of_a_larger_one(cameras) -> None:
    many, few = cameras(8, 64, 48), cameras(2, 64, 48)
    assert torch.equal(many.viewmats[:2], few.viewmats) and torch.equal(many.Ks[:2], few.Ks)


def test_garden_repeats_the_points_near_the_origin(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    points = np.array([[0.0, 1.0, 2.0], [-2.0, 0.5, 0.0], [2.1, 0.0, 0.0]])  # the last lies outside
    viewmats = np.tile(np.eye(4), (3, 1, 1)) + 0.1 * rng.random((3, 4, 4))
    Ks = np.tile(np.array([[500.0, 0, 320], [0, 500, 200], [0, 0, 1]]), (3, 1, 1))
    path = tmp_path / "garden.npz"
    colors = np.array([[0, 127.5, 255], [51, 51, 51], [9, 9, 9]])
    np.savez(path, means3d=points, colors=colors, viewmats=viewmats, Ks=Ks, width=640, height=400)

    scene = scenes.garden(path)
    assert len(scene) == 2 * 25 and scene.valid().all()
    # tile by tile in x, then y; the middle one is the original
    assert torch.equal(scene.means[24:26], torch.tensor(points[:2], dtype=torch.float32))
    assert scene.means[:2, 0].tolist() == [-8.0, -10.0] and scene.means[:2, 1].tolist() == [-7.0, -7.5]
    assert scene.means[2:4, 1].tolist() == [-3.0, -3.5] and scene.means[-1].tolist() == [6.0, 8.5, 0.0]
    torch.testing.assert_close(scene.sh[0::2, 0], torch.tensor([-0.5, 0.0, 0.5]).expand(25, 3) / 0.28209)
    assert float(scene.scales.min()) >= 1e-4 and float(scene.scales.max()) <= 0.02

    cameras = scenes.garden_cameras(path, 4, 320, 100)
    torch.testing.assert_close(cameras.Ks[0], torch.tensor([[250.0, 0, 160], [0, 125, 50], [0, 0, 1]]))
    torch.testing.assert_close(cameras.viewmats[3, 0, 3], torch.tensor(viewmats[0, 0, 3] + 0.09, dtype=torch.float32))
    assert torch.equal(cameras.viewmats[3, 1:], cameras.viewmats[0, 1:])

    monkeypatch.setenv(cases.GARDEN_VARIABLE, str(path))
    assert cases.garden_path() == str(path)
    monkeypatch.setenv(cases.GARDEN_VARIABLE, str(tmp_path / "absent.npz"))
    with pytest.raises(FileNotFoundError, match="RAPFAST_GARDEN must name gsplat's test_garden.npz, got"):
        cases.garden_path()


@pytest.mark.parametrize("make", [scenes.pile, scenes.curtain])
def test_degenerate_scenes_are_what_they_are_called(make) -> None:
    cameras = scenes.pile_cameras(4, 214, 120)
    n = 3000 if make is scenes.pile else 20
    scene = make(n)
    _, _, meta = rapfast.rasterization(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.sh, cameras.viewmats, cameras.Ks, 214, 120,
        sh_degree=3, packed=False,
    )  # fmt: skip
    tiles = meta["tiles_per_gauss"]
    if make is scenes.pile:
        assert (meta["radii"] > 0).all() and float((tiles == 1).double().mean()) > 0.97
        lists = meta["isect_offsets"].flatten(1).diff(dim=1)
        assert int(lists.max(dim=1).values.min()) > 0.97 * n  # one tile has them all, in every view
    else:
        assert (tiles == 14 * 8).all()


# --- floors ----------------------------------------------------------------------------------------------------------


def _walked_by_hand(arguments: dict[str, Any]) -> tuple[int, int, int]:
    """Tiles walked, cells reached and pixels drawn, one record after the other in every tile."""
    from rapfast import ops

    scene = [arguments[name][None] for name in ("means", "quats", "scales")]
    size = arguments["width"], arguments["height"]
    viewmats, Ks = arguments["viewmats"][None], arguments["Ks"][None]
    projected = ops.project(*scene, None, arguments["opacities"][None], viewmats, Ks, *size)
    tiles = ops.bin(projected, *size)
    tiles_x, tiles_y = -(-size[0] // 16), -(-size[1] // 16)
    records, offsets = projected.records.numpy(), tiles.tile_offsets.tolist()
    rows, columns = np.mgrid[0:16, 0:16]
    cell = rows // 4 * 4 + columns // 4
    walked = cells = drawn = 0
    for tile in range(len(offsets) - 1):
        image, place = divmod(tile, tiles_x * tiles_y)
        x, y = columns + place % tiles_x * 16, rows + place // tiles_x * 16
        alive = (x < size[0]) & (y < size[1])
        left = np.ones((16, 16))
        for record in tiles.tile_records[offsets[tile] : offsets[tile + 1]].tolist():
            if not alive.any():
                break
            walked += 1
            mx, my, a, b, c, opacity = records[int(projected.image_offsets[image]) + record][:6].astype(float)
            dx, dy = mx - x - 0.5, my - y - 0.5
            alpha = np.minimum(0.999, opacity * np.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy))
            hit = alive & (alpha >= 1 / 255)
            cells += len(np.unique(cell[hit]))
            stops = hit & (left * (1 - alpha) <= 1e-4)
            alive &= ~stops
            left[hit & ~stops] *= 1 - alpha[hit & ~stops]
            drawn += int((hit & ~stops).sum())
    return walked, cells, drawn


@pytest.mark.parametrize("scene", ["room", "outdoor", "curtain"])
def test_work_is_counted_as_pixels_walk_it(scene: str) -> None:
    n = 60 if scene == "curtain" else 20_000
    case = cases.Case("counted", scene, n, 72, 44, (2,))
    arguments = cases.workload(case, "cpu").arguments(2)
    if scene == "curtain":
        arguments["opacities"] = torch.linspace(0.05, 0.6, n)  # so that pixels stop
    found = floors.count(arguments)
    walked, cells, drawn = _walked_by_hand(arguments)
    assert (found.walked * 2, found.drawn * 2) == pytest.approx((walked, drawn), rel=1e-3)
    assert found.cells * 2 == pytest.approx(cells, rel=1e-3)
    assert found.walked < found.intersections or scene != "curtain"
    assert found.drawn <= 16 * found.cells and found.cells <= 16 * found.walked
    assert found.visible / 2 <= found.seen <= found.visible
    assert (found.views, found.gaussians, found.tiles, found.pixels, found.coefficients) == (2, n, 15, 72 * 44, 16)


def work(**more: Any) -> floors.Work:
    counts = {
        "views": 8, "gaussians": 500_000, "records": 30e3, "visible": 29e3, "seen": 9e3, "rows": 75e3,
        "intersections": 150e3, "walked": 140e3, "cells": 900e3, "drawn": 10e6, "tiles": 1620,
        "pixels": 854 * 480, "channels": 3, "coefficients": 16,
    }  # fmt: skip
    return floors.Work(**{**counts, **more})


def test_a_floor_is_the_longest_of_its_times() -> None:
    found = floors.floors(work())
    # by hand: 44 bytes shared by 8 views and a bit, 60 operations
    assert found["cull"].limits()["bytes"] == pytest.approx(1e6 * (44 / 8 + 1 / 8) * 500_000 / 4.25e12)
    assert found["cull"].us == found["cull"].limits()["operations"] == pytest.approx(1e6 * 60 * 500_000 / 31.85e12)
    assert found["blend"].ex2 == 16 * 900e3
    assert floors.total_us(work()) == pytest.approx(sum(floor.us for floor in found.values()))
    # by hand: bits, parameters and 16 x 3 coefficients of what is seen once, records, rows of four floats
    assert found["record"].bytes == pytest.approx(500_000 / 8 + (44 + 192) * 9e3 + 56 * 30e3 + 16 * 29e3)
    # many channels are given to a kernel of their own
    given = floors.floors(work(coefficients=0, channels=32))
    assert given["given_color"].bytes == (128 + 12 + 128) * 29e3 and "given_color" not in found
    assert given["record"].bytes == pytest.approx(500_000 / 8 + 44 * 9e3 + 56 * 30e3)
    # by hand: records in the order of depth in, tiles' lists and offsets out
    assert found["emit"].bytes == 48 * 29e3 and found["emit"].operations == 30 * 29e3 + 40 * work().rows
    assert found["deal"].bytes == 4 * 150e3 + 8 * work().tiles


def test_cub_sorts_lie_between_what_was_measured() -> None:
    assert floors.sort_us(1e6, 32) == 83.0 and floors.sort_us(1e6, 16) == 47.0
    assert floors.sort_us(1e6, 17) == floors.sort_us(1e6, 24) == 65.0  # three passes
    assert floors.sort_us(1000, 32) == 70.0
    assert 83.0 < floors.sort_us(1.75e6, 32) < 144.0
    assert floors.sort_us(40e6, 32) == pytest.approx(2 * 643.0)


def test_kernels_are_named_as_in_the_source_or_by_what_they_follow() -> None:
    kernels = [
        "rapfast::(anonymous namespace)::cull_kernel(rapfast::ProjectParams<float>, unsigned int*)",
        "void cub::DeviceScanKernel<cub::TransformIterator<rapfast::(anonymous namespace)::PopCount>>(int)",
        "void rapfast::(anonymous namespace)::sh_kernel<3>(rapfast::ColorParams<float>)",
        "Memset (Device)",
        "void cub::DeviceRadixSortOnesweepKernel<unsigned int>(int)",
        "void at::native::vectorized_elementwise_kernel<4>(int)",
        "void rapfast::(anonymous namespace)::blend_kernel<3, false>(rapfast::BlendParams<float>)",
    ]
    names = ["cull", "scan after cull", "sh", "clear after sh", "sort after sh", "other after sh", "blend"]
    assert floors.steps(kernels) == names
    assert floors.steps(kernels[1:2]) == ["scan"]


# --- measuring -------------------------------------------------------------------------------------------------------


def test_psnr_is_of_the_worst_view_and_nan_is_not_good() -> None:
    truth = torch.zeros(2, 4, 4, 3)
    images = truth.clone()
    assert measure.psnr(images, truth) == 200.0
    images[1] += 0.01
    assert measure.psnr(images, truth) == pytest.approx(40.0, abs=1e-4)
    images[0, 0, 0, 0] = math.nan
    assert math.isnan(measure.psnr(images, truth)) and not measure.psnr(images, truth) >= measure.MIN_PSNR
    with pytest.raises(ValueError, match=r"images must be \[2, 4, 4, 3\] as the truth is, got \[1, 4, 4, 3\]"):
        measure.psnr(images[:1], truth)


def test_at_least_15_rounds_of_what_is_fast() -> None:
    for device in ("cpu", "cuda"):
        assert measure.rounds_for(0.4, device, 50) == (5, 15)
        assert measure.rounds_for(1e-4, device, 50) == (5 if device == "cpu" else 40, 50)
        assert measure.rounds_for(10.0, device, 50) == (0, 1)
        assert measure.rounds_for(1e-4, device, 2) == (2, 2)


def test_peak_counts_what_a_call_touches() -> None:
    found = measure.peak_mib(lambda: torch.ones(96 << 18).sum(), "cpu")  # 96 MiB, which no allocator keeps
    if found is None:
        pytest.skip("the high-water mark of the resident set can not be reset here")
    assert 94 <= found <= 112


class _Event:
    """A CUDA event on a queue that has worked 2 ms more at each record."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at, self.waited = 0.0, False

    def record(self) -> None:
        _Event.now += 2.0
        self.at, self.waited = _Event.now, False

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: _Event) -> float:
        assert end.waited, "the time is asked for before the event has happened"
        return end.at - self.at


def test_the_cuda_clock_gives_seconds_between_events(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(measure, "_events", [])
    for _ in range(3):
        start = measure.cuda_clock()
        end = measure.cuda_clock()
        assert end - start == pytest.approx(2e-3)


@pytest.mark.cuda
def test_clock_and_memory_on_a_gpu() -> None:
    a = torch.ones(4096, 4096, device="cuda")
    a @ a
    start = measure.cuda_clock()
    for _ in range(20):
        a @ a
    end = measure.cuda_clock()
    took = end - start
    start = measure.cuda_clock()
    a @ a
    end = measure.cuda_clock()
    assert 0 < end - start < took < 10.0
    assert measure.peak_mib(lambda: a + 1, "cuda") == 64.0


@pytest.fixture(scope="module")
def reduced_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of the reduced suite's smallest case, two rounds each."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", f"--benchmark-json={path}"]
    command += ["--device", "cpu", "--scale", "reduced", "--rounds", "2", "-k", "room-20k"]
    env = {**os.environ, "RAPFAST_COMMIT": "0123456789abcdef"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(
        "def test_one(benchmark):\n    benchmark.pedantic(int, rounds=2)\n\n\n"
        "def interrupt():\n    raise KeyboardInterrupt\n\n\n"
        "def test_two(benchmark):\n    benchmark.pedantic(interrupt, rounds=2)\n"
    )
    kept = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.conftest", "-p", "no:cacheprovider"]
    command += [
        "--device",
        "cpu",
        f"--benchmark-json={kept}",
        f"--rootdir={tmp_path}",
        "-c",
        os.devnull,
        str(tmp_path / "test_two.py"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert [b["name"] for b in json.loads(kept.read_text())["benchmarks"]] == ["test_one"]


def test_records_of_a_reduced_run(reduced_run: dict[str, Any]) -> None:
    records = {(r["extra_info"]["backend"], r["extra_info"]["batch"]): r for r in reduced_run["benchmarks"]}
    assert set(records) == {("reference", 1), ("rapfast", 1), ("rapfast", 4)}
    for (backend, batch), record in records.items():
        info = record["extra_info"]
        assert (info["case"], info["direction"], info["scale"]) == ("room-20k-214x120", "fwd", "reduced")
        assert (info["n_gaussians"], info["width"], info["height"], info["channels"]) == (20_000, 214, 120, 3)
        assert info["ms_per_view"] == pytest.approx(1e3 * record["stats"]["median"] / batch)
        assert 0 < info["visible_share"] < 0.2 and 1000 < info["intersections_per_view"] < 10_000
        assert info["peak_mib"] is None or info["peak_mib"] >= 0
        if backend == "rapfast":
            assert set(info["stages"]) == set(report.STAGES) and all(ms > 0 for ms in info["stages"].values())
            assert (info["work"] is not None) == (batch == 4) and info["steps"] is None
            assert info["psnr_against"] == "reference" and info["psnr_db"] >= measure.MIN_PSNR
        else:
            assert info["work"] is None
            assert info["stages"] is None and info["psnr_db"] is None


def test_the_run_tells_the_machine_but_not_the_host(reduced_run: dict[str, Any]) -> None:
    machine = reduced_run["machine_info"]
    assert machine["gpu"] is None and machine["scale"] == "reduced"
    assert machine["versions"]["rapfast"] == rapfast.__version__
    assert machine["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(machine["cpu"]) == {"name", "cores", "threads", "arch"} and "node" not in machine
    assert reduced_run["commit_info"]["id"] == "0123456789abcdef" and reduced_run["commit_info"]["project"] == "rapfast"


def test_the_report_reads_a_real_run(reduced_run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(reduced_run))
    run = report_runs.read_run(path)
    table = report.forward_table(run)
    assert "| room-20k-214x120 | 4 |" in table and "reference" in table and "gsplat" not in table
    assert "composite" in report.stage_table(run)
