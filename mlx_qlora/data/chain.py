"""Chains of thought: a rationale and its answer, learnt as two weighted tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from mlx_qlora.data.formats import Meaning, Pair, Plain, RowError, Talk, rationale_of
from mlx_qlora.errors import require

_GROUPS = ("rationale", "answer")
_THOUGHT = ("reasoning_content", "thinking")  # where a message may bring its rationale
_SHOWN = 60  # letters of an answer in a reason
_NO_SPANS = "{}train: spans can't be chosen in a chain of thought; chain.alpha weighs its parts."


@dataclass(frozen=True)
class ChainConfig:
    """How answers that come with a rationale are learnt. Of a chat the last answer is; the turns before are its question."""

    kind: Literal["off", "cascod", "step_by_step"] = "off"
    """cascod: question -> rationale, and question with rationale -> answer, in one pass; step_by_step: question -> rationale
    and question -> answer, told apart by a word before the question."""
    alpha: float = 0.5
    """The answer's share of a row's loss; the rationale has the rest. So every row counts alike, however long it is."""
    cue: str = "\n#### "
    """What stands between rationale and answer, with the white space that it shall have; that of the rows does not count."""
    pattern: str = ""
    """A regular expression with the groups (?P<rationale>...) and (?P<answer>...), which takes a whole answer apart; . is any
    letter. Without it rows have a field `rationale` beside their answer, or their answers hold the cue."""
    words: tuple[str, str] = ("[rationale] ", "[answer] ")
    """For step_by_step: what stands before a question that asks for the rationale, and for the answer."""

    def __post_init__(self) -> None:
        require(
            (0 <= self.alpha <= 1, "chain.alpha", self.alpha, "a number from 0 to 1"),
            (bool(self.cue), "chain.cue", self.cue, "a text, which tells where the answer begins,"),
            (len(set(self.words)) == 2, "chain.words", self.words, "two different texts"),
        )
        if wrong := _wrong(self.pattern):
            require((False, "chain.pattern", self.pattern, f"an expression with both groups ({wrong})"))

    @property
    def on(self) -> bool:
        return self.kind != "off"

    def __str__(self) -> str:
        shares = f"rationale {1 - self.alpha:g} and answer {self.alpha:g} of a row's loss"
        if self.kind == "cascod":
            return f"cascod: {shares}, in one pass with {self.cue!r} between"
        return f"step_by_step: {shares}, asked for with {self.words[0]!r} and {self.words[1]!r}"


def _wrong(pattern: str) -> str:
    """What keeps an expression from taking answers apart."""
    if not pattern:
        return ""
    try:
        missing = [f"(?P<{name}>...)" for name in _GROUPS if name not in re.compile(pattern).groupindex]
    except re.error as error:
        return f"{error.msg}{'' if error.pos is None else f' at letter {error.pos + 1}'}"
    return f"{' and '.join(missing)} is missing" if missing else ""


# A row's last answer as a chain


class Chain(NamedTuple):
    """A row that asks, and what is answered in two parts."""

    asked: Talk | Pair  # ends with the answer that is to be replaced
    rationale: str
    answer: str

    def answered(self, text: str, word: str = "") -> Talk | Pair:
        """The row with another answer, and a word before its question."""
        if isinstance(self.asked, Pair):
            return replace(self.asked, prompt=word + self.asked.prompt, completion=text)
        turns, last = self.asked.turns[:-1], self.asked.turns[-1]
        if word:
            place = max(place for place, turn in enumerate(turns) if turn.role == "user")
            named = replace(turns[place], shown={**turns[place].shown, "content": word + turns[place].content})
            turns = (*turns[:place], named, *turns[place + 1 :])
        return replace(self.asked, turns=(*turns, replace(last, shown={**last.shown, "content": text})))


def chain_of(meaning: Meaning, config: ChainConfig, end: str | None) -> Chain:
    """The chain that a row ends with; `RowError` where it has none. `end` are the letters of the end of a text."""
    if isinstance(meaning, Plain):
        raise RowError("a text without a question came; a chain of thought answers one (chain.kind).")
    if isinstance(meaning, Talk):
        meaning, text, given = _last_answer(meaning)
    else:
        text, given = meaning.completion, rationale_of(meaning)
        if isinstance(meaning.marks, tuple):
            raise RowError(_NO_SPANS.format(""))
    rationale, answer = (_ended(part, end) for part in ((given, text) if given is not None else _apart(text, config, end)))
    for name, part in zip(_GROUPS, (rationale, answer), strict=True):
        if not part.strip():
            raise RowError(f"{name}: an empty text; a chain of thought needs both (chain.kind).")
    # A completion goes on where its prompt ends, with the space that it begins with.
    return Chain(meaning, rationale.rstrip() if isinstance(meaning, Pair) else rationale.strip(), answer.strip())


def _last_answer(talk: Talk) -> tuple[Talk, str, str | None]:
    """(the conversation up to its last answer, that answer, the rationale beside it)."""
    place = max(place for place, turn in enumerate(talk.turns) if turn.role == "assistant")
    last = talk.turns[place]
    if "tool_calls" in last.shown:
        raise RowError(f"messages[{place}]: the last answer calls a tool, so it is no chain of thought (chain.kind).")
    if isinstance(last.marks, tuple):
        raise RowError(_NO_SPANS.format(f"messages[{place}]."))
    if not any(turn.role == "user" for turn in talk.turns[:place]):
        raise RowError(f"messages[{place}]: an answer without a question; a chain of thought needs one (chain.kind).")
    thought = next((str(last.shown[key]) for key in _THOUGHT if last.shown.get(key)), None)
    bare = replace(last, shown={key: value for key, value in last.shown.items() if key not in _THOUGHT})
    return replace(talk, turns=(*talk.turns[:place], bare)), last.content, rationale_of(talk) or thought


def _apart(text: str, config: ChainConfig, end: str | None) -> tuple[str, str]:
    text = _ended(text, end).rstrip()
    if config.pattern:
        found = re.fullmatch(config.pattern, text, re.DOTALL)
        if found is None:
            raise RowError(f"no rationale: {_beginning(text)} does not match chain.pattern as a whole.")
        return found["rationale"] or "", found["answer"] or ""
    sign = config.cue.strip() or config.cue
    rationale, found_sign, answer = text.rpartition(sign)
    if not found_sign:
        raise RowError(f'no rationale: {_beginning(text)} does not hold {sign!r} (chain.cue), and no "rationale" is beside it.')
    return rationale, answer


def _beginning(text: str) -> str:
    return f"the answer {text[:_SHOWN].strip()!r}{'...' if len(text) > _SHOWN else ''}"


def _ended(text: str, end: str | None) -> str:
    """A text without the letters of an end of text, which it gets anyway."""
    return text.rstrip().removesuffix(end) if end and text.rstrip().endswith(end) else text


# The two tasks in one


@dataclass(frozen=True)
class Link:
    """What follows the text of a prompt with its rationale."""

    cue: str
    answer: str
    stop: str  # letters of the token that ends an answer; "": the end-of-text token
    shares: tuple[float, float]  # of rationale and answer


class Parts(NamedTuple):
    """A chain in tokens, each part encoded apart from the others, so that no border can move."""

    prompt: list[int]
    rationale: list[int]
    cue: list[int]
    answer: list[int]
    stop: int


def in_one_pass(parts: Parts, shares: tuple[float, float]) -> tuple[list[int], list[tuple[int, int, float]], dict[int, int]]:
    """(tokens, spans with weights, what has to be predicted in place of a token) of both tasks.

    The rationale with its end is a beginning of the whole but for that end, which is predicted where the cue begins. The
    weights of each task sum up to its share.

    >>> in_one_pass(Parts([1, 5], [6, 7, 8], [4, 9], [3], stop=2), (0.6, 0.4))
    ([1, 5, 6, 7, 8, 4, 9, 3, 2], [(2, 6, 0.15), (7, 9, 0.2)], {5: 2})
    """
    before, cue = len(parts.prompt), len(parts.prompt) + len(parts.rationale)
    answer = cue + len(parts.cue)
    tokens = [*parts.prompt, *parts.rationale, *parts.cue, *parts.answer, parts.stop]
    rationale_weight = shares[0] / (len(parts.rationale) + 1)
    answer_weight = shares[1] / (len(parts.answer) + 1)
    spans = [(before, cue + 1, rationale_weight), (answer, len(tokens), answer_weight)]
    return tokens, spans, {cue: parts.stop} if rationale_weight else {}


def shared_out(spans: Sequence[tuple[int, int, float]], share: float) -> list[tuple[int, int, float]]:
    """Spans whose tokens have an equal part of a share each."""
    whole = sum(end - first for first, end, _ in spans)
    return [(first, end, weight * share / whole) for first, end, weight in spans]
