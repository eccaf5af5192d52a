"""The account of a data set as a person reads it: lines for the terminal, a page for the browser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mlx_qlora.data.audit import Audit, Leak, Likeness, Sight, Size
from mlx_qlora.data.chat import in_common
from mlx_qlora.data.render import WIDTHS, Account
from mlx_qlora.look.pages.page import VISIBLE, document, listing, safe, table

_BARS = " ▁▂▃▄▅▆▇█"
_NAMES = {"train": "training", "valid": "validation", "test": "test"}
# What was special about rows.
_NOTES = {
    "escaped": "with letters of special tokens, read as letters; what is rendered already should be given as text",
    "obeyed": "of plain text with special tokens, which are obeyed there",
    "ended_already": "with an end-of-text of their own, which is not trained twice",
    "own_examples": "in several examples: the chat template writes earlier turns in another way later, or has no end of turn",
    "unknown": "with letters that this tokenizer does not know",
    "no_chain": "with a rationale that is not trained: chain.kind is off",
    "renamed_calls": "with ids of tool calls that the chat template refuses; they got others",
}

Fact = tuple[str, list[str]]


def facts(audit: Audit) -> Iterator[Fact]:
    """(name, lines) of everything there is to say; the header of a run and the audit say the same."""
    yield "data", [*_table(audit), *(f"{name:<11} {text}" for name, text in _known(audit))]
    if notes := list(_all_notes(audit)):
        yield "notes", notes


def _known(audit: Audit) -> Iterator[tuple[str, str]]:
    """(what, what is known of it)."""
    if audit.windows:
        yield "windows", audit.windows
    if not audit.windows or not _only_text(audit):
        yield "template", audit.template
        yield "trained", audit.chain or _TRAINED[audit.train_on]
    for name, (share, passes) in audit.shares.items():
        yield "source", f"{name}: {share:.1%} of an epoch, each of its examples {passes:.2f} times"
    account = audit.accounts.get("train")
    if account is not None and account.lengths and not audit.windows:
        yield "lengths", _histogram(account)
    whole = audit.sizes["train"].examples if "train" in audit.sizes else 0
    among = "" if audit.looked_at >= whole else f" (of {audit.looked_at:,} looked at)"
    if audit.looked_at:
        share = audit.common_prefix_share
        yield "beginnings", f"{share:.1%} of the tokens stand in beginnings in common{among}"
        again = _counted((audit.duplicates, "the same again"), (audit.near_duplicates, f"nearly the same{among}"))
        yield "repeats", again or f"none, and nothing nearly the same{among}"
    leaks = {split: "; ".join(_leaked(leak, among) for leak in audit.leaks if leak.split == split) for split in audit.sizes}
    streamed = "" if "train" in audit.sizes else "training rows are read as they come and not compared with it"
    yield "validation", "; ".join(filter(None, (audit.validation, leaks.get("valid"), streamed)))
    if leaks.get("test"):
        yield "test", leaks["test"]
    if audit.scripts:
        yield "letters", ", ".join(f"{name} {share:.0%}" for name, share in audit.scripts.items() if share >= 0.005)


def _only_text(audit: Audit) -> bool:
    return all(set(+account.formats) <= {"text"} for account in audit.accounts.values())


def _all_notes(audit: Audit) -> Iterator[str]:
    for split, own in audit.accounts.items():
        yield from _notes(own, _NAMES[split], audit)


_TRAINED = {
    "assistant": "every turn of the assistant",
    "last": "the assistant's last turn",
    "all": "everything",
    "marked": "what the rows mark",
}


def training_notes(audit: Audit) -> list[str]:
    return list(_notes(audit.accounts["train"], "training", audit))


def _table(audit: Audit) -> list[str]:
    forms = {name: number for own in audit.accounts.values() for name, number in own.formats.items() if number > 0}
    only = next(iter(forms)) if len(forms) == 1 else ""
    lines = [f"{only:<11}{'rows':>8}{'examples':>10}{'tokens':>13}{'trained':>12}{'':>7} {'longest':>7}"]
    for split, own in audit.sizes.items():
        lines.append(
            f"{_NAMES[split]:<11}{own.rows:>8,}{own.examples:>10,}{own.tokens:>13,}{own.supervised_tokens:>12,}"
            f"{_share(own):>7} {own.longest:>7,}"
        )
    if len(forms) > 1:
        lines.append(f"{'forms':<11} {_forms(audit)}")
    return lines


def _share(size: Size) -> str:
    return f"{size.supervised_tokens / size.tokens:.1%}" if size.tokens else ""


def _forms(audit: Audit) -> str:
    """What the rows are, most of them first."""
    whole = sum((own.formats for own in audit.accounts.values()), Counter[str]())
    return ", ".join(f"{name} ({number:,} rows)" for name, number in whole.most_common() if number > 0)


def _histogram(account: Account) -> str:
    bins = [width for width in WIDTHS if min(account.lengths) <= width <= max(account.lengths)]
    most = max(account.lengths.values())
    bars = "".join(_BARS[max(1, round(8 * account.lengths[width] / most)) if account.lengths[width] else 0] for width in bins)
    return f"{_from(bins[0]):,} |{bars}| {bins[-1]:,} tokens, a bar for each step of 19 %"


def _from(width: int) -> int:
    """The lower end of a bin of the histogram."""
    place = WIDTHS.index(width)
    return WIDTHS[place - 1] + 1 if place else 1


def _leaked(leak: Leak, among: str) -> str:
    there = _NAMES[leak.against]
    found = _counted(
        (leak.same, f"in {there} too"),
        (leak.same_prompt, f"with a prompt of {there} and another answer"),
        (leak.near, f"nearly as in {there}{among}"),
    )
    return found or f"nothing of it is in {there}{among}"


def _counted(*found: tuple[Likeness, str]) -> str:
    """The kinds of which there are any, with a pair for each."""
    return "; ".join(
        f"{likeness.count:,} {what} (such as {likeness.pairs[0][1]}, {likeness.pairs[0][0]})"
        for likeness, what in found
        if likeness.count
    )


def _notes(account: Account, name: str, audit: Audit) -> Iterator[str]:
    def many(number: int, what: str = "row") -> str:
        return f"{number:,} {name} {what}{'' if number == 1 else 's'}"

    if account.long_rows:
        what = {
            "error": "ending the run", "drop": "left out", "keep_end": "cut at the start", "keep_start": "cut at the end",
            "split": "split at turn borders",
        }[audit.truncation]  # fmt: skip
        gone = f", {many(account.long_rows_lost)} entirely" if account.long_rows_lost else ""
        yield (
            f"{many(account.long_rows)} longer than max_seq_length {audit.max_seq_length:,}, {what}: "
            f"{account.long_supervised_lost:,} trained tokens lost{gone}"
        )
    if account.without_target:
        yield f"{many(account.without_target)} with nothing to train, left out"
    if account.below_minimum:
        yield f"{many(account.below_minimum, 'example')} with too few trained tokens (min_supervised_tokens), left out"
    if account.malformed:
        yield f"{many(account.malformed)} that can't be used"
    for note, number in account.notes.items():
        kind, _, detail = note.partition(":")
        if kind == "no_stop":
            yield f"{many(number)} whose turns end in {detail!r}, which does not stop this model when it writes"
        else:
            yield f"{many(number)} {_NOTES[kind]}"


# Examples


def shown(sight: Sight, colour: bool, before: Sight | None = None) -> str:
    """An example with its trained parts in green, or between marks where there is no colour.

    A long beginning that stood in `before` already is not written again.
    """
    begin, end = ("\x1b[1;32m", "\x1b[0m") if colour else ("⟦", "⟧")
    dim, plain = ("\x1b[2m", "\x1b[0m") if colour else ("", "")
    pieces = list(sight.pieces)
    if before is not None and pieces and before.pieces:
        same = in_common(pieces[0][0], before.pieces[0][0])
        if same > 200:
            pieces[0] = (f"[... {same} characters as above ...]{pieces[0][0][same:]}", False)
    remarks = sight.remarks or [""] * len(pieces)
    text = "".join(
        f"{begin}{piece.translate(VISIBLE)}{end}{dim if remark else ''}{remark}{plain if remark else ''}"
        if trained
        else f"{dim}{piece.translate(VISIBLE)}{plain}"
        for (piece, trained), remark in zip(pieces, remarks, strict=True)
    )
    return f"{sight.id}\n{text}"


# The page


def page(audit: Audit, title: str) -> str:
    """The same as a page that needs nothing else."""
    taken = [] if audit.refusals else ["<p>Training would take this data as it is.</p>"]
    head = [f"<h1>{safe(title)}</h1>", *taken]
    return document(title, [*head, *parts(audit)])


def parts(audit: Audit) -> Iterator[str]:
    """The account as pieces of a page."""
    if audit.refusals:
        yield "<h2>Training would be refused</h2>"
        yield from (f'<p class="bad">{safe(reason)}</p>' for reason in audit.refusals)
    rows = [
        (_NAMES[split], *(f"{number:,}" for number in (size.rows, size.examples, size.tokens, size.supervised_tokens)),
         _share(size), f"{size.longest:,}")
        for split, size in audit.sizes.items()
    ]  # fmt: skip
    yield table(("", "rows", "examples", "tokens", "trained", "share", "longest"), rows)
    account = audit.accounts.get("train")
    if account is not None and account.lengths:
        yield "<h2>Lengths of the training examples</h2>" + _bars(account)
        yield "<h2>The longest</h2>"
        yield listing(f"{safe(id)}: {tokens:,} tokens" for tokens, id in sorted(account.longest, reverse=True))
    known = [("form", _forms(audit)), *(pair for pair in _known(audit) if pair[0] != "lengths")]
    known += [("note", note) for note in _all_notes(audit)]
    yield "<h2>To know</h2>" + listing(f"<b>{name}</b> {safe(text)}" for name, text in known)
    if refused := [line for own in audit.accounts.values() for line in own.refused]:
        yield "<h2>Rows that can't be used</h2><ul>"
        yield from (f'<li class="bad">{safe(line)}</li>' for line in refused)
        yield "</ul>"
    if audit.sights:
        yield "<h2>Examples</h2><p>Marked text is trained; the rest is what the model sees before.</p>"
    for sight in audit.sights:
        remarks = sight.remarks or [""] * len(sight.pieces)
        text = "".join(
            f"<mark>{safe(piece)}</mark>{f'<sub>{remark}</sub>' if remark else ''}" if trained else safe(piece)
            for (piece, trained), remark in zip(sight.pieces, remarks, strict=True)
        )
        yield f'<div class="example"><h3>{safe(sight.id)}</h3><pre>{text}</pre></div>'


def _bars(account: Account) -> str:
    most = max(account.lengths.values())
    bars = [
        f'<div title="{number:,} examples">{number:,}<i style="height:{max(2, 80 * number // most)}px"></i>'
        f"{_from(width):,}–{width:,}</div>"
        for width, number in sorted(account.lengths.items())
    ]
    return f'<div class="bars">{"".join(bars)}</div>'
