"""Every layout, alone and with the others, has the plain loss and the plain gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qlora.data.layout import Kind, Layout, histories, lay_out
from mlx_qlora.data.shapes import Shapes
from mlx_qlora.engine.accumulate import GradientAccumulator
from mlx_qlora.engine.steps import add_losses
from mlx_qlora.model import frozen, lora
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.trunk import PLAIN, Passage
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Batch, Example, LossSum
from tests.conftest import SHAPES, largest_difference, loss_and_gradient, randomize_adapters, tiny_model

KEY = mx.random.key(11)
PACKABLE = [shape for shape in SHAPES if shape != "gemma2"]  # its attention is written out in its own code


def family(seed: int = 0) -> list[Example]:
    """Chats that share a system prompt, some of them a question too, two of them everything, and one nothing."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return [int(each) for each in rng.integers(3, 96, count)]

    system, question = tokens(20), tokens(11)
    rows = [system + question + tokens(n) for n in (4, 9, 1)] + [system + tokens(n) for n in (14, 6)] + [tokens(17)]
    rows += [rows[0], rows[1] + tokens(12), rows[3][:29]]
    made = []
    for number, row in enumerate(rows):
        weights = rng.choice([0.0, 0.0, 0.5, 1.0], len(row)).astype(np.float32)
        weights[0], weights[-1] = 0.0, 1.0
        made.append(Example(f"family:{number}", np.array(row, np.int32), weights))
    return made


def trainable(shape: str, dropout: float = 0.0, layers: int | None = None, **more: Any) -> nn.Module:
    model = tiny_model(shape, **more)
    frozen.install(model)
    lora.attach(model, LoraConfig(rank=4, scale=2.0, dropout=dropout, layers=layers))
    randomize_adapters(model)
    model.train()
    return model


def plainly(model: nn.Module, examples: list[Example], key: mx.array = KEY) -> tuple[LossSum, Any]:
    """One example at a time through the model's own code, all logits, a mean over the weights."""

    def loss(model: nn.Module) -> mx.array:
        total = mx.array(0.0)
        with lora.dropout_keys(model, key):
            for example in examples:
                for _, adapter in lora.adapted(model):
                    adapter.set_marks(mx.array(histories(example.tokens[:-1])))
                logits = model(mx.array(example.tokens[None, :-1]))[0].astype(mx.float32)
                losses = nn.losses.cross_entropy(logits, mx.array(example.tokens[1:]))
                total = total + (losses * mx.array(example.weights[1:])).sum()
        return total

    total, grads = loss_and_gradient(model, loss)
    weight = mx.array(sum(float(example.weights.sum()) for example in examples))
    accumulator = GradientAccumulator()
    accumulator.add(grads, weight)
    return LossSum(total, weight), accumulator.take()


def through(model: nn.Module, batches: tuple[Batch, ...], passage: Passage = PLAIN, key: mx.array = KEY) -> tuple[LossSum, Any]:
    accumulator = GradientAccumulator()
    whole: LossSum | None = None
    for batch in batches:
        parts: list[LossSum] = []

        def loss(model: nn.Module, batch: Batch = batch, parts: list[LossSum] = parts) -> mx.array:
            parts.append(sft(passage=passage)(model, batch))
            return parts[0].total

        with lora.dropout_keys(model, key):
            total, grads = loss_and_gradient(model, loss)
        own = LossSum(total, batch.weights.sum())
        accumulator.add(grads, own.weight)
        whole = own if whole is None else add_losses(whole, own)
    assert whole is not None
    return whole, accumulator.take()


def assert_same(got: tuple[LossSum, Any], expected: tuple[LossSum, Any], tolerance: float = 3e-5) -> None:
    (loss, grads), (wanted, wanted_grads) = got, expected
    assert loss.weight.item() == pytest.approx(wanted.weight.item(), rel=1e-6)
    assert loss.total.item() == pytest.approx(wanted.total.item(), rel=1e-5)
    assert largest_difference(grads, wanted_grads) < tolerance


SHAPED = Shapes(lengths=(8, 32, 48), places_of=(32, 48, 64), prefix=tuple(family()[0].tokens[:20].tolist()))
LAYOUTS = {
    "plain": Layout(Kind.PLAIN, rows=3),
    "packed": Layout(Kind.PACKED),
    "packed-small": Layout(Kind.PACKED, token_budget=48),
    "padded": Layout(Kind.PADDED, shapes=SHAPED),
    "padded-nothing-known": Layout(Kind.PADDED, token_budget=64),
}


@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_has_the_plain_gradient(shape: str, layout: str, dropout: float, checkpoint: bool) -> None:
    if layout.startswith("packed") and shape not in PACKABLE:
        pytest.skip("this model can't be packed; the next test says so")
    model = trainable(shape, dropout)
    batches = lay_out(family(), LAYOUTS[layout])
    got = through(model, batches, Passage(checkpoint=checkpoint, chunk=16))
    assert_same(got, plainly(model, family()))
