"""Scores against cases worked out by hand, and how sure they are."""

from __future__ import annotations

import math
from pathlib import Path

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import numpy as np
import pytest

from mlx_qlora.data.render import Question
from mlx_qlora.errors import ConfigError
from mlx_qlora.look.evaluation import pictures, results, scores
from mlx_qlora.look.evaluation.bootstrap import difference_of, estimates, mean_of
from mlx_qlora.look.evaluation.compared import BASE, TUNED, Compared
from mlx_qlora.look.evaluation.labels import ClassScore, classified, labels_of
from mlx_qlora.look.evaluation.numerals import numeric_accuracy
from mlx_qlora.look.evaluation.own_metric import load_metrics
from mlx_qlora.look.evaluation.results import Evaluation, loss_difference
from mlx_qlora.look.evaluation.scores import chrf, exact_match, rouge_l, scores_for, token_f1, words
from mlx_qlora.look.evaluation.screen import told
from mlx_qlora.look.measure import Measured, standard_error


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Foi em «São João»!", "foi em são joão", True),
        ("1.5", "15", False),  # a point inside of a number is no punctuation
        ("-2", "2", False),
        ("2.", "2", True),
        ("São", "Sa\u0303o", True),  # composed and decomposed
        ("नमस्ते!", "नमस्ते", True),  # vowel signs belong to their letters
        ("नमस्ते", "नमसत", False),
        ("東京です。", "東京です", True),
        ("", "", True),
        ("", "a", False),
        ("?!", "", False),
        ("+", "-", False),  # signs and nothing else are what is said
        ("😀", "😢", False),
        ("😀!", "😀!", True),
    ],
)
def test_what_is_the_same_answer(answer: str, expected: str, same: bool) -> None:
    assert exact_match(answer, expected) == same
    assert exact_match(expected, answer) == same


def test_rouge_l_counts_letters_that_are_not_ascii() -> None:
    """Of "a ção foi boa" and "ção boa" the longest common run is 2 words of 4 and 2: F1 2/3. With the package's own
    tokenizer, "ção" would be the words "o" and nothing more."""
    score = rouge_l()
    assert score("a ção foi boa", "ção boa") == pytest.approx(2 * 2 / (4 + 2))
    assert score("ção", "cão") == 0
    assert score("boa ção", "ção boa") == pytest.approx(1 / 2)  # their order counts
    assert token_f1("boa ção", "ção boa") == 1
    assert score("東京です", "東京だ") == pytest.approx(2 * 2 / (4 + 3))
    assert [score("", ""), score("", "a"), score("a", "")] == [1, 0, 0]


def test_chrf_by_hand() -> None:
    """ "ab" for "abc": of letters 2/2 right and 2/3 found, of pairs 1/1 and 1/2, of triples 0/0 and 0/1; chrF2 of the mean
    precision and recall over the orders that both have."""
    score = chrf()
    assert score("ação", "ação") == pytest.approx(1)
    assert score("xyz", "abc") == 0
    assert [score("", ""), score("", "a"), score("a", "")] == [1, 0, 0]
    precision, recall = (2 / 2 + 1 / 1) / 2, (2 / 3 + 1 / 2) / 2
    assert score("ab", "abc") == pytest.approx(5 * precision * recall / (4 * precision + recall))


@pytest.mark.parametrize(
    ("answer", "expected", "worth"),
    [
        ("R$ 1.927,50", "1,927.50", 1),
        ("1'927.5", "1927,50", 1),
        ("1\u202f927,5", "1927.5", 1),
        ("1.234.567", "1234567", 1),
        ("1.234", "1234", 1),  # can be read in two ways
        ("1.234", "1,234", 1),
        ("0.234", "234", 0),  # can't
        ("1.23", "123", 0),
        ("3%", "3 %", 1),
        ("3,0 por cento", "3%", 1),
        ("−2", "-2", 1),
        ("de 10-12", "12", 1),  # a range, not minus twelve
        ("2", "-2", 0),
        ("first 5, then 7", "7", 1),
        ("7, not 5", "7", 0),
        ("20:30", "às 20h30", 1),
        ("19:30", "20:30", 0),
        ("30", "20:30", 0),
        ("1/2", "2", 0),
        ("1e-4", "0.0001", 1),
        ("porta A4", "4", 0),
        ("", "4", 0),
        ("٣", "3", 1),
        (".5", "0,5", 1),
        ("-.125", "-0.125", 1),
        (".125", "125", 0),
        ("1,2,3", "123", 0),  # a list
        ("1.2.3", "123", 0),  # a version
        ("12.05.2024", "12.5.2024", 1),
        ("12,34,567", "1234567", 1),
        ("4.", "4", 1),
    ],
)
def test_numbers_however_they_are_written(answer: str, expected: str, worth: int) -> None:
    assert numeric_accuracy(answer, expected) == worth


def test_numbers_are_asked_about_only_where_one_is_expected() -> None:
    assert math.isnan(numeric_accuracy("3", "three"))
    names = [each.name for each in scores_for(["three", "a"], are_labels=False)[0]]
    assert names == ["exact_match", "token_f1", "rouge_l", "chrf"]
    assert scores_for(["a", "3"], are_labels=True)[0][-1].name == "numeric_accuracy"


def test_without_the_packages_their_scores_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    found, notes = scores_for(["a"], are_labels=False)
    assert [each.name for each in found] == ["exact_match", "token_f1"]
    assert notes == ["ROUGE-L and chrF left out: pip install 'mlx-qlora[scores]'"]


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 samples of 60 questions with a known mean: 95 % intervals hold it in 95 % of them, give or take."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        values = rng.beta(0.6, 0.4, 60)
        one = estimates({"x": (mean_of(values), 60)}, 60, resamples=300, seed=int(rng.integers(1e9)))["x"]
        held += one.low <= 0.6 <= one.high
    assert 0.91 <= held / 400 <= 0.98


def test_answers_that_are_all_right_are_not_sure_to_be() -> None:
    """An interval from 1 to 1 would say that no question can go wrong. A difference that all make is still none by chance."""
    one = estimates({"x": (mean_of(np.ones(20)), 20)}, 20)["x"]
    assert (one.value, one.n) == (1, 20)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    for count, value, noise in ((20, 0.7, False), (20, 0.0, True), (4, 0.7, True)):
        difference = estimates({"x": (mean_of(np.full(count, value)), count)}, count)["x"]
        assert Compared("x", one, one, difference).within_noise is noise


def test_what_is_hard_for_both_models_is_no_doubt_about_their_difference() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(80)
    base, tuned = hard, hard + 0.05 + 0.01 * rng.normal(size=80)
    own, other = mean_of(tuned), mean_of(base)
    found = estimates({"t": (own, 80), "b": (other, 80), "d": (difference_of(own, other), 80)}, 80)
    assert found["d"].value == pytest.approx(np.mean(tuned - base))
    assert found["d"].high - found["d"].low == pytest.approx(2 * 1.96 * np.std(tuned - base) / math.sqrt(80), rel=0.15)
    assert found["t"].high - found["t"].low > 20 * (found["d"].high - found["d"].low)


def test_questions_that_a_score_says_nothing_of_are_no_part_of_it() -> None:
    found = estimates({"x": (mean_of(np.array([1.0, math.nan, 0.0, math.nan])), 2)}, 4)["x"]
    assert (found.value, found.n) == (0.5, 2)
    alone = estimates({"x": (mean_of(np.array([1.0])), 1)}, 1)["x"]
    assert alone.value == 1
    assert math.isnan(alone.low)


def test_the_error_of_a_difference_is_that_of_the_same_examples() -> None:
    weights, hard = np.array([3.0, 5.0, 2.0]), np.array([9.0, 5.0, 1.0])
    one, other = (Measured(t.sum() / 10, standard_error(t, weights), t, weights) for t in (hard, hard - weights))
    found = loss_difference(one, other)
    assert found.mean == pytest.approx(1)
    assert found.error == pytest.approx(0, abs=1e-12)  # each token exactly one nat more
    assert one.error > 0.3


def test_when_answers_are_labels() -> None:
    assert labels_of(["a", "b"] * 3) == ("a", "b")
    assert labels_of(["a"] * 9) == ()  # one class is none
    assert labels_of(["a", "b", "c", "d"]) == ()  # each comes once
    assert labels_of(["o gato mia e o cachorro late", "b"] * 5) == ()
    assert labels_of(["", "b"] * 5) == ()
    assert labels_of([]) == ()
    assert labels_of([str(n) for n in range(21)] * 3) == ()


def test_the_classes_by_hand() -> None:
    """yes: 3 expected, 2 of them found, 1 no taken for it; no: 2 expected, 1 found; one answer is neither."""
    found = classified(("no", "yes"), ["yes", "Yes.", "yes", "no", "No"], ["YES", "yes!", "maybe", "yes", "no."])
    assert found.classes == {
        "no": ClassScore(precision=1.0, recall=0.5, f1=2 / 3, support=2),
        "yes": ClassScore(precision=2 / 3, recall=2 / 3, f1=2 / 3, support=3),
    }
    assert found.confusion.tolist() == [[1, 1, 0], [0, 2, 1]]
    assert found.macro_f1(np.ones((1, 5)))[0] == pytest.approx(2 / 3)
    # Drawn without the noes, there is one class, whose wrong answer counts: 2 * 2 / (2 + 3).
    assert found.macro_f1(np.array([[1.0, 1, 1, 0, 0]]))[0] == pytest.approx(4 / 5)


METRICS = """
import math
def shorter(answer, expected): return len(answer) <= len(expected)
def token_f1(answer, expected): return 7
def nothing(answer, expected): pass
def not_finite(answer, expected): return math.nan
def text(answer, expected): return "0.5"
def fails(answer, expected): return 1 / 0
def one(answer): return 1
number = 3
class Group:
    @staticmethod
    def inside(answer, expected): return 0.25
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of a person's own in the folder that the person is in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "scores_of_mine.py").write_text(METRICS)
    monkeypatch.delitem(__import__("sys").modules, "scores_of_mine", raising=False)
    return tmp_path


def test_scores_of_ones_own(own: Path) -> None:
    names = ["scores_of_mine:shorter", "scores_of_mine.token_f1", "scores_of_mine:Group.inside"]
    found = load_metrics(names, ["token_f1"])
    assert [each.name for each in found] == ["shorter", "scores_of_mine.token_f1", "inside"]
    assert [each.of("ab", "a") for each in found] == [0, 7, 0.25]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "None came for (answer='a', expected='b'); a finite number is expected"),
        ("not_finite", "nan came for"),
        ("text", "'0.5' came for"),
        ("fails", "it raised ZeroDivisionError: division by zero"),
        ("one", "it raised TypeError"),
        ("number", "3 came; a function (answer, expected) -> number is expected"),
        ("none", "scores_of_mine has no none"),
    ],
)
def test_scores_of_ones_own_that_are_wrong(name: str, said: str, own: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_metrics([f"scores_of_mine:{name}"], [])[0].of("a", "b")
    assert f"--metric scores_of_mine:{name}: {said}" in str(error.value)


@pytest.mark.parametrize(("name", "said"), [("nowhere:f", "nowhere can't be imported"), ("f", "package.module:function")])
def test_scores_that_are_not_there(name: str, said: str, own: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load_metrics([name], [])


def labelled(count: int = 60) -> Evaluation:
    rng = np.random.default_rng(0)
    labels = ("negativo", "neutro", "positivo")
    expected = [labels[number] for number in rng.integers(0, 3, count)]
    tuned = [each if rng.random() < 0.8 else str(rng.choice([*labels, "não sei"])) for each in expected]
    base = [str(rng.choice([*labels, "O gato mia."])) for _ in expected]
    metrics, _ = scores_for(expected, are_labels=True)
    weights, totals = np.full(count, 3.0), rng.random(count)
    loss = Measured(float(totals.sum() / weights.sum()), standard_error(totals, weights), totals, weights)
    asked = [Question(f"test.jsonl:{number}", "O filme?", (), each) for number, each in enumerate(expected, start=1)]
    return Evaluation(
        model="m", adapters="a", data="d", split="test", rows=count, loss=loss, base_loss=loss,
        predictions=results.predictions(asked, {TUNED: tuned, BASE: base}, metrics), metrics=tuple(metrics),
        labels=labels, worst_count=2, settings={}, versions={},
    )  # fmt: skip


def test_labels_in_the_report_and_on_the_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = labelled()
    report = found.to_json()
    assert report["scores"]["accuracy"] == report["scores"]["exact_match"]
    assert report["classes"].keys() == {"negativo", "neutro", "positivo"}
    means = [one["f1"] for one in report["classes"].values()]
    assert report["scores"]["macro_f1"]["tuned"]["value"] == pytest.approx(np.mean(means))
    assert np.sum(report["confusion"]) == 60
    lines = list(told(found))
    assert max(map(len, lines)) <= 80
    assert "macro F1" in "\n".join(lines)
    assert all(words(each.answer) != words(each.expected) for each in found.worst)
    drawn, _ = pictures.draw(found, tmp_path)
    assert [path.name for path in drawn] == ["evaluation_scores.png", "evaluation_confusion.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn)
