"""Hidden states of a batch, in whatever layout it comes, with the model's own code untouched.

For the time of one call the trunk is a shallow copy whose layers are stubs, and these are where everything happens
that the model does not know of: the pieces of a packed row, checkpointing, layers left out because what they give is
kept. The model itself is never changed, so there is nothing to undo after a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qlora.errors import ModelError
from mlx_qlora.model import backend, transforms
from mlx_qlora.model.attention import Packed, Prefixed, Recorder, can_unpack, copied, unpacking
from mlx_qlora.model.dropout import Dropping, dropping
from mlx_qlora.model.head import TRUNK, LossOf, Summed, head_of, logits_of, loss_in_chunks, loss_of_logits
from mlx_qlora.records import Batch

_INNER = "language_model"  # models that see and read keep the reading part here
_LAYERS = "layers"
# On the CPU, queries that attend at once. A trunk's time against whole pieces, chats with a prefix of 200 / mixed
# lengths to 400: 32: 1.19, 1.23; 64: 0.99, 1.06; 128: 0.87, 0.96; 256: 0.90, 1.00.
_BLOCK = 128
Cache = Recorder | Prefixed | Packed


@dataclass(frozen=True)
class Passage:
    """How a batch goes through the model; none of it changes the gradient."""

    checkpoint: bool = False  # a layer keeps its input only and is computed again in the backward
    first: int = 0  # the first layer that is computed, where `batch.states` brings what goes into it
    chunk: int = 0  # places whose logits exist at once; 0: as the vocabulary lets them


PLAIN = Passage()


def summed_loss(
    model: nn.Module, batch: Batch, loss_of: LossOf, arrays: Sequence[mx.array], passage: Passage = PLAIN
) -> tuple[Summed, mx.array]:
    """(what `loss_of(logits, *arrays)` says of the places of a batch, summed, with its gradient; what the head was given).

    A model that is not trunk-then-head runs whole, and the places are picked from its logits.
    """
    language = _language(model)
    if not _has_trunk(language):
        picked = _picked(model, batch)
        return loss_of_logits(picked, loss_of, arrays, model.training), picked
    picked = hidden_states(model, batch, passage)[batch.positions]
    return loss_in_chunks(language, picked, batch.marks[batch.positions], loss_of, arrays, passage.chunk), picked


def foretold(model: nn.Module, batch: Batch) -> tuple[mx.array, Callable[[mx.array], mx.array]]:
    """(a state [S, ...] for each place of a batch, what makes logits of such states), of a model that only looks on: nothing
    of it has a gradient, and the logits of all places need not be there at once."""
    language, batch = _language(model), batch._replace(states=None)
    if not _has_trunk(language):
        return mx.stop_gradient(_picked(model, batch)), lambda logits: logits
    states = hidden_states(model, batch)[batch.positions]
    return mx.stop_gradient(states), head_of(language, len(states))


def supervised_logits(model: nn.Module, batch: Batch, passage: Passage = PLAIN) -> mx.array:
    """Logits [S, V] at the places of a batch in whatever layout, all of them at once: for a loss of one's own."""
    language = _language(model)
    if not _has_trunk(language):
        return _picked(model, batch)
    marks, hidden = batch.marks[batch.positions], hidden_states(model, batch, passage)[batch.positions]
    _mark([(path, layer) for path, layer in dropping(language) if not path.startswith(f"{TRUNK}.{_LAYERS}.")], marks)
    return logits_of(language, hidden[None])[0]


def _picked(model: nn.Module, batch: Batch) -> mx.array:
    """The same of a model that runs whole."""
    _require_plain(batch)
    _mark(dropping(model), batch.marks)
    logits = model(batch.rows)
    return logits.reshape(-1, logits.shape[-1])[batch.positions]  # type: ignore[no-any-return]


def hidden_states(model: nn.Module, batch: Batch, passage: Passage = PLAIN) -> mx.array:
    """What goes into the head, [positions of the batch, D]."""
    trunk = _language(model)[TRUNK]
    return _flat(trunk, batch, lambda number, layer: _Ours(layer, passage, number))


def states_before(model: nn.Module, batch: Batch, first: int) -> mx.array:
    """What goes into layer `first`, [positions of the batch, D]."""
    trunk = _language(model)[TRUNK]
    caught: list[mx.array] = []

    def stub(number: int, layer: nn.Module) -> Any:
        return _Ours(layer, PLAIN, number) if number < first else _Catching(layer, caught if number == first else [])

    _flat(trunk, batch, stub)
    passes = 2 if batch.shared.size else 1
    if len(caught) != passes or sum(each.size // each.shape[-1] for each in caught) != batch.computed:
        raise CannotShare("The layers of this model do not run once each, one after the other.")
    return mx.concatenate([each.reshape(-1, each.shape[-1]) for each in reversed(caught)])


def first_adapted(model: nn.Module) -> int:
    """The first layer whose output can change in training; 0 where something before the layers is trained, or nothing
    in them."""
    language = _language(model)
    if not _has_trunk(language) or _LAYERS not in language[TRUNK]:
        return 0
    trained: dict[str, mx.array] = tree_flatten(language[TRUNK].trainable_parameters(), destination={})  # type: ignore[assignment]
    inside = [int(name.split(".")[1]) for name in trained if name.startswith(_LAYERS + ".")]
    before = any(not name.startswith((_LAYERS + ".", "norm.")) for name in trained)
    return 0 if before else min(inside, default=0)


class CannotShare(ModelError):
    """A model that can't compute a common beginning once."""


def can_pack(model: nn.Module) -> str:
    """Why packed rows can't go through a model; empty where they can."""
    problem = can_share(model)
    if problem:
        return problem
    if not all(can_unpack(layer) for layer in _language(model)[TRUNK][_LAYERS]):
        return "its attention is not one that can be given pieces of a row"
    return ""


def can_share(model: nn.Module) -> str:
    """Why rows behind a common prefix can't go through a model; empty where they can."""
    language = _language(model)
    if not _has_trunk(language) or _LAYERS not in language[TRUNK]:
        return "it is not a trunk of layers with a head"
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    if not {type(cache) for cache in caches} <= {KVCache, RotatingKVCache}:
        return "it has layers that are recurrent or keep something else than keys and values"
    if len(caches) != len(language[TRUNK][_LAYERS]):
        return "its layers share keys and values, or run more than once"
    return _LENGTH_COUNTS if length_counts(model) else ""


_LENGTH_COUNTS = "its rope changes with the length of a row"


def length_counts(model: nn.Module) -> bool:
    """Whether what a position gives depends on how long its row is, so that padding is not nothing."""
    return any(type(module).__name__ == "DynamicNTKScalingRoPE" for _, module in model.named_modules())


def _language(model: nn.Module) -> Any:
    return model.get(_INNER, model)


def _has_trunk(language: Any) -> bool:
    return isinstance(language.get(TRUNK), nn.Module)


def _require_plain(batch: Batch) -> None:
    if batch.segments or batch.shared.size:
        raise CannotShare("This model is not a trunk of layers with a head, and its rows can share nothing.")


def _flat(trunk: nn.Module, batch: Batch, stub: Callable[[int, nn.Module], Any]) -> mx.array:
    """The trunk over the rows and their prefix, with other layers."""
    if _LAYERS not in trunk:
        _require_plain(batch)
        _mark(dropping(trunk), batch.marks)
        return _joined_rows(trunk(batch.rows))
    layers = trunk[_LAYERS]
    stubs = [stub(number, layer) for number, layer in enumerate(layers)]
    changed = copied(trunk)
    dict.__setitem__(changed, _LAYERS, stubs)
    rows = batch.rows.size

    outside = [(path, module) for path, module in dropping(trunk) if not path.startswith(f"{_LAYERS}.")]

    def run(tokens: mx.array, caches: Sequence[Any] | None, here: slice) -> Any:
        _mark(outside, batch.marks[here])
        for one in stubs:
            one.begin(batch.marks[here], None if batch.states is None else batch.states[here])
        return changed(tokens, cache=caches)

    if batch.segments:
        packed = Packed(batch.segments, _BLOCK if backend.on_cpu() else None)
        return _joined_rows(run(batch.rows, [packed] * len(layers), slice(None)))
    if not batch.shared.size:
        return _joined_rows(run(batch.rows, None, slice(None)))
    recorders = [Recorder() for _ in layers]
    shared = run(batch.shared[None], recorders, slice(rows, None))
    behind = [Prefixed(recorder.kept, batch.shared.size) for recorder in recorders]
    return mx.concatenate([_joined_rows(run(batch.rows, behind, slice(rows))), shared[0]])


def _joined_rows(hidden: mx.array) -> mx.array:
    return hidden.reshape(-1, hidden.shape[-1])


def _mark(modules: Sequence[tuple[str, Dropping]], marks: mx.array) -> None:
    for _, module in modules:
        module.set_marks(marks)


class _Ours:
    """Stands in for a layer of the trunk for one call, and is that layer in everything that it does not do."""

    def __init__(self, layer: nn.Module, passage: Passage, number: int):
        self._layer, self._passage, self._number = layer, passage, number
        self._dropping = dropping(layer)
        self._marks: mx.array | None = None
        self._states: mx.array | None = None

    def begin(self, marks: mx.array, states: mx.array | None) -> None:
        self._marks, self._states = marks, states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._layer)  # for models that ask what kind a layer is

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if self._states is not None:
            if self._number < self._passage.first:
                return x  # never computed: the next line takes its place
            if self._number == self._passage.first:
                x = self._states.reshape(x.shape).astype(x.dtype)
        marks, passage = self._marks, self._passage
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, Cache)), None)

        def compute(x: mx.array, inputs: Sequence[mx.array]) -> tuple[mx.array, ...]:
            local = cache.around(inputs) if cache else None

            def put(each: Any) -> Any:
                return local if each is cache else each

            if marks is not None:
                _mark(self._dropping, marks)  # here, because checkpointing comes by again later
            layer = unpacking(self._layer, local) if isinstance(local, Packed) else self._layer
            kept = local.kept if local else []
            hidden = layer(x, *map(put, args), **{name: put(each) for name, each in kwargs.items()})
            kept = local.kept if local else kept
            if passage.checkpoint and not isinstance(hidden, mx.array):
                _require_one_array(hidden)
            return hidden, *kept

        inputs = cache.inputs() if cache else []
        if passage.checkpoint:  # what else goes in would lose its gradient
            _require_one_array(
                each for each in (*args, *kwargs.values()) if isinstance(each, mx.array) and each.dtype != mx.bool_
            )
        hidden, *kept = self._checkpointed(compute, x, inputs) if passage.checkpoint else compute(x, inputs)
        if cache:
            cache.kept = list(kept)
        return hidden

    def _checkpointed(self, compute: Callable[..., tuple[mx.array, ...]], x: mx.array, inputs: Sequence[mx.array]) -> Any:
        layer = self._layer

        def again(params: Any, x: mx.array, *inputs: mx.array) -> tuple[mx.array, ...]:
            before = layer.trainable_parameters()
            layer.update(params)
            try:
                return compute(x, inputs)
            finally:
                layer.update(before)

        return transforms.checkpoint(again)(layer.trainable_parameters(), x, *inputs)


def _require_one_array(others: Iterable[object]) -> None:
    if any(True for _ in others):
        raise ModelError(
            "grad_checkpoint: the layers of this model take or give more than one array, so they can't be computed again. "
            "Set grad_checkpoint: off, and a smaller token_budget if memory is short."
        )


class _Catching:
    """Stands in for a layer and keeps what would go into it."""

    def __init__(self, layer: nn.Module, caught: list[mx.array]):
        self._layer, self._caught = layer, caught

    def begin(self, marks: mx.array, states: mx.array | None) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._layer)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self._caught.append(x)
        return x
