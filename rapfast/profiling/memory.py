"""How much memory is in use, and the most that was: of the process, and of torch's allocator on a GPU."""

from __future__ import annotations

import ctypes
import re
import threading
from typing import Any

import torch

_STATUS, _CLEAR = "/proc/self/status", "/proc/self/clear_refs"


def host_bytes(field: str = "VmRSS") -> int | None:
    """The process's resident memory, or with "VmHWM" the most since `reset_host_peak`; None but on Linux."""
    try:
        with open(_STATUS, "rb") as file:
            found = re.search(rb"^%s:\s+(\d+) kB" % field.encode(), file.read(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])


def reset_host_peak() -> bool:
    """The high-water mark falls to the present size; False where the system does not let a process do that."""
    try:
        with open(_CLEAR, "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def release_free_pages() -> bool:
    """glibc gives back what it keeps for reuse, whose next use would not be seen; False where there is no glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


class Use:
    """Memory of one kind during one section, bytes: in use at its begin, and the most so far."""

    __slots__ = ("before", "peak")

    def __init__(self, before: int) -> None:
        self.before = self.peak = before


class Watch:
    """Peaks of all open sections, of any thread.

    There is one high-water mark for the process and one for the GPU's allocator. At each begin and end of a section it
    is read, noted for every section that is open, and set back to the present size: so a section's peak is its own,
    whatever is nested in it or runs beside it. `torch.cuda.max_memory_allocated` is therefore not the caller's while
    one watches.

    Args:
        device: whose memory is watched beside the process's, where it is a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        if self._gpu is not None:
            torch.cuda.init()  # there are no peaks to set back before
        self._host = host_bytes() is not None and reset_host_peak()
        self._open: list[dict[str, Use]] = []
        self._lock = threading.Lock()

    def begin(self) -> dict[str, Use]:
        """Memory from now on, by "gpu" and "host", as far as it can be known."""
        with self._lock:
            self._note()
            opened = {kind: Use(now) for kind, now in self._now().items()}
            self._open.append(opened)
        return opened

    def end(self, opened: dict[str, Use]) -> dict[str, int]:
        """Bytes in use at the end of what `begin` gave, whose peaks are final now."""
        with self._lock:
            self._note()
            self._open = [other for other in self._open if other is not opened]
            return self._now()

    def _now(self) -> dict[str, int]:
        found: dict[str, Any] = {}
        if self._gpu is not None:
            found["gpu"] = torch.cuda.memory_allocated(self._gpu)
        if self._host:
            found["host"] = host_bytes()
        return {kind: value for kind, value in found.items() if value is not None}

    def _note(self) -> None:
        peaks: dict[str, int] = {}
        if self._gpu is not None:
            peaks["gpu"] = torch.cuda.max_memory_allocated(self._gpu)
            torch.cuda.reset_peak_memory_stats(self._gpu)
        if self._host:
            peaks["host"] = host_bytes("VmHWM") or 0
            reset_host_peak()
        for opened in self._open:
            for kind, use in opened.items():
                use.peak = max(use.peak, peaks.get(kind, 0))
