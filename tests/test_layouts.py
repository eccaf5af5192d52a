"""Every layout, alone and with the others, has the plain loss and the plain gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from mlx_qlora.data.layout import Kind, Layout, histories, lay_out
from mlx_qlora.data.shapes import MOST_TRACES, Shapes, fit
from mlx_qlora.engine.accumulate import GradientAccumulator
from mlx_qlora.engine.steps import add_losses
from mlx_qlora.errors import ModelError
from mlx_qlora.model import frozen, lora
from mlx_qlora.model.attention import Packed
from mlx_qlora.model.dropout import dropping
from mlx_qlora.model.head import loss_in_chunks
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.trunk import PLAIN, Passage, can_pack, can_share, length_counts, supervised_logits
from mlx_qlora.objectives.losses import cross_entropy_and_gradient
from mlx_qlora.objectives.sft import sft
from mlx_qlora.plan import Plan, checked
from mlx_qlora.records import Batch, Example, LossSum
from tests.conftest import SHAPES, largest_difference, loss_and_gradient, make_examples, randomize_adapters, tiny_model

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
                for _, each in dropping(model):
                    each.set_marks(mx.array(histories(example.tokens[:-1])))
                logits = model(mx.array(example.tokens[None, :-1]))[0].astype(mx.float32)
                losses = nn.losses.cross_entropy(logits, mx.array(example.tokens[1:]))
                total = total + (losses * mx.array(example.weights[1:])).sum()
        return total

    total, grads = loss_and_gradient(model, loss)
    weight = mx.array(sum(float(example.weights.sum()) for example in examples))
    accumulator = GradientAccumulator()
    accumulator.add(grads, weight)
    return LossSum(total, weight), accumulator.take()


def through(
    model: nn.Module,
    batches: tuple[Batch, ...],
    passage: Passage = PLAIN,
    key: mx.array = KEY,
    objective: Callable[[nn.Module, Batch], LossSum] | None = None,
) -> tuple[LossSum, Any]:
    objective = objective or sft(passage=passage)
    accumulator = GradientAccumulator()
    whole: LossSum | None = None
    for batch in batches:
        parts: list[LossSum] = []

        def loss(model: nn.Module, batch: Batch = batch, parts: list[LossSum] = parts) -> mx.array:
            parts.append(objective(model, batch))
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


@pytest.mark.parametrize(("dropout", "checkpoint"), [(0.0, False), (0.3, True)], ids=["", "dropout-checkpoint"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_has_the_plain_gradient(shape: str, layout: str, dropout: float, checkpoint: bool) -> None:
    if layout.startswith("packed") and shape not in PACKABLE:
        pytest.skip("this model can't be packed; the next test says so")
    model = trainable(shape, dropout)
    batches = lay_out(family(), LAYOUTS[layout])
    got = through(model, batches, Passage(checkpoint=checkpoint, chunk=16))
    assert_same(got, plainly(model, family()))


@pytest.mark.parametrize("layout", ["plain", "packed-small", "padded"])
def test_adapted_head_and_full_training_have_it_too(layout: str) -> None:
    """An adapter on the head, with dropout; and no adapters at all: every weight is trained, embedding and norms too."""
    adapted = tiny_model("mistral")
    lora.attach(adapted, LoraConfig(rank=4, scale=2.0, dropout=0.3, targets=("lm_head", "v_proj")))
    randomize_adapters(adapted)
    full = tiny_model("mistral-tied", quantized=False)
    for model in (adapted, full):
        model.train()
        got = through(model, lay_out(family(), LAYOUTS[layout]), Passage(chunk=8))
        assert_same(got, plainly(model, family()))


@pytest.mark.parametrize("layout", ["plain", "packed-small", "padded"])
@pytest.mark.parametrize("shape", ["mistral", "mistral-tied"])
def test_adapted_embeddings_have_it_too(shape: str, layout: str) -> None:
    """With dropout; where the embedding is the head, the gradients of both add."""
    model = tiny_model(shape)
    frozen.install(model)
    lora.attach(model, LoraConfig(rank=4, scale=2.0, dropout=0.3, targets=("embeddings", "v_proj")))
    randomize_adapters(model)
    model.train()
    for checkpoint in (False, True):
        got = through(model, lay_out(family(), LAYOUTS[layout]), Passage(checkpoint=checkpoint, chunk=8))
        assert_same(got, plainly(model, family()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["mistral", "mistral-tied", "gemma3"])
def test_a_loss_of_ones_own_has_the_plain_gradient_in_every_layout(shape: str, layout: str) -> None:
    """By the logits at the places of a batch; with an adapted head, and dropout."""
    model = trainable(shape, dropout=0.3)
    if shape == "mistral":
        model = tiny_model(shape)
        lora.attach(model, LoraConfig(rank=4, scale=2.0, dropout=0.3, targets=("lm_head", "v_proj")))
        randomize_adapters(model)
        model.train()

    def own(model: nn.Module, batch: Batch) -> LossSum:
        losses = nn.losses.cross_entropy(supervised_logits(model, batch).astype(mx.float32), batch.targets)
        return LossSum((losses * batch.weights).sum(), batch.weights.sum())

    got = through(model, lay_out(family(), LAYOUTS[layout]), objective=own)
    assert_same(got, plainly(model, family()))


def test_the_same_places_are_dropped_in_every_layout_and_others_by_another_key() -> None:
    model = trainable("mistral", dropout=0.5)
    losses = [through(model, lay_out(family(), layout))[0].total.item() for layout in LAYOUTS.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    other = through(model, lay_out(family(), LAYOUTS["packed"]), key=mx.random.key(12))[0].total.item()
    assert abs(other - losses[0]) > 1e-3 * losses[0]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 14), vocabulary=st.integers(4, 6), budget=st.integers(8, 120), seed=st.integers(0, 99),
    kind=st.sampled_from(Kind),
)  # fmt: skip
def test_each_target_stands_once_behind_its_own_context(
    count: int, vocabulary: int, budget: int, seed: int, kind: Kind
) -> None:
    """Of few different tokens, so that beginnings in common are everywhere."""
    made = make_examples(count, seed, vocabulary)
    shapes = fit(np.array([len(one.tokens) - 1 for one in made]), np.full(count, 3), made[0].tokens[:4].tolist())
    expected: Counter[tuple[object, ...]] = Counter()
    for example in made:
        for place in np.flatnonzero(example.weights):
            expected[(*example.tokens[:place].tolist(), "->", int(example.tokens[place]))] += float(example.weights[place])
    found: Counter[tuple[object, ...]] = Counter()
    for batch in lay_out(made, Layout(kind, budget, shapes=shapes)):
        for position, target, weight in zip(*map(np.array, (batch.positions, batch.targets, batch.weights)), strict=True):
            if weight:
                found[(*context(batch, int(position)), "->", int(target))] += float(weight)
    assert found == expected


def context(batch: Batch, position: int) -> list[int]:
    """The tokens that a position sees."""
    rows, shared = np.array(batch.rows), np.array(batch.shared)
    if position >= rows.size:
        return shared[: position - rows.size + 1].tolist()  # type: ignore[no-any-return]
    if not batch.segments:
        row, place = divmod(position, rows.shape[1])
        return [*shared.tolist(), *rows[row, : place + 1].tolist()]
    number = next(n for n, segment in enumerate(batch.segments) if segment.start <= position < segment.end)
    seen = rows[0, batch.segments[number].start : position + 1].tolist()
    while (number := batch.segments[number].parent) >= 0:
        seen = rows[0, batch.segments[number].start : batch.segments[number].end].tolist() + seen
    return seen  # type: ignore[no-any-return]


def mixed(count: int, seed: int = 0, longest: int = 400) -> list[Example]:
    """Lengths from 24 to 400, as chats have them; half of it supervised, nothing in common."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(np.clip(rng.lognormal(4.9, 0.6), 24, longest))
        weights = (np.arange(length) >= length // 2).astype(np.float32)
        made.append(Example(f"mixed:{number}", rng.integers(3, 4000, length).astype(np.int32), weights))
    return made


def test_packed_rows_have_no_padding() -> None:
    for start in range(0, 160, 16):
        update = mixed(160)[start : start + 16]
        batches = lay_out(update, Layout(Kind.PACKED, token_budget=1024))
        assert sum(batch.computed for batch in batches) == sum(len(example.tokens) - 1 for example in update)
        assert all(batch.computed <= 1024 for batch in batches)
    shared = lay_out(family(), Layout(Kind.PACKED))
    assert sum(batch.computed for batch in shared) < 0.7 * sum(len(example.tokens) - 1 for example in family())


@pytest.mark.parametrize("prefix", [0, 40])
def test_padded_batches_have_a_dozen_shapes_whatever_the_data(prefix: int) -> None:
    common = list(range(5, 5 + prefix))
    examples = [
        Example(one.id, np.array([*common, *one.tokens], np.int32), np.array([0.0] * prefix + one.weights.tolist()))
        for one in mixed(600)
    ]
    examples[::50] = mixed(12, seed=1)  # some without the prefix
    lengths = np.array([len(one.tokens) - 1 for one in examples])
    places = np.array([np.count_nonzero(one.weights) for one in examples])
    layout = Layout(Kind.PADDED, token_budget=2048, shapes=fit(lengths, places, common))
    updates = [lay_out(examples[start : start + 16], layout) for start in range(0, 600, 16)]
    shapes = {(b.rows.shape, b.shared.shape, b.positions.shape) for update in updates for b in update}
    assert len(shapes) <= MOST_TRACES
    computed = sum(b.computed for update in updates for b in update)
    tokens = sum(len({*np.array(b.marks).tolist()} - {0}) for update in updates for b in update)
    assert computed < 1.25 * tokens, "the price of a dozen shapes: 12 to 18 % of the positions are padding"


def test_what_a_model_cannot_do_is_said() -> None:
    assert can_pack(tiny_model("mistral")) == can_share(tiny_model("gemma2")) == ""
    assert "attention" in can_pack(tiny_model("gemma2"))
    from mlx_lm.models import lfm2

    half_recurrent = lfm2.ModelArgs(
        model_type="lfm2", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, norm_eps=1e-5, conv_bias=False, conv_L_cache=3, block_dim=32, block_ff_dim=64,
        block_multiple_of=8, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False, rope_theta=1e4,
        full_attn_idxs=[1],
    )  # fmt: skip
    assert "recurrent" in can_share(lfm2.Model(half_recurrent))
    model = tiny_model("mistral")
    model.backbone = model.pop("model")
    assert "not a trunk of layers" in can_pack(model)


def test_logits_take_memory_for_a_chunk_whatever_the_batch() -> None:
    """16 and 64 chunks of 64 places of 8,192 classes: 2 MB of logits each, and 34 or 134 MB for all of them."""
    mx.random.seed(0)
    weight = mx.random.normal((8192, 32)) * 0.1

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Identity()

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.model(tokens) @ weight.T

    def peak(places: int) -> float:
        hidden, targets, marks = mx.random.normal((places, 32)), mx.arange(places), mx.zeros(places, mx.uint64)
        head = Head().train()

        def loss_of(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
            return cross_entropy_and_gradient(logits, targets, mx.ones(targets.shape))

        def loss(hidden: mx.array) -> mx.array:
            return loss_in_chunks(head, hidden, marks, loss_of, [targets], chunk=64).total

        mx.eval(hidden, targets, marks, weight)
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(loss)(hidden))
        return mx.get_peak_memory() / 1e6

    peak(64)
    assert peak(4096) < peak(1024) + 8


def test_a_layout_that_is_wrong_here_is_switched_off_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainable("mistral")
    right = Packed.attend
    monkeypatch.setattr(Packed, "attend", lambda self, q, k, v, window, **more: right(self, q, k, v * 1.05, window, **more))
    plan = Plan(LAYOUTS["packed"], PLAIN, compiled=False)
    switched = checked(plan, model, sft(), family())
    assert switched.layout.kind is Kind.PADDED
    assert "WARNING: the packed layout is switched off: its loss on 4 rows was" in switched.notes[0]
    monkeypatch.undo()
    assert checked(plan, model, sft(), family()) == plan


def tiny(module: str, **more: Any) -> nn.Module:
    """A model of another class, with adapters as after some training."""
    arguments = {
        "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 96, "model_type": module, "rope_theta": 1e4,
    }  # fmt: skip
    code = import_module(f"mlx_lm.models.{module}")
    mx.random.seed(0)
    model: nn.Module = code.Model(code.ModelArgs.from_dict(arguments | more))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.2 if p.ndim == 2 else p, model.parameters()))
    lora.attach(model, LoraConfig(rank=4, scale=2.0))
    randomize_adapters(model)
    model.train()
    return model


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("phi", {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "num_key_value_heads": 4, "max_position_embeddings": 128}),
    ("cohere2", {"sliding_window": 8, "sliding_window_pattern": 2, "layer_norm_eps": 1e-5, "logit_scale": 0.3}),
    ("olmo2", {"tie_word_embeddings": False, "max_position_embeddings": 128}),
    ("llama", {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    (
        "olmo_hybrid",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2, "max_position_embeddings": 128,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4, "tie_word_embeddings": False, "linear_allow_neg_eigval": False,
            "attention_bias": False,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("module", "more"), OTHERS, ids=[module for module, _ in OTHERS])
def test_other_classes_get_what_they_can_and_the_plain_gradient(module: str, more: dict[str, Any]) -> None:
    """One that wants a cache argument, one with windows and a scaled head, one whose rope depends on the length of a row,
    one that asks what class its layers are."""
    model = tiny(module, **more)
    alone = length_counts(model)
    kind = Kind.PLAIN if alone or can_share(model) else Kind.PADDED if can_pack(model) else Kind.PACKED
    layout = Layout(kind, rows=1 if alone else 1024, step=1 if alone else 8)
    plan = checked(Plan(layout, Passage(), compiled=False), model, sft(), family())
    assert plan.notes == ()
    assert_same(through(model, lay_out(family(), plan.layout)), plainly(model, family()), 1e-4)


def test_a_batch_without_a_supervised_place_is_nothing_and_no_error() -> None:
    model = trainable("mistral")
    nothing = [Example("n", np.arange(3, 12, dtype=np.int32), np.zeros(9, np.float32))]
    for layout in LAYOUTS.values():
        loss, grads = through(model, lay_out(nothing, layout))
        assert loss.total.item() == loss.weight.item() == 0
        assert not any(array.any() for _, array in tree_flatten(grads))


def test_states_that_would_be_wrong_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trunk that runs its layers twice has two inputs for each; what would be kept is none of them."""
    model = trainable("mistral", layers=1)
    right = type(model.model).__call__  # type: ignore[union-attr]

    def twice(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        return right(self, inputs, cache, right(self, inputs, cache, input_embeddings))

    plan = Plan(LAYOUTS["plain"], Passage(first=2), compiled=False)
    objective = sft(passage=plan.passage)
    assert checked(plan, model, objective, family()) == plan
    monkeypatch.setattr(type(model.model), "__call__", twice)  # type: ignore[union-attr]
    without = checked(plan, model, objective, family())
    assert without.passage.first == 0
    assert "is not kept: CannotShare: The layers of this model do not run once each" in without.notes[0]


def test_checkpointing_is_refused_where_it_would_lose_gradients() -> None:
    model = trainable("mistral")
    layer: Any = model.model.layers[0]  # type: ignore[union-attr]

    class Two(type(layer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs), mx.zeros(1)

    layer.__class__ = Two
    with pytest.raises(ModelError, match="take or give more than one array"):
        through(model, lay_out(family(), LAYOUTS["plain"]), Passage(checkpoint=True))
