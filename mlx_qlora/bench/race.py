"""The race: every contestant a live process of its own, one of them at work at a time, by turns.

They alternate (A, B, A, B, ...), so that a machine that is busy with something else for a while hits all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_qlora.bench.data import Field
from mlx_qlora.bench.settings import FLAT, OURS, SCALE, Contestant, RaceConfig, Spec
from mlx_qlora.errors import ModelError

Say = Callable[[str], None]
FLOOR, REFEREE = "floor", "referee"


class Fallen(Exception):
    """A contestant's process has ended before its time; the message says why."""


class Worker:
    """A contestant's process, and this end of its pipe."""

    def __init__(self, contestant: Contestant, spec: Spec, bundled_blas: bool):
        Path(spec.work).mkdir(parents=True, exist_ok=True)
        self._log = Path(spec.work) / "log.txt"
        environment = dict(os.environ)
        if bundled_blas:
            environment["MLX_QLORA_BLAS"] = "none"
        command = [sys.executable, "-m", "mlx_qlora.bench.worker"]
        self.begun = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, encoding="utf-8"
            )
        self.contestant = contestant
        self._send(spec.to_json())

    @property
    def pid(self) -> int:
        return self._process.pid

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; why, its last answer or its log says

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises `Fallen` if there is none or if it says that it can't go on."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message: dict[str, Any] = json.loads(line) if line else {"failed": self._last_words()}
        if "failed" in message:
            self.end()
            raise Fallen(message["failed"])
        return message

    def work(self, count: int, work: Sequence[Any] = ()) -> dict[str, Any]:
        """Let it make updates; gives what it says of each, and its peak of memory."""
        self._send({"updates": count, "work": list(work)})
        return self.answer()

    def save(self, folder: Path) -> dict[str, Any]:
        """Let it keep its adapters in a folder and end."""
        folder.mkdir(parents=True, exist_ok=True)
        self._send({"save": str(folder)})
        said = self.answer()
        self.end()
        return said

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = [line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        out_of_memory = " (9 is what a system sends when memory runs out)" if code == -9 else ""
        return f"{how}{out_of_memory}{': ' + lines[-1][:200] if lines else ''}"

    def end(self) -> None:
        """No process is left after this."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass


@dataclass
class Lane:
    """What is known of a contestant."""

    contestant: Contestant
    load_s: float = 0.0
    warmup: list[dict[str, Any]] = field(default_factory=list)  # its updates
    blocks: list[list[dict[str, Any]]] = field(default_factory=list)  # the updates of each repeat
    peak_gb: float = 0.0
    blas: str = ""
    loss: float | None = None
    failed: str = ""
    worker: Worker | None = None

    @property
    def updates(self) -> list[dict[str, Any]]:
        return [*self.warmup, *(update for block in self.blocks for update in block)]


@dataclass(frozen=True)
class Outcome:
    """How a race went. `beginning` is what the referee said of the model and of the adapters before it."""

    lanes: list[Lane]
    floor: Lane | None
    beginning: dict[str, Any]


class Race:
    """Runs everything. `close` (or leaving the `with`) ends all processes."""

    def __init__(self, config: RaceConfig, model: str, ground: Field, folder: Path, say: Say):
        self._config, self._model, self._ground, self._folder, self._say = config, model, ground, folder, say
        self._workers: list[Worker] = []

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def run(self, contestants: Sequence[Contestant]) -> Outcome:
        try:
            beginning = self._judge([])
        except Fallen as fallen:
            raise ModelError(str(fallen)) from fallen
        lanes = [Lane(each) for each in contestants]
        floor = Lane(Contestant(FLOOR, FLOOR)) if self._config.floor else None
        everybody = [*lanes[:1], *([floor] if floor else []), *lanes[1:]]  # the floor right after us, whose shapes it takes
        for lane in everybody:
            self._line_up(lane)
        for number in range(self._config.repeats + 1):
            count = self._config.updates if number else self._config.warmup
            if number == 1:
                self._say(f"repeats: {self._foresee(everybody)}")
            for lane in everybody:
                self._turn(lane, count, f"repeat {number}/{self._config.repeats}" if number else "warm-up", lanes[0])
        for place, lane in enumerate(everybody):
            self._leave(lane, self._folder / f"kept-{place}")
        self._compare([lane for lane in lanes if not lane.failed], everybody)
        return Outcome(lanes, floor, beginning)

    def _spec(self, contestant: Contestant, place: int) -> Spec:
        config = self._config
        if contestant.kind in (OURS, FLAT, REFEREE, FLOOR):
            data = self._ground.rows
        else:
            data = self._ground.arranged[batch_rows(contestant.kind, config)]
        return Spec(
            kind=contestant.kind,
            model=self._model,
            data=str(data),
            work=str(self._folder / f"work-{place}"),
            initial=str(self._folder / "initial" / "adapters"),
            layers=config.lora_layers,
            rank=config.rank,
            scale=SCALE,
            batch_size=config.batch_size,
            gradient_accumulation=config.gradient_accumulation,
            learning_rate=config.learning_rate,
            max_seq_length=config.max_seq_length,
            updates=config.all_updates,
            seed=config.seed,
            same_kernels=config.same_kernels,
            overrides=contestant.overrides,
        )

    def _start(self, contestant: Contestant) -> Worker:
        theirs = contestant.kind not in (OURS, FLAT, REFEREE, FLOOR)
        spec = self._spec(contestant, len(self._workers))
        worker = Worker(contestant, spec, bundled_blas=theirs and not self._config.same_kernels)
        self._workers.append(worker)
        return worker

    def _line_up(self, lane: Lane) -> None:
        try:
            lane.worker = self._start(lane.contestant)
            lane.worker.answer()
            lane.load_s = time.perf_counter() - lane.worker.begun
            self._say(f"{lane.contestant.label}: loaded in {lane.load_s:.1f} s")
        except Fallen as fallen:
            self._lose(lane, fallen)

    def _turn(self, lane: Lane, count: int, when: str, ours: Lane) -> None:
        if lane.worker is None:
            return
        work: list[Any] = []
        if lane.contestant.kind == FLOOR:
            if ours.failed:
                self._lose(lane, Fallen(f"{ours.contestant.label} has fallen, so it is not known what to multiply"))
                return
            work = [update["shapes"] for update in ours.updates[-count:]]
        try:
            said = lane.worker.work(count, work)
        except Fallen as fallen:
            self._lose(lane, fallen)
            return
        lane.peak_gb = said["peak_gb"]
        if len(lane.warmup) < self._config.warmup:
            lane.warmup = said["updates"]
        else:
            lane.blocks.append(said["updates"])
        seconds = sum(update["seconds"] for update in said["updates"]) / count
        self._say(f"{when:<11} {lane.contestant.label}: {seconds:.3f} s an update")

    def _foresee(self, lanes: Sequence[Lane]) -> str:
        """How long it will be, by the last update of the warm-up; the first ones compile, so this is rather too long."""
        each = sum(lane.warmup[-1]["seconds"] for lane in lanes if lane.warmup and not lane.failed)
        seconds = each * self._config.updates * self._config.repeats
        return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} minutes, at this pace"

    def _leave(self, lane: Lane, folder: Path) -> None:
        """Keep its adapters, or, for the floor, only end it."""
        if lane.worker is None:
            return
        if lane.contestant.kind == FLOOR:
            lane.worker.end()
            return
        try:
            lane.blas = lane.worker.save(folder)["blas"]
        except Fallen as fallen:
            self._lose(lane, fallen)

    def _compare(self, lanes: Sequence[Lane], everybody: Sequence[Lane]) -> None:
        """The referee's loss for each. What can't be judged has none, and the reason is said: nothing measured is lost."""
        folders = {id(lane): str(self._folder / f"kept-{place}") for place, lane in enumerate(everybody)}
        try:
            judged = self._judge([folders[id(lane)] for lane in lanes])
        except Fallen as fallen:
            self._say(f"no losses, the referee has fallen: {fallen}")
            return
        for lane, verdict in zip(lanes, judged["verdicts"], strict=True):
            lane.loss = verdict["loss"]
            if "problem" in verdict:
                self._say(f"{lane.contestant.label}: no loss: {verdict['problem']}")

    def _judge(self, folders: Sequence[str]) -> dict[str, Any]:
        """What the referee says of the beginning, and the loss of the adapters in each folder."""
        (self._folder / "initial").mkdir(exist_ok=True)
        worker = self._start(Contestant(REFEREE, REFEREE))
        try:
            said: dict[str, Any] = worker.answer()["ready"]
            verdicts = worker.work(len(folders), folders)["updates"] if folders else []
        finally:
            worker.end()
        return {**said, "verdicts": verdicts}

    def _lose(self, lane: Lane, why: Fallen) -> None:
        lane.failed, lane.worker = str(why), None
        self._say(f"{lane.contestant.label}: out of the race: {why}")


def batch_rows(kind: str, config: RaceConfig) -> int:
    """Rows of one batch; mlx-tune ignores gradient accumulation, and gets the whole update at once."""
    return config.examples_per_update if kind == "mlx-tune" else config.batch_size
