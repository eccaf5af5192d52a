"""The loss of a model on examples, without dropout, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.layout import histories
from mlx_qlora.data.prepare import TASK_ENDS, row_of
from mlx_qlora.records import Batch, Example, LossSum

Objective = Callable[[nn.Module, Batch], LossSum]


@dataclass(frozen=True)
class Measured:
    """A loss over examples, weighted by tokens like in training.

    `error` is its standard error, if other examples of the same kind had been drawn: tokens of one example are not
    independent of each other, so examples are what is counted.
    """

    mean: float
    error: float
    totals: NDArray[np.float64]  # the loss of each example, summed; empty where the objective does not tell places apart
    weights: NDArray[np.float64]  # the weight of each example


def mean_loss(model: nn.Module, objective: Objective, batches: Iterable[Batch]) -> float:
    """The objective over all batches, weighted by tokens like in training, without dropout."""
    total = weight = 0.0
    for _, loss in _losses(model, objective, batches):
        total += cast(float, loss.total.item())
        weight += cast(float, loss.weight.item())
    return total / weight if weight else math.nan


def measure(model: nn.Module, objective: Objective, batches: Iterable[Batch], examples: Sequence[Example]) -> Measured:
    """The same of batches that hold these examples, in whatever layout, with its error."""
    total, weight, places = look_at(model, objective, batches)
    mean = total / weight if weight else math.nan
    if not places.values.shape[1]:
        return Measured(mean, math.nan, np.empty(0), np.empty(0))
    sums, weights = places.of(examples)
    return Measured(mean, standard_error(*_by_row(examples, sums[:, 0], weights)), sums[:, 0], weights)


def _by_row(
    examples: Sequence[Example], totals: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sums of rows: the two tasks of a chain of thought are drawn together."""
    if not any(each.id.endswith(TASK_ENDS) for each in examples):
        return totals, weights
    rows = [row_of(each.id) if each.id.endswith(TASK_ENDS) else each.id for each in examples]
    names, of_row = np.unique(rows, return_inverse=True)
    sums = np.zeros((len(names), 2))
    np.add.at(sums, of_row, np.stack([totals, weights], axis=1))
    return sums[:, 0], sums[:, 1]


def as_ratio(totals: NDArray[np.float64], weights: NDArray[np.float64]) -> Measured:
    """Sums over examples as what they come to in all, with its error."""
    return Measured(float(totals.sum() / weights.sum()), standard_error(totals, weights), totals, weights)


@dataclass(frozen=True)
class Places:
    """What a model made of the targets of some batches. What was read before a target names its place in every layout."""

    known: NDArray[np.uint64]  # [N], in order
    values: NDArray[np.float32]  # [N, K]: the loss, and what else the objective says; K is 0 where it tells no places apart

    def of(self, examples: Sequence[Example]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """([examples, K], [examples]): the values summed with the weights of each example, and its weight. A place that
        several examples share belongs to each of them. Of an example that was computed, any targets may be asked for."""
        sums, weights = np.zeros((len(examples), self.values.shape[1])), np.zeros(len(examples))
        for number, example in enumerate(examples):
            at = np.flatnonzero(example.weights[1:])
            own = _places(histories(example.tokens[:-1])[at], example.wanted[1:][at])
            each = example.weights[1:][at].astype(np.float64)
            sums[number] = each @ self.values[np.searchsorted(self.known, own)]
            weights[number] = each.sum()
        return sums, weights


def look_at(model: nn.Module, objective: Objective, batches: Iterable[Batch]) -> tuple[float, float, Places]:
    """(the loss summed, its weight, every place)."""
    total = weight = 0.0
    names: list[NDArray[np.uint64]] = []
    values: list[NDArray[np.float32]] = []
    for batch, loss in _losses(model, objective, batches):
        total += cast(float, loss.total.item())
        weight += cast(float, loss.weight.item())
        if loss.places:
            used = np.array(batch.weights) > 0
            names.append(_places(np.array(batch.marks[batch.positions])[used], np.array(batch.targets)[used]))
            found = mx.stack([(each / batch.weights).astype(mx.float32) for each in loss.places], axis=1)
            values.append(np.array(found)[used])
    if not values:
        return total, weight, Places(np.empty(0, np.uint64), np.empty((0, 0), np.float32))
    known, first = np.unique(np.concatenate(names), return_index=True)
    return total, weight, Places(known, np.concatenate(values)[first])


def _losses(model: nn.Module, objective: Objective, batches: Iterable[Batch]) -> Iterator[tuple[Batch, LossSum]]:
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            yield batch, objective(model, batch)
    finally:
        model.train(was_training)


def _places(marks: NDArray[np.uint64], targets: NDArray[np.int32]) -> NDArray[np.uint64]:
    """A number for each place. A hash is as unlikely to be met by another one after this as before; pairs of hash and target
    took five times as long: 12 s of a million places, and 2 s so."""
    found: NDArray[np.uint64] = marks ^ targets.astype(np.uint64)
    return found


def standard_error(totals: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Of sum(totals) / sum(weights), the examples being drawn at random: a ratio's, linearised.

    >>> import numpy as np
    >>> ones = np.ones(4)  # then it is the one of a mean: standard deviation over the root of the number
    >>> round(standard_error(np.array([1.0, 2.0, 3.0, 4.0]), ones), 4), round(np.std([1, 2, 3, 4], ddof=1) / 2, 4)
    (0.6455, np.float64(0.6455))
    """
    number = len(totals)
    if number < 2 or not weights.sum():
        return math.nan
    off = totals - weights * (totals.sum() / weights.sum())
    return float(math.sqrt(number / (number - 1) * (off @ off)) / weights.sum())
