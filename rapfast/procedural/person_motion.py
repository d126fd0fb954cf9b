"""How the person of `person` moves: sways, breathes, nods, looks around, blinks, talks and gestures.

Each bone turns by sines of the time; linear blend skinning moves the Gaussians (positions by the blended matrices,
rotations by the blended quaternions), in torch on any device.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .person import BONES, PARENTS, PIVOTS, Person


class PersonMotion:
    """The figure on a device, and where its Gaussians are at a time."""

    def __init__(self, figure: Person, device: torch.device) -> None:
        def tensor(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

        self._points, self._quats = tensor(figure.points), tensor(figure.quats)
        self.scales = tensor(figure.scales)
        self._bones, self._weights = tensor(figure.bones, torch.int64), tensor(figure.weights)
        self._device = device

    def at(self, seconds: float) -> tuple[Tensor, Tensor]:
        """Means [N, 3] and quats [N, 4] at a time."""
        matrices, quats = bone_transforms(seconds)
        matrices, quats = (torch.from_numpy(x.astype(np.float32)).to(self._device) for x in (matrices, quats))
        first, second = self._bones.unbind(1)
        w = self._weights[:, :, None]
        blended = w[:, 0, :, None] * matrices[first] + w[:, 1, :, None] * matrices[second]  # [N, 3, 4]
        means = (blended[:, :, :3] * self._points[:, None]).sum(2) + blended[:, :, 3]
        # neighbouring bones turn by less than half a turn, so their quaternions add up the short way round
        turns = torch.nn.functional.normalize(w[:, 0] * quats[first] + w[:, 1] * quats[second], dim=1)
        return means, _product(turns, self._quats)


def bone_transforms(seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each bone at a time: the matrix [B, 3, 4] that takes a point at rest to its place, and the quaternion [B, 4]
    of its rotation, with w >= 0."""
    matrices, quats = np.zeros((len(BONES), 4, 4)), np.zeros((len(BONES), 4))
    for b, (pivot, parent, (turn, shift)) in enumerate(zip(PIVOTS, PARENTS, _local(seconds), strict=True)):
        local, own = np.eye(4), np.array([1.0, 0.0, 0.0, 0.0])
        for axis, degrees in turn:
            half = math.radians(degrees) / 2
            step = np.array([math.cos(half), *(math.sin(half) * np.eye(3)["xyz".index(axis)])])
            own = _product(torch.from_numpy(own), torch.from_numpy(step)).numpy()
        local[:3, :3] = _rotation(own)
        local[:3, 3] = pivot - local[:3, :3] @ pivot + shift
        matrices[b] = local if parent < 0 else matrices[parent] @ local
        whole = own if parent < 0 else _product(torch.from_numpy(quats[parent]), torch.from_numpy(own)).numpy()
        quats[b] = whole if whole[0] >= 0 else -whole
    return matrices[:, :3], quats


def _local(t: float) -> list[tuple[list[tuple[str, float]], np.ndarray]]:
    """Each bone's turns (axis and degrees, applied one within the other) about its pivot, and its shift."""

    def wave(hertz: float, phase: float = 0.0) -> float:
        return math.sin(2 * math.pi * (hertz * t + phase))

    breath = 0.5 + 0.5 * wave(0.24)
    blink = math.exp(-(((t * 0.45 + 0.3) % 1.0 - 0.5) / 0.035) ** 2)
    talk = max(0.0, 0.45 * wave(2.3) + 0.35 * wave(3.7, 0.2) + 0.2 * wave(5.1, 0.4)) * (0.6 + 0.4 * wave(0.31, 0.1))
    beat_l, beat_r = 0.5 + 0.5 * wave(0.55, 0.1), 0.5 + 0.5 * wave(0.43, 0.62)
    nothing, sway = np.zeros(3), np.array([0.012 * wave(0.19, 0.1), 0.0, 0.0])
    lid, gaze = ([("x", 62.0 * blink)], nothing), ([("z", 7.0 * wave(0.37, 0.5))], nothing)
    found = {
        "root": ([("z", 3.0 * wave(0.19)), ("y", 1.2 * wave(0.27, 0.3))], sway),
        "chest": ([("x", -1.2 * breath), ("z", 4.0 * wave(0.23, 0.15))], np.array([0.0, -0.002, 0.003]) * breath),
        "head": ([("z", 9.0 * wave(0.31, 0.4) + 3.0 * wave(0.83)), ("x", -2.0 + 4.0 * wave(0.47, 0.2)),
                  ("y", 4.0 * wave(0.29, 0.7))], nothing),
        "jaw": ([("x", 9.0 * talk)], nothing),
        "lid_l": lid, "lid_r": lid, "eye_l": gaze, "eye_r": gaze,
        # The elbows bend the forearms up in front of the body, and the hands beat with the words.
        "arm_l": ([("y", -9.0 - 5.0 * beat_l), ("x", -14.0 - 16.0 * beat_l)], nothing),
        "fore_l": ([("z", -28.0 - 12.0 * wave(0.55, 0.3)), ("x", -72.0 - 26.0 * beat_l)], nothing),
        "hand_l": ([("x", -6.0 - 14.0 * wave(1.1, 0.2)), ("z", 34.0 + 16.0 * wave(0.55))], nothing),
        "arm_r": ([("y", 8.0 + 5.0 * beat_r), ("x", -10.0 - 14.0 * beat_r)], nothing),
        "fore_r": ([("z", 30.0 + 12.0 * wave(0.43, 0.1)), ("x", -60.0 - 34.0 * beat_r)], nothing),
        "hand_r": ([("x", -6.0 - 14.0 * wave(0.86, 0.5)), ("z", -34.0 - 16.0 * wave(0.43))], nothing),
    }  # fmt: skip
    return [found[name] for name in BONES]


def _rotation(q: np.ndarray) -> np.ndarray:
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton's, of [..., 4] wxyz."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )
