"""`mlx-qlora report RUN`: the curves as a picture, and a page about the run, or about several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mlx_qlora.config import RunConfig, flat
from mlx_qlora.errors import ConfigError, RunFolderError
from mlx_qlora.files import small_text
from mlx_qlora.look.comparison.contender import seed_folders
from mlx_qlora.look.console import Console, answered
from mlx_qlora.look.history import History, read_history
from mlx_qlora.look.pages.page import GENERATOR
from mlx_qlora.look.pages.report import report
from mlx_qlora.look.pages.sections import tell
from mlx_qlora.look.pictures.figures import PICTURE, THEMES, require_matplotlib, results, save
from mlx_qlora.run.disk import write_atomically

_PAGE = "report.html"
_MOST = 16  # runs that one page can show so that they are told apart


@dataclass(frozen=True)
class _Arguments:
    """Draw a run's curves, and write a page about it that opens anywhere; of several runs, one page with them side by side."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    """Folders of runs, finished or going on, or of what train --seeds has made."""
    output: str = ""
    """Where the page is written; without: report.html in the run's folder, or of several runs in this one."""
    theme: Literal["light", "dark"] = "light"
    """Of the picture; the page has both, and goes by the browser."""


def main(arguments: Sequence[str]) -> int:
    def reported() -> int:
        return _run(tyro.cli(_Arguments, prog="mlx-qlora report", args=arguments))

    return answered("report", reported)


def _run(given: _Arguments) -> int:
    histories = _histories(given.runs)
    require_matplotlib("mlx-qlora report")
    alone = len(histories) == 1
    page = Path(given.output).expanduser() if given.output else (histories[0].folder if alone else Path()) / _PAGE
    _check_free(page)
    console = Console()
    if alone:
        picture = page.parent / PICTURE
        save(results(histories, THEMES[given.theme]), picture)
        console.fact("picture", str(picture))
    defaults = flat(RunConfig().plain())
    text = report([tell(each, defaults) for each in histories])
    write_atomically(page, text, flushed=False)
    console.fact("page", f"{page}: {len(text.encode()) / 1e6:.2f} MB, needs no network; open it in a browser")
    return 0


def _histories(runs: Sequence[str]) -> list[History]:
    if not runs:
        raise ConfigError("which run? Name its folder: mlx-qlora report runs/first; or several, to have them side by side.")
    paths = [run for named in map(Path, runs) for run in seed_folders(named.expanduser()) or [named]]
    if len(paths) > _MOST:
        raise ConfigError(f"{len(paths)} runs came; {_MOST} are the most that can be told apart on one page.")
    histories = [read_history(path) for path in paths]
    folders = [history.folder.resolve() for history in histories]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            one, two = histories[folders.index(folder)].folder, histories[place].folder
            raise ConfigError(f"{one} and {two} are the same run; name it once.")
    return histories


def _check_free(page: Path) -> None:
    """Nothing but an earlier page of ours is written over."""
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise RunFolderError(f"--output {page}: a file in a folder that is there is expected.")
    try:
        ours = not page.exists() or GENERATOR in small_text(page, 2**26)[:2000]
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise RunFolderError(
            f"{page} is there, and mlx-qlora has not written it. Name another file with --output, or remove it."
        )
