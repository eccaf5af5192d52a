"""In which order an epoch takes its examples, and where it stands.

The order is computed place by place from a keyed bijection (a Feistel network over 64-bit integers), so it needs no
memory however many examples there are, is the same on every machine, and any place in it can be asked for at once:
a bookmark is an epoch and a place.

>>> order = Order((5,), seed=0)
>>> sorted(order.at(0, np.arange(5)).tolist())
[0, 1, 2, 3, 4]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.records import START, Bookmark

_ROUNDS = 6
_BLOCK = 4096  # places that are computed at once
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of several sources that lie one after another, `sizes` examples each.

    Without weights an epoch has each example exactly once. With weights it is as long, and each source has its share
    of it, rounded; a source that is larger than its share goes on in the next epoch where it stopped, a smaller one
    begins again, in another order each time.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] = ()
    seed: int = 0

    @property
    def length(self) -> int:
        """Examples in an epoch."""
        return sum(self.sizes)

    @property
    def quotas(self) -> tuple[int, ...]:
        """Examples of each source in an epoch."""
        if not self.weights:
            return self.sizes
        edges = np.round(np.cumsum(self.weights) / sum(self.weights) * self.length).astype(int)
        return tuple(np.diff(edges, prepend=0).tolist())

    def at(self, epoch: int, places: Indices) -> Indices:
        """The examples at places of an epoch."""
        slots = shuffled(places, self.length, (self.seed, epoch))
        if not self.weights:
            return slots
        edges = np.cumsum((0, *self.quotas))
        starts = np.cumsum((0, *self.sizes))
        chosen = np.empty_like(slots)
        for source, size in enumerate(self.sizes):
            mine = (slots >= edges[source]) & (slots < edges[source + 1])
            if not mine.any():
                continue
            drawn = slots[mine] - edges[source] + epoch * self.quotas[source]  # since the run began
            passes = drawn // size
            within = drawn % size
            for number in np.unique(passes).tolist():
                own = passes == number
                within[own] = shuffled(within[own], size, (self.seed, number, source, 1))
            chosen[mine] = starts[source] + within
        return chosen


def shuffled(places: Indices, count: int, key: Sequence[int]) -> Indices:
    """What stands at places of a permutation of range(count) that the key chooses."""
    half = np.uint64(max(4, (max(count - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = _round_keys(key)

    def once(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> half, values & low
        for each in keys:
            left, right = right, left ^ (_mixed(right ^ each) & low)
        joined: NDArray[np.uint64] = (left << half) | right
        return joined

    values = once(np.asarray(places).astype(np.uint64))
    while (outside := values >= np.uint64(count)).any():  # the bijection's range is a little larger: walk on
        values[outside] = once(values[outside])
    indices: Indices = values.astype(np.int64)
    return indices


def _round_keys(key: Sequence[int]) -> NDArray[np.uint64]:
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mixed(state ^ np.uint64(part % 2**64))
    return np.concatenate([_mixed(state + np.uint64(number + 1)) for number in range(_ROUNDS)])


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def groups(
    order: Order, per_update: int, epochs: int, supervised: NDArray[np.integer], minimum: int = 0, start: Bookmark = START
) -> Iterator[tuple[Indices, Bookmark]]:
    """(the examples of an update, where the next one begins), from a bookmark to the end of the last epoch.

    The last update of an epoch has what remains. An update with fewer than `minimum` supervised tokens takes further
    examples in, so no example is ever lost; what remains too small at the end of an epoch goes to the update before.
    """
    for epoch in range(start.epoch, epochs):
        held: Indices | None = None
        place = start.place if epoch == start.epoch else 0  # after `held`
        for group in _epoch_groups(order, epoch, place, per_update, supervised, minimum):
            if held is not None:
                if minimum and place + len(group) == order.length and int(supervised[group].sum()) < minimum:
                    held = np.concatenate([held, group])
                    break
                yield held, Bookmark(epoch, place)
            held, place = group, place + len(group)
        if held is not None:
            yield held, Bookmark(epoch + 1, 0)


def _epoch_groups(
    order: Order, epoch: int, place: int, per_update: int, supervised: NDArray[np.integer], minimum: int
) -> Iterator[Indices]:
    waiting = np.empty(0, np.int64)
    while True:
        enough = per_update
        if minimum and len(waiting) >= per_update and int(supervised[waiting[:per_update]].sum()) < minimum:
            enough = int(np.searchsorted(np.cumsum(supervised[waiting]), minimum)) + 1  # one too many where there are too few
        if len(waiting) < enough and place < order.length:
            more = order.at(epoch, np.arange(place, min(place + max(_BLOCK, per_update), order.length)))
            waiting, place = np.concatenate([waiting, more]), place + len(more)
            continue
        if not len(waiting):
            return
        size = min(max(per_update, enough), len(waiting))
        yield waiting[:size]
        waiting = waiting[size:]


def updates_in(order: Order, per_update: int, epochs: int, supervised: NDArray[np.integer], minimum: int = 0) -> int:
    """How many updates some epochs have."""
    if not minimum:
        return epochs * -(-order.length // per_update)
    return sum(1 for _ in groups(order, per_update, epochs, supervised, minimum))
