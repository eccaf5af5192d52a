"""Examples of a source that is too large to prepare: read, rendered and shuffled window by window, without an end.

A window of rows is read, its examples are put in a seeded order, and they are given out; then comes the next. So the
order depends on seed, epoch and place alone, and a bookmark is the rows before the window and a place in it: to go on,
the rows before are read over, and one window is rendered again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from mlx_qlora.data.order import shuffled
from mlx_qlora.data.render import Account, Refusals, RenderConfig, Renderer, refused, too_long
from mlx_qlora.data.sources import BadRow, Row, Source, SourceConfig, read
from mlx_qlora.errors import DataError
from mlx_qlora.records import Bookmark, Example


def stream(
    sources: tuple[Source, ...],
    source: SourceConfig,
    render: RenderConfig,
    renderer: Renderer,
    seed: int,
    start: Bookmark,
    account: Account | None = None,
) -> Iterator[tuple[Example, Bookmark]]:
    """(an example, where the next one begins), for ever. `account` is filled with what became of the rows of one epoch."""
    epoch, before, place = start.epoch, start.rows, start.place
    account = Account() if account is None else account
    while True:
        refusals = Refusals()
        rows = islice(_mixed(sources, source.data_weights), before, None)
        any_here = before > 0
        while window := list(islice(rows, source.shuffle_buffer)):
            examples = list(renderer.examples(window, account, refusals))
            if reason := refused(account, source):
                raise DataError(reason)
            if account.long_rows and render.truncation == "error":
                raise DataError(too_long(account, render))
            any_here = any_here or bool(examples)
            order = shuffled(np.arange(len(examples)), max(len(examples), 1), (seed, epoch, before)).tolist()
            for at in range(place, len(examples)):
                yield examples[order[at]], Bookmark(epoch, at + 1, before)
            before, place = before + len(window), 0
        if not any_here:
            raise DataError(f"{sources[0].name}: no row of this stream has anything to train.")
        epoch, before, place = epoch + 1, 0, 0
        account = Account()


def _mixed(sources: tuple[Source, ...], weights: tuple[float, ...]) -> Iterator[Row | BadRow]:
    """The rows of all sources; with weights each source has its share at any time, and begins again at its end."""
    if not weights:
        for each in sources:
            yield from read(each.files["train"])
        return
    share = np.array(weights) / sum(weights)
    given = np.zeros(len(sources))
    readers = [read(each.files["train"]) for each in sources]
    while True:
        chosen = int(np.argmax(share * (given.sum() + 1) - given))  # who is furthest behind its share
        row = next(readers[chosen], None)
        if row is None:
            readers[chosen] = read(sources[chosen].files["train"])
            if (row := next(readers[chosen], None)) is None:
                raise DataError(f"{sources[chosen].name}: this source has no rows.")
        given[chosen] += 1
        yield row
