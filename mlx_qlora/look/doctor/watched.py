"""Work in a process of its own, which may crash or hang: what it said, phase by phase, and how it ended."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

Message = dict[str, Any]
_NEWS_S = 15.0  # after so much silence one hears that it still works
_GIVEN_UP_S = 900.0


@dataclass(frozen=True)
class Ended:
    """How a process ended, in words; empty when it ended well. `last_words` is what it left on stderr."""

    how: str
    last_words: str
    signal: str = ""


class Watched:
    """Runs `python -m MODULE ARGUMENTS` and iterates over the JSON lines that it prints; `ended` is known afterwards."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        still: Callable[[float], None] = lambda _: None,
        given_up_s: float = _GIVEN_UP_S,
    ):
        self._command = [sys.executable, "-X", "faulthandler", "-m", module, *arguments]
        self._still, self._given_up_s = still, given_up_s
        self.ended = Ended("", "")

    def __iter__(self) -> Iterator[Message]:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=_environment()
            )
            hung = False
            try:
                lines = _lines(process)
                while True:
                    message = self._next(lines)
                    if message is None:
                        break
                    yield message
            except TimeoutError:
                hung = True
            finally:
                if hung or sys.exc_info()[0]:  # or whoever listened went away: leave no process behind
                    process.kill()
                code = process.wait()
                log.seek(0)
                self.ended = _ended(code, log.read(), self._given_up_s if hung else None)

    def _next(self, lines: queue.Queue[bytes | None]) -> Message | None:
        silent = 0.0
        while True:
            try:
                line = lines.get(timeout=min(_NEWS_S, self._given_up_s))
            except queue.Empty:
                silent += min(_NEWS_S, self._given_up_s)
                if silent >= self._given_up_s:
                    raise TimeoutError from None
                self._still(silent)
                continue
            if line is None:
                return None
            try:
                message = json.loads(line)
            except ValueError:
                continue  # some library prints to stdout
            if isinstance(message, dict):
                return message


def _environment() -> dict[str, str]:
    """The same, but never to the network, and without progress bars of others.

    `python -m` would look for modules in the current folder first; where this process does not, a file random.py or
    tokenizers.py there shall not break the other one either (from Python 3.11 on).
    """
    more = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not {"", os.getcwd()} & set(sys.path):
        more["PYTHONSAFEPATH"] = "1"
    return {**os.environ, **more}


def _lines(process: subprocess.Popen[bytes]) -> queue.Queue[bytes | None]:
    lines: queue.Queue[bytes | None] = queue.Queue()
    source: IO[bytes] | None = process.stdout
    assert source is not None

    def read() -> None:
        with source:
            for line in source:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _ended(code: int, log: str, hung_s: float | None) -> Ended:
    words = log.strip()[-8000:]
    if hung_s is not None:
        return Ended(f"gave no sign of life for {hung_s:.0f} s", words, "hung")
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return Ended(f"died with {name}", words, name)
    return Ended(f"ended with code {code}" if code else "", words)
