"""Small files that a person wrote, or that came with a download: read with limits, whatever their names lead to."""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mlx_qlora.errors import ConfigError

MOST_BYTES = 2**20
_MOST_VALUES = 10_000  # aliases unfolded; a file of settings has some fifty
_YAML = "tag:yaml.org,2002:"
_KINDS = {_YAML + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value")}


def small_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of an ordinary file of at most so many bytes. A pipe or a device, which may have no end, is not opened.

    All that is wrong is an `OSError` whose `strerror` says it, or a `UnicodeDecodeError`.
    """
    kind = path.stat().st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, a file is expected", str(path))
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "it is a pipe or a device, an ordinary file is expected", str(path))
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most / 2**20:.0f} MB", str(path))
    return raw.decode("utf-8")


def yaml_tree(path: Path) -> yaml.Node | None:
    """A YAML file as nodes, of which none is ever made into an object: small, of plain kinds, with aliases that end."""
    try:
        root = yaml.compose(small_text(path), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"config: {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: {path} is not UTF-8 text.") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply; settings such as `epochs: 3` are expected.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter come of escapes such as \UFFFFFFFF
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}.") from error
    if root is not None:
        _check(path, root)
    return root


def _check(path: Path, root: yaml.Node) -> None:
    for number, node in enumerate(_unfolded(root)):
        line = node.start_mark.line + 1
        if node.tag not in _KINDS:
            raise ConfigError(
                f"{path}:{line}: {node.tag.replace(_YAML, '!!')}: tags that make objects are not read here; "
                "texts, numbers, true, false, null, lists and groups are."
            )
        if number == _MOST_VALUES:
            raise ConfigError(
                f"{path}:{line}: more than {_MOST_VALUES:,} values, counted with each alias unfolded. "
                "Settings have no use for so many; write out what the aliases stand for."
            )


def _unfolded(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node as often as it is reached; an alias inside of what it names has no end."""
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [each for pair in reversed(node.value) for each in reversed(pair)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)


def json_object(path: Path) -> dict[str, Any]:
    """An object in a file that may be missing, damaged, or half written; then it is empty."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of lines, without those that can't be read: the last one may be half written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # texts in JSON may hold other ends of lines
    except OSError:
        return []
    values = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [value for value in values if isinstance(value, dict)]


def yaml_object(path: Path) -> dict[str, Any]:
    """What a YAML file holds, which may be missing or damaged; then it is empty."""
    try:
        root = yaml_tree(path)
    except ConfigError:
        return {}
    if root is None:
        return {}
    try:
        value = yaml.SafeLoader("").construct_document(root)
    except (yaml.YAMLError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
