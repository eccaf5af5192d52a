"""A model of any size with random weights, in 4 bits, as a folder that mlx-lm loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qlora.assets import embedded_model
from mlx_qlora.bench.settings import ModelShape

_QUANTIZATION = {"group_size": 64, "bits": 4, "mode": "affine"}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SHARD = 4_000_000_000  # bytes; mlx-lm reads model*.safetensors


def generate(shape: ModelShape, seed: int, folder: Path) -> None:
    """Write config.json, the weights, and the embedded model's tokenizer (its ids fit into any vocabulary).

    The weights are made and quantised a layer at a time, so that the memory needed is that of the 4-bit model.
    """
    from mlx_lm.models import llama

    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(shape)
    mx.random.seed(seed)
    model: Any = llama.Model(llama.ModelArgs.from_dict(config))  # lazy: no weight is computed yet
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=4)
    for part in (*model.model.layers, model):
        mx.eval(part.parameters())
    arrays: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    for number, shard in enumerate(_shards(arrays)):
        mx.save_safetensors(str(folder / f"model-{number:05d}.safetensors"), shard, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in _TOKENIZER:
        shutil.copy(embedded_model() / name, folder / name)
    del model, arrays
    mx.clear_cache()


def configuration(shape: ModelShape) -> dict[str, Any]:
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width_inside,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.number_of_heads,
        "num_key_value_heads": shape.number_of_kv_heads,
        "head_dim": shape.hidden // shape.number_of_heads,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization": _QUANTIZATION,
    }


def _shards(arrays: dict[str, mx.array]) -> list[dict[str, mx.array]]:
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    for name, array in arrays.items():
        if size + array.nbytes > _SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards
