"""What a person sees while a run goes on: header, progress bar, a line per validation, the end."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qlora.assets import EMBEDDED, packaged
from mlx_qlora.data.audit import Audit
from mlx_qlora.engine.memory import Fit
from mlx_qlora.engine.optim import OptimConfig
from mlx_qlora.errors import MlxQloraError
from mlx_qlora.files import json_object
from mlx_qlora.look.account import facts, training_notes
from mlx_qlora.look.evaluation.generate import Answered, Scores
from mlx_qlora.look.gap import GapAnalysis, gap_facts, gap_text, grade
from mlx_qlora.look.pages.page import VISIBLE
from mlx_qlora.model.activations import KeptStates
from mlx_qlora.model.lstm import MODEL_TYPE as LSTM
from mlx_qlora.records import BEGIN, EvalReport, StepReport, TrainState
from mlx_qlora.run.checkpoint import Checkpoint

if TYPE_CHECKING:
    from tqdm import tqdm


def answered(verb: str, call: Callable[[], int]) -> int:
    """The exit code of a verb. What is wrong is said in one message, without a traceback."""
    try:
        return call()
    except MlxQloraError as error:
        print(f"mlx-qlora {verb}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # no space left, no permission: the message says which file
        print(f"mlx-qlora {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mlx-qlora {verb}: interrupted", file=sys.stderr)
        return 130


_WIDEST = 160  # of a sample's line
_QUIET_S = 20.0  # without a terminal: a line at least so often


class Console:
    """Prints to stdout; the bar goes to stderr, and only where there is a terminal or a notebook."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._total, self._begun = 0, BEGIN
        self._last_line = 0.0
        self._prepared_at: float | None = None
        self._line_open = False

    def say(self, text: str = "") -> None:
        if self._quiet:
            return
        with self._lasting():
            if self._bar is not None:
                self._bar.clear()
            print(text, flush=True)
            if self._bar is not None:
                self._bar.refresh()

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        """A run that trains goes on without its terminal: what it would say goes nowhere from then on."""
        try:
            yield
        except OSError:
            if not self._total:
                raise
            self._quiet, self._bar = True, None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # a notebook's have no numbers
                    os.dup2(nowhere, stream.fileno())

    def fact(self, name: str, *lines: str) -> None:
        """A name and what there is to say of it."""
        for number, line in enumerate(lines):
            self.say(f"{name if number == 0 else '':<9} {line}")

    def preparing(self, rows: int) -> None:
        """How far the preparation of data is; heard of only where it takes a while."""
        now = time.monotonic()
        if self._prepared_at is None:
            self._prepared_at = now
        elif now - self._prepared_at > (_QUIET_S if not sys.stderr.isatty() else 1.0):
            self._prepared_at = now
            if sys.stderr.isatty() and not self._quiet:
                print(f"\rpreparing {rows:,} rows ...", end="", file=sys.stderr, flush=True)
                self._line_open = True
            else:
                self.say(f"preparing {rows:,} rows ...")

    def account(self, audit: Audit) -> None:
        """What is trained, in the header of a run and in the audit alike."""
        if self._line_open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._line_open = False
        for name, lines in facts(audit):
            self.fact(name, *lines)

    def streamed(self, audit: Audit) -> None:
        """What became of the rows of a stream, as far as they were read in one epoch."""
        account = audit.accounts["train"]
        read = f"{account.rows:,} rows read in an epoch, {account.examples:,} examples"
        self.fact("stream", f"{read}, {account.supervised_tokens:,} trained tokens", *training_notes(audit))

    def kept(self, kept: KeptStates) -> None:
        """What became of the states that the layers below the adapters give."""
        damage = f"; {kept.damaged} damaged runs were made again" if kept.damaged else ""
        self.fact("kept", f"{len(kept):,} positions of the layers below the adapters in {kept.folder}{damage}")
        if kept.problem:
            self.say(f"{'':<9} no more was kept: {kept.problem}")

    def layout(self, what: Sequence[str], notes: Sequence[str]) -> None:
        self.fact("layout", *what, *notes)

    def memory(self, fit: Fit, machine: int) -> None:
        """What a run will need at most, and what there is."""
        need = fit.memory
        parts = [
            *([f"weights {size(need.weights)}"] if need.weights else []),
            f"{'adapters' if need.weights else 'parameters'} and optimizer {size(need.adapters + need.optimizer)}",
            f"activations {size(need.activations)}",
        ]
        parts += [f"logits {size(need.logits)}"] if need.logits > need.peak / 100 else []
        parts += [f"dequantised weights {size(need.dequantised)}"] if need.dequantised > need.peak / 100 else []
        self.fact("memory", f"about {size(need.peak)} at most; this machine has {machine / 1e9:.0f} GB", ", ".join(parts))
        if not fit.fits:
            self.say(f"{'':<9} WARNING: that does not fit; mlx-qlora plan says what to change")

    def plan(self, optim: OptimConfig, per_update: int, per_epoch: int | None, total: int, eval_every: int) -> None:
        own = optim.embedding_learning_rate
        apart = f", embeddings and head from {own:g}" if own is not None else ""
        warmup = f" after {optim.warmup_steps:,} of warm-up" if optim.warmup_steps else ""
        self.fact(
            "plan",
            f"{many(total, 'update')} of {many(per_update, 'example')}, "
            f"{f'{per_epoch:,} an epoch' if per_epoch else 'from a stream'}, "
            f"validation every {eval_every:,}",
            f"{optim.optimizer}, {optim.schedule} schedule from {optim.learning_rate:g}{apart}{warmup}",
        )

    def exposure(self, what: str, warnings: Sequence[str]) -> None:
        """What the run will see, and what to set where that is little."""
        self.fact("exposure", what, *(f"WARNING: {each}" for each in warnings))

    def resumes(self, found: Checkpoint, changes: Sequence[str]) -> None:
        self.fact("resume", f"from {found.folder.name}, after update {found.state['state']['step']:,}", *changes)

    def trackers(self, where: Sequence[str]) -> None:
        """Where others show the run."""
        if where:
            self.fact("trackers", *where)

    def begin(self, total: int, state: TrainState) -> None:
        self._total, self._begun = total, state
        self._last_line = time.monotonic()
        self.say()
        if self._quiet or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
            return
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, initial=state.step, unit="update", dynamic_ncols=True, bar_format=_BAR)

    def halved(self, positions: int) -> None:
        """Memory ended."""
        self.say(f"memory ended: from now on at most {positions:,} positions at once; the same examples are done again")

    def went_back(self, trouble: str, step: int, rate: float, number: int, most: int) -> None:
        self.say(
            f"{trouble} with a loss or a gradient that is not finite: "
            f"back to the checkpoint of update {step} with a learning rate of {rate:g} "
            f"({number} of at most {most} times)"
        )
        if self._bar is not None:
            self._bar.n = step

    def step(self, report: StepReport) -> None:
        parts = report.metrics if "kd" in report.metrics else {}
        what = " (" + ", ".join(f"{name} {parts[name]:.3f}" for name in ("kd", "ce")) + ")" if parts else ""
        figures = f"loss {report.loss:.3f}{what}, {report.tokens_per_second:,.0f} tok/s, {report.peak_memory_gb:.2f} GB"
        if self._bar is not None:
            with self._lasting():
                self._bar.set_postfix_str(figures, refresh=False)
                self._bar.update()
        elif time.monotonic() - self._last_line > _QUIET_S or report.step == self._begun.step + 1:
            self._last_line = time.monotonic()
            self.say(f"update {report.step}/{self._total}  {figures}, {duration(self._left(report))} left")

    def _left(self, report: StepReport) -> float:
        begun = self._begun
        made = max(1, report.step - begun.step)
        return (report.elapsed_s - begun.elapsed_s) / made * (self._total - report.step)

    def validation(self, report: EvalReport, patience: int, of_text: bool = False) -> None:
        if report.best and report.stale == 0:
            verdict = "best so far"
        else:
            most = f"/{patience}" if patience else ""
            verdict = f"{'best so far, but ' if report.best else ''}no improvement {report.stale}{most}"
        self.say(
            f"update {report.step:<5} val {report.val_loss:.4f}{_perplexity(report, of_text)}  "
            f"train {report.train_eval_loss:.4f}  gap {gap_text(report.gap, report.gap_se)} {grade(report.gap):<9}  {verdict}"
        )

    def samples(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """A line for each, what it was given in brackets."""
        width = min(_WIDEST, max(40, shutil.get_terminal_size().columns)) - 1
        for line in lines:
            prompt, text = (" ".join(str(line[name]).split()).translate(VISIBLE) for name in ("prompt", "text"))
            told = f"{'sample':<9} {f'[{prompt}] ' if prompt else ''}{text or '(nothing)'}"
            self.say(told if len(told) <= width else f"{told[: width - 3]}...")

    def end_bar(self) -> None:
        if self._bar is not None:
            with self._lasting():
                self._bar.close()
            self._bar = None

    def ended(self, how: str, steps: int, seconds: float) -> None:
        self.say()
        self.fact("ended", f"{how} after {many(steps, 'update')}, {duration(seconds)}")

    def best(self, report: EvalReport, epoch: float, file: Path, of_text: bool = False) -> None:
        self.fact(
            "best",
            f"val_loss {report.val_loss:.4f}{_perplexity(report, of_text)} at update {report.step} (epoch {epoch:.2f})",
            f"kept in {file.parent}",
        )

    def gap(self, gap: GapAnalysis) -> None:
        for name, lines in gap_facts(gap):
            self.fact(name, *lines)

    def answers(self, answered: Sequence[Answered], base: Scores | None, tuned: Scores, show: int = 3) -> None:
        self.fact(
            "answers",
            f"to {len(answered)} validation questions   token F1   exact",
            *([f"{'base model':<31} {base.token_f1:8.3f} {base.exact_match:8.3f}"] if base else []),
            f"{'fine-tuned' if base else 'the model':<31} {tuned.token_f1:8.3f} {tuned.exact_match:8.3f}",
        )
        for one in answered[:show]:
            self.say()
            for name, text in (
                ("question", one.question),
                ("expected", one.expected),
                ("before", one.base),
                ("after", one.tuned),
            ):
                if text is not None:
                    self.say(f"  {name:<9} {' '.join(text.split())[:100]}")

    def where(self, folder: Path, model: str, file: str, interrupted: Path | None = None, of_text: bool = False) -> None:
        """What lies where, and what comes next. `file`: the one with what was trained, in the folder; `interrupted`: the
        checkpoint from which it goes on."""
        template, best = folder / "chat_template.jinja", (folder / file).parent
        self.say()
        self.fact(
            "files",
            f"{best}: the best {best.name}{_as_loaded(best)}",
            f"{folder / 'training_metrics.jsonl'}, .json, .csv: every update and validation",
            f"{folder / 'training_summary.json'}: all of the above, for programs",
            *(
                [f"{template}: what it was trained with; beside a model's tokenizer it is its template"]
                if template.exists()
                else []
            ),
        )
        if interrupted:
            self.fact(
                "next",
                f"all of it is saved in {interrupted.name}; to go on:",
                f"mlx-qlora train --output-dir {shlex.quote(str(folder))} --resume",
            )
            return
        base = str(_from_here(own)) if (own := packaged(model)) else model
        quoted = shlex.quote(str(folder))
        measures = "perplexity, bits per byte, accuracy" if of_text else "questions, scores"
        self.fact(
            "next",
            *([f'mlx_lm.generate {used(best, base)} --prompt "..."'] if mlx_lm_loads(best) else []),
            f"mlx-qlora evaluate --run {quoted}: {measures}{', the base model beside it' if model else ''}",
            f"mlx-qlora report {quoted}: one page about it",
        )
        if model == EMBEDDED:
            self.say(f"{'':<9} and with a model and data of your own:")
            self.say(f"{'':<9} mlx-qlora train --model FOLDER_OR_NAME --data FOLDER --output-dir runs/first")


def many(count: int, what: str) -> str:
    """
    >>> many(1, "update"), many(2000, "update")
    ('1 update', '2,000 updates')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def used(best: Path, base: str) -> str:
    """The flags with which mlx-lm takes what a run has trained: a whole model, or adapters on their base."""
    own = shlex.quote(str(best))
    return f"--model {own}" if best.name == "model" else f"--model {shlex.quote(base)} --adapter-path {own}"


def _perplexity(report: EvalReport, of_text: bool) -> str:
    return f" (perplexity {report.perplexity:,.4g})" if of_text else ""


def mlx_lm_loads(best: Path) -> bool:
    """Whether mlx-lm knows what a run has trained; an LSTM it does not."""
    return json_object(best / "config.json").get("model_type") != LSTM


def _as_loaded(best: Path) -> str:
    return (
        f", as mlx-lm loads {'it' if best.name == 'model' else 'them'}"
        if mlx_lm_loads(best)
        else ", as mlx_qlora.load loads it"
    )


def _from_here(path: Path) -> Path:
    """Relative to the current folder where it lies in it, for lines that people copy."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


_BAR = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


def size(number: float) -> str:
    """Bytes as a person reads them."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """
    >>> duration(12.4), duration(125), duration(7260)
    ('12 s', '2 min 05 s', '2 h 01 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
