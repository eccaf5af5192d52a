"""How runs look in pictures: colours for light and dark paper, markers, dashes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlx_qlora.look.history import History


@dataclass(frozen=True)
class Theme:
    """The colours of a picture. Runs differ by colour, marker and dashes, grades by lightness and name."""

    paper: str
    ink: str
    soft: str
    grid: str
    noise: str  # the single updates behind a smooth curve
    runs: tuple[str, ...]  # of a single run: training, validation, the same of known examples
    bands: tuple[str, ...]  # of the grades of a gap


# The colours of Okabe and Ito, which the colour-blind tell apart, in an order that keeps contrast with the paper.
LIGHT = Theme(
    paper="#ffffff", ink="#1d2430", soft="#5d6878", grid="#e3e7ec", noise="#b9c6d6",
    runs=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7a7a7a"),
    bands=("#f4f8fb", "#fcf3e2", "#f8dfc2", "#f0bfa4"),
)  # fmt: skip
DARK = Theme(
    paper="#14181e", ink="#e4e8ee", soft="#9aa6b5", grid="#29313b", noise="#3d5268",
    runs=("#56b4e9", "#e69f00", "#1fbf92", "#de94bd", "#f0e442", "#ff7a2e", "#ffffff", "#a0a0a0"),
    bands=("#191f27", "#262520", "#382c1e", "#512f21"),
)  # fmt: skip

_MARKERS = "osD^vPXp"
_DASHES: tuple[Any, ...] = (
    "-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)), (0, (3, 3)), (0, (6, 2, 1.5, 2, 1.5, 2)), (0, (1, 3)),
)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A run in a picture."""

    history: History
    name: str
    place: int
    alone: bool
    theme: Theme

    @property
    def colour(self) -> str:
        return self.theme.runs[self.place % len(self.theme.runs)]

    @property
    def marker(self) -> str:
        return _MARKERS[self.place % len(_MARKERS)]

    @property
    def dashes(self) -> Any:
        return _DASHES[self.place % len(_DASHES)]


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """What is drawn meanwhile has these colours, whatever a matplotlibrc says."""
    from matplotlib import style

    own = {
        "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "text.color": theme.ink, "axes.labelcolor": theme.soft,
        "axes.edgecolor": theme.soft, "axes.titlecolor": theme.ink, "xtick.color": theme.soft, "ytick.color": theme.soft,
        "axes.grid": True, "grid.color": theme.grid, "grid.linewidth": 0.8, "axes.axisbelow": True, "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.facecolor": theme.paper,
        "legend.edgecolor": theme.grid, "legend.framealpha": 0.85, "path.simplify": False,
    }  # fmt: skip
    with style.context(["default", own]):
        yield
