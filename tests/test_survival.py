"""A run that is killed, or whose disk fails, ends with the same bytes as one that was left alone.

Twenty kills and some faults of each kind; `make kills` (`kills.py`) does all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from kills import (
    CASES,
    Known,
    Trial,
    base,
    damaged,
    from_outside,
    in_the_middle,
    kills_at_calls,
    kills_at_instants,
    other_ways,
    power_cuts,
    refusals,
    short_writes,
    tried,
)
from trials import KILLED, Case, Run, Server, contents, outcome

from mlx_qlora.run import checkpoint


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    """As many trials at a time as there are cores, up to two."""
    servers = [Server() for _ in range(min(2, os.cpu_count() or 1))]
    yield servers
    for each in servers:
        each.close()


@pytest.fixture(scope="module")
def server(servers: list[Server]) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def one(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Known:
    """A run left alone, whose bytes are those of an ordinary process too."""
    return base(server, tmp_path_factory.mktemp("survival"))


def survived(trials: Sequence[Trial], servers: Sequence[Server]) -> int:
    """Do the trials; gives the kills."""
    results = tried(trials, servers)
    assert [f"{result.trial.name}: {result.broken}" for result in results if result.broken] == []
    return sum(trial.kills for trial in trials)


def one_of_each(trials: Sequence[Trial], sort: Callable[[Trial], str], most: int) -> list[Trial]:
    """Trials of different sorts, spread over the run."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(sort(trial), []).append(trial)
    chosen = [same[(3 * number) % len(same)] for number, same in enumerate(found.values())]
    return chosen[:: max(1, len(chosen) // most)][:most]


def _sort(trial: Trial) -> str:
    """What is done to which sort of file, whatever the update."""
    return re.sub(r"step\d+|epoch\d+|#\d+", "", f"{trial.kind} {trial.name}")


def test_twenty_kills_lose_nothing(servers: list[Server], one: Known) -> None:
    """After calls, before them, in the middle of writes, at any instant, in the middle of updates, twice in a row."""
    of_saves = [trial for trial in kills_at_calls(one) if "checkpoint_" in trial.name or "adapters/" in trial.name]
    others = [trial for trial in kills_at_calls(one) if trial not in of_saves]
    trials = [*one_of_each(of_saves, _sort, 7), *one_of_each(others, _sort, 3), *kills_at_instants(one, 3, seed=1)]
    trials += in_the_middle(servers[0], one, 45)[1:2]
    trials += other_ways(servers[0], one.case.root.parent, one.case.data, ["padded", "kept trunk"])
    assert survived(trials, servers) >= 20


def test_calls_that_fail_cost_nothing(one: Known, servers: list[Server]) -> None:
    """No space and a broken disk, once, for a while, and to the end; and writes of a few bytes."""
    at_saves = [trial for trial in refusals(one) if "checkpoint_" in trial.name or "jsonl" in trial.name]
    kinds = dict.fromkeys(trial.kind for trial in at_saves)
    trials = [trial for kind in kinds for trial in one_of_each([t for t in at_saves if t.kind == kind], _sort, 2)]
    survived([*trials, short_writes(one)[1]], servers)


def test_a_damaged_checkpoint_is_named_and_passed_over(one: Known, servers: list[Server]) -> None:
    looked, *resumed = damaged(one)
    survived([looked, resumed[0], resumed[4], resumed[-1]], servers)


def test_no_power_cut_leaves_less_than_the_last_save(one: Known, servers: list[Server]) -> None:
    survived([power_cuts(one, every=3, few=True)], servers)


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not there")
def test_the_wrapped_calls_are_all_that_the_kernel_is_asked_for(one: Known, servers: list[Server]) -> None:
    survived(from_outside(one)[::5], servers)


# Checkpoints of strangers


@pytest.fixture
def killed(server: Server, one: Known, request: pytest.FixtureRequest) -> Run:
    """A run that was killed while it saved its fifth update; checkpoints 3 and 4 are there."""
    case = Case(one.case.root.parent / request.node.name, one.case.data)
    run = case.at("killed")
    code, *_ = run.start(server, fault={"at": "create .checkpoint_epoch1_step5.tmp/SHA256SUMS#1", "do": "kill"})
    assert code == KILLED
    return run


def _signed(path: Path, **changed: object) -> None:
    """Change the state of a checkpoint, with a sum that fits."""
    state = json.loads((path / "state.json").read_text()) | changed
    raw = json.dumps({name: value for name, value in state.items() if value is not None}).encode()
    (path / "state.json").write_bytes(raw)
    lines = (path / "SHA256SUMS").read_text().splitlines()
    sum = hashlib.sha256(raw).hexdigest()
    lines = [f"{sum}  state.json" if line.endswith("state.json") else line for line in lines]
    (path / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def test_files_of_others_do_no_harm(server: Server, one: Known, killed: Run) -> None:
    newest = checkpoint.there(killed.folder)[0]
    (newest / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (killed.folder / "checkpoint_epoch9_step9.zip").write_bytes(b"PK")
    (killed.folder / "checkpoint_epoch1_step5").write_bytes(b"a file of this name")
    (killed.folder / "checkpoint_epoch1_step4.old").mkdir()
    code, said, _ = killed.start(server, "--resume")
    assert code == 0
    assert "checkpoint_epoch1_step5 is damaged and passed over" in said
    found = outcome(killed.folder)
    assert (found.files, found.metrics) == (one.reference.files, one.reference.metrics)


def test_a_future_format_is_refused_with_a_word(server: Server, killed: Run) -> None:
    _signed(checkpoint.there(killed.folder)[0], format=2)
    before = contents(killed.folder)
    code, said, _ = killed.start(server, "--resume")
    assert code == 2
    assert "has the format 2" in said
    assert "Traceback" not in said
    assert contents(killed.folder) == before


@pytest.mark.parametrize(
    "line", ["../../secret.txt", "../secret.txt", "/etc/passwd", "..", "state.json\0", "a/../../secret.txt"], ids=repr
)
def test_a_manifest_reads_nothing_outside(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that fits a file elsewhere is not even compared."""
    (tmp_path / "run").mkdir()
    path = checkpoint.save(tmp_path / "run", "checkpoint_epoch0_step1", {}, {})
    (tmp_path / "secret.txt").write_text("mine")
    (tmp_path / "run" / "secret.txt").write_text("mine")
    fits = hashlib.sha256(b"mine").hexdigest()
    with (path / "SHA256SUMS").open("a") as sums:
        sums.write(f"{fits}  {line}\n")
    opened: list[str] = []
    true = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *more, **others: (opened.append(str(self)), true(self, *more, **others))[1])
    with pytest.raises(ValueError, match=r"damaged|can't be read"):
        checkpoint.verified(path)
    assert not [each for each in opened if "secret" in each or "passwd" in each]


@pytest.mark.parametrize("state", [[], 7, {}, {"files": 3}, {"files": ["state.json", "adapters.safetensors"]}], ids=str)
def test_a_state_that_names_no_files_is_damaged(tmp_path: Path, state: object) -> None:
    path = checkpoint.save(tmp_path, "checkpoint_epoch0_step1", {}, {})
    raw = json.dumps(state).encode()
    (path / "state.json").write_bytes(raw)
    (path / "SHA256SUMS").write_text(f"{hashlib.sha256(raw).hexdigest()}  state.json\n")
    with pytest.raises(ValueError, match="name"):
        checkpoint.verified(path)


def test_every_case_of_the_nightly_form_is_a_configuration() -> None:
    from mlx_qlora import RunConfig
    from mlx_qlora.config import flat

    known = flat(RunConfig().plain()).keys()
    assert {name for settings in CASES.values() for name in flat(settings)} <= known
