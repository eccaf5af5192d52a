"""Prepared data: kept, found again, made anew when it is damaged or other; and streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_qlora.data import prepare
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.layout import BatchConfig, Layout
from mlx_qlora.data.prepare import iterate
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.data.stream import stream
from mlx_qlora.errors import DataError
from mlx_qlora.model.load import load_tokenizer
from mlx_qlora.records import START, Bookmark, Example

TOKENIZER = load_tokenizer("embedded")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 rows of training, 5 of validation; three with two answers, of which one is trained half."""
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("train", 60), ("valid", 5)):
        rows = [
            {"question": f"Quanto é {n} + {len(name)}?", "answer": f"É {n + len(name)}.", "weight": 0.1 * (n % 7) + 0.3}
            for n in range(count)
        ]  # fmt: skip
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data


def corpus(folder: Path, *, render: RenderConfig = RenderConfig(), **more: Any) -> Corpus:  # noqa: B008  (frozen)
    return gather(SourceConfig(data=str(folder), **more), render, TOKENIZER, seed=0)


def same(a: Corpus, b: Corpus) -> bool:
    pairs = zip(*(iterate(made.sets[split]) for made in (a, b) for split in ("train",)), strict=True)
    return a.accounts == b.accounts and all(
        one.id == other.id
        and one.tokens.tobytes() == other.tokens.tobytes()
        and one.weights.tobytes() == other.weights.tobytes()
        for one, other in pairs
    )


def kept(folder: Path) -> list[Path]:
    return sorted((folder / ".mlx_qlora").iterdir())


def test_examples_come_back_as_they_were_made(folder: Path) -> None:
    fresh = corpus(folder, data_cache="off")
    assert not (folder / ".mlx_qlora").exists()
    cold, warm = corpus(folder), corpus(folder)
    assert (cold.warm, warm.warm) == (False, True)
    assert same(fresh, cold)
    assert same(cold, warm)
    made = list(fresh.renderer.examples(_rows(folder), fresh.accounts["train"], _refusals()))
    for one, other in zip(made, iterate(warm.sets["train"]), strict=True):
        assert (one.id, one.tokens.tolist(), one.weights.tolist()) == (other.id, other.tokens.tolist(), other.weights.tolist())
    assert [path.name.split("-")[0] for path in kept(folder)] == ["train", "valid"]


def _rows(folder: Path) -> Any:
    from mlx_qlora.data.sources import DiskFile

    return DiskFile(folder / "train.jsonl", "train.jsonl").read()


def _refusals() -> Any:
    from mlx_qlora.data.render import Refusals

    return Refusals()


def test_it_goes_by_content_not_by_time(folder: Path) -> None:
    corpus(folder)
    os.utime(folder / "train.jsonl", ns=(1, 1))
    assert corpus(folder).warm, "the same bytes, another time"
    text = (folder / "train.jsonl").read_text(encoding="utf-8")
    (folder / "train.jsonl").write_text(text.replace("7 + 5?", "8 + 5?"), encoding="utf-8")
    changed = corpus(folder)
    assert not changed.warm
    assert len(kept(folder)) == 2, "what was made of the old content is gone"
    assert "Quanto é 8 + 5?" in TOKENIZER.decode(changed.sets["train"][7].tokens.tolist())


def test_other_settings_tokenizer_or_template_make_other_examples(folder: Path, tmp_path: Path) -> None:
    corpus(folder)
    for render in (RenderConfig(max_seq_length=50, truncation="drop"), RenderConfig(chat_template="plain")):
        fresh = load_tokenizer("embedded")
        assert not gather(SourceConfig(data=str(folder)), render, fresh, seed=0).warm
    assert corpus(folder).warm
    assert corpus(folder, malformed="skip").warm, "what is done about refused rows does not change the rest"
    other = load_tokenizer("embedded")
    other.backend_tokenizer.add_tokens(["Quanto"])
    assert not gather(SourceConfig(data=str(folder)), RenderConfig(), other, seed=0).warm


def test_pairs_that_are_no_chats_and_greatest_ids(folder: Path) -> None:
    from tests.test_render import byte_tokenizer

    (folder / "train.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\n' * 3)
    base = byte_tokenizer(None)
    plain = gather(SourceConfig(data=str(folder)), RenderConfig(), base, seed=0)
    named = gather(SourceConfig(data=str(folder)), RenderConfig(chat_template="plain"), byte_tokenizer(None), seed=0)
    assert base.decode(plain.sets["train"][0].tokens.tolist()) == "<s>abcd</s>"
    assert "User: ab" in base.decode(named.sets["train"][0].tokens.tolist())
    far = byte_tokenizer(None)
    far.get_vocab = lambda: {"x": 70_000}
    assert prepare._greatest_id(far) == 70_000
    wide = gather(SourceConfig(data=str(folder), data_cache="off"), RenderConfig(), far, seed=0)
    assert wide.sets["train"][0].tokens.tolist() == plain.sets["train"][0].tokens.tolist()


def test_rows_that_come_while_the_file_is_read_are_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = prepare._content_digest

    def late(files: Any) -> str:
        with (folder / "train.jsonl").open("a") as file:
            file.write('{"text": "late"}\n')
        return real(files)

    monkeypatch.setattr(prepare, "_content_digest", late)
    with pytest.raises(DataError, match="changed while it was read"):
        corpus(folder)
    monkeypatch.undo()
    assert len(corpus(folder).sets["train"]) == 61


def test_only_a_few_are_kept(folder: Path) -> None:
    for length in range(100, 110):
        corpus(folder, render=RenderConfig(max_seq_length=length))
    names = [path.name.split("-")[0] for path in kept(folder)]
    assert names == ["train"] * prepare._KEPT + ["valid"] * prepare._KEPT
    for number in range(8):  # sources of one run do not push each other out
        (folder / f"more{number}.jsonl").write_bytes((folder / "valid.jsonl").read_bytes())
    for warm in (False, True):
        assert corpus(folder / "more*.jsonl").warm is warm
    several = SourceConfig(data=tuple(str(folder / f"more{number}.jsonl") for number in range(8)))
    for warm in (False, True):
        assert gather(several, RenderConfig(), TOKENIZER, seed=0).warm is warm


@pytest.mark.parametrize("name", ["tokens.bin", "spans.bin", "index.bin", "manifest"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "empty"])
def test_damaged_data_is_made_anew(folder: Path, name: str, how: str) -> None:
    whole = corpus(folder, data_cache="off")
    corpus(folder)
    path = kept(folder)[0] / name
    raw = bytearray(path.read_bytes())
    if how == "flipped":
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(raw[: len(raw) - 7] if how == "cut" else b"")
    again = corpus(folder)
    assert not again.warm
    assert same(whole, again)
    assert corpus(folder).warm


@pytest.mark.parametrize("name", ["tokens.bin", "spans.bin", "index.bin"])
def test_damage_that_left_no_trace_is_seen_when_it_is_read(folder: Path, name: str) -> None:
    """The bits of a disk change without a new time. The checksum of each example is looked at when it is read."""
    corpus(folder)
    path = kept(folder)[0] / name
    times = path.stat()
    raw = bytearray(path.read_bytes())
    raw[50] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = corpus(folder)
    assert found.warm
    with pytest.raises(DataError, match=r"damaged at .*:\d+. Start again"):
        list(iterate(found.sets["train"]))
    assert not corpus(folder).warm, "and it is made anew"


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(folder: Path) -> None:
    code = (
        "import sys, os, mlx_qlora\nfrom mlx_qlora.data import prepare\n"
        "from tests.test_prepare import corpus\nfrom pathlib import Path\n"
        "prepare._write_manifest = lambda path, value: os._exit(9)\ncorpus(Path(sys.argv[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], cwd=Path(__file__).parent.parent).returncode == 9
    assert all(path.name.startswith(".writing-") for path in kept(folder))
    (left,) = kept(folder)
    for path in (*left.iterdir(), left):
        os.utime(path, (1, 1))
    again = corpus(folder)
    assert not again.warm
    assert same(again, corpus(folder, data_cache="off"))
    assert not left.exists(), "and what it left is cleared away later"


def test_data_that_may_not_be_written_to_is_prepared_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare.os, "access", lambda path, mode: False)  # root may write everywhere
    corpus(folder)
    assert corpus(folder).warm
    assert not (folder / ".mlx_qlora").exists()
    named = tmp_path / "named"
    corpus(folder, data_cache=str(named))
    assert len(list(named.iterdir())) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="prepared data can't be kept here"):
        corpus(folder, data_cache=str(tmp_path / "file" / "x"))


def test_rows_longer_than_allowed_end_the_run_with_the_cost_of_each_way_out(folder: Path) -> None:
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "a b c d " * 20, "answer": "e f g h " * 30}) + "\n")
    with pytest.raises(DataError) as error:
        corpus(folder, render=RenderConfig(max_seq_length=60))
    said = str(error.value)
    assert said.startswith("1 of 61 rows is longer than max_seq_length 60; the longest, train.jsonl:61, has ")
    for policy in ("drop", "keep_end", "keep_start"):
        (line,) = [line for line in said.splitlines() if f"--truncation {policy} " in line]
        made = corpus(folder, render=RenderConfig(max_seq_length=60, truncation=policy))  # type: ignore[arg-type]
        assert f"{made.accounts['train'].long_supervised_lost:,} trained tokens lost" in line


# Streams


def streamed(folder: Path, seed: int = 0, start: Bookmark = START, buffer: int = 16) -> Any:
    made = corpus(folder, streaming=True, shuffle_buffer=buffer)
    return stream(made.sources, made.config, made.render, made.renderer, seed, start)


def test_a_stream_has_each_example_once_an_epoch_in_a_seeded_order(folder: Path) -> None:
    ids = [example.id for example, _ in islice(streamed(folder), 120)]
    first, second = ids[:60], ids[60:]
    assert Counter(first) == Counter(second) == Counter(f"train.jsonl:{line}" for line in range(1, 61))
    assert first != second
    assert ids == [example.id for example, _ in islice(streamed(folder), 120)]
    assert ids != [example.id for example, _ in islice(streamed(folder, seed=1), 120)]
    lines = [int(id.split(":")[1]) for id in first]
    assert set(lines[:16]) == set(range(1, 17)), "a window at a time"
    assert [line + 16 for line in lines[:16]] != lines[16:32], "each in an order of its own"


def test_a_streams_bookmark_goes_on_where_it_was_made(folder: Path) -> None:
    whole = list(islice(streamed(folder), 150))

    def told(pairs: list[tuple[Example, Bookmark]]) -> list[tuple[str, Bookmark]]:
        return [(example.id, at) for example, at in pairs]

    for cut in (0, 5, 15, 16, 17, 59, 60, 75, 119):
        rest = list(islice(streamed(folder, start=whole[cut][1]), 149 - cut))
        assert told(rest) == told(whole[cut + 1 :])


def test_a_stream_trains(folder: Path) -> None:
    made = corpus(folder, streaming=True, shuffle_buffer=16)
    assert made.train is None
    planned = list(islice(made.updates(BatchConfig(batch_size=4, min_supervised_per_update=10), Layout(), 1), 30))
    assert all(update.supervised_tokens >= 10 for update in planned)
    assert all(len(update.ids) >= 4 for update in planned)
    resumed = made.updates(BatchConfig(batch_size=4, min_supervised_per_update=10), Layout(), 1, planned[9].next)
    assert [update.ids for update in islice(resumed, 20)] == [update.ids for update in planned[10:]]
    with pytest.raises(DataError, match="validation rows are needed"):
        corpus(folder / "train.jsonl", streaming=True)


def test_what_became_of_a_streams_rows_is_counted_once(folder: Path) -> None:
    with (folder / "train.jsonl").open("a") as file:
        file.write("{\n" * 3)
    made = corpus(folder, streaming=True, shuffle_buffer=16, malformed="skip", malformed_limit=5)
    planned = list(islice(made.updates(BatchConfig(batch_size=4), Layout(), 1), 60))
    assert planned[-1].epoch >= 3, "the same rows do not count again in each epoch"
    assert (made.streamed.rows, made.streamed.malformed, made.streamed.examples) == (63, 3, 60)


def test_weighted_streams_keep_their_shares(tmp_path: Path) -> None:
    for name, count in (("a", 40), ("b", 10)):
        folder = tmp_path / name
        folder.mkdir()
        rows = "".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(count))
        for split in ("train", "valid"):
            (folder / f"{split}.jsonl").write_text(rows)
    source = SourceConfig(
        data=(str(tmp_path / "a"), str(tmp_path / "b")), data_weights=(3, 2), streaming=True, shuffle_buffer=8
    )  # fmt: skip
    made = gather(source, RenderConfig(), TOKENIZER, seed=0)
    texts = [TOKENIZER.decode(example.tokens.tolist()) for example, _ in islice(
        stream(made.sources, source, made.render, made.renderer, 0, START), 1000
    )]  # fmt: skip
    assert np.mean(["a" in text for text in texts]) == pytest.approx(0.6, abs=0.005)
