"""How many questions are enough, against the powers of the tests that `compare` and textbooks use."""

from __future__ import annotations

import math

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import numpy as np
import pytest

from mlx_qlora.look.comparison.statistics import sign_flips
from mlx_qlora.look.evaluation.enough import (
    assumed_discordance,
    questions_needed,
    questions_needed_unpaired,
    smallest_difference,
    smallest_difference_unpaired,
)


def binomial(n: int, share: float) -> np.ndarray:
    """How likely 0 to n of n are."""
    if share in (0.0, 1.0):
        return np.eye(1, n + 1, n if share else 0)[0]
    logs = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)])
    counts = np.arange(n + 1)
    return np.exp(logs + counts * math.log(share) + (n - counts) * math.log1p(-share))


def mcnemar_power(n: int, difference: float, apart: float) -> float:
    """Of McNemar's exact test, summed over all that can come out."""
    power, better = 0.0, (apart + difference) / (2 * apart)
    for discordant, likely in enumerate(binomial(n, apart)):
        if likely < 1e-9:
            continue
        by_chance = binomial(discordant, 0.5)
        at_most = np.cumsum(by_chance)
        p = np.minimum(1, 2 * np.minimum(at_most, at_most[::-1]))
        power += likely * float(binomial(discordant, better)[p < 0.05].sum())
    return power


@pytest.mark.parametrize(
    ("difference", "apart"), [(0.05, 0.25), (0.05, 0.06), (0.1, 0.3), (0.148, 0.25), (0.02, 0.02), (0.02, 0.05), (0.3, 0.5)]
)
def test_so_many_questions_find_four_of_five_differences(difference: float, apart: float) -> None:
    """And not many fewer would: the test's power comes out exactly."""
    count = questions_needed(difference, 0.5, apart)
    assert mcnemar_power(count, difference, apart) > 0.79
    assert mcnemar_power(int(0.75 * count), difference, apart) < 0.79
    if apart > 1.5 * difference:
        assert mcnemar_power(int(0.94 * count), difference, apart) < 0.8


def test_the_test_of_compare_finds_as_many_in_a_simulation() -> None:
    """Two models that answer the same questions, one 10 points better; `compare` tests by flipping signs."""
    rng = np.random.default_rng(0)
    count, found = questions_needed(0.1, 0.6, 0.3), 0
    for _ in range(1000):
        drawn = rng.random(count)
        found += sign_flips(np.where(drawn < 0.2, 1.0, np.where(drawn < 0.3, -1.0, 0.0))) < 0.05
    assert 0.76 < found / 1000 < 0.85  # two standard errors are 2.5 points


def test_other_questions_for_each_model() -> None:
    """A textbook's figure (Fleiss, shares of 60 % and 70 %: 376 each), and a simulation of its test of two shares."""
    assert questions_needed_unpaired(0.1, 0.7) == 376
    assert questions_needed_unpaired(0.1, 0.6) > 376  # beside 50 %
    rng = np.random.default_rng(0)
    n = 376
    one, other = rng.binomial(n, 0.7, 4000) / n, rng.binomial(n, 0.6, 4000) / n
    middle = (one + other) / 2
    found = np.abs(one - other) - 1 / n > 1.96 * np.sqrt(2 * middle * (1 - middle) / n)
    assert 0.78 < found.mean() < 0.825


@pytest.mark.parametrize("accuracy", [0.0, 0.03, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("questions", [4, 8, 100, 1000, 20_000])
def test_the_smallest_difference_is_the_one_that_takes_so_many(questions: int, accuracy: float) -> None:
    for smallest, needed in (
        (smallest_difference, questions_needed), (smallest_difference_unpaired, questions_needed_unpaired),
    ):  # fmt: skip
        found = smallest(questions, accuracy)
        if math.isinf(found):
            assert needed(1.0, accuracy) > questions
        else:
            assert needed(found, accuracy) <= questions < needed(found * 0.99, accuracy)


def test_the_lesson_of_100_questions() -> None:
    """They tell apart what is 15 points apart; 5 points take 800, and more where each model has questions of its own."""
    assert round(100 * smallest_difference(100, 0.5)) == 15
    assert round(questions_needed(0.05, 0.5), -2) == 800
    assert round(100 * smallest_difference_unpaired(100, 0.5)) == 20
    assert smallest_difference(100, 0.5, 0.1) < 0.11  # models that err on the same questions


def test_what_is_assumed_lies_between_the_same_model_and_an_unrelated_one() -> None:
    for accuracy in (0.1, 0.5, 0.9):
        assert 0 < assumed_discordance(accuracy) < 2 * accuracy * (1 - accuracy)


@pytest.mark.parametrize(("difference", "accuracy"), [(0, 0.5), (-0.1, 0.5), (0.1, 1.2), (math.nan, 0.5)])
def test_what_is_no_difference(difference: float, accuracy: float) -> None:
    with pytest.raises(ValueError, match="a difference above 0"):
        questions_needed(difference, accuracy)
