"""How fast a plan goes: a few of its real updates, made and timed. Nothing of it stays."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median

from mlx_qlora.build import Ready, build
from mlx_qlora.config import RunConfig
from mlx_qlora.engine.memory import cache_limit
from mlx_qlora.engine.steps import nobody, steps
from mlx_qlora.look.console import Console
from mlx_qlora.model.load import wired_memory
from mlx_qlora.records import StepReport

_BEFORE = 2  # updates that are made and not counted: compiled steps are built, memory is asked for
_COUNTED = 5
_LONG_S = 60.0  # from here on one counted update is enough


@dataclass(frozen=True)
class Pace:
    """Medians over a few updates."""

    updates: int
    seconds_per_update: float
    tokens_per_second: float


def measure(config: RunConfig, said: Callable[[str], None]) -> Pace:
    """Make a few updates as `train` would make them, in a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="mlx_qlora-") as away:
        (Path(away) / "run").mkdir()
        own = replace(
            config, output_dir=str(Path(away) / "run"), trunk_cache_dir=str(Path(away) / "trunk"),
            overwrite=False, resume=False, report_to=(),
        )  # fmt: skip
        with _ready(own) as ready:
            said(f"making {_BEFORE + _COUNTED} updates to measure ...")
            return _timed(ready)


@contextmanager
def _ready(config: RunConfig) -> Iterator[Ready]:
    ready = build(config, Console(quiet=True), nobody)
    model = ready.loaded.model
    model.train()
    try:
        with wired_memory(model), cache_limit(ready.cache):
            yield ready
    finally:
        if ready.kept:
            ready.kept.kept.close()


def _timed(ready: Ready) -> Pace:
    reports: list[tuple[float, StepReport]] = []
    begun = since = time.perf_counter()
    for report in steps(ready.engine(), islice(ready.updates(), _BEFORE + _COUNTED)):
        assert isinstance(report, StepReport), "nobody asked for anything else"
        now = time.perf_counter()
        reports.append((now - since, report))
        since = now
        if now - begun > _LONG_S and len(reports) > 1:
            break
    counted = reports[_BEFORE:] or reports[-1:]
    speeds = [(report.tokens - len(report.update.examples)) / seconds for seconds, report in counted]
    return Pace(len(counted), median(seconds for seconds, _ in counted), median(speeds))
