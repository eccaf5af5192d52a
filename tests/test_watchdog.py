"""The watchdog in real processes: that hang with and without the interpreter, that crash, that are suspended."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_qlora.errors import ConfigError
from mlx_qlora.run.recorder import Recorder, read
from mlx_qlora.run.watchdog import CRASH, STALLED, watching

BEGIN = """
import ctypes, faulthandler, os, resource, signal, sys, threading, time
from pathlib import Path
from mlx_qlora.run.recorder import Recorder
from mlx_qlora.run.watchdog import watching
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
folder = Path(sys.argv[1])
recorder = Recorder(folder)
def tell(text): print(text, flush=True)
recorder.enter("backward", update=3, part=1, parts=2, shape="1 x 812 tokens", ids=("a:1", "b:2"))
"""


def child(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BEGIN + code, str(folder)], capture_output=True, text=True, timeout=60)


def test_a_stall_is_written_down_told_and_its_end_too(tmp_path: Path) -> None:
    code = """
released = threading.Event()
def waits_for_a_lock(): released.wait()
threading.Thread(target=waits_for_a_lock, name="the reader", daemon=True).start()
def hangs_here():
    while not list(told): time.sleep(0.01)
    while len(told) < 2: time.sleep(0.01)
told = []
def tell(text):
    told.append(text); print(text, flush=True)
with watching(recorder, folder, tell, 0.2):
    hangs_here()
    recorder.enter("update")
    while len(told) < 3: recorder.enter("forward"); time.sleep(0.01)
"""
    done = child(tmp_path, code)
    assert done.returncode == 0, done.stderr
    stalled = (tmp_path / STALLED).read_text(encoding="utf-8")
    doing = "update 3, part 1 of 2, backward of 1 x 812 tokens"
    assert stalled.count(f"s: {doing}\n    update: 3\n") == 2, "again when the time had doubled"
    assert "ids: ['a:1', 'b:2']" in stalled
    assert "of the process: " in stalled
    assert "thread MainThread" in stalled
    assert "in hangs_here" in stalled
    assert "thread the reader" in stalled
    assert "in waits_for_a_lock" in stalled
    assert "it goes on, after" in stalled
    assert done.stdout.count("no progress for") == 2
    assert f"`mlx-qlora doctor {tmp_path}`" in done.stdout
    assert not (tmp_path / CRASH).exists(), "nothing was written there"


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    code = """
with watching(recorder, folder, tell, 20):
    for number in range(5):
        recorder.enter("forward"); time.sleep(0.05)
"""
    done = child(tmp_path, code)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not (tmp_path / STALLED).exists()
    found = read(tmp_path)
    assert found is not None
    assert (found.limit_s, found.beat["crash_from"]) == (20, 0)


def test_stacks_are_written_while_something_holds_the_interpreter(tmp_path: Path) -> None:
    code = """
def holds_the_interpreter(): ctypes.PyDLL(None).usleep(900_000)  # without letting go of the GIL
told = threading.Event()
with watching(recorder, folder, lambda text: (tell(text), told.set()), 0.2):
    holds_the_interpreter()
    told.wait(30)
"""
    done = child(tmp_path, code)
    assert done.returncode == 0, done.stderr
    stalled = (tmp_path / STALLED).read_text(encoding="utf-8")
    assert stalled.startswith("Timeout (")
    assert "in holds_the_interpreter" in stalled
    assert "no thread of Python could run for" in stalled
    assert "nothing could run (update 3, part 1 of 2, backward of 1 x 812 tokens)" in done.stdout


@pytest.mark.parametrize(
    ("fault", "name"),
    [("SIGSEGV", "Segmentation fault"), ("SIGABRT", "Aborted"), ("SIGBUS", "Bus error"), ("SIGFPE", "Floating")],
)
def test_a_native_crash_leaves_its_name_and_place(tmp_path: Path, fault: str, name: str) -> None:
    code = f"""
def crashes_here(): signal.raise_signal(signal.{fault})
with watching(recorder, folder, tell):
    crashes_here()
"""
    done = child(tmp_path, code)
    assert done.returncode == -getattr(signal, fault)
    crash = (tmp_path / CRASH).read_text(encoding="utf-8")
    assert f"Fatal Python error: {name}" in crash
    assert "in crashes_here" in crash
    found = read(tmp_path)
    assert found is not None
    assert (found.phase, found.ended) == ("backward", "")


def test_files_of_earlier_runs_are_continued(tmp_path: Path) -> None:
    (tmp_path / CRASH).write_text("of an earlier run\n")
    code = "with watching(recorder, folder, tell): os.abort()"
    assert child(tmp_path, code).returncode == -signal.SIGABRT
    assert (tmp_path / CRASH).read_text().startswith("of an earlier run\nFatal Python error: Aborted")
    found = read(tmp_path)
    assert found is not None
    assert found.beat["crash_from"] == 18


def test_the_time_of_a_suspended_process_is_no_stall(tmp_path: Path) -> None:
    code = """
with watching(recorder, folder, tell, 1.5):
    tell("ready")
    sys.stdin.readline()
"""
    command = [sys.executable, "-c", BEGIN + code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
        rest, _ = process.communicate("\n", timeout=30)
    assert "no progress" not in rest


def test_what_was_on_before_is_on_afterwards(tmp_path: Path) -> None:
    code = """
for before in (False, True):
    (faulthandler.enable if before else faulthandler.disable)()
    with watching(recorder, folder, tell):
        assert faulthandler.is_enabled()
    assert faulthandler.is_enabled() == before
assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
"""
    done = child(tmp_path, code)
    assert done.returncode == 0, done.stderr


def test_it_works_in_any_thread_and_with_a_terminal_that_is_gone(tmp_path: Path) -> None:
    told: list[str] = []

    def gone(text: str) -> None:
        told.append(text)
        raise BrokenPipeError

    def run() -> None:
        recorder = Recorder(tmp_path)
        with watching(recorder, tmp_path, gone, 0.1):
            while len(told) < 2:
                time.sleep(0.01)
        recorder.end("finished")
        recorder.close()

    was_on = faulthandler.is_enabled()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert len(told) >= 2
    assert faulthandler.is_enabled() == was_on


def test_a_wrong_limit_is_refused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    with pytest.raises(ConfigError, match="watchdog: 0 came"), watching(recorder, tmp_path, print, 0):
        pass
    recorder.abandon()
    assert os.listdir(tmp_path) == []
