"""What a model's folder may not do: bring code of its own, name weights elsewhere, hold pickles.

A model of the hub is a stranger's. Its weights and its template are data; whatever would make transformers or mlx-lm
import a file of it is refused before any of them sees the folder, and they are told so, too.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mlx_qlora.errors import ModelError
from mlx_qlora.files import small_text

_INDEX = "model.safetensors.index.json"
_CODE = ("auto_map", "model_file")  # transformers imports what the first names, mlx-lm what the second does
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MOST_JSON = 2**26  # an index of the largest models has some ten MB
NO_CODE = {"trust_remote_code": False}


def without_code(function: Callable[..., Any]) -> dict[str, Any]:
    """`trust_remote_code=False` for a function that takes it; older versions of mlx-lm run no code, or don't ask."""
    return NO_CODE if "trust_remote_code" in inspect.signature(function).parameters else {}


def check(folder: Path) -> None:
    """Raise if the folder wants code to be run, or its index or a link leads out of it or to nothing."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            _refuse_code(folder / name)
    _index(folder)
    for path in folder.glob("*.safetensors"):
        if not path.exists():
            raise ModelError(f"{path}: this link leads to {os.readlink(path)}, where nothing is. Fetch the model again.")


def missing_weights(folder: Path) -> list[str]:
    """Files that the index names and that are not there."""
    return [name for name in _index(folder) if not (folder / name).is_file()]


def check_weights(folder: Path) -> None:
    """Raise if the weights are not all there, or are none that can be read without running what they say."""
    pickles = [path.name for what in _PICKLES for path in folder.glob(what)]
    if pickles and not list(folder.glob("model*.safetensors")):
        raise ModelError(
            f"{folder}: its weights are pickles ({', '.join(sorted(pickles)[:3])}), and reading one can run code, so that is "
            "never done here. Take a version of this model with .safetensors files, or save it so where you trust it."
        )
    if lacking := missing_weights(folder):
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ModelError(
            f"{folder / _INDEX}: it names {', '.join(lacking[:3])}{more}, which the folder lacks. Fetch the model again."
        )


def read_json(path: Path) -> dict[str, Any]:
    """One of a model's JSON files; it holds one object."""
    try:
        value = json.loads(small_text(path, _MOST_JSON))
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {' '.join(str(error).split())}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: an object is expected, such as {{...}}.")
    return value


def _refuse_code(path: Path) -> None:
    config = read_json(path)
    for key in (key for key in _CODE if config.get(key) is not None):
        raise ModelError(
            f"{path}: {key} names code of its own that this model wants to run, and that is never done here. mlx-lm has its "
            f"own code for most kinds of models: if it has it for this one, take {key} out of that file; if not, take "
            "another version of the model."
        )


def _index(folder: Path) -> list[str]:
    """The names of files in the index of the weights, each once; all of them inside of the folder.

    The names are judged, not what they lead to: in the hub's cache every file is a link to ../../blobs.
    """
    path = folder / _INDEX
    if not path.exists():
        return []
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) and name for name in where.values()):
        raise ModelError(f"{path}: a weight_map with the name of a file for each array is expected.")
    names = sorted(set(where.values()))
    for name in names:
        if leaves(name):
            raise ModelError(f"{path}: {name!r} leads out of the model's folder; names of files in it are expected.")
    return names


def leaves(name: str) -> bool:
    """Whether a relative name leads out of its folder, however it is written.

    >>> leaves("a.safetensors"), leaves("../a"), leaves("b/../../a"), leaves("/etc/a"), leaves("C:\\\\a")
    (False, True, True, True, True)
    """
    parts = name.replace("\\", "/").split("/")
    return PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor) or ".." in parts or "\0" in name
