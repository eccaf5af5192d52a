"""What an evaluation found, and the files that say it: evaluation_report.json, evaluation_summary.csv, predictions.jsonl,
evaluation_losses.jsonl."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.look.evaluation.bootstrap import Estimate, Statistic, difference_of, estimates, mean_of
from mlx_qlora.look.evaluation.labels import Classified, classified
from mlx_qlora.look.evaluation.perplexity import OfText
from mlx_qlora.look.evaluation.scores import Named, mean, title
from mlx_qlora.look.gap import SURE
from mlx_qlora.look.measure import Measured, standard_error
from mlx_qlora.run.disk import write_atomically, write_json, write_lines

REPORT, SUMMARY, PREDICTIONS = "evaluation_report.json", "evaluation_summary.csv", "predictions.jsonl"
LOSSES = "evaluation_losses.jsonl"
TUNED, BASE, DIFFERENCE = "tuned", "base", "difference"
_SIX = 6  # signs that are all the same by chance in 1 of 32 cases
_OWN = {"exact_match", "token_f1", "rouge_l", "chrf", "accuracy", "numeric_accuracy"}


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

    def to_json(self) -> dict[str, Any]:
        line = {"id": self.id, "question": self.question, "expected": self.expected, "answer": self.answer}
        if self.base is None:
            return line | {"scores": self.scores}
        return line | {"base": self.base, "scores": self.scores, "base_scores": self.base_scores}


@dataclass(frozen=True)
class Compared:
    """A score of the model that was asked about, of its base, and the difference; the latter two where a base was asked."""

    title: str
    tuned: Estimate
    base: Estimate | None = None
    difference: Estimate | None = None

    @property
    def within_noise(self) -> bool:
        """Whether other questions could as well have given the other sign."""
        found = self.difference
        if found is None:
            return False
        if math.isnan(found.low) and found.n >= _SIX:  # each question makes the same difference
            return abs(found.value) < 1e-9
        return not (found.low > 0 or found.high < 0)

    def columns(self) -> dict[str, Estimate]:
        found = {TUNED: self.tuned, BASE: self.base, DIFFERENCE: self.difference}
        return {name: each for name, each in found.items() if each is not None}


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
        return {
            name: Compared(title, found[f"{TUNED} {name}"], found.get(f"{BASE} {name}"), found.get(f"{DIFFERENCE} {name}"))
            for name, title in titles.items()
        }

    def _beside(self, name: str, own: Statistic, base: Statistic, known: int) -> dict[str, tuple[Statistic, int]]:
        return {f"{BASE} {name}": (base, known), f"{DIFFERENCE} {name}": (difference_of(own, base), known)}

    def _column(self, name: str, which: str) -> tuple[Statistic, int]:
        of = [each.scores if which == TUNED else each.base_scores for each in self.predictions]
        values = np.array([scores.get(name, math.nan) for scores in of])
        return mean_of(values), int(np.isfinite(values).sum())

    def classified(self, which: str) -> Classified:
        """The answers as labels."""
        answers = [each.answer if which == TUNED else each.base or "" for each in self.predictions]
        return classified(self.labels, [each.expected for each in self.predictions], answers)

    @cached_property
    def worst(self) -> tuple[Prediction, ...]:
        """The answers with the lowest mean of the scores from 0 to 1; those that are right are none of them."""
        own = [name for name in (each.name for each in self.metrics) if name in _OWN]
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
            "scores": {
                name: {which: each.to_json() for which, each in score.columns().items()} for name, score in self.scores.items()
            },
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


def write(found: Evaluation, folder: Path) -> list[Path]:
    """The files, each whole; the report comes last, so that one that is there has the others beside it."""
    write_lines(folder / PREDICTIONS, [each.to_json() for each in found.predictions])
    write_lines(folder / LOSSES, _of_each_example(found))
    write_atomically(folder / SUMMARY, _table(found))
    write_json(folder / REPORT, found.to_json())
    return [folder / name for name in (REPORT, SUMMARY, PREDICTIONS, LOSSES)]


def _of_each_example(found: Evaluation) -> list[dict[str, Any]]:
    """Its loss, in nats a token: another run's on the same examples can be compared one by one."""
    losses = {"loss": found.loss} | ({"base_loss": found.base_loss} if found.base_loss else {})
    if any(len(each.totals) != len(found.examples) for each in losses.values()):
        return []
    return [
        {"id": id, "digest": digest, "weight": weight}
        | {name: float(each.totals[number]) / weight for name, each in losses.items()}
        for number, ((id, digest), weight) in enumerate(zip(found.examples, found.loss.weights.tolist(), strict=True))
        if weight
    ]


def _table(found: Evaluation) -> str:
    """A line per score and model."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(("score", "model", "value", "low", "high", "n"))
    own = TUNED if found.title == "fine-tuned" else "model"
    losses = [(own, found.loss)]
    if found.base_loss:
        losses += [(BASE, found.base_loss), (DIFFERENCE, loss_difference(found.loss, found.base_loss))]
    for which, loss in losses:
        writer.writerow(("loss", which, *_plain(loss_bounds(loss)), len(loss.totals)))
    for which, loss in losses[:2]:
        writer.writerow(("perplexity", which, *_plain(perplexity_json(loss).values()), len(loss.totals)))
    for name, of in found.of_tokens.items():
        rows = {own: of[TUNED]} | ({BASE: of[BASE], DIFFERENCE: loss_difference(of[TUNED], of[BASE])} if BASE in of else {})
        for which, one in rows.items():
            writer.writerow((name, which, *_plain(loss_bounds(one)), len(one.totals)))
    for name, score in found.scores.items():
        for which, each in score.columns().items():
            writer.writerow((name, own if which == TUNED else which, *_plain((each.value, each.low, each.high)), each.n))
    return written.getvalue()


def _plain(values: Any) -> list[str]:
    """An empty field where there is no number."""
    return [repr(value) if math.isfinite(value) else "" for value in values]


def predictions(
    questions: Sequence[tuple[str, str, str]], answers: Mapping[str, Sequence[str]], metrics: Sequence[Named]
) -> tuple[Prediction, ...]:
    """Of (id, question, expected) and the answers of `tuned` and perhaps `base`, scored."""
    made = []
    for number, (id, question, expected) in enumerate(questions):
        said = {which: texts[number] for which, texts in answers.items()}
        worth = {which: _scored(text, expected, metrics) for which, text in said.items()}
        made.append(Prediction(id, question, expected, said[TUNED], said.get(BASE), worth[TUNED], worth.get(BASE, {})))
    return tuple(made)


def _scored(answer: str, expected: str, metrics: Sequence[Named]) -> dict[str, float]:
    values = {each.name: each.of(answer, expected) for each in metrics}
    return {name: value for name, value in values.items() if math.isfinite(value)}
