"""Trackers: what arrives in the real tools, read back with their own readers, and what a broken one does to a run: nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import numpy as np
import pytest

from mlx_qlora import LoraConfig, RunConfig, train
from mlx_qlora.config import from_yaml, parse
from mlx_qlora.errors import ConfigError
from mlx_qlora.look.console import Console
from mlx_qlora.look.tracking import trackers
from mlx_qlora.look.tracking.tools import Opening
from mlx_qlora.look.tracking.trackers import TrackerConfig, Trackers
from mlx_qlora.run import checkpoint
from mlx_qlora.run.metrics import MEASURED, VALIDATED, read_metrics
from mlx_qlora.train import main

CLI = [sys.executable, "-m", "mlx_qlora", "train"]
ALL = ("tensorboard", "wandb", "trackio", "mlflow")
# Nothing goes over a network, whatever the machine's own settings say.
OFFLINE = {"WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "HF_HUB_OFFLINE": "1"}
Told = dict[str, dict[int, set[float]]]  # figure: update: the values that it has there


@dataclass
class Whole:
    """A run that was interrupted, killed, and gone on with to its end, with all trackers; and the same without any."""

    where: Path
    config: RunConfig
    plain: Path
    output: str

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def lines(self) -> Told:
        told: Told = defaultdict(lambda: defaultdict(set))
        for line in read_metrics(self.folder):
            for name in line.keys() - {"step"}:
                told[name][line["step"]].add(float(line[name]))
        return told


def small(data: Path, output: Path) -> RunConfig:
    return RunConfig(
        model="embedded", data=str(data), output_dir=str(output), epochs=6, batch_size=8, eval_every=5, save_every=4,
        learning_rate=5e-3, lora=LoraConfig(rank=2, scale=4.0, dropout=0.1),
    )  # fmt: skip


def environment(where: Path, **more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))}
    return own | OFFLINE | {"HOME": str(where), "TRACKIO_DIR": str(where / "trackio")} | more


@pytest.fixture(scope="module")
def whole(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    where = tmp_path_factory.mktemp("tracked")
    config = replace(small(small_data, where / "first"), report_to=",".join(ALL))
    (where / "run.yaml").write_text(config.to_yaml())

    def start(*flags: str) -> subprocess.Popen[str]:
        command = [*CLI, "--config", "run.yaml", *flags]
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=where, env=environment(where), start_new_session=True, **streams)

    def lines() -> int:
        path = where / "first" / "training_metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    process = start()
    wait_for(lambda: lines() >= 4 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)  # to all of the group, as a terminal does
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output
    assert checkpoint.there(where / "first")
    process = start("--resume")
    wait_for(lambda: lines() >= 12 or process.poll() is not None)
    process.kill()
    process.communicate()
    process = start("--resume")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    plain = replace(config, report_to=(), output_dir=str(where / "plain"))
    train(plain, quiet=True)
    return Whole(where, config, where / "plain", output)


def wait_for(holds: Callable[[], bool], seconds: float = 100) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def adapters(folder: Path) -> bytes:
    return (folder / "adapters" / "adapters.safetensors").read_bytes()


def test_the_run_is_the_same_with_them_and_without(whole: Whole) -> None:
    assert adapters(whole.folder) == adapters(whole.plain)
    assert [line["loss"] for line in read_metrics(whole.folder)] == [line["loss"] for line in read_metrics(whole.plain)]
    assert "WARNING" not in whole.output
    assert len(read_metrics(whole.folder)) == 18


def test_tensorboard_has_every_figure_once(whole: Whole) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(whole.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    expected = {f"{'validation' if name in VALIDATED else 'train'}/{name}": told for name, told in whole.lines.items()}
    assert set(found.Tags()["scalars"]) == set(expected)
    for tag, told in expected.items():
        scalars = found.Scalars(tag)
        assert [each.step for each in scalars] == sorted(told), tag
        if not tag.endswith(MEASURED):  # those are of the first time that an update was made
            assert all({np.float32(each.value)} == {np.float32(*told[each.step])} for each in scalars), tag
    assert b"| ended | finished |" in found.Tensors("summary")[-1].tensor_proto.string_val[0]
    assert found.summary_metadata["_hparams_/session_start_info"].plugin_data.content


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's tables, in SQLAlchemy 2.1
def test_mlflow_has_every_figure_and_one_run(whole: Whole) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{whole.where / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("mlx_qlora").experiment_id])  # type: ignore[union-attr]
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert (run.data.params["lora.rank"], run.data.params["learning_rate"]) == ("2", "0.005")
    assert run.data.tags["summary/ended"] == "finished"
    summary = json.loads((whole.folder / "training_summary.json").read_text())
    assert run.data.metrics["summary/best.val_loss"] == summary["best"]["val_loss"]
    for name, told in whole.lines.items():
        history: dict[int, set[float]] = defaultdict(set)
        for metric in client.get_metric_history(run.info.run_id, name):
            history[metric.step].add(metric.value)
        same(name, history, told)


def test_wandb_has_every_figure_in_files_of_one_run(whole: Whole) -> None:
    files = sorted((whole.where / "wandb").glob("offline-run-*/*.wandb"))
    records = [record for path in files for record in wandb_records(path)]
    told: Told = defaultdict(lambda: defaultdict(set))
    for record in records:
        line = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in line.items():
            told[name][int(line["step"])].add(value)
    for name, each in whole.lines.items():
        same(name, told[name], each)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1
    assert {run.display_name for run in runs} == {"first"}
    config = {item.key: json.loads(item.value_json) for item in runs[-1].config.update}
    assert config["lora.rank"] == 2
    assert not [path for path in (whole.where / "wandb").rglob("output.log") if path.read_text()], "nothing of the console"


def wandb_records(path: Path) -> Iterator[Any]:
    """wandb has no reader in Python: records of a LevelDB log, in blocks of 32 KiB, the first seven bytes a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield Record.FromString(parts)
            parts = b""


def test_trackio_has_every_figure_and_one_run(whole: Whole) -> None:
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; (run,) = S.get_run_records('mlx_qlora'); "
        "print(json.dumps([run['name'], S.get_logs('mlx_qlora', run['name']), S.get_run_config('mlx_qlora', run['name'])]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(whole.where), stdout=subprocess.PIPE, check=True)
    name, logs, config = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith("first-")
    assert config["lora.rank"] == 2
    told: Told = defaultdict(lambda: defaultdict(set))
    for line in logs:
        for each, value in line.items():
            if each not in ("step", "timestamp"):
                told[each][line["step"]].add(value)
    for each, expected in whole.lines.items():
        same(each, told[each], expected)
    assert told["summary/best.step"]


def same(name: str, found: dict[int, set[float]], expected: dict[int, set[float]]) -> None:
    """Every update has its value. What was measured is measured anew when a killed run makes an update again."""
    assert found.keys() == expected.keys(), name
    for step, (value,) in ((step, tuple(values)) for step, values in expected.items()):
        if name in MEASURED:
            assert all(np.isfinite(list(found[step])))
        else:
            assert found[step] == {value}, (name, step)


def tracked(folder: Path, lines: list[dict[str, Any]], most: int | None = None) -> list[str]:
    """The lines in TensorBoard, through its thread; gives the warnings."""
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    opening = Opening(folder, "", {"lora.rank": 8, "lora.targets": ["all-linear"], "max_steps": None}, {})
    all_of_them = Trackers(["tensorboard"], opening, lambda number, count: lines[number : number + count], most, said.append)
    assert all_of_them.begin() == [f"tensorboard --logdir {folder}"]
    all_of_them.end("finished", {"ended": "finished", "steps": len(lines)})
    return said


def scalars(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(each.step, each.value) for each in found.Scalars("train/loss")]


def test_what_a_rollback_undid_is_replaced_and_what_is_missing_is_sent_later(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": loss} for step, loss in [(1, 5), (2, 4), (3, 3), (2, 2), (3, "nan")]]
    assert tracked(tmp_path / "run", lines) == []
    (first, second, third) = scalars(tmp_path / "run")
    assert (first, second) == ((1, 5), (2, 2))
    assert np.isnan(third[1])
    lines += [{"step": 4, "loss": 1}]
    tracked(tmp_path / "run", lines)
    assert [step for step, _ in scalars(tmp_path / "run")] == [1, 2, 3, 4]
    lines[-2:] = [{"step": 3, "loss": 7}, {"step": 4, "loss": 8}]
    tracked(tmp_path / "run", lines, most=4)  # gone on from there with other settings
    assert scalars(tmp_path / "run") == [(1, 5), (2, 2), (3, 7), (4, 8)]
    (tmp_path / "run" / "trackers.json").write_text("{")
    tracked(tmp_path / "run", lines)
    assert scalars(tmp_path / "run")[-1] == (4, 8), "from the beginning, and still each once"


@pytest.fixture
def trained(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """3 updates, in this process."""
    for name, value in (OFFLINE | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}).items():
        monkeypatch.setenv(name, value)
    return replace(small(small_data, tmp_path / "run"), epochs=1, eval_every=2)


def at_update(number: int, happens: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Console.step

    def step(self: Console, report: Any) -> None:
        plain(self, report)
        if report.step == number:
            happens()

    monkeypatch.setattr(Console, "step", step)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trackers_that_fail_are_a_line_each_and_change_nothing(
    whole: Whole, trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(whole.where / "mlflow.db", tmp_path)  # to make its tables takes MLflow some seconds

    def break_them() -> None:
        shutil.rmtree(tmp_path / "run" / "tensorboard")
        (tmp_path / "mlflow.db").write_bytes(b"no database" * 9999)

    train(replace(trained, output_dir=str(tmp_path / "plain")), quiet=True)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_update(2, break_them, patch)
        result = train(replace(trained, report_to=("tensorboard", "mlflow")))
    out = capsys.readouterr().out
    warnings = [line for line in out.splitlines() if "WARNING" in line]
    assert sorted(line.split(":")[1] for line in warnings) == [" mlflow", " tensorboard"]
    assert all("it failed, and gets nothing more of this run: " in line for line in warnings), warnings
    assert "FileNotFoundError" in next(line for line in warnings if "tensorboard" in line)
    assert all("training_metrics.jsonl has every figure" in line for line in warnings)
    assert result.summary["ended"] == "finished"
    assert adapters(tmp_path / "run") == adapters(tmp_path / "plain")
    # Who goes on with it sends what is missing.
    train(replace(trained, report_to=("tensorboard",), resume=True), quiet=True)
    assert [step for step, _ in scalars(tmp_path / "run")][-1] == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_server_that_does_not_answer_is_not_waited_for(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "_TO_OPEN_S", 0.2)
    monkeypatch.setattr(trackers, "_AT_ONCE_S", 0.2)
    monkeypatch.setattr(trackers, "_TO_END_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        result = train(replace(trained, report_to="mlflow"))
    out = capsys.readouterr().out
    assert "trackers  mlflow has not answered yet; training does not wait for it" in out
    assert "WARNING: mlflow: 3 updates had not arrived when it was no longer waited for" in out
    assert result.summary["ended"] == "finished"


@pytest.mark.parametrize("name", ALL)
def test_a_missing_package_is_said_before_anything_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    output = tmp_path / "run"
    flags = ["--model", "not there", "--data", "not there", "--output-dir", str(output), "--report-to", name]
    assert main(flags) == 2
    assert f"pip install 'mlx-qlora[{name}]'" in capsys.readouterr().err
    assert not output.exists()


def test_a_folder_that_wandb_made_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python takes it for one, where the package is not installed."""
    (tmp_path / "tracker_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert trackers._missing("tracker_folder") == "no such package is installed"


def test_wandb_asks_nobody_for_a_key(small_data: Path, tmp_path: Path) -> None:
    env = environment(tmp_path, WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9")
    command = [*CLI, "--model", "embedded", "--data", str(small_data), "--output-dir", "run", "--report-to", "wandb"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "it has no API key. Say `wandb login`" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["report_to: tensorboard,wandb", "report_to: [tensorboard, wandb]"])
def test_a_file_has_them_as_a_list_or_as_a_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text + "\n")
    config = from_yaml(tmp_path / "run.yaml", RunConfig())
    assert config.part(TrackerConfig).trackers == ("tensorboard", "wandb")
    assert parse(["--report-to", "tensorboard,wandb"]).part(TrackerConfig).trackers == ("tensorboard", "wandb")
    assert parse(["--config", str(tmp_path / "run.yaml"), "--report-to", "none"]).part(TrackerConfig).trackers == ()
    (tmp_path / "run.yaml").write_text("seed: 1\nreport_to: [tensorbord, mlflow]\n")
    with pytest.raises(ConfigError, match=r"run.yaml:2: report_to: 'tensorbord' came, one or several of tensorboard, wandb"):
        from_yaml(tmp_path / "run.yaml", RunConfig())
