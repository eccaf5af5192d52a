"""A teacher's logits on the disk say what the teacher said, and say so when they do not."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_qlora.data.kept_logits import KeptLogits
from mlx_qlora.data.logit_shards import CARD, Card, Records, open_writer
from mlx_qlora.distilling.condense import condense, draws
from mlx_qlora.errors import ConfigError, DataError, RunFolderError

CARD_OF = Card(
    teacher="teacher", fingerprint="f", adapters="", tokenizer="t", template="c", data="d", top_k=16, samples=0,
    temperatures=(2.0, 1.5, 1.0, 0.5), logit_clip=50.0, vocabulary=290, teacher_vocabulary=300, matmul={}, versions={},
    date="today",
)  # fmt: skip
Array = NDArray[Any]


def teacher_says(places: int, classes: int, spread: float = 4.0, seed: int = 0) -> tuple[Array, Array]:
    """(marks, logits)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(places, classes)) * spread
    logits[0, :3] = 400, -400, 60  # what the clip is for
    return rng.integers(0, 2**64, places, np.uint64), logits.astype(np.float32)


def records(card: Card, marks: Array, logits: Array) -> Records:
    uniform = mx.array(draws(marks, card.samples))
    found = condense(mx.array(logits), card.vocabulary, card.top_k, card.temperatures, card.logit_clip, uniform)
    values, ids, rests, drawn, drawn_ids, bit = (np.array(each) for each in found)
    return Records(marks, values, ids, rests, drawn, drawn_ids, int(np.count_nonzero(bit)))


def kept(folder: Path, card: Card, marks: Array, logits: Array, per_shard: int = 7) -> KeptLogits:
    writer = open_writer(folder, card, 1)
    for begin in range(0, len(marks), per_shard):
        part = slice(begin, begin + per_shard)
        writer.add(records(card, marks[part], logits[part]))
    writer.finish()
    writer.close()
    return KeptLogits.open(folder)


def dense(logits: Array, card: Card = CARD_OF) -> Array:
    """Log-probabilities in float64, of the classes in common, clipped."""
    whole = logits[:, : card.vocabulary].astype(np.float64)
    whole = np.clip(whole, -card.logit_clip, card.logit_clip) if card.logit_clip else whole
    return whole - log_sum(whole)[:, None]


def log_sum(logs: Array) -> Array:
    greatest = logs.max(axis=-1)
    return np.asarray(greatest + np.log(np.exp(logs - greatest[:, None]).sum(axis=-1)))


def pairs(some: Iterable[Array], others: Iterable[Array]) -> Iterator[tuple[Array, Array]]:
    return zip(some, others, strict=True)


def ones(marks: Array) -> Array:
    return np.ones(len(marks), np.float32)


@pytest.mark.parametrize("temperature", CARD_OF.temperatures)
@pytest.mark.parametrize("clip", [50.0, 6.0, 0.0])
def test_top_k_and_the_rest_are_the_dense_softmax_at_each_temperature(tmp_path: Path, temperature: float, clip: float) -> None:
    card = replace(CARD_OF, logit_clip=clip)
    marks, logits = teacher_says(40, 300)
    order = np.random.default_rng(1).permutation(40)
    values, ids, rest = kept(tmp_path / "c", card, marks, logits).classes(marks[order], ones(marks), temperature, None)
    logs = dense(logits, card)[order]
    expected = -np.sort(-logs, axis=1)[:, :16]
    assert np.all(np.abs(values - expected) <= np.abs(expected) * 2.0**-11 + 1e-4)  # half a step of float16, and float32's
    assert np.all(np.diff(values.astype(np.float32), axis=1) <= 0)
    np.testing.assert_allclose(np.take_along_axis(logs, ids.astype(np.int64), axis=1), expected, atol=1e-9)
    others = logs / temperature
    np.put_along_axis(others, ids.astype(np.int64), -np.inf, axis=1)
    np.testing.assert_allclose(rest, log_sum(others), rtol=2e-6, atol=2e-5)
    # And so the distribution at this temperature, of the classes and the rest as one more.
    whole = np.concatenate([values.astype(np.float64) / temperature, rest[:, None]], axis=1)
    whole = np.exp(whole - log_sum(whole)[:, None])
    exact = np.exp(logs / temperature - log_sum(logs / temperature)[:, None])
    np.testing.assert_allclose(whole[:, :-1], np.take_along_axis(exact, ids.astype(np.int64), axis=1), atol=1e-3)


def test_with_all_classes_it_is_the_dense_distribution_and_nothing_is_left(tmp_path: Path) -> None:
    card = replace(CARD_OF, top_k=290)
    marks, logits = teacher_says(20, 300)
    values, ids, rest = kept(tmp_path / "c", card, marks, logits).classes(marks, ones(marks), 1.5, None)
    back = np.empty_like(values)
    np.put_along_axis(back, ids.astype(np.int64), values, axis=1)
    assert np.all(rest == -np.inf)
    assert np.all(np.abs(back - dense(logits)) <= np.abs(dense(logits)) * 2.0**-11 + 1e-4)


@pytest.mark.parametrize("stored", [16, 290])
def test_fewer_classes_than_are_kept_leave_the_others_in_the_rest(tmp_path: Path, stored: int) -> None:
    marks, logits = teacher_says(20, 300)
    cache = kept(tmp_path / "c", replace(CARD_OF, top_k=stored), marks, logits)
    values, ids, rest = cache.classes(marks, ones(marks), 0.5, 4)
    assert values.shape == ids.shape == (20, 4)
    others = dense(logits) / 0.5
    np.put_along_axis(others, ids.astype(np.int64), -np.inf, axis=1)
    np.testing.assert_allclose(rest, log_sum(others), rtol=5e-4, atol=2e-3)  # those of float16


@pytest.mark.parametrize("temperatures", [(2.0, 1.5, 1.0), tuple(np.linspace(2, 1, 16).tolist())])
def test_a_place_takes_400_bytes_at_most_and_large_ids_come_back(tmp_path: Path, temperatures: tuple[float, ...]) -> None:
    card = replace(CARD_OF, vocabulary=151_936, top_k=64, temperatures=temperatures)
    marks, logits = teacher_says(24, 151_936)
    many = np.tile(marks, 20) + np.arange(480, dtype=np.uint64)
    said = records(card, marks, logits)
    wide: list[Any] = [np.tile(each, (20, 1)) for each in (said.values, said.ids, said.rests, said.drawn, said.drawn_ids)]
    writer = open_writer(tmp_path / "c", card, 1 << 20)
    writer.add(Records(many, *wide))
    writer.finish()
    writer.close()
    taken = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    assert taken / 480 <= 400
    cache = KeptLogits.open(tmp_path / "c")
    _, ids, _ = cache.classes(many[:24], ones(marks), 2.0, None)
    assert ids.max() > 2**16
    assert np.array_equal(np.sort(ids), np.sort(np.argsort(-logits, axis=1)[:, :64]))


def test_every_flipped_byte_is_noticed_and_named(tmp_path: Path) -> None:
    marks, logits = teacher_says(10, 300)
    folder = tmp_path / "c"
    kept(folder, CARD_OF, marks, logits, per_shard=5)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for at in range(0, len(whole), 1 if path.name == CARD else 37):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(DataError, match=path.name):
                KeptLogits.open(folder).classes(marks, ones(marks), 1.0, None)
        path.write_bytes(whole[:-2])
        with pytest.raises(DataError, match=path.name):
            KeptLogits.open(folder)
        path.write_bytes(whole)
    KeptLogits.open(folder).classes(marks, ones(marks), 1.0, None)


def test_a_damaged_shard_is_made_again_and_the_whole_ones_stay(tmp_path: Path) -> None:
    marks, logits = teacher_says(21, 300)
    folder = tmp_path / "c"
    expected = kept(folder, CARD_OF, marks, logits).classes(marks, ones(marks), 1.0, None)
    shard = folder / "logits-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5] + b"wrong")
    (folder / "logits-000009.safetensors").write_bytes(b"left by a kill")
    writer = open_writer(folder, CARD_OF, 1)
    assert "logits-000001.safetensors is damaged" in writer.problems[0]
    assert set(writer.marks().tolist()) == set(np.delete(marks, range(7, 14)).tolist())
    writer.add(records(CARD_OF, marks[7:14], logits[7:14]))
    writer.finish()
    writer.close()
    assert sorted(path.name for path in folder.glob("logits*")) == [f"logits-{n:06d}.safetensors" for n in (0, 2, 3)]
    again = KeptLogits.open(folder).classes(marks, ones(marks), 1.0, None)
    assert all(np.array_equal(a, b) for a, b in pairs(again, expected))


def test_places_without_weight_are_not_looked_up(tmp_path: Path) -> None:
    marks, logits = teacher_says(8, 300)
    cache = kept(tmp_path / "c", replace(CARD_OF, samples=3), marks, logits)
    asked = np.concatenate([marks, np.arange(4, dtype=np.uint64)])
    weights = np.concatenate([ones(marks), np.zeros(4, np.float32)])
    for top_k in (None, 5):
        values, ids, rest = cache.classes(asked, weights, 1.0, top_k)
        assert np.isfinite(values).all()
        assert np.isfinite(rest).all()
        alone = cache.classes(marks, ones(marks), 1.0, top_k)
        assert all(np.array_equal(a[:8], b) for a, b in pairs((values, ids, rest), alone))
    drawn, drawn_ids = cache.samples(asked, weights)
    assert np.isfinite(drawn).all()
    assert drawn_ids.shape == (12, 3)


def test_missing_places_are_counted_with_reasons(tmp_path: Path) -> None:
    marks, logits = teacher_says(8, 300)
    cache = kept(tmp_path / "c", CARD_OF, marks, logits)
    asked = np.concatenate([marks, np.arange(4, dtype=np.uint64)])
    with pytest.raises(DataError, match=r"4 of 12 places are not in .*max_seq_length.*\n.*mlx-qlora distill cache"):
        cache.classes(asked, ones(asked), 1.0, None)
    assert cache.differences("t", "c", "d") == ()
    assert cache.differences("t", "other", "other") == ("the chat template", "the data or its seed")
    with pytest.raises(DataError, match="made with another: the chat template, the data or its seed"):
        cache.classes(asked, ones(asked), 1.0, None)
    empty = open_writer(tmp_path / "empty", CARD_OF, 1)
    empty.close()
    with pytest.raises(DataError, match=r"8 of 8 places .* it was not made to its end"):
        KeptLogits.open(tmp_path / "empty").classes(marks, ones(marks), 1.0, None)


def test_what_was_not_kept_is_said_all_at_once(tmp_path: Path) -> None:
    marks, logits = teacher_says(8, 300)
    cache = kept(tmp_path / "c", CARD_OF, marks, logits)
    cache.require((2.0, 0.5), 50.0, False, 16, 290)
    cache.require((1.5,), 50.0, False, None, 1000)
    with pytest.raises(ConfigError) as wrong:
        cache.require((2.0, 1.7, 3.0), 30.0, True, 17, 289)
    for said in (
        "distill.temperature: 1.7 3 came over the run, and 2 1.5 1 0.5 are kept", "distill.logit_clip: 30 came, and 50",
        "distill.estimate: sampled", "distill.top_k: 17 came, and 16", "model: it has 289 classes",
        "mlx-qlora distill cache",
    ):  # fmt: skip
        assert said in str(wrong.value)
    with pytest.raises(ConfigError, match=r"distill.temperature: 1.7"):
        cache.classes(marks, ones(marks), 1.7, None)


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/logits-000000.safetensors").write_text("mine")
    with pytest.raises(RunFolderError, match="holds something else"):
        open_writer(tmp_path / "mine", CARD_OF, 1)
    with pytest.raises(RunFolderError, match="is a file"):
        open_writer(tmp_path / "mine/logits-000000.safetensors", CARD_OF, 1)
    with pytest.raises(DataError, match="is no cache"):
        KeptLogits.open(tmp_path / "mine")
    marks, logits = teacher_says(8, 300)
    kept(tmp_path / "c", CARD_OF, marks, logits)
    with pytest.raises(ConfigError, match=r"distill.top_k: 16 there, 8 now(.|\n)*--overwrite"):
        open_writer(tmp_path / "c", replace(CARD_OF, top_k=8), 1)
    holds = open_writer(tmp_path / "c", CARD_OF, 1)
    with pytest.raises(RunFolderError, match="another process"):
        open_writer(tmp_path / "c", CARD_OF, 1)
    holds.close()
    open_writer(tmp_path / "c", replace(CARD_OF, top_k=8), 1, overwrite=True).close()
    assert not list((tmp_path / "c").glob("logits*"))


@contextmanager
def files_open_at_most(more: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_many_shards_do_not_need_many_files_open(tmp_path: Path) -> None:
    marks, logits = teacher_says(150, 300)
    expected = kept(tmp_path / "one", CARD_OF, marks, logits, per_shard=150).classes(marks, ones(marks), 1.0, None)
    many = kept(tmp_path / "many", CARD_OF, marks, logits, per_shard=1)
    with files_open_at_most(134):
        many = KeptLogits.open(tmp_path / "many")
        for _ in range(2):
            found = many.classes(marks, ones(marks), 1.0, None)
    for a, b in pairs(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_drawn_follows_from_the_place_and_its_mean_is_unbiased(tmp_path: Path) -> None:
    """Over three blocks of classes, a peak and a long tail; f is what the tail has most of, so that its loss would show."""
    card = replace(CARD_OF, vocabulary=1500, samples=8)
    rng = np.random.default_rng(2)
    logits = np.tile(np.concatenate([[9.0], rng.normal(size=1499) * 1.5]).astype(np.float32), (3000, 1))
    marks = rng.integers(0, 2**64, 3000, np.uint64)
    cache = kept(tmp_path / "c", card, marks, logits, per_shard=1000)
    values, ids = cache.samples(marks, ones(marks))
    logs = dense(logits[:1], card)[0]
    assert np.all(np.abs(values - logs[ids]) <= np.abs(logs[ids]) * 2.0**-11 + 1e-4)
    for f in (np.arange(1500) != 0, logs, rng.normal(size=1500), np.arange(1500.0)):
        means = f[ids].mean(axis=1)
        exact, error = float(np.exp(logs) @ f), float(means.std() / np.sqrt(len(means)))
        assert abs(means.mean() - exact) < 4 * error
        assert error < 0.1 * abs(exact) + 0.02
    order = rng.permutation(3000)[:100]
    alone = records(card, marks[order], logits[order])
    assert np.array_equal(alone.drawn_ids, ids[order])


def test_a_tail_that_float32_would_lose_beside_the_peak_is_drawn() -> None:
    """150,000 classes of 2e-8 each after one of 0.997: added to 0.997 one by one they are nothing."""
    logits = np.full((64, 150_001), np.log(2e-8), np.float32)
    logits[:, 0] = np.log(0.997)
    marks = np.random.default_rng(3).integers(0, 2**64, 64, np.uint64)
    said = condense(mx.array(logits), 150_001, 4, (1.0,), 0.0, mx.array(draws(marks, 500)))
    ids = np.array(said[4])
    assert abs(float((ids != 0).mean()) - 0.003) < 4 * np.sqrt(0.003 / 32_000)
    assert ids.max() > 100_000


def test_a_teacher_in_half_precision_is_condensed_in_single() -> None:
    logits = (mx.random.normal((5, 64), key=mx.random.key(0)) * 5).astype(mx.float16)
    half = condense(logits, 64, 8, (1.5,), 50.0, mx.zeros((5, 0, 2)))
    single = condense(logits.astype(mx.float32), 64, 8, (1.5,), 50.0, mx.zeros((5, 0, 2)))
    assert all(mx.array_equal(a, b) for a, b in zip(half, single, strict=True))
