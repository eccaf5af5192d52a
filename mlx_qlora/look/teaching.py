"""Distillation in words: what is known to go wrong, before it does, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_CALM = {"temperature": 2.0, "alpha": 0.5, "logit_clip": 50.0, "clip_grad_norm": 0.5, "min_supervised_per_update": 8}
_WARM, _MUCH, _FAR = 3.0, 0.6, 60.0  # from here on


def doubts(settings: Mapping[str, Any]) -> list[str]:
    """Settings, by dotted names, with which runs went non-finite, each with what calmed them."""
    warmest, most = max(settings["distill.temperature"]), max(settings["distill.alpha"])
    clip, norm, least = (settings[name] for name in ("distill.logit_clip", "clip_grad_norm", "min_supervised_per_update"))
    found = {
        f"distill.temperature up to {warmest:g}, which counts the divergence {warmest**2:g} times": warmest > _WARM
        and f"{_CALM['temperature']:g}",
        f"distill.alpha up to {most:g}": most > _MUCH and f"{_CALM['alpha']:g}",
        f"distill.logit_clip {clip:g}": not 0 < clip <= _FAR and f"{_CALM['logit_clip']:g}",
        f"clip_grad_norm {norm:g}": not 0 < norm < 1 and f"{_CALM['clip_grad_norm']:g}",
        f"min_supervised_per_update {least}": least < _CALM["min_supervised_per_update"]
        and f"{_CALM['min_supervised_per_update']}",
    }
    doubtful = [f"{what} (try {better})" for what, better in found.items() if better]
    return [f"WARNING: distillations with these went non-finite: {'; '.join(doubtful)}"] if doubtful else []


def nobody(settings: Mapping[str, Any]) -> list[str]:
    """That a distillation has no teacher and no chain: cross-entropy alone may be what is wanted, and may not."""
    if settings["distill.teacher"] or settings["distill.cache"] or settings["chain.kind"] != "off":
        return []
    return ["WARNING: nobody teaches here: this is mlx-qlora train with calmer settings. --distill.teacher MODEL names one"]


def outcome(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a run's metrics say of its teacher: sums over places, so updates count by their tokens. The first and the last
    tenth of the updates stand for the beginning and the end."""
    told = [line for line in lines if "kd" in line and _finite(line)]
    few = max(1, len(told) // 10)
    parts = {"first": told[:few], "last": told[-few:]}
    found = {f"{name}_{part}": _mean(some, name) for part, some in parts.items() for name in ("kd", "ce")}
    return found | {"clipped": _mean(told, "clipped")}


def closing(found: Mapping[str, float], clip: float, skipped: int, updates: int) -> list[str]:
    """The same for a person."""
    said = [
        f"divergence {found['kd_first']:.4f} -> {found['kd_last']:.4f}, cross-entropy "
        f"{found['ce_first']:.4f} -> {found['ce_last']:.4f}, from the first to the last tenth of the updates"
    ]
    if found["clipped"]:
        said.append(f"logits beyond {clip:g} were clipped at {100 * found['clipped']:.2g}% of the places")
    if skipped:
        said.append(f"{skipped:,} of {updates:,} updates were not finite and changed nothing; bad_updates/ says which")
    return said


def _finite(line: Mapping[str, Any]) -> bool:
    return not any(isinstance(line[name], str) for name in ("kd", "ce", "clipped"))  # JSON has no NaN: it is a text there


def _mean(lines: Iterable[Mapping[str, Any]], name: str) -> float:
    weight = total = 0.0
    for line in lines:
        weight += line["supervised_tokens"]
        total += line["supervised_tokens"] * line[name]
    return total / weight if weight else 0.0
