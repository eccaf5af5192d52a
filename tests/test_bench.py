"""`mlx-qlora bench`, with real processes on a tiny model. No time is ever asserted."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import numpy as np
import pytest

from mlx_qlora.bench import picture, report
from mlx_qlora.bench.data import arrange, generated, lay_field
from mlx_qlora.bench.floor import Layer, Multiplications, Sizes, sizes_of
from mlx_qlora.bench.models import configuration, generate
from mlx_qlora.bench.race import Lane, Outcome, Race
from mlx_qlora.bench.settings import Contestant, ModelShape, RaceConfig, contestants
from mlx_qlora.bench.turns import Work
from mlx_qlora.commands import main
from mlx_qlora.model.load import load, load_tokenizer

TINY = ModelShape(hidden=64, layers=2, vocab=4096)
TINY_FLAGS = ["--hidden", "64", "--layers", "2", "--vocab", "4096"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "model"
    generate(TINY, 0, folder)
    return folder


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, ours otherwise laid out, mlx-lm with our kernels, flat, and a contestant that can't start."""
    flags = ["--data", "mixed", "--batch-size", "2", "--gradient-accumulation", "2", "--updates", "1", "--repeats", "2"]
    flags += ["--same-kernels", "--against", "mlx-lm,flat", "--learning-rate", "1e-3", "--lora-layers", "1"]
    flags += ["--ours", "batch_size=4,gradient_accumulation=1", "--ours", "lora.targets=[no_such_layer]"]
    assert main(["bench", *TINY_FLAGS, *flags, "--json", str(tmp_path / "race.json")]) == 0
    told = capsys.readouterr()
    assert "trained tok/s" in told.out
    assert "times the bare multiplications" in told.out
    assert "float32 for everybody" in told.out or report.machine()["gpu"]
    assert "repeat 2/2  flat" in told.err
    result = json.loads((tmp_path / "race.json").read_text())
    check_structure(result)
    rows = {row["contestant"]: row for row in result["rows"]}
    fallen = rows.pop("mlx-qlora lora.targets=[no_such_layer]")
    assert "names no linear layer" in fallen["failed"]
    assert "out of the race: lora.targets: 'no_such_layer'" in told.out
    floor = rows.pop("floor")
    assert list(rows) == ["mlx-qlora", "mlx-qlora batch_size=4,gradient_accumulation=1", "mlx-lm, our kernels", "flat"]
    assert {row["supervised_tokens_counted"] for row in rows.values()} == {rows["flat"]["supervised_tokens"]}
    assert all(row["same_examples"] for row in rows.values())
    assert floor["positions"] == rows["mlx-qlora"]["positions"], "the floor multiplies what we computed"
    assert [row["reference"] for row in rows.values()] == [False, False, True, False]
    ours = rows["mlx-qlora"]
    for other in ("flat", "mlx-qlora batch_size=4,gradient_accumulation=1"):
        assert abs(rows[other]["loss"] - ours["loss"]) < 1e-4
        np.testing.assert_allclose(rows[other]["training_losses"], ours["training_losses"], atol=1e-4)
    assert ours["loss"] < result["loss_before"]
    assert rows["mlx-lm, our kernels"]["loss"] < result["loss_before"]


def check_structure(result: dict[str, Any]) -> None:
    assert set(result) == {"date", "machine", "versions", "settings", "model", "data", "loss_before", "rows"}
    assert {"cpu", "cores", "gpu", "memory_gb"} <= set(result["machine"])
    assert {"python", "mlx", "mlx-lm", "mlx-qlora"} <= set(result["versions"])
    assert result["settings"]["all_updates"] == 3
    for row in result["rows"]:
        if row["failed"] or row["kind"] == "floor":
            continue
        assert len(row["seconds_per_update_of_each_repeat"]) == 2
        assert row["seconds_per_update_min"] <= row["seconds_per_update"] <= row["seconds_per_update_max"]
        for name in ("supervised_tokens_per_second", "positions_per_supervised_token", "first_update_s", "peak_memory_gb"):
            assert row[name] > 0
        assert math.isfinite(row["loss"] + row["speedup"] + row["memory_ratio"])
        assert (row["floor_ratio"] is not None) == (row["kind"] == "mlx-qlora")


def test_who_is_killed_is_reported_and_the_others_go_on(model: Path, tmp_path: Path) -> None:
    config = RaceConfig(TINY, data="shared", batch_size=2, updates=1, repeats=1, against=("flat",), floor=False)
    ground = lay_field(config, load_tokenizer(str(model)), tmp_path, {2})

    def kill_flat(text: str) -> None:
        if "flat: loaded" in text:
            os.kill(next(each for each in race._workers if each.contestant.kind == "flat").pid, signal.SIGKILL)

    with Race(config, str(model), ground, tmp_path, kill_flat) as race:
        outcome = race.run(contestants(config))
    ours, flat = report.rows(outcome, ground)
    assert flat["failed"].startswith("killed by signal 9")
    assert flat["speedup"] is None
    assert ours["failed"] is None
    assert ours["loss"] < outcome.beginning["loss"]
    assert any("flat: out of the race: killed" in line for line in report.table(config, [ours, flat], 1.0))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_an_interrupted_race_leaves_nothing(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlx_qlora", "bench", *TINY_FLAGS, "--against", "flat", "--updates", "200"]
    command += ["--repeats", "1", "--batch-size", "1"]
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment) as race:
        assert race.stderr is not None
        for line in race.stderr:
            if "warm-up     flat" in line:
                break
        if how == "ctrl-c":
            os.killpg(race.pid, signal.SIGINT)  # as a terminal does
        else:
            os.kill(race.pid, signal.SIGTERM)
        said = race.stderr.read()
    assert race.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("mlx-qlora-bench-*"))
    for _ in range(50):  # a process that was killed takes a moment
        try:
            os.killpg(race.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker is left")


WRONG: dict[str, tuple[list[str], str]] = {
    "unknown flag": (["--hiden", "64"], "--hiden"),
    "hidden": (["--hidden", "100"], "hidden: 100 came, a multiple of 64"),
    "kv heads": (["--hidden", "256", "--heads", "4", "--kv-heads", "3"], "kv_heads: 3 came"),
    "too many layers": (["--layers", "2", "--lora-layers", "3"], "lora_layers: 3 came"),
    "no repeats": (["--repeats", "0"], "repeats: 0 came, a whole number from 1"),
    "against nobody known": (["--against", "mlx-lm,torch"], "'torch' came, some of mlx-lm"),
    "ours without value": (["--ours", "seed"], "key=value is expected"),
    "ours that is fixed": (["--ours", "seed=3"], "seed can't be changed"),
    "ours unknown": (["--ours", "lora.rang=3"], "there is no such setting; did you mean lora.rank?"),
    "ours wrong": (["--ours", "clip_grad_norm=much"], "--ours clip_grad_norm=much: clip_grad_norm: much came"),
    "ours of another size": (["--ours", "batch_size=3"], "3 x 1 examples an update came, 16 are expected"),
    "json nowhere": (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json: a file in a folder that is there"),
    "no such model": (["--model", "./no-such-model"], "there is no such folder"),
    "no such data": (["--data", "no-such-data", *TINY_FLAGS], "no-such-data: there is no such file or folder"),
    "too long": (["--data", "long", "--max-seq-length", "512", *TINY_FLAGS], "longer than max_seq_length 512"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_input(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, piece = WRONG[name]
    try:
        code = main(["bench", *flags])
    except SystemExit as error:  # tyro ends the process itself
        code = int(str(error.code))
    err = capsys.readouterr().err
    assert code == 2
    assert piece in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_who_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("mlx_tune", "matplotlib") else found(name))
    assert main(["bench", "--against", "mlx-tune"]) == 2
    assert "mlx-tune is not installed here" in capsys.readouterr().err
    assert main(["bench", "--png", "a.png"]) == 2
    assert "pip install 'mlx-qlora[plots]'" in capsys.readouterr().err


def test_the_generated_data(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))

    def lengths(kind: str, count: int) -> tuple[list[dict[str, Any]], list[int]]:
        rows = [row for row, _ in zip(generated(kind, tokenizer, 0), range(count), strict=False)]
        return rows, [
            len(tokenizer.apply_chat_template(row["messages"], return_dict=False))
            if "messages" in row
            else len(tokenizer.encode(row["text"]))
            for row in rows
        ]

    rows, sizes = lengths("shared", 16)
    assert len({row["messages"][0]["content"] for row in rows}) == 1
    assert 4700 < sum(sizes) < 5300
    rows, sizes = lengths("mixed", 200)
    assert 15 <= min(sizes) < 40
    assert 300 < max(sizes) <= 420
    assert len({row["messages"][0]["content"] for row in rows}) == 200
    _, sizes = lengths("long", 8)
    assert min(sizes) > 950
    assert max(sizes) <= 2048
    assert next(generated("mixed", tokenizer, 1)) == next(generated("mixed", tokenizer, 1))
    assert next(generated("mixed", tokenizer, 1)) != next(generated("mixed", tokenizer, 2))


def test_the_same_updates_for_everybody_from_data_of_ones_own(model: Path, tmp_path: Path) -> None:
    """As many rows as the race takes, from the beginning again where there are fewer; mlx-lm's own batches hold ours."""
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.tuner.trainer import iterate_batches

    (tmp_path / "mine").mkdir()
    rows = [
        {"messages": [{"role": "user", "content": "gato " * n}, {"role": "assistant", "content": "mia"}]} for n in range(1, 8)
    ]
    for name, own in (("train", rows), ("valid", rows[:2])):
        (tmp_path / "mine" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    config = RaceConfig(TINY, data=str(tmp_path / "mine"), batch_size=2, gradient_accumulation=2, updates=1, repeats=3)
    tokenizer = load_tokenizer(str(model))
    ground = lay_field(config, tokenizer, tmp_path / "ground", {2})
    lines = [json.loads(line) for line in (ground.arranged[2] / "train.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert {json.dumps(line) for line in lines} == {json.dumps(row) for row in rows}
    np.random.seed(config.seed)
    batches = iterate_batches(CacheDataset(ChatDataset(lines, tokenizer, mask_prompt=True)), 2, 2048)
    spans = [spans.tolist() for _, spans in batches]
    each = [sum(end - begin for batch in spans[at : at + 2] for begin, end in batch) for at in range(0, 8, 2)]
    assert each == list(ground.supervised)
    assert sorted(each.name for each in (tmp_path / "mine").iterdir()) == ["train.jsonl", "valid.jsonl"], "nothing is left"


def test_arranged_lines_come_in_order() -> None:
    order = list(range(12))
    lines = arrange(order, 3, seed=5)
    placed = [lines[3 * batch : 3 * batch + 3] for batch in np.random.RandomState(5).permutation(4)]
    assert [number for batch in placed for number in batch] == order


def test_the_floor_knows_the_shapes(model: Path) -> None:
    sizes = sizes_of(load(str(model)).model, 1)
    assert sizes.head == (4096, 64)
    assert (sizes.blocks, sizes.blocks_with_gradient, sizes.heads, sizes.kv_heads, sizes.head_dim) == (2, 1, 1, 1, 64)
    assert len(sizes.layers) == 14
    assert sum(layer.adapted for layer in sizes.layers) == 7
    assert sum(layer.passes for layer in sizes.layers) == 4, "all but queries, keys and values of the lowest adapted block"
    tied = sizes_of(load("embedded").model, None)
    assert tied.head == (2048, 256)
    products = Multiplications(Sizes((Layer(64, 128, True, True),), (256, 64), 1, 1, 4, 2, 16), rank=4)
    work: Work = {"positions": 21, "places": 6, "attention": [(2, 8, 13), (1, 5, 5)], "kept": False}
    products.prepare([work])
    products.batch(work)


def test_models_of_any_shape() -> None:
    mistral = configuration(ModelShape(hidden=4096, layers=32, vocab=32_768))
    assert (mistral["num_attention_heads"], mistral["num_key_value_heads"], mistral["head_dim"]) == (32, 8, 128)
    assert mistral["intermediate_size"] == 14_336
    own = ModelShape(hidden=512, heads=4, kv_heads=2, intermediate=1024)
    assert (configuration(own)["head_dim"], own.number_of_kv_heads, own.width_inside) == (128, 2, 1024)


def test_figures_by_hand() -> None:
    """Medians, spread and ratios of a race that never was."""

    def lane(kind: str, seconds: list[float], peak: float) -> Lane:
        def update(second: float) -> dict[str, Any]:
            return {"seconds": second, "supervised": 10, "positions": 50, "loss": math.nan}

        blocks = [[update(second), update(second)] for second in seconds]
        return Lane(Contestant(kind, kind), load_s=2.0, warmup=[update(3.0)], blocks=blocks, peak_gb=peak, loss=1.5)

    class Ground:
        supervised = (10,) * 7
        tokens = 0

    outcome = Outcome([lane("mlx-qlora", [1.0, 2.0, 1.5], 2.0), lane("mlx-lm", [3.0, 9.0, 4.5], 4.0)], None, {})
    ours, theirs = report.rows(outcome, Ground())  # type: ignore[arg-type]
    assert (ours["seconds_per_update"], ours["seconds_per_update_min"], ours["seconds_per_update_max"]) == (1.5, 1.0, 2.0)
    assert ours["supervised_tokens_per_second"] == pytest.approx(10 / 1.5)
    assert (ours["positions_per_supervised_token"], ours["first_update_s"]) == (5.0, 5.0)
    assert (ours["speedup"], ours["memory_ratio"], theirs["speedup"], theirs["memory_ratio"]) == (3.0, 0.5, 1.0, 1.0)
    assert report._finite(ours)["training_losses"][0] is None
    assert "mlx-qlora: 3.00 times faster than mlx-lm, 0.50 times its memory" in report.table(RaceConfig(), [ours, theirs], 2.0)


def test_times_are_compared_update_for_update() -> None:
    """A repeat with long documents is long for everybody: the ratios are 3, 4.5 and 1.8, those of the medians 2.25."""
    ours, theirs = ({"failed": None, "seconds_per_update_of_each_repeat": each} for each in ([1.0, 2.0, 2.5], [3.0, 9.0, 4.5]))
    assert report._by_repeat(theirs, ours) == pytest.approx(3.0)
    assert report._by_repeat(theirs, ours | {"failed": "out of memory"}) is None


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {"failed": None, "peak_memory_gb": 1.0, "supervised_tokens_per_second": 2.0}
    both = [{**row, "contestant": name, "kind": name} for name in ("mlx-qlora", "mlx-lm")]
    picture.draw(both, "a machine", tmp_path / "race.png")
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")
