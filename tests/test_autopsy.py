"""The autopsy on runs that really died, and on what other systems would have left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_qlora.look.doctor import autopsy, evidence
from mlx_qlora.look.doctor.autopsy import Autopsy, explain
from mlx_qlora.run import machine
from mlx_qlora.run.recorder import NAME, Recorder, read
from mlx_qlora.run.supervise import Death, _Journal

BEGIN = """
import ctypes, os, resource, signal, sys, time
from pathlib import Path
from mlx_qlora.run import machine
from mlx_qlora.run.recorder import Recorder
from mlx_qlora.run.watchdog import watching
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
folder = Path(sys.argv[1])
recorder = Recorder(folder, "mlx-qlora train --demo")
recorder.enter("forward", update=202, ids=tuple(f"train.jsonl:{n}" for n in range(8)), budget=4096)
recorder.enter("backward", part=1, parts=2, shape="1 x 812 tokens, 95 places")
def tell(text): print(text, flush=True)
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""
WHERE = "where     update 202 of 900, part 1 of 2, backward of 1 x 812 tokens, 95 places"


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel of this machine says about others' processes is not asked."""
    monkeypatch.setattr(machine, "kernel_log", list)
    monkeypatch.setattr(machine, "out_of_memory_kills", lambda: 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint and a configuration."""
    made = tmp_path / "a run"
    for name in ("checkpoint_epoch0_step50", "checkpoint_epoch0_step200", "checkpoint_epoch1_step", "adapters"):
        (made / name).mkdir(parents=True)
    (made / "checkpoint_epoch9_step999").write_text("a file")
    settings = {"model": "embedded", "data": "my data", "learning_rate": 3e-4, "max_seq_length": 512}
    (made / "config.yaml").write_text(yaml.safe_dump(settings))
    (made / "training_state.json").write_text(json.dumps({"planned_steps": 900}))
    return made


def run(folder: Path, code: str) -> int:
    done = subprocess.run([sys.executable, "-c", BEGIN + code, str(folder)], capture_output=True, text=True, timeout=60)
    assert not done.stderr or done.returncode < 0, done.stderr
    return done.returncode


def told(found: Autopsy, part: str) -> bool:
    return any(part in line for line in found.lines)


def tries(found: Autopsy) -> list[str]:
    """What is to be tried, in order."""
    start = next(number for number, line in enumerate(found.lines) if line.startswith("try"))
    return [line[13:] for line in found.lines[start::2]]


def test_a_killed_run_says_where_when_and_what_to_do(folder: Path) -> None:
    assert run(folder, "with watching(recorder, folder, tell): die()") == -signal.SIGKILL
    found = explain(folder)
    assert (found.outcome, found.cause) == ("died", "killed")
    assert found.lines[0] == f"{folder}: the run died without a word"
    assert found.lines[1] == WHERE
    assert told(found, "with the examples train.jsonl:0, train.jsonl:1")
    assert told(found, "... (8 in all)")
    assert told(found, "last sign of life 20")
    assert told(found, "were left; this process had ") or sys.platform == "darwin"
    assert told(found, "Memory can't be ruled out")
    assert told(found, "checkpoint_epoch0_step200; 1 update after it is lost")
    assert tries(found)[0] == f"mlx-qlora train --output-dir '{folder}' --resume"
    assert tries(found)[2] == f"mlx-qlora train --output-dir '{folder}' --resume --token-budget 2048"


def test_memory_that_was_nearly_full_is_the_likely_cause(folder: Path) -> None:
    code = """
machine.available_memory = lambda: (300_000_000, 16_000_000_000)
machine.mlx_memory = lambda: {"active": 12_000_000_000, "peak": 13_000_000_000, "cache": 0}
with watching(recorder, folder, tell): die()
"""
    run(folder, code)
    found = explain(folder)
    assert (found.outcome, found.cause) == ("died", "memory")
    assert told(found, "most likely for want of memory")
    assert told(found, "MLX 12.00 GB in use, 13.00 GB at most so far")
    assert told(found, "only 300 MB of 16.00 GB were left (2%)")
    resume = f"mlx-qlora train --output-dir '{folder}' --resume"
    assert tries(found) == [
        f"{resume} --token-budget 2048",
        f"{resume} --token-budget 2048 --grad-checkpoint on",
        f"{resume} --supervise 5",
        f"mlx-qlora train --config '{folder}/config.yaml' --output-dir '{folder}' --overwrite --max-seq-length 256",
    ]


def test_a_gpu_that_was_nearly_full_is_a_cause_too(folder: Path) -> None:
    code = """
machine.gpu_memory = lambda: 10_000_000_000
machine.mlx_memory = lambda: {"active": 1, "peak": 9_500_000_000, "cache": 0}
with watching(recorder, folder, tell): os.abort()
"""
    run(folder, code)
    assert explain(folder).cause == "memory"
    run(folder, code.replace("os.abort()", "die()"))
    assert told(explain(folder), "MLX had taken up to 9.50 GB of the 10.00 GB that the GPU may use.")


@pytest.mark.parametrize("same_pid", [True, False])
def test_the_kernel_s_log_settles_it(folder: Path, monkeypatch: pytest.MonkeyPatch, same_pid: bool) -> None:
    run(folder, "with watching(recorder, folder, tell): die()")
    record = read(folder)
    assert record is not None
    pid = record.pid if same_pid else 4711
    moment = record.entered_monotonic

    def log(line: str) -> Callable[[], list[str]]:
        return lambda: ["[    0.000000] Linux version 6", line]

    killed = f"Out of memory: Killed process {pid} (python) total-vm:1kB"
    monkeypatch.setattr(machine, "kernel_log", log(f"[{moment + 1:.6f}] host kernel: {killed}"))
    found = explain(folder)
    assert (found.outcome, found.cause) == ("died", "memory")
    assert told(found, "was ended by the system because memory ran out")
    assert told(found, f"Killed process {pid} (python)") == same_pid
    monkeypatch.setattr(machine, "kernel_log", log(f"[{moment + 1000:.6f}] {killed}"))
    assert explain(folder).cause == "killed", "much later"
    monkeypatch.setattr(machine, "kernel_log", log(f"[{moment + 1:.6f}] Killed process 4711 (chrome)"))
    assert explain(folder).cause == "killed", "somebody else"


def test_a_container_that_counts_such_ends_does_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, "machine.out_of_memory_kills = lambda: 3\nwith watching(recorder, folder, tell): die()")
    monkeypatch.setattr(machine, "out_of_memory_kills", lambda: 3)
    assert explain(folder).cause == "killed"
    monkeypatch.setattr(machine, "out_of_memory_kills", lambda: 4)
    assert explain(folder).cause == "memory"


def test_a_native_crash_is_named_with_its_place(folder: Path) -> None:
    (folder / "crash.txt").write_text("Fatal Python error: Aborted\n")  # an earlier run's
    code = """
def in_native_code(): ctypes.string_at(8)
with watching(recorder, folder, tell): in_native_code()
"""
    assert run(folder, code) < 0
    found = explain(folder)
    assert (found.outcome, found.cause) == ("died", "native crash")
    assert told(found, "crashed in native code (segmentation fault)") or told(found, "crashed in native code (bus error)")
    assert told(found, "Python was in string_at, ")
    assert tries(found)[-1] == "pip install --upgrade mlx mlx-lm"
    run(folder, "with watching(recorder, folder, tell): die()")
    assert explain(folder).cause == "killed", "the crash was another run's"


def test_a_crash_in_a_thread_of_native_code_names_what_python_did(folder: Path) -> None:
    run(folder, "with watching(recorder, folder, tell): die()")
    other = 'Thread 0x1 (most recent call first):\n  File "/t.py", line 3 in wait\n\n'
    main = 'Thread 0x2 (most recent call first):\n  File "/steps.py", line 99 in steps\n  File "/train.py", line 1 in run\n'
    current = "Current thread 0x3 (most recent call first):\n  <no Python frame>\n\n"
    (folder / "crash.txt").write_text(f"Fatal Python error: Segmentation fault\n\n{current}{other}{main}")
    assert told(explain(folder), "Python was in steps, /steps.py:99.")


def test_giving_up_with_full_memory_is_memory(folder: Path) -> None:
    run(folder, "machine.available_memory = lambda: (1, 1000)\nwith watching(recorder, folder, tell): os.abort()")
    found = explain(folder)
    assert found.cause == "memory"
    assert told(found, "Insufficient Memory")


@pytest.mark.parametrize("hang", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"])
def test_a_hang_that_was_ended_is_told_as_one(folder: Path, hang: str) -> None:
    code = f"""
def stuck_here(): {hang}
with watching(recorder, folder, tell, 0.2): stuck_here()
"""
    with subprocess.Popen([sys.executable, "-c", BEGIN + code, str(folder)], stdout=subprocess.DEVNULL) as process:
        stalled = folder / "stalled.txt"
        until = time.monotonic() + 30
        while not (stalled.exists() and "in stuck_here" in stalled.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        found = explain(folder)
        assert found.outcome == "running"
        assert told(found, "progress  none for ")
        assert tries(found)[1] == f"kill -9 {process.pid}"
        process.kill()
    found = explain(folder)
    assert (found.outcome, found.cause) == ("died", "stuck")
    assert told(found, f"Python was in stuck_here, <string>:{BEGIN.count(chr(10)) + 2}.")
    assert told(found, "It may have been slow rather than stuck")


def test_a_hang_that_was_over_is_not_the_cause(folder: Path) -> None:
    code = """
said = []
with watching(recorder, folder, said.append, 0.2):
    while not said: time.sleep(0.01)
    while len(said) < 2: recorder.enter("loss"); time.sleep(0.01)
    die()
"""
    run(folder, code)
    assert "no progress" in (folder / "stalled.txt").read_text()
    assert explain(folder).cause == "killed"


def test_a_run_that_goes_on(folder: Path) -> None:
    recorder = Recorder(folder)
    recorder.enter("forward", update=3)
    recorder.beat()
    found = explain(folder)
    recorder.close()
    assert found.outcome == "running"
    assert found.lines[:2] == [
        f"{folder}: the run goes on, as process {os.getpid()} on {os.uname().nodename}",
        "now       update 3, forward",
    ]


def rewritten(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """A record with another constant, as another machine would have written it."""

    def other(where: Path) -> Any:
        record = read(where)
        assert record is not None
        record.constants[name] = value
        return record

    monkeypatch.setattr(evidence, "read", other)


def test_a_machine_that_was_restarted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, "with watching(recorder, folder, tell): die()")
    rewritten(folder, monkeypatch, "boot", "another")
    found = explain(folder)
    assert (found.outcome, found.cause) == ("died", "power")
    assert told(found, "the machine was restarted since")


def test_a_run_elsewhere_goes_by_its_heartbeat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, "with watching(recorder, folder, tell): die()")
    rewritten(folder, monkeypatch, "pid_space", "another container")
    assert explain(folder).outcome == "running"
    monkeypatch.setattr(autopsy, "_RECENT_S", 0.0)
    assert explain(folder).outcome == "died"


@pytest.mark.parametrize(
    ("how", "detail", "cause", "first"),
    [
        ("finished", "", "finished", None),
        ("stopped early", "", "stopped early", None),
        ("interrupted", "", "interrupted", "--resume"),
        ("failed", "OSError: [Errno 28] No space left on device: 'x'", "disk full", "df -h"),
        ("failed", "RuntimeError: [metal::malloc] Attempting to allocate 9 bytes", "memory", "--token-budget 2048"),
        ("failed", "ValueError: no", "failed", "--resume"),
        ("not finite", "5 updates in a row\nWhat to try", "not finite", "--learning-rate 0.0001"),
    ],
)
def test_a_word_is_taken_as_it_is(folder: Path, how: str, detail: str, cause: str, first: str | None) -> None:
    run(folder, f"recorder.end({how!r}, {detail!r}); recorder.close()")
    found = explain(folder)
    assert (found.outcome, found.cause) == ("ended", cause)
    assert all(told(found, line) for line in detail.splitlines())
    if first is None:
        assert not told(found, "try ")
        assert told(found, f"adapters  {folder / 'adapters'}")
    else:
        assert first in tries(found)[0]


def test_a_summary_alone_tells_too_but_not_of_a_later_run(folder: Path) -> None:
    summary = folder / "training_summary.json"
    summary.write_text(json.dumps({"ended": "stopped early", "steps": 300, "planned_steps": 900}))
    found = explain(folder)
    assert found.lines[0] == f"{folder}: the run stopped early after 300 of 900 updates"
    os.utime(summary, (1e9, 1e9))
    run(folder, "die()")
    assert explain(folder).outcome == "died"


def test_what_the_supervisor_did_is_told(folder: Path) -> None:
    """In the lines that it really writes; how it came to an end is none of its restarts."""
    journal = _Journal(folder, lambda text: None)
    journal.restart(Death("SIGKILL", "backward", 7, 4096, memory="short", next_budget=2048), 1, 3)
    with (folder / "supervision.jsonl").open("a") as file:
        file.write("half a li\n{}\n")
    journal.restart(Death("hang", "save", 9, 2048, next_budget=2048), 2, 3)
    journal.ended(0, 2)
    run(folder, "die()")
    found = explain(folder)
    assert told(found, "restarts  the supervisor has restarted it 2 times")
    today = time.strftime("%Y-%m-%d")
    lines = [line.strip() for line in found.lines if "update 7" in line or "update 9" in line]
    assert [line[:10] for line in lines] == [today, today]
    assert [line[21:] for line in lines] == ["SIGKILL: update 7, backward; token budget 4096 -> 2048", "hang: update 9, save"]
    assert not told(found, "None")


def test_what_was_saved_in_the_middle_of_an_update_counts(folder: Path) -> None:
    """Advice to begin again, with --overwrite, would take it away."""
    for each in folder.glob("checkpoint_*"):
        each.unlink() if each.is_file() else each.rmdir()
    run(folder, "recorder.enter('forward', update=1); die()")
    for name in ("checkpoint_epoch0_step0_part3", "checkpoint_epoch0_step0_part12", "checkpoint_epoch0_step0_part12_again1"):
        (folder / name).mkdir()
        found = explain(folder)
        assert told(found, f"saved     {name}")
        assert "--resume" in tries(found)[0]


def test_half_of_what_a_batch_had_and_not_of_what_it_could_have(folder: Path) -> None:
    run(folder, "recorder.enter('forward', positions=600); die()")
    assert any("--token-budget 300" in each for each in tries(explain(folder)))


def test_before_anything_was_saved_it_begins_as_it_was_begun(tmp_path: Path) -> None:
    run(tmp_path, "die()")
    found = explain(tmp_path)
    assert told(found, "no checkpoint")
    assert tries(found)[0] == "mlx-qlora train --demo"


def test_other_folders_are_answered_kindly(tmp_path: Path) -> None:
    assert explain(tmp_path).outcome == "nothing"
    assert explain(tmp_path / "not there").lines[0].endswith("is no folder. Name the folder of a run: what --output-dir said.")


def test_damaged_files_do_not_stop_it(folder: Path) -> None:
    run(folder, "with watching(recorder, folder, tell): die()")
    for name in (
        "config.yaml",
        "training_state.json",
        "supervision.jsonl",
        "training_summary.json",
        "crash.txt",
        "stalled.txt",
    ):
        (folder / name).write_bytes(b"\xff\x00 [}: - \n\t{")
    whole = (folder / NAME).read_bytes()
    for number in range(5):
        damaged = bytearray(whole)
        damaged[number * 4096 + 30] ^= 1
        (folder / NAME).write_bytes(damaged)
        assert explain(folder).lines
