"""What a stranger's file may do here: nothing but be read. And what a folder may be: anything a person can make."""

from __future__ import annotations

import ast
import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx_qlora  # first: it loads the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from conftest import randomize_adapters, same_bytes, tiny_model

from mlx_qlora.assets import embedded_model
from mlx_qlora.commands import main
from mlx_qlora.config import RunConfig, from_yaml
from mlx_qlora.data import prepare
from mlx_qlora.data.corpus import gather
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import DiskFile, SourceConfig, find
from mlx_qlora.errors import ConfigError, DataError, ModelError
from mlx_qlora.model import lora, trust
from mlx_qlora.model.load import load, load_tokenizer, outline
from mlx_qlora.model.lora import LoraConfig

TOKENIZER = load_tokenizer("embedded")
ROW = {"messages": [{"role": "user", "content": "Que som faz o gato?"}, {"role": "assistant", "content": "O gato mia."}]}


def model_folder(place: Path) -> Path:
    """A copy of the embedded model."""
    place.mkdir()
    for path in embedded_model().iterdir():
        if path.is_file():
            (place / path.name).write_bytes(path.read_bytes())
    return place


def data_folder(place: Path) -> Path:
    place.mkdir()
    for name in ("train", "valid"):
        (place / f"{name}.jsonl").write_text(json.dumps(ROW) + "\n")
    return place


def changed(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# Code that a model brings

_EVIL = """
import os
open(os.environ["IT_RAN"], "w").close()
class Model: pass
class ModelArgs: pass
class Tokenizer: pass
class Config: pass
"""
CODE: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_map of the model": ("config.json", {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}),
    "auto_map of the tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
    "auto_map as a list": ("tokenizer_config.json", {"auto_map": ["evil.Tokenizer", "evil.Tokenizer"]}),
    "model_file": ("config.json", {"model_file": "evil.py"}),
}


@pytest.mark.parametrize("name", list(CODE))
def test_code_that_a_model_brings_never_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, data = model_folder(tmp_path / "m"), data_folder(tmp_path / "data")
    file, keys = CODE[name]
    (folder / "evil.py").write_text(_EVIL)
    changed(folder / file, **keys)
    monkeypatch.setenv("IT_RAN", str(tmp_path / "it_ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask whether it may
    where = ["--model", "./m", "--data", "data", "--output-dir", "run"]
    for command in (["train", *where], ["plan", *where], ["data", "data", "--model", "./m"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert f"m/{file}: {next(iter(keys))} names code of its own" in err
        assert "never done here" in err
        assert "Traceback" not in err
    for function in (load, outline, load_tokenizer):
        with pytest.raises(ModelError, match="code of its own"):
            function(str(folder))
    assert not (tmp_path / "it_ran").exists()
    assert not (tmp_path / "run").exists()
    assert list(data.iterdir())


def test_the_libraries_are_told_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the check gone, transformers and mlx-lm would refuse by themselves, and not ask at the terminal."""
    folder = model_folder(tmp_path / "m")
    (folder / "evil.py").write_text(_EVIL)
    monkeypatch.setattr(trust, "check", lambda folder: None)
    monkeypatch.setenv("IT_RAN", str(tmp_path / "it_ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    changed(folder / "config.json", model_file="evil.py")
    for function in (load, outline):
        with pytest.raises(ModelError, match="trust_remote_code"):
            function(str(folder))
    (folder / "config.json").unlink()  # of a kind that transformers knows it would take its own tokenizer
    changed(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}, tokenizer_class="Evil")
    with pytest.raises(ModelError, match="custom code"):
        load_tokenizer(str(folder))
    assert not (tmp_path / "it_ran").exists()


def test_whoever_loads_says_that_no_code_runs() -> None:
    """Every call of what can run a model's or a data set's code, in the whole package and the example."""
    package = Path(mlx_qlora.__file__).parent
    calls = []
    for path in (*package.rglob("*.py"), package.parent / "examples" / "flat_loop.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in _LOADERS:
                calls.append((path.name, ast.unparse(node)))
            assert not (isinstance(node, ast.Attribute) and node.attr == "from_pretrained"), path
    assert len(calls) >= 6
    said = ("NO_CODE", "without_code", "trust_remote_code=False", "'trust_remote_code': False")
    assert not [call for call in calls if not any(word in call[1] for word in said)]


_LOADERS = {"mlx_lm.load", "load_model", "load_it", "datasets.load_dataset"}


# Weights


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/model.safetensors", "sub/../../model.safetensors", "..", "C:\\model.safetensors"],
)
def test_an_index_that_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for function in (load, outline, load_tokenizer):
        with pytest.raises(ModelError, match="leads out of the model's folder") as caught:
            function(str(folder))
        assert repr(name) in str(caught.value)


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"it names model-00002\.safetensors, which the folder lacks"):
        load(str(folder))
    for wrong, piece in (("{", "not JSON"), ("[]", "an object"), ('{"weight_map": 3}', "weight_map"), ("{}", "weight_map")):
        index.write_text(wrong)
        with pytest.raises(ModelError, match=piece):
            load(str(folder))


def test_links_of_the_hubs_cache_go_on_working(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    model_folder(blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert load(str(snapshot)).config["model_type"] == "mistral"
    (blobs / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names model\.safetensors, which|this link leads to"):
        load(str(snapshot))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"its weights are pickles \(pytorch_model\.bin\)"):
        load(str(folder))


# Adapters


def test_adapters_go_in_whole_or_not_at_all() -> None:
    model, other = tiny_model("mistral"), tiny_model("mistral")
    for one in (model, other):
        lora.attach(one, LoraConfig(rank=4))
    randomize_adapters(other)
    good = lora.adapter_arrays(other)
    untouched = {name: np.array(array) for name, array in lora.adapter_arrays(model).items()}
    first, second, third = list(good)[:3]
    wrong = {name: array for name, array in good.items() if name != first} | {
        second: mx.zeros((2, 2)),
        third: mx.zeros(good[third].shape, mx.int32),
        "model.layers.9.mlp.up_proj.lora_a": mx.zeros((4,)),
    }
    with pytest.raises(ModelError) as caught:
        lora.load(model, wrong, "there/adapters.safetensors")
    said = str(caught.value)
    assert "there/adapters.safetensors" in said
    for piece in (
        f"{first}: it is missing", f"{second}: 2 x 2 came", f"{third}: int32 came", "model.layers.9.mlp.up_proj.lora_a: this",
    ):  # fmt: skip
        assert piece in said
    with pytest.raises(ModelError, match="and 22 more"):
        lora.load(model, {}, "empty")
    assert same_bytes(lora.adapter_arrays(model), untouched)
    lora.load(model, good, "there")
    assert same_bytes(lora.adapter_arrays(model), good)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_adapters_that_are_not_finite_are_refused(value: float, dtype: mx.Dtype) -> None:
    model = tiny_model("mistral")
    lora.attach(model, LoraConfig(rank=4))
    untouched = {name: np.array(array) for name, array in lora.adapter_arrays(model).items()}
    arrays = {name: array.astype(dtype) for name, array in lora.adapter_arrays(model).items()}
    name = list(arrays)[5]
    arrays[name][0, 0] = value
    with pytest.raises(ModelError) as caught:
        lora.load(model, arrays, "there")
    assert f"{name}: 1 of {arrays[name].size:,} numbers" in str(caught.value)
    assert "there" in str(caught.value)
    assert same_bytes(lora.adapter_arrays(model), untouched)


# Data


def test_what_lies_beside_the_data_names_no_file(tmp_path: Path) -> None:
    """A manifest is somebody's text: what it says of files elsewhere is not looked at, and nothing there is touched."""
    data, outside = data_folder(tmp_path / "data"), tmp_path / "outside.bin"
    outside.write_bytes(b"mine")
    fresh = _prepared(data)
    folder = _prepared_folder(data)
    manifest = prepare._read_manifest(folder)
    for change in (
        {"files": manifest["files"] | {"../../../outside.bin": prepare._kept(outside)}},
        {"files": {str(outside): prepare._kept(outside)}},
        {"token_type": "|O"},
        {"token_type": "<f8"},
        {"names": 3},
        {"account": {"rows": "many"}},
        {"from": "x" * 1000},
    ):
        prepare._write_manifest(folder, manifest | change)
        opened: list[str] = []
        with _watched(opened):
            assert _prepared(data) == fresh
        assert not [name for name in opened if "outside" in name]
    assert outside.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["manifest", "tokens.bin", "index.bin"])
@pytest.mark.parametrize("what", ["pipe", "link out", "link to nothing", "device", "folder", "nothing"])
def test_a_prepared_folder_of_other_things_is_made_anew(what: str, name: str, tmp_path: Path) -> None:
    data, outside = data_folder(tmp_path / "data"), tmp_path / "outside"
    fresh = _prepared(data)
    target = _prepared_folder(data) / name
    outside.write_bytes(target.read_bytes())
    before = outside.read_bytes()
    target.unlink()
    makers: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(target), "link out": lambda: target.symlink_to(outside), "folder": target.mkdir,
        "link to nothing": lambda: target.symlink_to("nowhere"), "device": lambda: target.symlink_to("/dev/zero"),
        "nothing": lambda: None,
    }  # fmt: skip
    makers[what]()
    assert _prepared(data) == fresh
    assert outside.read_bytes() == before
    assert target.is_file()
    assert not target.is_symlink()


def test_links_in_the_place_of_prepared_folders_lead_nothing_to_be_deleted(tmp_path: Path) -> None:
    data, outside = data_folder(tmp_path / "data"), tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    fresh = _prepared(data)
    folder = _prepared_folder(data)
    shutil.rmtree(folder)
    folder.symlink_to(outside)
    old = folder.name.rpartition("-")[0]
    for number in range(10):
        (folder.parent / f"{old}-{number:016x}").symlink_to(outside)
    (folder.parent / f"{old}-and my own notes").mkdir()
    (folder.parent / ".writing-1").symlink_to(outside)
    (folder.parent / ".writing-2").write_text("a file")
    os.utime(outside, (1, 1))
    os.utime(outside / "mine", (1, 1))
    assert _prepared(data) == fresh
    assert (outside / "mine").read_text() == "mine"
    assert not folder.is_symlink()
    assert (folder.parent / f"{old}-and my own notes").is_dir()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_what_somebody_else_prepared_is_not_taken(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data")
    _prepared(data)
    assert gathered(data).warm
    os.chown(_prepared_folder(data) / "manifest", 12345, -1)
    assert not gathered(data).warm
    for path in (_prepared_folder(data), *_prepared_folder(data).iterdir(), data / "train.jsonl"):
        os.chown(path, 12345, -1)
    assert gathered(data).warm, "whoever owns the data may prepare it"


def gathered(data: Path) -> Any:
    return gather(SourceConfig(data=str(data)), RenderConfig(), TOKENIZER, seed=0)


def _prepared(data: Path) -> list[list[int]]:
    train = gathered(data).sets["train"]
    return [train[number].tokens.tolist() for number in range(len(train))]


def _prepared_folder(data: Path) -> Path:
    (folder,) = (data / ".mlx_qlora").glob("train-*[0-9a-f]")
    return folder


@contextmanager
def _watched(opened: list[str]) -> Iterator[None]:
    """The names of files that Python opens meanwhile."""
    on = [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if on[0] and event == "open" else None)
    try:
        yield
    finally:
        on[0] = False


# name of the file: (its bytes without compression, what is said)
def _bomb(start: bytes, repeated: bytes, megabytes: int, end: bytes = b"") -> bytes:
    """gzip of so many MB; it is a thousandth of that."""
    made = zlib.compressobj(9, wbits=31)
    block = repeated * (2**20 // len(repeated))
    parts = [made.compress(start), *(made.compress(block) for _ in range(megabytes)), made.compress(end)]
    return b"".join([*parts, made.flush()])


GOOD_LINE = json.dumps(ROW).encode() + b"\n"
BOMBS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a long line": (
        "t.jsonl.gz", lambda: _bomb(GOOD_LINE + b'{"text": "', b"x", 40, b'"}\n' + GOOD_LINE), "t.jsonl.gz:2: a line of 40 MB",
    ),
    "a line without end": ("t.jsonl.gz", lambda: _bomb(GOOD_LINE, b"x", 40), "t.jsonl.gz:2: a line of more than 32 MB"),
    "a list": ("t.json.gz", lambda: _bomb(b"[", b"  ", 40), "t.json.gz: a list of more than 32 MB"),
    "a row of a list": (
        "t.json.gz", lambda: _bomb(b'[{"text": "a"},\n{"text": "', b"x", 20, b'"}]'), "t.json.gz:2: more than 16 MB came",
    ),
    "a table's first line": ("t.csv.gz", lambda: _bomb(b"", b"x", 40), "t.csv.gz:1: a row of more than 16 MB"),
    "a table's row of many lines": (
        "t.csv.gz", lambda: _bomb(b'prompt,completion\na,b\n"', b"x" * 1023 + b"\n", 40), "a row of more than 16 MB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_small_file_that_holds_much(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, make, said = BOMBS[name]
    (tmp_path / file).write_bytes(make())
    monkeypatch.setattr("mlx_qlora.data.sources._MAX_LIST", (48 if name == "a long line" else 32) * 2**20)
    config = SourceConfig(data=str(tmp_path / file))
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            gather(config, RenderConfig(), TOKENIZER, seed=0)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert said in str(caught.value)
    assert peak < 120 * 2**20


def test_a_parquet_file_whose_rows_unfold(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "t.parquet"
    long = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, 1]), pyarrow.array(["a", "x" * (17 * 2**20)]))
    parquet.write_table(pyarrow.table({"text": long}), path)
    assert path.stat().st_size < 2**21
    rows = list(DiskFile(path, "t.parquet").read())
    assert [type(row).__name__ for row in rows] == ["Row", "BadRow", "BadRow"]
    assert "a row of 17 MB came" in rows[1].reason  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["/etc", "../x", "owner/../x", "a/b/c", "", "owner/", "~/x"])
def test_names_of_the_hub_are_names_of_the_hub(name: str) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="hub:owner/name or hub:owner/name@split is expected"):
        find(SourceConfig(data=f"hub:{name}"))


def test_data_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    (tmp_path / "round.jsonl").symlink_to("round.jsonl")
    for name, said in (
        ("pipe", "a pipe or a device"),
        ("link", "leads to nowhere"),
        ("round", "Too many levels|can't be read|leads to round"),
    ):
        with pytest.raises(DataError, match=said):
            find(SourceConfig(data=str(tmp_path / f"{name}.jsonl")))
    with pytest.raises(DataError, match="no file is like this pattern"):
        find(SourceConfig(data=str(tmp_path / "p*.jsonl")))
    with pytest.raises(DataError, match="a pipe or a device"):
        find(SourceConfig(data="/dev/zero"))
    (tmp_path / os.fsdecode(b"t\xff.jsonl")).write_bytes(GOOD_LINE)
    with pytest.raises(DataError, match="is not UTF-8"):
        find(SourceConfig(data=str(tmp_path / os.fsdecode(b"t\xff.jsonl"))))


# Templates

TEMPLATES: dict[str, tuple[str, str]] = {
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "attribute '__class__' of 'str' object is unsafe"),
    "globals of a function": ("{{ raise_exception.__globals__['os'] }}", "'__globals__' of 'function' object is unsafe"),
    "through a filter": ("{{ messages | map(attribute='__class__.__mro__') | list }}", "'__class__' of 'dict' object is"),
    "through a format": ("{{ '{0.__class__.__mro__}'.format('') }}", "attribute '__class__' of 'str' object is unsafe"),
    "changing messages": ("{{ messages.clear() }}", "is not safely callable|is unsafe"),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "loops in loops": (
        "{% for i in range(99999) %}{% for i in range(99999) %}many words {% endfor %}{% endfor %}", "it writes more than",
    ),
    "empty words for ever": (
        "{% for i in range(99999) %}{% for i in range(99999) %}{{ '' }}{% endfor %}{% endfor %}", "it writes more than",
    ),
    "one long word": ("{{ 'x' * 20000000 }}", "it writes more than"),
    "more than there is": ("{{ 'x' * 10**18 }}", "does what no chat template may"),
    "calling itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("way", ["model", "file", "tools"])
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_template_that_does_what_none_may(name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "tools" and name in ("loops in loops", "empty words for ever"):
        pytest.skip("with tools the text is measured when it is whole")
    monkeypatch.setattr("mlx_qlora.data.templates._MOST_LETTERS", 10**6)
    text, said = TEMPLATES[name]
    data, tokenizer = data_folder(tmp_path / "data"), load_tokenizer("embedded")
    (tmp_path / "t.jinja").write_text(text)
    if way != "file":
        tokenizer.chat_template = text
    if way == "tools":
        (data / "train.jsonl").write_text(json.dumps(ROW | {"tools": TOOLS}) + "\n")
    render = RenderConfig(chat_template=str(tmp_path / "t.jinja") if way == "file" else "")
    with pytest.raises(DataError, match=said) as caught:
        gather(SourceConfig(data=str(data), malformed="skip", data_cache="off"), render, tokenizer, seed=0)
    assert "chat_template: " in str(caught.value)
    assert ("t.jinja" if way == "file" else "the model's own") in str(caught.value)


def test_a_template_file_that_is_none(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data")
    (tmp_path / "large.jinja").write_text("x" * (2**20 + 1))
    (tmp_path / "deep.jinja").write_text("{{ " + "(" * 20_000)
    os.mkfifo(tmp_path / "pipe.jinja")
    for name, said in (("large", "larger than 1 MB"), ("deep", "nested too deeply"), ("pipe", "a pipe or a device")):
        render = RenderConfig(chat_template=str(tmp_path / f"{name}.jinja"))
        with pytest.raises(DataError, match=said):
            gather(SourceConfig(data=str(data)), render, load_tokenizer("embedded"), seed=0)


# YAML


def _laughs(levels: int) -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for number in range(1, levels):
        before, own = chr(96 + number), chr(97 + number)
        lines.append(f"{own}: &{own} [" + ", ".join([f"*{before}"] * 10) + "]")
    return "\n".join([*lines, f"data: *{chr(96 + levels)}"])


YAML: dict[str, tuple[Callable[[Path], object], str]] = {
    "a billion laughs": (lambda p: p.write_text(_laughs(9)), "more than 10,000 values, counted with each alias unfolded"),
    "an alias in itself": (lambda p: p.write_text("data: &a [*a]"), "more than 10,000 values"),
    "too large": (lambda p: p.write_text("epochs: 3 # " + "x" * 2**20), "can't be read: it is larger than 1 MB"),
    "an object": (
        lambda p: p.write_text("epochs: 3\noutput_dir: !!python/object/apply:os.system ['touch it_ran']"),
        ":2: !!python/object/apply:os.system: tags that make objects are not read",
    ),
    "a tag of somebody's": (lambda p: p.write_text("epochs: !mine 3"), ":1: !mine: tags"),
    "nested deeply": (lambda p: p.write_text("data: " + "[" * 100_000), "nested too deeply"),
    "mappings nested deeply": (lambda p: p.write_text("{a: " * 50_000), "nested too deeply"),
    "a folder": (lambda p: p.mkdir(), "it is a folder, a file is expected"),
    "a pipe": (lambda p: os.mkfifo(p), "it is a pipe or a device"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "it is a pipe or a device"),
    "a link to nothing": (lambda p: p.symlink_to("nowhere"), "can't be read: No such file"),
    "letters that there are not": (lambda p: p.write_text('a: "\\UFFFFFFFF"'), "not YAML"),
    "bytes": (lambda p: p.write_bytes(b"a: \xff"), "is not UTF-8"),
    "two documents": (lambda p: p.write_text("a: 1\n---\nb: 2"), "not YAML"),
    "a list for a key": (lambda p: p.write_text("[a]: 1"), "there is no such setting"),
}


@pytest.mark.parametrize("name", list(YAML))
def test_a_yaml_file_that_is_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, piece = YAML[name]
    make(tmp_path / "run.yaml")
    with pytest.raises(ConfigError) as caught:
        from_yaml(Path("run.yaml"), RunConfig())
    assert "run.yaml" in str(caught.value)
    assert piece in str(caught.value)
    assert not (tmp_path / "it_ran").exists()


def test_honest_anchors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: &n 4\nepochs: *n\ndata: &d [a, b]\nlora:\n  targets: *d\n")
    config = from_yaml(path, RunConfig())
    assert (config.batch_size, config.epochs, config.data, config.lora.targets) == (4, 4, ("a", "b"), ("a", "b"))


# Folders

# Several commands in one process, which starts once: (exit code, what was said) of each.
_DRIVER = """
import contextlib, io, json, sys
from mlx_qlora.commands import main
made = []
for command in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(command)
        except SystemExit as error:
            code = error.code
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
    made.append((code, said.getvalue()))
json.dump(made, sys.stdout)
"""


def obey_modes() -> None:
    """In a process about to start: root without these two capabilities minds the modes of files, as everybody does."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def started(command: list[str], place: Path, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    home = {"HOME": str(place / "home"), "XDG_CACHE_HOME": str(place / "home" / "cache")}
    before = os.environ.get("PYTHONPATH", "")
    path = {"PYTHONPATH": os.pathsep.join([str(Path(mlx_qlora.__file__).parent.parent), *([before] if before else [])])}
    return subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=place, env=os.environ | home | path | environment,
        preexec_fn=obey_modes if sys.platform == "linux" else None,
    )  # fmt: skip


def _locked(mode: int, *parts: str) -> Callable[[Path], object]:
    return lambda place: place.joinpath(*parts).chmod(mode)


def _made(mode: int, *parts: str) -> Callable[[Path], object]:
    return lambda place: place.joinpath(*parts).mkdir(mode=mode)


def _train(**changes: str) -> list[str]:
    given = {"model": "./m", "data": "data", "output-dir": "run", "max-steps": "1"} | changes
    return ["train", *(word for name, value in given.items() for word in (f"--{name}", value))]


_AUDIT = ["data", "data", "--model", "./m"]
_PLAN = ["plan", "--model", "./m"]
_CACHED = [*_AUDIT, "--data-cache", "c"]
_BELOW = _train(**{"output-dir": "o/run"})
_NOT_KEPT = ["c: prepared data can't be kept here"]
# What is done to a folder with m, data and home in it, the command, and pieces of what is said; none: it works.
DENIED: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "output below a folder that may not be written": (_made(0o555, "o"), _BELOW, ["output_dir: o/run"]),
    "output that may not be written": (_made(0o555, "run"), _train(), ["output_dir: run", "written"]),
    "output below a folder that may not be entered": (_made(0o000, "o"), _BELOW, ["o/run"]),
    "output below a file": (lambda p: (p / "o").write_text(""), _BELOW, ["output_dir: o/run", "o"]),
    "output a file": (lambda p: (p / "run").write_text(""), _train(), ["output_dir: run is a file"]),
    "output a link to nothing": (lambda p: (p / "run").symlink_to("nowhere/x"), _train(), ["run"]),
    "model that may not be read": (_locked(0o000, "m"), _train(), ["m: this folder can't be read: Permission denied"]),
    "model that may be listed only": (_locked(0o444, "m"), _PLAN, ["m: this folder can't be read: Permission denied"]),
    "config.json": (_locked(0o000, "m", "config.json"), _PLAN, ["config.json: can't be read: Permission denied"]),
    "tokenizer_config.json": (_locked(0, "m", "tokenizer_config.json"), _AUDIT, ["tokenizer_config.json: can't be read"]),
    "tokenizer.json": (_locked(0, "m", "tokenizer.json"), _AUDIT, ["./m: this tokenizer can't be loaded", "tokenizer.json"]),
    "weights": (_locked(0, "m", "model.safetensors"), _train(), ["./m: this model can't be loaded", "model.safetensors"]),
    "model a file": (lambda p: (p / "f").write_text(""), ["plan", "--model", "./f"], ["f: this is a file"]),
    "model a link to nothing": (lambda p: (p / "f").symlink_to("nowhere"), ["plan", "--model", "./f"], ["f: this link leads"]),
    "model below a file": (lambda p: None, ["plan", "--model", "./data/train.jsonl/m"], ["m"]),
    "data that may not be read": (_locked(0o000, "data"), _AUDIT, ["data", "can't be read: Permission denied"]),
    "data that may be listed only": (_locked(0o444, "data"), _AUDIT, ["data", "can't be read: Permission denied"]),
    "a file of the data": (_locked(0o000, "data", "train.jsonl"), _AUDIT, ["data/train.jsonl: can't be read: Permission"]),
    "data that may not be written": (_locked(0o555, "data"), _AUDIT, []),
    "data that may not be listed": (
        _locked(0o111, "data"), ["data", "data/train.jsonl", "data/valid.jsonl", "--model", "./m"], ["only row"],
    ),
    "cache that may not be written": (_made(0o555, "c"), _CACHED, _NOT_KEPT),
    "cache that may not be entered": (_made(0o000, "c"), _CACHED, _NOT_KEPT),
    "cache a file": (lambda p: (p / "c").write_text(""), _CACHED, _NOT_KEPT),
    "cache a link to nothing": (
        lambda p: (p / "c").symlink_to("nowhere"), _CACHED, _NOT_KEPT,
    ),
    "cache beside the data a file": (
        lambda p: (p / "data" / ".mlx_qlora").write_text(""), _AUDIT, ["data/.mlx_qlora: prepared data can't be kept here"],
    ),
    "no cache may be written at all": (
        lambda p: ((p / "data").chmod(0o555), (p / "home").chmod(0o555)), _AUDIT, ["prepared data can't be kept here"],
    ),
    "trunk cache a file": (
        lambda p: (p / "c").write_text(""),
        [*_train(), "--lora.layers", "1", "--trunk-cache-dir", "c"],
        ["trunk_cache_dir: c can't be used: Not a directory"],
    ),
    "trunk cache that may not be written": (
        _made(0o555, "c"),
        [*_train(), "--lora.layers", "1", "--trunk-cache-dir", "c"],
        ["trunk_cache_dir: c can't be used: Permission denied"],
    ),
    "settings": (lambda p: (p / "r.yaml").touch(mode=0), ["train", "--config", "r.yaml"], ["r.yaml can't be read: Permission"]),
    "settings in a locked folder": (_made(0, "o"), ["train", "--config", "o/r.yaml"], ["o/r.yaml can't be read: Permission"]),
    "template": (
        lambda p: (p / "t.jinja").touch(mode=0), [*_AUDIT, "--chat-template", "t.jinja"], ["t.jinja", "Permission denied"],
    ),
}  # fmt: skip


def _tree(place: Path) -> list[str]:
    return sorted(
        str(path.relative_to(place))
        for path in place.rglob("*")
        if not {"home", ".mlx_qlora"} & {*path.relative_to(place).parts}
    )


@pytest.fixture(scope="module")
def denied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, str, bool]]]:
    """(exit code, what was said, whether the folders are as before) by name; all of them from one process."""
    root = tmp_path_factory.mktemp("denied")
    (root / "locked").touch(mode=0)
    probe = started([sys.executable, "-c", "open('locked')"], root)
    if "PermissionError" not in probe.stderr:
        pytest.skip("modes of files do not bind here")
    places, commands = [], []
    for number, (make, command, _) in enumerate(DENIED.values()):
        place = root / str(number)
        place.mkdir()
        model_folder(place / "m")
        data_folder(place / "data")
        (place / "home").mkdir()
        places.append((place, make))
        commands.append(command)
    trees = []
    for place, make in places:
        make(place)
        trees.append(_tree(place))
    driver = f"import os\nplaces = {[str(place) for place, _ in places]!r}\n" + _DRIVER.replace(
        "    said = io.StringIO()",
        "    os.chdir(places[len(made)])\n    os.environ['XDG_CACHE_HOME'] = os.path.abspath('home')\n    said = io.StringIO()",
    )
    done = started([sys.executable, "-c", driver], root, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    after = [_tree(place) for place, _ in places]
    said = json.loads(done.stdout[done.stdout.index("[[") :])
    yield {name: (*answer, before == now) for name, answer, before, now in zip(DENIED, said, trees, after, strict=True)}
    for path in [root, *root.rglob("*")]:  # so that pytest can take them away
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


@pytest.mark.parametrize("name", list(DENIED))
def test_what_may_not_be_read_or_written(name: str, denied: dict[str, tuple[int, str, bool]]) -> None:
    code, said, untouched = denied[name]
    pieces = DENIED[name][2]
    assert code == (2 if pieces else 0), said
    assert "Traceback" not in said
    for piece in pieces:
        assert piece in said
    assert untouched, "nothing was written"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_with_spaces_and_other_letters(form: str, tmp_path: Path) -> None:
    place = tmp_path / unicodedata.normalize(form, "Ação nº 1 (日本語) 'é' \"ü\" $HOME #%d")
    place.mkdir()
    model, data = model_folder(place / "o modelo"), data_folder(place / "os dados")
    (place / "home").mkdir()
    (place / "é settings.yaml").write_text(f"max_steps: 1\nmodel: {json.dumps(str(model))}\n", encoding="utf-8")
    command = [sys.executable, "-m", "mlx_qlora", "train", "--config", "é settings.yaml", "--data", str(data)]
    done = started([*command, "--output-dir", str(place / "a saída"), "--data-cache", "o cache é"], place)
    assert done.returncode == 0, done.stderr
    assert (place / "a saída" / "adapters" / "adapters.safetensors").is_file()
    saved = from_yaml(place / "a saída" / "config.yaml", RunConfig())
    assert (saved.model, saved.data, saved.output_dir) == (str(model), str(data), str(place / "a saída"))
    assert list((place / "o cache é").iterdir())


def test_folders_on_another_file_system(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system here")
    with tempfile.TemporaryDirectory(dir=shared) as name:
        there = Path(name)
        model_folder(there / "m")
        data_folder(tmp_path / "data")
        (tmp_path / "home").mkdir()
        (there / "run").mkdir()
        (tmp_path / "run").symlink_to(there / "run")
        (tmp_path / "data" / ".mlx_qlora").symlink_to(there)
        command = [sys.executable, "-m", "mlx_qlora", *_train(model=str(there / "m"))]
        done = started(command, tmp_path)
        assert done.returncode == 0, done.stderr
        assert (there / "run" / "adapters" / "adapters.safetensors").is_file()
        assert (tmp_path / "run").is_symlink()
        assert not list(there.rglob("*.tmp*"))
        assert gathered(tmp_path / "data").warm
