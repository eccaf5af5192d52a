"""The whole of a training run, read top to bottom: the one place that sees every part."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.nn as nn

from mlx_qlora.build import LOOK_AT, Ready, build
from mlx_qlora.config import RunConfig, flat, parse
from mlx_qlora.data.audit import audit
from mlx_qlora.engine.steps import Enter, steps
from mlx_qlora.errors import ConfigError, NonFiniteError
from mlx_qlora.going import FAILED, FINISHED, INTERRUPTED, NOT_FINITE, STOPPED, Going
from mlx_qlora.look.console import Console, answered
from mlx_qlora.look.evaluation.generate import ask_both, score
from mlx_qlora.look.history import read_history
from mlx_qlora.look.pictures.figures import PICTURE, results, save
from mlx_qlora.look.teaching import closing, doubts, nobody
from mlx_qlora.look.trace import Tracer
from mlx_qlora.look.tracking.trackers import TrackerConfig, require_trackers
from mlx_qlora.records import Halfway, StepReport
from mlx_qlora.repeat import repeat
from mlx_qlora.run import disk
from mlx_qlora.run import folder as run_folder
from mlx_qlora.run.interrupt import unhurt
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
        return bool(self.summary["ended"] == INTERRUPTED)


def run(config: RunConfig, quiet: bool = False) -> RunResult:
    """Train as the configuration says, and leave all of it in its output_dir."""
    console = Console(quiet)
    config.require_complete()
    if config.seeds:
        raise ConfigError("seeds: several are trained from the command line: mlx-qlora train --seeds 42,123,456 ...")
    if config.supervise:
        raise ConfigError("supervise: a run is supervised from the command line: mlx-qlora train --supervise 5 ...")
    folder = Path(config.output_dir).expanduser()
    run_folder.check_free(folder, overwrite=config.overwrite, resume=config.resume)
    require_trackers(config.part(TrackerConfig))
    with unhurt(), run_folder.locked(folder), _observed(folder, config, console) as observed:
        ready = build(config, console, observed.enter)
        observed.began = True
        with Going(ready, console, observed.enter) as going:
            going.ended = _train(ready, going, console)
        if going.ended != INTERRUPTED:
            observed.enter("answer")
        result = _conclude(ready, going, console)
        observed.recorder.end(going.ended)
        return result


def _train(ready: Ready, going: Going, console: Console) -> str:
    """From where the run stands to its end; says how it ended."""
    standing = going.standing
    if going.stops_early():
        return STOPPED
    if ready.config.on_nonfinite == "rollback" and standing.state.step == 0:
        going.save(scheduled=True)  # there is always something to go back to
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
                raise NonFiniteError(_explain(trouble, report, ready, going.keeper.newest))

            last = report.step == ready.total
            evaluation = going.evaluate(report) if last or report.step % ready.eval_every == 0 else None
            if evaluation:
                going.metrics.validation(evaluation)
                console.validation(evaluation, standing.monitor.patience, ready.reads_text)
            going.sample(evaluation)
            stops = last or going.stops_early() or going.asked.stop
            if (scheduled := going.keeper.scheduled(report.step, evaluation)) or stops or going.wants_saving():
                going.save(scheduled)
            elif evaluation and evaluation.best:
                going.keeper.save_best(standing)
            if going.stops_early():
                return STOPPED
            if going.asked.stop and not last:
                return INTERRUPTED
        else:
            return FINISHED


def _explain(trouble: str, report: StepReport, ready: Ready, saved: Path | None) -> str:
    config, ids = ready.config, report.update.ids
    scale = "" if config.fine_tune_type == "full" else " a smaller lora.scale,"
    again = shlex.join(["mlx-qlora", "train", "--output-dir", config.output_dir, "--resume", "--resume-anyway"])
    again += f" --learning-rate {config.learning_rate / 3:.3g}"
    return (
        f"stopped at update {report.step}, after {trouble} with a loss or a gradient that is not a finite number. "
        f"Nothing was changed by that: the {ready.trained.name} are as they were before.\n"
        f"The last such update had the examples {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}; "
        "their text and the loss of each are in bad_updates/.\n"
        "What to try, in this order: a learning rate of a third (learning_rate), a warm-up of 20 updates or more "
        f"(warmup_steps), a smaller clip_grad_norm such as 0.5,{scale} more supervised tokens in an "
        "update (batch_size, gradient_accumulation), and a look at the examples named above.\n"
        f"{_of_teacher(config)}"
        f"{f'From {saved.name}' if saved else 'From the beginning, because nothing was saved yet'}: {again}"
        f"{'' if config.on_nonfinite == 'rollback' else '; on_nonfinite: rollback does the like by itself'}."
    )


def _of_teacher(config: RunConfig) -> str:
    said = doubts(flat(config.plain())) if config.distill.wanted else []
    return "".join(f"{each.removeprefix('WARNING: ').capitalize()}.\n" for each in said)


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
        ended = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
        said = str(error).split("\n")[0]  # what to try, the autopsy knows
        recorder.end(NOT_FINITE if isinstance(error, NonFiniteError) else ended, f"{type(error).__name__}: {said}")
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


def _conclude(ready: Ready, going: Going, console: Console) -> RunResult:
    """Say how it went, put the best adapters on, and ask the questions if the configuration wants it."""
    config, model, folder, standing = ready.config, ready.loaded.model, ready.folder, going.standing
    best = folder / ready.trained.file
    summary = going.summary()
    console.ended(summary["ended"], summary["steps"], summary["elapsed_s"])
    if ready.corpus.train is None:
        read = replace(audit(ready.corpus, look_at=LOOK_AT), accounts=ready.corpus.accounts | {"train": ready.corpus.streamed})
        disk.write_json(folder / "data_account.json", read.to_json())
        console.streamed(read)
    if standing.best:
        console.best(*standing.best, best, ready.reads_text)
        console.gap(going.gap())
    if taught := summary.get("teaching"):
        said = closing(taught, config.distill.logit_clip, summary["skipped_updates"], summary["steps"])
        console.fact("teacher", *said, *(doubts(flat(config.plain())) if summary["skipped_updates"] else []))
    ready.trained.load(model, run_folder.load_delivered(best), best)
    model.eval()
    if config.score_questions and summary["ended"] != INTERRUPTED:
        summary = summary | {"answers": _ask(ready, console)}
        disk.write_json(folder / "training_summary.json", summary)
    newest = going.keeper.newest if summary["ended"] == INTERRUPTED else None
    console.where(folder, config.model, ready.trained.file, newest, ready.reads_text)
    return RunResult(model, ready.loaded.tokenizer, folder, summary)


def _ask(ready: Ready, console: Console) -> dict[str, Any]:
    """Ask base and tuned model validation questions; the answers go into answers.jsonl, the scores are given back."""
    tokenizer, config = ready.loaded.tokenizer, ready.config
    asked = ready.corpus.questions(config.score_questions)
    if not asked:
        console.say("answers   none of the validation rows is a question with an answer")
        return {"questions": 0}
    whom = "the base and the fine-tuned model" if config.model else "the model"
    console.say(f"asking {whom} {len(asked)} validation questions ...")
    before = ready.trained.base(ready.loaded.model)
    answered = ask_both(ready.loaded.model, before, tokenizer, asked, config.max_answer_tokens)
    lines = [{name: text for name, text in asdict(one).items() if text is not None} for one in answered]
    disk.write_lines(ready.folder / "answers.jsonl", lines)
    told = [(one.base, one.expected) for one in answered if one.base is not None]
    base, tuned = score(told) if told else None, score([(one.tuned, one.expected) for one in answered])
    console.answers(answered, base, tuned)
    return {"questions": len(asked), **({"base": asdict(base)} if base else {}), "tuned": asdict(tuned)}


def main(arguments: Sequence[str] | None = None, verb: str = "train", base: RunConfig | None = None) -> int:
    """The command line. Gives the exit code: 0 done, 2 wrong input, 3 stopped by a guard, 130 interrupted. `base`: the
    settings where nothing is said."""

    given = list(sys.argv[1:] if arguments is None else arguments)

    def trained() -> int:
        config = parse(given, f"mlx-qlora {verb}", base)
        if verb == "distill":
            config.require_complete()
            Console().fact("teacher", *nobody(flat(config.plain())))
        if config.seeds:
            return repeat(config, Console())
        if config.supervise:
            return _supervised(config, given, verb)
        folder = Path(config.output_dir).expanduser()
        try:
            result = run(config)
        except NonFiniteError:
            _draw(folder)
            raise
        _draw(folder)
        return 130 if result.interrupted else 0

    return answered(verb, trained)


def _draw(folder: Path) -> None:
    """The curves as a picture, where matplotlib is installed. The run is over, and nothing that goes wrong here fails it."""
    if find_spec("matplotlib") is None:
        return
    try:
        history = read_history(folder)
        if history.lines:
            save(results([history]), folder / PICTURE)
            print(f"{'curves':<9} {folder / PICTURE}")
    except (Exception, KeyboardInterrupt) as problem:
        with suppress(OSError):
            print(f"WARNING: {PICTURE} was not drawn: {problem or type(problem).__name__}")


def _supervised(config: RunConfig, arguments: Sequence[str], verb: str) -> int:
    """The same command as a child, that is started again where it died; nothing is loaded here."""
    config.require_complete()
    folder = Path(config.output_dir).expanduser()
    run_folder.check_free(folder, overwrite=config.overwrite, resume=config.resume)
    starts = count()

    def command(budget: int | None) -> list[str]:
        again = ["--resume", "--no-overwrite"] if next(starts) else []
        smaller = [] if budget is None else ["--token-budget", str(budget)]
        return [sys.executable, "-m", "mlx_qlora", verb, *arguments, "--supervise", "0", *again, *smaller]

    return supervise(command, folder, config.supervise, print)


class _Callable(ModuleType):
    """`from mlx_qlora import train` gives the function, or this module where it was imported earlier. Both can be called."""

    def __call__(self, config: RunConfig, quiet: bool = False) -> RunResult:
        return run(config, quiet)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Callable
