"""Backward of a call on the GPU, from the state that it kept.

A record's gradient is a row: conic (3), opacity, then its colour's, padded to a multiple of four. That of its mean is
in the layout of ``means2d``: dense [I, N, 2], or packed [n_visible, 2] where ``places`` [M] has each record's row, -1
for dead ones.

What is here is called for every step of a training loop while the GPU waits, so a plan holds the numbers of a call,
kernels write every row of what they return, and the operators are called only where somebody watches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rapfast.ops._library import address, aligned, current_stream, define, native
from rapfast.ops.render import is_watched
from rapfast.ops.state import Rendered, Sizes

ROW_COLOR = 4
"""Column of a row at which its colour's gradient begins."""


def row_stride(n_channels: int) -> int:
    """Numbers in a row."""
    return ROW_COLOR + (n_channels + 3) // 4 * 4


class Kind(NamedTuple):
    """What calls of one kind have in common, in the operators' order."""

    n_scenes: int
    n_cameras: int
    n_gaussians: int
    width: int
    height: int
    n_channels: int  # blended, depth included
    camera_model: int
    antialiased: bool
    eps2d: float
    sh_degree: int  # -1: colours are given
    n_bases: int
    n_color_channels: int
    per_camera: bool
    depth_channel: int
    alpha_cap: float
    packed: bool

    @property
    def with_colors(self) -> bool:
        return self.depth_channel != 2

    def means2d_shape(self, n_visible: int) -> tuple[int, ...]:
        return (n_visible, 2) if self.packed else (self.n_scenes * self.n_cameras, self.n_gaussians, 2)


KIND_SCHEMA = (
    "SymInt n_scenes, SymInt n_cameras, SymInt n_gaussians, SymInt width, SymInt height, SymInt n_channels, "
    "int camera_model, bool antialiased, float eps2d, int sh_degree, SymInt n_bases, SymInt n_color_channels, "
    "bool per_camera, int depth_channel, float alpha_cap, bool packed"
)
"""The fields of `Kind`."""


class Counts(NamedTuple):
    """What one call had room for and found. Operators take a tensor of them, on the host."""

    record_capacity: int
    capacity: int
    n_records: int  # M, dead ones included
    n_intersections: int
    n_visible: int

    @staticmethod
    def of(rendered: Rendered) -> Counts:
        sizes = rendered.sizes
        found = rendered.n_records, rendered.n_intersections, rendered.n_visible
        return Counts(sizes.record_capacity, sizes.capacity, *found)


@lru_cache(maxsize=256)
def _plan(kind: Kind, record_capacity: int, capacity: int, device: int) -> Any:
    """The backward of such calls in the native module's form, but for addresses and what a call found."""
    n_tile_rows = -(-kind.height // 16)
    sizes = Sizes(*kind[:6], record_capacity, capacity, True, 0, n_tile_rows)
    return native.BackwardPlan(
        **sizes._asdict(),
        camera_model=kind.camera_model,
        antialiased=kind.antialiased,
        eps2d=kind.eps2d,
        sh_degree=kind.sh_degree,
        n_bases=kind.n_bases,
        n_color_channels=kind.n_color_channels,
        per_camera=kind.per_camera,
        depth_channel=kind.depth_channel,
        alpha_cap=kind.alpha_cap,
        device=device,
    )


class Facts(NamedTuple):
    """What is known of one call on the host, tensors aside."""

    kind: Kind
    counts: Counts
    device: int
    plan: Any

    @staticmethod
    def of(kind: Kind, counts: Counts, device: int) -> Facts:
        return Facts(kind, counts, device, _plan(kind, counts.record_capacity, counts.capacity, device))


def _read_facts(state: Tensor, counts: Tensor, kind: tuple[Any, ...]) -> Facts:
    return Facts.of(Kind(*kind), Counts(*counts.tolist()), state.get_device())


def _counts_tensor(facts: Facts) -> Tensor:
    return torch.tensor(facts.counts, dtype=torch.int64, device="cpu")


# ------------------------------------------------------------------------------------------ means2d


def fill_means2d(state: Tensor, facts: Facts, means2d: Tensor, places: Tensor | None) -> None:
    """Writes the image means of the visible records, dense with 0 elsewhere, or packed and ``places`` [M] with them."""
    n = facts.counts.n_records
    if places is not None and n == 0:
        return  # packed, and nothing to write: an empty tensor has no address that would tell it from a dense call's
    room = None if places is None else state.new_empty((native.means2d_chunks(n),), dtype=torch.int32)
    facts.plan.means2d(
        state.data_ptr(), n, address(places), means2d.data_ptr(), address(room), current_stream(facts.device)
    )


# -------------------------------------------------------------------------------------------- blend


class PixelGradients(NamedTuple):
    """What blended images pass on to records."""

    rows: Tensor  # [M, row_stride]
    means2d: Tensor  # dense [I, N, 2] or packed [n_visible, 2]


def _pixels(
    state: Tensor, places: Tensor | None, facts: Facts, v_colors: Tensor | None, v_alphas: Tensor | None,
    absgrad: Tensor | None, deterministic: bool,
) -> PixelGradients:  # fmt: skip
    kind, counts, device, plan = facts
    n = counts.n_records
    rows = state.new_empty((n, row_stride(kind.n_channels)), dtype=torch.float32)
    v_means2d = state.new_empty(kind.means2d_shape(counts.n_visible), dtype=torch.float32)
    exponents = fixed = None
    if deterministic:
        width = native.fixed_stride(kind.n_channels)
        exponents = state.new_empty((n, width), dtype=torch.int32)
        fixed = state.new_empty((n, width), dtype=torch.int64)
    plan.pixels(
        state.data_ptr(), n, counts.n_intersections, v_means2d.numel() // 2, address(places), address(v_colors),
        address(v_alphas), address(absgrad), address(exponents), address(fixed), rows.data_ptr(), v_means2d.data_ptr(),
        current_stream(device),
    )  # fmt: skip
    return PixelGradients(rows, v_means2d)


def _pixels_fake(state, places, counts, means2d, v_colors, v_alphas, absgrad, deterministic, *kind):
    k = Kind(*kind)
    rows = state.new_empty((places.shape[0], row_stride(k.n_channels)), dtype=torch.float32)
    return rows, state.new_empty(means2d.shape, dtype=torch.float32)


def _pixels_cuda(state, places, counts, means2d, v_colors, v_alphas, absgrad, deterministic, *kind):
    facts = _read_facts(state, counts, kind)
    found = _pixels(state, places if facts.kind.packed else None, facts, v_colors, v_alphas, absgrad, deterministic)
    return found.rows, found.means2d.reshape(means2d.shape)


# `places` [M] and `means2d` are read for their shapes, where the call is not packed.
pixels_bwd_op = define(
    "pixels_bwd(Tensor state, Tensor places, Tensor counts, Tensor means2d, Tensor? v_colors, Tensor? v_alphas, "
    f"Tensor(a!)? absgrad, bool deterministic, {KIND_SCHEMA}) -> (Tensor, Tensor)",
    fake=_pixels_fake,
    cuda=_pixels_cuda,
)


def pixels_bwd(
    state: Tensor,
    places: Tensor | None,  # [M] int32 where packed
    facts: Facts,
    v_colors: Tensor | None,  # [I, H, W, D]; None: 0
    v_alphas: Tensor | None,  # [I, H, W, 1]; None: 0
    absgrad: Tensor | None,  # in the layout of means2d
) -> PixelGradients:
    """Gradients of records. Adds to ``absgrad`` the sum over pixels of |gradient of the mean|.

    Atomics add floats in any order, unless torch's deterministic algorithms are on: then sums are of integers, scaled
    by the largest term of each, which takes twice as long and 12 bytes more per number.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if not is_watched((v_colors, v_alphas)):
        return _pixels(state, places, facts, v_colors, v_alphas, absgrad, deterministic)
    n, n_visible = facts.counts.n_records, facts.counts.n_visible
    if places is None:
        places = state.new_empty((n,), dtype=torch.int32)
    means2d = state.new_empty((), dtype=torch.float32).expand(facts.kind.means2d_shape(n_visible))
    return PixelGradients(*pixels_bwd_op(
        state, places, _counts_tensor(facts), means2d, v_colors, v_alphas, absgrad, deterministic, *facts.kind
    ))  # fmt: skip


# ----------------------------------------------------------------------------------------- Gaussians


class GaussianInputs(NamedTuple):
    """What records are made of. Gradients of them come in the same order."""

    means: Tensor  # [..., N, 3]
    quats: Tensor | None  # [..., N, 4]
    scales: Tensor | None  # [..., N, 3]
    covars: Tensor | None  # [..., N, 3, 3]; the gradient is 0 below the diagonal
    opacities: Tensor  # [..., N]
    colors: Tensor  # [..., (C,) N, D] or [..., (C,) N, K, 3]; given ones are read for their shape alone
    viewmats: Tensor  # [..., C, 4, 4]
    Ks: Tensor  # [..., C, 3, 3]


_COLORS, _VIEWMATS = GaussianInputs._fields.index("colors"), GaussianInputs._fields.index("viewmats")


def _gaussians(
    inputs: tuple[Tensor | None, ...], state: Tensor, places: Tensor | None, facts: Facts, rows: Tensor | None,
    v_means2d: Tensor | None, v_records: Tensor | None, wanted: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    kind, counts, device, plan = facts
    means, quats, scales, covars, opacities, colors, viewmats, Ks = inputs
    out = [x.new_empty(x.shape) if want else None for x, want in zip(inputs, wanted, strict=True)]
    nothing = counts.n_records == 0 or kind.n_cameras == 0 or kind.n_gaussians == 0
    if nothing:  # nor is anything written
        return [None if x is None else x.zero_() for x in out]
    if rows is None and out[_COLORS] is not None:
        out[_COLORS].zero_()  # no row reaches them
    # Read in pieces of 8 and 16 bytes. The names live until the launch.
    if kind.sh_degree >= 0:
        colors = aligned(colors)
    rows, v_means2d = aligned(rows), aligned(v_means2d)
    with_views = wanted[_VIEWMATS] or wanted[_VIEWMATS + 1]
    sums = means.new_empty((plan.sums_size,)) if with_views else None
    v_means, v_quats, v_scales, v_covars, v_opacities, v_colors, v_viewmats, v_Ks = map(address, out)
    plan.gaussians(
        state.data_ptr(), address(places), means.data_ptr(), address(quats), address(scales), address(covars),
        opacities.data_ptr(), viewmats.data_ptr(), Ks.data_ptr(), colors.data_ptr(), address(rows), address(v_means2d),
        address(v_records), address(sums), v_means, v_quats, v_scales, v_covars, v_opacities, v_viewmats, v_Ks,
        v_colors, current_stream(device),
    )  # fmt: skip
    return out


_N_INPUTS = len(GaussianInputs._fields)


def _gaussians_fake(*arguments):
    inputs, wanted = arguments[:_N_INPUTS], arguments[_N_INPUTS + 6]
    means = inputs[0]
    return [means.new_empty(x.shape if want else (0,)) for x, want in zip(inputs, wanted, strict=True)]


def _gaussians_cuda(*arguments):
    inputs, (state, places, counts, rows, v_means2d, v_records, wanted, *kind) = (
        arguments[:_N_INPUTS], arguments[_N_INPUTS:]
    )  # fmt: skip
    facts = _read_facts(state, counts, kind)
    found = _gaussians(inputs, state, places if facts.kind.packed else None, facts, rows, v_means2d, v_records, wanted)
    return [inputs[0].new_empty((0,)) if x is None else x for x in found]


gaussians_bwd_op = define(
    "gaussians_bwd(Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor opacities, Tensor colors, "
    "Tensor viewmats, Tensor Ks, Tensor state, Tensor places, Tensor counts, Tensor? rows, Tensor? v_means2d, "
    f"Tensor? v_records, bool[] wanted, {KIND_SCHEMA}) -> Tensor[]",
    fake=_gaussians_fake,
    cuda=_gaussians_cuda,
)


def gaussians_bwd(
    inputs: tuple[Tensor | None, ...],  # of GaussianInputs
    state: Tensor,
    places: Tensor | None,  # [M] int32 where packed
    facts: Facts,
    rows: Tensor | None,  # [M, row_stride]; None: 0
    v_means2d: Tensor | None,  # in the layout of means2d; None: 0
    v_records: Tensor | None,  # [M, 8] what reached the records elsewhere, the first two columns not read; None: 0
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients of a call's inputs from those of its records; ``wanted`` says of which. Sums run in a fixed order."""
    if not is_watched((rows, v_means2d, v_records)):
        return _gaussians(inputs, state, places, facts, rows, v_means2d, v_records, wanted)
    if places is None:
        places = state.new_empty((0,), dtype=torch.int32)
    found = gaussians_bwd_op(
        *inputs, state, places, _counts_tensor(facts), rows, v_means2d, v_records, wanted, *facts.kind
    )
    return [x if want else None for x, want in zip(found, wanted, strict=True)]
