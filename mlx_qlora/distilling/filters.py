"""Which of a teacher's answers are worth learning from, and why the others are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_qlora.distilling.loops import loops
from mlx_qlora.distilling.prompts import Prompt
from mlx_qlora.errors import ConfigError, listed, require
from mlx_qlora.look.evaluation.numerals import last_number
from mlx_qlora.look.evaluation.own_metric import load_function, one_line

# Why an answer is left out, in the order in which this is asked, and how it is told.
REASONS = {
    "empty": "empty",
    "looping": "goes in circles",
    "truncated": "cut off, without an end",
    "control": "holds a control token",
    "short": "shorter than wanted",
    "pattern": "without the pattern",
    "number": "another number than expected",
    "check": "refused by the check",
    "duplicate": "the same as another answer to its prompt",
    "surplus": "an earlier answer to its prompt was kept",
}


@dataclass(frozen=True)
class FilterConfig:
    """What is left out besides what is empty, goes in circles, or has no end."""

    min_answer_tokens: int = 1
    """Shorter answers are left out."""
    check_pattern: str = ""
    """A regular expression that must be found in an answer, such as '####\\s*-?\\d'."""
    check_number: bool = False
    """The last number of an answer must be the last one of the answer in the data."""
    check: str = ""
    """A Python function of your own as package.module:function; (row, answer) -> bool says whether an answer is right."""
    keep: Literal["all", "first"] = "all"
    """With several answers to a prompt: all that are right and differ, or the first one that is right."""

    def __post_init__(self) -> None:
        require((self.min_answer_tokens >= 1, "min_answer_tokens", self.min_answer_tokens, "a whole number from 1"))


@dataclass(frozen=True)
class Answer:
    """What the teacher said."""

    text: str
    tokens: int
    ended: bool  # by itself, and not because it was as long as it may be
    control: str = ""  # a control token inside of it


@dataclass(frozen=True)
class Verdict:
    """An answer, and why it is left out; without a reason it is kept."""

    prompt: Prompt
    number: int  # of the answers to this prompt, from 1
    answer: Answer
    reason: str = ""
    detail: str = ""


# What is wrong with an answer; empty where nothing is.
Check = Callable[[Prompt, Answer], str]


def checks(config: FilterConfig, prompts: Sequence[Prompt]) -> dict[str, Check]:
    """What each answer is asked, by the reason. What is wrong with a check itself is said before a teacher has answered."""
    made: dict[str, Check] = {
        "empty": lambda prompt, answer: "" if answer.text.strip() else "nothing was said",
        "looping": lambda prompt, answer: loops(answer.text),
        "truncated": lambda prompt, answer: "" if answer.ended else f"no end after {answer.tokens:,} tokens",
        "control": lambda prompt, answer: answer.control,
    }
    if config.min_answer_tokens > 1:
        least = config.min_answer_tokens
        made["short"] = lambda prompt, answer: f"{answer.tokens:,} tokens" if answer.tokens < least else ""
    if config.check_pattern:
        made["pattern"] = _pattern(config.check_pattern)
    if config.check_number:
        _require_numbers(prompts)
        made["number"] = _other_number
    if config.check:
        made["check"] = _own(config.check, prompts[0])
    return made


def judged(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]], asked: dict[str, Check], config: FilterConfig
) -> list[Verdict]:
    """A verdict for each answer to each prompt, in their order."""
    return [one for prompt, own in zip(prompts, answers, strict=True) for one in _of_prompt(prompt, own, asked, config)]


def counted(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many answers are left out for which reason, in the order of the reasons."""
    found = Counter(each.reason for each in verdicts)
    return {reason: found[reason] for reason in REASONS if found[reason]}


def _of_prompt(prompt: Prompt, answers: Sequence[Answer], asked: dict[str, Check], config: FilterConfig) -> list[Verdict]:
    kept: dict[str, int] = {}
    made = []
    for number, answer in enumerate(answers, start=1):
        reason, detail = next(((name, said) for name, check in asked.items() if (said := check(prompt, answer))), ("", ""))
        same = " ".join(answer.text.split())
        if not reason and same in kept:
            reason, detail = "duplicate", f"of answer {kept[same]}"
        elif not reason and kept and config.keep == "first":
            reason, detail = "surplus", f"answer {min(kept.values())} is kept"
        elif not reason:
            kept[same] = number
        made.append(Verdict(prompt, number, answer, reason, detail))
    return made


def _pattern(pattern: str) -> Check:
    try:
        wanted = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"check_pattern: {pattern!r} came, a regular expression is expected: {error}.") from error
    return lambda prompt, answer: "" if wanted.search(answer.text) else f"{pattern} is not in it"


def _require_numbers(prompts: Sequence[Prompt]) -> None:
    lacking = [each for each in prompts if not last_number(each.expected)]
    if lacking:
        lines = [
            f"{each.id}: {f'no number is in its answer {each.expected!r:.60}' if each.expected else 'it has no answer'}"
            for each in lacking
        ]
        raise ConfigError(
            f"check_number: {len(lacking):,} of {len(prompts):,} rows have no number that an answer could be compared with. "
            f"Take them out, or leave check_number out.\n{listed(lines, 5)}"
        )


def _other_number(prompt: Prompt, answer: Answer) -> str:
    found, expected = last_number(answer.text), last_number(prompt.expected)
    if found & expected:
        return ""
    wanted = _number(expected)
    return f"{_number(found)} came, {wanted} is expected" if found else f"no number came, {wanted} is expected"


def _number(readings: frozenset[Any]) -> str:
    one = min(readings, key=str)
    return ":".join(map(str, one)) if isinstance(one, tuple) else f"{one:f}"


def _own(name: str, prompt: Prompt) -> Check:
    """A person's function, tried once with the first row's own answer."""
    function = load_function(name, "--check", "(row, answer) -> bool")

    def check(prompt: Prompt, answer: Answer) -> str:
        return "" if _agrees(name, function, prompt, answer.text) else f"{name} gave False"

    _agrees(name, function, prompt, prompt.expected)
    return check


def _agrees(name: str, function: Any, prompt: Prompt, answer: str) -> bool:
    try:
        value = function(dict(prompt.row), answer)
    except Exception as error:  # a person's own code: it may raise anything
        raise ConfigError(
            f"--check {name}: it raised {type(error).__name__}: {one_line(error)}, when it was called with the row "
            f"{prompt.id} and answer={answer!r:.80}."
        ) from error
    if not (isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")):
        raise ConfigError(
            f"--check {name}: {value!r:.60} came for the row {prompt.id} and answer={answer!r:.80}; True or False is expected."
        )
    return bool(value)
