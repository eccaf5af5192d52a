"""The card of a generated data set: a page beside it that says who wrote it, and how."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_qlora.distilling.answers import NAME
from mlx_qlora.distilling.dataset import Generated
from mlx_qlora.distilling.filters import REASONS

_LICENCE = """## Licence

The licence of the teacher may restrict what its answers may be used for, above all the training of other models. So may the
licence of the prompts. Read both before you train on this or pass it on."""


def card(found: Generated) -> str:
    """As Markdown, with the head that hubs read."""
    head = "---\ntags:\n- synthetic\n- distillation\n- mlx-qlora\n---"
    own = found.versions
    made = f"Made with mlx-qlora {own['mlx-qlora']} (mlx-lm {own['mlx-lm']}, mlx {own['mlx']}) on {time.strftime('%Y-%m-%d')}."
    title = f"# Answers of {_name(found.teacher)}"
    parts = [head, title, _told(found), _counts(found), _files(found), _example(found), _LICENCE, made]
    return "\n\n".join(part for part in parts if part) + "\n"


def _told(found: Generated) -> str:
    own = found.settings
    adapters = f" with the adapters {_name(own['adapters'])}" if own["adapters"] else ""
    drawn = "each token the likeliest one"
    if own["temperature"]:
        drawn = f"drawn with temperature {own['temperature']:g}, top-p {own['top_p']:g}, seed {own['seed']}"
    sentences = [
        f"Written by a language model, not by people: {_name(found.teacher)}{adapters} answered {found.prompts:,} prompts "
        f"({own['split']} of {_names(own['data'])}), {own['answers']:,} to each, {drawn}, at most "
        f"{own['max_answer_tokens']:,} tokens long.",
        f"Of {len(found.verdicts):,} answers {len(found.kept):,} were kept; {found.unanswered:,} prompts have none.",
        *_system(own),
        *_checks(own),
    ]
    return "\n".join(sentences)


def _system(own: Mapping[str, Any]) -> list[str]:
    if not own["system"]:
        return []
    where = "" if own["system_in_data"] else ", which the rows do not hold"
    return [f"A system message came first{where}: {_cut(' '.join(own['system'].split()), 300)}"]


def _checks(own: Mapping[str, Any]) -> list[str]:
    told = [
        f"at least {own['min_answer_tokens']} tokens" if own["min_answer_tokens"] > 1 else "",
        f"the pattern `{own['check_pattern']}`" if own["check_pattern"] else "",
        "the last number of the answer in the data as its last number" if own["check_number"] else "",
        f"the approval of `{own['check']}`" if own["check"] else "",
    ]
    asked = [each for each in told if each]
    first = ["The first such answer to a prompt is kept."] if own["keep"] == "first" else []
    return ([f"A kept answer has an end of its own, and {', '.join(asked)}."] if asked else []) + first


def _counts(found: Generated) -> str:
    rows = [("kept", len(found.kept)), *((REASONS[reason], count) for reason, count in found.reasons.items())]
    return "\n".join(["| answers | |", "|---|---:|", *(f"| {name} | {count:,} |" for name, count in rows)])


def _files(found: Generated) -> str:
    train, valid = len(found.rows(False)), len(found.rows(True))
    rows = {
        "train.jsonl": f"{train:,} rows" if train else "",
        "valid.jsonl": f"{valid:,} rows, of prompts of which train.jsonl has none" if valid else "",
        "rejected.jsonl": "the answers that were left out, each with its reason" if found.left_out else "",
        NAME: "every answer as it came: the same command with other filters asks nobody again",
        "generation.json": "all settings, the teacher's fingerprint, counts, versions",
    }
    return "\n".join(["| file | |", "|---|---|", *(f"| `{name}` | {what} |" for name, what in rows.items() if what)])


def _example(found: Generated) -> str:
    if not found.kept:
        return ""
    one = found.kept[0]
    text = f"{_cut(one.prompt.text, 800)}\n\n>>> {_cut(one.answer.text, 800)}"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any in the texts
    return f"## An example\n\n{fence}text\n{text}\n{fence}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + " [...]"


def _name(path: str) -> str:
    """A model or data set by its name: where it lies on somebody's disk is nobody's business."""
    return path if path.count("/") == 1 and not path.startswith((".", "/", "~")) else Path(path).name or path


def _names(data: str | Sequence[str]) -> str:
    return ", ".join(map(_name, [data] if isinstance(data, str) else data))
