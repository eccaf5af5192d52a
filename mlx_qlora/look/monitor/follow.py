"""A run's folder looked at again and again, while somebody else writes into it."""

from __future__ import annotations

import json
import os
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_qlora.files import json_object, yaml_object
from mlx_qlora.look.history import History, dotted, number
from mlx_qlora.run.metrics import NAME

LAST = 500  # updates whose lines are kept whole
KEPT = ("loss", "ce", "tokens", "peak_memory_gb", "elapsed_s")  # figures of all updates: 8 bytes each, where a line takes a kB

Line = dict[str, Any]


class Follower:
    """Gives the `History` of a folder as it is now; of training_metrics.jsonl it reads only what is new.

    Its `lines` are those with a validation and the last ones; `columns` has the figures in `KEPT` of all of them. Where
    there is no run yet the history is empty. A file that was replaced, or cut and written on, is read from its beginning.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self._small: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {}
        self._forget()

    def look(self) -> History:
        self._read_on()
        first = self._recent[0]["step"] if self._recent else 0
        steps = np.array(self._steps)
        return History(
            folder=self.folder,
            settings=dotted(self._object("config.yaml", yaml_object)),
            lines=(*(line for line in self._validated if line["step"] < first), *self._recent),
            state=self._object("training_state.json", json_object),
            summary=self._object("training_summary.json", json_object),
            account=self._object("data_account.json", json_object),
            columns={name: (steps, np.array(values)) for name, values in self._columns.items()},
        )

    def _forget(self) -> None:
        self._inode, self._end, self._last_raw = 0, 0, b""
        self._steps = array("q")
        self._columns = {name: array("d") for name in KEPT}
        self._validated: list[Line] = []
        self._recent: deque[Line] = deque(maxlen=LAST)

    def _read_on(self) -> None:
        try:
            with (self.folder / f"{NAME}.jsonl").open("rb") as file:
                if not self._continues(file):
                    self._forget()
                    self._inode = os.fstat(file.fileno()).st_ino
                file.seek(self._end)
                for raw in file:
                    if not raw.endswith(b"\n"):
                        break  # it is being written
                    self._end += len(raw)
                    self._last_raw = raw
                    self._take(raw)
        except OSError:
            self._forget()

    def _continues(self, file: BinaryIO) -> bool:
        """Whether it is the file that was read before, and what was read last still stands in it: a run that is resumed cuts
        its file and writes on, and may be past the old end when it is looked at."""
        if os.fstat(file.fileno()).st_ino != self._inode:
            return False
        file.seek(self._end - len(self._last_raw))
        return file.read(len(self._last_raw)) == self._last_raw

    def _take(self, raw: bytes) -> None:
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            return
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            return
        step = line["step"]
        while self._steps and self._steps[-1] >= step:  # the run went back to a checkpoint
            self._steps.pop()
            for values in self._columns.values():
                values.pop()
        for lines in (self._validated, self._recent):
            while lines and lines[-1]["step"] >= step:
                lines.pop()
        self._steps.append(step)
        for name, values in self._columns.items():
            value = line.get(name)
            values.append(value if type(value) is float else number(value))
        self._recent.append(line)
        if "val_loss" in line:
            self._validated.append(line)

    def _object(self, name: str, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """A small file, read again only where it is another one."""
        path = self.folder / name
        try:
            stat = path.stat()
        except OSError:
            return {}
        now = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if name not in self._small or self._small[name][0] != now:
            self._small[name] = (now, read(path))
        return self._small[name][1]
