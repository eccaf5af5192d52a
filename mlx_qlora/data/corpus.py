"""All the data of a run: sources found, prepared or streamed, split, and put in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_qlora.data.layout import BatchConfig, Layout, streamed_updates, updates
from mlx_qlora.data.order import Order, shuffled, updates_in
from mlx_qlora.data.part import questions_of
from mlx_qlora.data.prepare import MOST_SPLIT_OFF, Chosen, Joined, KeptSet, Preparation, Prepared, iterate, row_of, split_off
from mlx_qlora.data.render import Account, Question, RenderConfig, Renderer
from mlx_qlora.data.sources import SPLITS, File, Source, SourceConfig, find
from mlx_qlora.data.stream import stream
from mlx_qlora.data.templates import Tokenizer
from mlx_qlora.errors import DataError
from mlx_qlora.records import START, Bookmark, Example, Update


@dataclass(frozen=True)
class Corpus:
    """The training and validation examples of a run, and the accounts of what they were made of."""

    config: SourceConfig
    render: RenderConfig
    renderer: Renderer
    sources: tuple[Source, ...]
    seed: int
    sets: dict[str, KeptSet]  # by split; without train where that is streamed
    sizes: tuple[int, ...]  # training examples of each source
    valid_from: str
    accounts: dict[str, Account]  # of the files of each split
    warm: bool  # all of it was there already
    split_off: frozenset[str] | None  # ids of the validation rows, where they are split off from training
    refusals: tuple[str, ...]  # why training would be refused
    streamed: Account = field(default_factory=Account)  # of the rows of a stream, as far as they were read

    @property
    def train(self) -> KeptSet | None:
        return self.sets.get("train")

    @property
    def valid(self) -> KeptSet:
        return self.sets["valid"]

    @property
    def order(self) -> Order:
        return Order(self.sizes, self.config.data_weights if len(self.sizes) > 1 else (), self.seed)

    def digest(self) -> str:
        """What is trained on and in which order, in few letters; of a stream, what its files are called and how large they
        are."""
        told = hashlib.blake2b(repr((self.seed, self.sizes, self.order.weights)).encode(), digest_size=8)
        for split in ("train", "valid"):
            if split in self.sets:
                told.update(split.encode() + np.ascontiguousarray(self.sets[split].sums).tobytes())
        if self.train is None:
            files = [(file.name, file.fingerprint().get("size")) for one in self.sources for file in one.files["train"]]
            told.update(repr((files, self.render, self.config.shuffle_buffer, self.config.data_weights)).encode())
        return told.hexdigest()

    def updates(self, config: BatchConfig, layout: Layout, epochs: int, start: Bookmark = START) -> Iterator[Update]:
        if self.train is None:
            examples = stream(self.sources, self.config, self.render, self.renderer, self.seed, start, account=self.streamed)
            return streamed_updates(examples, config, layout)
        return updates(self.train, self.order, config, layout, epochs, start)

    def updates_in(self, config: BatchConfig, epochs: int) -> int:
        assert self.train is not None, "a stream has no length"
        least = config.min_supervised_per_update
        supervised = self.train.supervised if least else np.empty(0, np.int64)
        return updates_in(self.order, config.examples_per_update, epochs, supervised, least)

    def valid_examples(self) -> list[Example]:
        return list(iterate(self.valid))

    def train_sample(self) -> list[Example]:
        """A fixed sample of the training examples, as large as the validation set, if that is not very large."""
        most = min(len(self.valid), MOST_SPLIT_OFF)
        if self.train is None:
            following = stream(self.sources, self.config, self.render, self.renderer, self.seed, Bookmark())
            return [next(following)[0] for _ in range(most)]
        count = len(self.train)
        numbers = shuffled(np.arange(min(count, most)), count, (self.seed, 0x5A3))
        return [self.train[number] for number in numbers.tolist()]

    def longest(self, count: int) -> list[Example]:
        """The longest training examples; of a stream nothing is known before it is read."""
        if self.train is None:
            return []
        numbers = np.argsort(self.train.lengths, kind="stable")[::-1][:count]
        return [self.train[number] for number in numbers.tolist()]

    def questions(self, most: int) -> list[Question]:
        """Questions with answers from the validation rows, the first ones."""
        return questions_of(self._valid_files(), self.split_off, self.renderer, self.config, most)

    def _valid_files(self) -> tuple[File, ...]:
        split = "train" if self.split_off is not None else "valid"
        return tuple(file for source in self.sources for file in source.files.get(split, ()))


def gather(
    config: SourceConfig,
    render: RenderConfig,
    tokenizer: Tokenizer,
    seed: int,
    progress: Callable[[int], None] = lambda rows: None,
    strict: bool = True,
    sources: tuple[Source, ...] | None = None,
) -> Corpus:
    """Everything from the files to the order of the examples. If `strict`, raises what training is refused for."""
    sources = find(config) if sources is None else sources
    renderer = Renderer(tokenizer, render, config)
    preparation = Preparation(config, render, renderer, config.data_cache, progress, strict)
    prepared: dict[str, tuple[Prepared, ...]] = {}
    refusals: list[str] = []
    warm = True
    for split in ("valid", "test") if config.streaming else SPLITS:
        made = []
        for source in (one for one in sources if split in one.files):
            one, known = preparation.prepare(source, split)
            made.append(one)
            warm = warm and known
            if split != "test" and (reason := preparation.refusal(one.account, source.files[split])):
                refusals.append(reason)
        if made:
            prepared[split] = tuple(made)
    sets: dict[str, KeptSet] = {split: _one(made) for split, made in prepared.items()}
    sizes = tuple(map(len, prepared.get("train", ())))
    chosen = None
    if "valid" in prepared:
        said = ", ".join(file.name for source in sources for file in source.files.get("valid", ()))
    elif config.streaming:
        raise DataError("streaming: validation rows are needed beside the stream; a folder with train and valid files.")
    else:
        try:
            parts = [split_off(each, config.validation_share, seed) for each in prepared["train"]]
        except DataError as error:
            if strict:
                raise
            refusals += [] if refusals else [str(error)]
            parts, said = [], "none could be split off"
        else:
            sets["train"], sets["valid"] = _one([train for train, _, _ in parts]), _one([valid for _, valid, _ in parts])
            sizes = tuple(len(train) for train, _, _ in parts)
            ids = (sets["valid"].id(number) for number in range(len(sets["valid"])))
            chosen = frozenset(row_of(id) for id in ids)
            count = sum(rows for _, _, rows in parts)
            said = f"{count:,} row{'s' * (count > 1)} split off from training (seed {seed}): there is no valid.jsonl"
    return Corpus(
        config=config,
        render=render,
        renderer=renderer,
        sources=sources,
        seed=seed,
        sets=sets,
        sizes=sizes,
        valid_from=said,
        accounts={split: sum((each.account for each in made), Account()) for split, made in prepared.items()},
        warm=warm,
        split_off=chosen,
        refusals=tuple(refusals),
    )


def _one(sets: Sequence[Prepared | Chosen]) -> KeptSet:
    return sets[0] if len(sets) == 1 else Joined(sets)
