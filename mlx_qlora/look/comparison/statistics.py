"""How sure a mean or a difference is. Where chance has to be drawn, the same numbers give the same result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.look.measure import standard_error

Floats = NDArray[np.float64]

SURE = 0.95
_DRAWS = 20_000
_MOST_NUMBERS = 20_000_000  # drawn for one test: half a second
_AT_ONCE = 2_000_000
_MANY = 2_000  # of so many, means are as a normal distribution says, and nothing needs to be drawn
_FARTHEST_T = 40.0  # of many degrees of freedom none is further out
_EXACT_UP_TO = 14  # differences: 16,384 ways to flip their signs


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; NaN where that is not known."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference(Interval):
    """`p`: how often chance alone would make a difference as large, were there none."""

    p: float = math.nan


def with_error(value: float, error: float) -> Interval:
    """A figure whose standard error is known."""
    half = NormalDist().inv_cdf(0.5 + SURE / 2) * error
    return Interval(value, value - half, value + half)


def difference_with_error(value: float, error: float, examples: int) -> Difference:
    """A difference whose standard error is known, estimated from so many examples."""
    return _by_t(value, error, examples - 1)


def _by_t(value: float, error: float, degrees: float) -> Difference:
    if value == error == 0:  # the same, figure by figure
        return Difference(value, p=1.0)
    if not (error > 0 and degrees >= 1):
        return Difference(value)
    half = t_quantile(0.5 + SURE / 2, degrees) * error
    return Difference(value, value - half, value + half, t_tails(value / error, degrees))


def mean(values: Sequence[float]) -> Interval:
    """Of few values, such as one for each seed, by Student's t.

    >>> found = mean([1.0, 2.0, 3.0])
    >>> round(found.value, 3), round(found.half, 3)  # 4.303 times 1 / sqrt(3)
    (2.0, 2.484)
    """
    middle = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(middle)
    half = t_quantile(0.5 + SURE / 2, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(middle, middle - half, middle + half)


def difference_of_means(a: Sequence[float], b: Sequence[float]) -> Difference:
    """mean(b) - mean(a), by Welch's test; where one side is a single value, it is taken to vary like the other side's.

    Single values on both sides say nothing of their spread: then only the difference is known.
    """
    value = math.fsum(b) / len(b) - math.fsum(a) / len(a)
    error, degrees = _error_of_difference(a, b)
    return _by_t(value, error, degrees)


def _error_of_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """(standard error, degrees of freedom)."""
    if min(len(a), len(b)) < 2:
        more = max(a, b, key=len)
        if len(more) < 2:
            return math.nan, math.nan
        return float(np.std(more, ddof=1)) * math.sqrt(1 / len(a) + 1 / len(b)), len(more) - 1
    of_a, of_b = float(np.var(a, ddof=1)) / len(a), float(np.var(b, ddof=1)) / len(b)
    if of_a + of_b == 0:
        return 0.0, math.nan
    return math.sqrt(of_a + of_b), (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))


def by_t(differences: Sequence[float]) -> Difference:
    """The mean of a few differences, such as one for each seed, by Student's t."""
    found = mean(differences)
    return _by_t(found.value, float(np.std(differences, ddof=1)) / math.sqrt(len(differences)), len(differences) - 1)


def crossed(a: Floats, b: Floats, weights: Floats | None = None) -> Difference:
    """mean(b) - mean(a) of figures by (run, question): the runs of a side differ in their seeds, the questions are the same.

    Other questions would have given another difference, and other seeds, too: the squares of both errors are added, with
    degrees of freedom by Welch and Satterthwaite. Either alone would call one difference in ten that is none a difference,
    or worse. Runs of the same seed are not paired: of three seeds that takes more degrees of freedom than it gives back.
    """
    each = b.mean(0) - a.mean(0)
    weights = np.ones(len(each)) if weights is None else weights
    value = float(weights @ each / weights.sum())
    of_questions = standard_error(weights * each, weights) if len(each) > 1 else math.nan
    of_seeds, degrees = error_of_seeds(a, b, weights)
    parts = [(of_questions, len(each) - 1.0), (of_seeds, degrees)]
    error = math.hypot(of_questions, of_seeds)
    if error == 0 and value:  # all questions alike, for every seed
        return Difference(value, p=sign_flips(each))
    below = sum(part**4 / own for part, own in parts if part > 0)
    return _by_t(value, error, error**4 / below if below > 0 else math.nan)


def error_of_seeds(a: Floats, b: Floats, weights: Floats | None = None) -> tuple[float, float]:
    """(standard error, degrees of freedom) that seeds alone give to the difference of two such tables."""
    of_a, of_b = (np.average(side, axis=1, weights=weights).tolist() for side in (a, b))
    return _error_of_difference(of_a, of_b)


def paired(differences: Sequence[float]) -> Difference:
    """The mean of differences that are each of the same question: its interval by drawing questions again and again, and
    `p` by flipping the signs, each as likely as not if there is no difference. For answers that are right or wrong that
    is McNemar's exact test."""
    each = np.asarray(differences, np.float64)
    low, high = bootstrap(each)
    return Difference(float(each.mean()), low, high, sign_flips(each))


def bootstrap(values: Floats) -> tuple[float, float]:
    """The 95 % interval of the mean, the values being drawn at random from more of their kind.

    Plain percentiles are too narrow for few values; they are taken further out, by what Student's t and a standard
    deviation of n - 1 differ from what the drawing knows. Of values that are all the same it would know nothing: NaN.
    """
    number = len(values)
    if number < 2 or not np.ptp(values):
        return math.nan, math.nan
    if number > _MANY:
        found = with_error(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(number))
        return found.low, found.high
    reach = math.sqrt(number / (number - 1)) * t_quantile(0.5 + SURE / 2, number - 1)
    tail = NormalDist().cdf(-reach)
    drawn = np.concatenate(
        [values[rng.integers(0, number, (rows, number), np.int32)].mean(1) for rng, rows in _chunks(number, 7)]
    )
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def sign_flips(differences: Floats) -> float:
    """How often a mean at least as far from 0 comes out, if each difference had its sign by chance."""
    left = differences[differences != 0]
    if not len(left):
        return 1.0
    if len(left) > _MANY:
        return 2 * NormalDist().cdf(-abs(left.sum()) / math.sqrt(left @ left))
    sizes = np.abs(left)
    if np.ptp(sizes) <= 1e-12 * sizes.max():  # of answers that are right or wrong: coins
        more = max(int((left > 0).sum()), int((left < 0).sum()))
        return min(1.0, 2 * sum(math.comb(len(left), heads) for heads in range(more, len(left) + 1)) / (1 << len(left)))
    found = abs(left.sum()) - 1e-12 * sizes.sum()  # sums in another order are as far
    if len(left) <= _EXACT_UP_TO:
        ways = np.arange(2 ** len(left))[:, None] >> np.arange(len(left)) & 1
        return float(np.mean(np.abs(left.sum() - 2 * (ways @ left)) >= found))
    as_far = made = 0
    for rng, rows in _chunks(len(left), 11):
        flipped = rng.integers(0, 2, (rows, len(left)), np.int8) @ left
        as_far += int((np.abs(left.sum() - 2 * flipped) >= found).sum())
        made += rows
    return (as_far + 1) / (made + 1)  # what was found is itself one of the ways


def _chunks(numbers: int, seed: int) -> Iterator[tuple[np.random.Generator, int]]:
    """(generator, rows of so many numbers) until there are draws enough; few at once where they are long."""
    rng = np.random.default_rng(seed)
    left = min(_DRAWS, _MOST_NUMBERS // numbers)
    most = max(1, _AT_ONCE // numbers)
    while left:
        rows = min(left, most)
        left -= rows
        yield rng, rows


def holm(ps: Sequence[float]) -> list[float]:
    """The same p for each of several comparisons, such that a false alarm in any of them is as rare as in a single one.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((number for number, p in enumerate(ps) if math.isfinite(p)), key=lambda number: ps[number])
    adjusted, so_far = list(ps), 0.0
    for rank, number in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - rank) * ps[number]))
        adjusted[number] = so_far
    return adjusted


def t_quantile(probability: float, degrees: float) -> float:
    """Of Student's t, for probabilities from 0.5 on and degrees of freedom from 1 on, fractions too.

    >>> [round(t_quantile(0.975, degrees), 3) for degrees in (1, 2, 4, 30, 1e6)]
    [12.706, 4.303, 2.776, 2.042, 1.96]
    """
    angles, inside = _angles(degrees)
    return float(math.sqrt(degrees) * math.tan(float(np.interp(2 * probability - 1, inside, angles))))


def t_tails(t: float, degrees: float) -> float:
    """How often Student's t is at least as far from 0."""
    angles, inside = _angles(degrees)
    return float(1 - np.interp(math.atan(abs(t) / math.sqrt(degrees)), angles, inside))


@lru_cache(32)
def _angles(degrees: float) -> tuple[Floats, Floats]:
    """With t = sqrt(degrees) tan(angle) the density is a power of a cosine, and all of it lies within a right angle.

    (angles from 0, the share of t that lies within each).
    """
    borders = np.linspace(0, min(math.pi / 2, _FARTHEST_T / math.sqrt(degrees)), 2**14 + 1)
    middles = (borders[1:] + borders[:-1]) / 2
    inside = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (degrees - 1))])
    return borders, inside / inside[-1]
