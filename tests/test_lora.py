from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.errors import ConfigError, ModelError
from mlx_qlora.model import frozen, lora
from mlx_qlora.model.load import Loaded
from mlx_qlora.model.lora import LoraConfig, LoRALinear
from mlx_qlora.model.trunk import first_adapted
from mlx_qlora.run.folder import deliver
from tests.conftest import largest_difference, randomize_adapters, same_bytes, tiny_model

TOKENS = mx.array([[5, 6, 7, 8, 9, 10]])


def test_fresh_adapters_change_nothing(any_model: nn.Module) -> None:
    before = any_model(TOKENS)
    lora.attach(any_model, LoraConfig())
    assert mx.array_equal(any_model(TOKENS), before)
    randomize_adapters(any_model)
    assert not mx.allclose(any_model(TOKENS), before, atol=1e-2), "and trained ones do"


def test_merged_equals_attached_and_unmerge_is_the_identity(any_model: nn.Module) -> None:
    frozen.install(any_model)
    lora.attach(any_model, LoraConfig(rank=4))
    randomize_adapters(any_model)
    before, arrays = any_model(TOKENS), any_model.parameters()
    assert lora.merge(any_model) > 0
    assert not lora.adapted(any_model)
    assert mx.allclose(any_model(TOKENS), before, rtol=1e-4, atol=1e-4)
    lora.unmerge(any_model)
    assert same_bytes(any_model.parameters(), arrays)
    assert mx.array_equal(any_model(TOKENS), before)


QUANTISED = [("affine", bits, group) for bits in (2, 3, 4, 6, 8) for group in (32, 64)]
QUANTISED += [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [None, *QUANTISED])
def test_one_layer_by_its_formula(kind: tuple[str, int, int] | None, bias: bool) -> None:
    mx.random.seed(3)
    base = nn.Linear(64, 32, bias=bias)
    if kind is not None:
        mode, bits, group = kind
        base = base.to_quantized(group_size=group, bits=bits, mode=mode)
    layer = LoRALinear(base, rank=3, scale=2.5, dropout=0.0, key=mx.random.key(0))
    layer.lora_b = mx.random.normal((3, 32))
    x = mx.random.normal((5, 64))
    dense = np.array(lora.dense_weight(base)) + 2.5 * (np.array(layer.lora_a) @ np.array(layer.lora_b)).T
    expected = np.array(x) @ dense.T + (np.array(base.bias) if "bias" in base else 0)
    assert np.allclose(np.array(layer(x)), expected, rtol=1e-4, atol=1e-4)
    merged = lora.MergedLinear(layer)
    assert np.allclose(np.array(merged(x)), expected, rtol=1e-4, atol=1e-4)


def test_detach_gives_the_base_back() -> None:
    model = tiny_model("qwen2")
    before, arrays = model(TOKENS), model.parameters()
    lora.attach(model, LoraConfig())
    randomize_adapters(model)
    tuned = model(TOKENS)
    adapters = lora.detach(model)
    assert mx.array_equal(model(TOKENS), before)
    assert same_bytes(model.parameters(), arrays)
    lora.reattach(model, adapters)
    assert mx.array_equal(model(TOKENS), tuned)


def test_presets_last_layers_names_predicates_and_counts() -> None:
    def paths(**settings: object) -> list[str]:
        return list(lora.attach(tiny_model("mistral"), LoraConfig(**settings)).paths)  # type: ignore[arg-type]

    attention, mlp, both = paths(targets=("attention",)), paths(targets=("mlp",)), paths(targets=("all-linear",))
    assert len(attention) == 3 * 4
    assert len(mlp) == 3 * 3
    assert sorted(both) == sorted(attention + mlp)
    assert {path.split(".")[-1] for path in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "lm_head" not in both
    assert paths(targets=("lm_head", "self_attn.q_proj"), layers=1) == ["lm_head", "model.layers.2.self_attn.q_proj"]
    assert {path.split(".")[2] for path in paths(layers=2)} == {"1", "2"}

    model = tiny_model("mistral")
    attached = lora.attach(model, LoraConfig(rank=2), predicate=lambda path, _: path.endswith("v_proj"))
    assert len(attached.paths) == 3
    assert attached.trainable == 3 * 2 * (64 + 32)  # rank x (inputs + outputs)
    dense = tiny_model("mistral", quantized=False)
    assert attached.total == attached.trainable + sum(p.size for _, p in tree_flatten(dense.parameters()))


def test_what_cannot_be_attached_is_said() -> None:
    model = tiny_model("mistral")
    with pytest.raises(ModelError, match=r"'c_attn' names no linear layer.*q_proj"):
        lora.attach(model, LoraConfig(targets=("c_attn",)))
    with pytest.raises(ModelError, match="5 came, but this model has 3 layers"):
        lora.attach(model, LoraConfig(layers=5))
    with pytest.raises(ModelError, match="No linear layer was chosen"):
        lora.attach(model, LoraConfig(), predicate=lambda path, module: False)
    lora.attach(model, LoraConfig())
    with pytest.raises(ModelError, match="has adapters already"):
        lora.attach(model, LoraConfig())
    with pytest.raises(ConfigError, match=r"lora.rank: 0 came(.|\n)*lora.dropout: 1 came"):
        LoraConfig(rank=0, dropout=1)


def test_adapters_start_from_the_seed() -> None:
    def start(seed: int):  # type: ignore[no-untyped-def]
        model = tiny_model("mistral")
        lora.attach(model, LoraConfig(), seed=seed)
        return model.trainable_parameters()

    assert same_bytes(start(1), start(1))
    assert not same_bytes(start(1), start(2))


# Dropout


def test_dropout_keeps_its_share_and_its_mean() -> None:
    layer = LoRALinear(nn.Linear(400, 8), rank=4, scale=1.0, dropout=0.3, key=mx.random.key(0))
    layer.set_dropout_key(mx.random.key(7))
    x = mx.ones((500, 400))
    dropped = layer.dropped(x)
    kept = (dropped != 0).mean().item()
    assert kept == pytest.approx(0.7, abs=0.005)  # 200,000 draws: a standard deviation is 0.001
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert np.allclose(np.unique(np.array(dropped)), [0, 1 / 0.7])


def test_dropout_is_off_in_evaluation_and_wants_a_key_in_training() -> None:
    model = tiny_model("mistral")
    lora.attach(model, LoraConfig(dropout=0.5))
    randomize_adapters(model)
    with lora.dropout_keys(model, mx.random.key(0)):
        model.eval()
        plain = model(TOKENS)
        model.train()
        assert not mx.allclose(model(TOKENS), plain)
    with pytest.raises(RuntimeError, match="no dropout key was given"):
        model(TOKENS)
    model.eval()
    assert mx.array_equal(model(TOKENS), plain)


def test_masks_follow_from_the_key_and_differ_between_layers() -> None:
    model = tiny_model("mistral")
    lora.attach(model, LoraConfig(dropout=0.5))
    model.train()
    x = mx.ones((4, 64))

    def masks(seed: int) -> list[np.ndarray]:  # type: ignore[type-arg]
        with lora.dropout_keys(model, mx.random.key(seed)):
            return [np.array(layer.dropped(x)) for _, layer in lora.adapted(model) if layer.lora_a.shape[0] == 64]

    one, again, other = masks(1), masks(1), masks(2)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert len({mask.tobytes() for mask in one}) == len(one)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_recomputed_forward_drops_the_same_places(compiled: bool) -> None:
    """Gradient checkpointing runs a block twice. With masks drawn anew, lora_b's gradient is off by half."""
    mx.random.seed(0)
    layer = LoRALinear(nn.Linear(64, 64), rank=8, scale=2.0, dropout=0.5, key=mx.random.key(0))
    layer.lora_b = mx.random.normal((8, 64))
    layer.train()
    x = mx.random.normal((16, 64))

    def loss(params: dict[str, mx.array], key: mx.array, checkpoint: bool) -> mx.array:
        layer.update(params)
        layer.set_dropout_key(key)

        def block(x: mx.array, params: dict[str, mx.array]) -> mx.array:
            layer.update(params)
            return mx.tanh(layer(x))

        block = mx.checkpoint(block) if checkpoint else block  # type: ignore[assignment]
        return mx.square(block(x, params)).sum()

    def gradient(checkpoint: bool):  # type: ignore[no-untyped-def]
        step = mx.grad(lambda params, key: loss(params, key, checkpoint))
        step = mx.compile(step) if compiled else step
        return step({"lora_a": layer.lora_a, "lora_b": layer.lora_b}, mx.random.key(4))

    start = {"lora_a": layer.lora_a, "lora_b": layer.lora_b}
    plain = gradient(False)
    layer.update(start)
    assert largest_difference(gradient(True), plain) < 1e-6


# mlx-lm reads what we write


def check_in_mlx_lm(model: nn.Module, attached: lora.Attached, folder: Path) -> None:
    from mlx_lm.utils import load_adapters

    randomize_adapters(model)
    deliver(folder, attached.delivered(lora.adapter_arrays(model)))
    theirs = tiny_model("mistral")
    load_adapters(theirs, str(folder / "adapters"))
    theirs.eval()
    assert mx.allclose(theirs(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj"), ("attention", "lm_head")])
def test_adapters_load_in_mlx_lm_and_give_the_same_logits(tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = tiny_model("mistral")
    attached = lora.attach(model, LoraConfig(rank=4, scale=3.0, dropout=0.1, layers=2, targets=targets))
    check_in_mlx_lm(model, attached, tmp_path)


def test_a_predicate_that_no_config_can_say_loads_in_mlx_lm_too(tmp_path: Path) -> None:
    """v_proj of layer 0 and q_proj of layer 2: mlx-lm puts zeros on the rest."""
    chosen = {"model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.q_proj"}
    model = tiny_model("mistral")
    attached = lora.attach(model, LoraConfig(rank=4), predicate=lambda path, _: path in chosen)
    check_in_mlx_lm(model, attached, tmp_path)


# Embeddings and head


@pytest.mark.parametrize("quantized", [True, False], ids=["4-bit", "dense"])
@pytest.mark.parametrize("shape", ["mistral", "mistral-tied"])
def test_adapted_embeddings_are_what_mlx_lm_makes_of_them(tmp_path: Path, shape: str, quantized: bool) -> None:
    """Tied ones too, which are the head as well; merged into their weights; and off again."""
    from mlx_lm.utils import load_adapters

    model = tiny_model(shape, quantized=quantized)
    frozen.install(model)
    base = model(TOKENS)
    attached = lora.attach(model, LoraConfig(rank=4, scale=3.0, dropout=0.2, layers=1, targets=("all-linear", "embeddings")))
    heads = {"mistral": ["lm_head"], "mistral-tied": []}[shape]
    assert sorted(path for path in attached.paths if ".layers." not in path) == [*heads, "model.embed_tokens"]
    assert f"on {7 + len(heads)} linear layers and the embedding" in attached.describe[0]
    dense = tiny_model(shape, quantized=False)
    assert attached.total == attached.trainable + sum(p.size for _, p in tree_flatten(dense.parameters()))
    assert mx.allclose(model(TOKENS), base, atol=1e-5), "adapters begin with nothing"
    randomize_adapters(model)
    own = model(TOKENS)
    assert not mx.allclose(own, base, atol=0.1)

    deliver(tmp_path, attached.delivered(lora.adapter_arrays(model)))
    theirs = tiny_model(shape, quantized=quantized)
    load_adapters(theirs, str(tmp_path / "adapters"))
    theirs.eval()
    assert mx.allclose(theirs(TOKENS), own, rtol=1e-4, atol=1e-4)
    kinds = {path: type(module).__name__ for path, module in theirs.named_modules()}
    assert kinds["model.embed_tokens"] == "LoRAEmbedding"

    lora.merge(model)
    assert mx.allclose(model(TOKENS), own, rtol=1e-4, atol=1e-4)
    lora.unmerge(model)
    assert mx.array_equal(model(TOKENS), own)
    adapters = lora.detach(model)
    assert mx.array_equal(model(TOKENS), base)
    lora.reattach(model, adapters)
    assert mx.array_equal(model(TOKENS), own)
    assert first_adapted(model) == 0, "nothing below the embedding could be kept"


def test_a_tied_head_is_named_by_its_embedding() -> None:
    with pytest.raises(ModelError, match=r"'lm_head': this model has no head of its own.*Name embed_tokens, which adapts both"):
        lora.attach(tiny_model("mistral-tied"), LoraConfig(targets=("lm_head",)))
    attached = lora.attach(tiny_model("mistral-tied"), LoraConfig(targets=("embed_tokens",)))
    assert attached.paths == ("model.embed_tokens",)
    assert "on the embedding" in attached.describe[0]


def test_the_embedded_model_is_a_frozen_4_bit_mistral(embedded: Loaded) -> None:
    assert embedded.config["model_type"] == "mistral"
    assert embedded.config["quantization"]["bits"] == 4
    assert not tree_flatten(embedded.model.trainable_parameters())
    assert {p.dtype for _, p in tree_flatten(embedded.model.parameters())} <= {mx.float32, mx.uint32}
