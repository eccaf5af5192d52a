"""The parts of a report about a run. Each gives pieces of a page, or none where there is nothing to say."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.assets import packaged
from mlx_qlora.data.audit import Audit
from mlx_qlora.files import json_lines, json_object
from mlx_qlora.look.account import parts
from mlx_qlora.look.console import duration, mlx_lm_loads
from mlx_qlora.look.evaluation.scores import title
from mlx_qlora.look.exposure import human, short
from mlx_qlora.look.gap import gap_text, grade
from mlx_qlora.look.history import History, number
from mlx_qlora.look.pages.finals import finals
from mlx_qlora.look.pages.page import cut, figure, listing, safe, table
from mlx_qlora.look.samples import NAME as SAMPLES
from mlx_qlora.run.folder import delivered
from mlx_qlora.run.supervise import NAME as SUPERVISION

_SAMPLES = 5  # answers that are shown at once
_MORE = 40  # on demand
_WORST = 8


@dataclass(frozen=True)
class Told:
    """A run with all that stands in its folder."""

    history: History
    defaults: Mapping[str, Any]  # of the settings, by dotted names
    evaluation: Mapping[str, Any]  # evaluation_report.json
    answers: Sequence[Mapping[str, Any]]  # predictions.jsonl, or answers.jsonl in its shape
    starts: Sequence[Mapping[str, Any]]  # supervision.jsonl: how earlier starts ended
    bad_updates: Sequence[str]
    samples: Sequence[Mapping[str, Any]] = ()  # samples.jsonl

    @property
    def folder(self) -> Path:
        return self.history.folder.resolve()


def tell(history: History, defaults: Mapping[str, Any]) -> Told:
    folder = history.folder
    answers = json_lines(folder / "predictions.jsonl") or [
        {**line, "answer": line.get("tuned")} for line in json_lines(folder / "answers.jsonl")
    ]
    try:
        bad = sorted(each.name for each in (folder / "bad_updates").glob("*.json"))
    except OSError:
        bad = []
    return Told(
        history,
        defaults,
        json_object(folder / "evaluation_report.json"),
        answers,
        json_lines(folder / SUPERVISION),
        bad,
        json_lines(folder / SAMPLES),
    )


def validations(run: Told) -> Iterator[str]:
    found, best = run.history.validations, run.history.best
    rows = []
    for report, epoch in found:
        star = " ★" if best and report.step == best[0].step else ""
        losses = f"{figure(report.val_loss, '.4f')}{star}", figure(report.train_eval_loss, ".4f")
        gap = f"{gap_text(report.gap, report.gap_se)} {grade(report.gap)}" if math.isfinite(report.gap) else "–"
        rows.append([f"{report.step:,}", figure(epoch, ".2f"), *losses, gap, "" if not report.stale else f"{report.stale}"])
    made = table(("update", "epoch", "validation", "training examples", "gap", "without improvement"), rows)
    if len(rows) > 25:
        yield f"<details><summary>all {len(rows):,} of them; ★ is the best</summary>{made}</details>"
    elif rows:
        yield made


# Evaluation


def evaluation(run: Told) -> Iterator[str]:
    found = run.evaluation
    if not found:
        return
    count = found.get("questions")
    asked = f"{figure(count, ',')} question{'' if count == 1 else 's'}" if "questions" in found else ""
    text = found.get("text")
    about = [_read(text) if isinstance(text, Mapping) else asked, _text(found, "split")]
    yield f"<p>{safe(', '.join(filter(None, [*about, _text(found, 'data')])))}. Intervals are of 95 %.</p>"
    rows = [
        ["loss", *(_interval(found.get(of), ".4f") for of in ("base_loss", "loss")), _difference(found.get("loss_difference"))],
        ["perplexity", _interval(found.get("base_perplexity"), ",.6g"), _interval(found.get("perplexity"), ",.6g"), ""],
    ]
    for name, said in (("bits_per_byte", "bits per byte"), ("next_token_accuracy", "next-token accuracy")):
        own = [_interval(found.get(of), ".4f") for of in (f"base_{name}", name)]
        rows.append([said, *own, _difference(found.get(f"{name}_difference"))])
    scores = found.get("scores")
    for name, each in (scores if isinstance(scores, Mapping) else {}).items():
        each = each if isinstance(each, Mapping) else {}
        rows.append(
            [safe(title(name)), *(_interval(each.get(of)) for of in ("base", "tuned")), _difference(each.get("difference"))]
        )
    rows = [row for row in rows if row[1] != "–" or row[2] != "–"]
    if rows:
        yield table(("", "base model", "fine-tuned", "difference"), rows)
    yield from finals(found, _interval, _difference)
    classes = found.get("classes")
    if isinstance(classes, Mapping) and classes:
        names = ("precision", "recall", "f1", "support")
        yield "<h3>By class</h3>"
        yield table(("", *names), ([safe(label), *_figures(each, names)] for label, each in classes.items()))
    worst = found.get("worst")
    ids = [str(each) for each in worst[:_WORST]] if isinstance(worst, list) else []
    by_id = {str(each.get("id")): each for each in run.answers}
    if shown := [by_id[each] for each in ids if each in by_id]:
        yield "<h3>The worst answers</h3>"
        yield from map(_sample, shown)


def _read(text: Mapping[str, Any]) -> str:
    """How raw text was read."""
    tokens, windows, window, stride = (figure(text.get(name), ",") for name in ("tokens", "windows", "window", "stride"))
    by = f", intervals by {text['intervals_by']}" if isinstance(text.get("intervals_by"), str) else ""
    return f"{tokens} tokens, each scored once, in {windows} windows of {window}, stride {stride}{by}"


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    return value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list) else ""


def _interval(value: Any, form: str = ".3f") -> str:
    if not isinstance(value, Mapping):
        return figure(value, form)
    low, high = figure(value.get("low"), form), figure(value.get("high"), form)
    wide = f' <span class="soft">[{low}, {high}]</span>' if (low, high) != ("–", "–") else ""
    return f"{figure(value.get('value'), form)}{wide}"


def _difference(value: Any) -> str:
    """Bold where zero is not in its interval."""
    text = _interval(value, "+.3f")
    low, high = (number(value.get(end)) for end in ("low", "high")) if isinstance(value, Mapping) else (math.nan, math.nan)
    return f"<b>{text}</b>" if low > 0 or high < 0 else text


def _figures(value: Any, names: Sequence[str]) -> list[str]:
    found = [value.get(name) if isinstance(value, Mapping) else None for name in names]
    return [figure(each, "," if isinstance(each, int) else ".3g") for each in found]


def written(run: Told) -> Iterator[str]:
    """What the model wrote while it was trained: at first, halfway, and at last."""
    steps = list(dict.fromkeys(line["step"] for line in run.samples if isinstance(line.get("step"), int)))
    for step in dict.fromkeys(steps[place] for place in (0, len(steps) // 2, -1) if steps):
        yield f"<h3>After update {step:,}</h3>"
        for line in run.samples:
            if line.get("step") == step:
                texts = {"given": str(line.get("prompt") or ""), "written": str(line.get("text") or "")}
                pieces = "".join(f"<dt>{name}</dt><dd>{cut(text)}</dd>" for name, text in texts.items() if text)
                yield f'<div class="example"><dl>{pieces}</dl></div>'
    if len(steps) > 3:
        yield f"<p>{len(steps):,} times in all: {SAMPLES}.</p>"


def samples(run: Told) -> Iterator[str]:
    if not run.answers:
        return
    yield from map(_sample, run.answers[:_SAMPLES])
    if more := run.answers[_SAMPLES : _SAMPLES + _MORE]:
        whole = f" of {len(run.answers):,}" if len(run.answers) > _SAMPLES + _MORE else ""
        made = "".join(map(_sample, more))
        yield f"<details><summary>{len(more)} more{whole}</summary>{made}</details>"


def _sample(line: Mapping[str, Any]) -> str:
    texts = (
        ("question", "question"), ("rationale", "rationale"), ("expected", "expected"), ("before", "base"),
        ("thought", "own_rationale"), ("after", "answer"),
    )  # fmt: skip
    pieces = "".join(f"<dt>{said}</dt><dd>{cut(line[name])}</dd>" for said, name in texts if isinstance(line.get(name), str))
    if said := _scored(line):
        pieces += f'<dt>scores</dt><dd class="soft">{safe(said)}</dd>'
    return f'<div class="example"><h3>{safe(line.get("id", ""))}</h3><dl>{pieces}</dl></div>'


def _scored(line: Mapping[str, Any]) -> str:
    """The scores of an answer, with those of the base model before them."""
    own, base = (each if isinstance(each, Mapping) else {} for each in (line.get("scores"), line.get("base_scores")))
    before = {name: f"{figure(value, '.3g')} → " for name, value in base.items()}
    return ", ".join(f"{title(name)} {before.get(name, '')}{figure(value, '.3g')}" for name, value in own.items())


# What it was made of


def exposure(run: Told) -> Iterator[str]:
    """What was planned to be seen, and what was."""
    found = run.history.exposure
    planned = found.get("planned")
    plan = planned if isinstance(planned, Mapping) else {}
    rows = []
    for name, label, form in _SEEN:
        pair = [number(each.get(name)) for each in (plan, found)]
        if any(map(math.isfinite, pair)):
            rows.append([label, *(form(each) if math.isfinite(each) else "–" for each in pair)])
    if not rows:
        return
    yield table(("", "planned", "seen"), rows)
    if math.isfinite(number(plan.get("window"))):
        window, stride, count = (figure(plan.get(name), ",") for name in ("window", "stride", "windows"))
        counts = {"each": "counts in each window", "once": "counts once"}.get(str(plan.get("overlap")), "")
        yield f"<p>An epoch has {count} windows of {window} tokens, with a stride of {stride}; what overlaps {counts}.</p>"


_SEEN: Sequence[tuple[str, str, Callable[[float], str]]] = (
    ("tokens_seen", "tokens", human),
    ("supervised_tokens_seen", "of them trained", human),
    ("passes", "passes over each token", short),
    ("updates", "updates", human),
    ("tokens_per_parameter", "tokens for each trained parameter", short),
)


def data(run: Told) -> Iterator[str]:
    if not run.history.account:
        return
    try:
        made = list(parts(Audit.from_json(run.history.account)))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        yield '<p class="bad">data_account.json is not as a run writes it, and is left out.</p>'
        return
    yield from (each.replace("<h2>", "<h3>").replace("</h2>", "</h3>") for each in made)  # texts have no marks of HTML


def configuration(run: Told) -> Iterator[str]:
    own, usual = run.history.settings, run.defaults
    changed = {key: value for key, value in own.items() if key not in usual or plain(usual[key]) != plain(value)}
    rows = [[f"<code>{safe(key)}</code>", safe(plain(own[key])), safe(plain(usual.get(key)))] for key in changed]
    if rows:
        yield "<p>Other than the defaults:</p>" + table(("setting", "here", "default"), rows, "left changed")
    same = [[f"<code>{safe(key)}</code>", safe(plain(value))] for key, value in own.items() if key not in changed]
    if same:
        made = table(("setting", "default"), same, "left")
        yield f"<details><summary>{len(same)} as by default</summary>{made}</details>"


def plain(value: Any) -> str:
    """A setting as YAML has it, on one line."""
    if isinstance(value, float) or value is None or isinstance(value, bool | int):
        return json.dumps(value) if not isinstance(value, float) else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def usage(run: Told) -> Iterator[str]:
    kept = delivered(run.folder)
    if kept is None or not mlx_lm_loads(kept.parent):
        return
    best, whole = kept.parent, kept.parent.name == "model"
    name = str(run.history.settings.get("model") or run.history.summary.get("model") or "MODEL")
    here = packaged(name) or Path(name).expanduser()
    model = str(here.resolve()) if here.is_dir() else name
    question = str(run.answers[0].get("question")) if run.answers else "..."
    own = shlex.quote(str(best))
    given = f"--model {own} {_NEXT}" if whole else f"--model {shlex.quote(model)} {_NEXT}--adapter-path {own} {_NEXT}"
    loaded = f"load({str(best)!r})" if whole else f"load(\n    {model!r},\n    adapter_path={str(best)!r},\n)"
    code = (
        "from mlx_lm import generate, load\n\n"
        f"model, tokenizer = {loaded}\n"
        f"messages = [{{'role': 'user', 'content': {_brief(question)!r}}}]\n"
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)\n"
        "print(generate(model, tokenizer, prompt))"
    )
    yield _copy("A question", f"mlx_lm.generate {given}--prompt {shlex.quote(_brief(question))}")
    yield _copy("From Python", code)
    made = shlex.quote(str(run.folder / ("quantised" if whole else "fused")))
    if whole:
        yield _copy("The same with 4 bits a weight", f"mlx_lm.convert --hf-path {own} {_NEXT}-q --mlx-path {made}")
    else:
        yield _copy("One model of both, which needs no adapters", f"mlx_lm.fuse {given}--save-path {made}")
    if not whole and (run.folder / "chat_template.jinja").exists():
        yield "<p>It was trained with the chat_template.jinja in its folder; put that beside the model's tokenizer.</p>"


_NEXT = "\\\n    "  # in the shell: the command goes on in the next line


def _brief(text: str) -> str:
    return " ".join(text.split())[:200]


def _copy(title: str, text: str) -> str:
    return f'<h3>{title}</h3><pre class="copy">{safe(text)}</pre>'


# How it went


def course(run: Told) -> Iterator[str]:
    """What happened on the way; nothing where nothing did."""
    summary, said = run.history.summary, []
    skipped = number(run.history.lines[-1].get("skipped_updates")) if run.history.lines else 0.0
    for count, what in (
        (skipped, "updates were skipped, because their loss or gradient was not finite"),
        (summary.get("rollbacks"), "times the run went back to a checkpoint, with a lower learning rate"),
        (summary.get("halvings"), "times memory ended, and from then on half as much was computed at once"),
    ):
        if number(count) > 0:
            said.append(f"{figure(number(count), ',.0f')} {what}")
    if run.bad_updates:
        named = ", ".join(run.bad_updates[:6]) + (" …" if len(run.bad_updates) > 6 else "")
        said.append(f"updates that went wrong, or whose loss jumped, are written down in bad_updates/: {safe(named)}")
    if said:
        yield listing(said)
    if run.starts:
        yield "<h3>Starts before</h3>"
        rows = [
            [*(safe(each.get(name) or "") for name in ("time", "how", "phase", "memory")), figure(each.get("update"), ",")]
            for each in run.starts
        ]
        yield table(("", "how it ended", "in", "memory", "update"), rows, "left")


def machine(run: Told) -> Iterator[str]:
    summary = run.history.summary
    versions = summary.get("versions")
    known = {"device": summary.get("device"), **(versions if isinstance(versions, Mapping) else {})}
    rows = [[safe(name), safe(value)] for name, value in known.items() if value]
    if 0 < (at := number(run.history.state.get("at"))) < 1e11:
        rows.append(["last heard of", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))])
    if trained := number(summary.get("trainable_parameters")):
        whole = figure(summary.get("total_parameters"), ",")
        rows.append(["trained parameters", f"{figure(trained, ',.0f')} of {whole}"])
    rows.append(["folder", safe(run.folder)])
    yield table(("", ""), rows, "left")


def took(history: History) -> str:
    """How long it trained, as far as that is known."""
    last = history.lines[-1].get("elapsed_s") if history.lines else None
    seconds = number(history.summary.get("elapsed_s", last))
    return duration(seconds) if 0 <= seconds < math.inf else ""
