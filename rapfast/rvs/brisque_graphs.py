"""A score's hundreds of small kernels as one CUDA graph: launching them one by one takes longer than they do."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BATCHES = (1, 2, 4, 8, 16)
"""Pictures of a graph; the smallest that holds a group runs it, with old pictures in the places left over."""

KEPT_SIZES = 2
"""Picture sizes whose graphs are kept. Those of 427x240 take about 0.3 GB in float64."""

Score = Callable[[Tensor], Tensor]
"""[B, 3, H, W] -> [B] float64, by kernels alone: nothing waits, nothing comes from the host, and a picture's score
does not depend on the others."""


class _Graph:
    """The scores of n pictures of one size."""

    def __init__(self, score: Score, n: int, like: Tensor, pool: Any) -> None:
        stream = torch.cuda.Stream(like.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.pictures = torch.zeros((n, *like.shape[1:]), dtype=_wide(like), device=like.device)
            score(self.pictures)  # what a first call sets up, and the loading of kernels, must not be captured
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.scores = score(self.pictures)

    def __call__(self, pictures: Tensor, out: Tensor) -> None:
        self.pictures[: len(pictures)].copy_(pictures)
        self.graph.replay()
        out.copy_(self.scores[: len(out)])


class _Size:
    """The graphs of one picture size, which share their memory: no two run at the same time."""

    def __init__(self) -> None:
        self.asked: set[int] = set()
        self.graphs: dict[int, _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()


class ScoreGraphs:
    """Scores by graphs on one GPU. May be called from several threads and on any stream.

    A graph is made when a size comes up in groups of this many pictures for the second time, which waits for the
    device once. Where memory does not suffice for one, all are dropped and none is made any more, with a
    RuntimeWarning; the scores are the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._sizes: OrderedDict[Any, _Size] = OrderedDict()
        self._done: torch.cuda.Event | None = None
        self._works = True

    def __call__(self, score: Score, pictures: Tensor, at_once: int) -> Tensor:
        """[B, 3, H, W] on the device, B at least 1 -> [B] float64, on the current stream.

        Args:
            score: always the same function, of at most `at_once` pictures.
        """
        with self._lock, torch.cuda.device(self.device), _no_modes():
            scores = torch.empty(len(pictures), dtype=torch.float64, device=self.device)
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)  # another stream may still use the graphs' memory
            most = max(n for n in BATCHES if n <= max(at_once, 1))
            try:
                for part, out in zip(pictures.split(most), scores.split(most), strict=True):
                    graph = self._graph(score, part) if self._works else None
                    if graph is None:
                        out.copy_(score(part.to(_wide(part))))
                    else:
                        graph(part, out)
            finally:
                self._done = stream.record_event()
            return scores

    def _graph(self, score: Score, pictures: Tensor) -> _Graph | None:
        """One that holds so many pictures, or None."""
        key = (*pictures.shape[1:], _wide(pictures))
        size = self._sizes.pop(key, None) or _Size()
        self._sizes[key] = size  # the last one is the newest
        if len(self._sizes) > KEPT_SIZES:
            torch.cuda.synchronize()  # a graph of it may still be running
            self._sizes.popitem(last=False)
        n = min(n for n in BATCHES if n >= len(pictures))
        if n not in size.graphs:
            if n not in size.asked:
                size.asked.add(n)
                return min((graph for k, graph in size.graphs.items() if k > n), key=_length, default=None)
            try:
                size.graphs[n] = _Graph(score, n, pictures, size.pool)
                return size.graphs[n]
            except RuntimeError as error:
                del self._sizes[key]  # its pool may be left half open
                if not _out_of_memory(error):
                    raise
            # Behind the handler, which keeps alive what the failed capture had made.
            del size
            self._give_up()
            return None
        return size.graphs[n]

    def _give_up(self) -> None:
        self._works = False
        torch.cuda.synchronize()
        self._sizes.clear()
        torch.cuda.empty_cache()
        warnings.warn(
            "memory ran out while BRISQUE's kernels were put into a CUDA graph: pictures are scored without one, "
            "which is slower",
            RuntimeWarning,
            stacklevel=4,
        )


def _length(graph: _Graph) -> int:
    return len(graph.pictures)


def _wide(pictures: Tensor) -> torch.dtype:
    return torch.float64 if pictures.dtype == torch.float64 else torch.float32


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, also where ending the capture failed because of it."""
    while error is not None:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return True
        error = error.__context__
    return False


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    """Neither gradients nor autocast's types, and memory that may be written in any mode later."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False):
        yield
