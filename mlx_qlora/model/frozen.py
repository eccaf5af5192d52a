"""The matmul of a frozen quantised weight, forward and backward.

On the CPU `mx.quantized_matmul` is slow (2.3 GFLOP/s in float32 on 2 cores), so there the weight is dequantised and
multiplied at the speed of the BLAS (185 GFLOP/s). Left to autograd, each dequantised weight would stay alive until
the backward; here the backward dequantises again, and `mx.depends` ties that to the cotangent, because otherwise the
lazy graph runs it early. Peak over 48 layers of 1024x1024: 247 MB plain, 59 MB so.
GPUs have a fast kernel of their own, and keep it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_qlora.model import backend, transforms

# Below this many rows the kernel is faster even on the CPU: 1 row 0.9 ms against 1.6 ms (1024x1024), 4 rows 6.9
# against 1.8.
_FEW_ROWS = 3


def quantized_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    """`x @ dequantize(weight).T`; the gradient reaches `x` only. Equal to `mx.quantized_matmul` up to rounding."""
    kind: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    few = x.size // x.shape[-1] < _FEW_ROWS
    if few or not backend.on_cpu():
        return mx.quantized_matmul(x, weight, scales=scales, biases=biases, transpose=True, **kind)
    return dequantized_matmul(x, weight, scales, biases, **kind)


def dequantized_matmul(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, **kind: Any) -> mx.array:
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
    """A `QuantizedLinear` with the matmul above."""

    def __call__(self, x: mx.array) -> mx.array:
        y = quantized_matmul(
            x, self["weight"], self["scales"], self.get("biases"),
            group_size=self.group_size, bits=self.bits, mode=self.mode,
        )  # fmt: skip
        return y + self["bias"] if "bias" in self else y


class FrozenEmbedding(nn.QuantizedEmbedding):
    """A `QuantizedEmbedding` that, tied to the head, multiplies as above: 776x192 -> 4,096 in 7 ms instead of 517."""

    def as_linear(self, x: mx.array) -> mx.array:
        return quantized_matmul(
            x, self["weight"], self["scales"], self.get("biases"),
            group_size=self.group_size, bits=self.bits, mode=self.mode,
        )  # fmt: skip


def dense_twins(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """For each quantised layer that is multiplied dequantised, a dense one for a while: (path, layer).

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


def install(model: nn.Module) -> int:
    """Give the quantised layers of a model the matmul above; says how many. Arrays and names stay as they are."""
    twins = [(path, _adopt(_FASTER[type(module)], module)) for path, module in model.named_modules() if type(module) in _FASTER]
    model.update_modules(tree_unflatten(twins))
    return len(twins)


def _adopt(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """The same module, arrays shared, as an instance of another class."""
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    dict.update(twin, module)
    return twin
