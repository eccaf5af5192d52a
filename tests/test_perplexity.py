"""Raw text: every token scored once with its window's context, against sums by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import make_examples, same_bytes, tiny_model
from mlx.utils import tree_map

from mlx_qlora.assets import embedded_data
from mlx_qlora.commands import main
from mlx_qlora.commands.evaluate import _defaults, _windows
from mlx_qlora.config import RunConfig
from mlx_qlora.data.corpus import gather
from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.data.part import open_part
from mlx_qlora.data.render import WHOLE, RenderConfig
from mlx_qlora.data.shapes import fit as fit_shapes
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.data.windows import WindowConfig
from mlx_qlora.engine.room import Room
from mlx_qlora.evaluating import _documents, _unknown
from mlx_qlora.look.evaluation.perplexity import Document, OfText, Strided, Text
from mlx_qlora.model.load import Loaded, load_tokenizer
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Example

LENGTHS = (2, 9, 33, 20)
PACKED, PLAIN = Layout(Kind.PACKED, 64), Layout(Kind.PLAIN, 64)


def documents(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        weights = np.ones(length, np.float32)
        weights[0] = 0
        made.append(Document(Example(f"x:{number}", rng.integers(3, 96, length).astype(np.int32), weights), size=3 * length))
    return made


def scored(model: nn.Module, made: list[Document], how: Strided, layout: Layout = PACKED) -> OfText:
    return Text(made, how, lambda tokens: 3 * len(tokens)).score(model, layout, Room(layout.token_budget))


def by_hand(model: nn.Module, tokens: list[int], how: Strided, targets: set[int]) -> tuple[float, int]:
    """(loss, right ones): of each target alone, from what its window has before it."""
    last = max(0, len(tokens) - 1 - how.window)
    total, right = 0.0, 0
    for target in sorted(targets):
        number = max(0, math.ceil((target - how.window) / how.stride))  # the first window that reaches it
        start = min(number * how.stride, last)
        logits = np.array(model(mx.array([tokens[start:target]]))[0, -1].astype(mx.float32), np.float64)
        total += float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[target]])
        right += int(logits.argmax() == tokens[target])
    return total, right


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("how", [(8, 4), (8, 8), (8, 1), (5, 3), (1, 1), (64, 32)])
def test_strided_perplexity_is_the_sum_by_hand(how: tuple[int, int], cross: bool) -> None:
    model, made, strided = tiny_model("mistral"), documents(), Strided(*how, cross_documents=cross)
    found = scored(model, made, strided)
    texts = [each.example.tokens.tolist() for each in made]
    if cross:
        begins = np.cumsum([0, *LENGTHS])
        total, right = by_hand(model, [*chain(*texts)], strided, set(range(sum(LENGTHS))) - set(begins.tolist()))
    else:
        each = [by_hand(model, tokens, strided, set(range(1, len(tokens)))) for tokens in texts]
        total, right = sum(loss for loss, _ in each), sum(hits for _, hits in each)
    targets = sum(LENGTHS) - len(LENGTHS)
    assert found.loss.weights.sum() == targets
    assert found.loss.mean == pytest.approx(total / targets, rel=1e-5)
    assert found.accuracy.mean == pytest.approx(right / targets, abs=1e-12)
    assert found.bits_per_byte is not None
    assert found.bits_per_byte.mean == pytest.approx(total / math.log(2) / (3 * sum(LENGTHS)), rel=1e-5)


PADDED = Layout(Kind.PADDED, 64, shapes=fit_shapes(np.array([1, 8, 12]), np.array([1, 8, 12]), np.empty(0, np.int32)))


@pytest.mark.parametrize(("shape", "layout"), [("gemma2", PLAIN), ("gemma3", PLAIN), ("qwen3", PADDED)])
def test_layouts_and_models_agree(shape: str, layout: Layout) -> None:
    """gemma2 and gemma3 can't be packed."""
    model, made, how = tiny_model(shape), documents(), Strided(12, 5)
    each = [by_hand(model, one.example.tokens.tolist(), how, set(range(1, len(one.example.tokens)))) for one in made]
    found = scored(model, made, how, layout)
    assert found.loss.totals.sum() == pytest.approx(sum(loss for loss, _ in each), rel=1e-5)
    assert found.accuracy.totals.sum() == sum(hits for _, hits in each)


def test_more_context_changes_the_loss_and_groups_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_model("mistral"), documents()
    one, other = (scored(model, made, Strided(8, stride)) for stride in (8, 2))
    assert abs(one.loss.mean - other.loss.mean) > 1e-3
    monkeypatch.setattr("mlx_qlora.look.evaluation.perplexity._BATCHES", 0)  # each window for itself
    again = scored(model, made, Strided(8, 2))
    assert again.loss.totals == pytest.approx(other.loss.totals, rel=1e-5)


@pytest.mark.parametrize("cross", [False, True])
def test_errors_go_by_document_or_by_window(cross: bool) -> None:
    """Twelve documents: their own sums. Four: the windows', which come to the same in all."""
    model, how = tiny_model("mistral"), Strided(8, 4, cross)
    made = documents(LENGTHS * 3)
    whole, few = scored(model, made, how), scored(model, made[:4], how)
    assert len(whole.loss.totals) == 12
    assert whole.loss.weights.tolist() == [length - 1 for length in LENGTHS * 3]
    assert len(few.loss.totals) > 4
    assert few.bits_per_byte is not None
    assert few.bits_per_byte.weights.sum() == pytest.approx(3 * sum(LENGTHS))
    assert cross or few.loss.totals.sum() == pytest.approx(whole.loss.totals[:4].sum(), rel=1e-5)


def test_a_model_that_knows_nothing() -> None:
    """All of V tokens are equally likely: log2 V bits a token, and the first of them is the likeliest. The end of the text
    counts in the loss, and has no bytes."""
    model, vocabulary = tiny_model("mistral", quantized=False), 96
    model.update(tree_map(mx.zeros_like, model.parameters()))
    tokens = np.array([1, 5, 0, 7, 0, 9, 2], np.int32)
    weights = np.array([0, 1, 1, 1, 1, 1, 1], np.float32)
    found = scored(model, [Document(Example("x:1", tokens, weights), size=11, ended=True)], Strided(3, 2))
    assert found.loss.mean == pytest.approx(math.log(vocabulary), rel=1e-6)
    assert found.accuracy.mean == pytest.approx(2 / 6)
    assert found.bits_per_byte is not None
    assert found.bits_per_byte.mean == pytest.approx(5 * math.log2(vocabulary) / 11, rel=1e-6)


def test_training_knows_nothing_of_accuracy() -> None:
    """The same loss and gradient to the last bit, and nothing besides."""
    model = tiny_model("mistral", quantized=False).train()
    (batch,) = lay_out(make_examples(3), Layout(Kind.PACKED))
    seen = []
    for accuracy in (False, True):
        objective = sft(accuracy=accuracy)
        loss = objective(model, batch)
        assert not loss.metrics
        assert not loss.places
        seen.append((loss.total, nn.value_and_grad(model, lambda m, b, of=objective: of(m, b).total)(model, batch)[1]))
    assert same_bytes(*seen)


TEXTS = ("Era uma vez um gato.", "  Dois espaços antes.\n\tE ação! 🎉", "x" * 700, " a", "日本語")


def tokenizers_of() -> dict[str, Any]:
    """Byte-level without a beginning of text, and words with a mark in place of spaces, as sentencepiece has them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    of_bytes = Tokenizer(models.BPE())
    of_bytes.pre_tokenizer, of_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    of_bytes.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    pieces.train_from_iterator(
        TEXTS[:2], trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *(f"<0x{each:02X}>" for each in range(256))])
    )
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return {
        "bytes": PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token="</s>"),
        "pieces": PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>"),
    }


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_bytes_are_those_of_the_source(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers_of()[kind]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text(rows, encoding="utf-8")
    source = SourceConfig(data=str(tmp_path / "texts.jsonl"), data_cache="off")
    part = open_part(find(source, training=False), source, RenderConfig(chat_template="plain"), tokenizer, 0, whole=True)
    made = _documents(part)
    sizes = [len(text.encode()) for text in TEXTS]
    decoded = [len(tokenizer.decode(one.example.tokens.tolist(), skip_special_tokens=True).encode()) for one in made]
    assert all(one.ended for one in made)
    if kind == "pieces":
        assert [one.size for one in made] == sizes
    else:  # the first token of a text is nobody's target
        first = [len(tokenizer.convert_ids_to_tokens(int(one.example.tokens[0]))) for one in made]
        whole = [number for number, one in enumerate(made) if "\ufffd" not in tokenizer.decode(one.example.tokens[:1])]
        assert decoded == sizes
        assert [made[number].size for number in whole] == [sizes[number] - first[number] for number in whole]
        assert len(whole) >= 4


BOOK = "".join(f"Linha {number}: a ação começa, e o gato dorme.\n" for number in range(2000))


def test_a_long_text_is_one_document(tmp_path: Path) -> None:
    """It is prepared in pieces of 64 KB."""
    tokenizer = tokenizers_of()["pieces"]
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    source, render = SourceConfig(data=str(tmp_path), data_cache="off"), RenderConfig(max_seq_length=WHOLE)
    (made,) = _documents(open_part(find(source, training=False), source, render, tokenizer, 0, whole=True, texts=True))
    assert len(BOOK.encode()) > 1 << 16
    assert made.size == len(BOOK.rstrip().encode())
    assert made.ended
    assert (made.example.weights[1:] == 1).all()


@pytest.mark.parametrize("documents", [1, 3, 20])
def test_a_run_is_evaluated_on_the_text_that_it_was_not_trained_on(documents: int, tmp_path: Path) -> None:
    tokenizer = tokenizers_of()["pieces"]
    for number in range(documents):
        (tmp_path / f"{number}.txt").write_text(BOOK[number:] if documents < 20 else BOOK[number:900], encoding="utf-8")
    run = RunConfig(preset="tiny", data=str(tmp_path), data_cache="off", max_seq_length=64)
    source, ruler, render = run.part(SourceConfig), _windows(run), RenderConfig(max_seq_length=WHOLE)
    corpus = gather(source, run.part(RenderConfig), tokenizer, 5, windows=run.part(WindowConfig), from_nothing=True)
    for split, own in (("train", corpus.windows), ("valid", corpus.valid_windows)):
        name = "train" if split == "train" else "valid"
        part = open_part(find(source), source, render, tokenizer, 5, name, ruler=ruler, texts=True)  # type: ignore[arg-type]
        tokens = np.concatenate([each.tokens for each in part.examples])
        assert own is not None
        assert len(tokens) == own.total_tokens
        assert tokens[:65].tolist() == own[0].tokens.tolist()
        assert tokens[-65:].tolist() == own[len(own) - 1].tokens.tolist()
        assert None not in [each.size for each in _documents(part)]


def test_chats_that_were_trained_as_windows_are_evaluated_where_none_of_their_tokens_was_trained(tmp_path: Path) -> None:
    """Few rows: training held out the end of their tokens, and cut a row in two."""
    lines = (embedded_data() / "train.jsonl").read_text(encoding="utf-8").splitlines()[:9]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = RunConfig(
        model="embedded", data=str(tmp_path), data_cache="off", max_seq_length=300, windows="on", validation_share=0.4
    )
    source, render, tokenizer = run.part(SourceConfig), run.part(RenderConfig), load_tokenizer("embedded")
    corpus = gather(source, render, tokenizer, 5, windows=run.part(WindowConfig))
    assert corpus.windows is not None
    ruler = _windows(run)
    train, valid = (
        [each.id for each in open_part(find(source), source, render, tokenizer, 5, name, ruler=ruler).examples]
        for name in ("train", "valid")
    )
    (stream,), made = corpus.windows.streams, corpus.sets["train"]
    edges = [0, *np.cumsum(made.lengths).tolist()]
    assert train == [made.id(number) for number in range(9) if edges[number + 1] <= stream.end]
    assert valid == [made.id(number) for number in range(9) if edges[number] >= stream.end]
    assert (len(train) + len(valid), len(valid) > 1) == (8, True), "one is cut in two"


def test_unknown_letters_are_said() -> None:
    tokenizer = tokenizers_of()["pieces"]
    (known,), ids = documents((9,)), np.array([1, 0, 5, 0, 6, 7, 8, 9, 2], np.int32)
    odd = Document(Example("x:1", ids, known.example.weights), size=9)
    assert _unknown(Text([known], Strided(4, 2), len), tokenizer) == []
    (said,) = _unknown(Text([known, odd], Strided(4, 2), len), tokenizer)
    assert said.startswith("2 of 16 tokens are <unk>")


def evaluated(folder: Path, *arguments: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments), "--output-dir", str(folder), "--data-cache", "off"]) == 0
    found: dict[str, Any] = json.loads((folder / "evaluation_report.json").read_text())
    return found


def rows(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def test_evaluate_on_raw_text(embedded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["O clube joga em casa. " * 9, "Quem joga? O clube."]
    found = evaluated(tmp_path / "out", "--model", "embedded", "--data", rows(tmp_path / "x.jsonl", texts), "--window", 16)
    tokenizer, how = embedded.tokenizer, Strided(16, 8)
    tokens = [[tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    sums = [by_hand(embedded.model, each, how, set(range(1, len(each)))) for each in tokens]
    ends = sum(by_hand(embedded.model, each, how, {len(each) - 1})[0] for each in tokens)
    count, size = sum(map(len, tokens)) - 2, sum(len(text.encode()) for text in texts)
    total = sum(loss for loss, _ in sums)
    assert len(tokens[0]) > 2 * 16
    assert found["loss"]["value"] == pytest.approx(total / count, rel=1e-4)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert found["bits_per_byte"]["value"] == pytest.approx((total - ends) / math.log(2) / size, rel=1e-4)
    assert found["next_token_accuracy"]["value"] == pytest.approx(sum(hits for _, hits in sums) / count)
    said = {"window": 16, "stride": 8, "cross_documents": False, "documents": 2, "tokens": count, "bytes": size}
    assert said.items() <= found["text"].items()
    shown = capsys.readouterr().out
    assert f"bits per byte        {'':2}{found['bits_per_byte']['value']:.4f}" in shown
    assert "questions" not in shown


def test_the_window_is_the_models_at_most(tmp_path: Path, capsys: pytest.CaptureFixture[str], embedded: Loaded) -> None:
    data = rows(tmp_path / "x.jsonl", ["O clube joga."])
    most = embedded.config["max_position_embeddings"]
    found = evaluated(tmp_path / "out", "--model", "embedded", "--data", data)
    assert found["text"]["window"] == min(2048, most)
    for flags, said in (
        (("--window", most + 1), f"at most {most:,} is expected"),
        (("--window", 8, "--stride", 9), "stride: 9 came, a whole number from 1 to the window of 8 is expected"),
        (("--stride", 0), "stride: 0 came"),
    ):
        arguments = ["--model", "embedded", "--data", data, "--output-dir", tmp_path / "none", *flags]
        assert main(["evaluate", *map(str, arguments)]) == 2
        assert said in capsys.readouterr().err
    chats = ["--model", "embedded", "--data", "embedded", "--output-dir", str(tmp_path / "none"), "--window", "8"]
    assert main(["evaluate", *chats]) == 2
    assert "of raw text" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_runs_stride_is_another_one() -> None:
    taken = _defaults(RunConfig(model="embedded", data="x", stride=3, cross_documents=True, max_seq_length=77), "run")
    assert (taken.stride, taken.cross_documents, taken.max_seq_length) == (None, False, 77)
