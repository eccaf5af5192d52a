"""The rows of a race: generated or one's own, and the order of lines that gives everybody the same updates."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.assets import embedded_data
from mlx_qlora.bench.settings import GENERATED, RaceConfig
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.order import Order, shuffled
from mlx_qlora.data.prepare import KeptSet, row_of
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import Row, SourceConfig, read
from mlx_qlora.errors import DataError
from mlx_qlora.records import Example

_HELD_OUT = 16  # examples on which the referee judges
_HELD_OUT_LONG = 4  # documents: as many tokens, about
_PREFIX = 200  # tokens that the chats of `shared` begin with
_QUESTION, _ANSWER = (32, 62), (44, 62)  # tokens, from and to: about 315 in all with the prefix, 57 of them trained


@dataclass(frozen=True)
class Field:
    """Where the rows are, and what they hold."""

    rows: Path  # train.jsonl and valid.jsonl, for us
    arranged: dict[int, Path]  # rows of a batch: the folder whose train.jsonl gives mlx-lm the same updates
    tokens: int  # of the training examples
    supervised: tuple[int, ...]  # trained tokens of each update


def render_config(max_seq_length: int) -> RenderConfig:
    return RenderConfig(max_seq_length=max_seq_length)


def corpus_of(folder: str, tokenizer: Any, seed: int, max_seq_length: int) -> Corpus:
    """The examples of a folder, kept nowhere: a race leaves nothing behind."""
    source = SourceConfig(data=folder, data_cache="off")
    return gather(source, render_config(max_seq_length), tokenizer, seed)


def lay_field(config: RaceConfig, tokenizer: Any, folder: Path, batches: set[int]) -> Field:
    """Write the rows for us, and for each number of rows in a batch the same rows in the order that mlx-lm needs."""
    wanted = config.all_updates * config.examples_per_update
    if config.data in GENERATED:
        rows = generated(config.data, tokenizer, config.seed)
        train, valid = (
            [next(rows) for _ in range(wanted)],
            [next(rows) for _ in range(_HELD_OUT_LONG if config.data == "long" else _HELD_OUT)],
        )
    else:
        train, valid = _own(config, tokenizer, wanted)
    _write(folder / "rows" / "train.jsonl", train)
    _write(folder / "rows" / "valid.jsonl", valid)
    corpus = corpus_of(str(folder / "rows"), tokenizer, config.seed, config.max_seq_length)
    assert corpus.train is not None
    if len(corpus.sets["train"]) != wanted:
        raise DataError(
            f"data: {wanted} rows gave {len(corpus.sets['train'])} examples; rows with one example each are expected."
        )
    order = Order((wanted,), (), config.seed).at(0, np.arange(wanted)).tolist()
    arranged = {}
    for size in batches:
        arranged[size] = folder / f"rows-of-{size}"
        _write(
            arranged[size] / "train.jsonl", [begun(train[number], tokenizer) for number in arrange(order, size, config.seed)]
        )
        _write(arranged[size] / "valid.jsonl", valid)
    per = config.examples_per_update
    chosen = [[corpus.train[number] for number in order[start : start + per]] for start in range(0, wanted, per)]
    return Field(
        rows=folder / "rows",
        arranged=arranged,
        tokens=sum(len(example.tokens) for update in chosen for example in update),
        supervised=tuple(sum(map(supervised, update)) for update in chosen),
    )


def begun(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A row as mlx-lm has to get it to train our tokens: a document with <s> in front, where its tokenizer adds none."""
    begin = tokenizer.bos_token
    if set(row) != {"text"} or begin is None or tokenizer.encode("a")[0] == tokenizer.bos_token_id:
        return row
    return {"text": begin + row["text"]}


def supervised(example: Example) -> int:
    return int(np.count_nonzero(example.weights))


def arrange(order: list[int], rows: int, seed: int) -> list[int]:
    """The order of lines in which mlx-lm trains `order`.

    mlx-lm (0.32.2) makes batches of lines that follow each other (it sorts by length, but what it takes for a length
    is the number of keys of a row, which is the same for all) and takes them in the order of NumPy's permutation. So
    the batch that is to be trained j-th has to stand where that permutation looks at j.

    >>> lines = arrange([4, 2, 0, 5, 1, 3], rows=2, seed=0)
    >>> [lines[2 * batch : 2 * batch + 2] for batch in np.random.RandomState(0).permutation(3)]
    [[4, 2], [0, 5], [1, 3]]
    """
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    placed: list[list[int]] = [[]] * len(batches)
    for turn, place in enumerate(np.random.RandomState(seed).permutation(len(batches)).tolist()):
        placed[place] = batches[turn]
    return [number for batch in placed for number in batch]


def generated(kind: str, tokenizer: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Rows without end. Real words in random order: something to learn, and nothing that two rows share by chance."""
    writer = _Writer(tokenizer, random.Random(f"{kind} {seed}"))
    return {"shared": _shared, "mixed": _mixed, "long": _long}[kind](writer)


def _shared(writer: _Writer) -> Iterator[dict[str, Any]]:
    system = writer.text(_PREFIX)
    while True:
        question, answer = writer.text(writer.random.randint(*_QUESTION)), writer.text(writer.random.randint(*_ANSWER))
        yield _chat(question, answer, system)


def _mixed(writer: _Writer) -> Iterator[dict[str, Any]]:
    """Lengths from 24 to 400 tokens, half of them below 110, half of each row trained."""
    while True:
        length = min(400, max(24, round(writer.random.lognormvariate(4.7, 0.75))))
        yield _chat(writer.text(length // 2 - 3), writer.text(length - length // 2 - 2))


def _long(writer: _Writer) -> Iterator[dict[str, Any]]:
    while True:
        yield {"text": writer.text(writer.random.randint(1000, 1990))}


def _chat(question: str, answer: str, system: str = "") -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class _Writer:
    """Writes texts of a number of tokens, near enough: words are counted one by one, and joined they can differ."""

    def __init__(self, tokenizer: Any, chance: random.Random):
        self.random = chance
        text = (embedded_data() / "train.jsonl").read_text(encoding="utf-8")
        contents = [message["content"] for line in text.splitlines() for message in json.loads(line)["messages"]]
        self._words = sorted({word for content in contents for word in re.findall(r"[^\W\d_]{3,}", content)})
        self._cost: Callable[[str], int] = lambda word: len(tokenizer.encode(" " + word, add_special_tokens=False))
        self._costs: dict[str, int] = {}

    def text(self, tokens: int) -> str:
        words: list[str] = []
        while tokens > 0:
            word = self.random.choice(self._words)
            tokens -= self._costs.setdefault(word, 0) or self._count(word)
            words.append(word)
        return " ".join(words)

    def _count(self, word: str) -> int:
        self._costs[word] = max(1, self._cost(word))
        return self._costs[word]


def _own(config: RaceConfig, tokenizer: Any, wanted: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """As many rows of a user's data as the race takes, from the beginning again where there are fewer, and held-out ones."""
    corpus = corpus_of(config.data, tokenizer, config.seed, config.max_seq_length)
    values = {
        row.id: row.value
        for source in corpus.sources
        for row in read(tuple(file for files in source.files.values() for file in files))
        if isinstance(row, Row)
    }
    train = [values[id] for id in _whole(corpus.sets["train"])]
    valid = [values[id] for id in _whole(corpus.valid)[:_HELD_OUT]]
    if not train or not valid:
        raise DataError(f"data: no row of {config.data} makes exactly one example, and a race needs such rows.")
    passes = -(-wanted // len(train))
    numbers = np.concatenate([shuffled(np.arange(len(train)), len(train), (config.seed, each)) for each in range(passes)])
    return [train[number] for number in numbers[:wanted].tolist()], valid


def _whole(examples: KeptSet) -> list[str]:
    """The ids of rows that made one example; mlx-lm can't make several of a row, so the others can't be compared."""
    ids = [row_of(examples.id(number)) for number in range(len(examples))]
    counts = Counter(ids)
    return [id for id in ids if counts[id] == 1]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
