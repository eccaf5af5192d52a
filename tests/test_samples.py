"""Texts that a model writes while it is trained: they change nothing, come again after a resumption, and hurt nobody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import pytest
from runs import course, write_run

from mlx_qlora import LoraConfig, RunConfig
from mlx_qlora.data.corpus import gather
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.files import json_lines
from mlx_qlora.look import samples
from mlx_qlora.look.console import Console
from mlx_qlora.look.history import read_history
from mlx_qlora.look.pages.report import report
from mlx_qlora.look.pages.sections import tell
from mlx_qlora.look.samples import NAME, Prompt, SampleConfig, prompts_of, write
from mlx_qlora.model.load import Loaded
from mlx_qlora.records import EvalReport
from mlx_qlora.run import checkpoint
from mlx_qlora.train import run

BEGUN = (Prompt("", (1,)), Prompt("O gato", (1, 50, 60)))


def config(data: Path, folder: Path, **more: Any) -> RunConfig:
    return RunConfig(
        model="embedded", data=str(data), output_dir=str(folder), max_steps=4, eval_every=2, batch_size=2, save_every=2,
        schedule="constant", learning_rate=5e-3, lora=LoraConfig(rank=2, dropout=0.1, layers=2), sample_tokens=6,
        sample_prompts=("Quem joga?", "O gato"), **more,
    )  # fmt: skip


def losses(folder: Path) -> list[tuple[object, ...]]:
    names = ("step", "loss", "grad_norm", "val_loss", "train_eval_loss")
    return [tuple(line.get(name) for name in names) for line in json_lines(folder / "training_metrics.jsonl")]


def adapters(folder: Path) -> bytes:
    return (folder / "adapters" / "adapters.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with samples after every update."""
    folder = tmp_path_factory.mktemp("samples") / "whole"
    run(config(small_data, folder, sample_every=1), quiet=True)
    return folder


def test_training_is_the_same_with_and_without(whole: Path, small_data: Path, tmp_path: Path) -> None:
    run(config(small_data, tmp_path / "bare"), quiet=True)
    assert losses(tmp_path / "bare") == losses(whole)
    assert adapters(tmp_path / "bare") == adapters(whole)
    assert not (tmp_path / "bare" / NAME).exists(), "rows are fine-tuned without samples, unless they are asked for"
    lines = json_lines(whole / NAME)
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [line["prompt"] for line in lines[:2]] == ["Quem joga?", "O gato"]
    assert len({line["text"] for line in lines}) > 4


def test_a_resumed_run_writes_the_same_and_no_update_twice(whole: Path, small_data: Path, tmp_path: Path) -> None:
    """From the checkpoint of update 2, as after a kill in update 4; half a line is left of its samples."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(next(each for each in checkpoint.there(folder) if each.name.endswith("step4")))
    with (folder / NAME).open("a") as file:
        file.write('{"step": 4, "prompt": "Que')
    (folder / "training_summary.json").unlink()
    run(config(small_data, folder, sample_every=1, resume=True), quiet=True)
    assert (folder / NAME).read_text() == (whole / NAME).read_text()
    assert losses(folder) == losses(whole)


@pytest.mark.parametrize("problem", [RuntimeError("[metal::malloc] no memory"), KeyboardInterrupt()])
def test_what_goes_wrong_in_it_does_not_lose_the_run(
    problem: BaseException, whole: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: object) -> Iterator[tuple[int, list[int]]]:
        raise problem
        yield

    with monkeypatch.context() as patched:
        patched.setattr(samples, "continuations", fail)
        if isinstance(problem, RuntimeError):
            run(config(small_data, tmp_path / "run", sample_every=3))
            assert "WARNING: update 3: no samples: RuntimeError: [metal::malloc] no memory" in capsys.readouterr().out
        else:
            with pytest.raises(KeyboardInterrupt):
                run(config(small_data, tmp_path / "run", sample_every=3), quiet=True)
    if isinstance(problem, KeyboardInterrupt):
        assert json.loads((tmp_path / "run" / "training_summary.json").read_text())["ended"] == "interrupted"
        run(config(small_data, tmp_path / "run", sample_every=3, resume=True), quiet=True)
        assert [line["step"] for line in json_lines(tmp_path / "run" / NAME)] == [3, 3, 4, 4], "the end has samples, too"
    assert losses(tmp_path / "run") == losses(whole)
    assert adapters(tmp_path / "run") == adapters(whole)


def test_model_and_random_numbers_are_as_before(embedded: Loaded) -> None:
    how = SampleConfig(sample_tokens=8)
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    embedded.model.train()
    first = write(embedded.model, embedded.tokenizer, BEGUN, how, seed=0, step=7)
    assert mx.random.uniform(shape=(4,)).tolist() == expected
    assert embedded.model.training
    assert write(embedded.model, embedded.tokenizer, BEGUN, how, seed=0, step=7) == first
    others = [write(embedded.model, embedded.tokenizer, BEGUN, how, seed, step) for seed, step in ((0, 8), (1, 7))]
    texts = [[line["text"] for line in lines] for lines in (first, *others)]
    assert len({tuple(each) for each in texts}) == 3
    greedy = replace(how, sample_temperature=0.0)
    assert [line["text"] for line in write(embedded.model, embedded.tokenizer, BEGUN, greedy, 0, 1)] == [
        line["text"] for line in write(embedded.model, embedded.tokenizer, BEGUN, greedy, 5, 2)
    ]


def test_when(small_data: Path) -> None:
    def steps(every: int | None, of_text: bool = False) -> list[int]:
        how = SampleConfig(sample_every=every)
        return [step for step in range(1, 11) if how.due(step, 10, validated=of_text and step % 5 == 0)]

    assert steps(None) == []
    assert steps(None, of_text=True) == [5, 10]
    assert steps(4) == steps(4, of_text=True) == [4, 8, 10]
    assert steps(0, of_text=True) == []


def test_what_they_begin_with(embedded: Loaded, small_data: Path, tmp_path: Path) -> None:
    tokenizer = embedded.tokenizer
    text = "Uma noite destas, vindo da cidade para o Engenho Novo, encontrei no trem um rapaz."
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{text} {name}"}) + "\n")

    def prompts(data: Path, windows: bool = False, *wanted: str) -> list[Prompt]:
        corpus = gather(SourceConfig(data=str(data), data_cache="off"), RenderConfig(), tokenizer, 0)
        corpus = replace(corpus, windows=object() if windows else None)
        return prompts_of(SampleConfig(sample_prompts=wanted), corpus, corpus.valid_examples())

    for windows in (False, True):
        begin, words = prompts(tmp_path, windows)
        assert begin == ("", (tokenizer.bos_token_id,))
        assert words.text == "Uma noite destas, vindo da cidade para o"
        assert words.tokens == (tokenizer.bos_token_id, *tokenizer.encode(words.text, add_special_tokens=False))
    first = json.loads((small_data / "valid.jsonl").read_text().splitlines()[0])["messages"]
    (question,) = prompts(small_data)
    assert question.text == next(turn["content"] for turn in reversed(first) if turn["role"] == "user")
    asked, empty = prompts(small_data, False, "Quem joga?", "")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Quem joga?"}], add_generation_prompt=True)
    assert list(asked.tokens) == list(chat)
    assert empty == begin


def test_the_console_says_them_shortly(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    texts = ("Era\numa\x1b[2Jvez", "x" * 500, "")
    Console().samples([{"step": 1, "prompt": "O gato", "text": text} for text in texts])
    evil, long, empty = capsys.readouterr().out.splitlines()
    assert evil == "sample    [O gato] Era uma\\x1b[2Jvez"
    assert len(long) == 59
    assert long.endswith("x...")
    assert empty == "sample    [O gato] (nothing)"


def test_perplexity_is_said_of_raw_text(capsys: pytest.CaptureFixture[str]) -> None:
    found = EvalReport(step=8, val_loss=4.31, train_eval_loss=4.2, best=True, stale=0)
    for of_text in (False, True):
        Console().validation(found, 0, of_text)
        shown = capsys.readouterr().out
        assert ("val 4.3100 (perplexity 74.44)" in shown) == of_text
        assert "val 4.3100" in shown


def test_the_report_shows_the_first_the_middle_and_the_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", course(40), {"ended": "finished"})
    lines = [{"step": step, "prompt": "<b>", "text": f"</pre><script>{step}"} for step in (10, 20, 30, 40, 50)]
    (folder / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": "x"}\n[1]\n{"st')
    page = report([tell(read_history(folder), {})])
    for step, there in ((10, True), (20, False), (30, True), (40, False), (50, True)):
        assert (f"After update {step}<" in page) == there
        assert (f"&lt;/pre&gt;&lt;script&gt;{step}" in page) == there
    assert "<script>" not in page
    assert "5 times in all" in page
