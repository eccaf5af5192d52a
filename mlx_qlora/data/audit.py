"""What will be trained, before it is: duplicates, leaks between the splits, beginnings in common, examples to look at."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.corpus import Corpus
from mlx_qlora.data.order import shuffled
from mlx_qlora.data.prepare import KeptSet, row_of
from mlx_qlora.data.render import Account
from mlx_qlora.data.templates import Tokenizer
from mlx_qlora.records import Example

_SHINGLE = 5  # tokens
_ALIKE = 0.8  # share of shingles in common that makes near duplicates
_BANDS, _ROWS = 8, 4  # of the minhash
_MANY = 0.05  # shingles in more than this share of the examples are scaffolding
_PAIRS = 5  # shown
_READ = 300  # examples whose letters are looked at


@dataclass(frozen=True)
class Likeness:
    """Examples that are like others. Pairs are a few of them, by id."""

    count: int
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Leak:
    """What a split has in common with training."""

    split: str
    same: Likeness  # the same tokens
    same_prompt: Likeness  # the same beginning up to the first trained token, another answer
    near: Likeness


@dataclass(frozen=True)
class Sight:
    """An example as text: pieces, and whether each is trained."""

    id: str
    pieces: tuple[tuple[str, bool], ...]


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
    examples: dict[str, int]  # that are trained or validated with
    shares: dict[str, tuple[float, float]]  # by source, with weights: share of an epoch, passes over its examples
    duplicates: Likeness
    near_duplicates: Likeness
    looked_at: int  # examples among which near duplicates and common beginnings were looked for
    leaks: tuple[Leak, ...]
    common_prefix_share: float
    scripts: dict[str, float]
    refusals: tuple[str, ...]
    sights: tuple[Sight, ...] = ()

    def to_json(self) -> dict[str, Any]:
        value = asdict(replace(self, accounts={}, sights=()))
        train = self.accounts.get("train", Account())
        return {
            "rows": train.rows,
            "tokens": train.tokens,
            "supervised_tokens": train.supervised_tokens,
            **{name: each for name, each in value.items() if name not in ("accounts", "sights")},
            **{split: account.to_json() for split, account in self.accounts.items()},
        }


def audit(corpus: Corpus, look_at: int = 20_000, show: int = 0) -> Audit:
    """`look_at` bounds the examples that are compared with each other, `show` those that are decoded.

    The same example again is looked for among a thousand times as many, the first ones.
    """
    train = corpus.train
    others = {split: made for split, made in corpus.sets.items() if split != "train"}
    sample = _sample(train, look_at) if train is not None else np.empty(0, np.int64)
    tokens = [train[number].tokens for number in sample.tolist()] if train is not None else []
    pools = {split: _sample(made, look_at) for split, made in others.items()}
    pooled = [(split, int(number)) for split, numbers in pools.items() for number in numbers]
    near = _near([*tokens, *(others[split][number].tokens for split, number in pooled)])
    names = [train.id(number) for number in sample.tolist()] if train is not None else []
    everywhere = [*names, *(others[split].id(number) for split, number in pooled)]
    # Examples of one row are alike by their making.
    inside = [(a, b) for a, b in near if b < len(tokens) and row_of(names[a]) != row_of(names[b])]
    leaks = []
    for split, made in others.items():
        mine = {len(tokens) + place for place, (own, _) in enumerate(pooled) if own == split}
        across = {b: a for a, b in near if b in mine and a < len(tokens)}
        leaks.append(_leak(split, train, made, 1000 * look_at, [(everywhere[a], everywhere[b]) for b, a in across.items()]))
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
        examples={split: len(made) for split, made in corpus.sets.items()},
        shares={
            source.name: (quota / order.length, quota / size)
            for source, quota, size in zip(corpus.sources, order.quotas, order.sizes, strict=False)
            if size
        }
        if order.weights and order.length
        else {},
        duplicates=_same(train, 1000 * look_at) if train is not None else Likeness(0),
        near_duplicates=Likeness(len({b for _, b in inside}), tuple((names[a], names[b]) for a, b in inside[:_PAIRS])),
        looked_at=len(tokens),
        leaks=tuple(leaks),
        common_prefix_share=_common_prefixes(tokens),
        scripts=_scripts(train, corpus.renderer.tokenizer) if train is not None else {},
        refusals=corpus.refusals,
        sights=sights(train, corpus.renderer.tokenizer, show) if train is not None else (),
    )


def sights(examples: KeptSet, tokenizer: Tokenizer, most: int) -> tuple[Sight, ...]:
    return tuple(sight(examples[number], tokenizer) for number in range(min(most, len(examples))))


def sight(example: Example, tokenizer: Tokenizer) -> Sight:
    """An example decoded, its trained runs apart from the rest."""
    trained = example.weights > 0
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(trained)]
    pieces, before = [], ""
    for start, end in pairwise(edges):
        text = tokenizer.decode(example.tokens[:end].tolist())
        # An unfinished character at an edge is decoded otherwise once it is whole; then the piece stands for itself.
        own = text[len(before) :] if text.startswith(before) else tokenizer.decode(example.tokens[start:end].tolist())
        pieces.append((own, bool(trained[start])))
        before = text
    return Sight(example.id, tuple(pieces))


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


def _leak(split: str, train: KeptSet | None, made: KeptSet, most: int, near: list[tuple[str, str]]) -> Leak:
    if train is None:
        return Leak(split, Likeness(0), Likeness(0), Likeness(0))
    same, same_ids = _in_common(train, np.asarray(train.hashes[:most]), made, np.asarray(made.hashes))
    asked, asked_ids = _in_common(train, np.asarray(train.prompts[:most]), made, np.asarray(made.prompts))
    other_answer = [pair for pair, whole in zip(asked_ids, same[asked], strict=True) if not whole]
    known = {id for _, id in same_ids}
    rest = [pair for pair in near if pair[1] not in known]
    return Leak(
        split,
        Likeness(len(same_ids), tuple(same_ids[:_PAIRS])),
        Likeness(len(other_answer), tuple(other_answer[:_PAIRS])),
        Likeness(len(rest), tuple(rest[:_PAIRS])),
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


def _near(pool: Sequence[NDArray[np.int32]]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of examples that have most of their five-token shingles in common.

    Shingles that stand in many examples (a system prompt, the scaffolding of a form) say nothing and are left out.
    """
    if len(pool) < 2:
        return []
    owners, shingles = _shingles(pool)
    _, inverse, counts = np.unique(shingles, return_inverse=True, return_counts=True)
    telling = counts[inverse] <= max(10, int(_MANY * len(pool)))
    owners, shingles = owners[telling], shingles[telling]
    held, starts = np.unique(owners, return_index=True)
    if len(held) < 2:
        return []
    rng = np.random.default_rng(1)
    ends = np.append(starts[1:], len(shingles))
    signature = np.empty((_BANDS * _ROWS, len(held)), np.uint64)
    for row in range(len(signature)):
        factor, shift = (np.uint64(number) for number in rng.integers(1, 2**63, 2))
        signature[row] = np.minimum.reduceat((shingles * (factor | np.uint64(1))) ^ shift, starts)
    found: dict[int, int] = {}
    for band in range(_BANDS):
        keys = np.zeros(len(held), np.uint64)
        for row in signature[band * _ROWS : (band + 1) * _ROWS]:
            keys = (keys ^ row) * np.uint64(0x9E3779B97F4A7C15)
        order = np.argsort(keys, kind="stable")
        for before, after in pairwise(order):
            first, second = sorted((int(before), int(after)))
            if keys[before] != keys[after] or second in found:
                continue
            a, b = shingles[starts[first] : ends[first]], shingles[starts[second] : ends[second]]
            common = len(np.intersect1d(a, b, assume_unique=True))
            if common >= _ALIKE * (len(a) + len(b) - common):
                found[second] = first
    # The tokens themselves may be the same; those are counted elsewhere.
    pairs = ((int(held[first]), int(held[second])) for second, first in sorted(found.items()))
    return [(a, b) for a, b in pairs if not np.array_equal(pool[a], pool[b])]


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
