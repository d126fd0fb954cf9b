"""Backward of stage 2: from gradients of the records' colours to those of colours, means and cameras."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rapfast.ops._library import address, cpu_arguments, define, native
from rapfast.ops.color import form_arguments


class ColorGradients(NamedTuple):
    """Gradients of the inputs of the color stage; empty tensors where not wanted or not there."""

    means: Tensor  # [B, N, 3], with spherical harmonics
    viewmats: Tensor  # [B, C, 4, 4], with spherical harmonics
    colors: Tensor  # as the colours
    depths: Tensor  # [M], with a depth channel


def _allocate(means, viewmats, colors, gaussian_ids, sh_degree, depth_channel, wanted) -> ColorGradients:
    with_colors = depth_channel != 2
    with_directions = with_colors and sh_degree >= 0
    exists = (with_directions, with_directions, with_colors, depth_channel != 0)
    shapes = (means.shape, viewmats.shape, colors.shape, gaussian_ids.shape)
    return ColorGradients(
        *(means.new_empty(s if e and w else (0,)) for s, e, w in zip(shapes, exists, wanted, strict=True))
    )


def _fake(
    means, viewmats, colors, gaussian_ids, image_offsets, records, v_record_colors, sh_degree, per_camera,
    depth_channel, wanted,
):  # fmt: skip
    return tuple(_allocate(means, viewmats, colors, gaussian_ids, sh_degree, depth_channel, wanted))


def _cpu(
    means, viewmats, colors, gaussian_ids, image_offsets, records, v_record_colors, sh_degree, per_camera,
    depth_channel, wanted,
):  # fmt: skip
    out = _allocate(means, viewmats, colors, gaussian_ids, sh_degree, depth_channel, wanted)
    native.color_bwd(
        **cpu_arguments(means),
        n_scenes=means.shape[0],
        n_cameras=viewmats.shape[1],
        n_gaussians=means.shape[1],
        **form_arguments(colors, sh_degree, per_camera, depth_channel),
        means=address(means),
        viewmats=address(viewmats),
        gaussian_ids=address(gaussian_ids),
        image_offsets=address(image_offsets),
        records=address(records),
        v_record_colors=address(v_record_colors),
        color_stride=v_record_colors.shape[1],
        **{f"v_{name}": address(tensor) for name, tensor in out._asdict().items()},
    )
    return tuple(out)


color_bwd_op = define(
    "color_bwd(Tensor means, Tensor viewmats, Tensor colors, Tensor gaussian_ids, Tensor image_offsets, "
    "Tensor records, Tensor v_record_colors, int sh_degree, bool per_camera, int depth_channel, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_cpu,
)


def color_bwd(
    means: Tensor,  # [B, N, 3]
    viewmats: Tensor,  # [B, C, 4, 4]
    colors: Tensor,  # [B, (C,) N, D] or [B, (C,) N, K, 3]
    gaussian_ids: Tensor,  # [M] int32
    image_offsets: Tensor,  # [I + 1] int64
    records: Tensor,  # [M, 8]
    v_record_colors: Tensor,  # [M, D']
    *,
    sh_degree: int,
    depth_channel: int,
    wanted: list[bool],
) -> ColorGradients:
    """Gradients of the color stage's inputs; ``wanted`` says of which, in the order of the fields.

    ``sh_degree`` is -1 where colours are given; ``depth_channel`` is a value of ``DEPTH_CHANNELS``.
    """
    per_camera = colors.dim() == (4 if sh_degree < 0 else 5)
    return ColorGradients(*color_bwd_op(
        means, viewmats, colors, gaussian_ids, image_offsets, records, v_record_colors, sh_degree, per_camera,
        depth_channel, wanted,
    ))  # fmt: skip
