"""Numbers in answers, however people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from decimal import Decimal
from fractions import Fraction

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
    found = _last(text)
    return _read(found) if found else frozenset()


def _last(text: str) -> re.Match[str] | None:
    return next(reversed([*_NUMBER.finditer(text)]), None)


def _read(found: re.Match[str]) -> Readings:
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


# Values: what a number is worth, with fractions worth what they are. Of LaTeX and of currencies only what stands in numbers.

Values = frozenset[Hashable]
_CURRENCY = r"(?:R\$|US\$|\\?\$|[€£¥₹])"
_PLAINER = (
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2"),
    (re.compile(r"\\text\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d)"), ","),
    (re.compile(rf"([-−–])\s?(?:{_CURRENCY})\s?(?=\.?\d)"), r"\1"),  # -$5
    (re.compile(r"([-−–])\s+(?=\d+/\d)"), r"\1"),
)
_MIXED = re.compile(r"(?<![\w.,/])(\d+)\s+$")  # before a fraction: 1 1/2
_FRACTION = re.compile(r"\s+(\d+/\d+)")
_ABOUT = r"(?:(?:about|approximately|exactly|cerca de)\s+)?"
_LEADS = re.compile(rf"[\s*_(\[{{\\\"'~≈=]*{_ABOUT}(?:{_CURRENCY})?\s*[-−–+]?\.?\d", re.IGNORECASE)
_ALL_OF_IT = re.compile(rf"[\s*(]*{_CURRENCY}?\s*|\s*(?:{_CURRENCY}|[%°])?[\s*).]*")


def last_value(text: str) -> Values:
    """What the last number in a text can be worth; nothing where there is none.

    >>> [float(*last_value(text)) for text in ("half of 7 is 3 1/2", r"\\frac{1}{2}", "-$.5", "50 %")]
    [3.5, 0.5, -0.5, 50.0]
    """
    plain = _plainer(text)
    found = _last(plain)
    return _worth(found, plain) if found else frozenset()


def leading_value(text: str) -> Values:
    """What the number is worth that a text begins with, or what a sum comes to that it begins with.

    >>> [float(*leading_value(text)) for text in ("$42 for 3", "6 * 7 = 42 in 2 steps")], leading_value("in 3 steps, 42")
    ([42.0, 42.0], frozenset())
    """
    plain = _plainer(text)
    if not _LEADS.match(plain):
        return frozenset()
    found = _NUMBER.search(plain, plain.rfind("=") + 1)
    if found and found["digits"].isdecimal() and (fraction := _FRACTION.match(plain, found.end())):  # 5 1/2
        found = _NUMBER.search(plain, fraction.start(1))
    return _worth(found, plain) if found else frozenset()


def is_number(text: str) -> bool:
    """Whether a text is a number, perhaps with a currency or a percent sign, and nothing else.

    >>> [is_number(each) for each in ("$1,200.50", "-3/4", "3 %", "42.", "20:30", "in 1927", "")]
    [True, True, True, True, False, False, False]
    """
    plain = _plainer(text)
    found = _last(plain)
    if found is None or any(isinstance(each, tuple) for each in _worth(found, plain)):
        return False
    before = _MIXED.sub("", plain[: found.start()]) if "/" in found["digits"] else plain[: found.start()]
    return all(_ALL_OF_IT.fullmatch(each) for each in (before, plain[found.end() :]))


def _plainer(text: str) -> str:
    for pattern, plain in _PLAINER:
        text = pattern.sub(plain, text)
    return text


def _worth(found: re.Match[str], text: str) -> Values:
    """A fraction is worth what it comes to, together with a whole number before it; clock times stay as they stand."""
    parts = found["digits"].split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not int(parts[1]):
        return frozenset(each if isinstance(each, tuple) else Fraction(each) for each in _read(found))
    worth, before = Fraction(int(parts[0]), int(parts[1])), _MIXED.search(text[: found.start()])
    if before and worth < 1 and not found["sign"]:
        whole = int(before[1])
        negative = re.search(r"(?:^|\s)[-−–]$", text[: before.start()])
        return frozenset({-(whole + worth) if negative else whole + worth})
    return frozenset({-worth if found["sign"] in ("-", "−", "–") else worth})
