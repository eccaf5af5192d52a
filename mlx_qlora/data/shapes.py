"""The few shapes of padded batches, chosen for a data set, so that it costs at most a dozen compiled traces.

A batch is rows x length behind a prefix, and its number of places follows from these. There are two numbers of rows
for each length. Without a common prefix there are six lengths; with one there are five behind it, and a single one
for the few examples that do not begin with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.records import Example

MOST_TRACES = 12
_STEP = 8
_FILLED_ROWS = 512  # positions in a batch of short rows; where the last one is filled with empty rows, little is lost


@dataclass(frozen=True)
class Shapes:
    """Lengths of rows from short to long, and for each the most supervised places that a row has."""

    lengths: tuple[int, ...] = ()
    places_of: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()  # the tokens that most of the data begins with
    without: int = 0  # the length for what does not, if there is a prefix

    def groups(self, examples: Sequence[Example], budget: int) -> Iterator[tuple[Sequence[Example], int, int, int]]:
        """(examples, rows, length, tokens of prefix) of every batch; where rows are too many for the examples they repeat
        nothing: the places of what is missing are not there."""
        beginning = np.array(self.prefix, np.int32)
        with_it = [number for number, example in enumerate(examples) if self._begins(example, beginning)]
        for numbers, prefix in ((with_it, len(beginning)), (sorted(set(range(len(examples))) - set(with_it)), 0)):
            classes: dict[int, list[Example]] = {}
            for number in numbers:
                size = len(examples[number].tokens) - 1 - prefix
                length = self._length(size) if prefix or not self.prefix else max(self.without, round_up(size, _STEP))
                classes.setdefault(length, []).append(examples[number])
            for length, members in sorted(classes.items(), reverse=True):
                rows = full_rows(length, budget)
                while members:
                    many = len(members) * 2 > rows
                    taken = members[: rows if many else 1]
                    members = members[len(taken) :]
                    yield taken, rows if many else 1, length, prefix

    def places(self, rows: int, length: int) -> int:
        """How many places a batch has; 0 where that is not known."""
        known = dict(zip(self.lengths, self.places_of, strict=True))
        return rows * known.get(length, max(self.places_of) if length == self.without else 0)

    def _begins(self, example: Example, beginning: NDArray[np.int32]) -> bool:
        size = len(beginning)
        return 0 < size < len(example.tokens) - 1 and bool((example.tokens[:size] == beginning).all())

    def _length(self, size: int) -> int:
        return next((length for length in self.lengths if length >= size), round_up(size, _STEP))


def full_rows(length: int, budget: int) -> int:
    """Rows of a batch that is full: a power of two."""
    most = max(1, min(budget, _FILLED_ROWS) // length)
    return 1 << (most.bit_length() - 1)


def fit(lengths: NDArray[np.integer], places: NDArray[np.integer], prefix: Sequence[int] = ()) -> Shapes:
    """The shapes for examples with so many positions and places: those lengths that leave the least padding."""
    rows = lengths - len(prefix)
    count = MOST_TRACES // 2 - (len(prefix) > 0)
    sizes, which = np.unique(np.maximum(_STEP, -(-rows // _STEP) * _STEP), return_inverse=True)
    chosen = best_sizes(sizes, np.bincount(which), count)
    owner = np.searchsorted(chosen, rows)
    most = [int(places[owner == number].max(initial=1)) for number in range(len(chosen))]
    without = round_up(int(lengths.max()), _STEP) if len(prefix) else 0
    return Shapes(tuple(chosen.tolist()), tuple(round_up(each, _STEP) for each in most), tuple(prefix), without)


def best_sizes(sizes: NDArray[np.integer], counts: NDArray[np.integer], most: int) -> NDArray[np.int64]:
    """At most so many of the sizes, the largest among them, that pad least when each item takes the next larger one.

    >>> best_sizes(np.array([8, 16, 24, 80, 96]), np.array([5, 5, 1, 1, 9]), most=2).tolist()
    [16, 96]
    """
    if len(sizes) > 512:  # long documents: the search below is quadratic
        keep = np.unique(np.linspace(0, len(sizes) - 1, 512).astype(int))
        counts = np.bincount(np.searchsorted(keep, np.arange(len(sizes))), counts)
        sizes = sizes[keep]
    items = np.concatenate([[0], np.cumsum(counts)])
    cost = np.full((most + 1, len(sizes) + 1), np.inf)
    came_from = np.zeros((most + 1, len(sizes) + 1), int)
    cost[0, 0] = 0
    for used in range(1, most + 1):
        for end in range(1, len(sizes) + 1):
            ways = cost[used - 1, :end] + (items[end] - items[:end]) * sizes[end - 1]
            came_from[used, end] = int(np.argmin(ways))
            cost[used, end] = ways[came_from[used, end]]
    used, end = int(np.argmin(cost[:, len(sizes)])), len(sizes)
    chosen = []
    while end:
        chosen.append(int(sizes[end - 1]))
        end, used = int(came_from[used, end]), used - 1
    return np.array(chosen[::-1], np.int64)


def round_up(number: int, step: int) -> int:
    """The next multiple; at least one step."""
    return max(step, -(-number // step) * step)
