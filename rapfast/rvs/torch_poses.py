"""The pose samplers on a torch.Generator and its device: the formulas of `rapfast.rvs.poses`, other numbers.

Every operation is elementwise or a sum of three products, so that a pose's bits do not depend on how many there are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .poses import PoseSampler


def draw(
    sampler: PoseSampler, n: int, generator: torch.Generator, weights: tuple[float, float] | None
) -> tuple[Tensor, Tensor | None]:
    """Numbers [n, 6 or 7] and, with a range for them, weights [n]; float64 on the generator's device."""
    x, a = sampler.translation, sampler.rotation
    if sampler.kind == "uniform_sphere":
        ranges = [(-a, a), *[(0.0, 1.0)] * 3, (0.0, x), (0.0, 2.0 * math.pi), (0.0, math.pi)]
    else:
        ranges = [(-a, a)] * 3 + [(-x, x)] * 3
    if weights is not None:
        ranges.append(weights)
    where = {"device": generator.device, "dtype": torch.float64}
    low, high = torch.tensor(ranges, **where).unbind(1)
    values = low + (high - low) * torch.rand(n, len(ranges), generator=generator, **where)
    if sampler.kind == "uniform_sphere":
        values[:, 1:4] = torch.randn(n, 3, generator=generator, **where)
    numbers = values[:, : sampler.numbers_per_pose]
    return numbers, values[:, -1] if weights is not None else None


def apply(sampler: PoseSampler, poses: Tensor, numbers: Tensor) -> Tensor:
    """[M,3,4] float64: what `numbers` make of `poses` [M,3,4], both float64 on one device."""
    if sampler.kind == "uniform_sphere":
        result = torch.cat([_product(_about(numbers[:, 1:4], numbers[:, 0]), poses[:, :, :3]), poses[:, :, 3:]], 2)
        radius, azimuth, polar = numbers[:, 4:].unbind(1)
        flat = radius * polar.sin()
        moves = torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), radius * polar.cos()], 1)
    else:
        theta, phi, psi = torch.deg2rad(numbers[:, :3]).unbind(1)
        moves = numbers[:, 3:]
        if sampler.kind == "xz_plane":
            result = _product(_in_plane(theta, 0, 2), poses)
            moves = moves * torch.tensor([1.0, 0.0, 1.0], dtype=moves.dtype, device=moves.device)
        else:
            result = _product(_in_plane(phi, 1, 2), poses)
            result = _product(_in_plane(theta, 0, 2), result)
            result = _product(_in_plane(psi, 0, 1), result)
    result[:, :, 3] += moves
    if sampler.box is not None:
        low, high = torch.tensor(sampler.box, device=result.device).unbind(0)
        result[:, :, 3] = torch.minimum(torch.maximum(result[:, :, 3], low), high)
    return result


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[M,3,k] = [M,3,3] [M,3,k], summed in the order of the columns."""
    return left[:, :, :1] * right[:, :1] + left[:, :, 1:2] * right[:, 1:2] + left[:, :, 2:3] * right[:, 2:3]


def _in_plane(angles: Tensor, i: int, j: int) -> Tensor:
    """[M,3,3] rotations from axis i towards axis j."""
    cos, sin = angles.cos(), angles.sin()
    matrices = torch.eye(3, dtype=angles.dtype, device=angles.device).repeat(len(angles), 1, 1)
    matrices[:, i, i], matrices[:, i, j] = cos, -sin
    matrices[:, j, i], matrices[:, j, j] = sin, cos
    return matrices


def _about(axis: Tensor, degrees: Tensor) -> Tensor:
    """[M,3,3] rotations about `axis` [M,3], of any length but zero (Rodrigues' formula)."""
    x, y, z = (axis / axis.square().sum(1, keepdim=True).sqrt()).unbind(1)
    cos, sin = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    rest = 1.0 - cos
    rows = [
        torch.stack([cos + x * x * rest, x * y * rest - z * sin, x * z * rest + y * sin], 1),
        torch.stack([y * x * rest + z * sin, cos + y * y * rest, y * z * rest - x * sin], 1),
        torch.stack([z * x * rest - y * sin, z * y * rest + x * sin, cos + z * z * rest], 1),
    ]
    return torch.stack(rows, 1)
