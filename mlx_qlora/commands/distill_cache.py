"""`mlx-qlora distill cache`: keeps what a teacher says at each supervised place, so that training needs no teacher."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from mlx_qlora.config import parse
from mlx_qlora.distilling.cache import Wanted, make
from mlx_qlora.look.console import Console, answered

_PROG = "mlx-qlora distill cache"


def main(arguments: Sequence[str]) -> int:
    def ran() -> int:
        given = list(arguments)
        wanted, rest = tyro.cli(_Asked, prog=_PROG, args=given, return_unknown_args=True, add_help=False)
        if {"-h", "--help"} & set(given):
            _own_help()
        console = Console()
        try:
            return make(parse(rest, prog=_PROG), wanted.judged(), console)
        finally:
            console.end_bar()

    return answered("distill cache", ran)


def _own_help() -> None:
    """The settings of a run follow."""
    try:
        tyro.cli(_Asked, prog=_PROG, args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit:
        print()


class _Asked(Wanted):
    """Keeps what a teacher says at each supervised place of the training data, for mlx-qlora distill --distill.cache.

    It takes the settings of the run (--config run.yaml). Of these count: model and data and how it is read; distill.teacher,
    distill.teacher_adapters, distill.cache; distill.top_k, distill.temperature, distill.schedule, distill.logit_clip;
    token_budget; overwrite, which makes the cache anew. What is there already is not computed again."""

    def __post_init__(self) -> None:
        """Nothing: the values are judged outside of tyro's boxes."""

    def judged(self) -> Wanted:
        return Wanted(self.samples, self.split, self.shard_mb)
