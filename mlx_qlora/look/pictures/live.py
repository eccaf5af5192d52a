"""Pictures in a notebook: of runs that are over, and of one that goes on while its cell runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.errors import ConfigError, MlxQloraError, require
from mlx_qlora.look.history import read_history
from mlx_qlora.look.pictures.figures import png, require_matplotlib, results
from mlx_qlora.run.disk import write_atomically

_SHARE = 0.05  # of the time may go into drawing: what is drawn is computed beside the training


@dataclass(frozen=True)
class Picture:
    """A PNG that a notebook shows by itself."""

    png: bytes

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: str | Path) -> None:
        write_atomically(Path(path), self.png, flushed=False)


def curves(*folders: str | Path) -> Picture:
    """The curves of a run, or of several over each other, as far as they are.

    A cell that ends with `curves("runs/a", "runs/b")` shows them.
    """
    require_matplotlib("curves")
    return Picture(png(results([read_history(folder) for folder in folders])))


@contextmanager
def live_curves(*folders: str | Path, refresh: float = 5.0) -> Iterator[None]:
    """Draw the curves of runs under a notebook's cell, anew every `refresh` seconds, while what stands inside is done.

        with live_curves("runs/v2"):
            train(config)

    They are drawn from the run's folder, beside the training and at most a twentieth of its time.
    """
    require((refresh > 0, "refresh", refresh, "seconds above 0"))
    require_matplotlib("live_curves")
    over = threading.Event()
    drawing = threading.Thread(target=_draw, args=(lambda: curves(*folders), _shown(), over, refresh), daemon=True)
    drawing.start()
    try:
        yield
    finally:
        over.set()
        drawing.join()


def _draw(draw: Callable[[], Picture], show: Callable[[Picture], None], over: threading.Event, refresh: float) -> None:
    """Until it is over, and then once more: the last picture has all of it."""
    pause, last = refresh, False
    while not last:
        last = over.wait(pause)
        began = time.thread_time()
        try:
            show(draw())
        except MlxQloraError:  # the folder is not there yet
            continue
        except Exception as problem:  # the training beside it goes on
            print(f"WARNING: the curves are no longer drawn: {type(problem).__name__}: {problem}")
            return
        pause = max(refresh, (time.thread_time() - began) / _SHARE)


def _shown() -> Callable[[Picture], None]:
    """What shows a picture in place of the one before."""
    if "ipykernel" not in sys.modules:
        raise ConfigError("live_curves: it draws under the cell of a notebook, and this is none; curves(...).save(path) does.")
    from IPython.display import display

    handle: Any = None

    def show(picture: Picture) -> None:
        nonlocal handle
        if handle is None:
            handle = display(picture, display_id=True)
        else:
            handle.update(picture)

    return show
