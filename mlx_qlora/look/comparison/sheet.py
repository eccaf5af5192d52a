"""A comparison as it is read: on a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest

from mlx_qlora.look.comparison.contender import Contender
from mlx_qlora.look.comparison.measures import Cell, Row, Value

_SIDE_BY_SIDE = 4  # contenders; more than that are lines, and the measures columns
_LEAST = 15  # columns of a terminal for a figure with its error
_MOST = 34
_WIDEST = 120  # further than that, eyes lose the line


def screen(names: Sequence[str], rows: Sequence[Row], verdict: str, notes: Sequence[str], width: int) -> str:
    """Tables, then what is to be known, then the verdict, which so stands last on a terminal."""
    facts = [*(("note", note) for note in notes), ("verdict", verdict)]
    told = [line for name, fact in facts for line in _fact(name, fact, min(width, _WIDEST))]
    return "\n".join([text(names, rows, width), "", *told])


def _fact(name: str, fact: str, width: int) -> list[str]:
    lines = textwrap.wrap(fact, max(30, width - 10), break_on_hyphens=False)
    return [f"{name if number == 0 else '':<9} {line}" for number, line in enumerate(lines)]


def text(names: Sequence[str], rows: Sequence[Row], width: int) -> str:
    label = max(len(row.label) for row in rows) + 4
    room = (width - label + 2) // len(names) - 2  # the last one has no space behind it
    if len(names) <= _SIDE_BY_SIDE and room >= _LEAST:
        return "\n".join(_beside(names, rows, label, min(room, _MOST)))
    return "\n".join(_below(names, rows, width)).rstrip()


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of cells, each column as wide as it has to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


# A measure in each line


def _beside(names: Sequence[str], rows: Sequence[Row], label: int, room: int) -> Iterator[str]:
    widths = [max(_width(row.cells[number], room) for row in rows) for number in range(len(names))]
    heads = shortened(names, room)
    widths = [max(width, len(head)) for width, head in zip(widths, heads, strict=True)]
    yield _line("", heads, label, widths)
    for section, inside in groupby(rows, lambda row: row.section):
        yield from ("", *textwrap.wrap(section, label + sum(widths)))
        for row in inside:
            cells = [_wrapped(cell.text, room) for cell in row.cells]
            for number, lines in enumerate(zip_longest(*cells, fillvalue="")):
                yield _line(f"  {row.label}" if number == 0 else "", lines, label, widths)


def _line(label: str, cells: Sequence[str], first: int, widths: Sequence[int]) -> str:
    padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{label:<{first}}{'  '.join(padded)}".rstrip()


def _width(cell: Cell, room: int) -> int:
    return max(map(len, _wrapped(cell.text, room)), default=0)


def _wrapped(cell: str, room: int) -> list[str]:
    return [line for part in (cell or "–").split("\n") for line in textwrap.wrap(part, room, break_on_hyphens=False)]


# A contender in each line


def _below(names: Sequence[str], rows: Sequence[Row], width: int) -> Iterator[str]:
    heads = shortened(names, max(12, min(28, width // 3)))
    first = max(map(len, heads)) + 2
    for section, inside in groupby(rows, lambda row: row.section):
        waiting = list(inside)
        while waiting:
            block, widths = _block(waiting, width - first)
            waiting = waiting[len(block) :]
            title = shortened([section], first - 2)[0]
            labels = [_wrapped(row.label, room) for row, room in zip(block, widths, strict=True)]
            for number, lines in enumerate(zip_longest(*labels, fillvalue="")):
                yield _line(title if number == 0 else "", lines, first, widths)
            for number, head in enumerate(heads):
                cells = [_wrapped(row.cells[number].text, room) for row, room in zip(block, widths, strict=True)]
                for place, lines in enumerate(zip_longest(*cells, fillvalue="")):
                    yield _line(head if place == 0 else "", lines, first, widths)
            yield ""


def _block(rows: Sequence[Row], room: int) -> tuple[list[Row], list[int]]:
    """As many measures as stand beside each other, at least one."""
    block: list[Row] = []
    widths: list[int] = []
    for row in rows:
        longest = max(map(len, row.label.split()))
        width = min(room, max(longest, min(len(row.label), 10), *(_width(cell, 20) for cell in row.cells)))
        if block and sum(widths) + 2 * len(widths) + width > room:
            break
        block.append(row)
        widths.append(width)
    return block, widths


def shortened(names: Sequence[str], most: int) -> list[str]:
    """Names of at most so many letters, cut in the middle such that no two are the same.

    >>> shortened(["mistral-rank-8-seed-1", "mistral-rank-8-seed-2"], 12)
    ['mistra…eed-1', 'mistra…eed-2']
    """
    for share in (0.5, 0.2, 0.8):
        cut = [_cut(name, most, share) for name in names]
        if len(set(cut)) == len(set(names)):
            return cut
    return [f"{number} {_cut(name, most - 1 - len(str(number)), 0.5)}" for number, name in enumerate(names, 1)]


def _cut(name: str, most: int, share: float) -> str:
    if len(name) <= most:
        return name
    head = round((most - 1) * share)
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


# Files


def markdown(names: Sequence[str], rows: Sequence[Row], verdict: str, notes: Sequence[str], pictures: Sequence[str]) -> str:
    lines = [f"**{_escaped(verdict)}**", ""]
    for section, inside in groupby(rows, lambda row: row.section):
        lines += [f"| {_escaped(section)} | {' | '.join(map(_escaped, names))} |", f"|---{'|---' * len(names)}|"]
        for row in inside:
            cells = (_escaped(cell.text).replace("\n", "<br>") for cell in row.cells)
            lines.append(f"| {_escaped(row.label)} | {' | '.join(cells)} |")
        lines.append("")
    for what, picture in zip(("Curves", "Each seed"), pictures, strict=False):
        lines += [f"![{what} of {_escaped(', '.join(names))}]({picture})", ""]
    return "\n".join([*lines, *(f"- {_escaped(note)}" for note in notes)]) + "\n"


def _escaped(text: str) -> str:
    for sign in "\\`*_|<>[]":
        text = text.replace(sign, f"\\{sign}")
    return text


def csv_text(contenders: Sequence[Contender], rows: Sequence[Row]) -> str:
    """A line for each contender; an interval is two columns more."""
    lines: list[dict[str, Value]] = [
        {
            "name": each.name,
            "folders": ";".join(str(run.history.folder) for run in each.runs),
            "runs": len(each.runs),
        }
        for each in contenders
    ]
    for row in rows:
        for line, cell in zip(lines, row.cells, strict=True):
            line[row.key] = cell.value
            if any(other.low is not None for other in row.cells):
                line |= {f"{row.key}_low": cell.low, f"{row.key}_high": cell.high}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
