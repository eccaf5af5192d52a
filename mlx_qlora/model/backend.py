"""Which device computes, with which BLAS, in which dtype.

Nothing here imports MLX when the module is imported: `preload_blas` has to run before `import mlx.core`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

_PIP_BLAS = "libmkl_rt.so*"  # what the `cpu` extra brings, into the lib/ of the environment
_SYSTEM_BLAS = ("openblas", "mkl_rt")


@dataclass(frozen=True)
class Blas:
    """The BLAS in front of the one that MLX's Linux wheel bundles; an empty `path` when there is none."""

    path: str = ""
    too_late: bool = False  # MLX was imported first, so its own stays in use

    @property
    def fast(self) -> bool:
        return bool(self.path) and not self.too_late


_loaded: Blas | None = None


def preload_blas() -> Blas:
    """Put a fast BLAS in front of the reference one that MLX's Linux wheel bundles; the first call decides.

    512x1024x1024 in float32 on 2 cores: 175 ms bundled, 6.1 ms with MKL, 5.4 ms with OpenBLAS. Works only before
    MLX is imported. `MLX_QLORA_BLAS` names a library to take instead, or is `none`.
    """
    global _loaded
    if _loaded is None:
        _loaded = _preload()
    return _loaded


def _preload() -> Blas:
    if sys.platform != "linux" or os.environ.get("MLX_QLORA_BLAS") == "none":
        return Blas()
    for path in _candidates():
        if "mlx.core" in sys.modules:
            return Blas(path, too_late=True)
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return Blas(path)
    return Blas()


def _candidates() -> list[str]:
    named = os.environ.get("MLX_QLORA_BLAS")
    if named:
        return [named]
    found = [str(path) for path in sorted(Path(sys.prefix, "lib").glob(_PIP_BLAS))]
    found += [name for name in map(ctypes.util.find_library, _SYSTEM_BLAS) if name]
    return found


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_LARGE = 2**31 - 1
_reused = False


def reuse_memory() -> bool:
    """On the CPU, let freed memory stay with the process, to be used again; says whether that is so.

    MLX's CPU backend takes each array from malloc, and glibc gives every large one back to the system when it is freed,
    so that the next one costs a page fault for each 4 KB. Eight sums of 10 MB: 34 ms as it comes, 5 ms so.
    """
    global _reused
    if not _reused and sys.platform == "linux" and on_cpu():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        sizes = ((_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, _LARGE), (_M_TOP_PAD, 64 << 20))
        _reused = mallopt is not None and all(mallopt(which, size) for which, size in sizes)
    return _reused


def missing_mlx() -> str:
    """What to do where MLX is not there to compute with; empty where it is.

    On Linux the package `mlx` alone has no library: it comes with mlx[cpu] or mlx[cuda13].
    """
    spec = importlib.util.find_spec("mlx")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    if sys.platform != "linux" or any(list(folder.glob("lib*/libmlx.so")) for folder in folders):
        return ""
    return (
        "MLX has no library to compute with here. Install one: pip install 'mlx-qlora[cpu]', "
        "or with an NVIDIA GPU pip install 'mlx-qlora[cuda]'."
    )


_assumed_cpu: bool | None = None


@contextmanager
def assumed(cpu: bool | None) -> Iterator[None]:
    """Inside, everything is built as for a CPU or as for a GPU, whatever is here: to look ahead, not to compute."""
    global _assumed_cpu
    before, _assumed_cpu = _assumed_cpu, cpu
    try:
        yield
    finally:
        _assumed_cpu = before


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here."""
    import mlx.core as mx

    if _assumed_cpu is not None:
        return _assumed_cpu
    return mx.default_device().type == mx.DeviceType.cpu


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in, for weights stored as `stored`: bf16 and f16 are some 30 times slower on the CPU."""
    import mlx.core as mx

    return mx.float32 if on_cpu() else stored


def memory() -> int:
    """The bytes that this machine has for MLX: what a GPU recommends, or the physical memory, or what a container gets."""
    import mlx.core as mx

    info = {} if on_cpu() else mx.device_info()
    for name in ("max_recommended_working_set_size", "memory_size", "total_memory"):
        if info.get(name):
            return int(info[name])
    return physical_memory()


def physical_memory() -> int:
    """The bytes of this machine, or what a container gets of them."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(whole, int(given)) if given.isdigit() else whole


def describe() -> str:
    """One line about the device, and what would make it faster."""
    import mlx.core as mx

    if not on_cpu():
        return str(mx.device_info().get("device_name", "GPU"))
    blas = preload_blas()
    if sys.platform != "linux" or blas.fast:
        return f"CPU, {Path(blas.path).name.split('.so')[0]}" if blas.path else "CPU"
    if blas.too_late:
        return "CPU, MLX's own slow BLAS: import mlx_qlora before mlx, and training is about 10 times faster"
    return "CPU, MLX's own slow BLAS: pip install 'mlx-qlora[cpu]' or apt install libopenblas0-pthread, about 10 times faster"
