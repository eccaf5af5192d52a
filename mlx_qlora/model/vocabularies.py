"""Whether two tokenizers give every text the same ids, and how many ids a student and its teacher have in common.

Heads have rows beyond their tokenizer's last token, more in one model of a family than in another, and a fine-tuned model
may know tokens that were added at the end: neither keeps two distributions from being compared on what both know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import ConfigError

# What tokenizers disagree about: digits, spaces, line ends, contractions, scripts, letters with accents in one or two
# characters, signs of several bytes, code.
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'LL say we've got 12345678 of 90,210.55 things",
    "a  b   c    d\t\te",
    " leading and trailing ",
    "one\ntwo\n\nthree\r\n\r\n\n four",
    "não é à toa; Ação, ação! n\u0061\u0303o",
    "Überstraße, cœur, naïve, ﬁne ½ ²",
    "Привет, мир! Γειά σου Κόσμε",
    "中文分词 日本語のテキスト 한국어",
    "مرحبا بالعالم שלום नमस्ते ไทย",
    "🙂👩‍👩‍👧 → ∑ √2 ≠ 1.414",
    "def f(x_1, *args):\n    return {'a': [x_1 ** 2], \"b\": args[0]}  # ok",
    "<b class=x>&amp;</b> C:\\temp\\file https://example.org/a?b=c#d",
    "SELECT * FROM t WHERE a>=10 AND b<>'z';",
    "\u00a0\u2009\u200bzero\u0000null",
)
_AT_ONCE = 4096


@dataclass(frozen=True)
class Vocabularies:
    """Two tokenizers side by side."""

    common: int  # ids that both know, from 0 on
    student: int  # one more than the last id that the student's knows
    teacher: int  # the teacher's
    difference: str = ""  # why texts don't become the same ids, in words; "": they do


def common_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any, student_rows: int, teacher_rows: int) -> int:
    """How many ids a student and its teacher have in common, from 0 on: those of `logits[:, :common]` of both can be compared.

    `student_rows`, `teacher_rows`: rows of each head. Raises `ConfigError`, with the reason, where a text becomes other ids
    in one than in the other.
    """
    found = compared(student_tokenizer, teacher_tokenizer)
    if found.difference:
        raise ConfigError(
            f"distill.teacher: its tokenizer is not the student's: {found.difference}. So what the teacher says of an id is "
            "not about the same text in the student. Take a teacher of the student's own family, or distil across "
            "tokenizers, from a cache, with distill.loss: uld."
        )
    return min(found.common, student_rows, teacher_rows)


def classes_of(model: nn.Module) -> int:
    """How many a model's head has, from the shapes: nothing is computed."""
    return int(model(mx.zeros((1, 1), mx.int32)).shape[-1])


def compared(student_tokenizer: Any, teacher_tokenizer: Any) -> Vocabularies:
    """Two tokenizers side by side. What tells them apart is looked for in their vocabularies, in their rules, and in texts."""
    student, teacher = _texts(student_tokenizer), _texts(teacher_tokenizer)
    ours, theirs = (max(known, default=-1) + 1 for known in (student, teacher))
    common = min(ours, theirs)
    other = [number for number in range(common) if student.get(number) != teacher.get(number)]
    if other:
        first = other[0]
        difference = (
            f"token {first:,} is {_named(student.get(first))} in the student and {_named(teacher.get(first))} in the teacher; "
            f"{len(other):,} of {common:,} ids differ"
        )
    else:
        difference = _other_ids(student_tokenizer, teacher_tokenizer, common)
    return Vocabularies(common, ours, theirs, difference)


def ids_of(tokenizer: Any) -> dict[int, str]:
    """The tokens of a tokenizer by their ids, as it writes them."""
    return _texts(tokenizer)


def _texts(tokenizer: Any) -> dict[int, str]:
    return {number: text for text, number in tokenizer.get_vocab().items()}


def _named(text: str | None) -> str:
    return "nothing" if text is None else repr(text)


def _other_ids(student: Any, teacher: Any, common: int) -> str:
    """Why texts become other ids although the tokens are the same; "": as far as can be told, they don't."""
    ours, theirs = (getattr(each, "backend_tokenizer", None) for each in (student, teacher))
    if ours is None or theirs is None:  # written in Python: only texts can tell
        return _in_texts(_Plain(student), _Plain(teacher), [_PROBES])
    one, two = json.loads(ours.to_str()), json.loads(theirs.to_str())
    same_law = _law(one["model"]) == _law(two["model"])
    if same_law and _rules(one, common) == _rules(two, common):
        return _in_texts(_Fast(ours), _Fast(theirs), [_PROBES])
    # Rules can be written in two ways and mean the same, so each token is tried, alone and between words.
    found = _in_texts(_Fast(ours), _Fast(theirs), [_PROBES, *_of_all_tokens(student, common)])
    return found or ("" if same_law else _unlike(one["model"], two["model"]))


def _law(model: dict[str, Any]) -> Any:
    """How letters become tokens: merges, or, where words are looked up, all of them with what they are worth."""
    looked_up = model["type"] != "BPE" or model.get("ignore_merges")
    return model["type"], model.get("merges"), model["vocab"] if looked_up else None


def _rules(described: dict[str, Any], common: int) -> Any:
    """What happens to a text before letters become tokens, and the tokens that are cut out of it first."""
    model = {name: value for name, value in described["model"].items() if name not in ("vocab", "merges")}
    added = [each | {"special": None} for each in described["added_tokens"] if each["id"] < common]
    return described["normalizer"], described["pre_tokenizer"], model, sorted(added, key=lambda each: int(each["id"]))


def _unlike(one: dict[str, Any], two: dict[str, Any]) -> str:
    if one["type"] != two["type"]:
        return f"one is of the kind {one['type']}, the other of the kind {two['type']}"
    merges, others = one.get("merges") or [], two.get("merges") or []
    place = next((place for place, (a, b) in enumerate(zip(merges, others, strict=False)) if a != b), None)
    if place is not None:
        return f"merge {place:,} is {_pair(merges[place])} in the student and {_pair(others[place])} in the teacher"
    if len(merges) != len(others):
        return f"the student joins letters by {len(merges):,} merges and the teacher by {len(others):,}"
    return f"words are looked up among {len(one['vocab']):,} in the student and {len(two['vocab']):,} in the teacher"


def _pair(merge: Any) -> str:
    return " + ".join(map(repr, merge if isinstance(merge, list) else merge.split(" ")))


def _of_all_tokens(tokenizer: Any, common: int) -> Iterator[Sequence[str]]:
    for start in range(0, common, _AT_ONCE):
        texts = [tokenizer.decode([number]) for number in range(start, min(start + _AT_ONCE, common))]
        yield [text for token in texts for text in (token, f"Say {token}7 {token}")]


class _Fast:
    def __init__(self, backend: Any):
        self._backend = backend

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        self._backend.encode_special_tokens = False
        return [each.ids for each in self._backend.encode_batch(list(texts), add_special_tokens=False)]


class _Plain:
    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def _in_texts(student: _Fast | _Plain, teacher: _Fast | _Plain, parts: Iterable[Sequence[str]]) -> str:
    """The first text that becomes other ids, in words; "" if there is none."""
    for texts in parts:
        for text, one, two in zip(texts, student.ids(texts), teacher.ids(texts), strict=True):
            if one != two:
                return _told(text, one, two)
    return ""


def _told(text: str, one: Sequence[int], two: Sequence[int]) -> str:
    if len(one) != len(two):
        return f"the text {text!r} becomes {len(one)} tokens in the student and {len(two)} in the teacher"
    place = next(place for place, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)
    numbers = f"number {one[place]:,} in the student and {two[place]:,} in the teacher"
    return f"of the text {text!r} token {place + 1} of {len(one)} is {numbers}"
