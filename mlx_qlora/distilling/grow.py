"""A student that lacks the last tokens of its teacher's vocabulary gets them: rows, configuration and tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_qlora.errors import ConfigError, ModelError, RunFolderError
from mlx_qlora.model.full import model_files
from mlx_qlora.model.grown import grow, vocabulary_layers
from mlx_qlora.model.load import Loaded, as_stored, load_tokenizer
from mlx_qlora.model.vocabularies import compared, ids_of
from mlx_qlora.run import disk
from mlx_qlora.run.folder import check_free


@dataclass(frozen=True)
class Grown:
    """What was added to a model."""

    model: Loaded
    folder: Path
    tokens: tuple[str, ...]  # that it knows now
    first: int  # the first one's id
    known: int  # tokens that it knew
    rows: tuple[int, int]  # of embedding and head, before and now
    paths: tuple[str, ...]  # of both
    ends: tuple[str, ...]  # tokens that end a text now and did not before

    @property
    def describe(self) -> tuple[str, ...]:
        count, shown = len(self.tokens), 8
        more = f" and {count - shown:,} more" if count > shown else ""
        padding = min(self.rows[0], self.rows[1], self.first + count) - self.first
        parts = [f"{padding:,} that were padding"] if padding > 0 else []
        parts += [f"{self.rows[1] - self.rows[0]:,} that are new"] if self.rows[1] > self.rows[0] else []
        rows = f"{' and '.join(parts)} of {self.rows[1]:,} rows are the mean of the {self.known:,} known"
        lines = [
            f"{count:,} token{'s' * (count > 1)} from number {self.first:,} on: {', '.join(self.tokens[:shown])}{more}",
            f"{' and '.join(self.paths)}: {rows}",
        ]
        return (*lines, *([f"a text ends with {' or '.join(self.ends)}, too"] if self.ends else []))


def grown(model: str, like: str, folder: Path) -> Grown:
    """Write the model `model` into a folder, with the tokenizer of `like` and rows for the tokens that it did not know.

    The rows that it had keep every byte. `ConfigError` where the vocabulary of `like` is not the student's with more tokens at
    its end. The folder is whole or not there.
    """
    _require_empty(folder)
    student, teacher = as_stored(model), load_tokenizer(like)
    before = _rows_of(student.config)
    _require_tail(student.tokenizer, teacher, before, model, like)
    # Numbers past the last row are no tokens that it knows, whatever its tokenizer says.
    known, new = [number for number in sorted(ids_of(student.tokenizer)) if number < before], ids_of(teacher)
    first, upto = known[-1] + 1, max(new) + 1
    rows = max(before, upto)
    layers = vocabulary_layers(student.model, before)
    grow(layers, known, upto)
    config, ends = _with_ends(_with_rows(student.config, rows), student.tokenizer, teacher)
    _write(folder, replace(student, tokenizer=teacher, config=config))
    tokens = tuple(new[number] for number in range(first, upto) if number in new)
    return Grown(student, folder, tokens, first, len(known), (before, rows), tuple(layers), tuple(new[end] for end in ends))


def _require_empty(folder: Path) -> None:
    if folder.is_dir() and os.access(folder, os.R_OK) and any(folder.iterdir()):
        raise RunFolderError(f"--output-dir {folder}: there is something in it already; name a folder that is not there yet.")
    check_free(folder)


def _require_tail(student: Any, teacher: Any, rows: int, model: str, like: str) -> None:
    found = compared(student, teacher)
    names = f"{model} is the student, {like} the teacher"
    if found.difference:
        raise ConfigError(
            f"--like {like}: its vocabulary is not the student's with more tokens at the end: {found.difference} ({names}). "
            "Name a model of the student's own family, or distil across tokenizers, from a cache, with distill.loss: uld."
        )
    known = min(found.student, rows)
    if found.teacher > known:
        return
    more = f"and {known - found.teacher:,} more " if known > found.teacher else ""
    raise ConfigError(
        f"--like {like}: there is nothing to grow: the student knows all of its {found.teacher:,} tokens {more}({names}). "
        "Train it as it is; where heads differ in their rows, what both know is compared."
    )


def _rows_of(config: dict[str, Any]) -> int:
    """vocab_size of a config.json, which models of texts and pictures have in a part of their own."""
    rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(rows, int):
        raise ModelError("this model's config.json says no vocab_size, so it can't be told which rows are its tokens'.")
    return rows


def _with_rows(config: dict[str, Any], rows: int) -> dict[str, Any]:
    changed = dict(config)
    if "vocab_size" in config:
        changed["vocab_size"] = rows
    if "vocab_size" in config.get("text_config", {}):
        changed["text_config"] = config["text_config"] | {"vocab_size": rows}
    return changed


def _with_ends(config: dict[str, Any], student: Any, teacher: Any) -> tuple[dict[str, Any], list[int]]:
    """(the configuration in which a text ends where either of both ends it, the ids that are new in that)."""
    old, new = set(student.eos_token_ids), set(teacher.eos_token_ids)
    ends: Sequence[int] = sorted(new) + sorted(old - new)
    changed = config | {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else config
    return changed, sorted(new - old)


def _write(folder: Path, loaded: Loaded) -> None:
    """Written aside, loaded once as others will load it, and only then named."""
    from mlx_lm.utils import save_model

    made_of = loaded.name
    files = model_files(loaded, dense=False)
    folder = folder.absolute()
    making = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        for name, content in files.items():
            disk.write_flushed(making / name, content)
        save_model(making, loaded.model, donate_model=True)
        _require_loads(making, loaded.tokenizer, made_of)
        for path in making.iterdir():
            _flush(path)
        disk.flush_folder(making)
        os.replace(making, folder)
        disk.flush_folder(folder.parent)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _require_loads(folder: Path, tokenizer: Any, made_of: str) -> None:
    try:
        written = as_stored(str(folder))
    except ModelError as error:
        raise ModelError(f"{made_of}: with more rows this kind of model can't be loaded: {error}") from error
    if difference := compared(written.tokenizer, tokenizer).difference:
        raise ModelError(f"--like: its tokenizer is another one once it is written down: {difference}.")


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        disk.flush(file)
    finally:
        os.close(file)
