"""Opening a stream of a billion tokens, and drawing windows from it.

    python benchmarks/billion_tokens.py --tokens 1000000000

The tokens are random and written as a run would have prepared them, without a tokenizer; then a process of its own opens
them as `mlx-qlora train` does, and draws windows in the order of an epoch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import numpy as np

from mlx_qlora.data.corpus import gather
from mlx_qlora.data.prepare import Preparation
from mlx_qlora.data.render import WHOLE, Account, RenderConfig
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.data.tokens import Encoded
from mlx_qlora.data.windows import WindowConfig
from mlx_qlora.model.load import load_tokenizer

HERE = Path(__file__).parent
WINDOW, STRIDE, PER_UPDATE = 256, 64, 32


def write(folder: Path, tokens: int, length: int) -> None:
    """Documents of `length` tokens on average, as prepared data."""
    for name in ("train", "valid"):
        (folder / f"{name}.txt").write_text("Era uma vez um gato. " * 200, encoding="utf-8")
    source = SourceConfig(data=str(folder))

    def encoded(rows: object, account: Account, refusals: object) -> Iterator[tuple[str, Encoded]]:
        rng = np.random.default_rng(0)
        account.rows = 1
        written = number = 0
        while written < tokens:
            size = min(int(rng.integers(length // 2, 3 * length // 2)), tokens - written)
            made = Encoded(rng.integers(3, 2048, size, dtype=np.int32), [(1, size, 1.0)])
            account.count(made)
            written, number = written + size, number + 1
            yield f"train.txt:{number}", made

    renderer: Any = SimpleNamespace(tokenizer=load_tokenizer("embedded"), encoded=encoded)
    how = replace(RenderConfig(), max_seq_length=WHOLE)
    Preparation(source, how, renderer).prepare(find(source)[0], "train")
    opened(str(folder), cross=True)  # the validation text, by the ordinary way


def private_mb() -> float:
    """Memory of this process alone, in MB; pages of mapped files belong to the system."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Anonymous:")) / 1e3


def opened(folder: str, cross: bool) -> dict[str, Any]:
    tokenizer = load_tokenizer("embedded")
    before = private_mb()
    start = time.perf_counter()
    own = WindowConfig(stride=STRIDE, cross_documents=cross)
    corpus = gather(SourceConfig(data=folder), RenderConfig(max_seq_length=WINDOW), tokenizer, seed=0, windows=own)
    seconds = time.perf_counter() - start
    windows = corpus.windows
    assert windows is not None
    assert corpus.accounts["train"].tokens == windows.total_tokens, "what was written is taken"
    start = time.perf_counter()
    updates = 100
    for update in range(updates):
        for number in corpus.order.at(0, np.arange(update * PER_UPDATE, (update + 1) * PER_UPDATE)).tolist():
            windows[number]
    drawn = (time.perf_counter() - start) / updates
    after = private_mb()
    return {
        "open_s": seconds, "draw_an_update_ms": 1e3 * drawn, "windows": len(windows), "tokens": windows.total_tokens,
        "documents": windows.documents, "private_mb": after - before,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000_000)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--open", nargs=2)
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(opened(arguments.open[0], arguments.open[1] == "cross")))
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write(Path(folder), arguments.tokens, arguments.length)
        found: dict[str, Any] = {"written_s": time.perf_counter() - start}
        found["disk_mb"] = sum(each.stat().st_size for each in Path(folder).rglob("*") if each.is_file()) / 1e6
        for how in ("cross", "apart"):
            command = [sys.executable, __file__, "--open", folder, how]
            runs = [
                json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(arguments.repeats)
            ]
            found[how] = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
    found |= {
        "window": WINDOW, "stride": STRIDE, "windows_in_an_update": PER_UPDATE, "repeats": arguments.repeats,
        "date": datetime.date.today().isoformat(), "machine": f"{platform.machine()}, 2 cores, {platform.system()}",
        "versions": {name: version(name) for name in ("mlx-qlora", "numpy")},
    }  # fmt: skip
    (HERE / "results" / "billion_tokens.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
