"""What pinned memory, non_blocking and batching are worth: the claims of docs/rvs.md, measured on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.measure import rounds_for, seconds
from rapfast.profiling.transfers import CASES, STEPS, Case, milliseconds, prepare


def _id(case: Case) -> str:
    return f"{case.name}-b{case.views}-{case.way}"


@pytest.fixture(autouse=True)
def on_a_gpu(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--device") == "cpu" or not torch.cuda.is_available():
        pytest.skip("copies between host and GPU are measured on a GPU")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.benchmark(group=f"{c.name} batch {c.views}"), id=_id(c)) for c in CASES],
)
def test_transfers(benchmark: Any, case: Case, max_rounds: int) -> None:
    transfer = prepare(case)
    found = transfer.call()
    found = torch.stack(found) if isinstance(found, list) else found.cpu()
    torch.testing.assert_close(found, transfer.expected, rtol=1e-9 if case.what == "upload-work" else 0, atol=0)

    warmups, rounds = rounds_for(seconds(transfer.call, "cuda"), "cuda", max_rounds)
    benchmark.pedantic(transfer.call, warmup_rounds=warmups, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    ms = 1e3 * benchmark.stats.stats.median / (STEPS if case.what == "upload-work" else 1)
    benchmark.extra_info.update(
        case=case.name,
        backend=case.way,
        batch=case.views,
        direction="transfer",
        ms=ms,
        returns_ms=None if transfer.issue is None else milliseconds(transfer.issue),
        work_ms=transfer.work_ms,
        gb_per_s=case.n_bytes / ms / 1e6,
        device="cuda",
        timer="perf_counter",
        warmup_rounds=warmups,
        scale="full",
    )
