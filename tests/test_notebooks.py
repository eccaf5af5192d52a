"""The notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from mlx_qlora import read_history

FOLDER = Path(__file__).parent.parent / "notebooks"
# What is put behind the cell of settings, so that a test does not take minutes.
SHORTER = {
    "mistral_qlora_training": 'SETTINGS |= {"max_steps": 6, "eval_every": 3}',
    "train_v2_optimized": 'QUESTIONS = 4; V1 |= {"max_steps": 6, "eval_every": 3}; V2 |= {"max_steps": 8, "eval_every": 2}',
    "custom_loss": "UPDATES, EVERY = 5, 2",
}


def executed(name: str, folder: Path) -> Any:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    first = next(place for place, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(SHORTER[name]))
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def shown(notebook: Any) -> str:
    """All that its cells print and show."""
    return "\n".join(
        output.get("text", "") + "\n".join(map(str, output.get("data", {}).values()))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


def pictures(notebook: Any) -> list[int]:
    """How many pictures stand under each cell that has any."""
    found = [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return [number for number in found if number]


def test_first_steps(tmp_path: Path) -> None:
    notebook = executed("mistral_qlora_training", tmp_path)
    told, run = shown(notebook), read_history(tmp_path / "runs" / "first-steps")
    assert run.summary["ended"] == "finished"
    assert run.best is not None
    assert f"'val_loss': {run.best[0].val_loss}" in told
    assert pictures(notebook) == [1], "the curves are drawn in one place, anew"
    assert (run.folder / "report.html").stat().st_size > 10_000
    assert json.loads((run.folder / "evaluation_report.json").read_text())["questions"] == 20


def test_v1_against_v2(tmp_path: Path) -> None:
    notebook = executed("train_v2_optimized", tmp_path)
    v1, v2 = (read_history(tmp_path / "runs" / name) for name in ("v1", "v2"))
    assert (v1.step, v2.step) == (6, 8)
    assert (v1.settings["lora.dropout"], v2.settings["lora.dropout"]) == (0.0, 0.08)
    told = shown(notebook)
    assert v1.best is not None
    assert f"{v1.best[0].val_loss:.3f}" in told
    assert pictures(notebook) == [1, 1, 1]


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    told = shown(executed("custom_loss", tmp_path))
    assert "update 5: focal loss" in told
    names = os.listdir(tmp_path / "runs" / "custom-loss" / "adapters")
    assert sorted(names) == ["adapter_config.json", "adapters.safetensors"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_they_are_thin_and_hold_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 15
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "embedded" in code[0].source, "the first cell says where model and data are"
    assert "Mistral-7B" in code[0].source, "and what to say for a real one"
    assert path.stem in SHORTER


def test_live_curves_outside_of_a_notebook_say_so(tmp_path: Path) -> None:
    code = f"import mlx_qlora\nwith mlx_qlora.live_curves({str(tmp_path)!r}): print('begun')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].endswith("this is none; curves(...).save(path) does.")
