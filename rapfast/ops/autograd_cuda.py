"""One native call on the GPU as a differentiable one.

The call runs as in inference and keeps its state. Two autograd functions stand for it in the graph: ``_Front``, from
Gaussians and cameras to records, and ``_Pixels``, from records to blended images. Between them there are ``means2d``,
in the layout that ``meta`` shows, so that its gradient may be retained, and a tensor without memory, whose gradient is
that of all else that a record has. What is made of the blended images is the function that the CPU has too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from rapfast.ops.color import DEPTH_CHANNELS
from rapfast.ops.project import CAMERA_MODELS
from rapfast.ops.render import Rendered, Sizes, state_part
from rapfast.ops.render_bwd import gaussians_bwd, means2d_of, pixels_bwd, row_stride


class _Facts(NamedTuple):
    """What is known of a call on the host, tensors aside."""

    sizes: Sizes
    n_records: int
    n_intersections: int
    n_visible: int
    packed: bool
    camera_model: int
    antialiased: bool
    eps2d: float
    sh_degree: int
    depth_channel: int
    alpha_cap: float


class Front(NamedTuple):
    """Records in a graph."""

    means2d: Tensor  # dense [*batch, C, N, 2] or packed [n_visible, 2]
    records: Tensor  # [M, 8] dead ones included; the columns x and y carry no gradient
    link: Tensor  # [M, row_stride] no values, only gradients
    places: Tensor
    facts: _Facts


def front(
    rendered: Rendered,
    inputs: tuple[Tensor | None, ...],  # means, quats, scales, covars, opacities, colors, viewmats, Ks
    dense_shape: tuple[int, ...] | None,
    *,
    camera_model: str,
    antialiased: bool,
    eps2d: float,
    sh_degree: int | None,
    render_mode: str,
    alpha_cap: float,
) -> Front:
    """The records of a call that kept its state, as a function of its inputs."""
    facts = _Facts(
        rendered.sizes, rendered.n_records, rendered.n_intersections, rendered.n_visible, dense_shape is None,
        CAMERA_MODELS[camera_model], antialiased, eps2d, -1 if sh_degree is None else sh_degree,
        DEPTH_CHANNELS[render_mode], alpha_cap,
    )  # fmt: skip
    means2d, records, link, places = _Front.apply(*inputs, rendered, facts, dense_shape)
    return Front(means2d, records, link, places, facts)


def pixels(found: Front, rendered: Rendered, absgrad: Tensor | None) -> tuple[Tensor, Tensor]:
    """The call's blended images [I, H, W, D] and alphas [I, H, W, 1], as a function of its records."""
    return _Pixels.apply(found.means2d, found.link, rendered, found.places, absgrad, found.facts)


class _Front(Function):
    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        quats: Tensor | None,
        scales: Tensor | None,
        covars: Tensor | None,
        opacities: Tensor,
        colors: Tensor,
        viewmats: Tensor,
        Ks: Tensor,
        rendered: Rendered,
        facts: _Facts,
        dense_shape: tuple[int, ...] | None,
    ) -> tuple[Tensor, ...]:
        state = rendered.state
        means2d, places = means2d_of(state, facts.sizes, facts.n_records, facts.n_visible, facts.packed)
        if dense_shape is not None:
            means2d = means2d.reshape(dense_shape)
        # Detached: a view of its own, of nothing that a graph knows.
        records = state_part(state, facts.sizes, "records", torch.float32, facts.n_records, 8).detach()
        link = means2d.new_empty(()).expand(facts.n_records, row_stride(facts.sizes.n_channels))
        # Given colours are read for their shape alone.
        kept_colors = colors if facts.sh_degree >= 0 else colors.new_empty(()).expand(colors.shape)
        ctx.save_for_backward(
            means, quats, scales, covars, opacities, viewmats, Ks, kept_colors, state, places
        )  # fmt: skip
        ctx.facts, ctx.dense = facts, dense_shape is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(places)
        return means2d, records, link, places

    @staticmethod
    def backward(
        ctx: Any, v_means2d: Tensor | None, v_records: Tensor | None, rows: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *inputs, state, places = ctx.saved_tensors
        facts: _Facts = ctx.facts
        needs = ctx.needs_input_grad
        with_colors = facts.depth_channel != 2
        wanted = [x is not None and need for x, need in zip(inputs[:5], needs[:5], strict=True)]
        wanted += [needs[6], needs[7], needs[5] and with_colors]
        if v_records is not None:
            # What the colour stage took out is a constant.
            records = state_part(state, facts.sizes, "records", torch.float32, facts.n_records, 8)
            v_records = v_records.clone(memory_format=torch.contiguous_format)
            v_records[:, 5].masked_fill_(records[:, 5] == 0, 0)
        if v_means2d is not None:
            s = facts.sizes
            v_means2d = v_means2d.reshape((s.n_images, s.n_gaussians, 2) if ctx.dense else (-1, 2)).contiguous()
        gradients = gaussians_bwd(
            *inputs,
            state,
            places,
            None if rows is None else rows.contiguous(),
            v_means2d,
            v_records,
            facts.sizes,
            n_records=facts.n_records,
            packed=facts.packed,
            camera_model=facts.camera_model,
            antialiased=facts.antialiased,
            eps2d=facts.eps2d,
            sh_degree=facts.sh_degree,
            depth_channel=facts.depth_channel,
            wanted=wanted,
        )
        found = [v if want else None for v, want in zip(gradients, wanted, strict=True)]
        return *found[:5], found[7], found[5], found[6], None, None, None


class _Pixels(Function):
    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        link: Tensor,
        rendered: Rendered,
        places: Tensor,
        absgrad: Tensor | None,
        facts: _Facts,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rendered.state, places)
        ctx.facts, ctx.absgrad, ctx.means2d_shape = facts, absgrad, means2d.shape
        ctx.set_materialize_grads(False)
        return rendered.images, rendered.alphas

    @staticmethod
    def backward(ctx: Any, v_colors: Tensor | None, v_alphas: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        state, places = ctx.saved_tensors
        facts: _Facts = ctx.facts
        gradients = pixels_bwd(
            state,
            places,
            None if v_colors is None else v_colors.contiguous(),
            None if v_alphas is None else v_alphas.contiguous(),
            ctx.absgrad,
            facts.sizes,
            n_records=facts.n_records,
            n_intersections=facts.n_intersections,
            n_visible=facts.n_visible,
            packed=facts.packed,
            alpha_cap=facts.alpha_cap,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients.means2d.reshape(ctx.means2d_shape), gradients.rows, *(None,) * 4


def refuse_second_derivative() -> None:
    """Raises where a backward is to become a graph: its gradients would look like constants to the next."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "rapfast has no second derivative: call backward() or autograd.grad() without create_graph=True, or "
            'use backend="reference"'
        )
