"""Parametric patches: smooth pieces of surface that become grids of flat, overlapping Gaussians.

A patch maps a rectangle of (u, v) in metres to the room. Sampling it means laying a grid of cells over the rectangle
and putting one Gaussian in the middle of each cell, as wide as the cell and thin along the normal. A regular grid
covers a surface with far fewer Gaussians than random points do, and the cells next to an edge are narrow, so that
silhouettes stay crisp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

SIGMA_PER_CELL = 0.70  # at this width a grid of opacity 0.98 lets 2 % of the light through between four cells
THICKNESS = 0.0012  # standard deviation along the normal, metres
# Widths of the cells beside an edge, in cells, by the least number of cells that leaves room for them: a wide Gaussian
# at an edge would spill over what adjoins.
_EDGE_CELLS = {3: (0.4,), 7: (0.25, 0.5, 0.75)}

Colour = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (u [n], v [n]) in metres -> linear RGB [n, 3]


@dataclass(frozen=True)
class Material:
    """Colour and finish of a surface.

    colour: linear-light albedo in [0, 1] (for an emitter: its pattern), as a function of the patch's (u, v) in metres.
    gloss: strength of the mirror-like part, 0 (chalk) to 1 (lacquer). roughness: its blur, 0.05 to 1.
    emitter: "" for an ordinary surface, "outdoor" for what is seen through the window, "lamp" for a glowing shade.
    translucency: share of the light arriving on the back that is seen from the front (curtains, leaves).
    """

    colour: Colour
    gloss: float = 0.0
    roughness: float = 0.35
    emitter: str = ""
    translucency: float = 0.0


@dataclass
class Patch:
    """One piece of surface: `shape` maps (u [n], v [n]), 0 <= u <= size[0] and 0 <= v <= size[1], to points [n, 3].

    The outside is the side of dshape/du x dshape/dv. `spacing` is the wanted cell size in metres for the nominal
    number of Gaussians. Cells end at `breaks`, so that the pattern's own lines coincide with cell borders; a cell
    whose centre lies in one of `holes` (u0, u1, v0, v1) is left out.
    """

    shape: Callable[[np.ndarray, np.ndarray], np.ndarray]
    size: tuple[float, float]
    material: Material
    spacing: tuple[float, float]
    breaks: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    holes: tuple[tuple[float, float, float, float], ...] = ()
    crisp: bool = True
    overlap: float = (
        SIGMA_PER_CELL  # standard deviation in cells; wider leaves no trace of the grid, and blurs the pattern
    )

    def _spans(self, axis: int, scale: float) -> list[tuple[float, float, int]]:
        """From, to and number of cells of each stretch between breaks along u (axis 0) or v (axis 1)."""
        stops = sorted({0.0, self.size[axis], *(b for b in self.breaks[axis] if 0.0 < b < self.size[axis])})
        return [(a, b, max(1, round((b - a) / (self.spacing[axis] * scale)))) for a, b in pairwise(stops)]

    def count(self, scale: float) -> int:
        """Number of cells that are kept."""
        if self.holes:
            return int(self.cells(scale)[2].sum())
        return sum(n for *_, n in self._spans(0, scale)) * sum(n for *_, n in self._spans(1, scale))

    def lines(self, axis: int, scale: float) -> np.ndarray:
        """Cell borders along u (axis 0) or v (axis 1), from 0 to size[axis]."""
        out = [np.zeros(1)]
        for a, b, n in self._spans(axis, scale):
            width = np.ones(n)
            for least, edge in _EDGE_CELLS.items():
                if self.crisp and n >= least:
                    width[: len(edge)], width[-len(edge) :] = edge, edge[::-1]
            out.append(a + (b - a) * np.cumsum(width) / width.sum())
        return np.concatenate(out)

    def cells(self, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Borders along u, borders along v and the mask [nu, nv] of the cells that are kept."""
        lu, lv = self.lines(0, scale), self.lines(1, scale)
        keep = np.ones((len(lu) - 1, len(lv) - 1), bool)
        if self.holes:
            cu, cv = (lu[1:] + lu[:-1])[:, None] / 2, (lv[1:] + lv[:-1])[None] / 2
            for u0, u1, v0, v1 in self.holes:
                keep &= ~((cu > u0) & (cu < u1) & (cv > v0) & (cv < v1))
        return lu, lv, keep


@dataclass
class Box:
    """An occluder of the lighting: a box turned by `yaw` radians about the vertical."""

    centre: np.ndarray  # [3] metres
    half: np.ndarray  # [3] metres
    yaw: float = 0.0


@dataclass
class Window:
    """A vertical opening in the wall y = `y`, daylight comes in towards -y."""

    x: tuple[float, float]
    z: tuple[float, float]
    y: float
    depth: float  # thickness of the wall, metres
    panes: tuple[int, int]  # columns, rows
    bar: float  # width of the bars between the panes, metres


@dataclass
class Lamp:
    """A small round lamp. `up` and `down` say how much of its light leaves above and below the shade, `side` through
    it.
    """

    position: np.ndarray  # [3] metres
    radius: float
    up: float = 1.0
    down: float = 1.0
    side: float = 0.35


@dataclass
class Surface:
    """Everything light() needs to know: n surface elements, and what shades and lights them.

    points [n, 3] metres, z up; normals [n, 3]; tangents [n, 3] (unit, direction of u); sigmas [n, 2] standard
    deviations along tangent and normal x tangent; albedo [n, 3] linear; gloss, roughness, translucency [n]; emitter
    [n] int8 (0 none, 1 outdoor, 2 lamp); neighbours [n, 9] the 3x3 cells around each element (itself where the grid
    ends); phase [n] in 0..8, the position in the 3x3 tile of the grid, by which samples are interleaved.
    """

    points: np.ndarray
    normals: np.ndarray
    tangents: np.ndarray
    sigmas: np.ndarray
    albedo: np.ndarray
    gloss: np.ndarray
    roughness: np.ndarray
    translucency: np.ndarray
    emitter: np.ndarray
    neighbours: np.ndarray
    phase: np.ndarray
    boxes: list[Box] = field(default_factory=list)
    spheres: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # [s, 4] centre, radius
    windows: list[Window] = field(default_factory=list)
    lamps: list[Lamp] = field(default_factory=list)
    room: tuple[np.ndarray, np.ndarray] = field(
        default_factory=lambda: (np.zeros(3), np.zeros(3))
    )  # lower and upper corner

    def __len__(self) -> int:
        return len(self.points)


COLUMNS = (
    "points",
    "normals",
    "tangents",
    "sigmas",
    "albedo",
    "gloss",
    "roughness",
    "translucency",
    "emitter",
    "neighbours",
    "phase",
)
_EMITTERS = {"": 0, "outdoor": 1, "lamp": 2}


def count(patches: list[Patch], scale: float) -> int:
    """Number of elements that sample() makes at this scale of the spacing."""
    return sum(p.count(scale) for p in patches)


def fit_scale(patches: list[Patch], n: int) -> float:
    """Scale of the spacing at which sampling makes at most n elements, and nearly n.

    Raises ValueError where even the coarsest sampling has more: one element for each cell that breaks and shapes force.
    """
    low, high = 0.0, 64.0  # too fine, coarse enough
    least = count(patches, high)
    if least > n:
        raise ValueError(f"n_gaussians must be at least {least} for this room, got {n}")
    scale = 1.0
    for _ in range(60):
        got = count(patches, scale)
        low, high = (scale, high) if got > n else (low, scale)
        if (0.997 * n <= got <= n) or high / max(low, 1e-9) < 1.0001:
            break
        guess = scale * (got / n) ** 0.5 * 1.0005  # the count goes nearly as 1 / scale^2
        scale = guess if low < guess < high else (low + high) / 2
    return high


def refine(surface: Surface, extra: int) -> Surface:
    """Halve `extra` elements, evenly spread over the surface, along their longer side: the count grows by exactly
    `extra`.
    """
    if extra > len(surface):
        raise ValueError(f"extra must be at most the number of elements {len(surface)}, got {extra}")
    chosen = np.linspace(0, len(surface) - 1, extra).astype(np.int64) if extra else np.zeros(0, np.int64)
    u_longer = surface.sigmas[chosen, 0] >= surface.sigmas[chosen, 1]
    axis = np.where(
        u_longer[:, None], surface.tangents[chosen], np.cross(surface.normals[chosen], surface.tangents[chosen])
    )
    move = axis * (surface.sigmas[chosen].max(1) / (4 * SIGMA_PER_CELL))[:, None]
    columns = {name: np.concatenate([getattr(surface, name), getattr(surface, name)[chosen]]) for name in COLUMNS}
    halves = np.stack([chosen, np.arange(len(surface), len(surface) + extra)])
    columns["points"][halves] += np.stack([move, -move])
    columns["sigmas"][halves] *= np.where(u_longer[:, None], [0.5, 1.0], [1.0, 0.5])
    return replace(surface, **columns)


def _neighbours(keep: np.ndarray, first: int) -> np.ndarray:
    """Indices [n, 9] of the 3x3 block around each kept cell; a missing neighbour is the cell itself."""
    index = np.full((keep.shape[0] + 2, keep.shape[1] + 2), -1, np.int64)
    index[1:-1, 1:-1][keep] = np.arange(first, first + int(keep.sum()))
    blocks = [
        index[1 + i : index.shape[0] - 1 + i, 1 + j : index.shape[1] - 1 + j][keep]
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
    ]
    out = np.stack(blocks, 1)
    return np.where(out < 0, out[:, 4:5], out)


def sample(patches: list[Patch], scale: float) -> Surface:
    """Lay the grids: one element per kept cell, in the order of the patches, then u, then v."""
    rows: dict[str, list[np.ndarray]] = {k: [] for k in (*COLUMNS, "du", "dv", "cell")}
    first, eps = 0, 1e-4
    for patch in patches:
        lu, lv, keep = patch.cells(scale)
        i, j = np.nonzero(keep)
        u, v, n = (lu[i] + lu[i + 1]) / 2, (lv[j] + lv[j + 1]) / 2, len(i)
        # The point and, by central differences, the derivatives: one call of the shape for all five.
        p, right, left, above, below = patch.shape(
            np.concatenate([u, u + eps, u - eps, u, u]), np.concatenate([v, v, v, v + eps, v - eps])
        ).reshape(5, n, 3)
        m = patch.material
        rows["points"].append(p)
        rows["du"].append((right - left) / (2 * eps))
        rows["dv"].append((above - below) / (2 * eps))
        width = np.stack([lu[i + 1] - lu[i], lv[j + 1] - lv[j]], 1)
        inner = width / width.max(0)  # narrow cells beside an edge keep the usual overlap
        rows["cell"].append(width * (SIGMA_PER_CELL + (patch.overlap - SIGMA_PER_CELL) * inner))
        rows["albedo"].append(np.broadcast_to(m.colour(u, v), (n, 3)))
        for name, value in (
            ("gloss", m.gloss),
            ("roughness", m.roughness),
            ("translucency", m.translucency),
            ("emitter", np.int8(_EMITTERS[m.emitter])),
        ):
            rows[name].append(np.full(n, value))
        rows["neighbours"].append(_neighbours(keep, first))
        rows["phase"].append((i % 3) * 3 + j % 3)
        first += n
    whole = {k: np.concatenate(v) for k, v in rows.items() if v}
    du, dv, cell = (whole.pop(k) for k in ("du", "dv", "cell"))
    tangents = du / np.linalg.norm(du, axis=1, keepdims=True).clip(1e-9)
    normals = np.cross(du, dv)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-9)
    across = np.abs((dv * np.cross(normals, tangents)).sum(1))
    sigmas = cell * np.stack([np.linalg.norm(du, axis=1), across], 1)
    return Surface(normals=normals, tangents=tangents, sigmas=sigmas, **whole)


# Shapes --------------------------------------------------------------------------------------------------------------


def plane(origin: tuple[float, ...], eu: tuple[float, ...], ev: tuple[float, ...]) -> Callable:
    """The rectangle origin + u eu + v ev; its outside is the side of eu x ev."""
    o, a, b = np.asarray(origin, float), np.asarray(eu, float), np.asarray(ev, float)
    return lambda u, v: o + u[:, None] * a + v[:, None] * b


def lathe(
    radius: Callable[[np.ndarray], np.ndarray], height: Callable[[np.ndarray], np.ndarray], around: float
) -> Callable:
    """A surface of revolution about z; u runs once around in `around` metres, (radius(v), height(v)) is the profile."""

    def shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        a, r = 2 * np.pi * u / around, radius(v)
        return np.stack([r * np.cos(a), r * np.sin(a), height(v)], 1)

    return shape


def disk(radius: float, z: float) -> Callable:
    """A horizontal disk facing up, u and v in 0..2 radius, by the elliptical map of the square (no crowded centre)."""

    def shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        a, b = u / radius - 1, v / radius - 1
        return np.stack(
            [radius * a * np.sqrt(1 - b * b / 2), radius * b * np.sqrt(1 - a * a / 2), np.full_like(u, z)], 1
        )

    return shape


# The faces of a box [-h, h]: origin as signs, direction of u and of v; u x v points outwards.
FACES = {
    "+x": ((1, -1, -1), (0, 1, 0), (0, 0, 1)),
    "-x": ((-1, 1, -1), (0, -1, 0), (0, 0, 1)),
    "+y": ((1, 1, -1), (-1, 0, 0), (0, 0, 1)),
    "-y": ((-1, -1, -1), (1, 0, 0), (0, 0, 1)),
    "+z": ((-1, -1, 1), (1, 0, 0), (0, 1, 0)),
    "-z": ((-1, 1, -1), (1, 0, 0), (0, -1, 0)),
}


def face(name: str, half: np.ndarray) -> tuple[Callable, tuple[float, float]]:
    """Shape and size of one face of the box [-half, half]."""
    origin, eu, ev = (np.asarray(a, float) for a in FACES[name])
    size = (float(2 * np.abs(eu) @ half), float(2 * np.abs(ev) @ half))
    return plane(origin * half, eu, ev), size


def rounded(shape: Callable, half: np.ndarray, radius: float, puff: float = 0.0) -> Callable:
    """Bend a face of the box [-half, half] into the box with edges rounded by `radius`; `puff` swells its thin axis
    like a cushion.
    """
    inner = half - radius
    thin = int(np.argmin(half))
    wide = [k for k in range(3) if k != thin]

    def bent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        p = shape(u, v)
        core = np.clip(p, -inner, inner)
        d = p - core
        q = core + radius * d / np.linalg.norm(d, axis=1, keepdims=True).clip(1e-9)
        if puff:
            swell = (1 - (q[:, wide[0]] / half[wide[0]]) ** 2).clip(0) * (
                1 - (q[:, wide[1]] / half[wide[1]]) ** 2
            ).clip(0)
            q = q.copy()
            q[:, thin] *= 1 - puff + 2 * puff * np.sqrt(swell)
        return q

    return bent


def placed(shape: Callable, offset: tuple[float, ...], yaw: float = 0.0, pitch: float = 0.0) -> Callable:
    """Turn a shape by `pitch` about x, then by `yaw` about z (radians), and move it."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    turn = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    move = np.asarray(offset, float)
    return lambda u, v: shape(u, v) @ turn.T + move
