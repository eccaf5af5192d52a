"""Everything that a run needs, built from its configuration; nothing is trained here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_qlora.config import RunConfig
from mlx_qlora.data.audit import audit
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.layout import BatchConfig, Layout, lay_out, smaller
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.engine.memory import MemoryConfig
from mlx_qlora.engine.optim import OptimConfig, make_optimizer
from mlx_qlora.engine.room import Room
from mlx_qlora.engine.steps import Engine, Enter, Objective
from mlx_qlora.errors import ConfigError, ResumeError
from mlx_qlora.look.console import Console
from mlx_qlora.model import backend, lora
from mlx_qlora.model.activations import KeptTrunk, TrunkCacheConfig, first_kept, open_kept
from mlx_qlora.model.load import Loaded, fingerprint, load
from mlx_qlora.objectives.sft import sft
from mlx_qlora.plan import Plan, checked, choose
from mlx_qlora.records import BEGIN, Batch, Example, TrainState, Update
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

LOOK_AT = 2000  # examples that are compared with each other before training; `mlx-qlora data` takes more


@dataclass(frozen=True)
class Ready:
    """All that a run needs, built."""

    config: RunConfig
    loaded: Loaded
    attached: lora.Attached
    folder: Path
    objective: Objective
    plan: Plan
    optim: OptimConfig
    total: int
    eval_every: int
    valid: list[Example]
    train_sample: list[Example]
    corpus: Corpus
    kept: KeptTrunk | None
    cache: int | None  # bytes of freed buffers that MLX may keep
    facts: dict[str, Any]  # what a checkpoint is compared by
    checkpoint: Checkpoint | None  # where it goes on

    @property
    def settings(self) -> str:
        """What config.yaml says."""
        return _as_kept(self.config).to_yaml()

    def layout(self, halvings: int = 0) -> Layout:
        return smaller(self.plan.layout, halvings)

    def lay_out(self, examples: Sequence[Example], halvings: int = 0) -> tuple[Batch, ...]:
        """Batches, with what the layers below the adapters give, where that is kept."""
        batches = lay_out(examples, self.layout(halvings))
        return tuple(self.kept.batches(batches)) if self.kept else batches

    def updates(self, state: TrainState = BEGIN, room: Room | None = None) -> Iterator[Update]:
        """The updates that are still to be made."""
        room = room or Room(self.plan.layout.token_budget, state.halvings)
        batch, layout = self.config.part(BatchConfig), self.layout(state.halvings)
        coming = self.corpus.updates(batch, layout, self.config.epochs, state.next)
        left = islice(coming, max(0, self.total - state.step))
        return (self._attached(update, state.halvings, room) for update in left) if self.kept else left

    def _attached(self, update: Update, laid_for: int, room: Room) -> Update:
        """With what the layers below the adapters give. They are computed while the update before is, and memory may end."""
        kept = self.kept
        assert kept is not None

        def batches(halvings: int) -> tuple[Batch, ...]:
            return tuple(kept.batches(update.batches)) if halvings == laid_for else self.lay_out(update.examples, halvings)

        return replace(update, batches=room.within(batches))

    def engine(self, rate: float = 1.0) -> Engine:
        """What makes the updates; `rate`: by what the learning rate is multiplied."""
        optimizer = make_optimizer(replace(self.optim, learning_rate=self.optim.learning_rate * rate), self.total)
        optimizer.init(self.loaded.model.trainable_parameters())
        return Engine(
            model=self.loaded.model,
            objective=self.objective,
            optimizer=optimizer,
            config=self.optim,
            with_key=lora.dropout_keys,
            seed=self.config.seed,
            compiled=self.plan.compiled,
            lay_out=self.lay_out,
            rehearse=() if self.plan.roomy else tuple(self.corpus.longest(self.config.examples_per_update)),
        )


def build(config: RunConfig, console: Console, enter: Enter) -> Ready:
    """Read, load, attach, lay out; claim the folder last, so that a wrong setting or row leaves nothing behind."""
    folder = Path(config.output_dir).expanduser()
    source, render, batch = config.part(SourceConfig), config.part(RenderConfig), config.part(BatchConfig)
    optim_config = config.part(OptimConfig)
    sources = find(source)  # before the model is loaded: a wrong path is said at once
    if config.streaming and config.max_steps is None:
        raise ConfigError("max_steps: with streaming the data has no known length; say how many updates to train.")
    found = _where_to_go_on(config, folder, console) if config.resume else None
    chosen = as_before(found, config) if found else config

    enter("load")
    loaded = load(config.model, chosen.matmul, found.state["computing"]["matmul"] if found else None)
    console.fact("model", loaded.describe, backend.describe())
    model_digest = fingerprint(loaded.model)
    attached = lora.attach(loaded.model, config.lora, seed=config.seed)
    console.adapters(attached)
    enter("tokenise")
    corpus = gather(source, render, loaded.tokenizer, config.seed, console.preparing, sources=sources)
    account = audit(corpus, look_at=LOOK_AT)
    console.account(account)
    data_digest = corpus.digest()
    if found:
        require_same(found, model_digest, data_digest, config)

    enter("plan")
    total, per_epoch = _length(config, corpus, batch)
    eval_every = config.eval_every or max(1, (per_epoch or total) // 4)
    enter("plan", planned=total, eval_every=eval_every)  # for whoever looks on from outside
    console.plan(optim_config, batch.examples_per_update, per_epoch, total, eval_every)
    keeping = config.part(TrunkCacheConfig)
    plan = choose(chosen, loaded.model, corpus, first=first_kept(keeping, loaded.model))
    sample = corpus.train_sample()
    plan = checked(plan, loaded.model, sft(config.label_smoothing, plan.passage), sample)
    kept = open_kept(keeping, loaded.model, config.model, plan.passage.first)
    console.layout(plan.describe, plan.notes)
    if plan.memory:
        console.memory(plan.memory, backend.memory())
    console.fact("folder", str(folder))
    if found:
        checkpoints.sweep(folder)
    else:
        run_folder.clear(folder, of_all_starts=config.overwrite)
        # That of a run that goes on is written once a checkpoint has the new settings.
        disk.write_atomically(folder / "config.yaml", _as_kept(config).to_yaml())
    disk.write_json(folder / "data_account.json", account.to_json())
    if corpus.renderer.brought_template:
        disk.write_atomically(folder / "chat_template.jinja", loaded.tokenizer.chat_template)
    return Ready(
        config=config,
        loaded=loaded,
        attached=attached,
        folder=folder,
        objective=sft(config.label_smoothing, plan.passage),
        plan=plan,
        optim=optim_config,
        total=total,
        eval_every=eval_every,
        valid=corpus.valid_examples(),
        train_sample=sample,
        corpus=corpus,
        kept=kept,
        cache=plan.cache(config.part(MemoryConfig).limit(backend.memory())),
        facts={
            "config": _as_kept(config).plain(),
            "computing": computing(plan, loaded.matmul),
            "model": model_digest,
            "data": data_digest,
            "versions": versions(),
            "planned_steps": total,
        },
        checkpoint=found,
    )


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
    if damaged:
        raise ResumeError(f"resume: no checkpoint in {folder} is whole. To begin anew, say --overwrite; adapters/ goes then.")
    if run_folder.has_validated(folder):
        raise ResumeError(f"resume: {folder} has validated adapters and no checkpoint. To begin anew, say --overwrite.")
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
