"""All the data of a run: sources found, prepared or streamed, split, and put in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mlx_qlora.data.layout import BatchConfig, Layout, streamed_updates, updates
from mlx_qlora.data.order import Order, shuffled, updates_in
from mlx_qlora.data.part import questions_of
from mlx_qlora.data.prepare import MOST_SPLIT_OFF, Chosen, Joined, KeptSet, Preparation, Prepared, iterate, row_of, split_off
from mlx_qlora.data.render import WHOLE, Account, Question, RenderConfig, Renderer
from mlx_qlora.data.sources import SPLITS, File, Source, SourceConfig, find
from mlx_qlora.data.stream import stream
from mlx_qlora.data.templates import Tokenizer
from mlx_qlora.data.windows import Ruler, Stream, WindowConfig, Windows, split_text
from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.records import START, Bookmark, Example, Update


@dataclass(frozen=True)
class Corpus:
    """The training and validation examples of a run, and the accounts of what they were made of.

    Where text is trained as windows, `sets` has the documents, and examples are taken from `windows`.
    """

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
    windows: Windows | None = None  # of the training documents
    valid_windows: Windows | None = None

    @property
    def train(self) -> KeptSet | Windows | None:
        return self.windows or self.sets.get("train")

    @property
    def valid(self) -> KeptSet:
        return self.sets["valid"]

    @property
    def only_text(self) -> bool:
        """Whether no row is a conversation or a question, which a chat template writes."""
        return all(set(+account.formats) <= {"text"} for account in self.accounts.values())

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
        if self.windows:
            told.update(repr((self.windows.ruler, [(each.begin, each.end) for each in self.windows.streams])).encode())
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
        if least and self.windows:
            raise ConfigError(
                f"min_supervised_per_update: {least} came with windows, which are full of trained tokens; leave it."
            )
        supervised = self.train.supervised if least else np.empty(0, np.int64)
        return updates_in(self.order, config.examples_per_update, epochs, supervised, least)

    @property
    def trained_tokens(self) -> int:
        """Tokens of the training examples that count in the loss; 0 for a stream, of which that is not known."""
        if self.windows:
            return self.windows.total_supervised
        return int(self.train.supervised.sum()) if self.train is not None else 0

    def valid_examples(self) -> list[Example]:
        return self.valid_windows.measured() if self.valid_windows else list(iterate(self.valid))

    def train_sample(self) -> list[Example]:
        """A fixed sample of the training examples, as large as the validation set, if that is not very large."""
        if self.windows:
            return self.windows.measured(self.seed)
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
        if self.windows:
            return self.windows.longest(count)
        numbers = np.argsort(self.train.lengths, kind="stable")[::-1][:count]
        return [self.train[number] for number in numbers.tolist()]

    def questions(self, most: int) -> list[Question]:
        """Questions with answers from the validation rows, the first ones."""
        if self.windows:
            return []
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
    windows: WindowConfig | None = None,
    from_nothing: bool = False,
) -> Corpus:
    """Everything from the files to the order of the examples. If `strict`, raises what training is refused for."""
    sources = find(config) if sources is None else sources
    ruler = windows.ruler(render.max_seq_length) if windows and windows.wanted(sources, from_nothing) else None
    if ruler and config.streaming:
        raise ConfigError(
            "streaming: windows are read from the disk as their turn comes, however much text it is; leave it out."
        )
    if ruler and render.chain.on:
        raise ConfigError(
            f"chain.kind: {render.chain.kind} came with text that is trained as windows, which have no answers. Rows with a "
            "question, a rationale and an answer are expected; or leave chain.kind off."
        )
    how = replace(render, max_seq_length=WHOLE) if ruler else render
    renderer = Renderer(tokenizer, how, config)
    prepared, refusals, warm = _prepared(Preparation(config, how, renderer, config.data_cache, progress, strict), sources)
    accounts = {split: sum((each.account for each in made), Account()) for split, made in prepared.items()}
    whole = Corpus(
        config=config,
        render=render,
        renderer=renderer,
        sources=sources,
        seed=seed,
        sets={split: _one(made) for split, made in prepared.items()},
        sizes=tuple(map(len, prepared.get("train", ()))),
        valid_from=", ".join(file.name for source in sources for file in source.files.get("valid", ())),
        accounts=accounts,
        warm=warm,
        split_off=None,
        refusals=tuple(refusals),
    )
    if ruler:
        return _in_windows(whole, ruler, prepared)
    return whole if "valid" in prepared else _split(whole, prepared.get("train", ()), strict)


def _prepared(preparation: Preparation, sources: Sequence[Source]) -> tuple[dict[str, tuple[Prepared, ...]], list[str], bool]:
    """(what is prepared of each split, why training would be refused, whether all of it was there already)."""
    prepared: dict[str, tuple[Prepared, ...]] = {}
    refusals: list[str] = []
    warm = True
    for split in ("valid", "test") if preparation.source.streaming else SPLITS:
        made = []
        for source in (one for one in sources if split in one.files):
            one, known = preparation.prepare(source, split)
            made.append(one)
            warm = warm and known
            if split != "test" and (reason := preparation.refusal(one.account, source.files[split])):
                refusals.append(reason)
        if made:
            prepared[split] = tuple(made)
    return prepared, refusals, warm


def _split(whole: Corpus, train: Sequence[Prepared], strict: bool) -> Corpus:
    """With validation rows from those of training: there are no others."""
    if whole.config.streaming:
        raise DataError("streaming: validation rows are needed beside the stream; a folder with train and valid files.")
    try:
        parts = [split_off(each, whole.config.validation_share, whole.seed) for each in train]
    except DataError as error:
        if strict:
            raise
        return replace(whole, valid_from="none could be split off", refusals=whole.refusals or (str(error),))
    sets = whole.sets | {"train": _one([part for part, _, _ in parts]), "valid": _one([valid for _, valid, _ in parts])}
    count = sum(rows for _, _, rows in parts)
    return replace(
        whole,
        sets=sets,
        sizes=tuple(len(part) for part, _, _ in parts),
        valid_from=f"{count:,} row{'s' * (count > 1)} split off from training (seed {whole.seed}): there is no valid.jsonl",
        split_off=frozenset(row_of(sets["valid"].id(number)) for number in range(len(sets["valid"]))),
    )


def _in_windows(whole: Corpus, ruler: Ruler, prepared: dict[str, tuple[Prepared, ...]]) -> Corpus:
    """The same as windows over its documents."""
    if whole.refusals:
        return whole
    train, config = prepared["train"], whole.config
    sets = whole.sets
    if "valid" in prepared:
        streams = [Stream(each, ruler) for each in train]
        valid = [Stream(each, ruler.side_by_side) for each in prepared["valid"]]
        said = whole.valid_from
    else:
        streams, valid, drawn = split_text(train, ruler, config.validation_share, whole.seed)
        said = f"the last {sum(each.tokens for each in valid):,} tokens of the text"
        if drawn is not None:
            sets = sets | {"train": _one([each.source for each in streams]), "valid": _one(drawn)}
            said = f"{sum(each.documents for each in drawn):,} documents split off from training (seed {whole.seed})"
    windows, valid_windows = Windows(streams), Windows(valid)
    if not all(map(len, windows.streams)) or not len(valid_windows):
        raise DataError(
            f"{whole.sources[0].name}: this text is too short for training and validation: two tokens each at least."
        )
    measured = valid_windows.some()
    return replace(
        whole,
        sets=sets,
        sizes=tuple(len(stream) for stream in windows.streams),
        valid_from=f"{said}, in {len(valid_windows):,} windows" + _some(measured, len(valid_windows)),
        windows=windows,
        valid_windows=valid_windows,
    )


def _some(measured: int, whole: int) -> str:
    return f", of which {measured:,} evenly spread ones are measured" if measured < whole else ""


def _one(sets: Sequence[Prepared | Chosen]) -> KeptSet:
    return sets[0] if len(sets) == 1 else Joined(sets)
