"""Hidden states without the head, and the head without the trunk, with the model's own code untouched.

Nearly all models of mlx-lm are trunk-then-head: `self.model(...)`, then a head with its soft-caps and scales. Given a
stub in place of the trunk that returns hidden states, the model's class computes the head alone, to the bit.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

_TRUNK = "model"
_INNER = "language_model"  # models that see and read keep the reading part here


def logits_at(model: nn.Module, rows: mx.array, positions: mx.array) -> mx.array:
    """Logits [S, V] at `positions` of the rows flattened to [B * L]; the head runs at these places only.

    A model that is not trunk-then-head runs whole, and the places are picked from its logits.
    """
    language: Any = model.get(_INNER, model)
    if not isinstance(language.get(_TRUNK), nn.Module):
        logits = model(rows)
        return logits.reshape(-1, logits.shape[-1])[positions]  # type: ignore[no-any-return]
    hidden = language[_TRUNK](rows)
    picked = hidden.reshape(-1, hidden.shape[-1])[positions]
    return _head(language, picked[None])[0]


def _head(model: nn.Module, hidden: mx.array) -> mx.array:
    """The model's own code from the hidden states on, over a shallow copy whose trunk is a stub."""
    stubbed: Any = model.__class__.__new__(model.__class__)
    stubbed.__dict__.update(model.__dict__)
    dict.update(stubbed, model)
    setattr(stubbed, _TRUNK, _Given(model[_TRUNK], hidden))
    return stubbed(mx.zeros(hidden.shape[:2], mx.int32))  # type: ignore[no-any-return]


class _Given:
    """Stands in for a trunk: returns hidden states, and is the trunk in everything else (tied embeddings)."""

    def __init__(self, trunk: nn.Module, hidden: mx.array):
        self._trunk = trunk
        self._hidden = hidden

    def __call__(self, *_: object, **__: object) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)
