"""The operator library and what every operator needs to call the native module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rapfast._native import _C

LIBRARY = torch.library.Library("rapfast", "DEF")

TILE_SIZE = 16
"""Pixels per tile side, as compiled into the native module."""

RECORD_FIELDS = ("x", "y", "conic_a", "conic_b", "conic_c", "opacity", "depth", "compensation")
"""Columns of a records tensor [M, 8], the fields of ``Record`` in csrc/math/gaussian.h."""


_uncompiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.disable(function)``, made when a compiler first comes by: it loads the compiler, which takes as
    long as loading torch. (Of functools.cache a compiler warns.)"""
    if function not in _uncompiled:
        _uncompiled[function] = torch.compiler.disable(function)
    return _uncompiled[function]


def define(
    schema: str, *, fake: Callable, cpu: Callable | None = None, cuda: Callable | None = None
) -> torch._ops.OpOverload:
    """Registers an operator with its implementations and its shape-only one, and returns it."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    if cpu is not None:
        LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"rapfast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rapfast, name).default


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's memory, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def cpu_arguments(tensor: Tensor) -> dict[str, int]:
    """What every CPU stage takes: floating type and number of threads."""
    return {"bits": 64 if tensor.dtype == torch.float64 else 32, "threads": torch.get_num_threads()}


def cuda_arguments(tensor: Tensor) -> dict[str, int]:
    """What every CUDA stage takes: the device of the tensor and the caller's stream there."""
    device = tensor.get_device()
    return {"device": device, "stream": current_stream(device)}


def current_stream(device: int) -> int:
    """The caller's stream on a CUDA device, as the native module takes it."""
    return torch.cuda.current_stream(device).cuda_stream


# The same without an object made for each question, which takes longer than a launch.
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", current_stream)


def scratch(tensor: Tensor, size: int) -> Tensor:
    """Uninitialised bytes beside ``tensor``."""
    return tensor.new_empty(size, dtype=torch.uint8)


def aligned(tensor: Tensor | None) -> Tensor | None:
    """The tensor, at an address that 16-byte loads may use: a slice may begin anywhere."""
    return tensor.clone() if tensor is not None and tensor.data_ptr() % 16 else tensor


native = _C
