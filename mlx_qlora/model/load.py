"""Load a model and its tokenizer by way of mlx-lm, frozen and ready to compute here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_qlora.assets import EMBEDDED, embedded_model
from mlx_qlora.errors import ModelError
from mlx_qlora.model import backend, frozen, matmul


@dataclass(frozen=True)
class Loaded:
    """A frozen model in evaluation mode, its tokenizer, and what they are. Unpacks as (model, tokenizer), like mlx-lm's."""

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    name: str

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.tokenizer

    @property
    def describe(self) -> str:
        bits = self.config.get("quantization", {}).get("bits")
        kind = self.config.get("model_type", "?")
        return f"{self.name} ({kind}, {f'{bits}-bit' if bits else 'not quantised'})"


def load(name: str, matmul: str = "auto") -> Loaded:
    """Load a folder, a model of the hub, or `embedded`, the tiny 4-bit Mistral of this package.

    `matmul`: how its quantised weights are multiplied; see `MatmulConfig`.
    """
    import mlx_lm

    folder = embedded_model() if name == EMBEDDED else _folder(name)
    try:
        model, tokenizer, config = mlx_lm.load(str(folder), lazy=True, return_config=True)
        _prepare(model, matmul)
    except Exception as error:  # whatever a broken folder makes mlx-lm, transformers or MLX raise
        raise ModelError(f"{name}: this model can't be loaded: {_one_line(error)}") from error
    return Loaded(model, tokenizer, config, name)


def outline(name: str) -> Loaded:
    """A model of which no weight is read: shapes and dtypes only, without a tokenizer.

    A folder needs no more than config.json; of a model of the hub only that is fetched. Where the files with weights
    are missing, layers are quantised as config.json says.
    """
    from mlx_lm.utils import load_config, load_model

    folder = embedded_model() if name == EMBEDDED else Path(name).expanduser()
    if name != EMBEDDED and not folder.exists():
        folder = _folder_or_hub(name)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json in this folder. Name a folder that mlx-lm can load.")
    try:
        config = load_config(folder)
        if "auto_map" in config or "model_file" in config:
            raise ModelError(f"{folder}: this model brings code of its own to run, and that is never done here.")
        complete = bool(list(folder.glob("model*.safetensors")))
        model, config = load_model(folder, lazy=True, strict=False) if complete else (of_config(config), config)
        _adapt(model)
        frozen.install(model)
    except ModelError:
        raise
    except Exception as error:  # whatever a broken folder makes mlx-lm or MLX raise
        raise ModelError(f"{name}: this model can't be outlined: {_one_line(error)}") from error
    return Loaded(model, None, config, name)


def of_config(config: dict[str, Any]) -> nn.Module:
    """A model as its config.json says, of arrays that nobody has computed."""
    from mlx_lm.utils import _get_classes

    kind, arguments = _get_classes(config)
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
    from mlx_lm.utils import load_tokenizer as load_it

    if name == EMBEDDED:
        folder = embedded_model()
    elif (folder := Path(name).expanduser()).is_dir():
        if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
            raise ModelError(f"{name}: no tokenizer_config.json and no tokenizer.json in this folder.")
    else:
        folder = _folder(name)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if (folder / "config.json").exists() else {}
        return load_it(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # whatever a broken folder makes mlx-lm or transformers raise
        raise ModelError(f"{name}: this tokenizer can't be loaded: {_one_line(error)}") from error


@contextmanager
def wired_memory(model: nn.Module) -> Iterator[None]:
    """On a Mac, let the GPU keep the model's memory wired while inside, as mlx-lm does; elsewhere nothing."""
    from mlx_lm.generate import wired_limit

    with wired_limit(model):
        yield


def _prepare(model: nn.Module, how: str) -> None:
    backend.reuse_memory()
    _adapt(model)
    mx.eval(model.parameters())
    matmul.install(model, how)


def _adapt(model: nn.Module) -> None:
    model.update(tree_map(_computable, model.parameters()))
    model.freeze()
    model.eval()


def _computable(array: mx.array) -> mx.array:
    return array.astype(backend.compute_dtype(array.dtype)) if mx.issubdtype(array.dtype, mx.floating) else array


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ModelError(f"{name}: there is no such folder. Name a folder with a model, or one of the hub as owner/name.")
        return _from_hub(name)
    _check(folder)
    return folder


def _check(folder: Path) -> None:
    """What a folder lacks, all of it at once, before anything is loaded."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: this is a file; name the folder that holds config.json and model.safetensors.")
    lacking = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).exists()]
    if not list(folder.glob("model*.safetensors")):
        lacking.append("model*.safetensors")
    if lacking:
        raise ModelError(f"{folder}: no {', no '.join(lacking)} in this folder. Name a folder that mlx-lm can load.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "model_type" not in config:
            raise ValueError("it has no model_type")
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'}: not the configuration of a model: {error}") from error
    if "auto_map" in config or "model_file" in config:
        raise ModelError(f"{folder}: this model brings code of its own to run, and that is never done here.")


def _folder_or_hub(name: str) -> Path:
    """The folder of a model of the hub, of which everything is there but perhaps the weights."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"{name}: there is no such folder. Name a folder with a model, or one of the hub as owner/name.")
    return _fetched(name, _SMALL)


_SMALL = ["*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


def _from_hub(name: str) -> Path:
    folder = _fetched(name, [*_SMALL, "model*.safetensors"])
    _check(folder)
    return folder


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
