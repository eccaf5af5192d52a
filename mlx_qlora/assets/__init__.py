"""The embedded model and the demo's data: where they lie."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "embedded"
_HERE = Path(__file__).parent


def embedded_model() -> Path:
    return _HERE / "mistral"


def embedded_data() -> Path:
    """The demo's data: inside the package once installed, `data/` of the repository in a checkout."""
    packaged = _HERE / "club"
    return packaged if packaged.exists() else _HERE.parent.parent / "data"


def demo_config() -> Path:
    """`demo.yaml`: inside the package once installed, in `examples/` in a checkout."""
    packaged = _HERE / "demo.yaml"
    return packaged if packaged.exists() else _HERE.parent.parent / "examples" / "demo.yaml"
