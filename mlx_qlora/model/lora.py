"""LoRA: y = linear(x) + scale * dropout(x) @ lora_a @ lora_b, attached to a model and taken off again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.errors import ModelError, listed, require
from mlx_qlora.model.adapters import Adapter, MergedEmbedding, adapter_for, is_embedding, is_linear, merged, shape_of
from mlx_qlora.model.adapters import LoRALinear as LoRALinear
from mlx_qlora.model.adapters import MergedLinear as MergedLinear
from mlx_qlora.model.adapters import dense_weight as dense_weight
from mlx_qlora.model.dropout import dropout_keys as dropout_keys
from mlx_qlora.records import Delivered

Predicate = Callable[[str, nn.Module], bool]

_ROUTERS = {"gate", "router"}  # they choose experts; adapting them is another method
_ATTENTION = ("attn", "attention")


@dataclass(frozen=True)
class LoraConfig:
    """The adapters."""

    rank: int = 8
    """Rank of the two matrices."""
    scale: float = 20.0
    """What their product is multiplied with, as in mlx-lm (elsewhere: alpha / rank)."""
    dropout: float = 0.0
    """Share of the adapters' inputs that is dropped in training."""
    layers: int | None = None
    """Adapt only the last so many layers."""
    targets: tuple[str, ...] = ("all-linear",)
    """What to adapt: attention, mlp, all-linear, embeddings (with the head), or names of modules such as q_proj, lm_head or
    self_attn.q_proj."""

    def __post_init__(self) -> None:
        require(
            (self.rank >= 1, "lora.rank", self.rank, "a whole number from 1"),
            (math.isfinite(self.scale) and self.scale > 0, "lora.scale", self.scale, "a number above 0"),
            (0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number from 0 up to, not including, 1"),
            (self.layers is None or self.layers >= 1, "lora.layers", self.layers, "a whole number from 1, or nothing for all"),
            (len(self.targets) > 0, "lora.targets", self.targets, "attention, mlp, all-linear or names of modules"),
        )


@dataclass(frozen=True)
class Attached:
    """What `attach` did: adapters are what is trained (`model.trained`)."""

    config: LoraConfig
    paths: tuple[str, ...]
    trainable: int
    total: int
    total_layers: int
    embeddings: int = 0  # of the paths

    name: ClassVar[str] = "adapters"
    file: ClassVar[str] = "adapters/adapters.safetensors"
    computes_in: ClassVar[mx.Dtype | None] = None
    begins_with: ClassVar[tuple[str, ...]] = ("adapters",)

    @property
    def describe(self) -> tuple[str, ...]:
        config, share = self.config, self.trainable / self.total
        return (
            f"rank {config.rank}, scale {config.scale:g}, dropout {config.dropout:g}, on {self._layers}",
            f"{', '.join(config.targets)}{f', last {config.layers} layers' if config.layers else ''}: "
            f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2%})",
        )

    @property
    def _layers(self) -> str:
        linear = len(self.paths) - self.embeddings
        said = [f"{linear} linear layer{'' if linear == 1 else 's'}"] if linear else []
        return " and ".join([*said, *(["the embedding"] if self.embeddings else [])])

    def load(self, model: nn.Module, arrays: Mapping[str, mx.array], where: object) -> None:
        load(model, arrays, where)

    def base(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        return without_adapters(model)

    def delivered(self, arrays: Mapping[str, mx.array]) -> Delivered:
        config = json.dumps(self.adapter_config, indent=2, ensure_ascii=False) + "\n"
        return Delivered(self.file, arrays, {"adapter_config.json": config.encode()})

    @property
    def adapter_config(self) -> dict[str, Any]:
        """`adapter_config.json` as mlx-lm reads it.

        mlx-lm adapts the modules named by `keys` in the last `num_layers` layers, and modules outside of the layers
        by their whole path; one that we left out gets an adapter of zeros there, which changes nothing.
        """
        inside = [path.split(".layers.", 1)[1].split(".", 1) for path in self.paths if ".layers." in path]
        keys = {name for _, name in inside} | {path for path in self.paths if ".layers." not in path}
        first = min((int(number) for number, _ in inside), default=self.total_layers)
        config = self.config
        parameters = {"rank": config.rank, "scale": config.scale, "dropout": config.dropout, "keys": sorted(keys)}
        return {"fine_tune_type": "lora", "num_layers": self.total_layers - first, "lora_parameters": parameters}


def attach(model: nn.Module, config: LoraConfig, *, seed: int = 0, predicate: Predicate | None = None) -> Attached:
    """Freeze the model and put adapters on the linear layers and embeddings that `config.targets`, or a predicate, names.

    A predicate takes (path, module), for instance `lambda path, _: path.endswith("v_proj")`, and goes before
    `config.targets`; `config.layers` holds for both.
    """
    linears = {path: module for path, module in model.named_modules() if is_linear(module) or is_embedding(module)}
    if any(isinstance(module, Adapter) for _, module in model.named_modules()):
        raise ModelError("This model has adapters already; take them off with detach(model) before attaching new ones.")
    layers = _layer_count(model)
    if config.layers is not None and config.layers > layers:
        raise ModelError(f"lora.layers: {config.layers} came, but this model has {layers} layers. Name {layers} or fewer.")
    wanted = predicate or targets_predicate(config.targets, vocabulary_paths(model))
    first = layers - (config.layers or layers)
    chosen = [path for path, module in linears.items() if _layer_of(path) >= first and wanted(path, module)]
    if predicate is None:
        _check_targets(config.targets, linears, vocabulary_paths(model))
    if not chosen:
        raise ModelError(f"No linear layer was chosen for adapters. This model's are named {_names(linears)}.")
    model.freeze()
    keys = mx.random.split(mx.random.key(seed), len(chosen))
    adapters = [
        (path, adapter_for(linears[path], config.rank, config.scale, config.dropout, key))
        for path, key in zip(chosen, keys, strict=True)
    ]
    model.update_modules(tree_unflatten(adapters))
    model.train(model.training)  # the new layers too
    mx.eval(model.trainable_parameters())
    trainable = sum(array.size for array in adapter_arrays(model).values())
    embeddings = sum(is_embedding(linears[path]) for path in chosen)
    return Attached(config, tuple(chosen), trainable, trainable + base_parameters(model), layers, embeddings)


def targets_predicate(targets: Sequence[str], of_vocabulary: Container[str] = ()) -> Predicate:
    """The predicate for presets (`attention`, `mlp`, `all-linear`, `embeddings`) and names of modules. `of_vocabulary`: the
    paths that `embeddings` means."""

    def wanted(path: str, _: nn.Module) -> bool:
        return any(_matches(path, target, of_vocabulary) for target in targets)

    return wanted


def vocabulary_paths(model: nn.Module) -> tuple[str, ...]:
    """Where the embedding and the head of a model are; linear layers outside of all others are heads where they have a row
    for each token. With adapters on, these are at the same paths."""
    modules = model.named_modules()
    embeddings = {path: module for path, module in modules if is_embedding(module) and _layer_of(path) == _OUTSIDE}
    rows = {shape_of(module)[0] for module in embeddings.values()}
    heads = [
        path for path, module in modules if is_linear(module) and _layer_of(path) == _OUTSIDE and shape_of(module)[0] in rows
    ]
    return tuple(path.removesuffix(".embedding").removesuffix(".linear") for path in (*embeddings, *heads))


def _matches(path: str, target: str, of_vocabulary: Container[str] = ()) -> bool:
    parts = path.split(".")
    in_block = _layer_of(path) != _OUTSIDE and parts[-1] not in _ROUTERS
    in_attention = any(word in part.lower() for part in parts[:-1] for word in _ATTENTION)
    if target == "all-linear":
        return in_block
    if target == "attention":
        return in_block and in_attention
    if target == "mlp":
        return in_block and not in_attention
    if target == "embeddings":
        return path in of_vocabulary
    return path == target or path.endswith("." + target)


def _check_targets(targets: Sequence[str], layers: dict[str, nn.Module], of_vocabulary: Sequence[str]) -> None:
    for target in targets:
        if any(_matches(path, target, of_vocabulary) for path in layers):
            continue
        if target.split(".")[-1] == "lm_head" and of_vocabulary:
            name = of_vocabulary[0].split(".")[-1]
            raise ModelError(
                f"lora.targets: {target!r}: this model has no head of its own, its embedding is the head. "
                f"Name {name}, which adapts both."
            )
        raise ModelError(
            f"lora.targets: {target!r} names no linear layer of this model. "
            f"Name attention, mlp, all-linear, embeddings, or some of {_names(layers)}."
        )


_OUTSIDE = 1_000_000  # the "layer" of what stands in none, so that "the last N" never leaves out a head that was named


def _layer_of(path: str) -> int:
    if ".layers." not in "." + path:
        return _OUTSIDE
    return int(("." + path).split(".layers.", 1)[1].split(".", 1)[0])


def _layer_count(model: nn.Module) -> int:
    numbers = [_layer_of(path) for path, _ in model.named_modules()]
    return 1 + max((number for number in numbers if number != _OUTSIDE), default=-1)


def _names(linears: dict[str, nn.Module]) -> str:
    return ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linears})) or "(none)"


def base_parameters(model: nn.Module) -> int:
    """How many parameters the model has without adapters, quantised ones counted by what they stand for."""
    total = 0
    for _, module in model.named_modules():
        sizes = {name: array.size for name, array in module.items() if isinstance(array, mx.array)}
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            total += sizes["weight"] * 32 // int(module.bits) + sizes.get("bias", 0)
        elif not isinstance(module, Adapter):
            total += sum(sizes.values())
    return total


def adapted(model: nn.Module) -> list[tuple[str, Adapter]]:
    """The adapters of a model with their paths, in the model's order."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Adapter)]


def detach(model: nn.Module) -> list[tuple[str, Adapter]]:
    """Take the adapters off, so that the model is the base again; `reattach` puts what this gives back on."""
    adapters = adapted(model)
    model.update_modules(tree_unflatten([(path, adapter.inner) for path, adapter in adapters]))
    return adapters


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, while inside."""
    adapters = detach(model)
    try:
        yield model
    finally:
        reattach(model, adapters)


def reattach(model: nn.Module, adapters: list[tuple[str, Adapter]]) -> None:
    model.update_modules(tree_unflatten(adapters))


def merge(model: nn.Module) -> int:
    """Fold every adapter into a dense weight of its own (quantised layers become dense); says how many."""
    adapters = adapted(model)
    model.update_modules(tree_unflatten([(path, merged(adapter)) for path, adapter in adapters]))
    return len(adapters)


def unmerge(model: nn.Module) -> int:
    """Undo `merge`, exactly: the same layers and adapters as before."""
    folded = [
        (path, module.lora) for path, module in model.named_modules() if isinstance(module, MergedLinear | MergedEmbedding)
    ]
    model.update_modules(tree_unflatten(folded))
    return len(folded)


def adapter_arrays(model: nn.Module) -> dict[str, mx.array]:
    """The trained arrays by name, as they go into `adapters.safetensors`."""
    arrays: dict[str, mx.array] = tree_flatten(model.trainable_parameters(), destination={})  # type: ignore[assignment]
    return arrays


def load(model: nn.Module, arrays: Mapping[str, mx.array], where: object) -> None:
    """Put trained arrays into the adapters of a model, all of them or none. `where` is the file, for the message."""
    own = {f"{path}.{name}": lora[name] for path, lora in adapted(model) for name in ("lora_a", "lora_b")}
    problems = [f"{name}: it is missing" for name in own if name not in arrays]
    for name, array in arrays.items():
        if name not in own:
            problems.append(f"{name}: this model has no such adapter")
        elif array.shape != own[name].shape:
            problems.append(f"{name}: {_by(array)} came, {_by(own[name])} is expected")
        elif not mx.issubdtype(array.dtype, mx.floating):
            problems.append(f"{name}: {str(array.dtype).removeprefix('mlx.core.')} came, floating-point numbers are expected")
    if problems:
        raise ModelError(
            f"{where}: these adapters are not of this model with these lora settings; {len(problems)} of "
            f"{len(own.keys() | arrays.keys())} arrays are wrong:\n{listed(problems)}"
        )
    finite_or_refuse(arrays, where)
    model.update(tree_unflatten(list(arrays.items())))
    mx.eval(model.trainable_parameters())


def finite_or_refuse(arrays: Mapping[str, mx.array], where: object) -> None:
    """Raise if a number in these arrays is NaN or infinite: whatever is computed with it is NaN, too, for ever."""
    floating = {name: array for name, array in arrays.items() if mx.issubdtype(array.dtype, mx.inexact)}
    counts = {name: mx.sum(~mx.isfinite(array)) for name, array in floating.items()}
    mx.eval(counts)
    wrong = [f"{name}: {count.item():,} of {arrays[name].size:,} numbers" for name, count in counts.items() if count.item()]
    if wrong:
        raise ModelError(
            f"{where}: numbers that are NaN or infinite are in {len(wrong)} of {len(arrays)} arrays, and nothing good can "
            f"come of them; take an earlier checkpoint or other adapters:\n{listed(wrong)}"
        )


def _by(array: mx.array) -> str:
    return " x ".join(map(str, array.shape)) or "a single number"
