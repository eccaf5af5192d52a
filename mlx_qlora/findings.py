"""What a check found, whatever it looked at: one shape for the machine, a model's folder and a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """A verdict, on what, what was found, and, unless it is ok, what to do."""

    verdict: Verdict
    name: str
    found: str
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)  # the same for programs

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(name: str, found: str, **figures: Any) -> Finding:
    return Finding("ok", name, found, "", figures)


def warn(name: str, found: str, remedy: str, **figures: Any) -> Finding:
    return Finding("warn", name, found, remedy, figures)


def fail(name: str, found: str, remedy: str, **figures: Any) -> Finding:
    return Finding("FAIL", name, found, remedy, figures)


Check = Callable[[], Iterable[Finding]]


def each_of(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """What the checks find, as they find it. One that falls over is itself a finding, and the others go on."""
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:
            yield warn(
                name,
                f"this could not be looked at: {type(error).__name__}: {error}",
                "Nothing has to be wrong here, only the check did not work. Please report it, with this line.",
            )


def size(number: float) -> str:
    """Bytes as a person reads them.

    >>> size(512), size(9_400), size(2_500_000), size(4_100_000_000)
    ('512 B', '9.4 kB', '2.5 MB', '4.10 GB')
    """
    for unit, digits, least in (("GB", 2, 1e9), ("MB", 1, 1e6), ("kB", 1, 1e3)):
        if number >= least:
            return f"{number / least:.{digits}f} {unit}"
    return f"{number:.0f} B"


def counted(number: int, what: str) -> str:
    """
    >>> counted(1, "file"), counted(2, "file")
    ('1 file', '2 files')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"
