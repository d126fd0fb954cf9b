"""What `rapfast tune` writes and who reads it; the search for the best batch, on a made-up device."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rapfast import tuning
from rapfast.profiling import batch_search
from rapfast.profiling.batch_search import Point, choose, search

CPU = torch.device("cpu")
ENTRY = tuning.Tuning(tuning.device_name(CPU), 48, 32, 400, 4, None, 1.5, "2026-01-02", {"torch": "2.13"})


def test_entries_are_kept_by_device_and_size(tmp_path: Path) -> None:
    path = tmp_path / "scene.ply.tuning.json"
    other = replace(ENTRY, device="NVIDIA H200", batch=16, max_memory=1 << 30)
    for entry in (ENTRY, other, replace(ENTRY, width=96), replace(ENTRY, batch=2)):
        tuning.save(path, entry)
    assert tuning.read(path) == [other, replace(ENTRY, width=96), replace(ENTRY, batch=2)]
    scene = tmp_path / "scene.ply"
    found, said = tuning.load(scene, CPU, 48, 32, 400)
    assert found == replace(ENTRY, batch=2) and said == f"batches of 2, as {path} says"
    found, said = tuning.load(scene, CPU, 48, 33, 400)
    assert found is None and "has nothing for 48x33" in said
    found, said = tuning.load(scene, CPU, 48, 32, 401)
    assert found is None and "of a scene of 400 Gaussians and this one has 401" in said
    assert tuning.load(tmp_path / "other.ply", CPU, 48, 32, 400) == (None, None)
    found, _ = tuning.load(tmp_path / "other.ply", CPU, 48, 32, 400, path)
    assert found == replace(ENTRY, batch=2)


def test_where_it_lies(tmp_path: Path) -> None:
    assert tuning.path_for(tmp_path) == tmp_path / "tuning.json"
    assert tuning.path_for("a/scene.compressed.ply") == Path("a/scene.compressed.ply.tuning.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 0}, '"batch" must be a whole number above 0, got 0'),
        ({"batch": 2.5}, '"batch" must be a whole number above 0, got 2.5'),
        ({"max_memory": -1}, '"max_memory" must be a whole number above 0'),
        ({"device": None}, '"device" must be a string'),
        ({"ms_per_view": "fast"}, '"ms_per_view" must be a number above 0'),
    ],
)
def test_damaged_entries_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "scene.ply.tuning.json"
    path.write_text(json.dumps({"format": tuning.FORMAT, "entries": [asdict(ENTRY) | change]}))
    for act in (lambda: tuning.read(path), lambda: tuning.load(tmp_path / "scene.ply", CPU, 48, 32, 400),
                lambda: tuning.save(path, ENTRY)):  # fmt: skip
        with pytest.raises(ValueError) as error:
            act()
        assert said in str(error.value) and str(path) in str(error.value) and "delete it" in str(error.value)


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "rapfast tuning 2", "entries": []}', '{"format": 1'])
def test_foreign_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no file of `rapfast tune`.*: name another file|not valid JSON") as error:
        tuning.read(path)
    assert "delete" not in str(error.value)  # it may be anybody's


# --- the search ------------------------------------------------------------------------------------------------------


def test_the_least_memory_among_the_fastest_is_chosen() -> None:
    points = [Point(1, None, 5.0, 5, 5, 10), Point(4, None, 2.02, 2, 2, 40), Point(8, None, 2.0, 2, 2, 80),
              Point(16, None, 2.5, 2, 3, 160)]  # fmt: skip
    assert choose(points).batch == 4
    assert choose([*points, Point(8, 30, 2.01, 2, 2, 30)]).max_memory == 30
    assert choose([p._replace(peak=None) for p in points]).batch == 4


def test_entries_written_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "scene.ply.tuning.json"
    entries = [replace(ENTRY, width=width) for width in range(1, 41)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: tuning.save(path, entry), entries))
    assert sorted(entry.width for entry in tuning.read(path)) == [entry.width for entry in entries]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_growing_batches_end_where_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up renderer on a made-up clock: 4 ms a call and 1 ms a view, slower from 8 views on and where memory is
    bounded; no memory for 16."""
    now = [0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0] / 1e9)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    calls: list[tuple[int, int | None]] = []

    def draw(batch: int, max_memory: int | None) -> torch.Tensor:
        if batch > 32:
            raise RuntimeError("a fault")
        if batch > 16:
            return torch.empty(1 << 60, dtype=torch.uint8)  # which the host has not
        if batch > 8:
            raise MemoryError
        if max_memory is not None and max_memory < 1 << 20:
            raise ValueError("max_memory is too small")
        calls.append((batch, max_memory))
        now[0] += 1_000_000 * (4 + batch + (20 if batch > 4 else 0) + (20 if max_memory else 0))
        return torch.ones(batch << 20)  # 4 MiB a view

    told: list[Point] = []
    found = search(draw, CPU, [1, 2, 4, 8, 16], seconds=0.05, progress=told.append)
    assert [point.batch for point in found.batches] == [1, 2, 4, 8]
    assert found.stopped == "memory does not suffice for 16 views"
    assert found.best.batch == 4 and found.best.max_memory is None
    assert told == [*found.batches, *found.splits]
    for point, ms in zip(found.batches, (5, 3, 2, 4), strict=True):
        assert point.low == point.high == point.ms_per_view == pytest.approx(ms)
    if found.best.peak is not None:
        assert [point.max_memory for point in found.splits] and all(p.batch == 4 for p in found.splits)

    found = search(draw, CPU, [1, 2, 4, 8], max_bytes=10 << 20, seconds=0.02)
    if found.batches[0].peak is not None:
        assert "MiB, more than 10" in found.stopped and found.best.batch <= 2
    with pytest.raises(RuntimeError, match="nothing could be measured: memory does not suffice for 16 views"):
        search(draw, CPU, [16])
    with pytest.raises(RuntimeError, match="nothing could be measured: memory does not suffice for 32 views"):
        search(draw, CPU, [32])
    with pytest.raises(RuntimeError, match="a fault"):
        search(draw, CPU, [64])
    least = batch_search.ROUNDS[0] + 3  # two before, one for the memory
    assert all(calls.count((batch, None)) >= least for batch in (1, 2, 4, 8))
