"""The memory that a training step of Mistral-7B shapes needs, foreseen from shapes alone; nothing of that size is computed.

    python benchmarks/memory_7b.py --output benchmarks/results/memory_7b.json

4-bit weights, adapters of rank 8 on all linear layers, 4 examples of 1,024 tokens: in float32 as on the CPU, and in
bfloat16 as on a GPU, which is an estimate that was not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx

from mlx_qlora.data.layout import Kind, Layout
from mlx_qlora.engine.optim import OptimConfig
from mlx_qlora.foresee import Foresight, longest
from mlx_qlora.model import backend, frozen, lora
from mlx_qlora.model.load import of_config
from mlx_qlora.model.trunk import Passage

MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 32768, "rope_theta": 1e6,
    "tie_word_embeddings": False, "quantization": {"group_size": 64, "bits": 4},
}  # fmt: skip
ROWS, TOKENS = 4, 1024


def foreseen(cpu: bool) -> list[dict[str, Any]]:
    with backend.assumed(cpu):
        model = of_config(MISTRAL_7B)
        frozen.install(model)
        if cpu:
            model.set_dtype(mx.float32)
        lora.attach(model, lora.LoraConfig(rank=8))
        model.train()
        foresight = Foresight(model, longest([TOKENS + 1] * ROWS), OptimConfig())
        rows: list[dict[str, Any]] = []
        for at_once in (ROWS, 2, 1):
            for checkpoint in (True, False):
                begun = time.perf_counter()
                layout = Layout(Kind.PLAIN, token_budget=at_once * TOKENS)
                need = foresight.memory(layout, Passage(checkpoint=checkpoint))
                rows.append(
                    {
                        "as_on": "CPU, float32" if cpu else "GPU, bfloat16",
                        "rows_at_once": at_once,
                        "checkpoint": checkpoint,
                        "gb": {name: round(size / 1e9, 3) for name, size in need.to_json().items()},
                        "seconds": round(time.perf_counter() - begun, 2),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = [*foreseen(cpu=True), *foreseen(cpu=False)]
    for row in results:
        again = "checkpointed" if row["checkpoint"] else "kept"
        print(f"{row['as_on']:<14} {row['rows_at_once']} x {TOKENS} at once, {again:<13} {row['gb']['peak']:6.2f} GB")
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-qlora")} | {"python": platform.python_version()},
        "shapes": MISTRAL_7B,
        "examples": f"{ROWS} x {TOKENS} tokens in an update",
        "measured": False,
        "results": results,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
