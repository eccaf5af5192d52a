"""The trace: what it says, and that its picture is one that others can open."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlx_qlora.look.trace import NAME, Tracer


@pytest.fixture
def said() -> list[str]:
    return []


def walk(tracer: Tracer) -> None:
    tracer.enter("load")
    for update in (1, 2):
        tracer.enter("batch", update=update, ids=(f"a:{update}",), shape=None, part=None)
        for part in (1, 2):
            tracer.enter("forward", part=part, parts=2, shape="1 x 812 tokens, 95 places")
            tracer.enter("backward")
        tracer.enter("update")
    tracer.enter("evaluate")


def test_each_phase_is_said_before_and_after(tmp_path: Path, said: list[str]) -> None:
    tracer = Tracer(tmp_path, said.append)
    walk(tracer)
    tracer.close()
    assert said[0] == f"{'':<22} load"
    assert "load        0." in said[1]
    assert said[4] == "update 1 part 1/2      forward     1 x 812 tokens, 95 places"
    assert said[5].startswith("update 1 part 1/2      forward     0.")
    assert "in use" in said[5]
    assert "at most" in said[5]
    assert said[-2].startswith("update 2               evaluate"), "which is no part of a micro-batch"
    assert len(said) == 2 * 14


def test_the_picture_is_whole_after_closing_and_of_use_before(tmp_path: Path, said: list[str]) -> None:
    tracer = Tracer(tmp_path, said.append)
    walk(tracer)
    cut = (tmp_path / NAME).read_text(encoding="utf-8")
    unfinished: list[dict[str, Any]] = json.loads(cut + "]")
    tracer.close()
    tracer.close()
    events: list[dict[str, Any]] = json.loads((tmp_path / NAME).read_text(encoding="utf-8"))
    assert events[: len(unfinished)] == unfinished
    spans = [event for event in events if event["ph"] == "X"]
    phases = [span for span in spans if span["tid"] == 1]
    assert [span["name"] for span in phases[:4]] == ["load", "batch", "forward", "backward"]
    assert phases[2]["args"]["shape"] == "1 x 812 tokens, 95 places"
    assert phases[2]["args"]["update"] == 1
    assert all(a["ts"] + a["dur"] <= b["ts"] + 0.2 for a, b in pairwise(phases)), "one after the other"
    updates = {span["name"]: span for span in spans if span["tid"] == 2}
    assert list(updates) == ["update 1", "update 2"]
    for number, span in enumerate(updates.values(), 1):
        inside = [each for each in phases if each["args"].get("update") == number and each["name"] != "evaluate"]
        assert span["args"]["ids"] == [f"a:{number}"]
        assert span["ts"] == inside[0]["ts"]
        assert span["ts"] + span["dur"] >= inside[-1]["ts"] + inside[-1]["dur"] - 0.2


def test_facts_that_json_has_no_word_for(tmp_path: Path, said: list[str]) -> None:
    tracer = Tracer(tmp_path, said.append)
    tracer.enter("forward", path=Path("a"), kinds={1, 2})
    tracer.close()
    assert json.loads((tmp_path / NAME).read_text(encoding="utf-8"))[2]["args"]["path"] == "a"
