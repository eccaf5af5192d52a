"""A transformer and an LSTM of one size, from nothing, on the same text: losses over the tokens that each has read.

    python benchmarks/lstm_transformer.py --updates 300

Both are `mlx-qlora train --preset tiny`, and read the same windows in the same order. Each is scored on all of the
validation text afterwards (`mlx-qlora evaluate`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
from mlx_qlora.look.history import read_history
from mlx_qlora.look.pictures.figures import over_tokens, save

HERE = Path(__file__).parent
ROOT = HERE.parent
SETTINGS = [
    "--preset", "tiny", "--seq-len", "128", "--stride", "128", "--batch-size", "16", "--epochs", "1", "--seed", "1",
    "--lr", "3e-3", "--warmup-steps", "40", "--optimizer-options", "beta2", "0.98", "weight_decay", "0.1",
    "--validation-tokens", "16384", "--early-stopping.patience", "0", "--overwrite",
]  # fmt: skip


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "from-nothing")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    run("data/make_world.py", "--plain", "--output-dir", str(folder / "text"), "--letters", str(9_000 * arguments.updates))
    found: dict[str, Any] = {}
    for kind in ("mistral", "lstm"):
        where, every = ["--data", str(folder / "text"), "--output-dir", str(folder / kind)], str(arguments.updates // 10)
        length = ["--max-steps", str(arguments.updates), "--eval-every", every]
        run("-m", "mlx_qlora", "train", *SETTINGS, *where, *length, "--architecture", kind)
        run("-m", "mlx_qlora", "evaluate", "--run", str(folder / kind))
        history = read_history(folder / kind)
        report = json.loads((folder / kind / "evaluation_report.json").read_text())
        found[kind] = {
            "parameters": history.summary["trainable_parameters"],
            "tokens_seen": history.summary["exposure"]["tokens_seen"],
            "tokens_per_second": history.summary["tokens_per_second"],
            "peak_memory_gb": history.summary["peak_memory_gb"],
            "best_val_loss": history.summary["best"]["val_loss"],
            **{name: report.get(name) for name in ("loss", "perplexity", "bits_per_byte", "next_token_accuracy")},
        }
    save(over_tokens([read_history(folder / kind) for kind in found]), HERE / "results" / "lstm_transformer.png")
    found |= {
        "updates": arguments.updates,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 2 cores, {platform.system()}",
        "versions": {name: version(name) for name in ("mlx-qlora", "mlx", "mlx-lm")},
    }
    (HERE / "results" / "lstm_transformer.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
