"""Runs side by side: what differs, which is better, and whether that is more than chance.

from mlx_qlora.look.comparison.compare import compare
compare(["runs/first", "runs/second"])  # in a notebook: the tables; .verdict is the sentence
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.look.comparison import measures, notes, sheet, statistics, verdict
from mlx_qlora.look.comparison.answers import ORDER, how_many
from mlx_qlora.look.comparison.contender import Contender, Run, grouped, read_runs
from mlx_qlora.look.comparison.judgement import Judgement, adjusted, in_common, why_not_comparable
from mlx_qlora.look.comparison.statistics import Difference
from mlx_qlora.look.evaluation.scores import title
from mlx_qlora.look.history import History
from mlx_qlora.look.measure import standard_error
from mlx_qlora.look.pictures.seeds import Dots
from mlx_qlora.records import EvalReport

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
    def seeds(self) -> list[tuple[str, list[Dots]]]:
        """For a picture: losses and the score of each seed; empty where nobody has several."""
        if not any(each.of_seeds for each in self.contenders):
            return []
        figures: list[tuple[str, Callable[[Run], float]]] = [("val_loss (less is better)", _best_loss)]
        if self.score:
            figures.append((f"{title(self.score)} (more is better)", self._own_score))
        panels = [(said, [_dots(each, figure) for each in self.contenders]) for said, figure in figures]
        return [(said, [one for one in each if one.values]) for said, each in panels if any(one.values for one in each)]

    def _own_score(self, run: Run) -> float:
        own = next(each for each in self.contenders if run in each.runs)
        return run.score(self.score, own.common)

    @property
    def names(self) -> list[str]:
        return [contender.name for contender in self.contenders]

    def table(self, width: int = 80) -> str:
        return sheet.text(self.names, self.rows, width)

    def markdown(self, *pictures: str) -> str:
        """A page; `pictures` are names of files beside it."""
        return sheet.markdown(self.names, self.rows, self.verdict, self.notes, tuple(filter(None, pictures)))

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
    that of final answers where these are scored, token_f1, or else the first of accuracy, numeric_accuracy, rouge_l, chrf,
    exact_match that the runs have.
    """
    return of_runs(read_runs(folders), baseline=baseline, score=score)


def of_runs(runs: Sequence[Run], *, baseline: str = "", score: str = "") -> Comparison:
    """The same of runs that were read."""
    contenders = _baseline_first(grouped(runs), baseline)
    names = _scores_in_common(contenders)
    if score and score not in names:
        raise ConfigError(
            f"score: {score!r} came, and one that the runs have in common is expected: {', '.join(names) or 'they have none'}."
        )
    chosen = score or next(iter(names), "")
    first, *others = contenders
    return Comparison(tuple(contenders), tuple(adjusted([_judge(first, other, names) for other in others], chosen)), chosen)


def _baseline_first(contenders: list[Contender], baseline: str) -> list[Contender]:
    if not baseline:
        return contenders
    wanted = Path(baseline).expanduser().resolve()
    for contender in contenders:
        folders = [run.history.folder.resolve() for run in contender.runs]
        if baseline in (contender.name, contender.name.split(" (")[0], *(run.name for run in contender.runs)) or any(
            wanted in (folder, folder.parent if contender.of_seeds else folder) for folder in folders
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
    judged = Judgement(
        base=base,
        other=other,
        val_loss=None if why else _val_loss(base, other),
        not_comparable=why,
        evaluated=_evaluated(base, other),
        examples=len(base.first.answers.losses),
        questions=how_many(base.common & other.common),
        scores={},
    )
    return replace(judged, scores={name: found for name in names if (found := _score(judged, name)) is not None})


def _val_loss(base: Contender, other: Contender) -> Difference | None:
    if by_seed := _pairs_by_seed(base, other):
        return statistics.by_t([each.val_loss - own.val_loss for own, each in by_seed])
    if base.of_seeds or other.of_seeds:
        of_base, of_other = (each.each(_best_loss) for each in (base, other))
        return statistics.difference_of_means(of_base, of_other) if of_base and of_other else None
    a, b = base.first.best, other.first.best
    if a is None or b is None:
        return None
    examples = min(each.first.count("valid", "examples") or _MANY for each in (base, other))
    return statistics.difference_with_error(b.val_loss - a.val_loss, math.hypot(a.val_loss_se, b.val_loss_se), examples)


def _pairs_by_seed(base: Contender, other: Contender) -> list[tuple[EvalReport, EvalReport]]:
    """Best validations where each seed has validation examples of its own, the same for both: those are no doubt about the
    difference. Of the same examples seeds are not paired: how they begin has little in common (`statistics.crossed`)."""
    if not base.of_seeds or len({run.size("valid").get("digest") for run in base.runs}) < len(base.runs):
        return []
    one, two = ({run.settings.get("seed"): run for run in each.runs} for each in (base, other))
    same = one.keys() == two.keys() and all(one[seed].size("valid") == two[seed].size("valid") for seed in one)
    pairs = [(one[seed].best, two[seed].best) for seed in one] if same else []
    return [(a, b) for a, b in pairs if a and b] if all(a and b for a, b in pairs) else []


def _evaluated(base: Contender, other: Contender) -> Difference | None:
    """Where all are of the same examples: what makes one hard for both is no doubt about the difference then."""
    runs = [*base.runs, *other.runs]
    examples = list(base.first.answers.losses)
    if not examples or any(run.answers.losses.keys() != set(examples) for run in runs):
        return None
    weights = np.array([weight for _, _, weight in examples])
    a, b = (np.array([[run.answers.losses[one] for one in examples] for run in each.runs]) for each in (base, other))
    if base.of_seeds or other.of_seeds:
        return statistics.crossed(a, b, weights)
    each = b[0] - a[0]
    value = float(weights @ each / weights.sum())
    return statistics.difference_with_error(value, standard_error(weights * each, weights), len(weights))


def _dots(each: Contender, figure: Callable[[Run], float]) -> Dots:
    values, found = each.each(figure), each.mean(figure)
    return Dots(each.name, values, found.value, found.low, found.high)


def _best_loss(run: Run) -> float:
    return run.best.val_loss if run.best else math.nan


def _score(judged: Judgement, name: str) -> Difference | None:
    """On the questions that all of both have answered."""
    if not in_common(judged.base, judged.other, name):
        return None
    base, other = judged.tables(name)
    return statistics.crossed(base, other) if judged.of_seeds else statistics.paired((other[0] - base[0]).tolist())
