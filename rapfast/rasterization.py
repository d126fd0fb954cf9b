"""``rasterization``: gsplat's call, rendered by rapfast."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from rapfast import _check as check
from rapfast import ops, reference
from rapfast._call import render_call, render_call_with_grad, require_cuda
from rapfast._call_arguments import (
    PLAIN_TYPES,
    Inputs,
    Settings,
    check_inputs,
    check_max_memory,
    check_options,
    check_options_once,
    check_postprocess,
    check_settings,
)
from rapfast.meta import Meta
from rapfast.ops._library import uncompiled
from rapfast.ops.autograd import ColorStage
from rapfast.postprocess import PostProcess


def rasterization(
    means: Tensor,  # [..., N, 3]
    quats: Tensor | None,  # [..., N, 4]
    scales: Tensor | None,  # [..., N, 3]
    opacities: Tensor,  # [..., N]
    colors: Tensor,  # [..., (C,) N, D] or [..., (C,) N, K, 3]
    viewmats: Tensor,  # [..., C, 4, 4]
    Ks: Tensor,  # [..., C, 3, 3]
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: str = "classic",
    channel_chunk: int = 32,
    distributed: bool = False,
    camera_model: str = "pinhole",
    segmented: bool = False,
    covars: Tensor | None = None,
    with_ut: bool = False,
    with_eval3d: bool = False,
    radial_coeffs: Tensor | None = None,
    tangential_coeffs: Tensor | None = None,
    thin_prism_coeffs: Tensor | None = None,
    ftheta_coeffs: Any = None,
    rolling_shutter: Any = None,
    viewmats_rs: Tensor | None = None,
    *,
    backend: str = "rapfast",
    alpha_cap: float = 0.999,
    postprocess: PostProcess | None = None,
    max_memory: int | None = None,
) -> tuple[Tensor, Tensor, Meta | dict[str, Any]]:
    """Renders N Gaussians into C cameras in one call, with the arguments of ``gsplat.rasterization`` 1.5.3.

    Leading batch dimensions ``...`` are scenes, each with its own Gaussians and cameras. All tensors are of one
    dtype, float32 or (on the CPU) float64, and on one device; they need not be contiguous. A view rendered in a
    batch is bitwise the view rendered alone.

    Args:
        means: Gaussian centres, world units.
        quats: rotations (w, x, y, z) of any norm but zero. May be None with ``covars``.
        scales: standard deviations along the rotated axes, world units. May be None with ``covars``.
        opacities: 0 to 1. Above 1 the drawn alpha is still capped and the bounds stay at 3.33 sigma, as in
            gsplat; below 1/255 nothing is drawn.
        colors: with ``sh_degree`` None colours of any number D of channels, else spherical-harmonic
            coefficients, K >= (sh_degree + 1)^2, in INRIA's order; shared by the cameras or one set for each. Those of
            one scene given to all by ``expand`` are read where they are (copied for each scene where a gradient is
            wanted); any other tensor is made contiguous.
        viewmats: world to camera, OpenCV axes (x right, y down, z forward).
        Ks: intrinsics in pixels; pixel centres lie at +0.5. Skew is not used.
        width, height: of the images, pixels.
        near_plane, far_plane: camera-space z outside these is not drawn.
        radius_clip: Gaussians whose radius is at most this many pixels are not drawn.
        eps2d: added to the diagonal of the 2D covariance, pixels^2.
        sh_degree: 0 to 4; None: ``colors`` are colours.
        packed: layout of ``meta`` only: [M, ...] per visible pair, or dense [..., C, N, ...].
        tile_size: 16.
        backgrounds: one colour per camera [..., C, D] or an image [..., C, H, W, D]. Depth has background 0.
        render_mode: "RGB", "D" (sum of weight x depth), "ED" (that over alpha), "RGB+D" or "RGB+ED" (depth last).
        sparse_grad: the gradients of means, quats, scales and covars are sparse (COO) tensors, of the Gaussians that
            some view sees; packed=True and no batch dimensions.
        absgrad: backward adds to ``meta["means2d"].absgrad`` the sum over pixels of the absolute value of each pixel's
            gradient of ``means2d`` (AbsGS, arXiv 2404.10484).
        rasterize_mode: "classic", or "antialiased": opacity is scaled by how much ``eps2d`` widened the Gaussian.
        channel_chunk, segmented: hints of gsplat that cannot change a pixel.
        camera_model: "pinhole", "ortho" or "fisheye".
        covars: covariances [..., N, 3, 3] used instead of quats and scales; the upper triangle is read.
        distributed, with_ut, with_eval3d, radial_coeffs, tangential_coeffs, thin_prism_coeffs, ftheta_coeffs,
            rolling_shutter, viewmats_rs: not supported, must keep their defaults.
        backend: "rapfast"; "gsplat", which needs gsplat and a GPU; or "reference", plain torch, slow, any
            floating dtype, differentiable.
        alpha_cap: largest alpha of one Gaussian in one pixel, between 1/255 and 1.
        postprocess: see :class:`rapfast.PostProcess`.
        max_memory: bytes that the call may take above its inputs, with its outputs and what ``meta`` keeps; None: as
            many as it needs. What does not fit at once is rendered view group by view group and, on a GPU, tile row
            by tile row, with the same pixels. On the CPU images, records and lists count, not what is soon freed.

    Returns:
        colours [..., C, H, W, D] (D + 1 with a depth channel, 1 for depth alone), alphas [..., C, H, W, 1], and
        ``meta``, see :func:`rapfast.meta.build_meta`. ``postprocess`` may change size, dtype and layout.

        Gaussians that are not finite or degenerate (a zero quaternion, an overflowing projection, a colour that
        is not finite), and all Gaussians of a view whose camera is (not finite, singular, a focal length of 0 or
        less), are not drawn and counted in ``meta["n_invalid"]``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. ``max_memory`` that the smallest
            part exceeds is told while rendering.
        TooLarge: on a GPU, with gradients or in a CUDA graph, for images of more than 4096 regions of 128x64 pixels
            (8192x4096); a RuntimeError.
        NotImplementedError: for gsplat's arguments listed above, for ``max_memory`` where a gradient is wanted, for it
            and ``absgrad`` inside torch.compile, for ``sparse_grad`` there on a GPU, and for a second derivative.

    Differentiable in every tensor, once. ``meta["means2d"]`` is then part of the graph, so its ``retain_grad()`` works,
    and so are ``conics``, ``depths`` and ``opacities``. On the CPU gradients do not depend on the number of threads. On
    a GPU what pixels give a record is added by atomics, so that last bits change from call to call, unless
    `torch.use_deterministic_algorithms(True)` is set: then bits repeat, and the blend's backward takes twice as long.

    EWA splatting follows Zwicker et al. 2001 and Kerbl et al. 2023; docs/numerics.md has each formula's source.
    """
    options = (
        width, height, near_plane, far_plane, radius_clip, eps2d, sh_degree, packed, tile_size, render_mode,
        sparse_grad, absgrad, rasterize_mode, channel_chunk, distributed, camera_model, segmented, with_ut, with_eval3d,
        radial_coeffs, tangential_coeffs, thin_prism_coeffs, ftheta_coeffs, rolling_shutter, viewmats_rs, backend,
        alpha_cap,
    )  # fmt: skip
    # A loop's calls have the same options, whose checks take longer than all launches.
    plain = PLAIN_TYPES.issuperset(map(type, options)) and not torch.compiler.is_compiling()
    settings = check_options_once(*options) if plain else check_options(*options)
    inputs = check_inputs(means, quats, scales, covars, opacities, colors, viewmats, Ks, backgrounds, settings)
    if sparse_grad:
        if not packed:
            raise ValueError("sparse_grad must be False with packed=False, got True")
        if means.dim() != 2:
            raise ValueError(f"sparse_grad must be False with leading batch dimensions, got means {list(means.shape)}")
    check_postprocess(postprocess, colors.shape[-1], settings)
    if check_max_memory(max_memory) is not None and backend != "rapfast":
        raise NotImplementedError(f'max_memory={max_memory} is not supported by backend="{backend}": use "rapfast"')

    if backend == "gsplat":
        return _gsplat(inputs, settings, packed, sparse_grad, absgrad, channel_chunk, segmented, postprocess)
    if backend == "reference":
        if sparse_grad:
            raise NotImplementedError('sparse_grad=True is not supported by backend="reference": use "gsplat"')
        with torch.autocast(means.device.type, enabled=False):
            return reference.rasterization(
                **inputs._asdict(),
                width=settings.width,
                height=settings.height,
                near_plane=settings.near_plane,
                far_plane=settings.far_plane,
                radius_clip=settings.radius_clip,
                eps2d=settings.eps2d,
                sh_degree=settings.sh_degree,
                packed=packed,
                render_mode=render_mode,
                rasterize_mode=rasterize_mode,
                camera_model=camera_model,
                absgrad=absgrad,
                alpha_cap=settings.alpha_cap,
                postprocess=postprocess,
            )
    gradients = {"absgrad": absgrad, "sparse_grad": sparse_grad}
    return render_call(inputs, settings, packed, postprocess, max_memory=max_memory, **gradients)


def rasterize_network(
    means: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    scales: Tensor,  # [N, 3]
    opacities: Tensor,  # [N]
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    backgrounds: Tensor | None,  # [C, D] or [C, H, W, D]
    width: int,
    height: int,
    network: ops.Network,
    network_input: ops.NetworkInput,
    *,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    eps2d: float,
    render_mode: str,
    rasterize_mode: str,
    alpha_cap: float,
    packed: bool,
    postprocess: PostProcess | None,
    max_memory: int | None = None,
) -> tuple[Tensor, Tensor, Meta]:
    """As `rasterization` by backend "rapfast", with the colours of the visible pairs from a colour network. The
    caller has checked the network and its input, and that no gradient is wanted of them."""
    settings = check_settings(
        width,
        height,
        near_plane,
        far_plane,
        radius_clip,
        eps2d,
        None,
        render_mode,
        rasterize_mode,
        "pinhole",
        alpha_cap,
    )
    check.flag("packed", packed)
    inputs = check_inputs(means, quats, scales, None, opacities, None, viewmats, Ks, backgrounds, settings, network)
    check_postprocess(postprocess, network.n_channels, settings)
    check_max_memory(max_memory)
    return render_call(inputs, settings, packed, postprocess, network, network_input, max_memory)


def rasterize_colored(
    means: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    scales: Tensor,  # [N, 3]
    opacities: Tensor,  # [N]
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    backgrounds: Tensor | None,  # [C, D] or [C, H, W, D]
    width: int,
    height: int,
    color_stage: ColorStage | None,
    *,
    colors: Tensor | None = None,  # without color_stage: [(C,) N, D] or [(C,) N, K, 3]
    sh_degree: int | None = None,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    render_mode: str = "RGB",
    rasterize_mode: str = "classic",
    alpha_cap: float = 0.999,
    packed: bool = True,
    postprocess: PostProcess | None = None,
    max_memory: int | None = None,
) -> tuple[Tensor, Tensor, Meta]:
    """As `rasterization` by backend "rapfast", differentiably, with the visible pairs coloured by ``color_stage`` or
    from ``colors``. Where meta is dense, ``meta.means2d_of_views`` are the rows of its means2d, one tensor a view, and
    of the graph as well."""
    settings = check_settings(
        width, height, near_plane, far_plane, radius_clip, eps2d, sh_degree, render_mode, rasterize_mode, "pinhole",
        alpha_cap,
    )  # fmt: skip
    check.flag("packed", packed)
    given = means, quats, scales, None, opacities, colors, viewmats, Ks, backgrounds
    inputs = check_inputs(*given, settings, color_stage)
    check_postprocess(postprocess, color_stage.n_channels if color_stage else colors.shape[-1], settings)
    if check_max_memory(max_memory) is not None:
        raise NotImplementedError(
            f"max_memory={max_memory} is not supported where a gradient is wanted, nor inside torch.compile"
        )
    draw = render_call_with_grad
    if means.device.type == "cuda":
        require_cuda(means)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a gradient is wanted, for which a count is read back, and nothing can be while a CUDA graph is "
                "captured: capture under torch.no_grad(), or call outside of the capture"
            )
        if torch.compiler.is_compiling():
            # How much room a network's call takes a compiler cannot know: there is a break in the graph around it.
            draw = uncompiled(draw)
    return draw(inputs, settings, packed, postprocess, False, False, color_stage, by_view=not packed)


def _gsplat(
    inputs: Inputs, s: Settings, packed: bool, sparse_grad: bool, absgrad: bool, channel_chunk: int,
    segmented: bool, postprocess: PostProcess | None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    if inputs.means.device.type != "cuda":
        raise ValueError(
            f'means must be on a CUDA device with backend="gsplat", got {check.describe(inputs.means)}: '
            'the "rapfast" and "reference" backends run on the CPU'
        )
    if postprocess is not None:
        raise NotImplementedError('postprocess is not supported by backend="gsplat": use "rapfast" or "reference"')
    if s.alpha_cap != 0.999:
        raise NotImplementedError(f'alpha_cap={s.alpha_cap} is not supported by backend="gsplat", which has 0.999')
    if inputs.backgrounds is not None and inputs.backgrounds.dim() != inputs.Ks.dim() - 1:
        raise NotImplementedError('backgrounds as images are not supported by backend="gsplat": use "rapfast"')
    if inputs.backgrounds is not None and packed:
        raise NotImplementedError('backgrounds with packed=True are not supported by backend="gsplat" (it asserts)')
    try:
        gsplat = importlib.import_module("gsplat")
    except ImportError as error:
        raise ImportError(
            f"backend=\"gsplat\" needs gsplat ({error}): pip install 'rapfast[bench]' installs the version "
            "rapfast is compared with"
        ) from error
    return gsplat.rasterization(
        means=inputs.means,
        quats=inputs.quats,
        scales=inputs.scales,
        opacities=inputs.opacities,
        colors=inputs.colors,
        viewmats=inputs.viewmats,
        Ks=inputs.Ks,
        width=s.width,
        height=s.height,
        near_plane=s.near_plane,
        far_plane=s.far_plane,
        radius_clip=s.radius_clip,
        eps2d=s.eps2d,
        sh_degree=s.sh_degree,
        packed=packed,
        backgrounds=inputs.backgrounds,
        render_mode=s.render_mode,
        sparse_grad=sparse_grad,
        absgrad=absgrad,
        rasterize_mode="antialiased" if s.antialiased else "classic",
        channel_chunk=channel_chunk,
        camera_model=s.camera_model,
        segmented=segmented,
        covars=inputs.covars,
    )
