"""A model evaluated on data: its losses, its answers, and their scores, beside those of the base model."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_qlora.data.layout import lay_out, smaller
from mlx_qlora.data.part import Part, Split, holds_text, open_part
from mlx_qlora.data.prepare import row_of
from mlx_qlora.data.render import Question, RenderConfig
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.data.windows import Ruler
from mlx_qlora.engine.room import Room
from mlx_qlora.errors import ConfigError, DataError, RunFolderError, require
from mlx_qlora.look.console import Console
from mlx_qlora.look.evaluation import harness, results, written
from mlx_qlora.look.evaluation.answering import Progress, SoFar
from mlx_qlora.look.evaluation.asking import Answers, Asker
from mlx_qlora.look.evaluation.compared import BASE, TUNED
from mlx_qlora.look.evaluation.finals import FinalKind, Finals, finals_for
from mlx_qlora.look.evaluation.generate import Asking
from mlx_qlora.look.evaluation.labels import labels_of
from mlx_qlora.look.evaluation.own_metric import load_metrics
from mlx_qlora.look.evaluation.perplexity import Document, OfText, Strided, Text
from mlx_qlora.look.evaluation.results import Evaluation
from mlx_qlora.look.evaluation.scores import Named, scores_for, words
from mlx_qlora.look.measure import Measured, measure
from mlx_qlora.model import backend, lora
from mlx_qlora.model.attached import attach_from
from mlx_qlora.model.load import Loaded, fingerprint, load, wired_memory
from mlx_qlora.model.trunk import Passage
from mlx_qlora.objectives.sft import sft
from mlx_qlora.plan import SAMPLE, Plan, checked, forward_layout
from mlx_qlora.records import Example
from mlx_qlora.resume import versions

_HARNESS_ROWS = 8  # texts at once, as in mlx-lm
_PACKAGES = ("sacrebleu", "rouge-score")


@dataclass(frozen=True)
class Wanted:
    """What is to be evaluated, and how."""

    model: str
    source: SourceConfig
    render: RenderConfig
    output: Path
    adapters: Path | None = None  # the folder; None: the model as it is
    trained_whole: bool = False  # the model is what a run has trained in full
    base_model: str = ""  # what the model was before it was trained in full, if that is known
    seed: int = 0
    split_seed: int = 0  # of rows that are split off: with another one than the run's, it was trained on some
    matmul: str = "auto"
    split: Split | None = None
    whole: bool = True  # nothing was trained on these data, so that none of it is kept apart
    questions: int | None = None
    max_answer_tokens: int = 128
    max_rationale_tokens: int | None = None  # None: twice the longest in the data
    temperature: float = 0.0
    batch_size: int | None = None
    base: bool = True
    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    score_as: FinalKind | None = None  # what final answers are; None: told from those that are expected
    limit_per_task: int | None = None
    worst: int = 5
    harness: tuple[str, ...] = ()
    harness_limit: int | None = None
    harness_include_path: str = ""
    window: int | None = None  # of raw text
    stride: int | None = None
    cross_documents: bool = False
    trained_in: Ruler | None = None  # the windows of the run, which say what of its text it kept apart
    notes: tuple[str, ...] = field(default=())

    @property
    def tuned(self) -> bool:
        """Whether there is a base that it was made of."""
        return bool(self.adapters or self.base_model)

    def __post_init__(self) -> None:
        asked, most, rows = self.questions, self.max_answer_tokens, self.batch_size
        window, stride = self.window, self.stride
        require(
            (window is None or window >= 1, "window", window, "a whole number from 1"),
            (stride is None or stride >= 1, "stride", stride, "a whole number from 1"),
            (asked is None or asked >= 0, "questions", asked, "a whole number from 0"),
            (
                self.limit_per_task is None or self.limit_per_task >= 1,
                "limit_per_task",
                self.limit_per_task,
                "a whole number from 1",
            ),
            (most >= 1, "max_answer_tokens", most, "a whole number from 1"),
            (
                self.max_rationale_tokens is None or self.max_rationale_tokens >= 1,
                "max_rationale_tokens",
                self.max_rationale_tokens,
                "a whole number from 1",
            ),
            (0 <= self.temperature < 100, "temperature", self.temperature, "a number from 0"),
            (rows is None or rows >= 1, "batch_size", rows, "a whole number from 1"),
            (self.worst >= 0, "worst", self.worst, "a whole number from 0"),
            (self.seed >= 0, "seed", self.seed, "a whole number from 0"),
            (self.harness_limit is None or self.harness_limit >= 1, "limit", self.harness_limit, "a whole number from 1"),
            (len(self.labels) != 1, "labels", self.labels, "two or more labels"),
            (all(words(label) for label in self.labels), "labels", self.labels, "labels with letters or digits in them"),
        )


def evaluate(wanted: Wanted, console: Console) -> tuple[Evaluation, list[Path]]:
    """Evaluate, and write the files; what is wrong with the input is said before anything takes long."""
    _require_folder(wanted.output)
    load_metrics(wanted.metrics, ())
    tasks = harness.tasks(wanted.harness, wanted.harness_include_path) if wanted.harness else None
    sources = find(wanted.source, training=False)
    is_text = holds_text(sources, wanted.source)
    if not is_text and (wanted.window or wanted.stride or wanted.cross_documents):
        raise ConfigError("window, stride, cross_documents: these are of raw text, and these rows are none. Leave them out.")
    loaded = load(wanted.model, wanted.matmul)
    console.fact("model", loaded.describe, backend.describe())
    how = _strided(wanted, loaded) if is_text else None
    digest = fingerprint(loaded.model)
    models = _Models(loaded, wanted)
    adapters = attach_from(loaded.model, wanted.adapters) if wanted.adapters else _whole(wanted)
    if wanted.adapters:
        console.fact("adapters", str(wanted.adapters))
    part = open_part(
        sources,
        wanted.source,
        wanted.render,
        loaded.tokenizer,
        wanted.split_seed,
        wanted.split,
        wanted.whole,
        console.preparing,
        texts=is_text,
        ruler=wanted.trained_in,
    )
    asked = part.questions(wanted.questions, wanted.limit_per_task) if wanted.questions != 0 else []
    console.end_bar()
    told = f"{part.rows:,} row{'s' if part.rows != 1 else ''} ({part.said})"
    text = Text(_documents(part), how, _size_of(loaded.tokenizer)) if how else None
    questions = "1 question is" if len(asked) == 1 else f"{len(asked):,} questions are"
    console.fact("data", f"{part.split}: {told}{'' if text else f', {questions} asked'}", *([text.describe] if text else []))
    metrics, labels, finals, left_out = _metrics(wanted, asked)
    doubts = _unknown(text, loaded.tokenizer) if text else _beyond(loaded, part, asked)
    notes = [*wanted.notes, *_doubts(wanted, part), *doubts, *left_out]

    losses, of_text, layout_notes = _losses(models, part, text, wanted, console)
    so_far = SoFar(wanted.output, (digest, adapters, *_how(wanted)), asked)
    answers = _answers(models, asked, wanted, so_far, console)
    found = Evaluation(
        model=loaded.name,
        adapters=str(wanted.adapters or ""),
        base=wanted.base_model,
        finals=finals,
        data=", ".join(wanted.source.sources),
        split=part.split,
        rows=part.rows,
        loss=losses[TUNED],
        base_loss=losses.get(BASE),
        predictions=results.predictions(asked, answers.texts, metrics, answers.thinking) if asked else (),
        metrics=tuple(metrics),
        labels=labels,
        worst_count=wanted.worst,
        settings=_settings(wanted, digest, adapters),
        versions=versions() | _packages(bool(tasks)),
        notes=(*notes, *layout_notes),
        examples=tuple((each.id, _digest(each, how)) for each in (text.units if text else part.examples)),
        text=text.to_json() if text else None,
        of_text=of_text,
        harness=_harness(tasks, models, part.renderer.pairs_are_chats, wanted, console) if tasks else {},
    )
    wanted.output.mkdir(parents=True, exist_ok=True)
    files = written.write(found, wanted.output)
    so_far.done()
    return found, files


def _require_folder(folder: Path) -> None:
    """Raise if nothing could be written there. It is made when there is something to write."""
    there = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunFolderError(f"--output-dir {folder}: {there} is no folder that may be written into. Name another one.")


# The model


class _Models:
    """The model that is asked about, and what it was before."""

    def __init__(self, loaded: Loaded, wanted: Wanted):
        self.own, self._wanted = loaded, wanted
        self._base: Loaded | None = None

    @contextmanager
    def named(self, which: str) -> Iterator[Loaded]:
        """The one or the other, while inside. A base that is another model is loaded once, beside the first."""
        if which == TUNED:
            yield self.own
        elif self._wanted.adapters:
            with lora.without_adapters(self.own.model):
                yield self.own
        else:
            self._base = self._base or load(self._wanted.base_model, self._wanted.matmul)
            yield self._base


def _whole(wanted: Wanted) -> str:
    """The digest of a model that a run has trained in full, as of adapters."""
    file = Path(wanted.model) / "model.safetensors"
    if not wanted.trained_whole:
        return ""
    return hashlib.sha256(file.read_bytes()).hexdigest()


# Losses


def _losses(
    models: _Models, part: Part, text: Text | None, wanted: Wanted, console: Console
) -> tuple[dict[str, Measured], dict[str, OfText], tuple[str, ...]]:
    """The plain cross-entropy of all examples, without label smoothing, so that its exponential is a perplexity."""
    examples = text.examples if text else part.examples
    if not examples:
        raise DataError(f"{part.said}: no row has anything whose loss could be measured.")
    model, of_text = models.own.model, {}
    plan = checked(Plan(forward_layout(model, examples), Passage(), compiled=False), model, sft(), examples[:SAMPLE])
    room = Room(plan.layout.token_budget, tell=lambda now: console.say(f"memory ended: at most {now:,} positions at once"))

    def measured(which: str, whose: str) -> Measured:
        def of(halvings: int) -> Measured:
            batches = lay_out(examples, smaller(plan.layout, halvings))
            with Progress(f"loss, {whose}", len(batches), "batches", console.say) as progress:
                return measure(now.model, sft(), progress.through(batches), examples)

        with models.named(which) as now, wired_memory(now.model):
            if text is None:
                return room.within(of)
            with Progress(f"loss, {whose}", len(examples), "windows", console.say) as progress:
                of_text[which] = text.score(now.model, plan.layout, room, progress.add)
            return of_text[which].loss

    return {which: measured(which, whose) for which, whose in _turns(wanted)}, of_text, plan.notes


def _turns(wanted: Wanted) -> list[tuple[str, str]]:
    """Whom to ask, and what they are called."""
    own = [(TUNED, "fine-tuned" if wanted.tuned else "model")]
    return [*own, (BASE, "base model")] if wanted.tuned and wanted.base else own


def _digest(example: Example, how: Strided | None) -> str:
    """Of what its loss is of: an id is a line's number in a file, and many a file is called valid.jsonl. Of text, the window
    is a part of that."""
    of = example.tokens.tobytes() + example.weights.tobytes() + (repr(how).encode() if how else b"")
    of += b"" if example.targets is None else example.targets.tobytes()
    return hashlib.blake2b(of, digest_size=8).hexdigest()


# Raw text


def _strided(wanted: Wanted, loaded: Loaded) -> Strided:
    """The windows that are wanted, or those of the run as far as the model reads."""
    most = loaded.config.get("max_position_embeddings")
    most = most if isinstance(most, int) else None
    if wanted.window and most and wanted.window > most:
        raise ConfigError(
            f"window: {wanted.window:,} came, at most {most:,} is expected: the model was made for so many tokens "
            "(max_position_embeddings in its config.json)."
        )
    window = wanted.window or min(wanted.render.max_seq_length, most or wanted.render.max_seq_length)
    return Strided(window, wanted.stride or max(1, window // 2), wanted.cross_documents)


def _documents(part: Part) -> list[Document]:
    """With the bytes of their text as it stands in the source: what tokens decode to may be without a space of it."""
    sizes, tokenizer = part.text_bytes(), part.renderer.tokenizer
    size_of = _size_of(tokenizer)
    for each in part.examples:
        if each.id in part.in_part and each.id in sizes:  # of what is not a whole text, its tokens tell
            sizes[each.id] = size_of(each.tokens.tolist())
    return [_document(each, sizes.get(row_of(each.id)), tokenizer) for each in part.examples]


def _document(example: Example, size: int | None, tokenizer: Any) -> Document:
    if size is None or not (example.weights[1:] == 1).all():
        return Document(example)
    first = example.tokens[0].item()
    if first not in tokenizer.all_special_ids:  # no tokenizer's own beginning, but one of the text's tokens, which is no target
        size -= _size_of(tokenizer)([first])
    return Document(example, max(size, 0), ended=example.tokens[-1].item() == tokenizer.eos_token_id)


def _unknown(text: Text, tokenizer: Any) -> list[str]:
    """Letters that the tokenizer does not have: the model foresees that there is one, and not which."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return []
    count = sum(int((each.example.tokens[1:] == unknown).sum()) for each in text.documents)
    said = "the tokenizer does not know their letters, so all measures look better than they are"
    return [f"{count:,} of {text.tokens:,} tokens are {tokenizer.unk_token}: {said}"] if count else []


def _size_of(tokenizer: Any) -> Callable[[Sequence[int]], int]:
    return lambda tokens: len(tokenizer.decode(tokens, skip_special_tokens=True).encode())


# Answers


def _metrics(wanted: Wanted, asked: Sequence[Question]) -> tuple[list[Named], tuple[str, ...], Finals, list[str]]:
    """(what is scored, the labels that the answers are, how final answers are read, what is left out). A person's own scores
    are tried once."""
    if not asked:
        return [], (), Finals(), []
    expected = [each.expected for each in asked]
    labels = _labels(wanted, asked)
    finals = _finals(wanted, asked)
    metrics, left_out = scores_for(expected, bool(labels))
    if finals.name == "final_number":  # which says the same more exactly
        metrics = [each for each in metrics if each.name != "numeric_accuracy"]
    metrics = [*finals.scores, *metrics]
    own = load_metrics(wanted.metrics, [each.name for each in metrics] + ["macro_f1"])
    for metric in own:
        metric.of(expected[0], expected[0])
    return [*metrics, *own], labels, finals, left_out


def _finals(wanted: Wanted, asked: Sequence[Question]) -> Finals:
    """An expected answer that has none of what is scored would count as wrong, whatever is answered."""
    finals = finals_for([(each.task, each.expected) for each in asked], wanted.score_as, wanted.labels)
    right = {task: each.of for each in finals.scores for task in each.tasks or ()}
    strange = [each for each in asked if finals.scores and not right[each.task](each.expected, each.expected)]
    if strange:
        one = strange[0]
        raise ConfigError(
            f"--score-as {wanted.score_as or 'text'}: {len(strange):,} of {len(asked):,} expected answers have no "
            f"{wanted.score_as or 'text'} in them, such as {one.expected!r:.60} in {one.id}. "
            "Say --score-as text, or take such rows out."
        )
    return finals


def _labels(wanted: Wanted, asked: Sequence[Question]) -> tuple[str, ...]:
    if not wanted.labels:  # the labels of several tasks are no classes
        return labels_of([each.expected for each in asked]) if len({each.task for each in asked}) < 2 else ()
    known = {tuple(words(label)) for label in wanted.labels}
    if len(known) < len(wanted.labels):
        raise ConfigError(f"--labels {','.join(wanted.labels)}: two of them differ in case or punctuation only. Keep one.")
    strange = [each for each in asked if tuple(words(each.expected)) not in known]
    if strange:
        one = strange[0]
        raise ConfigError(
            f"--labels {','.join(wanted.labels)}: {len(strange):,} of {len(asked):,} expected answers are none of them, "
            f"such as {one.expected!r:.60} in {one.id}. Name every label, or leave --labels out."
        )
    return wanted.labels


def _answers(models: _Models, asked: Sequence[Question], wanted: Wanted, so_far: SoFar, console: Console) -> Answers:
    """What the model, and without its adapters the base, answer. What is there when it is broken off stays."""
    if not asked:
        return Answers()
    if so_far.taken_over:
        console.say(f"{so_far.taken_over:,} answers of an evaluation that was broken off are taken over from {so_far.path}")
    found, how = Answers(), Asking(wanted.max_answer_tokens, wanted.temperature, wanted.seed, wanted.batch_size)
    try:
        for which, title in _turns(wanted):
            with models.named(which) as now:
                Asker(now, asked, how, wanted.max_rationale_tokens, so_far, console, which, title).ask(found)
    except KeyboardInterrupt:
        if count := sum(map(len, so_far.answers.values())):
            console.say(f"{count:,} answers are kept in {so_far.path}; the same command goes on from there")
        raise
    return found


def _how(wanted: Wanted) -> tuple[object, ...]:
    """What an answer depends on, besides who is asked what."""
    most = (wanted.max_rationale_tokens,) if wanted.max_rationale_tokens else ()
    return wanted.max_answer_tokens, wanted.temperature, wanted.seed, *most


# What goes into the report besides


def _doubts(wanted: Wanted, part: Part) -> list[str]:
    """What a reader of the scores should know of the data."""
    if wanted.whole:
        return []
    if part.split == "valid":
        best = "model" if wanted.trained_whole else "adapters"
        return [f"the validation rows chose the best {best}, so these scores are a little too good; test rows chose nothing"]
    return ["the model was trained on these rows: this says what it remembers"] if part.split == "train" else []


def _beyond(loaded: Loaded, part: Part, asked: Sequence[Question]) -> list[str]:
    """What is longer than the model was made for."""
    most = loaded.config.get("max_position_embeddings")
    if not isinstance(most, int):
        return []
    long = sum(len(each.tokens) > most for each in part.examples)
    prompts = sum(len(each.prompt) > most for each in asked)
    said = f"longer than the {most:,} tokens that the model was made for; what it makes of them tells little"
    return [f"{long:,} of {len(part.examples):,} examples and {prompts:,} of {len(asked):,} prompts are {said}"] if long else []


def _settings(wanted: Wanted, model: str, adapters: str) -> dict[str, Any]:
    plain = asdict(wanted) | {"output": str(wanted.output), "adapters": str(wanted.adapters or ""), "notes": None}
    render = plain["render"] | {"train_on": wanted.render.train_on.value}
    del plain["notes"]
    return plain | {"render": render, "model_fingerprint": model, "adapters_sha256": adapters}


def _packages(with_harness: bool) -> dict[str, str]:
    names = [*_PACKAGES, *(["lm-eval"] if with_harness else [])]
    modules = {"rouge-score": "rouge_score", "lm-eval": "lm_eval"}
    return {name: version(name) for name in names if importlib.util.find_spec(modules.get(name, name))}


def _harness(tasks: harness.Tasks, models: _Models, chat: bool, wanted: Wanted, console: Console) -> dict[str, Any]:
    def scored(which: str) -> dict[str, Any]:
        rows = wanted.batch_size or _HARNESS_ROWS
        with models.named(which) as now:
            return harness.run(tasks, now.model, now.tokenizer, chat, wanted.harness_limit, rows, wanted.seed)

    console.say(f"lm-evaluation-harness: {', '.join(wanted.harness)}")
    return {which: scored(which) for which, _ in _turns(wanted)}
