"""A tokenizer trained on the texts of a run: byte-level BPE, so that there is no text that it can't write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

from mlx_qlora.data.formats import Pair, Plain, RowError, Talk, understand
from mlx_qlora.data.sources import BadRow, File, Row, Source, SourceConfig
from mlx_qlora.data.templates import Tokenizer, choose_template
from mlx_qlora.errors import DataError

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
LEAST = 259  # bytes, and these three
MOST_BYTES = 200_000_000  # of text that a tokenizer looks at; more changes few of its tokens
# Conversations get these, where no chat template is named: a token for each role, and the end token after what was said.
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('this model knows the roles system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_MARK = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z][A-Z_]*\]")  # what is a token of its own in a template: <|user|>, [INST]


@dataclass(frozen=True)
class Learned:
    """A tokenizer, and what it was trained on."""

    tokenizer: Tokenizer
    wanted: int  # tokens
    looked_at: int  # bytes of text
    whole: bool  # whether that was all of the text
    files: tuple[str, ...]

    @property
    def describe(self) -> list[str]:
        size = f"{self.looked_at / 1e6:,.1f} MB" if self.looked_at >= 50_000 else f"{self.looked_at:,} bytes"
        names = ", ".join(self.files[:3]) + (f" and {len(self.files) - 3:,} more" if len(self.files) > 3 else "")
        beginning = "" if self.whole else "the first "
        lines = [f"{len(self.tokenizer):,} tokens, trained on {beginning}{size} of {names}"]
        if len(self.tokenizer) < self.wanted:
            lines += [f"{self.wanted:,} were wanted, but each word of this text is one already"]
        return lines


def train_tokenizer(
    texts: Iterator[str], vocab_size: int, specials: Sequence[str] = (), chat_template: str | None = None, begins: bool = True
) -> Tokenizer:
    """A tokenizer of so many tokens, or fewer where the texts have no more: the same texts give the same one.

    Digits stand alone; what is no token is written in bytes, so every text comes back as it was. `specials` are tokens
    besides unknown, begin and end (which is the padding too). `begins`: a text that is encoded begins with `<s>`.
    """
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    core = Core(models.BPE(unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNKNOWN, BEGIN, END, *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if begins:
        core.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, core.token_to_id(BEGIN))]
        )
    tokenizer = _fast()(
        tokenizer_object=core, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END, pad_token=END,
        additional_special_tokens=list(specials), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer


def learn(
    sources: Sequence[Source], config: SourceConfig, vocab_size: int, chat_template: str = "", most: int = MOST_BYTES
) -> Learned:
    """Train a tokenizer on the training rows of a run. What stands alone in its chat template is a token of its own.

    Of large data the beginning of each file is looked at, all of them alike.
    """
    files = [file for source in sources for file in source.files["train"]]
    reading = _Reading(config, most)
    texts = reading.texts(files)
    first = next(texts, None)  # the kind of the first row is known now
    if first is None:
        raise DataError(f"a tokenizer can't be trained: {reading.problem or 'there is no text in the training rows.'}")
    template = _template(chat_template) if chat_template else CHAT_TEMPLATE if reading.talks else None
    specials = marks_of(template) if template else []
    tokenizer = train_tokenizer(chain([first], texts), max(vocab_size, LEAST + len(specials)), specials, template)
    names = tuple(file.name for file in files)
    return Learned(tokenizer, vocab_size, reading.bytes, reading.whole, names)


def marks_of(template: str) -> list[str]:
    """What a chat template writes besides the contents that looks like a token of its own, in its order.

    >>> marks_of("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}")
    ['<|system|>', '<|user|>', '<|assistant|>']
    """
    from tokenizers import Tokenizer as Core
    from tokenizers import models

    bare = _fast()(tokenizer_object=Core(models.BPE()), bos_token=BEGIN, eos_token=END)
    talk = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    for said in (talk, talk[1:]):  # some templates know no system prompt
        try:
            text = bare.apply_chat_template(said, tokenize=False, chat_template=template)
        except Exception:  # whatever a template raises; who renders with it says what is wrong
            continue
        return [mark for mark in dict.fromkeys(_MARK.findall(text)) if mark not in (UNKNOWN, BEGIN, END)]
    return []


def _fast() -> Any:
    """The class of transformers for tokenizers such as these."""
    import mlx_lm  # noqa: F401  (first: with it transformers does not say that PyTorch is missing)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def _template(name: str) -> str:
    """The text of a chat template by its name or file."""
    holder: Any = SimpleNamespace(chat_template=None, convert_tokens_to_ids=lambda token: 0, unk_token_id=None)
    choose_template(holder, name)
    return str(holder.chat_template)


class _Reading:
    """The texts of files, and what became known on the way."""

    def __init__(self, config: SourceConfig, most: int):
        self._config, self._most = config, most
        self.bytes = 0
        self.whole = True
        self.talks = False  # whether there was a conversation
        self.problem = ""  # of the first row that can't be used

    def texts(self, files: Sequence[File]) -> Iterator[str]:
        """The small files first: what they leave of their share is the others'."""
        ordered = sorted(files, key=lambda file: (file.fingerprint().get("size", 0), file.name))
        for number, file in enumerate(ordered):
            share = (self._most - self.bytes) // (len(ordered) - number)
            yield from self._of(file, self.bytes + share)

    def _of(self, file: File, most: int) -> Iterator[str]:
        for row in file.read():
            for text in self._meant(row):
                if self.bytes >= most:
                    self.whole = False
                    return
                self.bytes += len(text.encode(errors="replace"))
                yield text

    def _meant(self, row: Row | BadRow) -> list[str]:
        """What is to be read in a row; of one that can't be used nothing: who prepares the rows says so."""
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            meaning = understand(row, self._config.format, self._config.fields)[1]
        except RowError as error:
            self.problem = self.problem or f"{row.id}: {error}"
            return []
        self.talks = self.talks or isinstance(meaning, Talk)
        return [text for text in _texts(meaning) if text]


def _texts(meaning: Talk | Pair | Plain) -> list[str]:
    if isinstance(meaning, Plain):
        return [meaning.text]
    if isinstance(meaning, Pair):
        return [meaning.prompt, meaning.completion]
    return [turn.content for turn in meaning.turns]
