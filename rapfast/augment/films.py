"""Films being written while others are rendered: frames on their way to the host, an encoder for each set.

A batch of frames is copied from the GPU into page-locked memory on a stream of its own; each set's thread waits for it
there, takes its frames and encodes them. PyAV gives up the interpreter's lock while it encodes, so the threads, and
those of x264 below them, use all cores while the main thread launches the next batch.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from rapfast.media import VideoWriter, write_png

SLOTS = 3
"""Batches on their way: one being copied, one being encoded, one between."""


@dataclass(frozen=True)
class FilmOptions:
    """How films are written: x264's constant rate factor, preset and threads for one film, whose number is fixed so
    that a film's bytes do not depend on how many are written beside it."""

    quality: int = 18
    preset: str = "veryfast"
    threads: int = 4
    pngs: bool = False  # also each frame, as frames/000000.png


class _Slot:
    """Page-locked memory for one batch of frames, until every film has taken its own."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}
        self.arrived: torch.cuda.Event | None = None
        self._readers = 0
        self._lock = threading.Lock()

    def fill(self, parts: dict[str, Tensor], stream: torch.cuda.Stream | None, readers: int) -> None:
        self._readers = readers
        if stream is None:
            self.memory = {name: part.cpu() for name, part in parts.items()}
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for name, part in parts.items():
                memory = self.memory.get(name)
                if memory is None or memory.numel() < part.numel():
                    self.memory[name] = torch.empty(part.numel(), dtype=part.dtype, pin_memory=True, device="cpu")
                self.memory[name][: part.numel()].view(part.shape).copy_(part, non_blocking=True)
                part.record_stream(stream)
            # Threads wait for it, which may sleep: the main thread needs its core.
            self.arrived = torch.cuda.Event(blocking=True)
            self.arrived.record(stream)

    def frames(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """A part of the batch; waits until it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.memory[name].reshape(-1)[: int(np.prod(shape))].view(tuple(shape)).numpy()

    def done(self) -> bool:
        """One reader has finished; True for the last."""
        with self._lock:
            self._readers -= 1
            return self._readers == 0


@dataclass(frozen=True)
class FilmTarget:
    """Where a set's film goes, and what is to be called once it is there (in the film's own thread)."""

    path: Path
    finished: Callable[[], None]


class Films:
    """The films of some sets of one video, written side by side. A context: leaving it waits until all are finished;
    leaving it by an exception leaves none, and what was there before.

        with Films(targets, 512, 512, 30.0, device, options) as films:
            films.add(pictures)                   # [F, S, 3, H, W]: the next F frames of S films

    Raises:
        OSError, ValueError: by `add` or on leaving, what a film failed with.
    """

    def __init__(
        self, targets: Sequence[FilmTarget], width: int, height: int, fps: float, device: torch.device,
        options: FilmOptions,
    ) -> None:  # fmt: skip
        self._targets, self._options = targets, options
        self._size = width, height
        self._fps = fps
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: queue.Queue[_Slot] = queue.Queue()
        for _ in range(SLOTS):
            self._free.put(_Slot())
        self._queues: list[queue.Queue] = [queue.Queue() for _ in targets]
        self._errors: list[BaseException] = []
        self._aborted = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"rapfast-film-{i}", daemon=True)
            for i in range(len(targets))
        ]

    def __enter__(self) -> Films:
        for thread in self._threads:
            thread.start()
        return self

    def add(self, planes: Tensor, pixels: Tensor | None = None) -> None:
        """The next F frames of the S films: planes [F, S, 3/2 h, w] of `to_yuv420`, and for PNGs pixels uint8
        [F, S, H, W, 3]. Waits where the films are `SLOTS` batches behind."""
        slot = self._take_slot()
        parts = {"planes": planes} if pixels is None else {"planes": planes, "pixels": pixels}
        slot.fill(parts, self._stream, len(self._targets))
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        for waiting in self._queues:
            waiting.put((slot, shapes))

    def _take_slot(self) -> _Slot:
        while True:
            if self._errors:
                raise self._errors[0]
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=0.2)

    def _work(self, index: int) -> None:
        target = self._targets[index]
        try:
            with VideoWriter(
                target.path, *self._size, self._fps, self._options.quality, preset=self._options.preset,
                threads=self._options.threads, fragmented=True, reproducible=True, chroma_between=True,
            ) as film:  # fmt: skip
                while (item := self._queues[index].get()) is not None:
                    self._write(film, index, *item)
                if self._aborted.is_set():
                    raise _AbortedError
            target.finished()
        except _AbortedError:
            pass
        except BaseException as error:  # told by the next `add`, or on leaving
            self._errors.append(_told(error, target.path))

    def _write(self, film: VideoWriter, index: int, slot: _Slot, shapes: dict[str, tuple[int, ...]]) -> None:
        try:
            if self._aborted.is_set():
                raise _AbortedError
            planes = slot.frames("planes", shapes["planes"])
            pixels = slot.frames("pixels", shapes["pixels"]) if "pixels" in shapes else None
            for f in range(len(planes)):
                if pixels is not None:
                    write_png(png_folder(film.path) / f"{film.frames:06d}.png", pixels[f, index])
                film.add_yuv(planes[f, index])
        finally:
            if slot.done():
                self._free.put(slot)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._aborted.set()
        for waiting in self._queues:
            waiting.put(None)
        try:
            for thread in self._threads:
                thread.join()
        except BaseException:  # interrupted while it waits
            self._aborted.set()
            for thread in self._threads:
                thread.join()
            raise
        if kind is None and self._errors:
            raise self._errors[0]


class _AbortedError(Exception):
    """Leaves a film without keeping it."""


def png_folder(film: Path) -> Path:
    """Where a film's frames go as PNGs."""
    return film.parent / "frames"


def _told(error: BaseException, path: Path) -> BaseException:
    """What FFmpeg says of a full disk, as a sentence with the film's name."""
    if isinstance(error, OSError) and error.errno and str(path) not in str(error):
        reason = os.strerror(error.errno)
        return OSError(error.errno, f"{path}: could not be written: {reason}; what was there before is kept")
    return error
