"""From rows to examples: what is trained, turn by turn, and what it costs to fit."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_qlora.assets import embedded_model
from mlx_qlora.data.chat import TrainOn
from mlx_qlora.data.formats import RowError
from mlx_qlora.data.render import Account, Refusals, RenderConfig, Renderer, question
from mlx_qlora.data.sources import Row, SourceConfig
from mlx_qlora.data.templates import TEMPLATES
from mlx_qlora.errors import DataError
from mlx_qlora.model.load import load_tokenizer
from mlx_qlora.records import Example

MISTRAL = Path(__file__).parents[2] / "shared" / "real" / "tokenizer-mistral-7b-instruct-v0.3"
needs_mistral = pytest.mark.skipif(not MISTRAL.exists(), reason="the tokenizer of Mistral-7B-Instruct is not here")


def renderer(tokenizer: Any = None, source: SourceConfig | None = None, **changes: Any) -> Renderer:
    return Renderer(tokenizer or load_tokenizer("embedded"), RenderConfig(**changes), source or SourceConfig())


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    """Messages of user and assistant in turn."""
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, contents, strict=False)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


def trained(made: Renderer, value: dict[str, Any]) -> list[list[str]]:
    """The supervised runs of each example of a row, as texts."""
    return [[text for text, weight in runs(made, example) if weight] for example in made.render(Row("x:1", value))]


def runs(made: Renderer, example: Example) -> list[tuple[str, float]]:
    """(text, weight) of neighbours of equal weight."""
    edges = [0, *(np.flatnonzero(np.diff(example.weights)) + 1).tolist(), len(example.tokens)]
    return [(made.tokenizer.decode(example.tokens[a:b].tolist()), float(example.weights[a])) for a, b in pairwise(edges)]


def whole(made: Renderer, example: Example) -> str:
    return str(made.tokenizer.decode(example.tokens.tolist()))


def byte_tokenizer(template: str | None, *specials: str, eos: str = "</s>", bos: str | None = "<s>") -> Any:
    """A tokenizer whose tokens are bytes and the given special tokens: its masks can be worked out by hand."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = [name for name in (bos, eos, *specials) if name]
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(names)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, chat_template=template)


CHATML = TEMPLATES["chatml"]
# Like Qwen3: thinking stands only after the last question, earlier answers lose it.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\\n' + (m.reasoning_content or '') + '</think>\\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '\\n### ' + m.role + '\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n### assistant\\n' }}{% endif %}"
)


# Which tokens are trained


def test_all_turns_of_the_assistant_are_trained_with_their_end_and_nothing_else() -> None:
    made = renderer()
    row = chat("Que som faz o gato?", "O gato mia.", "Quanto é 2 + 2?", "2 + 2 = 4.", system="Use uma frase só.")
    assert trained(made, row) == [["O gato mia.</s>", "2 + 2 = 4.</s>"]]
    (example,) = made.render(Row("x:1", row))
    assert whole(made, example) == made.tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert whole(made, example).count("<s>") == 1


def test_three_turns_with_a_tool_call_by_hand() -> None:
    """Token by token: a byte each, specials one. Trained are call, answer and second answer, each with its end."""
    template = (
        "{{ bos_token }}{% if tools %}{{ '<T>' + tools[0].function.name }}{% endif %}{% for m in messages %}"
        "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
        "{{ '<A>' + f.name + '(' + f.arguments.q + ')' + eos_token }}"
        "{% elif m.role == 'tool' %}{{ '<R>' + m.content }}{% elif m.role == 'user' %}{{ '<U>' + m.content }}"
        "{% else %}{{ '<A>' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<A>' }}{% endif %}"
    )
    made = renderer(byte_tokenizer(template, "<T>", "<U>", "<A>", "<R>"))
    call = {"function": {"name": "f", "arguments": '{"q": "x"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": "ok"},
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "no"},
        ],
        "tools": [{"name": "f", "parameters": {}}],
    }
    (example,) = made.render(Row("x:1", row))
    told = [
        "<s>",
        "<T>",
        "f",
        "<U>",
        "q",
        "<A>",
        "f",
        "(",
        "x",
        ")",
        "</s>",
        "<R>",
        "7",
        "<A>",
        "o",
        "k",
        "</s>",
        "<U>",
        "?",
        "<A>",
        "n",
        "o",
        "</s>",
    ]
    mask = ["0", "0", "0", "0", "0", "0", "1", "1", "1", "1", "1", "0", "0", "0", "1", "1", "1", "0", "0", "0", "1", "1", "1"]
    assert [made.tokenizer.decode([token]) for token in example.tokens.tolist()] == told
    assert example.weights.tolist() == [float(bit) for bit in mask]


def test_the_policies() -> None:
    row = chat("ab", "cd", "ef", "gh")
    made = byte_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    assert trained(renderer(made, train_on=TrainOn.LAST), row) == [["gh<|im_end|>"]]
    assert trained(renderer(made, train_on=TrainOn.ASSISTANT), row) == [["cd<|im_end|>", "gh<|im_end|>"]]
    (everything,) = renderer(made, train_on=TrainOn.ALL).render(Row("x:1", row))
    assert everything.weights.tolist() == [0.0] + [1.0] * (len(everything.tokens) - 1)
    marked = renderer(made, train_on=TrainOn.MARKED)
    assert trained(marked, row) == []
    row["messages"][1]["train"] = True
    row["messages"][3]["train"] = [[0, 1]]
    assert trained(marked, row) == [["cd<|im_end|>", "g"]]
    row["messages"][3]["train"] = [[1, 2, 0.5]]
    (example,) = marked.render(Row("x:1", row))
    assert runs(marked, example)[-1] == ("h<|im_end|>", 0.5), "a span that reaches the end of the text has the turn's end"
    row["messages"][1]["train"] = False
    assert trained(renderer(made), row) == [["h<|im_end|>"]], "marks hold under the other policies too"


def test_weights_of_rows_and_messages_multiply() -> None:
    made = renderer(byte_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>"))
    row = chat("ab", "cd", "ef", "gh") | {"weight": 0.5}
    row["messages"][1]["weight"] = 0
    row["messages"][3]["weight"] = 3
    (example,) = made.render(Row("x:1", row))
    assert [(text, weight) for text, weight in runs(made, example) if weight] == [("gh<|im_end|>", 1.5)]


def test_what_a_template_writes_after_the_end_of_a_turn_is_not_trained() -> None:
    """ChatML puts a line break after <|im_end|>, where the model has stopped long since."""
    made = renderer(byte_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>"))
    assert trained(made, chat("ab", "cd", "ef", "gh")) == [["cd<|im_end|>", "gh<|im_end|>"]]


def test_a_template_that_drops_thinking_from_earlier_turns() -> None:
    """Each answer gets an example in which the text before it is what the model is asked with."""
    made = renderer(byte_tokenizer(THINKING, "<|im_start|>", "<|im_end|>", eos="<|im_end|>"))
    row = chat("ab", "cd", "ef", "gh")
    row["messages"][1]["reasoning_content"] = "hm"
    first, second = made.render(Row("x:1", row))
    assert (first.id, second.id) == ("x:1#1", "x:1#2")
    start, stop = "<|im_start|>", "<|im_end|>"
    prompt = f"{start}user\nab{stop}\n{start}assistant\n"
    assert runs(made, first) == [(prompt, 0.0), (f"<think>\nhm</think>\ncd{stop}", 1.0)]
    prompt = f"{prompt}cd{stop}\n{start}user\nef{stop}\n{start}assistant\n"
    assert runs(made, second) == [(prompt, 0.0), (f"<think>\n</think>\ngh{stop}", 1.0)]


def test_a_template_that_can_not_be_followed_is_refused() -> None:
    made = renderer(byte_tokenizer("{{ messages | length }}:{% for m in messages %}{{ m.content }}{% endfor %}"))
    assert runs(made, made.render(Row("x:1", chat("a", "b")))[0]) == [("1:a", 0.0), ("b</s>", 1.0)], "as it is asked"
    made = renderer(byte_tokenizer("{% for m in messages | reverse %}{{ m.content }}{% endfor %}"))
    with pytest.raises(RowError, match=r"messages\[1\]: the chat template writes this answer in another way"):
        made.render(Row("x:1", chat("a", "b")))


def test_a_template_without_an_end_of_turn_gets_one_for_every_answer() -> None:
    made = renderer(byte_tokenizer(NO_END))
    assert trained(made, chat("ab", "cd", "ef", "gh")) == [["cd</s>"], ["gh</s>"]]


def test_marks_of_generation_give_the_masks_of_the_incremental_rendering() -> None:
    specials = ("<|im_start|>", "<|im_end|>")
    plain = renderer(byte_tokenizer(CHATML, *specials, eos="<|im_end|>"))
    marked = renderer(byte_tokenizer(MARKED_CHATML, *specials, eos="<|im_end|>"))
    short = renderer(  # marks that leave out the end of the turn
        byte_tokenizer(
            MARKED_CHATML.replace("'<|im_end|>' }}{% endgeneration %}{{ '\\n'", "'' }}{% endgeneration %}{{ '<|im_end|>\\n'"),
            *specials, eos="<|im_end|>",
        )
    )  # fmt: skip
    for row in (chat("ab", "cd"), chat("ab", "cd", "ef", "gh é", system="s"), chat("a", "b\n", "c", " d")):
        (a,), (b,), (c,) = (made.render(Row("x:1", row)) for made in (plain, marked, short))
        assert a.tokens.tolist() == b.tokens.tolist() == c.tokens.tolist()
        assert a.weights.tolist() == b.weights.tolist() == c.weights.tolist()
        inner = marked.tokenizer.apply_chat_template(
            row["messages"], return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
        assert inner["assistant_masks"][: len(a.weights)] == a.weights.tolist()


def test_marks_of_generation_may_leave_things_out() -> None:
    template = MARKED_CHATML.replace("{% generation %}{{ m.content", "{{ m.content[:1] }}{% generation %}{{ m.content[1:]")
    made = renderer(byte_tokenizer(template, "<|im_start|>", "<|im_end|>", eos="<|im_end|>"))
    assert trained(made, chat("ab", "cd")) == [["d<|im_end|>"]]


def test_a_conversation_may_begin_with_the_assistant() -> None:
    made = renderer(byte_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>"))
    row = {"messages": [{"role": "assistant", "content": "hi"}, *chat("ab", "cd")["messages"]]}
    assert trained(made, row) == [["hi<|im_end|>", "cd<|im_end|>"]]


def test_what_a_row_is_trained_on_does_not_depend_on_the_rows_before() -> None:
    """Plain conversations make the renderer sure of their roles; one with thinking or a call is still looked at whole."""
    thinking = THINKING.replace("(m.reasoning_content or '')", "m.reasoning_content").replace(
        "loop.index0 > ns.last %}", "loop.index0 > ns.last and m.reasoning_content %}"
    )
    calling = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% if m.tool_calls %}{{ '<|im_start|>' + m.tool_calls[0].function.name }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    thought, called = chat("ab", "cd", "ef", "gh"), chat("ab", "cd", "ef", "gh")
    thought["messages"][1]["reasoning_content"] = "hm"
    called["messages"][1]["tool_calls"] = [{"name": "f", "arguments": {}}]
    for template, row in ((thinking, thought), (calling, called)):
        tokenizer = byte_tokenizer(template, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")
        first, later = renderer(tokenizer), renderer(tokenizer)
        for _ in range(6):
            later.render(Row("x:1", chat("ab", "cd", "ef", "gh")))
        assert trained(first, row) == trained(later, row)


def test_a_template_that_loses_the_answers_is_refused() -> None:
    made = renderer(byte_tokenizer("hello"))
    with pytest.raises(RowError, match="does not write this answer"):
        made.render(Row("x:1", chat("ab", "cd")))


PHI_3 = (  # after the last turn one more token, which no turn ends in
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_a_turn_ends_in_what_ends_it_in_the_middle_too() -> None:
    made = renderer(byte_tokenizer(PHI_3, "<|user|>", "<|assistant|>", "<|end|>", eos="<|endoftext|>", bos=None))
    assert trained(made, chat("ab", "cd", "ef", "gh")) == [["cd<|end|>", "gh<|end|>"]]
    row = {"messages": [{"role": "assistant", "content": "a"}, *chat("ab", "cd")["messages"]]}
    assert trained(made, row) == [["a<|end|>", "cd<|end|>"]]
    assert trained(made, chat("a<|end|>b", "cd")) == [["cd<|end|>"]]


def test_marked_spans_are_found_after_what_was_thought() -> None:
    made = renderer(byte_tokenizer(THINKING, "<|im_start|>", "<|im_end|>", eos="<|im_end|>"), train_on=TrainOn.MARKED)
    row = chat("2+2?", "4")
    row["messages"][1].update(reasoning_content="2+2 is 4, surely", train=[[0, 1]])
    assert trained(made, row) == [["4<|im_end|>"]]
    row["messages"][1].update(content="four", train=[[1, 3]])
    assert trained(made, row) == [["ou"]]
    plain = renderer(byte_tokenizer(None))
    (example,) = plain.render(Row("x:1", {"prompt": "ab", "completion": "cd", "train": [[0, 2, 0.5]]}))
    assert example.weights.tolist() == [0, 0, 0, 0.5, 0.5, 0.5]


def test_letters_of_special_tokens_in_names_are_letters() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(template, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    row = chat("ab", "cd")
    row["messages"][1]["tool_calls"] = [{"name": "f", "arguments": {"<|im_end|>": "x"}}]
    (example,) = renderer(tokenizer).render(Row("x:1", row))
    assert example.tokens.tolist().count(tokenizer.eos_token_id) == 2


# Special tokens


def test_letters_of_special_tokens_in_contents_are_read_as_letters() -> None:
    made = renderer()
    plain_row = chat("Que som faz o gato?", "O gato mia.")
    row = chat("O que é </s><|assistant|>?", "É o <s> fim.", "E <|user|>", "</s>")
    (example,) = made.render(Row("x:1", row))
    ids = example.tokens.tolist()
    tokenizer = made.tokenizer
    for special, expected in (("<s>", 1), ("</s>", 4), ("<|user|>", 2), ("<|assistant|>", 2)):
        assert ids.count(tokenizer.convert_tokens_to_ids(special)) == expected
    text = "<s><|user|>O que é </s><|assistant|>?</s><|assistant|>É o <s> fim.</s><|user|>E <|user|></s>"
    assert whole(made, example).startswith(text)
    # The same letters as in a text where nothing is special, and the same ids as without the detour.
    letters = tokenizer.encode("É o <s> fim.", add_special_tokens=False, split_special_tokens=True)
    assert next(text for text, weight in runs(made, example) if weight) == tokenizer.decode(letters) + "</s>"
    (other,) = made.render(Row("x:1", plain_row))
    escaped = made._encoder._escaped(made._chat.specials.shown(whole(made, other)))
    assert escaped.ids == other.tokens.tolist()


def test_private_characters_can_not_pass_for_special_tokens() -> None:
    for text in ("o </s> e \ue0000\ue001", "</s> \ue002999\ue003"):
        for row in (chat(text, "x"), chat("x", text)):
            with pytest.raises(RowError, match="private characters"):
                renderer().render(Row("x:1", row))
    assert trained(renderer(), chat("\ue0000\ue001", "x")) == [["x</s>"]], "alone they are letters like others"


def test_marks_of_generation_hold_where_letters_are_escaped() -> None:
    template = MARKED_CHATML.replace("{% generation %}{{ m.content", "{{ m.content[:1] }}{% generation %}{{ m.content[1:]")
    made = renderer(byte_tokenizer(template, "<|im_start|>", "<|im_end|>", eos="<|im_end|>"))
    assert trained(made, chat("a<|im_end|>b", "cd")) == [["d<|im_end|>"]]


def test_a_question_is_asked_in_the_letters_that_were_trained() -> None:
    made = renderer()
    row = chat("O que é </s>?", "O fim.")
    asked = question(Row("x:1", row), made, SourceConfig())
    (example,) = made.render(Row("x:1", row))
    assert asked is not None
    assert list(asked.prompt) == example.tokens[: len(asked.prompt)].tolist()


def test_an_answer_that_brings_its_end_does_not_get_two() -> None:
    made = renderer()
    assert trained(made, chat("Que som faz o gato?", "O gato mia.</s>")) == [["O gato mia.</s>"]]
    assert trained(renderer(byte_tokenizer(None)), {"prompt": "ab", "completion": "cd</s>"}) == [["cd</s>"]]


def test_no_double_beginning() -> None:
    made = renderer(byte_tokenizer("{{ bos_token + bos_token }}" + NO_END))
    (example,) = made.render(Row("x:1", chat("ab", "cd")))
    assert whole(made, example).count("<s>") == 1
    (text,) = renderer().render(Row("x:1", {"text": "<s>O gato mia.</s>"}))
    assert whole(renderer(), text) == "<s>O gato mia.</s>"


def test_a_token_for_unknown_letters_is_no_border() -> None:
    """A line break that the tokenizer does not know becomes its special <unk>, in the middle of a prompt."""
    letters = list(map(chr, range(32, 127)))
    backend = Tokenizer(models.BPE({**{letter: n for n, letter in enumerate(letters)}, "<unk>": 95}, [], unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    backend.normalizer = normalizers.Prepend("_")
    made = renderer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>"))
    for content, escaped in (("ab", 0), ("a</s>b", 1)):
        account = Account()
        (example,) = made.examples([Row("x:1", chat(content, "cd"))], account, Refusals())
        ids = example.tokens.tolist()
        text = f"<s>User: {content}\nAssistant: cd</s>"
        assert account.notes["escaped"] == escaped
        assert ids.count(95) == 1
        assert ids.count(97) == 1, "one end"
        if not escaped:
            assert ids == backend.encode(text).ids
        assert "".join(backend.id_to_token(number) for number, weight in zip(ids, example.weights, strict=True) if weight) in (
            " cd</s>", "_ cd</s>",
        )  # fmt: skip


# Rows that are no chats, and models without a template


def test_prompt_and_completion() -> None:
    row = {"prompt": "Que som faz o gato?", "completion": "O gato mia."}
    assert trained(renderer(), row) == [["O gato mia.</s>"]], "a chat where there is a template"
    made = renderer(byte_tokenizer(None))
    (example,) = made.render(Row("x:1", {"prompt": "ab", "completion": "c"}))
    assert runs(made, example) == [("<s>ab", 0.0), ("c</s>", 1.0)]
    assert made.template == "plain (the model has none)"


def test_text_is_trained_whole_but_for_its_first_token() -> None:
    (example,) = renderer().render(Row("x:1", {"text": "O gato mia."}))
    assert whole(renderer(), example) == "<s>O gato mia.</s>"
    assert example.weights.tolist() == [0.0] + [1.0] * (len(example.tokens) - 1)
    made = renderer(byte_tokenizer(None))
    assert trained(made, {"text": "abcd", "train": [[1, 3]]}) == [["bc"]]


def test_a_base_model_gets_a_named_template() -> None:
    made = renderer(byte_tokenizer(None))
    assert trained(made, chat("ab", "cd", "ef", "gh", system="s")) == [[" cd</s>", " gh</s>"]]
    (example,) = made.render(Row("x:1", chat("ab", "cd", "ef", "gh", system="s")))
    assert whole(made, example) == "<s>s\n\nUser: ab\nAssistant: cd</s>\nUser: ef\nAssistant: gh</s>"
    alpaca = renderer(byte_tokenizer(None), chat_template="alpaca")
    (example,) = alpaca.render(Row("x:1", {"instruction": "ab", "input": "ef", "output": "cd"}))
    assert whole(alpaca, example) == "<s>### Instruction:\nab\n\nef\n\n### Response:\ncd</s>"
    assert trained(alpaca, {"question": "ab", "answer": "cd"}) == [["cd</s>"]]


def test_a_named_template_is_known_again() -> None:
    tokenizer = byte_tokenizer(None)
    assert renderer(tokenizer).template == renderer(tokenizer).template == "plain (the model has none)"
    assert trained(renderer(tokenizer), {"prompt": "ab", "completion": "c"}) == [["c</s>"]], "and pairs stay pairs"
    with pytest.raises(DataError, match="chatml needs the tokens"):
        renderer(byte_tokenizer(None), chat_template="chatml")


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(NO_END)
    assert trained(renderer(chat_template=str(path)), chat("Oi", "O gato mia.")) == [["O gato mia.</s>"]]
    path.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(DataError, match=r"mine.jinja:2: not a Jinja template"):
        renderer(chat_template=str(path))


def test_the_question_is_what_leads_to_the_last_answer() -> None:
    made, source = renderer(), SourceConfig()
    row = chat("Que som faz o gato?", "O gato mia.")
    asked = question(Row("x:1", row), made, source)
    assert asked is not None
    assert (asked.text, asked.expected) == ("Que som faz o gato?", "O gato mia.")
    assert made.tokenizer.decode(list(asked.prompt)) == "<s><|user|>Que som faz o gato?</s><|assistant|>"
    assert question(Row("x:1", {"text": "O gato mia."}), made, source) is None
    assert question(Row("x:1", {"messages": [*row["messages"], {"role": "user", "content": "?"}]}), made, source) is None


# Tokens of the prompt


def test_where_letters_of_prompt_and_answer_would_join() -> None:
    """A tokenizer with the token `:)`: the prompt ends in `:`, the answer begins with `)`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, ":)"])}
    backend = Tokenizer(models.BPE(vocabulary, [(":", ")")]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    made = renderer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=None))
    assert len(made._encoder.encode(":)")) == 1
    assert trained(made, {"prompt": "a:", "completion": ")b"}) == [[")b</s>"]]
    (example,) = made.render(Row("x:1", {"prompt": "a:", "completion": ")b"}))
    assert example.tokens[:2].tolist() == made._encoder.encode("a:"), "as the model sees it when it is asked"


class Slow:
    """A tokenizer of the old kind: nothing but encode and decode."""

    bos_token_id, eos_token_id, bos_token, eos_token, all_special_tokens = 1, 2, "\1", "\2", ("\1", "\2")

    def __init__(self, template: str | None):
        self.chat_template = template

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = False, **_: Any) -> str:
        text = "\1" + "".join(f"{message['role'][0]}:{message['content']}\2" for message in messages)
        return text + "a:" * add_generation_prompt

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def test_a_slow_tokenizer_gives_the_same_masks() -> None:
    made = renderer(Slow("..."))
    assert trained(made, chat("ab", "cd", "ef", "gh")) == [["cd\2", "gh\2"]]
    with pytest.raises(RowError, match="letters of a special token"):
        made.render(Row("x:1", chat("a\2b", "cd")))


def prefix_masks(tokenizer: Any, messages: list[dict[str, Any]], **more: Any) -> tuple[list[int], list[float]]:
    """The plain way: the tokens of each beginning of the conversation, encoded whole, compared."""

    def tokens(turns: list[dict[str, Any]], ask: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **more)
        return list(tokenizer.encode(text, add_special_tokens=False))

    ids = tokens(messages)
    weights = [0.0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = tokens(messages[:turn], ask=True), tokens(messages[: turn + 1])
            assert ids[: len(before)] == before
            assert ids[: len(after)] == after
            weights[len(before) : len(after)] = [1.0] * (len(after) - len(before))
    return ids, weights


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=30).filter(str.strip)
_SHARED: dict[str, Renderer] = {}


@settings(max_examples=150, deadline=None)
@given(st.lists(_TEXT, min_size=2, max_size=6), st.none() | _TEXT)
def test_masks_are_those_of_the_plain_way(contents: list[str], system: str | None) -> None:
    """One encoding with borders looked at locally, against all beginnings encoded whole."""
    made = _SHARED.setdefault("embedded", renderer(max_seq_length=100_000))
    row = chat(*contents[: len(contents) // 2 * 2], system=system)
    ids, weights = prefix_masks(made.tokenizer, row["messages"])
    (example,) = made.render(Row("x:1", row))
    assert example.tokens.tolist() == ids
    assert example.weights.tolist() == weights


# The real Mistral


@needs_mistral
def test_the_masks_of_a_real_mistral_are_those_of_the_plain_way() -> None:
    made = renderer(AutoTokenizer.from_pretrained(MISTRAL))
    row = chat("Hi  there", "Hello.", "Bye\n", "See you.")
    ids, weights = prefix_masks(made.tokenizer, row["messages"])
    (example,) = made.render(Row("x:1", row))
    assert (example.tokens.tolist(), example.weights.tolist()) == (ids, weights)
    assert trained(made, row) == [["Hello.</s>", "See you.</s>"]]


@needs_mistral
def test_a_real_mistral_sees_its_system_prompt_with_the_last_question() -> None:
    """Its template shows the system prompt only where the last message is the user's: never in a finished conversation."""
    made = renderer(AutoTokenizer.from_pretrained(MISTRAL))
    first, second = made.render(Row("x:1", chat("Hi", "Hello.", "Bye", "See you.", system="Be kind.")))
    assert runs(made, first) == [("<s>[INST] Be kind.\n\nHi[/INST]", 0.0), ("Hello.</s>", 1.0)]
    assert runs(made, second) == [
        ("<s>[INST] Hi[/INST] Hello.</s>[INST] Be kind.\n\nBye[/INST]", 0.0), ("See you.</s>", 1.0),
    ]  # fmt: skip


@needs_mistral
def test_answers_of_a_real_mistral_that_are_letters_of_its_end() -> None:
    made = renderer(AutoTokenizer.from_pretrained(MISTRAL))
    for letter in ("s", "/", ">"):
        assert trained(made, chat("Hi", letter, system="Be kind.")) == [[f"{letter}</s>"]]


@needs_mistral
def test_tool_calls_of_a_real_mistral() -> None:
    made = renderer(AutoTokenizer.from_pretrained(MISTRAL))
    call = {"id": "call_of_some_other_maker", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    row = {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "4", "tool_call_id": "call_of_some_other_maker"},
            {"role": "assistant", "content": "4."},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    assert trained(made, row) == [
        ['[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": 2}, "id": "call00001"}]</s>', "4.</s>"]
    ]


@needs_mistral
def test_real_conversations_with_tools() -> None:
    """Each answer is trained once, ends in one end-of-text, and stands after what the model is asked with."""
    made = renderer(AutoTokenizer.from_pretrained(MISTRAL), max_seq_length=10_000)
    rows = json.loads((MISTRAL.parent / "toolcalls" / "toolcalls_sharegpt_60.json").read_text())
    for row in rows:
        answers = sum(turn["from"] in ("gpt", "function_call") for turn in row["conversations"])
        spans = [text for example in made.render(Row("x:1", row)) for text, weight in runs(made, example) if weight]
        assert len(spans) == answers
        assert all(text.endswith("</s>") and text.count("</s>") == 1 for text in spans)


# Too long


def texts(made: Renderer, value: dict[str, Any]) -> list[str]:
    return [whole(made, example) for example in made.render(Row("x:1", value))]


def test_policies_for_long_rows() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    row = chat("ab", "cd", "ef", "gh", "ij", "kl", system="S")  # <s> S </s> and six times three tokens: 21

    def cut(policy: str, limit: int) -> list[str]:
        return texts(renderer(tokenizer, truncation=policy, max_seq_length=limit), row)

    assert cut("drop", 20) == []
    assert cut("keep_start", 12) == ["<s>S</s>ab</s>cd</s>ef</s>"]
    assert cut("keep_end", 12) == ["<s>f</s>gh</s>ij</s>kl</s>"]
    assert cut("split", 21) == ["<s>S</s>ab</s>cd</s>ef</s>gh</s>ij</s>kl</s>"]
    assert cut("split", 15) == ["<s>S</s>ab</s>cd</s>ef</s>gh</s>", "<s>S</s>ij</s>kl</s>"]
    assert cut("split", 9) == ["<s>S</s>ab</s>cd</s>", "<s>S</s>ef</s>gh</s>", "<s>S</s>ij</s>kl</s>"]
    assert cut("split", 8) == []
    assert cut("error", 20) == []
    plain = renderer(byte_tokenizer(None), truncation="split", max_seq_length=4)
    assert texts(plain, {"text": "abcdefgh"}) == ["<s>abc", "<s>def", "<s>gh</s>"]


def test_split_rows_train_what_the_whole_row_would() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    row = chat("ab", "cd", "ef", "gh", "ij", "kl", system="S")
    for policy, whole in ((TrainOn.LAST, 3), (TrainOn.ALL, 20)):
        account = Account()
        made = renderer(tokenizer, train_on=policy, truncation="split", max_seq_length=9)
        assert sum(np.count_nonzero(e.weights) for e in made.examples([Row("x:1", row)], account, Refusals())) == whole
        assert (account.long_supervised_lost, account.long_rows) == (0, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=8),
    st.integers(4, 40),
    st.sampled_from(["keep_start", "keep_end", "split"]),
)
def test_what_truncation_costs_is_what_is_missing(lengths: list[int], limit: int, policy: str) -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    row = chat(*("abcdefghi"[:length] for length in lengths[: len(lengths) // 2 * 2]))
    config = {"max_seq_length": limit, "truncation": policy}
    account, unlimited = Account(), renderer(tokenizer, max_seq_length=10_000)
    made = list(renderer(tokenizer, **config).examples([Row("x:1", row)], account, Refusals()))
    had = sum(np.count_nonzero(example.weights) for example in unlimited.render(Row("x:1", row)))
    left = sum(np.count_nonzero(example.weights) for example in made)
    assert account.long_supervised_lost == had - left
    assert account.supervised_tokens == left
    assert all(len(example.tokens) <= limit for example in made)
    assert account.long_rows == (len(unlimited.render(Row("x:1", row))[0].tokens) > limit)
    assert account.long_rows_lost == (account.long_rows and not left)


def test_rows_without_a_target_are_counted_and_never_trained() -> None:
    rows = [Row(f"t:{n}", chat("Oi", "O gato mia.") | {"weight": weight}) for n, weight in enumerate((1, 0, 1))]
    account = Account()
    made = [example.id for example in renderer().examples(rows, account, Refusals())]
    assert (made, account.without_target, account.rows, account.examples) == (["t:0", "t:2"], 1, 3, 2)
    account = Account()
    few = renderer(min_supervised_tokens=50)
    assert list(few.examples(rows, account, Refusals())) == []
    assert account.below_minimum == 2


def test_accounts_add_up_and_travel_as_json() -> None:
    def account(*contents: str) -> Account:
        own = Account()
        list(renderer().examples([Row(f"t:{text}", chat("Oi", text)) for text in contents], own, Refusals()))
        return own

    both = account("O gato mia.", "Não.") + account("Sim, claro, e muito mais.", "ok </s> ok")
    assert both.to_json() == account("O gato mia.", "Não.", "Sim, claro, e muito mais.", "ok </s> ok").to_json()
    assert Account.from_json(json.loads(json.dumps(both.to_json()))) == both
    assert both.notes == {"escaped": 1}


def test_the_quick_ways_are_taken() -> None:
    """Otherwise the tests above try the slow ones only: the Rust tokenizer, and the compiled template."""
    made = renderer()
    assert made._encoder._fast is not None
    for number in range(20):
        made.render(Row("x:1", chat("Que som faz o gato?", f"O gato mia {number}.", "E?", "Sim.", system="s")))
    assert made._chat._template.is_quick
    assert set(made._chat._steady.values()) == {3}, "earlier answers are no longer rendered for themselves"


def test_the_quick_ways_are_left_where_they_give_something_else() -> None:
    """A template that looks at a key which only the tokenizer's own way adds, and one that writes last answers otherwise."""
    tokenizer = byte_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    made = renderer(tokenizer)
    made._chat._template._quick = lambda messages, ask: "something else"
    assert trained(made, chat("ab", "cd")) == [["cd<|im_end|>"]]
    assert not made._chat._template.is_quick
    thinking = renderer(byte_tokenizer(THINKING, "<|im_start|>", "<|im_end|>", eos="<|im_end|>"))
    for _ in range(6):
        first, _ = thinking.render(Row("x:1", chat("ab", "cd", "ef", "gh")))
        assert [text for text, weight in runs(thinking, first) if weight] == ["<think>\n</think>\ncd<|im_end|>"]
    assert max(thinking._chat._steady.values()) < 0
    assert (embedded_model() / "tokenizer.json").exists()
