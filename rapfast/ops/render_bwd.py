"""Backward of a call on the GPU, from the state that it kept.

A record's gradient is a row: conic (3), opacity, then its colour's, padded to a multiple of four. That of its mean is
in the layout of ``means2d``: dense [I, N, 2], or packed [n, 2] where ``places`` [M] has each record's row, -1 for dead
ones. ``sizes`` are the fields of `Sizes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rapfast.ops._library import address, aligned, cuda_arguments, define, native
from rapfast.ops.color import form_arguments
from rapfast.ops.render import Sizes

ROW_COLOR = 4
"""Column of a row at which its colour's gradient begins."""


def row_stride(n_channels: int) -> int:
    """Numbers in a row."""
    return ROW_COLOR + (n_channels + 3) // 4 * 4


def _state_arguments(state: Tensor, sizes: Sequence[int], n_records: int, places: Tensor | None) -> dict[str, int]:
    named = Sizes(*sizes)._asdict()
    named["keep_state"] = bool(named["keep_state"])
    return {**named, "state": address(state), "n_records": n_records, "places": address(places)}


# ------------------------------------------------------------------------------------------ means2d


def _means2d_fake(state, sizes, n_records, n_visible, packed):
    s = Sizes(*sizes)
    shape = (n_visible, 2) if packed else (s.n_images, s.n_gaussians, 2)
    return (
        state.new_empty(shape, dtype=torch.float32),
        state.new_empty((n_records if packed else 0,), dtype=torch.int32),
    )


def _means2d_cuda(state, sizes, n_records, n_visible, packed):
    means2d, places = _means2d_fake(state, sizes, n_records, n_visible, packed)
    if not packed:
        means2d.zero_()
    room = state.new_empty((native.means2d_chunks(n_records) if packed else 0,), dtype=torch.int32)
    if n_records > 0:
        native.means2d_cuda(
            **cuda_arguments(state),
            **_state_arguments(state, sizes, n_records, places if packed else None),
            means2d=address(means2d),
            scratch=address(room),
        )
    return means2d, places


means2d_op = define(
    "means2d(Tensor state, int[] sizes, int n_records, int n_visible, bool packed) -> (Tensor, Tensor)",
    fake=_means2d_fake,
    cuda=_means2d_cuda,
)


def means2d_of(state: Tensor, sizes: Sizes, n_records: int, n_visible: int, packed: bool) -> tuple[Tensor, Tensor]:
    """The image means of the visible records, dense [I, N, 2] with 0 elsewhere or packed [n_visible, 2], and, packed,
    ``places`` [M] (else [0])."""
    return means2d_op(state, list(sizes), n_records, n_visible, packed)


# -------------------------------------------------------------------------------------------- blend


class PixelGradients(NamedTuple):
    """What blended images pass on to records."""

    rows: Tensor  # [M, row_stride]
    means2d: Tensor  # dense [I, N, 2] or packed [n_visible, 2]


def _pixels_fake(
    state, places, v_colors, v_alphas, absgrad, sizes, n_records, n_intersections, n_visible, packed, alpha_cap,
    deterministic,
):  # fmt: skip
    s = Sizes(*sizes)
    shape = (n_visible, 2) if packed else (s.n_images, s.n_gaussians, 2)
    return (
        state.new_empty((n_records, row_stride(s.n_channels)), dtype=torch.float32),
        state.new_empty(shape, dtype=torch.float32),
    )


def _pixels_cuda(
    state, places, v_colors, v_alphas, absgrad, sizes, n_records, n_intersections, n_visible, packed, alpha_cap,
    deterministic,
):  # fmt: skip
    s = Sizes(*sizes)
    rows = state.new_zeros((n_records, row_stride(s.n_channels)), dtype=torch.float32)
    shape = (n_visible, 2) if packed else (s.n_images, s.n_gaussians, 2)
    v_means2d = state.new_zeros(shape, dtype=torch.float32)
    order = exponents = fixed = None
    if n_intersections >= native.ordered_capacity:
        n_tiles = s.n_images * -(-s.width // 16) * s.n_tile_rows
        order = state.new_empty((n_tiles + 2,), dtype=torch.int32)
    if deterministic:
        width = native.fixed_stride(s.n_channels)
        exponents = state.new_zeros((n_records, width), dtype=torch.int32)
        fixed = state.new_zeros((n_records, width), dtype=torch.int64)
    native.blend_bwd_cuda(
        **cuda_arguments(state),
        **_state_arguments(state, sizes, n_records, places if packed else None),
        n_intersections=n_intersections,
        alpha_cap=alpha_cap,
        v_colors=address(v_colors),
        v_alphas=address(v_alphas),
        order=address(order),
        rows=address(rows),
        v_means2d=address(v_means2d),
        absgrad=address(absgrad),
        exponents=address(exponents),
        fixed=address(fixed),
    )
    return rows, v_means2d


pixels_bwd_op = define(
    "pixels_bwd(Tensor state, Tensor places, Tensor? v_colors, Tensor? v_alphas, Tensor(a!)? absgrad, int[] sizes, "
    "int n_records, int n_intersections, int n_visible, bool packed, float alpha_cap, bool deterministic) "
    "-> (Tensor, Tensor)",
    fake=_pixels_fake,
    cuda=_pixels_cuda,
)


def pixels_bwd(
    state: Tensor,
    places: Tensor,  # [M] int32 where packed
    v_colors: Tensor | None,  # [I, H, W, D]; None: 0
    v_alphas: Tensor | None,  # [I, H, W, 1]; None: 0
    absgrad: Tensor | None,  # in the layout of means2d
    sizes: Sizes,
    *,
    n_records: int,
    n_intersections: int,
    n_visible: int,
    packed: bool,
    alpha_cap: float,
    deterministic: bool,
) -> PixelGradients:
    """Gradients of records. Adds to ``absgrad`` the sum over pixels of |gradient of the mean|.

    Atomics add floats in any order, unless ``deterministic``: then sums are of integers, scaled by the largest term of
    each, which takes twice as long and 12 bytes more per number.
    """
    return PixelGradients(*pixels_bwd_op(
        state, places, v_colors, v_alphas, absgrad, list(sizes), n_records, n_intersections, n_visible, packed,
        alpha_cap, deterministic,
    ))  # fmt: skip


# ----------------------------------------------------------------------------------------- Gaussians


class GaussianGradients(NamedTuple):
    """Gradients of a call's inputs; empty tensors where not wanted."""

    means: Tensor  # [B, N, 3]
    quats: Tensor  # [B, N, 4]
    scales: Tensor  # [B, N, 3]
    covars: Tensor  # [B, N, 3, 3], 0 below the diagonal
    opacities: Tensor  # [B, N]
    viewmats: Tensor  # [B, C, 4, 4]
    Ks: Tensor  # [B, C, 3, 3]
    colors: Tensor  # as the colours


def _gaussians_fake(
    means, quats, scales, covars, opacities, viewmats, Ks, colors, state, places, rows, v_means2d, v_records, sizes,
    n_records, packed, camera_model, antialiased, eps2d, sh_degree, per_camera, depth_channel, wanted,
):  # fmt: skip
    inputs = (means, quats, scales, covars, opacities, viewmats, Ks, colors)
    return tuple(means.new_empty(x.shape if want else (0,)) for x, want in zip(inputs, wanted, strict=True))


def _gaussians_cuda(
    means, quats, scales, covars, opacities, viewmats, Ks, colors, state, places, rows, v_means2d, v_records, sizes,
    n_records, packed, camera_model, antialiased, eps2d, sh_degree, per_camera, depth_channel, wanted,
):  # fmt: skip
    s = Sizes(*sizes)
    # Read in pieces of 8 and 16 bytes. The names live until the launch.
    colors, rows, v_means2d = aligned(colors), aligned(rows), aligned(v_means2d)
    inputs = (means, quats, scales, covars, opacities, viewmats, Ks, colors)
    # Nothing is written where there is nothing to go over, nor to colours that no row reaches.
    nothing = n_records == 0 or s.n_cameras == 0 or s.n_gaussians == 0
    zero = [nothing] * 7 + [nothing or rows is None or depth_channel == 2]
    out = GaussianGradients(*(
        means.new_zeros(x.shape) if want and z else means.new_empty(x.shape if want else (0,))
        for x, want, z in zip(inputs, wanted, zero, strict=True)
    ))  # fmt: skip
    if nothing:
        return tuple(out)
    with_views, with_colors = wanted[5] or wanted[6], depth_channel != 2 and rows is not None
    n_chunks = native.seen_chunks(s.n_gaussians)
    project_sums = means.new_empty((s.n_images, n_chunks, 16)) if with_views else None
    with_centers = wanted[5] and with_colors and sh_degree >= 0
    center_sums = means.new_empty((s.n_images, n_chunks, 3)) if with_centers else None
    native.gaussians_bwd_cuda(
        **cuda_arguments(state),
        **_state_arguments(state, sizes, n_records, places if packed else None),
        **form_arguments(colors, sh_degree, per_camera, depth_channel),
        camera_model=camera_model,
        antialiased=antialiased,
        eps2d=eps2d,
        means=address(means),
        quats=address(quats),
        scales=address(scales),
        covars=address(covars),
        opacities=address(opacities),
        viewmats=address(viewmats),
        Ks=address(Ks),
        rows=address(rows),
        v_means2d=address(v_means2d),
        v_records=address(v_records),
        project_sums=address(project_sums),
        center_sums=address(center_sums),
        **{f"v_{name}": address(tensor) for name, tensor in out._asdict().items()},
    )
    return tuple(out)


gaussians_bwd_op = define(
    "gaussians_bwd(Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor opacities, Tensor viewmats, "
    "Tensor Ks, Tensor colors, Tensor state, Tensor places, Tensor? rows, Tensor? v_means2d, Tensor? v_records, "
    "int[] sizes, int n_records, bool packed, int camera_model, bool antialiased, float eps2d, int sh_degree, "
    "bool per_camera, int depth_channel, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_gaussians_fake,
    cuda=_gaussians_cuda,
)


def gaussians_bwd(
    means: Tensor,  # [B, N, 3]
    quats: Tensor | None,  # [B, N, 4]
    scales: Tensor | None,  # [B, N, 3]
    covars: Tensor | None,  # [B, N, 3, 3]
    opacities: Tensor,  # [B, N]
    viewmats: Tensor,  # [B, C, 4, 4]
    Ks: Tensor,  # [B, C, 3, 3]
    colors: Tensor,  # [B, (C,) N, D] or [B, (C,) N, K, 3]; given ones are read for their shape alone
    state: Tensor,
    places: Tensor,
    rows: Tensor | None,  # [M, row_stride]; None: 0
    v_means2d: Tensor | None,  # dense [I, N, 2] or packed [n_visible, 2]; None: 0
    v_records: Tensor | None,  # [M, 8] what reached the records elsewhere, the first two columns not read; None: 0
    sizes: Sizes,
    *,
    n_records: int,
    packed: bool,
    camera_model: int,
    antialiased: bool,
    eps2d: float,
    sh_degree: int,
    depth_channel: int,
    wanted: list[bool],
) -> GaussianGradients:
    """Gradients of a call's inputs from those of its records; ``wanted`` says of which, in the order of the fields.

    ``sh_degree`` is -1 where colours are given. Sums run in a fixed order.
    """
    per_camera = colors.dim() == (4 if sh_degree < 0 else 5)
    return GaussianGradients(*gaussians_bwd_op(
        means, quats, scales, covars, opacities, viewmats, Ks, colors, state, places, rows, v_means2d, v_records,
        list(sizes), n_records, packed, camera_model, antialiased, eps2d, sh_degree, per_camera, depth_channel, wanted,
    ))  # fmt: skip
