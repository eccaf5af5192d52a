"""Rows out of a race, as a table for people and as JSON for programs."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from mlx_qlora.bench.data import Field
from mlx_qlora.bench.race import Lane, Outcome
from mlx_qlora.bench.settings import NEIGHBOURS, RaceConfig

Row = dict[str, Any]


def rows(outcome: Outcome, ground: Field) -> list[Row]:
    """One row a contestant.

    `speedup` is the reference's seconds through the contestant's own (above 1: faster), `memory_ratio` the contestant's
    peak of memory through the reference's (below 1: less). `floor_ratio`, of ours, is its time through that of the bare
    multiplications. Times are compared repeat by repeat, because each repeat has updates of its own, the same for
    everybody; the median of these ratios counts. The reference is mlx-lm, or the first other trainer if that is not
    there, or we.
    """
    found = [_row(lane, ground) for lane in outcome.lanes]
    reference = _reference(found)
    floor = _row(outcome.floor, ground) if outcome.floor else None
    for row in found:
        row["reference"] = row is reference
        row["speedup"] = _by_repeat(reference, row)
        row["memory_ratio"] = _ratio(row, reference, "peak_memory_gb")
        row["floor_ratio"] = _by_repeat(row, floor) if row["kind"] == "mlx-qlora" else None
    return found + ([floor] if floor else [])


def _by_repeat(above: Row | None, below: Row | None) -> float | None:
    if above is None or below is None or above["failed"] or below["failed"]:
        return None
    pairs = zip(above["seconds_per_update_of_each_repeat"], below["seconds_per_update_of_each_repeat"], strict=False)
    ratios = [a / b for a, b in pairs if b]
    return statistics.median(ratios) if ratios else None


def _row(lane: Lane, ground: Field) -> Row:
    """All figures are of the repeats, without the warm-up, but for load_s, first_update_s and peak_memory_gb."""
    blocks = [block for block in lane.blocks if block]
    row: Row = {
        "contestant": lane.contestant.label,
        "kind": lane.contestant.kind,
        "overrides": lane.contestant.overrides,
        "failed": lane.failed or None,
        "load_s": lane.load_s or None,
        "first_update_s": lane.load_s + lane.warmup[0]["seconds"] if lane.warmup else None,
        "peak_memory_gb": lane.peak_gb or None,
        "loss": lane.loss,
        "blas": lane.blas or None,
        "updates": len(lane.updates),
    }
    if not blocks or lane.failed:
        return row
    timed = [update for block in blocks for update in block]
    seconds = [sum(update["seconds"] for update in block) / len(block) for block in blocks]
    skipped = len(lane.warmup)
    ours = ground.supervised[skipped : skipped + len(timed)]
    supervised = sum(ours)
    return row | {
        "seconds_per_update": statistics.median(seconds),
        "seconds_per_update_min": min(seconds),
        "seconds_per_update_max": max(seconds),
        "seconds_per_update_of_each_repeat": seconds,
        "supervised_tokens_per_second": statistics.median(_speeds(blocks, ours)),
        "supervised_tokens": supervised,
        "supervised_tokens_counted": sum(update["supervised"] for update in timed),
        "same_examples": [update["supervised"] for update in timed] == list(ours),  # in every update, as far as counts tell
        "positions": sum(update["positions"] for update in timed),
        "positions_per_supervised_token": sum(update["positions"] for update in timed) / supervised,
        "training_losses": [update["loss"] for update in lane.updates],
    }


def _speeds(blocks: list[list[Row]], supervised: tuple[int, ...]) -> list[float]:
    """Supervised tokens a second in each repeat, by one definition for everybody: what the examples hold."""
    speeds, place = [], 0
    for block in blocks:
        speeds.append(sum(supervised[place : place + len(block)]) / sum(update["seconds"] for update in block))
        place += len(block)
    return speeds


def _reference(found: list[Row]) -> Row:
    alive = [row for row in found if not row["failed"]] or found
    for kinds in (("mlx-lm",), tuple(NEIGHBOURS), ("flat",)):
        if others := [row for row in alive if row["kind"] in kinds]:
            return others[0]
    return alive[0]


def _ratio(above: Row | None, below: Row | None, name: str) -> float | None:
    if above is None or below is None or not above.get(name) or not below.get(name) or above["failed"] or below["failed"]:
        return None
    return float(above[name] / below[name])


def to_json(config: RaceConfig, outcome: Outcome, found: list[Row], ground: Field) -> dict[str, Any]:
    whole = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": asdict(config) | {"all_updates": config.all_updates},
        "model": {name: outcome.beginning[name] for name in ("parameters", "trainable", "layers")},
        "data": {"tokens": ground.tokens, "supervised_tokens": sum(ground.supervised)},
        "loss_before": outcome.beginning["loss"],
        "rows": found,
    }
    return cast(dict[str, Any], _finite(whole))


def _finite(value: Any) -> Any:
    """JSON has no word for NaN: null stands for a number that is none."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, Any]:
    import mlx.core as mx

    gpu = mx.default_device().type == mx.DeviceType.gpu
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "cpu": _cpu(),
        "cores": cores,
        "gpu": str(mx.device_info().get("device_name", "GPU")) if gpu else None,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
    }


def _cpu() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.processor()
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("mlx-qlora", "mlx", *NEIGHBOURS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def header(config: RaceConfig, model: str, ground: Field) -> list[str]:
    """What is raced, on what."""
    on = machine()
    where = on["gpu"] or f"{on['cpu']}, {on['cores']} cores"
    accumulated = f" x {config.gradient_accumulation}" if config.gradient_accumulation > 1 else ""
    layers = f"last {config.lora_layers} layers" if config.lora_layers else "all layers"
    lines = [
        f"machine   {where}; " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"model     {model}",
        f"data      {config.data}: {config.all_updates} updates of {config.batch_size}{accumulated} examples, "
        f"{ground.tokens:,} tokens, {sum(ground.supervised):,} of them trained",
        f"adapters  rank {config.rank} on all linear layers, {layers}",
    ]
    if on["gpu"] is None:
        lines.append("dtype     float32 for everybody: MLX computes bf16 on the CPU some 30 times slower")
    return lines


_COLUMNS = ("", "s/update", "from-to", "trained tok/s", "pos/token", "first s", "peak GB", "loss")


def table(config: RaceConfig, found: list[Row], loss_before: float) -> list[str]:
    """The rows for a terminal, and what they amount to."""
    cells = [_COLUMNS, *(_cells(row) for row in found if not row["failed"])]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in pairs)
        for pairs in (enumerate(zip(line, widths, strict=True)) for line in cells)
    ]
    lines += [f"{row['contestant']}: out of the race: {row['failed']}" for row in found if row["failed"]]
    lines += [
        "",
        f"{config.repeats} repeats of {config.updates} updates, by turns: median, smallest and largest. pos/token: computed "
        "positions for each",
        "trained token. first: from the start of the process to the end of the first update. peak: MLX's memory after "
        f"loading,\nthe weights included. loss: on held-out examples after {config.all_updates} updates "
        f"({loss_before:.4f} before), judged by one referee.",
    ]
    return lines + _conclusions(found)


def _cells(row: Row) -> tuple[str, ...]:
    if row["kind"] == "floor":
        return ("floor (bare products)", *_times(row), "", "", "", "", "")
    return (
        row["contestant"],
        *_times(row),
        f"{row['supervised_tokens_per_second']:,.1f}",
        f"{row['positions_per_supervised_token']:.2f}",
        f"{row['first_update_s']:.1f}",
        f"{row['peak_memory_gb']:.2f}",
        "?" if row["loss"] is None else f"{row['loss']:.4f}",
    )


def _times(row: Row) -> tuple[str, str]:
    return f"{row['seconds_per_update']:.3f}", f"{row['seconds_per_update_min']:.3f}-{row['seconds_per_update_max']:.3f}"


def _conclusions(found: list[Row]) -> list[str]:
    lines = [""]
    reference = next((row for row in found if row.get("reference")), None)
    for row in found:
        if row["failed"] or row["kind"] != "mlx-qlora":
            continue
        if reference is not None and reference is not row and row["speedup"]:
            factor = row["speedup"]
            faster = f"{factor:.2f} times faster than" if factor >= 1 else f"{1 / factor:.2f} times slower than"
            memory = f", {row['memory_ratio']:.2f} times its memory" if row["memory_ratio"] else ""
            lines.append(f"{row['contestant']}: {faster} {reference['contestant']}{memory}")
        if row["floor_ratio"]:
            lines.append(f"{row['contestant']}: {row['floor_ratio']:.2f} times the bare multiplications")
    blas = {row["contestant"]: row["blas"] or "MLX's own" for row in found if not row["failed"] and row["kind"] != "floor"}
    if len(set(blas.values())) > 1:
        lines.append("BLAS: " + ", ".join(f"{name} {which}" for name, which in blas.items()))
    return lines + [
        f"{row['contestant']}: trained {row['supervised_tokens_counted']:,} tokens in the timed updates, by our reading of the "
        f"rows it should be {row['supervised_tokens']:,}; losses are not comparable"
        for row in found
        if not row["failed"] and row["kind"] != "floor" and not row["same_examples"]
    ]
