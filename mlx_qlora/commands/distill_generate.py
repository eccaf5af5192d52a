"""`mlx-qlora distill generate`: a teacher answers prompts, and what it says becomes a data set."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mlx_qlora.config import RunConfig, from_yaml
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.distilling.dataset import Generated
from mlx_qlora.distilling.filters import REASONS, FilterConfig, Verdict
from mlx_qlora.distilling.generate import Wanted, generate
from mlx_qlora.errors import ConfigError
from mlx_qlora.look.console import Console, answered, duration, many
from mlx_qlora.look.pages.page import VISIBLE


@dataclass(frozen=True)
class _Asked:
    model: str = ""
    """The teacher: a folder or a model of the hub, or: embedded."""
    adapters: str = ""
    """A folder with adapters for it."""
    output_dir: str = ""
    """Where the data set goes."""
    overwrite: bool = False
    """Replace another generation there. One of the same teacher, prompts and sampling is gone on with, or judged anew."""
    config: str = ""
    """A YAML file with the settings of a training: its distill.teacher, its adapters, and its data are taken."""
    chat_template: str = ""
    """How prompts are written for the teacher: plain, alpaca, chatml, or a Jinja file; without it, its own."""
    system: str = ""
    """A system message that is put first, where a row has none."""
    system_in_data: bool = True
    """Write that message into the rows, too. Without it a student learns to answer so without being told."""
    split: Literal["train", "valid", "test"] | None = None
    """Whose rows are the prompts; without it those of train."""
    limit: int | None = None
    """Ask so many prompts, the first ones."""
    answers: int = 1
    """Answers to each prompt; several need a temperature."""
    max_answer_tokens: int = 512
    """Longest answer; what has no end by then is left out."""
    temperature: float = 0.0
    """0: each token is the likeliest one; above, they are drawn."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that make up so much."""
    seed: int = 0
    """For a temperature above 0, and for what is split off: each answer follows from it, its row, and its number."""
    batch_size: int | None = None
    """Answers at once; without a number: as many as 16,384 tokens of prompts and answers are, at most 32."""
    validation_share: float | None = None
    """Share of the prompts whose answers become valid.jsonl. Without it 0.1 where there are several answers to a prompt, so
    that none of it is trained; else 0, and training splits off rows of its own."""


@dataclass(frozen=True)
class _Arguments(FilterConfig, SourceConfig, _Asked):
    """A teacher answers prompts: rows of any format, with answers or without. What is empty, goes in circles, has no end or
    fails a check is left out and counted; the rest is a data set to train on."""

    validation_share: float | None = None  # type: ignore[assignment]  # as in _Asked
    """Share of the prompts whose answers become valid.jsonl. Without it 0.1 where there are several answers to a prompt, so
    that none of it is trained; else 0, and training splits off rows of its own."""
    data_weights: Annotated[tuple[float, ...], tyro.conf.Suppress] = ()
    data_cache: Annotated[str, tyro.conf.Suppress] = ""
    streaming: Annotated[bool, tyro.conf.Suppress] = False
    shuffle_buffer: Annotated[int, tyro.conf.Suppress] = 10_000

    def __post_init__(self) -> None:
        """Nothing: what is wrong is said in `_wanted`, outside of tyro's boxes."""


@dataclass(frozen=True)
class _Files:
    config: str = ""


_OF_CONFIG = ("data", "format", "fields", "malformed", "malformed_limit", "seed")


def main(arguments: Sequence[str]) -> int:
    def ran() -> int:
        given = list(arguments)
        files, _ = tyro.cli(_Files, args=given, return_unknown_args=True, add_help=False)
        line = tyro.cli(_Arguments, prog="mlx-qlora distill generate", args=given, default=_defaults(files.config))
        console = Console()
        found = generate(_wanted(line), console)
        _show(found, line, console)
        return 0 if found.kept else 3

    return answered("distill generate", ran)


def _defaults(path: str) -> _Arguments:
    if not path:
        return _Arguments()
    config = from_yaml(Path(path).expanduser(), RunConfig())
    own: dict[str, Any] = {name: getattr(config, name) for name in _OF_CONFIG}
    return _Arguments(model=config.distill.teacher, adapters=config.distill.teacher_adapters, config=path, **own)


def _wanted(given: _Arguments) -> Wanted:
    missing = [name for name in ("model", "data", "output_dir") if not getattr(given, name)]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(
            f"{flags} {'is' if len(missing) == 1 else 'are'} missing: mlx-qlora distill generate --model TEACHER "
            "--data PROMPTS --output-dir FOLDER"
        )
    of_source: dict[str, Any] = {name: getattr(given, name) for name in _OF_CONFIG[:-1]}
    of_filters: dict[str, Any] = {each.name: getattr(given, each.name) for each in fields(FilterConfig)}
    same = {each.name for each in fields(Wanted)} & {each.name for each in fields(_Arguments)} - {"adapters"}
    own: dict[str, Any] = {name: getattr(given, name) for name in same}
    return Wanted(
        source=SourceConfig(**of_source),
        filters=FilterConfig(**of_filters),
        output=Path(given.output_dir).expanduser(),
        adapters=Path(given.adapters).expanduser() if given.adapters else None,
        **own,
    )


# What a person sees


def _show(found: Generated, given: _Arguments, console: Console) -> None:
    total = len(found.verdicts)
    console.say()
    for name, count in (("answers", total), ("kept", len(found.kept)), *found.reasons.items()):
        console.say(f"  {REASONS.get(name, name):<42} {count:>8,} {count / total:>8.1%}")
    if found.unanswered:
        console.say(
            f"  {'prompts without any answer that is kept':<42} {found.unanswered:>8,} {found.unanswered / found.prompts:>8.1%}"
        )
    for one in _shown(found):
        console.say()
        console.say(f"  {'kept' if not one.reason else f'left out: {REASONS[one.reason]}'} ({one.prompt.id})")
        console.say(f"    question  {_line(one.prompt.text)}")
        console.say(f"    answer    {_line(one.answer.text) or '(nothing)'}")
        if one.detail:
            console.say(f"    because   {_line(one.detail)}")
    console.say()
    if found.tokens_per_second:
        console.fact(
            "speed", f"{found.tokens:,} tokens of answers in {duration(found.seconds)}: {found.tokens_per_second:,.0f} a second"
        )
    console.fact("WARNING", *_advice(found))
    folder = Path(given.output_dir)
    console.fact("files", *_files(found, folder))
    if found.kept:
        console.fact("next", _next(found, folder))


def _shown(found: Generated) -> list[Verdict]:
    """One that is kept, and one of each of the two most frequent reasons."""
    often = sorted(found.reasons, key=lambda reason: -found.reasons[reason])[:2]
    return [*found.kept[:1], *(next(each for each in found.left_out if each.reason == reason) for reason in often)]


def _line(text: str, most: int = 140) -> str:
    line = " ".join(text.split()).translate(VISIBLE)
    return line if len(line) <= most else f"{line[: most - 3]}..."


_INSTEAD = {
    "empty": "is the chat template the teacher's own, and is it a model that answers?",
    "looping": "--temperature 0.7 --top-p 0.9, or a better teacher; is the chat template its own?",
    "truncated": "a larger --max-answer-tokens, or a --system that asks for short answers",
    "control": "--chat-template: this looks like a template that is not the teacher's own",
    "short": "a smaller --min-answer-tokens",
    "pattern": "a --system that says how an answer should end; or is --check-pattern too strict?",
    "number": "--answers 4 --temperature 0.7 (one of them may be right), or a --system that asks to reason first",
    "check": "--answers 4 --temperature 0.7; rejected.jsonl says what --check refused",
    "duplicate": "a higher --temperature, or fewer --answers",
}


def _advice(found: Generated) -> list[str]:
    """What to change where more than half is left out; a prompt's further right answers are no loss."""
    lost = {reason: count for reason, count in found.reasons.items() if reason in _INSTEAD}
    if 2 * sum(lost.values()) <= len(found.verdicts):
        return []
    often = sorted(lost, key=lambda reason: -lost[reason])[:3]
    said = f"{sum(lost.values()):,} of {len(found.verdicts):,} answers are left out. What to try:"
    return [said, *(f"{REASONS[reason]} ({lost[reason]:,}): {_INSTEAD[reason]}" for reason in often)]


def _files(found: Generated, folder: Path) -> list[str]:
    valid = len(found.rows(True))
    lines = [f"{folder / 'train.jsonl'}: {many(len(found.rows(False)), 'row')}"] if found.kept else []
    lines += [f"{folder / 'valid.jsonl'}: {many(valid, 'row')}, of other prompts"] if valid else []
    lines += [f"{folder / 'rejected.jsonl'}: {many(len(found.left_out), 'answer')} with the reason"] if found.left_out else []
    return [*lines, f"{folder / 'generation.json'}, README.md: settings and counts, for programs and for people"]


def _next(found: Generated, folder: Path) -> str:
    length = f" --max-seq-length {-(-found.longest // 256) * 256}" if found.longest > 2048 else ""
    return f"mlx-qlora train --model STUDENT --data {shlex.quote(str(folder))}{length} --output-dir runs/student"
