"""The facts of a machine that decide whether training works here. Nothing imports MLX: it may be what is broken."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from mlx_qlora.findings import Finding, each_of, fail, ok, size, warn
from mlx_qlora.model import backend
from mlx_qlora.run.machine import available_memory as left_and_whole

_MAC = sys.platform == "darwin"
_OLDEST_MACOS = 14  # MLX's wheels are built for it
# What ships MLX's library; each must be of the same release as `mlx` itself.
_BACKENDS = ("mlx-cpu", "mlx-metal", "mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")
CACHE = Path("~/.cache/mlx_qlora")
_SLOW_WRITE_S = 0.5
_LITTLE_DISK, _NO_DISK = 2e9, 1e8
_LITTLE_MEMORY = 2e9
_FEW_FILES = 256


def machine() -> Iterator[Finding]:
    """All that can be known before MLX is imported."""
    return each_of(
        (
            ("python", _python),
            ("packages", _packages),
            ("blas", _blas),
            ("memory", _memory),
            ("wired", _wired),
            ("disk", _disk),
            ("locks", _locks),
            ("open files", _open_files),
            ("compiler", _compiler),
        )
    )


def _asked(*command: str) -> str:
    """What a command prints, or nothing where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _python() -> Iterable[Finding]:
    system = f"macOS {platform.mac_ver()[0]}" if _MAC else f"{platform.system()} {platform.release()}"
    found = f"{platform.python_version()} on {system}, {platform.machine()}"
    if _MAC and platform.machine() == "x86_64" and _asked("sysctl", "-n", "sysctl.proc_translated") == "1":
        yield fail(
            "python",
            f"{found}: a Python for Intel, translated by Rosetta",
            "MLX has no Metal there. Install a Python for Apple Silicon (python.org, or brew under /opt/homebrew) "
            "and make the environment anew with it.",
        )
        return
    if _MAC and int((platform.mac_ver()[0] or "0").split(".")[0]) < _OLDEST_MACOS:
        yield fail("python", found, f"MLX needs macOS {_OLDEST_MACOS} or newer.")
        return
    yield ok("python", found)


def _packages() -> Iterable[Finding]:
    """Versions against what this package and mlx-lm ask for."""
    from packaging.requirements import Requirement

    wrong, versions = [], {"mlx-qlora": metadata.version("mlx-qlora")}
    for asker in ("mlx-qlora", "mlx-lm"):
        for line in _requires(asker):
            need = Requirement(line)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            have = _version(need.name)
            versions[need.name] = have or "missing"
            if not have or not need.specifier.contains(have, prereleases=True):
                wrong.append((need.name, have, str(need.specifier), asker))
    found = ", ".join(f"{name} {versions[name]}" for name in _NAMED if name in versions)
    for name, have, wanted, asker in wrong:
        yield fail(
            "packages",
            f"{name} {have or 'is missing'}: {asker} needs {wanted or 'it'}",
            f"pip install -U '{name}{wanted}'",
            versions=versions,
        )
    apart = [f"{name} {have}" for name in _BACKENDS if (have := _version(name)) and have != _version("mlx")]
    if apart:
        yield fail(
            "packages",
            f"{', '.join(apart)} beside mlx {_version('mlx')}: they must be of one release",
            f"pip install -U 'mlx=={_version('mlx')}' '{apart[0].replace(' ', '==').split('==')[0]}=={_version('mlx')}'",
        )
    if not wrong and not apart:
        yield ok("packages", found, versions=versions)


_NAMED = ("mlx-qlora", "mlx", "mlx-lm", "transformers", "numpy", "safetensors")


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """The releases of all packages that have a part in a run."""
    names = {*_NAMED, *_BACKENDS, "tokenizers", "huggingface_hub", "sentencepiece", "protobuf", "Jinja2", "datasets", "pyarrow"}
    names |= {"tqdm", "tyro", "pyyaml", "mkl", "matplotlib", "typeguard"}
    return {name: have for name in sorted(names, key=str.lower) if (have := _version(name))}


def _blas() -> Iterable[Finding]:
    if sys.platform != "linux":
        yield ok("blas", "Accelerate, the system's own" if _MAC else "the system's own")
        return
    blas = backend.preload_blas()
    if blas.fast:
        yield ok("blas", f"{Path(blas.path).name}, in front of the slow one in MLX's wheel")
    elif blas.too_late:
        yield warn("blas", "MLX was imported before a fast BLAS could be", "In your program: import mlx_qlora before mlx.")
    elif _version("mlx-cuda-13") or _version("mlx-cuda-12"):
        yield ok("blas", "none but MLX's own; on the GPU nothing needs one")
    else:
        slow = "only the slow one in MLX's wheel: training is about 10 times slower"
        if os.environ.get("MLX_QLORA_BLAS") == "none":
            yield warn("blas", f"{slow}, and MLX_QLORA_BLAS=none asks for that", "unset MLX_QLORA_BLAS")
        else:
            yield warn("blas", slow, "pip install 'mlx-qlora[cpu]' (x86), or: apt install libopenblas0-pthread")


def available_memory() -> int | None:
    """Bytes that could be had now without anything being pushed out; None where the system does not say."""
    left, whole = left_and_whole()
    return left if whole else None


def _memory() -> Iterable[Finding]:
    whole, free = backend.physical_memory(), available_memory()
    found = f"{size(whole)}{f', {size(free)} of it free now' if free is not None else ''}"
    if free is not None and free < _LITTLE_MEMORY:
        yield warn(
            "memory",
            found,
            "Close what needs much memory (browsers do). mlx-qlora plan says what a run will need.",
            total_bytes=whole,
            free_bytes=free,
        )
    else:
        yield ok("memory", found, total_bytes=whole, free_bytes=free)


def _wired() -> Iterable[Finding]:
    """How much of a Mac's memory its GPU may keep from being swapped. Not tried on a Mac: none was at hand."""
    if not _MAC:
        yield ok("wired", "a limit of Macs; there is none here")
        return
    said, whole = _asked("sysctl", "-n", "iogpu.wired_limit_mb"), _asked("sysctl", "-n", "hw.memsize")
    if not said.isdigit() or not whole.isdigit():
        yield ok("wired", "this system does not say")
        return
    limit, share = int(said) * 2**20, int(said) * 2**20 / int(whole)
    if limit == 0:
        yield ok("wired", "the system's default: the GPU may have about two thirds to three quarters of the memory")
    elif share < 0.5:
        yield warn(
            "wired",
            f"iogpu.wired_limit_mb is {said}: the GPU may have only {share:.0%} of {size(int(whole))}",
            "The default lets it have more: sudo sysctl iogpu.wired_limit_mb=0",
        )
    elif share > 0.9:
        yield warn(
            "wired",
            f"iogpu.wired_limit_mb is {said}: the GPU may take {share:.0%} of {size(int(whole))}, and the system may freeze",
            f"Leave it a tenth: sudo sysctl iogpu.wired_limit_mb={int(int(whole) * 0.85) >> 20}",
        )
    else:
        yield ok("wired", f"iogpu.wired_limit_mb is {said}: the GPU may have {share:.0%} of {size(int(whole))}")


def _existing(path: Path) -> Path:
    """A folder, or what is there of the way to it: nothing is made only to look."""
    return next(place for place in (path, *path.parents) if place.exists())


def _disk() -> Iterable[Finding]:
    places = {"this folder": Path.cwd(), str(CACHE): CACHE.expanduser(), "the temp folder": Path(tempfile.gettempdir())}
    fine: dict[tuple[int, str], list[str]] = {}
    for name, path in places.items():
        place = _existing(path)
        free = shutil.disk_usage(place).free
        try:
            seconds = _write(place)
        except OSError as error:
            yield _not_writable(name, error)
            continue
        found = f"{name}: {size(free)} free"
        if free < _NO_DISK:
            yield fail("disk", found, "Make room: nothing can be kept here.")
        elif free < _LITTLE_DISK:
            yield warn("disk", found, "Make room: checkpoints and prepared data need some, a 7B model 4 GB.")
        elif seconds > _SLOW_WRITE_S:
            slow = "A network or cloud folder? Checkpoints wait for it: name an --output-dir on a disk of this machine."
            yield warn("disk", f"{found}, but writing 1 MB to it took {seconds:.1f} s", slow)
        else:
            fine.setdefault((place.stat().st_dev, size(free)), []).append(name)
    if fine:
        yield ok("disk", "; ".join(f"{', '.join(names)}: {free} free, can be written" for (_, free), names in fine.items()))


def _not_writable(name: str, error: OSError) -> Finding:
    remedies = {
        "this folder": "Runs must go elsewhere: --output-dir FOLDER.",
        str(CACHE): "Measurements are then made again each time. Allow writing to ~/.cache, or set HOME to a folder of yours.",
        "the temp folder": "Name one that is: export TMPDIR=FOLDER",
    }
    return warn("disk", f"{name} can't be written: {error.strerror}", remedies[name])


def _write(place: Path) -> float:
    """Seconds until a megabyte is on the disk, which is what a checkpoint waits for."""
    with tempfile.NamedTemporaryFile(dir=place, prefix=".mlx-qlora-doctor-") as file:
        begun = time.perf_counter()
        file.write(os.urandom(2**20))
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - begun


def _locks() -> Iterable[Finding]:
    """Whether two processes here can keep out of each other's way: prepared data lie beside the data."""
    import fcntl

    try:
        with tempfile.NamedTemporaryFile(dir=Path.cwd(), prefix=".mlx-qlora-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:
        return  # can't be written, which was said above
    except OSError as error:
        yield warn(
            "locks",
            f"the file system of this folder has no locks ({error.strerror})",
            "Two runs at once could disturb each other: keep data and runs on a local disk, or run one at a time.",
        )
        return
    yield ok("locks", "the file system of this folder has them")


def _open_files() -> Iterable[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _FEW_FILES:
        yield warn("open files", f"a process may have only {soft} open at once", "Before training: ulimit -n 4096")
    else:
        yield ok(
            "open files", f"a process may have {'any number' if soft == resource.RLIM_INFINITY else f'{soft:,}'} open at once"
        )


def _compiler() -> Iterable[Finding]:
    """MLX compiles with g++ on the CPU; without one it runs the same operations one by one, without a word."""
    if _MAC:
        yield ok("compiler", "only MLX on the CPU would need one; Metal brings its own")
    elif shutil.which("g++"):
        yield ok("compiler", f"{_asked('g++', '--version').splitlines()[0]}, for compile: on with the CPU")
    else:
        yield ok("compiler", "no g++: with compile: on, the CPU would run the steps uncompiled; the default needs none")
