"""Feature maps of reference images, by their number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.appearance.rap_scene import RapScene


class ReferenceMaps:
    """Makes the feature maps of reference images when they are asked for, and keeps the latest.

    Args:
        scene: whose network makes them; on its device.
        images: raw RGB, not normalised: [R, 3, H, W], a sequence of [3, H, W] that may differ in size, or a function
            that takes a number and gives one. Floating in 0..1 or uint8, on any device.
        precision: as in `RapScene.feature_maps`.
        keep: so many maps are kept, those asked for last. An image must stay what it is meanwhile.

    Raises:
        TypeError: `images` is neither.
    """

    def __init__(self, scene: RapScene, images: Any, precision: str | None = None, keep: int = 32) -> None:
        is_sequence = isinstance(images, (Tensor, Sequence)) and not isinstance(images, (str, bytes))
        if not (is_sequence or callable(images)):
            raise TypeError(
                "images must be a tensor [R, 3, H, W], a sequence of [3, H, W] or a function that gives them by "
                f"number, got {check.describe(images)}"
            )
        self.scene = scene
        self.precision = precision
        self._get: Callable[[int], Any] = images.__getitem__ if is_sequence else images
        self._count = len(images) if is_sequence else None
        self._keep = check.integer("keep", keep, 0, 1 << 40)
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._looked_at: set[int] = set()

    def __call__(self, ids: Sequence[int]) -> list[Tensor]:
        """[48, h, w] of each image of `ids`.

        Raises:
            IndexError: there is no such image.
            TypeError, ValueError: an image is not as said; values are looked at the first time only.
        """
        missing = [i for i in dict.fromkeys(ids) if i not in self._kept]
        made = dict(zip(missing, self._make(missing), strict=True)) if missing else {}
        result = [made[i] if i in made else self._kept[i] for i in ids]
        for i, feature_map in zip(ids, result, strict=True):
            self._kept[i] = feature_map
            self._kept.move_to_end(i)
        while len(self._kept) > self._keep:
            self._kept.popitem(last=False)
        return result

    def _make(self, ids: Sequence[int]) -> list[Tensor]:
        dtype = self.scene.feature_map_net.final_conv.weight.dtype
        images = [self._image(i).to(self.scene.scene.device, non_blocking=True) for i in ids]
        pictures = [image.to(dtype) / 255 if image.dtype == torch.uint8 else image for image in images]
        with torch.no_grad():
            return list(self.scene.feature_maps(pictures, precision=self.precision))

    def _image(self, i: int) -> Tensor:
        if self._count is not None and not 0 <= i < self._count:
            raise IndexError(f"there are {self._count} reference images, number {i} was asked for")
        image = self._get(i)
        name = f"reference image {i}"
        if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3:
            raise TypeError(f"{name} must be a tensor [3, H, W], got {check.describe(image)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"{name} must be floating point in 0..1 or uint8, got {check.describe(image)}")
        if i not in self._looked_at and image.dtype != torch.uint8:
            low, high = (float(value) for value in image.detach().aminmax())
            if not (low >= -1e-3 and high <= 1.001):
                raise ValueError(f"{name} must be raw RGB in 0..1 (not normalised), got values in {low:g}..{high:g}")
        self._looked_at.add(i)
        return image.detach()
