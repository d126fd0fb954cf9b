"""Procedural colours: noise, wood, cloth, paper. All colours are linear light; textures take the patch's (u, v) in
metres.
"""

from __future__ import annotations

import numpy as np

from .patches import Colour, Material


def srgb(code: str) -> np.ndarray:
    """Linear RGB [3] of a colour written as "#rrggbb"."""
    c = np.array([int(code[k : k + 2], 16) for k in (1, 3, 5)]) / 255.0
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lattice(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """A fixed pseudo-random number in [0, 1) for each integer lattice point (32-bit integer mixing)."""
    h = (x.astype(np.int64) * 374761393 + y.astype(np.int64) * 668265263 + seed * 974634777) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 2246822519) & 0xFFFFFFFF
    return ((h ^ (h >> 15)) & 0xFFFFFF) / float(1 << 24)


def noise(x: np.ndarray, y: np.ndarray, seed: int = 0) -> np.ndarray:
    """Smooth value noise in [0, 1] with features of size one."""
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = x - x0, y - y0
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    a, b = _lattice(x0, y0, seed), _lattice(x0 + 1, y0, seed)
    c, d = _lattice(x0, y0 + 1, seed), _lattice(x0 + 1, y0 + 1, seed)
    return (a * (1 - fx) + b * fx) * (1 - fy) + (c * (1 - fx) + d * fx) * fy


def fbm(x: np.ndarray, y: np.ndarray, seed: int = 0, octaves: int = 3) -> np.ndarray:
    """Octaves of noise, each twice as fine and half as strong; in [0, 1], mean 0.5."""
    total, weight = np.zeros_like(x), 0.0
    for k in range(octaves):
        total += noise(x * 2**k, y * 2**k, seed + 31 * k) * 0.5**k
        weight += 0.5**k
    return total / weight


def mix(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    """a where t = 0, b where t = 1; a and b [3], t [n] -> [n, 3]."""
    return a + (b - a) * np.clip(t, 0, 1)[:, None]


def step(edge0: float, edge1: float, x: np.ndarray) -> np.ndarray:
    """0 below edge0, 1 above edge1, smooth between."""
    t = np.clip((x - edge0) / (edge1 - edge0), 0, 1)
    return t * t * (3 - 2 * t)


def paint(code: str, gloss: float = 0.0, roughness: float = 0.5, mottle: float = 0.04, seed: int = 0) -> Material:
    """Paint or plaster: one colour with a faint, slow mottling."""
    base = srgb(code)
    return Material(lambda u, v: base * (1 + mottle * (2 * fbm(u * 2.2, v * 2.2, seed) - 1))[:, None], gloss, roughness)


def wood_colour(light: str, dark: str, seed: int, stretch: float = 18.0) -> Colour:
    """Grain along u: streaks `stretch` times longer than wide, with slow waves so that they do not run dead
    straight.
    """
    a, b = srgb(light), srgb(dark)

    def colour(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        bend = 0.02 * noise(u * 1.7, v * 3.0, seed + 7)
        grain = fbm(u * 2.5 + 5.1 * seed, (v + bend) * 2.5 * stretch, seed)
        pores = noise(u * 9.0, v * 260.0, seed + 3)
        return mix(a, b, step(0.25, 0.85, grain) * 0.85 + 0.18 * (pores - 0.5))

    return colour


def wood(light: str, dark: str, seed: int, gloss: float = 0.35, roughness: float = 0.3) -> Material:
    """Oiled or lacquered wood, grain along u."""
    return Material(wood_colour(light, dark, seed), gloss, roughness)


def cloth(code: str, seed: int = 0, weave: float = 0.10, translucency: float = 0.0) -> Material:
    """Woven cloth: a fine two-way weave over soft, larger variation."""
    base = srgb(code)

    def colour(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        t = noise(u * 160, v * 40, seed) + noise(u * 40, v * 160, seed + 1) - 1
        return base * (1 + weave * t + 0.10 * (fbm(u * 5, v * 5, seed + 2) - 0.5))[:, None]

    return Material(colour, 0.0, 0.9, translucency=translucency)


def stripes(code: str, other: str, period: float, share: float = 0.3, seed: int = 0) -> Material:
    """Cloth with stripes along u."""
    a, b, weave = srgb(code), srgb(other), cloth("#ffffff", seed, 0.08).colour
    return Material(lambda u, v: mix(a, b, ((v / period) % 1.0 < share).astype(float)) * weave(u, v), 0.0, 0.9)


def rug(size: tuple[float, float]) -> Material:
    """A flat-woven rug: borders, a row of triangles, and a field of stepped diamonds."""
    cream, navy, rust, sand, teal = (srgb(c) for c in ("#e6dcc8", "#27384f", "#a4492f", "#c9a677", "#5d8583"))

    def colour(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        edge = np.minimum.reduce([u, size[0] - u, v, size[1] - v])
        out = np.tile(cream, (len(u), 1))
        # The field: diamonds in a staggered lattice, each three nested steps.
        pu, pv = size[0] / 5.0, size[1] / 6.0
        du, dv = (
            np.abs((u - size[0] / 2) / pu + 0.5 - np.floor((u - size[0] / 2) / pu + 0.5) - 0.5),
            np.abs((v / pv) % 1.0 - 0.5),
        )
        d = np.floor((du + dv) * 12) / 12  # 0 at a diamond's centre, 1 at the lattice's corners
        second = np.floor(u / pu) % 2 == 0
        for lo, hi, one, two in (
            (0.0, 0.12, cream, sand),
            (0.12, 0.24, rust, navy),
            (0.24, 0.33, sand, cream),
            (0.33, 0.43, navy, teal),
            (0.78, 1.01, rust, rust),
        ):
            band = (d >= lo) & (d < hi)
            out[band] = np.where(second[band, None], two, one)
        # The border: navy band with a zigzag of rust and cream, between thin lines.
        along = np.where((u == edge) | (size[0] - u == edge), v, u)
        saw = np.abs((along / 0.16) % 1.0 - 0.5) * 2
        band = edge < 0.30
        out[band] = navy
        out[band & (edge > 0.09) & (edge < 0.21) & ((edge - 0.09) / 0.12 < saw)] = rust
        out[(edge > 0.235) & (edge < 0.26)] = cream
        out[(edge > 0.045) & (edge < 0.065)] = sand
        out[edge < 0.02] = cream
        wool = noise(u * 120, v * 45, 5) + fbm(u * 4, v * 4, 6) - 1
        return out * (1 + 0.16 * wool)[:, None]

    return Material(colour, 0.0, 0.9)


def _landscape(u: np.ndarray, v: np.ndarray, hues: list[np.ndarray], seed: int) -> np.ndarray:
    """Layered hills under a low sun; u and v in 0..1, v up."""
    out = mix(hues[0], hues[1], v * 1.4 - 0.3)
    sun = np.hypot((u - 0.64) * 1.0, v - 0.66) < 0.11
    out[sun] = hues[2]
    for k, hue in enumerate(hues[3:]):
        ridge = (
            0.55 - 0.15 * k + 0.12 * np.sin(u * (3.1 + 1.7 * k) + seed + 2.1 * k) + 0.05 * noise(u * 7, u * 0 + k, seed)
        )
        out[v < ridge] = hue
    return out


def picture(kind: int, size: tuple[float, float]) -> Material:
    """A framed print: 0 and 1 are landscapes, 2 overlapping shapes, 3 a botanical sheet. A paper margin runs around."""
    palettes = [
        ("#f2d9b0", "#e9a57c", "#d9542f", "#8fa7a0", "#4f7472", "#24424a"),
        ("#dfe7e6", "#b9cfd6", "#f3efe0", "#8aa0b8", "#55708f", "#2c405e"),
    ]
    margin, paper = 0.12 * min(size), srgb("#f1ece0")

    def colour(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        s, t = (u - margin) / (size[0] - 2 * margin), (v - margin) / (size[1] - 2 * margin)
        if kind < 2:
            art = _landscape(s, t, [srgb(c) for c in palettes[kind]], kind)
        else:
            art = np.tile(srgb("#efe3cf"), (len(u), 1))
            if kind == 2:
                art[np.hypot((s - 0.40) * 0.8, t - 0.60) < 0.26] = srgb("#c8643c")
                art[(np.abs(s - 0.62) < 0.2) & (np.abs(t - 0.38) < 0.26)] = srgb("#2f5d62")
                art[np.hypot((s - 0.66) * 0.8, t - 0.70) < 0.13] = srgb("#e0a93b")
                art[np.abs(t - 0.14 - 0.25 * s) < 0.018] = srgb("#2a2a2a")
            else:
                stem = np.abs(s - 0.5 - 0.05 * np.sin(5 * t)) < 0.012
                art[stem & (t > 0.1) & (t < 0.85)] = srgb("#3f5b3a")
                for k in range(7):
                    y, side = 0.22 + 0.09 * k, 1 if k % 2 else -1
                    a, b = (s - 0.5) * side, t - y
                    leaf = ((a - 0.17) * 0.9 + (b - 0.07) * 0.5) ** 2 / 0.025 + (
                        -(a - 0.17) * 0.5 + (b - 0.07) * 0.9
                    ) ** 2 / 0.0028 < 1
                    art[leaf] = srgb("#55764b" if k % 3 else "#7f9a63")
        inside = (s > 0) & (s < 1) & (t > 0) & (t < 1)
        return np.where(inside[:, None], art, paper)

    return Material(colour, 0.12, 0.15)


def outdoors(width: float, height: float, horizon: float) -> Material:
    """What the window looks onto: sky with a few clouds, two ranges of hills, a line of trees, a meadow. v is the
    height.
    """
    zenith, haze, cloud = srgb("#6fa8dc"), srgb("#e8f0f0"), srgb("#ffffff")

    def colour(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        h = v - horizon
        puff = fbm(u * 0.45, h * 1.3, 21, 4)
        out = mix(haze, zenith, h / 5.0)
        out += (cloud - out) * (step(0.52, 0.72, puff) * 0.85 * step(0.6, 2.0, h))[:, None]
        far = 0.75 + 0.45 * np.sin(u * 0.42 + 1.0) + 0.35 * noise(u * 0.8, u * 0, 4)
        near = 0.30 + 0.35 * np.sin(u * 0.65 + 2.6) + 0.25 * noise(u * 1.3, u * 0, 9)
        out = np.where((h < far)[:, None], mix(srgb("#8fa9b5"), srgb("#b6c6c8"), 0.5 + 0 * h), out)
        out = np.where((h < near)[:, None], mix(srgb("#6f8f6b"), srgb("#86a474"), fbm(u, h * 2, 3)), out)
        tree = -0.15 + 1.1 * (noise(u * 0.9, u * 0, 14) ** 2) + 0.25 * noise(u * 4, u * 0, 15)
        leaf = fbm(u * 5, h * 5, 16)
        out = np.where((h < tree)[:, None], mix(srgb("#35562f"), srgb("#7c9a45"), leaf * 1.3 - 0.2), out)
        lawn = mix(srgb("#7fa04e"), srgb("#a9bd6a"), fbm(u * 0.8, h * 5, 18))
        return np.where((h < -0.35)[:, None], lawn, out)

    return Material(colour, emitter="outdoor")
