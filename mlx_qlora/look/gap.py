"""The gap between validation and training loss: its grade, and what it was over a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_qlora.records import EvalReport

_GRADES = ((0.05, "excellent"), (0.15, "good"), (0.30, "moderate"))


def grade(gap: float) -> str:
    """
    >>> [grade(gap) for gap in (-0.1, 0.049, 0.05, 0.2, 2.27)]
    ['excellent', 'excellent', 'good', 'moderate', 'critical']
    """
    return next((name for limit, name in _GRADES if gap < limit), "critical")


@dataclass(frozen=True)
class GapAnalysis:
    mean: float
    maximum: float
    minimum: float
    last: float
    at_best: float
    grade_at_best: str


def analyse(reports: Sequence[EvalReport]) -> GapAnalysis:
    """The gaps of a run's validations."""
    gaps = [report.gap for report in reports]
    at_best = min(reports, key=lambda report: report.val_loss).gap
    return GapAnalysis(sum(gaps) / len(gaps), max(gaps), min(gaps), gaps[-1], at_best, grade(at_best))
