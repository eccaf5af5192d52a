"""One configuration with several seeds: a run and an evaluation for each, every one a process of its own, so that memory
is fresh and the death of one does not lose the others. Every folder that comes of it is an ordinary run."""

from __future__ import annotations

import hashlib
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from mlx_qlora.config import SEEDS, RunConfig, from_yaml
from mlx_qlora.errors import ConfigError, ResumeError, RunFolderError
from mlx_qlora.evaluating import Wanted
from mlx_qlora.files import json_object
from mlx_qlora.going import FINISHED, NOT_FINITE, STOPPED
from mlx_qlora.look.comparison.seeds import NAME, told
from mlx_qlora.look.console import Console
from mlx_qlora.look.evaluation.written import REPORT
from mlx_qlora.resume import changed
from mlx_qlora.run import disk, recorder
from mlx_qlora.run import folder as run_folder
from mlx_qlora.run.child import STOPS, Child, Patience, caught, suspend

_INTERRUPTED = 130
_WRONG = 2  # input: it would be wrong for every seed
_OFF = "off"
_NAMES = {"metric": "metrics", "limit": "harness_limit"}  # of evaluate's flags, where they are others
# What evaluate takes from the run.
_OWN = {
    "run", "model", "adapters", "output", "source", "render", "base_model", "matmul", "notes", "split_seed", "trained_in",
    "trained_whole", "whole",
}  # fmt: skip


@dataclass(frozen=True)
class _One:
    """A seed among the others."""

    seed: int
    folder: Path
    name: str  # seed 123, 2 of 3

    @property
    def ended(self) -> str:
        """How its training has ended; empty while it has not."""
        summary = json_object(self.folder / "training_summary.json").get("ended")
        record = recorder.read(self.folder)
        return str(summary or (record.ended if record else ""))

    @property
    def over(self) -> bool:
        """Whether training it again would change nothing."""
        return self.ended in (FINISHED, STOPPED, NOT_FINITE)


def repeat(config: RunConfig, console: Console) -> int:
    """Train and evaluate once for each seed, and say what they come to. Gives the exit code: 0 done, 2 wrong input, 3 a guard
    has stopped a seed, 1 one died or was not evaluated, 130 interrupted."""
    config.require_complete()
    told_evaluate = _flags(config.seeds_evaluate)
    folder = Path(config.output_dir).expanduser()
    _require_free(folder, config)
    seeds = config.each_seed
    ones = [_One(s, folder / f"seed_{s}", f"seed {s}, {n} of {len(seeds)}") for n, s in enumerate(seeds, 1)]
    with run_folder.locked(folder), caught() as signals:
        disk.write_atomically(folder / SEEDS, _kept(config).to_yaml())
        _say_plan(ones, told_evaluate, folder, console)
        codes = []
        for number, one in enumerate(ones):
            code = _train(one, config, signals, console)
            if code == 0 and told_evaluate is not None:
                base = (
                    [] if number == 0 or "--no-base" in told_evaluate else ["--no-base"]
                )  # the base model is the same for all
                flags = ["--max-answer-tokens", str(config.max_answer_tokens), *base, *told_evaluate]
                code = _evaluate(one, flags, folder, signals, console)
            if code == _INTERRUPTED:
                _say_interrupted(one, folder, console)
                return code
            if code == _WRONG and not one.ended:
                return code
            codes.append(code)
        _report(folder, seeds, console)
    return next((code for code in (3, 1, 2) if code in codes), 0)


# Before anything runs


def _flags(words: Sequence[str]) -> list[str] | None:
    """What `evaluate` is told, from words as split=test; None: nothing is evaluated."""
    if tuple(words) == (_OFF,):
        return None
    kinds = get_type_hints(Wanted)
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        kind = kinds.get(_NAMES.get(name, name))
        if not equals or kind is None or name in _OWN:
            known = ", ".join(sorted({*_NAMES, *kinds} - {*_NAMES.values(), *_OWN}))
            raise ConfigError(
                f"seeds_evaluate: {word!r} came; off is expected, or name=value, as split=test, with one of what evaluate is "
                f"told: {known}."
            )
        found += _flag(word, name, value, kind)
    return found


def _flag(word: str, name: str, value: str, kind: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"seeds_evaluate: {word!r} came; {name}=true or {name}=false is expected.")
        return [flag if value.lower() == "true" else f"--no-{flag[2:]}"]
    try:
        with redirect_stderr(StringIO()):  # tyro draws a box for some
            tyro.cli(kind, args=[value], console_outputs=False)
    except SystemExit:
        raise ConfigError(f"seeds_evaluate: {word!r} came; {value!r} is nothing that {name} can be.") from None
    return [flag, value]


def _require_free(folder: Path, config: RunConfig) -> None:
    """Raise if the folder can't be used for these runs. Changes nothing."""
    run_folder.check_free(folder, overwrite=True)
    if held := run_folder.held_by_a_run(folder):
        raise RunFolderError(
            f"output_dir: {folder} holds a run itself ({', '.join(held[:3])}); those of seeds go into folders below it. "
            "Name another folder with --output-dir."
        )
    there = [str(seed) for seed in config.each_seed if run_folder.held_by_a_run(folder / f"seed_{seed}")]
    if there and not (config.overwrite or config.resume):
        raise RunFolderError(
            f"output_dir: {folder} holds runs of the seeds {', '.join(there)} already. Go on with them with --resume, name "
            "another folder with --output-dir, or replace them with --overwrite."
        )
    if config.resume and (folder / SEEDS).is_file():
        before = replace(from_yaml(folder / SEEDS, RunConfig()), output_dir=config.output_dir)
        if differ := changed(before, config):
            lines = "\n".join(f"  {line}" for line in differ)
            raise ResumeError(
                f"resume: the runs in {folder} were begun with other settings:\n{lines}\n"
                "Several seeds are of one configuration. Leave the settings out, and those of the runs are taken, or name "
                "another folder with --output-dir."
            )


def _kept(config: RunConfig) -> RunConfig:
    """What a later start goes on with."""
    return replace(config, overwrite=False, resume=False, resume_anyway=False)


def _say_plan(ones: Sequence[_One], flags: Sequence[str] | None, folder: Path, console: Console) -> None:
    runs = "1 run" if len(ones) == 1 else f"{len(ones)} runs, one after the other"
    evaluated = "none is evaluated" if flags is None else "each is evaluated right after its training"
    console.fact("seeds", f"{', '.join(str(one.seed) for one in ones)}: {runs}; {evaluated}")
    console.fact("", *(str(one.folder) for one in ones), f"{folder / NAME} in the end, with the mean of all")


# A seed


def _train(one: _One, config: RunConfig, signals: deque[int], console: Console) -> int:
    if one.over and config.resume:
        console.say(f"\n{one.name}: it ended before ({one.ended}), and is not trained again")
        return 3 if one.ended == NOT_FINITE else 0
    console.say(f"\n{one.name}: training into {one.folder}")
    how = [f"--{name.replace('_', '-')}" for name in ("overwrite", "resume", "resume_anyway") if getattr(config, name)]
    kept = str(one.folder.parent / SEEDS)
    own = ["--seeds", "--seed", str(one.seed), "--output-dir", str(one.folder)]
    code = _attended(["train", "--config", kept, *own, *how], signals)
    if code not in (0, _WRONG, _INTERRUPTED):
        console.say(f"{one.name}: its training ended with {_exit(code)}; the other seeds go on")
    return code if code in (0, _WRONG, 3, _INTERRUPTED) else 1


def _evaluate(one: _One, flags: Sequence[str], folder: Path, signals: deque[int], console: Console) -> int:
    """As `mlx-qlora evaluate` does; what was evaluated like that before stays."""
    asked = one.folder / run_folder.EVALUATED_AS
    weights = run_folder.delivered(one.folder)
    now = {"flags": [each for each in flags if each != "--no-base"], "weights": weights and _digest(weights)}
    if json_object(asked) == now and (one.folder / REPORT).is_file():
        console.say(f"{one.name}: evaluated before")
        return 0
    console.say(f"\n{one.name}: mlx-qlora evaluate {shlex.join(['--run', str(one.folder), *flags])}")
    code = _attended(["evaluate", "--run", str(one.folder), *flags], signals)
    if code == 0:
        disk.write_json(asked, now)
    elif code != _INTERRUPTED:
        console.say(f"{one.name}: its evaluation ended with {_exit(code)}")
    return code if code in (0, _INTERRUPTED) else 1


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _attended(arguments: Sequence[str], signals: deque[int]) -> int:
    """A child's exit code. It gets each signal once; 130 where somebody wanted the end, whether or not it was done by then."""
    if any(number in STOPS for number in signals):
        return _INTERRUPTED
    child, stopped, tick_s = Child([sys.executable, "-m", "mlx_qlora", *arguments]), False, Patience().tick_s
    while (code := child.poll()) is None:
        if signals:
            number = signals.popleft()
            stopped |= number in STOPS
            if number == signal.SIGTSTP:
                suspend(child)
            else:
                child.send(number)
        time.sleep(tick_s)
    return _INTERRUPTED if stopped or -code in STOPS else code


# What is said


def _say_interrupted(one: _One, folder: Path, console: Console) -> None:
    again = shlex.join(["mlx-qlora", "train", "--output-dir", str(folder), "--resume"])
    console.say(f"\n{one.name}: interrupted; what it has saved is in {one.folder}")
    console.say(f"to go on with it and the seeds after it: {again}")


def _report(folder: Path, seeds: Sequence[int], console: Console) -> None:
    found = told(folder, seeds)
    disk.write_json(folder / NAME, found.to_json())
    console.say()
    for line in found.lines():
        console.say(line)
    console.fact("files", str(folder / NAME))
    console.fact(
        "compare",
        f"mlx-qlora compare {shlex.quote(str(folder))} ANOTHER sets them beside others",
    )
