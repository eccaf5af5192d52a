from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_qlora.data.layout import BatchConfig, lay_out, updates
from mlx_qlora.data.order import Order
from mlx_qlora.data.prepare import InMemory
from mlx_qlora.engine.accumulate import GradientAccumulator
from mlx_qlora.model import lora
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Example
from tests.conftest import in_rows, largest_difference, loss_and_gradient, make_examples, randomize_adapters


def accumulated(model: nn.Module, examples: list[Example], rows: int):  # type: ignore[no-untyped-def]
    accumulator = GradientAccumulator()
    for batch in lay_out(examples, in_rows(rows)):
        _, grads = loss_and_gradient(model, lambda model, batch=batch: sft()(model, batch).total)
        accumulator.add(grads, sft()(model, batch).weight)
    return accumulator.take()


def test_micro_batches_of_unequal_weight_give_the_gradient_of_one_batch(any_model: nn.Module) -> None:
    examples = make_examples(8)
    lora.attach(any_model, LoraConfig(rank=4, scale=2.0))
    randomize_adapters(any_model)
    whole = accumulated(any_model, examples, 8)
    for rows in (1, 2, 4):
        assert largest_difference(accumulated(any_model, examples, rows), whole) < 1e-5


def test_a_remainder_has_its_own_weight(embedded) -> None:  # type: ignore[no-untyped-def]
    """11 examples in updates of 2 x 4: the last update has 3, and its gradient is that of a batch of 3."""
    model = embedded.model
    lora.attach(model, LoraConfig(rank=2, scale=2.0))
    randomize_adapters(model)
    examples = make_examples(11)
    *_, last = updates(
        InMemory(examples),
        Order((len(examples),), seed=3),
        BatchConfig(batch_size=2, gradient_accumulation=4),
        in_rows(2),
        epochs=1,
    )
    assert len(last.ids) == 3
    accumulator = GradientAccumulator()
    for batch in last.batches:
        _, grads = loss_and_gradient(model, lambda model, batch=batch: sft()(model, batch).total)
        accumulator.add(grads, sft()(model, batch).weight)
    remaining = [example for example in examples if example.id in last.ids]
    assert largest_difference(accumulator.take(), accumulated(model, remaining, 3)) < 1e-5


def test_equal_weights_give_the_mean_of_means() -> None:
    accumulator = GradientAccumulator(window=3)
    full = [accumulator.add({"w": mx.array([value])}, weight=1) for value in (1.0, 2.0, 6.0)]
    assert full == [False, False, True]
    assert accumulator.take()["w"].item() == pytest.approx(3.0)
    assert accumulator.count == 0
    with pytest.raises(ValueError, match="nothing was accumulated"):
        accumulator.take()


def test_a_whole_weight_of_zero_gives_zero_and_not_nan() -> None:
    accumulator = GradientAccumulator()
    accumulator.add({"w": mx.zeros(2)}, weight=0)
    assert mx.array_equal(accumulator.take()["w"], mx.zeros(2))


def test_low_precision_gradients_add_up_in_float32() -> None:
    accumulator = GradientAccumulator()
    for _ in range(1000):
        accumulator.add({"w": mx.array([1.0], mx.bfloat16)}, weight=1)
    assert accumulator.weight.item() == 1000
    assert accumulator.take()["w"].item() == 1.0  # in bf16 the sum would stand still at 256


def test_a_window_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="window: 0 came"):
        GradientAccumulator(window=0)
