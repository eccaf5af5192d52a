"""The flight recorder: a small file that says at every moment what a run is doing, and outlives it.

The file is mapped into memory, so that writing is a copy of a few hundred bytes: no call of the system, no waiting for
a disk. What was copied belongs to the kernel, which writes it out whatever becomes of the process; only a power cut
loses the last seconds. It is `_PAGES` pages long:

    0     what does not change: process, machine, versions
    1, 2  the phase, written by turns
    3, 4  the heartbeat of the watchdog, by turns

A page holds a number that grows, a length, a checksum and JSON. A process that is killed while it writes one page leaves
the other of the two whole.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import shlex
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from mlx_qlora.errors import RunFolderError
from mlx_qlora.run import machine

NAME = "flight_recorder.bin"
PHASES = ("load", "tokenise", "batch", "forward", "loss", "backward", "accumulate", "update", "evaluate", "save")
OF_PARTS = ("forward", "loss", "backward", "accumulate")  # what is done with each micro-batch

_PAGE = 4096
_PAGES = 5
_STATE, _BEAT = 1, 3  # the first page of each pair
_HEAD = struct.Struct("<8sQII")  # mark, number, length, checksum
_MARK = b"mlxqlora"
_ROOM = _PAGE - _HEAD.size
_LONGEST_LIST = 1200  # bytes of a list, such as the ids of an update, that are kept
_LONGEST_TEXT = 600

# Without a limit of the user's: how long a run may be silent.
_FIRST_S = 30 * 60.0  # before an update, or this phase, was done once: loading, compiling, a cold disk
_LEAST_S = 120.0
_UPDATES = 20  # times the slowest update
_PHASES = 5  # times the slowest that this phase was: an evaluation may be longer than many updates


@dataclass(frozen=True)
class Typical:
    """How long a phase takes."""

    count: int
    typical_s: float
    slowest_s: float


@dataclass(frozen=True)
class Record:
    """What the recorder of a run said last."""

    constants: dict[str, Any]  # pid, host, boot, started, command, versions ...; empty where that page is damaged
    phase: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # update, part, parts, ids, shape, tokens, budget ...
    progress: int = 0  # grows with every phase
    entered: float = 0.0  # when the phase began, in seconds since 1970
    entered_monotonic: float = 0.0  # by the clock that all processes share until the machine is started again
    limit_s: float = 0.0  # longer than this without progress is a stall
    memory: dict[str, int] = field(default_factory=dict)  # of MLX, when the phase began: active, peak, cache
    phases: dict[str, Typical] = field(default_factory=dict)
    ended: str = ""  # the word with which it ended; empty: it runs, or died without one
    detail: str = ""
    beat: dict[str, Any] = field(default_factory=dict)  # at, monotonic, active, peak, cache, rss, available, total, gpu ...

    @property
    def pid(self) -> int:
        return int(self.constants.get("pid", 0))

    @property
    def last_seen(self) -> float:
        """When the run last gave a sign of life, in seconds since 1970."""
        return max(self.entered, float(self.beat.get("at", 0.0)))

    @property
    def doing(self) -> str:
        """Where it is, as a person says it: `update 3, part 1 of 2, backward of 1 x 812 tokens`."""
        facts = self.facts
        where = [f"update {facts['update']}"] if "update" in facts else []
        if self.phase not in OF_PARTS:
            return ", ".join([*where, self.phase])
        where += [f"part {facts['part']} of {facts['parts']}"] if {"part", "parts"} <= set(facts) else []
        return ", ".join([*where, f"{self.phase} of {facts['shape']}" if facts.get("shape") else self.phase])


class Recorder:
    """Writes the record of a run. One at a time in a folder; a process that is alive keeps its own.

    The file is written in full when it is made: pages that had no place on a full disk would end the process later.
    """

    def __init__(self, folder: Path, command: str | None = None):
        self._folder, self._path = folder, folder / NAME
        _refuse_if_used(folder)
        self._before = self._path.read_bytes() if self._path.exists() else None
        self._made = _make_folder(folder)
        self._lock = threading.RLock()  # a signal's handler may enter a phase while one is being entered
        self._texts: dict[str, str] = {}  # each fact as JSON, so that only what is new is encoded
        self._values: dict[str, Any] = {}
        self._joined: str | None = None  # all of them
        self._timings: dict[str, tuple[int, float, float]] = {}  # count, typical, slowest; of each phase
        self._timing_texts: dict[str, str] = {}
        self._names: dict[str, str] = {}  # of phases, as JSON
        self._phase, self.progress, self.since = "start", 0, time.monotonic()
        self._after_s: float | None = None
        self._update: Any = None
        self._update_since = self._slowest_update_s = 0.0
        self._updates = 0
        self._ending: tuple[str, str] | None = None
        self._beat: dict[str, Any] = {}
        self._numbers = {_STATE: 0, _BEAT: 0}
        self._open = True
        constants = _constants(command)
        self._file, self._pages = _create(self._path, _page(0, _fitting(constants)))
        self._write_state()

    def enter(self, phase: str, **facts: object) -> None:
        """A phase begins. Facts replace those of the same name and stay; None takes one away. After `end`: nothing."""
        with self._lock:
            if not self._open or self._ending:
                return
            now = time.monotonic()
            self._time(now)
            for name, value in facts.items():
                if self._values.get(name) is not value:
                    self._keep(name, value)
            if "update" in facts and facts["update"] != self._update:
                self._next_update(facts["update"], now)
            self._phase, self.since = phase, now
            self.progress += 1
            self._write_state()

    def beat(self, **facts: object) -> None:
        """A sign of life with the memory of process and machine. The watchdog gives one each second."""
        left, whole = machine.available_memory()
        self._beat |= facts
        found = {
            "at": time.time(), "monotonic": time.monotonic(), **machine.mlx_memory(), "rss": machine.process_memory(),
            "available": left, "total": whole, "gpu": machine.gpu_memory(),
            "out_of_memory_kills": machine.out_of_memory_kills(),
        }  # fmt: skip
        text = _fitting(self._beat | found)
        with self._lock:
            if self._open:
                self._write(_BEAT, text)

    def end(self, how: str, detail: str = "") -> None:
        """The last word: finished, stopped early, interrupted, not finite, failed ... The first one counts.

        The phase stays as it is: for a failure that is the one that failed.
        """
        with self._lock:
            if self._open and self._ending is None:
                self._time(time.monotonic())
                self._ending = (how, _shortened(detail, _LONGEST_TEXT))
                self._write_state()
        self.flush()

    def flush(self) -> None:
        """Wait until all of it is on the disk, so that a power cut can't take it."""
        if not self._open:
            return
        with contextlib.suppress(OSError, ValueError):
            os.fsync(self._file)

    def close(self) -> None:
        """A run that leaves without a word has failed: its process may live on, as a notebook's does."""
        if not self._open:
            return
        self.end("failed", "it left without saying how it ended")
        self._release()

    def abandon(self) -> None:
        """The run never began: what was there before is put back, or nothing is left."""
        if not self._open:
            return
        self._release()
        if self._before is not None:
            os.close(_written(self._path, self._before))
            return
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else put something there
            for folder in self._made:
                folder.rmdir()

    def _release(self) -> None:
        with self._lock:
            self._open = False
            if isinstance(self._pages, mmap.mmap):
                self._pages.close()
            os.close(self._file)

    def set_limit(self, after_s: float | None) -> None:
        """A limit of the user's for the silence between two phases, instead of one that follows from what was."""
        with self._lock:
            self._after_s = after_s
            if self._open and not self._ending:
                self._write_state()

    @property
    def limit_s(self) -> float:
        if self._after_s is not None:
            return self._after_s
        if not self._updates or self._phase not in self._timings:
            return _FIRST_S
        return max(_LEAST_S, _UPDATES * self._slowest_update_s, _PHASES * self._timings[self._phase][2])

    def record(self) -> Record:
        """What the file says now."""
        with self._lock:
            found = _parse(bytes(self._pages[:])) if self._open else None
        return found or Record({})

    def _time(self, now: float) -> None:
        """The phase that was is over."""
        if self.progress:
            took = now - self.since
            count, typical, slowest = self._timings.get(self._phase, (0, took, took))
            typical += 0.2 * (took - typical)
            slowest = took if took > slowest else slowest
            self._timings[self._phase] = (count + 1, typical, slowest)
            self._timing_texts[self._phase] = f"{self._quoted(self._phase)}:[{count + 1},{typical:.4g},{slowest:.4g}]"

    def _quoted(self, phase: str) -> str:
        if phase not in self._names:
            self._names[phase] = json.dumps(phase[:80])
        return self._names[phase]

    def _next_update(self, number: object, now: float) -> None:
        if self._update is not None and number is not None:
            self._updates += 1
            self._slowest_update_s = max(self._slowest_update_s, now - self._update_since)
        self._update, self._update_since = number, now

    def _keep(self, name: str, value: object) -> None:
        """Encode a fact. A list that is too long keeps its beginning, and `NAME_in_all` says how long it was."""
        self._joined = None
        whole = f"{name}_in_all"
        self._texts.pop(whole, None)
        if value is None:
            self._texts.pop(name, None)
            self._values.pop(name, None)
            return
        self._values[name] = value
        if isinstance(value, (list, tuple)):
            few = _beginning(value)
            if len(few) < len(value):
                self._texts[whole] = f"{_json(whole)}:{len(value)}"
            value = few
        self._texts[name] = f"{_json(name)}:{_encoded(value)}"

    def _write_state(self) -> None:
        memory = machine.mlx_memory()
        bytes_of = ",".join([f'"{name}":{count}' for name, count in memory.items()])
        head = (
            f'"phase":{self._quoted(self._phase)},"progress":{self.progress},"entered":{time.time():.3f},'
            f'"entered_monotonic":{self.since:.4f},"limit_s":{self.limit_s:.1f},"memory":{{{bytes_of}}}'
        )
        if self._ending:
            head += f',"ended":{json.dumps(self._ending[0])},"detail":{json.dumps(self._ending[1])}'
        text = f'{{{head},"facts":{{{self._facts_text()}}},"phases":{{{",".join(self._timing_texts.values())}}}}}'
        if len(text) > _ROOM:
            text = f'{{{head},"facts":{{{_as_many(self._texts, _ROOM - len(head) - 20)}}}}}'
        self._write(_STATE, text)

    def _facts_text(self) -> str:
        if self._joined is None:
            self._joined = ",".join(self._texts.values())
        return self._joined

    def _write(self, pair: int, text: str) -> None:
        self._numbers[pair] += 1
        number = self._numbers[pair]
        page = _page(number, text)
        start = (pair + number % 2) * _PAGE
        self._pages[start : start + len(page)] = page
        if not isinstance(self._pages, mmap.mmap):
            with contextlib.suppress(OSError):
                os.pwrite(self._file, page, start)


def read(folder: Path) -> Record | None:
    """The record of a run, of this process or another, alive or not. None: there is none that can be read."""
    for _ in range(3):  # a reader that is interrupted may meet both pages of a pair half written
        try:
            content = (folder / NAME).read_bytes()
        except OSError:
            return None
        if (found := _parse(content)) is not None:
            return found
    return None


Place = Literal["here", "restarted", "elsewhere"]


def place(record: Record) -> Place:
    """Whether the run's process would be seen from here; if not, whether the machine was started again since."""
    constants = record.constants
    if constants.get("boot") == machine.boot_id() and constants.get("pid_space") == machine.pid_space():
        return "here"
    same_host = constants.get("host") == socket.gethostname()
    return "restarted" if same_host and constants.get("boot") != machine.boot_id() else "elsewhere"


def alive(record: Record) -> bool | None:
    """Whether the process of a record is alive. None: it is, or was, where it can't be seen from here."""
    where = place(record)
    if where != "here" or not record.pid:
        return False if where == "restarted" else None
    start = machine.process_start(record.pid)
    return bool(start) and start == record.constants.get("process_start")


def silent_s(record: Record) -> float | None:
    """Seconds since a phase began; the sleep of a closed lid does not count. None: it can't be known from here."""
    return time.monotonic() - record.entered_monotonic if record.constants.get("boot") == machine.boot_id() else None


def _refuse_if_used(folder: Path) -> None:
    """Two runs in one folder would write over each other's adapters."""
    there = read(folder)
    if there and not there.ended and there.pid != os.getpid() and alive(there):
        raise RunFolderError(
            f"output_dir: {folder} is in use: process {there.pid} is training there ({there.doing}). "
            f"Wait for it, stop it with `kill {there.pid}`, or name another folder with --output-dir."
        )


def _make_folder(folder: Path) -> list[Path]:
    """Make it; gives those that were not there before, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _constants(command: str | None) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "process_start": machine.process_start(os.getpid()),
        "pid_space": machine.pid_space(),
        "host": socket.gethostname(),
        "boot": machine.boot_id(),
        "started": time.time(),
        "platform": platform.platform(),
        "versions": _versions(),
        "command": _shortened(command if command is not None else _command(), 1500),
    }


def _command() -> str:
    """The command line, as it can be given again."""
    program, *arguments = sys.argv or ["python"]
    name = Path(program).name
    if name == "__main__.py":  # python -m mlx_qlora
        name = f"python -m {Path(program).parent.name}"
    return f"{name} {shlex.join(arguments)}".strip()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("mlx-qlora", "mlx", "mlx-lm"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _create(path: Path, first: bytes) -> tuple[int, mmap.mmap | bytearray]:
    """The file with its first page, opened and mapped. Some network file systems can't map; there each page is written."""
    content = first.ljust(_PAGES * _PAGE, b"\0")
    file = _written(path, content)
    try:
        return file, mmap.mmap(file, len(content))
    except (OSError, ValueError):
        return file, bytearray(content)


def _written(path: Path, content: bytes) -> int:
    """Put a file in the place of another in one step; gives it opened."""
    aside = path.with_name(f".{path.name}.tmp")
    file = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        rest = content
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
        aside.replace(path)
    except BaseException:
        os.close(file)
        aside.unlink(missing_ok=True)
        raise
    return file


def _page(number: int, text: str) -> bytes:
    payload = text.encode("ascii")
    return _HEAD.pack(_MARK, number, len(payload), zlib.crc32(payload, number & 0xFFFFFFFF)) + payload


def _parse(content: bytes) -> Record | None:
    pages = [content[start : start + _PAGE] for start in range(0, _PAGES * _PAGE, _PAGE)]
    constants = _payload(pages[0])
    state = max((_payload(page) for page in pages[_STATE : _STATE + 2]), key=_number)
    beat = max((_payload(page) for page in pages[_BEAT : _BEAT + 2]), key=_number)
    if constants is None and state is None:
        return None
    plain = {name: value for name, value in (state or (0, {}))[1].items() if name in Record.__dataclass_fields__}
    plain["phases"] = {name: Typical(*times) for name, times in plain.get("phases", {}).items()}
    return Record(**plain, constants=(constants or (0, {}))[1], beat=(beat or (0, {}))[1])


def _number(payload: tuple[int, dict[str, Any]] | None) -> int:
    return -1 if payload is None else payload[0]


def _payload(page: bytes) -> tuple[int, dict[str, Any]] | None:
    """(number, what a page says); None where it is damaged."""
    if len(page) < _HEAD.size:
        return None
    mark, number, length, checksum = _HEAD.unpack_from(page)
    payload = page[_HEAD.size : _HEAD.size + length]
    if mark != _MARK or len(payload) != length or zlib.crc32(payload, number & 0xFFFFFFFF) != checksum:
        return None
    return number, json.loads(payload)


_json = json.JSONEncoder(default=str).encode  # json.dumps would make one of these each time


def _encoded(value: object) -> str:
    """JSON, in ASCII; what JSON has no word for as text, and what is long cut."""
    try:
        text = _json(value)
    except (TypeError, ValueError, RecursionError):  # keys that are no texts, circles
        text = json.dumps(str(value))
    longest = _LONGEST_LIST if isinstance(value, list) else _LONGEST_TEXT
    return text if len(text) <= longest else json.dumps(_shortened(str(value), _LONGEST_TEXT))


def _shortened(text: str, most: int) -> str:
    """At most so many bytes of JSON, in which a letter that is not ASCII takes six or twelve."""
    kept = text[:most]
    while len(json.dumps(kept)) > most:
        kept = kept[: len(kept) * 9 // 10]
    return kept if kept == text else f"{kept} ..."


def _beginning(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """As many values as there is room for."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        if len(_json(values)) <= _LONGEST_LIST:
            return list(values)
    kept, room = [], _LONGEST_LIST - 2
    for value in values:
        room -= len(_encoded(value)) + 2
        if room < 0:
            break
        kept.append(value)
    return kept


def _as_many(texts: Mapping[str, str], room: int) -> str:
    """As many facts as fit, the short ones first."""
    kept, used = [], 0
    for text in sorted(texts.values(), key=len):
        used += len(text) + 1
        if used > room:
            break
        kept.append(text)
    return ",".join(kept)


def _fitting(facts: Mapping[str, Any]) -> str:
    """A page's worth of facts as JSON."""
    return f"{{{_as_many({name: f'{json.dumps(name)}:{_encoded(value)}' for name, value in facts.items()}, _ROOM - 2)}}}"
