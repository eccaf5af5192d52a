"""QLoRA fine-tuning for MLX.

>>> import mlx_qlora
>>> mlx_qlora.EarlyStoppingMonitor(patience=1).update(2.0).update(3.0).should_stop
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_qlora.model.backend import preload_blas

preload_blas()  # before anything imports MLX

if TYPE_CHECKING:
    from mlx_qlora.config import RunConfig
    from mlx_qlora.data.chain import ChainConfig
    from mlx_qlora.engine.accumulate import GradientAccumulator
    from mlx_qlora.engine.stopping import EarlyStoppingConfig, EarlyStoppingMonitor
    from mlx_qlora.look.comparison.compare import compare
    from mlx_qlora.look.history import read_history
    from mlx_qlora.look.pictures.live import curves, live_curves
    from mlx_qlora.model.load import load
    from mlx_qlora.model.lora import LoraConfig, dropout_keys
    from mlx_qlora.model.lora import attach as attach_lora
    from mlx_qlora.model.trunk import supervised_logits
    from mlx_qlora.objectives.distill import DistillConfig
    from mlx_qlora.objectives.losses import next_token_cross_entropy
    from mlx_qlora.train import run as train

# name: where it lives, and as what. Imported when first asked for, so that `mlx-qlora --help` need not wait for MLX.
_PUBLIC = {
    "ChainConfig": ("mlx_qlora.data.chain", "ChainConfig"),
    "DistillConfig": ("mlx_qlora.objectives.distill", "DistillConfig"),
    "EarlyStoppingConfig": ("mlx_qlora.engine.stopping", "EarlyStoppingConfig"),
    "EarlyStoppingMonitor": ("mlx_qlora.engine.stopping", "EarlyStoppingMonitor"),
    "GradientAccumulator": ("mlx_qlora.engine.accumulate", "GradientAccumulator"),
    "LoraConfig": ("mlx_qlora.model.lora", "LoraConfig"),
    "RunConfig": ("mlx_qlora.config", "RunConfig"),
    "attach_lora": ("mlx_qlora.model.lora", "attach"),
    "compare": ("mlx_qlora.look.comparison.compare", "compare"),
    "curves": ("mlx_qlora.look.pictures.live", "curves"),
    "dropout_keys": ("mlx_qlora.model.lora", "dropout_keys"),
    "live_curves": ("mlx_qlora.look.pictures.live", "live_curves"),
    "load": ("mlx_qlora.model.load", "load"),
    "next_token_cross_entropy": ("mlx_qlora.objectives.losses", "next_token_cross_entropy"),
    "read_history": ("mlx_qlora.look.history", "read_history"),
    "supervised_logits": ("mlx_qlora.model.trunk", "supervised_logits"),
    "train": ("mlx_qlora.train", "run"),
}
__all__ = [
    "ChainConfig",
    "DistillConfig",
    "EarlyStoppingConfig",
    "EarlyStoppingMonitor",
    "GradientAccumulator",
    "LoraConfig",
    "RunConfig",
    "attach_lora",
    "compare",
    "curves",
    "dropout_keys",
    "live_curves",
    "load",
    "next_token_cross_entropy",
    "read_history",
    "supervised_logits",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mlx_qlora' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _PUBLIC[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value
