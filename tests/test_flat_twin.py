"""The whole training in one file without abstractions, in a process of its own, against the library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qlora import LoraConfig, RunConfig, train
from mlx_qlora.assets import embedded_data, embedded_model
from mlx_qlora.run.metrics import read_metrics

FLAT = Path(__file__).parent.parent / "examples" / "flat_loop.py"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_flat_loop_has_the_librarys_losses(tmp_path: Path, dropout: float) -> None:
    """10 updates of 2 x 3 over 25 examples, so two epochs end in a remainder of 1."""
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("train", 25), ("valid", 2)):
        lines = (embedded_data() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        short = [{"messages": json.loads(line)["messages"][1:]} for line in lines]  # the flat loop's matmul is slow
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, short)), encoding="utf-8")
    settings = {
        "--model": str(embedded_model()), "--data": str(data), "--steps": "10", "--batch-size": "3",
        "--gradient-accumulation": "2", "--learning-rate": "3e-3", "--rank": "4", "--scale": "4",
        "--dropout": str(dropout), "--seed": "3",
    }  # fmt: skip
    command = [sys.executable, str(FLAT), *(word for pair in settings.items() for word in pair)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    flat = [float(line.split()[1]) for line in done.stdout.splitlines() if line]

    config = RunConfig(
        model="embedded", data=str(data), output_dir=str(tmp_path / "run"), max_steps=10, batch_size=3,
        gradient_accumulation=2, learning_rate=3e-3, seed=3, eval_every=10,
        lora=LoraConfig(rank=4, scale=4.0, dropout=dropout),
    )  # fmt: skip
    ours = [line["loss"] for line in read_metrics(train(config, quiet=True).output_dir)]
    assert len(ours) == len(flat) == 10
    assert ours == pytest.approx(flat, rel=1e-4)
    assert ours[-1] < ours[0] - 0.5, "it learns; equal losses of a model that stands still would say little"
