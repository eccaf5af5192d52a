"""What checkpoints cost in a run that saves at each of its validations, as by default.

    python benchmarks/saving.py

What the training thread itself spends on saving, and the processor time of the thread that writes, as shares of the run.
(Times of whole runs with and without saves differed by the noise of a shared machine, many times the share.)
"""

from __future__ import annotations

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import json
import platform
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from mlx_qlora import LoraConfig, RunConfig, train
from mlx_qlora.keep import Keeper
from mlx_qlora.model import backend
from mlx_qlora.run.checkpoint import Saver

RESULT = Path(__file__).parent / "results" / "saving.json"
REPEATS = 2


class Spent:
    """Seconds that saving took: of the training thread, and of the writing one."""

    def __init__(self) -> None:
        self.training = self.writing = 0.0
        self.saves = 0


def watched(spent: Spent) -> None:
    """Measure what goes on in `Keeper.save` and in the thread behind it."""
    plain_save, plain_start = Keeper.save, Saver.start

    def save(self: Keeper, *arguments: Any, **more: Any) -> None:
        begun = time.perf_counter()
        plain_save(self, *arguments, **more)
        spent.training += time.perf_counter() - begun
        spent.saves += 1

    def start(self: Saver, work: Any) -> None:
        def timed() -> None:
            begun = time.thread_time()
            work()
            spent.writing += time.thread_time() - begun

        plain_start(self, timed)

    Keeper.save, Saver.start = save, start  # type: ignore[method-assign]


def seconds(config: RunConfig) -> float:
    return float(train(config, quiet=True).summary["elapsed_s"])


def main() -> None:
    spent = Spent()
    watched(spent)
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model="embedded", data="embedded", output_dir=f"{folder}/run", epochs=1, learning_rate=2e-3, overwrite=True,
            max_seq_length=256, lora=LoraConfig(rank=32, scale=2.0), data_cache=f"{folder}/data",
        )  # fmt: skip
        train(replace(config, max_steps=5), quiet=True)
        training, writing, saves = [], [], 0
        for _ in range(REPEATS):
            before = spent.training, spent.writing, spent.saves
            saving = seconds(config)
            training.append((spent.training - before[0]) / saving)
            writing.append((spent.writing - before[1]) / saving)
            saves = spent.saves - before[2]
            print(f"{saving:.1f} s with {saves} saves, of it {training[-1]:.3%} of the training thread")
    found = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {backend.describe()}",
        "versions": {name: version(name) for name in ("mlx-qlora", "mlx", "mlx-lm")} | {"python": platform.python_version()},
        "updates": 212,
        "saves": saves,
        "training thread, share of the time": median(training),
        "writer's processor time, share of the time": median(writing),
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
