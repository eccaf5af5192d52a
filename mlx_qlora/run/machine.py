"""What the system says about a process and its memory, on Linux and macOS. Whatever can't be found out is 0 or empty."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

_LINUX = os.uname().sysname == "Linux"  # sys.platform would have mypy look at one of two systems only
_GROUPS = Path("/sys/fs/cgroup")


def mlx_memory() -> dict[str, int]:
    """Bytes that MLX uses, used at most, and keeps for later. A process that has not imported MLX need not do it for this."""
    mx = sys.modules.get("mlx.core")
    if mx is None:
        return {}
    return {"active": mx.get_active_memory(), "peak": mx.get_peak_memory(), "cache": mx.get_cache_memory()}


def gpu_memory() -> int:
    """The bytes that a GPU can use at once; 0 where MLX computes on the CPU, or is not imported."""
    return _gpu_memory() if "mlx.core" in sys.modules else 0


@cache
def _gpu_memory() -> int:
    import mlx.core as mx

    try:
        info = {} if mx.default_device().type == mx.DeviceType.cpu else mx.device_info()
    except RuntimeError:
        return 0
    names = ("max_recommended_working_set_size", "memory_size", "total_memory")
    return next((int(info[name]) for name in names if info.get(name)), 0)


def process_memory() -> int:
    """The bytes of this process that count when the system looks for one to end."""
    try:
        if _LINUX:
            return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
        return _footprint()
    except (OSError, AttributeError, ValueError, IndexError):
        return 0


def _footprint() -> int:
    """macOS: `ri_phys_footprint` of rusage_info_v0, which includes what the GPU was given. It stands behind the uuid of
    16 bytes and seven numbers of 8."""
    info = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 0, info):
        return 0
    return int(struct.unpack_from("<Q", info, 16 + 7 * 8)[0])


def available_memory() -> tuple[int, int]:
    """(bytes that are left, bytes in all) of the machine, or of the container where that is less."""
    try:
        left, whole = _of_linux() if _LINUX else _of_macos()
    except (OSError, AttributeError, ValueError, IndexError, KeyError):
        return 0, 0
    return max(0, left), whole


def _of_linux() -> tuple[int, int]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[:8]}
    left, whole = known["MemAvailable"], known["MemTotal"]
    group = _group()
    if group is None:
        return left, whole
    files = ("memory.max", "memory.current") if (group / "memory.max").exists() else _OLD_FILES
    limit, used = ((group / name).read_text(encoding="ascii").strip() for name in files)
    if not limit.isdigit() or int(limit) >= whole:  # "max", or in version 1 a number beyond all bounds
        return left, whole
    stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    files_given_back = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return min(left, int(limit) - int(used) + files_given_back), int(limit)


_OLD_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@cache
def _group() -> Path | None:
    """The folder of this process's control group for memory, version 2 or 1. Inside a container the path that the
    kernel names may lie outside of what is mounted; its root is ours then."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = _GROUPS if controllers == "" else _GROUPS / "memory"
            name = "memory.max" if controllers == "" else _OLD_FILES[0]
            for folder in (root / path.lstrip("/"), root):
                if (folder / name).exists():
                    return folder
    return None


def out_of_memory_kills() -> int:
    """How many processes the kernel has ended for memory so far, in whichever group: a supervisor may stand outside of its
    run's."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _of_macos() -> tuple[int, int]:
    """The share that macOS itself calls free when it decides about memory pressure, of the physical memory."""
    whole, share = _sysctl("hw.memsize", 8), _sysctl("kern.memorystatus_level", 4)
    return whole * share // 100, whole


def _sysctl(name: str, size: int) -> int:
    value = ctypes.create_string_buffer(size)
    length = ctypes.c_size_t(size)
    if ctypes.CDLL(None).sysctlbyname(name.encode(), value, ctypes.byref(length), None, ctypes.c_size_t(0)):
        raise OSError(name)
    return int.from_bytes(value.raw, sys.byteorder)


@cache
def boot_id() -> str:
    """A word that is another one after each start of the machine."""
    try:
        if _LINUX:
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return _answer("sysctl", "-n", "kern.bootsessionuuid")
    except OSError:
        return ""


def pid_space() -> str:
    """Where process ids mean what they mean here: another container counts its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """When a process began, in some words of the system; empty where there is none. An id is given again, with another
    start."""
    try:
        if _LINUX:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            state, *numbers = text.rpartition(")")[2].split()
            return "" if state in "ZX" else numbers[18]  # a zombie has ended; field 22 of proc(5)
        state, _, start = _answer("ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)).partition(" ")
        return "" if state.startswith("Z") else start.strip()
    except (OSError, IndexError):
        return ""


def _answer(*command: str) -> str:
    """What a command prints; empty where it fails."""
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def kernel_log() -> list[str]:
    """The lines of the kernel's log, where an ordinary user may read them. Each begins with [seconds since the start]."""
    if not _LINUX:
        return []
    commands = (("dmesg",), ("journalctl", "--dmesg", "--boot", "--quiet", "--no-pager", "--output=short-monotonic"))
    return next((text.splitlines() for text in (_answer(*command) for command in commands) if text), [])
