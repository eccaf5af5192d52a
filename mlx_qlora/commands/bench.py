"""`mlx-qlora bench`: this library and the other trainers that are installed, on the same work, in one run."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import tyro

from mlx_qlora.assets import packaged
from mlx_qlora.bench.data import lay_field
from mlx_qlora.bench.models import generate
from mlx_qlora.bench.picture import draw, require_matplotlib
from mlx_qlora.bench.race import Race, batch_rows
from mlx_qlora.bench.report import header, rows, table, to_json
from mlx_qlora.bench.settings import ModelShape, RaceConfig, check_overrides, contestants, opponents
from mlx_qlora.errors import ConfigError
from mlx_qlora.look.console import answered
from mlx_qlora.model.load import _folder as find_folder
from mlx_qlora.model.load import load_tokenizer
from mlx_qlora.run.disk import write_json


@dataclass(frozen=True)
class _Arguments(ModelShape):
    """Race this library against mlx-lm and others: same model, same examples in the same updates, by turns."""

    model: str = ""
    """A folder that mlx-lm can load, or a model of the hub as owner/name; without it one is generated."""
    data: str = "shared"
    """shared (chats with one system prompt), mixed (24 to 400 tokens), long (documents), or a folder or file of yours."""
    lora_layers: int | None = None
    """Adapt only the last so many layers."""
    rank: int = 8
    """Rank of the adapters."""
    batch_size: int = 16
    """Examples that go through the model at once."""
    gradient_accumulation: int = 1
    """Batches that make one update."""
    learning_rate: float = 1e-4
    """The learning rate, constant."""
    max_seq_length: int = 2048
    """Longest example in tokens."""
    updates: int = 4
    """Updates of each repeat."""
    repeats: int = 3
    """How often each contestant has its turn; the table shows the median."""
    warmup: int = 1
    """Updates before the first repeat, whose time counts only as that of the first update."""
    seed: int = 0
    """For the generated model and data, the order, and the adapters' start."""
    against: str | None = None
    """Of mlx-lm, mlx-lm-lora, mlx-tune, flat, with commas; without it: what is installed of the first three.
    flat is this library's plain twin."""
    same_kernels: bool = False
    """Give the others our BLAS, our allocator and our matmul of frozen weights, so that what remains is the algorithm."""
    ours: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A further contestant of ours with other settings of a run, as key=value,key=value; can be given again."""
    floor: bool = True
    """Time the bare multiplications of an update as well."""
    json: str = ""
    """Write everything that was measured into this file."""
    png: str = ""
    """Draw it into this file; needs matplotlib."""

    def __post_init__(self) -> None:
        """Nothing: what is wrong is said in `_run`, outside of tyro's boxes."""


def main(arguments: Sequence[str]) -> int:
    def raced() -> int:
        given = tyro.cli(_Arguments, prog="mlx-qlora bench", args=arguments)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave no processes, and no model of gigabytes
        try:
            return _run(given)
        finally:
            signal.signal(signal.SIGTERM, before)

    return answered("bench", raced)


def _run(given: _Arguments) -> int:
    config = _config(given)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="mlx-qlora-bench-") as place:
        folder = Path(place)
        check_overrides(config, folder)
        model = str(_located(config.model)) if config.model else str(folder / "model")
        if not config.model:
            say("generating the model")
            generate(config.shape, config.seed, folder / "model")
        racing = contestants(config)
        batches = {batch_rows(each.kind, config) for each in racing}
        ground = lay_field(config, load_tokenizer(model), folder, batches)
        lines = header(config, config.model or _generated(config.shape), ground)
        print("\n".join(lines), flush=True)
        with Race(config, model, ground, folder, say) as race:
            outcome = race.run(racing)
    found = rows(outcome, ground)
    print("\n" + "\n".join(table(config, found, outcome.beginning["loss"])))
    if given.json:
        write_json(Path(given.json), to_json(config, outcome, found, ground))
    if given.png:
        draw(found, "\n".join(line.split(maxsplit=1)[1] for line in lines[:3]), Path(given.png))
    return 0 if any(not row["failed"] for row in found if row["kind"] == "mlx-qlora") else 1


def _config(given: _Arguments) -> RaceConfig:
    """The settings of the race, checked; also what would only be missed after it."""
    for name, path in (("json", given.json), ("png", given.png)):
        if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise ConfigError(f"--{name} {path}: a file in a folder that is there is expected.")
    if given.png:
        require_matplotlib()
    shape = ModelShape(**{each.name: getattr(given, each.name) for each in fields(ModelShape)})
    same = {each.name for each in fields(RaceConfig)} - {"shape", "against"}
    return RaceConfig(shape=shape, against=opponents(given.against), **{name: getattr(given, name) for name in same})


def _located(name: str) -> Path:
    """The folder of a model, which every trainer can load; from the hub it is fetched first."""
    return packaged(name) or find_folder(name)


def _generated(shape: ModelShape) -> str:
    return (
        f"generated: {shape.layers} layers of {shape.hidden}, {shape.number_of_heads} heads ({shape.number_of_kv_heads} for "
        f"keys), {shape.width_inside} inside the MLP, {shape.vocab:,} tokens, 4-bit"
    )
