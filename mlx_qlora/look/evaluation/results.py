"""What an evaluation found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mlx_qlora.data.render import Question
from mlx_qlora.look.evaluation import enough
from mlx_qlora.look.evaluation.bootstrap import Statistic, difference_of, estimates, mean_of
from mlx_qlora.look.evaluation.chains import Chained, Thought, chained, rationale_scores
from mlx_qlora.look.evaluation.compared import (
    BASE,
    DIFFERENCE,
    RIGHT_OR_WRONG,
    TUNED,
    Compared,
    Tasks,
    Values,
    by_task,
    share_of,
)
from mlx_qlora.look.evaluation.finals import Finals
from mlx_qlora.look.evaluation.labels import Classified, classified
from mlx_qlora.look.evaluation.perplexity import OfText
from mlx_qlora.look.evaluation.scores import Named, mean, title
from mlx_qlora.look.gap import SURE
from mlx_qlora.look.measure import Measured, standard_error

_OWN = {"token_f1", "rouge_l", "chrf"} | RIGHT_OR_WRONG


@dataclass(frozen=True)
class Prediction:
    """A question with the answers to it and what they are worth. Scores that say nothing of it are missing."""

    id: str
    question: str
    expected: str
    answer: str
    base: str | None
    scores: dict[str, float]
    base_scores: dict[str, float]
    task: str = ""
    rationale: str | None = None  # in the data, where the answer is a chain of thought
    thoughts: dict[str, Thought] = field(default_factory=dict)  # of TUNED and BASE

    def to_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {"id": self.id} | ({"task": self.task} if self.task else {})
        line |= {"question": self.question}
        line |= {"rationale": self.rationale} if self.thoughts else {}
        line |= {"expected": self.expected, "answer": self.answer}
        line |= {"scores": self.scores} if self.base is None else {"base": self.base, "scores": self.scores}
        line |= {} if self.base is None else {"base_scores": self.base_scores}
        for which, thought in self.thoughts.items():
            line |= {("base_" if which == BASE else "") + name: value for name, value in thought.to_json().items()}
        return line


@dataclass(frozen=True)
class Evaluation:
    """`tuned` is the model that was asked about: with its adapters, or as it is where it has none."""

    model: str
    adapters: str  # "": none
    data: str
    split: str
    rows: int
    loss: Measured
    base_loss: Measured | None
    predictions: tuple[Prediction, ...]
    metrics: tuple[Named, ...]  # what was scored, in this order
    labels: tuple[str, ...]
    worst_count: int
    settings: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()  # (id, digest of tokens and weights) of those that the losses are of
    harness: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None  # where the data is raw text: how it was read, and how much
    of_text: dict[str, OfText] = field(default_factory=dict)  # of TUNED and BASE
    base: str = ""  # the model that it was made of in full
    finals: Finals = field(default_factory=Finals)

    @property
    def title(self) -> str:
        """What to call the model that was asked about."""
        return "fine-tuned" if self.adapters or self.base else "model"

    @property
    def compares(self) -> bool:
        return self.base_loss is not None

    @property
    def of_tokens(self) -> dict[str, dict[str, Measured]]:
        """What raw text says besides the loss, by name and model."""
        found: dict[str, dict[str, Measured]] = {}
        for which, each in self.of_text.items():
            if each.bits_per_byte is not None:
                found.setdefault("bits_per_byte", {})[which] = each.bits_per_byte
            found.setdefault("next_token_accuracy", {})[which] = each.accuracy
        return found

    @cached_property
    def scores(self) -> dict[str, Compared]:
        """Every score with its intervals, all of the same resampled questions."""
        if not self.predictions:
            return {}
        statistics: dict[str, tuple[Statistic, int]] = {}
        titles = {each.name: each.title for each in self.metrics}
        for name in titles:
            own, known = self._column(name, TUNED)
            statistics[f"{TUNED} {name}"] = own, known
            if self.compares:
                statistics |= self._beside(name, own, self._column(name, BASE)[0], known)
        if self.labels:
            titles["macro_f1"] = title("macro_f1")
            statistics[f"{TUNED} macro_f1"] = self.classified(TUNED).macro_f1, len(self.predictions)
            if self.compares:
                own, base = self.classified(TUNED).macro_f1, self.classified(BASE).macro_f1
                statistics |= self._beside("macro_f1", own, base, len(self.predictions))
        found = estimates(statistics, len(self.predictions))
        for name in titles:
            if name in RIGHT_OR_WRONG:
                found |= {f"{which} {name}": share_of(self.values(name, which)) for which in self.models}
        return {
            name: Compared(title, found[f"{TUNED} {name}"], found.get(f"{BASE} {name}"), found.get(f"{DIFFERENCE} {name}"))
            for name, title in titles.items()
        }

    @property
    def models(self) -> tuple[str, ...]:
        """Who was asked."""
        return (TUNED, BASE) if self.compares else (TUNED,)

    def _beside(self, name: str, own: Statistic, base: Statistic, known: int) -> dict[str, tuple[Statistic, int]]:
        return {f"{BASE} {name}": (base, known), f"{DIFFERENCE} {name}": (difference_of(own, base), known)}

    def _column(self, name: str, which: str) -> tuple[Statistic, int]:
        values = self.values(name, which)
        return mean_of(values), int(np.isfinite(values).sum())

    def values(self, name: str, which: str) -> Values:
        """A score of each question; NaN where it says nothing of one."""
        of = [each.scores if which == TUNED else each.base_scores for each in self.predictions]
        return np.array([scores.get(name, math.nan) for scores in of])

    @property
    def headline(self) -> str:
        """The name of the score that says best how many answers are right."""
        return self.finals.name or ("accuracy" if self.labels else "exact_match")

    @property
    def likely_accuracy(self) -> float:
        """The middle of the interval: of few questions that are all wrong, the next one may well be right."""
        found = self.scores[self.headline].tuned
        return (found.low + found.high) / 2

    @property
    def discordance(self) -> float | None:
        """The share of questions that exactly one of model and base gets right."""
        if not self.compares or not self.predictions:
            return None
        return float(np.mean(self.values(self.headline, TUNED) != self.values(self.headline, BASE)))

    @cached_property
    def of_tasks(self) -> Tasks | None:
        """The headline by task, where there are several."""
        tasks = [each.task for each in self.predictions]
        if len(set(tasks)) < 2:
            return None
        return by_task(tasks, self.values(self.headline, TUNED), self.values(self.headline, BASE) if self.compares else None)

    @cached_property
    def chains(self) -> dict[str, Chained]:
        """By model, of the questions whose answers are chains of thought; empty where there are none."""
        places = [place for place, each in enumerate(self.predictions) if each.thoughts]
        if not places:
            return {}
        of = {which: [self.predictions[place].thoughts[which] for place in places] for which in self.models}
        return {which: chained(self.values(self.headline, which)[places], each, self.headline) for which, each in of.items()}

    def without_final(self, which: str, task: str | None = None) -> tuple[int, int]:
        """(answers in which nothing was found that could be right or wrong, all of them), perhaps of one task."""
        found = {task: each.found for each in self.finals.scores for task in each.tasks or ()}
        asked = [each for each in self.predictions if task in (None, each.task)]
        readers = [(found.get(each.task), each.answer if which == TUNED else each.base or "") for each in asked]
        return sum(reader is not None and not reader(answer) for reader, answer in readers), len(asked)

    def classified(self, which: str) -> Classified:
        """The answers as labels."""
        answers = [each.answer if which == TUNED else each.base or "" for each in self.predictions]
        return classified(self.labels, [each.expected for each in self.predictions], answers)

    @cached_property
    def worst(self) -> tuple[Prediction, ...]:
        """The answers with the lowest mean of the scores from 0 to 1; those that are right are none of them."""
        own = [name for name in dict.fromkeys(each.name for each in self.metrics) if name in _OWN]
        worth = {each.id: mean([each.scores[name] for name in own if name in each.scores]) for each in self.predictions}
        wrong = [each for each in self.predictions if worth[each.id] < 1]
        return tuple(sorted(wrong, key=lambda each: worth[each.id])[: self.worst_count])

    def to_json(self) -> dict[str, Any]:
        base = self.base_loss
        return {
            "model": self.model,
            "adapters": self.adapters or None,
            "base": self.base or None,
            "data": self.data,
            "split": self.split,
            "rows": self.rows,
            "questions": len(self.predictions),
            "loss": loss_json(self.loss),
            "base_loss": base and loss_json(base),
            "loss_difference": base and loss_json(loss_difference(self.loss, base)),
            "perplexity": perplexity_json(self.loss),
            "base_perplexity": base and perplexity_json(base),
            **self._of_tokens(),
            "text": self.text,
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            **self._finals_json(),
            "labels": list(self.labels) or None,
            "classes": self._classes(TUNED),
            "base_classes": self._classes(BASE) if self.compares else None,
            "confusion": self.classified(TUNED).confusion.tolist() if self.labels else None,
            "worst": [each.id for each in self.worst],
            "harness": self.harness or None,
            "notes": list(self.notes),
            "settings": self.settings,
            "versions": self.versions,
        }

    def _of_tokens(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, of in self.of_tokens.items():
            base = of.get(BASE)
            found[name], found[f"base_{name}"] = loss_json(of[TUNED]), base and loss_json(base)
            found[f"{name}_difference"] = base and loss_json(loss_difference(of[TUNED], base))
        return found

    def _finals_json(self) -> dict[str, Any]:
        """What there is to say of answers that are right or wrong."""
        found: dict[str, Any] = {}
        if self.predictions:
            figures = enough.to_json(len(self.predictions), self.likely_accuracy, self.discordance)
            found["enough"] = {"score": self.headline, **figures}
        if self.finals.scores:
            found["final"] = {"score": self.headline, "without": self._without_json()}
        if self.chains:
            found["chains"] = {which: each.to_json() for which, each in self.chains.items()}
        if self.of_tasks:
            kinds = dict(self.finals.kinds)
            found["tasks"] = {
                task: {"kind": kinds.get(task), **score.to_json()}
                | ({"without": self._without_json(task)} if self.finals.scores else {})
                for task, score in self.of_tasks.each.items()
            }
            found["mean_over_tasks"] = self.of_tasks.mean.to_json()
        return found

    def _without_json(self, task: str | None = None) -> dict[str, Any]:
        counts = {which: self.without_final(which, task) for which in self.models}
        return {which: {"answers": count, "of": whole} for which, (count, whole) in counts.items()}

    def _classes(self, which: str) -> dict[str, Any] | None:
        if not self.labels:
            return None
        return {label: asdict(each) for label, each in self.classified(which).classes.items()}


def loss_bounds(found: Measured) -> tuple[float, float, float]:
    """(value, low, high): 95 % by its standard error."""
    return found.mean, found.mean - SURE * found.error, found.mean + SURE * found.error


def loss_difference(one: Measured, other: Measured) -> Measured:
    """Of two models on the same examples, with the error that the difference has."""
    totals = one.totals - other.totals
    return Measured(one.mean - other.mean, standard_error(totals, one.weights), totals, one.weights)


def loss_json(found: Measured) -> dict[str, Any]:
    value, low, high = loss_bounds(found)
    return {"value": value, "se": found.error, "low": low, "high": high, "examples": len(found.totals)}


def perplexity_json(found: Measured) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), map(_exp, loss_bounds(found)), strict=True))


def _exp(value: float) -> float:
    """Infinity where a float ends."""
    return math.exp(value) if value < 700 or math.isnan(value) else math.inf


# (its own rationale, whether it ended, the answer after the data's), by model.
Thinking = Mapping[str, tuple[str, bool, str]]


def predictions(
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[str]],
    metrics: Sequence[Named],
    thinking: Mapping[int, Thinking] | None = None,
) -> tuple[Prediction, ...]:
    """Of the answers of `tuned` and perhaps `base`, scored; `thinking` is that of questions by their numbers."""
    made = []
    for number, one in enumerate(questions):
        said = {which: texts[number] for which, texts in answers.items()}
        worth = {which: _scored(text, one, metrics) for which, text in said.items()}
        thoughts = {which: _thought(one, metrics, *each) for which, each in (thinking or {}).get(number, {}).items()}
        own, base = (said[TUNED], said.get(BASE)), (worth[TUNED], worth.get(BASE, {}))
        made.append(Prediction(one.id, one.text, one.expected, *own, *base, one.task, one.rationale, thoughts))
    return tuple(made)


def _thought(asked: Question, metrics: Sequence[Named], own: str, ended: bool, given: str) -> Thought:
    return Thought(own, ended, given, _scored(given, asked, metrics), rationale_scores(own, asked.rationale or ""))


def _scored(answer: str, asked: Question, metrics: Sequence[Named]) -> dict[str, float]:
    own = [each for each in metrics if each.tasks is None or asked.task in each.tasks]
    values = {each.name: each.of(answer, asked.expected) for each in own}
    return {name: value for name, value in values.items() if math.isfinite(value)}
