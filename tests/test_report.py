"""`mlx-qlora report`: a page that opens from disk in a real browser, whatever stands in the files of a run."""

from __future__ import annotations

import html
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import pytest
from browser import opened, screenshot
from runs import course, write_run

from mlx_qlora.assets import embedded_model
from mlx_qlora.commands import main
from mlx_qlora.data.audit import Audit
from mlx_qlora.files import json_lines
from mlx_qlora.look.pages.page import document

pytest.importorskip("matplotlib")
FINISHED = {"ended": "finished", "planned_steps": 60, "elapsed_s": 30.0, "tokens_per_second": 1000.0, "peak_memory_gb": 4.5}
HOSTILE = "</style></script><script>console.error('ran')</script><img src=x onerror=console.error(2)>\u2028\u202e\x1b[31m&amp;"


@pytest.fixture(scope="module")
def trained(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that the command line made."""
    folder = tmp_path_factory.mktemp("runs") / "first run's"
    arguments = ["--model", "embedded", "--data", str(small_data), "--output-dir", str(folder), "--epochs", "2",
                 "--eval-every", "2", "--score-questions", "6", "--max-answer-tokens", "8", "--lora.rank", "4"]  # fmt: skip
    assert main(["train", *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def page(trained: Path) -> Path:
    """The page about it, as the command writes it."""
    assert main(["report", str(trained)]) == 0
    return trained / "report.html"


def page_of(*runs: Path, output: Path) -> str:
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8")


def texts(page: str) -> str:
    """What a person reads, on one line."""
    body = re.sub(r"<(style|title)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_training_leaves_a_picture_of_its_curves(trained: Path) -> None:
    assert (trained / "training_results.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_of_a_run_opens_without_a_complaint(trained: Path, page: Path) -> None:
    assert page.stat().st_size < 1_500_000
    found = opened(page)
    assert found.console == []
    said = texts(found.dom)
    summary = json.loads((trained / "training_summary.json").read_text())
    for part in (
        "Run first run's", f"{summary['best']['val_loss']:.4f}", "Validations", "Before and after", "Using it",
        "Other than the defaults", "lora.rank", "training 22 22", "Veio de Serra Branca.", summary["versions"]["mlx"],
    ):  # fmt: skip
        assert part in said, part
    assert found.dom.count("<svg") == 8, "loss and gap for wide and narrow screens, and four more"


def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    for found in re.findall(r"""(?:src|href|data|action)\s*=\s*["']([^"']*)""", text) + re.findall(r"url\(([^)]*)\)", text):
        assert found.startswith(("#", "data:,")), found
    assert "@import" not in text
    names = re.findall(r' id="([^"]*)"', text)
    assert len(names) == len(set(names))


def test_what_a_page_would_load_or_run_is_refused_and_told(tmp_path: Path) -> None:
    """The policy in every page holds; and a complaint is heard of, so that the tests here can fail."""
    wrong = ["<img src='http://127.0.0.1/a.png'>", "<script>console.error('ran')</script>", "<link rel=stylesheet href=a.css>"]
    (tmp_path / "page.html").write_text(document("a page", wrong))
    console = opened(tmp_path / "page.html").console
    assert [len(re.findall(kind, " ".join(console))) > 0 for kind in ("a.png", "script", "a.css")] == [True] * 3, console
    assert not any("ran" in line.split("source:")[0].split() for line in console)


def test_the_page_is_light_and_dark_and_fits_a_telephone(page: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    for dark, paper in ((False, (255, 255, 255)), (True, (0x14, 0x18, 0x1E))):
        screenshot(page, tmp_path / "shot.png", width=400, height=1500, dark=dark)
        shot = imread(tmp_path / "shot.png")[:, :, :3] * 255
        assert shot.shape == (1500, 400, 3)
        assert shot[2, 2] == pytest.approx(paper, abs=1)
        assert abs(shot[:, -6:] - shot[2, 2]).max() < 2, "nothing stands beyond the margin"
        assert abs(shot[:, 40:360] - shot[2, 2]).max() > 100


def test_the_adapters_are_used_as_the_page_says(trained: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_lm.generate import setup_arg_parser

    text = page.read_text(encoding="utf-8")
    command, python, fuse = (html.unescape(each) for each in re.findall(r'<pre class="copy">(.*?)</pre>', text, re.DOTALL))
    program, *arguments = shlex.split(command.replace("\\\n", ""))  # a shell goes on in the next line
    given = setup_arg_parser().parse_args(arguments)
    assert program == "mlx_lm.generate"
    assert (given.model, given.adapter_path) == (str(embedded_model()), str(trained / "adapters"))
    assert given.prompt == json_lines(trained / "answers.jsonl")[0]["question"]
    assert shlex.split(fuse)[-2:] == ["--save-path", str(trained / "fused")]
    capsys.readouterr()
    exec(compile(python.replace("prompt))", "prompt, max_tokens=8))"), "page", "exec"), {})
    assert capsys.readouterr().out.startswith(json_lines(trained / "answers.jsonl")[0]["tuned"])


def interval(value: float, wide: float) -> dict[str, float]:
    return {"value": value, "low": value - wide, "high": value + wide}


def evaluated(folder: Path, word: str) -> None:
    """An evaluation of 60 questions in a run's folder, with `word` wherever a text stands."""
    scores = {"scores": {"token_f1": 0.5}, "base_scores": {"token_f1": 0.25}}
    lines = [
        {"id": f"{n}{word}", "question": f"{word} {n}", "expected": f"x {n}", "answer": word, "base": word, **scores}
        for n in range(60)
    ]
    lines[0]["base"] = "much " * 800
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    value = {
        "data": word, "split": word, "questions": 60, "loss": interval(1.25, 0.125), "base_loss": interval(3.5, 0.25),
        "perplexity": interval(3.5, 0.5), "base_perplexity": None, "worst": [lines[3]["id"], "none"],
        "scores": {
            "token_f1": {"tuned": interval(0.5, 0.125), "base": interval(0.25, 0.125), "difference": interval(0.25, 0.125)},
            word: {"tuned": interval(0.75, 0.25), "base": None, "difference": interval(0.0, 0.5)},
        },
        "classes": {word: {"precision": 0.875, "recall": 0.5, "f1": 0.625, "support": 1200}},
    }  # fmt: skip
    (folder / "evaluation_report.json").write_text(json.dumps(value))


def test_texts_stay_texts_wherever_they_stand(trained: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a<script>console.error(3)<", course(60), FINISHED | {"ended": HOSTILE, "device": HOSTILE})
    evaluated(run, HOSTILE)
    account = json.loads((trained / "data_account.json").read_text())
    account["template"], account["refusals"], account["train"]["longest"][0]["id"] = HOSTILE, [HOSTILE], HOSTILE
    (run / "data_account.json").write_text(json.dumps(account))
    (run / "supervision.jsonl").write_text(json.dumps({"how": HOSTILE, "time": HOSTILE, "update": 3}) + "\n")
    config = (run / "config.yaml").read_text().replace("model: embedded", f"model: {json.dumps(HOSTILE)}")
    (run / "config.yaml").write_text(config)
    assert main(["report", str(run)]) == 0
    found = opened(run / "report.html")
    assert found.console == []
    assert "<script" not in found.dom.replace("&lt;script", "")
    assert "<img" not in found.dom
    said = texts(found.dom)
    shown = HOSTILE.replace("\u2028", " ").replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert said.count(" ".join(shown.split())) > 40
    assert "token F1 0.25 → 0.5" in said
    assert "0.250 [0.125, 0.375] 0.500 [0.375, 0.625] +0.250 [+0.125, +0.375]" in said
    assert "0.875 0.5 0.625 1,200" in said
    assert "all of it: 4,000 characters" in said


def test_several_runs_stand_side_by_side(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    better = write_run(tmp_path / "b" / trained.name, course(60), FINISHED, seed=3)
    going = write_run(tmp_path / "going", course(7))
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(trained), str(better), str(going)]) == 0
    assert "page      report.html" in capsys.readouterr().out
    found = opened(Path("report.html"))
    assert found.console == []
    said = texts(found.dom)
    assert "1.2000 ± 0.059 ★ 40 (1.00)" in said, "the lowest"
    assert said.count("★ ") >= 2
    assert re.search(r"seed 0 3 0\b", said), "settings that differ"
    assert f"b/{trained.name}" in said, "as much of the folder as tells them apart"
    assert "This run goes on, or was cut off: 7 updates" in said
    assert found.dom.count("<svg") == 8 + 3 * 2
    assert list(tmp_path.glob("*.png")) == []


def test_eight_long_runs_make_a_page_that_is_not_large(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{n}", course(3000, every=100, seed=n), FINISHED) for n in range(8)]
    assert len(page_of(*runs, output=tmp_path / "page.html")) < 1_500_000


UNUSUAL: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "no update": list,
    "one update": lambda: course(1),
    "no validation": lambda: course(30, every=1000),
    "nothing finite": lambda: [{"step": 1, "epoch": "nan", "loss": "nan", "val_loss": "nan", "train_eval_loss": "inf"}],
    "text instead of figures": lambda: [{"step": 1, "loss": "much", "epoch": None, "val_loss": [1], "elapsed_s": {}}],
    "many validations": lambda: course(90, every=1),
}


@pytest.mark.parametrize("name", list(UNUSUAL))
def test_there_is_always_a_page(name: str, tmp_path: Path) -> None:
    summary = None if name in ("no update", "no validation") else FINISHED
    said = texts(page_of(write_run(tmp_path / "run", UNUSUAL[name](), summary), output=tmp_path / "page.html"))
    assert ("The run finished" in said) == (summary is not None)
    assert ("nan" in said) is False


DAMAGED = {
    "training_summary.json": [
        '{"ended"',
        '{"best": 3, "versions": [], "ended": {}, "elapsed_s": "x", "device": [1], '
        '"planned_steps": "many", "trainable_parameters": "few"}',
        "[1]",
    ],
    "training_state.json": ['{"at": "x", "planned_steps": null}', "nothing"],
    "data_account.json": ["{}", '{"sizes": 3}', '{"rows": 848, "sizes": {"train": {}}}', '{"supervised_tokens": 3}'],
    "evaluation_report.json": ['{"scores": [], "classes": {"a": 3}, "worst": [{}], "loss": "x", "data": {}}', "{"],
    "predictions.jsonl": ['{"id": 3, "question": ["a"], "scores": [1]}\n{"question": null}\nnothing\n'],
    "supervision.jsonl": ['{"how": {"a": 1}, "update": "x", "time": 3}\n{}\n'],
    "config.yaml": ["model: [", "model: 3\nlora: 4\nearly_stopping: {patience: a, min_delta: b}\nclip_grad_norm: c\n", "- a\n"],
    "training_metrics.jsonl": ['{"step": 1, "loss": 2}\n{"step": "x"}\n{"st', '[]\n{"step": 2, "epoch": "x"}\n'],
}


@pytest.mark.parametrize("which", range(4))
def test_damaged_files_cost_what_is_in_them_and_no_more(which: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", course(30), FINISHED)
    evaluated(run, "w")
    for name, contents in DAMAGED.items():
        (run / name).write_text(contents[which % len(contents)])
    assert "Versions and machine" in page_of(run, output=tmp_path / "page.html")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["report", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mlx-qlora report: ")
    assert "Traceback" not in err
    return err


def test_what_is_wrong_is_said_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    run = write_run(tmp_path / "run", course(20))
    (tmp_path / "empty").mkdir()
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    assert "which run?" in refused([], capsys)
    assert "there is nothing" in refused([str(tmp_path / "none")], capsys)
    assert "no run was begun in it" in refused([str(run), str(tmp_path / "empty")], capsys)
    assert "are the same run" in refused([str(run), f"{run}/../run"], capsys)
    assert "a file in a folder that is there" in refused([str(run), "--output", str(tmp_path / "none" / "p.html")], capsys)
    assert "a file in a folder that is there" in refused([str(run), "--output", str(tmp_path)], capsys)
    assert "has not written it" in refused([str(run), "--output", str(mine)], capsys)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
        assert "pip install 'mlx-qlora[plots]'" in refused([str(run)], capsys)
    assert mine.read_text() == "<p>mine</p>"
    assert sorted(path.name for path in tmp_path.rglob("*.[ph][nt]*")) == ["mine.html"], "nothing was written"
    (tmp_path / "page.html").write_text(document("ours", []))
    page_of(run, output=tmp_path / "page.html")


def test_an_account_of_data_is_read_back_as_it_was(trained: Path) -> None:
    account = json.loads((trained / "data_account.json").read_text())
    assert json.loads(json.dumps(Audit.from_json(account).to_json())) == account


def test_overwriting_a_run_takes_what_was_made_of_it(small_data: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", course(20))
    evaluated(run, "w")
    page_of(run, output=run / "report.html")
    (run / "notes.txt").write_text("mine")
    arguments = ["--model", "embedded", "--data", str(small_data), "--output-dir", str(run), "--max-steps", "1"]
    assert main(["train", *arguments, "--overwrite"]) == 0
    left = {path.name for path in run.iterdir()}
    assert left & {"predictions.jsonl", "evaluation_report.json", "report.html"} == set()
    assert left >= {"notes.txt", "training_results.png"}
