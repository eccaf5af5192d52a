"""Answers that are labels: how well each class is told from the others.

The table of classes is three sums and two divisions; scikit-learn and SciPy, 150 MB, would do no more here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.look.evaluation.bootstrap import Statistic, ratio
from mlx_qlora.look.evaluation.scores import words

OTHER = "(other)"  # what is no known label
_MOST, _LETTERS, _WORDS, _EACH = 20, 40, 5, 3


@dataclass(frozen=True)
class ClassScore:
    """Of one class. What has nothing to be divided by is 0, as in scikit-learn."""

    precision: float
    recall: float
    f1: float
    support: int


def labels_of(expected: Sequence[str]) -> tuple[str, ...]:
    """The labels that a data set's answers are, or none: 2 to 20 distinct texts of at most 5 words and 40 letters, which
    come three times on average. Case and punctuation tell no labels apart.

    >>> labels_of(["yes", "No", "no.", "Yes", "no", "yes"]), labels_of(["in 1927", "in 1931", "yes"])
    (('No', 'yes'), ())
    """
    known: dict[tuple[str, ...], str] = {}
    for each in expected:
        known.setdefault(tuple(words(each)), " ".join(each.split()))
    short = all(len(key) <= _WORDS and 0 < len(label) <= _LETTERS for key, label in known.items())
    enough = 2 <= len(known) <= _MOST and _EACH * len(known) <= len(expected)
    return tuple(sorted(known.values(), key=str.casefold)) if short and enough else ()


@dataclass(frozen=True)
class Classified:
    """The answers of one model, as numbers of labels; the number after the last one is `OTHER`."""

    labels: tuple[str, ...]
    expected: NDArray[np.int64]
    got: NDArray[np.int64]

    @property
    def confusion(self) -> NDArray[np.int64]:
        """[expected, answered]: counts, with a last column for what is no label."""
        table = np.zeros((len(self.labels), len(self.labels) + 1), np.int64)
        np.add.at(table, (self.expected, self.got), 1)
        return table

    @property
    def classes(self) -> dict[str, ClassScore]:
        table = self.confusion
        right, support, said = np.diagonal(table), table.sum(axis=1), table.sum(axis=0)
        return {
            label: ClassScore(
                precision=_share(right[k], said[k]),
                recall=_share(right[k], support[k]),
                f1=_share(2 * right[k], said[k] + support[k]),
                support=int(support[k]),
            )
            for k, label in enumerate(self.labels)
        }

    @property
    def macro_f1(self) -> Statistic:
        """The mean F1 of the classes, each counting the same; one that is neither expected nor answered counts not."""
        kinds = np.arange(len(self.labels))[:, None]
        expected, got = (self.expected == kinds).astype(float), (self.got == kinds).astype(float)

        def statistic(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
            both = drawn @ (expected * got).T
            either = drawn @ expected.T + drawn @ got.T
            f1 = ratio(2 * both, either, 0.0)
            return ratio(f1.sum(axis=1), (either > 0).sum(axis=1))

        return statistic


def classified(labels: Sequence[str], expected: Sequence[str], answers: Sequence[str]) -> Classified:
    """Every expected answer is one of the labels."""
    numbers = {tuple(words(label)): number for number, label in enumerate(labels)}
    wanted = [numbers[tuple(words(each))] for each in expected]
    got = [numbers.get(tuple(words(each)), len(labels)) for each in answers]
    return Classified(tuple(labels), np.array(wanted, np.int64), np.array(got, np.int64))


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else 0.0
