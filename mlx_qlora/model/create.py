"""Models from nothing: presets by size, or a config.json; and the folder that a model is saved as."""

from __future__ import annotations

import math
import os
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.errors import ConfigError, ModelError, require
from mlx_qlora.model import backend, full, lstm, trust
from mlx_qlora.model.load import Loaded, classes_of

# About how many parameters each has.
PRESETS = {"tiny": 2_000_000, "20m": 20_000_000, "110m": 110_000_000, "400m": 400_000_000}


@dataclass(frozen=True)
class CreateConfig:
    """A model that is made from nothing instead of loaded."""

    preset: str = ""
    """Instead of model, a new one: tiny (2 M parameters), 20m, 110m, 400m, or a config.json of your own."""
    architecture: Literal["mistral", "lstm"] = "mistral"
    """What a preset makes: a transformer in Mistral's shape, or an LSTM of about as many parameters."""
    tokenizer: str = ""
    """With preset: a model or folder whose tokenizer is taken; without it one is trained on the training data."""
    vocab_size: int | None = None
    """With preset: tokens of the tokenizer that is trained; without a number as the preset says."""

    def __post_init__(self) -> None:
        size = self.vocab_size
        require(
            (size is None or size >= 259, "vocab_size", size, "a whole number from 259: bytes, unknown, begin and end"),
            (not (size and self.tokenizer), "vocab_size", size, "no number where a tokenizer is named"),
        )


@dataclass(frozen=True)
class _Shape:
    """What a size means. Widths are multiples of 64 where weights are multiplied, so that all of it can be quantised."""

    vocabulary: int
    tied: bool  # the embedding is the head, too: with few parameters it would be most of them
    layers: int
    width: int
    inner: int  # of the MLP
    heads: int  # of 64 columns
    kv_heads: int
    lstm: tuple[int, int]  # layers, width


# Parameters with the vocabulary that stands here:         Mistral       LSTM
_SHAPES = {
    "tiny": _Shape(2048, True, 4, 192, 512, 3, 1, (2, 288)),  #   1,967,808     1,919,232
    "20m": _Shape(8192, True, 10, 384, 1152, 6, 2, (2, 896)),  #  20,356,992    20,192,256
    "110m": _Shape(32_000, True, 12, 768, 2304, 12, 4, (3, 1536)),  # 107,170,560 105,793,536
    "400m": _Shape(32_000, False, 24, 1024, 3584, 16, 4, (4, 2624)),  # 392,741,888 388,310,016
}
_CONTEXT = 2048  # positions that a preset says it has, where nothing longer is wanted; it costs no parameter
_STD = 0.02
# Linear layers whose output is added to what every layer sees.
_INTO_STREAM = ("o_proj", "down_proj", "out_proj", "c_proj", "wo", "w2", "fc2", "fc_out", "dense_4h_to_h")


def create(config: CreateConfig, tokenizer: Any, seed: int, positions: int = 0) -> Loaded:
    """A new model in float32, all of it to be trained, for a tokenizer and rows of so many positions. Without a tokenizer, to
    plan one, it has the vocabulary that is wanted.

    Matrices are normal with a deviation of 0.02 (an LSTM's embedding: 0.5), those that write into the residual stream less
    by the root of their number (GPT-2); biases 0; all else, such as norms, as its class begins. The same seed gives the
    same bytes. Nothing is computed yet. MLX's global random numbers begin anew at the seed.
    """
    values = configuration(config, tokenizer, positions)
    mx.random.seed(seed)
    try:
        kind, arguments = classes_of(values)
        if lacking := [each.name for each in fields(arguments) if _needed(each) and each.name not in values]:
            raise ModelError(f"{config.preset}: it lacks {', '.join(lacking)}, and {values['model_type']} needs them.")
        model: nn.Module = kind(arguments.from_dict(values))
    except ModelError:
        raise
    except Exception as error:  # whatever a model's code makes of values that it can't use
        raise ModelError(f"{config.preset}: no model can be made of this: {type(error).__name__}: {error}") from error
    model.set_dtype(mx.float32)
    deviation = _deviation(values, config.preset)
    _begin(model, seed, deviation, lstm.EMBEDDING_STD if values["model_type"] == lstm.MODEL_TYPE else deviation)
    model.unfreeze()
    model.eval()
    backend.reuse_memory()
    return Loaded(model, tokenizer, values, config.preset)


def _needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def parameters(model: nn.Module) -> int:
    """How many numbers a model has; tied ones count once."""
    return sum(array.size for _, array in _arrays(model))


def describe(loaded: Loaded) -> str:
    """
    such as: new (mistral, 1,967,808 parameters, float32)
    """
    kind = "lstm" if loaded.config["model_type"] == lstm.MODEL_TYPE else loaded.config["model_type"]
    return f"new ({kind}, {parameters(loaded.model):,} parameters, float32)"


def wanted_vocabulary(config: CreateConfig) -> int:
    """How many tokens a tokenizer should have that is trained for a model."""
    return config.vocab_size or _vocabulary(_values(config))


def configuration(config: CreateConfig, tokenizer: Any, positions: int = 0) -> dict[str, Any]:
    """config.json of a new model: with the tokenizer's vocabulary and ends, and at least so many positions."""
    values = _values(config)
    inner = values.get("text_config", values)  # models that see and read keep the reading part's values here
    needed = wanted_vocabulary(config) if tokenizer is None else vocabulary_of(tokenizer)
    # A preset fits the tokenizer; a file may want more rows than there are tokens.
    inner["vocab_size"] = needed if config.preset in PRESETS else max(needed, _vocabulary(values))
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        if name in inner:
            inner[name] = max(inner[name], positions)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values[name] = getattr(tokenizer, name, None)
    return values | {"torch_dtype": "float32"}


def vocabulary_of(tokenizer: Any) -> int:
    """How many rows an embedding needs for a tokenizer: its greatest id and one."""
    return int(max(tokenizer.get_vocab().values())) + 1


def save_model(folder: Path, loaded: Loaded) -> None:
    """Write a folder that mlx-lm loads and `mlx_lm.convert` quantises; each file is whole or not there, and config.json,
    without which it is no model, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = dict(_arrays(loaded.model))
    _replace(folder / "model.safetensors", lambda path: mx.save_safetensors(str(path), arrays, {"format": "mlx"}))
    files = full.model_files(loaded)
    for name in sorted(files, key=lambda name: name == "config.json"):
        _replace(folder / name, lambda path, content=files[name]: path.write_bytes(content))


def _replace(path: Path, write: Any) -> None:
    coming = path.with_name(f".coming.{path.name}")
    try:
        write(coming)
        with coming.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(coming, path)
    finally:
        coming.unlink(missing_ok=True)


def _arrays(model: nn.Module) -> list[tuple[str, mx.array]]:
    flat: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return flat


def _deviation(values: dict[str, Any], name: str) -> float:
    """Of the first weights, as config.json wants it."""
    found = values.get("text_config", values).get("initializer_range", _STD)
    if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < math.inf:
        raise ModelError(f"{name}: initializer_range: {found!r} came, a number above 0 is expected, such as {_STD}.")
    return float(found)


def _begin(model: Any, seed: int, deviation: float, of_tokens: float) -> None:
    """Give a model its first weights; `of_tokens`: the deviation of its embedding."""
    into_stream = deviation / math.sqrt(2 * max(1, len(model.layers)))
    found = [
        (f"{path}.{name}", array, of_tokens if isinstance(module, nn.Embedding) else deviation)
        for path, module in sorted(model.named_modules())
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "SwitchLinear"
        for name, array in sorted(module.items())
        if isinstance(array, mx.array)
    ]
    begun: list[tuple[str, mx.array]] = []
    for (name, array, usual), key in zip(found, mx.random.split(mx.random.key(seed), max(1, len(found))), strict=True):
        *_, module, kind = name.split(".")
        own = into_stream if module in _INTO_STREAM else usual
        begins = mx.zeros(array.shape) if kind == "bias" else mx.random.normal(array.shape, scale=own, key=key)
        begun.append((name, begins))
    model.update(tree_unflatten(begun))


def _values(config: CreateConfig) -> dict[str, Any]:
    """config.json of a preset, before it knows its tokenizer."""
    if config.preset not in _SHAPES:
        return _from_file(config.preset)
    shape = _SHAPES[config.preset]
    common = {
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": _CONTEXT,
        "tie_word_embeddings": shape.tied,
    }
    if config.architecture == "lstm":
        layers, width = shape.lstm
        return common | {"model_type": lstm.MODEL_TYPE, "hidden_size": width, "num_hidden_layers": layers}
    return common | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "initializer_range": _STD,
    }


def _from_file(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"preset: {name!r} came, {', '.join(PRESETS)} or the path of a config.json is expected.")
    values = trust.read_json(path)
    trust.check(path.parent)
    if not isinstance(values.get("model_type"), str):
        raise ModelError(f"{path}: not the configuration of a model: it has no model_type.")
    if not _vocabulary(values):
        raise ModelError(f"{path}: vocab_size: a whole number from 259 is expected; nothing came.")
    for name in ("quantization", "quantization_config"):  # a new model is not quantised
        values.pop(name, None)
    return values


def _vocabulary(values: dict[str, Any]) -> int:
    size = values.get("vocab_size", values.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else 0
