"""`mlx-qlora distill`: trains a student with a teacher; with a further word, makes what such a training needs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from mlx_qlora.config import RunConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.look.console import answered
from mlx_qlora.train import main as train

# word: (module with a main(arguments), what it does)
WORDS: dict[str, tuple[str, str]] = {
    "cache": ("mlx_qlora.commands.distill_cache", "keep what a teacher says at each trained place on the disk"),
    "grow": ("mlx_qlora.commands.distill_grow", "give a student the last tokens of its teacher's vocabulary"),
    "generate": ("mlx_qlora.commands.distill_generate", "let a teacher answer prompts: a data set of what it says"),
}
# Where nothing is said. Runs with 1.0 and with updates of a handful of tokens went non-finite.
_CALM = RunConfig(clip_grad_norm=0.5, min_supervised_per_update=8)
_TRAINING = """To train: mlx-qlora distill --model STUDENT --data FOLDER --output-dir FOLDER
          and --distill.teacher MODEL, or --distill.cache FOLDER that distill cache wrote.

All settings of mlx-qlora train are taken; without a word about them, clip_grad_norm is 0.5 here and
min_supervised_per_update 8. mlx-qlora distill --help shows them all, and mlx-qlora distill WORD --help those of a word.
"""


def main(arguments: Sequence[str]) -> int:
    word, *rest = list(arguments) or [""]
    if word in WORDS:
        return int(import_module(WORDS[word][0]).main(rest))
    if word in ("", "-h", "--help"):
        print("Trains a student with a teacher; with a further word, makes what such a training needs.\n")
        print(*(f"  mlx-qlora distill {name:<9} {what}" for name, (_, what) in WORDS.items()), sep="\n")
        print(f"\n{_TRAINING}")
    if not word:
        return 0
    if not word.startswith("-"):
        return answered("distill", lambda: _unknown(word))
    return train(list(arguments), "distill", _CALM)


def _unknown(word: str) -> int:
    raise ConfigError(f"{word!r} came, one of {', '.join(WORDS)} is expected, or flags of a training. See --help.")
