"""`mlx-qlora data PATH --model M`: what would be trained, before it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from mlx_qlora.data.audit import audit
from mlx_qlora.data.corpus import gather
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.data.windows import WindowConfig
from mlx_qlora.errors import ConfigError, require
from mlx_qlora.look.account import page, shown
from mlx_qlora.look.console import Console, answered
from mlx_qlora.model.load import load_tokenizer
from mlx_qlora.run.disk import write_atomically, write_json


@dataclass(frozen=True)
class _Arguments(RenderConfig, SourceConfig):
    """Audit a data set: what will be trained, what is lost, what comes twice. Nothing is trained."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH")] = ()
    """What `train --data` would name: a folder, files, hub:owner/name, embedded."""
    data: Annotated[str | tuple[str, ...], tyro.conf.Suppress] = ()
    streaming: Annotated[bool, tyro.conf.Suppress] = False
    shuffle_buffer: Annotated[int, tyro.conf.Suppress] = 1
    model: str = ""
    """The model whose tokenizer and chat template count; a folder with only a tokenizer serves. Or: embedded."""
    seed: int = 0
    """For the validation rows that are split off where there are none."""
    show: int = 3
    """How many examples are shown, decoded."""
    html: str = ""
    """Write the account as a page, too."""
    json: str = ""
    """Write the account for programs, too."""

    def __post_init__(self) -> None:
        """Nothing: what is wrong is said in `_run`, outside of tyro's boxes."""


def main(arguments: Sequence[str]) -> int:
    def audited() -> int:
        return _run(tyro.cli(_Arguments, prog="mlx-qlora data", args=arguments, config=(tyro.conf.EnumChoicesFromValues,)))

    return answered("data", audited)


def _run(given: _Arguments) -> int:
    if not given.model:
        raise ConfigError("--model is missing: a folder or hub name whose tokenizer and chat template count, or embedded.")
    require((given.show >= 0, "show", given.show, "a whole number from 0"))
    for name, path in (("html", given.html), ("json", given.json)):
        if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise ConfigError(f"--{name} {path}: a file in a folder that is there is expected.")
    own = {each.name: getattr(given, each.name) for each in fields(SourceConfig)}
    source = SourceConfig(**own | {"data": given.paths})
    render = RenderConfig(**{each.name: getattr(given, each.name) for each in fields(RenderConfig)})
    console = Console()
    tokenizer = load_tokenizer(given.model)
    corpus = gather(source, render, tokenizer, given.seed, console.preparing, strict=False, windows=WindowConfig())
    console.end_bar()
    found = audit(corpus, show=max(given.show, 10 if given.html else 0))
    if given.html:
        write_atomically(Path(given.html), page(found, f"What is trained: {', '.join(source.sources)}"))
    if given.json:
        write_json(Path(given.json), found.to_json())
    console.account(found)
    longest = found.accounts["train"].longest if "train" in found.accounts else []
    if longest:
        console.fact("longest", ", ".join(f"{id} ({tokens:,})" for tokens, id in sorted(longest, reverse=True)[:3]))
    refused = [line for account in found.accounts.values() for line in account.refused]
    if refused and not found.refusals:  # else they are said below
        console.fact("skipped", *refused)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if found.sights and given.show:
        more = ", × with this weight, → in place of what follows" if any(sight.remarks for sight in found.sights) else ""
        console.say(f"\n{'green' if colour else '⟦ ⟧'} is trained{more}, the rest is what the model sees before:")
        before = None
        for sight in found.sights[: given.show]:
            console.say(f"\n{shown(sight, colour, before)}")
            before = sight
    for name, path in (("page", given.html), ("json", given.json)):
        if path:
            console.fact(name, path)
    if found.refusals:
        print("\nmlx-qlora data: training would be refused:\n" + "\n".join(found.refusals), file=sys.stderr)
        return 2
    return 0
