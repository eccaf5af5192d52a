"""A child process that is looked after: started, sent signals, watched for signs of life.

The child gets a process group of its own. In the group of its parent it would get Ctrl-C from the terminal and once more
from the parent, and no parent can tell on every system whether a SIGINT came from a terminal (to both) or from
`kill -INT` (to itself only); a run takes the second one for "stop at once, without saving". So the terminal speaks to the
parent alone, and the parent passes on each signal once. What a background group loses is given back by hand: Ctrl-Z stops
the child and then the parent, `fg` and `bg` wake both, and SIGTTIN and SIGTTOU are ignored by the child, so that it
writes to the terminal even under `stty tostop`; reading from the terminal gives it an error instead of a stop.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Somebody wants the run to end: a child that dies of one of these is not started again.
STOPS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
_CAUGHT = (*STOPS, signal.SIGUSR1, signal.SIGTSTP)
# A child begins with these ignored. SIGUSR1 would kill it while Python is still starting, before anybody listens.
_IGNORED_BY_CHILD = (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1)
_TWICE_S = 0.5  # the same signal again within this time is the same wish: `timeout` sends to the process and to its group


@dataclass(frozen=True)
class Standing:
    """What a run has last said about itself."""

    pid: int
    phase: str
    update: int
    budget: int  # positions at once; 0: not known
    progressed_at: float  # wall clock of the last progress
    beat_at: float  # wall clock of the last heartbeat; 0: there is none
    limit_s: float  # the longest that the phase should take; 0: nobody knows
    memory_short: bool
    memory_plenty: bool = False  # most of it was left at the last heartbeat


@dataclass(frozen=True)
class Patience:
    """How long the parent waits for what, in seconds."""

    grace_s: float = 30.0  # without progress, beyond the run's own limit
    beat_s: float = 60.0  # without heartbeat, while there is no progress either
    abort_s: float = 10.0  # for the end after SIGABRT, which leaves the stacks of all threads
    pause_s: float = 60.0  # before a restart, at most: 1, 2, 4 ...
    tick_s: float = 0.2  # between two looks at the child


class Child:
    """A process, and its exit code once it has one (minus the signal that it died of)."""

    def __init__(self, command: Sequence[str]):
        with _ignored(*_IGNORED_BY_CHILD):
            # Not `subprocess`: before Python 3.11 a group of its own takes code between fork and exec, which is not
            # safe after Metal or a BLAS have started threads. SIGPIPE and SIGXFSZ are what Python itself ignores.
            self.pid = os.posix_spawnp(
                command[0], list(command), os.environ, setpgroup=0, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
            )
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def send(self, number: int) -> None:
        """Only to a child that was not reaped yet: afterwards the number may belong to somebody else."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """With all that it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


class Watch:
    """For how long a child has shown no sign of life.

    What counts is time in which this process was awake and saw nothing change. The clocks of the record only have to
    differ from what they were: a laptop that slept, or a clock that was set, is no hang.
    """

    def __init__(self, patience: Patience, now: float):
        self._patience = patience
        self._looked = now
        self._progress: tuple[object, ...] = ()
        self._beat = 0.0
        self._still = self._silent = 0.0

    def look(self, standing: Standing | None, now: float) -> str | None:
        """Why the child is taken for hung, or None. Of a child that has said nothing yet, nothing is known."""
        awake = min(now - self._looked, 5 * self._patience.tick_s)
        self._looked = now
        if standing is None:
            return None
        progress = (standing.progressed_at, standing.phase, standing.update)
        self._still = self._still + awake if progress == self._progress else 0.0
        self._silent = self._silent + awake if standing.beat_at == self._beat else 0.0
        self._progress, self._beat = progress, standing.beat_at
        if standing.limit_s > 0 and self._still > standing.limit_s + self._patience.grace_s:
            return f"no progress for {self._still:.0f} s"
        if standing.beat_at > 0 and min(self._still, self._silent) > self._patience.beat_s:
            return f"no sign of life for {self._silent:.0f} s"
        return None


@contextmanager
def caught() -> Iterator[deque[int]]:
    """Inside, the signals that are meant for the run wait in the deque instead of ending this process.

    What was ignored when this process began stays ignored, by the child too: `nohup` means that.
    """
    waiting: deque[int] = deque()
    kept: dict[int, float] = {}

    def keep(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - kept.get(number, -_TWICE_S) >= _TWICE_S:
            waiting.append(number)
            kept[number] = now

    handlers: dict[signal.Signals, object] = {number: keep for number in _CAUGHT if signal.getsignal(number) != signal.SIG_IGN}
    handlers[signal.SIGCHLD] = signal.SIG_DFL  # whoever ignores it, or was started so, never learns how a child died
    with _handled(handlers):
        yield waiting


def suspend(child: Child | None) -> None:
    """What Ctrl-Z means: the child stops, this process stops; when it is woken, the child is."""
    if child:
        child.send(signal.SIGTSTP)
    os.kill(os.getpid(), signal.SIGSTOP)
    if child:
        child.send(signal.SIGCONT)


@contextmanager
def _ignored(*numbers: signal.Signals) -> Iterator[None]:
    with _handled(dict.fromkeys(numbers, signal.SIG_IGN)):
        yield


@contextmanager
def _handled(handlers: dict[signal.Signals, object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread; elsewhere nothing changes
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
