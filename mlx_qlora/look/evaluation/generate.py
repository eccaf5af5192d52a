"""A model's answers to questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.data.render import Question
from mlx_qlora.engine.room import Room
from mlx_qlora.look.evaluation.scores import exact_match, token_f1
from mlx_qlora.model.trunk import can_share


@dataclass(frozen=True)
class Answered:
    """A question, the answer in the data, and what the base and the tuned model said."""

    id: str
    question: str
    expected: str
    base: str | None  # None: there was none
    tuned: str


@dataclass(frozen=True)
class Scores:
    """Means over questions, from 0 to 1."""

    token_f1: float
    exact_match: float


@dataclass(frozen=True)
class Asking:
    """How questions are asked."""

    max_tokens: int = 128
    temperature: float = 0.0  # 0: each token is the likeliest one
    seed: int = 0
    at_once: int | None = None  # answers; None: as many as memory is meant for


# Called with the numbers of questions and their answers, as they come.
Tell = Callable[[Mapping[int, str]], None]
_BUDGET = 16_384  # tokens of prompts and answers that are held at once: 2 GB of keys and values in a 7B Mistral
_MOST = 32  # answers at once
_TURNS = 4  # so many times as many questions are handed over together: what waits takes the place of what is done
_WORTH = 16  # a shorter beginning is not worth a pass of its own


def ask_both(
    model: nn.Module,
    base: AbstractContextManager[nn.Module | None],
    tokenizer: Any,
    questions: Sequence[Question],
    max_tokens: int,
) -> list[Answered]:
    """The answers of the tuned model and, if there is one, of its base, each word the likeliest one."""
    tuned = generate_answers(model, tokenizer, questions, max_tokens)
    with base as before:
        told = generate_answers(before, tokenizer, questions, max_tokens) if before else [None] * len(questions)
    return [Answered(q.id, q.text, q.expected, b, t) for q, b, t in zip(questions, told, tuned, strict=True)]


def generate_answers(model: nn.Module, tokenizer: Any, questions: Sequence[Question], max_tokens: int) -> list[str]:
    """Greedy answers, in the order of the questions."""
    answers: dict[int, str] = {}
    generate(model, tokenizer, questions, Asking(max_tokens), answers.update)
    return [answers[number] for number in range(len(questions))]


def generate(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    how: Asking,
    tell: Tell,
    told: Callable[[int], None] = lambda rows: None,
) -> None:
    """Answer questions many at a time, the shortest prompts first, so that little is padded; what all prompts begin with
    goes through the model once. Where memory ends, fewer are answered at once, and `told` hears how many tokens."""
    model.eval()
    prompts = [list(question.prompt) for question in questions]
    tell({number: "" for number, prompt in enumerate(prompts) if not prompt})  # nothing is asked, nothing is said
    waiting = sorted((number for number, prompt in enumerate(prompts) if prompt), key=lambda number: len(prompts[number]))
    if not waiting:
        return
    shared = _shared([prompts[number] for number in waiting]) if can_share(model) == "" else 0
    cache = _filled_cache(model, prompts[waiting[0]][:shared]) if shared >= _WORTH else None
    begin = shared if cache else 0
    room = Room(_BUDGET, tell=told)
    mx.random.seed(how.seed)
    done: set[int] = set()

    def answer(halvings: int) -> None:
        """The next questions; answers that came before memory ended are there."""
        left = [number for number in waiting if number not in done]
        if not left:  # memory ended after the last one
            return
        rows = _rows(prompts, left, how, _BUDGET >> halvings)
        now = left[: rows * _TURNS]
        for place, tokens in continuations(model, tokenizer, [prompts[each][begin:] for each in now], cache, how, rows):
            done.add(now[place])
            tell({now[place]: tokenizer.decode(tokens).strip()})

    while len(done) < len(waiting):
        room.within(answer)


def _rows(prompts: Sequence[Sequence[int]], waiting: Sequence[int], how: Asking, budget: int) -> int:
    """How many of the questions that come next fit into the budget at once."""
    rows = how.at_once or _MOST
    while rows > 1:
        longest = len(prompts[waiting[: rows * _TURNS][-1]]) + how.max_tokens
        if rows * longest <= budget or (how.at_once and budget == _BUDGET):
            break
        rows -= 1
    return rows


def continuations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], cache: list[Any] | None, how: Asking, rows: int
) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, tokens of its answer) as they come to an end; `rows` at once."""
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        sampler=make_sampler(how.temperature) if how.temperature else None,
        completion_batch_size=rows,
        prefill_batch_size=min(8, rows),
    )
    caches = [cache] * len(prompts) if cache else None  # merged into a batch, and not written to
    numbers = {uid: number for number, uid in enumerate(generator.insert(prompts, [how.max_tokens] * len(prompts), caches))}
    tokens: dict[int, list[int]] = {uid: [] for uid in numbers}
    try:
        while said := generator.next_generated():
            for one in said:
                if one.finish_reason != "stop":
                    tokens[one.uid].append(one.token)
                if one.finish_reason is not None:
                    yield numbers[one.uid], tokens[one.uid]
    finally:
        generator.close()


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
    exact = sum(exact_match(*pair) for pair in pairs)
    return Scores(sum(token_f1(*pair) for pair in pairs) / len(pairs), exact / len(pairs))
