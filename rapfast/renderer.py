"""`Renderer`: one scene rendered again and again in memory of its own, by itself or in a CUDA graph."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rapfast import _check as check
from rapfast import ops
from rapfast._call import refuse_gradients, render_call, require_cuda
from rapfast._call_arguments import Inputs, check_inputs, check_postprocess, check_settings
from rapfast.ops._library import aligned, current_stream
from rapfast.ops.render import MAX_INDEX, Memory
from rapfast.postprocess import PostProcess
from rapfast.scene import Scene


class Renderer:
    """Renders up to ``max_views`` cameras a call, without ever waiting for the GPU.

    `rapfast.rasterization` reads back how much room a call needs. A renderer has its room fixed beforehand, so that a
    call can be captured in a CUDA graph, by the caller or by `capture`; replaying a graph costs the least that one
    camera can. A view that wants more room than there is becomes NaN, never a wrong picture: see `check`.

        renderer = rapfast.Renderer(scene, max_views=1, width=854, height=480)
        renderer.fit(viewmats, Ks)  # cameras that show how much room is needed, [C, 4, 4] and [C, 3, 3]
        renderer.capture()
        for viewmat, K in views:
            images, alphas = renderer.render(viewmat[None], K[None])  # the renderer's own memory

    Args:
        scene: its tensors, float32 on a CUDA device, are used where they lie: values changed in place are seen, in
            graphs too. (Where one is not contiguous or begins off a multiple of 16 bytes, a copy of it is used; so with
            colors and backgrounds.) On the CPU (float32 or float64) `render` draws as `rapfast.rasterization` does, and
            there are no graphs.
        max_views: most cameras of a call.
        width, height: of the images, pixels.
        colors: [N, D] instead of the scene's spherical harmonics.
        sh_degree: degree to draw, at most the scene's; None: the scene's own. Must be None with ``colors``.
        backgrounds: [max_views, D] or [max_views, H, W, D]; a call of C cameras uses the first C. Used where it lies.
        near_plane, far_plane, radius_clip, eps2d, render_mode, rasterize_mode, camera_model, alpha_cap, postprocess:
            as in `rapfast.rasterization`.
        capacity: (records, intersections) that there is room for, as `fit` returns them; None: `fit` must be called.
            Time and memory grow with them, results do not change.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    A renderer's memory serves one call at a time: calls on another stream wait for the last one's, and calls from
    several threads at once need a renderer each.
    """

    def __init__(
        self,
        scene: Scene,
        max_views: int,
        width: int,
        height: int,
        *,
        colors: Tensor | None = None,
        sh_degree: int | None = None,
        backgrounds: Tensor | None = None,
        near_plane: float = 0.01,
        far_plane: float = 1e10,
        radius_clip: float = 0.0,
        eps2d: float = 0.3,
        render_mode: str = "RGB",
        rasterize_mode: str = "classic",
        camera_model: str = "pinhole",
        alpha_cap: float = 0.999,
        postprocess: PostProcess | None = None,
        capacity: tuple[int, int] | None = None,
    ) -> None:
        if not isinstance(scene, Scene):
            raise TypeError(f"scene must be a rapfast.Scene, got {check.describe(scene)}")
        self.max_views = check.integer("max_views", max_views, 1, MAX_INDEX)
        if colors is None:
            if scene.sh is None:
                raise ValueError("colors must be [N, D] for a scene without spherical harmonics, got None")
            colors, degree = scene.sh, scene.sh_degree
            if sh_degree is not None:
                degree = check.integer("sh_degree", sh_degree, 0, scene.sh_degree)
        elif sh_degree is not None:
            raise ValueError(f"sh_degree must be None where colors are given, got {sh_degree!r}")
        else:
            degree = None
            check.tensor_like("colors", colors, [(len(scene), "D")], scene.means, "the scene")
        self._settings = check_settings(
            width, height, near_plane, far_plane, radius_clip, eps2d, degree, render_mode, rasterize_mode, camera_model,
            alpha_cap,
        )  # fmt: skip
        # Cameras of zeros see nothing, whatever the scene.
        with torch.inference_mode(False):  # they are written to later, in any mode
            self._cameras = [
                torch.zeros((self.max_views, n, n), dtype=scene.means.dtype, device=scene.means.device) for n in (4, 3)
            ]
        inputs = check_inputs(
            scene.means, scene.quats, scene.scales, None, scene.opacities, colors, *self._cameras, backgrounds,
            self._settings,
        )  # fmt: skip
        check_postprocess(postprocess, colors.shape[-1], self._settings)
        self._postprocess = postprocess
        self._given = inputs
        self._inputs = inputs
        self._on_gpu = scene.means.device.type == "cuda"
        if self._on_gpu:
            require_cuda(scene.means)
            ready = [None if t is None else aligned(t.detach().contiguous()) for t in inputs]
            self._inputs = Inputs(*ready)
        self._memory: Memory | None = None
        self._capacity: tuple[int, int] | None = None
        self._graphs: dict[int, _Graph] = {}
        self._stream: torch.cuda.Stream | None = None  # of the last call
        if capacity is not None:
            self._make_room(_check_capacity(capacity))

    @property
    def capacity(self) -> tuple[int, int] | None:
        """(records, intersections) that a call has room for; None: not known yet, or on the CPU, where none is set.

        Intersections are pairs of tiles and records, or of regions of 8x4 tiles and records where these are more.
        """
        return self._capacity

    @property
    def overflow(self) -> Tensor:
        """int64 [] on the scene's device: 1 where a call since the last `check` had too little room, else 0. Reading it
        by the GPU, or in a graph, waits for nothing."""
        return self._inputs.means.new_zeros((), dtype=torch.int64) if self._memory is None else self._memory.worst[2]

    def fit(self, viewmats: Tensor, Ks: Tensor, headroom: float = 1.5) -> tuple[int, int] | None:
        """Make room for calls like this one: what these cameras need, times ``headroom``, and times max_views / C.

        Renders them, waits, and forgets graphs captured before: they have the old room. On the CPU, where room is made
        as it is needed, returns None.

        Args:
            viewmats, Ks: [C, 4, 4] and [C, 3, 3], as in `render`. headroom: at least 1.

        Returns:
            the capacity (records, intersections), which may be given to another renderer of this scene.
        """
        headroom = check.number("headroom", headroom, 1.0, 1e9, what="at least 1")
        inputs = self._check_call(viewmats, Ks)
        if not self._on_gpu:
            return None
        _refuse_capture("fit")
        self._wait_for_last_call()
        rendered = ops.render(*self._arguments(inputs), **self._options())
        factor = headroom * self.max_views / max(len(viewmats), 1)
        counts = rendered.n_records, rendered.n_intersections
        del rendered  # its memory serves the renderer's
        n_records, n_intersections = (min(MAX_INDEX, math.ceil(factor * count) + 1024) for count in counts)
        self._make_room((min(n_records, self.max_views * len(inputs.means)), n_intersections))
        return self._capacity

    def render(self, viewmats: Tensor, Ks: Tensor) -> tuple[Tensor, Tensor]:
        """Draw C cameras, C at most max_views, on the current stream.

        While the caller captures a CUDA graph the call becomes part of it; viewmats and Ks are then read at each
        replay, where they lie. Where `capture` was called for C views, its graph is replayed.

        Args:
            viewmats, Ks: [C, 4, 4] world to camera and [C, 3, 3] pixels; dtype and device of the scene.

        Returns:
            colours [C, H, W, D] and alphas [C, H, W, 1], as `rapfast.rasterization` returns them. On a GPU they lie in
            the renderer's memory: the next call writes there. Where there was too little room all of them, of every
            view of the call, are NaN (with dtype uint8, colours are 0).

        Raises:
            RuntimeError: on a GPU, before `fit`, or where no ``capacity`` was given.
            NotImplementedError: a gradient is wanted.
        """
        capturing = self._on_gpu and torch.cuda.is_current_stream_capturing()
        graph = None if capturing else self._graph_for(viewmats, Ks)
        if graph is not None:
            self._wait_for_last_call()
            torch._foreach_copy_(graph.cameras, [viewmats, Ks])
            graph.graph.replay()
            return graph.images, graph.alphas
        inputs = self._check_call(viewmats, Ks)
        if not self._on_gpu:
            return render_call(inputs, self._settings, True, self._postprocess)[:2]
        self._require_room("render")
        if not capturing:
            self._wait_for_last_call()
        return self._draw(inputs)

    def capture(self, n_views: int | None = None) -> None:
        """Capture a CUDA graph of a call of n_views cameras (None: max_views), which `render` replays from then on.

        Replaying takes the host a tenth of what launching the kernels one by one does.

        Raises:
            RuntimeError: on the CPU; before `fit`, or where no ``capacity`` was given; inside another capture.
        """
        n = self.max_views if n_views is None else check.integer("n_views", n_views, 1, self.max_views)
        if not self._on_gpu:
            raise RuntimeError(
                f"capture needs a scene on a CUDA device, this one is on {self._inputs.means.device}: render draws "
                "there without a graph"
            )
        self._require_room("capture")
        _refuse_capture("capture")
        cameras = [x[:n] for x in self._cameras]
        inputs = self._at(*cameras)
        with torch.cuda.device(self._inputs.means.device):
            self._wait_for_last_call()
            for x in cameras:
                x.zero_()
            self._draw(inputs)  # a kernel's first launch loads it, which a capture does not allow
            graph = torch.cuda.CUDAGraph()
            # A stream of this device: torch's own for captures belongs to the device of the process's first capture.
            stream = torch.cuda.Stream(self._inputs.means.device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                images, alphas = self._draw(inputs)
        self._graphs[n] = _Graph(graph, cameras, images, alphas)

    def check(self) -> None:
        """Raise where a call since the last check had too little room, so that its images are NaN. Waits for the calls
        so far, on the current stream and that of the last call; graphs that run on others must have ended.

        Raises:
            RuntimeError: with the room that was wanted.
        """
        if self._memory is None:
            return
        _refuse_capture("check")
        self._wait_for_last_call()
        n_records, n_intersections, overflowed = self._memory.worst.tolist()
        if not overflowed:
            return
        self._memory.worst.zero_()
        raise RuntimeError(
            f"a call since the last check was not drawn: calls needed up to {n_records} records and at least "
            f"{n_intersections} intersections, and there is room for {self._capacity[0]} and {self._capacity[1]}: fit "
            "the renderer to such cameras, or make one of that capacity"
        )

    def _graph_for(self, viewmats: Any, Ks: Any) -> _Graph | None:
        """The graph of a call with these cameras, where there is one and they are right at a glance."""
        if not isinstance(viewmats, Tensor) or not isinstance(Ks, Tensor):
            return None
        shape = viewmats.shape
        graph = self._graphs.get(shape[0]) if shape else None
        if graph is None:
            return None
        means = self._inputs.means
        for tensor, own in zip((viewmats, Ks), graph.cameras, strict=True):
            fits = tensor.dtype is own.dtype and tensor.device == means.device and tensor.layout is torch.strided
            if not fits or tensor.shape != own.shape:
                return None
        if torch.is_grad_enabled():
            refuse_gradients(self._given._replace(viewmats=viewmats, Ks=Ks))
        return graph

    def _check_call(self, viewmats: Any, Ks: Any) -> Inputs:
        """The inputs of one call, once they are known to be right."""
        means = self._inputs.means
        viewmats = check.tensor_like("viewmats", viewmats, [("C", 4, 4)], means, "the scene")
        c = viewmats.shape[0]
        Ks = check.tensor_like("Ks", Ks, [(c, 3, 3)], means, "the scene")
        if c > self.max_views:
            raise ValueError(f"viewmats must hold at most max_views = {self.max_views} cameras, got {c}")
        if torch.is_grad_enabled():
            refuse_gradients(self._given._replace(viewmats=viewmats, Ks=Ks))
        return self._at(viewmats, Ks)

    def _at(self, viewmats: Tensor, Ks: Tensor) -> Inputs:
        backgrounds = self._inputs.backgrounds
        if backgrounds is not None:
            backgrounds = backgrounds[: len(viewmats)]
        return self._inputs._replace(viewmats=viewmats.contiguous(), Ks=Ks.contiguous(), backgrounds=backgrounds)

    def _arguments(self, inputs: Inputs) -> tuple[Any, ...]:
        return *inputs, self._settings.width, self._settings.height

    def _options(self) -> dict[str, Any]:
        s = self._settings
        return {
            "camera_model": s.camera_model, "antialiased": s.antialiased, "eps2d": s.eps2d, "near_plane": s.near_plane,
            "far_plane": s.far_plane, "radius_clip": s.radius_clip, "sh_degree": s.sh_degree,
            "render_mode": s.render_mode, "alpha_cap": s.alpha_cap, "postprocess": self._postprocess,
        }  # fmt: skip

    def _draw(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        rendered = ops.render(
            *self._arguments(inputs), **self._options(), capacities=self._capacity, memory=self._memory
        )
        return rendered.images, rendered.alphas

    def _make_room(self, capacity: tuple[int, int]) -> None:
        if not self._on_gpu:
            raise ValueError(
                f"capacity must be None for a scene on {self._inputs.means.device}, where room is made as it is "
                f"needed, got {capacity}"
            )
        self._graphs.clear()
        self._memory = None
        with torch.inference_mode(False):  # it is written to later, in any mode
            memory = Memory(self._inputs.means.device)
        self._capacity, self._memory = capacity, memory
        try:
            for x in self._cameras:
                x.zero_()
            self._draw(self._at(*self._cameras))
        except BaseException:
            self._capacity, self._memory = None, None
            raise

    def _require_room(self, name: str) -> None:
        if self._capacity is None:
            raise RuntimeError(
                f"{name} must know how much room the views need: call fit with cameras like those to come, or make the "
                "renderer with a capacity"
            )

    def _wait_for_last_call(self) -> None:
        """The memory is in use until then, perhaps on another stream."""
        handle = current_stream(self._inputs.means.get_device())
        if self._stream is not None and self._stream.cuda_stream == handle:
            return
        stream = torch.cuda.current_stream(self._inputs.means.device)
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream = stream
        if self._memory is not None:
            # Given back, it must not serve the stream that it was allocated on before this one is done with it.
            for tensor in (*(self._memory.buffers or ()), self._memory.worst, *self._cameras):
                tensor.record_stream(stream)


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    cameras: list[Tensor]  # viewmats and Ks that it reads
    images: Tensor  # that it writes
    alphas: Tensor


def _check_capacity(capacity: Any) -> tuple[int, int]:
    if not isinstance(capacity, (tuple, list)) or len(capacity) != 2:
        raise TypeError(f"capacity must be (records, intersections) or None, got {check.describe(capacity)}")
    records, intersections = (
        check.integer(f"capacity's number of {name}", value, 0, MAX_INDEX)
        for name, value in zip(("records", "intersections"), capacity, strict=True)
    )
    return records, intersections


def _refuse_capture(name: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name} cannot be called while a CUDA graph is captured: it reads back, or captures itself")
