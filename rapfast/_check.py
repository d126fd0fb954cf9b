"""Checks of arguments. Each message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MAX_IMAGE_SIZE = 1 << 20
"""Largest width or height: pixel centres stay exact in float32."""


def describe(value: object) -> str:
    """A value as messages show it: ``float32 [10, 3] on cpu`` for tensors, ``ndarray float64 [3, 4]`` for arrays."""
    if isinstance(value, Tensor):
        return f"{_dtype(value.dtype)} {_shape(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"{type(value).__name__} {value.dtype} {_shape(value.shape)}"
    if value is None:
        return "None"
    return f"{type(value).__name__} {value!r}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: Sequence[object]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def floating_tensor(name: str, value: object, shape: str) -> Tensor:
    """The leading argument, which sets dtype and device of the others."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a float32 or float64 tensor {shape}, got {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor {shape}, got one of layout {value.layout}")
    return value


def tensor_like(name: str, value: object, shapes: Sequence[tuple[object, ...]], like: Tensor, like_name: str) -> Tensor:
    """A dense tensor of one of ``shapes`` (an entry that is not a number matches any size), with the dtype and
    device of ``like``."""
    if (
        isinstance(value, Tensor)
        and value.dtype == like.dtype
        and value.device == like.device
        and value.layout == torch.strided
        and any(_matches(value.shape, shape) for shape in shapes)
    ):
        return value
    wanted = " or ".join(_shape(shape) for shape in shapes)
    message = f"{name} must be {_dtype(like.dtype)} {wanted} on {like.device} (as {like_name}), got {describe(value)}"
    if isinstance(value, Tensor) and value.layout != torch.strided:
        message += f" of layout {value.layout}"
    if not isinstance(value, Tensor) or value.dtype != like.dtype or value.layout != torch.strided:
        raise TypeError(message)
    raise ValueError(message)


def _matches(shape: torch.Size, pattern: tuple[object, ...]) -> bool:
    if len(shape) != len(pattern):
        return False
    return all(not (want != have and isinstance(want, int)) for have, want in zip(shape, pattern, strict=True))


def integer(name: str, value: object, low: int, high: int, unit: str = "") -> int:
    """A whole number in [low, high]."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {describe(value)}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}{unit}, got {number}")
    return number


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf, what: str = "a number") -> float:
    """A float in [low, high]; NaN is in no interval."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires a gradient, which no backend gives it: pass a plain number")
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {what}, got {describe(value)}") from None
    if not low <= result <= high:
        raise ValueError(f"{name} must be {what}, got {result}")
    return result


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def as_tensor(value: object) -> Tensor:
    """As torch.as_tensor: numbers into the host's memory and tensors where they are, whatever torch's default device.

    Raises: what torch.as_tensor raises where they are no numbers.
    """
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """One of a few words."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value  # type: ignore[return-value]
