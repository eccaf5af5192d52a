"""What it costs that the engine waits for each phase: updates with the waits and without them, by turns in one process.

    python benchmarks/phases.py --output benchmarks/results/phases.json

The embedded model with the demo's settings. Without the waits everything is handed to MLX, and only the update is waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx

from mlx_qlora.build import build
from mlx_qlora.config import RunConfig
from mlx_qlora.engine import steps as engine_steps
from mlx_qlora.engine.steps import nobody, steps
from mlx_qlora.look.console import Console
from mlx_qlora.model import backend
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.run.recorder import Recorder


class Hurried:
    """MLX, but `eval` only hands the work over, as long as `hurry` is set."""

    hurry = False

    def __getattr__(self, name: str) -> Any:
        return mx.async_eval if name == "eval" and self.hurry else getattr(mx, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--pairs", type=int, default=60, help="of updates")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    hurried = Hurried()
    engine_steps.mx = hurried  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as name:
        recorder = Recorder(Path(name))
        runs = {hurry: begun(name, recorder, hurry) for hurry in (False, True)}
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(args.pairs + 3):
            for hurry in (False, True) if number % 2 else (True, False):
                hurried.hurry = hurry
                start = time.perf_counter()
                next(runs[hurry])
                seconds[hurry].append(time.perf_counter() - start)
        recorder.abandon()
    ratios = [a / b for a, b in zip(seconds[False][3:], seconds[True][3:], strict=True)]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {backend.describe()}",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-qlora")},
        "pairs": args.pairs,
        "update_ms": 1000 * median(seconds[False][3:]),
        "without_waits_ms": 1000 * median(seconds[True][3:]),
        "ratio": median(ratios),
        "quartiles": [sorted(ratios)[len(ratios) // 4], sorted(ratios)[3 * len(ratios) // 4]],
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def begun(folder: str, recorder: Recorder, hurry: bool) -> Iterator[Any]:
    config = RunConfig(
        model="embedded", data="embedded", output_dir=f"{folder}/{hurry}", max_seq_length=256, learning_rate=2e-3,
        lora=LoraConfig(rank=32, scale=2.0), data_cache=f"{folder}/data",
    )  # fmt: skip
    from dataclasses import replace

    ready = build(config, Console(quiet=True), nobody)
    ready.loaded.model.train()
    engine = replace(ready.engine(), enter=nobody if hurry else recorder.enter)
    return steps(engine, ready.updates())


if __name__ == "__main__":
    main()
