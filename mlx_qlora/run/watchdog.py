"""The watchdog: when a run says nothing for long, what every thread was doing is written down and the user is told.

It is a thread that gives a sign of life each second. A thread of Python can't run while something holds the
interpreter, so a timer of `faulthandler`, which needs no interpreter, stands behind it. `faulthandler` also writes down
where the process was when it is ended by a fault of its own: MLX ends a process that way when a GPU runs out of memory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_qlora.errors import require
from mlx_qlora.run.recorder import Recorder

CRASH, STALLED = "crash.txt", "stalled.txt"
_TICK_S = 1.0
_FLUSH_S = 15.0  # what a power cut may take of the record
_MB = 1e6


@contextmanager
def watching(recorder: Recorder, folder: Path, tell: Callable[[str], None], after_s: float | None = None) -> Iterator[None]:
    """Inside, a run without progress for `after_s` seconds is a stall; None: for as long as follows from what it did.

    `tell` gets a few lines of text, from another thread, once for each stall and again whenever its time has doubled.
    Files that were there before are continued, and the heartbeat says from where; what stays empty is removed.
    """
    require((after_s is None or after_s > 0, "watchdog", after_s, "a number of seconds above 0"))
    recorder.set_limit(after_s)
    crash, stalled = _Written(folder / CRASH), _Written(folder / STALLED)
    recorder.beat(crash_from=crash.size(), stalled_from=stalled.size())
    was_on = faulthandler.is_enabled()
    faulthandler.enable(file=crash.file)
    watch = _Watch(recorder, stalled, tell)
    watch.start()
    try:
        yield
    finally:
        watch.stop()
        faulthandler.disable()
        if was_on and sys.__stderr__ is not None:  # where to, nobody can ask; it is stderr unless told otherwise
            with contextlib.suppress(OSError, ValueError):
                faulthandler.enable(file=sys.__stderr__)
        crash.close()
        stalled.close()


class _Written:
    """A file that is continued, opened for as long as something may have to be written in an emergency."""

    def __init__(self, path: Path):
        self.path = path
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def size(self) -> int:
        return os.fstat(self.file).st_size

    def write(self, text: str) -> None:
        rest = text.encode("utf-8", errors="replace")
        with contextlib.suppress(OSError):  # a full disk is no reason to watch no longer
            while rest:
                rest = rest[os.write(self.file, rest) :]

    def close(self) -> None:
        empty = self.size() == 0
        os.close(self.file)
        if empty:
            self.path.unlink(missing_ok=True)


class _Watch:
    """The thread, and what it knows of the run."""

    def __init__(self, recorder: Recorder, file: _Written, tell: Callable[[str], None]):
        self._recorder, self._file, self._tell = recorder, file, tell
        self._tick_s = min(_TICK_S, recorder.limit_s / 4)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlx-qlora watchdog", daemon=True)
        self._progress = recorder.progress
        self._silent_s = 0.0  # as far as this thread could run: what a suspended process missed does not count
        self._told_at_s = 0.0  # 0: this silence is no stall yet
        self._size = file.size()  # more than that: faulthandler wrote

    def start(self) -> None:
        self._arm()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        last = flushed = time.monotonic()
        while not self._stopped.wait(self._tick_s):
            now = time.monotonic()
            try:
                self._look(now - last)
                self._recorder.beat()
                if now - flushed > _FLUSH_S:
                    self._recorder.flush()
                    flushed = now
            except Exception as error:  # whatever it is, the run and the watch go on
                self._file.write(f"the watchdog could not look: {error!r}\n")
                self._size = self._file.size()
            last = now

    def _look(self, passed_s: float) -> None:
        if self._file.size() > self._size:
            self._was_deaf(passed_s)
        self._arm()
        if self._recorder.progress != self._progress:
            if self._told_at_s:
                self._write(f"--- {_now()}  it goes on, after {duration(self._silent_s)}\n\n")
                self._say(f"it goes on, after {duration(self._silent_s)} without progress")
            self._progress, self._silent_s, self._told_at_s = self._recorder.progress, 0.0, 0.0
            return
        self._silent_s += min(passed_s, 2 * self._tick_s)
        limit = max(self._recorder.limit_s, 2 * self._told_at_s)
        if self._silent_s > limit:
            self._told_at_s = self._silent_s
            self._stalled()

    def _arm(self) -> None:
        """Let faulthandler write all stacks unless this thread comes by again before that."""
        with contextlib.suppress(RuntimeError, ValueError):
            faulthandler.dump_traceback_later(max(self._recorder.limit_s, 2 * self._tick_s), file=self._file.file)

    def _was_deaf(self, passed_s: float) -> None:
        """The timer of faulthandler ran out: for that long no thread of Python could run."""
        record = self._recorder.record()
        took = duration(passed_s)
        self._write(
            f"--- {_now()}  no thread of Python could run for {took}: {record.doing}\n"
            "    Something held the interpreter, or the process was suspended. The stacks are those above.\n\n"
        )
        self._say(f"for {took} nothing could run ({record.doing}); {self._file.path} says where it was")

    def _stalled(self) -> None:
        record = self._recorder.record()
        usual = record.phases.get(record.phase)
        before = f", which usually takes {duration(usual.typical_s)}" if usual else ""
        silent = duration(self._silent_s)
        facts = "".join(f"    {name}: {value}\n" for name, value in record.facts.items())
        memory = "".join(f"    {name}: {value / _MB:,.0f} MB\n" for name, value in _memory(record.beat))
        self._write(
            f"--- {_now()}  no progress for {silent}: {record.doing}{before}\n{facts}memory\n{memory}\n{_all_stacks()}\n"
        )
        self._say(
            f"no progress for {silent}: {record.doing}{before}.\n"
            f"It may only be slow, and goes on as soon as it can. What all threads do is in {self._file.path}; "
            f"`mlx-qlora doctor {self._file.path.parent}` explains it."
        )

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._size = self._file.size()

    def _say(self, text: str) -> None:
        with contextlib.suppress(Exception):  # a terminal that is gone
            self._tell(text)


def _memory(beat: dict[str, float]) -> list[tuple[str, float]]:
    names = {"active": "of MLX", "peak": "of MLX at most", "cache": "kept by MLX", "rss": "of the process"}
    names |= {"available": "left on this machine", "total": "in all", "gpu": "of the GPU in all"}
    return [(told, beat[name]) for name, told in names.items() if beat.get(name)]


def _all_stacks() -> str:
    """What every other thread of Python is doing, with its name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames.items()
    )


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> duration(0.251), duration(31.4), duration(125), duration(7500)
    ('0.25 s', '31 s', '2 min 05 s', '2 h 05 min')
    """
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
