"""What it saves to keep what the layers below the adapters give: the second epoch with and without, by turns.

    python benchmarks/kept_states.py --output benchmarks/results/kept_states.json

A generated 4-bit model (8 layers of 512, 32,000 tokens), chats with a common system prompt, adapters on the last half.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
from mlx_qlora.bench.data import generated
from mlx_qlora.bench.models import ModelShape, generate
from mlx_qlora.build import build
from mlx_qlora.config import RunConfig
from mlx_qlora.engine.steps import nobody, steps
from mlx_qlora.look.console import Console
from mlx_qlora.model import backend
from mlx_qlora.model.load import load_tokenizer
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.records import StepReport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", default="shared", choices=["shared", "mixed"])
    parser.add_argument("--updates", type=int, default=3, help="of 16 examples, in an epoch")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = lay_field(folder, args.data, args.updates)
        runs = {how: begun(replace(config, trunk_cache=how, output_dir=str(folder / how))) for how in ("auto", "off")}
        seconds: dict[str, list[float]] = {"auto": [], "off": []}
        losses: dict[str, list[float]] = {"auto": [], "off": []}
        for number in range(2 * args.updates):
            for how, run in runs.items():
                start = time.perf_counter()
                losses[how].append(next(run).loss)
                if number >= args.updates:  # the second epoch
                    seconds[how].append(time.perf_counter() - start)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {backend.describe()}",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-qlora")},
        "data": args.data,
        "seconds_per_update": {how: round(median(each), 3) for how, each in seconds.items()},
        "all_seconds": {how: [round(one, 3) for one in each] for how, each in seconds.items()},
        "times_faster": round(median(seconds["off"]) / median(seconds["auto"]), 3),
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(losses["auto"], losses["off"], strict=True)),
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def lay_field(folder: Path, kind: str, updates: int) -> RunConfig:
    (folder / "model").mkdir()
    (folder / "data").mkdir()
    generate(ModelShape(hidden=512, layers=8, vocab=32_000), 0, folder / "model")
    rows = list(islice(generated(kind, load_tokenizer("embedded"), 0), 16 * updates + 4))
    for name, part in (("train", rows[4:]), ("valid", rows[:4])):
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    return RunConfig(
        model=str(folder / "model"), data=str(folder / "data"), data_cache="off", epochs=2, batch_size=16,
        max_seq_length=2048, lora=LoraConfig(layers=4), trunk_cache_dir=str(folder / "kept"),
    )  # fmt: skip


def begun(config: RunConfig) -> Iterator[StepReport]:
    ready = build(config, Console(quiet=True), nobody)
    ready.loaded.model.train()
    return (report for report in steps(ready.engine(), ready.updates()) if isinstance(report, StepReport))


if __name__ == "__main__":
    main()
