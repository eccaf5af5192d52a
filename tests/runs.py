"""Folders of runs, made up: what is in their files is known to the last figure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_qlora import RunConfig


def write_run(
    folder: Path, lines: Iterable[Mapping[str, Any]], summary: Mapping[str, Any] | None = None, **settings: Any
) -> Path:
    """`summary` None: the run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    config = RunConfig(model="embedded", data="embedded", output_dir=str(folder), **settings)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "training_metrics.jsonl").write_text(text, encoding="utf-8")
    if summary is not None:
        (folder / "training_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def course(updates: int, every: int = 10, per_epoch: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Lines of a run whose validation is best after two thirds of it; the first loss is far above the rest."""
    lines = []
    for step in range(1, updates + 1):
        wave = math.sin(12.9898 * (step + seed))
        line = {
            "step": step, "epoch": step / per_epoch, "loss": 30.0 if step == 1 else 1 + 2 / step + 0.3 * wave,
            "learning_rate": 1e-4 * min(1, step / 10), "grad_norm": math.exp(wave), "tokens_per_second": 1000 + 50 * wave,
            "peak_memory_gb": 4 + min(step, 5) / 10, "elapsed_s": 0.5 * step, "skipped_updates": int(step > 7),
        }  # fmt: skip
        if step % every == 0:
            far = abs(step / updates - 2 / 3)
            line |= {
                "val_loss": 1.2 + far, "train_eval_loss": 1.4 - 0.5 * step / updates, "val_loss_se": 0.03,
                "train_eval_loss_se": 0.04,
            }  # fmt: skip
        lines.append(line)
    return lines
