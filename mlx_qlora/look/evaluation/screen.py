"""An evaluation as a person reads it in a terminal."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from mlx_qlora.look.evaluation import enough
from mlx_qlora.look.evaluation.bootstrap import FEW, Estimate
from mlx_qlora.look.evaluation.compared import BASE, TUNED
from mlx_qlora.look.evaluation.labels import OTHER
from mlx_qlora.look.evaluation.results import Evaluation, Prediction, loss_bounds, loss_difference, perplexity_json
from mlx_qlora.look.gap import SURE
from mlx_qlora.look.measure import Measured

_WIDEST = 110  # further than that, eyes lose the line


def told(found: Evaluation) -> Iterator[str]:
    """The lines."""
    yield ""
    yield from _text(found) if found.text else _losses(found)
    if found.scores:
        yield ""
        yield from _scores(found)
        yield from _without(found)
    for each in (_chains, _tasks, _classes, _harness, _worst, _notes):
        lines = list(each(found))
        if lines:
            yield ""
            yield from lines


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _losses(found: Evaluation) -> Iterator[str]:
    examples = f"on {_counted(len(found.loss.totals), 'example')}"
    if found.base_loss is None:
        yield f"{examples:<23}{'loss':>17}   {'perplexity':>10}"
        yield f"{found.title:<23}{_loss(found.loss)}"
        return
    difference = loss_difference(found.loss, found.base_loss)
    yield f"{examples:<23}{'loss':>17}   {'perplexity':>10}"
    yield f"{'base model':<23}{_loss(found.base_loss)}"
    yield f"{'fine-tuned':<23}{_loss(found.loss)}"
    _, low, high = loss_bounds(difference)
    noise = "   within noise" if low <= 0 <= high else ""
    yield f"{'difference':<23}{difference.mean:>+8.4f}{_error(difference)}{noise}"


def _text(found: Evaluation) -> Iterator[str]:
    """A line a measure: the model, or base, fine-tuned, and how far they are apart."""
    assert found.text is not None, "it is of raw text"
    models = [each for each in (found.base_loss, found.loss) if each is not None]
    heads = ["base model", "fine-tuned", "difference"] if found.compares else ["fine-tuned" if found.adapters else "model"]
    yield _columns(f"on {_counted(found.text['documents'], 'document')}", heads)
    yield _measured("loss, nats a token", models)
    perplexities = [perplexity_json(each) for each in models]
    yield _columns("perplexity", [_short(each["value"]) for each in perplexities])
    if all(math.isfinite(each["low"]) for each in perplexities):
        yield _columns("  95 % interval", [f"{_short(each['low'])} to {_short(each['high'])}" for each in perplexities])
    for name, of in found.of_tokens.items():
        yield _measured(_TITLES[name], [of[which] for which in (BASE, TUNED) if which in of])


_TITLES = {"bits_per_byte": "bits per byte", "next_token_accuracy": "next-token accuracy"}


def _columns(title: str, cells: list[str]) -> str:
    return (f"{title:<21}" + "".join(f"  {cell:<18}" for cell in cells)).rstrip()


def _measured(title: str, models: list[Measured]) -> str:
    cells, noise = [f"{each.mean:.4f}{_error(each).rstrip()}" for each in models], ""
    if len(models) == 2:
        difference = loss_difference(models[1], models[0])
        _, low, high = loss_bounds(difference)
        cells.append(f"{difference.mean:+.4f}{_error(difference).rstrip()}")
        noise = "  within noise" if low <= 0 <= high else ""
    return _columns(title, cells) + noise


def _loss(loss: Measured) -> str:
    return f"{loss.mean:>8.4f}{_error(loss)}   {_short(perplexity_json(loss)['value']):>10}"


def _error(loss: Measured) -> str:
    return f" ± {SURE * loss.error:.4f}" if math.isfinite(loss.error) else " " * 9


def _short(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.1e}"


def _scores(found: Evaluation) -> Iterator[str]:
    questions = f"to {_counted(len(found.predictions), 'question')}"
    width = max(18, *(len(score.title) for score in found.scores.values()))
    if not found.compares:
        yield f"{questions:<{width}} {'n':>6} {found.title:>10}   95 % interval"
        for score in found.scores.values():
            one = score.tuned
            yield f"{score.title:<{width}} {one.n:>6,} {_value(one.value):>10}   {_interval(one.low, one.high)}"
        return
    yield f"{questions:<{width}} {'base':>7} {'fine-tuned':>10} {'difference':>10}  95 % interval"
    for score in found.scores.values():
        base, difference = score.base, score.difference
        assert base is not None, "a base model was asked"
        assert difference is not None, "a base model was asked"
        title = score.title if score.tuned.n == len(found.predictions) else f"{score.title} (n {score.tuned.n:,})"
        noise = " within noise" if score.within_noise else ""
        yield (
            f"{title:<{width}} {_value(base.value):>7} {_value(score.tuned.value):>10} "
            f"{_value(difference.value, '+'):>10}  {_interval(difference.low, difference.high, '+')}{noise}"
        ).rstrip()


def _without(found: Evaluation) -> Iterator[str]:
    """How many answers had nothing in them that could be right."""
    counts = {which: found.without_final(which) for which in found.models}
    if not found.finals.scores or not any(count for count, _ in counts.values()):
        return
    names = {TUNED: found.title, BASE: "base"}
    said = [f"{names[which]} {count:,} of {whole:,}" for which, (count, whole) in reversed(counts.items())]
    said = said if found.compares else [said[0].removeprefix(f"{found.title} ")]
    kinds = {kind for _, kind in found.finals.kinds}
    what = min(kinds) if len(kinds) == 1 and kinds != {"text"} else "final answer"
    yield f"no {what} found: {', '.join(said)}; these count as wrong"


def _chains(found: Evaluation) -> Iterator[str]:
    """How often a model is right after its own rationales and after those of the data, and how good its own are."""
    if not found.chains:
        return
    names = {TUNED: found.title, BASE: "base model"}
    rows = [(names[which], each) for which, each in reversed(found.chains.items())]
    count = rows[0][1].token_f1.n
    yield f"{found.scores[found.headline].title} of {_counted(count, 'answer')} after a rationale, with 95 % intervals"
    yield f"{'written by':<14}  {'the model':<18}  {'the data':<18}  difference"
    for name, each in rows:
        yield f"{name:<14}  {_sure(each.own):<18}  {_sure(each.given):<18}  {_sure(each.carried, '+')}"
    yield f"{'rationales':<14}  {'token F1':<18}  {'exact match':<18}  never ended  empty"
    for name, each in rows:
        cut, empty = f"{each.unended:,} of {count:,}", f"{each.empty:,}"
        yield f"{name:<14}  {_sure(each.token_f1):<18}  {_sure(each.exact_match):<18}  {cut:>11}  {empty:>5}"
    carried = found.chains[TUNED].carried
    between = f", 95 % {100 * carried.low:.1f} to {100 * carried.high:.1f}" if math.isfinite(carried.low) else ""
    noise = "; within noise" if between and carried.low <= 0 <= carried.high else ""
    yield f"carried over from rationales: {100 * carried.value:.1f} points{between}{noise}"


_NAMES = 24  # letters of a task's name, and more where there is place


def _tasks(found: Evaluation) -> Iterator[str]:
    """The headline of each task, with the mean over tasks and what is over all questions."""
    if found.of_tasks is None:
        return
    spare = max(0, min(_WIDEST, shutil.get_terminal_size().columns) - 80)
    headline = found.scores[found.headline]
    rows = {**found.of_tasks.each, "mean over tasks": found.of_tasks.mean, "all questions": headline}
    width = min(max(map(len, (*rows, headline.title))), _NAMES + spare)
    heads = f"{'base':>6}  {'fine-tuned, 95 %':<18}  difference, 95 %" if found.compares else f"{found.title}, 95 %"
    yield f"{headline.title:<{width}} {'n':>5} {heads}"
    for name, score in rows.items():
        short = name if len(name) <= width else name[: width - 1] + "…"
        n = "" if score is found.of_tasks.mean else f"{score.tuned.n:,}"
        base = f"{_value(score.base.value):>6}  " if score.base else ""
        between = f"{_sure(score.difference, '+')}" if score.difference else ""
        yield f"{short:<{width}} {n:>5} {base}{_sure(score.tuned):<18}  {between}".rstrip()


def _sure(one: Estimate, sign: str = "") -> str:
    """A value with its interval in two digits."""
    between = f" {one.low:{sign}.2f} to {one.high:{sign}.2f}" if math.isfinite(one.low) else ""
    return f"{_value(one.value, sign)}{between}"


def _value(value: float, sign: str = "") -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.4g}"


def _interval(low: float, high: float, sign: str = "") -> str:
    return f"{_value(low, sign)} to {_value(high, sign)}" if math.isfinite(low) else "-"


def _classes(found: Evaluation) -> Iterator[str]:
    if not found.labels:
        return
    classes = found.classified(TUNED).classes
    base = found.classified(BASE).classes if found.compares else {}
    width = max(22, *(len(label) for label in classes))
    yield f"{'class':<{width}} precision  recall      F1  support{'   F1 of base' if base else ''}"
    for label, one in classes.items():
        beside = f"   {base[label].f1:>10.3f}" if base else ""
        yield f"{label:<{width}} {one.precision:>9.3f} {one.recall:>7.3f} {one.f1:>7.3f} {one.support:>8,}{beside}"
    if strange := int(found.classified(TUNED).confusion[:, -1].sum()):
        yield f"{OTHER:<{width}} {strange:,} answers were no known label, and count as wrong"


def _harness(found: Evaluation) -> Iterator[str]:
    if not found.harness:
        return
    base: dict[str, Any] = found.harness.get(BASE, {})
    yield f"{'lm-evaluation-harness':<40} {'base':>8} {found.title:>10}"
    for task, values in found.harness[TUNED].items():
        for name, value in values.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float):
                continue
            other = base.get(task, {}).get(name, math.nan)
            error = values.get(f"{metric}_stderr,{filtered}")
            known = f" ± {SURE * error:.3f}" if isinstance(error, float) and math.isfinite(error) else ""
            title = f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})")
            yield f"{title:<40} {_value(other):>8} {_value(value):>10}{known}"


def _worst(found: Evaluation) -> Iterator[str]:
    if not found.worst:
        return
    yield "the worst answers" if len(found.worst) > 1 else "the worst answer"
    for one in found.worst:
        yield ""
        yield from _shown(one)


def _shown(one: Prediction) -> Iterator[str]:
    width = min(_WIDEST, max(40, shutil.get_terminal_size().columns)) - 1
    yield f"  {one.id}"
    lines = [("question", one.question), ("expected", one.expected), ("got", one.answer)]
    if thought := one.thoughts.get(TUNED):
        lines[1:1], lines[-1:-1] = [("rationale", one.rationale or "")], [("thought", thought.rationale)]
    for name, text in lines if one.base is None else [*lines, ("base", one.base)]:
        short = textwrap.shorten(" ".join(text.split()), 3 * (width - 12), placeholder=" ...") or "(nothing)"
        yield from textwrap.wrap(short, width, initial_indent=f"  {name:<9} ", subsequent_indent=" " * 12)


def _notes(found: Evaluation) -> Iterator[str]:
    notes = list(found.notes)
    if 0 < len(found.predictions) < FEW:
        notes.append(f"fewer than {FEW} questions: intervals of so few are narrower than they should be")
    if any(math.isnan(each.low) for score in found.scores.values() for each in score.columns().values() if each.n > 1):
        notes.append("where every question scored the same there is no interval: drawn again they tell nothing of others")
    notes += _enough(found)
    if found.text:
        notes += _notes_of_text(found, found.text)
    elif not found.predictions and found.settings.get("questions") != 0:
        notes.append("none of the rows is a question with an answer, so there is nothing to score but the loss")
    width = min(_WIDEST, max(40, shutil.get_terminal_size().columns)) - 1
    for note in notes:
        yield from textwrap.wrap(note, width, initial_indent="note      ", subsequent_indent=" " * 10)


def _enough(found: Evaluation) -> Iterator[str]:
    """Whether there are questions enough to tell models apart."""
    if not found.predictions:
        return
    score = found.scores[found.headline]
    yield enough.told(len(found.predictions), found.likely_accuracy, score.title)
    difference, discordance = score.difference, found.discordance
    if difference and discordance and score.within_noise and difference.value:
        yield enough.told_of_two(difference.value, found.likely_accuracy, discordance, score.title)


def _notes_of_text(found: Evaluation, text: dict[str, Any]) -> Iterator[str]:
    if text["intervals_by"] == "window":
        of = _counted(text["documents"], "document")
        yield f"{of}: intervals are by window, and say how sure this is of such text as that, and little of other texts"
    if text["bytes"] is None:
        yield "no bits per byte: not all of the text is trained, or its tokens do not weigh the same"
