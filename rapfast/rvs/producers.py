"""Background producers of batches: a thread, or a spawned process, that stays a few batches ahead of its consumer.

Both work on credits. A producer begins a batch only when it holds one, and the consumer gives one back for each batch
that it takes, so that never more than `depth` batches are finished or under way. Nothing here polls or times out: a
thread that is to stop is woken by one more credit, a process that has lost its consumer by the end of its pipe.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class Source(Protocol):
    """What renders the batches."""

    device: torch.device

    def batches(self, epoch: int, at_once: int) -> Iterator[list[Batch]]:
        """Batches from the first one of `epoch` on, without end, 1 to `at_once` at a time; on `device` or the CPU."""
        ...


class Producer(Protocol):
    """A running producer."""

    def get(self) -> Batch:
        """The next batch, on the consumer's device and ready for its current stream.

        Raises:
            RuntimeError: it could not be made; has the traceback.
        """
        ...

    def stop(self) -> None:
        """End it, wait for that, and free what it holds. May be called twice, and from any thread."""
        ...


def together(depth: int) -> int:
    """How many batches are made at once: while the others of `depth` are used."""
    return max(1, depth // 2)


def _failure(trace: str) -> RuntimeError:
    return RuntimeError(f"the views could not be made; in the background:\n\n{trace.rstrip()}")


# --- a thread of this process -------------------------------------------------------------------------------------


class ThreadProducer:
    """Batches of `source` from `epoch` on, made by a thread; on GPUs on streams of its own, of the lowest priority."""

    def __init__(self, source: Source, epoch: int, depth: int, out: torch.device) -> None:
        self._credits: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopping = threading.Event()
        for _ in range(depth):
            self._credits.put(True)
        # A daemon, so that it is stopped by an exit handler rather than waited for before those run.
        before = _events(source.device, out)
        arguments = (source, epoch, together(depth), out, before, self._credits, self._stopping, self._ready)
        self._thread = threading.Thread(target=_work, args=arguments, name="rapfast-views", daemon=True)
        self._thread.start()

    def get(self) -> Batch:
        item = self._ready.get()
        if isinstance(item, tuple) and isinstance(item[0], BaseException):
            raise _failure(item[1]) from item[0]
        self._credits.put(True)
        batch, done = item
        if done is not None:
            stream = torch.cuda.current_stream(batch["image"].device)
            stream.wait_event(done)
            for tensor in batch.values():
                tensor.record_stream(stream)
        return batch

    def stop(self) -> None:
        self._stopping.set()
        self._credits.put(True)  # wakes it
        if threading.current_thread() is not self._thread:  # a garbage collection may run in any thread
            self._thread.join()


def _events(*devices: torch.device) -> list[Any]:
    """What the calling thread has under way on GPUs, which the producer's first batch must wait for."""
    return [torch.cuda.current_stream(d).record_event() for d in dict.fromkeys(devices) if d.type == "cuda"]


@torch.no_grad()
def _work(
    source: Source, epoch: int, at_once: int, out: torch.device, before: list[Any], credits: queue.SimpleQueue[bool],
    stopping: threading.Event, ready: queue.SimpleQueue[Any],
) -> None:  # fmt: skip
    held = 0
    try:
        with _streams(source.device, out) as streams, contextlib.closing(source.batches(epoch, at_once)) as groups:
            for stream in streams:
                for event in before:
                    stream.wait_event(event)
            while credits.get() and not stopping.is_set():
                held += 1
                if held < at_once:
                    continue
                group = next(groups)
                held -= len(group)
                for made in group:
                    batch = {name: tensor.to(out, non_blocking=True) for name, tensor in made.items()}
                    done = None
                    if out.type == "cuda":
                        done = torch.cuda.current_stream(out).record_event()
                    elif streams:
                        streams[0].synchronize()
                    ready.put((batch, done))
                del group, made, batch  # the consumer's alone
    except BaseException as error:  # whatever it is, the consumer waits for an answer
        ready.put((error, traceback.format_exc()))


@contextlib.contextmanager
def _streams(device: torch.device, out: torch.device) -> Iterator[list[torch.cuda.Stream]]:
    """Streams of this thread's own on both devices, that of `device` first; all is done on them when it ends."""
    gpus = [d for d in dict.fromkeys([device, out]) if d.type == "cuda"]
    streams = [torch.cuda.Stream(d, priority=0) for d in gpus]
    with contextlib.ExitStack() as stack:
        for stream in reversed(streams):  # the last one entered sets the current device
            stack.enter_context(torch.cuda.stream(stream))
        try:
            yield streams
        finally:
            for stream in streams:
                stream.synchronize()


# --- another process ----------------------------------------------------------------------------------------------


class ProcessProducer:
    """Batches of `source` from `epoch` on, made by a spawned process and handed over in shared memory.

    Args:
        source: sent by pickle, so without GPU memory of this process.
        like: a batch of the largest size, for the shared memory's shapes.
        out: where `get` puts the batches.
        pinned: whether a GPU reads or writes the shared memory, which is then page-locked.

    Raises:
        TypeError: the source cannot be pickled.
    """

    def __init__(self, source: Source, epoch: int, depth: int, like: Batch, out: torch.device, pinned: bool) -> None:
        try:
            payload = pickle.dumps(source)
        except Exception as error:  # whatever a sampler's own reduction raises
            raise TypeError(
                'where="process" sends scene, sampler and feature maps to another process, and they cannot be '
                f"pickled: {error}"
            ) from error
        self._out = out
        # One more than may be ahead: the consumer may still be copying out of it.
        self._slots = [{name: _shared(tensor) for name, tensor in like.items()} for _ in range(depth + 1)]
        self._pinned: list[Tensor] = []
        self._copying: tuple[int, Any] | None = None
        self._lock = threading.RLock()
        context = torch.multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._slots, epoch, together(depth), pinned, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, name="rapfast-views", daemon=True)
        try:
            if pinned:
                self._pinned = _page_lock([slot["image"] for slot in self._slots])
            self._process.start()
            theirs.close()  # its end alone is left, so that its death is the end of the pipe
            self._pipe.send_bytes(payload)
            for slot in range(depth):
                self._pipe.send(slot)
        except BaseException as error:
            self.stop()
            if isinstance(error, BrokenPipeError):
                raise self._death() from None
            raise
        self._free = depth

    def get(self) -> Batch:
        try:
            message = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if isinstance(message, str):
            raise _failure(message)
        slot, count = message
        shared = {name: tensor[:count] for name, tensor in self._slots[slot].items()}
        if self._out.type == "cuda":
            batch = {name: tensor.to(self._out, non_blocking=True) for name, tensor in shared.items()}
            done = torch.cuda.current_stream(self._out).record_event()
        else:
            batch, done = {name: tensor.clone() for name, tensor in shared.items()}, None
        # This slot is still being copied out of; the spare one goes back for it.
        if self._copying is not None:
            self._free, event = self._copying
            if event is not None:
                event.synchronize()
        self._copying = slot, done
        with contextlib.suppress(BrokenPipeError):  # the next call says why
            self._pipe.send(self._free)
        return batch

    def stop(self) -> None:
        with self._lock:
            if self._process.pid is not None and self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._pipe.close()
            _page_unlock(self._pinned)
            self._slots.clear()

    def _death(self) -> RuntimeError:
        self._process.join()
        return RuntimeError(
            f"the process that renders views has died with exit code {self._process.exitcode}; where it could not "
            'start at all, the main script lacks an `if __name__ == "__main__":`'
        )


@torch.no_grad()
def _serve(pipe: Any, slots: list[Batch], epoch: int, at_once: int, pinned: bool, threads: int) -> None:
    """The process: reads the source, then the numbers of free slots, and fills those."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the consumer, whose end is ours
    torch.set_num_threads(threads)
    try:
        source: Source = pickle.loads(pipe.recv_bytes())
        if pinned:
            _page_lock([slot["image"] for slot in slots])
        free: list[int] = []
        with contextlib.closing(source.batches(epoch, at_once)) as groups:
            while True:
                free.append(pipe.recv())
                if len(free) < at_once:
                    continue
                for batch in next(groups):
                    slot, count = free.pop(0), len(batch["image"])
                    for name, tensor in batch.items():
                        slots[slot][name][:count].copy_(tensor, non_blocking=True)
                    if source.device.type == "cuda":
                        torch.cuda.current_stream(source.device).synchronize()
                    pipe.send((slot, count))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the consumer is gone
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send(traceback.format_exc())


def _shared(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu").share_memory_()


def _page_lock(tensors: list[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        torch.cuda.check_error(
            int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 1))
        )
    return tensors


def _page_unlock(tensors: list[Tensor]) -> None:
    while tensors:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(tensors.pop().data_ptr())))
