"""How well a model foresees raw text: windows over documents in which each token is scored once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.layout import Layout, lay_out, smaller
from mlx_qlora.engine.room import Room
from mlx_qlora.errors import require
from mlx_qlora.look.measure import Measured, Places, as_ratio, look_at
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Example

_BATCHES = 16  # as many budgets of positions are laid out at once
FEW = 10  # documents, below which their windows say more about the error


@dataclass(frozen=True)
class Strided:
    """Windows over text. What a window has in common with the one before is context for what is new in it."""

    window: int  # tokens that are read at once
    stride: int  # from the start of a window to that of the next
    cross_documents: bool = False  # whether the tokens of the document before are context, too

    def __post_init__(self) -> None:
        window, stride = self.window, self.stride
        require(
            (window >= 1, "window", window, "a whole number from 1"),
            (1 <= stride <= window, "stride", stride, f"a whole number from 1 to the window of {window:,}"),
        )


@dataclass(frozen=True)
class Document:
    """A text to be scored. Its tokens may be more than any window."""

    example: Example
    size: int | None = None  # UTF-8 bytes of the text that its targets are; None: not known, or not all of it is scored
    ended: bool = False  # its last token is the end of the text, which stands for no bytes


class Piece(NamedTuple):
    """What a window scores of a document."""

    document: int
    example: Example  # what is read up to there; of its targets, those that are scored have weights
    text: NDArray[np.int32]  # the tokens that are scored
    last: bool  # whether the document ends with them


@dataclass(frozen=True)
class OfText:
    """What a model makes of texts, the shares of a text's `units` in it."""

    loss: Measured  # nats a token; its exponential is the perplexity
    accuracy: Measured  # the share of tokens that were the likeliest
    bits_per_byte: Measured | None  # of the texts' letters: their ends, which have no bytes, are not in it


def spans(tokens: int, how: Strided) -> Iterator[tuple[int, int, int]]:
    """(first token that is read, first that is scored, end) of each window. The last one is moved back to end with the text.

    >>> list(spans(12, Strided(window=6, stride=3)))  # 11 targets: 6, 3, and the 2 that are left
    [(0, 1, 7), (3, 7, 10), (5, 10, 12)]
    """
    start, scored = 0, 1
    while scored < tokens:
        end = min(start + how.window + 1, tokens)
        yield max(0, end - how.window - 1), scored, end
        start, scored = start + how.stride, end


def windows(documents: Sequence[Document], how: Strided) -> list[tuple[Example, tuple[Piece, ...]]]:
    """What is read at once, and what is scored of it: each target of each document in one window. These are the windows of
    training where an overlap counts once; here it is also told whose each target is."""
    numbers = range(len(documents))
    groups = [list(numbers)] if how.cross_documents else [[number] for number in numbers]
    return [window for group in groups for window in _of_stream(documents, group, how)]


def _of_stream(
    documents: Sequence[Document], group: Sequence[int], how: Strided
) -> Iterator[tuple[Example, tuple[Piece, ...]]]:
    examples = [documents[number].example for number in group]
    tokens = np.concatenate([each.tokens for each in examples])
    weights = np.concatenate([each.weights for each in examples])
    begins = list(accumulate((len(each.tokens) for each in examples), initial=0))
    for start, first, end in spans(len(tokens), how):
        pieces = []
        for place in range(np.searchsorted(begins, first, "right") - 1, np.searchsorted(begins, end, "left")):
            own = max(first, begins[place]), min(end, begins[place + 1])
            scored = _scored(tokens, weights, start, *own)
            if scored.any():
                name = f"{examples[place].id}@{own[0] - begins[place]}"
                example = Example(name, tokens[start : own[1]], scored)
                pieces.append(Piece(group[place], example, tokens[slice(*own)], own[1] == begins[place + 1]))
        if pieces:
            yield Example(pieces[0].example.id, tokens[start:end], _scored(tokens, weights, start, first, end)), tuple(pieces)


def _scored(tokens: NDArray[np.int32], weights: NDArray[np.float32], start: int, first: int, end: int) -> NDArray[np.float32]:
    """The weights of what is read from `start` to `end`, of which the targets from `first` on count."""
    own = np.zeros(end - start, np.float32)
    own[first - start :] = weights[first:end]
    return own


class Text:
    """Documents in windows, and what errors go by: documents, or where these are few, what each window scores of them."""

    def __init__(self, documents: Sequence[Document], how: Strided, size_of: Callable[[Sequence[int]], int]):
        self.documents, self.how = documents, how
        self.windows = windows(documents, how)
        self.pieces = [piece for _, pieces in self.windows for piece in pieces]
        self.by_document = len(documents) >= FEW
        self.tokens = sum(int(np.count_nonzero(piece.example.weights)) for piece in self.pieces)
        sizes = [each.size for each in documents]
        self.size = sum(each or 0 for each in sizes) if None not in sizes else None  # bytes of all that is scored
        self._unit = np.array([piece.document for piece in self.pieces]) if self.by_document else np.arange(len(self.pieces))
        self._sizes = self._sizes_of_units(size_of) if self.size else None

    @property
    def examples(self) -> list[Example]:
        """What goes through the model."""
        return [example for example, _ in self.windows]

    @property
    def describe(self) -> str:
        how, count = self.how, len(self.windows)
        read = f"{count:,} window{'' if count == 1 else 's'} of {how.window:,}, stride {how.stride:,}"
        return f"{self.tokens:,} tokens, each scored once, in {read}{', crossing documents' if how.cross_documents else ''}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self.how) | {
            "documents": len(self.documents),
            "windows": len(self.windows),
            "tokens": self.tokens,
            "bytes": self.size,
            "intervals_by": "document" if self.by_document else "window",
        }

    @property
    def units(self) -> list[Example]:
        return [each.example for each in (self.documents if self.by_document else self.pieces)]

    def _sizes_of_units(self, size_of: Callable[[Sequence[int]], int]) -> NDArray[np.float64]:
        """Bytes. Of a part of a document they are told from its tokens, and made to sum to the document's."""
        if self.by_document:
            return np.array([each.size for each in self.documents], np.float64)
        found = np.array([size_of(piece.text.tolist()) for piece in self.pieces], np.float64)
        whole = np.bincount([piece.document for piece in self.pieces], found)
        return np.array([
            size * (self.documents[piece.document].size or 0) / (whole[piece.document] or 1)
            for size, piece in zip(found, self.pieces, strict=True)
        ])  # fmt: skip

    def score(self, model: nn.Module, layout: Layout, room: Room, done: Callable[[int], None] = lambda windows: None) -> OfText:
        """The model's loss and accuracy on every target, by the objective that it is trained with, without smoothing."""
        objective = sft(accuracy=True)
        sums, bare = np.empty((len(self.pieces), 3)), np.empty(len(self.pieces))
        at = 0
        for group in self._groups(layout.token_budget):
            examples = [example for example, _ in group]

            def places(halvings: int, examples: Sequence[Example] = examples) -> Places:
                return look_at(model, objective, lay_out(examples, smaller(layout, halvings)))[2]

            found = room.within(places)
            pieces = [piece for _, own in group for piece in own]
            values, weights = found.of([piece.example for piece in pieces])
            here = slice(at, at + len(pieces))
            sums[here] = np.column_stack([values, weights])
            bare[here] = found.of([self._without_end(piece) for piece in pieces])[0][:, 0] if self._sizes is not None else 0
            at += len(pieces)
            done(len(group))
        loss, correct, weight, text = (self._of_units(each) for each in (*sums.T, bare))
        return OfText(
            as_ratio(loss, weight),
            as_ratio(correct, weight),
            as_ratio(text / math.log(2), self._sizes) if self._sizes is not None else None,
        )

    def _of_units(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(self._unit, values, len(self.units)).astype(np.float64)

    def _groups(self, budget: int) -> Iterator[list[tuple[Example, tuple[Piece, ...]]]]:
        """Windows that are laid out together, so that not all batches exist at once."""
        group, size = [], 0
        for window in self.windows:
            group.append(window)
            size += len(window[0].tokens)
            if size >= _BATCHES * budget:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _without_end(self, piece: Piece) -> Example:
        """Without the loss of the text's end, where it is in there."""
        example = piece.example
        if not (piece.last and self.documents[piece.document].ended):
            return example
        weights = example.weights.copy()
        weights[-1] = 0
        return Example(example.id, example.tokens, weights)
