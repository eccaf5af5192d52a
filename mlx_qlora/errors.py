"""The errors that a user meets. Each says what came, what was expected and what to do; none needs a traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class MlxQloraError(Exception):
    """The parent of them all; `exit_code` is what the command line ends with."""

    exit_code = 2


class ConfigError(MlxQloraError, ValueError):
    """A setting is wrong."""


class DataError(MlxQloraError, ValueError):
    """A data set, or a row of it, can't be used."""


class ModelError(MlxQloraError, ValueError):
    """A model can't be loaded, or can't do what is asked of it."""


class RunFolderError(MlxQloraError, FileExistsError):
    """The folder of a run can't be used."""


class NonFiniteError(MlxQloraError, ArithmeticError):
    """Too many updates had a loss or a gradient that is not a number."""

    exit_code = 3


class OutOfMemoryError(MlxQloraError, MemoryError):
    """Memory ended, and there is nothing left that could be made smaller."""

    exit_code = 3


class ResumeError(MlxQloraError, ValueError):
    """A run can't go on as it is asked to."""


def listed(problems: Sequence[str], most: int = 20) -> str:
    """Problems as lines, the first `most` of them."""
    lines = list(problems[:most])
    if len(problems) > most:
        lines.append(f"... and {len(problems) - most} more")
    return "\n".join(lines)


def require(*checks: tuple[bool, str, object, str]) -> None:
    """Raise one `ConfigError` that names every setting (holds, name, what came, what is expected) that fails."""
    problems = [f"{name}: {value!r} came, {expected} is expected." for holds, name, value, expected in checks if not holds]
    if problems:
        raise ConfigError("\n".join(problems))


@contextmanager
def all_problems() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Gives `check(function)`, which collects `ConfigError`s, and raises them as one in the end."""
    problems: list[str] = []

    def check(function: Callable[[], object]) -> None:
        try:
            function()
        except ConfigError as error:
            problems.append(str(error))

    yield check
    if problems:
        raise ConfigError("\n".join(problems))
