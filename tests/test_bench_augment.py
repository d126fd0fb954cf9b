"""The benchmark of avatar augmentation: its report, and that it measures both modes of the same films."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "augmentation.py").is_file():
    pytest.skip("bench/ is part of the repository, not of the source distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import augmentation, report, report_augment, report_runs  # noqa: E402

MACHINE = {
    "gpu": {"name": "NVIDIA H200", "driver": "580.65"},
    "cpu": {"name": "CPU", "cores": 16},
    "versions": {"rapfast": "0.1.0", "torch": "2.11.0", "gsplat": "1.5.3", "cuda": "13.0"},
}
CASE = "avatar-150k-512x512"


def record(mode: str, n: int, seconds: float) -> dict[str, Any]:
    stages = {"load_model": 1.0, "load_video": 0.1, "precompute": 0.2, "render": n * 0.1, "finish": 0.05}
    return {"case": CASE, "backend": mode, "batch": n, "direction": "augment", "seconds": seconds, "frames": 137,
            "stages": stages if mode.startswith("job") else None}  # fmt: skip


def records() -> list[dict[str, Any]]:
    times = {"subprocess": {1: 7.0, 3: 21.0, 10: 70.0}, "batch": {1: 7.0, 3: 7.5, 10: 9.0},
             "job": {1: 0.6, 3: 0.8, 10: 1.5}, "job-refiner": {1: 1.0, 10: 10.0}}  # fmt: skip
    return [record(mode, n, t) for mode, by_n in times.items() for n, t in by_n.items()]


def run_of(path: Path, found: list[dict[str, Any]]) -> report.Run:
    data = {"machine_info": MACHINE, "commit_info": {"id": "0123456789"}, "datetime": "2026-01-02",
            "benchmarks": [{"extra_info": info} for info in found]}  # fmt: skip
    path.write_text(json.dumps(data))
    return report_runs.read_run(path)


def test_the_table_tells_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run.json", records())
    text = "\n".join(report_augment.augment_section(run))
    assert "| 10 | measured | 70.0 | 9.00 | 7.78 | 2,000 | 170 | 11.8 |" in text
    # a further set takes (1.5 - 0.6) / 9 = 0.1 s
    assert "| 50 | modelled | 350 | 11.9 | 29.4 | 10,000 | 490 | 20.4 |" in text
    assert "| 100 | modelled, model 80.5 s | 8,750 | 97.4 | 89.8 | 20,000 | 890 | 22.5 |" in text
    assert text.count("| measured |") == 3 and text.count("modelled") == 2 + 5
    assert "| without refiner | a further one | – | – | – | – | 0.100 | 1,370 | 80.0 |" in text
    assert "1,370 frames a second, 80.0 times the seed's 17.1 (bar 20: met)" in text
    assert "| with the refiner | a further one | – | – | – | – | 1.00 | 137 | 8.00 |" in text


def test_a_missed_bar_is_called_missed(tmp_path: Path) -> None:
    slow = [record("job", 1, 1.0), record("job", 10, 10.0)]
    text = "\n".join(report_augment.augment_section(run_of(tmp_path / "run.json", slow)))
    assert "137 frames a second, 8.00 times the seed's 17.1 (bar 20: missed)" in text and "modelled" not in text


def test_the_report_takes_a_run_of_augmentation_alone(tmp_path: Path) -> None:
    run_of(tmp_path / "a.json", records())
    (run,) = report.newest_runs(tmp_path)
    assert run.augment and not run.records and not run.appearance
    assert "### Avatar augmentation, avatar-150k-512x512, NVIDIA H200" in report.docs_section([run], {}, {})


def test_both_modes_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("av")
    command = [sys.executable, "-m", "pytest", "bench/test_augment.py", "-q", "-p", "no:cacheprovider", "--device",
               "cpu", "--scale", "reduced", "--rounds", "1", "-k", "1 and not refiner and not 10",
               f"--benchmark-json={tmp_path / 'run.json'}"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    run = report_runs.read_run(tmp_path / "run.json")
    assert set(run.augment) == {("avatar-5k-64x64", mode, 1) for mode in ("subprocess", "batch", "job")}
    job = run.augment["avatar-5k-64x64", "job", 1]
    assert job["frames"] == augmentation.CASES["reduced"].frames and job["stages"]["render"] > 0
