"""Configurations with several seeds: a dot for each seed, and the mean with its interval beside them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_qlora.look.pictures.theme import LIGHT, Theme, themed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPREAD = 0.16  # of the dots, to the left of the mean
_LINE = 18  # letters of a name in a line
_LINES = 4
_WIDE = 1.35  # inches for each configuration


@dataclass(frozen=True)
class Dots:
    """One configuration's figures, a value for each seed; the interval of their mean is NaN where it is not known."""

    name: str
    values: Sequence[float]
    mean: float
    low: float
    high: float


def dots(panels: Sequence[tuple[str, Sequence[Dots]]], theme: Theme = LIGHT) -> Figure:
    """A panel for each (title, configurations)."""
    from matplotlib.figure import Figure

    across = max(len(each) for _, each in panels)
    lines = max(_label(one.name).count("\n") for _, each in panels for one in each)
    width = len(panels) * (0.9 + max(2, across) * _WIDE)
    with themed(theme):
        figure = Figure(figsize=(width, 4.6), dpi=120)
        for number, (title, each) in enumerate(panels, 1):
            _panel(figure.add_subplot(1, len(panels), number), title, each, theme)
        figure.subplots_adjust(
            left=0.75 / width, right=1 - 0.15 / width, top=0.86, bottom=0.1 + 0.033 * lines, wspace=0.9 / (width / len(panels))
        )
        said = "A dot for each seed, the mean with its 95 % interval over seeds"
        figure.text(0.15 / width, 0.975, said, va="top", fontsize=10, color=theme.soft)
    return figure


def _panel(axes: Axes, title: str, each: Sequence[Dots], theme: Theme) -> None:
    for place, one in enumerate(each):
        colour = theme.runs[place % len(theme.runs)]
        step = _SPREAD / max(1, len(one.values) - 1)
        places = [place - 0.28 + step * number for number in range(len(one.values))]
        axes.plot(places, one.values, "o", color=colour, markersize=5, alpha=0.75, markeredgewidth=0)
        if math.isfinite(one.high - one.low):
            error = [[one.mean - one.low], [one.high - one.mean]]
            axes.errorbar([place + 0.12], [one.mean], error, fmt="D", color=colour, markersize=6, capsize=5, linewidth=1.8)
        else:
            axes.plot([place + 0.12], [one.mean], "D", color=colour, markersize=6, fillstyle="none")
        axes.annotate(f"{one.mean:.3f}", (place + 0.12, one.mean), (7, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlim(-0.6, len(each) - 0.25)
    axes.set_xticks(range(len(each)), [_label(one.name) for one in each], fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.08)


def _label(name: str) -> str:
    lines = textwrap.wrap(name, _LINE, break_on_hyphens=True)
    return "\n".join(lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"…{lines[-1][1:]}"])
