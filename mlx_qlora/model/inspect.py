"""A model's folder looked at file by file: whether it is whole, what it says of itself, and who vouches for it.

Nothing is loaded and MLX is not needed, so this works where loading would crash. `tokenizer` alone is dearer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_qlora.assets import packaged
from mlx_qlora.errors import ModelError
from mlx_qlora.findings import Finding, counted, each_of, fail, ok, size, warn

INDEX = "model.safetensors.index.json"
_LFS = b"version https://git-lfs"
_LONGEST_HEADER = 100_000_000  # what the safetensors library accepts
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "C64": 64,
}  # fmt: skip
Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all


@dataclass(frozen=True)
class Place:
    """Where a model lies, and how its files are fetched again."""

    folder: Path
    name: str
    repo: str = ""  # of the hub, where it is known

    def fetch(self, file: str = "") -> str:
        """What to type to have a file, or all that is missing, fetched."""
        if packaged(self.name):
            return "pip install --force-reinstall --no-deps mlx-qlora"
        where = "" if self.repo else f" --local-dir {shlex.quote(str(self.folder))}"
        return f"hf download {self.repo or 'OWNER/NAME'}{f' {file}' if file else ''}{where}"

    def again(self, file: str = "") -> str:
        """The same for what is there, and wrong."""
        return self.fetch(file) + ("" if packaged(self.name) else " --force-download")


def locate(name: str) -> Place | Finding:
    """The folder of a model: one that is named, or what the hub's cache has of it. Nothing is downloaded."""
    if (own := packaged(name)) is not None:
        return Place(own, name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Place(folder, name)
    if folder.is_file():
        return fail("model", f"{name} is a file", "Name the folder that holds config.json and the weights.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return fail("model", f"{name}: there is no such folder", "Name a folder with a model, or one of the hub as owner/name.")
    return _in_cache(name)


def _in_cache(name: str) -> Place | Finding:
    from huggingface_hub import constants

    store = Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"))
    ref = store / "refs" / "main"
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    snapshots = sorted((store / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    folder = store / "snapshots" / commit if commit else next(reversed(snapshots), store / "snapshots" / "none")
    if folder.is_dir():
        return Place(folder, name, repo=name)
    return fail(
        "model",
        f"{name}: neither a folder here nor in the hub's cache ({_short(constants.HF_HUB_CACHE)})",
        f"Fetch it (training does so by itself): hf download {name}",
    )


def _short(path: str) -> str:
    """With ~ for the home folder, as people write it."""
    home = str(Path.home())
    return "~" + path[len(home) :] if path.startswith(home + os.sep) else path


def inspect(place: Place, *, fast: bool = False, progress: Progress = lambda *_: None) -> Iterator[Finding]:
    """All that can be said of a folder without loading it. `fast` leaves out the checksums, which read every byte."""
    folder = place.folder
    yield from each_of(
        (
            ("files", lambda: _files(place)),
            ("config", lambda: _config(place)),
            ("weights", lambda: _weights(place)),
            ("index", lambda: _index(place) if (folder / INDEX).exists() else _without_index(place)),
            ("checksums", lambda: _checksums(place, fast, progress)),
            ("template", lambda: _template(folder)),
        )
    )


def weight_files(folder: Path) -> list[Path]:
    """What mlx-lm reads weights from."""
    return sorted(folder.glob("model*.safetensors"))


def _files(place: Place) -> Iterable[Finding]:
    folder = place.folder
    names = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: -path.stat().st_size)
    sizes = {path.name: path.stat().st_size for path in names}
    broken = [path.name for path in sorted(folder.iterdir()) if path.is_symlink() and not path.exists()]
    lacking = [name for name in ("config.json", "tokenizer_config.json") if name not in sizes]
    lacking += [] if weight_files(folder) else ["model*.safetensors"]
    shown = ", ".join(f"{name} {size(bytes)}" for name, bytes in list(sizes.items())[:8])
    more = f", and {len(sizes) - 8} more" if len(sizes) > 8 else ""
    found = f"{counted(len(sizes), 'file')}, {size(sum(sizes.values()))}: {shown}{more}" if sizes else "an empty folder"
    if broken:
        yield fail("files", f"{', '.join(broken)}: a link to nothing", f"Fetch it again: {place.again()}", files=sizes)
    elif lacking:
        yield fail("files", f"no {', no '.join(lacking)}; there is {found}", _what_lacks(place, lacking), files=sizes)
    else:
        yield ok("files", found, files=sizes)
    unfinished = [*folder.glob(".cache/huggingface/download/*.incomplete"), *_blobs(folder).glob("*.incomplete")]
    if unfinished:
        bytes = sum(path.stat().st_size for path in unfinished)
        yield warn(
            "download",
            f"{counted(len(unfinished), 'unfinished download')} ({size(bytes)}) beside it",
            f"If files are missing, let it go on: {place.fetch()}",
        )


def _blobs(folder: Path) -> Path:
    return folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder / "no-blobs"


def _what_lacks(place: Place, lacking: list[str]) -> str:
    if any(place.folder.glob("*.gguf")):
        return "A GGUF file is for llama.cpp. Take the same model as mlx-lm has it, from mlx-community."
    if any(place.folder.glob("*.bin")):
        return "These weights are PyTorch's. Convert them: mlx_lm.convert --hf-path FOLDER --mlx-path NEW_FOLDER -q"
    if any(place.folder.glob("adapters.safetensors")):
        return "These are adapters, not a model. Name the model that they were trained on."
    return f"Name a folder that mlx-lm can load, or fetch what is missing ({', '.join(lacking)}): {place.fetch()}"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, or a ModelError that says what is wrong with it."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("there is none") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"it can't be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError("it has no model_type")
    return config


def _config(place: Place) -> Iterable[Finding]:
    if not (place.folder / "config.json").exists():
        return  # said of the files
    try:
        config = read_config(place.folder)
    except ModelError as error:
        yield fail("config", f"config.json: {error}", f"Fetch it again: {place.again('config.json')}")
        return
    kind = config["model_type"]
    for key in ("auto_map", "model_file"):
        if key in config:
            yield fail(
                "config",
                f"config.json has {key}: this model brings code of its own to run, and that is never done here",
                f"If mlx-lm has {kind!r} itself, take that line out of config.json; or take a conversion without it, "
                "such as those of mlx-community.",
            )
            return
    quantization = config.get("quantization") or {}
    bits = f"{quantization['bits']}-bit in groups of {quantization.get('group_size')}" if quantization.get("bits") else ""
    parts = [kind, bits or "not quantised"]
    parts += [f"{config['num_hidden_layers']} layers"] if "num_hidden_layers" in config else []
    parts += [f"{config['vocab_size']:,} tokens"] if isinstance(config.get("vocab_size"), int) else []
    yield ok("config", ", ".join(parts), model_type=kind)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: dict[str, int]  # name: bytes
    start: int  # where the data begin
    expected: int  # the size that the file must have
    actual: int


def read_header(path: Path) -> Header:
    """The header of a safetensors file, or a ModelError that says in plain words what the file is instead."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        if begin + file.read(len(_LFS) - 8) == _LFS:
            file.seek(0)
            raise ModelError(_pointer(file.read(1024).decode(errors="replace")))
        if begin[:1] == b"<" or begin[:5] == b"Inval":
            raise ModelError("is a web page or a message of a server, saved under this name")
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
        if not 2 <= length <= _LONGEST_HEADER:
            raise ModelError(f"is no safetensors file ({size(actual)}): its first 8 bytes can't be the length of a header")
        if 8 + length > actual:
            raise ModelError(f"is cut inside its header ({size(actual)} of at least {size(8 + length)})")
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ranges = {name: _range(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"has a header that is damaged: {error}") from error
    _check_cover(ranges)
    end = max((last for _, last in ranges.values()), default=0)
    return Header({name: last - first for name, (first, last) in ranges.items()}, 8 + length, 8 + length + end, actual)


def _pointer(text: str) -> str:
    real = re.search(r"^size (\d+)", text, re.MULTILINE)
    return f"is a git-LFS pointer, not the weights{f' (these have {size(int(real[1]))})' if real else ''}"


def _range(entry: dict[str, Any]) -> tuple[int, int]:
    first, last = (int(each) for each in entry["data_offsets"])
    count = 1
    for each in entry["shape"]:
        count *= int(each)
    bits = _BITS.get(entry["dtype"])
    if first < 0 or last < first or (bits is not None and count * bits != (last - first) * 8):
        raise ValueError(f"{entry['dtype']} {entry['shape']} does not fit into the bytes {first} to {last}")
    return first, last


def _check_cover(ranges: dict[str, tuple[int, int]]) -> None:
    """Tensors lie one behind the other: no byte twice, none unused."""
    before = 0
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        if first != before:
            raise ModelError(f"has a header that is damaged: {name} begins at byte {first}, where {before} is expected")
        before = last


def _weights(place: Place) -> Iterable[Finding]:
    files = weight_files(place.folder)
    good, tensors, bytes = 0, 0, 0
    for path in files:
        try:
            header = read_header(path)
        except ModelError as error:
            pointer = "git-LFS" in str(error)
            lfs = f"In that folder: git lfs install && git lfs pull. Or: {place.again(path.name)}"
            yield fail("weights", f"{path.name} {error}", lfs if pointer else f"Download it again: {place.again(path.name)}")
            continue
        if header.actual < header.expected:
            yield fail(
                "weights",
                f"{path.name} ends {size(header.expected - header.actual)} early "
                f"({size(header.actual)} of {size(header.expected)}): the download or the copy was cut off",
                f"Download it again: {place.again(path.name)}",
            )
            continue
        if header.actual > header.expected:
            yield fail(
                "weights",
                f"{path.name} has {size(header.actual - header.expected)} more than its header accounts for",
                f"It is not what was published. Download it again: {place.again(path.name)}",
            )
            continue
        good, tensors, bytes = good + 1, tensors + len(header.tensors), bytes + header.actual - header.start
    if files and good == len(files):
        yield ok(
            "weights",
            f"{counted(tensors, 'tensor')}, {size(bytes)} in {counted(good, 'file')}, each as long as its header says",
            bytes=bytes,
            tensors=tensors,
        )


def outside(name: str) -> bool:
    """Whether a file's name would lead out of the folder that it is read in.

    >>> [outside(name) for name in ("model.safetensors", "part/a.safetensors", "../x", "a/../../x", "/etc/x", r"C:\\x")]
    [False, False, True, True, True, True]
    """
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or not name or ":" in name.split("/")[0]


def _index(place: Place) -> Iterable[Finding]:
    again = f"Fetch the index again: {place.again(INDEX)}"
    try:
        index = json.loads((place.folder / INDEX).read_text(encoding="utf-8"))
        named: dict[str, str] = index["weight_map"]
        shards = sorted({*map(str, named.values())})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield fail("index", f"{INDEX} can't be read: {type(error).__name__}: {error}", again)
        return
    if leaving := [name for name in shards if outside(name)]:
        yield fail(
            "index",
            f"{INDEX} names {', '.join(map(repr, leaving[:3]))}: a file outside of the model's folder",
            "No honest index does that. Do not load this model with anything; take it from its publisher again.",
        )
        return
    if missing := [name for name in shards if not (place.folder / name).is_file()]:
        names = f"{', '.join(missing[:4])}{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}"
        yield fail(
            "index",
            f"{len(missing)} of the {counted(len(shards), 'file')} that {INDEX} names {'is' if len(missing) == 1 else 'are'} "
            f"missing: {names}",
            f"Download what is missing: {place.fetch(missing[0] if len(missing) == 1 else '')}",
        )
        return
    yield from _index_against_files(index, named, place, again)


def _index_against_files(index: dict[str, Any], named: dict[str, str], place: Place, again: str) -> Iterable[Finding]:
    there: dict[str, int] = {}
    for path in weight_files(place.folder):
        try:
            there |= read_header(path).tensors
        except ModelError:
            return  # said already, of the file
    lost = [name for name in named if name not in there]
    said = (index.get("metadata") or {}).get("total_size")
    bytes = sum(there.values())
    if lost:
        yield warn(
            "index",
            f"{INDEX} names {counted(len(lost), 'tensor')} that no file has, such as {lost[0]}",
            f"If the smallest step below works, the index is merely old. Otherwise: {place.again()}",
        )
    elif isinstance(said, int | float) and said != bytes:
        yield warn(
            "index",
            f"{INDEX} says {size(said)} ({said:,} bytes), the files have {size(bytes)} ({bytes:,})",
            f"Files and index are not of the same conversion. If the smallest step below fails: {place.again()}",
        )
    else:
        agree = f", {size(bytes)} as it says" if said is not None else ""
        yield ok("index", f"{counted(len(named), 'tensor')} named, all there{agree}")


def _without_index(place: Place) -> Iterable[Finding]:
    """Names such as model-00002-of-00004.safetensors say how many there should be."""
    numbered = [re.fullmatch(r"model-(\d+)-of-(\d+)\.safetensors", path.name) for path in weight_files(place.folder)]
    there = {int(each[1]) for each in numbered if each}
    whole = max((int(each[2]) for each in numbered if each), default=0)
    if missing := sorted(set(range(1, whole + 1)) - there):
        yield fail(
            "index",
            f"there is no index, and of {whole} files number {', '.join(map(str, missing[:8]))} is missing",
            f"Download what is missing: {place.fetch()}",
        )


@dataclass(frozen=True)
class _Vouched:
    """A file, and the checksum that it had when it was published."""

    path: Path
    checksum: str  # 64 letters: SHA-256; 40: git's own of a blob


def _vouched(folder: Path) -> list[_Vouched]:
    """The hub's cache names blobs by their checksums; a folder downloaded to keeps them in .cache/huggingface."""
    found = []
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        note = folder / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            checksum = path.resolve().name
        elif note.is_file():
            lines = note.read_text(encoding="utf-8", errors="replace").splitlines()
            checksum = lines[1].strip().strip('"') if len(lines) > 1 else ""
        else:
            continue
        if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", checksum):
            found.append(_Vouched(path, checksum))
    return found


def checksum_of(path: Path, kind: int, progress: Progress = lambda *_: None) -> str:
    """SHA-256 (`kind` 64 letters), or the SHA-1 of git, whose blobs begin with their length (40)."""
    whole = path.stat().st_size
    digest = hashlib.sha256() if kind == 64 else hashlib.sha1(f"blob {whole}\0".encode(), usedforsecurity=False)
    done = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
            done += len(block)
            progress(path.name, done, whole)
    return digest.hexdigest()


def _readable(path: Path) -> bool:
    """Weights that are cut, or something else, have been spoken of."""
    if path.suffix != ".safetensors":
        return True
    try:
        header = read_header(path)
    except ModelError:
        return False
    return header.actual == header.expected


def _checksums(place: Place, fast: bool, progress: Progress) -> Iterable[Finding]:
    vouched = [each for each in _vouched(place.folder) if _readable(each.path)]
    if not vouched:
        yield ok("checksums", "this folder has none to compare with")
        return
    bytes = sum(each.path.stat().st_size for each in vouched)
    if fast:
        yield ok("checksums", f"of {counted(len(vouched), 'file')} ({size(bytes)}) there is one; not compared (--fast)")
        return
    good = 0
    for each in vouched:
        if checksum_of(each.path, len(each.checksum), progress) == each.checksum:
            good += 1
        elif each.path.suffix == ".safetensors":
            yield fail(
                "checksums",
                f"{each.path.name} is not what was published: its SHA-256 should begin {each.checksum[:12]}",
                f"Bits changed on the disk or on the way. Download it again: {place.again(each.path.name)}",
            )
        else:
            yield warn(
                "checksums",
                f"{each.path.name} is not what was published",
                f"If you changed it yourself, all is well. If not: {place.again(each.path.name)}",
            )
    if good == len(vouched):
        yield ok("checksums", f"{counted(good, 'file')} ({size(bytes)}), each as it was published")


def _template(folder: Path) -> Iterable[Finding]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return  # said of the files
    settings = json.loads(path.read_text(encoding="utf-8"))
    where = [name for name in ("chat_template.jinja", "chat_template.json") if (folder / name).is_file()]
    where += [path.name] if "chat_template" in settings else []
    if where:
        yield ok("template", f"a chat template, in {where[0]}")
    else:
        yield ok("template", "no chat template: a base model. Chats are written plainly, or as --chat-template says")


def known_to_mlx_lm(config: dict[str, Any]) -> Finding:
    """Whether mlx-lm has code for this kind of model. Imports it."""
    from importlib.metadata import version

    from mlx_lm.utils import _get_classes

    from mlx_qlora.model import lstm

    kind, release = config["model_type"], version("mlx-lm")
    if kind == lstm.MODEL_TYPE:
        return ok("kind", f"{kind}: it is in {lstm.__name__}; mlx-lm by itself does not load it")
    try:
        made, _ = _get_classes(config)
    except Exception as error:  # of a module that is no model, whatever it raises
        close = f"such as {', '.join(near)}" if (near := _like(kind)) else "see mlx_lm/models for those that it has"
        return fail(
            "kind",
            f"mlx-lm {release} has no code for {kind!r} ({type(error).__name__})",
            f"A newer one may: pip install -U mlx-lm. Or take another kind of model, {close}.",
        )
    return ok("kind", f"{kind}: mlx-lm {release} has it in {made.__module__}")


def _like(kind: str) -> list[str]:
    import difflib

    spec = importlib.util.find_spec("mlx_lm.models")
    places = list(spec.submodule_search_locations or []) if spec else []
    names = [entry.removesuffix(".py") for place in places for entry in os.listdir(place) if entry.endswith(".py")]
    return difflib.get_close_matches(kind, names, n=3)


# Letters of several scripts, spaces and signs: what a tokenizer with a damaged file loses first.
SENTENCE = "The cat sleeps on the mat; o gato dorme às 21h30 (não é?)."


def tokenizer(name: str, config: dict[str, Any], load: Callable[[str], Any]) -> Iterator[Finding]:
    """Whether the tokenizer loads, fits the model and gives back what it was given. `load`: `model.load.load_tokenizer`."""
    try:
        made = load(name)
    except ModelError as error:
        remedy = "Fetch tokenizer.json and tokenizer_config.json again; a newer transformers may also help."
        yield fail("tokenizer", str(error), remedy)
        return
    tokens = list(made.encode(SENTENCE, add_special_tokens=False))
    back = made.decode(tokens)
    found = f"{type(getattr(made, '_tokenizer', made)).__name__}, {len(made.get_vocab()):,} tokens"
    known, last = config.get("vocab_size"), max(made.get_vocab().values(), default=0)
    if isinstance(known, int) and last >= known:
        yield fail(
            "tokenizer",
            f"{found}, up to number {last:,}; the model knows {known:,}",
            "Tokenizer and model are not of each other: numbers past the end read other memory. Fetch both from one place.",
        )
    elif made.eos_token_id is None:
        yield warn("tokenizer", f"{found}, none of which ends a text", "Rows with answers need an eos_token in its settings.")
    elif " ".join(back.split()) == SENTENCE:
        yield ok("tokenizer", f"{found}; a sentence of {len(tokens)} tokens comes back as it was")
    else:
        yield warn(
            "tokenizer",
            f"{found}; {SENTENCE!r} came back as {back!r}",
            "Some tokenizers can't write everything. Look at your own data as the model sees it: mlx-qlora data PATH --model M",
        )
