"""What of a model is trained: adapters, or all of it. Nobody else in a run knows which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qlora.model import full, lora
from mlx_qlora.model.full import FullConfig
from mlx_qlora.model.load import Loaded
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.records import Delivered


class Trained(Protocol):
    """What of a model is trained."""

    @property
    def name(self) -> str:
        """What its arrays are called in a checkpoint and in a run's header."""

    @property
    def file(self) -> str:
        """Where the best of them is in the folder of a run, as other programs load it."""

    @property
    def describe(self) -> tuple[str, ...]:
        """Lines for a run's header."""

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""

    @property
    def total(self) -> int:
        """Parameters of the model, with those."""

    @property
    def computes_in(self) -> mx.Dtype | None:
        """What forward and backward compute in; None: as the arrays are."""

    @property
    def begins_with(self) -> tuple[str, ...]:
        """Empty folders that a run begins with."""

    def load(self, model: nn.Module, arrays: Mapping[str, mx.array], where: object) -> None:
        """Put trained arrays into the model, all of them or none. `where` is the file, for the message."""

    def base(self, model: nn.Module) -> AbstractContextManager[nn.Module | None]:
        """The model as it was before any training, while inside; None: there was none."""

    def delivered(self, arrays: Mapping[str, mx.array]) -> Delivered:
        """Trained arrays as other programs load them; nothing of it is left to compute."""


def begin(loaded: Loaded, adapters: LoraConfig, whole: FullConfig, *, seed: int = 0, base: str = "") -> Trained:
    """Make a model trainable as the settings say. `base`: what it was loaded from; empty: it was made from nothing."""
    if whole.fine_tune_type == "full":
        return full.begin(loaded, whole, base)
    return lora.attach(loaded.model, adapters, seed=seed)


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    """The trained arrays by name."""
    arrays: dict[str, mx.array] = tree_flatten(model.trainable_parameters(), destination={})  # type: ignore[assignment]
    return arrays


def of_vocabulary(model: nn.Module) -> Callable[[str], bool]:
    """Whether an array, by its name, belongs to the embedding or to the head."""
    places = tuple(f"{path}." for path in lora.vocabulary_paths(model))
    return lambda name: name.startswith(places)
