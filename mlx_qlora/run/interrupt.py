"""Signals: the first Ctrl-C, SIGTERM or SIGHUP asks the run to stop after the current update, the second ends it at once,
and SIGUSR1 asks it to save now."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

_STOP = ("SIGINT", "SIGTERM", "SIGHUP")  # the last one comes when a terminal is closed
_SAVE = ("SIGUSR1",)
_SAME_WISH_S = 0.5  # `timeout`, systemd and Slurm signal a process and its group: that is one wish, said twice


class Asked:
    """What somebody asked of the run."""

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self.at = 0.0


@contextmanager
def listening(on_stop: Callable[[], None]) -> Iterator[Asked]:
    """Inside, a first signal to stop only sets `stop`, so that no update is cut in half."""
    asked = Asked()

    def stop(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked.stop and now - asked.at > _SAME_WISH_S:
            raise KeyboardInterrupt
        if asked.stop:
            return
        asked.stop, asked.at = True, now
        with suppress(OSError, RuntimeError):  # the terminal is gone, or a print was interrupted
            on_stop()

    def save(number: int, frame: FrameType | None) -> None:
        asked.save = True

    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals belong to the main thread; elsewhere nothing changes
        return
    handlers = dict.fromkeys(_STOP, stop) | dict.fromkeys(_SAVE, save)
    numbers = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    # `nohup` and `trap ''` mean that a signal to stop is not to be heard. A supervised run begins with SIGUSR1 ignored.
    heard = {number: handler for number, handler in numbers.items() if handler is save or not _ignored(number)}
    with _handled(heard):
        yield asked


@contextmanager
def unhurt() -> Iterator[None]:
    """Inside, SIGUSR1 does nothing while nobody listens to it, as a run loads or answers: by default it ends a process."""
    numbers = {getattr(signal, name) for name in _SAVE if hasattr(signal, name)}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled({number: _nothing for number in numbers if signal.getsignal(number) == signal.SIG_DFL}):
        yield


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler, and not SIG_IGN, which processes that are started meanwhile would have too."""


def _ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


@contextmanager
def _handled(handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python
