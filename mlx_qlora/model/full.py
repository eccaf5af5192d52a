"""Training all of a model instead of adapters.

Parameters are dense and float32 while they are trained; a base that is quantised is written out for that. What others get
of it is a folder that mlx-lm loads, in the precision that the base was stored in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_qlora.errors import ModelError, listed, require
from mlx_qlora.findings import size
from mlx_qlora.model import backend
from mlx_qlora.model.dropout import drop_outputs
from mlx_qlora.model.load import Loaded, load
from mlx_qlora.model.lora import finite_or_refuse
from mlx_qlora.records import Delivered


@dataclass(frozen=True)
class FullConfig:
    """What of a model is trained, and in which precision."""

    fine_tune_type: Literal["lora", "full"] = "lora"
    """Train adapters, or every parameter; a model from nothing is always trained in full."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """With full, what forward and backward compute in; parameters, gradients' sums and optimizer stay float32.
    auto: bfloat16 on GPUs, float32 on the CPU, where bfloat16 is some 30 times slower."""
    dropout: float = 0.0
    """With full: share of what embedding, attention and MLP give that is dropped in training."""

    def __post_init__(self) -> None:
        require((0 <= self.dropout < 1, "dropout", self.dropout, "a number from 0 up to, not including, 1"))


@dataclass(frozen=True)
class Whole:
    """All of a model is trained (`model.trained`)."""

    config: FullConfig
    loaded: Loaded = field(repr=False)
    trainable: int
    computes_in: mx.Dtype | None  # None: as the parameters are, float32
    written_out: str = ""  # what became of a quantised base
    base_name: str = ""  # what was loaded; "": the model was made from nothing

    _beside: dict[str, bytes] = field(default_factory=dict, init=False, repr=False)  # made once

    name: ClassVar[str] = "weights"
    file: ClassVar[str] = "model/model.safetensors"
    begins_with: ClassVar[tuple[str, ...]] = ()

    @property
    def total(self) -> int:
        return self.trainable

    @property
    def describe(self) -> tuple[str, ...]:
        precision = _name(self.computes_in) if self.computes_in else "float32"
        dropped = f", dropout {self.config.dropout:g}" if self.config.dropout else ""
        how = f"everything: {self.trainable:,} parameters, float32, computed in {precision}{dropped}"
        return (how, *([self.written_out] if self.written_out else []))

    def load(self, model: nn.Module, arrays: Mapping[str, mx.array], where: object) -> None:
        own: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
        problems = [f"{name}: it is missing" for name in own if name not in arrays]
        problems += [f"{name}: this model has no such array" for name in arrays if name not in own]
        problems += [
            f"{name}: {_by(arrays[name])} came, {_by(own[name])} is expected"
            for name in own.keys() & arrays.keys()
            if arrays[name].shape != own[name].shape or not mx.issubdtype(arrays[name].dtype, mx.floating)
        ]
        if problems:
            raise ModelError(
                f"{where}: these parameters are not of this model; {len(problems)} of {len(own.keys() | arrays.keys())} "
                f"arrays are wrong:\n{listed(problems)}"
            )
        finite_or_refuse(arrays, where)
        model.update(tree_unflatten([(name, array.astype(mx.float32)) for name, array in arrays.items()]))
        mx.eval(model.parameters())

    @contextmanager
    def base(self, model: nn.Module) -> Iterator[nn.Module | None]:
        yield load(self.base_name).model if self.base_name else None

    def delivered(self, arrays: Mapping[str, mx.array]) -> Delivered:
        stored = {name: array.astype(self.loaded.stored) for name, array in arrays.items()}
        mx.eval(stored)
        if not self._beside:
            self._beside.update(model_files(self.loaded))
        return Delivered(self.file, stored, self._beside)


def begin(loaded: Loaded, config: FullConfig, base: str = "") -> Whole:
    """Make every parameter of a loaded model trainable, in float32. Nothing is computed yet."""
    model = loaded.model
    before = _bytes(model)
    quantised = any("scales" in module for _, module in model.named_modules())
    if quantised:
        from mlx_lm.utils import dequantize_model

        dequantize_model(model)
    model.update(tree_map(lambda array: array.astype(mx.float32) if _floating(array) else array, model.parameters()))
    model.unfreeze()
    if config.dropout:
        drop_outputs(model, config.dropout)
    arrays: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    packed = [f"{name}: {_name(array.dtype)}" for name, array in arrays.items() if not _floating(array)]
    if packed:
        raise ModelError(
            f"fine_tune_type: full: {loaded.name} has weights that can't be written out as dense ones:\n{listed(packed)}\n"
            "Train adapters on it (fine_tune_type: lora), or take the model that it was made of."
        )
    bits = loaded.config.get("quantization", {}).get("bits")
    of = f"the {bits}-bit weights of the base" if bits else "the quantised weights of the base"
    said = f"{of} are written out for that: {size(_bytes(model))} instead of {size(before)}" if quantised else ""
    return Whole(config, loaded, sum(array.size for array in arrays.values()), computes_in(config), said, base)


def computes_in(config: FullConfig) -> mx.Dtype | None:
    """What forward and backward compute in; None: as the arrays are."""
    if config.fine_tune_type == "lora":
        return None
    half = config.precision == "bfloat16" or (config.precision == "auto" and not backend.on_cpu())
    return mx.bfloat16 if half else None


def model_files(loaded: Loaded, dense: bool = True) -> dict[str, bytes]:
    """What stands beside the weights of a model: its configuration, as dense as they are, and its tokenizer."""
    from mlx_lm.utils import save_config

    without = ("quantization", "quantization_config") if dense else ()
    config = {name: value for name, value in loaded.config.items() if name not in without}
    with TemporaryDirectory() as made:
        folder = Path(made)
        loaded.tokenizer.save_pretrained(made)
        save_config(config, folder / "config.json", keep_vision_config=True)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _floating(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _by(array: mx.array) -> str:
    return f"{' x '.join(map(str, array.shape)) or 'a single number'} of {_name(array.dtype)}"


def _bytes(model: nn.Module) -> int:
    arrays: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    return sum(array.nbytes for array in arrays.values())
