"""`mlx-qlora plan`: what a run would see, how long it would take, and how much memory, before anything is trained."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import tyro

from mlx_qlora.build import new_model, new_tokenizer, read_corpus
from mlx_qlora.config import RunConfig, parse
from mlx_qlora.data.corpus import Corpus
from mlx_qlora.data.exposure import Exposure
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.engine.memory import Memory, MemoryConfig
from mlx_qlora.errors import ConfigError, require
from mlx_qlora.foresee import longest
from mlx_qlora.look.console import Console, answered, duration, size
from mlx_qlora.look.exposure import Other, beside, block, brief, compared
from mlx_qlora.model import backend
from mlx_qlora.model.full import FullConfig
from mlx_qlora.model.load import Loaded, load_tokenizer, outline
from mlx_qlora.model.trained import Trained, begin
from mlx_qlora.outlook import from_nothing, of_tokens, other, planned, warnings
from mlx_qlora.pace import Pace, measure
from mlx_qlora.plan import Change, Plan, alternatives, choose, choose_without_data, foresight_of, longest_of
from mlx_qlora.run.disk import write_json
from mlx_qlora.teaching import open_teaching

_PROG = "mlx-qlora plan"


@dataclass(frozen=True)
class _Asked:
    """What only plan is asked. All settings of mlx-qlora train go with it; they stand below."""

    tokens: str = ""
    """Plan windows over a text of so many tokens, such as 30M or 1.5G. No data is read, and no model is needed."""
    parameters: str = ""
    """So many parameters are trained, such as 110M, where no model is named."""
    tokens_per_second: float | None = None
    """A speed, to say how long it will take."""
    measure: bool = False
    """Make a few real updates of this plan and time them. Nothing of them is kept."""
    price_per_hour: float | None = None
    """What an hour costs, to say what the run will."""
    compare_with: str = ""
    """The folder of a run, or a YAML file with settings: which of both sees more?"""
    compare_tokens: str = ""
    """With a YAML file whose data is not here: how many tokens its text has."""
    json: str = ""
    """Write all of it into this file."""


@dataclass(frozen=True)
class _Fits:
    """What was found out about layout and memory."""

    plan: Plan
    changes: list[Change]
    limit: int | None


def main(arguments: Sequence[str]) -> int:
    def ran() -> int:
        given = list(arguments)
        asked, rest = tyro.cli(_Asked, prog=_PROG, args=given, return_unknown_args=True, add_help=False)
        if {"-h", "--help"} & set(given):
            _own_help()
        return _run(parse(rest, prog=_PROG), asked)

    return answered("plan", ran)


def _own_help() -> None:
    """Those of `train` follow."""
    try:
        tyro.cli(_Asked, prog=_PROG, args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit:
        print()


def _run(config: RunConfig, asked: _Asked) -> int:
    tokens, given, others = (_count(name, getattr(asked, name)) for name in ("tokens", "parameters", "compare_tokens"))
    _check(config, asked)
    console = Console()
    read = bool(config.data) and tokens is None
    loaded = _outlined(config, read, console)
    trained = _trained(config, loaded, console) if loaded else None
    sizes = (trained.trainable, trained.total) if trained else (given, given)
    corpus = read_corpus(config, loaded.tokenizer, console) if read and loaded else None
    exposure = planned(config, corpus, *sizes) if corpus else of_tokens(config, tokens, *sizes) if tokens else None
    beyond = other(Path(asked.compare_with).expanduser(), others, console.preparing) if asked.compare_with else None
    pace = measure(config, console.say) if asked.measure else None
    said = _exposed(exposure, config, asked, beyond, pace, console)
    fits = _fits(config, loaded, corpus, tokens is not None, console) if loaded else None
    if fits:
        _show(fits, console)
    if asked.json:
        write_json(Path(asked.json), _exposure_json(exposure, asked, beyond, pace, said) | _to_json(fits, config, *sizes))
        console.fact("json", asked.json)
    if fits and fits.plan.memory and not fits.plan.memory.fits:
        print(f"mlx-qlora plan: {_remedy(fits)}", file=sys.stderr)
        return 2
    return 0


# What was asked


def _count(name: str, text: str) -> int | None:
    """Such as 30M, 1.5G, 30_000_000; None where nothing came."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgbt]?)", text.replace("_", "").replace(",", "").strip().lower())
    value = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}[found[2]] if found else 0
    if value < 2 or value != int(value):
        flag = f"--{name.replace('_', '-')}"
        raise ConfigError(f"{flag}: {text!r} came, a number from 2 is expected, such as 30M, 1.5G, or 30_000_000.")
    return int(value)


def _check(config: RunConfig, asked: _Asked) -> None:
    speed, price, named = asked.tokens_per_second, asked.price_per_hour, config.model or config.preset
    require(
        (speed is None or 0 < speed < math.inf, "--tokens-per-second", speed, "a number above 0"),
        (price is None or 0 <= price < math.inf, "--price-per-hour", price, "a number from 0"),
        (
            price is None or asked.measure or speed is not None,
            "--price-per-hour",
            price,
            "a speed, too (--tokens-per-second)",
        ),
        (not (asked.measure and speed), "--tokens-per-second", speed, "nothing beside --measure, which finds it out"),
        (not asked.compare_tokens or bool(asked.compare_with), "--compare-tokens", asked.compare_tokens, "--compare-with too"),
        (not (asked.parameters and named), "--parameters", asked.parameters, "nothing beside a model"),
    )
    if asked.json and (Path(asked.json).is_dir() or not Path(asked.json).absolute().parent.is_dir()):
        raise ConfigError(f"--json {asked.json}: a file in a folder that is there is expected.")
    config.require_one_model()
    if not (named or asked.tokens):
        raise ConfigError(
            "model is missing: --model FOLDER_OR_NAME, such as mlx-community/Mistral-7B-Instruct-v0.3-4bit; for a new one "
            "--preset tiny. What windows over a text would see can be said without: --tokens 30M"
        )
    if asked.measure and (asked.tokens or not config.data):
        raise ConfigError("--measure makes real updates: it needs a model and --data, and no --tokens.")
    if asked.compare_with and not (asked.tokens or config.data):
        raise ConfigError("--compare-with: what this plan itself sees is not known; --data FOLDER or --tokens 30M says it.")


def _outlined(config: RunConfig, read: bool, console: Console) -> Loaded | None:
    """The model as it would be, of which nothing is computed; a new one has the size that its tokenizer gives it, where the
    data is read that this is trained on."""
    if config.preset:
        tokenizer = None
        if read or config.tokenizer:
            sources = find(config.part(SourceConfig)) if read else ()
            tokenizer = new_tokenizer(config, sources, console)
        return new_model(config, tokenizer, console)
    if not config.model:
        return None
    outlined = outline(config.model)
    console.fact("model", outlined.describe, backend.describe())
    return replace(outlined, tokenizer=load_tokenizer(config.model)) if read else outlined


def _trained(config: RunConfig, loaded: Loaded, console: Console) -> Trained:
    trained = begin(loaded, config.lora, config.part(FullConfig), seed=config.seed, base=config.model)
    loaded.model.train()
    console.fact(trained.name, *trained.describe)
    return trained


# Exposure


def _exposed(
    exposure: Exposure | None, config: RunConfig, asked: _Asked, beyond: Other | None, pace: Pace | None, console: Console
) -> list[str]:
    """Show it; gives the warnings."""
    console.end_bar()
    if exposure is None:
        length = config.max_seq_length
        assumed = f"{config.examples_per_update} examples of {length:,} tokens are assumed"
        console.fact("data", f"none is named: {assumed}", "with --data, or --tokens 30M, it is said what a run sees")
        return []
    if exposure.tokens_seen is None:
        console.fact("exposure", brief(exposure, config.max_seq_length))
    else:
        console.say("\nexposure" if config.model or config.preset else "exposure")
        for name, figure in [*block(exposure, from_nothing(config)), *_cost(exposure, asked, pace)]:
            console.say(_fitted(f"  {name:<28} {figure}", 31))
    said = warnings(config, exposure)
    if beyond is not None and exposure.tokens_seen is not None:
        sentence, less = compared(exposure, beyond)
        console.say(f"\ncompared with {beyond.name}, {'as it went' if beyond.really else 'as it is planned'}")
        for line in beside(exposure, beyond):
            console.say(line)
        said += [sentence] if less else []
        if not less:
            console.say(_fitted(f"  {sentence}", 2))
    if said:
        console.say()
    for each in said:
        console.say(_fitted(f"WARNING: {each}", 9))
    if config.model or config.preset:
        console.say()
    return said


def _fitted(text: str, indent: int) -> str:
    """A line as wide as the terminal, and what is left of it below; into a file or a pipe it goes whole."""
    if not sys.stdout.isatty():
        return text
    width = max(indent + 20, shutil.get_terminal_size().columns)
    return fill(
        text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def _cost(exposure: Exposure, asked: _Asked, pace: Pace | None) -> list[tuple[str, str]]:
    seconds, speed = _seconds(exposure, asked, pace), pace.tokens_per_second if pace else asked.tokens_per_second
    if seconds is None or speed is None:
        return []
    measured = f", the median of {pace.updates} updates" if pace else ""
    lines = [("time", f"{_long(seconds)} at {speed:,.0f} tokens a second{measured}; validations not counted")]
    if asked.price_per_hour is not None:
        lines.append(("price", f"{seconds / 3600 * asked.price_per_hour:,.2f} at {asked.price_per_hour:g} an hour"))
    return lines


def _seconds(exposure: Exposure, asked: _Asked, pace: Pace | None) -> float | None:
    speed = pace.tokens_per_second if pace else asked.tokens_per_second
    return exposure.tokens_seen / speed if speed and exposure.tokens_seen is not None else None


def _long(seconds: float) -> str:
    """
    >>> _long(7260), _long(266_665)
    ('2 h 01 min', '3 days 2 h')
    """
    days, rest = divmod(round(seconds / 3600), 24)
    return duration(seconds) if seconds < 2 * 86_400 else f"{days:,} days {rest} h"


def _exposure_json(
    exposure: Exposure | None, asked: _Asked, beyond: Other | None, pace: Pace | None, said: Sequence[str]
) -> dict[str, Any]:
    seconds = _seconds(exposure, asked, pace) if exposure else None
    price = asked.price_per_hour
    return {
        "exposure": exposure and exposure.to_json(),
        "warnings": list(said),
        "compared_with": beyond and asdict(beyond),
        "tokens_per_second": pace.tokens_per_second if pace else asked.tokens_per_second,
        "measured": pace and asdict(pace),
        "seconds": seconds,
        "price": seconds / 3600 * price if seconds is not None and price is not None else None,
        "updates": exposure and {"epoch": exposure.updates_per_epoch, "all": exposure.updates},
    }


# Memory


def _fits(config: RunConfig, loaded: Loaded, corpus: Corpus | None, windows: bool, console: Console) -> _Fits:
    model = loaded.model
    teaching = open_teaching(config, loaded, outlined=True)
    lesson = teaching.lesson(config.label_smoothing) if teaching else None
    if teaching:
        console.fact("teacher", *teaching.describe)
    plan = choose(config, model, corpus, 0, lesson) if corpus else choose_without_data(config, model, windows, lesson)
    examples = longest_of(config, corpus) if corpus else longest([config.max_seq_length] * config.examples_per_update)
    changes = alternatives(plan, config, foresight_of(config, model, examples, lesson)) if plan.memory else []
    return _Fits(plan, changes, config.part(MemoryConfig).limit(backend.memory()))


def _show(found: _Fits, console: Console) -> None:
    console.layout(found.plan.describe, found.plan.notes)
    if not found.plan.memory:
        return
    need = found.plan.memory.memory
    console.say("\nmemory at the peak of an update")
    for name, bytes_ in _rows(need):
        console.say(f"  {name:<28} {size(bytes_):>10}")
    console.say(f"  {'in all':<28} {size(need.peak):>10}")
    console.say(f"  {'this machine':<28} {size(backend.memory()):>10}")
    if found.limit is not None:
        verdict = "fits" if found.plan.memory.fits else "does not fit"
        console.say(f"  {'of it may be used':<28} {size(found.limit):>10}: {verdict}")
    if not backend.on_cpu():
        console.say("  on a GPU this is an estimate that nobody has measured yet")
    console.say("\nand otherwise")
    for change in found.changes:
        console.say(f"  {size(change.memory.peak):>10}  {change.what}")


def _rows(need: Memory) -> list[tuple[str, int]]:
    return [
        *(
            [("weights", need.weights), ("adapters", need.adapters)]
            if need.weights
            else [("parameters, now and best", need.adapters)]
        ),
        ("optimizer, gradients", need.optimizer),
        ("activations", need.activations),
        ("logits", need.logits),
        ("dequantised weights", need.dequantised),
    ]


def _remedy(found: _Fits) -> str:
    assert found.plan.memory is not None, "something did not fit"
    assert found.limit is not None, "into something"
    need = found.plan.memory.memory.peak
    better = [each for each in found.changes if each.memory.peak < need]
    lines = [
        f"  {size(each.memory.peak)} with {each.what}{': fits' if each.memory.peak <= found.limit else ''}" for each in better
    ]
    ways = "What to change, in this order:\n" + "\n".join(lines) if lines else "Fewer weights are what helps: a smaller model."
    return f"this needs {size(need)}, and {size(found.limit)} may be used.\n{ways}"


def _to_json(found: _Fits | None, config: RunConfig, trained: int | None, parameters: int | None) -> dict[str, Any]:
    """Of layout and memory, where there is a model."""
    own: dict[str, Any] = {"model": config.model or config.preset, "parameters": parameters, "trained": trained}
    if found is None:
        return own
    fit = found.plan.memory
    return own | {
        "layout": {"kind": found.plan.layout.kind.value, "token_budget": found.plan.layout.token_budget},
        "grad_checkpoint": found.plan.passage.checkpoint,
        "memory": fit and fit.memory.to_json(),
        "limit": found.limit,
        "machine": backend.memory(),
        "fits": fit.fits if fit else None,
        "alternatives": [asdict(each) | {"peak": each.memory.peak} for each in found.changes],
        "notes": list(found.plan.notes),
    }
