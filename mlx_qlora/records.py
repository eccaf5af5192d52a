"""The shapes that travel between the rooms: frozen, without behaviour beyond what a shape needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Example:
    """What is trained, whatever it was made of.

    `weights[i]` is the weight with which token i, *as a target*, counts in the loss: 0 for a prompt, 1 for an
    answer. Token 0 is nobody's target, so its weight is 0. Where `targets` is there, targets[i] is what has to be
    predicted in place of token i: at the end of a rationale the end of the text, though the answer's cue follows.
    """

    id: str
    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    targets: NDArray[np.int32] | None = None

    @property
    def wanted(self) -> NDArray[np.int32]:
        """What has to be predicted at each place: the token there, or what stands in its place."""
        return self.tokens if self.targets is None else self.targets


class Segment(NamedTuple):
    """A piece [start, end) of a packed row. What it attends to besides itself are its ancestors, from `parent` up."""

    start: int
    end: int
    parent: int  # its number among the batch's segments; -1: none


def depth(segments: Sequence[Segment], number: int) -> int:
    """How many tokens a piece sees at its end: its ancestors' and its own."""
    total = 0
    while number >= 0:
        total += segments[number].end - segments[number].start
        number = segments[number].parent
    return total


class Batch(NamedTuple):
    """Tokens that go through the model at once, and the places among them that are supervised.

    The positions that are computed are those of `rows`, flattened to [B * L], then those of `shared`, a prefix that
    all rows have. The hidden state at a position predicts its target; places that only fill up have weight 0.
    Rows are padded on the right. With `segments`, `rows` is one row without any padding, in which several examples
    stand as a tree: what they have in common from the start stands there once.
    """

    rows: mx.array  # [B, L]
    shared: mx.array  # [P]; P may be 0
    positions: mx.array  # [S]
    targets: mx.array  # [S]
    weights: mx.array  # [S]
    marks: mx.array  # [B * L + P], uint64: a hash of the tokens up to each position, the same in every layout
    segments: tuple[Segment, ...] = ()
    states: mx.array | None = None  # [B * L + P, D]: what goes into the first layer that is adapted, where it is kept
    beside: tuple[mx.array, ...] = ()  # what an objective is told besides: values of schedules, what a teacher says

    @property
    def computed(self) -> int:
        """Positions that go through the model."""
        return self.rows.size + self.shared.size


@dataclass(frozen=True)
class Bookmark:
    """Where the data of a run goes on. For a stream, `rows` were read for good and `place` counts from there."""

    epoch: int = 0
    place: int = 0
    rows: int = 0


START = Bookmark()


@dataclass(frozen=True)
class Update:
    """The batches whose gradients make one update."""

    batches: tuple[Batch, ...]
    epoch: float  # how far the run will be after it
    examples: tuple[Example, ...]  # what the batches were made of
    tokens: int
    supervised_tokens: int
    next: Bookmark  # where the update after it begins
    done: float = 0.0  # the share of the run's updates that will be made after it, where somebody asks for it

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(example.id for example in self.examples)

    @property
    def positions(self) -> int:
        """That go through the model: less than the tokens where examples share them, more with padding."""
        return sum(batch.computed for batch in self.batches)


class LossSum(NamedTuple):
    """A loss that is not divided yet: sums add, and there is one division, by the whole weight."""

    total: mx.array
    weight: mx.array
    metrics: dict[str, mx.array] = {}  # noqa: RUF012  (sums too, divided by the same weight; read, never written)
    hidden: tuple[mx.array, ...] = ()  # what the head was given, where that is known: there when the forward pass is done
    # In evaluation, the loss at each place of the batch, weighted: what `total` sums; then, if asked for, whether its target is
    # the likeliest token, weighted too.
    places: tuple[mx.array, ...] = ()


@dataclass(frozen=True)
class TrainState:
    """Where training stands after an update: with the arrays of model and optimizer, all that it needs to go on."""

    step: int = 0  # updates that were made
    next: Bookmark = START  # where the data goes on
    skipped_updates: int = 0
    elapsed_s: float = 0.0
    halvings: int = 0  # how often the batches were halved because memory had ended


BEGIN = TrainState()


class Delivered(NamedTuple):
    """What was trained, as other programs load it: a file of arrays, and small files beside it in its folder."""

    file: str  # of arrays, in the folder of a run
    arrays: Mapping[str, mx.array]
    beside: Mapping[str, bytes]  # by name


class Window(NamedTuple):
    """What is accumulated of an update that is half done."""

    done: int  # its first batches, which are in the sums
    parts: int  # batches that it has
    gradients: Any  # a tree of sums
    loss: LossSum  # of the batches that are done
    laid: int  # a checksum of all its batches: only in these very ones is what was done a part of the whole


class Halfway(NamedTuple):
    """A fact between the batches of an update, for whoever asked for one: `state` is before the update."""

    state: TrainState
    window: Window


@dataclass(frozen=True)
class StepReport:
    """What an update was. Counts and times; the units are in the names."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    positions: int
    tokens_per_second: float
    peak_memory_gb: float
    elapsed_s: float
    skipped_updates: int  # so far in this run
    finite: bool  # whether it was applied; else nothing was changed
    state: TrainState = field(repr=False)
    update: Update = field(repr=False)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalReport:
    """Losses of the same function, without dropout, on validation data and on a fixed sample of the training data."""

    step: int
    val_loss: float
    train_eval_loss: float
    best: bool  # the lowest val_loss so far
    stale: int  # validations since the last one that improved
    val_loss_se: float = math.nan  # standard errors, examples being what was drawn at random
    train_eval_loss_se: float = math.nan

    @property
    def gap(self) -> float:
        return self.val_loss - self.train_eval_loss

    @property
    def perplexity(self) -> float:
        """Of validation data; infinity where a float ends."""
        return math.exp(self.val_loss) if self.val_loss < 700 or math.isnan(self.val_loss) else math.inf

    @property
    def gap_se(self) -> float:
        """Of the difference of two independent means."""
        return math.hypot(self.val_loss_se, self.train_eval_loss_se)
