"""A model's answers to questions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.data.render import Question
from mlx_qlora.engine.room import Room
from mlx_qlora.look.evaluation.chains import after, is_chain, longest_rationale, thoughts
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
    top_p: float = 1.0  # of a drawn token: the likeliest ones, whose probabilities make up so much


# Called with the numbers of questions and their answers, as they come.
Tell = Callable[[Mapping[int, str]], None]
_BUDGET = 16_384  # tokens of prompts and answers that are held at once: 2 GB of keys and values in a 7B Mistral
_MOST = 32  # answers at once
_TURNS = 4  # so many times as many questions are handed over together: what waits takes the place of what is done
_WORTH = 16  # a shorter beginning is not worth a pass of its own
Tokens = list[int]


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
    """Greedy answers, in the order of the questions; of a chain of thought after a rationale of the model's own."""
    thought = {number: each for number, each in enumerate(questions) if is_chain(each)}
    if thought:
        most, written = longest_rationale([*thought.values()]), dict[int, list[int]]()
        asked, ids = [each.prompt for each in thought.values()], [each.id for each in thought.values()]
        write(model, tokenizer, asked, Asking(most), written.update, lambda rows: None, ids)
        own = dict(zip(thought, (written[place] for place in range(len(thought))), strict=True))
        found = thoughts(questions, own, most, tokenizer)
        questions = [after(each, found[number][2]) if number in found else each for number, each in enumerate(questions)]
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
    """Answer what the prompts of questions ask; see `write`."""

    def tell_text(found: Mapping[int, Tokens]) -> None:
        tell({number: tokenizer.decode(tokens).strip() if tokens else "" for number, tokens in found.items()})

    ids = [question.id for question in questions]
    write(model, tokenizer, [question.prompt for question in questions], how, tell_text, told, ids)


def write(
    model: nn.Module,
    tokenizer: Any,
    asked: Sequence[Sequence[int]],
    how: Asking,
    tell: Callable[[Mapping[int, Tokens]], None],
    told: Callable[[int], None],
    ids: Sequence[str],
) -> None:
    """What follows prompts, without the token that ends it, as `answer` finds it; after an empty prompt, nothing. What is drawn
    follows from the seed and the id."""
    tell({number: [] for number, prompt in enumerate(asked) if not prompt})
    answer(model, tokenizer, list(map(list, asked)), how, lambda number, tokens: tell({number: tokens}), told, names=ids)


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Tokens],
    how: Asking,
    tell: Callable[[int, Tokens], None],
    told: Callable[[int], None] = lambda rows: None,
    *,
    names: Sequence[str],
    known: Collection[int] = (),
    settled: Callable[[], None] = lambda: None,
) -> None:
    """Answer prompts many at a time, the shortest first, so that little is padded; what all of them begin with goes through
    the model once, and so does a prompt that comes several times. Where memory ends, fewer are answered at once, and `told`
    hears how many tokens. An answer that has `how.max_tokens` was cut off there: an end would have been one more.

    They come in groups, after each of which `settled` is called. Numbers in `known` are not asked again; where these are
    whole groups, the others get what they would have got, to the last digit.
    """
    model.eval()
    waiting = sorted((number for number, prompt in enumerate(prompts) if prompt), key=lambda number: len(prompts[number]))
    if not waiting:
        return
    share = can_share(model) == ""
    shared = _shared([prompts[number] for number in waiting]) if share else 0
    cache = _filled_cache(model, prompts[waiting[0]][:shared]) if shared >= _WORTH else None
    begin = shared if cache else 0
    room = Room(_BUDGET, tell=told)
    done = set(known)

    def next_ones(halvings: int) -> None:
        """A group; answers that came before memory ended are there."""
        left = [number for number in waiting if number not in done]
        if not left:  # memory ended after the last one
            return
        rows = _rows(prompts, left, how, _BUDGET >> halvings)
        now = left[: rows * _TURNS]
        own = [prompts[each][begin:] for each in now]
        for place, tokens in continuations(model, tokenizer, own, cache, how, rows, [names[each] for each in now], share):
            done.add(now[place])
            tell(now[place], tokens)

    while not done.issuperset(waiting):
        room.within(next_ones)
        settled()


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
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Tokens],
    cache: list[Any] | None,
    how: Asking,
    rows: int,
    names: Sequence[str] = (),
    share: bool = False,
) -> Iterator[tuple[int, Tokens]]:
    """(number of the prompt, tokens of its answer) as they come to an end; `rows` at once. With names, what is drawn for a
    prompt follows from its own; `share`: what is computed of a prompt may serve it again."""
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        sampler=make_sampler(how.temperature, top_p=how.top_p) if how.temperature else None,
        completion_batch_size=rows,
        prefill_batch_size=min(8, rows),
    )
    begun = _begun(model, prompts, cache, share)
    samplers = [_sampler(how, name) for name in names] if how.temperature and names else None
    caches = [each for _, each in begun] if any(each for _, each in begun) else None  # merged, and not written to
    uids = generator.insert([left for left, _ in begun], [how.max_tokens] * len(prompts), caches, samplers=samplers)
    numbers = {uid: number for number, uid in enumerate(uids)}
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


def _begun(
    model: nn.Module, prompts: Sequence[Tokens], cache: list[Any] | None, share: bool
) -> list[tuple[Tokens, list[Any] | None]]:
    """(what of each prompt is not computed yet, the cache of what is)."""
    often = Counter(map(tuple, prompts)) if share else Counter[tuple[int, ...]]()
    made = {
        prompt: _filled_cache(model, prompt[:-1], cache)
        for prompt, times in often.items()
        if times > 1 and len(prompt) > _WORTH
    }
    own = [(prompt, made.get(tuple(prompt))) for prompt in prompts]
    return [(prompt[-1:], filled) if filled else (prompt, cache) for prompt, filled in own]


def _sampler(how: Asking, name: str) -> Callable[[mx.array], mx.array]:
    """Draws the tokens of one answer, by keys that follow from the seed and the answer's name: neither the other answers of
    the batch nor an interruption change them."""
    from mlx_lm.sample_utils import apply_top_p

    first = hashlib.blake2b(f"{how.seed} {name}".encode("utf-8", "replace"), digest_size=6).digest()
    keys = count(int.from_bytes(first, "big") << 16)

    def draw(logprobs: mx.array) -> mx.array:
        likely = apply_top_p(logprobs, how.top_p) if how.top_p < 1 else logprobs
        # In float32: with the steps of half precision, tokens would be drawn that are likelier than they are.
        return mx.random.categorical(likely.astype(mx.float32) / how.temperature, key=mx.random.key(next(keys)))

    return draw


def _shared(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own, to be answered."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def _filled_cache(model: nn.Module, tokens: Sequence[int], before: list[Any] | None = None) -> list[Any]:
    """What a model keeps of tokens; `before`: of those that come before them."""
    from mlx_lm.models.cache import make_prompt_cache

    cache: list[Any] = deepcopy(before) if before else make_prompt_cache(model)
    model(mx.array([list(tokens)]), cache=cache)
    mx.eval([each.state for each in cache])
    return cache


def score(pairs: Sequence[tuple[str, str]]) -> Scores:
    """Of (answer, expected) pairs."""
    exact = sum(exact_match(*pair) for pair in pairs)
    return Scores(sum(token_f1(*pair) for pair in pairs) / len(pairs), exact / len(pairs))
