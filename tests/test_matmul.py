"""The choice between MLX's quantised kernel and dequantising: measured once, kept, forced."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qlora.model import matmul
from mlx_qlora.model.frozen import ALWAYS, NEVER
from mlx_qlora.model.load import load
from mlx_qlora.model.matmul import dense_from, install
from tests.conftest import tiny_model

TOKENS = mx.array([[5, 6, 7, 8, 9, 10, 11]])


def clock(seconds: dict[bool, dict[int, float]], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A machine on which the cases take these times, by dense and rows."""
    now = [0.0]
    cases = []

    def once(dense: bool, rows: int) -> None:
        cases.append(rows)
        now[0] += seconds[dense][rows]

    monkeypatch.setattr(matmul.time, "perf_counter", lambda: now[0])
    return once, cases


def test_from_where_on_dequantising_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    once, cases = clock({True: {4: 2.0, 16: 2.0, 64: 2.0}, False: {4: 1.0, 16: 3.0, 64: 9.0}}, monkeypatch)
    assert dense_from(once, (4, 16, 64)) == 16
    once, cases = clock({True: {4: 1.0, 16: 1.0}, False: {4: 9.0, 16: 30.0}}, monkeypatch)
    assert dense_from(once, (4, 16)) == 4
    assert set(cases) == {4}, "nine times as slow is clear; more rows are not measured"
    once, _ = clock({True: {4: 2.0, 256: 3.0}, False: {4: 1.0, 256: 1.0}}, monkeypatch)
    assert dense_from(once, (4, 256)) == NEVER
    once, _ = clock({True: {4: 1.0, 16: 3.0, 64: 1.0}, False: {4: 1.5, 16: 2.0, 64: 2.0}}, monkeypatch)
    assert dense_from(once, (4, 16, 64)) == 64, "a single odd measurement below is no reason"


def test_what_takes_too_long_to_measure_is_reckoned_from_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 151,000 classes: 4 rows take the kernel 0.5 s and dequantising 0.6; with 256 rows it is 32 s against 0.7."""
    once, cases = clock({True: {4: 0.6}, False: {4: 0.5}}, monkeypatch)
    assert dense_from(once, [4]) == 16
    assert set(cases) == {4}
    once, _ = clock({True: {4: 9.0}, False: {4: 0.1}}, monkeypatch)
    assert dense_from(once, [4]) == NEVER, "as on a GPU"


def test_it_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "matmul.json"
    first = install(tiny_model("mistral"), "auto", path)
    assert sorted(first) == [
        "128x64 affine 4-bit/32",
        "32x64 affine 4-bit/32",
        "64x128 affine 4-bit/32",
        "64x64 affine 4-bit/32",
        "96x64 affine 4-bit/32",
    ]
    kept = json.loads(path.read_text())
    assert all("mlx 0." in key and key.rsplit(" | ", 1)[1] in first for key in kept)

    def fails(*_: object) -> int:
        raise AssertionError("measured again")

    monkeypatch.setattr(matmul, "dense_from", fails)
    assert install(tiny_model("mistral"), "auto", path) == first
    key = next(iter(kept))
    path.write_text(json.dumps(kept | {key: 77}))
    assert 77 in install(tiny_model("mistral"), "auto", path).values(), "what is kept counts"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "b"}'])
def test_a_file_that_is_no_such_file_is_written_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "matmul.json"
    path.write_text(content)
    install(tiny_model("mistral"), "auto", path)
    assert len(json.loads(path.read_text())) == 5


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert install(tiny_model("mistral"), "auto", tmp_path / "file" / "matmul.json")


def test_forced_ways_are_taken_and_equal() -> None:
    plain = tiny_model("mistral-tied")
    outputs = {"mlx": plain(TOKENS)}
    for how, rule in (("quantized", NEVER), ("dequantize", ALWAYS)):
        model = tiny_model("mistral-tied")
        assert set(install(model, how).values()) == {rule}
        outputs[how] = model(TOKENS)
        assert mx.allclose(outputs[how], outputs["mlx"], rtol=1e-4, atol=1e-4)
    assert mx.array_equal(outputs["quantized"], outputs["mlx"])
    assert not mx.array_equal(outputs["dequantize"], outputs["mlx"])


def test_load_takes_the_way() -> None:
    assert load("embedded", "quantized").model.model.layers[0].mlp.down_proj.dense_from == NEVER  # type: ignore[union-attr]
