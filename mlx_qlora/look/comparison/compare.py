"""Runs side by side: what differs, which is better, and whether that is more than chance.

from mlx_qlora.look.comparison.compare import compare
compare(["runs/first", "runs/second"])  # in a notebook: the tables; .verdict is the sentence
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.look.comparison import measures, notes, sheet, statistics, verdict
from mlx_qlora.look.comparison.answers import ORDER
from mlx_qlora.look.comparison.contender import Contender, Run, grouped, read_runs
from mlx_qlora.look.comparison.judgement import Judgement, in_common, why_not_comparable
from mlx_qlora.look.comparison.statistics import Difference
from mlx_qlora.look.history import History
from mlx_qlora.look.measure import standard_error

_MANY = 1_000  # validation examples, where their number is not known


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. The first contender is the one that the others are compared with."""

    contenders: tuple[Contender, ...]
    judgements: tuple[Judgement, ...]  # one for each of the others
    score: str  # the score that the verdict speaks of; empty where there are no answers in common

    @property
    def histories(self) -> list[History]:
        return [run.history for contender in self.contenders for run in contender.runs]

    @property
    def verdict(self) -> str:
        """One sentence."""
        return verdict.sentence(self.contenders, self.judgements, self.score)

    @property
    def notes(self) -> list[str]:
        """What to know before the verdict is believed; what forbids a comparison comes first."""
        return notes.notes(self.contenders, self.judgements, self.score)

    @cached_property
    def rows(self) -> tuple[measures.Row, ...]:
        """Every measure, with a cell for each contender."""
        return tuple(measures.rows(self.contenders, self.judgements))

    @property
    def names(self) -> list[str]:
        return [contender.name for contender in self.contenders]

    def table(self, width: int = 80) -> str:
        return sheet.text(self.names, self.rows, width)

    def markdown(self, picture: str = "") -> str:
        """A page; `picture` is the name of a file beside it."""
        return sheet.markdown(self.names, self.rows, self.verdict, self.notes, picture)

    def csv(self) -> str:
        """A line for each contender."""
        return sheet.csv_text(self.contenders, self.rows)

    def __str__(self) -> str:
        return self.screen(80)

    def screen(self, width: int) -> str:
        """Tables, notes and verdict for a terminal."""
        return sheet.screen(self.names, self.rows, self.verdict, self.notes, width)

    def _repr_markdown_(self) -> str:
        return self.markdown()


def compare(folders: Sequence[str | Path], *, baseline: str = "", score: str = "") -> Comparison:
    """Compare runs by their folders. Runs that differ in their seeds only are one contender, with mean and interval.

    The first is the baseline, or the run that `baseline` names. `score` is what the verdict goes by beside the loss:
    token_f1, or else the first of accuracy, numeric_accuracy, rouge_l, chrf, exact_match that the runs have.
    """
    runs = read_runs(folders)
    contenders = _baseline_first(grouped(runs), baseline)
    names = _scores_in_common(contenders)
    if score and score not in names:
        raise ConfigError(
            f"score: {score!r} came, and one that the runs have in common is expected: {', '.join(names) or 'they have none'}."
        )
    chosen = score or next(iter(names), "")
    first, *others = contenders
    return Comparison(tuple(contenders), tuple(_adjusted([_judge(first, other, names) for other in others], names)), chosen)


def _baseline_first(contenders: list[Contender], baseline: str) -> list[Contender]:
    if not baseline:
        return contenders
    wanted = Path(baseline).expanduser().resolve()
    for contender in contenders:
        if baseline == contender.name or any(
            baseline == run.name or run.history.folder.resolve() == wanted for run in contender.runs
        ):
            return [contender, *(other for other in contenders if other is not contender)]
    raise ConfigError(
        f"baseline: {baseline!r} came, and one of the runs is expected: {', '.join(each.name for each in contenders)}."
    )


def _scores_in_common(contenders: Sequence[Contender]) -> list[str]:
    """Scores that the verdicts can go by: the first has them, and at least one of the others."""
    first, *others = [
        set.intersection(*(set(run.answers.tuned) for run in contender.runs)) for contender in contenders
    ]  # fmt: skip
    common = first & set().union(*others) if others else first
    return sorted(common, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def _judge(base: Contender, other: Contender, names: Sequence[str]) -> Judgement:
    why = why_not_comparable(base, other)
    return Judgement(
        base=base,
        other=other,
        val_loss=None if why else _val_loss(base, other),
        not_comparable=why,
        evaluated=_evaluated(base, other),
        examples=len(base.first.answers.losses),
        questions=len(base.common & other.common),
        scores={name: found for name in names if (found := _score(base, other, name)) is not None},
    )


def _val_loss(base: Contender, other: Contender) -> Difference | None:
    if base.of_seeds or other.of_seeds:
        of_base, of_other = (each.each(_best_loss) for each in (base, other))
        return statistics.difference_of_means(of_base, of_other) if of_base and of_other else None
    a, b = base.first.best, other.first.best
    if a is None or b is None:
        return None
    examples = min(each.first.count("valid", "examples") or _MANY for each in (base, other))
    return statistics.difference_with_error(b.val_loss - a.val_loss, math.hypot(a.val_loss_se, b.val_loss_se), examples)


def _evaluated(base: Contender, other: Contender) -> Difference | None:
    """Where all are of the same examples: what makes one hard for both is no doubt about the difference then."""
    runs = [*base.runs, *other.runs]
    examples = list(base.first.answers.losses)
    if not examples or any(run.answers.losses.keys() != set(examples) for run in runs):
        return None
    if base.of_seeds or other.of_seeds:
        return statistics.difference_of_means(base.each(Run.evaluated), other.each(Run.evaluated))
    a, b = (np.array([each.first.answers.losses[example] for example in examples]) for each in (base, other))
    weights = np.array([weight for _, _, weight in examples])
    value = float(weights @ (b - a) / weights.sum())
    return statistics.difference_with_error(value, standard_error(weights * (b - a), weights), len(weights))


def _best_loss(run: Run) -> float:
    return run.best.val_loss if run.best else math.nan


def _score(base: Contender, other: Contender, name: str) -> Difference | None:
    """On the questions that all of both have answered."""
    common = in_common(base, other, name)
    if not common:
        return None
    if base.of_seeds or other.of_seeds:
        of_base, of_other = (each.each(lambda run: run.score(name, common)) for each in (base, other))
        return statistics.difference_of_means(of_base, of_other)
    a, b = (each.first.answers.tuned[name] for each in (base, other))
    return statistics.paired([b[question] - a[question] for question in sorted(common)])


def _adjusted(judgements: list[Judgement], names: Sequence[str]) -> list[Judgement]:
    """With p as it is when as many comparisons are made at once."""
    ps = statistics.holm([each.val_loss.p if each.val_loss else math.nan for each in judgements])
    found = [
        replace(each, val_loss=replace(each.val_loss, p=p)) if each.val_loss else each
        for each, p in zip(judgements, ps, strict=True)
    ]
    ps = statistics.holm([each.evaluated.p if each.evaluated else math.nan for each in found])
    found = [
        replace(each, evaluated=replace(each.evaluated, p=p)) if each.evaluated else each
        for each, p in zip(found, ps, strict=True)
    ]
    for name in names:
        ps = statistics.holm([each.scores[name].p if name in each.scores else math.nan for each in found])
        found = [
            replace(each, scores=each.scores | {name: replace(each.scores[name], p=p)}) if name in each.scores else each
            for each, p in zip(found, ps, strict=True)
        ]
    return found
