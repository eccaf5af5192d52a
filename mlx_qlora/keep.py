"""Saves a run while it goes on, beside the next updates, and takes it back to where it was."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers

from mlx_qlora.model.activations import KeptTrunk
from mlx_qlora.records import EvalReport
from mlx_qlora.resume import Arrays, Standing, to_keep
from mlx_qlora.run import checkpoint, disk
from mlx_qlora.run import folder as run_folder
from mlx_qlora.run.checkpoint import Checkpoint, CheckpointConfig
from mlx_qlora.run.metrics import MetricsWriter, copies


class Keeper:
    """Writes checkpoints, the best adapters and training_state.json of one run.

    What can't be written is said and tried again the next time; training goes on meanwhile. What a run computes never
    depends on when it is saved.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        facts: Mapping[str, Any],  # what a checkpoint is compared by when a run goes on: settings, digests, versions
        adapter_config: Mapping[str, Any],
        metrics: MetricsWriter,
        trunk: KeptTrunk | None,
        tell: Callable[[str], None],
    ):
        self.folder, self.config, self.tell = folder, config, tell
        self._facts, self._adapter_config, self._metrics, self._trunk = facts, adapter_config, metrics, trunk
        self._saver = checkpoint.Saver()
        self._saved_at = time.monotonic()
        self._last: tuple[int, int] | None = None  # (updates, batches) of what is being written, or was
        self._written: Path | None = None
        self._back_to: Path | None = None  # the newest checkpoint of the schedule, which stays
        self._best_written: Arrays | None = None
        self.problem = ""

    @property
    def newest(self) -> Path | None:
        """The last checkpoint that was written in full."""
        return self._written

    def goes_on(self, found: Checkpoint) -> None:
        """The run goes on from this one. What lies in adapters/ may be newer, so it is written once more."""
        self._written, self._last = found.folder, checkpoint.place(found.folder)[:2]
        back_to, _ = checkpoint.newest(self.folder, _scheduled)
        self._back_to = back_to.folder if back_to else None

    def scheduled(self, step: int, evaluation: EvalReport | None) -> bool:
        """Whether a checkpoint belongs after this update, whenever the run was begun or interrupted."""
        return step % self.config.save_every == 0 if self.config.save_every else evaluation is not None

    def overdue(self) -> bool:
        """Whether the clock wants one."""
        minutes = self.config.save_minutes
        return minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes

    def save(self, standing: Standing, model: nn.Module, optimizer: mlx.optimizers.Optimizer, scheduled: bool) -> None:
        """Begin to write a checkpoint; the one before is waited for."""
        self.wait()
        place = standing.state.step, standing.window.done if standing.window else 0
        if place == self._last and self._written is not None and not scheduled:
            return
        try:
            if self._trunk:
                self._trunk.kept.flush()  # what later updates would find there, they find there after a power cut too
            position = self._metrics.settle()
        except OSError as error:
            self._failed("a checkpoint", error)
            return
        state, arrays = to_keep(standing, model, optimizer)
        mx.eval(arrays)
        state |= {**self._facts, "metrics": position, "scheduled": scheduled}
        name = checkpoint.name_of(standing.epoch, *place)
        now = self._now(standing, "training")
        best, best_step, lines = standing.best_adapters, standing.best_step, self._metrics.lines
        self._last, self._saved_at = place, time.monotonic()

        def write() -> None:
            self._write_best(best)
            copies(self.folder, lines)
            self._written = checkpoint.save(self.folder, name, state, arrays)
            self._back_to = self._written if scheduled else self._back_to
            checkpoint.rotate(self.folder, self.config.keep_checkpoints, best_step, self._back_to)
            disk.write_json(self.folder / "training_state.json", now | {"checkpoint": self._written.name}, flushed=False)

        self._saver.start(write)

    def save_best(self, standing: Standing) -> None:
        """Begin to write the best adapters alone."""
        self.wait()
        best = standing.best_adapters
        self._saver.start(lambda: self._write_best(best))

    def _write_best(self, best: Arrays | None) -> None:
        if best is not None and best is not self._best_written:
            run_folder.save_adapters(self.folder, best, self._adapter_config)
            self._best_written = best

    def wait(self) -> None:
        """Wait for what is being written."""
        try:
            self._saver.wait()
            self.problem = ""
        except OSError as error:
            self._last = None
            self._failed("a checkpoint", error)

    def _failed(self, what: str, error: OSError) -> None:
        self.problem = f"{what} could not be written: {error.strerror or error}"
        there = f"the last whole one is {self._written.name}" if self._written else "there is none yet"
        self.tell(f"WARNING: {self.problem}; {there}. Training goes on, and it is tried again.")

    def last_good(self) -> Checkpoint | None:
        """The newest checkpoint of the schedule: the same one however often the run was interrupted."""
        self.wait()
        found, problems = checkpoint.newest(self.folder, _scheduled)
        for problem in problems:
            self.tell(problem)
        return found

    def _now(self, standing: Standing, what: str) -> dict[str, Any]:
        best = standing.best
        return {
            "state": what,
            "step": standing.state.step,
            "epoch": standing.epoch,
            "best": {"step": best[0].step, "val_loss": best[0].val_loss} if best else None,
            "stale": standing.monitor.stale,
            "patience": standing.monitor.patience,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "at": time.time(),
        }

    def end(self, standing: Standing, how: str) -> None:
        """All is written that will be; says so in training_state.json."""
        self.wait()
        self._saver.close()
        now = self._now(standing, how) | {"checkpoint": self._written.name if self._written else None}
        disk.write_json(self.folder / "training_state.json", now, flushed=False)


def _scheduled(found: Checkpoint) -> bool:
    return bool(found.state["scheduled"])
