"""When the numbers go wrong: updates that are not finite, and losses that jump. A value that is updated with reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

from mlx_qlora.errors import require

_LOSSES = 50  # the last ones, that a jump is measured against
_FEWEST = 10  # before so many are known, nothing is a jump
_NATS = 1.5  # by so much at least ...
_SPREADS = 6.0  # ... and by so many standard deviations, estimated from the median deviation
_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class GuardConfig:
    """What to do about updates whose loss or gradient is not finite. They never change anything."""

    on_nonfinite: Literal["skip", "stop", "rollback"] = "skip"
    """Stop at the first; skip within the limits below, then stop; or then go back to the last checkpoint of the schedule
    with a lower learning rate."""
    max_skipped_updates: int = 10
    """So many in a row are too many."""
    max_skipped_share: float = 0.05
    """And so large a share of the last skipped_window updates (but never fewer than 3)."""
    skipped_window: int = 200
    """Updates over which the share is taken."""
    rollback_factor: float = 0.5
    """By what the learning rate is multiplied each time the run goes back."""
    max_rollbacks: int = 3
    """After going back so often, stop."""

    def __post_init__(self) -> None:
        require(
            (self.max_skipped_updates >= 1, "max_skipped_updates", self.max_skipped_updates, "a whole number from 1"),
            (0 < self.max_skipped_share <= 1, "max_skipped_share", self.max_skipped_share, "a number above 0, up to 1"),
            (self.skipped_window >= 1, "skipped_window", self.skipped_window, "a whole number from 1"),
            (0 < self.rollback_factor < 1, "rollback_factor", self.rollback_factor, "a number between 0 and 1"),
            (self.max_rollbacks >= 1, "max_rollbacks", self.max_rollbacks, "a whole number from 1"),
        )


@dataclass(frozen=True)
class Guard:
    """Watches updates. A value: `update` gives the next one and leaves this one as it is.

    >>> guard = Guard(GuardConfig(max_skipped_updates=2))
    >>> guard.update(2.0, True).update(float("nan"), False).update(float("nan"), False).trouble
    '2 updates in a row'
    """

    config: GuardConfig = field(default_factory=GuardConfig)
    recent: tuple[bool, ...] = ()  # the last updates: whether each was skipped
    losses: tuple[float, ...] = ()  # the last finite ones
    jumped: bool = False  # whether the last loss is far above those before it

    def update(self, loss: float, finite: bool) -> Guard:
        """The guard after one more update."""
        return replace(
            self,
            recent=(*self.recent, not finite)[-max(self.config.skipped_window, self.config.max_skipped_updates) :],
            losses=(*self.losses, loss)[-_LOSSES:] if finite else self.losses,
            jumped=finite and self._jumps(loss),
        )

    def _jumps(self, loss: float) -> bool:
        if len(self.losses) < _FEWEST:
            return False
        middle = median(self.losses)
        spread = _TO_SIGMA * median(abs(each - middle) for each in self.losses)
        return loss - middle > max(_NATS, _SPREADS * spread) and loss > max(self.losses)

    @property
    def usual(self) -> float:
        """The loss in the middle of the last ones."""
        return median(self.losses) if self.losses else math.nan

    @property
    def trouble(self) -> str:
        """What is too much; empty while it is not."""
        config = self.config
        if not self.recent or not self.recent[-1]:
            return ""
        if config.on_nonfinite == "stop":
            return "an update"
        in_a_row = next((number for number, skipped in enumerate(reversed(self.recent)) if not skipped), len(self.recent))
        if in_a_row >= config.max_skipped_updates:
            return f"{in_a_row} updates in a row" if in_a_row > 1 else "an update"
        window = self.recent[-config.skipped_window :]
        if sum(window) >= max(3, config.max_skipped_share * config.skipped_window):
            return f"{sum(window)} of the last {len(window)} updates"
        return ""

    def calmed(self) -> Guard:
        """After going back: what was skipped is no longer held against the run."""
        return replace(self, recent=(), jumped=False)
