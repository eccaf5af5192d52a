"""This library in a race, and its plain twin."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from mlx.utils import tree_map
from numpy.typing import NDArray

from mlx_qlora.bench.data import corpus_of, supervised
from mlx_qlora.bench.settings import Spec, with_overrides
from mlx_qlora.bench.turns import Finished, Turns, Work
from mlx_qlora.build import build
from mlx_qlora.config import RunConfig
from mlx_qlora.data.order import groups
from mlx_qlora.engine.steps import nobody, steps
from mlx_qlora.look.console import Console
from mlx_qlora.model import lora
from mlx_qlora.model.load import load, wired_memory
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.records import Batch, Example, StepReport, Update, depth
from mlx_qlora.run import folder as run_folder


def run_config(spec: Spec) -> RunConfig:
    """What a user would set for this race. Without clipping, and with a constant learning rate: like the others."""
    base = RunConfig(
        model=spec.model,
        data=spec.data,
        data_cache="off",
        output_dir=str(Path(spec.work) / "run"),
        seed=spec.seed,
        epochs=1,
        batch_size=spec.batch_size,
        gradient_accumulation=spec.gradient_accumulation,
        max_seq_length=spec.max_seq_length,
        learning_rate=spec.learning_rate,
        schedule="constant",
        clip_grad_norm=0.0,
        lora=lora_config(spec),
    )
    return with_overrides(base, spec.overrides, Path(spec.work) / "ours.yaml", said="--ours")


def lora_config(spec: Spec) -> LoraConfig:
    return LoraConfig(rank=spec.rank, scale=spec.scale, layers=spec.layers)


def race(spec: Spec, turns: Turns) -> None:
    """The loop of `mlx_qlora.train.run`, without its validations."""
    ready = build(run_config(spec), Console(quiet=True), nobody)
    model = ready.loaded.model
    coming: deque[Update] = deque()  # the engine is an update ahead
    model.train()
    try:
        with wired_memory(model):
            turns.ready()
            for report in steps(ready.engine(), _watched(ready.updates(), coming)):
                assert isinstance(report, StepReport), "nobody asked for anything else"
                turns.done(
                    loss=report.loss,
                    supervised=report.supervised_tokens,
                    positions=report.positions,
                    shapes=shapes(coming.popleft()),
                )
    except Finished as end:
        run_folder.deliver(Path(end.folder), ready.trained.delivered(lora.adapter_arrays(model)))
        raise


def _watched(updates: Iterable[Update], coming: deque[Update]) -> Iterator[Update]:
    for update in updates:
        coming.append(update)
        yield update


def shapes(update: Update) -> list[Work]:
    """What `floor` multiplies."""
    return [_work(batch) for batch in update.batches]


def _work(batch: Batch) -> Work:
    rows, length = batch.rows.shape
    attention: list[tuple[int, int, int]] = []
    for number, (start, end, _) in enumerate(batch.segments):
        attention.append((1, end - start, depth(batch.segments, number)))
    if not batch.segments:
        prefix = batch.shared.size
        attention = [(rows, length, prefix + length), *([(1, prefix, prefix)] if prefix else [])]
    return {
        "positions": batch.computed,
        "places": batch.positions.size,
        "attention": attention,
        "kept": batch.states is not None,
    }


def race_flat(spec: Spec, turns: Turns) -> None:
    """The mathematics of examples/flat_loop.py: padded rows, logits everywhere. Our kernels, none of our tricks."""
    loaded = load(spec.model)
    model = loaded.model
    attached = lora.attach(model, lora_config(spec), seed=spec.seed)
    corpus = corpus_of(spec.data, loaded.tokenizer, spec.seed, spec.max_seq_length)
    assert corpus.train is not None
    optimizer = mlx.optimizers.AdamW(spec.learning_rate, bias_correction=True)
    gradient = nn.value_and_grad(model, _loss_sum)
    model.train()
    try:
        with wired_memory(model):
            turns.ready()
            for numbers, _ in groups(corpus.order, spec.examples_per_update, 1, np.empty(0, np.int64)):
                examples = sorted((corpus.train[number] for number in numbers.tolist()), key=lambda one: -len(one.tokens))
                turns.done(**_flat_update(model, optimizer, gradient, examples, spec.batch_size))
    except Finished as end:
        run_folder.deliver(Path(end.folder), attached.delivered(lora.adapter_arrays(model)))
        raise


def _flat_update(model: nn.Module, optimizer: Any, gradient: Any, examples: list[Example], rows: int) -> dict[str, Any]:
    grads: Any = None
    loss, positions = mx.array(0.0), 0
    for start in range(0, len(examples), rows):
        batch = examples[start : start + rows]
        tokens = _padded([example.tokens for example in batch], np.int32)
        weights = _padded([example.weights for example in batch], np.float32)
        more, own = gradient(model, tokens, weights)
        grads = own if grads is None else tree_map(mx.add, grads, own)
        loss = loss + more
        positions += tokens.shape[0] * (tokens.shape[1] - 1)
        mx.eval(grads, loss)
    weight = float(sum(example.weights[1:].sum() for example in examples))
    optimizer.update(model, tree_map(lambda array: array / weight, grads))
    mx.eval(model.trainable_parameters(), optimizer.state)
    return {"loss": cast(float, loss.item()) / weight, "supervised": sum(map(supervised, examples)), "positions": positions}


def _loss_sum(model: nn.Module, tokens: mx.array, weights: mx.array) -> mx.array:
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return (nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="none") * weights[:, 1:]).sum()


def _padded(rows: list[Any], dtype: type) -> mx.array:
    """Rows of one length, padded on the right: a multiple of 8, and one more for the shift."""
    whole: NDArray[Any] = np.zeros((len(rows), -(-(max(map(len, rows)) - 1) // 8) * 8 + 1), dtype)
    for number, row in enumerate(rows):
        whole[number, : len(row)] = row
    return mx.array(whole)
