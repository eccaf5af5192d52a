"""Everything that a run needs, built from its configuration; nothing is trained here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qlora.config import RunConfig, flat
from mlx_qlora.data.audit import audit
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.exposure import Exposure
from mlx_qlora.data.layout import BatchConfig, Layout, lay_out, smaller
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import Source, SourceConfig, find
from mlx_qlora.data.vocabulary import learn
from mlx_qlora.data.windows import WindowConfig
from mlx_qlora.engine.memory import MemoryConfig
from mlx_qlora.engine.optim import OptimConfig, make_optimizer, times
from mlx_qlora.engine.optim import begin as begin_optimizer
from mlx_qlora.engine.room import Room
from mlx_qlora.engine.steps import Engine, Enter, Objective
from mlx_qlora.errors import ConfigError, ResumeError
from mlx_qlora.look.console import Console
from mlx_qlora.look.exposure import brief
from mlx_qlora.look.teaching import doubts
from mlx_qlora.model import backend, lora
from mlx_qlora.model.activations import KeptTrunk, TrunkCacheConfig, first_kept, open_kept
from mlx_qlora.model.create import CreateConfig, create, describe, wanted_vocabulary
from mlx_qlora.model.full import FullConfig, model_files
from mlx_qlora.model.load import Loaded, as_loaded, fingerprint, load, load_tokenizer
from mlx_qlora.model.trained import Trained, begin, of_vocabulary
from mlx_qlora.objectives.lesson import answers_only
from mlx_qlora.objectives.sft import sft
from mlx_qlora.outlook import planned, warnings
from mlx_qlora.plan import Plan, checked, choose
from mlx_qlora.records import BEGIN, START, Batch, Example, TrainState, Update
from mlx_qlora.resume import (
    as_before,
    computing,
    require_format,
    require_same,
    settings_changed,
    versions,
    versions_changed,
)
from mlx_qlora.run import checkpoint as checkpoints
from mlx_qlora.run import disk
from mlx_qlora.run import folder as run_folder
from mlx_qlora.run.checkpoint import Checkpoint
from mlx_qlora.teaching import Teaching, epochs_of, open_teaching

MODEL = "model"  # the folder in a run's own where a model lies of which all was trained
LOOK_AT = 2000  # examples that are compared with each other before training; `mlx-qlora data` takes more


@dataclass(frozen=True)
class Ready:
    """All that a run needs, built."""

    config: RunConfig
    loaded: Loaded
    trained: Trained
    folder: Path
    objective: Objective  # of training
    judge: Objective  # of validation: the cross-entropy, whatever is trained, so that runs can be compared
    plan: Plan
    optim: OptimConfig
    total: int
    eval_every: int
    valid: list[Example]
    train_sample: list[Example]
    corpus: Corpus
    exposure: Exposure
    kept: KeptTrunk | None
    teaching: Teaching | None
    epochs: float  # that it will have, part of one where max_steps ends it
    cache: int | None  # bytes of freed buffers that MLX may keep
    facts: dict[str, Any]  # what a checkpoint is compared by
    checkpoint: Checkpoint | None  # where it goes on

    @property
    def settings(self) -> str:
        """What config.yaml says."""
        return _as_kept(self.config).to_yaml()

    @property
    def reads_text(self) -> bool:
        """Whether its losses are of raw text, so that their exponential is a perplexity."""
        return self.corpus.windows is not None and not self.config.label_smoothing

    def layout(self, halvings: int = 0) -> Layout:
        return smaller(self.plan.layout, halvings)

    def lay_out(self, update: Update, halvings: int = 0) -> tuple[Batch, ...]:
        """An update's batches, with what the layers below the adapters give, where that is kept, and what a teacher says."""
        return self._completed(lay_out(update.examples, self.layout(halvings)), update)

    def _completed(self, batches: tuple[Batch, ...], update: Update) -> tuple[Batch, ...]:
        batches = tuple(self.kept.batches(batches)) if self.kept else batches
        if self.teaching is None:
            return batches
        if self.corpus.train is None:  # a stream: its epoch is how often all of it was read before
            return self.teaching.told(batches, update.epoch + 1, update.done)
        return self.teaching.told(batches, update.epoch, update.epoch / self.epochs)

    def updates(self, state: TrainState = BEGIN, room: Room | None = None) -> Iterator[Update]:
        """The updates that are still to be made."""
        room = room or Room(self.plan.layout.token_budget, state.halvings)
        batch, layout = self.config.part(BatchConfig), self.layout(state.halvings)
        coming = self.corpus.updates(batch, layout, self.config.epochs, state.next)
        left = islice(coming, max(0, self.total - state.step))
        if not (self.kept or self.teaching):
            return left
        counted = (replace(update, done=step / self.total) for step, update in enumerate(left, state.step + 1))
        return (self._attached(update, state.halvings, room) for update in counted)

    def _attached(self, update: Update, laid_for: int, room: Room) -> Update:
        """With what is to be known beside them. It may be computed while the update before is, and memory may end."""

        def batches(halvings: int) -> tuple[Batch, ...]:
            return self._completed(update.batches, update) if halvings == laid_for else self.lay_out(update, halvings)

        return replace(update, batches=room.within(batches))

    def engine(self, rate: float = 1.0) -> Engine:
        """What makes the updates; `rate`: by what the learning rate is multiplied."""
        model, params = self.loaded.model, self.loaded.model.trainable_parameters()
        optimizer = make_optimizer(times(self.optim, rate), self.total, params, of_vocabulary(model))
        begin_optimizer(optimizer, params)
        return Engine(
            model=model,
            objective=self.objective,
            optimizer=optimizer,
            config=self.optim,
            with_key=lora.dropout_keys,
            seed=self.config.seed,
            compiled=self.plan.compiled,
            computes_in=self.trained.computes_in,
            lay_out=self.lay_out,
            rehearse=None if self.plan.roomy else self._longest(),
        )

    def _longest(self) -> Update | None:
        """An update of the longest examples, of which a cache of logits need not know."""
        examples = tuple(self.corpus.longest(self.config.examples_per_update))
        return Update((), 0.0, examples, 0, 0, START) if examples else None


def build(config: RunConfig, console: Console, enter: Enter) -> Ready:
    """Read, load, attach, lay out; claim the folder last, so that a wrong setting or row leaves nothing behind."""
    folder = Path(config.output_dir).expanduser()
    source, batch = config.part(SourceConfig), config.part(BatchConfig)
    optim_config = config.part(OptimConfig)
    sources = find(source)  # before the model is loaded: a wrong path is said at once
    if config.streaming and config.max_steps is None:
        raise ConfigError("max_steps: with streaming the data has no known length; say how many updates to train.")
    found = _where_to_go_on(config, folder, console) if config.resume else None
    chosen = as_before(found, config) if found else config

    enter("load")
    loaded = _loaded(chosen, sources, found, console)
    model_digest = fingerprint(loaded.model)
    trained = begin(loaded, config.lora, config.part(FullConfig), seed=config.seed, base=config.model)
    _require_vocabulary(optim_config, loaded.model)
    console.fact(trained.name, *trained.describe)
    kept_way = found.state["computing"].get("teacher_matmul") if found else None
    teaching = open_teaching(config, loaded, measured=kept_way)
    if teaching:
        console.fact("teacher", *teaching.describe, *doubts(flat(config.plain())))
    mx.eval(loaded.model.parameters())
    enter("tokenise")
    corpus = read_corpus(config, loaded.tokenizer, console, sources)
    account = audit(corpus, look_at=LOOK_AT)
    console.account(account)
    if teaching:
        teaching.meet(corpus)
    data_digest = corpus.digest()
    if found:
        require_same(found, model_digest, data_digest, config, teaching.digest if teaching else "")

    enter("plan")
    total, per_epoch = _length(config, corpus, batch)
    eval_every = config.eval_every or max(1, (per_epoch or total) // 4)
    enter("plan", planned=total, eval_every=eval_every)  # for whoever looks on from outside
    console.plan(optim_config, batch.examples_per_update, per_epoch, total, eval_every)
    exposure = planned(config, corpus, trained.trainable, trained.total)
    console.exposure(brief(exposure, config.max_seq_length), warnings(config, exposure))
    keeping = config.part(TrunkCacheConfig)
    lesson = teaching.lesson(config.label_smoothing) if teaching else answers_only(config.label_smoothing)
    plan = choose(chosen, loaded.model, corpus, first=first_kept(keeping, loaded.model), lesson=lesson)
    sample = corpus.train_sample()
    plan = checked(plan, loaded.model, sft(config.label_smoothing, plan.passage), sample)
    if lesson.teacher:
        plan = checked(plan, lesson.teacher, sft(), sample)
    kept = open_kept(keeping, loaded.model, config.model, plan.passage.first)
    console.layout(plan.describe, plan.notes)
    if plan.memory:
        console.memory(plan.memory, backend.memory())
    console.fact("folder", str(folder))
    if found:
        checkpoints.sweep(folder)
    else:
        run_folder.clear(folder, config.overwrite, trained.begins_with)
        if config.preset:
            _keep_tokenizer(folder, loaded)
        # That of a run that goes on is written once a checkpoint has the new settings.
        disk.write_atomically(folder / "config.yaml", _as_kept(config).to_yaml())
    disk.write_json(folder / "data_account.json", account.to_json())
    if corpus.renderer.brought_template and not corpus.only_text:
        disk.write_atomically(folder / "chat_template.jinja", loaded.tokenizer.chat_template)
    return Ready(
        config=config,
        loaded=loaded,
        trained=trained,
        folder=folder,
        objective=lesson.objective(plan.passage, lesson.teacher),
        judge=sft(config.label_smoothing, plan.passage),
        plan=plan,
        optim=optim_config,
        total=total,
        eval_every=eval_every,
        valid=corpus.valid_examples(),
        train_sample=sample,
        corpus=corpus,
        exposure=exposure,
        kept=kept,
        teaching=teaching,
        epochs=epochs_of(total, per_epoch, config.epochs),
        cache=plan.cache(config.part(MemoryConfig).limit(backend.memory())),
        facts={
            "config": _as_kept(config).plain(),
            "computing": computing(plan, loaded.matmul) | ({"teacher_matmul": dict(teaching.matmul)} if teaching else {}),
            "model": model_digest,
            "data": data_digest,
            "teacher": teaching.digest if teaching else "",
            "versions": versions(),
            "planned_steps": total,
        },
        checkpoint=found,
    )


def read_corpus(config: RunConfig, tokenizer: Any, console: Console, sources: tuple[Source, ...] | None = None) -> Corpus:
    """A run's data, by its settings, in a tokenizer's tokens."""
    return gather(
        config.part(SourceConfig),
        config.part(RenderConfig),
        tokenizer,
        config.seed,
        console.preparing,
        sources=sources,
        windows=config.part(WindowConfig),
        from_nothing=bool(config.preset),
    )


def _require_vocabulary(config: OptimConfig, model: nn.Module) -> None:
    """Raise if embeddings and head have a learning rate of their own, and neither is trained."""
    rate, chosen = config.embedding_learning_rate, of_vocabulary(model)
    arrays: list[tuple[str, mx.array]] = tree_flatten(model.trainable_parameters())  # type: ignore[assignment]
    if rate is not None and not any(chosen(name) for name, _ in arrays):
        raise ConfigError(
            f"embedding_learning_rate: {rate:g} came, but neither embeddings nor head are trained. Leave it out, or train "
            "them: --lora.targets all-linear embeddings"
        )


def _loaded(config: RunConfig, sources: Sequence[Source], found: Checkpoint | None, console: Console) -> Loaded:
    """The model that is trained, and its tokenizer: loaded, or new."""
    if not config.preset:
        loaded = load(config.model, config.matmul, found.state["computing"]["matmul"] if found else None)
        console.fact("model", loaded.describe, backend.describe())
        return loaded
    kept = Path(config.output_dir).expanduser() / MODEL if found else None
    return new_model(config, new_tokenizer(config, sources, console, kept), console)


def new_model(config: RunConfig, tokenizer: Any, console: Console) -> Loaded:
    """The same for every start of a run, and for its plan; not computed yet."""
    loaded = create(config.part(CreateConfig), tokenizer, config.seed, config.max_seq_length)
    console.fact("model", describe(loaded), backend.describe())
    return loaded


def new_tokenizer(config: RunConfig, sources: Sequence[Source], console: Console, kept: Path | None = None) -> Any:
    """The tokenizer of a new model: the one that a run kept, one that is named, or one that is trained on the data."""
    if kept and (kept / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(str(kept))
        console.fact("tokenizer", f"{len(tokenizer.get_vocab()):,} tokens, as the run began with it")
    elif config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
        console.fact("tokenizer", f"{len(tokenizer.get_vocab()):,} tokens, that of {config.tokenizer}")
    else:
        wanted = wanted_vocabulary(config.part(CreateConfig))
        learned = learn(sources, config.part(SourceConfig), wanted, config.chat_template)
        tokenizer = as_loaded(learned.tokenizer)
        console.fact("tokenizer", *learned.describe)
    return tokenizer


def _keep_tokenizer(folder: Path, loaded: Loaded) -> None:
    """Where the model will lie; without config.json it is none yet."""
    (folder / MODEL).mkdir(exist_ok=True)
    for name, content in model_files(loaded).items():
        if name != "config.json":
            disk.write_atomically(folder / MODEL / name, content)


def _as_kept(config: RunConfig) -> RunConfig:
    """Without what was said to this start of the run alone."""
    return replace(config, overwrite=False, resume=False, resume_anyway=False, supervise=0, trace=False)


def _where_to_go_on(config: RunConfig, folder: Path, console: Console) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where a run is to begin. Refuses to begin where one would be lost."""
    found, damaged = checkpoints.newest(folder)
    for problem in damaged:
        console.fact("resume", problem)
    if found:
        require_format(found)
        console.resumes(found, [*settings_changed(found, config), *versions_changed(found)])
        return found
    best = run_folder.delivered(folder)
    kept = best.parent.name if best else "adapters"
    if damaged:
        raise ResumeError(f"resume: no checkpoint in {folder} is whole. To begin anew, say --overwrite; {kept}/ goes then.")
    if run_folder.has_validated(folder):
        validated = "a validated model" if kept == "model" else "validated adapters"
        raise ResumeError(f"resume: {folder} has {validated} and no checkpoint. To begin anew, say --overwrite.")
    if run_folder.held_by_a_run(folder):
        console.fact("resume", "the run ended before its first checkpoint; it begins anew")
    else:
        console.fact("resume", f"there is no run in {folder} yet; it begins")
    return None


def _length(config: RunConfig, corpus: Corpus, batch: BatchConfig) -> tuple[int, int | None]:
    """(updates of the run, updates of its first epoch); a stream's epochs have no known length."""
    if corpus.train is None:
        return config.max_steps or 0, None
    whole = corpus.updates_in(batch, config.epochs)
    return min(whole, config.max_steps or sys.maxsize), corpus.updates_in(batch, 1)
