"""Tasks of lm-evaluation-harness, answered by a model that was loaded here."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_qlora.errors import ConfigError, DataError

_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


@dataclass(frozen=True)
class Tasks:
    """Tasks that are there, with their data."""

    names: tuple[str, ...]
    manager: Any


def tasks(names: Sequence[str], include_path: str = "") -> Tasks:
    """Find the tasks and open their data, before a model is loaded for them. `include_path`: a folder with YAML tasks."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness: lm-evaluation-harness is not installed. pip install 'mlx-qlora[harness]'")
    if include_path and not Path(include_path).expanduser().is_dir():
        raise ConfigError(f"--harness-include-path {include_path}: a folder with YAML tasks is expected.")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(Path(include_path).expanduser()) if include_path else None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"; is {' or '.join(near)} meant?" if near else "; `lm-eval ls tasks` lists them."
        raise ConfigError(f"--harness {','.join(names)}: lm-evaluation-harness has no task {', '.join(unknown)}{hint}")
    try:
        manager.load(list(names))
    except Exception as error:  # no network, a data set that is gone, a task that is written wrongly
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(f"--harness {','.join(names)}: the tasks can't be loaded: {said}") from error
    return Tasks(tuple(names), manager)


def run(
    found: Tasks, model: nn.Module, tokenizer: Any, chat: bool, limit: int | None, rows: int, seed: int
) -> dict[str, dict[str, float | str]]:
    """{task: {metric: value}}, as the harness names them; `chat`: prompts go through the chat template."""
    import lm_eval

    try:
        with contextlib.redirect_stdout(sys.stderr):  # it tells of its progress
            done = lm_eval.simple_evaluate(
                model=_answering(model, tokenizer, chat, rows),
                tasks=list(found.names),
                task_manager=found.manager,
                limit=limit,
                apply_chat_template=chat,
                log_samples=False,
                **dict.fromkeys(_SEEDS, seed),
            )
    except ValueError as error:  # such as a task that runs code which a model wrote
        raise ConfigError(f"--harness {','.join(found.names)}: {' '.join(str(error).split())[:300]}") from error
    return {task: _values(values) for task, values in done["results"].items()}


def _values(values: dict[str, Any]) -> dict[str, float | str]:
    kept = {name: value for name, value in values.items() if name != "alias" and isinstance(value, Real | str)}
    return {name: value if isinstance(value, str) else float(value) for name, value in kept.items()}


def _answering(model: nn.Module, tokenizer: Any, chat: bool, rows: int) -> Any:
    """mlx-lm's own interface to the harness, around a model that is loaded already."""
    from lm_eval.api.model import LM
    from mlx_lm.evaluate import MLXLM

    class Ours(MLXLM):  # type: ignore[misc]
        def __init__(self) -> None:
            LM.__init__(self)  # that of MLXLM would load a model
            self._model, self.tokenizer = model, tokenizer
            self._max_tokens, self._batch_size, self._sampler = None, rows, None
            self.use_chat_template = chat

    return Ours()
