"""The folder of a run: one run at a time, claimed once, and never half of a file in it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from mlx_qlora.errors import RunFolderError
from mlx_qlora.records import Delivered
from mlx_qlora.run import checkpoint, disk

LOCK = ".lock"
EVALUATED_AS = "evaluated_as.json"  # what train --seeds has told evaluate
# What a run writes, and so what `overwrite` may take away. Nothing else in the folder is touched.
_OWN_FILES = (
    "config.yaml", "training_metrics.jsonl", "training_metrics.json", "training_metrics.csv", "training_summary.json",
    "training_state.json", "answers.jsonl", "data_account.json", "chat_template.jinja", "trackers.json",
    "samples.jsonl",
)  # fmt: skip
# What is made of a run afterwards: it goes away with the run, and alone is none.
_MADE_OF_IT = (
    "training_results.png", "report.html", "evaluation_report.json", "evaluation_summary.csv", "evaluation_losses.jsonl",
    "evaluation_scores.png", "evaluation_confusion.png", "predictions.jsonl", "predictions_unfinished.jsonl",
    EVALUATED_AS,
)  # fmt: skip
# What says how earlier starts of a run ended: it stays when a run begins anew of itself.
_OF_ALL_STARTS = ("supervision.jsonl",)
_OWN_FOLDERS = ("adapters", "model", "bad_updates", "tensorboard")
# What was trained, where it is in a run: adapters, or a whole model.
_DELIVERED = ("adapters/adapters.safetensors", "model/model.safetensors")


def check_free(folder: Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Raise if the folder can't be used: it holds another run, or is no folder. Changes nothing."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise RunFolderError(f"output_dir: {str(folder)!r} is not a name in UTF-8. Name another folder.") from None
    if folder.is_symlink() and not _exists(folder):
        raise RunFolderError(f"output_dir: {folder} is a link to {os.readlink(folder)}, where nothing is.")
    if _exists(folder) and not folder.is_dir():
        raise RunFolderError(f"output_dir: {folder} is a file; name a folder.")
    there = next((parent for parent in (folder, *folder.parents) if _exists(parent)), folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunFolderError(f"output_dir: {folder} can't be written: {there} is no folder that may be. Name another folder.")
    if not (overwrite or resume) and (held := held_by_a_run(folder)):
        going_on = "go on with it with --resume, " if checkpoint.there(folder) else ""
        raise RunFolderError(
            f"output_dir: {folder} holds a run already ({', '.join(held[:3])}). "
            f"Name another folder with --output-dir, {going_on}or replace that run with --overwrite."
        )


def held_by_a_run(folder: Path) -> list[str]:
    """What in the folder is of an earlier run."""
    return [name for name in (*_OWN_FILES, *_OWN_FOLDERS) if _exists(folder / name)]


def has_validated(folder: Path) -> bool:
    """Whether a run that ended here found a best model: something that would be missed."""
    try:
        summary = json.loads((folder / "training_summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(isinstance(summary, dict) and summary.get("best"))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long, or a folder that may not be looked into
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep every other run out of it while inside. A crash leaves nothing to clean up: the lock is the
    kernel's and goes away with the process. A folder that was not there goes away again if it stays empty."""
    made = [each for each in (folder, *folder.parents) if not _exists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for each in made:
            with suppress(OSError):  # a folder that may not be read
                disk.flush_folder(each.parent)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise RunFolderError(f"output_dir: {folder} can't be written: {error.strerror}. Name another folder.") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is(file, folder / LOCK):  # its holder has just ended and taken it away, and another one may have it
                raise BlockingIOError
        except BlockingIOError:
            raise RunFolderError(
                f"output_dir: another run is training into {folder} right now ({_holder(folder)}). "
                "Wait for it, stop it, or name another folder."
            ) from None
        except OSError:
            pass  # a file system without locks, such as some network drives: nothing can be told there
        try:
            os.ftruncate(file, 0)
            os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}).encode())
            yield
        finally:
            with suppress(OSError):
                os.unlink(folder / LOCK)
    finally:
        os.close(file)
        with suppress(OSError):  # not empty: then it stays
            for each in made:
                each.rmdir()


def _is(file: int, path: Path) -> bool:
    """Whether an open file is the one of this name."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False


def _holder(folder: Path) -> str:
    """Who has the lock, as far as that can be told."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((folder / LOCK).read_text())
        where = "" if found["host"] == socket.gethostname() else f" on {found['host']}"
        return f"process {found['pid']}{where}, since {time.strftime('%H:%M:%S', time.localtime(found['since']))}"
    return "its process is not known"


def clear(folder: Path, of_all_starts: bool = True, begin: Sequence[str] = ()) -> None:
    """Take an earlier run's files away; `begin`: empty folders that the new one begins with."""
    try:
        for name in (*_OWN_FILES, *_MADE_OF_IT, *(_OF_ALL_STARTS if of_all_starts else ())):
            (folder / name).unlink(missing_ok=True)
        for name in _OWN_FOLDERS:
            if (folder / name).is_symlink():
                (folder / name).unlink()
            shutil.rmtree(folder / name, ignore_errors=True)
        for each in checkpoint.there(folder):
            disk.remove_folder(each)
        checkpoint.sweep(folder)
        for name in begin:
            (folder / name).mkdir(parents=True)
    except OSError as error:
        raise RunFolderError(f"output_dir: {folder} can't be written: {error.strerror}. Name another folder.") from error


def delivered(folder: Path) -> Path | None:
    """The file with what a run has trained; None: there is none yet."""
    return next((folder / file for file in _DELIVERED if (folder / file).is_file()), None)


def deliver(folder: Path, what: Delivered) -> None:
    """Put what was trained into the folder of a run, as others load it. New weights replace the old ones in one step; what
    lies beside them is the same in all of a run."""
    file = folder / what.file
    if not file.parent.exists():
        _deliver_whole(folder, what)
        return
    for name, content in what.beside.items():
        if not _holds(file.parent / name, content):
            disk.write_atomically(file.parent / name, content)
    disk.write_atomically(file, checkpoint.serialized(what.arrays))


def _deliver_whole(folder: Path, what: Delivered) -> None:
    """The first time: nobody meets a folder with something missing."""
    file = folder / what.file
    making = folder / f".{file.parent.name}.tmp"
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        for name, content in what.beside.items():
            disk.write_flushed(making / name, content)
        disk.write_flushed(making / file.name, checkpoint.serialized(what.arrays))
        disk.flush_folder(making)
        os.rename(making, file.parent)
        disk.flush_folder(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def load_delivered(file: Path) -> dict[str, mx.array]:
    """The arrays of such a file."""
    arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    return arrays
