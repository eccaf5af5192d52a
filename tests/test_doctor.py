"""The doctor, as a person calls it: what it says of whole and broken models, of a step that dies, and what leaves the house."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_qlora.assets import embedded_model
from mlx_qlora.findings import Finding
from mlx_qlora.look.doctor import bundle, checkup
from mlx_qlora.look.doctor.watched import Watched
from mlx_qlora.model.inspect import INDEX, Place, inspect, known_to_mlx_lm, locate, read_header, tokenizer
from mlx_qlora.model.load import load_tokenizer

MARK = "Zebedeu confessou tudo ao padre na quinta-feira"


def doctor(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_qlora", "doctor", *arguments]
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [environment.pop("first", ""), root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": path, **environment}, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_model(), tmp_path / "model"))


def found(folder: Path, verdict: str = "FAIL") -> list[Finding]:
    return [each for each in inspect(Place(folder, str(folder))) if each.verdict == verdict]


def test_a_machine_that_is_well(tmp_path: Path) -> None:
    done = doctor("--json", "checks.json", "--bundle", "b.zip", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((tmp_path / "checks.json").read_text())
    assert said["failed"] == 0
    phases = ["load", "adapters", "tokenise", "batch", "forward", "loss", "backward", "accumulate", "update"]
    assert [each["phase"] for each in said["step"]] == phases
    assert all(re.search(rf"^  {phase} +[\d.]+ m?s +[\d.]+ .B", done.stdout, re.MULTILINE) for phase in phases)
    by_phase = {each["phase"]: each for each in said["step"]}
    assert by_phase["batch"]["shape"] == [1, 32]
    assert by_phase["forward"]["shape"] == [1, 32, 2048]
    names = {each["name"] for each in said["checks"]}
    assert names >= {"python", "packages", "device", "blas", "memory", "wired", "disk", "weights", "checksums", "tokenizer"}
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        assert archive.namelist() == ["checks.json", "versions.json", "model_config.json", "README.txt"]
        whole = "\n".join(archive.read(name).decode() for name in archive.namelist())
    for word in (str(Path.home()), str(tmp_path), *([getpass.getuser()] if getpass.getuser() != "root" else [])):
        assert word not in whole
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.zip", "checks.json"]  # nothing is left of what was tried


def test_a_broken_model_ends_with_what_to_do(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    done = doctor("--model", str(model), cwd=tmp_path)
    assert done.returncode == 2
    line = done.stdout.index("FAIL  weights")
    assert "model.safetensors ends 857.8 kB early (1.0 MB of 1.9 MB)" in done.stdout[line:]
    assert re.search(r"early.*\n +-> Download it again: hf download OWNER/NAME model.safetensors", done.stdout)
    assert "1 failed" in done.stdout
    assert "The smallest training step is left out" in done.stdout


_DYING = """
import sys
if {{"mlx_qlora.look.doctor.smallest", "step"}} <= set(sys.orig_argv):
    import ctypes, os, signal
    import mlx_qlora
    import mlx.nn as nn
    nn.value_and_grad = lambda *_: {how}
"""


@pytest.mark.parametrize(
    ("how", "said", "remedy"),
    [
        ("ctypes.string_at(0)", ["died with SIGSEGV", "Fatal Python error: Segmentation fault"], "Native code crashed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ["died with SIGKILL"], "Most likely memory ran out"),
    ],
)
def test_a_step_that_dies_says_in_which_phase(how: str, said: list[str], remedy: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_DYING.format(how=how))
    done = doctor("--fast", cwd=tmp_path, first=str(tmp_path))
    assert done.returncode == 2
    _, _, end = done.stdout.partition("\n  backward   FAIL  ")
    assert end, done.stdout
    assert all(piece in end for piece in said)
    assert f"-> {remedy}" in end
    assert "  update" not in end  # the rest is skipped


def test_an_mlx_that_crashes_when_it_is_used(tmp_path: Path) -> None:
    """The doctor itself never imports it, so the rest is still said."""
    dying = "import sys\nif 'device' in sys.orig_argv:\n    import os\n    os.kill(os.getpid(), 4)\n"
    (tmp_path / "sitecustomize.py").write_text(dying)
    done = doctor("--fast", cwd=tmp_path, first=str(tmp_path))
    assert done.returncode == 2
    assert "FAIL  device      the process that tried it died with SIGILL" in done.stdout
    assert "-> This MLX was built for another processor." in done.stdout
    assert "ok    weights" in done.stdout
    assert "The smallest training step is left out: MLX does not compute here." in done.stdout


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text('import time\nprint(\'{"begin": "load"}\', flush=True)\ntime.sleep(60)\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    work = Watched("sleeper", (), given_up_s=2.0)
    assert list(work) == [{"begin": "load"}]
    assert (work.ended.how, work.ended.signal) == ("gave no sign of life for 2 s", "hung")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5_000])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4100000000\n")


def web_page(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<!doctype html><title>Access to this model is restricted</title>")


def longer(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 64)


def overlapping(folder: Path) -> None:
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("a", "b")}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)


def indexed(first: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = first
        (folder / INDEX).write_text(json.dumps(index))

    return change


def of_three(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / "model.safetensors").rename(folder / "model-00002-of-00003.safetensors")


def configured(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without_a_kind(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def pytorch(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


# What is wrong with a folder; the check, what is said, and what to do.
BROKEN: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "cut in the header": (
        cut,
        "weights",
        "is cut inside its header (5.0 kB of at least 10.0 kB)",
        "Download it again: hf download",
    ),
    "a pointer": (pointer, "weights", "is a git-LFS pointer, not the weights (these have 4.10 GB)", "git lfs pull"),
    "a web page": (web_page, "weights", "is a web page", "Download it again"),
    "too long": (longer, "weights", "has 64 B more than its header accounts for", "Download it again"),
    "an overlap": (overlapping, "weights", "b begins at byte 0, where 8 is expected", "Download it again"),
    "a shard missing": (
        indexed("model-00002-of-00002.safetensors"),
        "index",
        "1 of the 2 files that model.safetensors.index.json names is missing: model-00002-of-00002.safetensors",
        "hf download OWNER/NAME model-00002-of-00002.safetensors --local-dir",
    ),
    "out of the folder": (indexed("../x.safetensors"), "index", "names '../x.safetensors': a file outside", "Do not load this"),
    "absolute": (indexed("/etc/passwd"), "index", "names '/etc/passwd': a file outside", "Do not load this"),
    "two of three missing": (of_three, "index", "of 3 files number 1, 3 is missing", "Download what is missing"),
    "code": (
        configured(auto_map={"AutoModel": "x.py"}),
        "config",
        "config.json has auto_map",
        "If mlx-lm has 'mistral' itself",
    ),
    "a file of code": (configured(model_file="x.py"), "config", "config.json has model_file", "take that line out"),
    "no kind": (without_a_kind, "config", "config.json: it has no model_type", "Fetch it again: hf download OWNER/NAME config"),
    "no tokenizer": (without_tokenizer, "files", "no tokenizer_config.json", "fetch what is missing (tokenizer_config.json)"),
    "PyTorch's": (pytorch, "files", "no model*.safetensors", "mlx_lm.convert"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_folder(name: str, model: Path) -> None:
    damage, check, said, remedy = BROKEN[name]
    damage(model)
    finding = next(each for each in found(model) if each.name == check)
    assert said in finding.found
    assert remedy in finding.remedy


def downloaded(folder: Path) -> None:
    """The notes that a download to a folder leaves: a commit, a checksum, a time."""
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        content = path.read_bytes()
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False)
        checksum = hashlib.sha256(content) if path.suffix == ".safetensors" else git
        (notes / f"{path.name}.metadata").write_text(f"c0ffee\n{checksum.hexdigest()}\n0.0\n")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_checksums_of_a_download(model: Path) -> None:
    downloaded(model)
    assert any("7 files (2.0 MB), each as it was published" in each.found for each in found(model, "ok"))
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    flip_a_bit(model / "model.safetensors")
    (failure,) = found(model)
    assert "model.safetensors is not what was published" in failure.found
    (doubt,) = found(model, "warn")
    assert "config.json is not what was published" in doubt.found
    assert not [each for each in inspect(Place(model, "m"), fast=True) if each.verdict != "ok"]


def test_a_model_in_the_hub_s_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots are links to blobs that are named by their checksums; nothing goes over the network."""
    store = tmp_path / "hub" / "models--owner--name"
    snapshot = store / "snapshots" / "c0ffee"
    for folder in (snapshot, store / "blobs", store / "refs"):
        folder.mkdir(parents=True)
    (store / "refs" / "main").write_text("c0ffee")
    for path in model.iterdir():
        blob = store / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = locate("owner/name")
    assert isinstance(place, Place)
    assert {each.verdict for each in inspect(place)} == {"ok"}
    flip_a_bit((snapshot / "model.safetensors").resolve())
    (store / "blobs" / "0000.incomplete").write_bytes(b"0" * 1000)
    bad = {each.name: each for each in inspect(place) if each.verdict != "ok"}
    assert bad["checksums"].remedy.endswith("hf download owner/name model.safetensors --force-download")
    assert "1 unfinished download (1.0 kB)" in bad["download"].found
    missing = locate("owner/other")
    assert isinstance(missing, Finding)
    assert missing.remedy.endswith("hf download owner/other")


def test_the_header_s_arithmetic() -> None:
    header = read_header(embedded_model() / "model.safetensors")
    assert header.actual == header.expected
    assert sum(header.tensors.values()) == header.expected - header.start == 1_847_808


def test_weights_of_another_model(model: Path, tmp_path: Path) -> None:
    configured(num_hidden_layers=5)(model)
    done = doctor("--model", "model", "--fast", cwd=tmp_path)
    assert done.returncode == 2
    assert "  load       FAIL  model: this model can't be loaded: Missing 9 parameters" in done.stdout
    assert "-> config.json and the weights are not of one model" in done.stdout


def test_a_tokenizer_of_another_model() -> None:
    """Numbers past the end of the embedding read other memory, without a word."""
    (finding,) = tokenizer("embedded", {"vocab_size": 1000}, load_tokenizer)
    assert finding.verdict == "FAIL"
    assert "up to number 1,932; the model knows 1,000" in finding.found
    assert {each.verdict for each in tokenizer("embedded", {"vocab_size": 2048}, load_tokenizer)} == {"ok"}


def test_a_kind_that_mlx_lm_does_not_know() -> None:
    finding = known_to_mlx_lm({"model_type": "mistrall"})
    assert "has no code for 'mistrall'" in finding.found
    assert "mistral3" in finding.remedy
    assert known_to_mlx_lm({"model_type": "mistral"}).verdict == "ok"


def test_packages_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkup._version
    monkeypatch.setattr(checkup, "_version", lambda name: "0.1.0" if name == "mlx" else real(name))
    findings = list(checkup._packages())
    assert any(each.found == "mlx 0.1.0: mlx-qlora needs >=0.32.4" for each in findings)
    assert any(each.remedy == "pip install -U 'mlx>=0.32.4'" for each in findings)


@pytest.mark.parametrize(
    ("megabytes", "verdict", "said"),
    [
        ("0", "ok", "the system's default"),
        ("20000", "ok", "the GPU may have 61% of 34.36 GB"),
        ("8000", "warn", "only 24% of 34.36 GB"),
        ("32000", "warn", "98% of 34.36 GB, and the system may freeze"),
        ("", "ok", "does not say"),
    ],
)
def test_the_wired_limit_of_a_mac(megabytes: str, verdict: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what sysctl would print on a Mac of 32 GB; on a real one nobody has looked yet."""
    answers = {"iogpu.wired_limit_mb": megabytes, "hw.memsize": str(32 * 2**30)}
    monkeypatch.setattr(checkup, "_MAC", True)
    monkeypatch.setattr(checkup, "_asked", lambda *command: answers[command[-1]])
    (finding,) = checkup._wired()
    assert finding.verdict == verdict
    assert said in finding.found
    assert bool(finding.remedy) == (verdict != "ok")


def test_a_python_for_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "_MAC", True)
    monkeypatch.setattr(checkup.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(checkup, "_asked", lambda *command: "1")
    (finding,) = checkup._python()
    assert finding.verdict == "FAIL"
    assert "translated by Rosetta" in finding.found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: there is no such folder. Name the folder of a run"),
        (["--bundle", "no/where.zip"], "--bundle no/where.zip: a file in a folder that is there is expected."),
        (["--json", "."], "--json .: a file in a folder"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = doctor(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


@dataclass(frozen=True)
class Record:
    """As the flight recorder's."""

    constants: dict[str, object]
    phase: str
    facts: dict[str, object]
    detail: str


def test_no_data_leaves_the_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose every file quotes a row, whatever may: neither it nor who and where this is are in the bundle."""
    home = tmp_path / "casa-de-zebedeu"
    run = home / "clientes secretos" / "run"
    (run / "adapters").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    host = "computador-do-zebedeu"
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    write_run(run, home, host)
    record = Record(
        constants={"host": host, "pid": 7, "command": f"mlx-qlora train --data {home}/data --rank 8", "versions": {"mlx": "1"}},
        phase="backward",
        facts={
            "tokens": [5, 6],
            "row": list(range(20)),
            "ids": ["train.jsonl:17", MARK],
            "text": MARK,
            "shape": "1 x 32",
            "update": 3,
        },
        detail=f"ValueError: {MARK}",
    )
    monkeypatch.setitem(sys.modules, "mlx_qlora.run.recorder", SimpleNamespace(read=lambda _: record))
    names = bundle.write(tmp_path / "b.zip", {"checks": [{"found": f"{run}: {host}"}]}, {"mlx": "1"}, embedded_model(), run)
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert sorted(texts) == sorted(names)
    for name, text in texts.items():
        for word in (MARK, "Zebedeu", "zebedeu", "confessou", "clientes", str(home), host, str(tmp_path)):
            assert word not in text, (name, word)
    assert not any("answers" in name or "adapters" in name for name in names)
    figures = json.loads(texts["run/flight_recorder.json"])
    assert figures["facts"]["ids"] == ["row 17", f"(text, {len(MARK)})"]
    assert figures["constants"]["command"] == "--data --rank"
    assert figures["facts"]["shape"] == "1 x 32"
    assert (figures["facts"]["tokens"], figures["facts"]["row"]) == ("(2 numbers)", "(20 numbers)")
    assert len(texts["run/training_metrics.jsonl"].splitlines()) == 200
    assert "learning_rate: 0.002" in texts["run/config.yaml"]
    assert "data: data" in texts["run/config.yaml"]
    assert "[metal::malloc] Attempting to allocate 9 bytes" in texts["run/crash.txt"]
    assert 'File "mlx_qlora/train.py", line 7 in run' in texts["run/crash.txt"]
    for line in ("no progress for 2 min 03 s: update 3, backward of 1 x 32 tokens", "of MLX: 37 MB", "thread MainThread"):
        assert line in texts["run/stalled.txt"]
    assert 'File "run.py", line 3 in go' in texts["run/stalled.txt"]
    assert "answers.jsonl" in texts["run/files.txt"]  # its name and size only


def write_run(run: Path, home: Path, host: str) -> None:
    files = {
        "config.yaml": f"model: {home}/models/Mistral\ndata: {home}/clientes secretos/data\nlearning_rate: 0.002\n"
        f"chat_template: '{MARK}'\nfields: {{Zebedeu: prompt}}\nnew_setting: '{MARK}'\nlist_of: ['{MARK}']\n",
        "training_summary.json": json.dumps({"ended": "failed", "best": None, "error": MARK, "model": f"{home}/m", MARK: 1}),
        "training_metrics.jsonl": "".join(f'{{"step": {n}, "loss": 1.5, "note": "{MARK}"}}\n' for n in range(300)),
        "answers.jsonl": json.dumps({"question": MARK}) + "\n",
        "crash.txt": f"Fatal Python error: Segmentation fault\n\nCurrent thread 0x01 (most recent call first):\n"
        f'  File "{home}/clientes secretos/mlx_qlora/train.py", line 7 in run\n    call("{MARK}")\n'
        f"RuntimeError: [metal::malloc] Attempting to allocate 9 bytes\nValueError: {MARK}\n"
        f"ValueError: [INST] {MARK}\n{host}\n",
        "stalled.txt": f"--- 2026-11-21 20:50:33  no progress for 2 min 03 s: update 3, backward of 1 x 32 tokens\n"
        f'    ids: ["train.jsonl:17", "{MARK}"]\nmemory\n    of MLX: 37 MB\n\nthread MainThread\n'
        f'  File "{home}/clientes secretos/run.py", line 3, in go\n    say("{MARK}", "{host}")\n',
        "supervision.jsonl": json.dumps({"how": "SIGKILL", "phase": "backward", "detail": MARK}) + f'\n{{"half": "{MARK}',
        "flight_recorder.bin": MARK,
    }
    for name, text in files.items():
        (run / name).write_text(text, encoding="utf-8")
