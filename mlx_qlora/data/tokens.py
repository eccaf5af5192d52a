"""Pieces of text become tokens with weights, and it is verified where each answer begins.

A text is encoded once. That its tokens up to an answer are those of the prompt alone is checked on every row, at the
price of a few tokens: a special token is a border that the tokenizer never crosses, so only what stands between the
last one and the answer (`<|im_start|>assistant\\n`) needs encoding again, and that is nearly always the same letters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.chain import Link, Parts, in_one_pass, shared_out
from mlx_qlora.data.chat import Piece, Span, Specials
from mlx_qlora.data.formats import RowError
from mlx_qlora.data.templates import Tokenizer
from mlx_qlora.records import Example

_SHORT = 200  # characters before an answer that are worth remembering with their tokens
_REMEMBERED = 10_000
_BEFORE = ("\n", "a", ".")  # texts that another one follows, to see what its tokens are then


@dataclass
class Encoded:
    """Tokens, and the runs of them that are trained as (first, end, weight): in order, apart, none at token 0."""

    tokens: NDArray[np.int32]
    spans: list[tuple[int, int, float]]
    notes: list[str] = field(default_factory=list)
    targets: dict[int, int] = field(default_factory=dict)  # by place: what is predicted in place of the token there
    name: str = ""  # among the examples of its row

    @property
    def supervised(self) -> int:
        return sum(end - first for first, end, _ in self.spans)

    def cut(self, begin: int, end: int, before: int = 0) -> Encoded:
        """The tokens from begin to end, after the first `before` ones."""
        shift = before - begin
        kept = ((max(a, begin) + shift, min(b, end) + shift, weight) for a, b, weight in self.spans)
        spans = [(max(a, 1), b, weight) for a, b, weight in kept if max(a, 1) < b]
        targets = {place + shift: target for place, target in self.targets.items() if begin <= place < end}
        tokens = np.concatenate([self.tokens[:before], self.tokens[begin:end]])
        return Encoded(tokens, spans, self.notes, targets, self.name)

    def example(self, id: str) -> Example:
        weights = np.zeros(len(self.tokens), np.float32)
        for first, end, weight in self.spans:
            weights[first:end] = weight
        return Example(id, self.tokens, weights, replaced(self.tokens, self.targets))


def replaced(tokens: NDArray[np.int32], targets: Mapping[int, int]) -> NDArray[np.int32] | None:
    """The tokens with others in some places; None where there are no such places."""
    if not targets:
        return None
    made: NDArray[np.int32] = tokens.copy()
    made[list(targets)] = list(targets.values())
    return made


class Encoder:
    """Encodes pieces with a tokenizer, many at once where it is one of the fast ones."""

    def __init__(self, tokenizer: Tokenizer, specials: Specials):
        self._tokenizer = tokenizer
        self._specials = specials
        self._bos = tokenizer.bos_token_id
        self._eos = tokenizer.eos_token_id
        # Where one token begins and ends texts, the tokenizer says whether it puts it first.
        both = self._bos is not None and self._bos == self._eos
        self._begins = self._bos is not None and (not both or list(tokenizer.encode("a"))[:1] == [self._bos])
        self._unknown = getattr(tokenizer, "unk_token_id", None)
        stops = getattr(tokenizer, "eos_token_ids", None)  # mlx-lm's has a set of them
        self._stops = {self._eos, *(stops if isinstance(stops, set | list) else ())}
        self._fast: Any = _fast_backend(tokenizer)
        self._escaping: tuple[Any, dict[int, int]] | None = None
        self._borders = _borders(tokenizer)
        self._known: dict[str, list[int]] = {}
        self._continued: dict[tuple[str, bool], list[int]] = {}

    def submit(self, pieces: Sequence[Piece]) -> list[Any]:
        """The bare tokenizer's work on many pieces. It leaves Python's lock, so it can run beside other work."""
        if self._fast is None:
            return [None] * len(pieces)
        self._fast.encode_special_tokens = False  # whoever else used it may have left it otherwise
        plain = [piece.text for piece in pieces if not piece.escaped]
        done = iter(self._fast.encode_batch(plain, add_special_tokens=False))
        return [None if piece.escaped else next(done) for piece in pieces]

    def finish(self, piece: Piece, encoding: Any) -> list[Encoded]:
        """One piece's examples; nearly always one. `encoding` is what `submit` gave for it."""
        if piece.link is not None:
            return [self._linked(piece, piece.link, self.parts(piece, encoding))]
        made = self._encodings(piece, encoding)
        if piece.share is None:
            return made
        return [replace(each, spans=shared_out(each.spans, piece.share), name=piece.name) for each in made]

    def _encodings(self, piece: Piece, encoding: Any) -> list[Encoded]:
        if piece.escaped:
            return self._verified(piece, self._escaped(piece.text))
        return self._verified(piece, _Places(encoding) if encoding is not None else self._slow(piece.text))

    def ids(self, piece: Piece) -> list[int]:
        """A piece's tokens, without anything added."""
        return self._encoded(piece.text, piece.escaped)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text without anything added."""
        if self._fast is not None:
            return list(self._fast.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    # Chains of thought

    def parts(self, piece: Piece, encoding: Any = None) -> Parts:
        """The tokens of a piece with a link, each part encoded for itself."""
        link = piece.link
        assert link is not None, "no chain"
        (made,) = self._encodings(replace(piece, link=None), encoding)
        begin = made.spans[0][0] if made.spans else 0
        if not begin:
            raise RowError("a chain of thought answers a question, and none is here.")
        tokens = made.tokens.tolist()
        cue, answer = self._following(link.cue), self._following(link.answer, piece.escaped)
        return Parts(tokens[:begin], tokens[begin:], cue, answer, self._stop(link, piece.escaped))

    def _linked(self, piece: Piece, link: Link, parts: Parts) -> Encoded:
        tokens, spans, targets = in_one_pass(parts, link.shares)
        notes = list(piece.notes)
        if self._unknown is not None and self._unknown in tokens:
            notes.append("unknown")
        if parts.stop not in self._stops:
            notes.append(f"no_stop:{self._tokenizer.decode([parts.stop])}")
        return Encoded(np.array(tokens, np.int32), _in_order(spans), notes, targets)

    def _stop(self, link: Link, escaped: bool) -> int:
        """The token that ends an answer, and a rationale."""
        ids = self._encoded(link.stop, escaped) if link.stop else [self._eos]
        if len(ids) != 1:
            raise RowError(
                f"the chat template ends answers with {self._specials.plain(link.stop)!r}, which is not one token, so that a "
                "rationale can't be ended in the same pass; --chain.kind step_by_step does not need that."
            )
        if ids[0] is None:
            raise RowError("the tokenizer has no end-of-text token, so an answer would have no end.")
        return int(ids[0])

    def _following(self, text: str, escaped: bool = False) -> list[int]:
        """The tokens of a text that another one goes before: some tokenizers put a space before what they are given."""
        known = self._continued.get((text, escaped))
        if known is None:
            known = self._continuation(text, escaped)
            if len(text) <= _SHORT and len(self._continued) < _REMEMBERED:
                self._continued[text, escaped] = known
        return known

    def _continuation(self, text: str, escaped: bool) -> list[int]:
        own = self._encoded(text, escaped)
        for before in _BEFORE:
            start, whole = self.encode(before), self._encoded(before + text, escaped)
            if whole[: len(start)] == start:
                return whole[len(start) :]
            if _same_text(self._tokenizer, [*start, *own], whole):
                return own
        raise RowError(f"the tokenizer has no tokens for {text[:_SHORT]!r} that could follow a text.")

    def _verified(self, piece: Piece, places: _Places | _SlowPlaces) -> list[Encoded]:
        spans = []
        for span in piece.spans:
            first, last = places.first(span.begin), places.after(span.end)
            if span.exact:
                if not self._is_border(piece, places, span.begin, first):
                    return [self._apart(piece, each) for each in piece.spans]
            else:
                first = places.overlapping(span.begin)
            spans.append((first, last, span.weight))
        return [self._completed(piece, places.ids, spans)]

    def _completed(self, piece: Piece, ids: list[int], spans: list[tuple[int, int, float]]) -> Encoded:
        notes = piece.notes
        if self._bos is not None and ids[:2] == [self._bos, self._bos]:  # a template and its text both began
            ids, spans = ids[1:], [(first - 1, last - 1, weight) for first, last, weight in spans]
        if self._unknown is not None and self._unknown in ids:
            notes = [*notes, "unknown"]
        ends_in = ids[-1] if ids else None
        if piece.bos and self._begins and ids[:1] != [self._bos]:
            ids, spans = [self._bos, *ids], [(first + 1, last + 1, weight) for first, last, weight in spans]
        if piece.eos is not None and ends_in != self._eos:
            if self._eos is None:
                raise RowError("the tokenizer has no end-of-text token, so an answer would have no end.")
            ids, spans = [*ids, self._eos], [*spans, (len(ids), len(ids) + 1, piece.eos)]
        elif spans and spans[-1][1] == len(ids) and ends_in not in self._stops and not piece.goes_on:
            notes = [*notes, f"no_stop:{self._tokenizer.decode([ends_in])}"]
        return Encoded(np.array(ids, np.int32), _in_order(spans), notes)

    def _is_border(self, piece: Piece, places: _Places | _SlowPlaces, begin: int, first: int) -> bool:
        """Whether the tokens before an answer are those of its prompt alone."""
        if isinstance(places, _SlowPlaces):
            return places.ids[:first] == self.encode(piece.text[:begin])
        last = first - 1
        while last >= 0 and places.ids[last] not in self._borders:
            last -= 1
        if last == first - 1 >= 0:
            return True
        between = piece.text[places.begin(last) if last >= 0 else 0 : begin]
        tokens = self._known.get(between)
        if tokens is None:
            tokens = self._encoded(between, piece.escaped)
            if len(between) <= _SHORT and len(self._known) < _REMEMBERED:
                self._known[between] = tokens
        return tokens == places.ids[max(last, 0) : first]

    def _apart(self, piece: Piece, span: Span) -> Encoded:
        """Prompt and answer encoded each for itself, as when the model is asked: their letters would grow together."""
        prompt = self._ids(piece, 0, span.begin)
        answer = self._ids(piece, span.begin, span.end)
        if not _same_text(self._tokenizer, [*prompt, *answer], self._ids(piece, 0, span.end)):
            raise RowError(
                "the tokenizer joins the letters of the prompt with those of the answer; "
                "end the prompt with a line break, or begin the answer with a space."
            )
        ids = [*prompt, *answer]
        return self._completed(piece, ids, [(len(prompt), len(ids), span.weight)])

    def _ids(self, piece: Piece, begin: int, end: int) -> list[int]:
        return self._encoded(piece.text[begin:end], piece.escaped)

    def _encoded(self, text: str, escaped: bool) -> list[int]:
        return self._escaped(text).ids if escaped else self.encode(text)

    # Texts that hold letters of special tokens

    def _escaped(self, text: str) -> _Places:
        if self._fast is None:
            found = self._specials.pattern.search(self._specials.plain(text))
            raise RowError(f"the letters of a special token ({found[0] if found else '?'}) stand in a text; take them out.")
        if self._escaping is None:
            self._escaping = self._with_private_names()
        clone, ids = self._escaping
        encoding = clone.encode(text, add_special_tokens=False)
        return _Places(encoding, [ids.get(token, token) for token in encoding.ids])

    def _with_private_names(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with each special token under its private name, and how its ids become the real ones."""
        import tokenizers

        described = json.loads(self._fast.to_str())
        renamed = {text: self._specials.private_name(text) for text in self._specials.strings}
        for token in described["added_tokens"]:
            token["content"] = renamed.get(token["content"], token["content"])
        model = described["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {renamed.get(text, text): number for text, number in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[renamed.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") in renamed:
            model["unk_token"] = renamed[model["unk_token"]]
        described["post_processor"] = None  # it adds tokens, which nobody asks for here
        clone = tokenizers.Tokenizer.from_str(json.dumps(described))
        ids = {clone.token_to_id(new): self._fast.token_to_id(old) for old, new in renamed.items()}
        return clone, {private: real for private, real in ids.items() if private is not None and private != real}

    def _slow(self, text: str) -> _SlowPlaces:
        return _SlowPlaces(text, list(self._tokenizer.encode(text, add_special_tokens=False)), self._tokenizer)


class _Places:
    """Which characters the tokens of an encoding cover."""

    def __init__(self, encoding: Any, ids: list[int] | None = None):
        self._encoding = encoding
        self.ids: list[int] = encoding.ids if ids is None else ids
        self._offsets: list[tuple[int, int]] | None = None

    def begin(self, token: int) -> int:
        return int(self._encoding.token_to_chars(token)[0])

    def end(self, token: int) -> int:
        return int(self._encoding.token_to_chars(token)[1])

    def first(self, character: int) -> int:
        """The first token that begins at a character or after it."""
        found = self._encoding.char_to_token(character)
        return int(found) if found is not None and self.begin(found) >= character else self._search(character, 0)

    def after(self, character: int) -> int:
        """One more than the last token that begins before a character."""
        if not self.ids or character >= self.end(len(self.ids) - 1):
            return len(self.ids)
        return self.first(character)

    def overlapping(self, character: int) -> int:
        """The first token that ends after a character."""
        return self._search(character + 1, 1) if character else 0

    def _search(self, character: int, side: int) -> int:
        if self._offsets is None:
            self._offsets = self._encoding.offsets
        return next((token for token, offset in enumerate(self._offsets) if offset[side] >= character), len(self._offsets))


class _SlowPlaces:
    """The same for a tokenizer that does not say where its tokens stand: by encoding beginnings of the text."""

    def __init__(self, text: str, ids: list[int], tokenizer: Tokenizer):
        self._text, self.ids, self._tokenizer = text, ids, tokenizer

    def first(self, character: int) -> int:
        return len(self._tokenizer.encode(self._text[:character], add_special_tokens=False)) if character else 0

    def after(self, character: int) -> int:
        return len(self.ids) if character >= len(self._text) else self.first(character)

    def overlapping(self, character: int) -> int:
        return self.first(character)


def _in_order(spans: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Nothing of weight 0, nothing on token 0, neighbours of one weight joined; where two overlap the later counts."""
    made: list[tuple[int, int, float]] = []
    for first, last, weight in spans:
        first, weight = max(first, 1), float(np.float32(weight))  # nothing comes before the first token
        if made and first < made[-1][1]:
            return _untangled(spans)
        if weight and first < last:
            if made and made[-1][1] == first and made[-1][2] == weight:
                first = made.pop()[0]
            made.append((first, last, weight))
    return made


def _untangled(spans: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    weights = np.zeros(max(last for _, last, _ in spans) + 1)
    for first, last, weight in spans:
        weights[first:last] = weight
    edges = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist()]
    return _in_order([(a, b, float(weights[a])) for a, b in pairwise(edges)])


def _fast_backend(tokenizer: Tokenizer) -> Any:
    """The Rust tokenizer, if it alone decides what the tokens are."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    probe = "Um  dia,\n\n<s>2+2?</s> \tÉ 4 — <|im_start|>ok\n"
    same = list(backend.encode(probe, add_special_tokens=False).ids) == list(tokenizer.encode(probe, add_special_tokens=False))
    return backend if same else None


def _borders(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of tokens that split a text wherever they stand, whatever their neighbours are."""
    found = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return frozenset(
        number
        for number, token in found.items()
        if token.special
        and not (token.single_word or token.lstrip or token.rstrip)
        and number != getattr(tokenizer, "unk_token_id", None)  # stands for letters, too
    )


def _same_text(tokenizer: Tokenizer, tokens: list[int], others: list[int]) -> bool:
    return bool(tokenizer.decode(tokens) == tokenizer.decode(others))
