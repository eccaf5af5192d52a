"""LoRA: y = linear(x) + scale * dropout(x) @ lora_a @ lora_b, attached to a model and taken off again.

Names and shapes of the arrays are mlx-lm's, so that its tools load the adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.errors import ModelError, listed, require
from mlx_qlora.model import backend

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
    """What to adapt: attention, mlp, all-linear, or names of modules such as q_proj or self_attn.q_proj."""

    def __post_init__(self) -> None:
        require(
            (self.rank >= 1, "lora.rank", self.rank, "a whole number from 1"),
            (math.isfinite(self.scale) and self.scale > 0, "lora.scale", self.scale, "a number above 0"),
            (0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number from 0 up to, not including, 1"),
            (self.layers is None or self.layers >= 1, "lora.layers", self.layers, "a whole number from 1, or nothing for all"),
            (len(self.targets) > 0, "lora.targets", self.targets, "attention, mlp, all-linear or names of modules"),
        )


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter beside it. Keeps the layer that it stands in for as `linear`."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__()
        outputs, inputs = _shape(linear)
        bound = 1 / math.sqrt(inputs)
        self.linear = linear
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))
        self.scale = scale
        self.dropout = dropout
        self._dropout_key: mx.array | None = None
        self._marks: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        # The scale goes to the narrow side: [..., rank] numbers instead of [..., outputs].
        z = (self.scale * (self._dropped(x) @ self.lora_a)) @ self.lora_b
        y: mx.array = self.linear(x)
        return y + z.astype(y.dtype)

    def _dropped(self, x: mx.array) -> mx.array:
        if not self.training or self.dropout == 0:
            return x
        if self._dropout_key is None:
            raise RuntimeError(
                "This model has LoRA dropout and is in training mode, but no dropout key was given. "
                "Run it inside `with lora.dropout_keys(model, mx.random.key(seed)):`, or call model.eval() first."
            )
        keep = kept(self._dropout_key, self._marks, x.shape, self.dropout)
        return mx.where(keep, x * (1 / (1 - self.dropout)), 0).astype(x.dtype)

    def set_dropout_key(self, key: mx.array | None) -> None:
        # Past nn.Module, which would take an array for a parameter.
        object.__setattr__(self, "_dropout_key", key)

    def set_marks(self, marks: mx.array | None) -> None:
        """A number for each position of the next inputs; positions with the same number drop the same places."""
        object.__setattr__(self, "_marks", marks)

    def delta(self) -> mx.array:
        """What the adapter adds to the weight, [outputs, inputs], in float32."""
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        return self.scale * (a @ b).T


def kept(key: mx.array, marks: mx.array | None, shape: Sequence[int], dropout: float) -> mx.array:
    """Which of the inputs [..., D] dropout keeps: a hash of the key, the mark of the position and the place in D.

    Marks that follow from the tokens make it the same in every layout, for a token that many rows share too. Without
    marks the positions are counted. 776 x 192 on the CPU: 0.4 ms; `mx.random.bernoulli` takes 0.8.
    """
    *_, width = shape
    positions = math.prod(shape) // width
    if marks is None or marks.size != positions:
        marks = mx.arange(positions)
    low, high = marks.astype(mx.uint32), (marks.astype(mx.uint64) >> 32).astype(mx.uint32)
    first, second = key.astype(mx.uint32)
    rows = _mixed(_mixed(_mixed(low ^ first) ^ high) ^ second)
    # The columns are mixed too, so that two rows never draw the same numbers shifted.
    drawn = _mixed(rows[:, None] ^ _mixed(mx.arange(width, dtype=mx.uint32) + second)[None])
    return (drawn >= mx.array(min(round(dropout * 2**32), 2**32 - 1), mx.uint32)).reshape(shape)


def _mixed(x: mx.array) -> mx.array:
    """A bijection of 32-bit numbers that leaves nothing of their order (lowbias32 of Chris Wellons)."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


class MergedLinear(nn.Linear):
    """A linear layer whose weight holds the adapter too; remembers the `LoRALinear` that it was."""

    def __init__(self, lora: LoRALinear):
        nn.Module.__init__(self)
        linear: Any = lora.linear
        weight = dense_weight(linear)
        self.weight = (weight.astype(mx.float32) + lora.delta()).astype(weight.dtype)
        if "bias" in linear:
            self.bias = linear.bias
        object.__setattr__(self, "_lora", lora)
        self.freeze()

    @property
    def lora(self) -> LoRALinear:
        return self._lora  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Attached:
    """What `attach` did."""

    config: LoraConfig
    paths: tuple[str, ...]
    trainable: int
    total: int
    total_layers: int

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
    """Freeze the model and put adapters on the linear layers that `config.targets`, or a predicate, names.

    A predicate takes (path, module), for instance `lambda path, _: path.endswith("v_proj")`, and goes before
    `config.targets`; `config.layers` holds for both.
    """
    linears = {path: module for path, module in model.named_modules() if _is_linear(module)}
    if any(isinstance(module, LoRALinear) for _, module in model.named_modules()):
        raise ModelError("This model has adapters already; take them off with detach(model) before attaching new ones.")
    layers = _layer_count(model)
    if config.layers is not None and config.layers > layers:
        raise ModelError(f"lora.layers: {config.layers} came, but this model has {layers} layers. Name {layers} or fewer.")
    wanted = predicate or targets_predicate(config.targets)
    first = layers - (config.layers or layers)
    chosen = [path for path, module in linears.items() if _layer_of(path) >= first and wanted(path, module)]
    if predicate is None:
        _check_targets(config.targets, linears)
    if not chosen:
        raise ModelError(f"No linear layer was chosen for adapters. This model's are named {_names(linears)}.")
    model.freeze()
    keys = mx.random.split(mx.random.key(seed), len(chosen))
    adapters = [
        (path, LoRALinear(linears[path], config.rank, config.scale, config.dropout, key))
        for path, key in zip(chosen, keys, strict=True)
    ]
    model.update_modules(tree_unflatten(adapters))
    model.train(model.training)  # the new layers too
    mx.eval(model.trainable_parameters())
    trainable = sum(array.size for array in adapter_arrays(model).values())
    return Attached(config, tuple(chosen), trainable, trainable + base_parameters(model), layers)


def targets_predicate(targets: Sequence[str]) -> Predicate:
    """The predicate for presets (`attention`, `mlp`, `all-linear`) and names of modules."""

    def wanted(path: str, _: nn.Module) -> bool:
        return any(_matches(path, target) for target in targets)

    return wanted


def _matches(path: str, target: str) -> bool:
    parts = path.split(".")
    in_block = _layer_of(path) != _OUTSIDE and parts[-1] not in _ROUTERS
    in_attention = any(word in part.lower() for part in parts[:-1] for word in _ATTENTION)
    if target == "all-linear":
        return in_block
    if target == "attention":
        return in_block and in_attention
    if target == "mlp":
        return in_block and not in_attention
    return path == target or path.endswith("." + target)


def _check_targets(targets: Sequence[str], linears: dict[str, nn.Module]) -> None:
    for target in targets:
        if not any(_matches(path, target) for path in linears):
            raise ModelError(
                f"lora.targets: {target!r} names no linear layer of this model. "
                f"Name attention, mlp, all-linear, or some of {_names(linears)}."
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


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.QuantizedLinear)) and not isinstance(module, MergedLinear)


def _shape(linear: Any) -> tuple[int, int]:
    outputs, inputs = linear.weight.shape
    return outputs, inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs


def dense_weight(linear: Any) -> mx.array:
    """The weight of a linear layer, dequantised where it is quantised."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight  # type: ignore[no-any-return]
    # The floating-point modes have scales of 8 bits, which say nothing about the dtype of the model.
    scales = linear.scales
    dtype = scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else backend.compute_dtype(mx.bfloat16)
    kind = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    return mx.dequantize(linear.weight, scales, linear.get("biases"), **kind, dtype=dtype)


def base_parameters(model: nn.Module) -> int:
    """How many parameters the model has without adapters, quantised ones counted by what they stand for."""
    total = 0
    for _, module in model.named_modules():
        sizes = {name: array.size for name, array in module.items() if isinstance(array, mx.array)}
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            total += sizes["weight"] * 32 // int(module.bits) + sizes.get("bias", 0)
        elif not isinstance(module, LoRALinear):
            total += sum(sizes.values())
    return total


def adapted(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """The adapters of a model with their paths, in the model's order."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear)]


@contextmanager
def dropout_keys(model: nn.Module, key: mx.array) -> Iterator[None]:
    """Inside, each adapter drops by a mask that follows from `key` alone.

    So a forward that runs again (gradient checkpointing) drops the same places, and the gradient is right.
    """
    layers = [layer for _, layer in adapted(model)]
    keys = mx.random.split(key, max(1, len(layers)))
    for layer, own in zip(layers, keys, strict=False):
        layer.set_dropout_key(own)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_dropout_key(None)
            layer.set_marks(None)


def detach(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """Take the adapters off, so that the model is the base again; `reattach` puts what this gives back on."""
    adapters = adapted(model)
    model.update_modules(tree_unflatten([(path, lora.linear) for path, lora in adapters]))
    return adapters


def reattach(model: nn.Module, adapters: list[tuple[str, LoRALinear]]) -> None:
    model.update_modules(tree_unflatten(adapters))


def merge(model: nn.Module) -> int:
    """Fold every adapter into a dense weight of its own (quantised layers become dense); says how many."""
    adapters = adapted(model)
    model.update_modules(tree_unflatten([(path, MergedLinear(lora)) for path, lora in adapters]))
    return len(adapters)


def unmerge(model: nn.Module) -> int:
    """Undo `merge`, exactly: the same layers and adapters as before."""
    merged = [(path, module.lora) for path, module in model.named_modules() if isinstance(module, MergedLinear)]
    model.update_modules(tree_unflatten(merged))
    return len(merged)


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
