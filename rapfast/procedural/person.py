"""A procedural person from the hips up, as flat Gaussians that hang on bones: head with face and hair, suit, hands.

Units are metres, z up, the person looks along -y and stands with the arms hanging down; `person_motion` moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import patches as P
from .builder import ALL
from .materials import fbm, mix, noise, srgb, step
from .patches import THICKNESS, Material, Patch
from .scenes import quaternions

BONES = (
    "root", "chest", "head", "jaw", "lid_l", "lid_r", "eye_l", "eye_r",
    "arm_l", "fore_l", "hand_l", "arm_r", "fore_r", "hand_r",
)  # fmt: skip
PARENTS = (-1, 0, 1, 2, 2, 2, 2, 2, 1, 8, 9, 1, 11, 12)
PIVOTS = np.array(
    [
        [0, 0, 0.62], [0, 0.01, 1.16], [0, 0.015, 1.47], [0, -0.012, 1.60],
        [0.0315, -0.0785, 1.6345], [-0.0315, -0.0785, 1.6345], [0.0315, -0.0785, 1.6345], [-0.0315, -0.0785, 1.6345],
        [0.185, 0.005, 1.375], [0.222, 0.01, 1.105], [0.240, -0.005, 0.865],
        [-0.185, 0.005, 1.375], [-0.222, 0.01, 1.105], [-0.240, -0.005, 0.865],
    ]
)  # fmt: skip
"""Where each bone turns, in the rest pose. "l" is the side of +x."""

SKIN, LIP, HAIR = "#d9a07c", "#b5564f", "#3a2619"
SUIT, SHIRT, TIE = "#27364f", "#e9ebee", "#8e2230"

# Of the lighting, which is baked: the key from the front left above, a weak fill from the right, sky from above.
_KEY, _FILL = np.array([-0.45, -0.75, 0.55]), np.array([0.8, -0.5, 0.1])

Points = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Person:
    """N Gaussians at rest, and the two bones that move each.

    Attributes:
        points [N, 3], quats [N, 4] wxyz, scales [N, 3], normals [N, 3]; colours [N, 3], display RGB in 0..1.
        bones [N, 2] int64; weights [N, 2], which add up to 1. parts [N] int64: which piece of the figure.
    """

    points: np.ndarray
    quats: np.ndarray
    scales: np.ndarray
    normals: np.ndarray
    colours: np.ndarray
    bones: np.ndarray
    weights: np.ndarray
    parts: np.ndarray


@dataclass
class _Part:
    """A piece of surface: how it is coloured and moved, and which of its points stay."""

    patch: Patch
    colour: Points  # positions [n, 3] -> linear RGB [n, 3]
    bones: tuple[str, str]
    weight: Points | None = None  # of the second bone [n]
    keep: Points | None = None
    gloss: float = 0.0


@dataclass
class _Parts:
    parts: list[_Part] = field(default_factory=list)

    def surface(self, shape, size, spacing, colour, bone, **options) -> None:
        bones = (bone, bone) if isinstance(bone, str) else bone
        plain = Material(lambda u, v: np.zeros((len(u), 3)))
        colour = _constant(colour) if isinstance(colour, str) else colour
        self.parts.append(_Part(Patch(shape, size, plain, (spacing, spacing), crisp=False), colour, bones, **options))

    def ball(self, at, radii, spacing, colour, bone, bend: Points | None = None, turn=None, **options) -> None:
        """An ellipsoid, as the faces of a cube blown up; `bend` deforms what is then around the origin."""
        at, radii, unit = np.asarray(at, float), np.asarray(radii, float), np.ones(3)
        turn = np.eye(3) if turn is None else turn
        for name in ALL.split():
            face, size = P.face(name, unit)
            sphere = P.rounded(face, unit, 1.0)

            def shape(u, v, f=sphere):
                p = f(u, v) * radii
                return (p if bend is None else bend(p)) @ turn.T + at

            self.surface(shape, size, spacing / float(np.mean(radii)), colour, bone, **options)

    def tube(self, spine: Sequence[Sequence[float]], spacing, colour, bone, power: float = 2.0, **options) -> None:
        """Along rows (x, y, z, rx, ry) from below upwards, joined by smooth curves: a ring of half axes rx and ry
        around each; `power` above 2 squares it."""
        rows = np.asarray(spine, float)
        gaps = np.linalg.norm(np.diff(rows[:, :3], axis=0), axis=1)
        stops = np.concatenate([[0], np.cumsum(gaps)])
        around = 2 * np.pi * float(rows[:, 3:].mean())
        upwards = 1.0 if rows[-1, 2] > rows[0, 2] else -1.0

        def shape(u, v):
            r = _smooth(stops, rows, v)
            a = upwards * 2 * np.pi * u / around
            c, s = np.cos(a), np.sin(a)
            out = (np.abs(c) ** power + np.abs(s) ** power) ** (-1 / power)
            return np.stack([r[:, 0] + r[:, 3] * c * out, r[:, 1] + r[:, 4] * s * out, r[:, 2]], 1)

        self.surface(shape, (around, stops[-1]), spacing, colour, bone, **options)


def person(n_gaussians: int = 150_000, seed: int = 0) -> Person:
    """The figure with exactly `n_gaussians` Gaussians; the same arguments give the same figure.

    Raises:
        ValueError: fewer than 2000, too few for a face.
    """
    if n_gaussians < 2000:
        raise ValueError(f"n_gaussians must be at least 2000 for a person, got {n_gaussians}")
    parts = _figure(seed)
    wanted = n_gaussians
    for _ in range(12):  # what is cut away of the parts is not known beforehand
        scale = P.fit_scale([part.patch for part in parts], wanted)
        rows = _sample(parts, scale)
        found = len(rows["points"])
        if 0.9 * n_gaussians <= found <= n_gaussians:
            break
        wanted = int(wanted * n_gaussians / found * (0.985 if found > n_gaussians else 0.995))
    rows = _split(rows, n_gaussians - found)
    return _as_person(parts, rows)


def _sample(parts: Sequence[_Part], scale: float) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("points", "normals", "tangents", "sigmas", "parts")}
    for index, part in enumerate(parts):
        made = P.sample([part.patch], scale)
        keep = np.ones(len(made), bool) if part.keep is None else part.keep(made.points)
        for name in ("points", "normals", "tangents", "sigmas"):
            found[name].append(getattr(made, name)[keep])
        found["parts"].append(np.full(int(keep.sum()), index))
    return {name: np.concatenate(values) for name, values in found.items()}


def _split(rows: dict[str, np.ndarray], extra: int) -> dict[str, np.ndarray]:
    """Halve `extra` Gaussians along their longer side."""
    chosen = np.linspace(0, len(rows["points"]) - 1, extra).astype(np.int64) if extra else np.zeros(0, np.int64)
    longer = rows["sigmas"][chosen, 0] >= rows["sigmas"][chosen, 1]
    along = np.where(longer[:, None], rows["tangents"][chosen],
                     np.cross(rows["normals"][chosen], rows["tangents"][chosen]))  # fmt: skip
    move = along * (rows["sigmas"][chosen].max(1) / (4 * P.SIGMA_PER_CELL))[:, None]
    first = len(rows["points"])
    rows = {name: np.concatenate([values, values[chosen]]) for name, values in rows.items()}
    halves = np.stack([chosen, np.arange(first, first + extra)])
    rows["points"][halves] += np.stack([move, -move])
    rows["sigmas"][halves] *= np.where(longer[:, None], [0.5, 1.0], [1.0, 0.5])
    return rows


def _as_person(parts: Sequence[_Part], rows: dict[str, np.ndarray]) -> Person:
    n = len(rows["points"])
    colours, bones, weights = np.zeros((n, 3)), np.zeros((n, 2), np.int64), np.zeros((n, 2))
    for index, part in enumerate(parts):
        mine = rows["parts"] == index
        p, normal = rows["points"][mine], rows["normals"][mine]
        colours[mine] = _display(_lit(part.colour(p), p, normal, part.gloss))
        bones[mine] = [BONES.index(name) for name in part.bones]
        second = np.zeros(len(p)) if part.weight is None else np.clip(part.weight(p), 0, 1)
        weights[mine] = np.stack([1 - second, second], 1)
    frames = np.stack([rows["tangents"], np.cross(rows["normals"], rows["tangents"]), rows["normals"]], 2)
    # where a surface folds, one cell can be many times the others
    sigmas = rows["sigmas"].copy()
    for index in np.unique(rows["parts"]):
        mine = rows["parts"] == index
        sigmas[mine] = np.minimum(sigmas[mine], 3 * np.median(sigmas[mine]))
    scales = np.concatenate([sigmas, np.full((n, 1), THICKNESS)], 1).clip(4e-4)
    return Person(rows["points"], quaternions(frames), scales, rows["normals"], colours, bones, weights, rows["parts"])


def _lit(albedo: np.ndarray, p: np.ndarray, normal: np.ndarray, gloss: float) -> np.ndarray:
    """Linear light that a surface sends forward, with a hint of what shades it."""
    key, fill = _KEY / np.linalg.norm(_KEY), _FILL / np.linalg.norm(_FILL)
    lambert = np.clip((normal @ key + 0.15) / 1.15, 0, 1)
    sky = 0.5 + 0.5 * normal[:, 2]
    light = 0.30 + 0.80 * lambert + 0.16 * np.clip(normal @ fill, 0, 1) + 0.10 * sky
    # under the chin, and between arm and body
    light *= 1 - 0.5 * step(0.11, 0.02, np.hypot(p[:, 0] / 1.1, p[:, 1] + 0.03)) * step(1.40, 1.46, p[:, 2]) * step(
        1.50, 1.485, p[:, 2]
    )
    half = key + [0, -1, 0]
    shine = gloss * np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 24
    return albedo * light[:, None] + shine[:, None]


def _display(linear: np.ndarray) -> np.ndarray:
    x = np.clip(linear, 0, 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def _smooth(stops: np.ndarray, rows: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Catmull-Rom through rows [k, m] at `stops`, evaluated at v [n]."""
    slopes = np.gradient(rows, stops, axis=0)
    i = np.clip(np.searchsorted(stops, v, "right") - 1, 0, len(stops) - 2)
    gap = (stops[i + 1] - stops[i])[:, None]
    t = (v[:, None] - stops[i][:, None]) / gap
    t2, t3 = t * t, t * t * t
    return (
        (2 * t3 - 3 * t2 + 1) * rows[i] + (t3 - 2 * t2 + t) * gap * slopes[i]
        + (3 * t2 - 2 * t3) * rows[i + 1] + (t3 - t2) * gap * slopes[i + 1]
    )  # fmt: skip


def _constant(code: str) -> Points:
    base = srgb(code)
    return lambda p: np.tile(base, (len(p), 1))


# The figure ----------------------------------------------------------------------------------------------------------


def _figure(seed: int) -> list[_Part]:
    parts = _Parts()
    _head(parts, seed)
    _face(parts)
    _torso(parts)
    for side, name in ((1.0, "l"), (-1.0, "r")):
        _arm(parts, side, name, seed)
    return parts.parts


HEAD = np.array([0.0, 0.0, 1.618])


def _skull(p: np.ndarray) -> np.ndarray:
    """From an ellipsoid to a head: narrower and flatter towards the chin, with a chin, cheeks and a brow."""
    x, y, z = p.T.copy()
    down = np.clip(-z / 0.115, 0, 1)
    x = x * (1 - 0.30 * down**1.6)
    front = np.clip(-y / 0.095, 0, 1)
    y = np.where(y > 0, y * (1 - 0.38 * down), y * (1 - 0.10 * down))
    y = y - 0.012 * front * np.exp(-(((z + 0.103) / 0.018) ** 2)) * np.exp(-((x / 0.022) ** 2))
    y = y - 0.005 * front * np.exp(-(((z - 0.035) / 0.014) ** 2)) * np.exp(-((x / 0.05) ** 2))
    sockets = np.exp(-(((np.abs(x) - 0.032) / 0.015) ** 2)) * np.exp(-(((z - 0.016) / 0.012) ** 2))
    y = y + 0.007 * front * sockets
    return np.stack([x, y, z], 1)


def _skin_colour(p: np.ndarray) -> np.ndarray:
    x, y, z = (p - HEAD).T
    tone = srgb(SKIN) * (1 + 0.06 * (2 * fbm(x * 90, z * 90 + 7 * y, 3) - 1))[:, None]
    cheeks = np.exp(-(((np.abs(x) - 0.042) / 0.02) ** 2) - ((z + 0.03) / 0.022) ** 2) * (y < -0.03)
    tone = tone * (1 - cheeks[:, None] * np.array([0.02, 0.18, 0.16]))
    shadow = np.exp(-(((np.abs(x) - 0.032) / 0.017) ** 2) - ((z - 0.012) / 0.013) ** 2) * (y < -0.03)
    return tone * (1 - 0.22 * shadow[:, None])


def _jaw(p: np.ndarray) -> np.ndarray:
    """How far a point of the head follows the jaw."""
    x, y, z = (p - HEAD).T
    return step(-0.058, -0.074, z) * step(0.0, -0.04, y) * step(0.075, 0.05, np.abs(x))


def _hairline(p: np.ndarray) -> np.ndarray:
    x, y, z = (p - HEAD).T
    # above the forehead in front, behind the ears at the sides, down to the neck at the back
    angle = np.arctan2(np.abs(x), -y)
    turns, heights = (0.0, 0.55, 0.95, 1.35, 1.75, 2.2, np.pi), (0.078, 0.070, 0.045, 0.012, -0.03, -0.075, -0.09)
    low = np.interp(angle, turns, heights)
    return z > low + 0.006 * (noise(x * 260, y * 260, 5) - 0.5)


def _head(parts: _Parts, seed: int) -> None:
    parts.ball(HEAD, (0.077, 0.096, 0.115), 0.0036, _skin_colour, ("head", "jaw"), bend=_skull, weight=_jaw, gloss=0.05)

    def strands(p: np.ndarray) -> np.ndarray:
        out = _skull(p)
        length = np.linalg.norm(out, axis=1, keepdims=True)
        part_line = 0.004 * np.exp(-(((out[:, 0] - 0.028) / 0.006) ** 2)) * step(0.04, 0.07, out[:, 2])
        locks = 0.006 * (fbm(out[:, 0] * 70 + 3, out[:, 1] * 28 + out[:, 2] * 28, seed + 11) - 0.5) - part_line
        lift = 0.009 + 0.010 * np.clip(out[:, 2] / 0.12, 0, 1) + locks
        return out * (1 + lift[:, None] / length)

    def hair_colour(p: np.ndarray) -> np.ndarray:
        x, y, z = (p - HEAD).T
        streak = fbm(np.arctan2(x, z + 0.02) * 42, y * 24, seed + 17)
        return srgb(HAIR) * (0.55 + 1.1 * streak)[:, None]

    parts.ball(HEAD, (0.078, 0.097, 0.115), 0.0034, hair_colour, "head", bend=strands, keep=_hairline, gloss=0.06)
    for side in (1.0, -1.0):
        lean = np.array([[np.cos(0.25), -side * np.sin(0.25), 0], [side * np.sin(0.25), np.cos(0.25), 0], [0, 0, 1]])
        parts.ball(HEAD + [side * 0.077, 0.012, -0.005], (0.008, 0.019, 0.031), 0.003, _skin_colour, "head", turn=lean)
        parts.ball(HEAD + [side * 0.082, 0.006, -0.003], (0.005, 0.010, 0.018), 0.003, "#b97f60", "head", turn=lean)
    neck = [(0, 0.022, 1.40, 0.062, 0.064), (0, 0.020, 1.46, 0.052, 0.057), (0, 0.016, 1.53, 0.051, 0.058),
            (0, 0.012, 1.57, 0.050, 0.056)]  # fmt: skip
    parts.tube(neck, 0.005, _skin_colour, ("chest", "head"), weight=lambda p: step(1.43, 1.53, p[:, 2]))


def _face(parts: _Parts) -> None:
    for side, which in ((1.0, "l"), (-1.0, "r")):
        eye = PIVOTS[BONES.index(f"eye_{which}")]

        def iris(p, eye=eye):
            d = (p - eye) / np.linalg.norm(p - eye, axis=1, keepdims=True)
            off = np.hypot(d[:, 0], d[:, 2])
            colour = mix(srgb("#3f6f86"), srgb("#f0ece8"), step(0.36, 0.42, off))
            colour = colour * step(0.14, 0.22, off)[:, None]
            spark = np.hypot(d[:, 0] + 0.16, d[:, 2] - 0.18) < 0.09
            return np.where((spark & (d[:, 1] < 0))[:, None], 1.0, colour)

        front = lambda p, eye=eye: p[:, 1] < eye[1] + 0.004  # noqa: E731
        parts.ball(eye, (0.0128, 0.0128, 0.0128), 0.0011, iris, f"eye_{which}", keep=front)
        # The lids at rest show the eye's middle; the upper one turns down to blink.
        for upper in (True, False):

            def lid(p, eye=eye, upper=upper):
                d = (p - eye) / np.linalg.norm(p - eye, axis=1, keepdims=True)
                return (d[:, 2] > 0.46 if upper else d[:, 2] < -0.52) & (d[:, 1] < 0.35)

            def lash(p, eye=eye, upper=upper):
                d = (p - eye) / np.linalg.norm(p - eye, axis=1, keepdims=True)
                edge = step(0.58, 0.49, d[:, 2]) if upper else step(-0.64, -0.55, d[:, 2]) * 0.5
                return mix(srgb("#c98f6d"), srgb("#2a1a14"), edge)

            bone = f"lid_{which}" if upper else "head"
            parts.ball(eye, (0.0145, 0.0142, 0.0142), 0.0011, lash, bone, keep=lid)
        bent = _tilt(side * 0.08)
        parts.ball(HEAD + [side * 0.0335, -0.0905, 0.041], (0.0165, 0.0036, 0.0019), 0.0013, HAIR, "head", turn=bent)
    nose = _skin_colour
    parts.ball(HEAD + [0, -0.092, -0.008], (0.0105, 0.013, 0.034), 0.0022, nose, "head", turn=_lean(0.20), gloss=0.06)
    parts.ball(HEAD + [0, -0.1045, -0.0325], (0.0125, 0.0115, 0.0100), 0.0018, nose, "head", gloss=0.08)
    for side in (1.0, -1.0):
        parts.ball(HEAD + [side * 0.0115, -0.0955, -0.0345], (0.0075, 0.0085, 0.0068), 0.0018, nose, "head")
        parts.ball(HEAD + [side * 0.0058, -0.1050, -0.0408], (0.0032, 0.0035, 0.0016), 0.0012, "#5b3026", "head")
    parts.ball(HEAD + [0, -0.0865, -0.0665], (0.0215, 0.0065, 0.0052), 0.0014, "#240d0c", ("head", "jaw"),
               weight=lambda p: 0.5 + (HEAD[2] - 0.0665 - p[:, 2]) / 0.0104)  # fmt: skip
    parts.ball(HEAD + [0, -0.0895, -0.0640], (0.0165, 0.0035, 0.0026), 0.0012, "#efe9e2", "head")
    curve = lambda p: p + np.stack([0 * p[:, 0], 6.0 * p[:, 0] ** 2, 9.0 * p[:, 0] ** 2], 1)  # noqa: E731
    parts.ball(HEAD + [0, -0.0915, -0.0622], (0.0220, 0.0050, 0.0034), 0.0013, LIP, "head", bend=curve, gloss=0.05)
    parts.ball(HEAD + [0, -0.0915, -0.0692], (0.0190, 0.0056, 0.0043), 0.0013, LIP, "jaw", bend=curve, gloss=0.08)


def _suit_colour(p: np.ndarray) -> np.ndarray:
    x, y, z = p.T
    weave = 1 + 0.10 * (noise(x * 420, z * 420, 2) - 0.5) + 0.08 * (fbm(x * 16, z * 10, 8) - 0.5)
    suit = srgb(SUIT) * weave[:, None]
    front = y < 0.02
    opening = np.interp(z, [1.02, 1.08, 1.44, 1.5], [0.0, 0.004, 0.062, 0.066])  # of the jacket, half width
    lapel = opening + np.interp(z, [1.02, 1.12, 1.30, 1.36, 1.44], [0.0, 0.030, 0.052, 0.046, 0.004])
    across = np.abs(x)
    edge = np.abs(across - lapel) < 0.004
    suit = np.where((front & (across < lapel))[:, None], suit * 1.25, suit)
    suit = np.where((front & edge & (z > 1.06) & (z < 1.43))[:, None], suit * 0.45, suit)
    shirt = srgb(SHIRT) * (1 - 0.06 * noise(x * 40, z * 14, 4))[:, None]
    suit = np.where((front & (across < opening))[:, None], shirt, suit)
    tie = np.interp(z, [1.05, 1.10, 1.36, 1.405, 1.41, 1.435], [0.0, 0.024, 0.015, 0.011, 0.018, 0.020])
    band = srgb(TIE) * np.where((((z + 0.55 * x) * 42) % 1.0 < 0.28), 1.9, 1.0)[:, None]
    suit = np.where((front & (across < np.minimum(tie, opening)))[:, None], band, suit)
    for button in (1.0, 0.92):
        suit = np.where((front & (np.hypot(x + 0.004, z - button) < 0.009))[:, None], srgb("#0d121b"), suit)
    seam = front & (np.abs(x + 0.012) < 0.0022) & (z < 1.03)
    suit = np.where(seam[:, None], suit * 0.4, suit)
    pocket = front & (np.abs(x - 0.105) < 0.032) & (np.abs(z - 1.245 - 0.1 * (x - 0.105)) < 0.006)
    return np.where(pocket[:, None], srgb("#d7dade"), suit)


def _torso(parts: _Parts) -> None:
    rows = [
        (0, 0.01, 0.60, 0.176, 0.118), (0, 0.01, 0.76, 0.184, 0.124), (0, 0.01, 0.92, 0.172, 0.116),
        (0, 0.01, 1.06, 0.166, 0.110), (0, 0.01, 1.20, 0.182, 0.118), (0, 0.012, 1.31, 0.192, 0.114),
        (0, 0.015, 1.372, 0.178, 0.098), (0, 0.018, 1.410, 0.124, 0.082), (0, 0.02, 1.442, 0.074, 0.072),
    ]  # fmt: skip
    parts.tube(rows, 0.0052, _suit_colour, ("root", "chest"), power=2.5, weight=lambda p: step(0.9, 1.25, p[:, 2]))
    collar = [(0, 0.018, 1.425, 0.072, 0.074), (0, 0.016, 1.452, 0.066, 0.071), (0, 0.014, 1.478, 0.061, 0.067)]
    open_front = lambda p: np.hypot(p[:, 0], 0) > np.interp(p[:, 2], [1.425, 1.48], [0.004, 0.020]) * (p[:, 1] < 0)  # noqa: E731
    parts.tube(collar, 0.004, SHIRT, ("chest", "head"), weight=lambda p: 0.25 + 0 * p[:, 2], keep=open_front)
    parts.ball((0, -0.055, 1.428), (0.017, 0.014, 0.018), 0.003, TIE, "chest")


def _arm(parts: _Parts, side: float, name: str, seed: int) -> None:
    arm, fore, hand = f"arm_{name}", f"fore_{name}", f"hand_{name}"
    shoulder, elbow, wrist = (PIVOTS[BONES.index(bone)] for bone in (arm, fore, hand))

    def cloth(p: np.ndarray) -> np.ndarray:
        folds = fbm(p[:, 0] * 20 + 5 * side, p[:, 2] * 34, seed + 23)
        near = np.exp(-(((p[:, 2] - elbow[2]) / 0.07) ** 2))
        return srgb(SUIT) * (1 + 0.5 * near * (folds - 0.5) + 0.1 * (noise(p[:, 1] * 400, p[:, 2] * 400, 2) - 0.5))[
            :, None
        ]

    parts.ball(shoulder + [-side * 0.018, 0, -0.022], (0.068, 0.064, 0.052), 0.0055, cloth, ("chest", arm),
               weight=lambda p: 0.35 + 4.0 * side * (p[:, 0] - shoulder[0]))  # fmt: skip
    upper = [(*(shoulder + [-side * 0.004, 0, -0.03]), 0.055, 0.058), (*(0.5 * (shoulder + elbow)), 0.054, 0.058),
             (*elbow, 0.047, 0.050), (*(elbow + [side * 0.003, 0, -0.035]), 0.044, 0.046)]  # fmt: skip
    parts.tube(upper, 0.0052, cloth, (arm, fore), weight=lambda p: step(elbow[2] + 0.05, elbow[2] - 0.04, p[:, 2]))
    lower = [(*(elbow + [0, 0, 0.03]), 0.046, 0.048), (*elbow, 0.047, 0.050),
             (*(0.5 * (elbow + wrist)), 0.043, 0.045), (*(wrist + [0, 0, 0.02]), 0.036, 0.039)]  # fmt: skip
    parts.tube(lower, 0.0052, cloth, (fore, arm), weight=lambda p: 0.5 * step(elbow[2] + 0.0, elbow[2] + 0.05, p[:, 2]))
    cuff = [(*(wrist + [0, 0, 0.03]), 0.031, 0.035), (*(wrist + [0, 0, 0.005]), 0.031, 0.035)]
    parts.tube(cuff, 0.004, SHIRT, fore)
    _hand(parts, side, wrist, hand)


def _hand(parts: _Parts, side: float, wrist: np.ndarray, bone: str) -> None:
    """Hanging down, the palm towards the body, the thumb in front."""
    skin = lambda p: srgb(SKIN) * (0.95 + 0.08 * noise(p[:, 1] * 160, p[:, 2] * 160, 9))[:, None]  # noqa: E731
    parts.tube([(*(wrist + [0, 0, 0.03]), 0.021, 0.026), (*(wrist + [0, 0, -0.02]), 0.019, 0.029)], 0.004, skin, bone)
    parts.ball(wrist + [0, 0, -0.048], (0.0165, 0.041, 0.046), 0.004, skin, bone)
    # Fingers from the index, in front, to the little one: along y, with their lengths, a little bent inwards.
    for y, length in ((-0.030, 0.072), (-0.010, 0.082), (0.010, 0.076), (0.029, 0.060)):
        root = wrist + [0, y, -0.080]
        joints = ((0, 0, 0.0098), (0.45, 0.06, 0.0092), (0.8, 0.20, 0.0084), (1.0, 0.30, 0.0066))
        rows = [(*(root + [-side * bend * length, 1.1 * bend * y, -t * length]), r, r) for t, bend, r in joints]
        parts.tube(rows, 0.003, skin, bone)
        parts.ball(rows[-1][:3], (0.0068, 0.0068, 0.0072), 0.003, skin, bone)
    base = wrist + [-side * 0.004, -0.030, -0.030]
    thumb = [(*(base + [0, 0, 0]), 0.013, 0.013), (*(base + [-side * 0.006, -0.018, -0.024]), 0.0115, 0.0115),
             (*(base + [-side * 0.010, -0.026, -0.052]), 0.0085, 0.0085)]  # fmt: skip
    parts.tube(thumb, 0.003, skin, bone)
    parts.ball(thumb[-1][:3], (0.0085, 0.0085, 0.0095), 0.003, skin, bone)


def _lean(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def _tilt(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
