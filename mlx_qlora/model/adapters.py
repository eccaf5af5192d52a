"""The layers with adapters, and what they become when an adapter is folded into its weight.

Names and shapes of the arrays are mlx-lm's, so that its tools load the adapters.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.model import backend
from mlx_qlora.model.dropout import Dropping


class Adapter(Dropping):
    """A frozen layer with an adapter beside it: scale * a @ b is added to what its weight does."""

    lora_a: mx.array
    lora_b: mx.array
    scale: float

    @property
    def inner(self) -> nn.Module:
        """The layer that it stands in for."""
        raise NotImplementedError

    def delta(self) -> mx.array:
        """What the adapter adds to the weight, in its shape, in float32."""
        raise NotImplementedError

    def _product(self) -> mx.array:
        return self.scale * (self.lora_a.astype(mx.float32) @ self.lora_b.astype(mx.float32))


class LoRALinear(Adapter):
    """A frozen linear layer with an adapter beside it. Keeps the layer that it stands in for as `linear`."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__()
        outputs, inputs = shape_of(linear)
        bound = 1 / math.sqrt(inputs)
        self.linear = linear
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))
        self.scale = scale
        self.dropout = dropout

    def __call__(self, x: mx.array) -> mx.array:
        # The scale goes to the narrow side: [..., rank] numbers instead of [..., outputs].
        z = (self.scale * (self.dropped(x) @ self.lora_a)) @ self.lora_b
        y: mx.array = self.linear(x)
        return y + z.astype(y.dtype)

    @property
    def inner(self) -> nn.Module:
        return self.linear

    def delta(self) -> mx.array:
        return self._product().T


class LoRAEmbedding(Adapter):
    """The same of an embedding, `a` with a row for each token. Where it is the head, too, it is adapted in both places."""

    def __init__(self, embedding: nn.Module, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__()
        rows, width = shape_of(embedding)
        bound = 1 / math.sqrt(rows)
        self.embedding = embedding
        self.lora_a = mx.random.uniform(-bound, bound, (rows, rank), key=key)
        self.lora_b = mx.zeros((rank, width))
        self.scale = scale
        self.dropout = dropout

    def __call__(self, tokens: mx.array) -> mx.array:
        y: mx.array = self.embedding(tokens)
        z = (self.scale * self.lora_a[tokens]) @ self.lora_b
        return y + self.dropped(z).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        y: mx.array = self.embedding.as_linear(x)
        z = (self.scale * (self.dropped(x, use=1) @ self.lora_b.T)) @ self.lora_a.T
        return y + z.astype(y.dtype)

    @property
    def inner(self) -> nn.Module:
        return self.embedding

    def delta(self) -> mx.array:
        return self._product()


def adapter_for(layer: nn.Module, rank: int, scale: float, dropout: float, key: mx.array) -> Adapter:
    """An adapter of the kind that a layer takes."""
    kind = LoRAEmbedding if is_embedding(layer) else LoRALinear
    return kind(layer, rank, scale, dropout, key)


class MergedLinear(nn.Linear):
    """A linear layer whose weight holds the adapter too; remembers the `LoRALinear` that it was."""

    def __init__(self, lora: LoRALinear):
        nn.Module.__init__(self)
        linear: Any = lora.linear
        weight = dense_weight(linear)
        self.weight = (weight.astype(mx.float32) + lora.delta()).astype(weight.dtype)
        if "bias" in linear:
            self.bias = linear.bias
        object.__setattr__(self, "_lora", lora)
        self.freeze()

    @property
    def lora(self) -> Adapter:
        return self._lora  # type: ignore[no-any-return]


class MergedEmbedding(nn.Embedding):
    """An embedding whose weight holds the adapter too; remembers the `LoRAEmbedding` that it was."""

    def __init__(self, lora: LoRAEmbedding):
        nn.Module.__init__(self)
        weight = dense_weight(lora.embedding)
        self.weight = (weight.astype(mx.float32) + lora.delta()).astype(weight.dtype)
        object.__setattr__(self, "_lora", lora)
        self.freeze()

    @property
    def lora(self) -> Adapter:
        return self._lora  # type: ignore[no-any-return]


def merged(adapter: Adapter) -> nn.Module:
    """The layer with the adapter folded into its weight, which is dense then."""
    if isinstance(adapter, LoRAEmbedding):
        return MergedEmbedding(adapter)
    assert isinstance(adapter, LoRALinear), adapter
    return MergedLinear(adapter)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear) and not isinstance(module, MergedLinear)


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.QuantizedEmbedding) and not isinstance(module, MergedEmbedding)


def shape_of(layer: Any) -> tuple[int, int]:
    """The shape of a layer's weight, as if it were dense."""
    rows, columns = layer.weight.shape
    quantised = isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
    return rows, columns * 32 // layer.bits if quantised else columns


def dense_weight(layer: Any) -> mx.array:
    """The weight of a linear layer or an embedding, dequantised where it is quantised."""
    if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return layer.weight  # type: ignore[no-any-return]
    # The floating-point modes have scales of 8 bits, which say nothing about the dtype of the model.
    scales = layer.scales
    dtype = scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else backend.compute_dtype(mx.bfloat16)
    kind = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, scales, layer.get("biases"), **kind, dtype=dtype)
