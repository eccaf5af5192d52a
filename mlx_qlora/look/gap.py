"""The gap between validation and training loss: its grade, its error, and what it was over a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_qlora.look.advice import Advice, advise
from mlx_qlora.records import EvalReport

GRADES = ((0.05, "excellent"), (0.15, "good"), (0.30, "moderate"), (math.inf, "critical"))  # a gap below: its grade
SURE = 1.96  # standard errors either side: 95 %
_LAST = 5  # validations that a trend is made of
_T = {2: 4.303, 3: 3.182}  # Student's t, 95 %, by degrees of freedom
_WIDER = 0.05  # what a gap grows by until it is called overfitting: the width of a grade

Validations = Sequence[tuple[EvalReport, float]]  # with the epoch


def grade(gap: float) -> str:
    """
    >>> [grade(gap) for gap in (-0.1, 0.049, 0.05, 0.2, 2.27)]
    ['excellent', 'excellent', 'good', 'moderate', 'critical']
    """
    return next((name for limit, name in GRADES if gap < limit), "critical")


def within_error(report: EvalReport) -> bool:
    """Whether a gap is smaller than its own error: other examples could as well have given the other sign."""
    return abs(report.gap) < SURE * report.gap_se


def best_of(validations: Validations) -> tuple[EvalReport, float]:
    return min(validations, key=lambda one: one[0].val_loss if math.isfinite(one[0].val_loss) else math.inf)


@dataclass(frozen=True)
class GapAnalysis:
    """The gaps of a run's validations. Losses are in nats a token."""

    mean: float
    maximum: float
    minimum: float
    last: float
    last_se: float
    at_best: float
    at_best_se: float
    grade_at_best: str
    within_error_at_best: bool
    trend: float | None  # by what the gap grows in an epoch, over the last validations; None: they are too few
    trend_is_clear: bool  # whether that is more than what scatter alone would give
    overfits_from_step: int | None  # from where on only known examples got better; None: nowhere
    overfits_from_epoch: float | None
    rise: float  # of the validation loss since its best
    fall: float  # of the loss of known examples since then
    advice: list[Advice]


def analyse(validations: Validations, settings: Mapping[str, Any], parameters: int = 0, trained_tokens: int = 0) -> GapAnalysis:
    """`settings`: the run's, by dotted names. `trained_tokens`: those of an epoch, and `parameters` those that are trained,
    as far as they are known."""
    reports = [report for report, _ in validations]
    gaps = [report.gap for report in reports]
    best, last = best_of(validations), validations[-1]
    worse = overfitting(validations)
    trend, clear = _trend(validations[-_LAST:])
    return GapAnalysis(
        mean=sum(gaps) / len(gaps),
        maximum=max(gaps),
        minimum=min(gaps),
        last=gaps[-1],
        last_se=last[0].gap_se,
        at_best=best[0].gap,
        at_best_se=best[0].gap_se,
        grade_at_best=grade(best[0].gap),
        within_error_at_best=within_error(best[0]),
        trend=trend,
        trend_is_clear=clear,
        overfits_from_step=best[0].step if worse else None,
        overfits_from_epoch=best[1] if worse else None,
        rise=last[0].val_loss - best[0].val_loss,
        fall=best[0].train_eval_loss - last[0].train_eval_loss,
        advice=list(advise(validations, best, worse, settings, parameters, trained_tokens)),
    )


def overfitting(validations: Validations) -> bool:
    """Whether, since the best validation, only known examples got better, and the gap wider for it."""
    best, last = best_of(validations)[0], validations[-1][0]
    return last.train_eval_loss < best.train_eval_loss and last.gap - best.gap > _WIDER


def _trend(validations: Validations) -> tuple[float | None, bool]:
    """(the slope of the line through the gaps, whether its 95 % interval is on one side of nothing or each gap is larger, or
    each smaller, than the one before)."""
    epochs, gaps = np.array([epoch for _, epoch in validations]), np.array([report.gap for report, _ in validations])
    if len(gaps) < 4 or not np.isfinite([*gaps, *epochs]).all() or np.ptp(epochs) == 0:
        return None, False
    slope, start = np.polyfit(epochs, gaps, 1)
    left, spread = gaps - (slope * epochs + start), epochs - epochs.mean()
    error = math.sqrt((left @ left) / (len(gaps) - 2) / (spread @ spread))
    steps = np.diff(gaps) * np.sign(slope)
    return float(slope), bool(abs(slope) > _T[len(gaps) - 2] * error or (steps > 0).all())


def gap_text(gap: float, error: float) -> str:
    """A gap with the half of its 95 % interval, where that is known."""
    return f"{gap:+.3f} ± {SURE * error:.3f}" if math.isfinite(error) else f"{gap:+.3f}"


def gap_facts(gap: GapAnalysis) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of what the gaps of a run say, and what to change."""
    small = ", and smaller than its own error" if gap.within_error_at_best else ""
    lines = [
        f"{gap_text(gap.at_best, gap.at_best_se)} at the best: {gap.grade_at_best}{small}",
        f"over the run mean {gap.mean:+.3f}, maximum {gap.maximum:+.3f}, minimum {gap.minimum:+.3f}",
    ]
    if gap.trend is not None:
        way = f"{'growing' if gap.trend > 0 else 'shrinking'} by {abs(gap.trend):.3f} an epoch"
        lines.append(f"in the last validations {way if gap.trend_is_clear else 'neither growing nor shrinking'}")
    if gap.overfits_from_step is not None:
        lines.append(
            f"overfits from update {gap.overfits_from_step:,} (epoch {gap.overfits_from_epoch:.2f}) on: known examples fell by "
            f"{gap.fall:.3f} since, new ones rose by {gap.rise:.3f}; the weights that are kept are from there"
        )
    yield "gap", lines
    if gap.advice:
        yield "advice", [str(each) for each in gap.advice]
