"""The word problems of `make distill`: their rationales are right, and what is asked in the end was never trained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import mlx_qlora

# isort: split
import mlx.core as mx

from mlx_qlora.assets import embedded_model, embedded_teacher
from mlx_qlora.model.load import load

ROOT = Path(mlx_qlora.__file__).parent.parent
EQUATION = re.compile(r"(\d+) ([-+x]) (\d+) = (\d+)\.")
PARTS = ("train", "valid", "test")


def made(folder: Path, *flags: str) -> dict[str, list[dict[str, str]]]:
    script = str(ROOT / "data" / "make_problems.py")
    subprocess.run([sys.executable, script, "--output-dir", str(folder), *flags], check=True)
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in PARTS}


def test_every_equation_is_right_and_uses_the_numbers_of_its_question(tmp_path: Path) -> None:
    for each in (row for rows in made(tmp_path).values() for row in rows):
        rationale, answer = each["answer"].split("\n#### ")
        equations = EQUATION.findall(rationale)
        assert " ".join(f"{a} {sign} {b} = {c}." for a, sign, b, c in equations) == rationale
        results = []
        for a, sign, b, c in equations:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign] == int(c)
            assert 0 <= int(c) <= 20
            asked = re.findall(r"\d+", each["question"])
            assert {a, b} <= {*asked, *results}
            results.append(c)
        assert results[-1] == answer


def test_what_is_asked_in_the_end_was_never_trained_in_any_words(tmp_path: Path) -> None:
    """By the student (other seed, other number of rows) or by the teacher. A sum is what is left without the words."""
    student, teacher = made(tmp_path / "student"), made(tmp_path / "teacher", "--train", "8000", "--seed", "12")
    assert {name: len(rows) for name, rows in student.items()} == {"train": 320, "valid": 60, "test": 500}

    def sums(rows: list[dict[str, str]]) -> set[tuple[bool, str]]:
        """Without names and things; whether it is about two people, whose second equation repeats the first number."""
        return {("ao todo" in row["question"], row["answer"]) for row in rows}

    for kept in ("valid", "test"):
        for trained in (student["train"], teacher["train"]):
            assert not sums(student[kept]) & sums(trained)
    questions = [row["question"] for rows in student.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_the_teacher_is_small_and_reads_as_its_student_does() -> None:
    assert sum(path.stat().st_size for path in embedded_teacher().iterdir()) <= 6_000_000
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (embedded_teacher() / name).read_bytes() == (embedded_model() / name).read_bytes()
    student, teacher = (json.loads((folder() / "config.json").read_text()) for folder in (embedded_model, embedded_teacher))
    assert teacher["num_hidden_layers"] > student["num_hidden_layers"]
    assert teacher["vocab_size"] == student["vocab_size"]


def test_the_grown_model_begins_as_the_tiny_one(tmp_path: Path) -> None:
    """Twice the layers, and the same logits to the bit of what float16 rounds."""
    script = str(ROOT / "data" / "make_teacher.py")
    subprocess.run([sys.executable, script, "grow", str(tmp_path / "grown")], check=True)
    tiny, grown = load("embedded"), load(str(tmp_path / "grown"))
    assert len(grown.model.layers) == 2 * len(tiny.model.layers)
    tokens = mx.array([grown.tokenizer.encode("Rita tem 9 bolas, ganha 4 e perde 6. Com quantas fica?")])
    differences = mx.abs(tiny.model(tokens).astype(mx.float32) - grown.model(tokens).astype(mx.float32))
    assert differences.max().item() < 0.02


def test_the_teacher_answers_with_rationale_and_answer(tmp_path: Path) -> None:
    """Greedy answers to the test's first easy problems; of all 500 it has 96 in 100 right."""
    from mlx_lm import generate

    loaded, rows = load("embedded-teacher"), made(tmp_path, "--easy")["test"][:8]
    prompts = [
        loaded.tokenizer.apply_chat_template([{"role": "user", "content": row["question"]}], add_generation_prompt=True)
        for row in rows
    ]
    answers = [generate(loaded.model, loaded.tokenizer, prompt, max_tokens=40) for prompt in prompts]
    assert sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True)) >= 6
