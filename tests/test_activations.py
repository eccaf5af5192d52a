"""What the layers below the adapters give, kept: the same loss and gradients, whatever happens to the files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qlora.data.layout import lay_out
from mlx_qlora.model import lora
from mlx_qlora.model.activations import KeptStates, KeptTrunk, TrunkCacheConfig, first_kept, open_kept
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.trunk import Passage, first_adapted
from tests.conftest import SHAPES, tiny_model
from tests.test_layouts import LAYOUTS, PACKABLE, assert_same, family, plainly, through, trainable

_opened: list[KeptTrunk] = []


def opened(folder: Path, model: nn.Module, **settings: object) -> KeptTrunk:
    config = TrunkCacheConfig(trunk_cache_dir=str(folder), **settings)  # type: ignore[arg-type]
    kept = open_kept(config, model, "tiny", first_kept(config, model))
    assert kept is not None
    _opened.append(kept)
    return kept


@pytest.fixture(autouse=True)
def _all_closed() -> Iterator[None]:
    yield
    while _opened:
        with suppress(OSError):  # closed in the test
            _opened.pop().kept.close()


@pytest.mark.parametrize("layout", ["plain", "packed-small", "padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kept_states_have_the_plain_gradient(shape: str, layout: str, tmp_path: Path) -> None:
    """The first time as computed, the second time as read, in another layout and with dropout and checkpointing."""
    if layout.startswith("packed") and shape not in PACKABLE:
        pytest.skip("this model can't be packed")
    model = trainable(shape, dropout=0.3, layers=1)
    assert first_adapted(model) == 2
    expected = plainly(model, family())
    kept = opened(tmp_path, model)
    first = tuple(kept.batches(lay_out(family(), LAYOUTS["plain"])))
    assert_same(through(model, first, Passage(first=2)), expected)
    kept.kept.close()
    again = opened(tmp_path, model)
    positions = len(again.kept)
    second = tuple(again.batches(lay_out(family(), LAYOUTS[layout])))
    assert len(again.kept) == positions, "all of it was there"
    for checkpoint in (False, True):
        assert_same(through(model, second, Passage(first=2, checkpoint=checkpoint, chunk=16)), expected)


def test_what_is_read_is_not_computed(tmp_path: Path) -> None:
    model = trainable("mistral", layers=1)
    kept = opened(tmp_path, model)
    batches = lay_out(family(), LAYOUTS["packed"])
    tuple(kept.batches(batches))
    read = tuple(kept.batches(batches))
    expected = through(model, batches)
    for layer in model.model.layers[:2]:  # type: ignore[union-attr]
        layer.mlp.down_proj = nn.Linear(1, 1).freeze()  # would raise
    assert_same(through(model, read, Passage(first=2)), expected)


def test_common_beginnings_are_kept_once(tmp_path: Path) -> None:
    kept = opened(tmp_path, trainable("mistral", layers=1))
    batches = lay_out(family(), LAYOUTS["plain"])
    tuple(kept.batches(batches))
    distinct = {int(mark) for batch in batches for mark in np.array(batch.marks) if mark}
    assert len(kept.kept) == len(distinct) < sum(len(example.tokens) - 1 for example in family())


@pytest.mark.parametrize("damage", ["flip", "cut", "index", "no index", "longer"])
def test_damage_is_found_and_made_good(tmp_path: Path, damage: str) -> None:
    model = trainable("mistral", layers=1)
    batches = lay_out(family(), LAYOUTS["packed-small"])
    expected = plainly(model, family())
    kept = opened(tmp_path, model)
    tuple(kept.batches(batches))
    kept.kept.close()
    states, index = kept.kept.folder / "states.bin", kept.kept.folder / "index.safetensors"
    raw = states.read_bytes()
    if damage == "flip":
        states.write_bytes(raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:])
    elif damage == "cut":
        states.write_bytes(raw[:-5])
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:-3])
    elif damage == "no index":
        index.unlink()
    else:
        states.write_bytes(raw + b"half of a run")  # a process died while it appended
    again = opened(tmp_path, model)
    found = tuple(again.batches(batches))
    assert_same(through(model, found, Passage(first=2)), expected)
    assert again.kept.damaged == (0 if damage in ("no index", "longer") else 1)
    again.kept.close()
    last = opened(tmp_path, model)
    tuple(last.batches(batches))
    assert last.kept.damaged == 0 or damage == "flip", "a flipped run stays in the file and is not looked for"
    assert_same(through(model, tuple(last.batches(batches)), Passage(first=2)), expected)


def test_bf16_is_within_its_rounding(tmp_path: Path) -> None:
    model = trainable("mistral", layers=1)
    (loss, _), batches = plainly(model, family()), lay_out(family(), LAYOUTS["packed"])
    kept = opened(tmp_path, model, trunk_cache="bf16")
    computed = through(model, tuple(kept.batches(batches)), Passage(first=2))
    assert (kept.kept.folder / "states.bin").stat().st_size == len(kept.kept) * 64 * 2
    read = through(model, tuple(kept.batches(batches)), Passage(first=2))
    assert read[0].total.item() == computed[0].total.item(), "in the first epoch as in the others"
    assert read[0].total.item() == pytest.approx(loss.total.item(), rel=1e-2)
    assert read[0].total.item() != loss.total.item()


def test_the_limit_and_a_second_run_are_kept_to(tmp_path: Path) -> None:
    model = trainable("mistral", layers=1)
    batches = lay_out(family(), LAYOUTS["packed-small"])
    expected = plainly(model, family())
    small = opened(tmp_path, model, trunk_cache_gb=64 * 4 * 50 / 1e9)
    found = tuple(small.batches(batches))
    assert "trunk_cache_gb is reached" in small.kept.problem
    assert (small.kept.folder / "states.bin").stat().st_size <= 64 * 4 * 50
    assert_same(through(model, found, Passage(first=2)), expected)
    other = opened(tmp_path, model)
    assert other.kept.problem == "another run writes to it"
    assert_same(through(model, tuple(other.batches(batches)), Passage(first=2)), expected)
    small.kept.close()


def test_another_model_has_other_states_and_the_oldest_go_first(tmp_path: Path) -> None:
    model = trainable("mistral", layers=1)
    batches = lay_out(family(), LAYOUTS["packed"])
    first = opened(tmp_path, model)
    tuple(first.batches(batches))
    first.kept.close()
    changed = trainable("mistral", layers=1)
    weight = changed.model.layers[1].mlp.down_proj  # type: ignore[union-attr]
    weight.scales = weight.scales + mx.where(mx.arange(weight.scales.size).reshape(weight.scales.shape) == 7, 1e-3, 0.0)
    second = opened(tmp_path, changed)
    assert second.kept.folder != first.kept.folder
    assert len(second.kept) == 0
    tuple(second.batches(batches))
    second.kept.close()
    third = opened(tmp_path, trainable("mistral", layers=2), trunk_cache_gb=1e-7)
    assert not first.kept.folder.exists()
    assert not second.kept.folder.exists()
    third.kept.close()


def test_nothing_is_kept_where_everything_is_adapted() -> None:
    full = trainable("mistral", layers=1, quantized=False)
    full.model.embed_tokens.unfreeze()  # type: ignore[union-attr]
    head = tiny_model("mistral")
    lora.attach(head, LoraConfig(targets=("lm_head",)))
    for model in (trainable("mistral"), full, head):
        assert first_kept(TrunkCacheConfig(), model) == 0
    assert first_kept(TrunkCacheConfig(trunk_cache="off"), trainable("mistral", layers=1)) == 0
    assert first_kept(TrunkCacheConfig(), trainable("mistral", layers=1)) == 2


def test_marks_of_padding_are_zeros(tmp_path: Path) -> None:
    kept = KeptStates(tmp_path, 3, mx.float32, 1e9)
    kept.add(np.array([5, 0, 9], np.uint64), mx.arange(9).reshape(3, 3).astype(mx.float32))
    found = kept.find(np.array([9, 0, 5], np.uint64))
    assert found is not None
    assert found.tolist() == [[6, 7, 8], [0, 0, 0], [0, 1, 2]]
    assert kept.find(np.array([1], np.uint64)) is None
    kept.close()


def test_a_reader_keeps_to_the_file_that_it_opened(tmp_path: Path) -> None:
    marks = np.array([1, 2], np.uint64)
    writer = KeptStates(tmp_path / "a", 4, mx.float32, 1e9)
    writer.add(marks, mx.arange(8).reshape(2, 4).astype(mx.float32))
    writer.flush()
    reader = KeptStates(tmp_path / "a", 4, mx.float32, 1e9)
    writer.close()
    shutil.rmtree(tmp_path / "a")
    with KeptStates(tmp_path / "a", 4, mx.float32, 1e9) as other:
        other.add(marks, 1000 + mx.arange(8).reshape(2, 4).astype(mx.float32))
        other.flush()
        found = reader.find(marks)
        assert found is not None
        assert found.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    reader.close()
