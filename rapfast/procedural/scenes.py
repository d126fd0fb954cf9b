"""Surfaces as scenes: flat Gaussians for the elements."""

from __future__ import annotations

import numpy as np
import torch

from ..scene import Scene
from .layout import surface
from .lighting import DAY, Lighting, light
from .patches import THICKNESS, Surface


def room(n_gaussians: int = 200_000, seed: int = 0, lighting: Lighting = DAY) -> Scene:
    """The furnished room as a Scene of exactly `n_gaussians` Gaussians, float32 on the CPU, SH degree 3.

    n_gaussians: the more, the finer the surfaces; ValueError below the about 3 500 that the furniture needs.
    seed: the books, boards, leaves and flowers; the same seed gives bitwise the same scene on one machine.
    lighting: a Lighting, for example procedural.EVENING.
    """
    made = surface(n_gaussians, seed)
    return to_scene(made, light(made, lighting))


def to_scene(made: Surface, sh: np.ndarray) -> Scene:
    """Flat Gaussians for the elements of a Surface with the colours sh [n, 16, 3]."""
    normal, tangent = made.normals, made.tangents
    quats = quaternions(np.stack([tangent, np.cross(normal, tangent), normal], 2))
    scales = np.concatenate([made.sigmas, np.full((len(made), 1), THICKNESS)], 1).clip(4e-4)
    opacities = np.full(len(made), 0.985)
    return Scene(
        *(torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (made.points, quats, scales, opacities, sh))
    )


def quaternions(r: np.ndarray) -> np.ndarray:
    """Unit quaternions [n, 4], w x y z, of rotation matrices [n, 3, 3], by the largest of the four components
    (Shepperd 1978).
    """
    m = lambda i, j: r[:, i, j]  # noqa: E731
    trace = m(0, 0) + m(1, 1) + m(2, 2)
    squares = np.stack([trace, m(0, 0), m(1, 1), m(2, 2)], 1)
    best = squares.argmax(1)
    wx, wy, wz = m(2, 1) - m(1, 2), m(0, 2) - m(2, 0), m(1, 0) - m(0, 1)
    xy, yz, zx = m(1, 0) + m(0, 1), m(2, 1) + m(1, 2), m(0, 2) + m(2, 0)
    rows = [
        np.stack([1 + trace, wx, wy, wz], 1),
        np.stack([wx, 1 + 2 * m(0, 0) - trace, xy, zx], 1),
        np.stack([wy, xy, 1 + 2 * m(1, 1) - trace, yz], 1),
        np.stack([wz, zx, yz, 1 + 2 * m(2, 2) - trace], 1),
    ]
    q = np.choose(best[:, None], rows)
    return q / np.linalg.norm(q, axis=1, keepdims=True)
