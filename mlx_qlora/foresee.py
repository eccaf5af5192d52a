"""How much memory a model, a batch and a way to compute will need: the real step, traced and never computed.

The real objective over the real model class and the real layout is traced, all layers of it: what MLX computes early
grows with them in steps, so that a few layers do not say what many need. 32 layers take 1 to 2 s.
On the CPU the prediction was held against `mx.get_peak_memory` (tests/test_memory.py). As on a GPU it is a best
estimate: buffers wait for command buffers there, kernels have scratch memory, and a compiled step needs less.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_qlora.data.layout import Layout, lay_out
from mlx_qlora.engine.graph import MARKS, trace, with_repeats
from mlx_qlora.engine.memory import Memory, simulated
from mlx_qlora.engine.optim import OptimConfig, begin, guarded_update, make_optimizer
from mlx_qlora.engine.steps import in_precision
from mlx_qlora.model import backend, lora, transforms
from mlx_qlora.model.trained import of_vocabulary
from mlx_qlora.model.trunk import Passage
from mlx_qlora.objectives.lesson import Lesson, answers_only
from mlx_qlora.records import Batch, Example


@dataclass(frozen=True)
class Foresight:
    """What memory follows from: a model with its adapters, the examples of an update, an optimizer."""

    model: nn.Module
    examples: Sequence[Example]
    optim: OptimConfig
    lesson: Lesson = field(default_factory=answers_only)
    computes_in: mx.Dtype | None = None  # forward and backward; None: as the parameters are
    keeps_best: bool = False  # whether the best parameters so far, beside those of now, are worth counting
    _updates: list[int] = field(default_factory=list, init=False, compare=False)
    _known: dict[tuple[Layout, Passage], Memory] = field(default_factory=dict, init=False, compare=False)

    def memory(self, layout: Layout, passage: Passage) -> Memory:
        """At the peak of an update with these examples."""
        if (layout, passage) not in self._known:
            self._known[layout, passage] = self._memory(layout, passage)
        return self._known[layout, passage]

    def _memory(self, layout: Layout, passage: Passage) -> Memory:
        batches = lay_out(self.examples, layout)
        largest = max(batches, key=lambda batch: (batch.computed, batch.positions.size))
        step = of_step(self.model, largest, passage, self.lesson, self.computes_in)
        trained = _bytes(self.model.trainable_parameters())
        state = _state(self.optim, self.model)
        sums = trained if len(batches) > 1 else 0  # those of the batches before
        if not self._updates:
            self._updates.append(_of_update(self.optim, self.model))
        whole = _with_update(step, self._updates[0], state, sums)
        return replace(whole, adapters=whole.adapters + trained) if self.keeps_best else whole


def _with_update(step: Memory, update: int, state: int, sums: int) -> Memory:
    """The peak is in a step or in the update after it."""
    more = max(0, step.weights + update - (step.peak + state + sums))
    return Memory(step.weights, step.adapters, state + sums, step.activations + more, step.logits, step.dequantised, step.cache)


def _of_update(config: OptimConfig, model: nn.Module) -> int:
    """The peak of the update itself, with what is trained and the optimizer's state before and after: the gradients,
    divided and clipped, and what an optimizer computes on its way."""
    params = model.trainable_parameters()
    optimizer = make_optimizer(config, 1, params, of_vocabulary(model))
    begin(optimizer, params)
    own, state = _named(params), _named(optimizer.state)

    def update(loss: mx.array, weight: mx.array, *arrays: mx.array) -> Sequence[mx.array]:
        now = iter(arrays)
        before = _tree(own, now)
        optimizer.state = _tree(state, now)
        gradients = tree_map(lambda sum: sum / weight, _tree(own, now))
        done = guarded_update(optimizer, before, gradients, loss, config.clip_grad_norm)
        return [*_named((done, optimizer.state)).values()]

    one = mx.array(1.0)
    graph = trace(update, [one, one, *own.values(), *state.values(), *own.values()])
    held = set(graph.inputs[2 : 2 + len(own) + len(state)])  # until the update is known to be finite
    kinds = {name: "weights" if name in held else "batch" for name in graph.inputs}
    return simulated(graph, [graph.outputs], kinds, 0)[0]


def _named(tree: Any) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = tree_flatten(tree, destination={})  # type: ignore[assignment]
    return arrays


def _tree(names: Iterable[str], arrays: Iterator[mx.array]) -> Any:
    return tree_unflatten([(name, next(arrays)) for name in names])


def longest(lengths: Sequence[int], supervised: Sequence[int] | None = None) -> list[Example]:
    """Examples that stand in for real ones before there are any: so long, with nothing in common."""
    made = []
    for number, length in enumerate(lengths):
        tokens = np.full(max(2, length), number + 1, np.int32)
        weights = np.ones(len(tokens), np.float32)
        weights[0] = 0
        if supervised is not None:
            weights[: len(tokens) - supervised[number]] = 0
        made.append(Example(f"longest:{number}", tokens, weights))
    return made


def of_step(
    model: nn.Module, batch: Batch, passage: Passage, lesson: Lesson | None = None, dtype: mx.Dtype | None = None
) -> Memory:
    """At the peak of a micro-step, without optimizer and sums of gradients."""
    lesson = lesson or answers_only()
    part = _traced(model, batch, passage, lesson, dtype)
    trained = _bytes(model.trainable_parameters())
    weights = _bytes(model.parameters()) + (_bytes(lesson.teacher.parameters()) if lesson.teacher else 0)
    return Memory(weights - trained, trained, 0, part.activations, part.logits, part.dequantised)


def _traced(model: nn.Module, batch: Batch, passage: Passage, lesson: Lesson, dtype: mx.Dtype | None) -> Memory:
    """What a step of a model needs besides its arrays."""
    parameters, theirs = _named(model.parameters()), _named(lesson.teacher.parameters()) if lesson.teacher else {}
    trained = list(lora.adapter_arrays(model))
    objective = lesson.objective(passage, lesson.teacher)
    arrays, beside = batch[:6], lesson.beside(batch)

    def step(key: mx.array, *inputs: mx.array) -> Sequence[mx.array]:
        given = iter(inputs)
        own = dict(zip(parameters, given, strict=False))
        model.update(tree_unflatten(list(own.items())))
        if lesson.teacher:
            lesson.teacher.update(_tree(theirs, given))
        traced = Batch(*(next(given) for _ in arrays), batch.segments, None, tuple(next(given) for _ in beside))  # type: ignore[arg-type, call-arg]
        weights: list[mx.array] = []

        def total(values: Sequence[mx.array]) -> mx.array:
            model.update(in_precision(tree_unflatten(list(zip(trained, values, strict=True))), dtype))
            loss = objective(model, traced)
            weights.append(loss.weight)
            return loss.total

        with transforms.traced(inputs[-len(MARKS) :], not backend.on_cpu()) as sums, lora.dropout_keys(model, key):
            _, gradients = mx.value_and_grad(total)([own[name] for name in trained])
            return [*gradients, *weights, *sums]

    marks = [mx.zeros(number + 1) for number in range(len(MARKS))]
    before, of_teacher = model.parameters(), lesson.teacher.parameters() if lesson.teacher else {}
    inputs = [*parameters.values(), *theirs.values(), *arrays, *beside, *marks]
    collecting = gc.isenabled()
    gc.disable()  # a hundred thousand small objects, all of them needed: a quarter of the time
    try:
        graph = with_repeats(trace(step, [mx.random.key(0), *inputs]))
    finally:
        model.update(before)
        if lesson.teacher:
            lesson.teacher.update(of_teacher)
        if collecting:
            gc.enable()
    kinds = dict.fromkeys(graph.inputs, "batch")
    known = set(trained)
    for name, path in zip(graph.inputs[1:], parameters, strict=False):
        kinds[name] = "adapters" if path in known else "weights"
    for name in graph.inputs[1 + len(parameters) :][: len(theirs)]:
        kinds[name] = "weights"
    asked = [graph.outputs[: len(trained) + 1], graph.outputs[len(trained) + 1 :]]
    _, at_peak = simulated(graph, asked, kinds, _vocabulary(parameters))
    return Memory(
        activations=at_peak.get("activations", 0) + at_peak.get("batch", 0),
        logits=at_peak.get("logits", 0),
        dequantised=at_peak.get("dequantised", 0),
    )


def _vocabulary(parameters: dict[str, mx.array]) -> int:
    """How many logits there are: the rows of the head, or of the embedding."""
    heads = [array.shape[0] for name, array in parameters.items() if "head" in name or "embed_tokens" in name]
    return max(heads, default=0)


def _bytes(tree: Any) -> int:
    arrays: dict[str, mx.array] = tree_flatten(tree, destination={})  # type: ignore[assignment]
    return sum(array.nbytes for array in arrays.values())


def _state(config: OptimConfig, model: nn.Module) -> int:
    """The bytes that an optimizer keeps. Its arrays are made, and not computed."""
    params = model.trainable_parameters()
    optimizer = make_optimizer(config, 1, params, of_vocabulary(model))
    begin(optimizer, params)
    return _bytes(optimizer.state)
