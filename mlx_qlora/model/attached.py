"""Adapters that lie in a folder, put on a model: a run's, one of its checkpoints', or mlx-lm's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import ModelError
from mlx_qlora.files import json_object
from mlx_qlora.model import lora
from mlx_qlora.model.lora import LoraConfig


def attach_from(model: nn.Module, folder: Path, setting: str = "--adapters") -> str:
    """Put the adapters of a folder on, as this library, mlx-lm or a checkpoint has them; gives their digest."""
    file = folder / "adapters.safetensors"
    if not file.is_file():
        below = folder / "adapters"
        instead = f"Did you mean {below}?" if (below / file.name).is_file() else ""
        expected = "A run's adapters or one of its checkpoint folders is expected."
        raise ModelError(f"{setting} {folder}: no adapters.safetensors in it. {instead or expected}")
    try:
        arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    except Exception as error:  # whatever a damaged file makes MLX raise
        raise ModelError(f"{file}: it can't be read: {' '.join(str(error).split())[:200]}") from error
    paths = {name.removesuffix(".lora_a") for name in arrays if name.endswith(".lora_a")}
    if not paths:
        raise ModelError(f"{file}: no LoRA adapters are in it (none of its {len(arrays)} arrays is named ...lora_a).")
    own = {path for path, _ in model.named_modules()}
    if not paths & own:
        raise ModelError(
            f"{file}: these adapters are of another model: {min(paths)}, and none of the {len(paths)} layers that they "
            "change is in this one. Name the model that they were trained with."
        )
    rank = int(arrays[f"{min(paths)}.lora_a"].shape[-1])
    lora.attach(model, LoraConfig(rank=rank, scale=_scale(folder), dropout=0.0), predicate=lambda path, _: path in paths)
    lora.load(model, arrays, file)
    model.eval()
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _scale(folder: Path) -> float:
    """By what adapters are multiplied: it stands beside them, in the adapter's configuration or in a checkpoint's state."""
    config = json_object(folder / "adapter_config.json")
    if config.get("fine_tune_type", "lora") != "lora":
        raise ModelError(f"{folder / 'adapter_config.json'}: fine_tune_type {config['fine_tune_type']!r}: only lora is read.")
    kept = (json_object(folder / "state.json").get("config") or {}).get("lora") or {}
    scale = (config.get("lora_parameters") or kept).get("scale")
    if not isinstance(scale, int | float) or scale <= 0:
        raise ModelError(f"{folder}: neither adapter_config.json nor state.json in it says the scale of these adapters.")
    return float(scale)
