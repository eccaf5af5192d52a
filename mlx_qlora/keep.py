"""Saves a run while it goes on, beside the next updates, and takes it back to where it was."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers

from mlx_qlora.model.activations import KeptTrunk
from mlx_qlora.model.trained import Trained
from mlx_qlora.records import EvalReport
from mlx_qlora.resume import Arrays, Standing, to_keep
from mlx_qlora.run import checkpoint, disk
from mlx_qlora.run import folder as run_folder
from mlx_qlora.run.checkpoint import Checkpoint, CheckpointConfig
from mlx_qlora.run.metrics import MetricsWriter, copies


class Keeper:
    """Writes checkpoints, the best that was trained and training_state.json of one run.

    What can't be written is said and tried again the next time; training goes on meanwhile. What a run computes never
    depends on when it is saved.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        facts: Mapping[str, Any],  # what a checkpoint is compared by when a run goes on: settings, digests, versions
        trained: Trained,
        metrics: MetricsWriter,
        trunk: KeptTrunk | None,
        tell: Callable[[str], None],
    ):
        self.folder, self.config, self.tell = folder, config, tell
        self._facts, self._trained, self._metrics, self._trunk = facts, trained, metrics, trunk
        self._saver = checkpoint.Saver()
        self._saved_at = time.monotonic()
        self._last: tuple[int, int] | None = None  # (updates, batches) of what is being written, or was
        self._written: Path | None = None
        self._back_to: list[Path] = []  # the newest that a run could go back to: they stay
        self._best_written: Arrays | None = None
        self._scheduled = False  # whether the last one belongs to the schedule
        self._over = False
        self._settings = ""
        self.problem = ""  # why the last one could not be written; empty if it was

    @property
    def newest(self) -> Path | None:
        """The last checkpoint that was written in full."""
        return self._written

    def goes_on(self, found: Checkpoint, settings: str) -> None:
        """The run goes on from this one. What others get may be newer there, so it is written once more; what was
        being written or taken away when the run was killed goes."""
        checkpoint.sweep(self.folder)
        self._settings = settings  # config.yaml agrees with the newest checkpoint, or going on would be refused
        self._written, self._last = found.folder, checkpoint.place(found.folder)[:2]
        self._back_to = [each.folder for each in checkpoint.whole(self.folder) if _good(each)][:_BACK_TO]

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
        self._scheduled = scheduled
        place = standing.state.step, standing.window.done if standing.window else 0
        if place == self._last and self._written is not None and not scheduled:
            return
        self._saved_at = time.monotonic()
        try:
            if self._trunk:
                self._trunk.kept.flush()  # what later updates would find there, they find there after a power cut too
            position = self._metrics.settle()
        except OSError as error:
            self._failed("a checkpoint", error)
            return
        state, arrays = to_keep(standing, self._trained, model, optimizer)
        mx.eval(arrays)
        state |= {**self._facts, "metrics": position, "scheduled": scheduled}
        name = checkpoint.name_of(standing.epoch, *place)
        now = self._now(standing, "training")
        write_best, best_step, lines = self._best(standing), standing.best_step, self._metrics.lines
        self._last = place

        def write() -> None:
            write_best()
            self._written = checkpoint.save(self.folder, name, state, arrays)
            if self._settings:
                disk.write_atomically(self.folder / "config.yaml", self._settings)
            if scheduled and state["healthy"]:
                self._back_to = [self._written, *self._back_to][:_BACK_TO]
            checkpoint.rotate(self.folder, self.config.keep_checkpoints, best_step, self._stay)
            with suppress(OSError):  # for people and other tools; they come again with the next one, and at the end
                copies(self.folder, lines)
                disk.write_json(self.folder / "training_state.json", now | {"checkpoint": self._written.name}, flushed=False)

        self._saver.start(write)

    def save_best(self, standing: Standing) -> None:
        """Begin to write the best that was trained alone."""
        self.wait()
        self._saver.start(self._best(standing))

    def _best(self, standing: Standing) -> Callable[[], None]:
        """What writes the best, if it is not written yet. All that MLX has to do for it is done now: the other thread only
        writes."""
        best = standing.best_arrays
        if best is None or best is self._best_written:
            return lambda: None
        what = self._trained.delivered(best)

        def write() -> None:
            run_folder.deliver(self.folder, what)
            self._best_written = best

        return write

    def wait(self) -> None:
        """Wait for what is being written."""
        try:
            if self._saver.wait():
                self.problem = ""
        except (OSError, MemoryError) as error:  # a copy of the arrays is made for it
            self._last = None
            self._failed("a checkpoint", error)

    def save_again(self, standing: Standing, model: nn.Module, optimizer: mlx.optimizers.Optimizer) -> None:
        """At the end of a run: once more, if the last one could not be written. Raises if it still can't."""
        self.wait()
        self._over = True
        if self.problem:
            self.save(standing, model, optimizer, self._scheduled)
            self.wait()
        if self.problem:
            raise OSError(f"{self.problem}; {self._last_whole}")

    def _failed(self, what: str, error: OSError | MemoryError) -> None:
        why = getattr(error, "strerror", None) or str(error) or "memory ended"
        self.problem = f"{what} could not be written: {why}"
        self._saved_at = time.monotonic() - 60 * (self.config.save_minutes - 1)  # tried again in a minute
        if not self._over:
            self.tell(f"WARNING: {self.problem}; {self._last_whole}. It is tried again.")

    @property
    def _stay(self) -> list[Path]:
        """Checkpoints that are not rotated away, however old: the last one, and those that the run may go back to."""
        return [*([self._written] if self._written else []), *self._back_to]

    @property
    def _last_whole(self) -> str:
        return f"the last whole one is {self._written.name}" if self._written else "there is none yet"

    def go_back(self, not_to: int | None) -> Checkpoint | None:
        """The newest good checkpoint; where there is another, not that of update `not_to`, from which the run went wrong
        before. Those after it are taken away: the run has another future now."""
        self.wait()
        good = [each for each in checkpoint.whole(self.folder) if _good(each)]
        found = next((each for each in good if _step(each.folder) != not_to), good[0] if good else None)
        if found is None:
            return None
        for path in checkpoint.there(self.folder):
            if _step(path) > _step(found.folder):
                disk.remove_folder(path)
        self.goes_on(found, self._settings)
        return found

    def _now(self, standing: Standing, what: str) -> dict[str, Any]:
        best = standing.best
        return {
            "state": what,
            "step": standing.state.step,
            "planned_steps": self._facts["planned_steps"],
            "epoch": standing.epoch,
            "best": {"step": best[0].step, "val_loss": best[0].val_loss} if best else None,
            "stale": standing.monitor.stale,
            "patience": standing.monitor.patience,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "at": time.time(),
        }

    def keep_best(self, standing: Standing) -> None:
        """The best, if its last writing failed; without a best, nothing."""
        self._best(standing)()

    def end(self, standing: Standing, how: str) -> None:
        """All is written that will be; says so in training_state.json."""
        checkpoint.rotate(self.folder, self.config.keep_checkpoints, standing.best_step, self._stay)
        checkpoint.sweep(self.folder)
        now = self._now(standing, how) | {"checkpoint": self._written.name if self._written else None}
        disk.write_json(self.folder / "training_state.json", now, flushed=False)

    def close(self) -> None:
        self._saver.close()


_BACK_TO = 2


def _good(found: Checkpoint) -> bool:
    """Whether a run may go back to it: it belongs to the schedule, so that it is there however often the run was
    interrupted, and its numbers were finite."""
    return bool(found.state.get("scheduled") and found.state.get("healthy"))


def _step(path: Path) -> int:
    return checkpoint.place(path)[0]
