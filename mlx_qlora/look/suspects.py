"""The examples of an update that went wrong, for a person to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_qlora.records import Example, StepReport

MOST = 100  # files of a run
_LONGEST = 20_000  # characters of a text


def suspects(report: StepReport, why: str, decode: Callable[[Any], str], loss_of: Callable[[Example], float]) -> dict[str, Any]:
    """What the update was, and each of its examples with its own loss, the largest and those that are not finite first."""
    examples = [(example, loss_of(example)) for example in report.update.examples]
    examples.sort(key=lambda pair: pair[1] if pair[1] == pair[1] else float("inf"), reverse=True)
    return {
        "step": report.step,
        "why": why,
        "loss": str(report.loss),
        "grad_norm": str(report.grad_norm),
        "learning_rate": report.learning_rate,
        "examples": [
            {
                "id": example.id,
                "loss": str(loss),
                "tokens": len(example.tokens),
                "supervised_tokens": int((example.weights > 0).sum()),
                "text": decode(example.tokens.tolist())[:_LONGEST],
                "trained": decode(example.wanted[example.weights > 0].tolist())[:_LONGEST],
            }
            for example, loss in examples
        ],
    }
