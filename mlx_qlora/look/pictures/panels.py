"""The panels of a run's picture, each drawn into axes of its own: one run, or several over each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mlx_qlora.look.gap import GRADES, SURE
from mlx_qlora.look.history import History, number
from mlx_qlora.look.pictures.curves import Floats, smooth, thinned, top_of
from mlx_qlora.look.pictures.theme import Drawn, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def loss(axes: Axes, runs: Sequence[Drawn]) -> None:
    """Training, validation and the same loss of known examples; where the best was, where it overfits, where it stopped."""
    noisy: list[tuple[float, int]] = []
    sparse: list[tuple[float, int]] = []
    for run in runs:
        noisy += _noisy(axes, run, run.history.trained_loss)
        sparse += _from_teacher(axes, run) if run.alone else []
        for which in _VALIDATED if run.alone else _VALIDATED[:1]:
            sparse += _validated(axes, run, which)
        _marks(axes, run)
    top = top_of([value for value, _ in noisy], [value for value, _ in sparse])
    if top is None:
        return _nothing(axes, "no finite loss" if any(run.history.lines for run in runs) else "no update yet")
    lowest = [float(np.percentile([value for value, _ in noisy], 0.5))] if noisy else []
    low = min([*lowest, *(value for value, _ in sparse)])
    margin = 0.06 * (top - low or 1)
    axes.set_ylim(low - margin, top + margin)
    above = [each for each in (*noisy, *sparse) if each[0] > top + margin]
    if above:
        highest, step = max(above)
        _aside(axes, f"▲ {len(above):,} above the edge, up to {highest:.4g}")
        axes.plot([step], [1.0], "^", color=runs[0].theme.ink, markersize=5, clip_on=False, label="above",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    return _legend(axes, runs)


def _from_teacher(axes: Axes, run: Drawn) -> list[tuple[float, int]]:
    """How far a student is from its teacher, smooth; of a run without one, nothing."""
    steps, values = run.history.column("kd")
    if steps:
        curve = smooth(values)
        axes.plot(*_drawable(axes, steps, curve), color=run.theme.soft, linewidth=1.3, linestyle=":", label="kd", zorder=2)
        return list(zip(curve.tolist(), steps, strict=True))
    return []


def _aside(axes: Axes, text: str) -> None:
    """A note at the right of a panel's title."""
    axes.set_title(text, loc="right", fontsize=8)


# (column, what it is called, its place among the colours of a single run)
_VALIDATED = (("val_loss", "validation", 1), ("train_eval_loss", "the same of training examples", 2))


def _validated(axes: Axes, run: Drawn, which: tuple[str, str, int]) -> list[tuple[float, int]]:
    """Points with the error of each; gives the values with their updates."""
    column, said, place = which
    reports = [each for each, _ in run.history.validations if math.isfinite(getattr(each, column))]
    steps, values = [each.step for each in reports], [float(getattr(each, column)) for each in reports]
    if reports:
        errors = [getattr(each, f"{column}_se") for each in reports]
        _with_errors(axes, replace(run, name=said, place=place) if run.alone else run, steps, values, errors, column)
    return list(zip(values, steps, strict=True))


def _with_errors(axes: Axes, run: Drawn, steps: list[int], values: list[float], errors: list[float], column: str) -> None:
    bars = [SURE * error if math.isfinite(error) else math.nan for error in errors]
    axes.plot(
        steps, values, color=run.colour, marker=run.marker, linestyle=run.dashes, linewidth=1.6, markersize=_size(steps),
        label=column, zorder=4,
    )  # fmt: skip
    if any(map(math.isfinite, bars)):
        width = 1.0 if len(steps) < 40 else 0.5
        axes.errorbar(
            steps, values, yerr=bars, fmt="none", ecolor=run.colour, elinewidth=width, capsize=2, alpha=0.55, zorder=3
        )


def _size(points: Sequence[int]) -> float:
    return 5.0 if len(points) <= 40 else 3.0


def _marks(axes: Axes, run: Drawn) -> None:
    """The best point, and where overfitting began and the run stopped."""
    theme, history = run.theme, run.history
    ink = theme.ink if run.alone else run.colour
    if (best := history.best) and math.isfinite(best[0].val_loss):
        axes.plot([best[0].step], [best[0].val_loss], "*", color=ink, markersize=15, markeredgecolor=theme.paper,
                  markeredgewidth=1, zorder=6, label="best")  # fmt: skip
        if history.gap and history.gap.overfits_from_step is not None and run.alone:
            axes.axvspan(history.gap.overfits_from_step, history.step, facecolor="none", edgecolor=theme.grid, hatch="///",
                         linewidth=0, zorder=0, label="overfits")  # fmt: skip
    if stopped(history):
        axes.axvline(history.step, color=ink, linestyle=(0, (4, 2)), linewidth=1.2, label="stopped")


def stopped(history: History) -> str:
    """How a run ended, where that was before its planned end."""
    ended = str(history.summary.get("ended") or "")
    return "" if ended == "finished" else ended


def _legend(axes: Axes, runs: Sequence[Drawn]) -> None:
    said: dict[str, str] = {}
    if runs[0].alone:
        history = runs[0].history
        trained, of = history.trained_loss, " cross-entropy" if history.trained_loss == "ce" else ""
        said = {trained: f"training{of}, each update", f"{trained}_smooth": f"training{of}, smooth"}
        said |= {"kd": "divergence from the teacher, smooth"}
        said |= {column: f"{what}, ± 95 %" for column, what, _ in _VALIDATED}
        if history.best:
            said["best"] = f"best: {history.best[0].val_loss:.4g} at update {history.best[0].step:,}"
        said["overfits"] = f"overfits from update {history.best[0].step:,} on" if history.best else ""
        said["stopped"] = f"{stopped(history)} at update {history.step:,}"
        drawn = {artist.get_label(): artist for artist in (*axes.lines, *axes.patches)}
        handles = {said[label]: drawn[label] for label in said if label in drawn}
    else:
        from matplotlib.lines import Line2D

        handles = {
            f" {run.name}": Line2D([], [], color=run.colour, marker=run.marker, linestyle=run.dashes, linewidth=1.6)
            for run in runs
        }
        soft = runs[0].theme.soft
        handles[" with marks: validation, ± 95 %"] = Line2D([], [], color=soft, marker="o", linewidth=1.6)
        handles[" thin: training, smooth"] = Line2D([], [], color=soft, linewidth=1.1, alpha=0.75)
        handles[" the best of each"] = Line2D([], [], color=soft, marker="*", linestyle="", markersize=11)
    inches = axes.figure.dpi_scale_trans.inverted()
    width, height = axes.bbox.transformed(inches).size
    below = axes.legend(
        handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(-0.005, -_BELOW / height), borderaxespad=0,
        ncols=legend_columns(width), fontsize=8 if width > NARROW else 7, frameon=False, columnspacing=1.5,
    )  # fmt: skip
    for text in below.get_texts():
        text.set_parse_math(False)


NARROW = 6.0  # inches: up to here a picture is one for a telephone
LEGEND_ROW = 0.165  # inches
_BELOW = 0.36  # inches from the axes' foot to the legend: there stand the numbers of the updates


def legend_columns(width: float) -> int:
    return 4 if width > NARROW else 2


def legend_rows(runs: int, width: float) -> int:
    """Room that the legend of so many runs needs, in rows: below the curves, where it covers none."""
    return math.ceil((7 if runs == 1 else runs + 3) / legend_columns(width))


def _noisy(axes: Axes, run: Drawn, column: str) -> list[tuple[float, int]]:
    """Every update thin, and a smooth curve above; of several runs the smooth ones only. Gives the values with their
    updates."""
    steps, values = run.history.column(column)
    if not steps:
        return []
    marker = "." if len(steps) < 3 else None
    if run.alone:
        axes.plot(*_drawable(axes, steps, values), color=run.theme.noise, linewidth=0.8, marker=marker, label=column, zorder=1)
    axes.plot(
        *_drawable(axes, steps, smooth(values)), color=run.colour, linewidth=1.5 if run.alone else 1.1, marker=marker,
        linestyle="-" if run.alone else run.dashes, alpha=1 if run.alone else 0.75, label=f"{column}_smooth", zorder=2,
    )  # fmt: skip
    return list(zip(values, steps, strict=True))


def _drawable(axes: Axes, steps: Sequence[int], values: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    """No more points than can be told apart; a drawing of 30,000 updates is as small as one of a few hundred."""
    return thinned(steps, values, max(50, int(axes.bbox.width / 2)))


def gap(axes: Axes, runs: Sequence[Drawn]) -> None:
    """Validation loss less that of known examples, with its error, on bands of its grades."""
    theme, ends = runs[0].theme, [0.0, GRADES[1][0]]
    for run in runs:
        reports = [each for each, _ in run.history.validations if math.isfinite(each.gap)]
        if reports:
            gaps, errors = [each.gap for each in reports], [each.gap_se for each in reports]
            shape = replace(run, place=1) if run.alone else run
            _with_errors(axes, shape, [each.step for each in reports], gaps, errors, "gap")
            halves = [SURE * error if math.isfinite(error) else 0.0 for error in errors]
            ends += [value + half * sign for value, half in zip(gaps, halves, strict=True) for sign in (-1, 1)]
            if run.history.best:
                _star(axes, run)
    _bands(axes, theme, *_gap_ends(ends))
    axes.axhline(0, color=theme.soft, linewidth=0.8, zorder=1)
    if not any(run.history.validations for run in runs):
        _nothing(axes, "no validation yet")


def _gap_ends(ends: Sequence[float]) -> tuple[float, float]:
    """All but a few errors far off are inside."""
    low, high = np.percentile(ends, [2, 98]) if len(ends) > 40 else (min(ends), max(ends))
    low, high = min(low, 0.0), max(high, GRADES[1][0])
    return float(low - 0.05 * (high - low)), float(high + 0.05 * (high - low))


def _star(axes: Axes, run: Drawn) -> None:
    assert run.history.best is not None
    report = run.history.best[0]
    colour = run.theme.ink if run.alone else run.colour
    axes.plot(
        [report.step], [report.gap], "*", color=colour, markersize=13, markeredgecolor=run.theme.paper, zorder=6, label="best"
    )


def _bands(axes: Axes, theme: Theme, low: float, high: float) -> None:
    axes.set_ylim(low, high)
    begin = low
    for (limit, name), colour in zip(GRADES, theme.bands, strict=True):
        end = min(limit, high)
        if end > begin:
            axes.axhspan(begin, end, color=colour, linewidth=0, zorder=0, label=name)
        if end - begin > 0.07 * (high - low):
            axes.text(1.008, (begin + end) / 2, name, transform=axes.get_yaxis_transform(), ha="left", va="center",
                      fontsize=8, color=theme.soft, zorder=5)  # fmt: skip
        begin = max(begin, end)


def learning_rate(axes: Axes, runs: Sequence[Drawn]) -> None:
    some = False
    for run in runs:
        steps, rates = run.history.column("learning_rate")
        some = some or bool(steps)
        axes.plot(
            *_drawable(axes, steps, rates), color=run.colour, linestyle=run.dashes, linewidth=1.5, label="learning_rate",
            marker="." if len(steps) < 3 else None,
        )  # fmt: skip
    if some:
        axes.set_ylim(bottom=0)
    else:
        _nothing(axes, "no update yet")


def grad_norm(axes: Axes, runs: Sequence[Drawn]) -> None:
    """Before clipping. Updates that were skipped are marked at the foot."""
    values = [value for run in runs for value, _ in _noisy(axes, run, "grad_norm") if value > 0]
    for run in runs:
        if found := skipped(run.history):
            axes.plot(
                found, [0.03] * len(found), "x", color=run.theme.ink if run.alone else run.colour, markersize=6,
                transform=axes.get_xaxis_transform(), label="skipped", zorder=5,
            )  # fmt: skip
    if not values:
        return _nothing(axes, "no gradient yet")
    low, high = float(np.percentile(values, 1)), max(values)
    if high > _DECADES * low:
        _by_logarithm(axes, high / low)
    else:
        axes.set_ylim(0, 1.1 * high)
    limit = number(runs[0].history.settings.get("clip_grad_norm"))
    asides = [f"✕ skipped: {count:,}"] if (count := sum(len(skipped(run.history)) for run in runs)) else []
    if runs[0].alone and axes.get_ylim()[0] < limit < axes.get_ylim()[1]:
        axes.axhline(limit, color=runs[0].theme.ink, linestyle=(0, (2, 2)), linewidth=1, label="clip")
        asides.append(f"dotted: clipped above {limit:g}")
    return _aside(axes, "   ".join(asides))


_DECADES = 30.0  # from here on a gradient norm is drawn by its logarithm


def _by_logarithm(axes: Axes, span: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 200 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def skipped(history: History) -> list[int]:
    """The updates whose loss or gradient was not a number: nothing was changed by them."""
    found, before = [], 0
    for line in history.lines:
        count = number(line.get("skipped_updates"))
        if count > before:
            found.append(int(line["step"]))
        before = int(count) if math.isfinite(count) else before
    return found


def tokens_per_second(axes: Axes, runs: Sequence[Drawn]) -> None:
    values = [value for run in runs for value, _ in _noisy(axes, run, "tokens_per_second")]
    _from_zero(axes, values)


def peak_memory(axes: Axes, runs: Sequence[Drawn]) -> None:
    values = []
    for run in runs:
        steps, own = run.history.column("peak_memory_gb")
        values += own
        axes.plot(*_drawable(axes, steps, own), color=run.colour, linestyle=run.dashes, linewidth=1.5, label="peak_memory_gb",
                  marker="." if len(steps) < 3 else None)  # fmt: skip
    _from_zero(axes, values)


def _from_zero(axes: Axes, values: Sequence[float]) -> None:
    top = top_of(values)
    if top is None:
        _nothing(axes, "nothing measured yet")
    else:
        axes.set_ylim(0, 1.15 * top or 1)


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10)


Panel = Callable[["Axes", Sequence[Drawn]], None]
# name: (title, how it is drawn)
PANELS: dict[str, tuple[str, Panel]] = {
    "loss": ("Loss, nats a token", loss),
    "gap": ("Gap: validation less training", gap),
    "learning_rate": ("Learning rate", learning_rate),
    "grad_norm": ("Gradient norm", grad_norm),
    "tokens_per_second": ("Tokens a second", tokens_per_second),
    "peak_memory": ("Peak memory, GB", peak_memory),
}
