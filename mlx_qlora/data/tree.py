"""What examples have in common from the start, as a tree of pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.records import Example, Segment

# A common beginning that saves fewer positions than this is computed for each: a piece of its own costs an attention
# call, which on the CPU is worth about 6 positions of an 8-layer model.
_WORTH = 8


def sorted_by_tokens(examples: Sequence[Example]) -> list[Example]:
    """Neighbours have the longest beginnings in common."""
    return sorted(examples, key=lambda example: example.tokens.astype(">u4").tobytes())


def common(a: Example, b: Example) -> int:
    """How many tokens two examples have in common from the start, of those that go through a model (all but the last)."""
    length = min(len(a.tokens), len(b.tokens)) - 1
    different = np.flatnonzero(a.tokens[:length] != b.tokens[:length])
    return int(different[0]) if len(different) else length


class Tree:
    """The pieces of sorted examples in one row; `paths[n][i]` is where token i of example n stands in it.

    >>> def example(*tokens): return Example("", np.array(tokens), np.ones(len(tokens)))
    >>> tree = Tree([example(*range(9), 1, 2, 3), example(*range(9), 4, 5)])
    >>> tree.segments
    (Segment(start=0, end=9, parent=-1), Segment(start=9, end=11, parent=0), Segment(start=11, end=12, parent=0))
    >>> tree.paths[1].tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 11]
    """

    def __init__(self, examples: Sequence[Example]):
        shared = [common(a, b) for a, b in pairwise(examples)]
        segments: list[Segment] = []
        pieces: list[list[NDArray[np.int64]]] = [[] for _ in examples]
        size = 0
        waiting = [(0, len(examples), 0, -1)]  # (first, past the last, tokens that stand already, the piece they end in)
        while waiting:
            first, last, done, parent = waiting.pop()
            reach = min(shared[first : last - 1], default=len(examples[first].tokens) - 1)
            worth = last - first == 1 or (reach - done) * (last - first - 1) >= _WORTH
            if reach > done and worth:
                segments.append(Segment(size, size + reach - done, parent))
                for own in pieces[first:last]:
                    own.append(np.arange(size, size + reach - done))
                size += reach - done
                done, parent = reach, len(segments) - 1
            if last - first > 1:
                edges = [first, *(n + 1 for n in range(first, last - 1) if shared[n] == reach), last]
                waiting += [(a, b, done, parent) for a, b in pairwise(edges)][::-1]
        self.segments = tuple(segments)
        self.size = size
        self.paths = [np.concatenate([np.empty(0, np.int64), *own]) for own in pieces]
