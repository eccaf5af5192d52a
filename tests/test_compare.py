"""Runs side by side: the statistics against known truth, verdicts for made-up runs, and the command on real ones."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mlx_qlora import LoraConfig, RunConfig
from mlx_qlora.commands import main
from mlx_qlora.config import flat
from mlx_qlora.errors import ConfigError, RunFolderError
from mlx_qlora.look.comparison import statistics
from mlx_qlora.look.comparison.answers import EVALUATED, Answers, how_many, read_answers
from mlx_qlora.look.comparison.compare import Comparison, compare, of_runs
from mlx_qlora.look.comparison.contender import Run
from mlx_qlora.look.comparison.notes import rounded
from mlx_qlora.look.comparison.sheet import shortened
from mlx_qlora.look.evaluation.enough import questions_needed
from mlx_qlora.look.history import AROUND, History
from mlx_qlora.run.checkpoint import CheckpointConfig

# Statistics


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (10, 2.22814), (29, 2.04523), (100, 1.98397), (1e7, 1.959964)],
)
def test_students_t_as_the_tables_have_it(degrees: float, quantile: float) -> None:
    assert statistics.t_quantile(0.975, degrees) == pytest.approx(quantile, rel=3e-6)
    assert statistics.t_tails(quantile, degrees) == pytest.approx(0.05, rel=1e-5)
    between = [statistics.t_quantile(0.975, degrees + share) for share in (0, 0.5, 1)]
    assert between == pytest.approx(sorted(between, reverse=True), rel=1e-9)


@pytest.mark.parametrize(("right", "wrong"), [(1, 0), (5, 1), (9, 3), (20, 9), (30, 30)])
def test_flipping_signs_of_right_and_wrong_is_mcnemars_exact_test(right: int, wrong: int) -> None:
    """Which is the binomial test of those questions that only one of both has right."""
    number, more = right + wrong, max(right, wrong)
    exact = min(1.0, 2 * sum(math.comb(number, k) for k in range(more, number + 1)) / 2**number)
    differences = np.array([1.0] * right + [-1.0] * wrong + [0.0] * 7)
    assert statistics.sign_flips(differences) == pytest.approx(exact, rel=1e-12)


def test_signs_drawn_by_chance_come_to_the_same_as_all_of_them() -> None:
    differences = np.random.default_rng(3).normal(0.4, 1.0, 15)
    sums = np.array([np.dot(signs, differences) for signs in product((1, -1), repeat=15)])
    every = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-9)
    assert statistics.sign_flips(differences) == pytest.approx(every, abs=0.012)


def test_false_alarms_of_the_paired_test_are_one_in_twenty() -> None:
    rng = np.random.default_rng(0)
    ps = [statistics.sign_flips(rng.exponential(1, 11) * rng.choice([-1, 1], 11)) for _ in range(800)]
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=0.02)


def test_the_interval_of_a_paired_difference_holds_the_truth_95_times_in_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_DRAWS", 2_000)
    rng = np.random.default_rng(1)
    found = [statistics.bootstrap(0.1 + rng.normal(0, 0.3, 12)) for _ in range(400)]
    assert np.mean([low <= 0.1 <= high for low, high in found]) == pytest.approx(0.95, abs=0.03)


def test_intervals_over_seeds_hold_the_truth_and_welch_rarely_cries_wolf() -> None:
    """Also where the two sides spread unequally, and where one side is a single seed."""
    rng = np.random.default_rng(2)
    hits = [abs(found.value) <= found.half for found in (statistics.mean(rng.normal(size=3)) for _ in range(1500))]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)
    for first, second, spread in ((4, 5, 3.0), (3, 3, 1.0), (1, 4, 1.0)):
        found = [
            statistics.difference_of_means(rng.normal(0, 1, first).tolist(), rng.normal(0, spread, second).tolist())
            for _ in range(1200)
        ]
        assert np.mean([each.p < 0.05 for each in found]) == pytest.approx(0.047, abs=0.022)
        assert all((each.p < 0.05) == (abs(each.value) > each.half) for each in found)


def test_of_many_values_the_normal_distribution_says_what_drawing_says(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(0.02, 0.3, 1_000)
    drawn, p = statistics.bootstrap(values), statistics.sign_flips(values)
    monkeypatch.setattr(statistics, "_MANY", 10)
    assert statistics.bootstrap(values) == pytest.approx(drawn, abs=0.001)
    assert statistics.sign_flips(values) == pytest.approx(p, abs=0.01)


def test_values_that_are_all_the_same_have_no_interval_by_drawing() -> None:
    found = statistics.paired([0.0] * 9)
    assert (found.value, found.p, math.isnan(found.low)) == (0.0, 1.0, True)


# Runs that are made up


def make_run(
    folder: Path,
    course: list[tuple[float, float]] | None = None,  # val_loss, train_eval_loss of its validations
    scores: list[float] | None = None,
    error: float = 0.03,
    summary: dict[str, Any] | None = None,
    digest: str = "same",
    **settings: Any,
) -> Path:
    folder.mkdir(parents=True)
    config = flat(RunConfig(model="embedded", data="data", output_dir=str(folder)).plain()) | settings
    nested = {name: value for name, value in config.items() if "." not in name}
    for name, value in config.items():
        if "." in name:
            nested.setdefault(name.split(".")[0], {})[name.split(".")[1]] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(nested))
    lines = []
    for step, (val, train) in enumerate([(2.0, 1.9), (1.0, 0.95)] if course is None else course, 1):
        validated = {"val_loss": val, "train_eval_loss": train, "val_loss_se": error, "train_eval_loss_se": error}
        line = {"step": step, "epoch": step / 4, "loss": val, "tokens": 100, "tokens_per_second": 50.0, "elapsed_s": 2.0 * step}
        lines.append(line | {"peak_memory_gb": 0.5} | (validated if val else {}))
    (folder / "training_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    size = {"rows": 95, "examples": 95, "tokens": 999, "supervised_tokens": 900, "longest": 20}
    sizes = {"train": size | {"digest": "train"}, "valid": size | {"digest": digest}}
    (folder / "data_account.json").write_text(json.dumps({"sizes": sizes, "supervised_tokens": 900}))
    ended = {"ended": "finished", "steps": len(lines), "tokens": 100 * len(lines), "elapsed_s": 4.0, "device": "CPU"}
    ended |= {"tokens_per_second": 50.0, "peak_memory_gb": 0.5}
    (folder / "training_summary.json").write_text(json.dumps(ended | (summary or {})))
    if scores is not None:
        write_answers(folder, scores)
    return folder


def write_answers(folder: Path, scores: list[float], first: int = 1) -> None:
    answers = [
        {"id": f"valid.jsonl:{n}", "question": f"Quem {n}?", "expected": "Ana", "answer": "Ana", "scores": {"token_f1": score}}
        for n, score in enumerate(scores, first)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))


WORSE, BETTER = [0.2, 0.5, 0.4, 0.6] * 6, [0.9, 0.5, 1.0, 0.8] * 6


def pair(place: Path, first: dict[str, Any], second: dict[str, Any]) -> Comparison:
    return compare([make_run(place / "v1", **first), make_run(place / "v2", **second)])


def test_a_clear_win(tmp_path: Path) -> None:
    found = pair(
        tmp_path,
        {"course": [(1.6, 1.5), (1.34, 0.9)], "scores": WORSE, "learning_rate": 1e-3},
        {"course": [(1.5, 1.4), (0.91, 0.83)], "scores": BETTER, "learning_rate": 2e-3},
    )
    (judged,) = found.judgements
    answers = judged.scores["token_f1"]
    by_t = statistics.mean([b - a for a, b in zip(WORSE, BETTER, strict=True)])
    assert (answers.low, answers.high) == (pytest.approx(by_t.low, abs=0.01), pytest.approx(by_t.high, abs=0.01))
    assert found.verdict == (
        "v2 is better than v1: val_loss 0.910 against 1.340 (difference -0.430, 95 % interval -0.514 to -0.346), "
        "token F1 0.800 against 0.425 on the same 24 questions (difference +0.375, 95 % interval "
        f"{answers.low:+.3f} to {answers.high:+.3f}, p < 0.001); "
        "its gap is good (+0.080) where that of v1 is critical (+0.440)."
    )
    assert (judged.by_loss, judged.by_score("token_f1")) == (1, 1)
    assert [row.key for row in found.rows if row.section == "settings"] == ["learning_rate"]
    assert any("one seed each" in note for note in found.notes)


def test_the_baseline_turns_the_sentence_round(tmp_path: Path) -> None:
    pair(tmp_path, {"course": [(1.34, 1.3)]}, {"course": [(0.91, 0.83)]})
    found = compare([tmp_path / "v1", tmp_path / "v2"], baseline="v2")
    assert found.verdict.startswith("v1 is worse than v2: val_loss 1.340 against 0.910 (difference +0.430")
    assert compare([tmp_path / "v1", tmp_path / "v2"], baseline=str(tmp_path / "v2")).verdict == found.verdict


def test_a_difference_within_the_noise_is_called_so(tmp_path: Path) -> None:
    found = pair(
        tmp_path,
        {"course": [(1.00, 0.9)], "scores": [0.5, 0.6, 0.4, 0.9] * 5},
        {"course": [(0.95, 0.9)], "scores": [0.6, 0.5, 0.5, 0.8] * 5},
    )
    assert found.verdict.startswith("No difference between v2 and v1 is larger than its error: val_loss 0.950 against 1.000")
    assert "(difference +0.000, 95 % interval -0.0" in found.verdict
    assert "p = 1.00)" in found.verdict


def test_loss_and_answers_that_disagree(tmp_path: Path) -> None:
    found = pair(tmp_path, {"course": [(1.3, 1.2)], "scores": BETTER}, {"course": [(0.9, 0.8)], "scores": WORSE})
    assert found.verdict.startswith("Loss and answers disagree: v2 has the better val_loss 0.900 against 1.300")
    assert ", v1 the better token F1 0.425 against 0.800" in found.verdict


def test_answers_tell_apart_what_losses_do_not(tmp_path: Path) -> None:
    found = pair(tmp_path, {"scores": WORSE}, {"scores": BETTER})
    assert found.verdict.startswith("v2 is better than v1 by token F1 0.800 against 0.425 on the same 24 questions")
    assert "but the difference in val_loss 1.000 against 1.000" in found.verdict


def test_losses_of_other_data_are_not_compared(tmp_path: Path) -> None:
    found = pair(tmp_path, {"course": [(1.3, 1.2)], "scores": WORSE}, {"course": [(0.9, 0.8)], "scores": BETTER, "digest": "x"})
    assert found.judgements[0].loss is None
    assert found.notes[0].startswith("VALIDATION LOSSES OF v2 AND v1 CAN'T BE COMPARED: they were validated on other examples")
    assert found.verdict.startswith("v2 is better than v1: token F1")
    assert "val_loss" not in found.verdict


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing 0.0 and 0.1 make other losses"),
        ({"digest": "", "model": "other/model"}, "the models are others (embedded and other/model)"),
    ],
)
def test_what_else_forbids_comparing_losses(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    found = pair(tmp_path, {}, settings)
    assert reason in found.verdict
    assert found.verdict.startswith("v2 and v1 can't be judged against each other: ")
    assert "not comparable" in found.table()


def test_another_model_on_the_same_tokens_is_compared(tmp_path: Path) -> None:
    found = pair(tmp_path, {}, {"course": [(0.5, 0.4)], "model": "other/model"})
    assert found.verdict.startswith("v2 is better than v1: val_loss 0.500 against 1.000")


def test_without_validation_or_answers_nothing_is_judged(tmp_path: Path) -> None:
    found = pair(tmp_path, {"course": [(0, 0)]}, {"course": [("nan", "nan")]})
    assert found.verdict.startswith("v2 and v1 can't be judged against each other: v1 and v2 have no validation")
    assert "v1 has not been validated" in found.notes
    assert "v2: none of its validation losses is a finite number" in found.notes


def test_questions_that_are_not_the_same_are_not_paired(tmp_path: Path) -> None:
    make_run(tmp_path / "v1", scores=WORSE)
    make_run(tmp_path / "v2", scores=BETTER)
    write_answers(tmp_path / "v2", BETTER, first=11)
    found = compare([tmp_path / "v1", tmp_path / "v2"])
    assert found.judgements[0].questions == 14
    assert "on the same 14 questions" in found.verdict
    write_answers(tmp_path / "v2", BETTER, first=100)
    found = compare([tmp_path / "v1", tmp_path / "v2"])
    assert any("answered no question in common (such as valid.jsonl:100 and valid.jsonl:1)" in note for note in found.notes)
    assert "token F1" not in found.verdict


def test_evaluated_losses_are_compared_example_by_example(tmp_path: Path) -> None:
    """What makes an example hard for both runs is then no doubt about their difference; other tokens are other examples."""
    rng = np.random.default_rng(0)
    hard, weights = rng.normal(1.5, 0.6, 40), rng.integers(3, 20, 40)
    for name, better in (("v1", 0.0), ("v2", 0.1)):
        folder = make_run(tmp_path / name, [(1.5 - better, 1.4)], error=0.1, label_smoothing=better)
        losses = hard - better + rng.normal(0, 0.05, 40)
        lines = [{"id": str(n), "weight": int(w), "loss": x} for n, (w, x) in enumerate(zip(weights, losses, strict=True))]
        (folder / "evaluation_losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare([tmp_path / "v1", tmp_path / "v2"])
    (judged,) = found.judgements
    assert judged.val_loss is None, "another label_smoothing; evaluate has none"
    assert judged.evaluated is not None
    assert judged.evaluated.half == pytest.approx(1.96 * math.sqrt(2 / 40) * 0.05, rel=0.3)
    assert "v2 is better than v1: evaluated loss" in found.verdict
    assert "on the same 40 examples" in found.verdict
    lines[3]["digest"] = "another"  # such as those of another valid.jsonl, whose answers are as long
    (folder / "evaluation_losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare([tmp_path / "v1", tmp_path / "v2"]).judgements[0].evaluated is None
    del lines[3]["digest"]
    lines[3]["weight"] += 1
    (folder / "evaluation_losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare([tmp_path / "v1", tmp_path / "v2"]).judgements[0].evaluated is None


def test_runs_whose_evaluated_losses_are_the_same_do_not_differ(tmp_path: Path) -> None:
    lines = [{"id": str(n), "digest": str(n), "weight": 3, "loss": 1.0 + n} for n in range(5)]
    for name in ("v1", "v2"):
        folder = make_run(tmp_path / name, [(1.5, 1.4)], error=0.1)
        (folder / "evaluation_losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare([tmp_path / "v1", tmp_path / "v2"])
    assert found.verdict.startswith(
        "No difference between v2 and v1 is larger than its error: evaluated loss 3.000 against 3.000"
    )


def test_a_score_counts_the_questions_that_have_it(tmp_path: Path) -> None:
    make_run(tmp_path / "v1", scores=[*WORSE, math.nan, 0.1])
    make_run(tmp_path / "v2", scores=[*BETTER, 0.7, math.nan])
    found = compare([tmp_path / "v1", tmp_path / "v2"])
    assert "token F1 0.800 against 0.425 on the same 24 questions" in found.verdict


def test_seeds_are_grouped_and_counted(tmp_path: Path) -> None:
    best = {"a": [1.0, 1.1, 1.2], "b": [0.7, 0.8, 0.75]}
    folders = [
        make_run(tmp_path / f"{name}-seed{seed}", [(value, value)], seed=seed, learning_rate=rate)
        for (name, values), rate in zip(best.items(), (1e-3, 2e-3), strict=True)
        for seed, value in enumerate(values)
    ]
    found = compare(folders)
    assert found.names == ["a (3 seeds)", "b (3 seeds)"]
    row = next(row for row in found.rows if row.key == "best_val_loss")
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (row.cells[0].value, row.cells[0].low) == (pytest.approx(1.1), pytest.approx(1.1 - half, rel=1e-5))
    expected = statistics.difference_of_means(best["a"], best["b"])
    (judged,) = found.judgements
    assert judged.loss == expected
    assert "95 % interval over seeds" in found.verdict
    assert found.verdict.startswith("b (3 seeds) is better than a (3 seeds)")
    assert not any("one seed each" in note for note in found.notes)
    alone = compare(folders[:3])
    assert alone.verdict == (
        f"One configuration with 3 seeds: val_loss 1.100 (95 % interval over seeds {1.1 - half:.3f} to {1.1 + half:.3f})."
    )


def test_the_same_seed_again_is_no_other_seed(tmp_path: Path) -> None:
    found = pair(tmp_path, {}, {})
    assert len(found.contenders) == 2
    assert any("the same settings and the same seed" in note for note in found.notes)


def test_several_runs_are_each_compared_with_the_first(tmp_path: Path) -> None:
    losses = {"base": 1.0, "much-better": 0.7, "worse": 1.4, "alike": 0.98, "at-the-edge": 0.915}
    folders = [
        make_run(tmp_path / name, [(loss, loss)], learning_rate=number / 1e3)
        for number, (name, loss) in enumerate(losses.items(), 1)
    ]
    found = compare(folders)
    assert found.verdict == (
        "Against base, better: much-better (val_loss -0.300); worse: worse (val_loss +0.400); no difference larger than its "
        "error: alike (val_loss -0.020), at-the-edge (val_loss -0.085); "
        "the lowest val_loss is that of much-better (0.700)."
    )
    alone = compare([folders[0], folders[4]])
    assert alone.judgements[0].by_loss == 1, "as one of four it needs to be further out than as the only one"
    assert any("adjusted for 4 comparisons" in note for note in found.notes)


def test_a_run_that_goes_on_and_lines_that_are_damaged(tmp_path: Path) -> None:
    make_run(tmp_path / "v1", scores=WORSE)
    make_run(tmp_path / "v2", scores=BETTER)
    (tmp_path / "v2" / "training_summary.json").unlink()
    with (tmp_path / "v2" / "predictions.jsonl").open("a") as file:
        file.write('{"id": "valid.jsonl:99", "scor\n[1]\n{"id": 7, "scores": {"token_f1": null}}\n')
    found = compare([tmp_path / "v1", tmp_path / "v2"])
    assert "v2: 2 lines of predictions.jsonl can't be read and are left out" in found.notes
    assert found.judgements[0].questions == 24
    speeds = next(row for row in found.rows if row.key == "tokens_per_second")
    assert [cell.value for cell in speeds.cells] == [50.0, 50.0]
    assert [cell.text for cell in next(row for row in found.rows if row.key == "ended").cells] == ["finished", "not known"]


@pytest.mark.parametrize("value", ["x", None, [1], {"a": 1}, True, "nan", -1, 10**400], ids=lambda value: repr(value)[:9])
def test_figures_that_somebody_spoilt_do_no_harm(tmp_path: Path, value: Any) -> None:
    """Each in its turn, in every file."""
    folders = [make_run(tmp_path / name, scores=WORSE) for name in ("v1", "v2")]
    for file in ("training_summary.json", "data_account.json"):
        text = (folders[1] / file).read_text()
        for name in json.loads(text):
            (folders[1] / file).write_text(json.dumps(json.loads(text) | {name: value}))
            assert compare(folders).screen(80)
        (folders[1] / file).write_text(text)
    lines = (folders[1] / "training_metrics.jsonl").read_text().splitlines()
    for name in json.loads(lines[1]):
        spoilt = json.dumps(json.loads(lines[1]) | {name: value})
        (folders[1] / "training_metrics.jsonl").write_text(f"{lines[0]}\n{spoilt}\n")
        found = compare(folders)
        assert found.markdown()
        assert len(list(csv.DictReader(io.StringIO(found.csv())))) == 2


# How it is shown


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, count: int) -> None:
    long = "a-run-with-quite-a-long-name-that-tells-all-of-its-settings-but-for"
    folders = [
        make_run(tmp_path / f"{long}-{number}", scores=BETTER, learning_rate=number / 1e3, max_seq_length=number + 100)
        for number in range(1, count + 1)
    ]
    found = compare(folders)
    for width in (80, 200):
        screen = found.screen(width)
        assert max(map(len, screen.splitlines())) <= width
    assert len(set(shortened(found.names, 12))) == count


def test_csv_and_markdown_hold_the_same_figures(tmp_path: Path) -> None:
    found = pair(tmp_path, {"course": [(1.3, 1.2)], "scores": WORSE}, {"course": [(0.9, 0.8)], "scores": BETTER, "epochs": 5})
    lines = list(csv.DictReader(io.StringIO(found.csv())))
    assert [line["name"] for line in lines] == ["v1", "v2"]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in found.markdown().splitlines() if line.startswith("|")
    ]
    for row in found.rows:
        page = cells.pop(next(n for n, line in enumerate(cells) if line[0].replace("\\", "") == row.label))
        for line, cell, shown in zip(lines, row.cells, page[1:], strict=True):
            assert shown.replace("\\", "") == cell.text.replace("\n", "<br>")
            assert line[row.key] == ("" if cell.value is None else str(cell.value))
            if cell.low is not None and math.isfinite(cell.low):
                assert (float(line[f"{row.key}_low"]), float(line[f"{row.key}_high"])) == (cell.low, cell.high)
    assert (float(lines[1]["val_loss_difference"]), lines[1]["epochs"]) == (pytest.approx(-0.4), "5")
    assert found._repr_markdown_().startswith("**v2 is better than v1")


def test_what_changes_nothing_are_settings_that_there_are() -> None:
    names = set(flat(RunConfig().plain()))
    assert names >= AROUND
    assert {each.name for each in fields(CheckpointConfig)} <= AROUND


# Several seeds


Effects = tuple[float, float, float]  # of questions on a configuration, of seeds, of a run's answer to a question


def answering(
    rng: np.random.Generator, effects: Effects, ahead: float = 0.0, questions: int = 200, seeds: int = 3
) -> list[Run]:
    """Runs of two configurations, all with the same questions. In the mean over all questions and seeds that there could be,
    the second is ahead by so much, in parts of how far questions are apart."""
    of_question, of_seed, of_answer = effects
    hard, runs = rng.normal(0, 1, questions), []
    for name, skill in (("a", 0.0), ("b", ahead)):
        suits = rng.normal(skill, of_question, questions)
        for seed in range(seeds):
            right = hard + suits + rng.normal(0, of_seed) + rng.normal(0, of_answer, questions) > 0
            answers = Answers(EVALUATED, {"accuracy": {(str(n), "", ""): float(each) for n, each in enumerate(right)}})
            line = {"step": 1, "epoch": 1.0, "val_loss": rng.normal(1.0 - ahead, 0.1), "train_eval_loss": 1.0}
            settings = {"model": "embedded", "data": "data", "seed": seed, "learning_rate": skill or name == "a"}
            history = History(Path(f"{name}/seed_{seed}"), settings, (line,), {}, {}, {})
            runs.append(Run(f"{name}/seed_{seed}", history, answers, "finished"))
    return runs


@pytest.mark.parametrize("effects", [(0.5, 0.0, 0.5), (0.5, 0.15, 0.5), (0.0, 0.3, 0.5)], ids=["questions", "both", "seeds"])
def test_of_no_difference_better_is_rarely_said(effects: Effects) -> None:
    """Whether it is other questions or other seeds that would say otherwise, in no form in which a comparison is read; and a
    difference that there is, is found."""
    rng = np.random.default_rng(5)
    said = [of_runs(answering(rng, effects)) for _ in range(300)]
    claims = [bool(re.search("better|worse", found.verdict)) for found in said]
    assert sum(claims) <= 0.05 * 300 + 1.65 * math.sqrt(300 * 0.05 * 0.95)
    for found, claim in zip(said[::30], claims[::30], strict=True):
        for text in (found.markdown(), found.screen(80)):
            assert claim or not re.search("better|worse", text)
    real = [of_runs(answering(rng, (effects[0], effects[1] / 3, 0.5), ahead=0.7)).verdict for _ in range(30)]
    assert sum(each.startswith("b (3 seeds) is better than a (3 seeds)") for each in real) >= 27


def test_seeds_alone_would_take_the_questions_for_a_difference() -> None:
    """Which is why both are counted: three seeds agree on these questions, and others would have said otherwise."""
    rng = np.random.default_rng(6)
    naive, both = [], []
    for _ in range(400):
        (judged,) = of_runs(answering(rng, (0.5, 0.0, 0.3))).judgements
        a, b = judged.tables("accuracy")
        naive.append(statistics.difference_of_means(a.mean(1).tolist(), b.mean(1).tolist()).p < 0.05)
        both.append(statistics.crossed(a, b).p < 0.05)
    assert np.mean(naive) > 0.12
    assert np.mean(both) < 0.05


def test_of_questions_that_all_agree_the_signs_are_counted() -> None:
    zero, one = np.zeros((2, 9)), np.ones((2, 9))
    assert statistics.crossed(zero, one) == pytest.approx(statistics.Difference(1.0, p=2 / 2**9), nan_ok=True)
    assert statistics.crossed(zero, zero).p == 1.0


def test_too_few_questions_for_the_difference_are_told_with_how_many_it_takes(tmp_path: Path) -> None:
    """The number is that of `questions_needed`, rounded; so many really show it in four of five cases."""
    right = [1.0] * 105 + [0.0] * 95
    other = [1.0] * 100 + [0.0] * 5 + [1.0] * 8 + [0.0] * 87
    found = pair(tmp_path, {"scores": right}, {"scores": other})
    reach = found.judgements[0].reach("token_f1")
    assert reach is not None
    assert reach.needed == questions_needed(3 / 200, 213 / 400, 13 / 200)
    said = f"the difference of 1.5 points would take about {rounded(reach.needed)} questions to be seen; there were 200"
    assert any(said in note for note in found.notes)
    rng, shown = np.random.default_rng(8), 0
    for _ in range(200):
        signs = rng.choice([1.0, -1.0, 0.0], reach.needed, p=[8 / 200, 5 / 200, 187 / 200])
        shown += statistics.sign_flips(signs) < 0.05
    assert shown / 200 == pytest.approx(0.8, abs=0.08)


def test_seeds_that_a_guard_has_stopped_are_told_of_and_not_counted(tmp_path: Path) -> None:
    for name, rate, values in (("a", 1e-3, (1.0, 1.1, 1.2)), ("b", 2e-3, (0.9, 9.0, 1.0))):
        for seed, value in enumerate(values):
            ended = {"ended": "not finite"} if value == 9.0 else {}
            make_run(tmp_path / name / f"seed_{seed}", [(value, value)], seed=seed, learning_rate=rate, summary=ended)
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert found.names == ["a (3 seeds)", "b (3 seeds)"]
    assert [len(each.runs) for each in found.contenders] == [3, 2]
    assert found.verdict.endswith("1 of 3 seeds of b (3 seeds) is in none of its figures (1 ended: not finite).")
    assert compare([tmp_path / "a", tmp_path / "b"], baseline=str(tmp_path / "b")).names[0] == "b (3 seeds)"


def test_seeds_with_validation_rows_of_their_own_are_paired(tmp_path: Path) -> None:
    """How hard a seed's rows are is no doubt about the difference then."""
    hard = (0.5, 1.0, 2.0)
    for name, better in (("a", 0.0), ("b", 0.1)):
        for seed, value in enumerate(hard):
            course = [(value - better - 0.001 * seed * better, value)]
            make_run(tmp_path / name / f"seed_{seed}", course, seed=seed, digest=str(seed), learning_rate=1e-3 + better)
    (judged,) = compare([tmp_path / "a", tmp_path / "b"]).judgements
    assert judged.val_loss is not None
    assert judged.val_loss.value == pytest.approx(-0.1, rel=0.01)
    assert judged.by_loss == 1
    (tmp_path / "b" / "seed_2" / "data_account.json").unlink()
    assert compare([tmp_path / "a", tmp_path / "b"]).judgements[0].by_loss != 1


# Real runs


@pytest.fixture(scope="session")
def real_runs(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from mlx_qlora.train import run

    place = tmp_path_factory.mktemp("compared")
    for name, rate in (("first", 1e-4), ("second", 1e-2)):
        config = RunConfig(
            model="embedded", data=str(small_data), output_dir=str(place / name), epochs=1, batch_size=4, eval_every=3,
            learning_rate=rate, lora=LoraConfig(rank=4), score_questions=4, max_answer_tokens=4, seed=0,
        )  # fmt: skip
        run(config, quiet=True)
    return [place / "first", place / "second"]


def test_real_runs_are_compared_and_written(
    real_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", *map(str, real_runs), "--output-dir", str(tmp_path / "out" / "there")]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.split("files")[0].splitlines())) <= 80
    for text in ("learning_rate", "0.0001", "0.01", "token F1", "peak memory", "verdict   second is better than first"):
        assert text in out
    assert "CAN'T BE COMPARED" not in out
    there = tmp_path / "out" / "there"
    assert sorted(path.name for path in there.iterdir()) == ["compare.csv", "compare.md", "compare.png", "compare_tokens.png"]
    assert (there / "compare.png").read_bytes().startswith(b"\x89PNG")
    summaries = [json.loads((folder / "training_summary.json").read_text()) for folder in real_runs]
    lines = list(csv.DictReader(io.StringIO((there / "compare.csv").read_text())))
    assert [float(line["best_val_loss"]) for line in lines] == [each["best"]["val_loss"] for each in summaries]
    assert [float(line["token_f1"]) for line in lines] == [
        pytest.approx(each["answers"]["tuned"]["token_f1"]) for each in summaries
    ]
    sizes = [json.loads((folder / "data_account.json").read_text())["sizes"] for folder in real_runs]
    assert sizes[0]["valid"]["digest"] == sizes[1]["valid"]["digest"] != sizes[0]["train"]["digest"] != ""


def test_evaluated_runs_are_compared_by_what_evaluate_found(
    real_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in real_runs]
    for folder in copies:
        assert main(["evaluate", "--run", str(folder), "--split", "valid", "--questions", "0"]) == 0
        report = json.loads((folder / "evaluation_report.json").read_text())
        lines = [json.loads(line) for line in (folder / "evaluation_losses.jsonl").read_text().splitlines()]
        weights = np.array([line["weight"] for line in lines])
        for name in ("loss", "base_loss"):
            mean = weights @ np.array([line[name] for line in lines]) / weights.sum()
            assert mean == pytest.approx(report[name]["value"], rel=1e-6)
    found = compare(copies)
    (judged,) = found.judgements
    assert judged.evaluated is not None
    assert judged.val_loss is not None
    assert judged.evaluated.value == pytest.approx(judged.val_loss.value, rel=1e-4), "the same examples, measured again"
    assert found.verdict.startswith("second is better than first by evaluated loss")
    assert not any("other weights" in note for note in found.notes)
    shutil.copy(copies[0] / "adapters" / "adapters.safetensors", copies[1] / "adapters")
    (note,) = [note for note in compare(copies).notes if "other weights" in note]
    assert note.startswith("second: what evaluate has left in it is of other weights than those that are in it now")


def test_what_a_person_gets_wrong(real_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = map(str, real_runs)
    (tmp_path / "file").write_text("")
    begun = make_run(tmp_path / "begun")
    (begun / "training_metrics.jsonl").unlink()
    for arguments, said in (
        ([], "no run came; two or more are expected"),
        ([first], "one run came; two or more are expected"),
        ([str(real_runs[0].parent)], "In it are runs: first, second; name them"),
        ([first, first + "/"], "it is named twice"),
        ([first, str(tmp_path / "none")], "there is nothing"),
        ([first, str(real_runs[0].parent)], "In it are runs: first, second; name them"),
        ([first, str(begun)], "its run has made no update yet"),
        ([first, second, "--baseline", "third"], "baseline: 'third' came, and one of the runs is expected: first, second"),
        ([first, second, "--score", "bleu"], "score: 'bleu' came, and one that the runs have in common is expected: token_f1"),
        ([first, second, "--output-dir", str(tmp_path / "file" / "x")], "a folder that can be written is expected"),
    ):
        assert main(["compare", *arguments]) == 2
        err = capsys.readouterr()
        assert said in err.err
        assert "Traceback" not in err.err
        assert err.out == ""


def test_one_error_names_every_folder_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"(?s)one: there is nothing.*two: there is nothing"):
        compare([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(ConfigError, match="no run came"):
        compare([])


def test_a_final_answer_is_the_same_with_and_without_its_rationale(tmp_path: Path) -> None:
    """One run learnt both as one text, the other as two tasks: the questions are the same, the texts are not."""
    for name, expected in (("one", "2 + 3 = 5.\n#### 5"), ("two", "5")):
        (tmp_path / name).mkdir()
        line = {
            "id": "test.jsonl:1",
            "question": "2 + 3?",
            "expected": expected,
            "scores": {"final_number": 1.0, "token_f1": 0.5},
        }
        (tmp_path / name / "predictions.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    one, two = (read_answers(tmp_path / name) for name in ("one", "two"))
    assert one.tuned["final_number"] == two.tuned["final_number"]
    assert not one.tuned["token_f1"].keys() & two.tuned["token_f1"].keys()
    assert how_many(one.questions & two.questions) == how_many(one.questions) == 1
