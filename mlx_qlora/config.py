"""The settings of a run: defaults, then a YAML file, then the command line.

Each part's settings and defaults stand beside the part; `RunConfig` puts them together and stops at train.py, which
hands each part its own slice. Tyro reads both the flags and the values of a file, so that one place knows the types
(and `1e-4`, which YAML takes for a text, is a number in a file too).
"""

from __future__ import annotations

import contextlib
import difflib
import io
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from mlx_qlora.assets import demo_config
from mlx_qlora.data.chain import ChainConfig
from mlx_qlora.data.layout import BatchConfig, LayoutConfig
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.data.windows import WindowConfig
from mlx_qlora.engine.guard import GuardConfig
from mlx_qlora.engine.memory import MemoryConfig
from mlx_qlora.engine.optim import OptimConfig
from mlx_qlora.engine.steps import StepConfig
from mlx_qlora.engine.stopping import EarlyStoppingConfig
from mlx_qlora.errors import ConfigError, all_problems, require
from mlx_qlora.files import yaml_tree
from mlx_qlora.look.samples import SampleConfig
from mlx_qlora.look.tracking.trackers import TrackerConfig
from mlx_qlora.model.activations import TrunkCacheConfig
from mlx_qlora.model.create import CreateConfig
from mlx_qlora.model.full import FullConfig
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.matmul import MatmulConfig
from mlx_qlora.objectives.distill import DistillConfig
from mlx_qlora.run.checkpoint import CheckpointConfig

Part = TypeVar("Part")
SEEDS = "seeds.yaml"  # the settings of a run with several seeds, in its output_dir
_SEEDS = "different whole numbers from 0, as in 42,123,456,"
_DIGITS = 9  # at most, of a seed in a list
_BY_VALUE = (tyro.conf.EnumChoicesFromValues,)


@dataclass(frozen=True)
class WholeRun:
    """What concerns no single part."""

    model: str = ""
    """A folder that mlx-lm can load, a model of the hub as owner/name, or: embedded, embedded-teacher."""
    output_dir: str = ""
    """The folder of the run; made if it is not there."""
    overwrite: bool = False
    """Replace an earlier run in output_dir."""
    resume: bool = False
    """Go on with the run in output_dir from its newest whole checkpoint; begin it, if there is none."""
    resume_anyway: bool = False
    """Go on although settings of training have changed."""
    supervise: int = 0
    """Run as a child process, and start it again up to so many times when it dies or hangs, with smaller batches if memory
    may be why."""
    stall_after_s: float | None = None
    """Seconds without any progress after which all stacks are written down; without a number: many times what an update
    took."""
    trace: bool = False
    """Say when each phase of each update begins and ends, with time and memory, and write trace.json for Perfetto."""
    seed: int = 0
    """For the order of the data, the adapters' start, and dropout."""
    seeds: tuple[str, ...] = ()
    """Train and evaluate once for each of these, as 42,123,456, into seed_42 and so on in output_dir; then their mean."""
    seeds_evaluate: tuple[str, ...] = ()
    """What evaluate is told after each of them, as split=test questions=200; or: off. Without it the rows of test, or else of
    valid, with max_answer_tokens."""
    epochs: int = 3
    """How often each example is seen."""
    max_steps: int | None = None
    """Stop after so many updates, whatever epochs says."""
    eval_every: int | None = None
    """Updates between validations; without a number: four validations an epoch."""
    score_questions: int = 0
    """After training, ask base and tuned model so many validation questions and score the answers."""
    max_answer_tokens: int = 128
    """Longest answer when questions are asked."""
    label_smoothing: float = 0.0
    """Share of a target's probability that is spread over all tokens; in training and validation alike."""

    def __post_init__(self) -> None:
        smoothing, every, most, stall = self.label_smoothing, self.eval_every, self.max_steps, self.stall_after_s
        require(
            (self.seed >= 0, "seed", self.seed, "a whole number from 0"),
            (not self.seeds or bool(self.each_seed), "seeds", ",".join(self.seeds), _SEEDS),
            (self.epochs >= 1, "epochs", self.epochs, "a whole number from 1"),
            (most is None or most >= 1, "max_steps", most, "a whole number from 1"),
            (every is None or every >= 1, "eval_every", every, "a whole number from 1"),
            (self.score_questions >= 0, "score_questions", self.score_questions, "a whole number from 0"),
            (self.max_answer_tokens >= 1, "max_answer_tokens", self.max_answer_tokens, "a whole number from 1"),
            (0 <= smoothing < 1, "label_smoothing", smoothing, "a number from 0 up to, not including, 1"),
            (self.supervise >= 0, "supervise", self.supervise, "a whole number from 0"),
            (stall is None or stall > 0, "stall_after_s", stall, "a number above 0"),
            (not (self.overwrite and self.resume), "overwrite", True, "false with resume"),
        )

    @property
    def each_seed(self) -> tuple[int, ...]:
        """Of `seeds`; empty where they are none, or not what they should be."""
        texts = [text for each in self.seeds for text in each.replace(",", " ").split()]
        found = tuple(int(text) for text in texts if text.isdecimal() and text.isascii() and len(text) <= _DIGITS)
        return found if len(found) == len(texts) == len(set(found)) else ()


@dataclass(frozen=True)
class _Computing(TrunkCacheConfig, MatmulConfig, StepConfig, MemoryConfig, LayoutConfig):
    """How a run computes. It changes speed and memory, and never the gradient. Each part judges itself in `RunConfig`."""


@dataclass(frozen=True)
class RunConfig(
    _Computing,
    TrackerConfig,
    SampleConfig,
    GuardConfig,
    CheckpointConfig,
    OptimConfig,
    BatchConfig,
    FullConfig,
    CreateConfig,
    WindowConfig,
    RenderConfig,
    SourceConfig,
    WholeRun,
):
    """All the settings of a run. The parts' own stand flat in it; adapters and early stopping are groups."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        with all_problems() as check:
            for kind in (
                WholeRun,
                SourceConfig,
                RenderConfig,
                WindowConfig,
                CreateConfig,
                FullConfig,
                BatchConfig,
                OptimConfig,
                GuardConfig,
                CheckpointConfig,
                SampleConfig,
                TrackerConfig,
                LayoutConfig,
                MemoryConfig,
                StepConfig,
                MatmulConfig,
                TrunkCacheConfig,
            ):
                check(partial(self.part, kind))

        if self.preset:  # there is nothing that adapters could adapt
            object.__setattr__(self, "fine_tune_type", "full")

    def part(self, kind: type[Part]) -> Part:
        """The slice that a part gets: its own dataclass, with this run's values."""
        return kind(**{each.name: getattr(self, each.name) for each in fields(kind)})  # type: ignore[arg-type]

    def require_complete(self) -> None:
        """Raise if something is missing that has no default."""
        self.require_one_model()
        missing = [
            ("model", "--model FOLDER_OR_NAME", "such as mlx-community/Mistral-7B-Instruct-v0.3-4bit, or --preset tiny"),
            ("data", "--data FOLDER", "with train.jsonl in it"),
            ("output_dir", "--output-dir FOLDER", "for the model or adapters and all that the run writes"),
        ]
        given = {name for name, _, _ in missing if getattr(self, name)} | ({"model"} if self.preset else set())
        lines = [f"  {flag:<26} {what}" for name, flag, what in missing if name not in given]
        if lines and self.resume and self.output_dir and not (Path(self.output_dir).expanduser() / "config.yaml").exists():
            raise ConfigError(f"resume: there is no run in {self.output_dir} to go on with. Is the name of the folder right?")
        if lines:
            raise ConfigError(
                "these are missing:\n" + "\n".join(lines) + "\n"
                "Give them here or in a file (--config run.yaml). To see a whole run first: mlx-qlora train --demo"
            )

    def require_one_model(self) -> None:
        """Raise if a model is named and another one is to be made."""
        if self.model and self.preset:
            raise ConfigError(
                f"preset: {self.preset!r} came, and model: {self.model!r}. Name the model that is trained further, or make a "
                "new one with preset; not both."
            )
        if self.dropout and self.fine_tune_type == "lora":
            raise ConfigError(
                f"dropout: {self.dropout:g} came with fine_tune_type lora, which it does not touch. Adapters have "
                "--lora.dropout; or train every parameter with --fine-tune-type full."
            )
        if self.fine_tune_type == "full" and (lora := _asked({"lora": _plain(asdict(self.lora))}, _UNASKED)):
            raise ConfigError(f"{lora[0]}: {lora[1]} came, and all of the model is trained, without adapters. Leave it out.")
        if self.chain.kind == "off" and (asked := _asked({"chain": _plain(asdict(self.chain))}, _NO_CHAIN)):
            raise ConfigError(f"{asked[0]}: {asked[1]!r} came without chain.kind. Say cascod or step_by_step, or leave it out.")
        if lost := [name for name in ("tokenizer", "vocab_size") if getattr(self, name) and not self.preset]:
            raise ConfigError(f"{lost[0]}: {getattr(self, lost[0])!r} came without preset; a model that is loaded has its own.")

    def plain(self) -> dict[str, Any]:
        """Every value, in the kinds that YAML and JSON know."""
        values: dict[str, Any] = _plain(asdict(self))
        return values

    def to_yaml(self) -> str:
        """Every value, as `--config` reads it."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration by dotted names.

    >>> flat({"seed": 0, "lora": {"rank": 8}})
    {'seed': 0, 'lora.rank': 8}
    """
    whole: dict[str, Any] = {}
    for name, value in values.items():
        whole |= {f"{name}.{key}": each for key, each in value.items()} if name in _GROUPS else {name: value}
    return whole


def _asked(values: Mapping[str, Any], unasked: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The first setting, by its dotted name, that is not what it is where nothing was said."""
    return next((each for each in flat(values).items() if each[1] != unasked[each[0]]), None)


def _plain(value: Any) -> Any:
    """A value in the kinds that YAML knows."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class _CommandLine(RunConfig):
    """Fine-tune a model with QLoRA on MLX. Every setting can stand in a YAML file too, written with _ for -."""

    config: str | None = None
    """A YAML file with settings; flags go before it."""
    demo: bool = False
    """Train the embedded model on the embedded data, with the settings of examples/demo.yaml."""

    def __post_init__(self) -> None:
        """Nothing: the values are judged where they become a `RunConfig`, outside of tyro's boxes."""


@dataclass(frozen=True)
class _Files:
    config: str | None = None
    demo: bool = False
    output_dir: str = ""
    resume: bool = False


def parse(arguments: Sequence[str], prog: str = "mlx-qlora train", base: RunConfig | None = None) -> RunConfig:
    """The settings from a command line, those of `base` where nothing is said. `--help` and wrong flags end the process as in
    any program (0 and 2).

    A run that goes on has its own settings, but for what the command line says.
    """
    arguments = [_in_full(each) for each in arguments]
    files, _ = tyro.cli(_Files, args=arguments, return_unknown_args=True, add_help=False)
    config = _from_files(files, base or RunConfig())
    there = Path(files.output_dir or config.output_dir).expanduser()
    kept = next((there / name for name in ("config.yaml", SEEDS) if (there / name).is_file()), None)
    if files.resume and (files.output_dir or config.output_dir) and kept:
        config = _from_files(files, from_yaml(kept, RunConfig()))
    default = _CommandLine(**_own_values(config))
    line = tyro.cli(_CommandLine, prog=prog, args=arguments, default=default, config=_BY_VALUE)
    return RunConfig(**_own_values(line))


# Short names of flags that other trainers have.
_SHORT = {"--seq-len": "--max-seq-length", "--grad-accum": "--gradient-accumulation", "--lr": "--learning-rate"}


def _in_full(argument: str) -> str:
    """
    >>> _in_full("--seq_len=32"), _in_full("--lr"), _in_full("--batch-size")
    ('--max-seq-length=32', '--learning-rate', '--batch-size')
    """
    flag, equals, value = argument.partition("=")
    return _SHORT.get(flag.replace("_", "-"), flag) + equals + value


def _from_files(files: _Files, config: RunConfig) -> RunConfig:
    if files.demo:
        config = from_yaml(demo_config(), config)
    if files.config is not None:
        config = from_yaml(Path(files.config).expanduser(), config)
    return config


def from_yaml(path: Path, base: RunConfig) -> RunConfig:
    """`base` with the values of a file in their places; one error names all that is wrong, each with its line."""
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    problems: list[tuple[int, str]] = []
    types_of = _types_of(RunConfig)
    for key, node in _settings(path):
        line = node.start_mark.line + 1
        if key in lines:
            problems.append((line, f"{key} stands here again (first in line {lines[key]}); keep one."))
        elif key in _GROUPS:
            problems.append((line, f"{key}: {_shown(node)} came; settings below it are expected, {_example(key)}."))
        elif key not in types_of:
            near = difflib.get_close_matches(key, types_of, n=1)
            hint = f"did you mean {near[0]}?" if near else "see mlx-qlora train --help for the settings."
            problems.append((line, f"{key}: there is no such setting; {hint}"))
        else:
            try:
                values[key] = _value(types_of[key], node)
            except ValueError as error:
                problems.append((line, f"{key}: {error}"))
        lines.setdefault(key, line)
    if not problems:
        try:
            return _replaced(base, values)
        except ConfigError as error:
            for problem in str(error).splitlines():
                key = problem.split(":", 1)[0]
                problems.append((lines.get(key, 1), problem))
    raise ConfigError("\n".join(f"{path}:{line}: {problem}" for line, problem in sorted(problems)))


def _settings(path: Path) -> Iterator[tuple[str, yaml.Node]]:
    """(dotted key, node) of every setting in a file."""
    root = yaml_tree(path)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1: settings such as `epochs: 3` are expected, one a line.")
    yield from _entries(root, "")


def _entries(mapping: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
    for name, node in mapping.value:
        key = f"{prefix}{name.value if isinstance(name, yaml.ScalarNode) else '?'}"
        if isinstance(node, yaml.MappingNode) and key in _GROUPS:
            yield from _entries(node, key + ".")
        elif key not in _GROUPS or node.tag != _NOTHING:  # all below it may be commented out
            yield key, node


def _types_of(kind: Any) -> dict[str, Any]:
    """The type of each setting by its dotted key."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        inner = {f"{name}.{key}": value for key, value in _types_of(hint).items()} if is_dataclass(hint) else {name: hint}
        found |= inner
    return found


_NOTHING = "tag:yaml.org,2002:null"
_GROUPS = {each.name for each in fields(RunConfig) if is_dataclass(typing.get_type_hints(RunConfig)[each.name])}


_NO_CHAIN = flat({"chain": _plain(asdict(ChainConfig()))})
_UNASKED = flat({"lora": _plain(asdict(LoraConfig()))})


def _value(hint: Any, node: yaml.Node) -> Any:
    """A node as a value of a type; tyro decides what is one."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
    if node.tag == _NOTHING:
        if type(None) in options:
            return None
        raise ValueError(f"nothing came, {_expected(hint)} is expected.")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(hint, args=_texts(node), console_outputs=False, config=_BY_VALUE)
    except SystemExit:
        raise ValueError(f"{_shown(node)} came, {_expected(hint)} is expected.") from None


def _shown(node: yaml.Node) -> str:
    return str(yaml.serialize(node)).strip().splitlines()[0]


def _example(group: str) -> str:
    first = next(name for name in _types_of(RunConfig) if name.startswith(f"{group}."))
    return f"such as `{group}: {{{first.removeprefix(f'{group}.')}: ...}}`"


def _texts(node: yaml.Node) -> list[str]:
    if isinstance(node, yaml.MappingNode):
        return [text for name, value in node.value for text in (*_texts(name), *_texts(value))]
    if isinstance(node, yaml.SequenceNode):
        return [text for value in node.value for text in _texts(value)]
    return [node.value.capitalize() if node.tag == "tag:yaml.org,2002:bool" else node.value]


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(each.value for each in hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(_expected(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is float:
        return "a number, or a list of them,"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, "names with numbers" if typing.get_origin(hint) is dict else "a list of texts")


def _replaced(base: RunConfig, values: dict[str, Any]) -> RunConfig:
    changes: dict[str, Any] = {key: value for key, value in values.items() if "." not in key}
    with all_problems() as check:
        for group in _GROUPS:
            own = {key.split(".")[1]: value for key, value in values.items() if key.startswith(group + ".")}
            if own:
                check(lambda: changes.update({group: replace(getattr(base, group), **own)}))  # noqa: B023 (called at once)
        check(lambda: replace(base, **{key: value for key, value in changes.items() if key not in _GROUPS}))
    return replace(base, **changes)


def _own_values(config: RunConfig) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in fields(RunConfig)}
