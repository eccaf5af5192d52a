"""What a run left behind that speaks about its end. Any of it may be missing, damaged, or half written."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.files import json_lines, json_object, yaml_object
from mlx_qlora.run.recorder import Record, read
from mlx_qlora.run.watchdog import CRASH, STALLED

SHORT = 0.06  # of the memory left: little enough that one more array can be too much
_FULL = 0.92  # of a GPU's memory in use, of which the same is true


@dataclass(frozen=True)
class Evidence:
    """All that a run left behind which speaks about its end."""

    folder: Path
    record: Record
    summary: dict[str, Any]
    state: dict[str, Any]
    config: dict[str, Any]
    crash: str  # what faulthandler wrote in this run
    stalled: str  # what the watchdog wrote in this run
    checkpoint: Path | None
    restarts: list[dict[str, Any]]

    @property
    def beat(self) -> dict[str, Any]:
        return self.record.beat

    def train(self, *settings: str) -> str:
        """The command that goes on with the run, or begins it again where nothing was saved."""
        if self.checkpoint is None:
            return self.afresh(*settings)
        return " ".join(("mlx-qlora train --output-dir", shlex.quote(str(self.folder)), "--resume", *settings))

    def afresh(self, *settings: str) -> str:
        """The command that begins the run again: from its configuration, or as it was begun where it left none."""
        if not self.config:
            return " ".join((self.record.constants.get("command", "mlx-qlora train"), *settings))
        config, folder = shlex.quote(str(self.folder / "config.yaml")), shlex.quote(str(self.folder))
        return " ".join(("mlx-qlora train --config", config, "--output-dir", folder, "--overwrite", *settings))


def gather(folder: Path) -> Evidence | None:
    """What there is; None where neither a record nor a summary tells of a run."""
    record = read(folder)
    summary = json_object(folder / "training_summary.json")
    if record is None and not summary:
        return None
    record = record or Record({})
    started = float(record.constants.get("started", 0.0))
    if summary and _changed(folder / "training_summary.json") < started:
        summary = {}  # an earlier run's
    return Evidence(
        folder=folder,
        record=record,
        summary=summary,
        state=json_object(folder / "training_state.json"),
        config=yaml_object(folder / "config.yaml"),
        crash=_since(folder / CRASH, record.beat.get("crash_from")),
        stalled=_since(folder / STALLED, record.beat.get("stalled_from")),
        checkpoint=_newest_checkpoint(folder),
        restarts=json_lines(folder / "supervision.jsonl"),
    )


def short_of_memory(beat: dict[str, Any]) -> bool:
    """Whether memory was nearly full: the machine's, the container's, or what the GPU may use."""
    left, whole = beat.get("available", 0), beat.get("total", 0)
    return bool(left < SHORT * whole or beat.get("peak", 0) > _FULL * beat.get("gpu", 0) > 0)


def _since(path: Path, start: object) -> str:
    """What was written after the last run began; nothing where that is not known."""
    if not isinstance(start, int):
        return ""
    try:
        return path.read_bytes()[start:].decode("utf-8", errors="replace")
    except OSError:
        return ""


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _newest_checkpoint(folder: Path) -> Path | None:
    found = {_place(path): path for path in folder.glob("checkpoint_epoch*_step*") if path.is_dir()}
    return max(((place, path) for place, path in found.items() if place), default=(None, None))[1]


def step_of(path: Path) -> int:
    return (_place(path) or (0,))[0]


def _place(path: Path) -> tuple[int, ...] | None:
    """As `run.checkpoint.place`, which is not asked because it needs MLX: updates, batches of the next, times again."""
    match = re.fullmatch(r"checkpoint_epoch\d+_step(\d+)(?:_part(\d+))?(?:_again(\d+))?", path.name)
    return tuple(int(number or 0) for number in match.groups()) if match else None
