"""What is said of a data set before it is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_qlora.assets import embedded_model
from mlx_qlora.commands import main
from mlx_qlora.data.audit import audit, sight
from mlx_qlora.data.corpus import gather
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig
from mlx_qlora.model.load import load_tokenizer

LONG = "O torneio começa no sábado às nove da manhã, no campo da praça, e quem chega cedo escolhe a camisa que quer vestir."


def asked(question: str, answer: str) -> dict[str, Any]:
    return {"question": question, "answer": answer}


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Row 3 is row 1 again, row 4 nearly row 2; one validation row is in training, one has its question, one is near."""
    return write(
        tmp_path / "data",
        train=[
            asked("Que som faz o gato?", "O gato mia."),
            asked("Quando é o torneio?", LONG),
            asked("Que som faz o gato?", "O gato mia."),
            asked("Quando é o torneio?", LONG.replace("vestir", "usar")),
            asked("Como se chama a terra dos navios?", "Chama-se Porto Velho, e fica perto do mar."),
        ],
        valid=[
            asked("Que som faz o gato?", "O gato mia."),
            asked("Como se chama a terra dos navios?", "Não sei."),
            asked("Quando é o torneio?", LONG.replace("cedo", "tarde")),
            asked("Quem pintou a casa azul?", "Foi a Rita, no verão."),
        ],
    )


def test_duplicates_and_leaks_are_found_and_named(data: Path) -> None:
    found = audit(gather(SourceConfig(data=str(data)), RenderConfig(), load_tokenizer("embedded"), seed=0))
    assert (found.duplicates.count, found.duplicates.pairs) == (1, (("train.jsonl:1", "train.jsonl:3"),))
    assert (found.near_duplicates.count, found.near_duplicates.pairs) == (1, (("train.jsonl:2", "train.jsonl:4"),))
    (leak,) = found.leaks
    assert (leak.split, leak.same.count, leak.same.pairs) == ("valid", 1, (("train.jsonl:1", "valid.jsonl:1"),))
    assert ("train.jsonl:5", "valid.jsonl:2") in leak.same_prompt.pairs
    assert leak.same_prompt.count == 2, "another answer to a question of training"
    assert leak.near.count == 1
    assert leak.near.pairs[0][1] == "valid.jsonl:3"


def test_common_beginnings_by_hand(tmp_path: Path) -> None:
    """Sorted, each row shares a beginning with the one before: a trie of 5 + 1 + 2 instead of 5 + 5 + 7 tokens."""
    from mlx_qlora.data.audit import _common_prefixes

    rows = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 9], [1, 2, 3, 4, 9, 7, 7]]
    import numpy as np

    assert _common_prefixes([np.array(row, np.int32) for row in rows]) == pytest.approx((4 + 5) / 17)


def test_an_example_is_shown_letter_by_letter(data: Path) -> None:
    corpus = gather(SourceConfig(data=str(data)), RenderConfig(), load_tokenizer("embedded"), seed=0)
    shown = sight(corpus.sets["train"][0], corpus.renderer.tokenizer)
    assert shown.pieces == (("<s><|user|>Que som faz o gato?</s><|assistant|>", False), ("O gato mia.</s>", True))


def run(*arguments: str, code: int = 0, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["data", *arguments]) == code
    got = capsys.readouterr()
    return got.out + got.err


def test_the_account_for_people_browsers_and_programs(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, machine = data / "page.html", data / "account.json"
    out = run(str(data), "--model", "embedded", "--html", str(page), "--json", str(machine), capsys=capsys)
    for piece in (
        "training          5         5",
        "1 the same again (such as train.jsonl:3, train.jsonl:1)",
        "1 in training too (such as valid.jsonl:1, train.jsonl:1)",
        "letters     latin 100%",
        "train.jsonl:1\n<s><|user|>Que som faz o gato?</s><|assistant|>⟦O gato mia.</s>⟧",
    ):
        assert piece in out
    account = json.loads(machine.read_text(encoding="utf-8"))
    corpus = gather(SourceConfig(data=str(data)), RenderConfig(), load_tokenizer("embedded"), seed=0)
    assert account["supervised_tokens"] == sum(int((corpus.sets["train"][n].weights > 0).sum()) for n in range(5))
    assert account["train"]["supervised_tokens"] == account["supervised_tokens"]
    text = page.read_text(encoding="utf-8")
    assert "<mark>O gato mia.&lt;/s&gt;</mark>" in text
    assert "://" not in text, "it needs nothing from anywhere"


def test_data_that_training_would_refuse(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (data / "train.jsonl").open("a") as file:
        file.write('{"text": 3}\n{\n')
    machine = data / "account.json"
    out = run(str(data), "--model", "embedded", "--json", str(machine), code=2, capsys=capsys)
    assert "training would be refused:\ntrain.jsonl:6: text: 3 came" in out
    assert "2 training rows that can't be used" in out
    assert "training          7         5" in out, "the account of the rest all the same"
    account = json.loads(machine.read_text(encoding="utf-8"))
    assert (account["train"]["malformed"], len(account["refusals"])) == (2, 1)
    assert "skipped   train.jsonl:6: text: 3 came" in run(
        str(data), "--model", "embedded", "--malformed", "skip", capsys=capsys
    )  # fmt: skip
    out = run(str(data), "--model", "embedded", "--malformed", "skip", "--max-seq-length", "20", code=2, capsys=capsys)
    assert "longer than max_seq_length 20" in out
    (data / "train.jsonl").write_text("{\n")
    out = run(str(data), "--model", "embedded", code=2, capsys=capsys)
    assert "train.jsonl:1: not JSON" in out


def test_rows_that_are_split_off_are_not_counted_as_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "data", train=[asked(f"Quanto é {n} + {n}?", f"{2 * n}.") for n in range(20)])
    machine = tmp_path / "account.json"
    run(str(folder), "--model", "embedded", "--validation-share", "0.5", "--json", str(machine), capsys=capsys)
    account = json.loads(machine.read_text(encoding="utf-8"))
    source = SourceConfig(data=str(folder), validation_share=0.5)
    corpus = gather(source, RenderConfig(), load_tokenizer("embedded"), seed=0)
    trained = sum(int((corpus.sets["train"][n].weights > 0).sum()) for n in range(10))
    assert (account["rows"], account["supervised_tokens"]) == (10, trained)


def test_many_rows_that_are_nearly_the_same(tmp_path: Path) -> None:
    """Half of all rows alike, under a long system prompt that all have."""
    system = LONG * 3
    alike = [asked("Quando é o torneio?", LONG.replace("nove", f"nove e {n}")) | {"system": system} for n in range(10)]
    other = [asked(f"Qual é o número da casa {n}?", f"É {n * 37}, ao lado do {n}.") | {"system": system} for n in range(10)]
    corpus = gather(SourceConfig(data=str(write(tmp_path / "d", train=alike + other, valid=alike[:2]))), RenderConfig(),
                    load_tokenizer("embedded"), seed=0)  # fmt: skip
    found = audit(corpus)
    assert found.near_duplicates.count >= 9
    assert all(int(later.split(":")[1]) <= 10 for _, later in found.near_duplicates.pairs)
    assert found.leaks[0].same.count == 2


def test_near_leaks_of_several_rows_and_splits(tmp_path: Path) -> None:
    near = [asked("Quando é o torneio?", LONG.replace("nove", word)) for word in ("dez", "oito", "sete", "seis")]
    other = [asked(f"Qual é o número {n}?", f"É {n * 37}.") for n in range(12)]
    folder = write(tmp_path / "d", train=[*other, near[0]], valid=near[1:3], test=near[3:])
    found = audit(gather(SourceConfig(data=str(folder)), RenderConfig(), load_tokenizer("embedded"), seed=0))
    assert {(leak.split, leak.against): leak.near.count for leak in found.leaks} == {
        ("valid", "train"): 2, ("test", "train"): 1, ("test", "valid"): 1,
    }  # fmt: skip


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "data", train=[asked("a\x1b[31mb\u202ec", "d")] * 2)
    out = run(str(folder), "--model", "embedded", capsys=capsys)
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_several_sources_with_weights(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(data / "train.jsonl"), str(data / "valid.jsonl")]
    out = run(*paths, "--model", "embedded", "--data-weights", "3", "1", "--validation-share", "0.3", capsys=capsys)
    assert out.count("% of an epoch, each of its examples") == 2
    assert "--html" in run(*paths, "--model", "embedded", "--html", "nowhere/x.html", code=2, capsys=capsys)


def test_wrong_calls(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model is missing" in run(str(data), code=2, capsys=capsys)
    assert "no such file" in run("nowhere", "--model", "embedded", code=2, capsys=capsys)
    assert "data: nothing came" in run("--model", "embedded", code=2, capsys=capsys)
    assert "no tokenizer_config.json" in run(str(data), "--model", str(data), code=2, capsys=capsys)


def test_a_folder_with_only_a_tokenizer_serves(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((embedded_model() / name).read_bytes())
    assert "template    the model's own" in run(str(data), "--model", str(folder), capsys=capsys)


def test_colour_only_on_a_terminal(data: Path) -> None:
    command = [sys.executable, "-m", "mlx_qlora", "data", str(data), "--model", "embedded", "--show", "1"]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in plain
    assert "⟦O gato mia.</s>⟧" in plain
