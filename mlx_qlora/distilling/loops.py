"""Whether a text goes in circles, as models do that found no end."""

from __future__ import annotations

import re

import numpy as np

# Words, signs (a row of the same one is one), and single letters where words have no spaces between them.
_UNITS = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|([^\w\s])\1*"
)  # fmt: skip
_LIST = re.compile(r"(?m)^[ \t]*(?:\d+[.):]|[-*•+]|#+)(?=\s)")  # the number of an item: what loops may count on
_TIMES = 4  # a refrain comes twice or three times, a loop does not stop
_COVERED = 60  # units that the repeats take up: `ha ha ha`, the ruled lines of tables
_COVERED_SIGNS = 240  # the same where there are no letters: rows of zeros, empty cells
_LONGEST_WORD = 40  # letters; what is longer is looked at letter by letter
_FEW = 200  # units; shorter texts may say the same words often
_SPAN = 8
_DISTINCT = 0.3


def loops(text: str) -> str:
    """What goes in circles in a text; empty where nothing does.

    A loop is a span that stands back to back at least 4 times and takes up at least 60 words and signs in all (240 without
    any letter), the numbers of list items taken off; or a text of 200 and more of whose spans of 8 words less than a third
    are new.

    >>> loops("Row, row, row your boat " * 3), loops("I don't know. " * 12)
    ('', "12 times: I don ' t know .")
    """
    units = _units(_LIST.sub("", text))
    if len(units) < _COVERED:
        return ""
    return _back_to_back(units) or _stale(units)


def _units(text: str) -> list[str]:
    found = [match[0] for match in _UNITS.finditer(text)]
    return [part for unit in found for part in (unit if len(unit) > _LONGEST_WORD else (unit,))]


def _back_to_back(units: list[str]) -> str:
    """The span that is repeated most often at one place, with how often."""
    numbers = np.unique(np.array(units, dtype=object), return_inverse=True)[1].reshape(-1)
    for period in range(1, len(units) // _TIMES + 1):
        same = numbers[period:] == numbers[:-period]
        begin, length = _longest_run(same)
        covered, span = length + period, units[begin : begin + period]
        times = covered // period
        enough = _COVERED if any(unit[0].isalpha() for unit in span) else _COVERED_SIGNS
        if times >= _TIMES and covered >= enough:
            said = " ".join(span)
            return f"{times} times: {said if len(said) <= 60 else said[:57] + '...'}"
    return ""


def _longest_run(same: np.ndarray) -> tuple[int, int]:
    """(where it begins, its length) of the longest run of what is true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False]))))
    begins, lengths = edges[::2], edges[1::2] - edges[::2]
    if not len(begins):
        return 0, 0
    most = int(lengths.argmax())
    return int(begins[most]), int(lengths[most])


def _stale(units: list[str]) -> str:
    if len(units) < _FEW:
        return ""
    spans = [tuple(units[place : place + _SPAN]) for place in range(len(units) - _SPAN + 1)]
    share = len(set(spans)) / len(spans)
    return f"{1 - share:.0%} of its spans of {_SPAN} words stood there before" if share < _DISTINCT else ""
