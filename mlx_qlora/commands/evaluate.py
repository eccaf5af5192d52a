"""`mlx-qlora evaluate`: how good a run's model is, beside its base; or any model with any adapters on any data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mlx_qlora.config import RunConfig, from_yaml
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.data.templates import TEMPLATES
from mlx_qlora.data.windows import Ruler, WindowConfig
from mlx_qlora.errors import ConfigError, DataError, RunFolderError
from mlx_qlora.evaluating import Wanted, evaluate
from mlx_qlora.look.console import Console, answered
from mlx_qlora.look.evaluation.pictures import draw
from mlx_qlora.look.evaluation.screen import told
from mlx_qlora.run.folder import delivered


@dataclass(frozen=True)
class _Asked:
    """What is no setting of a run."""

    run: str = ""
    """The folder of a run: its model, its best adapters, its data. Put first, it needs no --run."""
    model: str = ""
    """A folder or a model of the hub, or: embedded. Without it that of the run."""
    adapters: str = ""
    """A folder with adapters, such as one of a run's checkpoints. Without it the run's best ones."""
    output_dir: str = ""
    """Where the files go. Without it into the run."""
    split: Literal["valid", "test", "train"] | None = None
    """Which rows. Without it those of test; where there are none, those of valid."""
    questions: int | None = None
    """Ask so many of them, the first ones; without a number all; 0: none, only losses are measured."""
    max_answer_tokens: int = 128
    """Longest answer."""
    max_rationale_tokens: int | None = None
    """Of chains of thought: the longest rationale of the model's own; without a number twice the longest in the data."""
    temperature: float = 0.0
    """0: each token is the likeliest one; above, they are drawn."""
    seed: int = 0
    """For a temperature above 0, and for rows that are split off; of a run's own data they are the run's."""
    batch_size: int | None = None
    """Answers at once; without a number: as many as 16,384 tokens of prompts and answers are, at most 32."""
    base: bool = True
    """Evaluate the model without its adapters, too."""
    metric: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODULE:FUNCTION ...")] = ()
    """Scores of your own: functions (answer, expected) -> number."""
    labels: str = ""
    """The labels that answers are, as a,b,c. Without it they are told from the expected answers."""
    score_as: Literal["number", "option", "text"] | None = None
    """What counts of an answer that reasons: its final number, the option that it names, or its final phrase. Without it told
    from the expected answers, task by task."""
    limit_per_task: int | None = None
    """Ask so many questions of each task, the first ones. A row's task is its field task, or else the name of its file."""
    window: int | None = None
    """Of raw text: tokens that are read at once. Without it max_seq_length, and never more than the model was made for."""
    stride: int | None = None
    """Of raw text: tokens from one window to the next, which scores what is new in it. Without it half a window."""
    cross_documents: bool = False
    """Of raw text: windows go on from one document into the next; else each document is read for itself."""
    worst: int = 5
    """So many of the worst answers are shown."""
    harness: str = ""
    """Tasks for lm-evaluation-harness besides, as gsm8k,hellaswag."""
    limit: int | None = None
    """So many questions of each task of the harness."""
    harness_include_path: str = ""
    """A folder with tasks of your own for the harness."""


@dataclass(frozen=True)
class _Arguments(RenderConfig, SourceConfig, _Asked):
    """Losses, answers and their scores with 95 % intervals, the base model beside the fine-tuned one. How the data is
    read is as in the run, where nothing else is said."""

    matmul: Annotated[str, tyro.conf.Suppress] = "auto"
    data_weights: Annotated[tuple[float, ...], tyro.conf.Suppress] = ()
    streaming: Annotated[bool, tyro.conf.Suppress] = False
    shuffle_buffer: Annotated[int, tyro.conf.Suppress] = 10_000

    def __post_init__(self) -> None:
        """Nothing: what is wrong is said in `_wanted`, outside of tyro's boxes."""


@dataclass(frozen=True)
class _Files:
    run: str = ""


def main(arguments: Sequence[str]) -> int:
    def evaluated() -> int:
        given = list(arguments)
        if given and not given[0].startswith("-"):
            given.insert(0, "--run")  # as for the other verbs
        files, _ = tyro.cli(_Files, args=given, return_unknown_args=True, add_help=False)
        kept = _kept(files.run) if files.run else None
        default = _defaults(kept, files.run) if kept else _Arguments()
        line = tyro.cli(
            _Arguments, prog="mlx-qlora evaluate", args=given, default=default, config=(tyro.conf.EnumChoicesFromValues,)
        )
        return _run(line, kept)

    return answered("evaluate", evaluated)


def _kept(run: str) -> RunConfig:
    """The settings of a run."""
    folder = Path(run).expanduser()
    if not (folder / "config.yaml").is_file():
        what = "there is no config.yaml in it" if folder.is_dir() else "it is a file" if folder.exists() else "there is nothing"
        raise RunFolderError(f"--run {run}: {what}; the folder that `mlx-qlora train --output-dir` named is expected.")
    config = from_yaml(folder / "config.yaml", RunConfig())
    if not (config.model or config.preset) or not config.data:
        raise RunFolderError(f"{folder / 'config.yaml'}: it names no model or no data, so it is not whole. Name another run.")
    return config


def _defaults(kept: RunConfig, run: str) -> _Arguments:
    names = {each.name for each in fields(RunConfig)} & {each.name for each in fields(_Arguments)}
    own = {name: getattr(kept, name) for name in names - _ITS_OWN}
    template = Path(run).expanduser() / "chat_template.jinja"
    if kept.chat_template and kept.chat_template not in TEMPLATES and template.is_file():
        own["chat_template"] = str(template)  # the file that was named may be another one by now
    return _Arguments(**own)


# What means something else here than in a run.
_ITS_OWN = {"output_dir", "batch_size", "stride", "cross_documents"}


def _run(given: _Arguments, kept: RunConfig | None) -> int:
    console = Console()
    try:
        wanted = _wanted(given, kept)
        found, files = evaluate(wanted, console)
    except DataError as error:
        if kept and given.data == kept.data and "there is no such file" in str(error):
            raise DataError(f"{error}\nThe run was trained on it; say --data where it lies now.") from error
        raise
    finally:
        console.end_bar()
    pictures, missing = draw(found, wanted.output)
    for line in told(found):
        console.say(line)
    console.say()
    console.fact("files", *(str(path) for path in [*files, *pictures]), *([missing] if missing else []))
    return 0


def _wanted(given: _Arguments, kept: RunConfig | None) -> Wanted:
    whole = _whole(given)
    missing = [name for name in ("model", "data") if not (getattr(given, name) or (whole and name == "model"))]
    missing += [] if given.output_dir or given.run else ["output_dir"]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(
            f"{flags} {'is' if len(missing) == 1 else 'are'} missing. mlx-qlora evaluate --run RUN evaluates a run; "
            "without one, --model, --data and --output-dir are needed, and --adapters if there are any."
        )
    run = Path(given.run).expanduser()
    adapters = Path(given.adapters).expanduser() if given.adapters else run / "adapters" if given.run and not whole else None
    if given.run and not given.adapters and delivered(run) is None:
        raise RunFolderError(
            f"--run {given.run}: no adapters are in it yet: the run has not validated. "
            "Wait for that, or name a checkpoint of it with --adapters."
        )
    own_data = kept is not None and _named(given) == _named(kept)
    own: dict[str, Any] = {each.name: getattr(given, each.name) for each in fields(SourceConfig)}
    notes = []
    if kept and kept.label_smoothing:
        smoothing = kept.label_smoothing
        notes.append(f"losses are plain cross-entropies here; the run's own have label smoothing {smoothing:g} in them")
    return Wanted(
        model=str(whole or given.model),
        trained_whole=whole is not None,
        base_model=given.model if whole else "",
        source=SourceConfig(**own),
        render=RenderConfig(**{each.name: getattr(given, each.name) for each in fields(RenderConfig)}),
        output=Path(given.output_dir or given.run).expanduser(),
        adapters=adapters,
        seed=given.seed,
        split_seed=kept.seed if own_data and kept else given.seed,
        matmul=given.matmul,
        split=given.split,
        whole=not own_data,
        questions=given.questions,
        max_answer_tokens=given.max_answer_tokens,
        max_rationale_tokens=given.max_rationale_tokens,
        temperature=given.temperature,
        batch_size=given.batch_size,
        base=given.base,
        metrics=given.metric,
        labels=_list(given.labels),
        score_as=given.score_as,
        limit_per_task=given.limit_per_task,
        worst=given.worst,
        harness=_list(given.harness),
        harness_limit=given.limit,
        harness_include_path=given.harness_include_path,
        window=given.window,
        stride=given.stride,
        cross_documents=given.cross_documents,
        trained_in=_windows(kept) if own_data and kept else None,
        notes=tuple(notes),
    )


def _windows(kept: RunConfig) -> Ruler | None:
    """Those that a run was trained in."""
    config = kept.part(WindowConfig)
    wanted = config.wanted(find(kept.part(SourceConfig), training=False), from_nothing=bool(kept.preset))
    return config.ruler(kept.max_seq_length) if wanted else None


def _whole(given: _Arguments) -> Path | None:
    """The folder of the model that a run has trained in full."""
    found = delivered(Path(given.run).expanduser()) if given.run and not given.adapters else None
    return found.parent if found and found.parent.name == "model" else None


def _named(config: SourceConfig) -> list[Path]:
    """The same however they are written: rows that a run was trained on are not new ones as ./data."""
    return sorted(Path(each).expanduser().resolve() for each in config.sources)


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
