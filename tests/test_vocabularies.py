"""Which tokenizers are the same, how many ids they have in common, and what is said of those that are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_qlora.assets import embedded_model
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.load import load_tokenizer
from mlx_qlora.model.vocabularies import common_vocabulary, compared

TOKENS = 1933  # of the embedded tokenizer; its model has 2,048 rows
ROWS = 2048


@pytest.fixture(scope="module")
def own() -> Any:
    return load_tokenizer("embedded")


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Any]:
    """The embedded tokenizer, its description changed by a function, loaded again."""

    def made(change: Callable[[dict[str, Any]], object]) -> Any:
        for path in embedded_model().glob("*token*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        described = json.loads((embedded_model() / "tokenizer.json").read_text(encoding="utf-8"))
        change(described)
        (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
        return load_tokenizer(str(tmp_path))

    return made


def added(*texts: str, special: bool = True) -> Callable[[dict[str, Any]], object]:
    """Tokens at the end."""

    def change(described: dict[str, Any]) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        described["added_tokens"] += [
            {"id": TOKENS + number, "content": text, "special": special} | flags for number, text in enumerate(texts)
        ]

    return change


def swapped(a: str, b: str) -> Callable[[dict[str, Any]], object]:
    def change(described: dict[str, Any]) -> None:
        vocab = described["model"]["vocab"]
        vocab[a], vocab[b] = vocab[b], vocab[a]

    return change


def test_padding_of_the_heads_is_not_in_common(own: Any) -> None:
    assert common_vocabulary(own, own, ROWS, 2112) == TOKENS
    assert common_vocabulary(own, own, 1900, ROWS) == 1900, "a head with fewer rows than tokens"


def test_heads_of_two_sizes_as_in_one_family(variant: Callable[..., Any], own: Any) -> None:
    """As Qwen2.5: the same 151,665 tokens with 151,936 rows in the small ones and 152,064 in the large ones."""
    assert common_vocabulary(own, variant(lambda described: None), TOKENS + 271, TOKENS + 399) == TOKENS


@pytest.mark.parametrize("special", [True, False])
def test_tokens_at_the_end_of_one_are_left_out(variant: Callable[..., Any], own: Any, special: bool) -> None:
    longer = variant(added("<|im_start|>", "<|im_end|>", special=special))
    assert common_vocabulary(own, longer, ROWS, ROWS) == TOKENS
    assert common_vocabulary(longer, own, ROWS, ROWS) == TOKENS
    assert common_vocabulary(longer, longer, ROWS, ROWS) == TOKENS + 2


def test_other_tokens_at_the_end_are_another_vocabulary(variant: Callable[..., Any], own: Any) -> None:
    one = variant(added("<|im_start|>", "<|im_end|>"))
    found = compared(one, variant(added("<|im_start|>", "<|eot_id|>", "<|x|>")))
    assert found.difference == (
        "token 1,934 is '<|im_end|>' in the student and '<|eot_id|>' in the teacher; 1 of 1,935 ids differ"
    )


def test_two_ids_that_changed_places(variant: Callable[..., Any], own: Any) -> None:
    with pytest.raises(ConfigError, match=r"token 38 is 'A' in the student and 'B' in the teacher; 2 of 1,933 ids") as caught:
        common_vocabulary(own, variant(swapped("A", "B")), ROWS, ROWS)
    assert str(caught.value).startswith("distill.teacher: ")
    assert "distill.loss: uld" in str(caught.value)


def test_other_merges_of_the_same_tokens_show_in_a_text(variant: Callable[..., Any], own: Any) -> None:
    def change(described: dict[str, Any]) -> None:
        described["model"]["merges"].reverse()

    with pytest.raises(ConfigError, match=r"the text '.+' becomes \d+ tokens in the student and \d+ in the teacher"):
        common_vocabulary(own, variant(change), ROWS, ROWS)


def test_merges_that_no_text_here_shows_are_refused_too(variant: Callable[..., Any], own: Any) -> None:
    def change(described: dict[str, Any]) -> None:
        """The same token out of other letters, as the last rule of all: ` Preciso` is made otherwise long before."""
        described["model"]["merges"].append(["Ġ", "Preciso"])

    difference = compared(own, variant(change)).difference
    assert difference == "the student joins letters by 1,671 merges and the teacher by 1,672"


def test_digits_that_stay_together(variant: Callable[..., Any], own: Any) -> None:
    def change(described: dict[str, Any]) -> None:
        described["pre_tokenizer"] = described["pre_tokenizer"]["pretokenizers"][1]
        described["normalizer"] = {"type": "Lowercase"}

    assert "the text 'The quick brown fox" in compared(own, variant(change)).difference


def test_rules_written_in_another_way_are_the_same_rules(variant: Callable[..., Any], own: Any) -> None:
    def change(described: dict[str, Any]) -> None:
        digits, letters = described["pre_tokenizer"]["pretokenizers"]
        inner = {"type": "Sequence", "pretokenizers": [digits]}
        described["pre_tokenizer"]["pretokenizers"] = [inner, letters]
        described["normalizer"] = {"type": "Sequence", "normalizers": []}

    assert common_vocabulary(own, variant(change), ROWS, ROWS) == TOKENS


def test_a_tokenizer_written_in_python_is_told_by_texts(variant: Callable[..., Any], own: Any) -> None:
    class Slow:
        def __init__(self, inner: Any):
            self.get_vocab, self.encode = inner.get_vocab, inner.encode

    assert compared(Slow(own), own).difference == ""

    def change(described: dict[str, Any]) -> None:
        described["model"]["merges"] = described["model"]["merges"][:40]

    assert "the text 'The quick brown fox" in compared(Slow(own), Slow(variant(change))).difference
