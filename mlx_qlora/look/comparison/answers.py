"""The scores of a run's answers, question by question, as its folder has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_qlora.files import json_lines, json_object
from mlx_qlora.look.comparison.statistics import Interval
from mlx_qlora.look.evaluation.finals import final_number
from mlx_qlora.look.evaluation.generate import score
from mlx_qlora.look.evaluation.written import LOSSES, PREDICTIONS, REPORT
from mlx_qlora.look.history import number

Question = tuple[str, str, str]  # its id, its text, the answer in the data: only the same in all three is the same
Measured = tuple[str, str, float]  # an example: its id, the digest of its tokens, its weight; the same in all three only
Scores = dict[str, dict[Question, float]]  # by the score's name

EVALUATED, TRAINED = PREDICTIONS, "answers.jsonl"
# The one that a verdict speaks of is the first that is there.
FINALS = ("final_number", "final_option", "final_text", "final_answer")
ORDER = (*FINALS, "token_f1", "accuracy", "numeric_accuracy", "rouge_l", "chrf", "exact_match")


@dataclass(frozen=True)
class Answers:
    """Of one run; empty where it has answered nothing."""

    file: str = ""
    tuned: Scores = field(default_factory=dict)
    base: Scores = field(default_factory=dict)  # of the model without adapters
    unread: int = 0  # lines that can't be read
    report: dict[str, Any] = field(default_factory=dict)  # evaluation_report.json
    losses: dict[Measured, float] = field(default_factory=dict)  # nats a token

    @property
    def questions(self) -> set[Question]:
        return set().union(*self.tuned.values())

    def reported(self, name: str) -> Interval:
        """A score as the evaluation has it, with its interval; NaN where it has none."""
        found: Any = self.report
        for key in ("scores", name, "tuned"):
            found = found.get(key) if isinstance(found, dict) else None
        return interval_of(found)


def read_answers(folder: Path) -> Answers:
    """What `evaluate` left, or else what the end of `train` did."""
    report = json_object(folder / REPORT)
    losses = _losses(folder)
    for file, scores_of in _SCORES_OF.items():
        lines = json_lines(folder / file)
        read = [(question, *scores_of(line)) for line in lines if (question := _question(line))]
        if read:
            tuned, base = ({question: each[place] for question, *each in read} for place in (0, 1))
            return Answers(file, _by_name(tuned), _by_name(base), _count(folder / file) - len(read), report, losses)
    return Answers(report=report, losses=losses)


def interval_of(found: object) -> Interval:
    """Of the figures of a report."""
    figures = found if isinstance(found, dict) else {}
    return Interval(*(number(figures.get(name)) for name in ("value", "low", "high")))


def _losses(folder: Path) -> dict[Measured, float]:
    found = {}
    for line in json_lines(folder / LOSSES):
        weight, loss = number(line.get("weight")), number(line.get("loss"))
        if weight > 0 and math.isfinite(loss):
            found[str(line.get("id")), str(line.get("digest")), weight] = loss
    return found


def _question(line: Mapping[str, Any]) -> Question | None:
    id, question, expected = (line.get(name) for name in ("id", "question", "expected"))
    return (str(id), str(question), str(expected)) if id is not None else None


def _evaluated(line: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    tuned, base = ({} if not isinstance(line.get(name), dict) else line[name] for name in ("scores", "base_scores"))
    return tuned, base


def _trained(line: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    tuned, base = (
        asdict(score([(str(line[name]), str(line.get("expected", "")))])) if name in line else {} for name in ("tuned", "base")
    )
    return tuned, base


_SCORES_OF: dict[str, Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, Any]]]] = {
    EVALUATED: _evaluated,
    TRAINED: _trained,
}


def _by_name(scores: Mapping[Question, Mapping[str, Any]]) -> Scores:
    """Figures that are none are left out: not every score suits every question."""
    found: Scores = {}
    for question, named in scores.items():
        for name, value in named.items():
            if math.isfinite(number(value)):
                found.setdefault(name, {})[_as_scored(question, name)] = number(value)
    return {name: found[name] for name in sorted(found, key=_place)}


def _as_scored(question: Question, name: str) -> Question:
    """A final answer is the same whether a rationale stands before it or not: a run may learn both as one text, another as two
    tasks. Any other score is of the whole text."""
    if name not in FINALS:
        return question
    id, text, expected = question
    read = final_number(expected) if name == "final_number" else {expected.rsplit("####", 1)[-1].strip()}
    return id, text, f"final {sorted(map(str, read))}"


def how_many(questions: Iterable[Question]) -> int:
    """One that has a final answer besides others counts once."""
    return len({(id, text) for id, text, _ in questions})


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _count(path: Path) -> int:
    return sum(1 for _ in _filled(path))


def _filled(path: Path) -> Iterator[str]:
    return filter(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines())
