"""Rendered views on disk, found again by everything that decides their pixels.

A folder holds pairs of files, `views_<id>.npz` with up to `shard_views` pictures and `views_<id>.json`, which says what
they are and has the shard's checksum. Both are written in one step each, the .json last: what it lists is there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.appearance import RapScene
from rapfast.io.atomic import atomic_write
from rapfast.io.files import PathLike, load_json
from rapfast.postprocess import PostProcess
from rapfast.profiling import section

from .hashes import bytes_fingerprint, fingerprint, scene_fingerprint, software
from .poses import as_numbers, as_poses

REFRESH = ("always", "changed")

_FORMAT = "rapfast views 1"
_SHARDS_IN_MEMORY = 2
_ORPHAN_SECONDS = 3600.0
"""A shard without its .json is another process's that is about to write it, or, once this old, what a kill left."""


class ViewKey(NamedTuple):
    """What decides the pixels of one view."""

    settings: str  # `view_settings`
    pose: np.ndarray  # [3, 4] float64 camera-to-world
    K: np.ndarray  # [3, 3] float64, pixels
    weight: float
    reference: str  # of the reference image, as `image_key` makes it

    def key(self) -> str:
        """The fingerprint of all of it."""
        return fingerprint(self.group(), np.ascontiguousarray(self.pose))

    def group(self) -> str:
        """Of all but the pose."""
        return fingerprint(self.settings, np.ascontiguousarray(self.K), float(self.weight), self.reference)


def view_settings(
    scene: RapScene,
    width: int,
    height: int,
    *,
    postprocess: PostProcess | None = None,
    precision: str | None = None,
    **options: Any,
) -> str:
    """What views of one scene share, as a fingerprint: the scene's tensors and networks, the size, the
    post-processing, the precision, the versions, the device.

    Args:
        scene, width, height, postprocess, precision: as in `RapScene.render`.
        options: further arguments of the render, such as `near_plane`; text and numbers.
    """
    post = None if postprocess is None else {name: repr(value) for name, value in asdict(postprocess).items()}
    return fingerprint(
        scene_fingerprint(scene), width, height, post, precision, str(scene.scene.dtype), options,
        software(scene.scene.device),
    )  # fmt: skip


def view_keys(settings: str, poses: Any, Ks: Any, weights: Any, references: Sequence[str]) -> list[ViewKey]:
    """Keys of M views: poses [M, 3, 4] camera-to-world, Ks [3, 3] or [M, 3, 3], weights [M], M references."""
    poses, weights = as_poses("poses", poses), as_numbers("weights", weights)
    Ks = as_numbers("Ks", Ks)
    n = len(poses)
    if Ks.shape not in ((3, 3), (n, 3, 3)):
        raise ValueError(f"Ks must be [3, 3] or [{n}, 3, 3], got {list(Ks.shape)}")
    if weights.shape != (n,):
        raise ValueError(f"weights must be [{n}], one for each pose, got {list(weights.shape)}")
    if len(references) != n or not all(isinstance(name, str) for name in references):
        raise ValueError(f"references must be {n} strings, one for each pose, got {len(references)}")
    Ks = np.broadcast_to(Ks, (n, 3, 3))
    return [
        ViewKey(settings, pose, K, float(weight), reference)
        for pose, K, weight, reference in zip(poses, Ks, weights, references, strict=True)
    ]


@dataclass
class ViewCacheStats:
    """Counts since the cache was opened: views found as asked for, found near by, not found; damaged shards."""

    hits: int = 0
    near_hits: int = 0
    misses: int = 0
    corrupt_shards: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the views asked for that were found, 0..1; 0 where none was asked for."""
        found = self.hits + self.near_hits
        return found / max(1, found + self.misses)

    def sentence(self) -> str:
        """For example "rendered views: 12 of 16 found (75 %), 2 of them near by"."""
        found = self.hits + self.near_hits
        near = f", {self.near_hits} of them near by" if self.near_hits else ""
        return f"rendered views: {found} of {found + self.misses} found ({100 * self.hit_rate:.0f} %){near}"


class Found(NamedTuple):
    """A picture as it was stored, on the CPU, and the pose it shows [3, 4] float64: the label to train with."""

    image: Tensor
    pose: np.ndarray


class ViewCache:
    """Rendered views kept on disk.

        cache = ViewCache("views", refresh="changed")
        keys = view_keys(view_settings(scene, 854, 480, postprocess=post), poses, Ks, weights, references)
        images, poses = cache.render(keys, lambda missing: render(missing))   # renders keys[i] for i in missing

    **A fresh random pose is never found**: its numbers have not been drawn before. A cache serves runs that are
    repeated with the same seed, resumed, or that keep the poses of an earlier epoch; `stats` says how much it did.

    `refresh="always"` finds nothing, and stores what is rendered. `refresh="changed"` renders what has changed: a view
    is found if it agrees in everything to the last bit, or, where thresholds are given, if a view with the same
    settings, intrinsics, reference image and weight lies within `distance` and `angle` of the pose asked for. Of
    several the nearest is taken. Its picture shows its own pose, not the one asked for: `Found.pose` says which.

    A shard that is damaged is dropped with a warning, and its views are not found. Several processes may share a
    folder; one finds what others had stored when it opened the cache. Methods may be called from several threads.

    Args:
        folder: made where it does not exist.
        refresh: "always" or "changed".
        distance: metres. angle: degrees, of the rotation between the two poses. 0 and 0: exact poses alone.
        shard_views: pictures in a file; what is stored but not yet a full shard is written by `flush` or `close`.
        max_bytes: budget of the folder; the oldest shards go first. None for no limit.

    Raises:
        TypeError, ValueError, OSError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        folder: PathLike,
        *,
        refresh: str = "changed",
        distance: float = 0.0,
        angle: float = 0.0,
        shard_views: int = 64,
        max_bytes: int | None = None,
    ) -> None:
        self.refresh = check.choice("refresh", refresh, REFRESH)
        self.distance = check.number("distance", distance, 0.0, 1e9, "a number of metres >= 0")
        self.angle = check.number("angle", angle, 0.0, 180.0, "a number of degrees, 0..180")
        self.shard_views = check.integer("shard_views", shard_views, 1, 1 << 16)
        self.max_bytes = None if max_bytes is None else check.integer("max_bytes", max_bytes, 0, 1 << 60)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stats = ViewCacheStats()
        self._lock = threading.RLock()
        self._shards: OrderedDict[str, _Shard] = OrderedDict()  # by name, oldest first
        self._places: dict[str, tuple[str, int]] = {}  # key -> shard and row
        self._groups: dict[str, dict[str, np.ndarray]] = {}  # group -> key -> pose
        self._loaded: OrderedDict[str, np.ndarray] = OrderedDict()
        self._pending: dict[tuple, dict[str, tuple[ViewKey, np.ndarray]]] = {}  # form -> key -> view
        self._open()

    def __enter__(self) -> ViewCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Views kept, those not yet on disk among them."""
        with self._lock:
            return len(self._places.keys() | {key for views in self._pending.values() for key in views})

    @property
    def n_bytes(self) -> int:
        """Of the shards on disk."""
        return sum(shard.n_bytes for shard in self._shards.values())

    @section("fetch views")
    def fetch(self, keys: Sequence[ViewKey]) -> list[Found | None]:
        """What is kept of the views, None for those to render."""
        with self._lock:
            return [self._fetch(view) for view in keys]

    @section("store views")
    def store(self, keys: Sequence[ViewKey], images: Tensor) -> None:
        """Keep rendered views: images [M, ...] on any device, one for each key. Those that are there are replaced."""
        if not isinstance(images, Tensor) or images.dim() < 2 or len(images) != len(keys):
            raise ValueError(f"images must be a tensor [{len(keys)}, ...], got {check.describe(images)}")
        rows = images.detach().cpu().numpy()
        with self._lock:
            for view, row in zip(keys, rows, strict=True):
                form = (row.dtype.str, row.shape)
                pending = self._pending.setdefault(form, {})
                pending[view.key()] = view, row.copy()
                if len(pending) >= self.shard_views:
                    self._write(form)

    def render(
        self, keys: Sequence[ViewKey], render: Callable[[list[int]], Tensor]
    ) -> tuple[list[Tensor], list[np.ndarray]]:
        """All the views: those kept, and the others by `render`, which are kept from then on.

        Args:
            keys: of M views.
            render: called once, if anything is missing, with the places in `keys` of the missing ones, ascending;
                returns their pictures [m, ...] on any device.

        Returns:
            M pictures on the CPU, and the poses [3, 4] that they show, see the class.
        """
        found = self.fetch(keys)
        missing = [i for i, one in enumerate(found) if one is None]
        if missing:
            images = render(missing)
            self.store([keys[i] for i in missing], images)
            for i, image in zip(missing, images.detach().cpu(), strict=True):
                found[i] = Found(image, keys[i].pose)
        return [one.image for one in found], [one.pose for one in found]

    def flush(self) -> None:
        """Write what is stored and not yet on disk."""
        with self._lock:
            for form in list(self._pending):
                self._write(form)

    def close(self) -> None:
        """`flush`, and let go of what is in memory."""
        with self._lock:
            self.flush()
            self._loaded.clear()

    # --- finding -----------------------------------------------------------------------------------------------------

    def _fetch(self, view: ViewKey) -> Found | None:
        if self.refresh == "changed":
            key = view.key()
            image = self._image(key)
            if image is not None:
                self.stats.hits += 1
                return Found(image, view.pose)
            for near, pose in self._near(view) if self.distance or self.angle else []:
                image = self._image(near)
                if image is not None:
                    self.stats.near_hits += 1
                    return Found(image, pose)
        self.stats.misses += 1
        return None

    def _near(self, view: ViewKey) -> list[tuple[str, np.ndarray]]:
        """Keys and poses within the thresholds, nearest first: by distance, then by angle."""
        group = dict(self._groups.get(view.group(), {}))
        for views in self._pending.values():
            group |= {key: kept.pose for key, (kept, _) in views.items() if kept.group() == view.group()}
        if not group:
            return []
        keys, poses = list(group), np.stack(list(group.values()))
        away = np.linalg.norm(poses[:, :, 3] - view.pose[:, 3], axis=1)
        turned = rotation_angles(poses[:, :, :3], view.pose[:, :3])
        # Rotations are rounded: one and the same may seem turned by a hundred-millionth of a degree.
        near = np.flatnonzero((away <= self.distance) & (turned <= self.angle + 1e-6))
        order = near[np.lexsort((turned[near], away[near]))]
        return [(keys[i], poses[i]) for i in order]

    def _image(self, key: str) -> Tensor | None:
        for views in self._pending.values():
            if key in views:
                return torch.from_numpy(views[key][1].copy())
        if key not in self._places:
            return None
        name, row = self._places[key]
        images = self._load(name)
        return None if images is None else torch.from_numpy(images[row].copy())

    def _load(self, name: str) -> np.ndarray | None:
        """A shard's pictures; None once it has proved damaged, and is dropped."""
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return self._loaded[name]
        shard, path = self._shards[name], self.folder / f"{name}.npz"
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # another process has dropped it, for its budget
            self._drop(name)
            return None
        images = None
        if bytes_fingerprint(data) == shard.checksum:
            with contextlib.suppress(Exception), np.load(io.BytesIO(data), allow_pickle=False) as file:
                images = file["images"]
        if images is None or len(images) != len(shard.keys):
            self.stats.corrupt_shards += 1
            n = len(shard.keys)
            self._drop(name)
            warnings.warn(
                f"{path}: is damaged (its checksum does not fit) and was dropped; its {n} views are rendered again",
                stacklevel=5,
            )
            return None
        self._loaded[name] = images
        while len(self._loaded) > _SHARDS_IN_MEMORY:
            self._loaded.popitem(last=False)
        return images

    # --- files -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Read what the folder has; a .json that cannot be read counts as a damaged shard."""
        described = sorted(self.folder.glob("views_*.json"), key=lambda path: (_modified(path), path.name))
        for path in described:
            try:
                self._add(path.stem, _read_shard(path))
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError) as error:
                self.stats.corrupt_shards += 1
                _unlink(path, path.with_suffix(".npz"))
                warnings.warn(
                    f"{path}: is damaged ({error}) and was dropped with its views, which are rendered again",
                    stacklevel=3,
                )
        for path in self.folder.glob("*views_*.npz"):  # with what a kill left of a temporary file
            if path.stem not in self._shards and time.time() - _modified(path) > _ORPHAN_SECONDS:
                _unlink(path)

    def _add(self, name: str, shard: _Shard) -> None:
        self._shards[name] = shard
        for row, (key, group, pose) in enumerate(zip(shard.keys, shard.groups, shard.poses, strict=True)):
            self._places[key] = name, row
            self._groups.setdefault(group, {})[key] = pose

    def _write(self, form: tuple) -> None:
        views = self._pending.get(form)
        if not views:
            return
        name = f"views_{time.time_ns():020d}_{secrets.token_hex(4)}"
        buffer = io.BytesIO()
        np.savez(buffer, images=np.stack([row for _, row in views.values()]))
        data = buffer.getbuffer()
        keys = [view for view, _ in views.values()]
        groups = [view.group() for view in keys]
        poses = [np.asarray(view.pose, dtype=np.float64) for view in keys]
        shard = _Shard(list(views), groups, poses, bytes_fingerprint(data), len(data))
        described = {
            "format": _FORMAT, "blake2b": shard.checksum, "bytes": shard.n_bytes, "keys": shard.keys,
            "groups": shard.groups, "poses": [pose.tolist() for pose in poses],
        }  # fmt: skip
        text = json.dumps(described)
        described["self"] = bytes_fingerprint(text.encode())
        atomic_write(self.folder / f"{name}.npz", data)
        atomic_write(self.folder / f"{name}.json", json.dumps(described).encode())
        self._add(name, shard)
        del self._pending[form]
        while self.max_bytes is not None and self._shards and self.n_bytes > self.max_bytes:
            self._drop(next(iter(self._shards)))

    def _drop(self, name: str) -> None:
        shard = self._shards.pop(name)
        self._loaded.pop(name, None)
        for key, group in zip(shard.keys, shard.groups, strict=True):
            if self._places.get(key, ("", 0))[0] == name:
                del self._places[key]
                self._groups[group].pop(key, None)
        _unlink(self.folder / f"{name}.json", self.folder / f"{name}.npz")  # in this order, see the module


class _Shard(NamedTuple):
    keys: list[str]
    groups: list[str]
    poses: list[np.ndarray]
    checksum: str
    n_bytes: int


def _read_shard(path: Path) -> _Shard:
    content = load_json(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it is no {_FORMAT!r}")
    stored = content.pop("self", None)
    if stored != bytes_fingerprint(json.dumps(content).encode()):
        raise ValueError("its checksum does not fit")
    poses = [np.array(pose, dtype=np.float64) for pose in content["poses"]]
    return _Shard(content["keys"], content["groups"], poses, content["blake2b"], content["bytes"])


def rotation_angles(rotations: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[M] degrees between rotations [M, 3, 3] and one [3, 3].

    By the chord: |A - B| of the matrices' 9 numbers is sqrt(8) sin(angle / 2), which stays exact for small angles,
    where the cosine does not.
    """
    chord = np.sqrt(np.square(rotations - other).sum((1, 2)))
    return np.degrees(2.0 * np.arcsin(np.clip(chord / np.sqrt(8.0), 0.0, 1.0)))


def _modified(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return time.time()


def _unlink(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
