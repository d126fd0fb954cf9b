"""Poses and generators for the tests of samplers."""

from __future__ import annotations

from typing import Any

import numpy as np


def rotations(n: int, seed: int) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, 3, 3)))
    q *= np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
    q[:, :, 0] *= np.linalg.det(q)[:, None]
    return q


def some_poses(n: int, seed: int = 0, dtype: type = np.float64) -> np.ndarray:
    centres = np.random.default_rng(seed + 1).uniform(-3, 3, (n, 3, 1))
    return np.concatenate([rotations(n, seed), centres], 2).astype(dtype)


def generators(seed: int, normals: int = 0) -> tuple[np.random.RandomState, np.random.RandomState]:
    """Two in one state; an odd count of normal numbers drawn before leaves one in store."""
    pair = np.random.RandomState(seed), np.random.RandomState(seed)
    for rng in pair:
        rng.randn(normals)
    return pair


def assert_same_state(a: Any, b: Any) -> None:
    a, b = a.get_state(legacy=False), b.get_state(legacy=False)
    np.testing.assert_array_equal(a["state"]["key"], b["state"]["key"])
    assert (a["state"]["pos"], a["has_gauss"], a["gauss"]) == (b["state"]["pos"], b["has_gauss"], b["gauss"])
