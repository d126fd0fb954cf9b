"""Stage 2: the colour of every record."""

from __future__ import annotations

from torch import Tensor

from rapfast.ops._library import address, define, native, native_arguments
from rapfast.ops.project import Records

DEPTH_CHANNELS = {"RGB": 0, "RGB+D": 1, "RGB+ED": 1, "D": 2, "ED": 2}
"""Render mode to what the depth channel does: absent, appended, alone."""


def _output(colors: Tensor, records: Tensor, depth_channel: int) -> Tensor:
    channels = 1 if depth_channel == 2 else colors.shape[-1] + depth_channel
    return records.new_empty((records.shape[0], channels))


def _fake(
    means, viewmats, Ks, colors, gaussian_ids, image_offsets, records, n_invalid, width, height,
    sh_degree, per_camera, depth_channel,
):  # fmt: skip
    return _output(colors, records, depth_channel)


def _cpu(
    means, viewmats, Ks, colors, gaussian_ids, image_offsets, records, n_invalid, width, height,
    sh_degree, per_camera, depth_channel,
):  # fmt: skip
    out = _output(colors, records, depth_channel)
    native.color(
        **native_arguments(means),
        n_scenes=means.shape[0],
        n_cameras=viewmats.shape[1],
        n_gaussians=means.shape[1],
        width=width,
        height=height,
        sh_degree=sh_degree,
        n_bases=colors.shape[-2] if sh_degree >= 0 else 1,
        n_channels=colors.shape[-1],
        per_camera=per_camera,
        depth_channel=depth_channel,
        means=address(means),
        viewmats=address(viewmats),
        Ks=address(Ks),
        colors=address(colors),
        gaussian_ids=address(gaussian_ids),
        image_offsets=address(image_offsets),
        records=address(records),
        record_colors=address(out),
        n_invalid=address(n_invalid),
    )
    return out


color_op = define(
    "color(Tensor means, Tensor viewmats, Tensor Ks, Tensor colors, Tensor gaussian_ids, Tensor image_offsets, "
    "Tensor(a!) records, Tensor(b!) n_invalid, int width, int height, int sh_degree, bool per_camera, "
    "int depth_channel) -> Tensor",
    _cpu,
    _fake,
)


def color(
    means: Tensor,  # [B, N, 3]
    viewmats: Tensor,  # [B, C, 4, 4]
    Ks: Tensor,  # [B, C, 3, 3]
    colors: Tensor,  # [B, (C,) N, D] or [B, (C,) N, K, 3]
    projected: Records,
    width: int,
    height: int,
    *,
    sh_degree: int | None,
    render_mode: str = "RGB",
) -> Tensor:
    """Colours [M, D'] of the records: spherical harmonics or the given ones, depth last where the mode has it.

    A record whose colour is not finite gets opacity 0 in ``projected.records`` and is counted in
    ``projected.n_invalid``.
    """
    return color_op(
        means, viewmats, Ks, colors, projected.gaussian_ids, projected.image_offsets, projected.records,
        projected.n_invalid, width, height, -1 if sh_degree is None else sh_degree,
        colors.dim() == (4 if sh_degree is None else 5), DEPTH_CHANNELS[render_mode],
    )  # fmt: skip
