"""BRISQUE, a picture's quality without a reference to compare with, for whole batches on any device.

A. Mittal, A. K. Moorthy, A. C. Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 2012.
A picture's contrast-normalised luminance, and the products of its neighbours in four directions, follow generalised
Gaussians whose shapes tell noise, blur and compression apart; 18 shape parameters at each of two scales enter a
support vector regression. Low is good; the natural range is about 0 to 100.

The reference is the PyPI package ``brisque`` (github.com/rehanguha/brisque; its releases 0.0.15 to 0.2.0 have the same
model and the same steps), whose ``score`` takes [H, W, 3] pictures, which is how RAP scores. Its model is kept here in
``data/brisque_svr.npz``: 770 support vectors, their weights and the ranges of the features, the numbers of its
``svm.txt`` and ``normalize.pickle`` unchanged (Apache License 2.0, Copyright 2024 Rehan Guha). The package itself is
not needed: it brings OpenCV, SciPy, scikit-image and libsvm with it.

Scores agree with the package's to 1e-4 on most renders. In exactly flat areas the fits count the signs of rounding
errors, which differ between builds of NumPy, SciPy and OpenCV: on 24 renders the package differed by up to 0.006 points
from itself and as much from this module, on coarse JPEGs by up to 0.1 from either. The order and the precision of its
steps are therefore kept, and so are two conventions that are not the paper's: pixels beyond the border count as 0 in
local means, and the second scale is a cubic interpolation without anti-aliasing. An even picture mostly
has no score, NaN, as in the package: only rounding varies in it.

A score's bits do not depend on the batch that its picture is in, nor on the device's way of splitting sums: all sums
are trees of one shape. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rapfast._check import describe, flag

MODEL_FILE = Path(__file__).parent / "data" / "brisque_svr.npz"
"""support_vectors [770, 36], weights [770], gamma, rho, feature_min [36], feature_max [36]; all float64."""

MIN_SIZE = 16
"""Smallest width and height: below, the second scale is hardly larger than the window of its local means."""

WINDOW = 7
SIGMA = 7 / 6
CONTRAST_FLOOR = 1 / 255  # added to the local deviation: flat areas are divided by this
LUMINANCE = (0.2125, 0.7154, 0.0721)  # ITU-R BT.709, as scikit-image rounds it
CUBIC = (-0.09375, 0.59375, 0.59375, -0.09375)  # Keys' kernel, a = -0.75, half-way between two pixels
SHAPES = (0.03, 1e4, 1 << 16)  # table of the shape parameter: smallest, largest, entries

_LEAVES = 256
_MAX_CHUNK_BYTES = 1 << 28
"""Of one chunk's largest temporary; a picture's score does not depend on its chunk."""


class Brisque:
    """Scores pictures.

    Args:
        device: Where the model lies and pictures are expected; any device with float64.
        dtype: Of the per-pixel work. float64 repeats the reference; float32 halves memory and time, and its scores
            differ by 0.01 on renders, by a few tenths of a point where large areas of a picture are flat. What is
            left after the sums over pixels is float64 in either case.

    Raises:
        TypeError: ``dtype`` is neither float32 nor float64.
    """

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
        self.dtype = dtype
        with np.load(MODEL_FILE, allow_pickle=False) as file:
            model = {name: torch.from_numpy(file[name]) for name in file.files}
        self._gamma, self._rho = float(model["gamma"]), float(model["rho"])
        self._support_vectors = model["support_vectors"].to(device)
        self._weights = model["weights"].to(device)
        self._feature_min = model["feature_min"].to(device)
        self._feature_scale = (2.0 / (model["feature_max"] - model["feature_min"])).to(device)
        shapes, ratios = _shape_table()
        self._shapes, self._ratios = shapes.to(device), ratios.to(device)
        self._counts: dict[tuple[int, int], Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self._support_vectors.device

    def score(self, images: Tensor, *, check_finite: bool = False) -> Tensor:
        """The score of each picture, low for good.

        Args:
            images: [B, H, W, 3] or [B, 3, H, W], RGB, float16, bfloat16, float32 or float64, white at 1. Values beyond
                0..1 are taken as they are, as RAP's unclamped renders are. H and W are at least 16.
            check_finite: Look for NaN and infinity first, which waits for the device. Otherwise the score of a
                picture that holds any is NaN, which is below no threshold, and the others' are untouched.

        Returns:
            [B] float64 on the device of ``images``. NaN too for a black picture, and for most even ones.

        Raises:
            TypeError: ``images`` is not a dense floating tensor.
            ValueError: its shape, device or size is wrong, or it is not finite and ``check_finite`` is set.
            NotImplementedError: ``images`` requires a gradient.
        """
        features = self.features(images, check_finite=check_finite)
        with torch.no_grad():
            scaled = -1 + self._feature_scale * (features - self._feature_min)
            step = max(1, _MAX_CHUNK_BYTES // (8 * 64 * len(self._weights)))
            return torch.cat([self._regress(chunk) for chunk in scaled.split(step)])

    def features(self, images: Tensor, *, check_finite: bool = False) -> Tensor:
        """The 36 shape parameters that the regression reads, unscaled; arguments and errors as of :meth:`score`.

        Returns:
            [B, 36] float64: per scale (alpha, variance) of the normalised luminance, then (alpha, mean, left variance,
            right variance) of its products with the right, lower, lower right and lower left neighbour.
        """
        planes = self._planes(images, flag("check_finite", check_finite))
        with torch.no_grad():
            _, _, height, width = planes.shape
            item = 4 if self.dtype == torch.float32 else 8
            step = max(1, _MAX_CHUNK_BYTES // (20 * item * _power_of_two(height * width)))
            return torch.cat([self._features(chunk) for chunk in planes.split(step)])

    def _planes(self, images: Tensor, check_finite: bool) -> Tensor:
        """``images`` as [B, 3, H, W], checked."""
        wanted = "images must be a floating tensor [B, H, W, 3] or [B, 3, H, W]"
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise TypeError(f"{wanted} with white at 1 (divide uint8 by 255), got {describe(images)}")
        if images.layout != torch.strided:
            raise TypeError(f"{wanted}, got one of layout {images.layout}")
        if images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]) or images.shape[0] == 0:
            raise ValueError(f"{wanted} with B of at least 1, got {describe(images)}")
        if images.device != self.device:
            raise ValueError(f"images must be on {self.device}, where this Brisque is, got {describe(images)}")
        if images.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("images requires a gradient, which BRISQUE does not give: pass images.detach()")
        planes = images.permute(0, 3, 1, 2) if images.shape[3] == 3 else images
        if min(planes.shape[2:]) < MIN_SIZE:
            raise ValueError(f"images must be at least {MIN_SIZE} x {MIN_SIZE} pixels, got {describe(images)}")
        if check_finite:
            finite = planes.detach().isfinite().flatten(1).all(1)
            if not bool(finite.all()):
                which = (~finite).nonzero().flatten().tolist()
                raise ValueError(f"images must be finite, got NaN or infinity in those of index {which}")
        return planes

    def _features(self, planes: Tensor) -> Tensor:
        gray = _luminance(planes)
        half = _half_size(gray)
        # Down to 256 entries the two scales' sums have their own lengths; from there they share each step.
        sums = [_halve(_moment_terms(_normalised(picture, self.dtype)), _LEAVES) for picture in (gray, half)]
        sums = _halve(torch.stack(sums, 1), 1).squeeze(-1).double()  # [B, 2, 4, 5]
        size = (gray.shape[1], gray.shape[2])
        if size not in self._counts:  # kept, since a copy to the device in every call would be one too many
            counts = [_pair_counts(*picture.shape[1:]) for picture in (gray, half)]
            self._counts[size] = torch.tensor(counts, dtype=torch.float64, device=self.device)
        return self._fit(sums, self._counts[size])

    def _fit(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Asymmetric generalised Gaussians by their moments. sums [B, 2, 4, 5], counts [2, 5] -> [B, 36]."""
        left_squares, right_squares, absolutes, left_count = sums.unbind(2)
        left = left_squares / left_count
        right = right_squares / (counts - left_count)
        gamma = left.sqrt() / right.sqrt()
        ratio = (absolutes / counts).square() / ((left_squares + right_squares) / counts)
        ratio = ratio * ((gamma * gamma * gamma + 1) * (gamma + 1) / (gamma * gamma + 1).square())
        alpha = self._shape_of(ratio)
        mean = (right.sqrt() - left.sqrt()) * torch.exp(
            torch.lgamma(2 / alpha) - 0.5 * (torch.lgamma(1 / alpha) + torch.lgamma(3 / alpha))
        )
        products = torch.stack((alpha, mean, left, right), -1)[:, :, 1:].flatten(2)
        luminance = torch.stack((alpha[..., 0], 0.5 * (left[..., 0] + right[..., 0])), -1)
        return torch.cat((luminance, products), 2).flatten(1)

    def _shape_of(self, ratio: Tensor) -> Tensor:
        """alpha with Gamma(2/alpha)^2 / (Gamma(1/alpha) Gamma(3/alpha)) = ratio, held inside the table.

        The reference solves for alpha to 1.5e-8; linear interpolation in this table is as close. No alpha gives
        3/4 or more: there the solver runs off to 1e4 and beyond, and so large an alpha is far from all support vectors
        either way.
        """
        last = len(self._ratios) - 2
        index = (torch.searchsorted(self._ratios, ratio.contiguous()) - 1).clamp(0, last)
        low, high = self._ratios[index], self._ratios[index + 1]
        part = ((ratio - low) / (high - low)).clamp(0, 1)
        return self._shapes[index] + part * (self._shapes[index + 1] - self._shapes[index])

    def _regress(self, scaled: Tensor) -> Tensor:
        """libsvm's epsilon-SVR with a radial kernel: [B, 36] -> [B]."""
        distances = _tree_sum((scaled[:, None, :] - self._support_vectors).square())
        return _tree_sum(self._weights * torch.exp(-self._gamma * distances)) - self._rho


def _luminance(planes: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, H, W], of float32 or of float64 if ``planes`` is.

    In single precision the reference's matrix product rounds once per added channel (a fused multiply-add), which
    float64 products, exact here, repeat on every device.
    """
    if planes.dtype == torch.float64:
        red, green, blue = planes.unbind(1)
        return red * LUMINANCE[0] + green * LUMINANCE[1] + blue * LUMINANCE[2]
    red, green, blue = planes.float().unbind(1)
    weights = [float(np.float32(weight)) for weight in LUMINANCE]
    gray = (red.double() * weights[0]).float()
    gray = (gray.double() + green.double() * weights[1]).float()
    return (gray.double() + blue.double() * weights[2]).float()


def _half_size(gray: Tensor) -> Tensor:
    """[B, H, W] -> [B, round(H / 2), round(W / 2)], rounded half to even: cubic interpolation, borders repeated."""
    height, width = (round(0.5 * n) for n in gray.shape[1:])
    padded = F.pad(gray.double()[:, None], (1, 2, 1, 2), mode="replicate")[:, 0]
    rows = _weighted([padded[:, tap : tap + 2 * height : 2] for tap in range(4)], CUBIC)
    return _weighted([rows[:, :, tap : tap + 2 * width : 2] for tap in range(4)], CUBIC).to(gray.dtype)


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum, term by term in the order given, each product rounded before it is added.

    Elementwise, so that no library chooses an algorithm, or TF32, by the shape. ``torch.add(alpha=...)`` would fuse
    product and sum on some devices only.
    """
    total = tensors[0] * weights[0]
    product = torch.empty_like(total)
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += torch.mul(tensor, weight, out=product)
    return total


def _normalised(gray: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean-subtracted, contrast-normalised luminance: [B, H, W] -> [B, H, W].

    Squares are taken in the dtype of ``gray``, since the reference's are: in bright flat areas their rounding is
    larger than the variance. There too the sign of ``gray - mean`` is that of the rounding of ``mean``, and the fits
    count signs; hence the window's 49 terms one by one, from the lower right as SciPy adds them. With 7 + 7 terms, all
    that other pixels need, pictures with large flat areas would be up to 0.7 points off.
    """
    grid, line = _gaussian()
    squares = (gray * gray).to(dtype)
    gray = gray.to(dtype)
    mean = _weighted(_shifted(gray, range(WINDOW), range(WINDOW))[::-1], grid)
    rows = _weighted(_shifted(squares, range(WINDOW), (WINDOW // 2,)), line)
    mean_square = _weighted(_shifted(rows, (WINDOW // 2,), range(WINDOW)), line)
    return (gray - mean) / ((mean * mean - mean_square).abs().sqrt() + CONTRAST_FLOOR)


def _shifted(picture: Tensor, rows: Sequence[int], columns: Sequence[int]) -> list[Tensor]:
    """Views of [B, H, W], bordered by zeros, under each place of the window; places count from its upper left."""
    _, height, width = picture.shape
    padded = F.pad(picture, (WINDOW // 2,) * 4)
    return [padded[:, i : i + height, j : j + width] for i in rows for j in columns]


@lru_cache(maxsize=1)
def _gaussian() -> tuple[list[float], list[float]]:
    """Weights of the window: its 49 row by row, and the 7 whose outer product they are up to rounding.

    By ``math.exp``: NumPy's own differs in the last bit between its releases.
    """
    squares = [(k - WINDOW // 2) ** 2 for k in range(WINDOW)]
    line = np.array([math.exp(-x / (2 * SIGMA**2)) for x in squares])
    grid = np.array([math.exp(-(x + y) / (2 * SIGMA**2)) for y in squares for x in squares])
    grid *= 1 / (2 * math.pi * SIGMA**2)  # divided out again below, but not from the last bits
    return (grid / grid.sum()).tolist(), (line / line.sum()).tolist()


def _moment_terms(normalised: Tensor) -> Tensor:
    """What the fits add up over the picture: [B, H, W] -> [B, 4, 5, P], P the next power of two of H W, at least
    256.

    4: square if negative, square if not, absolute value, 1 if negative. 5: the values themselves, then the products
    with the right, lower, lower right and lower left neighbour. Places beyond a product's area hold 0 and add nothing.
    """
    batch, height, width = normalised.shape
    values = normalised.new_zeros(batch, 5, max(_LEAVES, _power_of_two(height * width)))
    maps = values[..., : height * width].view(batch, 5, height, width)
    maps[:, 0] = normalised
    torch.mul(normalised[:, :, :-1], normalised[:, :, 1:], out=maps[:, 1, :, :-1])
    torch.mul(normalised[:, :-1], normalised[:, 1:], out=maps[:, 2, :-1])
    torch.mul(normalised[:, :-1, :-1], normalised[:, 1:, 1:], out=maps[:, 3, :-1, :-1])
    torch.mul(normalised[:, 1:, :-1], normalised[:, :-1, 1:], out=maps[:, 4, :-1, :-1])
    terms = values.new_empty(batch, 4, *values.shape[1:])
    torch.clamp(values, max=0, out=terms[:, 0])
    torch.clamp(values, min=0, out=terms[:, 1])
    terms[:, :2].square_()
    torch.abs(values, out=terms[:, 2])
    terms[:, 3] = values < 0
    return terms


def _pair_counts(height: int, width: int) -> list[int]:
    """How many values and products of each direction a picture has."""
    inner = (height - 1) * (width - 1)
    return [height * width, height * (width - 1), (height - 1) * width, inner, inner]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _halve(terms: Tensor, length: int) -> Tensor:
    """Folds the last dimension, a power of two, onto its first half until ``length`` entries are left.

    One order of additions for every batch and device, which ``torch.sum`` does not promise.
    """
    while terms.shape[-1] > length:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms


def _tree_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension."""
    n = terms.shape[-1]
    return _halve(F.pad(terms, (0, _power_of_two(n) - n)), 1).squeeze(-1)


@lru_cache(maxsize=1)
def _shape_table() -> tuple[Tensor, Tensor]:
    """Shape parameters, evenly spaced in their logarithm, and the increasing ratios of moments that they give."""
    low, high, entries = SHAPES
    shapes = torch.exp(torch.linspace(math.log(low), math.log(high), entries, dtype=torch.float64))
    ratios = torch.exp(2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes))
    return shapes, ratios
