"""Schedules as closures, optimizers by name, clipping, and the guard against non-finite updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_flatten, tree_map, tree_reduce

from mlx_qlora.errors import ConfigError, require

Schedule = Callable[[mx.array], mx.array]

OPTIMIZERS: dict[str, type[mlx.optimizers.Optimizer]] = {
    name.lower(): getattr(mlx.optimizers, name)
    for name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "AdaDelta", "Adamax", "Lion", "Adafactor", "Muon")
}
OptimizerName = Literal[
    "adam", "adamw", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "lion", "adafactor", "muon"
]  # fmt: skip


@dataclass(frozen=True)
class OptimConfig:
    """How an update is made from gradients."""

    learning_rate: float = 1e-4
    """The highest learning rate of the schedule. --lr is the same."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How it falls after the warm-up, to 0 at the end of the run."""
    warmup_steps: int = 0
    """Updates over which it rises to its highest."""
    optimizer: OptimizerName = "adamw"
    """An optimizer of mlx.optimizers."""
    optimizer_options: dict[str, float] = field(default_factory=dict)
    """Further numbers for the optimizer, such as weight_decay, momentum, or beta1 and beta2 for its betas."""
    embedding_learning_rate: float | None = None
    """The highest learning rate of embeddings and head, where these are trained; without a number as all the rest."""
    decay: Literal["matrices", "all"] = "matrices"
    """What the optimizer's weight decay shrinks: matrices only, or norms and biases, too."""
    clip_grad_norm: float = 1.0
    """Largest norm of the whole gradient; 0: unclipped."""

    def __post_init__(self) -> None:
        finite, own = math.isfinite(self.learning_rate), self.embedding_learning_rate
        require(
            (finite and self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0, such as 1e-4"),
            (own is None or 0 < own < math.inf, "embedding_learning_rate", own, "a number above 0, such as 1e-5"),
            (self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "a whole number from 0"),
            (0 <= self.clip_grad_norm < math.inf, "clip_grad_norm", self.clip_grad_norm, "a number from 0 (0: no clipping)"),
            (self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, " or ".join(OPTIMIZERS)),
        )
        make_optimizer(self, total_steps=1)  # wrong options are found before anything is loaded


def make_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """The learning rate of update `step`, counted from 0.

    >>> rate = make_schedule(OptimConfig(learning_rate=1.0, schedule="linear", warmup_steps=2), total_steps=6)
    >>> [round(rate(mx.array(step)).item(), 2) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    falling = max(1, total_steps - warmup)

    def rate(step: mx.array) -> mx.array:
        done = mx.clip((step - warmup) / falling, 0.0, 1.0)
        if config.schedule == "constant":
            factor = mx.ones_like(done)
        elif config.schedule == "linear":
            factor = 1.0 - done
        else:
            factor = 0.5 * (1.0 + mx.cos(math.pi * done))
        rising = mx.minimum(1.0, (step + 1) / max(1, warmup))
        return peak * mx.where(step < warmup, rising, factor)

    return rate


def make_optimizer(
    config: OptimConfig, total_steps: int, params: Any = None, of_vocabulary: Callable[[str], bool] = lambda name: False
) -> mlx.optimizers.Optimizer:
    """The optimizer with its schedule, for these parameters. Adam and AdamW correct their bias, as everywhere but in MLX's
    default. Where embeddings and head, told by their names, have a learning rate of their own, or arrays are spared from
    decay, each group has an optimizer; `learning_rate` is then that of the first, which is the rest of the model."""

    def group(name: str, array: mx.array) -> tuple[bool, bool]:
        """(whether it has the learning rate of embeddings, whether it is spared from decay)"""
        own = config.embedding_learning_rate is not None and of_vocabulary(name)
        return own, array.ndim < 2 and config.decay == "matrices" and _decays(config)

    groups = sorted({group(name, array) for name, array in _flat(params)}) or [(False, False)]
    optimizers = [_of_group(config, total_steps, *each) for each in groups]
    if len(groups) == 1:
        return optimizers[0]
    filters = [lambda name, array, wanted=each: group(name, array) == wanted for each in groups[:-1]]
    return mlx.optimizers.MultiOptimizer(optimizers, filters)


def _flat(params: Any) -> list[tuple[str, mx.array]]:
    return [] if params is None else tree_flatten(params)  # type: ignore[return-value]


def _decays(config: OptimConfig) -> bool:
    """Whether the optimizer shrinks weights, as it was told to or by default."""
    default = signature(OPTIMIZERS[config.optimizer]).parameters.get("weight_decay")
    return bool(config.optimizer_options.get("weight_decay", default.default if default else 0))


def _of_group(config: OptimConfig, total_steps: int, of_embeddings: bool, spared: bool) -> mlx.optimizers.Optimizer:
    kind: Any = OPTIMIZERS[config.optimizer]
    options: dict[str, Any] = dict(config.optimizer_options)
    if "beta1" in options or "beta2" in options:
        options["betas"] = [options.pop("beta1", 0.9), options.pop("beta2", 0.999)]
    if config.optimizer in ("adam", "adamw"):
        options.setdefault("bias_correction", True)
    if config.optimizer == "adafactor":
        options |= {"relative_step": False, "scale_parameter": False}
    if spared:
        options["weight_decay"] = 0.0
    if of_embeddings and config.embedding_learning_rate is not None:
        config = replace(config, learning_rate=config.embedding_learning_rate, embedding_learning_rate=None)
    try:
        optimizer: mlx.optimizers.Optimizer = kind(learning_rate=make_schedule(config, total_steps), **options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in config.optimizer_options.items())
        raise ConfigError(
            f"optimizer_options: {given} came, and {config.optimizer} does not take that ({error}). "
            f"See mlx.optimizers.{kind.__name__} for its options."
        ) from error
    return optimizer


def times(config: OptimConfig, rate: float) -> OptimConfig:
    """The same with other learning rates, all of them by this factor."""
    own = config.embedding_learning_rate
    return replace(
        config, learning_rate=config.learning_rate * rate, embedding_learning_rate=None if own is None else own * rate
    )


def begin(optimizer: mlx.optimizers.Optimizer, params: Any) -> None:
    """Give the optimizer its state for these parameters, if it has none: in float32, whatever they are; MLX would take
    their dtype, and in bfloat16 a mean of squares stops moving at 1/256 of its value."""
    optimizer.init(tree_map(lambda array: array.astype(mx.float32), params))


def global_norm(grads: Any) -> mx.array:
    """The norm of all gradients together, in float32."""
    squares = tree_map(lambda g: mx.square(g.astype(mx.float32)).sum(), grads)
    return mx.sqrt(tree_reduce(mx.add, squares, mx.array(0.0)))


class Guarded(NamedTuple):
    """What an update came to."""

    params: Any
    grad_norm: mx.array
    learning_rate: mx.array
    finite: mx.array  # whether it was applied


def guarded_update(optimizer: mlx.optimizers.Optimizer, params: Any, grads: Any, loss: mx.array, clip: float) -> Guarded:
    """One update, all of it on the device: nothing here waits for a value.

    When the loss or the gradient is not finite, parameters and the optimizer's state keep every byte.
    """
    norm = global_norm(grads)
    finite = mx.isfinite(norm) & mx.isfinite(loss)
    if clip:
        grads = tree_map(lambda g: g * mx.minimum(1.0, clip / (norm + 1e-6)), grads)
    before = optimizer.state
    optimizer.state = tree_map(lambda array: array, before)  # MLX's optimizers write into theirs: what was there stays whole
    updated = optimizer.apply_gradients(grads, params)
    rate = optimizer.learning_rate

    def keep(new: Any, old: Any) -> Any:
        return mx.where(finite, new, old).astype(old.dtype) if isinstance(old, mx.array) else new

    optimizer.state = tree_map(keep, optimizer.state, before)
    return Guarded(tree_map(keep, updated, params), norm, rate, finite)
