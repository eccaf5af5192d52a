"""A teacher's answers, kept as they come: a generation that was broken off goes on, and other filters need no new answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mlx_qlora.distilling.filters import Answer
from mlx_qlora.errors import RunFolderError
from mlx_qlora.files import json_lines
from mlx_qlora.run.disk import append_lines, write_lines

NAME = "teacher_answers.jsonl"
_SAID = {"teacher": "another teacher", "adapters": "other adapters", "prompts": "other prompts"}
_FIELDS = [each.name for each in fields(Answer)]


class Kept:
    """The answers that are there, by their number, in groups: each group's lines end in one that says that it is whole.

    The answers of a group depend on each other in their last digits, because they are computed together. So a group that
    was broken off is none, and is answered again.
    """

    def __init__(self, folder: Path, of: Mapping[str, Any]):
        self.path = folder / NAME
        self.of = json.loads(json.dumps(of))
        self.answers: dict[int, Answer] = {}
        self.tokens, self.seconds = 0, 0.0  # of all of them, whenever they were made
        self._open: dict[int, Answer] = {}
        first, *lines = json_lines(self.path) or [{}]
        self._header = first.get("of") if isinstance(first.get("of"), dict) else None
        self._groups: list[dict[str, Any]] = self._read(lines)

    @property
    def changes(self) -> list[str]:
        """What the answers that are there were made with, and is another now."""
        was = self._header
        if was is None:
            return []
        others = [name for name, own in self.of.items() if was.get(name) != own]
        return [_SAID.get(name) or f"{name} {was.get(name)} there, {self.of[name]} here" for name in others]

    def _read(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines of whole groups."""
        whole: list[dict[str, Any]] = []
        group: list[dict[str, Any]] = []
        for line in lines:
            if "group" not in line:
                group.append(line)
                continue
            own = group[-line["group"] :] if 0 < line["group"] <= len(group) else []
            if own:
                self.answers |= {each["number"]: Answer(*(each[name] for name in _FIELDS)) for each in own}
                self.seconds += line["seconds"]
                whole += [*own, line]
            group = []
        self.tokens = sum(each.tokens for each in self.answers.values())
        return whole

    def begin(self) -> None:
        """Make the file, or take off what is half of a group."""
        write_lines(self.path, [{"of": self.of}, *self._groups])

    def clear(self) -> None:
        self.answers, self.tokens, self.seconds, self._header, self._groups = {}, 0, 0.0, None, []

    def add(self, number: int, answer: Answer) -> None:
        self._open[number] = answer

    def settle(self, seconds: float) -> None:
        """The group is whole: write it down."""
        lines = [{"number": number, **asdict(answer)} for number, answer in self._open.items()]
        append_lines(self.path, [*lines, {"group": len(lines), "seconds": round(seconds, 3)}])
        self.answers |= self._open
        self.tokens += sum(each.tokens for each in self._open.values())
        self.seconds += seconds
        self._open = {}

    @property
    def unsettled(self) -> int:
        """Answers that are not kept yet."""
        return len(self._open)


def require_same(kept: Kept) -> None:
    if kept.changes:
        raise RunFolderError(
            f"output_dir: {kept.path.parent} holds the answers of another generation ({'; '.join(kept.changes[:3])}). "
            "Name another folder with --output-dir, or replace it with --overwrite."
        )
