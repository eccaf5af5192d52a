"""Texts that a model writes while it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.data.corpus import Corpus
from mlx_qlora.data.formats import Talk, Turn
from mlx_qlora.data.render import Renderer
from mlx_qlora.errors import require
from mlx_qlora.files import json_lines
from mlx_qlora.look.evaluation.generate import Asking, continuations
from mlx_qlora.records import Example
from mlx_qlora.run import disk

NAME = "samples.jsonl"
_FIRST_WORDS = 8
_FIRST_TOKENS = 32  # at most, where words are not told apart by spaces


@dataclass(frozen=True)
class SampleConfig:
    """Texts that are written while training, for a person to read."""

    sample_every: int | None = None
    """Updates between samples; without a number at each validation of raw text, and never in fine-tuning; 0: never."""
    sample_prompts: tuple[str, ...] = ()
    """What they begin with; without it with the beginning of a text, and with the first words of a validation text."""
    sample_tokens: int = 64
    """Longest sample."""
    sample_temperature: float = 0.8
    """0 takes the likeliest token always."""

    def __post_init__(self) -> None:
        every, most, heat = self.sample_every, self.sample_tokens, self.sample_temperature
        require(
            (every is None or every >= 0, "sample_every", every, "a whole number from 0 (0: never)"),
            (most >= 1, "sample_tokens", most, "a whole number from 1"),
            (0 <= heat < 100, "sample_temperature", heat, "a number from 0"),
        )

    def due(self, step: int, last: int, validated: bool) -> bool:
        """Whether samples belong after an update; `validated`: there, and on raw text."""
        if self.sample_every is None:
            return validated
        return self.sample_every > 0 and (step % self.sample_every == 0 or step == last)


class Prompt(NamedTuple):
    """What a sample begins with, and the tokens that the model goes on from."""

    text: str
    tokens: tuple[int, ...]


def prompts_of(config: SampleConfig, corpus: Corpus, valid: Sequence[Example]) -> list[Prompt]:
    """Those that are wanted. Where the data are conversations, they are questions in one; without any, that is the first of
    the validation rows, and of raw text the beginning of a text and the first words of one."""
    renderer = corpus.renderer
    formats = corpus.accounts["valid" if "valid" in corpus.accounts else "train"].formats
    rows = corpus.windows is None and any(count for name, count in formats.items() if name != "text")
    asked = corpus.questions(1) if rows else []
    if config.sample_prompts:
        chats = bool(asked) and renderer.pairs_are_chats
        return [_asked(renderer, text) if chats and text else _begun(renderer, text) for text in config.sample_prompts]
    if asked:
        return [Prompt(asked[0].text, asked[0].prompt)]
    first = _words(renderer.tokenizer, valid[0]) if valid else ""
    return [_begun(renderer, text) for text in dict.fromkeys(("", first))]


def _asked(renderer: Renderer, text: str) -> Prompt:
    turn = Turn("user", {"role": "user", "content": text})
    return Prompt(text, tuple(renderer.prompt(Talk((turn,)))))


def _begun(renderer: Renderer, text: str) -> Prompt:
    """Raw text; where no token begins texts, what ends the one before does."""
    tokens = renderer.pair_prompt(text) if text else []
    edge = (renderer.tokenizer.bos_token_id, renderer.tokenizer.eos_token_id)
    return Prompt(text, tuple(tokens) or next((token,) for token in edge if token is not None))


def _words(tokenizer: Any, example: Example) -> str:
    """The first words of a document."""
    text = tokenizer.decode(example.tokens[:_FIRST_TOKENS].tolist(), skip_special_tokens=True).rstrip("\ufffd")
    words = text.split()
    return " ".join(words[:_FIRST_WORDS] if len(words) > _FIRST_WORDS else words[:-1] or words)


def write(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], config: SampleConfig, seed: int, step: int
) -> list[dict[str, Any]]:
    """How the model goes on from each prompt: the same for a seed and an update. Model and random numbers are afterwards as
    they were."""
    how = Asking(config.sample_tokens, config.sample_temperature)
    found: dict[int, list[int]] = {}
    with _apart(model, int(np.random.SeedSequence((seed, step)).generate_state(1)[0])):
        found.update(continuations(model, tokenizer, [list(each.tokens) for each in prompts], None, how, len(prompts)))
    return [
        {"step": step, "prompt": each.text, "text": gone_on(tokenizer, each.tokens, found[number])}
        for number, each in enumerate(prompts)
    ]


@contextmanager
def _apart(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode, and random numbers of its own."""
    state = cast(list[mx.array], mx.random.state)
    before, was_training = [np.array(key) for key in state], model.training
    mx.random.seed(seed)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for number, key in enumerate(before):
            state[number][:] = mx.array(key)


def gone_on(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """What was added to a text: a space between both is told only from the whole."""
    start, whole = (tokenizer.decode(list(each), skip_special_tokens=True) for each in (before, [*before, *tokens]))
    return str(whole[len(start) :] if whole.startswith(start) else tokenizer.decode(list(tokens), skip_special_tokens=True))


class Samples:
    """What stands in `samples.jsonl` of a run: no update twice, and none that the run has not made."""

    def __init__(self, folder: Path):
        self._path = folder / NAME

    def back_to(self, step: int) -> None:
        """The run goes on after this update; what came later, or half a line, goes."""
        if self._path.exists():
            disk.write_lines(self._path, [line for line in json_lines(self._path) if _step(line) <= step])

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        disk.append_lines(self._path, lines)


def _step(line: dict[str, Any]) -> float:
    step = line.get("step")
    return step if isinstance(step, int) else float("inf")
