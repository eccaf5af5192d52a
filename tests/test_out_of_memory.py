"""When memory ends: where it raises, the same examples again in smaller batches; where it kills, a smaller start."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import largest_difference, make_examples, same_bytes, tiny_model

from mlx_qlora import LoraConfig, RunConfig, train
from mlx_qlora.assets import embedded_data
from mlx_qlora.data.layout import BatchConfig, Kind, Layout, lay_out, smaller, updates
from mlx_qlora.data.order import Order
from mlx_qlora.data.prepare import InMemory
from mlx_qlora.engine import steps as engine_steps
from mlx_qlora.engine.optim import OptimConfig, make_optimizer
from mlx_qlora.engine.room import Room, is_out_of_memory
from mlx_qlora.engine.steps import Engine, steps
from mlx_qlora.errors import OutOfMemoryError
from mlx_qlora.keep import Keeper
from mlx_qlora.model import lora, trunk
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Batch, LossSum, StepReport
from mlx_qlora.run.checkpoint import newest
from mlx_qlora.run.metrics import read_metrics

METAL = "[metal::malloc] Attempting to allocate 27917287424 bytes which is greater than the maximum allowed buffer size"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(METAL), True),
        (RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBuffer...)"), True),
        (RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"), True),
        (RuntimeError("[malloc] Unable to allocate 8000000 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("[matmul] Last dimension of first input ..."), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ended(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def limited(limit: int, seen: list[int]) -> Any:
    """The objective on a machine whose memory ends beyond so many positions, while a batch is computed."""
    plain = sft()

    def objective(model: nn.Module, batch: Batch) -> LossSum:
        if batch.computed > limit:
            raise RuntimeError(METAL)
        seen.append(batch.computed)
        return plain(model, batch)

    return objective


def run_with(limit: int, kind: Kind, told: list[int], seen: list[int], dropout: float = 0.1) -> tuple[list[StepReport], Any]:
    model = tiny_model("mistral")
    lora.attach(model, LoraConfig(rank=2, dropout=dropout))
    model.train()
    layout = Layout(kind, rows=100, token_budget=256)
    config = OptimConfig(learning_rate=1e-2)
    engine = Engine(
        model, limited(limit, seen), make_optimizer(config, 6), config, lora.dropout_keys,
        room=Room(256, tell=told.append), lay_out=lambda some, halvings: lay_out(some.examples, smaller(layout, halvings)),
    )  # fmt: skip
    planned = updates(InMemory(make_examples(12)), Order((12,), seed=0), BatchConfig(batch_size=6), layout, epochs=3)
    reports = [report for report in steps(engine, planned) if isinstance(report, StepReport)]
    return reports, model.trainable_parameters()


@pytest.mark.parametrize("kind", [Kind.PACKED, Kind.PLAIN])
def test_the_same_examples_again_give_the_same_updates(kind: Kind) -> None:
    free, expected = run_with(10_000, kind, [], [])
    told: list[int] = []
    seen: list[int] = []
    reports, params = run_with(40, kind, told, seen)
    assert told == [128, 64, 32], "halved until it fitted, and only in the first update: it is remembered"
    assert max(seen) <= 40
    assert [report.update.ids for report in reports] == [report.update.ids for report in free]
    assert [report.loss for report in reports] == pytest.approx([report.loss for report in free], rel=1e-5)
    assert [report.grad_norm for report in reports] == pytest.approx([report.grad_norm for report in free], rel=1e-4)
    assert largest_difference(params, expected) < 1e-3
    assert [report.state.halvings for report in reports] == [3] * 6
    assert all(len(a.update.batches) > len(b.update.batches) for a, b in zip(reports, free, strict=True))


def test_one_example_that_does_not_fit_ends_the_run_with_what_to_try() -> None:
    with pytest.raises(OutOfMemoryError, match=r"even with one example at a time(.|\n)*grad_checkpoint: on") as error:
        run_with(2, Kind.PACKED, [], [])
    assert error.value.exit_code == 3


def test_an_update_that_runs_out_of_memory_has_changed_nothing() -> None:
    """The error comes when the second batch of the update is computed: the first one's gradient must not count twice."""
    model = tiny_model("mistral")
    lora.attach(model, LoraConfig(rank=2))
    model.train()
    plain = sft()
    calls = 0

    def once(model: nn.Module, batch: Batch) -> LossSum:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError(METAL)
        return plain(model, batch)

    layout = Layout(Kind.PLAIN, rows=3, token_budget=10_000)
    config = OptimConfig(learning_rate=1e-2)
    engine = Engine(
        model, once, make_optimizer(config, 1), config, lora.dropout_keys,
        room=Room(64), lay_out=lambda some, halvings: lay_out(some.examples, replace(layout, rows=2)),
    )  # fmt: skip
    planned = updates(InMemory(make_examples(6)), Order((6,), seed=0), BatchConfig(batch_size=6), layout, epochs=1)
    (report,) = steps(engine, planned)
    assert isinstance(report, StepReport)
    assert len(report.update.batches) == 3
    other = tiny_model("mistral")
    lora.attach(other, LoraConfig(rank=2))
    other.train()
    planned = updates(InMemory(make_examples(6)), Order((6,), seed=0), BatchConfig(batch_size=6), layout, epochs=1)
    (whole,) = steps(Engine(other, plain, make_optimizer(config, 1), config, lora.dropout_keys), planned)
    assert isinstance(whole, StepReport)
    assert (report.loss, report.grad_norm) == pytest.approx((whole.loss, whole.grad_norm), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_memory_that_ends_in_the_optimizer_leaves_its_state_as_it_was(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's optimizers write into their state: a second try would count the step twice, and the moments too."""
    plain = engine_steps._applied
    calls = 0

    def late(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            with monkeypatch.context() as inside:
                inside.setattr(engine_steps.mx, "eval", ends)
                return plain(*given)
        return plain(*given)

    def ends(*_: Any) -> None:
        raise RuntimeError(METAL)

    def trained() -> tuple[Any, Any]:
        model = tiny_model("mistral")
        lora.attach(model, LoraConfig(rank=2))
        model.train()
        layout = Layout(Kind.PLAIN, rows=2, token_budget=10_000)
        config = OptimConfig(learning_rate=1e-2, optimizer=optimizer)
        made = make_optimizer(config, 6)
        engine = Engine(
            model, sft(), made, config, lora.dropout_keys, room=Room(64), lay_out=lambda some, _: lay_out(some.examples, layout)
        )
        planned = updates(InMemory(make_examples(12)), Order((12,), seed=0), BatchConfig(batch_size=4), layout, epochs=1)
        assert len(list(steps(engine, planned))) == 3
        return model.trainable_parameters(), made.state

    expected = trained()
    monkeypatch.setattr(engine_steps, "_applied", late)
    assert same_bytes(trained(), expected)
    assert calls == 4


def put(monkeypatch: pytest.MonkeyPatch, objective: Any) -> None:
    """In the place of a run's own, in validation and in training."""
    for where in ("build", "objectives.lesson"):
        monkeypatch.setattr(sys.modules[f"mlx_qlora.{where}"], "sft", lambda *_: objective)


def test_a_run_remembers_it_when_it_goes_on(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(
        model="embedded", data=str(small_data), output_dir=str(tmp_path / "run"), epochs=2, batch_size=8, eval_every=3,
        learning_rate=5e-3, lora=LoraConfig(rank=2, dropout=0.1), layout="plain", max_steps=3, schedule="constant",
    )  # fmt: skip
    free = replace(config, output_dir=str(tmp_path / "free"), max_steps=6)
    train(free, quiet=True)
    seen: list[int] = []
    put(monkeypatch, limited(600, seen))
    assert train(replace(config, memory="off", token_budget=4096), quiet=True).summary["halvings"] == 3
    found, _ = newest(tmp_path / "run")
    assert found is not None
    assert found.state["state"]["halvings"] == 3
    seen.clear()
    put(monkeypatch, limited(10_000, seen))
    more = replace(config, memory="off", token_budget=4096, max_steps=6, resume=True, resume_anyway=True)
    assert train(more, quiet=True).summary["halvings"] == 3
    after_the_check = seen[seen.index(736) + 1 :]
    assert max(after_the_check) <= 600, "validation too"
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses == pytest.approx([line["loss"] for line in read_metrics(tmp_path / "free")], rel=1e-3)


@pytest.mark.parametrize("when", ["in an update", "in a validation"])
def test_a_checkpoint_says_how_small_the_batches_are_by_now(
    when: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one in the middle of the update in which memory ended: what is accumulated is of the small ones."""
    config = RunConfig(
        model="embedded", data=str(small_data), output_dir=str(tmp_path / "run"), batch_size=8, eval_every=1, max_steps=1,
        lora=LoraConfig(rank=2), layout="plain", memory="off", token_budget=1024, save_minutes=1e-9,
    )  # fmt: skip
    plain = sft()

    def ends(model: nn.Module, batch: Batch) -> LossSum:
        if batch.computed > 600 and model.training == (when == "in an update"):
            raise RuntimeError(METAL)
        return plain(model, batch)

    put(monkeypatch, ends)
    monkeypatch.setattr(sys.modules["mlx_qlora.build"], "checked", lambda plan, *_: plan)
    taken: list[Any] = []
    plain_save = Keeper.save

    def save(self: Keeper, standing: Any, *more: Any, **named: Any) -> None:
        taken.append((standing.window and standing.window.parts, standing.state.halvings))
        plain_save(self, standing, *more, **named)

    monkeypatch.setattr(Keeper, "save", save)
    train(config, quiet=True)
    assert [halvings for _, halvings in taken][-1] == 1
    if when == "in an update":
        assert [halvings for parts, halvings in taken if parts] == [1] * (len(taken) - 1) != []


def test_memory_that_ends_below_the_adapters(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their states are computed ahead, while the update before is: outside of what is tried again."""
    config = RunConfig(
        model="embedded", data=str(small_data), output_dir=str(tmp_path / "run"), batch_size=8, epochs=1, eval_every=100,
        lora=LoraConfig(rank=2, layers=2), layout="plain", token_budget=2048, trunk_cache_dir=str(tmp_path / "kept"),
    )  # fmt: skip
    plain = trunk.states_before
    refused: list[int] = []

    def states_before(model: nn.Module, batch: Batch, first: int) -> mx.array:
        if batch.computed > 600:
            refused.append(batch.computed)
            raise RuntimeError(METAL)
        return plain(model, batch, first)

    free = train(replace(config, output_dir=str(tmp_path / "free")), quiet=True)
    shutil.rmtree(tmp_path / "kept")
    monkeypatch.setattr(sys.modules["mlx_qlora.build"], "checked", lambda plan, *_: plan)
    monkeypatch.setattr(trunk, "states_before", states_before)
    run = train(config, quiet=True)
    assert refused
    assert (run.summary["ended"], run.summary["steps"]) == ("finished", free.summary["steps"])
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses == pytest.approx([line["loss"] for line in read_metrics(tmp_path / "free")], rel=1e-3)


# Where it kills


@contextlib.contextmanager
def limited_memory(bytes_: int) -> Iterator[Path]:
    """A group of processes that the kernel kills beyond so many bytes; give it a process by its number."""
    name = f"mlx_qlora-test-{os.getpid()}"
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group, limit = (old / name, "memory.limit_in_bytes") if old.is_dir() else (new / name, "memory.max")
    try:
        group.mkdir()
        (group / limit).write_text(str(bytes_))
    except OSError:
        pytest.skip("no group of processes can be made here, or not with a limit of memory")
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


CHILD = """
import os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
sys.argv[1:2] = []
from mlx_qlora.run import supervise as parent
plain = parent.supervise
def supervise(command, *more, **options):
    return plain(command, *more, patience=parent.Patience(pause_s=0), **options)
import mlx_qlora.train as whole
sys.modules["mlx_qlora.train"].supervise = supervise
sys.exit(whole.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_run_that_the_kernel_kills_goes_on_smaller(tmp_path: Path) -> None:
    """A real run whose first budget needs more memory than it may have: it ends all the same, with all its updates."""
    lines = (embedded_data() / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines[:128]) + "\n", encoding="utf-8")
    (tmp_path / "data" / "valid.jsonl").write_text("\n".join(lines[128:132]) + "\n", encoding="utf-8")
    config = RunConfig(
        model="embedded", data=str(tmp_path / "data"), output_dir=str(tmp_path / "run"), epochs=1, batch_size=64,
        layout="plain", token_budget=16384, memory="off", lora=LoraConfig(rank=2), supervise=5,
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    with limited_memory(700_000_000) as group:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(group), "--config", str(tmp_path / "run.yaml"), "--supervise", "5"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the run died by SIGKILL in" in done.stdout
    told = [json.loads(line) for line in (tmp_path / "run" / "supervision.jsonl").read_text().splitlines()]
    assert told[0]["how"] == signal.SIGKILL.name
    assert told[0]["budget_after"] <= 8192
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert (summary["ended"], summary["steps"]) == ("finished", 2)
    assert all(mx.isfinite(mx.array(line["loss"])).item() for line in read_metrics(tmp_path / "run"))
