"""Make the embedded model from nothing: tokenizer, training on the little world, 4 bits, `mlx_qlora/assets/mistral`.

    python data/make_model.py                 # about 20 minutes on 2 CPU cores
    python data/make_model.py --steps 20 --output-dir /tmp/try

Everything follows from the seed; the same machine and versions give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import llama
from mlx_lm.utils import quantize_model, save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_qlora.model import frozen

import little_world

SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('this model knows the roles system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONFIG = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROW = 256  # tokens a training row
BATCH = 16


def make_tokenizer(folder: Path, seed: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(str(CONFIG["vocab_size"])),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts(islice(little_world.documents(seed), 20_000)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=SPECIAL[3:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def texts(documents: Iterator[little_world.Document]) -> Iterator[str]:
    for document in documents:
        if "messages" in document:
            yield from (message["content"] for message in document["messages"])  # type: ignore[index]
        else:
            yield str(document["text"])


def rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Batches of rows of the stream of documents, one after the other, each with its begin and end; and weights.

    What the assistant says counts four times as much as the rest, much of which is chance.
    """
    begin, end = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.eos_token_id
    stream: list[int] = []
    weights: list[float] = []
    size = BATCH * (ROW + 1)
    for document in little_world.documents(seed):
        if "messages" in document:
            text = tokenizer.apply_chat_template(document["messages"], tokenize=False)
        else:
            text = f"<s>{document['text']}</s>"
        answering = False
        for token in tokenizer.encode(text, add_special_tokens=False):
            stream.append(token)
            weights.append(1.0 if answering else 0.25)
            answering = token == begin or (answering and token != end)
        if len(stream) >= size:
            yield tuple(mx.array(np.array(part[:size], kind).reshape(BATCH, ROW + 1)) for part, kind in
                        ((stream, np.int32), (weights, np.float32)))  # fmt: skip
            stream, weights = [], []


def loss_of(model: nn.Module, tokens: mx.array, weights: mx.array) -> mx.array:
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="none")
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def train(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> llama.Model:
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.04 if p.ndim == 2 else p, model.parameters()))
    warmup = max(1, steps // 20)
    schedule = optim.join_schedules(
        [optim.linear_schedule(0.0, 3e-3, warmup), optim.cosine_decay(3e-3, steps - warmup, 1e-5)], [warmup]
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.01, bias_correction=True)
    step_fn = nn.value_and_grad(model, loss_of)
    begun = time.time()
    for step, batch in enumerate(islice(rows(tokenizer, seed + 1), steps)):
        loss, grads = step_fn(model, *batch)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(loss, model.parameters(), optimizer.state)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - begun:6.0f} s", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--seed", type=int, default=7)
    default = Path(__file__).parent.parent / "mlx_qlora" / "assets" / "mistral"
    parser.add_argument("--output-dir", type=Path, default=default)
    arguments = parser.parse_args()
    folder: Path = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)

    tokenizer = make_tokenizer(folder, arguments.seed)
    model = train(tokenizer, arguments.steps, arguments.seed)
    held_out = list(islice(rows(tokenizer, arguments.seed + 1000), 8))
    before = float(np.mean([loss_of(model, *batch).item() for batch in held_out]))
    model.update(tree_map(lambda p: p.astype(mx.float16), model.parameters()))
    model, config = quantize_model(model, dict(CONFIG), group_size=64, bits=4)
    model.update(tree_map(lambda p: p.astype(mx.float32) if p.dtype == mx.float16 else p, model.parameters()))
    frozen.install(model)
    after = float(np.mean([loss_of(model, *batch).item() for batch in held_out]))
    model.update(tree_map(lambda p: p.astype(mx.float16) if p.dtype == mx.float32 else p, model.parameters()))
    save_model(folder, model)
    save_config(config, folder / "config.json")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    print(json.dumps({"loss": before, "loss_4bit": after, "bytes": sum(sizes.values()), "files": sizes}, indent=2))


if __name__ == "__main__":
    main()
