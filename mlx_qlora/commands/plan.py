"""`mlx-qlora plan`: what a run would be and how much memory it would take, before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.config import RunConfig, parse
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.layout import BatchConfig
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.engine.memory import Memory, MemoryConfig
from mlx_qlora.engine.optim import OptimConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.foresee import Foresight, longest
from mlx_qlora.look.console import Console, answered, size
from mlx_qlora.model import backend, lora
from mlx_qlora.model.load import load_tokenizer, outline
from mlx_qlora.plan import Change, Plan, alternatives, choose, choose_without_data, longest_of
from mlx_qlora.run.disk import write_json


@dataclass(frozen=True)
class _Planned:
    """All that was found out."""

    plan: Plan
    changes: list[Change]
    limit: int | None
    updates: tuple[int, int] | None  # of an epoch, and in all


def main(arguments: Sequence[str]) -> int:
    def planned() -> int:
        rest, json = _without_json(list(sys.argv[1:] if arguments is None else arguments))
        return _run(parse(rest, prog="mlx-qlora plan"), json)

    return answered("plan", planned)


def _without_json(arguments: list[str]) -> tuple[list[str], str]:
    """The arguments of `train`, and the file that `--json` names."""
    rest: list[str] = []
    json = ""
    coming = iter(arguments)
    for each in coming:
        if each == "--json" or each.startswith("--json="):
            json = each.partition("=")[2] or next(coming, "")
            if not json or Path(json).is_dir() or not Path(json).absolute().parent.is_dir():
                raise ConfigError(f"--json {json}: a file in a folder that is there is expected.")
        else:
            rest.append(each)
    return rest, json


def _run(config: RunConfig, json: str) -> int:
    if not config.model:
        raise ConfigError("model is missing: --model FOLDER_OR_NAME, such as mlx-community/Mistral-7B-Instruct-v0.3-4bit.")
    console = Console()
    outlined = outline(config.model)
    console.fact("model", outlined.describe, backend.describe())
    attached = lora.attach(outlined.model, config.lora, seed=config.seed)
    outlined.model.train()
    console.adapters(attached)
    corpus = _data(config, console) if config.data else None
    model = outlined.model
    plan = choose(config, model, corpus) if corpus else choose_without_data(config, model)
    examples = longest_of(config, corpus) if corpus else longest([config.max_seq_length] * config.examples_per_update)
    found = _Planned(
        plan=plan,
        changes=alternatives(plan, config, Foresight(model, examples, config.part(OptimConfig), config.label_smoothing))
        if plan.memory
        else [],
        limit=config.part(MemoryConfig).limit(backend.memory()),
        updates=_updates(config, corpus),
    )
    _show(found, config, console)
    if json:
        write_json(Path(json), _to_json(found, config, attached))
        console.fact("json", json)
    if plan.memory and not plan.memory.fits:
        print(f"mlx-qlora plan: {_remedy(found)}", file=sys.stderr)
        return 2
    return 0


def _data(config: RunConfig, console: Console) -> Corpus:
    source, render = config.part(SourceConfig), config.part(RenderConfig)
    return gather(source, render, load_tokenizer(config.model), config.seed, console.preparing)


def _updates(config: RunConfig, corpus: Corpus | None) -> tuple[int, int] | None:
    if corpus is None or corpus.train is None:
        return None
    batch = config.part(BatchConfig)
    whole = corpus.updates_in(batch, config.epochs)
    return corpus.updates_in(batch, 1), min(whole, config.max_steps or whole)


def _show(found: _Planned, config: RunConfig, console: Console) -> None:
    console.end_bar()
    if found.updates:
        epoch, whole = found.updates
        console.fact("updates", f"{whole:,} of {config.examples_per_update} examples, {epoch:,} an epoch")
    elif not config.data:
        length = config.max_seq_length
        console.fact("data", f"none is named: {config.examples_per_update} examples of {length:,} tokens are assumed")
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
        ("weights", need.weights),
        ("adapters", need.adapters),
        ("optimizer, gradients", need.optimizer),
        ("activations", need.activations),
        ("logits", need.logits),
        ("dequantised weights", need.dequantised),
    ]


def _remedy(found: _Planned) -> str:
    assert found.plan.memory is not None, "something did not fit"
    assert found.limit is not None, "into something"
    need = found.plan.memory.memory.peak
    better = [each for each in found.changes if each.memory.peak < need]
    lines = [
        f"  {size(each.memory.peak)} with {each.what}{': fits' if each.memory.peak <= found.limit else ''}" for each in better
    ]
    ways = "What to change, in this order:\n" + "\n".join(lines) if lines else "Fewer weights are what helps: a smaller model."
    return f"this needs {size(need)}, and {size(found.limit)} may be used.\n{ways}"


def _to_json(found: _Planned, config: RunConfig, attached: lora.Attached) -> dict[str, Any]:
    fit = found.plan.memory
    return {
        "model": config.model,
        "parameters": attached.total,
        "trained": attached.trainable,
        "updates": found.updates and {"epoch": found.updates[0], "all": found.updates[1]},
        "layout": {"kind": found.plan.layout.kind.value, "token_budget": found.plan.layout.token_budget},
        "grad_checkpoint": found.plan.passage.checkpoint,
        "memory": fit and fit.memory.to_json(),
        "limit": found.limit,
        "machine": backend.memory(),
        "fits": fit.fits if fit else None,
        "alternatives": [asdict(each) | {"peak": each.memory.peak} for each in found.changes],
        "notes": list(found.plan.notes),
    }
