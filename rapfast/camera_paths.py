"""Camera poses from geometry: look-at, orbit, and interpolation between poses. Plain numpy in float64.

Poses are camera-to-world with OpenCV axes: the columns of the rotation are right, down and forward in the world.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .io.views import rotation_of


def check_count(name: str, n: Any) -> int:
    """A number of cameras >= 1."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"{name} must be a whole number, got {n!r}")
    if n < 1:
        raise ValueError(f"{name} must be at least 1, got {n}")
    return int(n)


def look_at(eyes: np.ndarray, targets: np.ndarray, up: np.ndarray) -> np.ndarray:
    """[C,4,4] poses at `eyes` looking at `targets`; each argument [3] or [C,3], broadcast."""
    for name, value in (("eyes", eyes), ("targets", targets), ("up", up)):
        if value.ndim not in (1, 2) or value.shape[-1] != 3:
            raise ValueError(f"{name} must be [3] or [C,3], got {list(value.shape)}")
        if not (np.abs(value) < 1e30).all():
            raise ValueError(f"{name} must be finite, got {value[~(np.abs(value) < 1e30)][0]:g}")
    try:
        eyes, targets, up = np.broadcast_arrays(*(np.atleast_2d(v) for v in (eyes, targets, up)))
    except ValueError:
        shapes = ", ".join(str(list(v.shape)) for v in (eyes, targets, up))
        raise ValueError(f"eyes, targets and up must agree in C, got {shapes}") from None

    poses = np.tile(np.eye(4), (len(eyes), 1, 1))
    for index, (eye, target, upward) in enumerate(zip(eyes, targets, up, strict=True)):
        distance = np.linalg.norm(target - eye)
        if distance == 0:
            raise ValueError(f"eyes[{index}] must differ from targets[{index}], both are {eye.tolist()}")
        forward = (target - eye) / distance
        length = np.linalg.norm(upward)
        right = np.cross(forward, upward / length) if length > 0 else np.zeros(3)
        if np.linalg.norm(right) < 1e-6:
            raise ValueError(f"up must not be zero or parallel to the view, got {upward.tolist()} for camera {index}")
        right /= np.linalg.norm(right)
        poses[index, :3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
        poses[index, :3, 3] = eye
    return poses


def orbit_eyes(
    center: np.ndarray, radius: float, n: int, up: np.ndarray, *, elevation: float, start: float, turns: float
) -> np.ndarray:
    """[n,3] points at `radius` from `center`, `elevation` degrees above the plane orthogonal to `up`."""
    n = check_count("n", n)
    for name, value in (("center", center), ("up", up)):
        if value.shape != (3,):
            raise ValueError(f"{name} must be [3], got {list(value.shape)}")
    for name, value in (("radius", radius), ("elevation", elevation), ("start", start), ("turns", turns)):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius!r}")
    if not -90 < elevation < 90:
        raise ValueError(f"elevation must be within -90..90 degrees exclusive, got {elevation!r}")
    length = np.linalg.norm(up)
    if not (math.isfinite(length) and length > 0):
        raise ValueError(f"up must be finite and not zero, got {up.tolist()}")
    axis = up / length
    # Azimuth 0 is the world axis least aligned with `up`, made orthogonal to it: x for up = +z.
    first = np.eye(3)[np.argmin(np.abs(axis))]
    first -= axis * (first @ axis)
    first /= np.linalg.norm(first)
    second = np.cross(axis, first)
    azimuth = np.radians(start) + 2 * math.pi * turns * np.arange(n) / n
    flat = np.cos(azimuth)[:, None] * first + np.sin(azimuth)[:, None] * second
    tilt = math.radians(elevation)
    return center + radius * (math.cos(tilt) * flat + math.sin(tilt) * axis)


def interpolate(
    poses: np.ndarray, Ks: np.ndarray, n: int, *, smooth: bool, closed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """[n,4,4] poses and [n,3,3] intrinsics along the path through poses [C,4,4] with intrinsics [C,3,3]."""
    count = len(poses)
    segments = count if closed else count - 1
    times = np.arange(n) * (segments / n if closed else segments / max(n - 1, 1))
    left = np.minimum(times.astype(int), max(segments - 1, 0))
    fraction = times - left

    def knot(offset: int) -> np.ndarray:
        index = left + offset
        return index % count if closed else np.clip(index, 0, count - 1)

    a, b = knot(0), knot(1)
    t = fraction[:, None]
    centers = poses[:, :3, 3]
    out = np.tile(np.eye(4), (n, 1, 1))
    if smooth:
        out[:, :3, 3] = _catmull_rom(centers[knot(-1)], centers[a], centers[b], centers[knot(2)], t)
    else:
        out[:, :3, 3] = (1 - t) * centers[a] + t * centers[b]
    quaternions = np.array([quaternion_of(pose[:3, :3]) for pose in poses])
    for index in range(n):
        out[index, :3, :3] = rotation_of(
            "interpolate", slerp(quaternions[a[index]], quaternions[b[index]], fraction[index])
        )
    return out, (1 - t[..., None]) * Ks[a] + t[..., None] * Ks[b]


def _catmull_rom(p0: np.ndarray, p1: np.ndarray, p2: np.ndarray, p3: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Uniform Catmull-Rom spline between p1 and p2 (Catmull and Rom 1974)."""
    return 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Spherical interpolation of unit quaternions the shorter way round (Shoemake 1985)."""
    cosine = float(a @ b)
    if cosine < 0:
        b, cosine = -b, -cosine
    angle = math.acos(min(cosine, 1.0))
    if angle < 1e-6:  # sin would divide by nothing; the chord is exact enough
        mixed = (1 - t) * a + t * b
    else:
        mixed = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    return mixed / np.linalg.norm(mixed)


def quaternion_of(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternion w x y z of a [3,3] rotation, by the eigenvector of Bar-Itzhack (2000): no case distinctions,
    and the nearest rotation where the matrix is slightly off."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation
    k = np.array(
        [
            [xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, xx - yy - zz, yx + xy, zx + xz],
            [xz - zx, yx + xy, yy - xx - zz, zy + yz],
            [yx - xy, zx + xz, zy + yz, zz - xx - yy],
        ]
    )
    return np.linalg.eigh(k)[1][:, -1]
