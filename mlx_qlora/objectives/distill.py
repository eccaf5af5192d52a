"""Distillation: a teacher's distribution at each supervised place, beside the target that stands there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import require
from mlx_qlora.model.trunk import PLAIN, Passage, foretold, summed_loss
from mlx_qlora.objectives import divergence
from mlx_qlora.objectives.divergence import Classes
from mlx_qlora.objectives.losses import cross_entropy_and_gradient
from mlx_qlora.objectives.sorted_probabilities import uld_and_gradient
from mlx_qlora.records import Batch, LossSum

_STRETCHES = 16  # in which a schedule goes over a run; so a cache can hold what belongs to each of its temperatures
# (student's logits [S, V], what is said of places [S, ...] ...) -> (divergence [S], gradient [S, V], where it was clipped [S])
Compared = Callable[..., tuple[mx.array, mx.array, mx.array]]


@dataclass(frozen=True)
class DistillConfig:
    """How a student learns from a teacher: alpha x T^2 x divergence + (1 - alpha) x cross-entropy."""

    teacher: str = ""
    """The teacher: a folder or a model of the hub that mlx-lm loads; it answers beside the student, in the same memory."""
    teacher_adapters: str = ""
    """A folder with adapters for it."""
    cache: str = ""
    """A folder that `mlx-qlora distill cache` wrote: the teacher is not loaded at all."""
    loss: Literal["forward_kl", "reverse_kl", "js", "uld"] = "forward_kl"
    """The divergence: teacher to student, student to teacher, between both (js_weight), or, between different tokenizers and
    from a cache, of sorted probabilities."""
    js_weight: float = 0.5
    """Of the generalised Jensen-Shannon divergence: the teacher's share of the mixture."""
    estimate: Literal["all", "top_k", "sampled"] = "all"
    """What of the teacher counts: all that is there, its top_k classes with the mass of the rest as one more class, or, from a
    cache, tokens that were drawn from it, whose mean is the forward divergence."""
    top_k: int = 64
    """Classes, where estimate is top_k."""
    temperature: tuple[float, ...] = (2.0, 1.5, 1.0)
    """By what the logits of both are divided: one number, or several over the run (schedule)."""
    alpha: tuple[float, ...] = (0.5, 0.4, 0.3)
    """The divergence's share of the loss: one number, or several over the run."""
    schedule: Literal["epochs", "linear", "cosine"] = "epochs"
    """How temperature and alpha go through their numbers: one an epoch and then the last, or over the whole run in 16 steps,
    straight or smoothly."""
    logit_clip: float = 50.0
    """Logits of both are clipped to plus or minus this where they are compared; 0: not at all."""

    def __post_init__(self) -> None:
        warm = self.temperature
        require(
            (0 < self.js_weight < 1, "distill.js_weight", self.js_weight, "a number between 0 and 1"),
            (self.top_k >= 1, "distill.top_k", self.top_k, "a whole number from 1"),
            (
                bool(warm) and all(0.05 <= each <= 100 for each in warm),
                "distill.temperature",
                list(warm),
                "a number from 0.05 to 100, or a list of such,",
            ),
            (
                bool(self.alpha) and all(0 <= each <= 1 for each in self.alpha),
                "distill.alpha",
                list(self.alpha),
                "a number from 0 to 1, or a list of such,",
            ),
            (self.logit_clip >= 0, "distill.logit_clip", self.logit_clip, "a number from 0"),
        )

    @property
    def wanted(self) -> bool:
        """Whether there is a teacher at all."""
        return bool(self.teacher or self.cache)

    def at(self, epoch: float, done: float) -> tuple[float, float]:
        """(temperature, alpha) of the update with which so many epochs and this share of the run are done."""
        return tuple(_value(each, self.schedule, epoch, done) for each in (self.temperature, self.alpha))  # type: ignore[return-value]

    @property
    def temperatures(self) -> tuple[float, ...]:
        """All that a run can have."""
        if self.schedule == "epochs":
            return tuple(dict.fromkeys(self.temperature))
        return tuple(dict.fromkeys(_between(self.temperature, self.schedule, each) for each in range(_STRETCHES)))


def _value(numbers: Sequence[float], schedule: str, epoch: float, done: float) -> float:
    """
    >>> [_value([2.0, 1.5, 1.0], "epochs", epoch, epoch / 9) for epoch in (0.1, 1.0, 1.1, 2.0, 8.9)]
    [2.0, 2.0, 1.5, 1.5, 1.0]
    >>> [round(_value([2.0, 1.0], "linear", 1.0, done), 2) for done in (0.01, 0.5, 1.0)]
    [2.0, 1.53, 1.0]
    """
    reached = math.ceil(epoch - 1e-9) - 1  # the epoch that the update was made in
    if schedule == "epochs":
        return numbers[min(max(reached, 0), len(numbers) - 1)]
    stretch = math.ceil(min(1.0, done) * _STRETCHES - 1e-9) - 1
    return _between(numbers, schedule, max(stretch, 0))


def _between(numbers: Sequence[float], schedule: str, stretch: int) -> float:
    """The number of one stretch of a run; the first and the last stretch have the first and the last number."""
    done = stretch / (_STRETCHES - 1)
    place = (done if schedule == "linear" else (1 - math.cos(math.pi * done)) / 2) * (len(numbers) - 1)
    before = min(int(place), len(numbers) - 2) if len(numbers) > 1 else 0
    after = numbers[min(before + 1, len(numbers) - 1)]
    return round(numbers[before] + (after - numbers[before]) * (place - before), 6)


def distil(
    config: DistillConfig,
    common: int,
    teacher: nn.Module | None = None,
    label_smoothing: float = 0.0,
    passage: Passage = PLAIN,
) -> Callable[[nn.Module, Batch], LossSum]:
    """The objective: alpha x T^2 x divergence + (1 - alpha) x cross-entropy, at the supervised places, in chunks of them.

    `common`: so many ids, from 0 on, are those of teacher and student; the divergence is between the distributions over
    these. `Batch.beside` has temperature and alpha, then what a cache knows of each place if there is no live teacher.
    """

    def objective(model: nn.Module, batch: Batch) -> LossSum:
        temperature, alpha, *said = batch.beside
        compared = _from_cache(config, temperature)
        if teacher is not None:
            states, head = foretold(teacher, batch)
            said = [states]
            # The teacher goes first: what it needs on its way is gone before the student keeps anything for the backward.
            batch = batch._replace(rows=mx.depends([batch.rows], [states])[0])
            compared = _live(config, common, head, temperature)
        share = alpha * temperature * temperature if config.loss != "uld" else alpha

        def loss_of(logits: mx.array, targets: mx.array, weights: mx.array, *said: mx.array) -> tuple[mx.array, ...]:
            losses, slope = cross_entropy_and_gradient(logits, targets, weights, label_smoothing)
            student, moves, bit = divergence.clipped(logits[:, :common], config.logit_clip)
            far, away, beyond = compared(student, *said)
            weights = weights.astype(mx.float32)
            far = mx.where(weights == 0, 0.0, weights * far)
            away = mx.where(weights[:, None] == 0, 0.0, (share * weights)[:, None] * moves * away)
            away = mx.pad(away, [(0, 0), (0, logits.shape[-1] - common)])
            clipped = mx.where(bit | beyond, weights, 0.0)
            return share * far + (1 - alpha) * losses, away + (1 - alpha) * slope, losses, far, clipped

        summed, hidden = summed_loss(model, batch, loss_of, (batch.targets, batch.weights, *said), passage)
        weight = batch.weights.sum()
        metrics = dict(zip(("ce", "kd", "clipped"), summed.more, strict=True))
        metrics |= {"temperature": temperature * weight, "alpha": alpha * weight}
        return LossSum(summed.total, weight, metrics, hidden=(hidden,), places=summed.places[:1])

    return objective


def _live(config: DistillConfig, common: int, head: Callable[[mx.array], mx.array], temperature: mx.array) -> Compared:
    """With a teacher that is there: its logits at a chunk of places, from its states."""
    kind, js_weight = config.loss, config.js_weight

    def compared(student: mx.array, states: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        said, _, beyond = divergence.clipped(mx.stop_gradient(head(states))[:, :common], config.logit_clip)
        if config.estimate == "all" or config.top_k >= common:
            return *divergence.of_all(kind, student, said, temperature, js_weight), beyond  # type: ignore[arg-type]
        classes = divergence.largest(said, config.top_k, temperature)
        return *divergence.of_classes(kind, student, classes, temperature, js_weight), beyond  # type: ignore[arg-type]

    return compared


def _from_cache(config: DistillConfig, temperature: mx.array) -> Compared:
    """With what a cache has: (scores, ids, rest) of classes, or (log-probabilities, ids) of samples. A place whose scores are
    all -inf has no partner at the teacher, and no divergence."""

    def compared(student: mx.array, scores: mx.array, ids: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        if config.loss == "uld":
            return *uld_and_gradient(student, scores, rest[0], temperature), mx.zeros(ids.shape[0], mx.bool_)
        known = mx.isfinite(scores).any(axis=-1)
        scores = mx.where(known[:, None], scores, 0.0)
        if config.estimate == "sampled":
            far, away = divergence.of_samples(student, ids, scores)
        else:
            classes = Classes(ids, scores, rest[0])
            far, away = divergence.of_classes(config.loss, student, classes, temperature, config.js_weight)
        return mx.where(known, far, 0.0), mx.where(known[:, None], away, 0.0), mx.zeros(known.shape, mx.bool_)

    return compared
