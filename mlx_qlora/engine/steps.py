"""The micro-step, the update, and the generator of reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np

from mlx_qlora.engine.accumulate import GradientAccumulator
from mlx_qlora.engine.optim import OptimConfig, guarded_update
from mlx_qlora.errors import NonFiniteError
from mlx_qlora.records import Batch, LossSum, StepReport, Update

Objective = Callable[[nn.Module, Batch], LossSum]
WithKey = Callable[[nn.Module, mx.array], Any]  # gives a context in which dropout draws from a key
MicroStep = Callable[[Batch, mx.array], tuple[LossSum, Any]]


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
    rehearse: Batch | None = None  # the largest batch of the run: computed first, so that what does not fit fails at once


def micro_step(engine: Engine) -> MicroStep:
    """A function of (batch, dropout key) that gives the summed loss and its gradient.

    Compiled, it is traced once for each shape; packed rows, of which no two are alike, go through it uncompiled.
    """
    model, objective = engine.model, engine.objective

    def total(params: Any, batch: Batch) -> tuple[mx.array, LossSum]:
        model.update(params)
        loss = objective(model, batch)
        return loss.total, loss

    gradient = mx.value_and_grad(total)

    def step(params: Any, key: mx.array, batch: Batch) -> tuple[tuple[Any, ...], Any]:
        with engine.with_key(model, key):
            (_, loss), grads = gradient(params, batch)
        return tuple(loss), grads

    def of_arrays(params: Any, key: mx.array, *arrays: mx.array) -> tuple[tuple[Any, ...], Any]:
        return step(params, key, Batch(*arrays[:6], (), *arrays[6:]))  # type: ignore[arg-type, call-arg]

    traced = mx.compile(of_arrays)

    def run(batch: Batch, key: mx.array) -> tuple[LossSum, Any]:
        params = model.trainable_parameters()
        try:
            if engine.compiled and not batch.segments:
                loss, grads = traced(params, key, *batch[:6], *([] if batch.states is None else [batch.states]))
            else:
                loss, grads = step(params, key, batch)
        finally:
            model.update(params)  # tracing leaves placeholders in the model
        return LossSum(*loss), grads

    return run


def dropout_key(seed: int, update: int) -> mx.array:
    """The key of an update, the same in every run with this seed; what is dropped follows from it and the tokens."""
    return mx.random.key(int(np.random.SeedSequence((seed, update)).generate_state(1, np.uint64)[0]))


def steps(engine: Engine, updates: Iterable[Update]) -> Iterator[StepReport]:
    """Make the updates, one report each. All that an update changes is computed before its report is given.

    While the device computes an update, the next one's batches are made.
    """
    model, optimizer, config = engine.model, engine.optimizer, engine.config
    step_on = micro_step(engine)
    optimizer.init(model.trainable_parameters())
    accumulator = GradientAccumulator()
    skipped = in_a_row = 0
    if engine.rehearse is not None:
        mx.eval(step_on(engine.rehearse, dropout_key(engine.seed, 0)))
    coming = iter(updates)
    following = next(coming, None)
    begun = start = time.perf_counter()
    for number in count():
        if (update := following) is None:
            return
        loss = _accumulate(step_on, update.batches, accumulator, dropout_key(engine.seed, number))
        mean = loss.total / loss.weight
        done = guarded_update(optimizer, model.trainable_parameters(), accumulator.take(), mean, config.clip_grad_norm)
        model.update(done.params)
        mx.async_eval(done, optimizer.state, mean, loss.metrics)
        problem: Exception | None = None
        try:
            following = next(coming, None)
        except Exception as error:  # what was computed meanwhile is still reported
            problem = error
        mx.eval(done, optimizer.state, mean, loss.metrics)
        now = time.perf_counter()
        in_a_row = 0 if done.finite.item() else in_a_row + 1
        skipped += in_a_row > 0
        yield StepReport(
            step=number + 1,
            epoch=update.epoch,
            loss=_number(mean),
            learning_rate=_number(done.learning_rate),
            grad_norm=_number(done.grad_norm),
            tokens=update.tokens,
            supervised_tokens=update.supervised_tokens,
            positions=update.positions,
            tokens_per_second=update.tokens / (now - begun),
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            elapsed_s=now - start,
            skipped_updates=skipped,
            metrics={name: _number(value / loss.weight) for name, value in loss.metrics.items()},
        )
        if in_a_row >= config.max_skipped_updates:
            raise NonFiniteError(_explain(in_a_row, number + 1, update.ids))
        if problem is not None:
            raise problem
        begun = time.perf_counter()


def _accumulate(step_on: MicroStep, batches: Sequence[Batch], accumulator: GradientAccumulator, key: mx.array) -> LossSum:
    """The whole loss of an update; nothing here waits for a value."""
    whole: LossSum | None = None
    for batch in batches:
        loss, grads = step_on(batch, key)
        accumulator.add(grads, loss.weight)
        whole = loss if whole is None else add_losses(whole, loss)
    assert whole is not None, "an update has at least one batch"
    return whole


def _number(array: mx.array) -> float:
    return cast(float, array.item())


def add_losses(a: LossSum, b: LossSum) -> LossSum:
    """Sums add."""
    return LossSum(a.total + b.total, a.weight + b.weight, {name: a.metrics[name] + b.metrics[name] for name in a.metrics})


def _explain(in_a_row: int, step: int, ids: Sequence[str]) -> str:
    return (
        f"{in_a_row} updates in a row, up to update {step}, had a loss or a gradient that is not a finite number. "
        "They changed nothing: the adapters are as they were before them.\n"
        f"The last such update had the examples {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}.\n"
        "What to try, in this order: a learning rate of a third (learning_rate), a warm-up of 20 updates or more "
        "(warmup_steps), a smaller clip_grad_norm such as 0.5, a smaller lora.scale, more supervised tokens in an "
        "update (batch_size, gradient_accumulation), and a look at the examples named above."
    )
