"""Pages that need nothing but themselves: one style, letters that stay letters, nothing loaded from anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

# What a browser may do with a page, whatever text found its way into it: draw it, and nothing more.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

GENERATOR = '<meta name="generator" content="mlx-qlora">'  # what a page of ours is known by

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fff; --soft: #5d6878; --line: #d9dee5; --trained: #0b57a4;
        --mark: #dcebfa; --bad: #9a3412; --bar: #4c84bd; --code: #f4f6f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14181e; --soft: #9aa6b5; --line: #323b47;
        --trained: #a9d1ff; --mark: #17385c; --bad: #fdba74; --bar: #5b94cc; --code: #1c222b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; color: var(--soft); }
.scroll { overflow-x: auto; }
.bars { display: flex; align-items: end; gap: 3px; height: 7rem; }
.bars div { flex: 1; max-width: 5rem; text-align: center; font-size: .75rem; color: var(--soft); }
.bars i { display: block; background: var(--bar); border-radius: 2px 2px 0 0; }
.example { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; margin: .8rem 0; }
.example h3 { margin: 0 0 .4rem; font-size: .85rem; font-weight: 600; color: var(--soft); overflow-wrap: anywhere; }
.example pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, monospace;
               color: var(--soft); }
mark { color: var(--trained); background: var(--mark); font-weight: 600; border-radius: 2px; }
.bad { color: var(--bad); white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page. `body` is HTML, of which every text has gone through `safe`."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width">{GENERATOR}'
        f'<link rel="icon" href="data:,"><title>{safe(title)}</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}{style}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def safe(text: object) -> str:
    """A text as a page shows it, whatever it holds: marks of HTML, halves of characters, letters that turn the line round."""
    return html.escape(str(text).translate(VISIBLE).encode("utf-8", "replace").decode())


# Control characters as what they are, and those that change the direction of what stands around them.
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def figure(value: object, form: str = ",.4g") -> str:
    """A number as a person reads it, a dash where there is none.

    >>> figure(1234.5, ",.1f"), figure(None), figure("nan"), figure(float("inf"))
    ('1,234.5', '–', '–', '–')
    """
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return f"{value:{form}}" if known else "–"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def listing(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{each}</li>" for each in items) + "</ul>"


def cut(text: str, most: int = 700) -> str:
    """A text that keeps its lines; of a long one the beginning, and the whole of it on demand."""
    if len(text) <= 1.2 * most:
        return f"<pre>{safe(text)}</pre>"
    more = f"<summary>all of it: {len(text):,} characters</summary>"
    return f"<pre>{safe(text[:most])} …</pre><details>{more}<pre>{safe(text[:_MOST])}</pre></details>"


_MOST = 20_000  # characters of a text that stand in a page at all
