"""What a run will see: its exposure, from settings and data, or from settings and a number of tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from mlx_qlora.config import RunConfig, from_yaml
from mlx_qlora.data import exposure
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.exposure import Amount, Exposure
from mlx_qlora.data.layout import BatchConfig
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.data.windows import Stream, WindowConfig
from mlx_qlora.errors import ConfigError, DataError, MlxQloraError, ModelError
from mlx_qlora.look import exposure as words
from mlx_qlora.look.exposure import Other
from mlx_qlora.look.history import History, number, read_history
from mlx_qlora.model.create import PRESETS, CreateConfig, create
from mlx_qlora.model.full import FullConfig
from mlx_qlora.model.load import load_tokenizer, outline
from mlx_qlora.model.trained import begin


def amount(corpus: Corpus) -> Amount | None:
    """What an epoch of these data reads; None for a stream, which is as long as it turns out to be."""
    train = corpus.train
    if train is None:
        return None
    if corpus.windows is not None:
        parts = [_of_windows(each) for each in corpus.windows.streams]
        return exposure.joined(parts, corpus.order.quotas)
    lengths, supervised = train.lengths, train.supervised
    edges = pairwise(np.cumsum((0, *corpus.sizes)).tolist())
    parts = [exposure.rows(int(lengths[a:b].sum()), b - a, int(supervised[a:b].sum())) for a, b in edges]
    account = corpus.accounts.get("train")
    documents = account.rows - len(corpus.split_off or ()) if account else None
    return replace(exposure.joined(parts, corpus.order.quotas), documents=documents)


def _of_windows(stream: Stream) -> Amount:
    """Of a stream whose windows are laid already, and among whose tokens some may not be trained."""
    ruler, read = stream.ruler, stream.positions
    once = min(stream.trained_tokens, stream.readable)
    trained = once if ruler.overlap == "once" else round(read * once / max(1, stream.readable))
    return Amount(
        stream.tokens, stream.readable, len(stream), read, trained, stream.documents, ruler.window, ruler.stride, ruler.overlap
    )


def planned(config: RunConfig, corpus: Corpus, trained: int | None, parameters: int | None) -> Exposure:
    """The exposure of a run on these data."""
    batch = config.part(BatchConfig)
    updates = None
    if corpus.train is not None and batch.min_supervised_per_update:  # else it follows from the number of examples
        updates = corpus.updates_in(batch, 1), corpus.updates_in(batch, config.epochs)
    return _reckoned(config, amount(corpus), trained, parameters, updates)


def of_tokens(config: RunConfig, tokens: int, trained: int | None, parameters: int | None) -> Exposure:
    """The exposure of windows over a text of so many tokens, of which there need be nothing yet."""
    if config.windows == "off":
        raise ConfigError("windows: off came; a number of tokens plans windows over a text. Leave one of them out.")
    window = config.max_seq_length
    ruler = config.part(WindowConfig).ruler(window)
    made = exposure.windows(tokens, window, ruler.stride, ruler.overlap)
    return _reckoned(config, made, trained, parameters)


def _reckoned(
    config: RunConfig, made: Amount | None, trained: int | None, parameters: int | None, updates: tuple[int, int] | None = None
) -> Exposure:
    return exposure.reckon(made, config.examples_per_update, config.epochs, config.max_steps, trained, parameters, updates)


def from_nothing(config: RunConfig) -> bool:
    """Whether the yardstick of tokens for each parameter holds; where no model is named, there is none to begin with."""
    return bool(config.preset) or not config.model


def warnings(config: RunConfig, made: Exposure) -> list[str]:
    return words.warnings(made, from_nothing(config), PRESETS)


# Another run, or another's settings


def other(path: Path, tokens: int | None, preparing: Callable[[int], None]) -> Other:
    """What a run has seen, or what a file of settings would.

    `tokens`: how many the other's text has, where it is not here.
    """
    if path.is_dir():
        history = read_history(path)
        if found := _of_summary(history):
            return found
        path = path / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"--compare-with {path}: {'no settings are' if path.parent.is_dir() else 'nothing is'} there. "
            "The folder of a run, or a YAML file with settings is expected."
        )
    config = from_yaml(path, RunConfig())
    name = path.absolute().parent.name if path.name == "config.yaml" else path.stem
    parameters = _parameters(config)
    if tokens is not None:
        made = of_tokens(config, tokens, *parameters)
    else:
        try:
            made = planned(config, _data(config, preparing), *parameters)
        except (DataError, ModelError, ConfigError) as error:
            raise ConfigError(
                f"--compare-with {path}: what its data has is not known: {error}\n"
                "Say how many tokens its text had, and windows over them are planned: --compare-tokens 12.5M"
            ) from error
    if made.tokens_seen is None:
        raise ConfigError(f"--compare-with {path}: it reads a stream, which has no known length; name the folder of its run.")
    return Other(name, made.tokens_seen, made.updates, made.passes, made.tokens_per_parameter)


def _of_summary(history: History) -> Other | None:
    """What training_summary.json says; of runs before it had an account of this, what follows from the rest of it."""
    summary, figures = history.summary, history.exposure
    tokens = number(figures.get("tokens_seen", summary.get("tokens")))
    if not tokens > 0:
        return None
    trained = number(summary.get("trainable_parameters"))
    return Other(
        name=history.name,
        tokens_seen=int(tokens),
        updates=int(number(summary.get("steps"))) if number(summary.get("steps")) >= 0 else None,
        passes=_known(figures.get("passes", summary.get("epoch"))),
        tokens_per_parameter=_known(figures.get("tokens_per_parameter", tokens / trained if trained > 0 else None)),
        really=True,
    )


def _known(value: object) -> float | None:
    found = number(value)
    return found if found >= 0 else None


def _data(config: RunConfig, preparing: Callable[[int], None]) -> Corpus:
    named = config.model or config.tokenizer
    if not (named and config.data):
        raise ConfigError(f"no {'data' if named else 'tokenizer'} is named in it.")
    source, render = config.part(SourceConfig), config.part(RenderConfig)
    return gather(
        source,
        render,
        load_tokenizer(named),
        config.seed,
        preparing,
        windows=config.part(WindowConfig),
        from_nothing=bool(config.preset),
    )


def _parameters(config: RunConfig) -> tuple[int | None, int | None]:
    """(trained, all) of another's model; not known where it is not here."""
    if not config.model and not config.preset:
        return None, None
    try:
        loaded = create(config.part(CreateConfig), None, config.seed) if config.preset else outline(config.model)
        trained = begin(loaded, config.lora, config.part(FullConfig), seed=config.seed, base=config.model)
    except MlxQloraError:
        return None, None
    return trained.trainable, trained.total
