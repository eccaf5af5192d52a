"""What a row means: a conversation, a prompt with its completion, or plain text; checked, with the reason where it is none.

All chat formats become the same `Talk`, so that everything downstream knows one of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from mlx_qlora.data.sources import Row

Format = Literal["auto", "messages", "sharegpt", "prompt", "alpaca", "question", "input", "text"]
ROLES = ("system", "user", "assistant", "tool")
# [begin, end) in characters of a message's content, and the weight there.
MarkedSpan = tuple[int, int, float]
Marks = bool | tuple[MarkedSpan, ...] | None


class RowError(ValueError):
    """Why a row can't be used; who reads the rows adds where it stands."""


@dataclass(frozen=True)
class Turn:
    """A message. `shown` is what the chat template gets; weight and marks say how it is trained."""

    role: str
    shown: Mapping[str, Any]
    weight: float = 1.0
    marks: Marks = None  # whether, or where, it is trained, if the row says so

    @property
    def content(self) -> str:
        return str(self.shown.get("content") or "")


@dataclass(frozen=True)
class Talk:
    """A conversation, and the tools that the assistant may call."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    weight: float = 1.0
    rationale: Any = None  # what stands in the field of this name, beside the last answer


@dataclass(frozen=True)
class Pair:
    """A prompt and what follows it."""

    prompt: str
    completion: str
    weight: float = 1.0
    marks: Marks = None
    rationale: Any = None


@dataclass(frozen=True)
class Plain:
    """Text that is trained as it stands."""

    text: str
    weight: float = 1.0
    marks: Marks = None


Meaning = Talk | Pair | Plain


def understand(row: Row, format: Format = "auto", fields: Mapping[str, str] | None = None) -> tuple[str, Meaning]:
    """(name of the format, what the row means).

    >>> name, talk = understand(Row("x:1", {"instruction": "Add.", "input": "2 and 2", "output": "4"}))
    >>> name, [(turn.role, turn.content) for turn in talk.turns]
    ('alpaca', [('user', 'Add.\\n\\n2 and 2'), ('assistant', '4')])
    """
    value = _renamed(row.value, fields or {})
    name = _recognise(value) if format == "auto" else format
    meaning = _READERS[name](value)
    if isinstance(meaning, Talk) and (name in ("messages", "sharegpt")) and "train" in value:
        marks = _marks(value["train"], "train")
        if isinstance(marks, tuple):
            raise RowError("train: spans belong on a message; on the row of a conversation true or false is expected.")
        meaning = (
            replace(meaning, turns=tuple(replace(turn, marks=False) for turn in meaning.turns)) if marks is False else meaning
        )
    if value.get("rationale") not in (None, "") and not isinstance(meaning, Plain):
        meaning = replace(meaning, rationale=value["rationale"])
    return name, replace(meaning, weight=_weight(value["weight"], "weight")) if "weight" in value else meaning


# name: (the keys by which it is known, an example)
_KNOWN_BY: dict[str, tuple[tuple[str, ...], str]] = {
    "messages": (("messages",), '{"messages": [...]}'),
    "sharegpt": (("conversations",), '{"conversations": [...]}'),
    "prompt": (("prompt", "completion"), '{"prompt": "...", "completion": "..."}'),
    "alpaca": (("instruction", "output"), '{"instruction": "...", "output": "..."}'),
    "question": (("question", "answer"), '{"question": "...", "answer": "..."}'),
    "input": (("target", "input"), '{"input": "...", "target": "..."}'),
    "text": (("text",), '{"text": "..."}'),
}


def _recognise(value: Mapping[str, Any]) -> str:
    for name, (keys, _) in _KNOWN_BY.items():
        if all(key in value for key in keys):
            return name
    for name, (keys, _) in _KNOWN_BY.items():  # one key of two: the reader says which is missing
        if keys[0] in value:
            return name
    found = ", ".join(repr(key) for key in list(value)[:8]) or "no keys"
    *others, last = (example for _, example in _KNOWN_BY.values())
    raise RowError(f"{found} came, {', '.join(others)} or {last} is expected. Columns of other names: --fields.")


_OPTIONAL = ("input", "system", "tools", "weight", "train", "rationale")  # a row may lack them


def _renamed(value: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The row with its columns under the names that are known here."""
    if not fields:
        return value
    given = {own: value[theirs] for own, theirs in fields.items() if theirs in value}
    if lacking := [theirs for own, theirs in fields.items() if not {own, theirs} & value.keys() and own not in _OPTIONAL]:
        found = ", ".join(repr(key) for key in list(value)[:8]) or "no keys"
        raise RowError(f"fields: no column {', '.join(map(repr, lacking))} is here; {found} came.")
    gone = {theirs for own, theirs in fields.items() if theirs in value and theirs != own}
    return {key: each for key, each in value.items() if key not in gone} | given


# The formats


def _messages(value: Mapping[str, Any]) -> Talk:
    return _with_system(value, _list(value, "messages"), "messages", "role", "content")


def _sharegpt(value: Mapping[str, Any]) -> Talk:
    return _with_system(value, _list(value, "conversations"), "conversations", "from", "value")


def _with_system(value: Mapping[str, Any], messages: list[Any], key: str, role: str, content: str) -> Talk:
    """A conversation whose system prompt may stand beside it."""
    system = value.get("system")
    given = [{role: "system", content: system}] if isinstance(system, str) and system.strip() else []
    return _talk(value, [*given, *messages], key, first=-len(given))


def _prompt(value: Mapping[str, Any]) -> Meaning:
    if value.get("system"):
        return _exchange(value, _text(value, "prompt"), _text(value, "completion"))
    return Pair(_text(value, "prompt", empty=True), _text(value, "completion"), marks=_marks(value.get("train"), "train"))


def _alpaca(value: Mapping[str, Any]) -> Talk:
    instruction, given = _text(value, "instruction"), value.get("input")
    if given is not None and not isinstance(given, str):
        raise RowError(f"input: {_shown(given)} came, a text is expected.")
    question = f"{instruction}\n\n{given}" if given and given.strip() else instruction
    before: list[Turn] = []
    for number, pair in enumerate(_from_json(value.get("history")) or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{number}]: {_shown(pair)} came, a question with its answer is expected.")
        asked, answer = (_text({"history": text}, "history") for text in pair)
        before += [_said("user", asked), _said("assistant", answer)]
    talk = _exchange(value, question, _text(value, "output"))
    place = len(talk.turns) - 2
    return replace(talk, turns=(*talk.turns[:place], *before, *talk.turns[place:]))


def _said(role: str, content: str) -> Turn:
    return Turn(role, {"role": role, "content": content})


def _question(value: Mapping[str, Any]) -> Talk:
    return _exchange(value, _text(value, "question"), _text(value, "answer"))


def _input(value: Mapping[str, Any]) -> Talk:
    return _exchange(value, _text(value, "input"), _text(value, "target"))


def _plain(value: Mapping[str, Any]) -> Plain:
    return Plain(_text(value, "text"), marks=_marks(value.get("train"), "train"))


def _exchange(value: Mapping[str, Any], question: str, answer: str) -> Talk:
    turns = [Turn("user", {"role": "user", "content": question})]
    if value.get("system"):
        turns.insert(0, Turn("system", {"role": "system", "content": _text(value, "system")}))
    reply = Turn("assistant", {"role": "assistant", "content": answer}, marks=_marks(value.get("train"), "train"))
    return Talk((*turns, reply))


_READERS: dict[str, Callable[[Mapping[str, Any]], Meaning]] = {
    "messages": _messages, "sharegpt": _sharegpt, "prompt": _prompt, "alpaca": _alpaca, "question": _question, "input": _input,
    "text": _plain,
}  # fmt: skip


# Conversations


def _talk(value: Mapping[str, Any], messages: list[Any], key: str, first: int = 0) -> Talk:
    turns = tuple(
        _plain_turn(message) or _turn(message, f"{key}[{place}]") for place, message in enumerate(messages, start=first)
    )
    for place, (before, turn) in enumerate(pairwise(turns), start=first + 1):
        if before.role == turn.role == "assistant":
            raise RowError(
                f"{key}[{place}]: the assistant speaks twice in a row; make one message of the two, or put the user's between."
            )
        if turn.role == "system":
            raise RowError(f"{key}[{place}]: a system message in the middle; it is expected first.")
        if turn.role == "tool" and before.role == "user":
            raise RowError(f"{key}[{place}]: a tool's result without the call that asked for it.")
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError(f"{key}: no message of the assistant, so there is nothing to train.")
    return Talk(_with_call_ids(turns), _tools(value.get("tools")))


_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip


def _turn(message: Any, place: str) -> Turn:
    if not isinstance(message, dict):
        raise RowError(f'{place}: {_shown(message)} came, an object {{"role": ..., "content": ...}} is expected.')
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, place)
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise RowError(f"{place}.role: {_shown(role)} came, one of {', '.join(ROLES)} is expected.")
    shown: dict[str, Any] = {"role": role, "content": _content(message.get("content"), place, bool(message.get("tool_calls")))}
    if message.get("tool_calls"):
        if role != "assistant":
            raise RowError(f"{place}.tool_calls: only the assistant calls tools.")
        shown["tool_calls"] = _tool_calls(message["tool_calls"], place)
    for key in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if message.get(key) not in (None, ""):
            shown[key] = _text(message, key, place=f"{place}.")
    if role == "assistant" and not shown["content"].strip() and "tool_calls" not in shown:
        raise RowError(f"{place}.content: an empty answer; take the row out or give its answer.")
    marks = _marks(message.get("train"), f"{place}.train")
    if role != "assistant" and marks:
        raise RowError(f"{place}.train: this is the {role}'s message; only what the assistant says can be trained.")
    return Turn(str(role), shown, _weight(message.get("weight"), f"{place}.weight"), marks)


def _plain_turn(message: Any) -> Turn | None:
    """A message with nothing but a role and an ordinary text, as nearly all of them are."""
    if type(message) is dict and len(message) == 2:
        role, content = message.get("role"), message.get("content")
        if type(content) is str and (role == "user" or (role == "assistant" and content.strip())) and _is_sound(content):
            return Turn(role, message)
    return None


def _from_sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    sender = message["from"]
    role = _SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise RowError(f"{place}.from: {_shown(sender)} came, one of {', '.join(_SHAREGPT_ROLES)} is expected.")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    if sender != "function_call":
        return {**rest, "role": role, "content": message.get("value")}
    calls = _from_json(message.get("value"))
    if not isinstance(calls, dict | list) or not calls:
        raise RowError(f'{place}.value: {_shown(calls)} came, a call as JSON is expected: {{"name": ..., "arguments": ...}}.')
    return {**rest, "role": role, "content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _content(content: Any, place: str, may_lack: bool) -> str:
    if content is None and may_lack:
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(_text(part, "text", place=f"{place}.content.", empty=True) for part in content)
    if not isinstance(content, str):
        kinds = {str(part.get("type")) for part in content if isinstance(part, dict)} if isinstance(content, list) else set()
        what = f"parts of the kind {', '.join(sorted(kinds - {'text'}))}" if kinds - {"text"} else _shown(content)
        raise RowError(f"{place}.content: {what} came, a text is expected.")
    return _sound(content, f"{place}.content")


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls as chat templates want them: {"type": "function", "id": ..., "function": {"name": ..., "arguments": {...}}}."""
    calls = _from_json(calls)
    if not isinstance(calls, list):
        raise RowError(f"{place}.tool_calls: {_shown(calls)} came, a list of calls is expected.")
    made = []
    for number, call in enumerate(calls):
        where = f"{place}.tool_calls[{number}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise RowError(f'{where}: {_shown(call)} came, {{"function": {{"name": ..., "arguments": ...}}}} is expected.')
        arguments = _from_json(function.get("arguments", {}))
        if not isinstance(arguments, dict):
            raise RowError(f"{where}.arguments: {_shown(arguments)} came, an object is expected.")
        _sound(json.dumps(arguments, ensure_ascii=False), where)
        own = {"name": _text(function, "name", place=f"{where}."), "arguments": arguments}
        given = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append({"type": "function", **given, "function": own})
    return made


def _with_call_ids(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Calls and results that have no ids get some, in their order; nine letters and digits, as Mistral wants them."""
    if not any("tool_calls" in turn.shown or turn.role == "tool" for turn in turns):
        return turns
    made: list[Turn] = []
    waiting: list[str] = []
    count = 0
    for turn in turns:
        shown = dict(turn.shown)
        if "tool_calls" in shown:
            calls = []
            for call in shown["tool_calls"]:
                count += 1
                calls.append({"id": f"call{count:05}", **call})
            shown["tool_calls"] = calls
            waiting = [call["id"] for call in calls]
        elif turn.role == "tool":
            following = waiting.pop(0) if waiting else f"call{max(count, 1):05}"
            shown.setdefault("tool_call_id", following)
        made.append(replace(turn, shown=shown))
    return tuple(made)


def with_short_call_ids(talk: Talk) -> Talk:
    """The same conversation with nine-letter ids of calls, for templates that refuse others."""
    short: dict[str, str] = {}
    turns = []
    for turn in talk.turns:
        shown = dict(turn.shown)
        if "tool_calls" in shown:
            calls = [{**call, "id": short.setdefault(call["id"], f"call{len(short) + 1:05}")} for call in shown["tool_calls"]]
            shown["tool_calls"] = calls
        elif "tool_call_id" in shown:
            shown["tool_call_id"] = short.get(shown["tool_call_id"], "call00001")
        turns.append(replace(turn, shown=shown))
    return replace(talk, turns=tuple(turns))


def _tools(tools: Any) -> tuple[dict[str, Any], ...] | None:
    tools = _from_json(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"tools: {_shown(tools)} came, a list of descriptions is expected.")
    _sound(json.dumps(tools, ensure_ascii=False), "tools")
    made = tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)
    for number, tool in enumerate(made):
        if not isinstance(tool["function"], dict):
            raise RowError(f"tools[{number}].function: {_shown(tool['function'])} came, a description is expected.")
    return made


# Values


def rationale_of(meaning: Talk | Pair) -> str | None:
    """The rationale beside an answer, checked; rows whose rationale nobody asks for may hold anything there."""
    return None if meaning.rationale is None else _text({"rationale": meaning.rationale}, "rationale")


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    messages = _from_json(value.get(key))  # in a CSV a conversation stands as JSON
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{key}: {_shown(messages)} came, a list of at least one message is expected.")
    return messages


def _text(value: Mapping[str, Any], key: str, *, place: str = "", empty: bool = False) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise RowError(f"{place}{key}: {_shown(text)} came, a text is expected.")
    if not empty and not text.strip():
        raise RowError(f"{place}{key}: an empty text; there is nothing to train.")
    return _sound(text, f"{place}{key}")


def _sound(text: str, place: str) -> str:
    """The text, once it is certain that it can be written as UTF-8."""
    if not _is_sound(text):
        half = next(letter for letter in text if "\ud800" <= letter <= "\udfff")
        raise RowError(f"{place}: half of a character (\\u{ord(half):04x}) stands in this text.")
    return text


def _is_sound(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _weight(value: Any, place: str) -> float:
    if value is None or value == "":
        return 1.0
    if isinstance(value, str):  # from a CSV
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1e6:
        raise RowError(f"{place}: {_shown(value)} came, a number from 0 is expected.")
    return float(value)


def _marks(value: Any, place: str) -> Marks:
    """`true`, `false`, or spans of characters as [begin, end] or [begin, end, weight]."""
    value = {"": None, "true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
    value = _from_json(value)  # in a table it stands as text
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, list):
        raise RowError(f"{place}: {_shown(value)} came, true, false or a list of [begin, end] is expected.")
    marks = []
    for span in value:
        numbers = span if isinstance(span, list) and len(span) in (2, 3) else [None]
        begin, end = (numbers[0], numbers[1]) if len(numbers) > 1 else (None, None)
        if type(begin) is not int or type(end) is not int or not 0 <= begin < end:
            raise RowError(f"{place}: {_shown(span)} came, [begin, end] in characters is expected, with begin < end.")
        marks.append((begin, end, _weight(numbers[2] if len(numbers) == 3 else None, f"{place} {span}")))
    return tuple(marks)


def _from_json(value: Any) -> Any:
    """A list or object that stands as JSON in a text, as in a CSV; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"
