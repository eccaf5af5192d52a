"""A score of the model that was asked about beside that of its base, with intervals; over all questions and by task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.look.evaluation.bootstrap import Estimate, Statistic, estimates, mean_of, mean_of_shares, share

TUNED, BASE, DIFFERENCE = "tuned", "base", "difference"
# Of these an answer has 1 or 0.
RIGHT_OR_WRONG = frozenset(
    {"exact_match", "accuracy", "numeric_accuracy", "final_number", "final_option", "final_text", "final_answer"}
)
_SIX = 6  # signs that are all the same by chance in 1 of 32 cases
Values = NDArray[np.float64]  # a question's score each; NaN: the score says nothing of it


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

    def to_json(self) -> dict[str, Any]:
        return {which: each.to_json() for which, each in self.columns().items()}


def share_of(values: Values) -> Estimate:
    """Of what is right or wrong."""
    known = values[np.isfinite(values)]
    return share(float(known.sum()), len(known))


@dataclass(frozen=True)
class Tasks:
    """A score of what is right or wrong by task, and the mean over tasks, in which each counts the same."""

    each: dict[str, Compared]
    mean: Compared


def by_task(tasks: Sequence[str], own: Values, base: Values | None) -> Tasks:
    """In the order in which the tasks come. The intervals of differences are all of the same draws of questions."""
    of = np.array(tasks)
    inside = {task: (of == task) & np.isfinite(own) for task in dict.fromkeys(tasks)}
    inside = {task: there for task, there in inside.items() if there.any()}
    shares = {task: share_of(own[there]) for task, there in inside.items()}
    if base is None:
        each = {task: Compared(task, one) for task, one in shares.items()}
        return Tasks(each, Compared(_MEAN, mean_of_shares([*shares.values()])))
    bases = {task: share_of(base[there]) for task, there in inside.items()}
    differences = _differences(own - base, inside)
    each = {task: Compared(task, one, bases[task], differences[task]) for task, one in shares.items()}
    mean, base_mean = (mean_of_shares([*those.values()]) for those in (shares, bases))
    return Tasks(each, Compared(_MEAN, mean, base_mean, differences[_MEAN]))


_MEAN = "mean over tasks"


def _differences(values: Values, inside: dict[str, NDArray[np.bool_]]) -> dict[str, Estimate]:
    alone = {task: mean_of(np.where(there, values, math.nan)) for task, there in inside.items()}
    statistics: dict[str, tuple[Statistic, int]] = {task: (each, int(inside[task].sum())) for task, each in alone.items()}

    def mean(drawn: Values) -> Values:
        found: Values = np.nanmean(
            np.stack([each(drawn) for each in alone.values()]), axis=0
        )  # a small task may be drawn never
        return found

    return estimates(statistics | {_MEAN: (mean, len(inside))}, len(values))
