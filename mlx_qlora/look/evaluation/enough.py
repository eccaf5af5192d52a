"""How many questions tell two models apart, and what difference so many can show: 5 % false alarms, 80 % of the true
differences found. Pure arithmetic, for answers that are right or wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

_FALSE_ALARMS = NormalDist().inv_cdf(0.975)
_FOUND = NormalDist().inv_cdf(0.8)
_CLOSE = 1e-6  # to the true smallest difference


def assumed_discordance(accuracy: float) -> float:
    """The share of questions that exactly one of two models gets right, where it is not known: half of what it is for models
    that have nothing in common but their accuracy. A base model and what it was fine-tuned to lie about there.

    >>> assumed_discordance(0.5), round(assumed_discordance(0.9), 3)
    (0.25, 0.09)
    """
    return accuracy * (1 - accuracy)


def questions_needed(difference: float, accuracy: float, paired_discordance: float | None = None) -> int:
    """So many questions, asked of both models, show a true difference of their accuracies by McNemar's exact test.

    `accuracy` is that of one of them, or of both together; it counts only where the discordance is not known. The formula
    is Connor's (1987) with the correction for continuity; where nearly all that differ speak for the same model, it asks for
    up to a quarter more than are needed.

    >>> questions_needed(0.05, 0.5), questions_needed(0.05, 0.5, 0.1), questions_needed(0.05, 0.9)
    (823, 351, 319)
    """
    _check(difference, accuracy)
    apart = assumed_discordance(accuracy) if paired_discordance is None else paired_discordance
    apart = max(apart, difference)  # where one is better by so much, they differ at least so often
    reach = _FALSE_ALARMS * math.sqrt(apart) + _FOUND * math.sqrt(apart - difference**2)
    root = (reach + math.sqrt(reach**2 + 4 * difference)) / (2 * difference)
    return math.ceil(root**2)


def questions_needed_unpaired(difference: float, accuracy: float) -> int:
    """So many questions for each of two models, other ones for each, by the test of two shares with the correction for
    continuity (Fleiss). The other model's accuracy lies on the side of one half, where more questions are needed.

    >>> questions_needed_unpaired(0.05, 0.5), questions_needed_unpaired(0.2, 0.5)
    (1605, 103)
    """
    _check(difference, accuracy)
    other = accuracy - difference if accuracy >= 0.5 else accuracy + difference
    middle = (accuracy + min(max(other, 0.0), 1.0)) / 2
    each = accuracy * (1 - accuracy) + max(other * (1 - other), 0.0)
    reach = _FALSE_ALARMS * math.sqrt(2 * middle * (1 - middle)) + _FOUND * math.sqrt(each)
    return math.ceil((reach + math.sqrt(reach**2 + 4 * difference)) ** 2 / (2 * difference) ** 2)


def smallest_difference(questions: int, accuracy: float, paired_discordance: float | None = None) -> float:
    """The smallest true difference of two accuracies that so many questions, asked of both models, show; infinity where
    they show none at all.

    >>> round(smallest_difference(100, 0.5), 3), smallest_difference(5, 0.5)
    (0.148, inf)
    """
    return _smallest(lambda difference: questions_needed(difference, accuracy, paired_discordance) <= questions)


def smallest_difference_unpaired(questions: int, accuracy: float) -> float:
    """The same with other questions for each model, so many for each."""
    return _smallest(lambda difference: questions_needed_unpaired(difference, accuracy) <= questions)


def told(questions: int, accuracy: float, score: str) -> str:
    """What so many questions can show of any two models.

    >>> print(told(100, 0.5, "accuracy"))
    with 100 questions two models have to be 15 points apart in accuracy to be told apart, 20 if each answers other ones; for \
5 points it takes about 820 questions, or 1,600 for each
    """
    asked = f"with {_questions(questions)}"
    takes = f"; for 5 points it takes about {_about(questions_needed(0.05, accuracy))} questions"
    takes += f", or {_about(questions_needed_unpaired(0.05, accuracy))} for each"
    paired, unpaired = smallest_difference(questions, accuracy), smallest_difference_unpaired(questions, accuracy)
    if math.isinf(paired):
        return f"{asked} no two models can be told apart{takes}"
    others = "" if math.isinf(unpaired) else f", {_points(unpaired)} if each answers other ones"
    apart = f"{asked} two models have to be {_points(paired)} points apart in {score} to be told apart{others}"
    return apart + (takes if questions < questions_needed(0.05, accuracy) else "")


def told_of_two(difference: float, accuracy: float, discordance: float, score: str) -> str:
    """What it would take to show a difference that was found and is within noise.

    >>> print(told_of_two(-0.03, 0.6, 0.12, "accuracy"))
    the difference of 3.0 points in accuracy would take about 1,100 questions to show: of the two, exactly one is right in \
12 % of them
    """
    takes = _about(questions_needed(abs(difference), accuracy, discordance))
    apart = f"of the two, exactly one is right in {100 * discordance:.0f} % of them"
    return f"the difference of {_points(abs(difference))} points in {score} would take about {takes} questions to show: {apart}"


def to_json(questions: int, accuracy: float, paired_discordance: float | None = None) -> dict[str, Any]:
    """What `told` says, for programs. Infinity where no difference shows."""
    return {
        "questions": questions,
        "assumed_discordance": assumed_discordance(accuracy),
        "discordance": paired_discordance,
        "smallest_difference": smallest_difference(questions, accuracy, paired_discordance),
        "smallest_difference_unpaired": smallest_difference_unpaired(questions, accuracy),
        "questions_for_5_points": questions_needed(0.05, accuracy, paired_discordance),
        "questions_for_5_points_unpaired": questions_needed_unpaired(0.05, accuracy),
    }


def _questions(number: int) -> str:
    return f"{number:,} question{'' if number == 1 else 's'}"


def _points(difference: float) -> str:
    return f"{100 * difference:.1f}" if difference < 0.1 else f"{100 * difference:.0f}"


def _about(number: int) -> str:
    """To two digits."""
    step = 10 ** max(0, len(str(number)) - 2)
    return f"{round(number / step) * step:,}"


def _smallest(enough: Callable[[float], bool]) -> float:
    """By halving: more questions show smaller differences."""
    if not enough(1.0):
        return math.inf
    low, high = 0.0, 1.0
    while high - low > _CLOSE:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _check(difference: float, accuracy: float) -> None:
    if not 0 < difference <= 1 or not 0 <= accuracy <= 1:
        raise ValueError(f"a difference above 0 and an accuracy from 0 to 1 are expected; {difference} and {accuracy} came")
