"""Rows become prompts, whether they have answers or not; and a prompt with the teacher's answer becomes a row again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_qlora.data.formats import Meaning, Pair, Plain, RowError, Talk, Turn, understand
from mlx_qlora.data.part import Split
from mlx_qlora.data.render import Account, Refusals, Renderer, as_talk, refused
from mlx_qlora.data.sources import SPLITS, BadRow, File, Row, Source, SourceConfig, read
from mlx_qlora.errors import DataError

# Where a row has its answer, by where it has its question.
_ANSWERS = {"prompt": "completion", "instruction": "output", "question": "answer"}
_STAND_IN = "?"  # for an answer that a row lacks, so that the row is read as any other; it goes no further
# What of a row the teacher's answer takes the place of, or belongs to the answer that was there.
_TAKEN = {
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "question", "answer",
    "text", "system", "train", "rationale",
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """What the teacher is asked, and the row that it is of."""

    id: str
    text: str  # the last thing that is said
    tokens: tuple[int, ...]
    expected: str  # the answer in the data; "": there is none
    row: Mapping[str, Any] = field(repr=False)  # as it stands in the file
    said: Talk | str = field(repr=False)  # the conversation up to the answer, or the text that goes on


@dataclass(frozen=True)
class Prompts:
    """All that are asked."""

    asked: list[Prompt]
    again: int  # rows whose prompts are those of others: each is asked once
    malformed: int  # rows that can't be used
    own_system: int  # rows that have a system message of their own


def files_of(sources: Iterable[Source], split: Split | None) -> tuple[str, tuple[File, ...]]:
    """(split, its files); without a name those of train, or of what there is."""
    sources = tuple(sources)
    there = [each for each in SPLITS if any(each in source.files for source in sources)]
    wanted = split or ("train" if "train" in there else there[0])
    if wanted not in there:
        names = ", ".join(source.name for source in sources)
        raise DataError(f"--split {wanted}: {names} has no {wanted} rows, but {' and '.join(there)}.")
    return wanted, tuple(file for source in sources for file in source.files.get(wanted, ()))


def prompts_of(files: Iterable[File], renderer: Renderer, config: SourceConfig, system: str, most: int | None) -> Prompts:
    """The first `most` prompts of files; `system` comes first in those that have no system message."""
    asked: dict[tuple[int, ...], Prompt] = {}
    account, refusals = Account(), Refusals(stop=config.malformed == "raise")
    again = own = 0
    for row in read(files):
        if most is not None and len(asked) == most:
            break
        account.rows += 1
        try:
            one, had = _prompt(row, renderer, config, system)
        except RowError as error:
            refusals.add(row.id, str(error))
            continue
        own += had
        again += one.tokens in asked
        asked.setdefault(one.tokens, one)
    account.malformed, account.refused = refusals.count, refusals.listed
    if reason := refused(account, config):
        raise DataError(reason)
    if not asked:
        raise DataError(f"{', '.join(file.name for file in files)}: no row is in it, so there is nothing to ask.")
    return Prompts(list(asked.values()), again, refusals.count, own)


def _prompt(row: Row | BadRow, renderer: Renderer, config: SourceConfig, system: str) -> tuple[Prompt, bool]:
    """(the prompt of a row, whether it has a system message of its own)."""
    if isinstance(row, BadRow):
        raise RowError(row.reason)
    meaning, expected = _asked(row, config)
    if isinstance(meaning, Pair) and not renderer.pairs_are_chats and not system:
        tokens = renderer.pair_prompt(meaning.prompt)
        if not tokens:
            raise RowError("prompt: an empty text; there is nothing to ask.")
        return Prompt(row.id, meaning.prompt, tuple(tokens), expected, row.value, meaning.prompt), False
    talk = as_talk(meaning) if isinstance(meaning, Pair) else meaning
    turns = talk.turns if talk.turns[-1].role != "assistant" else talk.turns[:-1]
    if not any(turn.role == "user" for turn in turns):
        raise RowError("no message of the user comes before the answer, so there is nothing to ask.")
    had = turns[0].role == "system"
    if system and not had:
        turns = (Turn("system", {"role": "system", "content": system}), *turns)
    talk = replace(talk, turns=turns)
    return Prompt(row.id, turns[-1].content, tuple(renderer.prompt(talk)), expected, row.value, talk), had


def _asked(row: Row, config: SourceConfig) -> tuple[Pair | Talk, str]:
    """(what a row means, the answer that it has). A row without an answer is read as if it had one."""
    try:
        meaning = understand(row, config.format, config.fields)[1]
        expected = _answer(meaning)
    except RowError:
        filled = _filled(row.value, config.fields)
        if filled == row.value:
            raise
        meaning, expected = understand(replace(row, value=filled), config.format, config.fields)[1], ""
    if isinstance(meaning, Plain):
        raise RowError("a text came; a prompt, a question or a conversation is expected, which the teacher can answer.")
    return meaning, expected


def _answer(meaning: Meaning) -> str:
    if isinstance(meaning, Pair):
        return meaning.completion
    if isinstance(meaning, Talk) and meaning.turns[-1].role == "assistant":
        return meaning.turns[-1].content
    return ""


def _filled(value: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """A row with something where its answer is missing."""
    for asks, answers in _ANSWERS.items():
        column = fields.get(answers, answers)
        lacks = value.get(column) is None or not str(value[column]).strip()
        if (asks in value or fields.get(asks) in value) and lacks:
            return value | {column: _STAND_IN}
    for key, message in (
        ("messages", {"role": "assistant", "content": _STAND_IN}),
        ("conversations", {"from": "gpt", "value": _STAND_IN}),
    ):
        column = fields.get(key, key)
        talk = _list(value.get(column))
        if isinstance(talk, list) and talk:
            return value | {column: [*talk, message]}
    return value


def _list(value: Any) -> Any:
    """A list, which stands as JSON in a table."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


# The way back


def answered(prompt: Prompt, answer: str, number: int, fields: Mapping[str, str], without_system: str = "") -> dict[str, Any]:
    """The row of an answer: a prompt with its completion where the data has such rows, else messages; with what the row held
    besides. Earlier answers of a conversation are not the teacher's, so they are not trained.

    `without_system`: the text of a system message that the teacher saw and the student does not.
    """
    row = prompt.row
    others = {key: value for key, value in row.items() if key not in _TAKEN and key not in fields.values()}
    of = {"source": f"{prompt.id}#{number}" if number > 1 else prompt.id}
    return _spoken(prompt, answer, fields, without_system) | of | others


def _spoken(prompt: Prompt, answer: str, fields: Mapping[str, str], without_system: str) -> dict[str, Any]:
    if isinstance(prompt.said, str):
        return {"prompt": prompt.said, "completion": answer}
    turns = prompt.said.turns
    if turns[0].role == "system" and without_system and turns[0].content == without_system:
        turns = turns[1:]
    is_pair = "messages" not in prompt.row and (fields.get("prompt") or "prompt") in prompt.row
    if is_pair and [turn.role for turn in turns] == ["system", "user"]:
        return {"system": turns[0].content, "prompt": turns[1].content, "completion": answer}
    if is_pair and [turn.role for turn in turns] == ["user"]:
        return {"prompt": turns[0].content, "completion": answer}
    messages = [{**turn.shown, "train": False} if turn.role == "assistant" else dict(turn.shown) for turn in turns]
    tools = {"tools": list(prompt.said.tools)} if prompt.said.tools else {}
    return {"messages": [*messages, {"role": "assistant", "content": answer}], **tools}
