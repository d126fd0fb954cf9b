"""Random views as a dataset: a training loop reads a batch while the next ones are rendered."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .. import _check
from ..appearance import RapScene
from ..appearance.fused import half_precision
from ..appearance.view_inputs import check_map_ids, check_maps
from ..cameras import Cameras
from ..postprocess import PostProcess
from .poses import WEIGHTS, PoseSampler, as_poses, weight_range, world_to_camera
from .producers import Batch, ProcessProducer, Producer, ThreadProducer
from .synthesis import out_of_memory

Maps = Tensor | Sequence[Tensor] | Callable[[list[int]], Sequence[Tensor]]


class RandomViewDataset(IterableDataset):
    """Views of a scene from random poses, under random weights, rendered in the background while others are used.

        views = RandomViewDataset(scene, cameras, PoseSampler(0.3, 10.0), images=images, batch_size=8)
        for epoch in range(100):
            for batch in views:
                loss = criterion(model(batch["image"]), batch["pose"])

    A batch is a dictionary:

    - "image" [B, 3, h, w], as `postprocess` leaves it;
    - "pose" [B, 3, 4] float32, camera-to-world, drawn by `sampler` around one of the cameras;
    - "weight" [B] float32, the view's appearance weight;
    - "reference" [B] int64, the number of its reference image.

    An epoch goes through the cameras in random order, as often as it takes; its last batch may be smaller. Every
    loop over the dataset is the next epoch. The batches follow from the arguments and the number of the epoch alone:
    `depth`, `where`, breaking out of loops and the training's speed change none of their bits (another kind of device
    does, as it does in `RapScene.render`). Rendering goes on across the end of an epoch. It ends with `close`, a
    `with` block, the dataset's last reference or the interpreter, and when a loop is left early; the next loop begins
    anew. What fails in the background is raised in the loop, with its traceback.

    In a `DataLoader` pass ``batch_size=None, num_workers=0``: the background is here already.

    Args:
        scene: on the device that renders, unless `where` names another. Must not change while a loop is open.
        cameras: M views to sample around, their intrinsics and their size (`Cameras.from_poses` makes them of poses).
        sampler: a `PoseSampler`; or a function (poses [V, 3, 4] float64 tensor, torch.Generator) -> poses [V, 3, 4] of
            these alone, such as ``lambda poses, rng: sample_kept(sampler, poses, FarFrom(others, 0.1), rng=rng)[0]``.
        images: R reference images [R, 3, H, W] or a sequence of [3, H, W], floating point in 0..1 or uint8, on any
            device; of sequences other than lists and tuples an image is read when it is used. Their feature maps are
            made at the first use, and kept while they fit into `map_bytes`; others are made for each batch.
        feature_maps: in place of images, as `RapScene.render` takes them, or a function that gives those of a list of
            numbers (a cache, for instance) on the device that renders.
        map_ids: [M] the reference image of each camera; may be left out where R is 1 or M.
        batch_size: views of a batch. Where memory runs out they are rendered in smaller groups, with a RuntimeWarning.
        views_per_epoch: None is M.
        weights: (low, high) of the weights' uniform distribution.
        postprocess: on the device that renders; its layout is always "CHW". None leaves colours as they are.
        background: (r, g, b) behind the scene; None is black.
        refresh_every: new views every so many epochs. Those in between show the same views in another order, out of
            memory (of the host, page-locked for a GPU; lost where a process is left early, and rendered again).
        depth: back-pressure: how many batches may be finished or under way, ahead of the one in use. From 4 on, half as
            many are rendered in one call, whose Python, which a training loop in this process waits for, is then spread
            over them; they share their memory.
        where: "thread" (None): a thread of this process, on a GPU on a stream of the lowest priority. "stream": the
            same, and the scene must be on a GPU. "process": a spawned process on the scene's device, for training loops
            that hold the interpreter's lock; scene and sampler are pickled, the main script needs an
            ``if __name__ == "__main__":``. A device: a thread with a copy of the scene there.
        device: of the batches; None is the scene's.
        seed: >= 0.
        precision: see `RapScene.render`.
        map_bytes: most memory for kept maps of `images`.
        replay_bytes: most memory for views that are shown again; see the attribute.

    Attributes:
        epoch: number of the next loop; may be set.
        replayed_bytes: memory that refresh_every > 1 takes, 0 for 1.

    CUDA's lowest priority is also that of its default stream. For rendering to give way to training, run the loop under
    ``torch.cuda.stream(torch.cuda.Stream(priority=-1))``.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        scene: RapScene,
        cameras: Cameras,
        sampler: PoseSampler | Callable[[Tensor, torch.Generator], Any],
        *,
        images: Tensor | Sequence[Tensor] | None = None,
        feature_maps: Maps | None = None,
        map_ids: Tensor | Sequence[int] | None = None,
        batch_size: int = 8,
        views_per_epoch: int | None = None,
        weights: Sequence[float] = WEIGHTS,
        postprocess: PostProcess | None = None,
        background: Sequence[float] | None = None,
        refresh_every: int = 1,
        depth: int = 2,
        where: str | torch.device | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        precision: str | None = None,
        map_bytes: int = 4 << 30,
        replay_bytes: int = 4 << 30,
    ) -> None:
        if not isinstance(scene, RapScene):
            raise TypeError(f"scene must be a RapScene, got {_check.describe(scene)}")
        if not isinstance(cameras, Cameras) or not len(cameras):
            raise TypeError(f"cameras must be a Cameras of at least one view, got {_check.describe(cameras)}")
        if not isinstance(sampler, PoseSampler) and not callable(sampler):
            raise TypeError(f"sampler must be a PoseSampler or a function, got {_check.describe(sampler)}")
        if not isinstance(postprocess, PostProcess | None):
            raise TypeError(f"postprocess must be a PostProcess or None, got {_check.describe(postprocess)}")
        if background is not None:
            background = tuple(_check.number("background", value) for value in background)
            if len(background) != 3:
                raise ValueError(f"background must be three numbers, got {len(background)}")
        self._in_process, place = _place(where, scene.scene.device)
        self._out = _device("device", device) if device is not None else scene.scene.device
        self._depth = _check.integer("depth", depth, 1, 1 << 20)
        n = len(cameras) if views_per_epoch is None else views_per_epoch
        maps, n_maps = _maps_given(scene, images, feature_maps)
        if n_maps is None and map_ids is None:
            raise ValueError("map_ids must be given where feature_maps is a function")
        self._source = _Views(
            scene=scene,
            device=place,
            cameras=cameras.to("cpu"),
            sampler=sampler,
            images=images,
            maps=maps,
            references=check_map_ids(map_ids, (1 << 62) if n_maps is None else n_maps, len(cameras)),
            batch_size=_check.integer("batch_size", batch_size, 1, 1 << 20),
            n=_check.integer("views_per_epoch", n, 1, 1 << 40),
            weights=weight_range("weights", weights),
            postprocess=replace(postprocess or PostProcess(), layout="CHW"),
            background=background,
            refresh_every=_check.integer("refresh_every", refresh_every, 1, 1 << 62),
            seed=_check.integer("seed", seed, 0, (1 << 64) - 1),
            precision=precision,
            map_bytes=_check.integer("map_bytes", map_bytes, 0, 1 << 62),
        )
        if place.type == scene.scene.device.type:
            half_precision(precision, scene.scene.means)  # refuses here what would fail in the background
        per_view = sum(t.numel() * t.element_size() for t in self._source.empty(1).values())
        self.replayed_bytes = self._source.n * per_view if self._source.refresh_every > 1 else 0
        if self.replayed_bytes > replay_bytes:
            raise ValueError(
                f"refresh_every={refresh_every} keeps {self._source.n} views, which take {self.replayed_bytes} bytes, "
                f"more than replay_bytes={replay_bytes}: allow more, or take fewer or smaller views or float16 "
                "(PostProcess)"
            )
        self._epoch = 0
        self._running = _Running()
        weakref.finalize(self, _Running.stop, self._running)

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, number: int) -> None:
        self._epoch = _check.integer("epoch", number, 0, 1 << 62)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self._source.n // self._source.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the next epoch. An older loop over this dataset that is still open fails at its next batch."""
        if get_worker_info() is not None:
            raise RuntimeError(
                "RandomViewDataset renders in the background itself: use it in a DataLoader with num_workers=0, "
                'and where="process" for another process'
            )
        epoch = self._epoch
        self._epoch += 1
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[Batch]:
        running = self._running
        if running.producer is None or running.next_epoch != epoch:
            running.stop()
            running.producer = self._start(epoch)
        producer, running.next_epoch = running.producer, None
        left = len(self)
        try:
            while left:
                if running.producer is not producer:
                    raise RuntimeError("this loop over the dataset has ended: it was closed, or another has begun")
                batch = producer.get()
                left -= 1
                if not left:  # before the last batch is given: the loop may be left with it
                    running.next_epoch = epoch + 1
                yield batch
                del batch
        finally:
            if left and running.producer is producer:
                running.stop()

    def _start(self, epoch: int) -> Producer:
        if not self._in_process:
            return ThreadProducer(self._source, epoch, self._depth, self._out)
        source = self._source
        pinned = "cuda" in (source.device.type, self._out.type)
        return ProcessProducer(source, epoch, self._depth, source.empty(source.batch_size), self._out, pinned)

    def close(self) -> None:
        """End the background. An open loop fails at its next batch; a new one begins anew."""
        self._running.stop()

    def __enter__(self) -> RandomViewDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            "RandomViewDataset cannot be pickled: it renders in the background itself; use it in a DataLoader with "
            'num_workers=0, and where="process" for another process'
        )


class _Running:
    """What outlives a loop over the dataset, but not the dataset."""

    def __init__(self) -> None:
        self.producer: Producer | None = None
        self._owner = os.getpid()
        self.next_epoch: int | None = None
        """The epoch whose first batch the producer gives next; None within an epoch."""

    def stop(self) -> None:
        producer, self.producer, self.next_epoch = self.producer, None, None
        if producer is not None and os.getpid() == self._owner:  # a fork's copy is not its own to end
            producer.stop()


@dataclass(frozen=True)
class _Plan:
    """V views. viewmats [V, 4, 4] and Ks [V, 3, 3] of the scene's dtype, weights [V], references [V] numbers of images;
    and what batches hold of them, `given`, by its name there."""

    viewmats: Tensor
    Ks: Tensor
    weights: list[float]
    references: list[int]
    given: Batch


@dataclass(eq=False)
class _Views:
    """Draws and renders the views, one batch after the other. Used by one thread at a time."""

    scene: RapScene
    device: torch.device
    cameras: Cameras
    sampler: PoseSampler | Callable[[Tensor, torch.Generator], Any]
    images: Tensor | Sequence[Tensor] | None
    maps: Maps | None
    references: list[int]
    batch_size: int
    n: int
    weights: tuple[float, float]
    postprocess: PostProcess
    background: tuple[float, ...] | None
    refresh_every: int
    seed: int
    precision: str | None
    map_bytes: int

    def __post_init__(self) -> None:
        self._placed: RapScene | None = None
        self._background: Tensor | None = None
        self._made: dict[int, Tensor] = {}
        self._made_bytes = 0
        self._planned: tuple[int, _Plan] | None = None
        self._at_once = 1 << 62  # views in one call; lowered where memory runs out
        self._generation = -1
        self._kept: Tensor | None = None
        self._have = torch.zeros(0, dtype=torch.bool, device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        """For another process: plain CPU tensors, and nothing that it can compute."""
        scene = self.scene.to("cpu")
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        state["scene"] = RapScene(
            scene.scene, scene.box_coord, scene.feature_map_net, scene.color_net, scene.config, scene.iteration
        )
        for name in ("images", "maps"):
            state[name] = _moved(state[name], torch.device("cpu"))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def empty(self, count: int) -> Batch:
        """A batch's tensors with nothing in them, on the CPU."""
        height, width = self.postprocess.size or (self.cameras.height, self.cameras.width)
        dtype = self.postprocess.dtype or self.scene.scene.dtype
        return {
            "image": torch.empty(count, 3, height, width, dtype=dtype, device="cpu"),
            "pose": torch.empty(count, 3, 4, device="cpu"),
            "weight": torch.empty(count, device="cpu"),
            "reference": torch.empty(count, dtype=torch.int64, device="cpu"),
        }

    def batches(self, epoch: int, at_once: int) -> Iterator[list[Batch]]:
        """From the first of `epoch` on, without end; up to `at_once` of an epoch are rendered together. "image" may be
        on `device`, the rest is on the CPU."""
        self._at_once = min(self._at_once, at_once * self.batch_size)
        if self._placed is None:
            self._placed = self.scene if self.scene.scene.device == self.device else self.scene.to(self.device)
            self.maps = _moved(self.maps, self.device)
            if self.background is not None:
                self._background = torch.tensor(self.background, device=self.device, dtype=self._placed.scene.dtype)
        while True:
            generation, replay = divmod(epoch, self.refresh_every)
            plan = self._plan(generation)
            order = torch.arange(self.n, device="cpu")
            if replay:
                order = torch.randperm(self.n, generator=self._generator(1, epoch), device="cpu")
            for views in order.split(at_once * self.batch_size):
                made = {"image": self._images(plan, generation, views)}
                made |= {name: tensor[views] for name, tensor in plan.given.items()}
                parts = zip(*(tensor.split(self.batch_size) for tensor in made.values()), strict=True)
                yield [dict(zip(made, part, strict=True)) for part in parts]
            epoch += 1

    def _generator(self, use: int, number: int) -> torch.Generator:
        """Independent numbers for each use and number: always the CPU's, so that poses do not depend on the device."""
        state = np.random.SeedSequence([self.seed, use, number]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def _plan(self, generation: int) -> _Plan:
        if self._planned is None or self._planned[0] != generation:
            self._planned = generation, self._drawn(generation)
        return self._planned[1]

    def _drawn(self, generation: int) -> _Plan:
        rng = self._generator(0, generation)
        m = len(self.cameras)
        rounds = [torch.randperm(m, generator=rng, device="cpu") for _ in range(-(-self.n // m))]
        cameras = torch.cat(rounds)[: self.n]
        low, high = self.weights
        weights = low + (high - low) * torch.rand(self.n, generator=rng, dtype=torch.float64, device="cpu")
        around = torch.linalg.inv(self.cameras.viewmats.double())[cameras, :3]
        draw = self.sampler.sample if isinstance(self.sampler, PoseSampler) else self.sampler
        poses = torch.from_numpy(as_poses("the sampler's poses", draw(around, rng)))
        if len(poses) != self.n:
            raise ValueError(f"the sampler must give one pose for each of {self.n}, got {len(poses)}")
        references = [self.references[k] for k in cameras.tolist()]
        given = {"pose": poses.float(), "weight": weights.float(), "reference": torch.tensor(references, device="cpu")}
        Ks = self.cameras.Ks.to(self.scene.scene.dtype)[cameras]
        return _Plan(world_to_camera(poses).to(Ks.dtype), Ks, weights.tolist(), references, given)

    def _images(self, plan: _Plan, generation: int, views: Tensor) -> Tensor:
        if self.refresh_every == 1:
            return self._render(plan, views)
        pinned = self.device.type == "cuda"
        if self._kept is None:
            self._kept = torch.empty_like(self.empty(self.n)["image"], pin_memory=pinned)
        if self._generation != generation:
            self._generation, self._have = generation, torch.zeros(self.n, dtype=torch.bool, device="cpu")
        # A view's bits do not depend on the others in its batch, so those that lack are rendered by themselves.
        lacking = views[~self._have[views]]
        if len(lacking):
            rendered = self._render(plan, lacking)
            for row, image in zip(lacking.tolist(), rendered, strict=True):
                self._kept[row].copy_(image, non_blocking=True)
            if pinned:
                torch.cuda.current_stream(self.device).synchronize()
            self._have[lacking] = True
            if len(lacking) == len(views):
                return rendered
        shape, dtype = (len(views), *self._kept.shape[1:]), self._kept.dtype
        images = torch.empty(shape, dtype=dtype, pin_memory=pinned, device="cpu")
        return torch.index_select(self._kept, 0, views, out=images)

    def _render(self, plan: _Plan, views: Tensor) -> Tensor:
        parts = list(views.split(self._at_once))
        done: list[Tensor] = []
        while len(done) < len(parts):
            try:
                done.append(self._rendered(plan, parts[len(done)]))
                continue
            except Exception as error:
                if not out_of_memory(error) or len(parts[len(done)]) == 1:
                    raise
            # Behind the handler, which keeps alive what the failed call had made.
            self._at_once = len(parts[len(done)]) // 2
            parts[len(done) :] = torch.cat(parts[len(done) :]).split(self._at_once)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"rendering ran out of memory: from now on {self._at_once} views at a time",
                RuntimeWarning,
                stacklevel=2,
            )
        return torch.cat(done) if len(done) > 1 else done[0]

    def _rendered(self, plan: _Plan, views: Tensor) -> Tensor:
        references = [plan.references[i] for i in views.tolist()]
        used = sorted(set(references))
        images, _, _ = self._placed.render(
            self._sent(plan.viewmats[views]), self._sent(plan.Ks[views]), self.cameras.width, self.cameras.height,
            feature_maps=self._feature_maps(used), map_ids=[used.index(k) for k in references],
            view_weights=[plan.weights[i] for i in views.tolist()],
            backgrounds=None if self._background is None else self._background.expand(len(views), 3),
            postprocess=self.postprocess, precision=self.precision,
        )  # fmt: skip
        return images

    def _sent(self, tensor: Tensor) -> Tensor:
        """On the device that renders. A copy from ordinary memory would wait there for the batch before."""
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _feature_maps(self, numbers: list[int]) -> list[Tensor]:
        if self.images is None:
            return list(self.maps(numbers)) if callable(self.maps) else [self.maps[k] for k in numbers]
        made = {k: self._made[k] for k in numbers if k in self._made}
        lacking = [k for k in numbers if k not in made]
        if lacking:
            images = [self._image(k) for k in lacking]
            for k, new in zip(lacking, self._placed.feature_maps(images, precision=self.precision), strict=True):
                made[k] = new
                n_bytes = new.numel() * new.element_size()
                if self._made_bytes + n_bytes <= self.map_bytes:
                    # A copy of its own: a slice would keep the memory of all that were made with it.
                    self._made[k] = new.clone(memory_format=torch.preserve_format)
                    self._made_bytes += n_bytes
        return [made[k] for k in numbers]

    def _image(self, number: int) -> Tensor:
        image = self.images[number]
        _check_image(f"images[{number}]", image)
        moved = image.to(self.device).to(self._placed.feature_map_net.final_conv.weight.dtype)
        return moved / 255 if image.dtype == torch.uint8 else moved


def _place(where: Any, scene_device: torch.device) -> tuple[bool, torch.device]:
    """Whether in a process of its own, and the device that renders."""
    if where in (None, "thread", "process"):
        return where == "process", scene_device
    if where == "stream":
        if scene_device.type != "cuda":
            raise ValueError(f'where="stream" needs a scene on a GPU, it is on {scene_device}: use "thread"')
        return False, scene_device
    try:
        return False, _device("where", where)
    except (RuntimeError, TypeError):
        raise ValueError(
            f'where must be "thread", "stream", "process" or a device, got {_check.describe(where)}'
        ) from None


def _device(name: str, value: Any) -> torch.device:
    device = torch.device(value)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be the CPU or a CUDA device, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name} is {device}, and torch sees no CUDA device")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _maps_given(scene: RapScene, images: Any, maps: Any) -> tuple[Maps | None, int | None]:
    """The maps, and R where it is known."""
    if (images is None) == (maps is None):
        raise ValueError("either images or feature_maps must be given, and not both")
    if maps is None:
        if not isinstance(images, Tensor | Sequence) or isinstance(images, str | bytes) or not len(images):
            raise TypeError(
                "images must be a tensor [R, 3, H, W] or a sequence of [3, H, W], at least one, "
                f"got {_check.describe(images)}"
            )
        if isinstance(images, Tensor | list | tuple):
            for i, image in enumerate(images):
                _check_image(f"images[{i}]", image)
        return None, len(images)
    if callable(maps):
        return maps, None
    return check_maps(maps, scene.scene), len(maps)


def _check_image(name: str, image: Any) -> None:
    number = isinstance(image, Tensor) and (image.is_floating_point() or image.dtype == torch.uint8)
    if not number or image.dim() != 3 or len(image) != 3:
        raise TypeError(f"{name} must be a floating-point or uint8 tensor [3, H, W], got {_check.describe(image)}")


def _moved(tensors: Any, device: torch.device) -> Any:
    if isinstance(tensors, Tensor):
        return tensors.detach().to(device)
    if isinstance(tensors, list | tuple):
        return [tensor.detach().to(device) for tensor in tensors]
    return tensors
