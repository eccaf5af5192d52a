"""The panels as drawings in a page: one of each for light and dark, because their colours are the page's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mlx_qlora.look.history import History
from mlx_qlora.look.pages.page import safe
from mlx_qlora.look.pictures.figures import panel, svg
from mlx_qlora.look.pictures.panels import PANELS
from mlx_qlora.look.pictures.theme import DARK, LIGHT, Theme

_PLAIN = ("paper", "ink", "soft", "grid", "noise")


def _colours(theme: Theme) -> dict[str, str]:
    """Every colour of a theme by its name in the page."""
    found = {name: getattr(theme, name) for name in _PLAIN}
    found |= {f"run{number}": colour for number, colour in enumerate(theme.runs)}
    return found | {f"band{number}": colour for number, colour in enumerate(theme.bands)}


# Colours that are drawn with, each of which is replaced by its name: the browser knows which theme it is.
_STAND_INS = {name: f"#fa01{number:02x}" for number, name in enumerate(_colours(LIGHT))}
_NAMED = Theme(
    **{name: _STAND_INS[name] for name in _PLAIN},
    runs=tuple(_STAND_INS[f"run{number}"] for number in range(len(LIGHT.runs))),
    bands=tuple(_STAND_INS[f"band{number}"] for number in range(len(LIGHT.bands))),
)


def _declared(theme: Theme) -> str:
    return " ".join(f"--f-{name}: {colour};" for name, colour in _colours(theme).items())


STYLE = f"""
:root {{ {_declared(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_declared(DARK)} }} }}
.figures {{ display: grid; grid-template-columns: 1fr 1fr; gap: .8rem 1rem; }}
.figures figure {{ margin: 0; min-width: 0; break-inside: avoid; }} .figures .wide, .figures .narrow {{ grid-column: 1 / -1; }}
.figures .narrow {{ display: none; }}
.figures svg {{ width: 100%; height: auto; display: block; }}
.figures svg * {{ stroke-linejoin: round; stroke-linecap: butt; }}
.figures svg text {{ font-family: system-ui, sans-serif !important; }}
@media screen and (max-width: 44rem) {{ .figures {{ grid-template-columns: 1fr; }}
  .figures .wide {{ display: none; }} .figures .narrow {{ display: block; }} }}
"""
# name: (inches on a wide screen, on a narrow one); the others are half as wide, and one size serves both
_WIDE = {"loss": ((9.6, 4.4), (4.6, 4.2)), "gap": ((9.6, 2.7), (4.6, 2.6))}
_HALF = (4.7, 2.3)


def drawings(histories: Sequence[History], salt: str, brief: bool = False) -> Iterator[str]:
    """The panels as a piece of a page; `salt` tells its names from those of the page's other pieces. In brief: the first
    two, half as wide."""
    yield '<div class="figures">'
    for name in list(PANELS)[:2] if brief else PANELS:
        half = [("half", (_HALF[0], 2.9) if brief else _HALF)]
        sizes = zip(("wide", "narrow"), _WIDE[name], strict=True) if name in _WIDE and not brief else half
        for kind, inches in sizes:
            drawn = svg(panel(histories, name, _NAMED, inches), f"{salt} {name} {kind}")
            yield f'<figure class="{kind}">{_inlined(drawn, PANELS[name][0])}</figure>'
    yield "</div>"


def _inlined(drawn: str, title: str) -> str:
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", drawn, flags=re.DOTALL)
    text = re.sub(r"<(?!svg)[^>]*>", _slim, text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    text = _ALIKE.sub(lambda found: f"<g {found[2]}>{found[0].replace(' ' + found[2], '')}</g>", text)
    return re.sub(
        r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{safe(title)}">', text, count=1
    )


def _slim(tag: re.Match[str]) -> str:
    """An element with named colours, and only what tells it from others."""
    text = re.sub(r"#fa01[0-9a-f]{2}", lambda found: f"var(--f-{_BY_STAND_IN[found[0]]})", tag[0])
    text = re.sub(r'^<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;]*; ?", "", text)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)  # of a point, a hundredth
    return text.replace("\nL ", "L").replace('\n"', '"')


# Marks of the same style one after the other.
_ALIKE = re.compile(r'<use( xlink:href="[^"]*" x="[^"]*" y="[^"]*") (style="[^"]*")/>(?:\n<use(?: [^ ]*){3} \2/>)+')
_BY_STAND_IN = {colour: name for name, colour in _STAND_INS.items()}
