"""State dicts of appearance networks: names, shapes, and what is said where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_COMPILED = "_orig_mod."


def without_compile_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries under the names that they had before `torch.compile` put `_orig_mod.` into them."""
    return {name.replace(_COMPILED, ""): value for name, value in state.items()}


def check_state(state: Any, source: str) -> dict[str, Tensor]:
    """`state` as a dict of names to dense floating tensors, without the compile prefix.

    Integer entries (BatchNorm counts its batches) and entries with "mask" in their name (RAP's mask branch, which
    no renderer uses) are left out. `source` opens the error sentences: a file or an argument.

    Raises:
        TypeError: it is no dict of tensors.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise TypeError(f"{source}: must be a state dict (names to tensors), got a {type(state).__name__}")
    kept = {}
    for name, value in without_compile_prefix(state).items():
        if "mask" in name:
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise TypeError(f"{source}: {name} must be a dense tensor, got a {type(value).__name__}")
        if value.is_floating_point():
            kept[name] = value
    return kept


def check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], source: str) -> None:
    """Raise a ValueError with one line for every entry that is missing, unknown or of another shape."""
    faults = []
    for name, shape in shapes.items():
        if name not in state:
            faults.append(f"{name} {list(shape)} is missing")
        elif tuple(state[name].shape) != tuple(shape):
            faults.append(f"{name} must be {list(shape)}, got {list(state[name].shape)}")
    faults += [f"{name} {list(state[name].shape)} is not part of the network" for name in state if name not in shapes]
    if faults:
        raise ValueError(f"{source}: does not fit the network in {len(faults)} places:\n  " + "\n  ".join(faults))
