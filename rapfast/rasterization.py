"""``rasterization``: gsplat's call, rendered by rapfast."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rapfast import _check as check
from rapfast import ops, reference
from rapfast.meta import Meta, build_meta
from rapfast.ops import split
from rapfast.ops._library import native
from rapfast.ops.autograd import ColorStage
from rapfast.ops.composite import PIXEL_TYPES, output_tensors
from rapfast.ops.project import CAMERA_MODELS
from rapfast.ops.render import Rendered
from rapfast.postprocess import PostProcess
from rapfast.profiling import section

RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
BACKENDS = ("rapfast", "gsplat", "reference")
MAX_SH_DEGREE = 4

_NOTHING_ASKED = None, PostProcess()

_COMFORTABLE = 3 << 29  # bytes of GPU memory: larger batches are rendered in groups, which costs a few per cent of time


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
            one scene given to all by ``expand`` are read where they are; any other tensor is made contiguous.
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
    plain = _PLAIN_TYPES.issuperset(map(type, options)) and not torch.compiler.is_compiling()
    settings = _check_options_once(*options) if plain else _check_options(*options)
    inputs = _check_inputs(means, quats, scales, covars, opacities, colors, viewmats, Ks, backgrounds, settings)
    if sparse_grad:
        if not packed:
            raise ValueError("sparse_grad must be False with packed=False, got True")
        if means.dim() != 2:
            raise ValueError(f"sparse_grad must be False with leading batch dimensions, got means {list(means.shape)}")
    _check_postprocess(postprocess, colors.shape[-1], settings)
    if _check_max_memory(max_memory) is not None and backend != "rapfast":
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
    return _rapfast(inputs, settings, packed, postprocess, max_memory=max_memory, **gradients)


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
    settings = _check_settings(
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
    inputs = _check_inputs(means, quats, scales, None, opacities, None, viewmats, Ks, backgrounds, settings, network)
    _check_postprocess(postprocess, network.n_channels, settings)
    _check_max_memory(max_memory)
    return _rapfast(inputs, settings, packed, postprocess, network, network_input, max_memory)


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
    settings = _check_settings(
        width, height, near_plane, far_plane, radius_clip, eps2d, sh_degree, render_mode, rasterize_mode, "pinhole",
        alpha_cap,
    )  # fmt: skip
    check.flag("packed", packed)
    given = means, quats, scales, None, opacities, colors, viewmats, Ks, backgrounds
    inputs = _check_inputs(*given, settings, color_stage)
    _check_postprocess(postprocess, color_stage.n_channels if color_stage else colors.shape[-1], settings)
    if _check_max_memory(max_memory) is not None:
        raise NotImplementedError(
            f"max_memory={max_memory} is not supported where a gradient is wanted, nor inside torch.compile"
        )
    if means.device.type == "cuda":
        require_cuda(means)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a gradient is wanted, for which a count is read back, and nothing can be while a CUDA graph is "
                "captured: capture under torch.no_grad(), or call outside of the capture"
            )
        return _colored_on_gpu(inputs, settings, packed, postprocess, color_stage)
    return _with_grad(inputs, settings, packed, postprocess, False, False, color_stage, by_view=not packed)


@torch.compiler.disable
def _colored_on_gpu(
    inputs: _Inputs, s: _Settings, packed: bool, postprocess: PostProcess | None, color_stage: ColorStage | None
) -> tuple[Tensor, Tensor, Meta]:
    """Of a network's call a compiler cannot know how much room it takes: there is a break in the graph around it."""
    return _with_grad(inputs, s, packed, postprocess, False, False, color_stage, by_view=not packed)


class _Settings(NamedTuple):
    width: int
    height: int
    near_plane: float
    far_plane: float
    radius_clip: float
    eps2d: float
    sh_degree: int | None
    render_mode: str
    antialiased: bool
    camera_model: str
    alpha_cap: float


class _Inputs(NamedTuple):
    means: Tensor
    quats: Tensor | None
    scales: Tensor | None
    covars: Tensor | None
    opacities: Tensor
    colors: Tensor | None  # None: a network's
    viewmats: Tensor
    Ks: Tensor
    backgrounds: Tensor | None


def _check_options(
    width: Any, height: Any, near_plane: Any, far_plane: Any, radius_clip: Any, eps2d: Any, sh_degree: Any, packed: Any,
    tile_size: Any, render_mode: Any, sparse_grad: Any, absgrad: Any, rasterize_mode: Any, channel_chunk: Any,
    distributed: Any, camera_model: Any, segmented: Any, with_ut: Any, with_eval3d: Any, radial_coeffs: Any,
    tangential_coeffs: Any, thin_prism_coeffs: Any, ftheta_coeffs: Any, rolling_shutter: Any, viewmats_rs: Any,
    backend: Any, alpha_cap: Any,
) -> _Settings:  # fmt: skip
    """Checks all arguments of `rasterization` that are neither tensors nor ``postprocess``."""
    _refuse_unsupported(
        tile_size=(tile_size, tile_size == 16),
        distributed=(distributed, distributed is False),
        with_ut=(with_ut, with_ut is False),
        with_eval3d=(with_eval3d, with_eval3d is False),
        radial_coeffs=(radial_coeffs, radial_coeffs is None),
        tangential_coeffs=(tangential_coeffs, tangential_coeffs is None),
        thin_prism_coeffs=(thin_prism_coeffs, thin_prism_coeffs is None),
        ftheta_coeffs=(ftheta_coeffs, ftheta_coeffs is None),
        rolling_shutter=(rolling_shutter, getattr(rolling_shutter, "name", rolling_shutter) in (None, "GLOBAL")),
        viewmats_rs=(viewmats_rs, viewmats_rs is None),
        camera_model=(camera_model, camera_model != "ftheta"),
    )
    check.choice("backend", backend, BACKENDS)
    check.integer("channel_chunk", channel_chunk, 1, 1 << 31)
    check.flag("segmented", segmented)
    check.flag("absgrad", absgrad)
    check.flag("packed", packed)
    check.flag("sparse_grad", sparse_grad)
    return _check_settings(
        width, height, near_plane, far_plane, radius_clip, eps2d, sh_degree, render_mode, rasterize_mode, camera_model,
        alpha_cap,
    )  # fmt: skip


_check_options_once = lru_cache(maxsize=256, typed=True)(_check_options)
_PLAIN_TYPES = frozenset({int, float, bool, str, type(None)})
"""Types whose values cannot change behind `_check_options_once`."""


def _check_settings(
    width: Any, height: Any, near_plane: Any, far_plane: Any, radius_clip: Any, eps2d: Any, sh_degree: Any,
    render_mode: Any, rasterize_mode: Any, camera_model: Any, alpha_cap: Any,
) -> _Settings:  # fmt: skip
    settings = _Settings(
        width=check.integer("width", width, 1, check.MAX_IMAGE_SIZE, " pixels"),
        height=check.integer("height", height, 1, check.MAX_IMAGE_SIZE, " pixels"),
        near_plane=check.number("near_plane", near_plane, what="a depth"),
        far_plane=check.number("far_plane", far_plane, what="a depth"),
        radius_clip=check.number("radius_clip", radius_clip, 0.0, what="a radius of at least 0 pixels"),
        eps2d=check.number("eps2d", eps2d, 0.0, 1e15, what="a variance of at least 0 pixels^2"),
        sh_degree=None if sh_degree is None else check.integer("sh_degree", sh_degree, 0, MAX_SH_DEGREE),
        render_mode=check.choice("render_mode", render_mode, RENDER_MODES),
        antialiased=check.choice("rasterize_mode", rasterize_mode, ("classic", "antialiased")) == "antialiased",
        camera_model=check.choice("camera_model", camera_model, tuple(CAMERA_MODELS)),
        alpha_cap=check.number("alpha_cap", alpha_cap, 1.0 / 255.0, what="above 1/255 and below 1"),
    )
    if settings.alpha_cap >= 1.0:
        raise ValueError(f"alpha_cap must be above 1/255 and below 1, got {alpha_cap}")
    if settings.near_plane > settings.far_plane:
        raise ValueError(f"near_plane must not exceed far_plane, got {near_plane} and {far_plane}")
    return settings


def _refuse_unsupported(**arguments: tuple[Any, bool]) -> None:
    for name, (value, supported) in arguments.items():
        if not supported:
            shown = check.describe(value) if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{name}={shown} is not supported by rapfast: gsplat.rasterization has it")


def _check_inputs(
    means: Any, quats: Any, scales: Any, covars: Any, opacities: Any, colors: Any, viewmats: Any, Ks: Any,
    backgrounds: Any, s: _Settings, network: ops.Network | ColorStage | None = None,
) -> _Inputs:  # fmt: skip
    if covars is None and backgrounds is None and network is None:
        inputs = _Inputs(means, quats, scales, None, opacities, colors, viewmats, Ks, None)
        if _fit_at_a_glance(inputs, s.sh_degree):
            return inputs
    check.floating_tensor("means", means, "[..., N, 3]")
    if means.dim() < 2 or means.shape[-1] != 3:
        raise ValueError(f"means must be [..., N, 3], got {check.describe(means)}")
    batch, n = tuple(means.shape[:-2]), means.shape[-2]
    if n >= 1 << 31:
        raise ValueError(f"means must hold fewer than 2^31 Gaussians, got {n}")

    def like_means(name: str, value: Any, *shapes: tuple[Any, ...]) -> Tensor:
        return check.tensor_like(name, value, [batch + shape for shape in shapes], means, "means")

    if covars is not None:
        covars, quats, scales = like_means("covars", covars, (n, 3, 3)), None, None
    else:
        quats = like_means("quats", quats, (n, 4))
        scales = like_means("scales", scales, (n, 3))
    opacities = like_means("opacities", opacities, (n,))
    viewmats = like_means("viewmats", viewmats, ("C", 4, 4))
    c = viewmats.shape[-3]
    Ks = like_means("Ks", Ks, (c, 3, 3))
    if network is not None:
        pass  # there are no colours
    elif s.sh_degree is None:
        colors = like_means("colors", colors, (n, "D"), (c, n, "D"))
        if colors.shape[-1] < 1:
            raise ValueError(f"colors must have at least one channel, got {check.describe(colors)}")
    else:
        colors = like_means("colors", colors, (n, "K", 3), (c, n, "K", 3))
        needed = (s.sh_degree + 1) ** 2
        if colors.shape[-2] < needed:
            raise ValueError(
                f"colors must hold at least K = {needed} coefficients for sh_degree {s.sh_degree}, "
                f"got {check.describe(colors)}"
            )
    if backgrounds is not None:
        # Depth has background 0, so where there are no colours any number of channels will do, as in gsplat.
        d = _color_channels(colors, network) if s.render_mode not in ("D", "ED") else "D"
        backgrounds = like_means("backgrounds", backgrounds, (c, d), (c, s.height, s.width, d))
    return _Inputs(means, quats, scales, covars, opacities, colors, viewmats, Ks, backgrounds)


def _check_max_memory(max_memory: Any) -> int | None:
    return None if max_memory is None else check.integer("max_memory", max_memory, 1, 1 << 62, " bytes")


def _fit_at_a_glance(inputs: _Inputs, sh_degree: int | None) -> bool:
    """Whether these are right and of the commonest form: one scene, quats and scales, colours shared by the cameras,
    no background. False says nothing; True saves the checks that can tell what is wrong, which take five times as
    long."""
    means, quats, scales, _, opacities, colors, viewmats, Ks, _ = inputs
    if not isinstance(means, Tensor) or means.dim() != 2:
        return False
    dtype, device, n = means.dtype, means.device, means.shape[0]
    if dtype is not torch.float32 and dtype is not torch.float64:
        return False
    for tensor in (means, quats, scales, opacities, colors, viewmats, Ks):
        if not (
            isinstance(tensor, Tensor)
            and tensor.dtype is dtype
            and tensor.device == device
            and tensor.layout is torch.strided
        ):
            return False
    c, color_shape = viewmats.shape[0] if viewmats.dim() else 0, colors.shape
    if sh_degree is None:
        fits = len(color_shape) == 2 and color_shape[0] == n and color_shape[1] >= 1
    else:
        fits = len(color_shape) == 3 and color_shape[::2] == (n, 3) and color_shape[1] >= (sh_degree + 1) ** 2
    return (
        fits
        and means.shape == (n, 3)
        and quats.shape == (n, 4)
        and scales.shape == (n, 3)
        and opacities.shape == (n,)
        and viewmats.shape == (c, 4, 4)
        and Ks.shape == (c, 3, 3)
        and n < 1 << 31
    )


def _color_channels(colors: Tensor | None, network: ops.Network | ColorStage | None) -> int:
    return colors.shape[-1] if network is None else network.n_channels


def _check_postprocess(postprocess: PostProcess | None, n_channels: int, s: _Settings) -> None:
    if postprocess is None:
        return
    if not isinstance(postprocess, PostProcess):
        raise TypeError(f"postprocess must be a rapfast.PostProcess or None, got {check.describe(postprocess)}")
    n_colors = 0 if s.render_mode in ("D", "ED") else n_channels
    for name in ("mean", "std"):
        value = getattr(postprocess, name)
        if value is not None and len(value) != n_colors:
            raise ValueError(
                f"postprocess.{name} must have one number per colour channel ({n_colors} in render_mode "
                f"{s.render_mode}), got {len(value)}"
            )
    if postprocess.dtype == torch.uint8 and s.render_mode != "RGB":
        raise ValueError(f"postprocess.dtype uint8 holds colours alone, got render_mode {s.render_mode}")


def _rapfast(
    inputs: _Inputs, s: _Settings, packed: bool, postprocess: PostProcess | None,
    network: ops.Network | None = None, network_input: ops.NetworkInput | None = None, max_memory: int | None = None,
    *, absgrad: bool = False, sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Meta]:  # fmt: skip
    device = inputs.means.device
    if forward_ad._current_level >= 0:
        _refuse_tangents(inputs)
    # A compiler takes this way without gradients too: no size is read on it.
    is_traced = torch.compiler.is_compiling() and network is None
    if torch.is_grad_enabled() or is_traced:
        if device.type not in ("cpu", "cuda") or network is not None:
            refuse_gradients(inputs)
        elif is_traced or any(x is not None and x.requires_grad for x in inputs):
            if max_memory is not None:
                raise NotImplementedError(
                    f"max_memory={max_memory} is not supported where a gradient is wanted"
                    + (", nor inside torch.compile" if is_traced else f": {_first_wanted(inputs)} requires one")
                )
            if device.type == "cuda":
                require_cuda(inputs.means)
                if not is_traced and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        f"{_first_wanted(inputs)} requires a gradient, for which a count is read back, and nothing can "
                        "be while a CUDA graph is captured: capture under torch.no_grad(), or call outside of the "
                        "capture"
                    )
            if absgrad and torch.compiler.is_compiling():
                raise NotImplementedError("absgrad must be False inside torch.compile, which cannot trace it, got True")
            if sparse_grad and is_traced and device.type == "cuda":
                raise NotImplementedError(
                    "sparse_grad must be False inside torch.compile on a GPU, where it cannot be traced, got True"
                )
            return _with_grad(inputs, s, packed, postprocess, absgrad, sparse_grad)
    if device.type == "cuda":
        require_cuda(inputs.means)
    elif device.type != "cpu":
        raise NotImplementedError(f"means must be on a CPU or CUDA device, got {check.describe(inputs.means)}")
    if device.type == "cuda" and max_memory is None:
        try:
            return _at_once(inputs, s, packed, postprocess, network, network_input)
        except split.TooLarge:
            if torch.cuda.is_current_stream_capturing():  # what a split call needs is not known without a look
                raise
    projection = {
        "camera_model": s.camera_model, "antialiased": s.antialiased, "eps2d": s.eps2d, "near_plane": s.near_plane,
        "far_plane": s.far_plane, "radius_clip": s.radius_clip,
    }  # fmt: skip
    batch_dims, n, c = tuple(inputs.means.shape[:-2]), inputs.means.shape[-2], inputs.viewmats.shape[-3]
    n_batch_dims = len(batch_dims)

    def flat(tensor: Tensor | None) -> Tensor | None:
        """Leading batch dimensions as one, in memory order."""
        if tensor is None:
            return None
        if tensor.requires_grad:
            tensor = tensor.detach()
        return tensor.reshape(tensor.shape[:n_batch_dims].numel(), *tensor.shape[n_batch_dims:]).contiguous()

    inputs = inputs._replace(colors=_shared(inputs.colors, batch_dims, s))
    means, quats, scales, covars, opacities, colors, viewmats, Ks, backgrounds = map(flat, inputs)
    if backgrounds is not None:
        backgrounds = backgrounds.flatten(0, 1)
    has_colors = s.render_mode not in ("D", "ED")
    views = split.Inputs(
        means, quats, scales, covars, opacities, colors, viewmats, Ks, backgrounds if has_colors else None,
        per_camera=colors is not None and colors.dim() == (4 if s.sh_degree is None else 5),
        network_input=network_input,
    )  # fmt: skip
    n_color_channels = _color_channels(colors, network) if has_colors else 0

    def finish(part: split.Inputs, blended: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        with section("composite"):
            return ops.composite(
                blended,
                alphas,
                n_color_channels=n_color_channels,
                backgrounds=part.backgrounds,
                expected_depth=s.render_mode.endswith("ED"),
                postprocess=postprocess,
            )

    output_bytes, blended_bytes = _view_bytes(means, n_color_channels, s, postprocess)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"max_memory must be None while a CUDA graph is captured, got {max_memory}: how much room a group of "
                "views needs cannot be read back there"
            )
        rendering = {**projection, "sh_degree": s.sh_degree, "alpha_cap": s.alpha_cap, "network": network}
        channels_first = postprocess is not None and postprocess.layout == "CHW"

        def whole(part: split.Inputs, out: tuple[Tensor, Tensor] | None, max_bytes: int | None) -> split.Views:
            if out is not None and channels_first:
                out = out[0], out[1].movedim(1, -1)  # as the stages write them
            rendered = ops.render(
                *part[:9], s.width, s.height, **rendering, render_mode=s.render_mode, postprocess=postprocess,
                network_input=part.network_input, out=out, max_bytes=max_bytes,
            )  # fmt: skip
            return _kept(rendered)

        def band(part: split.Inputs, rows: tuple[int, int], max_bytes: int | None) -> split.Views:
            # expected depth is the depth's sum until the view is finished
            rendered = ops.render(
                *part[:8], None, s.width, s.height, **rendering, render_mode=s.render_mode.replace("ED", "D"),
                network_input=part.network_input, tile_rows=rows, max_bytes=max_bytes,
            )  # fmt: skip
            return _kept(rendered)

        def make_outputs(n_views: int) -> tuple[Tensor, Tensor]:
            return _outputs(means, n_views, n_color_channels, s, postprocess)

        renderer = split.Renderer(
            whole, band, finish, output_bytes, blended_bytes, make_outputs=make_outputs, comfortable=_COMFORTABLE
        )
    else:
        is_finished = views.backgrounds is None and not s.render_mode.endswith("ED") and postprocess in _NOTHING_ASKED
        pixel_bytes = blended_bytes + (0 if is_finished else output_bytes)

        def whole(part: split.Inputs, out: tuple[Tensor, Tensor] | None, max_bytes: int | None) -> split.Views:
            return _cpu_views(part, s, projection, network, finish, pixel_bytes, max_bytes)

        renderer = split.Renderer(whole, None, finish, output_bytes, blended_bytes)

    rendered = split.render(renderer, views, s.height, max_memory)
    images, alphas, n_invalid = rendered.images, rendered.alphas, rendered.n_invalid
    meta = build_meta(rendered.make_records, lambda: n_invalid, batch_dims, c, n, s.width, s.height, packed)
    return images.reshape(*batch_dims, c, *images.shape[1:]), alphas.reshape(*batch_dims, c, *alphas.shape[1:]), meta


def _first_wanted(inputs: _Inputs) -> str:
    return next(name for name, x in inputs._asdict().items() if x is not None and x.requires_grad)


_BUILT_WITH_CUDA = native.build_info()["cuda"] is not None


def _with_grad(
    inputs: _Inputs, s: _Settings, packed: bool, postprocess: PostProcess | None, absgrad: bool, sparse_grad: bool,
    color_stage: ColorStage | None = None, by_view: bool = False,
) -> tuple[Tensor, Tensor, Meta]:  # fmt: skip
    """The call where an input requires a gradient: the same pixels, with a graph behind them."""
    device = inputs.means.device.type
    # To turn nothing off takes as long as a launch.
    is_on = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if is_on else contextlib.nullcontext():
        drawn = ops.render_with_grad(
            **inputs._asdict(), width=s.width, height=s.height, camera_model=s.camera_model, antialiased=s.antialiased,
            eps2d=s.eps2d, near_plane=s.near_plane, far_plane=s.far_plane, radius_clip=s.radius_clip,
            sh_degree=s.sh_degree, render_mode=s.render_mode, alpha_cap=s.alpha_cap, postprocess=postprocess,
            packed=packed, absgrad=absgrad, sparse_grad=sparse_grad, color_stage=color_stage, by_view=by_view,
        )  # fmt: skip
    batch_dims, n, c = tuple(inputs.means.shape[:-2]), inputs.means.shape[-2], inputs.viewmats.shape[-3]
    meta = build_meta(
        drawn.make_records, drawn.make_n_invalid, batch_dims, c, n, s.width, s.height, packed,
        make_means2d=drawn.make_means2d,
    )  # fmt: skip
    meta.means2d_of_views = drawn.means2d_of_views
    images, alphas = drawn.images, drawn.alphas
    if batch_dims:
        images, alphas = (x.reshape(*batch_dims, c, *x.shape[1:]) for x in (images, alphas))
    return images, alphas, meta


def refuse_gradients(inputs: _Inputs) -> None:
    """Raises where a gradient is wanted of an input; for callers under torch.enable_grad."""
    for name, tensor in zip(inputs._fields, inputs, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                f"{name} requires a gradient, which rapfast.rasterization has, but this call has not: "
                'call under torch.no_grad() for the image alone, or use backend="gsplat" (on a GPU) or '
                'backend="reference" for gradients'
            )


def _refuse_tangents(inputs: _Inputs) -> None:
    """Raises where an input carries a tangent of forward-mode differentiation, which the kernels would drop."""
    for name, tensor in zip(inputs._fields, inputs, strict=True):
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a tangent of forward-mode differentiation, which rapfast does not have: use "
                'backend="reference"'
            )


def _at_once(
    inputs: _Inputs, s: _Settings, packed: bool, postprocess: PostProcess | None, network: ops.Network | None,
    network_input: ops.NetworkInput | None,
) -> tuple[Tensor, Tensor, Meta]:  # fmt: skip
    """All views in one native call on a GPU, with little before its first launch.

    Raises: TooLarge where they must be split, or should be: many views together are no faster than groups of them.
    """
    means, viewmats = inputs.means, inputs.viewmats
    batch_dims, n, c = means.shape[:-2], means.shape[-2], viewmats.shape[-3]
    if batch_dims:
        inputs = inputs._replace(colors=_shared(inputs.colors, batch_dims, s))
    means, quats, scales, covars, opacities, colors, viewmats, Ks, backgrounds = [
        t if t is None or t.is_contiguous() else t.contiguous() for t in inputs
    ]
    if backgrounds is not None and batch_dims:
        backgrounds = backgrounds.flatten(0, len(batch_dims))
    many = batch_dims.numel() * c > split.TOGETHER and not torch.cuda.is_current_stream_capturing()
    rendered = ops.render(
        means, quats, scales, covars, opacities, colors, viewmats, Ks, backgrounds, s.width, s.height,
        camera_model=s.camera_model, antialiased=s.antialiased, eps2d=s.eps2d, near_plane=s.near_plane,
        far_plane=s.far_plane, radius_clip=s.radius_clip, sh_degree=s.sh_degree, render_mode=s.render_mode,
        alpha_cap=s.alpha_cap, postprocess=postprocess, network=network, network_input=network_input,
        max_bytes=_COMFORTABLE if many else None,
    )  # fmt: skip
    images, alphas = rendered.images, rendered.alphas

    def make_records() -> ops.Records:
        return ops.state_records(rendered)

    make_overflowed = None
    if rendered.n_records < 0:  # captured in a CUDA graph: each replay writes the state anew

        def make_n_invalid() -> Tensor:
            return rendered.n_invalid

        def make_overflowed() -> Tensor:
            return rendered.status[2]

    else:

        def make_n_invalid() -> Tensor:
            # The stream that reads may not be the one that rendered, whose allocator would hand the state on.
            rendered.state.record_stream(torch.cuda.current_stream(rendered.state.device))
            return rendered.n_invalid.clone()

    meta = build_meta(make_records, make_n_invalid, batch_dims, c, n, s.width, s.height, packed, make_overflowed)
    if batch_dims:
        images, alphas = (x.reshape(*batch_dims, c, *x.shape[1:]) for x in (images, alphas))
    return images, alphas, meta


def _shared(colors: Tensor | None, batch_dims: Sequence[int], s: _Settings) -> Tensor | None:
    """Colours that are one scene's memory, expanded over all scenes, as that scene's, [1 ..., N, ...]: the stages take
    them so, and no copy is made for each scene. Others as they are."""
    if colors is None or math.prod(batch_dims) <= 1:
        return colors
    per_camera = colors.dim() - len(batch_dims) == (3 if s.sh_degree is None else 4)
    strides = colors.stride()[: len(batch_dims)]
    if per_camera or any(stride != 0 for stride, size in zip(strides, batch_dims, strict=True) if size > 1):
        return colors
    return colors[(slice(0, 1),) * len(batch_dims)]


def _kept(rendered: Rendered) -> split.Views:
    # meta outlives the images: it must not hold them
    make_records = partial(ops.state_records, rendered._replace(images=None, alphas=None))
    return split.Views(rendered.images, rendered.alphas, rendered.n_invalid, make_records, rendered.state.nbytes)


def _cpu_views(
    part: split.Inputs, s: _Settings, projection: dict[str, Any], network: ops.Network | None,
    finish: Callable[[split.Inputs, Tensor, Tensor], tuple[Tensor, Tensor]], pixel_bytes: int, max_bytes: int | None,
) -> split.Views:  # fmt: skip
    """Some views by the stages on the CPU. What they would take is known after the first ones, which take little.
    ``pixel_bytes`` is what the blend and ``finish`` make of one view."""
    means, viewmats = part.means, part.viewmats
    size = s.width, s.height
    with section("project"):
        projected = ops.project(
            means, part.quats, part.scales, part.covars, part.opacities, viewmats, part.Ks, *size, **projection
        )
    n_kept = sum(tensor.nbytes for tensor in projected)
    has_colors = s.render_mode not in ("D", "ED")
    channels = (_color_channels(part.colors, network) if has_colors else 0) + (s.render_mode != "RGB")
    n_bytes = n_kept + means.itemsize * channels * len(projected.records) + part.n_images * pixel_bytes
    _fits(n_bytes, max_bytes)
    with section("color"):
        if network is not None and has_colors:
            record_colors = ops.color_net(
                means, viewmats, part.Ks, projected, *size, network, part.network_input, render_mode=s.render_mode
            )
        else:
            # of depth alone no colour is read
            given = means.new_empty((*means.shape[:2], 3)) if part.colors is None else part.colors
            record_colors = ops.color(
                means, viewmats, part.Ks, given, projected, *size, sh_degree=s.sh_degree, render_mode=s.render_mode
            )
    with section("bin"):
        tiles = ops.bin(projected, *size)
    _fits(n_bytes + sum(tensor.nbytes for tensor in tiles), max_bytes)
    with section("blend"):
        blended, alphas = ops.blend(projected, record_colors, tiles, *size, alpha_cap=s.alpha_cap)
    return split.Views(*finish(part, blended, alphas), projected.n_invalid, lambda: projected, n_kept)


def _fits(n_bytes: int, max_bytes: int | None) -> None:
    if max_bytes is not None and n_bytes > max_bytes:
        raise split.TooLarge(f"the views need {n_bytes} bytes, more than {max_bytes}", n_bytes)


def _view_bytes(means: Tensor, n_color_channels: int, s: _Settings, postprocess: PostProcess | None) -> tuple[int, int]:
    """Of one view's finished image and alpha, and of its blended colours and alpha."""
    post = postprocess or _NOTHING_ASKED[1]
    height, width = post.size or (s.height, s.width)
    item = means.itemsize if post.dtype is None else post.dtype.itemsize
    channels = n_color_channels + (s.render_mode != "RGB")
    blended = s.height * s.width * (channels + 1) * means.itemsize
    return height * width * (channels * item + means.itemsize), blended


def _outputs(
    means: Tensor, n_views: int, n_color_channels: int, s: _Settings, postprocess: PostProcess | None
) -> tuple[Tensor, Tensor]:
    """Uninitialised images and alphas of so many views."""
    post = postprocess or _NOTHING_ASKED[1]
    height, width = post.size or (s.height, s.width)
    channels = n_color_channels + (s.render_mode != "RGB")
    images, alphas = output_tensors(
        means.new_empty((n_views, 0, 0, channels)), height, width, post.layout == "CHW", PIXEL_TYPES[post.dtype]
    )
    return images, alphas.movedim(-1, 1) if post.layout == "CHW" else alphas


def require_cuda(means: Tensor) -> None:
    """Raises where ``means``, which lies on a CUDA device, cannot be rendered there."""
    if not _BUILT_WITH_CUDA:
        raise NotImplementedError(
            f"means must be on cpu, got {check.describe(means)}: this rapfast was built without CUDA. Install it where "
            "nvcc is found (RAPFAST_CUDA=1 pip install -e .), or move the tensors to the CPU"
        )
    if means.dtype != torch.float32:
        raise TypeError(f"means must be float32 on a CUDA device, got {check.describe(means)}: float64 runs on the CPU")


def _gsplat(
    inputs: _Inputs, s: _Settings, packed: bool, sparse_grad: bool, absgrad: bool, channel_chunk: int,
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
