"""The frozen quantised matmul against MLX's kernel and against the BLAS of MLX's Linux wheel, forward and backward.

    python benchmarks/frozen_matmul.py --output benchmarks/results/frozen_matmul.json

Ratios within one run, medians over repeats, the ways in turn. The BLAS comparison starts a second process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx

from mlx_qlora.model import backend, frozen

SHAPES = [(512, 256, 640), (512, 1024, 1024), (512, 1024, 4096)]  # rows, inputs, outputs
KIND = {"group_size": 64, "bits": 4, "mode": "affine"}


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure(repeats: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for rows, inputs, outputs in SHAPES:
        x = mx.random.normal((rows, inputs))
        packed = mx.quantize(mx.random.normal((outputs, inputs)), group_size=64, bits=4)
        mx.eval(x, packed)

        def kernel(x: mx.array, packed: tuple[mx.array, ...] = packed) -> mx.array:
            w, scales, biases = packed
            return mx.quantized_matmul(x, w, scales=scales, biases=biases, transpose=True, **KIND).sum()

        def ours(x: mx.array, packed: tuple[mx.array, ...] = packed) -> mx.array:
            return frozen.dequantized_matmul(x, *packed, **KIND).sum()

        ways = {"kernel": mx.value_and_grad(kernel), "ours": mx.value_and_grad(ours)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(repeats + 1):
            for name, step in ways.items():
                took = seconds(lambda step=step, x=x: mx.eval(step(x)))
                if repeat:  # the first is a warm-up
                    times[name].append(took)
        ratios = [a / b for a, b in zip(times["kernel"], times["ours"], strict=True)]
        results.append(
            {
                "rows": rows, "inputs": inputs, "outputs": outputs,
                "kernel_ms": 1e3 * statistics.median(times["kernel"]),
                "ours_ms": 1e3 * statistics.median(times["ours"]),
                "speedup": statistics.median(ratios),
                "speedup_range": [min(ratios), max(ratios)],
            }
        )  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only-measure", action="store_true", help="print the measurements of this process as JSON")
    arguments = parser.parse_args()
    results = measure(arguments.repeats)
    if arguments.only_measure:
        print(json.dumps(results))
        return
    slow = subprocess.run(
        [sys.executable, __file__, "--only-measure", "--repeats", "3"],
        env=os.environ | {"MLX_QLORA_BLAS": "none"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for row, other in zip(results, json.loads(slow.stdout), strict=True):
        row["ours_ms_bundled_blas"] = other["ours_ms"]
        row["speedup_of_blas"] = other["ours_ms"] / row["ours_ms"]
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "device": backend.describe(),
        "versions": {name: version(name) for name in ("mlx", "mlx-qlora")} | {"python": platform.python_version()},
        "repeats": arguments.repeats,
        "results": results,
    }
    for row in results:
        print(
            f"{row['rows']} x {row['inputs']} -> {row['outputs']}: MLX's kernel {row['kernel_ms']:.0f} ms, "
            f"ours {row['ours_ms']:.1f} ms, {row['speedup']:.0f} times faster; on the bundled BLAS ours takes "
            f"{row['ours_ms_bundled_blas']:.0f} ms"
        )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
