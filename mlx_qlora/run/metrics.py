"""training_metrics.*: the only writer and the only reader of a run's figures."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_qlora.records import EvalReport, StepReport
from mlx_qlora.run.disk import flush, flush_folder, write_all, write_atomically

NAME = "training_metrics"
COLUMNS = (
    "step", "epoch", "loss", "val_loss", "train_eval_loss", "gap", "val_loss_se", "train_eval_loss_se", "gap_se",
    "learning_rate", "grad_norm", "tokens", "supervised_tokens", "positions", "tokens_per_second", "peak_memory_gb",
    "elapsed_s", "skipped_updates",
)  # fmt: skip
VALIDATED = ("val_loss", "train_eval_loss", "gap", "val_loss_se", "train_eval_loss_se", "gap_se")
MEASURED = ("tokens_per_second", "peak_memory_gb", "elapsed_s")  # what differs between two runs that are the same

Line = dict[str, Any]


class MetricsWriter:
    """A line per update into .jsonl as it happens; .json (an array) and .csv are made by `copies`.

    An update's line is written when the next one comes, or at `settle`, so that it can hold its validation too. A disk
    that is full costs nothing: what could not be written is written with the next line; `problem` says so meanwhile.
    """

    def __init__(self, folder: Path, position: Mapping[str, Any] | None = None):
        """`position`: where to go on, as `settle` gave it; what was written after that is taken away."""
        self._lines: list[Line] = []
        self._waiting: Line | None = None
        self._unwritten = b""
        self._digest = hashlib.sha256()
        self.problem = ""
        path = folder / f"{NAME}.jsonl"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (0 if position else os.O_TRUNC), 0o666)
        flush_folder(folder)  # no checkpoint may be there without it
        self._end = 0
        if position:
            self._continue(position)

    def _continue(self, position: Mapping[str, Any]) -> None:
        raw = os.pread(self._file, position["bytes"], 0)
        if hashlib.sha256(raw).hexdigest() != position["sha256"]:
            whole = raw[: raw.rfind(b"\n") + 1]
            self.problem = (
                f"{NAME}.jsonl is not what it was when the checkpoint was saved; what can be read of it stays as it is"
            )
            raw = b"".join(line for line in whole.splitlines(keepends=True) if _read(line) is not None)
            os.pwrite(self._file, raw, 0)
        self._lines = [line for line in map(_read, raw.splitlines()) if line is not None]
        self._end = len(raw)
        self._digest.update(raw)
        os.ftruncate(self._file, self._end)

    def step(self, report: StepReport, **more: float) -> None:
        self._write_waiting()
        line = {name: getattr(report, name) for name in COLUMNS if hasattr(report, name)} | report.metrics | more
        self._waiting = {name: _plain(value) for name, value in line.items()}

    def validation(self, report: EvalReport) -> None:
        assert self._waiting is not None, "a validation follows an update"
        self._waiting |= {name: _plain(getattr(report, name)) for name in VALIDATED}
        self._write_waiting()

    def settle(self) -> dict[str, Any]:
        """Write what waits, flush it, and say where the file ends: what a checkpoint goes by."""
        self._write_waiting()
        if self._unwritten:
            raise OSError(f"{NAME}.jsonl can't be written: {self.problem}")
        try:
            flush(self._file)
        except OSError:  # the system may have thrown away what it could not write: all of it is written once more
            self._unwritten, self._end, self._digest = b"".join(map(_raw, self._lines)), 0, hashlib.sha256()
            raise
        return {"lines": len(self._lines), "bytes": self._end, "sha256": self._digest.hexdigest()}

    def finish(self) -> None:
        """Write what is left; raises if that can't be."""
        self._write_waiting()
        if self._unwritten:
            raise OSError(self.problem)

    def close(self) -> None:
        os.close(self._file)

    def _write_waiting(self) -> None:
        if self._waiting is not None:
            ordered = {name: self._waiting[name] for name in COLUMNS if name in self._waiting}
            self._lines.append(ordered | self._waiting)
            self._unwritten += _raw(self._lines[-1])
            self._waiting = None
        if not self._unwritten:
            return
        try:
            os.lseek(self._file, self._end, os.SEEK_SET)
            write_all(self._file, self._unwritten)
        except OSError as error:
            self.problem = error.strerror or str(error)
            with suppress(OSError):  # no half of a line stays
                os.ftruncate(self._file, self._end)
            return
        self._end += len(self._unwritten)
        self._digest.update(self._unwritten)
        self._unwritten, self.problem = b"", ""

    def since(self, number: int, most: int) -> list[Line]:
        """So many of the lines from this one on. Any thread may ask, while others are being written."""
        return self._lines[number : number + most]

    @property
    def lines(self) -> list[Line]:
        """What was written so far."""
        return list(self._lines)


def copies(folder: Path, lines: list[Line]) -> None:
    """.json and .csv of a run's lines, for other tools; made anew from them at any time, so they are not flushed."""
    write_atomically(folder / f"{NAME}.json", "[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n", flushed=False)
    more = [name for line in lines for name in line if name not in COLUMNS]
    table = io.StringIO()
    writer = csv.DictWriter(table, [*COLUMNS, *dict.fromkeys(more)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(folder / f"{NAME}.csv", table.getvalue(), flushed=False)


def read_metrics(folder: Path) -> list[Line]:
    """The lines of a run, finished or not; a last line that is still being written is left out."""
    text = (folder / f"{NAME}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _raw(line: Line) -> bytes:
    return (json.dumps(line) + "\n").encode()


def _read(raw: bytes) -> Line | None:
    with suppress(ValueError):
        line = json.loads(raw)
        return line if isinstance(line, dict) else None
    return None


def _plain(value: Any) -> Any:
    """JSON has no NaN; what is not finite is written as a text that float() reads: 'nan', 'inf'."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
