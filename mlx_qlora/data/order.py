"""In which order an epoch takes its examples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation, the same on every machine for a seed and an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()  # type: ignore[no-any-return]


def update_groups(count: int, per_update: int, epochs: int, seed: int) -> Iterator[tuple[float, list[int]]]:
    """(how far the run is after it, indices of its examples) for each update: each example once an epoch.

    The last update of an epoch has what remains.
    """
    for epoch in range(epochs):
        order = epoch_order(count, seed, epoch)
        for start in range(0, count, per_update):
            group = order[start : start + per_update]
            yield epoch + (start + len(group)) / count, group


def updates_per_epoch(count: int, per_update: int) -> int:
    return -(-count // per_update)
