"""The stages as one differentiable call.

On the CPU four autograd functions, one a stage with a backward, pass each other what inference passes on: records,
their colours, images. Between project and blend there is one tensor more, ``means2d``, in the layout that ``meta``
shows: it is an output of the one and an input of the other, so that ``meta["means2d"].retain_grad()`` sees the gradient
that densification strategies read. The columns x and y of the records carry no gradient beside it.

On the GPU one native call draws what it draws in inference, and two functions stand for all of its stages but the last
(autograd_cuda.py).

What the CPU keeps from forward to backward: the inputs, the records with their colours and tile lists, and, where
composite has something to do, the blended images. Nothing is kept per pixel for the blend: its backward draws each tile
again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from rapfast.ops.autograd_cuda import (
    filled_means2d,
    front,
    kind_of,
    pixels,
    records_of,
    refuse_second_derivative,
    traced,
)
from rapfast.ops.bin import Tiles, bin
from rapfast.ops.blend import blend
from rapfast.ops.blend_bwd import blend_bwd
from rapfast.ops.color import DEPTH_CHANNELS, color
from rapfast.ops.color_bwd import color_bwd
from rapfast.ops.color_net import Network, NetworkInput
from rapfast.ops.composite import composite
from rapfast.ops.composite_bwd import composite_bwd
from rapfast.ops.project import CAMERA_MODELS, Records, image_ids, project
from rapfast.ops.project_bwd import project_bwd
from rapfast.ops.render import constants, is_watched, render
from rapfast.ops.render_bwd import ROW_COLOR, GaussianInputs
from rapfast.ops.state import state_records, state_rows
from rapfast.postprocess import PostProcess


class Drawn(NamedTuple):
    """What one differentiable call leaves."""

    images: Tensor  # [I, h, w, D] or [I, D, h, w]
    alphas: Tensor  # [I, h, w, 1] or [I, 1, h, w]
    make_means2d: Callable[[], Tensor]  # [M, 2], or dense [..., C, N, 2] with 0 where culled
    make_records: Callable[[], Records]  # its records are part of the graph too
    make_n_invalid: Callable[[], Tensor]  # [I]
    means2d_of_views: tuple[Tensor, ...] | None = None  # I of [N, 2], means2d's rows on the way to the blend


class ColorStage(Protocol):
    """Colours records by a network in place of the color stage, differentiably."""

    n_channels: int  # without depth

    def __call__(self, projected: Records) -> tuple[Tensor, Tensor, Tensor]:
        """On the CPU: the records' channels, depth last where the mode has it; the records, those that cannot be
        coloured taken out; and how many of each image could not be drawn."""

    def network(self) -> tuple[Network, NetworkInput]:
        """On the GPU: the network as a whole call runs it."""

    def link(self, gaussian_ids: Tensor, image_offsets: Tensor) -> Tensor:
        """On the GPU: [M, n_channels] what a whole call has given its records, without values: the way that gradients
        take."""


def render_with_grad(
    means: Tensor,  # [..., N, 3]
    quats: Tensor | None,  # [..., N, 4]
    scales: Tensor | None,  # [..., N, 3]
    covars: Tensor | None,  # [..., N, 3, 3]
    opacities: Tensor,  # [..., N]
    colors: Tensor | None,  # [..., (C,) N, D] or [..., (C,) N, K, 3]; None with color_stage
    viewmats: Tensor,  # [..., C, 4, 4]
    Ks: Tensor,  # [..., C, 3, 3]
    backgrounds: Tensor | None,  # [..., C, Dc] or [..., C, H, W, Dc]
    width: int,
    height: int,
    *,
    camera_model: str,
    antialiased: bool,
    eps2d: float,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    sh_degree: int | None,
    render_mode: str,
    alpha_cap: float,
    postprocess: PostProcess | None = None,
    packed: bool = True,
    absgrad: bool = False,
    sparse_grad: bool = False,
    color_stage: ColorStage | None = None,
    by_view: bool = False,
) -> Drawn:
    """Renders differentiably in every tensor. The same pixels as without a graph, to the last bit.

    With ``absgrad``, ``means2d.absgrad`` starts at 0 and every backward adds to it, pixel by pixel, the absolute
    value of that pixel's gradient. With ``sparse_grad``, for which there may be no batch dimensions, the gradients of
    means, quats, scales and covars are sparse (COO): rows of the Gaussians that some view sees. With ``by_view``, for
    which ``packed`` is False, each view's means2d is a tensor of its own as well.

    On the CPU gradients do not depend on the number of threads. On the GPU atomics add up what pixels give a record, in
    any order, unless `torch.use_deterministic_algorithms` is on. There is no second derivative.
    """
    batch = tuple(means.shape[:-2])
    n_scenes, n_cameras, n_gaussians = math.prod(batch), viewmats.shape[-3], means.shape[-2]
    dense_shape = None if packed else (*batch, n_cameras, n_gaussians, 2)
    has_colors = render_mode not in ("D", "ED")
    n_color_channels = 0 if not has_colors else color_stage.n_channels if color_stage else colors.shape[-1]
    expected_depth = render_mode.endswith("ED")
    visible = _Visible()
    if sparse_grad:
        means, quats, scales, covars = (
            None if x is None else _SparseGradient.apply(x, visible) for x in (means, quats, scales, covars)
        )
    if backgrounds is not None:
        backgrounds = backgrounds.reshape(-1, *backgrounds.shape[len(batch) + 1 :]) if has_colors else None

    def finished(images: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        if backgrounds is None and not expected_depth and postprocess in (None, PostProcess()):
            return images, alphas
        return _Composite.apply(
            images, alphas, None if backgrounds is None else backgrounds.contiguous(), n_color_channels, expected_depth,
            postprocess or PostProcess(),
        )  # fmt: skip

    if means.is_cuda:
        inputs = GaussianInputs(means, quats, scales, covars, opacities, colors, viewmats, Ks)
        return _render_cuda(
            inputs, width, height, dense_shape, finished, visible, near_plane=near_plane, far_plane=far_plane,
            radius_clip=radius_clip, absgrad=absgrad, sparse_grad=sparse_grad, color_stage=color_stage, by_view=by_view,
            camera_model=camera_model, antialiased=antialiased, eps2d=eps2d, sh_degree=sh_degree,
            render_mode=render_mode, alpha_cap=alpha_cap,
        )  # fmt: skip

    def flat(tensor: Tensor | None) -> Tensor | None:
        """Leading batch dimensions as one, in memory order."""
        return None if tensor is None else tensor.reshape(n_scenes, *tensor.shape[len(batch) :]).contiguous()

    means, quats, scales, covars, opacities, colors, viewmats, Ks = map(
        flat, (means, quats, scales, covars, opacities, colors, viewmats, Ks)
    )
    records, means2d, radii, gaussian_ids, image_offsets, n_invalid = _Project.apply(
        means, quats, scales, covars, opacities, viewmats, Ks, width, height,
        {
            "camera_model": camera_model, "antialiased": antialiased, "eps2d": eps2d, "near_plane": near_plane,
            "far_plane": far_plane, "radius_clip": radius_clip,
        },
        dense_shape,
    )  # fmt: skip
    visible.make_gaussian_ids = lambda: gaussian_ids
    if color_stage is None:
        record_colors, records, n_invalid = _Color.apply(
            means, viewmats, Ks, colors, records, radii, gaussian_ids, image_offsets, n_invalid, width, height,
            sh_degree, render_mode,
        )  # fmt: skip
    else:
        record_colors, records, n_invalid = color_stage(Records(records, radii, gaussian_ids, image_offsets, n_invalid))
    means2d, of_views = _by_view(means2d) if by_view else (means2d, None)
    projected = Records(records, radii, gaussian_ids, image_offsets, n_invalid)
    tiles = bin(projected._replace(records=records.detach()), width, height)
    if absgrad:
        means2d.absgrad = torch.zeros_like(means2d, requires_grad=False)
    images, alphas = _Blend.apply(
        means2d, records, record_colors, radii, gaussian_ids, image_offsets, n_invalid, *tiles, width, height,
        alpha_cap, means2d.absgrad if absgrad else None,
    )  # fmt: skip
    return Drawn(
        *finished(images, alphas), lambda: means2d, lambda: projected, lambda: projected.n_invalid, of_views
    )


def _render_cuda(
    inputs: GaussianInputs, width: int, height: int, dense_shape: tuple[int, ...] | None,
    finished: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], visible: _Visible, *, near_plane: float,
    far_plane: float, radius_clip: float, absgrad: bool, sparse_grad: bool, color_stage: ColorStage | None,
    by_view: bool, **form: Any,
) -> Drawn:  # fmt: skip
    """The call on the GPU. ``form`` are the named arguments of `kind_of`."""
    network = network_input = None
    if color_stage is not None:
        if form["render_mode"] not in ("D", "ED"):
            network, network_input = color_stage.network()
        # Of a network's colours the native backward knows the shape alone, or with depth alone nothing.
        means = inputs.means
        colors = means.new_empty(()).expand(*means.shape[:-1], color_stage.n_channels)
        inputs = inputs._replace(colors=colors)
    inputs = GaussianInputs(*[
        x if x is None or x.is_contiguous() or (x is inputs.colors and network is not None) else x.contiguous()
        for x in inputs
    ])  # fmt: skip
    form["render_mode"] = form["render_mode"].replace("ED", "D")
    kind = kind_of(inputs, width, height, packed=dense_shape is None, **form)
    # The Gaussians that some view sees are not known to a traced call.
    if network is None and not absgrad and not sparse_grad and not by_view and is_watched(inputs):
        images, alphas, means2d = traced(inputs, kind, dense_shape, near_plane, far_plane, radius_clip)
        return Drawn(*finished(images, alphas), lambda: means2d, _refuse_traced, _refuse_traced)
    with torch.no_grad():
        rendered = render(
            *inputs[:5], None if network is not None else inputs.colors, *inputs[6:], None, width, height,
            near_plane=near_plane, far_plane=far_plane, radius_clip=radius_clip, keep_state=True, network=network,
            network_input=network_input, **form,
        )  # fmt: skip
    found = front(rendered, inputs, kind, dense_shape)
    if network is not None:
        found = found._replace(link=_Linked.apply(found.link, color_stage.link(*state_rows(rendered))))
    means2d, of_views = found.means2d, None
    if by_view:
        means2d, of_views = _by_view(filled_means2d(found, rendered))
    of_pixels = torch.zeros_like(means2d, requires_grad=False) if absgrad else None
    if absgrad:
        means2d.absgrad = of_pixels
    images, alphas = finished(*pixels(found, rendered, means2d, of_pixels))
    rendered = rendered._replace(images=None, alphas=None)  # meta must not hold them

    def make_means2d() -> Tensor:
        return means2d if by_view else filled_means2d(found, rendered)

    def make_records() -> Records:
        return state_records(rendered, records_of(found, rendered))

    def make_n_invalid() -> Tensor:
        rendered.state.record_stream(torch.cuda.current_stream(rendered.state.device))
        return rendered.n_invalid.clone()

    visible.make_gaussian_ids = lambda: state_records(rendered).gaussian_ids
    return Drawn(images, alphas, make_means2d, make_records, make_n_invalid, of_views)


def _refuse_traced() -> Any:
    raise NotImplementedError(
        "of meta only means2d is there where a call on a GPU that wants gradients is traced, as torch.compile does: "
        "look at the rest outside of the compiled function, of a call of its own under torch.no_grad()"
    )


def _by_view(means2d: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Dense means2d, and its views' rows as tensors on the way to it, each with a gradient of its own."""
    of_views = means2d.flatten(0, -3).unbind()
    if not of_views:
        return means2d, ()
    return torch.stack(of_views).reshape(means2d.shape), of_views


def _first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses to make a graph of a backward: its gradients would look like constants to the next."""

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        refuse_second_derivative()
        return backward(ctx, *gradients)

    return checked


class _Linked(Function):
    """Ties what a network gives records [M, D] to the link of a whole call. Neither has values, both get gradients."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, colors: Tensor) -> Tensor:
        ctx.n_channels = colors.shape[1]
        return link.new_empty(()).expand(link.shape)

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows, rows[:, ROW_COLOR : ROW_COLOR + ctx.n_channels]


class _Visible:
    """The Gaussians that some view sees, known once they are projected."""

    make_gaussian_ids: Callable[[], Tensor]


class _SparseGradient(Function):
    """A parameter [N, ...] whose gradient has the rows of visible Gaussians alone."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, visible: _Visible) -> Tensor:
        ctx.visible = visible
        return parameter.view_as(parameter)

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = torch.unique(ctx.visible.make_gaussian_ids()).long()
        values = gradient.index_select(0, rows)
        return torch.sparse_coo_tensor(
            rows[None], values, gradient.shape, check_invariants=False, is_coalesced=True
        ), None


def _dense_rows(gaussian_ids: Tensor, image_offsets: Tensor, n_gaussians: int) -> Tensor:
    """[M] row of each record in tensors [I * N, ...]."""
    records = Records(gaussian_ids, gaussian_ids, gaussian_ids, image_offsets, image_offsets)
    return image_ids(records) * n_gaussians + gaussian_ids


class _Project(Function):
    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        quats: Tensor | None,
        scales: Tensor | None,
        covars: Tensor | None,
        opacities: Tensor,
        viewmats: Tensor,
        Ks: Tensor,
        width: int,
        height: int,
        options: dict[str, Any],
        dense_shape: tuple[int, ...] | None,
    ) -> tuple[Tensor, ...]:
        out = project(means, quats, scales, covars, opacities, viewmats, Ks, width, height, **options)
        xy = out.records[:, :2]
        if dense_shape is None:
            means2d = xy.clone()
        else:
            rows = _dense_rows(out.gaussian_ids, out.image_offsets, dense_shape[-2])
            means2d = xy.new_zeros(math.prod(dense_shape[:-1]), 2).index_copy_(0, rows, xy).reshape(dense_shape)
        ctx.save_for_backward(
            means, quats, scales, covars, opacities, viewmats, Ks, out.gaussian_ids, out.image_offsets
        )  # fmt: skip
        ctx.size, ctx.options, ctx.dense = (width, height), options, dense_shape is not None
        ctx.mark_non_differentiable(out.radii, out.gaussian_ids, out.image_offsets, out.n_invalid)
        return out.records, means2d, out.radii, out.gaussian_ids, out.image_offsets, out.n_invalid

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, v_records: Tensor, v_means2d: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gaussian_ids, image_offsets = ctx.saved_tensors
        n_images, n_gaussians = image_offsets.shape[0] - 1, inputs[0].shape[1]
        wanted = [x is not None and need for x, need in zip(inputs, ctx.needs_input_grad[:7], strict=True)]
        gradients = project_bwd(
            *inputs,
            gaussian_ids,
            image_offsets,
            v_records.contiguous(),
            v_means2d.reshape((n_images, n_gaussians, 2) if ctx.dense else (-1, 2)).contiguous(),
            *ctx.size,
            camera_model=CAMERA_MODELS[ctx.options["camera_model"]],
            antialiased=ctx.options["antialiased"],
            eps2d=ctx.options["eps2d"],
            wanted=wanted,
        )
        return *(v if want else None for v, want in zip(gradients, wanted, strict=True)), None, None, None, None


class _Color(Function):
    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        viewmats: Tensor,
        Ks: Tensor,
        colors: Tensor,
        records: Tensor,
        radii: Tensor,
        gaussian_ids: Tensor,
        image_offsets: Tensor,
        n_invalid: Tensor,
        width: int,
        height: int,
        sh_degree: int | None,
        render_mode: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The operator takes records whose colour is not finite out in place, which a graph allows of copies alone.
        out = Records(records.clone(), radii, gaussian_ids, image_offsets, n_invalid.clone())
        values = color(means, viewmats, Ks, colors, out, width, height, sh_degree=sh_degree, render_mode=render_mode)
        ctx.save_for_backward(means, viewmats, colors, gaussian_ids, image_offsets, out.records)
        ctx.sh_degree = -1 if sh_degree is None else sh_degree
        ctx.depth_channel = DEPTH_CHANNELS[render_mode]
        ctx.mark_non_differentiable(out.n_invalid)
        return values, out.records, out.n_invalid

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, v_record_colors: Tensor, v_records: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, records = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [needs[0], needs[1], needs[3], needs[4]]
        gradients = color_bwd(
            *inputs,
            records,
            v_record_colors.contiguous(),
            sh_degree=ctx.sh_degree,
            depth_channel=ctx.depth_channel,
            wanted=wanted,
        )
        with_colors = ctx.depth_channel != 2
        with_directions = with_colors and ctx.sh_degree >= 0
        if needs[4]:
            v_records = v_records.clone()
            v_records[:, 5].masked_fill_(records[:, 5] == 0, 0)  # taken out: a constant
            if ctx.depth_channel != 0:
                v_records[:, 6] += gradients.depths
        return (
            gradients.means if needs[0] and with_directions else None,
            gradients.viewmats if needs[1] and with_directions else None,
            None,
            gradients.colors if needs[3] and with_colors else None,
            v_records if needs[4] else None,
            *(None,) * 8,
        )


class _Blend(Function):
    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,  # what the records hold too: the way its gradient takes
        records: Tensor,
        record_colors: Tensor,
        radii: Tensor,
        gaussian_ids: Tensor,
        image_offsets: Tensor,
        n_invalid: Tensor,
        tile_offsets: Tensor,
        tile_records: Tensor,
        width: int,
        height: int,
        alpha_cap: float,
        absgrad: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        projected = Records(records, radii, gaussian_ids, image_offsets, n_invalid)
        tiles = Tiles(tile_offsets, tile_records)
        ctx.save_for_backward(records, record_colors, gaussian_ids, image_offsets, tile_offsets, tile_records)
        ctx.alpha_cap, ctx.absgrad, ctx.means2d_shape = alpha_cap, absgrad, means2d.shape
        return blend(projected, record_colors, tiles, width, height, alpha_cap=alpha_cap)

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, v_colors: Tensor, v_alphas: Tensor) -> tuple[Tensor | None, ...]:
        records, record_colors, gaussian_ids, image_offsets, *tiles = ctx.saved_tensors
        gradients = blend_bwd(
            records,
            record_colors,
            image_offsets,
            Tiles(*tiles),
            v_colors.contiguous(),
            v_alphas.contiguous(),
            alpha_cap=ctx.alpha_cap,
            absgrad=ctx.absgrad is not None,
        )

        def laid_out(values: Tensor) -> Tensor:
            """Rows of the records [M, 2] in the layout of means2d."""
            if len(ctx.means2d_shape) == 2:
                return values.contiguous()
            rows = _dense_rows(gaussian_ids, image_offsets, ctx.means2d_shape[-2])
            out = values.new_zeros(math.prod(ctx.means2d_shape[:-1]), 2)
            return out.index_copy_(0, rows, values).reshape(ctx.means2d_shape)

        if ctx.absgrad is not None:
            ctx.absgrad += laid_out(gradients.means2d_abs)
        v_means2d = laid_out(gradients.records[:, :2]) if ctx.needs_input_grad[0] else None
        return v_means2d, gradients.records, gradients.record_colors, *(None,) * 10


def _numbers(values: tuple[float, ...], like: Tensor) -> Tensor:
    # Each copy from ordinary memory stops the stream; under a tracer the tensor is the tracer's.
    return like.new_tensor(values) if not like.is_cuda or is_watched((like,)) else constants(values, like.device)


class _Composite(Function):
    @staticmethod
    def forward(
        ctx: Any,
        colors: Tensor,
        alphas: Tensor,
        backgrounds: Tensor | None,
        n_color_channels: int,
        expected_depth: bool,
        post: PostProcess,
    ) -> tuple[Tensor, Tensor]:
        out, out_alphas = composite(
            colors,
            alphas,
            n_color_channels=n_color_channels,
            backgrounds=backgrounds,
            expected_depth=expected_depth,
            postprocess=post,
        )
        ctx.save_for_backward(colors, alphas, backgrounds)
        ctx.n_color_channels, ctx.expected_depth, ctx.post = n_color_channels, expected_depth, post
        if not out.is_floating_point():
            ctx.mark_non_differentiable(out)
        return out, out_alphas

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, v_out: Tensor, v_out_alphas: Tensor) -> tuple[Tensor | None, ...]:
        colors, alphas, backgrounds = ctx.saved_tensors
        with_backgrounds = backgrounds is not None and ctx.needs_input_grad[2]
        if ctx.post.layout == "CHW":
            v_out_alphas = v_out_alphas.permute(0, 2, 3, 1)
        gradients = composite_bwd(
            colors,
            alphas,
            backgrounds,
            None if ctx.post.std is None else _numbers(ctx.post.std, colors),
            v_out.to(colors.dtype).contiguous(),
            v_out_alphas.contiguous(),
            n_color_channels=ctx.n_color_channels,
            expected_depth=ctx.expected_depth,
            clamp=ctx.post.clamp,
            channels_first=ctx.post.layout == "CHW",
            with_backgrounds=with_backgrounds,
        )
        v_backgrounds = gradients.backgrounds if with_backgrounds else None
        return gradients.colors, gradients.alphas, v_backgrounds, None, None, None
