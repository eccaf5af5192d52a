"""Distillation with 151,936 classes: memory and time of the loss and all gradients, in chunks, from a cache, and dense.

    python benchmarks/distill_memory.py

Teacher and student are small random Qwen2s with the head of a large one, 4-bit; the loss is half T^2 x KL and half
cross-entropy. Dense is what a loop of one's own does: all logits of both models at once, differentiated by MLX. Each is
a process of its own, and `mx.get_peak_memory` is taken over an update after the first one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.model import backend, frozen, lora
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.trunk import supervised_logits
from mlx_qlora.objectives import divergence
from mlx_qlora.objectives.distill import DistillConfig, distil
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Batch, Example, LossSum

VOCABULARY, WIDTH, ROWS, LENGTH = 151_936, 256, 2, 257
TEMPERATURE, ALPHA, TOP_K = 2.0, 0.5, 64
WAYS = ("cross-entropy alone", "chunks, live teacher", "chunks, cache of 64", "dense")
HERE = Path(__file__).parent


def model(seed: int) -> nn.Module:
    from mlx_lm.models.qwen2 import Model, ModelArgs

    mx.random.seed(seed)
    made: nn.Module = Model(
        ModelArgs(
            model_type="qwen2", hidden_size=WIDTH, num_hidden_layers=2, intermediate_size=2 * WIDTH, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=VOCABULARY, rope_theta=1e4, tie_word_embeddings=True,
        )
    )  # fmt: skip
    nn.quantize(made, group_size=64, bits=4)
    frozen.install(made)
    made.freeze()
    mx.eval(made.parameters())
    return made


def batch() -> Batch:
    rng = np.random.default_rng(0)
    weights = np.ones(LENGTH, np.float32)
    weights[0] = 0
    made = [Example(str(row), rng.integers(0, VOCABULARY, LENGTH).astype(np.int32), weights) for row in range(ROWS)]
    (one,) = lay_out(made, Layout(Kind.PLAIN, rows=ROWS, token_budget=10_000))
    return one


def dense(teacher: nn.Module) -> Any:
    def objective(student: nn.Module, batch: Batch) -> LossSum:
        logits = supervised_logits(student, batch).astype(mx.float32)
        said = mx.stop_gradient(supervised_logits(teacher, batch).astype(mx.float32))
        log_p, log_q = (
            each - mx.logsumexp(each, axis=-1, keepdims=True) for each in (said / TEMPERATURE, logits / TEMPERATURE)
        )
        far = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        near = nn.losses.cross_entropy(logits, batch.targets)
        total = (batch.weights * (ALPHA * TEMPERATURE**2 * far + (1 - ALPHA) * near)).sum()
        return LossSum(total, batch.weights.sum())

    return objective


def prepared(way: str, teacher: nn.Module, one: Batch) -> tuple[Any, Batch]:
    """(objective, batch) of a way."""
    schedule = (mx.array(TEMPERATURE), mx.array(ALPHA))
    if way == WAYS[0]:
        return sft(), one
    if way == WAYS[1]:
        return distil(DistillConfig(logit_clip=0.0), VOCABULARY, teacher), one._replace(beside=schedule)
    if way == WAYS[2]:
        parts = []
        logits = supervised_logits(teacher, one).astype(mx.float32)
        for start in range(0, len(logits), 64):
            parts.append(divergence.largest(logits[start : start + 64], TOP_K, schedule[0]))
            mx.eval(parts)
        ids, scores, rest = (mx.concatenate(each) for each in zip(*parts, strict=True))
        return distil(DistillConfig(logit_clip=0.0), VOCABULARY), one._replace(beside=(*schedule, scores, ids, rest))
    return dense(teacher), one


def measured(way: str, repeats: int) -> dict[str, Any]:
    backend.reuse_memory()
    student, teacher, one = model(0), model(1), batch()
    lora.attach(student, LoraConfig(rank=8))
    student.train()
    objective, one = prepared(way, teacher, one)
    mx.eval(one)
    step = nn.value_and_grad(student, lambda: objective(student, one).total)
    seconds = []
    for number in range(1 + repeats):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        begun = time.perf_counter()
        loss, gradients = step()
        mx.eval(loss, gradients)
        if number:
            seconds.append(time.perf_counter() - begun)
    norm = float(sum(mx.square(each.astype(mx.float32)).sum() for _, each in tree_flatten(gradients)).item()) ** 0.5
    peak = mx.get_peak_memory() - before
    return {"loss": loss.item(), "gradient": norm, "peak_gb": peak / 1e9, "seconds": median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measured(arguments.way, arguments.repeats)))
        return
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--repeats", str(arguments.repeats)]
        found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{way:<22}", json.dumps(found[way]))
    live, whole = found[WAYS[1]], found[WAYS[3]]
    result = {
        "what": f"{ROWS * (LENGTH - 1):,} places of {VOCABULARY:,} classes; beside the weights, over one update",
        "ways": found,
        "live_of_dense_memory": live["peak_gb"] / whole["peak_gb"],
        "cache_of_dense_memory": found[WAYS[2]]["peak_gb"] / whole["peak_gb"],
        "live_of_dense_time": live["seconds"] / whole["seconds"],
        "machine": f"{platform.machine()}, 2 shared cores, {backend.describe()}",
        "versions": {name: version(name) for name in ("mlx-qlora", "mlx", "mlx-lm")} | {"python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }
    (HERE / "results" / "distill_memory.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name.endswith(("memory", "time"))}))


if __name__ == "__main__":
    main()
