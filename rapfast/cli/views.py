"""Cameras for a command line: from a file, or an orbit around whatever the scene holds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..cameras import Cameras
from ..scene import Scene

UP = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1), "-x": (-1, 0, 0), "-y": (0, -1, 0), "-z": (0, 0, -1)}
_FOV_Y = 45.0


def load_cameras(text: str, size: tuple[int, int] | None) -> list[Cameras]:
    """Cameras of a file or folder, one group for each image size; with `size` (width, height) all are scaled to it."""
    if not Path(text).exists():
        raise FileNotFoundError(f"--cameras: there is no file or folder {text!r}")
    groups = [group for group in Cameras.groups(text) if len(group)]
    if not groups:
        raise ValueError(f"{text}: holds no cameras")
    return [group.resize(*size) for group in groups] if size else groups


def orbit_count(text: str) -> int | None:
    """N of "orbit:N"; None where `text` is something else."""
    match = re.fullmatch(r"orbit:(\d+)", text)
    if match is None and text.partition(":")[0] == "orbit" and not Path(text).exists():
        raise ValueError(f"--cameras orbit:N needs the number of views, as orbit:24, got {text!r}")
    return int(match[1]) if match else None


def centre_and_radius(scene: Scene) -> tuple[np.ndarray, float]:
    """Centre [3] and radius of the bulk of a scene: what lies within five median distances of its well visible
    Gaussians' median.

    Far floaters and skies move neither.
    """
    seen = scene.valid() & (scene.opacities > 0.3)
    if not seen.any():
        seen = scene.valid()
    if not seen.any():
        raise ValueError("the scene has no valid Gaussian, so there is nothing to orbit: give --cameras")
    means = scene.means[seen].detach().cpu().double().numpy()
    for _ in range(3):  # the median of what lies near the last centre: a wide background is shed step by step
        centre = np.median(means, 0)
        distance = np.linalg.norm(means - centre, axis=1)
        near = distance <= 5.0 * np.median(distance)
        if near.all():
            break
        means = means[near]
    low, high = np.quantile(means, 0.005, axis=0), np.quantile(means, 0.995, axis=0)
    centre = (low + high) / 2
    radius = float(np.quantile(np.linalg.norm(means - centre, axis=1), 0.995))
    return centre, radius or 1.0


def orbit(scene: Scene, n: int, size: tuple[int, int], up: str, elevation: float, distance: float) -> Cameras:
    """n cameras on a circle that see the bulk of the scene; `distance` in multiples of the one that just fits it."""
    if n < 1:
        raise ValueError(f"--orbit must be at least 1 view, got {n}")
    centre, radius = centre_and_radius(scene)
    width, height = size
    half = np.radians(_FOV_Y) / 2
    half = min(half, np.arctan(np.tan(half) * width / height))  # upright pictures are limited by their width
    fit = radius / np.sin(half)
    cameras = Cameras.orbit(
        centre, float(fit * distance), n, elevation=elevation, up=UP[up], width=width, height=height, fov_y=_FOV_Y
    )
    digits = max(4, len(str(n - 1)))
    cameras.names = [f"orbit_{i:0{digits}d}" for i in range(n)]
    return cameras
