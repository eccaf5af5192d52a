"""What to change after a run, judged by its validations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_qlora.records import EvalReport

_LARGE = 0.15  # a gap from here on asks for something
_WORSE = 0.05  # of the best validation loss: by what the last one is above it
_STILL_FALLING = 0.01  # of a validation loss, from one validation to the next


@dataclass(frozen=True)
class Advice:
    """A setting, what it was, what to try, and why."""

    setting: str
    was: Any
    to: Any
    why: str

    def __str__(self) -> str:
        was = "" if self.was is None else f"{_plain(self.was)} -> "
        return f"{self.setting} {was}{_plain(self.to)}: {self.why}"


def advise(
    validations: Sequence[tuple[EvalReport, float]],
    best: tuple[EvalReport, float],
    overfits: bool,
    settings: Mapping[str, Any],
    parameters: int,
    trained_tokens: int,
) -> Iterator[Advice]:
    """The most telling first; nothing where there is nothing to change."""
    last, epoch = validations[-1]
    if not (math.isfinite(epoch) and math.isfinite(best[1])):  # lines that somebody has changed
        return
    if overfits or last.gap - 2 * (last.gap_se if math.isfinite(last.gap_se) else 0.0) > _LARGE:
        yield from _against_overfitting(best, epoch, overfits, settings, parameters, trained_tokens)
    elif len(validations) > 1 and best[0] is last:
        before = validations[-2][0].val_loss
        if before - last.val_loss > _STILL_FALLING * before:
            yield from _against_stopping_short(before - last.val_loss, last.step, epoch, settings)
    elif (rise := last.val_loss - best[0].val_loss) > _WORSE * best[0].val_loss:
        yield from _against_wandering(rise, last.train_eval_loss - best[0].train_eval_loss, settings)


def _against_overfitting(
    best: tuple[EvalReport, float],
    ended: float,
    overfits: bool,
    settings: Mapping[str, Any],
    parameters: int,
    trained_tokens: int,
) -> Iterator[Advice]:
    report, epoch = best
    epochs, rate, rank = settings.get("epochs"), settings.get("learning_rate"), settings.get("lora.rank")
    whole = settings.get("fine_tune_type") == "full"
    name, where = ("dropout", "a model") if whole else ("lora.dropout", "adapters")
    dropout, patience = settings.get(name), settings.get("early_stopping.patience")
    enough = max(1, math.ceil(epoch))
    if overfits and patience == 0:
        yield Advice("early_stopping.patience", 0, 5, f"validation was best at epoch {epoch:.2f}, and nothing stopped the run")
    if overfits and isinstance(epochs, int) and enough < min(epochs, math.ceil(ended)):
        yield Advice("epochs", epochs, enough, f"from epoch {epoch:.2f} on only the known examples got better")
    if isinstance(rate, float) and epoch < 0.5 * ended and epoch <= 1:
        yield Advice(
            "learning_rate", rate, rate / 2, f"validation was best after {report.step:,} updates, within the first epoch"
        )
    if isinstance(dropout, float | int) and dropout < 0.05:
        lose = "loses some of what its layers give learns" if whole else "lose some of their inputs learn"
        yield Advice(name, dropout, 0.08, f"{where} that {lose} less by heart")
    if not whole and isinstance(rank, int) and rank > 1 and parameters > trained_tokens > 0:
        why = f"{parameters:,} parameters are trained on {trained_tokens:,} trained tokens an epoch"
        yield Advice("lora.rank", rank, max(1, rank // 2), why)
    if trained_tokens:
        why = f"{trained_tokens:,} trained tokens an epoch is what the model has to go by; no setting adds to it"
        yield Advice("data", None, "more examples, or more varied ones", why)


def _against_stopping_short(fell: float, step: int, ended: float, settings: Mapping[str, Any]) -> Iterator[Advice]:
    """Of what has ended the run; nothing where it was broken off, or goes on."""
    for name, reached in (("max_steps", step), ("epochs", ended)):
        was = settings.get(name)
        if isinstance(was, int) and 0 < was <= reached:
            yield Advice(name, was, 2 * was, f"validation still fell by {fell:.3f} at the end, and the gap is not large")
            return


def _against_wandering(rise: float, train_rise: float, settings: Mapping[str, Any]) -> Iterator[Advice]:
    rate = settings.get("learning_rate")
    if train_rise > 0 and isinstance(rate, float):
        why = f"since the best, the loss of known examples rose by {train_rise:.3f} and that of new ones by {rise:.3f}"
        yield Advice("learning_rate", rate, rate / 2, f"{why}: the updates are too large, or come in too small batches")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
