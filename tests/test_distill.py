"""Distillation: the divergences against their plain twins, and against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora import ChainConfig, LoraConfig, RunConfig, train
from mlx_qlora.commands import main
from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.errors import ConfigError, MlxQloraError, NonFiniteError, ResumeError
from mlx_qlora.look.history import read_history
from mlx_qlora.look.pages.report import cards
from mlx_qlora.model.trunk import Passage, supervised_logits
from mlx_qlora.objectives import divergence
from mlx_qlora.objectives.distill import DistillConfig, distil
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Batch, LossSum
from mlx_qlora.run.metrics import MEASURED, read_metrics
from tests.conftest import in_rows, tiny_model
from tests.test_layouts import LAYOUTS, assert_same, family, through, trainable
from tests.test_resume import adapters, interrupted

KINDS = ["forward_kl", "reverse_kl", "js"]


def plain_divergence(kind: str, z: mx.array, t: mx.array, temperature: float, beta: float = 0.5) -> mx.array:
    """The twin: textbook formulas, for autograd. [S, C] log-probabilities may be given as logits."""
    log_p, log_q = (each - mx.logsumexp(each, axis=-1, keepdims=True) for each in (t / temperature, z / temperature))
    p, q = mx.exp(log_p), mx.exp(log_q)
    if kind == "forward_kl":
        return (p * (log_p - log_q)).sum(axis=-1)
    if kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(axis=-1)
    log_m = mx.log(beta * p + (1 - beta) * q)
    return beta * (p * (log_p - log_m)).sum(axis=-1) + (1 - beta) * (q * (log_q - log_m)).sum(axis=-1)


def pair(places: int = 7, vocabulary: int = 23, seed: int = 0) -> tuple[mx.array, mx.array]:
    mx.random.seed(seed)
    return mx.random.normal((places, vocabulary)) * 3, mx.random.normal((places, vocabulary)) * 3


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_formulas(kind: Any, temperature: float) -> None:
    student, teacher = pair()
    for beta in (0.5, 0.2) if kind == "js" else (0.5,):
        value, gradient = divergence.of_all(kind, student, teacher, mx.array(temperature), beta)
        twin = mx.grad(lambda z: plain_divergence(kind, z, teacher, temperature, beta).sum())(student)  # noqa: B023
        assert np.allclose(value, plain_divergence(kind, student, teacher, temperature, beta), rtol=1e-5, atol=1e-6)
        assert np.allclose(gradient, twin, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_t_squared_keeps_the_gradient_s_size_by_finite_differences(temperature: float) -> None:
    """In float64, by differences of T^2 x KL; and warm, it comes to how far the logits are apart."""
    student, teacher = (np.array(each[0], np.float64) for each in pair())

    def value(z: Any) -> float:
        log_p, log_q = (each - np.log(np.exp(each).sum()) for each in (teacher / temperature, z / temperature))
        return float(temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum())

    steps = 1e-5 * np.eye(len(student))
    differences = [(value(student + step) - value(student - step)) / 2e-5 for step in steps]
    given = [mx.array(each[None].astype(np.float32)) for each in (student, teacher)]
    gradient = divergence.of_all("forward_kl", *given, mx.array(temperature))[1]
    assert np.allclose(np.array(gradient)[0] * temperature**2, differences, atol=5e-6)
    warm = divergence.of_all("forward_kl", *given, mx.array(1e3))[1] * 1e6
    apart = ((student - student.mean()) - (teacher - teacher.mean())) / len(student)
    assert np.allclose(np.array(warm)[0], apart, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_is_one_more_class(kind: Any) -> None:
    """Against the formulas on probabilities that are added up by hand."""
    student, teacher = pair()
    temperature, k = 1.5, 5
    classes = divergence.largest(teacher, k, mx.array(temperature))
    assert np.array_equal(np.sort(classes.ids), np.sort(np.argsort(-np.array(teacher), axis=-1)[:, :k]))

    def merged(logits: mx.array) -> mx.array:
        q = mx.softmax(logits / temperature, axis=-1)
        own = mx.take_along_axis(q, classes.ids, axis=-1)
        return mx.log(mx.concatenate([own, 1 - own.sum(axis=-1, keepdims=True)], axis=-1))

    def twin(z: mx.array) -> mx.array:
        return plain_divergence(kind, merged(z), merged(teacher), 1.0)

    value, gradient = divergence.of_classes(kind, student, classes, mx.array(temperature))
    assert np.allclose(value, twin(student), rtol=2e-5)
    assert np.allclose(gradient, mx.grad(lambda z: twin(z).sum())(student), atol=5e-6)


def test_top_k_and_rest_by_hand() -> None:
    """Teacher 1/2, 1/4, 1/8, 1/8; student 1/4 everywhere; two classes and the rest: 1/2, 1/4, 1/4 against 1/4, 1/4, 1/2."""
    teacher = mx.log(mx.array([[0.5, 0.25, 0.125, 0.125]]))
    student = mx.zeros((1, 4))
    classes = divergence.largest(teacher, 2, mx.array(1.0))
    value, gradient = divergence.of_classes("forward_kl", student, classes, mx.array(1.0))
    assert value.item() == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(1) + 0.25 * np.log(0.5), abs=1e-6)
    # q - p for those that are told apart; q * (1 - p_rest / q_rest) for the two of the rest.
    assert np.allclose(gradient, [[-0.25, 0.0, 0.125, 0.125]], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_classes_told_apart_are_the_whole(kind: Any) -> None:
    student, teacher = pair()
    whole = divergence.of_all(kind, student, teacher, mx.array(2.0))
    classes = divergence.largest(teacher, 23, mx.array(2.0))
    assert np.isneginf(np.array(classes.rest)).all()
    for a, b in zip(divergence.of_classes(kind, student, classes, mx.array(2.0)), whole, strict=True):
        assert np.allclose(a, b, atol=2e-6)


def test_samples_estimate_without_bias() -> None:
    """The mean over all tokens, each as often as the teacher says it, is the divergence itself."""
    student, teacher = pair(places=1, vocabulary=6)
    log_p = teacher - mx.logsumexp(teacher, axis=-1, keepdims=True)
    value, gradient = divergence.of_all("forward_kl", student, teacher, mx.array(1.0))
    each = [divergence.of_samples(student, mx.array([[n]]), log_p[:, n : n + 1]) for n in range(6)]
    p = np.exp(np.array(log_p))[0]
    assert sum(p[n] * each[n][0].item() for n in range(6)) == pytest.approx(value.item(), rel=1e-5)
    assert np.allclose(sum(p[n] * np.array(each[n][1]) for n in range(6)), gradient, atol=1e-6)
    twice = divergence.of_samples(student, mx.array([[2, 2, 4]]), mx.take(log_p, mx.array([2, 2, 4]), axis=-1))
    assert np.allclose(twice[1], (2 * np.array(each[2][1]) + np.array(each[4][1])) / 3, atol=1e-6)


def test_clipping_holds_the_gradient_back_and_says_where() -> None:
    logits, moves, bit = divergence.clipped(mx.array([[60.0, -51.0, 50.0, 1.0], [0.0, 1.0, 2.0, 3.0]]), 50.0)
    assert logits.tolist()[0] == [50.0, -50.0, 50.0, 1.0]
    assert moves.tolist()[0] == [0.0, 0.0, 1.0, 1.0]
    assert bit.tolist() == [True, False]
    assert not divergence.clipped(mx.array([[60.0]]), 0.0)[2].any()


# The objective


def told(batches: tuple[Batch, ...], temperature: float, alpha: float) -> tuple[Batch, ...]:
    return tuple(batch._replace(beside=(mx.array(temperature), mx.array(alpha))) for batch in batches)


def teacher_of(shape: str, **more: Any) -> nn.Module:
    model = tiny_model(shape, seed=9, **more)
    model.freeze()
    return model


def plainly(student: nn.Module, teacher: nn.Module, batch: Batch, kind: str, temperature: float, alpha: float) -> Any:
    """The twin: all logits at once, by autograd."""

    def loss(model: nn.Module, batch: Batch) -> LossSum:
        logits = supervised_logits(model, batch).astype(mx.float32)
        said = mx.stop_gradient(supervised_logits(teacher, batch).astype(mx.float32))
        common = min(logits.shape[-1], said.shape[-1])
        far = plain_divergence(kind, logits[:, :common], said[:, :common], temperature)
        ce = nn.losses.cross_entropy(logits, batch.targets)
        total = (batch.weights * (alpha * temperature**2 * far + (1 - alpha) * ce)).sum()
        return LossSum(total, batch.weights.sum())

    return through(student, (batch,), objective=loss)


UNEQUAL = {"one by one": in_rows(1), "two by two": in_rows(2)}  # batches with few and with many supervised tokens


@pytest.mark.parametrize("layout", [*LAYOUTS, *UNEQUAL])
@pytest.mark.parametrize("shape", ["mistral", "mistral-tied", "qwen2", "gemma3"])
def test_live_in_chunks_is_the_plain_loss_with_all_gradients(shape: str, layout: str) -> None:
    student, teacher = trainable(shape, dropout=0.3), teacher_of(shape, quantized=False)
    batches = told(lay_out(family(), (LAYOUTS | UNEQUAL)[layout]), 1.5, 0.4)
    (plain,) = lay_out(family(), Layout(Kind.PLAIN, rows=99))
    expected = plainly(student, teacher, plain, "forward_kl", 1.5, 0.4)
    objective = distil(DistillConfig(teacher="x"), 96, teacher, passage=Passage(chunk=8))
    assert_same(through(student, batches, objective=objective), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence_through_a_model(kind: Any) -> None:
    student, teacher = trainable("mistral"), teacher_of("qwen2")
    batch = told(lay_out(family(), LAYOUTS["packed"]), 2.0, 1.0)
    expected = plainly(student, teacher, batch[0], kind, 2.0, 1.0)
    objective = distil(DistillConfig(teacher="x", loss=kind), 96, teacher, passage=Passage(chunk=8, checkpoint=True))
    assert_same(through(student, batch, objective=objective), expected, 1e-4)


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    student = trainable("mistral")
    student.freeze()
    student.apply_to_modules(lambda _, m: m.unfreeze(keys=["lora_a", "lora_b"], strict=False) if "lora_a" in m else None)
    teacher = trainable("mistral")
    teacher.eval()
    for kind in KINDS:
        objective = distil(DistillConfig(teacher="x", loss=kind), 96, teacher)  # type: ignore[arg-type]
        (loss, gradient) = through(student, told(lay_out(family(), LAYOUTS["packed"]), 1.5, 1.0), objective=objective)
        assert abs(loss.total.item() / loss.weight.item()) < 1e-6
        largest = max(np.abs(np.array(each)).max() for _, each in tree_flatten(gradient))
        assert largest < 1e-7


def test_alpha_nothing_is_supervised_fine_tuning_to_the_bit() -> None:
    student, teacher = trainable("mistral", dropout=0.2), teacher_of("mistral")
    batches = lay_out(family(), LAYOUTS["packed"])
    plain_loss, plain = through(student, batches, objective=sft(label_smoothing=0.1))
    loss, gradient = through(student, told(batches, 2.0, 0.0), objective=distil(DistillConfig(), 96, teacher, 0.1))
    assert loss.total.item() == plain_loss.total.item()
    assert_same((loss, gradient), (plain_loss, plain), 1e-7)


# Whole runs


def run_of(small_data: Path, folder: Path, **settings: Any) -> RunConfig:
    """6 updates: three epochs of 16 and 6 examples."""
    return RunConfig(
        model="embedded", data=str(small_data), output_dir=str(folder), epochs=3, batch_size=16, eval_every=3,
        learning_rate=2e-3, lora=LoraConfig(rank=2, scale=4.0), distill=DistillConfig(**({"teacher": "embedded"} | settings)),
    )  # fmt: skip


def lines_of(config: RunConfig) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(Path(config.output_dir))]


def test_schedules_go_over_epochs_and_the_first_loss_is_cross_entropy_alone(small_data: Path, tmp_path: Path) -> None:
    """The teacher is the base of the student, so that the divergence begins at nothing."""
    config = run_of(small_data, tmp_path / "run", temperature=(2.0, 1.5, 1.0), alpha=(0.5, 0.4, 0.3))
    result = train(config, quiet=True)
    lines = lines_of(config)
    assert [line["temperature"] for line in lines] == pytest.approx([2.0, 2.0, 1.5, 1.5, 1.0, 1.0])
    assert [line["alpha"] for line in lines] == pytest.approx([0.5, 0.5, 0.4, 0.4, 0.3, 0.3])
    assert abs(lines[0]["kd"]) < 1e-6
    assert lines[0]["loss"] == pytest.approx(0.5 * lines[0]["ce"], rel=1e-5)
    for line in lines[1:]:
        share = line["alpha"] * line["temperature"] ** 2
        assert line["loss"] == pytest.approx(share * line["kd"] + (1 - line["alpha"]) * line["ce"], rel=1e-5)
    assert lines[-1]["kd"] > 0
    assert result.summary["teaching"]["kd_last"] > result.summary["teaching"]["kd_first"]
    told = read_history(tmp_path / "run")
    assert told.column(told.trained_loss)[1] == pytest.approx([line["ce"] for line in lines]), "what curves show as training"
    assert "from the teacher" in cards(told)
    plain = replace(config, output_dir=str(tmp_path / "plain"), distill=DistillConfig())
    train(plain, quiet=True)
    assert lines_of(plain)[2]["val_loss"] == pytest.approx(lines[2]["val_loss"], rel=0.2), "of the same kind"


def test_a_run_with_a_teacher_goes_on_to_the_same_bytes(small_data: Path, tmp_path: Path) -> None:
    whole = run_of(small_data, tmp_path / "whole", temperature=(2.0, 1.0), schedule="linear")
    train(whole, quiet=True)
    again = replace(whole, output_dir=str(tmp_path / "again"), resume=True)
    interrupted(again, 2)
    interrupted(again, 5)
    train(again, quiet=True)
    assert adapters(again) == adapters(whole)
    assert lines_of(again) == lines_of(whole)


def test_another_teacher_under_the_same_name_is_noticed(small_data: Path, tmp_path: Path) -> None:
    other = run_of(small_data, tmp_path / "other")
    train(replace(other, max_steps=2, distill=DistillConfig()), quiet=True)
    taught = run_of(small_data, tmp_path / "taught", teacher_adapters=str(tmp_path / "other" / "adapters"))
    interrupted(taught, 1)
    train(replace(other, max_steps=3, distill=DistillConfig(), overwrite=True), quiet=True)
    with pytest.raises(ResumeError, match="the teacher is another one"):
        train(replace(taught, resume=True), quiet=True)
    train(replace(taught, resume=True, resume_anyway=True), quiet=True)


def test_a_cache_teaches_what_the_teacher_would(small_data: Path, tmp_path: Path) -> None:
    """Live and cached: the same classes, kept in float16; and compiled, in padded rows, too."""
    live = run_of(small_data, tmp_path / "live", estimate="top_k", top_k=24, temperature=(1.5, 1.0))
    train(live, quiet=True)
    cached = replace(live, output_dir=str(tmp_path / "cached"), distill=replace(live.distill, cache=str(tmp_path / "kept")))
    assert main(["distill", "cache", "--config", as_file(cached, tmp_path)]) == 0
    train(replace(cached, distill=replace(cached.distill, teacher="")), quiet=True)
    padded = replace(cached, output_dir=str(tmp_path / "padded"), compile="on", layout="padded")
    train(padded, quiet=True)
    wanted = lines_of(live)
    for config in (cached, padded):
        got = lines_of(config)
        for name in ("loss", "kd", "ce"):
            assert [line[name] for line in got] == pytest.approx([line[name] for line in wanted], rel=2e-3, abs=1e-3)
    assert max(line["kd"] for line in wanted) > 0.02, "more than that tolerance"


def as_file(config: RunConfig, folder: Path) -> str:
    (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return str(folder / "run.yaml")


UNSTABLE = DistillConfig(teacher="embedded", temperature=(5.0, 3.0, 1.0), alpha=(0.7, 0.5, 0.3), logit_clip=100.0)


def test_the_settings_that_went_non_finite_are_survived_and_doubted(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_of(small_data, tmp_path / "run")
    result = train(replace(config, distill=UNSTABLE, clip_grad_norm=1.0, batch_size=1, max_steps=12, eval_every=12))
    said = capsys.readouterr().out
    for what in (
        "distill.temperature up to 5, which counts the divergence 25 times (try 2)", "distill.alpha up to 0.7 (try 0.5)",
        "distill.logit_clip 100 (try 50)", "clip_grad_norm 1 (try 0.5)", "min_supervised_per_update 0 (try 8)",
    ):  # fmt: skip
        assert what in said
    assert (result.summary["steps"], result.summary["skipped_updates"]) == (12, 0)
    assert "divergence" in said[said.index("\nended") :]


def test_where_they_do_go_non_finite_updates_are_counted_and_the_way_out_is_said(small_data: Path, tmp_path: Path) -> None:
    """A learning rate that drives the student's own logits to infinity."""
    config = run_of(small_data, tmp_path / "run")
    config = replace(config, distill=UNSTABLE, clip_grad_norm=0.0, learning_rate=1e18, batch_size=2, max_skipped_updates=2)
    with pytest.raises(NonFiniteError, match=r"distill\.temperature up to 5, .*try 2.*clip_grad_norm 0 \(try 0.5\)"):
        train(config, quiet=True)
    last = lines_of(config)[-1]
    assert last["skipped_updates"] > 0
    assert (last["loss"], last["kd"]) == ("nan", "nan")


WITHOUT_SENSE = [
    ({"alpha": (0.3,)}, "distill.alpha: (0.3,) came, and there is no teacher"),
    ({"teacher": "embedded", "loss": "uld"}, "distill.loss: uld came, which goes by a cache only"),
    ({"teacher": "embedded", "estimate": "sampled"}, "distill.estimate: sampled came, which goes by a cache only"),
    ({"teacher": "embedded", "js_weight": 0.3}, "distill.js_weight: 0.3 came, which nothing reads"),
    ({"teacher": "embedded", "top_k": 8}, "distill.top_k: 8 came, which nothing reads"),
    ({"cache": "nowhere", "estimate": "sampled"}, "an estimate of forward_kl at temperature 1 only"),
    ({"teacher": "no/such/folder"}, "distill.teacher: no/such/folder"),
]


@pytest.mark.parametrize(("settings", "said"), WITHOUT_SENSE)
def test_settings_without_sense(settings: dict[str, Any], said: str, small_data: Path, tmp_path: Path) -> None:
    config = replace(run_of(small_data, tmp_path / "run"), distill=DistillConfig(**settings))
    with pytest.raises(MlxQloraError) as raised:
        train(config, quiet=True)
    assert said in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_chain_s_settings_without_a_chain_are_refused(small_data: Path, tmp_path: Path) -> None:
    config = replace(run_of(small_data, tmp_path / "run"), chain=ChainConfig(cue="=>"))
    with pytest.raises(ConfigError, match=r"chain\.cue: '=>' came without chain\.kind"):
        train(config, quiet=True)


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(ConfigError) as raised:
        DistillConfig(temperature=(2.0, 0.0), alpha=(1.5,), js_weight=1.0, top_k=0, logit_clip=-1.0)
    for name in ("temperature", "alpha", "js_weight", "top_k", "logit_clip"):
        assert f"distill.{name}: " in str(raised.value)


def test_the_verb_is_calmer_than_train(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "embedded", "--data", str(small_data), "--output-dir", str(tmp_path / "run"), "--max-steps", "1"]
    assert main(["distill", "--distill.teacher", "embedded", *flags]) == 0
    kept = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "clip_grad_norm: 0.5\n" in kept
    assert "min_supervised_per_update: 8\n" in kept
    assert "WARNING: distillations" not in capsys.readouterr().out
    assert main(["distill", "cahce"]) == 2
    assert "'cahce' came, one of cache, grow" in capsys.readouterr().err


def test_schedules_of_a_stream_go_over_what_was_read_and_over_the_updates(small_data: Path, tmp_path: Path) -> None:
    """A stream's epochs have no known length; each pass over it has the number of an epoch, and the last update the last."""
    config = replace(
        run_of(small_data, tmp_path / "run", temperature=(2.0, 1.5, 1.0)), streaming=True, max_steps=5, batch_size=11
    )
    train(config, quiet=True)
    lines = [line for line in lines_of(config) if "kd" in line]
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1, 2]
    assert [line["temperature"] for line in lines] == pytest.approx([2.0, 2.0, 1.5, 1.5, 1.0])
    linear = DistillConfig(teacher="embedded", temperature=(2.0, 1.0), alpha=(0.5,), schedule="linear")
    config = replace(config, output_dir=str(tmp_path / "linear"), distill=linear)
    train(config, quiet=True)
    found = [line["temperature"] for line in lines_of(config) if "kd" in line]
    assert found == pytest.approx([linear.at(0, step / 5)[0] for step in (1, 2, 3, 4, 5)])
    assert found[-1] == pytest.approx(1.0)
