"""Where rendered views go: one tensor, filled batch by batch while the next batch renders, and pictures on disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.io.atomic import atomic_path
from rapfast.profiling import section

DESTINATIONS = ("cpu", "pinned", "device")


class ViewBuffer:
    """[count, *shape], filled in parts.

    From a GPU to "cpu", parts go through two pinned buffers in turn, on a stream of their own, and on to the result by
    a thread: page faults make that slower than the GPU's copy, and the caller has the next part to launch. To "pinned"
    they go directly. Two parts are under way at most: the third `put` waits for the first. `finish` waits for all.

    Args:
        count, shape, dtype: of the result.
        device: where the parts are.
        destination: "cpu"; "pinned", page-locked so that a later copy to a GPU need not wait; "device", where the
            parts are. On a CPU all are the same.
    """

    def __init__(
        self, count: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device, destination: str = "cpu"
    ) -> None:
        check.choice("destination", destination, DESTINATIONS)
        self._on_gpu = device.type == "cuda" and destination != "device"
        self._staged = self._on_gpu and destination == "cpu"
        self._result = torch.empty(
            (count, *shape),
            dtype=dtype,
            device=device if destination == "device" else "cpu",
            pin_memory=self._on_gpu and not self._staged,
        )
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._mover = ThreadPoolExecutor(1, "rapfast-copy") if self._staged else None
        # Of the two parts under way: the pinned memory of each, and what waits until that is free.
        self._under_way: list[tuple[Tensor | None, Callable[[], object]] | None] = [None, None]
        self._turn = 0

    def put(self, places: Sequence[int], part: Tensor) -> None:
        """Take `part` [n, *shape] as the entries at n ascending `places`."""
        first = 0
        for i in range(1, len(places) + 1):
            if i == len(places) or places[i] != places[i - 1] + 1:
                self._put_range(slice(places[first], places[first] + i - first), part[first:i])
                first = i

    @section("wait for copies")
    def finish(self) -> Tensor:
        """The result, when all parts have arrived."""
        for turn in (self._turn, self._turn ^ 1):
            self._wait(turn)
        if self._mover is not None:
            self._mover.shutdown()
        return self._result

    def _put_range(self, where: slice, part: Tensor) -> None:
        if self._stream is None:
            self._result[where] = part
            return
        memory = self._wait(self._turn)
        if self._staged and (memory is None or len(memory) < len(part)):
            memory = torch.empty(part.shape, dtype=self._result.dtype, pin_memory=True, device="cpu")
        target = self._result[where] if memory is None else memory[: len(part)]
        self._stream.wait_stream(torch.cuda.current_stream(part.device))
        with torch.cuda.stream(self._stream):
            target.copy_(part, non_blocking=True)
            # Where it lets the host sleep, it wakes it half a millisecond late: the caller does not, the thread may.
            arrived = torch.cuda.Event(blocking=self._staged)
            arrived.record(self._stream)
        part.record_stream(self._stream)
        wait = arrived.synchronize if memory is None else self._mover.submit(self._move, where, target, arrived).result
        self._under_way[self._turn] = memory, wait
        self._turn ^= 1

    def _wait(self, turn: int) -> Tensor | None:
        """Until a part under way has arrived; gives its memory."""
        held, self._under_way[turn] = self._under_way[turn], None
        if held is None:
            return None
        memory, wait = held
        wait()
        return memory

    @section("move")
    def _move(self, where: slice, memory: Tensor, arrived: torch.cuda.Event) -> None:
        """In the thread: from pinned memory to the result. torch copies on all cores, which share the page faults."""
        arrived.synchronize()
        with torch.inference_mode(self._result.is_inference()):  # the mode is each thread's own
            self._result[where].copy_(memory)


def to_pixels(pictures: Tensor) -> Tensor:
    """[..., 3, h, w] with white at 1 -> uint8 [..., h, w, 3]: trunc(clamp(255 x + 0.5, 0, 255)); NaN is 0."""
    return (255 * pictures + 0.5).clamp(0, 255).nan_to_num(0).to(torch.uint8).movedim(-3, -1)


class PictureWriter:
    """Writes JPEGs of quality 100 on background threads. A context; leaving it waits for all of them.

    Args:
        folder: is made, with its parents, when the first picture comes.
        threads: how many write.
        waiting: pictures that may wait; `put` waits where there are as many.
    """

    def __init__(self, folder: str | Path, threads: int = 4, waiting: int = 64) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError:
            raise ImportError("JPEGs are written by pillow, which is not installed: pip install pillow") from None
        self.folder = Path(folder)
        self._count = check.integer("threads", threads, 1, 256)
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue(check.integer("waiting", waiting, 1, 1 << 20))
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None

    def put(self, name: str, pixels: Tensor) -> None:
        """Write `pixels`, uint8 [h, w, 3], as `name`.jpg. Raises what an earlier picture failed with."""
        self._raise()
        if not self._threads:
            self.folder.mkdir(parents=True, exist_ok=True)
            for _ in range(self._count):
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
        self._queue.put((name, np.ascontiguousarray(pixels.cpu().numpy())))

    def close(self) -> None:
        """Wait until all is written. Raises what a picture failed with."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._raise()

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
            return
        error, self._error = self._error, None
        try:
            self.close()
        except Exception as other:  # the one under way is the first
            self._error = error or other

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        from PIL import Image

        while (task := self._queue.get()) is not None:
            name, pixels = task
            try:
                with atomic_path(self.folder / f"{name}.jpg") as path:
                    Image.fromarray(pixels).save(path, format="JPEG", quality=100)
            except Exception as error:
                self._error = error
