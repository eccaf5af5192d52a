"""Chat templates: which one a tokenizer has, named ones for those that have none, and rendering by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_qlora.data.formats import RowError
from mlx_qlora.errors import DataError
from mlx_qlora.files import small_text

Tokenizer = Any  # mlx-lm's TokenizerWrapper, or one of transformers

_MOST_LETTERS = 2**25  # of one conversation; the longest row has half of that
_COMPARED = 8  # renderings of the quick way that are held against the tokenizer's own before it is trusted

# Templates for base models that have none, by name.
TEMPLATES = {
    "plain": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
        "{% if not loop.last %}{{ '\\n' }}{% endif %}"
        "{% else %}{{ raise_exception('the template plain knows system, user and assistant, not ' + message['role']) }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token }}"
        "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
        "{% else %}{{ raise_exception('the template alpaca knows system, user and assistant, not ' + message['role']) }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


def choose_template(tokenizer: Tokenizer, name: str) -> str:
    """Give the tokenizer the template that is asked for, or `plain` if it has none; says which it has now."""
    if not name:
        if has_template(tokenizer):
            return "the model's own"
        tokenizer.chat_template = TEMPLATES["plain"]
        return "plain (the model has none)"
    if name in TEMPLATES:
        if name == "chatml" and tokenizer.convert_tokens_to_ids("<|im_end|>") in (
            None,
            getattr(tokenizer, "unk_token_id", None),
        ):
            wanted = "<|im_start|> and <|im_end|>"
            raise DataError(f"chat_template: chatml needs the tokens {wanted}, which this tokenizer lacks; plain does not.")
        tokenizer.chat_template = TEMPLATES[name]
        return name
    path = Path(name).expanduser()
    try:
        tokenizer.chat_template = small_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and path.exists() else ""
        raise DataError(
            f"chat_template: {name!r} came, {', '.join(TEMPLATES)} or a readable file with a Jinja template is expected"
            f"{f' ({reason})' if reason else ''}."
        ) from error
    _check_syntax(tokenizer, path)
    return name


def _check_syntax(tokenizer: Tokenizer, path: Path) -> None:
    """Compiled and not rendered: that is done within limits."""
    from jinja2 import TemplateSyntaxError

    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        _compile_jinja_template(tokenizer.chat_template)
    except TemplateSyntaxError as error:
        raise DataError(f"{path}:{error.lineno}: not a Jinja template: {error.message}.") from error
    except RecursionError as error:
        raise DataError(f"{path}: not a Jinja template: nested too deeply.") from error
    except Exception:
        pass


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has a template of its own; `plain` is one that it got here."""
    own = getattr(tokenizer, "chat_template", None)
    return own != TEMPLATES["plain"] and bool(getattr(tokenizer, "has_chat_template", False) or own)


class Template:
    """A tokenizer's chat template, rendered in transformers' sandbox; `name` is what messages call it.

    Templates come with models, from strangers. jinja2's immutable sandbox, in which transformers compiles them and both
    ways here run, gives them no file, no import and no attribute that begins with an underscore, changes nothing that it
    is given, and counts no further than 100,000 in one range. Such a template ends the run, as does one whose text has no
    end in sight. What is not held: a loop in loops that writes nothing never ends (Ctrl-C does), and one operation can take
    all the memory there is, such as 'a' * 10**11; the sandbox can watch operators, but only in a template of its own
    compiling, and then it would not be what the tokenizer renders. With tools the text is measured once it is whole.

    `apply_chat_template` spends most of its time on copying messages and on keys that plain messages do not have. For
    those the compiled template is called directly, once it has given the same text as the tokenizer a few times.
    """

    def __init__(self, tokenizer: Tokenizer, name: str = "the model's own"):
        self._tokenizer = tokenizer
        self._name = name
        self._quick = _compiled(tokenizer)
        self._compared = 0

    def __call__(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]] | None, *, ask: bool) -> str:
        """The text of a conversation; `ask` adds what leads the model to answer."""
        if self._quick is None or tools or any(len(message) > 2 for message in messages):
            return self._slow(messages, tools, ask)
        try:
            text = self._quick(messages, ask)
        except _EndlessError as error:
            raise self._stopped(str(error)) from error
        except Exception:  # the tokenizer's own way says better what is wrong
            return self._slow(messages, tools, ask)
        if self._compared < _COMPARED:
            own = self._slow(messages, tools, ask)
            self._compared += 1
            if own != text:
                self._quick = None
            return own
        return text

    @property
    def is_quick(self) -> bool:
        return self._quick is not None

    def _slow(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]] | None, ask: bool) -> str:
        from jinja2.exceptions import SecurityError

        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=ask,
            )
        except (SecurityError, OverflowError, MemoryError, RecursionError) as error:
            raise self._stopped(str(error) or type(error).__name__) from error
        except Exception as error:  # a template raises whatever its author chose
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowError(f"the chat template refuses this conversation: {reason}") from error
        if len(text) > _MOST_LETTERS:
            raise self._stopped(str(_EndlessError()))
        return text

    def _stopped(self, reason: str) -> DataError:
        return DataError(
            f"chat_template: {self._name} does what no chat template may: {' '.join(reason.split()).rstrip('.')}. "
            f"Name another one with --chat-template: {', '.join(TEMPLATES)} or a file."
        )


class _EndlessError(Exception):
    def __init__(self) -> None:
        super().__init__(f"it writes more than {_MOST_LETTERS:,} letters for one conversation")


def _joined(pieces: Iterable[str]) -> str:
    """The pieces as one text, unless that has no end in sight."""
    pieces = iter(pieces)
    text, size = "", 0
    while part := list(islice(pieces, 1024)):  # nearly always all of them
        text += "".join(part)
        size += len(part)  # empty ones, too, can come for ever
        if len(text) + size > _MOST_LETTERS:
            raise _EndlessError
    return text


def _compiled(tokenizer: Tokenizer) -> Callable[[Sequence[Mapping[str, Any]], bool], str] | None:
    """The template as transformers compiles it, if it lets us have it."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        compiled = _compile_jinja_template(tokenizer.get_chat_template(None, None))
        more = {**compiled.globals, **tokenizer.special_tokens_map}
    except Exception:  # another transformers, no template, a template in Python: all of these have the slow way
        return None
    if hasattr(tokenizer, "has_thinking"):  # as mlx-lm's wrapper asks for it
        more["enable_thinking"] = tokenizer.has_thinking
    more |= {"tools": None, "documents": None}

    def quick(messages: Sequence[Mapping[str, Any]], ask: bool) -> str:
        # `render` would copy all globals into each context; here they are in it already.
        context = compiled.new_context({**more, "messages": messages, "add_generation_prompt": ask}, shared=True)
        return _joined(compiled.root_render_func(context))

    return quick
