"""How many views to render in one call, and in how much memory: each choice is tried and measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from rapfast.profiling import Profiler, section
from rapfast.profiling.memory import release_free_pages

SECONDS, ROUNDS = 0.6, (5, 40)
"""For one choice, and how many calls at least and at most."""

TOLERANCE = 0.03
"""Of what is as fast as the fastest but for this fraction, the choice that takes the least memory is best."""

FRACTIONS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1)
"""Of the memory that the best batch takes, to which calls of it are bounded."""

Draw = Callable[[int, "int | None"], Any]
"""Renders so many views, in at most so many bytes, and returns what is to be alive until the clock is read."""


class Point(NamedTuple):
    """What one choice took.

    Attributes:
        batch: views in a call. max_memory: bytes it was allowed, None for any number.
        ms_per_view: the median; low, high: the fastest and the slowest call.
        peak: bytes above what was in use before a call; None where it is not known.
    """

    batch: int
    max_memory: int | None
    ms_per_view: float
    low: float
    high: float
    peak: int | None


class Found(NamedTuple):
    """All that was measured; the best; and why larger batches were not tried, if they were not."""

    batches: list[Point]
    splits: list[Point]
    best: Point
    stopped: str | None


def search(
    draw: Draw,
    device: torch.device,
    batches: Iterable[int],
    max_bytes: int | None = None,
    seconds: float = SECONDS,
    progress: Callable[[Point], None] = lambda point: None,
) -> Found:
    """Try growing batches until memory does not suffice, then bounds on the memory of the best.

    Args:
        draw: see `Draw`; raises ValueError where it cannot do with so few bytes.
        device: that renders.
        batches: to try, growing.
        max_bytes: a call may take no more than this.
        seconds: for each choice.
        progress: is told of each choice when it is measured.

    Raises:
        RuntimeError: not even the first batch fits.
    """
    tried: list[Point] = []
    stopped = None
    for batch in batches:
        try:
            point = _measured(draw, device, batch, None, seconds)
        except (torch.cuda.OutOfMemoryError, MemoryError):
            stopped = f"memory does not suffice for {batch} views"
            if device.type == "cuda":
                torch.cuda.empty_cache()
            break
        if max_bytes is not None and point.peak is not None and point.peak > max_bytes:
            stopped = f"{batch} views take {point.peak / 2**20:,.0f} MiB, more than {max_bytes / 2**20:,.0f}"
            break
        tried.append(point)
        progress(point)
    if not tried:
        raise RuntimeError(f"nothing could be measured: {stopped}")
    best = choose(tried)
    splits: list[Point] = []
    for fraction in FRACTIONS if best.peak and best.batch > 1 else ():
        bound = int(fraction * best.peak)
        try:
            splits.append(_measured(draw, device, best.batch, bound, seconds))
        except (ValueError, torch.cuda.OutOfMemoryError):  # so few bytes are not enough for one view
            break
        progress(splits[-1])
    return Found(tried, splits, choose([best, *splits]), stopped)


def choose(points: list[Point]) -> Point:
    """The one of least memory among the fastest; of equals the first."""
    fastest = min(point.ms_per_view for point in points)
    good = [point for point in points if point.ms_per_view <= (1 + TOLERANCE) * fastest]
    return min(good, key=lambda point: (point.peak or 0, point.batch))


def _measured(draw: Draw, device: torch.device, batch: int, max_memory: int | None, seconds: float) -> Point:
    def call() -> None:
        made = draw(batch, max_memory)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del made

    call()
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    least, most = ROUNDS
    release_free_pages()  # which a call would take again unseen
    with Profiler(device, memory=True, nvtx=False) as watching, section("call"), watching.paused():
        call()
    # by another one, since looking at memory takes time
    with Profiler(device, nvtx=False) as timing:
        for _ in range(min(most, max(least, round(seconds / max(first, 1e-6))))):
            with section("call"), timing.paused():
                call()
    memory = watching.nodes()[0].memory.get("gpu" if device.type == "cuda" else "host")
    took = timing.nodes()[0].host
    each = [ms / batch for ms in (statistics.median(took.samples), took.smallest, took.largest)]
    return Point(batch, max_memory, *each, None if memory is None else memory["rise"])
