"""One small training, what is left of it when it is killed, and whether going on with it gives the same bytes.

A trial starts a run, lets something happen to it (`faults.py`), looks at what lies in the folder, goes on with it, and
compares. What a run must end with is what it ended with when nothing happened, in an ordinary process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from faults import __file__ as faults_file
from safetensors.numpy import load as read_arrays

from mlx_qlora.assets import embedded_data
from mlx_qlora.run import checkpoint
from mlx_qlora.run.metrics import MEASURED

KILLED = -9
SETTINGS: dict[str, Any] = {
    "model": "embedded", "epochs": 2, "batch_size": 4, "token_budget": 60, "learning_rate": 5e-3, "eval_every": 2,
    "save_every": 1, "save_minutes": 0, "grad_checkpoint": "off",
    "lora": {"rank": 2, "scale": 4.0, "dropout": 0.1, "targets": ["self_attn.q_proj", "self_attn.v_proj"]},
}  # fmt: skip
# 6 updates of 4 examples, each of 2 to 4 batches; validation after every other one


def small_data(folder: Path) -> Path:
    """12 and 4 rows of the demo's data, without their system prompt, so that an update takes little time."""
    folder.mkdir(parents=True)
    for name, count in (("train", 12), ("valid", 4)):
        lines = (embedded_data() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [{"messages": [m for m in json.loads(line)["messages"] if m["role"] != "system"]} for line in lines]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


class Server:
    """A process that runs trials, one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, faults_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def run(self, **wanted: Any) -> tuple[int, float]:
        """(exit code, seconds); a signal's number is negative."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(wanted), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def environment() -> dict[str, str]:
    return os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Case:
    """A run that is to be tried: its settings, in a folder where its trials have theirs."""

    root: Path
    data: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def at(self, name: str) -> Run:
        folder = self.root / name
        folder.mkdir(parents=True)
        path = folder / "run.yaml"
        settings = {**SETTINGS, "data": str(self.data), "output_dir": str(folder / "run")}
        settings |= {"trunk_cache_dir": str(folder / "trunk"), "data_cache": str(folder / "prepared"), **self.settings}
        path.write_text(yaml.safe_dump(settings))
        return Run(folder / "run", path)


@dataclass(frozen=True)
class Run:
    """A training that is tried: its folder and its settings."""

    folder: Path
    settings: Path

    @property
    def log(self) -> Path:
        return self.folder.parent / "calls.log"

    def arguments(self, *more: str) -> list[str]:
        return ["--config", str(self.settings), *more]

    def in_own_process(self, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlx_qlora", "train", *self.arguments(*more)]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)

    def start(self, server: Server, *more: str, **how: Any) -> tuple[int, str, float]:
        """(exit code, what it said, seconds)."""
        out = self.folder.parent / "out.txt"
        code, seconds = server.run(
            arguments=self.arguments(*more), folder=str(self.folder), log=str(self.log), out=str(out), **how
        )
        said = out.read_text(encoding="utf-8", errors="replace") if out.exists() else ""  # killed before it said anything
        return code, said, seconds

    def calls(self) -> list[str]:
        """The calls that were made, over all its starts, by name."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def copied(self, name: str) -> Run:
        """The same, as it stands, in another folder of the case."""
        folder = self.folder.parent.parent / name
        shutil.copytree(self.folder.parent, folder)
        text = self.settings.read_text().replace(str(self.folder.parent), str(folder))
        (folder / "run.yaml").write_text(text)
        return replace(self, folder=folder / "run", settings=folder / "run.yaml")


class Broken(AssertionError):
    """What was promised did not hold."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


# What a run leaves


@dataclass(frozen=True)
class Outcome:
    """All of a run's results that must not depend on what happened to it."""

    files: dict[str, bytes]
    metrics: list[dict[str, Any]]
    state: dict[str, Any]
    names: tuple[str, ...]

    @property
    def names_but_checkpoints(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if not name.startswith("checkpoint_"))

    def difference(self, other: Outcome) -> str:
        """What is not the same; empty where all of it is."""
        odd = [name for name in {*self.files, *other.files} if self.files.get(name) != other.files.get(name)]
        odd += ["the metrics"] if self.metrics != other.metrics else []
        odd += [f"state.json: {key}" for key in self.state if self.state[key] != other.state.get(key)]
        odd += [f"in the folder: {name}" for name in sorted({*self.names} ^ {*other.names})]
        return ", ".join(sorted(odd))


# Of a checkpoint's state: time and memory, places, and random states that begin anywhere and that nothing draws from.
_TIMED = ("peak_memory_gb", "metrics", "config", "random")


def outcome(folder: Path) -> Outcome:
    """What a run ended with."""
    last = checkpoint.there(folder)[0]
    state = checkpoint.verified(last).state
    state["state"] = {name: value for name, value in state["state"].items() if name not in MEASURED}
    found = [*folder.joinpath("adapters").iterdir(), *last.glob("*.safetensors")]
    lines = [json.loads(line) for line in (folder / "training_metrics.jsonl").read_text().splitlines()]
    return Outcome(
        {str(path.relative_to(folder)): path.read_bytes() for path in found},
        [{name: value for name, value in line.items() if name not in MEASURED} for line in lines],
        {name: value for name, value in state.items() if name not in _TIMED},
        tuple(sorted(path.name for path in folder.iterdir() if path.name != "training_results.png")),  # trials draw none
    )


def examined(run: Run) -> int:
    """Look at what a killed run left: whole files only. Gives the updates that its newest checkpoint has, or 0."""
    folder = run.folder
    steps = []
    for path in checkpoint.there(folder):
        checkpoint.verified(path)  # a final name stands for a whole one
        steps.append(checkpoint.place(path)[:2])
    newest = max(steps, default=(0, 0))
    expect(newest >= _saved(run.calls()), f"{newest} is older than what was saved: {_saved(run.calls())}")
    adapters = folder / "adapters" / "adapters.safetensors"
    if adapters.exists():
        arrays = read_arrays(adapters.read_bytes())
        expect(bool(arrays) and all(np.isfinite(array).all() for array in arrays.values()), "adapters are not finite")
    for name in ("training_state.json", "training_metrics.json", "training_summary.json", "data_account.json"):
        if (folder / name).exists():
            json.loads((folder / name).read_text())
    if (folder / "training_metrics.jsonl").exists():
        whole = (folder / "training_metrics.jsonl").read_text().split("\n")[:-1]
        lines = [json.loads(line) for line in whole]
        follows = all(
            after["step"] == before["step"] + 1 or (after.get("rollbacks", 0) > before.get("rollbacks", 0))
            for before, after in pairwise([{"step": 0}, *lines])
        )
        expect(follows, "a line of the metrics is missing")
        expect(len(lines) >= newest[0], "the metrics end before the checkpoint")
    return newest[0]


_RENAMED = re.compile(r"rename \.checkpoint_epoch\d+_step(\d+)(?:_part(\d+))?\.tmp#\d+")


def _saved(calls: Sequence[str]) -> tuple[int, int]:
    """(updates, batches) of the newest checkpoint that got its name."""
    found = filter(None, map(_RENAMED.fullmatch, calls))
    return max(((int(one[1]), int(one[2] or 0)) for one in found), default=(0, 0))


# Trials


def survives(server: Server, run: Run, reference: Outcome, *faults: dict[str, Any]) -> None:
    """Start a run, let it be killed once for each of the faults (going on in between), go on to the end, and compare.

    Raises `Broken` if anything is lost that was saved, or differs.
    """
    more: tuple[str, ...] = ()
    newest = 0
    for fault in faults:
        how = {"kill_after": fault["after"]} if "after" in fault else {"fault": fault}
        code, said, _ = run.start(server, *more, **how)
        expect(code in (KILLED, 0), f"ended with {code}: {said[-400:]}")
        expect(code == KILLED or "after" in fault, f"{fault} did not happen")
        newest = examined(run)
        more = ("--resume",)
    goes_on(server, run, reference, newest)


def goes_on(server: Server, run: Run, reference: Outcome, newest: int = 0, older: bool = True) -> str:
    """Go on to the end, from update `newest` if that is not 0, and compare. Gives what the run said."""
    code, said, _ = run.start(server, "--resume")
    expect(code == 0, f"going on ended with {code}: {said[-400:]}")
    if newest:
        expect(f"_step{newest}" in said, f"it did not go on from update {newest}: {said[:2000]}")
    same_as(run, reference, older)
    return said


def same_as(run: Run, reference: Outcome, older: bool = True) -> None:
    """Whether a run ended as it should; `older`: with the same older checkpoints too."""
    found = outcome(run.folder)
    if not older:
        found, reference = (replace(each, names=each.names_but_checkpoints) for each in (found, reference))
    expect(found == reference, f"other than it was: {found.difference(reference)}")


def goes_wrong(server: Server, run: Run, reference: Outcome, fault: dict[str, Any]) -> None:
    """A call fails, and the process lives. What belongs to a save is told, and tried again: the run ends as if nothing had
    been. Anything else ends the run with a word, and it can be gone on with."""
    code, said, _ = run.start(server, fault=fault)
    expect(any(line.startswith(fault["do"].replace("full", "ENOSPC")) for line in run.calls()), f"{fault} did not happen")
    expect("Traceback" not in said, f"a traceback: {said[-600:]}")
    examined(run)
    if code == 0:
        same_as(run, reference, older=False)
        costs = ".checkpoint_" in fault["at"] and "_step" in fault["at"] and ".going" not in fault["at"]
        expect("WARNING" in said or not costs, "nothing was said of it")
    else:
        expect(code == 2, f"ended with {code}: {said[-400:]}")
        at_the_end = "the run is over" in said and fault["do"] == "full"
        expect(at_the_end or not in_training(fault["at"]), f"a save that failed ended the run: {said[-400:]}")
        expect("No space left" in said or "put/output error" in said, f"not said: {said[-400:]}")
        goes_on(server, run, reference, older=False)


def in_training(call: str) -> bool:
    """Whether a call belongs to what is saved while a run trains."""
    saved = (".checkpoint_", "adapters/", "training_metrics", "training_state")
    return any(part in call for part in saved) and call != "create training_metrics.jsonl#1"


# What a disk may do to files that were whole


def damages(path: Path) -> dict[str, bytes | None]:
    """Ways in which a file may be damaged: what is in it then (None: it is not there)."""
    whole = path.read_bytes()
    flips = {
        f"bit {bit} of byte {at} is another": whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
        for at, bit in ((0, 0), (9, 2), (len(whole) // 3, 7), (len(whole) // 2, 4), (len(whole) - 1, 2))
    }
    cuts = {f"cut to {size} bytes": whole[:size] for size in (0, 1, len(whole) // 2, len(whole) - 1)}
    return flips | cuts | {"a byte more": whole + b"\n", "zeros": bytes(len(whole)), "gone": None}


def damage(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def every_damage(run: Run) -> int:
    """Damage each file of the newest checkpoint in each way: it is named, and the one before is taken. Gives how often."""
    newest, before, *_ = checkpoint.there(run.folder)
    done = 0
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for how, content in damages(path).items():
            damage(path, content)
            found, problems = checkpoint.newest(run.folder)
            expect(found is not None and found.folder == before, f"{path.name} {how}: {found} was taken")
            expect(len(problems) == 1 and newest.name in problems[0], f"{path.name} {how}: {problems}")
            done += 1
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
    expect(checkpoint.verified(newest).folder == newest, "whole again")
    return done


def passed_over(server: Server, run: Run, reference: Outcome, count: int, file: str, how: str) -> None:
    """Damage a file of the newest so many checkpoints; the run goes on from the one before, or says that there is none."""
    found = checkpoint.there(run.folder)
    for each in found[:count]:
        damage(each / file, damages(each / file)[how])
    if count < len(found):
        said = goes_on(server, run, reference, checkpoint.place(found[count])[0], older=False)
        expect(said.count("is damaged and passed over") == count, f"not said: {said[:1000]}")
        return
    before = contents(run.folder)
    code, said, _ = run.start(server, "--resume")
    expect(code == 2 and "no checkpoint in" in said and "Traceback" not in said, f"{code}: {said[-1000:]}")
    now = contents(run.folder)
    changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
    expect(not changed, f"a run that was refused has changed {', '.join(changed)}")


def contents(folder: Path) -> dict[str, bytes]:
    """What the files hold, but for the lock, which is the kernel's, and for those that wait for a crash and hold nothing."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: raw for name, raw in found.items() if raw and name != ".lock"}


# From outside: what the kernel is asked for, by strace


_TRACED = "openat,write,pwrite64,fsync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir"


def straced(run: Run, *more: str) -> int:
    """Run in a process of its own under strace; gives its exit code. What it asked for is in `strace.txt`."""
    command = ["strace", "-f", "-y", "-qq", "-s", "200", "-o", str(run.folder.parent / "strace.txt"), *more]
    command += [] if more else ["--seccomp-bpf", "-e", f"trace={_TRACED}"]  # faster, but it can't inject
    command += [sys.executable, "-m", "mlx_qlora", "train", *run.arguments()]
    return subprocess.run(command, capture_output=True, env=environment(), timeout=300).returncode


def counted_outside(run: Run) -> Counter[str]:
    """How often the kernel was asked for what, for the files of checkpoints, adapters and metrics."""
    found: Counter[str] = Counter()
    for line in (run.folder.parent / "strace.txt").read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if not call or "= -1" in line:
            continue
        what, told = call[1], call[2]
        file = re.match(r"\d+<([^>]*)>", told)
        named = re.findall(r'"([^"]*)"', told)
        path = file[1] if file else ""
        if what not in ("write", "pwrite64", "fsync"):
            path = os.path.join(path, *named[:1])
        if what == "openat" and "O_CREAT" not in told:
            continue
        what = {"pwrite64": "write", "openat": "create", "mkdirat": "mkdir"}.get(what, what)
        what = "rename" if what.startswith("rename") else what
        if what == "unlinkat":
            what = "rmdir" if "AT_REMOVEDIR" in told else "unlink"
        if path.startswith(f"{run.folder}/"):
            found[f"{what} {os.path.relpath(path, run.folder)}"] += 1
    return _of_saves(found)


def counted_inside(calls: Sequence[str]) -> Counter[str]:
    """The same, by the functions of `os` that `faults.py` wraps."""
    return _of_saves(Counter(call.split("#")[0].replace("replace ", "rename ") for call in calls))


def _of_saves(found: Counter[str]) -> Counter[str]:
    saved = (".checkpoint_", "checkpoint_", "adapters", "training_metrics", ".training_")
    passing, drawn = ("open", "truncate"), ".training_results"
    return Counter(
        {
            name: number
            for name, number in found.items()
            for what, file in [name.split(" ")[:2]]
            if file.startswith(saved) and not file.startswith(drawn) and what not in passing
        }
    )
