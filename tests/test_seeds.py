"""Several seeds of one configuration: real runs, an interruption in between, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_qlora.commands import main
from mlx_qlora.config import parse
from mlx_qlora.look.comparison import statistics
from mlx_qlora.look.comparison.compare import compare
from mlx_qlora.look.comparison.seeds import told


def asked(data: Path, output: Path, *more: str) -> list[str]:
    settings = "--max-steps 2 --batch-size 4 --eval-every 1 --max-answer-tokens 3 --lora.rank 2 --data-cache off"
    return ["train", "--model", "embedded", "--data", str(data), "--output-dir", str(output), *settings.split(), *more]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "training_summary.json").read_text())
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def repeated(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeds 7 and 8, the second ended by Ctrl-C in the middle and gone on with."""
    output = tmp_path_factory.mktemp("repeated") / "out"
    command = asked(small_data, output, "--seeds", "7,8", "--seeds-evaluate", "questions=2", "split=valid")
    child = subprocess.Popen([sys.executable, "-m", "mlx_qlora", *command], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (output / "seed_8" / "training_metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 130, said
    assert said.endswith(f"seeds after it: mlx-qlora train --output-dir {output} --resume\n")
    assert not (output / "seeds.json").exists()
    before = files(output / "seed_7")
    assert main(["train", "--output-dir", str(output), "--resume"]) == 0
    assert files(output / "seed_7") == before, "a seed that is done is left alone"
    return output


def test_every_seed_is_the_run_that_it_is_alone(repeated: Path, small_data: Path, tmp_path: Path) -> None:
    """Also the one that was interrupted: the same updates, the same losses, an evaluation of the same questions."""
    assert main(asked(small_data, tmp_path / "alone", "--seed", "8")) == 0
    alone, own = summary(tmp_path / "alone"), summary(repeated / "seed_8")
    assert own["best"] == alone["best"]
    assert own["best"]["val_loss"] != summary(repeated / "seed_7")["best"]["val_loss"]
    reports = [json.loads((repeated / f"seed_{seed}" / "evaluation_report.json").read_text()) for seed in (7, 8)]
    assert [report["settings"]["max_answer_tokens"] for report in reports] == [3, 3]
    assert [len((repeated / f"seed_{seed}" / "predictions.jsonl").read_text().splitlines()) for seed in (7, 8)] == [2, 2]


def test_what_they_come_to(repeated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((repeated / "seeds.json").read_text())
    losses = [summary(repeated / f"seed_{seed}")["best"]["val_loss"] for seed in (7, 8)]
    by_t = statistics.mean(losses)
    assert found["mean"]["val_loss"] == {"value": by_t.value, "low": by_t.low, "high": by_t.high, "seeds": 2}
    assert [each["val_loss"] for each in found["seeds"]] == losses
    assert any("two seeds say little" in line for line in told(repeated, [7, 8]).lines())
    assert main(["compare", str(repeated)]) == 0
    assert "One configuration with 2 seeds: val_loss" in capsys.readouterr().out
    assert compare([repeated]).names == ["out (2 seeds)"]


def test_a_seed_that_a_guard_has_stopped_is_told_of_and_in_no_mean(repeated: Path, small_data: Path, tmp_path: Path) -> None:
    """The others go on, and the exit code says it; to go on does not train it again."""
    output = tmp_path / "out"
    bad = ("--learning-rate", "1e30", "--clip-grad-norm", "0", "--on-nonfinite", "stop", "--seeds-evaluate", "off")
    assert main(asked(small_data, output, "--seeds", "1,2", "--max-steps", "6", *bad)) == 3
    found = json.loads((output / "seeds.json").read_text())
    assert found["left_out"] == [1, 2]
    assert [each["ended"] for each in found["seeds"]] == ["not finite"] * 2
    before = files(output / "seed_1")
    assert main(["train", "--output-dir", str(output), "--resume"]) == 3
    assert files(output / "seed_1") == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seeds", "42,42"], "seeds: '42,42' came, different whole numbers from 0"),
        (["--seeds", "a,b"], "seeds: 'a,b' came"),
        (["--seeds", "1,-2"], "seeds: '1,-2' came"),
        (["--seeds", ""], "seeds: '' came"),
        (["--seeds", "1", "--seeds-evaluate", "split=moon"], "'moon' is nothing that split can be"),
        (["--seeds", "1", "--seeds-evaluate", "off", "split=test"], "seeds_evaluate: 'off' came"),
        (["--seeds", "1", "--seeds-evaluate", "model=x"], "seeds_evaluate: 'model=x' came"),
    ],
)
def test_what_a_person_gets_wrong(
    more: list[str], said: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(asked(small_data, tmp_path / "out", *more)) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_folders_that_are_in_the_way(repeated: Path, small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(repeated)
    for output, more, said in (
        (repeated, [], "holds runs of the seeds 7, 8 already"),
        (repeated, ["--resume", "--learning-rate", "0.5"], "learning_rate: was 0.0001, is 0.5"),
        (repeated / "seed_7", [], "holds a run itself"),
    ):
        assert main(asked(small_data, output, "--seeds", "7,8", *more)) == 2
        assert said in capsys.readouterr().err
    assert files(repeated) == before


def test_seeds_may_stand_in_a_file(tmp_path: Path) -> None:
    for written in ("42,123", [42, 123], "42 123"):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"seeds": written}))
        assert parse(["--config", str(tmp_path / "run.yaml")]).each_seed == (42, 123)
