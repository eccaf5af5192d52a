"""Gradients of several micro-batches, added up and divided once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

Gradients = Any  # a tree of arrays, as nn.value_and_grad gives it


class GradientAccumulator:
    """Adds sums of gradients and their weights; `take` divides by what was really accumulated and starts anew.

    `grads` belong to a *sum* of losses and `weight` says over how much it was summed (how many supervised tokens).
    Then micro-batches of any sizes give the gradient of one large batch, and a remainder is divided by its own weight:

    >>> import mlx.core as mx
    >>> accumulator = GradientAccumulator(window=2)
    >>> accumulator.add({"w": mx.array([6.0])}, weight=3)
    False
    >>> accumulator.add({"w": mx.array([2.0])}, weight=1)
    True
    >>> accumulator.take()["w"].item()
    2.0
    >>> accumulator.add({"w": mx.array([5.0])}, weight=1)  # the remainder of an epoch
    False
    >>> accumulator.take()["w"].item(), accumulator.count
    (5.0, 0)

    With gradients of *means* and equal weights it is the mean over the micro-batches.
    """

    def __init__(self, window: int | None = None):
        if window is not None and window < 1:
            raise ValueError(f"window: {window} came, a whole number from 1 is expected (or None: you decide when to take)")
        self.window = window
        self._sum: Gradients = None
        self._weight = mx.array(0.0)
        self.count = 0

    @property
    def weight(self) -> mx.array:
        """The weight accumulated so far."""
        return self._weight

    def add(self, grads: Gradients, weight: mx.array | float) -> bool:
        """Add a micro-batch; true when the window is full and it is time to `take`."""
        grads = tree_map(lambda g: g.astype(mx.float32), grads)
        self._sum = grads if self._sum is None else tree_map(mx.add, self._sum, grads)
        self._weight = self._weight + weight
        self.count += 1
        mx.async_eval(self._sum, self._weight)  # or the lazy graph of the whole window stays alive
        return self.window is not None and self.count >= self.window

    @property
    def gradients(self) -> Gradients:
        """The sums so far; nothing was added: None."""
        return self._sum

    def begin(self, grads: Gradients = None, weight: mx.array | float = 0.0, count: int = 0) -> None:
        """Start anew, or where another accumulator stood."""
        self._sum, self._weight, self.count = grads, mx.array(weight), count

    def take(self) -> Gradients:
        """The gradient of the weighted mean of all that was added since the last `take`. Nothing added: an error."""
        if self.count == 0:
            raise ValueError("nothing was accumulated since the last take()")
        divisor = mx.maximum(self._weight, 1e-20)  # a weight of 0 leaves gradients of 0, not 0 / 0
        grads = tree_map(lambda g: g / divisor, self._sum)
        self.begin()
        return grads
