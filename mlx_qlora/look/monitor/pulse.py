"""Whether a run lives, what it does, and how it ended: what can be told from its folder at this moment."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from mlx_qlora.files import json_lines
from mlx_qlora.look.doctor.autopsy import explain
from mlx_qlora.look.history import History
from mlx_qlora.run.recorder import OF_PARTS, Record, alive, silent_s
from mlx_qlora.run.supervise import NAME as SUPERVISION
from mlx_qlora.run.watchdog import duration

State = Literal["waiting", "begins", "running", "hangs", "unseen", "ended", "died"]
_RECENT_S = 30.0  # a sign of life from elsewhere that is no older: it goes on there
_RESTART_S = 120.0  # after its journal's line a supervisor's new process should have said something
_UNHEARD_S = 10.0  # the watchdog gives a heartbeat each second; so long without one, it can't
_LONG_S = 3.0  # in a phase: one is told since when
_BEFORE = {
    "start": "it begins",
    "load": "loading the model",
    "tokenise": "preparing the data",
    "plan": "choosing the layout, foreseeing the memory",
}
_DOING = {
    "batch": "making the batches of",
    "update": "applying",
    "evaluate": "validating after",
    "save": "saving after",
    "sample": "writing samples after",
}


@dataclass(frozen=True)
class Pulse:
    """`state` is for programs, `says` one line for people."""

    state: State
    says: str

    @property
    def over(self) -> bool:
        return self.state in ("ended", "died")


def pulse(history: History, record: Record | None) -> Pulse:
    """How the run stands now."""
    if record is None:
        return _without_record(history)
    if record.ended:
        return Pulse("ended", _how_it_ended(history.folder))
    here = alive(record)
    if here is None:
        return _elsewhere(record)
    if not here:
        return _dead(history.folder, record)
    silent = silent_s(record) or 0.0
    if silent > record.limit_s > 0:
        most = f"; {duration(record.limit_s)} would be long here"
        return Pulse("hangs", f"no progress for {duration(silent)}, in: {doing(record)}{most}; process {record.pid}")
    unheard = time.time() - record.beat.get("at", math.inf)
    if unheard > _UNHEARD_S:
        held = f"no sign of life for {duration(unheard)}: suspended, or something holds it"
        return Pulse("hangs", f"{held}; {doing(record)}; process {record.pid}")
    usual = record.phases.get(record.phase)
    since = f", for {duration(silent)}" if silent > _LONG_S else ""
    since += f" (usually {duration(usual.typical_s)})" if since and usual else ""
    if record.phase in _BEFORE:
        before = "; below is what was there before" if history.lines else ""
        return Pulse("begins", f"{doing(record)}{since}; process {record.pid}{before}")
    return Pulse("running", f"{doing(record)}{since}; process {record.pid}")


def doing(record: Record) -> str:
    """What it does, in words."""
    update = record.facts.get("update")
    if record.phase in _BEFORE:
        return _BEFORE[record.phase]
    if record.phase == "answer":
        return "asking the base and the fine-tuned model questions"
    if not isinstance(update, int):
        return record.phase
    if record.phase not in OF_PARTS:
        return f"{_DOING.get(record.phase, f'{record.phase} of')} update {update:,}"
    part, parts = record.facts.get("part"), record.facts.get("parts")
    of = f", part {part} of {parts}" if isinstance(parts, int) and parts > 1 else ""
    return f"update {update:,}{of}: {record.phase}"


def _without_record(history: History) -> Pulse:
    how = history.summary.get("ended")
    if how:
        return Pulse("ended", f"{how}; there is no flight recorder")
    if history.lines:
        return Pulse("unseen", "there is no flight recorder: whether it goes on can't be told")
    if not history.folder.is_dir():
        return Pulse("waiting", f"for a run: there is no folder {history.folder} yet")
    return Pulse("waiting", f"no run was begun in {history.folder} yet")


def _elsewhere(record: Record) -> Pulse:
    host = record.constants.get("host", "another machine")
    age = max(0.0, time.time() - record.last_seen)
    if age < _RECENT_S:
        return Pulse("begins" if record.phase in _BEFORE else "running", f"{doing(record)}; process {record.pid} on {host}")
    return Pulse("unseen", f"it ran on {host}, whose processes can't be seen from here; last sign of life {duration(age)} ago")


def _dead(folder: Path, record: Record) -> Pulse:
    if number := _restarting(folder, record):
        return Pulse("waiting", f"the run died; its supervisor starts it again (restart {number})")
    return Pulse("died", _how_it_ended(folder))


def _restarting(folder: Path, record: Record) -> int:
    """The number of the restart that a supervisor has announced since the run's last sign of life; 0: none."""
    last = (json_lines(folder / SUPERVISION) or [{}])[-1]
    try:
        announced = datetime.fromisoformat(str(last.get("time"))).timestamp()
    except ValueError:
        return 0
    fresh = announced > record.last_seen - 2 and time.time() - announced < _RESTART_S  # its times are whole seconds
    return int(last.get("restart") or 0) if fresh else 0


def _how_it_ended(folder: Path) -> str:
    found = explain(folder)
    return found.lines[0].removeprefix(f"{folder}: the run ") if found.lines else "it ended"
