"""A model evaluated on data: its losses, its answers, and their scores, beside those of the base model."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.data.layout import Kind, Layout, lay_out, smaller
from mlx_qlora.data.part import Part, Split, open_part
from mlx_qlora.data.render import Question, RenderConfig
from mlx_qlora.data.shapes import fit as fit_shapes
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.engine.room import Room
from mlx_qlora.errors import ConfigError, DataError, ModelError, RunFolderError, require
from mlx_qlora.files import json_object
from mlx_qlora.look.console import Console
from mlx_qlora.look.evaluation import harness, results
from mlx_qlora.look.evaluation.answering import Progress, SoFar
from mlx_qlora.look.evaluation.generate import Asking, generate, without_adapters
from mlx_qlora.look.evaluation.labels import labels_of
from mlx_qlora.look.evaluation.own_metric import load_metrics
from mlx_qlora.look.evaluation.results import BASE, TUNED, Evaluation, Prediction
from mlx_qlora.look.evaluation.scores import Named, scores_for, words
from mlx_qlora.look.measure import Measured, measure
from mlx_qlora.model import backend, lora
from mlx_qlora.model.load import Loaded, fingerprint, load, wired_memory
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.trunk import Passage, can_pack, can_share, length_counts
from mlx_qlora.objectives.sft import sft
from mlx_qlora.plan import BUDGET, Plan, checked, common_prefix
from mlx_qlora.records import Example
from mlx_qlora.resume import versions

_SAMPLE = 64  # examples that the layouts are compared on
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
    seed: int = 0
    split_seed: int = 0  # of rows that are split off: with another one than the run's, it was trained on some
    matmul: str = "auto"
    split: Split | None = None
    whole: bool = True  # nothing was trained on these data, so that none of it is kept apart
    questions: int | None = None
    max_answer_tokens: int = 128
    temperature: float = 0.0
    batch_size: int | None = None
    base: bool = True
    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    worst: int = 5
    harness: tuple[str, ...] = ()
    harness_limit: int | None = None
    harness_include_path: str = ""
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        asked, most, rows = self.questions, self.max_answer_tokens, self.batch_size
        require(
            (asked is None or asked >= 0, "questions", asked, "a whole number from 0"),
            (most >= 1, "max_answer_tokens", most, "a whole number from 1"),
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
    loaded = load(wanted.model, wanted.matmul)
    console.fact("model", loaded.describe, backend.describe())
    digest = fingerprint(loaded.model)
    adapters = _attach(loaded.model, wanted.adapters) if wanted.adapters else ""
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
    )
    asked = part.questions(wanted.questions) if wanted.questions != 0 else []
    console.end_bar()
    told = f"{part.rows:,} row{'s' if part.rows != 1 else ''} ({part.said})"
    questions = "1 question is" if len(asked) == 1 else f"{len(asked):,} questions are"
    console.fact("data", f"{part.split}: {told}, {questions} asked")
    metrics, labels, left_out = _metrics(wanted, asked)
    notes = [*wanted.notes, *_doubts(wanted, part), *_beyond(loaded, part, asked), *left_out]

    losses, layout_notes = _losses(loaded, part, wanted, console)
    so_far = SoFar(wanted.output, (digest, adapters, *_how(wanted)), asked)
    answers = _answers(loaded, asked, wanted, so_far, console)
    found = Evaluation(
        model=loaded.name,
        adapters=str(wanted.adapters or ""),
        data=", ".join(wanted.source.sources),
        split=part.split,
        rows=part.rows,
        loss=losses[TUNED],
        base_loss=losses.get(BASE),
        predictions=_predictions(asked, answers, metrics),
        metrics=tuple(metrics),
        labels=labels,
        worst_count=wanted.worst,
        settings=_settings(wanted, digest, adapters),
        versions=versions() | _packages(bool(tasks)),
        notes=(*notes, *layout_notes),
        examples=tuple((each.id, _digest(each)) for each in part.examples),
        harness=_harness(tasks, loaded, part.renderer.pairs_are_chats, wanted, console) if tasks else {},
    )
    wanted.output.mkdir(parents=True, exist_ok=True)
    files = results.write(found, wanted.output)
    so_far.done()
    return found, files


def _require_folder(folder: Path) -> None:
    """Raise if nothing could be written there. It is made when there is something to write."""
    there = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunFolderError(f"--output-dir {folder}: {there} is no folder that may be written into. Name another one.")


# The model


def _attach(model: nn.Module, folder: Path) -> str:
    """Put the adapters of a folder on, as this library, mlx-lm or a checkpoint has them; gives their digest."""
    file = folder / "adapters.safetensors"
    if not file.is_file():
        raise ModelError(
            f"--adapters {folder}: no adapters.safetensors in it. "
            "A run's adapters or one of its checkpoint folders is expected."
        )
    try:
        arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    except Exception as error:  # whatever a damaged file makes MLX raise
        raise ModelError(f"{file}: it can't be read: {' '.join(str(error).split())[:200]}") from error
    paths = {name.removesuffix(".lora_a") for name in arrays if name.endswith(".lora_a")}
    if not paths:
        raise ModelError(f"{file}: no LoRA adapters are in it (none of its {len(arrays)} arrays is named ...lora_a).")
    own = {path for path, _ in model.named_modules()}
    if not paths & own:
        raise ModelError(
            f"{file}: these adapters are of another model: {min(paths)}, and none of the {len(paths)} layers that they "
            "change is in this one. Name the model that they were trained with."
        )
    rank = int(arrays[f"{min(paths)}.lora_a"].shape[-1])
    lora.attach(model, LoraConfig(rank=rank, scale=_scale(folder), dropout=0.0), predicate=lambda path, _: path in paths)
    lora.load(model, arrays, file)
    model.eval()
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _scale(folder: Path) -> float:
    """By what adapters are multiplied: it stands beside them, in the adapter's configuration or in a checkpoint's state."""
    config = json_object(folder / "adapter_config.json")
    if config.get("fine_tune_type", "lora") != "lora":
        raise ModelError(f"{folder / 'adapter_config.json'}: fine_tune_type {config['fine_tune_type']!r}: only lora is read.")
    kept = (json_object(folder / "state.json").get("config") or {}).get("lora") or {}
    scale = (config.get("lora_parameters") or kept).get("scale")
    if not isinstance(scale, int | float) or scale <= 0:
        raise ModelError(f"{folder}: neither adapter_config.json nor state.json in it says the scale of these adapters.")
    return float(scale)


# Losses


def _losses(loaded: Loaded, part: Part, wanted: Wanted, console: Console) -> tuple[dict[str, Measured], tuple[str, ...]]:
    """The plain cross-entropy of all examples, without label smoothing, so that its exponential is a perplexity."""
    if not part.examples:
        raise DataError(f"{part.said}: no row has anything whose loss could be measured.")
    model = loaded.model
    plan = checked(Plan(_layout(model, part.examples), Passage(), compiled=False), model, sft(), part.examples[:_SAMPLE])
    room = Room(plan.layout.token_budget, tell=lambda now: console.say(f"memory ended: at most {now:,} positions at once"))

    def measured(whose: str) -> Measured:
        def of(halvings: int) -> Measured:
            batches = lay_out(part.examples, smaller(plan.layout, halvings))
            with Progress(f"loss, {whose}", len(batches), "batches", console.say) as progress:
                return measure(model, sft(), progress.through(batches), part.examples)

        return room.within(of)

    with wired_memory(model):
        losses = {TUNED: measured(_title(wanted))}
        if wanted.adapters and wanted.base:
            with without_adapters(model):
                losses[BASE] = measured("base model")
    return losses, plan.notes


def _layout(model: nn.Module, examples: Sequence[Example]) -> Layout:
    """The fastest that this model takes; `checked` says whether it is exact."""
    if length_counts(model):
        return Layout(Kind.PLAIN, BUDGET, rows=1, step=1)
    if backend.on_cpu() and not can_pack(model):
        return Layout(Kind.PACKED, BUDGET)
    if can_share(model):
        return Layout(Kind.PLAIN, BUDGET)
    lengths = np.array([len(each.tokens) - 1 for each in examples])
    places = np.array([int((each.weights[1:] > 0).sum()) for each in examples])
    return Layout(Kind.PADDED, BUDGET, shapes=fit_shapes(lengths, places, common_prefix(examples[:_SAMPLE])))


def _digest(example: Example) -> str:
    """Of what its loss is of: an id is a line's number in a file, and many a file is called valid.jsonl."""
    return hashlib.blake2b(example.tokens.tobytes() + example.weights.tobytes(), digest_size=8).hexdigest()


# Answers


def _metrics(wanted: Wanted, asked: Sequence[Question]) -> tuple[list[Named], tuple[str, ...], list[str]]:
    """(what is scored, the labels that the answers are, what is left out). A person's own scores are tried once."""
    if not asked:
        return [], (), []
    expected = [each.expected for each in asked]
    labels = _labels(wanted, asked)
    metrics, left_out = scores_for(expected, bool(labels))
    own = load_metrics(wanted.metrics, [each.name for each in metrics] + ["macro_f1"])
    for metric in own:
        metric.of(expected[0], expected[0])
    return [*metrics, *own], labels, left_out


def _labels(wanted: Wanted, asked: Sequence[Question]) -> tuple[str, ...]:
    if not wanted.labels:
        return labels_of([each.expected for each in asked])
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


def _answers(
    loaded: Loaded, asked: Sequence[Question], wanted: Wanted, so_far: SoFar, console: Console
) -> dict[str, list[str]]:
    """What the model, and without its adapters the base, answer. What is there when it is broken off stays."""
    if not asked:
        return {}
    how = Asking(*_how(wanted), wanted.batch_size)
    if so_far.taken_over:
        console.say(f"{so_far.taken_over:,} answers of an evaluation that was broken off are taken over from {so_far.path}")
    turns = [(TUNED, _title(wanted))]
    turns += [(BASE, "base model")] if wanted.adapters and wanted.base else []
    try:
        for which, title in turns:
            with without_adapters(loaded.model) if which == BASE else nullcontext():
                _ask(loaded, asked, which, title, how, so_far, console)
    except KeyboardInterrupt:
        if count := sum(map(len, so_far.answers.values())):
            console.say(f"{count:,} answers are kept in {so_far.path}; the same command goes on from there")
        raise
    return {which: so_far.texts(which) for which, _ in turns}


def _title(wanted: Wanted) -> str:
    return "fine-tuned" if wanted.adapters else "model"


def _how(wanted: Wanted) -> tuple[int, float, int]:
    """What an answer depends on, besides who is asked what."""
    return wanted.max_answer_tokens, wanted.temperature, wanted.seed


def _ask(
    loaded: Loaded, asked: Sequence[Question], which: str, title: str, how: Asking, so_far: SoFar, console: Console
) -> None:
    left = so_far.left(which)
    if not left:
        return
    progress = Progress(title, len(left), "answers", console.say)
    with so_far.keeping(which, left) as keep, progress, wired_memory(loaded.model):

        def tell(found: Mapping[int, str]) -> None:
            keep(found)
            progress.add(len(found))

        def told(tokens: int) -> None:
            console.say(f"memory ended: answers of at most {tokens:,} tokens at once from now on")

        generate(loaded.model, loaded.tokenizer, [asked[number] for number in left], how, tell, told)


def _predictions(asked: Sequence[Question], answers: dict[str, list[str]], metrics: Sequence[Named]) -> tuple[Prediction, ...]:
    return results.predictions([(each.id, each.text, each.expected) for each in asked], answers, metrics) if asked else ()


# What goes into the report besides


def _doubts(wanted: Wanted, part: Part) -> list[str]:
    """What a reader of the scores should know of the data."""
    if wanted.whole:
        return []
    if part.split == "valid":
        return ["the validation rows chose the best adapters, so these scores are a little too good; test rows chose nothing"]
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


def _harness(tasks: harness.Tasks, loaded: Loaded, chat: bool, wanted: Wanted, console: Console) -> dict[str, Any]:
    def scored() -> dict[str, Any]:
        rows = wanted.batch_size or _HARNESS_ROWS
        return harness.run(tasks, loaded.model, loaded.tokenizer, chat, wanted.harness_limit, rows, wanted.seed)

    console.say(f"lm-evaluation-harness: {', '.join(wanted.harness)}")
    found = {TUNED: scored()}
    if wanted.adapters and wanted.base:
        with without_adapters(loaded.model):
            found[BASE] = scored()
    return found
