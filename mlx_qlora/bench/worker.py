"""One contestant, in a process of its own: `python -m mlx_qlora.bench.worker`, which the race starts.

A process of its own because the BLAS is chosen once in a process, a peak of memory belongs to a process, and one that
dies takes nobody with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS, unless MLX_QLORA_BLAS is none)

# isort: split
import mlx.core as mx

from mlx_qlora.bench.settings import Spec
from mlx_qlora.bench.turns import Finished, Turns
from mlx_qlora.errors import MlxQloraError
from mlx_qlora.model import backend

KINDS = {
    "mlx-qlora": ("mlx_qlora.bench.ours", "race"),
    "flat": ("mlx_qlora.bench.ours", "race_flat"),
    "mlx-lm": ("mlx_qlora.bench.neighbours", "race_mlx_lm"),
    "mlx-lm-lora": ("mlx_qlora.bench.neighbours", "race_mlx_lm_lora"),
    "mlx-tune": ("mlx_qlora.bench.neighbours", "race_mlx_tune"),
    "floor": ("mlx_qlora.bench.floor", "race"),
    "referee": ("mlx_qlora.bench.referee", "judge"),
}


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the race decides what it means
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what trainers print must not come between the answers
    turns = Turns(sys.stdin, answers, mx.reset_peak_memory, lambda: mx.get_peak_memory() / 1e9)
    try:
        spec = Spec(**json.loads(sys.stdin.readline()))
        race: Callable[[Spec, Turns], None] = getattr(import_module(KINDS[spec.kind][0]), KINDS[spec.kind][1])
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        race(spec, turns)
    except Finished as end:
        turns.send({"saved": end.folder, "blas": Path(backend.preload_blas().path).name})
        return 0
    except MlxQloraError as error:
        turns.send({"failed": " ".join(str(error).split())})
        return error.exit_code
    except Exception as error:  # whatever a trainer can raise: the race reports it, and goes on without this one
        traceback.print_exc()
        turns.send({"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
