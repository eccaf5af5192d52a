"""A real browser without a screen and without a network: what a page becomes in it, and what it complains of."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


def browser() -> str:
    """The program. Without one the test is skipped, but where MLX_QLORA_NEEDS_BROWSER says that there has to be one."""
    found = next(filter(None, map(shutil.which, _NAMES)), _MAC if Path(_MAC).exists() else "")
    if not found and os.environ.get("MLX_QLORA_NEEDS_BROWSER"):
        pytest.fail(f"none of {', '.join(_NAMES)} is installed")
    if not found:
        pytest.skip("Chromium is not installed")
    return found


@dataclass(frozen=True)
class Opened:
    dom: str  # as it is after loading
    console: list[str]  # errors, warnings, refused requests


def opened(page: Path) -> Opened:
    """A page from disk. Every name of a host is unknown, so that what it would load from a network is an error."""
    done = _run(page, "--dump-dom")
    return Opened(done.stdout, re.findall(r"CONSOLE.*", done.stderr))


def screenshot(page: Path, to: Path, width: int = 1280, height: int = 3000, dark: bool = False) -> None:
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _run(page, f"--screenshot={to}", f"--window-size={width},{height}", *scheme)


def _run(page: Path, *more: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            [
                browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
                "--no-first-run", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", *more, page.resolve().as_uri(),
            ],
            check=True, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
