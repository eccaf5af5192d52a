"""What a comparison comes to, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mlx_qlora.look.comparison.contender import Contender
from mlx_qlora.look.comparison.judgement import Judgement
from mlx_qlora.look.comparison.statistics import Difference
from mlx_qlora.look.evaluation.scores import title
from mlx_qlora.look.gap import grade

_RISE = 0.1  # of the best loss: a last one that is further above it is worth a word


def sentence(contenders: Sequence[Contender], judgements: Sequence[Judgement], score: str) -> str:
    if not judgements:
        said = _alone(contenders[0], score)
    else:
        said = _of_two(judgements[0], score) if len(judgements) == 1 else _of_many(contenders, judgements, score)
    going_on = [run.name for each in contenders for run in each.runs if not run.ended]
    lost = "".join(f"; {each.told_lost}" for each in contenders if each.lost)
    return f"{said}{lost}{'; still going on: ' if going_on else ''}{', '.join(going_on)}."


def p_text(p: float) -> str:
    """
    >>> p_text(0.0123), p_text(0.3), p_text(0.00005)
    ('p = 0.012', 'p = 0.30', 'p < 0.001')
    """
    if not math.isfinite(p):
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _alone(only: Contender, score: str) -> str:
    parts = [
        f"{name} {found.value:.3f} (95 % interval over seeds {found.low:.3f} to {found.high:.3f})"
        for name, found in (("val_loss", only.loss(lambda run: run.best)), (title(score), only.score(score)))
        if math.isfinite(found.value)
    ]
    return f"One configuration with {len(only.runs)} seeds: {', '.join(parts) or 'nothing was validated'}"


# Of two


def _of_two(judged: Judgement, score: str) -> str:
    a, b = judged.base.name, judged.other.name
    loss, answers = _loss(judged), _answers(judged, score)
    by_loss, known = judged.by_loss, _signs(judged, score)
    told = ", ".join(filter(None, (loss, answers)))
    if not known:
        return f"{b} and {a} can't be judged against each other: {_why_unknown(judged)}"
    if known == {0}:
        return f"No difference between {b} and {a} is larger than its error: {told}"
    if known >= {1, -1}:
        lower, higher = (b, a) if by_loss == 1 else (a, b)
        return f"Loss and answers disagree: {lower} has the better {loss}, {higher} the better {answers}"
    better = f"{b} is {'better' if 1 in known else 'worse'} than {a}"
    if 0 in known:
        by, chance = (loss, answers) if by_loss else (answers, loss)
        return f"{better} by {by}, but the difference in {chance} is within its error{_end(judged)}"
    return f"{better}: {told}{_end(judged)}"


def _signs(judged: Judgement, score: str) -> set[int]:
    return {sign for sign in (judged.by_loss, judged.by_score(score)) if sign is not None}


def _loss(judged: Judgement) -> str:
    if judged.loss is None or judged.by_loss is None:
        return ""
    a, b = judged.losses()
    told = _difference(judged.loss, judged)
    if judged.by_loss == 0 and judged.loss.low * judged.loss.high > 0:  # the interval is that of one comparison alone
        told += f", {p_text(judged.loss.p)} as one of several comparisons"
    return f"{_loss_name(judged)} {b:.3f} against {a:.3f}{_loss_on(judged)} ({told})"


def _loss_name(judged: Judgement) -> str:
    return "evaluated loss" if judged.evaluated else "val_loss"


def _loss_on(judged: Judgement) -> str:
    return f" on the same {judged.examples:,} example{'' if judged.examples == 1 else 's'}" if judged.evaluated else ""


def _answers(judged: Judgement, score: str) -> str:
    found = judged.scores.get(score)
    if found is None or judged.by_score(score) is None:
        return ""
    a, b = judged.means(score)
    asked = judged.asked(score)
    same = f"on the same {asked:,} question{'' if asked == 1 else 's'}"
    return f"{title(score)} {b:.3f} against {a:.3f} {same} ({_difference(found, judged)}, {p_text(found.p)})"


def _difference(found: Difference, judged: Judgement) -> str:
    over = " over seeds" if judged.of_seeds else ""
    between = f", 95 % interval{over} {found.low:+.3f} to {found.high:+.3f}" if math.isfinite(found.half) else ""
    return f"difference {found.value:+.3f}{between}"


def _why_unknown(judged: Judgement) -> str:
    return f"{judged.not_comparable or _why_no_loss(judged)}, and no answers to the same questions tell them apart"


def _why_no_loss(judged: Judgement) -> str:
    none = [each.name for each in (judged.base, judged.other) if all(run.best is None for run in each.runs)]
    if none:
        return f"{' and '.join(none)} {'have' if len(none) > 1 else 'has'} no validation"
    return "the errors of their losses are not known"


def _end(judged: Judgement) -> str:
    return "".join(f"; {each}" for each in _telling(judged))


def _telling(judged: Judgement) -> Iterator[str]:
    """Another grade of the gap, and a run that was better before its end."""
    a, b = judged.base.gap, judged.other.gap
    if abs(b.value - a.value) > math.hypot(a.half, b.half) and not judged.not_comparable:
        grades = [f"{grade(gap.value)} ({gap.value:+.3f})" for gap in (b, a)]
        yield f"its gap is {grades[0]} where that of {judged.base.name} is {grades[1]}"
    for each in (judged.base, judged.other):
        if each.rise > _RISE:
            yield f"{each.name} ended {each.rise:.0%} above its best val_loss, of which the adapters were kept"


# Of more


def _of_many(contenders: Sequence[Contender], judgements: Sequence[Judgement], score: str) -> str:
    groups: dict[str, list[str]] = {}
    for judged in judgements:
        kind = _kind(_signs(judged, score))
        figures = "" if kind == _UNKNOWN else f" ({', '.join(_short(judged, score))})"
        groups.setdefault(kind, []).append(f"{judged.other.name}{figures}")
    told = [f"{kind} {', '.join(groups[kind])}" for kind in _KINDS if kind in groups]
    return f"Against {contenders[0].name}, {'; '.join(told)}{_leader(contenders, judgements)}"


_UNKNOWN = "can't be judged:"
_KINDS = ("better:", "worse:", "no difference larger than its error:", "loss and answers disagree:", _UNKNOWN)


def _kind(signs: set[int]) -> str:
    better, worse, chance, disagree, unknown = _KINDS
    if signs >= {1, -1}:
        return disagree
    return better if 1 in signs else worse if -1 in signs else chance if signs else unknown


def _short(judged: Judgement, score: str) -> Iterator[str]:
    alike = _signs(judged, score) == {0}  # which is said once, of all such
    for name, sign, found in (
        (_loss_name(judged), judged.by_loss, judged.loss),
        (title(score), judged.by_score(score), judged.scores.get(score)),
    ):
        if found is not None and sign is not None:
            yield f"{name} {found.value:+.3f}{' within its error' if sign == 0 and not alike else ''}"


def _leader(contenders: Sequence[Contender], judgements: Sequence[Judgement]) -> str:
    if any(judged.not_comparable for judged in judgements):
        return ""
    losses = {each.name: each.loss(lambda run: run.best).value for each in contenders}
    known = {name: value for name, value in losses.items() if math.isfinite(value)}
    if not known:
        return ""
    lowest = min(known, key=lambda name: known[name])
    signs = {judged.other.name: judged.by_loss for judged in judgements}
    if signs[lowest] != 1 if lowest in signs else set(signs.values()) != {-1}:
        return ""  # no test tells it from the others
    return f"; the lowest val_loss is that of {lowest} ({known[lowest]:.3f})"
