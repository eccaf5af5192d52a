"""One file to attach to a bug report, in which nothing of the data is, and nothing that says whose machine it was.

Texts are kept only where this package wrote them: under keys that are known, and in lines of known shapes. All else
becomes its length. So a setting or a file that is added later is left out until somebody says here that it may go in.
"""

from __future__ import annotations

import getpass
import json
import platform
import pwd
import re
import socket
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from importlib import import_module
from os import getuid
from pathlib import Path, PurePath
from typing import Any

Write = Callable[[str, str], None]

_METRICS_LINES = 200
_LONGEST_KEPT = 2000
_MANY = 12
# Settings and figures whose values are words of this package's own.
_WORDS = frozenset(
    {
        "ended", "phase", "how", "reason", "device", "python", "platform", "time", "shape", "kind", "layout", "compile",
        "grade", "grade_at_best", "grade_of_mean", "optimizer", "schedule", "matmul", "trunk_cache", "train_on", "truncation",
        "malformed", "format", "grad_checkpoint", "checkpointing", "targets", "signal", "mode", "event", "report_to",
        "windows", "overlap", "architecture", "fine_tune_type", "precision", "decay", "loss", "estimate",
    }
)  # fmt: skip
_PATHS = frozenset(
    {
        "model",
        "data",
        "output_dir",
        "config",
        "resume",
        "trunk_cache_dir",
        "data_cache",
        "teacher",
        "teacher_adapters",
        "cache",
        "preset",
        "tokenizer",
    }
)
_DATA = frozenset({"fields", "chat_template", "system", "rows", "text", "prompt", "tokens_text", "questions_text"})
_IDENTITY = frozenset({"host", "boot", "pid_space", "process_start", "user"})
_NUMBERS = ("nan", "inf", "-inf")
_ROW = re.compile(r"^[^\n]{0,300}:(\d+)([#/.+-]\w{1,12})*$")
_KEY = re.compile(r"^[A-Za-z_][\w.-]{0,60}$")
_FRAME = re.compile(r'^(\s*)File "([^"]+)", line (\d+),? in ([\w.<>]+)$')
_FAULT = re.compile(
    r"^(Fatal Python error: [A-Za-z ]+|Timeout \([\d:.]+\)!?|(Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):"
    r"|Traceback \(most recent call last\):|Current thread's C stack trace.*|  <.*>|  \.\.\.|\s*)$"
)
# MLX begins its errors with the function: `RuntimeError: [metal::malloc] Attempting to allocate ...`. So do marks of chat
# templates, such as [INST], begin what people wrote, hence the list.
_OF_MLX = re.compile(
    r"^(?:(?:RuntimeError|ValueError|MemoryError): )?"
    r"\[(?:METAL|metal::\w+|cuda\w*(?:::\w+)?|\w*malloc|allocator\S*|fast::\w+|eval|compile|Compiled\S*|array|load\w*|\w*matmul"
    r"|addmm|broadcast\w*|concatenate|reshape|transpose|gather\w*|scatter\w*|take|softmax|logsumexp|quantize|dequantize"
    r"|Primitive::\w+|vjp|custom_function|checkpoint|distributed\S*)\] .*$"
)
_ERROR = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit))(?:: (.*))?$")
# The words of the watchdog's own lines; a line that has another is left out.
_OWN_WORDS = frozenset(
    re.findall(
        r"\w+",
        "no progress for thread threads of python could run which usually takes update part parts x tokens rows row positions "
        "start load tokenise batch forward loss backward accumulate evaluate sample save optimizer memory mlx at most kept by "
        "the process left on this machine in all shape budget s ms min h mb gb",
    )
)
_THREAD = re.compile(r"^thread [\w-]{1,40}$")
_QUOTED = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"")
_ABSOLUTE = re.compile(r"(?<![\w.~/])~?/(?:[^\s/'\":;,()]+/)*([^\s/'\":;,()]+)")


def write(
    path: Path, checks: Mapping[str, Any], versions: Mapping[str, str], model: Path | None, run: Path | None
) -> list[str]:
    """Make the file; gives the names of what is in it."""
    names: list[str] = []
    hide = _hider([each for each in (run, model, Path.cwd()) if each])
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:

            def add(name: str, text: str) -> None:
                archive.writestr(name, hide(text))
                names.append(name)

            add("checks.json", _json(checks))
            add("versions.json", _json(dict(versions)))
            if model and (model / "config.json").is_file():
                add("model_config.json", _json(_model_config(model / "config.json")))
            if run:
                _add_run(run, add)
            add("README.txt", _README.format(listing="\n".join(f"  {name}" for name in names)))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return names


_README = """What `mlx-qlora doctor --bundle` found, for a bug report.

{listing}

No rows, no answers, no decoded text and no tokens are in it. Paths are cut to their last part, the home folder is ~,
the machine's name is HOST, a row's id is only its number. "(text, N)" stands for a text of N letters that was left out.
Look through it before you send it: it is yours.
"""


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def _hider(folders: Sequence[Path]) -> Callable[[str], str]:
    """A function that takes out of a text whose machine it was, and where on it things lie."""
    pairs = [(re.escape(str(each.expanduser().absolute())), each.absolute().name or "/") for each in folders]
    pairs += [(re.escape(str(each)), each.name) for each in folders if len(each.parts) > 1]
    pairs += [(re.escape(home) + r"(?![\w.-])", "~") for home in _homes()]
    pairs += [(r"/(?:home|Users)/[^/\s'\"]+", "~")]
    words = [(name, "HOST") for name in {socket.gethostname(), platform.node()}] + [(name, "USER") for name in _users()]
    pairs += [(re.escape(word) if len(word) > 5 else rf"\b{re.escape(word)}\b", to) for word, to in words if len(word) > 2]
    found = [(re.compile(pattern), name) for pattern, name in pairs]

    def hide(text: str) -> str:
        for pattern, name in found:
            text = pattern.sub(lambda _, name=name: name, text)  # type: ignore[misc]
        return _ABSOLUTE.sub(r"\1", text)

    return hide


def _homes() -> set[str]:
    homes = {str(Path.home())}
    with suppress(KeyError):
        homes.add(pwd.getpwuid(getuid()).pw_dir)
    return {home for home in homes if len(home) > 1}


def _users() -> set[str]:
    """Names of the user; `root` and the like are everybody's."""
    names = {Path(home).name for home in _homes()}
    with suppress(KeyError, OSError):
        names.add(getpass.getuser())
    return {name for name in names if name not in ("root", "user", "nobody", "home")}


def _model_config(path: Path) -> Any:
    """As it is, but for a folder on somebody's machine that some programs leave in it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {"not JSON": type(error).__name__}
    if isinstance(config, dict) and "_name_or_path" in config:
        config["_name_or_path"] = PurePath(str(config["_name_or_path"])).name
    return config


def _add_run(run: Path, add: Write) -> None:
    add("run/files.txt", _listing(run))
    for name, reader in _READERS.items():
        if (run / name).is_file():
            written = name if not name.endswith(".bin") else "flight_recorder.json"
            try:
                add(f"run/{written}", reader(run / name))
            except Exception as error:  # a broken file must not keep the others from being seen
                add(f"run/{written}.unreadable.txt", f"{type(error).__name__}\n")


def _listing(run: Path) -> str:
    files = [path for path in sorted(run.rglob("*")) if path.is_file()][:1000]
    return "".join(f"{path.stat().st_size:>14,}  {path.relative_to(run)}\n" for path in files)


def plain(value: Any, key: str = "") -> Any:
    """A value without any text that could be data.

    >>> plain({"loss": 1.5, "ended": "failed", "ids": ["train.jsonl:17"], "question": "Who are you?", "fields": {"q": "a"}})
    {'loss': 1.5, 'ended': 'failed', 'ids': ['row 17'], 'question': '(text, 12)', 'fields': '(left out)'}
    >>> plain({"model": "/home/ana/models/Mistral-7B", "host": "anas-mac"})
    {'model': 'Mistral-7B', 'host': '(left out)'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if key in _DATA or key in _IDENTITY:
        return "(left out)" if value else value
    if isinstance(value, Mapping):
        inside = "versions" if key == "versions" else ""
        return {_name(str(name)): plain(each, inside or str(name)) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        if key == "tokens" or (len(value) > _MANY and all(isinstance(each, int) for each in value)):
            return f"({len(value)} numbers)"  # which could be a text, as a model reads it
        return [plain(each, key) for each in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _word(str(value), key)


def _name(key: str) -> str:
    return key if _KEY.match(key) else f"(text, {len(key)})"


def _word(text: str, key: str) -> str:
    if text in _NUMBERS or not text:
        return text
    if key in _PATHS:
        return PurePath(text).name
    if key == "detail":
        return _message(text)
    if key == "command":
        return " ".join(re.findall(r"--[a-z][a-z0-9._-]*", text))
    if key in _WORDS or key == "versions":
        return text[:160]
    if key == "ids" and (row := _ROW.match(text)):
        return f"row {row[1]}"
    return f"(text, {len(text)})"


def _message(text: str) -> str:
    """What an error said, where it is MLX that spoke; of others only the kind: they may quote a row."""
    first = text.strip().splitlines()[0] if text.strip() else ""
    if _OF_MLX.match(first):
        return _QUOTED.sub("(quoted)", first)[:_LONGEST_KEPT]
    if kind := _ERROR.match(first):
        return f"{kind[1]}: (text, {len(kind[2] or '')})" if kind[2] else kind[1]
    return f"(text, {len(text)})"


def stacks(text: str) -> str:
    """A traceback, or stacks as faulthandler writes them, without source and messages.

    >>> print(stacks('ValueError: who said "hello"?\\n  File "/home/ana/x/mlx_qlora/train.py", line 7 in run'))
    ValueError: (text, 17)
      File "mlx_qlora/train.py", line 7 in run
    """
    lines = []
    for line in text.splitlines()[-2000:]:
        if frame := _FRAME.match(line):
            lines.append(f'{frame[1]}File "{_module(frame[2])}", line {frame[3]} in {frame[4]}')
        elif _FAULT.match(line) or _THREAD.match(line) or _own(line):
            lines.append(line)
        else:
            lines.append(_message(line))
    return "\n".join(lines)


def _own(line: str) -> bool:
    """
    >>> _own("--- 2026-11-21 20:50:33  no progress for 2 min 03 s: update 3, backward of 1 x 812 tokens"), _own("hello")
    (True, False)
    """
    return all(word.isdigit() or word.lower() in _OWN_WORDS for word in re.findall(r"\w+", line))


def _module(path: str) -> str:
    """A file of a package by its place in it; of others the last part."""
    for mark in ("site-packages/", "/mlx_qlora/"):
        if mark in path:
            return path.rsplit(mark, 1)[1] if mark.startswith("site") else "mlx_qlora/" + path.rsplit(mark, 1)[1]
    return PurePath(path).name


def _of_yaml(path: Path) -> str:
    import yaml

    return str(yaml.safe_dump(plain(yaml.safe_load(path.read_text(encoding="utf-8"))), sort_keys=False, allow_unicode=True))


def _of_json(path: Path) -> str:
    return _json(plain(json.loads(path.read_text(encoding="utf-8"))))


def _of_lines(path: Path) -> str:
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-_METRICS_LINES:]:
        try:
            kept.append(json.dumps(plain(json.loads(line))))
        except ValueError:  # the last one may be half written
            kept.append(json.dumps(f"(text, {len(line)})"))
    return "".join(f"{line}\n" for line in kept)


def _of_stacks(path: Path) -> str:
    return stacks(path.read_text(encoding="utf-8", errors="replace")) + "\n"


def _of_recorder(path: Path) -> str:
    record = import_module("mlx_qlora.run.recorder").read(path.parent)
    return _json(plain(record) if record is not None else "(unreadable)")


_READERS: dict[str, Callable[[Path], str]] = {
    "config.yaml": _of_yaml,
    "training_summary.json": _of_json,
    "training_state.json": _of_json,
    "training_metrics.jsonl": _of_lines,
    "flight_recorder.bin": _of_recorder,
    "crash.txt": _of_stacks,
    "stalled.txt": _of_stacks,
    "supervision.jsonl": _of_lines,
}
