"""A teacher's logits -> what is kept of them: the likeliest classes, the mass of the rest, classes that are drawn.

Axes: S places, V classes, K of them kept, T temperatures, M drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

_BLOCK = 512  # classes: sums over blocks first, or the small ones of a long row are lost beside the sum before them
_LEAST = -65504.0  # of float16


def condense(
    logits_SV: mx.array, classes: int, top_k: int, temperatures: Sequence[float], clip: float, draws_SM2: mx.array
) -> tuple[mx.array, ...]:
    """(log-probabilities [S, K], ids [S, K], rests [S, T], drawn [S, M], drawn ids [S, M], logits that were clipped [S])."""
    logits_SV = logits_SV[:, :classes].astype(mx.float32)
    if clip:
        bit_S = (mx.abs(logits_SV) > clip).sum(axis=-1)
        logits_SV = mx.clip(logits_SV, -clip, clip)
    else:
        bit_S = mx.zeros(logits_SV.shape[0], mx.uint32)
    logs_SV = logits_SV - mx.logsumexp(logits_SV, axis=-1, keepdims=True)
    values_SK, ids_SK = _likeliest(logs_SV, top_k)
    rests_ST = _rests(logs_SV, ids_SK, temperatures)
    ids_SM = _drawn(logs_SV, draws_SM2)
    drawn_SM = mx.take_along_axis(logs_SV, ids_SM, axis=-1) if ids_SM.size else mx.zeros(ids_SM.shape)
    return _half(values_SK), ids_SK.astype(mx.int32), rests_ST, _half(drawn_SM), ids_SM.astype(mx.int32), bit_S


def _half(logs: mx.array) -> mx.array:
    """Log-probabilities in float16: a probability is off by at most 1e-4, a likely one by less."""
    return mx.maximum(logs, _LEAST).astype(mx.float16)


def _likeliest(logs_SV: mx.array, top_k: int) -> tuple[mx.array, mx.array]:
    """The greatest first."""
    if top_k < logs_SV.shape[-1]:
        ids_SK = mx.argpartition(-logs_SV, top_k - 1, axis=-1)[:, :top_k]
    else:
        ids_SK = mx.broadcast_to(mx.arange(top_k, dtype=mx.uint32), (logs_SV.shape[0], top_k))
    values_SK = mx.take_along_axis(logs_SV, ids_SK, axis=-1)
    order_SK = mx.argsort(-values_SK, axis=-1)
    return mx.take_along_axis(values_SK, order_SK, axis=-1), mx.take_along_axis(ids_SK, order_SK, axis=-1)


def _rests(logs_SV: mx.array, ids_SK: mx.array, temperatures: Sequence[float]) -> mx.array:
    """Summed over the others themselves: one minus what is kept would be all rounding where that is nearly 1."""
    if ids_SK.shape[-1] == logs_SV.shape[-1]:
        return mx.full((logs_SV.shape[0], len(temperatures)), -float("inf"))
    others_SV = mx.put_along_axis(logs_SV, ids_SK, mx.array(-float("inf")), axis=-1)
    rests: list[mx.array] = []
    for each in temperatures:  # one after the other: each has an array as large as the logits
        (others_SV,) = mx.depends([others_SV], rests[-1:]) if rests else (others_SV,)
        rests.append(mx.logsumexp(others_SV / each, axis=-1))
    return mx.stack(rests, axis=-1)


def _drawn(logs_SV: mx.array, draws_SM2: mx.array) -> mx.array:
    """Where uniform numbers fall in the cumulated probabilities: the first among blocks of classes, the second within."""
    if not draws_SM2.shape[1]:
        return mx.zeros(draws_SM2.shape[:2], mx.uint32)
    blocks = -(-logs_SV.shape[-1] // _BLOCK)
    padded = mx.pad(mx.exp(logs_SV), [(0, 0), (0, blocks * _BLOCK - logs_SV.shape[-1])])
    padded = padded.reshape(-1, blocks, _BLOCK)
    block_SM = _first_above(mx.cumsum(padded.sum(axis=-1), axis=-1)[:, None], draws_SM2[..., 0])
    chosen_SMB = mx.take_along_axis(padded, block_SM[..., None], axis=1)
    return block_SM * _BLOCK + _first_above(mx.cumsum(chosen_SMB, axis=-1), draws_SM2[..., 1])


def _first_above(sums_SMN: mx.array, draws_SM: mx.array) -> mx.array:
    """The first sum that is above the drawn part of the last one; where rounding leaves none, the first as large."""
    last_SM1 = sums_SMN[..., -1:]
    above_SM = (sums_SMN <= draws_SM[..., None] * last_SM1).sum(axis=-1)
    return mx.minimum(above_SM, (sums_SMN < last_SM1).sum(axis=-1)).astype(mx.uint32)


def draws(marks: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """Uniform numbers [S, M, 2] in [0, 1) that follow from the marks alone. The first of a pair is from its own M-th of the
    interval: their mean over all M is unbiased, and nearer than that of M independent ones."""
    step = np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = marks[:, None] + step
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((state ^ (state >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2**24
    pairs = uniform.reshape(len(marks), count, 2)
    pairs[..., 0] = (np.arange(count) + pairs[..., 0]) / max(1, count)
    found: NDArray[np.float32] = np.minimum(pairs, 1 - 2**-24).astype(np.float32)
    return found
