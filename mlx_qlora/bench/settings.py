"""What a race is: its settings, its contestants, and what each of them is told."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_qlora.config import RunConfig, from_yaml
from mlx_qlora.errors import ConfigError, require

# name on the command line: the module that has to be installed
NEIGHBOURS = {"mlx-lm": "mlx_lm", "mlx-lm-lora": "mlx_lm_lora", "mlx-tune": "mlx_tune"}
FLAT = "flat"
OURS = "mlx-qlora"
GENERATED = ("shared", "mixed", "long")
SCALE = 20.0  # of the adapters, for everybody: mlx-lm's default and ours
# These are the same for all, or the race would compare different work.
_FIXED = {"model", "data", "output_dir", "overwrite", "seed", "epochs", "max_steps", "streaming", "data_cache"}


@dataclass(frozen=True)
class ModelShape:
    """A model that is generated, with random weights, 4-bit, in the shape of Mistral."""

    hidden: int = 512
    """Width of the generated model; a multiple of 64."""
    layers: int = 8
    """Its layers."""
    vocab: int = 32_000
    """Its vocabulary."""
    heads: int = 0
    """Attention heads; 0: one for each 128 of hidden (64 where hidden is below 1,024)."""
    kv_heads: int = 0
    """Heads for keys and values; 0: a quarter of heads."""
    intermediate: int = 0
    """Width inside the MLP; 0: 3.5 times hidden, as in Mistral."""

    def __post_init__(self) -> None:
        require(
            (self.hidden >= 64 and self.hidden % 64 == 0, "hidden", self.hidden, "a multiple of 64"),
            (self.layers >= 1, "layers", self.layers, "a whole number from 1"),
            (self.vocab >= 2048, "vocab", self.vocab, "a whole number from 2048, the size of the tokenizer that is used"),
            (self.heads >= 0 and self.hidden % self.number_of_heads == 0, "heads", self.heads, "a divisor of hidden"),
            (
                self.kv_heads >= 0 and self.number_of_heads % self.number_of_kv_heads == 0,
                "kv_heads",
                self.kv_heads,
                "a divisor of the number of heads",
            ),
            (
                self.intermediate >= 0 and self.intermediate % 64 == 0,
                "intermediate",
                self.intermediate,
                "a multiple of 64",
            ),
        )

    @property
    def number_of_heads(self) -> int:
        return max(self.heads, 0) or max(1, self.hidden // (128 if self.hidden >= 1024 else 64))

    @property
    def number_of_kv_heads(self) -> int:
        heads = self.number_of_heads
        return max(self.kv_heads, 0) or (heads // 4 if heads % 4 == 0 else 1)

    @property
    def width_inside(self) -> int:
        return self.intermediate or self.hidden * 7 // 2 // 64 * 64


@dataclass(frozen=True)
class RaceConfig:
    """One model, one data set, the same examples in the same updates for everybody."""

    shape: ModelShape = field(default_factory=ModelShape)
    model: str = ""  # a folder or name; empty: one is generated
    data: str = "shared"
    lora_layers: int | None = None
    rank: int = 8
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    max_seq_length: int = 2048
    updates: int = 4
    repeats: int = 3
    warmup: int = 1
    seed: int = 0
    same_kernels: bool = False
    against: tuple[str, ...] = ("mlx-lm",)
    ours: tuple[str, ...] = ()
    floor: bool = True

    def __post_init__(self) -> None:
        names = ("rank", "batch_size", "gradient_accumulation", "updates", "repeats", "warmup")
        require(
            *((getattr(self, name) >= 1, name, getattr(self, name), "a whole number from 1") for name in names),
            (self.seed >= 0, "seed", self.seed, "a whole number from 0"),
            (0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "a number above 0"),
            (self.max_seq_length >= 2, "max_seq_length", self.max_seq_length, "a whole number from 2"),
            (
                self.lora_layers is None or 1 <= self.lora_layers <= (sys.maxsize if self.model else self.shape.layers),
                "lora_layers",
                self.lora_layers,
                "a whole number from 1 up to the model's layers",
            ),
        )

    @property
    def examples_per_update(self) -> int:
        return self.batch_size * self.gradient_accumulation

    @property
    def all_updates(self) -> int:
        return self.warmup + self.repeats * self.updates


@dataclass(frozen=True)
class Spec:
    """What one contestant is told, in the first line it reads."""

    kind: str
    model: str
    data: str  # the folder with the rows; for mlx-lm and its kin, the rows in the order that gives the same updates
    work: str  # a folder of its own
    initial: str  # adapters to begin with
    layers: int | None
    rank: int
    scale: float
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    max_seq_length: int
    updates: int
    seed: int
    same_kernels: bool
    overrides: dict[str, str] = field(default_factory=dict)

    @property
    def examples_per_update(self) -> int:
        return self.batch_size * self.gradient_accumulation

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Contestant:
    """Somebody who races. `kind` is what its process runs, `label` what people read."""

    kind: str
    label: str
    overrides: dict[str, str] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.kind == OURS


def contestants(config: RaceConfig) -> list[Contestant]:
    """Ours first, then ours with other settings, then the others in the order in which they were named."""
    found = [Contestant(OURS, OURS)]
    found += [Contestant(OURS, f"{OURS} {each}", overrides(each, config)) for each in config.ours]
    more = ", our kernels" if config.same_kernels else ""
    found += [Contestant(name, name if name == FLAT else name + more) for name in config.against]
    return found


def installed(name: str) -> bool:
    return name == FLAT or importlib.util.find_spec(NEIGHBOURS[name]) is not None


def opponents(given: str | None) -> tuple[str, ...]:
    """The names of `--against`; without it, whoever is installed."""
    if given is None:
        return tuple(name for name in NEIGHBOURS if installed(name))
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    known = (*NEIGHBOURS, FLAT)
    for name in names:
        if name not in known:
            raise ConfigError(f"--against: {name!r} came, some of {', '.join(known)} are expected.")
        if not installed(name):
            raise ConfigError(f"--against: {name} is not installed here. Install it (pip install {name}), or leave it out.")
    return names


def overrides(text: str, config: RaceConfig) -> dict[str, str]:
    """`key=value,key=value` of `--ours`, checked against the settings of a run. Commas inside [] belong to a value."""
    values: dict[str, str] = {}
    for each in re.split(r",(?![^\[]*\])", text):
        key, equals, value = each.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ConfigError(f"--ours: {each!r} came, key=value is expected, such as gradient_accumulation=2.")
        values[key.strip()] = value.strip()
    if fixed := _FIXED & set(values):
        raise ConfigError(f"--ours: {', '.join(sorted(fixed))} can't be changed: that is the same for everybody in a race.")
    return values


def check_overrides(config: RaceConfig, folder: Path) -> None:
    """Raise for settings of `--ours` that no run would take. `folder` is for a file that settings are read from."""
    for text in config.ours:
        base = RunConfig(batch_size=config.batch_size, gradient_accumulation=config.gradient_accumulation)
        changed = with_overrides(base, overrides(text, config), folder / "ours.yaml", said=f"--ours {text}")
        if changed.batch_size * changed.gradient_accumulation != config.examples_per_update:
            raise ConfigError(
                f"--ours {text}: {changed.batch_size} x {changed.gradient_accumulation} examples an update came, "
                f"{config.examples_per_update} are expected, as for everybody."
            )


def with_overrides(base: RunConfig, values: dict[str, str], file: Path, said: str) -> RunConfig:
    """`base` with other values, read by the same rules as a file of settings, and through one."""
    if not values:
        return base
    file.write_text("".join(f"{key}: {value}\n" for key, value in values.items()), encoding="utf-8")
    try:
        return from_yaml(file, base)
    except ConfigError as error:
        raise ConfigError(re.sub(rf"{re.escape(str(file))}:\d+", said, str(error))) from error
