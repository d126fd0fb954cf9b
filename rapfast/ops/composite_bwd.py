"""Backward of stage 5: from gradients of finished images to those of blended ones."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rapfast.ops._library import address, cpu_arguments, cuda_arguments, define, native


class CompositeGradients(NamedTuple):
    """Gradients of the inputs of the composite stage."""

    colors: Tensor  # [I, H, W, D]
    alphas: Tensor  # [I, H, W, 1]
    backgrounds: Tensor  # as the backgrounds; empty where there are none or their gradient is not wanted


def _allocate(colors: Tensor, alphas: Tensor, backgrounds: Tensor | None, with_backgrounds: bool) -> CompositeGradients:
    return CompositeGradients(
        colors=colors.new_empty(colors.shape),
        alphas=alphas.new_empty(alphas.shape),
        backgrounds=colors.new_empty(backgrounds.shape if with_backgrounds else (0,)),
    )


def _fake(
    colors, alphas, backgrounds, std, v_out, v_out_alphas, n_color_channels, expected_depth, clamp_min, clamp_max,
    channels_first, with_backgrounds,
):  # fmt: skip
    return tuple(_allocate(colors, alphas, backgrounds, with_backgrounds))


def _run(
    stage, more, colors, alphas, backgrounds, std, v_out, v_out_alphas, n_color_channels, expected_depth, clamp_min,
    clamp_max, channels_first, with_backgrounds,
):  # fmt: skip
    out = _allocate(colors, alphas, backgrounds, with_backgrounds)
    n_images, height, width, channels = colors.shape
    stage(
        **more,
        n_images=n_images,
        width=width,
        height=height,
        out_width=v_out_alphas.shape[2],
        out_height=v_out_alphas.shape[1],
        n_channels=channels,
        n_color_channels=n_color_channels,
        expected_depth=expected_depth,
        clamp=clamp_min is not None,
        channels_first=channels_first,
        clamp_min=0.0 if clamp_min is None else clamp_min,
        clamp_max=0.0 if clamp_max is None else clamp_max,
        background_kind=0 if backgrounds is None else 1 if backgrounds.dim() == 2 else 2,
        colors=address(colors),
        alphas=address(alphas),
        backgrounds=address(backgrounds),
        std=address(std),
        v_out=address(v_out),
        v_out_alphas=address(v_out_alphas),
        **{f"v_{name}": address(tensor) for name, tensor in out._asdict().items()},
    )
    return tuple(out)


def _cpu(colors, *inputs):
    return _run(native.composite_bwd, cpu_arguments(colors), colors, *inputs)


def _cuda(colors, *inputs):
    n_images, height, width, channels = colors.shape
    # Partial sums of background colours.
    room = colors.new_empty((n_images * native.background_blocks(height * width) * channels,))
    return _run(native.composite_bwd_cuda, {**cuda_arguments(colors), "scratch": address(room)}, colors, *inputs)


composite_bwd_op = define(
    "composite_bwd(Tensor colors, Tensor alphas, Tensor? backgrounds, Tensor? std, Tensor v_out, Tensor v_out_alphas, "
    "int n_color_channels, bool expected_depth, float? clamp_min, float? clamp_max, bool channels_first, "
    "bool with_backgrounds) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


def composite_bwd(
    colors: Tensor,  # [I, H, W, D] as blended
    alphas: Tensor,  # [I, H, W, 1]
    backgrounds: Tensor | None,  # [I, Dc] or [I, H, W, Dc]
    std: Tensor | None,  # [Dc]
    v_out: Tensor,  # [I, h, w, D] or [I, D, h, w]
    v_out_alphas: Tensor,  # [I, h, w, 1]
    *,
    n_color_channels: int,
    expected_depth: bool,
    clamp: tuple[float, float] | None,
    channels_first: bool,
    with_backgrounds: bool,
) -> CompositeGradients:
    """Gradients of blended colours, alphas and, ``with_backgrounds``, backgrounds. ``v_out`` has the dtype of
    ``colors``, whatever that of the images was."""
    clamp_min, clamp_max = clamp or (None, None)
    return CompositeGradients(*composite_bwd_op(
        colors, alphas, backgrounds, std, v_out, v_out_alphas, n_color_channels, expected_depth, clamp_min, clamp_max,
        channels_first, with_backgrounds,
    ))  # fmt: skip
