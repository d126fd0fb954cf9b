"""Forward rendering: every case, batch and backend, timed after its pixels were checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bench import floors
from bench.cases import CASES, CPU_THREADS, Case, Workload, workload
from bench.measure import (
    BACKENDS,
    MIN_PSNR,
    Arguments,
    idle_share,
    peak_mib,
    psnr,
    rounds_for,
    seconds,
    stage_ms,
    step_ms,
    wait,
    why_not,
)

_BY_NAME = {case.name: case for cases in CASES.values() for case in cases}


class _Truth:
    """The images that the pixels are compared with, of one case and batch at a time.

    On a GPU all of gsplat's, on the CPU the reference's first view.
    """

    def __init__(self) -> None:
        self.of: tuple[Any, ...] | None = None
        self.images: torch.Tensor | None = None

    @staticmethod
    def backend(device: str) -> str | None:
        name = "gsplat" if device == "cuda" else "reference"
        return None if why_not(name, device) else name

    def get(self, case: Case, device: str, arguments: Arguments) -> torch.Tensor:
        """Rendered now, unless `put` had it."""
        n = len(arguments["viewmats"]) if device == "cuda" else 1
        if self.of != (case.name, device, n):
            self.images = None  # its memory is wanted for the next
            views = {name: arguments[name][:n] for name in ("viewmats", "Ks")}
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # the reference's operations are small: see _faster_threads
            self.put(case, device, BACKENDS[self.backend(device)]({**arguments, **views}))
            torch.set_num_threads(threads)
        return self.images

    def put(self, case: Case, device: str, images: torch.Tensor) -> None:
        self.of, self.images = (case.name, device, len(images)), images


_truth = _Truth()


def _faster_threads(call: Callable[[], None]) -> int:
    """1 or torch's number of threads, whichever is faster. The reference works in small operations, which a second
    thread can slow several times, and a slow reference would make a good ratio."""
    threads, took = torch.get_num_threads(), {}
    for n in {1, threads}:
        torch.set_num_threads(n)
        took[n] = seconds(call, "cpu")
    return min(took, key=took.__getitem__)


def test_forward(
    benchmark: Any, case_name: str, device: str, batch: int, backend: str, scale: str, max_rounds: int
) -> None:
    case = _BY_NAME[case_name]
    threads = torch.get_num_threads()
    if case.cpu_only:
        torch.set_num_threads(CPU_THREADS)
    try:
        with torch.no_grad():
            _measure(benchmark, workload(case, device), device, batch, backend, scale, max_rounds)
    finally:
        torch.set_num_threads(threads)


def _measure(
    benchmark: Any, work: Workload, device: str, batch: int, backend: str, scale: str, max_rounds: int
) -> None:
    case, arguments = work.case, work.arguments(batch)
    render = BACKENDS[backend]

    def call() -> None:
        render(arguments)

    if backend == "reference" and device == "cpu":
        torch.set_num_threads(_faster_threads(call))
    wait(device)
    start = time.perf_counter()
    drawn = render(arguments)
    wait(device)
    first = time.perf_counter() - start
    against, agreement = _truth.backend(device), None
    if backend == against:
        _truth.put(case, device, drawn)
    elif against is not None:
        images = _truth.get(case, device, arguments)
        agreement = psnr(drawn[: len(images)], images)
        del images
        assert agreement >= MIN_PSNR, f"{backend} is {agreement:.1f} dB from {against}: not worth timing"
    del drawn

    if first < 1.0 or device == "cuda":  # a first call may have loaded or learnt something
        first = seconds(call, device)
    warmups, rounds = rounds_for(first, device, max_rounds)
    peak = peak_mib(call, device) if first < 3.0 else None
    stages = stage_ms(call, batch, device, repeats=min(5, rounds)) if backend == "rapfast" else None
    counted = backend == "rapfast" and batch == case.counted_batch and not case.cpu_only
    counts = floors.count(arguments) if counted else None
    profiled = counted and device == "cuda"
    steps, launches = step_ms(call, batch) if profiled else (None, None)
    idle = idle_share(call) if profiled else None
    benchmark.pedantic(call, warmup_rounds=warmups, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(
        case=case.name,
        backend=backend,
        batch=batch,
        direction="fwd",
        ms_per_view=1e3 * median / batch,
        peak_mib=peak,
        n_gaussians=len(work.scene),
        width=case.width,
        height=case.height,
        channels=case.channels or 3,
        visible_share=float(work.statistics.visible_share[:batch].mean()),
        intersections_per_view=float(work.statistics.intersections[:batch].double().mean()),
        stages=stages,
        work=None if counts is None else counts._asdict(),
        steps=steps,
        launches=launches,
        gpu_idle=idle,
        psnr_db=agreement,
        psnr_against=None if agreement is None else against,
        device=device,
        threads=torch.get_num_threads() if device == "cpu" else None,
        timer="cuda events" if device == "cuda" else "perf_counter",
        warmup_rounds=warmups,
        scale=scale,
    )
