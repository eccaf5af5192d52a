"""Exposure: how many tokens a run reads, reckoned from a few counts. Nothing is read for it.

Two runs that differ in epochs, stride, batch and window can be compared by one figure, the tokens that they have seen.
A position is counted when it is read: `window` of them in a window, and of a row all tokens but the last, which is
only a target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Count = TypeVar("Count", int, NDArray[np.int64])


def windows_of(targets: Count, window: int, stride: int) -> Count:
    """How many windows cover so many targets; the last one is shifted back to end with them.

    >>> windows_of(30_000_000 - 1, 256, 128), windows_of(256, 256, 128), windows_of(0, 256, 128)
    (234374, 1, 0)
    """
    more = -(-(targets - window) // stride)
    if isinstance(targets, int):
        return max(0, more) + 1 if targets > 0 else 0
    return np.where(targets > 0, np.maximum(more, 0) + 1, 0)


@dataclass(frozen=True)
class Amount:
    """What there is to read, and what an epoch reads of it."""

    tokens: int  # in the data
    readable: int  # of them, those that something is predicted from: all but the last of a row, of a document, or of all
    examples: int  # an epoch has; windows, where there is a window
    tokens_per_epoch: int  # positions that are read
    supervised_per_epoch: int  # targets that count in the loss
    documents: int | None = None  # or rows
    window: int | None = None
    stride: int | None = None
    overlap: str = "each"


def rows(tokens: int, examples: int, supervised: int, documents: int | None = None) -> Amount:
    """Of examples that are rows, with so many tokens together."""
    return Amount(tokens, tokens - examples, examples, tokens - examples, supervised, documents)


def windows(tokens: int, window: int, stride: int, overlap: str = "each", documents: int | None = None) -> Amount:
    """Of a stream that goes on from one document into the next, with a stride up to the window."""
    targets = max(0, tokens - 1)
    count = windows_of(targets, window, stride)
    read = count * window if targets > window else targets
    return Amount(tokens, targets, count, read, targets if overlap == "once" else read, documents, window, stride, overlap)


def joined(parts: Sequence[Amount], quotas: Sequence[int]) -> Amount:
    """Of several sources together, of each of which an epoch has so many examples."""
    shares = [quota / max(1, each.examples) for each, quota in zip(parts, quotas, strict=True)]
    documents = [each.documents for each in parts if each.documents is not None]
    return replace(
        parts[0],
        tokens=sum(each.tokens for each in parts),
        readable=sum(each.readable for each in parts),
        examples=sum(quotas),
        tokens_per_epoch=round(sum(each.tokens_per_epoch * share for each, share in zip(parts, shares, strict=True))),
        supervised_per_epoch=round(sum(each.supervised_per_epoch * share for each, share in zip(parts, shares, strict=True))),
        documents=sum(documents) if documents else None,
    )


@dataclass(frozen=True)
class Exposure:
    """What a run will see. What is not known, as of a stream of rows without an end, is None."""

    data: Amount | None
    examples_per_update: int
    epochs: int
    updates: int
    ended_by_max_steps: bool
    trained_parameters: int | None = None
    total_parameters: int | None = None
    updates_per_epoch: int | None = None  # with a last one that may have fewer examples
    full_updates_per_epoch: int | None = None
    tokens_per_update: int | None = None  # of a full one; a mean where examples differ in length
    tokens_seen: int | None = None
    supervised_tokens_seen: int | None = None
    passes: float | None = None  # over each token that can be read
    tokens_per_parameter: float | None = None  # tokens seen for each that is trained

    def to_json(self) -> dict[str, Any]:
        own = asdict(self)
        data = own.pop("data") or dict.fromkeys(Amount.__dataclass_fields__)
        return {**data, **own, "windows": data["examples"] if data["window"] else None}


def reckon(
    data: Amount | None,
    examples_per_update: int,
    epochs: int,
    max_steps: int | None = None,
    trained: int | None = None,
    parameters: int | None = None,
    updates: tuple[int, int] | None = None,
) -> Exposure:
    """The exposure of a run.

    `updates`: (of an epoch, of all epochs), where these are known to be other than the examples say, as with a minimum of
    supervised tokens.

    >>> made = reckon(windows(30_000_000, 256, 128), examples_per_update=32, epochs=4)
    >>> made.full_updates_per_epoch, made.updates_per_epoch, made.tokens_per_update, made.tokens_seen
    (7324, 7325, 8192, 239998976)
    """
    if data is None or not data.examples:
        return Exposure(data, examples_per_update, epochs, max_steps or 0, True, trained, parameters)
    by_size = -(-data.examples // examples_per_update)
    epoch, whole = updates or (by_size, epochs * by_size)
    made = min(whole, max_steps) if max_steps else whole
    if made == whole:
        read = epochs * data.examples
    else:
        full, rest = divmod(made, epoch)
        size = examples_per_update if epoch == by_size else data.examples / epoch
        read = full * data.examples + min(round(rest * size), data.examples)
    seen = read * data.tokens_per_epoch // data.examples
    return Exposure(
        data=data,
        examples_per_update=examples_per_update,
        epochs=epochs,
        updates_per_epoch=epoch,
        full_updates_per_epoch=data.examples // examples_per_update if epoch == by_size else epoch,
        updates=made,
        ended_by_max_steps=made < whole,
        tokens_per_update=min(data.examples, examples_per_update) * data.tokens_per_epoch // data.examples,
        tokens_seen=seen,
        supervised_tokens_seen=read * data.supervised_per_epoch // data.examples,
        passes=seen / data.readable,
        trained_parameters=trained,
        total_parameters=parameters,
        tokens_per_parameter=seen / trained if trained else None,
    )


@dataclass(frozen=True)
class Seen:
    """What became of it: of a run that has ended, or so far."""

    updates: int
    tokens_seen: int
    supervised_tokens_seen: int
    passes: float | None
    tokens_per_parameter: float | None


def seen(planned: Exposure, updates: int, tokens: int, supervised: int) -> Seen:
    """What a run has really seen, `tokens` being positions that were read."""
    data, trained = planned.data, planned.trained_parameters
    passes = tokens / data.readable if data is not None and data.readable else None
    return Seen(updates, tokens, supervised, passes, tokens / trained if trained else None)


def times_as_many(one: float, other: float) -> float:
    """How often `one` is in `other`; infinite where it is nothing."""
    return other / one if one else math.inf
