"""What several seeds of one configuration come to: a line each, mean and 95 % interval over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_qlora.look.comparison import statistics
from mlx_qlora.look.comparison.contender import Run, read
from mlx_qlora.look.comparison.sheet import columns
from mlx_qlora.look.comparison.statistics import Interval
from mlx_qlora.look.evaluation.scores import title
from mlx_qlora.look.history import read_history

NAME = "seeds.json"
COUNTED = ("finished", "stopped early")  # the ends of a run that has a model to speak of


@dataclass(frozen=True)
class Seed:
    """One of them, as far as it went; `run` is None before it begins."""

    seed: int
    run: Run | None
    ended: str

    @property
    def counts(self) -> bool:
        return self.run is not None and self.ended in COUNTED

    @property
    def figures(self) -> dict[str, float]:
        """By the names that `Told.figures` has: the best validation, then what `evaluate` found."""
        run = self.run
        if run is None:
            return {}
        found = {"val_loss": run.best.val_loss if run.best else math.nan, "evaluated_loss": run.evaluated()}
        found |= {name: sum(each.values()) / len(each) for name, each in run.answers.tuned.items() if each}
        return {name: value for name, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Told:
    """All of them."""

    seeds: tuple[Seed, ...]

    @property
    def counted(self) -> list[Seed]:
        return [each for each in self.seeds if each.counts]

    @cached_property
    def figures(self) -> dict[str, Interval]:
        """Mean and interval over the seeds that count, of every figure that one of them has."""
        names = dict.fromkeys(name for each in self.counted for name in each.figures)
        values = {name: [each.figures[name] for each in self.counted if name in each.figures] for name in names}
        return {name: statistics.mean(each) for name, each in values.items()}

    def to_json(self) -> dict[str, Any]:
        """A file that says it: what was left out of the means, too."""
        return {
            "seeds": [
                {"seed": each.seed, "folder": f"seed_{each.seed}", "ended": each.ended, "counted": each.counts} | each.figures
                for each in self.seeds
            ],
            "mean": {
                name: {"value": found.value, "low": _known(found.low), "high": _known(found.high), "seeds": self._count(name)}
                for name, found in self.figures.items()
            },
            "left_out": [each.seed for each in self.seeds if not each.counts],
        }

    def _count(self, name: str) -> int:
        return sum(name in each.figures for each in self.counted)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        several = len(self.counted) > 1
        rows = [["seed", *(str(each.seed) for each in self.seeds)], ["ended", *(each.ended for each in self.seeds)]]
        rows[0] += ["mean", "95 % interval over seeds"] if several else []
        rows[1] += ["", ""] if several else []
        for name, found in self.figures.items():
            row = [_LABELS.get(name) or title(name), *(_figure(each, name) for each in self.seeds)]
            rows.append([*row, f"{found.value:.3f}", _range(found)] if several else row)
        yield from columns(rows)
        yield from self._said()

    def _said(self) -> Iterator[str]:
        left = [f"{each.seed} ended: {each.ended}" for each in self.seeds if not each.counts]
        count = len(self.counted)
        if left:
            yield (
                f"{len(left)} of {len(self.seeds)} seeds {'is' if len(left) == 1 else 'are'} in no mean ({', '.join(left)}): "
                "that they end so is a part of what these settings do"
            )
        if count == 1:
            yield "one seed says nothing of how far another one would lie from it: no interval, and no test over seeds"
        elif count == 2:
            yield "two seeds say little of their spread: the interval is 12.7 standard errors to each side; three make it 4.3"


def told(folder: Path, seeds: Sequence[int]) -> Told:
    """What the folder of each seed says."""
    begun = [seed for seed in seeds if (folder / f"seed_{seed}" / "config.yaml").is_file()]
    runs = dict(zip(begun, read([read_history(folder / f"seed_{seed}") for seed in begun]), strict=True))
    found = []
    for seed in seeds:
        run = runs.get(seed)
        found.append(Seed(seed, run, (run.ended or "still going on") if run else "not begun"))
    return Told(tuple(found))


_LABELS = {"val_loss": "val_loss", "evaluated_loss": "evaluated loss"}


def _figure(each: Seed, name: str) -> str:
    return f"{each.figures[name]:.3f}" if each.counts and name in each.figures else "–"


def _range(found: Interval) -> str:
    if found.half == 0:
        return "the same for all"
    return f"{found.low:.3f} to {found.high:.3f}" if math.isfinite(found.half) else "–"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
