"""Models from nothing: sizes, first weights, the folder they are saved as, and a run that makes one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora import RunConfig, train
from mlx_qlora.commands import main
from mlx_qlora.errors import ConfigError, ModelError
from mlx_qlora.model.create import PRESETS, CreateConfig, create, describe, parameters, save_model, wanted_vocabulary
from mlx_qlora.model.load import Loaded, load, load_tokenizer, outline
from tests.conftest import same_bytes

SMALL = {
    "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A config.json of two small layers."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    return str(path)


def made(preset: str, seed: int = 0, **more: Any) -> Loaded:
    return create(CreateConfig(preset, **more), load_tokenizer("embedded"), seed)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_size_that_its_name_says_and_an_lstm_the_same(preset: str) -> None:
    sizes = [parameters(create(CreateConfig(preset, architecture), None, 0).model) for architecture in ("mistral", "lstm")]
    named = {"tiny": 2e6}.get(preset) or float(preset.removesuffix("m")) * 1e6
    assert sizes[0] == pytest.approx(named, rel=0.1)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_the_first_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = made("tiny", seed=3)
    arrays: dict[str, mx.array] = tree_flatten(loaded.model.parameters(), destination={})  # type: ignore[assignment]
    for name, array in arrays.items():
        assert array.dtype == mx.float32
        if "norm" in name:
            assert mx.all(array == 1)
            continue
        wanted = 0.02 / 8**0.5 if "o_proj" in name or "down_proj" in name else 0.02
        # The deviation of n numbers has an error of one part in the root of 2 n.
        assert array.std().item() == pytest.approx(wanted, rel=5 / (2 * array.size) ** 0.5), name
        assert abs(array.mean().item()) < 5 * wanted / array.size**0.5, name
    trained: dict[str, mx.array] = tree_flatten(loaded.model.trainable_parameters(), destination={})  # type: ignore[assignment]
    assert trained.keys() == arrays.keys()
    assert describe(loaded) == f"new (mistral, {parameters(loaded.model):,} parameters, float32)"


@pytest.mark.parametrize("architecture", ["mistral", "lstm"])
def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_before(architecture: str) -> None:
    first = made("tiny", seed=3, architecture=architecture).model
    mx.eval(mx.random.normal((5,)))
    assert same_bytes(first.parameters(), made("tiny", seed=3, architecture=architecture).model.parameters())
    other: dict[str, mx.array] = tree_flatten(made("tiny", 4, architecture=architecture).model.parameters(), destination={})  # type: ignore[assignment]
    own: dict[str, mx.array] = tree_flatten(first.parameters(), destination={})  # type: ignore[assignment]
    assert not any(mx.array_equal(own[name], other[name]) for name in own if own[name].ndim > 1)


def test_a_model_fits_a_tokenizer_that_is_larger_or_smaller_than_the_preset_s(small: str) -> None:
    large: Any = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 40_000}, bos_token_id=7, eos_token_id=8)
    loaded = create(CreateConfig("tiny"), large, 0, positions=5000)
    assert (loaded.config["vocab_size"], loaded.config["max_position_embeddings"]) == (40_001, 5000)
    assert (loaded.config["bos_token_id"], loaded.config["eos_token_id"]) == (7, 8)
    assert loaded.model(mx.array([[40_000]])).shape == (1, 1, 40_001)
    assert made("tiny").config["vocab_size"] == 1933
    # A file may want more rows than there are tokens, and gets fewer never.
    assert made(small).config["vocab_size"] == 1933
    tight: Any = SimpleNamespace(get_vocab=lambda: {"a": 199}, bos_token_id=None, eos_token_id=1)
    assert create(CreateConfig(small), tight, 0).config["vocab_size"] == 300


def test_any_kind_of_model_can_be_made_from_its_config(tmp_path: Path) -> None:
    more = {"model_type": "qwen2", "rope_theta": 1e4, "quantization": {"group_size": 32, "bits": 4}, "initializer_range": 0.05}
    (tmp_path / "config.json").write_text(json.dumps(SMALL | more), encoding="utf-8")
    loaded = made(str(tmp_path))  # the folder will do
    assert type(loaded.model).__module__ == "mlx_lm.models.qwen2"
    assert "quantization" not in loaded.config
    attention: Any = loaded.model.layers[0].self_attn
    assert mx.all(attention.q_proj.bias == 0)
    assert attention.q_proj.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert wanted_vocabulary(CreateConfig(str(tmp_path))) == 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "tiny, 20m, 110m, 400m or the path of a config.json is expected"),
        ("[1]", "an object is expected"),
        ('{"vocab_size": 300}', "it has no model_type"),
        (
            json.dumps(SMALL | {"model_type": "llama", "initializer_range": "x"}),
            "initializer_range: 'x' came, a number above 0",
        ),
        ('{"model_type": "mistral"}', "vocab_size: a whole number"),
        ('{"model_type": "nonesuch", "vocab_size": 300}', "Model type nonesuch not supported"),
        ('{"model_type": "mistral", "vocab_size": 300, "hidden_size": 64}', "it lacks num_hidden_layers, intermediate_size"),
        ('{"model_type": "mistral", "vocab_size": 300, "auto_map": {"AutoModel": "x.y"}}', "names code of its own"),
    ],
)
def test_what_is_wrong_with_a_config_file_is_said(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises((ConfigError, ModelError), match=said) as caught:
        made(str(path))
    assert str(path) in str(caught.value)


def test_a_saved_model_is_loaded_by_mlx_lm_with_the_same_logits_and_can_be_quantised(tmp_path: Path) -> None:
    loaded = made("tiny")
    folder = tmp_path / "new"
    save_model(folder, loaded)
    tokens = mx.array([[1, 5, 900, 7]])
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    assert mx.array_equal(model(tokens), loaded.model(tokens))
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    ours = load(str(folder))
    assert same_bytes(ours.model.parameters(), loaded.model.parameters())
    assert outline(str(folder)).config == ours.config

    command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(folder), "--mlx-path", str(tmp_path / "4bit"), "-q"]
    subprocess.run([*command, "--dtype", "float32"], check=True, capture_output=True)
    few, _, config = mlx_lm.load(str(tmp_path / "4bit"), return_config=True)
    assert config["quantization"]["bits"] == 4
    assert all("scales" in module for path, module in few.named_modules() if path.endswith(("_proj", "embed_tokens")))
    got, wanted = np.array(few(tokens).astype(mx.float32)).ravel(), np.array(loaded.model(tokens)).ravel()
    assert np.corrcoef(got, wanted)[0, 1] > 0.9


@pytest.fixture
def config(small: str, tmp_path: Path) -> RunConfig:
    data = tmp_path / "data"
    data.mkdir()
    for split, numbers in (("train", range(24)), ("valid", range(100, 106))):
        texts = [f"The price of {number} apples and {number // 2} pears is {3 * number}." for number in numbers]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (data / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return RunConfig(
        preset=small, data=str(data), output_dir=str(tmp_path / "run"), max_steps=4, eval_every=2, batch_size=4,
        max_seq_length=80, learning_rate=1e-2, schedule="constant", data_cache="off", windows="off",
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["mistral", "lstm"])
def test_a_run_from_nothing_goes_on_to_the_same_bytes(config: RunConfig, architecture: Any, tmp_path: Path) -> None:
    if architecture == "lstm":
        lstm = {"model_type": "mlx_qlora_lstm", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300}
        Path(config.preset).write_text(json.dumps(lstm), encoding="utf-8")
    whole = train(replace(config, output_dir=str(tmp_path / "whole")), quiet=True)
    train(replace(config, max_steps=2), quiet=True)
    first = load_tokenizer(config.output_dir + "/model").get_vocab()
    train(replace(config, resume=True, resume_anyway=True), quiet=True)
    pair = [Path(config.output_dir), whole.output_dir]
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        one, other = ((folder / "model" / name).read_bytes() for folder in pair)
        assert one == other, name
    delivered = load(f"{config.output_dir}/model")
    assert delivered.tokenizer.get_vocab() == first
    assert len(first) < delivered.config["vocab_size"] == 300  # as the file says, though the text has fewer words
    tokens = mx.array([[1, 5, 9]])
    assert mx.array_equal(delivered.model(tokens), whole.model(tokens))
    assert delivered.config["max_position_embeddings"] >= 80 if architecture == "mistral" else True
    best = whole.summary["best"]
    assert best["val_loss"] < np.log(300)


def test_a_run_keeps_its_tokenizer_when_the_one_that_was_named_is_gone(config: RunConfig, tmp_path: Path) -> None:
    named = tmp_path / "named"
    load_tokenizer("embedded").save_pretrained(named)
    config = replace(config, tokenizer=str(named), max_steps=2)
    train(config, quiet=True)
    (named / "tokenizer.json").unlink()
    train(replace(config, max_steps=3, resume=True, resume_anyway=True), quiet=True)
    assert load_tokenizer(f"{config.output_dir}/model").get_vocab() == load_tokenizer("embedded").get_vocab()


def test_plan_says_what_would_be_made_and_writes_nothing(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--preset", "tiny", "--data", str(small_data), "--vocab-size", "400", "--data-cache", "off"]) == 0
    said = capsys.readouterr().out
    assert "tokenizer 400 tokens, trained on " in said
    assert "new (mistral, " in said
    assert main(["plan", "--preset", "20m", "--memory", "off"]) == 0  # there need be no data
    assert "new (mistral, 20,356,992 parameters, float32)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_named_or_made_and_not_both(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = ["--data", "embedded", "--output-dir", str(tmp_path / "run")]
    for verb in (["train", *run], ["plan", "--data", "embedded"]):
        assert main([*verb, "--preset", "tiny", "--model", "embedded"]) == 2
        assert "preset: 'tiny' came, and model: 'embedded'" in capsys.readouterr().err
        assert main([*verb, "--tokenizer", "embedded", "--model", "embedded"]) == 2
        assert "tokenizer: 'embedded' came without preset" in capsys.readouterr().err
        assert main([*verb, "--dropout", "0.5", "--model", "embedded"]) == 2
        assert "dropout: 0.5 came with fine_tune_type lora" in capsys.readouterr().err
    assert main(["train", *run, "--embedding-learning-rate", "1e-5", "--model", "embedded"]) == 2
    assert "neither embeddings nor head are trained" in capsys.readouterr().err
    assert main(["train", *run]) == 2
    assert "or --preset tiny" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="no number where a tokenizer is named"):
        RunConfig(preset="tiny", tokenizer="embedded", vocab_size=500)
    assert RunConfig(preset="tiny").fine_tune_type == "full"
