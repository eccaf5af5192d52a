"""What the monitor shows of runs in every state, and the command itself in a terminal of its own."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from fcntl import ioctl
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.cells import cell_len

from mlx_qlora.commands import main
from mlx_qlora.look.history import History, read_history
from mlx_qlora.look.monitor.follow import LAST, Follower
from mlx_qlora.look.monitor.pulse import Pulse
from mlx_qlora.look.monitor.screen import screen
from mlx_qlora.look.monitor.terminal import Canvas, Series, limits, round_ticks, shows_unicode
from mlx_qlora.look.monitor.vitals import Seen, left_s, seen
from mlx_qlora.run import recorder as recorders
from mlx_qlora.run.recorder import Recorder

NOW = time.mktime((2026, 3, 5, 14, 0, 0, 0, 0, -1))
SIZES = [(80, 24), (200, 50), (40, 10), (150, 20), (20, 3), (1, 1)]
Line = dict[str, Any]


def line(step: int, loss: float | str = 2.0, **more: Any) -> Line:
    return {
        "step": step, "epoch": step / 100, "loss": loss, "learning_rate": 0.001, "grad_norm": 1.5, "tokens": 600,
        "tokens_per_second": 3000.0, "peak_memory_gb": 0.5, "elapsed_s": step * 0.5, "skipped_updates": 0, **more,
    }  # fmt: skip


def validated(step: int, val: float | str, train: float | str = 1.5, **more: Any) -> Line:
    gap = val - train if isinstance(val, float) and isinstance(train, float) else "nan"
    return line(step, val_loss=val, train_eval_loss=train, gap=gap, val_loss_se=0.1, train_eval_loss_se=0.1, **more)


def course(updates: int = 100, every: int = 20) -> list[Line]:
    """A run that falls from 9 to 2 and is validated at times."""
    lines = [line(step, 2 + 7 * math.exp(-step / 10)) for step in range(1, updates + 1)]
    for step in range(every, updates + 1, every):
        lines[step - 1] = validated(step, 2.2 + 7 * math.exp(-step / 10), 2.1) | {"loss": lines[step - 1]["loss"]}
    return lines


def written(folder: Path, lines: list[Line], **files: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"epochs": 3, "eval_every": 20, "early_stopping": {"patience": 5, "min_delta": 0.001}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "training_metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    for name, values in files.items():
        (folder / f"training_{name}.json").write_text(json.dumps(values))
    return folder


def at(history: History, state: str = "running", says: str = "update 101: forward") -> Seen:
    return Seen(history, None, Pulse(state, says), NOW)  # type: ignore[arg-type]


def text(run: Seen, width: int = 80, height: int = 24, unicode: bool = True) -> str:
    return "\n".join(each.plain for each in screen(run, width, height, unicode))


EVERY_COURSE: dict[str, list[Line]] = {
    "nothing": [],
    "one update": [line(1)],
    "two": [line(1), line(2)],
    "a course": course(),
    "no validation": [line(step) for step in range(1, 60)],
    "no number": [line(1, "nan"), line(2, "inf"), validated(3, "nan", "nan")],
    "now and then a number": [line(1, "nan"), line(2, 3.0), validated(3, "nan", 2.0), validated(4, 2.0, "inf")],
    "all the same": [validated(step, 2.0, 2.0) for step in range(1, 30)],
    "huge": [validated(step, 1e30, -1e30, loss=1e30) for step in range(1, 30)],
    "one validation, no other line": [validated(300_000, 2.0)],
    "empty lines": [{"step": 1}, {"step": 2, "val_loss": 2.0}],
}


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("lines", EVERY_COURSE.values(), ids=EVERY_COURSE)
def test_nothing_is_larger_than_the_terminal(tmp_path: Path, lines: list[Line], width: int, height: int, unicode: bool) -> None:
    history = Follower(written(tmp_path / "模型 の run\x1b[2J", lines)).look()
    for state in ("begins", "running", "ended", "died", "hangs", "waiting", "unseen"):
        shown = screen(at(history, state, "模型" * 30), width, height, unicode)
        assert len(shown) <= height
        assert max(cell_len(each.plain) for each in shown) <= width
        assert all(letter.isprintable() for each in shown for letter in each.plain)
        assert unicode or all(each.plain.isascii() for each in shown)


def test_the_numbers_are_those_of_the_metrics(tmp_path: Path) -> None:
    shown = text(at(read_history(written(tmp_path / "run", course(), state={"planned_steps": 300}))))
    assert "update 100/300  33.3%  epoch 1.00" in shown
    assert f"    100 {2.2 + 7 * math.exp(-10):8.4f}   2.1000  +0.100 ± 0.277   good      best so far" in shown
    assert "best      2.2003 at update 100 (epoch 1.00), gap +0.100 ± 0.277 good" in shown
    assert "0 of 5 validations without improvement" in shown
    assert "3,000 tok/s in the last update, 1,200 on average; 0.5 s an update" in shown
    assert "500 MB at most" in shown
    assert "learning rate 0.001, gradient norm 1.5" in shown
    assert "50 s so far, about 1 min 40 s left: done at 14:01" in shown  # 200 updates of half a second


def test_what_a_teacher_said_is_shown(tmp_path: Path) -> None:
    told = line(1) | {"kd": 0.41407, "ce": 5.24082, "temperature": 2.0, "alpha": 0.5}
    shown = text(at(read_history(written(tmp_path / "run", [told]))))
    assert "teacher   divergence 0.4141, cross-entropy 5.2408; temperature 2, alpha 0.5" in shown
    assert "teacher" not in text(at(read_history(written(tmp_path / "plain", [line(1)]))))


def test_a_validation_counts_in_the_time_that_is_left(tmp_path: Path) -> None:
    """Updates of 1 s, each tenth followed by a validation of 4 s, and one that the machine slept through."""
    elapsed, lines = 0.0, []
    for step in range(1, 96):
        elapsed += 1 + 4 * (step > 1 and (step - 1) % 10 == 0) + 7200 * (step == 55)
        lines.append((validated(step, 2.0) if step % 10 == 0 else line(step)) | {"elapsed_s": elapsed})
    folder = written(tmp_path / "run", lines, state={"planned_steps": 200})
    (folder / "config.yaml").write_text("eval_every: 10\n")
    # 105 updates, and validations at 100, 110 ... 200; the long sleep counts as 5 updates among 85
    left = left_s(at(read_history(folder)))
    assert left == pytest.approx(105 + 11 * 4, rel=0.06)
    state = folder / "training_state.json"
    state.write_text(json.dumps({"planned_steps": 199}))  # the last update is validated, whatever its number
    assert left_s(at(read_history(folder))) == pytest.approx(left - 1.05, abs=0.05)


def test_what_is_left_is_unknown_before_two_updates(tmp_path: Path) -> None:
    history = read_history(written(tmp_path / "run", [line(1)], state={"planned_steps": 300}))
    assert left_s(at(history)) is None
    assert "what is left is unknown" in text(at(history))


def test_what_comes_of_a_validation_is_said(tmp_path: Path) -> None:
    lines = [validated(20, 2.0), validated(40, 1.9995), validated(60, 2.5), validated(80, "nan")]
    shown = text(at(read_history(written(tmp_path / "run", lines))))
    rows = [row.split()[0] + row[53:] for row in shown.splitlines() if re.match(r" +[2468]0 +[\dn]", row) and "." in row]
    assert rows == ["20 best so far", "40 best, but barely 1/5", "60 no improvement 2/5", "80 no improvement 3/5"]
    assert "not finite" in shown
    assert "3 of 5 validations without improvement" in shown


def test_a_follower_sees_what_a_reader_sees(tmp_path: Path) -> None:
    """While a run writes, goes back to a checkpoint, is cut and resumed, replaced; whole lines or not."""
    folder = written(tmp_path / "run", [])
    path = folder / "training_metrics.jsonl"
    follower = Follower(folder)

    def same() -> History:
        seen_now, whole = follower.look(), read_history(folder)
        assert seen_now.column("loss") == whole.column("loss")
        assert [report.step for report, _ in seen_now.validations] == [report.step for report, _ in whole.validations]
        assert seen_now.step == whole.step
        for size in ((80, 24), (200, 50)):
            assert text(at(seen_now), *size) == text(at(whole), *size)
        return seen_now

    same()
    raw = "".join(json.dumps(each) + "\n" for each in course(2 * LAST, 50)).encode()
    written_so_far = 0
    for much in (10, 1000, 1001, 100_000, len(raw)):
        path.write_bytes(raw[:much])
        written_so_far = same().step
    assert written_so_far == 2 * LAST
    with path.open("a") as file:  # back to a checkpoint, further than the lines that are kept whole
        file.write(json.dumps(line(60, 5.0, rollbacks=1)) + "\n")
    assert same().step == 60
    lines = raw.splitlines(keepends=True)
    again = b"".join(lines[:400]) + b"".join(json.dumps(line(n, 3.0)).encode() + b"\n" for n in range(401, 1200))
    with path.open("r+b") as file:  # cut by a resume, and past the old end when it is looked at
        file.truncate(0)
        file.write(again)
    assert same().column("loss")[1][-1] == 3.0
    path.unlink()
    assert follower.look().lines == ()
    path.write_text(json.dumps(line(1, 7.0)) + "\nno line\n[1]\n" + json.dumps(line(2, 6.0)) + "\n")
    assert same().column("loss") == ([1, 2], [7.0, 6.0])


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "run", course())
    follower = Follower(folder)
    follower.look()
    taken: list[bytes] = []
    take = follower._take
    monkeypatch.setattr(follower, "_take", lambda raw: (taken.append(raw), take(raw)))
    with (folder / "training_metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(101)) + "\n")
    assert follower.look().step == 101
    assert follower.look().step == 101
    assert [json.loads(raw)["step"] for raw in taken] == [101]


# --- whether it lives


DIE = """
import os, signal, sys
from pathlib import Path
from mlx_qlora.run.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]), "mlx-qlora train --demo")
recorder.enter("plan", planned=300, eval_every=20)
recorder.enter("forward", update=101, part=2, parts=3)
recorder.beat()
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(folder: Path) -> Path:
    subprocess.run([sys.executable, "-c", DIE, str(folder)], check=False, timeout=60)
    return folder


def test_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "run", course(), state={"planned_steps": 7})
    recorder = Recorder(folder)
    recorder.enter("load")
    first = seen(Follower(folder).look())
    assert first.pulse == Pulse("begins", f"loading the model; process {os.getpid()}; below is what was there before")
    recorder.enter("plan", planned=300, eval_every=20)
    recorder.enter("forward", update=101, part=2, parts=3)
    recorder.beat()
    now = seen(Follower(folder).look())
    assert now.pulse == Pulse("running", f"update 101, part 2 of 3: forward; process {os.getpid()}")
    assert now.planned == 300
    assert "are free" in text(now) or sys.platform not in ("linux", "darwin")
    with monkeypatch.context() as later:
        later.setattr("mlx_qlora.look.monitor.pulse._UNHEARD_S", -1.0)
        assert "suspended, or something holds it" in seen(Follower(folder).look()).pulse.says
    recorder.set_limit(0.1)
    time.sleep(0.15)
    hanging = seen(Follower(folder).look()).pulse
    assert hanging.state == "hangs"
    assert hanging.says.startswith("no progress for 0.")
    recorder.end("stopped early")
    assert seen(Follower(folder).look()).pulse == Pulse("ended", "stopped early")
    recorder.close()


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    folder = killed(written(tmp_path / "a run", course()))
    now = seen(Follower(folder).look())
    assert now.pulse == Pulse("died", "died without a word")
    assert "update 100/300" in text(now)
    journal = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "how": "SIGKILL", "restart": 2}
    (folder / "supervision.jsonl").write_text(json.dumps(journal) + "\n")
    waiting = seen(Follower(folder).look()).pulse
    assert (waiting.state, waiting.over) == ("waiting", False)
    assert "restart 2" in waiting.says
    (folder / "supervision.jsonl").write_text(json.dumps(journal | {"restart": None}) + "\n")
    assert seen(Follower(folder).look()).pulse.over


def test_a_run_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "run", course())
    with monkeypatch.context() as there:
        there.setattr(socket, "gethostname", lambda: "studio")
        there.setattr(recorders.machine, "boot_id", lambda: "another")
        recorder = Recorder(folder)
        recorder.enter("forward", update=101)
    assert seen(Follower(folder).look()).pulse == Pulse("running", f"update 101: forward; process {os.getpid()} on studio")
    monkeypatch.setattr("mlx_qlora.look.monitor.pulse._RECENT_S", 0.0)
    late = seen(Follower(folder).look()).pulse
    assert (late.state, late.over) == ("unseen", False)
    assert "it ran on studio, whose processes can't be seen from here" in late.says
    recorder.close()


def test_without_a_flight_recorder(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", course())
    assert seen(Follower(folder).look()).pulse.state == "unseen"
    written(folder, course(), summary={"ended": "finished"})
    assert seen(Follower(folder).look()).pulse.state == "ended"
    assert seen(Follower(tmp_path / "none").look()).pulse.state == "waiting"


# --- drawing


def test_a_line_goes_through_its_points() -> None:
    """A straight line from corner to corner: each column's letter has its dots where the line is."""
    canvas = Canvas(4, 2, (0, 7), (0, 7), True)
    canvas.draw(Series((np.arange(8.0), np.arange(8.0)), "cyan"))
    rows = ["".join(letter for letter, _ in canvas.spans(row)) for row in range(2)]
    assert rows == ["  ⡠⠊", "⡠⠊  "]
    plain = Canvas(4, 2, (0, 7), (0, 7), False)
    plain.draw(Series((np.arange(8.0), np.arange(8.0)), "cyan"))
    assert ["".join(letter for letter, _ in plain.spans(row)) for row in range(2)] == ["  .'", ".'  "]


def test_the_beginning_does_not_squash_the_rest() -> None:
    steps = np.arange(1.0, 501)
    low, high = limits([(steps, 1.5 + 0.3 * np.sin(steps) + 60 * np.exp(-steps / 8))])
    assert 1.0 < low < 1.2
    assert 1.8 < high < 2.2
    few = np.array([2e4, 29_999.0])  # a long curve does not outvote a few validations
    assert limits([(np.arange(1.0, 3e4), np.full(29999, 2.0)), (few, np.array([2.2, 2.4]))])[1] > 2.4
    falling = 3 - 2 * steps / 500
    assert limits([(steps, falling)]) == pytest.approx((0.92, 3.07), abs=0.02)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.3, 8.1), (1e-6, 2e-6), (1, 300_000), (5, 5), (-1e30, 1e30)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    for most in (1, 2, 5, 9):
        ticks = round_ticks(low, high, most)
        assert len(ticks) <= most
        assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in ticks)


@pytest.mark.parametrize(
    ("encoding", "settings", "shown"),
    [
        ("utf-8", {"LANG": "pt_BR.UTF-8"}, True),
        ("utf-8", {}, True),
        ("utf-8", {"LANG": "C"}, False),
        ("utf-8", {"LANG": "pt_BR.UTF-8", "LC_ALL": "C"}, False),
        ("utf-8", {"LANG": "C", "PYTHONIOENCODING": "utf-8"}, True),
        ("ascii", {"LANG": "pt_BR.UTF-8"}, False),
        (None, {}, False),
    ],
)
def test_where_there_is_only_ascii(
    monkeypatch: pytest.MonkeyPatch, encoding: str | None, settings: dict[str, str], shown: bool
) -> None:
    for name in ("LANG", "LC_ALL", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert shows_unicode(encoding) is shown


# --- the command


def monitor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_qlora", "monitor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def test_once_into_a_file_is_plain_text(tmp_path: Path) -> None:
    folder = killed(written(tmp_path / "a run", course()))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = monitor("--output-dir", str(folder), "--once", COLUMNS="100", PYTHONIOENCODING="ascii", FORCE_COLOR="")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert done.stdout.isascii()
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 100
    assert "died without a word" in done.stdout
    assert done.stdout.splitlines()[-1] == f"mlx-qlora doctor '{folder}' says more"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none", "--once"], "none: there is nothing; the folder of a run is expected."),
        ([".", "--once"], "no run was begun in it"),
        (["a", "--output-dir", "b"], "a and --output-dir b came; one folder is expected."),
        ([], "the folder of a run is missing"),
        (["a", "--refresh", "0.1"], "refresh: 0.1 came, seconds from 0.2 on is expected."),
        (["a", "--refresh", "nan"], "refresh: nan came"),
        (["file"], "file: it is a file; the folder of a run is expected."),
    ],
)
def test_wrong_input_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["monitor", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlx-qlora monitor: ")
    assert said in error


class Screen:
    """A process in a terminal of its own, of 80 columns and 24 rows."""

    def __init__(self, *command: str, **environment: str):
        pid, self._terminal = pty.fork()
        if pid == 0:
            os.environ.update({"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": ""} | environment)
            os.execv(sys.executable, [sys.executable, "-m", "mlx_qlora", *command])
        self._pid, self.said = pid, ""
        ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def until(self, there: Callable[[str], object], seconds: float = 60) -> str:
        """All that was said, once that is there."""
        until = time.monotonic() + seconds
        while not there(self.said):
            assert time.monotonic() < until, self.said[-3000:]
            if not self._read():
                break
        assert there(self.said), self.said[-3000:]
        return self.said

    def _read(self) -> bool:
        if not select.select([self._terminal], [], [], 0.5)[0]:
            return True
        try:
            some = os.read(self._terminal, 1 << 16)
        except OSError:  # it has ended
            return False
        self.said += some.decode(errors="replace")
        return bool(some)

    def press(self, letters: str) -> None:
        os.write(self._terminal, letters.encode())

    def ended(self) -> int:
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def close(self) -> None:
        os.close(self._terminal)


@pytest.fixture
def in_terminal() -> Iterator[Callable[..., Screen]]:
    made: list[Screen] = []

    def begin(*command: str, **environment: str) -> Screen:
        made.append(Screen(*command, **environment))
        return made[-1]

    yield begin
    for each in made:
        each.close()


def left_as_it_was(said: str) -> bool:
    """The other screen was left, and the cursor is shown again."""
    return said.rfind("\x1b[?1049l") > said.rfind("\x1b[?1049h") >= 0 and said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l")


def test_a_real_run_is_followed_to_its_end(small_data: Path, tmp_path: Path, in_terminal: Callable[..., Screen]) -> None:
    """From before there is a folder; what is left in the terminal is how it ended."""
    folder = tmp_path / "run"
    looking = in_terminal("monitor", str(folder), "--refresh", "0.2")
    looking.until(lambda said: "there is no folder" in said)
    command = ["train", "--model", "embedded", "--data", str(small_data), "--output-dir", str(folder)]
    small = ["--max-steps", "20", "--eval-every", "5", "--batch-size", "4", "--epochs", "9", "--score-questions", "0"]
    with subprocess.Popen([sys.executable, "-m", "mlx_qlora", *command, *small], stdout=subprocess.DEVNULL) as training:
        assert looking.ended() == 0
    assert training.returncode == 0
    assert left_as_it_was(looking.said)
    followed, _, left = looking.said.rpartition("\x1b[?1049l")
    for word in ("begins", "loading the model", "running", "update 0/20", "no validation yet"):
        assert word in followed
    history = read_history(folder)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", left)
    assert "finished after 20 of 20 updates" in plain
    for report, _ in history.validations:
        assert f"{report.step:>7,} {report.val_loss:8.4f} {report.train_eval_loss:8.4f}" in plain


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_whoever_stops_looking_leaves_the_terminal_clean(tmp_path: Path, in_terminal: Callable[..., Screen], how: str) -> None:
    folder = written(tmp_path / "run", course())
    recorder = Recorder(folder)
    recorder.enter("forward", update=101)
    looking = in_terminal("monitor", str(folder))
    looking.until(lambda said: "update 101: forward" in said)
    looking.press("\x03") if how == "Ctrl-C" else os.kill(looking._pid, signal.SIGTERM)
    assert looking.ended() == 0
    assert left_as_it_was(looking.said)
    assert "the run goes on (update 100); to look again: mlx-qlora monitor" in looking.said
    recorder.close()


def test_a_terminal_that_can_do_nothing_gets_plain_blocks(tmp_path: Path, in_terminal: Callable[..., Screen]) -> None:
    folder = written(tmp_path / "run", course())
    recorder = Recorder(folder)
    recorder.enter("forward", update=101)
    looking = in_terminal("monitor", str(folder), "--refresh", "0.2", TERM="dumb", NO_COLOR="1")
    looking.until(lambda said: "update 101: forward" in said)
    recorder.end("finished")
    recorder.close()
    assert looking.ended() == 0
    assert "\x1b" not in looking.said
    assert looking.said.count("epoch 1.00") == 2 + looking.said.count("(epoch 1.00)")
