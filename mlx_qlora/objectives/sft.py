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
        losses = cross_entropy_and_gradient(logits, targets, weights, label_smoothing)
        return (*losses, correct(logits, targets, weights)) if accuracy else losses

    def objective(model: nn.Module, batch: Batch) -> LossSum:
        total, places, hidden = summed_loss(model, batch, loss_of, (batch.targets, batch.weights), passage)
        metrics = {"accuracy": places[1].sum()} if len(places) > 1 else {}
        return LossSum(total, batch.weights.sum(), metrics, hidden=(hidden,), places=places)

    return objective
