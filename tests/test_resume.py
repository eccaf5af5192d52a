"""Going on with a run: what it is compared with, what is refused, and what a person sees of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora import LoraConfig, RunConfig, train
from mlx_qlora.assets import embedded_model
from mlx_qlora.config import _GROUPS, flat
from mlx_qlora.engine.stopping import EarlyStoppingConfig
from mlx_qlora.errors import ConfigError, ResumeError, RunFolderError
from mlx_qlora.look.history import AROUND
from mlx_qlora.resume import _CHANGEABLE, _COMPUTING, _JUDGED, _put_random_state, _random_state
from mlx_qlora.run import checkpoint
from mlx_qlora.run.metrics import MEASURED, read_metrics

CLI = [sys.executable, "-m", "mlx_qlora", "train"]


@pytest.fixture
def config(small_data: Path, tmp_path: Path) -> RunConfig:
    """9 updates: three epochs of 8 + 8 + 6."""
    return RunConfig(
        model="embedded", data=str(small_data), output_dir=str(tmp_path / "run"), epochs=3, batch_size=8, eval_every=2,
        learning_rate=5e-3, lora=LoraConfig(rank=2, scale=4.0, dropout=0.1),
    )  # fmt: skip


def interrupted(config: RunConfig, updates: int) -> Any:
    """The run up to an update, by a real signal to this process while the update before it is reported."""
    from mlx_qlora.look.console import Console

    plain = Console.step

    def step(self: Console, report: Any) -> None:
        plain(self, report)
        if report.step == updates:
            os.kill(os.getpid(), signal.SIGINT)

    Console.step = step  # type: ignore[method-assign]
    try:
        return train(config, quiet=True)
    finally:
        Console.step = plain  # type: ignore[method-assign]


def adapters(config: RunConfig) -> bytes:
    return (Path(config.output_dir) / "adapters" / "adapters.safetensors").read_bytes()


def figures(config: RunConfig) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(Path(config.output_dir))]


def test_the_same_cell_run_again_goes_on_to_the_same_bytes(config: RunConfig) -> None:
    whole = replace(config, output_dir=config.output_dir + "-whole")
    train(whole, quiet=True)
    cell = replace(config, resume=True)
    first = interrupted(cell, 3)
    assert (first.interrupted, first.summary["steps"]) == (True, 3)
    assert first.model(mx.array([[1, 2, 3]])).shape[1] == 3, "a usable state"
    second = interrupted(cell, 4)
    assert second.summary["steps"] == 4
    third = train(cell, quiet=True)
    assert (third.summary["ended"], third.summary["steps"]) == ("finished", 9)
    assert adapters(cell) == adapters(whole)
    assert figures(cell) == figures(whole)
    assert json.loads((Path(cell.output_dir) / "training_metrics.json").read_text()) == read_metrics(Path(cell.output_dir))
    fourth = train(cell, quiet=True)
    assert (fourth.summary["ended"], fourth.summary["steps"]) == ("finished", 9), "a finished run is not trained further"
    assert adapters(cell) == adapters(whole)
    assert figures(cell) == figures(whole)


def test_early_stopping_stays_where_it_was(config: RunConfig) -> None:
    """Patience runs through an interruption, and a run that has stopped stays stopped."""
    stopping = replace(config, early_stopping=EarlyStoppingConfig(patience=2, min_delta=100.0))
    whole = replace(stopping, output_dir=config.output_dir + "-whole")
    assert train(whole, quiet=True).summary["steps"] == 6
    interrupted(stopping, 5)
    for _ in range(2):
        result = train(replace(stopping, resume=True), quiet=True)
        assert (result.summary["ended"], result.summary["steps"]) == ("stopped early", 6)
        assert adapters(stopping) == adapters(whole)
        assert figures(stopping) == figures(whole)


def test_more_epochs_go_on_if_one_says_so(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(config, quiet=True)
    longer = replace(config, epochs=4, resume=True)
    with pytest.raises(ResumeError, match=r"epochs: was 3, is 4(.|\n)*--resume-anyway"):
        train(longer, quiet=True)
    result = train(replace(longer, resume_anyway=True))
    assert result.summary["steps"] == 12
    assert "epochs: was 3, is 4" in capsys.readouterr().out


def test_fewer_updates_than_were_made_is_the_end_of_it(config: RunConfig) -> None:
    train(replace(config, max_steps=4), quiet=True)
    result = train(replace(config, max_steps=2, resume=True, resume_anyway=True), quiet=True)
    assert (result.summary["ended"], result.summary["steps"]) == ("finished", 4)


def test_half_an_update_is_gone_on_with_in_its_own_batches_only() -> None:
    """Another budget can give as many batches of the same examples, cut elsewhere: an example would be left out."""
    from conftest import make_examples, same_bytes, tiny_model

    from mlx_qlora.data.layout import padded
    from mlx_qlora.engine.optim import OptimConfig, make_optimizer
    from mlx_qlora.engine.steps import Engine, steps
    from mlx_qlora.model import lora
    from mlx_qlora.objectives.sft import sft
    from mlx_qlora.records import START, Halfway, StepReport, Update

    examples = make_examples(4)

    def facts(cut: int, window: Any = None, asked: bool = False) -> tuple[list[Any], Any]:
        model = tiny_model("mistral")
        lora.attach(model, LoraConfig(rank=2))
        optim = OptimConfig(learning_rate=1e-2)
        engine = Engine(model, sft(), make_optimizer(optim, 2), optim, lora.dropout_keys, asked=lambda: asked)
        batches = (padded(examples[:cut]), padded(examples[cut:]))
        update = Update(batches, 0.5, tuple(examples), 9, 9, START)
        return list(steps(engine, [update], window=window)), model.trainable_parameters()

    (halfway, _), _ = facts(3, asked=True)
    assert isinstance(halfway, Halfway)
    for cut in (3, 2):
        (whole,), expected = facts(cut)
        (report,), params = facts(cut, halfway.window)
        assert isinstance(report, StepReport)
        assert report.loss == whole.loss
        assert same_bytes(params, expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"learning_rate": 1e-3}, r"learning_rate: was 0.005, is 0.001\n.*--resume-anyway"),
    "rank": ({"lora": LoraConfig(rank=4, scale=4.0, dropout=0.1)}, r"lora.rank: was 2, is 4; this can't change within a run"),
    "seed": ({"seed": 1, "resume_anyway": True}, r"seed: was 0, is 1; this can't change"),
    "optimizer": ({"optimizer": "lion", "resume_anyway": True}, r"optimizer: was adamw, is lion; this can't"),
    "data": ({"data": "embedded", "max_seq_length": 200}, r"the examples are others"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_another_run_is_refused_with_the_difference(name: str, config: RunConfig) -> None:
    changes, said = REFUSED[name]
    interrupted(config, 3)
    folder = Path(config.output_dir)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "flight_recorder.bin"}
    with pytest.raises(ResumeError, match=said):
        train(replace(config, resume=True, **changes), quiet=True)
    assert {path: path.read_bytes() for path in before} == before


def test_another_model_is_refused_even_under_the_same_name(config: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(embedded_model(), tmp_path / "model")
    own = replace(config, model=str(tmp_path / "model"))
    interrupted(own, 3)
    path = tmp_path / "model" / "model.safetensors"
    arrays: Any = mx.load(str(path))
    name = next(name for name in arrays if name.endswith("norm.weight"))
    mx.save_safetensors(str(path), arrays | {name: arrays[name] * 1.01})
    with pytest.raises(ResumeError, match=r"the model is another one(.|\n)*the files themselves have changed"):
        train(replace(own, resume=True), quiet=True)


def test_data_that_only_moved_are_the_same_data(config: RunConfig, tmp_path: Path) -> None:
    interrupted(config, 3)
    shutil.copytree(config.data, tmp_path / "moved", ignore=shutil.ignore_patterns(".mlx_qlora"))  # type: ignore[type-var]
    assert train(replace(config, data=str(tmp_path / "moved"), resume=True), quiet=True).summary["ended"] == "finished"


def test_how_it_is_computed_may_change_and_is_said(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    whole = replace(config, output_dir=config.output_dir + "-whole")
    losses = [line["loss"] for line in read_metrics(train(whole, quiet=True).output_dir)]
    interrupted(config, 3)
    train(replace(config, resume=True, token_budget=200, layout="plain"))
    out = capsys.readouterr().out
    assert "token_budget: was not there, is 200; the gradient stays the same" in out
    assert "up to 200 positions at once" in out
    assert [line["loss"] for line in read_metrics(Path(config.output_dir))] == pytest.approx(losses, rel=1e-3)


def test_every_setting_is_of_one_kind() -> None:
    """One that is of none would be refused; this list is what can't change in a run."""
    names = set(flat(RunConfig().plain()))
    kinds = [AROUND, _COMPUTING, _JUDGED, _CHANGEABLE]
    assert all(kind <= names for kind in kinds)
    assert sum(map(len, kinds)) == len(set.union(*kinds)), "and of one only"
    assert names - set.union(*kinds) == {
        "data_weights", "decay", "embedding_learning_rate", "fine_tune_type", "precision", "lora.layers", "lora.rank",
        "lora.scale", "lora.targets", "optimizer", "seed", "shuffle_buffer",
        "streaming",
    }  # fmt: skip
    assert {"lora", "early_stopping", "distill", "chain"} == _GROUPS


def test_the_command_line_takes_the_settings_of_the_run(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_qlora.config import parse

    interrupted(config, 3)
    kept = parse(["--output-dir", config.output_dir, "--resume"])
    assert kept == replace(config, resume=True)
    assert parse(["--output-dir", config.output_dir, "--resume", "--learning-rate", "1e-3"]).learning_rate == 1e-3
    with pytest.raises(ConfigError, match="overwrite"):
        parse(["--output-dir", config.output_dir, "--resume", "--overwrite"])
    with pytest.raises(RunFolderError, match="go on with it with --resume"):
        train(config, quiet=True)


def test_what_a_run_without_a_checkpoint_gets(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """It begins anew where nothing is lost by that, and only there."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "training_metrics.jsonl").write_text('{"step": 1}\n{"st')
    train(replace(config, resume=True, max_steps=1))
    assert "the run ended before its first checkpoint; it begins anew" in capsys.readouterr().out
    for each in checkpoint.there(folder):
        shutil.rmtree(each)
    with pytest.raises(ResumeError, match=r"has validated adapters and no checkpoint.*--overwrite"):
        train(replace(config, resume=True, max_steps=1), quiet=True)


def test_what_is_drawn_from_the_common_generators_goes_on() -> None:
    import random

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.standard_normal()), mx.random.normal().item()]  # type: ignore[list-item]

    draw()
    kept = json.loads(json.dumps(_random_state()))
    first = draw()
    assert draw() != first
    _put_random_state(kept)
    assert draw() == first


# Signals, to real processes


def started(config: RunConfig, **more: Any) -> subprocess.Popen[str]:
    path = Path(config.output_dir + ".yaml")
    path.write_text(config.to_yaml())
    process = subprocess.Popen([*CLI, "--config", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
    wait_for(lambda: len(lines(config)) >= 2 or process.poll() is not None)
    return process


def lines(config: RunConfig) -> list[Any]:
    path = Path(config.output_dir) / "training_metrics.jsonl"
    return read_metrics(Path(config.output_dir)) if path.exists() else []


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def endless(config: RunConfig) -> RunConfig:
    return replace(config, epochs=1000, eval_every=3000)


def test_usr1_saves_now_and_a_closed_terminal_saves_and_ends(endless: RunConfig) -> None:
    process = started(endless)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: bool(checkpoint.there(Path(endless.output_dir))))
    assert process.poll() is None, "and training goes on"
    process.stdout.close()  # type: ignore[union-attr]
    process.stderr.close()  # type: ignore[union-attr]
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 130
    found, _ = checkpoint.newest(Path(endless.output_dir))
    assert found is not None
    assert found.state["state"]["step"] == lines(endless)[-1]["step"]


def test_a_second_ctrl_c_ends_at_once_and_harmlessly(endless: RunConfig) -> None:
    """In the middle of a long update: the first one waits for it, the second does not."""
    process = started(replace(endless, batch_size=22, token_budget=1, layout="plain"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)  # two within half a second are one wish, said twice
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    for path in checkpoint.there(Path(endless.output_dir)):
        checkpoint.verified(path)
    assert train(replace(endless, resume=True, epochs=1, resume_anyway=True, batch_size=22), quiet=True).summary["steps"] >= 1


def test_two_runs_into_one_folder(endless: RunConfig) -> None:
    """The second is refused, whatever it asks for; after a SIGKILL nothing has to be cleaned up."""
    process = started(endless)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RunFolderError, match=rf"another run is training into .* right now \(process {process.pid}, since"):
            train(replace(endless, **how), quiet=True)  # type: ignore[arg-type]
    process.kill()
    process.communicate()
    assert train(replace(endless, resume=True, epochs=1, resume_anyway=True), quiet=True).summary["ended"] == "finished"
    assert not (Path(endless.output_dir) / ".lock").exists()
