"""What an evaluation says of final answers: by task, and after which rationale. Files may hold anything; what is not
understood is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlx_qlora.look.evaluation.scores import title
from mlx_qlora.look.pages.page import figure, safe, table

Cell = Callable[[Any], str]


def finals(found: Mapping[str, Any], interval: Cell, difference: Cell) -> Iterator[str]:
    """Tables of a report; `interval` and `difference` write an estimate into a cell."""
    final = _mapping(found.get("final"))
    without = _mapping(final.get("without"))
    counts = [(name, _mapping(without.get(which))) for which, name in _MODELS.items()]
    if said := [f"{name} {figure(each.get('answers'), ',')} of {figure(each.get('of'), ',')}" for name, each in counts if each]:
        yield f"<p>Answers without a {safe(title(str(final.get('score'))))}, which count as wrong: {', '.join(said)}.</p>"
    yield from _chains(_mapping(found.get("chains")), interval, difference)
    tasks = dict(_mapping(found.get("tasks")))
    if tasks:
        each = {name: _mapping(task) for name, task in (tasks | {"mean over tasks": found.get("mean_over_tasks")}).items()}
        rows = [
            [safe(name), interval(task.get("base")), interval(task.get("tuned")), difference(task.get("difference"))]
            for name, task in each.items()
        ]
        yield "<h3>By task</h3>"
        yield table(("", "base model", "fine-tuned", "difference"), rows)


_MODELS = {"base": "base model", "tuned": "fine-tuned"}


def _chains(chains: Mapping[str, Any], interval: Cell, difference: Cell) -> Iterator[str]:
    rows = []
    for which, name in _MODELS.items():
        if each := _mapping(chains.get(which)):
            cells = [interval(each.get(of)) for of in ("after_own_rationale", "after_given_rationale")]
            cells += [difference(each.get("carried_over")), interval(each.get("rationale_token_f1"))]
            rows.append([name, *cells, *(figure(each.get(of), ",") for of in ("rationales_never_ended", "rationales_empty"))])
    if rows:
        yield "<h3>Answers after a rationale</h3>"
        heads = ("of the model", "of the data", "carried over", "token F1 of rationales", "never ended", "empty")
        yield table(("", *heads), rows)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
