"""Windows over documents: which tokens they read, what counts, where they lie."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_qlora import RunConfig, train
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.exposure import windows_of
from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.shapes import fit
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.data.windows import Overlap, Ruler, Stream, WindowConfig
from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.look.measure import mean_loss
from mlx_qlora.model.load import load, load_tokenizer
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Example
from mlx_qlora.run.metrics import read_metrics

TOKENIZER = load_tokenizer("embedded")


class Documents:
    """Documents in memory, as a prepared folder gives them: tokens count up over all of them, so that a token is its place."""

    def __init__(self, lengths: Sequence[int], continued: Sequence[bool] = ()):
        self.lengths = np.array(lengths, np.uint32)
        self.supervised = self.lengths - 1
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        goes_on = np.array(continued, bool) if len(continued) else np.zeros(len(lengths), bool)
        self.firsts = np.flatnonzero(~goes_on) if goes_on.any() else None

    def __len__(self) -> int:
        return len(self.lengths)

    def id(self, number: int) -> str:
        return f"text:{number}"

    def part(self, number: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        end = min(end, int(self.lengths[number]))
        tokens = np.arange(begin, end, dtype=np.int32) + np.int32(self._starts[number])
        return tokens, np.ones(len(tokens), np.float32)


def counted(stream: Stream) -> np.ndarray:
    """How often each token of the stream is a target that counts."""
    counts = np.zeros(stream.end, int)
    for number in range(len(stream)):
        example = stream[number]
        assert 2 <= len(example.tokens) <= stream.ruler.window + 1
        assert np.array_equal(np.diff(example.tokens), np.ones(len(example.tokens) - 1)), "one stretch"
        assert example.weights[0] == 0
        counts[example.tokens] += example.weights > 0
    return counts


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_once_counts_every_target_once(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    window = data.draw(st.integers(1, 12))
    stride = data.draw(st.integers(1, window))
    begin = data.draw(st.integers(0, sum(lengths) - 1))
    end = data.draw(st.integers(begin + 1, sum(lengths)))
    cross = data.draw(st.booleans())
    documents = Documents(lengths)
    ruler = Ruler(window, stride, "once", cross)
    counts = counted(Stream(documents, ruler, begin, end))  # type: ignore[arg-type]
    starts = {begin} if cross else {begin, *(edge for edge in np.cumsum(lengths).tolist() if edge >= begin)}
    expected = [int(begin <= place < end and place not in starts) for place in range(end)]
    assert counts.tolist() == expected


@pytest.mark.parametrize(("tokens", "window", "stride"), [(40, 8, 8), (41, 8, 3), (9, 8, 2), (5, 8, 2), (2, 8, 1), (33, 8, 1)])
def test_each_counts_in_every_window(tokens: int, window: int, stride: int) -> None:
    """The windows by a loop: one every stride, and the last that ends with the text."""
    starts = list(range(0, max(1, tokens - window - 1), stride))
    if starts[-1] + window + 1 < tokens:
        starts.append(tokens - window - 1)
    expected = np.zeros(tokens, int)
    for start in starts:
        expected[start + 1 : start + window + 1] += 1
    stream = Stream(Documents([tokens]), Ruler(window, stride))  # type: ignore[arg-type]
    assert [int(stream[number].tokens[0]) for number in range(len(stream))] == starts
    assert counted(stream).tolist() == expected.tolist()
    assert len(stream) == windows_of(tokens - 1, window, stride)


def test_pieces_of_a_document_are_one() -> None:
    """Windows go on over the pieces of a long text, also where each document has windows of its own."""
    apart = Ruler(5, 5, "each", cross_documents=False)
    whole = Stream(Documents([14, 6]), apart)  # type: ignore[arg-type]
    pieces = Stream(Documents([4, 7, 3, 6], [False, True, True, False]), apart)  # type: ignore[arg-type]
    assert pieces.documents == whole.documents == 2
    assert [pieces[n].tokens.tolist() for n in range(len(pieces))] == [whole[n].tokens.tolist() for n in range(len(whole))]


def test_many_documents_are_found_as_by_a_loop() -> None:
    """More documents than there are sums for."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 30, 5000)
    for cross in (True, False):
        stream = Stream(Documents(lengths), Ruler(7, 3, "each", cross))  # type: ignore[arg-type]
        edges = [0, *np.cumsum(lengths).tolist()]
        spans = [(0, edges[-1])] if cross else list(pairwise(edges))
        starts = [
            max(begin, min(begin + place * 3, end - 8))
            for begin, end in spans
            for place in range(windows_of(end - begin - 1, 7, 3))
        ]
        assert len(stream) == len(starts)
        asked = rng.integers(0, len(starts), 300).tolist()
        assert [int(stream[number].tokens[0]) for number in asked] == [starts[number] for number in asked]
        assert len(stream[stream.longest()].tokens) == 8


# Files


def corpus_of(
    data: Path | str, window: int = 16, stride: int | None = None, overlap: Overlap = "each", **more: object
) -> Corpus:
    source = SourceConfig(data=str(data), data_cache="off")
    own = WindowConfig(stride=stride, overlap=overlap, **more)  # type: ignore[arg-type]
    return gather(source, RenderConfig(max_seq_length=window), TOKENIZER, seed=0, windows=own)


def texts_of(corpus: Corpus) -> str:
    """What the training windows say, side by side."""
    assert corpus.windows is not None
    whole = [Stream(each.source, Ruler(10**9, 1), each.begin, each.end)[0] for each in corpus.windows.streams]
    return str(TOKENIZER.decode(np.concatenate([each.tokens for each in whole]).tolist()))


STORY = "Era uma vez um gato.\nO gato tinha uma bola azul, e a bola era dele.\n"


def test_a_text_file_becomes_a_stream(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(STORY * 3, encoding="utf-8")
    (tmp_path / "valid.txt").write_text(STORY, encoding="utf-8")
    corpus = corpus_of(tmp_path)
    assert texts_of(corpus) == f"<s>{(STORY * 3).rstrip()}</s>"
    assert corpus.windows is not None
    assert corpus.windows.stride == 4
    assert len(corpus.windows) == windows_of(corpus.windows.total_tokens - 1, 16, 4)


def test_documents_end_where_the_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(f"\n{STORY}número {number}\n<|endoftext|>\n" for number in range(30)))
    corpus = corpus_of(path)
    assert corpus.windows is not None
    assert corpus.accounts["train"].rows == 30
    assert corpus.windows.documents == 27
    assert "3 documents split off from training" in corpus.valid_from
    assert texts_of(corpus).count("<s>Era uma vez") == texts_of(corpus).count("</s>") == 27


def test_a_long_text_is_read_in_pieces_and_is_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"Linha {number}: {STORY}" for number in range(40)) + "ação" * 200
    (tmp_path / "train.txt").write_text(text, encoding="utf-8")
    (tmp_path / "valid.txt").write_text(STORY, encoding="utf-8")
    whole = texts_of(corpus_of(tmp_path))
    monkeypatch.setattr("mlx_qlora.data.sources._PIECE", 333)  # cuts the last line within letters of two bytes
    pieces = corpus_of(tmp_path)
    assert texts_of(pieces) == whole == f"<s>{text}</s>"
    assert pieces.windows is not None
    assert pieces.windows.documents == pieces.accounts["train"].rows == 1
    assert pieces.accounts["train"].examples > 8
    counts = [pieces.windows.streams[0].source.part(number, 0, 9)[1][0] for number in range(4)]
    assert counts == [0, 1, 1, 1], "only the first token of the whole text is nobody's target"


def test_a_piece_begins_with_a_target_also_where_a_window_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it is context in all the windows that follow, and never trained."""
    monkeypatch.setattr("mlx_qlora.data.sources._PIECE", 400)
    (tmp_path / "a.txt").write_text("\n".join(f"O clube {number} joga em casa." for number in range(60)), encoding="utf-8")
    corpus = corpus_of(tmp_path, window=8)
    assert corpus.windows is not None
    source = corpus.windows.streams[0].source
    assert len(source) > 2, "pieces"
    stream = Stream(source, Ruler(8, 1, "once"))
    counts = np.zeros(stream.tokens)
    for number in range(len(stream)):
        example = stream[number]
        begin = int(example.id.split("/")[1])
        counts[begin : begin + len(example.tokens)] += example.weights
    assert counts.tolist() == [0.0] + [1.0] * (len(counts) - 1)


def test_windows_without_a_target_change_no_number(tmp_path: Path) -> None:
    """Long questions with short answers: most windows have nothing to train. That is no error."""
    rows = [{"prompt": f"O clube {number} joga em casa aos domingos. " * 3, "completion": "sim"} for number in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"preset": "tiny", "tokenizer": "embedded", "max_steps": 12, "max_seq_length": 16, "stride": 16, "batch_size": 1}
    train(RunConfig(**settings, data=str(tmp_path), output_dir=str(tmp_path / "run")), quiet=True)  # type: ignore[arg-type]
    steps = [line for line in read_metrics(tmp_path / "run") if "grad_norm" in line]
    empty = [line for line in steps if not line["supervised_tokens"]]
    assert len(steps) == 12
    assert 0 < len(empty) < 12
    assert all(line["loss"] == line["grad_norm"] == 0 for line in empty)
    assert not any(line["skipped_updates"] for line in steps)


def test_a_single_text_gives_its_end_to_validation(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(STORY * 40, encoding="utf-8")
    corpus = corpus_of(tmp_path / "book.txt")
    assert corpus.windows is not None
    assert corpus.valid_windows is not None
    tokens = corpus.windows.total_tokens + corpus.valid_windows.total_tokens
    assert tokens == corpus.accounts["train"].tokens
    assert corpus.valid_windows.total_tokens == round(0.1 * tokens)
    last = max(int(example.id.split("/")[1]) + len(example.tokens) for example in corpus.train_sample())
    first = min(int(example.id.split("/")[1]) for example in corpus.valid_examples())
    assert last <= first == corpus.windows.total_tokens


def test_a_folder_of_texts_is_all_read(tmp_path: Path) -> None:
    for name in ("a/one.txt", "b/two.txt", ".hidden/three.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(STORY * 5 + name, encoding="utf-8")
    corpus = corpus_of(tmp_path)
    assert corpus.accounts["train"].rows == 2
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"no train\.jsonl in this folder"):
        find(SourceConfig(data=str(tmp_path)))


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(STORY.encode() + b"o gato \xe9 azul\n")
    with pytest.raises(DataError, match=r"train\.txt:3: not UTF-8; save the file as UTF-8"):
        corpus_of(tmp_path / "train.txt")


def test_rows_of_text_are_windows_if_that_is_wanted(tmp_path: Path) -> None:
    rows = [{"text": STORY + str(number)} for number in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert corpus_of(tmp_path, window=200).windows is None
    on = corpus_of(tmp_path, windows="on")
    assert on.windows is not None
    assert on.windows.documents == 27
    with pytest.raises(ConfigError, match="stride: 17 came"):
        corpus_of(tmp_path, windows="on", stride=17)


def test_weights_of_rows_reach_the_windows(tmp_path: Path) -> None:
    """What a row trains, and with which weight, is what its windows train."""
    text = "Quem tem a bola? O gato."
    row = {"text": text, "train": [[0, 16, 0.25], [16, len(text), 1.0]]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "valid.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    plain = gather(SourceConfig(data=str(tmp_path), data_cache="off"), RenderConfig(), TOKENIZER, seed=0)
    windows = corpus_of(tmp_path, window=5, overlap="once", windows="on").windows
    assert windows is not None
    assert plain.train is not None
    found = np.zeros(windows.total_tokens)
    for number in range(len(windows)):
        example = windows[number]
        begin = int(example.id.split("/")[1])
        found[begin : begin + len(example.tokens)] += example.weights
    assert found.tolist() == plain.train[0].weights.tolist()
    assert set(found.tolist()) == {0.0, 0.25, 1.0}


def test_a_long_text_is_refused_once_where_rows_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(STORY * 3000, encoding="utf-8")
    with pytest.raises(DataError) as error:
        corpus_of(tmp_path / "train.txt", windows="off")
    assert str(error.value).count("windows: on trains all of it") == 1


# The loss


def test_the_loss_of_a_window_is_that_of_the_same_tokens_as_an_example(tmp_path: Path) -> None:
    """Against the plain path of fine-tuning, and against MLX's cross-entropy by hand."""
    (tmp_path / "train.txt").write_text(STORY * 20, encoding="utf-8")
    corpus = corpus_of(tmp_path / "train.txt", window=24, stride=24)
    assert corpus.windows is not None
    model = load("embedded").model
    window = corpus.windows[3]
    weights = np.ones(25, np.float32)
    weights[0] = 0
    plain = Example("plain", window.tokens, weights)
    ours = mean_loss(model, sft(), lay_out([window], Layout(Kind.PLAIN, step=1)))
    assert ours == mean_loss(model, sft(), lay_out([plain], Layout(Kind.PLAIN, step=1)))
    tokens = mx.array(window.tokens)[None]
    by_hand = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean").item()
    assert ours == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("kind", [Kind.PACKED, Kind.PADDED])
def test_the_gradient_of_windows_is_the_same_in_every_layout(kind: Kind) -> None:
    """Windows that overlap, of documents of their own: lengths differ, and some tokens do not count."""
    documents = Documents([20, 3, 11])
    stream = Stream(documents, Ruler(6, 4, "once", cross_documents=False))  # type: ignore[arg-type]
    examples = [stream[number] for number in range(len(stream))]
    model = tiny_model("mistral", quantized=False)
    lengths = np.array([len(each.tokens) - 1 for each in examples])

    def gradient(layout: Layout) -> tuple[float, dict[str, mx.array]]:
        batches = lay_out(examples, layout)

        def total(_: nn.Module) -> mx.array:
            losses = [sft()(model, batch) for batch in batches]
            return sum((loss.total for loss in losses), mx.array(0.0)) / sum((each.weight for each in losses), mx.array(0.0))

        loss, grads = nn.value_and_grad(model, total)(model)
        return loss.item(), dict(tree_flatten(grads))

    model.train()
    plain = gradient(Layout(Kind.PLAIN, step=1, rows=1))
    other = gradient(Layout(kind, shapes=fit(lengths, lengths)))
    assert other[0] == pytest.approx(plain[0], rel=1e-6)
    for name, array in plain[1].items():
        assert mx.abs(other[1][name] - array).max().item() <= 2e-5 * mx.abs(array).max().item() + 1e-8, name


def test_a_run_on_text_learns_it_and_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(STORY * 30, encoding="utf-8")
    config = RunConfig(
        model="embedded", data=str(tmp_path / "book.txt"), output_dir=str(tmp_path / "whole"), max_seq_length=32, batch_size=4,
        max_steps=6, eval_every=3, learning_rate=3e-3, validation_tokens=128, data_cache="off",
    )  # fmt: skip
    whole = read_metrics(train(config, quiet=True).output_dir)
    assert whole[-1]["loss"] < whole[0]["loss"] - 1
    half = replace(config, output_dir=str(tmp_path / "half"))
    train(replace(half, max_steps=3, schedule="constant"), quiet=True)
    train(replace(half, resume=True, schedule="constant", resume_anyway=True), quiet=True)
    straight = replace(config, output_dir=str(tmp_path / "straight"), schedule="constant")
    train(straight, quiet=True)
    one, other = (read_metrics(Path(each.output_dir)) for each in (half, straight))
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
