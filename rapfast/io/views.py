"""One camera as a file describes it: what every camera reader returns, in the renderer's conventions.

World-to-camera, OpenCV axes (x right, y down, z forward), intrinsics in pixels with the image's corner at 0 and
pixel centres at +0.5. COLMAP and nerfstudio use the same pixel convention.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .files import shorten

#: Largest image side accepted. A picture of this side alone has 4e9 pixels; more is a damaged file.
MAX_SIDE = 65536
#: Largest deviation of R R^T from the identity: text files round to four digits, a scaled matrix is far off.
ROTATION_TOLERANCE = 1e-3


@dataclass
class View:
    """Name, [4,4] float64 world-to-camera matrix, [3,3] float64 intrinsics in pixels, size in pixels."""

    name: str
    world_to_camera: np.ndarray
    intrinsics: np.ndarray
    width: int
    height: int


def make_view(
    where: str, name: str, matrix: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int], *, inverted: bool
) -> View:
    """Check and build one view.

    Args:
        where: opens the error sentences, for example "cameras.json: entry 3 ('a.png')".
        name: the image's name.
        matrix: [3,4] or [4,4] rigid transform in OpenCV axes.
        intrinsics: [3,3].
        size: (width, height).
        inverted: True where `matrix` is camera-to-world.
    """
    width, height = size
    for label, side in (("width", width), ("height", height)):
        if not 1 <= side <= MAX_SIDE:
            raise ValueError(f"{where}: {label} must be within 1..{MAX_SIDE}, got {shorten(side)}")
    intrinsics = np.asarray(intrinsics, dtype=np.float64)
    check_single_precision(where, "intrinsics", intrinsics)
    for label, focal in (("fx", intrinsics[0, 0]), ("fy", intrinsics[1, 1])):
        if not np.float32(focal) > 0:
            raise ValueError(f"{where}: focal length {label} must be positive, got {focal:g}")
    full = np.eye(4)
    full[: matrix.shape[0]] = matrix
    check_rigid(where, full)
    return View(name, np.linalg.inv(full) if inverted else full, intrinsics, width, height)


def pinhole(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """[3,3] float64 intrinsics."""
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def check_single_precision(where: str, label: str, values: np.ndarray) -> None:
    """Refuse what is not finite as float32, which is what the renderer gets."""
    bad = ~(np.abs(values) < 1e30)
    if bad.any():
        raise ValueError(f"{where}: {label} must be finite and below 1e30, got {values[bad].flat[0]:g}")


def check_rigid(where: str, matrix: np.ndarray) -> None:
    """Refuse a [4,4] matrix that is not rotation and translation."""
    check_single_precision(where, "camera matrix", matrix)
    if not np.allclose(matrix[3], (0.0, 0.0, 0.0, 1.0), atol=1e-6):
        raise ValueError(f"{where}: last row of the camera matrix must be 0 0 0 1, got {matrix[3].tolist()}")
    rotation = matrix[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if not error <= ROTATION_TOLERANCE:
        raise ValueError(
            f"{where}: the camera matrix must hold a rotation, R R^T is off the identity by {error:.3g} "
            f"(at most {ROTATION_TOLERANCE:g})"
        )
    if np.linalg.det(rotation) < 0:
        raise ValueError(f"{where}: the camera matrix must hold a rotation, it mirrors (determinant -1)")


def rotation_of(where: str, quaternion: np.ndarray) -> np.ndarray:
    """[3,3] rotation of a quaternion [4] w x y z of any length but 0."""
    check_single_precision(where, "quaternion", quaternion)
    length = np.linalg.norm(quaternion)
    if not length > 1e-12:
        raise ValueError(f"{where}: the quaternion must not be zero")
    w, x, y, z = quaternion / length
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
