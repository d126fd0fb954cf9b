"""Stage 5: from blended colours to the image that was asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from rapfast.ops._library import address, cpu_arguments, cuda_arguments, define, native
from rapfast.postprocess import PostProcess

# PixelType of csrc/composite.h.
PIXEL_TYPES = {None: 0, torch.float32: 1, torch.float16: 2, torch.uint8: 3}


def output_tensors(colors, out_height, out_width, channels_first, pixel_type):
    """Uninitialised images and alphas of the size, layout and dtype asked for."""
    n_images, height, width, channels = colors.shape
    dtype = {0: colors.dtype, 1: torch.float32, 2: torch.float16, 3: torch.uint8}[pixel_type]
    shape = (channels, out_height, out_width) if channels_first else (out_height, out_width, channels)
    return (
        colors.new_empty((n_images, *shape), dtype=dtype),
        colors.new_empty((n_images, out_height, out_width, 1)),
    )


def _fake(
    colors, alphas, backgrounds, mean, std, n_color_channels, expected_depth, clamp_min, clamp_max, out_height,
    out_width, channels_first, pixel_type,
):  # fmt: skip
    return output_tensors(colors, out_height, out_width, channels_first, pixel_type)


def option_arguments(
    out, out_alphas, backgrounds, mean, std, expected_depth, clamp_min, clamp_max, out_height, out_width,
    channels_first, pixel_type,
):  # fmt: skip
    """What is done to an image, as the native module takes it."""
    return {
        "out_width": out_width,
        "out_height": out_height,
        "expected_depth": expected_depth,
        "clamp": clamp_min is not None,
        "channels_first": channels_first,
        "clamp_min": 0.0 if clamp_min is None else clamp_min,
        "clamp_max": 0.0 if clamp_max is None else clamp_max,
        "background_kind": 0 if backgrounds is None else 1 if backgrounds.dim() == 2 else 2,
        "pixel_type": pixel_type,
        "backgrounds": address(backgrounds),
        "mean": address(mean),
        "std": address(std),
        "out": address(out),
        "out_alphas": address(out_alphas),
    }


def _run(stage, place, colors, alphas, backgrounds, mean, std, n_color_channels, *options):
    *_, out_height, out_width, channels_first, pixel_type = options
    out, out_alphas = output_tensors(colors, out_height, out_width, channels_first, pixel_type)
    n_images, height, width, channels = colors.shape
    stage(
        **place(colors),
        n_images=n_images,
        width=width,
        height=height,
        n_channels=channels,
        n_color_channels=n_color_channels,
        colors=address(colors),
        alphas=address(alphas),
        **option_arguments(out, out_alphas, backgrounds, mean, std, *options),
    )
    return out, out_alphas


def _cpu(*inputs):
    return _run(native.composite, cpu_arguments, *inputs)


def _cuda(*inputs):
    return _run(native.composite_cuda, cuda_arguments, *inputs)


composite_op = define(
    "composite(Tensor colors, Tensor alphas, Tensor? backgrounds, Tensor? mean, Tensor? std, int n_color_channels, "
    "bool expected_depth, float? clamp_min, float? clamp_max, int out_height, int out_width, bool channels_first, "
    "int pixel_type) -> (Tensor, Tensor)",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


def composite(
    colors: Tensor,  # [I, H, W, D]
    alphas: Tensor,  # [I, H, W, 1]
    *,
    n_color_channels: int,
    backgrounds: Tensor | None = None,  # [I, Dc] or [I, H, W, Dc]
    expected_depth: bool = False,
    postprocess: PostProcess | None = None,
) -> tuple[Tensor, Tensor]:
    """Background, expected depth and post-processing in one pass over the output's pixels.

    Returns the images [I, h, w, D] or [I, D, h, w] and the alphas [I, h, w, 1] or [I, 1, h, w]; the inputs
    themselves where nothing is asked for.
    """
    post = postprocess or PostProcess()
    if backgrounds is None and not expected_depth and post == PostProcess():
        return colors, alphas
    out_height, out_width = post.size or colors.shape[1:3]
    clamp_min, clamp_max = post.clamp or (None, None)
    out, out_alphas = composite_op(
        colors,
        alphas,
        backgrounds,
        None if post.mean is None else colors.new_tensor(post.mean),
        None if post.std is None else colors.new_tensor(post.std),
        n_color_channels,
        expected_depth,
        clamp_min,
        clamp_max,
        out_height,
        out_width,
        post.layout == "CHW",
        PIXEL_TYPES[post.dtype],
    )
    if post.layout == "CHW":
        out_alphas = out_alphas.permute(0, 3, 1, 2)
    return out, out_alphas
