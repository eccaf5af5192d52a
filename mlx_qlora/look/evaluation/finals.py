"""The final answer at the end of a text that reasons: a number, an option, or a phrase; and whether it is the expected one.

What is marked as the answer counts before all else: `#### 42` (GSM8K), \\boxed{42}, "the answer is 42" (BBH). Where nothing
is, a number is the last one of the text, an option is what the text begins or ends with, a phrase is its last line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_qlora.look.evaluation.numerals import is_number, last_value, leading_value
from mlx_qlora.look.evaluation.scores import Named, words

FinalKind = Literal["number", "option", "text"]
# What a text's final answer can be read as; nothing: none is in it.
Readings = frozenset[Hashable]
NONE: Readings = frozenset()

_MARK = "####"
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SAID = re.compile(
    r"\b(?:answer|resposta|respuesta|r[ée]ponse|risposta|antwort)\b[^.\n:=]{0,40}?(?:\b(?:is|be|é|es|est|ist|è)\b\s*:?|[:=])[\s*_]*",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"\n|[.;!?](?=\s|$)|,\s|\s\(|\s[-–—]\s|\b(?:because|since|as|for|not|porque|pois)\b", re.IGNORECASE)
_NEGATED = re.compile(r"[\s*_]*(?:not|não|no es|nicht)\b", re.IGNORECASE)
_DENIED = re.compile(r"(?:(?![.,;!?](?:\s|$)|\n|\s(?:but|mas|sino|mais|sondern)\b).)*[.!?]?", re.IGNORECASE)
# Answers that are one of two words.
_PAIRS = (
    ("yes", "no"), ("true", "false"), ("valid", "invalid"), ("plausible", "implausible"), ("correct", "incorrect"),
    ("sim", "não"), ("verdadeiro", "falso"), ("sí", "no"), ("ja", "nein"), ("oui", "non"),
)  # fmt: skip


@dataclass(frozen=True)
class Final:
    """How the final answers of some questions are read."""

    kind: FinalKind
    read: Callable[[str], Readings]  # of what a model said
    expect: Callable[[str], Readings]  # of what the data has

    def right(self, answer: str, expected: str) -> float:
        return float(bool(self.read(answer) & self.expect(expected)))

    def found(self, answer: str) -> bool:
        """Whether there is a final answer at all, be it right or wrong."""
        return bool(self.read(answer))


def kind_of(expected: Sequence[str]) -> FinalKind | None:
    """What the expected answers of a task all are, if they are of one kind that a final answer can be told of.

    >>> kind_of(["3 + 4 = 7\\n#### 7", "1,200"]), kind_of(["(A)", "(C)"]), kind_of(["Yes", "no."]), kind_of(["in 1927"])
    ('number', 'option', 'option', None)
    """
    if not expected:
        return None
    if all(is_number(_marked(each) or each) for each in expected):
        return "number"
    if all(_letter_alone(_marked(each) or each) for each in expected) or _pair_of(expected):
        return "option"
    return None


def final(kind: FinalKind, expected: Sequence[str], options: Sequence[str] = ()) -> Final:
    """The reader for a task with these answers; `options`: what can be answered, where these are no letters."""
    if kind == "number":
        return Final(kind, final_number, final_number)
    if kind == "text":
        return Final(kind, final_text, _expected_text)
    letters = [_letter_alone(_marked(each) or each) for each in expected]
    if all(letters) and not options:
        last = max("E", *letters)

        def read(text: str) -> Readings:
            return final_letter(text, last)

        return Final(kind, read, lambda text: frozenset(_letter_alone(_marked(text) or text)))
    named = tuple(options) or _pair_of(expected) or tuple(dict.fromkeys(_marked(each) or each for each in expected))
    option = _Words(named)
    return Final(kind, option.read, lambda text: frozenset({tuple(words(_marked(text) or text))} - {()}))


@dataclass(frozen=True)
class Finals:
    """The scores of final answers: one where all tasks are of a kind, else `final_answer`, which is another in each task."""

    scores: tuple[Named, ...] = ()
    kinds: tuple[tuple[str, FinalKind], ...] = ()  # of each task

    @property
    def name(self) -> str:
        """Of the score."""
        return self.scores[0].name if self.scores else ""


def finals_for(asked: Sequence[tuple[str, str]], wanted: FinalKind | None = None, options: Sequence[str] = ()) -> Finals:
    """For questions as (task, expected answer). Where no task's answers are numbers or options there is none, unless one is
    `wanted`. Of a task whose answers are neither, beside others, it is the phrase that counts.

    >>> finals_for([("sums", "4"), ("sums", "5"), ("sorted", "a b"), ("sorted", "b c")]).kinds
    (('sums', 'number'), ('sorted', 'text'))
    """
    tasks: dict[str, list[str]] = {}
    for task, expected in asked:
        tasks.setdefault(task, []).append(expected)
    told = {task: wanted or kind_of(expected) for task, expected in tasks.items()}
    if not any(told.values()):
        return Finals()
    kinds: dict[str, FinalKind] = {task: kind or "text" for task, kind in told.items()}
    name = f"final_{min(kinds.values())}" if len(set(kinds.values())) == 1 else "final_answer"
    made = []
    for task, kind in kinds.items():
        how = final(kind, tasks[task], options)
        made.append(Named(name, how.right, frozenset({task}), how.found))
    return Finals(tuple(made), tuple(kinds.items()))


# Numbers


def final_number(text: str) -> Readings:
    """The number that is marked as the answer, else the last one.

    >>> final_number("2 + 2 = 4, times 3 is 12.\\n#### 12") == final_number("So the answer is $12.00 (4 times 3).")
    True
    """
    if _MARK in text:
        return last_value(_marked(text))  # what is marked and is no number is no answer
    if boxed := _BOXED.findall(text):
        return last_value(boxed[-1])
    return leading_value(_CLAUSE.split(_said(text))[0]) or last_value(_undenied(text))


# Options that are letters

_ALONE = re.compile(r"[\s*_\"'`]*\(?([A-Za-z])(?:[).:][*_]*(?:\s+\S.*)?|[*_]*)[\s.\"'`]*", re.DOTALL)
_EXPECTED = re.compile(r"\(([A-Za-z])\)(?:\s.*)?|([A-Z])(?:[.):](?:\s.*)?)?|([a-z])[.)]", re.DOTALL)
_NAMED = r"(?:option|choice|letter|opção|alternativa|letra)"
_IN_CLAUSE = re.compile(rf"[\s*_\"'`]*(?:{_NAMED}\s+)?[*_\"'`]*(\()?([A-Za-z])(?![\w'’])(.{{0,12}})", re.IGNORECASE | re.DOTALL)
_ANOTHER = re.compile(r"[)*_\"'`]*\s*(?:or|and|ou|e|/|,|&)\s*(?:option\s+)?\(?[A-Za-z](?![\w'’])", re.IGNORECASE)
_ONE_OF_TWO = re.compile(r"(?<![\w'’])\(?[A-Za-z]\)?[*_]*(?:\s+(?:or|and|ou|e)\s+|\s*[/,&]\s*)[*_]*\(?$")
_ENDS = re.compile(r"\s*(?:$|[).,;:!*_\"'`\n]|[-–—]|because\b|since\b|as\b|for\b)")
_RIGHT = re.compile(r"(?<![\w'’])\(?([A-Z])\)?[*_]*\s+(?:is|must be)\s+(?:the\s+)?(?:correct|right|best|answer)\b")
_CALLED = re.compile(rf"\b{_NAMED}[\s:*_\"'`]*\(?([A-Z])(?![\w'’])", re.IGNORECASE)
_BRACKETED = re.compile(r"(?<!\w)\(([A-Za-z])\)")
_BARE = re.compile(r"(?<![\w'’(])([B-HJ-Z]|[AI](?=\s*(?:$|[.,;:!?)*\n])))(?![\w'’])(?!\))")


def final_letter(text: str, last: str = "E") -> Readings:
    """The option that is marked or named as the answer, else a letter that is all there is, at the beginning, or the last one.
    Where two are named as the answer, none is.

    >>> [*final_letter("(A) is a city, so the answer is (B).")], [*final_letter("b) Paris")], [*final_letter("A or B")]
    (['B'], ['B'], [])
    """
    for way in (_letter_marked, _letter_said, _letter_named, _letter_of_lines, _letter_last):
        found = way(text if way is _letter_marked else _undenied(text))
        if found is not None:
            return frozenset(found) if "A" <= found <= last else NONE
    return NONE


def _letter_marked(text: str) -> str | None:
    """None: nothing is marked; empty: what is marked is no letter."""
    marked = _marked(text) if _MARK in text else (_BOXED.findall(text) or [None])[-1]
    return None if marked is None else _letter_alone(re.sub(r"\\text\{(.*?)\}", r"\1", marked))


def _letter_said(text: str) -> str | None:
    found = _IN_CLAUSE.match(_said(text))
    if found is None:
        return None
    opened, letter, after = found.groups()
    if _ANOTHER.match(after):
        return ""
    return letter.upper() if opened or _ENDS.match(after) or letter in "BCDEFGHJKLMNOPQRSTUVWXYZ" else None


def _letter_named(text: str) -> str | None:
    if right := [*_RIGHT.finditer(text)]:
        return right[-1][1]
    if called := [*_CALLED.finditer(text)]:
        return "" if _ANOTHER.match(text, called[-1].end()) else called[-1][1].upper()
    return None


def _letter_of_lines(text: str) -> str | None:
    """Of a last line that is nothing but a letter, or of a text that begins with one and lists no others."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if alone := re.fullmatch(r"[\s*_\"'`]*\(?([A-Za-z])[).]*[*_.\"'`\s]*", lines[-1]):
        return alone[1].upper()
    begun = [found for line in lines if (found := _ALONE.fullmatch(line))]
    if not _ALONE.fullmatch(lines[0]) or len({found[1].upper() for found in begun}) > 1:
        return None
    return "" if _ANOTHER.match(lines[0], begun[0].end(1)) else begun[0][1].upper()


def _letter_last(text: str) -> str | None:
    for pattern in (_BRACKETED, _BARE):
        if found := [*pattern.finditer(text)]:
            return "" if _ONE_OF_TWO.search(text[: found[-1].start()]) else found[-1][1].upper()
    return None


def _letter_alone(text: str) -> str:
    """Of an expected answer, such as (B), B. or (B) Paris; empty where it is none."""
    found = _EXPECTED.fullmatch(text.strip())
    return next(letter for letter in found.groups() if letter).upper() if found else ""


# Options that are words


class _Words:
    """Options such as yes and no. Of a pair, "not" before the one says the other."""

    def __init__(self, options: Sequence[str]):
        known = [tuple(words(each)) for each in options]
        self._other = {known[0]: known[1], known[1]: known[0]} if len(known) == 2 else {}
        longest_first = sorted(known, key=len, reverse=True)
        self._pattern = re.compile(
            rf"(?<!\S)(not |não )?({'|'.join(re.escape(' '.join(each)) for each in longest_first)})(?!\S)"
        )

    def read(self, text: str) -> Readings:
        if _MARK in text:
            return self._one(_marked(text), first=True)
        if boxed := _BOXED.findall(text):
            return self._one(boxed[-1], first=True)
        said = [*_SAID.finditer(text)]
        if said and (found := self._one(text[said[-1].end() :].split("\n")[0], first=True)):
            return found
        begin = self._pattern.match(" ".join(words(text)))
        return self._meant(begin) if begin else self._one(text, first=False)

    def _one(self, text: str, first: bool) -> Readings:
        found = [*self._pattern.finditer(" ".join(words(text)))]
        return self._meant(found[0 if first else -1]) if found else NONE

    def _meant(self, found: re.Match[str]) -> Readings:
        option = tuple(found[2].split())
        return frozenset({self._other.get(option, ()) if found[1] else option} - {()})


def _pair_of(expected: Sequence[str]) -> tuple[str, str] | None:
    said = {" ".join(words(_marked(each) or each)) for each in expected}
    return next((pair for pair in _PAIRS if said <= set(pair)), None)


# Phrases


def final_text(text: str) -> Readings:
    """All that the final answer can be: what is marked or said to be it, the last line, the whole."""
    if _MARK in text:
        said = [_marked(text)]
    else:
        said = [*_BOXED.findall(text)[-1:], *(text[found.end() :].split("\n")[0] for found in [*_SAID.finditer(text)][-1:])]
        said += [text, *text.strip().splitlines()[-1:]]
    return frozenset({_phrase(each) for each in said} - {()})


def _expected_text(text: str) -> Readings:
    return frozenset({_phrase(_marked(text) or text)} - {()})


def _phrase(text: str) -> tuple[str, ...]:
    return tuple(words(text.strip().strip("*_`\"'").removesuffix(".")))


# What is marked


def _marked(text: str) -> str:
    """What stands after the last ####, in that line."""
    _, mark, after = text.rpartition(_MARK)
    return after.strip().split("\n")[0] if mark else ""


def _said(text: str) -> str:
    """What follows the last "the answer is"; nothing where the answer is said not to be something."""
    found = [*_SAID.finditer(text)]
    after = text[found[-1].end() :] if found else ""
    return "" if _NEGATED.match(after) else after


def _undenied(text: str) -> str:
    """A text without what the answer is said not to be.

    >>> _undenied("It is 43, so the answer is not 42."), _undenied("The answer is not (A) but (B).")
    ('It is 43, so the ', 'The  but (B).')
    """
    kept, begin = "", 0
    for found in _SAID.finditer(text):
        if _NEGATED.match(text, found.end()):
            kept, begin = kept + text[begin : found.start()], _DENIED.match(text, found.end()).end()  # type: ignore[union-attr]
    return kept + text[begin:]
