"""What the flight recorder costs: the time of an `enter` and of a heartbeat, as a share of one of the demo's updates.

    python benchmarks/recorder.py --output benchmarks/results/recorder.json

The facts are those of a run; the heartbeat comes from another thread once a second, and is counted as if the update
waited for it. `worst_percent` is of a micro-batch of 20 ms with seven phases.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx

from mlx_qlora.model import backend
from mlx_qlora.run.recorder import Recorder

_UPDATES = 1000
_REST = ("loss", "backward", "accumulate")
_SHORTEST_MS = 20.0  # of a micro-batch that is still worth a phase of its own
_MOST = 7  # phases of a micro-batch, where its update is one too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--update-ms", type=float, default=150.0, help="what an update takes")
    parser.add_argument("--parts", type=int, default=1, help="micro-batches of an update")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    mx.eval(mx.zeros(1000))
    with tempfile.TemporaryDirectory() as name:
        recorder = Recorder(Path(name))
        numbers = iter(range(10**9))
        enters = 2 + (1 + len(_REST)) * args.parts
        updates = [timed(lambda: update(recorder, next(numbers), args.parts), _UPDATES) for _ in range(args.repeats)]
        beats = [timed(recorder.beat, 200) for _ in range(args.repeats)]
        recorder.end("finished")
        recorder.close()
    update_us, beat_us = median(updates), median(beats)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {backend.describe()}",
        "versions": {name: version(name) for name in ("mlx", "mlx-qlora")} | {"python": platform.python_version()},
        "enters_per_update": enters,
        "enter_us": round(update_us / enters, 2),
        "all_enter_us": [round(each / enters, 2) for each in updates],
        "beat_us": round(beat_us, 1),
        "update_ms": args.update_ms,
        "enters_percent_of_update": round(update_us / args.update_ms / 10, 3),
        "beats_percent": round(beat_us / 1e6 * 100, 3),
        "worst_percent": round(_MOST * update_us / enters / _SHORTEST_MS / 10 + beat_us / 1e6 * 100, 3),
        "percent_in_all": round(update_us / args.update_ms / 10 + beat_us / 1e6 * 100, 3),
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def update(recorder: Recorder, number: int, parts: int) -> None:
    ids = tuple(f"train.jsonl:{number * 16 + each}" for each in range(16))
    recorder.enter("batch", update=number, ids=ids, budget=4096, shape=None, part=None)
    for part in range(1, parts + 1):
        recorder.enter("forward", part=part, parts=parts, shape=f"1 x {700 + number % 200} tokens, 95 places", tokens=number)
        for phase in _REST:
            recorder.enter(phase)
    recorder.enter("update")


def timed(call: Callable[[], object], times: int) -> float:
    """Microseconds of one call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times * 1e6


if __name__ == "__main__":
    main()
