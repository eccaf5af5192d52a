"""`mlx-qlora doctor`: what is wrong here, with the machine, with a model, or with a run that died.

MLX may be what is broken, so this process never imports it: what needs it is done in processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mlx_qlora.assets import EMBEDDED
from mlx_qlora.errors import ConfigError, MlxQloraError
from mlx_qlora.findings import Finding, fail, ok, size, warn
from mlx_qlora.look.doctor import bundle, checkup
from mlx_qlora.look.doctor.remedies import remedy_of
from mlx_qlora.look.doctor.watched import Ended, Watched
from mlx_qlora.model import backend
from mlx_qlora.model.inspect import Place, inspect, locate

_CHILD = "mlx_qlora.look.doctor.smallest"
_INDENT = 18
_WIDEST = 140  # further than that, eyes lose the line
_UNIT = re.compile(r"(\d) (?=(?:B|kB|MB|GB|ms|s)\b)")
_COMMANDS = ("hf ", "pip ", "sudo ", "ulimit ", "export ", "mlx_lm.", "mlx-qlora ")
_BREAKS = {"files", "config", "weights", "index", "checksums", "kind", "tokenizer"}  # if they fail, no step can be tried


@dataclass(frozen=True)
class _Arguments:
    """Check the machine and do the smallest training step, phase by phase; or explain how a run died."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = ""
    """The folder of a run: how it ended, and what to do. Without it this machine is checked."""
    model: str = ""
    """The model to look at and to try: a folder, or a downloaded one of the hub. Without it that of RUN, or: embedded."""
    bundle: str = ""
    """Write one file to attach to a bug report, without any data in it; with RUN that run's figures, too."""
    json: str = ""
    """Write the checks for programs, too."""
    fast: bool = False
    """Leave out the checksums of the model's files, for which every byte is read."""


def main(arguments: Sequence[str]) -> int:
    """0: nothing failed; 2: something did, or the input is wrong."""
    try:
        return _run(tyro.cli(_Arguments, prog="mlx-qlora doctor", args=arguments))
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MlxQloraError, OSError) as error:
        print(f"mlx-qlora doctor: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmlx-qlora doctor: interrupted", file=sys.stderr)
        return 130


def _run(given: _Arguments) -> int:
    for name, path in (("bundle", given.bundle), ("json", given.json)):
        if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise ConfigError(f"--{name} {path}: a file in a folder that is there is expected.")
    run = Path(given.run).expanduser() if given.run else None
    if run and not run.is_dir():
        raise ConfigError(f"{given.run}: there is no such folder. Name the folder of a run, the --output-dir of train.")
    sheet = _Sheet()
    if run:
        print("\n".join(_explained(run)))
        if not given.bundle and not given.json:
            return 0
        sheet.say("\nchecking the machine, too, for what was asked for:\n")
    place = _examine(given.model or _model_of(run) or EMBEDDED, given.fast, sheet)
    sheet.conclude()
    if given.json:
        Path(given.json).write_text(json.dumps(sheet.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sheet.say(f"json: {given.json}")
    if given.bundle:
        folder = place.folder if place else None
        names = bundle.write(Path(given.bundle), sheet.to_json(), checkup.versions(), folder, run)
        sheet.say(f"bundle: {given.bundle}, with {', '.join(names)}")
        sheet.say("No rows, texts or tokens are in it, nor names of you or your machine; look through it before you send it.")
    return 2 if sheet.count("FAIL") and not run else 0


def _explained(run: Path) -> list[str]:
    """How a run ended, in words."""
    from mlx_qlora.look.doctor.autopsy import explain  # late: it needs more than the checks do

    return list(explain(run).lines)


def _model_of(run: Path | None) -> str:
    """The model that a run names, if it says so."""
    import yaml

    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if run else {}
    except (OSError, ValueError, yaml.YAMLError):
        config = {}
    return str(config.get("model") or "") if isinstance(config, dict) else ""


def _examine(model: str, fast: bool, sheet: _Sheet) -> Place | None:
    """All checks in order, each printed as it comes. Gives where the model lies."""
    for finding in checkup.machine():
        sheet.add(finding)
    computes = _try_device(sheet)
    sheet.say(f"\nmodel {model}")
    place = locate(model)
    if isinstance(place, Finding):
        sheet.add(place)
        return None
    before = len(sheet.findings)
    for finding in inspect(place, fast=fast, progress=sheet.progress):
        sheet.add(finding)
        if finding.name == "weights" and finding.verdict == "ok" and computes:
            sheet.add(_fits(finding.figures["bytes"], sheet))
    if not computes:
        sheet.say("\nThe smallest training step is left out: MLX does not compute here.")
        return place
    if not any(each.name in ("files", "config") and each.verdict == "FAIL" for each in sheet.findings[before:]):
        _children(sheet, "tokenizer", "tokenizer", str(place.folder))
    if any(each.name in _BREAKS and each.verdict == "FAIL" for each in sheet.findings[before:]):
        sheet.say("\nThe smallest training step is left out, for what failed above.")
        return place
    _smallest_step(sheet, place)
    return place


def _try_device(sheet: _Sheet) -> bool:
    if problem := backend.missing_mlx():
        what, _, remedy = problem.partition(". ")
        sheet.add(fail("device", what, remedy))
        return False
    return _children(sheet, "device", "device")


def _children(sheet: _Sheet, name: str, *arguments: str) -> bool:
    """Findings of a process of its own; says whether all is well."""
    work = Watched(_CHILD, arguments, sheet.still)
    failed = sheet.count("FAIL")
    for message in work:
        sheet.add(Finding(**message["finding"]))
    if work.ended.how:
        sheet.add(fail(name, f"the process that tried it {_last(work.ended)}", _remedy(name, work.ended)))
    return sheet.count("FAIL") == failed


def _last(ended: Ended) -> str:
    """How it ended, and its last word: an import that fails says which library is missing."""
    lines = [line.strip() for line in ended.last_words.splitlines() if line.strip()]
    return f"{ended.how}{f': {lines[-1][:300]}' if lines and not ended.signal else ''}"


def _remedy(phase: str, ended: Ended) -> str:
    if not ended.signal and phase == "device":
        return "MLX can't be used. Install it anew: pip install --force-reinstall mlx, with mlx-cpu or mlx-cuda-13 on Linux."
    return remedy_of(phase, ended.how)


def _fits(bytes: int, sheet: _Sheet) -> Finding:
    """Weights against the memory that is free; what a run needs beside them, `plan` says."""
    gpu = any(each.figures.get("gpu") for each in sheet.findings)
    free = None if gpu and sys.platform == "linux" else checkup.available_memory()
    if free is not None and bytes > 0.8 * free:
        return warn(
            "fits",
            f"the weights take {size(bytes)}, and {size(free)} of memory are free",
            "Close other programs, or take a smaller or a 4-bit model. mlx-qlora plan says what a run would need.",
        )
    return ok("fits", f"{size(bytes)} of weights{f' into {size(free)} of free memory' if free is not None else ''}")


def _smallest_step(sheet: _Sheet, place: Place) -> None:
    """The step in its own process; each phase's name is printed before it begins, so that a crash shows where."""
    sheet.say("\nthe smallest training step: one row of 32 tokens, rank 4")
    sheet.say(f"  {'phase':<11}{'time':>9}{'active':>10}{'peak':>10}   what")
    work = Watched(_CHILD, ("step", str(place.folder)), sheet.still)
    phase, open_, failed = "start", False, False
    for message in work:
        if "begin" in message:
            phase, open_ = message["begin"], True
            sheet.begin(phase)
        elif "done" in message:
            open_ = False
            sheet.done(message)
        elif "failed" in message:
            open_, failed = False, True
            sheet.failed(phase, message["error"], message["remedy"])
    if work.ended.how and not failed:
        if not open_:
            sheet.begin(phase)
        sheet.failed(phase, _last(work.ended), _remedy(phase, work.ended), work.ended.last_words)


class _Sheet:
    """Prints findings as they come and keeps them."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.steps: list[dict[str, Any]] = []
        self._terminal = sys.stdout.isatty()
        self._open = False  # a passing line is on the screen
        self._line = ""  # the beginning of a phase's line
        self._width = min(_WIDEST, shutil.get_terminal_size().columns) if self._terminal else 10_000

    def say(self, text: str) -> None:
        self._clear()
        print(text, flush=True)

    def add(self, finding: Finding) -> None:
        self._clear()
        self.findings.append(finding)
        print(self._wrapped(f"{finding.verdict:<4}  {finding.name:<{_INDENT - 7}} ", finding.found), flush=True)
        self._advise(finding.remedy)

    def count(self, verdict: str) -> int:
        return sum(each.verdict == verdict for each in self.findings)

    def progress(self, file: str, done: int, whole: int) -> None:
        """How far a large file is read; only a terminal sees it."""
        if self._terminal and whole > 1e8:
            self._passing(f"  checking {file}: {size(done)} of {size(whole)}")

    def still(self, seconds: float) -> None:
        """Silence is said to be work."""
        if self._terminal:
            self._passing(f"  still at work after {seconds:.0f} s ...")
        else:
            print(f"still at work after {seconds:.0f} s ...", file=sys.stderr, flush=True)

    def begin(self, phase: str) -> None:
        self._clear()
        self._line = f"  {phase:<11}"
        print(self._line, end="", flush=True)

    def done(self, message: dict[str, Any]) -> None:
        """The rest of a phase's line."""
        self._resume()
        peak = max(message["active_bytes"], message["peak_bytes"])
        shape = f"{' x '.join(map(str, message['shape']))}  " if message["shape"] else ""
        figures = f"{_seconds(message['seconds']):>9}{size(message['active_bytes']):>10}{size(peak):>10}   "
        self._finish(figures, f"{shape}{message['note']}")
        self.steps.append({"phase": message.pop("done"), **message})
        if message["doubt"]:
            self.add(warn("step", message["doubt"], message["remedy"]))

    def failed(self, phase: str, error: str, remedy: str, words: str = "") -> None:
        """The end of the table. What native code left on stderr says which function it was in."""
        self._resume()
        self._finish("FAIL  ", error)
        self.steps.append({"phase": phase, "error": error})
        for line in _worth(words):
            print(self._wrapped(" " * _INDENT, line))
        self._advise(remedy)
        self.findings.append(
            fail("step", f"{phase}: {error}", remedy, last_words=[bundle.stacks(line) for line in _worth(words)])
        )

    def conclude(self) -> None:
        failed, warned, good = (self.count(verdict) for verdict in ("FAIL", "warn", "ok"))
        self.say("")
        if failed:
            self.say(f"{failed} failed, {warned} to look at, {good} ok. What to do stands below each.")
        else:
            trained = " A whole training step went through." if self.steps else ""
            self.say(f"Nothing failed, {warned} to look at, {good} ok.{trained}")

    def to_json(self) -> dict[str, Any]:
        return {"failed": self.count("FAIL"), "checks": [each.to_json() for each in self.findings], "step": self.steps}

    def _finish(self, figures: str, text: str) -> None:
        wrapped = self._wrapped(f"{self._line}{figures}", text)
        print(wrapped.removeprefix(self._line), flush=True)

    def _wrapped(self, head: str, text: str) -> str:
        """The text beside its head, further lines below it."""
        indent = min(len(head), _INDENT if len(head) <= _INDENT else len(head))
        whole = textwrap.wrap(
            _UNIT.sub("\\1\xa0", text),
            max(40, self._width),
            initial_indent=head,
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        return "\n".join(whole).replace("\xa0", " ") or head

    def _advise(self, remedy: str) -> None:
        """What to do. A command at its end that would be broken gets a line of its own, which can be copied whole."""
        head = f"{'':<{_INDENT}}-> "
        text, _, command = remedy.rpartition(": ")
        if text and command.startswith(_COMMANDS) and len(head) + len(remedy) > self._width:
            print(f"{self._wrapped(head, text)}:\n{'':<{len(head)}}{command}", flush=True)
        elif remedy:
            print(self._wrapped(head, remedy), flush=True)

    def _passing(self, text: str) -> None:
        """A line that the next one takes the place of; a phase's line that is open is written again after it."""
        print(f"\r\x1b[K{text[: self._width - 1]}", end="", flush=True)
        self._open = True

    def _clear(self) -> None:
        if self._open:
            print("\r\x1b[K", end="", flush=True)
            self._open = False

    def _resume(self) -> None:
        if self._open:
            self._clear()
            print(self._line, end="", flush=True)


def _worth(words: str) -> list[str]:
    """Of what a process left on stderr: the fault and its innermost frames, or the last lines."""
    lines = [line.rstrip() for line in words.splitlines() if line.strip()]
    start = next((number for number, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    if start is not None:
        frames = [line for line in lines[start:] if line.startswith("  File")][:3]
        return [lines[start], *frames]
    return lines[-4:]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
