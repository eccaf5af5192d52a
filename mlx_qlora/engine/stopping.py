"""When to stop: a value that is updated with a metric."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from mlx_qlora.errors import require


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Stop when the validation loss no longer improves."""

    patience: int = 5
    """Stop after so many validations without improvement; 0: never."""
    min_delta: float = 0.001
    """An improvement is a change by more than this."""

    def __post_init__(self) -> None:
        require(
            (self.patience >= 0, "early_stopping.patience", self.patience, "a whole number from 0"),
            (0 <= self.min_delta < math.inf, "early_stopping.min_delta", self.min_delta, "a number from 0"),
        )


@dataclass(frozen=True)
class EarlyStoppingMonitor:
    """Watches a metric. A value: `update` gives the next one and leaves this one as it is.

    >>> monitor = EarlyStoppingMonitor(patience=2, min_delta=0.1)
    >>> for loss in (3.0, 2.0, 1.95, 2.5):
    ...     monitor = monitor.update(loss)
    >>> monitor.best, monitor.stale, monitor.should_stop
    (2.0, 2, True)

    `best` moves only by more than `min_delta`, so small steps count once they add up to that. `is_extreme` says
    whether the last metric was better than every one before it, by however little.
    """

    patience: int = 5
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"
    best: float | None = None
    stale: int = 0  # updates since the last improvement
    extreme: float | None = None
    is_extreme: bool = False  # whether the last metric was better than every one before it

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode: {self.mode!r} came, 'min' or 'max' is expected")
        EarlyStoppingConfig(self.patience, self.min_delta)

    @property
    def should_stop(self) -> bool:
        return self.patience > 0 and self.stale >= self.patience

    def update(self, metric: float) -> EarlyStoppingMonitor:
        """The monitor after one more value of the metric. One that is not a number is no improvement."""
        sign = 1.0 if self.mode == "min" else -1.0
        value = math.inf if math.isnan(metric) else sign * metric
        improved = value < (math.inf if self.best is None else sign * self.best - self.min_delta)
        extreme = value < (math.inf if self.extreme is None else sign * self.extreme)
        return replace(
            self,
            best=metric if improved else self.best,
            stale=0 if improved else self.stale + 1,
            extreme=metric if extreme else self.extreme,
            is_extreme=extreme,
        )
