"""Files that are whole or not there: written aside, flushed to the disk, renamed.

Everything that a run must not lose goes through the calls of `os` here, so that a test can let each of them fail.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_FULL_FLUSH = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone leaves the bytes in the drive's own memory


def flush(file: int) -> None:
    """Make sure that what was written to a file is on the disk."""
    if sys.platform == "darwin" and _FULL_FLUSH is not None:
        with suppress(OSError):  # some file systems don't know it
            fcntl.fcntl(file, _FULL_FLUSH)
            return
    os.fsync(file)


def flush_folder(folder: Path) -> None:
    """Make sure that a folder's names are on the disk."""
    file = os.open(folder, os.O_RDONLY)
    try:
        flush(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no flush for folders
            raise
    finally:
        os.close(file)


def write_all(file: int, content: bytes | memoryview) -> None:
    """Write to the last byte; a single `write` may take less."""
    rest = memoryview(content)
    while rest:
        written = os.write(file, rest)
        if not written:
            raise OSError(errno.EIO, "nothing was written")
        rest = rest[written:]


def write_flushed(path: Path, content: bytes | memoryview) -> str:
    """A new file, on the disk when this returns; gives the SHA-256 of the content."""
    _write(path, content, flushed=True)
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes | memoryview, flushed: bool) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(file, content)
        if flushed:
            flush(file)
    finally:
        os.close(file)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A name to write to; what is there at the end takes the place of `path`, or goes away if something went wrong."""
    name = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield name
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def write_atomically(path: Path, content: str | bytes, flushed: bool = True) -> None:
    """No reader ever meets half of it; and if `flushed`, neither does one after a power cut."""
    raw = content.encode() if isinstance(content, str) else content
    try:
        with aside(path) as name:
            _write(name, raw, flushed)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file of its own accord
    if flushed:
        flush_folder(path.parent)


def write_json(path: Path, value: Any, flushed: bool = True) -> None:
    """JSON knows no NaN and no infinity: they are null, so that every reader reads it."""
    write_atomically(path, json.dumps(_known(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", flushed)


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_lines(path: Path, values: Sequence[Any]) -> None:
    write_atomically(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def append_lines(path: Path, values: Sequence[Any]) -> None:
    """Whole lines at the end of a file, or none: what a full disk took of them is taken away again."""
    raw = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode("utf-8", "replace")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(file).st_size
        try:
            write_all(file, raw)
        except OSError:
            os.ftruncate(file, before)
            raise
    finally:
        os.close(file)


def remove_folder(folder: Path) -> None:
    """Take a folder away at once: under another name first, so that nobody takes what is left of it for a whole one."""
    going = folder.with_name(f".{folder.name}.going")
    shutil.rmtree(going, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(folder, going)
        shutil.rmtree(going, ignore_errors=True)
