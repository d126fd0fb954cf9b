"""What `rasterization` is given, checked: options, and tensors that fit each other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rapfast import _check as check
from rapfast import ops
from rapfast.ops.autograd import ColorStage
from rapfast.ops.project import CAMERA_MODELS
from rapfast.postprocess import PostProcess

RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
BACKENDS = ("rapfast", "gsplat", "reference")
MAX_SH_DEGREE = 4


class Settings(NamedTuple):
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


class Inputs(NamedTuple):
    means: Tensor
    quats: Tensor | None
    scales: Tensor | None
    covars: Tensor | None
    opacities: Tensor
    colors: Tensor | None  # None: a network's
    viewmats: Tensor
    Ks: Tensor
    backgrounds: Tensor | None


def check_options(
    width: Any, height: Any, near_plane: Any, far_plane: Any, radius_clip: Any, eps2d: Any, sh_degree: Any, packed: Any,
    tile_size: Any, render_mode: Any, sparse_grad: Any, absgrad: Any, rasterize_mode: Any, channel_chunk: Any,
    distributed: Any, camera_model: Any, segmented: Any, with_ut: Any, with_eval3d: Any, radial_coeffs: Any,
    tangential_coeffs: Any, thin_prism_coeffs: Any, ftheta_coeffs: Any, rolling_shutter: Any, viewmats_rs: Any,
    backend: Any, alpha_cap: Any,
) -> Settings:  # fmt: skip
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
    return check_settings(
        width, height, near_plane, far_plane, radius_clip, eps2d, sh_degree, render_mode, rasterize_mode, camera_model,
        alpha_cap,
    )  # fmt: skip


check_options_once = lru_cache(maxsize=256, typed=True)(check_options)
PLAIN_TYPES = frozenset({int, float, bool, str, type(None)})
"""Types whose values cannot change behind `check_options_once`."""


def check_settings(
    width: Any, height: Any, near_plane: Any, far_plane: Any, radius_clip: Any, eps2d: Any, sh_degree: Any,
    render_mode: Any, rasterize_mode: Any, camera_model: Any, alpha_cap: Any,
) -> Settings:  # fmt: skip
    settings = Settings(
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


def check_inputs(
    means: Any, quats: Any, scales: Any, covars: Any, opacities: Any, colors: Any, viewmats: Any, Ks: Any,
    backgrounds: Any, s: Settings, network: ops.Network | ColorStage | None = None,
) -> Inputs:  # fmt: skip
    if covars is None and backgrounds is None and network is None:
        inputs = Inputs(means, quats, scales, None, opacities, colors, viewmats, Ks, None)
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
        d = color_channels(colors, network) if s.render_mode not in ("D", "ED") else "D"
        backgrounds = like_means("backgrounds", backgrounds, (c, d), (c, s.height, s.width, d))
    return Inputs(means, quats, scales, covars, opacities, colors, viewmats, Ks, backgrounds)


def check_max_memory(max_memory: Any) -> int | None:
    return None if max_memory is None else check.integer("max_memory", max_memory, 1, 1 << 62, " bytes")


def _fit_at_a_glance(inputs: Inputs, sh_degree: int | None) -> bool:
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


def color_channels(colors: Tensor | None, network: ops.Network | ColorStage | None) -> int:
    return colors.shape[-1] if network is None else network.n_channels


def check_postprocess(postprocess: PostProcess | None, n_channels: int, s: Settings) -> None:
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
