"""Curves in a terminal: dots of braille, or letters where there are only those, with axes whose numbers are round.

plotille 6.0 and uniplot 0.23 are well kept, but neither has round ticks of a given width nor letters in ASCII, and
plotext 6 has another interface than plotext 5. What is left of them here would be a canvas, and that is 30 lines.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

Points = tuple[NDArray[Any], NDArray[Any]]
_LEAST_COLUMNS, _LEAST_ROWS = 8, 3  # of a canvas; with less there is no picture
_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a braille letter's dots, by row and column


@dataclass(frozen=True)
class Series:
    """Points of one kind: a line through them, or a letter at each where `mark` is one."""

    points: Points
    style: str
    mark: str = ""


def shows_unicode(encoding: str | None) -> bool:
    """Whether a terminal with this encoding, and these settings of the language, shows more than ASCII.

    Python writes UTF-8 in the language C too, so the encoding alone does not tell.
    """
    if "utf" not in (encoding or "").lower():
        return False
    if "utf" in os.environ.get("PYTHONIOENCODING", "").lower():
        return True
    return (os.environ.get("LC_ALL") or os.environ.get("LANG") or "") not in ("C", "POSIX")


def chart(series: Sequence[Series], width: int, height: int, span: tuple[float, float], unicode: bool) -> list[Text]:
    """Exactly `height` lines of at most `width` columns, or none without points or room: a plot over the updates of `span`.

    The first of the series lies at the bottom. A rise that only the beginning, or a few points, have is cut off.
    """
    low, high = limits([each.points for each in series])
    ticks = round_ticks(low, high, max(3, (height - 2) // 3))
    labels = _decimals(ticks)
    margin = max(map(len, labels), default=0)
    columns, rows = width - margin - 2, height - 2
    if columns < _LEAST_COLUMNS or rows < _LEAST_ROWS or not any(len(each.points[0]) for each in series):
        return []
    canvas = Canvas(columns, rows, span, (low, high), unicode)
    for each in series:
        canvas.draw(each)
    beside = {canvas.row(tick): label for tick, label in zip(ticks, labels, strict=True)}
    bar, tick, corner = ("│", "┤", "└") if unicode else ("|", "+", "+")
    lines = [
        Text.assemble((f"{beside.get(row, ''):>{margin}} ", "dim"), (tick if row in beside else bar, "dim"), *canvas.spans(row))
        for row in range(rows)
    ]
    return [*lines, *_x_axis(span, columns, margin + 1, canvas.column, corner, unicode)]


def limits(points: Sequence[Points]) -> tuple[float, float]:
    """The least and the most value that is shown. What only the first tenth reaches, or few points, may be cut off."""
    there = [(steps, values) for steps, values in points if len(steps)]
    if not there:
        return 0.0, 1.0
    first, last = min(steps.min() for steps, _ in there), max(steps.max() for steps, _ in there)
    low, high = min(float(values.min()) for _, values in there), max(float(values.max()) for _, values in there)
    settled = [values[steps >= first + 0.1 * (last - first)] for steps, values in there]
    usual = max(float(np.quantile(values, 0.98)) for values in settled if len(values))
    if high - low > 1.5 * (usual - low) > 0:
        high = usual
    room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return max(low - room, 0.0) if low >= 0 else low - room, high + room


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most so many numbers between two, with the roundest distance.

    >>> round_ticks(0.93, 4.2, 5)
    [1.0, 2.0, 3.0, 4.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [number * step for number in range(first, last + 1)]


def _decimals(ticks: Sequence[float]) -> list[str]:
    """As many decimals as tell them apart."""
    between = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1.0
    places = max(0, -math.floor(math.log10(between or 1.0) + 1e-9))
    return [f"{tick:.{places}f}" for tick in ticks]


def _x_axis(
    span: tuple[float, float], columns: int, margin: int, column: Callable[[float], int], corner: str, unicode: bool
) -> list[Text]:
    axis, below = list(("─" if unicode else "-") * columns), list(" " * (margin + 1 + columns))
    free = 0
    for tick in round_ticks(*span, max(2, columns // 12)):
        at, label = column(tick), f"{tick:,.0f}"
        if tick != int(tick):
            continue
        axis[at] = "┬" if unicode else "+"
        start = min(max(0, margin + 1 + at - len(label) // 2), len(below) - len(label))
        if start >= free:
            below[start : start + len(label)] = label
            free = start + len(label) + 1
    if free + len(" update") <= len(below):
        below[-len("update") :] = "update"
    return [Text(" " * margin + corner + "".join(axis), "dim"), Text("".join(below), "dim")]


class Canvas:
    """Cells of two by four dots, and letters over them."""

    def __init__(self, columns: int, rows: int, xs: tuple[float, float], ys: tuple[float, float], unicode: bool):
        self._dots = np.zeros((4 * rows, 2 * columns), bool)
        self._styles: dict[tuple[int, int], str] = {}
        self._letters: dict[tuple[int, int], str] = {}
        self._xs, self._ys, self._unicode = xs, ys, unicode

    def row(self, y: float) -> int:
        return int(self._dot_rows(np.array([y]))[0]) // 4

    def column(self, x: float) -> int:
        return min(max(0, int(self._dot_columns(np.array([x]))[0]) // 2), self._dots.shape[1] // 2 - 1)

    def _dot_columns(self, xs: NDArray[Any]) -> NDArray[np.int64]:
        first, last = self._xs
        return np.rint((xs - first) / ((last - first) or 1) * (self._dots.shape[1] - 1)).astype(np.int64)

    def _dot_rows(self, ys: NDArray[Any]) -> NDArray[np.int64]:
        low, high = self._ys
        return np.rint((high - ys) / ((high - low) or 1) * (self._dots.shape[0] - 1)).astype(np.int64)

    def draw(self, series: Series) -> None:
        xs, ys = series.points
        if not len(xs):
            return
        if not series.mark:
            self._line(xs, ys, series.style)
            return
        rows, columns = self._dot_rows(ys) // 4, self._dot_columns(xs) // 2
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            place = (max(0, row), column)  # what lies above is shown at the edge
            self._letters[place], self._styles[place] = series.mark, series.style

    def _line(self, xs: NDArray[Any], ys: NDArray[Any], style: str) -> None:
        """Through the mean of what falls into a column of dots."""
        places = self._dot_columns(xs)
        counts = np.bincount(places)
        at = np.flatnonzero(counts)
        means = np.bincount(places, ys)[at] / counts[at]
        columns = np.arange(at[0], at[-1] + 1)
        rows = self._dot_rows(np.interp(columns, at, means))
        height = self._dots.shape[0]
        for column, row, before in zip(columns.tolist(), rows.tolist(), [rows[0], *rows[:-1].tolist()], strict=True):
            top, bottom = sorted((row, before + (row > before) - (row < before)))
            for dot in range(max(0, top), min(height, bottom + 1)):
                self._dots[dot, column] = True
                self._styles[dot // 4, column // 2] = style

    def spans(self, row: int) -> list[tuple[str, str]]:
        """The letters of a row with their styles."""
        cells = self._dots[4 * row : 4 * row + 4]
        return [self._cell(row, column, cells[:, 2 * column : 2 * column + 2]) for column in range(cells.shape[1] // 2)]

    def _cell(self, row: int, column: int, dots: NDArray[np.bool_]) -> tuple[str, str]:
        style = self._styles.get((row, column), "")
        if letter := self._letters.get((row, column)):
            return letter, style
        if not dots.any():
            return " ", ""
        if self._unicode:
            return chr(0x2800 + int((_BITS * dots).sum())), style
        upper, lower = dots[:2].any(), dots[2:].any()
        return ":" if upper and lower else "'" if upper else ".", style


def stdout_shows_unicode() -> bool:
    return shows_unicode(sys.stdout.encoding)
