"""Supervised fine-tuning: the answer's tokens, each by the cross-entropy of what comes next."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.model.trunk import PLAIN, Passage, summed_loss
from mlx_qlora.objectives.losses import correct, cross_entropy_and_gradient
from mlx_qlora.records import Batch, LossSum


def sft(
    label_smoothing: float = 0.0, passage: Passage = PLAIN, accuracy: bool = False
) -> Callable[[nn.Module, Batch], LossSum]:
    """The objective. The head runs at the supervised places only, in chunks. With `accuracy`, evaluation also says of each
    place whether its target is the likeliest token; training pays nothing for it."""

    def loss_of(logits: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, ...]:
        return cross_entropy_and_gradient(logits, targets, weights, label_smoothing)

    def with_accuracy(logits: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, ...]:
        return *loss_of(logits, targets, weights), correct(logits, targets, weights)

    def objective(model: nn.Module, batch: Batch) -> LossSum:
        asked = accuracy and not model.training
        of = with_accuracy if asked else loss_of
        summed, hidden = summed_loss(model, batch, of, (batch.targets, batch.weights), passage)
        metrics = {"accuracy": summed.more[0]} if asked else {}
        return LossSum(summed.total, batch.weights.sum(), metrics, hidden=(hidden,), places=summed.places)

    return objective
