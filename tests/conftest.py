"""What the tests share: tiny random models of mlx-lm's own classes, and the embedded model."""

from __future__ import annotations

import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_qlora.assets import embedded_data
from mlx_qlora.data.layout import Kind, Layout
from mlx_qlora.model import backend
from mlx_qlora.model.load import Loaded, load
from mlx_qlora.records import Example

backend.reuse_memory()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background, and then inherited

_COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 96, "head_dim": 16,
}  # fmt: skip
# name: (module of mlx_lm.models, arguments besides the common ones)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("llama", {"model_type": "mistral", "tie_word_embeddings": False}),
    "mistral-tied": ("llama", {"model_type": "mistral", "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"model_type": "qwen2", "tie_word_embeddings": False, "rope_theta": 1e4}),
    "qwen3": ("qwen3", {"model_type": "qwen3", "tie_word_embeddings": True, "rope_theta": 1e4, "max_position_embeddings": 512}),
    "gemma2": ("gemma2", {"model_type": "gemma2", "query_pre_attn_scalar": 16.0, "final_logit_softcapping": 2.0}),
    "gemma3": (
        "gemma3_text",
        {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 16.0, "sliding_window_pattern": 2},
    ),
    "phi3": ("phi3", {"model_type": "phi3"}),
}


def tiny_model(shape: str, seed: int = 0, quantized: bool = True) -> nn.Module:
    """A random model whose outputs are far from uniform, 4-bit with groups of 32."""
    module, more = SHAPES[shape]
    mx.random.seed(seed)
    code = import_module(f"mlx_lm.models.{module}")
    model: nn.Module = code.Model(code.ModelArgs.from_dict(_COMMON | more))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.2 if p.ndim == 2 else p, model.parameters()))
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
    model.eval()
    mx.eval(model.parameters())
    return model


def in_rows(rows: int) -> Layout:
    """Plain padded batches of so many examples."""
    return Layout(Kind.PLAIN, rows=rows, token_budget=1_000_000)


@pytest.fixture(params=list(SHAPES))
def any_model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 22 training and 6 validation rows of the demo."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 22), ("valid", 6)):
        lines = (embedded_data() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def embedded() -> Loaded:
    return load("embedded")


def make_examples(count: int, seed: int = 0, vocabulary: int = 96, longest: int = 24) -> list[Example]:
    """Examples of unequal length with unequal numbers of supervised tokens, some of weight 0.5."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(rng.integers(5, longest))
        weights = rng.choice([0.0, 0.0, 0.5, 1.0], length).astype(np.float32)
        weights[0], weights[-1] = 0.0, 1.0
        made.append(Example(f"example:{number}", rng.integers(3, vocabulary, length).astype(np.int32), weights))
    return made


def largest_difference(got: Any, expected: Any) -> float:
    """The largest distance between two trees of arrays, in parts of the largest value of each array."""
    worst = 0.0
    pairs = zip(tree_flatten(got), tree_flatten(expected), strict=True)
    for (name, a), (same_name, b) in pairs:
        assert name == same_name
        scale = max(np.abs(np.array(b)).max(), 1e-12)
        worst = max(worst, float(np.abs(np.array(a) - np.array(b)).max() / scale))
    return worst


def randomize_adapters(model: nn.Module, seed: int = 5) -> None:
    """Adapters as after some training: neither matrix is zero."""
    mx.random.seed(seed)
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.05, model.trainable_parameters()))
    mx.eval(model.trainable_parameters())


def same_bytes(a: Any, b: Any) -> bool:
    pairs = zip(tree_flatten(a), tree_flatten(b), strict=True)
    return all(na == nb and np.array(x).tobytes() == np.array(y).tobytes() for (na, x), (nb, y) in pairs)


Loss = Callable[[nn.Module], mx.array]


def loss_and_gradient(model: nn.Module, loss: Loss) -> tuple[mx.array, Any]:
    return nn.value_and_grad(model, loss)(model)  # type: ignore[no-any-return]
