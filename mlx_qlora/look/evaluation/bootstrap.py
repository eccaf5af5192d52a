"""How sure a score is: what it would have been with other questions of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.look.gap import SURE

RESAMPLES = 2000
_AT_ONCE = 4_000_000  # numbers that are held at once
_ALIKE = 1e-9  # sums in another order differ by less
FEW = 30  # questions, below which percentile intervals are known to be too narrow

# A score of many resamples at once: [R, N], how often each question was drawn -> [R].
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval. There is none of fewer than two questions, or where all scored the same: drawn again,
    20 right answers of 20 are always 20, and the next question may well be wrong."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def share(right: float, n: int) -> Estimate:
    """How many of `n` answers are right, with Wilson's interval. It is used for all that is right or wrong, and not only
    where the bootstrap knows nothing: drawn again, 20 right ones of 20 are always 20, and its interval of 1 in 20 is too
    narrow, too. Wilson's holds the truth in about 95 % of cases from 0 of n to n of n.

    >>> found = share(20, 20)
    >>> round(found.low, 3), found.high
    (0.839, 1.0)
    """
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value, spread = right / n, SURE**2 / n
    middle = (value + spread / 2) / (1 + spread)
    half = SURE * math.sqrt(value * (1 - value) / n + spread / (4 * n)) / (1 + spread)
    low, high = (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)
    return Estimate(value, low, high, n)


def mean_of_shares(shares: Sequence[Estimate]) -> Estimate:
    """Each counts the same, whatever its n. The interval is put together of how far theirs reach (Zou and Donner), so that it
    is right where some are 0 or 1."""
    value = sum(each.value for each in shares) / len(shares)
    down, up = (
        math.sqrt(sum((each.value - end) ** 2 for each, end in zip(shares, ends, strict=True))) / len(shares)
        for ends in ([each.low for each in shares], [each.high for each in shares])
    )
    return Estimate(value, value - down, value + up, len(shares))


def mean_of(values: NDArray[np.float64]) -> Statistic:
    """The mean of what each question scored; NaN where a score says nothing of a question."""
    there = np.isfinite(values)
    filled = np.where(there, values, 0.0)

    def statistic(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        count = drawn @ there.astype(np.float64)
        return ratio(drawn @ filled, count)

    return statistic


def ratio(parts: NDArray[np.float64], wholes: NDArray[Any], otherwise: float = math.nan) -> NDArray[np.float64]:
    """Each part of its whole; `otherwise` where there is no whole."""
    out: NDArray[np.float64] = np.full(parts.shape, otherwise)
    return np.divide(parts, wholes, out=out, where=wholes > 0)  # type: ignore[no-any-return]


def difference_of(one: Statistic, other: Statistic) -> Statistic:
    """Of the same questions, so that what makes them hard for both is not counted as doubt."""
    return lambda drawn: one(drawn) - other(drawn)


def estimates(
    statistics: Mapping[str, tuple[Statistic, int]], count: int, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """Values and percentile intervals of (statistic, questions it speaks of), all of the same draws of `count` questions."""
    whole = np.ones((1, count))
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in statistics}
    rng = np.random.default_rng(seed)
    done, block = 0, max(1, min(resamples, _AT_ONCE // count))
    while done < resamples:
        rows = min(block, resamples - done)
        drawn = np.stack([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(rows)]).astype(float)
        for name, (statistic, _) in statistics.items():
            found[name].append(statistic(drawn))
        done += rows
    return {
        name: Estimate(float(statistic(whole)[0]), *_interval(np.concatenate(found[name]), n), n)
        for name, (statistic, n) in statistics.items()
    }


def _interval(values: NDArray[np.float64], n: int) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if n < 2 or not len(values) or np.ptp(values) < _ALIKE:
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
