"""What a teacher's kept logits cost: bytes a place, making them from logits, opening a million places, reading a batch.

    python benchmarks/kept_logits.py

The teacher's own forward pass is not in it. Each figure of opening and reading is from a process of its own.
"""

from __future__ import annotations

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import json
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.data.kept_logits import KeptLogits
from mlx_qlora.data.logit_shards import Card, Records, open_writer
from mlx_qlora.distilling.condense import condense, draws
from mlx_qlora.model import backend

RESULT = Path(__file__).parent / "results" / "kept_logits.json"
PLACES, BATCH, AT_ONCE = 1_000_000, 2048, 64
CARD = Card(
    teacher="", fingerprint="", adapters="", tokenizer="", template="", data="", top_k=64, samples=0,
    temperatures=(2.0, 1.5, 1.0), logit_clip=50.0, vocabulary=151_936, teacher_vocabulary=152_064, matmul={}, versions={},
    date="",
)  # fmt: skip


def marks_of(places: int) -> Any:
    return np.random.default_rng(0).integers(0, 2**64, places, np.uint64)


def said() -> tuple[list[Any], float]:
    """(what is kept of a chunk of places, seconds a place)."""
    logits = mx.random.normal((AT_ONCE, CARD.teacher_vocabulary), key=mx.random.key(0)) * 3
    uniform = mx.array(draws(marks_of(AT_ONCE), 0))
    mx.eval(logits)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        found = condense(logits, CARD.vocabulary, CARD.top_k, CARD.temperatures, CARD.logit_clip, uniform)
        mx.eval(found)
        times.append(time.perf_counter() - begun)
    return [np.array(each) for each in found[:5]], min(times) / AT_ONCE


def write(folder: Path, arrays: list[Any]) -> float:
    """Seconds."""
    begun = time.perf_counter()
    marks, writer = marks_of(PLACES), open_writer(folder, CARD, 8_000_000)
    for start in range(0, PLACES, BATCH):
        part = marks[start : start + BATCH]
        values, ids, rests, drawn, drawn_ids = (np.resize(each, (len(part), each.shape[1])) for each in arrays)
        writer.add(Records(part, values, ids, rests, drawn, drawn_ids))
    writer.finish()
    writer.close()
    return time.perf_counter() - begun


def read(folder: str) -> None:
    """Said as JSON to whoever started this process."""
    begun = time.perf_counter()
    KeptLogits.open(Path(folder))
    opened = time.perf_counter() - begun
    tracemalloc.start()
    kept = KeptLogits.open(Path(folder))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    marks, weights, rng = marks_of(PLACES), np.ones(BATCH, np.float32), np.random.default_rng(1)
    times = []
    for _ in range(24):
        chosen = marks[rng.integers(0, PLACES, BATCH)]
        begun = time.perf_counter()
        kept.classes(chosen, weights, 1.5, None)
        times.append(time.perf_counter() - begun)
    print(
        json.dumps({
            "open_s": round(opened, 3), "open_mb": round(held / 1e6, 1), "open_peak_mb": round(peak / 1e6, 1),
            "first_batch_s": round(times[0], 3),
            "batch_s": round(median(times[4:]), 4), "batch_places": BATCH,
        })
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        arrays, seconds = said()
        writing = write(Path(folder) / "cache", arrays)
        sizes = [path.stat().st_size for path in (Path(folder) / "cache").iterdir()]
        line = [sys.executable, __file__, str(Path(folder) / "cache")]
        runs = [json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout) for _ in range(3)]
    result = {
        "machine": {"system": platform.platform(), "device": backend.describe(), "mlx": version("mlx")},
        "date": date.today().isoformat(),
        "places": PLACES,
        "classes": CARD.vocabulary,
        "top_k": CARD.top_k,
        "temperatures": len(CARD.temperatures),
        "bytes_per_place": round(sum(sizes) / PLACES, 1),
        "shards": len(sizes) - 1,
        "condensing_ms_per_place": round(seconds * 1e3, 2),
        "writing_s": round(writing, 1),
        "reading": {name: median(each[name] for each in runs) for name in runs[0]},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        read(sys.argv[1])
    else:
        main()
