"""The measures of a comparison: a row each, with a cell for every contender."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_qlora.findings import size
from mlx_qlora.look.comparison.answers import how_many, interval_of
from mlx_qlora.look.comparison.contender import Contender, Run
from mlx_qlora.look.comparison.judgement import Judgement
from mlx_qlora.look.comparison.statistics import Difference, Interval
from mlx_qlora.look.comparison.verdict import p_text
from mlx_qlora.look.evaluation.scores import title
from mlx_qlora.look.exposure import rough, short
from mlx_qlora.look.gap import grade
from mlx_qlora.look.history import number
from mlx_qlora.run.watchdog import duration

Value = float | int | str | None


@dataclass(frozen=True)
class Cell:
    """What a person reads, and the figures for programs."""

    text: str = ""
    value: Value = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """`key` is its name in CSV; the text of several lines has the interval below the figure."""

    section: str
    label: str
    key: str
    cells: tuple[Cell, ...]


def rows(contenders: Sequence[Contender], judgements: Sequence[Judgement]) -> list[Row]:
    """Without those that nobody has."""
    found = [
        *_settings(contenders),
        *_validation(contenders),
        *_scores(contenders),
        *_against(judgements),
        *_exposure(contenders),
        *_work(contenders),
    ]
    return [row for row in found if any(cell.text for cell in row.cells)]


# What differs


def _settings(contenders: Sequence[Contender]) -> Iterator[Row]:
    names = dict.fromkeys(name for each in contenders for name in each.first.settings if name != "seed")
    for name in names:
        values = [each.first.settings.get(name) for each in contenders]
        if any(value != values[0] for value in values):
            yield Row("settings", name, name, tuple(Cell(plain(value), _raw(value)) for value in values))
    seeds = [", ".join(plain(run.settings.get("seed")) for run in each.runs) for each in contenders]
    if any(each.of_seeds for each in contenders) or len(set(seeds)) > 1:
        yield Row("settings", "seed", "seed", tuple(Cell(text, text) for text in seeds))
    for split, whose in (("train", "training"), ("valid", "validation")):
        for name, what in (("examples", "examples"), ("supervised_tokens", "trained tokens")):
            sizes = [each.first.size(split).get(name) for each in contenders]
            if any(size != sizes[0] for size in sizes):
                cells = tuple(Cell(f"{size:,}", size) if isinstance(size, int) else Cell() for size in sizes)
                yield Row("data", f"{whose} {what}", f"{split}_{name}", cells)


def plain(value: Any) -> str:
    """A setting as a person writes it.

    >>> plain(0.002), plain(None), plain(["a", "b"]), plain({"beta1": 0.8}), plain(True)
    ('0.002', 'none', 'a, b', 'beta1 0.8', 'true')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _raw(value: Any) -> Value:
    """For programs: a number as it is."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else plain(value)


# How it went


def _validation(contenders: Sequence[Contender]) -> Iterator[Row]:
    def row(label: str, key: str, cell: Callable[[Contender], Cell]) -> Row:
        return Row("validation", label, key, tuple(map(cell, contenders)))

    yield row("best val_loss", "best_val_loss", lambda each: _within(each.loss(lambda run: run.best)))
    yield row("at update (epoch)", "best_step", _at)
    yield row("gap at the best", "gap_at_best", lambda each: _within(each.gap, "+.3f"))
    yield row("grade of the gap", "gap_grade", _grade)
    yield row("last val_loss", "last_val_loss", lambda each: _within(each.loss(lambda run: run.last)))
    yield row("overfits from", "overfits_from_step", _overfits)


def _at(each: Contender) -> Cell:
    steps = each.mean(lambda run: run.best.step if run.best else math.nan).value
    epoch = each.mean(lambda run: run.history.best[1] if run.history.best else math.nan).value
    return Cell(f"{steps:,.0f} ({epoch:.2f})", steps) if math.isfinite(steps) else Cell()


def _grade(each: Contender) -> Cell:
    return _word(grade(each.gap.value)) if math.isfinite(each.gap.value) else Cell()


def _overfits(each: Contender) -> Cell:
    steps = each.each(lambda run: number(run.history.gap and run.history.gap.overfits_from_step))
    if not steps:
        return Cell("nowhere") if any(run.history.gap for run in each.runs) else Cell()
    of = f" ({len(steps)} of {len(each.runs)})" if each.of_seeds else ""
    return Cell(f"update {sum(steps) / len(steps):,.0f}{of}", sum(steps) / len(steps))


def _scores(contenders: Sequence[Contender]) -> Iterator[Row]:
    asked = [how_many(each.common) for each in contenders]
    counts = tuple(Cell(f"{each:,}", each) if each else Cell() for each in asked)
    yield Row("answers", "questions", "questions", counts)
    names = list(dict.fromkeys(name for each in contenders for run in each.runs for name in run.answers.tuned))
    for name in names:
        yield Row("answers", title(name), name, tuple(_between(each.score(name)) for each in contenders))
        if name == names[0]:
            base = tuple(_figure(each.mean(_base(name)).value, ".3f") for each in contenders)
            yield Row("answers", f"{title(name)} before", f"{name}_base", base)
    for name, label in _EVALUATED.items():
        cells = tuple(_between(_reported(each, name)) for each in contenders)
        yield Row("answers", label, f"evaluated_{name}", cells)


_EVALUATED = {
    "loss": "evaluated loss",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "next_token_accuracy": "next-token accuracy",
}


def _base(name: str) -> Callable[[Run], float]:
    def mean(run: Run) -> float:
        values = list(run.answers.base.get(name, {}).values())
        return sum(values) / len(values) if values else math.nan

    return mean


def _reported(each: Contender, name: str) -> Interval:
    if each.of_seeds:
        return each.mean(lambda run: interval_of(run.answers.report.get(name)).value)
    return interval_of(each.first.answers.report.get(name))


# Against the baseline


def _against(judgements: Sequence[Judgement]) -> Iterator[Row]:
    if not judgements:
        return
    section = f"against {judgements[0].base.name}"
    losses = [judged.val_loss for judged in judgements]
    yield from _compared(section, "val_loss", "val_loss", losses, "not comparable" if _none_comparable(judgements) else "")
    if any(judged.evaluated for judged in judgements):
        evaluated = [judged.evaluated for judged in judgements]
        yield from _compared(section, "evaluated loss", "evaluated_loss", evaluated)
    for name in dict.fromkeys(name for judged in judgements for name in judged.scores):
        yield from _compared(section, title(name), name, [judged.scores.get(name) for judged in judgements])


def _none_comparable(judgements: Sequence[Judgement]) -> bool:
    return all(judged.not_comparable for judged in judgements)


def _compared(section: str, label: str, key: str, found: Sequence[Difference | None], otherwise: str = "") -> Iterator[Row]:
    differences = [_between(each, "+.3f") if each else Cell(otherwise) for each in found]
    ps = [
        Cell(p_text(each.p).removeprefix("p ").removeprefix("= "), each.p) if each and math.isfinite(each.p) else Cell()
        for each in found
    ]
    yield Row(section, label, f"{key}_difference", (Cell("baseline"), *differences))
    yield Row(section, f"{label}, p", f"{key}_p", (Cell(), *ps))


# What it saw


def _exposure(contenders: Sequence[Contender]) -> Iterator[Row]:
    """What makes runs with other epochs, windows and batches comparable."""
    for name, label, form in (
        ("tokens_seen", "tokens", rough),
        ("passes", "passes over each token", short),
        ("tokens_per_parameter", "per trained parameter", short),
    ):
        values = [each.mean(partial(Run.figure, name=name)).value for each in contenders]
        cells = (Cell(form(value), value) if math.isfinite(value) else Cell() for value in values)
        yield Row("tokens seen", label, name, tuple(cells))


# What it took


def _work(contenders: Sequence[Contender]) -> Iterator[Row]:
    def row(label: str, key: str, cell: Callable[[Contender], Cell]) -> Row:
        return Row("speed and memory", label, key, tuple(map(cell, contenders)))

    def mean(key: str, form: str) -> Callable[[Contender], Cell]:
        return lambda each: _figure(each.mean(lambda run: run.figure(key)).value, form)

    yield row("ended", "ended", lambda each: _word(", ".join(dict.fromkeys(run.ended or "going on" for run in each.runs))))
    yield row("updates", "steps", mean("steps", ",.0f"))
    yield row("trained parameters", "trainable_parameters", mean("trainable_parameters", ",.0f"))
    yield row("tokens", "tokens", mean("tokens", ",.0f"))
    yield row("tokens/s", "tokens_per_second", mean("tokens_per_second", ",.0f"))
    yield row("time of an update", "seconds_per_update", lambda each: _seconds(each.mean(_per_update).value))
    yield row("whole time", "elapsed_s", lambda each: _seconds(each.mean(lambda run: run.figure("elapsed_s")).value))
    yield row("peak memory", "peak_memory_gb", lambda each: _bytes(each.mean(lambda run: run.figure("peak_memory_gb")).value))


def _per_update(run: Run) -> float:
    steps = run.figure("steps")
    return run.figure("elapsed_s") / steps if steps else math.nan


def _seconds(value: float) -> Cell:
    return Cell(duration(value), value) if math.isfinite(value) else Cell()


def _bytes(gigabytes: float) -> Cell:
    return Cell(size(1e9 * gigabytes), gigabytes) if math.isfinite(gigabytes) else Cell()


# Cells


def _word(text: str) -> Cell:
    return Cell(text, text or None)


def _figure(value: float, form: str) -> Cell:
    if not math.isfinite(value):
        return Cell()
    return Cell(f"{value:{form}}", int(value) if form == ",.0f" and value == int(value) else value)


def _within(found: Interval, form: str = ".3f") -> Cell:
    """A figure with half of its interval."""
    if not math.isfinite(found.value):
        return Cell()
    if not math.isfinite(found.half):
        return _figure(found.value, form)
    return Cell(f"{found.value:{form}} ± {found.half:.3f}", found.value, found.low, found.high)


def _between(found: Interval, form: str = ".3f") -> Cell:
    """A figure with its interval below it, which may have it nearer to one of its ends."""
    if not math.isfinite(found.value):
        return Cell()
    if not math.isfinite(found.half):
        return _figure(found.value, form)
    return Cell(f"{found.value:{form}}\n{found.low:{form}} to {found.high:{form}}", found.value, found.low, found.high)
