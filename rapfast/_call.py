"""How a checked call is rendered: at once on a GPU, in groups of views where it must be, with a graph where a gradient
is wanted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rapfast import _check as check
from rapfast import ops
from rapfast._call_arguments import Inputs, Settings, color_channels
from rapfast.meta import Meta, build_meta
from rapfast.ops import split
from rapfast.ops._library import native
from rapfast.ops.autograd import ColorStage
from rapfast.ops.composite import PIXEL_TYPES, output_tensors
from rapfast.ops.state import Rendered
from rapfast.postprocess import PostProcess
from rapfast.profiling import section

_NOTHING_ASKED = None, PostProcess()

_COMFORTABLE = 3 << 29  # bytes of GPU memory: larger batches are rendered in groups, which costs a few per cent of time


def render_call(
    inputs: Inputs, s: Settings, packed: bool, postprocess: PostProcess | None,
    network: ops.Network | None = None, network_input: ops.NetworkInput | None = None, max_memory: int | None = None,
    *, absgrad: bool = False, sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Meta]:  # fmt: skip
    """Images, alphas and meta of a call by backend "rapfast"; colours are given, or (None) come from ``network``."""
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
            return render_call_with_grad(inputs, s, packed, postprocess, absgrad, sparse_grad)
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
    n_color_channels = color_channels(colors, network) if has_colors else 0

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


def _first_wanted(inputs: Inputs) -> str:
    return next(name for name, x in inputs._asdict().items() if x is not None and x.requires_grad)


_BUILT_WITH_CUDA = native.build_info()["cuda"] is not None


def render_call_with_grad(
    inputs: Inputs, s: Settings, packed: bool, postprocess: PostProcess | None, absgrad: bool, sparse_grad: bool,
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


def refuse_gradients(inputs: Inputs) -> None:
    """Raises where a gradient is wanted of an input; for callers under torch.enable_grad."""
    for name, tensor in zip(inputs._fields, inputs, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                f"{name} requires a gradient, which rapfast.rasterization has, but this call has not: "
                'call under torch.no_grad() for the image alone, or use backend="gsplat" (on a GPU) or '
                'backend="reference" for gradients'
            )


def _refuse_tangents(inputs: Inputs) -> None:
    """Raises where an input carries a tangent of forward-mode differentiation, which the kernels would drop."""
    for name, tensor in zip(inputs._fields, inputs, strict=True):
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a tangent of forward-mode differentiation, which rapfast does not have: use "
                'backend="reference"'
            )


def _at_once(
    inputs: Inputs, s: Settings, packed: bool, postprocess: PostProcess | None, network: ops.Network | None,
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


def _shared(colors: Tensor | None, batch_dims: Sequence[int], s: Settings) -> Tensor | None:
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
    part: split.Inputs, s: Settings, projection: dict[str, Any], network: ops.Network | None,
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
    channels = (color_channels(part.colors, network) if has_colors else 0) + (s.render_mode != "RGB")
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


def _view_bytes(means: Tensor, n_color_channels: int, s: Settings, postprocess: PostProcess | None) -> tuple[int, int]:
    """Of one view's finished image and alpha, and of its blended colours and alpha."""
    post = postprocess or _NOTHING_ASKED[1]
    height, width = post.size or (s.height, s.width)
    item = means.itemsize if post.dtype is None else post.dtype.itemsize
    channels = n_color_channels + (s.render_mode != "RGB")
    blended = s.height * s.width * (channels + 1) * means.itemsize
    return height * width * (channels * item + means.itemsize), blended


def _outputs(
    means: Tensor, n_views: int, n_color_channels: int, s: Settings, postprocess: PostProcess | None
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
