"""RAP's three renderers of random views by name, constructor and methods, drawing in batches.

    GaussianRenderer               all poses are drawn, then all weights
    GaussianRendererWithAttempts   drawn again where RAP cannot render, at most max_attempts times
    GaussianRendererWithBrisqueAttempts   drawn again until the picture's BRISQUE score is below a threshold

Each is a spawned process that renders set after set into its `queue`; `load_gaussians` and `render_set` also work in
the caller's own process. `rapfast.rvs.synthesis` does the work and says what is drawn.

RAP hands over objects of its own. What is read of them, `ROLES` says, and what is assumed where the name is not known:

    of configs   model_path, rvs_trans, rvs_rotation, d_max, max_attempts, brisque_threshold, vis_rvs, ...
    of dl        `dl.dataset`, or dl itself: the training poses and raw reference images, in one order
    cam_params   intrinsics and size of the rendered picture: K [3, 3], or fx, fy, cx, cy, or FoVx and FoVy; image_width
                 and image_height, or width and height. An object or a mapping, or a sequence whose first is taken
    hw           (h, w) of the images that come out

Each may be given another attribute, or a value, by `install_rvs`.
"""

from __future__ import annotations

import math
import multiprocessing
import queue
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing  # so that a queue hands tensors over in shared memory
from torch import Tensor

from rapfast import _check as check
from rapfast.appearance.rap_scene import RapScene, load_rap
from rapfast.rvs.brisque import Brisque
from rapfast.rvs.brisque_loop import Shown, SyntheticViews
from rapfast.rvs.map_cache import FeatureMapCache
from rapfast.rvs.output import PictureWriter, to_pixels
from rapfast.rvs.poses import WEIGHTS, PoseSampler, as_numbers, bounding_box, draw_weights
from rapfast.rvs.references import ReferenceMaps
from rapfast.rvs.synthesis import RandomViewSynthesizer

_SPAWN = multiprocessing.get_context("spawn")

REQUIRED = object()


class Role(NamedTuple):
    """Something that a renderer must know: in whom and under which names it is looked for, what holds where it is in
    none of them (REQUIRED: an error), and what it is, for sentences."""

    holder: str
    attributes: tuple[str, ...]
    default: Any
    what: str


ROLES: dict[str, Role] = {
    "model_path": Role("configs", ("model_path",), REQUIRED, "the folder of the trained scene"),
    "iteration": Role("configs", ("iteration",), None, "which of its iterations; None or -1 is the largest"),
    "device": Role("configs", ("device",), None, "where to render; None is the GPU where there is one"),
    "translation": Role("configs", ("rvs_trans",), REQUIRED, "the range of the moves in metres"),
    "rotation": Role("configs", ("rvs_rotation",), REQUIRED, "the range of the turns in degrees"),
    "kind": Role("configs", ("rvs_kind",), "default", "the sampler: default, xz_plane or uniform_sphere"),
    "d_max": Role("configs", ("d_max",), REQUIRED, "metres by which the training poses' box is grown; None for no box"),
    "max_attempts": Role("configs", ("max_attempts",), REQUIRED, "the most attempts at a view"),
    "brisque_threshold": Role("configs", ("brisque_threshold",), REQUIRED, "the score that ends the attempts"),
    "appearance_augmentation": Role("configs", ("appearance_augmentation",), True, "whether weights are drawn"),
    "white_background": Role("configs", ("white_background",), False, "whether the background is white, else black"),
    "vis_rvs": Role("configs", ("vis_rvs",), False, "whether pictures are written as JPEGs"),
    "refresh_rate": Role("configs", ("rvs_refresh_rate",), 1, "epochs from one set to the next"),
    "epochs": Role("configs", ("epochs",), None, "the process renders while `epoch` is below it; None: until stopped"),
    "seed": Role("configs", (), None, "of numpy's generator in the spawned process; None leaves it unseeded"),
    "precision": Role("configs", (), None, "of the colour network and the feature maps, as in RapScene.render"),
    "map_bytes": Role("configs", (), 4 << 30, "memory of the device for kept feature maps"),
    "map_pinned_bytes": Role("configs", (), 0, "memory of the host for those that do not fit there"),
    "destination": Role("configs", (), "cpu", "where images end up: cpu; pinned or device without a process"),
    "poses": Role("dataset", ("poses",), REQUIRED, "training poses [M, 3, 4], [M, 4, 4] or [M, 12], camera-to-world"),
    "images": Role("dataset", ("original_images", "images"), REQUIRED, "raw reference images [3, H, W], in 0..1 or "
                   "uint8: a tensor, a sequence or a function of the number"),
    "image_names": Role("dataset", ("image_names", "img_names"), None, "names of the JPEGs; None: five digits"),
}  # fmt: skip


@dataclass(frozen=True)
class RendererOptions:
    """What `install_rvs` was told: other attributes and fixed values of `ROLES`."""

    names: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


class GaussianRenderer(_SPAWN.Process):
    """RAP's plain renderer.

    Args:
        configs, cam_params, hw, dl: see the module.
        start_epoch: of the first set.

    Attributes:
        epoch: of the set that is rendered next; shared with the process, so either side may set it.
        queue: (poses, images) of each set, as `render_set` returns them. It holds one; the process waits with the next.
            What goes wrong in the process is raised by `queue.get()`.
        gaussians: the `RapScene`, after `load_gaussians`.

    Raises:
        TypeError, ValueError: naming what was expected of which object, and what came.
    """

    rapfast_options = RendererOptions()

    def __init__(self, configs: Any, cam_params: Any, hw: Sequence[int], dl: Any, start_epoch: int) -> None:
        super().__init__(daemon=True)
        self.options = type(self).rapfast_options
        self.configs, self.cam_params, self.dl = configs, cam_params, dl
        self.hw = tuple(
            check.integer(f"hw[{i}]", side, 1, check.MAX_IMAGE_SIZE, " pixels") for i, side in enumerate(hw)
        )
        if len(self.hw) != 2:
            raise ValueError(f"hw must be (height, width) in pixels, got {hw!r}")
        read_camera(cam_params)
        self._check_settings()
        self._epoch = _SPAWN.Value("q", check.integer("start_epoch", start_epoch, 0, 1 << 40))
        self.queue = _SPAWN.Queue(maxsize=1)
        self._stopped = _SPAWN.Event()
        self._unload()

    @property
    def epoch(self) -> int:
        return self._epoch.value

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.value = check.integer("epoch", value, 0, 1 << 40)

    def load_gaussians(self) -> None:
        """Read the scene's files and put them on the device."""
        iteration = self._role("iteration")
        scene = load_rap(Path(self._role("model_path")), None if iteration in (None, -1) else iteration)
        device = self._role("device")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.gaussians = scene.to(device)
        cache = FeatureMapCache(
            self.gaussians, gpu_bytes=self._role("map_bytes"), pinned_bytes=self._role("map_pinned_bytes"),
            precision=self._role("precision"),
        )  # fmt: skip
        self.references = ReferenceMaps(self.gaussians, self._role("images"), cache=cache, by_number=True)

    @torch.no_grad()
    def render_set(self, name: str) -> tuple[Tensor, Tensor]:
        """One view around each training pose: poses [M, 3, 4] float64 and images [M, 3, h, w] float32, on the CPU.

        Args:
            name: of the set ("train"); names the folder of the JPEGs.
        """
        return self._views(name, self._training_poses(), None, False, 8, drawn=False)

    @torch.no_grad()
    def render_perturbed_imgs(
        self, name: str, poses: Any, indexes: Any = None, disable_tqdm: bool = False, batch_size: int = 8
    ) -> Any:
        """Images [M, 3, h, w] at `poses` themselves, each under a weight of its own.

        Args:
            name: as in `render_set`.
            poses: [M, 3, 4] camera-to-world, drawn already.
            indexes: [M] numbers of the training images that they take their appearance from; None is 0 .. M - 1.
            disable_tqdm: no progress bar.
            batch_size: views rendered at a time.
        """
        return self._views(name, poses, indexes, disable_tqdm, batch_size, drawn=True)[1]

    def run(self) -> None:
        """The process: sets of training views into the queue, one every `refresh_rate` epochs, until `stop`."""
        try:
            if (seed := self._role("seed")) is not None:
                np.random.seed(seed)
            if self.gaussians is None:
                self.load_gaussians()
            if (destination := self._role("destination")) != "cpu":
                raise ValueError(
                    f"destination must be 'cpu' in a process, whose queue takes no other, got {destination!r}"
                )
            last = self._role("epochs")
            step = check.integer("refresh_rate", self._role("refresh_rate"), 1, 1 << 40)
            while not self._stopped.is_set() and (last is None or self.epoch < last):
                self._hand_over(self.render_set("train"))
                with self._epoch.get_lock():
                    self._epoch.value += step
        except Exception:
            self._hand_over(_Failure(traceback.format_exc()))
        # A tensor in the queue is this process's memory until the other side has taken it.
        while not self._stopped.wait(1.0) and _parent_lives():
            pass

    def stop(self, timeout: float = 10.0) -> None:
        """End the process, in the middle of a set if need be after `timeout` seconds. Harmless where none runs."""
        self._stopped.set()
        if self.pid is None:
            return
        self.queue.cancel_join_thread()
        self.join(timeout)
        if self.is_alive():
            self.terminate()
            self.join()

    # --- the parts that differ ---------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        for role, (holder, *_) in ROLES.items():
            if holder == "configs" and role not in ("max_attempts", "brisque_threshold"):
                self._role(role)

    def _synthesize(self, views: RandomViewSynthesizer, poses: Any, indexes: Any, drawn: bool) -> SyntheticViews:
        if not drawn:
            return views.perturbed(poses, self._sampler(), None, self._weights(), indexes)
        weights = self._weights()
        given = None if weights is None else draw_weights(len(poses), None, weights)
        return views.render(poses, given, indexes)

    # --- what they share ---------------------------------------------------------------------------------------------

    def _views(
        self, name: str, poses: Any, indexes: Any, disable_tqdm: bool, batch_size: int, drawn: bool
    ) -> tuple[Tensor, Tensor]:
        if self.gaussians is None:
            raise RuntimeError("load_gaussians must be called before views are rendered")
        K, height, width = read_camera(self.cam_params)
        if self.brisque is None:
            self.brisque = Brisque(self.gaussians.scene.device)
        views = RandomViewSynthesizer(
            self.gaussians, K, (height, width), self.references, self.hw, batch_size=batch_size,
            background=(1.0, 1.0, 1.0) if self._role("white_background") else None, brisque=self.brisque,
            precision=self._role("precision"), destination=self._role("destination"),
        )  # fmt: skip
        start = self._poses_3x4("poses", poses)
        with _Progress(len(start), disable_tqdm) as progress:
            views.on_progress = progress
            if not self._role("vis_rvs"):
                made = self._synthesize(views, start, indexes, drawn)
            else:
                folder = Path(self._role("model_path")) / name / f"ours_{self.epoch}" / "virtual_renders"
                numbers = views.ids(indexes, len(start))
                with PictureWriter(folder) as writer:
                    views.on_pictures = _Writing(writer, [self._image_name(i) for i in numbers])
                    made = self._synthesize(views, start, indexes, drawn)
        return made.poses, made.images

    def _sampler(self) -> PoseSampler:
        d_max = self._role("d_max")
        box = None if d_max is None else bounding_box(self._training_poses(), d_max)
        return PoseSampler(self._role("translation"), self._role("rotation"), self._role("kind"), box)

    def _weights(self) -> tuple[float, float] | None:
        return WEIGHTS if check.flag("appearance_augmentation", self._role("appearance_augmentation")) else None

    def _training_poses(self) -> Any:
        return self._poses_3x4("the training poses", self._role("poses"))

    @staticmethod
    def _poses_3x4(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            value = torch.stack(list(value))
        poses = as_numbers(name, value)
        return poses.reshape(-1, 3, 4) if poses.ndim == 2 and poses.shape[1] == 12 else poses

    def _image_name(self, number: int) -> str:
        names = self._role("image_names")
        if names is None:
            return f"{number:05d}"
        return Path(str(names[number])).stem

    def _role(self, role: str) -> Any:
        """The value of one of `ROLES`."""
        holder_name, attributes, default, what = ROLES[role]
        if role in self.options.values:
            return self.options.values[role]
        holder = self.configs if holder_name == "configs" else getattr(self.dl, "dataset", self.dl)
        attributes = (self.options.names[role],) if role in self.options.names else attributes
        for attribute in attributes:
            found, value = _look(holder, attribute)
            if found:
                return value
        if default is not REQUIRED and role not in self.options.names:
            return default
        raise TypeError(
            f"{holder_name} must have {' or '.join(attributes)} ({what}), got a {type(holder).__name__} without: give "
            f"install_rvs names={{{role!r}: ...}} where it has another name, or values={{{role!r}: ...}}"
        )

    def _unload(self) -> None:
        self.gaussians: RapScene | None = None
        self.references: Callable[[Sequence[int]], Sequence[Tensor]] | None = None
        self.brisque: Brisque | None = None

    def _hand_over(self, item: Any) -> None:
        while not self._stopped.is_set() and _parent_lives():
            try:
                self.queue.put(item, timeout=1.0)
                return
            except queue.Full:
                continue

    def __reduce__(self) -> Any:
        """To the spawned process: without what is on the device, and by the class that can be imported there."""
        state = self.__dict__ | {"gaussians": None, "references": None, "brisque": None}
        return _new, (type(self).__dict__.get("rapfast_base", type(self)),), state


class GaussianRendererWithAttempts(GaussianRenderer):
    """RAP's renderer with attempts; its `render_perturbed_imgs` draws the poses itself and returns them too."""

    @torch.no_grad()
    def render_perturbed_imgs(
        self, name: str, poses: Any, indexes: Any = None, disable_tqdm: bool = False, batch_size: int = 8
    ) -> tuple[Tensor, Tensor]:
        """Poses [M, 3, 4] float64 around `poses`, and images [M, 3, h, w]; the rest as in `GaussianRenderer`."""
        return self._views(name, poses, indexes, disable_tqdm, batch_size, drawn=False)

    def _check_settings(self) -> None:
        super()._check_settings()
        self._role("max_attempts")

    def _synthesize(self, views: RandomViewSynthesizer, poses: Any, indexes: Any, drawn: bool) -> SyntheticViews:
        return views.with_attempts(
            poses, self._sampler(), self._role("max_attempts"), None, self._weights(), indexes
        )  # fmt: skip


class GaussianRendererWithBrisqueAttempts(GaussianRendererWithAttempts):
    """RAP's renderer that tries until BRISQUE is content."""

    def _check_settings(self) -> None:
        super()._check_settings()
        self._role("brisque_threshold")

    def _synthesize(self, views: RandomViewSynthesizer, poses: Any, indexes: Any, drawn: bool) -> SyntheticViews:
        attempts, threshold = self._role("max_attempts"), self._role("brisque_threshold")
        return views.with_brisque(poses, self._sampler(), attempts, threshold, None, self._weights(), indexes)


def read_camera(cam_params: Any) -> tuple[Tensor, int, int]:
    """K [3, 3] float64, height and width of RAP's cam_params, see the module.

    Raises:
        TypeError, ValueError: naming what was expected and what came.
    """
    if isinstance(cam_params, (list, tuple)) and cam_params:
        cam_params = cam_params[0]

    def get(*names: str) -> Any:
        for name in names:
            found, value = _look(cam_params, name)
            if found and value is not None:
                return value
        raise TypeError(
            f"cam_params must have {' or '.join(names)} (intrinsics as K, as fx, fy, cx and cy, or as FoVx and FoVy; "
            f"image_width and image_height, or width and height), got a {type(cam_params).__name__} without"
        )

    width, height = (
        check.integer(f"cam_params.{name}", get(name, short), 1, check.MAX_IMAGE_SIZE, " pixels")
        for name, short in (("image_width", "width"), ("image_height", "height"))
    )
    known = {name for name in ("K", "fx", "fy") if _look(cam_params, name)[1] is not None}
    if "K" in known:
        matrix = get("K")
        matrix = torch.from_numpy(as_numbers("cam_params.K", matrix() if callable(matrix) else matrix))
        matrix = matrix[0] if matrix.shape == (1, 3, 3) else matrix
        if matrix.shape != (3, 3):
            raise ValueError(f"cam_params.K must be [3, 3], got {list(matrix.shape)}")
        return matrix, height, width
    K = torch.eye(3, dtype=torch.float64, device="cpu")
    for axis, (focal, centre, angle, side) in enumerate((("fx", "cx", "FoVx", width), ("fy", "cy", "FoVy", height))):
        if known:
            K[axis, axis] = check.number(f"cam_params.{focal}", get(focal))
            K[axis, 2] = check.number(f"cam_params.{centre}", get(centre))
        else:
            half = check.number(f"cam_params.{angle}", get(angle), 0.0, math.pi, "an angle in radians") / 2
            K[axis, axis], K[axis, 2] = side / (2 * math.tan(half)), side / 2
    return K, height, width


class _Writing:
    """Pictures under RAP's names: of each view the one that is used, and by BRISQUE those refused too."""

    def __init__(self, writer: PictureWriter, names: Sequence[str]) -> None:
        self.writer, self.names = writer, names

    def __call__(self, pictures: Tensor, about: list[Shown]) -> None:
        for pixels, shown in zip(to_pixels(pictures).cpu(), about, strict=True):
            verdict = "" if shown.score is None else f"_{'deny' if shown.refused else 'acc'}_{shown.score:.2f}"
            self.writer.put(f"{self.names[shown.view]}{verdict}", pixels)


class _Progress:
    """A bar of tqdm's, which RAP has; where it is missing, or not wanted, nothing."""

    def __init__(self, total: int, disabled: bool) -> None:
        self._bar = None
        if not disabled:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc="random views")

    def __call__(self, n: int) -> None:
        if self._bar is not None:
            self._bar.update(n)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _Failure:
    """In the queue, what went wrong: taking it out raises."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> Any:
        return _fail, (self.text,)


def _fail(text: str) -> None:
    raise RuntimeError(f"the renderer's process failed:\n{text}")


def _new(kind: type) -> Any:
    return kind.__new__(kind)


def _look(holder: Any, name: str) -> tuple[bool, Any]:
    """Whether an object or mapping has something of that name, and what."""
    if isinstance(holder, Mapping):
        return name in holder, holder.get(name)
    return hasattr(holder, name), getattr(holder, name, None)


def _parent_lives() -> bool:
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()
