"""One native call on the GPU as a differentiable one.

The call runs as in inference and keeps its state. Two autograd functions stand for it in the graph: one from Gaussians
and cameras to records, one from records to blended images. Between them there are ``means2d``, in the layout that
``meta`` shows, so that its gradient may be retained, and tensors without memory, whose gradients are those of all else
that a record has. What is made of the blended images is the function that the CPU has too.

The GPU has little to do in a small call, so what runs between its launches is kept short: what is only looked at
through ``meta`` is made when it is. Inside torch.compile, or where something else watches, the same functions go by
way of operators whose sizes nobody reads (`traced`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from rapfast.ops._library import RECORD_FIELDS, define
from rapfast.ops.color import DEPTH_CHANNELS, output_channels
from rapfast.ops.project import CAMERA_MODELS
from rapfast.ops.render import render
from rapfast.ops.render_bwd import (
    KIND_SCHEMA,
    Counts,
    Facts,
    GaussianInputs,
    Kind,
    fill_means2d,
    gaussians_bwd,
    gaussians_bwd_op,
    pixels_bwd,
    pixels_bwd_op,
    row_stride,
)
from rapfast.ops.state import Rendered, state_part

_OPACITY = RECORD_FIELDS.index("opacity")


class Front(NamedTuple):
    """Records in a graph."""

    means2d: Tensor  # dense [*batch, C, N, 2], to be filled by `filled_means2d`, or packed [n_visible, 2]
    link: Tensor  # [M, row_stride] no values, only gradients
    record_link: Tensor  # [M, 8] likewise
    places: Tensor | None
    facts: Facts


def kind_of(
    inputs: GaussianInputs, width: int, height: int, *, camera_model: str, antialiased: bool, eps2d: float,
    sh_degree: int | None, render_mode: str, alpha_cap: float, packed: bool,
) -> Kind:  # fmt: skip
    """The kind of a call."""
    means, colors, viewmats = inputs.means, inputs.colors, inputs.viewmats
    depth_channel = DEPTH_CHANNELS[render_mode]
    n_images, n_cameras = viewmats.shape[:-2].numel(), viewmats.shape[-3]
    with_sh = sh_degree is not None
    return Kind(
        n_images // (n_cameras or 1), n_cameras, means.shape[-2], width, height,
        output_channels(colors, depth_channel), CAMERA_MODELS[camera_model], antialiased, eps2d,
        sh_degree if with_sh else -1, colors.shape[-2] if with_sh else 1, colors.shape[-1],
        colors.dim() - means.dim() == (2 if with_sh else 1), depth_channel, alpha_cap, packed,
    )  # fmt: skip


def front(rendered: Rendered, inputs: GaussianInputs, kind: Kind, dense_shape: tuple[int, ...] | None) -> Front:
    """The records of a call that kept its state, as a function of its inputs."""
    state = rendered.state
    facts = Facts.of(kind, Counts.of(rendered), state.get_device())
    if dense_shape is None:
        means2d = state.new_empty((rendered.n_visible, 2), dtype=torch.float32)
        places = state.new_empty((rendered.n_records,), dtype=torch.int32)
        fill_means2d(state, facts, means2d, places)
    else:
        means2d, places = state.new_empty(dense_shape, dtype=torch.float32), None
    return Front(*_Front.apply(*inputs, (means2d, state, places), facts), places, facts)


def filled_means2d(found: Front, rendered: Rendered) -> Tensor:
    """``means2d`` with its values. A dense one is filled when it is first asked for: no kernel reads it."""
    if found.places is None:
        stream = torch.cuda.current_stream(rendered.state.device)
        rendered.state.record_stream(stream)
        found.means2d.record_stream(stream)
        fill_means2d(rendered.state, found.facts, found.means2d, None)
    return found.means2d


def records_of(found: Front, rendered: Rendered) -> Tensor:
    """The records [M, 8], dead ones included, as a part of the graph; the columns x and y carry no gradient."""
    return _Records.apply(found.record_link, rendered)


def pixels(found: Front, rendered: Rendered, means2d: Tensor, absgrad: Tensor | None) -> tuple[Tensor, Tensor]:
    """The call's blended images [I, H, W, D] and alphas [I, H, W, 1], as a function of its records. ``means2d``: that
    of ``found``, or what was made of it."""
    made = rendered.images, rendered.alphas, rendered.state, found.places, absgrad
    return _Pixels.apply(means2d, found.link, made, found.facts)


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
        made: tuple[Tensor, Tensor, Tensor | None],
        facts: Facts,
    ) -> tuple[Tensor, ...]:
        means2d, state, places = made  # of no graph, in a tuple that autograd does not look into
        kind, n = facts.kind, facts.counts.n_records
        # Given colours are read for their shape alone.
        kept_colors = colors if kind.sh_degree >= 0 else colors.new_empty(()).expand(colors.shape)
        ctx.save_for_backward(
            means, quats, scales, covars, opacities, kept_colors, viewmats, Ks, state, places
        )  # fmt: skip
        ctx.facts, ctx.state_bytes = facts, state.numel()
        ctx.set_materialize_grads(False)
        nothing = means.new_empty(())
        return means2d, nothing.expand(n, row_stride(kind.n_channels)), nothing.expand(n, len(RECORD_FIELDS))

    @staticmethod
    def backward(
        ctx: Any, v_means2d: Tensor | None, rows: Tensor | None, v_records: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *inputs, state, places = ctx.saved_tensors
        _refuse_another_state(state, ctx.state_bytes)
        needs = ctx.needs_input_grad[: len(inputs)]
        wanted = [x is not None and need for x, need in zip(inputs, needs, strict=True)]
        wanted[5] = wanted[5] and ctx.facts.kind.with_colors
        found = gaussians_bwd(
            inputs,
            state,
            places,
            ctx.facts,
            None if rows is None else rows.contiguous(),
            None if v_means2d is None else v_means2d.contiguous(),
            None if v_records is None else v_records.contiguous(),
            wanted,
        )
        return *found, None, None


class _Records(Function):
    @staticmethod
    def forward(ctx: Any, record_link: Tensor, rendered: Rendered) -> Tensor:
        ctx.save_for_backward(rendered.state)
        ctx.sizes, ctx.state_bytes = rendered.sizes, rendered.state.numel()
        return _records(rendered.state, rendered.sizes, rendered.n_records).clone()

    @staticmethod
    def backward(ctx: Any, v_records: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (state,) = ctx.saved_tensors
        _refuse_another_state(state, ctx.state_bytes)
        # What the colour stage took out is a constant.
        records = _records(state, ctx.sizes, v_records.shape[0])
        v_records = v_records.clone(memory_format=torch.contiguous_format)
        v_records[:, _OPACITY].masked_fill_(records[:, _OPACITY] == 0, 0)
        return v_records, None


def _records(state: Tensor, sizes: Any, n_records: int) -> Tensor:
    return state_part(state, sizes, "records", torch.float32, n_records, len(RECORD_FIELDS))


class _Pixels(Function):
    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        link: Tensor,
        made: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
        facts: Facts,
    ) -> tuple[Tensor, Tensor]:
        images, alphas, state, places, absgrad = made
        ctx.save_for_backward(state, places)
        ctx.facts, ctx.absgrad, ctx.means2d_shape = facts, absgrad, means2d.shape
        ctx.state_bytes = state.numel()
        ctx.set_materialize_grads(False)
        return images, alphas

    @staticmethod
    def backward(ctx: Any, v_colors: Tensor | None, v_alphas: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        state, places = ctx.saved_tensors
        _refuse_another_state(state, ctx.state_bytes)
        found = pixels_bwd(
            state,
            places,
            ctx.facts,
            None if v_colors is None else v_colors.contiguous(),
            None if v_alphas is None else v_alphas.contiguous(),
            ctx.absgrad,
        )
        v_means2d = found.means2d
        if v_means2d.shape != ctx.means2d_shape:
            v_means2d = v_means2d.reshape(ctx.means2d_shape)
        return v_means2d, found.rows, None, None


def _refuse_another_state(state: Tensor, n_bytes: int) -> None:
    """Raises where what was saved comes back as the state of a call that had other room: nothing lies where this
    call had it."""
    if state.numel() != n_bytes:
        raise RuntimeError(
            f"the call kept {n_bytes} bytes for its backward, which finds {state.numel()}: it was run again, as "
            "torch.utils.checkpoint does, after other calls of its sizes had changed how much room one is given. "
            "Call rasterization outside of the checkpoint"
        )


def refuse_second_derivative() -> None:
    """Raises where a backward is to become a graph: its gradients would look like constants to the next."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "rapfast has no second derivative: call backward() or autograd.grad() without create_graph=True, or "
            'use backend="reference"'
        )


# ------------------------------------------------------------------------------------------- traced


def _kept_fake(
    means, quats, scales, covars, opacities, colors, viewmats, Ks, near_plane, far_plane, radius_clip, *kind
):  # fmt: skip
    k = Kind(*kind)
    context = torch.library.get_ctx()
    n_records, n_bytes = context.new_dynamic_size(), context.new_dynamic_size()
    n_visible = context.new_dynamic_size() if k.packed else 0
    n_images = k.n_scenes * k.n_cameras
    return (
        means.new_empty((n_images, k.height, k.width, k.n_channels)),
        means.new_empty((n_images, k.height, k.width, 1)),
        means.new_empty(k.means2d_shape(n_visible)),
        means.new_empty((n_records,), dtype=torch.int32),
        means.new_empty((n_bytes,), dtype=torch.uint8),
        torch.empty((len(Counts._fields),), dtype=torch.int64, device="cpu"),
    )


_MODELS = {number: name for name, number in CAMERA_MODELS.items()}
_MODES = {number: name for name, number in DEPTH_CHANNELS.items() if "ED" not in name}


def _kept_cuda(
    means, quats, scales, covars, opacities, colors, viewmats, Ks, near_plane, far_plane, radius_clip, *kind
):  # fmt: skip
    k = Kind(*kind)
    rendered = render(
        means, quats, scales, covars, opacities, colors, viewmats, Ks, None, k.width, k.height,
        camera_model=_MODELS[k.camera_model], antialiased=k.antialiased, eps2d=k.eps2d, near_plane=near_plane,
        far_plane=far_plane, radius_clip=radius_clip, sh_degree=None if k.sh_degree < 0 else k.sh_degree,
        render_mode=_MODES[k.depth_channel], alpha_cap=k.alpha_cap, keep_state=True,
    )  # fmt: skip
    counts = Counts.of(rendered)
    means2d = means.new_empty(k.means2d_shape(rendered.n_visible))
    places = means.new_empty((rendered.n_records,), dtype=torch.int32)
    facts = Facts.of(k, counts, means.get_device())
    if not k.packed:
        places.zero_()
    fill_means2d(rendered.state, facts, means2d, places if k.packed else None)
    on_host = torch.tensor(counts, dtype=torch.int64, device="cpu")
    return rendered.images, rendered.alphas, means2d, places, rendered.state, on_host


# Images, alphas, means2d, places (zeros where dense), state, and on the host `Counts`.
render_kept_op = define(
    "render_kept(Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor opacities, Tensor colors, "
    f"Tensor viewmats, Tensor Ks, float near_plane, float far_plane, float radius_clip, {KIND_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_kept_fake,
    cuda=_kept_cuda,
)


def traced(
    inputs: GaussianInputs, kind: Kind, dense_shape: tuple[int, ...] | None, near_plane: float, far_plane: float,
    radius_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The call and its graph by operators alone: blended images, alphas, means2d."""
    means2d, link, *drawn = _TracedFront.apply(*inputs, near_plane, far_plane, radius_clip, *kind)
    if dense_shape is not None:
        means2d = means2d.reshape(dense_shape)
    return *_TracedPixels.apply(means2d, link, *drawn, *kind), means2d


class _TracedFront(Function):
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
        near_plane: float,
        far_plane: float,
        radius_clip: float,
        *kind: Any,
    ) -> tuple[Tensor, ...]:
        inputs = means, quats, scales, covars, opacities, colors, viewmats, Ks
        images, alphas, means2d, places, state, counts = render_kept_op(
            *inputs, near_plane, far_plane, radius_clip, *kind
        )
        ctx.save_for_backward(*inputs, state, places, counts)
        ctx.kind = kind
        ctx.mark_non_differentiable(images, alphas, places, state, counts)
        link = means.new_zeros((places.shape[0], row_stride(Kind(*kind).n_channels)))
        return means2d, link, images, alphas, places, state, counts

    @staticmethod
    def backward(ctx: Any, v_means2d: Tensor, rows: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *inputs, state, places, counts = ctx.saved_tensors
        wanted = [x is not None and need for x, need in zip(inputs, ctx.needs_input_grad[:8], strict=True)]
        wanted[5] = wanted[5] and Kind(*ctx.kind).with_colors
        found = gaussians_bwd_op(
            *inputs, state, places, counts, rows.contiguous(), v_means2d.contiguous(), None, wanted, *ctx.kind
        )
        found = [x if want else None for x, want in zip(found, wanted, strict=True)]
        return *found, *(None,) * (3 + len(ctx.kind))


class _TracedPixels(Function):
    @staticmethod
    def forward(
        ctx: Any, means2d: Tensor, link: Tensor, images: Tensor, alphas: Tensor, places: Tensor, state: Tensor,
        counts: Tensor, *kind: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(means2d, state, places, counts)
        ctx.kind = kind
        return images.clone(), alphas.clone()

    @staticmethod
    def backward(ctx: Any, v_colors: Tensor, v_alphas: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        means2d, state, places, counts = ctx.saved_tensors
        deterministic = torch.are_deterministic_algorithms_enabled()
        rows, v_means2d = pixels_bwd_op(
            state, places, counts, means2d, v_colors.contiguous(), v_alphas.contiguous(), None, deterministic, *ctx.kind
        )
        return v_means2d, rows, *(None,) * (5 + len(ctx.kind))
