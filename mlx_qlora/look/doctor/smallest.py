"""The device tried with one product, and the smallest training step, phase by phase. Runs in a process of its own.

    python -m mlx_qlora.look.doctor.smallest device
    python -m mlx_qlora.look.doctor.smallest tokenizer FOLDER
    python -m mlx_qlora.look.doctor.smallest step FOLDER

Prints a JSON object a line: {"finding": ...}, or {"begin": phase} and then {"done": ...} or {"failed": ...}. A crash of
native code ends the process without a word; what was begun last says where.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_qlora.data.layout import padded
from mlx_qlora.engine.accumulate import GradientAccumulator
from mlx_qlora.engine.optim import OptimConfig, guarded_update, make_optimizer
from mlx_qlora.errors import MlxQloraError
from mlx_qlora.findings import Finding, fail, ok, size, warn
from mlx_qlora.look.doctor.remedies import NOT_FINITE, REPORT, WORSE, remedy_of
from mlx_qlora.model import backend, inspect, lora
from mlx_qlora.model.load import load, load_tokenizer
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Example

LENGTH = 32
PHASES = ("load", "adapters", "tokenise", "batch", "forward", "loss", "backward", "accumulate", "update")


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def device() -> Iterator[Finding]:
    """What MLX computes on, and whether it can: a 64 x 64 product against numpy's."""
    info = mx.device_info()
    gpu = not backend.on_cpu()
    name = str(info.get("device_name", info.get("architecture", "CPU")))
    limit = info.get("max_recommended_working_set_size") if gpu else None
    memory = f", {size(backend.memory())} of memory{' as it recommends' if limit else ''}" if gpu else ""
    found = f"{'GPU' if gpu else 'CPU'} ({name}{memory})"
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 64, 64)).astype(np.float32)
    apart = float(np.abs(np.array(mx.array(a) @ mx.array(b)) - a @ b).max())
    if not apart < 0.1:  # tensor cores round to 10 bits, which is 0.02 here; also when it is not a number
        remedy = (
            "Nothing can be trained on that. pip install --force-reinstall mlx (and mlx-cpu or mlx-cuda-13); then report it."
        )
        yield fail("device", f"{found}: a 64 x 64 product is {apart:.3g} off numpy's", remedy)
    elif sys.platform == "darwin" and not gpu:
        remedy = "A virtual machine without Metal, or a program that chose the CPU: mlx.core.set_default_device(mx.gpu)."
        yield warn("device", f"{found} on a Mac: its GPU is not used", remedy)
    else:
        yield ok(
            "device",
            f"{found}; a 64 x 64 product agrees with numpy's{f' to {apart:.0e}' if apart else ''}",
            gpu=gpu,
            device=name,
        )


def tokenizer(folder: str) -> Iterator[Finding]:
    """Whether mlx-lm has code for the model, and whether its tokenizer works."""
    config = inspect.read_config(Path(folder))
    yield inspect.known_to_mlx_lm(config)
    yield from inspect.tokenizer(folder, config, load_tokenizer)


@dataclass
class _Phase:
    """What a phase has to show for itself."""

    shape: Sequence[int] = ()
    note: str = ""
    doubt: str = ""  # it went through, but this can't be right
    remedy: str = ""


class _Failed(Exception):
    """A phase that ended with a value that can't be; the second argument is what to do."""


@dataclass
class _Step:
    """The smallest training step. Each phase is a method, forced to the end before the next one begins."""

    folder: str

    def load(self) -> _Phase:
        self.model, self.tokenizer = load(self.folder)
        return _Phase(note=f"{lora.base_parameters(self.model):,} parameters")

    def adapters(self) -> _Phase:
        attached = lora.attach(self.model, lora.LoraConfig(rank=4))
        self.model.train()
        mx.eval(self.model.parameters())
        return _Phase(note=f"{attached.trainable:,} parameters are trained")

    def tokenise(self) -> _Phase:
        tokens = list(self.tokenizer.encode(inspect.SENTENCE)) or [0]
        whole = (tokens * (LENGTH + 1))[: LENGTH + 1]  # the last one is only a target
        weights = np.ones(LENGTH + 1, np.float32)
        weights[0] = 0
        self.example = Example("doctor:1", np.array(whole, np.int32), weights)
        return _Phase((LENGTH + 1,), "a sentence, over and over")

    def batch(self) -> _Phase:
        self.rows = padded([self.example])
        mx.eval([each for each in self.rows if isinstance(each, mx.array)])
        return _Phase(self.rows.rows.shape, "every token trained")

    def forward(self) -> _Phase:
        logits = self.model(self.rows.rows)
        mx.eval(logits)
        if not mx.isfinite(logits).all().item():
            raise _Failed("not all logits are finite numbers", NOT_FINITE)
        self.uniform = math.log(logits.shape[-1])
        return _Phase(logits.shape, "logits")

    def loss(self) -> _Phase:
        self.objective = sft()
        loss = self.objective(self.model, self.rows)
        mean = float(np.array(loss.total / loss.weight))
        if not math.isfinite(mean):
            raise _Failed(f"the loss is {mean}", NOT_FINITE)
        note = f"loss {mean:.3f}; guessing would be {self.uniform:.3f}"
        if mean > 2 * self.uniform:
            return _Phase(note=note, doubt=f"the loss is {mean:.1f}, guessing would be {self.uniform:.1f}", remedy=WORSE)
        return _Phase(note=note)

    def backward(self) -> _Phase:
        gradient = nn.value_and_grad(self.model, lambda: self.objective(self.model, self.rows).total)
        self.total, self.grads = gradient()
        mx.eval(self.total, self.grads)
        arrays = _arrays(self.grads)
        largest = max(float(np.array(mx.abs(array).max())) for array in arrays)
        if not all(mx.isfinite(array).all().item() for array in arrays):
            raise _Failed("not all of the gradient is a finite number", NOT_FINITE)
        if largest == 0:
            raise _Failed("the whole gradient is 0: nothing would ever be learned", REPORT)
        return _Phase(note=f"{len(arrays)} gradients, up to {largest:.2g}")

    def accumulate(self) -> _Phase:
        accumulator = GradientAccumulator()
        accumulator.add(self.grads, self.rows.weights.sum())
        weight = accumulator.weight.item()
        self.mean = accumulator.take()
        mx.eval(self.mean)
        return _Phase(note=f"added up, divided once by {weight:g}")

    def update(self) -> _Phase:
        config = OptimConfig(schedule="constant")
        optimizer = make_optimizer(config, 1)
        before = self.model.trainable_parameters()
        optimizer.init(before)
        done = guarded_update(optimizer, before, self.mean, self.total, config.clip_grad_norm)
        mx.eval(done, optimizer.state)
        pairs = zip(_arrays(before), _arrays(done.params), strict=True)
        changed = sum(not mx.array_equal(old, new).item() for old, new in pairs)
        if not done.finite.item() or not changed:
            raise _Failed("the update changed nothing", REPORT)
        self.model.update(done.params)
        return _Phase(note=f"norm {done.grad_norm.item():.3g}, {changed} arrays changed")


def _arrays(tree: Any) -> list[mx.array]:
    named: dict[str, mx.array] = tree_flatten(tree, destination={})  # type: ignore[assignment]
    return list(named.values())


@contextmanager
def _timed(phase: str) -> Iterator[Callable[[_Phase], None]]:
    """Says that a phase begins, before anything can crash, and afterwards what it took."""
    _say(begin=phase)
    mx.synchronize()
    mx.reset_peak_memory()
    begun = time.perf_counter()

    def done(what: _Phase) -> None:
        mx.synchronize()
        _say(
            done=phase,
            seconds=time.perf_counter() - begun,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            shape=list(what.shape),
            note=what.note,
            doubt=what.doubt,
            remedy=what.remedy,
        )

    yield done


def step(folder: str) -> int:
    """All phases; the first that fails ends it."""
    small = _Step(folder)
    for phase in PHASES:
        try:
            with _timed(phase) as done:
                done(getattr(small, phase)())
        except _Failed as error:
            _say(failed=phase, error=error.args[0], remedy=error.args[1])
            return 1
        except Exception as error:  # whatever a model's code, MLX or a library raises
            kind = "" if isinstance(error, MlxQloraError) else f"{type(error).__name__}: "
            text = f"{kind}{' '.join(str(error).split())[:400]}"
            _say(failed=phase, error=text, remedy=remedy_of(phase, text))
            return 1
    return 0


def main(arguments: Sequence[str]) -> int:
    what, *rest = arguments
    if what == "step":
        return step(rest[0])
    for finding in device() if what == "device" else tokenizer(rest[0]):
        _say(finding=finding.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
