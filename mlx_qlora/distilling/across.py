"""A cache of what a teacher with another tokenizer says at the places of a student's examples.

The teacher reads each row in its own tokens, by its own template, and is asked at the places that have a partner at the student
(`spans`). What it says there is kept under the mark of the student's place. A place of the student without a partner is kept,
too, with log-probabilities of -inf: there nothing is to be learnt from the teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.layout import histories, supervised_marks
from mlx_qlora.data.logit_shards import Card, Records, Writer
from mlx_qlora.data.prepare import KeptSet, row_of
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.distilling.spans import Letters, aligned
from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.records import Example

_LONGER = 4  # how many times as many tokens as the student a teacher may have for a row
Marks = NDArray[np.uint64]


@dataclass(frozen=True)
class Crossing:
    """Which places of a teacher's examples are asked for, and what a student calls them."""

    taught: list[tuple[KeptSet, int, NDArray[np.int64]]]  # a teacher's example, and the places in it
    ours: Marks  # of the student's places that have a partner, each once
    theirs: Marks  # of its partner: sorted
    alone: Marks  # of the student's places that have none

    def __iter__(self) -> Iterator[Example]:
        """The teacher's examples; what is trained of them are the targets of the places that are asked for."""
        for examples, number, places in self.taught:
            example = examples[number]
            weights = np.zeros(len(example.tokens), np.float32)
            weights[places + 1] = 1
            yield replace(example, weights=weights, targets=None)

    @property
    def describe(self) -> tuple[str, ...]:
        whole = len(self.ours) + len(self.alone)
        share = f"{len(self.ours) / max(1, whole):.0%}"
        begin = f"at {len(self.ours):,} of the student's {whole:,} places ({share}) a token of the teacher's begins, too"
        return (begin, "there the teacher is asked; at the others the student learns from the data alone")

    def named(self, records: Records) -> Records:
        """A teacher's records under the student's marks."""
        begin, end = (np.searchsorted(self.theirs, records.marks, side) for side in ("left", "right"))
        counts = end - begin
        rows = np.repeat(np.arange(len(records)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        marks = self.ours[np.repeat(begin, counts) + within]
        arrays = {name: getattr(records, name)[rows] for name in ("values", "ids", "rests", "drawn", "drawn_ids")}
        return Records(marks, **arrays, clipped=records.clipped)

    def known(self, ours: Marks) -> Marks:
        """The teacher's marks of which all that the student calls them is among these."""
        lacking = np.unique(self.theirs[~np.isin(self.ours, ours)])
        return np.setdiff1d(self.theirs, lacking)

    def nothing(self, card: Card, there: Marks) -> Records:
        """Records of the places without a partner that are not there yet."""
        marks = np.setdiff1d(self.alone, there)
        shape = (len(marks), card.top_k)
        return Records(
            marks,
            np.full(shape, -np.inf, np.float16),
            np.tile(np.arange(card.top_k, dtype=np.int32), (len(marks), 1)),
            np.full((len(marks), len(card.temperatures)), -np.inf, np.float32),
            np.zeros((len(marks), 0), np.float16),
            np.zeros((len(marks), 0), np.int32),
        )


class Renaming:
    """A cache's writer that is told of a teacher's marks, and writes a student's."""

    def __init__(self, writer: Writer, crossing: Crossing):
        self._writer, self._crossing = writer, crossing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def marks(self) -> Marks:
        return self._crossing.known(self._writer.marks())

    def add(self, records: Records) -> None:
        self._writer.add(self._crossing.named(records))

    def finish(self) -> None:
        if len(nothing := self._crossing.nothing(self._writer.card, self._writer.marks())):
            self._writer.add(nothing)
        self._writer.finish()


def crossing(corpus: Corpus, validation: bool, student: Any, teacher: Any, progress: Any = lambda rows: None) -> Crossing:
    """The places of a student's corpus, and those of its teacher, row by row."""
    if corpus.windows is not None:
        raise ConfigError(
            "distill.loss: uld came with raw text in windows, which end elsewhere in other tokens. Leave windows off, or "
            "take a teacher with the student's tokenizer."
        )
    letters, others = Letters(student), Letters(teacher)
    rows = _of_teacher(corpus, teacher, progress)
    taught: list[tuple[KeptSet, int, NDArray[np.int64]]] = []
    pairs = [np.empty((0, 2), np.uint64)]
    alone = [np.empty(0, np.uint64)]
    for row, own in _rows(corpus, validation):
        partners = rows.get(row, [])
        its = [examples[number] for examples, number in partners]
        found = aligned(own, its, letters, others)
        mine, theirs = _marks(own, found[:, 0], found[:, 1]), _marks(its, found[:, 2], found[:, 3])
        pairs.append(np.stack([mine, theirs], axis=1))
        alone += map(supervised_marks, own)
        taught += [
            (*partners[number], np.unique(found[found[:, 2] == number, 3])) for number in np.unique(found[:, 2]).tolist()
        ]
    whole, first = np.unique(np.concatenate(pairs)[:, 0], return_index=True)
    partner = np.concatenate(pairs)[first, 1]
    order = np.argsort(partner, kind="stable")
    if not len(whole):
        raise DataError(
            "distill.loss: uld: no answer has the same text in the tokens of student and teacher, so nothing can be learnt. "
            "Look at both: mlx-qlora data PATH --model MODEL"
        )
    return Crossing(taught, whole[order], partner[order], np.setdiff1d(np.concatenate(alone), whole))


def _of_teacher(corpus: Corpus, tokenizer: Any, progress: Any) -> dict[str, list[tuple[KeptSet, int]]]:
    """The examples of each row as the teacher reads it: by its own template, whatever was named for the student's."""
    own = corpus.render
    render: RenderConfig = replace(
        own, chat_template="", max_seq_length=own.max_seq_length * _LONGER, truncation="drop", min_supervised_tokens=1
    )
    read = gather(corpus.config, render, tokenizer, corpus.seed, progress, sources=corpus.sources)
    rows: dict[str, list[tuple[KeptSet, int]]] = {}
    for examples in (read.sets[split] for split in ("train", "valid") if split in read.sets):
        for number in range(len(examples)):
            rows.setdefault(row_of(examples.id(number)), []).append((examples, number))
    return rows


def _rows(corpus: Corpus, validation: bool) -> Iterator[tuple[str, list[Example]]]:
    """(id of a row, its examples)."""
    for examples in (corpus.sets[split] for split in (("train", "valid") if validation else ("train",))):
        each: Iterable[Example] = (examples[number] for number in range(len(examples)))
        for row, own in groupby(each, lambda example: row_of(example.id)):
            yield row, list(own)


def _marks(examples: Sequence[Example], numbers: NDArray[np.int64], places: NDArray[np.int64]) -> Marks:
    own = [histories(example.tokens[:-1]) for example in examples]
    return np.array([own[number][place] for number, place in zip(numbers.tolist(), places.tolist(), strict=True)], np.uint64)
