"""One page about a run, or about several side by side: it needs nothing but itself, and no script."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_qlora.look.console import size
from mlx_qlora.look.exposure import rough, short
from mlx_qlora.look.gap import SURE, gap_text, grade
from mlx_qlora.look.history import History, number
from mlx_qlora.look.pages import drawings, sections
from mlx_qlora.look.pages.page import document, figure, listing, safe, table
from mlx_qlora.look.pages.sections import Told, took
from mlx_qlora.look.pictures.figures import names_of

_STYLE = """
nav { font-size: .9rem; color: var(--soft); } nav a { margin-right: .9rem; white-space: nowrap; } a { color: var(--trained); }
.verdict { font-size: 1.1rem; margin: .2rem 0 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.cards div { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .7rem; }
.cards dt { color: var(--soft); font-size: .8rem; } .cards dd { margin: 0; font-size: 1.1rem; font-weight: 600; }
.cards dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
td { font-variant-numeric: tabular-nums; white-space: nowrap; vertical-align: top; } .small { font-size: .85rem; }
td:first-child { white-space: normal; overflow-wrap: break-word; max-width: 20rem; } td code { white-space: nowrap; }
.left td, .left th { text-align: left; white-space: normal; overflow-wrap: break-word; max-width: 26rem; }
.best td { font-weight: 700; } .changed td:nth-child(2) { font-weight: 700; color: var(--trained); }
code, .copy { font: .85rem/1.5 ui-monospace, monospace; } .soft { color: var(--soft); }
.copy { background: var(--code); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; margin: .4rem 0;
        white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; -webkit-user-select: all; }
.example dl { margin: 0; display: grid; grid-template-columns: 5.5rem 1fr; gap: .1rem .8rem; }
.example dt { color: var(--soft); font-size: .85rem; } .example dd { margin: 0; min-width: 0; }
.example dd pre { color: var(--ink); font: inherit; } summary { cursor: pointer; color: var(--soft); }
section.run { border-top: 3px solid var(--line); margin-top: 3rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
@media (max-width: 44rem) { table { font-size: .85rem; } th, td { padding: .2rem .4rem; }
  .example dl { grid-template-columns: 1fr; } .example dd { margin-bottom: .4rem; } }
@media print { body { max-width: none; margin: 0; font-size: 11px; } nav, summary { display: none; }
  .example, .cards div, tr { break-inside: avoid; } .scroll { overflow: visible; } }
"""


def report(runs: Sequence[Told]) -> str:
    """The whole page."""
    histories = [run.history for run in runs]
    names = names_of(histories)
    made = f'<p class="soft">made {time.strftime("%Y-%m-%d %H:%M")} by mlx-qlora report</p>'
    if len(runs) == 1:
        title = f"Run {names[0]}"
        body = [f"<h1>{safe(title)}</h1>", *_run(runs[0], ""), made]
    else:
        title = f"{len(runs)} runs: {', '.join(names)}"
        body = [f"<h1>{len(runs)} runs side by side</h1>", *_together(runs, names)]
        for place, (run, name) in enumerate(zip(runs, names, strict=True)):
            body += [f'<section class="run" id="r{place}"><h1>{safe(name)}</h1>', *_run(run, f"r{place}"), "</section>"]
        body.append(made)
    return document(title, body, drawings.STYLE + _STYLE)


def _run(run: Told, salt: str) -> Iterator[str]:
    """A run's own part. `salt` is empty where the page is about one run."""
    parts = {title: list(made(run)) for title, made in _PARTS.items()}
    parts = {title: lines for title, lines in parts.items() if lines}
    if not salt:
        links = (f'<a href="#{_anchor(title)}">{title}</a>' for title in ("Curves", *parts))
        yield f"<nav>{' '.join(links)}</nav>"
    yield f'<p class="verdict">{" ".join(safe(each) for each in verdict(run.history))}</p>'
    yield cards(run.history)
    if run.history.gap and run.history.gap.advice:
        yield "<h2>What to change</h2>" + listing(
            f"<code>{safe(each.setting)}</code> {_change(each.was, each.to)}<br><span class='soft'>{safe(each.why)}</span>"
            for each in run.history.gap.advice
        )
    yield f'<h2 id="{_anchor("Curves")}">Curves</h2>' if not salt else ""
    yield from drawings.drawings([run.history], salt or "run", brief=bool(salt))
    for title, lines in parts.items():
        yield f'<h2 id="{_anchor(title)}">{title}</h2>' if not salt else f"<h2>{title}</h2>"
        yield from lines


def _change(was: Any, to: Any) -> str:
    return safe(to) if was is None else f"{safe(was)} → <b>{safe(to)}</b>"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


# title: what stands below it; a part that has nothing to say is left out
_PARTS = {
    "Validations": sections.validations,
    "Evaluation": sections.evaluation,
    "Before and after": sections.samples,
    "Samples": sections.written,
    "Tokens seen": sections.exposure,
    "Data": sections.data,
    "Configuration": sections.configuration,
    "Using it": sections.usage,
    "How the run went": sections.course,
    "Versions and machine": sections.machine,
}


def verdict(history: History) -> Iterator[str]:
    """What became of a run, in a few sentences."""
    yield _ended(history)
    best, gap = history.best, history.gap
    if best is None or gap is None:
        yield "No validation was made, so nothing is known of new examples." if history.summary else "No validation yet."
        return
    report, epoch = best
    error = f" ± {SURE * report.val_loss_se:.3f}" if math.isfinite(report.val_loss_se) else ""
    yield (
        f"The best validation loss was {report.val_loss:.4f}{error}, at update {report.step:,} (epoch {epoch:.2f}); "
        "the weights that are kept are from there."
    )
    if math.isfinite(gap.at_best):
        sure = ", and smaller than its own error, so it may as well be none" if gap.within_error_at_best else ""
        yield f"The gap to training examples was {gap_text(gap.at_best, gap.at_best_se)} there: {gap.grade_at_best}{sure}."
    if gap.overfits_from_step is not None:
        yield f"From then on it overfits: validation rose by {gap.rise:.3f}, while training examples got better."


def _ended(history: History) -> str:
    ended, steps = str(history.summary.get("ended") or ""), f"{history.step:,}"
    planned = f" of {history.planned_steps:,}" if history.planned_steps and history.planned_steps != history.step else ""
    epoch = f", epoch {history.lines[-1]['epoch']:.2f}" if history.lines and number(history.lines[-1].get("epoch")) > 0 else ""
    how = {
        "": "This run goes on, or was cut off:",
        "finished": "The run finished:",
        "stopped early": "Early stopping ended the run, because validation no longer improved:",
        "interrupted": "The run was interrupted:",
        "not finite": "The run was ended because losses or gradients were not finite:",
        "failed": "The run failed:",
    }.get(ended, f"The run ended ({ended}):")
    time_taken = took(history)
    return f"{how} {steps}{planned} updates{epoch}{f', {time_taken}' if time_taken else ''}."


def cards(history: History) -> str:
    """The figures that one looks for first."""
    best, summary = history.best, history.summary
    found: list[tuple[str, str, str]] = [("updates", f"{history.step:,}", f"of {figure(history.planned_steps, ',')} planned")]
    if best:
        report = best[0]
        said = f"± {SURE * report.val_loss_se:.3f}, " if math.isfinite(report.val_loss_se) else ""
        found.append(("best validation loss", f"{report.val_loss:.4f}", f"{said}update {report.step:,}"))
        if report.val_loss < _READABLE:
            found.append(("perplexity there", f"{math.exp(report.val_loss):.2f}", "choices a token"))
        value, _, error = gap_text(report.gap, report.gap_se).partition(" ")
        found.append(("gap there", value, f"{error}{',' if error else ''} {grade(report.gap)}"))
    if math.isfinite(tokens := number(history.exposure.get("tokens_seen"))):
        passes = number(history.exposure.get("passes"))
        found.append(("tokens seen", rough(tokens), f"{short(passes)} passes" if math.isfinite(passes) else ""))
    told: Any = summary.get("teaching")
    if isinstance(told, dict) and math.isfinite(last := number(told.get("kd_last"))):
        found.append(("from the teacher", f"{last:.3f}", f"divergence, {figure(number(told.get('kd_first')), '.3f')} at first"))
    speed, memory = _of(history, "tokens_per_second"), _of(history, "peak_memory_gb")
    found.append(("speed", f"{figure(speed, ',.0f')} tok/s", took(history)))
    found.append(("peak memory", _memory(memory), safe(summary.get("device") or "")))
    cells = (f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in found)
    return f'<dl class="cards">{"".join(cells)}</dl>'


def _memory(gigabytes: float) -> str:
    return size(gigabytes * 1e9) if 0 <= gigabytes < math.inf else "–"


_READABLE = 10.0  # of a loss from here on the perplexity says nothing


def _of(history: History, name: str) -> float:
    """A figure of the whole run: the summary's, or while there is none what the lines say."""
    if math.isfinite(value := number(history.summary.get(name))):
        return value
    values = history.column(name)[1]
    if not values:
        return math.nan
    return max(values) if name == "peak_memory_gb" else sum(values) / len(values)


# Several runs


def _together(runs: Sequence[Told], names: Sequence[str]) -> Iterator[str]:
    histories = [run.history for run in runs]
    links = (f'<a href="#r{place}">{safe(name)}</a>' for place, name in enumerate(names))
    yield f"<nav>{' '.join(links)}</nav>"
    yield _side_by_side(histories, names)
    yield from drawings.drawings(histories, "all")
    yield "<h2>What differs in their configuration</h2>"
    yield _differences(histories, names)


def _side_by_side(histories: Sequence[History], names: Sequence[str]) -> str:
    losses = [history.best[0].val_loss if history.best else math.inf for history in histories]
    rows = []
    for place, (history, name) in enumerate(zip(histories, names, strict=True)):
        report, epoch = history.best or (None, math.nan)
        lowest = report is not None and report.val_loss == min(losses)
        error = f" ± {SURE * report.val_loss_se:.3f}" if report and math.isfinite(report.val_loss_se) else ""
        loss = f"{report.val_loss:.4f}{error}" if report else "–"
        rows.append([
            f'<a href="#r{place}">{safe(name)}</a>',
            safe(history.summary.get("ended") or "going on"),
            f"{history.step:,}",
            f"<b>{loss} ★</b>" if lowest else loss,
            f"{report.step:,} ({epoch:.2f})" if report else "–",
            f"{gap_text(report.gap, report.gap_se)}<br>{grade(report.gap)}" if report else "–",
            _seen(history),
            figure(_of(history, "tokens_per_second"), ",.0f"),
            _memory(_of(history, "peak_memory_gb")),
            took(history) or "–",
            figure(number(history.summary.get("trainable_parameters")), ",.0f"),
        ])  # fmt: skip
    heads = (
        "",
        "ended",
        "updates",
        "best validation loss",
        "at update (epoch)",
        "gap there",
        "tokens seen",
        "tok/s",
        "memory",
        "time",
        "trained parameters",
    )
    note = '<p class="soft">★ the lowest. Losses can be compared where data, template and tokenizer are the same.</p>'
    return table(heads, rows, "small") + note


def _seen(history: History) -> str:
    tokens = number(history.exposure.get("tokens_seen"))
    return rough(tokens) if math.isfinite(tokens) else "–"


def _differences(histories: Sequence[History], names: Sequence[str]) -> str:
    keys = dict.fromkeys(key for history in histories for key in history.settings if key != "output_dir")
    rows = []
    for key in keys:
        values = [sections.plain(history.settings[key]) if key in history.settings else "–" for history in histories]
        if len(set(values)) > 1:
            rows.append([f"<code>{safe(key)}</code>", *map(safe, values)])
    return table(["", *map(safe, names)], rows, "left") if rows else "<p>Nothing.</p>"
