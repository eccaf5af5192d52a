"""What `mlx-qlora distill` says where something is amiss."""

from __future__ import annotations

from pathlib import Path

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import pytest

from mlx_qlora import RunConfig
from mlx_qlora.commands import main
from mlx_qlora.config import from_yaml
from mlx_qlora.errors import ConfigError, ModelError
from mlx_qlora.model.attached import attach_from
from mlx_qlora.model.load import load, outline

WRONG_LINES = [
    ("distill: {temperature: hot}", "distill.temperature: hot came, a number, or a list of them, is expected."),
    ("distill: {alpha: []}", "distill.alpha: [] came, a number from 0 to 1, or a list of such, is expected."),
    ("distill: {temperature: [2, 0]}", "distill.temperature: [2.0, 0.0] came, a number from 0.05 to 100, or a list of such,"),
    ("distill: embedded", "distill: embedded came; settings below it are expected, such as `distill: {teacher: ...}`."),
]


@pytest.mark.parametrize(("line", "said"), WRONG_LINES)
def test_wrong_lines_of_a_file_are_named_as_they_are_written(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"seed: 1\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        from_yaml(tmp_path / "run.yaml", RunConfig())
    assert f"run.yaml:2: {said}" in str(raised.value)


def test_a_group_without_settings_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("distill:\n  # teacher: later\nlora:\nseed: 1\n", encoding="utf-8")
    assert from_yaml(tmp_path / "run.yaml", RunConfig()) == RunConfig(seed=1)


def test_a_run_in_the_place_of_a_teacher(tmp_path: Path) -> None:
    (tmp_path / "run" / "adapters").mkdir(parents=True)
    (tmp_path / "run" / "flight_recorder.bin").touch()
    (tmp_path / "run" / "adapters" / "adapters.safetensors").touch()
    for open_ in (load, outline):
        with pytest.raises(ModelError, match=r"run: this is a run: it has adapters, and no model"):
            open_(str(tmp_path / "run"))
        with pytest.raises(ModelError, match="adapters: this folder holds adapters, and no model"):
            open_(str(tmp_path / "run" / "adapters"))
    with pytest.raises(ModelError, match=r"teacher_adapters .*run: .*Did you mean .*run/adapters\?"):
        attach_from(load("embedded").model, tmp_path / "run", "distill.teacher_adapters")


def test_who_teaches_is_named(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "embedded", "--data", str(small_data), "--output-dir", str(tmp_path / "run"), "--max-steps", "1"]
    assert main(["distill", *flags]) == 0
    assert "WARNING: nobody teaches here" in capsys.readouterr().out
    assert main(["distill", *flags, "--overwrite", "--distill.teacher", "embedded"]) == 0
    assert "WARNING: this is the student itself" in capsys.readouterr().out
    assert main(["distill"]) == 0
    told = capsys.readouterr().out
    assert "distill cache " in told
    assert "--learning-rate" not in told


def test_what_evaluate_can_not_be_told_takes_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "embedded", "--data", "embedded", "--output-dir", str(tmp_path / "runs"), "--seeds", "1,2"]
    assert main(["train", *flags, "--seeds-evaluate", "questions=x"]) == 2
    said = capsys.readouterr().err
    assert said == "mlx-qlora train: seeds_evaluate: 'questions=x' came; 'x' is nothing that questions can be.\n"
    assert not (tmp_path / "runs").exists()
