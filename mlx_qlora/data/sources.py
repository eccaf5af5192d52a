"""Where rows come from: JSONL, JSON, CSV and Parquet files, folders of them, data sets of the hub.

A row carries its origin, `train.jsonl:17`, from here into every message about it. What is no row is handed on as a
`BadRow` with the reason, so that who reads decides whether it ends the run.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal, Protocol, cast

from mlx_qlora.assets import EMBEDDED, embedded_data
from mlx_qlora.errors import DataError, require

_MAX_LINE = 16 * 2**20  # bytes; a longer line is no training row, and must not fill the memory
_MAX_LIST = 2**30  # bytes of a JSON list, which is held in memory whole; and what is read to find the end of a line
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_EXAMPLES_BY = 2**16  # bytes of an object, within which its list of examples begins
_PIECE = 2**16  # bytes; longer texts come in pieces of about so many
_DOCUMENT_END = b"<|endoftext|>"  # alone in a line, it ends a document in a .txt file
_SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev", "eval"), "test": ("test",)}
SPLITS = tuple(_SPLITS)
_EXPECTED = "a folder with train.jsonl, a file (.jsonl, .json, .csv, .parquet, .txt; .gz too), or hub:owner/name"


@dataclass(frozen=True)
class Row:
    """A row as it stands in its file. The id says where: `train.jsonl:17`."""

    id: str
    value: dict[str, Any]
    begins: bool = True  # else it goes on where the row before ended: pieces of one long text
    ends: bool = True


@dataclass(frozen=True)
class BadRow:
    """A place in a file where a row should be, and why there is none."""

    id: str
    reason: str


# What columns can be called.
_KNOWN = {
    "target", "task",
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "question", "answer", "text",
    "system", "tools", "weight", "train", "rationale",
}  # fmt: skip


@dataclass(frozen=True)
class SourceConfig:
    """Where the examples come from."""

    data: str | tuple[str, ...] = ()
    """A folder with train and, if you have them, valid and test files, or of .txt files; a file (.jsonl, .json, .csv, .tsv,
    .parquet, .txt, .gz) or a pattern; hub:owner/name or hub:owner/name@split; embedded; or several of these."""
    data_weights: tuple[float, ...] = ()
    """With several sources: the share of each in an epoch, such as 3 1. Without it each example comes once."""
    format: Literal["auto", "messages", "sharegpt", "prompt", "alpaca", "question", "input", "text"] = "auto"
    """What the rows are; auto tells it from their keys, row by row."""
    fields: dict[str, str] = field(default_factory=dict)
    """Columns under other names, in pairs: prompt input completion target, if the columns are input and target."""
    malformed: Literal["raise", "skip"] = "raise"
    """What a row does that can't be used: end the run with a list of them, or be left out and counted."""
    malformed_limit: int = 100
    """With skip: more of them than this end the run all the same."""
    validation_share: float = 0.1
    """Share of the training rows that is split off where there are no validation rows; at most 2,000 of them."""
    data_cache: str = ""
    """Where prepared examples are kept: a folder, or off; without it .mlx_qlora beside the data."""
    streaming: bool = False
    """Read the training rows as they come instead of preparing them first; needs max_steps and validation rows."""
    shuffle_buffer: int = 10_000
    """With streaming: rows that are shuffled among each other."""

    def __post_init__(self) -> None:
        share, weights, sources = self.validation_share, self.data_weights, self.sources
        require(
            (0 < share < 1, "validation_share", share, "a number between 0 and 1"),
            (self.shuffle_buffer >= 1, "shuffle_buffer", self.shuffle_buffer, "a whole number from 1"),
            (self.malformed_limit >= 0, "malformed_limit", self.malformed_limit, "a whole number from 0"),
            (
                not weights or len(weights) == len(sources),
                "data_weights",
                weights,
                f"a number for each of {len(sources)} sources",
            ),
            (all(0 < weight < float("inf") for weight in weights), "data_weights", weights, "numbers above 0"),
            (
                not (other := set(self.fields) - _KNOWN),
                "fields",
                ", ".join(sorted(other)),
                f"names of {', '.join(sorted(_KNOWN))}",
            ),
            (len(set(sources)) == len(sources), "data", sources, "each source once (data_weights says how often)"),
        )

    @property
    def sources(self) -> tuple[str, ...]:
        return ((self.data,) if self.data else ()) if isinstance(self.data, str) else tuple(self.data)


class File(Protocol):
    """Something that rows are read from."""

    @property
    def name(self) -> str: ...

    def read(self) -> Iterator[Row | BadRow]: ...

    def fingerprint(self) -> dict[str, Any]:
        """What stays the same as long as the content does, without reading it."""
        ...


@dataclass(frozen=True)
class Source:
    """One entry of `data`: its files by split, and where prepared data may lie beside it."""

    name: str
    files: dict[str, tuple[File, ...]]
    beside: Path | None


def find(config: SourceConfig, training: bool = True) -> tuple[Source, ...]:
    """The sources of a run; no file is opened yet. Unless it is for training, any split will do."""
    if not config.sources:
        raise DataError(f"data: nothing came; name {_EXPECTED}.")
    found = _told_apart([_source(name, training) for name in config.sources])
    for name in (file.name for source in found for files in source.files.values() for file in files):
        if not name.isascii() and name != name.encode(errors="replace").decode():
            raise DataError(f"{name!a}: the name of this file is not UTF-8, so no message could say it; rename it.")
    return found


def _told_apart(sources: list[Source]) -> tuple[Source, ...]:
    """Files of one name in several sources go by their paths, so that no two rows have one id."""
    counts = Counter(file.name for source in sources for files in source.files.values() for file in files)

    def own(file: File) -> File:
        return replace(file, name=str(file.path)) if counts[file.name] > 1 and isinstance(file, DiskFile) else file

    return tuple(
        replace(source, files={split: tuple(map(own, files)) for split, files in source.files.items()}) for source in sources
    )


def _source(name: str, training: bool) -> Source:
    if name == EMBEDDED:
        return Source(name, _in_folder(embedded_data()), None)
    if name.startswith("hub:"):
        return _on_hub(name.removeprefix("hub:"), training)
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return Source(name, _in_folder(path, training), path)
        if path.is_file():
            return Source(name, {"train": (DiskFile(path, path.name),)}, path.parent)
        if path.exists():
            raise DataError(f"{path}: this is a pipe or a device; name {_EXPECTED}.")
        if path.is_symlink():
            raise DataError(f"{path}: this link leads to {os.readlink(path)}, where nothing is.")
    except OSError as error:
        raise DataError(f"{error.filename or path}: can't be read: {error.strerror}.") from error
    if glob.has_magic(name):
        found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True)) if Path(each).is_file()]
        if not found:
            raise DataError(f"{name}: no file is like this pattern.")
        return Source(name, {"train": _named(found)}, found[0].parent)
    hint = f" If a data set of the hub is meant: hub:{name}." if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
    raise DataError(f"{path}: there is no such file or folder. Name {_EXPECTED}.{hint}")


def _in_folder(folder: Path, training: bool = True) -> dict[str, tuple[File, ...]]:
    """train.jsonl and the like; a split may lie in several parts (train-00000-of-00002.parquet)."""
    files: dict[str, tuple[File, ...]] = {}
    for split, names in _SPLITS.items():
        found: list[Path] = []
        for own in names:  # valid.jsonl before dev.jsonl, where both are there
            like = re.compile(rf"{own}([-_.]\d.*)?({'|'.join(map(re.escape, _SUFFIXES))})(\.gz)?")
            found = found or [child for child in sorted(folder.iterdir()) if like.fullmatch(child.name) and child.is_file()]
        kinds = {"".join(child.suffixes[-2:]) if child.suffix == ".gz" else child.suffix for child in found}
        if len(kinds) > 1:
            both = ", ".join(child.name for child in found[:4])
            raise DataError(f"{folder}: {both} could all be the {split} rows; keep one, or name the file.")
        if found:
            files[split] = _named(found)
    if not files and (texts := _texts_in(folder)):
        return {"train": _named(texts)}
    if not files and not training and (tasks := _tasks_in(folder)):
        return {"test": _named(tasks)}
    if "train" not in files and (training or not files):
        names_here = sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))
        holds = ", ".join(names_here[:8] + ["..."] * (len(names_here) > 8)) or "nothing"
        raise DataError(f"{folder}: no train.jsonl in this folder (it holds {holds}). Name a folder that has one, or a file.")
    return files


def _texts_in(folder: Path) -> list[Path]:
    """The .txt files of a folder and of those in it, if it has no data of another kind."""
    others = [child for child in folder.iterdir() if child.suffix.lower() in _SUFFIXES and not is_plain_text(child)]
    found = [] if others else sorted(each for each in folder.rglob("*.txt*") if is_plain_text(each) and each.is_file())
    return [each for each in found if not any(part.startswith(".") for part in each.relative_to(folder).parts)]


def _tasks_in(folder: Path) -> list[Path]:
    """The files of a folder that has rows of several tasks, a file each; where they are of one kind."""
    found = sorted(each for each in folder.iterdir() if each.is_file() and each.suffix in (".json", ".jsonl", ".csv", ".tsv"))
    return found if len({each.suffix for each in found}) == 1 else []


def task_of(file: File) -> str:
    """The task that a file is of, by its name; none where it is called after a split.

    >>> [task_of(DiskFile(Path(name), name)) for name in ("bbh/navigate.json", "test-00001-of-2.parquet", "valid.jsonl.gz")]
    ['navigate', '', '']
    """
    name = Path(file.name).name
    stem = name[: name.index(".")] if "." in name[1:] else name
    splits = "|".join(each for names in _SPLITS.values() for each in names)
    return "" if re.fullmatch(rf"({splits})([-_]\d.*)?", stem) else stem


def _named(paths: Sequence[Path]) -> tuple[File, ...]:
    """Files with names that tell them apart."""
    names = [path.name for path in paths]
    alike = len(set(names)) < len(names)
    return tuple(DiskFile(path, str(path) if alike else path.name) for path in paths)


# Files


@dataclass(frozen=True)
class DiskFile:
    path: Path
    name: str

    def fingerprint(self) -> dict[str, Any]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path}: can't be read: {error.strerror}.") from error
        return {"path": str(self.path.resolve()), "size": found.st_size, "time_ns": found.st_mtime_ns, "inode": found.st_ino}

    def _open(self) -> IO[bytes]:
        return cast(IO[bytes], gzip.open(self.path)) if self.path.suffix == ".gz" else self.path.open("rb")

    def _look(self) -> None:
        """Say at once what a file of another kind is."""
        with self.path.open("rb") as file:
            start = file.read(4)
        kinds = {b"PK\x03\x04": "a zip file or a table of Excel; save it as CSV", b"\xff\xfe": "UTF-16; save it as UTF-8",
                 b"\xfe\xff": "UTF-16; save it as UTF-8", b"PAR1": "Parquet; name it .parquet"}  # fmt: skip
        if self.path.suffix != ".gz":
            kinds[b"\x1f\x8b"] = "gzip; name it .gz"
        for begins, what in kinds.items():
            if start.startswith(begins):
                raise DataError(f"{self.path}: this is {what}.")

    def read(self) -> Iterator[Row | BadRow]:
        """The rows. What is wrong with the file as a whole is a `DataError`."""
        suffixes = [suffix for suffix in self.path.suffixes if suffix != ".gz"]
        suffix = suffixes[-1].lower() if suffixes else ".jsonl"
        if suffix not in _SUFFIXES:
            raise DataError(
                f"{self.path}: {suffix} files are not read here; {', '.join(_SUFFIXES)} are, all but the last with .gz, too."
            )
        try:
            if suffix == ".parquet":
                yield from _parquet(self.path, self.name)
                return
            self._look()
            with self._open() as file:
                if suffix == ".txt":
                    yield from _documents(file, self.name)
                elif suffix in (".csv", ".tsv"):
                    yield from _csv(file, self.name)
                elif _first_letter(file) == b"[" and (suffix == ".json" or _goes_on(file)):
                    yield from _array(file, self.name)
                elif suffix == ".json" and (begin := _list_of_examples(file)):
                    yield from _array(file, self.name, begin)
                elif suffix == ".json" and _goes_on(file):
                    raise DataError(f"{self.path}: one object came; a list of rows, or a row a line, is expected.")
                else:
                    yield from _lines(file, self.name)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self.path}: damaged gzip: {error}.") from error
        except OSError as error:
            raise DataError(f"{self.path}: can't be read: {error.strerror or error}.") from error


def _first_letter(file: IO[bytes]) -> bytes:
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return start[:1]


def _goes_on(file: IO[bytes]) -> bool:
    """Whether the first line begins a list or an object that it does not end."""
    line = file.readline(_MAX_LINE).strip().removeprefix(b"\xef\xbb\xbf")
    more = file.read(1)
    file.seek(0)
    if not more or line[:1] not in (b"[", b"{"):
        return False
    try:
        _JSON.decode(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return True
    return False


_BEFORE_EXAMPLES = re.compile(  # plain values only, such as that of a canary
    rb'[\s\xef\xbb\xbf]*\{(?:\s*"[^"\\]*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[\w.+-]+)\s*,)*\s*"examples"\s*:\s*\['
)


def _list_of_examples(file: IO[bytes]) -> int:
    """Where in a file that is one object the list begins that it names "examples", as tasks of BIG-Bench do; 0: nowhere."""
    start = file.read(_EXAMPLES_BY)
    file.seek(0)
    found = _BEFORE_EXAMPLES.match(start)
    return found.end() - 1 if found else 0


def _lines(file: IO[bytes], name: str) -> Iterator[Row | BadRow]:
    number = 0
    while line := file.readline(_MAX_LINE + 1):
        number += 1
        id = f"{name}:{number}"
        if len(line) > _MAX_LINE:
            size = len(line)
            while not line.endswith(b"\n") and (line := file.readline(_MAX_LINE)):
                if (size := size + len(line)) > _MAX_LIST:  # a small gzip file can hold more than a day can read
                    raise DataError(f"{id}: a line of more than {_MAX_LIST >> 20:,} MB; one JSON object a line is expected.")
            yield BadRow(id, f"a line of {size / 2**20:.0f} MB came; up to {_MAX_LINE // 2**20} MB are expected. Split it.")
        elif line.strip():
            yield _parsed(line, id, ended=line.endswith(b"\n"))


def _parsed(line: bytes, id: str, *, ended: bool) -> Row | BadRow:
    try:
        value = _JSON.decode(line.decode("utf-8-sig" if id.endswith(":1") else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(id, f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8.")
    except _Twice as error:
        return BadRow(id, str(error))
    except (ValueError, RecursionError) as error:
        cut = "" if ended else " The file ends in this line; was it written to its end?"
        return BadRow(id, f"not JSON: {error or 'nested too deeply'}; one object a line is expected.{cut}")
    if not isinstance(value, dict):
        return BadRow(id, f'{_kind(value)} came, an object such as {{"messages": [...]}} is expected.')
    return Row(id, value)


def _array(file: IO[bytes], name: str, begin: int = 0) -> Iterator[Row | BadRow]:
    """A JSON file that is one list, or has one from a byte on. It is held in memory whole; JSONL is not."""
    raw = file.read(_MAX_LIST + 1)
    if len(raw) > _MAX_LIST:
        raise DataError(f"{name}: a list of more than {_MAX_LIST >> 20:,} MB came; write it as .jsonl, one object a line.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8; save the file as UTF-8.") from error
    place, line, counted = text.index("[", len(raw[:begin].decode("utf-8-sig"))) + 1, 1, 0
    gap = re.compile(r"[\s,]*")
    found: list[tuple[int, Any]] = []
    reason = ""
    while True:
        place = gap.match(text, place).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, place), place
        if text[place : place + 1] in ("]", ""):
            reason = "" if text[place:].startswith("]") else "the list has no end; was the file written to its end?"
            break
        begin = place
        try:
            value, place = _JSON.raw_decode(text, place)
        except _Twice as error:
            reason = str(error)
            break
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error or 'nested too deeply'}; a list of objects is expected. What follows is not read."
            break
        found.append((line, value if place - begin <= _MAX_LINE else _TOO_LARGE))
    # Rows that begin in lines of their own are named by these, else by their place in the list.
    by_line = all(a < b for (a, _), (b, _) in pairwise(found))
    for number, (own, value) in enumerate(found, start=1):
        id = f"{name}:{own if by_line else number}"
        if isinstance(value, dict):
            yield Row(id, value)
        elif value is _TOO_LARGE:
            yield BadRow(id, f"more than {_MAX_LINE >> 20} MB came, less is expected. Split it.")
        else:
            yield BadRow(id, f'{_kind(value)} came, an object such as {{"messages": [...]}} is expected.')
    if reason:
        yield BadRow(f"{name}:{line}", reason)


_TOO_LARGE = object()


def is_plain_text(path: Path) -> bool:
    """Whether a file has documents as they stand, in no rows."""
    return [suffix.lower() for suffix in path.suffixes if suffix != ".gz"][-1:] == [".txt"]


def _documents(file: IO[bytes], name: str) -> Iterator[Row | BadRow]:
    """The texts of a file: all of it is one, but where a line that is <|endoftext|> ends one. Long ones come in pieces, which
    are cut at ends of lines where there are any."""
    held: Row | None = None  # until it is known whether the text goes on
    for one in _pieces(file, name):
        if held is not None:
            yield replace(held, ends=isinstance(one, BadRow) or one.begins)
        held = one if isinstance(one, Row) else None
        if isinstance(one, BadRow):
            yield one
    if held is not None:
        yield held


def _pieces(file: IO[bytes], name: str) -> Iterator[Row | BadRow]:
    number, began, count = 0, 1, 0  # lines read, the line that the text begins with, its pieces so far
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines: list[bytes] = []
    size, broken = 0, False
    while True:
        line = file.readline(_PIECE)
        over = not line or line.strip() == _DOCUMENT_END
        if not over:
            lines.append(line)
            size += len(line)
        if over or size >= _PIECE:
            raw, lines, size = b"".join(lines), [], 0
            try:
                text = "" if broken else decoder.decode(raw, final=over)
            except UnicodeDecodeError as error:
                own = number - raw.count(b"\n") + raw.count(b"\n", 0, error.start) + 1
                yield BadRow(f"{name}:{own}", "not UTF-8; save the file as UTF-8. This text is read no further.")
                text, broken = "", True
            text = text if count else text.lstrip("\r\n")
            text = text.rstrip("\r\n") if over else text
            if text:
                count += 1
                yield Row(f"{name}:{began}" + (f"+{count}" if count > 1 else ""), {"text": text}, begins=count == 1)
        number += line.endswith(b"\n")
        if over:
            began, count, broken = number + 1, 0, False
            decoder = codecs.getincrementaldecoder("utf-8")()
        if not line:
            return


def _csv(file: IO[bytes], name: str) -> Iterator[Row | BadRow]:
    """A table whose first line names the columns; its separator is what stands most often in that line."""
    head = file.readline(_MAX_LINE).decode("utf-8", "replace")
    file.seek(0)
    delimiter = max(",;\t|", key=head.count)
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_LINE))
    wrong: list[BadRow] = []

    size = 0  # of the row that is being read, which can have many lines

    def decoded() -> Iterator[str]:
        nonlocal size
        number = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            if (size := size + len(line)) > _MAX_LINE:
                raise DataError(f"{name}:{number}: a row of more than {_MAX_LINE // 2**20} MB; is a quotation mark missing?")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                if number == 1:
                    raise DataError(f"{name}:1: not UTF-8 (byte {error.start + 1}); save the file as UTF-8.") from error
                wrong.append(BadRow(f"{name}:{number}", f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8."))
                yield "\n"

    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    columns: list[str] = []
    while True:
        id = f"{name}:{reader.line_num + 1}"
        size = 0
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield BadRow(id, f"not CSV: {error}.")
            continue
        yield from wrong
        wrong.clear()
        if fields is None:
            return
        if not columns:
            columns = [column.strip().lower() if column.strip().lower() in _KNOWN else column.strip() for column in fields]
            if len(set(columns)) < len(columns):
                raise DataError(f"{name}:1: a column stands twice in {', '.join(columns)}; the first line names the columns.")
        elif len(fields) == len(columns):
            yield Row(id, dict(zip(columns, fields, strict=True)))
        elif fields:
            yield BadRow(id, f"{len(fields)} fields came, {len(columns)} are expected: {', '.join(columns)}.")


def _parquet(path: Path, name: str) -> Iterator[Row | BadRow]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f'{path}: for Parquet install pyarrow: pip install "mlx-qlora[parquet]".') from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                # Arrow cuts a batch where a column of it would have 2 GB. As Python's objects its rows have more, all the
                # more where many are one entry of a dictionary; so large ones are taken one by one.
                alone = batch.nbytes > 2**20
                for part in [batch.slice(place, 1) for place in range(len(batch))] if alone else [batch]:
                    for value in part.to_pylist():
                        number += 1
                        if alone and (size := _letters(value)) > _MAX_LINE:
                            reason = f"a row of {size >> 20} MB came; up to {_MAX_LINE >> 20} MB are expected. Split it."
                            yield BadRow(f"{name}:{number}", reason)
                        else:
                            yield Row(f"{name}:{number}", _without_nulls(value))
    except (pyarrow.ArrowException, pyarrow.ArrowMemoryError) as error:
        raise DataError(f"{path}: can't be read as Parquet: {str(error).splitlines()[0]}") from error


def _letters(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_letters, value.values()))
    return sum(map(_letters, value)) if isinstance(value, list) else len(value) if isinstance(value, str | bytes) else 8


def _without_nulls(value: Any) -> Any:
    """Parquet gives every row every column; one that is null was not given."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


class _Twice(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Twice(f"the key {twice!r} stands twice in one object; keep one.")
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


# The hub


@dataclass(frozen=True)
class HubFile:
    """A split of a data set of the hub, as `datasets` has it on this machine."""

    data: Any
    name: str

    def fingerprint(self) -> dict[str, Any]:
        return {"fingerprint": self.data._fingerprint}

    def read(self) -> Iterator[Row | BadRow]:
        for number, value in enumerate(self.data, start=1):
            yield Row(f"{self.name}:{number}", _without_nulls(value))


def _on_hub(name: str, training: bool) -> Source:
    """`owner/name`, all splits that it has, or `owner/name@split` for the training rows."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'hub:{name}: for data sets of the hub install datasets: pip install "mlx-qlora[hub]".') from error
    name, _, wanted = name.partition("@")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise DataError(f"hub:{name}: hub:owner/name or hub:owner/name@split is expected.")
    try:
        # From version 4 on `datasets` runs no script of a data set's own; an older one is told not to, and refuses.
        found = datasets.load_dataset(name, split=wanted or None, trust_remote_code=False)
    except Exception as error:  # whatever a missing name, a missing split or a missing network makes it raise
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(f"hub:{name}: the hub gave nothing: {reason}. Check the name, the split and the connection.") from error
    if wanted:
        return Source(f"hub:{name}@{wanted}", {"train": (HubFile(found, f"{name}@{wanted}"),)}, None)
    files: dict[str, tuple[File, ...]] = {}
    for split, names in _SPLITS.items():
        if own := next((each for each in names if each in found), None):
            files[split] = (HubFile(found[own], f"{name}@{own}"),)
    if "train" not in files and (training or not files):
        raise DataError(
            f"hub:{name}: it has the splits {', '.join(found)} and no train; name one as hub:{name}@{next(iter(found))}."
        )
    return Source(f"hub:{name}", files, None)


def read(files: Iterable[File]) -> Iterator[Row | BadRow]:
    """The rows of several files, in their order."""
    for file in files:
        yield from file.read()
