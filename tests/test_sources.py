"""Rows from files of every kind, and what is said of those that are none."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.data import prepare
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.formats import Pair, RowError, Talk, understand
from mlx_qlora.data.render import Account, Refusals, RenderConfig, Renderer
from mlx_qlora.data.sources import BadRow, DiskFile, Row, SourceConfig, find, read
from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.model.load import load_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": "Que som faz o gato?", "completion": "O gato mia."},
    {"prompt": "E o cão?\nDiga, \"por favor\".", "completion": "O cão late; é assim."},
]  # fmt: skip


OTHER = '"O cão late; é assim.";"E o cão?\nDiga, ""por favor""."\n'


def rows_of(path: Path) -> list[Row | BadRow]:
    return list(DiskFile(path, path.name).read())


def good(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = rows_of(path)
    assert all(isinstance(row, Row) for row in found), found
    return [(row.id, row.value) for row in found if isinstance(row, Row)]


def bad(path: Path) -> list[str]:
    return [f"{row.id}: {row.reason}" for row in rows_of(path) if isinstance(row, BadRow)]


def jsonl(rows: list[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def gather_from(*data: str | Path, **more: Any) -> Corpus:
    source = SourceConfig(data=tuple(map(str, data)), **{"data_cache": "off", **more})
    return gather(source, RenderConfig(), load_tokenizer("embedded"), seed=0)


# Files


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"prompt": "ok?", "completion": "ok"}]).slice(0, 2), path)


WRITERS: dict[str, tuple[Callable[[Path], object], list[int]]] = {
    "train.jsonl": (lambda p: p.write_bytes(jsonl(ROWS)), [1, 2]),
    "crlf.jsonl": (lambda p: p.write_bytes(jsonl(ROWS, "\r\n")), [1, 2]),
    "bom.jsonl": (lambda p: p.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS)), [1, 2]),
    "blank.jsonl": (lambda p: p.write_bytes(b"\n" + jsonl(ROWS, "\n\n")), [2, 4]),
    "no_end.ndjson": (lambda p: p.write_bytes(jsonl(ROWS)[:-1]), [1, 2]),
    "train.jsonl.gz": (lambda p: p.write_bytes(gzip.compress(jsonl(ROWS))), [1, 2]),
    "lines.json": (lambda p: p.write_bytes(jsonl(ROWS)), [1, 2]),
    "array.json": (lambda p: p.write_text(json.dumps(ROWS, indent=1), encoding="utf-8"), [2, 6]),
    "bom.json.gz": (lambda p: p.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())), [1, 2]),
    "train.csv": (write_csv, [2, 3]),
    "train.tsv": (write_csv, [2, 3]),
    "semicolons.csv": (lambda p: p.write_text('completion;prompt\n"O gato mia.";Que som faz o gato?\n' + OTHER), [2, 3]),
    "train.parquet": (write_parquet, [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_file_of_each_kind(name: str, tmp_path: Path) -> None:
    write, lines = WRITERS[name]
    write(tmp_path / name)
    assert good(tmp_path / name) == [(f"{name}:{line}", row) for line, row in zip(lines, ROWS, strict=True)]


def test_all_broken_lines_are_named_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    deep = b'{"text": ' + b"[" * 100_000
    path.write_bytes(
        b'{"text": "ok"}\n{"text": \n[1]\n"word"\n3\nnull\n{"text": "\xff"}\n{"a": 1, "a": 2}\n' + deep + b'\n{"text": "o'
    )
    found = bad(path)
    assert [line.split(":")[1] for line in found] == ["2", "3", "4", "5", "6", "7", "8", "9", "10"]
    for line, piece in zip(
        found,
        ("not JSON", "a list came", "a string", "a number", "null", "not UTF-8 (byte", "the key 'a' stands twice", "not JSON",
         "was it written to its end?"),
        strict=True,
    ):  # fmt: skip
        assert piece in line


def test_a_line_of_fifty_megabytes_is_refused_without_filling_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        file.write(jsonl(ROWS[:1]) + b'{"text": "')
        for _ in range(50):
            file.write(b"a" * 2**20)
        file.write(b'"}\n' + jsonl(ROWS[1:]))
    first, long, last = rows_of(path)
    assert (first.id, last.id) == ("train.jsonl:1", "train.jsonl:3")
    assert isinstance(long, BadRow)
    assert long.reason.startswith("a line of 50 MB came")


def test_broken_arrays_tables_and_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "ok"},\n 3,\n {"text": "ok"}')
    assert [line.split(": ")[0] for line in bad(path)] == ["a.json:2", "a.json:3"]
    path.write_text('[{"text": "ok"},\n {"text": ]')
    assert "a.json:2: not JSON" in bad(path)[0]
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\na,b\nc\nd,\xff\ne,f,g\nh,i\n")
    assert [line.split(":")[1] for line in bad(path)] == ["3", "4", "5"]
    assert [row.id for row in rows_of(path) if isinstance(row, Row)] == ["a.csv:2", "a.csv:6"]
    path.write_text('prompt,completion\n"a,b\n')
    assert "not CSV" in bad(path)[0]
    path.write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="a column stands twice"):
        rows_of(path)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(ROWS * 50))[:-20])
    with pytest.raises(DataError, match="damaged gzip"):
        rows_of(path)
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match="damaged gzip"):
        rows_of(path)
    path = tmp_path / "b.json"
    path.write_text('{\n "data": [{"text": "a"}]\n}')
    with pytest.raises(DataError, match="one object came; a list of rows"):
        rows_of(path)
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="can't be read as Parquet"):
        rows_of(path)
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"\.xlsx files are not read here"):
        rows_of(path)


# Folders, patterns, several sources


def test_a_folder_a_file_and_a_pattern(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.csv").write_text(f"text\n{name}\n")
    (source,) = find(SourceConfig(data=str(tmp_path)))
    assert {split: [file.name for file in files] for split, files in source.files.items()} == {
        "train": ["train.csv"], "valid": ["val.csv"], "test": ["test.csv"],
    }  # fmt: skip
    (source,) = find(SourceConfig(data=str(tmp_path / "t*.csv")))
    assert [row.id for row in read(source.files["train"])] == ["test.csv:2", "train.csv:2"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "train.csv").write_text("text\nx\n")
    (source,) = find(SourceConfig(data=str(tmp_path / "**" / "train.csv")))
    assert len({row.id for row in read(source.files["train"])}) == 2, "files of one name are told apart by their folder"
    for part in (0, 1):
        (tmp_path / "more" / f"test-0000{part}-of-00002.jsonl").write_bytes(jsonl(ROWS))
    (source,) = find(SourceConfig(data=str(tmp_path / "more")))
    assert len(list(read(source.files["test"]))) == 4


def test_wrong_places(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    for data, piece in (
        ("", "nothing came"),
        (str(tmp_path / "no"), "there is no such file or folder"),
        (str(tmp_path), "no train.jsonl in this folder (it holds notes.md)"),
        (str(tmp_path / "*.jsonl"), "no file is like this pattern"),
        ("some/dataset", "hub:some/dataset"),
    ):
        with pytest.raises(DataError) as error:
            find(SourceConfig(data=data))
        assert piece in str(error.value)
    for name in ("train.jsonl", "train.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=r"train.csv, train.jsonl could all be the train rows"):
        find(SourceConfig(data=str(tmp_path)))
    with pytest.raises(ConfigError, match="a number for each of 1 sources"):
        SourceConfig(data="a", data_weights=(1.0, 2.0))


def test_files_of_other_kinds_are_recognised(tmp_path: Path) -> None:
    for name, raw, what in (
        ("a.csv", b"PK\x03\x04...", "Excel"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("b.jsonl", gzip.compress(b"{}"), "gzip; name it .gz"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=what):
            rows_of(tmp_path / name)
    (tmp_path / "c.jsonl").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    assert [value for _, value in good(tmp_path / "c.jsonl")] == ROWS, "a list under the name of JSONL"


def test_rows_of_two_folders_have_ids_of_their_own(tmp_path: Path) -> None:
    """And a # in a name is no part."""
    for name in ("a#1", "b#2"):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{name} {number}?", "completion": str(number)} for number in range(20)]
        (tmp_path / name / "train.jsonl").write_bytes(jsonl(rows))
    corpus = gather_from(tmp_path / "a#1", tmp_path / "b#2", validation_share=0.2)
    ids = [made.id(number) for made in corpus.sets.values() for number in range(len(made))]
    assert len(set(ids)) == 40
    assert len(corpus.questions(100)) == len(corpus.valid) == 8
    (tmp_path / "line.json").write_text(json.dumps(rows))
    assert len({row.id for row in rows_of(tmp_path / "line.json")}) == 20, "all in one line"


def test_several_sources_with_weights(tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 10)):
        rows = [{"prompt": f"{name} {number}?", "completion": f"{name}."} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(rows))
    corpus = gather_from(tmp_path / "a.jsonl", tmp_path / "b.jsonl", data_weights=(1.0, 1.0), validation_share=0.2)
    assert corpus.sizes == (24, 8)
    assert len(corpus.valid) == 8
    assert corpus.order.quotas == (16, 16)
    plain = gather_from(tmp_path / "a.jsonl", tmp_path / "b.jsonl", validation_share=0.2)
    assert plain.order.quotas == (24, 8)


def test_without_validation_rows_a_seeded_share_is_split_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"{number}?", "completion": str(number)} for number in range(50)]
    (tmp_path / "train.jsonl").write_bytes(jsonl(rows))
    source = SourceConfig(data=str(tmp_path), validation_share=0.2, data_cache="off")
    one, again, other = (gather(source, RenderConfig(), load_tokenizer("embedded"), seed) for seed in (1, 1, 2))

    def ids(corpus: Corpus, split: str) -> list[str]:
        return [corpus.sets[split].id(number) for number in range(len(corpus.sets[split]))]

    assert len(one.valid) == 10
    assert sorted(ids(one, "train") + ids(one, "valid")) == sorted(f"train.jsonl:{n}" for n in range(1, 51))
    assert ids(one, "valid") == ids(again, "valid") != ids(other, "valid")
    assert "10 rows split off" in one.valid_from
    assert {asked.id for asked in one.questions(20)} == set(ids(one, "valid"))
    monkeypatch.setattr(prepare, "MOST_SPLIT_OFF", 3)
    assert len(gather_from(tmp_path, validation_share=0.2).valid) == 3
    monkeypatch.undo()
    file_only = gather_from(tmp_path / "train.jsonl", validation_share=0.2)
    assert len(file_only.valid) == 10


def test_parts_of_one_row_are_not_split_between_training_and_validation(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    (tmp_path / "train.jsonl").write_bytes(jsonl([{"messages": turns, "n": n} for n in range(20)]))
    source = SourceConfig(data=str(tmp_path), validation_share=0.3, data_cache="off")
    render = RenderConfig(max_seq_length=16, truncation="split")
    corpus = gather(source, render, load_tokenizer("embedded"), seed=0)
    rows = {
        split: {made.id(number).partition("#")[0] for number in range(len(made))} for split, made in corpus.sets.items()
    }  # fmt: skip
    assert len(corpus.train or ()) > 20
    assert not rows["train"] & rows["valid"]


def test_a_data_set_of_the_hub_as_the_datasets_package_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(jsonl(ROWS * 5))
    (folder / "validation.jsonl").write_bytes(jsonl(ROWS))
    monkeypatch.chdir(tmp_path)
    (source,) = find(SourceConfig(data="hub:owner/name"))
    assert {split: [row.id for row in read(files)][-1] for split, files in source.files.items()} == {
        "train": "owner/name@train:10", "valid": "owner/name@validation:2",
    }  # fmt: skip
    (source,) = find(SourceConfig(data="hub:owner/name@validation"))
    assert [row.value for row in read(source.files["train"]) if isinstance(row, Row)] == ROWS
    with pytest.raises(DataError, match="the hub gave nothing"):
        find(SourceConfig(data="hub:owner/name@nowhere"))


# What a row means


def roles(talk: Any) -> list[tuple[str, str]]:
    assert isinstance(talk, Talk)
    return [(turn.role, turn.content) for turn in talk.turns]


def message(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **changes}]}


ASKED = [("user", "a"), ("assistant", "b")]
MEANINGS: dict[str, tuple[dict[str, Any], str, list[tuple[str, str]]]] = {
    "messages": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages", ASKED),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
        "messages", ASKED,
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "messages", [("system", "s"), *ASKED],
    ),
    "as json in a table": ({"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}, "messages", ASKED),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        "sharegpt", [("system", "s"), *ASKED],
    ),
    "alpaca": ({"instruction": "a", "input": "", "output": "b", "text": "..."}, "alpaca", ASKED),
    "alpaca with input": ({"instruction": "a", "input": "x", "output": "b"}, "alpaca", [("user", "a\n\nx"), ("assistant", "b")]),
    "system beside messages": (message() | {"system": "s"}, "messages", [("system", "s"), *ASKED]),
    "prompt with system": ({"prompt": "a", "completion": "b", "system": "s"}, "prompt", [("system", "s"), *ASKED]),
    "alpaca with history": (
        {"instruction": "a", "output": "b", "history": [["x", "y"]]}, "alpaca", [("user", "x"), ("assistant", "y"), *ASKED],
    ),
    "question": ({"question": "a", "answer": "b", "system": "s"}, "question", [("system", "s"), *ASKED]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MEANINGS))
def test_formats_are_recognised(name: str) -> None:
    value, form, turns = MEANINGS[name]
    found, meaning = understand(Row("x:1", value))
    assert (found, roles(meaning)) == (form, turns)
    assert understand(Row("x:1", value), form) == (found, meaning), "and can be named"  # type: ignore[arg-type]


def test_columns_of_other_names() -> None:
    fields = {"prompt": "input", "completion": "target"}
    assert understand(Row("x:1", {"input": "a", "target": "b"}), "auto", fields) == ("prompt", Pair("a", "b"))
    assert understand(Row("x:1", {"prompt": "a", "completion": "b"}), "auto", fields) == ("prompt", Pair("a", "b"))
    with pytest.raises(RowError, match="fields: no column 'input', 'target' is here; 'x' came"):
        understand(Row("x:1", {"x": "a"}), "auto", fields)

    with pytest.raises(RowError, match="no column 'inputt' is here"):
        understand(Row("x:1", {"input": "a", "target": "b"}), "auto", {"prompt": "inputt", "completion": "target"})
    with pytest.raises(ConfigError, match="fields: 'promt' came, names of answer, completion"):
        SourceConfig(data="a", fields={"promt": "input"})


def test_marks_in_tables_and_on_rows() -> None:
    row = {"prompt": "a", "completion": "b"}
    marks = [understand(Row("x:1", row | {"train": told}))[1].marks for told in ("", "true", "False", "[[0, 1]]")]  # type: ignore[union-attr]
    assert marks == [None, True, False, ((0, 1, 1.0),)]
    _, talk = understand(Row("x:1", message() | {"train": False}))
    assert isinstance(talk, Talk)
    assert [turn.marks for turn in talk.turns] == [False, False]


def test_calls_get_ids_and_arguments_become_objects() -> None:
    value = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": '[{"name": "f"}]',
    }
    _, talk = understand(Row("x:1", value))
    assert isinstance(talk, Talk)
    assert talk.tools == ({"type": "function", "function": {"name": "f"}},)
    call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"x": 1}}}
    assert talk.turns[1].shown == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert talk.turns[2].shown == {"role": "tool", "content": "7", "tool_call_id": "call00001"}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no keys": ({}, "no keys came"),
    "other keys": ({"frage": "a"}, "'frage' came, .* --fields"),
    "empty conversation": ({"messages": []}, r"messages: \[\] came"),
    "null": ({"messages": None}, "messages: nothing came"),
    "null message": ({"messages": [None]}, r"messages\[0\]: nothing came"),
    "unknown role": (message(role="bot"), r"messages\[1\].role: 'bot' came, one of system, user, assistant, tool"),
    "null content": (message(content=None), r"messages\[1\].content: nothing came"),
    "number content": (message(content=3), r"messages\[1\].content: 3 came"),
    "image": (message(content=[{"type": "image_url"}]), "parts of the kind image_url came"),
    "empty answer": (message(content="  "), "an empty answer"),
    "half a character": (message(content="a\ud83d"), "half of a character"),
    "two answers": (
        {"messages": [*message()["messages"], {"role": "assistant", "content": "c"}]}, "the assistant speaks twice in a row",
    ),
    "no answer": ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
    "late system": ({"messages": [*message()["messages"], {"role": "system", "content": "c"}]}, "a system message in the middle"),
    "result without call": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "c"}, {"role": "assistant", "content": "b"}]},
        "a tool's result without the call",
    ),
    "call of the user": (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}, {"role": "assistant", "content": "b"}]},
        "only the assistant calls",
    ),
    "calls no list": (message(tool_calls={"name": "f"}), "a list of calls is expected"),
    "call without name": (message(tool_calls=[{"function": {}}]), r"tool_calls\[0\].name: nothing came"),
    "arguments no object": (message(tool_calls=[{"name": "f", "arguments": "x"}]), r"arguments: 'x' came"),
    "tools no list": (message() | {"tools": {"a": 1}}, "tools: .* came, a list"),
    "unknown sender": ({"conversations": [{"from": "alien", "value": "a"}]}, r"conversations\[0\].from: 'alien' came"),
    "call no json": ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "a call as JSON is expected"),
    "no completion": ({"prompt": "a"}, "completion: nothing came"),
    "no output": ({"instruction": "a"}, "output: nothing came"),
    "input a number": ({"instruction": "a", "input": 3, "output": "b"}, "input: 3 came"),
    "nan weight": (message() | {"weight": float("nan")}, "weight: nan came, a number from 0"),
    "negative weight": (message(weight=-1), r"messages\[1\].weight: -1 came"),
    "weight true": (message() | {"weight": True}, "weight: True came"),
    "weight of letters": ({"prompt": "a", "completion": "b", "weight": "heavy"}, "weight: 'heavy' came"),
    "marks backwards": (message(train=[[3, 1]]), r"\[begin, end\] in characters"),
    "marks a number": (message(train=7), "true, false or a list"),
    "marks of the user": ({"messages": [{"role": "user", "content": "a", "train": True}, *message()["messages"][1:]]}, "only what the assistant"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_a_row_that_means_nothing(name: str) -> None:
    value, reason = WRONG[name]
    with pytest.raises(RowError, match=reason):
        understand(Row("x:1", value))


# Refusing and skipping


def test_the_first_twenty_refused_rows_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"{\n" * 3 + jsonl(ROWS) + b'{"text": ""}\n' * 40)
    with pytest.raises(DataError) as error:
        gather_from(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("train.jsonl:1: not JSON")
    assert lines[19].startswith("train.jsonl:22: text: an empty text")
    assert "the first 20" in lines[20]
    path.write_bytes(b"{\n" * 3 + jsonl(ROWS))
    with pytest.raises(DataError, match="--malformed skip"):
        gather_from(path)


def test_refused_rows_can_be_skipped_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"{\n" * 3 + jsonl(ROWS))
    corpus = gather_from(path, malformed="skip", malformed_limit=3)
    assert corpus.accounts["train"].malformed == 3
    assert (corpus.accounts["train"].rows, corpus.accounts["train"].examples) == (5, 2)
    with pytest.raises(DataError, match="3 rows can't be used, more than malformed_limit 2"):
        gather_from(path, malformed="skip", malformed_limit=2)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "x"]) | _JSON,
        "content": st.text(max_size=9) | _JSON,
        "from": st.sampled_from(["human", "gpt", "function_call", "observation"]),
        "value": st.text(max_size=9) | st.just('{"name": "f", "arguments": {}}') | _JSON,
        "tool_calls": st.lists(st.fixed_dictionaries({}, optional={"name": st.text(max_size=3), "arguments": _JSON}), max_size=2),
        "train": st.booleans() | st.lists(st.lists(st.integers(-1, 9), max_size=4), max_size=2) | _JSON,
        "weight": st.floats() | _JSON,
        "name": _JSON, "tool_call_id": _JSON, "reasoning_content": _JSON,
    },
)  # fmt: skip
_CHAT = st.lists(_MESSAGE, max_size=4) | _JSON
_ROW = st.fixed_dictionaries(
    {},
    optional={
        "messages": _CHAT, "conversations": _CHAT, "tools": _JSON, "weight": _JSON, "train": _JSON, "system": _JSON,
        **{key: st.text(max_size=12) | _JSON for key in ("prompt", "completion", "text", "instruction", "input", "output",
                                                          "question", "answer")},
    },
)  # fmt: skip
_RENDERERS: dict[str, Renderer] = {}


@settings(max_examples=400, deadline=None)
@given(
    value=_ROW | st.dictionaries(st.text(max_size=5), _JSON, max_size=3), policy=st.sampled_from(["drop", "keep_end", "split"])
)
def test_no_row_makes_anything_but_an_example_or_the_users_error(value: dict[str, Any], policy: str) -> None:
    if policy not in _RENDERERS:
        config = RenderConfig(max_seq_length=24, truncation=policy)  # type: ignore[arg-type]
        _RENDERERS[policy] = Renderer(load_tokenizer("embedded"), config, SourceConfig())
    account, refusals = Account(), Refusals()
    made = list(_RENDERERS[policy].examples([Row("train.jsonl:1", value)], account, refusals))
    assert account.rows == 1
    if refusals.count:
        assert not made
        assert refusals.listed[0].startswith("train.jsonl:1: ")
    assert account.supervised_tokens == sum((example.weights > 0).sum() for example in made)
    for example in made:
        assert example.weights.any()
        assert example.weights[0] == 0
        assert len(example.tokens) == len(example.weights) <= 24


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | _ROW.map(lambda v: json.dumps(v).encode())),
       st.sampled_from(["t.jsonl", "t.json", "t.csv", "t.tsv"]))  # fmt: skip
def test_no_file_makes_anything_but_rows_or_the_users_error(tmp_path_factory: Any, lines: list[bytes], name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(b"\n".join(lines))
    try:
        found = rows_of(path)
    except DataError as error:
        assert name in str(error)  # noqa: PT017  (both ways are right)
    else:
        assert all(isinstance(row, Row | BadRow) and row.id.startswith(f"{name}:") for row in found)
