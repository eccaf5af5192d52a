"""`mlx-qlora distill grow`: a student gets the tokens at the end of its teacher's vocabulary that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mlx_qlora.config import RunConfig, from_yaml
from mlx_qlora.distilling.grow import Grown, grown
from mlx_qlora.errors import ConfigError
from mlx_qlora.look.console import Console, answered


@dataclass(frozen=True)
class _Arguments:
    """Write a student into a folder of its own, with rows for the tokens that only its teacher knows. Each new row of
    embedding and head is the mean of those that are there, quantised as they are; no other number changes. Training then
    teaches them."""

    model: str = ""
    """The student: a folder that mlx-lm can load, a model of the hub, or: embedded."""
    like: str = ""
    """The teacher, or a folder with its tokenizer. Without it distill.teacher of the file with settings."""
    output_dir: str = ""
    """The folder for the grown student; a new one."""
    config: str = ""
    """A YAML file with the settings of a run, whose model and teacher are meant."""


def main(arguments: Sequence[str]) -> int:
    def ran() -> int:
        return _run(tyro.cli(_Arguments, prog="mlx-qlora distill grow", args=list(arguments)))

    return answered("distill grow", ran)


def _run(given: _Arguments) -> int:
    run = from_yaml(Path(given.config).expanduser(), RunConfig()) if given.config else RunConfig()
    model, like = given.model or run.model, given.like or run.distill.teacher
    missing = [flag for flag, value in (("--model", model), ("--like", like), ("--output-dir", given.output_dir)) if not value]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. "
            "Expected: mlx-qlora distill grow --model STUDENT --like TEACHER --output-dir FOLDER"
        )
    folder = Path(given.output_dir).expanduser()
    _tell(grown(model, like, folder), like)
    return 0


def _tell(made: Grown, like: str) -> None:
    console = Console()
    console.fact("model", made.model.describe)
    console.fact("grown", *made.describe)
    console.fact("folder", str(made.folder))
    console.fact(
        "train",
        "the new rows are all the same until they are trained: embedding and head need adapters, too",
        f"mlx-qlora distill --model {made.folder} --distill.teacher {like} --lora.targets all-linear embeddings ...",
    )
