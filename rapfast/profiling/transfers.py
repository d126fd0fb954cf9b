"""Copies between host and GPU as random-view synthesis and training make them, in each of the usual ways.

Upload: a batch of images to the GPU, from pageable or pinned memory, blocking or not; alone, and with work on the GPU
that takes as long as the copy. Download: rendered views to the host, one by one or as one batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIZES = ((240, 427), (480, 854))  # (height, width): of RAP's pose regressor, and as rendered
VIEWS = (8, 32)

UPLOADS = ("pageable", "pageable-non_blocking", "pinned", "pinned-non_blocking")
OWN_STREAM = "pinned-own-stream"
DOWNLOADS = ("per-tensor", "batched", "batched-kept", "per-tensor-pinned", "batched-pinned")
WAYS = {"upload": UPLOADS, "upload-work": (*UPLOADS, OWN_STREAM), "download": DOWNLOADS}
"""By what is measured: the copy until it has arrived, steps of copy and work, the views until they are on the host."""

STEPS = 8
"""Batches of one "upload-work"."""


class Case(NamedTuple):
    what: str  # of WAYS
    size: tuple[int, int]
    views: int
    way: str

    @property
    def name(self) -> str:
        return f"{self.what}-{self.size[1]}x{self.size[0]}"

    @property
    def n_bytes(self) -> int:
        return self.views * 3 * self.size[0] * self.size[1] * 4


CASES = [
    Case(what, size, views, way) for what, ways in WAYS.items() for size in SIZES for views in VIEWS for way in ways
]


class Transfer(NamedTuple):
    """A case, ready to run."""

    call: Callable[[], Tensor]
    """Returns when all has arrived, with the sum of what did or, of a download, with the views."""
    issue: Callable[[], Any] | None  # an upload's copy alone, which may return earlier
    expected: Tensor
    work_ms: float | None  # of the GPU's work in one step


def prepare(case: Case) -> Transfer:
    """Images float32 [views, 3, h, w] and what is done with them, on the current GPU."""
    images = _images(case.views, *case.size)
    if case.what == "download":
        return Transfer(_download(images, case.way), None, images, None)
    host = images.pin_memory() if case.way.startswith("pinned") else images
    non_blocking = case.way.endswith("non_blocking")

    def issue() -> Tensor:
        return host.to("cuda", non_blocking=non_blocking)

    if case.what == "upload":

        def call() -> Tensor:
            there = issue()
            torch.cuda.synchronize()
            return there

        return Transfer(call, issue, images, None)
    work, work_ms = _work_as_long_as_copying(images)
    steps = _own_stream(host, work) if case.way == OWN_STREAM else _one_stream(issue, work)
    return Transfer(steps, None, (2 * images - 1).double().sum() * STEPS, work_ms)


@lru_cache(maxsize=1)
def _images(views: int, height: int, width: int) -> Tensor:
    return torch.rand(views, 3, height, width, generator=torch.Generator().manual_seed(0))


def milliseconds(call: Callable[[], Any], repeats: int = 15) -> float:
    """Until the call returns, with nothing queued before it: the median."""
    took = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        kept = call()
        took.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        del kept
    return statistics.median(took)


def _download(images: Tensor, way: str) -> Callable[[], Tensor | list[Tensor]]:
    views = [image.cuda() for image in images]
    if way in ("per-tensor", "batched"):
        return (lambda: [view.cpu() for view in views]) if way == "per-tensor" else lambda: torch.stack(views).cpu()
    on_host = torch.zeros_like(images)
    on_host = on_host.pin_memory() if way.endswith("pinned") else on_host

    def call() -> Tensor:
        if way.startswith("batched"):
            on_host.copy_(torch.stack(views), non_blocking=True)
        else:
            for own, view in zip(on_host, views, strict=True):
                own.copy_(view, non_blocking=True)
        torch.cuda.synchronize()
        return on_host

    return call


def _work_as_long_as_copying(images: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
    """Matrix products behind the images' normalisation, and what they take on the GPU in ms."""
    left, right = torch.rand(2, 1024, 1024, device="cuda").unbind()

    def run(there: Tensor, times: int) -> Tensor:
        total = (2 * there - 1).double().sum()
        for _ in range(times):
            torch.mm(left, right)
        return total

    there = images.cuda()
    if images.shape not in _products:
        host = images.pin_memory()
        copying = _gpu_ms(lambda: host.to("cuda", non_blocking=True))
        without, many = (_gpu_ms(lambda n=n: run(there, n)) for n in (0, 20))
        _products[images.shape] = max(1, round((copying - without) / max((many - without) / 20, 1e-6)))
    times = _products[images.shape]
    return lambda there: run(there, times), _gpu_ms(lambda: run(there, times))


_products: dict[torch.Size, int] = {}  # by the images' shape, the same for every way


def _gpu_ms(call: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    took = []
    for _ in range(10):
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end))
    return statistics.median(took)


def _one_stream(issue: Callable[[], Tensor], work: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """The training loop that sends a batch and works on it, on one stream."""

    def call() -> Tensor:
        return torch.stack([work(issue()) for _ in range(STEPS)]).sum().cpu()

    return call


def _own_stream(host: Tensor, work: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """The next batch is on its way, on a stream of its own, while one is worked on."""
    copying = torch.cuda.Stream()

    def send() -> Tensor:
        with torch.cuda.stream(copying):
            return host.to("cuda", non_blocking=True)

    def call() -> Tensor:
        working, totals, coming = torch.cuda.current_stream(), [], send()
        for step in range(STEPS):
            there = coming
            working.wait_stream(copying)
            there.record_stream(working)
            if step + 1 < STEPS:
                coming = send()
            totals.append(work(there))
        return torch.stack(totals).sum().cpu()

    return call
