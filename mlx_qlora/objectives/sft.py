"""Supervised fine-tuning: the answer's tokens, each by the cross-entropy of what comes next."""

from __future__ import annotations

from collections.abc import Callable

import mlx.nn as nn

from mlx_qlora.model.trunk import logits_at
from mlx_qlora.objectives.losses import cross_entropy_sum
from mlx_qlora.records import Batch, LossSum


def sft(label_smoothing: float = 0.0) -> Callable[[nn.Module, Batch], LossSum]:
    """The objective. The head runs at the supervised places only."""

    def objective(model: nn.Module, batch: Batch) -> LossSum:
        logits = logits_at(model, batch.rows, batch.positions)
        return cross_entropy_sum(logits, batch.targets, batch.weights, label_smoothing)

    return objective
