"""training_metrics.*: the only writer and the only reader of a run's figures."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_qlora.records import EvalReport, StepReport
from mlx_qlora.run.folder import write_atomically

NAME = "training_metrics"
COLUMNS = (
    "step", "epoch", "loss", "val_loss", "train_eval_loss", "gap", "learning_rate", "grad_norm", "tokens",
    "supervised_tokens", "positions", "tokens_per_second", "peak_memory_gb", "elapsed_s", "skipped_updates",
)  # fmt: skip

Line = dict[str, Any]


class MetricsWriter:
    """A line per update into .jsonl as it happens; .json (an array) and .csv are made anew at each validation.

    An update's line is written when the next one comes or the run ends, so that it can hold its validation too.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._lines: list[Line] = []
        self._waiting: Line | None = None
        self._file = (folder / f"{NAME}.jsonl").open("w", encoding="utf-8")

    def step(self, report: StepReport) -> None:
        self._write_waiting()
        line = asdict(report)
        line |= line.pop("metrics")
        self._waiting = {name: _plain(value) for name, value in line.items()}

    def validation(self, report: EvalReport) -> None:
        assert self._waiting is not None, "a validation follows an update"
        figures = {"val_loss": report.val_loss, "train_eval_loss": report.train_eval_loss, "gap": report.gap}
        self._waiting |= {name: _plain(value) for name, value in figures.items()}
        self._write_waiting()
        self._write_copies()

    def close(self) -> None:
        self._write_waiting()
        self._file.close()
        self._write_copies()

    def _write_waiting(self) -> None:
        if self._waiting is not None:
            ordered = {name: self._waiting[name] for name in COLUMNS if name in self._waiting}
            self._lines.append(ordered | self._waiting)
            self._file.write(json.dumps(self._lines[-1]) + "\n")
            self._file.flush()
            self._waiting = None

    def _write_copies(self) -> None:
        write_atomically(self._folder / f"{NAME}.json", "[\n" + ",\n".join(map(json.dumps, self._lines)) + "\n]\n")
        more = [name for line in self._lines for name in line if name not in COLUMNS]
        table = io.StringIO()
        writer = csv.DictWriter(table, [*COLUMNS, *dict.fromkeys(more)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._lines)
        write_atomically(self._folder / f"{NAME}.csv", table.getvalue())


def read_metrics(folder: Path) -> list[Line]:
    """The lines of a run, finished or not; a last line that is still being written is left out."""
    text = (folder / f"{NAME}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _plain(value: Any) -> Any:
    """JSON has no NaN; what is not finite is written as a text that float() reads: 'nan', 'inf'."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
