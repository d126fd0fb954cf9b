"""The JSON of a profile: made from a profiler, written, read and checked. docs/profiling.md describes it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapfast.io.atomic import atomic_write
from rapfast.io.files import load_json, shorten
from rapfast.profiling import machine

if TYPE_CHECKING:
    from rapfast.profiling.profiler import Node, Profiler, Times

FORMAT = "rapfast profile 1"

_CLOCKS = ("host_ms", "gpu_ms")
_TIMES = ("total", "median", "min", "max")
_BYTES = ("peak", "rise", "after")


def make(profiler: Profiler, command: Sequence[str] = ()) -> dict[str, Any]:
    """The record of a profiler's sections."""
    return {
        "format": FORMAT,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "device": str(profiler.device),
        "runs": profiler.n_runs,
        "machine": machine.describe(profiler.device),
        "sections": [_section(node, profiler.n_runs) for node in profiler.nodes()],
    }


def _section(node: Node, n_runs: int) -> dict[str, Any]:
    return {
        "thread": node.thread,
        "path": list(node.path),
        "calls": max(node.calls, node.gpu.calls),
        "host_ms": _times(node.host, n_runs),
        "gpu_ms": _times(node.gpu, n_runs),
        "memory": node.memory or None,
        "counts": node.counts,
    }


def _times(times: Times, n_runs: int) -> dict[str, Any] | None:
    """None where there are none: stages of a native call have no host time, nothing has GPU time on the CPU."""
    if not times.calls:
        return None
    return {
        "total": times.total,
        "median": statistics.median(times.samples or [times.total / times.calls]),
        "min": times.smallest,
        "max": times.largest,
        "runs": [times.runs.get(run, 0.0) for run in range(n_runs)],
        "samples": times.samples,
    }


def save(record: dict[str, Any], path: str | Path) -> None:
    """Write a record, whole or not at all."""
    atomic_write(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def load(path: str | Path) -> dict[str, Any]:
    """Read a record that `save` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or no profile; says where it is wrong.
    """
    content = load_json(path)
    if reason := why_not(content):
        raise ValueError(f"{path}: is no profile of this version: {reason}")
    return content


def why_not(content: Any) -> str | None:
    """The first thing in which a JSON value differs from a record; None where it is one."""
    if not isinstance(content, dict):
        return f"it must be an object, got {_kind(content)}"
    if content.get("format") != FORMAT:
        return f'"format" must be {FORMAT!r}, got {content.get("format")!r}'
    for key, kind in (("time", str), ("command", list), ("device", str), ("runs", int), ("machine", dict),
                      ("sections", list)):  # fmt: skip
        if not isinstance(content.get(key), kind) or isinstance(content[key], bool):
            return f'"{key}" must be {_ARTICLES[kind]}, got {_kind(content.get(key))}'
    if content["runs"] < 1:
        return f'"runs" must be at least 1, got {content["runs"]}'
    about = content["machine"]
    if not isinstance((about.get("gpu") or about.get("cpu") or {}).get("name"), str):
        return '"machine" names neither a GPU nor a processor'
    for place, entry in enumerate(content["sections"]):
        if reason := _why_no_section(entry, content["runs"]):
            return f"sections[{place}]: {reason}"
    return None


_ARTICLES = {str: "a string", list: "an array", int: "a whole number", dict: "an object"}


def _kind(value: Any) -> str:
    return "nothing" if value is None else shorten(value)


def _why_no_section(entry: Any, n_runs: int) -> str | None:
    if not isinstance(entry, dict):
        return f"must be an object, got {_kind(entry)}"
    path = entry.get("path")
    if not (isinstance(path, list) and path and all(isinstance(name, str) for name in path)):
        return f'"path" must be the names of the sections around it and its own, got {_kind(path)}'
    if not isinstance(entry.get("thread"), str):
        return f'"thread" must be a string, got {_kind(entry.get("thread"))}'
    calls = entry.get("calls")
    if not isinstance(calls, int) or isinstance(calls, bool) or calls < 0:
        return f'"calls" must be a whole number, got {_kind(calls)}'
    for clock in _CLOCKS:
        times = entry.get(clock)
        if times is None:
            continue
        if not isinstance(times, dict):
            return f'"{clock}" must be an object or null, got {_kind(times)}'
        for key in _TIMES:
            if not _is_time(times.get(key)):
                return f'"{clock}.{key}" must be a number >= 0, got {_kind(times.get(key))}'
        for key in ("runs", "samples"):
            if not (isinstance(times.get(key), list) and all(map(_is_time, times[key]))):
                return f'"{clock}.{key}" must be an array of numbers >= 0, got {_kind(times.get(key))}'
        if len(times["runs"]) != n_runs:
            return f'"{clock}.runs" must hold one number for each of {n_runs} runs, got {len(times["runs"])}'
    memory = entry.get("memory")
    if memory is not None:
        uses = memory.values() if isinstance(memory, dict) else [None]
        if not all(isinstance(use, dict) and all(isinstance(use.get(key), int) for key in _BYTES) for use in uses):
            return f'"memory" must hold {", ".join(_BYTES)} in bytes, got {_kind(memory)}'
    return None


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
