"""What will be trained, before it is: duplicates, leaks between the splits, beginnings in common, examples to look at."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.chain import ChainConfig
from mlx_qlora.data.corpus import Corpus
from mlx_qlora.data.order import shuffled
from mlx_qlora.data.prepare import ExampleSet, KeptSet, row_of
from mlx_qlora.data.render import Account
from mlx_qlora.data.sources import SPLITS
from mlx_qlora.data.templates import Tokenizer
from mlx_qlora.data.windows import Windows
from mlx_qlora.records import Example

_SHINGLE = 5  # tokens
_ALIKE = 0.8  # share of shingles in common that makes near duplicates
_BANDS, _ROWS = 8, 4  # of the minhash
_BEFORE, _OWN = 32, 512  # tokens before the first answer that are compared, and all that are
_COMPARED = 8  # examples of a group that the others are compared with
_PAIRS = 5  # shown
_DOCUMENTS = 200  # that are compared, where text is trained as windows: they may be long
_READ = 300  # examples whose letters are looked at


@dataclass(frozen=True)
class Likeness:
    """Examples that are like others. Pairs are a few of them, by id."""

    count: int
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Size:
    """How much of a split is used: of training what is left after validation rows are split off."""

    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    longest: int  # before truncation, of all rows of its files
    digest: str = ""  # of the examples, in few letters


@dataclass(frozen=True)
class Leak:
    """What a split has in common with training, or the test split with validation."""

    split: str
    against: str
    same: Likeness  # the same tokens
    same_prompt: Likeness  # the same beginning up to the first trained token, another answer
    near: Likeness


@dataclass(frozen=True)
class Sight:
    """An example as text: pieces, and whether each is trained; where that is not all, what is to be said of each."""

    id: str
    pieces: tuple[tuple[str, bool], ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audit:
    """All that is known of a data set before training."""

    sources: dict[str, dict[str, list[str]]]  # files by source and split
    template: str
    train_on: str
    max_seq_length: int
    truncation: str
    validation: str
    accounts: dict[str, Account]
    sizes: dict[str, Size]
    shares: dict[str, tuple[float, float]]  # by source, with weights: share of an epoch, passes over its examples
    duplicates: Likeness
    near_duplicates: Likeness
    looked_at: int  # examples among which near duplicates and common beginnings were looked for
    leaks: tuple[Leak, ...]
    common_prefix_share: float
    scripts: dict[str, float]
    refusals: tuple[str, ...]
    sights: tuple[Sight, ...] = ()
    windows: str = ""  # how text is cut into windows, if it is
    chain: str = ""  # how rationale and answer are weighed, if they are

    def to_json(self) -> dict[str, Any]:
        value = asdict(replace(self, accounts={}, sights=()))
        train = value["sizes"].get("train", asdict(Size(0, 0, 0, 0, 0)))
        return {
            **{name: train[name] for name in ("rows", "examples", "tokens", "supervised_tokens")},
            **{name: each for name, each in value.items() if name not in ("accounts", "sights")},
            **{split: account.to_json() for split, account in self.accounts.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Audit:
        """What `to_json` gave. Raises a KeyError, TypeError, ValueError or AttributeError where it is something else."""
        plain = ("sources", "template", "train_on", "max_seq_length", "truncation", "validation", "looked_at",
                 "common_prefix_share", "scripts")  # fmt: skip
        return cls(
            **{name: value[name] for name in plain},
            accounts={split: Account.from_json(value[split]) for split in SPLITS if split in value},
            sizes={split: Size(**size) for split, size in value["sizes"].items()},
            shares={name: (float(share), float(passes)) for name, (share, passes) in value["shares"].items()},
            duplicates=_likeness(value["duplicates"]),
            near_duplicates=_likeness(value["near_duplicates"]),
            leaks=tuple(
                Leak(each["split"], each["against"], *(_likeness(each[kind]) for kind in ("same", "same_prompt", "near")))
                for each in value["leaks"]
            ),
            refusals=tuple(value["refusals"]),
            windows=str(value.get("windows", "")),
            chain=str(value.get("chain", "")),
        )


def _likeness(value: Mapping[str, Any]) -> Likeness:
    return Likeness(int(value["count"]), tuple((str(a), str(b)) for a, b in value["pairs"]))


def audit(corpus: Corpus, look_at: int = 20_000, show: int = 0) -> Audit:
    """`look_at` bounds the examples that are compared with each other, `show` those that are decoded.

    The same example again is looked for among a thousand times as many, the first ones.
    """
    train = corpus.sets.get("train")
    look_at = min(look_at, _DOCUMENTS) if corpus.windows else look_at
    pool = _Pool(corpus.sets, look_at)
    near = pool.near()
    most = 1000 * look_at
    leaks = tuple(
        _leak(split, against, corpus.sets, most, [pair for pair in near if pair[0] == against and pair[2] == split])
        for split, against in (("valid", "train"), ("test", "train"), ("test", "valid"))
        if split in corpus.sets and against in corpus.sets
    )
    # Examples of one row are alike by their making.
    inside = [
        (a, b) for one, a, other, b in near if one == other == "train" and row_of(a) != row_of(b)
    ]  # fmt: skip
    order = corpus.order
    return Audit(
        sources={
            source.name: {split: [file.name for file in files] for split, files in source.files.items()}
            for source in corpus.sources
        },
        template=corpus.renderer.template,
        train_on=corpus.render.train_on.value,
        max_seq_length=corpus.render.max_seq_length,
        truncation=corpus.render.truncation,
        validation=corpus.valid_from,
        accounts=corpus.accounts,
        sizes=_sizes(corpus),
        shares={
            source.name: (quota / order.length, quota / size)
            for source, quota, size in zip(corpus.sources, order.quotas, order.sizes, strict=False)
            if size
        }
        if order.weights and order.length
        else {},
        duplicates=_same(train, most) if train is not None else Likeness(0),
        near_duplicates=Likeness(len({b for _, b in inside}), tuple(inside[:_PAIRS])),
        looked_at=pool.size("train"),
        leaks=leaks,
        common_prefix_share=_common_prefixes(pool.tokens("train")),
        scripts=_scripts(train, corpus.renderer.tokenizer) if train is not None else {},
        refusals=corpus.refusals,
        sights=sights(corpus.train, corpus.renderer.tokenizer, show) if corpus.train is not None else (),
        windows=_windows(corpus.windows) if corpus.windows else "",
        chain=str(corpus.render.chain) if corpus.render.chain.on else "",
    )


def _sizes(corpus: Corpus) -> dict[str, Size]:
    sizes = {}
    split_off = len(corpus.split_off or ())
    for split, made in corpus.sets.items():
        account = corpus.accounts.get(split) or corpus.accounts["train"]
        rows = account.rows - split_off if split == "train" else split_off if split not in corpus.accounts else account.rows
        longest = max(account.longest)[0] if account.longest else 0
        longest = min(longest, corpus.windows.window) if corpus.windows else longest
        tokens, supervised = int(made.lengths.sum()), int(made.supervised.sum())
        count, digest = made.documents if corpus.windows else len(made), _digest(made, corpus.render.chain)
        sizes[split] = Size(rows, count, tokens, supervised, longest, digest)
    return {split: sizes[split] for split in SPLITS if split in sizes}


def _windows(windows: Windows) -> str:
    ruler = windows.ruler
    counts = "what they share counts in each" if ruler.overlap == "each" else "what they share counts once, and is context else"
    counts = "side by side" if ruler.stride == ruler.window else f"one every {ruler.stride:,}; {counts}"
    over = "over the borders of documents" if ruler.cross_documents else "each within a document"
    return f"{len(windows):,} of {ruler.window:,} tokens, {counts}; {over}"


def _digest(examples: KeptSet, chain: ChainConfig) -> str:
    """What they are, in few letters, in whatever order and from whatever file: losses on the same are comparable."""
    each = np.stack([examples.hashes, examples.prompts, examples.supervised.astype(np.uint64)])
    weighed = str(chain).encode() if chain.on else b""  # the same tokens with other weights have other losses
    return hashlib.blake2b(each[:, np.lexsort(each)].tobytes() + weighed, digest_size=8).hexdigest()


def sights(examples: ExampleSet, tokenizer: Tokenizer, most: int) -> tuple[Sight, ...]:
    return tuple(sight(examples[number], tokenizer) for number in range(min(most, len(examples))))


def sight(example: Example, tokenizer: Tokenizer) -> Sight:
    """An example decoded, its trained runs apart from the rest. What is predicted in place of the token that stands there is a
    piece of its own, and that token is not trained."""
    replaced = (example.wanted != example.tokens) & (example.weights > 0)
    weights = np.where(replaced, 0, example.weights)
    begins = np.flatnonzero((weights[1:] != weights[:-1]) | replaced[1:]) + 1
    edges = [0, *begins.tolist(), len(weights)]
    weighed = bool((example.weights * (1 - example.weights)).any())
    pieces, remarks, before = [], [], ""
    for start, end in pairwise(edges):
        if replaced[start]:
            pieces.append((f"→{tokenizer.decode([int(example.wanted[start])])}", True))
            remarks.append(_weight(example.weights[start]))
            if remarks[-2:-1] == remarks[-1:]:  # what goes on is said once
                remarks[-2] = ""
        text = tokenizer.decode(example.tokens[:end].tolist())
        # An unfinished character at an edge is decoded otherwise once it is whole; then the piece stands for itself.
        own = text[len(before) :] if text.startswith(before) else tokenizer.decode(example.tokens[start:end].tolist())
        pieces.append((own, bool(weights[start])))
        remarks.append(_weight(weights[start]))
        before = text
    return Sight(example.id, tuple(pieces), tuple(remarks) if weighed else ())


def _weight(weight: float) -> str:
    """
    >>> _weight(1 / 12), _weight(0)
    ('×0.0833', '')
    """
    return f"×{weight:.3g}" if weight else ""


def _sample(examples: KeptSet, most: int) -> NDArray[np.int64]:
    count = len(examples)
    return np.arange(count) if count <= most else np.sort(shuffled(np.arange(most), count, (0x5A3B1E,)))


# The same


def _same(examples: KeptSet, most: int) -> Likeness:
    """Examples with the tokens of an earlier one, among the first `most`."""
    hashes = np.asarray(examples.hashes[:most])
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
    pairs = tuple((examples.id(int(first[inverse[number]])), examples.id(int(number))) for number in again[:_PAIRS])
    return Likeness(len(again), pairs)


def _leak(split: str, against: str, sets: dict[str, KeptSet], most: int, near: list[tuple[str, str, str, str]]) -> Leak:
    known, made = sets[against], sets[split]
    same, same_ids = _in_common(known, np.asarray(known.hashes[:most]), made, np.asarray(made.hashes))
    asked, asked_ids = _in_common(known, np.asarray(known.prompts[:most]), made, np.asarray(made.prompts))
    other_answer = [pair for pair, whole in zip(asked_ids, same[asked], strict=True) if not whole]
    exact = {id for _, id in same_ids}
    rest = [(a, b) for _, a, _, b in near if b not in exact]
    return Leak(
        split,
        against,
        Likeness(len(same_ids), tuple(same_ids[:_PAIRS])),
        Likeness(len(other_answer), tuple(other_answer[:_PAIRS])),
        Likeness(len({b for _, b in rest}), tuple(rest[:_PAIRS])),
    )


def _in_common(
    train: KeptSet, train_hashes: NDArray[np.uint64], made: KeptSet, hashes: NDArray[np.uint64]
) -> tuple[NDArray[np.bool_], list[tuple[str, str]]]:
    """(which of the others are in training, their ids with those in training)."""
    order = np.argsort(train_hashes, kind="stable")
    place = np.minimum(np.searchsorted(train_hashes[order], hashes), len(order) - 1) if len(order) else np.zeros(0, int)
    found = (train_hashes[order[place]] == hashes) & (hashes != 0) if len(order) else np.zeros(len(hashes), bool)
    return found, [(train.id(int(order[place[number]])), made.id(int(number))) for number in np.flatnonzero(found)]


# Near


class _Pool:
    """Samples of all splits, with what is told of an example where it begins to answer."""

    def __init__(self, sets: dict[str, KeptSet], most: int):
        self._examples: list[tuple[str, str, NDArray[np.int32]]] = []  # (split, id, tokens)
        self._own: list[NDArray[np.int32]] = []
        for split, made in ((split, sets[split]) for split in SPLITS if split in sets):
            for number in _sample(made, most).tolist():
                example = made[number]
                self._examples.append((split, example.id, example.tokens))
                # What stands long before the first answer, such as a system prompt, is the same for all.
                begin = max(int(np.argmax(example.weights > 0)) - _BEFORE, 0)
                self._own.append(example.tokens[begin : begin + _OWN])

    def size(self, split: str) -> int:
        return sum(own == split for own, _, _ in self._examples)

    def tokens(self, split: str) -> list[NDArray[np.int32]]:
        return [tokens for own, _, tokens in self._examples if own == split]

    def near(self) -> list[tuple[str, str, str, str]]:
        """(split, id, split, id) of examples that are nearly the same, the earlier first."""
        pairs = ((self._examples[a], self._examples[b]) for a, b in _near(self._own, [split for split, _, _ in self._examples]))
        return [(one[0], one[1], other[0], other[1]) for one, other in pairs if not np.array_equal(one[2], other[2])]


def _near(pool: Sequence[NDArray[np.int32]], labels: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) that have most of their five-token shingles in common, by minhash and then in truth.

    For each later one, one of each label at most.
    """
    if len(pool) < 2:
        return []
    owners, shingles = _shingles(pool)
    held, starts = np.unique(owners, return_index=True)
    rng = np.random.default_rng(1)
    ends = np.append(starts[1:], len(shingles))
    signature = np.empty((_BANDS * _ROWS, len(held)), np.uint64)
    for row in range(len(signature)):
        factor, shift = (np.uint64(number) for number in rng.integers(1, 2**63, 2))
        signature[row] = np.minimum.reduceat((shingles * (factor | np.uint64(1))) ^ shift, starts)
    found: dict[tuple[str, int], int] = {}

    def alike(first: int, second: int) -> bool:
        a, b = shingles[starts[first] : ends[first]], shingles[starts[second] : ends[second]]
        common = len(np.intersect1d(a, b, assume_unique=True))
        return common >= _ALIKE * (len(a) + len(b) - common)

    for band in range(_BANDS):
        keys = np.zeros(len(held), np.uint64)
        for row in signature[band * _ROWS : (band + 1) * _ROWS]:
            keys = (keys ^ row) * np.uint64(0x9E3779B97F4A7C15)
        order = np.argsort(keys, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            members = sorted(int(one) for one in group)
            for place, second in enumerate(members):
                # Of each split the first few of the group; comparing all with all would be quadratic.
                for first in members[: min(place, _COMPARED)]:
                    pair = (labels[held[first]], second)
                    if pair not in found and alike(first, second):
                        found[pair] = first
    return [(int(held[first]), int(held[second])) for (_, second), first in sorted(found.items(), key=lambda item: item[0][1])]


def _shingles(pool: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """(example, hash) of each different shingle of each example, sorted."""
    owners, hashes = [], []
    for number, tokens in enumerate(pool):
        values = tokens.astype(np.uint64)
        width = min(_SHINGLE, len(values))
        own = np.zeros(len(values) - width + 1, np.uint64)
        for shift in range(width):
            own = (own ^ values[shift : len(values) - width + 1 + shift]) * np.uint64(0x100000001B3)
        unique = np.unique(own)
        hashes.append(unique)
        owners.append(np.full(len(unique), number))
    return np.concatenate(owners), np.concatenate(hashes)


def _common_prefixes(pool: Sequence[NDArray[np.int32]]) -> float:
    """Share of the tokens that stand in a beginning which another example has too: computed once, they cost nothing more."""
    ordered = sorted(pool, key=lambda tokens: tokens.astype(">i4").tobytes())
    shared = 0
    for a, b in pairwise(ordered):
        size = min(len(a), len(b))
        differ = np.flatnonzero(a[:size] != b[:size])
        shared += int(differ[0]) if len(differ) else size
    whole = sum(map(len, pool))
    return shared / whole if whole else 0.0


# Letters


def _scripts(examples: KeptSet, tokenizer: Tokenizer) -> dict[str, float]:
    """Share of the letters in each script, by the names that Unicode has for them."""
    counts: Counter[str] = Counter()
    for number in _sample(examples, _READ).tolist():
        example = examples[number]
        counts.update(filter(None, map(_script, tokenizer.decode(example.tokens[:2000].tolist(), skip_special_tokens=True))))
    whole = sum(counts.values())
    return {name: number / whole for name, number in counts.most_common(4)} if whole else {}


@cache
def _script(letter: str) -> str | None:
    return unicodedata.name(letter, "").split(" ")[0].lower() if letter.isalpha() else None
