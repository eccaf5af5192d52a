"""A person's own score: a Python function, named as package.module:function."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from mlx_qlora.errors import ConfigError
from mlx_qlora.look.evaluation.scores import Named


def load_metrics(names: Sequence[str], taken: Sequence[str]) -> list[Named]:
    """The functions of these names. One that goes by the name of another score gets its whole name."""
    found: list[Named] = []
    for name in names:
        function = load_function(name, "--metric", "(answer, expected) -> number")
        short = name.replace(":", ".").rpartition(".")[2]
        if short in taken or short in (each.name for each in found):
            short = name.replace(":", ".")
        found.append(Named(short, _checked(name, function)))
    return found


def load_function(name: str, flag: str, shape: str) -> Any:
    """A function of a person's own, named as package.module:function; `flag` and `shape` say where and what is expected."""
    module, _, function = name.rpartition(":") if ":" in name else name.rpartition(".")
    if not module or not function:
        raise ConfigError(f"{flag} {name}: a function is expected, as package.module:function.")
    here = str(Path.cwd())
    if here not in sys.path:  # where people's own modules lie; `python -m` looks there, an installed command does not
        sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module)
    except Exception as error:  # a person's own code: it may raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{flag} {name}: {module} can't be imported from {here}: {reason}.") from error
    for part in function.split("."):
        if not (part in vars(value) or part in dir(value)):
            raise ConfigError(f"{flag} {name}: {module} has no {function}; a function in it is expected.")
        value = getattr(value, part)
    if not callable(value):
        raise ConfigError(f"{flag} {name}: {value!r:.60} came; a function {shape} is expected.")
    return value


def _checked(name: str, function: Any) -> Any:
    def score(answer: str, expected: str) -> float:
        try:
            value = function(answer, expected)
        except Exception as error:
            raise ConfigError(
                f"--metric {name}: it raised {type(error).__name__}: {one_line(error)}, when it was called with "
                f"(answer={answer!r:.80}, expected={expected!r:.80})."
            ) from error
        number = isinstance(value, Real) or type(value).__module__ == "numpy"
        try:
            got = float(value) if number else math.nan
        except (TypeError, ValueError):
            got = math.nan
        if not math.isfinite(got):
            raise ConfigError(
                f"--metric {name}: {value!r:.60} came for (answer={answer!r:.80}, expected={expected!r:.80}); "
                "a finite number is expected."
            )
        return got

    return score


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
