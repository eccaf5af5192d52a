"""How the last run in a folder ended, told from what it left: the reasons for it, the doubt, and what to try."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mlx_qlora.look.console import size
from mlx_qlora.look.doctor.causes import (
    DISK,
    FAILED,
    INTERRUPTED,
    KILLED,
    MEMORY,
    NATIVE,
    NOT_FINITE,
    POWER,
    STUCK,
    Finding,
    died,
    ended,
)
from mlx_qlora.look.doctor.evidence import Evidence, gather, short_of_memory, step_of
from mlx_qlora.run.folder import delivered
from mlx_qlora.run.recorder import Record, alive, silent_s
from mlx_qlora.run.watchdog import CRASH, STALLED, duration

Outcome = Literal["running", "ended", "died", "nothing"]
_RECENT_S = 30.0  # a heartbeat from elsewhere that is no older: the run goes on there
_UNHEARD_S = 5.0  # how old a heartbeat is when the process is alive but can't give one


@dataclass(frozen=True)
class Try:
    """One thing to do, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Autopsy:
    """`outcome` and `cause` are for programs, `lines` for people."""

    outcome: Outcome
    cause: str
    lines: list[str]


def explain(folder: Path) -> Autopsy:
    """How the last run in this folder ended and what to try, in order. Reads only; any of the files may be missing."""
    found = gather(folder)
    if found is None:
        return Autopsy("nothing", "", _nothing(folder))
    record = found.record
    how = record.ended or found.summary.get("ended", "")
    running = not how and _runs(record)
    if running:
        return Autopsy("running", "", list(_told_running(found)))
    finding = ended(found, how) if how else died(found)
    outcome: Outcome = "ended" if how else "died"
    return Autopsy(outcome, finding.cause, list(_told(found, finding)))


def _nothing(folder: Path) -> list[str]:
    if not folder.is_dir():
        return [f"{folder} is no folder. Name the folder of a run: what --output-dir said."]
    return [
        f"{folder}: no run has left a record here.",
        "Name the folder of a run: what --output-dir said. A run that was refused for a wrong setting leaves nothing.",
    ]


# --- a run that goes on


def _runs(record: Record) -> bool:
    here = alive(record)
    return here if here is not None else time.time() - record.last_seen < _RECENT_S


def _told_running(found: Evidence) -> Iterator[str]:
    record = found.record
    where = f"process {record.pid} on {record.constants.get('host', 'another machine')}"
    silent = silent_s(record)
    unheard = time.time() - record.beat.get("at", time.time())
    yield f"{found.folder}: the run goes on, as {where}"
    yield from _fact("now", record.doing)
    if silent is not None and silent > record.limit_s > 0:
        yield from _fact("progress", f"none for {duration(silent)}; {duration(record.limit_s)} would be long here")
    elif silent is not None:
        usual = record.phases.get(record.phase)
        before = f"; usually it takes {duration(usual.typical_s)}" if usual else ""
        yield from _fact("progress", f"this began {duration(silent)} ago{before}")
    if unheard > _UNHEARD_S and record.beat:
        yield from _fact("heartbeat", f"none for {duration(unheard)}: the process is suspended, or something holds it")
    yield from _fact("memory", *_memory(found.beat))
    if short_of_memory(found.beat):
        yield from _fact("careful", "little memory is left; the system may end the run. Close other programs.")
    if found.stalled:
        yield from _fact("stalls", f"{found.folder / STALLED} says what all threads were doing")
    yield from _fact("restarts", *_restarts(found))
    if silent is not None and silent > record.limit_s > 0:
        yield from _tries(
            Try(f"kill {record.pid}", "asks it to stop after the update; a run that hangs does not hear it"),
            Try(f"kill -9 {record.pid}", "ends it at once; what was saved last stays"),
            Try(found.train(), "goes on from there"),
        )


# --- telling


def _told(found: Evidence, finding: Finding) -> Iterator[str]:
    record = found.record
    yield f"{found.folder}: the run {finding.headline}"
    done = finding.cause in ("finished", "stopped early")
    if not done:
        yield from _fact("where", *_where(found))
        yield from _fact("when", *_when(record))
        yield from _fact("memory", *_memory(found.beat))
    yield from _fact("why", *finding.why)
    yield from _fact("doubt", *([finding.doubt] if finding.doubt else []))
    yield from _fact("restarts", *_restarts(found))
    if done:
        kept = delivered(found.folder) or found.folder / "adapters" / "adapters.safetensors"
        yield from _fact(kept.parent.name, str(kept.parent))
        return
    yield from _fact("saved", _saved(found))
    yield from _tries(*_remedies(found, finding.cause))


def _where(found: Evidence) -> list[str]:
    record = found.record
    if not record.phase:
        return []
    planned = found.state.get("planned_steps") or found.summary.get("planned_steps")
    doing = record.doing
    if planned and "update" in record.facts:
        update = f"update {record.facts['update']}"
        doing = doing.replace(update, f"{update} of {planned}", 1)
    ids = record.facts.get("ids") or []
    ids = ids if isinstance(ids, list) else [ids]
    count = record.facts.get("ids_in_all", len(ids))
    few = ", ".join(str(each) for each in ids[:6])
    more = f" ... ({count} in all)" if count > 6 else ""
    return [doing, *([f"with the examples {few}{more}"] if ids else [])]


def _when(record: Record) -> list[str]:
    if not record.last_seen:
        return []
    seen = record.last_seen
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen))
    usual = record.phases.get(record.phase)
    into = f", {duration(seen - record.entered)} into this phase" if seen > record.entered + 0.05 else ""
    typical = f" (usually {duration(usual.typical_s)})" if usual and into else ""
    return [f"last sign of life {moment}, {duration(max(0.0, time.time() - seen))} ago{into}{typical}"]


def _memory(beat: dict[str, Any]) -> list[str]:
    lines = []
    if beat.get("active") is not None:
        at_most, kept = size(beat.get("peak", 0)), size(beat.get("cache", 0))
        lines += [f"MLX {size(beat['active'])} in use, {at_most} at most so far, {kept} kept for later"]
    if beat.get("total"):
        process = f"; this process had {size(beat['rss'])}" if beat.get("rss") else ""
        lines += [f"{size(beat['available'])} of {size(beat['total'])} were left{process}"]
    if beat.get("gpu"):
        lines += [f"the GPU may use {size(beat['gpu'])}"]
    return lines


def _saved(found: Evidence) -> str:
    if found.checkpoint is None:
        return "no checkpoint: it has to begin again; --save-every 50 would save one every 50 updates"
    step, update = step_of(found.checkpoint), found.record.facts.get("update")
    lost = update - 1 - step if isinstance(update, int) else 0
    after = f"; {lost} {'update after it is' if lost == 1 else 'updates after it are'} lost" if lost > 0 else ""
    return f"{found.checkpoint.name}{after}"


def _restarts(found: Evidence) -> list[str]:
    """What the supervisor did, the last three times."""
    deaths = [each for each in found.restarts if "phase" in each]  # the others say how it came to an end
    if not deaths:
        return []
    count = sum(each.get("restart") is not None for each in deaths)
    lines = [f"the supervisor has restarted it {count} time{'' if count == 1 else 's'}"]
    for each in deaths[-3:]:
        before, after = each.get("budget_before"), each.get("budget_after")
        smaller = f"; token budget {before} -> {after}" if after is not None and after != before else ""
        where = ", ".join(str(part) for part in (f"update {each.get('update')}", each.get("phase")) if part)
        lines.append(f"{_moment(each.get('time'))}  {each.get('how', 'it died')}: {where}{smaller}".strip())
    return lines


def _moment(when: object) -> str:
    """The moment of a line of the supervisor's by the clock on the wall here."""
    try:
        return datetime.fromisoformat(str(when)).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return ""


# --- what to try


def _remedies(found: Evidence, cause: str) -> list[Try]:
    length, rate = found.config.get("max_seq_length"), _rate(found)
    counts = [
        found.record.facts.get(name) for name in ("budget", "positions")
    ]  # half of a budget that is not filled is the same
    half = f"--token-budget {max(1, min((each for each in counts if isinstance(each, int)), default=4096) // 2)}"
    smaller = Try(found.train(half), "half as many positions at once: less memory, the same gradient")
    checkpointed = Try(found.train(half, "--grad-checkpoint on"), "computes again instead of keeping: slower, much smaller")
    supervised = Try(found.train("--supervise 5"), "restarts by itself up to 5 times, smaller after too little memory")
    again = Try(found.train(), "goes on from what was saved" if found.checkpoint else "begins again")
    shorter = Try(
        found.afresh(f"--max-seq-length {length // 2 if isinstance(length, int) else 1024}"),
        "shorter examples; this changes what is trained, so it begins again",
    )
    third = f"--learning-rate {rate / 3:.2g}"
    elsewhere = Try(f"tmux new -s train '{found.train('--supervise 5')}'", "goes on when the terminal is closed")
    reports = [Try("open ~/Library/Logs/DiagnosticReports", "macOS keeps its own report of the crash there")] * _on_macos(found)
    disk = shlex.join(["df", "-h", str(found.folder)])
    return {
        MEMORY: [smaller, checkpointed, supervised, shorter],
        NATIVE: [again, supervised, smaller, Try(found.train("--compile off"), "leaves out what MLX compiles"), *reports,
                 Try("pip install --upgrade mlx mlx-lm", f"and report it with {found.folder / CRASH} if it stays")],
        KILLED: [again, elsewhere, smaller],
        POWER: [again, supervised],
        STUCK: [again, supervised, smaller],
        NOT_FINITE: [
            Try(found.afresh(third), "a smaller step; the usual remedy"),
            Try(found.afresh(third, "--warmup-steps 20"), "and a slow beginning"),
            Try(found.afresh(third, "--warmup-steps 20", "--clip-grad-norm 0.5"), "and shorter gradients"),
            Try(f"mlx-qlora data {_data(found)}", "a look at the examples"),
        ],
        DISK: [Try(disk, "shows what is free; make room there"), again],
        FAILED: [again],
        INTERRUPTED: [again],
    }.get(cause, [again])  # fmt: skip


def _on_macos(found: Evidence) -> bool:
    return str(found.record.constants.get("platform", "")).startswith("macOS")


def _data(found: Evidence) -> str:
    data, model = found.config.get("data", "DATA"), found.config.get("model", "MODEL")
    return shlex.join([*map(str, data if isinstance(data, list) else [data]), "--model", str(model)])


def _rate(found: Evidence) -> float:
    """The learning rate of the run; a common one where its configuration can't be read."""
    try:
        return float(found.config.get("learning_rate", 1e-4))  # YAML takes 1e-4 for a text
    except (TypeError, ValueError):
        return 1e-4


def _tries(*tries: Try) -> Iterator[str]:
    for number, each in enumerate(tries, 1):
        yield f"{'try' if number == 1 else '':<9} {number}. {each.what}"
        yield f"{'':<12} {each.why}"


def _fact(name: str, *lines: str) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield f"{name if number == 0 else '':<9} {line}"


def _quoted(what: object) -> str:
    return shlex.quote(str(what))
