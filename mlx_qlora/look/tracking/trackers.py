"""A run's figures sent on to TensorBoard, Weights & Biases, trackio and MLflow.

Each tracker has a thread that follows the lines of training_metrics.jsonl at its own pace. The training neither waits for
one nor hears of its errors: a tracker that fails says so in one line and is left alone from then on. How many lines it has
is kept in trackers.json, so a run that goes on sends exactly those that are missing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mlx_qlora.errors import ConfigError, require
from mlx_qlora.files import json_object
from mlx_qlora.look.tracking.tools import OPENERS, Figures, Opening, Tracker
from mlx_qlora.run import disk
from mlx_qlora.run.metrics import Line

KEPT = "trackers.json"
KNOWN = tuple(OPENERS)
_EVERY_S = 1.0  # how often a tracker gets what is new: fast enough to look at, and one request where there were many updates
_AT_ONCE = 200  # lines
_TO_OPEN_S, _TO_END_S, _AT_ONCE_S = 20.0, 30.0, 2.0  # how long a run waits for its trackers at most

Since = Callable[[int, int], Sequence[Line]]  # the lines of a run from this one on, so many at most


@dataclass(frozen=True)
class TrackerConfig:
    """Who else is told a run's figures."""

    report_to: str | tuple[str, ...] = ()
    """Also send figures to these, separated by commas: tensorboard, wandb, trackio, mlflow; each needs the extra of its
    name."""
    tracker_project: str = ""
    """The project in wandb and trackio, the experiment in MLflow; without it what the tool's own environment says, or
    mlx_qlora."""

    def __post_init__(self) -> None:
        odd = [name for name in self.trackers if name not in KNOWN]
        require((not odd, "report_to", ", ".join(odd), f"one or several of {', '.join(KNOWN)}, or none,"))

    @property
    def trackers(self) -> tuple[str, ...]:
        """Their names, each once.

        >>> TrackerConfig(report_to=("wandb,mlflow", "wandb")).trackers, TrackerConfig(report_to="none").trackers
        (('wandb', 'mlflow'), ())
        """
        said = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        names = [name for each in said for name in each.replace(",", " ").split()]
        return () if names == ["none"] else tuple(dict.fromkeys(names))


def require_trackers(config: TrackerConfig) -> None:
    """Raise before anything else is loaded if one of them can't be used: its package is missing, or it knows nobody."""
    missing = [(name, problem) for name in config.trackers if (problem := _missing(name))]
    if missing:
        lines = [f"  {name}: {problem}" for name, problem in missing]
        extras = ",".join(name for name, _ in missing)
        raise ConfigError("report_to: packages are missing.\n" + "\n".join(lines) + f"\npip install 'mlx-qlora[{extras}]'")
    if "wandb" in config.trackers and not _wandb_knows_somebody():
        raise ConfigError(
            "report_to: wandb does not know who you are: it has no API key. Say `wandb login` once (or set WANDB_API_KEY), or "
            "set WANDB_MODE=offline and send the run later with `wandb sync`."
        )


def _missing(name: str) -> str:
    """Why a package can't be imported; empty if it can."""
    try:
        module = import_module(name)
        if name == "mlflow" and module.get_tracking_uri().startswith("sqlite"):  # its default; it leaves out what that needs
            import_module("sqlalchemy")
            import_module("alembic")
    except ImportError as error:
        return str(error)
    # wandb makes a folder `wandb` where it runs, which Python takes for a package where there is no other.
    return "" if module.__file__ else "no such package is installed"


def _wandb_knows_somebody() -> bool:
    """Whether it can send, or need not. It would ask for a key at the terminal otherwise, where nobody may sit."""
    import wandb

    try:  # whether the key is a good one, its server says when the run begins there
        return wandb.setup().settings.mode != "online" or bool(wandb.login(prompt=False, verify=False))
    except wandb.Error as error:  # such as a key that can't be one
        raise ConfigError(f"report_to: wandb: {_why(error)}") from error


class Trackers:
    """All that were asked for, from the start of a run to its end."""

    def __init__(self, names: Sequence[str], opening: Opening, since: Since, most: int | None, tell: Callable[[str], None]):
        """`most`: of the lines that were sent before, those from this one on are no longer true."""
        self._tell = tell
        self._path = opening.folder / KEPT
        self._kept: dict[str, Any] = json_object(self._path)
        self._lock = threading.Lock()
        self._following = [_Following(name, opening, self._kept.get(name, {}), since, most, self) for name in names]

    def begin(self) -> list[str]:
        """Start them; says where each can be looked at, as far as they have answered by then."""
        for each in self._following:
            each.thread.start()
        said, until = [], time.monotonic() + _TO_OPEN_S
        for each in self._following:
            if not each.opened.wait(max(0.0, until - time.monotonic())):
                said.append(f"{each.name} has not answered yet; training does not wait for it")
            elif each.where:
                said.append(each.where)
        return said

    def end(self, how: str, summary: Mapping[str, Any], at_once: bool = False) -> None:
        """Send what is left. Waits for that half a minute at most, and never raises."""
        for each in self._following:
            each.finish(how, summary)
        with suppress(KeyboardInterrupt):  # it is the waiting that is ended by that
            if (slow := self._closing(_AT_ONCE_S)) and not at_once:
                self._tell(f"waiting for {' and '.join(slow)} to take what is left; Ctrl-C ends the waiting")
                self._closing(_TO_END_S)
        for each in self._following:
            each.leave()

    def _closing(self, seconds: float) -> list[str]:
        """Who is not done after so long."""
        until = time.monotonic() + seconds
        for each in self._following:
            each.thread.join(max(0.0, until - time.monotonic()))
        return [each.name for each in self._following if each.thread.is_alive()]

    def warn(self, name: str, why: str) -> None:
        self._tell(f"WARNING: {name}: {why}; training_metrics.jsonl has every figure, and --resume sends what is missing")

    def keep(self, name: str, what: Mapping[str, Any]) -> None:
        with self._lock, suppress(OSError):  # without it a run that goes on is another one in the tracker
            self._kept[name] = dict(what)
            disk.write_json(self._path, self._kept, flushed=False)


class _Following:
    """One tracker's thread."""

    def __init__(
        self, name: str, opening: Opening, kept: Mapping[str, Any], since: Since, most: int | None, all_of_them: Trackers
    ):
        self.name, self.where = name, ""
        self.opened = threading.Event()
        self.thread = threading.Thread(target=self._follow, name=f"tracker-{name}", daemon=True)
        self._opening = Opening(opening.folder, opening.project, opening.settings, kept)
        self._since, self._all = since, all_of_them
        sent = int(kept.get("lines", 0))
        self._sent = self._safe = sent if most is None else min(sent, most)
        self._marks: deque[tuple[float, int]] = deque()  # (from when on they are safe, lines)
        self._kept: tuple[Mapping[str, str], int] | None = None  # as it was written down
        self._over = threading.Event()
        self._ended: tuple[str, Mapping[str, Any]] = ("", {})
        self._left = False

    def finish(self, how: str, summary: Mapping[str, Any]) -> None:
        self._ended = how, summary
        self._over.set()

    def leave(self) -> None:
        """From now on it says and writes nothing, whatever it still does."""
        if self.thread.is_alive() and not self._left:
            left = len(self._since(self._sent, sys.maxsize))
            much = f"{left} updates had not arrived" if left else "it had not closed"
            self._all.warn(self.name, f"{much} when it was no longer waited for")
        self._left = True

    def _follow(self) -> None:
        try:
            tracker = OPENERS[self.name](self._opening)
            self.where = tracker.where
            self._keep(tracker)
            self.opened.set()
            over = False
            while not over:
                over = self._over.wait(_EVERY_S)
                self._send(tracker)
                self._keep(tracker)
            tracker.end(*self._ended)
            self._safe = self._sent
            self._keep(tracker)
        except (Exception, SystemExit) as problem:
            if not self._left:
                self._left = True
                self._all.warn(self.name, f"it failed, and gets nothing more of this run: {_why(problem)}")
        finally:
            self.opened.set()

    def _send(self, tracker: Tracker) -> None:
        while (lines := self._since(self._sent, _AT_ONCE)) and not self._left:
            tracker.send([_figures(line) for line in lines])
            self._sent += len(lines)
            self._marks.append((time.monotonic() + tracker.writes_s, self._sent))

    def _keep(self, tracker: Tracker) -> None:
        """Write down how many lines can't be lost any more, where there are more than before."""
        while self._marks and self._marks[0][0] <= time.monotonic():
            self._safe = self._marks.popleft()[1]
        if not self._left and (tracker.kept, self._safe) != self._kept:
            self._kept = tracker.kept, self._safe
            self._all.keep(self.name, {**tracker.kept, "lines": self._safe})


def _figures(line: Line) -> Figures:
    """
    >>> _figures({"step": 3, "loss": "nan", "tokens": 12})
    (3, {'loss': nan, 'tokens': 12})
    """
    return int(line["step"]), {
        name: value if isinstance(value, int | float) else float(value) for name, value in line.items() if name != "step"
    }


def _why(problem: BaseException) -> str:
    """An error in one line."""
    said = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {said[:300]}" if said else type(problem).__name__
