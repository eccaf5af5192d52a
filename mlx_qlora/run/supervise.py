"""A run as a child that is started again after it was killed, crashed or hung; smaller where memory was the likely cause."""

from __future__ import annotations

import json
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlx_qlora.run import machine, recorder
from mlx_qlora.run.child import STOPS, Child, Patience, Standing, Watch, caught, suspend
from mlx_qlora.run.watchdog import CRASH

NAME = "supervision.jsonl"
GAVE_UP = 3
INTERRUPTED = 130
FLOOR = 16  # positions at once; a run lays out at least one example, however long, so less would change nothing
# What the run itself has decided: done, a wrong input, a guard, interrupted after saving. Starting again changes nothing.
_DECIDED = (0, 2, 3, INTERRUPTED)
# Where memory goes by the size of a micro-batch. What dies while it loads or saves would die with a smaller one too.
COMPUTING = frozenset({"forward", "loss", "backward", "accumulate", "update", "evaluate"})
# How a lack of memory ends a process: by the kernel (SIGKILL), by an array that MLX on Linux's CPU never got and writes
# to (SIGSEGV), by an exception that nobody can catch on Metal's threads (SIGABRT).
_OF_MEMORY = frozenset({"SIGKILL", "SIGSEGV", "SIGABRT"})
_HANG = "hang"
_LITTLE, _PLENTY = 0.05, 0.5  # of the memory of the machine, or of the container


@dataclass(frozen=True)
class Death:
    """How, where and with how much at once a run died, and how it goes on."""

    how: str  # SIGKILL, exit 1, hang
    phase: str  # "": before it said anything
    update: int
    budget: int | None  # positions at once; None: as configured
    memory: str = ""  # short: it was seen; likely: it looks like that; "": another cause
    detail: str = ""
    next_budget: int | None = None

    @property
    def place(self) -> tuple[str, int]:
        return (self.phase, self.update)

    @property
    def too_large(self) -> bool:
        """Whether a smaller micro-batch may help."""
        return bool(self.memory) and self.phase in COMPUTING

    def __str__(self) -> str:
        """
        >>> str(Death("SIGKILL", "backward", 37, 4096, memory="short"))
        'died by SIGKILL in backward of update 37 (memory was short)'
        """
        how = f"hung and was ended ({self.detail})" if self.how == _HANG else f"died by {self.how}"
        if self.how.startswith("exit "):
            how = f"ended with an error (exit code {self.how.removeprefix('exit ')})"
        where = f" in {self.phase}" if self.phase else " before its first sign of life"
        where += f" of update {self.update}" if self.update and self.phase else ""
        cause = {"short": " (memory was short)", "likely": " (it looks like a lack of memory)"}
        return how + where + cause.get(self.memory, "")


@dataclass(frozen=True)
class _End:
    """How one child ended."""

    code: int
    standing: Standing | None
    hung: str | None
    stopped: bool  # somebody asked for it


def recorded(folder: Path) -> Standing | None:
    """How the run in a folder stands, by its flight recorder.

    A run that has said its last word has no limit any more: nobody beats for it while it ends.
    """
    record = recorder.read(folder)
    if record is None:
        return None
    facts, over = record.facts, bool(record.ended)
    sizes = [size for size in (facts.get("budget"), facts.get("positions")) if isinstance(size, int) and size > 0]
    return Standing(
        pid=record.pid,
        phase=record.phase,
        update=facts["update"] if isinstance(facts.get("update"), int) else 0,
        budget=min(sizes, default=0),  # half of a budget that this micro-batch did not fill would change nothing
        progressed_at=record.entered,
        beat_at=0.0 if over else float(record.beat.get("at", 0.0)),
        limit_s=0.0 if over else record.limit_s,
        memory_short=_short(record.beat),
        memory_plenty=record.beat.get("available", 0) > _PLENTY * record.beat.get("total", 0) > 0,
    )


def _short(beat: Mapping[str, Any]) -> bool:
    """Whether little was left at the last heartbeat, or the kernel has ended something for memory since then."""
    left, whole = beat.get("available", 0), beat.get("total", 0)
    kills = beat.get("out_of_memory_kills")
    return left < _LITTLE * whole or (kills is not None and machine.out_of_memory_kills() > kills)


def supervise(
    command: Callable[[int | None], Sequence[str]],
    folder: Path,
    times: int,
    say: Callable[[str], None],
    standing: Callable[[Path], Standing | None] = recorded,
    patience: Patience = Patience(),  # noqa: B008  (frozen)
) -> int:
    """Run `command(budget)` to its end, starting it again up to `times` times. Gives the exit code.

    `budget` is the most positions at once, None as configured. A run that has decided to end (0, 2, 3, 130) or was asked
    to (SIGINT, SIGTERM, SIGHUP, SIGQUIT) is not started again. Where memory was the likely cause of a death, the next
    one begins with half the budget.
    """
    journal = _Journal(folder, say)
    deaths: list[Death] = []
    budget: int | None = None
    with caught() as signals:
        while True:
            end = _attend(Child(command(budget)), lambda: standing(folder), signals, patience)
            if end.stopped or end.code in _DECIDED or -end.code in STOPS:
                code = end.code if end.code in _DECIDED else INTERRUPTED
                journal.ended(code, len(deaths))
                return code
            death = _judge(end, budget, deaths)
            reason = _hopeless([*deaths, death], times)
            deaths.append(death)
            if reason:
                journal.gave_up(deaths, reason)
                return GAVE_UP
            journal.restart(death, len(deaths), times)
            if _asked_within(min(2.0 ** (len(deaths) - 1), patience.pause_s), signals, patience):
                journal.ended(INTERRUPTED, len(deaths) - 1)
                return INTERRUPTED
            budget = death.next_budget


def _attend(child: Child, standing: Callable[[], Standing | None], signals: deque[int], patience: Patience) -> _End:
    """Wait for the child's end: pass on signals, one at a time so that none swallows another, and end it if it hangs."""
    watch, last, hung, stopped = Watch(patience, time.monotonic()), None, None, False
    kill_at = 0.0
    while True:
        code = child.poll()
        said = standing()  # after the poll: what a child has said last is read once it can say no more
        last = said if said and said.pid == child.pid else last  # an earlier run's last words are no news
        if code is not None:
            return _End(code, last, hung, stopped)
        if signals:
            number = signals.popleft()
            stopped |= number in STOPS
            if number == signal.SIGTSTP:
                suspend(child)
            else:
                child.send(number)
        if hung is None:
            hung = watch.look(last, time.monotonic())
            if hung:
                child.send(signal.SIGABRT)  # its fault handler writes down where all threads stand
                child.send(signal.SIGCONT)  # a stopped process hears nothing else
                kill_at = time.monotonic() + patience.abort_s
        elif time.monotonic() > kill_at:
            child.kill()
        time.sleep(patience.tick_s)


def _judge(end: _End, asked: int | None, before: Sequence[Death]) -> Death:
    said = end.standing
    budget = (said.budget if said else 0) or asked
    how = _HANG if end.hung else f"exit {end.code}" if end.code >= 0 else _name(-end.code)
    death = Death(
        how=how,
        phase=said.phase if said else "",
        update=said.update if said else 0,
        budget=budget,
        memory=_memory(how, said, before),
        detail=end.hung or "",
    )
    return replace(death, next_budget=max(FLOOR, budget // 2) if death.too_large and budget else asked)


def _memory(how: str, said: Standing | None, before: Sequence[Death]) -> str:
    """Whether memory was why. A SIGKILL while most of it was free is somebody's `kill -9`, unless it comes again there."""
    if said is None or how == _HANG:
        return ""
    if said.memory_short:
        return "short"
    again = bool(before) and (before[-1].how, before[-1].update) == (how, said.update)
    somebody = how == "SIGKILL" and said.memory_plenty and not again
    return "likely" if how in _OF_MEMORY and said.phase in COMPUTING and not somebody else ""


def _hopeless(deaths: Sequence[Death], times: int) -> str | None:
    """Why there is no use in starting again, or None."""
    last = deaths[-1]
    if len(deaths) > times:
        return f"that was restart {times} of {times}" if times else "no restart was wanted"
    if len(deaths) == 1:
        return None
    before = deaths[-2]
    if last.how == before.how and last.how.startswith("exit ") and last.place == before.place:
        return "the same error came at the same place again"
    if last.too_large and before.too_large and last.update == before.update and (last.budget or 0) >= (before.budget or 0):
        return "the same update failed twice, and there is nothing left to make smaller"
    return None


def _asked_within(seconds: float, signals: deque[int], patience: Patience) -> bool:
    """Wait; says whether somebody asked for the end meanwhile."""
    until = time.monotonic() + seconds
    while True:
        while signals:
            number = signals.popleft()
            if number in STOPS:
                return True
            if number == signal.SIGTSTP:
                suspend(None)
        left = until - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, patience.tick_s))


class _Journal:
    """What is said, and the same as lines of JSON in the folder of the run.

    Nothing here may end the supervision: neither a terminal that was closed nor a disk that is full.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._folder, self._say = folder, say

    def restart(self, death: Death, number: int, times: int) -> None:
        on = "going on from its last checkpoint" if death.update else "starting it again"
        less = f" with at most {death.next_budget:,} positions at once" if death.too_large and death.next_budget else ""
        self._tell(f"the run {death}: {on}{less}; restart {number} of {times}")
        self._write(_line(death, number))

    def gave_up(self, deaths: Sequence[Death], reason: str) -> None:
        starts = [f"  {number}. {_with(death)}{death}" for number, death in enumerate(deaths, 1)]
        advice = [f"  - {one}" for one in _advice(deaths)]
        self._tell("\n".join([f"gave up: {reason}. The run", *starts, "What to try:", *advice]))
        self._write(_line(deaths[-1], None))
        self._write({"time": _now(), "how": "gave up", "reason": reason, "restarts": len(deaths) - 1, "exit_code": GAVE_UP})

    def ended(self, code: int, restarts: int) -> None:
        """Of a run that ended by itself there is nothing to say unless it was started again."""
        how = {0: "finished", INTERRUPTED: "was interrupted"}.get(code, f"ended with exit code {code}")
        if restarts:
            self._tell(f"the run {how} after {restarts} restart{'s' if restarts > 1 else ''}")
            self._write({"time": _now(), "how": how, "restarts": restarts, "exit_code": code})

    def _tell(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._say(text)

    def _write(self, line: dict[str, Any]) -> None:
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _line(death: Death, restart: int | None) -> dict[str, Any]:
    return {
        "time": _now(),
        "how": death.how,
        "phase": death.phase,
        "update": death.update,
        "memory": death.memory,
        "budget_before": death.budget,
        "budget_after": death.next_budget if restart else None,
        "restart": restart,
    }


def _with(death: Death) -> str:
    return f"with up to {death.budget:,} positions at once: " if death.budget else ""


def _advice(deaths: Sequence[Death]) -> list[str]:
    """What a person could change, for all that has happened."""
    hows = {death.how: death for death in deaths}
    advice = []
    if any(death.too_large for death in deaths):
        advice += [
            "less memory for each example: --max-seq-length, --lora.layers, --grad-checkpoint on",
            "close what else needs memory; `mlx-qlora plan` says what a run will take",
        ]
    elif "SIGKILL" in hows:
        phase = hows["SIGKILL"].phase or "the start"
        advice.append(f"SIGKILL mostly comes from a system without memory; in {phase} smaller batches don't help")
    if any(how.startswith("exit ") for how in hows):
        advice.append("the traceback above says what failed; a smaller change of settings or data may avoid it")
    if _HANG in hows:
        advice.append(f"{CRASH} says where all threads stood when it hung; a disk or a network that is gone looks like that")
    advice.append("the last checkpoint is as it was: once the cause is gone, the same command with --resume goes on from it")
    return advice


def _name(number: int) -> str:
    """
    >>> _name(9), _name(40)
    ('SIGKILL', 'signal 40')
    """
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
