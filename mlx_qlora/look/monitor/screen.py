"""What `mlx-qlora monitor` shows: a run's history and the size of a terminal made into lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from mlx_qlora.look.gap import gap_facts, grade
from mlx_qlora.look.history import History, number
from mlx_qlora.look.monitor.terminal import Points, Series, chart, limits
from mlx_qlora.look.monitor.vitals import Fact, Seen, facts, gap_words
from mlx_qlora.records import EvalReport

WIDE = 150  # columns from which on two things stand side by side
_BESIDE = 80  # columns of the right one: a validation's row with all its words
_LEAST_CHART = 8  # rows with the title; less shows nothing
_SMOOTHED = 25  # parts of the curve, of which each is a mean
TRAINING, VALIDATION, SAMPLE, BEST = "cyan", "bold yellow", "magenta", "bold green"
_STATES = {
    "waiting": ("waiting", "dim"),
    "begins": ("begins", "bold cyan"),
    "running": ("running", "bold green"),
    "hangs": ("hangs", "bold yellow"),
    "unseen": ("out of sight", "bold yellow"),
    "ended": ("ended", "bold"),
    "died": ("died", "bold red"),
}
_WORDS = {"ended": "ended", "died": "ended"}  # what the line says that says how it stands
_GRADES = {"excellent": "green", "good": "green", "moderate": "yellow", "critical": "red"}


def screen(run: Seen, width: int, height: int, unicode: bool = True) -> list[Text]:
    """At most `height` lines, none wider than `width`."""
    known = facts(run, unicode)
    lines = [*_head(run, width, unicode), *(_wide if width >= WIDE else _narrow)(run, known, width, height - 3, unicode)]
    return [_fitted(line, width, unicode) for line in lines[:height]]


def _narrow(run: Seen, known: list[Fact], width: int, height: int, unicode: bool) -> list[Text]:
    """Curve, validations and facts below each other; the facts are the last to go, the curve takes what is left."""
    count = len(run.history.validations)
    shown = min(count, max(1, min(4, height - len(known) - _LEAST_CHART - 1))) if count else 0
    left = height - len(known) - (shown + 1 if shown else 0)
    if left < _LEAST_CHART:  # either of them
        shown = max(0, min(count, height - len(known) - 1))
        left = 0
    return [
        *(_loss_chart(run, width, left, unicode) if left else []),
        *(_table(run.history, shown, unicode) if shown else []),
        *map(_told, known),
    ]


def _wide(run: Seen, known: list[Fact], width: int, height: int, unicode: bool) -> list[Text]:
    """Loss beside gap and validations, the facts in two columns below, and what the gap means."""
    half, left = (len(known) + 1) // 2, width - _BESIDE
    gap = _gap_facts(run.history, unicode) if height >= 30 else []
    rows = height - half - len(gap) - 1
    right = width - left - 2
    if rows < _LEAST_CHART:
        return _narrow(run, known, width, height, unicode)
    count = len(run.history.validations)
    table = _table(run.history, min(count, max(1, rows // 2 - 1)), unicode) if count else []
    beside = [*_gap_chart(run, right, rows - len(table), unicode), *table]
    two = [_told(fact) for fact in known]
    return [
        *_beside(_loss_chart(run, left, rows, unicode), beside, left + 2),
        Text(),
        *_beside(two[:half], two[half:], left + 2),
        *gap,
    ]


def _beside(left: Sequence[Text], right: Sequence[Text], column: int) -> list[Text]:
    lines = []
    for one, other in zip_longest(left, right):
        line = Text().append_text(one or Text())
        line.truncate(column - 1, pad=True)
        lines.append(line.append(" ").append_text(other or Text()))
    return lines


def _fitted(line: Text, width: int, unicode: bool) -> Text:
    if not unicode:
        plain = line.plain.replace("±", "~").encode("ascii", "replace").decode()
        line = Text(plain, spans=line.spans)
    line.truncate(width, overflow="crop")
    line.rstrip()
    line.no_wrap = True
    return line


# --- the head: three lines


def _head(run: Seen, width: int, unicode: bool) -> list[Text]:
    history = run.history
    word, style = _STATES[run.pulse.state]
    name = "".join(letter if letter.isprintable() else "?" for letter in history.name)
    step, planned = history.step, run.planned
    place = f"update {step:,}/{planned:,}  {step / planned:.1%}" if planned else f"update {step:,}" if step else ""
    if history.lines and math.isfinite(epoch := number(history.lines[-1].get("epoch"))):
        place += f"  epoch {epoch:.2f}"
    first = Text.assemble((name, "bold"), "  ", (word, style))
    room = width - len(place) - 2
    first.truncate(max(room, 12), overflow="crop", pad=room >= 12)
    first.append(f"  {place}")
    return [
        first,
        _bar(step / planned if planned else 0.0, width, unicode),
        _told((_WORDS.get(run.pulse.state, "now"), run.pulse.says)),
    ]


def _bar(share: float, width: int, unicode: bool) -> Text:
    done = min(width, round(share * width))
    full, rest = ("━", "─") if unicode else ("#", "-")
    return Text.assemble((full * done, TRAINING), (rest * (width - done), "dim"))


# --- curves


def _span(history: History) -> tuple[float, float]:
    steps = history.figures(history.trained_loss)[0]
    every = [*steps[:1].tolist(), *steps[-1:].tolist(), *(report.step for report, _ in history.validations)]
    return (min(every), max(max(every), min(every) + 1)) if every else (0, 1)


def _loss_chart(run: Seen, width: int, height: int, unicode: bool) -> list[Text]:
    history = run.history
    steps, losses = history.figures(history.trained_loss)
    window = max(1, round(len(steps) / _SMOOTHED))
    validation, sample, best = _marks(unicode)
    reports = [report for report, _ in history.validations]
    series = [
        Series((steps, smoothed(losses, window)), TRAINING),
        Series(_points(reports, "train_eval_loss"), SAMPLE, sample),
        Series(_points(reports, "val_loss"), VALIDATION, validation),
    ]
    if history.best:
        series.append(Series(_points([history.best[0]], "val_loss"), BEST, best))
    title = Text.assemble(("loss  ", "bold"))
    highest = max((float(ys.max()) for ys in (each.points[1] for each in series) if len(ys)), default=0.0)
    if len(steps):
        mean = f" (mean of {window:,})" if window > 1 else ""
        title.append("── " if unicode else "-- ", TRAINING).append(f"update{mean}  ")
    if reports:
        title.append(validation, VALIDATION).append(" val  ").append(sample, SAMPLE).append(" train  ")
        title.append(best, BEST).append(" best")
    if highest > limits([each.points for each in series])[1]:
        title.append(f"  above: up to {highest:.3g}", "dim")
    if not len(steps):
        title.append("no update is recorded yet" if not history.lines else "no loss was a finite number yet", "dim")
    return [title, *chart(series, width, height - 1, _span(history), unicode)]


def _gap_chart(run: Seen, width: int, height: int, unicode: bool) -> list[Text]:
    reports = [report for report, _ in run.history.validations]
    points = _points(reports, "gap")
    title = Text.assemble(("gap  ", "bold"), ("val less train" if reports else "no validation yet", "dim"))
    series = [Series(points, "dim")]
    for name, style in _GRADES.items():
        series.append(Series(_points([each for each in reports if grade(each.gap) == name], "gap"), style, _marks(unicode)[0]))
    return [title, *chart(series, width, height - 1, _span(run.history), unicode)]


def _marks(unicode: bool) -> tuple[str, str, str]:
    return ("●", "○", "★") if unicode else ("o", "x", "*")


def _points(reports: Sequence[EvalReport], name: str) -> Points:
    steps = np.array([report.step for report in reports], np.float64)
    values = np.array([getattr(report, name) for report in reports], np.float64)
    there = np.isfinite(values)
    return steps[there], values[there]


def smoothed(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Means of `window` values around each; of fewer at both ends.

    >>> smoothed(np.array([1.0, 2.0, 6.0, 3.0]), 3).tolist()
    [1.5, 3.0, 3.6666666666666665, 4.5]
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(0, places - window // 2), np.minimum(len(values), places + (window + 1) // 2)
    means: NDArray[Any] = (sums[last] - sums[first]) / np.maximum(1, last - first)
    return means


# --- the last validations


def _table(history: History, count: int, unicode: bool) -> list[Text]:
    patience = int(history.settings.get("early_stopping.patience") or 0)
    lines = [Text(f"{'update':>7} {'val':>8} {'train':>8}  {'gap':<16} {'':<9}", "dim")]
    for report, _ in history.validations[-count:]:
        known = math.isfinite(report.gap)
        gap = gap_words(report, unicode) if known else "not finite"
        word = grade(report.gap) if known else ""
        line = Text(f"{report.step:>7,} {report.val_loss:8.4f} {report.train_eval_loss:8.4f}  {gap:<16} ")
        line.append(f"{word:<9} ", _GRADES.get(word, "")).append(verdict(report, patience), BEST if report.best else "")
        lines.append(line)
    return lines


def verdict(report: EvalReport, patience: int) -> str:
    """What early stopping made of a validation."""
    if report.best and report.stale == 0:
        return "best so far"
    most = f"{report.stale}/{patience}" if patience else f"{report.stale}"
    return f"best, but barely {most}" if report.best else f"no improvement {most}"


def _gap_facts(history: History, unicode: bool) -> list[Text]:
    if history.gap is None or not math.isfinite(history.gap.at_best):
        return []
    said = [(name if number == 0 else "", line) for name, lines in gap_facts(history.gap) for number, line in enumerate(lines)]
    return [_told((name, line if unicode else line.replace("±", "+-"))) for name, line in said]


def _told(fact: Fact) -> Text:
    return Text.assemble((f"{fact[0]:<9} ", "dim"), fact[1])
