"""`--trace`: a line before and after each phase, and a picture of them all that Perfetto and Chrome can open."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.look.console import size
from mlx_qlora.run.recorder import OF_PARTS

NAME = "trace.json"
_OUTSIDE = ("load", "tokenise", "evaluate", "sample", "save")  # phases that are no part of an update
_PHASES, _UPDATES = 1, 2  # the rows of the picture


class Tracer:
    """Says what begins and what it took. The engine evaluates each phase before the next one begins, so that times and
    memory belong to the phase that they stand beside; that is slower than a run without a trace.

    `trace.json` in the folder is a list of events in Chrome's format, of which each is written out when it ends: what a
    killed run leaves is the same list without its end, which Perfetto (ui.perfetto.dev) opens too.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._say = say
        self._file = (folder / NAME).open("w", encoding="utf-8")
        self._start = time.perf_counter()
        self._phase = ""
        self._began = 0.0
        self._facts: dict[str, object] = {}
        self._update: tuple[object, object, float] | None = None  # its number and examples, and when it began
        self._peak = mx.get_peak_memory()
        self._first = True
        self._problem = ""
        for row, name in ((_PHASES, "phases"), (_UPDATES, "updates")):
            self._write({"name": "thread_name", "ph": "M", "tid": row, "args": {"name": name}})

    def enter(self, phase: str, **facts: object) -> None:
        """The phase before is over and this one begins."""
        self._leave()
        self._facts = {name: value for name, value in (self._facts | facts).items() if value is not None}
        self._began = time.perf_counter()
        self._phase = phase
        self._turn_update()
        shape = self._facts.get("shape", "") if phase in OF_PARTS else ""
        self._say(f"{self._where()}  {shape}".rstrip())

    def close(self) -> None:
        """End the phase that goes on, and the file."""
        if self._file.closed:
            return
        self._leave()
        self._end_update(time.perf_counter())
        with contextlib.suppress(OSError):
            self._file.write("\n]\n")
            self._file.close()

    def _leave(self) -> None:
        if not self._phase:
            return
        now, active, peak = time.perf_counter(), mx.get_active_memory(), mx.get_peak_memory()
        more = f" ({size(peak - self._peak)} more than before)" if peak > self._peak else ""
        self._say(f"{self._where()}  {now - self._began:.4f} s, {size(active)} in use, {size(peak)} at most{more}")
        memory = {"active_bytes": active, "peak_bytes": peak}
        self._span(self._phase, _PHASES, self._began, now, self._facts | memory)
        self._write({"name": "memory", "ph": "C", "ts": self._at(now), "args": {"active_bytes": active}})
        self._phase, self._peak = "", peak

    def _where(self) -> str:
        facts = self._facts
        update = f"update {facts['update']}" if "update" in facts else ""
        part = f" part {facts['part']}/{facts['parts']}" if self._phase in OF_PARTS and {"part", "parts"} <= set(facts) else ""
        return f"{update + part:<22} {self._phase:<10}"

    def _turn_update(self) -> None:
        """Updates have a row of their own in the picture, above what they consist of."""
        number = None if self._phase in _OUTSIDE else self._facts.get("update")
        if self._update and number != self._update[0]:
            self._end_update(self._began)
        if number is not None and self._update is None:
            self._update = (number, self._facts.get("ids"), self._began)

    def _end_update(self, now: float) -> None:
        if self._update:
            number, ids, began = self._update
            self._span(f"update {number}", _UPDATES, began, now, {"ids": ids})
            self._update = None

    def _span(self, name: str, row: int, began: float, ended: float, facts: dict[str, Any]) -> None:
        duration = round((ended - began) * 1e6, 1)
        self._write({"name": name, "ph": "X", "tid": row, "ts": self._at(began), "dur": duration, "args": facts})

    def _at(self, moment: float) -> float:
        return round((moment - self._start) * 1e6, 1)

    def _write(self, event: dict[str, Any]) -> None:
        if self._problem:
            return
        text = json.dumps(event | {"pid": os.getpid()}, default=str)
        try:
            self._file.write(f"{'[' if self._first else ','}\n{text}")
            self._file.flush()  # a kill takes only what goes on
        except OSError as error:  # a full disk: the run is worth more than its picture
            self._problem = str(error)
            self._say(f"{NAME} ends here: {error}")
        self._first = False
