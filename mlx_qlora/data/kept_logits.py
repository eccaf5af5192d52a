"""A teacher's logits that were kept: what it says at the places of a batch, without the teacher."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.logit_shards import AGAIN, Card, Shard, marks_of, read_card, wide
from mlx_qlora.errors import ConfigError, DataError

# Shards that are mapped at once: each holds a file open, and a Mac allows 256 of them. A batch of 2,048 places from all of 82
# shards takes 7 ms; where all of them are mapped anew for each, 37.
_OPEN = 128
Weights = NDArray[np.float32]
Marks = NDArray[np.uint64]


def vocabulary_digest(tokenizer: Any) -> str:
    """Of all tokens with their ids."""
    return text_digest(json.dumps(sorted(tokenizer.get_vocab().items())))


def text_digest(text: str | None) -> str:
    return hashlib.blake2b((text or "").encode(), digest_size=8).hexdigest()


class KeptLogits:
    """A cache that `mlx-qlora distill cache` wrote. Records are read where they are asked for; in memory are 12 bytes a place.

    A shard's checksum is looked at when it is touched first.
    """

    def __init__(self, folder: Path, card: Card, shards: Sequence[Shard]):
        self.folder, self.card, self._shards = folder, card, shards
        self._sound: set[int] = set()
        self._mapped: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()
        marks = marks_of(folder, shards)
        order = np.argsort(marks, kind="stable")
        self._marks, self._places = marks[order], order.astype(np.uint32)
        self._begins = np.cumsum([0, *(each.places for each in shards)])
        self._differences: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> KeptLogits:
        card, shards = read_card(folder)
        for each in shards:
            path = folder / each.file
            found = path.stat().st_size if path.is_file() else 0
            if found != each.bytes:
                raise DataError(f"{path}: {found:,} bytes came, {each.bytes:,} are expected. To make it again: {AGAIN}")
        return cls(folder, card, shards)

    def differences(self, vocabulary: str, template: str, data: str) -> tuple[str, ...]:
        """What it was made with that is otherwise here, by their digests; told where places are missing, too."""
        own = (self.card.tokenizer, self.card.template, self.card.data)
        names = ("the tokenizer", "the chat template", "the data or its seed")
        told = zip(names, own, (vocabulary, template, data), strict=True)
        self._differences = tuple(what for what, before, now in told if before != now)
        return self._differences

    def require(
        self,
        temperatures: Sequence[float],
        logit_clip: float,
        sampled: bool,
        top_k: int | None,
        vocabulary: int,
        loss: str = "",
    ) -> None:
        """Raise where a run wants what was not kept. `top_k` None: all that is there. `vocabulary`: the student's classes.
        `loss`: as in DistillConfig; "": whichever the cache is for."""
        card = self.card
        problems = []
        if loss and (loss == "uld") != card.across:
            kind = "a teacher with other tokens (distill.loss: uld)" if card.across else "classes by their numbers"
            problems.append(f"distill.loss: {loss} came, and {kind} is what is kept")
        if lacking := [each for each in temperatures if self._temperature(each) is None]:
            came, kept = (" ".join(f"{each:g}" for each in several) for several in (lacking, card.temperatures))
            problems.append(f"distill.temperature: {came} came over the run, and {kept} are kept")
        if abs(card.logit_clip - logit_clip) > 1e-6 * logit_clip:
            problems.append(f"distill.logit_clip: {logit_clip:g} came, and {card.logit_clip:g} is what was clipped to")
        if sampled and not card.samples:
            problems.append("distill.estimate: sampled came, and no samples are kept (--samples 16)")
        if top_k is not None and top_k > card.top_k < card.vocabulary:
            problems.append(f"distill.top_k: {top_k} came, and {card.top_k} classes are kept")
        if card.vocabulary > vocabulary and not card.across:
            problems.append(f"model: it has {vocabulary:,} classes, and those of {card.vocabulary:,} tokens are kept")
        if problems:
            raise ConfigError(
                "\n".join(f"{each}, in {self.folder}." for each in problems)
                + f"\nSet what the cache has, or make one with these settings: {AGAIN} --distill.cache ANOTHER_FOLDER"
            )

    def classes(
        self, marks: Marks, weights: Weights, temperature: float, top_k: int | None
    ) -> tuple[NDArray[np.float16], NDArray[np.int32], NDArray[np.float32]]:
        """(log-probabilities at temperature 1 [S, k], their ids [S, k], of all other classes the log of the sum of
        exp(log-probability / temperature) [S]) at the places of a batch."""
        number = self._temperature(temperature)
        if number is None:
            self.require((temperature,), self.card.logit_clip, False, None, self.card.vocabulary)
        kept = min(top_k or self.card.top_k, self.card.top_k)
        blank = -np.log(kept + 1)
        values = np.full((len(marks), self.card.top_k), blank, np.float16)
        ids = np.tile(np.arange(self.card.top_k, dtype=np.int32), (len(marks), 1))
        rests = np.full(len(marks), -np.inf if kept == self.card.vocabulary else blank, np.float32)
        for arrays, at, rows in self._found(marks, weights):
            values[at], ids[at], rests[at] = arrays["values"][rows], wide(arrays, "ids", rows), arrays["rests"][rows, number]
        if kept < self.card.top_k:
            joined = _log_sum([*(values[:, kept:].astype(np.float32) / temperature).T, rests])
            rests = np.where(weights > 0, joined, rests)
        return values[:, :kept], ids[:, :kept], rests

    def samples(self, marks: Marks, weights: Weights) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
        """(log-probabilities, ids), each [S, M], of classes drawn from the teacher. Over all M of a place together the mean
        of anything is unbiased: each was drawn from another M-th of the distribution."""
        shape = (len(marks), self.card.samples)
        values, ids = np.full(shape, -np.log(2), np.float16), np.zeros(shape, np.int32)
        for arrays, at, rows in self._found(marks, weights):
            values[at], ids[at] = arrays["drawn"][rows], wide(arrays, "drawn_ids", rows)
        return values, ids

    def require_places(self, marks: Marks) -> None:
        """Raise where one of these is missing: rather before training than in the middle of it."""
        wanted = np.unique(marks)
        if missing := int(np.count_nonzero(~self._here(wanted)[1])):
            self._refuse(missing, len(wanted))

    def check(self) -> None:
        """Raise where a shard is damaged."""
        for number in range(len(self._shards)):
            self._require_sound(number)

    def _temperature(self, value: float) -> int | None:
        near = (number for number, own in enumerate(self.card.temperatures) if abs(own - value) <= 1e-5 * value)
        return next(near, None)

    def _found(self, marks: Marks, weights: Weights) -> Iterator[tuple[dict[str, NDArray[Any]], NDArray[np.int64], Any]]:
        """(a shard's arrays, places of the batch, the rows that they are in the shard)."""
        at = np.flatnonzero(weights)
        index, here = self._here(marks[at])
        if not here.all():
            self._refuse(int(np.count_nonzero(~here)), len(at))
        places = self._places[index].astype(np.int64)
        shards = np.searchsorted(self._begins, places, "right") - 1
        for number in np.unique(shards).tolist():
            own = shards == number
            yield self._arrays(number), at[own], places[own] - self._begins[number]

    def _here(self, marks: Marks) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(where they stand among those that are kept, whether they do)."""
        if not len(self._marks):
            return np.zeros(0, np.int64), np.zeros(len(marks), bool)
        index = np.minimum(np.searchsorted(self._marks, marks), len(self._marks) - 1)
        return index, self._marks[index] == marks

    def _refuse(self, count: int, of: int) -> None:
        self.check()  # a damaged mark is found by nobody
        why = "it was not made to its end; " if not self.card.finished else ""
        if self._differences:
            why += f"made with another: {', '.join(self._differences)}"
        else:
            why += "it was made with other data, or another chat template, max_seq_length, truncation or tokenizer"
        raise DataError(
            f"distill.cache: {count:,} of {of:,} places are not in {self.folder}: {why}.\n"
            f"To add what is missing, with the settings of this run: {AGAIN}"
        )

    def _arrays(self, number: int) -> dict[str, NDArray[Any]]:
        if number not in self._mapped:
            self._require_sound(number)
            self._mapped[number] = self._shards[number].arrays(self.folder)
            if len(self._mapped) > _OPEN:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(number)
        return self._mapped[number]

    def _require_sound(self, number: int) -> None:
        if number in self._sound:
            return
        if problem := self._shards[number].problem(self.folder):
            raise DataError(f"distill.cache: {problem}. To make what was in it again: {AGAIN}")
        self._sound.add(number)


def _log_sum(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """log(exp(a) + exp(b) + ...), also of minus infinities."""
    add: Callable[..., Any] = np.logaddexp.reduce
    return np.asarray(add(np.stack(parts), axis=0), np.float32)
