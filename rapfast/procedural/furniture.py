"""Furniture: each function adds patches for the eye and boxes or spheres for the shadows to a Builder."""

from __future__ import annotations

import numpy as np

from . import patches as P
from .builder import ALL, Builder
from .materials import cloth, fbm, mix, noise, paint, srgb, step, stripes, wood
from .patches import Lamp, Material
from .plants import trailing_plant


def sofa(b: Builder, width: float = 2.1) -> None:
    """A three-seater along y with its back at +x; the front is at -x, the floor at z = 0."""
    body, w = cloth("#2f5d5a", 1), width / 2
    b.box((-0.42, -w, 0.13), (0.45, w, 0.30), body, 0.030, round=0.04)
    b.box((0.20, -w + 0.05, 0.25), (0.47, w - 0.05, 0.80), body, 0.030, round=0.09)
    for s in (-1, 1):
        b.box((-0.44, s * w - 0.11, 0.13), (0.46, s * w + 0.11, 0.60), body, 0.026, round=0.09)
    seat = (2 * w - 0.24) / 3
    for k in range(3):
        y = -w + 0.12 + seat * k
        b.box((-0.43, y + 0.004, 0.28), (0.28, y + seat - 0.004, 0.47), body, 0.024, round=0.06, puff=0.10)
        b.box((0.08, y + 0.006, 0.42), (0.30, y + seat - 0.006, 0.84), body, 0.024, round=0.08, puff=0.14, shade=False)
    for x in (-0.36, 0.38):
        for y in (-w + 0.1, w - 0.1):
            b.box((x - 0.025, y - 0.025, 0), (x + 0.025, y + 0.025, 0.14), wood("#6b4a2f", "#3c2817", 3), 0.02)
    pillow(b, (0.03, -w + 0.36, 0.65), cloth("#b5532f", 4), 0.44, yaw=np.pi / 2 - 0.18)
    pillow(b, (0.01, -w + 0.66, 0.63), stripes("#e8dfcd", "#37506b", 0.055, 0.35, 5), 0.40, yaw=np.pi / 2 + 0.22)
    pillow(b, (0.03, w - 0.38, 0.65), cloth("#d9a441", 6), 0.44, yaw=np.pi / 2 + 0.15)


def pillow(b: Builder, at, material: Material, size: float, yaw: float = 0.0, pitch: float = -0.32) -> None:
    """A throw pillow standing on its edge and leaning back."""
    half = np.array([size / 2, 0.085, size / 2])
    for name in ALL.split():
        shape, extent = P.face(name, half)
        b.patch(P.placed(P.rounded(shape, half, 0.06, 0.5), at, yaw, pitch), extent, material, 0.017, crisp=False)
    b.spheres.append((*b.point(at), size * 0.30))


def chair(b: Builder) -> None:
    """A dining chair facing -y (its back at +y), a woven seat on tapered legs."""
    frame, seat = wood("#8a5f3a", "#54361f", 11), cloth("#c9b491", 12, 0.25)
    for x in (-0.19, 0.19):
        b.box((x - 0.018, -0.20, 0), (x + 0.018, -0.165, 0.44), frame, 0.018, stretch=3)
        b.box((x - 0.018, 0.17, 0), (x + 0.018, 0.205, 0.86), frame, 0.018, stretch=3)
        b.box((x - 0.012, -0.17, 0.20), (x + 0.012, 0.18, 0.225), frame, 0.018, shade=False, stretch=3)
    b.box((-0.22, -0.215, 0.43), (0.22, 0.20, 0.475), seat, 0.022, round=0.018)
    for z in (0.58, 0.70, 0.81):
        b.box((-0.19, 0.175, z - 0.03), (0.19, 0.198, z + 0.03), frame, 0.018, stretch=3)


def round_table(b: Builder, radius: float = 0.58, height: float = 0.75) -> None:
    """A round pedestal table of polished wood."""
    top, foot = wood("#a9713f", "#6a4022", 21, gloss=0.9, roughness=0.15), wood("#7d5431", "#4a2f1a", 22)
    b.disk((-0, 0, height), radius, top, 0.018)
    b.lathe(
        (0, 0, height - 0.035), lambda v: radius + 0 * v, lambda v: v, 0.035, radius, top, (0.03, 0.012), crisp=True
    )
    b.patch(
        P.placed(P.disk(radius, 0.0), (0, 0, height - 0.035), pitch=np.pi),
        (2 * radius, 2 * radius),
        foot,
        0.05,
        crisp=False,
    )
    b.lathe(
        (0, 0, 0.04), lambda v: 0.045 + 0.03 * np.cos(v * 9) ** 2, lambda v: v, height - 0.07, 0.06, foot, (0.025, 0.02)
    )
    b.lathe(
        (0, 0, 0),
        lambda v: 0.30 - 0.24 * (v / 0.28) ** 0.6,
        lambda v: 0.06 * (v / 0.28),
        0.28,
        0.26,
        foot,
        (0.03, 0.02),
    )
    r = radius * 0.70
    b.shade((-r, -radius, height - 0.04), (r, radius, height))
    b.shade((-radius, -r, height - 0.035), (-r, r, height))
    b.shade((r, -r, height - 0.035), (radius, r, height))
    b.shade((-0.06, -0.06, 0), (0.06, 0.06, height))


def coffee_table(b: Builder) -> None:
    """A low table, longer along y, with a shelf underneath; glossy walnut."""
    top, leg = wood("#7a4f30", "#452a18", 31, gloss=1.0, roughness=0.12), wood("#5d3d25", "#38230f", 32)
    b.box((-0.32, -0.58, 0.38), (0.32, 0.58, 0.42), top, 0.016)
    b.box((-0.27, -0.52, 0.14), (0.27, 0.52, 0.16), leg, 0.03)
    for x in (-0.285, 0.285):
        for y in (-0.545, 0.545):
            b.box((x - 0.02, y - 0.02, 0), (x + 0.02, y + 0.02, 0.38), leg, 0.02, faces="+x -x +y -y", stretch=3)


BOOKS = [
    "#7d2e2a",
    "#24405e",
    "#d8c8a4",
    "#3f5a3c",
    "#b98a3a",
    "#6a3d5a",
    "#2f3437",
    "#a8572f",
    "#557b83",
    "#e4dccb",
    "#8c9a5b",
    "#45355c",
    "#c3a15f",
    "#913b46",
    "#1f4b4a",
]


def books(b: Builder, width: float, height: float) -> None:
    """A row of books on a shelf of this clear height, from y = 0 to `width`, spines towards +x and about x = 0."""
    y = 0.01
    while y < width - 0.05:
        if b.rng.random() < 0.06:
            y += b.rng.uniform(0.06, 0.16)  # a gap in the row
            continue
        thick, tall = b.rng.uniform(0.022, 0.055), height * b.rng.uniform(0.62, 0.93)
        if y + thick > width - 0.01:
            break
        cover, ink = (
            srgb(BOOKS[b.rng.integers(len(BOOKS))]),
            srgb(["#e8dab0", "#d9b45a", "#f2efe6", "#1d1d1f"][b.rng.integers(4)]),
        )
        bands = np.sort(b.rng.uniform(0.08, 0.92, 2)) * tall
        title = b.rng.random() < 0.6

        def spine(
            u: np.ndarray, v: np.ndarray, cover=cover, ink=ink, bands=bands, title=title, thick=thick
        ) -> np.ndarray:
            out = np.tile(cover, (len(u), 1)) * (0.9 + 0.2 * noise(u * 90, v * 20, 3))[:, None]
            out[(np.abs(v - bands[0]) < 0.004) | (np.abs(v - bands[1]) < 0.004)] = ink
            if title:
                out[
                    (np.abs(u - thick / 2) < 0.25 * thick)
                    & (v > bands[0] + 0.02)
                    & (v < bands[1] - 0.02)
                    & (noise(v * 90, u * 0, 5) > 0.4)
                ] = ink
            return out

        deep = b.rng.uniform(-0.012, 0.012)
        marks = tuple(m for c in bands for m in (c - 0.004, c + 0.004))
        shape, size = P.face("+x", np.array([0.08, thick / 2, tall / 2]))
        middle = (deep - 0.08, y + thick / 2, tall / 2)
        b.patch(P.placed(shape, middle), size, Material(spine, 0.25, 0.3), (0.011, 0.02), breaks=((), marks))
        for name in ("+y", "-y", "+z"):
            shape, size = P.face(name, np.array([0.08, thick / 2, tall / 2]))
            plain = paint("#e9e2cf") if name == "+z" else Material(lambda u, v, c=cover: np.tile(c, (len(u), 1)))
            b.patch(P.placed(shape, middle), size, plain, (0.04, 0.04) if name != "+z" else (0.03, 0.014), crisp=False)
        y += thick + 0.001
    b.shade((-0.16, 0, 0), (-0.005, width, height * 0.75))


def bookshelf(b: Builder, width: float = 1.9, height: float = 2.12, rows: int = 5) -> None:
    """An open shelf with its back at x = 0, along y from 0 to `width`, front at x = 0.30."""
    board = wood("#8b6138", "#5a3b20", 41)
    for y in (0.0, width - 0.03):
        b.box((0, y, 0), (0.30, y + 0.03, height), board, 0.022, faces="+x +y -y +z")
    b.box((0, width / 2 - 0.012, 0.08), (0.29, width / 2 + 0.012, height - 0.03), board, 0.022, faces="+x +y -y")
    b.patch(
        P.placed(P.face("+x", np.array([0.005, width / 2, height / 2]))[0], (0, width / 2, height / 2)),
        (width, height),
        board,
        0.06,
    )
    clear = (height - 0.08) / rows
    for k in range(rows + 1):
        z = 0.055 + clear * k
        b.box((0.0, 0.03, z), (0.295, width - 0.03, z + 0.025), board, 0.022, faces="+x +z -z")
        if k == rows:
            continue
        for side in (0, 1):
            room = width / 2 - 0.05
            with b.frame((0.25, 0.035 + side * (width / 2 - 0.02), z + 0.026)):
                if (k, side) == (2, 1):
                    vase(b, (-0.10, 0.22, 0), 0.75, "#d7d3c8", "#7f8f96")
                    b.ball((-0.09, 0.52, 0.09), 0.09, globe(), 0.011)
                    with b.frame((0, 0.64, 0)):
                        books(b, room - 0.64, clear - 0.03)
                elif (k, side) == (4, 0):
                    books(b, room * 0.55, clear - 0.03)
                    trailing_plant(b, (-0.11, room * 0.78, 0.0))
                else:
                    books(b, room, clear - 0.03)
    b.box((0.01, 0.03, 0), (0.27, width - 0.03, 0.055), board, 0.03, faces="+x", shade=False)


def globe() -> Material:
    """A small globe: blue seas, ochre land."""
    sea, land = srgb("#3c6e8f"), srgb("#c9a96a")
    return Material(lambda u, v: mix(sea, land, step(0.50, 0.56, fbm(u * 14, v * 14, 8))), 0.6, 0.2)


def vase(b: Builder, at, scale: float = 1.0, base: str = "#2d5f8a", band: str = "#e9e4d6", gloss: float = 1.0) -> None:
    """A glazed vase with two bands."""
    one, two = srgb(base), srgb(band)
    length = 0.30 * scale

    def radius(v: np.ndarray) -> np.ndarray:
        t = v / length
        return scale * (
            0.045
            + 0.062 * np.sin(np.pi * t.clip(0, 1) ** 0.75) ** 1.3
            - 0.012 * step(0.75, 0.92, t)
            + 0.016 * step(0.92, 1.0, t)
        )

    def colour(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        t = v / length
        return (
            mix(one, two, ((np.abs(t - 0.62) < 0.035) | (np.abs(t - 0.30) < 0.02)).astype(float))
            * (0.92 + 0.16 * fbm(u * 20, v * 20, 2))[:, None]
        )

    b.lathe(
        at, radius, lambda v: v, length, 0.10 * scale, Material(colour, gloss, 0.12), (0.012 * scale, 0.011 * scale)
    )
    b.spheres.append((*b.point((at[0], at[1], at[2] + 0.13 * scale)), 0.10 * scale))


def floor_lamp(b: Builder) -> None:
    """A floor lamp: brass stem and a linen cone that glows."""
    brass = paint("#b08d4f", gloss=0.9, roughness=0.2)
    b.tube((0, 0, 0.02), 0.011, 1.40, brass, (0.0115, 0.05))
    b.lathe(
        (0, 0, 0),
        lambda v: 0.15 - 0.14 * (v / 0.16) ** 2,
        lambda v: 0.022 * (v / 0.16) ** 0.5,
        0.16,
        0.15,
        brass,
        (0.03, 0.016),
    )
    shade(b, (0, 0, 1.36), 0.21, 0.14, 0.27)


def shade(b: Builder, at, low: float, high: float, height: float, side: float = 0.35) -> None:
    """A lampshade, brightest around the bulb, and the lamp inside it."""
    warm = srgb("#ffd9a0")

    def colour(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        t = v / height
        glow = 0.45 + 0.75 * np.exp(-(((t - 0.45) / 0.38) ** 2)) + 0.05 * noise(u * 300, v * 12, 4)
        rim = (t < 0.03) | (t > 0.97)
        return warm * np.where(rim, 0.35, glow)[:, None]

    b.lathe(
        at,
        lambda v: low + (high - low) * v / height,
        lambda v: v,
        height,
        max(low, high),
        Material(colour, emitter="lamp"),
        (0.016, 0.014),
        crisp=True,
    )
    b.lamps.append(Lamp(b.point((at[0], at[1], at[2] + height * 0.5)), 0.05, side=side))


def pendant(b: Builder, height: float, ceiling: float) -> None:
    """A hanging lamp over the table: black cord, ceiling rose, opal glass bowl."""
    cord = paint("#26231f")
    b.tube((0, 0, height + 0.22), 0.005, ceiling - height - 0.22, cord, (0.016, 0.06))
    b.tube((0, 0, ceiling - 0.04), 0.05, 0.04, paint("#b08d4f", gloss=0.8), 0.016)
    dark = paint("#2b3d3a", gloss=0.7, roughness=0.2)
    b.lathe(
        (0, 0, height),
        lambda v: 0.22 * np.cos(v / 0.30 * 1.42).clip(0.06),
        lambda v: 0.21 * np.sin(v / 0.30 * 1.42),
        0.30,
        0.20,
        dark,
        0.014,
    )
    glow = Material(lambda u, v: np.tile(srgb("#ffdca8") * 1.1, (len(u), 1)), emitter="lamp")
    b.patch(P.placed(P.disk(0.195, 0.0), (0, 0, height + 0.025), pitch=np.pi), (0.39, 0.39), glow, 0.022, crisp=False)
    b.ball((0, 0, height + 0.03), 0.07, glow, 0.02, shade=False)
    b.lamps.append(Lamp(b.point((0, 0, height - 0.05)), 0.06, up=0.0, down=1.0, side=0.6))


def armchair(b: Builder) -> None:
    """A small upholstered chair facing -y."""
    body, leg = cloth("#c2b6a0", 61, 0.14), wood("#7d5431", "#4a2f1a", 62)
    b.box((-0.36, -0.36, 0.20), (0.36, 0.34, 0.32), body, 0.028, round=0.04)
    b.box((-0.30, -0.39, 0.30), (0.30, 0.24, 0.45), body, 0.024, round=0.055, puff=0.12)
    b.box((-0.36, 0.16, 0.22), (0.36, 0.40, 0.86), body, 0.026, round=0.09)
    for s in (-1, 1):
        b.box((s * 0.36 - 0.07, -0.37, 0.20), (s * 0.36 + 0.07, 0.36, 0.60), body, 0.026, round=0.065)
        for y in (-0.30, 0.30):
            b.box((s * 0.32 - 0.02, y - 0.02, 0), (s * 0.32 + 0.02, y + 0.02, 0.21), leg, 0.02, faces="+x -x +y -y")
    pillow(b, (0.02, 0.12, 0.62), cloth("#7a8f6a", 63), 0.40, yaw=0.1)


def sideboard(b: Builder, width: float = 1.5) -> None:
    """A low cabinet along x with its back at y = 0 and its doors towards +y."""
    body, leg = wood("#9a6b40", "#643f22", 71, gloss=0.5, roughness=0.2), wood("#5d3d25", "#38230f", 72)
    b.box((0, 0, 0.16), (width, 0.42, 0.76), body, 0.022, faces="+x -x +y +z")
    for k in range(1, 3):
        b.box(
            (width * k / 3 - 0.004, 0.415, 0.18),
            (width * k / 3 + 0.004, 0.424, 0.74),
            paint("#2c1c10"),
            0.02,
            faces="+y",
            shade=False,
        )
    for k in range(3):
        b.box(
            (width * (k + 0.5) / 3 - 0.05, 0.42, 0.66),
            (width * (k + 0.5) / 3 + 0.05, 0.437, 0.672),
            paint("#c9a55c", gloss=0.9),
            0.012,
            shade=False,
        )
    for x in (0.08, width - 0.08):
        for y in (0.05, 0.36):
            b.box((x - 0.02, y - 0.02, 0), (x + 0.02, y + 0.02, 0.16), leg, 0.02, faces="+x -x +y -y")


def curtain(b: Builder, x: float, y: float, width: float, top: float, bottom: float, folds: int, seed: int) -> None:
    """A linen curtain hanging in front of the wall, its folds towards the room (-y)."""

    def shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        t = u / width
        deep = 0.045 * np.sin(2 * np.pi * folds * t + 0.5 * np.sin(3 * t + seed)) * (0.7 + 0.3 * v / (top - bottom))
        return np.stack([x + u, y - 0.02 + deep, top - v], 1)

    # u x v must face the room: +x cross -z is +y, so mirror u.
    b.patch(
        lambda u, v: shape(width - u, v),
        (width, top - bottom),
        cloth("#d9cdb8", seed, 0.06, translucency=0.55),
        (0.013, 0.04),
        crisp=False,
    )
