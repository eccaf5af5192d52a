"""What a run keeps of itself in a checkpoint, and how it goes on from one.

`Standing` is all that changes while a run goes on, but for the arrays of model and optimizer. Everything that is needed
to end with the same bytes is in a checkpoint, or follows from the configuration, the model and the data, whose digests
are compared.
"""

from __future__ import annotations

import math
import platform
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_qlora.config import RunConfig, flat
from mlx_qlora.data.layout import LayoutConfig
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.data.windows import WindowConfig
from mlx_qlora.engine.guard import Guard
from mlx_qlora.engine.memory import MemoryConfig
from mlx_qlora.engine.optim import begin
from mlx_qlora.engine.steps import StepConfig
from mlx_qlora.engine.stopping import EarlyStoppingMonitor
from mlx_qlora.errors import ResumeError, listed
from mlx_qlora.look.history import AROUND
from mlx_qlora.model import backend, lora
from mlx_qlora.model.activations import TrunkCacheConfig
from mlx_qlora.model.create import CreateConfig
from mlx_qlora.model.matmul import MatmulConfig
from mlx_qlora.model.trained import Trained, arrays_of
from mlx_qlora.objectives.distill import DistillConfig
from mlx_qlora.plan import Plan
from mlx_qlora.records import Bookmark, EvalReport, LossSum, StepReport, TrainState, Window
from mlx_qlora.run.checkpoint import Checkpoint

FORMAT = 1
Arrays = dict[str, mx.array]


def _names(*kinds: type) -> set[str]:
    """Of the settings of these parts, by dotted names."""
    return {name for kind in kinds for name in flat(asdict(kind()))}


# How it is computed: the gradient stays, and the last bits of it do not.
_COMPUTING = _names(LayoutConfig, MemoryConfig, StepConfig, MatmulConfig, TrunkCacheConfig) - AROUND
# Judged by what they give, the examples and the weights, and not by their names.
_JUDGED = (
    ({"model"} | _names(SourceConfig, RenderConfig, WindowConfig, CreateConfig))
    - {"data_weights", "shuffle_buffer", "streaming"}
    - AROUND
)
# What makes sense to change in the middle of a run, if one wants to.
_CHANGEABLE = {
    "epochs", "max_steps", "eval_every", "learning_rate", "schedule", "warmup_steps", "optimizer_options", "clip_grad_norm",
    "batch_size", "gradient_accumulation", "min_supervised_per_update", "label_smoothing", "lora.dropout",
    "dropout", "early_stopping.patience", "early_stopping.min_delta", "on_nonfinite", "max_skipped_updates",
    "max_skipped_share", "skipped_window", "rollback_factor", "max_rollbacks",
}  # fmt: skip
_CHANGEABLE |= flat({"distill": asdict(DistillConfig())}).keys()


def require_format(checkpoint: Checkpoint) -> None:
    """Refuse what another version wrote in another way."""
    if checkpoint.state.get("format") != FORMAT:
        raise ResumeError(
            f"resume: {checkpoint.folder.name} has the format {checkpoint.state.get('format')}, and this version of mlx_qlora "
            f"reads {FORMAT}. Go on with the version that wrote it, or start another run in another folder."
        )


def settings_changed(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """What to say of settings that differ from the checkpoint's; raises for those that a run can't change, or won't."""
    before, now = flat(checkpoint.state["config"]), flat(config.plain())
    said: list[str] = []
    refused: list[str] = []
    fixed: list[str] = []
    for name in sorted({*before, *now} - AROUND - _JUDGED):
        if before.get(name) == now.get(name):
            continue
        line = f"{name}: was {_shown(before.get(name))}, is {_shown(now.get(name))}"
        if name in _COMPUTING:
            said.append(f"{line}; the gradient stays the same, its last digits may differ")
        elif name in _CHANGEABLE and config.resume_anyway:
            said.append(line)
        else:
            (refused if name in _CHANGEABLE else fixed).append(line)
    if refused or fixed:
        lines = [f"  {line}" for line in refused] + [f"  {line}; this can't change within a run" for line in fixed]
        ways = ["leave the settings out, and those of the run are taken"]
        ways += ["say --resume-anyway to train on with the new ones"] if refused and not fixed else []
        ways += ["start another run in another folder"] if fixed else []
        raise ResumeError(
            f"resume: {checkpoint.folder.name} was trained with other settings:\n" + "\n".join(lines) + "\n"
            f"What to do: {', or '.join(ways)}."
        )
    return said


def changed(before: RunConfig, now: RunConfig) -> list[str]:
    """Every setting that differs, but for those of how it is computed, those around training, and the seed."""
    was, is_ = flat(before.plain()), flat(now.plain())
    names = sorted(was.keys() - AROUND - _COMPUTING - {"seed"})
    return [f"{name}: was {_shown(was[name])}, is {_shown(is_[name])}" for name in names if was[name] != is_[name]]


def trained_otherwise(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Whether a setting of training has changed since."""
    before, now = flat(checkpoint.state["config"]), flat(config.plain())
    names = (before.keys() | now.keys()) - AROUND - _JUDGED - _COMPUTING
    return any(before.get(name) != now.get(name) for name in names)


def _shown(value: Any) -> str:
    return "not there" if value is None else str(value)


def as_before(checkpoint: Checkpoint, config: RunConfig) -> RunConfig:
    """The configuration with what was chosen automatically the first time, so that it is computed in the same way."""
    was, now = checkpoint.state["config"], config.plain()
    chosen = checkpoint.state["computing"]
    kept = {name: chosen[name] for name in ("layout", "token_budget", "grad_checkpoint", "compile")}
    if config.token_budget is None:
        kept["token_budget"] = chosen["token_budget"]
    return replace(config, **{name: value for name, value in kept.items() if was.get(name) == now.get(name)})


def require_same(checkpoint: Checkpoint, model: str, data: str, config: RunConfig, teacher: str = "") -> None:
    """Refuse another model or other data, by their digests; and another teacher, if nobody said so."""
    state = checkpoint.state
    before, now = flat(state["config"]), flat(config.plain())
    others = [
        f"  {name}: was {_shown(before.get(name))}, is {_shown(now.get(name))}"
        for name in sorted(_JUDGED)
        if before.get(name) != now.get(name)
    ]
    lines = []
    if state["model"] != model:
        lines.append(f"the model is another one (its arrays were {state['model']}, are {model})")
    if state["data"] != data:
        lines.append(f"the examples are others (their checksum was {state['data']}, is {data})")
    if not config.resume_anyway and state.get("teacher", "") != teacher:
        lines.append(f"the teacher is another one (its arrays were {state.get('teacher') or 'none'}, are {teacher or 'none'})")
    if lines:
        because = "\n".join(others) or "  no setting differs, so the files themselves have changed"
        raise ResumeError(
            f"resume: {checkpoint.folder.name} can't be gone on with: {' and '.join(lines)}.\n{because}\n"
            "What to do: give the run what it had, or start another run in another folder."
        )


def versions() -> dict[str, str]:
    """What a byte may depend on besides the inputs."""
    named = {name: version(name) for name in ("mlx-qlora", "mlx", "mlx-lm")}
    return named | {"python": platform.python_version(), "platform": platform.platform(), "device": backend.describe()}


def versions_changed(checkpoint: Checkpoint) -> list[str]:
    now = versions()
    changed = [f"{name} {was} -> {now[name]}" for name, was in checkpoint.state["versions"].items() if now.get(name) != was]
    return [f"the last digits may differ, because versions do: {', '.join(changed)}"] if changed else []


@dataclass
class Standing:
    """Where a run stands."""

    monitor: EarlyStoppingMonitor
    guard: Guard
    state: TrainState = field(default_factory=TrainState)
    window: Window | None = None
    epoch: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    peak_memory_gb: float = 0.0
    validations: list[tuple[EvalReport, float]] = field(default_factory=list)  # with the epoch
    best_arrays: Arrays | None = None  # of the best validation, those that are trained
    rate: float = 1.0  # by what the learning rate is multiplied, after the run went back
    rollbacks: int = 0
    went_back_to: int | None = None  # the update of the checkpoint that it went back to last
    bad: int = 0  # files in bad_updates/

    def take(self, report: StepReport) -> None:
        """One more update was made."""
        self.state, self.window = report.state, None
        if report.supervised_tokens or not report.finite:  # windows without a target have no loss
            self.guard = self.guard.update(report.loss, report.finite)
        self.epoch = report.epoch
        self.tokens += report.tokens
        self.supervised_tokens += report.supervised_tokens
        self.peak_memory_gb = max(self.peak_memory_gb, report.peak_memory_gb)

    @property
    def best(self) -> tuple[EvalReport, float] | None:
        return next((one for one in reversed(self.validations) if one[0].best), None)

    @property
    def healthy(self) -> bool:
        """Whether the last update and the last validation gave finite numbers."""
        skipped = bool(self.guard.recent) and self.guard.recent[-1]
        return not skipped and (not self.validations or math.isfinite(self.validations[-1][0].val_loss))

    @property
    def best_step(self) -> int | None:
        return self.best[0].step if self.best else None


def to_keep(
    standing: Standing, trained: Trained, model: nn.Module, optimizer: mlx.optimizers.Optimizer
) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """(state, arrays) of a run as it stands. The arrays stay what they are while training goes on."""
    window = standing.window
    arrays: dict[str, Arrays] = {
        trained.name: arrays_of(model),
        "optimizer": _flattened(optimizer.state),
    }
    if standing.best_arrays is not None and standing.best_step != standing.state.step:
        arrays[f"best_{trained.name}"] = standing.best_arrays
    if window is not None:
        loss = {"total": window.loss.total, "weight": window.loss.weight}
        loss |= {f"metrics.{name}": value for name, value in window.loss.metrics.items()}
        arrays["window"] = {f"gradients.{name}": array for name, array in _flattened(window.gradients).items()} | loss
    state = {
        "format": FORMAT,
        "state": asdict(standing.state),
        "window": window and [window.done, window.parts, window.laid],
        "random": _random_state(),
        "monitor": asdict(standing.monitor),
        "guard": {"recent": list(standing.guard.recent), "losses": list(standing.guard.losses)},
        "validations": [[asdict(report), epoch] for report, epoch in standing.validations],
        "epoch": standing.epoch,
        "tokens": standing.tokens,
        "supervised_tokens": standing.supervised_tokens,
        "peak_memory_gb": standing.peak_memory_gb,
        "rate": standing.rate,
        "rollbacks": standing.rollbacks,
        "went_back_to": standing.went_back_to,
        "healthy": standing.healthy,
        "bad": standing.bad,
    }
    return state, arrays


def put_back(
    checkpoint: Checkpoint, standing: Standing, trained: Trained, model: nn.Module, optimizer: mlx.optimizers.Optimizer
) -> None:
    """Give a run, its model and its optimizer what the checkpoint has."""
    kept = checkpoint.state
    arrays = checkpoint.arrays(trained.name)
    trained.load(model, arrays, checkpoint.folder / f"{trained.name}.safetensors")
    begin(optimizer, model.trainable_parameters())
    own = checkpoint.arrays("optimizer")
    optimizer.state = _like(optimizer.state, own, checkpoint)
    state = kept["state"]
    standing.state = TrainState(**{**state, "next": Bookmark(**state["next"])})
    standing.window = _window(checkpoint, model.trainable_parameters())
    standing.monitor = replace(
        standing.monitor, **{name: kept["monitor"][name] for name in ("best", "stale", "extreme", "is_extreme")}
    )
    standing.guard = replace(standing.guard, recent=tuple(kept["guard"]["recent"]), losses=tuple(kept["guard"]["losses"]))
    standing.validations = [(EvalReport(**report), epoch) for report, epoch in kept["validations"]]
    for name in ("epoch", "tokens", "supervised_tokens", "peak_memory_gb", "rate", "rollbacks", "went_back_to", "bad"):
        setattr(standing, name, kept[name])
    standing.best_arrays = (checkpoint.arrays(f"best_{trained.name}") or arrays) if standing.best else None
    _put_random_state(kept["random"])


def _like(tree: Any, arrays: Arrays, checkpoint: Checkpoint) -> Any:
    """A tree of this shape with these arrays in it; an error says which of them do not fit."""
    wanted = _flattened(tree)
    odd = sorted(wanted.keys() ^ arrays.keys())
    odd += [each for each in wanted.keys() & arrays.keys() if wanted[each].shape != arrays[each].shape]
    if odd:
        raise ResumeError(f"resume: {checkpoint.folder.name} does not fit this run: {listed(odd)}")
    lora.finite_or_refuse(arrays, checkpoint.folder)
    return tree_map_with_path(lambda path, value: arrays.get(path, value), tree)


def _window(checkpoint: Checkpoint, parameters: Any) -> Window | None:
    if checkpoint.state["window"] is None:
        return None
    done, parts, laid = checkpoint.state["window"]
    arrays = checkpoint.arrays("window")
    gradients = {name.removeprefix("gradients."): array for name, array in arrays.items() if name.startswith("gradients.")}
    metrics = {name.removeprefix("metrics."): array for name, array in arrays.items() if name.startswith("metrics.")}
    loss = LossSum(arrays["total"], arrays["weight"], metrics)
    return Window(done, parts, _like(parameters, gradients, checkpoint), loss, laid)


def _flattened(tree: Any) -> Arrays:
    flat: Arrays = tree_flatten(tree, destination={})  # type: ignore[assignment]
    return {name: value for name, value in flat.items() if isinstance(value, mx.array)}


def _random_state() -> dict[str, Any]:
    """Of MLX, NumPy and Python. Nothing here draws from them, but an objective or a template of somebody's might."""
    name, keys, at, has, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    kind, numbers, gauss = random.getstate()
    return {
        "mlx": [np.array(key).tolist() for key in cast(list[mx.array], mx.random.state)],
        "numpy": [str(name), np.asarray(keys).tolist(), int(at), int(has), float(cached)],
        "python": [kind, list(numbers), gauss],
    }


def _put_random_state(kept: Mapping[str, Any]) -> None:
    for number, key in enumerate(kept["mlx"]):
        cast(list[mx.array], mx.random.state)[number][:] = mx.array(key, mx.uint32)
    name, keys, at, has, cached = kept["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), at, has, cached))
    kind, numbers, gauss = kept["python"]
    random.setstate((kind, tuple(numbers), gauss))


def computing(plan: Plan, matmul: Mapping[str, int]) -> dict[str, Any]:
    """How a run computes, in the words of its settings."""
    return {
        "layout": plan.layout.kind.value,
        "token_budget": plan.layout.token_budget,
        "grad_checkpoint": "on" if plan.passage.checkpoint else "off",
        "compile": "on" if plan.compiled else "off",
        "matmul": dict(matmul),
    }
