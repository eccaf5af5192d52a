"""Examples are made once and kept: memory-mapped tokens and weights with an index, beside the data.

It is read only if it belongs to whoever runs this, to the owner of the data, or to root: others could have written into
it what is not in the data. Nothing in it names a file.

A prepared folder is found by what went into it other than the content (names of files, settings, tokenizer, template,
this code), and is taken only if the content is the same: by size, time and inode of each file, as git does, and where these
differ by a digest. It is written aside and renamed; one that is not whole is made again. Each example carries a
checksum that is looked at whenever it is read.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import stat
import struct
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_qlora.data.order import shuffled
from mlx_qlora.data.render import Account, Refusals, RenderConfig, Renderer, refused, too_long
from mlx_qlora.data.sources import DiskFile, File, Source, SourceConfig, read
from mlx_qlora.data.tokens import Encoded, replaced
from mlx_qlora.errors import DataError
from mlx_qlora.files import small_text
from mlx_qlora.records import Example

_FOLDER = ".mlx_qlora"
_KEPT = 6  # prepared folders of the same files, for other settings
_INDEX = np.dtype(
    [
        ("token", "<u8"), ("span", "<u8"), ("line", "<u8"), ("hash", "<u8"), ("prompt", "<u8"), ("length", "<u4"),
        ("spans", "<u4"), ("supervised", "<u4"), ("name", "<u4"), ("part", "<u4"), ("crc", "<u4"),
    ]
)  # fmt: skip
_PACK = struct.Struct("<QQQQQIIIIII").pack
_SPAN = np.dtype([("begin", "<u4"), ("end", "<u4"), ("weight", "<f4"), ("target", "<i4")])
_ITSELF = -1  # as target: each token of the span is its own
_STALE_S = 3600.0
_MOST_MANIFEST = 2**26
_PACK_SPAN = struct.Struct("<IIfi").pack
_FILES = ("tokens.bin", "spans.bin", "index.bin")
MOST_SPLIT_OFF = 2000  # rows for validation, however many there are
_CONTINUED = 1 << 31  # in `part`: a piece that goes on where the one before it ended, in the same document
_NAMED = 1 << 30  # in `part`: one of the tasks that a row is trained for
_TASKS = ("rationale", "answer")
TASK_ENDS = tuple(f"#{task}" for task in _TASKS)  # of the ids of such examples


class ExampleSet(Protocol):
    """Examples by number, with what can be known of them without reading them."""

    @property
    def lengths(self) -> NDArray[np.integer[Any]]: ...

    @property
    def supervised(self) -> NDArray[np.integer[Any]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Example: ...


class Prepared:
    """The examples of a prepared folder, read as they are asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any], passing: bool = False):
        self.folder = folder
        self._in_pieces: bool = manifest["in_pieces"]
        self.account = Account.from_json(manifest["account"])
        self._names: list[str] = manifest["names"]
        if passing:  # nothing is to be kept: the folder goes away with this object
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._index = _mapped(folder / "index.bin", _INDEX)
        self._tokens = _mapped(folder / "tokens.bin", np.dtype(manifest["token_type"]))
        self._spans = _mapped(folder / "spans.bin", _SPAN)
        self._verified = np.zeros(len(self._index), bool)  # whose checksum was looked at by `part`

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Example:
        at = self._index[number]
        tokens, spans = self._stored(at)
        self._require_sound(at, tokens, spans)
        whole = tokens.astype(np.int32)
        return Example(self._id(at), whole, _weights(spans, 0, len(tokens)), replaced(whole, _targets(spans)))

    def part(self, number: int, begin: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """(tokens, weights) of an example from one place to another, or to its end. Its checksum is looked at once."""
        at = self._index[number]
        tokens, spans = self._stored(at)
        if not self._verified[number]:
            self._require_sound(at, tokens, spans)
            self._verified[number] = True
        weights = _weights(spans, begin, min(end, len(tokens)))
        if begin == 0 and len(weights) and at["part"] >= _CONTINUED:
            weights[0] = _weights(spans, 1, 2)[0]  # as the next one: it has something to be predicted from, the piece before
        return tokens[begin:end].astype(np.int32), weights

    @property
    def firsts(self) -> NDArray[np.int64] | None:
        """The examples that a document begins with; None if these are all."""
        return np.flatnonzero(self.begins) if self._in_pieces else None

    @property
    def documents(self) -> int:
        """How many texts there are, of which long ones are in several pieces."""
        return int(self.begins.sum()) if self._in_pieces else len(self)

    @property
    def begins(self) -> NDArray[np.bool_]:
        """Of each example, whether a document begins with it."""
        begins: NDArray[np.bool_] = self._index["part"] < _CONTINUED
        return begins

    def _stored(self, at: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """(tokens, spans) of an example, as they lie on the disk."""
        tokens = self._tokens[int(at["token"]) : int(at["token"]) + int(at["length"])]
        return tokens, self._spans[int(at["span"]) : int(at["span"]) + int(at["spans"])]

    def _require_sound(self, at: Any, tokens: NDArray[Any], spans: NDArray[Any]) -> None:
        if _checksum(at, tokens.tobytes(), spans.tobytes()) != at["crc"]:
            (self.folder / "manifest").unlink(missing_ok=True)
            raise DataError(f"{self.folder}: the prepared data is damaged at {self._id(at)}. Start again; it is made anew.")

    @property
    def is_sound(self) -> bool:
        """Whether names, account and index fit each other: checksums hold for what somebody wrote by hand, too."""
        names, account = self._names, self.account
        return (
            isinstance(names, list)
            and all(isinstance(name, str) for name in (*names, *account.refused))
            and all(type(getattr(account, each.name)) is int for each in fields(Account) if each.type == "int")
            and account.examples == len(self)
            and int(self._index["name"].max(initial=0)) < max(len(names), 1)
        )

    @property
    def lengths(self) -> NDArray[np.integer[Any]]:
        return self._index["length"]

    @property
    def supervised(self) -> NDArray[np.integer[Any]]:
        return self._index["supervised"]

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """Of each example's tokens."""
        return self._index["hash"]

    @property
    def prompts(self) -> NDArray[np.uint64]:
        """Of each example's tokens before the first that is trained; 0 where these say nothing."""
        return self._index["prompt"]

    @property
    def sums(self) -> NDArray[np.uint32]:
        """A checksum of each example: its tokens, its weights, where it comes from."""
        return self._index["crc"]

    def id(self, number: int) -> str:
        return self._id(self._index[number])

    @property
    def rows(self) -> NDArray[np.int64]:
        """A number for each example's row, the same for examples of one row."""
        own = self._index
        new = np.ones(len(own), bool)
        new[1:] = (own["line"][1:] != own["line"][:-1]) | (own["name"][1:] != own["name"][:-1])
        numbers: NDArray[np.int64] = np.cumsum(new) - 1
        return numbers

    def _id(self, at: Any) -> str:
        number = int(at["part"])
        named = _TASKS[number % 2] if _NAMED <= number < _CONTINUED else number
        part = f"+{number - _CONTINUED}" if number >= _CONTINUED else f"#{named}" if number else ""
        return f"{self._names[int(at['name'])]}:{at['line']}{part}"


class Chosen:
    """Some examples of a set."""

    def __init__(self, whole: Prepared, numbers: NDArray[np.int64]):
        self._whole, self._numbers = whole, numbers

    @property
    def hashes(self) -> NDArray[np.uint64]:
        return self._whole.hashes[self._numbers]

    @property
    def prompts(self) -> NDArray[np.uint64]:
        return self._whole.prompts[self._numbers]

    @property
    def sums(self) -> NDArray[np.uint32]:
        return self._whole.sums[self._numbers]

    def id(self, number: int) -> str:
        return self._whole.id(int(self._numbers[number]))

    def part(self, number: int, begin: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        return self._whole.part(int(self._numbers[number]), begin, end)

    @property
    def firsts(self) -> NDArray[np.int64] | None:
        return None if self._whole.firsts is None else np.flatnonzero(self._whole.begins[self._numbers])

    @property
    def documents(self) -> int:
        return int(self._whole.begins[self._numbers].sum())

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Example:
        return self._whole[int(self._numbers[number])]

    @property
    def lengths(self) -> NDArray[np.integer[Any]]:
        return self._whole.lengths[self._numbers]

    @property
    def supervised(self) -> NDArray[np.integer[Any]]:
        return self._whole.supervised[self._numbers]


class Joined:
    """Several sets, one after another."""

    def __init__(self, sets: Sequence[Prepared | Chosen]):
        self._sets = sets
        self._ends = np.cumsum([len(each) for each in sets])

    @property
    def hashes(self) -> NDArray[np.uint64]:
        return np.concatenate([each.hashes for each in self._sets])

    @property
    def prompts(self) -> NDArray[np.uint64]:
        return np.concatenate([each.prompts for each in self._sets])

    @property
    def sums(self) -> NDArray[np.uint32]:
        return np.concatenate([each.sums for each in self._sets])

    @property
    def documents(self) -> int:
        return sum(each.documents for each in self._sets)

    def id(self, number: int) -> str:
        own, within = self._place(number)
        return self._sets[own].id(within)

    def _place(self, number: int) -> tuple[int, int]:
        own = int(np.searchsorted(self._ends, number, side="right"))
        return own, number - (int(self._ends[own - 1]) if own else 0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Example:
        own, within = self._place(number)
        return self._sets[own][within]

    @property
    def lengths(self) -> NDArray[np.integer[Any]]:
        return np.concatenate([each.lengths for each in self._sets])

    @property
    def supervised(self) -> NDArray[np.integer[Any]]:
        return np.concatenate([each.supervised for each in self._sets])


KeptSet = Prepared | Chosen | Joined


class InMemory(list[Example]):
    """Examples that are there already."""

    @property
    def lengths(self) -> NDArray[np.integer[Any]]:
        return np.array([len(example.tokens) for example in self], np.int64)

    @property
    def supervised(self) -> NDArray[np.integer[Any]]:
        return np.array([np.count_nonzero(example.weights) for example in self], np.int64)


@dataclass(frozen=True)
class Preparation:
    """Prepares sources with one tokenizer and one set of settings."""

    source: SourceConfig
    render: RenderConfig
    renderer: Renderer
    keep: str = ""  # a folder for prepared data; "" beside the data; "off" nowhere
    progress: Callable[[int], None] = lambda rows: None
    strict: bool = True  # stop reading where the list of refused rows is full

    def prepare(self, source: Source, split: str) -> tuple[Prepared, bool]:
        """(the examples of a source's split, whether they were there already).

        If `strict`, raises what training is refused for; nothing is kept then. The test split trains nothing.
        """
        files = source.files[split]
        folder = self._folder(source, files)
        judged = self.strict and split != "test"
        if folder is not None and (found := self._open(folder, files)) is not None:
            if judged:
                self._judge(found.account, files)
            return found, True
        return self._make(folder, files, judged), False

    def _judge(self, account: Account, files: Sequence[File]) -> None:
        if reason := self.refusal(account, files):
            raise DataError(reason)

    def refusal(self, account: Account, files: Sequence[File]) -> str | None:
        """Why training with these examples would be refused, if it would."""
        where = _where(files)
        if reason := refused(account, self.source):
            return reason
        if account.rows == 0:
            return f"{where}: this file has no rows; one JSON object a line is expected, or text in a .txt file."
        if account.long_rows and self.render.truncation == "error":
            return too_long(account, self.render)
        if not account.examples:
            return (
                f"{where}: none of the {account.rows} rows has anything to train within max_seq_length "
                f"{self.render.max_seq_length} ({account.long_rows} are longer). "
                "Raise max_seq_length, or look whether the answers are there."
            )
        return None

    # The folder

    def _folder(self, source: Source, files: Sequence[File]) -> Path | None:
        if self.keep == "off" or (source.beside is None and not self.keep and all(isinstance(f, DiskFile) for f in files)):
            return None
        kept = source.beside is not None and os.path.lexists(source.beside / _FOLDER)
        beside = not self.keep and source.beside is not None and (kept or os.access(source.beside, os.W_OK))
        first = Path(files[0].name).name.split(".")[0]
        name = f"{first}-{_digest(' '.join(file.name for file in files).encode())[:4]}-{self._key(files, not beside)}"
        if beside and source.beside is not None:
            return source.beside / _FOLDER / name
        cache = self.keep or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mlx_qlora"
        return Path(cache).expanduser() / name

    def _key(self, files: Sequence[File], elsewhere: bool) -> str:
        told = {
            "names": [file.name for file in files],
            "paths": [str(file.path.absolute()) for file in files if isinstance(file, DiskFile)] if elsewhere else [],
            "render": asdict(self.render),
            "rows": [self.source.format, self.source.fields],
            "tokenizer": _tokenizer_digest(self.renderer.tokenizer),
            "code": _code_digest(),
        }
        return _digest(json.dumps(told, sort_keys=True, default=str).encode())[:16]

    def _open(self, folder: Path, files: Sequence[File]) -> Prepared | None:
        """What lies in the folder, if it is whole and of this content."""
        try:
            if not _is_own(folder, files):
                return None
            manifest = _read_manifest(folder)
            renewed = False
            for name in _FILES:
                kept, found = manifest["files"][name], (folder / name).stat()
                if found.st_size != kept["size"]:
                    return None
                if found.st_mtime_ns != kept["time_ns"]:  # copied, or written to
                    if _crc(folder / name) != kept["crc"]:
                        return None
                    kept["time_ns"], renewed = found.st_mtime_ns, True
            now = [file.fingerprint() for file in files]
            if manifest["from"] != now:
                if manifest["content"] != _content_digest(files) or now != [file.fingerprint() for file in files]:
                    return None
                manifest["from"], renewed = now, True
            made = Prepared(folder, manifest)
            if not made.is_sound:
                return None
            with suppress(OSError):  # a folder that may only be read serves all the same
                if renewed:
                    _write_manifest(folder, manifest)
                os.utime(folder)
            return made
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            return None  # whatever is wrong with it: it is made anew

    def _make(self, folder: Path | None, files: Sequence[File], judged: bool) -> Prepared:
        try:
            if folder is None:
                aside = Path(tempfile.mkdtemp(prefix="mlx_qlora-"))
            else:
                aside = folder.parent / f".writing-{os.getpid()}-{time.time_ns()}"
                aside.mkdir(parents=True)
        except OSError as error:
            raise _cant_keep(folder or Path(tempfile.gettempdir(), "x"), error) from error
        try:
            manifest = self._write(aside, files, judged)
            if judged:
                self._judge(Account.from_json(manifest["account"]), files)
            made = Prepared(aside, manifest, passing=folder is None)  # what is mapped stays, whatever others do
            if folder is None:
                return made
            _remove(folder)
            aside.rename(folder)
            made.folder = folder
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if folder is None:
                raise
            with suppress(OSError):  # it may hold other data
                folder.parent.rmdir()
            # Another process may have made the same at the same time.
            if isinstance(error, OSError) and (found := self._open(folder, files)) is not None:
                return found
            if isinstance(error, OSError):  # what is wrong with the data is a DataError
                raise _cant_keep(folder, error) from error
            raise
        _forget_old(folder)
        return made

    def _write(self, folder: Path, files: Sequence[File], judged: bool) -> dict[str, Any]:
        before = [file.fingerprint() for file in files]
        account, refusals = Account(), Refusals(stop=judged and self.source.malformed == "raise")
        token_type = np.dtype("<u2") if _greatest_id(self.renderer.tokenizer) < 2**16 else np.dtype("<u4")
        names: dict[str, int] = {}
        in_pieces = False
        with (folder / "tokens.bin").open("wb") as tokens, (folder / "spans.bin").open("wb") as spans, (
            folder / "index.bin"
        ).open("wb") as index:  # fmt: skip
            token_place = span_place = 0
            for id, made in self.renderer.encoded(read(files), account, refusals):
                raw = made.tokens.astype(token_type).tobytes()
                packed = b"".join(_PACK_SPAN(*span) for span in _stored_spans(made))
                name, line, part = _parts(id)
                in_pieces = in_pieces or part >= _CONTINUED
                begun = made.spans[0][0] * token_type.itemsize  # where training begins
                known = (
                    token_place, span_place, line, _hash(raw, 0), _hash(raw[:begun]), len(made.tokens),
                    len(packed) // _SPAN.itemsize,
                    made.supervised, names.setdefault(name, len(names)), part,
                )  # fmt: skip
                index.write(_PACK(*known, zlib.crc32(packed, zlib.crc32(raw, zlib.crc32(_PACK(*known, 0))))))
                tokens.write(raw)
                spans.write(packed)
                token_place += len(made.tokens)
                span_place += len(packed) // _SPAN.itemsize
                if account.examples % 256 == 0:
                    self.progress(account.rows)
            for file in (tokens, spans, index):
                file.flush()
                os.fsync(file.fileno())
        content = _content_digest(files)
        if before != [file.fingerprint() for file in files]:
            raise DataError(f"{_where(files)}: the file changed while it was read. Start again once it is written.")
        manifest = {
            "from": before,
            "content": content,
            "token_type": token_type.str,
            "in_pieces": in_pieces,
            "names": list(names),
            "account": account.to_json(),
            "files": {name: _kept(folder / name) for name in _FILES},
        }
        _write_manifest(folder, manifest)
        return manifest


def split_off(made: Prepared, share: float, seed: int) -> tuple[Chosen, Chosen, int]:
    """(training, validation, rows of the latter): a seeded share of the rows; examples of one row stay together."""
    rows = made.rows
    count = int(rows[-1]) + 1 if len(rows) else 0
    if count < 2:
        where = made.id(0) if count else str(made.folder)
        raise DataError(f"{where}: this is the only row, and none can be split off for validation. Give a valid.jsonl.")
    number = min(max(1, round(share * count)), count - 1, MOST_SPLIT_OFF)
    valid = np.zeros(count, bool)
    valid[shuffled(np.arange(number), count, (seed, 0x5917))] = True
    chosen = valid[rows]
    return Chosen(made, np.flatnonzero(~chosen)), Chosen(made, np.flatnonzero(chosen)), number


def row_of(id: str) -> str:
    """The id of the row that an example was made of.

    >>> row_of("train.jsonl:17#2")
    'train.jsonl:17'
    """
    name, _, place = id.rpartition(":")
    return f"{name}:{place.partition('#')[0].partition('+')[0]}"


def _parts(id: str) -> tuple[str, int, int]:
    """(name, line, part) of an id such as train.jsonl:17#2, the second example of a row, or book.txt:1+2, a document's second
    piece."""
    name, _, place = id.rpartition(":")
    line, _, part = place.partition("#")
    line, _, piece = line.partition("+")
    if part in _TASKS:
        return name, int(line), _NAMED + _TASKS.index(part)
    return name, int(line), int(piece) + _CONTINUED if piece else int(part or 0)


def _weights(spans: NDArray[Any], begin: int, end: int) -> NDArray[np.float32]:
    """The weights of tokens from one place to another."""
    weights = np.zeros(max(0, end - begin), np.float32)
    for first, last, weight, _ in spans.tolist():
        weights[max(0, first - begin) : max(0, last - begin)] = weight
    return weights


def _stored_spans(made: Encoded) -> Iterator[tuple[int, int, float, int]]:
    """The spans with their targets: a place that is not its own target is a span of its own."""
    for first, last, weight in made.spans:
        for place in sorted(place for place in made.targets if first <= place < last):
            if first < place:
                yield first, place, weight, _ITSELF
            yield place, place + 1, weight, made.targets[place]
            first = place + 1
        if first < last:
            yield first, last, weight, _ITSELF


def _targets(spans: NDArray[Any]) -> dict[int, int]:
    """What is predicted where, as far as it is another than the token there."""
    other = spans[spans["target"] != _ITSELF]
    return dict(zip(other["begin"].tolist(), other["target"].tolist(), strict=True))


def _mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file can't be mapped
        return np.empty(0, kind)
    return np.memmap(path, kind, "r")


def _hash(raw: bytes, least: int = 16) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") if len(raw) > least else 0


def _checksum(at: Any, tokens: bytes, spans: bytes) -> int:
    """Of an example and of what the index says of it, its last four bytes aside."""
    return zlib.crc32(spans, zlib.crc32(tokens, zlib.crc32(at.tobytes()[:-4] + bytes(4))))


def _kept(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"size": found.st_size, "time_ns": found.st_mtime_ns, "crc": _crc(path)}


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _content_digest(files: Sequence[File]) -> str:
    whole = hashlib.sha256()
    for file in files:
        if isinstance(file, DiskFile):
            try:
                with file.path.open("rb") as raw:
                    while block := raw.read(2**20):
                        whole.update(block)
            except OSError as error:
                raise DataError(f"{file.path}: can't be read: {error.strerror}.") from error
        else:
            whole.update(json.dumps(file.fingerprint()).encode())
        whole.update(b"\0")
    return whole.hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    more = map(str, (getattr(tokenizer, "chat_template", None), tokenizer.bos_token_id, tokenizer.eos_token_id))
    return _digest("\0".join((vocabulary, *more)).encode())


def _greatest_id(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) if hasattr(tokenizer, "get_vocab") else 2**31


def _code_digest() -> str:
    """Of the code that makes examples: other code, other examples."""
    from importlib.metadata import version

    here = Path(__file__).parent
    names = ("sources", "formats", "templates", "chat", "chain", "thoughts", "tokens", "render", "prepare")
    code = b"".join((here / f"{name}.py").read_bytes() for name in names)
    return _digest(code + version("transformers").encode())


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Last of all. Its first line is the checksum of the others."""
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    aside = folder / "manifest.tmp"
    with aside.open("w", encoding="utf-8") as file:
        file.write(f"{zlib.crc32(text.encode())}\n{text}")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / "manifest")


def _read_manifest(folder: Path) -> dict[str, Any]:
    crc, _, text = small_text(folder / "manifest", _MOST_MANIFEST).partition("\n")
    if zlib.crc32(text.encode()) != int(crc):
        raise ValueError("damaged")
    manifest: dict[str, Any] = json.loads(text)
    if manifest["token_type"] not in ("<u2", "<u4"):
        raise ValueError("not of this kind")
    return manifest


def _is_own(folder: Path, files: Sequence[File]) -> bool:
    """Whether nobody but who may write the data, or runs this, made the folder and its files, and these are files."""
    trusted = {os.geteuid(), 0} | {file.path.stat().st_uid for file in files if isinstance(file, DiskFile)}
    inside = [(folder / name).lstat() for name in ("manifest", *_FILES)]
    return all(stat.S_ISREG(one.st_mode) for one in inside) and {one.st_uid for one in (folder.lstat(), *inside)} <= trusted


def _remove(path: Path) -> None:
    """Take away what lies under a name. What a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def _cant_keep(folder: Path, error: OSError) -> DataError:
    where = "--data-cache FOLDER names another place, --data-cache off keeps nothing"
    return DataError(f"{folder.parent}: prepared data can't be kept here: {error.strerror}; {where}.")


def _forget_old(made: Path) -> None:
    """Of the folders made of the same files keep those used last; what a killed preparation left an hour ago goes, too."""
    folder, same = made.parent, made.name.rpartition("-")[0]
    for left in folder.glob(".writing-*"):
        if time.time() - max(map(_time_of, (left, *_inside(left)))) > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    others = [child for child in folder.glob(f"{glob.escape(same)}-{'[0-9a-f]' * 16}") if child != made]
    for old in sorted(others, key=_time_of)[: -_KEPT + 1]:
        shutil.rmtree(old, ignore_errors=True)


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # it is a file, or somebody's
        return []


def _time_of(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # it went away
        return time.time()


def _where(files: Sequence[File]) -> str:
    return ", ".join(str(getattr(file, "path", file.name)) for file in files[:3])


def iterate(examples: ExampleSet) -> Iterator[Example]:
    return (examples[number] for number in range(len(examples)))
