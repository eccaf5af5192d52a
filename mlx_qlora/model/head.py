"""The head of a model without its trunk, and a loss over it in chunks, forward and backward in one pass.

Nearly all models of mlx-lm are trunk-then-head: `self.model(...)`, then a head with its soft-caps and scales. Given a
stub in place of the trunk that returns hidden states, the model's class computes the head alone, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qlora.model import frozen, transforms
from mlx_qlora.model.attention import copied
from mlx_qlora.model.dropout import dropping

TRUNK = "model"
_LAYERS = f"{TRUNK}.layers."
# Logits that exist at once: 32 MB of them in float32. 939 places of 32,000 classes in chunks of 32, 64, 128, 256, 512:
# 2.3, 1.8, 1.65, 1.45, 1.4 s and 0.38, 0.40, 0.45, 0.57, 0.81 GB.
_LOGITS = 1 << 23
_LEAST_PLACES = 64

# (logits [S, V], arrays [S, ...] ...) -> (losses [S], their sum's gradient [S, V], what else is to be known of places [S] ...)
LossOf = Callable[..., tuple[mx.array, ...]]


class Summed(NamedTuple):
    """A loss over places."""

    total: mx.array
    more: tuple[mx.array, ...]  # sums of what else was to be known
    places: tuple[mx.array, ...] = ()  # out of training: the loss of each place, weighted, and what else was to be known of it


def logits_of(language: nn.Module, hidden: mx.array, asked_for: set[str] | None = None) -> mx.array:
    """Logits [..., V] of hidden states [..., D], by the model's own code; `asked_for` is told what of the trunk that uses."""
    stubbed = copied(language)
    setattr(stubbed, TRUNK, _Given(language[TRUNK], hidden, set() if asked_for is None else asked_for))
    return stubbed(mx.zeros(hidden.shape[:2], mx.int32))  # type: ignore[no-any-return]


class _Given:
    """Stands in for a trunk: returns hidden states, and is the trunk in everything else (tied embeddings)."""

    def __init__(self, trunk: nn.Module, hidden: mx.array, asked_for: set[str]):
        self._trunk = trunk
        self._hidden = hidden
        self._asked_for = asked_for

    def __call__(self, *_: object, **__: object) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        self._asked_for.add(f"{TRUNK}.{name}")
        return getattr(self._trunk, name)


def head_of(language: nn.Module, places: int) -> Callable[[mx.array], mx.array]:
    """The head of a model that only looks on, as a function: states [S, D] -> logits [S, V]; for many calls."""
    dense = {path: twin for path, twin in frozen.dense_twins(language, places) if not path.startswith(_LAYERS)}
    language = _with(language, dense)
    return lambda states: logits_of(language, states[None])[0]


def places_at_once(vocabulary: int) -> int:
    """How many places a chunk has, a power of two: 256 for 32,000 classes, 64 for 150,000."""
    return max(_LEAST_PLACES, 1 << ((_LOGITS // vocabulary).bit_length() - 1)) if vocabulary <= _LOGITS else _LEAST_PLACES


def loss_in_chunks(
    language: nn.Module, hidden: mx.array, marks: mx.array, loss_of: LossOf, arrays: Sequence[mx.array], chunk: int = 0
) -> Summed:
    """The loss summed over places, whose hidden states are [S, D].

    In training mode the gradient with respect to the hidden states, and to what is trained in the head, is made while a
    chunk's logits are there; they are never kept.
    """
    asked_for: set[str] = set()
    vocabulary = logits_of(language, hidden[None, :1], asked_for).shape[-1]  # from the shapes: nothing is computed
    chunk = min(chunk or places_at_once(vocabulary), hidden.shape[0])
    dense = {path: twin for path, twin in frozen.dense_twins(language, chunk) if not path.startswith(_LAYERS)}
    language = _with(language, dense)
    droppers = [layer for path, layer in dropping(language) if not path.startswith(_LAYERS)]
    # What is trained and used here: not the norm before the head, and of embeddings only those that are the head, too. The
    # others would have gradients of zeros here, as large as they are, for each chunk.
    trainable: dict[str, mx.array] = tree_flatten(language.trainable_parameters(), destination={})  # type: ignore[assignment]
    trained = {
        name: array
        for name, array in trainable.items()
        if not name.startswith(f"{TRUNK}.") or ".".join(name.split(".")[:2]) in asked_for - {f"{TRUNK}.layers"}
    }

    def logits_from(start: int, own: mx.array, values: Sequence[mx.array]) -> mx.array:
        for dropper in droppers:
            dropper.set_marks(marks[start : start + own.shape[0]])
        return logits_of(_with(language, dict(zip(trained, values, strict=True))), own[None])[0]

    def loss_from(start: int, logits: mx.array) -> tuple[mx.array, ...]:
        return loss_of(logits, *(array[start : start + logits.shape[0]] for array in arrays))

    values = list(trained.values())
    starts = range(0, hidden.shape[0], chunk)
    if language.training:
        return _one_pass(logits_from, loss_from, starts, hidden, values)
    return _in_turn(logits_from, loss_from, starts, hidden, values)


def loss_of_logits(logits: mx.array, loss_of: LossOf, arrays: Sequence[mx.array], training: bool) -> Summed:
    """The same of logits [S, V] that are there already, all at once."""
    over = _one_pass if training else _in_turn
    starts = range(0, logits.shape[0], logits.shape[0])
    return over(lambda _, own, __: own, lambda _, own: loss_of(own, *arrays), starts, logits, [])


LogitsFrom = Callable[[int, mx.array, Sequence[mx.array]], mx.array]  # (first place, hidden states, what is trained)
LossFrom = Callable[[int, mx.array], tuple[mx.array, ...]]  # (first place, logits)


def _in_turn(
    logits_from: LogitsFrom, loss_from: LossFrom, starts: range, hidden: mx.array, values: Sequence[mx.array]
) -> Summed:
    total = mx.array(0.0)
    places: list[tuple[mx.array, ...]] = []
    for start in starts:
        # Or the lazy graph would compute several chunks at once, or keep the logits for what is asked of them later.
        (states,) = mx.depends([hidden], [total])
        losses, _, *more = loss_from(start, logits_from(start, states[start : start + starts.step], values))
        places.append((losses, *more))
        (losses,) = mx.depends([losses], more) if more else (losses,)
        total = total + losses.sum()
    whole = tuple(mx.concatenate(list(each)) for each in zip(*places, strict=True))
    return Summed(total, tuple(each.sum() for each in whole[1:]), whole)


def _one_pass(
    logits_from: LogitsFrom, loss_from: LossFrom, starts: range, hidden: mx.array, values: Sequence[mx.array]
) -> Summed:
    def chunk(variables: Any, start: int) -> tuple[mx.array, tuple[mx.array, ...]]:
        """(something whose gradient is the loss's, the loss and what else is to be known). The first is asked for its
        gradient only, and so never computed: what is computed are the logits, the loss with its gradient, and the way back."""
        logits = logits_from(start, *variables)
        loss, gradient, *more = loss_from(start, mx.stop_gradient(logits))
        return (logits * gradient).sum(), tuple(each.sum() for each in (loss, *more))

    @transforms.custom_function
    def forward(hidden: mx.array, *values: mx.array) -> tuple[mx.array, ...]:
        total, others = mx.array(0.0), list[mx.array]()
        pieces: list[mx.array] = []
        sums = [mx.zeros(value.shape, mx.float32) for value in values]
        for start in starts:
            (states,) = mx.depends([hidden], [total, *pieces[-1:], *sums])
            variables = [states[start : start + starts.step], list(values)]
            (_, found), (gradient, more) = mx.value_and_grad(chunk)(variables, start)
            total = total + found[0]
            others = [a + b for a, b in zip(others, found[1:], strict=True)] if others else list(found[1:])
            pieces.append(gradient)
            sums = [a + b.astype(mx.float32) for a, b in zip(sums, more, strict=True)]
        return total, mx.concatenate(pieces), *sums, *others

    @forward.vjp
    def scaled(primals: Any, cotangents: Any, outputs: Any) -> Any:
        primals = primals if isinstance(primals, (list, tuple)) else (primals,)
        gradients = outputs[1 : 1 + len(primals)]
        return tuple(
            (cotangents[0] * gradient).astype(primal.dtype) for primal, gradient in zip(primals, gradients, strict=True)
        )

    given: Any = forward(hidden, *values)
    total, _, *rest = given
    return Summed(total, tuple(mx.stop_gradient(each) for each in rest[len(values) :]))


def _with(language: nn.Module, values: dict[str, Any]) -> nn.Module:
    """A copy of the model that has other arrays or modules in these places; all the rest is shared."""
    if not values:
        return language
    changed = copied(language)
    seen: dict[str, Any] = {"": changed}
    for name, value in values.items():
        *above, last = name.split(".")
        path = ""
        for step in above:
            holder, path = seen[path], f"{path}.{step}"
            if path not in seen:
                seen[path] = copied(holder[step])
                dict.__setitem__(holder, step, seen[path])
        dict.__setitem__(seen[path], last, value)
    return changed  # type: ignore[no-any-return]
