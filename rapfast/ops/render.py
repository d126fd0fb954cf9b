"""All stages of a call on the GPU by one operator: one native call, no stop between the stages."""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from rapfast.ops._library import RECORD_FIELDS, address, aligned, cuda_arguments, define, native, scratch
from rapfast.ops.color import DEPTH_CHANNELS, form_arguments, output_channels
from rapfast.ops.color_net import SCHEMA, Network, NetworkInput, net_arguments, operator_arguments, view_table
from rapfast.ops.composite import PIXEL_TYPES, option_arguments, output_tensors
from rapfast.ops.project import CAMERA_MODELS, Records, input_arguments, without_dead
from rapfast.postprocess import PostProcess

MAX_INDEX = (1 << 31) - 1
"""Most records, and most (tile, record) pairs, of one native call: their indices are 32 bits."""

# Rows per (image, Gaussian) pair and per record that a size seen for the first time starts with. Too few cost
# one more run of the first stages, once.
_FIRST_RECORDS = 0.15
_FIRST_INTERSECTIONS = 4.0
_HEADROOM = 1.125


class _Sizes(NamedTuple):
    n_scenes: int
    n_cameras: int
    n_gaussians: int
    width: int
    height: int
    n_channels: int
    record_capacity: int
    capacity: int
    keep_state: bool


@lru_cache(maxsize=256)
def _layout(sizes: _Sizes) -> dict[str, int]:
    return native.state_layout(**sizes._asdict())


@lru_cache(maxsize=256)
def _scratch_size(sizes: _Sizes, device: int) -> int:
    return native.render_scratch_size(**sizes._asdict(), device=device)


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on the device. Copied there once: each copy from ordinary memory stops the stream."""
    tensor = torch.tensor(values, dtype=torch.float32, device=device)
    torch.cuda.current_stream(device).synchronize()  # other streams will read it too
    return tensor


def _sizes(means, viewmats, colors, width, height, depth_channel, record_capacity, capacity, keep_state):
    return _Sizes(
        means.shape[0], viewmats.shape[1], means.shape[1], width, height,
        output_channels(colors, depth_channel), record_capacity, capacity, keep_state,
    )  # fmt: skip


def _cuda(
    means, quats, scales, covars, opacities, viewmats, Ks, colors, backgrounds, mean, std, width, height,
    camera_model, antialiased, eps2d, near_plane, far_plane, radius_clip, sh_degree, per_camera, depth_channel,
    alpha_cap, with_composite, expected_depth, clamp_min, clamp_max, out_height, out_width, channels_first,
    pixel_type, record_capacity, capacity, keep_state, net, maps, map_ids, view_weights, net_form, net_layers,
    coord_scale, stage_events=None,
):  # fmt: skip
    device = means.device
    sizes = _sizes(means, viewmats, colors, width, height, depth_channel, record_capacity, capacity, keep_state)
    quats, colors = aligned(quats), aligned(colors)
    n_images = sizes.n_scenes * sizes.n_cameras
    blended = means.new_empty((n_images, height, width, sizes.n_channels))
    alphas = means.new_empty((n_images, height, width, 1))
    out, out_alphas = blended, alphas
    if with_composite:
        out, out_alphas = output_tensors(blended, out_height, out_width, channels_first, pixel_type)
    n_invalid = means.new_empty((n_images,), dtype=torch.int64)
    state = scratch(means, _layout(sizes)["size"])
    room = scratch(means, _scratch_size(sizes, device.index))
    counts = torch.empty(2, dtype=torch.int64)
    network = {"with_net": bool(net)}
    if net:
        views, layers = view_table(maps, map_ids, view_weights), torch.tensor(net_layers, dtype=torch.int64)
        network |= net_arguments(net, net_form, net_layers, coord_scale, views, layers)
    native.render_cuda(
        **cuda_arguments(means),
        **input_arguments(
            means, quats, scales, covars, opacities, viewmats, Ks, width, height, camera_model, antialiased, eps2d,
            near_plane, far_plane, radius_clip,
        ),
        **form_arguments(colors, sh_degree, per_camera, depth_channel),
        **network,
        n_channels=sizes.n_channels,
        record_capacity=record_capacity,
        capacity=capacity,
        keep_state=keep_state,
        alpha_cap=alpha_cap,
        with_composite=with_composite,
        **option_arguments(
            out, out_alphas, backgrounds, mean, std, expected_depth, clamp_min, clamp_max, out_height, out_width,
            channels_first, pixel_type,
        ),
        blended=address(blended),
        alphas=address(alphas),
        n_invalid=address(n_invalid),
        state=address(state),
        scratch=address(room),
        counts=address(counts),
        stage_events=address(stage_events),
    )  # fmt: skip
    return out, out_alphas, n_invalid, state, counts


def _fake(
    means, quats, scales, covars, opacities, viewmats, Ks, colors, backgrounds, mean, std, width, height,
    camera_model, antialiased, eps2d, near_plane, far_plane, radius_clip, sh_degree, per_camera, depth_channel,
    alpha_cap, with_composite, expected_depth, clamp_min, clamp_max, out_height, out_width, channels_first,
    pixel_type, record_capacity, capacity, keep_state, net, maps, map_ids, view_weights, net_form, net_layers,
    coord_scale,
):  # fmt: skip
    sizes = _sizes(means, viewmats, colors, width, height, depth_channel, record_capacity, capacity, keep_state)
    n_images = sizes.n_scenes * sizes.n_cameras
    blended = means.new_empty((n_images, height, width, sizes.n_channels))
    out, out_alphas = blended, means.new_empty((n_images, height, width, 1))
    if with_composite:
        out, out_alphas = output_tensors(blended, out_height, out_width, channels_first, pixel_type)
    n_invalid = means.new_empty((n_images,), dtype=torch.int64)
    state = means.new_empty((_layout(sizes)["size"],), dtype=torch.uint8)
    return out, out_alphas, n_invalid, state, torch.empty(2, dtype=torch.int64)


render_op = define(
    "render(Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor opacities, Tensor viewmats, Tensor Ks, "
    "Tensor? colors, Tensor? backgrounds, Tensor? mean, Tensor? std, int width, int height, int camera_model, "
    "bool antialiased, float eps2d, float near_plane, float far_plane, float radius_clip, int sh_degree, "
    "bool per_camera, int depth_channel, float alpha_cap, bool with_composite, bool expected_depth, "
    "float? clamp_min, float? clamp_max, int out_height, int out_width, bool channels_first, int pixel_type, "
    "int record_capacity, int capacity, bool keep_state, " + SCHEMA + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    cuda=_cuda,
)


class Rendered(NamedTuple):
    """What one call leaves."""

    images: Tensor  # [I, h, w, D] or [I, D, h, w]
    alphas: Tensor  # [I, h, w, 1] or [I, 1, h, w]
    n_invalid: Tensor  # [I] int64, Gaussians of each image culled as non-finite or degenerate
    state: Tensor  # [bytes] uint8, opaque: see state_records and state_pixels
    sizes: _Sizes
    n_records: int  # rows in use, dead ones included
    n_intersections: int


class _Learnt:
    """Capacities for one problem size, from the calls so far. Results never depend on them.

    They grow at once and shrink when a whole window of calls has needed less than half: sorts run over the
    capacity, and a call that finds too little room runs twice.
    """

    _WINDOW = 16

    def __init__(self, records: int, intersections: int) -> None:
        self.capacities = records, intersections
        self._needed = (0, 0)
        self._calls = 0

    def note(self, used: tuple[int, int], needed: tuple[int, int], n_pairs: int) -> None:
        """One call had the capacities ``used`` and needed these counts."""
        self._needed = max(self._needed[0], needed[0]), max(self._needed[1], needed[1])
        self._calls += 1
        self.capacities = max(self.capacities[0], used[0]), max(self.capacities[1], used[1])
        if self._calls == self._WINDOW:
            records, intersections = (_room(count) for count in self._needed)
            self.capacities = (
                min(n_pairs, records) if records < self.capacities[0] // 2 else self.capacities[0],
                intersections if intersections < self.capacities[1] // 2 else self.capacities[1],
            )
            self._needed, self._calls = (0, 0), 0


_learnt: OrderedDict[tuple[int, ...], _Learnt] = OrderedDict()
_MAX_LEARNT = 256


def _room(count: int) -> int:
    return min(MAX_INDEX, int(count * _HEADROOM) // 4096 * 4096 + 4096)


def _learnt_for(key: tuple[int, ...], n_pairs: int) -> _Learnt:
    found = _learnt.get(key)
    if found is None:
        records = min(n_pairs, _room(int(n_pairs * _FIRST_RECORDS)))
        found = _learnt[key] = _Learnt(records, _room(int(records * _FIRST_INTERSECTIONS)))
        while len(_learnt) > _MAX_LEARNT:
            _learnt.popitem(last=False)
    return found


def render(
    means: Tensor,  # [B, N, 3]
    quats: Tensor | None,  # [B, N, 4]
    scales: Tensor | None,  # [B, N, 3]
    covars: Tensor | None,  # [B, N, 3, 3]
    opacities: Tensor,  # [B, N]
    colors: Tensor | None,  # [B, (C,) N, D] or [B, (C,) N, K, 3]
    viewmats: Tensor,  # [B, C, 4, 4]
    Ks: Tensor,  # [B, C, 3, 3]
    backgrounds: Tensor | None,  # [I, Dc] or [I, H, W, Dc]
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
    keep_state: bool = False,
    capacities: tuple[int, int] | None = None,
    stage_events: Sequence[torch.cuda.Event] | None = None,
    network: Network | None = None,
    network_input: NetworkInput | None = None,
) -> Rendered:
    """Renders on the GPU that holds the tensors, on the caller's current stream there.

    Colours are given, or (None) come from ``network`` fed with ``network_input``; that takes one scene.

    Returns once the numbers of records and intersections are known, which is before the pixels are.
    ``capacities`` overrides what was learnt of them. With ``keep_state`` the state also holds what a backward
    pass starts from: each pixel's final transmittance and the place of its last record in its tile's list.
    ``stage_events`` are six events that have been recorded before; they are recorded again around the stages.

    Raises: RuntimeError for more than 2^31 - 1 records or intersections in one call.
    """
    post = postprocess or PostProcess()
    n_pairs = means.shape[0] * viewmats.shape[1] * means.shape[1]
    if n_pairs > MAX_INDEX:
        raise RuntimeError(
            f"means and viewmats make {n_pairs} (Gaussian, camera) pairs, more than {MAX_INDEX} in one call: "
            "render fewer cameras at a time"
        )
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "rapfast.rasterization cannot be captured in a CUDA graph yet: it reads back how many records a call has"
        )
    expected_depth = render_mode.endswith("ED")
    if render_mode in ("D", "ED"):
        backgrounds = None
    with_composite = backgrounds is not None or expected_depth or post != PostProcess()
    clamp_min, clamp_max = post.clamp or (None, None)
    out_height, out_width = post.size or (height, width)
    key = (means.device.index, means.shape[0], viewmats.shape[1], means.shape[1], width, height)
    learnt = _learnt_for(key, n_pairs)
    record_capacity, capacity = capacities or learnt.capacities
    mean, std = (None if v is None else _constants(v, means.device) for v in (post.mean, post.std))
    # The operator has no place for events: timing calls its implementation.
    run = render_op if stage_events is None else partial(
        _cuda, stage_events=torch.tensor([event.cuda_event for event in stage_events], dtype=torch.int64)
    )  # fmt: skip
    net = operator_arguments(network, network_input)
    while True:
        images, alphas, n_invalid, state, counts = run(
            means, quats, scales, covars, opacities, viewmats, Ks, colors, backgrounds, mean, std,
            width, height, CAMERA_MODELS[camera_model], antialiased, eps2d, near_plane, far_plane, radius_clip,
            -1 if sh_degree is None else sh_degree,
            colors is not None and colors.dim() == (4 if sh_degree is None else 5),
            DEPTH_CHANNELS[render_mode], alpha_cap, with_composite, expected_depth, clamp_min, clamp_max,
            out_height, out_width, post.layout == "CHW", PIXEL_TYPES[post.dtype], record_capacity, capacity,
            keep_state, *net,
        )  # fmt: skip
        n_records, n_intersections = counts.tolist()
        if n_records <= record_capacity and n_intersections <= capacity:
            break
        if max(n_records, n_intersections) > MAX_INDEX:
            raise RuntimeError(
                f"the call needs {n_records} records and {n_intersections} intersections, more than {MAX_INDEX}: "
                "render fewer cameras or smaller images at a time"
            )
        del images, alphas, n_invalid, state  # their memory serves the next run
        record_capacity = max(record_capacity, min(n_pairs, _room(n_records)))
        capacity = max(capacity, _room(n_intersections))
    sizes = _sizes(
        means, viewmats, colors, width, height, DEPTH_CHANNELS[render_mode], record_capacity, capacity, keep_state
    )
    if capacities is None:
        learnt.note((record_capacity, capacity), (n_records, n_intersections), n_pairs)
    if post.layout == "CHW":
        alphas = alphas.permute(0, 3, 1, 2)
    return Rendered(images, alphas, n_invalid, state, sizes, n_records, n_intersections)


def _part(rendered: Rendered, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    begin, size = _layout(rendered.sizes)[name], dtype.itemsize * math.prod(shape)
    return rendered.state[begin : begin + size].view(dtype).reshape(shape)


def state_records(rendered: Rendered) -> Records:
    """The visible pairs of a call, cut out of its state. Reads no input of the call."""
    n = rendered.n_records
    # The stream that reads may not be the one that rendered, whose allocator would hand the state on.
    rendered.state.record_stream(torch.cuda.current_stream(rendered.state.device))
    return without_dead(
        Records(
            records=_part(rendered, "records", torch.float32, n, len(RECORD_FIELDS)),
            radii=_part(rendered, "radii", torch.int32, n, 2),
            gaussian_ids=_part(rendered, "gaussian_ids", torch.int32, n),
            image_offsets=_part(rendered, "image_offsets", torch.int64, rendered.n_invalid.shape[0] + 1),
            n_invalid=rendered.n_invalid,
        )
    )


def state_pixels(rendered: Rendered) -> tuple[Tensor, Tensor]:
    """Of a call with ``keep_state``: final transmittance [I, H, W], and the place of each pixel's last record in
    its tile's list [I, H, W] int32, -1 where no record reached it."""
    shape = (rendered.n_invalid.shape[0], rendered.sizes.height, rendered.sizes.width)
    return (
        _part(rendered, "transmittances", torch.float32, *shape),
        _part(rendered, "last_ids", torch.int32, *shape),
    )


STAGES = ("project", "color", "bin", "blend", "composite")


def stage_times(
    means: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    scales: Tensor,  # [N, 3]
    opacities: Tensor,  # [N]
    colors: Tensor | None,  # [N, D] or [N, K, 3]; None: of the network
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    width: int,
    height: int,
    sh_degree: int | None = None,
    *,
    antialiased: bool = False,
    network: Network | None = None,
    network_input: NetworkInput | None = None,
    repeats: int = 9,
) -> dict[str, float]:
    """Milliseconds that each stage of one call takes on the GPU, the median of ``repeats`` calls, for a plain
    pinhole render of colours. Time in which the GPU waits for the host counts to the stage that waits."""
    batched = [tensor[None].contiguous() for tensor in (means, quats, scales)]
    colors = None if colors is None else colors[None].contiguous()
    opacities, viewmats, Ks = (tensor[None].contiguous() for tensor in (opacities, viewmats, Ks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(STAGES) + 1)]
    stream = torch.cuda.current_stream(means.device)
    for event in events:
        event.record(stream)  # creates it

    def run() -> list[float]:
        render(
            *batched, None, opacities, colors, viewmats, Ks, None, width, height, camera_model="pinhole",
            antialiased=antialiased, eps2d=0.3, near_plane=0.01, far_plane=1e10, radius_clip=0.0,
            sh_degree=sh_degree, render_mode="RGB", alpha_cap=0.999, stage_events=events, network=network,
            network_input=network_input,
        )  # fmt: skip
        events[-1].synchronize()
        return [begin.elapsed_time(end) for begin, end in zip(events, events[1:], strict=False)]

    for _ in range(3):
        run()
    runs = [run() for _ in range(repeats)]
    return {name: statistics.median(times) for name, times in zip(STAGES, zip(*runs, strict=True), strict=True)}
