"""The job: load once, precompute once, render every parameter set."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.io.files import PathLike
from rapfast.profiling import section
from rapfast.rvs.output import to_pixels

from .assets import Budget, FrameAssets, FrameShapes
from .compositing import to_yuv420
from .difficulties import ParameterSet
from .films import FilmOptions, Films, FilmTarget
from .output import OutputFolder, TakenError, check_video_name
from .provider import Identity, Motion, Provider, Video, Viewpoint
from .rendering import Features, FrameRenderer
from .viewpoints import drawn_viewpoint, frame_seed, set_seed

DEFAULT_FPS = 30.0


@dataclass
class Counts:
    """How often each step was done. What does not depend on a camera is counted once, however many sets there are."""

    models: int = 0
    videos: int = 0
    targets: int = 0
    deforms: int = 0
    backgrounds: int = 0
    camera_paths: int = 0
    rasterized: int = 0
    refined: int = 0
    composited: int = 0
    films: int = 0


@dataclass
class Seconds:
    """Where the time of a job went. Rendering holds rasterizer, refiner and composite and, overlapped, the encoding
    of films; what is left of that afterwards is `finish`."""

    load_model: float = 0.0
    load_video: float = 0.0
    precompute: float = 0.0
    render: float = 0.0
    finish: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Film:
    """A film that was made, or was there."""

    video: str
    set_name: str
    state: str  # "made" or "kept"
    frames: int
    n_bytes: int
    seconds: float  # of rendering, shared by the sets that were rendered together


@dataclass(frozen=True)
class Failure:
    """A video that could not be rendered, or some of whose films others hold, and why; the others were."""

    video: str
    error: Exception


@dataclass
class Summary:
    """What a job did."""

    films: list[Film] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    seconds: Seconds = field(default_factory=Seconds)
    placement: dict[str, dict[str, int]] = field(default_factory=dict)  # by video: frames in each tier of memory


Progress = Callable[[str, str, int, int], None]
"""Called with a video, "precompute" or "render", and how many frames of how many are done."""


class AugmentationJob:
    """Renders videos under parameter sets. A model is loaded once, a video once, each frame deformed once.

        job = AugmentationJob(provider, parameter_sets(["easy", "hard"], DIFFICULTIES), torch.device("cuda"))
        with job.folder("out") as folder:
            summary = job.run(["demo"], folder)

    Args:
        provider: the avatar system.
        sets: the parameter sets, each a film of each video.
        device: where to render.
        seed: of all draws.
        budget: of memory for what is precomputed.
        films: how films are written.
        views: images rendered in one call of the rasterizer, F frames x S sets; changes no pixel.
        sets_together: sets that are rendered side by side, at most. A frame's Gaussians are then read once for all.
        pad: pad odd sides of films to even ones, which H.264 wants; False: refuse them.
        writer: what writes films, called and used as `rapfast.augment.films.Films`.
        watch: called with (video, sets, first frame, `Features`) for each batch, before the refiner.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self, provider: Provider, sets: Sequence[ParameterSet], device: torch.device, *, seed: int = 0,
        budget: Budget | None = None, films: FilmOptions | None = None, views: int = 8, sets_together: int = 16,
        pad: bool = True, writer: Callable[..., Films] = Films,
        watch: Callable[[str, Sequence[ParameterSet], int, Features], None] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(provider, Provider):
            raise TypeError(f"provider must be a rapfast.augment.Provider, got {check.describe(provider)}")
        check.number("provider.near_plane", provider.near_plane, 0.0, what="a depth of at least 0")
        check.number("provider.alpha_cap", provider.alpha_cap, 1 / 255, 0.9999, "above 1/255 and below 1")
        check.integer("provider.refine_batch", provider.refine_batch, 1, 1 << 16)
        self.provider, self.sets, self.device = provider, list(sets), device
        if not self.sets:
            raise ValueError("sets must hold at least one parameter set, got none")
        self.seed = check.integer("seed", seed, 0, (1 << 64) - 1)
        self.budget, self.film_options = budget or Budget(), films or FilmOptions()
        self.views = check.integer("views", views, 1, 1 << 16)
        self.sets_together = check.integer("sets_together", sets_together, 1, 1 << 16)
        self.pad, self._writer, self._watch = pad, writer, watch
        self.summary = Summary()
        self._model_is_loaded = False

    def settings(self) -> dict[str, Any]:
        """All that decides the films but for their sets."""
        described = self.provider.describe()
        try:
            described = {f"provider.{name}": json.loads(json.dumps(value)) for name, value in described.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise TypeError(f"describe must return a dictionary that JSON can hold: {error}") from None
        found = {
            "seed": self.seed,
            "provider": f"{type(self.provider).__module__}:{type(self.provider).__qualname__}",
            **described,
            "refiner": self.provider.refines,
            "near_plane": self.provider.near_plane,
            "alpha_cap": self.provider.alpha_cap,
        }
        return found | asdict(self.film_options)

    def folder(self, root: PathLike, *, part_id: int | None = None, overwrite: bool = False) -> OutputFolder:
        """An output folder for films of this job; see `OutputFolder`."""
        ranges = {s.difficulty_name: s.difficulty.as_json() for s in self.sets}
        return OutputFolder(Path(root), self.settings(), ranges, part_id=part_id, overwrite=overwrite)

    def run(
        self, videos: Sequence[str], folder: OutputFolder, progress: Progress | None = None, *, overwrite: bool = False
    ) -> Summary:
        """Make every film that is not in `folder`. A video that cannot be read is noted in the summary, as are films
        that another process is writing or another shard has made, and the others are rendered; what fails while films
        are written (a full disk) ends the job. Films that are finished stay.

        With `overwrite` films are made anew, and replaced where the folder knows nothing of them.
        """
        self.summary = Summary()
        progress = progress or (lambda *_: None)
        videos = [check_video_name(name) for name in dict.fromkeys(videos)]
        if overwrite:
            folder.allow((s.name, video) for video in videos for s in self.sets)
        for name in videos:
            todo = []
            for s in self.sets:
                film = folder.films.get((s.name, name))
                if film is None:
                    todo.append(s)
                else:
                    self.summary.films.append(Film(name, s.name, "kept", film["frames"], film["bytes"], 0.0))
            if todo:
                try:
                    self._video(name, todo, folder, progress)
                except VideoError as error:
                    self.summary.failures.append(Failure(name, error))
        return self.summary

    def _video(self, name: str, sets: Sequence[ParameterSet], folder: OutputFolder, progress: Progress) -> None:
        taken: list[Exception] = []
        free = []
        for s in sets:  # before anything is loaded, which may be for nothing
            with _noting(taken):
                folder.check((s.name, name))
                free.append(s)
        if free:
            self._render_video(name, free, folder, progress, taken)
        if taken:
            more = f" (and {len(taken) - 1} more of its films likewise)" if len(taken) > 1 else ""
            raise VideoError(f"video {name}: {taken[0]}{more}") from taken[0]

    def _render_video(
        self, name: str, sets: Sequence[ParameterSet], folder: OutputFolder, progress: Progress,
        taken: list[Exception],
    ) -> None:  # fmt: skip
        counts = self.summary.counts
        with _of(name):
            self.provider.check_video(name)
        if not self._model_is_loaded:
            with self._timed("load_model"):
                self.provider.load_model(self.device)
            counts.models += 1
            self._model_is_loaded = True
        with _of(name), self._timed("load_video"):
            video = self.provider.load_video(name)
            lacking = [part for part in _PARTS if not hasattr(video, part)]
            if lacking:
                raise TypeError(f"load_video must return a Video, got a {type(video).__name__} without {lacking[0]}")
            counts.videos += 1
        try:
            with _of(name):
                self._check_video(video)
                with self._timed("precompute"), torch.inference_mode():
                    identity = video.identity.to(self.device)
                    assets = self._precompute(name, video, progress)
            # groups of nearly one size: a last small one would leave cores idle
            size = -(-len(sets) // -(-len(sets) // self.sets_together))
            for first in range(0, len(sets), size):
                self._render_sets(name, video, identity, assets, sets[first : first + size], folder,
                                  partial(progress, name, "render"), (first, len(sets)), taken)  # fmt: skip
        finally:
            video.close()

    def _check_video(self, video: Video) -> None:
        check.integer("n_frames", video.n_frames, 1, 1 << 31)
        for name, kind in (("viewpoint", Viewpoint), ("identity", Identity)):
            if not isinstance(getattr(video, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {check.describe(getattr(video, name))}")
        if video.fps is not None and not 0 < video.fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000, got {video.fps}")
        width, height = video.viewpoint.width, video.viewpoint.height
        if not self.pad and (width % 2 or height % 2):
            raise ValueError(
                f"the images are {width}x{height} and H.264 needs even sides: pad them, or choose another size"
            )

    def _precompute(self, name: str, video: Video, progress: Progress) -> FrameAssets:
        """Everything of every frame that knows no camera."""
        counts, n = self.summary.counts, len(video.identity.opacities)
        width, height = video.viewpoint.width, video.viewpoint.height
        assets: FrameAssets | None = None
        for frame in range(video.n_frames):
            with _of_frame(frame):
                target = video.target(frame)
                counts.targets += 1
                motion = _checked_motion(video.deform(frame, target), n)
                counts.deforms += 1
                background = _checked_background(video.background(frame, target), height, width)
                counts.backgrounds += 1
                if assets is None:
                    shapes = FrameShapes(n, height, width, background.dtype)
                    assets = FrameAssets(video.n_frames, shapes, self.device, self.budget)
                elif background.dtype != assets.shapes.background_dtype:
                    raise ValueError(
                        f"background must be {assets.shapes.background_dtype} as that of frame 0, got "
                        f"{check.describe(background)}"
                    )
                assets.put(frame, motion, background)
            progress(name, "precompute", frame + 1, video.n_frames)
        self.summary.placement[name] = assets.placement
        return assets

    def _render_sets(
        self, name: str, video: Video, identity: Identity, assets: FrameAssets, sets: Sequence[ParameterSet],
        folder: OutputFolder, progress: Callable[[int, int], None], of_sets: tuple[int, int],
        taken: list[Exception],
    ) -> None:  # fmt: skip
        """The films of some sets, side by side; those that others have are noted in `taken`."""
        start = time.perf_counter()
        counts, view = self.summary.counts, video.viewpoint
        fps, n_frames = video.fps or DEFAULT_FPS, video.n_frames
        words = [set_seed(self.seed, s.difficulty_name, s.draw, name) for s in sets]
        with _of(name):
            viewmats, Ks = self._cameras(video, sets, words, fps)
        pngs = self.film_options.pngs
        targets, ours = [], []
        fixed = self.provider.draws_cameras
        for i, (s, set_words) in enumerate(zip(sets, words, strict=True)):
            entry = {
                "frames": n_frames, "fps": fps, "width": view.width, "height": view.height, "pngs": pngs,
                "viewpoint": drawn_viewpoint(s.difficulty, set_words) if fixed else None,
                "difficulty": s.difficulty_name, "draw": s.draw, "fixed_viewpoint": fixed, "base": _as_json(view),
            }  # fmt: skip
            key = s.name, name
            with _noting(taken):
                targets.append(FilmTarget(folder.begin(key, pngs), partial(folder.finish, key, entry)))
                ours.append(i)
        if not ours:
            return
        if len(ours) < len(sets):
            sets, words = [sets[i] for i in ours], [words[i] for i in ours]
            viewmats, Ks = viewmats[:, ours], Ks[:, ours]
        frames_at_once = max(1, self.views // len(sets))
        renderer = FrameRenderer(self.provider, identity, (view.width, view.height), frames_at_once)
        try:
            with self._writer(targets, view.width, view.height, fps, self.device, self.film_options) as films:
                with torch.inference_mode():
                    for frames in assets.batches(frames_at_once):
                        span = slice(frames.first, frames.first + len(frames))
                        with section("rasterize"):
                            drawn = renderer.rasterize(frames, viewmats[span], Ks[span])
                        if self._watch is not None:
                            self._watch(name, sets, frames.first, drawn)
                        seeds = [frame_seed(w, f) for f in range(span.start, span.stop) for w in words]
                        with section("refine and composite"):
                            pictures = renderer.pictures(drawn, frames.backgrounds, seeds)
                            planes, pixels = to_yuv420(pictures), to_pixels(pictures) if pngs else None
                        with section("to the films"):
                            films.add(planes, pixels)
                        counts.rasterized += len(seeds)
                        counts.composited += len(seeds)
                        progress(of_sets[0] * n_frames + span.stop * len(sets), of_sets[1] * n_frames)
                self.summary.seconds.render += time.perf_counter() - start
                finishing = time.perf_counter()
            self.summary.seconds.finish += time.perf_counter() - finishing
        finally:
            for s in sets:
                folder.leave((s.name, name))
        counts.refined += renderer.refined
        took = (time.perf_counter() - start) / len(sets)
        for s in sets:
            counts.films += 1
            n_bytes = folder.films[s.name, name]["bytes"]
            self.summary.films.append(Film(name, s.name, "made", n_frames, n_bytes, took))

    def _cameras(
        self, video: Video, sets: Sequence[ParameterSet], words: Sequence[Sequence[int]], fps: float
    ) -> tuple[Tensor, Tensor]:
        """[F, S, 4, 4] and [F, S, 3, 3], float32 on the device."""
        paths = []
        for s, set_words in zip(sets, words, strict=True):
            made = self.provider.cameras(video.viewpoint, s.difficulty, video.n_frames, fps, set_words)
            for matrices, what, k in zip(made, ("world-to-camera matrices", "intrinsics"), (4, 3), strict=True):
                if np.shape(matrices) != (video.n_frames, k, k) or not np.isfinite(matrices).all():
                    wanted = f"finite {what} [{video.n_frames}, {k}, {k}]"
                    raise ValueError(f"cameras must return {wanted}, got {list(np.shape(matrices))}")
            paths.append(made)
            self.summary.counts.camera_paths += 1
        stacked = (np.stack([path[i] for path in paths], 1) for i in range(2))
        viewmats, Ks = (torch.from_numpy(x.astype(np.float32)).to(self.device) for x in stacked)
        return viewmats, Ks

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        with section(stage.replace("_", " ")):
            yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = self.summary.seconds
        setattr(seconds, stage, getattr(seconds, stage) + time.perf_counter() - start)


class VideoError(ValueError):
    """A video that cannot be rendered; the sentence begins with its name. The other videos can."""


_PARTS = ("n_frames", "fps", "viewpoint", "identity", "target", "deform", "background", "close")
"""Attributes of a `Video`."""

_FATAL = (MemoryError, torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", MemoryError))
"""What is no fault of a video: others would fail too."""


@contextmanager
def _of(video: str) -> Iterator[None]:
    """What goes wrong with a video, as its own error, whatever a provider's code raises."""
    try:
        yield
    except (VideoError, *_FATAL):
        raise
    except Exception as error:
        raise VideoError(f"video {video}: {_told(error)}") from error


@contextmanager
def _noting(taken: list[Exception]) -> Iterator[None]:
    """That another process is writing a film, or another shard has made it, which ends nothing else."""
    try:
        yield
    except (BlockingIOError, TakenError) as error:
        taken.append(error)


@contextmanager
def _of_frame(frame: int) -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError, *_FATAL):
        raise
    except Exception as error:  # of this type again, which others cannot be made of a sentence alone
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"frame {frame}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """Its sentence; where it may be none, as of a KeyError, after its name."""
    is_sentence = isinstance(error, ValueError | TypeError | OSError | NotImplementedError) and str(error)
    return str(error) if is_sentence else f"{type(error).__name__}: {error}"


def _checked_motion(motion: Any, n: int) -> Motion:
    if not isinstance(motion, Motion):
        raise TypeError(f"deform must return a Motion, got a {type(motion).__name__}")
    for name, width in (("means", 3), ("quats", 4), ("scales", 3)):
        tensor = getattr(motion, name)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.shape != (n, width):
            raise ValueError(f"{name} must be a floating tensor [{n}, {width}], got {check.describe(tensor)}")
    return motion


def _checked_background(background: Any, height: int, width: int) -> Tensor:
    """uint8 or float32. A background of another size is refused, never scaled."""
    wanted = f"[{height}, {width}, 3], uint8 or floating in 0..1"
    if not isinstance(background, Tensor):
        raise TypeError(f"background must be a tensor {wanted}, got {check.describe(background)}")
    good_type = background.dtype == torch.uint8 or background.is_floating_point()
    if background.shape != (height, width, 3) or not good_type:
        raise ValueError(f"background must be {wanted}, got {check.describe(background)}")
    return background if background.dtype == torch.uint8 else background.float()


def _as_json(view: Viewpoint) -> dict[str, Any]:
    """The camera that a set started from, so that its cameras can be made again."""
    return {"viewmat": view.viewmat.tolist(), "K": view.K.tolist(), "target": view.target.tolist()}
