"""Wrong input of every kind: exit code 2, one message with the place and the remedy, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_qlora.assets import embedded_model
from mlx_qlora.commands import main

GOOD = {"messages": [{"role": "user", "content": "Que som faz o gato?"}, {"role": "assistant", "content": "O gato mia."}]}


def message(**changes: object) -> str:
    return json.dumps({"messages": [GOOD["messages"][0], {**GOOD["messages"][1], **changes}]})


# What stands in line 2 of train.jsonl, and pieces of what is said of it.
ROWS: dict[str, tuple[str | bytes, list[str]]] = {
    "not json": ('{"messages": [', ["train.jsonl:2", "not JSON", "one object a line"]),
    "a list": ("[1, 2]", ["train.jsonl:2", "a list came", "an object"]),
    "null": ("null", ["train.jsonl:2", "null came"]),
    "not utf-8": (b'{"text": "\xff\xfe"}', ["train.jsonl:2", "not UTF-8", "save the file as UTF-8"]),
    "unknown keys": ('{"frage": "a", "antwort": "b"}', ["train.jsonl:2", "'frage', 'antwort' came", '"messages"', "--fields"]),
    "no keys": ("{}", ["train.jsonl:2", "no keys came"]),
    "messages no list": ('{"messages": "hello"}', ["train.jsonl:2", "messages: 'hello' came", "a list"]),
    "no messages": ('{"messages": []}', ["train.jsonl:2", "messages: [] came", "at least one"]),
    "a message no object": ('{"messages": ["hello"]}', ["train.jsonl:2", "messages[0]: 'hello' came"]),
    "unknown role": (message(role="bot"), ["train.jsonl:2", "messages[1].role: 'bot' came", "system, user, assistant"]),
    "no role": ('{"messages": [{"content": "a"}]}', ["train.jsonl:2", "messages[0].role: nothing came"]),
    "content null": (message(content=None), ["train.jsonl:2", "messages[1].content: nothing came", "a text"]),
    "content a list": (message(content=["a"]), ["train.jsonl:2", "messages[1].content: ['a'] came"]),
    "an empty answer": (message(content=" "), ["train.jsonl:2", "messages[1].content: an empty answer"]),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', ["train.jsonl:2", "no message of the assistant"]),
    "no completion": ('{"prompt": "a"}', ["train.jsonl:2", "completion: nothing came"]),
    "completion a number": ('{"prompt": "a", "completion": 3}', ["train.jsonl:2", "completion: 3 came"]),
    "an empty text": ('{"text": ""}', ["train.jsonl:2", "text: an empty text"]),
}


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code = main(["train", *arguments])
    except SystemExit as error:  # tyro ends the process itself
        code = int(str(error.code))
    err = capsys.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    return err


def said(pieces: list[str], err: str) -> None:
    unwrapped = " ".join(err.replace("│", " ").split())
    for piece in pieces:
        assert piece in unwrapped


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with good data in data/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(GOOD) + "\n")
    return tmp_path


def arguments(**changes: str) -> list[str]:
    given = {"model": "embedded", "data": "data", "output-dir": "run"} | changes
    return [word for name, value in given.items() for word in (f"--{name}", value) if word]


@pytest.mark.parametrize("name", list(ROWS))
def test_a_wrong_row(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, pieces = ROWS[name]
    content = row if isinstance(row, bytes) else row.encode()
    (place / "data" / "train.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + content + b"\n")
    said(pieces, failing(arguments(), capsys))
    assert not (place / "run").exists()


# What is done to the folder, further arguments, and pieces of what is said.
FILES: dict[str, tuple[Callable[[Path], object], dict[str, str], list[str]]] = {
    "no data": (lambda p: None, {"data": "nowhere"}, ["nowhere: there is no such file or folder"]),
    "no train.jsonl": (lambda p: (p / "data/train.jsonl").rename(p / "data/tr.jsonl"), {}, ["no train.jsonl", "tr.jsonl"]),
    "empty train.jsonl": (lambda p: (p / "data/train.jsonl").write_text("\n"), {}, ["data/train.jsonl", "has no rows"]),
    "empty valid.jsonl": (lambda p: (p / "data/valid.jsonl").write_text(""), {}, ["data/valid.jsonl", "has no rows"]),
    "one row to split": (lambda p: (p / "data/valid.jsonl").unlink(), {}, ["train.jsonl:1", "the only row", "valid.jsonl"]),
    "too long": (lambda p: None, {"max-seq-length": "4"}, ["1 of 1 rows is longer than max_seq_length 4", "--truncation drop"]),
    "all too long": (
        lambda p: None, {"max-seq-length": "4", "truncation": "drop"}, ["none of the 1 rows", "Raise max_seq_length"],
    ),
    "no template": (lambda p: None, {"chat-template": "mine"}, ["chat_template: 'mine' came, plain, alpaca, chatml or a"]),
    "a stream without an end": (lambda p: None, {"streaming": ""}, ["max_steps: with streaming"]),
    "cache in a file": (lambda p: (p / "m").write_text(""), {"data-cache": "m/x"}, ["m/x: prepared data can't be kept"]),
    "no model": (lambda p: None, {"model": "./nowhere"}, ["./nowhere: there is no such folder"]),
    "model a file": (lambda p: (p / "m").write_text(""), {"model": "m"}, ["m", "there is no such folder|this is a file"]),
    "model without files": (lambda p: (p / "m").mkdir(), {"model": "./m"}, ["m: no config.json, no tokenizer_config.json"]),
    "output a file": (lambda p: (p / "run").write_text("mine"), {}, ["output_dir: run is a file"]),
    "another run": (lambda p: (p / "run/adapters").mkdir(parents=True), {}, ["run holds a run already", "--overwrite"]),
    "no such target": (lambda p: None, {"lora.targets": "c_attn"}, ["lora.targets: 'c_attn'", "q_proj"]),
    "too many layers": (lambda p: None, {"lora.layers": "9"}, ["lora.layers: 9 came", "4 layers"]),
}  # fmt: skip


def written(place: Path) -> list[Path]:
    """What lies in a folder, but for whole prepared data."""
    found = sorted(place.rglob("*"))
    assert not [path for path in found if path.name.startswith(".writing-")]
    kept = {path.parent for path in found if path.name == "manifest"}
    return [path for path in found if not kept & {path, path.parent} and not any(path == one.parent for one in kept)]


@pytest.mark.parametrize("name", list(FILES))
def test_a_wrong_file_or_folder(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, changes, pieces = FILES[name]
    break_it(place)
    before = written(place)
    err = failing(arguments(**changes), capsys)
    for piece in pieces:
        assert any(option in err for option in piece.split("|")), err
    assert written(place) == before, "nothing was written"


def test_a_broken_config_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, piece in (
        ("{", "config.json: not JSON"),
        ('{"a": 1}', "no model_type"),
        ('{"model_type": "x"}', "x not supported"),
    ):
        folder = place / "m"
        folder.mkdir(exist_ok=True)
        for name in ("tokenizer_config.json", "tokenizer.json", "model.safetensors"):
            (folder / name).write_bytes((embedded_model() / name).read_bytes())
        (folder / "config.json").write_text(content)
        said(["m", piece], failing(arguments(model="./m"), capsys))
    (folder / "config.json").write_bytes((embedded_model() / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((embedded_model() / "model.safetensors").read_bytes()[:5000])
    said(["./m: this model can't be loaded"], failing(arguments(model="./m"), capsys))
    config = json.loads((embedded_model() / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}}
    (folder / "config.json").write_text(json.dumps(config))
    said(["code of its own"], failing(arguments(model="./m"), capsys))


SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "unknown flag": (["--learning-rat", "3"], ["--learning-rat", "--learning-rate"]),
    "not a number": (["--epochs", "two"], ["--epochs", "'two'"]),
    "no value": (["--epochs"], ["--epochs"]),
    "a choice that is none": (["--schedule", "cosinus"], ["cosinus", "'constant', 'linear', 'cosine'"]),
    "zero epochs": (["--epochs", "0"], ["epochs: 0 came", "from 1"]),
    "negative rate": (["--learning-rate", "-1"], ["learning_rate: -1.0 came", "above 0"]),
    "rate not a number": (["--learning-rate", "nan"], ["learning_rate: nan came"]),
    "zero rank": (["--lora.rank", "0"], ["lora.rank: 0 came", "from 1"]),
    "all dropped": (["--lora.dropout", "1"], ["lora.dropout: 1.0 came"]),
    "negative patience": (["--early-stopping.patience", "-1"], ["early_stopping.patience: -1 came"]),
    "zero batch": (["--batch-size", "0"], ["batch_size: 0 came"]),
    "share above one": (["--validation-share", "1.5"], ["validation_share: 1.5 came", "between 0 and 1"]),
    "option of another optimizer": (["--optimizer-options", "momentum", "0.9"], ["momentum=0.9", "adamw does not take that"]),
    "no budget": (["--token-budget", "0"], ["token_budget: 0 came"]),
    "nothing may be kept": (["--trunk-cache-gb", "0"], ["trunk_cache_gb: 0.0 came"]),
    "memory of no size": (["--memory", "lots"], ["memory: 'lots' came", "12GB"]),
    "packed and compiled": (["--layout", "packed", "--compile", "on"], ["layout: packed came with compile: on"]),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_wrong_setting(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, pieces = SETTINGS[name]
    said(pieces, failing([*arguments(), *more], capsys))
    assert not (place / "run").exists()


def test_a_configuration_file_names_every_wrong_line_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "run.yaml"
    path.write_text("epochs: two\nlearning_rat: 3\nlora:\n  rank: 1.5\n  drop: 0\nepochs: 3\nmodel:\nlora.scale: big\n")
    err = failing(["--config", "run.yaml"], capsys)
    places = [line.removeprefix("mlx-qlora train: ").split(": ")[0] for line in err.splitlines()]
    assert places == [f"run.yaml:{line}" for line in (1, 2, 4, 5, 6, 7, 8)]
    said(["did you mean learning_rate?", "1.5 came, a whole number", "first in line 1", "big came, a number"], err)
    for content, pieces in (
        ("epochs: [1", ["run.yaml:", "not YAML"]),
        ("- 3\n", ["run.yaml:1", "epochs: 3"]),
        ("epochs: 0\nlora:\n  dropout: 2\n", ["run.yaml:1: epochs: 0 came", "run.yaml:3: lora.dropout: 2.0 came"]),
    ):
        path.write_text(content)
        said(pieces, failing(["--config", "run.yaml"], capsys))
    said(["none.yaml can't be read"], failing(["--config", "none.yaml"], capsys))


def test_nothing_at_all_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    said(["--model", "--data", "--output-dir", "mlx-qlora train --demo"], failing([], capsys))


def test_the_command_without_a_verb_and_with_a_wrong_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "no verb 'trian'" in capsys.readouterr().err


def test_in_a_real_process(place: Path) -> None:
    command = [sys.executable, "-m", "mlx_qlora.train", "--model", "embedded", "--data", "nowhere", "--output-dir", "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "mlx-qlora train: nowhere: there is no such file or folder. Name a folder with train.jsonl, "
        "a file (.jsonl, .json, .csv, .parquet, .txt; .gz too), or hub:owner/name.\n"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "locked").mkdir(mode=0o555)
    said(["output_dir: locked/run can't be written"], failing(arguments(**{"output-dir": "locked/run"}), capsys))


def test_a_folder_below_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "file").write_text("mine")
    said(["output_dir: file/run can't be written"], failing(arguments(**{"output-dir": "file/run"}), capsys))
