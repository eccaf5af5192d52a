"""The matmul of a frozen quantised weight, forward and backward.

On the CPU `mx.quantized_matmul` is slow (2.3 GFLOP/s in float32 on 2 cores), so there the weight is dequantised and
multiplied at the speed of the BLAS (185 GFLOP/s). Left to autograd, each dequantised weight would stay alive until
the backward; here the backward dequantises again, and `mx.depends` ties that to the cotangent, because otherwise the
lazy graph runs it early. Peak over 48 layers of 1024x1024: 247 MB plain, 59 MB so.
GPUs have a fast kernel of their own. `matmul.py` measures which way is faster for which shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_qlora.model import backend, transforms

# From how many rows on the weight is dequantised.
ALWAYS, NEVER = 1, 2**31
_ON_CPU = 3  # 1 row 0.9 ms against 1.6 ms (1024x1024), 4 rows 6.9 against 1.8


def kernel_matmul(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, **kind: Any) -> mx.array:
    """MLX's own."""
    return mx.quantized_matmul(x, weight, scales=scales, biases=biases, transpose=True, **kind)


def dequantized_matmul(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, **kind: Any) -> mx.array:
    """`x @ dequantize(weight).T`; the gradient reaches `x` only. Equal to the kernel up to rounding."""

    def dense(packed: mx.array) -> mx.array:
        return mx.dequantize(packed, scales, biases, **kind, dtype=x.dtype)

    @transforms.custom_function
    def product(x: mx.array) -> mx.array:
        return x @ dense(weight).T

    @product.vjp
    def product_vjp(primal: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        (packed,) = mx.depends([weight], [cotangent])
        return cotangent @ dense(packed)

    return product(x)  # type: ignore[return-value]


class FrozenLinear(nn.QuantizedLinear):
    """A `QuantizedLinear` that is multiplied in the faster way."""

    dense_from: int

    def __call__(self, x: mx.array) -> mx.array:
        y = _product(self, x)
        return y + self["bias"] if "bias" in self else y


class FrozenEmbedding(nn.QuantizedEmbedding):
    """A `QuantizedEmbedding` that, tied to the head, is multiplied so too: 776x192 -> 4,096 in 7 ms instead of 517."""

    dense_from: int

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


def _product(module: Any, x: mx.array) -> mx.array:
    way = dequantized_matmul if x.size // x.shape[-1] >= module.dense_from else kernel_matmul
    kind = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return way(x, module["weight"], module["scales"], module.get("biases"), **kind)


def dense_twins(model: nn.Module, rows: int) -> list[tuple[str, nn.Module]]:
    """For each quantised layer that is dequantised for so many rows, a dense one for a while: (path, layer).

    For what is used many times in a row, as the head is, chunk by chunk: each time anew, 32,000 x 512 costs as much
    as the multiplication with 64 rows.
    """
    if not backend.on_cpu():
        return []
    return [
        (path, _dense(module)) for path, module in model.named_modules() if isinstance(module, FrozenLinear | FrozenEmbedding)
    ]


def _dense(module: Any) -> nn.Module:
    kind: Any = nn.Linear if isinstance(module, FrozenLinear) else nn.Embedding
    twin: Any = kind.__new__(kind)
    nn.Module.__init__(twin)
    own = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode, "dtype": mx.float32}
    twin.weight = mx.dequantize(module["weight"], module["scales"], module.get("biases"), **own)
    if "bias" in module:
        twin.bias = module["bias"]
    twin.freeze()
    return twin  # type: ignore[no-any-return]


_FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: FrozenLinear,
    nn.QuantizedEmbedding: FrozenEmbedding,
}


def install(model: nn.Module, dense_from: Callable[[nn.Module], int] | None = None) -> int:
    """Give the quantised layers of a model this matmul; says how many. Arrays and names stay as they are.

    `dense_from` says for a layer from how many rows on it is dequantised; without it, on the CPU nearly always and on
    a GPU never.
    """
    rule = dense_from or (lambda _: _ON_CPU if backend.on_cpu() else NEVER)
    twins = []
    for path, module in model.named_modules():
        if type(module) in _FASTER:
            twin = _adopt(_FASTER[type(module)], module)
            twin.dense_from = rule(module)
            twins.append((path, twin))
    model.update_modules(tree_unflatten(twins))
    return len(twins)


def _adopt(kind: type[nn.Module], module: nn.Module) -> Any:
    """The same module, arrays shared, as an instance of another class."""
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    dict.update(twin, module)
    return twin
