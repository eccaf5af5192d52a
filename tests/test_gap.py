"""Losses with their errors, the gap between them, and what is made of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qlora import LoraConfig, RunConfig, attach_lora
from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.errors import RunFolderError
from mlx_qlora.look.advice import Advice
from mlx_qlora.look.gap import analyse, gap_facts, within_error
from mlx_qlora.look.history import read_history
from mlx_qlora.look.measure import Measured, mean_loss, measure
from mlx_qlora.model.trunk import Passage
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Batch, EvalReport, LossSum
from mlx_qlora.train import run
from tests.conftest import make_examples, randomize_adapters, tiny_model

SETTINGS = RunConfig().plain() | {"lora.dropout": 0.0, "lora.rank": 8, "early_stopping.patience": 0, "epochs": 3}


@pytest.mark.parametrize("shape", ["mistral", "gemma2", "qwen3"])
@pytest.mark.parametrize("kind", list(Kind))
def test_the_loss_of_each_example_is_the_one_it_has_alone(shape: str, kind: Kind) -> None:
    """Also of examples that share places, in a batch with others, or that are there twice."""
    model = tiny_model(shape)
    attach_lora(model, LoraConfig(rank=4, targets=("all-linear",)))
    randomize_adapters(model)
    examples = make_examples(9)
    begin = examples[0].tokens[:12].repeat(2)
    examples += [
        replace(examples[0], id=f"shared:{n}", tokens=np.append(begin, n).astype(np.int32), weights=np.ones(25, np.float32))
        for n in (5, 5, 7)
    ]
    # Its first place has the target 0, as places have that only fill up.
    examples.insert(0, replace(examples[0], id="zero", tokens=np.array([9, 0, 7], np.int32), weights=np.ones(3, np.float32)))
    if kind is Kind.PACKED and shape == "gemma2":
        pytest.skip("Gemma-2's attention is not one that packs")
    layout = Layout(kind, token_budget=64)
    found = measure(model, sft(passage=Passage(chunk=4)), lay_out(examples, layout), examples)

    for number, example in enumerate(examples):
        alone = mean_loss(model, sft(), lay_out([example], Layout(Kind.PLAIN)))
        weight = example.weights[1:].sum()
        assert found.totals[number] / weight == pytest.approx(alone, rel=2e-5)
        assert found.weights[number] == weight
    assert found.mean == pytest.approx(found.totals.sum() / found.weights.sum(), rel=1e-6)
    assert found.mean == pytest.approx(mean_loss(model, sft(), lay_out(examples, layout)), rel=1e-6)


def test_the_error_is_the_spread_over_samples() -> None:
    """Draw many samples of examples from a population: their means spread by the error that one of them says."""
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 30, 20_000).astype(float)
    totals = weights * (2 + 0.5 * rng.normal(size=20_000)) + rng.normal(size=20_000)

    def of(chosen: np.ndarray) -> Measured:
        from mlx_qlora.look.measure import standard_error

        t, w = totals[chosen], weights[chosen]
        return Measured(t.sum() / w.sum(), standard_error(t, w), t, w)

    samples = [of(rng.integers(0, 20_000, 95)) for _ in range(800)]
    spread = float(np.std([each.mean for each in samples]))
    assert np.mean([each.error for each in samples]) == pytest.approx(spread, rel=0.08)


def test_an_objective_that_does_not_tell_places_apart_has_no_error() -> None:
    model, examples = tiny_model("mistral"), make_examples(4)

    def objective(model: nn.Module, batch: Batch) -> LossSum:
        return LossSum(mx.array(6.0), mx.array(2.0))

    found = measure(model, objective, lay_out(examples, Layout()), examples)
    assert found.mean == 3.0
    assert math.isnan(found.error)


def validations(*pairs: tuple[float, float], error: float = 0.01) -> list[tuple[EvalReport, float]]:
    """Of (val_loss, train_eval_loss), a fourth of an epoch apart."""
    made, lowest = [], math.inf
    for number, (val, train) in enumerate(pairs, start=1):
        made.append((EvalReport(100 * number, val, train, val < lowest, 0, error, error), number / 4))
        lowest = min(lowest, val)
    return made


def test_overfitting_began_where_validation_was_best() -> None:
    found = analyse(validations((2.0, 1.9), (1.5, 1.3), (1.6, 0.9), (1.9, 0.4)), SETTINGS, 700_000, 8_000)
    assert (found.overfits_from_step, found.overfits_from_epoch) == (200, 0.5)
    assert found.rise == pytest.approx(0.4)
    assert (found.maximum, found.minimum, found.last) == (pytest.approx(1.5), pytest.approx(0.1), pytest.approx(1.5))
    assert found.at_best_se == pytest.approx(math.sqrt(2) * 0.01)
    assert found.trend == pytest.approx(1.88)  # (-1.5 * 0.1 - 0.5 * 0.2 + 0.5 * 0.7 + 1.5 * 1.5) / 5 * 4
    assert found.trend_is_clear
    told = "\n".join(line for _, lines in gap_facts(found) for line in lines)
    assert "overfits from update 200 (epoch 0.50)" in told
    assert [each.setting for each in found.advice] == ["early_stopping.patience", "lora.dropout", "lora.rank", "data"]
    assert "700,000 parameters are trained on 8,000 trained tokens" in told


@pytest.mark.parametrize(
    "course",
    [
        [(2.0, 1.9), (1.5, 1.4), (1.2, 1.1)],  # still falls
        [(2.0, 1.9), (1.5, 1.4), (1.505, 1.36)],  # wider by less than a grade
        [(2.0, 1.9), (1.5, 1.4), (1.7, 1.6)],  # both rise: that is no overfitting
        [(2.0, 1.9)],
    ],
)
def test_what_is_no_overfitting(course: list[tuple[float, float]]) -> None:
    found = analyse(validations(*course), SETTINGS, 1, 1000)
    assert found.overfits_from_step is None
    assert "early_stopping.patience" not in [each.setting for each in found.advice]


def test_a_trend_within_its_scatter_is_none() -> None:
    found = analyse(validations((2.0, 1.9), (1.9, 1.7), (1.8, 1.7), (1.7, 1.5), (1.6, 1.5)), SETTINGS)
    assert not found.trend_is_clear
    assert "neither growing nor shrinking" in "\n".join(dict(gap_facts(found))["gap"])


def test_a_run_that_ends_while_it_still_learns_is_told_to_go_on() -> None:
    course, why = validations((2.0, 1.9), (1.9, 1.8), (1.5, 1.4), (1.2, 1.1)), "validation still fell by 0.300 at the end"
    (found,) = analyse(course, SETTINGS | {"epochs": 1}).advice
    assert found == Advice("epochs", 1, 2, f"{why}, and the gap is not large")
    (found,) = analyse(course, SETTINGS | {"max_steps": 400}).advice
    assert found == Advice("max_steps", 400, 800, f"{why}, and the gap is not large")
    (found,) = analyse(course, SETTINGS | {"epochs": 1, "max_steps": 10_000}).advice
    assert found.setting == "epochs", "more updates than the epochs have are never made"


def test_a_run_that_is_not_at_its_end_is_not_told_how_to_end_later() -> None:
    course = validations((2.0, 1.9), (1.9, 1.8), (1.5, 1.4), (1.2, 1.1))
    assert analyse(course, SETTINGS).advice == []
    assert analyse(course, SETTINGS | {"max_steps": 500}).advice == []


def test_a_run_that_gets_worse_on_all_examples_is_told_to_go_slower() -> None:
    (found,) = analyse(validations((2.0, 1.9), (1.3, 1.2), (1.9, 1.8)), SETTINGS).advice
    assert (found.setting, found.was, found.to) == ("learning_rate", 1e-4, 5e-5)
    assert "known examples rose by 0.600 and that of new ones by 0.600" in found.why


def test_a_gap_smaller_than_its_error_is_called_so() -> None:
    unsure, sure = validations((1.0, 0.9), error=0.05)[0][0], validations((1.0, 0.9), error=0.02)[0][0]
    assert within_error(unsure)
    assert not within_error(sure)
    told = dict(gap_facts(analyse(validations((1.0, 0.9), error=0.05), SETTINGS)))
    assert told["gap"][0] == "+0.100 ± 0.139 at the best: good, and smaller than its own error"


def test_a_run_tells_the_same_from_its_folder(small_data: Path, tmp_path: Path) -> None:
    config = RunConfig(
        model="embedded", data=str(small_data), output_dir=str(tmp_path / "run"), epochs=2, batch_size=4, eval_every=2,
        learning_rate=5e-3, lora=LoraConfig(rank=4),
    )  # fmt: skip
    result = run(config, quiet=True)
    found = read_history(tmp_path / "run")
    assert found.gap is not None
    assert found.best is not None
    said = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert json.loads(json.dumps([each.__dict__ for each in found.gap.advice])) == said["gap"]["advice"]
    assert {name: getattr(found.gap, name) for name in said["gap"] if name != "advice"} == {
        name: value for name, value in said["gap"].items() if name != "advice"
    }
    assert said["gap"]["at_best_se"] > 0
    assert (found.step, found.planned_steps, found.settings["lora.rank"]) == (result.summary["steps"], 12, 4)
    assert found.best[0].step == said["best"]["step"]
    assert found.column("val_loss") == (
        [each.step for each, _ in found.validations],
        [e.val_loss for e, _ in found.validations],
    )


def test_updates_that_a_rollback_undid_are_left_out(tmp_path: Path) -> None:
    lines = [{"step": n, "loss": 1.0} for n in (1, 2, 3, 4)] + [{"step": n, "loss": 2.0, "rollbacks": 1} for n in (3, 4, 5)]
    (tmp_path / "training_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    found = read_history(tmp_path)
    assert found.column("loss") == ([1, 2, 3, 4, 5], [1.0, 1.0, 2.0, 2.0, 2.0])


def test_figures_that_are_not_finite_are_left_out_of_curves(tmp_path: Path) -> None:
    (tmp_path / "training_metrics.jsonl").write_text(
        '{"step": 1, "loss": "nan"}\n{"step": 2, "loss": 3}\n{"step": 3, "loss": null}\n'
    )
    assert read_history(tmp_path).column("loss") == ([2], [3.0])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run was begun in it"):
        read_history(tmp_path)
    with pytest.raises(RunFolderError, match="there is nothing"):
        read_history(tmp_path / "none")
