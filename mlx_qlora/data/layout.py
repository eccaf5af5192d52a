"""An update's examples -> batches. The layout changes speed and memory and never the gradient.

`packed`: one row without padding, in which the examples stand as a tree, so that what they have in common from the
start is there once. Shapes differ from batch to batch, which costs nothing where steps are not compiled.
`padded`: rows of like length, padded to one of a few sizes, behind a prefix that they share; a dozen shapes in all.
`plain`: rows of like length, padded, nothing shared: what the other two are checked against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.order import Order, groups
from mlx_qlora.data.prepare import ExampleSet
from mlx_qlora.data.shapes import Shapes, round_up
from mlx_qlora.data.tree import Tree, common, sorted_by_tokens
from mlx_qlora.errors import require
from mlx_qlora.records import START, Batch, Bookmark, Example, Update

# Plain rows and numbers of places are rounded up to these.
_LENGTH_STEP = 8
_PLACES_STEP = 16


@dataclass(frozen=True)
class BatchConfig:
    """How many examples make an update."""

    batch_size: int = 4
    """Examples that go through the model at once, as far as the layout lets them."""
    gradient_accumulation: int = 1
    """Batches that make one update. --grad-accum is the same."""
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


@dataclass(frozen=True)
class LayoutConfig:
    """How examples lie in memory; speed and memory follow from it, the gradient does not."""

    layout: Literal["auto", "packed", "padded", "plain"] = "auto"
    """Trees without padding, rows of a few lengths behind a common prefix, or padded rows; auto: what is fastest here."""
    token_budget: int | None = None
    """Most positions that are computed at once; without a number: what memory allows."""

    def __post_init__(self) -> None:
        budget = self.token_budget
        require((budget is None or budget >= 1, "token_budget", budget, "a whole number from 1"))


class Kind(Enum):
    PACKED = "packed"
    PADDED = "padded"
    PLAIN = "plain"


@dataclass(frozen=True)
class Layout:
    """How examples become batches: the kind, and the most positions (but at least one example) in a batch."""

    kind: Kind = Kind.PLAIN
    token_budget: int = 4096
    rows: int = 1024  # at most, in a batch
    step: int = _LENGTH_STEP  # plain rows are padded to a multiple of this
    shapes: Shapes = field(default_factory=Shapes)  # for `padded`


def lay_out(examples: Sequence[Example], layout: Layout) -> tuple[Batch, ...]:
    """Batches of all examples, each example in one of them."""
    if not examples:
        return ()
    if layout.kind is Kind.PACKED:
        return tuple(packed(part) for part in _parts(sorted_by_tokens(examples), layout))
    if layout.kind is Kind.PADDED:
        return tuple(
            padded(part, length, prefix, layout.shapes.places(rows, length), rows)
            for part, rows, length, prefix in layout.shapes.groups(examples, layout.token_budget)
        )
    ordered = sorted(examples, key=lambda example: -len(example.tokens))
    return tuple(
        padded(part, round_up(max(len(each.tokens) for each in part) - 1, layout.step))
        for part in _plain_parts(ordered, layout)
    )


def smaller(layout: Layout, halvings: int) -> Layout:
    """The layout with batches of half as many positions, so many times over."""
    return replace(layout, token_budget=max(1, layout.token_budget >> halvings))


def packed(examples: Sequence[Example]) -> Batch:
    """One row: the tree of the examples, which are sorted by their tokens."""
    tree = Tree(examples)
    places = [tree.paths[number][_places(example)] for number, example in enumerate(examples)]
    tokens = np.zeros(tree.size, np.int32)
    marks = np.zeros(tree.size, np.uint64)
    for example, path in zip(examples, tree.paths, strict=True):
        tokens[path] = example.tokens[:-1]
        marks[path] = histories(example.tokens[:-1])
    return _batch(tokens[None], np.empty(0, np.int32), places, examples, marks, 0)._replace(segments=tree.segments)


def padded(examples: Sequence[Example], length: int = 0, prefix: int = 0, filled: int = 0, rows_to: int = 0) -> Batch:
    """Rows behind the first `prefix` tokens, which all examples have in common; of `length`, if that is not 0.

    The last token of an example is only a target, so rows are one shorter than their examples. Rows beyond the
    examples, up to `rows_to`, are padding.
    """
    length = length or round_up(max(len(example.tokens) for example in examples) - 1 - prefix, _LENGTH_STEP)
    rows = np.zeros((max(len(examples), rows_to), length), np.int32)
    marks = np.zeros(rows.size + prefix, np.uint64)
    places = []
    for number, example in enumerate(examples):
        own = example.tokens[prefix:-1]
        rows[number, : len(own)] = own
        history = histories(example.tokens[:-1])
        begin = number * length
        marks[begin : begin + len(own)] = history[prefix:]
        marks[rows.size :] = history[:prefix]
        at = _places(example)
        places.append(np.where(at < prefix, rows.size + at, begin + at - prefix))
    return _batch(rows, examples[0].tokens[:prefix], places, examples, marks, filled)


def _places(example: Example) -> NDArray[np.int64]:
    """Where an example's targets are predicted: one before they stand."""
    return np.flatnonzero(example.weights[1:])


def _batch(
    rows: NDArray[np.int32],
    shared: NDArray[np.int32],
    places: Sequence[NDArray[np.int64]],
    examples: Sequence[Example],
    marks: NDArray[np.uint64],
    filled: int,
) -> Batch:
    """The same target at the same position, which two examples have in common, is one place with both weights."""
    positions = np.concatenate(places)
    targets = np.concatenate([example.wanted[1:][_places(example)] for example in examples])
    weights = np.concatenate([example.weights[1:][_places(example)] for example in examples])
    keys, which = np.unique(positions.astype(np.int64) << 32 | targets, return_inverse=True)
    filled = filled if filled >= max(1, len(keys)) else round_up(len(keys), _PLACES_STEP)
    return Batch(
        rows=mx.array(rows),
        shared=mx.array(shared.astype(np.int32)),
        positions=_filled(keys >> 32, filled, np.int32),
        targets=_filled(keys & 0xFFFFFFFF, filled, np.int32),
        weights=_filled(np.bincount(which, weights, len(keys)), filled, np.float32),
        marks=mx.array(marks),
    )


def _filled(values: NDArray[Any], length: int, dtype: type) -> mx.array:
    whole: NDArray[Any] = np.zeros(length, dtype)
    whole[: len(values)] = values
    return mx.array(whole)


def supervised_marks(example: Example) -> NDArray[np.uint64]:
    """What names an example's supervised places in every layout."""
    return histories(example.tokens[:-1])[_places(example)]


def histories(tokens: NDArray[np.int32]) -> NDArray[np.uint64]:
    """A 64-bit hash of tokens[: i + 1] for each i, so equal for beginnings in common."""
    state = (np.arange(1, len(tokens) + 1, dtype=np.uint64) << np.uint64(32)) + tokens.astype(np.uint64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    sums = np.cumsum(state ^ (state >> np.uint64(31)), dtype=np.uint64)
    return (sums ^ (sums >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)  # type: ignore[no-any-return]


def _parts(ordered: Sequence[Example], layout: Layout) -> Iterator[Sequence[Example]]:
    """Runs of neighbours with about equally many positions, within the budget."""
    fresh = [len(ordered[0].tokens) - 1]
    fresh += [len(b.tokens) - 1 - common(a, b) for a, b in pairwise(ordered)]
    even = sum(fresh) / max(1, -(-sum(fresh) // layout.token_budget))
    start, size = 0, 0
    for number, example in enumerate(ordered):
        whole = len(example.tokens) - 1
        full = size >= even or size + fresh[number] > layout.token_budget or number - start == layout.rows
        if number > start and full:
            yield ordered[start:number]
            start, size = number, 0
        size += fresh[number] if number > start else whole
    yield ordered[start:]


def _plain_parts(ordered: Sequence[Example], layout: Layout) -> Iterator[Sequence[Example]]:
    start = 0
    while start < len(ordered):
        length = round_up(len(ordered[start].tokens) - 1, layout.step)
        rows = min(layout.rows, max(1, layout.token_budget // length))
        yield ordered[start : start + rows]
        start += rows


def updates(
    examples: ExampleSet, order: Order, config: BatchConfig, layout: Layout, epochs: int, start: Bookmark = START
) -> Iterator[Update]:
    """The updates of a run in order, from a bookmark on."""
    least = config.min_supervised_per_update
    supervised = examples.supervised if least else np.empty(0, np.int64)
    for numbers, following in groups(order, config.examples_per_update, epochs, supervised, least, start):
        chosen = [examples[number] for number in numbers.tolist()]
        yield _update(chosen, layout, following.epoch + following.place / order.length, following)


def streamed_updates(examples: Iterator[tuple[Example, Bookmark]], config: BatchConfig, layout: Layout) -> Iterator[Update]:
    """The updates of a stream, for ever; the epoch is how often all of it was read."""
    while True:
        chosen: list[Example] = []
        supervised = 0
        while len(chosen) < config.examples_per_update or supervised < config.min_supervised_per_update:
            example, following = next(examples)
            chosen.append(example)
            supervised += int(np.count_nonzero(example.weights))
        yield _update(chosen, layout, float(following.epoch), following)


def _update(chosen: Sequence[Example], layout: Layout, epoch: float, following: Bookmark) -> Update:
    return Update(
        batches=lay_out(chosen, layout),
        epoch=epoch,
        examples=tuple(chosen),
        tokens=sum(len(example.tokens) for example in chosen),
        supervised_tokens=sum(int(np.count_nonzero(example.weights)) for example in chosen),
        next=following,
    )
