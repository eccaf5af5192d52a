"""Other trainers in a race: their own loops, data sets, losses and LoRA layers, driven by their own callbacks.

What they are given so that a race compares the same work: the rows in the order that makes the same updates, our first
adapters, AdamW that corrects its bias, and on the CPU scales in float32 (bf16 is some 30 times slower there).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_qlora.bench.settings import Spec
from mlx_qlora.bench.turns import Finished, Turns
from mlx_qlora.model import backend, frozen
from mlx_qlora.model.trust import NO_CODE

_NEVER = 1_000_000_000  # steps


class _Batches:
    """A trainer's own `iterate_batches`, counted as it gives its batches.

    mlx-lm-lora (5.10.2) begins anew for every batch, which amounts to drawing with replacement, so that some rows come
    twice and others never; here the first beginning goes on, or the updates would not hold the same examples.
    """

    def __init__(self, own: Callable[..., Iterator[Any]]):
        self._own = own
        self._begun: Iterator[Any] | None = None
        self.given: deque[tuple[int, int]] = deque()  # (supervised tokens, positions) of each batch

    def __call__(self, *given: Any, **named: Any) -> Iterator[Any]:
        if self._begun is None:
            self._begun = self._own(*given, **named)
        return self._counted(self._begun)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for tokens, spans in batches:
            # Of [offset, length] mlx-lm trains the targets offset..length, the last of which is padding and not counted
            # here; the first token is nobody's target.
            spans_ = np.array(spans)
            supervised = int((spans_[:, 1] - np.maximum(spans_[:, 0], 1)).sum())
            self.given.append((supervised, tokens.shape[0] * (tokens.shape[1] - 1)))
            yield tokens, spans

    def take(self, count: int) -> dict[str, int]:
        batches = [self.given.popleft() for _ in range(count)]
        return {"supervised": sum(one for one, _ in batches), "positions": sum(many for _, many in batches)}


class _Reports:
    """A TrainingCallback: each report is an update."""

    def __init__(self, turns: Turns, batches: _Batches, per_update: int):
        self._turns, self._batches, self._per_update = turns, batches, per_update

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self._turns.done(loss=float(info["train_loss"]), **self._batches.take(self._per_update))

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        pass


def _begin(spec: Spec) -> tuple[nn.Module, Any]:
    """The model as mlx-lm loads it, with mlx-lm's adapters, which begin as ours do."""
    import mlx_lm
    from mlx_lm.tuner.utils import load_adapters

    model, tokenizer = mlx_lm.load(spec.model, NO_CODE)[:2]
    if spec.same_kernels:
        backend.reuse_memory()
        frozen.install(model)
    if backend.on_cpu():
        model.update(tree_map(_float32, model.parameters()))
    model.freeze()
    load_adapters(model, spec.initial)
    mx.eval(model.parameters())
    return model, tokenizer


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _rows(spec: Spec, tokenizer: Any, load_dataset: Callable[..., Any]) -> Any:
    first = json.loads((Path(spec.data) / "train.jsonl").read_text(encoding="utf-8").split("\n", 1)[0])
    wanted = {"data": spec.data, "train": True, "test": False, "mask_prompt": "text" not in first, "train_mode": "sft"}
    return load_dataset(SimpleNamespace(**wanted), tokenizer)[0]


def _kept(model: nn.Module, folder: Path) -> None:
    """The adapters as they are now, where the referee looks for them."""
    (folder / "adapters").mkdir(parents=True, exist_ok=True)
    arrays: dict[str, mx.array] = tree_flatten(model.trainable_parameters(), destination={})  # type: ignore[assignment]
    mx.save_safetensors(str(folder / "adapters" / "adapters.safetensors"), arrays)


def _drive(spec: Spec, turns: Turns, model: nn.Module, train: Callable[[], None]) -> None:
    """From the same seed on: a trainer's loop, until the race has seen enough of it."""
    np.random.seed(spec.seed)
    mx.random.seed(spec.seed)
    try:
        turns.ready()
        train()
    except Finished as end:
        _kept(model, Path(end.folder))
        raise


def race_mlx_lm(spec: Spec, turns: Turns) -> None:
    from mlx_lm.tuner.datasets import CacheDataset, load_dataset
    from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train

    model, tokenizer = _begin(spec)
    rows = CacheDataset(_rows(spec, tokenizer, load_dataset))
    arguments = TrainingArgs(**_arguments(spec), grad_accumulation_steps=spec.gradient_accumulation)
    given = _given(spec, turns, iterate_batches)
    _drive(spec, turns, model, lambda: train(model, train_dataset=rows, args=arguments, **given))


def race_mlx_lm_lora(spec: Spec, turns: Turns) -> None:
    from mlx_lm_lora.trainer.datasets import CacheDataset, load_dataset
    from mlx_lm_lora.trainer.sft_trainer import SFTTrainingArgs, iterate_batches, train_sft

    _without_a_gpu()
    model, tokenizer = _begin(spec)
    rows = CacheDataset(_rows(spec, tokenizer, load_dataset))
    arguments = SFTTrainingArgs(**_arguments(spec), gradient_accumulation_steps=spec.gradient_accumulation)
    given = _given(spec, turns, iterate_batches)
    _drive(spec, turns, model, lambda: train_sft(model, train_dataset=rows, args=arguments, **given))


def _given(spec: Spec, turns: Turns, iterate_batches: Callable[..., Iterator[Any]]) -> dict[str, Any]:
    batches = _Batches(iterate_batches)
    reports = _Reports(turns, batches, spec.gradient_accumulation)
    return {
        "optimizer": mlx.optimizers.AdamW(spec.learning_rate, bias_correction=True),
        "iterate_batches": batches,
        "training_callback": reports,
    }


def _arguments(spec: Spec) -> dict[str, Any]:
    """What mlx-lm and mlx-lm-lora call alike: a report for each update, nothing saved on the way."""
    return {
        "batch_size": spec.batch_size,
        "iters": _NEVER,
        "steps_per_report": spec.gradient_accumulation,
        "steps_per_save": _NEVER,
        "max_seq_length": spec.max_seq_length,
        "adapter_file": str(Path(spec.work) / "adapters.safetensors"),
    }


def _without_a_gpu() -> None:
    """mlx-lm-lora sets a limit for the GPU's memory unasked, and would end here where there is none."""
    if "max_recommended_working_set_size" not in mx.device_info():
        mx.set_wired_limit = lambda limit: 0
        info = {**mx.device_info(), "max_recommended_working_set_size": 0}
        mx.device_info = lambda *_: info


def race_mlx_tune(spec: Spec, turns: Turns) -> None:
    """mlx-tune's SFTTrainer, which runs mlx-lm's `train`.

    It ignores gradient accumulation (0.6.0), so it gets the whole update as one batch; its rows are laid out for that.
    It makes its AdamW itself, and that does not correct its bias: its loss falls differently in the first updates.
    """
    from mlx_lm.tuner.trainer import iterate_batches
    from mlx_tune import sft_trainer

    model, tokenizer = _begin(spec)
    batches = _Batches(iterate_batches)
    reports = _Reports(turns, batches, 1)
    inner = sft_trainer.mlx_train

    def train(**given: Any) -> None:
        _drive(spec, turns, model, lambda: inner(**given, iterate_batches=batches, training_callback=reports))

    sft_trainer.mlx_train = train
    lines = (Path(spec.data) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    arguments = sft_trainer.SFTConfig(
        output_dir=spec.work,
        per_device_train_batch_size=spec.examples_per_update,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        max_steps=_NEVER,
        logging_steps=1,
        save_steps=_NEVER,
        max_seq_length=spec.max_seq_length,
        val_batches=0,
    )
    trainer = sft_trainer.SFTTrainer(
        model=SimpleNamespace(model=model), train_dataset=rows, tokenizer=tokenizer, args=arguments
    )
    trainer._train_on_responses_only = "text" not in rows[0]
    trainer._train_subprocess = _failed  # where its own loop fails it would start mlx-lm's command instead
    trainer.train()


def _failed() -> None:
    raise RuntimeError("mlx-tune's training failed; its message stands above")
