"""What a teacher says at each supervised place, kept on the disk, so that teacher and student need never be in memory
together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_qlora.build import LOOK_AT, new_model, new_tokenizer, read_corpus
from mlx_qlora.config import RunConfig
from mlx_qlora.data.audit import audit
from mlx_qlora.data.corpus import Corpus
from mlx_qlora.data.kept_logits import text_digest, vocabulary_digest
from mlx_qlora.data.layout import Layout, lay_out, smaller, supervised_marks
from mlx_qlora.data.logit_shards import Card, Records, Writer, matmul_of, open_writer, require_folder
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.distilling.across import Crossing, Renaming, crossing
from mlx_qlora.distilling.condense import condense, draws
from mlx_qlora.engine.room import Room
from mlx_qlora.errors import ConfigError, DataError, ModelError, RunFolderError, require
from mlx_qlora.look.console import Console, many, size
from mlx_qlora.look.evaluation.answering import Progress
from mlx_qlora.model import backend
from mlx_qlora.model.attached import attach_from
from mlx_qlora.model.load import Loaded, fingerprint, load, load_tokenizer, outline, wired_memory
from mlx_qlora.model.trunk import PLAIN, summed_loss
from mlx_qlora.model.vocabularies import classes_of, common_vocabulary
from mlx_qlora.objectives.sft import sft
from mlx_qlora.plan import SAMPLE, Plan, checked, forward_layout
from mlx_qlora.records import Batch, Example
from mlx_qlora.resume import versions
from mlx_qlora.run.interrupt import Asked, listening

_GROUP = 65_536  # tokens of examples that are laid out together: what they have in common is computed once
_SAMPLES = 32  # classes drawn at a place, where a run learns from these


@dataclass(frozen=True)
class Wanted:
    """What is no setting of a run."""

    samples: int | None = None
    """So many tokens drawn from the teacher at each place, for distill.estimate: sampled; without a number 32 for that, else
    none."""
    split: Literal["train", "all"] = "train"
    """Whose places: those of the training examples, or of validation, too, whose loss in training needs no teacher."""
    shard_mb: float = 8.0
    """What a kill can take: so many megabytes are written at once."""

    def __post_init__(self) -> None:
        require(
            (self.samples is None or 0 <= self.samples <= 4096, "samples", self.samples, "a whole number from 0 to 4096"),
            (1e-3 <= self.shard_mb <= 1024, "shard_mb", self.shard_mb, "a number from 0.001 to 1024"),
        )


def make(config: RunConfig, wanted: Wanted, console: Console) -> int:
    """Fill the cache of a run; gives the exit code."""
    _require_complete(config)
    folder = Path(config.distill.cache).expanduser()
    require_folder(folder)
    sources = find(config.part(SourceConfig))
    student = _student(config, sources, console)
    corpus = read_corpus(config, student.tokenizer, console, sources)
    console.account(audit(corpus, look_at=LOOK_AT))
    teacher = load(config.distill.teacher, config.matmul, {} if config.overwrite else matmul_of(folder))
    console.fact("teacher", teacher.describe, backend.describe())
    taught = _taught(config, wanted, student, teacher, corpus, console)
    examples = _Taught(taught) if taught else _Examples(corpus, wanted.split == "all")
    card = _card(config, wanted, student, teacher, corpus)
    plan = checked(_plan(config, teacher.model, examples.sample), teacher.model, sft(), examples.sample)
    console.layout(plan.describe, plan.notes)
    writer = open_writer(folder, card, int(wanted.shard_mb * 1e6), config.overwrite)
    try:
        return _fill(Renaming(writer, taught) if taught else writer, teacher.model, plan.layout, examples, console)
    finally:
        writer.close()


# What it is made of


def _require_complete(config: RunConfig) -> None:
    config.require_one_model()
    given = {
        "--model": (config.model or config.preset, "the student, whose tokenizer makes the tokens; its weights are not loaded"),
        "--data": (config.data, "the folder that the student will be trained on"),
        "--distill.teacher": (config.distill.teacher, "the model that is to be learnt from"),
        "--distill.cache": (config.distill.cache, "the folder to write"),
    }
    lines = [f"  {flag:<18} {what}" for flag, (value, what) in given.items() if not value]
    if lines:
        raise ConfigError("these are missing:\n" + "\n".join(lines) + "\nGive them here or in a file (--config run.yaml).")
    if config.streaming:
        raise ConfigError("streaming: a stream has no end, and what a teacher says of it could not be kept. Leave it out.")
    if config.preset and not config.tokenizer:
        raise ConfigError(
            f"preset: {config.preset} came, whose tokenizer would be learnt from the data, and no teacher has it. "
            f"Take the teacher's: --tokenizer {config.distill.teacher}"
        )


@dataclass(frozen=True)
class _Student:
    tokenizer: Any
    classes: int


def _student(config: RunConfig, sources: Any, console: Console) -> _Student:
    """What of the student is needed: no weight is read."""
    if config.preset:
        tokenizer = new_tokenizer(config, sources, console)
        return _Student(tokenizer, classes_of(new_model(config, tokenizer, console).model))
    student = outline(config.model)
    console.fact("student", f"{student.describe}; its weights are not loaded")
    return _Student(load_tokenizer(config.model), classes_of(student.model))


def _card(config: RunConfig, wanted: Wanted, student: _Student, teacher: Loaded, corpus: Corpus) -> Card:
    """Puts the teacher's adapters on."""
    distill, samples, tokenizer = config.distill, wanted.samples, student.tokenizer
    digest, classes = fingerprint(teacher.model), classes_of(teacher.model)
    across = distill.loss == "uld"
    common = _known(teacher) if across else common_vocabulary(tokenizer, teacher.tokenizer, student.classes, classes)
    adapters = Path(distill.teacher_adapters).expanduser() if distill.teacher_adapters else None
    return Card(
        teacher=teacher.name,
        fingerprint=digest,
        adapters=attach_from(teacher.model, adapters, "distill.teacher_adapters") if adapters else "",
        tokenizer=vocabulary_digest(tokenizer),
        template=text_digest(getattr(corpus.renderer.tokenizer, "chat_template", None)),
        data=corpus.digest(),
        top_k=min(distill.top_k, common),
        samples=samples if samples is not None else _SAMPLES if distill.estimate == "sampled" else 0,
        temperatures=distill.temperatures,
        logit_clip=distill.logit_clip,
        vocabulary=common,
        teacher_vocabulary=classes,
        matmul=teacher.matmul,
        across=across,
        versions=versions(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _taught(
    config: RunConfig, wanted: Wanted, student: _Student, teacher: Loaded, corpus: Corpus, console: Console
) -> Crossing | None:
    """The places of a teacher with other tokens; None: it has the student's."""
    if config.distill.loss != "uld":
        return None
    if wanted.samples or config.distill.estimate == "sampled":
        raise ConfigError("distill.loss: uld came with samples, of which nobody could say what they are among sorted classes.")
    made = crossing(corpus, wanted.split == "all", student.tokenizer, teacher.tokenizer, console.preparing)
    console.fact("across", *made.describe)
    return made


def _known(teacher: Loaded) -> int:
    """Classes of a teacher that its tokenizer has tokens for."""
    known = 1 + max(teacher.tokenizer.get_vocab().values())
    return min(classes_of(teacher.model), int(known))


def _plan(config: RunConfig, model: nn.Module, sample: Sequence[Example]) -> Plan:
    layout = forward_layout(model, sample)
    if config.token_budget:
        layout = Layout(layout.kind, config.token_budget, layout.rows, layout.step, layout.shapes)
    return Plan(layout, PLAIN, compiled=False)


class _Examples:
    """All examples whose places are kept, in groups that are laid out together."""

    def __init__(self, corpus: Corpus, validation: bool):
        assert corpus.train is not None, "streams are refused"
        self._train, self._valid = corpus.train, corpus.valid_examples() if validation else []
        spread = np.unique(np.linspace(0, len(self._train) - 1, SAMPLE).astype(int))
        self.sample = [self._train[number] for number in spread.tolist()]

    def __iter__(self) -> Iterator[Example]:
        yield from (self._train[number] for number in range(len(self._train)))
        yield from self._valid

    def groups(self) -> Iterator[list[Example]]:
        group: list[Example] = []
        size = 0
        for example in self:
            group.append(example)
            size += len(example.tokens)
            if size >= _GROUP:
                yield group
                group, size = [], 0
        if group:
            yield group


class _Taught(_Examples):
    """Those of a teacher with other tokens."""

    def __init__(self, taught: Crossing):
        self._taught = taught
        self.sample = list(islice(iter(taught), SAMPLE))

    def __iter__(self) -> Iterator[Example]:
        return iter(self._taught)


# Filling


class _Places:
    """The places that are wanted, and which of them are there."""

    def __init__(self, examples: Iterable[Example], there: NDArray[np.uint64]):
        self._wanted = np.unique(np.concatenate([np.empty(0, np.uint64), *map(supervised_marks, examples)]))
        self._there = np.isin(self._wanted, there)
        self.others = len(there) - int(np.count_nonzero(self._there))  # that are there and were not asked for

    def __len__(self) -> int:
        return len(self._wanted)

    @property
    def left(self) -> int:
        return int(np.count_nonzero(~self._there))

    def lacking(self, marks: NDArray[np.uint64]) -> NDArray[np.bool_]:
        lacking: NDArray[np.bool_] = ~self._there[np.searchsorted(self._wanted, marks)]
        return lacking

    def have(self, marks: NDArray[np.uint64]) -> None:
        self._there[np.searchsorted(self._wanted, marks)] = True


def _fill(writer: Writer | Renaming, model: nn.Module, layout: Layout, examples: _Examples, console: Console) -> int:
    card = writer.card
    for problem in writer.problems:
        console.say(f"WARNING: {problem}; it is made again")
    places = _Places(examples, writer.marks())
    _announce(card, writer.folder, places, console)
    todo, begun = places.left, time.monotonic()
    room = Room(layout.token_budget, tell=lambda now: console.say(f"memory ended: at most {now:,} positions at once"))
    try:
        with (
            wired_memory(model),
            Progress("teacher", todo, "places", console.say) as progress,
            listening(lambda: console.say("stopping after this batch; a second Ctrl-C stops at once")) as asked,
        ):
            one = _One(model, card, places, writer, progress.add, asked)
            for group in examples.groups():
                if not asked.stop and any(places.lacking(supervised_marks(each)).any() for each in group):
                    room.within(partial(one.group, group, layout))
    except KeyboardInterrupt:
        asked = Asked()
        asked.stop = True
    except BaseException:
        with suppress(DataError):  # that the disk is full was just said
            writer.flush()
        raise
    if asked.stop and places.left:
        writer.flush()
        console.say(
            f"\ninterrupted: {writer.card.places:,} places are kept in {writer.folder}, {places.left:,} are left. "
            "The same command goes on."
        )
        return 130
    writer.finish()
    _report(writer, todo, time.monotonic() - begun, console)
    return 0


def _announce(card: Card, folder: Path, places: _Places, console: Console) -> None:
    """Say how much it will be; raise where the disk has no room for it."""
    left = places.left
    known = f", {len(places) - left:,} of them there already" if left < len(places) else ""
    need = left * card.place_bytes
    per = f"{card.place_bytes} bytes each: the {card.top_k:,} likeliest of {card.vocabulary:,} classes and the rest"
    drawn = f", {card.samples:,} drawn" if card.samples else ""
    others = [f"{many(places.others, 'place')} of other data stay there"] if places.others else []
    console.fact("places", f"{len(places):,}{known}", f"{per}{drawn}, so about {_megabytes(need)} to write")
    console.fact("cache", str(folder), *others)
    free = shutil.disk_usage(folder).free
    if need * 1.05 > free:
        raise RunFolderError(
            f"distill.cache: {_megabytes(need)} are to be written, and {_megabytes(free)} are free at {folder}. "
            "Make room, name another folder, or keep less: a smaller distill.top_k."
        )


def _report(writer: Writer | Renaming, made: int, seconds: float, console: Console) -> None:
    card, bytes_ = writer.card, sum(each.bytes for each in writer.shards)
    console.say()
    speed = f", {made / seconds:,.0f} a second" if made and seconds else ""
    console.fact("made", f"{many(made, 'place')}{speed}" if made else "nothing: all of it was there")
    each = f", {bytes_ / card.places:.0f} bytes a place" if card.places else ""
    console.fact("kept", f"{many(card.places, 'place')}, {_megabytes(bytes_)} in {many(len(writer.shards), 'shard')}{each}")
    if card.clipped:
        share = f"{card.clipped / card.places:.2%}"
        console.fact("clipped", f"logits beyond {card.logit_clip:g} at {many(card.clipped, 'place')} ({share})")
    console.fact("to train", f"mlx-qlora distill --distill.cache {writer.folder}, and the settings that this was made with")


def _megabytes(number: float) -> str:
    return size(number) if number >= 1e7 else f"{number / 1e6:.2f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"


@dataclass(frozen=True)
class _One:
    """Computes the places of some examples that are not there yet."""

    model: nn.Module
    card: Card
    places: _Places
    writer: Writer | Renaming
    done: Callable[[int], None]
    asked: Asked

    def group(self, examples: Sequence[Example], layout: Layout, halvings: int) -> None:
        for batch in lay_out(examples, smaller(layout, halvings)):
            if self.asked.stop:
                return
            if records := self._records(batch):
                self.writer.add(records)
                self.places.have(records.marks)
                self.done(len(records))

    def _records(self, batch: Batch) -> Records | None:
        marks = np.array(batch.marks[batch.positions])
        at = np.flatnonzero(np.array(batch.weights))
        at = at[self.places.lacking(marks[at])]
        at = np.sort(at[np.unique(marks[at], return_index=True)[1]])  # two targets of one place are one record
        if not len(at):
            return None
        own = mx.array(at)
        batch = batch._replace(positions=batch.positions[own], targets=batch.targets[own], weights=batch.weights[own])
        said = mx.array(draws(marks[at], self.card.samples))
        summed, _ = summed_loss(self.model, batch, self._condensed, (said,))
        _, *found = summed.places  # in front stands a loss, which nobody asked for
        values, ids, rests, drawn, drawn_ids, bit = map(np.array, found)
        if not np.isfinite(values).all():
            count = int((~np.isfinite(values).all(axis=1)).sum())
            raise ModelError(
                f"distill.teacher: {self.card.teacher} gave logits that are no numbers at {count:,} of {len(at):,} places. "
                "Nothing can be learnt from these; take it in another precision or quantisation."
            )
        return Records(marks[at], values, ids, rests, drawn, drawn_ids, int(np.count_nonzero(bit)))

    def _condensed(self, logits: mx.array, draws: mx.array) -> tuple[mx.array, ...]:
        card = self.card
        found = condense(logits, card.vocabulary, card.top_k, card.temperatures, card.logit_clip, draws)
        nothing = mx.zeros(logits.shape[0])
        return nothing, nothing, *found
