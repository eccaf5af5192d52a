"""Ctrl-C and SIGTERM: the first asks the run to stop after the current update, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def listening(on_ask: Callable[[], None]) -> Iterator[StopRequest]:
    """Inside, a first SIGINT or SIGTERM only sets `asked`, so that no update is cut in half."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        on_ask()

    if threading.current_thread() is not threading.main_thread():
        yield request  # signals belong to the main thread; elsewhere nothing changes
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
