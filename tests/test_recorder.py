"""The flight recorder against what it is for: processes that are killed at any moment, and files that are damaged."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_qlora.errors import RunFolderError
from mlx_qlora.run import recorder as module
from mlx_qlora.run.recorder import NAME, PHASES, Record, Recorder, alive, place, read, silent_s


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder(tmp_path, "mlx-qlora train --demo")
    yield made
    made.close()


def content(folder: Path) -> Record:
    found = read(folder)
    assert found is not None
    return found


# Children enter phases as fast as they can and say, before each, in shared memory which one comes; each is killed at a
# random moment. What the file says then must be that one, or the one before.
KILLED = """
import json, mmap, os, random, signal, struct, sys, time
from pathlib import Path
from mlx_qlora.run.recorder import Recorder, read

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
said = mmap.mmap(-1, 4096)
phases = ("forward", "loss", "backward", "accumulate")
seen = []
for each in range(rounds):
    said[:16] = bytes(16)
    child = os.fork()
    if child == 0:
        recorder = Recorder(folder)
        number = 0
        while True:
            number += 1
            said[:8] = struct.pack("<Q", number)
            recorder.enter(phases[number % 4], update=number, shape="x" * (number % 500), ids=tuple(range(number % 300)))
            said[8:16] = struct.pack("<Q", number)
            if number % 16 == 0:
                recorder.beat(mark=number)
    while not struct.unpack("<Q", said[8:16])[0]:
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    begun, done = struct.unpack("<QQ", said[:16])
    record = read(folder)
    assert record is not None, each
    assert record.progress in (done, begun), (record.progress, done, begun)
    assert record.phase == phases[record.progress % 4]
    assert record.facts["update"] == record.progress and len(record.facts["shape"]) == record.progress % 500
    assert record.pid == child and not record.ended
    assert 0 <= record.progress - record.beat.get("mark", 0) <= 17 or record.progress < 32
    seen.append(record.progress)
print(json.dumps(seen))
"""


def test_a_process_killed_at_any_moment_leaves_its_last_phase(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(set(json.loads(done.stdout))) > 10, "they were killed at different moments"


def test_what_is_said_can_be_read_by_another_process(recorder: Recorder, tmp_path: Path) -> None:
    recorder.enter("batch", update=3, ids=("a:1", "b:2"), budget=4096)
    recorder.enter("backward", part=1, parts=2, shape="1 x 812 tokens, 95 places")
    recorder.beat(more=1)
    code = """
import sys
from pathlib import Path
from mlx_qlora.run.recorder import alive, read, silent_s
record = read(Path(sys.argv[1]))
print(record.pid, alive(record), record.progress, record.doing, record.facts["ids"], 0 <= silent_s(record) < 100)
assert "mlx.core" not in sys.modules
"""
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    doing = "update 3, part 1 of 2, backward of 1 x 812 tokens, 95 places"
    assert said.strip() == f"{os.getpid()} True 2 {doing} ['a:1', 'b:2'] True"
    assert content(tmp_path) == recorder.record()
    beat = recorder.record().beat
    assert beat["more"] == 1
    assert beat["rss"] > 0
    assert 0 <= beat["available"] <= beat["total"]
    if sys.platform == "linux":
        assert beat["rss"] < beat["total"]
        assert beat["available"] > 0


def test_facts_stay_until_they_are_replaced_or_taken_away(recorder: Recorder) -> None:
    recorder.enter("forward", update=1, part=1, shape="x")
    recorder.enter("backward", shape=None, part=2)
    assert recorder.record().facts == {"update": 1, "part": 2}
    recorder.enter("evaluate", parts=2, shape="1 x 812 tokens")
    assert recorder.record().doing == "update 1, evaluate", "which is of no micro-batch"


def test_many_ids_are_shortened_and_counted(recorder: Recorder) -> None:
    ids = tuple(f"train.jsonl:{number}" for number in range(1000))
    recorder.enter("batch", ids=ids)
    facts = recorder.record().facts
    assert facts["ids"] == list(ids[: len(facts["ids"])])
    assert len(facts["ids"]) > 20
    assert facts["ids_in_all"] == 1000
    recorder.enter("batch", ids=ids[:3])
    assert recorder.record().facts == {"ids": list(ids[:3])}


def test_whatever_a_fact_is_the_page_can_hold_it(recorder: Recorder) -> None:
    circle: list[Any] = []
    circle.append(circle)
    odd = {"nan": float("nan"), "path": Path("a"), "letters": "ção 𝄞" * 2000, "keys": {(1, 2): 3}, "circle": circle, "set": {1}}
    recorder.enter("batch", **odd)
    facts = recorder.record().facts
    assert set(odd) <= set(facts)
    assert facts["path"] == "a"
    assert facts["letters"].startswith("ção 𝄞")
    recorder.enter("forward", update=7, **{f"fact_{number}": "y" * 500 for number in range(100)})
    recorder.end("failed", "ção\n" * 5000)
    record = recorder.record()
    assert (record.phase, record.facts["update"], record.ended) == ("forward", 7, "failed")
    assert record.detail.startswith("ção\n")


def test_no_damage_makes_the_reader_fall(recorder: Recorder, tmp_path: Path) -> None:
    for number in range(1, 4):
        recorder.enter("forward", update=number)
        recorder.beat(number=number)
    whole = (tmp_path / NAME).read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    drawn = random.Random(0)
    for cut in [*range(200), *range(200, len(whole), 61)]:
        (other / NAME).write_bytes(whole[:cut])
        read(other)
    for _ in range(300):
        damaged = bytearray(whole)
        start = drawn.randrange(len(whole))
        damaged[start : start + drawn.randrange(1, 6000)] = drawn.randbytes(drawn.randrange(1, 6000))
        (other / NAME).write_bytes(damaged)
        found = read(other)
        assert found is None or found.facts.get("update") in (None, 2, 3)
    for number in range(1, 5):  # one page of a pair: the other still tells
        damaged = bytearray(whole)
        damaged[number * 4096 + 30] ^= 1
        (other / NAME).write_bytes(damaged)
        found = content(other)
        assert found.pid == os.getpid()
        assert found.facts["update"] == (2 if number == 1 else 3)
        assert found.beat["number"] == (2 if number == 4 else 3)


def test_nothing_or_nonsense_is_no_record(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    assert read(tmp_path / "not there") is None
    (tmp_path / NAME).mkdir()
    assert read(tmp_path) is None


def test_the_first_last_word_counts_and_keeps_the_phase(recorder: Recorder) -> None:
    recorder.enter("backward", update=3)
    recorder.end("failed", "no space left")
    recorder.enter("save")
    recorder.end("finished")
    record = recorder.record()
    assert (record.phase, record.ended, record.detail) == ("backward", "failed", "no space left")


def test_a_run_that_leaves_without_a_word_has_failed(recorder: Recorder, tmp_path: Path) -> None:
    recorder.enter("forward")
    recorder.close()
    recorder.close()
    recorder.enter("loss")
    recorder.beat()
    recorder.end("finished")
    assert content(tmp_path).ended == "failed"
    assert content(tmp_path).phase == "forward"


def test_a_run_that_never_began_leaves_what_was_there(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    Recorder(deep).abandon()
    assert list(tmp_path.iterdir()) == []
    first = Recorder(deep)
    first.enter("forward", update=5)
    first.end("finished")
    first.close()
    before = (deep / NAME).read_bytes()
    second = Recorder(deep)
    second.enter("load")
    second.abandon()
    second.enter("batch")
    assert (deep / NAME).read_bytes() == before
    assert [path.name for path in deep.iterdir()] == [NAME]


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from mlx_qlora.run.recorder import Recorder
Recorder(Path(sys.argv[1])).enter("backward", update=3)
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(RunFolderError, match=f"process {child.pid} is training there \\(update 3, backward\\)"):
            Recorder(tmp_path)
        assert alive(content(tmp_path)) is True
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert alive(content(tmp_path)) is False
    Recorder(tmp_path).abandon()


def changed(record: Record, **constants: object) -> Record:
    return Record(record.constants | constants, entered=record.entered, entered_monotonic=record.entered_monotonic)


def test_an_id_that_another_process_got_is_not_this_one(recorder: Recorder) -> None:
    record = recorder.record()
    assert alive(record) is True
    assert alive(changed(record, process_start="another")) is False
    assert alive(changed(record, pid=2**22 + 5)) is False


def test_a_record_of_another_start_or_machine_says_so(recorder: Recorder) -> None:
    record = recorder.record()
    assert place(record) == "here"
    restarted, elsewhere = changed(record, boot="another"), changed(record, boot="another", host="another")
    assert (place(restarted), alive(restarted), silent_s(restarted)) == ("restarted", False, None)
    assert (place(elsewhere), alive(elsewhere), silent_s(elsewhere)) == ("elsewhere", None, None)
    assert place(changed(record, pid_space="another container")) == "elsewhere"


def test_a_file_that_cannot_be_had_leaves_the_one_before(tmp_path: Path) -> None:
    Recorder(tmp_path).close()
    before = (tmp_path / NAME).read_bytes()
    code = """
import resource, sys
from pathlib import Path
from mlx_qlora.run.recorder import Recorder
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # as a full disk: the second page can't be written
try:
    Recorder(Path(sys.argv[1]))
except OSError as error:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
    assert (tmp_path / NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_where_files_cannot_be_mapped_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMaps:
        def __init__(self, *_: object):
            raise OSError("no such device")

    monkeypatch.setattr(module, "mmap", SimpleNamespace(mmap=NoMaps))
    recorder = Recorder(tmp_path)
    for number in range(1, 6):
        recorder.enter("forward", update=number)
        recorder.beat(number=number)
        assert (content(tmp_path).facts["update"], content(tmp_path).beat["number"]) == (number, number)
    recorder.end("finished")
    recorder.close()
    assert content(tmp_path).ended == "finished"


def test_the_limit_follows_from_what_the_run_did(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now))

    def enter(phase: str, took_s: float, **facts: object) -> float:
        recorder.enter(phase, **facts)
        clock.now += took_s
        return recorder.record().limit_s

    assert enter("load", 100) == 1800
    assert enter("forward", 10, update=1) == 1800, "no update was done yet"
    assert enter("update", 1) == 1800
    assert enter("forward", 1, update=2) == 220, "20 times the 11 s of the first"
    assert enter("update", 1) == 220
    assert enter("evaluate", 400) == 1800, "the first of its kind"
    assert enter("forward", 1, update=3) == 20 * 402, "an update's time has its evaluation in it"
    assert enter("evaluate", 1) == 20 * 402
    recorder.set_limit(5)
    assert recorder.record().limit_s == 5
    phases = recorder.record().phases
    assert (phases["forward"].count, phases["forward"].slowest_s) == (3, 10)
    assert phases["forward"].typical_s == pytest.approx(10 - 0.2 * 9 - 0.2 * (8.2 - 1))


def test_the_names_of_phases_are_those_of_the_engine() -> None:
    assert {"load", "tokenise", "batch", "forward", "loss", "backward", "accumulate", "update", "evaluate", "save"} == set(
        PHASES
    )
