"""An LSTM language model with the interface of mlx-lm's models: a baseline for the comparison with a transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.model import transforms

MODEL_TYPE = "mlx_qlora_lstm"
# No norm makes up for small embeddings here: with 0.02, as in a transformer, next to nothing comes through the layers.
# Loss of `tiny` after 40 updates of 12 x 96 tokens, by deviation: 0.02: 4.6, 0.1: 4.2, 0.2: 0.88, 0.3: 0.69, 0.6: 0.41,
# 1: 0.29; but the embedding is the head, too, and with 1 a wide model begins at twice the loss of chance.
EMBEDDING_STD = 0.5


@dataclass
class ModelArgs:
    """What config.json says of it."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    tie_word_embeddings: bool = True
    model_type: str = MODEL_TYPE

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelArgs:
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})


class Layer(nn.Module):
    """`mlx.nn.LSTM` that keeps where it stands in a cache."""

    def __init__(self, width: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width)
        # Remember, to begin with: the forget gates, the second of four, are open (Jozefowicz and others, 2015).
        self.lstm.bias = mx.concatenate([mx.zeros(width), mx.ones(width), mx.zeros(2 * width)])

    def __call__(self, x: mx.array, cache: Any = None) -> mx.array:
        own: Any = self.lstm
        begin = [None, None] if cache is None else [cache[0], cache[1]]
        hidden, cell = (mx.zeros((x.shape[0], own.hidden_size)) if each is None else each for each in begin)
        inputs = mx.addmm(own.bias, x.swapaxes(0, 1), own.Wx.T).astype(mx.float32)
        recurrent = own.Wh.astype(mx.float32)
        if cache is None:
            hiddens = _scan()(inputs, recurrent, hidden, cell)[0]
        else:
            hiddens, cells, *_ = _forward(inputs, recurrent, hidden, cell, cache.make_mask(x.shape[1]))
            cache[0], cache[1] = hiddens[-1], cells[-1]
            cache.advance(x.shape[1])
        turned: mx.array = hiddens.swapaxes(0, 1).astype(x.dtype)
        return turned


def _scan() -> Any:
    """Over the steps of a row, with a backward that MLX would not find: it adds up what each step says of `Wh`, a matrix a
    step, where one product of all of them does; and it takes apart what can be computed for all steps at once.

    Row by row the same as `mlx.nn.LSTM`; the recurrence is in float32 whatever the weights are. Forward and backward of
    `tiny` on 16 x 256 tokens on the CPU: 1.7 s and 0.29 GB; with MLX's own backward 3.5 s and 0.43 GB; the transformer of
    that size takes 1.8 s and 0.56 GB.
    """
    function = transforms.several(_forward, _outlined)
    function.vjp(_backward)
    return function


def _forward(
    inputs: mx.array, recurrent: mx.array, hidden: mx.array, cell: mx.array, mask: mx.array | None = None
) -> tuple[mx.array, ...]:
    """(hidden states, cells, gates, candidates), each [L, B, ...], of what the inputs say to the gates [L, B, 4H].

    Where a mask [B, L] is false, in the padding of prompts, everything stays as it is.
    """
    width, turned = hidden.shape[-1], recurrent.T
    states: list[tuple[mx.array, ...]] = []
    for step in range(inputs.shape[0]):
        said = mx.addmm(inputs[step], hidden, turned)
        gates = mx.sigmoid(said)
        candidate = mx.tanh(said[:, 2 * width : 3 * width])
        before = hidden, cell
        cell = gates[:, width : 2 * width] * cell + gates[:, :width] * candidate
        hidden = gates[:, 3 * width :] * mx.tanh(cell)
        if mask is not None:
            hidden, cell = (mx.where(mask[:, step, None], *pair) for pair in zip((hidden, cell), before, strict=True))
        states.append((hidden, cell, gates, candidate))
    return tuple(mx.stack(list(each)) for each in zip(*states, strict=True))


def _outlined(inputs: mx.array, recurrent: mx.array, hidden: mx.array, cell: mx.array) -> tuple[mx.array, ...]:
    """As many numbers of each kind as `_forward` and its backward keep, in a few operations instead of ten a step, for who
    wants to know how many these are; the numbers themselves are wrong."""
    gates = mx.sigmoid(inputs + hidden @ recurrent.T)
    open_in, open_kept, candidates, open_out = mx.split(gates, 4, axis=-1)
    cells = open_kept * cell + open_in * candidates
    return open_out * mx.tanh(cells), cells, gates, candidates


def _backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
    _, recurrent, hidden, cell = primals
    hiddens, cells, gates, candidates = outputs
    length, rows, width = hiddens.shape
    before = mx.concatenate([cell[None], cells[:-1]])
    open_in, open_kept, _, open_out = mx.split(gates, 4, axis=-1)
    bent = mx.tanh(cells)
    to_cell = open_out * (1 - bent * bent)  # from a hidden state to its cell
    to_out = bent * open_out * (1 - open_out)  # and to its output gate
    to_others = mx.stack(  # from a cell to the three others
        [candidates * open_in * (1 - open_in), before * open_kept * (1 - open_kept), open_in * (1 - candidates * candidates)],
        axis=2,
    )
    back = mx.zeros((rows, width))
    carried = mx.zeros((rows, width))
    said: list[mx.array] = []
    for step in reversed(range(length)):
        own = cotangents[0][step] + back
        carried = cotangents[1][step] + own * to_cell[step] + carried
        others = (carried[:, None] * to_others[step]).reshape(rows, 3 * width)
        said.append(mx.concatenate([others, own * to_out[step]], axis=-1))
        carried = carried * open_kept[step]
        back = said[-1] @ recurrent
    gradient = mx.stack(said[::-1])
    preceding = mx.concatenate([hidden[None], hiddens[:-1]])
    of_recurrent = gradient.reshape(-1, 4 * width).T @ preceding.reshape(-1, width)
    return gradient, of_recurrent, back, carried


class Trunk(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(args.hidden_size) for _ in range(args.num_hidden_layers)]

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        x: mx.array = self.embed_tokens(inputs)
        for layer, own in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            x = layer(x, own)
        return x


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Trunk(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        hidden = self.model(inputs, cache)
        if self.args.tie_word_embeddings:
            tied: mx.array = self.model.embed_tokens.as_linear(hidden)
            return tied
        logits: mx.array = self.lm_head(hidden)
        return logits

    @property
    def layers(self) -> list[Layer]:
        return self.model.layers

    def make_cache(self) -> list[Any]:
        from mlx_lm.models.cache import ArraysCache

        return [ArraysCache(size=2) for _ in self.layers]
