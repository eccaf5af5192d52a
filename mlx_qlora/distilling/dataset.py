"""The files of a generation: rows to train on, what was left out and why, all settings."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_qlora.distilling.answers import NAME
from mlx_qlora.distilling.filters import Verdict, counted
from mlx_qlora.distilling.prompts import answered
from mlx_qlora.run.disk import write_atomically, write_json, write_lines

FILES = ("train.jsonl", "valid.jsonl", "rejected.jsonl", "generation.json", "README.md")


@dataclass(frozen=True)
class Generated:
    """What was asked, and what came of it."""

    teacher: str
    settings: dict[str, Any]
    of: dict[str, Any]  # what the answers depend on
    prompts: int
    verdicts: tuple[Verdict, ...]
    tokens: int  # of all answers
    seconds: float  # that they took
    for_validation: float
    seed: int
    fields: Mapping[str, str]
    without_system: str
    versions: dict[str, str]

    @cached_property
    def kept(self) -> list[Verdict]:
        return [each for each in self.verdicts if not each.reason]

    @cached_property
    def left_out(self) -> list[Verdict]:
        return [each for each in self.verdicts if each.reason]

    @cached_property
    def reasons(self) -> dict[str, int]:
        """Answers left out, by reason."""
        return counted(self.verdicts)

    @cached_property
    def unanswered(self) -> int:
        """Prompts of which no answer is kept."""
        return self.prompts - len({each.prompt.id for each in self.kept})

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @cached_property
    def validation(self) -> frozenset[str]:
        """Prompts whose answers are for validation: by lot, whatever else is in the data."""
        ids = list(dict.fromkeys(each.prompt.id for each in self.kept))
        wanted = min(len(ids) - 1, max(1, round(self.for_validation * len(ids)))) if self.for_validation else 0
        drawn = sorted(ids, key=lambda id: hashlib.blake2b(f"{self.seed} {id}".encode("utf-8", "replace")).digest())
        return frozenset(drawn[: max(0, wanted)])

    def rows(self, validation: bool) -> list[dict[str, Any]]:
        """Those of one file."""
        return [
            answered(each.prompt, each.answer.text, each.number, self.fields, self.without_system)
            for each in self.kept
            if (each.prompt.id in self.validation) == validation
        ]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer, as the teacher counts."""
        return max((len(each.prompt.tokens) + each.answer.tokens + 1 for each in self.kept), default=0)


def write(found: Generated, folder: Path, card: str) -> None:
    """All files, each whole; while generation.json is there, all of them are of one and the same generation."""
    (folder / "generation.json").unlink(missing_ok=True)
    for name, rows in (
        ("train.jsonl", found.rows(False)),
        ("valid.jsonl", found.rows(True)),
        ("rejected.jsonl", _rejected(found)),
    ):
        if rows:
            write_lines(folder / name, rows)
        else:
            (folder / name).unlink(missing_ok=True)
    write_atomically(folder / "README.md", card)
    write_json(folder / "generation.json", _summary(found))


def clear(folder: Path) -> None:
    """Take an earlier generation away."""
    for name in (*FILES[::-1], NAME):
        (folder / name).unlink(missing_ok=True)


def _rejected(found: Generated) -> list[dict[str, Any]]:
    return [
        {
            "source": each.prompt.id,
            "answer_number": each.number,
            "reason": each.reason,
            "detail": each.detail,
            "question": each.prompt.text,
            "expected": each.prompt.expected or None,
            "answer_tokens": each.answer.tokens,
            "said": each.answer.text,
        }
        for each in found.left_out
    ]


def _summary(found: Generated) -> dict[str, Any]:
    return {
        "teacher": found.teacher,
        "date": time.strftime("%Y-%m-%d"),
        "prompts": found.prompts,
        "prompts_without_answer": found.unanswered,
        "answers": len(found.verdicts),
        "kept": len(found.kept),
        "train_rows": len(found.rows(False)),
        "valid_rows": len(found.rows(True)),
        "rejected": found.reasons,
        "answer_tokens": found.tokens,
        "seconds": round(found.seconds, 3),
        "tokens_per_second": found.tokens_per_second and round(found.tokens_per_second, 1),
        "settings": found.settings,
        "of": found.of,
        "versions": found.versions,
    }
