"""`rapfast rvs`: a set of random views of a RAP scene, as pictures, poses and a manifest."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from ..appearance import RapScene, load_rap
from ..cameras import Cameras
from ..profiling import section
from ..rvs.brisque import MIN_SIZE
from ..rvs.filters import FarFrom, TurnsInPlace
from ..rvs.hashes import fingerprint, scene_fingerprint, software
from ..rvs.poses import PoseSampler, bounding_box, weight_range
from .common import Command, check_batch, parse_device, parse_size, tuned
from .output import BackgroundWriter
from .progress import Progress
from .rvs_folder import SetFolder
from .rvs_references import References, find_references
from .rvs_views import Positions, RandomViews, camera_to_world, given_positions, grid_positions

KINDS = {"default": "default", "xz": "xz_plane", "uniform": "uniform_sphere", "sphere": "uniform_sphere"}
DISTANCE = 0.2
ATTEMPTS, QUALITY = 8, 95

_ELSEWHERE = ("out", "batch", "tuning", "cache", "refresh", "device", "overwrite", "debug")
"""Options that decide where and how, not what: the manifest leaves them out."""


@dataclass(kw_only=True)
class Rvs(Command):
    """Render random views of a RAP scene around known poses: random-view synthesis.

    By example:

    rapfast rvs output/church --poses data/church/sparse/0 --views 5000 --out church_views
      5000 views around the training poses, each in the light of its pose's own training image, under weights from
      0 to 2; pictures, cameras.json and manifest.json.

    rapfast demo --appearance --save-scene --views 4 --out demo_out
      a scene to try it with; then

    rapfast rvs demo_out/model --poses demo_out/cameras.json --reference demo_out/row_0_reference_day.png
    demo_out/row_1_reference_evening.png --reference-size 192x108 --views 16 --size 214x120 --out rvs_out

    rapfast rvs MODEL --poses transforms.json --views 1000 --brisque 40 --resize 427x240 --out out
      of up to 8 poses for a view, the first whose picture scores below 40, else the best.

    rapfast rvs MODEL --poses train.json --views 4000 --sampler lens --step 0.25 --d-max 0.5 --out out
      on a grid through the space of the given poses and half a metre around it.

    rapfast rvs MODEL --poses train.json --views 4000 --validation-poses test.json --min-distance 0.1 --out out
      none of them within ten centimetres of a validation pose.

    Interrupted, even killed, and given again, the command goes on where it was; the set is in the end the same to the
    last byte, on one machine with one version. More --views extend a set. A picture that is not what was written any
    more is rendered again. Only one process at a time may write to a folder.

    View i is drawn by a generator of its own, seeded by --seed and i, around pose i (of the grid: the i-th in an order
    drawn by --seed) modulo their number. For the draws of RAP's training loop, number by number, use rapfast.rvs from
    Python.
    """

    model: Annotated[Path, tyro.conf.arg(metavar="MODEL"), tyro.conf.Positional]
    """Folder of a trained RAP scene, with cfg_args and ckpts_point_cloud."""

    poses: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Poses to draw around: COLMAP folder, transforms.json, cameras.json."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the set; made where it does not exist."""

    views: Annotated[int, tyro.conf.arg(metavar="N")]
    """Number of views."""

    reference: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR|IMAGE ...")] = ()
    """Images or folders. A view takes its pose's where names tell, else one at random. Default: training images."""

    reference_size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """Scale reference images to this size first: that of the network's training, where it is another."""

    seed: int = 0
    """Seed of all draws."""

    batch: int | None = None
    """Views rendered in one call; changes no pixel. Default: what `rapfast tune` found for the model, else 8."""

    tuning: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File of `rapfast tune`. Default: the one in the model's folder."""

    sampler: Literal["default", "xz", "uniform", "sphere", "lens"] = "default"
    """RAP's: three angles and a move; in the xz plane; an angle about any axis and a move in a ball (both names). Or
    lens: on a regular grid through the box of the given poses, each turned from the nearest one's direction."""

    step: Annotated[float | None, tyro.conf.arg(metavar="S")] = None
    """With --sampler lens: from one point of the grid to the next, in scene units (metres)."""

    distance: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """Range of the moves, in scene units (metres); default: 0.2. With --sampler lens the farthest that a point of the
    grid may be from the nearest given pose; default: any."""

    angle: Annotated[float, tyro.conf.arg(metavar="A")] = 10.0
    """Range of the turns, in degrees."""

    d_max: Annotated[float | None, tyro.conf.arg(metavar="D")] = None
    """Keep centres within the box around the given poses, grown by this; with --sampler lens the grid fills it."""

    validation_poses: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Poses to keep away from, as --poses: those that the training is judged by."""

    min_distance: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """Draw a pose again that is nearer to a validation pose than this, in scene units (metres)."""

    min_angle: Annotated[float | None, tyro.conf.arg(metavar="A")] = None
    """The same in degrees. With both, a pose is drawn again if it is nearer in both."""

    weights: Annotated[tuple[float, float], tyro.conf.arg(metavar="LOW HIGH")] = (0.0, 2.0)
    """Range of the weight of the appearance; 1 1 for the reference image's light as it is."""

    size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """Size to render at; default: that of the poses."""

    resize: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """Size to save, by bilinear interpolation of what was rendered."""

    brisque: Annotated[float | None, tyro.conf.arg(metavar="T")] = None
    """Draw poses until a view's BRISQUE score (low is good), at weight 1, is below T."""

    attempts: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """With --brisque: at most this many poses for a view, then the best is taken; default: 8."""

    format: Literal["png", "jpeg"] = "png"
    """Of the pictures."""

    quality: int | None = None
    """With --format jpeg: 1 to 100, default 95; colours are not subsampled."""

    cache: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Keep feature maps and views here, for other runs. Only views drawn before are found again."""

    refresh: Literal["always", "changed"] | None = None
    """With --cache: render every view, or those alone that are not there; default: changed."""

    precision: Literal["fp16", "fp32"] | None = None
    """Of the networks; default: fp16 on a GPU, fp32 on the CPU."""

    iteration: int | None = None
    """Of the training; default: the last."""

    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda or cuda:NUMBER."""

    overwrite: bool = False
    """Begin anew in a folder that holds another set."""

    def run(self) -> None:
        """Check everything that can be checked, then render what is not there."""
        size, resize, reference_size = self._check()
        device = parse_device(self.device)
        cameras = _cameras(self.poses, size)
        with section("load scene"):
            scene = load_rap(self.model, self.iteration)
        with section("find references"):
            references = find_references(
                self.reference, cameras.names, self.model, scene.config, self.poses, reference_size
            )
        keep = self._keep()
        positions, sampler = self._positions(cameras, keep), self._sampler(cameras)
        with section("fingerprints"):
            settings = self._settings(scene, cameras, references, keep, resize, device)
        with section("upload scene"):
            scene = scene.to(device)
        batch, max_memory = tuned(
            self.model, device, cameras.width, cameras.height, len(scene), self.batch, self.tuning
        )
        views = RandomViews(
            scene, cameras, references, positions, sampler, keep=keep,
            saved_size=resize or (cameras.width, cameras.height),
            seed=self.seed, weights=self.weights, batch=batch, max_memory=max_memory, precision=self.precision,
            brisque=None if self.brisque is None else (self.brisque, self._attempts()),
        )  # fmt: skip
        with (
            _notes(),
            SetFolder(self.out, settings, self.views, overwrite=self.overwrite) as folder,
            views.cached(self.cache, self.refresh or "changed"),
        ):
            todo = [i for i in range(self.views) if i not in folder.views]
            if len(todo) < self.views:
                print(f"{self.views - len(todo)} of {self.views} views are there already")
            progress = self._render(views, folder, todo)
            with section("manifest"):
                folder.finish(self._head(settings, references.of_pose is not None))
        print(f"{progress.summary()} -> {self.out / 'manifest.json'}")
        for line in views.statistics():
            print(line)

    def _render(self, views: RandomViews, folder: SetFolder, todo: Sequence[int]) -> Progress:
        """Render and write; encoding and writing run beside it on a few threads."""
        with Progress("rendering", len(todo)) as progress, contextlib.ExitStack() as stack:
            writers = [stack.enter_context(BackgroundWriter()) for _ in range(min(4, os.cpu_count() or 1))]
            first = 0
            while first < len(todo):
                part = todo[first : first + views.batch]
                pictures = views.render(part)
                for index, (image, entry) in zip(part, pictures, strict=True):
                    writers[index % len(writers)].add(self._write, folder, index, image, entry)
                first += len(part)
                progress.advance(len(part))
        return progress

    def _write(self, folder: SetFolder, index: int, image: np.ndarray, entry: dict[str, Any]) -> None:
        folder.write(index, self.file_name(index), self._encoded(image), entry)

    def file_name(self, index: int) -> str:
        return f"view_{index:06d}.{'png' if self.format == 'png' else 'jpg'}"

    @section("encode")
    def _encoded(self, image: np.ndarray) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        picture = Image.fromarray(np.ascontiguousarray(image))
        if self.format == "png":
            picture.save(buffer, format="PNG", compress_level=4)
        else:
            picture.save(buffer, format="JPEG", quality=self._quality(), subsampling=0)
        return buffer.getvalue()

    def _check(self) -> tuple[tuple[int, int] | None, ...]:
        check_batch(self.batch, self.tuning)
        for name in ("views", "attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"--seed must be within 0..2^64 - 1, got {self.seed}")
        if self.quality is not None and self.format != "jpeg":
            raise ValueError(f"--quality {self.quality} needs --format jpeg, got {self.format}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must be within 1..100, got {self.quality}")
        for name in ("distance", "angle", "d_max", "min_distance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be a number >= 0, got {value:g}")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"--step must be a number > 0, got {self.step:g}")
        if (self.sampler == "lens") != (self.step is not None):
            raise ValueError(
                "--sampler lens needs --step, the distance between the grid's points"
                if self.step is None
                else f"--step is for --sampler lens, got --sampler {self.sampler}"
            )
        if self.min_angle is not None and not 0 <= self.min_angle <= 180:
            raise ValueError(f"--min-angle must be within 0..180 degrees, got {self.min_angle:g}")
        minima = self.min_distance, self.min_angle
        if self.validation_poses is None and minima != (None, None):
            name = "--min-angle" if self.min_distance is None else "--min-distance"
            raise ValueError(f"{name} needs --validation-poses, the poses to keep away from")
        if self.validation_poses is not None and minima == (None, None):
            raise ValueError("--validation-poses needs --min-distance, --min-angle or both")
        if self.brisque is not None and not math.isfinite(self.brisque):
            raise ValueError(f"--brisque must be a finite score, got {self.brisque:g}")
        if self.attempts is not None and self.brisque is None:
            raise ValueError("--attempts needs --brisque, the score that poses are drawn for")
        if self.refresh is not None and self.cache is None:
            raise ValueError("--refresh needs --cache, the folder whose views it is about")
        weight_range("--weights", self.weights)
        texts = (("--size", self.size), ("--resize", self.resize), ("--reference-size", self.reference_size))
        return tuple(parse_size(text, option) if text else None for option, text in texts)

    def _quality(self) -> int:
        return QUALITY if self.quality is None else self.quality

    def _attempts(self) -> int:
        return ATTEMPTS if self.attempts is None else self.attempts

    def _keep(self) -> FarFrom | None:
        if self.validation_poses is None:
            return None
        others = _all_poses("--validation-poses", self.validation_poses)
        return FarFrom(others, self.min_distance, self.min_angle)

    def _positions(self, cameras: Cameras, keep: FarFrom | None) -> Positions:
        if self.sampler != "lens":
            return given_positions(cameras)
        farthest = math.inf if self.distance is None else self.distance
        positions = grid_positions(cameras, self.step, self.d_max or 0.0, farthest, keep, self.seed)
        print(f"the grid has {len(positions.poses)} points")
        return positions

    def _sampler(self, cameras: Cameras) -> PoseSampler | TurnsInPlace:
        if self.sampler == "lens":
            return TurnsInPlace(self.angle)
        box = None if self.d_max is None else bounding_box(camera_to_world(cameras), self.d_max)
        return PoseSampler(DISTANCE if self.distance is None else self.distance, self.angle, KINDS[self.sampler], box)

    def _settings(
        self, scene: RapScene, cameras: Cameras, references: References, keep: FarFrom | None,
        resize: tuple[int, int] | None, device: torch.device,
    ) -> dict[str, Any]:  # fmt: skip
        """All that decides the pictures, for the folder to compare."""
        from PIL import __version__ as pillow

        width, height = resize or (cameras.width, cameras.height)
        if self.brisque is not None and min(width, height) < MIN_SIZE:
            raise ValueError(f"--brisque needs pictures of at least {MIN_SIZE}x{MIN_SIZE}, got {width}x{height}")
        own = {
            "model": scene_fingerprint(scene),
            "poses": fingerprint(cameras.viewmats, cameras.Ks, cameras.width, cameras.height),
            "references": fingerprint(references.names, references.fingerprints, references.of_pose or []),
            "reference_size": references.size,
            "seed": self.seed,
            "sampler": KINDS.get(self.sampler, self.sampler),
            "distance": DISTANCE if self.distance is None and self.sampler != "lens" else self.distance,
            "angle": self.angle,
            "d_max": self.d_max,
            "step": self.step,
            "validation_poses": None if keep is None else fingerprint(torch.from_numpy(keep.others)),
            "min_distance": self.min_distance,
            "min_angle": self.min_angle,
            "weights": list(self.weights),
            "size": [cameras.width, cameras.height],
            "resize": resize,
            "brisque": self.brisque,
            "attempts": None if self.brisque is None else self._attempts(),
            "format": self.format if self.format == "png" else f"jpeg {self._quality()}",
            "precision": self.precision,
        }
        return own | software(device) | {"pillow": pillow}

    def _head(self, settings: dict[str, Any], paired: bool) -> dict[str, Any]:
        """What the manifest says of the whole set."""
        width, height = settings["resize"] or settings["size"]
        return {
            "command": self._command(),
            "versions": {name: settings[name] for name in ("rapfast", "torch", "numpy", "pillow")},
            "width": width,
            "height": height,
            "reference_of_a_view": "that of its pose" if paired else "drawn",
        }

    def _command(self) -> list[str]:
        """The command that makes this set again, without what says where."""
        words = ["rapfast", "rvs", str(self.model)]
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name == "model" or option.name in _ELSEWHERE or value == option.default:
                continue
            assert option.default is not MISSING or option.name in ("poses", "views"), option.name
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option.name.replace('_', '-')}", *map(str, values)]
        return words


def _groups(option: str, path: Path) -> list[Cameras]:
    """The cameras of a file or folder, those of an image size together."""
    if not path.exists():
        raise FileNotFoundError(f"{option}: there is no file or folder {str(path)!r}")
    groups = [group for group in Cameras.groups(path) if len(group)]
    if not groups:
        raise ValueError(f"{path}: holds no cameras")
    return groups


def _all_poses(option: str, path: Path) -> np.ndarray:
    """[V, 3, 4] of a file or folder, of images of any size."""
    return np.concatenate([camera_to_world(group) for group in _groups(option, path)])


def _cameras(path: Path, size: tuple[int, int] | None) -> Cameras:
    """All poses of a file or folder, in its order, at one image size."""
    groups = _groups("--poses", path)
    if size is None and len(groups) > 1:
        sizes = ", ".join(f"{group.width}x{group.height}" for group in groups[:5])
        raise ValueError(f"{path}: images differ in size ({sizes}): give --size WxH to render all at one")
    groups = [group.resize(*size) for group in groups] if size else groups
    order = np.argsort(np.concatenate([group.indices or range(len(group)) for group in groups]))
    viewmats, Ks = (torch.cat([getattr(g, name) for g in groups])[order] for name in ("viewmats", "Ks"))
    names = [name for group in groups for name in group.names or []]
    names = [names[i] for i in order] if len(names) == len(order) else None
    return Cameras(viewmats, Ks, groups[0].width, groups[0].height, names)


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """While a `with` block runs, warnings are notes on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        yield
