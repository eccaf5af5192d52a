"""What a power cut may leave of a run, by the worst disk that POSIX allows: a model of a file system.

A run writes down each call that changes something (`faults.py`). Here they are made again, one after the other, in a
model that knows what is certain and what is not:

- what was written to a file is certain after that file's fsync; before, it may be there, or what was there at the last
  fsync, or of what is new nothing, or half, or as many zeros;
- a name in a folder (made, moved, taken away) is certain after that folder's fsync; before, each change may have been
  made or not, whatever became of the others. A change is made whole or not at all, also a move over another file;
- fsync tells the truth, and what is certain stays: a disk that loses this too is `test_damage`'s matter.

Real file systems keep more than that. After each call, every such state is put into a real folder and looked at with
the code that a run goes on with.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load as read_arrays

from mlx_qlora.run import checkpoint

CONTENTS = ("all", "before", "nothing", "half", "zeros")


@dataclass(eq=False)
class File:
    now: bytes = b""
    certain: bytes = b""

    def after_a_cut(self, content: str) -> bytes:
        if self.now == self.certain:
            return self.now
        same = len(self.certain) if self.now.startswith(self.certain) else 0
        kept, new = self.now[:same], self.now[same:]
        return {
            "all": self.now,
            "before": self.certain,
            "nothing": kept,
            "half": kept + new[: len(new) // 2],
            "zeros": kept + bytes(len(new)),
        }[content]


@dataclass(eq=False)
class Folder:
    now: dict[str, Any] = field(default_factory=dict)
    certain: dict[str, Any] = field(default_factory=dict)
    pending: list[tuple[str | None, str | None, Any]] = field(default_factory=list)  # (name gone, name made, of what)

    def change(self, gone: str | None, made: str | None, node: Any) -> None:
        _apply(self.now, gone, made, node)
        self.pending.append((gone, made, node))

    def flush(self) -> None:
        self.certain, self.pending = dict(self.now), []


def _apply(names: dict[str, Any], gone: str | None, made: str | None, node: Any) -> None:
    if gone is not None:
        names.pop(gone, None)
    if made is not None:
        names[made] = node


class Model:
    """The disk below the folder of a case, as far as a run's calls say."""

    def __init__(self) -> None:
        self.root = Folder()
        self._open: dict[int, Any] = {}

    def _parent(self, path: str) -> tuple[Folder, str]:
        *above, name = path.split("/")
        folder = self.root
        for each in above:
            folder = folder.now[each]
        return folder, name

    def make(self, event: tuple[Any, ...]) -> None:
        """Make a call."""
        what, path, result, *told = event
        if what == "close":
            self._open.pop(result, None)
        elif what in ("open", "create"):
            self._open[result] = self._opened(path, told[0])
        elif what == "write":
            file, at, raw = self._open[told[0]], told[1], told[2][:result]
            file.now = file.now[:at].ljust(at, b"\0") + raw + file.now[at + len(raw) :]
        elif what == "truncate":
            file = self._open[told[0]]
            file.now = file.now[: told[1]].ljust(told[1], b"\0")
        elif what == "fsync":
            node = self._open[told[0]]
            if isinstance(node, Folder):
                node.flush()
            else:
                node.certain = node.now
        else:
            folder, name = self._parent(path)
            if what == "mkdir":
                folder.change(None, name, Folder())
            elif what in ("rename", "replace"):
                folder.change(name, told[0].rsplit("/", 1)[-1], folder.now[name])
            else:
                folder.change(name, None, None)

    def _opened(self, path: str, flags: int) -> Any:
        if path == ".":
            return self.root
        folder, name = self._parent(path)
        if name not in folder.now:
            folder.change(None, name, File())
        elif flags & os.O_TRUNC:
            folder.now[name].now = b""
        return folder.now[name]

    def folders(self) -> Iterator[Folder]:
        waiting: list[Any] = [self.root]
        seen: set[int] = set()
        while waiting:
            folder = waiting.pop()
            if id(folder) not in seen:
                seen.add(id(folder))
                yield folder
                nodes = [*folder.now.values(), *folder.certain.values(), *(node for *_, node in folder.pending)]
                waiting += [node for node in nodes if isinstance(node, Folder)]

    def cuts(self, rng: random.Random, few: bool) -> Iterator[dict[str, Any]]:
        """States that a power cut may leave now, as trees of names."""
        pending = [(id(folder), number) for folder in self.folders() for number in range(len(folder.pending))]
        latest = pending[-12:]
        whole = set(pending)
        chosen = [whole, set[Any]()]
        chosen += [{one for one in pending if rng.random() < 0.5} for _ in range(1 if few else 6)]
        if not few:
            chosen += [whole - {one} for one in latest] + [{one} for one in latest]
        seen = set()
        for changes in chosen:
            for content in CONTENTS:
                tree = self._tree(self.root, changes, content)
                told = repr(tree)
                if told not in seen:
                    seen.add(told)
                    yield tree

    def _tree(self, folder: Folder, changes: set[tuple[int, int]], content: str) -> dict[str, Any]:
        names = dict(folder.certain)
        for number, change in enumerate(folder.pending):
            if (id(folder), number) in changes:
                _apply(names, *change)
        return {
            name: self._tree(node, changes, content) if isinstance(node, Folder) else _Bytes(node.after_a_cut(content))
            for name, node in names.items()
        }


class _Bytes:
    """A file's content; told by its hash."""

    def __init__(self, raw: bytes):
        self.raw, self.told = raw, hashlib.blake2b(raw, digest_size=12).hexdigest()

    def __repr__(self) -> str:
        return self.told


class Disk:
    """Puts trees into a real folder; what is there once is linked the next time."""

    def __init__(self, root: Path):
        self._kept, self.state = root / "kept", root / "state"
        self._kept.mkdir(parents=True)

    def put(self, tree: dict[str, Any]) -> None:
        shutil.rmtree(self.state, ignore_errors=True)
        self._put(self.state, tree)

    def _put(self, folder: Path, tree: dict[str, Any]) -> None:
        folder.mkdir()
        for name, node in tree.items():
            if isinstance(node, dict):
                self._put(folder / name, node)
                continue
            kept = self._kept / node.told
            if not kept.exists():
                kept.write_bytes(node.raw)
            os.link(kept, folder / name)


_NAMED = re.compile(r"run/checkpoint_epoch\d+_step(\d+)(?:_part(\d+))?")


def events(record: Path) -> Iterator[tuple[Any, ...]]:
    with record.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return


def cut_everywhere(record: Path, root: Path, every: int = 1, few: bool = False) -> int:
    """Cut the power after each call (or each `every`th) of a recorded run; gives the number of states looked at."""
    model, disk, rng = Model(), Disk(root), random.Random(0)
    renamed, certain, looked = (0, 0), (0, 0), 0
    of_run = (event for event in events(record) if event[1] == "." or event[1].split("/")[0] == "run")
    for number, event in enumerate(of_run):
        model.make(event)
        what, path, _, *told = event
        if what == "rename" and (found := _NAMED.fullmatch(told[0])):
            renamed = int(found[1]), int(found[2] or 0)
        if what == "fsync" and path == "run":
            certain = renamed
        if number % every == 0:
            for tree in model.cuts(rng, few):
                disk.put(tree)
                try:
                    _look(disk.state / "run", certain)
                except Exception as error:
                    raise AssertionError(f"after call {number}, {event[:2]}: {tree}") from error
                looked += 1
    return looked


def _look(folder: Path, certain: tuple[int, int]) -> None:
    """What a run that goes on would find: the newest checkpoint that is certain, or a newer one, and its metrics."""
    found, _ = checkpoint.newest(folder)
    place = checkpoint.place(found.folder)[:2] if found else (0, 0)
    assert place >= certain, f"{place} is older than {certain}"
    if found:
        position = found.state["metrics"]
        raw = (folder / "training_metrics.jsonl").read_bytes()[: position["bytes"]]
        assert hashlib.sha256(raw).hexdigest() == position["sha256"], "the metrics are not what the checkpoint goes by"
        for file in found.state["files"][1:]:
            assert read_arrays((found.folder / file).read_bytes())
    adapters = folder / "adapters" / "adapters.safetensors"
    if adapters.exists():
        assert read_arrays(adapters.read_bytes())
