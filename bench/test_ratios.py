"""What the README claims still holds: each of its ratios to gsplat, less a tenth. Runs with `-m ratios`, on a GPU."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest
import torch

from bench import report
from bench.cases import CASES, GARDEN_VARIABLE, garden_path, workload
from bench.measure import BACKENDS, MIN_PSNR, Arguments, cuda_clock, psnr, why_not

KEPT = 0.9
WARMUPS, ROUNDS, TURNS = 40, 10, 3

_CASES = {case.name: case for case in CASES["full"]}
_RESULTS = Path(__file__).parent / "results"


def _claims() -> list[tuple[str, str, float]]:
    """(GPU, case, ratio) of the run that the README's table is made from."""
    runs = report.newest_runs(_RESULTS) if any(_RESULTS.glob("*.json")) else []
    runs = [run for run in runs if run.records and run.machine.get("gpu")]
    return [(runs[0].device_name, *claim) for claim in report.claimed_ratios(runs[0])] if runs else []


def _medians(arguments: Arguments) -> dict[str, float]:
    """Seconds of a call by backend. They take turns with loops, so that a machine that slows down slows both, and not
    with calls: what one frees the other would take, and neither find its memory where it was."""
    took: dict[str, list[float]] = {"gsplat": [], "rapfast": []}
    for _ in range(TURNS):
        for backend, times in took.items():
            for i in range(WARMUPS + ROUNDS):
                start = cuda_clock()
                BACKENDS[backend](arguments)
                seconds = cuda_clock() - start
                if i >= WARMUPS:
                    times.append(seconds)
    return {backend: statistics.median(times) for backend, times in took.items()}


@pytest.mark.ratios
@pytest.mark.parametrize(("gpu", "case_name", "claimed"), [pytest.param(*c, id=c[1]) for c in _claims()])
def test_a_ratio_of_the_readme_is_not_lost(gpu: str, case_name: str, claimed: float) -> None:
    """Times rapfast and gsplat anew, a batch of 8, once their pixels agree."""
    case = _CASES[case_name]._replace(batches=(report.README_BATCH,))
    reason = (
        why_not("rapfast", "cuda") or why_not("gsplat", "cuda") if torch.cuda.is_available() else "torch sees no GPU"
    )
    if reason is None and torch.cuda.get_device_name() != gpu:
        reason = f"the README's ratios are of an {gpu}, this is an {torch.cuda.get_device_name()}"
    if reason is None and case.scene == "garden" and garden_path() is None:
        reason = f"{GARDEN_VARIABLE} is not set: it names gsplat's test_garden.npz"
    if reason:
        if os.environ.get("RAPFAST_REQUIRE_CUDA") == "1":
            pytest.fail(f"RAPFAST_REQUIRE_CUDA=1, but {reason}", pytrace=False)
        pytest.skip(reason)
    with torch.no_grad():
        arguments = workload(case, "cuda").arguments(report.README_BATCH)
        agreement = psnr(BACKENDS["rapfast"](arguments), BACKENDS["gsplat"](arguments))
        assert agreement >= MIN_PSNR, f"rapfast is {agreement:.1f} dB from gsplat"
        took = _medians(arguments)
    ratio = took["gsplat"] / took["rapfast"]
    assert ratio >= KEPT * claimed, f"{case_name}: {ratio:.2f} times faster than gsplat, the README says {claimed:.2f}"
