"""Chains of thought: two weighted tasks of a row, in one pass or in two examples."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_qlora.data.audit import audit, sight
from mlx_qlora.data.chain import ChainConfig, Parts, in_one_pass
from mlx_qlora.data.corpus import Corpus, gather
from mlx_qlora.data.formats import RowError
from mlx_qlora.data.layout import Kind, Layout, lay_out, packed
from mlx_qlora.data.prepare import iterate
from mlx_qlora.data.render import Account, Refusals, RenderConfig, Renderer, question
from mlx_qlora.data.sources import Row, SourceConfig
from mlx_qlora.data.stream import stream
from mlx_qlora.data.templates import TEMPLATES
from mlx_qlora.data.tokens import Encoded
from mlx_qlora.data.windows import WindowConfig
from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.look.measure import measure
from mlx_qlora.model import frozen, lora
from mlx_qlora.model.load import load_tokenizer
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import START, Example
from mlx_qlora.train import main
from tests.conftest import largest_difference, randomize_adapters, tiny_model
from tests.test_layouts import through

CASCOD = ChainConfig(kind="cascod", alpha=0.3)
ROW = {"question": "What is 3*4+5?", "rationale": "3*4 = 12\n12+5 = 17", "answer": "17"}


def renderer(tokenizer: Any = None, chain: ChainConfig = CASCOD, **changes: Any) -> Renderer:
    return Renderer(tokenizer or load_tokenizer("embedded"), RenderConfig(chain=chain, **changes), SourceConfig())


def made_of(value: dict[str, Any], chain: ChainConfig = CASCOD, **changes: Any) -> list[Example]:
    return renderer(chain=chain, **changes).render(Row("x.jsonl:1", value))


def same(a: Example, b: Example) -> bool:
    return all(
        np.array_equal(one, other) for one, other in ((a.tokens, b.tokens), (a.weights, b.weights), (a.wanted, b.wanted))
    )


# Both tasks in one pass


def a_chain(rng: np.random.Generator, number: int, prompt: list[int]) -> Parts:
    def tokens(most: int) -> list[int]:
        return rng.integers(3, 96, int(rng.integers(1, most))).tolist()

    return Parts([*prompt, *tokens(6)], tokens(14), [7, 8, 9][: 1 + number % 3], tokens(5), stop=2)


def chains() -> list[Parts]:
    """Unequal ones behind a common beginning; two have all but the answer in common, and two all but the cue."""
    rng = np.random.default_rng(3)
    beginning = rng.integers(3, 96, 12).tolist()
    made = [a_chain(rng, number, beginning) for number in range(5)]
    return [*made, made[0]._replace(answer=[11, 12, 13]), made[1]._replace(cue=[2, 5])]


def as_example(parts: Parts, alpha: float, id: str = "") -> Example:
    tokens, spans, targets = in_one_pass(parts, (1 - alpha, alpha))
    return Encoded(np.array(tokens, np.int32), spans, targets=targets).example(id)


def two_passes(model: nn.Module, chains: list[Parts], alpha: float) -> tuple[mx.array, Any]:
    """As it is written down: two sequences of each row, each with its mean over what it is to say, weighted, summed."""

    def said(model: nn.Module, before: list[int], own: list[int]) -> mx.array:
        tokens = mx.array([*before, *own])
        losses = nn.losses.cross_entropy(model(tokens[None, :-1])[0].astype(mx.float32), tokens[1:])
        return losses[len(before) - 1 :].mean()

    def loss(model: nn.Module) -> mx.array:
        total = mx.array(0.0)
        for each in chains:
            rationale = said(model, each.prompt, [*each.rationale, each.stop])
            answer = said(model, [*each.prompt, *each.rationale, *each.cue], [*each.answer, each.stop])
            total = total + (1 - alpha) * rationale + alpha * answer
        return total / len(chains)

    return nn.value_and_grad(model, loss)(model)  # type: ignore[no-any-return]


LAYOUTS = {
    "plain": Layout(Kind.PLAIN, rows=3),
    "packed": Layout(Kind.PACKED),
    "packed-small": Layout(Kind.PACKED, token_budget=40),
    "padded": Layout(Kind.PADDED, token_budget=200),
}


def adapted(model: nn.Module) -> nn.Module:
    frozen.install(model)
    lora.attach(model, LoraConfig(rank=4, scale=2.0))
    randomize_adapters(model)
    model.train()
    return model


@pytest.mark.parametrize("alpha", [0.3, 0.0, 1.0])
@pytest.mark.parametrize("shape", ["qwen2", "gemma3", "mistral-tied"])
def test_one_pass_is_two_passes(shape: str, alpha: float) -> None:
    """Loss and every gradient, in every layout; where the batches are several, that is accumulation of unequal chains."""
    model = adapted(tiny_model(shape))
    expected, expected_grads = two_passes(model, chains(), alpha)
    examples = [as_example(each, alpha, str(number)) for number, each in enumerate(chains())]
    for name, layout in LAYOUTS.items():
        loss, grads = through(model, lay_out(examples, layout))
        assert loss.weight.item() == pytest.approx(len(examples), rel=1e-6), name
        assert (loss.total / loss.weight).item() == pytest.approx(expected.item(), rel=1e-5), name
        assert largest_difference(grads, expected_grads) < 3e-5, name


def test_one_pass_is_two_passes_from_text_with_the_embedded_model(embedded: Any) -> None:
    """The two sequences are rendered as plain answers to the same question, by the ordinary way."""
    rows = [ROW, {**ROW, "question": "And 2+2?", "rationale": "2+2 = 4", "answer": "4, I think"}]
    plain = Renderer(embedded.tokenizer, RenderConfig(), SourceConfig())
    made = renderer(embedded.tokenizer)
    parts = []
    for row in rows:
        (first,) = plain.render(Row("x:1", {"question": row["question"], "answer": row["rationale"]}))
        asked = question(Row("x:1", row), made, SourceConfig())
        assert asked is not None
        rationale, answer = first.tokens[first.weights > 0].tolist(), plain._encoder.encode(row["answer"])
        parts.append(Parts(first.tokens[first.weights == 0].tolist(), rationale[:-1], list(asked.cue_tokens), answer, 2))
    model = adapted(embedded.model)
    expected, expected_grads = two_passes(model, parts, CASCOD.alpha)
    examples = [each for row in rows for each in made.render(Row("x:1", row))]
    for name, layout in LAYOUTS.items():
        loss, grads = through(model, lay_out(examples, layout))
        assert (loss.total / loss.weight).item() == pytest.approx(expected.item(), rel=1e-5), name
        assert largest_difference(grads, expected_grads) < 3e-5, name


def test_the_same_place_with_two_targets_is_two_places() -> None:
    """One row stops after its rationale where another, of the same tokens, goes on; and a third says the same as the first."""
    tokens = np.array([5, 6, 7, 8, 9], np.int32)
    weights = np.array([0, 0, 0.5, 0.5, 0], np.float32)
    stopping = Example("a", tokens, weights, np.array([5, 6, 7, 2, 9], np.int32))
    going_on = Example("b", tokens, weights)
    batch = packed([stopping, going_on, replace(stopping, id="c")])
    places = {
        (position, target): weight
        for position, target, weight in zip(
            *(each.tolist() for each in (batch.positions, batch.targets, batch.weights)), strict=True
        )
        if weight
    }
    assert places == {(1, 7): 1.5, (2, 2): 1.0, (2, 8): 0.5}


def test_losses_of_examples_are_those_of_their_own_targets() -> None:
    """A validation adds up to its examples, each place being found again by what is predicted there."""
    model, objective = adapted(tiny_model("qwen2")), sft()
    examples = [as_example(each, 0.3, str(number)) for number, each in enumerate(chains())]
    found = measure(model, objective, lay_out(examples, Layout(Kind.PACKED)), examples)
    alone = [measure(model, objective, lay_out([each], Layout()), [each]).mean for each in examples]
    assert found.totals == pytest.approx(np.array(alone), rel=1e-5)
    assert found.weights == pytest.approx(np.ones(len(examples)), rel=1e-6)
    assert found.mean == pytest.approx(np.mean(alone), rel=1e-5)


def test_the_two_tasks_of_a_row_are_drawn_together() -> None:
    """Their errors do not cancel as those of two rows would: a row's loss is their sum."""
    model, objective = adapted(tiny_model("qwen2")), sft()
    whole = [as_example(each, 0.3, f"x:{number}") for number, each in enumerate(chains())]
    tasks = [
        replace(each, id=f"{each.id}#{name}", weights=np.where(np.isclose(each.weights, share), each.weights, 0))
        for each in whole
        for name, share in (("rationale", each.weights[each.weights > 0][0]), ("answer", each.weights[-1]))
    ]
    errors = [measure(model, objective, lay_out(each, Layout(Kind.PACKED)), each).error for each in (whole, tasks)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


# Tokens, by hand and of any text


def byte_tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("</s>", "<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=TEMPLATES["chatml"])


def pieces_tokenizer() -> Any:
    """One that puts a space before all that it is given, as Llama's does."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = [*special, *(f"<0x{each:02X}>" for each in range(256)), "▁", *map(chr, range(33, 127))]
    made = Tokenizer(models.BPE({text: at for at, text in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


@cache
def tokenizers() -> dict[str, Any]:
    base = pieces_tokenizer()
    base.chat_template = None
    return {"embedded": load_tokenizer("embedded"), "bytes": byte_tokenizer(), "pieces": pieces_tokenizer(), "base": base}


def test_a_chain_token_by_token() -> None:
    """A byte each, specials one; the rationale ends where the cue begins, and both end as the template ends an answer."""
    made = renderer(tokenizers()["bytes"], replace(CASCOD, cue="\n# "))
    (example,) = made.render(Row("x:1", {"question": "1+1?", "rationale": "ab", "answer": "2"}))
    decode = made.tokenizer.decode
    assert decode(example.tokens) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nab\n# 2<|im_end|>"
    own = [(decode([target]), weight) for target, weight in zip(example.wanted, example.weights.tolist(), strict=True)][-7:]
    third, half = pytest.approx(0.7 / 3), pytest.approx(0.3 / 2)
    assert own == [("a", third), ("b", third), ("<|im_end|>", third), ("#", 0), (" ", 0), ("2", half), ("<|im_end|>", half)]


TEXT = st.text(st.sampled_from("ab 7é#\n.＃<"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["embedded", "bytes", "pieces", "base"]), rationale=TEXT, answer=TEXT, cue=TEXT, pair=st.booleans())
def test_no_border_moves(name: str, rationale: str, answer: str, cue: str, pair: bool) -> None:
    """Whatever the texts: the tokens are those of the parts alone, the whole reads as the parts do, and weighs as one row."""
    made = renderer(tokenizers()[name], replace(CASCOD, cue=cue))
    asked = {"prompt": "Why? ", "completion": answer} if pair else {"question": "Why?", "answer": answer}
    row = Row("x:1", {**asked, "rationale": rationale})
    if not rationale.strip() or not answer.strip():
        with pytest.raises(RowError, match="empty text"):
            made.render(row)
        return
    (example,) = made.render(row)
    found = question(row, made, SourceConfig())
    assert found is not None
    begun = [*found.prompt, *found.rationale_tokens, *found.cue_tokens]
    assert example.tokens[: len(begun)].tolist() == begun
    assert example.wanted[len(found.prompt) + len(found.rationale_tokens)] == example.tokens[-1]
    assert example.weights.sum() == pytest.approx(1)
    parts = rationale.strip(), cue, answer.strip()
    assert found.rationale == parts[0]
    assert found.expected == parts[2]
    text = made.tokenizer.decode(example.tokens.tolist(), skip_special_tokens=True)
    assert text.endswith("".join(parts))
    other = made.render(Row("x:1", {**row.value, ("completion" if pair else "answer"): "another one"}))[0]
    assert other.tokens[: len(begun)].tolist() == begun, "what follows changes nothing before it"


def test_a_space_that_a_tokenizer_puts_before_texts_is_not_in_the_middle() -> None:
    """And an answer that the template ends with a space and `</s>` ends with `</s>`."""
    made = renderer(tokenizers()["pieces"])
    (example,) = made.render(Row("x:1", ROW))
    text = made.tokenizer.decode(example.tokens)
    assert text.endswith("[INST] What is 3*4+5? [/INST] 3*4 = 12\n12+5 = 17\n#### 17</s>")


def test_template_that_ends_answers_with_text_can_not_end_a_rationale_in_the_same_pass() -> None:
    ends = tokenizers()["bytes"]
    template = "{% for m in messages %}{{ m.content + '\\nEND\\n' }}{% endfor %}"
    ends = PreTrainedTokenizerFast(tokenizer_object=ends.backend_tokenizer, eos_token="</s>", chat_template=template)
    with pytest.raises(RowError, match=r"ends answers with the text 'END'.*step_by_step"):
        renderer(ends).render(Row("x:1", ROW))
    rationale, answer = renderer(ends, replace(CASCOD, kind="step_by_step")).render(Row("x:1", ROW))
    assert ends.decode(answer.tokens[answer.weights > 0]) == "17\nEND</s>"
    assert rationale.weights.sum() == pytest.approx(0.7)


# Where rationale and answer come from


def test_all_ways_to_give_a_chain_are_the_same_example() -> None:
    whole = f"{ROW['rationale']}\n#### {ROW['answer']}"
    asked = {"role": "user", "content": ROW["question"]}
    thought = {"role": "assistant", "content": "17", "reasoning_content": ROW["rationale"]}
    values: list[dict[str, Any]] = [
        ROW,
        {"question": ROW["question"], "answer": whole},
        {"question": ROW["question"], "answer": f"{ROW['rationale']} ####17</s>"},
        {"prompt": ROW["question"], "completion": "17", "rationale": f"\n{ROW['rationale']}\n"},
        {"instruction": ROW["question"], "output": whole},
        {"messages": [asked, {"role": "assistant", "content": whole}]},
        {"messages": [asked, {"role": "assistant", "content": "17"}], "rationale": ROW["rationale"]},
        {"messages": [asked, thought, {"role": "user", "content": "Thanks."}]},
    ]
    expected = made_of(ROW)[0]
    assert all(same(made_of(value)[0], expected) for value in values)
    pattern = replace(CASCOD, pattern=r"(?P<rationale>.*)So the answer is (?P<answer>.*?)\.?")
    by_pattern = {"question": ROW["question"], "answer": f"{ROW['rationale']}\nSo the answer is 17."}
    assert same(made_of(by_pattern, pattern)[0], expected)


def test_of_a_chat_only_the_last_answer_is_trained() -> None:
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "1 #### 2"}]
    last = [{"role": "user", "content": ROW["question"]}, {"role": "assistant", "content": "17"}]
    (example,) = made_of({"messages": [*earlier, *last], "rationale": ROW["rationale"]})
    alone = made_of(ROW)[0]
    own = len(alone.tokens) - int(np.argmax(alone.weights > 0))
    assert example.weights[-own:].tolist() == alone.weights[-own:].tolist()
    assert not example.weights[:-own].any()
    assert "1 #### 2" in load_tokenizer("embedded").decode(example.tokens[:-own])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no cue": ({"question": "1+1?", "answer": "Two."}, "no rationale: the answer 'Two.' does not hold '####' (chain.cue)"),
    "nothing before": ({"question": "1+1?", "answer": "\n#### 2"}, "rationale: an empty text"),
    "nothing after": ({"question": "1+1?", "answer": "1+1 = 2\n####"}, "answer: an empty text"),
    "no text": ({"question": "1+1?", "answer": "2", "rationale": ["a"]}, "rationale: ['a'] came, a text is expected"),
    "raw text": ({"text": "1+1 = 2\n#### 2"}, "a text without a question came"),
    "spans": ({**ROW, "train": [[0, 1]]}, "train: spans can't be chosen"),
    "call": (
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]},
        "calls a tool",
    ),
    "no question": ({"messages": [{"role": "assistant", "content": "1\n#### 2"}]}, "an answer without a question"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_rows_without_a_chain_are_told_with_their_reason(name: str) -> None:
    value, reason = WRONG[name]
    account, refusals = Account(), Refusals()
    made = list(renderer().examples([Row("x.jsonl:7", value), Row("x.jsonl:8", ROW)], account, refusals))
    assert [example.id for example in made] == ["x.jsonl:8"]
    assert account.malformed == 1
    assert account.refused[0].startswith("x.jsonl:7: ")
    assert reason in account.refused[0]


def test_a_row_that_does_not_match_the_pattern_is_told() -> None:
    with pytest.raises(RowError, match=r"does not match chain\.pattern as a whole"):
        made_of({"question": "1+1?", "answer": "Two. I mean 2."}, replace(CASCOD, pattern="(?P<rationale>.*): (?P<answer>.*)"))


def test_rows_that_shall_not_be_trained_are_not() -> None:
    for chain in (CASCOD, replace(CASCOD, kind="step_by_step"), replace(CASCOD, alpha=0.0)):
        assert made_of({**ROW, "weight": 0}, chain) == []
        assert made_of({**ROW, "train": False}, chain) == []
        assert sum(float(each.weights.sum()) for each in made_of({**ROW, "weight": 2.5}, chain)) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pattern": "(?P<rationale>.*"}, "missing ), unterminated subpattern at letter 1"),
        ({"pattern": "(?P<rationale>.*) (.*)"}, r"(?P<answer>...) is missing"),
        ({"alpha": 1.5}, "chain.alpha: 1.5 came, a number from 0 to 1 is expected"),
        ({"cue": ""}, "chain.cue: '' came"),
        ({"words": ("a", "a")}, "chain.words: ('a', 'a') came, two different texts"),
    ],
)
def test_wrong_settings_are_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(CASCOD, **changes)
    assert said in str(error.value)


def test_a_rationale_that_is_not_trained_is_told() -> None:
    account = Account()
    list(renderer(chain=ChainConfig()).examples([Row("x.jsonl:1", ROW)], account, Refusals()))
    assert account.notes == {"no_chain": 1}


# Shares


def test_an_alpha_at_its_end_leaves_one_task() -> None:
    (only_rationale,), (only_answer,) = made_of(ROW, replace(CASCOD, alpha=0.0)), made_of(ROW, replace(CASCOD, alpha=1.0))
    (plain,) = Renderer(load_tokenizer("embedded"), RenderConfig(), SourceConfig()).render(
        Row("x:1", {"question": ROW["question"], "answer": ROW["rationale"]})
    )
    assert only_rationale.tokens.tolist() == plain.tokens.tolist()
    assert np.array_equal(only_rationale.weights > 0, plain.weights > 0)
    assert only_answer.targets is None
    assert only_rationale.targets is None
    decode = load_tokenizer("embedded").decode
    assert decode(only_answer.tokens[only_answer.weights > 0]) == "17</s>"
    assert [float(each.weights.sum()) for each in (only_rationale, only_answer)] == pytest.approx([1, 1])


def test_step_by_step_is_two_weighted_questions() -> None:
    """Each as plain training renders it, with a word before the question; sums over both are the row's, wherever each is."""
    rationale, answer = made_of(ROW, replace(CASCOD, kind="step_by_step"))
    plain = Renderer(load_tokenizer("embedded"), RenderConfig(), SourceConfig())
    for made, name, word, share in ((rationale, "rationale", "[rationale] ", 0.7), (answer, "answer", "[answer] ", 0.3)):
        (expected,) = plain.render(Row("x:1", {"question": word + ROW["question"], "answer": ROW[name]}))
        assert made.id == f"x.jsonl:1#{name}"
        assert made.tokens.tolist() == expected.tokens.tolist()
        assert made.weights == pytest.approx(expected.weights * share / expected.weights.sum())
    asked = question(Row("x:1", ROW), renderer(chain=replace(CASCOD, kind="step_by_step")), SourceConfig())
    assert asked is not None
    assert asked.rationale is None
    assert asked.expected == "17"
    assert list(asked.prompt) == answer.tokens[answer.weights == 0].tolist()
    (alone,) = made_of(ROW, replace(CASCOD, kind="step_by_step", alpha=1.0))
    assert alone.id == "x.jsonl:1#answer"


# Kept, read as they come, shown


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("train", 40), ("valid", 4)):
        rows = [
            {"question": f"{name} {n}+{n}?", "answer": f"{n}+{n} = {2 * n}" + f", so {2 * n}" * (n % 3) + f"\n#### {2 * n}"}
            for n in range(10, 10 + count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def corpus(folder: Path, chain: ChainConfig = CASCOD, render: dict[str, Any] | None = None, **more: Any) -> Corpus:
    config = RenderConfig(chain=chain, **(render or {}))
    return gather(SourceConfig(data=str(folder), **more), config, load_tokenizer("embedded"), seed=0)


@pytest.mark.parametrize("kind", ["cascod", "step_by_step"])
def test_kept_and_streamed_examples_are_those_that_are_made(kind: Any, folder: Path) -> None:
    chain = replace(CASCOD, kind=kind)
    cold, warm = corpus(folder, chain), corpus(folder, chain)
    assert not cold.warm
    assert warm.warm
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [Row(f"train.jsonl:{number}", json.loads(line)) for number, line in enumerate(lines, start=1)]
    made = [each for row in rows for each in renderer(chain=chain).render(row)]
    for own in (list(iterate(cold.sets["train"])), list(iterate(warm.sets["train"]))):
        assert [each.id for each in own] == [each.id for each in made]
        assert all(same(one, other) for one, other in zip(own, made, strict=True))
        assert all((each.targets is not None) == (kind == "cascod") for each in own)
    read = stream(warm.sources, warm.config, warm.render, warm.renderer, 0, START)
    by_id = {each.id: each for each in made}
    assert all(same(example, by_id[example.id]) for example, _ in (next(read) for _ in range(len(made))))
    (folder / "valid.jsonl").unlink()
    split = corpus(folder, chain, validation_share=0.25, data_cache="off")
    assert all(same(each, by_id[each.id]) for made_set in split.sets.values() for each in iterate(made_set))
    owners = [{each.id.split("#")[0] for each in iterate(made_set)} for made_set in split.sets.values()]
    assert not owners[0] & owners[1], "both tasks of a row are on one side"


def test_another_target_is_another_corpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same tokens and weights: what is resumed from or compared must tell them apart."""
    before = corpus(folder, data_cache="off")
    assert corpus(folder, data_cache="off").digest() == before.digest()

    def other(parts: Parts, shares: tuple[float, float]) -> Any:
        tokens, spans, targets = in_one_pass(parts, shares)
        return tokens, spans, dict.fromkeys(targets, 5)

    monkeypatch.setattr("mlx_qlora.data.tokens.in_one_pass", other)
    after = corpus(folder, data_cache="off")
    pairs = list(zip(iterate(before.sets["train"]), iterate(after.sets["train"]), strict=True))
    assert all(np.array_equal(a.tokens, b.tokens) and np.array_equal(a.weights, b.weights) for a, b in pairs)
    assert after.digest() != before.digest()


def test_losses_of_other_shares_are_told_apart(folder: Path) -> None:
    """The digest by which runs are compared: the tokens are the same, what they weigh is not."""
    sizes = [audit(corpus(folder, replace(CASCOD, alpha=alpha))).sizes["valid"] for alpha in (0.3, 0.3, 0.6)]
    assert sizes[0] == sizes[1] != sizes[2]


def test_long_chains_are_left_out_whole_or_end_the_run(folder: Path) -> None:
    with pytest.raises(DataError) as error:
        corpus(folder, render={"max_seq_length": 40})
    assert "--truncation drop" in str(error.value)
    assert "keep_" not in str(error.value)
    assert "split" not in str(error.value)
    for kind in ("cascod", "step_by_step"):
        chain = replace(CASCOD, kind=kind)
        whole = list(iterate(corpus(folder, chain).sets["train"]))
        limit = sorted(len(each.tokens) for each in whole if each.id.endswith(("rationale", *"0123456789")))[20]
        kept = list(iterate(corpus(folder, chain, {"max_seq_length": limit, "truncation": "drop"}).sets["train"]))
        expected = {each.id.split("#")[0] for each in whole} - {e.id.split("#")[0] for e in whole if len(e.tokens) > limit}
        assert 0 < len(kept) < len(whole)
        assert {each.id.split("#")[0] for each in kept} == expected
        assert sum(float(each.weights.sum()) for each in kept) == pytest.approx(len(expected))
    for policy in ("keep_start", "keep_end", "split"):
        with pytest.raises(ConfigError, match=f"truncation: '{policy}' came, error or drop, with chain.kind"):
            RenderConfig(chain=CASCOD, truncation=policy)


def test_windows_of_text_have_no_chains(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("A book. " * 400, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"chain\.kind: cascod came with text that is trained as windows"):
        gather(
            SourceConfig(data=str(tmp_path)),
            RenderConfig(chain=CASCOD, max_seq_length=32),
            load_tokenizer("embedded"),
            0,
            windows=WindowConfig(windows="on"),
        )


def test_what_is_shown_of_a_chain() -> None:
    (example,) = made_of(ROW)
    found = sight(example, load_tokenizer("embedded"))
    trained = [(text, remark) for (text, own), remark in zip(found.pieces, found.remarks, strict=True) if own]
    rationale, answer = (f"×{example.weights[at]:.3g}" for at in (int(np.argmax(example.weights > 0)), -1))
    assert trained == [(ROW["rationale"], ""), ("→</s>", rationale), ("17</s>", answer)]
    assert "".join(text for text, _ in found.pieces if text != "→</s>").endswith(f"{ROW['rationale']}\n#### 17</s>")


def test_a_run_from_the_command_line(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It trains, validates, and goes on from its checkpoint with the same settings."""
    shared = ["--data", str(folder), "--model", "embedded", "--output-dir", str(tmp_path / "run"), "--data-cache", "off"]
    shared += ["--batch-size", "4", "--eval-every", "4", "--save-every", "4", "--chain.kind", "cascod", "--chain.alpha", "0.3"]
    assert main([*shared, "--max-steps", "4"]) == 0
    said = capfd.readouterr().out
    assert "cascod: rationale 0.7 and answer 0.3 of a row's loss" in said
    assert main([*shared, "--resume", "--chain.alpha", "0.4"]) == 2
    assert "chain.alpha: was 0.3, is 0.4" in capfd.readouterr().err
    assert main([*shared, "--max-steps", "6", "--resume", "--resume-anyway"]) == 0
    lines = (tmp_path / "run" / "training_metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "learning_rate" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
