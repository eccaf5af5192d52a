"""The files that say what an evaluation found: evaluation_report.json, evaluation_summary.csv, predictions.jsonl,
evaluation_losses.jsonl."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_qlora.look.evaluation.bootstrap import share
from mlx_qlora.look.evaluation.compared import BASE, DIFFERENCE, TUNED, Compared
from mlx_qlora.look.evaluation.results import Evaluation, loss_bounds, loss_difference, perplexity_json
from mlx_qlora.run.disk import write_atomically, write_json, write_lines

REPORT, SUMMARY, PREDICTIONS = "evaluation_report.json", "evaluation_summary.csv", "predictions.jsonl"
LOSSES = "evaluation_losses.jsonl"


def write(found: Evaluation, folder: Path) -> list[Path]:
    """The files, each whole; the report comes last, so that one that is there has the others beside it."""
    write_lines(folder / PREDICTIONS, [each.to_json() for each in found.predictions])
    write_lines(folder / LOSSES, _of_each_example(found))
    write_atomically(folder / SUMMARY, _table(found))
    write_json(folder / REPORT, found.to_json())
    return [folder / name for name in (REPORT, SUMMARY, PREDICTIONS, LOSSES)]


def _of_each_example(found: Evaluation) -> list[dict[str, Any]]:
    """Its loss, in nats a token: another run's on the same examples can be compared one by one."""
    losses = {"loss": found.loss} | ({"base_loss": found.base_loss} if found.base_loss else {})
    if any(len(each.totals) != len(found.examples) for each in losses.values()):
        return []
    return [
        {"id": id, "digest": digest, "weight": weight}
        | {name: float(each.totals[number]) / weight for name, each in losses.items()}
        for number, ((id, digest), weight) in enumerate(zip(found.examples, found.loss.weights.tolist(), strict=True))
        if weight
    ]


def _table(found: Evaluation) -> str:
    """A line per score and model; where there are tasks, with a column for these."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    names = ("score", "model", "value", "low", "high", "n", *(["task"] if found.of_tasks else []))
    writer.writerow(names)
    own = TUNED if found.title == "fine-tuned" else "model"
    for score, which, values, n, task in (*_of_losses(found), *_of_scores(found)):
        line = (score, own if which == TUNED else which, *map(_plain, values), n, task)
        writer.writerow(line[: len(names)])
    return written.getvalue()


# (score, model, (value, low, high), n, task)
Line = tuple[str, str, tuple[float, float, float], int, str]


def _of_losses(found: Evaluation) -> Iterator[Line]:
    losses = {TUNED: found.loss}
    if found.base_loss:
        losses |= {BASE: found.base_loss, DIFFERENCE: loss_difference(found.loss, found.base_loss)}
    for which, loss in losses.items():
        yield "loss", which, loss_bounds(loss), len(loss.totals), ""
    for which, loss in losses.items():
        if which != DIFFERENCE:
            value, low, high = perplexity_json(loss).values()
            yield "perplexity", which, (value, low, high), len(loss.totals), ""
    for name, of in found.of_tokens.items():
        rows = of | ({DIFFERENCE: loss_difference(of[TUNED], of[BASE])} if BASE in of else {})
        for which, one in rows.items():
            yield name, which, loss_bounds(one), len(one.totals), ""


def _of_scores(found: Evaluation) -> Iterator[Line]:
    def lines(name: str, score: Compared, task: str = "") -> Iterator[Line]:
        for which, each in score.columns().items():
            yield name, which, (each.value, each.low, each.high), each.n, task

    for name, score in found.scores.items():
        yield from lines(name, score)
    if found.finals.scores:
        for which in found.models:
            one = share(*found.without_final(which))
            yield "without_final_answer", which, (one.value, one.low, one.high), one.n, ""
    for which, each in found.chains.items():
        cut, empty = (share(count, each.token_f1.n) for count in (each.unended, each.empty))
        for name, one in (
            (f"{found.headline}_after_given_rationale", each.given), ("carried_over", each.carried),
            ("rationale_token_f1", each.token_f1), ("rationale_exact_match", each.exact_match),
            ("rationale_never_ended", cut), ("rationale_empty", empty),
        ):  # fmt: skip
            yield name, which, (one.value, one.low, one.high), one.n, ""
    if found.of_tasks:
        for task, score in found.of_tasks.each.items():
            yield from lines(found.headline, score, task)
        yield from lines(f"{found.headline}_mean_over_tasks", found.of_tasks.mean)


def _plain(value: float) -> str:
    """An empty field where there is no number."""
    return repr(value) if math.isfinite(value) else ""
