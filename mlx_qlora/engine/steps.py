"""The micro-step, the update, and the generator of reports."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from mlx.utils import tree_map

from mlx_qlora.engine.accumulate import GradientAccumulator
from mlx_qlora.engine.optim import OptimConfig, begin, guarded_update
from mlx_qlora.engine.room import Laid, Room, is_out_of_memory
from mlx_qlora.records import BEGIN, Batch, Halfway, LossSum, StepReport, TrainState, Update, Window

Objective = Callable[[nn.Module, Batch], LossSum]
WithKey = Callable[[nn.Module, mx.array], Any]  # gives a context in which dropout draws from a key
MicroStep = Callable[[Batch, mx.array], tuple[LossSum, Any]]


class Enter(Protocol):
    """Somebody who is told when a phase begins, and what is known of it; facts stay until they are replaced."""

    def __call__(self, phase: str, **facts: object) -> None: ...


def nobody(phase: str, **facts: object) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class StepConfig:
    """How a step is run."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Whether steps are compiled; auto: on GPUs only. On the CPU eager is as fast and starts 8 s sooner."""


@dataclass(frozen=True)
class Engine:
    """What makes updates: a model with trainable parameters, an objective, an optimizer."""

    model: nn.Module
    objective: Objective
    optimizer: mlx.optimizers.Optimizer
    config: OptimConfig
    with_key: WithKey
    seed: int = 0
    compiled: bool = False
    computes_in: mx.Dtype | None = None  # forward and backward; gradients and parameters stay what they are; None: as these
    room: Room = field(default_factory=lambda: Room(1 << 30))
    lay_out: Laid | None = None  # makes smaller batches of the same examples when memory ends
    rehearse: Update | None = None  # of the longest of the run: computed first, so that what does not fit fails at once
    enter: Enter = nobody  # is told which phase begins, with facts about it
    asked: Callable[[], bool] = lambda: False  # whether a fact is wanted before the update is done


def micro_step(engine: Engine) -> MicroStep:
    """A function of (batch, dropout key) that gives the summed loss and its gradient.

    Compiled, it is traced once for each shape; packed rows, of which no two are alike, go through it uncompiled.
    """
    model, objective = engine.model, engine.objective

    def total(params: Any, batch: Batch) -> tuple[mx.array, LossSum]:
        model.update(in_precision(params, engine.computes_in))
        loss = objective(model, batch)
        return loss.total, loss

    gradient = mx.value_and_grad(total)

    def step(params: Any, key: mx.array, batch: Batch) -> tuple[tuple[Any, ...], Any]:
        with engine.with_key(model, key):
            (_, loss), grads = gradient(params, batch)
        return tuple(loss), grads

    def of_arrays(params: Any, key: mx.array, arrays: Any, states: Any, beside: Any) -> tuple[tuple[Any, ...], Any]:
        return step(params, key, Batch(*arrays, (), *(states or [None]), tuple(beside)))  # type: ignore[call-arg]

    traced = mx.compile(of_arrays)

    def run(batch: Batch, key: mx.array) -> tuple[LossSum, Any]:
        params = model.trainable_parameters()
        try:
            if engine.compiled and not batch.segments:
                states = [] if batch.states is None else [batch.states]
                loss, grads = traced(params, key, list(batch[:6]), states, list(batch.beside))
            else:
                loss, grads = step(params, key, batch)
        finally:
            model.update(params)  # tracing leaves placeholders in the model
        return LossSum(*loss), grads

    return run


def in_precision(params: Any, dtype: mx.Dtype | None) -> Any:
    """The same parameters in another dtype; the gradient with respect to them stays in their own."""
    if dtype is None:
        return params
    return tree_map(lambda array: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array, params)


@contextmanager
def computing_in(model: nn.Module, dtype: mx.Dtype | None) -> Iterator[None]:
    """Inside, the model computes in this dtype; None: as its parameters are."""
    if dtype is None:
        yield
        return
    before = model.parameters()
    model.update(in_precision(before, dtype))
    try:
        yield
    finally:
        model.update(before)


def dropout_key(seed: int, update: int) -> mx.array:
    """The key of an update, the same in every run with this seed; what is dropped follows from it and the tokens."""
    return mx.random.key(int(np.random.SeedSequence((seed, update)).generate_state(1, np.uint64)[0]))


def steps(
    engine: Engine, updates: Iterable[Update], start: TrainState = BEGIN, window: Window | None = None
) -> Iterator[StepReport | Halfway]:
    """Make the updates, one report each. All that an update changes is computed before its report is given.

    `start` and `window` say where a run goes on; model and optimizer have their arrays already. While the device
    computes, the next update's batches are made. Where `engine.asked` says so, there is a fact in the middle of an
    update too.
    """
    step_on = micro_step(engine)
    begin(engine.optimizer, engine.model.trainable_parameters())
    if engine.rehearse and engine.lay_out:
        engine.enter("batch", update=start.step + 1, budget=engine.room.now)
        engine.room.within(partial(_rehearse, engine, step_on))
    coming = _Coming(updates, start.halvings)
    state = start
    begun = time.perf_counter()
    origin = begun - start.elapsed_s
    while (update := coming.take()) is not None:
        engine.enter("batch", update=state.step + 1, ids=update.ids, budget=engine.room.now, part=None, shape=None)
        made, update = yield from _made(engine, step_on, update, state, window, coming)
        window = None
        now = time.perf_counter()
        state = TrainState(
            step=state.step + 1,
            next=update.next,
            skipped_updates=state.skipped_updates + (not made["finite"]),
            elapsed_s=now - origin,
            halvings=engine.room.halvings,
        )
        yield StepReport(
            step=state.step,
            epoch=update.epoch,
            tokens=update.tokens,
            supervised_tokens=update.supervised_tokens,
            positions=update.positions,
            tokens_per_second=update.tokens / (now - begun),
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            elapsed_s=state.elapsed_s,
            skipped_updates=state.skipped_updates,
            state=state,
            update=update,
            **made,
        )
        begun = time.perf_counter()


def _made(
    engine: Engine, step_on: MicroStep, update: Update, state: TrainState, window: Window | None, coming: _Coming
) -> Generator[Halfway, None, tuple[dict[str, Any], Update]]:
    """Make an update; where memory ends, the same examples once more in smaller batches. Gives what it came to, and the
    update as it was laid out in the end."""
    model, optimizer, room = engine.model, engine.optimizer, engine.room
    before = model.trainable_parameters(), optimizer.state
    laid_for = coming.halvings
    while True:
        try:
            if laid_for != room.halvings and engine.lay_out:
                update = replace(update, batches=engine.lay_out(update, room.halvings))
                laid_for = room.halvings
            loss, gradients = yield from _accumulated(engine, step_on, update, state, window, coming)
            engine.enter("update")
            return _applied(engine, loss, gradients), update
        except Exception as error:
            model.update(before[0])  # whatever failed: it has changed nothing
            optimizer.state = before[1]
            if engine.lay_out is None or not is_out_of_memory(error):
                raise
            said = str(error)
        # Out here the error is gone, and with it all that its frames held.
        window = None
        room.halve(said)


def _applied(engine: Engine, loss: LossSum, gradients: Any) -> dict[str, Any]:
    """Make the update, and say what it came to."""
    weight = mx.maximum(loss.weight, 1e-20)  # windows may have no target between them: a loss of 0, and a gradient of 0
    mean = loss.total / weight
    done = guarded_update(engine.optimizer, engine.model.trainable_parameters(), gradients, mean, engine.config.clip_grad_norm)
    engine.model.update(done.params)
    mx.eval(done, engine.optimizer.state, mean, loss.metrics)
    return {
        "loss": _number(mean),
        "learning_rate": _number(done.learning_rate),
        "grad_norm": _number(done.grad_norm),
        "finite": bool(done.finite.item()),
        "metrics": {name: _number(value / weight) for name, value in loss.metrics.items()},
    }


class _Coming:
    """The updates, one made ahead. What goes wrong with that one is heard of when it is taken, after the one before."""

    def __init__(self, updates: Iterable[Update], halvings: int):
        self._updates = iter(updates)
        self.halvings = halvings  # for which the batches are laid out as they come
        self._held: list[Update | Exception | None] = []

    def prepare(self) -> None:
        if not self._held:
            try:
                self._held.append(next(self._updates, None))
            except Exception as error:
                self._held.append(error)

    def take(self) -> Update | None:
        self.prepare()
        one = self._held.pop()
        if isinstance(one, Exception):
            raise one
        return one


def _rehearse(engine: Engine, step_on: MicroStep, halvings: int) -> None:
    assert engine.lay_out is not None
    assert engine.rehearse is not None
    largest = max(engine.lay_out(engine.rehearse, halvings), key=lambda batch: batch.computed)
    engine.enter("backward", shape=_shape(largest), positions=largest.computed, budget=engine.room.now)
    mx.eval(step_on(largest, dropout_key(engine.seed, 0)))


def _accumulated(
    engine: Engine, step_on: MicroStep, update: Update, state: TrainState, window: Window | None, coming: _Coming
) -> Generator[Halfway, None, tuple[LossSum, Any]]:
    """The whole loss of an update and the gradient of its mean.

    Each phase is waited for: the next one can't begin earlier anyway, and so everybody knows what is being computed.
    While a backward pass runs, the next batch's graph is built.
    """
    batches, key = update.batches, dropout_key(engine.seed, state.step)
    accumulator = GradientAccumulator()
    whole: LossSum | None = None
    first = 0
    if window is not None and window.laid == _laid(batches):  # else it was laid out otherwise: from its start
        first, whole = window.done, window.loss
        accumulator.begin(window.gradients, window.loss.weight, window.done)
    built: tuple[LossSum, Any] | None = step_on(batches[first], key)
    for part in range(first, len(batches)):
        assert built is not None, "each batch is built while the one before is computed"
        loss, grads = built
        batch = batches[part]
        engine.enter("forward", part=part + 1, parts=len(batches), shape=_shape(batch), positions=batch.computed)
        mx.eval(loss.hidden)
        engine.enter("loss")
        mx.eval(loss.total, loss.weight, loss.metrics)
        engine.enter("backward")
        mx.async_eval(grads)
        if part + 1 < len(batches):
            built = step_on(batches[part + 1], key)
        else:
            built = None
            coming.prepare()
        mx.eval(grads)
        engine.enter("accumulate")
        accumulator.add(grads, loss.weight)
        mx.eval(accumulator.gradients)
        whole = loss._replace(hidden=()) if whole is None else add_losses(whole, loss)
        del loss, grads
        if part + 1 < len(batches) and engine.asked():
            mx.eval(accumulator.gradients, whole)
            yield Halfway(state, Window(part + 1, len(batches), accumulator.gradients, whole, _laid(batches)))
    assert whole is not None, "an update has at least one batch"
    return whole, accumulator.take()


def _laid(batches: Sequence[Batch]) -> int:
    """A checksum of what lies in which batch. Another budget may give as many batches of the same examples, cut elsewhere."""
    laid = len(batches)
    for batch in batches:
        for array in batch[:5]:
            laid = zlib.crc32(np.array(array).tobytes(), zlib.crc32(repr(array.shape).encode(), laid))
    return laid


def _shape(batch: Batch) -> str:
    """A batch in a few words."""
    rows, length = batch.rows.shape
    shared = f" behind {batch.shared.size:,}" if batch.shared.size else ""
    tree = f" in {len(batch.segments)} pieces" if batch.segments else ""
    return f"{rows} x {length:,} tokens{tree}{shared}, {batch.positions.size:,} places"


def _number(array: mx.array) -> float:
    return cast(float, array.item())


def add_losses(a: LossSum, b: LossSum) -> LossSum:
    """Sums add."""
    return LossSum(a.total + b.total, a.weight + b.weight, {name: a.metrics[name] + b.metrics[name] for name in a.metrics})
