"""An ordinary scene with the appearance that a RAP scene has in one view, for viewers that know no networks.

A Gaussian's colour becomes spherical harmonics of the direction from the camera to it, as INRIA's files hold them.
Reference image, weight and projection stay those of the baked view. The network sees d = (X - c) / (|X - c| + 1e-5);
here |d| = 1, which is off by 1e-5 over the distance. What is approximated is how the colour changes with d: least
squares over directions spread evenly over the sphere, with the error measured in other directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapfast import _check as check
from rapfast.appearance.color_net import ColorNet
from rapfast.appearance.rap_calls import _given, _references, _weights, _without_autocast
from rapfast.appearance.rap_cameras import read_camera
from rapfast.appearance.rap_scene import RapScene
from rapfast.reference.color import spherical_harmonics
from rapfast.scene import SH_DEGREE_OF_COUNT, Scene

N_DIRECTIONS = 128
"""Directions of the fit; as many others measure its error."""

_VALUES = 1 << 24
"""Activations of the colour head that are held at a time."""

_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


@dataclass(frozen=True)
class BakeReport:
    """How far a baked scene's colours are from the network's, over all Gaussians with finite features
    and N_DIRECTIONS directions that took no part in the fit. Colours are in units where 1 is white.

    Attributes:
        rms: root mean square of the harmonics' error, before a viewer clamps them at 0.
        worst: the largest error.
        shown_rms: as rms, with the viewer's clamp: a negative colour, which RAP blends as it is, is shown as 0.
        negative: share of the network's colour values that are negative, 0..1.
    """

    rms: float
    worst: float
    shown_rms: float
    negative: float


@torch.no_grad()
@_without_autocast
def bake(
    scene: RapScene,
    camera: Any,
    weight: float | Tensor | None = None,
    *,
    image: Tensor | None = None,
    feature_map: Tensor | None = None,
    sh_degree: int | None = None,
    viewmat_layout: str | None = None,
    return_report: bool = False,
) -> Scene | tuple[Scene, BakeReport]:
    """The scene as it looks with a reference image in one view, with spherical harmonics in place of the network.

    Args:
        camera: the view whose projection chooses the features of map 2: as `rap_cameras` reads it, or a
            `rapfast.Cameras` of one.
        weight: the view's weight; None: as in `render_batch`.
        image: [3, H, W] in 0..1, the reference image; None: the camera's own.
        feature_map: [48, h, w] in its place.
        sh_degree: 0 to 4, of the harmonics. None: 3, or, for a network that puts harmonics out, its own, which is
            the only one there: they are copied.
        viewmat_layout: see `read_cameras`.
        return_report: whether to measure the error, too.

    Returns:
        Scene with `sh` [N, (sh_degree + 1)^2, 3] and the geometry of the RAP scene, shared with it; with
        return_report a pair of it and a `BakeReport`. The same input gives the same bits, under autocast and where
        TF32 is allowed, too; but the map of an image may then be made with TF32, see `FeatureMapNet.feature_maps`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    net, like = scene.color_net, scene.scene.means
    check.flag("return_report", return_report)
    own_degree = SH_DEGREE_OF_COUNT[net.decoder.widths[-1] // 3] if scene.puts_out_sh else None
    if sh_degree is None:
        sh_degree = 3 if own_degree is None else own_degree
    check.integer("sh_degree", sh_degree, 0, 4)
    if own_degree is not None and sh_degree != own_degree:
        raise ValueError(f"sh_degree must be {own_degree}, what the network puts out, got {sh_degree}")
    view = read_camera(camera, like, viewmat_layout)
    weights = _weights(weight, [view], scene)
    images, maps = None if image is None else [image], None if feature_map is None else [feature_map]
    # In full precision: this is done once. On the CPU that is the default.
    precision = "fp32" if like.device.type == "cuda" else None
    maps, _ = _references(scene, [view], images, maps, None, precision)
    decoded = scene.decode(view.viewmat, view.K, maps[0], weights[0], **_given(precision=precision))
    if own_degree is not None:
        sh, report = decoded.unflatten(-1, (-1, 3)).contiguous(), BakeReport(0.0, 0.0, 0.0, 0.0)
    else:
        sh = _fit(net, decoded, sh_degree)
        report = _measure(net, decoded, sh, sh_degree) if return_report else None
    geometry = scene.scene
    baked = Scene(geometry.means, geometry.quats, geometry.scales, geometry.opacities, sh=sh)
    return (baked, report) if return_report else baked


def sphere_directions(n: int, turn: float = 0.0) -> Tensor:
    """[n, 3] float64 unit vectors spread evenly over the sphere: a Fibonacci lattice, turned about z by `turn` radians.

    As Gonzalez 2010, "Measurement of areas on a sphere using Fibonacci and latitude-longitude lattices".
    """
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    z = 1 - (2 * i + 1) / n
    angle, radius = i * _GOLDEN_ANGLE + turn, (1 - z * z).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), z], -1)


def _basis(degree: int, directions: Tensor) -> Tensor:
    """[J, K] spherical harmonics at directions [J, 3]."""
    count = (degree + 1) ** 2
    one_at_a_time = torch.eye(count, dtype=directions.dtype, device=directions.device)[:, :, None].expand(-1, -1, 3)
    return spherical_harmonics(degree, directions[:, None], one_at_a_time)[..., 0]


def _colors(net: ColorNet, decoded: Tensor, directions: Tensor) -> Tensor:
    """The colour head's [n, J, 3], float64, for decoded [n, F] in directions [J, 3].

    In float64 nothing is left to TF32. The first layer is a sum of a part of each Gaussian and a part of each
    direction, so it is not run on every pair.
    """
    (weight, bias), *rest = ((layer.weight.double(), layer.bias.double()) for layer in net.color_decoder.children())
    x = F.linear(decoded.double(), weight[:, :-3], bias)[:, None] + F.linear(directions, weight[:, -3:])
    for weight, bias in rest:
        x = F.linear(torch.relu_(x), weight, bias)
    return x


def _chunks(net: ColorNet, n: int) -> list[slice]:
    """Slices of N that keep the activations of `_colors` below _VALUES."""
    rows = max(1, _VALUES // (N_DIRECTIONS * max(net.color_decoder.widths[1:])))
    return [slice(begin, begin + rows) for begin in range(0, n, rows)]


def _fit(net: ColorNet, decoded: Tensor, degree: int) -> Tensor:
    """[N, K, 3] harmonics closest to the network's colours in N_DIRECTIONS directions."""
    directions = sphere_directions(N_DIRECTIONS)
    solver = torch.linalg.pinv(_basis(degree, directions)).to(decoded.device)  # [K, J]
    directions = directions.to(decoded.device)
    sh = decoded.new_empty((len(decoded), (degree + 1) ** 2, 3))
    for rows in _chunks(net, len(decoded)):
        sh[rows] = solver @ (_colors(net, decoded[rows], directions) - 0.5)  # a viewer adds 0.5
    return sh


def _measure(net: ColorNet, decoded: Tensor, sh: Tensor, degree: int) -> BakeReport:
    finite = decoded.isfinite().all(1)
    decoded, sh = decoded[finite], sh[finite]
    if not len(decoded):
        return BakeReport(0.0, 0.0, 0.0, 0.0)
    directions = sphere_directions(N_DIRECTIONS, turn=_GOLDEN_ANGLE / 2)
    basis, directions = _basis(degree, directions).to(decoded.device), directions.to(decoded.device)
    sums = torch.zeros(3, dtype=torch.float64, device=decoded.device)
    worst = sums.new_zeros(())
    for rows in _chunks(net, len(decoded)):
        colors = _colors(net, decoded[rows], directions)
        fitted = basis @ sh[rows].double() + 0.5
        error, shown_error = fitted - colors, fitted.clamp(min=0) - colors
        parts = error.square(), shown_error.square(), colors < 0
        sums += torch.stack([part.sum(dtype=torch.float64) for part in parts])
        worst = torch.maximum(worst, error.abs().max())
    squares, shown_squares, negative = (sums / (len(decoded) * N_DIRECTIONS * 3)).tolist()
    return BakeReport(math.sqrt(squares), float(worst), math.sqrt(shown_squares), negative)
