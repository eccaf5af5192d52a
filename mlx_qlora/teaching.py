"""A run's teacher, in the same memory or in a cache on disk, and what each batch is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.config import RunConfig
from mlx_qlora.data.corpus import Corpus
from mlx_qlora.data.kept_logits import KeptLogits, text_digest, vocabulary_digest
from mlx_qlora.data.layout import supervised_marks
from mlx_qlora.errors import ConfigError, ModelError
from mlx_qlora.model.attached import attach_from
from mlx_qlora.model.load import Loaded, fingerprint, load, outline
from mlx_qlora.model.trunk import Passage
from mlx_qlora.model.vocabularies import classes_of, common_vocabulary
from mlx_qlora.objectives.distill import DistillConfig, distil
from mlx_qlora.objectives.lesson import Lesson, Objective
from mlx_qlora.records import Batch

_ITSELF = "WARNING: this is the student itself, as it was: it can only hold it back. Its adapters are distill.teacher_adapters"
_LOOKED_AT = 4096  # examples whose places are looked for in a cache before training


@dataclass(frozen=True)
class Teaching:
    """Who teaches, and how."""

    config: DistillConfig
    common: int  # ids, from 0 on, that teacher and student have in common
    teacher: nn.Module | None
    kept: KeptLogits | None
    digest: str  # of its arrays, or of what the cache says of them
    describe: tuple[str, ...]
    matmul: Mapping[str, int] = field(default_factory=dict)  # how its weights are multiplied, as of the student

    def lesson(self, label_smoothing: float) -> Lesson:
        """What is learnt from a batch, and what that takes."""

        def objective(passage: Passage, teacher: nn.Module | None) -> Objective:
            return distil(self.config, self.common, teacher, label_smoothing, passage)

        return Lesson(objective, self._stand_ins, self.teacher)

    def told(self, batches: Sequence[Batch], epoch: float, done: float) -> tuple[Batch, ...]:
        """The batches of an update, with which so many epochs and this share of the run are done, with all that the objective
        asks for."""
        temperature, alpha = self.config.at(epoch, done)
        schedules = (mx.array(temperature), mx.array(alpha))
        return tuple(batch._replace(beside=(*schedules, *self._said(batch, temperature))) for batch in batches)

    def _said(self, batch: Batch, temperature: float) -> tuple[mx.array, ...]:
        """What the cache has of a batch's places."""
        if self.kept is None:
            return ()
        marks, weights = np.array(batch.marks[batch.positions]), np.array(batch.weights)
        if self.config.estimate == "sampled":
            found: Sequence[Any] = self.kept.samples(marks, weights)
        else:
            found = self.kept.classes(marks, weights, temperature, self._top_k)
        return tuple(mx.array(each) for each in found)

    def meet(self, corpus: Corpus) -> None:
        """Raise where the cache lacks places of the training examples, as far as some of these can tell."""
        if self.kept is None or corpus.train is None:
            return
        tokenizer = corpus.renderer.tokenizer
        template = text_digest(getattr(tokenizer, "chat_template", None))
        self.kept.differences(vocabulary_digest(tokenizer), template, corpus.digest())
        some = np.unique(np.linspace(0, len(corpus.train) - 1, _LOOKED_AT).astype(np.int64)).tolist()
        self.kept.require_places(np.concatenate([supervised_marks(corpus.train[number]) for number in some]))

    @property
    def _top_k(self) -> int | None:
        return self.config.top_k if self.config.estimate == "top_k" else None

    def _stand_ins(self, batch: Batch) -> tuple[mx.array, ...]:
        one, places = mx.array(1.0), batch.positions.size
        if self.kept is None:
            return one, one
        card = self.kept.card
        width = card.samples if self.config.estimate == "sampled" else min(self._top_k or card.top_k, card.top_k)
        scores, ids = mx.zeros((places, width), mx.float16), mx.zeros((places, width), mx.int32)
        return (one, one, scores, ids) if self.config.estimate == "sampled" else (one, one, scores, ids, mx.zeros(places))


def open_teaching(
    config: RunConfig, student: Loaded, outlined: bool = False, measured: Mapping[str, int] | None = None
) -> Teaching | None:
    """The teacher that a run asks for; None where it asks for none. `outlined`: its shapes are enough. `measured`: its
    `matmul` of an earlier start."""
    own = config.distill
    _require_sense(own)
    if not own.wanted:
        return None
    return _from_cache(own, student) if own.cache else _alive(config, student, outlined, measured)


def _require_sense(own: DistillConfig) -> None:
    """Raise for settings that nothing would read, or that can't be had together."""
    plain = asdict(DistillConfig())
    asked = [name for name, value in asdict(own).items() if value != plain[name]]
    if not own.wanted and asked:
        raise ConfigError(
            f"distill.{asked[0]}: {getattr(own, asked[0])!r} came, and there is no teacher. "
            "Name one with distill.teacher, or with distill.cache what `mlx-qlora distill cache` wrote; or leave it out."
        )
    needs_cache = {"distill.loss": own.loss == "uld" and "uld", "distill.estimate": own.estimate == "sampled" and "sampled"}
    for name, came in needs_cache.items():
        if came and own.wanted and not own.cache:
            raise ConfigError(f"{name}: {came} came, which goes by a cache only. Make it: mlx-qlora distill cache --help")
    unread = {  # name: (what came, where it counts)
        "distill.js_weight": own.js_weight != plain["js_weight"] and own.loss != "js" and (own.js_weight, "distill.loss: js"),
        "distill.top_k": own.top_k != plain["top_k"]
        and not own.cache  # which was made with it
        and own.estimate != "top_k"
        and (own.top_k, "distill.estimate: top_k"),
    }
    for name, found in unread.items():
        if found:
            raise ConfigError(
                f"{name}: {found[0]} came, which nothing reads: it goes with {found[1]}. Set that, or leave it out."
            )
    if own.estimate == "sampled" and (own.loss != "forward_kl" or own.temperatures != (1.0,)):
        raise ConfigError(
            "distill.estimate: sampled came, which is an estimate of forward_kl at temperature 1 only: "
            f"distill.loss is {own.loss}, distill.temperature {list(own.temperature)}."
        )


def _alive(config: RunConfig, student: Loaded, outlined: bool, measured: Mapping[str, int] | None) -> Teaching:
    own = config.distill
    try:
        loaded = outline(own.teacher) if outlined else load(own.teacher, config.matmul, measured)
    except ModelError as error:
        raise ModelError(f"distill.teacher: {error}") from error
    digest = "" if outlined else fingerprint(loaded.model)
    if own.teacher_adapters and not outlined:
        digest += attach_from(loaded.model, Path(own.teacher_adapters).expanduser(), "distill.teacher_adapters")
    loaded.model.freeze()
    loaded.model.eval()
    classes = [classes_of(each.model) for each in (student, loaded)]
    common = min(classes) if outlined else common_vocabulary(student.tokenizer, loaded.tokenizer, *classes)
    what = loaded.describe + (f" with {own.teacher_adapters}" if own.teacher_adapters else "")
    itself = own.teacher == config.model and not own.teacher_adapters
    told = (what, *_how(own), *([_ITSELF] if itself else []))
    return Teaching(own, common, loaded.model, None, digest, told, loaded.matmul)


def _from_cache(own: DistillConfig, student: Loaded) -> Teaching:
    kept = KeptLogits.open(Path(own.cache).expanduser())
    top_k = own.top_k if own.estimate == "top_k" else None
    kept.require(own.temperatures, own.logit_clip, own.estimate == "sampled", top_k, classes_of(student.model), own.loss)
    what = f"{kept.card.places:,} places of {kept.card.teacher} in {own.cache}"
    common = classes_of(student.model) if kept.card.across else kept.card.vocabulary
    other = own.teacher and own.teacher != kept.card.teacher
    doubt = [f"WARNING: distill.teacher names {own.teacher}, and it is the cache that is learnt from"] if other else []
    return Teaching(own, common, None, kept, kept.card.fingerprint + kept.card.adapters, (what, *_how(own), *doubt))


def _how(own: DistillConfig) -> tuple[str, ...]:
    def shown(numbers: Sequence[float]) -> str:
        return " -> ".join(f"{each:g}" for each in numbers)

    loss = {"forward_kl": "KL(teacher, student)", "reverse_kl": "KL(student, teacher)", "uld": "sorted probabilities"}
    kind = loss.get(own.loss, f"Jensen-Shannon, {own.js_weight:g} of the teacher")
    over = "epoch by epoch" if own.schedule == "epochs" else f"over the run, {own.schedule}"
    over = over if max(len(own.temperature), len(own.alpha)) > 1 else "throughout"
    power = "" if own.loss == "uld" else " x T^2"
    return (
        f"{kind}; temperature {shown(own.temperature)}, alpha {shown(own.alpha)}, {over}",
        f"loss = alpha{power} x divergence + (1 - alpha) x cross-entropy; validation is cross-entropy alone",
    )


def epochs_of(total: int, per_epoch: int | None, epochs: int) -> float:
    """How many epochs a run has, part of one where max_steps ends it."""
    return min(float(epochs), total / per_epoch) if per_epoch else float(epochs)
