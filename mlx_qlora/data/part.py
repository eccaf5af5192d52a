"""One split of a data set, for looking at a model: its examples and its questions, without the rest being prepared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from mlx_qlora.data.formats import Meaning, Plain, RowError, understand
from mlx_qlora.data.prepare import Preparation, Prepared, iterate, row_of, split_off
from mlx_qlora.data.render import WHOLE, Question, RenderConfig, Renderer, question
from mlx_qlora.data.sources import SPLITS, BadRow, File, Row, Source, SourceConfig, read, task_of
from mlx_qlora.data.templates import Tokenizer
from mlx_qlora.data.windows import Ruler, Stream, split_text
from mlx_qlora.errors import DataError
from mlx_qlora.records import Example

Split = Literal["test", "valid", "train"]
_NAMED = 5  # files that are called by their names


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
    in_part: frozenset[str] = frozenset()  # ids of the texts of which only one end is in it

    def questions(self, most: int | None, of_each_task: int | None = None) -> list[Question]:
        """Questions with answers, the first ones."""
        return questions_of(self.files, self.only, self.renderer, self.config, most, of_each_task)

    def text_bytes(self) -> dict[str, int]:
        """UTF-8 bytes of the text of each row, by its id, without the letters of an end of text; of those that are wholly
        text."""
        end, found = self.renderer.tokenizer.eos_token or "", dict[str, int]()
        for row in read(self.files):
            meaning = _meaning(row, self.config)
            if isinstance(meaning, Plain) and meaning.marks is None:
                text, own = meaning.text.removesuffix(end), row_of(row.id)  # a long text comes in pieces
                found[own] = found.get(own, 0) + len(text.encode("utf-8", "surrogatepass"))
        return found


def holds_text(sources: Iterable[Source], config: SourceConfig) -> bool:
    """Whether the rows are raw text, as far as the first one tells."""
    rows = read(file for source in sources for split in source.files.values() for file in split)
    return isinstance(_meaning(next(rows, None), config), Plain)


def _meaning(row: Row | BadRow | None, config: SourceConfig) -> Meaning | None:
    if not isinstance(row, Row):
        return None
    try:
        return understand(row, config.format, config.fields)[1]
    except RowError:
        return None


def questions_of(
    files: Iterable[File],
    only: frozenset[str] | None,
    renderer: Renderer,
    config: SourceConfig,
    most: int | None,
    of_each_task: int | None = None,
) -> list[Question]:
    """The first questions with answers among the rows of files, the first ones of each task where so many are wanted;
    `only`: the ids of rows that count. A row's task stands in its field `task`, else several files are a task each."""
    files = tuple(files)
    asked = (
        replace(one, task=_task(row, task_of(file) if len(files) > 1 else "", config))
        for file in files
        for row in file.read()
        if isinstance(row, Row) and (only is None or row.id in only) and (one := question(row, renderer, config))
    )
    return list(islice(_first(asked, of_each_task), most))


def _task(row: Row, otherwise: str, config: SourceConfig) -> str:
    own = row.value.get(config.fields.get("task", "task"))
    return str(own) if isinstance(own, str | int) and str(own).strip() else otherwise


def _first(asked: Iterable[Question], of_each_task: int | None) -> Iterator[Question]:
    counts = Counter[str]()
    for one in asked:
        counts[one.task] += 1
        if of_each_task is None or counts[one.task] <= of_each_task:
            yield one


def open_part(
    sources: Sequence[Source],
    config: SourceConfig,
    render: RenderConfig,
    tokenizer: Tokenizer,
    seed: int,
    split: Split | None = None,
    whole: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
    texts: bool = False,
    ruler: Ruler | None = None,
) -> Part:
    """The rows of a split, as training would see them; without a name those of test, or else of valid. `texts`: the rows are
    raw text, and each is an example, whatever its length.

    Where there are no validation rows, those that training splits off are meant, `ruler` being its windows if it has any; if
    `whole`, nothing was trained on these data, and without a name all rows count.
    """
    there = [each for each in SPLITS if any(each in source.files for source in sources)]
    wanted = split or _first_of(there, "train" if whole else "valid")

    def prepared(stored: str, render: RenderConfig) -> tuple[Renderer, list[Prepared]]:
        renderer = Renderer(tokenizer, render, config)
        preparation = Preparation(config, render, renderer, config.data_cache, progress, strict=False)
        made = []
        for source in (one for one in sources if stored in one.files):
            one, _ = preparation.prepare(source, stored)
            if reason := preparation.refusal(one.account, source.files[stored]):
                raise DataError(reason)
            made.append(one)
        return renderer, made

    documents = replace(render, max_seq_length=WHOLE)
    own = documents if texts else render
    stored = "train" if wanted == "valid" and wanted not in there else wanted
    files = tuple(file for source in sources for file in source.files.get(stored, ()))
    if wanted in there and (wanted != "train" or whole or "valid" in there):
        renderer, made = prepared(stored, own)
        examples = [example for each in made for example in _examples(each, texts)]
        names, rows = _names(files), len({row_of(example.id) for example in examples})
        return Part(wanted, names, rows, examples, config, renderer, files, None)
    if wanted == "test" or "train" not in there:
        raise DataError(f"--split {wanted}: {', '.join(config.sources)} has no {wanted} rows, but {' and '.join(there)}.")

    # Which rows are split off follows from those that training had.
    as_trained = documents if ruler else render
    renderer, made = prepared(stored, own)
    trained = made if as_trained == own else prepared(stored, as_trained)[1]
    said = f"split off from training (seed {seed})" if wanted == "valid" else "without those that are split off for validation"
    in_part: set[str] = set()
    if ruler:
        for_train, for_valid, drawn = split_text(trained, ruler, config.validation_share, seed)
        streams, others = (for_valid, for_train) if wanted == "valid" else (for_train, for_valid)
        in_part.update(*(each.in_part for each in streams))
        if drawn is None:
            said = "the end of the text, which is not trained" if wanted == "valid" else "the text without its end"
        if texts:
            examples = [example for each in streams for example in each.texts()]
        else:  # what half a chat answers can't be asked
            ids = _rows(streams) - _rows(others) - set(map(row_of, in_part))
            examples = [example for each in made for example in iterate(each) if row_of(example.id) in ids]
        if not examples:
            raise DataError(f"{', '.join(config.sources)}: {said}, and no row lies wholly there. Name rows with --data.")
    else:
        parts = [split_off(each, config.validation_share, seed) for each in trained]
        chosen = [valid if wanted == "valid" else train for train, valid, _ in parts]
        ids = {row_of(each.id(number)) for each in chosen for number in range(len(each))}
        examples = [example for each in made for example in _examples(each, texts) if row_of(example.id) in ids]
    only = frozenset(row_of(example.id) for example in examples)
    return Part(wanted, said, len(only), examples, config, renderer, files, only, frozenset(in_part))


def _names(files: Sequence[File]) -> str:
    names = [file.name for file in files]
    return ", ".join(names if len(names) <= _NAMED else [*names[:_NAMED], f"and {len(names) - _NAMED} more"])


def _first_of(there: Sequence[str], otherwise: Split) -> Split:
    return "test" if "test" in there else "valid" if "valid" in there else otherwise


def _rows(streams: Sequence[Stream]) -> set[str]:
    """The rows of which something lies in these streams."""
    return {row_of(example.id) for each in streams for example in each.texts()}


def _examples(made: Prepared, texts: bool) -> Iterator[Example]:
    """Of texts each as a whole, also where it lies in pieces."""
    return Stream(made, Ruler(1, 1)).texts() if texts else iterate(made)
