"""Stage 2: the colour of every record."""

from __future__ import annotations

from torch import Tensor

from rapfast.ops._library import address, aligned, cpu_arguments, cuda_arguments, define, native, scratch
from rapfast.ops.project import Records, image_ids

DEPTH_CHANNELS = {"RGB": 0, "RGB+D": 1, "RGB+ED": 1, "D": 2, "ED": 2}
"""Render mode to what the depth channel does: absent, appended, alone."""


def output_channels(colors: Tensor | None, depth_channel: int) -> int:
    """Channels that are blended: the colours (a network's 3 where none are given), with depth, or depth alone."""
    return 1 if depth_channel == 2 else (3 if colors is None else colors.shape[-1]) + depth_channel


def form_arguments(colors, sh_degree, per_camera, depth_channel):
    """The form of the colours as the native module takes it."""
    return {
        "sh_degree": sh_degree,
        "n_bases": colors.shape[-2] if sh_degree >= 0 else 1,
        "n_color_channels": 3 if colors is None else colors.shape[-1],
        "per_camera": per_camera,
        "depth_channel": depth_channel,
        "colors": address(colors),
    }


def _fake(
    means, viewmats, Ks, colors, gaussian_ids, image_offsets, records, n_invalid, width, height,
    sh_degree, per_camera, depth_channel,
):  # fmt: skip
    return records.new_empty((records.shape[0], output_channels(colors, depth_channel)))


def _arguments(
    out, means, viewmats, Ks, colors, gaussian_ids, image_offsets, records, n_invalid, width, height,
    sh_degree, per_camera, depth_channel,
):  # fmt: skip
    return dict(
        n_scenes=means.shape[0],
        n_cameras=viewmats.shape[1],
        n_gaussians=means.shape[1],
        width=width,
        height=height,
        capacity=records.shape[0],
        color_stride=out.shape[1],
        means=address(means),
        viewmats=address(viewmats),
        Ks=address(Ks),
        gaussian_ids=address(gaussian_ids),
        image_offsets=address(image_offsets),
        records=address(records),
        record_colors=address(out),
        n_invalid=address(n_invalid),
        shared_colors=colors.shape[0] < means.shape[0],
        **form_arguments(colors, sh_degree, per_camera, depth_channel),
    )


def _cpu(*inputs):
    out = _fake(*inputs)
    native.color(**cpu_arguments(out), **_arguments(out, *inputs))
    return out


def _cuda(means, viewmats, Ks, colors, gaussian_ids, image_offsets, records, n_invalid, *inputs):
    colors, channels = aligned(colors), output_channels(colors, inputs[-1])
    out = records.new_zeros((records.shape[0], native.color_stride(channels)))
    views = scratch(means, native.view_size * viewmats.shape[0] * viewmats.shape[1])
    images = image_ids(Records(records, records, gaussian_ids, image_offsets, n_invalid)).int()
    native.color_cuda(
        **cuda_arguments(means),
        **_arguments(out, means, viewmats, Ks, colors, gaussian_ids, image_offsets, records, n_invalid, *inputs),
        views=address(views),
        image_ids=address(images),
    )
    return out[:, :channels].contiguous()


color_op = define(
    "color(Tensor means, Tensor viewmats, Tensor Ks, Tensor colors, Tensor gaussian_ids, Tensor image_offsets, "
    "Tensor(a!) records, Tensor(b!) n_invalid, int width, int height, int sh_degree, bool per_camera, "
    "int depth_channel) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


def color(
    means: Tensor,  # [B, N, 3]
    viewmats: Tensor,  # [B, C, 4, 4]
    Ks: Tensor,  # [B, C, 3, 3]
    colors: Tensor,  # [B, (C,) N, D] or [B, (C,) N, K, 3]; [1, N, ...]: of all scenes
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
