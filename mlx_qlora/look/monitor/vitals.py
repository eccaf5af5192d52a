"""The figures of a run that one wants to know at a moment, in words: how long yet, how good, how fast, how much memory."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from mlx_qlora.look.console import size
from mlx_qlora.look.gap import gap_text, grade
from mlx_qlora.look.history import History, number
from mlx_qlora.look.monitor.pulse import Pulse, pulse
from mlx_qlora.records import EvalReport
from mlx_qlora.run.recorder import Record, read
from mlx_qlora.run.watchdog import duration

_RECENT = 100  # updates that the speed of now is told from
_BEAT_S = 30.0  # a heartbeat that is older says nothing of the memory that is free now

Fact = tuple[str, str]  # a name and what there is to say of it


@dataclass(frozen=True)
class Seen:
    """A run at a moment: all that the screen is made of."""

    history: History
    record: Record | None
    pulse: Pulse
    now: float  # seconds since 1970

    @property
    def planned(self) -> int | None:
        """Updates of the whole run; the recorder knows them first."""
        planned = self.record.facts.get("planned") if self.record else None
        return planned if isinstance(planned, int) else self.history.planned_steps

    @property
    def going(self) -> bool:
        return self.pulse.state in ("running", "hangs")


def seen(history: History) -> Seen:
    """With what the flight recorder says now."""
    record = read(history.folder)
    return Seen(history, record, pulse(history, record), time.time())


def facts(run: Seen, unicode: bool) -> list[Fact]:
    """The most important first: a low terminal shows only those."""
    history = run.history
    found = [("time", _time(run)), ("best", _best(history, unicode)), ("stopping", _stopping(history)), ("speed", _speed(run))]
    found += [("memory", _memory(run)), ("values", _values(history)), ("teacher", _teacher(history))]
    return [fact for fact in found if fact[1]]


def _time(run: Seen) -> str:
    so_far = number(run.history.lines[-1].get("elapsed_s")) if run.history.lines else math.nan
    if not math.isfinite(so_far):
        return ""
    if not run.going:
        return duration(so_far)
    told = f"{duration(so_far)} so far"
    left = left_s(run)
    if left is None:
        return f"{told}, what is left is unknown"
    return f"{told}, about {duration(left)} left: done {_clock(run.now + left, run.now)}"


def left_s(run: Seen) -> float | None:
    """Seconds until all updates are made, by the last ones and the validations among them; None: it is not known.

    One update in a hundred that took very long does not count as long as it was.
    """
    usual, validation = _pace(run.history)
    if usual is None or not run.planned:
        return None
    step, planned = run.history.step, run.planned
    return max(0, planned - step) * usual + _validations_left(run, step, planned) * validation


def _pace(history: History) -> tuple[float | None, float]:
    """(seconds of an update, seconds of a validation) of late."""
    steps, elapsed = (each[-_RECENT - 1 :] for each in history.figures("elapsed_s"))
    took = np.diff(elapsed)
    known = (np.diff(steps) == 1) & (took >= 0)
    after = np.isin(steps[:-1], [report.step for report, _ in history.validations])  # whose time then counts in
    plain, validated = took[known & ~after], took[known & after]
    if not len(plain):
        return (float(np.median(validated)), 0.0) if len(validated) else (None, 0.0)
    usual = float(np.minimum(plain, 5 * np.median(plain)).mean())
    return usual, max(0.0, float(np.median(validated)) - usual) if len(validated) else 0.0


def _validations_left(run: Seen, step: int, planned: int) -> int:
    steps = [report.step for report, _ in run.history.validations]
    every = run.record.facts.get("eval_every") if run.record else None
    every = every or run.history.settings.get("eval_every") or (steps[-1] - steps[-2] if len(steps) > 1 else 0)
    if not (isinstance(every, int) and every > 0):
        return 0
    return planned // every - step // every + (step < planned and planned % every > 0)  # there is one at the end, too


def _clock(moment: float, now: float) -> str:
    then, today = time.localtime(moment), time.localtime(now)
    if then[:3] == today[:3]:
        return time.strftime("at %H:%M", then)
    return time.strftime("on %a at %H:%M" if moment - now < 6 * 86400 else "on %Y-%m-%d at %H:%M", then)


def _best(history: History, unicode: bool) -> str:
    if history.best is None:
        return "no validation was finite yet" if history.validations else "no validation yet" if history.lines else ""
    report, epoch = history.best
    gap = f", gap {gap_words(report, unicode)} {grade(report.gap)}" if math.isfinite(report.gap) else ""
    return f"{report.val_loss:.4f} at update {report.step:,} (epoch {epoch:.2f}){gap}"


def _stopping(history: History) -> str:
    patience = int(history.settings.get("early_stopping.patience") or 0)
    stale = history.validations[-1][0].stale if history.validations else 0
    if not patience:
        return f"off; {stale} without improvement" if history.settings else ""
    reached = ": it stops" if stale >= patience else ""
    return f"{stale} of {patience} validations without improvement{reached}"


def _speed(run: Seen) -> str:
    lines, tokens = run.history.lines, run.history.figures("tokens")[1]
    if not lines:
        return ""
    whole = number(lines[-1].get("elapsed_s"))
    said = [f"{number(lines[-1].get('tokens_per_second')):,.0f} tok/s in the last update"]
    if whole > 0 and len(tokens):
        said.append(f"{tokens.sum() / whole:,.0f} on average")
    usual = _pace(run.history)[0]
    return ", ".join(said) + (f"; {duration(usual)} an update" if usual is not None else "")


def _memory(run: Seen) -> str:
    peaks = run.history.figures("peak_memory_gb")[1]
    said = [f"{size(1e9 * peaks.max())} at most"] if len(peaks) else []
    beat = run.record.beat if run.record and run.going else {}
    if beat.get("total") and run.now - beat.get("at", 0) < _BEAT_S:
        said.append(f"{size(beat['available'])} of the machine's {size(beat['total'])} are free")
    return "; ".join(said)


def _values(history: History) -> str:
    if not history.lines:
        return ""
    line = history.lines[-1]
    rate, norm, skipped = (number(line.get(name)) for name in ("learning_rate", "grad_norm", "skipped_updates"))
    said = f"loss {number(line.get('loss')):.4f}, learning rate {rate:.3g}, gradient norm {norm:.3g}"
    rollbacks = int(line.get("rollbacks") or 0)
    said += f", {skipped:.0f} skipped" if skipped > 0 else ""
    return said + (f", went back {rollbacks} time{'s' if rollbacks > 1 else ''}" if rollbacks else "")


def _teacher(history: History) -> str:
    """What the last update learnt from: what the validation loss is compared with is the cross-entropy here, not the loss."""
    if not history.lines or "kd" not in history.lines[-1]:
        return ""
    far, own, warm, share = (number(history.lines[-1].get(name)) for name in ("kd", "ce", "temperature", "alpha"))
    return f"divergence {far:.4f}, cross-entropy {own:.4f}; temperature {warm:g}, alpha {share:g}"


def gap_words(report: EvalReport, unicode: bool) -> str:
    """A gap with its error, in ASCII too."""
    text = gap_text(report.gap, report.gap_se)
    return text if unicode else text.replace(" ± ", " +-")
