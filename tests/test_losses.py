from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qlora.data.layout import packed, padded
from mlx_qlora.data.tree import sorted_by_tokens
from mlx_qlora.model import lora
from mlx_qlora.model.head import logits_of
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.trunk import CannotShare, Passage, can_pack, hidden_states
from mlx_qlora.objectives.losses import cross_entropy_and_gradient, cross_entropy_sum, next_token_cross_entropy
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Example
from tests.conftest import largest_difference, loss_and_gradient, make_examples, randomize_adapters, tiny_model


def test_five_tokens_by_hand() -> None:
    # Two classes; the logits say log-odds 0, ln 3, -ln 3, ln 9 for class 1; the last position predicts nothing.
    odds = [1.0, 3.0, 1 / 3, 9.0, 7.0]
    logits = mx.array([[[0.0, math.log(o)] for o in odds]])
    tokens = mx.array([[0, 1, 1, 0, 1]])
    weights = mx.array([[1.0, 0.0, 1.0, 0.5, 1.0]])  # the first token is no target, whatever its weight
    loss = next_token_cross_entropy(logits, tokens, weights)
    # token 1 has weight 0; token 2 = 1 at p = 3/4; token 3 = 0 at p = 3/4, half weight; token 4 = 1 at p = 9/10
    expected = -math.log(3 / 4) - 0.5 * math.log(3 / 4) - math.log(9 / 10)
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    assert loss.weight.item() == pytest.approx(2.5)


def test_label_smoothing_by_hand() -> None:
    logits, smoothing = mx.array([[2.0, 0.0, 1.0]]), 0.3
    log_p = np.array([2.0, 0.0, 1.0]) - np.log(np.exp([2.0, 0.0, 1.0]).sum())
    expected = -(1 - smoothing) * log_p[0] - smoothing * log_p.mean()
    loss = cross_entropy_sum(logits, mx.array([0]), mx.array([1.0]), smoothing)
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)


def test_masked_places_change_neither_loss_nor_gradient() -> None:
    mx.random.seed(0)
    logits, tokens = mx.random.normal((2, 6, 9)), mx.random.randint(0, 9, (2, 6))
    weights = mx.array([[0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1]], mx.float32)

    def total(logits: mx.array, tokens: mx.array) -> mx.array:
        return next_token_cross_entropy(logits, tokens, weights).total

    loss, grad = mx.value_and_grad(total)(logits, tokens)
    masked = weights[:, 1:] == 0
    other_tokens = mx.concatenate([tokens[:, :1], mx.where(masked, (tokens[:, 1:] + 1) % 9, tokens[:, 1:])], axis=1)
    other_logits = mx.concatenate([mx.where(masked[..., None], 3.0, logits[:, :-1]), logits[:, -1:]], axis=1)
    other_loss, other_grad = mx.value_and_grad(total)(other_logits, other_tokens)
    assert loss.item() == other_loss.item()
    assert mx.array_equal(grad, other_grad)
    assert not grad[:, -1].any()
    assert not mx.where(masked[..., None], grad[:, :-1], 0).any()


def test_low_precision_logits_are_summed_in_float32() -> None:
    mx.random.seed(1)
    logits = mx.random.normal((600, 50)).astype(mx.bfloat16)
    targets, ones = mx.random.randint(0, 50, (600,)), mx.ones(600)
    loss = cross_entropy_sum(logits, targets, ones)
    exact = cross_entropy_sum(logits.astype(mx.float32), targets, ones)
    assert loss.total.dtype == mx.float32
    assert loss.total.item() == exact.total.item()


def plain_objective(examples: list[Example]):  # type: ignore[no-untyped-def]
    """The twin: the whole model on each example alone, all logits, `next_token_cross_entropy`."""

    def loss(model: nn.Module) -> mx.array:
        total = mx.array(0.0)
        for example in examples:
            tokens = mx.array(example.tokens[None])
            total = total + next_token_cross_entropy(model(tokens), tokens, mx.array(example.weights[None])).total
        return total

    return loss


def test_head_on_supervised_places_equals_full_logits(any_model: nn.Module) -> None:
    examples = make_examples(5)
    lora.attach(any_model, LoraConfig(rank=4, scale=2.0))
    randomize_adapters(any_model)
    batch = padded(examples)
    expected_loss, expected = loss_and_gradient(any_model, plain_objective(examples))
    loss, grads = loss_and_gradient(any_model, lambda model: sft()(model, batch).total)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert largest_difference(grads, expected) < 5e-5


def test_logits_at_places_are_the_models_own(any_model: nn.Module) -> None:
    batch = padded(make_examples(3))
    whole = any_model(batch.rows).reshape(batch.computed, -1)
    hidden = hidden_states(any_model, batch)[batch.positions]
    logits = logits_of(any_model, hidden[None])[0]
    assert mx.allclose(logits, whole[batch.positions], rtol=1e-5, atol=1e-5)
    assert mx.array_equal(any_model(batch.rows).reshape(batch.computed, -1), whole), "the model itself is as it was"


def test_trainable_head_and_embedding_get_their_whole_gradient() -> None:
    examples = make_examples(4)
    batch = padded(examples)
    for shape in ("mistral", "mistral-tied", "gemma3"):
        model = tiny_model(shape, quantized=False)
        _, expected = loss_and_gradient(model, plain_objective(examples))
        for training in (False, True):  # the head goes chunk by chunk, and only in training with its own backward
            model.train(training)
            _, grads = loss_and_gradient(model, lambda model: sft(passage=Passage(chunk=8))(model, batch).total)
            assert largest_difference(grads, expected) < 5e-5


def test_a_model_that_is_not_trunk_then_head_runs_whole() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 7)
            self.out = nn.Linear(7, 11)

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.out(self.embed(tokens))

    model, examples = Flat(), make_examples(3, vocabulary=11)
    expected, expected_grads = loss_and_gradient(model, plain_objective(examples))
    loss, grads = loss_and_gradient(model, lambda model: sft()(model, padded(examples)).total)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert largest_difference(grads, expected_grads) < 1e-5
    assert can_pack(model)
    with pytest.raises(CannotShare, match="not a trunk of layers"):
        sft()(model, packed(sorted_by_tokens(examples)))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_beside_the_loss_is_the_one_of_autograd(smoothing: float) -> None:
    """Also where one class has nearly everything, or the target next to nothing, or a class is masked."""
    mx.random.seed(3)
    logits = mx.random.normal((40, 300)) * mx.array([0.01, 1.0, 10.0, 60.0] * 10)[:, None]
    targets, weights = mx.random.randint(1, 300, (40,)), mx.random.uniform(0, 1, (40,))
    if not smoothing:
        logits[:, 0] = -math.inf

    expected, expected_gradient = mx.value_and_grad(lambda x: cross_entropy_sum(x, targets, weights, smoothing).total)(logits)
    loss, gradient = cross_entropy_and_gradient(logits, targets, weights, smoothing)
    assert loss.sum().item() == pytest.approx(expected.item(), rel=1e-6)
    assert mx.abs(gradient - expected_gradient).max().item() < 1e-6
    by_autograd = mx.grad(lambda x: cross_entropy_and_gradient(x, targets, weights, smoothing)[0].sum())(logits)
    assert mx.abs(by_autograd - gradient).max().item() < 1e-6


def test_a_place_without_weight_may_hold_anything() -> None:
    logits = mx.array([[1.0, 2.0], [math.inf, math.inf], [math.nan, 0.0]])
    loss, gradient = cross_entropy_and_gradient(logits, mx.array([0, 1, 0]), mx.array([1.0, 0.0, 0.0]))
    assert loss.sum().item() == pytest.approx(math.log(1 + math.e))
    assert mx.isfinite(gradient).all()
