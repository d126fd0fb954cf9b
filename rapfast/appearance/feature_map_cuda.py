"""Feature maps on a GPU: fast, and each image's bits its own.

Convolution libraries choose their algorithm by batch size, and some round by an image's place in the batch. So images
go through the network in batches of one fixed size, filled up where images are missing: 4, 2 or 1, the first for
which places were seen not to matter, which is tried once for each image size. A CUDA graph runs up to 8 images, its
batches side by side on streams of their own, and takes away what launching some 120 kernels a batch costs.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapfast._native import _C as native

LONGEST_SIDE = 6400
"""Pixels of a side up to which torch's nearest resize by (s + 1) / s is a crop: its float32 factor errs beyond."""

GRAPHS = (1, 2, 4, 8)
"""Images of a graph; the smallest that holds a group runs it."""

PIXELS = 8 * 854 * 480
"""Pixels of a graph's images together, which bounds its memory: larger images go fewer at a time, and so do wider
types than float16."""

KEPT_SIZES = 4
"""Image sizes whose graphs are kept."""

EAGER_IMAGES = 8
"""Images of a size that run without a graph first: they load the kernels, and a size seldom seen needs no graph."""

EPS = 1e-5


class Steps(Protocol):
    """What a graph is made of: a batch of images through the network."""

    dtype: torch.dtype
    """Of the maps."""
    batches: tuple[int, ...]
    """How many images may share their convolutions, best first, where that changes no bit."""

    def inputs(self, n: int, height: int, width: int) -> Tensor:
        """n images, black until `inputs[:, :3].copy_(images)`."""

    def scratch(self, n: int) -> Any:
        """What `run` needs besides for n images, not shared by batches that run at the same time."""

    def run(self, images: Tensor, scratch: Any) -> Tensor:
        """A batch of `inputs` -> [n, 48, h, w] that `finish` takes."""

    def finish(self, made: Tensor, out: Tensor) -> None:
        """Writes the maps [n, 48, h, w]."""


class PlainSteps:
    """The module itself, in its own dtype. Its weights are read where they lie."""

    batches = ()

    def __init__(self, net: nn.Module) -> None:
        self._net = weakref.ref(net)
        weight = next(net.parameters())
        self.dtype, self.device = weight.dtype, weight.device

    def inputs(self, n: int, height: int, width: int) -> Tensor:
        return torch.zeros(n, 3, height, width, dtype=self.dtype, device=self.device)

    def scratch(self, n: int) -> None:
        return None

    def run(self, images: Tensor, scratch: None) -> Tensor:
        return self._net()(images)

    def finish(self, made: Tensor, out: Tensor) -> None:
        out.copy_(made)


class HalfSteps:
    """The network in half precision, channels last, with what lies between the convolutions in kernels of ours.

    Its arithmetic is the module's but for three rewritings. A transposed convolution of size and stride 2 is a 1x1
    convolution to four times the channels whose outputs are moved apart; where the nearest resize behind it halves
    the size again, only one of the four is needed. A resize by (s + 1) / s is a crop. A bias in front of a norm
    changes nothing.
    """

    dtype = torch.float16
    batches = (4, 2)

    def __init__(self, net: nn.Module) -> None:
        own = {name: value.detach() for name, value in net.named_parameters()}
        self.device = own["final_conv.weight"].device
        single = {"dtype": torch.float32, "copy": True}
        half = {"dtype": torch.float16, "copy": True, "memory_format": torch.channels_last}
        self.convs = {}
        self.norms = {}
        for name, value in own.items():
            module, entry = name.rsplit(".", 1)
            if entry == "weight" and value.dim() == 4 and not (module.startswith("decoder") and "conv" not in module):
                self.convs[module] = value
            elif entry == "weight" and value.dim() == 1:
                self.norms[module] = (value.to(**single), own[f"{module}.bias"].to(**single))
        # Four input channels, the last of them zero: the tensor cores' first-layer kernel takes no three.
        self.convs["encoder.0"] = F.pad(self.convs["encoder.0"], (0, 0, 0, 0, 0, 1))
        self.up_biases = {}
        for i in (0, 2, 4, 6):
            weight = own[f"decoder.{i}.weight"]
            self.convs[f"decoder.{i}"] = weight.permute(2, 3, 1, 0).reshape(-1, len(weight), 1, 1)
            self.up_biases[i] = own[f"decoder.{i}.bias"].to(**single)
        self.convs["decoder.6.first"] = own["decoder.6.weight"][:, :, 0, 0].t()[:, :, None, None]
        self.final_bias = own["final_conv.bias"].to(**single)
        self.convs = {name: weight.to(**half) for name, weight in self.convs.items()}

    def tensors(self) -> list[Tensor]:
        """All weights, in a fixed order."""
        norms = [value for pair in self.norms.values() for value in pair]
        return [*self.convs.values(), *norms, *self.up_biases.values(), self.final_bias]

    def inputs(self, n: int, height: int, width: int) -> Tensor:
        return self._empty(n, 4, height, width).zero_()

    def scratch(self, n: int) -> Tensor:
        return torch.zeros(n * native.map_stats_scratch, dtype=torch.uint8, device=self.device)

    def run(self, images: Tensor, scratch: Tensor) -> Tensor:
        stem = self._conv(images, "encoder.0", stride=2, padding=3)
        # Beside each skip there is room for what comes up from below: the concatenation is never made.
        joined = [self._room_beside(stem)]
        x = self._pool(stem, self._stats(stem, "encoder.1", scratch, copy=joined[0]))
        for layer, stride in ((4, 1), (5, 2), (6, 2), (7, 2)):
            x, _ = self._block(x, f"encoder.{layer}.0", stride, scratch)
            x, room = self._block(x, f"encoder.{layer}.1", 1, scratch, is_skip=layer != 7)
            joined.append(room)
        # The last step twice, as in the module: first at the size of layer 1, whose skip is still there.
        for i, level, factor in ((0, 3, 2), (2, 2, 2), (4, 1, 2), (6, 1, 1), (6, 0, 2)):
            above = self._conv(x, f"decoder.{i}" if factor == 2 else f"decoder.{i}.first")
            self._unfold(above, factor, self.up_biases[i], joined[level], joined[level].shape[1] // 2)
            x = joined[level]
            for conv in (0, 3):
                x = self._conv(x, f"decoder.{i + 1}.conv.{conv}", padding=1)
                x, _ = self._norm(x, self._stats(x, f"decoder.{i + 1}.conv.{conv + 1}", scratch))
        return self._conv(x, "final_conv")

    def finish(self, made: Tensor, out: Tensor) -> None:
        self._unfold(made, 1, self.final_bias, out, made.shape[1])

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float16, device=self.device, memory_format=torch.channels_last)

    def _room_beside(self, skip: Tensor) -> Tensor:
        n_images, channels, height, width = skip.shape
        return self._empty(n_images, 2 * channels, height, width)

    def _conv(self, x: Tensor, name: str, *, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, self.convs[name], None, stride, padding).contiguous(memory_format=torch.channels_last)

    def _block(
        self, x: Tensor, name: str, stride: int, scratch: Tensor, is_skip: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """A residual block's output, and for a skip the tensor whose second half it is too."""
        y = self._conv(x, f"{name}.conv1", stride=stride, padding=1)
        y, _ = self._norm(y, self._stats(y, f"{name}.bn1", scratch))
        y = self._conv(y, f"{name}.conv2", padding=1)
        shortcut_norm = None
        if f"{name}.downsample.0" in self.convs:
            x = self._conv(x, f"{name}.downsample.0", stride=stride)
            shortcut_norm = self._stats(x, f"{name}.downsample.1", scratch)
        return self._norm(y, self._stats(y, f"{name}.bn2", scratch), x, shortcut_norm, is_skip)

    def _stats(self, x: Tensor, name: str, scratch: Tensor, copy: Tensor | None = None) -> Tensor:
        """[n, 3, C]: mean, scale and bias of the norm; x goes into the second half of `copy`'s channels too."""
        n_images, channels, height, width = x.shape
        weight, bias = self.norms[name]
        norm = torch.empty(n_images, 3, channels, device=self.device)
        native.map_stats_cuda(
            n_images=n_images,
            n_pixels=height * width,
            channels=channels,
            eps=EPS,
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=bias.data_ptr(),
            copy=0 if copy is None else copy[:, channels:].data_ptr(),
            copy_pitch=2 * channels,
            scratch=scratch.data_ptr(),
            norm=norm.data_ptr(),
            **self._place(),
        )
        return norm

    def _norm(
        self,
        x: Tensor,
        norm: Tensor,
        residual: Tensor | None = None,
        residual_norm: Tensor | None = None,
        is_skip: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """relu(norm(x) + residual), and for a skip the tensor whose second half it is too."""
        n_images, channels, height, width = x.shape
        y = torch.empty_like(x)
        room = self._room_beside(y) if is_skip else None
        native.map_norm_cuda(
            n_images=n_images,
            n_pixels=height * width,
            channels=channels,
            x=x.data_ptr(),
            norm=norm.data_ptr(),
            residual=0 if residual is None else residual.data_ptr(),
            residual_norm=0 if residual_norm is None else residual_norm.data_ptr(),
            y=y.data_ptr(),
            copy=0 if room is None else room[:, channels:].data_ptr(),
            copy_pitch=2 * channels,
            **self._place(),
        )
        return y, room

    def _pool(self, x: Tensor, norm: Tensor) -> Tensor:
        n_images, channels, height, width = x.shape
        y = self._empty(n_images, channels, (height + 1) // 2, (width + 1) // 2)
        native.map_pool_cuda(
            n_images=n_images,
            height=height,
            width=width,
            channels=channels,
            x=x.data_ptr(),
            norm=norm.data_ptr(),
            y=y.data_ptr(),
            **self._place(),
        )
        return y

    def _unfold(self, x: Tensor, factor: int, bias: Tensor, y: Tensor, channels: int) -> None:
        """Into the first channels of y: x [1, factor^2 * channels, ., .] moved apart, plus a bias."""
        native.map_unfold_cuda(
            n_images=x.shape[0],
            factor=factor,
            in_height=x.shape[2],
            in_width=x.shape[3],
            height=y.shape[2],
            width=y.shape[3],
            channels=channels,
            x=x.data_ptr(),
            bias=bias.data_ptr(),
            y=y.data_ptr(),
            pitch=y.shape[1],
            **self._place(),
        )

    def _place(self) -> dict[str, int]:
        return {"device": self.device.index, "stream": torch.cuda.current_stream(self.device).cuda_stream}


class Graph:
    """Batches of images of one size, each on a stream of its own, as one CUDA graph."""

    def __init__(self, steps: Steps, batch: int, height: int, width: int, streams: list, pool: Any) -> None:
        # Each a tensor of its own: libraries also choose by how an address is aligned.
        self.images = [steps.inputs(batch, height, width) for _ in streams]
        self.scratch = [steps.scratch(batch) for _ in streams]
        self.made: list[Tensor] = []
        self.graph = torch.cuda.CUDAGraph()
        steps.run(self.images[0], self.scratch[0])  # what a thread's first call sets up must not be captured
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, pool=pool, stream=streams[0], capture_error_mode="thread_local"):
            for stream in streams[1:]:
                stream.wait_stream(streams[0])
            for stream, images, scratch in zip(streams, self.images, self.scratch, strict=True):
                with torch.cuda.stream(stream):
                    self.made.append(steps.run(images, scratch))
            for stream in streams[1:]:
                streams[0].wait_stream(stream)

    def __call__(self, steps: Steps, images: Tensor, out: Tensor) -> None:
        """Fewer images than the graph has places leave the others as they were."""
        batch = len(self.images[0])
        for own, some in zip(self.images, images.split(batch), strict=False):
            own[: len(some), :3].copy_(some)
        self.graph.replay()
        for made, maps in zip(self.made, out.split(batch), strict=False):
            steps.finish(made[: len(maps)], maps)


class _Size:
    """What is kept of one image size: how many ran without a graph, and the graphs, which share their memory.

    They may: no two run at the same time, and what one leaves for later (its maps) is copied before another runs.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.eager = 0
        self.graphs: dict[int, Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()


class MapMaker:
    """Feature maps of one network on one GPU in one precision; keeps its graphs. Safe to call from several threads."""

    def __init__(self, device: torch.device, half: bool) -> None:
        self.device, self.half = device, half
        self._steps: Steps | None = None
        self._weights: Any = None
        self._held: list[Tensor] = []  # a freed weight's address could come again
        self._sizes: OrderedDict[tuple[Any, ...], _Size] = OrderedDict()
        self._batches: dict[tuple[int, int], int] = {}
        self._streams = [torch.cuda.Stream(device) for _ in range(GRAPHS[-1])]
        self._done: torch.cuda.Event | None = None

    def __call__(self, net: nn.Module, images: Tensor) -> Tensor:
        """[R, 3, H, W] -> [R, 48, ceil(H/2), ceil(W/2)], channels last, on the current stream."""
        height, width = (-(-side // 2) for side in images.shape[2:])
        shape = (len(images), net.final_conv.out_channels, height, width)
        with deterministic_cudnn(), torch.cuda.device(self.device), _no_modes():
            capturing = torch.cuda.is_current_stream_capturing()
            steps = _steps(net, self.half) if capturing else self._current_steps(net)
            out = torch.empty(shape, dtype=steps.dtype, device=self.device, memory_format=torch.channels_last)
            if capturing:  # the caller's graph: all in memory of its own, and weights packed at every replay
                _eagerly(steps, self._batch(steps, *images.shape[2:], may_try=False), images, out)
                return out
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)  # another stream may still use the weights and the graphs' memory
            n = _most_at_once(steps, *images.shape[2:])
            for first in range(0, len(images), n):
                self._group(steps, images[first : first + n], out[first : first + n])
            self._done = stream.record_event()
            return out

    def _current_steps(self, net: nn.Module) -> Steps:
        """With the network's weights as they are now. Graphs stay valid where only their values changed."""
        parameters = list(net.parameters())
        places = [p.data_ptr() for p in parameters]
        if not self.half:  # the graphs read the module's own weights
            if self._weights != places:
                self._forget(len(self._sizes))
                self._steps, self._weights = _steps(net, half=False), places
                self._held = [p.detach() for p in parameters]
            return self._steps
        tracked = not any(p.is_inference() for p in parameters)
        weights = [places, [p._version for p in parameters]] if tracked else None
        if self._steps is None:
            self._steps = _steps(net, half=True)
        elif weights is None or weights != self._weights:
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)
            for kept, value in zip(self._steps.tensors(), HalfSteps(net).tensors(), strict=True):
                kept.copy_(value)
        if weights is None or weights != self._weights:
            self._held = [p.detach() for p in parameters]
        self._weights = weights
        return self._steps

    def _group(self, steps: Steps, images: Tensor, out: Tensor) -> None:
        height, width = images.shape[2:]
        key = (height, width, None if self.half else _float32_mode())
        size = self._sizes.pop(key, None) or _Size(self._batch(steps, height, width))
        self._sizes[key] = size  # the last one is the newest
        self._forget(len(self._sizes) - KEPT_SIZES)
        if size.eager < EAGER_IMAGES:
            size.eager += len(images)
            _eagerly(steps, size.batch, images, out)
            return
        n = min(n for n in GRAPHS if n >= max(len(images), size.batch))
        if n not in size.graphs:
            streams = self._streams[: n // size.batch]
            try:
                size.graphs[n] = Graph(steps, size.batch, height, width, streams, size.pool)
            except BaseException:
                del self._sizes[key]  # its pool may be left half open
                raise
        size.graphs[n](steps, images, out)

    def _batch(self, steps: Steps, height: int, width: int, may_try: bool = True) -> int:
        """How many images share their convolutions."""
        sizes = [n for n in steps.batches if n <= _most_at_once(steps, height, width)]
        if not sizes:
            return 1
        if (height, width) not in self._batches:
            if not may_try:
                raise RuntimeError(
                    f"feature_maps must have run once for images of {height} x {width} pixels before they are made "
                    "inside a CUDA graph"
                )
            equal = (n for n in sizes if _places_are_equal(steps, n, height, width))
            self._batches[height, width] = next(equal, 1)
        return self._batches[height, width]

    def _forget(self, count: int) -> None:
        """The sizes not used for the longest time."""
        if count > 0:
            torch.cuda.synchronize()  # their graphs may still be running
            for _ in range(count):
                self._sizes.popitem(last=False)


def _steps(net: nn.Module, half: bool) -> Steps:
    return HalfSteps(net) if half else PlainSteps(net)


def _most_at_once(steps: Steps, height: int, width: int) -> int:
    """How many images one graph may hold."""
    pixels = 2 * PIXELS // steps.dtype.itemsize
    return max(n for n in GRAPHS if n == 1 or n * height * width <= pixels)


def _eagerly(steps: Steps, batch: int, images: Tensor, out: Tensor) -> None:
    """Without a graph, one batch after the other."""
    own, scratch = steps.inputs(batch, *images.shape[2:]), steps.scratch(batch)
    for some, maps in zip(images.split(batch), out.split(batch), strict=True):
        own[: len(some), :3].copy_(some)
        steps.finish(steps.run(own, scratch)[: len(some)], maps)


def _places_are_equal(steps: Steps, batch: int, height: int, width: int) -> bool:
    """Whether images of noise give the same maps in every place of a batch.

    A convolution that treats places differently sums some outputs in another order. Noise shows that: every output is
    a sum of hundreds of random products, and what differs in one goes through all layers behind it.
    """
    generator = torch.Generator(steps.device).manual_seed(0)
    images = torch.rand(batch, 3, height, width, device=steps.device, generator=generator)
    first = None
    for shift in range(batch):
        own = steps.inputs(batch, height, width)
        own[:, :3].copy_(images.roll(shift, 0))
        maps = steps.run(own, steps.scratch(batch)).roll(-shift, 0)
        if first is None:
            first = maps
        elif not torch.equal(maps, first):
            return False
    return True


_makers: weakref.WeakKeyDictionary[nn.Module, dict[tuple[torch.device, bool], MapMaker]] = weakref.WeakKeyDictionary()
_makers_lock = threading.Lock()


def make_maps(net: nn.Module, images: Tensor, *, half: bool) -> Tensor:
    """[R, 3, H, W] on a GPU, R at least 1 -> maps [R, 48, ceil(H/2), ceil(W/2)] of the network, without gradients.

    Args:
        net: a FeatureMapNet on the images' device.
        half: float16 maps, channels last, from float16 weights, with the native module's kernels; else the module
            itself in its own dtype.
    """
    key = (images.device, half)
    with _makers_lock:
        makers = _makers.setdefault(net, {})
        for other in [other for other in makers if other[0] != images.device]:
            del makers[other]  # the network has moved
        if key not in makers:
            makers[key] = MapMaker(*key)
        maker = makers[key]
    return maker(net, images)


@contextlib.contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """No choice of algorithm by trial, for one thread at a time: the switches are the process's.

    (`torch.backends.cudnn.flags` would also touch TF32, which is the caller's choice.)
    """
    cudnn = torch.backends.cudnn
    with _switches:
        before = cudnn.benchmark, cudnn.deterministic
        cudnn.benchmark, cudnn.deterministic = False, True
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before


_switches = threading.RLock()


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    """Neither gradients nor autocast's types, and memory that may be written in any mode later."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False):
        yield


def _float32_mode() -> Any:
    """Whether convolutions may use TF32, as torch of this version has it."""
    cudnn = torch.backends.cudnn
    conv = getattr(cudnn, "conv", None)
    return conv.fp32_precision if hasattr(conv, "fp32_precision") else cudnn.allow_tf32
