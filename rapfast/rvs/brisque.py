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
are trees of one shape. Nothing waits for the device, but once when a CUDA graph is made of the kernels for a size of
pictures, the second time it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rapfast._check import describe, flag
from rapfast.profiling import section
from rapfast.rvs.brisque_graphs import ScoreGraphs

MODEL_FILE = Path(__file__).parent / "data" / "brisque_svr.npz"
"""support_vectors [770, 36], weights [770], gamma, rho, feature_min [36], feature_max [36]; all float64."""

MIN_SIZE = 16
"""Smallest width and height: below, the second scale is hardly larger than the window of its local means."""

WINDOW = 7
SIGMA = 7 / 6
CONTRAST_FLOOR = 1 / 255  # added to the local deviation: flat areas are divided by this
LUMINANCE = (0.2125, 0.7154, 0.0721)  # ITU-R BT.709, as scikit-image rounds it
CUBIC = (-0.09375, 0.59375)  # Keys' kernel, a = -0.75, half-way between two pixels: of the outer and the inner taps
CUBIC_KINDS = (0, 1, 1, 0)
MARGIN = WINDOW // 2
SHAPES = (0.03, 1e4, 1 << 16)  # table of the shape parameter: smallest, largest, entries

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
        self._constants = _Constants.on(device, dtype)
        self._graphs = ScoreGraphs(self.device)
        self._counts: dict[tuple[int, int], Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self._support_vectors.device

    def __reduce__(self) -> tuple[type[Brisque], tuple[torch.device, torch.dtype]]:
        """A copy, or another process's own, makes its graphs itself."""
        return Brisque, (self.device, self.dtype)

    @section("score")
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
        planes = self._planes(images, flag("check_finite", check_finite))
        step = self._at_once(*planes.shape[2:])
        with torch.no_grad():
            if planes.is_cuda and not torch.cuda.is_current_stream_capturing():
                return self._graphs(self._scores, planes, step)
            return torch.cat([self._scores(chunk) for chunk in planes.split(step)])

    def features(self, images: Tensor, *, check_finite: bool = False) -> Tensor:
        """The 36 shape parameters that the regression reads, unscaled; arguments and errors as of :meth:`score`.

        Returns:
            [B, 36] float64: per scale (alpha, variance) of the normalised luminance, then (alpha, mean, left variance,
            right variance) of its products with the right, lower, lower right and lower left neighbour.
        """
        planes = self._planes(images, flag("check_finite", check_finite))
        with torch.no_grad():
            return torch.cat([self._features(chunk) for chunk in planes.split(self._at_once(*planes.shape[2:]))])

    def _at_once(self, height: int, width: int) -> int:
        """Pictures of a chunk: their largest temporary is that of `_moments`, or of small ones that of `_regress`."""
        height, width = _Sheet(height, width).shape
        largest = max(20 * self.dtype.itemsize * height * width, 8 * self._support_vectors.numel())
        return max(1, _MAX_CHUNK_BYTES // largest)

    def _scores(self, planes: Tensor) -> Tensor:
        """A chunk [B, 3, H, W] -> [B]."""
        return self._regress(-1 + self._feature_scale * (self._features(planes) - self._feature_min))

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
        gray = _luminance(planes, self._constants.luminance)
        sheet = _Sheet(*gray.shape[1:])
        sheets = sheet.of(gray, _half_size(gray, self._constants.cubic))
        sums = _moments(_normalised(sheets, sheet, self._constants), sheet).double()  # [B, 2, 4, 5]
        size = (sheet.height, sheet.width)
        if size not in self._counts:  # kept, since a copy to the device in every call would be one too many
            counts = [_pair_counts(*part[2:]) for part in sheet.parts]
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
        distances = _fold((scaled[:, None, :] - self._support_vectors).square_(), 2)
        return _fold(self._weights * torch.exp(-self._gamma * distances), 1) - self._rho


def _luminance(planes: Tensor, weights: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, H, W], of float32 or of float64 if ``planes`` is.

    In single precision the reference's matrix product rounds once per added channel (a fused multiply-add), which
    float64 products, exact here, repeat on every device.
    """
    if planes.dtype == torch.float64:
        red, green, blue = planes.unbind(1)
        return red * LUMINANCE[0] + green * LUMINANCE[1] + blue * LUMINANCE[2]
    red, green, blue = (planes.float() * weights[:, None, None]).unbind(1)
    return ((red.float() + green).float() + blue).float()


class _Sheet(NamedTuple):
    """A picture at both scales side by side, so that one operation does the work of two.

    Around and between them lie MARGIN zeros, which a window of local means does not reach across.
    """

    height: int
    width: int

    @property
    def parts(self) -> tuple[tuple[int, int, int, int], ...]:
        """(top, left, height, width) of both scales on the sheet; the second has round(n / 2) pixels a side, half to
        even."""
        half = round(0.5 * self.height), round(0.5 * self.width)
        return (
            (MARGIN, MARGIN, self.height, self.width),
            (MARGIN, 2 * MARGIN + self.width, *half),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Of the sheet, margins included."""
        _, left, _, width = self.parts[1]
        return self.height + 2 * MARGIN, left + width + MARGIN

    def of(self, gray: Tensor, half: Tensor) -> Tensor:
        """[B, H, W] and [B, h, w] -> the sheets."""
        sheets = gray.new_zeros(len(gray), *self.shape)
        for (top, left, height, width), picture in zip(self.parts, (gray, half), strict=True):
            sheets[:, top : top + height, left : left + width] = picture
        return sheets


def _half_size(gray: Tensor, weights: Tensor) -> Tensor:
    """[B, H, W] -> [B, round(H / 2), round(W / 2)], rounded half to even: cubic interpolation, borders repeated."""
    height, width = (round(0.5 * n) for n in gray.shape[1:])
    padded = F.pad(gray.double()[:, None], (1, 2, 1, 2), mode="replicate")[:, 0]
    products = _products(padded, weights)
    rows = _added([products[kind][:, tap : tap + 2 * height : 2] for tap, kind in enumerate(CUBIC_KINDS)])
    products = _products(rows, weights)
    columns = [products[kind][:, :, tap : tap + 2 * width : 2] for tap, kind in enumerate(CUBIC_KINDS)]
    return _added(columns).to(gray.dtype)


def _products(tensor: Tensor, weights: Tensor) -> Tensor:
    """[k, ...]: a tensor times each of the k weights, rounded once, in the wider dtype of the two."""
    return tensor * weights.view(-1, *[1] * tensor.ndim)


def _added(tensors: Sequence[Tensor]) -> Tensor:
    """The sum, term by term in the order given.

    With products rounded before they are added: elementwise, so that no library chooses an algorithm, or TF32, by the
    shape. ``torch.add(alpha=...)`` would fuse product and sum on some devices only.
    """
    total = tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        total += tensor
    return total


def _normalised(sheets: Tensor, sheet: _Sheet, constants: _Constants) -> Tensor:
    """Mean-subtracted, contrast-normalised luminance, 0 beside the pictures: sheets -> [B, H + 1, W' + 2], without the
    margins but for one column at either side and one row below.

    Squares are taken in the dtype of the sheets, since the reference's are: in bright flat areas their rounding is
    larger than the variance. There too the sign of ``gray - mean`` is that of the rounding of ``mean``, and the fits
    count signs; hence the window's 49 terms one by one, from the lower right as SciPy adds them. With 7 + 7 terms, all
    that other pixels need, pictures with large flat areas would be up to 0.7 points off. The window's 49 weights are
    10 numbers, its line's 4, and each makes its products once.
    """
    grid, line = _gaussian()
    dtype = constants.grid.dtype
    height, width = (side - 2 * MARGIN for side in sheets.shape[1:])
    squares = (sheets * sheets).to(dtype)
    gray = sheets.to(dtype)
    products = _products(gray, constants.grid)
    places = [(i, j) for i in range(WINDOW) for j in range(WINDOW)]
    mean = _added([products[grid.kinds[k]][:, i : i + height, j : j + width] for k, (i, j) in enumerate(places)][::-1])
    products = _products(squares, constants.line)
    rows = _added([products[kind][:, i : i + height] for i, kind in enumerate(line.kinds)])
    products = _products(rows, constants.line)
    deviation = _added([products[kind][:, :, j : j + width] for j, kind in enumerate(line.kinds)])
    torch.sub(mean * mean, deviation, out=deviation).abs_().sqrt_().add_(CONTRAST_FLOOR)
    difference = torch.sub(gray[:, MARGIN:-MARGIN, MARGIN:-MARGIN], mean, out=mean)
    result = gray.new_zeros(len(gray), height + 1, width + 2)
    for top, left, *size in sheet.parts:
        top, left = top - MARGIN, left - MARGIN
        here = (slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
        there = result[:, top : top + size[0], left + 1 : left + 1 + size[1]]
        torch.div(difference[here], deviation[here], out=there)
    return result


class _Window(NamedTuple):
    """Weights, of which many are equal: `numbers` are the different ones, `kinds` the number's place for each."""

    numbers: list[float]
    kinds: list[int]


@lru_cache(maxsize=1)
def _gaussian() -> tuple[_Window, _Window]:
    """The window's 49 weights row by row, and the 7 whose outer product they are up to rounding.

    By ``math.exp``: NumPy's own differs in the last bit between its releases.
    """
    squares = [(k - WINDOW // 2) ** 2 for k in range(WINDOW)]
    line = np.array([math.exp(-x / (2 * SIGMA**2)) for x in squares])
    grid = np.array([math.exp(-(x + y) / (2 * SIGMA**2)) for y in squares for x in squares])
    grid *= 1 / (2 * math.pi * SIGMA**2)  # divided out again below, but not from the last bits
    grid, line = ((weights / weights.sum()).tolist() for weights in (grid, line))
    kinds = sorted(set(grid)), sorted(set(line))
    return tuple(_Window(k, [k.index(w) for w in weights]) for k, weights in zip(kinds, (grid, line), strict=True))


class _Constants(NamedTuple):
    """Weights on the device: of the channels [3] and the cubic interpolation [2] in float64, of the windows in the
    dtype of the per-pixel work. As scalars they would be rounded to a picture's own dtype."""

    luminance: Tensor
    cubic: Tensor
    grid: Tensor
    line: Tensor

    @staticmethod
    def on(device: torch.device | str, dtype: torch.dtype) -> _Constants:
        grid, line = (torch.tensor(window.numbers, dtype=dtype, device=device) for window in _gaussian())
        luminance = torch.from_numpy(np.array(LUMINANCE, dtype=np.float32)).double().to(device)
        return _Constants(luminance, torch.tensor(CUBIC, dtype=torch.float64, device=device), grid, line)


def _moments(normalised: Tensor, sheet: _Sheet) -> Tensor:
    """What the fits add up over each scale: [B, H + 1, W' + 2] of `_normalised` -> [B, 2, 4, 5].

    4: square if negative, square if not, absolute value, 1 if negative. 5: the values themselves, then the products
    with the right, lower, lower right and lower left neighbour. A product beyond a picture is 0 and adds nothing.
    """
    batch, height, width = len(normalised), normalised.shape[1] - 1, normalised.shape[2] - 2
    here = normalised[:, :-1, 1:-1]
    values = normalised.new_empty(batch, 5, height, width)
    values[:, 0] = here
    torch.mul(here, normalised[:, :-1, 2:], out=values[:, 1])
    torch.mul(here, normalised[:, 1:, 1:-1], out=values[:, 2])
    torch.mul(here, normalised[:, 1:, 2:], out=values[:, 3])
    torch.mul(here, normalised[:, 1:, :-2], out=values[:, 4])
    terms = values.new_empty(batch, 4, *values.shape[1:])
    torch.clamp(values, max=0, out=terms[:, 0])
    torch.clamp(values, min=0, out=terms[:, 1])
    terms[:, :2].square_()
    torch.abs(values, out=terms[:, 2])
    terms[:, 3] = values < 0
    columns = _fold(terms, 3)
    widest = sheet.width
    both = columns.new_zeros(batch, 2, 4, 5, widest)
    for k, (_, left, _, size) in enumerate(sheet.parts):
        both[:, k, ..., :size] = columns[..., left - MARGIN : left - MARGIN + size]
    return _fold(both, 4)


def _pair_counts(height: int, width: int) -> list[int]:
    """How many values and products of each direction a picture has."""
    inner = (height - 1) * (width - 1)
    return [height * width, height * (width - 1), (height - 1) * width, inner, inner]


def _fold(terms: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, which folds the rear half onto the front one until one entry is left. Overwrites
    ``terms``.

    One order of additions for every batch and device, which ``torch.sum`` does not promise.
    """
    length = terms.shape[dim]
    while length > 1:
        rest = length // 2
        length -= rest
        front = terms.narrow(dim, 0, rest)
        front += terms.narrow(dim, length, rest)
    return terms.select(dim, 0)


@lru_cache(maxsize=1)
def _shape_table() -> tuple[Tensor, Tensor]:
    """Shape parameters, evenly spaced in their logarithm, and the increasing ratios of moments that they give."""
    low, high, entries = SHAPES
    shapes = torch.exp(torch.linspace(math.log(low), math.log(high), entries, dtype=torch.float64, device="cpu"))
    ratios = torch.exp(2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes))
    return shapes, ratios
