"""A small scene with RAP's appearance, and RAP's formulas read slowly: one Gaussian at a time, in Python's floats.

The slow reading shares nothing with rapfast.appearance but the layout of its tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scenes import HEIGHT, WIDTH, make_scene
from torch import Tensor

__all__ = ["HEIGHT", "WIDTH", "Appearance", "make_appearance", "net_state", "slow_color", "slow_features", "slow_sh"]

RAP_WIDTHS = {"encoder": (159, 128, 96, 64, 48), "decoder": (96, 48, 48, 48), "color_decoder": (51, 48, 3)}


class Appearance(NamedTuple):
    """What views are coloured from, float64."""

    means: Tensor  # [N, 3]
    quats: Tensor  # [N, 4]
    scales: Tensor  # [N, 3]
    opacities: Tensor  # [N]
    viewmats: Tensor  # [C, 4, 4]
    Ks: Tensor  # [C, 3, 3]
    box_coord: Tensor  # [N, 3, 2]
    intrinsic: Tensor  # [N, 16, 3]
    maps: Tensor  # [R, 48, h, w]


def make_appearance(n: int = 60, c: int = 3, n_maps: int = 2, map_size: tuple[int, int] = (9, 13)) -> Appearance:
    """n Gaussians that c cameras see from several sides; about half of them fall on the projected map."""
    scene = make_scene(n, c)
    g = torch.Generator().manual_seed(11)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)).float().double()

    box_coord = uniform(n, 3, 2, low=-1.2, high=1.2)  # a few lie beyond the border
    box_coord[:, 2] = uniform(n, 2, low=0.4, high=1.3) * torch.tensor([HEIGHT, WIDTH], dtype=torch.float64)
    intrinsic = uniform(n, 16, 3, low=-1.0, high=1.0)
    maps = uniform(n_maps, 48, *map_size, low=-1.0, high=1.0)
    geometry = scene.means, scene.quats, scene.scales, scene.opacities, scene.viewmats, scene.Ks
    return Appearance(*geometry, box_coord, intrinsic, maps)


def net_state(widths: dict[str, tuple[int, ...]] = RAP_WIDTHS, seed: int = 5) -> dict[str, Tensor]:
    """Weights, float64, under which every input and every bias can be seen in the output."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for block, sizes in widths.items():
        for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            weight = torch.randn(n_out, n_in, generator=g, dtype=torch.float64) * (2 / n_in) ** 0.5
            state[f"{block}.lin{i}.weight"] = weight.float().double()
            state[f"{block}.lin{i}.bias"] = (0.3 * torch.randn(n_out, generator=g)).double()
    return state


def _matvec(matrix: list[list[float]], vector: list[float]) -> list[float]:
    return [math.fsum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def slow_projection(s: Appearance, view: int, n: int) -> tuple[float, float] | None:
    """(x, y) on the projected map, -1..1, of one Gaussian; None where it is not valid."""
    matrix, K = s.viewmats[view].tolist(), s.Ks[view].tolist()
    point = [*s.means[n].tolist(), 1.0]
    camera = _matvec(matrix[:3], point)
    u, v, z = _matvec(K, camera)
    x, y = u / (z + 1e-2), v / (z + 1e-2)
    b0, b1 = s.box_coord[n, 2].tolist()
    if not (0 < x < b1 and 0 < y < b0 and z > 0):
        return None
    return x / (b1 / 2) - 1, y / (b0 / 2) - 1


def _bilinear(plane: list[list[float]], x: float, y: float) -> float:
    """Border padding, align_corners=False: pixel i's centre is at (2 i + 1) / size - 1."""
    h, w = len(plane), len(plane[0])
    column = min(max(((x + 1) * w - 1) / 2, 0.0), w - 1.0)
    row = min(max(((y + 1) * h - 1) / 2, 0.0), h - 1.0)
    j, i = min(int(column), w - 1), min(int(row), h - 1)
    fx, fy = column - j, row - i
    j1, i1 = min(j + 1, w - 1), min(i + 1, h - 1)
    top = plane[i][j] * (1 - fx) + plane[i][j1] * fx
    bottom = plane[i1][j] * (1 - fx) + plane[i1][j1] * fx
    return top * (1 - fy) + bottom * fy


def slow_features(s: Appearance, map_id: int, view: int, n: int) -> list[float]:
    planes = s.maps[map_id].tolist()
    out = []
    for m in (0, 1):
        x, y = s.box_coord[n, m].tolist()
        out += [_bilinear(planes[16 * m + f], x, y) for f in range(16)]
    at = slow_projection(s, view, n)
    return out + ([0.0] * 16 if at is None else [_bilinear(planes[32 + f], *at) for f in range(16)])


def _block(state: dict[str, Tensor], block: str, x: list[float]) -> list[float]:
    n_layers = sum(name.startswith(f"{block}.") for name in state) // 2
    for i in range(n_layers):
        if i:
            x = [max(value, 0.0) for value in x]
        x = _matvec(state[f"{block}.lin{i}.weight"].tolist(), x)
        x = [a + b for a, b in zip(x, state[f"{block}.lin{i}.bias"].tolist(), strict=True)]
    return x


def slow_decoded(state: dict[str, Tensor], s: Appearance, n: int, appearance: list[float], w: float) -> list[float]:
    point = s.means[n].tolist()
    encoded = list(point)
    for k in range(10):
        encoded += [math.sin(2**k * p) for p in point] + [math.cos(2**k * p) for p in point]
    own = [float(s.intrinsic[n, j // 3, j % 3]) for j in range(48)]
    hidden = _block(state, "encoder", encoded + [w * a for a in appearance] + own)
    return _block(state, "decoder", hidden + own)


def slow_sh(state: dict[str, Tensor], s: Appearance, map_id: int, view: int, w: float, n: int) -> list[float]:
    """48 numbers, coefficient k of channel c at 3 k + c."""
    return slow_decoded(state, s, n, slow_features(s, map_id, view, n), w)


def slow_color(
    state: dict[str, Tensor],
    s: Appearance,
    map_id: int,
    view: int,
    w: float,
    n: int,
    embedding: list[float] | None = None,
) -> list[float]:
    """RGB of Gaussian n in a view, with the features of a reference image or with an embedding in their place."""
    appearance = slow_features(s, map_id, view, n) if embedding is None else embedding
    decoded = slow_decoded(state, s, n, appearance, w)
    center = torch.linalg.inv(s.viewmats[view])[:3, 3].tolist()
    offset = [a - b for a, b in zip(s.means[n].tolist(), center, strict=True)]
    length = math.sqrt(sum(a * a for a in offset)) + 1e-5
    return _block(state, "color_decoder", decoded + [a / length for a in offset])
