from __future__ import annotations

import math
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_qlora.data.layout import BatchConfig, Layout, updates
from mlx_qlora.data.order import Order
from mlx_qlora.data.prepare import InMemory
from mlx_qlora.engine.optim import (
    OPTIMIZERS,
    OptimConfig,
    OptimizerName,
    begin,
    global_norm,
    guarded_update,
    make_optimizer,
    make_schedule,
    times,
)
from mlx_qlora.engine.steps import Engine, steps
from mlx_qlora.errors import ConfigError
from mlx_qlora.model import lora
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.trained import of_vocabulary
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Batch, LossSum
from tests.conftest import make_examples, same_bytes, tiny_model


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    config = OptimConfig(learning_rate=2.0, schedule=schedule, warmup_steps=3)  # type: ignore[arg-type]
    rate = make_schedule(config, total_steps=7)
    assert [rate(mx.array(step)).item() / 2 for step in range(7)] == pytest.approx(expected, abs=1e-6)


def test_the_literal_names_the_optimizers_that_there_are() -> None:
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_moves_down_and_a_bad_gradient_leaves_every_byte(name: str) -> None:
    mx.random.seed(0)
    target = mx.random.normal((4, 6))
    params = {"w": mx.zeros((4, 6))}
    optimizer = make_optimizer(OptimConfig(learning_rate=0.05, optimizer=name, schedule="constant"), 100)  # type: ignore[arg-type]
    optimizer.init(params)

    def loss(params: dict[str, mx.array]) -> mx.array:
        return mx.square(params["w"] - target).mean()

    first = loss(params).item()
    for _ in range(20):
        value, grads = mx.value_and_grad(loss)(params)
        params = guarded_update(optimizer, params, grads, value, clip=1.0).params
        mx.eval(params, optimizer.state)
    assert loss(params).item() < first

    for bad_loss, bad_grad in ((1.0, math.nan), (1.0, math.inf), (math.nan, 1.0), (math.inf, 1.0)):
        before = tree_map(lambda a: a + 0, (params, optimizer.state))
        mx.eval(before)
        grads = {"w": mx.where(mx.arange(24).reshape(4, 6) == 7, bad_grad, 0.1)}
        done = guarded_update(optimizer, params, grads, mx.array(bad_loss), clip=1.0)
        assert not done.finite.item()
        assert same_bytes((done.params, optimizer.state), before)


def test_clipping_is_by_the_norm_of_the_whole_gradient() -> None:
    grads = {"a": mx.array([3.0, 0.0]), "b": [mx.array([[4.0]])]}
    assert global_norm(grads).item() == pytest.approx(5.0)
    params = {"a": mx.zeros(2), "b": [mx.zeros((1, 1))]}
    optimizer = make_optimizer(OptimConfig(learning_rate=1.0, optimizer="sgd", schedule="constant"), 10)
    optimizer.init(params)
    done = guarded_update(optimizer, params, grads, mx.array(1.0), clip=0.5)
    assert done.params["a"][0].item() == pytest.approx(-0.3, rel=1e-5)
    assert done.params["b"][0].item() == pytest.approx(-0.4, rel=1e-5)
    assert done.grad_norm.item() == pytest.approx(5.0), "the norm that is reported is the one before clipping"
    unclipped = guarded_update(optimizer, params, grads, mx.array(1.0), clip=0.0)
    assert unclipped.params["b"][0].item() == pytest.approx(-4.0)


def test_adam_corrects_its_bias() -> None:
    params = {"w": mx.zeros(1)}
    optimizer = make_optimizer(OptimConfig(learning_rate=0.1, optimizer="adam", schedule="constant"), 10)
    optimizer.init(params)
    done = guarded_update(optimizer, params, {"w": mx.array([0.02])}, mx.array(1.0), clip=0)
    assert done.params["w"].item() == pytest.approx(-0.1, rel=1e-4), "the first step has the length of the learning rate"


def test_options_reach_the_optimizer_and_wrong_ones_are_said() -> None:
    optimizer = make_optimizer(OptimConfig(optimizer="adamw", optimizer_options={"weight_decay": 0.5}), 1)
    assert optimizer.weight_decay == 0.5  # type: ignore[attr-defined]
    optimizer = make_optimizer(OptimConfig(optimizer="adam", optimizer_options={"beta2": 0.95}), 1)
    assert optimizer.betas == [0.9, 0.95]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"optimizer_options: beta1=0.5 came, and sgd does not take that"):
        OptimConfig(optimizer="sgd", optimizer_options={"beta1": 0.5})
    with pytest.raises(ConfigError, match=r"optimizer_options: nesterov_beta=1.0 came, and adamw does not take that"):
        OptimConfig(optimizer_options={"nesterov_beta": 1.0})


# Groups


def by_hand(params: dict[str, Any], grads: list[dict[str, Any]], rates: dict[str, float], decay: dict[str, float]) -> Any:
    """AdamW in NumPy: betas 0.9 and 0.95, bias corrected, a linear schedule over four updates after a warm-up of one."""
    values = {name: np.array(value, np.float64) for name, value in params.items()}
    first, second = ({name: np.zeros_like(value) for name, value in values.items()} for _ in range(2))
    for step, each in enumerate(grads):
        factor = 1.0 if step < 1 else 1 - (step - 1) / 3
        for name, value in values.items():
            g, rate = np.array(each[name], np.float64), rates[name] * factor
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            values[name] = value * (1 - rate * decay[name]) - rate * m / (np.sqrt(v) + 1e-8)
    return values


def test_groups_by_hand() -> None:
    """Embeddings with a learning rate of their own; norms and biases without decay; in lists with gaps, as layers are."""
    mx.random.seed(3)
    shapes = {"embed.weight": (5, 4), "layers.1.w": (4, 4), "layers.1.b": (4,), "layers.2.norm": (4,), "head.bias": (5,)}
    flat = {name: mx.random.normal(shape) for name, shape in shapes.items()}
    grads = [{name: mx.random.normal(shape) for name, shape in shapes.items()} for _ in range(4)]
    config = OptimConfig(
        learning_rate=0.1, embedding_learning_rate=0.02, schedule="linear", warmup_steps=1, clip_grad_norm=0,
        optimizer_options={"weight_decay": 0.3, "beta2": 0.95},
    )  # fmt: skip
    vocabulary = ("embed.", "head.")
    params: Any = tree_unflatten(list(flat.items()))
    optimizer = make_optimizer(config, 4, params, lambda name: name.startswith(vocabulary))
    begin(optimizer, params)
    rates = []
    for each in grads:
        done = guarded_update(optimizer, params, tree_unflatten(list(each.items())), mx.array(1.0), clip=0)
        params = done.params
        rates.append(done.learning_rate.item())
    assert rates == pytest.approx([0.1, 0.1, 0.2 / 3, 0.1 / 3]), "what is reported is the rate of the rest of the model"
    expected = by_hand(
        flat, grads,
        {name: 0.02 if name.startswith(vocabulary) else 0.1 for name in shapes},
        {name: 0.3 if len(shape) > 1 else 0.0 for name, shape in shapes.items()},
    )  # fmt: skip
    found: dict[str, mx.array] = tree_flatten(params, destination={})  # type: ignore[assignment]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.allclose(np.array(found[name]), value, rtol=1e-5, atol=1e-6), name


def test_a_bad_gradient_leaves_every_byte_of_every_group() -> None:
    params = {"w": mx.ones((4, 6)), "norm": mx.ones(6)}
    optimizer = make_optimizer(OptimConfig(learning_rate=0.05), 100, params)
    begin(optimizer, params)
    for bad in (False, True):
        before = tree_map(lambda a: a + 0, (params, optimizer.state))
        mx.eval(before)
        grads = {"w": mx.ones((4, 6)), "norm": mx.array([1.0, math.nan if bad else 2.0, 0, 0, 0, 0])}
        done = guarded_update(optimizer, params, grads, mx.array(1.0), clip=1.0)
        params = done.params
        assert same_bytes((params, optimizer.state), before) == bad


def test_one_group_is_the_plain_optimizer() -> None:
    """Adapters are matrices, all of them: what they compute is what it was before there were groups."""
    model = tiny_model("mistral")
    lora.attach(model, LoraConfig(rank=2))
    params = model.trainable_parameters()
    assert type(make_optimizer(OptimConfig(), 10, params)) is mlx.optimizers.AdamW
    whole = tiny_model("mistral", quantized=False)
    whole.unfreeze()
    for options in ({"decay": "all"}, {"optimizer": "adam"}, {"optimizer_options": {"weight_decay": 0.0}}):
        optimizer = make_optimizer(OptimConfig(**options), 10, whole.trainable_parameters())  # type: ignore[arg-type]
        assert type(optimizer) is not mlx.optimizers.MultiOptimizer, options
    assert type(make_optimizer(OptimConfig(), 10, whole.trainable_parameters())) is mlx.optimizers.MultiOptimizer
    assert times(OptimConfig(learning_rate=1.0, embedding_learning_rate=0.5), 0.5) == OptimConfig(
        learning_rate=0.5, embedding_learning_rate=0.25
    )


@pytest.mark.parametrize("shape", ["mistral", "mistral-tied"])
def test_embedding_and_head_are_told_by_what_they_are(shape: str) -> None:
    model = tiny_model(shape)
    lora.attach(model, LoraConfig(rank=2), predicate=lambda path, _: path.endswith(("v_proj", "lm_head")))
    names = [name for name, _ in tree_flatten(model.parameters()) if of_vocabulary(model)(name)]
    heads = ["lm_head.lora_a", "lm_head.lora_b"] if shape == "mistral" else []
    assert {name.split(".weight")[0] for name in names} >= {"model.embed_tokens", *heads}
    assert all("embed_tokens" in name or "lm_head" in name for name in names)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_state_is_float32_for_half_precision_too(name: str) -> None:
    params = {"w": mx.ones((8, 8), mx.bfloat16)}
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-3, optimizer=name), 10, params)  # type: ignore[arg-type]
    begin(optimizer, params)
    done = guarded_update(optimizer, params, {"w": mx.full((8, 8), 1e-3)}, mx.array(1.0), clip=0)
    assert done.params["w"].dtype == mx.bfloat16
    kinds = {array.dtype for path, array in tree_flatten(optimizer.state) if path.startswith("w.")}
    assert kinds <= {mx.float32}


# The guard in the loop


def engine_with(objective, **settings) -> Engine:  # type: ignore[no-untyped-def]
    model = tiny_model("mistral")
    lora.attach(model, LoraConfig(rank=2, dropout=0.1))
    model.train()
    config = OptimConfig(learning_rate=1e-2, **settings)
    return Engine(model, objective, make_optimizer(config, 20), config, lora.dropout_keys)


def test_a_bad_update_is_skipped_counted_and_changes_nothing() -> None:
    plain, calls = sft(), 0

    def poisoned(model: nn.Module, batch: Batch) -> LossSum:
        nonlocal calls
        calls += 1
        loss = plain(model, batch)
        return loss._replace(total=loss.total * math.nan) if calls in (2, 4) else loss

    engine = engine_with(poisoned)
    planned = updates(InMemory(make_examples(6)), Order((6,), seed=0), BatchConfig(batch_size=1), Layout(), epochs=1)
    seen, before = [], None
    for report in steps(engine, planned):
        now = tree_map(lambda a: a + 0, (engine.model.trainable_parameters(), engine.optimizer.state))
        mx.eval(now)
        if report.step in (2, 4):
            assert math.isnan(report.loss)
            assert same_bytes(now, before)
        elif before is not None:
            assert not same_bytes(now, before)
        before = now
        seen.append(report.skipped_updates)
    assert seen == [0, 1, 1, 2, 2, 2]
