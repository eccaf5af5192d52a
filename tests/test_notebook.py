"""A run in a real notebook's kernel: the cell is interrupted, and run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import Empty
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

from mlx_qlora import LoraConfig, RunConfig, train
from mlx_qlora.run import checkpoint
from mlx_qlora.run.metrics import MEASURED, read_metrics

SECONDS = 60.0


@pytest.fixture
def config(small_data: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        model="embedded", data=str(small_data), output_dir=str(tmp_path / "run"), epochs=20, batch_size=8, eval_every=7,
        learning_rate=5e-3, lora=LoraConfig(rank=2, scale=4.0, dropout=0.1),
    )  # fmt: skip


class Notebook:
    """A kernel, and what its cells print."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient):
        self.manager, self._client = manager, client

    def begin(self, code: str) -> str:
        return str(self._client.execute(code))

    def end(self, cell: str) -> tuple[str, str]:
        """(what the cell printed, the name of the error it ended with or nothing)."""
        printed, error, until = "", "", time.monotonic() + SECONDS
        while True:
            try:
                message: dict[str, Any] = self._client.get_iopub_msg(timeout=until - time.monotonic())
            except Empty:
                raise AssertionError(f"the cell did not end: {printed}") from None
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != cell:
                continue
            printed += content["text"] if kind == "stream" else ""
            error = content["ename"] if kind == "error" else error
            if kind == "status" and content["execution_state"] == "idle":
                return printed, error

    def run(self, code: str) -> str:
        printed, error = self.end(self.begin(code))
        assert not error, f"{error}: {printed}"
        return printed.strip()

    def interrupt(self) -> None:
        """What the square in the toolbar does."""
        self.manager.interrupt_kernel()


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    manager, client = start_new_kernel(startup_timeout=SECONDS)
    try:
        yield Notebook(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def cell_of(config: RunConfig) -> str:
    settings = {name: value for name, value in config.plain().items() if value != RunConfig().plain()[name]}
    rest = "".join(f"{name}={value!r}, " for name, value in settings.items() if name != "lora")
    of_lora = f"lora=LoraConfig(rank={config.lora.rank}, scale={config.lora.scale}, dropout={config.lora.dropout})"
    return f"from mlx_qlora import LoraConfig, RunConfig, train\nresult = train(RunConfig({rest}{of_lora}))"


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def made(config: RunConfig) -> int:
    path = Path(config.output_dir)
    return len(read_metrics(path)) if (path / "training_metrics.jsonl").exists() else 0


def adapters(config: RunConfig) -> bytes:
    return (Path(config.output_dir) / "adapters" / "adapters.safetensors").read_bytes()


def figures(config: RunConfig) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(Path(config.output_dir))]


ENDED = "print(result.summary['ended'], result.summary['steps'])"
LEFT = """
import os, signal, threading
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
print([thread.name for thread in threading.enumerate() if thread.name.startswith(("saver", "mlx-qlora"))])
own = f"/proc/{os.getpid()}/fd"
files = [os.path.join(own, name) for name in (os.listdir(own) if os.path.isdir(own) else [])]
print([name for name in map(os.path.realpath, files) if name.startswith(os.path.realpath(OUTPUT))])
"""
NOTHING = "True True\n[]\n[]"  # handlers are as they were, no thread goes on, no file of the run is open


def left(config: RunConfig) -> str:
    return f"OUTPUT = {config.output_dir!r}\n{LEFT}"


def test_an_interrupted_cell_run_again_goes_on_to_the_same_bytes(config: RunConfig, notebook: Notebook) -> None:
    whole = replace(config, output_dir=config.output_dir + "-whole")
    train(whole, quiet=True)
    config = replace(config, resume=True)
    cell = cell_of(config)
    for updates in (4, 11):
        running = notebook.begin(cell)
        wait_for(lambda least=updates: made(config) >= least)  # type: ignore[misc]
        notebook.interrupt()
        printed, error = notebook.end(running)
        assert not error, f"{error}: {printed}"
        assert "stopping after this update, and saving" in printed
        how, step = notebook.run(ENDED).split()
        assert how == "interrupted"
        assert f"all of it is saved in {checkpoint.there(Path(config.output_dir))[0].name}; to go on:" in printed
        assert updates <= int(step) < len(figures(whole))
        usable = "import mlx.core as mx; print(result.model(mx.array([[1, 2, 3]])).shape, result.model.training)"
        assert notebook.run(usable).endswith("False")
        assert notebook.run(left(config)) == NOTHING
    notebook.run(cell)
    assert notebook.run(ENDED) == f"finished {len(figures(whole))}"
    assert adapters(config) == adapters(whole)
    assert figures(config) == figures(whole)
    assert notebook.run(left(config)) == NOTHING


def test_a_second_interrupt_ends_the_cell_at_once_and_the_next_run_goes_on(config: RunConfig, notebook: Notebook) -> None:
    """In updates so long that the second one comes before the first was heeded."""
    config = replace(config, resume=True, batch_size=22, token_budget=1, layout="plain", epochs=3, eval_every=1)
    whole = replace(config, output_dir=config.output_dir + "-whole")
    train(whole, quiet=True)
    running = notebook.begin(cell_of(config))
    wait_for(lambda: made(config) >= 1)
    notebook.interrupt()
    time.sleep(0.6)  # two within half a second are one wish, said twice
    notebook.interrupt()
    _, error = notebook.end(running)
    assert error in ("KeyboardInterrupt", ""), "nothing else; and if the update was over by then, the first one was heeded"
    assert notebook.run(left(config)) == NOTHING
    notebook.run(cell_of(config))
    assert notebook.run(ENDED) == f"finished {len(figures(whole))}"
    assert adapters(config) == adapters(whole)
    assert figures(config) == figures(whole)
