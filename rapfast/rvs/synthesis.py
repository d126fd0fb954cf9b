"""Random-view synthesis: views around given ones, in batches, with the draws and results of a loop over views.

Three ways, which are those of RAP's three renderers:

- `perturbed`: all poses are drawn, then all weights, then the views are rendered.
- `with_attempts`: a view's pose and weight are drawn until RAP can render it (see `one_point`), at most max_attempts
  times; after that it is the given pose with the last weight.
- `with_brisque`: a view's pose is drawn until its picture at weight 1 scores below a threshold, at most max_attempts
  times; then a weight is drawn, and the pose of the best score rendered with it.

Attempts are drawn ahead of their outcomes (`SpeculativeDraws`), so numpy's generator ends where the loop leaves it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.appearance.features import Z_OFFSET, map_coordinates
from rapfast.appearance.rap_scene import RapScene
from rapfast.postprocess import PostProcess
from rapfast.profiling import count, section
from rapfast.rvs.brisque import Brisque
from rapfast.rvs.brisque_loop import BrisqueLoop, Shown, SyntheticViews, views_of
from rapfast.rvs.draws import SpeculativeDraws
from rapfast.rvs.output import DESTINATIONS, ViewBuffer
from rapfast.rvs.poses import WEIGHTS, Array, PoseSampler, as_numbers, as_poses, draw_weights, world_to_camera

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

GUESSED_AHEAD = 256
"""Attempts judged at a time where no picture is needed for it."""

SAMPLE = 4096
"""Gaussians looked at first where it is asked whether more than one falls on the map."""

CERTAIN = 8
"""So many of the sample are certainly more than one, however the map's border was rounded."""


@dataclass(eq=False)
class RandomViewSynthesizer:
    """Renders a scene from random views for training.

    A view is bitwise the same in any batch, since `RapScene.render` is, given the same maps.

    Attributes:
        scene: on the device that renders.
        K: [3, 3] intrinsics in pixels of the rendered picture; of any dtype and device.
        render_size: (height, width) of the rendered picture.
        references: gives the feature maps of reference images: a function of their numbers, such as `ReferenceMaps`,
            or the maps themselves, [R, 48, h, w] or a sequence of [48, h, w]. On a GPU the function is called while the
            batch before renders, with another stream current, on which it is to make them; what it has returned must
            not be written to again.
        size: (h, w) of the images, resized bilinearly without antialiasing; None keeps the rendered size.
        mean, std: of the normalisation; None for none.
        background: [3] colour; None is black.
        batch_size: views of one call. If memory runs out the batch is halved, with a RuntimeWarning, and stays so.
        precision: of the colour network, as in `RapScene.render`.
        destination: "cpu", "pinned" or "device", see `ViewBuffer`.
        dtype: of the images: torch.float32 or torch.float16.
        brisque: scores pictures; made when it is needed.
        on_pictures: is given batches of pictures before normalisation, [n, 3, h, w] with white at 1, and n `Shown`.
        on_progress: is told how many more views are finished.

    Raises:
        TypeError, ValueError: naming the attribute, what was expected and what came.
    """

    scene: RapScene
    K: Tensor
    render_size: tuple[int, int]
    references: Any
    size: tuple[int, int] | None = None
    mean: Sequence[float] | None = IMAGENET_MEAN
    std: Sequence[float] | None = IMAGENET_STD
    background: Any = None
    batch_size: int = 8
    precision: str | None = None
    destination: str = "cpu"
    dtype: torch.dtype = torch.float32
    brisque: Brisque | None = None
    on_pictures: Callable[[Tensor, list[Shown]], None] | None = field(default=None, repr=False)
    on_progress: Callable[[int], None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.scene, RapScene):
            raise TypeError(f"scene must be a RapScene, got {check.describe(self.scene)}")
        like = self.scene.scene.means
        K = check.as_tensor(self.K)
        if tuple(K.shape) != (3, 3) or not K.is_floating_point():
            raise ValueError(f"K must be floating point [3, 3], got {check.describe(self.K)}")
        self.K = K.detach().to(like.device, like.dtype)
        self.render_size = _size("render_size", self.render_size)
        self.size = self.render_size if self.size is None else _size("size", self.size)
        self.batch_size = check.integer("batch_size", self.batch_size, 1, 1 << 20, " views")
        check.choice("destination", self.destination, DESTINATIONS)
        if self.dtype not in (torch.float32, torch.float16):
            raise TypeError(f"dtype must be torch.float32 or torch.float16, got {self.dtype}")
        if self.background is not None:
            background = check.as_tensor(self.background)
            if tuple(background.shape) != (3,):
                raise ValueError(f"background must be a colour [3], got {check.describe(self.background)}")
            self.background = background.to(like.device, like.dtype)
        size = None if self.size == self.render_size else self.size
        mean, std = (None if numbers is None else tuple(numbers) for numbers in (self.mean, self.std))
        # Nothing is clamped, as in RAP.
        self._finished = PostProcess(size=size, mean=mean, std=std, layout="CHW", dtype=self.dtype)
        self._plain = PostProcess(size=size, layout="CHW", dtype=torch.float32)
        self._mean, self._std = (
            None if numbers is None else torch.tensor(numbers, device=like.device)[:, None, None]
            for numbers in (mean, std)
        )  # fmt: skip
        self._limit = self.batch_size

    # --- the three ways ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def render(self, poses: Any, weights: Any = None, indexes: Any = None) -> SyntheticViews:
        """The views at `poses` themselves.

        Args:
            poses: [M, 3, 4] or [M, 4, 4] camera-to-world.
            weights: [M] finite numbers, or one for all; None is 1.
            indexes: [M] numbers of the reference images; None is 0 .. M - 1.
        """
        start = as_poses("poses", poses)
        m = len(start)
        given = np.broadcast_to(as_numbers("weights", 1.0 if weights is None else weights), (m,))
        if not np.isfinite(given).all():
            raise ValueError("weights must be finite")
        return self._render(start, given, self.ids(indexes, m), np.ones(m, dtype=np.int64), np.ones(m, dtype=bool))

    @torch.no_grad()
    def perturbed(
        self, poses: Any, sampler: PoseSampler, rng: Any = None, weights: Sequence[float] | None = WEIGHTS,
        indexes: Any = None,
    ) -> SyntheticViews:  # fmt: skip
        """One view around each of `poses`. First all poses are drawn, then all weights.

        Args:
            poses: [M, 3, 4] or [M, 4, 4] camera-to-world.
            rng: None for numpy's global generator, a np.random.RandomState or a torch.Generator.
            weights: their range; None draws none.
            indexes: as in `render`.
        """
        drawn = sampler.sample(poses, rng)
        return self.render(drawn, None if weights is None else draw_weights(len(drawn), rng, weights), indexes)

    @torch.no_grad()
    def with_attempts(
        self, poses: Any, sampler: PoseSampler, max_attempts: int, rng: Any = None,
        weights: Sequence[float] | None = WEIGHTS, indexes: Any = None,
    ) -> SyntheticViews:  # fmt: skip
        """One view around each of `poses`, drawn again where RAP cannot render it.

        What makes RAP fail, exactly one Gaussian on the projected map, is known from the pose alone, so failed attempts
        are not rendered. The given pose, which follows the last of them, is rendered whatever falls on its map.

        Args:
            max_attempts: at least 1.
            poses, rng, weights, indexes: as in `perturbed`.
        """
        start = as_poses("poses", poses)
        ids = self.ids(indexes, len(start))
        if isinstance(rng, torch.Generator):
            result, drawn, *outcome = self._attempts_torch(start, sampler, max_attempts, rng, weights)
            return self._render(result, drawn, ids, *outcome)
        result, drawn = start.copy(), np.ones(len(start))
        attempts, accepted = np.zeros(len(start), dtype=np.int64), np.zeros(len(start), dtype=bool)
        ahead = GUESSED_AHEAD
        with SpeculativeDraws(sampler, start, max_attempts, rng, weights=weights) as draws:
            while not draws.done:
                guess = draws.guess(ahead)
                ended = draws.settle(~self.one_point(guess.poses))
                for end in ended:
                    attempts[end.view], accepted[end.view] = end.attempts, end.accepted
                    drawn[end.view] = 1.0 if end.weight is None else end.weight
                    if end.accepted:
                        result[end.view] = end.pose
                # As many as were used and those that may follow, so that few draws are dropped.
                ahead = min(GUESSED_AHEAD, 2 * (len(ended) + 1))
        return self._render(result, drawn, ids, attempts, accepted)

    @torch.no_grad()
    def with_brisque(
        self, poses: Any, sampler: PoseSampler, max_attempts: int, threshold: float, rng: Any = None,
        weights: Sequence[float] | None = WEIGHTS, indexes: Any = None,
    ) -> SyntheticViews:  # fmt: skip
        """One view around each of `poses`, drawn again until its picture is good.

        A view's first attempt is rendered at weight 1; the others with its colours, of which the directions alone are
        renewed (RAP's cache). A picture is scored as it is resized, neither clamped nor normalised. A score below
        `threshold` ends the attempts. The pose of the lowest score is then rendered in full with a drawn weight; or,
        without `weights`, the attempt's own picture is the image.

        An attempt that fails as in `with_attempts` has no score, and the next one's colours are those of the view
        then. So does a picture in which nothing varies. A view of which no attempt has a score is rendered at the
        given pose.

        Args:
            threshold: of the score; low is good.
            max_attempts: at least 1.
            poses, rng, weights, indexes: as in `perturbed`, but a torch.Generator is refused.
        """
        if isinstance(rng, torch.Generator):
            raise NotImplementedError("with_brisque draws from numpy's generators, got a torch.Generator as rng")
        threshold = check.number("threshold", threshold)
        start = as_poses("poses", poses)
        loop = BrisqueLoop(self, start, self.ids(indexes, len(start)), threshold, draws_weights=weights is not None)
        with SpeculativeDraws(sampler, start, max_attempts, rng, final_weights=weights) as draws:
            loop.run(draws)
        return loop.views()

    @torch.no_grad()
    @section("judge poses")
    def one_point(self, poses: Any) -> Any:
        """[P] bool, an array: whether RAP fails at poses [P, 3, 4], because exactly one of the scene's N Gaussians
        falls on the projected map. The device is read back once, and again where that is nearly so."""
        geometry = self.scene.scene.means, self.scene.box_coord[:, 2]
        viewmats = self.viewmats(poses)
        if not len(viewmats):
            return np.zeros(0, dtype=bool)
        # Counts of some are enough where they are more than one.
        step = -(-len(geometry[0]) // SAMPLE) or 1
        some = [part[::step] for part in geometry]
        counts = [_valid_counts(*some, part, self.K) for part in viewmats.split(64)]
        result = np.zeros(len(viewmats), dtype=bool)
        few = (torch.cat(counts) < CERTAIN).nonzero()[:, 0].tolist()
        if few:
            all_counts = torch.stack([map_coordinates(*geometry, viewmats[i], self.K)[1].sum() for i in few])
            result[few] = (all_counts == 1).cpu().numpy()
        return result

    # --- what they share ---------------------------------------------------------------------------------------------

    def _attempts_torch(
        self, start: Array, sampler: PoseSampler, max_attempts: int, rng: torch.Generator, weights: Any
    ) -> tuple[Any, ...]:
        """All failed attempts drawn again together: poses, weights, attempts, accepted."""
        max_attempts = check.integer("max_attempts", max_attempts, 1, 1 << 40)
        result, drawn = start.copy(), np.ones(len(start))
        attempts, accepted = np.zeros(len(start), dtype=np.int64), np.zeros(len(start), dtype=bool)
        for _ in range(max_attempts):
            left = np.flatnonzero(~accepted)
            if not len(left):
                break
            numbers, own = sampler.draw(len(left), rng, weights=weights)
            new = sampler.apply(start[left], numbers).cpu().numpy()
            attempts[left] += 1
            if own is not None:
                drawn[left] = own.cpu().numpy()
            good = ~self.one_point(new)
            result[left[good]], accepted[left[good]] = new[good], True
        return result, drawn, attempts, accepted

    def _render(self, poses: Array, weights: Array, ids: list[int], attempts: Any, accepted: Any) -> SyntheticViews:
        buffer = self.buffer(len(poses))
        self.render_into(buffer, range(len(poses)), poses, weights, ids)
        return views_of(buffer.finish(), poses, weights, attempts, accepted)

    def render_into(
        self, buffer: ViewBuffer, places: Sequence[int], poses: Array, weights: Array, ids: Sequence[int],
        scores: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        """Render views and put them at `places` of the buffer. All arguments have one entry for each view.

        On a GPU the next batch's feature maps are made, and the last batch is copied, while one renders. What fails
        leaves no work behind on those streams.
        """
        viewmats = self.viewmats(poses)
        given = weights.tolist()
        shown = self.on_pictures is not None

        def work(begin: int, end: int) -> None:
            part = slice(begin, end)
            try:
                maps = coming.take(ids[part])
                coming.start(ids[end : end + self._limit])
                finish = self._plain if shown else self._finished
                images = self.draw(viewmats[part], ids[part], given[part], finish, None, maps)
                self.put(buffer, places[part], images, None if scores is None else scores[part], are_pictures=shown)
            except BaseException:
                coming.drop()  # a smaller batch may need the memory
                raise

        try:
            with _ComingMaps(self) as coming:
                self.in_batches(len(poses), work)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the error on its way is the one to tell
                buffer.finish()
            raise

    @section("collect")
    def put(
        self, buffer: ViewBuffer, places: Sequence[int], images: Tensor, scores: Sequence[float] | None,
        are_pictures: bool,
    ) -> None:  # fmt: skip
        """Views on their way to the buffer and to who wants to see them; pictures are normalised on it."""
        if self.on_pictures is not None:
            own = [None] * len(places) if scores is None else scores
            self.on_pictures(images, [Shown(place, score, False) for place, score in zip(places, own, strict=True)])
        buffer.put(places, self.normalised(images) if are_pictures else images)
        if self.on_progress is not None:
            self.on_progress(len(places))

    @section("draw")
    def draw(
        self, viewmats: Tensor, ids: Sequence[int], weights: Sequence[float], postprocess: PostProcess | None = None,
        decoded: Tensor | None = None, maps: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """[C, 3, h, w] on the device: finished images, or as `postprocess` says. With `decoded` of colours already
        made; with `maps` of the images `distinct(ids)`, where they are made already."""
        c = len(viewmats)
        count("views", c)
        given: dict[str, Any] = {"decoded": decoded}
        if decoded is None:
            used = distinct(ids)
            places = {number: place for place, number in enumerate(used)}
            given = {
                "feature_maps": self.maps(used) if maps is None else maps,
                "map_ids": [places[i] for i in ids],
                "view_weights": list(weights),
            }
        height, width = self.render_size
        colors, _, _ = self.scene.render(
            viewmats, self.K.expand(c, 3, 3).contiguous(), width, height,
            backgrounds=None if self.background is None else self.background.expand(c, 3).contiguous(),
            packed=False, precision=self.precision, postprocess=postprocess or self._finished, **given,
        )  # fmt: skip
        return colors

    def pictures(self, viewmats: Tensor, ids: Sequence[int], decoded: Tensor | None = None) -> Tensor:
        """[C, 3, h, w] at weight 1, resized and nothing else."""
        return self.draw(viewmats, ids, [1.0] * len(viewmats), self._plain, decoded)

    def normalised(self, pictures: Tensor) -> Tensor:
        """What `draw` does to pictures behind the resize."""
        for numbers, apply in ((self._mean, torch.sub), (self._std, torch.div)):
            if numbers is not None:
                pictures = apply(pictures, numbers)
        return pictures.to(self.dtype)

    def maps(self, ids: list[int]) -> Tensor | Sequence[Tensor]:
        """Feature maps by number."""
        if callable(self.references):
            return self.references(ids)
        for i in ids:
            if i >= len(self.references):
                raise IndexError(f"there are feature maps of {len(self.references)} reference images, number {i} was "
                                 "asked for")  # fmt: skip
        if isinstance(self.references, Tensor) and ids and ids == list(range(ids[0], ids[0] + len(ids))):
            return self.references[ids[0] : ids[0] + len(ids)]  # in one piece
        return [self.references[i] for i in ids]

    def buffer(self, count: int) -> ViewBuffer:
        return ViewBuffer(count, (3, *self.size), self.dtype, self.scene.scene.device, self.destination)

    def in_batches(self, count: int, work: Callable[[int, int], None]) -> None:
        """work(begin, end) over 0 .. count in batches, which are halved where memory runs out.

        Raises:
            RuntimeError: memory runs out for a single view, or `work` fails otherwise.
        """
        begin = 0
        while begin < count:
            end = min(begin + self._limit, count)
            try:
                work(begin, end)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or end - begin == 1:
                    raise
                error.__traceback__ = None  # its frames hold the batch's tensors
                self._limit = (end - begin) // 2
            else:
                begin = end
                continue
            if self.scene.scene.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"memory ran out with {end - begin} views at a time: from here on {self._limit} are rendered at a time",
                RuntimeWarning,
                stacklevel=4,
            )

    def viewmats(self, poses: Any) -> Tensor:
        like = self.scene.scene.means
        matrices = torch.from_numpy(world_to_camera(np.asarray(poses))).to(like.dtype)
        # A copy from ordinary memory would wait for all that is queued before it.
        return matrices.pin_memory().to(like.device, non_blocking=True) if like.is_cuda and len(matrices) else (
            matrices.to(like.device)
        )  # fmt: skip

    def ids(self, indexes: Any, m: int) -> list[int]:
        if indexes is None:
            return list(range(m))
        numbers = indexes.tolist() if isinstance(indexes, (Tensor, np.ndarray)) else list(indexes)
        if len(numbers) != m:
            raise ValueError(f"indexes must hold one number for each of {m} poses, got {len(numbers)}")
        return [check.integer(f"indexes[{i}]", number, 0, 1 << 40) for i, number in enumerate(numbers)]


class _ComingMaps:
    """Feature maps of a call's batches, made one batch ahead: on a GPU on a stream of their own. A context.

    Maps that are there already are not made ahead, nor is anything on a CPU, which would gain nothing.
    """

    def __init__(self, owner: RandomViewSynthesizer) -> None:
        device = owner.scene.scene.device
        self._owner = owner
        self._ahead = callable(owner.references) and _makes_ahead(device)
        self._stream = self._rendering = None
        if self._ahead and device.type == "cuda":
            self._stream, self._rendering = _map_stream(device), torch.cuda.current_stream(device)
        self._coming: tuple[list[int], Tensor | Sequence[Tensor] | Exception] | None = None

    def __enter__(self) -> _ComingMaps:
        if self._stream is not None:
            self._stream.wait_stream(self._rendering)  # what the caller has queued may be what maps are made of
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        if self._stream is not None:
            self._rendering.wait_stream(self._stream)  # a cache's maps are the caller's stream's again

    def take(self, ids: Sequence[int]) -> Tensor | Sequence[Tensor]:
        """The maps of `distinct(ids)`, ready for the stream that renders. What making them ahead failed with is raised
        here, in its turn."""
        used = distinct(ids)
        coming, self._coming = self._coming, None
        made = coming[1] if coming is not None and coming[0] == used else self._make(used)
        if isinstance(made, Exception):
            raise made
        if self._stream is not None:
            self._rendering.wait_stream(self._stream)
            for one in [made] if isinstance(made, Tensor) else made:
                if isinstance(one, Tensor) and one.is_cuda:  # anything else is refused by `RapScene.render`
                    one.record_stream(self._rendering)
        return made

    def start(self, ids: Sequence[int]) -> None:
        """Begin with the next batch."""
        if not (self._ahead and ids):
            return
        used = distinct(ids)
        try:
            self._coming = used, self._make(used)
        except Exception as error:
            # Where memory runs out it may suffice in its turn, without the batch that renders now.
            self._coming = None if out_of_memory(error) else (used, error)

    def drop(self) -> None:
        """Forget what was made ahead."""
        self._coming = None

    def _make(self, used: list[int]) -> Tensor | Sequence[Tensor]:
        with torch.cuda.stream(self._stream):
            return self._owner.maps(used)


def distinct(ids: Sequence[int]) -> list[int]:
    """Each number once, in order."""
    return sorted(set(ids))


def _makes_ahead(device: torch.device) -> bool:
    return device.type == "cuda"


@lru_cache(maxsize=64)
def _map_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all calls: torch keeps the memory of a stream for that stream."""
    return torch.cuda.Stream(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the GPU or on the host."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()


def _valid_counts(means: Tensor, boxes: Tensor, viewmats: Tensor, K: Tensor) -> Tensor:
    """[P]: how many of means [n, 3] fall on the projected map at viewmats [P, 4, 4], as `map_coordinates` says."""
    in_camera = (viewmats[:, None, :3, :3] * means[:, None]).sum(-1) + viewmats[:, None, :3, 3]
    u, v, z = (K * in_camera[..., None, :]).sum(-1).unbind(-1)
    xy = torch.stack([u, v], -1) / (z + Z_OFFSET)[..., None]
    return (((xy > 0) & (xy < boxes.flip(-1))).all(-1) & (z > 0)).sum(-1)


def _size(name: str, value: Any) -> tuple[int, int]:
    sides = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else ()
    if len(sides) != 2:
        raise ValueError(f"{name} must be (height, width) in pixels, got {value!r}")
    height, width = (check.integer(f"{name}[{i}]", side, 1, check.MAX_IMAGE_SIZE, " pixels") for i, side in
                     enumerate(sides))  # fmt: skip
    return height, width
