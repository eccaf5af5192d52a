"""What to know before the verdict of a comparison is believed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_qlora.look.comparison.answers import EVALUATED, TRAINED
from mlx_qlora.look.comparison.contender import Contender, Run
from mlx_qlora.look.comparison.judgement import Judgement
from mlx_qlora.look.evaluation.scores import title
from mlx_qlora.look.exposure import rough, times
from mlx_qlora.run.folder import delivered


def notes(contenders: Sequence[Contender], judgements: Sequence[Judgement], score: str) -> list[str]:
    """What forbids a comparison comes first."""
    runs = [run for contender in contenders for run in contender.runs]
    return [
        *_not_comparable(judgements),
        *_going_on(runs),
        *_missing(contenders, judgements),
        *_lost(contenders),
        *_chance(contenders, judgements, score),
        *_questions(judgements, score),
        *_exposure(contenders),
        *_data(contenders),
        *_answers(runs),
        *_speed(runs),
    ]


def _not_comparable(judgements: Sequence[Judgement]) -> Iterator[str]:
    for judged in judgements:
        if judged.not_comparable:
            yield f"VALIDATION LOSSES OF {judged.other.name} AND {judged.base.name} CAN'T BE COMPARED: {judged.not_comparable}"


def _going_on(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        made = f"{run.history.step:,} of {run.history.planned_steps or 0:,} updates"
        if not run.ended:
            yield f"{run.name} is still going on ({made}); its figures are those so far"
        elif run.ended == "died":
            yield f"{run.name} died after {made}; mlx-qlora doctor {run.history.folder} says why"


def _missing(contenders: Sequence[Contender], judgements: Sequence[Judgement]) -> Iterator[str]:
    for contender in contenders:
        for run in contender.runs:
            if not run.history.settings:
                yield f"{run.name} has no config.yaml that can be read: what differs is not known"
            if not run.history.validations:
                yield f"{run.name} has not been validated"
            elif run.best is None:
                yield f"{run.name}: none of its validation losses is a finite number"
    for judged in judgements:
        answered = [each.name for each in (judged.base, judged.other) if not each.common]
        if not judged.questions and not answered:
            yield (
                f"{judged.other.name} and {judged.base.name} have answered no question in common "
                f"(such as {min(judged.other.common)[0]} and {min(judged.base.common)[0]}); their scores are not compared"
            )
    without = [each.name for each in contenders if not each.common]
    if without and len(without) < len(contenders):
        yield f"no answers: {', '.join(without)}; mlx-qlora evaluate makes them"
    elif without:
        yield ("none has answered questions; when mlx-qlora evaluate has asked all of them the same, a paired test tells more")


def _chance(contenders: Sequence[Contender], judgements: Sequence[Judgement], score: str) -> Iterator[str]:
    if len(judgements) > 1:
        yield (
            f"all are compared with {contenders[0].name} (--baseline names another); p is adjusted for {len(judgements)} "
            "comparisons (Holm), and each interval is that of one comparison alone"
        )
    elif any(judged.loss and judged.scores for judged in judgements):
        yield "loss and answers are both looked at: p is adjusted for that (Holm), and each interval is that of one alone"
    if any(judged.of_seeds for judged in judgements):
        yield (
            "with several seeds on a side, their spread counts (Student's t, by Welch); of answers and evaluated losses that "
            "of the questions and examples, which are the same for all, counts too"
        )
    if any(judged.of_seeds and judged.val_loss and not judged.evaluated for judged in judgements):
        yield (
            "val_loss over seeds is that of these validation examples; how far others might say something else, the examples "
            "themselves tell, once mlx-qlora evaluate has measured each"
        )
    if any(not judged.of_seeds for judged in judgements):
        yield (
            "one seed each: whether the settings or the chance of the seed made a difference can't be told; "
            "to tell, train each with two or three seeds"
        )
    if any(not judged.evaluated and not judged.of_seeds and judged.by_loss is not None for judged in judgements):
        yield (
            "the errors of two losses are taken as independent; on the same validation examples they are not, and the interval "
            "is too wide: what it calls a difference is one, and a smaller one may be one, too; mlx-qlora evaluate measures "
            "each example, and then they are paired"
        )
    named = {judged.questions for judged in judgements if score in judged.scores and not judged.of_seeds}
    if named:
        yield f"{title(score)}: paired by question; intervals by bootstrap over questions, p by flipping signs"


def _lost(contenders: Sequence[Contender]) -> Iterator[str]:
    for each in contenders:
        if each.lost:
            yield f"{each.told_lost}: that is a part of what these settings do, and no test knows of it"


def _questions(judgements: Sequence[Judgement], score: str) -> Iterator[str]:
    """Whether there were enough of them for the difference that was found."""
    for judged in judgements:
        found, sign = judged.scores.get(score), judged.by_score(score)
        reach = judged.reach(score)
        if found is None or sign is None or reach is None:
            continue
        said = f"{title(score)} of {judged.other.name}: the difference of {points(abs(found.value))}"
        asked = f"there were {judged.asked(score):,}"
        if sign == 0 and reach.seeds_hide > abs(found.value):
            yield (
                f"{said} is less than what {_seeds(judged)} let one see, however many questions are asked: "
                f"their own spread hides up to {points(reach.seeds_hide)}; more seeds would tell more"
            )
        elif sign == 0 and found.value and reach.needed > judged.asked(score):
            yield f"{said} would take about {rounded(reach.needed)} questions to be seen; {asked}"
        elif sign == 0:
            smallest = f"differences from about {points(reach.smallest)} on" if reach.smallest <= 1 else "no difference at all"
            yield f"{title(score)} of {judged.other.name}: {judged.asked(score):,} questions show {smallest}"
        elif reach.needed > judged.asked(score):
            yield (
                f"{said} is more than chance, and larger than so few questions show reliably: they would be about "
                f"{rounded(reach.needed)}, {asked}; with others it may well be smaller"
            )


def _seeds(judged: Judgement) -> str:
    counts = [len(each.runs) for each in (judged.base, judged.other)]
    return f"{counts[0]} seeds" if counts[0] == counts[1] else f"{counts[0]} and {counts[1]} seeds"


def points(share: float) -> str:
    """
    >>> points(0.015), points(0.01), points(0.123)
    ('1.5 points', '1.0 points', '12 points')
    """
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} points"


def rounded(count: int) -> str:
    """
    >>> rounded(3123), rounded(87)
    ('3,100', '87')
    """
    return f"{count:,}" if count < 100 else f"{int(float(f'{count:.2g}')):,}"


_MUCH = 2.0  # times as many tokens seen are worth a word


def _exposure(contenders: Sequence[Contender]) -> Iterator[str]:
    """Before anything else is made out as the reason of a difference."""
    seen = {each.name: each.mean(lambda run: run.figure("tokens_seen")).value for each in contenders}
    known = {name: tokens for name, tokens in seen.items() if tokens > 0}
    if not known:
        return
    least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    if known[most] >= _MUCH * known[least]:
        yield (
            f"{least} has seen {times(known[most] / known[least])} fewer tokens than {most} ({rough(known[least])} against "
            f"{rough(known[most])}): that may be all the difference; mlx-qlora plan says how to see as many"
        )


def _data(contenders: Sequence[Contender]) -> Iterator[str]:
    digests = {
        str(run.size("train").get("digest") or "")
        for contender in contenders
        if not contender.of_seeds
        for run in contender.runs
    } - {""}
    if len(digests) > 1:
        yield "they were trained on other examples, or on other tokens of them"
    for contender in contenders:
        if len({repr(run.size("valid")) for run in contender.runs}) > 1:
            yield f"the runs of {contender.name} were each validated on other examples, which adds to the spread of their seeds"
    for one, two in _pairs(contenders):
        if one.first.settings and one.first.settings == two.first.settings:
            yield f"{two.name} and {one.name} have the same settings and the same seed: what differs is the machine, or a copy"


def _pairs(contenders: Sequence[Contender]) -> Iterator[tuple[Contender, Contender]]:
    for number, one in enumerate(contenders):
        for two in contenders[number + 1 :]:
            yield one, two


def _answers(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if run.answers.unread:
            lines = f"{run.answers.unread:,} line{'' if run.answers.unread == 1 else 's'}"
            yield f"{run.name}: {lines} of {run.answers.file} can't be read and {'is' if lines == '1 line' else 'are'} left out"
        if _evaluated_before(run):
            again = f"mlx-qlora evaluate --run {run.history.folder} measures it anew"
            yield f"{run.name}: what evaluate has left in it is of other weights than those that are in it now; {again}"
    files = {run.answers.file for run in runs if run.answers.file}
    limits = {repr(_longest(run)) for run in runs if run.answers.file}
    if files == {EVALUATED, TRAINED}:
        short = [run.name for run in runs if run.answers.file == TRAINED]
        yield f"only the questions that train has asked are known of {', '.join(short)}; mlx-qlora evaluate asks all"
    elif len(limits) > 1:
        yield f"their answers were cut at other lengths ({', '.join(sorted(limits))} tokens)"


def _evaluated_before(run: Run) -> bool:
    """Whether a run was evaluated and then went on to better weights."""
    settings, weights = run.answers.report.get("settings"), delivered(run.history.folder)
    before = settings.get("adapters_sha256") if isinstance(settings, dict) else None
    return bool(before) and weights is not None and hashlib.sha256(weights.read_bytes()).hexdigest() != before


def _longest(run: Run) -> Any:
    if run.answers.file == TRAINED:
        return run.history.settings.get("max_answer_tokens")
    settings = run.answers.report.get("settings")
    return settings.get("max_answer_tokens") if isinstance(settings, dict) else None


def _speed(runs: Sequence[Run]) -> Iterator[str]:
    devices = {str(run.history.summary.get("device") or "") for run in runs} - {""}
    if len(devices) > 1:
        yield f"they ran on other devices ({'; '.join(sorted(devices))}): their speeds say little about settings"
    versions = {repr(_versions(run)) for run in runs if _versions(run)}
    if len(versions) > 1:
        yield f"they ran with other versions ({'; '.join(sorted(_told(run) for run in runs if _versions(run)))})"


def _versions(run: Run) -> dict[str, Any]:
    found = run.history.summary.get("versions")
    kept = ("mlx-qlora", "mlx", "mlx-lm")
    return {name: found.get(name) for name in kept} if isinstance(found, dict) else {}


def _told(run: Run) -> str:
    return f"{run.name}: {', '.join(f'{name} {version}' for name, version in _versions(run).items())}"
