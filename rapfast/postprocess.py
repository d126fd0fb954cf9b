"""What may happen to a rendered image before it is returned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_DTYPES = (None, torch.float32, torch.float16, torch.uint8)


@dataclass(frozen=True)
class PostProcess:
    """Post-processing of rendered images, done in one pass behind the blend.

    In this order: background and expected depth (always), ``clamp``, ``size``, ``mean`` and ``std``, ``dtype``.
    Clamping and normalisation touch the colour channels, resizing all of them; alphas are resized with the
    colours and otherwise left alone.

    Args:
        size: (height, width) in pixels to resize to, bilinear as ``torch.nn.functional.interpolate`` with
            ``align_corners=False`` and no antialiasing; None keeps the rendered size.
        clamp: (lowest, highest) colour; None leaves colours as they are.
        mean: one number per colour channel, subtracted.
        std: one positive number per colour channel, divided by after ``mean``.
        layout: "HWC" or "CHW" order of the returned images.
        dtype: torch.float32, torch.float16 or torch.uint8; None keeps the dtype of the parameters. uint8 is
            ``trunc(clamp(255 x + 0.5, 0, 255))`` and is for colours alone: a depth channel does not fit in it,
            nor do normalised colours.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    size: tuple[int, int] | None = None
    clamp: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: str = "HWC"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._numbers("size", 2)
        self._numbers("clamp", 2)
        self._numbers("mean")
        self._numbers("std")
        if self.size is not None and not all(isinstance(n, int) and 1 <= n <= 1 << 20 for n in self.size):
            raise ValueError(f"postprocess.size must be (height, width) of at least 1 pixel, got {self.size}")
        if self.clamp is not None and not self.clamp[0] <= self.clamp[1]:
            raise ValueError(f"postprocess.clamp must be (lowest, highest) in that order, got {self.clamp}")
        if self.mean is not None and not all(math.isfinite(m) for m in self.mean):
            raise ValueError(f"postprocess.mean must be finite numbers, got {self.mean}")
        if self.std is not None and not all(math.isfinite(s) and s > 0 for s in self.std):
            raise ValueError(f"postprocess.std must be positive finite numbers, got {self.std}")
        if self.layout not in ("HWC", "CHW"):
            raise ValueError(f"postprocess.layout must be 'HWC' or 'CHW', got {self.layout!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"postprocess.dtype must be torch.float32, torch.float16, torch.uint8 or None, got {self.dtype}"
            )
        if self.dtype == torch.uint8 and (self.mean is not None or self.std is not None):
            raise ValueError("postprocess.dtype uint8 holds colours in 0..1: mean and std must be None with it")

    def _numbers(self, name: str, length: int | None = None) -> None:
        """Makes the field a tuple, or says that it is no sequence of ``length`` numbers."""
        value = getattr(self, name)
        if value is None:
            return
        wanted = "numbers" if length is None else f"{length} numbers"
        try:
            numbers = tuple(value)
        except TypeError:
            numbers = ()
        are_numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers)
        if isinstance(value, str) or not numbers or not are_numbers or length not in (None, len(numbers)):
            raise ValueError(f"postprocess.{name} must be a tuple of {wanted} or None, got {value!r}")
        object.__setattr__(self, name, numbers)
