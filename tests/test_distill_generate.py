"""`mlx-qlora distill generate`: prompts in, a data set out, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora import LoraConfig, RunConfig
from mlx_qlora.assets import embedded_model
from mlx_qlora.commands import main
from mlx_qlora.data.render import RenderConfig, Renderer
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.distilling.answers import NAME
from mlx_qlora.distilling.prompts import Prompts, files_of, prompts_of
from mlx_qlora.errors import DataError
from mlx_qlora.look.evaluation.generate import Asking, _sampler, answer
from mlx_qlora.model.load import Loaded, load, load_tokenizer
from mlx_qlora.train import run

DRAWN = ["--answers", "3", "--temperature", "1.2", "--batch-size", "2", "--max-answer-tokens", "10"]


def generate(data: Path | str, out: Path, *more: str, model: str = "embedded") -> int:
    return main(["distill", "generate", "--model", model, "--data", str(data), "--output-dir", str(out), *more])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def written(folder: Path, rows: list[dict[str, Any]], name: str = "prompts.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder / name


@pytest.fixture(scope="module")
def undisturbed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn answers to each of 22 prompts, in groups of 8."""
    folder = tmp_path_factory.mktemp("generated") / "whole"
    assert generate(small_data, folder, *DRAWN) == 0
    return folder


# Answers


def test_greedy_answers_are_those_of_mlx_lm(small_data: Path, tmp_path: Path, embedded: Loaded) -> None:
    from mlx_lm import stream_generate

    assert generate(small_data, tmp_path / "out", "--limit", "6", "--max-answer-tokens", "7") == 0
    kept = {row["source"]: row["messages"][-1]["content"] for row in lines(tmp_path / "out" / "train.jsonl")}
    left = {row["source"]: (row["said"], row["reason"]) for row in lines(tmp_path / "out" / "rejected.jsonl")}
    asked = read_prompts(SourceConfig(data=str(small_data)), most=6).asked
    ends = set()
    for one in asked:
        *_, last = said = list(stream_generate(embedded.model, embedded.tokenizer, list(one.tokens), max_tokens=7))
        text = "".join(each.text for each in said).strip()
        ends.add(last.finish_reason)
        if last.finish_reason == "stop":
            assert kept[one.id] == text
        else:
            assert left[one.id] == (text, "truncated")
    assert len(kept) + len(left) == 6
    assert ends == {"stop", "length"}, "both ends are there to be told apart"


def test_what_is_drawn_follows_from_seed_row_and_number(embedded: Loaded) -> None:
    """However many are answered at once, and whoever else is."""
    prompts = [embedded.tokenizer.encode(text) for text in ("Quem joga?", "O gato", "Onde fica o clube?")]

    def said(order: list[int], rows: int, seed: int = 1) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        names = [f"{place % 3} {place // 3}" for place in order]
        how = Asking(9, 1.2, seed, rows, top_p=0.95)
        own = [prompts[place % 3] for place in order]
        answer(embedded.model, embedded.tokenizer, own, how, lambda n, tokens: found.update({names[n]: tokens}), names=names)
        return found

    whole = said(list(range(9)), 4)
    assert said([7, 2, 5, 0], 1) == {name: whole[name] for name in ("1 2", "2 0", "2 1", "0 0")}
    assert len({tuple(tokens) for tokens in whole.values()}) > 3
    assert said(list(range(9)), 4, seed=2) != whole


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logprobs = mx.repeat(mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]])).astype(mx.bfloat16), 100, axis=0)
    for how, expected in (
        (Asking(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Asking(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),
        (Asking(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0]),
    ):
        draw = _sampler(how, "a")
        often = np.bincount(np.concatenate([np.array(draw(logprobs)) for _ in range(40)]), minlength=4) / 4000
        assert np.abs(often - expected).max() < 0.032  # four standard errors


def test_a_prompt_with_several_answers_is_computed_once(embedded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("O clube joga em casa aos domingos, e a torcida canta. " * 4, "A cidade tem uma ponte velha e um rio largo. " * 5)
    prompts = [embedded.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    seen: list[int] = []
    whole = type(embedded.model).__call__

    def counted(self: Any, tokens: mx.array, *rest: Any, **more: Any) -> Any:
        seen.append(tokens.size if tokens.shape[1] > 1 else 0)
        return whole(self, tokens, *rest, **more)

    monkeypatch.setattr(type(embedded.model), "__call__", counted)
    told: dict[int, list[int]] = {}
    own = [prompt for prompt in prompts for _ in range(5)]
    names = [str(number) for number in range(10)]
    answer(embedded.model, embedded.tokenizer, own, Asking(6, 0.0), lambda n, tokens: told.update({n: tokens}), names=names)
    assert sum(seen) == sum(len(prompt) - 1 for prompt in prompts)
    plain: dict[int, list[int]] = {}
    answer(
        embedded.model,
        embedded.tokenizer,
        prompts,
        Asking(6, 0.0),
        lambda n, tokens: plain.update({n: tokens}),
        names=names[:2],
    )
    assert [told[number] for number in range(10)] == [plain[0]] * 5 + [plain[1]] * 5


# Broken off


def test_a_kill_costs_nothing_that_was_whole(undisturbed: Path, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["distill", "generate", "--model", "embedded", "--data", str(small_data), "--output-dir", str(out), *DRAWN]
    process = subprocess.Popen([sys.executable, "-m", "mlx_qlora", *command], stdout=subprocess.DEVNULL)
    while process.poll() is None and '"group"' not in ((out / NAME).read_text() if (out / NAME).exists() else ""):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "train.jsonl").exists()
    there = (out / NAME).read_bytes()
    (out / NAME).write_bytes(there + b'{"number": 61, "text": "half of a gro')
    before = there.count(b'"group"')
    assert 0 < before < 9
    assert main(command) == 0
    for name in ("train.jsonl", "valid.jsonl", "rejected.jsonl"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    first, second = ([{**each, "seconds": 0} for each in lines(folder / NAME)] for folder in (out, undisturbed))
    assert first == second


def test_ctrl_c_says_what_is_kept(small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mlx_qlora", "distill", "generate", "--model", "embedded", "--data", str(small_data)]
    process = subprocess.Popen(
        [*command, "--output-dir", str(out), *DRAWN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    while process.poll() is None and '"group"' not in ((out / NAME).read_text() if (out / NAME).exists() else ""):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, wrong = process.communicate()
    kept = sum("number" in line for line in lines(out / NAME))
    assert process.returncode == 130, wrong
    assert f"{kept} of 66 answers are kept in {out / NAME}; the same command goes on" in said
    assert "Traceback" not in wrong


def test_other_filters_ask_nobody_again(undisturbed: Path, small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (undisturbed / name).read_bytes() for name in ("train.jsonl", "valid.jsonl", NAME)}
    assert generate(small_data, undisturbed, *DRAWN, "--keep", "first") == 0
    assert "66 of 66 answers are there already" in capsys.readouterr().out
    rows = lines(undisturbed / "train.jsonl") + lines(undisturbed / "valid.jsonl")
    sources = [row["source"].partition("#")[0] for row in rows]
    assert len(set(sources)) == len(sources)
    assert generate(small_data, undisturbed, *DRAWN) == 0
    assert {name: (undisturbed / name).read_bytes() for name in before} == before


def test_another_generation_is_replaced_only_when_asked(
    undisturbed: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert generate(small_data, out, "--limit", "3", "--max-answer-tokens", "20") == 0
    before = (out / "train.jsonl").read_bytes()
    assert generate(small_data, out, "--limit", "3", "--max-answer-tokens", "21") == 2
    said = capsys.readouterr().err
    assert f"{out} holds the answers of another generation (max_answer_tokens 20 there, 21 here)" in said
    assert (out / "train.jsonl").read_bytes() == before
    assert generate(small_data, out, "--limit", "2", "--max-answer-tokens", "21", "--overwrite") == 0
    assert len(lines(out / "train.jsonl")) == 2
    assert generate(small_data, small_data, "--overwrite") == 2
    assert "which no generation wrote" in capsys.readouterr().err


# What is written


def test_the_files_say_what_happened(undisturbed: Path) -> None:
    told = json.loads((undisturbed / "generation.json").read_text(encoding="utf-8"))
    train, valid, rejected = (lines(undisturbed / f"{name}.jsonl") for name in ("train", "valid", "rejected"))
    assert told["prompts"] == 22
    assert told["answers"] == 66 == told["kept"] + sum(told["rejected"].values())
    assert told["kept"] == len(train) + len(valid)
    assert sum(told["rejected"].values()) == len(rejected)
    assert {reason: sum(row["reason"] == reason for row in rejected) for reason in told["rejected"]} == told["rejected"]
    assert told["answer_tokens"] == sum(each.get("tokens", 0) for each in lines(undisturbed / NAME))
    assert not {row["source"].partition("#")[0] for row in valid} & {row["source"].partition("#")[0] for row in train}
    assert valid, "several answers to a prompt: some prompts are for validation"
    card = (undisturbed / "README.md").read_text(encoding="utf-8")
    assert "| kept | " + str(told["kept"]) in card
    assert "licence of the teacher" in card


def test_a_student_learns_from_it(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(undisturbed), "--model", "embedded", "--data-cache", "off"]) == 0
    assert "can't be used" not in capsys.readouterr().out
    config = RunConfig(
        model="embedded", data=str(undisturbed), data_cache="off", output_dir=str(tmp_path / "run"), max_steps=2,
        batch_size=8, learning_rate=5e-3, lora=LoraConfig(rank=4),
    )  # fmt: skip
    run(config, quiet=True)
    first, last = (lines(tmp_path / "run" / "training_metrics.jsonl")[place] for place in (0, -1))
    assert last["step"] == 2
    assert np.isfinite(first["val_loss"])


def read_prompts(source: SourceConfig, system: str = "", most: int | None = None, base: bool = False) -> Prompts:
    tokenizer = load_tokenizer("embedded")
    if base:
        tokenizer.chat_template, tokenizer.has_chat_template = None, False
    renderer = Renderer(tokenizer, RenderConfig(), source)
    return prompts_of(files_of(find(source, training=False), None)[1], renderer, source, system, most)


ANSWER = {"role": "assistant", "content": "A."}
U, S, A = (
    {"role": role, "content": text} for role, text in (("user", "Quem?"), ("system", "Seja breve."), ("assistant", "Eu."))
)
# name: (row, what is written of it without a system message, and with one)
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "prompt alone": ({"prompt": "Quem?", "id": 7}, {"prompt": "Quem?", "completion": "A.", "id": 7},
                     {"system": "S.", "prompt": "Quem?", "completion": "A.", "id": 7}),
    "prompt and completion": ({"prompt": "Quem?", "completion": "Ele.", "weight": 2.0},
                              {"prompt": "Quem?", "completion": "A.", "weight": 2.0},
                              {"system": "S.", "prompt": "Quem?", "completion": "A.", "weight": 2.0}),
    "question alone": ({"question": "Quem?", "task": "t"}, {"messages": [U, ANSWER], "task": "t"},
                       {"messages": [{"role": "system", "content": "S."}, U, ANSWER], "task": "t"}),
    "question and answer": ({"question": "Quem?", "answer": "Ele.", "rationale": "Porque sim."}, {"messages": [U, ANSWER]},
                            {"messages": [{"role": "system", "content": "S."}, U, ANSWER]}),
    "instruction": ({"instruction": "Diga:", "input": "quem?", "output": ""},
                    {"messages": [{"role": "user", "content": "Diga:\n\nquem?"}, ANSWER]},
                    {"messages": [{"role": "system", "content": "S."}, {"role": "user", "content": "Diga:\n\nquem?"}, ANSWER]}),
    "messages of the user": ({"messages": [U]}, {"messages": [U, ANSWER]},
                             {"messages": [{"role": "system", "content": "S."}, U, ANSWER]}),
    "a conversation": ({"messages": [S, U, A, {"role": "user", "content": "E?"}, A]},
                       {"messages": [S, U, {**A, "train": False}, {"role": "user", "content": "E?"}, ANSWER]},
                       {"messages": [S, U, {**A, "train": False}, {"role": "user", "content": "E?"}, ANSWER]}),
    "a conversation up to the user": ({"messages": [U, A, {"role": "user", "content": "E?"}]},
                                      {"messages": [U, {**A, "train": False}, {"role": "user", "content": "E?"}, ANSWER]},
                                      {"messages": [{"role": "system", "content": "S."}, U, {**A, "train": False},
                                                    {"role": "user", "content": "E?"}, ANSWER]}),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Quem?"}]}, {"messages": [U, ANSWER]},
                 {"messages": [{"role": "system", "content": "S."}, U, ANSWER]}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_kind_of_row_is_asked_and_comes_back(name: str, tmp_path: Path) -> None:
    from mlx_qlora.distilling.prompts import answered

    row, plain, with_system = SHAPES[name]
    source = SourceConfig(data=str(written(tmp_path, [row])))
    tokenizer = load_tokenizer("embedded")
    for system, expected in (("", plain), ("S.", with_system)):
        (one,) = read_prompts(source, system).asked
        back = answered(one, "A.", 1, {})
        assert back.pop("source") == "prompts.jsonl:1"
        assert back == expected
        messages = expected.get("messages") or [
            *([{"role": "system", "content": system}] if system else []),
            {"role": "user", "content": expected["prompt"]},
            ANSWER,
        ]
        shown = [{key: value for key, value in message.items() if key != "train"} for message in messages[:-1]]
        assert list(one.tokens) == tokenizer.apply_chat_template(shown, add_generation_prompt=True)
    hidden = answered(one, "A.", 2, {}, without_system="S.")
    assert hidden.pop("source") == "prompts.jsonl:1#2"
    assert hidden == plain


def test_a_base_model_goes_on_with_the_prompt_as_it_stands(tmp_path: Path) -> None:
    """The space between a text and what comes after it is not lost."""
    model = tmp_path / "base"
    shutil.copytree(embedded_model(), model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    data = written(tmp_path, [{"prompt": "A bola está na"}, {"prompt": "O gato "}])
    assert generate(data, tmp_path / "out", "--max-answer-tokens", "40", model=str(model)) == 0
    loaded = load(str(model))
    renderer = Renderer(loaded.tokenizer, RenderConfig(), SourceConfig(data=str(data)))
    prompts = [renderer.pair_prompt(text) for text in ("A bola está na", "O gato ")]
    whole: dict[int, str] = {}

    def tell(number: int, said: list[int]) -> None:
        whole[number] = loaded.tokenizer.decode([*prompts[number], *said], skip_special_tokens=True)

    answer(loaded.model, loaded.tokenizer, prompts, Asking(40), tell, names=["a", "b"])
    rows = lines(tmp_path / "out" / "train.jsonl")
    assert {row["source"]: row["prompt"] + row["completion"] for row in rows} == {
        "prompts.jsonl:1": whole[0], "prompts.jsonl:2": whole[1]
    }  # fmt: skip
    assert rows[0]["completion"].startswith(" ")


def test_other_columns_and_prompts_that_come_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("pergunta,tema\nQuem?,a\nOnde?,b\nQuem?,c\n", encoding="utf-8")
    found = read_prompts(SourceConfig(data=str(path), fields={"question": "pergunta"}, format="question"))
    assert [(one.id, one.text, one.expected) for one in found.asked] == [
        ("prompts.csv:2", "Quem?", ""),
        ("prompts.csv:3", "Onde?", ""),
    ]
    assert found.again == 1
    path.write_text('messages\n"[{""role"": ""user"", ""content"": ""Quem?""}]"\n', encoding="utf-8")
    assert [one.text for one in read_prompts(SourceConfig(data=str(path))).asked] == ["Quem?"]


WRONG = {
    "text": ({"text": "Era uma vez."}, "a text came; a prompt, a question or a conversation is expected"),
    "nothing of the user": ({"messages": [S, A]}, "no message of the user comes before the answer"),
    "a strange role": ({"messages": [{"role": "bot", "content": "?"}]}, "messages[0].role: 'bot' came"),
    "an empty prompt": ({"question": " "}, "question: an empty text"),
    "other keys": ({"x": 1}, "'x' came"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_can_not_be_asked_are_named(name: str, tmp_path: Path) -> None:
    row, said = WRONG[name]
    path = written(tmp_path, [{"prompt": "Quem?"}, row])
    with pytest.raises(DataError) as error:
        read_prompts(SourceConfig(data=str(path)))
    assert f"prompts.jsonl:2: {said}" in str(error.value)
    skipped = read_prompts(SourceConfig(data=str(path), malformed="skip"))
    assert (len(skipped.asked), skipped.malformed) == (1, 1)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--answers", "2"], "temperature: 0.0 came, for several answers to a prompt a number above 0"),
        (["--top-p", "0.9"], "top_p: 0.9 came, with temperature 0"),
        (["--temperature", "1", "--top-p", "0"], "top_p: 0.0 came"),
        (["--limit", "0"], "limit: 0 came"),
        (["--split", "test"], "no test rows, but train and valid"),
        (["--check-pattern", "["], "check_pattern: '[' came"),
        (["--check", "nowhere:f"], "--check nowhere:f: nowhere can't be imported"),
        (["--model", "nowhere"], "nowhere: there is no such folder"),
        (["--adapters", "nowhere"], "--adapters nowhere: no adapters.safetensors"),
        (["--config", "nowhere.yaml"], "nowhere.yaml can't be read"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left_behind(
    more: list[str], said: str, tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        (data / name).write_bytes((small_data / name).read_bytes())
    assert generate(data, tmp_path / "out", *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "generate", "--data", "embedded"]) == 2
    assert "--model, --output-dir are missing" in capsys.readouterr().err


def test_a_file_with_settings_names_teacher_and_data(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(f"model: student\ndata: {small_data}\ndistill:\n  teacher: embedded\n", encoding="utf-8")
    out = tmp_path / "out"
    given = ["--config", str(tmp_path / "run.yaml"), "--output-dir", str(out), "--limit", "2", "--max-answer-tokens", "2"]
    assert main(["distill", "generate", *given]) == 3
    told = capsys.readouterr().out
    assert "WARNING   2 of 2 answers are left out. What to try:" in told
    assert "a larger --max-answer-tokens" in told
    assert "mlx-qlora train" not in told
    assert not (out / "train.jsonl").exists()
    assert [row["reason"] for row in lines(out / "rejected.jsonl")] == ["truncated"] * 2
