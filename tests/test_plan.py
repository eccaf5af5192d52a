"""What is chosen for a run, and `mlx-qlora plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import pytest

from mlx_qlora.commands import main
from mlx_qlora.config import RunConfig
from mlx_qlora.engine.optim import OptimConfig
from mlx_qlora.foresee import Foresight, longest
from mlx_qlora.model import lora
from mlx_qlora.model.load import load, outline
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.plan import alternatives, budgets, choose_without_data

SHAPES_7B = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 4, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 32768, "rope_theta": 1e6,
    "tie_word_embeddings": False, "quantization": {"group_size": 64, "bits": 4},
}  # fmt: skip


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A model of which there is a configuration and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES_7B), encoding="utf-8")
    return tmp_path


def embedded_plan(**settings: object) -> tuple[int, bool, bool | None]:
    config = replace(RunConfig(model="embedded", max_seq_length=256), **settings)  # type: ignore[arg-type]
    model = outline("embedded").model
    lora.attach(model, config.lora)
    model.train()
    plan = choose_without_data(config, model)
    return plan.layout.token_budget, plan.passage.checkpoint, plan.memory and plan.memory.fits


def test_what_fits_is_chosen_and_what_was_set_stays() -> None:
    assert embedded_plan() == (4096, False, True)
    assert embedded_plan(memory="off") == (4096, False, None)
    assert embedded_plan(memory="off", grad_checkpoint="on") == (4096, True, None)
    assert embedded_plan(grad_checkpoint="on") == (4096, True, True)
    assert embedded_plan(token_budget=300) == (300, False, True)
    budget, checkpoint, fits = embedded_plan(memory="60MB")
    assert budget < 4096
    assert fits
    budget, checkpoint, fits = embedded_plan(memory="3MB")
    assert checkpoint
    assert not fits
    assert embedded_plan(memory="3MB", grad_checkpoint="off")[1:] == (False, False)


def test_budgets_end_where_a_batch_holds_one_example() -> None:
    assert budgets(RunConfig(), longest([1025])) == [4096, 2048, 1024]
    assert budgets(RunConfig(token_budget=77), longest([1025])) == [77]
    assert budgets(RunConfig(), longest([9000])) == [4096]


def test_alternatives_go_from_mild_to_harsh() -> None:
    config = RunConfig(model="embedded", max_seq_length=256)
    model = outline("embedded").model
    lora.attach(model, LoraConfig())
    model.train()
    changes = alternatives(choose_without_data(config, model), config, Foresight(model, longest([256] * 4), OptimConfig()))
    assert "max_seq_length" in changes[-1].what
    assert not any("max_seq_length" in each.what for each in changes[:-1])
    assert changes[-1].memory.peak == min(each.memory.peak for each in changes)


def test_an_outline_has_the_shapes_of_the_loaded_model() -> None:
    from mlx.utils import tree_flatten

    shapes = [
        {name: (array.shape, array.dtype) for name, array in tree_flatten(model.parameters())}
        for model in (outline("embedded").model, load("embedded").model)
    ]
    assert shapes[0] == shapes[1]


def test_plan_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "plan.json"
    assert main(["plan", "--demo", "--json", str(found)]) == 0
    said = capsys.readouterr().out
    assert "636 of 4 examples, 212 an epoch" in said
    assert "fits" in said
    written = json.loads(found.read_text(encoding="utf-8"))
    assert written["fits"] is True
    assert written["updates"] == {"epoch": 212, "all": 636}
    assert written["exposure"]["passes"] == 3
    assert written["exposure"]["tokens_seen"] == 3 * (written["exposure"]["tokens"] - 848)
    assert "adapters have no yardstick" in said
    assert said.index("\nexposure\n") < said.index("memory at the peak")
    assert written["parameters"] > written["trained"] > 0
    assert written["memory"]["peak"] == sum(
        written["memory"][name] for name in ("weights", "adapters", "optimizer", "activations", "logits", "dequantised")
    )


def test_plan_without_weights_and_without_data(config_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--model", str(config_only), "--max-seq-length", "128", "--token-budget", "512", "--layout", "plain"]
    assert main([*flags, "--memory", "100GB"]) == 0
    said = capsys.readouterr().out
    assert "4 examples of 128 tokens are assumed" in said
    assert "weights" in said
    assert main([*flags, "--memory", "1GB"]) == 2
    error = capsys.readouterr().err
    assert "and 1.00 GB may be used" in error
    assert "GB with token_budget: 256, grad_checkpoint: on" in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "model is missing"),
        (["--model", "embedded", "--memory", "lots"], "memory: 'lots' came, auto, off, or a size such as 12GB"),
        (["--model", "embedded", "--json", "/nowhere/at/all.json"], "a file in a folder that is there is expected"),
        (["--model", "./nowhere"], "there is no such folder"),
    ],
)
def test_wrong_input_is_one_message(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    captured = capsys.readouterr().err
    assert said in captured
    assert "Traceback" not in captured


def test_a_wrong_flag_names_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--memroy", "1GB"])
    assert ended.value.code == 2
    assert "mlx-qlora plan" in capsys.readouterr().err
