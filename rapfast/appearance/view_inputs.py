"""Checks of what a view of a RAP scene is given: feature maps, which of them, and a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.appearance.feature_map_net import MAP_CHANNELS
from rapfast.scene import Scene


def check_maps(maps: Any, scene: Scene) -> Tensor | Sequence[Tensor]:
    """The maps of R images as they came: one tensor, or a sequence."""
    if isinstance(maps, Tensor):
        good = maps.is_floating_point() and maps.dim() == 4 and maps.shape[1] == MAP_CHANNELS
        if not good or 0 in maps.shape or maps.device != scene.device:
            raise ValueError(
                f"feature_maps must be floating point [R, {MAP_CHANNELS}, h, w] on {scene.device} with no side 0, "
                f"got {check.describe(maps)}"
            )
    elif isinstance(maps, Sequence) and not isinstance(maps, (str, bytes)) and maps:
        for i, m in enumerate(maps):
            check_map(f"feature_maps[{i}]", m, scene)
    else:
        raise TypeError(
            f"feature_maps must be a tensor [R, {MAP_CHANNELS}, h, w] or a sequence of [{MAP_CHANNELS}, h, w], "
            f"got {check.describe(maps)}"
        )
    return maps


def check_map(name: str, m: Any, scene: Scene) -> None:
    """The map of one image."""
    good = isinstance(m, Tensor) and m.is_floating_point() and m.dim() == 3
    if not good or m.shape[0] != MAP_CHANNELS or 0 in m.shape or m.device != scene.device:
        raise ValueError(
            f"{name} must be floating point [{MAP_CHANNELS}, h, w] on {scene.device} with no side 0, "
            f"got {check.describe(m)}"
        )


def check_map_ids(map_ids: Any, n_maps: int, c: int) -> list[int]:
    if map_ids is None:
        if n_maps not in (1, c):
            raise ValueError(f"map_ids must be given where {n_maps} feature maps meet {c} views")
        return [0] * c if n_maps == 1 else list(range(c))
    if isinstance(map_ids, np.ndarray):
        map_ids = check.as_tensor(map_ids)
    if isinstance(map_ids, Tensor):
        if map_ids.dim() != 1 or map_ids.is_floating_point() or map_ids.is_complex() or map_ids.dtype == torch.bool:
            raise ValueError(f"map_ids must be whole numbers [{c}], got {check.describe(map_ids)}")
        map_ids = map_ids.tolist()
    elif not isinstance(map_ids, Sequence) or isinstance(map_ids, (str, bytes)):
        raise TypeError(f"map_ids must be whole numbers [{c}], got {check.describe(map_ids)}")
    if len(map_ids) != c:
        raise ValueError(f"map_ids must hold one number for each of {c} views, got {len(map_ids)}")
    return [check.integer(f"map_ids[{i}]", value, 0, n_maps - 1) for i, value in enumerate(map_ids)]


def check_weights(weights: Any, c: int, like: Tensor) -> list[float] | None:
    """The weight of each of c views; None of a tensor under torch.compile, whose numbers are not known."""
    if weights is None:
        return [1.0] * c
    if isinstance(weights, np.ndarray):
        weights = check.as_tensor(weights)
    if isinstance(weights, Tensor):
        if not weights.is_floating_point() or tuple(weights.shape) != (c,):
            raise ValueError(
                f"view_weights must be floating point [{c}], one for each view, got {check.describe(weights)}"
            )
        if weights.device not in (like.device, torch.device("cpu")):
            raise ValueError(f"view_weights must be on {like.device} or the CPU, got {check.describe(weights)}")
        if torch.compiler.is_compiling():  # the operator looks at them
            return None
        values = weights.tolist()
    elif isinstance(weights, Sequence) and not isinstance(weights, (str, bytes)):
        if len(weights) != c:
            raise ValueError(f"view_weights must hold one number for each of {c} views, got {len(weights)}")
        values = [check.number(f"view_weights[{i}]", value) for i, value in enumerate(weights)]
    else:
        values = [check.number("view_weights", weights)] * c
    if not all(map(math.isfinite, values)):
        raise ValueError(f"view_weights must be finite, got {values}")
    return values


def weights_like(given: Any, weights: list[float] | None, like: Tensor) -> Tensor:
    """The weights as a tensor; the given one where it is one, for its gradient."""
    return weight_tensor(given, weights).to(like)


def weight_tensor(given: Any, weights: list[float] | None) -> Tensor:
    """The weights as `NetInputs` takes them: the given tensor, or float64 on the CPU."""
    if isinstance(given, (Tensor, np.ndarray)):
        return check.as_tensor(given)
    return torch.tensor(weights, dtype=torch.float64, device="cpu")


def wants_gradient(*values: Any) -> bool:
    """Whether gradients are enabled and one of the tensors, or of those in the lists, requires one."""
    if not torch.is_grad_enabled():
        return False
    return any(
        isinstance(tensor, Tensor) and tensor.requires_grad
        for value in values
        for tensor in (value if isinstance(value, Sequence) else [value])
    )


def refuse_precision(precision: str | None, backend: str) -> None:
    """Raise NotImplementedError for a precision asked of a backend that has but one."""
    if precision is not None:
        raise NotImplementedError(
            f'precision={precision!r} is not supported by backend="{backend}", whose network has the scene\'s dtype'
        )
