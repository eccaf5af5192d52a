"""Whole runs on the embedded model, with real files and real processes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml

from mlx_qlora import LoraConfig, RunConfig, train
from mlx_qlora.assets import embedded_model
from mlx_qlora.config import from_yaml
from mlx_qlora.engine.stopping import EarlyStoppingConfig
from mlx_qlora.errors import NonFiniteError, RunFolderError
from mlx_qlora.run.checkpoint import newest
from mlx_qlora.run.metrics import COLUMNS, read_metrics

CLI = [sys.executable, "-m", "mlx_qlora"]


@pytest.fixture
def config(small_data: Path, tmp_path: Path) -> RunConfig:
    """6 updates: two epochs of 4 + 4 + remainder."""
    return RunConfig(
        model="embedded",
        data=str(small_data),
        output_dir=str(tmp_path / "run"),
        epochs=2,
        batch_size=4,
        gradient_accumulation=2,
        learning_rate=5e-3,
        eval_every=2,
        lora=LoraConfig(rank=4, scale=4.0, dropout=0.1),
    )


def adapters_of(config: RunConfig) -> bytes:
    return (Path(config.output_dir) / "adapters" / "adapters.safetensors").read_bytes()


def test_a_run_leaves_what_the_readme_says(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(replace(config, score_questions=2, max_answer_tokens=8))
    folder = Path(config.output_dir)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapters", "answers.jsonl", "checkpoint_epoch1_step4", "checkpoint_epoch2_step6", "config.yaml", "data_account.json",
        "flight_recorder.bin", "training_metrics.csv", "training_metrics.json", "training_metrics.jsonl",
        "training_state.json", "training_summary.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["adapter_config.json", "adapters.safetensors"]

    account = json.loads((folder / "data_account.json").read_text())
    lines = read_metrics(folder)
    assert account["supervised_tokens"] == sum(line["supervised_tokens"] for line in lines[:3]), "an epoch"
    assert account["validation"] == "valid.jsonl"
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["val_loss" in line for line in lines] == [False, True] * 3
    assert lines == json.loads((folder / "training_metrics.json").read_text())
    assert lines[-1]["loss"] > 0
    assert lines[-1]["gap"] == pytest.approx(lines[-1]["val_loss"] - lines[-1]["train_eval_loss"])
    assert list(lines[-1]) == list(COLUMNS)
    with (folder / "training_metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table] == [line["loss"] for line in lines]
    assert [row["val_loss"] == "" for row in table] == [True, False] * 3
    assert lines[2]["epoch"] == 1.0
    assert lines[-1]["epoch"] == 2.0

    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary == result.summary
    assert (summary["ended"], summary["steps"], summary["planned_steps"]) == ("finished", 6, 6)
    best = min(lines[1::2], key=lambda line: line["val_loss"])
    assert (summary["best"]["step"], summary["best"]["val_loss"]) == (best["step"], best["val_loss"])
    assert summary["answers"]["questions"] == 2
    assert summary["supervised_tokens"] == sum(line["supervised_tokens"] for line in lines)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert set(answers[0]) == {"id", "question", "expected", "base", "tuned"}

    printed = capsys.readouterr().out
    for piece in ("embedded (mistral, 4-bit)", "training         22", "6 updates of 8 examples", "best so far", "token F1"):
        assert piece in printed


def test_it_learns(config: RunConfig) -> None:
    result = train(replace(config, epochs=8, eval_every=24), quiet=True)
    lines = read_metrics(result.output_dir)
    assert lines[-1]["train_eval_loss"] < lines[0]["loss"] - 2


def test_the_best_adapters_stay_whatever_comes_after(config: RunConfig) -> None:
    """A learning rate that is far too high: adapters/ has the best of the validations, not the last."""
    wild = replace(config, epochs=4, schedule="constant", learning_rate=2e-2, eval_every=1)
    losses = [line["val_loss"] for line in read_metrics(train(wild, quiet=True).output_dir)]
    best = losses.index(min(losses)) + 1
    assert best < len(losses), "the last is not the best here, or this test tests nothing"
    train(replace(wild, max_steps=best, output_dir=config.output_dir + "-best"), quiet=True)
    assert adapters_of(config) == adapters_of(replace(config, output_dir=config.output_dir + "-best"))


def test_two_runs_with_one_seed_give_identical_bytes(config: RunConfig) -> None:
    train(config, quiet=True)
    other = replace(config, output_dir=config.output_dir + "-process")
    path = Path(config.output_dir + ".yaml")
    path.write_text(other.to_yaml())
    subprocess.run([*CLI, "train", "--config", str(path)], check=True, capture_output=True)
    assert adapters_of(config) == adapters_of(other)
    train(replace(config, seed=1, output_dir=config.output_dir + "-seed"), quiet=True)
    assert adapters_of(config) != adapters_of(replace(config, output_dir=config.output_dir + "-seed"))

    changing = {"tokens_per_second", "elapsed_s", "peak_memory_gb"}
    one, two = (
        [{k: v for k, v in line.items() if k not in changing} for line in read_metrics(Path(c.output_dir))]
        for c in (config, other)
    )
    assert one == two


def test_micro_batches_do_not_change_the_run(config: RunConfig) -> None:
    """8 x 1, 4 x 2 and 2 x 4 are the same updates: same losses, same validation, up to rounding."""
    plain = replace(config, lora=replace(config.lora, dropout=0.0))  # a mask belongs to its micro-batch
    seen = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        settings = {"batch_size": batch, "gradient_accumulation": accumulation, "output_dir": f"{config.output_dir}-{batch}"}
        lines = read_metrics(train(replace(plain, **settings), quiet=True).output_dir)
        seen.append([line["loss"] for line in lines] + [line["val_loss"] for line in lines if "val_loss" in line])
    assert seen[1] == pytest.approx(seen[0], rel=2e-4)
    assert seen[2] == pytest.approx(seen[0], rel=2e-4)


def test_early_stopping_ends_the_run(config: RunConfig) -> None:
    stopping = EarlyStoppingConfig(patience=2, min_delta=100.0)  # after the first validation nothing is good enough
    result = train(replace(config, eval_every=1, early_stopping=stopping), quiet=True)
    assert (result.summary["ended"], result.summary["steps"]) == ("stopped early", 3)


def test_the_result_answers_with_the_best_adapters(config: RunConfig) -> None:
    from mlx_lm import generate
    from mlx_lm import load as mlx_lm_load

    result = train(config, quiet=True)
    theirs, tokenizer = mlx_lm_load(str(embedded_model()), adapter_path=str(result.output_dir / "adapters"))[:2]
    tokens = mx.array([[1, 50, 60, 70, 80]])
    # mlx-lm computes in float16 here, as the checkpoint is stored.
    assert mx.allclose(result.model(tokens), theirs(tokens).astype(mx.float32), atol=0.05, rtol=0.05)
    assert isinstance(generate(theirs, tokenizer, "O gato", max_tokens=3), str)


# The folder


def test_another_run_is_not_overwritten_unless_told_to(config: RunConfig) -> None:
    train(config, quiet=True)
    before = {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match=r"holds a run already \(config.yaml.*--overwrite"):
        train(config, quiet=True)
    assert {path: path.read_bytes() for path in before} == before

    notes = Path(config.output_dir) / "notes.txt"
    notes.write_text("mine")
    result = train(replace(config, overwrite=True, max_steps=1), quiet=True)
    assert result.summary["steps"] == 1
    assert len(read_metrics(result.output_dir)) == 1
    assert notes.read_text() == "mine", "what is not the run's own stays"


def test_a_run_that_cannot_begin_leaves_nothing(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        train(replace(config, data=str(tmp_path / "none")), quiet=True)
    with pytest.raises(ValueError, match="names no linear layer"):
        train(replace(config, lora=LoraConfig(targets=("c_attn",))), quiet=True)
    assert not Path(config.output_dir).exists()


def test_the_configuration_in_the_folder_repeats_the_run(config: RunConfig) -> None:
    train(config, quiet=True)
    assert from_yaml(Path(config.output_dir) / "config.yaml", RunConfig()) == config


def test_names_with_spaces_and_letters_of_all_kinds(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "minha execução ção 1"
    data = tmp_path / "dados à parte"
    shutil.copytree(config.data, data)
    train(replace(config, data=str(data), output_dir=str(folder), max_steps=1), quiet=True)
    assert (folder / "adapters" / "adapters.safetensors").exists()


# Guards and signals


def test_updates_that_are_not_finite_stop_the_run_with_exit_code_3(config: RunConfig, tmp_path: Path) -> None:
    """A scale of 1e38 makes the gradient overflow: a real infinity, nothing faked."""
    with pytest.raises(NonFiniteError):
        train(replace(config, lora=LoraConfig(rank=4, scale=1e38), max_skipped_updates=2, epochs=20), quiet=True)
    summary = json.loads((Path(config.output_dir) / "training_summary.json").read_text())
    assert summary["ended"] == "not finite"
    assert summary["skipped_updates"] == 2
    lines = read_metrics(Path(config.output_dir))
    assert lines[-1]["grad_norm"] in ("nan", "inf")
    weights: Any = mx.load(str(Path(config.output_dir) / "adapters" / "adapters.safetensors"))
    assert all(mx.isfinite(array).all() for array in weights.values())
    done = subprocess.run(
        [*CLI, "train", "--model", "embedded", "--data", config.data, "--output-dir", str(tmp_path / "cli"),
         "--lora.scale", "1e38", "--max-skipped-updates", "2", "--epochs", "20"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3
    assert "What to try" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_update_with_exit_code_130(config: RunConfig, number: signal.Signals) -> None:
    path = Path(config.output_dir + ".yaml")
    path.write_text(replace(config, epochs=500, eval_every=1000).to_yaml())
    process = subprocess.Popen(
        [*CLI, "train", "--config", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = Path(config.output_dir) / "training_metrics.jsonl"
    until = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted after" in out
    summary = json.loads((Path(config.output_dir) / "training_summary.json").read_text())
    assert summary["ended"] == "interrupted"
    lines = read_metrics(Path(config.output_dir))
    assert lines[-1]["step"] == summary["steps"]
    assert f"mlx-qlora train --output-dir {config.output_dir} --resume" in out
    found, problems = newest(Path(config.output_dir))
    assert found is not None
    assert (found.state["state"]["step"], problems) == (summary["steps"], [])
    assert (Path(config.output_dir) / "adapters" / "adapters.safetensors").exists()


# The command


def test_the_three_ways_to_the_command_are_one() -> None:
    usages = []
    for command in (
        ["-m", "mlx_qlora", "train"],
        ["-m", "mlx_qlora.train"],
        ["-c", "from mlx_qlora.commands import main; main(['train', '--help'])"],
    ):
        more = [] if command[0] == "-c" else ["--help"]
        done = subprocess.run([sys.executable, *command, *more], capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stderr == ""
        usages.append(done.stdout)
    assert usages[0] == usages[1] == usages[2]
    for flag in ("--output-dir", "--lora.rank", "--early-stopping.patience", "--gradient-accumulation", "--config", "--demo"):
        assert flag in usages[0]


def test_every_file_in_examples_is_a_configuration() -> None:
    folder = Path(__file__).parent.parent / "examples"
    found = sorted(folder.glob("*.yaml"))
    names = ["club-v1", "club-v2", "demo", "distill-cached", "distill-cascod", "distill-ce", "distill-live"]
    names += [
        "distill-qwen2.5-7b-1.5b",
        "distill-qwen2.5-7b-3b",
        "mistral-7b-v1",
        "mistral-7b-v2",
        "tiny-model",
        "tiny-teacher",
    ]
    assert [path.stem for path in found] == names
    for path in found:
        assert yaml.safe_load(path.read_text()).keys() <= vars(RunConfig()).keys()
        from_yaml(path, RunConfig()).require_complete()


def test_a_stream_and_a_template_of_its_own_train(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are read as they come; the template travels with the run, for whoever uses the adapters."""
    settings = {"streaming": True, "shuffle_buffer": 8, "max_steps": 2, "chat_template": "alpaca", "score_questions": 1}
    result = train(replace(config, **settings, max_answer_tokens=2))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "2 updates of 8 examples, from a stream" in out
    assert "template    alpaca" in out
    assert result.summary["steps"] == 2
    template = (Path(config.output_dir) / "chat_template.jinja").read_text()
    assert "### Response" in template
    account = json.loads((Path(config.output_dir) / "data_account.json").read_text())
    assert "train" not in account["sizes"], "a stream is not counted beforehand"
    assert account["train"]["rows"] >= 8, "but afterwards, as far as it was read"
