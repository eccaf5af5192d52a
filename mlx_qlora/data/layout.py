"""Examples -> batches: rows of like length together, padded on the right, supervised places as flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.order import update_groups
from mlx_qlora.data.sources import DataConfig
from mlx_qlora.records import Batch, Example, Update

# Lengths and numbers of places are rounded up to these, so that few different shapes occur.
_LENGTH_STEP = 8
_PLACES_STEP = 16


def lay_out(examples: Sequence[Example], rows: int) -> tuple[Batch, ...]:
    """Batches of at most `rows` examples, the longest first; which share a batch does not change the gradient."""
    ordered = sorted(examples, key=lambda example: -len(example.tokens))
    return tuple(to_batch(ordered[start : start + rows]) for start in range(0, len(ordered), rows))


def to_batch(examples: Sequence[Example]) -> Batch:
    """One batch. The last token of a row is only a target, so rows are one shorter than their examples."""
    length = _round_up(max(len(example.tokens) for example in examples) - 1, _LENGTH_STEP)
    rows = np.zeros((len(examples), length), np.int32)
    positions, targets, weights = [], [], []
    for number, example in enumerate(examples):
        rows[number, : len(example.tokens) - 1] = example.tokens[:-1]
        places = np.flatnonzero(example.weights[1:])
        positions.append(number * length + places)
        targets.append(example.tokens[1:][places])
        weights.append(example.weights[1:][places])
    filled = _round_up(sum(map(len, positions)), _PLACES_STEP)
    return Batch(
        rows=mx.array(rows),
        positions=_padded(positions, filled, np.int32),
        targets=_padded(targets, filled, np.int32),
        weights=_padded(weights, filled, np.float32),
    )


def updates(examples: Sequence[Example], config: DataConfig, epochs: int, seed: int) -> Iterator[Update]:
    """The updates of a run, in order."""
    for epoch, group in update_groups(len(examples), config.examples_per_update, epochs, seed):
        chosen = [examples[index] for index in group]
        yield Update(
            batches=lay_out(chosen, config.batch_size),
            epoch=epoch,
            ids=tuple(example.id for example in chosen),
            tokens=sum(len(example.tokens) for example in chosen),
            supervised_tokens=sum(int(np.count_nonzero(example.weights)) for example in chosen),
        )


def _round_up(number: int, step: int) -> int:
    return max(step, -(-number // step) * step)


def _padded(parts: Sequence[NDArray[Any]], length: int, dtype: type) -> mx.array:
    whole: NDArray[Any] = np.zeros(length, dtype)
    flat = np.concatenate(parts)
    whole[: len(flat)] = flat
    return mx.array(whole)
