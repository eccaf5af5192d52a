"""The compiled micro-step, which GPUs use, against the eager one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_qlora.data.layout import BatchConfig, lay_out, updates
from mlx_qlora.data.order import Order
from mlx_qlora.data.prepare import InMemory
from mlx_qlora.engine.optim import OptimConfig, make_optimizer
from mlx_qlora.engine.steps import Engine, dropout_key, micro_step, steps
from mlx_qlora.model import backend, frozen, lora
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.trunk import states_before
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import START, Batch, LossSum, Update
from tests.conftest import in_rows, largest_difference, make_examples, randomize_adapters, same_bytes, tiny_model
from tests.test_layouts import LAYOUTS, family

pytestmark = pytest.mark.skipif(
    backend.on_cpu() and shutil.which("g++") is None, reason="mx.compile on the CPU needs a C++ compiler"
)


def engine(compiled: bool, learning_rate: float = 1e-2) -> Engine:
    model = tiny_model("mistral")
    frozen.install(model)
    lora.attach(model, LoraConfig(rank=4, scale=2.0, dropout=0.3))
    randomize_adapters(model)
    model.train()
    config = OptimConfig(learning_rate=learning_rate, schedule="constant")
    return Engine(model, sft(), make_optimizer(config, 10), config, lora.dropout_keys, seed=1, compiled=compiled)


def test_one_micro_step_has_the_same_loss_and_gradient_for_every_shape_and_key() -> None:
    eager, compiled = micro_step(engine(False)), micro_step(engine(True))
    seen = []
    for number, batch in enumerate(lay_out(make_examples(6), in_rows(2))):
        key = dropout_key(0, number)
        loss, grads = compiled(batch, key)
        expected, expected_grads = eager(batch, key)
        assert loss.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
        assert loss.weight.item() == expected.weight.item()
        assert largest_difference(grads, expected_grads) < 1e-5
        again, _ = compiled(batch, dropout_key(1, number))
        seen += [loss.total.item(), again.total.item()]
    assert len(set(seen)) == len(seen), "another key drops other places; a key that was baked in would not"


def test_a_whole_run_is_the_same() -> None:
    """The updates change what the compiled step computes with: parameters that were baked in would not move."""
    made = make_examples(10)
    losses = {}
    for compiled in (False, True):
        planned = updates(
            InMemory(made),
            Order((len(made),), seed=0),
            BatchConfig(batch_size=2, gradient_accumulation=2),
            in_rows(2),
            epochs=2,
        )
        losses[compiled] = [report.loss for report in steps(engine(compiled), planned)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert np.ptp(losses[True]) > 0.1


def test_the_model_is_usable_after_a_compiled_step() -> None:
    made = engine(True)
    micro_step(made)(lay_out(make_examples(2), in_rows(2))[0], dropout_key(0, 0))
    made.model.eval()
    assert mx.isfinite(made.model(mx.array([[3, 4, 5]]))).all()


def test_padded_batches_behind_a_prefix_and_kept_states_compile() -> None:
    """A dozen shapes at most are traced, and each equals the eager step."""
    made = engine(True)
    eager = micro_step(replace(made, compiled=False))
    compiled = micro_step(made)
    for batch in lay_out(family(), LAYOUTS["padded"]):
        states = states_before(made.model, batch, 0)
        for each in (batch, batch._replace(states=states)):
            loss, grads = compiled(each, dropout_key(0, 0))
            expected, expected_grads = eager(each, dropout_key(0, 0))
            assert loss.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
            assert largest_difference(grads, expected_grads) < 1e-5


def test_the_largest_batch_comes_first_and_changes_nothing() -> None:
    made = make_examples(6)
    planned = list(updates(InMemory(made), Order((6,), seed=0), BatchConfig(batch_size=2), in_rows(2), epochs=1))
    seen: list[int] = []

    def watched(model: nn.Module, batch: Batch) -> LossSum:
        seen.append(batch.computed)
        return sft()(model, batch)

    plain = [report.loss for report in steps(engine(False), planned)]
    longest = Update((), 0.0, tuple(sorted(made, key=lambda one: len(one.tokens))[-2:]), 0, 0, START)

    def smaller(update: Update, _: int) -> tuple[Batch, ...]:
        return lay_out(update.examples, in_rows(2))

    rehearsed = replace(engine(False), rehearse=longest, objective=watched, lay_out=smaller)
    assert [report.loss for report in steps(rehearsed, planned)] == plain
    assert seen[0] == max(seen)
    assert len(seen) == 4


def test_an_update_that_was_made_is_reported_even_if_the_next_can_not_be_read() -> None:
    made = make_examples(6)
    planned = list(updates(InMemory(made), Order((6,), seed=0), BatchConfig(batch_size=2), in_rows(2), epochs=1))

    def broken() -> Iterator[Update]:
        yield from planned[:2]
        raise OSError("the disk is gone")

    own = engine(False)
    running = steps(own, broken())
    assert [next(running).step, next(running).step] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(running)
    assert own.optimizer.state["step"].item() == 2


def test_an_update_that_fails_has_changed_nothing() -> None:
    """Whatever fails, and wherever: here it is the evaluation of the finished update."""
    own = engine(False)
    planned = list(updates(InMemory(make_examples(4)), Order((4,), seed=0), BatchConfig(batch_size=2), in_rows(2), epochs=1))
    running = steps(own, planned)
    next(running)
    before = tree_map(lambda a: a + 0, (own.model.trainable_parameters(), own.optimizer.state))
    mx.eval(before)

    def broken(phase: str, **facts: object) -> None:
        if phase == "update":
            own.optimizer.state = {"step": mx.array(7)}
            own.model.update(tree_map(lambda a: a * 0, own.model.trainable_parameters()))
            raise RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error")

    object.__setattr__(own, "enter", broken)
    with pytest.raises(RuntimeError, match="Timeout"):
        next(running)
    assert same_bytes((own.model.trainable_parameters(), own.optimizer.state), before)
