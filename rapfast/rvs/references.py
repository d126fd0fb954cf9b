"""Feature maps of reference images, by their number."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.appearance.rap_scene import RapScene
from rapfast.rvs.map_cache import FeatureMapCache, image_key

_counter = itertools.count()


class ReferenceMaps:
    """Makes the feature maps of reference images when they are asked for, and keeps them in a cache.

    Args:
        scene: whose network makes them; on its device.
        images: raw RGB, not normalised: [R, 3, H, W], a sequence of [3, H, W] that may differ in size, or a function
            that takes a number and gives one. Floating in 0..1 or uint8, on any device. The image of a number must
            stay what it is.
        precision: as in `RapScene.feature_maps`; None with a cache is the cache's.
        cache: of the same scene, which may have a folder that outlives the process; None makes one in the memory of
            the scene's device, with `FeatureMapCache`'s budget.
        by_number: whether the cache knows an image by its number, which costs nothing, or by its content, which is
            hashed when it is first asked for (milliseconds an image) and found by other processes and other
            `ReferenceMaps` too. None: by content in a cache that is given.

    Raises:
        TypeError, ValueError: `images` is neither; the cache is another scene's or of another precision.
    """

    def __init__(
        self, scene: RapScene, images: Any, precision: str | None = None, cache: FeatureMapCache | None = None,
        by_number: bool | None = None,
    ) -> None:  # fmt: skip
        is_sequence = isinstance(images, (Tensor, Sequence)) and not isinstance(images, (str, bytes))
        if not (is_sequence or callable(images)):
            raise TypeError(
                "images must be a tensor [R, 3, H, W], a sequence of [3, H, W] or a function that gives them by "
                f"number, got {check.describe(images)}"
            )
        self.cache = FeatureMapCache(scene, precision=precision) if cache is None else cache
        if self.cache.scene is not scene or precision not in (None, self.cache.precision):
            raise ValueError("cache must be of the scene and the precision that it is used with")
        self._by_number = cache is None if by_number is None else check.flag("by_number", by_number)
        if self._by_number and self.cache.has_folder:
            raise ValueError(
                "by_number must be False for a cache with a folder, where other processes look for images by content"
            )
        self._name = f"images {next(_counter)}"  # so that several may share a cache
        self._dtype = scene.feature_map_net.final_conv.weight.dtype
        self._get: Callable[[int], Any] = images.__getitem__ if is_sequence else images
        self._count = len(images) if is_sequence else None
        self._keys: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[Tensor]:
        """[48, h, w] of each image of `ids`, made on the current stream.

        Raises:
            IndexError: there is no such image.
            TypeError, ValueError: an image is not as said; values are looked at the first time only.
        """
        if not ids:
            return []
        self._look_at([i for i in dict.fromkeys(ids) if i not in self._keys])
        numbers = {self._keys[i]: i for i in ids}
        return self.cache.get(keys=[self._keys[i] for i in ids], load=lambda key: self._floating(numbers[key]))

    def _look_at(self, ids: Sequence[int]) -> None:
        """Check images that are asked for the first time, and give them their keys."""
        images = {i: self._image(i) for i in ids}
        ranges = {i: torch.stack(image.aminmax()) for i, image in images.items() if image.dtype != torch.uint8}
        for i, (low, high) in zip(ranges, _on_cpu(list(ranges.values())), strict=True):
            if not (low >= -1e-3 and high <= 1.001):
                raise ValueError(
                    f"reference image {i} must be raw RGB in 0..1 (not normalised), got values in {low:g}..{high:g}"
                )
        for i, image in images.items():
            self._keys[i] = f"{self._name}, {i}" if self._by_number else image_key(image)

    def _floating(self, i: int) -> Tensor:
        image, device = self._image(i), self.cache.scene.scene.device
        if device.type == "cuda" and not image.is_cuda:
            image = image.pin_memory()  # a copy from ordinary memory would wait for all that is queued before it
        image = image.to(device, non_blocking=True)
        return image.to(self._dtype) / 255 if image.dtype == torch.uint8 else image

    def _image(self, i: int) -> Tensor:
        if self._count is not None and not 0 <= i < self._count:
            raise IndexError(f"there are {self._count} reference images, number {i} was asked for")
        image = self._get(i)
        name = f"reference image {i}"
        if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3:
            raise TypeError(f"{name} must be a tensor [3, H, W], got {check.describe(image)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"{name} must be floating point in 0..1 or uint8, got {check.describe(image)}")
        return image.detach()


def _on_cpu(pairs: list[Tensor]) -> list[list[float]]:
    """Pairs of numbers, those of a device and dtype read back together."""
    found: dict[int, list[float]] = {}
    groups: dict[Any, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault((pair.device, pair.dtype), []).append(i)
    for members in groups.values():
        found.update(zip(members, torch.stack([pairs[i] for i in members]).tolist(), strict=True))
    return [found[i] for i in range(len(pairs))]
