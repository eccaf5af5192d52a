"""A run as its folder tells it, while it goes on or long after. Nothing is loaded but small files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.engine.stopping import EarlyStoppingMonitor
from mlx_qlora.errors import RunFolderError
from mlx_qlora.files import json_lines, json_object, yaml_object
from mlx_qlora.look.gap import GapAnalysis, analyse
from mlx_qlora.records import EvalReport
from mlx_qlora.run.metrics import NAME

# Settings that stand around training and change nothing of it.
AROUND = {
    "save_every", "save_minutes", "keep_checkpoints", "output_dir", "overwrite", "resume", "resume_anyway", "supervise",
    "trace", "stall_after_s", "score_questions", "max_answer_tokens", "data_cache", "trunk_cache_gb", "trunk_cache_dir",
    "seeds", "seeds_evaluate",
    "malformed_limit", "report_to", "tracker_project", "sample_every", "sample_prompts", "sample_tokens", "sample_temperature",
}  # fmt: skip


@dataclass(frozen=True)
class History:
    """What a run's folder says. While a run goes on, `summary` is empty."""

    folder: Path
    settings: dict[str, Any]  # of config.yaml, by dotted names
    lines: tuple[dict[str, Any], ...]  # training_metrics.jsonl: an update each; those that a rollback undid are left out
    state: dict[str, Any]  # training_state.json
    summary: dict[str, Any]  # training_summary.json
    account: dict[str, Any]  # data_account.json
    # (updates, values) of figures of all updates, where `lines` has only the last ones: look.follow
    columns: Mapping[str, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """Updates that were made."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def planned_steps(self) -> int | None:
        """Updates that were planned, as far as that is known yet."""
        return _whole(self.summary.get("planned_steps")) or _whole(self.state.get("planned_steps")) or None

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """(updates, values) of a figure, where a line has it and it is a finite number."""
        steps, values = self.figures(name)
        return steps.tolist(), values.tolist()

    def figures(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """The same as arrays."""
        if name in self.columns:
            steps, values = self.columns[name]
        else:
            steps = np.array([int(line["step"]) for line in self.lines], np.int64)
            values = np.array([number(line.get(name)) for line in self.lines], np.float64)
        there = np.isfinite(values)
        return steps[there], values[there]

    @cached_property
    def validations(self) -> tuple[tuple[EvalReport, float], ...]:
        """Every validation with its epoch, and with what early stopping made of it."""
        patience = int(self.settings.get("early_stopping.patience") or 0)
        monitor = EarlyStoppingMonitor(patience, float(self.settings.get("early_stopping.min_delta") or 0))
        found = []
        for line in self.lines:
            if "val_loss" in line:
                figures = {name: number(line.get(name)) for name in _FIGURES}
                monitor = monitor.update(figures["val_loss"])
                report = EvalReport(int(line["step"]), best=monitor.is_extreme, stale=monitor.stale, **figures)
                found.append((report, number(line.get("epoch"))))
        return tuple(found)

    @property
    def best(self) -> tuple[EvalReport, float] | None:
        """The best validation with its epoch: the adapters in adapters/ are of that update."""
        return next((one for one in reversed(self.validations) if one[0].best), None)

    @cached_property
    def gap(self) -> GapAnalysis | None:
        """The analysis of all validations so far; None before the first."""
        if self.best is None:
            return None
        parameters = _whole(self.summary.get("trainable_parameters"))
        return analyse(self.validations, self.settings, parameters, self.trained_tokens)

    @property
    def exposure(self) -> Mapping[str, Any]:
        """What the run has seen, as training_summary.json says it; empty while it goes on, and of runs that kept no account."""
        found = self.summary.get("exposure")
        return found if isinstance(found, Mapping) else {}

    @property
    def trained_loss(self) -> str:
        """The figure of an update that validation can be held against: with a teacher the loss is more than cross-entropy."""
        return "ce" if self.lines and "ce" in self.lines[-1] else "loss"

    @property
    def trained_tokens(self) -> int:
        """Trained tokens of an epoch, as far as that is known."""
        return _whole(self.account.get("supervised_tokens"))

    @property
    def over_tokens(self) -> History:
        """The same with tokens that were read for updates: what runs of unlike updates have in common."""
        read = accumulate(int(number(line.get("tokens")) or 0) for line in self.lines)
        return replace(self, lines=tuple(line | {"step": tokens} for line, tokens in zip(self.lines, read, strict=True)))


_FIGURES = ("val_loss", "train_eval_loss", "val_loss_se", "train_eval_loss_se")


def read_history(folder: str | Path) -> History:
    """Raises `RunFolderError` where there is no run."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise RunFolderError(
            f"{path}: {'it is a file' if path.exists() else 'there is nothing'}; the folder of a run is expected."
        )
    settings, summary = yaml_object(path / "config.yaml"), json_object(path / "training_summary.json")
    lines = _without_what_was_undone(json_lines(path / f"{NAME}.jsonl"))
    if not (settings or summary or lines):
        raise RunFolderError(
            f"{path}: no run was begun in it: it has neither config.yaml nor {NAME}.jsonl. "
            "The folder that `mlx-qlora train --output-dir` named is expected."
        )
    return History(
        folder=path,
        settings=dotted(settings),
        lines=tuple(lines),
        state=json_object(path / "training_state.json"),
        summary=summary,
        account=json_object(path / "data_account.json"),
    )


def number(value: object) -> float:
    """A figure of a line; what is not finite stands there as a text."""
    return float(value) if isinstance(value, int | float | str) and _is_number(value) else math.nan


def _is_number(value: int | float | str) -> bool:
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True


def _whole(value: object) -> int:
    """A count; 0 where it is not known."""
    return int(number(value)) if math.isfinite(number(value)) else 0


def _without_what_was_undone(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for line in lines:
        if not isinstance(line.get("step"), int):
            continue
        while kept and kept[-1]["step"] >= line["step"]:
            kept.pop()
        kept.append(line)
    return kept


def dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by names such as `lora.rank`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and name in _GROUPS:
            flat |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if name not in _COUNTED or math.isfinite(number(value))}


_COUNTED = ("early_stopping.patience", "early_stopping.min_delta")  # what is reckoned with here
_GROUPS = ("lora", "early_stopping", "distill", "chain")
