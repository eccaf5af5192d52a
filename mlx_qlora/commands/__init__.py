"""`mlx-qlora VERB ...`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from mlx_qlora.model.backend import missing_mlx

# verb: (module with a main(arguments), what it does)
VERBS = {
    "train": ("mlx_qlora.train", "fine-tune a model; --demo shows a whole run on the embedded model and data"),
    "distill": ("mlx_qlora.commands.distill", "train a student with a teacher; make what a teacher says beforehand"),
    "plan": ("mlx_qlora.commands.plan", "before training: the work, the layout, the memory, and what to change"),
    "data": ("mlx_qlora.commands.data", "show what a data set would train, what is lost, what comes twice"),
    "evaluate": ("mlx_qlora.commands.evaluate", "score a run or any model: losses, answers, the base model beside it"),
    "monitor": ("mlx_qlora.commands.monitor", "follow a run from another terminal: curves, validations, time left"),
    "doctor": ("mlx_qlora.commands.doctor", "check this machine and a model, or explain how a run died"),
    "compare": ("mlx_qlora.commands.compare", "set runs side by side, and say whether one is better"),
    "report": ("mlx_qlora.commands.report", "draw a run's curves and write a page about it, or several side by side"),
    "bench": ("mlx_qlora.commands.bench", "race against mlx-lm and others on the same work: speed, memory, loss"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in VERBS:
        if verb != "doctor" and (problem := missing_mlx()):
            print(f"mlx-qlora: {problem}", file=sys.stderr)
            return 2
        try:
            return int(import_module(VERBS[verb][0]).main(rest))
        except KeyboardInterrupt:  # while everything is being imported
            print(f"mlx-qlora {verb}: interrupted", file=sys.stderr)
            return 130
    if verb == "--version":
        from importlib.metadata import version

        print(f"mlx-qlora {version('mlx-qlora')}")
        return 0
    listing = "\n".join(f"  {name:<10} {what}" for name, (_, what) in VERBS.items())
    usage = (
        f"usage: mlx-qlora VERB ...\n\n{listing}\n\nmlx-qlora VERB --help says more; mlx-qlora --version says which this is."
    )
    if verb in ("-h", "--help"):
        print(usage)
        return 0
    print(f"mlx-qlora: there is no verb {verb!r}.\n\n{usage}", file=sys.stderr)
    return 2
