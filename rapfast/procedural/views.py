"""Viewpoints inside the procedural room."""

from __future__ import annotations

import numpy as np
import torch

from ..cameras import Cameras

# Places worth looking from and at, (eye, target) in metres; none inside furniture.
_PLACES = (
    ((-3.05, -2.35, 1.50), (0.9, 0.75, 0.85)),
    ((2.95, -1.90, 1.55), (-0.9, 1.2, 0.85)),
    ((-1.75, 2.05, 1.55), (1.6, -0.9, 0.70)),
    ((0.10, 1.75, 1.35), (-1.9, -1.3, 0.80)),
    ((1.85, -0.95, 1.15), (-0.6, 2.7, 1.30)),
    ((-0.55, -0.50, 1.25), (2.9, 0.35, 0.75)),
    ((0.30, -0.45, 1.45), (-3.3, 0.75, 1.15)),
    ((-1.15, -0.35, 0.75), (1.9, 1.75, 0.85)),
)


def _intrinsics(n: int, width: int, height: int, degrees: float) -> torch.Tensor:
    """[n, 3, 3] with the given horizontal field of view (for pictures wider than high; else the vertical one)."""
    focal = 0.5 * max(width, height) / np.tan(np.radians(degrees) / 2)
    K = [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]
    return torch.tensor(K, dtype=torch.float32, device="cpu").repeat(n, 1, 1)


def _viewmats(eyes: np.ndarray, targets: np.ndarray) -> torch.Tensor:
    """World-to-camera matrices [n, 4, 4], float32, z up, of cameras at eyes [n, 3] looking at targets [n, 3]."""
    forward = (targets - eyes) / np.linalg.norm(targets - eyes, axis=1, keepdims=True)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    turn = np.stack([right, np.cross(forward, right), forward], 1)
    out = np.tile(np.eye(4), (len(eyes), 1, 1))
    out[:, :3, :3], out[:, :3, 3] = turn, -np.einsum("nij,nj->ni", turn, eyes)
    return torch.from_numpy(out.astype(np.float32))


def room_cameras(n: int, width: int = 854, height: int = 480, seed: int = 0) -> Cameras:
    """n good viewpoints inside the room at eye height, the first eight chosen by hand, further ones varied about
    those by `seed`.
    """
    rng = np.random.default_rng(seed)
    eyes, targets = (np.array([_PLACES[i % len(_PLACES)][k] for i in range(n)]).reshape(n, 3) for k in (0, 1))
    varied = np.arange(n) >= len(_PLACES)
    eyes[varied] += rng.uniform(-1, 1, (int(varied.sum()), 3)) * [0.15, 0.15, 0.12]
    targets[varied] += rng.uniform(-1, 1, (int(varied.sum()), 3)) * [0.9, 0.9, 0.25]
    names = [f"room_{i:04d}.png" for i in range(n)]
    return Cameras(_viewmats(eyes, targets), _intrinsics(n, width, height, 72.0), width, height, names)


def room_orbit(n: int, width: int = 854, height: int = 480) -> Cameras:
    """n viewpoints on a closed, smooth path around the middle of the room, looking across it."""
    a = 2 * np.pi * np.arange(n) / max(n, 1)
    eyes = np.stack([0.15 + 1.35 * np.cos(a), 0.05 + 1.15 * np.sin(a), 1.55 + 0.12 * np.sin(2 * a)], 1)
    targets = np.stack([0.1 - 1.9 * np.cos(a + 0.35), 0.1 - 1.6 * np.sin(a + 0.35), np.full(n, 0.82)], 1)
    names = [f"orbit_{i:04d}.png" for i in range(n)]
    return Cameras(_viewmats(eyes, targets), _intrinsics(n, width, height, 72.0), width, height, names)
