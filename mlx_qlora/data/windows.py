"""Windows over the tokens of documents: raw text as examples, without a list of all windows.

The tokens of prepared documents lie one after another in a memory-mapped file; a window is a stretch of them that is
read when its turn comes. Where a window begins follows from its number: at once where windows go on from one document
into the next, by sums that are kept for every thousandth document where each document has windows of its own.

A window of W has W + 1 tokens: W that are read, and W targets, so that windows side by side lose no target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.exposure import windows_of
from mlx_qlora.data.order import shuffled
from mlx_qlora.data.prepare import Chosen, Prepared, split_off
from mlx_qlora.data.sources import DiskFile, Source, is_plain_text
from mlx_qlora.errors import require
from mlx_qlora.records import Example

Overlap = Literal["each", "once"]
Numbers = NDArray[np.int64]
_BLOCK = 1024  # numbers whose sum is kept


@dataclass(frozen=True)
class WindowConfig:
    """How raw text becomes examples."""

    windows: Literal["auto", "on", "off"] = "auto"
    """Train on windows of max_seq_length tokens over all documents; off: each row is an example. auto: windows of .txt files,
    and of everything when a model is made from nothing."""
    stride: int | None = None
    """Tokens from the start of a window to that of the next; without a number a quarter of max_seq_length."""
    overlap: Overlap = "each"
    """Whether a token that several windows have counts in each of them, or once, and is context in the others."""
    cross_documents: bool = True
    """Windows go on from one document into the next; else each document has windows of its own."""

    validation_tokens: int = 65_536
    """Of windows: tokens that a validation looks at, evenly spread over all, and as many of training."""

    def __post_init__(self) -> None:
        stride, looked_at = self.stride, self.validation_tokens
        require(
            (stride is None or stride >= 1, "stride", stride, "a whole number from 1"),
            (looked_at >= 1, "validation_tokens", looked_at, "a whole number from 1"),
        )

    def wanted(self, sources: Sequence[Source], from_nothing: bool) -> bool:
        """Whether these sources are trained as windows."""
        if self.windows == "auto":
            files = [file for source in sources for file in source.files.get("train", ())]
            return from_nothing or all(isinstance(file, DiskFile) and is_plain_text(Path(file.path)) for file in files)
        return self.windows == "on"

    def ruler(self, window: int) -> Ruler:
        """What is laid over the documents of training."""
        stride = max(1, window // 4) if self.stride is None else self.stride
        require((stride <= window, "stride", stride, f"a whole number up to max_seq_length {window} (no token is left out)"))
        return Ruler(window, stride, self.overlap, self.cross_documents, self.validation_tokens)


@dataclass(frozen=True)
class Ruler:
    """How windows lie: their length, from the start of one to the next, and what counts where they overlap."""

    window: int
    stride: int
    overlap: Overlap = "each"
    cross_documents: bool = True
    measured_tokens: int = 65_536  # where losses are measured

    @property
    def side_by_side(self) -> Ruler:
        """What losses are measured on: no token counts twice, in the last window either, which is moved back."""
        return replace(self, stride=self.window, overlap="once")


class Stream:
    """The documents of one source as windows: those between two places, counted in tokens."""

    def __init__(self, documents: Prepared | Chosen, ruler: Ruler, begin: int = 0, end: int | None = None):
        self.ruler, self.source = ruler, documents
        self._lengths = lengths = documents.lengths
        self._tokens = _Sums(len(documents), lambda a, b: lengths[a:b].astype(np.int64))
        self.begin, self.end = begin, self._tokens.total if end is None else end
        self._firsts = documents.firsts  # the piece that each document begins with
        self.documents = len(documents) if self._firsts is None else len(self._firsts)
        self._windows = None if ruler.cross_documents else _Sums(self.documents, self._windows_in)

    @property
    def tokens(self) -> int:
        return max(0, self.end - self.begin)

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss, each once."""
        supervised = self.source.supervised
        whole = _Sums(len(self.source), lambda a, b: supervised[a:b].astype(np.int64)).total
        return round(whole * self.tokens / max(1, self._tokens.total))

    @property
    def readable(self) -> int:
        """Tokens that another one follows, each once."""
        if self.ruler.cross_documents:
            return max(0, self.tokens - 1)
        return _Sums(self.documents, self._targets_in).total

    @property
    def positions(self) -> int:
        """What all windows read together; one of a document that is shorter than a window is as short."""
        if self.ruler.cross_documents:
            return min(self.readable, self.ruler.window) if len(self) == 1 else len(self) * self.ruler.window

        def read(a: int, b: int) -> Numbers:
            shortest: Numbers = np.minimum(self._targets_in(a, b), self.ruler.window)
            return self._windows_in(a, b) * shortest

        return _Sums(self.documents, read).total

    def __len__(self) -> int:
        if self._windows is not None:
            return self._windows.total
        return int(windows_of(self.tokens - 1, self.ruler.window, self.ruler.stride))

    def __getitem__(self, number: int) -> Example:
        begin, first, end = self._stretch(number)
        pieces = list(self._read(begin, end))
        tokens = np.concatenate([tokens for _, tokens, _ in pieces])
        weights = np.concatenate([weights for _, _, weights in pieces])
        weights[: first - begin] = 0  # the first token is nobody's target, and what an earlier window counted is context
        return Example(f"{self.source.id(pieces[0][0])}/{begin}", tokens, weights)

    def texts(self) -> Iterator[Example]:
        """The documents themselves, each as far as it lies between the two places."""
        firsts = np.arange(self.documents) if self._firsts is None else self._firsts
        for document in range(self.documents):
            begins, ends = self._document_edges(document, document + 1)
            if ends[0] - begins[0] < 2:
                continue  # it has no target
            pieces = list(self._read(int(begins[0]), int(ends[0])))
            weights = np.concatenate([weights for _, _, weights in pieces])
            weights[0] = 0
            yield Example(self.source.id(int(firsts[document])), np.concatenate([tokens for _, tokens, _ in pieces]), weights)

    @property
    def in_part(self) -> set[str]:
        """The ids of documents of which a part lies outside."""
        (begins, ends), whole = self._document_edges(0, self.documents), Stream(self.source, self.ruler)
        firsts = np.arange(self.documents) if self._firsts is None else self._firsts
        all_begins, all_ends = whole._document_edges(0, self.documents)
        parted = (ends > begins) & (ends - begins < all_ends - all_begins)
        return {self.source.id(int(firsts[document])) for document in np.flatnonzero(parted)}

    def longest(self) -> int:
        """The number of a window than which none is longer."""
        if self._windows is None or not len(self):
            return 0
        best, least = 0, -1
        for a in range(0, self.documents, _BLOCK):
            begins, ends = self._document_edges(a, min(a + _BLOCK, self.documents))
            longest = int(np.argmax(ends - begins))
            if int((ends - begins)[longest]) > least:
                best, least = a + longest, int((ends - begins)[longest])
        return self._windows.before(best)

    def _stretch(self, number: int) -> tuple[int, int, int]:
        """(where a window begins, the first token that counts, where it ends), in the tokens of the stream."""
        window, stride = self.ruler.window, self.ruler.stride
        begin, end = self.begin, self.end
        if self._windows is not None:
            document, number = self._windows.find(number)
            begins, ends = self._document_edges(document, document + 1)
            begin, end = int(begins[0]), int(ends[0])
        start = begin + number * stride
        start = max(begin, min(start, end - window - 1))  # the last one ends with the stream
        first = start + 1
        if self.ruler.overlap == "once" and number:
            first = max(first, begin + (number - 1) * stride + window + 1)
        return start, first, min(end, start + window + 1)

    def _read(self, begin: int, end: int) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.float32]]]:
        """(piece, tokens, weights) of a stretch."""
        piece, offset = self._tokens.find(begin)
        left = end - begin
        while left > 0:
            tokens, weights = self.source.part(piece, offset, offset + left)
            yield piece, tokens, weights
            left -= len(tokens)
            piece, offset = piece + 1, 0

    def _targets_in(self, a: int, b: int) -> Numbers:
        begins, ends = self._document_edges(a, b)
        targets: Numbers = np.maximum(ends - begins - 1, 0)
        return targets

    def _windows_in(self, a: int, b: int) -> Numbers:
        begins, ends = self._document_edges(a, b)
        found: Numbers = windows_of(ends - begins - 1, self.ruler.window, self.ruler.stride)
        return found

    def _document_edges(self, a: int, b: int) -> tuple[Numbers, Numbers]:
        """Where the documents a to b begin and end, as far as they lie in the stream."""
        pieces = np.arange(a, b + 1) if self._firsts is None else np.append(self._firsts, len(self.source))[a : b + 1]
        lengths = self._lengths[int(pieces[0]) : int(pieces[-1])].astype(np.int64)
        edges = self._tokens.before(int(pieces[0])) + np.concatenate([[0], np.cumsum(lengths)])[pieces - pieces[0]]
        edges = np.clip(edges, self.begin, self.end)
        return edges[:-1], edges[1:]


# Fewer documents can't be split by lot: one may be most of the text. Then the end of the text is for validation.
_BY_LOT = 20


def split_text(
    sets: Sequence[Prepared], ruler: Ruler, share: float, seed: int
) -> tuple[list[Stream], list[Stream], list[Chosen] | None]:
    """(training, validation, the documents of the latter where these were drawn by lot), of each source."""
    plain = ruler.side_by_side
    if min(each.documents for each in sets) >= _BY_LOT:
        drawn = [split_off(each, share, seed)[:2] for each in sets]
        train, valid = [Stream(own, ruler) for own, _ in drawn], [Stream(own, plain) for _, own in drawn]
        return train, valid, [own for _, own in drawn]
    places = [_cut(each, ruler, share) for each in sets]
    train = [Stream(each, ruler, 0, place) for each, place in zip(sets, places, strict=True)]
    return train, [Stream(each, plain, place) for each, place in zip(sets, places, strict=True)], None


def _cut(made: Prepared, ruler: Ruler, share: float) -> int:
    """Where the tokens for validation begin: a window of them at least, and never more than half."""
    tokens = Stream(made, ruler).tokens
    return tokens - min(max(ruler.window + 1, round(share * tokens)), tokens // 2)


class Windows:
    """The windows of several streams, one stream after another."""

    def __init__(self, streams: Sequence[Stream]):
        self.streams, self.ruler = streams, streams[0].ruler
        self._ends = np.cumsum([len(each) for each in streams])

    @property
    def window(self) -> int:
        return self.ruler.window

    @property
    def stride(self) -> int:
        return self.ruler.stride

    @property
    def overlap(self) -> Overlap:
        return self.ruler.overlap

    @property
    def total_tokens(self) -> int:
        return sum(each.tokens for each in self.streams)

    @property
    def documents(self) -> int:
        return sum(each.documents for each in self.streams)

    @property
    def total_supervised(self) -> int:
        """Tokens that count in the loss, each once."""
        return sum(each.trained_tokens for each in self.streams)

    @property
    def readable(self) -> int:
        return sum(each.readable for each in self.streams)

    @property
    def positions(self) -> int:
        return sum(each.positions for each in self.streams)

    @property
    def lengths(self) -> NDArray[np.integer]:
        """The longest that windows can be: one number, for as many as there are."""
        return np.broadcast_to(np.int64(self.window + 1), len(self))

    @property
    def supervised(self) -> NDArray[np.integer]:
        return np.broadcast_to(np.int64(self.window), len(self))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Example:
        own = int(np.searchsorted(self._ends, number, side="right"))
        return self.streams[own][number - (int(self._ends[own - 1]) if own else 0)]

    def longest(self, count: int) -> list[Example]:
        """As many examples as long as any; the same one again serves, where only shapes are asked for."""
        examples = [each[each.longest()] for each in self.streams if len(each)]
        return [max(examples, key=lambda example: len(example.tokens))] * min(count, len(self))

    def some(self) -> int:
        """How many windows are measured."""
        return min(len(self), max(1, self.ruler.measured_tokens // self.window))

    def measured(self, seed: int | None = None) -> list[Example]:
        """Some windows side by side, so many as are measured in a moment: evenly spread, or drawn with a seed."""
        plain = Windows([Stream(each.source, self.ruler.side_by_side, each.begin, each.end) for each in self.streams])
        count = plain.some()
        numbers = np.arange(count) * len(plain) // max(1, count)
        if seed is not None:
            numbers = shuffled(np.arange(count), len(plain), (seed, 0x5A3))
        return [plain[number] for number in numbers.tolist()]


class _Sums:
    """Sums of numbers up to any place. The numbers are asked for a block at a time; only the blocks' sums are kept."""

    def __init__(self, count: int, numbers: Callable[[int, int], Numbers]):
        self._count, self._numbers = count, numbers
        blocks = [int(numbers(a, min(a + _BLOCK, count)).sum()) for a in range(0, count, _BLOCK)]
        self._blocks = np.concatenate([[0], np.cumsum(np.array(blocks, np.int64))])

    @property
    def total(self) -> int:
        return int(self._blocks[-1])

    def before(self, place: int) -> int:
        """The sum of all numbers before a place."""
        block = min(place // _BLOCK, len(self._blocks) - 1)
        return int(self._blocks[block]) + int(self._numbers(block * _BLOCK, place).sum())

    def find(self, sum: int) -> tuple[int, int]:
        """(the place whose number reaches over a sum, how far into that number)."""
        block = int(np.searchsorted(self._blocks, sum, side="right")) - 1
        within = np.cumsum(self._numbers(block * _BLOCK, min((block + 1) * _BLOCK, self._count)))
        left = sum - int(self._blocks[block])
        own = int(np.searchsorted(within, left, side="right"))
        return block * _BLOCK + own, left - (int(within[own - 1]) if own else 0)
