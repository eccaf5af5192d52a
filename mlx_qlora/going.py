"""A run that goes on: what changes meanwhile, and what it writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import PurePath
from typing import Any

import mlx.core as mx

from mlx_qlora.build import Ready
from mlx_qlora.config import flat
from mlx_qlora.data.exposure import seen
from mlx_qlora.data.layout import lay_out
from mlx_qlora.engine.guard import Guard, GuardConfig
from mlx_qlora.engine.memory import cache_limit
from mlx_qlora.engine.room import Room
from mlx_qlora.engine.steps import Engine, Enter, computing_in
from mlx_qlora.engine.stopping import EarlyStoppingMonitor
from mlx_qlora.errors import NonFiniteError, RunFolderError
from mlx_qlora.keep import Keeper
from mlx_qlora.look.console import Console
from mlx_qlora.look.gap import GapAnalysis, analyse
from mlx_qlora.look.measure import Measured, measure
from mlx_qlora.look.samples import Prompt, SampleConfig, Samples, prompts_of
from mlx_qlora.look.samples import write as write_samples
from mlx_qlora.look.suspects import MOST, suspects
from mlx_qlora.look.teaching import outcome
from mlx_qlora.look.tracking.tools import Opening
from mlx_qlora.look.tracking.trackers import TrackerConfig, Trackers
from mlx_qlora.model import backend
from mlx_qlora.model.load import wired_memory
from mlx_qlora.model.trained import arrays_of
from mlx_qlora.records import Batch, EvalReport, Example, StepReport, Update
from mlx_qlora.resume import Standing, put_back, trained_otherwise, versions
from mlx_qlora.run import disk
from mlx_qlora.run import folder as run_folder
from mlx_qlora.run.checkpoint import Checkpoint, CheckpointConfig
from mlx_qlora.run.interrupt import Asked, listening
from mlx_qlora.run.metrics import MetricsWriter, copies

# How a run can end, as training_summary.json says it.
FINISHED, STOPPED, INTERRUPTED = "finished", "stopped early", "interrupted"
NOT_FINITE, FAILED = "not finite", "failed"


class Going:
    """A run that goes on: what changes meanwhile, and what it writes. Leaving it, however, leaves nothing unwritten."""

    def __init__(self, ready: Ready, console: Console, enter: Enter):
        config, guard = ready.config, Guard(ready.config.part(GuardConfig))
        self.ready, self.console, self.enter = ready, console, enter
        self.standing = Standing(
            monitor=EarlyStoppingMonitor(config.early_stopping.patience, config.early_stopping.min_delta), guard=guard
        )
        self.ended = FAILED  # until something better is known
        self.asked = Asked()
        self._stack = ExitStack()
        self._samples, self._prompts = Samples(ready.folder), list[Prompt]()
        self._sampling_s = dict[int, float]()  # by the update before
        self._engine = ready.engine()  # its optimizer is what a checkpoint gives back
        if ready.checkpoint:
            self._take_back(ready.checkpoint)
        self.room = Room(ready.layout().token_budget, self.standing.state.halvings, tell=console.halved)
        self.metrics = MetricsWriter(ready.folder, ready.checkpoint.state["metrics"] if ready.checkpoint else None)
        if self.metrics.problem:
            console.say(f"WARNING: {self.metrics.problem}")
        self.keeper = Keeper(
            ready.folder,
            config.part(CheckpointConfig),
            ready.facts,
            ready.trained,
            self.metrics,
            ready.kept,
            console.say,
        )
        if ready.checkpoint:
            self.keeper.goes_on(ready.checkpoint, ready.settings)
        self.trackers = self._trackers()

    def __enter__(self) -> Going:
        ready, console = self.ready, self.console
        (ready.folder / "training_summary.json").unlink(missing_ok=True)  # the run is not over
        mx.reset_peak_memory()
        ready.loaded.model.train()
        self._stack.enter_context(wired_memory(ready.loaded.model))
        self._stack.enter_context(cache_limit(ready.cache))
        console.trackers(self.trackers.begin())
        self.asked = self._stack.enter_context(
            listening(lambda: console.say("stopping after this update, and saving; once more: at once"))
        )
        console.begin(ready.total, self.standing.state)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        ready = self.ready
        if isinstance(error, KeyboardInterrupt):  # the second one
            self.ended = INTERRUPTED
        elif isinstance(error, NonFiniteError):
            self.ended = NOT_FINITE
        self.console.end_bar()
        try:
            if isinstance(error, Exception) and not isinstance(error, NonFiniteError):
                self._save_what_there_is()
            if unwritten := self._write_the_rest(over=error is None):
                said = f"output_dir: the run is over, and in {ready.folder} these could not be written:\n"
                said += "\n".join(f"  {what}: {why}" for what, why in unwritten.items())
                said += f"\nWhen there is room: mlx-qlora train --output-dir {ready.folder} --resume"
                if error is None:
                    raise RunFolderError(said)
                self.console.say(f"WARNING: {said}")
        finally:
            self.keeper.close()
            self.metrics.close()
            if ready.kept:
                self.console.kept(ready.kept.kept)
                ready.kept.kept.close()
            self._stack.close()
            self.trackers.end(self.ended, self.summary(), at_once=isinstance(error, KeyboardInterrupt))

    def _write_the_rest(self, over: bool) -> dict[str, str]:
        """All that is left to write; each part is tried twice, whatever became of the others. Gives what could not be
        written, and why."""
        ready, standing = self.ready, self.standing

        def checkpoint() -> None:
            if over:
                self.keeper.save_again(standing, ready.loaded.model, self._engine.optimizer)
            else:
                self.keeper.wait()

        def trained() -> None:
            if standing.best is None:  # nothing was validated, or nothing was finite: keep what there is
                run_folder.deliver(ready.folder, ready.trained.delivered(arrays_of(ready.loaded.model)))
            else:
                self.keeper.keep_best(standing)

        left: dict[str, Callable[[], None]] = {  # in this order: what comes later says what became of the earlier
            "the last checkpoint": checkpoint,
            f"{PurePath(ready.trained.file).parent}/": trained,
            "training_state.json": lambda: self.keeper.end(standing, self.ended),
            "training_metrics.jsonl": self.metrics.finish,
            "training_metrics.json and .csv": lambda: copies(ready.folder, self.metrics.lines),
            "training_summary.json": lambda: disk.write_json(ready.folder / "training_summary.json", self.summary()),
        }
        return {what: problem for what, write in left.items() if (problem := _problem(write) and _problem(write))}

    def _trackers(self) -> Trackers:
        """Whoever else is told the figures; they follow the metrics' lines by themselves."""
        ready, config, found = self.ready, self.ready.config.part(TrackerConfig), self.ready.checkpoint
        others = found is not None and trained_otherwise(found, ready.config)  # the updates from here on are others
        opening = Opening(ready.folder, config.tracker_project, flat(ready.facts["config"]), {})
        most = found.state["metrics"]["lines"] if found and others else None
        return Trackers(config.trackers, opening, self.metrics.since, most, self.console.say)

    def engine(self) -> Engine:
        """What makes the updates from where the run stands."""
        self._engine = replace(
            self._engine,
            room=self.room,
            enter=self.enter,
            asked=self.wants_saving,
        )
        return self._engine

    def updates(self) -> Iterator[Update]:
        return self.ready.updates(self.standing.state, self.room)

    def _take_back(self, found: Checkpoint) -> None:
        """Be where the checkpoint says."""
        self.standing.rate = found.state["rate"]
        self._engine = self.ready.engine(self.standing.rate)
        put_back(found, self.standing, self.ready.trained, self.ready.loaded.model, self._engine.optimizer)
        if trained_otherwise(found, self.ready.config):
            self.standing.window = None  # an update is of one kind
        if self.standing.state.halvings and self.ready.plan.layout.token_budget != found.state["computing"]["token_budget"]:
            self.standing.state = replace(self.standing.state, halvings=0)  # another budget was asked for since
        self._samples.back_to(self.standing.state.step)

    def stops_early(self) -> bool:
        return self.standing.monitor.should_stop

    def wants_saving(self) -> bool:
        """Whether somebody asked for a checkpoint, or the clock does."""
        return self.asked.save or self.keeper.overdue()

    def save(self, scheduled: bool) -> None:
        """Begin to write a checkpoint; training goes on meanwhile."""
        self.enter("save")
        self._keep(scheduled)

    def _keep(self, scheduled: bool) -> None:
        """The same, without a word to the recorder: after a failure, it says where that was."""
        if self.asked.save:
            self.console.say(f"saving after update {self.standing.state.step:,}, as was asked")
        self.asked.save = False
        # Memory may have ended since the last update: in the one that is half done, or in a validation.
        self.standing.state = replace(self.standing.state, halvings=self.room.halvings)
        self.keeper.save(self.standing, self.ready.loaded.model, self._engine.optimizer, scheduled)

    def _save_what_there_is(self) -> None:
        """After an error: the update that failed has changed nothing. The device may be what failed, so this may too."""
        try:
            self._keep(scheduled=False)
        except Exception as problem:
            self.console.say(f"WARNING: nothing could be saved after the error: {type(problem).__name__}: {problem}")

    def evaluate(self, report: StepReport) -> EvalReport:
        """The losses on validation data and on the fixed sample, by the same function."""
        ready, standing = self.ready, self.standing
        val, train = (self._measured(which) for which in (ready.valid, ready.train_sample))
        standing.monitor = standing.monitor.update(val.mean)
        best, stale = standing.monitor.is_extreme, standing.monitor.stale
        evaluation = EvalReport(report.step, val.mean, train.mean, best, stale, val.error, train.error)
        standing.validations.append((evaluation, report.epoch))
        if best:
            standing.best_arrays = arrays_of(ready.loaded.model)
        return evaluation

    def sample(self, evaluation: EvalReport | None) -> None:
        """Let the model write, where it is time for that. It is for a person to read: what goes wrong in it is said."""
        ready, config, step = self.ready, self.ready.config.part(SampleConfig), self.standing.state.step
        of_text = ready.corpus.windows is not None
        if not config.due(step, ready.total, validated=evaluation is not None and of_text):
            return
        self.enter("sample")
        begun = time.perf_counter()
        try:
            self._prompts = self._prompts or prompts_of(config, ready.corpus, ready.valid)
            lines = write_samples(ready.loaded.model, ready.loaded.tokenizer, self._prompts, config, ready.config.seed, step)
            self._samples.add(lines)
        except Exception as problem:
            self.console.say(f"WARNING: update {step}: no samples: {type(problem).__name__}: {str(problem)[:200]}")
            return
        finally:
            self._sampling_s[step] = time.perf_counter() - begun
        self.console.samples(lines)

    def _measured(self, examples: Sequence[Example]) -> Measured:
        def of(halvings: int) -> Measured:
            batches = lay_out(examples, self.ready.layout(halvings))
            return measure(self.ready.loaded.model, self.ready.judge, self._seen(batches), examples)

        with computing_in(self.ready.loaded.model, self.ready.trained.computes_in):
            return self.room.within(of)

    def _seen(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches, start=1):
            self.enter("evaluate", part=number, parts=len(batches), positions=batch.computed)
            yield self.ready.kept.attach(batch) if self.ready.kept else batch

    def suspect(self, report: StepReport) -> None:
        """Say which update went wrong, and write down what it was made of."""
        ready, standing = self.ready, self.standing
        why = "its loss or gradient is not finite; skipped, nothing was changed"
        if report.finite:
            why = f"its loss {report.loss:.3f} is far above the usual {standing.guard.usual:.3f}; it was applied"
        again = f"_again{standing.rollbacks}" if standing.rollbacks else ""
        name = f"bad_updates/update_{report.step}{again}.json"
        self.console.say(f"update {report.step}: {why}{f'; see {name}' if standing.bad < MOST else ''}")
        if standing.bad >= MOST:
            return
        standing.bad += 1
        found = suspects(report, why, ready.loaded.tokenizer.decode, lambda example: self._measured([example]).mean)
        with suppress(OSError):  # it is for a person to look at; training does not depend on it
            (ready.folder / "bad_updates").mkdir(exist_ok=True)
            disk.write_json(ready.folder / name, found, flushed=False)
        self.enter("update")  # that is where it went wrong, should the run end here

    def goes_back(self, trouble: str) -> bool:
        """Take the run back to its last checkpoint with a lower learning rate, if that is wanted and there is one."""
        config, standing = self.ready.config, self.standing
        if config.on_nonfinite != "rollback" or standing.rollbacks >= config.max_rollbacks:
            return False
        found = self.keeper.go_back(not_to=standing.went_back_to)
        if found is None:
            return False
        rate, rollbacks = standing.rate * config.rollback_factor, standing.rollbacks + 1
        keep = standing.bad, standing.state.skipped_updates, standing.state.elapsed_s
        self._take_back(found)
        standing.bad = keep[0]
        standing.state = replace(standing.state, skipped_updates=keep[1], elapsed_s=keep[2], halvings=self.room.halvings)
        standing.rate, standing.rollbacks, standing.went_back_to = rate, rollbacks, standing.state.step
        standing.guard = standing.guard.calmed()
        optimizer = self.ready.engine(rate).optimizer
        optimizer.state = self._engine.optimizer.state
        self._engine = replace(self._engine, optimizer=optimizer)
        rate_now = self.ready.optim.learning_rate * rate
        self.console.went_back(trouble, standing.state.step, rate_now, rollbacks, config.max_rollbacks)
        return True

    def gap(self) -> GapAnalysis:
        """What the validations say so far; there has been one."""
        ready = self.ready
        tokens = ready.corpus.trained_tokens
        return analyse(self.standing.validations, flat(ready.config.plain()), ready.trained.trainable, tokens)

    def exposure(self) -> dict[str, Any]:
        """What was planned to be seen, and what really was."""
        ready, standing = self.ready, self.standing
        state, order = standing.state, ready.corpus.order
        rows = state.next.epoch * order.length + state.next.place  # whose last tokens were targets only
        if ready.corpus.train is None:  # a stream's bookmark counts what it has read ahead
            rows = state.step * ready.exposure.examples_per_update
        found = seen(ready.exposure, state.step, standing.tokens - rows, standing.supervised_tokens)
        return {"planned": ready.exposure.to_json(), **asdict(found)}

    def summary(self) -> dict[str, Any]:
        ready, standing = self.ready, self.standing
        state, best = standing.state, standing.best
        trained_s = state.elapsed_s - sum(took for step, took in self._sampling_s.items() if step < state.step)
        return {
            "ended": self.ended,
            "steps": state.step,
            "planned_steps": ready.total,
            "epoch": standing.epoch,
            "best": {**asdict(best[0]), "gap": best[0].gap, "epoch": best[1], **self._perplexity(best[0])} if best else None,
            "gap": asdict(self.gap()) if best else None,
            "tokens": standing.tokens,
            "supervised_tokens": standing.supervised_tokens,
            "exposure": self.exposure(),
            "tokens_per_second": standing.tokens / trained_s if trained_s > 0 else 0.0,
            "elapsed_s": state.elapsed_s,
            "peak_memory_gb": standing.peak_memory_gb,
            "skipped_updates": state.skipped_updates,
            "rollbacks": standing.rollbacks,
            "halvings": state.halvings,
            "model": ready.loaded.name,
            **({"teaching": outcome(self.metrics.lines)} if ready.teaching and standing.state.step else {}),
            "trainable_parameters": ready.trained.trainable,
            "total_parameters": ready.trained.total,
            "device": backend.describe(),
            "versions": versions(),
        }

    def _perplexity(self, report: EvalReport) -> dict[str, float]:
        return {"perplexity": report.perplexity} if self.ready.reads_text else {}


def _problem(write: Callable[[], None]) -> str:
    """Do it; says what the system had against it."""
    try:
        write()
    except OSError as problem:
        return problem.strerror or str(problem)
    return ""
