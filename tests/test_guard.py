"""The guard over updates: what it calls too much, and what a run does then."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_qlora import LoraConfig, RunConfig, train
from mlx_qlora.engine.guard import Guard, GuardConfig
from mlx_qlora.errors import ConfigError, NonFiniteError
from mlx_qlora.model import lora
from mlx_qlora.run.metrics import read_metrics


def after(guard: Guard, *updates: float) -> Guard:
    """The guard after losses, of which those that are not finite were skipped."""
    for loss in updates:
        guard = guard.update(loss, math.isfinite(loss))
    return guard


BAD = math.nan


def test_the_share_over_the_window_counts_even_if_never_many_are_in_a_row() -> None:
    guard = Guard(GuardConfig(max_skipped_updates=5, max_skipped_share=0.1, skipped_window=40))
    calm = after(guard, *([1.0] * 12 + [BAD]) * 3)
    assert calm.trouble == ""
    assert after(calm, 1.0, BAD).trouble == "4 of the last 40 updates"
    assert after(calm, *[1.0] * 40, BAD).trouble == "", "what is out of the window is forgotten"


def test_stop_means_at_the_first_and_few_updates_are_not_judged_by_their_share() -> None:
    assert after(Guard(GuardConfig(on_nonfinite="stop")), 1.0, BAD).trouble == "an update"
    assert after(Guard(GuardConfig(skipped_window=10)), BAD, BAD).trouble == ""
    assert after(Guard(GuardConfig(skipped_window=10)), BAD, BAD, BAD).trouble == "3 of the last 3 updates"


def test_a_jump_is_far_above_what_the_losses_did_before() -> None:
    noisy = [2.0, 2.5, 1.5, 3.0, 1.0, 2.2, 1.8, 2.6, 1.4, 2.1, 1.9]
    assert not after(Guard(), *noisy, 4.5).jumped
    assert after(Guard(), *noisy, 9.0).jumped
    calm = [0.10, 0.11, 0.09, 0.10, 0.12, 0.10, 0.08, 0.10, 0.11, 0.10]
    assert not after(Guard(), *calm, 1.0).jumped, "a hard example among easy ones"
    assert after(Guard(), *calm, 2.0).jumped
    assert not after(Guard(), *calm[:5], 9.0).jumped, "too early to say"
    assert not after(Guard(), *calm, BAD).jumped


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match=r"rollback_factor: 1.0 came(.|\n)*max_rollbacks: 0 came"):
        GuardConfig(rollback_factor=1.0, max_rollbacks=0)


@pytest.fixture
def config(small_data: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        model="embedded", data=str(small_data), output_dir=str(tmp_path / "run"), epochs=4, batch_size=8, eval_every=2,
        learning_rate=5e-3, lora=LoraConfig(rank=4, scale=4.0),
    )  # fmt: skip


@pytest.fixture
def poisoned_above(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes adapters beyond a size answer with infinity, as a model does that a high learning rate has blown up."""

    def poison(limit: float) -> None:
        plain = lora.LoRALinear.__call__

        def call(self: Any, x: Any) -> Any:
            import mlx.core as mx

            largest = mx.abs(self["lora_b"]).max()
            return plain(self, x) * mx.where(largest > limit, mx.array(math.inf), mx.array(1.0))

        monkeypatch.setattr(lora.LoRALinear, "__call__", call)

    return poison


def test_bad_updates_are_written_down_with_their_text(config: RunConfig, poisoned_above: Any) -> None:
    poisoned_above(0.02)
    with pytest.raises(NonFiniteError, match=r"3 updates in a row(.|\n)*train.jsonl:\d(.|\n)*learning_rate(.|\n)*--resume"):
        train(replace(config, max_skipped_updates=3, schedule="constant"), quiet=True)
    folder = Path(config.output_dir)
    lines = read_metrics(folder)
    bad = [line for line in lines if line["loss"] in ("nan", "inf") or line["grad_norm"] in ("nan", "inf")]
    assert len(bad) == 3, "nothing is filtered out of the metrics"
    assert sorted(path.name for path in (folder / "bad_updates").iterdir()) == [f"update_{line['step']}.json" for line in bad]
    found = json.loads((folder / "bad_updates" / f"update_{bad[0]['step']}.json").read_text())
    assert len(found["examples"]) == 8
    assert "Responda em português" in found["examples"][0]["text"]
    assert found["examples"][0]["loss"] in ("nan", "inf")
    assert json.loads((folder / "training_summary.json").read_text())["ended"] == "not finite"


def test_going_back_takes_a_lower_rate_and_goes_on(config: RunConfig, poisoned_above: Any, capsys: Any) -> None:
    """With the first rate the adapters pass the limit; with a quarter of it they do not."""
    gentle = replace(config, schedule="constant", learning_rate=1e-2, output_dir=config.output_dir + "-gentle")
    train(gentle, quiet=True)
    poisoned_above(0.06)
    settings = {"on_nonfinite": "rollback", "max_skipped_updates": 2, "rollback_factor": 0.25}
    result = train(replace(config, schedule="constant", learning_rate=1e-2, **settings))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "2 updates in a row with a loss or a gradient that is not finite: back to the checkpoint of update" in out
    assert (result.summary["ended"], result.summary["rollbacks"]) == ("finished", 1)
    lines = read_metrics(result.output_dir)
    assert [line["step"] for line in lines] != list(range(1, 13)), "the updates that were taken back stay in the file"
    assert lines[-1]["learning_rate"] == pytest.approx(2.5e-3)
    assert lines[-1]["rollbacks"] == 1
    assert lines[-1]["skipped_updates"] == 2


def test_going_back_ends_when_it_does_not_help(config: RunConfig) -> None:
    wild = replace(config, lora=LoraConfig(rank=4, scale=1e38), on_nonfinite="rollback", max_skipped_updates=2, max_rollbacks=2)
    with pytest.raises(NonFiniteError):
        train(wild, quiet=True)
    summary = json.loads((Path(config.output_dir) / "training_summary.json").read_text())
    assert summary["ended"] == "not finite"
