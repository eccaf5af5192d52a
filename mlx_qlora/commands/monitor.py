"""`mlx-qlora monitor RUN`: follows a run from another terminal. It only reads, so it may come and go as it likes."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console as Terminal
from rich.live import Live
from rich.text import Text

from mlx_qlora.errors import ConfigError, RunFolderError, require
from mlx_qlora.look.comparison.contender import seed_folders
from mlx_qlora.look.console import answered
from mlx_qlora.look.history import read_history
from mlx_qlora.look.monitor.follow import Follower
from mlx_qlora.look.monitor.screen import screen
from mlx_qlora.look.monitor.terminal import stdout_shows_unicode
from mlx_qlora.look.monitor.vitals import Seen, seen

_LEAST_S = 0.2
_SURE_S = 4.0  # dead for so long: no supervisor starts it again


@dataclass(frozen=True)
class _Arguments:
    """Follow a run from another terminal, or see how one ended. Ctrl-C stops looking; the run does not notice."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = ""
    """The folder of a run: what train's --output-dir said."""
    output_dir: str = ""
    """The same."""
    refresh: float = 2.0
    """Seconds between two looks, from 0.2 on."""
    once: bool = False
    """Print how it stands, and end."""


def main(arguments: Sequence[str]) -> int:
    """0: the run ended, or you have seen enough (Ctrl-C), or --once is done; 2: the input is wrong."""

    def shown() -> int:
        return _run(tyro.cli(_Arguments, prog="mlx-qlora monitor", args=arguments))

    return answered("monitor", shown)


def _run(given: _Arguments) -> int:
    if given.run and given.output_dir and given.run != given.output_dir:
        raise ConfigError(f"{given.run} and --output-dir {given.output_dir} came; one folder is expected.")
    folder = given.run or given.output_dir
    if not folder:
        raise ConfigError("the folder of a run is missing: mlx-qlora monitor RUN, with what train's --output-dir said.")
    require((_LEAST_S <= given.refresh < 1e6, "refresh", given.refresh, f"seconds from {_LEAST_S} on"))
    follower = Follower(_of_seeds(folder))
    if follower.folder.exists() and not follower.folder.is_dir():
        raise RunFolderError(f"{follower.folder}: it is a file; the folder of a run is expected.")
    terminal = Terminal(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if given.once:
        return _once(follower, terminal)
    live = sys.stdout.isatty() and not terminal.is_dumb_terminal
    return (_follow if live else _report)(follower, terminal, given.refresh)


def _of_seeds(folder: str) -> str:
    """Of runs with several seeds, the one that was written to last."""
    found = seed_folders(Path(folder).expanduser())
    return str(max(found, key=_written_at)) if found else folder


def _written_at(folder: Path) -> float:
    return max(file.stat().st_mtime for file in folder.iterdir())


def _once(follower: Follower, terminal: Terminal) -> int:
    now = seen(follower.look())
    if now.record is None:
        read_history(follower.folder)  # says what is missing, where there is no run
    _print(now, terminal)
    return 0


def _print(now: Seen, terminal: Terminal) -> None:
    size = terminal.size
    height = max(10, min(size.height - 2, 50)) if sys.stdout.isatty() else max(24, size.height)  # room for the prompt
    lines = screen(now, size.width, height, stdout_shows_unicode())
    terminal.print(*lines, *_advice(now), sep="\n")


def _advice(now: Seen) -> list[Text]:
    """What comes next where a run died or hangs."""
    if now.pulse.state not in ("died", "hangs"):
        return []
    return [Text(f"mlx-qlora doctor {shlex.quote(str(now.history.folder))} says more")]


def _looks(follower: Follower, refresh: float, terminal: Terminal) -> Iterator[Seen]:
    """What is seen, again and again until the run is over."""
    dead_since: float | None = None
    while True:
        now = seen(follower.look())
        yield now
        if now.pulse.state == "ended":
            return
        if now.pulse.state == "died":
            dead_since = dead_since or time.monotonic()
            if time.monotonic() - dead_since >= _SURE_S:
                return
        else:
            dead_since = None
        _wait(min(refresh, 1.0) if dead_since else refresh, terminal)


def _wait(seconds: float, terminal: Terminal) -> None:
    """Until it is time to look again, or the terminal has another size."""
    until, before = time.monotonic() + seconds, terminal.size
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _LEAST_S))
        if terminal.size != before:
            return


def _follow(follower: Follower, terminal: Terminal, refresh: float) -> int:
    """On a screen of its own, which is left as it was; how the run ended stays in the terminal."""
    now: Seen | None = None
    unicode = stdout_shows_unicode()
    try:
        with _ended_politely(), Live(console=terminal, screen=True, auto_refresh=False) as live:
            live.update(Text(f"reading {follower.folder} ..."), refresh=True)  # 300,000 updates take some seconds once
            for now in _looks(follower, refresh, terminal):
                size = terminal.size
                lines = screen(now, size.width, size.height - len(_advice(now)), unicode)
                live.update(Text("\n", no_wrap=True, overflow="crop").join([*lines, *_advice(now)]), refresh=True)
    except KeyboardInterrupt:
        _goodbye(now, follower)
        return 0
    if now:
        _print(now, terminal)
    return 0


def _report(follower: Follower, terminal: Terminal, refresh: float) -> int:
    """Without a terminal: the whole whenever there was a validation or the run's state changed."""
    before = None
    try:
        for now in _looks(follower, refresh, terminal):
            stands = now.pulse.state, len(now.history.validations)
            if stands != before:
                if before:
                    print()
                _print(now, terminal)
                sys.stdout.flush()
                before = stands
    except KeyboardInterrupt:
        return 0
    return 0


def _goodbye(now: Seen | None, follower: Follower) -> None:
    if now and now.pulse.state in ("begins", "running", "hangs"):
        planned = f"/{now.planned:,}" if now.planned else ""
        again = f"mlx-qlora monitor {shlex.quote(str(follower.folder))}"
        print(f"the run goes on (update {now.history.step:,}{planned}); to look again: {again}")


@contextmanager
def _ended_politely() -> Iterator[None]:
    """A monitor that is asked to end by others than Ctrl-C leaves the terminal as it was, too."""

    def end(number: int, _: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
