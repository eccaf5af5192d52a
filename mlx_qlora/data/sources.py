"""Rows with ids, from JSONL files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.assets import EMBEDDED, embedded_data
from mlx_qlora.errors import DataError, listed, require


@dataclass(frozen=True)
class Row:
    """A row as it stands in its file. The id says where: `train.jsonl:17`."""

    id: str
    value: dict[str, Any]


@dataclass(frozen=True)
class DataConfig:
    """What is trained, and how it becomes updates."""

    data: str = ""
    """A folder with train.jsonl and, if you have them, valid.jsonl and test.jsonl; or one .jsonl file; or: embedded."""
    validation_share: float = 0.1
    """Share of the training rows that is split off where there is no valid.jsonl."""
    max_seq_length: int = 2048
    """Longer examples are cut there; the header says how many and what it cost."""
    batch_size: int = 4
    """Examples that go through the model at once."""
    gradient_accumulation: int = 1
    """Batches that make one update."""

    def __post_init__(self) -> None:
        share = self.validation_share
        require(
            (0 < share < 1, "validation_share", share, "a number between 0 and 1"),
            (self.max_seq_length >= 2, "max_seq_length", self.max_seq_length, "a whole number from 2"),
            (self.batch_size >= 1, "batch_size", self.batch_size, "a whole number from 1"),
            (self.gradient_accumulation >= 1, "gradient_accumulation", self.gradient_accumulation, "a whole number from 1"),
        )

    @property
    def examples_per_update(self) -> int:
        return self.batch_size * self.gradient_accumulation


@dataclass(frozen=True)
class Splits:
    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    valid_from: str  # the file, or what was done because there is none


def read_splits(config: DataConfig, seed: int) -> Splits:
    """The training rows and the validation rows; without a validation file a seeded share of the former."""
    if not config.data:
        raise DataError("data: nothing came; name a folder with train.jsonl, or one .jsonl file.")
    path = embedded_data() if config.data == EMBEDDED else Path(config.data).expanduser()
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder. Name a folder with train.jsonl, or one .jsonl file.")
    train_file = path / "train.jsonl" if path.is_dir() else path
    if not train_file.exists():
        found = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
        raise DataError(f"{path}: no train.jsonl in this folder (it holds {found}). Name a folder that has one.")
    train = read_jsonl(train_file)
    valid_file = path / "valid.jsonl"
    if path.is_dir() and valid_file.exists():
        return Splits(train, read_jsonl(valid_file), valid_file.name)
    return _split(train, config.validation_share, seed)


def _split(rows: tuple[Row, ...], share: float, seed: int) -> Splits:
    if len(rows) < 2:
        raise DataError(f"{rows[0].id}: this is the only row, and none can be split off for validation. Give a valid.jsonl.")
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    valid = tuple(row for i, row in enumerate(rows) if i in chosen)
    train = tuple(row for i, row in enumerate(rows) if i not in chosen)
    return Splits(train, valid, f"{count} rows split off from training (seed {seed}): there is no valid.jsonl")


def read_jsonl(path: Path) -> tuple[Row, ...]:
    """All rows of a file, or one error that lists the lines that are no rows."""
    rows: list[Row] = []
    problems: list[str] = []
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}.") from error
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            problems.append(f"{path}:{number}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8.")
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append(f"{path}:{number}: not JSON: {error}; one object a line is expected.")
        else:
            if isinstance(value, dict):
                rows.append(Row(f"{path.name}:{number}", value))
            else:
                problems.append(f'{path}:{number}: {_kind(value)} came, an object such as {{"messages": [...]}} is expected.')
    if problems:
        raise DataError(listed(problems))
    if not rows:
        raise DataError(f"{path}: this file has no rows; one JSON object a line is expected.")
    return tuple(rows)


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
