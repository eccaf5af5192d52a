"""Examples -> batches: rows of like length together, padded on the right, supervised places as flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.order import Order, groups
from mlx_qlora.data.prepare import ExampleSet
from mlx_qlora.errors import require
from mlx_qlora.records import START, Batch, Bookmark, Example, Update

# Lengths and numbers of places are rounded up to these, so that few different shapes occur.
_LENGTH_STEP = 8
_PLACES_STEP = 16


@dataclass(frozen=True)
class BatchConfig:
    """How many examples make an update."""

    batch_size: int = 4
    """Examples that go through the model at once."""
    gradient_accumulation: int = 1
    """Batches that make one update."""
    min_supervised_per_update: int = 0
    """An update with fewer trained tokens takes further examples in until it has them."""

    def __post_init__(self) -> None:
        require(
            (self.batch_size >= 1, "batch_size", self.batch_size, "a whole number from 1"),
            (self.gradient_accumulation >= 1, "gradient_accumulation", self.gradient_accumulation, "a whole number from 1"),
            (
                self.min_supervised_per_update >= 0,
                "min_supervised_per_update",
                self.min_supervised_per_update,
                "a whole number from 0",
            ),
        )

    @property
    def examples_per_update(self) -> int:
        return self.batch_size * self.gradient_accumulation


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


def updates(examples: ExampleSet, order: Order, config: BatchConfig, epochs: int, start: Bookmark = START) -> Iterator[Update]:
    """The updates of a run in order, from a bookmark on."""
    least = config.min_supervised_per_update
    supervised = examples.supervised if least else np.empty(0, np.int64)
    for numbers, following in groups(order, config.examples_per_update, epochs, supervised, least, start):
        chosen = [examples[number] for number in numbers.tolist()]
        yield _update(chosen, config, following.epoch + following.place / order.length, following)


def streamed_updates(examples: Iterator[tuple[Example, Bookmark]], config: BatchConfig) -> Iterator[Update]:
    """The updates of a stream, for ever; the epoch is how often all of it was read."""
    while True:
        chosen: list[Example] = []
        supervised = 0
        while len(chosen) < config.examples_per_update or supervised < config.min_supervised_per_update:
            example, following = next(examples)
            chosen.append(example)
            supervised += int(np.count_nonzero(example.weights))
        yield _update(chosen, config, float(following.epoch), following)


def _update(chosen: Sequence[Example], config: BatchConfig, epoch: float, following: Bookmark) -> Update:
    batches = lay_out(chosen, config.batch_size)
    return Update(
        batches=batches,
        epoch=epoch,
        ids=tuple(example.id for example in chosen),
        tokens=sum(len(example.tokens) for example in chosen),
        supervised_tokens=sum(int(np.count_nonzero(example.weights)) for example in chosen),
        positions=sum(batch.rows.size for batch in batches),
        next=following,
    )


def _round_up(number: int, step: int) -> int:
    return max(step, -(-number // step) * step)


def _padded(parts: Sequence[NDArray[Any]], length: int, dtype: type) -> mx.array:
    whole: NDArray[Any] = np.zeros(length, dtype)
    flat = np.concatenate(parts)
    whole[: len(flat)] = flat
    return mx.array(whole)
