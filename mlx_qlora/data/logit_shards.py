"""What a teacher says at supervised places, as it lies on the disk: shards of records, and a card that says whose they are.

A record is found by the mark of the tokens up to its place (`layout.histories`): what a teacher foresees follows from these
alone, so that places that examples share are kept once, and every layout, order and epoch finds them.

A shard is a safetensors file, written aside, flushed and renamed; `card.json` is written after it in the same way, and only
the shards that it lists, with their sizes and checksums, are there. So a kill takes at most the shard that was being filled.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.errors import ConfigError, DataError, RunFolderError
from mlx_qlora.files import small_text

CARD = "card.json"
AGAIN = "mlx-qlora distill cache --config run.yaml"
_FORMAT = 1
_SHARDS = "logits-*.safetensors"
_WIDE = 1 << 16  # classes, from which on an id has a third byte
_MOST_CARD = 2**26
_LONGEST_HEADER = 2**16
_TYPES = {"F16": "<f2", "F32": "<f4", "U8": "u1", "U16": "<u2", "U64": "<u8"}


@dataclass(frozen=True)
class Records:
    """What a teacher says at N places: its k likeliest classes, the mass of the others, and M classes drawn from it."""

    marks: NDArray[np.uint64]  # [N]
    values: NDArray[np.float16]  # [N, k]: log-probabilities, the greatest first
    ids: NDArray[np.int32]  # [N, k]
    rests: NDArray[np.float32]  # [N, T]: log of the sum of exp(log-probability / temperature) over all other classes
    drawn: NDArray[np.float16]  # [N, M]: log-probabilities
    drawn_ids: NDArray[np.int32]  # [N, M]
    clipped: int = 0  # places of which a logit was clipped

    def __len__(self) -> int:
        return len(self.marks)


@dataclass(frozen=True)
class Card:
    """Of what a cache is, and how much of it there is."""

    teacher: str
    fingerprint: str  # of the teacher's arrays, without adapters
    adapters: str  # the digest of the teacher's adapters; "": it has none
    tokenizer: str  # the digest of the student's vocabulary, which made the tokens
    template: str  # the digest of the chat template
    data: str  # what was asked for last, `Corpus.digest`
    top_k: int
    samples: int
    temperatures: tuple[float, ...]
    logit_clip: float
    vocabulary: int  # classes that teacher and student have in common; the teacher's others were cut off
    teacher_vocabulary: int
    matmul: dict[str, int]  # how the teacher's weights were multiplied (`Loaded.matmul`): who goes on does it so, to the bit
    versions: dict[str, str]
    date: str
    across: bool = False  # whether its tokens are others than the student's: only their sorted probabilities mean something
    finished: bool = False  # whether all places that were asked for last are there
    places: int = 0
    clipped: int = 0  # of them, where a logit was clipped

    @property
    def place_bytes(self) -> int:
        """What a record takes on the disk, the shards' headers aside.

        >>> card = Card("", "", "", "", "", "", 64, 0, (2.0, 1.5, 1.0), 50.0, 151_936, 152_064, {}, {}, "")
        >>> card.place_bytes, replace(card, samples=8).place_bytes
        (340, 380)
        """
        id_bytes = 2 if self.vocabulary <= _WIDE else 3
        return 8 + (self.top_k + self.samples) * (2 + id_bytes) + 4 * len(self.temperatures)


# What makes the records; data and template only say which of them are there.
_OF_ALL = {
    "fingerprint": "the teacher", "adapters": "the teacher's adapters", "tokenizer": "the tokenizer", "top_k": "distill.top_k",
    "samples": "--samples", "temperatures": "distill.temperature, over the run", "logit_clip": "distill.logit_clip",
    "vocabulary": "the vocabulary in common", "across": "distill.loss: uld",
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    file: str
    places: int
    bytes: int
    crc: int
    clipped: int = 0

    def problem(self, folder: Path) -> str:
        """What is wrong with the file; empty where nothing is."""
        path, size, crc = folder / self.file, 0, 0
        try:
            with path.open("rb") as file:
                while block := file.read(2**20):
                    size, crc = size + len(block), zlib.crc32(block, crc)
        except OSError as error:
            return f"{path} can't be read: {error.strerror}"
        if size != self.bytes:
            return f"{path} has {size:,} bytes, the card says {self.bytes:,}"
        return "" if crc == self.crc else f"{path} is damaged: its checksum is another one"

    def arrays(self, folder: Path) -> dict[str, NDArray[Any]]:
        """Its arrays by name, read from the disk where they are looked at."""
        path = folder / self.file
        try:
            found = _mapped(path)
            if found["marks"].shape != (self.places,) or not {"values", "ids", "rests"} <= found.keys():
                raise ValueError("not of this kind")
            return found
        except OSError as error:
            raise DataError(f"{path}: can't be read: {error.strerror}. To make it again: {AGAIN}") from error
        except (ValueError, LookupError, TypeError, struct.error) as error:
            raise DataError(f"{path}: this shard is damaged. To make what was in it again: {AGAIN}") from error


def marks_of(folder: Path, shards: Sequence[Shard]) -> NDArray[np.uint64]:
    """Of all places, as they lie in the shards."""
    return np.concatenate([np.empty(0, np.uint64), *(np.array(each.arrays(folder)["marks"]) for each in shards)])


def _mapped(path: Path) -> dict[str, NDArray[Any]]:
    raw = np.memmap(path, np.uint8, "r")
    (length,) = struct.unpack("<Q", raw[:8].tobytes())
    if length > _LONGEST_HEADER:
        raise ValueError("no header")
    found = {}
    for name, told in json.loads(raw[8 : 8 + length].tobytes()).items():
        if name != "__metadata__":
            begin, end = (8 + length + at for at in told["data_offsets"])
            found[name] = raw[begin:end].view(_TYPES[told["dtype"]]).reshape(told["shape"])
    return found


def _joined(parts: Sequence[Records]) -> Records:
    arrays = {name: np.concatenate([getattr(each, name) for each in parts]) for name in _ARRAYS}
    return Records(**arrays, clipped=sum(each.clipped for each in parts))


_ARRAYS = [each.name for each in fields(Records) if each.name != "clipped"]


def packed(records: Records, vocabulary: int) -> bytes:
    """A shard."""
    from safetensors.numpy import save

    arrays: dict[str, NDArray[Any]] = {"marks": records.marks, "values": records.values, "rests": records.rests}
    arrays |= _narrow("ids", records.ids, vocabulary)
    if records.drawn.shape[1]:
        arrays |= {"drawn": records.drawn} | _narrow("drawn_ids", records.drawn_ids, vocabulary)
    return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def _narrow(name: str, ids: NDArray[np.int32], vocabulary: int) -> dict[str, NDArray[Any]]:
    low = {name: (ids & 0xFFFF).astype(np.uint16)}
    return low if vocabulary <= _WIDE else low | {f"{name}_high": (ids >> 16).astype(np.uint8)}


def wide(arrays: Mapping[str, NDArray[Any]], name: str, rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """Ids of some rows."""
    ids = arrays[name][rows].astype(np.int32)
    high = arrays.get(f"{name}_high")
    return ids if high is None else ids | high[rows].astype(np.int32) << 16


# The card


def read_card(folder: Path) -> tuple[Card, tuple[Shard, ...]]:
    try:
        text = small_text(folder / CARD, _MOST_CARD)
    except FileNotFoundError as error:
        raise DataError(f"distill.cache: {folder} is no cache: there is no {CARD} in it. To make one: {AGAIN}") from error
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{folder / CARD}: can't be read: {said}.") from error
    try:
        told = json.loads(text)
        kind = told["format"]
        if kind == _FORMAT:
            return _understood(told)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{folder / CARD}: this card is damaged, or was written by hand. To make all of it again: {AGAIN} --overwrite"
        ) from error
    raise DataError(f"{folder / CARD}: it is of format {kind}, and {_FORMAT} is read here. Make it again with {AGAIN}")


def matmul_of(folder: Path) -> dict[str, int]:
    """Of the cache that is there, if there is one."""
    try:
        return read_card(folder)[0].matmul
    except DataError:
        return {}


def _understood(told: dict[str, Any]) -> tuple[Card, tuple[Shard, ...]]:
    if told["checksum"] != _checksum(told):
        raise ValueError("damaged")
    own = {each.name: told["card"][each.name] for each in fields(Card)}
    return Card(**own | {"temperatures": tuple(own["temperatures"])}), tuple(Shard(**each) for each in told["shards"])


def _checksum(told: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps([told["card"], told["shards"]], sort_keys=True).encode())


def put(path: Path, content: bytes) -> None:
    """A file that is whole or not there, also after a power cut."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            _flush(file.fileno())
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise DataError(
            f"{path}: it can't be written: {error.strerror}. All before it is kept; the same command goes on."
        ) from error
    place = os.open(path.parent, os.O_RDONLY)
    with suppress(OSError):  # file systems without a flush for folders
        os.fsync(place)
    os.close(place)


def _flush(file: int) -> None:
    whole = getattr(fcntl, "F_FULLFSYNC", None) if sys.platform == "darwin" else None
    os.fsync(file) if whole is None else fcntl.fcntl(file, whole)


# Writing


@dataclass
class Writer:
    """Fills a cache, a shard after the other. While it is open, nobody else writes there."""

    folder: Path
    card: Card
    shard_bytes: int
    shards: list[Shard] = field(default_factory=list)
    problems: tuple[str, ...] = ()  # shards that were there and are not whole: they were taken away
    _waiting: list[Records] = field(default_factory=list)
    _lock: int = -1

    def marks(self) -> NDArray[np.uint64]:
        """Of all places that are there."""
        return marks_of(self.folder, self.shards)

    def add(self, records: Records) -> None:
        self._waiting.append(records)
        if sum(map(len, self._waiting)) * self.card.place_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits, as a shard of its own."""
        waiting = self._waiting
        if sum(map(len, waiting)):
            joined = _joined(waiting)
            content = packed(joined, self.card.vocabulary)
            name = _SHARDS.replace("*", f"{self._next():06d}")
            put(self.folder / name, content)
            written = Shard(name, len(joined), len(content), zlib.crc32(content), joined.clipped)
            self._write_card([*self.shards, written])
        self._waiting = []

    def _next(self) -> int:
        return 1 + max((int(each.file.split("-")[1].split(".")[0]) for each in self.shards), default=-1)

    def _write_card(self, shards: list[Shard], **changes: Any) -> None:
        places, clipped = sum(each.places for each in shards), sum(each.clipped for each in shards)
        card = replace(self.card, places=places, clipped=clipped, **changes)
        told: dict[str, Any] = {"format": _FORMAT, "card": asdict(card), "shards": [asdict(each) for each in shards]}
        told["card"]["temperatures"] = list(card.temperatures)
        put(self.folder / CARD, (json.dumps(told | {"checksum": _checksum(told)}, indent=1) + "\n").encode())
        self.card, self.shards = card, shards

    def finish(self) -> None:
        self.flush()
        self._write_card(self.shards, finished=True)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def open_writer(folder: Path, card: Card, shard_bytes: int, overwrite: bool = False) -> Writer:
    """Go on with what is there, if it is of the same teacher and settings; begin, if there is nothing."""
    require_folder(folder)
    kept = () if overwrite or not (folder / CARD).exists() else _of_the_same(folder, card)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RunFolderError(f"distill.cache: {folder} can't be made: {error.strerror}. Name another folder.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise RunFolderError(f"distill.cache: another process writes into {folder} just now. Wait for it.") from error
    problems = [(each, each.problem(folder)) for each in kept]
    whole = [each for each, problem in problems if not problem]
    writer = Writer(folder, card, shard_bytes, whole, tuple(problem for _, problem in problems if problem), _lock=lock)
    for path in (*folder.glob(_SHARDS), *folder.glob(f".{_SHARDS}.tmp")):
        if path.name not in {each.file for each in whole}:
            path.unlink()
    writer._write_card(whole)
    return writer


def require_folder(folder: Path) -> None:
    """Raise where something else lies there."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise RunFolderError(f"distill.cache: {folder} is a file; a folder is expected. Name another one.")
    others = [] if (folder / CARD).exists() or not folder.is_dir() else list(folder.iterdir())
    if any(each.name != f".{CARD}.tmp" for each in others):
        raise RunFolderError(f"distill.cache: {folder} holds something else than a cache. Name another folder.")


def _of_the_same(folder: Path, card: Card) -> Sequence[Shard]:
    """The shards that are there; raises where they are of another teacher or other settings."""
    kept, shards = read_card(folder)
    changed = [name for name in _OF_ALL if getattr(kept, name) != getattr(card, name)]
    if changed:
        lines = [f"  {_OF_ALL[name]}: {_said(getattr(kept, name))} there, {_said(getattr(card, name))} now" for name in changed]
        raise ConfigError(
            f"distill.cache: {folder} is of something else:\n" + "\n".join(lines) + "\n"
            "Name another folder, set what was set then, or say --overwrite: what is there goes then."
        )
    return shards


_TOLD = 16  # letters of a digest, which tell it from any other


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{each:g}" for each in value)
    if isinstance(value, str):
        return value[:_TOLD] or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
