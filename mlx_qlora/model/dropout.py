"""Dropout as a hash of the update, the layer, the tokens up to a position, and the column.

So it is the same in every layout, for a token that many rows share too, and when `mx.checkpoint` runs a block twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import ModelError


class Dropping(nn.Module):
    """A module that drops in training: some of its inputs or of its outputs, `dropped` of them."""

    dropout: float = 0.0
    _dropout_key: mx.array | None = None
    _marks: mx.array | None = None

    def dropped(self, x: mx.array, use: int = 0) -> mx.array:
        """`use`: which one, where a module drops in several places."""
        if not self.training or self.dropout == 0:
            return x
        if self._dropout_key is None:
            raise RuntimeError(
                "This model has dropout and is in training mode, but no dropout key was given. "
                "Run it inside `with lora.dropout_keys(model, mx.random.key(seed)):`, or call model.eval() first."
            )
        key = self._dropout_key + use if use else self._dropout_key
        keep = kept(key, self._marks, x.shape, self.dropout)
        return mx.where(keep, x * (1 / (1 - self.dropout)), 0).astype(x.dtype)

    def set_dropout_key(self, key: mx.array | None) -> None:
        # Past nn.Module, which would take an array for a parameter.
        object.__setattr__(self, "_dropout_key", key)

    def set_marks(self, marks: mx.array | None) -> None:
        """A number for each position of the next inputs; positions with the same number drop the same places."""
        object.__setattr__(self, "_marks", marks)


def kept(key: mx.array, marks: mx.array | None, shape: Sequence[int], dropout: float) -> mx.array:
    """Which of the inputs [..., D] dropout keeps: a hash of the key, the mark of the position and the place in D.

    Marks that follow from the tokens make it the same in every layout, for a token that many rows share too. Without
    marks the positions are counted. 776 x 192 on the CPU: 0.4 ms; `mx.random.bernoulli` takes 0.8.
    """
    *_, width = shape
    positions = math.prod(shape) // width
    if marks is None or marks.size != positions:
        marks = mx.arange(positions)
    low, high = marks.astype(mx.uint32), (marks.astype(mx.uint64) >> 32).astype(mx.uint32)
    first, second = key.astype(mx.uint32)
    rows = _mixed(_mixed(_mixed(low ^ first) ^ high) ^ second)
    # The columns are mixed too, so that two rows never draw the same numbers shifted.
    drawn = _mixed(rows[:, None] ^ _mixed(mx.arange(width, dtype=mx.uint32) + second)[None])
    return (drawn >= mx.array(min(round(dropout * 2**32), 2**32 - 1), mx.uint32)).reshape(shape)


def _mixed(x: mx.array) -> mx.array:
    """A bijection of 32-bit numbers that leaves nothing of their order (lowbias32 of Chris Wellons)."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


def dropping(model: nn.Module) -> list[tuple[str, Dropping]]:
    """The modules of a model that may drop something, with their paths, in the model's order."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Dropping)]


@contextmanager
def dropout_keys(model: nn.Module, key: mx.array) -> Iterator[None]:
    """Inside, each module drops by a mask that follows from `key` alone.

    So a forward that runs again (gradient checkpointing) drops the same places, and the gradient is right.
    """
    layers = [layer for _, layer in dropping(model)]
    keys = mx.random.split(key, max(1, len(layers)))
    for layer, own in zip(layers, keys, strict=False):
        layer.set_dropout_key(own)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_dropout_key(None)
            layer.set_marks(None)


# Dropout in a model that is trained in full

# What an attention and an MLP give back to the hidden states, as mlx-lm's models call it.
_LAST = frozenset({"o_proj", "out_proj", "wo", "dense", "c_proj", "down_proj", "fc2", "w2", "dense_4h_to_h"})
_LAYERS = "layers"


class _Output(Dropping):
    """Goes before a module's own class: the same module, some of whose outputs are dropped."""

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self.dropped(super().__call__(*args, **kwargs))


def drop_outputs(model: nn.Module, share: float) -> int:
    """Let embedding, attentions and MLPs of a model drop a share of what they give; says how many modules do. Recurrent
    layers drop what they give as a whole. Arrays and their names stay as they are."""
    modules = model.named_modules()
    layers = {path for path, _ in modules if path.split(".")[-2:-1] == [_LAYERS] and path.split(".")[-1].isdigit()}
    chosen: dict[str, nn.Module] = {}
    for layer in layers:
        own = {path: module for path, module in modules if path == layer or path.startswith(layer + ".")}
        last = {path: one for path, one in own.items() if path.split(".")[-1] in _LAST and isinstance(one, nn.Linear)}
        recurrent = any(isinstance(each, nn.LSTM | nn.GRU | nn.RNN) for each in own.values())
        if not last and not recurrent:
            names = ", ".join(sorted({path.split(".")[-1] for path in own if path != layer}))
            raise ModelError(
                f"dropout: nothing in {layer} is known to be the end of an attention or an MLP (its modules: {names}). "
                "Set dropout: 0 for this model."
            )
        chosen |= last or {layer: own[layer]}
    chosen |= {path: module for path, module in modules if isinstance(module, nn.Embedding)}
    for module in chosen.values():
        module.__class__ = _twin(type(module))
        one: Any = module
        one.dropout = share
    return len(chosen)


_twins: dict[type, type] = {}


def _twin(kind: type) -> type:
    if kind not in _twins:
        _twins[kind] = type(kind.__name__, (_Output, kind), {})
    return _twins[kind]
