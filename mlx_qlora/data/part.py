"""One split of a data set, for looking at a model: its examples and its questions, without the rest being prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from mlx_qlora.data.prepare import Chosen, Preparation, Prepared, iterate, row_of, split_off
from mlx_qlora.data.render import Question, RenderConfig, Renderer, question
from mlx_qlora.data.sources import SPLITS, File, Row, Source, SourceConfig, read
from mlx_qlora.data.templates import Tokenizer
from mlx_qlora.errors import DataError
from mlx_qlora.records import Example

Split = Literal["test", "valid", "train"]


@dataclass(frozen=True)
class Part:
    split: str
    said: str  # where the rows come from
    rows: int
    examples: list[Example]
    config: SourceConfig
    renderer: Renderer
    files: tuple[File, ...]
    only: frozenset[str] | None  # ids of its rows, where it is not all of the files

    def questions(self, most: int | None) -> list[Question]:
        """Questions with answers, the first ones."""
        return questions_of(self.files, self.only, self.renderer, self.config, most)


def questions_of(
    files: Iterable[File], only: frozenset[str] | None, renderer: Renderer, config: SourceConfig, most: int | None
) -> list[Question]:
    """The first questions with answers among the rows of files; `only`: the ids of rows that count."""
    rows = (row for row in read(files) if isinstance(row, Row) and (only is None or row.id in only))
    asked = (one for row in rows if (one := question(row, renderer, config)))
    return list(islice(asked, most))


def open_part(
    sources: Sequence[Source],
    config: SourceConfig,
    render: RenderConfig,
    tokenizer: Tokenizer,
    seed: int,
    split: Split | None = None,
    whole: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Part:
    """The rows of a split, as training would see them; without a name those of test, or else of valid.

    Where there are no validation rows, those that training splits off are meant; if `whole`, nothing was trained on
    these data, and without a name all rows count.
    """
    there = [each for each in SPLITS if any(each in source.files for source in sources)]
    wanted: str = split or next((each for each in ("test", "valid") if each in there), "train" if whole else "valid")
    renderer = Renderer(tokenizer, render, config)
    preparation = Preparation(config, render, renderer, config.data_cache, progress, strict=False)

    def prepared(stored: str) -> list[Prepared]:
        made = []
        for source in (one for one in sources if stored in one.files):
            one, _ = preparation.prepare(source, stored)
            if reason := preparation.refusal(one.account, source.files[stored]):
                raise DataError(reason)
            made.append(one)
        return made

    def part(stored: str, sets: Sequence[Prepared | Chosen], said: str, apart: bool) -> Part:
        examples = [example for each in sets for example in iterate(each)]
        files = tuple(file for source in sources for file in source.files.get(stored, ()))
        only = frozenset(row_of(example.id) for example in examples)
        return Part(wanted, said, len(only), examples, config, renderer, files, only if apart else None)

    if wanted in there and (wanted != "train" or whole or "valid" in there):
        names = ", ".join(file.name for source in sources for file in source.files.get(wanted, ()))
        return part(wanted, prepared(wanted), names, apart=False)
    if wanted == "test" or "train" not in there:
        raise DataError(f"--split {wanted}: {', '.join(config.sources)} has no {wanted} rows, but {' and '.join(there)}.")
    parts = [split_off(each, config.validation_share, seed) for each in prepared("train")]
    chosen = [valid if wanted == "valid" else train for train, valid, _ in parts]
    said = f"split off from training (seed {seed})" if wanted == "valid" else "without those that are split off for validation"
    return part("train", chosen, said, apart=True)
