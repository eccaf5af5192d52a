"""What to do when memory ends: the same examples in smaller batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import mlx.core as mx

from mlx_qlora.errors import OutOfMemoryError
from mlx_qlora.records import Batch, Update

Laid = Callable[[Update, int], tuple[Batch, ...]]  # (update, halvings) -> its examples in batches of so much smaller budgets
Result = TypeVar("Result")

# What MLX says on its backends: Metal's allocator and its command buffers, CUDA's, and the common one.
_SIGNS = ("out of memory", "outofmemory", "insufficient memory", "unable to allocate", "attempting to allocate", "bad_alloc")
_LEAST = 16  # positions at once: with fewer, batches have long been of one example


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended. MLX has no type of its own for it."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in said for sign in _SIGNS))


@dataclass
class Room:
    """How many positions are computed at once: halved when memory ends, and remembered for the rest of the run."""

    budget: int  # positions at once, as planned
    halvings: int = 0
    tell: Callable[[int], None] = field(default=lambda now: None)  # is told the new budget

    @property
    def now(self) -> int:
        return max(1, self.budget >> self.halvings)

    def halve(self, said: str) -> None:
        """Take half as much from now on; raises when there is nothing left to halve."""
        mx.clear_cache()
        if self.now <= _LEAST:
            raise OutOfMemoryError(
                f"Memory ended even with one example at a time: {' '.join(said.split())[:200]}\n"
                "What to try, in this order: grad_checkpoint: on, with adapters fewer lora.layers, a smaller max_seq_length, "
                "a model with fewer bits or weights. mlx-qlora plan says what each of them comes to."
            )
        self.halvings += 1
        self.tell(self.now)

    def within(self, work: Callable[[int], Result]) -> Result:
        """What `work(halvings)` gives, tried again with ever smaller batches while memory ends."""
        while True:
            try:
                return work(self.halvings)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error)
            self.halve(said)  # out here, the error and all that its frames held are gone
