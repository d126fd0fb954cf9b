"""Random camera poses around known ones, by the numbers RAP's training draws.

A pose is camera-to-world, [3,4]: rotation and centre, OpenCV axes, metres. The samplers consume a generator exactly
as a loop over views would that draws for one pose after the other, so that a seeded run can be reproduced; only the
arithmetic on the numbers is done for all views at once, by operations whose bits do not depend on how many there are.

Three kinds, for a translation range x in metres and a rotation range a in degrees (U uniform, N normal):

- "default": theta, phi, psi = U(-a, a), then dx, dy, dz = U(-x, x). The whole pose, its centre included, is multiplied
  from the left by Rx(phi), then Ry(theta), then Rz(psi), each rounded to float32 (the products are float64): the
  centre turns about the world's origin too. Then the centre moves by (dx, dy, dz).
- "xz_plane": the same six numbers are drawn; only Ry(theta), dx and dz are used.
- "uniform_sphere": an angle U(-a, a) about the axis N(3) / |N(3)| turns the rotation alone, from the left; then the
  centre moves by radius U(0, x) towards azimuth U(0, 2 pi) and polar angle U(0, pi) from +z.

In all of them Ry(t) = [[cos t, 0, -sin t], [0, 1, 0], [sin t, 0, cos t]], the other sense of rotation than Rx and Rz.
Last, each component of the centre is clamped to a box, if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _check
from . import torch_poses

Array = NDArray[np.float64]

KINDS = ("default", "xz_plane", "uniform_sphere")

WEIGHTS = (0.0, 2.0)
"""The range of a view's weight in RAP's training."""


MAX_RANGE = 1e9
"""Largest range of a sampler: sums with larger moves would lose the micrometre."""


@dataclass(frozen=True, eq=False)
class PoseSampler:
    """Draws poses around given ones.

    Attributes:
        translation: x, the range of the moves in metres, finite and >= 0.
        rotation: a, the range of the turns in degrees, finite and >= 0.
        kind: "default", "xz_plane" or "uniform_sphere", see the module.
        box: [2,3], the least and the greatest centre; centres are clamped to it. None for no clamp.

    Generators: None is numpy's global one (``np.random.seed``), a ``np.random.RandomState`` is used as that would be;
    both end where the loop over views would have left them. A ``torch.Generator`` of the CPU or of a GPU is the faster
    mode for new work: other numbers of the same distributions (and rotations that are not rounded to float32), drawn
    and applied on its device in a few launches. Its numbers repeat for one seed, device, kind and count of views; they
    say nothing about another count or device.
    """

    translation: float
    rotation: float
    kind: str = "default"
    box: Array | None = None

    def __post_init__(self) -> None:
        _check.choice("kind", self.kind, KINDS)
        for name, unit in (("translation", "metres"), ("rotation", "degrees")):
            value = _check.number(name, getattr(self, name), 0.0, MAX_RANGE, f"a range in {unit}, 0..{MAX_RANGE:g}")
            object.__setattr__(self, name, value)
        if self.box is not None:
            object.__setattr__(self, "box", _box(self.box))

    @property
    def numbers_per_pose(self) -> int:
        """6, or 7 for "uniform_sphere"."""
        return 7 if self.kind == "uniform_sphere" else 6

    def sample(self, poses: Any, rng: Any = None) -> Any:
        """One new pose around each of `poses`.

        Args:
            poses: [M,3,4] or [M,4,4] camera-to-world, tensor or array of finite numbers, M >= 0.
            rng: None, np.random.RandomState or torch.Generator, see the class.

        Returns:
            [M,3,4] float64: an array, or with a torch.Generator a tensor on its device.

        Raises:
            TypeError, ValueError: the poses are not as said, or the generator is of another type.
        """
        start = as_poses("poses", poses)
        numbers, _ = self.draw(len(start), rng)
        if isinstance(numbers, Tensor):
            return torch_poses.apply(self, torch.from_numpy(start).to(numbers.device), numbers)
        return self._applied(start, numbers)

    def draw(self, n: int, rng: Any = None, *, weights: Sequence[float] | None = None) -> tuple[Any, Any]:
        """The numbers of `n` poses, each followed by its view's weight if `weights` gives a range.

        Returns:
            numbers: [n, 6] theta, phi, psi (degrees), dx, dy, dz (metres), or for "uniform_sphere" [n, 7] angle
                (degrees), axis (3, as drawn), radius (metres), azimuth, polar angle (radians); float64.
            weights: [n] float64, or None.
            Tensors on its device for a torch.Generator.
        """
        n = _check.integer("n", n, 0, 1 << 40)
        limits = None if weights is None else weight_range("weights", weights)
        if isinstance(rng, torch.Generator):
            return torch_poses.draw(self, n, rng, limits)
        numbers, drawn, _ = self.draw_attempts(np.zeros(n, dtype=bool), generator(rng), limits, None)
        return numbers, drawn

    def apply(self, poses: Any, numbers: Any) -> Any:
        """The poses that `numbers` (of `draw`) make of `poses`; [M,3,4] float64, a tensor if `numbers` is one."""
        start = as_poses("poses", poses)
        shape = (len(start), self.numbers_per_pose)
        if isinstance(numbers, Tensor):
            if numbers.dtype != torch.float64 or numbers.shape != shape:
                raise ValueError(f"numbers must be float64 {list(shape)} of draw(), got {_check.describe(numbers)}")
            return torch_poses.apply(self, torch.from_numpy(start).to(numbers.device), numbers)
        numbers = as_numbers("numbers", numbers)
        if numbers.shape != shape:
            raise ValueError(f"numbers must be {list(shape)} of draw(), got {list(numbers.shape)}")
        return self._applied(start, numbers)

    def _applied(self, poses: Array, numbers: Array) -> Array:
        result = _uniform_sphere(poses, numbers) if self.kind == "uniform_sphere" else self._turned(poses, numbers)
        if self.box is not None:
            result[:, :, 3] = np.clip(result[:, :, 3], self.box[0], self.box[1])
        return result

    def _turned(self, poses: Array, numbers: Array) -> Array:
        theta, phi, psi = np.ascontiguousarray(numbers[:, :3].T / 180.0 * np.pi)
        # The 4x4 products of the loop over views: BLAS is called once per matrix, with the same shapes.
        result = np.zeros((len(poses), 4, 4))
        result[:, :3], result[:, 3, 3] = poses, 1.0
        moves = numbers[:, 3:]
        if self.kind == "xz_plane":
            result = _in_plane(theta, 0, 2) @ result
            moves = moves * np.array([1.0, 0.0, 1.0])
        else:
            result = _in_plane(phi, 1, 2) @ result
            result = _in_plane(theta, 0, 2) @ result
            result = _in_plane(psi, 0, 1) @ result
        result = np.ascontiguousarray(result[:, :3])
        result[:, :, 3] += moves
        return result

    def draw_attempts(
        self, ends: NDArray[np.bool_], rng: Any, weights: tuple[float, float] | None,
        final_weights: tuple[float, float] | None,
    ) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
        """len(ends) attempts one after the other from a legacy generator: the numbers of a pose, a weight if there is
        a range for it, and where `ends` is True a final weight if there is a range for it (NaN elsewhere)."""
        n, k = len(ends), self.numbers_per_pose
        x, a = self.translation, self.rotation
        if self.kind == "uniform_sphere":
            ranges = [(-a, a), *[(math.nan, math.nan)] * 3, (0.0, x), (0.0, 2.0 * np.pi), (0.0, np.pi)]
        else:
            ranges = [(-a, a)] * 3 + [(-x, x)] * 3
        ranges += [limits for limits in (weights, final_weights) if limits is not None]
        lows, highs = np.array(ranges).T
        drawn = np.ones((n, len(ranges)), dtype=bool)
        if final_weights is not None:
            drawn[:, -1] = ends
        values = np.full((n, len(ranges)), np.nan)
        if self.kind == "uniform_sphere":
            # A normal number takes a varying count of uniform ones and leaves a second behind for the next call, so
            # the draws themselves cannot be one call; the generator's own functions are called in the loop's order.
            for row, mask in zip(values, drawn, strict=True):
                row[0] = rng.uniform(lows[0], highs[0])
                row[1:4] = rng.standard_normal(3)
                row[4:][mask[4:]] = rng.uniform(lows[4:][mask[4:]], highs[4:][mask[4:]])
        elif n:
            # With arrays of bounds the generator fills in order, one number each, by the same function as for one.
            bounds = (np.broadcast_to(limit, drawn.shape)[drawn] for limit in (lows, highs))
            values[drawn] = rng.uniform(*bounds)
        given = values[:, k] if weights is not None else None
        final = values[:, -1] if final_weights is not None else None
        return values[:, :k], given, final


def draw_weights(n: int, rng: Any = None, limits: Sequence[float] = WEIGHTS) -> Any:
    """[n] float64 view weights U(low, high), as RAP's plain renderer draws them behind all poses."""
    n = _check.integer("n", n, 0, 1 << 40)
    low, high = weight_range("limits", limits)
    if isinstance(rng, torch.Generator):
        return low + (high - low) * torch.rand(n, generator=rng, device=rng.device, dtype=torch.float64)
    return generator(rng).uniform(low, high, n)


def bounding_box(poses: Any, grow: Any = 0.0) -> Array:
    """[2,3] float64: the least and the greatest centre of `poses` [M >= 1,3,4], `grow` metres further out each way.

    Args:
        poses: camera-to-world [M,3,4] or [M,4,4] of the training views.
        grow: d_max, a number or [3], finite and >= 0.
    """
    centres = as_poses("poses", poses)[:, :, 3]
    if not len(centres):
        raise ValueError("bounding_box needs at least one pose, got none")
    margin = as_numbers("grow", grow)
    if margin.shape not in ((), (3,)) or not (np.isfinite(margin).all() and (margin >= 0).all()):
        raise ValueError(f"grow must be a finite number of metres >= 0, or three, got {grow!r}")
    return np.stack([centres.min(0) - margin, centres.max(0) + margin])


def world_to_camera(poses: Any) -> Any:
    """[M,4,4] float32 world-to-camera matrices: the inverse, in float32, of [pose; 0 0 0 1] rounded to float32.

    The bits are those of ``np.linalg.inv`` on one matrix at a time. It is computed on the CPU; for a tensor the result
    is a tensor on its device.

    Raises:
        ValueError: a pose is not finite or cannot be inverted; names the pose.
    """
    start = as_poses("poses", poses)
    matrices = np.zeros((len(start), 4, 4), dtype=np.float32)
    with np.errstate(over="ignore"):
        matrices[:, :3], matrices[:, 3, 3] = start, 1.0
    _refuse_first(~np.isfinite(matrices).all((1, 2)), "poses[{}] does not fit into float32")
    try:
        result = np.linalg.inv(matrices)
    except np.linalg.LinAlgError:
        index = next(i for i, matrix in enumerate(matrices) if not _invertible(matrix))
        raise ValueError(f"poses[{index}] has no inverse, its rotation block is singular") from None
    return torch.from_numpy(result).to(poses.device) if isinstance(poses, Tensor) else result


def _invertible(matrix: NDArray[np.float32]) -> bool:
    try:
        np.linalg.inv(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


# --- arithmetic --------------------------------------------------------------------------------------------------


def _in_plane(angles: Array, i: int, j: int) -> Array:
    """[M,4,4] rotations from axis i towards axis j, rounded to float32 and held in float64."""
    cos, sin = np.cos(angles), np.sin(angles)
    matrices = np.zeros((len(angles), 4, 4), dtype=np.float32)
    matrices[:, range(4), range(4)] = 1.0
    matrices[:, i, i], matrices[:, i, j] = cos, -sin
    matrices[:, j, i], matrices[:, j, j] = sin, cos
    return matrices.astype(np.float64)


def _uniform_sphere(poses: Array, numbers: Array) -> Array:
    angle, _, _, _, radius, azimuth, polar = np.ascontiguousarray(numbers.T)
    axis = np.ascontiguousarray(numbers[:, 1:4])
    # The dot product as np.linalg.norm takes it of one vector, whose bits differ from a sum of squares over rows.
    length = np.sqrt(axis[:, None, :] @ axis[:, :, None])[:, 0]
    result = np.array(poses)
    result[:, :, :3] = rotation_about(axis / length, angle / 180.0 * np.pi) @ np.ascontiguousarray(poses[:, :, :3])
    flat = radius * np.sin(polar)
    result[:, :, 3] += np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), radius * np.cos(polar)], 1)
    return result


def rotation_about(axis: Array, angle: Array) -> Array:
    """[M,3,3] rotations by `angle` [M] radians about unit vectors `axis` [M,3] (Rodrigues' formula)."""
    x, y, z = np.ascontiguousarray(axis.T)
    cos, sin = np.cos(angle), np.sin(angle)
    rest = 1.0 - cos
    rows = [
        [cos + x * x * rest, x * y * rest - z * sin, x * z * rest + y * sin],
        [y * x * rest + z * sin, cos + y * y * rest, y * z * rest - x * sin],
        [z * x * rest - y * sin, z * y * rest + x * sin, cos + z * z * rest],
    ]
    return np.ascontiguousarray(np.moveaxis(np.array(rows), 2, 0))


# --- arguments ---------------------------------------------------------------------------------------------------


def as_numbers(name: str, value: Any) -> Array:
    """A tensor, array or nested sequence of real numbers as a float64 array on the CPU."""
    if isinstance(value, Tensor):
        if value.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires a gradient, which no sampler gives it: pass {name}.detach()")
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    try:
        result = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be one array of numbers, got rows of different lengths") from None
    if result.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got {type(value).__name__} of {result.dtype}")
    return result.astype(np.float64)


def as_poses(name: str, value: Any) -> Array:
    """Camera-to-world poses as a new contiguous float64 array [M,3,4]."""
    poses = as_numbers(name, value)
    if poses.ndim != 3 or poses.shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"{name} must be [M,3,4] or [M,4,4] camera-to-world, got {list(poses.shape)}")
    if poses.shape[1] == 4:
        _refuse_first((poses[:, 3] != (0.0, 0.0, 0.0, 1.0)).any(1), f"{name}[{{}}] must have 0 0 0 1 as its last row")
    _refuse_first(~np.isfinite(poses).all((1, 2)), f"{name}[{{}}] must be finite, it has NaN or infinity")
    return np.ascontiguousarray(poses[:, :3])


def generator(rng: Any) -> Any:
    """numpy's legacy generator: the module ``np.random`` for its global one, or the RandomState given."""
    if rng is None:
        return np.random
    if isinstance(rng, np.random.RandomState):
        return rng
    raise TypeError(
        "rng must be None (numpy's global generator), a numpy.random.RandomState or a torch.Generator, "
        f"got {type(rng).__name__}"
    )


def weight_range(name: str, limits: Any) -> tuple[float, float]:
    """(low, high) of view weights."""
    pair = as_numbers(name, limits)
    if pair.shape != (2,) or not np.isfinite(pair).all() or pair[0] > pair[1]:
        raise ValueError(f"{name} must be two finite numbers, low <= high, got {limits!r}")
    return float(pair[0]), float(pair[1])


def _box(value: Any) -> Array:
    box = as_numbers("box", value)
    if box.shape != (2, 3) or not np.isfinite(box).all() or (box[0] > box[1]).any():
        raise ValueError(f"box must be finite [2,3], the least and the greatest centre, got {value!r}")
    box.flags.writeable = False
    return box


def _refuse_first(bad: NDArray[np.bool_], sentence: str) -> None:
    for index in np.flatnonzero(bad)[:1]:
        raise ValueError(sentence.format(index))
