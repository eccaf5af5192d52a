"""MLX's `custom_function` and `checkpoint`, and what stands in for them while a step is traced.

`mx.export_function` shows the graph of a step with the shape of every array, and computes nothing; but it does not know
the node that these two put into a graph. While `traced` is on, functions with gradients of their own are differentiated
as they are, and a checkpointed function is marked where it begins and where it ends; `engine.memory` puts into the graph
what the real ones do: weights dequantised once for each use, layers computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

_marks: Sequence[mx.array] = ()  # that mark where a layer begins and ends, and where a product begins and ends


_sums: list[mx.array] = []


@contextmanager
def traced(marks: Sequence[mx.array], as_on_gpu: bool = False) -> Iterator[list[mx.array]]:
    """While inside, graphs have no custom nodes; `mx.depends` on one of the four marks says where something begins or
    ends. Gives a list that will hold the sums of losses as they are; what stands in for them is never computed.

    `as_on_gpu`: MLX's fused functions, which it takes apart on the CPU, are replaced by something that keeps as much for
    the backward as they keep on a GPU. The numbers are wrong then, the sizes are not.
    """
    global _marks, _sums
    before, _marks, _sums = (_marks, _sums), marks, []
    fused = {name: getattr(mx.fast, name) for name in _FUSED} if as_on_gpu else {}
    for name in fused:
        setattr(mx.fast, name, _FUSED[name])
    try:
        yield _sums
    finally:
        _marks, _sums = before
        for name, own in fused.items():
            setattr(mx.fast, name, own)


_attention = mx.fast.scaled_dot_product_attention


def _attended(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **more: Any) -> mx.array:
    """Keeps queries, keys and values, and no scores; with an array as mask MLX keeps these on a GPU too."""
    if isinstance(mask, mx.array) or q.shape[-1] != v.shape[-1]:
        return _attention(q, k, v, scale=scale, mask=mask, **more)
    few = (k * k).sum(axis=2, keepdims=True) + (v * v).sum(axis=2, keepdims=True)
    return q * mx.repeat(few, q.shape[1] // k.shape[1], axis=1)


def _normed(x: mx.array, weight: mx.array | None, *_: Any, **__: Any) -> mx.array:
    return (x * (x if weight is None else weight)).astype(x.dtype)


_FUSED: dict[str, Callable[..., mx.array]] = {
    "scaled_dot_product_attention": _attended,
    "rms_norm": _normed,
    "layer_norm": _normed,
    "rope": lambda x, *_, **__: -x,
}


def custom_function(function: Callable[..., Any]) -> mx.custom_function:
    return cast(mx.custom_function, _Plain(function)) if _marks else mx.custom_function(function)


def several(function: Callable[..., Any], outlined: Callable[..., Any]) -> mx.custom_function:
    """A custom function that gives several arrays, none of them a sum of losses. While a step is traced, `outlined` stands
    in for it, of the same sizes, and MLX differentiates that."""
    return cast(mx.custom_function, _Alone(outlined)) if _marks else mx.custom_function(function)


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    if not _marks:
        return mx.checkpoint(function)
    begin, end, *_ = _marks

    def marked(*inputs: Any) -> Any:
        flat: Any = tree_flatten(inputs)
        arrays = mx.depends([array for _, array in flat], [begin])
        own = tree_unflatten([(name, array) for (name, _), array in zip(flat, arrays, strict=True)])
        return tuple(mx.depends(list(function(*own)), [end]))

    return marked


class _Alone:
    """A custom function without its gradient."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def vjp(self, rule: Callable[..., Any]) -> _Alone:
        return self

    def __call__(self, *inputs: mx.array) -> Any:
        return self._function(*inputs)


class _Plain:
    """A custom function without its node.

    One that gives a single array is differentiated by MLX. One whose first output is a sum of losses has its gradient
    at hand: the product of what came in and that gradient has it as its derivative, and is never computed itself.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._rule: Callable[..., Any] | None = None

    def vjp(self, rule: Callable[..., Any]) -> _Plain:
        self._rule = rule
        return self

    def __call__(self, *inputs: mx.array) -> Any:
        *_, begin, end = _marks
        outputs = self._function(*mx.depends(list(inputs), [begin]))
        if isinstance(outputs, mx.array):
            return mx.depends([outputs], [end])[0]
        fixed = [mx.stop_gradient(each) for each in inputs]
        outputs = mx.depends(list(self._function(*mx.depends(fixed, [begin]))), [end])
        assert self._rule is not None
        gradients: Sequence[mx.array] = self._rule(fixed, [mx.array(1.0), *outputs[1:]], outputs)
        _sums.append(outputs[0])
        total = sum((mx.stop_gradient(g) * x).sum() for g, x in zip(gradients, inputs, strict=True))
        return (total, *outputs[1:])
