"""How far a ratio of two times may be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

FEW = 8
"""Fewer measurements than this, and their spread is their standard deviation; of more, outliers are left out."""


class Sample(NamedTuple):
    """Repeated measurements of one thing, summed up.

    Attributes:
        median: of them, above 0. spread: standard deviation of one measurement's logarithm; None with less than two.
        n: how many.
    """

    median: float
    spread: float | None
    n: int


class Ratio(NamedTuple):
    """after / before, and the bounds within which it lies with the confidence that was asked for; None: unknown."""

    value: float
    low: float | None
    high: float | None


def sample(values: Sequence[float]) -> Sample:
    """Of measurements above 0.

    The spread of many is taken from their quartiles (for a normal distribution the quartiles lie 1.349 standard
    deviations apart), so that the rare measurement that something disturbed does not hide a change.
    """
    logs = [math.log(value) for value in values]
    if len(logs) < 2:
        return Sample(values[0], None, len(values))
    if len(logs) < FEW:
        spread = statistics.stdev(logs)
    else:
        low, _, high = statistics.quantiles(logs, n=4)
        spread = (high - low) / 1.349
    return Sample(statistics.median(values), spread, len(values))


def summary(median: float, iqr: float, n: int) -> Sample:
    """Of measurements of which only the median and the distance of the quartiles are known."""
    return Sample(median, iqr / 1.349 / median if n > 1 else None, n)


def ratio(before: Sample, after: Sample, confidence: float = 0.99) -> Ratio:
    """Welch's interval for the difference of two means, taken of the logarithms' medians.

    The standard error of a median of n normal measurements is sqrt(pi / 2) that of their mean, spread / sqrt(n). Two
    single measurements have no bounds.
    """
    value = after.median / before.median
    if before.spread is None or after.spread is None:
        return Ratio(value, None, None)
    variances = [math.pi / 2 * s.spread**2 / s.n for s in (before, after)]
    total = sum(variances)
    if total == 0:
        return Ratio(value, value, value)
    freedom = total**2 / sum(v**2 / (s.n - 1) for v, s in zip(variances, (before, after), strict=True))
    half = student_t((1 + confidence) / 2, freedom) * math.sqrt(total)
    return Ratio(value, value * math.exp(-half), value * math.exp(half))


def student_t(p: float, freedom: float) -> float:
    """The p-quantile, p in 0.5..1, of Student's t, whole degrees of freedom (the next smaller are taken).

    One and two degrees have closed forms; of more it is the Cornish-Fisher expansion of the normal quantile
    (Abramowitz and Stegun, 26.7.5), within 3 % at three degrees and p = 0.995.
    """
    n = max(1, math.floor(freedom))
    if n == 1:
        return math.tan(math.pi * (p - 0.5))
    if n == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = statistics.NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / n**i for i, term in enumerate(terms))
