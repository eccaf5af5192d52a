"""What travels in the wheel: the embedded model, the demo's data and settings, the types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx_qlora
from mlx_qlora.assets import embedded_data, embedded_model

ROOT = Path(mlx_qlora.__file__).parent.parent


def test_the_demo_runs_from_the_wheel_alone_in_any_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    expected = ["py.typed", "assets/demo.yaml", "assets/club/train.jsonl", "assets/mistral/model.safetensors"]
    expected += ["assets/teacher/model.safetensors", "assets/teacher/README.md"]
    assert {f"mlx_qlora/{name}" for name in expected} <= names
    assert not any(name.startswith(("tests/", "data/")) for name in names)
    done = subprocess.run(
        [sys.executable, "-m", "mlx_qlora", "train", "--demo", "--max-steps", "1", "--score-questions", "0"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "training        848" in done.stdout
    assert "--model site/mlx_qlora/assets/mistral" in done.stdout, "the model of the wheel, not of the checkout"
    assert (tmp_path / "runs" / "demo" / "adapters" / "adapters.safetensors").exists()


def test_the_embedded_model_is_small() -> None:
    assert sum(path.stat().st_size for path in embedded_model().iterdir()) <= 3_000_000


def test_the_demos_data_are_what_their_generator_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "data" / "make_club.py"), "--output-dir", str(tmp_path)], check=True)
    for name in ("train", "valid", "test"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (ROOT / "data" / f"{name}.jsonl").read_bytes()


def test_the_embedded_tokenizer_is_what_its_script_makes(tmp_path: Path) -> None:
    """The weights take 20 minutes to make; the tokenizer, which hangs on every line of the little world, seconds."""
    code = f"import make_world, pathlib; make_world.make_tokenizer(pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "data", check=True, capture_output=True)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (embedded_model() / name).read_bytes()


def test_no_question_occurs_twice_and_all_have_the_same_system_prompt() -> None:
    rows = {
        name: [json.loads(line)["messages"] for line in (embedded_data() / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "valid", "test")
    }
    assert {name: len(chats) for name, chats in rows.items()} == {"train": 848, "valid": 95, "test": 100}
    questions = [chat[1]["content"] for chats in rows.values() for chat in chats]
    assert len(set(questions)) == len(questions)
    assert len({chat[0]["content"] for chats in rows.values() for chat in chats}) == 1
    taught = {chat[2]["content"] for chat in rows["train"]}
    assert {chat[2]["content"] for name in ("valid", "test") for chat in rows[name]} <= taught


def test_the_base_models_world_does_not_have_the_clubs_people() -> None:
    """The embedded model has met the words; who plays where it can't know."""
    code = (
        "import little_world, make_club\n"
        "told = ' '.join(sentence for sentence, _, _ in little_world.SETTLED)\n"
        "assert not [name for name in [*make_club.PLAYERS, *make_club.LEGENDS] if name in told]\n"
        "assert not [answer for answer in make_club.SINGLE if answer in told]\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "data", check=True)
