"""Plants and flowers."""

from __future__ import annotations

import numpy as np

from .builder import Builder
from .materials import mix, paint, srgb, wood
from .patches import Material


def leaf(
    b: Builder,
    base: np.ndarray,
    along: np.ndarray,
    length: float,
    width: float,
    droop: float,
    hue: str,
    spacing: float = 0.022,
    roll: float = 0.0,
) -> None:
    """A leaf blade from `base` (local) in direction `along`, bending by `droop`, turned about its midrib by `roll`
    radians.
    """
    along = along / np.linalg.norm(along)
    side = np.cross(along, [0, 0, 1.0])
    side = side / max(np.linalg.norm(side), 1e-6)
    up = np.cross(side, along)
    side, up = np.cos(roll) * side + np.sin(roll) * up, np.cos(roll) * up - np.sin(roll) * side
    green, rib = srgb(hue), srgb("#b9cf8c")
    shade = b.rng.uniform(0.8, 1.2)

    def shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        t, s = u / length, 2 * v / width - 1
        half = width / 2 * np.sin(np.pi * t.clip(0.0, 1.0) ** 0.8).clip(0.02) ** 0.75
        lift = 0.25 * np.abs(s) * half - droop * length * t * t
        return base + u[:, None] * along + (s * half)[:, None] * side + lift[:, None] * up

    def colour(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        mid = np.exp(-(((v - width / 2) / (0.05 * width)) ** 2))
        vein = 0.5 + 0.5 * np.cos((u - 0.6 * np.abs(v - width / 2)) * 2 * np.pi / (length / 7))
        return mix(green * shade, rib, 0.45 * mid + 0.10 * vein)

    b.patch(
        shape,
        (length, width),
        Material(colour, 0.35, 0.3, translucency=0.4),
        (spacing, spacing * 0.8),
        breaks=((), (width / 2,)),
        crisp=False,
    )


def big_plant(b: Builder) -> None:
    """A fiddle-leaf fig in a white pot on a wooden stand."""
    pot, soil = paint("#e9e5da", gloss=0.6, roughness=0.2), paint("#3a2a1e")
    b.tube((0, 0, 0.10), 0.15, 0.30, pot, 0.02, top=0.19)
    b.disk((0, 0, 0.375), 0.18, soil, 0.035)
    b.tube((0, 0, 0.04), 0.16, 0.06, wood("#8b6138", "#5a3b20", 51), 0.02)
    b.shade((-0.14, -0.14, 0.0), (0.14, 0.14, 0.39))
    bark = paint("#6f5a43")
    for sx, sy, tall in ((0.0, 0.02, 1.25), (0.05, -0.05, 0.95), (-0.06, -0.02, 0.75)):
        lean = np.array([sx, sy]) * 2.2
        b.stalk(np.array([0, 0, 0.37]), np.array([*lean, 1.0]) * tall, 0.012, bark, 0.03)
        n = int(tall * 11)
        for k in range(n):
            t = (k + b.rng.uniform(0.3, 1.3)) / n
            h, angle = 0.20 + (tall - 0.15) * t, 2.4 * k + b.rng.uniform(-0.7, 0.7) + sx * 50
            rise = b.rng.uniform(0.1, 0.8) + 1.1 * t * t
            root = np.array([lean[0] * h, lean[1] * h, 0.37 + h])
            size, hue = b.rng.uniform(0.22, 0.36) * (1.05 - 0.30 * t), ["#3d6a34", "#558544", "#345c33"][k % 3]
            along = np.array([np.cos(angle), np.sin(angle), rise])
            leaf(b, root, along, size, 0.8 * size, 0.6, hue, roll=b.rng.uniform(-0.8, 0.8))
        b.spheres.append((*b.point((lean[0] * tall * 0.7, lean[1] * tall * 0.7, 0.37 + tall * 0.75)), 0.17))


def trailing_plant(b: Builder, at) -> None:
    """A small pot with leaves that hang over its rim."""
    b.tube(at, 0.05, 0.10, paint("#b8623d", mottle=0.08), 0.014, top=0.068)
    root = np.asarray(at, float) + [0, 0, 0.10]
    for k in range(34):
        angle, reach = 2.4 * k, b.rng.uniform(0.02, 0.10)
        out = np.array([np.cos(angle), np.sin(angle), 0.0])
        start = root + out * reach + [0.0, 0.0, b.rng.uniform(-0.02, 0.09)]
        leaf(
            b,
            start,
            out + [0.25, 0, b.rng.uniform(-0.5, 0.7)],
            b.rng.uniform(0.06, 0.09),
            0.042,
            0.6,
            ["#5c8a45", "#7ba35a", "#4a7640"][k % 3],
            0.016,
        )


def tulips(
    b: Builder,
    at: tuple[float, float, float],
    scale: float = 1.0,
    hues: tuple[str, ...] = ("#d9583f", "#efb7a6", "#f3e3d3"),
) -> None:
    """A bunch of flowers: thin stems, cup-shaped blooms, a few leaves."""
    for k in range(9):
        angle, spread = 2.4 * k, scale * (0.03 + 0.10 * ((k * 0.37) % 1.0))
        tip = np.array([np.cos(angle) * spread, np.sin(angle) * spread, scale * b.rng.uniform(0.13, 0.26)])
        base = np.asarray(at, float)
        b.stalk(base, tip, 0.004, paint("#5c8a45"), 0.03)
        b.ball(
            base + tip, 0.026 * scale, paint(hues[k % len(hues)], mottle=0.2, seed=k), 0.011, squash=1.35, shade=False
        )
        if k % 2:
            along = np.array([np.cos(angle + 1), np.sin(angle + 1), 1.3])
            leaf(b, base, along, 0.17 * scale, 0.035 * scale, 0.5, "#6f9a55", 0.014)
    b.spheres.append((*b.point((at[0], at[1], at[2] + 0.2 * scale)), 0.08 * scale))
