"""A student with the last tokens of its teacher: no other number changes, others load it, and training reaches the new rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tiny_model
from mlx.utils import tree_flatten

from mlx_qlora.assets import embedded_data, embedded_model
from mlx_qlora.commands.distill_grow import main
from mlx_qlora.config import RunConfig
from mlx_qlora.errors import ConfigError, RunFolderError
from mlx_qlora.model.grown import grow, vocabulary_layers
from mlx_qlora.model.load import as_stored, load, load_tokenizer
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.train import run

TOKENS, ROWS = 1933, 2048
NEW = ("<|im_start|>", "<|im_end|>", *(f"<|more_{number}|>" for number in range(148)))
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with 150 tokens more, of which one ends a text."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = load_tokenizer("embedded")
    tokenizer.add_special_tokens({"extra_special_tokens": list(NEW)})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [2, TOKENS + 1]}))
    return folder


@pytest.fixture(scope="module")
def grown(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "grown"
    assert main(["--model", "embedded", "--like", str(teacher), "--output-dir", str(folder)]) == 0
    return folder


def bytes_of(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint8)).tobytes()


def test_the_old_rows_keep_every_byte_and_so_does_all_the_rest(grown: Path) -> None:
    before: Any = tree_flatten(as_stored("embedded").model.parameters(), destination={})
    after: Any = tree_flatten(as_stored(str(grown)).model.parameters(), destination={})
    assert before.keys() == after.keys()
    for name, array in before.items():
        if "embed_tokens" in name:
            assert after[name].shape[0] == TOKENS + len(NEW)
            assert bytes_of(after[name][:TOKENS]) == bytes_of(array[:TOKENS])
        else:
            assert bytes_of(after[name]) == bytes_of(array), name
    assert json.loads((grown / "config.json").read_text())["vocab_size"] == TOKENS + len(NEW)


def test_mlx_lm_gives_the_old_ids_the_same_bits(grown: Path) -> None:
    from mlx_lm import load as load_it

    tokens = mx.array([[1, 3, 200, 1932, 7]])
    (old, _), (new, tokenizer) = load_it(str(embedded_model())), load_it(str(grown))[:2]
    assert bytes_of(new(tokens)[..., :TOKENS]) == bytes_of(old(tokens)[..., :TOKENS])
    assert tokenizer.encode("<|im_start|>a<|im_end|>", add_special_tokens=False)[::2] == [TOKENS, TOKENS + 1]
    assert tokenizer.eos_token_ids == {2, TOKENS + 1}


def test_mlx_lm_generates_with_it(grown: Path) -> None:
    from mlx_lm import generate
    from mlx_lm import load as load_it

    (old, first), (new, second) = load_it(str(embedded_model())), load_it(str(grown))[:2]
    prompt = "The club meets"
    assert generate(new, second, prompt, max_tokens=12) == generate(old, first, prompt, max_tokens=12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bits": 2, "group_size": 32},
        {"bits": 3, "group_size": 64},
        {"bits": 6, "group_size": 32},
        {"bits": 8, "group_size": 64},
        {"mode": "mxfp4", "bits": 4, "group_size": 32},
        {"mode": "nvfp4", "bits": 4, "group_size": 16},
    ],
)
def test_new_rows_are_the_mean_of_the_known_ones(how: dict[str, Any], tied: bool) -> None:
    """96 rows, of which 90 are tokens: the 6 of padding do not count, and 4 of them and 8 after them are new."""
    model = tiny_model("mistral-tied" if tied else "mistral", quantized=False)
    if how:
        nn.quantize(model, **how)
    layers = vocabulary_layers(model, 96)
    assert set(layers) == ({"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"})
    before = {path: {name: mx.array(array) for name, array in layer.items()} for path, layer in layers.items()}
    expected = {path: dense(layer)[:90].mean(axis=0) for path, layer in layers.items()}
    tokens = mx.array([[1, 2, 3, 89]])
    logits = model(tokens)
    grow(layers, range(90), 104)
    for path, layer in layers.items():
        for name, array in before[path].items():
            assert bytes_of(layer[name][:90]) == bytes_of(array[:90])
            assert layer[name].dtype == array.dtype
        rows = dense(layer)
        assert rows.shape[0] == 104
        # What quantising the mean once does to it, and no more.
        step = mx.dequantize(*mx.quantize(expected[path][None], **how), **how)[0] if how else expected[path]
        assert mx.allclose(rows[90:], mx.broadcast_to(step, (14, 64)), atol=1e-6)
        assert mx.abs(rows[90:] - expected[path]).max().item() < (0.05 if how else 1e-6)
    assert mx.allclose(model(tokens)[..., :90], logits[..., :90], atol=0 if how else 1e-4)


def dense(layer: Any) -> mx.array:
    if "scales" not in layer:
        return layer.weight  # type: ignore[no-any-return]
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **how, dtype=mx.float32)


def test_padding_that_nobody_needs_stays() -> None:
    model = tiny_model("mistral")
    layers = vocabulary_layers(model, 96)
    before = mx.array(layers["lm_head"].weight)
    grow(layers, range(80), 84)
    assert bytes_of(layers["lm_head"].weight[84:]) == bytes_of(before[84:])
    assert layers["lm_head"].weight.shape == before.shape


def test_training_reaches_the_new_rows_and_mlx_lm_loads_the_adapters(grown: Path, tmp_path: Path) -> None:
    from mlx_lm import load as load_it

    data = tmp_path / "data"
    data.mkdir()
    rows = (embedded_data() / "train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    out = tmp_path / "run"
    run(
        RunConfig(
            model=str(grown), data=str(data), output_dir=str(out), max_steps=8, batch_size=4, learning_rate=3e-3,
            data_cache="off", lora=LoraConfig(rank=4, targets=("all-linear", "embeddings")),
        )
    )  # fmt: skip
    (ours, tokenizer), untrained = load_it(str(grown), adapter_path=str(out / "adapters"))[:2], load(str(grown)).model
    talk = tokenizer.apply_chat_template(json.loads(rows[0])["messages"])
    end = len(talk) - 1 - talk[::-1].index(TOKENS + 1)
    before, after = (model(mx.array([talk[:end]]))[0, -1, TOKENS:] for model in (untrained, ours))
    assert before.max().item() == before.min().item(), "one mean for all of them"
    assert after.argmax().item() == 1, "the token that ended the answers of the data"


def test_what_is_refused_leaves_nothing(teacher: Path, grown: Path, tmp_path: Path, capsys: Any) -> None:
    def refused(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return str(capsys.readouterr().err)

    out = str(tmp_path / "out")
    assert "there is nothing to grow: the student knows all of its 1,933 tokens and 150 more" in refused(
        "--model", str(grown), "--like", "embedded", "--output-dir", out
    )
    assert "knows all of its 1,933 tokens (" in refused("--model", "embedded", "--like", "embedded", "--output-dir", out)
    other = tmp_path / "other"
    load_tokenizer("embedded").save_pretrained(other)
    described = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = described["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (other / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    said = refused("--model", "embedded", "--like", str(other), "--output-dir", out)
    assert "token 38 is 'A' in the student and 'B' in the teacher; 2 of 1,933 ids differ" in said
    assert refused("--model", "embedded") == (
        "mlx-qlora distill grow: --like, --output-dir are missing. "
        "Expected: mlx-qlora distill grow --model STUDENT --like TEACHER --output-dir FOLDER\n"
    )
    assert "there is something in it already" in refused(
        "--model", "embedded", "--like", str(teacher), "--output-dir", str(grown)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_file_with_settings_names_student_and_teacher(teacher: Path, tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(f"model: embedded\ndistill:\n  teacher: {teacher}\n", encoding="utf-8")
    command = [sys.executable, "-m", "mlx_qlora", "distill", "grow", "--config", str(settings)]
    done = subprocess.run([*command, "--output-dir", str(tmp_path / "g")], capture_output=True, text=True, check=True)
    assert "150 tokens from number 1,933 on: <|im_start|>, <|im_end|>, <|more_0|>" in done.stdout
    assert "115 that were padding and 35 that are new of 2,083 rows are the mean of the 1,933 known" in done.stdout
    assert "a text ends with <|im_end|>, too" in done.stdout
    assert (tmp_path / "g" / "config.json").is_file()


def test_a_disk_that_is_full_leaves_no_half_of_a_model(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_qlora.distilling import grow as growing

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(growing.disk, "flush", full)
    with pytest.raises(OSError, match="No space"):
        growing.grown("embedded", str(teacher), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_errors_are_the_users(teacher: Path, tmp_path: Path) -> None:
    from mlx_qlora.distilling.grow import grown

    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError):
        grown("embedded", str(teacher), tmp_path / "file")
    with pytest.raises(ConfigError):
        grown("embedded", "embedded", tmp_path / "out")
