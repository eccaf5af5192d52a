from __future__ import annotations

import math

import pytest

from mlx_qlora.engine.stopping import EarlyStoppingConfig, EarlyStoppingMonitor
from mlx_qlora.errors import ConfigError

NAN = math.nan

# (patience, min_delta, mode, metrics, stale after each, stops after which or None, best)
SEQUENCES = [
    (2, 0.0, "min", [3, 2, 1, 1, 1], [0, 0, 0, 1, 2], 5, 1),
    (2, 0.0, "min", [3, 4, 2, 3, 3, 1], [0, 1, 0, 1, 2, 0], 5, 1),
    (3, 0.1, "min", [1.0, 0.95, 0.91, 0.89], [0, 1, 2, 0], None, 0.89),  # small steps count once they add up
    (2, 0.5, "max", [0.1, 0.5, 0.7, 0.65], [0, 1, 0, 1], None, 0.7),
    (1, 0.0, "max", [0.5, 0.5], [0, 1], 2, 0.5),
    (2, 0.0, "min", [NAN, NAN, 5], [1, 2, 0], 2, 5),  # not a number is no improvement, and no best
    (0, 0.0, "min", [1, 2, 3, 4], [0, 1, 2, 3], None, 1),  # never
    (2, 0.0, "min", [math.inf, 4, math.inf], [1, 0, 1], None, 4),
]


@pytest.mark.parametrize(("patience", "min_delta", "mode", "metrics", "stale", "stops", "best"), SEQUENCES)
def test_sequences_by_hand(patience, min_delta, mode, metrics, stale, stops, best) -> None:  # type: ignore[no-untyped-def]
    monitor = EarlyStoppingMonitor(patience, min_delta, mode)
    stopped = None
    for number, (metric, expected) in enumerate(zip(metrics, stale, strict=True), start=1):
        monitor = monitor.update(metric)
        assert monitor.stale == expected, f"after value {number}"
        if monitor.should_stop and stopped is None:
            stopped = number
    assert stopped == stops
    assert monitor.best == best


def test_the_lowest_so_far_is_known_however_near() -> None:
    monitor = EarlyStoppingMonitor(min_delta=0.5)
    seen = []
    for metric in (1.0, 0.9, 0.95, NAN, 0.8):
        monitor = monitor.update(metric)
        seen.append(monitor.is_extreme)
    assert seen == [True, True, False, False, True]
    assert monitor.best == 1.0
    assert monitor.extreme == 0.8


def test_update_leaves_the_monitor_as_it_was() -> None:
    before = EarlyStoppingMonitor()
    before.update(1.0)
    assert before == EarlyStoppingMonitor()


def test_wrong_settings_are_said() -> None:
    with pytest.raises(ConfigError, match=r"early_stopping.patience: -1 came"):
        EarlyStoppingConfig(patience=-1)
    with pytest.raises(ConfigError, match=r"early_stopping.min_delta: nan came"):
        EarlyStoppingMonitor(min_delta=NAN)
    with pytest.raises(ValueError, match="'lowest' came, 'min' or 'max'"):
        EarlyStoppingMonitor(mode="lowest")  # type: ignore[arg-type]
