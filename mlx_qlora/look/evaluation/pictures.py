"""Pictures of an evaluation: scores with their intervals, and for labels what was taken for what."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.look.evaluation.bootstrap import Estimate
from mlx_qlora.look.evaluation.compared import BASE, TUNED, Compared
from mlx_qlora.look.evaluation.labels import OTHER
from mlx_qlora.look.evaluation.results import Evaluation
from mlx_qlora.run.disk import aside

SCORES, CONFUSION = "evaluation_scores.png", "evaluation_confusion.png"
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#666666"  # of Okabe and Ito, which every eye tells apart


def draw(found: Evaluation, folder: Path) -> tuple[list[Path], str]:
    """(the pictures, why there are none)."""
    if importlib.util.find_spec("matplotlib") is None:
        return [], "no pictures: pip install 'mlx-qlora[plots]'"
    made = []
    if found.scores:
        made.append(_save(_scores(found), folder / SCORES))
    if found.labels:
        made.append(_save(_confusion(found), folder / CONFUSION))
    return made, ""


def _save(figure: Any, path: Path) -> Path:
    with aside(path) as name:
        figure.savefig(name, dpi=150)
    return path


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _scores(found: Evaluation) -> Any:
    """A row a score, base above fine-tuned, with 95 % intervals. Scores of other kinds than 0 to 1 have axes of their own."""
    inside = {name: each for name, each in found.scores.items() if _unit([*each.columns().values()][:2])}
    others = {name: each for name, each in found.scores.items() if name not in inside}
    panels = [inside] * bool(inside) + [{name: each} for name, each in others.items()]
    heights = [len(panel) for panel in panels]
    figure = _figure(8, 1.5 + 0.55 * sum(heights) + 0.5 * (len(panels) - 1))
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    own = found.title
    for each, panel in zip(axes, panels, strict=True):
        for row, score in enumerate(panel.values()):
            if score.base is not None:
                _point(each, score.base, row - 0.15, _ORANGE, "s", "base model" if row == 0 else None)
            _point(each, score.tuned, row + (0.15 if score.base else 0), _BLUE, "o", own if row == 0 else None)
        names = [_named(score, len(found.predictions)) for score in panel.values()]
        each.set_yticks(range(len(panel)), names)
        each.set_ylim(len(panel) - 0.5, -0.5)
        if panel is inside:
            each.set_xlim(-0.02, 1.08)
        else:
            each.margins(x=0.15)
        each.grid(axis="x", color="#dddddd", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right", "left"]].set_visible(False)
        each.tick_params(axis="y", length=0)
    questions = f"{len(found.predictions):,} questions of {found.split}"
    figure.suptitle(f"Scores on {questions}, with 95 % intervals", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _named(score: Compared, questions: int) -> str:
    return score.title + (f"\nn = {score.tuned.n:,}" if score.tuned.n != questions else "")


def _unit(estimates: list[Estimate]) -> bool:
    values = [value for each in estimates for value in (each.value, each.low, each.high) if math.isfinite(value)]
    return all(0 <= value <= 1 for value in values)


def _point(axes: Any, one: Estimate, y: float, colour: str, marker: str, label: str | None) -> None:
    if not math.isfinite(one.value):
        return
    if math.isfinite(one.low):
        axes.plot([one.low, one.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot([one.value], [y], marker, color=colour, markersize=7, label=label)
    right = one.high if math.isfinite(one.high) else one.value
    text = f"{one.value:.3f}" if abs(one.value) < 100 else f"{one.value:.4g}"
    axes.annotate(text, (right, y), (6, 0), textcoords="offset points", va="center", fontsize=8, color=_GREY)


def _confusion(found: Evaluation) -> Any:
    """Rows are what was expected, columns what was answered; a panel for the base model, where it was asked."""
    panels = [(BASE, "base model")] if found.compares else []
    panels += [(TUNED, found.title)]
    count = len(found.labels)
    size = max(2.6, 0.42 * (count + 1))
    figure = _figure(1.6 + (size + 0.6) * len(panels), 1.3 + size)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = [label if len(label) <= 18 else label[:17] + "…" for label in found.labels]
    for each, (which, title) in zip(axes, panels, strict=True):
        table = found.classified(which).confusion
        shares = table / np.maximum(1, table.sum(axis=1, keepdims=True))
        each.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row in range(count):
            for column in range(count + 1):
                if table[row, column]:
                    colour = "white" if shares[row, column] > 0.55 else "black"
                    each.text(column, row, f"{table[row, column]:,}", ha="center", va="center", fontsize=9, color=colour)
        each.set_xticks(range(count + 1), [*names, OTHER], rotation=45, ha="right", rotation_mode="anchor")
        each.set_yticks(range(count), names)
        each.set_title(title, fontsize=10)
        each.set_xlabel("answered")
        each.tick_params(length=0)
    axes[0].set_ylabel("expected")
    return figure
