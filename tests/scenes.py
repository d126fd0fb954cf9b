"""Seeded scenes and the comparisons that several test files share.

Scenes are drawn in float64 and rounded to float32, so that the float32 and the float64 version of a
scene are the same numbers and differ in nothing but the arithmetic done with them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rapfast import reference
from rapfast.ops.bin import Tiles
from rapfast.ops.project import Records

WIDTH, HEIGHT = 75, 41  # neither is a multiple of the tile
ALPHA_CUT = 1 / 255
T_STOP = 1e-4


class Scene(NamedTuple):
    """Leading arguments of rasterization(), in its order."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor
    viewmats: Tensor
    Ks: Tensor

    def to(self, *args: Any) -> Scene:
        return Scene(*(x.to(*args) for x in self))

    def image(self, c: int) -> Scene:
        """The same Gaussians seen by camera c alone; colours must be shared by the cameras."""
        return self._replace(viewmats=self.viewmats[..., c : c + 1, :, :], Ks=self.Ks[..., c : c + 1, :, :])


def make_scene(
    n: int = 300,
    c: int = 2,
    *,
    batch: tuple[int, ...] = (),
    channels: int = 3,
    sh_degree: int | None = None,
    n_bases: int | None = None,
    per_camera: bool = False,
    width: int = WIDTH,
    height: int = HEIGHT,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Scene:
    """n Gaussians in a box, seen by c cameras that look at it from several sides.

    Some lie behind a camera or outside its image, some are faint, and some cover many tiles.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*batch, *shape, generator=g, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    means = uniform(n, 3, low=-2.0, high=2.0)
    quats = normal(n, 4)
    scales = 0.01 + 0.3 * uniform(n, 3) ** 3
    opacities = uniform(n)
    views = (c,) if per_camera else ()
    if sh_degree is None:
        colors = uniform(*views, n, channels)
    else:
        colors = 0.4 * normal(*views, n, n_bases or (sh_degree + 1) ** 2, 3)
    angles = uniform(c, low=-0.6, high=0.6)
    viewmats = torch.eye(4, dtype=torch.float64).repeat(*batch, c, 1, 1)
    viewmats[..., 0, 0] = viewmats[..., 2, 2] = angles.cos()
    viewmats[..., 0, 2] = angles.sin()
    viewmats[..., 2, 0] = -angles.sin()
    viewmats[..., :3, 3] = 0.2 * normal(c, 3) + torch.tensor([0.0, 0.0, 2.0])
    Ks = torch.eye(3, dtype=torch.float64).repeat(*batch, c, 1, 1)
    Ks[..., 0, 0] = 0.8 * max(width, height) * (1 + 0.1 * uniform(c))
    Ks[..., 1, 1] = 0.8 * max(width, height) * (1 + 0.1 * uniform(c))
    Ks[..., 0, 2] = width * (0.5 + 0.05 * uniform(c))
    Ks[..., 1, 2] = height * (0.5 + 0.05 * uniform(c))
    scene = Scene(means, quats, scales, opacities, colors, viewmats, Ks)
    return scene.to(torch.float32).to(dtype).to(device)


def covariances(scene: Scene) -> Tensor:
    """R(q) S S^T R(q)^T of the scene's Gaussians, [..., N, 3, 3]."""
    q = scene.quats.double() / scene.quats.double().norm(dim=-1, keepdim=True)
    w, v = q[..., :1], q[..., 1:]
    # Rodrigues: a rotated axis is a + 2 w (v x a) + 2 v x (v x a).
    axes = torch.eye(3, dtype=q.dtype, device=q.device).expand(*q.shape[:-1], 3, 3)
    v, w = v[..., None, :].expand_as(axes), w[..., None]
    turn = torch.linalg.cross(v, axes)
    rotated = axes + 2 * w * turn + 2 * torch.linalg.cross(v, turn)  # rows: images of the axes
    half = rotated * scene.scales.double()[..., None]
    return (half.mT @ half).to(scene.means.dtype)


def look_ahead(
    width: int, height: int, focal: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """One camera at the origin that looks along z: viewmats [1, 4, 4] and Ks [1, 3, 3]."""
    K = torch.tensor([[[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]], dtype=dtype)
    return torch.eye(4, dtype=dtype)[None], K


def spots(
    centers: list[tuple[float, float]],
    sigmas: list[float],
    opacities: list[float],
    depths: list[float],
    colors: list[tuple[float, ...]],
    width: int = 16,
    height: int = 16,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Scene:
    """Round Gaussians given by their pixel centres and standard deviations in pixels (before the
    blur) as an orthographic camera of focal length 1 sees them: nothing depends on their depth.
    """
    n = len(centers)
    viewmats, Ks = look_ahead(width, height, dtype=dtype)
    xy = torch.tensor(centers, dtype=dtype) - torch.tensor([width / 2, height / 2], dtype=dtype)
    means = torch.cat([xy, torch.tensor(depths, dtype=dtype)[:, None]], -1)
    quats = torch.tensor([[1.0, 0, 0, 0]], dtype=dtype).repeat(n, 1)
    scales = torch.tensor(sigmas, dtype=dtype)[:, None].repeat(1, 3)
    return Scene(
        means,
        quats,
        scales,
        torch.tensor(opacities, dtype=dtype),
        torch.tensor(colors, dtype=dtype),
        viewmats,
        Ks,
    ).to(device)


def skip_unsupported(device: torch.device, dtype: torch.dtype) -> None:
    """CUDA kernels take float32 alone."""
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels take float32 alone")


def flat(scene: Scene) -> Scene:
    """The scene with exactly one batch dimension, as the stage operators and stage functions take it."""
    batch = scene.means.shape[:-2]
    b = math.prod(batch)
    return Scene(*(x.reshape(b, *x.shape[len(batch) :]) for x in scene))


def reference_records(records: Records, n_cameras: int) -> reference.Records:
    """An operator's records in the form that the reference's later stages take."""
    counts = records.image_offsets.diff()
    images = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    r = records.records
    return reference.Records(
        images // n_cameras,
        images % n_cameras,
        records.gaussian_ids.long(),
        records.radii,
        r[:, 0:2],
        r[:, 6],
        r[:, 2:5],
        r[:, 5],
        records.n_invalid.view(-1, n_cameras),
    )


def flatten_ids(records: Records, tiles: Tiles) -> Tensor:
    """Rows of the records, tile by tile: tile_records without their image's offset."""
    n_images = len(records.image_offsets) - 1
    n_tiles = (len(tiles.tile_offsets) - 1) // max(n_images, 1)
    counts = tiles.tile_offsets.diff().reshape(n_images, n_tiles).sum(1)
    return tiles.tile_records + torch.repeat_interleave(records.image_offsets[:-1], counts)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal bit by bit, but for NaN, which must stand in the same places."""
    assert got.shape == want.shape, f"{list(got.shape)} instead of {list(want.shape)}"
    assert got.dtype == want.dtype, f"{got.dtype} instead of {want.dtype}"
    if not torch.equal(got, want):
        differ = ~((got == want) | ((got != got) & (want != want)))
        assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} values differ"


def assert_close64(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    """float64 against float64: relative to the largest value, so that nothing discrete may differ."""
    assert got.shape == want.shape, f"{list(got.shape)} instead of {list(want.shape)}"
    assert got.dtype == want.dtype == torch.float64
    if got.numel() == 0:
        return
    assert bool(got.isfinite().all()) and bool(want.isfinite().all())
    scale = max(1.0, float(want.abs().max()))
    worst = float((got - want).abs().max())
    assert worst <= tolerance * scale, f"differs by {worst}, allowed {tolerance * scale}"


def assert_close_outside_band(
    got: Tensor,
    ref32: Tensor,
    ref64: Tensor,
    *,
    decision: float = 1e-5,
    band: float = 2e-3,
    flip: float = 0.02,
) -> None:
    """float32 images [..., D] against the float64 reference, errors relative to the largest value.

    Discrete decisions (a cut at 1/255, a stop) fall differently in a few pixels, for the float32
    reference as well. Pixels whose error exceeds `decision` are taken for those: their share is
    capped by `band`, and one or two decisions explain no more than `flip`. All others may err at most
    twice as much as the float32 reference does, on average and at the 99th percentile, with a floor
    for each.
    """
    assert got.shape == ref64.shape, f"{list(got.shape)} instead of {list(ref64.shape)}"
    assert bool(got.isfinite().all())
    scale = max(1.0, float(ref64.abs().max()))
    error = (got.double() - ref64).abs().amax(-1).flatten() / scale
    own = (ref32.double() - ref64).abs().amax(-1).flatten() / scale
    flipped = int((error > decision).sum())
    allowed = math.ceil(band * error.numel())
    assert flipped <= allowed, f"{flipped} of {error.numel()} pixels differ, allowed {allowed}"
    assert float(error.max()) <= flip, f"a pixel errs by {float(error.max()):.2e}"
    error, own = error[error <= decision], own[own <= decision]
    k = max(1, int(0.99 * min(len(error), len(own))))
    for what, found, expected, floor in (
        ("mean", error.mean(), own.mean(), 1e-7),
        ("99th percentile", error.kthvalue(k).values, own.kthvalue(k).values, 6e-7),
    ):
        bound = max(2 * float(expected), floor)
        assert float(found) <= bound, f"{what} of the error is {float(found):.2e}, allowed {bound:.2e}"
