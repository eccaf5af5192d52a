"""`mlx-qlora evaluate`, from a folder to its files."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import pytest
from conftest import make_examples, tiny_model
from mlx_lm.generate import BatchGenerator

from mlx_qlora import LoraConfig, RunConfig
from mlx_qlora.assets import embedded_data
from mlx_qlora.commands import main
from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.data.part import open_part
from mlx_qlora.data.render import Question, RenderConfig
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.look.evaluation.answering import NAME, SoFar
from mlx_qlora.look.evaluation.compared import RIGHT_OR_WRONG
from mlx_qlora.look.evaluation.generate import Asking, generate, generate_answers
from mlx_qlora.look.history import read_history
from mlx_qlora.look.measure import measure
from mlx_qlora.model.load import Loaded, load_tokenizer
from mlx_qlora.objectives.sft import sft
from mlx_qlora.plan import forward_layout
from mlx_qlora.run import folder as run_folder
from mlx_qlora.train import run

FILES = {
    "evaluation_report.json", "evaluation_summary.csv", "evaluation_losses.jsonl", "predictions.jsonl", "evaluation_scores.png",
}  # fmt: skip
SHORT = ["--questions", "5", "--max-answer-tokens", "12"]


@pytest.fixture(scope="module")
def trained(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained for a few updates, with test rows beside its data."""
    folder = tmp_path_factory.mktemp("evaluated")
    rows = (embedded_data() / "test.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (small_data / "test.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = RunConfig(
        model="embedded", data=str(small_data), output_dir=str(folder / "run"), max_steps=6, eval_every=3, batch_size=4,
        learning_rate=5e-3, lora=LoraConfig(rank=4),
    )  # fmt: skip
    run(config, quiet=True)
    return folder / "run"


def report_of(folder: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the report")

    found: dict[str, Any] = json.loads((folder / "evaluation_report.json").read_text(), parse_constant=refuse)
    return found


def evaluated(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def test_the_loss_is_the_runs_own_at_its_best(trained: Path, tmp_path: Path) -> None:
    assert evaluated("--run", trained, "--split", "valid", "--questions", 0, "--output-dir", tmp_path / "out") == 0
    best = read_history(trained).best
    assert best is not None
    report = report_of(tmp_path / "out")
    assert report["loss"]["value"] == pytest.approx(best[0].val_loss, rel=1e-5)
    assert report["loss"]["se"] == pytest.approx(best[0].val_loss_se, rel=1e-5)
    assert report["perplexity"]["value"] == pytest.approx(math.exp(best[0].val_loss), rel=1e-5)
    assert report["base_loss"]["value"] > report["loss"]["value"] + 1
    assert report["loss_difference"]["high"] < 0
    assert report["questions"] == 0
    assert any("validation rows chose the best adapters" in note for note in report["notes"])


def test_a_seed_for_answers_takes_no_other_rows_than_the_run_split_off(trained: Path, small_data: Path, tmp_path: Path) -> None:
    """Else the model would be asked what it was trained on."""
    copied, rows = Path(shutil.copytree(trained, tmp_path / "run")), tmp_path / "rows.jsonl"
    shutil.copy(small_data / "train.jsonl", rows)
    config = (copied / "config.yaml").read_text()
    assert str(small_data) in config
    (copied / "config.yaml").write_text(config.replace(str(small_data), str(rows)))
    ids = []
    for seed in (0, 7):
        out = tmp_path / str(seed)
        named = tmp_path / "run" / ".." / "rows.jsonl"  # the same file
        given = ("--run", copied, "--data", named, "--questions", 0, "--seed", seed, "--no-base", "--output-dir", out)
        assert evaluated(*given) == 0
        ids.append([json.loads(line)["id"] for line in (out / "evaluation_losses.jsonl").read_text().splitlines()])
    assert ids[0] == ids[1]


def test_a_whole_evaluation(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert evaluated("--run", trained, "--output-dir", out, *SHORT) == 0
    assert {path.name for path in out.iterdir()} == FILES
    report = report_of(out)
    assert (report["split"], report["rows"], report["questions"], report["loss"]["examples"]) == ("test", 8, 5, 8)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"test.jsonl:{number}" for number in range(1, 6)]
    assert lines[0].keys() == {"id", "question", "expected", "answer", "base", "scores", "base_scores"}
    for name, score in report["scores"].items():
        known = [line for line in lines if name in line["scores"]]
        mean = sum(line["scores"][name] for line in known) / len(known)
        base = sum(line["base_scores"][name] for line in known) / len(known)
        assert (score["tuned"]["value"], score["tuned"]["n"]) == (pytest.approx(mean), len(known))
        assert score["difference"]["value"] == pytest.approx(mean - base)
        if len({line["base_scores"][name] for line in known}) == 1 and name not in RIGHT_OR_WRONG:
            assert score["base"]["low"] is score["base"]["high"] is None
        else:
            assert score["base"]["low"] <= base <= score["base"]["high"]
    assert {"exact_match", "token_f1", "rouge_l", "chrf", "numeric_accuracy"} == report["scores"].keys()
    with (out / "evaluation_summary.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["score", "model", "value", "low", "high", "n"]
    in_table = {(row["score"], row["model"]): row for row in table}
    assert float(in_table["chrf", "base"]["value"]) == report["scores"]["chrf"]["base"]["value"]
    assert float(in_table["loss", "difference"]["value"]) == report["loss_difference"]["value"]
    assert report["worst"][0] in [line["id"] for line in lines]
    assert report["versions"]["sacrebleu"]
    assert report["settings"]["max_answer_tokens"] == 12
    said = capsys.readouterr().out
    assert "fewer than 30 questions" in said
    assert "the worst answers" in said


def test_adapters_anywhere_give_the_same(trained: Path, small_data: Path, tmp_path: Path) -> None:
    """The run; its adapters and its last checkpoint by name, without a word of the run's settings."""
    short = ["--no-base", *SHORT]
    assert evaluated("--run", trained, "--output-dir", tmp_path / "run", *short) == 0
    named = ["--model", "embedded", "--data", small_data / "test.jsonl", *short]
    last = max(trained.glob("checkpoint_*"), key=lambda path: int(path.name.rpartition("step")[2]))
    for number, adapters in enumerate((trained / "adapters", last)):
        out = tmp_path / str(number)
        assert evaluated(*named, "--adapters", adapters, "--output-dir", out) == 0
        same, other = report_of(tmp_path / "run"), report_of(out)
        assert other["loss"] == same["loss"]
        assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "run" / "predictions.jsonl").read_bytes()


def test_a_model_alone(trained: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without adapters what was the base is what is reported; without the base, nothing stands beside it."""
    assert evaluated("--run", trained, "--output-dir", tmp_path / "run", *SHORT) == 0
    beside = report_of(tmp_path / "run")
    named = ["--model", "embedded", "--data", small_data / "test.jsonl", *SHORT]
    assert evaluated(*named, "--output-dir", tmp_path / "model") == 0
    assert evaluated("--run", trained, "--no-base", "--output-dir", tmp_path / "alone", *SHORT) == 0
    model, alone = report_of(tmp_path / "model"), report_of(tmp_path / "alone")
    assert (model["loss"], model["adapters"], model["base_loss"]) == (beside["base_loss"], None, None)
    assert model["scores"]["chrf"] == {"tuned": beside["scores"]["chrf"]["base"]}
    assert alone["loss"] == beside["loss"]
    assert alone["scores"]["chrf"] == {"tuned": beside["scores"]["chrf"]["tuned"]}
    assert "base" not in json.loads((tmp_path / "alone" / "predictions.jsonl").read_text().splitlines()[0])
    assert "chrf,model," in (tmp_path / "model" / "evaluation_summary.csv").read_text()


def test_the_files_lie_in_the_run_and_go_with_it(trained: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    done = subprocess.run(
        [sys.executable, "-m", "mlx_qlora", "evaluate", "--run", str(copied), *SHORT], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in copied.iterdir()} >= FILES
    run_folder.clear(copied)
    assert not FILES & {path.name for path in copied.iterdir()}


def test_many_at_once_answer_as_one_by_one(embedded: Loaded) -> None:
    """More questions than are answered at once, of many lengths, some behind a common beginning: mlx_lm.generate says the
    same to each alone."""
    from mlx_lm import generate as alone

    encode, config = embedded.tokenizer.encode, SourceConfig(data="embedded", data_cache="off")
    part = open_part(find(config), config, RenderConfig(), embedded.tokenizer, 0)
    texts = ["Quem joga?", "Onde?", "A cidade fica longe daqui, na serra?", "O gato mia.", "Por quê?"]
    apart = [encode(text * (1 + number % 3), add_special_tokens=False) for number, text in enumerate(texts * 3)]
    for prompts in ([question.prompt for question in part.questions(14)], apart):
        questions = [Question(str(number), "", tuple(prompt), "") for number, prompt in enumerate(prompts)]
        told: dict[int, str] = {}
        generate(embedded.model, embedded.tokenizer, questions, Asking(10, at_once=3), told.update)
        expected = [alone(embedded.model, embedded.tokenizer, list(prompt), max_tokens=10).strip() for prompt in prompts]
        assert [told[number] for number in range(len(prompts))] == expected
        assert len(set(expected)) > 2


def test_answers_can_be_drawn_and_are_the_same_for_a_seed(embedded: Loaded) -> None:
    prompt = tuple(embedded.tokenizer.encode("O gato", add_special_tokens=False))
    questions = [Question(str(number), "", prompt, "") for number in range(4)]

    def drawn(seed: int) -> list[str]:
        told: dict[int, str] = {}
        generate(embedded.model, embedded.tokenizer, questions, Asking(8, temperature=1.5, seed=seed), told.update)
        return [told[number] for number in range(4)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 1


def test_where_memory_ends_fewer_are_asked_at_once(embedded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked, told = BatchGenerator.next_generated, [], []

    def next_generated(self: BatchGenerator) -> Any:
        asked.append(self.completion_batch_size)
        if self.completion_batch_size > 2 and len(asked) > 2:  # some answers are half done
            raise RuntimeError("[metal::malloc] Unable to allocate 3 bytes")
        return whole(self)

    prompts = [tuple(embedded.tokenizer.encode(text)) for text in ("Quem joga?", "Onde fica?", "O gato mia", "A cidade")]
    questions = [Question(str(number), "", prompt, "") for number, prompt in enumerate(prompts)]
    expected = generate_answers(embedded.model, embedded.tokenizer, questions, 6)
    monkeypatch.setattr(BatchGenerator, "next_generated", next_generated)
    answers: dict[int, str] = {}
    generate(embedded.model, embedded.tokenizer, questions, Asking(6), answers.update, told.append)
    assert [answers[number] for number in range(4)] == expected
    assert asked[0] == 32
    assert asked[-1] <= 2
    assert told


def test_nothing_to_ask_is_no_error(embedded: Loaded) -> None:
    assert generate_answers(embedded.model, embedded.tokenizer, [], 4) == []
    assert generate_answers(embedded.model, embedded.tokenizer, [Question("a", "", (), "")], 4) == [""]


ODD = {
    "no questions": ([{"text": "O clube joga em casa aos domingos."}] * 3, 0),
    "one question": ([{"prompt": "Quem joga?", "completion": "O clube."}], 1),
    "all answers the same": ([{"prompt": f"{n}?", "completion": "sim"} for n in range(6)], 6),
    "only signs expected": ([{"prompt": "Quem?", "completion": "?!"}, {"prompt": "E?", "completion": "🙂"}], 2),
    "many scripts": ([{"prompt": "你好", "completion": "東京です"}, {"prompt": "क्या?", "completion": "नमस्ते"}], 2),
    "longer than the model": ([{"prompt": "O que faz o gato?", "completion": "O gato mia. " * 300}], 1),
    "labels": ([{"prompt": f"{n}?", "completion": ("sim", "não")[n % 2]} for n in range(8)], 8),
}


@pytest.mark.parametrize("name", list(ODD))
def test_odd_data(name: str, tmp_path: Path) -> None:
    rows, questions = ODD[name]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", "embedded", "--data", data, "--output-dir", tmp_path / "out", "--max-answer-tokens", 3]
    assert evaluated(*arguments) == 0
    report = report_of(tmp_path / "out")
    assert (report["questions"], report["split"], report["loss"]["examples"]) == (questions, "train", len(rows))
    assert (report["labels"] == ["não", "sim"]) == (name == "labels")
    assert any("longer than the 1,024 tokens" in note for note in report["notes"]) == (name == "longer than the model")
    assert (tmp_path / "out" / "evaluation_confusion.png").exists() == (name == "labels")
    if questions:
        assert 0 <= report["scores"]["exact_match"]["tuned"]["value"] <= 1


def test_a_score_of_ones_own_and_labels_by_name(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_the_verb.py").write_text("def letters(answer, expected):\n    return len(expected) * 100\n")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a?", "completion": "sim"}\n{"prompt": "b?", "completion": "Não."}\n')
    monkeypatch.chdir(tmp_path)
    named = ["--model", "embedded", "--data", "d.jsonl", "--output-dir", "out", "--max-answer-tokens", 3]
    assert evaluated(*named, "--metric", "mine_for_the_verb:letters", "--labels", "sim,não,talvez") == 0
    report = report_of(tmp_path / "out")
    assert report["scores"]["letters"]["tuned"]["value"] == 350
    assert report["classes"]["talvez"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert [each["support"] for each in report["classes"].values()] == [1, 1, 0]


def task_rows() -> dict[str, list[dict[str, str]]]:
    """Three tasks as BIG-Bench Hard writes them; nobody knows the answers."""
    return {
        "boolean_expressions": [{"input": f"not {n} is", "target": ("True", "False")[n % 2]} for n in range(5)],
        "object_counting": [{"input": f"{n} cats and {n} dogs?", "target": str(2 * n)} for n in range(4)],
        "word_sorting": [{"input": f"Sort {n}", "target": "gato o"} for n in range(3)],
    }


def test_tasks_of_a_folder_with_a_file_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one object with examples, over many lines or in one; each is scored by its kind, and the mean counts each the same."""
    (tmp_path / "bbh").mkdir()
    for number, (name, rows) in enumerate(task_rows().items()):
        text = json.dumps({"canary": 'a "GUID"', "examples": rows}, indent=number or None)
        (tmp_path / "bbh" / f"{name}.json").write_text(text)
    given = ["--model", "embedded", "--data", tmp_path / "bbh", "--max-answer-tokens", 3, "--data-cache", "off"]
    assert evaluated(*given, "--output-dir", tmp_path / "out", "--limit-per-task", 4) == 0
    report = report_of(tmp_path / "out")
    kinds = {task: each["kind"] for task, each in report["tasks"].items()}
    assert kinds == {"boolean_expressions": "option", "object_counting": "number", "word_sorting": "text"}
    assert [each["tuned"]["n"] for each in report["tasks"].values()] == [4, 4, 3]
    assert report["final"]["score"] == "final_answer"
    assert report["labels"] is None
    mean = sum(each["tuned"]["value"] for each in report["tasks"].values()) / 3
    assert report["mean_over_tasks"]["tuned"]["value"] == pytest.approx(mean)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["boolean_expressions"] * 4 + ["object_counting"] * 4 + ["word_sorting"] * 3
    with (tmp_path / "out" / "evaluation_summary.csv").open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row["score"] == "final_answer"]
    assert [row["task"] for row in table] == ["", "boolean_expressions", "object_counting", "word_sorting"]
    said = capsys.readouterr().out
    assert "mean over tasks" in said
    assert "no final answer found: " in said
    assert "two models have to be" in said
    # The same rows in one file, each with its task, are the same questions.
    rows = [{"task": task} | row for task, those in task_rows().items() for row in those]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given[3] = tmp_path / "all.jsonl"
    assert evaluated(*given, "--output-dir", tmp_path / "again", "--limit-per-task", 4) == 0
    assert report_of(tmp_path / "again")["tasks"] == report["tasks"]


def test_numbers_at_the_end_of_rationales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GSM8K's rows: what is expected is the number after the mark; answers without a number are counted apart."""
    rows = [{"question": f"{n} e {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n:,}"} for n in (1, 600)]
    (tmp_path / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", "embedded", "--data", tmp_path / "gsm.jsonl", "--max-answer-tokens", 3, "--data-cache", "off"]
    assert evaluated(*given, "--output-dir", tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    none = sum(not any(letter.isdigit() for letter in line["answer"]) for line in lines)
    assert report["final"] == {"score": "final_number", "without": {"tuned": {"answers": none, "of": 2}}}
    assert "numeric_accuracy" not in report["scores"]
    assert evaluated(*given, "--output-dir", tmp_path / "as", "--score-as", "option") == 0
    assert report_of(tmp_path / "as")["final"]["score"] == "final_option"
    (tmp_path / "gsm.jsonl").write_text('{"question": "a?", "answer": "3"}\n{"question": "b?", "answer": "four"}\n')
    capsys.readouterr()
    assert evaluated(*given, "--output-dir", tmp_path / "no", "--score-as", "number") == 2
    err = capsys.readouterr().err
    assert "--score-as number: 1 of 2 expected answers have no number in them, such as 'four' in gsm.jsonl:2" in err
    assert not (tmp_path / "no").exists()


def test_what_was_answered_before_it_was_broken_off_is_kept(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that is interrupted between answers; the next one asks only what is left, and writes the same."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "evaluation_report.json").write_text("of before")
    command = [sys.executable, "-m", "mlx_qlora", "evaluate", "--run", str(trained), "--output-dir", str(out)]
    command += ["--batch-size", "1", "--max-answer-tokens", "40"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    unfinished, began = out / NAME, time.monotonic()
    while process.poll() is None and time.monotonic() - began < 60:
        if unfinished.exists() and unfinished.read_text().count("\n") > 2:
            os.kill(process.pid, signal.SIGINT)
            break
        time.sleep(0.01)
    said, err = process.communicate()
    assert (process.returncode, err) == (130, "mlx-qlora evaluate: interrupted\n")
    assert "the same command goes on from there" in said
    assert {path.name: path.read_text() for path in out.iterdir() if path != unfinished} == {
        "evaluation_report.json": "of before"
    }
    before = unfinished.read_text().splitlines()[1:]
    unfinished.write_text(unfinished.read_text() + '{"model": "tuned", "id": "test.jsonl:7", "ans')  # half a line
    assert main(command[3:]) == 0
    assert f"{len(before)} answers of an evaluation that was broken off are taken over" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    whole = tmp_path / "whole"
    assert evaluated("--run", trained, "--output-dir", whole, "--max-answer-tokens", 40) == 0
    assert (out / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()


def test_answers_to_something_else_are_not_taken_over(tmp_path: Path) -> None:
    asked = [Question("a", "", (1, 2), ""), Question("b", "", (3,), "")]
    first = SoFar(tmp_path, ("model", 8), asked)
    with first.keeping("tuned", [1]) as tell:
        tell({0: "b's"})
    assert SoFar(tmp_path, ("model", 8), asked).left("tuned") == [0]
    for told, questions in ((("model", 9), asked), (("model", 8), asked[:1])):
        other = SoFar(tmp_path, told, questions)
        assert other.taken_over == 0
        assert len(other.left("tuned")) == len(questions)


# What is done to a folder with a copy of the run, arguments, and pieces of what is said.
WRONG: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "nothing": (lambda p: None, [], ["--model, --data, --output-dir are missing", "--run RUN"]),
    "no output": (lambda p: None, ["--model", "embedded", "--data", "embedded"], ["--output-dir is missing"]),
    "no such run": (lambda p: None, ["--run", "nowhere"], ["--run nowhere: there is nothing", "--output-dir"]),
    "no run in it": (lambda p: (p / "x").mkdir(), ["--run", "x"], ["--run x: there is no config.yaml in it"]),
    "not validated": (
        lambda p: (p / "run/adapters/adapters.safetensors").unlink(), ["--run", "run"], ["the run has not validated"],
    ),
    "broken adapters": (
        lambda p: (p / "run/adapters/adapters.safetensors").write_bytes(b"x" * 99), ["--run", "run"], ["can't be read"],
    ),
    "no adapters": (lambda p: None, ["--run", "run", "--adapters", "data"], ["no adapters.safetensors in it"]),
    "no scale": (lambda p: (p / "run/adapters/adapter_config.json").unlink(), ["--run", "run"], ["says the scale"]),
    "of another kind": (
        lambda p: (p / "run/adapters/adapter_config.json").write_text('{"fine_tune_type": "dora"}'), ["--run", "run"],
        ["fine_tune_type 'dora': only lora is read"],
    ),
    "data gone": (lambda p: (p / "data").rename(p / "d"), ["--run", "run"], ["there is no such file", "say --data"]),
    "no test rows": (
        lambda p: (p / "data/test.jsonl").unlink(), ["--run", "run", "--split", "test"],
        ["--split test: data has no test rows, but train and valid"],
    ),
    "output a file": (lambda p: (p / "f").write_text(""), ["--run", "run", "--output-dir", "f/g"], ["f is no folder"]),
    "metric": (lambda p: None, ["--run", "run", "--metric", "math:nothing"], ["--metric math:nothing: math has no nothing"]),
    "metric fails": (lambda p: None, ["--run", "run", "--metric", "math:sqrt"], ["--metric math:sqrt: it raised TypeError"]),
    "labels": (lambda p: None, ["--run", "run", "--labels", "sim,não"], ["8 of 8 expected answers are none", "test.jsonl:1"]),
    "one label": (lambda p: None, ["--run", "run", "--labels", "sim"], ["labels: ('sim',) came, two or more"]),
    "like labels": (lambda p: None, ["--run", "run", "--labels", "sim,Sim."], ["differ in case or punctuation only"]),
    "numbers": (
        lambda p: None, ["--run", "run", "--questions", "-1", "--batch-size", "0"], ["questions: -1", "batch_size: 0"],
    ),
    "too long": (lambda p: None, ["--run", "run", "--max-seq-length", "8"], ["longer than max_seq_length 8"]),
    "no config": (lambda p: (p / "run/config.yaml").write_text("epochs: two\n"), ["--run", "run"], ["config.yaml:1: epochs"]),
    "no harness": (lambda p: None, ["--run", "run", "--harness", "gsm8k"], ["'mlx-qlora[harness]'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_input_is_one_message(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    shutil.copytree(read_history(trained).settings["data"], "data", ignore=shutil.ignore_patterns(".*"))
    text = Path("run/config.yaml").read_text()
    Path("run/config.yaml").write_text(text.replace(read_history(trained).settings["data"], "data"))
    break_it, arguments, pieces = WRONG[name]
    break_it(tmp_path)
    if name == "no harness":
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    before = sorted(path for path in tmp_path.rglob("*") if ".mlx_qlora" not in path.parts)
    assert evaluated(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("mlx-qlora evaluate: ")
    for piece in pieces:
        assert any(option in " ".join(err.split()) for option in piece.split("|")), err
    assert sorted(path for path in tmp_path.rglob("*") if ".mlx_qlora" not in path.parts) == before


def test_tasks_of_the_harness(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of one's own, in the real harness, with a question that every model of this tokenizer gets right."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "d.json").write_text('{"q": "O clube", "a": "joga", "b": "xqzk xqzk xqzk"}\n')
    (tmp_path / "little.yaml").write_text(
        f"task: little_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'd.json'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{[a, b]}}'\n"
        "doc_to_target: 0\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    arguments = ["--harness", "little_choice", "--harness-include-path", tmp_path, "--output-dir", tmp_path / "out"]
    command = [sys.executable, "-m", "mlx_qlora", "evaluate", "--run", trained, "--questions", 0, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    harness = report_of(tmp_path / "out")["harness"]
    assert harness["tuned"]["little_choice"]["acc,none"] == harness["base"]["little_choice"]["acc,none"] == 1
    assert "little_choice acc" in done.stdout


def test_tiny_models_of_other_kinds_are_asked_too() -> None:
    """Gemma-2's attention does not pack, and its cache rotates."""

    examples = make_examples(9)
    for shape in ("mistral", "gemma2", "gemma3"):
        model = tiny_model(shape)
        found = measure(model, sft(), lay_out(examples, forward_layout(model, examples)), examples)
        plain = measure(model, sft(), lay_out(examples, Layout(Kind.PLAIN)), examples)
        assert found.mean == pytest.approx(plain.mean, rel=1e-5)


def test_adapters_of_another_model_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"lora_parameters": {"scale": 2.0}}')
    arrays = {f"model.blocks.0.q_proj.lora_{side}": mx.zeros((4, 4)) for side in "ab"}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    given = ["--model", "embedded", "--data", "embedded", "--adapters", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    assert main(["evaluate", *given]) == 2
    assert "these adapters are of another model: model.blocks.0.q_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_may_come_first_without_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert main(["evaluate", str(tmp_path), "--questions", "0"]) == 2
    assert "config.yaml: it names no model or no data" in capsys.readouterr().err


# Raw text of which a run trained windows

TEXT = "".join(f"O clube {number} joga em casa aos domingos, e a cidade {number % 7} fica longe.\n" for number in range(1100))


@pytest.fixture(scope="module")
def on_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one text of more than 64 KB, which comes in pieces, and one on five texts."""
    folder = tmp_path_factory.mktemp("text")
    assert len(TEXT.encode()) > 2**16
    (folder / "one.txt").write_text(TEXT, encoding="utf-8")
    (folder / "five").mkdir()
    for number in range(5):
        (folder / "five" / f"{number}.txt").write_text(TEXT[number * 5000 : (number + 1) * 5000], encoding="utf-8")
    common = {"preset": "tiny", "tokenizer": "embedded", "max_steps": 1, "max_seq_length": 48, "batch_size": 2}
    for name in ("one.txt", "five"):
        settings = {**common, "validation_share": 0.05, "data": str(folder / name), "output_dir": str(folder / f"run-{name}")}
        run(RunConfig(**settings), quiet=True)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("name", ["one.txt", "five"])
def test_what_a_run_kept_apart_of_its_text_is_evaluated(on_text: Path, name: str, tmp_path: Path) -> None:
    """The end of it, where there are few documents; not one that was drawn, of which most was trained."""
    source = on_text / f"run-{name}"
    assert evaluated("--run", source, "--window", 48, "--stride", 48, "--output-dir", tmp_path) == 0
    report, best = report_of(tmp_path), read_history(source).best
    assert best is not None
    assert report["loss"]["value"] == pytest.approx(best[0].val_loss, rel=1e-6)
    text = TEXT if name == "one.txt" else TEXT[20_000:25_000]
    end = text.strip().encode()[-report["text"]["bytes"] :].decode("utf-8", "replace")
    tokens = load_tokenizer("embedded").encode(end, add_special_tokens=False)
    assert abs(len(tokens) + 1 - report["text"]["tokens"]) <= 3  # with the end of the text; it may begin within a word


def test_a_long_text_is_one_document(on_text: Path, tmp_path: Path) -> None:
    """Its pieces have the bytes of one text together, and none begins without context."""
    given = ("--model", on_text / "run-one.txt" / "model", "--data", on_text / "one.txt", "--output-dir", tmp_path)
    assert evaluated(*given, "--window", 256, "--stride", 256) == 0
    found = report_of(tmp_path)["text"]
    assert (found["documents"], found["bytes"]) == (1, len(TEXT.strip().encode()))
