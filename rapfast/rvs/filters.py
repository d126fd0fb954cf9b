"""Poses kept away from others, and regular grids of poses.

The grids follow the idea of LENS (Moreau et al., "LENS: Localization enhanced by NeRF synthesis", CoRL 2021): new
positions on a regular grid through the space that the training views span, each looking as the nearest training view
does, more or less. The details (how the grid is placed, how distances are tested) are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _check
from .draws import SpeculativeDraws
from .poses import Array, PoseSampler, as_numbers, as_poses, bounding_box, generator

PAIRS_AT_ONCE = 1 << 20
"""Pairs of poses compared at a time: a few arrays of 8 MiB."""

MAX_GRID = 1 << 24
"""Positions of the largest grid made."""


class FarFrom:
    """A test of poses: are they different enough from `others`, such as the validation views?

    A pose is refused if any of the others is too near, which with

    - min_distance alone means that its centre is less than that many metres away,
    - min_angle alone, that the rotation between the two is less than that many degrees,
    - both, that it is nearer in both: a view from the same place in another direction, or in the same direction from
      another place, shows something else. With ``both=True`` either of the two suffices to refuse it.

    A pose at exactly the minimum passes. Rotations are compared by the chord between them, |R1 - R2| (Frobenius) =
    sqrt(8) sin(angle / 2), which is accurate for small angles too. No bit depends on how many poses are tested at once.

    Args:
        others: [V,3,4] or [V,4,4] camera-to-world; none at all refuse nothing.
        min_distance: metres, >= 0, or None.
        min_angle: degrees, 0..180, or None.
        both: whether a pose must keep both minima rather than one of them.

    Raises:
        TypeError, ValueError: an argument is not as said, or neither minimum is given.
    """

    def __init__(
        self, others: Any, min_distance: float | None = None, min_angle: float | None = None, *, both: bool = False
    ) -> None:
        self.others = as_poses("others", others)
        if min_distance is None and min_angle is None:
            raise ValueError("FarFrom needs min_distance (metres), min_angle (degrees) or both, got neither")
        if min_distance is not None:
            min_distance = _check.number("min_distance", min_distance, 0.0, 1e12, "a number of metres >= 0")
        if min_angle is not None:
            min_angle = _check.number("min_angle", min_angle, 0.0, 180.0, "an angle of 0..180 degrees")
        self.min_distance, self.min_angle = min_distance, min_angle
        self.both = _check.flag("both", both)

    def __call__(self, poses: Any) -> Any:
        """[M] bool, True where `poses` [M,3,4] or [M,4,4] are to be kept; a tensor on its device for a tensor."""
        device = poses.device if isinstance(poses, Tensor) else None
        given = torch.from_numpy(as_poses("poses", poses))
        tested, others = (t.flatten(1).to(device or "cpu") for t in (given, torch.from_numpy(self.others)))
        rows = max(1, PAIRS_AT_ONCE // max(1, len(others)))
        kept = [self._kept(part, others) for part in tested.split(rows)]
        result = torch.cat(kept)
        return result if device is not None else result.numpy()

    def _kept(self, poses: Tensor, others: Tensor) -> Tensor:
        near = []
        if self.min_distance is not None:
            near.append(_squares(poses, others, (3, 7, 11)) < self.min_distance**2)
        if self.min_angle is not None:
            chord = 8.0 * math.sin(math.radians(self.min_angle) / 2.0) ** 2
            near.append(_squares(poses, others, (0, 1, 2, 4, 5, 6, 8, 9, 10)) < chord)
        if len(near) == 1:
            return ~near[0].any(1)
        return ~((near[0] | near[1]) if self.both else (near[0] & near[1])).any(1)


def sample_kept(
    sampler: PoseSampler, poses: Any, keep: Callable[[Any], Any], max_attempts: int = 100, rng: Any = None
) -> tuple[Any, Any]:
    """New poses around `poses` that `keep` accepts; each is drawn until it does, at most `max_attempts` times.

    With one of numpy's generators the draws and its end state are those of a loop that finishes one view before it
    begins the next. With a torch.Generator all refused poses are drawn again together.

    Args:
        sampler: draws the poses.
        poses: [M,3,4] or [M,4,4] camera-to-world.
        keep: gives [n] bool for poses [n,3,4], such as a `FarFrom`.
        max_attempts: >= 1.
        rng: None, np.random.RandomState or torch.Generator, see `PoseSampler`.

    Returns:
        poses: [M,3,4] float64, the given pose itself where every attempt was refused.
        kept: [M] bool, False there.
    """
    start = as_poses("poses", poses)
    max_attempts = _check.integer("max_attempts", max_attempts, 1, 1 << 40)
    if isinstance(rng, torch.Generator):
        return _sample_kept_torch(sampler, torch.from_numpy(start).to(rng.device), keep, max_attempts, rng)
    result, kept = start.copy(), np.zeros(len(start), dtype=bool)
    run = 16
    with SpeculativeDraws(sampler, start, max_attempts, rng) as draws:
        while not draws.done:
            guess = draws.guess(run)
            accepted = np.asarray(_verdict(keep(guess.poses), len(guess)))
            ended = draws.settle(accepted)
            for end in ended:
                if end.accepted:
                    result[end.view], kept[end.view] = end.pose, True
            # As many as were used last time and the one that may follow, so that few draws are dropped.
            run = 2 * (len(ended) + 1)
    return result, kept


def _sample_kept_torch(
    sampler: PoseSampler, start: Tensor, keep: Callable[[Any], Any], max_attempts: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    result, kept = start.clone(), torch.zeros(len(start), dtype=torch.bool, device=start.device)
    for _ in range(max_attempts):
        left = (~kept).nonzero()[:, 0]
        if not len(left):
            break
        drawn = sampler.sample(start[left], rng)
        accepted = torch.as_tensor(_verdict(keep(drawn), len(drawn)), device=start.device)
        result[left[accepted]] = drawn[accepted]
        kept[left] = accepted
    return result, kept


def _verdict(value: Any, n: int) -> Any:
    if not isinstance(value, Tensor):
        value = np.asarray(value)
    if value.shape != (n,) or value.dtype not in (torch.bool, np.dtype(bool)):
        raise TypeError(f"keep must return bool [{n}] for {n} poses, got {value.dtype} {list(value.shape)}")
    return value


def lens_grid(
    poses: Any, step: Any, *, margin: float = 0.0, min_distance: float = 0.0, max_distance: float = math.inf,
    rotation: float = 0.0, rng: Any = None,
) -> Any:  # fmt: skip
    """Poses at the points of a regular grid through the box of the training poses' centres.

    The box is grown by `margin` each way. Along each axis as many points as fit are placed `step` apart, their middle
    in the box's middle; a box thinner than `step` gets one. A point is left out unless its distance to the nearest
    training centre is within min_distance..max_distance. What remains is ordered by x, then y, then z; each pose has
    the rotation of the nearest training pose (the first of equally near ones), turned in place from the left by
    Rz(psi) Ry(theta) Rx(phi) of three angles U(-rotation, rotation) as in the default sampler. The angles are drawn
    for one pose after the other, and none if `rotation` is 0.

    Args:
        poses: [T >= 1,3,4] or [T,4,4] camera-to-world training poses.
        step: metres between points, > 0, one number or one per axis.
        margin: metres, >= 0.
        min_distance, max_distance: metres, 0 <= min <= max.
        rotation: degrees, >= 0.
        rng: None, np.random.RandomState or torch.Generator, see `PoseSampler`.

    Returns:
        [G,3,4] float64, G >= 0: an array, or with a torch.Generator a tensor on its device.

    Raises:
        ValueError: an argument is not as said, or the grid would have more than 2^24 points.
    """
    training = as_poses("poses", poses)
    low, high = bounding_box(training, _check.number("margin", margin, 0.0, 1e12, "a number of metres >= 0"))
    steps = np.broadcast_to(as_numbers("step", step), 3) if np.shape(step) in ((), (3,)) else np.zeros(3)
    if not (np.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError(f"step must be a number of metres > 0, or three, got {step!r}")
    least = _check.number("min_distance", min_distance, 0.0, math.inf, "a number of metres >= 0")
    most = _check.number("max_distance", max_distance, least, math.inf, "a number of metres >= min_distance")
    if not isinstance(rng, torch.Generator):
        generator(rng)
    turns = TurnsInPlace(rotation)
    # A millionth of a step is forgiven, so that a box of three steps holds four points however it was rounded.
    counts = np.floor((high - low) / steps + 1e-6) + 1.0
    if counts.prod() > MAX_GRID:
        shape = " x ".join(f"{count:.0f}" for count in counts)
        raise ValueError(f"step {step!r} makes a grid of {shape} points, more than {MAX_GRID}: take a larger step")
    first = (low + high) / 2.0 - steps * (counts - 1.0) / 2.0
    axes = [first[i] + steps[i] * np.arange(int(counts[i])) for i in range(3)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    nearest, distance = nearest_centre(points, training[:, :, 3])
    chosen = (distance >= least) & (distance <= most)
    rotations = training[nearest[chosen], :, :3]
    grid = np.zeros((len(rotations), 3, 4))
    grid[:, :, :3] = rotations
    grid[:, :, 3] = points[chosen]
    if turns.rotation:
        return turns.sample(grid, rng)
    return torch.from_numpy(grid).to(rng.device) if isinstance(rng, torch.Generator) else grid


class TurnsInPlace:
    """Draws poses with the centres of given ones, turned as by `PoseSampler`'s "default": from the left by
    Rz(psi) Ry(theta) Rx(phi).

    Args:
        rotation: a, the range of the three angles U(-a, a) in degrees, finite and >= 0.
    """

    def __init__(self, rotation: float) -> None:
        self._turns = PoseSampler(0.0, rotation)

    @property
    def rotation(self) -> float:
        return self._turns.rotation

    def draw(self, n: int, rng: Any = None) -> tuple[Any, None]:
        """[n, 3] theta, phi, psi in degrees, float64; and None, in the place of weights. A tensor for a
        torch.Generator."""
        n = _check.integer("n", n, 0, 1 << 40)
        if isinstance(rng, torch.Generator):
            part = torch.rand(n, 3, generator=rng, device=rng.device, dtype=torch.float64)
            return self.rotation * (2.0 * part - 1.0), None
        return generator(rng).uniform(-self.rotation, self.rotation, (n, 3)), None

    def apply(self, poses: Any, angles: Any) -> Any:
        """[M,3,4] float64 that `angles` (of `draw`) make of `poses`; a tensor if `angles` is one."""
        poses = as_poses("poses", poses)
        if isinstance(angles, Tensor):
            turned = self._turns.apply(poses, torch.nn.functional.pad(angles, (0, 3)))
            turned[:, :, 3] = torch.from_numpy(poses[:, :, 3]).to(angles.device)
        else:
            turned = self._turns.apply(poses, np.pad(angles, ((0, 0), (0, 3))))
            turned[:, :, 3] = poses[:, :, 3]
        return turned

    def sample(self, poses: Any, rng: Any = None) -> Any:
        """One new pose around each of `poses`, as `PoseSampler.sample`."""
        return self.apply(poses, self.draw(len(poses), rng)[0])


def nearest_centre(points: Array, centres: Array) -> tuple[NDArray[np.int64], Array]:
    """For each of `points` [P,3] the nearest of `centres` [T,3] (the first of equals) and its distance."""
    rows = max(1, PAIRS_AT_ONCE // len(centres))
    index, distance = np.zeros(len(points), dtype=np.int64), np.zeros(len(points))
    for begin in range(0, len(points), rows):
        part = points[begin : begin + rows]
        squares = sum((part[:, None, i] - centres[None, :, i]) ** 2 for i in range(3))
        index[begin : begin + rows] = squares.argmin(1)
        distance[begin : begin + rows] = np.sqrt(squares.min(1))
    return index, distance


def _squares(a: Tensor, b: Tensor, columns: tuple[int, ...]) -> Tensor:
    """[M,V] sums of squared differences over some columns, added in their order."""
    total = torch.zeros(len(a), len(b), dtype=a.dtype, device=a.device)
    for column in columns:
        total += (a[:, column, None] - b[None, :, column]).square_()
    return total
