"""What a run did, as pictures: loss, gap, learning rate, gradient norm, speed, memory; one run or several."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qlora.errors import ConfigError
from mlx_qlora.look.gap import gap_text
from mlx_qlora.look.history import History, number
from mlx_qlora.look.pictures.panels import LEGEND_ROW, NARROW, PANELS, legend_rows
from mlx_qlora.look.pictures.theme import DARK, LIGHT, Drawn, Theme, themed
from mlx_qlora.run.disk import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DARK", "LIGHT", "PICTURE", "THEMES", "Theme", "names_of", "over_tokens", "panel", "png", "require_matplotlib", "results",
    "save", "svg", "themed",
]  # fmt: skip

PICTURE = "training_results.png"  # in the folder of a run
THEMES = {"light": LIGHT, "dark": DARK}
_DPI = 120
_POINTS = 72  # in an inch: the unit of a drawing
_INCHES = (12.0, 11.0)


def require_matplotlib(what: str) -> None:
    """`what` needs it: a flag, a verb."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{what}: matplotlib draws the pictures and is not installed. pip install 'mlx-qlora[plots]'")


def results(histories: Sequence[History], theme: Theme = LIGHT) -> Figure:
    """All panels in one picture. A run of 30,000 updates takes as long as one of 1,000, but for reading it."""
    from matplotlib.figure import Figure

    with themed(theme):
        figure = Figure(figsize=_INCHES, dpi=_DPI)
        legend = 0.6 * LEGEND_ROW * (legend_rows(len(histories), _INCHES[0]) - 2)  # further rows than the gap has room for
        heights = (2.3, max(0.01, legend), 1.4, 1, 1)
        edges = {"left": 0.062, "right": 0.937, "top": 0.9, "bottom": 0.045}
        grid = figure.add_gridspec(5, 2, height_ratios=heights, hspace=0.5, wspace=0.15, **edges)
        places = (grid[0, :], grid[2, :], grid[3, 0], grid[3, 1], grid[4, 0], grid[4, 1])
        for name, place in zip(PANELS, places, strict=True):
            _draw(figure.add_subplot(place), name, histories, theme)
        title, below = _headline(histories)
        figure.text(0.012, 0.985, title, fontsize=14, fontweight="bold", va="top", parse_math=False)
        figure.text(0.012, 0.96, below, fontsize=9, color=theme.soft, va="top", parse_math=False)
    return figure


def over_tokens(histories: Sequence[History], theme: Theme = LIGHT) -> Figure:
    """Losses over the tokens that were read, and not over updates, which may be of any size."""
    return panel([each.over_tokens for each in histories], "loss", theme, (11.0, 5.5), "tokens", 120)


def panel(
    histories: Sequence[History],
    name: str,
    theme: Theme = LIGHT,
    inches: tuple[float, float] = (6.0, 3.0),
    counted: str = "update",
    dots: int = _POINTS,
) -> Figure:
    """One of `PANELS` alone, over updates or what else its lines count by."""
    from matplotlib.figure import Figure

    width, height = inches
    with themed(theme):
        figure = Figure(figsize=inches, dpi=dots)
        left, right = 0.66, 0.64 if name == "gap" or (name == "loss" and width > NARROW) else 0.16
        top, bottom = (0.55, 0.42 + LEGEND_ROW * legend_rows(len(histories), width)) if name == "loss" else (0.33, 0.42)
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
        _draw(axes, name, histories, theme, counted)
    return figure


def png(figure: Figure) -> bytes:
    """A picture as a notebook shows it."""
    return _written(figure, "png")


def save(figure: Figure, path: str | Path) -> None:
    """A PNG, whole or not at all."""
    write_atomically(Path(path), png(figure), flushed=False)


def svg(figure: Figure, salt: str) -> str:
    """The drawing with its letters as text, without the head of a file: to stand in a page. The names in it go by `salt`."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        text = _written(figure, "svg", metadata={"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _written(figure: Figure, form: str, **more: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a folder may have any name
        figure.savefig(made, format=form, facecolor=figure.get_facecolor(), **more)
    return made.getvalue()


def names_of(histories: Sequence[History]) -> list[str]:
    """The runs' names, with as many folders above as it takes to tell them apart."""
    parts = [history.folder.resolve().parts for history in histories]
    deepest = max(map(len, parts), default=1)
    names = [_readable("/".join(own[-1:])) for own in parts]
    for depth in range(2, deepest + 1):
        twice = Counter(names)
        if max(twice.values(), default=1) == 1:
            break
        names = [_readable("/".join(own[-depth:])) if twice[name] > 1 else name for name, own in zip(names, parts, strict=True)]
    return names


def _readable(name: str) -> str:
    """A name of a folder can be any bytes; a picture takes letters."""
    return name.encode("utf-8", "replace").decode()


def _short(name: str, most: int = 48) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def _draw(axes: Axes, name: str, histories: Sequence[History], theme: Theme, counted: str = "update") -> None:
    title, draw = PANELS[name]
    names = names_of(histories)
    alone = len(histories) == 1
    numbered = enumerate(zip(histories, names, strict=True))
    runs = [Drawn(each, _short(own, 28), number, alone, theme) for number, (each, own) in numbered]
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlim(0, max(1, *(1.02 * each.step for each in histories)))
    if runs:
        draw(axes, runs)
    _ticks(axes.xaxis, "{:,.0f}", whole=True)
    if name in _TICKS:
        _ticks(axes.yaxis, _TICKS[name])
    axes.set_xlabel(counted, fontsize=8, labelpad=1)
    if name == "loss" and (per_epoch := _updates_per_epoch(histories)):
        above = axes.secondary_xaxis("top", functions=(_times(1 / per_epoch), _times(per_epoch)))
        above.spines["top"].set_visible(False)
        above.tick_params(labelsize=8)
        _ticks(above.xaxis, "epoch {:g}", most=8 if axes.bbox.width > 400 else 4)


_TICKS = {"tokens_per_second": "{:,.10g}", "learning_rate": "{:g}"}


def _ticks(axis: Any, form: str, whole: bool = False, most: int = 8) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=whole, nbins=most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: factor * value


def _updates_per_epoch(histories: Sequence[History]) -> float | None:
    """The same for all runs, or None."""
    found = []
    for history in histories:
        epoch = next((value for line in reversed(history.lines) if (value := number(line.get("epoch"))) > 0), math.nan)
        found.append(history.step / epoch)
    alike = found and all(math.isfinite(each) and abs(each - found[0]) < 0.01 * found[0] for each in found)
    return found[0] if alike else None


def _headline(histories: Sequence[History]) -> tuple[str, str]:
    names = names_of(histories)
    if len(histories) != 1:
        return f"{len(histories)} runs", _short(", ".join(names), 150)
    history = histories[0]
    planned = f" of {history.planned_steps:,}" if history.planned_steps and history.planned_steps != history.step else ""
    said = [f"{history.summary.get('ended') or 'going on'}: {history.step:,}{planned} updates"]
    if history.best and history.gap:
        report, epoch = history.best
        said.append(f"best validation loss {report.val_loss:.4f} at update {report.step:,} (epoch {epoch:.2f})")
        said.append(f"gap there {gap_text(history.gap.at_best, history.gap.at_best_se)}, {history.gap.grade_at_best}")
    model = history.settings.get("model") or history.summary.get("model")
    return _short(f"{names[0]}", 100), _short("   ·   ".join([*said, str(model)] if model else said), 170)
