"""The whole of a training run, read top to bottom: the one place that sees every part."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.config import RunConfig, parse
from mlx_qlora.data.audit import audit
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.layout import BatchConfig, Layout, lay_out, smaller
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.engine.guard import Guard, GuardConfig
from mlx_qlora.engine.memory import MemoryConfig, cache_limit
from mlx_qlora.engine.optim import OptimConfig, make_optimizer
from mlx_qlora.engine.room import Room
from mlx_qlora.engine.steps import Engine, Enter, Objective, steps
from mlx_qlora.engine.stopping import EarlyStoppingMonitor
from mlx_qlora.errors import ConfigError, MlxQloraError, NonFiniteError, ResumeError
from mlx_qlora.keep import Keeper
from mlx_qlora.look.console import Console, answered
from mlx_qlora.look.evaluate import ask_both, mean_loss, score
from mlx_qlora.look.gap import analyse
from mlx_qlora.look.suspects import MOST, suspects
from mlx_qlora.look.trace import Tracer
from mlx_qlora.model import backend, lora
from mlx_qlora.model.activations import KeptTrunk, TrunkCacheConfig, first_kept, open_kept
from mlx_qlora.model.load import Loaded, fingerprint, load, wired_memory
from mlx_qlora.objectives.sft import sft
from mlx_qlora.plan import Plan, checked, choose
from mlx_qlora.records import BEGIN, Batch, EvalReport, Example, Halfway, StepReport, TrainState, Update
from mlx_qlora.resume import (
    Standing,
    as_before,
    computing,
    put_back,
    require_same,
    settings_changed,
    versions,
    versions_changed,
)
from mlx_qlora.run import checkpoint as checkpoints
from mlx_qlora.run import disk
from mlx_qlora.run import folder as run_folder
from mlx_qlora.run.checkpoint import Checkpoint, CheckpointConfig
from mlx_qlora.run.interrupt import Asked, listening
from mlx_qlora.run.metrics import MetricsWriter, copies
from mlx_qlora.run.recorder import Recorder
from mlx_qlora.run.supervise import supervise
from mlx_qlora.run.watchdog import watching


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `model` has the best adapters on, in evaluation mode."""

    model: nn.Module
    tokenizer: Any
    output_dir: Path
    summary: dict[str, Any]  # what training_summary.json holds

    @property
    def interrupted(self) -> bool:
        return bool(self.summary["ended"] == _INTERRUPTED)


# How a run can end, as training_summary.json says it.
_FINISHED, _STOPPED, _INTERRUPTED = "finished", "stopped early", "interrupted"
_NOT_FINITE, _FAILED = "not finite", "failed"
_LOOK_AT = 2000  # examples that are compared with each other before training; `mlx-qlora data` takes more


def run(config: RunConfig, quiet: bool = False) -> RunResult:
    """Train as the configuration says, and leave all of it in its output_dir."""
    console = Console(quiet)
    config.require_complete()
    if config.supervise:
        raise ConfigError("supervise: a run is supervised from the command line: mlx-qlora train --supervise 5 ...")
    folder = Path(config.output_dir).expanduser()
    run_folder.check_free(folder, overwrite=config.overwrite, resume=config.resume)
    with run_folder.locked(folder), _observed(folder, config, console) as observed:
        ready = _prepare(config, console, observed.enter)
        observed.began = True
        with _Going(ready, console, observed.enter) as going:
            going.ended = _train(ready, going, console)
        result = _conclude(ready, going, console)
        observed.recorder.end(going.ended)
        return result


def _train(ready: _Ready, going: _Going, console: Console) -> str:
    """From where the run stands to its end; says how it ended."""
    standing = going.standing
    if going.stops_early():
        return _STOPPED
    while True:  # once, but for runs that go back to a checkpoint
        for fact in steps(going.engine(), going.updates(), standing.state, standing.window):
            if isinstance(fact, Halfway):
                standing.state, standing.window = fact
                going.save(scheduled=False)
                standing.window = None
                continue
            report = fact
            standing.take(report)
            going.metrics.step(report, **({"rollbacks": standing.rollbacks} if standing.rollbacks else {}))
            console.step(report)
            if not report.finite or standing.guard.jumped:
                going.suspect(report)
            if trouble := standing.guard.trouble:
                if going.goes_back(trouble):
                    break
                raise NonFiniteError(_explain(trouble, report, ready.config))

            last = report.step == ready.total
            evaluation = going.evaluate(report) if last or report.step % ready.eval_every == 0 else None
            if evaluation:
                going.metrics.validation(evaluation)
                console.validation(evaluation, standing.monitor.patience)
            stops = last or going.stops_early() or going.asked.stop
            if (scheduled := going.keeper.scheduled(report.step, evaluation)) or stops or going.wants_saving():
                going.save(scheduled)
            elif evaluation and evaluation.best:
                going.keeper.save_best(standing)
            if going.stops_early():
                return _STOPPED
            if going.asked.stop and not last:
                return _INTERRUPTED
        else:
            return _FINISHED


@dataclass(frozen=True)
class _Ready:
    """All that a run needs, built."""

    config: RunConfig
    loaded: Loaded
    attached: lora.Attached
    folder: Path
    objective: Objective
    plan: Plan
    optim: OptimConfig
    total: int
    eval_every: int
    valid: list[Example]
    train_sample: list[Example]
    corpus: Corpus
    kept: KeptTrunk | None
    cache: int | None  # bytes of freed buffers that MLX may keep
    facts: dict[str, Any]  # what a checkpoint is compared by
    checkpoint: Checkpoint | None  # where it goes on

    def layout(self, halvings: int = 0) -> Layout:
        return smaller(self.plan.layout, halvings)

    def lay_out(self, examples: Sequence[Example], halvings: int = 0) -> tuple[Batch, ...]:
        """Batches, with what the layers below the adapters give, where that is kept."""
        batches = lay_out(examples, self.layout(halvings))
        return tuple(self.kept.batches(batches)) if self.kept else batches

    def updates(self, state: TrainState = BEGIN) -> Iterator[Update]:
        """The updates that are still to be made."""
        batch, layout = self.config.part(BatchConfig), self.layout(state.halvings)
        coming = self.corpus.updates(batch, layout, self.config.epochs, state.next)
        return islice(self.kept.updates(coming) if self.kept else coming, self.total - state.step)

    def engine(self, rate: float = 1.0) -> Engine:
        """What makes the updates; `rate`: by what the learning rate is multiplied."""
        return Engine(
            model=self.loaded.model,
            objective=self.objective,
            optimizer=make_optimizer(replace(self.optim, learning_rate=self.optim.learning_rate * rate), self.total),
            config=self.optim,
            with_key=lora.dropout_keys,
            seed=self.config.seed,
            compiled=self.plan.compiled,
            lay_out=self.lay_out,
            rehearse=() if self.plan.roomy else tuple(self.corpus.longest(self.config.examples_per_update)),
        )


def _prepare(config: RunConfig, console: Console, enter: Enter) -> _Ready:
    """Read, load, attach, lay out; claim the folder last, so that a wrong setting or row leaves nothing behind."""
    folder = Path(config.output_dir).expanduser()
    source, render, batch = config.part(SourceConfig), config.part(RenderConfig), config.part(BatchConfig)
    optim_config = config.part(OptimConfig)
    sources = find(source)  # before the model is loaded: a wrong path is said at once
    if config.streaming and config.max_steps is None:
        raise ConfigError("max_steps: with streaming the data has no known length; say how many updates to train.")
    found = _where_to_go_on(config, folder, console) if config.resume else None
    chosen = as_before(found, config) if found else config

    enter("load")
    loaded = load(config.model, chosen.matmul, found.state["computing"]["matmul"] if found else None)
    console.fact("model", loaded.describe, backend.describe())
    model_digest = fingerprint(loaded.model)
    attached = lora.attach(loaded.model, config.lora, seed=config.seed)
    console.adapters(attached)
    enter("tokenise")
    corpus = gather(source, render, loaded.tokenizer, config.seed, console.preparing, sources=sources)
    account = audit(corpus, look_at=_LOOK_AT)
    console.account(account)
    data_digest = corpus.digest()
    if found:
        require_same(found, model_digest, data_digest, config)

    enter("plan")
    total, per_epoch = _length(config, corpus, batch)
    eval_every = config.eval_every or max(1, (per_epoch or total) // 4)
    console.plan(optim_config, batch.examples_per_update, per_epoch, total, eval_every)
    keeping = config.part(TrunkCacheConfig)
    plan = choose(chosen, loaded.model, corpus, first=first_kept(keeping, loaded.model))
    sample = corpus.train_sample()
    plan = checked(plan, loaded.model, sft(config.label_smoothing, plan.passage), sample)
    kept = open_kept(keeping, loaded.model, config.model, plan.passage.first)
    console.layout(plan.describe, plan.notes)
    if plan.memory:
        console.memory(plan.memory, backend.memory())
    console.fact("folder", str(folder))
    if not found:
        run_folder.clear(folder, of_all_starts=config.overwrite)
    disk.write_atomically(folder / "config.yaml", _as_kept(config).to_yaml())
    disk.write_json(folder / "data_account.json", account.to_json())
    if corpus.renderer.brought_template:
        disk.write_atomically(folder / "chat_template.jinja", loaded.tokenizer.chat_template)
    return _Ready(
        config=config,
        loaded=loaded,
        attached=attached,
        folder=folder,
        objective=sft(config.label_smoothing, plan.passage),
        plan=plan,
        optim=optim_config,
        total=total,
        eval_every=eval_every,
        valid=corpus.valid_examples(),
        train_sample=sample,
        corpus=corpus,
        kept=kept,
        cache=plan.cache(config.part(MemoryConfig).limit(backend.memory())),
        facts={
            "config": _as_kept(config).plain(),
            "computing": computing(plan, loaded.matmul),
            "model": model_digest,
            "data": data_digest,
            "versions": versions(),
            "planned_steps": total,
        },
        checkpoint=found,
    )


def _as_kept(config: RunConfig) -> RunConfig:
    """Without what was said to this start of the run alone."""
    return replace(config, overwrite=False, resume=False, resume_anyway=False, supervise=0)


def _where_to_go_on(config: RunConfig, folder: Path, console: Console) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where a run is to begin. Refuses to begin where one would be lost."""
    found, damaged = checkpoints.newest(folder)
    for problem in damaged:
        console.fact("resume", problem)
    if found:
        console.resumes(found, [*settings_changed(found, config), *versions_changed(found)])
        return found
    if damaged:
        raise ResumeError(f"resume: no checkpoint in {folder} is whole. To begin anew, say --overwrite; adapters/ goes then.")
    if (folder / "training_summary.json").exists():
        raise ResumeError(f"resume: {folder} holds a run that ended without a checkpoint. To begin anew, say --overwrite.")
    if run_folder.held_by_a_run(folder):
        console.fact("resume", "the run ended before its first checkpoint; it begins anew")
    return None


def _length(config: RunConfig, corpus: Corpus, batch: BatchConfig) -> tuple[int, int | None]:
    """(updates of the run, updates of its first epoch); a stream's epochs have no known length."""
    if corpus.train is None:
        return config.max_steps or 0, None
    whole = corpus.updates_in(batch, config.epochs)
    return min(whole, config.max_steps or sys.maxsize), corpus.updates_in(batch, 1)


class _Going:
    """A run that goes on: what changes meanwhile, and what it writes. Leaving it, however, leaves nothing unwritten."""

    def __init__(self, ready: _Ready, console: Console, enter: Enter):
        config, guard = ready.config, Guard(ready.config.part(GuardConfig))
        self.ready, self.console, self.enter = ready, console, enter
        self.standing = Standing(
            monitor=EarlyStoppingMonitor(config.early_stopping.patience, config.early_stopping.min_delta), guard=guard
        )
        self.ended = _FAILED  # until something better is known
        self.asked = Asked()
        self._stack = ExitStack()
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
            ready.attached.adapter_config,
            self.metrics,
            ready.kept,
            console.say,
        )
        if ready.checkpoint:
            self.keeper.goes_on(ready.checkpoint)

    def __enter__(self) -> _Going:
        ready, console = self.ready, self.console
        (ready.folder / "training_summary.json").unlink(missing_ok=True)  # the run is not over
        mx.reset_peak_memory()
        ready.loaded.model.train()
        self._stack.enter_context(wired_memory(ready.loaded.model))
        self._stack.enter_context(cache_limit(ready.cache))
        self.asked = self._stack.enter_context(
            listening(lambda: console.say("stopping after this update, and saving; once more: at once"))
        )
        console.begin(ready.total, self.standing.state)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        ready, standing = self.ready, self.standing
        if isinstance(error, KeyboardInterrupt):  # the second one
            self.ended = _INTERRUPTED
        elif isinstance(error, NonFiniteError):
            self.ended = _NOT_FINITE
        self.console.end_bar()
        try:
            if isinstance(error, MlxQloraError | OSError) and not isinstance(error, NonFiniteError):
                self.save(scheduled=False)  # the update that failed has changed nothing
            self.keeper.wait()
            if standing.best is None:  # nothing was validated, or nothing was finite: keep what there is
                arrays = lora.adapter_arrays(ready.loaded.model)
                run_folder.save_adapters(ready.folder, arrays, ready.attached.adapter_config)
            self.keeper.end(standing, self.ended)
            self.metrics.close()
            copies(ready.folder, self.metrics.lines)
            disk.write_json(ready.folder / "training_summary.json", self.summary())
        except OSError as problem:
            self.console.say(f"WARNING: {problem.filename or ready.folder} could not be written: {problem.strerror}")
            if error is None:
                raise
        finally:
            if ready.kept:
                self.console.kept(ready.kept.kept)
                ready.kept.kept.close()
            self._stack.close()

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
        return self.ready.updates(self.standing.state)

    def _take_back(self, found: Checkpoint) -> None:
        """Be where the checkpoint says."""
        self.standing.rate = found.state["rate"]
        self._engine = self.ready.engine(self.standing.rate)
        put_back(found, self.standing, self.ready.loaded.model, self._engine.optimizer)
        if self.standing.state.halvings and self.ready.plan.layout.token_budget != found.state["computing"]["token_budget"]:
            self.standing.state = replace(self.standing.state, halvings=0)  # another budget was asked for since

    def stops_early(self) -> bool:
        return self.standing.monitor.should_stop

    def wants_saving(self) -> bool:
        """Whether somebody asked for a checkpoint, or the clock does."""
        return self.asked.save or self.keeper.overdue()

    def save(self, scheduled: bool) -> None:
        """Begin to write a checkpoint; training goes on meanwhile."""
        self.enter("save")
        self.asked.save = False
        self.keeper.save(self.standing, self.ready.loaded.model, self._engine.optimizer, scheduled)

    def evaluate(self, report: StepReport) -> EvalReport:
        """The losses on validation data and on the fixed sample, by the same function."""
        ready, standing = self.ready, self.standing
        val_loss, train_loss = (self._mean_loss(which) for which in (ready.valid, ready.train_sample))
        standing.monitor = standing.monitor.update(val_loss)
        best = standing.monitor.is_extreme
        evaluation = EvalReport(report.step, val_loss, train_loss, best, standing.monitor.stale)
        standing.validations.append((evaluation, report.epoch))
        if best:
            standing.best_adapters = dict(lora.adapter_arrays(ready.loaded.model))
        return evaluation

    def _mean_loss(self, examples: Sequence[Example]) -> float:
        def of(halvings: int) -> float:
            batches = lay_out(examples, self.ready.layout(halvings))
            return mean_loss(self.ready.loaded.model, self.ready.objective, self._seen(batches))

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
        name = f"bad_updates/update_{report.step}.json"
        self.console.say(f"update {report.step}: {why}{f'; see {name}' if standing.bad < MOST else ''}")
        if standing.bad >= MOST:
            return
        standing.bad += 1
        found = suspects(report, why, ready.loaded.tokenizer.decode, lambda example: self._mean_loss([example]))
        with suppress(OSError):  # it is for a person to look at; training does not depend on it
            (ready.folder / "bad_updates").mkdir(exist_ok=True)
            disk.write_json(ready.folder / name, found, flushed=False)

    def goes_back(self, trouble: str) -> bool:
        """Take the run back to its last checkpoint with a lower learning rate, if that is wanted and there is one."""
        config, standing = self.ready.config, self.standing
        if config.on_nonfinite != "rollback" or standing.rollbacks >= config.max_rollbacks:
            return False
        found = self.keeper.last_good()
        if found is None:
            return False
        rate, rollbacks = standing.rate * config.rollback_factor, standing.rollbacks + 1
        keep = standing.bad, standing.state.skipped_updates, standing.state.elapsed_s
        self._take_back(found)
        standing.bad = keep[0]
        standing.state = replace(standing.state, skipped_updates=keep[1], elapsed_s=keep[2], halvings=self.room.halvings)
        standing.rate, standing.rollbacks = rate, rollbacks
        standing.guard = standing.guard.calmed()
        optimizer = self.ready.engine(rate).optimizer
        optimizer.state = self._engine.optimizer.state
        self._engine = replace(self._engine, optimizer=optimizer)
        rate_now = self.ready.optim.learning_rate * rate
        self.console.went_back(trouble, standing.state.step, rate_now, rollbacks, config.max_rollbacks)
        return True

    def summary(self) -> dict[str, Any]:
        ready, standing = self.ready, self.standing
        state, best = standing.state, standing.best
        reports = [evaluation for evaluation, _ in standing.validations]
        return {
            "ended": self.ended,
            "steps": state.step,
            "planned_steps": ready.total,
            "epoch": standing.epoch,
            "best": {**asdict(best[0]), "gap": best[0].gap, "epoch": best[1]} if best else None,
            "gap": asdict(analyse(reports)) if best else None,
            "tokens": standing.tokens,
            "supervised_tokens": standing.supervised_tokens,
            "tokens_per_second": standing.tokens / state.elapsed_s if state.elapsed_s else 0.0,
            "elapsed_s": state.elapsed_s,
            "peak_memory_gb": standing.peak_memory_gb,
            "skipped_updates": state.skipped_updates,
            "rollbacks": standing.rollbacks,
            "halvings": state.halvings,
            "model": ready.loaded.name,
            "trainable_parameters": ready.attached.trainable,
            "total_parameters": ready.attached.total,
            "device": backend.describe(),
            "versions": versions(),
        }


def _explain(trouble: str, report: StepReport, config: RunConfig) -> str:
    ids = report.update.ids
    return (
        f"{trouble}, up to update {report.step}, had a loss or a gradient that is not a finite number. "
        "They changed nothing: the adapters are as they were before them.\n"
        f"The last such update had the examples {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}; "
        "their text and the loss of each are in bad_updates/.\n"
        "What to try, in this order: a learning rate of a third (learning_rate), a warm-up of 20 updates or more "
        "(warmup_steps), a smaller clip_grad_norm such as 0.5, a smaller lora.scale, more supervised tokens in an "
        "update (batch_size, gradient_accumulation), and a look at the examples named above.\n"
        f"From the last checkpoint: mlx-qlora train --output-dir {config.output_dir} --resume --resume-anyway "
        f"--learning-rate {config.learning_rate / 3:.3g}; on_nonfinite: rollback does the like by itself."
    )


@dataclass
class _Observed:
    """Who is told what a run does."""

    recorder: Recorder
    enter: Enter
    began: bool = False


@contextmanager
def _observed(folder: Path, config: RunConfig, console: Console) -> Iterator[_Observed]:
    """The flight recorder, the watchdog, and the trace if it is wanted. A run that never begins leaves none of them."""
    recorder = Recorder(folder)
    tracer = Tracer(folder, console.say) if config.trace else None

    def enter(phase: str, **facts: object) -> None:
        recorder.enter(phase, **facts)
        if tracer:
            tracer.enter(phase, **facts)

    observed = _Observed(recorder, enter)
    try:
        with watching(recorder, folder, console.say, config.stall_after_s):
            yield observed
    except BaseException as error:
        ended = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _FAILED
        recorder.end(_NOT_FINITE if isinstance(error, NonFiniteError) else ended, f"{type(error).__name__}: {error}")
        raise
    finally:
        if tracer:
            tracer.close()
        if observed.began:
            recorder.close()
        else:
            recorder.abandon()
            if tracer:
                (folder / "trace.json").unlink(missing_ok=True)


def _conclude(ready: _Ready, going: _Going, console: Console) -> RunResult:
    """Say how it went, put the best adapters on, and ask the questions if the configuration wants it."""
    config, model, folder, standing = ready.config, ready.loaded.model, ready.folder, going.standing
    summary = going.summary()
    console.ended(summary["ended"], summary["steps"], summary["elapsed_s"])
    if ready.corpus.train is None:
        read = replace(audit(ready.corpus, look_at=_LOOK_AT), accounts=ready.corpus.accounts | {"train": ready.corpus.streamed})
        disk.write_json(folder / "data_account.json", read.to_json())
        console.streamed(read)
    if standing.best:
        console.best(*standing.best, folder)
        console.gap(analyse([evaluation for evaluation, _ in standing.validations]))
    lora.load(model, run_folder.load_adapters(folder), folder / "adapters")
    model.eval()
    if config.score_questions and summary["ended"] != _INTERRUPTED:
        summary = summary | {"answers": _ask(ready, console)}
        disk.write_json(folder / "training_summary.json", summary)
    resume = going.keeper.newest if summary["ended"] == _INTERRUPTED else None
    console.where(folder, config.model, summary["ended"] == _INTERRUPTED, resume)
    return RunResult(model, ready.loaded.tokenizer, folder, summary)


def _ask(ready: _Ready, console: Console) -> dict[str, Any]:
    """Ask base and tuned model validation questions; the answers go into answers.jsonl, the scores are given back."""
    tokenizer, config = ready.loaded.tokenizer, ready.config
    asked = ready.corpus.questions(config.score_questions)
    if not asked:
        console.say("answers   none of the validation rows is a question with an answer")
        return {"questions": 0}
    console.say(f"asking the base and the fine-tuned model {len(asked)} validation questions ...")
    answered = ask_both(ready.loaded.model, tokenizer, asked, config.max_answer_tokens)
    disk.write_lines(ready.folder / "answers.jsonl", [asdict(one) for one in answered])
    base, tuned = score([(a.base, a.expected) for a in answered]), score([(a.tuned, a.expected) for a in answered])
    console.answers(answered, base, tuned)
    return {"questions": len(asked), "base": asdict(base), "tuned": asdict(tuned)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Gives the exit code: 0 done, 2 wrong input, 3 stopped by a guard, 130 interrupted."""

    given = list(sys.argv[1:] if arguments is None else arguments)

    def trained() -> int:
        config = parse(given)
        if config.supervise:
            return _supervised(config, given)
        return 130 if run(config).interrupted else 0

    return answered("train", trained)


def _supervised(config: RunConfig, arguments: Sequence[str]) -> int:
    """The same command as a child, that is started again where it died; nothing is loaded here."""
    config.require_complete()
    folder = Path(config.output_dir).expanduser()
    run_folder.check_free(folder, overwrite=config.overwrite, resume=config.resume)
    starts = count()

    def command(budget: int | None) -> list[str]:
        again = ["--resume", "--no-overwrite"] if next(starts) else []
        smaller = [] if budget is None else ["--token-budget", str(budget)]
        return [sys.executable, "-m", "mlx_qlora", "train", *arguments, "--supervise", "0", *again, *smaller]

    return supervise(command, folder, config.supervise, print)


class _Callable(ModuleType):
    """`from mlx_qlora import train` gives the function, or this module where it was imported earlier. Both can be called."""

    def __call__(self, config: RunConfig, quiet: bool = False) -> RunResult:
        return run(config, quiet)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Callable
