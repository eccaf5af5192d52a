"""Answers that took long are not lost: they are written down as they come, and an evaluation that was broken off goes on."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from mlx_qlora.data.render import Question
from mlx_qlora.files import json_lines

Part = TypeVar("Part")
NAME = "predictions_unfinished.jsonl"


class SoFar:
    """The answers that are there, in a file beside what the evaluation will write. It goes away when all is done.

    `told` is what an answer depends on: answers to other questions, of other adapters or settings, are not taken over.
    """

    def __init__(self, folder: Path, told: object, questions: Sequence[Question]):
        asked = json.dumps([str(told), [(each.id, each.prompt, *_chain(each)) for each in questions]])
        self._of = hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()
        self.path = folder / NAME
        self._questions = questions
        self.answers: dict[str, dict[int, str]] = {}
        self.taken_over = self._read()

    def _read(self) -> int:
        first, *lines = json_lines(self.path) or [{}]
        if first.get("of") != self._of:
            return 0
        numbers = {each.id: number for number, each in enumerate(self._questions)}
        for line in lines:
            if isinstance(line.get("answer"), str) and line.get("id") in numbers:
                self.answers.setdefault(str(line.get("model")), {})[numbers[line["id"]]] = line["answer"]
        return sum(map(len, self.answers.values()))

    def left(self, which: str, among: Sequence[int] | None = None) -> list[int]:
        """Numbers of the questions that one of the models still has to answer."""
        known = self.answers.get(which, {})
        return [number for number in (range(len(self._questions)) if among is None else among) if number not in known]

    @contextmanager
    def keeping(self, which: str, numbers: Sequence[int]) -> Iterator[Callable[[Mapping[int, str]], None]]:
        """Gives what is called with answers as they come; they are numbered within `numbers`."""
        held = self.answers.setdefault(which, {})
        begun = self.taken_over or sum(map(len, self.answers.values()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a" if begun else "w", encoding="utf-8") as file:
            file.write("\n" if begun else json.dumps({"of": self._of}) + "\n")  # the last line may have no end

            def tell(found: Mapping[int, str]) -> None:
                for place, answer in found.items():
                    held[numbers[place]] = answer
                    line = {"model": which, "id": self._questions[numbers[place]].id, "answer": answer}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()

            yield tell

    def texts(self, which: str) -> list[str]:
        return [self.answers[which][number] for number in range(len(self._questions))]

    def done(self) -> None:
        self.path.unlink(missing_ok=True)


def _chain(question: Question) -> tuple[tuple[int, ...], ...]:
    """What an answer depends on besides its prompt."""
    return (question.rationale_tokens, question.cue_tokens) if question.cue_tokens else ()


class Progress:
    """How far it is: a bar in a terminal, else a line now and then."""

    def __init__(self, what: str, total: int, unit: str, say: Callable[[str], None], every_s: float = 20.0):
        from tqdm.auto import tqdm

        self._clock, self._say, self._what, self._total, self._every = time.monotonic, say, what, total, every_s
        self._unit = unit
        self._last = self._begun = self._clock()
        self._done = 0
        shown = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False) if shown else None

    def __enter__(self) -> Progress:
        return self

    def through(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The same parts, each counted when it is done."""
        for part in parts:
            yield part
            self.add(1)

    def add(self, count: int) -> None:
        self._done += count
        now = self._clock()
        if self._bar is not None:
            self._bar.update(count)
            self._bar.refresh()
        elif now - self._last > self._every and self._done < self._total:
            self._last = now
            left = (now - self._begun) / self._done * (self._total - self._done)
            self._say(f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {left / 60:.0f} min left")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
