"""What is left, and what is said, where a run ends otherwise than one hopes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import pytest

from mlx_qlora import LoraConfig, RunConfig, train
from mlx_qlora.errors import ConfigError, DataError, ResumeError, RunFolderError
from mlx_qlora.look.console import Console
from mlx_qlora.run import checkpoint, disk
from mlx_qlora.run.metrics import read_metrics
from mlx_qlora.run.recorder import read

CLI = [sys.executable, "-m", "mlx_qlora", "train"]


@pytest.fixture
def config(small_data: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        model="embedded", data=str(small_data), output_dir=str(tmp_path / "run"), batch_size=8, eval_every=2, max_steps=4,
        learning_rate=5e-3, lora=LoraConfig(rank=2),
    )  # fmt: skip


def at_update(number: int, monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    plain = Console.step

    def step(self: Console, report: Any) -> None:
        plain(self, report)
        if report.step == number:
            do()

    monkeypatch.setattr(Console, "step", step)


def full(monkeypatch: pytest.MonkeyPatch, when: Callable[[Path], bool]) -> None:
    """No space for some files."""
    plain = disk._write

    def write(path: Path, content: bytes | memoryview, flushed: bool) -> None:
        if when(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        plain(path, content, flushed)

    monkeypatch.setattr(disk, "_write", write)


def best_adapters(*times: int) -> Callable[[Path], bool]:
    """When the best adapters are written for one of these times, counted from 1."""
    written = 0

    def when(path: Path) -> bool:
        nonlocal written
        written += path.name == ".adapters.tmp.safetensors"
        return path.name == ".adapters.tmp.safetensors" and written in times

    return when


def test_the_best_adapters_are_written_at_the_end_if_they_could_not_be_before(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(replace(config, output_dir=config.output_dir + "-whole"), quiet=True)
    full(monkeypatch, best_adapters(2))
    run = train(config, quiet=True)
    assert run.summary["best"]["step"] == 4
    name = Path("adapters") / "adapters.safetensors"
    assert (run.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()


def test_a_run_whose_best_adapters_can_not_be_written_has_not_gone_well(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full(monkeypatch, best_adapters(*range(2, 20)))
    with pytest.raises(RunFolderError, match=r"could not be written:(.|\n)*adapters/: No space left on device(.|\n)*--resume"):
        train(config)
    assert "kept in" not in capsys.readouterr().out
    assert len(read_metrics(Path(config.output_dir))) == 4, "all the rest is there"
    assert (Path(config.output_dir) / "training_summary.json").exists()


def test_what_is_not_saved_is_not_said_to_be(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full(monkeypatch, lambda path: "step3" in str(path))
    at_update(3, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(
        RunFolderError, match=r"the last checkpoint: .*No space left.*the last whole one is checkpoint_epoch\d_step2"
    ):
        train(config)
    out = capsys.readouterr().out
    assert "It is tried again" in out
    assert "all of it is saved" not in out


def test_what_a_save_has_no_memory_for_is_said(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the thread that saves: training goes on."""
    plain = checkpoint.serialized
    times = count()

    def serialized(arrays: Any) -> bytes:
        if threading.current_thread() is not threading.main_thread() and next(times) == 1:
            raise MemoryError
        return plain(arrays)

    monkeypatch.setattr(checkpoint, "serialized", serialized)
    assert train(config).summary["ended"] == "finished"
    assert "WARNING: a checkpoint could not be written: memory ended" in capsys.readouterr().out


def test_the_recorder_says_where_it_failed_and_not_that_it_saved_then(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise DataError("row 7 is gone")

    at_update(3, monkeypatch, fail)
    with pytest.raises(DataError):
        train(config, quiet=True)
    record = read(Path(config.output_dir))
    assert record is not None
    assert (record.phase, record.ended) == ("update", "failed")
    found, _ = checkpoint.newest(Path(config.output_dir))
    assert found is not None
    assert found.state["state"]["step"] == 3, "and it saved"


def test_a_checkpoint_under_a_name_that_was_there_before_and_rotated_away(tmp_path: Path) -> None:
    names = []
    for _ in range(5):
        names.append(checkpoint.save(tmp_path, "checkpoint_epoch0_step0", {}, {}).name)
        checkpoint.rotate(tmp_path, 2, None)
    assert names[-1] == "checkpoint_epoch0_step0_again4"
    assert [each.name for each in checkpoint.there(tmp_path)] == names[:2:-1]


def test_what_killed_saves_left_goes_away_when_the_run_goes_on(config: RunConfig) -> None:
    train(replace(config, max_steps=2), quiet=True)
    left = Path(config.output_dir) / ".checkpoint_epoch0_step1_part7.tmp"
    left.mkdir()
    (left / "optimizer.safetensors").write_bytes(bytes(1000))
    train(replace(config, resume=True, resume_anyway=True), quiet=True)
    assert not left.exists()


def test_a_checkpoint_of_another_format_is_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config, quiet=True)
    monkeypatch.setattr(sys.modules["mlx_qlora.resume"], "FORMAT", 2)
    with pytest.raises(ResumeError, match=r"has the format 1, and this version of mlx_qlora reads 2"):
        train(replace(config, resume=True), quiet=True)


def test_resuming_what_is_not_there_is_said(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, resume=True, max_steps=1))
    assert f"resume    there is no run in {config.output_dir} yet; it begins" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"there is no run in runs/frist to go on with\. Is the name of the folder right"):
        RunConfig(output_dir="runs/frist", resume=True).require_complete()


# Signals, to real processes


def started(config: RunConfig, *before: str) -> subprocess.Popen[str]:
    path = Path(config.output_dir + ".yaml")
    path.write_text(config.to_yaml())
    command = [*before, *CLI, "--config", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen[str], holds: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not holds() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)


def updates(config: RunConfig) -> int:
    path = Path(config.output_dir) / "training_metrics.jsonl"
    return len(read_metrics(Path(config.output_dir))) if path.exists() else 0


@pytest.mark.skipif(not shutil.which("nohup"), reason="there is no nohup here")
def test_nohup_means_that_a_closed_terminal_does_not_end_it(config: RunConfig) -> None:
    process = started(replace(config, max_steps=None, epochs=1000, eval_every=3000), "nohup")
    wait_for(process, lambda: updates(config) >= 2)
    process.send_signal(signal.SIGHUP)
    there = updates(config)
    wait_for(process, lambda: updates(config) > there + 3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out


def test_a_wish_to_save_while_the_model_is_loaded_hurts_nobody(config: RunConfig) -> None:
    process = started(config)
    wait_for(process, lambda: read(Path(config.output_dir)) is not None)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert json.loads((Path(config.output_dir) / "training_summary.json").read_text())["ended"] == "finished"
