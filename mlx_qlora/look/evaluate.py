"""Scores: the loss of a model on batches, and its answers to questions."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.data.render import Question
from mlx_qlora.model import lora
from mlx_qlora.model.trunk import can_share
from mlx_qlora.records import Batch, LossSum


def mean_loss(model: nn.Module, objective: Callable[[nn.Module, Batch], LossSum], batches: Iterable[Batch]) -> float:
    """The objective over all batches, weighted by tokens like in training, without dropout."""
    was_training = model.training
    model.eval()
    total = weight = 0.0
    try:
        for batch in batches:
            loss = objective(model, batch)
            total += cast(float, loss.total.item())
            weight += cast(float, loss.weight.item())
    finally:
        model.train(was_training)
    return total / weight if weight else math.nan


@dataclass(frozen=True)
class Answered:
    """A question, the answer in the data, and what the base and the tuned model said."""

    id: str
    question: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Scores:
    """Means over questions, from 0 to 1."""

    token_f1: float
    exact_match: float


def ask_both(model: nn.Module, tokenizer: Any, questions: Sequence[Question], max_tokens: int) -> list[Answered]:
    """The answers of the model with its adapters and without them, each word the likeliest one."""
    tuned = generate_answers(model, tokenizer, questions, max_tokens)
    adapters = lora.detach(model)
    try:
        base = generate_answers(model, tokenizer, questions, max_tokens)
    finally:
        lora.reattach(model, adapters)
    return [Answered(q.id, q.text, q.expected, b, t) for q, b, t in zip(questions, base, tuned, strict=True)]


def generate_answers(model: nn.Module, tokenizer: Any, questions: Sequence[Question], max_tokens: int) -> list[str]:
    """Greedy answers, many at a time; what all prompts begin with goes through the model once."""
    from mlx_lm import batch_generate

    model.eval()
    prompts = [list(question.prompt) for question in questions]
    shared = _shared(prompts) if can_share(model) == "" else 0
    caches = None
    if shared >= _WORTH:
        caches = [_filled_cache(model, prompts[0][:shared])] * len(prompts)  # merged into a batch, and not written to
    response = batch_generate(model, tokenizer, [each[shared:] if caches else each for each in prompts], caches, max_tokens)
    return [text.strip() for text in response.texts]


_WORTH = 16  # a shorter beginning is not worth a pass of its own


def _shared(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own, to be answered."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def _filled_cache(model: nn.Module, tokens: Sequence[int]) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    cache: list[Any] = make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    mx.eval([each.state for each in cache])
    return cache


def score(pairs: Sequence[tuple[str, str]]) -> Scores:
    """Of (answer, expected) pairs."""
    exact = sum(words(answer) == words(expected) for answer, expected in pairs)
    return Scores(sum(token_f1(*pair) for pair in pairs) / len(pairs), exact / len(pairs))


def words(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


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
