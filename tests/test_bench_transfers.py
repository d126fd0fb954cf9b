"""The benchmark of copies between host and GPU: its cases, its report, and on a GPU that every way copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "test_transfers.py").is_file():
    pytest.skip("bench/ is part of the repository, not of the source distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import report, report_runs  # noqa: E402
from rapfast.profiling import transfers  # noqa: E402

MACHINE = {
    "gpu": {"name": "NVIDIA H200", "driver": "580.65"},
    "cpu": {"name": "CPU", "cores": 16},
    "versions": {"rapfast": "0.1.0", "torch": "2.11.0", "gsplat": "1.5.3", "cuda": "13.0"},
}


def write_run(path: Path, records: list[dict[str, Any]], day: str = "2026-01-02") -> Path:
    benchmarks = [{"extra_info": record} for record in records]
    data = {"machine_info": MACHINE, "commit_info": {"id": "0123456789"}, "datetime": day, "benchmarks": benchmarks}
    path.write_text(json.dumps(data))
    return path


def records() -> list[dict[str, Any]]:
    ms = {
        "upload": (4.0, 3.2, 1.25, 1.0),
        "upload-work": (6.0, 5.0, 2.5, 2.0, 1.5),
        "download": (8.0, 5.0, 4.0, 1.5, 1.0),
    }
    return [
        {"case": f"{what}-427x240", "backend": way, "batch": 8, "direction": "transfer", "ms": time,
         "returns_ms": time / 10 if what == "upload" else None, "work_ms": None}
        for what, times in ms.items() for way, time in zip(transfers.WAYS[what], times, strict=True)
    ]  # fmt: skip


def test_the_report_sets_the_ways_side_by_side(tmp_path: Path) -> None:
    run = report_runs.read_run(write_run(tmp_path / "run.json", records()))
    section = "\n".join(report.transfer_section(run))
    assert "| 427x240 | 8 | the call returns | 0.400 | 0.320 | 0.125 | 0.100 | – | 1.25 | 4.00 | – |" in section
    assert "| 427x240 | 8 | it has arrived | 4.00 | 3.20 | 1.25 | 1.00 | – | 1.25 | 4.00 | – |" in section
    assert "| 427x240 | 8 | copy and work are done | 6.00 | 5.00 | 2.50 | 2.00 | 1.50 | 1.20 | 3.00 | 4.00 |" in section
    assert "| 427x240 | 8 | 8.00 | 5.00 | 1.60 | 4.00 | 1.50 | 1.00 | 1.50 |" in section


def test_a_run_of_transfers_alone_leaves_the_other_tables(tmp_path: Path) -> None:
    forward = {"case": "room", "backend": "rapfast", "batch": 8, "direction": "fwd", "ms_per_view": 0.1}
    write_run(tmp_path / "a.json", [forward, *records()])
    write_run(tmp_path / "b.json", records(), "2026-02-03")
    found = [(run.time, bool(run.records), bool(run.transfers)) for run in report.newest_runs(tmp_path)]
    assert found == [("2026-01-02", True, False), ("2026-02-03", False, True)]
    write_run(tmp_path / "c.json", [forward, *records()], "2026-03-04")
    found = [(run.time, bool(run.records), bool(run.transfers)) for run in report.newest_runs(tmp_path)]
    assert found == [("2026-03-04", True, True)]


def test_cases_are_raps_sizes_in_every_way() -> None:
    assert {(c.size, c.views) for c in transfers.CASES} == {
        (size, views) for size in ((240, 427), (480, 854)) for views in (8, 32)
    }
    for what, ways in transfers.WAYS.items():
        assert [c.way for c in transfers.CASES if (c.what, c.size, c.views) == (what, (240, 427), 8)] == list(ways)
    assert set(report.UPLOADS) == set(transfers.WAYS["upload-work"])


def test_without_a_gpu_nothing_is_measured() -> None:
    command = [sys.executable, "-m", "pytest", "bench/test_transfers.py", "-q", "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(
        [*command, "--device", "cpu", "-k", "download"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 skipped" in done.stdout and "passed" not in done.stdout
    assert "copies between host and GPU are measured on a GPU" in done.stdout


@pytest.mark.cuda
@pytest.mark.parametrize("what", list(transfers.WAYS))
def test_every_way_copies(what: str) -> None:
    for way in transfers.WAYS[what]:
        made = transfers.prepare(transfers.Case(what, (24, 43), 5, way))
        found = made.call()
        found = torch.stack(found) if isinstance(found, list) else found.cpu()
        torch.testing.assert_close(found, made.expected, rtol=1e-9, atol=0)
        assert (made.issue is not None) == (what == "upload")
        assert (made.work_ms is not None) == (what == "upload-work")
