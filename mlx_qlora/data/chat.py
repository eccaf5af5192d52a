"""A conversation becomes text by the model's chat template, with the places in it that are trained.

What the model would really have seen decides. The prompt of each answer is rendered as it is when the model is asked,
the answer as it stands when it is given. Where one text holds all of a conversation's answers, each right after its
own prompt, it is one piece; where a template writes earlier turns in another way later (thinking that is dropped, a
system prompt that moves to the last question), an answer gets a piece of its own, or the row is refused.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

from mlx_qlora.data.chain import Link
from mlx_qlora.data.formats import Marks, RowError, Talk, Turn, with_short_call_ids
from mlx_qlora.data.templates import Template, Tokenizer


class TrainOn(str, Enum):
    """Which tokens are trained."""

    ASSISTANT = "assistant"  # every turn of the assistant
    LAST = "last"  # its last turn
    ALL = "all"  # everything
    MARKED = "marked"  # what the rows mark with "train"


@dataclass(frozen=True)
class Span:
    """Characters that are trained, with their weight."""

    begin: int
    end: int
    weight: float = 1.0
    exact: bool = True  # begins where the model begins to speak; else: every token that overlaps


@dataclass
class Piece:
    """Text of one example."""

    text: str
    spans: list[Span]
    bos: bool = False  # the beginning-of-text token goes before, if the text does not have it
    eos: float | None = None  # the end-of-text token goes after, if the text does not have it, with this weight
    escaped: bool = False  # written with stand-ins for special tokens, see `Specials`
    notes: list[str] = field(default_factory=list)
    goes_on: bool = False  # the next one begins where this one ends
    link: Link | None = None  # what follows, where this is a prompt with its rationale
    share: float | None = None  # what its trained tokens weigh together; None: each has the weight of its span
    name: str = ""  # of its example, among those of its row


class Specials:
    """The special tokens of a tokenizer, and how texts that merely contain their letters are kept apart from them.

    A content that holds the letters of a special token, such as `</s>` in a question about HTML, gets a stand-in of one
    private character for it before the template sees it. After rendering, what the template itself wrote is exchanged
    for other private characters, and the letters come back. `tokens.Encoder` reads such a text with a tokenizer that
    knows special tokens under their private names only.
    """

    def __init__(self, tokenizer: Tokenizer):
        found = getattr(tokenizer, "added_tokens_decoder", None)
        if found:
            strings = [str(token) for token in found.values() if token.special]
        else:
            strings = list(getattr(tokenizer, "all_special_tokens", []))
        self.strings = tuple(dict.fromkeys(strings))
        longest_first = sorted(self.strings, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._number = {text: number for number, text in enumerate(self.strings)}

    def in_letters(self, text: str) -> bool:
        """Whether a text that people wrote holds the letters of a special token, so that it has to be escaped."""
        found = self.pattern.search(text)
        if found and _PRIVATE.search(text):
            raise RowError(f"{found[0]} and private characters (U+E000 to U+E003) stand in one row; take either out.")
        return found is not None

    def private_name(self, text: str) -> str:
        """The name of a special token in an escaped text."""
        return f"\ue000{self._number[text]}\ue001"

    def hidden(self, text: str) -> str:
        """The text with a stand-in for each special token's letters."""
        return self.pattern.sub(lambda found: f"\ue002{self._number[found[0]]}\ue003", text)

    def shown(self, rendered: str) -> str:
        """A rendered text in which special tokens have their private names and stand-ins are letters again."""
        return self.letters(self.pattern.sub(lambda found: self.private_name(found[0]), rendered))

    def letters(self, text: str) -> str:
        """A text with the letters themselves where they had stand-ins."""
        return re.sub("\ue002(\\d+)\ue003", lambda found: self.strings[int(found[1])], text)

    def plain(self, text: str) -> str:
        """An escaped text as people read it."""
        return re.sub("\ue000(\\d+)\ue001", lambda found: self.strings[int(found[1])], text)


_PRIVATE = re.compile("[\ue000-\ue003]")
_TAIL = 24  # letters of an answer that must stand in the text; what comes before them may be thinking that is dropped
_STEADY = 3  # conversations of the same roles, after which an earlier answer is no longer rendered for itself
_NEVER = -(10**9)
_PROBE = "probe 7391"
_ENDS = re.compile("\ue000\\d+\ue001")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Conversations -> pieces, by the tokenizer's own template, in transformers' sandbox."""

    def __init__(self, tokenizer: Tokenizer, train_on: TrainOn, template: str = "the model's own", obey_marks: bool = True):
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.specials = Specials(tokenizer)
        self._template = Template(tokenizer, template)
        self._steady: dict[tuple[str, ...], int] = {}  # by roles: how often an earlier answer stood as it does at the end
        self._closing: tuple[str, str] | None = None
        self._eos: str = getattr(tokenizer, "eos_token", None) or ""
        own = getattr(tokenizer, "chat_template", None) if obey_marks else None
        self._marks = isinstance(own, str) and bool(_GENERATION.search(own))

    def render(self, talk: Talk, *, ask: bool = False) -> str:
        """The text of a conversation; `ask` adds what leads the model to answer."""
        return self._template([turn.shown for turn in talk.turns], talk.tools, ask=ask)

    def prompt(self, talk: Talk) -> Piece:
        """What leads the model to answer a conversation, in the letters that training has."""
        escaped, talk = self._hidden(talk)
        text = self.render(talk, ask=True)
        return Piece(self.specials.shown(text) if escaped else text, [], escaped=escaped)

    def pieces(self, talk: Talk) -> list[Piece]:
        notes: list[str] = []
        talk = self._one_end(talk, notes)
        try:
            return self._pieces(talk, notes)
        except RowError:
            if not any("tool_calls" in turn.shown for turn in talk.turns):
                raise
            short = with_short_call_ids(talk)
            if short == talk:
                raise
            return self._pieces(short, [*notes, "renamed_calls"])

    def _one_end(self, talk: Talk, notes: list[str]) -> Talk:
        """An answer that ends in the letters of the end-of-text token does not get it twice."""
        if not self._eos or not any(t.role == "assistant" and t.content.rstrip().endswith(self._eos) for t in talk.turns):
            return talk
        notes.append("ended_already")

        def once(turn: Turn) -> Turn:
            if turn.role != "assistant" or not turn.content.rstrip().endswith(self._eos):
                return turn
            content = turn.content.rstrip().removesuffix(self._eos)
            marks = turn.marks
            if isinstance(marks, tuple):
                marks = tuple((begin, min(end, len(content)), weight) for begin, end, weight in marks if begin < len(content))
            return replace(turn, shown={**turn.shown, "content": content}, marks=marks)

        return replace(talk, turns=tuple(map(once, talk.turns)))

    def _pieces(self, talk: Talk, notes: list[str]) -> list[Piece]:
        write: Callable[..., str] = self.render
        escaped, talk = self._hidden(talk)
        if escaped:
            notes = [*notes, "escaped"]

            def write(talk: Talk, *, ask: bool = False) -> str:
                return self.specials.shown(self.render(talk, ask=ask))

        whole = write(talk)
        if self.train_on is TrainOn.ALL:
            end, ended = self._end(whole, 0, escaped)
            eos = None if ended else talk.weight
            return [Piece(whole[:end], [Span(0, end, talk.weight, exact=False)], eos=eos, escaped=escaped, notes=notes)]
        pieces: list[Piece] = []
        answers = [place for place, turn in enumerate(talk.turns) if turn.role == "assistant"]
        if self.train_on is TrainOn.LAST:
            answers = answers[-1:]
        roles = tuple(turn.role for turn in talk.turns)
        only_texts = talk.tools is None and all(len(turn.shown) == 2 for turn in talk.turns)
        for place in reversed(answers):
            turn = talk.turns[place]
            marks = turn.marks if turn.marks is not None else self.train_on is not TrainOn.MARKED
            weight = talk.weight * turn.weight
            if marks is False or not weight:
                continue
            prompt = write(Talk(talk.turns[:place], talk.tools), ask=True) if place else None
            plain = pieces and prompt and marks is True and not escaped and not self._marks and only_texts
            earlier = self._stands_in(pieces[0].text, prompt or "", turn) if plain else None
            if earlier and self._steady.get(roles, 0) >= _STEADY:
                pieces[0].spans.insert(0, Span(*earlier, weight))
                continue
            done = whole if place == len(talk.turns) - 1 else write(Talk(talk.turns[: place + 1], talk.tools))
            text, begin = self._after_prompt(talk, place, prompt, done, write, escaped)
            end, ended = self._end(text, begin, escaped)
            text = text[:end]
            if (said := self._letters(turn)[-_TAIL:]) and "tool_calls" not in turn.shown and said not in text[begin:]:
                raise RowError(f"messages[{place}]: the chat template does not write this answer, or not as it stands.")
            spans = self._spans(talk, place, text, begin, marks, weight, escaped)
            reached = 1.0 if marks is True else _at_end(marks, turn)
            eos = None if ended or reached is None else weight * reached
            home = next((piece for piece in pieces if ended and piece.text.startswith(text)), None)
            if earlier:
                agrees = home is pieces[0] and earlier == (begin, end)
                self._steady[roles] = self._steady.get(roles, 0) + 1 if agrees else _NEVER
            if home is None:
                home = Piece(text, [], eos=eos, escaped=escaped, notes=notes)
                pieces.append(home)
            home.spans[:0] = spans
        if not pieces:  # nothing of it is trained: an example without a target, so that it is counted
            return [Piece(whole, [], escaped=escaped, notes=notes)]
        return pieces[::-1]

    def _hidden(self, talk: Talk) -> tuple[bool, Talk]:
        """(whether letters of special tokens are in it, the conversation with stand-ins for them)."""
        if not self.specials.in_letters("\0".join(_brought(talk))):
            return False, talk
        hidden = partial(_changed, change=self.specials.hidden)
        turns = tuple(replace(turn, shown=hidden(turn.shown)) for turn in talk.turns)
        return True, replace(talk, turns=turns, tools=tuple(map(hidden, talk.tools)) if talk.tools else None)

    def _stands_in(self, text: str, prompt: str, turn: Turn) -> tuple[int, int] | None:
        """Where an answer stands in a longer text letter by letter, right after its prompt, with an end after it."""
        begin, content = len(prompt), turn.content
        if not text.startswith(prompt) or not text.startswith(content, begin):
            return None
        closing = self.specials.pattern.match(text, begin + len(content))
        return (begin, closing.end()) if closing else None

    def _after_prompt(
        self, talk: Talk, place: int, prompt: str | None, done: str, write: Callable[..., str], escaped: bool
    ) -> tuple[str, int]:
        """(the prompt of an answer with the answer, where the answer begins)."""
        if prompt is None:
            return done, self._greeting(talk, done, write)
        if done.startswith(prompt):
            return done, len(prompt)
        # Given, the answer stands after another text than the one it is asked for with. The end of that text, from the
        # last message on, must stand right before it all the same.
        asked, answer = self._letters(talk.turns[place - 1]), self._letters(talk.turns[place])
        closing = _last(_ENDS if escaped else self.specials.pattern, done, 0)
        start, given = prompt.rfind(asked), done.rfind(answer, 0, closing.start() if closing else len(done))
        cut = done.rfind(prompt[start:], 0, given) if asked and answer and start >= 0 and given >= 0 else -1
        if cut < 0 or done[cut + len(prompt) - start : given].strip():
            raise RowError(
                f"messages[{place}]: the chat template writes this answer in another way than it is asked for, so what the "
                "model would see before it can't be told. A template of your own: --chat-template FILE."
            )
        return prompt + done[cut + len(prompt) - start :], len(prompt)

    def _greeting(self, talk: Talk, done: str, write: Callable[..., str]) -> int:
        """Where a first message begins that answers nothing: after what leads the model to speak."""
        asked = replace(talk, turns=(Turn("user", {"role": "user", "content": "?"}),), tools=None)
        prompt, finished = write(asked, ask=True), write(asked)
        same = in_common(prompt, finished)
        inside = next(
            (found.start() for found in self.specials.pattern.finditer(prompt) if found.start() < same < found.end()), same
        )
        header = prompt[inside:]
        place = done.find(header) + len(header) if header and header in done else done.find(self._letters(talk.turns[0]))
        if place < 0:
            raise RowError("messages[0]: the chat template hides where this first answer begins.")
        return place

    def _letters(self, turn: Turn) -> str:
        """A message's content as it stands in a finished text."""
        return self.specials.letters(turn.content.strip())

    def _end(self, text: str, begin: int, escaped: bool) -> tuple[int, bool]:
        """(where the last turn ends, whether with a special token). What a template writes after that is not trained."""
        if self._closing is None:
            self._closing = self._how_turns_end()
        closing, kept = (self.specials.shown(part) if escaped else part for part in self._closing)
        if kept and text.endswith(closing) and len(text) - len(closing) >= begin:
            return len(text) - len(closing) + len(kept), True
        last = _last(_ENDS if escaped else self.specials.pattern, text, begin)
        if last is not None and not text[last.end() :].strip():
            return last.end(), True
        return begin + len(text[begin:].rstrip()), False

    def _how_turns_end(self) -> tuple[str, str]:
        """(what the template writes after a last answer, how much of it belongs to the turn): that which it writes after
        an answer in the middle, too, up to a special token. Phi-3 writes `<|end|>` and, at the very end, one token more."""
        ask, answer = (
            Turn("user", {"role": "user", "content": "?"}),
            Turn("assistant", {"role": "assistant", "content": _PROBE}),
        )
        try:
            last, middle = (self.render(Talk(turns)).rpartition(_PROBE)[2] for turns in ((ask, answer), (ask, answer, ask)))
        except RowError:
            return "", ""
        same = in_common(last, middle)
        ends = [found.end() for found in self.specials.pattern.finditer(last) if found.end() <= same]
        return (last, last[: ends[-1]]) if ends else ("", "")

    def _spans(self, talk: Talk, place: int, text: str, begin: int, marks: Marks, weight: float, escaped: bool) -> list[Span]:
        turn = talk.turns[place]
        if marks is not True:
            return self._marked(turn, place, text, begin, marks or (), weight)
        if not self._marks:
            return [Span(begin, len(text), weight)]
        return self._generated(replace(talk, turns=talk.turns[: place + 1]), text, begin, weight, escaped)

    def _marked(
        self, turn: Turn, place: int, text: str, begin: int, marks: Sequence[tuple[int, int, float]], weight: float
    ) -> list[Span]:
        content = turn.content
        if "\ue002" in content:
            raise RowError(f"messages[{place}].train: the content holds the letters of a special token; spans can't be placed.")
        letters = content if content in text[begin:] else content.strip()
        start = text.rfind(letters, begin)  # before it may stand what was thought
        if start < 0:
            raise RowError(f"messages[{place}].train: the chat template changes this text, so spans in it can't be placed.")
        finish = start + len(letters)
        start -= len(content) - len(content.lstrip()) if letters != content else 0
        spans = []
        for span_begin, span_end, own in marks:
            if span_end > len(content):
                raise RowError(
                    f"messages[{place}].train: [{span_begin}, {span_end}] came, the text has {len(content)} characters."
                )
            whole = span_end == len(content) and "tool_calls" not in turn.shown  # then the end of the turn, too
            end = len(text) if whole else min(start + span_end, finish)
            first = max(start + span_begin, begin)
            spans.append(Span(first, end, weight * own, exact=first == begin))
        return [span for span in spans if span.begin < span.end]

    def _generated(self, talk: Talk, text: str, begin: int, weight: float, escaped: bool) -> list[Span]:
        """What the template itself marks with `{% generation %}`, and the end of the turn."""
        from transformers.utils.chat_template_utils import render_jinja_template

        thinking = {"enable_thinking": self.tokenizer.has_thinking} if hasattr(self.tokenizer, "has_thinking") else {}
        tools = list(talk.tools) if talk.tools else None
        (marked,), (blocks,) = render_jinja_template(
            conversations=[[dict(turn.shown) for turn in talk.turns]],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(None, tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
            **thinking,
        )
        if escaped:
            shown = self.specials.shown
            blocks = [(len(shown(marked[:start])), len(shown(marked[:end]))) for start, end in blocks]
            marked = shown(marked)
        if not marked.startswith(text):  # put together from the prompt and the answer
            return [Span(begin, len(text), weight)]
        own = [(max(start, begin), min(end, len(text))) for start, end in blocks]
        own = [(start, end) for start, end in own if start < end]
        if not own:
            raise RowError("the chat template marks no {% generation %} in this answer, so nothing of it would be trained.")
        spans = [Span(start, end, weight, exact=start == begin) for start, end in own]
        closing = _last(_ENDS if escaped else self.specials.pattern, text, begin)
        if closing is not None and closing.end() == len(text) and spans[-1].end < len(text):
            spans.append(Span(max(closing.start(), spans[-1].end), len(text), weight, exact=False))
        return spans


def in_common(a: str, b: str) -> int:
    """How many letters two texts have in common from the start."""
    return next((place for place, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def _last(pattern: re.Pattern[str], text: str, begin: int) -> re.Match[str] | None:
    """The last match near the end of a text."""
    return next(iter(deque(pattern.finditer(text, max(begin, len(text) - 96)), maxlen=1)), None)


def _at_end(marks: Marks, turn: Turn) -> float | None:
    """The weight of the span that reaches the end of an answer, if one does."""
    spans = marks if isinstance(marks, tuple) else ()
    return next((weight for _, end, weight in spans if end == len(turn.content)), None)


def _brought(talk: Talk) -> list[str]:
    """All that a conversation brings into its text."""
    if talk.tools is None and all(len(turn.shown) == 2 for turn in talk.turns):
        return [turn.shown["content"] for turn in talk.turns]
    return _texts([[turn.shown for turn in talk.turns], list(talk.tools or ())])


def _texts(value: Any) -> list[str]:
    """All texts in a value, however deep."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for each in pair for text in _texts(each)]
    return [text for each in value for text in _texts(each)] if isinstance(value, list) else []


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(each, change) for key, each in value.items()}
    return [_changed(each, change) for each in value] if isinstance(value, list) else value
