"""Feature maps of reference images, made once and kept: on the scene's device, in host memory, on disk.

A training loop renders around the same few hundred reference images in every epoch, and their maps depend on nothing
but the image and the network. At 854x480 a map in fp16 takes 9.8 MB, so that not all of them fit beside a scene.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rapfast import _check as check
from rapfast.appearance import RapScene
from rapfast.appearance.net_outputs_bwd import callers_tf32
from rapfast.io.atomic import atomic_write
from rapfast.io.files import PathLike
from rapfast.profiling import section

from .hashes import bytes_fingerprint, fingerprint, network_fingerprint, software

MAX_BYTES = 1 << 50

_MADE_AT_ONCE = 8
"""Images that go through the network in one call: the most that run side by side."""

_MAX_NAMES = 1 << 16


@dataclass
class MapCacheStats:
    """Counts since the cache was made. A map asked for twice in one call counts twice."""

    device_hits: int = 0
    host_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    corrupt: int = 0

    @property
    def hits(self) -> int:
        return self.device_hits + self.host_hits + self.disk_hits

    @property
    def hit_rate(self) -> float:
        """Share of the maps asked for that were there, 0..1; 0 where none was asked for."""
        return self.hits / max(1, self.hits + self.misses)

    def sentence(self) -> str:
        """For example "feature maps: 14 of 16 found (88 %): 12 on the device, 2 in host memory, 0 on disk"."""
        return (
            f"feature maps: {self.hits} of {self.hits + self.misses} found ({100 * self.hit_rate:.0f} %): "
            f"{self.device_hits} on the device, {self.host_hits} in host memory, {self.disk_hits} on disk"
        )


def image_key(image: Tensor) -> str:
    """The content of a reference image [3, H, W]: a fingerprint of its bytes, dtype and shape.

    An image on a GPU is copied to the host for it, which waits: there, keep the key beside the image.
    """
    if not isinstance(image, Tensor) or image.dim() != 3:
        raise TypeError(f"image must be a tensor [3, H, W], got {check.describe(image)}")
    return fingerprint(image)


class FeatureMapCache:
    """Maps of reference images, in the form that `RapScene.render` reads in place: [48, h, w], channels last.

        cache = FeatureMapCache(scene, gpu_bytes=4 << 30, pinned_bytes=16 << 30)
        maps = cache.get(images)
        scene.render(viewmats, Ks, width, height, feature_maps=maps, map_ids=[0, 1, 1])

    A map is found by the image's content, the network's weights, the precision, and the software and device that made
    it. It is made by `RapScene.feature_maps`, whose bits do not depend on the images beside it: what comes out of a
    cache is bitwise what would be made anew. Where a network's weights change, its old maps are not found any more.

    The least recently used maps leave the device for host memory, and host memory for nothing: a disk folder gets
    every map when it is made and keeps it from one run to the next. A file there that is damaged is dropped with a
    warning, and its map made again. Several processes may share a folder. A cache itself belongs to one thread and, on
    a GPU, to one stream; others may use it where they have waited for each other, as `RandomViewSynthesizer`'s do.

    Args:
        scene: whose network makes the maps, on whose device they are wanted.
        gpu_bytes: budget on the scene's device (memory of the CPU for a scene there). Maps that a call returns are
            held by the caller, and may go beyond it.
        pinned_bytes: budget of host memory for what does not fit there; page-locked where the scene is on a GPU.
        disk_dir: folder for maps, made where it does not exist; None for no disk.
        disk_bytes: budget of the folder; the least recently used files go first.
        precision: "fp16", "fp32" or None, as in `RapScene.feature_maps`.

    Raises:
        TypeError, ValueError, OSError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        scene: RapScene,
        *,
        gpu_bytes: int = 4 << 30,
        pinned_bytes: int = 0,
        disk_dir: PathLike | None = None,
        disk_bytes: int = 64 << 30,
        precision: str | None = None,
    ) -> None:
        if not isinstance(scene, RapScene):
            raise TypeError(f"scene must be a RapScene, got {check.describe(scene)}")
        budgets = {"gpu_bytes": gpu_bytes, "pinned_bytes": pinned_bytes, "disk_bytes": disk_bytes}
        budgets = {name: check.integer(name, value, 0, MAX_BYTES) for name, value in budgets.items()}
        self.scene = scene
        self.precision = check.choice("precision", precision, ("fp16", "fp32", None))
        self.stats = MapCacheStats()
        self._device = _Memory(budgets["gpu_bytes"])
        self._host = _Memory(budgets["pinned_bytes"])
        self._disk = None if disk_dir is None else _Disk(Path(disk_dir), budgets["disk_bytes"])
        self._maker: tuple[tuple, str] | None = None
        self._modules: tuple[nn.Module, list[nn.Module]] | None = None
        self._names: dict[Hashable, str] = {}

    @property
    def has_folder(self) -> bool:
        """Whether maps are kept on disk too."""
        return self._disk is not None

    @property
    def gpu_bytes(self) -> int:
        """Bytes of the maps kept on the scene's device."""
        return self._device.n_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the maps kept in host memory."""
        return self._host.n_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the files in the folder."""
        return self._disk.n_bytes if self._disk else 0

    @section("map cache")
    def get(
        self,
        images: Tensor | Sequence[Tensor] | None = None,
        *,
        keys: Sequence[Hashable] | None = None,
        load: Callable[[Hashable], Tensor] | None = None,
    ) -> list[Tensor]:
        """The maps of reference images, one for each, in order.

        Args:
            images: [R, 3, H, W] or a sequence of [3, H, W] in 0..1; on any device where keys are given, else best
                on the CPU, where hashing them needs no copy.
            keys: one for each image, in place of its content: equal keys must mean equal images. Any string or
                number; `image_key` makes such.
            load: in place of images: called with the key of a map that is nowhere in the cache, returns its image.

        Returns:
            R tensors [48, h, w] on the scene's device; equal keys share one.

        Raises:
            TypeError, ValueError: an argument is not as said.
            KeyError: neither images nor load were given and a map is not there.
        """
        if images is None and keys is None:
            raise TypeError("get needs images, or keys")
        if images is not None and load is not None:
            raise TypeError("load must be None where images are given")
        if images is not None:
            images = list(images)
            if keys is not None and len(keys) != len(images):
                raise ValueError(f"keys must hold one key for each of {len(images)} images, got {len(keys)}")
        self._check_maker()
        wanted = [self._wanted(key) for key in (map(image_key, images) if keys is None else keys)]
        places = {key: i for i, key in reversed(list(enumerate(wanted)))}
        times = Counter(wanted)
        found: dict[str, Tensor] = {}
        missing = []
        for key in times:
            hit = self._find(key, times[key])
            if hit is None:
                missing.append(key)
                self.stats.misses += 1
                self.stats.device_hits += times[key] - 1
            else:
                found[key] = hit
        for first in range(0, len(missing), _MADE_AT_ONCE):
            part = missing[first : first + _MADE_AT_ONCE]
            with section("load images"):
                sources = [self._image(places[key], images, keys, load) for key in part]
            for key, made in zip(part, self._make(sources), strict=True):
                found[key] = made
                self._keep(key, made)
                if self._disk:
                    self._disk.put(key, made)
        return [found[key] for key in wanted]

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        self._device.clear()
        self._host.clear()

    def _check_maker(self) -> None:
        """Take the fingerprint of all that makes maps again, where a weight (by torch's version counter) or a setting
        has changed. This is done in every call, so it does not go through the network's state dict."""
        net = self.scene.feature_map_net
        if self._modules is None or self._modules[0] is not net:
            self._modules = net, list(net.modules())
        weights = [w for module in self._modules[1] for w in module._parameters.values() if w is not None]
        backends = *callers_tf32(), torch.get_num_threads()
        state = (*backends, [w.data_ptr() for w in weights], [-1 if w.is_inference() else w._version for w in weights])
        if self._maker is None or self._maker[0] != state:
            if self._maker is not None:
                self.clear()
            parts = network_fingerprint(net), software(self.scene.scene.device), repr(self.precision)
            self._maker = state, fingerprint(*parts)
            self._names.clear()

    def _wanted(self, key: Hashable) -> str:
        """The name of a key's map as the maker makes it."""
        if key not in self._names:
            if len(self._names) >= _MAX_NAMES:
                self._names.clear()
            self._names[key] = fingerprint(self._maker[1], key)
        return self._names[key]

    def _find(self, key: str, asked: int) -> Tensor | None:
        kept = self._device.get(key)
        if kept is not None:
            self.stats.device_hits += asked
            return kept
        device = self.scene.scene.device
        kept = self._host.get(key)
        if kept is not None:
            self.stats.host_hits += asked
            moved = kept.to(device, non_blocking=True) if device.type == "cuda" else kept.clone()
            self._keep(key, moved)
            return moved
        if self._disk is None:
            return None
        read = self._disk.get(key)
        if isinstance(read, str):
            self.stats.corrupt += 1
            warnings.warn(read, stacklevel=3)
            return None
        if read is not None:
            self.stats.disk_hits += asked
            read = read.to(device)
            self._keep(key, read)
        return read

    def _image(self, place: int, images: list[Tensor] | None, keys: Sequence | None, load: Callable | None) -> Tensor:
        if images is not None:
            return images[place]
        if load is None:
            raise KeyError(f"keys[{place}] is {keys[place]!r}, whose map is not in the cache: give images or load")
        return load(keys[place])

    def _make(self, images: Sequence[Tensor]) -> Iterable[Tensor]:
        device = self.scene.scene.device
        images = [image.to(device) if isinstance(image, Tensor) else image for image in images]
        with torch.no_grad():
            for made in self.scene.feature_maps(images, precision=self.precision):
                pixels = made.permute(1, 2, 0)
                if pixels.is_contiguous() and _size(made) > max(self._device.budget, self._host.budget):
                    yield made  # no memory keeps it
                    continue
                # A copy of its own: a part of a batch would keep the whole batch in memory.
                yield pixels.clone(memory_format=torch.contiguous_format).permute(2, 0, 1)

    def _keep(self, key: str, made: Tensor) -> None:
        for left_key, left in self._device.put(key, made):
            if left_key in self._host or _size(left) > self._host.budget:
                continue
            copy = torch.empty_strided(
                left.shape, left.stride(), dtype=left.dtype, pin_memory=left.device.type == "cuda"
            )
            # Later copies in either direction are queued on the same stream, behind this one.
            copy.copy_(left, non_blocking=True)
            if left.is_cuda:
                left.record_stream(torch.cuda.current_stream(left.device))  # it may come from another stream's memory
            self._host.put(left_key, copy)


class _Memory:
    """Tensors by key under a budget; the least recently used leave first."""

    def __init__(self, budget: int) -> None:
        self.budget, self.n_bytes = budget, 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str) -> Tensor | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
        """Keep it, and return what had to go: itself, where it is larger than the budget."""
        if _size(value) > self.budget:
            return [(key, value)]
        replaced = self._kept.pop(key, None)
        self.n_bytes += _size(value) - (0 if replaced is None else _size(replaced))
        self._kept[key] = value
        gone = []
        while self.n_bytes > self.budget:
            gone.append(self._kept.popitem(last=False))
            self.n_bytes -= _size(gone[-1][1])
        return gone

    def clear(self) -> None:
        self._kept.clear()
        self.n_bytes = 0


class _Disk:
    """One file for each map: an .npz (without pickled objects) of `map` [h, w, 48] and the fingerprint of its bytes."""

    def __init__(self, folder: Path, budget: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.budget = folder, budget
        files = sorted(folder.glob("map_*.npz"), key=_last_used)
        self._sizes = OrderedDict((path.name, size) for path in files if (size := _file_size(path)) is not None)
        self.n_bytes = sum(self._sizes.values())

    def get(self, key: str) -> Tensor | str | None:
        """The map on the CPU; None where there is none; a sentence where there was one that is damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self._forget(path.name)
            return None
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                array, stored = file["map"], str(file["blake2b"])
            intact = stored == bytes_fingerprint(np.ascontiguousarray(array).data.cast("B")) and array.ndim == 3
        except Exception:  # damaged bytes make zipfile and numpy raise nearly anything
            intact = False
        if not intact:
            with contextlib.suppress(OSError):
                path.unlink()
            self._forget(path.name)
            return f"{path}: is damaged (its checksum does not fit) and was dropped; its feature map is made again"
        with contextlib.suppress(OSError):
            os.utime(path)
        self._forget(path.name)
        self._sizes[path.name] = len(data)
        self.n_bytes += len(data)
        return torch.from_numpy(array).permute(2, 0, 1)

    def put(self, key: str, made: Tensor) -> None:
        array = made.detach().permute(1, 2, 0).contiguous().cpu().numpy()
        buffer = io.BytesIO()
        np.savez(buffer, map=array, blake2b=np.array(bytes_fingerprint(array.data.cast("B"))))
        data, path = buffer.getbuffer(), self._path(key)
        if len(data) > self.budget:
            return
        self._forget(path.name)
        while self._sizes and self.n_bytes + len(data) > self.budget:
            name = next(iter(self._sizes))
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
            self._forget(name)
        atomic_write(path, data)
        self._sizes[path.name] = len(data)
        self.n_bytes += len(data)

    def _path(self, key: str) -> Path:
        return self.folder / f"map_{key}.npz"

    def _forget(self, name: str) -> None:
        self.n_bytes -= self._sizes.pop(name, 0)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has just dropped it
        return 0.0


def _file_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
