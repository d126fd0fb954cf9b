"""`Profiler`: host and GPU time, memory and counts of named sections, and of the stages inside a native call."""

from __future__ import annotations

import functools
import inspect
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from rapfast.profiling.memory import Use, Watch

NATIVE_STAGES = ("project", "bin", "color", "blend", "composite")
"""Of one native call on a GPU, in the order in which it runs them."""

MAX_SAMPLES = 1024
"""Calls of a section whose own times are kept; of more, every second, every fourth ..."""

MAX_PENDING = 4096
"""GPU times that may wait to be read before somebody looks which are there."""

_current: Profiler | None = None

Function = TypeVar("Function", bound=Callable[..., Any])


class section:  # noqa: N801 used as a statement: with section("load"): ...
    """A named part of a program, as a context or as a decorator. Names nest.

        with section("load"):
            scene = load_scene(path)

        @section("draw")
        def draw(...): ...

    It reports to the running profiler. Where none runs it does nothing, in well under a microsecond.
    """

    __slots__ = ("_profiler", "name")

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        profiler = _current
        if profiler is not None and torch.compiler.is_compiling():
            profiler = None  # what is traced is not run
        self._profiler = profiler
        if profiler is not None:
            profiler._begin(self.name)

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._profiler._end()

    def __call__(self, function: Function) -> Function:
        """The function as a section.

        Raises:
            TypeError: its body runs only after it has returned, as a generator's or a coroutine's does.
        """
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise TypeError(
                f"{function.__qualname__} returns before its body runs, so as a decorator section({self.name!r}) would "
                "time nothing: use it as a context inside"
            )
        name = self.name

        @functools.wraps(function)
        def inside(*arguments: Any, **options: Any) -> Any:
            if _current is None or torch.compiler.is_compiling():
                return function(*arguments, **options)
            with section(name):
                return function(*arguments, **options)

        return inside


def current() -> Profiler | None:
    """The running profiler."""
    return _current


def count(name: str, n: float = 1) -> None:
    """Add `n` to a count of the innermost open section of this thread, such as count("views", 8)."""
    if _current is not None and not torch.compiler.is_compiling():
        _current.count(name, n)


def native_stages(device: int) -> NativeStages | None:
    """For a native call on that GPU: events to record between its stages; None where nobody asks for them."""
    return None if _current is None else _current._native_stages(device)


class Times:
    """Milliseconds of a section on one clock."""

    __slots__ = ("_run", "_skipped", "_stride", "calls", "largest", "runs", "samples", "smallest", "total")

    def __init__(self) -> None:
        self.calls, self.total = 0, 0.0
        self.smallest, self.largest = float("inf"), 0.0
        self.samples: list[float] = []  # single calls, in order
        self.runs: dict[int, float] = {}  # sums over the calls of each run, by its number
        self._stride, self._skipped = 1, 0

    def add(self, ms: float, run: int) -> None:
        self.calls += 1
        self.total += ms
        self.smallest, self.largest = min(self.smallest, ms), max(self.largest, ms)
        self.runs[run] = self.runs.get(run, 0.0) + ms
        self._skipped += 1
        if self._skipped < self._stride:
            return
        self._skipped = 0
        self.samples.append(ms)
        if len(self.samples) == MAX_SAMPLES:
            self.samples = self.samples[1::2]
            self._stride *= 2


class Node:
    """All calls of a section at one place, which is a thread and the names of the sections around it, its own last."""

    __slots__ = ("calls", "counts", "gpu", "host", "memory", "path", "thread")

    def __init__(self, thread: str, path: tuple[str, ...]) -> None:
        self.thread, self.path = thread, path
        self.calls = 0
        self.host, self.gpu = Times(), Times()
        self.counts: dict[str, float] = {}
        # by "gpu" and "host", bytes: peak (largest of any call), rise (largest above a call's begin), after (the last)
        self.memory: dict[str, dict[str, int]] = {}


class _Frame:
    """An open section."""

    __slots__ = ("begin", "contexts", "memory", "node", "start")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.contexts: ExitStack | None = None
        self.memory: dict[str, Use] | None = None
        self.begin: torch.cuda.Event | None = None


class NativeStages:
    """Events of one native call, whose times are those of `NATIVE_STAGES`."""

    def __init__(self, profiler: Profiler, nodes: list[Node], events: list[torch.cuda.Event]) -> None:
        self._profiler, self._nodes, self._events = profiler, nodes, events

    @property
    def handles(self) -> list[int]:
        """Of the events, as CUDA knows them: one before each stage and one after the last."""
        return [event.cuda_event for event in self._events]

    def done(self) -> None:
        """The call has recorded all of them."""
        self._profiler._add_pending(self._nodes, self._events)


class Profiler:
    """Collects what sections report while a `with` block runs. One runs at a time, for all threads of the process.

    Args:
        device: whose time and memory are measured beside the host's: a torch device or its name. None: the current GPU
            where there is one, else the CPU.
        memory: memory in use and its peaks, per section; some 0.1 ms each.
        stages: the stages inside native calls on the GPU. A call whose stages are timed is launched kernel by kernel,
            never as a CUDA graph, so short calls take a few microseconds more.
        nvtx: ranges for NVIDIA's tools; None: where there is a GPU.
        trace: a file for torch's profiler to write a Chrome trace to, .json or .json.gz: sections, operators of the
            thread that runs the block, kernels.
        enabled: False does nothing at all.

    On a GPU a section's two times are those between two moments of the host and between two events on the stream that
    is current where it begins and ends: kernels are launched ahead of time, so a section may be over on the host
    before the GPU begins with it. Nothing waits for the GPU until the block ends or a time is asked for.

    Sections of a thread nest within one another; those of another thread than the block's stand under its name without
    its number, so that a pool's threads are added up.

    Raises:
        RuntimeError: another one is running.
        ValueError: the device does not exist.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        memory: bool = False,
        stages: bool = True,
        nvtx: bool | None = None,
        trace: str | Path | None = None,
        enabled: bool = True,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be a CPU or CUDA device, got {self.device}")
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f"device is {self.device}, and torch {torch.__version__} sees no CUDA device")
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
        if trace is not None and not str(trace).endswith((".json", ".json.gz")):
            raise ValueError(f"trace must be a file .json or .json.gz, got {str(trace)!r}")
        self.enabled = enabled
        self.with_memory, self.with_stages = memory, stages
        self._on_gpu = self.device.type == "cuda"
        self._nvtx = self._on_gpu if nvtx is None else nvtx and torch.cuda.is_available()
        self._trace, self._torch_profiler = trace, None
        self._nodes: dict[tuple[str, tuple[str, ...]], Node] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._pending: list[tuple[list[Node], list[torch.cuda.Event], int]] = []
        self._spare: list[torch.cuda.Event] = []
        self._enough = MAX_PENDING
        self._run, self._runs_marked = 0, 0
        self._watch: Watch | None = None
        self.running = False

    # --- the block ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Profiler:
        global _current
        if not self.enabled:
            return self
        if _current is not None:
            raise RuntimeError("a profiler is running already: its block must end before another begins")
        self._watch = Watch(self.device) if self.with_memory else None
        self._home = threading.current_thread().name
        if self._trace is not None:
            from rapfast.io.atomic import check_writable

            check_writable(self._trace)
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self._on_gpu else []
            self._torch_profiler = torch.profiler.profile(activities=kinds)
            self._torch_profiler.__enter__()
        self.running, _current = True, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        if not self.running:
            return
        self.running, _current = False, None
        if self._on_gpu and kind is None:
            self._read_pending(wait=True)
        if self._torch_profiler is not None:
            self._torch_profiler.__exit__(kind, error, trace)
            if kind is None:
                from rapfast.io.atomic import atomic_path

                with atomic_path(self._trace) as path:
                    self._torch_profiler.export_chrome_trace(str(path))

    @contextmanager
    def run(self) -> Iterator[None]:
        """One of several repetitions of the same work: times are also added up for each, and their spread tells how
        far a later comparison may trust them."""
        self._runs_marked += 1
        self._run = self._runs_marked - 1
        yield

    def section(self, name: str) -> section:
        """`section(name)`, for who has the profiler at hand: it reports to the one that runs."""
        return section(name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Sections that begin in this block, in any thread, are not looked at."""
        global _current
        _current = None
        try:
            yield
        finally:
            _current = self if self.running else None

    def count(self, name: str, n: float = 1) -> None:
        """Add `n` to a count of the innermost open section of this thread."""
        stack = self._stack()
        if stack and self.running:
            counts = stack[-1].node.counts
            with self._lock:
                counts[name] = counts.get(name, 0) + n

    # --- sections ----------------------------------------------------------------------------------------------------

    def _stack(self) -> list[_Frame]:
        try:
            return self._local.stack
        except AttributeError:
            name = threading.current_thread().name
            self._local.thread = "main" if name == self._home else re.sub(r"[-_ ]*\d+(?: \(.*\))?$", "", name) or name
            self._local.stack = []
            return self._local.stack

    def _node(self, stack: Sequence[_Frame], name: str) -> Node:
        path = (*stack[-1].node.path, name) if stack else (name,)
        key = self._local.thread, path
        with self._lock:
            return self._nodes.setdefault(key, Node(*key))

    def _begin(self, name: str) -> None:
        stack = self._stack()
        frame = _Frame(self._node(stack, name))
        stack.append(frame)
        if self._nvtx or self._torch_profiler is not None:
            frame.contexts = ExitStack()
            if self._torch_profiler is not None:
                frame.contexts.enter_context(torch.profiler.record_function(name))
            if self._nvtx:
                torch.cuda.nvtx.range_push(name)
                frame.contexts.callback(torch.cuda.nvtx.range_pop)
        if self._watch is not None:
            frame.memory = self._watch.begin()
        if self._on_gpu and not torch.cuda.is_current_stream_capturing():
            frame.begin = self._event()
            frame.begin.record(torch.cuda.current_stream(self.device))
        frame.start = time.perf_counter_ns()

    def _end(self) -> None:
        end = time.perf_counter_ns()
        frame = self._stack().pop()
        node, run = frame.node, self._run
        if frame.begin is not None and self.running and not torch.cuda.is_current_stream_capturing():
            event = self._event()
            event.record(torch.cuda.current_stream(self.device))
            self._add_pending([node], [frame.begin, event])
        after = None if frame.memory is None else self._watch.end(frame.memory)
        if frame.contexts is not None:
            frame.contexts.close()
        if not self.running:  # the block ended while this was open, in another thread
            return
        with self._lock:
            node.calls += 1
            node.host.add((end - frame.start) / 1e6, run)
            for kind, use in (frame.memory or {}).items():
                known = node.memory.setdefault(kind, {"peak": 0, "rise": 0, "after": 0})
                known["peak"] = max(known["peak"], use.peak)
                known["rise"] = max(known["rise"], use.peak - use.before)
                known["after"] = after.get(kind, 0)

    # --- the GPU's times ---------------------------------------------------------------------------------------------

    def _native_stages(self, device: int) -> NativeStages | None:
        if not (self.with_stages and self._on_gpu and device == self.device.index):
            return None
        if torch.cuda.is_current_stream_capturing():
            return None
        stack = self._stack()
        nodes = [self._node(stack, name) for name in NATIVE_STAGES]
        return NativeStages(self, nodes, [self._event() for _ in range(len(NATIVE_STAGES) + 1)])

    def _event(self) -> torch.cuda.Event:
        try:
            return self._spare.pop()
        except IndexError:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))  # creates it
            return event

    def _add_pending(self, nodes: list[Node], events: list[torch.cuda.Event]) -> None:
        with self._lock:
            self._pending.append((nodes, events, self._run))
            full = len(self._pending) >= self._enough
        if full:
            self._read_pending(wait=False)

    def _read_pending(self, wait: bool) -> None:
        """Turn events into times: all of them, or those that the GPU has passed."""
        with self._lock:
            pending, self._pending = self._pending, []
            for nodes, events, run in pending:
                if wait:
                    events[-1].synchronize()
                elif not events[-1].query():
                    self._pending.append((nodes, events, run))
                    continue
                for node, begin, end in zip(nodes, events, events[1:], strict=False):
                    # Streams that are not in order with one another may end before they begin.
                    node.gpu.add(max(0.0, begin.elapsed_time(end)), run)
                self._spare += events
            self._enough = max(MAX_PENDING, 2 * len(self._pending))  # so that a slow GPU is not asked again and again

    # --- what was found ----------------------------------------------------------------------------------------------

    @property
    def n_runs(self) -> int:
        """How many repetitions `run` marked; 1 where it was not used."""
        return max(1, self._runs_marked)

    def nodes(self) -> list[Node]:
        """All sections, in the order in which they were first begun, each behind the one it is in."""
        self._read_pending(wait=True)
        with self._lock:
            known = list(self._nodes.values())
        order = {(node.thread, node.path): place for place, node in enumerate(known)}

        def place(node: Node) -> tuple[Any, ...]:
            parts = [order.get((node.thread, node.path[: i + 1]), 0) for i in range(len(node.path))]
            return (node.thread != "main", node.thread, *parts)

        return sorted(known, key=place)

    def run_ms(self, name: str) -> list[float]:
        """What all sections of a name took in each run, milliseconds: on the GPU where that was measured, else on the
        host. 0 in a run that did not come to them."""
        total = [0.0] * self.n_runs
        for node in self.nodes():
            if node.path[-1] == name:
                for run, ms in (node.gpu if node.gpu.calls else node.host).runs.items():
                    total[run] += ms
        return total

    def record(self, command: Sequence[str] = ()) -> dict[str, Any]:
        """What was found, as the JSON of `save` holds it."""
        from rapfast.profiling import records

        return records.make(self, command)

    def save(self, path: str | Path, command: Sequence[str] = ()) -> None:
        """Write the record as JSON, whole or not at all; docs/profiling.md describes it."""
        from rapfast.profiling import records

        records.save(self.record(command), path)

    def print_table(self) -> None:
        """The sections as a table, on stdout."""
        from rapfast.profiling.table import print_table

        print_table(self.record())
