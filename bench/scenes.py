"""Seeded scenes to measure with, and what fixes a renderer's work on them.

``room`` and ``outdoor`` are made of flat patches and blobs whose number, size and opacity are chosen so that a
view costs what one of a trained indoor or outdoor scene costs: the share of Gaussians it sees, the tiles they touch
and how soon pixels become opaque. They are not made to look at; ``rapfast.procedural`` is. ``garden`` reads the points
of a real capture. All are float32 on the CPU, SH degree 3, and bitwise the same for the same seed and numpy.

World units are metres. room and outdoor have z up.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import numpy as np
import torch

from rapfast import Cameras, Scene, ops

TILE_SIZE = 16
"""Pixels on the side of a tile."""

SH_C0 = 0.28209479177387814
"""Y_0^0, what a constant coefficient is multiplied by."""

ROOM = np.array([6.0, 5.0, 2.7])
FOCAL_ROOM = 585 / 640
"""Focal length over the width, that of 7-Scenes' recordings."""

FOV_Y_OUTDOOR = 42.0
"""Degrees."""


def room(n: int, seed: int = 0) -> Scene:
    """``n`` Gaussians on the walls of a 6 x 5 x 2.7 m room and on the furniture in it.

    Their median size does not depend on ``n``: more Gaussians lie in more layers, as they do in a trained scene.
    """
    rng = np.random.default_rng(seed)
    corner, edge_u, edge_v = _room_patches(rng)
    area = np.linalg.norm(np.cross(edge_u, edge_v), axis=1)
    patch = rng.choice(len(area), n, p=area / area.sum())
    u, v = rng.random((2, n, 1))
    normal_axis = np.abs(np.cross(edge_u, edge_v)).argmax(1)[patch]
    means = corner[patch] + u * edge_u[patch] + v * edge_v[patch]
    means[np.arange(n), normal_axis] += rng.normal(0.0, 0.006, n)

    # log-normal sizes, an eighth of it along the normal: what densification leaves on a wall
    scales = np.exp(rng.normal(math.log(0.0117), 0.7, (n, 3)))
    scales[:, 2] *= 0.15
    # two kinds, as after training: nearly opaque surface and faint corrections
    opacities = np.where(rng.random(n) < 0.55, rng.uniform(0.75, 0.995, n), 0.01 + 0.5 * rng.random(n) ** 2)
    colors = 0.5 + 0.25 * np.sin(means @ np.array([[2.0, 4.0, 3.0], [5.0, 2.0, 4.0], [3.0, 5.0, 2.0]]))
    quats = _lying_on(normal_axis, rng.uniform(0, 2 * math.pi, n)) + rng.normal(0, 0.03, (n, 4))
    return _scene(means, quats, scales, opacities, colors + rng.normal(0, 0.08, (n, 3)), rng)


def _room_patches(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners and two edges, [P, 3] each, of the faces of the room and of 15 boxes that stand on its floor."""
    boxes = [(np.zeros(3), ROOM)]
    for _ in range(15):
        size = np.append(rng.uniform(0.2, 1.3, 2), rng.uniform(0.2, 1.2))
        corner = np.append(rng.uniform(0.2, ROOM[:2] - size[:2] - 0.2), 0.0)
        boxes.append((corner, size))
    faces = []
    for corner, size in boxes:
        for axis in range(3):
            edges = [size * np.eye(3)[other] for other in range(3) if other != axis]
            for side in (0.0, size[axis]):
                faces.append((corner + side * np.eye(3)[axis], *edges))
    return tuple(np.array(part) for part in zip(*faces, strict=True))


def _lying_on(normal_axis: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Quaternions [N, 4], wxyz: the third axis along the world's ``normal_axis``, turned about it by ``turn``."""
    half = math.sqrt(0.5)
    # z to x about y, z to y about -x, z stays
    w, x, y = np.array([[half, 0.0, half], [half, -half, 0.0], [1.0, 0.0, 0.0]])[normal_axis].T
    c, s = np.cos(turn / 2), np.sin(turn / 2)
    return np.stack([w * c, x * c + y * s, y * c - x * s, w * s], 1)


def room_cameras(n: int, width: int = 854, height: int = 480, seed: int = 63) -> Cameras:
    """``n`` cameras that stand in the room, about as high as a person's head, and look around."""
    rng = np.random.default_rng(seed)
    # drawn camera by camera, so that the first cameras are the same for every n
    draws = rng.random((n, 5))
    eyes = np.array([1.0, 1.0, 1.0]) + draws[:, :3] * (ROOM - np.array([2.0, 2.0, 1.9]))
    yaw, rise = 2 * math.pi * draws[:, 3], 0.25 * (draws[:, 4] - 0.7)
    ahead = np.stack([np.cos(yaw), np.sin(yaw), rise], 1)
    fov_y = 2 * math.degrees(math.atan(height / (2 * FOCAL_ROOM * width)))
    return Cameras.look_at(eyes, eyes + ahead, width=width, height=height, fov_y=fov_y)


def outdoor(n: int = 2_780_000, seed: int = 0) -> Scene:
    """``n`` Gaussians of a park 24 m across: rolling ground, 30 trees, bushes and a wooded ridge around it."""
    rng = np.random.default_rng(seed)
    shares = {"ground": 0.42, "crowns": 0.34, "trunks": 0.04, "bushes": 0.12}
    counts = {name: int(share * n) for name, share in shares.items()}
    counts["ridge"] = n - sum(counts.values())
    trees = _scattered(rng, 30, 2.5, 12.0)

    k = counts["ground"]
    radius, angle = 12.0 * rng.random(k) ** 0.75, rng.uniform(0, 2 * math.pi, k)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    ground = np.stack([x, y, _relief(x, y) + np.abs(rng.normal(0, 0.03, k))], 1)

    k = counts["crowns"]
    tree = rng.integers(len(trees), size=k)
    shell = _directions(rng, k) * (0.5 + 0.5 * rng.random((k, 1)) ** 0.5)
    crowns = np.append(trees[tree], np.full((k, 1), 3.0), 1) + shell * np.array([1.1, 1.1, 1.3])

    k = counts["trunks"]
    tree, angle = rng.integers(len(trees), size=k), rng.uniform(0, 2 * math.pi, k)
    ring = 0.14 * np.stack([np.cos(angle), np.sin(angle)], 1)
    trunks = np.append(trees[tree] + ring, rng.uniform(-0.2, 2.2, (k, 1)), 1)

    k = counts["bushes"]
    places = _scattered(rng, 60, 1.0, 12.0)
    places = np.append(places, _relief(*places.T)[:, None] + 0.2, 1)
    bushes = places[rng.integers(len(places), size=k)] + _directions(rng, k) * np.array([0.5, 0.5, 0.35])

    k = counts["ridge"]
    angle, up = rng.uniform(0, 2 * math.pi, k), rng.random(k)
    out = 14.0 + 4.0 * up + rng.normal(0, 0.3, k)
    ridge = np.stack([out * np.cos(angle), out * np.sin(angle), 4.0 * up * (1 + 0.3 * np.sin(7 * angle))], 1)

    means = np.concatenate([ground, crowns, trunks, bushes, ridge])
    part = np.repeat(np.arange(5), [counts[name] for name in ("ground", "crowns", "trunks", "bushes", "ridge")])
    scales = rng.uniform(1e-4, 0.0283, (n, 3))
    scales[part == 4] *= 3.0
    tints = np.array([[0.45, 0.42, 0.28], [0.25, 0.42, 0.18], [0.35, 0.26, 0.2], [0.3, 0.45, 0.22], [0.4, 0.5, 0.5]])
    colors = tints[part] + rng.normal(0, 0.1, (n, 3)) + 0.06 * np.sin(4 * means)
    return _scene(means, rng.normal(size=(n, 4)), scales, rng.random(n), colors, rng)


def _relief(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Height of the ground."""
    return 0.15 * np.sin(0.9 * x + 0.4) * np.cos(0.7 * y) + 0.04 * np.sin(3.1 * x + 1.7 * y)


def _scattered(rng: np.random.Generator, n: int, nearest: float, farthest: float) -> np.ndarray:
    """Points [n, 2] in a ring around the origin, evenly by area."""
    radius = np.sqrt(rng.uniform(nearest**2, farthest**2, n))
    angle = rng.uniform(0, 2 * math.pi, n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _directions(rng: np.random.Generator, n: int) -> np.ndarray:
    """Unit vectors [n, 3], evenly over the sphere."""
    v = rng.normal(size=(n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def outdoor_cameras(n: int, width: int = 1297, height: int = 840, seed: int = 0) -> Cameras:
    """``n`` cameras on a walk around the middle of the park, looking across it.

    Every size shows the same, the pixels of 1920x1080 being a little wider than high: so do the garden's.
    """
    rng = np.random.default_rng(seed)
    turn = 2 * math.pi * ((np.arange(n) * 0.381966) % 1.0)  # golden section: even for every n
    draws = rng.random((n, 4))  # camera by camera, as in room_cameras
    out = 3.0 + 0.5 * draws[:, 0]
    eyes = np.stack([out * np.cos(turn), out * np.sin(turn), np.full(n, 1.7)], 1)
    targets = draws[:, 1:] - 0.5 + np.array([0.0, 0.0, 0.8])
    cameras = Cameras.look_at(eyes, targets, width=1297, height=840, fov_y=FOV_Y_OUTDOOR)
    return cameras.resize(width, height)


PILE_FROM = 5.0
"""Metres from the cameras to a pile or a curtain."""


def pile(n: int = 500_000, seed: int = 0) -> Scene:
    """``n`` tiny Gaussians that `pile_cameras` see in one tile, all of them: the longest list that pixels walk.

    Each is barely above the alpha that is drawn at all and covers about one pixel, so that a pixel stays open for
    some two thousand of them.
    """
    rng = np.random.default_rng(seed)
    means = rng.uniform(-0.5, 0.5, (n, 3)) * np.array([0.07, 0.07, 0.07])
    values = means, np.full((n, 3), 1e-4), rng.uniform(0.005, 0.006, n)
    return _scene(values[0], np.tile([1.0, 0, 0, 0], (n, 1)), values[1], values[2], rng.random((n, 3)), rng)


def curtain(n: int = 2000, seed: int = 0) -> Scene:
    """``n`` faint Gaussians each of which covers every tile of `pile_cameras`, in depth order behind each other."""
    rng = np.random.default_rng(seed)
    means = rng.uniform(-0.5, 0.5, (n, 3))
    scales = rng.uniform(20.0, 30.0, (n, 3))
    quats = rng.normal(size=(n, 4))
    return _scene(means, quats, scales, rng.uniform(0.006, 0.008, n), rng.random((n, 3)), rng)


def pile_cameras(n: int, width: int = 854, height: int = 480) -> Cameras:
    """``n`` cameras on a circle around the origin, which all see in the middle of one tile."""
    turn = 2 * math.pi * ((np.arange(n) * 0.381966) % 1.0)
    eyes = PILE_FROM * np.stack([np.cos(turn), np.sin(turn), np.zeros(n)], 1)
    fov_y = 2 * math.degrees(math.atan(height / (2 * FOCAL_ROOM * 854)))
    cameras = Cameras.look_at(eyes, np.zeros((n, 3)), width=width, height=height, fov_y=fov_y)
    for axis, size in enumerate((width, height)):
        cameras.Ks[:, axis, 2] = size // (2 * TILE_SIZE) * TILE_SIZE + TILE_SIZE / 2
    return cameras


def garden(path: str | os.PathLike, seed: int = 0) -> Scene:
    """The points of ``test_garden.npz``, gsplat's own test asset, tiled 5 x 5: 2.8 M Gaussians.

    Those within 2 m of the origin are repeated every 4 m in x and y; size, rotation and opacity are random, as in
    gsplat's profiling. Draws come in this order so that every program that follows the recipe has the same scene.

    Raises:
        FileNotFoundError, KeyError: the file is absent or holds no ``means3d`` and ``colors``.
    """
    with np.load(path) as file:
        points, colors = torch.from_numpy(file["means3d"]).float(), torch.from_numpy(file["colors"] / 255.0).float()
    inside = (points.abs() <= 2).all(dim=1)
    steps = torch.arange(-2.0, 3.0)
    tiles = torch.cartesian_prod(steps, steps, torch.zeros(1)) * 4.0
    means = (points[inside] + tiles[:, None]).flatten(0, 1)
    n = len(means)
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(n, 3, generator=generator) * (0.02 - 1e-4) + 1e-4
    quats = torch.nn.functional.normalize(torch.randn(n, 4, generator=generator), dim=-1)
    opacities = torch.rand(n, generator=generator)
    sh = torch.zeros(n, 16, 3)
    sh[:, 0] = (colors[inside].repeat(len(tiles), 1) - 0.5) / 0.28209
    sh[:, 1:] = torch.randn(n, 15, 3, generator=generator) * 0.03
    return Scene(means, quats, scales, opacities, sh)


def garden_cameras(path: str | os.PathLike, n: int, width: int = 1297, height: int = 840) -> Cameras:
    """The three cameras of ``test_garden.npz`` in turn, each 3 cm beside the one before, scaled to the size."""
    with np.load(path) as file:
        viewmats, Ks = torch.from_numpy(file["viewmats"]).float(), torch.from_numpy(file["Ks"]).float()
        Ks[:, 0] *= width / int(file["width"])
        Ks[:, 1] *= height / int(file["height"])
    which = torch.arange(n) % 3
    viewmats, Ks = viewmats[which], Ks[which]
    viewmats[:, 0, 3] += 0.03 * torch.arange(n)
    return Cameras(viewmats, Ks, width, height)


def _scene(
    means: np.ndarray, quats: np.ndarray, scales: np.ndarray, opacities: np.ndarray, colors: np.ndarray,
    rng: np.random.Generator,
) -> Scene:  # fmt: skip
    """A Scene of these values, with some dependence on the direction so that no SH band is free of work."""
    n = len(means)
    sh = np.empty((n, 16, 3), np.float32)
    sh[:, 0] = (colors - 0.5) / SH_C0
    sh[:, 1:] = 0.04 * rng.standard_normal((n, 15, 3), np.float32)
    quats = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    values = (means, quats, scales, opacities, sh)
    return Scene(*(torch.from_numpy(np.ascontiguousarray(value, np.float32)) for value in values))


class Statistics(NamedTuple):
    """A scene's work for the renderer, view by view."""

    visible_share: torch.Tensor  # [C] float64, visible Gaussians over N
    intersections: torch.Tensor  # [C] int64, (Gaussian, 16 x 16 tile) pairs by gsplat 1.5.3's bounding-box rule


def statistics(scene: Scene, cameras: Cameras) -> Statistics:
    """Counts what each view sees, on the CPU."""
    share, intersections = [], []
    for i in range(len(cameras)):
        view = cameras[i : i + 1]
        projected = ops.project(
            scene.means[None], scene.quats[None], scene.scales[None], None, scene.opacities[None],
            view.viewmats[None], view.Ks[None], view.width, view.height,
        )  # fmt: skip
        middle, radii = projected.records[:, :2] / TILE_SIZE, projected.radii / TILE_SIZE
        grid = torch.tensor([math.ceil(view.width / TILE_SIZE), math.ceil(view.height / TILE_SIZE)])
        low = (middle - radii).floor().clamp(min=0).minimum(grid)
        high = (middle + radii).ceil().clamp(min=0).minimum(grid)
        share.append(len(radii) / len(scene))
        intersections.append(int((high - low).prod(1).double().sum()))
    return Statistics(torch.tensor(share, dtype=torch.float64), torch.tensor(intersections))
