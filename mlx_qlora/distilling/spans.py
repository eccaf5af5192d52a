"""Places of a student and of a teacher with another tokenizer, in the same row, at which both are asked the same: before them
the same text of the same answer has been said.

Each renders the row by its own template and reads it in its own tokens. What is trained of it, the answers, has the same
letters in both; where a token of one begins at the byte at which one of the other does, both places are a pair.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.layout import histories
from mlx_qlora.records import Example

Ids = Sequence[int]


class Letters:
    """The bytes that each token of a tokenizer stands for, and which tokens end an answer instead."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        stops = getattr(tokenizer, "eos_token_ids", None) or [tokenizer.eos_token_id]
        self.ends = frozenset({number for number, token in added.items() if token.special} | set(stops))
        self._known = _table(tokenizer, {number: str(token) for number, token in added.items()})

    def of(self, ids: Ids) -> list[bytes]:
        """What each of some tokens, which follow each other, adds to the text."""
        if self._known is not None:
            return [self._known.get(number, b"") for number in ids]
        return self._by_decoding(ids)

    def _by_decoding(self, ids: Ids) -> list[bytes]:
        """Of a tokenizer of another kind: what is decoded of one token more. A letter belongs to the token that ends it."""
        made: list[bytes] = []
        whole = b""
        for count in range(1, len(ids) + 1):
            text = self._tokenizer.decode(list(ids[:count])).encode()
            new = text.startswith(whole) and not text.endswith("\ufffd".encode())
            made.append(text[len(whole) :] if new else b"")
            whole = text if new else whole
        return made


def _table(tokenizer: Any, added: dict[int, str]) -> dict[int, bytes] | None:
    """The bytes of all tokens, where these follow from the tokens' names; None: of this kind that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    kinds = json.dumps(described.get("decoder"))
    if '"ByteLevel"' in kinds:
        bytes_of = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
        own = {
            number: bytes(bytes_of[letter] for letter in text) if bytes_of.keys() >= set(text) else text.encode()
            for text, number in tokenizer.get_vocab().items()
        }
    elif "\u2581" in kinds or '"Metaspace"' in kinds or "\\u2581" in kinds:
        own = {number: _of_sentencepiece(text) for text, number in tokenizer.get_vocab().items()}
    else:
        return None
    return own | {number: text.encode() for number, text in added.items()}


def _letters_of_bytes() -> list[str]:
    """The letters that byte-level tokenizers write bytes with: their own where that can be seen, else from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in set(seen)]
    return [chr(byte) if byte in set(seen) else chr(0x100 + unseen.index(byte)) for byte in range(256)]


def _of_sentencepiece(text: str) -> bytes:
    """
    >>> _of_sentencepiece("\u2581the"), _of_sentencepiece("<0xC3>")
    (b' the', b'\\xc3')
    """
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()


@dataclass(frozen=True)
class _Answer:
    """A run of trained tokens: its text without the tokens that end it, and the places at which a token begins in it."""

    example: int
    text: bytes
    begins: list[tuple[int, int]]  # (what of the text has been said before, in bytes; the place where the next is foretold)
    ends: list[int]  # where the tokens that end it are foretold

    def bare(self) -> _Answer:
        """Without the spaces around it, which are the template's affair: the last place before its first letter counts."""
        text, before = self.text.strip(), len(self.text) - len(self.text.lstrip())
        begins = [(min(max(0, said - before), len(text)), place) for said, place in self.begins]
        return _Answer(self.example, text, begins, self.ends)


def aligned(student: Sequence[Example], teacher: Sequence[Example], letters: Letters, others: Letters) -> NDArray[np.int64]:
    """Pairs [N, 4] of one row: (the student's example, its place, the teacher's example, its place); a place is the number of
    the token whose hidden state foretells the next. `letters`, `others`: of the tokenizers of student and teacher.

    The first tokens that end two answers are a pair, too, and so are the second ones. An answer that one of both lacks, or
    whose text is another one from somewhere on, has no pairs from there.
    """
    found = [
        (one.example, mine, other.example, its)
        for one, other in _partners(_answers(student, letters), _answers(teacher, others))
        for mine, its in _pairs(one, other)
    ]
    return np.array(found, np.int64).reshape(-1, 4)


def marks_of(examples: Sequence[Example], pairs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The marks of the student's places of pairs: what a batch calls them."""
    own = [histories(example.tokens[:-1]) for example in examples]
    return np.array([own[example][place] for example, place in pairs[:, :2].tolist()], np.uint64)


def _answers(examples: Sequence[Example], letters: Letters) -> list[_Answer]:
    made = []
    for number, example in enumerate(examples):
        trained = np.concatenate([[False], example.weights > 0, [False]])
        edges = np.flatnonzero(np.diff(trained))
        for first, end in edges.reshape(-1, 2).tolist():
            made.append(_answer(number, first, example.tokens[first:end].tolist(), letters))
    return made


def _answer(number: int, first: int, ids: Ids, letters: Letters) -> _Answer:
    body = len(ids)
    while body and ids[body - 1] in letters.ends:
        body -= 1
    pieces = letters.of(ids[:body])
    said = np.cumsum([0, *map(len, pieces)]).tolist()
    begins = list(zip(said, range(first - 1, first - 1 + body), strict=False))
    return _Answer(number, b"".join(pieces), begins, list(range(first - 1 + body, first - 1 + len(ids))))


def _partners(student: list[_Answer], teacher: list[_Answer]) -> list[tuple[_Answer, _Answer]]:
    """Answers of the same number; where one of both has fewer, those of the same text."""
    if len(student) == len(teacher):
        return list(zip(student, teacher, strict=True))
    texts = [[each.text.strip() for each in answers] for answers in (student, teacher)]
    blocks = difflib.SequenceMatcher(None, texts[0], texts[1], autojunk=False).get_matching_blocks()
    return [(student[a + step], teacher[b + step]) for a, b, size in blocks for step in range(size)]


def _pairs(one: _Answer, other: _Answer) -> list[tuple[int, int]]:
    """(place of one, place of the other)."""
    if one.text == other.text:
        return _within(one, other, len(one.text), 0, True)
    one, other = one.bare(), other.bare()
    if one.text == other.text or not (one.text and other.text):
        return _within(one, other, len(one.text), 0, one.text == other.text)
    if other.text.endswith(one.text):  # the beginning of one was cut off
        return _within(one, other, len(one.text), len(other.text) - len(one.text), True)
    if one.text.endswith(other.text):
        return [(mine, its) for its, mine in _within(other, one, len(other.text), len(one.text) - len(other.text), True)]
    return _within(one, other, _in_common(one.text, other.text), 0, False)


def _within(one: _Answer, other: _Answer, same: int, ahead: int, to_the_end: bool) -> list[tuple[int, int]]:
    """The pairs up to where the texts are the same; of the other's text so many bytes stand before the first of one's."""
    mine, its = dict(one.begins), dict(other.begins)
    found = [(place, its[said + ahead]) for said, place in mine.items() if said <= same and said + ahead in its]
    return found + (list(zip(one.ends, other.ends, strict=False)) if to_the_end else [])


def _in_common(one: bytes, other: bytes) -> int:
    """How many bytes two texts have in common from the start."""
    length = min(len(one), len(other))
    different = np.flatnonzero(np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8))
    return int(different[0]) if len(different) else length
