"""One contender against the baseline, and whether their losses can be compared at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mlx_qlora.look.comparison.answers import Question
from mlx_qlora.look.comparison.contender import Contender, Run
from mlx_qlora.look.comparison.statistics import Difference, Floats, error_of_seeds, holm, t_quantile
from mlx_qlora.look.evaluation.enough import questions_needed, smallest_difference

_FALSE_ALARMS = 0.05


@dataclass(frozen=True)
class Reach:
    """What differences of a score can be seen: 5 % false alarms, four of five true ones found."""

    needed: int  # questions for the difference that was found; 0: there was none
    smallest: float  # difference, with the questions that there are
    seeds_hide: float  # a difference that the seeds' spread alone hides, however many the questions


@dataclass(frozen=True)
class Judgement:
    """Differences are other minus base: of losses less is better, of scores more."""

    base: Contender
    other: Contender
    val_loss: Difference | None  # of the best validation losses; None: they can't be compared, or one is missing
    not_comparable: str  # why validation losses can't be compared
    evaluated: Difference | None  # of the losses that `evaluate` measured, example by example
    examples: int  # that these are of
    questions: int  # that all runs of both have answered
    scores: dict[str, Difference]  # on these

    @property
    def loss(self) -> Difference | None:
        """The one that is judged: on the same examples one by one, where that is known."""
        return self.evaluated or self.val_loss

    def losses(self) -> tuple[float, float]:
        """(of the base, of the other) of what is judged."""
        sides = (self.base, self.other)
        a, b = (each.mean(Run.evaluated).value if self.evaluated else each.loss(lambda run: run.best).value for each in sides)
        return a, b

    @property
    def of_seeds(self) -> bool:
        """Whether seeds are what is counted, and not examples."""
        return self.base.of_seeds or self.other.of_seeds

    def means(self, score: str) -> tuple[float, float]:
        """(of the base, of the other) on the questions that all have in common."""
        common = in_common(self.base, self.other, score)
        a, b = (each.mean(lambda run: run.score(score, common)).value for each in (self.base, self.other))
        return a, b

    def asked(self, score: str) -> int:
        """How many questions these are."""
        return len(in_common(self.base, self.other, score))

    def tables(self, score: str) -> tuple[Floats, Floats]:
        """(of the base, of the other) by run and question, on the questions that all have in common."""
        common = sorted(in_common(self.base, self.other, score))
        base, other = (
            np.array([[run.answers.tuned[score][question] for question in common] for run in each.runs])
            for each in (self.base, self.other)
        )
        return base, other

    def reach(self, score: str) -> Reach | None:
        """What these questions can show; None of figures that are no shares."""
        base, other = self.tables(score)
        both = np.concatenate([base, other])
        if both.size == 0 or both.min() < 0 or both.max() > 1:
            return None
        each = other.mean(0) - base.mean(0)
        difference, apart = abs(float(each.mean())), float((each**2).mean())
        accuracy = float(both.mean())
        error, degrees = error_of_seeds(base, other) if self.of_seeds else (0.0, 1.0)
        return Reach(
            needed=questions_needed(difference, accuracy, apart) if difference else 0,
            smallest=smallest_difference(len(each), accuracy, apart or None),
            seeds_hide=t_quantile(0.975, degrees) * error if error > 0 else 0.0,
        )

    @property
    def differences(self) -> dict[str, Difference]:
        """All of them by name."""
        losses = {"val_loss": self.val_loss, "evaluated": self.evaluated}
        return {name: each for name, each in losses.items() if each} | {f"score {name}": d for name, d in self.scores.items()}

    def with_ps(self, ps: Mapping[str, float]) -> Judgement:
        """The same with other ps, by those names."""
        found = {name: replace(each, p=ps.get(name, each.p)) for name, each in self.differences.items()}
        scores = {name: found[f"score {name}"] for name in self.scores}
        return replace(self, val_loss=found.get("val_loss"), evaluated=found.get("evaluated"), scores=scores)

    @property
    def by_loss(self) -> int | None:
        """1: better than the base, -1: worse, 0: no more than chance; None: it can't be said."""
        found = _sign(self.loss)
        return None if found is None else -found

    def by_score(self, name: str) -> int | None:
        return _sign(self.scores.get(name))


def adjusted(judgements: list[Judgement], score: str) -> list[Judgement]:
    """With p as it is when as many comparisons are made at once: all that a verdict goes by together, the loss that is judged
    and this score of every contender; each of the other figures by itself."""
    families: dict[str, list[tuple[int, str]]] = {}
    for place, judged in enumerate(judgements):
        for name, each in judged.differences.items():
            if each.value == 0 and not math.isfinite(each.half):
                continue  # the same throughout: this could not have been a false alarm
            told = name in ("evaluated" if judged.evaluated else "val_loss", f"score {score}")
            families.setdefault("" if told else name, []).append((place, name))
    ps: list[dict[str, float]] = [{} for _ in judgements]
    for family in families.values():
        found = holm([judgements[place].differences[name].p for place, name in family])
        for (place, name), p in zip(family, found, strict=True):
            ps[place][name] = p
    return [judged.with_ps(own) for judged, own in zip(judgements, ps, strict=True)]


def in_common(base: Contender, other: Contender, score: str) -> set[Question]:
    """The questions to which every run's answer has this score."""
    return set.intersection(*(set(run.answers.tuned.get(score, {})) for each in (base, other) for run in each.runs))


def _sign(found: Difference | None) -> int | None:
    if found is None or not math.isfinite(found.p):
        return None
    return 0 if found.p >= _FALSE_ALARMS else 1 if found.value > 0 else -1


def why_not_comparable(base: Contender, other: Contender) -> str:
    """Why losses of the two are not of the same thing; empty if they are.

    Seeds may each have validation examples of their own, where these are split off: then both sides need the same ones.
    """
    for run, others in [(run, other.runs) for run in base.runs] + [(run, base.runs) for run in other.runs]:
        reasons = [_differ(run, each) for each in others]
        if all(reasons):
            return reasons[0]
    return ""


def _differ(a: Run, b: Run) -> str:
    smoothing = [run.settings.get("label_smoothing", 0.0) for run in (a, b)]
    if smoothing[0] != smoothing[1]:
        return f"label_smoothing {smoothing[0]} and {smoothing[1]} make other losses of the same model"
    one, two = a.size("valid"), b.size("valid")
    if one.get("digest") and two.get("digest"):
        if one["digest"] == two["digest"]:
            return ""
        same = _counts(one) == _counts(two)
        return "they were validated on other examples, or on other tokens of them" + (
            ": as many, and not the same" if same else f": {_counted(a)} and {_counted(b)}"
        )
    if a.settings.get("model") != b.settings.get("model"):
        return f"the models are others ({a.settings.get('model')} and {b.settings.get('model')}), and their tokens may be, too"
    if one and two:
        counts = f": {_counted(a)} and {_counted(b)}"
        return "" if _counts(one) == _counts(two) else f"they were validated on other examples{counts}"
    data = [run.settings.get("data") for run in (a, b)]
    return "" if data[0] == data[1] else f"their data is not the same ({data[0]} and {data[1]})"


def _counts(size: dict[str, object]) -> list[object]:
    return [size.get(name) for name in ("rows", "examples", "tokens", "supervised_tokens")]


def _counted(run: Run) -> str:
    return f"{run.count('valid', 'examples'):,} with {run.count('valid', 'supervised_tokens'):,} trained tokens"
