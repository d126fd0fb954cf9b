"""The operator library and what every operator needs to call the native module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rapfast._native import _C

LIBRARY = torch.library.Library("rapfast", "DEF")

TILE_SIZE = 16
"""Pixels per tile side, as compiled into the native module."""

RECORD_FIELDS = ("x", "y", "conic_a", "conic_b", "conic_c", "opacity", "depth", "compensation")
"""Columns of a records tensor [M, 8], the fields of ``Record`` in csrc/math/gaussian.h."""


def define(schema: str, cpu: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Registers an operator with its CPU and its shape-only implementation and returns it."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"rapfast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rapfast, name).default


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's memory, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def native_arguments(tensor: Tensor) -> dict[str, int]:
    """The arguments that every native stage takes: floating type and number of threads."""
    return {"bits": 64 if tensor.dtype == torch.float64 else 32, "threads": torch.get_num_threads()}


native = _C
