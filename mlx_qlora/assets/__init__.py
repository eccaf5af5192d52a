"""The embedded models and the demo's data: where they lie."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "embedded"
TEACHER = "embedded-teacher"
_HERE = Path(__file__).parent


def embedded_model() -> Path:
    return _HERE / "mistral"


def embedded_teacher() -> Path:
    """A larger sibling of the embedded model, with its tokenizer, that solves word problems (`make distill`)."""
    return _HERE / "teacher"


def packaged(name: str) -> Path | None:
    """The folder of a model of this package; None: the name means another model."""
    return {EMBEDDED: embedded_model(), TEACHER: embedded_teacher()}.get(name)


def embedded_data() -> Path:
    """The demo's data: inside the package once installed, `data/` of the repository in a checkout."""
    packaged = _HERE / "club"
    return packaged if packaged.exists() else _HERE.parent.parent / "data"


def demo_config() -> Path:
    """`demo.yaml`: inside the package once installed, in `examples/` in a checkout."""
    packaged = _HERE / "demo.yaml"
    return packaged if packaged.exists() else _HERE.parent.parent / "examples" / "demo.yaml"
