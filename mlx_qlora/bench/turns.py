"""A contestant's end of the pipe: it says that it is ready, works when it is told to, and stops when it is told to.

One JSON object a line. The race sends {"updates": n} or {"save": folder}; a contestant answers {"ready": {...}},
{"updates": [...], "peak_gb": x} and {"saved": folder}.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, TypedDict


class Work(TypedDict):
    """What a batch of ours makes a model multiply."""

    positions: int
    places: int  # where the head runs
    attention: Sequence[Sequence[int]]  # [rows, queries, keys] of each call
    kept: bool  # what the layers below the adapters give is not computed


class Finished(BaseException):
    """The race is over for this contestant. A BaseException, so that no trainer takes it for a failed update."""

    def __init__(self, folder: str):
        self.folder = folder


class Turns:
    """`ready`, then `done` after each update. Both return when the next update is wanted; the clock runs in between."""

    def __init__(self, commands: IO[str], answers: IO[str], reset_peak: Callable[[], None], peak_gb: Callable[[], float]):
        self._commands, self._answers = commands, answers
        self._reset_peak, self._peak_gb = reset_peak, peak_gb
        self._left = 0
        self._made: list[dict[str, Any]] = []
        self._since = 0.0
        self.work: list[Any] = []  # what the race sends along: for `floor`, the shapes of the updates to come

    def ready(self, **facts: Any) -> None:
        """All is loaded. The peak of memory counts from here, with the weights that are there already."""
        self._reset_peak()
        self.send({"ready": facts})
        self._wait()

    def done(self, **facts: Any) -> None:
        """An update is made and computed: its `loss`, `supervised` tokens, computed `positions`."""
        now = time.perf_counter()
        self._made.append({"seconds": now - self._since, **facts})
        self._left -= 1
        if self._left == 0:
            self.send({"updates": self._made, "peak_gb": self._peak_gb()})
            self._made = []
            self._wait()
        else:
            self._since = time.perf_counter()

    def restart(self) -> None:
        """The clock from here: what came before was no work."""
        self._since = time.perf_counter()

    def send(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def _wait(self) -> None:
        line = self._commands.readline()
        if not line:
            raise SystemExit(0)  # the race is gone
        command = json.loads(line)
        if "save" in command:
            raise Finished(command["save"])
        self._left, self.work = command["updates"], command.get("work", [])
        self._since = time.perf_counter()
