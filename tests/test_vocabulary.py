"""Tokenizers that are trained: any text comes back, the same texts give the same one, and which texts are looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mlx_qlora.assets import embedded_data, embedded_model
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.data.templates import TEMPLATES
from mlx_qlora.data.vocabulary import CHAT_TEMPLATE, ROLES, Learned, learn, marks_of, train_tokenizer
from mlx_qlora.errors import DataError
from mlx_qlora.model.load import as_loaded

ROOT = Path(__file__).parent.parent
ROWS = (embedded_data() / "train.jsonl").read_text(encoding="utf-8").splitlines()
LINES = [message["content"] for row in ROWS for message in json.loads(row)["messages"]]
TOKENIZER = as_loaded(train_tokenizer(iter(LINES), 700))


def learned(data: object, size: int = 400, template: str = "", **more: int) -> Learned:
    config = SourceConfig(data=str(data))
    return learn(find(config), config, size, template, **more)


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("e\u0301 \u00e9  \u212b")  # NFD beside NFC: not the same text
@example("\t  tabs,\n\n two  spaces \r\n")
@example(" before and after ")
@example("👩🏽‍🚀 ½ ٣ 2024 12345")
@example("<s> </s> <unk>")
@example("\x00\x7f\u200b\ufeff")
def test_every_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(ids[1:], skip_special_tokens=False) == text


def test_digits_stand_alone_and_the_ends_are_what_they_are_called() -> None:
    assert TOKENIZER.tokenize("2024") == list("2024")
    assert not [token for token in TOKENIZER.get_vocab() if len(token) > 1 and any(letter in "0123456789" for letter in token)]
    assert TOKENIZER.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (1, 2, 2)
    assert len(TOKENIZER.get_vocab()) == 700


def test_the_embedded_model_s_tokenizer_is_made_again_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    import little_world  # type: ignore[import-not-found]

    def texts() -> object:
        for document in islice(little_world.documents(7), 20_000):
            if "messages" in document:
                yield from (message["content"] for message in document["messages"])
            else:
                yield str(document["text"])

    tokenizer = train_tokenizer(texts(), 2048, ROLES, CHAT_TEMPLATE, begins=False)  # type: ignore[arg-type]
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (embedded_model() / "tokenizer.json").read_bytes()
    ours, own = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(embedded_model())
    talk = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Here."}]
    assert ours.apply_chat_template(talk, tokenize=False) == own.apply_chat_template(talk, tokenize=False)
    assert ours.apply_chat_template(talk)["input_ids"] == own.apply_chat_template(talk)["input_ids"]


def test_the_same_texts_give_the_same_tokenizer_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys, json; from mlx_qlora.data.vocabulary import train_tokenizer\n"
        "texts = json.load(open(sys.argv[1]))\n"
        "sys.stdout.write(train_tokenizer(iter(texts), 700).backend_tokenizer.to_str())"
    )
    (tmp_path / "texts.json").write_text(json.dumps(LINES), encoding="utf-8")
    command = [sys.executable, "-c", code, str(tmp_path / "texts.json")]
    said = [
        subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | more).stdout
        for more in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "TOKENIZERS_PARALLELISM": "false"})
    ]
    assert said[0] == said[1] == train_tokenizer(iter(LINES), 700).backend_tokenizer.to_str()


def test_where_the_text_has_fewer_words_there_are_fewer_tokens_and_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "the cat and the cat"}\n', encoding="utf-8")
    made = learned(tmp_path / "train.jsonl")
    # 256 bytes, 3 tokens that stand for something, and: he, the, Ġthe, at, cat, Ġcat, nd, and, Ġand in some order
    size = len(made.tokenizer)
    assert 259 < size < 275
    assert made.describe == [
        f"{size:,} tokens, trained on 19 bytes of train.jsonl", "400 were wanted, but each word of this text is one already",
    ]  # fmt: skip
    assert made.tokenizer.tokenize("the cat") == ["the", "Ġcat"]


def test_conversations_get_tokens_for_their_roles_and_named_templates_theirs(tmp_path: Path) -> None:
    made = learned(embedded_data())
    assert [made.tokenizer.convert_tokens_to_ids(role) for role in ROLES] == [3, 4, 5]
    assert made.tokenizer.chat_template == CHAT_TEMPLATE
    assert len(made.tokenizer) == 400
    assert "trained on 0." in made.describe[0]
    assert marks_of(TEMPLATES["chatml"]) == ["<|im_start|>", "<|im_end|>"]
    assert marks_of(TEMPLATES["plain"]) == []
    chatml = learned(embedded_data(), template="chatml")
    talk = [{"role": "user", "content": "Hi."}]
    ids = chatml.tokenizer.apply_chat_template(talk)["input_ids"]
    assert chatml.tokenizer.convert_ids_to_tokens(ids)[0] == "<|im_start|>"
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}", encoding="utf-8"
    )
    own = learned(embedded_data(), template=str(tmp_path / "own.jinja"))
    assert own.tokenizer.tokenize("[INST]x[/INST]") == ["[INST]", "x", "[/INST]"]
    (tmp_path / "train.jsonl").write_text('{"text": "no talk"}\n', encoding="utf-8")
    assert learned(tmp_path).tokenizer.chat_template is None


def test_of_large_data_all_files_are_looked_at_alike(tmp_path: Path) -> None:
    for name, letter, rows in (("train-1", "a", 1000), ("train-2", "b", 5), ("train-3", "c", 1000)):
        line = json.dumps({"text": letter * 100}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(line * rows, encoding="utf-8")
    from mlx_qlora.data.vocabulary import _Reading

    config = SourceConfig(data=str(tmp_path))
    files = [file for source in find(config) for file in source.files["train"]]
    reading = _Reading(config, 50_500)
    texts = list(reading.texts(files))
    assert [sum(text[0] == letter for text in texts) for letter in "abc"] == [250, 5, 250]  # what b leaves, a and c have
    assert (reading.bytes, reading.whole) == (50_500, False)
    assert (
        learned(tmp_path, most=50_500)
        .describe[0]
        .endswith("trained on the first 0.1 MB of train-1.jsonl, train-2.jsonl, train-3.jsonl")
    )
    whole = _Reading(config, 10**6)
    assert len(list(whole.texts(files))) == 2005
    assert whole.whole


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"txt": "x"}', "train.jsonl:1: 'txt' came"),
        ("{", "train.jsonl:1: not JSON"),
        ('{"text": " "}', "train.jsonl:1: text: an empty text"),
        ("", "there is no text in the training rows"),
    ],
)
def test_without_any_text_there_is_no_tokenizer(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match=f"a tokenizer can't be trained: .*{said}"):
        learned(tmp_path)
