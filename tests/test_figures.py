"""What is drawn is what the files say, and there is a picture whatever they say."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import course, write_run

from mlx_qlora.look.gap import GRADES, SURE
from mlx_qlora.look.history import History, read_history
from mlx_qlora.look.pictures.curves import thinned
from mlx_qlora.look.pictures.figures import DARK, LIGHT, Theme, names_of, over_tokens, png, results, save
from mlx_qlora.look.pictures.panels import PANELS
from mlx_qlora.look.pictures.theme import Drawn

pytest.importorskip("matplotlib")
SIZE = (1440, 1320)


def axes_of(*histories: History) -> dict[str, Any]:
    """The panels by name."""
    figure = results(histories)
    titles = {title: name for name, (title, _) in PANELS.items()}
    return {titles[axes.get_title(loc="left")]: axes for axes in figure.axes}


def drawn(axes: Any, label: str) -> list[tuple[list[float], list[float]]]:
    """(x, y) of every line of that name."""
    lines = [line.get_data() for line in axes.lines if line.get_label() == label]
    return [([float(v) for v in x], [float(v) for v in y]) for x, y in lines]


@pytest.fixture
def run(tmp_path: Path) -> History:
    return read_history(write_run(tmp_path / "run", course(120), {"ended": "stopped early", "planned_steps": 200}))


def test_the_points_are_those_of_the_metrics(run: History) -> None:
    axes = axes_of(run)
    for panel, column in (("loss", "val_loss"), ("loss", "train_eval_loss"), ("loss", "loss"), ("grad_norm", "grad_norm"),
                          ("learning_rate", "learning_rate"), ("peak_memory", "peak_memory_gb")):  # fmt: skip
        steps, values = run.column(column)
        assert len(steps) in (12, 120)
        assert drawn(axes[panel], column) == [([float(step) for step in steps], values)]
    gaps = [(float(each.step), each.gap) for each, _ in run.validations]
    assert drawn(axes["gap"], "gap") == [([x for x, _ in gaps], [y for _, y in gaps])]


def test_over_tokens_each_point_stands_where_its_tokens_end(tmp_path: Path) -> None:
    """Two runs of as many tokens, one in updates of twice the size: their ends are at one place."""
    runs = [[line | {"tokens": size} for line in course(updates)] for updates, size in ((120, 50), (60, 100))]
    histories = [read_history(write_run(tmp_path / str(number), lines)) for number, lines in enumerate(runs)]
    (axes,) = over_tokens(histories).axes[:1]
    ends = []
    for history, (x, y) in zip(histories, drawn(axes, "val_loss"), strict=True):
        tokens = np.cumsum([line["tokens"] for line in history.lines])
        steps, values = history.column("val_loss")
        assert (x, y) == (tokens[np.array(steps) - 1].tolist(), values)
        ends.append(x[-1])
    assert ends[0] == ends[1]


def test_errors_are_95_percent_either_side(run: History) -> None:
    axes = axes_of(run)["gap"]
    (bars,) = [each for each in axes.collections if hasattr(each, "get_segments") and len(each.get_segments()) == 12]
    halves = [(top - bottom) / 2 for (_, bottom), (_, top) in bars.get_segments()]
    assert halves == pytest.approx([SURE * math.hypot(0.03, 0.04)] * 12)


def test_the_best_the_end_and_where_it_overfits_are_marked(run: History) -> None:
    assert run.best is not None
    best = run.best[0]
    assert best.step == 80, "two thirds of 120"
    axes = axes_of(run)
    assert drawn(axes["loss"], "best") == [([80.0], [best.val_loss])]
    assert drawn(axes["gap"], "best") == [([80.0], [best.gap])]
    assert drawn(axes["loss"], "stopped")[0][0] == [120.0, 120.0]
    (over,) = [patch for patch in axes["loss"].patches if patch.get_label() == "overfits"]
    assert extent(axes["loss"], over)[0::2] == pytest.approx((80, 120))
    assert drawn(axes["grad_norm"], "skipped")[0][0] == [8.0], "where the count of skipped updates grew"


def extent(axes: Any, patch: Any) -> tuple[float, float, float, float]:
    box = patch.get_window_extent().transformed(axes.transData.inverted())
    return box.x0, box.y0, box.x1, box.y1


def test_bands_stand_at_the_grades(tmp_path: Path) -> None:
    lines = course(60)
    lines[-1] |= {"val_loss": 3.0, "train_eval_loss": 1.0}
    axes = axes_of(read_history(write_run(tmp_path / "run", lines)))["gap"]
    bands = {patch.get_label(): extent(axes, patch)[1::2] for patch in axes.patches}
    edges = [axes.get_ylim()[0], *(limit for limit, _ in GRADES[:-1]), axes.get_ylim()[1]]
    assert [bands[name] for _, name in GRADES] == [pytest.approx(pair) for pair in pairwise(edges)]


def test_one_high_loss_does_not_press_the_others_together(run: History) -> None:
    axes = axes_of(run)["loss"]
    assert axes.get_ylim()[1] < 3
    above = [loss for loss in run.column("loss")[1] if loss > axes.get_ylim()[1]]
    assert len(above) <= 0.03 * run.step
    assert axes.get_title(loc="right") == f"▲ {len(above)} above the edge, up to 30"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(1, 60))
def test_thinning_keeps_every_peak(values: list[float], columns: int) -> None:
    x = np.arange(1, len(values) + 1)
    few, kept = thinned(x, values, columns)
    assert len(few) <= max(4 * columns, min(len(values), 4 * columns))
    assert (kept.min(), kept.max(), kept[0], kept[-1]) == (min(values), max(values), values[0], values[-1])
    assert (np.diff(few) > 0).all()
    assert kept.tolist() == [values[int(place) - 1] for place in few]


def test_thirty_thousand_updates_are_drawn_with_few_points(tmp_path: Path) -> None:
    long = read_history(write_run(tmp_path / "run", course(30_000, every=1000)))
    axes = axes_of(long)
    for name in ("loss", "grad_norm", "tokens_per_second"):
        assert sum(len(line.get_xdata()) for line in axes[name].lines) < 6_000
    assert max(drawn(axes["grad_norm"], "grad_norm")[0][1]) == max(long.column("grad_norm")[1])


NAN = {"step": 1, "epoch": "nan", "loss": "nan", "grad_norm": "inf", "val_loss": "nan", "train_eval_loss": "nan",
       "learning_rate": "nan", "tokens_per_second": "nan", "peak_memory_gb": "nan"}  # fmt: skip
UNUSUAL: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "no update": list,
    "one update": lambda: course(1),
    "two updates": lambda: course(2, every=1),
    "no validation": lambda: course(30, every=1000),
    "one validation": lambda: course(10),
    "nothing finite": lambda: [{**NAN, "step": step} for step in (1, 2, 3)],
    "all the same": lambda: [{**line, "loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0} for line in course(30)],
    "no errors": lambda: [{k: v for k, v in line.items() if not k.endswith("_se")} for line in course(30)],
    "a huge loss": lambda: [*course(30), {"step": 31, "loss": 1e30, "grad_norm": 1e-30, "val_loss": 1e300}],
    "text instead of figures": lambda: [{"step": 1, "loss": "much", "epoch": None, "val_loss": [1], "skipped_updates": {}}],
}  # fmt: skip


@pytest.mark.parametrize("name", list(UNUSUAL))
def test_there_is_always_a_picture(name: str, tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", UNUSUAL[name]()))
    save(results([history]), tmp_path / "picture.png")
    raw = (tmp_path / "picture.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", raw[16:24]) == SIZE


def test_several_runs_in_one_picture_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{n}" / name, course(40 + n, seed=n)) for n, name in enumerate(["a", "$x_{$", "_b", "a"])]
    runs.append(write_run(tmp_path / "\udcff東京", UNUSUAL["no update"]()))
    histories = [read_history(run) for run in runs]
    assert names_of(histories) == ["0/a", "$x_{$", "_b", "3/a", "?東京"]
    axes = axes_of(*histories)
    assert [len(x) for x, _ in drawn(axes["loss"], "val_loss")] == [4, 4, 4, 4]
    said = [text.get_text().strip() for text in axes["loss"].get_legend().get_texts()]
    assert said == [
        "0/a",
        "$x_{$",
        "_b",
        "3/a",
        "?東京",
        *["with marks: validation, ± 95 %", "thin: training, smooth", "the best of each"],
    ]
    assert png(results(histories, DARK))
    looks = [Drawn(histories[0], "", place, False, LIGHT) for place in range(8)]
    for look in ("colour", "marker", "dashes"):
        assert len({str(getattr(each, look)) for each in looks}) == 8


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_the_curves_of_a_run_stand_out_from_the_paper(theme: Theme) -> None:
    """WCAG 2: 3 to 1 for what has to be seen, 4.5 to 1 for what has to be read."""
    for colour in (*theme.runs[:3], theme.soft):
        assert contrast(colour, theme.paper) > 3
    for band in (theme.paper, *theme.bands):
        assert contrast(theme.ink, band) > 4.5
        assert contrast(theme.runs[1], band) > 2


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_paper_has_the_colour_of_the_theme(run: History, tmp_path: Path) -> None:
    from matplotlib.image import imread

    for theme in (LIGHT, DARK):
        save(results([run], theme), tmp_path / "picture.png")
        corner = imread(tmp_path / "picture.png")[0, 0, :3]
        assert corner * 255 == pytest.approx([int(theme.paper[place : place + 2], 16) for place in (1, 3, 5)], abs=0.5)


def test_a_picture_that_can_not_be_written_leaves_the_old_one(run: History, tmp_path: Path) -> None:
    (tmp_path / "there.png").mkdir()
    with pytest.raises(OSError, match=r"there\.png"):
        save(results([run]), tmp_path / "there.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there.png"]
