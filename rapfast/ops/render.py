"""All stages of a call on the GPU by one operator: one native call, no stop between the stages."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from rapfast.ops._library import TILE_SIZE, address, aligned, current_stream, define, native, scratch
from rapfast.ops.color import DEPTH_CHANNELS, output_channels
from rapfast.ops.color_net import SCHEMA, Network, NetworkInput, net_arguments, operator_arguments, view_table
from rapfast.ops.composite import PIXEL_TYPES, output_tensors
from rapfast.ops.project import CAMERA_MODELS
from rapfast.ops.split import TooLarge
from rapfast.ops.state import Rendered, Sizes, layout, pixel_rows
from rapfast.postprocess import PostProcess
from rapfast.profiling import native_stages

MAX_INDEX = (1 << 31) - 1
"""Most records, and most pairs of tiles (or regions) and records, of one native call: their indices are 32 bits."""

MAX_REGIONS = 1 << 12
"""Most regions of 8x4 tiles of an image, or of a band of one, in a native call: kMostRegions in csrc/cuda/scratch.h."""

# Rows per (image, Gaussian) pair and per record that a size seen for the first time starts with. Too few cost
# one or two more runs of the first stages, once.
_FIRST_RECORDS = 0.15
_FIRST_INTERSECTIONS = 4.0
_HEADROOM = 1.125

# Bytes of state and scratch that are one allocation: to hold on to the scratch as well costs little then, and the next
# call finds one free block where this one did, which lets it be launched as a graph.
_SMALL = 32 << 20


class _Form(NamedTuple):
    """What calls of one kind have in common, in the operator's order."""

    width: int
    height: int
    camera_model: int
    antialiased: bool
    eps2d: float
    near_plane: float
    far_plane: float
    radius_clip: float
    sh_degree: int  # -1: colours are given
    per_camera: bool
    depth_channel: int
    alpha_cap: float
    with_composite: bool
    expected_depth: bool
    clamp_min: float | None
    clamp_max: float | None
    out_height: int
    out_width: int
    channels_first: bool
    pixel_type: int


class _Room(NamedTuple):
    """What there is room for and which rows are drawn, in the operator's order."""

    record_capacity: int
    capacity: int
    keep_state: bool
    first_tile_row: int
    n_tile_rows: int
    fixed_room: bool


@lru_cache(maxsize=256)
def _form(
    width: int, height: int, camera_model: str, antialiased: bool, eps2d: float, near_plane: float, far_plane: float,
    radius_clip: float, sh_degree: int | None, render_mode: str, alpha_cap: float, post: PostProcess | None,
    with_background: bool, per_camera: bool, tile_rows: tuple[int, int] | None,
) -> tuple[_Form, int, int]:  # fmt: skip
    """The form, and the first row of tiles and their number."""
    all_rows = -(-height // TILE_SIZE)
    first_row, n_rows = tile_rows or (0, all_rows)
    if first_row < 0 or not 0 < n_rows <= all_rows - first_row:
        raise ValueError(f"tile_rows must be (first, count) of {all_rows} rows of tiles, got {tile_rows}")
    with_post = post is not None and post != PostProcess()
    post = post or PostProcess()
    if tile_rows is not None and post.size is not None:
        raise ValueError(f"postprocess.size must be None with tile_rows, got {post.size}")
    expected_depth = render_mode in ("ED", "RGB+ED")
    clamp_min, clamp_max = post.clamp or (None, None)
    out_height, out_width = post.size or (pixel_rows(height, first_row, n_rows), width)
    form = _Form(
        width, height, CAMERA_MODELS[camera_model], antialiased, eps2d, near_plane, far_plane, radius_clip,
        -1 if sh_degree is None else sh_degree, per_camera, DEPTH_CHANNELS[render_mode], alpha_cap,
        with_background or expected_depth or with_post, expected_depth, clamp_min, clamp_max, out_height, out_width,
        post.layout == "CHW", PIXEL_TYPES[post.dtype],
    )  # fmt: skip
    return form, first_row, n_rows


@lru_cache(maxsize=32)  # each may keep a few CUDA graphs, whose memory torch does not count
def _plan(
    form: _Form, room: _Room, device: int, n_scenes: int, n_cameras: int, n_gaussians: int, n_channels: int,
    n_bases: int, n_color_channels: int, shared_colors: bool, with_net: bool, background_kind: int,
) -> Any:  # fmt: skip
    """A call in the native module's form, but for its addresses: what a loop's next call will ask for again."""
    numbers = form._asdict()
    clamp_min, clamp_max = numbers.pop("clamp_min"), numbers.pop("clamp_max")
    return native.RenderPlan(
        **numbers,
        **room._asdict(),
        device=device,
        n_scenes=n_scenes,
        n_cameras=n_cameras,
        n_gaussians=n_gaussians,
        n_channels=n_channels,
        n_bases=n_bases,
        n_color_channels=n_color_channels,
        shared_colors=shared_colors,
        with_net=with_net,
        background_kind=background_kind,
        clamp=clamp_min is not None,
        clamp_min=0.0 if clamp_min is None else clamp_min,
        clamp_max=0.0 if clamp_max is None else clamp_max,
    )


@cache  # a few bytes each, and captured graphs read them where they lie
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on the device. Copied there once: each copy from ordinary memory stops the stream."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the numbers {values} of postprocess are not on {device} yet and cannot be copied there while a CUDA "
            "graph is captured: render once with this postprocess before the capture"
        )
    tensor = torch.tensor(values, dtype=torch.float32, device=device)
    torch.cuda.current_stream(device).synchronize()  # other streams will read it too
    return tensor


class _Buffers(NamedTuple):
    blended: Tensor  # [I, rows, W, D]
    alphas: Tensor  # [I, rows, W, 1]
    images: Tensor  # [I, h, w, D] or [I, D, h, w]; `blended` where nothing is asked of it
    out_alphas: Tensor  # [I, h, w, 1]; likewise
    state: Tensor
    scratch: Tensor


class Memory:
    """What calls with fixed room work and draw in, kept from one to the next. The first call must be of the most
    images; the form of all is the same.

    ``worst`` [3] int64 is the largest `Rendered.status` since it was last cleared.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffers: _Buffers | None = None
        self.worst = torch.zeros(3, dtype=torch.int64, device=device)


def _plan_of(means: Tensor, viewmats: Tensor, colors: Tensor | None, backgrounds: Tensor | None, form: _Form,
             room: _Room, with_net: bool) -> tuple[Any, int, int]:  # fmt: skip
    """The plan of a call, its number of images and that of blended channels."""
    shape = means.shape
    n_scenes, n_cameras = shape[0] if len(shape) == 3 else math.prod(shape[:-2]), viewmats.shape[-3]
    n_channels = output_channels(colors, form.depth_channel)
    shared = n_scenes > 1 and colors is not None and colors.shape[: len(shape) - 2].numel() == 1
    plan = _plan(
        form, room, means.get_device(), n_scenes, n_cameras, shape[-2], n_channels,
        colors.shape[-2] if form.sh_degree >= 0 else 1, 3 if colors is None else colors.shape[-1], shared, with_net,
        0 if backgrounds is None else 1 if backgrounds.dim() == 2 else 2,
    )  # fmt: skip
    return plan, n_scenes * n_cameras, n_channels


def _outputs(
    means: Tensor, n_images: int, n_channels: int, form: _Form, room: _Room, out: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blended colours and alphas, and what is made of them: ``out``, where it is given."""
    if out is not None and not form.with_composite:
        return *out, *out
    rows = pixel_rows(form.height, room.first_tile_row, room.n_tile_rows)
    blended = means.new_empty((n_images, rows, form.width, n_channels))
    alphas = means.new_empty((n_images, rows, form.width, 1))
    if not form.with_composite:
        return blended, alphas, blended, alphas
    images, out_alphas = out or output_tensors(
        blended, form.out_height, form.out_width, form.channels_first, form.pixel_type
    )
    return blended, alphas, images, out_alphas


def _run(
    means, quats, scales, covars, opacities, viewmats, Ks, colors, backgrounds, mean, std, form, room, net, maps,
    map_ids, view_weights, net_form, net_layers, coord_scale, stage_events=None, memory=None, out=None, together=False,
):  # fmt: skip
    """Images, alphas, state, and the counts as plain numbers (-1 with ``fixed_room``). ``together``: the state's memory
    may hold the scratch too, behind it."""
    plan, n_images, n_channels = _plan_of(means, viewmats, colors, backgrounds, form, room, bool(net))
    quats, colors = aligned(quats), aligned(colors)
    kept = None if memory is None else memory.buffers
    if kept is not None:
        state, work = kept.state, kept.scratch
        if plan.state_size > state.nbytes or plan.scratch_size > work.nbytes:
            raise RuntimeError(
                f"the call needs {plan.state_size} and {plan.scratch_size} bytes of state and scratch, the memory that "
                f"it is given has {state.nbytes} and {work.nbytes}"
            )
        work_address = work.data_ptr()
    elif together and plan.state_size + plan.scratch_size <= _SMALL:
        state = work = scratch(means, plan.state_size + plan.scratch_size)
        work_address = state.data_ptr() + plan.state_size
    else:
        state, work = scratch(means, plan.state_size), scratch(means, plan.scratch_size)
        work_address = work.data_ptr()
    network = None
    if net:
        views = view_table(maps, map_ids, view_weights)
        layers = torch.tensor(net_layers, dtype=torch.int64, device="cpu")
        network = net_arguments(net, net_form, net_layers, coord_scale, views, layers)
    call = plan.begin(
        means.data_ptr(), address(quats), address(scales), address(covars), opacities.data_ptr(), viewmats.data_ptr(),
        Ks.data_ptr(), address(colors), address(backgrounds), address(mean), address(std), state.data_ptr(),
        work_address, 0 if memory is None else memory.worst.data_ptr(), address(stage_events), network,
        current_stream(means.get_device()),
    )  # fmt: skip
    # The GPU has begun.
    outputs = _outputs(means, n_images, n_channels, form, room, out) if kept is None else kept[:4]
    counts = call.finish(*[x.data_ptr() for x in outputs])
    images, alphas = outputs[2:]
    if memory is not None:
        memory.buffers = kept or _Buffers(*outputs, state, work)
        images, alphas = images[:n_images], alphas[:n_images]
    return images, alphas, state, counts


_N_TENSORS, _N_FORM, _N_ROOM = 11, len(_Form._fields), len(_Room._fields)


def _cuda(*arguments):
    tensors, rest = arguments[:_N_TENSORS], arguments[_N_TENSORS:]
    form, room, net = rest[:_N_FORM], rest[_N_FORM : _N_FORM + _N_ROOM], rest[_N_FORM + _N_ROOM :]
    *outputs, counts = _run(*tensors, _Form(*form), _Room(*room), *net)
    return *outputs, torch.tensor(counts, dtype=torch.int64, device="cpu")


def _fake(
    means, quats, scales, covars, opacities, viewmats, Ks, colors, backgrounds, mean, std, width, height,
    camera_model, antialiased, eps2d, near_plane, far_plane, radius_clip, sh_degree, per_camera, depth_channel,
    alpha_cap, with_composite, expected_depth, clamp_min, clamp_max, out_height, out_width, channels_first,
    pixel_type, record_capacity, capacity, keep_state, first_tile_row, n_tile_rows, fixed_room, net, maps,
    map_ids, view_weights, net_form, net_layers, coord_scale,
):  # fmt: skip
    sizes = Sizes(
        math.prod(means.shape[:-2]), viewmats.shape[-3], means.shape[-2], width, height,
        output_channels(colors, depth_channel), record_capacity, capacity, keep_state, first_tile_row, n_tile_rows,
    )  # fmt: skip
    blended = means.new_empty((sizes.n_images, sizes.rows, width, sizes.n_channels))
    out, out_alphas = blended, means.new_empty((sizes.n_images, sizes.rows, width, 1))
    if with_composite:
        out, out_alphas = output_tensors(blended, out_height, out_width, channels_first, pixel_type)
    state = means.new_empty((layout(sizes)["size"],), dtype=torch.uint8)
    return out, out_alphas, state, torch.empty(3, dtype=torch.int64, device="cpu")


# Images, alphas, state, and on the host the records and room for pairs wanted, and with keep_state the visible records.
render_op = define(
    "render(Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor opacities, Tensor viewmats, Tensor Ks, "
    "Tensor? colors, Tensor? backgrounds, Tensor? mean, Tensor? std, int width, int height, int camera_model, "
    "bool antialiased, float eps2d, float near_plane, float far_plane, float radius_clip, int sh_degree, "
    "bool per_camera, int depth_channel, float alpha_cap, bool with_composite, bool expected_depth, "
    "float? clamp_min, float? clamp_max, int out_height, int out_width, bool channels_first, int pixel_type, "
    "int record_capacity, int capacity, bool keep_state, int first_tile_row, int n_tile_rows, bool fixed_room, "
    + SCHEMA
    + ") -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    cuda=_cuda,
)


def is_watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether anything but plain execution wants to know of a call: a compiler, a tracer, a mode, a transform, a
    tensor subclass. Then it must be the registered operator; else its implementation is called, which saves the
    13 us that torch takes to pass forty arguments twice."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not _PLAIN_TENSORS.issuperset(map(type, tensors))
    )


_PLAIN_TENSORS = frozenset({Tensor, Parameter, type(None)})


class _Learnt:
    """Capacities for one problem size, from the calls so far. Results never depend on them.

    They grow at once, for a call that finds too little room runs again, and shrink when a whole window of calls has
    needed less than half: room costs memory, and its part that must be zero costs time.
    """

    _WINDOW = 16

    def __init__(self, records: int, intersections: int) -> None:
        self.capacities = records, intersections
        self.is_guess = True
        self._needed = (0, 0)
        self._calls = 0

    def grow(self, capacities: tuple[int, int]) -> None:
        """A call needs these."""
        self.capacities = max(self.capacities[0], capacities[0]), max(self.capacities[1], capacities[1])

    def note(self, used: tuple[int, int], needed: tuple[int, int], n_pairs: int) -> None:
        """One call had the capacities ``used`` and needed these counts."""
        self.is_guess = False
        self.grow(used)
        self._needed = max(self._needed[0], needed[0]), max(self._needed[1], needed[1])
        self._calls += 1
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
    means: Tensor,  # [..., N, 3]
    quats: Tensor | None,  # [..., N, 4]
    scales: Tensor | None,  # [..., N, 3]
    covars: Tensor | None,  # [..., N, 3, 3]
    opacities: Tensor,  # [..., N]
    colors: Tensor | None,  # [..., (C,) N, D] or [..., (C,) N, K, 3]; [1 ..., N, ...]: of all scenes
    viewmats: Tensor,  # [..., C, 4, 4]
    Ks: Tensor,  # [..., C, 3, 3]
    backgrounds: Tensor | None,  # [I, Dc] or [I, H, W, Dc], of the tile rows alone
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
    network: Network | None = None,
    network_input: NetworkInput | None = None,
    tile_rows: tuple[int, int] | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    max_bytes: int | None = None,
    memory: Memory | None = None,
) -> Rendered:
    """Renders on the GPU that holds the tensors, on the caller's current stream there.

    Colours are given, or (None) come from ``network`` fed with ``network_input``; that takes one scene.

    Returns once the numbers of records and pairs are known, which is before the pixels are.
    ``capacities`` overrides what was learnt of them. With ``keep_state`` the state also holds what a backward
    pass starts from: each pixel's final transmittance and the place of its last record in its tile's list.
    Where a profiler asks for the stages (`rapfast.profiling`), events are recorded between them.

    While a CUDA graph is captured nothing can be read back, and the room is what it is: ``capacities``, or what
    calls of these sizes have learnt. So it is with ``memory`` and ``capacities``, where all is drawn in that memory.
    Where a call or a replay wants more room, all outputs are NaN (integers 0), and the last of `Rendered.status` is 1.

    With ``tile_rows`` (first, count) only these rows of tiles are drawn, and images and alphas hold theirs alone; the
    records are the whole view's. ``out`` are contiguous images and alphas to write to, as the call would allocate them.

    Raises:
        TooLarge: before anything of that size is allocated, where there are more than 2^31 - 1 (Gaussian, camera)
            pairs, records or intersections, more than `MAX_REGIONS` regions, or where the call takes more than
            ``max_bytes`` with its outputs.
        RuntimeError: a graph is captured and nothing tells how much room the call needs.
        ValueError: the image does not have the rows, or they are to be resized.
    """
    n_gaussians, n_cameras = means.shape[-2], viewmats.shape[-3]
    n_images = viewmats.shape[:-2].numel()
    n_pairs = n_images * n_gaussians
    if n_pairs > MAX_INDEX:
        raise TooLarge(
            f"means and viewmats make {n_pairs} (Gaussian, camera) pairs, more than {MAX_INDEX} in one call: "
            "render fewer cameras at a time",
            None,
        )
    if render_mode in ("D", "ED"):
        backgrounds = None
    per_camera = colors is not None and colors.dim() - means.dim() == (1 if sh_degree is None else 2)
    form, first_row, n_rows = _form(
        width, height, camera_model, antialiased, eps2d, near_plane, far_plane, radius_clip, sh_degree, render_mode,
        alpha_cap, postprocess, backgrounds is not None, per_camera, tile_rows,
    )  # fmt: skip
    n_regions = -(-width // (8 * TILE_SIZE)) * -(-n_rows // 4)
    if n_regions > MAX_REGIONS:
        size = f"{width}x{pixel_rows(height, first_row, n_rows)}"
        raise TooLarge(
            f"{size} pixels are {n_regions} regions of 128x64, and a native call draws at most "
            f"{MAX_REGIONS}; larger images are drawn in bands of tile rows, but not with gradients, in a CUDA graph or "
            "by a Renderer",
            None,
        )
    device = means.get_device()
    learnt = _learnt_for((device, n_images, n_cameras, n_gaussians, width, height, first_row, n_rows), n_pairs)
    record_capacity, capacity = capacities or learnt.capacities
    fixed_room = memory is not None or torch.cuda.is_current_stream_capturing()
    if fixed_room and capacities is None and learnt.is_guess:
        raise RuntimeError(
            f"a CUDA graph is being captured and no call has shown how much room {n_images} images of {width}x{height} "
            f"pixels of {n_gaussians} Gaussians need: render them once before the capture, or use rapfast.Renderer"
        )
    mean = std = None
    if postprocess is not None:
        # Under a tracing mode the tensor is the mode's, not to be kept.
        made = constants.__wrapped__ if torch._C._len_torch_dispatch_stack() else constants
        mean, std = (None if v is None else made(v, means.device) for v in (postprocess.mean, postprocess.std))
    inputs = means, quats, scales, covars, opacities, viewmats, Ks, colors, backgrounds, mean, std
    net = operator_arguments(network, network_input)
    extras: dict[str, Any] = {}
    if memory is not None:
        extras["memory"] = memory
    if out is not None:
        extras["out"] = out
    # The operator has no place for extras: they belong to one process and take no part in tracing.
    through_operator = not extras and is_watched(inputs)
    stages = None if through_operator else native_stages(device)
    if stages is not None:
        extras["stage_events"] = torch.tensor(stages.handles, dtype=torch.int64, device="cpu")
    while True:
        room = _Room(record_capacity, capacity, keep_state, first_row, n_rows, fixed_room)
        if max_bytes is not None:
            plan, _, n_channels = _plan_of(means, viewmats, colors, backgrounds, form, room, network is not None)
            n_bytes = plan.state_size + plan.scratch_size + _output_bytes(n_images, n_channels, form, room)
            if n_bytes > max_bytes:
                raise TooLarge(f"the call needs {n_bytes} bytes, more than {max_bytes}", n_bytes)
        if through_operator:
            images, alphas, state, counts = render_op(*inputs, *form, *room, *net)
            n_records, n_intersections, n_visible = counts.tolist()
        else:
            images, alphas, state, (n_records, n_intersections, n_visible) = _run(
                *inputs, form, room, *net, together=max_bytes is None and memory is None, **extras
            )
        if n_records <= record_capacity and n_intersections <= capacity:
            break
        if max(n_records, n_intersections) > MAX_INDEX:
            raise TooLarge(
                f"the call needs {n_records} records and room for {n_intersections} pairs, more than {MAX_INDEX}: "
                "render fewer cameras or smaller images at a time",
                None,
            )
        del images, alphas, state  # their memory serves the next run
        record_capacity = max(record_capacity, min(n_pairs, _room(n_records)))
        capacity = max(capacity, _room(n_intersections))
        if capacities is None:
            learnt.grow((record_capacity, capacity))  # so that the next call refuses at once where this one does
    if stages is not None:
        stages.done()
    if capacities is None and not fixed_room:
        learnt.note((record_capacity, capacity), (n_records, n_intersections), n_pairs)
    if form.channels_first:
        alphas = alphas.permute(0, 3, 1, 2)
    n_channels = output_channels(colors, form.depth_channel)
    sizes = Sizes(n_images // (n_cameras or 1), n_cameras, n_gaussians, width, height, n_channels, *room[:5])
    return Rendered(images, alphas, state, sizes, n_records, n_intersections, n_visible)


def _output_bytes(n_images: int, n_channels: int, form: _Form, room: _Room) -> int:
    """Of blended colours and alphas, and of the images made of them."""
    pixels = pixel_rows(form.height, room.first_tile_row, room.n_tile_rows) * form.width
    n_bytes = 4 * pixels * (n_channels + 1)
    if form.with_composite:
        item = {2: 2, 3: 1}.get(form.pixel_type, 4)
        n_bytes += form.out_height * form.out_width * (n_channels * item + 4)
    return n_images * n_bytes
