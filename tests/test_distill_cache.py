"""`mlx-qlora distill cache`: what it keeps is what the teacher says, wherever it was broken off."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from conftest import randomize_adapters
from safetensors.numpy import load_file

from mlx_qlora import LoraConfig, RunConfig
from mlx_qlora.commands.distill import main
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.kept_logits import KeptLogits, text_digest, vocabulary_digest
from mlx_qlora.data.layout import Kind, Layout, lay_out, supervised_marks
from mlx_qlora.data.logit_shards import CARD
from mlx_qlora.data.prepare import iterate
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.shapes import fit
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.distilling.cache import Wanted, make
from mlx_qlora.errors import DataError
from mlx_qlora.look.console import Console
from mlx_qlora.model import lora
from mlx_qlora.model.load import Loaded, load
from mlx_qlora.model.trunk import summed_loss, supervised_logits
from mlx_qlora.objectives.distill import DistillConfig
from mlx_qlora.records import Example

CODE = "mlx_qlora.distilling.cache"


def named(data: Path, cache: Path, *more: str) -> list[str]:
    return [
        "cache", "--model", "embedded", "--distill.teacher", "embedded", "--data", str(data), "--data-cache", "off",
        "--distill.cache", str(cache), "--distill.top-k", "16", *more,
    ]  # fmt: skip


def corpus_of(data: Path, loaded: Loaded) -> Corpus:
    return gather(SourceConfig(data=(str(data),), data_cache="off"), RenderConfig(), loaded.tokenizer, 0)


def examples_of(corpus: Corpus) -> list[Example]:
    assert corpus.train is not None
    return list(iterate(corpus.train))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("made") / "cache"
    assert main(named(small_data, folder, "--samples", "4")) == 0
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("logits-*"))}


def told(folder: Path) -> dict[str, Any]:
    """What the card says, but for when it was made."""
    whole = json.loads((folder / CARD).read_text(encoding="utf-8"))
    whole["card"].pop("date")
    whole.pop("checksum")
    return dict(whole)


def test_every_layout_finds_what_the_teacher_says_there(made: Path, small_data: Path, embedded: Loaded) -> None:
    """Within float16, whose steps are 2^-11 of a log-probability, and what layouts differ by in float32."""
    examples = examples_of(corpus_of(small_data, embedded))
    lengths = np.array([len(each.tokens) - 1 for each in examples])
    places = np.array([np.count_nonzero(each.weights) for each in examples])
    kept = KeptLogits.open(made)
    for layout in (
        Layout(Kind.PACKED, 700),
        Layout(Kind.PADDED, 900, shapes=fit(lengths, places, examples[0].tokens[:20].tolist())),
        Layout(Kind.PLAIN, 800, rows=3),
    ):
        seen = 0
        for batch in lay_out(examples, layout):
            marks, weights = np.array(batch.marks[batch.positions]), np.array(batch.weights)
            logits = mx.clip(supervised_logits(embedded.model, batch)[:, :1933], -50, 50)
            logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[weights > 0]
            values, ids, rest = (each[weights > 0] for each in kept.classes(marks, weights, 1.5, None))
            expected = np.take_along_axis(logs, ids.astype(np.int64), axis=1)
            assert np.all(np.abs(values - expected) <= np.abs(expected) * 2.0**-11 + 2e-4)
            np.testing.assert_allclose(expected, -np.sort(-logs, axis=1)[:, :16], atol=2e-4)
            np.put_along_axis(logs, ids.astype(np.int64), -np.inf, axis=1)
            np.testing.assert_allclose(rest, np.log(np.exp(logs.astype(np.float64) / 1.5).sum(axis=1)), atol=2e-4)
            drawn, drawn_ids = kept.samples(marks, weights)
            assert np.isfinite(drawn).all()
            assert drawn_ids.max() < kept.card.vocabulary
            seen += int(np.count_nonzero(weights))
        assert seen == kept.card.places


def test_the_card_says_what_it_was_made_of(made: Path, small_data: Path, embedded: Loaded) -> None:
    corpus, kept = corpus_of(small_data, embedded), KeptLogits.open(made)
    expected = {
        "teacher": "embedded", "adapters": "", "data": corpus.digest(), "top_k": 16, "samples": 4,
        "temperatures": (2.0, 1.5, 1.0), "logit_clip": 50.0, "vocabulary": 1933, "teacher_vocabulary": 2048,
        "finished": True, "clipped": 0,
    }  # fmt: skip
    assert {name: getattr(kept.card, name) for name in expected} == expected
    assert {"mlx", "mlx-lm"} <= kept.card.versions.keys()
    assert kept.differences(*made_of(corpus)) == ()
    kept.require_places(np.concatenate([*map(supervised_marks, examples_of(corpus))]))
    other = gather(
        SourceConfig(data=(str(small_data),), data_cache="off"), RenderConfig(chat_template="plain"), embedded.tokenizer, 0
    )
    assert kept.differences(*made_of(other)) == ("the chat template", "the data or its seed")
    with pytest.raises(DataError, match=r"places are not in .*: made with another: the chat template, the data or its seed"):
        kept.require_places(np.concatenate([*map(supervised_marks, examples_of(other))]))


def made_of(corpus: Corpus) -> tuple[str, str, str]:
    tokenizer = corpus.renderer.tokenizer
    return vocabulary_digest(tokenizer), text_digest(tokenizer.chat_template), corpus.digest()


def rows(folder: Path, answers: Sequence[str]) -> Path:
    """Chats that all ask the same."""
    folder.mkdir()
    for name, own in (("train", answers), ("valid", ["yes", "no"])):
        lines = [json.dumps({"prompt": "Is the court free?", "completion": each}) for each in own]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_what_examples_share_is_kept_once_and_other_data_is_added(
    tmp_path: Path, embedded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path / "data", ["the court is free today", "the court is free until noon", "the court is shut"])
    assert main(named(data, tmp_path / "c")) == 0
    examples = examples_of(corpus_of(data, embedded))
    beginnings = {tuple(each.tokens[:at]) for each in examples for at in np.flatnonzero(each.weights)}
    assert KeptLogits.open(tmp_path / "c").card.places == len(beginnings)
    assert len(beginnings) < sum(np.count_nonzero(each.weights) for each in examples)
    before = shards(tmp_path / "c")
    more = rows(tmp_path / "more", ["the court is free today", "come back later, please"])
    capsys.readouterr()
    assert main(named(more, tmp_path / "c")) == 0
    assert "of other data stay there" in capsys.readouterr().out
    kept = KeptLogits.open(tmp_path / "c")
    assert {name: shards(tmp_path / "c")[name] for name in before} == before
    for batch in lay_out([*examples, *examples_of(corpus_of(more, embedded))], Layout(Kind.PACKED, 4096)):
        kept.classes(np.array(batch.marks[batch.positions]), np.array(batch.weights), 1.0, None)


def test_validation_is_kept_where_it_is_asked_for(tmp_path: Path, embedded: Loaded) -> None:
    data = rows(tmp_path / "data", ["the court is free", "the court is shut"])
    assert main(named(data, tmp_path / "c", "--split", "all")) == 0
    kept = KeptLogits.open(tmp_path / "c")
    (batch,) = lay_out(corpus_of(data, embedded).valid_examples(), Layout(Kind.PLAIN))
    kept.classes(np.array(batch.marks[batch.positions]), np.array(batch.weights), 1.0, None)


def test_the_teacher_has_its_adapters(tmp_path: Path, embedded: Loaded) -> None:
    data = rows(tmp_path / "data", ["the court is free", "the court is shut"])
    lora.attach(embedded.model, LoraConfig(rank=4, scale=8.0, dropout=0.0))
    randomize_adapters(embedded.model)
    (tmp_path / "adapters").mkdir()
    mx.save_safetensors(str(tmp_path / "adapters/adapters.safetensors"), lora.adapter_arrays(embedded.model))
    told = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 8.0}}
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(told), encoding="utf-8")
    more = ("--distill.teacher-adapters", str(tmp_path / "adapters"), "--distill.top-k", "2048")
    assert main(named(data, tmp_path / "c", *more)) == 0
    kept = KeptLogits.open(tmp_path / "c")
    assert kept.card.adapters
    (batch,) = lay_out(examples_of(corpus_of(data, embedded)), Layout(Kind.PACKED, 4096))
    weights = np.array(batch.weights)

    def distance() -> float:
        logits = supervised_logits(embedded.model, batch)[:, :1933]
        logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        values, ids, _ = kept.classes(np.array(batch.marks[batch.positions]), weights, 1.0, None)
        return float(np.abs(values - np.take_along_axis(logs, ids.astype(np.int64), axis=1))[weights > 0].max())

    assert distance() < 0.01
    with lora.without_adapters(embedded.model):
        assert distance() > 0.5


# Broken off


OFTEN = ("--token-budget", "200", "--shard-mb", "0.001")  # few examples at once, each in a shard of its own


def command(data: Path, cache: Path, *more: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "mlx_qlora", "distill", *named(data, cache, *OFTEN, *more)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen[str], holds: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)


def test_killed_and_begun_again_it_has_the_same_bytes(
    tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(named(small_data, whole, *OFTEN)) == 0
    killed = command(small_data, broken)
    wait_for(killed, lambda: len(list(broken.glob("logits-*"))) >= 2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    listed = [each["file"] for each in told(broken)["shards"]]
    assert listed
    assert all(shards(whole)[name] == shards(broken)[name] for name in listed)
    assert len(shards(broken)) < len(shards(whole))
    capsys.readouterr()
    assert main(named(small_data, broken, *OFTEN)) == 0
    out = capsys.readouterr().out
    assert re.search(r"places +[\d,]+, [\d,]+ of them there already", out)
    assert shards(broken) == shards(whole)
    assert told(broken) == told(whole)


def test_interrupted_it_keeps_what_it_has_and_says_how_it_goes_on(tmp_path: Path, small_data: Path, made: Path) -> None:
    folder = tmp_path / "c"
    process = command(small_data, folder, "--samples", "4")
    wait_for(process, lambda: bool(list(folder.glob("logits-*"))))
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    found = re.search(r"interrupted: ([\d,]+) places are kept in .*, ([\d,]+) are left. The same command goes on.", out)
    assert found, out
    assert "Traceback" not in out
    kept = KeptLogits.open(folder).card
    assert (kept.places, kept.finished) == (int(found[1].replace(",", "")), False)
    assert main(named(small_data, folder, "--samples", "4")) == 0
    one, other = (_by_mark(each) for each in (folder, made))
    assert one.keys() == other.keys()
    for mark, (values, drawn) in one.items():
        np.testing.assert_allclose(values, other[mark][0], rtol=2e-3, atol=2e-4)
        assert drawn.tolist() == other[mark][1].tolist()


def _by_mark(folder: Path) -> dict[int, tuple[Any, Any]]:
    found: dict[int, tuple[Any, Any]] = {}
    for name in shards(folder):
        arrays = load_file(folder / name)
        found |= dict(zip(arrays["marks"].tolist(), zip(arrays["values"], arrays["drawn_ids"], strict=True), strict=True))
    return found


def test_where_memory_ends_the_batches_get_smaller(
    tmp_path: Path, small_data: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = summed_loss

    def within(model: Any, batch: Any, *more: Any) -> Any:
        if batch.computed > 400:
            raise RuntimeError("[metal::malloc] Unable to allocate 99 bytes: out of memory")
        return real(model, batch, *more)

    monkeypatch.setattr(f"{CODE}.summed_loss", within)
    assert main(named(small_data, tmp_path / "c", "--samples", "4")) == 0
    assert "memory ended: at most 512 positions" in capsys.readouterr().out
    assert _by_mark(tmp_path / "c").keys() == _by_mark(made).keys()


# Wrong use


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--distill.teacher", ""], "--distill.teacher"),
        (["--streaming", "--max-steps", "3"], "streaming: a stream has no end"),
        (["--samples", "-1"], "samples: -1 came"),
        (["--shard-mb", "0"], "shard_mb: 0.0 came"),
        (["--distill.top-k", "8"], "distill.top_k: 16 there, 8 now"),
        (["--distill.temperature", "3"], "distill.temperature, over the run: 2 1.5 1 there, 3 now"),
        (["--distill.teacher-adapters", "nowhere"], "distill.teacher_adapters nowhere: no adapters.safetensors"),
        (["--distill.cache", __file__], "is a file"),
        (["--distill.cache", str(Path(__file__).parent)], "holds something else than a cache"),
        (["--preset", "tiny", "--model", ""], "Take the teacher's: --tokenizer embedded"),
    ],
)
def test_wrong_use_is_one_message_and_leaves_the_cache_alone(
    made: Path, small_data: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    assert main(named(small_data, made, "--samples", "4", *more)) == 2
    err = capsys.readouterr().err
    assert says in err, err
    assert err.startswith("mlx-qlora distill cache: ")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_disk_without_room_is_said_before_anything_is_computed(
    tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    assert main(named(small_data, tmp_path / "c")) == 2
    assert "kB are to be written, and 1.0 kB are free" in capsys.readouterr().err


def test_a_teacher_without_numbers_teaches_nothing(
    tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = summed_loss

    def broken(model: Any, batch: Any, loss_of: Any, arrays: Any) -> Any:
        return real(model, batch, lambda logits, *more: loss_of(logits * float("nan"), *more), arrays)

    monkeypatch.setattr(f"{CODE}.summed_loss", broken)
    assert main(named(small_data, tmp_path / "c")) == 2
    assert "gave logits that are no numbers" in capsys.readouterr().err


def test_a_new_student_with_the_teachers_tokenizer_needs_no_model(tmp_path: Path, embedded: Loaded) -> None:
    data = rows(tmp_path / "data", ["the court is free", "the court is shut"])
    given = named(data, tmp_path / "c", "--preset", "tiny", "--tokenizer", "embedded", "--model", "")
    assert main(given) == 0
    assert KeptLogits.open(tmp_path / "c").card.vocabulary == len(embedded.tokenizer.get_vocab())


def test_it_can_be_called_as_a_function(tmp_path: Path) -> None:
    data = rows(tmp_path / "data", ["the court is free", "the court is shut"])
    distill = DistillConfig(teacher="embedded", cache=str(tmp_path / "c"), top_k=4, estimate="sampled")
    config = RunConfig(model="embedded", data=(str(data),), data_cache="off", distill=distill)
    assert make(config, Wanted(), Console(quiet=True)) == 0
    assert KeptLogits.open(tmp_path / "c").card.samples == 32


def test_load_is_not_asked_for_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher and student need never be in memory together."""
    loaded: list[str] = []

    def counted(name: str, *more: Any) -> Loaded:
        loaded.append(name)
        return load(name, *more)

    monkeypatch.setattr(f"{CODE}.load", counted)
    data = rows(tmp_path / "data", ["the court is free", "the court is shut"])
    assert main(named(data, tmp_path / "c")) == 0
    assert loaded == ["embedded"]
