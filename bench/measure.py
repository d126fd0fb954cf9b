"""How it is measured: backends, clocks, memory, stages, and the check that the pixels are right."""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import rapfast
from bench import floors
from rapfast._native import _C
from rapfast.profiling import Profiler, memory

Arguments = dict[str, Any]

# --- backends --------------------------------------------------------------------------------------------------------


def _rapfast(arguments: Arguments) -> torch.Tensor:
    return rapfast.rasterization(**arguments)[0]


def _reference(arguments: Arguments) -> torch.Tensor:
    return rapfast.rasterization(**arguments, backend="reference")[0]


def _gsplat(arguments: Arguments) -> torch.Tensor:
    # called without rapfast's wrapper, so that none of its time is ours
    from gsplat import rasterization

    return rasterization(**arguments)[0]


def _gsplat_loop(arguments: Arguments) -> torch.Tensor:
    """The views one call each, as a loop over a data set renders them."""
    views = arguments["viewmats"].split(1), arguments["Ks"].split(1)
    return torch.cat([_gsplat({**arguments, "viewmats": v, "Ks": k}) for v, k in zip(*views, strict=True)])


BACKENDS: dict[str, Callable[[Arguments], torch.Tensor]] = {
    "gsplat": _gsplat,
    "gsplat-loop": _gsplat_loop,
    "reference": _reference,
    "rapfast": _rapfast,
}
"""Each renders [C, H, W, D]."""


def gradients(backend: str, arguments: Arguments, wanted: list[str], upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Renders and goes back: gradients of the arguments named, where that of the images is ``upstream``."""
    images = BACKENDS[backend](arguments)
    return dict(zip(wanted, torch.autograd.grad(images, [arguments[name] for name in wanted], upstream), strict=True))


def why_not(backend: str, device: str) -> str | None:
    """The sentence that tells why a backend cannot run on a device, None where it can."""
    if backend.startswith("gsplat"):
        if device != "cuda":
            return "gsplat runs on CUDA devices alone"
        if importlib.util.find_spec("gsplat") is None:
            return "gsplat is not installed: pip install 'rapfast[bench]'"
    if backend == "rapfast" and device == "cuda":
        if _C.build_info()["cuda"] is None:
            return f"rapfast cannot use the GPU: {_C.cuda_devices()['reason']}"
        if not _C.build_info()["cuda_stages"]:
            return "this build of rapfast has no CUDA stages"
    return None


# --- clocks ----------------------------------------------------------------------------------------------------------


class _Moment:
    """A point on the current CUDA stream. The difference of two is in seconds, as the GPU saw them."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def __sub__(self, earlier: _Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


_events: list[torch.cuda.Event] = []


def cuda_clock() -> _Moment:
    """A timer for pytest-benchmark, which takes ``end - start``: records an event and does not wait for it.

    Two events take turns and are made beforehand: to make one costs microseconds, which would be measured.
    """
    if not _events:
        for _ in range(2):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            _events.append(event)
    _events.append(_events.pop(0))
    _events[0].record()
    return _Moment(_events[0])


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str) -> float:
    """One call, by the wall clock, with nothing else in the queue."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def rounds_for(first: float, device: str, limit: int) -> tuple[int, int]:
    """Warm-up rounds and measured rounds for a call that takes ``first`` seconds.

    At least 5 and 15, more where they are short; only what takes seconds (the reference) is measured less often. A loop
    of short calls on a GPU settles in the course of some tens: allocators take turns with blocks, and calls that meet
    the same addresses again become CUDA graphs.
    """
    if first > 3.0:
        return 0, 1
    if first > 0.5:
        return 1, min(3, limit)
    long_enough = 0.25 if device == "cuda" else 0.5
    warmups = min(40, max(5, math.ceil(0.02 / first))) if device == "cuda" else 5
    return warmups if limit >= 5 else limit, min(limit, max(15, math.ceil(long_enough / first)))


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_mib(call: Callable[[], Any], device: str) -> float | None:
    """Largest memory in use during one call above what was in use before it, MiB; outputs count, inputs do not.

    On CUDA what torch's allocator handed out; under Linux with glibc the process's resident set; elsewhere None. What a
    backend keeps from an earlier call is in use before and is not counted: rapfast's and gsplat's rasterizers keep
    nothing; see `graph_mib` for the rest.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # pages that the allocator kept for reuse would not be seen again
    if not (memory.release_free_pages() and memory.reset_host_peak()):
        return None
    before = memory.host_bytes()
    call()
    return max(0, memory.host_bytes("VmHWM") - before) / 2**20


def graph_mib(device: str) -> float:
    """Memory that CUDA graphs work in, MiB: they took it when they were captured, and a call takes none."""
    if device != "cuda":
        return 0.0
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0)) / 2**20


# --- stages ----------------------------------------------------------------------------------------------------------


def stage_ms(call: Callable[[], Any], batch: int, device: str, repeats: int = 5) -> dict[str, float]:
    """rapfast's milliseconds per view in each stage of a call, and in the feature maps before it ("maps") where it
    makes them: medians of ``repeats`` calls, as rapfast's profiler has them. A GPU's stages lie between CUDA events, so
    time in which it waits for the host counts to the stage that waits."""
    for _ in range(3 if device == "cuda" else 0):
        call()
    with Profiler(device, nvtx=False) as profiler:
        for _ in range(repeats):
            with profiler.run():
                call()
    found = {name: profiler.run_ms(section) for name, section in STAGE_SECTIONS.items()}
    return {name: statistics.median(runs) / batch for name, runs in found.items() if any(runs)}


STAGE_SECTIONS = {"maps": "feature maps"} | {n: n for n in ("project", "color", "bin", "blend", "composite")}
"""rapfast's sections by the names that records have."""


def _profiled(call: Callable[[], Any], repeats: int) -> list[Any]:
    """What ``repeats`` calls, one behind the other, did on the GPU by torch's profiler, by their begin."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(kernels, key=lambda event: event.time_range.start)


def idle_share(call: Callable[[], Any], repeats: int = 20) -> float:
    """Share of the time in which the GPU does nothing while call follows call."""
    spans = [kernel.time_range for kernel in _profiled(call, repeats)]
    idle, end = 0.0, spans[0].start
    for span in spans:
        idle += max(0.0, span.start - end)
        end = max(end, span.end)
    return idle / (end - spans[0].start)


def step_ms(call: Callable[[], Any], batch: int, repeats: int = 10) -> tuple[dict[str, float], float]:
    """Milliseconds per view of each kernel of a call on the GPU, in their order, as torch's profiler sees them and
    `floors.steps` names them; kernels of one name are added up. Then how many launches a call has, copies and clears
    included. Means of ``repeats`` calls."""
    kernels = _profiled(call, repeats)
    found: dict[str, float] = {}
    for name, kernel in zip(floors.steps([kernel.name for kernel in kernels]), kernels, strict=True):
        found[name] = found.get(name, 0.0) + kernel.time_range.elapsed_us() / (1e3 * repeats * batch)
    return found, len(kernels) / repeats


# --- right pixels ----------------------------------------------------------------------------------------------------

MIN_PSNR = 60.0


def psnr(images: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the worst of the views [C, H, W, D], for a peak of 1; at most 200."""
    if images.shape != truth.shape:
        raise ValueError(f"images must be {list(truth.shape)} as the truth is, got {list(images.shape)}")
    errors = torch.stack([(a - b).double().square().mean() for a, b in zip(images, truth, strict=True)])
    # a NaN must fail, and max() with a number would drop it
    worst = float(errors.max())
    return worst if math.isnan(worst) else -10 * math.log10(max(worst, 1e-20))
