"""Makes the adapters that everybody begins with, and judges everybody's with one loss on the same held-out examples."""

from __future__ import annotations

from pathlib import Path

from mlx_qlora.bench.data import corpus_of
from mlx_qlora.bench.ours import lora_config
from mlx_qlora.bench.settings import Spec
from mlx_qlora.bench.turns import Turns
from mlx_qlora.data.layout import Layout, lay_out
from mlx_qlora.look.measure import mean_loss
from mlx_qlora.model import lora
from mlx_qlora.model.load import load
from mlx_qlora.objectives.sft import sft
from mlx_qlora.run import folder as run_folder

_ROWS = 4  # in a batch: documents of 2,000 tokens have logits at all places, 1 GB of them with 32,000 tokens to choose from


def judge(spec: Spec, turns: Turns) -> None:
    """Ready with the loss of the beginning, the first time; then, for each folder in `work`, that with the adapters in it."""
    loaded = load(spec.model)
    beginning = not Path(spec.initial).exists()
    attached = lora.attach(loaded.model, lora_config(spec), seed=spec.seed)
    run_folder.deliver(Path(spec.initial).parent, attached.delivered(lora.adapter_arrays(loaded.model)))
    names = set(lora.adapter_arrays(loaded.model))
    corpus = corpus_of(spec.data, loaded.tokenizer, spec.seed, spec.max_seq_length)
    batches = lay_out(corpus.valid_examples(), Layout(rows=min(spec.batch_size, _ROWS)))
    turns.ready(
        loss=mean_loss(loaded.model, sft(), batches) if beginning else None,
        trainable=attached.trainable,
        parameters=attached.total,
        layers=attached.total_layers,
    )
    while True:
        for folder in list(turns.work):
            arrays = run_folder.load_delivered(Path(folder) / "adapters" / "adapters.safetensors")
            if other := set(arrays) ^ names:
                turns.done(loss=None, problem=f"its adapters are not on the same layers as ours: {sorted(other)[0]}")
                continue
            lora.load(loaded.model, arrays, folder)
            turns.done(loss=mean_loss(loaded.model, sft(), batches))
