"""The whole of a training run, read top to bottom: the one place that sees every part."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.config import RunConfig, parse
from mlx_qlora.data.audit import audit
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.layout import BatchConfig, lay_out
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.engine.memory import MemoryConfig, cache_limit
from mlx_qlora.engine.optim import OptimConfig, make_optimizer
from mlx_qlora.engine.steps import Engine, steps
from mlx_qlora.engine.stopping import EarlyStoppingMonitor
from mlx_qlora.errors import ConfigError, NonFiniteError
from mlx_qlora.look.console import Console, answered
from mlx_qlora.look.evaluate import ask_both, mean_loss, score
from mlx_qlora.look.gap import analyse
from mlx_qlora.model import backend, lora
from mlx_qlora.model.activations import KeptTrunk, TrunkCacheConfig, first_kept, open_kept
from mlx_qlora.model.load import Loaded, load, wired_memory
from mlx_qlora.objectives.sft import sft
from mlx_qlora.plan import checked, choose
from mlx_qlora.records import Batch, EvalReport, StepReport, Update
from mlx_qlora.run import folder as run_folder
from mlx_qlora.run.interrupt import listening
from mlx_qlora.run.metrics import MetricsWriter


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
    ready = _prepare(config, console)
    model, folder = ready.loaded.model, ready.folder
    monitor = EarlyStoppingMonitor(config.early_stopping.patience, config.early_stopping.min_delta)
    history = _History()
    ended = _FAILED  # until something better is known
    metrics = MetricsWriter(folder)
    mx.reset_peak_memory()
    model.train()
    console.begin(ready.total)
    try:
        with (
            wired_memory(model),
            cache_limit(ready.cache),
            listening(lambda: console.say("stopping after this update; once more: at once")) as stop,
        ):
            for report in steps(ready.engine, islice(ready.updates, ready.total)):
                skipped = history.add(report)
                metrics.step(report)
                console.step(report, skipped)

                if report.step % ready.eval_every == 0 or report.step == ready.total or stop.asked:
                    val_loss = mean_loss(model, ready.engine.objective, ready.batches(ready.valid))
                    train_loss = mean_loss(model, ready.engine.objective, ready.batches(ready.train_sample))
                    monitor = monitor.update(val_loss)
                    evaluation = EvalReport(report.step, val_loss, train_loss, monitor.is_extreme, monitor.stale)
                    history.validations.append((evaluation, report.epoch))
                    metrics.validation(evaluation)
                    console.validation(evaluation, monitor.patience)
                    if monitor.is_extreme:
                        _save_adapters(ready)
                if stop.asked:
                    ended = _INTERRUPTED
                    break
                if monitor.should_stop:
                    ended = _STOPPED
                    break
            else:
                ended = _FINISHED
    except KeyboardInterrupt:  # the second one
        ended = _INTERRUPTED
        raise
    except NonFiniteError:
        ended = _NOT_FINITE
        raise
    finally:
        console.end_bar()
        metrics.close()
        if ready.kept:
            console.kept(ready.kept.kept)
            ready.kept.kept.close()
        if history.best is None:  # nothing was validated, or nothing was finite: keep what there is
            _save_adapters(ready)
        summary = _summary(ready, history, ended)
        run_folder.write_json(folder / "training_summary.json", summary)
    return _conclude(ready, history, summary, console)


@dataclass(frozen=True)
class _Ready:
    """All that a run needs, built."""

    config: RunConfig
    loaded: Loaded
    attached: lora.Attached
    folder: Path
    engine: Engine
    updates: Iterator[Update]
    total: int
    eval_every: int
    valid: tuple[Batch, ...]
    train_sample: tuple[Batch, ...]
    corpus: Corpus
    kept: KeptTrunk | None
    cache: int | None  # bytes of freed buffers that MLX may keep

    def batches(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """With what the layers below the adapters give, where that is kept."""
        return self.kept.batches(batches) if self.kept else batches


def _prepare(config: RunConfig, console: Console) -> _Ready:
    """Read, load, attach, lay out; claim the folder last, so that a wrong setting or row leaves nothing behind."""
    config.require_complete()
    folder = Path(config.output_dir).expanduser()
    run_folder.check_free(folder, overwrite=config.overwrite)
    source, render, batch = config.part(SourceConfig), config.part(RenderConfig), config.part(BatchConfig)
    optim_config = config.part(OptimConfig)
    sources = find(source)  # before the model is loaded: a wrong path is said at once
    if config.streaming and config.max_steps is None:
        raise ConfigError("max_steps: with streaming the data has no known length; say how many updates to train.")

    loaded = load(config.model, config.matmul)
    console.fact("model", loaded.describe, backend.describe())
    attached = lora.attach(loaded.model, config.lora, seed=config.seed)
    console.adapters(attached)
    corpus = gather(source, render, loaded.tokenizer, config.seed, console.preparing, sources=sources)
    found = audit(corpus, look_at=_LOOK_AT)
    console.account(found)

    total, per_epoch = _length(config, corpus, batch)
    eval_every = config.eval_every or max(1, (per_epoch or total) // 4)
    console.plan(optim_config, batch.examples_per_update, per_epoch, total, eval_every)
    keeping = config.part(TrunkCacheConfig)
    plan = choose(config, loaded.model, corpus, first=first_kept(keeping, loaded.model))
    objective = sft(config.label_smoothing, plan.passage)
    sample = corpus.train_sample()
    plan = checked(plan, loaded.model, objective, sample)
    objective = sft(config.label_smoothing, plan.passage)
    kept = open_kept(keeping, loaded.model, config.model, plan.passage.first)
    console.layout(plan.describe, plan.notes)
    if plan.memory:
        console.memory(plan.memory, backend.memory())
    valid, train_sample = lay_out(corpus.valid_examples(), plan.layout), lay_out(sample, plan.layout)
    console.fact("folder", str(folder))
    run_folder.claim(folder, overwrite=config.overwrite)
    run_folder.write_atomically(folder / "config.yaml", replace(config, overwrite=False).to_yaml())
    run_folder.write_json(folder / "data_account.json", found.to_json())
    if corpus.renderer.brought_template:
        run_folder.write_atomically(folder / "chat_template.jinja", loaded.tokenizer.chat_template)

    updates = corpus.updates(batch, plan.layout, config.epochs)
    longest = [] if plan.roomy else corpus.longest(batch.examples_per_update)
    largest = max(lay_out(longest, plan.layout), key=lambda one: one.computed, default=None)
    engine = Engine(
        model=loaded.model,
        objective=objective,
        optimizer=make_optimizer(optim_config, total),
        config=optim_config,
        with_key=lora.dropout_keys,
        seed=config.seed,
        compiled=plan.compiled,
        rehearse=kept.attach(largest) if kept and largest else largest,
    )
    return _Ready(
        config=config,
        loaded=loaded,
        attached=attached,
        folder=folder,
        engine=engine,
        updates=kept.updates(updates) if kept else updates,
        total=total,
        eval_every=eval_every,
        valid=valid,
        train_sample=train_sample,
        corpus=corpus,
        kept=kept,
        cache=plan.cache(config.part(MemoryConfig).limit(backend.memory())),
    )


def _length(config: RunConfig, corpus: Corpus, batch: BatchConfig) -> tuple[int, int | None]:
    """(updates of the run, updates of its first epoch); a stream's epochs have no known length."""
    if corpus.train is None:
        return config.max_steps or 0, None
    whole = corpus.updates_in(batch, config.epochs)
    return min(whole, config.max_steps or sys.maxsize), corpus.updates_in(batch, 1)


@dataclass
class _History:
    """What a run has been so far."""

    last: StepReport | None = None
    tokens: int = 0
    supervised_tokens: int = 0
    validations: list[tuple[EvalReport, float]] = field(default_factory=list)  # with the epoch

    def add(self, report: StepReport) -> bool:
        """Take a report in; says whether its update was skipped."""
        skipped = report.skipped_updates > (self.last.skipped_updates if self.last else 0)
        self.last = report
        self.tokens += report.tokens
        self.supervised_tokens += report.supervised_tokens
        return skipped

    @property
    def best(self) -> tuple[EvalReport, float] | None:
        return next((one for one in reversed(self.validations) if one[0].best), None)


def _save_adapters(ready: _Ready) -> None:
    run_folder.save_adapters(ready.folder, lora.adapter_arrays(ready.loaded.model), ready.attached.adapter_config)


def _summary(ready: _Ready, history: _History, ended: str) -> dict[str, Any]:
    last, best = history.last, history.best
    reports = [evaluation for evaluation, _ in history.validations]
    seconds = last.elapsed_s if last else 0.0
    return {
        "ended": ended,
        "steps": last.step if last else 0,
        "planned_steps": ready.total,
        "epoch": last.epoch if last else 0.0,
        "best": {**asdict(best[0]), "gap": best[0].gap, "epoch": best[1]} if best else None,
        "gap": asdict(analyse(reports)) if best else None,
        "tokens": history.tokens,
        "supervised_tokens": history.supervised_tokens,
        "tokens_per_second": history.tokens / seconds if seconds else 0.0,
        "elapsed_s": seconds,
        "peak_memory_gb": last.peak_memory_gb if last else 0.0,
        "skipped_updates": last.skipped_updates if last else 0,
        "model": ready.loaded.name,
        "trainable_parameters": ready.attached.trainable,
        "total_parameters": ready.attached.total,
        "device": backend.describe(),
        "versions": {name: version(name) for name in ("mlx-qlora", "mlx", "mlx-lm")}
        | {"python": platform.python_version(), "platform": platform.platform()},
    }


def _conclude(ready: _Ready, history: _History, summary: dict[str, Any], console: Console) -> RunResult:
    """Say how it went, put the best adapters on, and ask the questions if the configuration wants it."""
    config, model, folder = ready.config, ready.loaded.model, ready.folder
    console.ended(summary["ended"], summary["steps"], summary["elapsed_s"])
    if ready.corpus.train is None:
        read = replace(audit(ready.corpus, look_at=_LOOK_AT), accounts=ready.corpus.accounts | {"train": ready.corpus.streamed})
        run_folder.write_json(folder / "data_account.json", read.to_json())
        console.streamed(read)
    if history.best:
        console.best(*history.best, folder)
        console.gap(analyse([evaluation for evaluation, _ in history.validations]))
    model.load_weights(list(run_folder.load_adapters(folder).items()), strict=False)
    model.eval()
    if config.score_questions and summary["ended"] != _INTERRUPTED:
        summary = summary | {"answers": _ask(ready, console)}
        run_folder.write_json(folder / "training_summary.json", summary)
    console.where(folder, config.model, summary["ended"] == _INTERRUPTED)
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
    run_folder.write_lines(ready.folder / "answers.jsonl", [asdict(one) for one in answered])
    base, tuned = score([(a.base, a.expected) for a in answered]), score([(a.tuned, a.expected) for a in answered])
    console.answers(answered, base, tuned)
    return {"questions": len(asked), "base": asdict(base), "tuned": asdict(tuned)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Gives the exit code: 0 done, 2 wrong input, 3 stopped by a guard, 130 interrupted."""

    def trained() -> int:
        return 130 if run(parse(sys.argv[1:] if arguments is None else arguments)).interrupted else 0

    return answered("train", trained)


class _Callable(ModuleType):
    """`from mlx_qlora import train` gives the function, or this module where it was imported earlier. Both can be called."""

    def __call__(self, config: RunConfig, quiet: bool = False) -> RunResult:
        return run(config, quiet)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Callable
