from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.data.layout import lay_out, updates
from mlx_qlora.data.order import epoch_order, updates_per_epoch
from mlx_qlora.data.render import examples, question, render
from mlx_qlora.data.sources import DataConfig, Row, read_jsonl, read_splits
from mlx_qlora.errors import DataError
from mlx_qlora.model.load import load
from tests.conftest import make_examples


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load("embedded").tokenizer


def trained_text(row: dict[str, Any], tokenizer: Any) -> list[str]:
    """The supervised tokens of a row as texts, a text per run of neighbours."""
    _, example = render(Row("x:1", row), tokenizer)
    spans: list[list[int]] = []
    for place, (token, weight) in enumerate(zip(example.tokens, example.weights, strict=True)):
        if weight:
            if not example.weights[place - 1]:
                spans.append([])
            spans[-1].append(int(token))
    return [tokenizer.decode(span) for span in spans]


# From rows to examples


def test_all_turns_of_the_assistant_are_trained_with_their_end_and_nothing_else(tokenizer: Any) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Use uma frase só."},
            {"role": "user", "content": "Que som faz o gato?"},
            {"role": "assistant", "content": "O gato mia."},
            {"role": "user", "content": "Quanto é 2 + 2?"},
            {"role": "assistant", "content": "2 + 2 = 4."},
        ]
    }
    assert trained_text(row, tokenizer) == ["O gato mia.</s>", "2 + 2 = 4.</s>"]
    _, example = render(Row("x:1", row), tokenizer)
    whole = tokenizer.decode(example.tokens.tolist())
    assert whole == tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert whole.count("<s>") == 1


def test_prompt_and_completion_become_a_chat_where_there_is_a_template(tokenizer: Any) -> None:
    assert trained_text({"prompt": "Que som faz o gato?", "completion": "O gato mia."}, tokenizer) == ["O gato mia.</s>"]


def test_prompt_and_completion_without_a_template() -> None:
    class Plain:
        bos_token_id, eos_token_id, chat_template = 1, 2, None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            assert not add_special_tokens
            return [ord(letter) for letter in text]

    name, example = render(Row("x:1", {"prompt": "ab", "completion": "c"}), Plain())
    assert name == "prompt"
    assert example.tokens.tolist() == [1, 97, 98, 99, 2]
    assert example.weights.tolist() == [0, 0, 0, 1, 1]


def test_text_is_trained_whole_but_for_its_first_token(tokenizer: Any) -> None:
    _, example = render(Row("x:1", {"text": "O gato mia."}), tokenizer)
    assert tokenizer.decode(example.tokens.tolist()) == "<s>O gato mia.</s>"
    assert example.weights.tolist() == [0.0] + [1.0] * (len(example.tokens) - 1)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    class Rewriting:
        bos_token_id, eos_token_id = 1, 2
        chat_template = "..."

        def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
            return f"{len(messages)}:" + "".join(message["content"] for message in messages)

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(letter) for letter in text]

    row = Row("train.jsonl:3", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(DataError, match=r"train.jsonl:3: messages\[1\]: the chat template writes"):
        examples([row], Rewriting(), 100)


def test_what_is_cut_is_counted_and_what_has_no_target_is_left_out(tokenizer: Any) -> None:
    short = {"prompt": "Que som faz o gato?", "completion": "O gato mia."}
    long = {"prompt": "gato " * 50, "completion": "O gato mia."}
    cut = {"prompt": "Que som faz o gato?", "completion": "O gato mia. " * 20}
    rows = [Row(f"t:{n}", value) for n, value in enumerate((short, long, cut))]
    made, account = examples(rows, tokenizer, 40)
    assert [example.id for example in made] == ["t:0", "t:2"]
    assert len(made[1].tokens) == 40
    assert (account.rows, account.cut_rows, account.without_target) == (3, 2, 1)
    whole = [render(row, tokenizer)[1] for row in rows]
    lost = sum(np.count_nonzero(e.weights) for e in whole) - account.supervised_tokens
    assert account.cut_supervised_tokens == lost > 0
    with pytest.raises(DataError, match="none of the 1 rows has anything to train within max_seq_length 40"):
        examples(rows[1:2], tokenizer, 40)


def test_the_question_is_what_leads_to_the_last_answer(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Que som faz o gato?"}, {"role": "assistant", "content": "O gato mia."}]
    asked = question(Row("x:1", {"messages": messages}), tokenizer)
    assert asked is not None
    assert (asked.text, asked.expected) == ("Que som faz o gato?", "O gato mia.")
    assert tokenizer.decode(list(asked.prompt)) == "<s><|user|>Que som faz o gato?</s><|assistant|>"
    assert question(Row("x:1", {"text": "O gato mia."}), tokenizer) is None
    assert question(Row("x:1", {"messages": [*messages, {"role": "user", "content": "?"}]}), tokenizer) is None


MISTRAL = Path(__file__).parents[2] / "shared" / "real" / "tokenizer-mistral-7b-instruct-v0.3"


@pytest.mark.skipif(not MISTRAL.exists(), reason="the tokenizer of Mistral-7B-Instruct is not here")
def test_the_template_of_a_real_mistral() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MISTRAL)
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "See you.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert trained_text(row, tokenizer) == ["Hello.</s>", "See you.</s>"]


# Reading


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_rows_know_their_line_and_blank_lines_count(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ['\ufeff{"text": "a"}', "", '{"text": "b"}', ""])
    assert [row.id for row in read_jsonl(path)] == ["train.jsonl:1", "train.jsonl:3"]


def test_all_broken_lines_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": \n[1]\n"word"\n3\nnull\n{"text": "\xff"}\n')
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "5", "6", "7"]
    assert "not JSON" in lines[0]
    assert "a list came" in lines[1]
    assert "not UTF-8" in lines[5]


def test_more_than_twenty_problems_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ["{"] * 25)
    with pytest.raises(DataError, match=r"\.\.\. and 5 more"):
        read_jsonl(path)


def test_without_a_validation_file_a_seeded_share_is_split_off(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [json.dumps({"text": str(n)}) for n in range(50)])
    one, again, other = (read_splits(DataConfig(data=str(tmp_path), validation_share=0.2), seed) for seed in (1, 1, 2))
    assert len(one.valid) == 10
    assert sorted(row.id for row in one.train + one.valid) == sorted(f"train.jsonl:{n}" for n in range(1, 51))
    assert one == again
    assert one.valid != other.valid
    assert "10 rows split off" in one.valid_from
    file_only = read_splits(DataConfig(data=str(tmp_path / "train.jsonl"), validation_share=0.2), 1)
    assert file_only.valid == one.valid


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_KEYS = st.sampled_from(["messages", "prompt", "completion", "text", "role", "content", "other"])
_MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content"]), st.sampled_from(["user", "assistant", "x", ""]) | _JSON, max_size=2
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_KEYS, st.lists(_MESSAGE, max_size=3) | _JSON, max_size=3))
def test_no_row_makes_anything_but_an_example_or_the_users_error(value: dict[str, Any]) -> None:
    loaded = _TOKENIZER[0] if _TOKENIZER else _TOKENIZER.append(load("embedded").tokenizer) or _TOKENIZER[0]
    try:
        made, _ = examples([Row("train.jsonl:1", value)], loaded, 64)
    except DataError as error:
        assert "train.jsonl" in str(error)  # noqa: PT017  (both ways are right)
    else:
        assert made[0].weights.any()
        assert made[0].weights[0] == 0
        assert len(made[0].tokens) == len(made[0].weights) <= 64


_TOKENIZER: list[Any] = []


# Order and layout


def test_each_example_exactly_once_an_epoch_with_the_remainder() -> None:
    made = make_examples(23)
    planned = list(updates(made, DataConfig(batch_size=2, gradient_accumulation=3), epochs=3, seed=5))
    assert len(planned) == 3 * updates_per_epoch(23, 6) == 12
    assert [len(update.ids) for update in planned] == [6, 6, 6, 5] * 3
    for epoch in range(3):
        part = planned[4 * epoch : 4 * epoch + 4]
        assert Counter(id for update in part for id in update.ids) == Counter(example.id for example in made)
        assert part[-1].epoch == epoch + 1
    assert [u.ids for u in planned[:4]] != [u.ids for u in planned[4:8]], "another order in the next epoch"


def test_the_order_is_the_same_everywhere() -> None:
    assert epoch_order(8, seed=0, epoch=0) == [2, 4, 3, 6, 5, 0, 1, 7]
    assert epoch_order(8, seed=0, epoch=1) == [1, 3, 7, 6, 0, 4, 2, 5]


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 12), rows=st.integers(1, 5), seed=st.integers(0, 100))
def test_batches_hold_each_target_once_with_its_weight_and_its_context(count: int, rows: int, seed: int) -> None:
    made = make_examples(count, seed)
    expected = Counter()
    for example in made:
        for place in np.flatnonzero(example.weights):
            expected[(*example.tokens[:place].tolist(), "->", int(example.tokens[place]), float(example.weights[place]))] += 1
    found = Counter()
    for batch in lay_out(made, rows):
        length = batch.rows.shape[1]
        assert batch.rows.shape[0] <= rows
        assert length % 8 == 0
        assert batch.positions.shape == batch.targets.shape == batch.weights.shape
        for position, target, weight in zip(*(np.array(a) for a in batch[1:]), strict=True):
            if weight:
                row, place = divmod(int(position), length)
                found[(*np.array(batch.rows)[row, : place + 1].tolist(), "->", int(target), float(weight))] += 1
    assert found == expected
