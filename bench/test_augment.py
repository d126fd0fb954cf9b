"""Avatar augmentation: the seed's table, both modes measured, and what a further set costs."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.augmentation import CASES, MODES, Case, films, run_command, run_job
from bench.measure import rounds_for, seconds, why_not

_made: dict[tuple[str, int], list[bytes]] = {}  # films of the batch, by case and N


@pytest.fixture
def device(pytestconfig: pytest.Config) -> str:
    chosen = pytestconfig.getoption("--device")
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_not("rapfast", chosen)
    if reason:
        pytest.skip(reason)
    return chosen


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize("mode", ["batch", "subprocess", "job", "job-refiner"])
@pytest.mark.benchmark(group="augment")
def test_augment(benchmark: Any, mode: str, n: int, device: str, scale: str, max_rounds: int, tmp_path: Path) -> None:
    assert mode in MODES
    case = CASES[scale]
    if n not in case.sets:
        pytest.skip(f"{case.name} is measured for {' and '.join(map(str, case.sets))} sets")
    pytest.importorskip("av", reason="films are written by PyAV, which is not installed: pip install 'rapfast[video]'")
    out, stages = tmp_path / "out", []

    def call() -> None:
        if mode in ("batch", "subprocess"):
            run_command(case, mode, n, device, out)
        else:
            stages.append(asdict(run_job(case, mode, n, device, out).seconds))

    if mode in ("batch", "subprocess"):
        warmups, rounds = 0, min(max_rounds, 3 if mode == "batch" else 1)
    else:
        call()  # loads libraries, learns capacities
        warmups, rounds = rounds_for(seconds(call, device), device, min(5, max_rounds))
        rounds = max(rounds, min(5, max_rounds))
        stages.clear()
    benchmark.pedantic(call, warmup_rounds=warmups, rounds=rounds)
    _check(case, mode, n, films(case, n, out))
    if benchmark.stats is None:  # --benchmark-disable
        return
    # What a job took but for its model, which is the figure here: no part of what further sets cost.
    totals = [sum(took for name, took in s.items() if name != "load_model") for s in stages[-rounds:]]
    benchmark.extra_info.update(
        case=case.name,
        backend=mode,
        batch=n,
        direction="augment",
        seconds=statistics.median(totals) if totals else benchmark.stats.stats.median,
        stages={name: statistics.median(s[name] for s in stages) for name in stages[0]} if stages else None,
        frames=case.frames,
        n_gaussians=case.gaussians,
        width=case.side,
        height=case.side,
        channels=case.channels,
        device=device,
        timer="perf_counter",
        warmup_rounds=warmups,
        scale=scale,
    )


def _check(case: Case, mode: str, n: int, made: list[bytes]) -> None:
    """Both modes write the same films, byte for byte."""
    if mode == "job-refiner":
        return
    known = _made.setdefault((case.name, n), made)
    assert known == made, f"{mode} wrote other films than the batch"
