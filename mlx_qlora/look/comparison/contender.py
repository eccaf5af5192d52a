"""A configuration that is compared with others, with its runs: one for each seed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.errors import ConfigError, RunFolderError
from mlx_qlora.look.comparison import statistics
from mlx_qlora.look.comparison.answers import Answers, Question, read_answers
from mlx_qlora.look.comparison.statistics import Interval
from mlx_qlora.look.doctor.autopsy import explain
from mlx_qlora.look.history import AROUND, History, number, read_history
from mlx_qlora.look.pictures.figures import names_of
from mlx_qlora.records import EvalReport

_NOT_FINITE = "not finite"  # how a run ends that a guard has stopped


@dataclass(frozen=True)
class Run:
    """One run under a name that no other has."""

    name: str
    history: History
    answers: Answers
    ended: str  # how; empty while it goes on, "died" where nobody ended it

    @property
    def settings(self) -> dict[str, Any]:
        """Those that training depends on, in a form that can be compared."""
        return {name: value for name, value in self.history.settings.items() if name not in AROUND}

    @property
    def best(self) -> EvalReport | None:
        return self.history.best[0] if self.history.best else None

    @property
    def last(self) -> EvalReport | None:
        return self.history.validations[-1][0] if self.history.validations else None

    def figure(self, name: str) -> float:
        """One of training_summary.json, or while there is none, the same of the lines so far."""
        if name in ("tokens_seen", "passes", "tokens_per_parameter"):
            return number(self.history.exposure.get(name))
        if name in self.history.summary:
            return number(self.history.summary[name])
        lines = self.history.lines
        if name in ("tokens", "supervised_tokens"):
            return float(sum(self.history.column(name)[1])) if lines else math.nan
        if name == "tokens_per_second":
            return self.figure("tokens") / self.figure("elapsed_s")
        if name == "steps":
            return float(self.history.step)
        if name == "peak_memory_gb":
            return max(self.history.column(name)[1], default=math.nan)
        return number(lines[-1].get(name)) if lines else math.nan

    def size(self, split: str) -> dict[str, Any]:
        """What data_account.json says of a split."""
        sizes = self.history.account.get("sizes")
        found = sizes.get(split) if isinstance(sizes, dict) else None
        return found if isinstance(found, dict) else {}

    def count(self, split: str, of: str) -> int:
        """One of its figures; 0 where it is not known."""
        found = self.size(split).get(of)
        return found if isinstance(found, int) else 0

    def evaluated(self) -> float:
        """The loss that `evaluate` measured."""
        losses = self.answers.losses
        weight = sum(weight for _, _, weight in losses)
        return sum(weight * loss for (_, _, weight), loss in losses.items()) / weight if weight else math.nan

    def score(self, name: str, among: set[Question]) -> float:
        """The mean over those of the questions that have it."""
        values = [value for question, value in self.answers.tuned.get(name, {}).items() if question in among]
        return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Contender:
    """One configuration. `runs` differ in their seeds only."""

    name: str
    runs: tuple[Run, ...]
    lost: tuple[Run, ...] = ()  # of further seeds, which have no model to compare: they are in no figure

    @property
    def told_lost(self) -> str:
        """What became of them."""
        how = ", ".join(f"{run.settings.get('seed', '?')} ended: {run.ended or 'not yet'}" for run in self.lost)
        are = "is" if len(self.lost) == 1 else "are"
        return (
            f"{len(self.lost)} of {len(self.lost) + len(self.runs)} seeds of {self.name} {are} in none of its figures ({how})"
        )

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def of_seeds(self) -> bool:
        return len(self.runs) > 1

    def each(self, figure: Callable[[Run], float]) -> list[float]:
        """A figure of each run that has it."""
        return [value for value in (number(figure(run)) for run in self.runs) if math.isfinite(value)]

    def mean(self, figure: Callable[[Run], float]) -> Interval:
        values = self.each(figure)
        return statistics.mean(values) if values else Interval(math.nan)

    def loss(self, report: Callable[[Run], EvalReport | None], name: str = "val_loss") -> Interval:
        """A figure of a validation: over seeds the spread is theirs, else that of the examples."""
        if self.of_seeds:
            return self.mean(lambda run: number(getattr(report(run), name, None)))
        one = report(self.first)
        if one is None:
            return Interval(math.nan)
        return statistics.with_error(getattr(one, name), getattr(one, f"{name}_se"))

    @property
    def gap(self) -> Interval:
        """At the best validation."""
        return self.loss(lambda run: run.best, "gap")

    @property
    def rise(self) -> float:
        """By what share of it the validation loss has risen since its best."""
        return self.mean(lambda run: run.last.val_loss / run.best.val_loss - 1 if run.best and run.last else math.nan).value

    @property
    def common(self) -> set[Question]:
        """The questions that every run has answered."""
        return set.intersection(*(run.answers.questions for run in self.runs))

    def score(self, name: str) -> Interval:
        """Over seeds the spread is theirs, else that of the questions."""
        common = self.common
        if self.of_seeds:
            return self.mean(lambda run: run.score(name, common))
        values = list(self.first.answers.tuned.get(name, {}).values())
        if not values:
            return Interval(math.nan)
        value = sum(values) / len(values)
        reported = self.first.answers.reported(name)
        if abs(reported.value - value) < 1e-9 and reported.half > 0:  # the same questions: then say the same
            return reported
        return Interval(value, *statistics.bootstrap(np.array(values)))


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Runs, and those in folders of seeds. Every problem with a folder is in one error."""
    named = [Path(folder).expanduser() for folder in folders]
    seeds = {each: seed_folders(each) for each in named}
    paths = [run for each in named for run in seeds[each] or [each]]
    if len(paths) < 2:
        raise ConfigError(
            f"{'one run' if paths else 'no run'} came; two or more are expected: mlx-qlora compare runs/first runs/second. "
            f"Runs that differ in their seed only are grouped, with mean and interval.{_inside(paths[0]) if paths else ''}"
        )
    twice = [f"{path}: it is named twice; name each run once." for path, count in _counted(paths).items() if count > 1]
    problems, histories = [*twice], []
    for path in paths:
        try:
            histories.append(read_history(path))
        except RunFolderError as error:
            problems.append(f"{error}{_inside(path)}")
    problems += [
        f"{history.folder}: its run has made no update yet; there is nothing to compare."
        for history in histories
        if not history.lines and not any(history.folder in inside for inside in seeds.values())
    ]
    begun = {history.folder for history in histories if history.lines}
    problems += [
        f"{folder}: none of its runs has made an update yet; there is nothing to compare."
        for folder, inside in seeds.items()
        if inside and not begun & set(inside)
    ]
    if problems:
        raise RunFolderError("\n".join(dict.fromkeys(problems)))
    return read(histories)


def read(histories: Sequence[History]) -> list[Run]:
    """With their answers. The run of a seed has its folder's name before its own."""
    names = [
        f"{history.folder.resolve().parent.name}/{name}" if re.fullmatch(r"seed_\d+", name) else name
        for history, name in zip(histories, names_of(histories), strict=True)
    ]
    return [
        Run(name, history, read_answers(history.folder), _ended(history))
        for name, history in zip(names, histories, strict=True)
    ]


def seed_folders(folder: Path) -> list[Path]:
    """The runs in a folder that `train --seeds` has filled; none in any other."""
    if (folder / "config.yaml").exists() or not folder.is_dir():
        return []
    found = [each for each in folder.glob("seed_*") if each.name[5:].isdecimal() and (each / "config.yaml").is_file()]
    return sorted(found, key=lambda each: int(each.name[5:]))


def _counted(paths: Sequence[Path]) -> Counter[Path]:
    return Counter(path.resolve() for path in paths)


def _inside(path: Path) -> str:
    """A hint where the runs are one floor below."""
    runs = sorted(each.parent.name for each in path.glob("*/config.yaml")) if path.is_dir() else []
    return f" In it are runs: {', '.join(runs[:3])}{' ...' if len(runs) > 3 else ''}; name them, as {path}/*." if runs else ""


def _ended(history: History) -> str:
    if history.summary.get("ended"):
        return str(history.summary["ended"])
    return {"running": "", "died": "died"}.get(explain(history.folder).outcome, "not known")


def grouped(runs: Sequence[Run]) -> list[Contender]:
    """Runs whose settings are the same but for the seed, together; the same seed again is another contender."""
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name != "seed"}
        key = repr(sorted(settings.items())) if settings else run.name
        again = 0
        while run.settings.get("seed") in [other.settings.get("seed") for other in groups.get((key, again), [])]:
            again += 1
        groups.setdefault((key, again), []).append(run)
    return [_contender(group) for group in groups.values()]


def _contender(group: Sequence[Run]) -> Contender:
    """Of several seeds, those that a guard stopped or that never began are told of and not counted."""
    whole = [run for run in group if run.history.lines and run.ended != _NOT_FINITE] if len(group) > 1 else list(group)
    counted = whole or [run for run in group if run.history.lines]
    return Contender(_name([run.name for run in group]), tuple(counted), tuple(run for run in group if run not in counted))


def _name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    alike = next((place for place, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), len(names[0]))
    common = re.sub(r"[-_./ ]*(s|seed)?[-_./ ]*\d*$", "", names[0][:alike])
    return f"{common or names[0]} ({len(names)} seeds)"
