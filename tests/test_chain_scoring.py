"""Chains of thought: what is asked after which rationale, against generating it by hand; and what was carried over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from mlx_qlora.commands import main
from mlx_qlora.data.chain import ChainConfig
from mlx_qlora.data.part import open_part
from mlx_qlora.data.render import Question, RenderConfig
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.look.evaluation import asking, chains
from mlx_qlora.look.evaluation.answering import NAME
from mlx_qlora.look.evaluation.chains import Thought, chained, up_to_cue
from mlx_qlora.look.evaluation.generate import generate_answers
from mlx_qlora.model.load import Loaded

ROWS = [{"question": f"{n} e {n}?", "rationale": f"{n} + {n} = {2 * n}", "answer": str(2 * n)} for n in range(1, 5)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chains.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def questions(data: Path, embedded: Loaded, kind: str = "cascod") -> list[Question]:
    source = SourceConfig(data=str(data), data_cache="off")
    render = RenderConfig(chain=ChainConfig(kind=kind))  # type: ignore[arg-type]
    return open_part(find(source), source, render, embedded.tokenizer, 0, whole=True).questions(None)


def greedy(embedded: Loaded, prompt: list[int], most: int) -> list[int]:
    """By mlx-lm, one token after the other."""
    import mlx.core as mx

    tokens = []
    for token, _ in generate_step(mx.array(prompt), embedded.model, max_tokens=most):
        if token in embedded.tokenizer.eos_token_ids:
            break
        tokens.append(int(token))
    return tokens


def by_hand(embedded: Loaded, question: Question, longest: int, most: int) -> tuple[str, str, str]:
    """(own rationale, the answer after it, the answer after the data's)."""
    decode, cue = embedded.tokenizer.decode, [*question.cue_tokens]
    own = greedy(embedded, [*question.prompt], longest)
    after_own = greedy(embedded, [*question.prompt, *own, *cue], most)
    after_given = greedy(embedded, [*question.prompt, *question.rationale_tokens, *cue], most)
    return decode(own).strip(), decode(after_own).strip(), decode(after_given).strip()


def given(data: Path, out: Path) -> list[str]:
    named = ["--model", "embedded", "--data", data, "--output-dir", out, "--data-cache", "off", "--chain.kind", "cascod"]
    return ["evaluate", *map(str, named), "--max-answer-tokens", "3", "--max-rationale-tokens", "9"]


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_two_turns_are_what_they_are_by_hand(data: Path, embedded: Loaded, tmp_path: Path) -> None:
    """Rationales that end and some that are cut; the report's figures are those of the lines."""
    assert main(given(data, tmp_path / "out")) == 0
    lines = lines_of(tmp_path / "out")
    asked = questions(data, embedded)
    for line, question, row in zip(lines, asked, ROWS, strict=True):
        expected = by_hand(embedded, question, 9, 3)
        assert (line["own_rationale"], line["answer"], line["answer_after_given"]) == expected
        assert (line["rationale"], line["expected"]) == (row["rationale"], row["answer"])
    report = json.loads((tmp_path / "out" / "evaluation_report.json").read_text())
    found = report["chains"]["tuned"]
    own = np.array([line["scores"]["final_number"] for line in lines])
    after_given = np.array([line["scores_after_given"]["final_number"] for line in lines])
    assert found["after_own_rationale"]["value"] == own.mean()
    assert found["after_given_rationale"]["value"] == after_given.mean()
    assert found["carried_over"]["value"] == pytest.approx((after_given - own).mean())
    assert found["rationales_never_ended"] == sum(not line["own_rationale_ended"] for line in lines)


def test_in_training_the_answer_comes_after_a_rationale_of_its_own(data: Path, embedded: Loaded) -> None:
    """`score_questions` asks by this function; a plain question among chains stays one."""
    asked = questions(data, embedded)[:2]
    plain = Question("plain", "", tuple(embedded.tokenizer.encode("Quem joga?")), "")
    longest = 2 * max(len(each.rationale_tokens) for each in asked) + 1
    found = generate_answers(embedded.model, embedded.tokenizer, [asked[0], plain, asked[1]], 3)
    expected = [by_hand(embedded, each, longest, 3)[1] for each in asked]
    alone = embedded.tokenizer.decode(greedy(embedded, [*plain.prompt], 3)).strip()
    assert found == [expected[0], alone, expected[1]]


def test_step_by_step_is_asked_for_the_answer_alone(data: Path, embedded: Loaded) -> None:
    asked = questions(data, embedded, "step_by_step")
    assert not any(map(chains.is_chain, asked))
    assert "[answer]" in embedded.tokenizer.decode([*asked[0].prompt])
    assert [each.expected for each in asked] == [row["answer"] for row in ROWS]


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_an_evaluation_goes_on_in_each_of_its_turns(
    broken: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in its first, second and third turn after two answers; the next one writes the same."""
    real, turns = asking.write, []

    def write(model: Any, tokenizer: Any, prompts: Any, how: Any, tell: Any, told: Any, ids: Any) -> None:
        turns.append(len(prompts))
        if len(turns) == broken:
            real(model, tokenizer, prompts[:2], how, tell, told, ids[:2])
            raise KeyboardInterrupt
        real(model, tokenizer, prompts, how, tell, told, ids)

    out = tmp_path / "out"
    monkeypatch.setattr(asking, "write", write)
    assert main(given(data, out)) == 130
    assert {path.name for path in out.iterdir()} == {NAME}
    assert main(given(data, out)) == 0
    assert turns[broken] == 2  # of four
    assert f"{4 * broken - 2} answers of an evaluation that was broken off" in capsys.readouterr().out
    monkeypatch.setattr(asking, "write", real)
    assert main(given(data, tmp_path / "whole")) == 0
    assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()


def test_what_was_carried_over_by_hand() -> None:
    """Right after the data's rationale in 3 of 4, after its own in 1: 50 points. Both right or both wrong is no doubt."""
    own = np.array([1.0, 0, 0, 0])
    given = [1.0, 1, 1, 0]
    thoughts = [
        Thought(text, ended, "", {"final_number": worth}, chains.rationale_scores(text, "1 + 1 = 2"))
        for text, ended, worth in zip(("1 + 1 = 2", "", "1 + 2", "2"), (True, True, False, True), given, strict=True)
    ]
    found = chained(own, thoughts, "final_number")
    assert (found.own.value, found.given.value, found.carried.value) == (0.25, 0.75, 0.5)
    assert 0 <= found.carried.low < 0.5 < found.carried.high <= 1
    assert (found.unended, found.empty, found.exact_match.value) == (1, 1, 0.25)


def test_a_rationale_ends_where_the_model_writes_the_cue_itself(embedded: Loaded) -> None:
    """Models that were trained on whole answers do. The tokens before it stay as they were written."""
    encode, decode = embedded.tokenizer.encode, embedded.tokenizer.decode
    asked = Question("a", "", (1,), "4", "2 e 2", (1, 2), tuple(encode("\n#### ", add_special_tokens=False)))
    written = encode("2 e 2 dá 4\n#### 4", add_special_tokens=False)
    kept = up_to_cue(asked, written, embedded.tokenizer)
    assert kept == written[: len(kept)]
    assert decode(kept).strip() == "2 e 2 dá 4"
    assert up_to_cue(asked, written[:3], embedded.tokenizer) == written[:3]
    ((text, ended, tokens),) = chains.thoughts([asked], {0: written}, len(written), embedded.tokenizer).values()
    assert (text, ended, tokens) == ("2 e 2 dá 4", True, kept)
