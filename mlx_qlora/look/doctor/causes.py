"""What a run most likely ended of, with the reasons and the doubt."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_qlora.look.console import size
from mlx_qlora.look.doctor.evidence import SHORT, Evidence, short_of_memory
from mlx_qlora.run import machine
from mlx_qlora.run.recorder import place
from mlx_qlora.run.watchdog import CRASH, STALLED

# The causes that a finding can name.
MEMORY, NATIVE, KILLED, POWER, STUCK = "memory", "native crash", "killed", "power", "stuck"
NOT_FINITE, DISK, FAILED, INTERRUPTED = "not finite", "disk full", "failed", "interrupted"


@dataclass(frozen=True)
class Finding:
    """What a run most likely ended of."""

    cause: str
    headline: str
    why: Sequence[str]
    doubt: str = ""


# --- a run that said how it ended


def ended(found: Evidence, how: str) -> Finding:
    detail = found.record.detail if found.record.ended else ""
    steps = _steps(found)
    if how == "finished":
        return Finding("finished", f"finished{steps}", ["That is all it had to do."])
    if how == "stopped early":
        return Finding(
            how, f"stopped early{steps}", ["Validation did not get better any more. The best adapters found are kept."]
        )
    if how == "interrupted":
        return Finding(INTERRUPTED, f"was interrupted{steps}", ["Somebody asked it to stop: Ctrl-C, or kill."])
    if how == "not finite":
        return Finding(NOT_FINITE, "stopped because losses or gradients were no numbers", _paragraphs(detail))
    if _NO_SPACE.search(detail):
        why = [*_paragraphs(detail), "The disk, or your quota on it, is full."]
        return Finding(DISK, "failed because the disk is full", why)
    if _NO_MEMORY.search(detail):
        return Finding(MEMORY, "failed for want of memory", _paragraphs(detail))
    why = _paragraphs(detail) or ["It left no message; the terminal where it ran may show one."]
    return Finding(FAILED, "failed with an error", why)


_NO_SPACE = re.compile(r"no space left|disk quota exceeded|errno 28\b|errno 122\b|disk is full", re.IGNORECASE)
_NO_MEMORY = re.compile(
    r"memoryerror|out of memory|insufficient memory|unable to allocate|attempting to allocate|failed to allocate|bad_alloc"
    r"|cannot allocate memory",
    re.IGNORECASE,
)


# --- a run that died without a word


def died(found: Evidence) -> Finding:
    """The first of these that has something to say; the surest come first."""
    ways: tuple[Callable[[Evidence], Finding | None], ...] = (_by_kernel, _by_fault, _by_restart, _by_hang, _by_pressure)
    return next((finding for way in ways if (finding := way(found))), _from_outside(found))


def _by_kernel(found: Evidence) -> Finding | None:
    """Whether the kernel says that it ended this process, or one like it at that moment, for memory."""
    record = found.record
    if place(record) != "here":
        return None
    last = max(record.entered_monotonic, float(record.beat.get("monotonic", 0.0)))
    headline = "was ended by the system because memory ran out"
    for line in machine.kernel_log():
        if (match := _OOM.search(line)) is None:
            continue
        after, pid, name = float(match[1]) - last, int(match[2]), match[3]
        if pid == record.pid and abs(after) < 300:
            return Finding(MEMORY, headline, [f"The kernel's log says so: {line[match.start(2) - 15 :].strip()[:120]}"])
        if name.startswith(("python", "mlx-qlora")) and -5 < after < 60:
            why = [f"The kernel's log has such an end of a process named {name} within a minute of the last sign of life."]
            return Finding(MEMORY, headline, why, "Inside a container process ids differ, so it may have been another one.")
    kills = machine.out_of_memory_kills() - int(record.beat.get("out_of_memory_kills", sys.maxsize))
    if kills > 0:
        why = ["Since the last heartbeat the system has ended a process of this container (control group) for memory."]
        return Finding(MEMORY, headline, why, "It counts processes without naming them.")
    return None


_OOM = re.compile(r"\[\s*(\d+\.\d+)\].*Killed process (\d+) \(([^)]*)\)")


def _by_fault(found: Evidence) -> Finding | None:
    """What faulthandler wrote as the process ended by a fault of its own."""
    match = _FAULT.search(found.crash)
    if match is None:
        return None
    stacks = found.crash[match.end() :]  # a thread of MLX's own has no stack of Python; then the main one, the last, tells
    at = _place(stacks.partition("Current thread")[2]) or _place(stacks.rpartition("\nThread 0x")[2])
    why = [f"{found.folder / CRASH} says: {match[0]}.", *at, *_meaning(match[1])]
    if match[1] == "Aborted" and short_of_memory(found.beat):
        why += ["Memory was nearly full at the last heartbeat, so this is most likely memory."]
        return Finding(MEMORY, "crashed in native code, most likely for want of memory", why, _DOUBT_ABORT)
    return Finding(NATIVE, f"crashed in native code ({match[1].lower()})", why, _DOUBT_ABORT if match[1] == "Aborted" else "")


_FAULT = re.compile(r"Fatal Python error: ([A-Za-z -]+)")
_DOUBT_ABORT = "The last lines in the terminal say what the library gave up on; they decide."


def _meaning(fault: str) -> list[str]:
    return {
        "Aborted": [
            "A native library gave up. MLX does so when the GPU runs out of memory ('[METAL] ... Insufficient Memory') "
            "or takes too long."
        ],
        "Bus error": ["Memory that stands for a file could not be had: most often the disk is full or was taken away."],
        "Segmentation fault": [
            "Native code touched memory that is not its own: a bug in a library, or a damaged installation."
        ],
    }.get(fault, [])


def _place(stack: str, first: bool = True) -> list[str]:
    """Where a thread was. faulthandler writes the innermost call first, the watchdog last."""
    frames = re.findall(r'File "(.*?)", line (\d+),? in (\S+)', stack.partition("\n\n")[0])
    return [f"Python was in {name}, {file}:{line}." for file, line, name in (frames[:1] if first else frames[-1:])]


def _by_restart(found: Evidence) -> Finding | None:
    if place(found.record) != "restarted":
        return None
    why = ["The machine was started again since: a power cut, an update, a crash of the system."]
    if short_of_memory(found.beat):
        why += ["Memory was nearly full at the last heartbeat; a system that runs out of it can fall as a whole."]
    doubt = "The run may have died of something else before that; what the kernel knew is gone."
    return Finding(POWER, "died without a word, and the machine was restarted since", why, doubt)


def _by_hang(found: Evidence) -> Finding | None:
    """A stall that was going on when the run ended."""
    last = found.stalled.rstrip().rpartition("\n--- ")[2]
    held = "Timeout (" in last.partition("\n")[2] or last.startswith("Timeout (")
    if not found.stalled or not (held or "no progress for" in last.partition("\n")[0]):
        return None
    at = _place(last.rpartition("Thread 0x")[2]) if held else _place(last.partition("\nthread MainThread")[2], first=False)
    what = "no thread of Python could run" if held else "it had stopped making progress"
    why = [f"Before its end {what}; {found.folder / STALLED} has what all threads were doing."]
    why += at
    why += _HANGS.get(found.record.phase, ["What computes did not come back: the GPU's driver, or a machine busy with others."])
    doubt = "It may have been slow rather than stuck: a machine that swaps looks the same."
    return Finding(STUCK, "hung, and was ended then", why, doubt)


_READING = ["It was reading: a disk or a network that does not answer is the usual reason."]
_HANGS = {"load": _READING, "tokenise": _READING, "batch": _READING, "save": ["It was writing: look at the disk."]}


def _by_pressure(found: Evidence) -> Finding | None:
    if not short_of_memory(found.beat):
        return None
    beat = found.beat
    left, whole = beat.get("available", 0), beat.get("total", 0)
    if left < SHORT * whole:
        why = [f"At the last heartbeat only {size(left)} of {size(whole)} were left ({left / whole:.0%})."]
    else:
        why = [f"MLX had taken up to {size(beat['peak'])} of the {size(beat['gpu'])} that the GPU may use."]
    why += ["A system that runs out of memory ends the largest process, without letting it say a word."]
    doubt = "Nobody wrote down that it was so. Somebody's `kill -9` or a closed terminal look the same."
    return Finding(MEMORY, "died without a word, most likely for want of memory", why, doubt)


def _from_outside(found: Evidence) -> Finding:
    why = [
        "No error, no crash, no lack of memory is on record: it was ended from outside, by something it could not answer.",
        "That is `kill -9`, a closed terminal or SSH connection, a job's time limit, or a container that was stopped.",
    ]
    beat = found.beat
    if beat.get("total"):
        left = f"{size(beat['available'])} of {size(beat['total'])} were left then"
        doubt = f"Memory can't be ruled out: {left}, but it can fill up between two heartbeats."
    else:
        doubt = "Memory can't be ruled out: no heartbeat tells how much was left."
    return Finding(KILLED, "died without a word", why, doubt)


def _steps(found: Evidence) -> str:
    steps, planned = found.summary.get("steps"), found.summary.get("planned_steps")
    return f" after {steps:,} of {planned:,} updates" if isinstance(steps, int) and isinstance(planned, int) else ""


def _paragraphs(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]
