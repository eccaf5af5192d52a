"""Which way of multiplying with a frozen quantised weight is the fastest here, measured once for each shape.

The two ways are equal up to rounding: MLX's quantised kernel, and dequantising followed by a dense multiplication. The
kernel wins with few rows, the other with many, and where one takes over depends on the machine. What was measured is
kept in a small file, by device, BLAS and version of MLX; delete it to have everything measured again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.model import backend, frozen
from mlx_qlora.model.frozen import ALWAYS, NEVER

KEPT_IN = Path("~/.cache/mlx_qlora/matmul.json")
_ROWS = (4, 16, 64, 256)
_CLEAR = 3.0  # times as slow: more rows need no measuring
_REPEATS = 3
_PRODUCTS = 4e9  # a kernel of 2 GFLOP/s takes a second for so many; larger cases are left to the rows before


@dataclass(frozen=True)
class MatmulConfig:
    """How frozen quantised weights are multiplied."""

    matmul: Literal["auto", "quantized", "dequantize"] = "auto"
    """The quantised kernel, dequantising and a dense product, or for each shape what is the fastest here."""


def install(
    model: nn.Module, how: str = "auto", kept_in: Path = KEPT_IN, measured: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Give the quantised layers of a model the chosen way; says for each shape from how many rows on it is dequantised.

    `measured`: what was said before; it stays so, whatever would be measured now.
    """
    if how != "auto":
        rule = NEVER if how == "quantized" else ALWAYS
        frozen.install(model, lambda _: rule)
        return {_shape(module): rule for module in _quantized(model)}
    path = kept_in.expanduser()
    known = _read(path)
    chosen: dict[str, int] = {}
    for module in _quantized(model):
        shape = _shape(module)
        if shape not in chosen:
            rows = (measured or {}).get(shape) or known.get(_place(shape))
            chosen[shape] = rows or dense_from(partial(_once, module), _rows_to_try(module))
    fresh = {_place(shape): rows for shape, rows in chosen.items() if _place(shape) not in known}
    if fresh and not measured:
        _write(path, _read(path) | fresh)
    frozen.install(model, lambda module: chosen[_shape(module)])
    return chosen


def dense_from(once: Callable[[bool, int], None], rows_to_try: Sequence[int]) -> int:
    """From how many rows on dequantising is faster. `once(dense, rows)` does the work of one case.

    A single case in which the kernel wins takes back what cases with fewer rows said.
    """
    first, dense, quantized = NEVER, 0.0, 0.0
    for rows in rows_to_try:
        dense, quantized = _seconds(partial(once, True, rows)), _seconds(partial(once, False, rows))
        if dense >= quantized:
            first = NEVER
        elif first == NEVER:
            first = rows
        if quantized > _CLEAR * dense:
            break
    if first == NEVER:  # the kernel's time grows with the rows; that of dequantising hardly does
        untried = (rows for rows in _ROWS if rows > rows_to_try[-1])
        first = next((rows for rows in untried if quantized * rows / rows_to_try[-1] > _CLEAR * dense), NEVER)
    return first


def _seconds(work: Callable[[], None]) -> float:
    work()  # the first time may compile or allocate
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def _once(module: Any, dense: bool, rows: int) -> None:
    """Forward and backward."""
    kind = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    arrays = module["weight"], module["scales"], module.get("biases")
    dtype = module["scales"].dtype if mx.issubdtype(module["scales"].dtype, mx.floating) else mx.bfloat16
    x = mx.ones((rows, module["weight"].shape[-1] * 32 // module.bits), backend.compute_dtype(dtype))
    way = frozen.dequantized_matmul if dense else frozen.kernel_matmul
    mx.eval(mx.value_and_grad(lambda x: way(x, *arrays, **kind).sum())(x))


def _rows_to_try(module: Any) -> list[int]:
    each = 4.0 * module["weight"].size * 32 / module.bits
    return [rows for rows in _ROWS if rows * each <= _PRODUCTS] or [_ROWS[0]]


def _quantized(model: nn.Module) -> list[Any]:
    return [module for _, module in model.named_modules() if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)]


def _shape(module: Any) -> str:
    outputs, packed = module["weight"].shape
    return f"{outputs}x{packed * 32 // module.bits} {module.mode} {module.bits}-bit/{module.group_size}"


def _place(shape: str) -> str:
    """The key of a shape in the file: what was measured holds for this machine, BLAS and MLX."""
    return f"{backend.describe()} | {os.cpu_count()} cores | mlx {version('mlx')} | {shape}"


def _read(path: Path) -> dict[str, int]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            return {}
        return {str(key): rows for key, rows in found.items() if isinstance(rows, int) and rows > 0}
    return {}


def _write(path: Path, found: dict[str, int]) -> None:
    """A file that can't be written costs a measurement the next time, and nothing else."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
        aside.replace(path)
