"""The supervisor against real processes: children that are killed, crash, hang, stop, and that take too much memory."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlx_qlora.run.child import Patience, Standing, Watch
from mlx_qlora.run.recorder import Recorder
from mlx_qlora.run.supervise import Death, _memory, recorded, supervise

WAITING = Patience(pause_s=0.0, tick_s=0.02)
QUICK = Patience(grace_s=0.3, beat_s=0.6, abort_s=0.5, pause_s=0.0, tick_s=0.02)  # where a hang is meant

# What every child begins with: it counts its starts and can say how it stands.
CHILD = """
import json, os, resource, signal, sys, time
from pathlib import Path

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
folder, budget = Path(sys.argv[1]), int(sys.argv[2])
with (folder / "starts").open("a") as file:
    file.write(f"{budget}\\n")
start = len((folder / "starts").read_text().split())
budget = budget or 4096

def stand(phase, update, limit_s=0.0, short=False, budget=budget, pid=os.getpid()):
    now = time.time()
    aside = folder / "standing.tmp"
    aside.write_text(json.dumps([pid, phase, update, budget, now, now, limit_s, short]))
    aside.replace(folder / "standing")

def die(number):
    os.kill(os.getpid(), number)
    time.sleep(10)

def note(name, value=""):
    aside = folder / f"{name}.tmp"
    aside.write_text(str(value))
    aside.replace(folder / name)

def count(*numbers):
    "Of each signal, how often it came."
    came = dict.fromkeys((signal.Signals(number).name for number in numbers), 0)
    def add(number, frame):
        came[signal.Signals(number).name] += 1
    for number in numbers:
        signal.signal(number, add)
    return came

def wait(until, seconds=8.0):
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.01)
"""


def standing(folder: Path) -> Standing | None:
    try:
        return Standing(*json.loads((folder / "standing").read_text()))
    except FileNotFoundError:
        return None


def command(folder: Path, body: str) -> Callable[[int | None], Sequence[str]]:
    # Without site-packages where they are not needed: a start takes 20 ms.
    quick = [] if "mlx" in body else ["-S"]
    return lambda budget: [sys.executable, *quick, "-c", CHILD + body, str(folder), str(budget or 0)]


@dataclass
class Supervised:
    """What came of a supervised run."""

    code: int
    folder: Path
    said: list[str] = field(default_factory=list)

    @property
    def budgets(self) -> list[int]:
        """With which budget each start was asked for; 0 is: as configured."""
        return [int(line) for line in (self.folder / "starts").read_text().split()]

    @property
    def journal(self) -> list[dict[str, Any]]:
        path = self.folder / "supervision.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


def go(folder: Path, body: str, times: int = 5, patience: Patience = WAITING) -> Supervised:
    result = Supervised(-1, folder)
    result.code = supervise(command(folder, body), folder, times, result.said.append, standing, patience)
    return result


@pytest.mark.parametrize("code", [0, 2, 3, 130])
def test_what_the_run_decided_stands(tmp_path: Path, code: int) -> None:
    result = go(tmp_path, f"stand('update', 7); sys.exit({code})")
    assert (result.code, result.budgets, result.said, result.journal) == (code, [0], [], [])


@pytest.mark.parametrize(
    ("name", "memory"), [("SIGKILL", True), ("SIGSEGV", True), ("SIGABRT", True), ("SIGBUS", False), ("SIGTRAP", False)]
)
def test_a_death_by_signal_while_computing(tmp_path: Path, name: str, memory: bool) -> None:
    result = go(tmp_path, f"stand('backward', 37)\nif start == 1: die(signal.{name})")
    assert result.code == 0
    assert result.budgets == [0, 2048 if memory else 0]
    less = (" (it looks like a lack of memory)", " with at most 2,048 positions at once") if memory else ("", "")
    assert result.said == [
        f"the run died by {name} in backward of update 37{less[0]}: going on from its last checkpoint{less[1]}; restart 1 of 5",
        "the run finished after 1 restart",
    ]
    first, last = result.journal
    assert {key: value for key, value in first.items() if key != "time"} == {
        "how": name,
        "phase": "backward",
        "update": 37,
        "memory": "likely" if memory else "",
        "budget_before": 4096,
        "budget_after": 2048 if memory else None,
        "restart": 1,
    }
    assert (last["how"], last["restarts"], last["exit_code"]) == ("finished", 1, 0)


@pytest.mark.parametrize("phase", ["load", "tokenise", "save"])
def test_where_a_smaller_batch_would_not_help_the_budget_stays(tmp_path: Path, phase: str) -> None:
    assert go(tmp_path, f"stand({phase!r}, 4)\nif start < 3: die(signal.SIGKILL)").budgets == [0, 0, 0]


def test_the_smaller_budget_stays_for_later_restarts(tmp_path: Path) -> None:
    body = "stand(*[('forward', 3), ('save', 4), ('loss', 5), ('update', 9)][start - 1])\nif start < 4: die(signal.SIGKILL)"
    assert go(tmp_path, body).budgets == [0, 2048, 2048, 1024]


def test_memory_that_was_short_while_loading_is_told_and_changes_nothing(tmp_path: Path) -> None:
    result = go(tmp_path, "stand('load', 0, short=True)\nif start == 1: die(signal.SIGKILL)")
    assert result.budgets == [0, 0]
    assert result.said[0] == "the run died by SIGKILL in load (memory was short): starting it again; restart 1 of 5"


def test_an_error_while_memory_is_short_makes_the_next_start_smaller(tmp_path: Path) -> None:
    assert go(tmp_path, "stand('forward', 3, short=True)\nif start == 1: sys.exit(1)").budgets == [0, 2048]


def test_the_record_of_an_earlier_run_says_nothing_about_this_one(tmp_path: Path) -> None:
    result = go(tmp_path, "stand('backward', 12, pid=1)\nif start == 1: die(signal.SIGKILL)")
    assert result.budgets == [0, 0]
    assert result.said[0] == "the run died by SIGKILL before its first sign of life: starting it again; restart 1 of 5"


def test_the_same_error_at_the_same_place_ends_it(tmp_path: Path) -> None:
    result = go(tmp_path, "stand('forward', 3); sys.exit(1)")
    assert (result.code, result.budgets) == (3, [0, 0])
    assert "the same error came at the same place again" in result.said[-1]
    assert [line["how"] for line in result.journal] == ["exit 1", "exit 1", "gave up"]


def test_errors_at_other_places_are_other_errors(tmp_path: Path) -> None:
    result = go(tmp_path, "stand('forward', start); sys.exit(1)", times=3)
    assert (result.code, len(result.budgets)) == (3, 4)
    assert result.said[-1].startswith(
        "gave up: that was restart 3 of 3. The run\n  1. with up to 4,096 positions at once: ended"
    )


def test_the_budget_halves_down_to_its_floor_and_no_further(tmp_path: Path) -> None:
    body = "budget = min(budget, 40)\nstand('loss', start, budget=budget); die(signal.SIGKILL)"
    assert go(tmp_path, body, times=4).budgets == [0, 20, 16, 16, 16]


def test_the_same_update_with_nothing_left_to_make_smaller_ends_it(tmp_path: Path) -> None:
    result = go(tmp_path, "budget = min(budget, 40)\nstand('loss', 8, budget=budget); die(signal.SIGKILL)", times=9)
    assert (result.code, result.budgets) == (3, [0, 20, 16, 16])
    assert "nothing left to make smaller" in result.said[-1]
    assert "--max-seq-length" in result.said[-1]


def test_an_example_longer_than_the_budget_ends_it_too(tmp_path: Path) -> None:
    """The run can't lay out less than one example: what it stands at, not what it was asked for, is the floor."""
    result = go(tmp_path, "stand('loss', 8, budget=max(budget, 3000)); die(signal.SIGKILL)", times=9)
    assert (result.code, result.budgets) == (3, [0, 2048, 1500])


def test_no_restart_is_wanted(tmp_path: Path) -> None:
    result = go(tmp_path, "die(signal.SIGKILL)", times=0)
    assert (result.code, result.budgets) == (3, [0])


def test_a_run_without_progress_leaves_its_stacks_and_starts_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
import faulthandler
faulthandler.enable()
def stuck_here():
    time.sleep(30)
stand('forward', 5, limit_s=0.2)
if start == 1:
    stuck_here()
"""
    result = go(tmp_path, body, patience=QUICK)
    assert (result.code, result.budgets) == (0, [0, 0])
    assert result.said[0].startswith("the run hung and was ended (no progress for ")
    assert "stuck_here" in capfd.readouterr().err


def test_a_run_that_does_not_heed_sigabrt_is_killed_with_its_own_children(tmp_path: Path) -> None:
    body = """
if start == 1:
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    import subprocess
    helper = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])
    note('helper', helper.pid)
    stand('load', 0, limit_s=0.2)
    time.sleep(30)
"""
    result = go(tmp_path, body, patience=QUICK)
    assert (result.code, result.budgets) == (0, [0, 0])
    assert result.journal[0]["how"] == "hang"
    assert eventually(lambda: not running(result.read("helper")))


def test_a_stopped_process_is_a_hang(tmp_path: Path) -> None:
    result = go(
        tmp_path, "stand('forward', 5)\nif start == 1: os.kill(os.getpid(), signal.SIGSTOP); time.sleep(30)", patience=QUICK
    )
    assert (result.code, result.budgets) == (0, [0, 0])
    assert "no sign of life" in result.said[0]


def test_a_clock_that_jumps_is_no_hang() -> None:
    def at(clock: float, beat: float) -> Standing:
        return Standing(1, "forward", 3, 64, clock, beat, 100.0, False)

    watch = Watch(Patience(), now=0.0)
    assert watch.look(at(1000.0, 1000.0), 0.0) is None
    assert watch.look(at(1000.0, 1000.0), 9000.0) is None  # the lid was closed
    assert watch.look(at(1000.0, 9000.0), 9000.2) is None
    ticks = (9000.2 + number / 5 for number in range(1, 100_000))
    slow = next((said, now) for now in ticks if (said := watch.look(at(1000.0, now), now)))
    assert slow[0] == "no progress for 130 s"  # its limit, and 30 s of grace; beating all the while
    assert 9128 < slow[1] < 9132


def test_silence_alone_is_no_hang_while_there_is_progress() -> None:
    watch = Watch(Patience(), now=0.0)
    looks = [watch.look(Standing(1, "forward", step // 50, 64, 0.0, 1.0, 0.0, False), step / 5) for step in range(3000)]
    assert not any(looks)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_wish_to_stop_is_passed_on_once_and_heeded(tmp_path: Path, name: str) -> None:
    """Sent twice at once, as `timeout` does; a second one later is passed on as well."""
    body = f"""
came = count(signal.{name})
for _ in range(2):
    os.kill(os.getppid(), signal.{name})
wait(lambda: came['{name}'] > 0)
time.sleep(0.7)
note('first', json.dumps(came))
os.kill(os.getppid(), signal.{name})
wait(lambda: came['{name}'] > 1)
note('both', json.dumps(came))
sys.exit(130)
"""
    result = go(tmp_path, body)
    assert (result.code, result.budgets) == (130, [0])
    assert (result.read("first"), result.read("both")) == ({name: 1}, {name: 2})


def test_sigusr1_is_passed_on_and_does_not_kill_a_child_that_is_not_ready(tmp_path: Path) -> None:
    body = """
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(0.7)
came = count(signal.SIGUSR1)
os.kill(os.getppid(), signal.SIGUSR1)
wait(lambda: came['SIGUSR1'])
sys.exit(0 if came['SIGUSR1'] == 1 else 1)
"""
    result = go(tmp_path, body)
    assert (result.code, result.budgets) == (0, [0])


@pytest.mark.parametrize("end", ["die(signal.SIGTERM)", "os.kill(os.getppid(), signal.SIGTERM); signal.pause()"])
def test_a_run_that_dies_of_a_wish_to_stop_is_not_started_again(tmp_path: Path, end: str) -> None:
    result = go(tmp_path, f"stand('load', 0); {end}")
    assert (result.code, result.budgets) == (130, [0])


def test_a_run_that_is_killed_while_it_stops_is_not_started_again(tmp_path: Path) -> None:
    body = "came = count(signal.SIGTERM); os.kill(os.getppid(), signal.SIGTERM); wait(lambda: came['SIGTERM']); die(9)"
    result = go(tmp_path, body)
    assert (result.code, result.budgets) == (130, [0])


def test_between_two_starts_a_wish_to_stop_ends_it(tmp_path: Path) -> None:
    def say(text: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    slow = Patience(pause_s=30.0, tick_s=0.02)
    code = supervise(command(tmp_path, "die(signal.SIGBUS)"), tmp_path, 5, say, standing, slow)
    assert (code, Supervised(code, tmp_path).budgets) == (130, [0])


def test_neither_a_closed_terminal_nor_a_full_disk_ends_the_supervision(tmp_path: Path) -> None:
    def say(text: str) -> None:
        raise BrokenPipeError

    (tmp_path / "supervision.jsonl").mkdir()
    body = command(tmp_path, "if start == 1: die(signal.SIGBUS)")
    assert supervise(body, tmp_path, 5, say, standing, WAITING) == 0


def test_the_handlers_are_put_back(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGTSTP, signal.SIGCHLD, signal.SIGTTOU)
    before = [signal.getsignal(number) for number in numbers]
    go(tmp_path, "")
    assert [signal.getsignal(number) for number in numbers] == before


# A supervisor of its own, for what can't be done to the process of the tests.
SUPERVISOR = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
before = sys.argv[4]
exec(before)
from test_supervise import QUICK, command, standing
from mlx_qlora.run.supervise import supervise
folder = Path(sys.argv[1])
sys.exit(supervise(command(folder, sys.argv[2]), folder, 5, lambda text: print(text, flush=True), standing, QUICK))
"""
IN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"


def supervisor(folder: Path, body: str, before: str = "", **more: Any) -> subprocess.Popen[bytes]:
    here = str(Path(__file__).parent)
    return subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(folder), body, here, before], **more)


def eventually(holds: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def state(pid: int) -> str:
    """As `ps` says it; a dead process that nobody has asked for counts as gone."""
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return "" if said.startswith("Z") else said


def running(pid: int) -> bool:
    return bool(state(pid))


@dataclass
class Terminal:
    """A supervisor with a terminal of its own; `keyboard` writes what a person types."""

    keyboard: int
    process: subprocess.Popen[bytes]

    def type(self, keys: bytes) -> None:
        os.write(self.keyboard, keys)

    def close(self) -> None:
        if self.keyboard >= 0:
            os.close(self.keyboard)
        self.keyboard = -1


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[[str], Terminal]]:
    opened: list[Terminal] = []

    def start(body: str) -> Terminal:
        master, slave = pty.openpty()
        process = supervisor(tmp_path, body, IN_TERMINAL, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        opened.append(Terminal(master, process))
        assert eventually((tmp_path / "ready").exists)
        return opened[-1]

    yield start
    for one in opened:
        one.close()
        one.process.kill()
        one.process.wait()


def test_ctrl_c_reaches_the_run_once_and_is_waited_for(tmp_path: Path, terminal: Callable[[str], Terminal]) -> None:
    body = "came = count(signal.SIGINT); note('ready'); wait(lambda: came['SIGINT']); time.sleep(0.8)\n"
    one = terminal(body + "note('came', came['SIGINT']); sys.exit(130)")
    one.type(b"\x03")
    assert one.process.wait(20) == 130
    assert (tmp_path / "came").read_text() == "1"


def test_ctrl_z_stops_both_and_both_go_on(tmp_path: Path, terminal: Callable[[str], Terminal]) -> None:
    body = """
import threading
def beat():
    while True:
        stand('forward', 3)
        time.sleep(0.05)
threading.Thread(target=beat, daemon=True).start()
note('pid', os.getpid())
note('ready')
wait((folder / 'go').exists)
"""
    one = terminal(body)
    child = int((tmp_path / "pid").read_text())
    one.type(b"\x1a")
    assert eventually(lambda: state(child).startswith("T") and state(one.process.pid).startswith("T"))
    time.sleep(1.5)  # much longer than its patience
    one.process.send_signal(signal.SIGCONT)
    assert eventually(lambda: not state(child).startswith("T"))
    (tmp_path / "go").touch()
    assert one.process.wait(20) == 0
    assert Supervised(0, tmp_path).budgets == [0]


def test_a_closed_terminal_lets_the_run_save(tmp_path: Path, terminal: Callable[[str], Terminal]) -> None:
    body = "came = count(signal.SIGHUP); note('ready'); wait(lambda: came['SIGHUP']); note('saved'); sys.exit(130)"
    one = terminal(body)
    one.close()
    assert one.process.wait(20) == 130
    assert (tmp_path / "saved").exists()


def test_the_run_can_write_to_the_terminal_and_is_not_stopped_by_reading(
    tmp_path: Path, terminal: Callable[[str], Terminal]
) -> None:
    body = """
import termios
mode = termios.tcgetattr(1)
mode[3] |= termios.TOSTOP
termios.tcsetattr(1, termios.TCSANOW, mode)
print('hello', flush=True)
try:
    sys.stdin.readline()
except OSError:
    note('refused')
note('ready')
"""
    one = terminal(body)
    assert one.process.wait(20) == 0
    assert (tmp_path / "refused").exists()
    assert b"hello" in os.read(one.keyboard, 1000)


def test_a_run_outlives_its_supervisor(tmp_path: Path) -> None:
    body = "note('pid', os.getpid()); wait((folder / 'go').exists); note('done')"
    process = supervisor(tmp_path, body)
    assert eventually((tmp_path / "pid").exists)
    process.kill()
    process.wait()
    (tmp_path / "go").touch()
    assert eventually((tmp_path / "done").exists)


def test_nohup_holds_for_the_run_too(tmp_path: Path) -> None:
    before = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    body = "sys.exit(0 if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else 2)"
    assert supervisor(tmp_path, body, before).wait(20) == 0


def test_what_the_flight_recorder_says(tmp_path: Path) -> None:
    assert recorded(tmp_path) is None
    recorder = Recorder(tmp_path)
    recorder.enter("load")
    loading = recorded(tmp_path)
    assert loading
    assert (loading.pid, loading.phase, loading.update, loading.budget, loading.beat_at) == (os.getpid(), "load", 0, 0, 0.0)
    recorder.enter("backward", update=12, budget=4096, positions=812)
    recorder.beat()
    computing = recorded(tmp_path)
    assert computing
    assert (computing.phase, computing.update, computing.budget) == ("backward", 12, 812)
    assert abs(computing.beat_at - time.time()) < 100
    assert computing.limit_s > 0
    assert computing.progressed_at >= loading.progressed_at
    recorder.end("finished")
    over = recorded(tmp_path)
    assert over
    assert (over.beat_at, over.limit_s) == (0.0, 0.0)
    recorder.close()


# Memory, for real: 4096 and 2048 positions are too much, 1024 are not.
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")


@needs_linux
def test_an_array_that_mlx_never_got(tmp_path: Path) -> None:
    body = """
import mlx.core as mx
mx.eval(mx.ones(8) @ mx.ones((8, 8)))  # whatever it starts threads for
taken = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
limit = taken + 400 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
stand('forward', 2)
mx.eval(mx.arange(budget * 2**16))  # 1 GB, 512 MB, 256 MB
"""
    result = go(tmp_path, body)
    assert (result.code, result.budgets) == (0, [0, 2048, 1024]), result.said
    assert {line["how"] for line in result.journal[:-1]} <= {"SIGSEGV", "SIGABRT"}


@pytest.fixture
def small_group() -> Iterator[Path]:
    """The `cgroup.procs` of a group with 96 MB, no swap."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / f"supervised-{os.getpid()}"
    names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if old else ("memory.max", "memory.swap.max")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no group for a limit of memory can be made here")
    try:
        (group / names[0]).write_text(str(96 * 2**20))
        if (group / names[1]).exists():
            (group / names[1]).write_text(str(96 * 2**20 if old else 0))
        yield group / "cgroup.procs"
    except FileNotFoundError:
        pytest.skip("memory is not limited by groups here")
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


@needs_linux
def test_the_kernel_kills_what_takes_too_much(tmp_path: Path, small_group: Path) -> None:
    body = f"""
Path({str(small_group)!r}).write_text(str(os.getpid()))
stand('backward', 6)
taken = bytearray(budget * 50 * 1024)
for place in range(0, len(taken), 4096):
    taken[place] = 1
"""
    result = go(tmp_path, body)
    assert (result.code, result.budgets) == (0, [0, 2048, 1024]), result.said
    assert [line["how"] for line in result.journal] == ["SIGKILL", "SIGKILL", "finished"]


@needs_linux
def test_a_recorded_run_that_the_kernel_kills(tmp_path: Path, small_group: Path) -> None:
    """The same with the flight recorder and its watchdog in the child, as in a run."""
    body = f"""
from mlx_qlora.run.recorder import Recorder
from mlx_qlora.run.watchdog import watching
Path({str(small_group)!r}).write_text(str(os.getpid()))
recorder = Recorder(folder)
recorder.enter('load')
with watching(recorder, folder, print):
    recorder.enter('backward', update=6, budget=budget)
    taken = bytearray(budget * 50 * 1024)
    for place in range(0, len(taken), 4096):
        taken[place] = 1
recorder.end('finished')
"""
    result = Supervised(-1, tmp_path)
    result.code = supervise(command(tmp_path, body), tmp_path, 5, result.said.append, patience=WAITING)
    assert (result.code, result.budgets) == (0, [0, 2048, 1024]), result.said
    assert [(line["how"], line["phase"], line["update"]) for line in result.journal[:-1]] == [("SIGKILL", "backward", 6)] * 2


@pytest.mark.parametrize(
    ("plenty", "before", "expected"), [(True, 0, ""), (True, 7, "likely"), (True, 3, ""), (False, 0, "likely")]
)
def test_a_kill_while_memory_is_free_is_not_of_memory_unless_it_comes_again(plenty: bool, before: int, expected: str) -> None:
    said = Standing(1, "backward", 7, 4096, 0.0, 0.0, 1.0, memory_short=False, memory_plenty=plenty)
    deaths = [Death("SIGKILL", "backward", before, 4096)] if before else []
    assert _memory("SIGKILL", said, deaths) == expected
