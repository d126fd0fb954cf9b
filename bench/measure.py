"""How it is measured: backends, clocks, memory, stages, and the check that the pixels are right."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import rapfast
from bench import floors
from rapfast import ops
from rapfast._native import _C

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

    5 and at least 15, more where they are short; only what takes seconds (the reference) is measured less often.
    """
    if first > 3.0:
        return 0, 1
    if first > 0.5:
        return 1, min(3, limit)
    long_enough = 0.25 if device == "cuda" else 0.5
    return min(5, limit), min(limit, max(15, math.ceil(long_enough / first)))


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
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages that the allocator kept for reuse would not be seen again
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark falls to the present size
        before = _resident("VmRSS")
        call()
        return max(0.0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def graph_mib(device: str) -> float:
    """Memory that CUDA graphs work in, MiB: they took it when they were captured, and a call takes none."""
    if device != "cuda":
        return 0.0
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0)) / 2**20


def _resident(field: str) -> float:
    with open("/proc/self/status") as file:
        kib = re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.MULTILINE)
    if kib is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(kib[1]) / 1024


# --- stages ----------------------------------------------------------------------------------------------------------


def stage_ms(arguments: Arguments, device: str, repeats: int = 5) -> dict[str, float] | None:
    """rapfast's milliseconds per view in each stage.

    On CUDA ``rapfast.ops.stage_times`` knows the milliseconds of one call by stage. None where this version of rapfast
    has no such function, and for what it cannot render, which is depth. On the CPU the stages are called one by one.
    """
    batch = len(arguments["viewmats"])
    if device == "cuda":
        stage_times = getattr(ops, "stage_times", None)
        if stage_times is None:
            return None
        if arguments["render_mode"] != "RGB":
            return None
        rendering = {n: v for n, v in arguments.items() if n not in ("packed", "render_mode", "rasterize_mode")}
        rendering["antialiased"] = _antialiased(arguments)
        return {name: ms / batch for name, ms in stage_times(**rendering).items()}
    runs = [_cpu_stages(arguments) for _ in range(repeats)]
    return {name: 1e3 * statistics.median(run[name] for run in runs) / batch for name in runs[0]}


def _cpu_stages(arguments: Arguments) -> dict[str, float]:
    scene = [arguments[name][None] for name in ("means", "quats", "scales")]
    opacities, colors = arguments["opacities"][None], arguments["colors"][None]
    viewmats, Ks = arguments["viewmats"][None].contiguous(), arguments["Ks"][None].contiguous()
    size = arguments["width"], arguments["height"]
    sh_degree, mode, took, made = arguments["sh_degree"], arguments["render_mode"], {}, {}
    antialiased = _antialiased(arguments)

    def stage(name: str, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        made[name] = call()
        took[name] = time.perf_counter() - start

    stage("project", lambda: ops.project(*scene, None, opacities, viewmats, Ks, *size, antialiased=antialiased))
    given = {"sh_degree": sh_degree, "render_mode": mode}
    stage("color", lambda: ops.color(scene[0], viewmats, Ks, colors, made["project"], *size, **given))
    stage("bin", lambda: ops.bin(made["project"], *size))
    stage("blend", lambda: ops.blend(made["project"], made["color"], made["bin"], *size))
    n_channels = 3 if sh_degree is not None else colors.shape[-1]
    finish = {"n_color_channels": n_channels, "expected_depth": mode.endswith("ED")}
    stage("composite", lambda: ops.composite(*made["blend"], **finish))
    return took


def _antialiased(arguments: Arguments) -> bool:
    return arguments["rasterize_mode"] == "antialiased"


def step_ms(call: Callable[[], Any], batch: int, repeats: int = 10) -> tuple[dict[str, float], float]:
    """Milliseconds per view of each kernel of a call on the GPU, in their order, as torch's profiler sees them and
    `floors.steps` names them; kernels of one name are added up. Then how many launches a call has, copies and clears
    included. Means of ``repeats`` calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
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
