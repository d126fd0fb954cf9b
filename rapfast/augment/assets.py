"""What is precomputed of a video, within a budget of memory: on the GPU, in pinned host memory, on disk.

Sets are rendered frame after frame, from the first to the last, again and again. A cache that keeps the latest frames
would then never hold the next one; so each frame has one place for good: the first frames on the device, the next in
host memory, the rest in files. What is not on the device is on its way there while the frames before it are rendered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rapfast import _check as check

from .provider import Motion

TIERS = ("device", "host", "disk")


class FrameShapes(NamedTuple):
    """Sizes of a frame's assets: N Gaussians, and a background of height x width pixels."""

    n_gaussians: int
    height: int
    width: int
    background_dtype: torch.dtype  # uint8, or float32

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n = self.n_gaussians
        return {
            "means": ((n, 3), torch.float32),
            "quats": ((n, 4), torch.float32),
            "scales": ((n, 3), torch.float32),
            "backgrounds": ((self.height, self.width, 3), self.background_dtype),
        }

    @property
    def n_bytes(self) -> int:
        """Of one frame."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in self.fields().values())


@dataclass(frozen=True, eq=False)
class Frames:
    """Consecutive frames on the device: `first` is the number of the first of F."""

    first: int
    means: Tensor  # [F, N, 3]
    quats: Tensor  # [F, N, 4]
    scales: Tensor  # [F, N, 3]
    backgrounds: Tensor  # [F, H, W, 3] uint8, or float32 in 0..1

    def __len__(self) -> int:
        return len(self.means)


@dataclass(frozen=True)
class Budget:
    """Bytes of each kind of memory; None: half of what is free on a GPU, a quarter of what is free on the host.

    `disk_dir` takes what fits in neither, in files without a name that vanish with the process; None: nothing does.
    """

    device: int | None = None
    host: int | None = None
    disk_dir: Path | None = None

    def resolved(self, device: torch.device) -> tuple[int, int]:
        """Bytes on the device and of host memory. On a CPU there is the host's memory alone."""
        host = self.host if self.host is not None else _free_host_bytes() // 4
        if device.type != "cuda":
            return host, 0
        return self.device if self.device is not None else _free_device_bytes(device) // 2, host


class FrameAssets:
    """Motion and backgrounds of all frames of a video. Fill it with `put`, then take `batches` as often as wanted.

    Args:
        n_frames, shapes: of the video.
        device: where frames are wanted.
        budget: how much of which memory. Of a CPU's two tiers of memory only the host's is used.

    Raises:
        ValueError: the budget is too small and there is no `disk_dir`.
        OSError: the disk is full; told before anything is computed.
    """

    def __init__(self, n_frames: int, shapes: FrameShapes, device: torch.device, budget: Budget) -> None:
        self.n_frames, self.shapes, self.device = n_frames, shapes, device
        counts = _placement(n_frames, shapes, budget.resolved(device), device.type, budget.disk_dir is not None)
        self.placement: dict[str, int] = dict(zip(TIERS, counts, strict=True))
        """How many frames each tier holds."""
        self._tiers: list[tuple[int, int, dict[str, Tensor]]] = []  # first frame, end, tensors
        first = 0
        for tier, count in self.placement.items():
            if count:
                self._tiers.append((first, first + count, self._allocate(tier, count, budget.disk_dir)))
                first += count

    def put(self, frame: int, motion: Motion, background: Tensor) -> None:
        """Keep a frame. Its tensors may be on any device."""
        first, _, tensors = next(tier for tier in self._tiers if tier[0] <= frame < tier[1])
        parts = {"means": motion.means, "quats": motion.quats, "scales": motion.scales, "backgrounds": background}
        for name, tensor in parts.items():
            tensors[name][frame - first].copy_(tensor)

    def batches(self, size: int) -> Iterator[Frames]:
        """All frames in order, up to `size` at a time, on the device.

        What is kept there is not copied. Other frames are copied on a stream of their own, one batch ahead.
        """
        check.integer("size", size, 1, 1 << 31)
        spans = [
            (begin, min(begin + size, end), first, tensors)
            for first, end, tensors in self._tiers
            for begin in range(first, end, size)
        ]
        copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if copying is not None:
            copying.wait_stream(torch.cuda.current_stream(self.device))  # what `put` has queued
        coming = self._send(spans[0], copying)
        for i in range(len(spans)):
            frames = coming
            if copying is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(copying)
                for tensor in (frames.means, frames.quats, frames.scales, frames.backgrounds):
                    tensor.record_stream(current)
            if i + 1 < len(spans):
                coming = self._send(spans[i + 1], copying)
            yield frames

    def _send(self, span: tuple[int, int, int, dict[str, Tensor]], stream: torch.cuda.Stream | None) -> Frames:
        begin, end, first, tensors = span
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            parts = {
                name: tensor[begin - first : end - first].to(self.device, non_blocking=True)
                for name, tensor in tensors.items()
            }
        return Frames(begin, **parts)

    def _allocate(self, tier: str, count: int, disk_dir: Path | None) -> dict[str, Tensor]:
        fields = self.shapes.fields().items()
        if tier == "disk":
            return {name: _on_disk(disk_dir, (count, *shape), dtype) for name, (shape, dtype) in fields}
        on_gpu = self.device.type == "cuda"
        return {
            name: torch.empty(
                (count, *shape), dtype=dtype, device=self.device if tier == "device" else "cpu",
                pin_memory=on_gpu and tier == "host",
            )
            for name, (shape, dtype) in fields
        }  # fmt: skip


def _placement(
    n_frames: int, shapes: FrameShapes, budgets: tuple[int, int], device_type: str, with_disk: bool
) -> tuple[int, int, int]:
    left, counts = n_frames, []
    for tier, budget in zip(TIERS, budgets, strict=False):
        pinned = tier == "host" and device_type == "cuda"
        counts.append(min(left, _pinned_frames(shapes, budget) if pinned else budget // max(1, shapes.n_bytes)))
        left -= counts[-1]
    if left and not with_disk:
        raise ValueError(
            f"{n_frames} frames of {shapes.n_bytes:,} bytes do not fit in a budget of {sum(budgets):,} bytes: allow "
            "more memory, or name a folder for the rest"
        )
    return counts[0], counts[1], left


def _pinned_frames(shapes: FrameShapes, budget: int) -> int:
    """Frames that fit: torch rounds the size of each page-locked tensor up to a power of two."""

    def taken(count: int) -> int:
        sizes = (count * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes.fields().values())
        return sum(1 << (size - 1).bit_length() for size in sizes if size)

    low, high = 0, budget // max(1, shapes.n_bytes)
    while low < high:  # taken(low) <= budget
        middle = (low + high + 1) // 2
        low, high = (middle, high) if taken(middle) <= budget else (low, middle - 1)
    return low


def _on_disk(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file that has no name any more: it vanishes with the process, however that ends."""
    n_bytes = dtype.itemsize * torch.Size(shape).numel()
    descriptor, path = tempfile.mkstemp(prefix=".rapfast-assets-", dir=folder)
    try:
        try:
            # All of its blocks at once: a full disk is an error here, and a signal that kills where memory is mapped.
            os.posix_fallocate(descriptor, 0, max(1, n_bytes))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                reason = os.strerror(error.errno)
                raise OSError(error.errno, f"{folder}: has no room for {n_bytes:,} bytes of frames: {reason}") from None
            raise
        return torch.from_file(path, shared=True, size=torch.Size(shape).numel(), dtype=dtype).reshape(shape)
    finally:
        os.close(descriptor)
        os.unlink(path)


def _free_device_bytes(device: torch.device) -> int:
    """With what torch keeps for reuse, such as the frames of the video before."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


_CGROUPS = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 and 1: the controller in /proc/self/cgroup, where its groups lie, their limit and use, and what
memory.stat calls those of the used pages that are files' and can be dropped."""


def _free_host_bytes(root: Path = Path("/")) -> int:
    """What can be had without swapping: what Linux says, and what the limits of a job's control groups leave, which
    end a process that goes beyond them."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = (root / "proc/meminfo").read_text(encoding="ascii")
        free = int(text.split("MemAvailable:")[1].split()[0]) << 10
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            for controller, place, limit, used, droppable in _CGROUPS:
                if controller in controllers.split(","):
                    group = root / place / name.lstrip("/")
                    for folder in (group, *group.parents):  # a limit holds for all groups below it
                        with contextlib.suppress(OSError, ValueError, IndexError):
                            left = int((folder / limit).read_text()) - int((folder / used).read_text())
                            stat = (folder / "memory.stat").read_text()
                            free = min(free, left + int(stat.split(f"{droppable} ")[1].split()[0]))
                        if folder == root / place:
                            break
    return max(0, free)
