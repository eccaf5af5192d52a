"""`mlx-qlora compare RUN RUN ...`: which run is better, by what, and whether that is more than chance."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mlx_qlora.errors import ConfigError
from mlx_qlora.look.comparison.compare import Comparison, compare
from mlx_qlora.look.console import Console, answered
from mlx_qlora.look.pictures.figures import over_tokens, require_matplotlib, results, save
from mlx_qlora.look.pictures.seeds import dots
from mlx_qlora.run.disk import write_atomically


@dataclass(frozen=True)
class _Arguments:
    """Set runs side by side: settings, losses, answers, speed, memory; and say which is better, if that can be said."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    """Folders of runs, or of what train --seeds has made. Runs that differ in their seed only are grouped, with mean and
    interval."""
    baseline: str = ""
    """The run that the others are compared with; without it the first."""
    score: str = ""
    """The score that the verdict goes by: token_f1, accuracy, exact_match and so on; without it the first that is there."""
    output_dir: str = ""
    """Write compare.md, compare.csv, compare.png, the curves of all, compare_tokens.png, their losses over the tokens that each
    has read, and of several seeds compare_seeds.png, a dot for each, into this folder; it is made if it is not there."""


def main(arguments: Sequence[str]) -> int:
    return answered("compare", lambda: _run(tyro.cli(_Arguments, prog="mlx-qlora compare", args=arguments)))


def _run(given: _Arguments) -> int:
    if given.output_dir:
        require_matplotlib("--output-dir")
        _require_folder(given.output_dir)
    found = compare(given.runs, baseline=given.baseline, score=given.score)
    console = Console()
    console.say(found.screen(shutil.get_terminal_size((80, 24)).columns))
    if given.output_dir:
        folder = Path(given.output_dir).expanduser()
        console.say()
        console.fact("files", *map(str, _write(found, folder)))
    return 0


def _require_folder(name: str) -> None:
    folder = Path(name).expanduser()
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--output-dir {name}: a folder that can be written is expected; {there} is none.")


def _write(found: Comparison, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    picture, table, page = (folder / f"compare.{kind}" for kind in ("png", "csv", "md"))
    tokens = folder / "compare_tokens.png"
    save(results(found.histories), picture)
    save(over_tokens(found.histories), tokens)
    seeds = folder / "compare_seeds.png"
    if found.seeds:
        save(dots(found.seeds), seeds)
    write_atomically(table, found.csv())
    pictures = [picture, tokens, *([seeds] if found.seeds else [])]
    write_atomically(page, found.markdown(picture.name, seeds.name if found.seeds else ""))  # last: it shows them
    return [page, table, *pictures]
