"""The figures of a race as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mlx_qlora.errors import ConfigError

_OURS, _OTHERS = "#1f6feb", "#9aa4b2"
_PANELS = (
    ("supervised_tokens_per_second", "trained tokens a second", "{:,.0f}"),
    ("peak_memory_gb", "peak memory, GB", "{:.2f}"),
)


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--png: matplotlib draws the picture and is not installed. pip install 'mlx-qlora[plots]'")


def draw(found: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bars, a contestant each, in two panels: speed and memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    alive = [row for row in found if not row["failed"] and row["kind"] != "floor"]
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(alive)), layout="constrained")
    FigureCanvasAgg(figure)
    names = [row["contestant"] for row in alive]
    colours = [_OURS if row["kind"] == "mlx-qlora" else _OTHERS for row in alive]
    for axes, (name, label, form) in zip(figure.subplots(1, len(_PANELS), sharey=True), _PANELS, strict=True):
        values = [row[name] for row in alive]
        bars = axes.barh(names, values, color=colours, height=0.6)
        axes.bar_label(bars, [form.format(value) for value in values], padding=4)
        axes.set_xlim(0, 1.2 * max(values, default=1))
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")
