"""The proof that a run survives: hundreds of kills and faults, each followed by going on and a comparison of bytes.

    make kills                          some 15 minutes on 2 quiet cores; benchmarks/results/kills.json
    python tests/kills.py --step 1      all of it

`tests/test_survival.py` takes a few of these with every `make test`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import power
from trials import (
    SETTINGS,
    Case,
    Outcome,
    Run,
    Server,
    counted_inside,
    counted_outside,
    every_damage,
    examined,
    expect,
    goes_on,
    goes_wrong,
    outcome,
    passed_over,
    same_as,
    small_data,
    straced,
    survives,
)

RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "kills.json"
_LORA = SETTINGS["lora"]
# Everything that a checkpoint has to carry, and every way of computing.
CASES: dict[str, dict[str, Any]] = {
    "saved at validations": {"save_every": None},
    "padded": {"layout": "padded"},
    "padded, compiled": {"layout": "padded", "compile": "on", "max_steps": 4},
    "plain": {"layout": "plain"},
    "kept trunk": {"lora": {**_LORA, "layers": 2}},
    "recomputed activations": {"grad_checkpoint": "on"},
    "streaming": {"streaming": True, "shuffle_buffer": 4, "max_steps": 6},
    "early stopping": {"eval_every": 1, "early_stopping": {"patience": 2, "min_delta": 100.0}, "epochs": 4},
    "sgd with momentum": {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}, "learning_rate": 0.5},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon"},
    "lion, warm-up, linear": {"optimizer": "lion", "warmup_steps": 4, "schedule": "linear"},
    "rollback": {
        "on_nonfinite": "rollback", "max_skipped_updates": 1, "rollback_factor": 1e-13, "learning_rate": 1e10,
        "schedule": "constant", "warmup_steps": 4, "clip_grad_norm": 0, "save_every": 2, "eval_every": 100,
    },
}  # fmt: skip
# What the run must have done for its case to be one.
WITNESSED: dict[str, Callable[[Outcome], bool]] = {
    "early stopping": lambda found: len(found.metrics) == 3,
    "rollback": lambda found: any("rollbacks" in line for line in found.metrics),
    "streaming": lambda found: len(found.metrics) == 6,
}


@dataclass(frozen=True)
class Trial:
    """Something that is done to a run; `kills` and `faults`: how often it is killed, and how many calls fail."""

    kind: str
    name: str
    do: Callable[[Server, Run], int | None]  # gives how many states were looked at, where that is more than one
    case: Case
    kills: int = 0
    faults: int = 0


@dataclass(frozen=True)
class Result:
    trial: Trial
    looked: int
    broken: str
    seconds: float


@dataclass(frozen=True)
class Known:
    """A case with what it ends with when nothing happens, and the calls that it makes."""

    case: Case
    reference: Outcome
    calls: tuple[str, ...]
    seconds: float

    def of(self, *kinds: str) -> list[str]:
        return [call for call in self.calls if call.split()[0] in kinds]


def known(server: Server, case: Case, own_process: bool = False) -> Known:
    """Run a case undisturbed, to have what to compare with; `own_process`: as a user does, and compare both."""
    run = case.at("undisturbed")
    code, said, seconds = run.start(server)
    expect(code == 0, f"{case.settings}: {said[-1000:]}")
    found = outcome(run.folder)
    if own_process:
        other = case.at("own_process")
        done = other.in_own_process()
        expect(done.returncode == 0, done.stderr)
        same_as(other, found)
    return Known(case, found, tuple(run.calls()), seconds)


def base(server: Server, root: Path) -> Known:
    return known(server, Case(root / "base", small_data(root / "data")), own_process=True)


def in_turn(calls: Sequence[str], step: int) -> list[str]:
    """Every call of the fourth save, which has all that a save can have (the best adapters, a checkpoint that goes), and
    of the beginning and the end of a run; of the other saves, which are the same, each `step`th."""
    others = [call for call in calls if re.search(r"step[12356](?!\.going)|\.training_\w+\.tmp\.\w+#[12356]", call)]
    left = set(others[::step])
    return [call for call in calls if call in left or call not in others]


# The trials


def kills_at_calls(one: Known, step: int = 1) -> list[Trial]:
    """SIGKILL after each call, before those that change names, and in the middle of each write."""
    calls = in_turn(one.calls, step)
    wanted = [(call, "kill") for call in calls]
    wanted += [(call, "before") for call in calls if call.split()[0] in ("rename", "replace", "unlink")]
    wanted += [(call, "half") for call in calls if call.startswith("write")]
    kinds = {"kill": "SIGKILL after a call", "before": "SIGKILL before a call", "half": "SIGKILL in the middle of a write"}
    return [_kill(kinds[do], one, {"at": call, "do": do}) for call, do in wanted]


def kills_at_instants(one: Known, count: int, seed: int = 0) -> list[Trial]:
    """SIGKILL whenever it may be, once or up to four times in a row."""
    rng = random.Random(seed)
    instants = [[{"after": rng.uniform(0, one.seconds)} for _ in range(1 if n % 3 else 3)] for n in range(count)]
    return [_kill("SIGKILL at a random instant", one, *each) for each in instants]


def _kill(kind: str, one: Known, *faults: dict[str, Any]) -> Trial:
    name = ", then ".join(f"{fault['do']} {fault['at']}" if "at" in fault else f"{fault['after']:.3f} s" for fault in faults)
    return Trial(kind, name, lambda server, run: survives(server, run, one.reference, *faults), one.case, kills=len(faults))


def refusals(one: Known) -> list[Trial]:
    """A call fails once; the disk is full for a while; it stays full."""
    wanted = [(call, {"do": "ENOSPC"}) for call in one.of("create", "write", "mkdir", "rename", "replace")]
    wanted += [(call, {"do": "EIO"}) for call in one.calls if not call.startswith("truncate")]
    spaced = one.of("create", "write", "mkdir")
    wanted += [(call, {"do": "full", "calls": calls}) for calls in (2, 9, 40) for call in spaced[calls % 5 :: 9]]
    wanted += [(call, {"do": "full"}) for call in spaced[::9]]
    kinds = {"ENOSPC": "a call fails with ENOSPC", "EIO": "a call fails with EIO", "full": "the disk is full for some calls"}

    def trial(call: str, how: dict[str, Any]) -> Trial:
        fault = {"at": call, **how}
        kind = kinds[how["do"]] if how["do"] != "full" or "calls" in how else "the disk is full to the end"
        return Trial(kind, str(fault), lambda server, run: goes_wrong(server, run, one.reference, fault), one.case, faults=1)

    return [trial(call, how) for call, how in wanted]


def short_writes(one: Known) -> list[Trial]:
    """Each write takes a few bytes only."""

    def do(server: Server, run: Run, most: int) -> None:
        code, said, _ = run.start(server, fault={"short": most})
        expect(code == 0 and "WARNING" not in said, said[-1000:])
        same_as(run, one.reference)

    return [
        Trial("short writes", f"{most} bytes", lambda server, run, most=most: do(server, run, most), one.case, faults=1)
        for most in (7, 1000, 65_537)
    ]


def damaged(one: Known) -> list[Trial]:
    """Bytes of checkpoints are flipped and cut."""
    case = replace(one.case, settings={**one.case.settings, "keep_checkpoints": 3})

    def killed(server: Server, run: Run) -> Run:
        code, *_ = run.start(server, fault={"at": "create .checkpoint_epoch1_step5.tmp/SHA256SUMS#1", "do": "kill"})
        expect(code == -9, f"ended with {code}")
        return run

    def looked_at(server: Server, run: Run) -> int:
        return every_damage(killed(server, run))

    def resumed(count: int, file: str, how: str) -> Callable[[Server, Run], None]:
        return lambda server, run: passed_over(server, killed(server, run), one.reference, count, file, how)

    wanted = [
        (1, "adapters.safetensors", "cut to 0 bytes"), (1, "state.json", "bit 0 of byte 0 is another"),
        (1, "SHA256SUMS", "gone"), (1, "SHA256SUMS", "cut to 0 bytes"), (2, "optimizer.safetensors", "zeros"),
        (2, "state.json", "gone"), (3, "optimizer.safetensors", "bit 0 of byte 0 is another"), (3, "SHA256SUMS", "gone"),
    ]  # fmt: skip
    trials = [
        Trial("damaged checkpoints, gone on", f"{count} newest: {file} {how}", resumed(count, file, how), case, faults=count)
        for count, file, how in wanted
    ]
    return [Trial("damaged checkpoints, looked at", "every file", looked_at, case), *trials]


def other_ways(server: Server, root: Path, data: Path, names: Sequence[str]) -> list[Trial]:
    """Each way of computing: killed twice in a row while it saves."""
    trials = []
    for name in names:
        one = known(server, Case(root / name, data, CASES[name]))
        expect(WITNESSED.get(name, lambda _: True)(one.reference), f"{name}: it did not happen")
        trials.append(_killed_twice(one, name))
    return trials


def _killed_twice(one: Known, name: str) -> Trial:
    calls = [call for call in one.calls if call.startswith(("rename .checkpoint_", "write .checkpoint_"))]
    first, second = calls[len(calls) // 3], calls[-4]
    trial = _kill("other ways to compute, killed twice", one, {"at": first, "do": "kill"}, {"at": second, "do": "half"})
    return replace(trial, name=f"{name}: {trial.name}")


def in_the_middle(server: Server, one: Known, step: int) -> list[Trial]:
    """Checkpoints in the middle of updates, after each batch: killed after each `step`th call."""
    case = replace(one.case, root=one.case.root.parent / "parts", settings={"save_minutes": 1e-9})
    run = case.at("undisturbed")
    code, said, _ = run.start(server)
    expect(code == 0, said[-1000:])
    same_as(run, one.reference, older=False)
    calls = [call for call in run.calls() if "_part" in call]
    expect(len(calls) > 100, "there are checkpoints in the middle of updates")

    def do(server: Server, run: Run, call: str) -> None:
        code, said, _ = run.start(server, fault={"at": call, "do": "kill"})
        expect(code == -9, said[-1000:])
        goes_on(server, run, one.reference, older=False)

    return [
        Trial("SIGKILL at saves in the middle of updates", call, lambda s, r, call=call: do(s, r, call), case, kills=1)
        for call in calls[::step]
    ]


def from_outside(one: Known) -> list[Trial]:
    """By strace: the wrapped functions are all that the kernel is asked for, and it kills at its calls."""

    def counts(server: Server, run: Run) -> None:
        expect(straced(run) == 0, "strace failed")
        seen, wrapped = counted_outside(run), counted_inside(one.calls)
        expect(seen == wrapped, f"only outside: {seen - wrapped}; only inside: {wrapped - seen}")
        same_as(run, one.reference)

    def killed(server: Server, run: Run, what: str, when: int) -> None:
        straced(run, "-e", f"trace={what}", "-e", f"inject={what}:signal=KILL:when={when}")
        expect(not (run.folder / "training_summary.json").exists(), "it was not killed")
        goes_on(server, run, one.reference, examined(run))

    calls = [("fsync", 9), ("fsync", 17), ("fsync", 31), ("rename", 2), ("rename", 9), ("rename", 20), ("unlinkat", 3)]
    return [
        Trial("counted from outside, by strace", "all calls", counts, one.case),
        *(
            Trial(
                "SIGKILL from outside, by strace", f"{what} {when}",
                lambda server, run, what=what, when=when: killed(server, run, what, when), one.case, kills=1,
            )
            for what, when in calls
        ),
    ]  # fmt: skip


def power_cuts(one: Known, every: int = 1, few: bool = False) -> Trial:
    """A recorded run on the worst disk."""

    def do(server: Server, run: Run) -> int:
        folder = run.folder.parent
        out, record = str(folder / "out.txt"), str(folder / "record")
        code, _ = server.run(arguments=run.arguments(), folder=str(folder), out=out, record=record)
        expect(code == 0, Path(out).read_text())
        same_as(run, one.reference)
        return power.cut_everywhere(Path(record), folder / "disk", every, few)

    return Trial("power cuts, states of a disk", f"after every {every} calls", do, one.case)


# All of it


def tried(trials: Sequence[Trial], servers: Sequence[Server], tell: Callable[[Result], None] = lambda _: None) -> list[Result]:
    """Do the trials, as many at a time as there are servers."""
    waiting: queue.Queue[tuple[int, Trial]] = queue.Queue()
    for numbered in enumerate(trials):
        waiting.put(numbered)
    results: list[Result] = []

    def work(server: Server) -> None:
        try:
            while True:
                number, trial = waiting.get_nowait()
                results.append(_tried(server, trial, f"{trial.kind} {number}"))
                tell(results[-1])
        except queue.Empty:
            pass

    threads = [threading.Thread(target=work, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _tried(server: Server, trial: Trial, name: str) -> Result:
    begun = time.monotonic()
    run = trial.case.at(name)
    try:
        looked, broken = trial.do(server, run) or 1, ""
        shutil.rmtree(run.folder.parent)
    except Exception as error:  # whatever it is, it is reported, and the folder stays to be looked at
        looked, broken = 1, f"{type(error).__name__}: {error}"
    return Result(trial, looked, broken, time.monotonic() - begun)


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each kind."""
    kinds = dict.fromkeys(result.trial.kind for result in results)
    rows = []
    for kind in kinds:
        own = [result for result in results if result.trial.kind == kind]
        rows.append(
            {
                "what": kind,
                "trials": len(own) if sum(result.looked for result in own) == len(own) else sum(r.looked for r in own),
                "kills": sum(result.trial.kills for result in own),
                "survived": sum(result.looked for result in own if not result.broken),
            }
        )
    return rows


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """As a table of Markdown."""
    lines = ["| what happens to the run | times | kills | survived |", "|---|---:|---:|---:|"]
    return "\n".join(lines + [f"| {r['what']} | {r['trials']:,} | {r['kills']:,} | {r['survived']:,} |" for r in rows])


def everything(server: Server, root: Path, instants: int, step: int) -> Iterator[Trial]:
    """All trials; `step`: of those that are alike only every so many-th."""
    one = base(server, root)
    yield from kills_at_instants(one, instants)
    yield from kills_at_calls(one, step)
    yield from refusals(one)[::step]
    yield from short_writes(one)
    yield from damaged(one)
    yield from other_ways(server, root, one.case.data, list(CASES))
    yield from in_the_middle(server, one, 4 * step)
    if shutil.which("strace"):
        yield from from_outside(one)
    yield power_cuts(one, every=step)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--instants", type=int, default=40, help="kills at random instants")
    parser.add_argument("--step", type=int, default=4, help="of what is alike, take every so many-th only; 1: all of it")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    begun = time.monotonic()
    servers = [Server() for _ in range(given.jobs)]
    trials = list(everything(servers[0], root, given.instants, given.step))
    print(f"{len(trials)} trials in {root}", flush=True)
    results = tried(trials, servers, _tell)
    for server in servers:
        server.close()
    rows = table(results)
    broken = [f"{r.trial.kind}: {r.trial.name}: {r.broken}" for r in results if r.broken]
    print(shown(rows))
    seconds = time.monotonic() - begun
    print(f"{sum(row['kills'] for row in rows)} kills; {seconds / 60:.0f} minutes; {len(broken)} broken")
    given.out.write_text(json.dumps(_kept(rows, broken, seconds, given), indent=2) + "\n")
    if not broken:
        shutil.rmtree(root)
    return 1 if broken else 0


def _tell(result: Result) -> None:
    if result.broken:
        print(f"BROKEN {result.trial.kind}: {result.trial.name}: {result.broken}", flush=True)


def _kept(rows: list[dict[str, Any]], broken: list[str], seconds: float, given: argparse.Namespace) -> dict[str, Any]:
    return {
        "what": "kills and faults in a training on the embedded model, each gone on with and compared byte by byte",
        "command": f"make kills  (python tests/kills.py --jobs {given.jobs} --instants {given.instants} --step {given.step})",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "processor": _processor()},
        "versions": {name: version(name) for name in ("mlx-qlora", "mlx", "mlx-lm", "numpy", "safetensors")}
        | {"python": platform.python_version()},
        "seconds": round(seconds),
        "rows": rows,
        "broken": broken,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())
