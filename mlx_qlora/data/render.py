"""A row becomes an `Example`: tokens, and the weight of each as a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_qlora.data.sources import Row
from mlx_qlora.errors import DataError, listed
from mlx_qlora.records import Example

Tokenizer = Any  # mlx-lm's TokenizerWrapper, or one of transformers
Message = dict[str, str]

_ROLES = ("system", "user", "assistant")
_FORMATS = '{"messages": [...]}, {"prompt": "...", "completion": "..."} or {"text": "..."}'


class RowError(ValueError):
    """Why a row can't be rendered; the place is added by `examples`."""


@dataclass(frozen=True)
class Account:
    """What became of the rows."""

    rows: int
    formats: tuple[str, ...]
    tokens: int
    supervised_tokens: int
    longest: int
    cut_rows: int  # longer than max_seq_length
    cut_supervised_tokens: int
    without_target: int  # rows left out: nothing in them would be trained


def examples(rows: Sequence[Row], tokenizer: Tokenizer, max_seq_length: int) -> tuple[tuple[Example, ...], Account]:
    """The examples and the account of what they cost; all rows that can't be rendered in one error."""
    made: list[Example] = []
    problems: list[str] = []
    formats: dict[str, None] = {}
    cut_rows = cut_supervised = without_target = 0
    for row in rows:
        try:
            name, example = render(row, tokenizer)
        except RowError as error:
            problems.append(f"{row.id}: {error}")
            continue
        formats[name] = None
        if len(example.tokens) > max_seq_length:
            cut_rows += 1
            cut_supervised += int(np.count_nonzero(example.weights[max_seq_length:]))
            example = Example(example.id, example.tokens[:max_seq_length], example.weights[:max_seq_length])
        if example.weights.any():
            made.append(example)
        else:
            without_target += 1
    if problems:
        raise DataError(listed(problems))
    if not made:
        raise DataError(
            f"{rows[0].id.split(':')[0]}: none of the {len(rows)} rows has anything to train within max_seq_length "
            f"{max_seq_length} ({cut_rows} are longer). Raise max_seq_length, or look whether the answers are there."
        )
    account = Account(
        rows=len(rows),
        formats=tuple(formats),
        tokens=sum(len(example.tokens) for example in made),
        supervised_tokens=sum(int(np.count_nonzero(example.weights)) for example in made),
        longest=max(len(example.tokens) for example in made),
        cut_rows=cut_rows,
        cut_supervised_tokens=cut_supervised,
        without_target=without_target,
    )
    return tuple(made), account


def render(row: Row, tokenizer: Tokenizer) -> tuple[str, Example]:
    """(name of the format, example) of one row."""
    for name, maker in _MAKERS.items():
        if name in row.value:
            tokens, weights = maker(row.value, tokenizer)
            weights[0] = 0.0  # nothing comes before the first token
            return name, Example(row.id, np.array(tokens, np.int32), np.array(weights, np.float32))
    found = ", ".join(map(repr, row.value)) or "no keys"
    raise RowError(f"{found} came, {_FORMATS} is expected.")


@dataclass(frozen=True)
class Question:
    """What a model is asked, as text and as the tokens that lead it to answer, and the answer in the data."""

    id: str
    text: str
    prompt: tuple[int, ...]
    expected: str


def question(row: Row, tokenizer: Tokenizer) -> Question | None:
    """The last question of a row and its answer; nothing where a row ends otherwise."""
    if not {"messages", "prompt"} & row.value.keys():
        return None
    messages = conversation(row.value)
    *before, last = messages
    if last["role"] != "assistant" or not before:
        return None
    if getattr(tokenizer, "chat_template", None):
        prompt = chat_tokens(before, tokenizer, ask=True)
    else:
        prompt = _with_bos(tokenizer.encode(before[-1]["content"], add_special_tokens=False), tokenizer)
    return Question(row.id, before[-1]["content"], tuple(prompt), last["content"])


def conversation(value: dict[str, Any]) -> list[Message]:
    """The checked messages of a row with `messages`, or with `prompt` and `completion`."""
    if "messages" not in value:
        return [
            {"role": "user", "content": _text(value, "prompt")},
            {"role": "assistant", "content": _text(value, "completion")},
        ]
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise RowError(f"messages: {messages!r:.60} came, a list of at least one message is expected.")
    for place, message in enumerate(messages):
        _check_message(message, f"messages[{place}]")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("messages: no message of the assistant, so there is nothing to train.")
    return messages


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, dict):
        raise RowError(f'{place}: {message!r:.60} came, an object {{"role": ..., "content": ...}} is expected.')
    if message.get("role") not in _ROLES:
        raise RowError(f"{place}.role: {message.get('role')!r} came, one of {', '.join(_ROLES)} is expected.")
    if not isinstance(message.get("content"), str):
        raise RowError(f"{place}.content: {message.get('content')!r:.60} came, a text is expected.")
    if message["role"] == "assistant" and not message["content"].strip():
        raise RowError(f"{place}.content: an empty answer; take the row out or give its answer.")


def _text(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise RowError(f"{key}: {text!r:.60} came, a text is expected.")
    if key != "prompt" and not text.strip():
        raise RowError(f"{key}: an empty text; there is nothing to train.")
    return text


def _from_text(value: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    tokens = _with_bos(tokenizer.encode(_text(value, "text"), add_special_tokens=False), tokenizer)
    tokens.append(tokenizer.eos_token_id)
    return tokens, [1.0] * len(tokens)


def _from_prompt(value: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    if getattr(tokenizer, "chat_template", None):
        return _from_messages(value, tokenizer)
    prompt = _with_bos(tokenizer.encode(_text(value, "prompt"), add_special_tokens=False), tokenizer)
    answer = tokenizer.encode(_text(value, "completion"), add_special_tokens=False)
    answer.append(tokenizer.eos_token_id)
    return prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)


def _with_bos(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    bos = tokenizer.bos_token_id
    return list(tokens) if bos is None else [bos, *tokens]


def _from_messages(value: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Every turn of the assistant is trained: what the template adds for it after the prompt that leads to it."""
    messages = conversation(value)
    if not getattr(tokenizer, "chat_template", None):
        raise RowError(
            "messages: this model's tokenizer has no chat template. Take an instruct model, "
            'or give the rows as {"prompt": ..., "completion": ...} or {"text": ...}.'
        )
    whole = chat_tokens(messages, tokenizer)
    weights = [0.0] * len(whole)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = _common(chat_tokens(messages[:turn], tokenizer, ask=True), whole, turn)
            end = _common(chat_tokens(messages[: turn + 1], tokenizer), whole, turn)
            weights[begin:end] = [1.0] * (end - begin)
    return whole, weights


def _common(prefix: list[int], whole: list[int], turn: int) -> int:
    """The length of a prefix, once it is certain that it is one."""
    if whole[: len(prefix)] != prefix:
        raise RowError(
            f"messages[{turn}]: the chat template writes the conversation up to this turn in another way once more "
            "turns follow, so what the model would see here can't be told. Cut the conversation before the next turn."
        )
    return len(prefix)


def chat_tokens(messages: Sequence[Message], tokenizer: Tokenizer, *, ask: bool = False) -> list[int]:
    """The tokens of a conversation by the tokenizer's template; `ask` adds what leads the model to answer."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template raises whatever its author chose
        raise RowError(f"messages: the model's chat template refuses this conversation: {error}") from error
    return list(tokenizer.encode(text, add_special_tokens=False))


_Maker = Callable[[dict[str, Any], Tokenizer], tuple[list[int], list[float]]]
_MAKERS: dict[str, _Maker] = {"messages": _from_messages, "prompt": _from_prompt, "text": _from_text}
