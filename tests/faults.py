"""Runs trainings in which a chosen call to the system fails, or is the last thing that the process does.

    python tests/faults.py      reads a trial as a line of JSON, runs it in a process of its own, answers with how it ended

What a run writes goes through a few functions of `os`. Here they are wrapped, for files in one folder only, and each
call gets a name that is the same in every run: what it does, to which file, for which time. A fault names a call:

    {"at": "rename .checkpoint_epoch0_step2.tmp#1", "do": "kill"}

`kill` and `before` send SIGKILL after the call and in its place, `half` in the middle of a write, `ENOSPC` and `EIO`
make it fail, `full` lets the disk be full from there on for so many `calls`. `short` (without `at`) is no fault at all:
each write takes that many bytes at most, as POSIX allows.

On Linux trials are forks of one process that has imported everything and computed nothing, which saves two seconds
each; that they give the bytes of an ordinary process is tested too.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORKS = sys.platform == "linux"
_F_FULLFSYNC = getattr(fcntl, "F_FULLFSYNC", None)
_TAKES_SPACE = ("create", "write", "mkdir", "rename", "replace")
_TRUE = {
    name: getattr(os, name)
    for name in (
        "open", "close", "write", "pwrite", "fsync", "ftruncate", "rename", "replace", "unlink", "rmdir", "mkdir",
    )
}  # fmt: skip


class Faults:
    """The calls with which a run writes into a folder: named, written down, and made to fail where that is wanted."""

    def __init__(self, folder: str, fault: dict[str, Any] | None, log: str | None, record: str | None):
        self._folder = os.path.realpath(folder)
        self._fault = fault or {}
        self._open: dict[int, str] = {}  # what is open: the path in the folder
        self._times: Counter[str] = Counter()
        self._full = 0  # so many more calls find no space
        self._lock = threading.RLock()
        self._log = _TRUE["open"](log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) if log else None
        self._record = Path(record).open("ab") if record else None  # noqa: SIM115  (it stays open as long as the process)

    def install(self) -> None:
        """From now on each call goes through here."""
        os.open = self.open  # type: ignore[assignment]
        os.close = self.close
        os.write = self.write
        os.pwrite = self.pwrite
        os.fsync = self.fsync
        os.ftruncate = self.ftruncate  # type: ignore[assignment]
        os.rename, os.replace = self._moving("rename"), self._moving("replace")  # type: ignore[assignment]
        os.unlink, os.rmdir = self._removing("unlink"), self._removing("rmdir")  # type: ignore[assignment]
        os.mkdir = self.mkdir  # type: ignore[assignment]
        if _F_FULLFSYNC is not None:
            true = fcntl.fcntl
            fcntl.fcntl = lambda file, what, *more: (  # type: ignore[assignment]
                self._fsync(file, lambda: true(file, what, *more)) if what == _F_FULLFSYNC else true(file, what, *more)
            )

    def _name(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path in the folder ('.' is the folder itself); None for what lies elsewhere."""
        if isinstance(path, int):
            return self._open.get(path)
        text = os.fsdecode(path)
        if dir_fd is not None:
            above = self._open.get(dir_fd)
            return None if above is None else os.path.normpath(os.path.join(above, text))
        whole = os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text))
        inside = whole == self._folder or whole.startswith(self._folder + os.sep)
        return os.path.relpath(whole, self._folder) if inside else None

    def _call(self, what: str, path: str, call: Callable[[], Any], half: Callable[[], Any] | None = None, *told: Any) -> Any:
        """Do a call, or what the fault makes of it."""
        with self._lock:
            self._times[f"{what} {path}"] += 1
            key = f"{what} {path}#{self._times[f'{what} {path}']}"
            do = self._fault.get("do") if self._fault.get("at") == key else None
            if do == "full":
                self._full = self._fault.get("calls", sys.maxsize)
            if do == "before":
                self._die(key)
            if do == "half":
                assert half is not None, f"{key} has no middle"
                half()
                self._die(key)
            if self._full and what in _TAKES_SPACE:
                self._full -= 1
                do = "ENOSPC"
            if do in ("ENOSPC", "EIO"):
                self._note(f"{do} {key}")
                number = getattr(errno, do)
                raise OSError(number, os.strerror(number), os.path.join(self._folder, path))
            result = call()
            self._note(key)
            if self._record is not None:
                pickle.dump((what, path, result, *told), self._record)
                self._record.flush()
            if do == "kill":
                self._die(key)
            return result

    def _note(self, text: str) -> None:
        if self._log is not None:
            _TRUE["write"](self._log, (text + "\n").encode())

    def _die(self, key: str) -> None:
        self._note(f"dies {key}")
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        more = {} if dir_fd is None else {"dir_fd": dir_fd}
        name = self._name(path, dir_fd)
        if name is None:
            return _TRUE["open"](path, flags, mode, **more)
        what = "create" if flags & os.O_CREAT else "open"
        file = self._call(what, name, lambda: _TRUE["open"](path, flags, mode, **more), None, flags)
        self._open[file] = name
        return file

    def close(self, file: int) -> None:
        name = self._open.pop(file, None)
        _TRUE["close"](file)
        if name is not None and self._record is not None:
            with self._lock:
                pickle.dump(("close", name, file), self._record)

    def write(self, file: int, content: Any) -> int:
        name = self._name(file)
        if name is None:
            return _TRUE["write"](file, content)
        raw = bytes(content)[: self._fault.get("short", sys.maxsize)]
        at = os.lseek(file, 0, os.SEEK_CUR)
        return self._call(
            "write", name, lambda: _TRUE["write"](file, raw), lambda: _TRUE["write"](file, raw[: len(raw) // 2]), file, at, raw
        )

    def pwrite(self, file: int, content: Any, at: int) -> int:
        name = self._name(file)
        if name is None:
            return _TRUE["pwrite"](file, content, at)
        raw = bytes(content)
        return self._call("write", name, lambda: _TRUE["pwrite"](file, raw, at), None, file, at, raw)

    def fsync(self, file: int) -> None:
        self._fsync(file, lambda: _TRUE["fsync"](file))

    def _fsync(self, file: int, call: Callable[[], Any]) -> Any:
        name = self._name(file)
        return call() if name is None else self._call("fsync", name, call, None, file)

    def ftruncate(self, file: int, length: int) -> None:
        name = self._name(file)
        if name is None:
            return _TRUE["ftruncate"](file, length)
        return self._call("truncate", name, lambda: _TRUE["ftruncate"](file, length), None, file, length)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        name = self._name(path, dir_fd)
        more = {} if dir_fd is None else {"dir_fd": dir_fd}
        if name is None or os.path.isdir(path):
            return _TRUE["mkdir"](path, mode, **more)
        return self._call("mkdir", name, lambda: _TRUE["mkdir"](path, mode, **more))

    def _moving(self, what: str) -> Callable[..., None]:
        def move(source: Any, target: Any, **more: Any) -> None:
            old, new = self._name(source, more.get("src_dir_fd")), self._name(target, more.get("dst_dir_fd"))
            if old is None or new is None:
                return _TRUE[what](source, target, **more)
            return self._call(what, old, lambda: _TRUE[what](source, target, **more), None, new)

        return move

    def _removing(self, what: str) -> Callable[..., None]:
        def remove(path: Any, *, dir_fd: int | None = None) -> None:
            name = self._name(path, dir_fd)
            more = {} if dir_fd is None else {"dir_fd": dir_fd}
            if name is None or not os.path.lexists(os.path.join(self._folder, name)):
                return _TRUE[what](path, **more)
            return self._call(what, name, lambda: _TRUE[what](path, **more))

        return remove


def trial(wanted: dict[str, Any]) -> int:
    """A training in this process, which is never used for anything else."""
    from importlib import import_module

    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # as if not installed: the picture takes longer than the run
    file = os.open(wanted["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    Faults(wanted["folder"], wanted.get("fault"), wanted.get("log"), wanted.get("record")).install()
    return import_module("mlx_qlora.train").main(wanted["arguments"])


def _serve() -> None:
    """Answer trials, one at a time."""
    if FORKS:
        _import_all()
    for line in iter(sys.stdin.readline, ""):
        wanted = json.loads(line)
        begun = time.monotonic()
        if FORKS:
            child = os.fork()
            if not child:
                sys.exit(trial(wanted))
            code = _ended(child, wanted.get("kill_after"))
        else:
            code = _in_new_process(wanted)
        print(json.dumps({"code": code, "seconds": time.monotonic() - begun}), flush=True)


def _import_all() -> None:
    """Everything that a training imports. Nothing is computed, so there is no thread yet that a fork would lose, but one
    that waits for texts to generate, which no training does."""
    from importlib import import_module

    for name in ("mlx_qlora.train", "mlx_lm.models.llama", "safetensors"):  # ours first: it loads the fast BLAS
        import_module(name)


def _ended(child: int, kill_after: float | None) -> int:
    """How a child ended, or was ended."""
    until = time.monotonic() + (kill_after if kill_after is not None else 300)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _in_new_process(wanted: dict[str, Any]) -> int:
    child = subprocess.Popen([sys.executable, __file__, json.dumps(wanted)])
    try:
        return child.wait(wanted.get("kill_after") or 300)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(trial(json.loads(sys.argv[1])))
    _serve()
