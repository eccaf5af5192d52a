"""Rows for tokens that a model does not know yet: in its embedding, in its head, and in nothing else of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.errors import ModelError
from mlx_qlora.model.lora import vocabulary_paths

_QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)
_OF_ROWS = ("weight", "scales", "biases", "bias")  # arrays that have a row for each token
_AT_ONCE = 4096  # rows that are written out dense at once


def vocabulary_layers(model: nn.Module, rows: int) -> dict[str, Any]:
    """The embedding and, where it is another one, the head of a model whose config.json says so many rows, by their paths."""
    modules = dict(model.named_modules())
    found = {path: modules[path] for path in vocabulary_paths(model) if modules[path].weight.shape[0] == rows}
    if not found:
        raise ModelError(
            f"no embedding of this model has the {rows:,} rows that its config.json says (vocab_size), so none can be added."
        )
    return found


def grow(layers: dict[str, Any], known: Iterable[int], upto: int) -> None:
    """Give each layer the rows from the end of `known` to `upto`, those that it has as padding among them: all the mean of the
    known rows, quantised as these are. No byte of the other rows changes."""
    numbers = np.fromiter(known, np.int64)
    first = int(numbers.max()) + 1
    for layer in layers.values():
        new = _mean(layer, numbers)
        for name in _OF_ROWS:
            if (array := layer.get(name)) is not None:
                added = mx.repeat(new[name].astype(array.dtype), upto - first, axis=0)
                layer[name] = mx.concatenate([array[:first], added, array[upto:]])
        mx.eval([layer[name] for name in _OF_ROWS if layer.get(name) is not None])


def _mean(layer: Any, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, mx.array]:
    """One row, the mean of those with these numbers, as the layer holds rows: by the names of its arrays."""
    total = mx.zeros((1,))
    for start in range(0, len(numbers), _AT_ONCE):
        total = total + _dense(layer, mx.array(numbers[start : start + _AT_ONCE])).sum(axis=0, keepdims=True)
        mx.eval(total)
    row: dict[str, mx.array] = {"weight": total / len(numbers)}
    if isinstance(layer, _QUANTISED):
        how: dict[str, Any] = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        # Rounded as the layer's numbers were before they were quantised; modes of 8-bit scales say nothing about that.
        exact = row["weight"].astype(layer.scales.dtype) if layer.mode == "affine" else row["weight"]
        row = dict(zip(("weight", "scales", "biases"), mx.quantize(exact, **how), strict=False))
    if "bias" in layer:
        row["bias"] = layer.bias[mx.array(numbers)].astype(mx.float32).mean(axis=0, keepdims=True)
    return row


def _dense(layer: Any, rows: mx.array) -> mx.array:
    """Rows of a layer's weight in float32."""
    if not isinstance(layer, _QUANTISED):
        return layer.weight[rows].astype(mx.float32)  # type: ignore[no-any-return]
    biases = layer.get("biases")
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    picked = (layer.weight[rows], layer.scales[rows], None if biases is None else biases[rows])
    return mx.dequantize(*picked, **how, dtype=mx.float32)
