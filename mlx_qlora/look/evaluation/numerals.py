"""Numbers in answers, however people write them."""

from __future__ import annotations

import math
import re
from decimal import Decimal

_SPACES = "\u00a0\u2009\u202f"  # that stand between thousands; an ordinary space separates two numbers
_NUMBER = re.compile(
    rf"(?<![A-Za-zÀ-ɏ\d.,])(?P<sign>[-−–+](?=\.?\d))?(?P<digits>\.?\d+(?:[.,'’:/h{_SPACES}]\d+)*)(?P<power>[eE][-+]?\d{{1,3}}(?!\w))?"
)
_JOINED = re.compile(r"[:/h]")  # clock times, dates, fractions: several numbers that are one thing
_LIST = re.compile(r"\d+(?:(?:\.\d+){2,}|(?:,\d+){2,})")
_THOUSANDS = re.compile(r"\d{1,3}(?:(?P<mark>[.,])\d{2,3})(?:(?P=mark)\d{2,3})*(?<=\d{3})")  # groups of two are India's
Readings = frozenset[Decimal] | frozenset[tuple[Decimal, ...]]


def numeric_accuracy(answer: str, expected: str) -> float:
    """Whether the last number in the answer is the last one that is expected; NaN where none is expected.

    1.927,50, 1,927.50, 1'927.50 and 1927.5 are one number, and so are 3 %, 3% and 3,0. What can be read in two ways
    (1.234: with a point, or with thousands) counts with both. Clock times, dates, fractions, versions (1.2.3) and lists
    (1,2,3) are compared as they stand, so 20:30, 20h30 and 1/2 are each one thing. Digits that are glued to a letter (A4,
    B12) are no number.

    >>> [numeric_accuracy(text, "São R$ 1.927,50.") for text in ("1,927.50 in all", "1927.5", "1927", "no")]
    [1.0, 1.0, 0.0, 0.0]
    >>> numeric_accuracy("minus: -2", "2"), numeric_accuracy("3", "3 %"), numeric_accuracy("às 20h30", "20:30")
    (0.0, 1.0, 1.0)
    """
    wanted = last_number(expected)
    if not wanted:
        return math.nan
    return float(bool(wanted & last_number(answer)))


def last_number(text: str) -> Readings:
    """What the last number in a text can be read as; nothing where there is none."""
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 (the last one is meant)
        pass
    if found is None:
        return frozenset()
    digits = found["digits"]
    if _JOINED.search(digits):
        return frozenset({tuple(Decimal(re.sub(r"\D", "", part)) for part in _JOINED.split(digits))})
    if _LIST.fullmatch(digits) and not _THOUSANDS.fullmatch(digits):
        return frozenset({tuple(map(Decimal, re.split("[.,]", digits)))})
    sign = -1 if found["sign"] in ("-", "−", "–") else 1
    power = Decimal(10) ** int(found["power"][1:]) if found["power"] else Decimal(1)
    return frozenset(sign * power * Decimal(each) for each in _readings(re.sub(rf"['’{_SPACES}]", "", digits)))


def _readings(digits: str) -> list[str]:
    """Digits with points and commas, as Python writes them."""
    marks = re.sub(r"\d", "", digits)
    if not marks:
        return [digits]
    last = marks[-1]
    if len(set(marks)) == 2:  # the last one is the decimal point, if it comes once
        whole = re.sub("[.,]", "", digits)
        return [_pointed(digits, last)] if marks.count(last) == 1 else [whole]
    if len(marks) > 1:
        return [digits.replace(last, "")]
    before, after = digits.split(last)
    thousands = len(after) == 3 and 0 < len(before) <= 3 and not before.startswith("0")
    return [_pointed(digits, last)] + ([before + after] if thousands else [])


def _pointed(digits: str, mark: str) -> str:
    before, after = digits.rsplit(mark, 1)
    return f"{re.sub('[.,]', '', before)}.{after}"
