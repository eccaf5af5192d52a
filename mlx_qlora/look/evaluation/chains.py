"""Chains of thought: answers after the model's own rationale beside those after the data's, so that errors that a rationale
carries over into the answer show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_qlora.data.render import Question
from mlx_qlora.look.evaluation.bootstrap import Estimate, difference_of, estimates, mean_of, share
from mlx_qlora.look.evaluation.compared import Values, share_of
from mlx_qlora.look.evaluation.scores import exact_match, token_f1


@dataclass(frozen=True)
class Thought:
    """What a model wrote before its answer, and what it answers after the data's rationale."""

    rationale: str
    ended: bool  # else it was cut
    given: str
    given_scores: dict[str, float]
    rationale_scores: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "own_rationale": self.rationale,
            "own_rationale_ended": self.ended,
            "answer_after_given": self.given,
            "scores_after_given": self.given_scores,
            "rationale_scores": self.rationale_scores,
        }


@dataclass(frozen=True)
class Chained:
    """Of one model: how often it is right after a rationale of its own and of the data, and how good its own are."""

    own: Estimate
    given: Estimate
    carried: Estimate  # given - own, of the same questions
    token_f1: Estimate
    exact_match: Estimate
    unended: int
    empty: int

    def to_json(self) -> dict[str, Any]:
        names = ("own", "given", "carried", "token_f1", "exact_match")
        figures = {_JSON[name]: getattr(self, name).to_json() for name in names}
        return figures | {"rationales_never_ended": self.unended, "rationales_empty": self.empty}


_JSON = {
    "own": "after_own_rationale", "given": "after_given_rationale", "carried": "carried_over",
    "token_f1": "rationale_token_f1", "exact_match": "rationale_exact_match",
}  # fmt: skip


def chained(own: Values, thoughts: Sequence[Thought], score: str) -> Chained:
    """`own`: what the answers after own rationales are worth by that score; the others are in the thoughts."""
    given = np.array([each.given_scores.get(score, math.nan) for each in thoughts])
    f1 = np.array([each.rationale_scores["token_f1"] for each in thoughts])
    count = len(thoughts)
    found = estimates({"carried": (difference_of(mean_of(given), mean_of(own)), count), "f1": (mean_of(f1), count)}, count)
    exact = share(sum(each.rationale_scores["exact_match"] for each in thoughts), count)
    unended, empty = sum(not each.ended for each in thoughts), sum(not each.rationale for each in thoughts)
    return Chained(share_of(own), share_of(given), found["carried"], found["f1"], exact, unended, empty)


def rationale_scores(own: str, expected: str) -> dict[str, float]:
    return {"token_f1": token_f1(own, expected), "exact_match": exact_match(own, expected)}


# How they are asked


def is_chain(question: Question) -> bool:
    """Whether it is answered in two turns: first a rationale, then, after the cue, the answer."""
    return bool(question.cue_tokens)


def longest_rationale(questions: Sequence[Question]) -> int:
    """So many tokens a model may write: twice as many as the data's longest has."""
    return 2 * max((len(each.rationale_tokens) for each in questions), default=0) + 1


def after(question: Question, rationale: Sequence[int]) -> Question:
    """The question with a rationale, token by token as it was written, and the cue that asks for the answer."""
    return replace(question, prompt=(*question.prompt, *rationale, *question.cue_tokens)) if is_chain(question) else question


def after_given(question: Question) -> Question:
    return after(question, question.rationale_tokens)


def up_to_cue(question: Question, tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """A rationale as it was written, up to where the model wrote the cue itself and went on to its answer: models that were
    trained on whole answers do."""
    sign = tokenizer.decode(list(question.cue_tokens)).strip()
    whole = tokenizer.decode(list(tokens))
    if not sign or sign not in whole:
        return list(tokens)
    before = whole[: whole.index(sign)].rstrip()
    ends = [end for end in range(len(tokens) + 1) if before.startswith(tokenizer.decode(list(tokens[:end])).rstrip())]
    return list(tokens[: max(ends)])


def thoughts(
    questions: Sequence[Question], rationales: Mapping[int, Sequence[int]], most: int, tokenizer: Any
) -> dict[int, tuple[str, bool, list[int]]]:
    """(text, whether it ended, tokens) of what was written for each question."""
    found = {}
    for number, tokens in rationales.items():
        kept = up_to_cue(questions[number], tokens, tokenizer)
        ended = len(tokens) < most or len(kept) < len(tokens)
        found[number] = (tokenizer.decode(kept).strip(), ended, kept)
    return found
