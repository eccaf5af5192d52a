"""Exposure in words: the block of a plan, the line in a run's header, and warnings that say what to set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_qlora.data.exposure import Amount, Exposure, times_as_many

YARDSTICK = 20  # tokens a parameter: compute-optimal from nothing (Hoffmann et al. 2022)
_MOST_PASSES = 300  # over the same text that are worth a word; more are learning by heart
_SMALLER = 0.7  # of the parameters: a model that is worth a change
_ABOUT = 1.1  # within a tenth two runs see about as much


def human(count: float) -> str:
    """A count as a person reads it.

    >>> human(29_300), human(119_992_320), human(5_999_961_600)
    ('29,300', '120.0 M', '6.00 G')
    """
    if count < 999_950:
        return f"{count:,.0f}"
    return f"{count / 1e6:,.1f} M" if count < 999.95e6 else f"{count / 1e9:,.2f} G"


def rough(count: float) -> str:
    """The same in two or three digits, for the middle of a sentence.

    >>> rough(239_998_976), rough(7_183_762_560), rough(912)
    ('240 M', '7.2 G', '912')
    """
    for unit, least in ((" G", 999.5e6), (" M", 999.5e3), ("", 0)):
        if count >= least:
            value = count / {" G": 1e9, " M": 1e6, "": 1}[unit]
            return f"{value:.1f}{unit}" if value < 9.95 and unit else f"{value:,.0f}{unit}"
    return f"{count:g}"


def short(value: float | None) -> str:
    """
    >>> short(119.4), short(8.0), short(0.1567), short(None)
    ('119', '8.0', '0.16', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def brief(planned: Exposure, longest: int) -> str:
    """One line for the header of a run."""
    if planned.tokens_seen is None or planned.data is None:
        if not planned.updates:
            return "a stream has no known length; max_steps says how much of it is seen"
        most = rough(planned.updates * planned.examples_per_update * longest)
        return f"a stream has no known length: {planned.updates:,} updates, up to {most} tokens"
    a_parameter = short(planned.tokens_per_parameter)
    whose = "" if planned.trained_parameters == planned.total_parameters else " trained"
    return (
        f"{human(planned.tokens_seen)} tokens in {planned.updates:,} update{'s' * (planned.updates != 1)}, "
        f"{_passes(planned.passes)}" + (f", {a_parameter} tokens per{whose} parameter" if planned.trained_parameters else "")
    )


def _passes(passes: float | None) -> str:
    return "1.0 pass" if short(passes) == "1.0" else f"{short(passes)} passes"


def block(planned: Exposure, from_nothing: bool) -> Iterator[tuple[str, str]]:
    """(name, figure) of all there is to say of a plan."""
    data = planned.data
    if data is None or planned.updates_per_epoch is None:
        return
    if data.documents is not None:
        yield "documents" if data.window else "rows", f"{data.documents:,}"
    yield "tokens", human(data.tokens)
    kind = "windows" if data.window else "examples"
    yield kind, f"{data.examples:,} an epoch{_of_windows(data)}"
    full, left = planned.full_updates_per_epoch, data.examples % planned.examples_per_update
    last = f": {full:,} full ones and one of {left}" if full and full != planned.updates_per_epoch else ""
    yield (
        "updates",
        f"{planned.updates:,} of {planned.examples_per_update:,} {kind}, {planned.updates_per_epoch:,} an epoch{last}",
    )
    yield "tokens in an update", f"{'' if data.window else 'about '}{planned.tokens_per_update:,}"
    yield "tokens seen", f"{human(planned.tokens_seen or 0)} in {_length(planned)}"
    if (planned.supervised_tokens_seen or 0) < 0.99 * (planned.tokens_seen or 0):
        yield "of them trained", human(planned.supervised_tokens_seen or 0)
    yield "passes over each token", short(planned.passes)
    if planned.trained_parameters:
        yield "tokens per parameter", _by_the_yardstick(planned, from_nothing)


def _of_windows(data: Amount) -> str:
    if data.window is None or data.stride is None:
        return ""
    inside = max(0, data.window - data.stride)
    counts = {"each": "counts each time", "once": "counts once"}.get(data.overlap, data.overlap)
    overlap = f"overlap {inside:,}, which {counts}" if inside else "no overlap"
    return f", of {data.window:,} tokens, stride {data.stride:,}: {overlap}"


def _length(planned: Exposure) -> str:
    if planned.ended_by_max_steps:
        return f"{planned.updates:,} updates, where max_steps ends it"
    return f"{planned.epochs:,} epoch{'s' * (planned.epochs > 1)}"


def _by_the_yardstick(planned: Exposure, from_nothing: bool) -> str:
    trained, whole = planned.trained_parameters or 0, planned.total_parameters
    figure = short(planned.tokens_per_parameter)
    if from_nothing:
        return (
            f"{figure}, of {human(trained)}; from nothing about {YARDSTICK} are the yardstick (Hoffmann et al. 2022), "
            "and small models gain from many more"
        )
    if trained == whole:
        return f"{figure}, of {human(trained)}; a model that knows much already has no yardstick"
    return f"{figure}, of {human(trained)} that are trained; adapters have no yardstick, validation tells"


# Warnings


def warnings(planned: Exposure, from_nothing: bool, presets: Mapping[str, int] | None = None) -> list[str]:
    """What a plan lacks, each with the figure, why it matters, and what to set. `presets`: smaller models to choose from."""
    if planned.data is None or not planned.data.examples:
        return []
    read = *_stride(planned, planned.data), *_less_than_all(planned, planned.data)
    return [*read, *_undertrained(planned, from_nothing, presets)]


def _stride(planned: Exposure, data: Amount) -> Iterator[str]:
    window, stride = data.window, data.stride
    if window is None or stride is None or data.readable <= window:
        return
    quarter = max(1, window // 4)
    if stride > quarter and data.overlap == "each" and not planned.ended_by_max_steps:
        epochs = math.ceil(planned.epochs * stride / quarter)
        yield (
            f"stride {stride:,} is {stride / window:.0%} of the window of {window:,}, more than a quarter: an epoch reads each "
            f"token {short(window / stride)} times instead of {short(window / quarter)}, and nothing in its speed shows it: "
            f"--stride {quarter}, or --epochs {epochs} for as many tokens"
        )


def _less_than_all(planned: Exposure, data: Amount) -> Iterator[str]:
    if not planned.ended_by_max_steps or planned.updates_per_epoch is None or planned.passes is None:
        return
    if planned.updates >= planned.updates_per_epoch or (data.window and planned.passes >= 1):
        return
    share = planned.updates / planned.updates_per_epoch
    what = "windows" if data.window else "examples"
    yield (
        f"max_steps ends it after {planned.updates:,} of the {planned.updates_per_epoch:,} updates of an epoch, so "
        f"{_share(1 - share)} of the {what} are never seen: --max-steps {planned.updates_per_epoch} sees each once"
    )


def _share(value: float) -> str:
    """
    >>> _share(0.5), _share(0.9995)
    ('50%', '99.95%')
    """
    return f"{value:.0%}" if value < 0.99 else f"{min(value, 0.9999):.2%}"


def _undertrained(planned: Exposure, from_nothing: bool, presets: Mapping[str, int] | None) -> Iterator[str]:
    tokens, parameters, data = planned.tokens_seen, planned.trained_parameters, planned.data
    if not from_nothing or not tokens or not parameters or data is None or tokens >= YARDSTICK * parameters:
        return
    factor = YARDSTICK * parameters / tokens
    ways = [_longer(planned, factor)] if factor * (planned.passes or 0) <= _MOST_PASSES else []
    if not planned.ended_by_max_steps:
        ways.append(f"{rough(data.tokens * factor)} tokens of text instead of {rough(data.tokens)}")
    smaller = [name for name, size in (presets or {}).items() if size < _SMALLER * parameters]
    fitting = [name for name in smaller if presets and YARDSTICK * presets[name] <= tokens] or smaller[:1]
    ways += [f"--preset {fitting[-1]}"] if fitting else []
    said = ", and a smaller model learns more from as many" if fitting else ""
    yield (
        f"{short(planned.tokens_per_parameter)} tokens for each of {rough(parameters)} parameters are few, from nothing about "
        f"{YARDSTICK} are wanted{said}{': ' if ways else ', which takes more text or many more updates'}{', or '.join(ways)}"
    )


def _longer(planned: Exposure, factor: float) -> str:
    """The setting with which a plan sees so many times as much."""
    if not planned.ended_by_max_steps:
        return f"--epochs {math.ceil(planned.epochs * factor)}"
    steps = math.ceil(planned.updates * factor)
    epochs = math.ceil(steps / (planned.updates_per_epoch or 1))
    return f"--max-steps {steps}" + (f" --epochs {epochs}" if epochs > planned.epochs else "")


# Beside another run


@dataclass(frozen=True)
class Other:
    """Another run or plan, as far as it is known."""

    name: str
    tokens_seen: int
    updates: int | None = None
    passes: float | None = None
    tokens_per_parameter: float | None = None
    really: bool = False  # a run has seen them; else they are planned

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def beside(planned: Exposure, other: Other) -> list[str]:
    """Both, side by side."""
    rows: Sequence[tuple[str, str, str]] = (
        ("tokens seen", human(planned.tokens_seen or 0), human(other.tokens_seen)),
        ("passes over each token", short(planned.passes), short(other.passes)),
        ("updates", f"{planned.updates:,}", f"{other.updates:,}" if other.updates is not None else "–"),
        ("tokens per parameter", short(planned.tokens_per_parameter), short(other.tokens_per_parameter)),
    )
    width = max(12, len(other.name) + 2)
    head = f"  {'':<28} {'this plan':>12}{other.name:>{width}}"
    return [head, *(f"  {name:<28} {own:>12}{its:>{width}}" for name, own, its in rows)]


def compared(planned: Exposure, other: Other) -> tuple[str, bool]:
    """(a sentence about both, whether it is a warning)."""
    own = planned.tokens_seen or 0
    factor = times_as_many(own, other.tokens_seen)
    figures = f"({rough(own)} against {rough(other.tokens_seen)})"
    if 1 / _ABOUT <= factor <= _ABOUT:
        return f"this plan sees about as many tokens as {other.name} {figures}", False
    if factor < 1:
        return f"this plan sees {times(1 / factor)} as many tokens as {other.name} {figures}", False
    ways = [_longer(planned, factor)]
    data = planned.data
    stride = int(data.stride / factor) if data is not None and data.stride and not planned.ended_by_max_steps else 0
    ways += [f"--stride {stride}"] if stride else []
    return f"this plan sees {times(factor)} fewer tokens than {other.name} {figures}: for as many, {', or '.join(ways)}", True


def times(factor: float) -> str:
    """
    >>> times(29.93), times(2.04)
    ('30 times', '2.0 times')
    """
    return f"{factor:,.0f} times" if factor >= 9.95 else f"{factor:.1f} times"
