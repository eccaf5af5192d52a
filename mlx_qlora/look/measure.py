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
    total = weight = 0.0
    marks: list[NDArray[np.uint64]] = []
    targets: list[NDArray[np.int32]] = []
    losses: list[NDArray[np.float32]] = []
    for batch, loss in _losses(model, objective, batches):
        total += cast(float, loss.total.item())
        weight += cast(float, loss.weight.item())
        if loss.places:
            used = np.array(batch.weights) > 0
            marks.append(np.array(batch.marks[batch.positions])[used])
            targets.append(np.array(batch.targets)[used])
            losses.append(np.array((loss.places[0] / batch.weights).astype(mx.float32))[used])
    mean = total / weight if weight else math.nan
    if not losses:
        return Measured(mean, math.nan, np.empty(0), np.empty(0))
    totals, weights = _of_each(examples, np.concatenate(marks), np.concatenate(targets), np.concatenate(losses))
    return Measured(mean, standard_error(totals, weights), totals, weights)


def _losses(model: nn.Module, objective: Objective, batches: Iterable[Batch]) -> Iterator[tuple[Batch, LossSum]]:
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            yield batch, objective(model, batch)
    finally:
        model.train(was_training)


def _of_each(
    examples: Sequence[Example], marks: NDArray[np.uint64], targets: NDArray[np.int32], losses: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(loss, weight) of each example. What was read before a target names its place in every layout, and a place that
    several examples share belongs to each of them."""
    known, first = np.unique(_places(marks, targets), return_index=True)
    losses = losses[first]
    totals, weights = np.zeros(len(examples)), np.zeros(len(examples))
    for number, example in enumerate(examples):
        at = np.flatnonzero(example.weights[1:])
        own = _places(histories(example.tokens[:-1])[at], example.tokens[1:][at])
        each = example.weights[1:][at].astype(np.float64)
        totals[number] = each @ losses[np.searchsorted(known, own)]
        weights[number] = each.sum()
    return totals, weights


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
