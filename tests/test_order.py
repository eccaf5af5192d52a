"""The order of an epoch, and how examples become batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.data import order as order_module
from mlx_qlora.data.layout import BatchConfig, Layout, lay_out, updates
from mlx_qlora.data.order import Order, groups, shuffled, updates_in
from mlx_qlora.data.prepare import InMemory
from mlx_qlora.records import Bookmark
from tests.conftest import in_rows, make_examples


def test_the_order_is_the_same_everywhere() -> None:
    """Written down once. `examples/flat_loop.py` computes the same in plain Python, and is held against the library."""
    assert shuffled(np.arange(8), 8, (0, 0)).tolist() == GOLDEN_8
    assert shuffled(np.arange(3), 10**12, (7,)).tolist() == GOLDEN_LARGE


GOLDEN_8 = [3, 2, 7, 6, 0, 1, 4, 5]
GOLDEN_LARGE = [326476503757, 458303024166, 530522723532]


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 3000), key=st.lists(st.integers(-5, 2**70), min_size=1, max_size=3))
def test_each_number_once(count: int, key: list[int]) -> None:
    assert sorted(shuffled(np.arange(count), count, key).tolist()) == list(range(count))


def test_it_is_shuffled() -> None:
    """Where 64 examples go over 2,000 seeds: each of the 4,096 (place, example) about 31 times."""
    counts = np.zeros((64, 64), int)
    for seed in range(2000):
        counts[np.arange(64), shuffled(np.arange(64), 64, (seed, 0))] += 1
    chi_squared = ((counts - 2000 / 64) ** 2 / (2000 / 64)).sum()
    assert 3969 - 5 * 89 < chi_squared < 3969 + 5 * 89  # mean and 5 standard deviations for 63 x 63 degrees of freedom
    neighbours = np.diff(shuffled(np.arange(10_000), 10_000, (1,)))
    assert abs(np.mean(neighbours == 1) - 1e-4) < 5e-4


def test_each_example_exactly_once_an_epoch_with_the_remainder() -> None:
    made = InMemory(make_examples(23))
    config = BatchConfig(batch_size=2, gradient_accumulation=3)
    planned = list(updates(made, Order((23,), seed=5), config, Layout(), epochs=3))
    assert len(planned) == updates_in(Order((23,)), 6, 3, made.supervised) == 12
    assert [len(update.ids) for update in planned] == [6, 6, 6, 5] * 3
    for epoch in range(3):
        part = planned[4 * epoch : 4 * epoch + 4]
        assert Counter(id for update in part for id in update.ids) == Counter(example.id for example in made)
        assert part[-1].epoch == epoch + 1
    assert [u.ids for u in planned[:4]] != [u.ids for u in planned[4:8]], "another order in the next epoch"


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60), per_update=st.integers(1, 9), minimum=st.integers(0, 40), stop=st.integers(0, 200),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_bookmark_goes_on_where_it_was_made(count: int, per_update: int, minimum: int, stop: int, seed: int) -> None:
    supervised = np.random.default_rng(seed).integers(0, 12, count)
    order = Order((count,), seed=seed)
    whole = list(groups(order, per_update, 3, supervised, minimum))
    assert len(whole) == updates_in(order, per_update, 3, supervised, minimum)
    cut = min(stop, len(whole) - 1)
    rest = list(groups(order, per_update, 3, supervised, minimum, whole[cut][1]))
    assert [group.tolist() for group, _ in rest] == [group.tolist() for group, _ in whole[cut + 1 :]]
    for epoch in range(3):
        seen = [number for group, at in whole for number in group.tolist() if (at.epoch, at.place > 0) in _in_epoch(epoch)]
        assert Counter(seen) == Counter(range(count))
    if supervised.sum() >= minimum:
        assert all(supervised[group].sum() >= minimum for group, _ in whole)


def test_a_bookmark_goes_on_across_the_blocks_of_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "_BLOCK", 7)
    supervised = np.full(100, 5)
    for minimum in (0, 30, 200):
        whole = list(groups(Order((100,)), 4, 2, supervised, minimum))
        assert all(supervised[group].sum() >= max(minimum, 20) for group, _ in whole)
        for cut, (_, at) in enumerate(whole):
            rest = groups(Order((100,)), 4, 2, supervised, minimum, at)
            assert [group.tolist() for group, _ in rest] == [group.tolist() for group, _ in whole[cut + 1 :]]


def _in_epoch(epoch: int) -> set[tuple[int, bool]]:
    return {(epoch, True), (epoch + 1, False)}


@pytest.mark.parametrize("weights", [(3.0, 1.0, 1.0), (0.2, 5.0, 1.0)])
def test_weighted_sources_keep_their_shares_and_use_all_their_examples(weights: tuple[float, ...]) -> None:
    order = Order((1000, 300, 50), weights, seed=2)
    ends = np.cumsum(order.sizes)
    times = np.zeros(order.length, int)
    for epoch in range(20):
        drawn = order.at(epoch, np.arange(order.length))
        shares = np.bincount(np.searchsorted(ends, drawn, side="right"), minlength=3) / order.length
        assert np.abs(shares - np.array(weights) / sum(weights)).max() < 0.01
        half = np.bincount(np.searchsorted(ends, drawn[:675], side="right"), minlength=3) / 675
        assert np.abs(half - shares).max() < 0.08, "mixed, not one source after another"
        np.add.at(times, drawn, 1)
    for start, end in zip((0, *ends), ends, strict=False):
        own = times[start:end]
        assert own.max() - own.min() <= 1, "no example of a source is seen twice before another is seen once"


def test_an_order_of_a_billion_needs_no_memory_for_it() -> None:
    order = Order((10**9,), seed=1)
    first = order.at(3, np.arange(1000))
    assert len(np.unique(first)) == 1000
    np.testing.assert_array_equal(order.at(3, np.array([999])), first[999:])
    assert first.max() > 9e8


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 12), rows=st.integers(1, 5), seed=st.integers(0, 100))
def test_batches_hold_each_target_once_with_its_weight_and_its_context(count: int, rows: int, seed: int) -> None:
    made = make_examples(count, seed)
    expected = Counter()
    for example in made:
        for place in np.flatnonzero(example.weights):
            expected[(*example.tokens[:place].tolist(), "->", int(example.tokens[place]), float(example.weights[place]))] += 1
    found = Counter()
    for batch in lay_out(made, in_rows(rows)):
        length = batch.rows.shape[1]
        assert batch.rows.shape[0] <= rows
        assert length % 8 == 0
        assert batch.positions.shape == batch.targets.shape == batch.weights.shape
        for position, target, weight in zip(*map(np.array, (batch.positions, batch.targets, batch.weights)), strict=True):
            if weight:
                row, place = divmod(int(position), length)
                found[(*np.array(batch.rows)[row, : place + 1].tolist(), "->", int(target), float(weight))] += 1
    assert found == expected


def test_a_bookmark_is_where_the_next_update_begins() -> None:
    made = InMemory(make_examples(7))
    first, second, *_ = updates(made, Order((7,)), BatchConfig(batch_size=3), Layout(), epochs=2)
    assert (first.next, second.next) == (Bookmark(0, 3), Bookmark(0, 6))
    *_, third, fourth = updates(made, Order((7,)), BatchConfig(batch_size=3), Layout(), 2, start=second.next)
    assert third.next == Bookmark(1, 6)
    assert fourth.next == Bookmark(2, 0)
