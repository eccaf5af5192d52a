"""The memory that is foreseen against the memory that MLX reports; and that long runs need no more than short ones."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora import foresee
from mlx_qlora.data.layout import Kind, Layout, lay_out, padded
from mlx_qlora.engine.accumulate import GradientAccumulator
from mlx_qlora.engine.graph import trace
from mlx_qlora.engine.memory import Memory, MemoryConfig, bytes_of, cache_limit, evaluation_order, fit
from mlx_qlora.engine.optim import OptimConfig, make_optimizer
from mlx_qlora.engine.steps import Engine, Objective, micro_step, steps
from mlx_qlora.errors import ConfigError
from mlx_qlora.model import backend, frozen, lora
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.trunk import PLAIN, Passage
from mlx_qlora.objectives.distill import DistillConfig, distil
from mlx_qlora.objectives.lesson import Lesson
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import START, Batch, Example, Update
from tests.conftest import SHAPES, make_examples, tiny_model

# Large enough that megabytes matter: a step needs 70 to 260 MB.
LARGER: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 640, "num_attention_heads": 8,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 4096, "head_dim": 32,
}  # fmt: skip


def larger_model(shape: str, dropout: float = 0.0) -> nn.Module:
    module, more = SHAPES[shape]
    code = import_module(f"mlx_lm.models.{module}")
    model: nn.Module = code.Model(code.ModelArgs.from_dict(LARGER | more | {"sliding_window": 64}))
    nn.quantize(model, group_size=64, bits=4)
    frozen.install(model)
    lora.attach(model, LoraConfig(dropout=dropout))
    model.train()
    return model


def chats(count: int = 4, length: int = 300) -> list[Example]:
    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        tokens = rng.integers(0, 4096, length - 17 * number).astype(np.int32)
        tokens[:50] = np.arange(50)
        weights = np.ones(len(tokens), np.float32)
        weights[:100] = 0
        made.append(Example(f"chat:{number}", tokens, weights))
    return made


def measured(model: nn.Module, batch: Batch, passage: Passage, elsewhere: int, objective: Objective | None = None) -> int:
    """The peak of a micro-step as MLX reports it, less what was there before the model."""
    mx.eval(model.parameters(), *batch[:6])
    step = micro_step(Engine(model, objective or sft(passage=passage), None, OptimConfig(), lora.dropout_keys))  # type: ignore[arg-type]
    key = mx.random.key(0)
    mx.eval(key)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    accumulator = GradientAccumulator()
    loss, gradients = step(batch, key)
    accumulator.add(gradients, loss.weight)
    mx.eval(accumulator.take(), loss.total)
    return mx.get_peak_memory() - elsewhere


CASES = [
    (shape, kind, checkpoint)
    for shape in SHAPES
    for kind in (Kind.PACKED, Kind.PADDED)
    for checkpoint in (False, True)
    # Its attention is written out in its own code: it can't be packed.
    if not (shape == "gemma2" and kind is Kind.PACKED)
]
# Measured where the tests were written: within 2 %, but gemma3 (8 %) and gemma2 (13 %) in padded rows with checkpointing.
TOLERANCE = {("gemma2", Kind.PADDED, True): 0.16}


@pytest.mark.skipif(not backend.on_cpu(), reason="what a GPU does was not measured")
@pytest.mark.parametrize(("shape", "kind", "checkpoint"), CASES)
def test_the_peak_is_foreseen(shape: str, kind: Kind, checkpoint: bool) -> None:
    gc.collect()
    mx.synchronize()
    elsewhere = mx.get_active_memory()
    # At the size of a chunk for 130,000 classes: the 12 MB of logits of a single large chunk are foreseen once too often.
    model, passage = larger_model(shape), Passage(checkpoint=checkpoint, chunk=64)
    (batch,) = lay_out(chats(), Layout(Kind.PLAIN if kind is Kind.PADDED else kind, rows=8))
    need = foresee.of_step(model, batch, passage)
    got = measured(model, batch, passage, elsewhere)
    assert need.peak == pytest.approx(got, rel=TOLERANCE.get((shape, kind, checkpoint), 0.1))


@pytest.mark.skipif(not backend.on_cpu(), reason="what a GPU does was not measured")
def test_rows_behind_a_prefix_and_dropout_are_foreseen() -> None:
    """A little too much is foreseen here: 12 % where the test was written."""
    gc.collect()
    elsewhere = mx.get_active_memory()
    model = larger_model("mistral", dropout=0.1)
    batch = padded(chats(), length=250, prefix=50)
    passage = Passage(checkpoint=True, chunk=64)
    need = foresee.of_step(model, batch, passage)
    assert need.peak == pytest.approx(measured(model, batch, passage, elsewhere), rel=0.16)


def test_nothing_is_computed_and_the_model_stays_as_it_is() -> None:
    model = larger_model("mistral")
    before = {name: id(array) for name, array in tree_flatten(model.parameters())}
    (batch,) = lay_out(chats(), Layout(Kind.PACKED))
    mx.eval(*batch[:6])
    mx.synchronize()
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    foresee.of_step(model, batch, PLAIN)
    assert mx.get_peak_memory() - active < 1e6
    assert {name: id(array) for name, array in tree_flatten(model.parameters())} == before


def test_as_on_a_gpu_there_are_no_dequantised_weights_and_no_scores() -> None:
    original = mx.fast.rms_norm
    (batch,) = lay_out(chats(), Layout(Kind.PLAIN, rows=8))
    here = foresee.of_step(larger_model("mistral"), batch, PLAIN)
    with backend.assumed(cpu=False):
        there = foresee.of_step(larger_model("mistral"), batch, PLAIN)
    assert mx.fast.rms_norm is original
    # 4 layers x 4 rows x 8 heads x 300 x 300 scores of 4 bytes
    assert here.activations - there.activations > 4 * 4 * 8 * 300 * 300 * 4
    assert there.dequantised == 0


def test_the_order_is_that_of_mlx_for_a_chain_and_a_diamond() -> None:
    def diamond(x: mx.array) -> list[mx.array]:
        a = mx.exp(x)
        return [mx.sin(a) + mx.cos(a)]

    graph = trace(diamond, [mx.zeros(4)])
    names = [graph.nodes[number].name for number in evaluation_order(graph, graph.outputs, set(graph.inputs))]
    assert names[0] == "Exp"
    assert names[-1] == "Add"
    assert sorted(names[1:3]) == ["Cos", "Sin"]


def test_sizes_are_read_and_wrong_ones_are_said() -> None:
    assert [bytes_of(each) for each in ("12GB", "1.5 GiB", "800mb", "12", "GB", "much", "-3GB")] == [
        12_000_000_000, 1_610_612_736, 800_000_000, 0, 0, 0, 0,
    ]  # fmt: skip
    assert MemoryConfig().limit(100) == 90
    assert MemoryConfig(memory="off").limit(100) is None
    assert MemoryConfig(memory="2GB").limit(100) == 2_000_000_000
    with pytest.raises(ConfigError, match=r"memory: 'lots' came, auto, off, or a size such as 12GB"):
        MemoryConfig(memory="lots")
    with pytest.raises(ConfigError, match="grad_checkpoint"):
        MemoryConfig(grad_checkpoint="maybe")  # type: ignore[arg-type]


def test_fit_takes_the_largest_budget_and_checkpoints_only_where_it_must() -> None:
    asked: list[tuple[int, bool]] = []

    def need(budget: int, checkpoint: bool) -> Memory:
        asked.append((budget, checkpoint))
        return Memory(weights=100, activations=budget // (8 if checkpoint else 1))

    budgets = [128, 256, 512, 1024, 2048, 4096]

    def chosen(limit: int | None) -> tuple[int, bool, bool]:
        found = fit(need, limit, budgets, (False, True))
        return found.budget, found.checkpoint, found.fits

    assert chosen(None) == (4096, False, True)
    assert asked == [(4096, False)]
    assert chosen(5000) == (4096, False, True)
    for limit in range(228, 4196, 97):
        assert chosen(limit) == (max(each for each in budgets if each + 100 <= limit), False, True)
    assert chosen(227) == (512, True, True)
    assert chosen(116) == (128, True, True)
    assert chosen(115) == (128, True, False)


def test_the_cache_limit_is_put_back() -> None:
    before = mx.set_cache_limit(1 << 20)
    try:
        with cache_limit(123456):
            assert mx.set_cache_limit(123456) == 123456
        assert mx.set_cache_limit(1 << 20) == 1 << 20
        with cache_limit(None):
            assert mx.set_cache_limit(1 << 20) == 1 << 20
    finally:
        mx.set_cache_limit(before)


# `make flat` makes a thousand.
UPDATES = int(os.environ.get("MLX_QLORA_UPDATES", "150"))


@pytest.mark.parametrize("kind", [Kind.PACKED, Kind.PLAIN])
def test_memory_is_flat_over_a_long_run(kind: Kind) -> None:
    model = tiny_model("mistral")
    frozen.install(model)
    lora.attach(model, LoraConfig(rank=4, dropout=0.1))
    model.train()
    pool = make_examples(8)
    layout = Layout(kind, rows=8)

    def updates() -> Iterator[Update]:
        for number in range(UPDATES):
            batches = lay_out(pool[number % 2 :: 2], layout)
            yield Update(batches, float(number), (), 1, 1, START)

    config = OptimConfig(learning_rate=1e-3)
    engine = Engine(model, sft(), make_optimizer(config, UPDATES), config, lora.dropout_keys)
    early = peak = 0
    for report in steps(engine, updates()):
        if report.step == 20:
            early = mx.get_active_memory()
            mx.reset_peak_memory()
        if report.step == 60:
            peak = mx.get_peak_memory()
            mx.reset_peak_memory()
    # Two sets of batches take turns, so what is there differs by one of them: a few kilobytes.
    assert abs(mx.get_active_memory() - early) < 50_000
    assert mx.get_peak_memory() < peak * 1.1


@pytest.mark.skipif(not backend.on_cpu(), reason="what a GPU does was not measured")
@pytest.mark.parametrize("kind", [Kind.PACKED, Kind.PADDED])
@pytest.mark.parametrize("kept", [False, True])
def test_the_peak_of_a_student_with_its_teacher_is_foreseen(kind: Kind, kept: bool) -> None:
    gc.collect()
    mx.synchronize()
    elsewhere = mx.get_active_memory()
    student, teacher, passage = larger_model("mistral"), None if kept else larger_model("qwen2"), Passage(chunk=64)
    (batch,) = lay_out(chats(), Layout(Kind.PLAIN if kind is Kind.PADDED else kind, rows=8))
    one, places, config = mx.array(1.0), batch.positions.size, DistillConfig(teacher="x")
    said = [mx.zeros((places, 64), mx.float16), mx.tile(mx.arange(64)[None], (places, 1)), mx.zeros(places)] if kept else []
    beside = (one, mx.array(0.5), *said)
    if teacher:
        teacher.freeze()
        teacher.eval()
        mx.eval(teacher.parameters())
    vocabulary = int(student(mx.zeros((1, 1), mx.int32)).shape[-1])

    def objective(passage: Passage, teacher: nn.Module | None) -> Objective:
        return distil(config, vocabulary, teacher, passage=passage)

    need = foresee.of_step(student, batch, passage, Lesson(objective, lambda _: beside, teacher))
    mx.eval(beside)
    batch = batch._replace(beside=beside)
    found = measured(student, batch, passage, elsewhere, objective(passage, teacher))
    assert need.peak == pytest.approx(found, rel=0.1)
