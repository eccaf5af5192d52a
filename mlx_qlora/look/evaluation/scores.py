"""Scores of an answer against the expected one, from 0 to 1. Those that well-kept packages have are theirs."""

from __future__ import annotations

import importlib.util
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_qlora.look.evaluation.numerals import last_number, numeric_accuracy

# (answer, expected) -> what it is worth; NaN: the score says nothing of such a question.
Score = Callable[[str, str], float]


@dataclass(frozen=True)
class Named:
    """A score with its name in files."""

    name: str
    of: Score
    tasks: frozenset[str] | None = None  # whose questions it speaks of; None: of all
    found: Callable[[str], bool] | None = None  # whether there was anything in an answer that could be right

    @property
    def title(self) -> str:
        return title(self.name)


# Scripts that write no spaces between words: each sign is taken for one.
_ALONE = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
# Of punctuation that stays: between two digits (1.5 is not 15), and a minus before a number.
_PUNCTUATION = re.compile(r"(?<=\d)[.,:/-](?=\d)|(?<!\S)[-−](?=\d)|(.)", re.DOTALL)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation, as SQuAD compares answers, but for all scripts. Where there is
    nothing but punctuation and symbols, they are what is said.

    >>> words("Foi em «São João», R$ 1.927,50!"), words("-2"), words("東京です。"), words("+"), words("😀 !")
    (['foi', 'em', 'são', 'joão', 'r', '1.927,50'], ['-2'], ['東', '京', 'で', 'す'], ['+'], ['😀', '!'])
    """
    whole = plain = unicodedata.normalize("NFC", text).casefold()
    if not whole.isalnum():
        plain = _PUNCTUATION.sub(lambda found: found[0] if found[1] is None or _is_word(found[1]) else "", whole)
    return _ALONE.sub(r" \1 ", plain).split() or whole.split()


def _is_word(sign: str) -> bool:
    """Letters, marks that belong to letters, digits, and space; neither punctuation nor symbols such as $."""
    return unicodedata.category(sign)[0] not in "PS"


def exact_match(answer: str, expected: str) -> float:
    """Whether the words are the same, in the same order."""
    return float(words(answer) == words(expected))


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of the shares of words that answer and expectation have in common.

    >>> round(token_f1("Foi em 1927.", "O clube nasceu em 1927."), 3)  # 2 of 3 words, 2 of 5
    0.5
    """
    given, wanted = Counter(words(answer)), Counter(words(expected))
    common = (given & wanted).total()
    if common == 0:
        return float(given == wanted)
    return 2 * common / (given.total() + wanted.total())


def rouge_l() -> Score:
    """F1 of the longest run of words in common, which may have gaps; by rouge-score, with our words: its own would drop
    every letter that is not ASCII."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())

    def score(answer: str, expected: str) -> float:
        if not words(expected):  # which rouge-score takes for 0
            return exact_match(answer, expected)
        return float(scorer.score(expected, answer)["rougeL"].fmeasure)

    return score


class _Words:
    """What rouge-score takes for a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def chrf() -> Score:
    """chrF2 of each answer by itself, by sacrebleu: letters in common, so that other endings of a word count half."""
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF()

    def score(answer: str, expected: str) -> float:
        if not expected.strip():
            return float(not answer.strip())
        return float(scorer.sentence_score(answer, [expected]).score) / 100

    return score


_PACKAGES = {"rouge_score": ("rouge_l", rouge_l), "sacrebleu": ("chrf", chrf)}
# What people read.
TITLES = {
    "exact_match": "exact match", "token_f1": "token F1", "rouge_l": "ROUGE-L", "chrf": "chrF", "accuracy": "accuracy",
    "numeric_accuracy": "last number", "macro_f1": "macro F1", "final_number": "final number", "final_option": "final option",
    "final_text": "final answer", "final_answer": "final answer",
}  # fmt: skip


def title(name: str) -> str:
    """Of a score by its name in files; one's own is called as it is.

    >>> title("rouge_l"), title("my_score")
    ('ROUGE-L', 'my_score')
    """
    return TITLES.get(name, name)


def scores_for(expected: Sequence[str], are_labels: bool) -> tuple[list[Named], list[str]]:
    """(the scores that say something of such questions, what is left out for want of a package)."""
    chosen = [Named("exact_match", exact_match), Named("token_f1", token_f1)]
    missing = []
    for package, (name, make) in _PACKAGES.items():
        if importlib.util.find_spec(package):
            chosen.append(Named(name, make()))
        else:
            missing.append(title(name))
    if are_labels:
        chosen.append(Named("accuracy", exact_match))
    if any(map(last_number, expected)):
        chosen.append(Named("numeric_accuracy", numeric_accuracy))
    left_out = f"{' and '.join(missing)} left out: pip install 'mlx-qlora[scores]'"
    return chosen, [left_out] if missing else []


def mean(values: Sequence[float]) -> float:
    """Of those that are numbers."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
