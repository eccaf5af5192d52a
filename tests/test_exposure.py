"""What a run will see: the arithmetic, against runs whose figures are known and against counting by hand; its warnings."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import course, write_run

from mlx_qlora.commands import main
from mlx_qlora.config import RunConfig
from mlx_qlora.data.corpus import gather
from mlx_qlora.data.exposure import reckon, rows, seen, windows, windows_of
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.data.windows import WindowConfig
from mlx_qlora.look.exposure import Other, block, brief, compared, warnings
from mlx_qlora.model.load import load_tokenizer
from mlx_qlora.outlook import PRESETS, amount, of_tokens, other
from mlx_qlora.train import run

# Two runs of the past, and one that mended what was wrong with the first.
V5 = {"max_seq_length": 256, "stride": 128, "batch_size": 32, "epochs": 4}
V4 = {"max_seq_length": 192, "stride": 2, "batch_size": 192, "epochs": 6}
MENDED = {"max_seq_length": 256, "stride": 64, "batch_size": 48, "epochs": 50}
V5_TOKENS, V4_TOKENS = 30_000_000, 12_472_000  # V4 had fewer; so many make its 32,478 updates


def as_yaml(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in settings.items()) + "\ndata: nowhere\n", encoding="utf-8")
    return path


def planned(folder: Path, *flags: str) -> dict[str, Any]:
    found = folder / "plan.json"
    assert main(["plan", *flags, "--json", str(found)]) == 0
    made: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return made


# The arithmetic


@given(targets=st.integers(1, 60), window=st.integers(1, 12), share=st.floats(0, 1))
def test_windows_are_counted_as_they_are_laid(targets: int, window: int, share: float) -> None:
    stride = max(1, round(share * window))
    starts = [0]
    while starts[-1] + window < targets:
        starts.append(min(starts[-1] + stride, targets - window))
    assert windows_of(targets, window, stride) == len(starts)
    assert {at for start in starts for at in range(start, start + window)} >= set(range(targets))


def test_windows_of_many_documents_at_once() -> None:
    targets = np.array([0, 1, 5, 256, 257, 999], np.int64)
    assert windows_of(targets, 256, 64).tolist() == [windows_of(int(each), 256, 64) for each in targets]


def test_the_figures_of_v5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, "--config", str(as_yaml(tmp_path, "V5", V5)), "--tokens", "30M", "--tokens-per-second", "900")
    own = found["exposure"]
    assert (own["full_updates_per_epoch"], own["updates_per_epoch"], own["tokens_per_update"]) == (7_324, 7_325, 8_192)
    assert own["windows"] == 234_374 == 7_324 * 32 + 6
    assert own["tokens_seen"] == 4 * 234_374 * 256
    assert own["tokens_seen"] == pytest.approx(29_296 * 8_192, rel=1e-4)
    assert own["passes"] == pytest.approx(8, rel=1e-4)
    assert found["seconds"] == own["tokens_seen"] / 900
    said = capsys.readouterr().out
    assert "7,325 an epoch: 7,324 full ones and one of 6" in said
    assert "240.0 M in 4 epochs" in said
    assert re.search(r"passes over each token +8\.0\n", said)
    assert "3 days 2 h at 900 tokens a second" in said


def test_the_figures_of_the_run_that_mended_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, "--config", str(as_yaml(tmp_path, "mended", MENDED)), "--tokens", "30_000_000")["exposure"]
    assert found["full_updates_per_epoch"] == 9_765
    assert found["full_updates_per_epoch"] * 50 == 488_250
    assert found["full_updates_per_epoch"] * found["tokens_per_update"] == 119_992_320
    assert found["tokens_seen"] == pytest.approx(6e9, rel=1e-4)
    said = capsys.readouterr().out
    assert "6.00 G in 50 epochs" in said
    assert "WARNING" not in said


def test_v4_saw_thirty_times_as_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    v4 = planned(tmp_path, "--config", str(as_yaml(tmp_path, "V4", V4)), "--tokens", str(V4_TOKENS))["exposure"]
    assert v4["full_updates_per_epoch"] == 32_478
    assert v4["tokens_seen"] == pytest.approx(7.2e9, rel=5e-3)
    assert "WARNING" not in capsys.readouterr().out
    beside = ["--compare-with", str(tmp_path / "V4.yaml"), "--compare-tokens", str(V4_TOKENS)]
    v5 = planned(tmp_path, "--config", str(as_yaml(tmp_path, "V5", V5)), "--tokens", "30M", *beside)
    assert v5["compared_with"]["tokens_seen"] == v4["tokens_seen"]
    warning = v5["warnings"][-1]
    assert "sees 30 times fewer tokens than V4 (240 M against 7.2 G)" in warning
    said = capsys.readouterr().out
    assert warning in said
    assert re.search(r"tokens seen +240\.0 M +7\.18 G", said)


def test_what_a_comparison_says_to_set_sees_as_many() -> None:
    """Every remedy of a warning, taken at its word, makes the plan see what it was asked for."""
    config = RunConfig(**V5)
    enough = Other("V4", of_tokens(RunConfig(**V4), V4_TOKENS, None, None).tokens_seen or 0)
    sentence, less = compared(of_tokens(config, V5_TOKENS, None, None), enough)
    assert less
    for mended in remedies(config, sentence):
        made = of_tokens(mended, V5_TOKENS, None, None).tokens_seen or 0
        assert enough.tokens_seen <= made < 1.1 * enough.tokens_seen
    ended = replace(config, max_steps=1000)
    sentence, _ = compared(of_tokens(ended, V5_TOKENS, None, None), enough)
    (mended,) = remedies(ended, sentence)
    assert (of_tokens(mended, V5_TOKENS, None, None).tokens_seen or 0) == pytest.approx(enough.tokens_seen, rel=1e-2)


def remedies(config: RunConfig, sentence: str) -> list[RunConfig]:
    """The configurations that a sentence proposes, one for each `--name value` between its last colon and its end."""
    ways = [way for way in re.split(r", or ", sentence.rsplit(":", 1)[1]) if "--" in way]
    return [
        replace(config, **{name.replace("-", "_"): int(value) for name, value in re.findall(r"--([\w-]+) (\d+)\b", way)})
        for way in ways
        if re.search(r"--[\w-]+ \d+\b", way)
    ]


def test_rows_are_read_but_for_their_last_token() -> None:
    made = reckon(rows(tokens=1000, examples=10, supervised=200), examples_per_update=4, epochs=3, trained=90)
    assert (made.tokens_seen, made.supervised_tokens_seen, made.passes) == (3 * 990, 600, 3.0)
    assert (made.updates_per_epoch, made.full_updates_per_epoch, made.updates) == (3, 2, 9)
    assert made.tokens_per_parameter == 33


def test_max_steps_may_end_within_an_epoch() -> None:
    data = windows(30_000_000, 256, 128)
    part = reckon(data, 32, epochs=4, max_steps=7_325 + 10)
    assert part.tokens_seen == (234_374 + 320) * 256
    assert part.ended_by_max_steps
    whole = reckon(data, 32, epochs=4, max_steps=1_000_000)
    assert (whole.updates, whole.ended_by_max_steps) == (29_300, False)


def test_what_counts_once_is_read_each_time() -> None:
    each, once = (reckon(windows(1001, 100, 25, overlap), 4, epochs=2) for overlap in ("each", "once"))
    assert each.tokens_seen == once.tokens_seen == 2 * 37 * 100
    assert each.supervised_tokens_seen == each.tokens_seen
    assert once.supervised_tokens_seen == 2 * 1000


# Warnings


def warned(tokens: int, trained: int | None = None, **settings: Any) -> str:
    config = RunConfig(max_seq_length=256, **settings)
    return "\n".join(warnings(of_tokens(config, tokens, trained, trained), trained is not None, PRESETS))


def test_a_stride_above_a_quarter_is_warned_of() -> None:
    said = warned(1_000_000, stride=128, epochs=4)
    assert "stride 128 is 50% of the window of 256" in said
    assert "--stride 64, or --epochs 8" in said
    for mended in remedies(RunConfig(max_seq_length=256, stride=128, epochs=4), said):
        quarter = of_tokens(RunConfig(max_seq_length=256, epochs=4), 1_000_000, None, None)
        assert of_tokens(mended, 1_000_000, None, None).tokens_seen == pytest.approx(quarter.tokens_seen, rel=1e-2)
    assert not warned(1_000_000, stride=64)
    assert not warned(1_000_000)  # a quarter is the default
    assert not warned(1_000_000, stride=128, overlap="once")  # what overlaps is context, and nothing is seen less for it
    assert not warned(200, stride=128)  # all of it is one window


def test_less_than_one_pass_is_warned_of() -> None:
    said = warned(10_000_000, stride=256, batch_size=32, max_steps=100)
    assert "100 of the 1,221 updates of an epoch, so 92% of the windows are never seen: --max-steps 1221" in said
    assert not warned(10_000_000, stride=256, batch_size=32, max_steps=1221)
    chats = reckon(rows(147_000, 848, 8_000), 4, epochs=3, max_steps=100)
    assert "53% of the examples are never seen: --max-steps 212" in warnings(chats, False)[0]
    assert not warnings(reckon(rows(147_000, 848, 8_000), 4, epochs=3), False)


def test_too_few_tokens_for_a_model_from_nothing_are_warned_of() -> None:
    settings = {"epochs": 4, "batch_size": 32}
    said = warned(10_000_000, trained=110_000_000, **settings)
    assert "1.5 tokens for each of 110 M parameters" in said
    assert "--preset tiny" in said
    assert "--epochs" not in warned(100_000, trained=110_000_000, **settings)  # thousands of passes are learning by heart
    assert "--preset" not in warned(100_000, trained=2_000_000, **settings)  # there is no smaller one
    few = warned(100_000, trained=2_000_000, max_steps=6, **settings)  # no number of updates over so little text would do
    assert "about 20 are wanted, which takes more text" in few
    made = of_tokens(remedies(RunConfig(max_seq_length=256, **settings), said)[0], 10_000_000, 110_000_000, None)  # type: ignore[arg-type]
    assert 20 <= (made.tokens_per_parameter or 0) < 21
    assert not warned(10_000_000, trained=2_000_000, **settings)
    adapters = of_tokens(RunConfig(max_seq_length=256, **settings), 10_000_000, 110_000_000, None)  # type: ignore[arg-type]
    assert not warnings(adapters, False, PRESETS)


def test_a_stream_has_no_length() -> None:
    made = reckon(None, 16, epochs=3, max_steps=1_000, trained=5)
    assert brief(made, 2048) == "a stream has no known length: 1,000 updates, up to 33 M tokens"
    assert "max_steps says" in brief(reckon(None, 16, epochs=3), 2048)
    assert (list(block(made, False)), warnings(made, True), made.to_json()["tokens_seen"]) == ([], [], None)


def test_runs_are_compared_by_what_they_have_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two runs of the past, as their folders would tell it: in a comparison, and on a page."""
    for name, settings, tokens in (("v4", V4, V4_TOKENS), ("v5", V5, V5_TOKENS)):
        plan = of_tokens(RunConfig(**settings), tokens, 2_000_000, 2_000_000)
        account = {"planned": plan.to_json(), **asdict(seen(plan, plan.updates, plan.tokens_seen or 0, 1))}
        write_run(tmp_path / name, course(40), {"ended": "finished", "steps": 40, "exposure": account}, **settings)
    folders = [str(tmp_path / name) for name in ("v4", "v5")]
    assert main(["compare", *folders]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "v5 has seen 30 times fewer tokens than v4 (240 M against 7.2 G)" in said
    assert "tokens 7.2 G 240 M passes over each token 576 8.0 per trained parameter 3,592 120" in said
    assert main(["report", folders[1]]) == 0
    page = (tmp_path / "v5" / "report.html").read_text(encoding="utf-8")
    assert "<td>240.0 M</td>" in page
    assert "234,374 windows of 256 tokens, with a stride of 128; what overlaps counts in each window" in page
    # A run from before there was such an account.
    write_run(tmp_path / "old", course(40), {"ended": "finished", "steps": 40, "tokens": 9_000, "trainable_parameters": 90})
    found = other(tmp_path / "old", None, lambda rows: None)
    assert (found.tokens_seen, found.updates, found.tokens_per_parameter, found.really) == (9_000, 40, 100, True)


# Wrong input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokens", "30X"], "--tokens: '30X' came, a number from 2 is expected, such as 30M"),
        (["--tokens", "1.5"], "--tokens: '1.5' came"),
        (["--tokens", "30M", "--windows", "off"], "windows: off came"),
        (["--tokens", "30M", "--max-seq-length", "64", "--stride", "65"], "stride: 65 came, a whole number up to"),
        (["--tokens", "30M", "--price-per-hour", "2"], "a speed, too"),
        (["--tokens", "30M", "--tokens-per-second", "0"], "a number above 0"),
        (["--tokens", "30M", "--measure"], "--measure makes real updates"),
        (["--tokens", "30M", "--compare-tokens", "3M"], "--compare-with too"),
        (["--tokens", "30M", "--compare-with", "/nowhere/v4"], "The folder of a run, or a YAML file with settings is expected"),
        (["--model", "embedded", "--parameters", "3M"], "nothing beside a model"),
        (["--model", "embedded", "--compare-with", "x.yaml"], "--data FOLDER or --tokens 30M says it"),
        (["--preset", "tiny", "--tokens", "30M", "--parameters", "3M"], "nothing beside a model"),
    ],
)
def test_wrong_input_is_one_message(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    captured = capsys.readouterr().err
    assert said in captured
    assert "Traceback" not in captured


def test_another_plan_whose_data_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    v4 = as_yaml(tmp_path, "V4", V4 | {"model": "embedded"})
    assert main(["plan", "--tokens", "30M", "--compare-with", str(v4)]) == 2
    assert "Say how many tokens its text had, and windows over them are planned: --compare-tokens" in capsys.readouterr().err


def test_another_plan_that_has_no_tokenizer_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    v4 = as_yaml(tmp_path, "V4", V4 | {"preset": "tiny"})
    assert main(["plan", "--tokens", "30M", "--compare-with", str(v4)]) == 2
    assert "no tokenizer is named in it" in capsys.readouterr().err


def test_a_new_model_is_counted_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, "--preset", "tiny", "--tokens", "30M", "--max-seq-length", "256", "--memory", "off")
    assert found["trained"] == found["parameters"] == found["exposure"]["trained_parameters"] == 1_967_808
    assert "from nothing about 20 are the yardstick" in capsys.readouterr().out


def test_help_shows_what_only_plan_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--tokens", "--measure", "--compare-with", "--price-per-hour", "--json", "--learning-rate"):
        assert flag in said


# Real runs


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("overlap", ["each", "once"])
def test_an_epoch_of_windows_reads_what_is_reckoned(tmp_path: Path, cross: bool, overlap: str) -> None:
    """Counted one window after another, of two sources, one of which comes more often than its size says."""
    for name, count in (("one", 40), ("two", 25)):
        (tmp_path / name).mkdir()
        texts = [f"{'A ship sails. ' * (number % 7 + 1)}" for number in range(count)]
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / name / "train.jsonl").write_text(lines, encoding="utf-8")
    how = WindowConfig("on", stride=5, overlap=overlap, cross_documents=cross)  # type: ignore[arg-type]
    source = SourceConfig(data=(str(tmp_path / "one"), str(tmp_path / "two")), data_weights=(1.0, 3.0), data_cache="off")
    corpus = gather(source, RenderConfig(max_seq_length=16), load_tokenizer("embedded"), 0, windows=how)
    made = amount(corpus)
    assert made is not None
    assert corpus.windows is not None
    assert (made.examples, made.documents) == (len(corpus.windows), corpus.windows.documents)
    assert made.readable == sum(stream.tokens - (1 if cross else stream.documents) for stream in corpus.windows.streams)
    drawn = [corpus.windows[number] for number in corpus.order.at(0, np.arange(made.examples)).tolist()]
    assert sum(len(each.tokens) - 1 for each in drawn) == pytest.approx(made.tokens_per_epoch, rel=0.03)
    assert sum(np.count_nonzero(each.weights) for each in drawn) == pytest.approx(made.supervised_per_epoch, rel=0.05)
    alone = amount(replace(corpus, config=replace(source, data_weights=())))  # and exactly, where each comes once
    windows = [corpus.windows[number] for number in range(len(corpus.windows))]
    assert alone is not None
    assert alone.tokens_per_epoch == sum(len(each.tokens) - 1 for each in windows)


def test_a_run_keeps_what_it_has_seen(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside = sorted(small_data.iterdir())
    config = RunConfig(
        model="embedded", data=str(small_data), data_cache="off", output_dir=str(tmp_path / "run"), batch_size=8, epochs=2,
        early_stopping=replace(RunConfig().early_stopping, patience=0),
    )  # fmt: skip
    summary = run(config).summary
    found, plan = summary["exposure"], summary["exposure"]["planned"]
    assert plan["examples"] == 22
    assert plan["updates"] == found["updates"] == 2 * 3
    assert found["tokens_seen"] == plan["tokens_seen"] == 2 * (plan["tokens"] - 22) == summary["tokens"] - 2 * 22
    assert found["supervised_tokens_seen"] == plan["supervised_tokens_seen"] == summary["supervised_tokens"]
    assert found["passes"] == 2
    assert found["tokens_per_parameter"] == found["tokens_seen"] / summary["trainable_parameters"]
    assert re.search(r"exposure  [\d,]+ tokens in 6 updates, 2\.0 passes", capsys.readouterr().out)
    # A shorter plan beside it.
    flags = ["--model", "embedded", "--data", str(small_data), "--data-cache", "off", "--batch-size", "8", "--max-steps", "2"]
    made = planned(tmp_path, *flags, "--memory", "off", "--measure", "--compare-with", str(tmp_path / "run"))
    assert "--max-steps 3 sees each once" in made["warnings"][0]
    assert re.search(r"sees 2\.\d times fewer tokens than run .*: for as many, --max-steps [67]", made["warnings"][1])
    assert made["compared_with"]["tokens_seen"] == found["tokens_seen"]
    assert made["tokens_per_second"] > 0
    assert sorted(small_data.iterdir()) == beside
