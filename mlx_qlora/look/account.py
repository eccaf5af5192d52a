"""The account of a data set as a person reads it: lines for the terminal, a page for the browser."""

from __future__ import annotations

import html
from collections.abc import Iterator

from mlx_qlora.data.audit import Audit, Leak, Likeness, Sight
from mlx_qlora.data.render import WIDTHS, Account

_BARS = " ▁▂▃▄▅▆▇█"
_NAMES = {"train": "training", "valid": "validation", "test": "test"}
# What was special about rows: one, many, and what it means.
_NOTES = {
    "escaped": "hold the letters of special tokens, read as letters here; if they are rendered already, give them as text",
    "obeyed": "of plain text hold special tokens, which are obeyed there",
    "ended_already": "bring their own end-of-text, which is not trained twice",
    "own_examples": "become several examples, because the chat template writes earlier turns in another way later",
    "renamed_calls": "have ids of tool calls that the chat template refuses; they got others",
}

Fact = tuple[str, list[str]]


def facts(audit: Audit) -> Iterator[Fact]:
    """(name, lines) of everything there is to say; the header of a run and the audit say the same."""
    yield "data", _table(audit)
    yield "", [f"chat template: {audit.template}; trained: {_TRAINED[audit.train_on]}; validation: {audit.validation}"]
    for name, (share, passes) in audit.shares.items():
        yield "", [f"{name}: {share:.1%} of an epoch, each of its examples {passes:.2f} times"]
    account = audit.accounts.get("train")
    if account is not None and account.lengths:
        yield "", [_histogram(account)]
    if audit.looked_at:
        yield "", _likeness(audit)
    notes = [line for split, own in audit.accounts.items() for line in _notes(own, _NAMES[split], audit)]
    if notes:
        yield "notes", notes


_TRAINED = {
    "assistant": "every turn of the assistant",
    "last": "the assistant's last turn",
    "all": "everything",
    "marked": "what the rows mark",
}


def _table(audit: Audit) -> list[str]:
    lines = [f"{'':<11}{'rows':>9}{'examples':>11}{'tokens':>14}{'trained':>13}{'':>8}{'longest':>9}"]
    for split, own in audit.accounts.items():
        share = f"{own.supervised_tokens / own.tokens:.1%}" if own.tokens else ""
        longest = max(own.longest)[0] if own.longest else 0
        lines.append(
            f"{_NAMES[split]:<11}{own.rows:>9,}{own.examples:>11,}{own.tokens:>14,}{own.supervised_tokens:>13,}"
            f"{share:>8}{longest:>9,}"
        )
    formats = {name: number for own in audit.accounts.values() for name, number in (own.formats + type(own.formats)()).items()}
    if len(formats) > 1:
        train = audit.accounts.get("train", Account()).formats
        lines.append("rows of the forms " + ", ".join(f"{name} ({train[name]:,})" for name in formats))
    elif formats:
        lines[0] = f"{f'{next(iter(formats))}':<11}" + lines[0][11:]
    return lines


def _histogram(account: Account) -> str:
    bins = [width for width in WIDTHS if min(account.lengths) <= width <= max(account.lengths)]
    most = max(account.lengths.values())
    bars = "".join(_BARS[max(1, round(8 * account.lengths[width] / most)) if account.lengths[width] else 0] for width in bins)
    return f"lengths    {_from(bins[0]):,} |{bars}| {bins[-1]:,} tokens, a bar for each step of 19 %"


def _from(width: int) -> int:
    """The lower end of a bin of the histogram."""
    place = WIDTHS.index(width)
    return WIDTHS[place - 1] + 1 if place else 1


def _likeness(audit: Audit) -> list[str]:
    whole = audit.examples.get("train", 0)
    among = "" if audit.looked_at >= whole else f" (of {audit.looked_at:,} looked at)"
    lines = [
        f"beginnings {audit.common_prefix_share:.1%} of the tokens stand in a beginning that another example has too{among}",
        f"twice      {_counted(audit.duplicates, 'the same example again')}; "
        f"{_counted(audit.near_duplicates, 'nearly the same')}{among}",
    ]
    lines += [_leaked(leak) for leak in audit.leaks]
    if audit.scripts:
        lines.append(
            "letters    " + ", ".join(f"{name} {share:.0%}" for name, share in audit.scripts.items() if share >= 0.005)
        )
    return lines


def _leaked(leak: Leak) -> str:
    found = [
        _counted(leak.same, "in training too"),
        _counted(leak.same_prompt, "with a prompt of training and another answer"),
        _counted(leak.near, "nearly in training"),
    ]
    return f"{_NAMES[leak.split]:<10} " + "; ".join(found)


def _counted(likeness: Likeness, what: str) -> str:
    if not likeness.count:
        return f"0 {what}"
    a, b = likeness.pairs[0]
    return f"{likeness.count:,} {what} (such as {b} and {a})"


def _notes(account: Account, name: str, audit: Audit) -> Iterator[str]:
    if account.long_rows:
        what = {
            "error": "end the run", "drop": "are left out", "keep_end": "lose their start", "keep_start": "lose their end",
            "split": "are split at turn borders",
        }[audit.truncation]  # fmt: skip
        gone = f", {account.long_rows_lost:,} rows entirely" if account.long_rows_lost else ""
        yield (
            f"{account.long_rows:,} {name} rows are longer than max_seq_length {audit.max_seq_length:,} and {what}: "
            f"{account.long_supervised_lost:,} trained tokens lost{gone}"
        )
    if account.without_target:
        yield f"{account.without_target:,} {name} rows have nothing to train and are left out"
    if account.below_minimum:
        yield f"{account.below_minimum:,} {name} examples have fewer trained tokens than min_supervised_tokens and are left out"
    if account.malformed:
        yield f"{account.malformed:,} {name} rows can't be used: {account.refused[0]}"
    for note, number in account.notes.items():
        kind, _, detail = note.partition(":")
        if kind == "no_stop":
            yield f"{number:,} {name} rows end their turns in {detail!r}, which does not stop this model when it writes"
        else:
            yield f"{number:,} {name} rows {_NOTES[kind]}"


# Examples


def shown(sight: Sight, colour: bool, before: Sight | None = None) -> str:
    """An example with its trained parts in green, or between marks where there is no colour.

    A long beginning that stood in `before` already is not written again.
    """
    begin, end = ("\x1b[1;32m", "\x1b[0m") if colour else ("⟦", "⟧")
    dim, plain = ("\x1b[2m", "\x1b[0m") if colour else ("", "")
    pieces = list(sight.pieces)
    if before is not None and pieces and before.pieces:
        same = len(_common(pieces[0][0], before.pieces[0][0]))
        if same > 200:
            pieces[0] = (f"[... {same} characters as above ...]{pieces[0][0][same:]}", False)
    text = "".join(f"{begin}{piece}{end}" if trained else f"{dim}{piece}{plain}" for piece, trained in pieces)
    return f"{sight.id}\n{text}"


def _common(a: str, b: str) -> str:
    """The beginning that two texts have in common."""
    size = next((place for place, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
    return a[:size]


# The page

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fff; --soft: #5d6878; --line: #d9dee5; --trained: #0b57a4;
        --mark: #dcebfa; --bad: #9a3412; --bar: #4c84bd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14181e; --soft: #9aa6b5; --line: #323b47;
        --trained: #a9d1ff; --mark: #17385c; --bad: #fdba74; --bar: #5b94cc; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; color: var(--soft); }
.scroll { overflow-x: auto; }
.bars { display: flex; align-items: end; gap: 3px; height: 7rem; }
.bars div { flex: 1; max-width: 5rem; text-align: center; font-size: .75rem; color: var(--soft); }
.bars i { display: block; background: var(--bar); border-radius: 2px 2px 0 0; }
.example { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; margin: .8rem 0; }
.example h3 { margin: 0 0 .4rem; font-size: .85rem; font-weight: 600; color: var(--soft); }
.example pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, monospace;
               color: var(--soft); }
mark { color: var(--trained); background: var(--mark); font-weight: 600; border-radius: 2px; }
.bad { color: var(--bad); white-space: pre-wrap; }
"""


def page(audit: Audit, title: str) -> str:
    """The same as a page that needs nothing else."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    if audit.refusals:
        body.append("<h2>Training would be refused</h2>")
        body += [f'<p class="bad">{html.escape(reason)}</p>' for reason in audit.refusals]
    else:
        body.append("<p>Training would take this data as it is.</p>")
    trained = html.escape(_TRAINED[audit.train_on])
    body.append(
        f"<p>Chat template: {html.escape(audit.template)}. Trained: {trained}. Validation: {html.escape(audit.validation)}.</p>"
    )
    body.append(
        '<div class="scroll"><table><tr><th></th><th>rows</th><th>examples</th><th>tokens</th><th>trained</th><th></th>'
    )
    body.append("<th>longest</th></tr>")
    for split, own in audit.accounts.items():
        share = f"{own.supervised_tokens / own.tokens:.1%}" if own.tokens else ""
        cells = [own.rows, own.examples, own.tokens, own.supervised_tokens]
        numbers = "".join(f"<td>{number:,}</td>" for number in cells)
        longest = max(own.longest)[0] if own.longest else 0
        body.append(f"<tr><td>{_NAMES[split]}</td>{numbers}<td>{share}</td><td>{longest:,}</td></tr>")
    body.append("</table></div>")
    account = audit.accounts.get("train")
    if account is not None and account.lengths:
        most = max(account.lengths.values())
        body.append('<h2>Lengths of the training examples</h2><div class="bars">')
        for width in sorted(account.lengths):
            number = account.lengths[width]
            body.append(
                f'<div title="{number:,} examples">{number:,}<i style="height:{max(2, 80 * number // most)}px"></i>'
                f"{_from(width):,}–{width:,}</div>"
            )
        body.append("</div>")
        body.append("<h2>The longest</h2><ul>")
        body += [f"<li>{html.escape(id)}: {tokens:,} tokens</li>" for tokens, id in sorted(account.longest, reverse=True)]
        body.append("</ul>")
    lines = [*_likeness(audit)] if audit.looked_at else []
    lines += [line for split, own in audit.accounts.items() for line in _notes(own, _NAMES[split], audit)]
    body.append("<h2>To know</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")
    refused = [line for own in audit.accounts.values() for line in own.refused]
    if refused:
        body.append("<h2>Rows that can't be used</h2><ul>")
        body += [f'<li class="bad">{html.escape(line)}</li>' for line in refused]
        body.append("</ul>")
    if audit.sights:
        body.append("<h2>Examples</h2><p>Marked text is trained; the rest is what the model sees before.</p>")
    for sight in audit.sights:
        text = "".join(
            f"<mark>{html.escape(piece)}</mark>" if trained else html.escape(piece) for piece, trained in sight.pieces
        )
        body.append(f'<div class="example"><h3>{html.escape(sight.id)}</h3><pre>{text}</pre></div>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )
