"""Final numbers, options and phrases of answers that reason, against cases that were read by hand."""

from __future__ import annotations

import math

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import numpy as np
import pytest

from mlx_qlora.look.evaluation.bootstrap import mean_of_shares, share
from mlx_qlora.look.evaluation.compared import by_task
from mlx_qlora.look.evaluation.finals import final, final_letter, final_number, finals_for, kind_of


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("x = 40 + 2\n#### 42", "42", True),
        ("5 + 5 = 10 and 10 + 2 = 12\n#### 12\n", "12", True),
        ("Half of 24 is 12.\n#### 1,200", "3 * 400 = 1200\n#### 1200", True),
        ("#### unknown\n42", "42", False),  # what is marked is the answer
        ("The answer is 42.", "42", True),
        ("The answer is 42, not 43.", "42", True),
        ("The answer is not 42 but 43.", "43", True),
        ("The answer is not 42 but 43.", "42", False),
        ("The answer is 42 because 6 times 7 is 42 and not 41", "42", True),
        ("The answer is 42 apples in 3 baskets", "42", True),
        ("The answer is 6 * 7 = 42.", "42", True),
        ("The answer is as follows:\n42", "42", True),
        ("The answer to 2 + 2 is 4", "4", True),
        ("The final answer is: 18 dollars per day. That is 126 a week.", "18", True),
        ("The answer is 42.\n\nQuestion: what is 3?", "42", True),
        ("Answer: In 2 hours he makes 40.", "40", True),
        ("**Answer:** $1,200.00", "1200", True),
        ("Final answer: **18**", "18", True),
        ("A resposta é R$ 1.927,50.", "1927.5", True),
        ("so \\boxed{42}", "42", True),
        ("\\boxed{\\frac{1}{2}}, and not 3", "0.5", True),
        ("$\\boxed{1{,}234}$ apples", "1234", True),
        ("16 - 3 - 4 = 9 eggs; 9 * 2 = $18", "18", True),
        ("He has 1,234 apples.", "1234", True),
        ("18.00", "18", True),
        ("18.5", "18", False),
        ("It costs -$5.", "-5", True),
        ("The answer is −7 degrees", "-7", True),
        ("-5", "5", False),
        ("10-12", "12", True),  # a range, not minus twelve
        ("3/4 of it", "0.75", True),
        ("-3/4", "-0.75", True),
        ("The answer is -\\frac{3}{4}", "-0.75", True),
        ("1 1/2 cups", "1.5", True),
        ("answer is 5 1/2", "5.5", True),
        ("50%", "50", True),
        ("1e3", "1000", True),
        ("1/0", "0", False),
        ("forty-two", "42", False),
        ("A4", "4", False),
        ("", "4", False),
    ],
)
def test_final_numbers(answer: str, expected: str, right: bool) -> None:
    assert final("number", [expected]).right(answer, expected) == right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(B)", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("(B) Paris", "B"),
        ("b) Paris", "B"),
        ("B: Paris", "B"),
        ("The answer is (B).", "B"),
        ("The answer is **(B)**", "B"),
        ("The answer is B, not A.", "B"),
        ("The answer is B because A is not", "B"),
        ("The answer is A", "A"),
        ("The answer is a dog", ""),
        ("The answer is not (A) but (B)", "B"),
        ("The correct answer is option (B) because (A) is wrong", "B"),
        ("So the answer is (B).\nNo, the answer is (C).", "C"),
        ("answer: b", "B"),
        ("answer: a", "A"),
        ("Option B", "B"),
        ("Alternativa C", "C"),
        ("a resposta é (C)", "C"),
        ("#### B", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("(A) is wrong, (B) is right", "B"),
        ("(B) is the correct answer, since (A) is not one.", "B"),
        ("(A) red\n(B) blue\n\nThe answer is (B)", "B"),
        ("(A) red\n(B) blue\n(B)", "B"),
        ("Let's see. A is 3, B is 4. D", "D"),
        ("It can't be A. It must be C.", "C"),
        ("(A) or (B)", ""),
        ("The answer is (A) or (B)", ""),
        ("A and B", ""),
        ("A dog", ""),
        ("I think so", ""),
        ("It's B's turn", ""),
        ("None of them", ""),
        ("(Z)", ""),
        ("", ""),
    ],
)
def test_final_letters(answer: str, letter: str) -> None:
    assert final_letter(answer) == frozenset(letter)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("Yes", "yes", True),
        ("No, because yes would be wrong", "No", True),
        ("There is no reason against it, so yes", "Yes", True),
        ("The answer is: No.", "no", True),
        ("#### no", "yes", False),
        ("yesterday", "yes", False),
        ("The argument is not valid.", "invalid", True),
        ("Is it valid or invalid? It is deductively valid", "valid", True),
        ("So the answer is invalid.", "valid", False),
        ("The answer is not true", "False", True),
    ],
)
def test_final_words_of_a_pair(answer: str, expected: str, right: bool) -> None:
    assert kind_of([expected]) == "option"
    assert final("option", [expected]).right(answer, expected) == right


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("apple banana cherry", "apple banana cherry", True),
        ("The answer is apple banana cherry.", "apple banana cherry", True),
        ("Sorted:\napple banana cherry", "apple banana cherry", True),
        ("So the answer is ] ) }.", "] ) }", True),
        ("] ) }", "] } )", False),
        ("banana apple", "apple banana", False),
        ("apple\n#### banana", "apple", False),
        ("", "apple", False),
    ],
)
def test_final_phrases(answer: str, expected: str, right: bool) -> None:
    assert final("text", [expected]).right(answer, expected) == right


@pytest.mark.parametrize(
    ("expected", "kind"),
    [
        (["12", "-3", "$1,200", "3/4", "50 %"], "number"),
        (["3 + 4 = 7\n#### 7", "#### 1,200"], "number"),
        (["12", "in 1927"], None),
        (["20:30"], None),
        (["(A)", "(R)"], "option"),
        (["A", "B."], "option"),
        (["(A) a dog", "(B) a cat"], "option"),
        (["A dog", "I am"], None),
        (["a", "b"], None),
        (["Yes", "no"], "option"),
        (["True", "no"], None),
        ([], None),
    ],
)
def test_what_expected_answers_are(expected: list[str], kind: str | None) -> None:
    assert kind_of(expected) == kind


def test_each_task_is_scored_by_its_own_kind() -> None:
    asked = [("sums", "4"), ("sums", "5"), ("sorted", "a b"), ("logic", "(A)")]
    found = finals_for(asked)
    assert found.kinds == (("sums", "number"), ("sorted", "text"), ("logic", "option"))
    assert {each.name for each in found.scores} == {"final_answer"}
    assert finals_for(asked[:2]).name == "final_number"
    assert finals_for([("", "a b"), ("", "in 1927")]).scores == ()
    assert finals_for([("", "a b")], "text").name == "final_text"
    (letters,) = finals_for([("", "red"), ("", "green")], "option").scores
    assert letters.found is not None
    assert [letters.of(said, "red") for said in ("I say red.", "green", "blue")] == [1, 0, 0]
    assert [letters.found(said) for said in ("I say red.", "green", "blue")] == [True, True, False]


def test_a_letter_beyond_the_options_is_none() -> None:
    """BBH has tasks with options up to (R)."""
    assert final("option", ["(A)", "(R)"]).found("The answer is (K).")
    assert not final("option", ["(A)", "(B)"]).found("The answer is (K).")


def test_a_huge_number_is_read() -> None:
    assert final_number("1e999") == final_number("1" + "0" * 999)


# How sure a share is


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (1, 10, 0.0179, 0.4042), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_as_published(right: int, n: int, low: float, high: float) -> None:
    """The last two are Newcombe's examples (1998)."""
    found = share(right, n)
    assert (found.value, found.low, found.high) == pytest.approx((right / n, low, high), abs=5e-5)


@pytest.mark.parametrize("truth", [0.03, 0.5, 0.95])
def test_shares_hold_the_truth_as_often_as_they_say(truth: float) -> None:
    drawn = np.random.default_rng(0).binomial(60, truth, 2000)
    held = [share(right, 60).low <= truth <= share(right, 60).high for right in drawn]
    assert 0.93 <= np.mean(held) <= 0.985


def test_the_mean_over_tasks_holds_the_truth_too() -> None:
    rng, truths, sizes = np.random.default_rng(0), (0.02, 0.5, 0.97), (20, 50, 30)
    held = 0
    for _ in range(1000):
        found = mean_of_shares([share(rng.binomial(n, p), n) for n, p in zip(sizes, truths, strict=True)])
        held += found.low <= sum(truths) / 3 <= found.high
    assert 0.93 <= held / 1000 <= 0.995  # near 0 and 1 it is a little wide


def test_by_task_by_hand() -> None:
    """One task of four questions, one of one: the mean over tasks counts both the same."""
    own, base = np.array([1.0, 1, 1, 0, 0]), np.array([0.0, 1, 0, 0, 1])
    found = by_task(["a", "a", "a", "a", "b"], own, base)
    assert [each.tuned.value for each in found.each.values()] == [0.75, 0]
    assert found.mean.tuned.value == 0.375
    assert found.mean.difference is not None
    assert found.mean.difference.value == pytest.approx((0.5 - 1) / 2)
    assert found.each["a"].difference is not None
    assert found.each["a"].difference.value == 0.5
    alone = by_task(["a", "b"], np.array([1.0, 1.0]), None)
    assert alone.mean.difference is None
    assert 0 < alone.mean.tuned.low < 1 == alone.mean.tuned.high
    assert math.isfinite(alone.each["a"].tuned.low)


def test_what_the_answer_is_said_not_to_be_is_no_answer() -> None:
    number, letter = final("number", ["42"]), final("option", ["(A)", "(B)"])
    assert number.right("The answer is not 42.", "42") == 0
    assert number.right("It is 43, so the answer is not 42.", "43") == 1
    assert number.right("The answer is not 41 but 42.", "42") == 1
    assert number.right("The answer is not 4.5, it is 42.", "42") == 1
    assert letter.right("The answer is not (B).", "(B)") == 0
    assert letter.right("The answer is not B, so A.", "(A)") == 1
    assert letter.right("I pick (A). The answer is not (B).", "(A)") == 1
