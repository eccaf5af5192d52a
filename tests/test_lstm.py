"""The LSTM: against NumPy and mlx.nn, step by step, in batches of prompts, and loaded as any other model."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_qlora import foresee
from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.look.evaluation.generate import Asking, continuations
from mlx_qlora.look.measure import mean_loss
from mlx_qlora.model import backend
from mlx_qlora.model.create import CreateConfig, create, save_model
from mlx_qlora.model.load import Loaded, load, load_tokenizer, of_config, outline
from mlx_qlora.model.lstm import Layer, Model, ModelArgs
from mlx_qlora.model.trunk import PLAIN, Passage
from mlx_qlora.objectives.sft import sft
from mlx_qlora.plan import _Whole
from tests.conftest import in_rows, largest_difference, make_examples, same_bytes
from tests.test_memory import chats, measured


def random_lstm(width: int = 24, vocabulary: int = 96, tied: bool = False, seed: int = 0) -> Model:
    """Two layers whose outputs are far from uniform."""
    mx.random.seed(seed)
    model = Model(ModelArgs(width, 2, vocabulary, tied))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.5, model.parameters()))
    mx.eval(model.parameters())
    return model


def sigmoid(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_by_hand(tied: bool) -> None:
    model = random_lstm(tied=tied)
    arrays: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    by_name = {name: np.array(array, np.float64) for name, array in arrays.items()}
    tokens = [3, 50, 7, 7, 0]
    states = [(np.zeros(24), np.zeros(24)), (np.zeros(24), np.zeros(24))]
    expected = []
    for token in tokens:
        x = by_name["model.embed_tokens.weight"][token]
        for number, (hidden, cell) in enumerate(states):
            into, again, bias = (by_name[f"model.layers.{number}.lstm.{name}"] for name in ("Wx", "Wh", "bias"))
            entering, kept, new, leaving = np.split(into @ x + again @ hidden + bias, 4)
            cell = sigmoid(kept) * cell + sigmoid(entering) * np.tanh(new)
            x = sigmoid(leaving) * np.tanh(cell)
            states[number] = (x, cell)
        expected.append(by_name["model.embed_tokens.weight" if tied else "lm_head.weight"] @ x)
    np.testing.assert_allclose(np.array(model(mx.array([tokens]))[0]), expected, rtol=1e-4, atol=1e-5)


def test_the_backward_is_that_of_mlx_nn() -> None:
    mx.random.seed(1)
    layer = Layer(24)
    x, weights = mx.random.normal((3, 7, 24)), mx.random.normal((3, 7, 24))

    def loss(own: bool) -> Any:
        def of(parameters: Any, x: mx.array) -> mx.array:
            layer.update(parameters)
            return ((layer(x) if own else layer.lstm(x)[0]) * weights).sum()

        return mx.value_and_grad(of, argnums=(0, 1))(layer.parameters(), x)

    assert largest_difference(loss(own=True), loss(own=False)) < 1e-5


def test_with_a_cache_step_by_step_and_in_pieces_as_in_one_go() -> None:
    model = random_lstm()
    tokens = mx.array([[3, 50, 7, 7, 0, 9, 11], [1, 2, 3, 4, 5, 6, 7]])
    whole = model(tokens)
    for pieces in ([1] * 7, [3, 1, 3], [7]):
        cache, begin, got = model.make_cache(), 0, []
        for size in pieces:
            got.append(model(tokens[:, begin : begin + size], cache=cache))
            begin += size
        assert largest_difference([mx.concatenate(got, axis=1)], [whole]) < 1e-5


def test_prompts_of_unequal_length_are_answered_together_as_alone() -> None:
    tokenizer = load_tokenizer("embedded")
    model = random_lstm(vocabulary=1933, width=64)
    prompts = [tokenizer.encode(text) for text in ("a", "words of some length, and more of them than the others", "b c d")]

    def alone(prompt: Sequence[int]) -> str:
        said: list[int] = []
        while len(said) < 12 and 2 not in said:
            said.append(int(model(mx.array([[*prompt, *said]]))[0, -1].argmax().item()))
        return str(tokenizer.decode([token for token in said if token != 2]).strip())

    tokens = dict(continuations(model, tokenizer, [list(prompt) for prompt in prompts], None, Asking(12), rows=3))
    together = {number: tokenizer.decode(each) for number, each in tokens.items()}
    assert [together[number] for number in range(3)] == [alone(prompt) for prompt in prompts]
    assert len(set(together.values())) == 3


def test_padding_and_taking_the_trunk_apart_change_no_loss() -> None:
    model = random_lstm()
    examples = make_examples(9, seed=4)
    objective = sft(0.0, PLAIN)

    def whole(model: nn.Module, batch: Any) -> Any:
        return objective(_Whole(model), batch)

    model.eval()
    alone = mean_loss(model, whole, [each for one in examples for each in lay_out([one], Layout(Kind.PLAIN, step=1))])
    for rows in (2, 9):
        assert mean_loss(model, objective, lay_out(examples, in_rows(rows))) == pytest.approx(alone, rel=1e-5)


def test_layers_computed_again_give_the_same_gradient() -> None:
    model = random_lstm()
    model.train()
    (batch,) = lay_out(make_examples(5), in_rows(5))

    def gradients(checkpoint: bool) -> Any:
        objective = sft(0.0, Passage(checkpoint=checkpoint))
        return nn.value_and_grad(model, lambda model: objective(model, batch).total)(model)

    assert largest_difference(gradients(True), gradients(False)) < 1e-5


def test_a_saved_one_is_loaded_as_any_model_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = create(CreateConfig("tiny", "lstm"), load_tokenizer("embedded"), 0)
    save_model(tmp_path, loaded)
    again = load(str(tmp_path))
    tokens = mx.array([[1, 5, 900, 7]])
    assert mx.array_equal(again.model(tokens), loaded.model(tokens))
    assert same_bytes(again.model.parameters(), loaded.model.parameters())
    assert load_tokenizer(str(tmp_path)).get_vocab() == again.tokenizer.get_vocab()
    outlined: Loaded = outline(str(tmp_path))
    assert outlined.config == again.config
    (tmp_path / "model.safetensors").unlink()
    for model in (outline(str(tmp_path)).model, of_config(again.config)):
        shapes = [(name, array.shape) for name, array in tree_flatten(model.parameters())]  # type: ignore[misc, str-unpack]
        assert shapes == [(name, array.shape) for name, array in tree_flatten(loaded.model.parameters())]  # type: ignore[misc, str-unpack]
    assert capfd.readouterr().err == ""  # transformers has never heard of this kind, and would say so


@pytest.mark.skipif(not backend.on_cpu(), reason="what a GPU does was not measured")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_its_memory_is_foreseen(checkpoint: bool) -> None:
    """With a third too much where the test was written: what stands in for its thousands of small steps is a few large ones,
    of which more is thought to be there at once."""
    gc.collect()
    mx.synchronize()
    elsewhere = mx.get_active_memory()
    model = Model(ModelArgs(256, 3, 4096))
    model.train()
    (batch,) = lay_out(chats(), in_rows(8))
    need = foresee.of_step(model, batch, Passage(checkpoint=checkpoint, chunk=64))
    got = measured(model, batch, Passage(checkpoint=checkpoint, chunk=64), elsewhere)
    assert got * 0.95 < need.peak < got * 1.6
