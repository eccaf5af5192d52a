"""What of a teacher's answers is left out: real texts stay, real loops go."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from types import SimpleNamespace

import mlx_qlora

# isort: split
import pytest

import mlx_qlora.config
import mlx_qlora.data.sources
from mlx_qlora.distilling.filters import Answer, FilterConfig, checks, counted, judged
from mlx_qlora.distilling.loops import loops
from mlx_qlora.distilling.prompts import Prompt
from mlx_qlora.errors import ConfigError
from mlx_qlora.look.evaluation.generate import Asking, continuations
from mlx_qlora.model.load import Loaded

JACK = ["the malt that lay in", "the rat that ate", "the cat that killed", "the dog that worried", "the cow that tossed"]
TEXTS = {
    "a cumulative rhyme": "\n".join(
        f"This is {' '.join(JACK[: n + 1][::-1])} the house that Jack built." for n in range(len(JACK))
    ),
    "a song with a refrain": (
        "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,\nLife is but a dream.\n" * 3
    ),
    "a poem": (
        "Minha terra tem palmeiras,\nOnde canta o Sabiá;\nAs aves, que aqui gorjeiam,\nNão gorjeiam como lá.\n\n"
        "Nosso céu tem mais estrelas,\nNossas várzeas têm mais flores,\n"
        "Nossos bosques têm mais vida,\nNossa vida mais amores.\n\n"
        "Em cismar, sozinho, à noite,\nMais prazer encontro eu lá;\nMinha terra tem palmeiras,\nOnde canta o Sabiá.\n\n"
        "Minha terra tem primores,\nQue tais não encontro eu cá;\nEm cismar — sozinho, à noite —\nMais prazer encontro eu lá;\n"
        "Minha terra tem palmeiras,\nOnde canta o Sabiá.\n\nNão permita Deus que eu morra,\nSem que eu volte para lá;\n"
        "Sem que desfrute os primores\nQue não encontro por cá;\nSem qu'inda aviste as palmeiras,\nOnde canta o Sabiá."
    ),
    "a counting song": "\n".join(
        f"{n} green bottles hanging on the wall,\nAnd if one green bottle should accidentally fall,\nThere'll be {n - 1} left."
        for n in range(10, 0, -1)
    ),
    "a list": "\n".join(f"{n}. Wash the {what} and dry it." for n, what in enumerate(["cup", "plate", "pan", "fork"], 1)),
    "a table": "| day | open | close |\n|---|---|---|\n"
    + "\n".join(f"| {n} June | {n % 3 + 8}:00 | {n % 4 + 17}:30 |" for n in range(1, 31)),
    "a wide table's rule": "|" + "---|" * 20,
    "JSON": json.dumps(
        [{"id": n, "name": f"item {n}", "tags": ["a", "b"], "at": {"x": n * 3, "y": n * 7}} for n in range(40)], indent=1
    ),
    "a matrix": "\n".join(" ".join("1" if i == j else "0" for j in range(8)) for i in range(8)),
    "sums": "\n".join(f"{n} x 7 = {n * 7}" for n in range(1, 41)),
    "laughter": "Ha ha ha ha ha! That is a good one. No, no, no, no. Stop!",
    "Chinese": "我喜欢吃苹果。他喜欢吃香蕉。我们都喜欢吃水果。因为水果很健康，所以我们每天都吃水果。你呢？你喜欢吃什么水果？",
    "a long address": "See https://example.org/" + "/".join(f"section-{n}" for n in range(12)),
}  # fmt: skip
LOOPS = {
    "a sentence": "The capital is Paris. " + "I hope this helps! Let me know if you have any questions. " * 12,
    "a word": "The answer is " + "the " * 120,
    "items that count on": "Reasons:\n" + "\n".join(f"{n}. It is good for the health of your family." for n in range(1, 20)),
    "a paragraph": "So we add the two numbers and get 12. Then we subtract 4 and get 8. Then we add 4 again and get 12. " * 5,
    "a word without an end": "O resultado é " + "muito" * 80,
    "digits": "1/3 = 0." + "3" * 400,
    "Chinese": "这个问题的答案是四。" * 20,
    "between two thoughts": " ".join(
        f"Wait, let me check step {n % 3} again. The sum of the two sides is larger than the third, so the triangle exists. "
        f"But the sum of the angles has to be 180 degrees, {['so', 'and', 'hence'][n % 3]} we look at the sides again."
        for n in range(14)
    ),
    "empty lines of code": "def f():\n" + "    x = x + 1\n" * 40,
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_what_people_write_is_no_loop(name: str) -> None:
    assert loops(TEXTS[name]) == ""


@pytest.mark.parametrize("name", LOOPS)
def test_what_goes_in_circles_is_one(name: str) -> None:
    assert loops(LOOPS[name])


def test_code_is_no_loop() -> None:
    texts = [inspect.getsource(module) for module in (textwrap, json, mlx_qlora.config, mlx_qlora.data.sources)]
    texts.append(Path(mlx_qlora.__file__).with_name("py.typed").parent.parent.joinpath("README.md").read_text(encoding="utf-8"))
    pieces = [text[start : start + 4000] for text in texts for start in range(0, len(text), 4000)]
    assert len(pieces) > 20
    assert [loops(piece) for piece in pieces if loops(piece)] == []


def test_a_model_that_may_not_end_is_seen_to_go_in_circles(embedded: Loaded) -> None:
    """The likeliest words of a model without an end are a real loop; drawn ones are none."""
    endless = SimpleNamespace(eos_token_ids=[])
    prompt = embedded.tokenizer.encode("O gato")

    def said(temperature: float) -> str:
        ((_, tokens),) = continuations(embedded.model, endless, [prompt], None, Asking(220, temperature), rows=1)
        return str(embedded.tokenizer.decode(tokens))

    assert loops(said(0.0))
    assert not loops(said(1.0))


def prompt(id: str = "a:1", expected: str = "", **row: object) -> Prompt:
    return Prompt(id, "?", (1, 2), expected, row, "?")


def verdict(answer: Answer, config: FilterConfig = FilterConfig(), asked: Prompt = prompt()) -> tuple[str, str]:  # noqa: B008
    (one,) = judged([asked], [[answer]], checks(config, [asked]), config)
    return one.reason, one.detail


def test_an_answer_is_left_out_for_the_first_reason_that_holds() -> None:
    plain = Answer("The sum is 42.", 6, True)
    loop = LOOPS["a sentence"]
    assert verdict(plain) == ("", "")
    assert verdict(Answer("", 0, True))[0] == "empty"
    assert verdict(Answer(loop, 90, False))[0] == "looping"
    assert verdict(Answer("The sum", 2, False)) == ("truncated", "no end after 2 tokens")
    assert verdict(Answer("The sum [INST] 3", 9, True, "[INST]")) == ("control", "[INST]")
    assert verdict(plain, FilterConfig(min_answer_tokens=7)) == ("short", "6 tokens")
    assert verdict(plain, FilterConfig(min_answer_tokens=6)) == ("", "")
    assert verdict(plain, FilterConfig(check_pattern=r"\b42\b")) == ("", "")
    assert verdict(plain, FilterConfig(check_pattern=r"#### \d")) == ("pattern", r"#### \d is not in it")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("It is 1,250 reais", ""), ("1250.00", ""), ("1250 or 12", "number"), ("I don't know", "number"), ("#### 1250", "")],
)
def test_the_last_number_is_compared_with_that_of_the_row(text: str, reason: str) -> None:
    asked = prompt(expected="First 3, then 4.\n#### 1250")
    assert verdict(Answer(text, 5, True), FilterConfig(check_number=True), asked)[0] == reason


def test_rows_without_a_number_are_named_before_anybody_is_asked() -> None:
    rows = [prompt("a:1", "12"), prompt("a:2", "twelve"), prompt("a:3")]
    with pytest.raises(ConfigError, match=r"2 of 3 rows have no number") as error:
        checks(FilterConfig(check_number=True), rows)
    assert "a:2: no number is in its answer 'twelve'" in str(error.value)
    assert "a:3: it has no answer" in str(error.value)


def test_a_function_of_ones_own_judges_by_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_checks.py").write_text(
        "import numpy as np\n"
        "def has(row, answer): return np.bool_(row['word'] in answer)\n"
        "def count(row, answer): return answer.count(row['word'])\n"
        "def breaks(row, answer): return answer[3] == 'x'\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    asked = prompt(word="sun")
    assert verdict(Answer("the sun", 2, True), FilterConfig(check="own_checks:has"), asked) == ("", "")
    assert verdict(Answer("the moon", 2, True), FilterConfig(check="own_checks:has"), asked)[0] == "check"
    for name, said in {
        "count": "0 came for the row a:1",
        "breaks": "it raised IndexError",
        "none": "own_checks has no none",
    }.items():
        with pytest.raises(ConfigError, match=f"--check own_checks:{name}: .*{said}"):
            checks(FilterConfig(check=f"own_checks:{name}"), [asked])


def test_the_same_answer_counts_once_and_the_first_right_one_is_enough() -> None:
    said = [Answer(text, 3, True) for text in ("no", "It is 4.", "It  is 4.\n", "Four: 4", "It is 4.")]
    asked, number = prompt(expected="4"), FilterConfig(check_number=True)
    every = judged([asked], [said], checks(number, [asked]), number)
    assert [one.reason for one in every] == ["number", "", "duplicate", "", "duplicate"]
    assert every[4].detail == "of answer 2"
    first = FilterConfig(check_number=True, keep="first")
    found = judged([asked, asked], [said, said[:1]], checks(first, [asked]), first)
    assert [one.reason for one in found] == ["number", "", "duplicate", "surplus", "duplicate", "number"]
    assert counted(found) == {"number": 2, "duplicate": 2, "surplus": 1}


def test_a_pattern_that_is_none_is_said() -> None:
    with pytest.raises(ConfigError, match=r"check_pattern: '\(' came, a regular expression is expected"):
        checks(FilterConfig(check_pattern="("), [prompt()])
