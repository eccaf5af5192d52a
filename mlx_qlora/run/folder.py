"""The folder of a run: claimed once, and written so that no reader ever meets half a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.errors import RunFolderError

# What a run writes, and so what `overwrite` may take away. Nothing else in the folder is touched.
_OWN_FILES = (
    "config.yaml", "training_metrics.jsonl", "training_metrics.json", "training_metrics.csv", "training_summary.json",
    "answers.jsonl", "data_account.json", "chat_template.jinja",
)  # fmt: skip
_OWN_FOLDERS = ("adapters",)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise if the folder can't be used: it holds another run, or is no folder. Changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output_dir: {folder} is a file; name a folder.")
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunFolderError(f"output_dir: {folder} can't be written: {there} is no folder that may be. Name another folder.")
    held = [name for name in (*_OWN_FILES, *_OWN_FOLDERS) if (folder / name).exists()]
    if held and not overwrite:
        raise RunFolderError(
            f"output_dir: {folder} holds a run already ({', '.join(held[:3])}). "
            "Name another folder with --output-dir, or replace that run with --overwrite."
        )


def claim(folder: Path, *, overwrite: bool) -> None:
    """Make the folder, without an earlier run's files."""
    check_free(folder, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _OWN_FILES:
            (folder / name).unlink(missing_ok=True)
        for name in _OWN_FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "adapters").mkdir()
    except OSError as error:
        raise RunFolderError(f"output_dir: {folder} can't be written: {error.strerror}. Name another folder.") from error


def write_atomically(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write aside, flush to the disk, rename. `content` is the text, or a function that writes to a path."""
    aside = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        if isinstance(content, str):
            aside.write_text(content, encoding="utf-8")
        else:
            content(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, values: Sequence[Any]) -> None:
    write_atomically(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def save_adapters(folder: Path, arrays: Mapping[str, mx.array], adapter_config: Mapping[str, Any]) -> None:
    """`adapters/` as mlx-lm loads it. The new weights replace the old ones in one step."""
    adapters = folder / "adapters"
    adapters.mkdir(exist_ok=True)
    write_json(adapters / "adapter_config.json", adapter_config)
    write_atomically(
        adapters / "adapters.safetensors", lambda path: mx.save_safetensors(str(path), dict(arrays), {"format": "mlx"})
    )


def load_adapters(folder: Path) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = mx.load(str(folder / "adapters" / "adapters.safetensors"))  # type: ignore[assignment]
    return arrays
