"""What a run learns from each batch: its objective, and what that takes beside the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.model.trunk import Passage
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Batch, LossSum

Objective = Callable[[nn.Module, Batch], LossSum]


@dataclass(frozen=True)
class Lesson:
    """`objective`: for a way through the model, and the teacher if there is one. `beside`: arrays as large as those of a real
    batch of this shape, so that memory can be foreseen."""

    objective: Callable[[Passage, nn.Module | None], Objective]
    beside: Callable[[Batch], tuple[mx.array, ...]] = lambda batch: ()
    teacher: nn.Module | None = None


def answers_only(label_smoothing: float = 0.0) -> Lesson:
    """Supervised fine-tuning."""
    return Lesson(lambda passage, _: sft(label_smoothing, passage))
