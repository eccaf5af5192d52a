"""What the layers below the adapters give, computed once for every beginning of tokens and kept on disk.

When adapters sit on the last layers only, what goes into the first of them follows from the tokens alone and never
changes. So it is kept by the hash of the tokens up to each position: what examples have in common is kept once, and a
state that was computed in one layout serves in every other one, in validation too.

A folder holds `states.bin`, to which runs of states are appended, and `index.safetensors`, written aside and renamed,
with the hashes and a checksum of each run. What is not in the index, or damaged, is computed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlx_qlora.errors import ConfigError, require
from mlx_qlora.model import trunk
from mlx_qlora.records import Batch, Update

_FORMAT = 1
_FLUSH_BYTES = 256_000_000  # so much may be lost to a crash
_AT_ONCE = 1 << 22
_RECENT = 65_536  # marks that are looked up in a dictionary before all of them are sorted again


@dataclass(frozen=True)
class TrunkCacheConfig:
    """What the layers below the adapters give, kept from the first epoch on."""

    trunk_cache: Literal["auto", "f32", "bf16", "off"] = "auto"
    """Whether, and in which precision; auto: whenever layers lie below the adapters, as the model computes it."""
    trunk_cache_gb: float = 20.0
    """The most that all of it may take on the disk; what was used longest ago goes first."""
    trunk_cache_dir: str = "~/.cache/mlx_qlora/trunk"
    """Where it lies; another run with the same model finds it there again."""

    def __post_init__(self) -> None:
        size = self.trunk_cache_gb
        require(
            (0 < size < 1e6, "trunk_cache_gb", size, "a number above 0"),
            (bool(self.trunk_cache_dir), "trunk_cache_dir", self.trunk_cache_dir, "a folder"),
        )


class KeptStates:
    """States [D] by the hash of the tokens up to them, memory-mapped.

    One process writes to a folder at a time; another one that opens it meanwhile reads, and keeps nothing of its own.
    """

    def __init__(self, folder: Path, width: int, stored: mx.Dtype, limit: float):
        self.folder, self.width, self.limit = folder, width, limit
        self._kind: np.dtype[Any] = np.dtype(np.uint16 if stored == mx.bfloat16 else np.float32)
        self._dtype = stored
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder / "lock")
        self._states = os.open(folder / "states.bin", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.problem = "" if self._lock is not None else "another run writes to it"  # why nothing more is kept
        self.damaged = 0  # runs of states that were not what they had been
        self._runs = self._read_index()
        self._checked = [False] * len(self._runs)
        self._places = sum(len(run.marks) for run in self._runs)
        if self._lock is not None:
            os.ftruncate(self._states, self._places * self._row_bytes)
        self._unflushed = 0
        self._map: Any = ()
        self._index()

    @property
    def _row_bytes(self) -> int:
        return self.width * self._kind.itemsize

    def __len__(self) -> int:
        """Positions whose states can be found."""
        return len(self._sorted) + len(self._recent)

    def find(self, marks: NDArray[np.uint64]) -> mx.array | None:
        """The states of all these marks, [N, D]; None if one is missing. A mark of 0 is padding: zeros."""
        slots = self._slots(marks)
        if (slots[marks != 0] < 0).any() or not self._intact(slots[slots >= 0]):
            return None
        rows: NDArray[Any] = np.zeros((len(marks), self.width), self._kind)
        if (slots >= 0).any():
            if len(self._map) < self._places:  # by the open file: another one may stand under its name by now
                mapped = mmap.mmap(self._states, self._places * self._row_bytes, access=mmap.ACCESS_READ)
                self._map = np.frombuffer(mapped, self._kind).reshape(self._places, self.width)
            rows[slots >= 0] = self._map[slots[slots >= 0]]
        return mx.array(rows).view(self._dtype)

    def rounded(self, states: mx.array) -> mx.array:
        """The states as `find` would give them."""
        return states.astype(self._dtype)

    def add(self, marks: NDArray[np.uint64], states: mx.array) -> None:
        """Keep what is not there yet, if there is room for it."""
        new = np.unique(marks, return_index=True)[1]
        new = new[(marks[new] != 0) & (self._slots(marks[new]) < 0)]
        if self.problem or not len(new):
            return
        if (self._places + len(new)) * self._row_bytes > self.limit:
            self.problem = f"trunk_cache_gb is reached: {len(self):,} positions are kept, the others are computed each time"
            return
        raw = np.array(self.rounded(states)[mx.array(new)].view(mx.uint8)).tobytes()
        try:
            _write(self._states, raw)
        except OSError as error:
            self.problem = f"{self.folder} can't be written: {error.strerror}"
            os.ftruncate(self._states, self._places * self._row_bytes)
            return
        self._runs.append(_Run(self._places, marks[new], zlib.crc32(raw)))
        self._checked.append(True)
        self._recent |= dict(zip(marks[new].tolist(), range(self._places, self._places + len(new)), strict=True))
        self._places += len(new)
        self._unflushed += len(raw)
        if len(self._recent) > max(_RECENT, len(self._sorted) // 4):
            self._index()
        if self._unflushed > _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make sure that what was added is found by the next process."""
        if self._lock is None or not self._unflushed:
            return
        self._unflushed = 0
        arrays = {
            "marks": np.concatenate([run.marks for run in self._runs]),
            "counts": np.array([len(run.marks) for run in self._runs], np.int64),
            "sums": np.array([run.crc for run in self._runs], np.uint32),
        }
        aside = self.folder / ".index.tmp.safetensors"
        try:
            os.fsync(self._states)
            mx.save_safetensors(
                str(aside), {name: mx.array(array) for name, array in arrays.items()}, {"crc": str(_crc(arrays.values()))}
            )
            with aside.open("rb") as written:
                os.fsync(written.fileno())
            aside.replace(self.folder / "index.safetensors")
        except (OSError, RuntimeError) as error:
            self.problem = f"{self.folder} can't be written: {error}"

    def close(self) -> None:
        self.flush()
        os.close(self._states)
        if self._lock is not None:
            os.close(self._lock)

    def __enter__(self) -> KeptStates:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_index(self) -> list[_Run]:
        """The runs that are there; an index that is not whole counts for nothing."""
        path = self.folder / "index.safetensors"
        if not path.exists():
            return []
        try:
            arrays, facts = cast(Any, mx.load(str(path), return_metadata=True))
            marks, counts, sums = (np.array(arrays[name]) for name in ("marks", "counts", "sums"))
            whole = facts["crc"] == str(_crc((marks, counts, sums)))
        except Exception:  # whatever a damaged file makes the reader raise
            whole = False
        if not whole:
            self.damaged += 1
            return []
        ends = np.cumsum(counts)
        there = os.fstat(self._states).st_size // self._row_bytes
        starts = ends - counts
        self.damaged += int((ends > there).sum())
        return [
            _Run(int(start), marks[start:end], int(crc))
            for start, end, crc in zip(starts, ends, sums, strict=True)
            if end <= there
        ]

    def _index(self) -> None:
        """Sort the marks of all runs, so that they are found by bisection."""
        marks = np.concatenate([np.empty(0, np.uint64), *(run.marks for run in self._runs)])
        order = np.argsort(marks, kind="stable")
        order = order[marks[order] != 0]
        self._sorted, self._order = marks[order], order
        self._starts = np.array([run.start for run in self._runs], np.int64)
        self._recent: dict[int, int] = {}

    def _slots(self, marks: NDArray[np.uint64]) -> NDArray[np.int64]:
        slots = np.full(len(marks), -1, np.int64)
        if len(self._sorted):
            at = np.minimum(np.searchsorted(self._sorted, marks), len(self._sorted) - 1)
            slots = np.where(self._sorted[at] == marks, self._order[at], -1)
        if self._recent:
            missing = np.flatnonzero(slots < 0)
            slots[missing] = [self._recent.get(mark, -1) for mark in marks[missing].tolist()]
        return slots

    def _intact(self, slots: NDArray[np.int64]) -> bool:
        """Whether the runs of these places are what they were written as; one that is not is forgotten."""
        intact = True
        for number in np.unique(np.searchsorted(self._starts, slots, side="right") - 1).tolist():
            run = self._runs[number]
            if self._checked[number]:
                continue
            self._checked[number] = True
            raw = os.pread(self._states, len(run.marks) * self._row_bytes, run.start * self._row_bytes)
            if zlib.crc32(raw) != run.crc:
                run.marks[:] = 0  # no mark is 0, so these are not found any more
                self.damaged += 1
                intact = False
        if not intact:
            self._index()
            self._unflushed += 1
        return intact


class _Run(NamedTuple):
    """States that were appended at once."""

    start: int
    marks: NDArray[np.uint64]
    crc: int


def _write(file: int, raw: bytes) -> None:
    rest = memoryview(raw)
    while rest:
        rest = rest[os.write(file, rest) :]


@dataclass(frozen=True)
class KeptTrunk:
    """Gives batches the states that go into the first adapted layer, from the kept ones where they are there."""

    model: nn.Module
    first: int
    kept: KeptStates

    def attach(self, batch: Batch) -> Batch:
        marks = np.array(batch.marks)
        states = self.kept.find(marks)
        if states is None:
            states = self.kept.rounded(trunk.states_before(self.model, batch, self.first))
            mx.eval(states)
            assert len(states) == len(marks), "a state for each position"
            self.kept.add(marks, states)
        return batch._replace(states=states)

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return map(self.attach, batches)

    def updates(self, updates: Iterable[Update]) -> Iterator[Update]:
        for update in updates:
            yield replace(update, batches=tuple(self.batches(update.batches)))


def first_kept(config: TrunkCacheConfig, model: nn.Module) -> int:
    """The layer whose inputs are kept; 0 where that is switched off or no layer lies below the adapters."""
    return 0 if config.trunk_cache == "off" else trunk.first_adapted(model)


def open_kept(config: TrunkCacheConfig, model: nn.Module, name: str, first: int) -> KeptTrunk | None:
    """The kept inputs of layer `first` of a model with adapters; None where that is 0."""
    if first == 0:
        return None
    computed = trunk.states_before(model, _one_token(), first)
    stored = {"auto": computed.dtype, "f32": mx.float32, "bf16": mx.bfloat16}[config.trunk_cache]
    stored = mx.float32 if stored not in (mx.float32, mx.bfloat16) else stored
    root = Path(config.trunk_cache_dir).expanduser()
    limit = config.trunk_cache_gb * 1e9
    folder = root / _key(model, first, str(stored), name)
    try:
        _make_room(root, folder, limit)
        return KeptTrunk(model, first, KeptStates(folder, computed.shape[-1], stored, limit))
    except OSError as error:
        raise ConfigError(
            f"trunk_cache_dir: {root} can't be used: {error.strerror}. Name another folder, or --trunk-cache off."
        ) from error


def _one_token() -> Batch:
    none = mx.zeros(0, mx.int32)
    return Batch(mx.zeros((1, 1), mx.int32), none, none, none, none, mx.zeros(1, mx.uint64))


def _key(model: nn.Module, first: int, stored: str, name: str) -> str:
    """Names what the states follow from: the arrays below the adapters, their layers' code and this MLX."""
    digest = hashlib.blake2b(
        f"{_FORMAT} {first} {stored} {version('mlx')} {version('mlx-lm')} {mx.default_device()} {type(model)}".encode()
    )
    digest.update(repr(sorted((key, str(value)) for key, value in vars(getattr(model, "args", model)).items())).encode())
    arrays: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    for path, array in arrays.items():
        layer = path.split(".layers.", 1)[-1].split(".", 1)[0] if ".layers." in path else ""
        if not layer.isdigit() or int(layer) < first:
            digest.update(f"{path} {array.shape} {array.dtype} {_fingerprint(array)}".encode())
    return f"{Path(name).name}-{digest.hexdigest()[:16]}"


def _fingerprint(array: mx.array) -> int:
    """A sum over an array's bits, each word times a number of its place; computed where the array lies."""
    flat = array.reshape(-1)
    total = 0
    for start in range(0, flat.size, _AT_ONCE):  # in parts, because the places take as much memory as what is summed
        part = flat[start : start + _AT_ONCE]
        words = part.view(mx.uint8 if part.dtype.size < 4 else mx.uint32).astype(mx.uint32)
        places = (mx.arange(start, start + words.size, dtype=mx.uint32) * mx.array(2654435761, mx.uint32)) | 1
        total += int((words * places).sum().item()) + start  # type: ignore[arg-type]
    return total


def _make_room(root: Path, wanted: Path, limit: float) -> None:
    """Delete what was used longest ago while everything together is larger than the limit; never what is in use."""
    if not root.is_dir():
        return
    folders = sorted((each for each in root.iterdir() if (each / "states.bin").exists()), key=_last_used)
    sizes = {each: (each / "states.bin").stat().st_size for each in folders}
    for each in folders:
        if sum(sizes.values()) <= limit:
            return
        if each != wanted and (lock := _locked(each / "lock")) is not None:
            for name in ("states.bin", "index.safetensors", "lock"):
                (each / name).unlink(missing_ok=True)
            with suppress(OSError):  # it holds something else
                each.rmdir()
            os.close(lock)
            del sizes[each]


def _last_used(folder: Path) -> float:
    return (folder / "lock").stat().st_mtime if (folder / "lock").exists() else 0.0


def _locked(path: Path) -> int | None:
    """A file descriptor that holds the lock until it is closed; None if another one has it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
    except PermissionError:  # another user's
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    os.utime(path)
    return file


def _crc(arrays: Iterable[NDArray[Any]]) -> int:
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(array).tobytes(), total)
    return total
