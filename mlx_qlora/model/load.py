"""Load a model and its tokenizer by way of mlx-lm, frozen and ready to compute here."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_qlora.assets import packaged
from mlx_qlora.errors import ModelError
from mlx_qlora.model import backend, frozen, lstm, matmul, trust


@dataclass(frozen=True)
class Loaded:
    """A frozen model in evaluation mode, its tokenizer, and what they are. Unpacks as (model, tokenizer), like mlx-lm's."""

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    name: str
    matmul: dict[str, int] = field(default_factory=dict)  # by shape: from how many rows on weights are dequantised
    stored: mx.Dtype = mx.float32  # of its floating-point numbers, before they were made ready to compute here

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.tokenizer

    @property
    def describe(self) -> str:
        bits = self.config.get("quantization", {}).get("bits")
        kind = self.config.get("model_type", "?")
        return f"{self.name} ({kind}, {f'{bits}-bit' if bits else 'not quantised'})"


def load(name: str, matmul: str = "auto", measured: Mapping[str, int] | None = None) -> Loaded:
    """Load a folder, a model of the hub, or `embedded` or `embedded-teacher`, the tiny 4-bit Mistrals of this package.

    `matmul`: how its quantised weights are multiplied; see `MatmulConfig`. `measured`: what an earlier `Loaded.matmul`
    said, so that a run that goes on computes as before.
    """
    from mlx_lm.utils import load_model

    folder = packaged(name) or _folder(name)
    try:
        model, config = load_model(folder, lazy=True, get_model_classes=classes_of, **trust.without_code(load_model))
        tokenizer = _tokenizer_in(folder, config)
        stored = _stored(model)
        chosen = _prepare(model, matmul, measured or {})
    except Exception as error:  # whatever a broken folder makes mlx-lm, transformers or MLX raise
        raise ModelError(f"{name}: this model can't be loaded: {_one_line(error)}") from error
    return Loaded(model, tokenizer, config, name, chosen, stored)


def as_stored(name: str) -> Loaded:
    """A model with every number as its files hold it, read when it is asked for: for whoever writes it down again."""
    from mlx_lm.utils import load_model

    folder = packaged(name) or _folder(name)
    try:
        model, config = load_model(folder, lazy=True, get_model_classes=classes_of, **trust.without_code(load_model))
        return Loaded(model, _tokenizer_in(folder, config), config, name, stored=_stored(model))
    except Exception as error:  # whatever a broken folder makes mlx-lm, transformers or MLX raise
        raise ModelError(f"{name}: this model can't be loaded: {_one_line(error)}") from error


def fingerprint(model: nn.Module) -> str:
    """What tells a model without adapters from another one: the shape, dtype and first numbers of each of its arrays."""
    told = hashlib.blake2b(type(model).__module__.encode(), digest_size=8)
    arrays: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    for path, array in arrays.items():
        first = np.array(array.reshape(-1)[:_TELLING].view(mx.uint8))
        told.update(f"{path} {array.shape} {array.dtype}".encode() + first.tobytes())
    return told.hexdigest()


_TELLING = 16_384  # numbers of an array; another fine-tuning of the same model differs in nearly all of them


def outline(name: str) -> Loaded:
    """A model of which no weight is read: shapes and dtypes only, without a tokenizer.

    A folder needs no more than config.json; of a model of the hub only that is fetched. Where the files with weights
    are missing, layers are quantised as config.json says.
    """
    from mlx_lm.utils import load_config, load_model

    folder = packaged(name) or _there(name) or _small_of_hub(name)
    _refuse_adapters(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json in this folder. Name a folder that mlx-lm can load.")
    trust.check(folder)
    try:
        config = load_config(folder)
        complete = bool(list(folder.glob("model*.safetensors"))) and not trust.missing_weights(folder)
        if complete:
            model, config = load_model(
                folder, lazy=True, strict=False, get_model_classes=classes_of, **trust.without_code(load_model)
            )
        else:
            model = of_config(config)
        _adapt(model)
        frozen.install(model)
    except Exception as error:  # whatever a broken folder makes mlx-lm or MLX raise
        raise ModelError(f"{name}: this model can't be outlined: {_one_line(error)}") from error
    return Loaded(model, None, config, name)


def classes_of(config: dict[str, Any]) -> tuple[Any, Any]:
    """(Model, ModelArgs) for a config.json: mlx-lm's, or those of the LSTM here."""
    from mlx_lm.utils import _get_classes

    if config["model_type"] == lstm.MODEL_TYPE:
        return lstm.Model, lstm.ModelArgs
    kinds: tuple[Any, Any] = _get_classes(config)
    return kinds


def of_config(config: dict[str, Any]) -> nn.Module:
    """A model as its config.json says, of arrays that nobody has computed."""
    kind, arguments = classes_of(config)
    model: nn.Module = kind(arguments.from_dict(config))
    stored = mx.float32 if "float32" in str(config.get("torch_dtype", config.get("dtype"))) else mx.bfloat16
    model.set_dtype(stored)
    if how := config.get("quantization"):
        own = {key: how[key] for key in ("group_size", "bits", "mode") if key in how}
        nn.quantize(model, **own, class_predicate=lambda path, module: _quantisable(how, path, module))
    return model


def _quantisable(how: dict[str, Any], path: str, module: nn.Module) -> Any:
    if path in how:
        return how[path]
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % how["group_size"] == 0


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone, of a model or of a folder that has nothing else."""
    if (own := packaged(name)) is not None:
        folder = own
    else:
        folder = _there(name) or _small_of_hub(name)
        if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
            raise ModelError(f"{name}: no tokenizer_config.json and no tokenizer.json in this folder.")
    trust.check(folder)
    config = trust.read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    try:
        return _tokenizer_in(folder, config)
    except Exception as error:  # whatever a broken folder makes mlx-lm or transformers raise
        raise ModelError(f"{name}: this tokenizer can't be loaded: {_one_line(error)}") from error


def _tokenizer_in(folder: Path, config: dict[str, Any]) -> Any:
    from mlx_lm.utils import load_tokenizer as load_it

    known: dict[str, Any] = {}
    if config.get("model_type") == lstm.MODEL_TYPE:  # a kind that transformers has never heard of, and would warn about
        from transformers import PretrainedConfig

        known["config"] = PretrainedConfig()
    return load_it(folder, trust.NO_CODE | known, eos_token_ids=config.get("eos_token_id"))


def as_loaded(tokenizer: Any) -> Any:
    """A tokenizer of transformers as it is once it was saved and mlx-lm has loaded it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return load_tokenizer(folder)


@contextmanager
def wired_memory(model: nn.Module) -> Iterator[None]:
    """On a Mac, let the GPU keep the model's memory wired while inside, as mlx-lm does; elsewhere nothing."""
    from mlx_lm.generate import wired_limit

    with wired_limit(model):
        yield


def _prepare(model: nn.Module, how: str, measured: Mapping[str, int]) -> dict[str, int]:
    backend.reuse_memory()
    _adapt(model)
    mx.eval(model.parameters())
    return matmul.install(model, how, measured=measured)


def _stored(model: nn.Module) -> mx.Dtype:
    """The dtype that most of a model's floating-point numbers have."""
    sizes: dict[mx.Dtype, int] = {}
    arrays: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    for array in arrays.values():
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=lambda dtype: sizes[dtype], default=mx.float32)


def _adapt(model: nn.Module) -> None:
    model.update(tree_map(_computable, model.parameters()))
    model.freeze()
    model.eval()


def _computable(array: mx.array) -> mx.array:
    return array.astype(backend.compute_dtype(array.dtype)) if mx.issubdtype(array.dtype, mx.floating) else array


def _folder(name: str) -> Path:
    folder = _there(name) or _fetched(_hub_name(name), [*_SMALL, "model*.safetensors"])
    _check(folder)
    return folder


def _there(name: str) -> Path | None:
    """The folder of this name, if there is one; a model of the hub has none."""
    folder = Path(name).expanduser()
    try:
        if folder.is_symlink() and not folder.exists():
            raise ModelError(f"{folder}: this link leads to {os.readlink(folder)}, where nothing is.")
        if not folder.exists():
            return None
        if not folder.is_dir():
            raise ModelError(f"{folder}: this is a file; name the folder that holds config.json and model.safetensors.")
        os.listdir(folder)
        (folder / "config.json").exists()  # a folder may be listed and still not be entered
    except OSError as error:
        raise ModelError(f"{folder}: this folder can't be read: {error.strerror}.") from error
    return folder


def _check(folder: Path) -> None:
    """What a folder lacks, all of it at once, and what it may not do, before anything is loaded."""
    _refuse_adapters(folder)
    trust.check_weights(folder)
    lacking = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).exists()]
    if not any(map(os.path.lexists, folder.glob("model*.safetensors"))):
        lacking.append("model*.safetensors")
    if lacking:
        raise ModelError(f"{folder}: no {', no '.join(lacking)} in this folder. Name a folder that mlx-lm can load.")
    trust.check(folder)
    if "model_type" not in trust.read_json(folder / "config.json"):
        raise ModelError(f"{folder / 'config.json'}: not the configuration of a model: it has no model_type.")


def _refuse_adapters(folder: Path) -> None:
    """Raise for a run, or its adapters, that came in the place of a model."""
    own = next((each for each in (folder / "adapters", folder) if (each / "adapters.safetensors").is_file()), None)
    if own and not (folder / "config.json").exists():
        raise ModelError(
            f"{folder}: {'this folder holds' if own == folder else 'this is a run: it has'} adapters, and no model. "
            f"Name the model that they were trained on, and {own} as its adapters (--adapters, or distill.teacher_adapters)."
        )


def _hub_name(name: str) -> str:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"{name}: there is no such folder. Name a folder with a model, or one of the hub as owner/name.")
    return name


def _small_of_hub(name: str) -> Path:
    """The folder of a model of the hub, of which everything is there but perhaps the weights."""
    return _fetched(_hub_name(name), _SMALL)


_SMALL = ["*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


def _fetched(name: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{name}: there is no such folder here, and the hub gave nothing: {_one_line(error)}. "
            "Check the name and the connection, or give the path of a folder."
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."
