"""No trainer: the multiplications that an update of ours can't do without, timed bare, on the same BLAS.

For every linear layer `x @ W.T`, and `dy @ W` where a gradient passes; the head at the supervised places; scores and
values of the attention (2 products forward, 4 backward); the adapters' products, forward and backward. The weights are
dense already and nothing element-wise is done: no dequantising, no norms, no softmax, no activation, no optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.bench.settings import Spec
from mlx_qlora.bench.turns import Turns, Work
from mlx_qlora.model import backend, lora
from mlx_qlora.model.adapters import shape_of
from mlx_qlora.model.trust import NO_CODE

_READS_THE_BLOCK = ("q_proj", "k_proj", "v_proj", "qkv_proj")  # what comes first in a block


@dataclass(frozen=True)
class Layer:
    """A linear layer of the blocks."""

    outputs: int
    inputs: int
    adapted: bool
    passes: bool  # a gradient goes through to its input


@dataclass(frozen=True)
class Sizes:
    """What is multiplied, whatever it holds."""

    layers: tuple[Layer, ...]
    head: tuple[int, int]
    blocks: int
    blocks_with_gradient: int
    heads: int
    kv_heads: int
    head_dim: int


def sizes_of(model: Any, adapted_layers: int | None) -> Sizes:
    """The shapes of a model of mlx-lm; its weights are not touched."""
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.QuantizedLinear))]
    blocks = len(model.layers)
    first = blocks - (adapted_layers or blocks)
    layers, head = [], None
    for path, module in linears:
        number = lora._layer_of(path)
        if number == lora._OUTSIDE:
            head = shape_of(module)
            continue
        at_the_end = number == first and path.rsplit(".", 1)[-1] in _READS_THE_BLOCK
        layers.append(Layer(*shape_of(module), adapted=number >= first, passes=number >= first and not at_the_end))
    if head is None:  # tied to the embedding
        tied: Any = next(module for path, module in model.named_modules() if path.endswith("embed_tokens"))
        head = (tied.weight.shape[0], layers[0].inputs)
    text = getattr(model.args, "text_config", None) or {}
    args = {**vars(model.args), **text} if isinstance(text, dict) else vars(model.args)
    heads = int(args.get("num_attention_heads") or 0)
    hidden = int(args.get("hidden_size") or 0)
    return Sizes(
        layers=tuple(layers),
        head=head,
        blocks=blocks,
        blocks_with_gradient=blocks - first,
        heads=heads,
        kv_heads=int(args.get("num_key_value_heads") or heads),
        head_dim=int(args.get("head_dim") or (hidden // heads if heads else 0)),
    )


class Multiplications:
    """The products of a batch, over views of two buffers: what they hold does not change how long they take."""

    def __init__(self, sizes: Sizes, rank: int):
        self._sizes, self._rank = sizes, rank
        self._dtype = backend.compute_dtype(mx.bfloat16)
        largest = max(layer.outputs * layer.inputs for layer in sizes.layers)
        self._weights = self._noise(max(largest, sizes.head[0] * sizes.head[1]))
        self._activations = self._noise(1)

    def prepare(self, batches: list[Work]) -> None:
        """Make the buffer large enough for all these batches."""
        widest = max(max(layer.outputs, layer.inputs) for layer in self._sizes.layers)
        need = self._activations.size
        for work in batches:
            scores = self._sizes.heads * max(rows * queries * keys for rows, queries, keys in work["attention"])
            need = max(need, work["positions"] * widest, work["places"] * self._sizes.head[0], scores)
        if need > self._activations.size:
            self._activations = self._noise(need)

    def batch(self, work: Work) -> None:
        """All the products of one batch, computed when this returns. They are evaluated a layer at a time."""
        positions = work["positions"]
        for layer in self._sizes.layers:
            if work["kept"] and not layer.adapted:
                continue  # what the layers below the adapters give is kept
            mx.eval(self._linear(layer.outputs, layer.inputs, positions, layer.passes))
            if layer.adapted:
                mx.eval(self._adapter(layer, positions))
        for number in range(self._sizes.blocks):
            backward = number >= self._sizes.blocks - self._sizes.blocks_with_gradient
            if work["kept"] and not backward:
                continue
            for rows, queries, keys in work["attention"]:
                mx.eval(self._attention(rows, queries, keys, backward))
        mx.eval(self._linear(*self._sizes.head, work["places"], True))

    def _linear(self, outputs: int, inputs: int, positions: int, backward: bool) -> list[mx.array]:
        weight = self._weight(outputs, inputs)
        forward = self._array(positions, inputs) @ weight.T
        return [forward, self._array(positions, outputs) @ weight] if backward else [forward]

    def _adapter(self, layer: Layer, positions: int) -> list[mx.array]:
        a, b = self._weight(layer.inputs, self._rank), self._weight(self._rank, layer.outputs)
        x, dy = self._array(positions, layer.inputs), self._array(positions, layer.outputs)
        z, dz = x @ a, dy @ b.T
        return [z @ b, x.T @ dz, z.T @ dy, *([dz @ a.T] if layer.passes else [])]

    def _attention(self, rows: int, queries: int, keys: int, backward: bool) -> list[mx.array]:
        sizes = self._sizes
        if not sizes.heads:
            return []
        groups = sizes.heads // sizes.kv_heads
        q = self._array(rows, sizes.kv_heads, groups * queries, sizes.head_dim)  # heads that share keys go in one product
        k = self._array(rows, sizes.kv_heads, keys, sizes.head_dim)
        scores = self._array(rows, sizes.kv_heads, groups * queries, keys)
        forward = [q @ k.swapaxes(-1, -2), scores @ k]
        turned = scores.swapaxes(-1, -2)
        return [*forward, *([q @ k.swapaxes(-1, -2), turned @ q, scores @ k, turned @ q] if backward else [])]

    def _array(self, *shape: int) -> mx.array:
        return self._activations[: math.prod(shape)].reshape(shape)

    def _weight(self, *shape: int) -> mx.array:
        return self._weights[: math.prod(shape)].reshape(shape)

    def _noise(self, size: int) -> mx.array:
        noise = (mx.random.normal((size,)) * 0.01).astype(self._dtype)
        mx.eval(noise)
        return noise


def race(spec: Spec, turns: Turns) -> None:
    import mlx_lm

    model = mlx_lm.load(spec.model, NO_CODE, lazy=True)[0]
    backend.reuse_memory()
    products = Multiplications(sizes_of(model, spec.layers), spec.rank)
    del model
    turns.ready()
    while True:
        products.prepare([batch for update in turns.work for batch in update])
        turns.restart()
        for update in list(turns.work):
            positions = 0
            for work in update:
                products.batch(work)
                positions += work["positions"]
            turns.done(loss=None, supervised=0, positions=positions)
