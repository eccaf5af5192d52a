"""The trackers' own packages, each behind three things: where to look, `send` and `end`. All of it runs in one thread each.

Every tool keeps its own defaults and environment variables, but for these: nothing is asked at a terminal, nothing of what a
run prints is recorded, and how a process ends stays its own business.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from mlx_qlora.run.metrics import VALIDATED

PROJECT = "mlx_qlora"
# What a tool has taken it holds back for a while, and a kill -9 takes that away. Their own numbers, and somewhat more:
_WANDB_WRITES_S = 20.0  # both the file on the disk and what is sent, every 15 s
_TRACKIO_WRITES_S = 2.0  # every half second
INTERRUPTED, BADLY = "interrupted", ("failed", "not finite")  # ends of a run, as its summary says them
Figures = tuple[int, dict[str, float]]  # an update's number and its figures, named as in training_metrics.jsonl


@dataclass(frozen=True)
class Opening:
    """What a tracker is told of a run when it begins, or goes on."""

    folder: Path
    project: str  # empty: whatever the tool would take
    settings: Mapping[str, Any]  # by dotted names
    kept: Mapping[str, Any]  # what it gave as `kept` earlier; empty if the run is new to it

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def called(self, variable: str = "") -> str:
        """The project: that of an earlier start, or the setting, or what an environment variable says."""
        return str(self.kept.get("project") or self.project or os.environ.get(variable) or PROJECT)


@dataclass(frozen=True)
class Tracker:
    """A run in a tool, open."""

    where: str  # how a person gets to see it
    kept: Mapping[str, str]  # by what it is found again
    send: Callable[[Sequence[Figures]], None]
    end: Callable[[str, Mapping[str, Any]], None]  # how the run ended, and its summary
    writes_s: float = 0.0  # after so long, what was given to `send` outlives a kill


def tensorboard(opening: Opening) -> Tracker:
    """Event files in the run's folder, a new one for each start.

    They are made with TensorBoard's own protos and record writer, because whoever looks at them has it anyhow and no second
    package has to keep up with it; not with its EventFileWriter, whose thread loses what a full disk refuses.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # `api` wants TensorFlow
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder = opening.folder / "tensorboard"
    folder.mkdir(exist_ok=True)
    path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
    last = [sys.maxsize if opening.kept else -1]  # the update that came last

    def write(events: Sequence[Any], mode: str = "r+b") -> None:
        with path.open(mode) as file:  # anew each time, so that a file that is gone is noticed
            file.seek(0, os.SEEK_END)
            records = RecordWriter(file)
            for event in events:
                event.wall_time = time.time()
                records.write(event.SerializeToString())

    def send(figures: Sequence[Figures]) -> None:
        events = []
        for step, values in figures:
            if step <= last[0]:  # it happens anew: readers forget what they have from here on
                events.append(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
            last[0] = step
            scalars = [Summary.Value(tag=_grouped(name), simple_value=value) for name, value in values.items()]
            events.append(Event(step=step, summary=Summary(value=scalars)))
        write(events)

    def end(how: str, summary: Mapping[str, Any]) -> None:
        table = "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in flattened(summary).items())
        write([Event(step=max(0, min(last[0], summary["steps"])), summary=text_pb("summary", table))])

    settings = {name: _short(value) for name, value in opening.settings.items()}
    write([Event(file_version="brain.Event:2"), Event(summary=hparams_pb(settings))], "xb")
    return Tracker(f"tensorboard --logdir {shlex.quote(str(opening.folder))}", {}, send, end)


def _grouped(name: str) -> str:
    """TensorBoard draws what has a prefix in common together."""
    return f"{'validation' if name in VALIDATED else 'train'}/{name}"


def wandb(opening: Opening) -> Tracker:
    """`step` is an ordinary figure there, and the axis of all others: wandb's own counter takes no step twice, so that it
    would lose what comes after a run went back."""
    import wandb as tool

    # Console output has questions and answers in it. A server that does not answer must not keep the process from ending.
    settings: dict[str, Any] = {"console": "off", "silent": True}
    settings |= {} if "WANDB_FINISH_TIMEOUT" in os.environ else {"finish_timeout": 30.0}
    with _same_exit():
        run = tool.init(
            project=opening.called("WANDB_PROJECT"),
            entity=opening.kept.get("entity"),
            id=opening.kept.get("id") or uuid4().hex[:12],
            name=os.environ.get("WANDB_NAME") or opening.name,
            resume="allow",
            config=dict(opening.settings),
            allow_val_change=True,
            settings=tool.Settings(**settings),
        )
    run.define_metric("*", step_metric="step")

    def send(figures: Sequence[Figures]) -> None:
        for step, values in figures:
            run.log({"step": step, **values})

    def end(how: str, summary: Mapping[str, Any]) -> None:
        run.summary.update({f"summary/{name}": value for name, value in flattened(summary).items()})
        run.finish(255 if how == INTERRUPTED else 1 if how in BADLY else 0)

    where = f"wandb sync {shlex.quote(_from_here(Path(run.dir).parent))}" if run.offline else f"wandb: {run.url}"
    kept = {"id": run.id, "project": run.project, "entity": run.entity}
    return Tracker(where, {name: value for name, value in kept.items() if value}, send, end, _WANDB_WRITES_S)


@contextmanager
def _same_exit() -> Iterator[None]:
    """wandb puts functions of its own in the place of these to learn how a process ends; we tell it."""
    kept = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = kept


def trackio(opening: Opening) -> Tracker:
    """A name is what trackio finds a run again by, so that it is one of its own."""
    import trackio as tool

    project = opening.called("TRACKIO_PROJECT")
    name = str(opening.kept.get("name") or f"{opening.name}-{uuid4().hex[:4]}")
    with _unheard():
        run = tool.init(project=project, name=name, config=dict(opening.settings), resume="allow", embed=False)

    def send(figures: Sequence[Figures]) -> None:
        for step, values in figures:
            run.log(values, step=step)

    def end(how: str, summary: Mapping[str, Any]) -> None:
        numbers = {f"summary/{name}": value for name, value in flattened(summary).items() if not isinstance(value, str)}
        run.log(numbers, step=summary["steps"])
        with _unheard():
            run.finish()

    kept = {"name": name, "project": project}
    return Tracker(f"trackio show --project {shlex.quote(project)}", kept, send, end, _TRACKIO_WRITES_S)


@contextmanager
def _unheard() -> Iterator[None]:
    """What this thread prints goes nowhere; what others print does."""
    heard, own = sys.stdout, threading.get_ident()

    class Others(io.TextIOBase):
        def write(self, text: str) -> int:
            return len(text) if threading.get_ident() == own else heard.write(text)

        def flush(self) -> None:
            heard.flush()

    deaf = Others()
    sys.stdout = deaf
    try:
        yield
    finally:
        if sys.stdout is deaf:
            sys.stdout = heard


def mlflow(opening: Opening) -> Tracker:
    """Through the client, which knows no current run: that belongs to the program that calls us."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(opening.kept.get("uri"))
    uri = client.tracking_uri
    if run_id := opening.kept.get("run_id"):
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(_experiment(client, opening), run_name=opening.name).info.run_id
    log = partial(client.log_batch, run_id)

    settings = {name: _short(value) for name, value in opening.settings.items()}
    before = client.get_run(run_id).data.params
    params = [Param(name, str(value)) for name, value in settings.items() if name not in before]
    for begin in range(0, len(params), 100):  # so many it takes at once
        log(params=params[begin : begin + 100])
    # Parameters can't change there.
    if tags := [RunTag(name, str(value)) for name, value in settings.items() if before.get(name, str(value)) != str(value)]:
        log(tags=tags)

    def send(figures: Sequence[Figures]) -> None:
        now = round(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for step, values in figures for name, value in values.items()]
        for begin in range(0, len(metrics), 1000):
            log(metrics=metrics[begin : begin + 1000])

    def end(how: str, summary: Mapping[str, Any]) -> None:
        told = {f"summary/{name}": value for name, value in flattened(summary).items()}
        numbers = {name: value for name, value in told.items() if not isinstance(value, str)}
        log(tags=[RunTag(name, value) for name, value in told.items() if isinstance(value, str)])
        send([(summary["steps"], numbers)])
        client.set_terminated(run_id, "KILLED" if how == INTERRUPTED else "FAILED" if how in BADLY else "FINISHED")

    own = {"uri": uri} if uri.startswith(("sqlite:", "file:")) else {}  # others may have a password in them
    return Tracker(f"mlflow: run {opening.name} in {_without_password(uri)}", {"run_id": run_id, **own}, send, end)


def _experiment(client: Any, opening: Opening) -> str:
    name = opening.called("MLFLOW_EXPERIMENT_NAME")
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


def _without_password(uri: str) -> str:
    """
    >>> _without_password("https://ana:secret@host:5000"), _without_password("sqlite:////x/mlflow.db")
    ('https://host:5000', 'sqlite:////x/mlflow.db')
    """
    scheme, mark, rest = uri.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


OPENERS: dict[str, Callable[[Opening], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
    "mlflow": mlflow,
}


def flattened(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float | str]:
    """Numbers and words by dotted names; lists and what is not known are left out.

    >>> flattened({"ended": "finished", "best": {"step": 4}, "gap": None, "ids": [1]})
    {'ended': 'finished', 'best.step': 4}
    """
    flat: dict[str, float | str] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | str):
            flat[prefix + name] = value
    return flat


def _short(value: Any) -> bool | float | str:
    """A setting as every tool takes it."""
    return value if isinstance(value, bool | int | float) else (value if isinstance(value, str) else json.dumps(value))[:500]


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
