"""Cache-like objects through which a model's own attention sees a prefix, or the pieces of a packed row.

The models of mlx-lm take one cache a layer: they ask it for an offset, a mask, and keys and values. That is enough to
put a prefix in front of every row (`Recorder`, `Prefixed`); the gradient reaches the prefix through its keys and values.
Inside a packed row the positions begin anew and each piece attends to its ancestors only. For that, `unpacking` gives a
copy of a layer whose attention has another rope and another attention function; the class of the model, its code and
its module stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.records import Segment

_ATTEND = "scaled_dot_product_attention"  # the name under which nearly all models of mlx-lm import it
_ROPE = "rope"


class Recorder:
    """The cache of a pass over the prefix: nothing stands before it, and it keeps what the rows will need."""

    offset = 0

    def __init__(self) -> None:
        self.kept: list[mx.array] = []

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return causal(length, 0, window_size, return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.kept = [keys, values]
        return keys, values

    # For checkpointing, where a layer is a function of arrays: what goes in, and a cache like this one around it.
    def inputs(self) -> list[mx.array]:
        return []

    def around(self, _: Sequence[mx.array]) -> Recorder:
        return Recorder()


class Prefixed:
    """The cache of rows that stand behind a prefix."""

    def __init__(self, kept: Sequence[mx.array], offset: int):
        self.prefix = list(kept)  # empty for a layer that is not computed
        self.kept: list[mx.array] = []
        self.offset = offset

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return causal(length, self.offset, window_size, return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        def behind(prefix: mx.array, own: mx.array) -> mx.array:
            return mx.concatenate([mx.broadcast_to(prefix, (own.shape[0], *prefix.shape[1:])), own], axis=2)

        return behind(self.prefix[0], keys), behind(self.prefix[1], values)

    def inputs(self) -> list[mx.array]:
        return self.prefix

    def around(self, arrays: Sequence[mx.array]) -> Prefixed:
        return Prefixed(arrays, self.offset)


class Packed:
    """The cache of a packed row: says where each piece stands in its example, and attends piece by piece."""

    def __init__(self, segments: Sequence[Segment], block: int | None = None):
        if block:
            segments = _cut(segments, block)
        self.kept: list[mx.array] = []
        self._ends = [segment.end for segment in segments[:-1]]
        self._chains: list[list[int]] = []  # of each piece: its ancestors from the first one, and itself
        begins: list[int] = []
        for number, segment in enumerate(segments):
            above = [] if segment.parent < 0 else self._chains[segment.parent]
            self._chains.append([*above, number])
            begins.append(sum(segments[one].end - segments[one].start for one in above))
        self._begins = begins
        self.offset = mx.concatenate(
            [mx.arange(begin, begin + s.end - s.start) for begin, s in zip(begins, segments, strict=True)]
        )

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return "causal" if window_size is None else _Window(window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def inputs(self) -> list[mx.array]:
        return []

    def around(self, _: Sequence[mx.array]) -> Packed:
        return self

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, window: int | None, **more: Any) -> mx.array:
        # Splits, because the backward of a split is one concatenation; that of slices would fill a row for each.
        pieces = [mx.split(each, self._ends, axis=2) for each in (queries, keys, values)]
        outputs = []
        for number, chain in enumerate(self._chains):
            own, *seen = pieces[0][number], *(_joined([part[one] for one in chain]) for part in pieces[1:])
            mask = causal(own.shape[2], self._begins[number], window)
            outputs.append(mx.fast.scaled_dot_product_attention(own, *seen, mask=mask, **more))
        return _joined(outputs)


def _cut(segments: Sequence[Segment], block: int) -> list[Segment]:
    """The same tree in pieces of at most `block` tokens, each the parent of the next.

    A piece computes scores for all its keys, those ahead of a token too, which are masked; short pieces have fewer.
    """
    pieces: list[Segment] = []
    last: list[int] = []  # the last piece of each segment
    for segment in segments:
        parent = last[segment.parent] if segment.parent >= 0 else -1
        for start in range(segment.start, segment.end, block):
            pieces.append(Segment(start, min(start + block, segment.end), parent))
            parent = len(pieces) - 1
        last.append(parent)
    return pieces


def _joined(parts: Sequence[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=2)


class _Window:
    """The mask of a layer with a sliding window, on its way through the model's code to the attention."""

    def __init__(self, size: int):
        self.size = size


def causal(length: int, offset: int, window: int | None, return_array: bool = False) -> Any:
    """The mask of `length` tokens behind `offset` others: `"causal"` where that says it, which needs no memory on a GPU."""
    if return_array or (window is not None and offset + length > window):
        rows = mx.arange(offset, offset + length)[:, None]
        columns = mx.arange(offset + length)[None]
        mask = rows >= columns
        return mask if window is None else mask & (rows < columns + window)
    return None if length == 1 else "causal"


def can_unpack(layer: nn.Module) -> bool:
    """Whether `unpacking` knows what to change in a layer."""
    return any(True for _ in _attentions(layer))


def _attentions(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in layer.named_modules():
        code = getattr(type(module).__call__, "__code__", None)
        if code is not None and _ATTEND in code.co_names and _ROPE in module:
            yield path, module


def unpacking(layer: nn.Module, packed: Packed) -> nn.Module:
    """A copy of a layer, arrays and all else shared, that computes a packed row."""
    changed = copied(layer)
    for path, module in list(_attentions(layer)):
        holder: Any = changed
        *above, name = path.split(".")
        for step in above:
            dict.__setitem__(holder, step, copied(holder[step]))
            holder = holder[step]
        own = copied(module)
        own.__class__ = _twin(type(module))
        dict.__setitem__(own, _ROPE, _Rope(module[_ROPE], packed.offset))
        dict.__setitem__(holder, name, own)
    return changed  # type: ignore[no-any-return]


def copied(module: nn.Module) -> Any:
    """The same module as another object: what is put into it is not in the first one."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    dict.update(copy, module)
    return copy


class _Rope:
    """A model's rope with positions of its own: the tokens go through it as rows of one token each."""

    def __init__(self, rope: Any, positions: mx.array):
        self._rope, self._positions = rope, positions

    def __call__(self, x: mx.array, **_: object) -> mx.array:
        turned = self._rope(x.transpose(2, 1, 0, 3), offset=self._positions)
        return turned.transpose(2, 1, 0, 3)  # type: ignore[no-any-return]


_twins: dict[type, type] = {}


def _twin(kind: type) -> type:
    """The class whose `__call__` is the same code with our attention function in the place of mlx-lm's."""
    if kind not in _twins:
        call: Any = kind.__call__
        ours = call.__globals__ | {_ATTEND: _attend}
        code = types.FunctionType(call.__code__, ours, call.__name__, call.__defaults__, call.__closure__)
        _twins[kind] = type(kind.__name__, (kind,), {"__call__": code})
    return _twins[kind]


def _attend(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Packed, scale: float, mask: Any, **more: Any
) -> mx.array:
    if not (mask is None or isinstance(mask, _Window) or (isinstance(mask, str) and mask == "causal")):
        raise TypeError("this attention has a mask of its own, which pieces of a row have no place for")
    window = mask.size if isinstance(mask, _Window) else None
    return cache.attend(queries, keys, values, window, scale=scale, **more)
