"""Training all parameters: the same gradient in every layout, the same bytes after an interruption, a model for others."""

from __future__ import annotations

import gc
import json
import os
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_qlora import RunConfig, train
from mlx_qlora.assets import embedded_model
from mlx_qlora.commands.evaluate import main as evaluate
from mlx_qlora.data.corpus import gather
from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.engine.optim import OptimConfig, begin, global_norm, make_optimizer
from mlx_qlora.engine.steps import Engine, computing_in, micro_step, steps
from mlx_qlora.errors import ModelError
from mlx_qlora.foresee import Foresight
from mlx_qlora.look.advice import advise
from mlx_qlora.look.measure import measure
from mlx_qlora.model import backend, full, lora
from mlx_qlora.model.dropout import drop_outputs
from mlx_qlora.model.full import FullConfig
from mlx_qlora.model.load import load
from mlx_qlora.model.trunk import Passage, first_adapted
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import START, Delivered, EvalReport, LossSum, StepReport, Update
from mlx_qlora.run import folder as run_folder
from mlx_qlora.run.checkpoint import newest
from tests.conftest import SHAPES, largest_difference, same_bytes, tiny_model
from tests.test_layouts import KEY, LAYOUTS, PACKABLE, assert_same, family, plainly, through
from tests.test_memory import LARGER, chats
from tests.test_resume import figures, interrupted

TINY = {
    "model_type": "mistral", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 2048, "max_position_embeddings": 1024,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in float16 with the embedded tokenizer, as mlx-lm loads it."""
    from mlx_lm.models.llama import Model, ModelArgs

    folder = tmp_path_factory.mktemp("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_model() / name, folder)
    (folder / "config.json").write_text(json.dumps(TINY))
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(TINY))
    model.update(tree_map(lambda p: (mx.random.normal(p.shape) * 0.1 + (p.ndim == 1)).astype(mx.float16), model.parameters()))
    model.save_weights(str(folder / "model.safetensors"))
    return folder


@pytest.fixture
def config(tiny_folder: Path, small_data: Path, tmp_path: Path) -> RunConfig:
    """6 updates."""
    return RunConfig(
        model=str(tiny_folder), data=str(small_data), output_dir=str(tmp_path / "run"), epochs=2, batch_size=8, eval_every=2,
        learning_rate=1e-2, fine_tune_type="full", data_cache="off",
    )  # fmt: skip


def whole(shape: str) -> nn.Module:
    model = tiny_model(shape, quantized=False)
    model.unfreeze()
    model.train()
    return model


@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("layout", ["plain", "packed-small", "padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_has_the_plain_gradient_in_every_layout(shape: str, layout: str, checkpoint: bool) -> None:
    """Embeddings, tied with the head or not, norms, biases and head, too."""
    if layout.startswith("packed") and shape not in PACKABLE:
        pytest.skip("this model can't be packed")
    model = whole(shape)
    assert first_adapted(model) == 0, "nothing below can be kept"
    got = through(model, lay_out(family(), LAYOUTS[layout]), Passage(checkpoint=checkpoint, chunk=16))
    expected = plainly(model, family())
    assert len(tree_flatten(got[1])) == len(tree_flatten(model.parameters()))
    assert_same(got, expected, tolerance=2e-5)


@pytest.mark.parametrize("shape", ["mistral", "mistral-tied"])
def test_a_compiled_step_has_it_too(shape: str) -> None:
    model = whole(shape)
    batches = lay_out(family(), LAYOUTS["padded"])
    assert batches[0].segments == ()
    found = []
    for compiled in (False, True):
        engine = Engine(model, sft(), None, OptimConfig(), lora.dropout_keys, compiled=compiled)  # type: ignore[arg-type]
        loss, gradients = micro_step(engine)(batches[0], KEY)
        found.append((loss.total, gradients))
    assert largest_difference(found[1][1], found[0][1]) < 2e-5
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=1e-6)


def test_a_head_that_is_not_tied_gets_no_gradient_for_the_embedding_from_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be an array of zeros as large as the embedding, for each chunk."""
    from mlx_qlora.model import head

    sizes: list[int] = []
    plain = head._one_pass
    monkeypatch.setattr(head, "_one_pass", lambda *given: sizes.append(len(given[-1])) or plain(*given))  # type: ignore[func-returns-value]
    for shape, expected in (("mistral", ["lm_head.weight"]), ("mistral-tied", ["model.embed_tokens.weight"])):
        through(whole(shape), lay_out(family(), LAYOUTS["plain"])[:1])
        assert sizes.pop() == len(expected)


# Dropout


@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("layout", ["plain", "packed-small", "padded"])
@pytest.mark.parametrize("shape", ["mistral", "mistral-tied", "gemma3"])
def test_the_same_is_dropped_in_every_layout_and_when_layers_are_computed_again(
    shape: str, layout: str, checkpoint: bool
) -> None:
    model = whole(shape)
    names = [name for name, _ in flat(model)]
    assert drop_outputs(model, 0.3) == 1 + 2 * 3, "the embedding, and attention and MLP of three layers"
    assert [name for name, _ in flat(model)] == names
    model.train()
    expected = plainly(model, family())
    got = through(model, lay_out(family(), LAYOUTS[layout]), Passage(checkpoint=checkpoint, chunk=16))
    assert_same(got, expected, tolerance=2e-5)


def test_dropout_drops_its_share_of_each_place_and_nothing_in_evaluation() -> None:
    model, plain = whole("mistral"), whole("mistral")
    drop_outputs(model, 0.25)
    tokens = mx.array([list(range(3, 90))])
    found = {}
    for path in ("model.embed_tokens", "model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj"):
        module = dict(model.named_modules())[path]
        inputs = tokens if path.endswith("tokens") else mx.random.normal((1, 87, module.weight.shape[1]))
        before = dict(plain.named_modules())[path](inputs)
        model.train()
        with lora.dropout_keys(model, KEY):
            after = module(inputs)
        gone = after == 0
        assert gone.mean().item() == pytest.approx(0.25, abs=0.03)
        assert mx.allclose(mx.where(gone, 0, before / 0.75), after, rtol=1e-5)
        found[path] = np.array(gone)
    one, two, three = found.values()
    assert (one == two).mean() < 0.7, "each place drops by itself"
    assert (two == three).mean() < 0.7
    model.eval()
    assert mx.array_equal(model(tokens), plain(tokens))


def test_layers_of_which_nothing_is_known_are_refused() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strange = nn.Linear(4, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Layer()]

    with pytest.raises(ModelError, match=r"dropout: nothing in layers.0 is known .*its modules: strange.*Set dropout: 0"):
        drop_outputs(Model(), 0.1)


# Mixed precision


def test_gradients_are_float32_and_as_near_as_bfloat16_lets_them() -> None:
    model = whole("mistral")
    model.update(tree_map(lambda p: p * 0.3 if p.ndim == 2 else p, model.parameters()))  # as steep as a trained one
    (batch,) = lay_out(family(), LAYOUTS["packed"])
    found = []
    for dtype in (None, mx.bfloat16):
        engine = Engine(model, sft(), None, OptimConfig(), lora.dropout_keys, computes_in=dtype)  # type: ignore[arg-type]
        loss, gradients = micro_step(engine)(batch, KEY)
        found.append((loss.total, gradients))
        assert loss.total.dtype == mx.float32
        assert {array.dtype for _, array in tree_flatten(gradients)} == {mx.float32}
        assert {array.dtype for _, array in flat(model)} == {mx.float32}, "the parameters are what they were"
    (exact, wanted), (rounded, got) = found
    assert 0 < abs(rounded.item() - exact.item()) < 0.02 * exact.item()
    apart = global_norm(tree_map(mx.subtract, got, wanted)) / global_norm(wanted)
    assert 1e-4 < apart.item() < 0.03


def test_small_updates_are_not_lost() -> None:
    """50 updates by 1e-5 of a parameter: in bfloat16 alone none of them is ever seen."""

    def objective(model: nn.Module, batch: Any) -> LossSum:
        return LossSum(model.weight.sum().astype(mx.float32), mx.array(1.0))

    def trained(stored: mx.Dtype, dtype: mx.Dtype | None) -> float:
        model = nn.Linear(4, 4, bias=False)
        model.weight = mx.ones((4, 4), stored)
        config = OptimConfig(learning_rate=1e-5, optimizer="sgd", schedule="constant", clip_grad_norm=0)
        engine = Engine(model, objective, make_optimizer(config, 50), config, lora.dropout_keys, computes_in=dtype)
        update = Update(lay_out(family()[:1], Layout()), 0.5, tuple(family()[:1]), 9, 9, START)
        for report in steps(engine, [update] * 50):
            assert isinstance(report, StepReport)
        return 1 - float(model.weight[0, 0].item())

    assert trained(mx.float32, mx.bfloat16) == pytest.approx(50e-5, rel=1e-2)
    assert trained(mx.bfloat16, None) == 0


def test_validation_computes_as_training_does(config: RunConfig) -> None:
    half = replace(config, precision="bfloat16", max_steps=1, eval_every=1, batch_size=2)
    result = train(half, quiet=True)
    parameters, _ = arrays_of(half)
    model = load(config.model).model
    model.update(tree_unflatten(list(parameters.items())))
    corpus = gather(half.part(SourceConfig), half.part(RenderConfig), result.tokenizer, 0, lambda rows: None)
    valid = corpus.valid_examples()
    losses = []
    for dtype in (mx.bfloat16, None):
        with computing_in(model, dtype):
            losses.append(measure(model, sft(), lay_out(valid, Layout(Kind.PACKED)), valid).mean)
    assert result.summary["best"]["val_loss"] == pytest.approx(losses[0], abs=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-5


# Memory


@pytest.mark.skipif(not backend.on_cpu(), reason="what a GPU does was not measured")
@pytest.mark.parametrize(("rows", "checkpoint"), [(8, False), (8, True), (2, True)])
def test_the_peak_of_whole_updates_is_foreseen(rows: int, checkpoint: bool) -> None:
    """One batch, whose step is the peak; and several with layers computed again, where that is the update itself."""
    module, more = SHAPES["mistral"]
    code = import_module(f"mlx_lm.models.{module}")
    gc.collect()
    mx.synchronize()
    elsewhere = mx.get_active_memory()
    model = code.Model(code.ModelArgs.from_dict(LARGER | more))
    model.train()
    optim, passage, layout = OptimConfig(), Passage(checkpoint=checkpoint, chunk=64), Layout(Kind.PLAIN, rows=rows)
    examples = tuple(chats())
    batches = lay_out(examples, layout)
    need = Foresight(model, examples, optim).memory(layout, passage)
    optimizer = make_optimizer(optim, 3, model.trainable_parameters())
    begin(optimizer, model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state, [batch[:6] for batch in batches])
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    engine = Engine(model, sft(passage=passage), optimizer, optim, lora.dropout_keys)
    assert len(list(steps(engine, [Update(batches, 0.5, examples, 9, 9, START)] * 2))) == 2
    assert need.peak == pytest.approx(mx.get_peak_memory() - elsewhere, rel=0.1)


# A whole run


def arrays_of(config: RunConfig) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """(parameters, the optimizer's state) of the last checkpoint."""
    found, _ = newest(Path(config.output_dir))
    assert found is not None
    return found.arrays("weights"), found.arrays("optimizer")


def test_a_run_leaves_a_model_that_mlx_lm_loads(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_lm import load as mlx_lm_load

    result = train(replace(config, score_questions=1, max_answer_tokens=4))
    printed = capsys.readouterr().out
    folder = result.output_dir
    assert not (folder / "adapters").exists()
    count = sum(array.size for _, array in flat(result.model))
    assert f"everything: {count:,} parameters, float32, computed in float32" in printed
    assert f"mlx_lm.generate --model {folder / 'model'} --prompt" in printed
    theirs, tokenizer = mlx_lm_load(str(folder / "model"))[:2]
    assert {array.dtype for _, array in tree_flatten(theirs.parameters())} == {mx.float16}, "as the base was stored"
    tokens = mx.array([tokenizer.encode("O clube fica em Évora.")])
    assert tokens.tolist()[0] == result.tokenizer.encode("O clube fica em Évora.")
    assert tokenizer.chat_template == result.tokenizer.chat_template
    same = load(str(folder / "model")).model
    assert mx.array_equal(result.model(tokens), same(tokens)), "the run's own model has what is stored"
    assert mx.allclose(theirs(tokens).astype(mx.float32), same(tokens), atol=0.05, rtol=0.05)
    base = load(config.model).model
    moved = [not mx.array_equal(a, b) for (_, a), (_, b) in zip(*map(flat, (same, base)), strict=True)]
    assert all(moved), "every array was trained"
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert answers[0]["base"] != answers[0]["tuned"], "the base was asked, not the tuned model twice"


def flat(model: nn.Module) -> list[tuple[str, mx.array]]:
    return tree_flatten(model.parameters())  # type: ignore[return-value]


def test_an_interrupted_run_ends_with_the_same_bytes(config: RunConfig) -> None:
    """Parameters, optimizer, the best model; dropout on."""
    config = replace(config, dropout=0.2, resume=True)
    uninterrupted = replace(config, output_dir=config.output_dir + "-whole")
    train(uninterrupted, quiet=True)
    assert interrupted(config, 3).interrupted
    train(config, quiet=True)
    assert same_bytes(arrays_of(config), arrays_of(uninterrupted))
    assert figures(config) == figures(uninterrupted)
    one, two = ((Path(each.output_dir) / "model" / "model.safetensors").read_bytes() for each in (config, uninterrupted))
    assert one == two


def test_a_quantised_base_is_written_out(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(
        model="embedded", data=str(small_data), output_dir=str(tmp_path / "run"), max_steps=2, batch_size=4, eval_every=1,
        learning_rate=1e-4, fine_tune_type="full", data_cache="off",
    )  # fmt: skip
    result = train(config)
    assert "the 4-bit weights of the base are written out for that: 13.1 MB instead of 2.1 MB" in capsys.readouterr().out
    kept = json.loads((result.output_dir / "model" / "config.json").read_text())
    assert "quantization" not in kept
    assert "quantization_config" not in kept
    assert kept["vocab_size"] == 2048
    for arguments, expected in (([], {"tuned", "base", "difference"}), (["--no-base"], {"tuned"})):
        target = tmp_path / f"evaluated{len(arguments)}"
        wanted = ["--run", str(result.output_dir), "--split", "valid", "--questions", "2", "--max-answer-tokens", "4"]
        assert evaluate([*wanted, "--output-dir", str(target), *arguments]) == 0
        report = json.loads((target / "evaluation_report.json").read_text())
        assert set(report["scores"]["token_f1"]) == expected
        assert report["loss"]["value"] == pytest.approx(result.summary["best"]["val_loss"], abs=0.05), "stored in float16"
        if len(expected) > 1:
            assert report["base_loss"]["value"] > report["loss"]["value"] + 0.1


def test_advice_is_about_what_was_trained() -> None:
    def validation(step: int, val: float, train: float) -> tuple[EvalReport, float]:
        return EvalReport(step, val, train, best=step == 10, stale=0), step / 10

    validations = [validation(10, 1.0, 0.9), validation(20, 1.5, 0.5), validation(30, 1.9, 0.2)]
    settings = {"lora.rank": 8, "lora.dropout": 0.0, "dropout": 0.0, "epochs": 3, "learning_rate": 1e-4}
    for kind, expected in (("full", {"dropout"}), ("lora", {"lora.dropout", "lora.rank"})):
        advice = advise(validations, validations[0], True, settings | {"fine_tune_type": kind}, 10**6, 1000)
        assert {each.setting for each in advice if "lora" in each.setting or "dropout" in each.setting} == expected


def test_weights_that_cant_be_dense_are_refused(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    loaded.model.lm_head.weight = mx.zeros((2048, 32), mx.uint8)
    with pytest.raises(ModelError, match=r"can't be written out as dense ones:\nlm_head.weight: uint8"):
        full.begin(loaded, FullConfig())


def test_a_model_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Delivered("model/model.safetensors", {"a": mx.ones(3)}, {"config.json": b"{}", "tokenizer.json": b"[]"})
    second = first._replace(arrays={"a": mx.zeros(3)})
    calls: list[str] = []
    plain = {name: getattr(os, name) for name in ("open", "rename", "replace")}

    def failing(name: str, at: int) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            calls.append(name)
            if len(calls) == at:
                raise OSError(28, "No space left on device")
            return plain[name](*given, **more)

        return call

    def told(what: Delivered, at: int) -> bool:
        calls.clear()
        with monkeypatch.context() as patched:
            for name in plain:
                patched.setattr(os, name, failing(name, at))
            try:
                run_folder.deliver(tmp_path, what)
            except OSError:
                return False
        return True

    at = 1
    while not told(first, at):
        there = tmp_path / "model"
        assert not there.exists() or sorted(each.name for each in there.iterdir()) == sorted(
            [*first.beside, "model.safetensors"]
        )
        shutil.rmtree(there, ignore_errors=True)
        at += 1
    assert at > 4
    assert run_folder.delivered(tmp_path) == tmp_path / first.file
    at = 1
    while not told(second, at):
        held = run_folder.load_delivered(tmp_path / first.file)["a"].sum().item()
        assert held in (0, 3)
        at += 1
    assert run_folder.load_delivered(tmp_path / first.file)["a"].sum().item() == 0
    assert not list(tmp_path.glob("model/.*"))
