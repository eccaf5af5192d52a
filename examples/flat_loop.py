"""QLoRA fine-tuning in one file, top to bottom, without abstractions: for reading.

    python examples/flat_loop.py --model MODEL --data FOLDER --steps 20

The same mathematics as `mlx-qlora train`, line by line, and none of its conveniences: no validation, no early
stopping, no files. Its losses equal the library's; a test holds that. The one thing taken from the library is the
fast BLAS that it loads on Linux; on a Mac leave that line out.
"""

import argparse
import json
import math
from pathlib import Path

import mlx_qlora  # noqa: F401  (only for its BLAS, which has to be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--gradient-accumulation", type=int, default=1)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--scale", type=float, default=20.0)
parser.add_argument("--dropout", type=float, default=0.0)
parser.add_argument("--clip", type=float, default=1.0)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()


# The model: 4-bit and frozen. On the CPU float32 is much faster than bf16 and f16.
model, tokenizer = mlx_lm.load(args.model, {"trust_remote_code": False})
if mx.default_device().type == mx.DeviceType.cpu:
    model.update(tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters()))
model.freeze()


def mixed32(x):
    """A bijection of 32-bit numbers that leaves nothing of their order."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


# The adapters: y = W x + scale * B A dropout(x), on every linear layer of the blocks.
class LoRA(nn.Module):
    def __init__(self, linear, key):
        super().__init__()
        outputs, inputs = linear.weight.shape
        inputs = inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs
        bound = 1 / math.sqrt(inputs)
        self.linear = linear
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, args.rank), key=key)
        self.lora_b = mx.zeros((args.rank, outputs))

    def __call__(self, x):
        z = x
        if args.dropout:  # by a hash of the update's key, of the tokens up to each place, and of the column
            rows = mixed32(
                mixed32(mixed32(self._marks.astype(mx.uint32) ^ self._key[0]) ^ (self._marks >> 32).astype(mx.uint32))
                ^ self._key[1]
            )
            drawn = mixed32(rows[..., None] ^ mixed32(mx.arange(x.shape[-1], dtype=mx.uint32) + self._key[1]))
            z = mx.where(drawn >= int(args.dropout * 2**32 + 0.5), x / (1 - args.dropout), 0)
        return self.linear(x) + args.scale * (z @ self.lora_a @ self.lora_b)


chosen = [
    (path, module)
    for path, module in model.named_modules()
    if ".layers." in path and isinstance(module, (nn.Linear, nn.QuantizedLinear))
]
keys = mx.random.split(mx.random.key(args.seed), len(chosen))
adapters = {path: LoRA(module, key) for (path, module), key in zip(chosen, keys, strict=True)}
model.update_modules(tree_unflatten(list(adapters.items())))


# The data: tokens, and for each whether it belongs to an answer.
def encode(messages, **more):
    text = tokenizer.apply_chat_template(messages, tokenize=False, **more)
    return tokenizer.encode(text, add_special_tokens=False)


examples = []
for line in (args.data / "train.jsonl").read_text(encoding="utf-8").splitlines():
    messages = json.loads(line)["messages"]
    tokens = encode(messages)
    answer = np.zeros(len(tokens), bool)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = len(encode(messages[:turn], add_generation_prompt=True))
            answer[begin : len(encode(messages[: turn + 1]))] = True
    examples.append((np.array(tokens), answer))


def loss_sum(model, tokens, answer):
    """Cross-entropy of each answer token given what stands before it, summed; the labels are the tokens shifted."""
    logits = model(tokens[:, :-1]).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="none")
    return (losses * answer[:, 1:]).sum()


def pad(rows, dtype):
    """Rows of one length on the right: a multiple of 8, and one more for the shift."""
    whole = np.zeros((len(rows), -(-(max(map(len, rows)) - 1) // 8) * 8 + 1), dtype)
    for number, row in enumerate(rows):
        whole[number, : len(row)] = row
    return mx.array(whole)


def mixed(number):
    """splitmix64: a bijection of 64-bit numbers that leaves nothing of their order."""
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    number = ((number ^ number >> 27) * 0x94D049BB133111EB) % 2**64
    return number ^ number >> 31


def histories(tokens):
    """A hash of the tokens up to each place, so that dropout is the same for what examples have in common."""
    state = (np.arange(1, len(tokens) + 1, dtype=np.uint64) << np.uint64(32)) + tokens.astype(np.uint64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    sums = np.cumsum(state ^ (state >> np.uint64(31)), dtype=np.uint64)
    return (sums ^ (sums >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)


def shuffled(place, count, *key):
    """What stands at a place of the permutation that the key chooses: a Feistel network that walks on while outside."""
    half = max(4, (max(count - 1, 1).bit_length() + 1) // 2)
    state = 0
    for part in key:
        state = mixed(state ^ part)
    while True:
        left, right = place >> half, place % 2**half
        for number in range(1, 7):
            left, right = right, left ^ mixed(right ^ mixed((state + number) % 2**64)) % 2**half
        place = left << half | right
        if place < count:
            return place


# The loop. Schedule: a cosine from the learning rate to 0 over the run.
per_update = args.batch_size * args.gradient_accumulation
total = min(args.steps, args.epochs * math.ceil(len(examples) / per_update))
optimizer = optim.AdamW(lambda step: args.learning_rate * 0.5 * (1 + mx.cos(math.pi * step / total)), bias_correction=True)
gradient_of = nn.value_and_grad(model, loss_sum)
step = 0
for epoch in range(args.epochs):
    order = [shuffled(place, len(examples), args.seed, epoch) for place in range(len(examples))]
    for start in range(0, len(examples), per_update):  # the last update of an epoch takes what remains
        if step == total:
            break
        update = sorted((examples[i] for i in order[start : start + per_update]), key=lambda e: -len(e[0]))
        grads, loss, weight = None, 0.0, 0.0
        seed = np.random.SeedSequence((args.seed, step)).generate_state(1, np.uint64)[0]
        keys = mx.random.split(mx.random.key(int(seed)), len(adapters))
        for first in range(0, len(update), args.batch_size):
            batch = update[first : first + args.batch_size]
            marks = pad([histories(t) for t, _ in batch], np.uint64)[:, :-1]
            for layer, key in zip(adapters.values(), keys, strict=True):
                layer._key, layer._marks = key, marks
            micro_loss, micro_grads = gradient_of(model, pad([t for t, _ in batch], np.int32), pad([a for _, a in batch], bool))
            # Sums add; there is one division, by the number of all answer tokens of the update.
            grads = micro_grads if grads is None else tree_map(mx.add, grads, micro_grads)
            loss, weight = loss + micro_loss, weight + sum(int(a[1:].sum()) for _, a in batch)
        grads = tree_map(lambda g, weight=weight: g / weight, grads)
        norm = mx.sqrt(sum(mx.square(g).sum() for _, g in tree_flatten(grads)))
        grads = tree_map(lambda g, norm=norm: g * mx.minimum(1.0, args.clip / (norm + 1e-6)), grads)
        optimizer.update(model, grads)
        mx.eval(model.trainable_parameters(), optimizer.state)  # MLX is lazy: without this nothing is computed
        step += 1
        print(f"{step} {loss.item() / weight:.6f}", flush=True)
