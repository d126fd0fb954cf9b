"""The furnished room: what stands where. Metres, z up; x from west to east, y from south to north (the window), floor
at z = 0.
"""

from __future__ import annotations

import numpy as np

from . import furniture as F
from . import patches as P
from . import plants
from .builder import Builder
from .materials import cloth, outdoors, paint, picture, rug, wood_colour
from .patches import Material, Surface, Window

LOW, HIGH = np.array([-3.4, -2.7, 0.0]), np.array([3.4, 2.7, 2.75])  # the room's corners
_WINDOW = Window(x=(-1.25, 1.25), z=(0.80, 2.28), y=2.7, depth=0.16, panes=(3, 2), bar=0.045)
_RAIL = 0.88  # height of the wainscot


def surface(n: int, seed: int) -> Surface:
    """Geometry and materials of the room as exactly n surface elements. ValueError where n is too small to hold the
    furniture.
    """
    b = Builder(np.random.default_rng(seed))
    shell(b)
    furnish(b)
    out = P.sample(b.patches, P.fit_scale(b.patches, n))
    out = P.refine(out, n - len(out))
    out.boxes, out.windows, out.lamps, out.room = b.boxes, b.windows, b.lamps, (LOW, HIGH)
    out.spheres = np.array(b.spheres).reshape(-1, 4)
    return out


def furnish(b: Builder) -> None:
    """Furniture and small things, placed by hand."""
    size = (2.5, 3.3)
    with b.frame((0.75, 0.15, 0.0)):
        b.patch(P.plane((-size[0] / 2, -size[1] / 2, 0.010), (1, 0, 0), (0, 1, 0)), size, rug(size), 0.0215)
        edge = cloth("#e6dcc8", 7)
        b.box(
            (-size[0] / 2, -size[1] / 2, 0),
            (size[0] / 2, size[1] / 2, 0.010),
            edge,
            0.02,
            faces="+x -x +y -y",
            shade=False,
            stretch=1,
        )
    with b.frame((2.88, 0.25, 0.0)):
        F.sofa(b)
    with b.frame((1.30, 0.25, 0.010)):
        F.coffee_table(b)
        F.vase(b, (0.05, 0.30, 0.42), 0.8)
        plants.tulips(b, (0.05, 0.30, 0.62))
        for k, (hue, wide) in enumerate((("#7d2e2a", 0.25), ("#e4dccb", 0.23), ("#24405e", 0.20))):
            b.box(
                (-0.16, -0.36, 0.42 + 0.032 * k),
                (-0.16 + wide * 0.75, -0.36 + wide, 0.45 + 0.032 * k),
                paint(hue, 0.3),
                0.016,
                yaw=0.15 * k,
            )
        bowl(b, (0.12, -0.02, 0.42))
    with b.frame((0.55, -1.75, 0.0), yaw=np.pi - 0.45):
        F.armchair(b)
    with b.frame((-1.95, -1.20, 0.0)):
        F.round_table(b)
        F.vase(b, (0.02, 0.03, 0.75), 0.62, "#c8cfc6", "#6f8f86")
        plants.tulips(b, (0.02, 0.03, 0.90), 0.75, ("#e7b53c", "#f0d9a0", "#d98a3c"))
        for k, turn in enumerate((0.25, 1.75, 3.3, 4.75)):
            with b.frame((0, 0, 0), yaw=turn), b.frame((0.0, 0.62 + 0.05 * (k % 2), 0.0)):
                F.chair(b)
        F.pendant(b, 1.62, HIGH[2])
    with b.frame((LOW[0] + 0.01, _SHELF, 0.0)):
        F.bookshelf(b)
    with b.frame((-2.75, 2.12, 0.0)):
        plants.big_plant(b)
    with b.frame((2.90, 1.80, 0.0)):
        F.floor_lamp(b)
    with b.frame((1.55, LOW[1] + 0.03, 0.0)):
        F.sideboard(b)
        F.vase(b, (0.25, 0.22, 0.76), 1.1, "#b5532f", "#e4c590")
        plants.trailing_plant(b, (1.22, 0.22, 0.76))
        b.box((0.55, 0.14, 0.76), (0.90, 0.32, 0.80), paint("#2d4a5c", 0.3), 0.018)
        b.box((0.57, 0.15, 0.80), (0.86, 0.31, 0.83), paint("#d8c8a4", 0.3), 0.018)
    b.ball((-0.75, 0.55, 0.145), 0.145, beach_ball(), 0.013)
    pictures(b)
    for x, wide, seed in ((-1.92, 0.72, 81), (1.20, 0.72, 82)):
        F.curtain(b, x, HIGH[1] - 0.09, wide, 2.44, 0.03, 7, seed)
    b.box(
        (-2.0, HIGH[1] - 0.115, 2.44),
        (2.0, HIGH[1] - 0.09, 2.465),
        paint("#b08d4f", gloss=0.9),
        0.014,
        shade=False,
        stretch=1.5,
    )


def beach_ball() -> Material:
    """Red with a cream band, lacquered; the pattern follows the cube's faces the ball is made of."""
    red, cream = np.array([0.55, 0.045, 0.03]), np.array([0.80, 0.74, 0.62])

    def colour(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        band = np.abs(v - 0.145) < 0.038
        return np.where(band[:, None], cream, red)

    return Material(colour, 1.0, 0.12)


def bowl(b: Builder, at: tuple[float, float, float]) -> None:
    """A wooden bowl of oranges."""
    out = Material(wood_colour("#b98a55", "#8a5f33", 91), 0.4, 0.25)
    b.lathe(
        at, lambda v: 0.05 + 0.085 * np.sin(v / 0.13 * 1.4), lambda v: 0.075 * (v / 0.13) ** 1.6, 0.13, 0.13, out, 0.013
    )
    b.spheres.append((*b.point((at[0], at[1], at[2] + 0.04)), 0.09))
    for k in range(5):
        a, r, z = 2 * np.pi * k / 4, 0.058 if k < 4 else 0.0, 0.07 if k < 4 else 0.115
        b.ball(
            (at[0] + r * np.cos(a), at[1] + r * np.sin(a), at[2] + z),
            0.042,
            paint("#e08a2b", 0.5, 0.25, 0.15, k),
            0.011,
            shade=False,
        )


# Framed prints: lower corner on the wall, direction along it (to the right, seen from inside), width, height, kind of
# picture.
_PICTURES = (
    ((HIGH[0], 1.34, 1.32), (0, -1, 0), 0.60, 0.80, 3), ((HIGH[0], 0.56, 1.28), (0, -1, 0), 1.12, 0.88, 0),
    ((HIGH[0], -0.74, 1.32), (0, -1, 0), 0.60, 0.80, 2), ((2.90, LOW[1], 1.24), (-1, 0, 0), 1.15, 0.85, 1),
    ((LOW[0], -2.05, 1.28), (0, 1, 0), 0.60, 0.80, 2), ((LOW[0], -1.20, 1.28), (0, 1, 0), 0.60, 0.80, 3),
)  # fmt: skip
_SHELF = -0.15  # southern end of the bookshelf on the west wall


def hidden(corner: np.ndarray, eu: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Parts (u0, u1, z0, z1) of a wall behind pictures and bookshelf, less a margin: Gaussians there would only bleed
    through.
    """
    margin, out = 0.002, []
    for at, along, wide, tall, _ in _PICTURES:
        if np.allclose(along, eu):
            u = float((np.asarray(at) - corner) @ eu)
            out.append((u + margin, u + wide - margin, at[2] + margin, at[2] + tall - margin))
    if np.allclose(eu, (0, 1, 0)):
        u = _SHELF - LOW[1]
        out.append((u + margin, u + 1.9 - margin, -1.0, 2.12 - margin))
    return out


def pictures(b: Builder) -> None:
    """The framed prints."""
    frame = paint("#2e2620", 0.5, 0.2)
    for corner, eu, wide, tall, kind in _PICTURES:
        eu3, up = np.asarray(eu, float), np.array([0, 0, 1.0])
        out = np.cross(eu3, up)  # faces the room
        c, rim, deep = np.asarray(corner, float), 0.030, 0.042
        inner = (wide - 2 * rim, tall - 2 * rim)
        b.patch(P.plane(c + eu3 * rim + up * rim + out * 0.026, eu3, up), inner, picture(kind, inner), 0.0125)
        for a, e, f, s in ((0, eu3, up, (wide, rim)), (tall - rim, eu3, up, (wide, rim))):
            b.patch(P.plane(c + up * a + out * deep, e, f), s, frame, (0.018, 0.0095))
        for a in (0.0, wide - rim):
            b.patch(P.plane(c + eu3 * a + out * deep, eu3, up), (rim, tall), frame, (0.0095, 0.018))
        for origin, e, f, s in (
            (c, out, up, (deep, tall)),
            (c + eu3 * wide + out * deep, -out, up, (deep, tall)),
            (c + out * deep, -out, eu3, (deep, wide)),
            (c + up * tall, out, eu3, (deep, wide)),
        ):
            b.patch(P.plane(origin, e, f), s, frame, (0.014, 0.018))


def shell(b: Builder) -> None:
    """Floor, ceiling, four walls with wainscot, window, door and the view outside."""
    floor(b)
    x0, y0, _ = LOW
    x1, y1, top = HIGH
    plaster, white = paint("#e9e0cf", mottle=0.05, seed=2), paint("#ece8dd", mottle=0.02)
    sage = paint("#9fb0a0", mottle=0.06, seed=3)
    b.patch(
        P.plane((x0, y1, top), (1, 0, 0), (0, -1, 0)),
        (x1 - x0, y1 - y0),
        paint("#f3efe6", mottle=0.02),
        0.085,
        overlap=0.9,
    )
    # Each wall: lower left corner seen from inside, direction of u, length, paint above the rail, holes (u0, u1, z0,
    # z1).
    w = _WINDOW
    door = (2.35, 3.25, 0.0, 2.06)  # along the south wall's u, which runs from east to west
    walls = [
        ((x0, y1, 0.0), (1, 0, 0), x1 - x0, plaster, [(w.x[0] - x0, w.x[1] - x0, *w.z)]),
        ((x1, y1, 0.0), (0, -1, 0), y1 - y0, sage, []),
        ((x1, y0, 0.0), (-1, 0, 0), x1 - x0, plaster, [door]),
        ((x0, y0, 0.0), (0, 1, 0), y1 - y0, sage, []),
    ]
    for corner, eu, length, upper, holes in walls:
        start, along = np.asarray(corner, float), np.asarray(eu, float)
        wall(b, start, along, length, top, upper, white, holes, hidden(start, along))
    window(b, white)
    with b.frame((x1 - door[1], y0, 0.0)):
        panel_door(b, door[1] - door[0], door[3])
    radius, high, low = 10.0, 7.5, -3.2
    around = radius * np.radians(136)
    start = np.radians(158)

    def view(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.stack([radius * np.cos(start - u / radius), y1 + radius * np.sin(start - u / radius), low + v], 1)

    b.patch(
        view, (around, high - low), outdoors(around, high - low, 1.25 - low), (0.19, 0.125), crisp=False, overlap=0.85
    )


def floor(b: Builder) -> None:
    """Oak planks along x: a patch for each row, with dark joints between rows and between the staggered boards."""
    width, joint = 0.135, 0.004
    rows = int(np.ceil((HIGH[1] - LOW[1]) / width))
    length = HIGH[0] - LOW[0]
    hides = (0.75 - 1.23, 0.75 + 1.23, 0.15 - 1.63, 0.15 + 1.63)  # the rug, less a margin: x0, x1, y0, y1
    for k in range(rows):
        y = LOW[1] + k * width
        wide = min(width, HIGH[1] - y)
        ends = np.cumsum(b.rng.uniform(0.9, 1.9, 9)) - b.rng.uniform(0, 0.9)
        ends = ends[(ends > 0.15) & (ends < length - 0.15)]
        tone = b.rng.uniform(0.80, 1.15, len(ends) + 1)[:, None] * (1 + b.rng.uniform(-0.05, 0.05, (len(ends) + 1, 3)))
        shift = b.rng.uniform(0, 50, len(ends) + 1)
        grain = wood_colour("#c39a68", "#94663b", 100 + k % 5, 14.0)

        def colour(
            u: np.ndarray, v: np.ndarray, ends=ends, tone=tone, shift=shift, grain=grain, wide=wide
        ) -> np.ndarray:
            board = np.searchsorted(ends, u)
            out = grain(u + shift[board], v) * tone[board]
            gap = (v > wide - joint) | (np.abs(u[:, None] - ends[None] - 0.001).min(1, initial=9.0) < 0.002)
            return np.where(gap[:, None], out * 0.22, out)

        breaks = (tuple(e for end in ends for e in (end - 0.001, end + 0.003)), (wide - joint,))
        hole = (hides[0] - LOW[0], hides[1] - LOW[0], -1.0, 1.0)
        holes = (hole,) if hides[2] < y and y + wide < hides[3] else ()
        b.patch(
            P.plane((LOW[0], y, 0.0), (1, 0, 0), (0, 1, 0)),
            (length, wide),
            Material(colour, 0.75, 0.16),
            (0.062, 0.0225),
            breaks=breaks,
            holes=holes,
        )


def wall(
    b: Builder,
    corner: np.ndarray,
    eu: np.ndarray,
    length: float,
    top: float,
    upper: Material,
    white: Material,
    holes: list,
    covered: list,
) -> None:
    """One wall: plaster above the rail, wainscot panels with mouldings below, skirting and cornice."""
    up = np.array([0, 0, 1.0])
    bu = tuple(h for hole in holes for h in hole[:2])
    bz = tuple(h for hole in holes for h in hole[2:])
    pu = bu + tuple(h for hole in covered for h in hole[:2])
    pz = bz + tuple(h for hole in covered for h in hole[2:])
    cut = [(h[0], h[1], h[2] - _RAIL, h[3] - _RAIL) for h in holes + covered]
    b.patch(
        P.plane(corner + up * _RAIL, eu, up),
        (length, top - _RAIL),
        upper,
        0.050,
        breaks=(pu, tuple(z - _RAIL for z in pz)),
        holes=tuple(cut),
        overlap=0.85,
    )
    b.patch(
        P.plane(corner, eu, up),
        (length, _RAIL),
        white,
        0.045,
        breaks=(pu, pz),
        holes=tuple(holes + covered),
        overlap=0.85,
    )
    doors = [(h[0] - 0.09, h[1] + 0.09) for h in holes if h[2] == 0.0]
    spans, start = [], 0.0
    for lo, hi in doors:
        spans.append((start, lo))
        start = hi
    spans.append((start, length))
    yaw = float(np.arctan2(eu[1], eu[0]))
    with b.frame(tuple(corner), yaw):  # local x runs along the wall, the room is at -y
        for lo, hi in spans:
            b.box((lo, -0.018, 0.0), (hi, 0.0, 0.13), white, 0.026, faces="-y +z -x +x", shade=False, stretch=3)
            b.box(
                (lo, -0.032, _RAIL - 0.02),
                (hi, 0.0, _RAIL + 0.02),
                white,
                0.016,
                faces="-y +z -z -x +x",
                shade=False,
                stretch=4,
            )
            n = max(1, round((hi - lo) / 0.85))
            for k in range(n):
                a, c = lo + (hi - lo) * k / n + 0.07, lo + (hi - lo) * (k + 1) / n - 0.07
                moulding(b, a, c, 0.21, _RAIL - 0.09, white)
        b.box((0, -0.05, top - 0.07), (length, 0.0, top), white, 0.035, faces="-y -z", shade=False, stretch=2)


def moulding(b: Builder, x0: float, x1: float, z0: float, z1: float, material: Material) -> None:
    """A raised frame on the wall y = 0, room at -y: bevelled strips whose slopes catch the light differently."""
    w, deep = 0.022, 0.014
    for inside in (False, True):  # the outer slope rises towards the middle of the strip, the inner one falls again
        a, c = (0.0, w) if not inside else (w, 2 * w)
        h0, h1 = (0.0, deep) if not inside else (deep, 0.0)
        strips = (
            ((x0 + a, -h0, z0 + a), (x1 - x0 - 2 * a, 0, 0), (0, h0 - h1, c - a)),
            ((x1 - a, -h0, z1 - a), (x0 - x1 + 2 * a, 0, 0), (0, h0 - h1, a - c)),
            ((x0 + a, -h0, z1 - a), (0, 0, z0 - z1 + 2 * a), (c - a, h0 - h1, 0)),
            ((x1 - a, -h0, z0 + a), (0, 0, z1 - z0 - 2 * a), (a - c, h0 - h1, 0)),
        )
        for origin, eu, ev in strips:
            lu, lv = float(np.linalg.norm(eu)), float(np.linalg.norm(ev))
            b.patch(
                P.plane(origin, np.asarray(eu) / lu, np.asarray(ev) / lv),
                (lu, lv),
                material,
                (0.09, 0.026),
                crisp=False,
            )


def window(b: Builder, white: Material) -> None:
    """Casing, sill, reveal and glazing bars."""
    w, t = _WINDOW, 0.07
    y = w.y
    for lo, hi in (
        ((w.x[0] - t, w.z[1]), (w.x[1] + t, w.z[1] + t)),
        ((w.x[0] - t, w.z[0]), (w.x[0], w.z[1])),
        ((w.x[1], w.z[0]), (w.x[1] + t, w.z[1])),
    ):
        b.box(
            (lo[0], y - 0.025, lo[1]), (hi[0], y, hi[1]), white, 0.022, faces="+x -x -y +z -z", shade=False, stretch=3
        )
    b.box(
        (w.x[0] - 0.12, y - 0.14, w.z[0] - 0.035),
        (w.x[1] + 0.12, y + w.depth, w.z[0]),
        white,
        0.022,
        faces="+x -x -y +z -z",
        shade=False,
        stretch=2,
    )
    wide, tall = w.x[1] - w.x[0], w.z[1] - w.z[0]
    b.patch(P.plane((w.x[0], y, w.z[0]), (0, 1, 0), (0, 0, 1)), (w.depth, tall), white, 0.03)
    b.patch(P.plane((w.x[1], y + w.depth, w.z[0]), (0, -1, 0), (0, 0, 1)), (w.depth, tall), white, 0.03)
    b.patch(P.plane((w.x[0], y + w.depth, w.z[1]), (1, 0, 0), (0, -1, 0)), (wide, w.depth), white, 0.03)
    outer = y + w.depth * 0.55
    for k in range(w.panes[0] + 1):
        x = w.x[0] + wide * k / w.panes[0]
        b.box(
            (x - w.bar / 2, outer - 0.02, w.z[0]),
            (x + w.bar / 2, outer + 0.02, w.z[1]),
            white,
            0.016,
            faces="+x -x -y",
            shade=False,
            stretch=3,
        )
    for k in range(w.panes[1] + 1):
        z = w.z[0] + tall * (0.0, 0.66, 1.0)[k]
        b.box(
            (w.x[0], outer - 0.018, z - w.bar / 2),
            (w.x[1], outer + 0.018, z + w.bar / 2),
            white,
            0.016,
            faces="-y +z -z",
            shade=False,
            stretch=3,
        )
    b.windows.append(w)
    plants.trailing_plant(b, (0.85, y - 0.04, w.z[0]))


def panel_door(b: Builder, width: float, height: float) -> None:
    """A closed four-panel door in the wall y = 0, room at +y, with casing and a brass knob."""
    leaf, white = paint("#5f7674", gloss=0.35, roughness=0.25, mottle=0.03), paint("#ece8dd", gloss=0.12, mottle=0.02)
    b.patch(P.plane((width, -0.03, 0.0), (-1, 0, 0), (0, 0, 1)), (width, height), leaf, 0.035)
    for lo, hi in (
        ((-0.085, 0.0), (0.0, height + 0.085)),
        ((width, 0.0), (width + 0.085, height + 0.085)),
        ((0.0, height), (width, height + 0.085)),
    ):
        b.box(
            (lo[0], -0.03, lo[1]), (hi[0], 0.022, hi[1]), white, 0.022, faces="+x -x +y +z -z", shade=False, stretch=3
        )
    with b.frame((width, -0.03, 0.0), yaw=np.pi):  # mouldings are drawn on a wall whose room is at -y
        for x0, x1 in ((0.10, width / 2 - 0.05), (width / 2 + 0.05, width - 0.10)):
            for z0, z1 in ((0.16, 0.86), (1.02, height - 0.14)):
                moulding(b, x0, x1, z0, z1, leaf)
    b.ball((0.07, 0.035, 0.98), 0.028, paint("#c9a55c", gloss=1.0, roughness=0.15), 0.011, shade=False)
