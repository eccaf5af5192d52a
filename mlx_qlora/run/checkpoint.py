"""All of a run's state in a folder, written so that neither a kill nor a power cut can hurt it.

A checkpoint is written under another name. Each file is flushed to the disk, the list of their SHA-256 sums
(`SHA256SUMS`, which `sha256sum -c` reads too) comes last, then the folder is flushed, renamed, and its parent flushed.
So a name `checkpoint_epoch0_step200` stands for a whole one; and because disks lie, it is verified before it is used.
Arrays are safetensors and all the rest is JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import require
from mlx_qlora.run.disk import flush_folder, remove_folder, write_flushed

STATE, SUMS = "state.json", "SHA256SUMS"
_NAME = re.compile(r"checkpoint_epoch(\d+)_step(\d+)(?:_part(\d+))?(?:_again(\d+))?")
_LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run's state is saved, and how much of it is kept. None of it changes what is learnt."""

    save_every: int | None = None
    """Updates between checkpoints; without a number: at each validation."""
    save_minutes: float = 10.0
    """And when so many minutes have passed since the last one, in the middle of an update too; 0: not by the clock."""
    keep_checkpoints: int = 2
    """So many of the newest stay; the one with the lowest validation loss stays as well."""

    def __post_init__(self) -> None:
        every, minutes, keep = self.save_every, self.save_minutes, self.keep_checkpoints
        require(
            (every is None or every >= 1, "save_every", every, "a whole number from 1"),
            (0 <= minutes < 1e9, "save_minutes", minutes, "a number from 0"),
            (keep >= 1, "keep_checkpoints", keep, "a whole number from 1"),
        )


@dataclass(frozen=True)
class Checkpoint:
    """One that was verified."""

    folder: Path
    state: dict[str, Any]

    def arrays(self, name: str) -> dict[str, mx.array]:
        """A file of arrays; none if the checkpoint has no such file."""
        path = self.folder / f"{name}.safetensors"
        loaded: dict[str, mx.array] = mx.load(str(path)) if path.name in self.state["files"] else {}  # type: ignore[assignment]
        return loaded


def name_of(epoch: float, step: int, part: int = 0) -> str:
    """
    >>> name_of(1.5, 200), name_of(0.1, 7, part=3)
    ('checkpoint_epoch1_step200', 'checkpoint_epoch0_step7_part3')
    """
    return f"checkpoint_epoch{int(epoch)}_step{step}" + (f"_part{part}" if part else "")


def save(folder: Path, name: str, state: Mapping[str, Any], arrays: Mapping[str, Arrays]) -> Path:
    """Write a checkpoint into the folder of a run. One that is there already under this name stays, whatever happens."""
    before = [place(each)[2] for each in there(folder) if each.name.split("_again")[0] == name]
    name += f"_again{max(before) + 1}" if before else ""
    final, making = folder / name, folder / f".{name}.tmp"
    shutil.rmtree(making, ignore_errors=True)
    os.mkdir(making)
    try:
        files = [STATE, *(f"{each}.safetensors" for each in arrays)]
        text = json.dumps({**state, "files": files}, indent=1, ensure_ascii=False)
        sums = {STATE: write_flushed(making / STATE, text.encode())}
        for each, held in arrays.items():
            sums[f"{each}.safetensors"] = write_flushed(making / f"{each}.safetensors", serialized(held))
        write_flushed(making / SUMS, "".join(f"{sum}  {file}\n" for file, sum in sums.items()).encode())
        flush_folder(making)
        os.rename(making, final)
        flush_folder(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return final


def serialized(arrays: Arrays) -> bytes:
    """Arrays as a safetensors file; they are computed already, so this may run beside training."""
    from safetensors import TensorSpec, serialize

    held = {name: _bytes_of(array) for name, array in arrays.items()}
    specs = {
        name: TensorSpec(
            dtype=str(arrays[name].dtype).removeprefix("mlx.core."),
            shape=tuple(arrays[name].shape),
            data_ptr=raw.ctypes.data,
            data_len=raw.nbytes,
        )
        for name, raw in held.items()
    }
    return bytes(serialize(specs, metadata={"format": "mlx"}))


def _bytes_of(array: mx.array) -> np.ndarray[Any, Any]:
    """The numbers of an array where they lie; NumPy knows no bfloat16, so they are bytes to it."""
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(plain, copy=False))


def there(folder: Path) -> list[Path]:
    """The checkpoints of a run by their names, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((each for each in folder.iterdir() if _NAME.fullmatch(each.name)), key=place, reverse=True)


def place(checkpoint: Path) -> tuple[int, int, int]:
    """(updates made, batches of the next one that are done, how many were there under this name before)."""
    found = _NAME.fullmatch(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[2]), int(found[3] or 0), int(found[4] or 0)


def verified(path: Path) -> Checkpoint:
    """A checkpoint whose every byte is what was written; `ValueError` says what is not."""
    try:
        *lines, rest = (path / SUMS).read_bytes().decode("ascii").split("\n")
        if rest:
            raise ValueError(f"{SUMS} is damaged")
        listed = dict(map(_sum_of, lines))
        for name, expected in listed.items():
            with (path / name).open("rb") as file:
                if _digest(file) != expected:
                    raise ValueError(f"{name} is not what was written")
        if STATE not in listed:
            raise ValueError(f"{SUMS} does not name {STATE}")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("files"), list):
            raise ValueError(f"{STATE} names no files")
        missing = [name for name in state["files"] if name not in listed]
        if missing:
            raise ValueError(f"{SUMS} does not name {', '.join(missing)}")
    except OSError as error:
        raise ValueError(f"{Path(str(error.filename)).name} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{SUMS} is damaged") from error
    return Checkpoint(path, state)


def _sum_of(line: str) -> tuple[str, str]:
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"{SUMS} is damaged")
    return found[2], found[1]


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """(the newest checkpoint that verifies, what was wrong with those that were passed over)."""
    problems: list[str] = []
    for path in there(folder):
        try:
            return verified(path), problems
        except ValueError as error:
            problems.append(f"{path.name} is damaged and passed over: {error}")
    return None, problems


def whole(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints that verify, the newest first."""
    for path in there(folder):
        with suppress(ValueError):
            yield verified(path)


def rotate(folder: Path, keep: int, best_step: int | None, also: Sequence[Path] = ()) -> None:
    """Take old checkpoints away; the newest stay, and the one of the best validation, and those that are named."""
    found = there(folder)
    best = next((each for each in found if place(each)[:2] == (best_step, 0)), None)
    for each in found[keep:]:
        if each != best and each not in also:
            with suppress(OSError):  # it costs room; the next time it is tried again
                remove_folder(each)


def sweep(folder: Path) -> None:
    """Take away what a killed process left half done."""
    for each in folder.glob(".checkpoint_*"):
        if each.name.endswith((".tmp", ".going")):
            shutil.rmtree(each, ignore_errors=True)


class Saver:
    """Does the writing in a thread of its own while training goes on, one piece of work at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._working: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin something; what was begun before must have been waited for."""
        assert self._working is None, "wait() comes first"
        self._working = self._thread.submit(work)

    def wait(self) -> bool:
        """Wait for the work, and raise what went wrong with it; says whether there was any."""
        working, self._working = self._working, None
        if working is not None:
            working.result()
        return working is not None

    def close(self) -> None:
        self._thread.shutdown(wait=True)
