"""Curves as they are drawn: fewer points with every peak, a smooth course, and where the axis ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MOST = 97  # of a hundred values of a noisy curve that have to be inside of the axis
_FAR = 2.0  # times that: a validation further off does not stretch the axis either


def thinned(x: Sequence[float] | NDArray[Any], y: Sequence[float] | NDArray[Any], columns: int = 1000) -> tuple[Floats, Floats]:
    """The same line with at most four points in each of so many columns: its first and last, lowest and highest.

    >>> x, y = thinned(range(10_000), [n % 100 + 900 * (n == 5_001) for n in range(10_000)], columns=10)
    >>> len(x), y.min(), y.max(), x[y.argmax()]
    (21, np.float64(0.0), np.float64(901.0), np.float64(5001.0))
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(xs) <= 4 * columns:
        return xs, ys
    width = (xs[-1] - xs[0]) / columns or 1.0
    column = np.minimum((xs - xs[0]) // width, columns - 1)
    by_height = np.lexsort((ys, column))
    begins = np.flatnonzero(np.diff(column, prepend=-1))
    ends = np.append(begins[1:], len(xs)) - 1
    kept = np.unique(np.concatenate([begins, ends, by_height[begins], by_height[ends]]))
    return xs[kept], ys[kept]


def smooth(y: Sequence[float] | NDArray[Any], width: int | None = None) -> Floats:
    """The mean of the values around each; near the ends of those that there are. Without a width: some 50 to a curve.

    >>> smooth([1.0, 2.0, 6.0], 3).tolist()
    [1.5, 3.0, 4.0]
    """
    ys = np.asarray(y, np.float64)
    half = (max(5, len(ys) // 50) if width is None else width) // 2
    sums = np.concatenate([[0.0], np.cumsum(ys)])
    places = np.arange(len(ys))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(ys))
    found: Floats = (sums[high] - sums[low]) / (high - low)
    return found


def top_of(noisy: Sequence[float], sparse: Sequence[float] = ()) -> float | None:
    """Where an axis for these may end, so that a few values far above don't make a flat line of the rest.

    >>> top_of([12.0] + [1.0] * 99, [1.2, 1.1]), top_of([3.0, 2.0], []), top_of([], [2.0, 1.0]), top_of([])
    (1.2, 3.0, 2.0, None)
    """
    if not len(noisy):
        return max(sparse, default=None)
    most = float(np.percentile(noisy, _MOST, method="lower")) if len(noisy) > 4 else max(noisy)
    return max([most, *(value for value in sparse if value <= _FAR * most)])
