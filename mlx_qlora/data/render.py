"""Rows become `Example`s: tokens, and the weight of each as a target; with an account of what became of every row."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlx_qlora.data.chain import Chain, ChainConfig, chain_of
from mlx_qlora.data.chat import ChatRenderer, Piece, Span, TrainOn
from mlx_qlora.data.formats import Marks, Meaning, Pair, Plain, RowError, Talk, Turn, understand
from mlx_qlora.data.sources import BadRow, Row, SourceConfig
from mlx_qlora.data.templates import Tokenizer, choose_template, has_template
from mlx_qlora.data.thoughts import chained, linked
from mlx_qlora.data.tokens import Encoded, Encoder
from mlx_qlora.errors import DataError, require
from mlx_qlora.records import Example

_BLOCK = 256  # rows that are encoded at once
_LETTERS = 2**21  # of raw text, at most: the tokenizer needs some 40 bytes for each
_SHOWN = 20  # problems that are listed
WHOLE = 2**31 - 1  # as max_seq_length: documents, whatever their length, of which windows are made
WIDTHS = tuple(round(16 * 2 ** (step / 4)) for step in range(85))  # upper ends of the histogram's bins, in tokens
Truncation = Literal["error", "drop", "keep_end", "keep_start", "split"]


@dataclass(frozen=True)
class RenderConfig:
    """How rows become tokens, and which of these are trained."""

    chat_template: str = ""
    """plain, alpaca, chatml, or a Jinja file; without it the model's own, or plain for a base model that has none."""
    train_on: TrainOn = TrainOn.ASSISTANT
    """Every turn of the assistant, its last one, everything, or what the rows mark with "train"."""
    max_seq_length: int = 2048
    """Longest example in tokens; of raw text the length of a window. --seq-len is the same."""
    truncation: Truncation = "error"
    """What longer ones do: end the run, be left out, lose their start, lose their end, or be split at turn borders."""
    min_supervised_tokens: int = 1
    """Examples with fewer trained tokens are left out and counted."""
    chain: ChainConfig = field(default_factory=ChainConfig)

    def __post_init__(self) -> None:
        require(
            (self.max_seq_length >= 2, "max_seq_length", self.max_seq_length, "a whole number from 2"),
            (self.min_supervised_tokens >= 1, "min_supervised_tokens", self.min_supervised_tokens, "a whole number from 1"),
            (
                not self.chain.on or self.train_on in (TrainOn.ASSISTANT, TrainOn.LAST),
                "train_on",
                self.train_on.value,
                "last, with chain.kind (the last answer is trained, as rationale and answer),",
            ),
            (
                not self.chain.on or self.truncation in ("error", "drop"),
                "truncation",
                self.truncation,
                "error or drop, with chain.kind (a chain of thought that is cut says something else),",
            ),
        )


@dataclass
class Account:
    """What became of the rows. Sums, so that the account of several sources is their sum."""

    rows: int = 0
    examples: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    supervised_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)  # examples by the upper end of their bin
    longest: list[tuple[int, str]] = field(default_factory=list)  # (tokens, id) before truncation
    long_rows: int = 0  # longer than max_seq_length
    long_rows_lost: int = 0  # of them, those of which nothing trained is left
    long_supervised_lost: int = 0
    without_target: int = 0  # rows with nothing to train: left out
    below_minimum: int = 0  # examples with fewer trained tokens than wanted: left out
    malformed: int = 0  # rows that can't be used
    refused: list[str] = field(default_factory=list)  # the first of them, with the reason
    notes: Counter[str] = field(default_factory=Counter)  # rows by what was special about them
    policies: dict[str, list[int]] = field(default_factory=dict)  # policy: [rows, supervised tokens] it would have cost

    def count(self, made: Encoded) -> None:
        length = len(made.tokens)
        self.examples += 1
        self.tokens += length
        self.supervised_tokens += made.supervised
        self.lengths[WIDTHS[min(bisect_left(WIDTHS, length), len(WIDTHS) - 1)]] += 1

    def seen(self, length: int, id: str) -> None:
        if len(self.longest) < 5 or length > self.longest[0][0]:
            (heapq.heappush if len(self.longest) < 5 else heapq.heapreplace)(self.longest, (length, id))

    def __add__(self, other: Account) -> Account:
        mine, theirs = vars(self), vars(other)
        both = {name: mine[name] + theirs[name] for name in mine if name not in ("longest", "policies")}
        policies = {
            name: [a + b for a, b in zip(mine["policies"].get(name, [0, 0]), theirs["policies"].get(name, [0, 0]), strict=True)]
            for name in {**mine["policies"], **theirs["policies"]}
        }
        return Account(**both, longest=heapq.nlargest(5, [*self.longest, *other.longest])[::-1], policies=policies)

    def to_json(self) -> dict[str, Any]:
        value = dict(vars(self))
        value["longest"] = [{"id": id, "tokens": tokens} for tokens, id in sorted(self.longest, reverse=True)]
        value["lengths"] = {str(width): number for width, number in sorted(self.lengths.items())}
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Account:
        own = dict(value)
        own["longest"] = sorted((one["tokens"], one["id"]) for one in value["longest"])
        own["lengths"] = Counter({int(width): number for width, number in value["lengths"].items()})
        own["formats"], own["notes"] = Counter(value["formats"]), Counter(value["notes"])
        return cls(**own)


class Refusals:
    """Rows that can't be used: counted, and the first of them kept with their reasons."""

    def __init__(self, stop: bool = False):
        self._stop = stop  # raise as soon as the list is full
        self.listed: list[str] = []
        self.count = 0

    def add(self, id: str, reason: str) -> None:
        self.count += 1
        if len(self.listed) < _SHOWN:
            self.listed.append(f"{id}: {reason}")
        if self._stop and self.count == _SHOWN:
            raise DataError("\n".join([*self.listed, f"These are the first {_SHOWN}; no further row was read. {_SKIP}"]))


def refused(account: Account, config: SourceConfig) -> str | None:
    """What to say if the refused rows end the run."""
    if config.malformed == "raise" and account.malformed:
        more = [f"... and {account.malformed - len(account.refused)} more"] if account.malformed > len(account.refused) else []
        hint = [_SKIP] if 1 < account.malformed < account.rows else []
        return "\n".join([*account.refused, *more, *hint])
    if account.rows and account.malformed == account.rows:
        return f"none of the {account.rows:,} rows can be used; the first: {account.refused[0]}"
    if account.malformed > config.malformed_limit:
        limit = f"{account.malformed:,} rows can't be used, more than malformed_limit {config.malformed_limit:,}."
        return "\n".join([*account.refused, limit])
    return None


_SKIP = "To leave such rows out and count them: --malformed skip."


class Renderer:
    """Rows -> examples, with one tokenizer and one set of settings."""

    def __init__(self, tokenizer: Tokenizer, config: RenderConfig, source: SourceConfig):
        self.had_template = has_template(tokenizer)
        self.template = choose_template(tokenizer, config.chat_template)
        self.tokenizer = tokenizer
        self.config = config
        self._source = source
        # A chain is the last answer, and of it alone is said what is trained.
        train_on = TrainOn.LAST if config.chain.on else config.train_on
        self._chat = ChatRenderer(tokenizer, train_on, self.template, obey_marks=not config.chain.on)
        self._encoder = Encoder(tokenizer, self._chat.specials)
        # Prompt and completion for a base model follow each other as they stand; for a chat model they are a chat.
        self._pairs_are_chats = self.had_template or bool(config.chat_template)

    def examples(self, rows: Iterable[Row | BadRow], account: Account, refusals: Refusals) -> Iterator[Example]:
        """The examples of rows, in their order."""
        return (made.example(id) for id, made in self.encoded(rows, account, refusals))

    def encoded(self, rows: Iterable[Row | BadRow], account: Account, refusals: Refusals) -> Iterator[tuple[str, Encoded]]:
        """(id, tokens) of the examples. Reading and rendering go on while the tokenizer encodes the rows before."""
        rows = iter(rows)
        with ThreadPoolExecutor(1, "encode") as background:
            ahead: tuple[list[_Rendered], Future[list[list[Any]]]] | None = None
            while True:
                raw = _block(rows)
                block = [one for row in raw if (one := self._render(row, account, refusals)) is not None]
                following = (block, background.submit(self._submit, block)) if raw else None
                if ahead is not None:
                    rendered, encodings = ahead
                    for one, own in zip(rendered, encodings.result(), strict=True):
                        yield from self._finish(one, own, account, refusals)
                ahead = following
                if ahead is None:
                    break
        account.malformed, account.refused = refusals.count, refusals.listed

    def render(self, row: Row) -> list[Example]:
        """The examples of one row; `RowError` if it can't be used."""
        name, meaning = understand(row, self._source.format, self._source.fields)
        pieces = self.pieces(meaning)
        fitted = self._fitted(_Rendered(row.id, name, meaning, pieces), self._encode(pieces), Account())
        return [made.example(id) for id, made in fitted]

    def pieces(self, meaning: Meaning) -> list[Piece]:
        if self.config.chain.on:
            return chained(self._chain(meaning), self.config.chain, self._written)
        return self._written(meaning)

    def _chain(self, meaning: Meaning) -> Chain:
        if isinstance(meaning, Pair) and self._pairs_are_chats:
            meaning = as_talk(meaning)
        return chain_of(meaning, self.config.chain, self.tokenizer.eos_token)

    def _written(self, meaning: Meaning) -> list[Piece]:
        if isinstance(meaning, Talk):
            return self._chat.pieces(meaning)
        if isinstance(meaning, Pair):
            if self._pairs_are_chats:
                return self._chat.pieces(as_talk(meaning))
            return [self._pair(meaning)]
        return [self._plain(meaning)]

    def chain_question(self, id: str, meaning: Meaning) -> Question | None:
        """What a row asks that ends in a chain of thought."""
        chain, own = self._chain(meaning), self.config.chain
        if isinstance(chain.asked, Talk) and isinstance(meaning, Talk) and len(chain.asked.turns) < len(meaning.turns):
            return None  # somebody else speaks last
        asked = chain.asked.prompt if isinstance(chain.asked, Pair) else chain.asked.turns[-2].content
        if own.kind == "step_by_step":  # the answer is asked for without its rationale
            tokens = self._prompt_of(chain.answered(chain.answer, own.words[1]))
            return Question(id, asked, tuple(tokens), chain.answer)
        parts = self._encoder.parts(linked(chain, own, self._written))
        return Question(
            id, asked, tuple(parts.prompt), chain.answer, chain.rationale.strip(), tuple(parts.rationale), tuple(parts.cue)
        )

    def _prompt_of(self, asked: Talk | Pair) -> list[int]:
        if isinstance(asked, Pair):
            return self.pair_prompt(asked.prompt)
        return self.prompt(replace(asked, turns=asked.turns[:-1]))

    def prompt(self, talk: Talk) -> list[int]:
        """The tokens that lead the model to answer a conversation."""
        return self._encoder.ids(self._chat.prompt(talk))

    def pair_prompt(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token_id
        tokens = self._encoder.encode(text)
        return tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]

    @property
    def brought_template(self) -> bool:
        """Whether the chat template is not the model's own, so that who uses the adapters has to know it."""
        return bool(self.config.chat_template) or not self.had_template

    @property
    def pairs_are_chats(self) -> bool:
        return self._pairs_are_chats

    # One row

    def _render(self, row: Row | BadRow, account: Account, refusals: Refusals) -> _Rendered | None:
        if isinstance(row, Row) and not row.begins and self.config.max_seq_length < WHOLE:
            return None  # of a text whose first piece was refused
        account.rows += isinstance(row, BadRow) or row.begins
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            name, meaning = understand(row, self._source.format, self._source.fields)
            pieces = self.pieces(meaning) if row.begins and row.ends else self._part_of_text(row, meaning)
            rendered = _Rendered(row.id, name, meaning, pieces)
        except RowError as error:
            refusals.add(row.id, str(error))
            return None
        account.formats[name] += 1
        if not self.config.chain.on and not isinstance(meaning, Plain) and meaning.rationale is not None:
            account.notes["no_chain"] += 1
        return rendered

    def _submit(self, block: list[_Rendered]) -> list[list[Any]]:
        flat = iter(self._encoder.submit([piece for one in block for piece in one.pieces]))
        return [[next(flat) for _ in one.pieces] for one in block]

    def _encode(self, pieces: list[Piece]) -> list[Encoded]:
        encodings = self._encoder.submit(pieces)
        return [made for piece, own in zip(pieces, encodings, strict=True) for made in self._encoder.finish(piece, own)]

    def _finish(self, one: _Rendered, encodings: list[Any], account: Account, refusals: Refusals) -> list[tuple[str, Encoded]]:
        try:
            encoded = [
                made for piece, own in zip(one.pieces, encodings, strict=True) for made in self._encoder.finish(piece, own)
            ]
            made = self._fitted(one, encoded, account)
        except RowError as error:
            account.formats[one.format] -= 1
            refusals.add(one.id, str(error))
            return []
        for note in {note for each in encoded for note in each.notes}:
            account.notes[note] += 1
        if len(encoded) > 1 and not self.config.chain.on:
            account.notes["own_examples"] += 1
        for _, each in made:
            account.count(each)
        return made

    def _fitted(self, one: _Rendered, encoded: list[Encoded], account: Account) -> list[tuple[str, Encoded]]:
        """Within max_seq_length, and without those that train nothing."""
        limit = self.config.max_seq_length
        longest = max(len(each.tokens) for each in encoded)
        account.seen(longest, one.id)
        had = sum(each.supervised for each in encoded)
        if not had:
            account.without_target += 1
            return []
        if longest > limit:
            encoded = self._truncated(one, encoded, account)
            left = sum(each.supervised for each in encoded)
            account.long_rows += 1
            account.long_supervised_lost += had - left
            account.long_rows_lost += not left
        enough = [each for each in encoded if each.supervised >= self.config.min_supervised_tokens]
        if self.config.chain.on and len(enough) < len(encoded):  # a row's two tasks are trained together or not at all
            enough = []
        account.below_minimum += sum(1 for each in encoded if 0 < each.supervised < self.config.min_supervised_tokens)
        return [(f"{one.id}#{name}" if name else one.id, each) for name, each in zip(_names(enough), enough, strict=True)]

    # Too long

    def _truncated(self, one: _Rendered, encoded: list[Encoded], account: Account) -> list[Encoded]:
        limit, policy = self.config.max_seq_length, self.config.truncation
        if policy == "error":
            had = sum(each.supervised for each in encoded)
            for name in ("drop",) if self.config.chain.on else ("drop", "keep_end", "keep_start"):
                left = sum(self._cut(each, name).supervised for each in encoded)
                cost = account.policies.setdefault(name, [0, 0])
                cost[0] += not left
                cost[1] += had - left
            policy = "drop"
        if self.config.chain.on:
            return [each.cut(0, 0) for each in encoded]
        if policy == "split":
            return [each for each in self._split(one.meaning, limit) if len(each.tokens) <= limit]
        return [self._cut(each, policy) for each in encoded]

    def _cut(self, each: Encoded, policy: str) -> Encoded:
        limit = self.config.max_seq_length
        if len(each.tokens) <= limit:
            return each
        if policy == "drop":
            return each.cut(0, 0)
        if policy == "keep_start":
            return each.cut(0, limit)
        begun = self._begins(each)
        return each.cut(len(each.tokens) - limit + begun, len(each.tokens), before=begun)

    def _begins(self, each: Encoded) -> int:
        """1 if the example has a beginning-of-text token, which stays whatever is cut."""
        return int(each.tokens[0] == self.tokenizer.bos_token_id)

    def _split(self, meaning: Meaning, limit: int) -> Iterator[Encoded]:
        """Parts that fit: a conversation at the user's turns, text anywhere. What fits no part comes too long."""
        if isinstance(meaning, Plain) or self.config.train_on is TrainOn.ALL:
            (whole,) = self._encode(self.pieces(meaning))
            begun = self._begins(whole)
            for start in range(begun, len(whole.tokens), limit - begun):
                yield whole.cut(start, min(start + limit - begun, len(whole.tokens)), before=begun)
            return
        talk = as_talk(meaning) if isinstance(meaning, Pair) and self._pairs_are_chats else meaning
        if not isinstance(talk, Talk):
            yield from self._encode(self.pieces(meaning))
            return
        if self.config.train_on is TrainOn.LAST:  # of the row, not of each part
            last = max(place for place, turn in enumerate(talk.turns) if turn.role == "assistant")
            turns = tuple(turn if place == last else replace(turn, marks=False) for place, turn in enumerate(talk.turns))
            talk = replace(talk, turns=turns)
        system = talk.turns[:1] if talk.turns[0].role == "system" else ()
        rest = talk.turns[len(system) :]
        asks = [place for place, turn in enumerate(rest) if turn.role == "user" and place] + [len(rest)]
        start = 0
        while start < len(rest):
            fitting: list[Encoded] = []
            for end in (place for place in asks if place > start):
                tried = self._answers(replace(talk, turns=(*system, *rest[start:end])))
                if fitting and any(len(each.tokens) > limit for each in tried):
                    break
                fitting, until = tried, end
            yield from fitting
            start = until

    def _answers(self, talk: Talk) -> list[Encoded]:
        if not any(turn.role == "assistant" for turn in talk.turns):
            return []
        return self._encode(self._chat.pieces(talk))

    # Rows that are no chats

    def _pair(self, pair: Pair) -> Piece:
        completion = _without_end(pair.completion, self.tokenizer.eos_token)
        text, begin = pair.prompt + completion, len(pair.prompt)
        escaped = self._chat.specials.in_letters(text)
        spans, eos = self._marked(pair.marks, completion, begin, pair.weight)
        if self.config.train_on is TrainOn.ALL:
            spans, eos = [Span(0, len(text), pair.weight, exact=False)], pair.weight
        notes = ["escaped"] * escaped + ["ended_already"] * (completion != pair.completion)
        return Piece(text, spans, bos=True, eos=eos, escaped=escaped, notes=notes)

    def _part_of_text(self, row: Row, meaning: Meaning) -> list[Piece]:
        """A piece of a text that is too long to be a row."""
        if self.config.max_seq_length < WHOLE or not isinstance(meaning, Plain):
            raise RowError("a text of more than 64 KB, which is too long for one example; windows: on trains all of it.")
        piece = self._plain(meaning)
        return [replace(piece, bos=row.begins, eos=piece.eos if row.ends else None, goes_on=not row.ends)]

    def _plain(self, plain: Plain) -> Piece:
        found = self._chat.specials.pattern.search(plain.text)
        notes = ["obeyed"] if found else []
        spans, eos = self._marked(plain.marks, plain.text, 0, plain.weight)
        spans = [replace(span, exact=False) for span in spans]
        return Piece(plain.text, spans, bos=True, eos=eos, notes=notes)

    def _marked(self, marks: Marks, text: str, begin: int, weight: float) -> tuple[list[Span], float]:
        if marks is None:
            marks = self.config.train_on is not TrainOn.MARKED
        if isinstance(marks, bool):
            return ([Span(begin, begin + len(text), weight)], weight) if marks else ([], 0.0)
        if outside := next((mark for mark in marks if mark[1] > len(text)), None):
            raise RowError(f"train: [{outside[0]}, {outside[1]}] came, the text has {len(text)} characters.")
        spans = [Span(begin + start, begin + end, weight * own, exact=start == 0 and begin > 0) for start, end, own in marks]
        return spans, weight * next((own for _, end, own in marks if end == len(text)), 0.0)


@dataclass(frozen=True)
class _Rendered:
    """A row, and what became of it up to its text."""

    id: str
    format: str
    meaning: Meaning
    pieces: list[Piece]


@dataclass(frozen=True)
class Question:
    """What a model is asked, as text and as the tokens that lead it to answer, and the answer in the data."""

    id: str
    text: str
    prompt: tuple[int, ...]
    expected: str
    rationale: str | None = None  # in the data, where the answer is a chain of thought
    rationale_tokens: tuple[int, ...] = ()  # as they are trained, without an end
    cue_tokens: tuple[int, ...] = ()  # which lead from a rationale to the answer
    task: str = ""  # of several, the one that it belongs to


def question(row: Row, renderer: Renderer, source: SourceConfig) -> Question | None:
    """The last question of a row and its answer; nothing where a row ends otherwise."""
    try:
        _, meaning = understand(row, source.format, source.fields)
        if renderer.config.chain.on:
            return renderer.chain_question(row.id, meaning)
        if isinstance(meaning, Pair) and not renderer.pairs_are_chats:
            return Question(row.id, meaning.prompt, tuple(renderer.pair_prompt(meaning.prompt)), meaning.completion)
        talk = as_talk(meaning) if isinstance(meaning, Pair) else meaning
        if not isinstance(talk, Talk) or len(talk.turns) < 2 or talk.turns[-1].role != "assistant":
            return None
        *before, last = talk.turns
        prompt = renderer.prompt(replace(talk, turns=tuple(before)))
    except RowError:
        return None
    return Question(row.id, before[-1].content, tuple(prompt), last.content) if last.content else None


def as_talk(pair: Pair) -> Talk:
    asked = Turn("user", {"role": "user", "content": pair.prompt})
    answer = Turn("assistant", {"role": "assistant", "content": pair.completion}, marks=pair.marks)
    return Talk((asked, answer), weight=pair.weight, rationale=pair.rationale)


def too_long(account: Account, config: RenderConfig) -> str:
    """What to say where long rows end the run: what each policy would cost."""
    length, id = max(account.longest)
    costs = account.policies
    lines = [
        f"{account.long_rows:,} of {account.rows:,} rows {'is' if account.long_rows == 1 else 'are'} longer than "
        f"max_seq_length {config.max_seq_length:,}; the longest, {id}, has {length:,} tokens. "
        "Nothing is cut unless you say how:",
        f"  --max-seq-length {length:<7} nothing is lost",
    ]
    for name, what in (
        ("drop", "leaves these rows out"), ("keep_end", "cuts their start"), ("keep_start", "cuts their end"),
    ):  # fmt: skip
        if name in costs:
            rows, tokens = costs[name]
            gone = f", {_rows(rows)} with nothing left" if rows else ""
            lines.append(f"  --truncation {name:<11} {what}: {tokens:,} trained tokens lost{gone}")
    if not config.chain.on:
        lines.append("  --truncation split       makes several examples of a row, cut at turn borders")
    return "\n".join(lines)


def _names(examples: Sequence[Encoded]) -> list[str]:
    """What tells the examples of a row apart: their own names, or numbers where there are several."""
    if len(examples) == 1 or any(each.name for each in examples):
        return [each.name for each in examples]
    return [str(number) for number in range(1, len(examples) + 1)]


def _block(rows: Iterator[Row | BadRow]) -> list[Row | BadRow]:
    """The next rows to encode at once."""
    taken: list[Row | BadRow] = []
    letters = 0
    while len(taken) < _BLOCK and letters < _LETTERS and (row := next(rows, None)) is not None:
        taken.append(row)
        text = row.value.get("text") if isinstance(row, Row) else None
        letters += len(text) if isinstance(text, str) else 0
    return taken


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"


def _without_end(text: str, end: str | None) -> str:
    return text.rstrip().removesuffix(end) if end and text.rstrip().endswith(end) else text
