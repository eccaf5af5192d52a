"""The universal logit distillation loss: how far two distributions are from each other when nobody knows which class of one is
which of the other, because their tokenizers differ. Both are sorted, and their probabilities compared rank by rank.

Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs". Axes: S places,
V classes of the student, K classes that are known of the teacher.
"""

from __future__ import annotations

import mlx.core as mx

_EQUAL = 1e-5  # what rounding does to a probability: it has no direction, and where both agree there is no gradient


def uld_and_gradient(
    student_logits_SV: mx.array, values_SK: mx.array, rest_S: mx.array, temperature: mx.array | float
) -> tuple[mx.array, mx.array]:
    """(the distance at each place [S], its gradient with respect to the student's logits [S, V]), in float32.

    `values_SK`: the teacher's greatest log-probabilities at temperature 1, the greatest first. `rest_S`: log of the sum of
    exp(log-probability / temperature) over all its other classes; -inf where there are none. So its distribution at this
    temperature is exact. The rank by rank distance is that of the K greatest of both; what is left of both is one more class.
    A place whose values are all -inf has no partner at the teacher: 0, without a gradient.
    """
    warm_SV = student_logits_SV.astype(mx.float32) / temperature
    ranks = min(values_SK.shape[-1], warm_SV.shape[-1])
    known_S1 = mx.isfinite(values_SK).any(axis=-1, keepdims=True)
    teacher_SK, others_S = _at_temperature(values_SK, rest_S, temperature, known_S1, ranks)
    q_SV = mx.softmax(warm_SV, axis=-1)
    ids_SK, own_SK = _greatest(q_SV, ranks)
    left_S = mx.put_along_axis(q_SV, ids_SK, mx.array(0.0), axis=-1).sum(axis=-1)
    losses_S = mx.abs(own_SK - teacher_SK).sum(axis=-1) + mx.abs(left_S - others_S)
    slope_SK, slope_S1 = _direction(own_SK, teacher_SK), _direction(left_S, others_S)[:, None]
    mean_S1 = (slope_SK * own_SK).sum(axis=-1, keepdims=True) + slope_S1 * left_S[:, None]
    slope_SV = mx.put_along_axis(mx.broadcast_to(slope_S1, q_SV.shape), ids_SK, slope_SK, axis=-1)
    gradient_SV = q_SV * (slope_SV - mean_S1) / temperature
    return mx.where(known_S1[:, 0], losses_S, 0.0), mx.where(known_S1, gradient_SV, 0.0)


def _at_temperature(
    values_SK: mx.array, rest_S: mx.array, temperature: mx.array | float, known_S1: mx.array, ranks: int
) -> tuple[mx.array, mx.array]:
    """(the teacher's probabilities at so many ranks, what all its other classes have together)."""
    warm_SK = mx.where(known_S1, values_SK.astype(mx.float32) / temperature, 0.0)
    p_SC = mx.softmax(mx.concatenate([warm_SK, rest_S.astype(mx.float32)[:, None]], axis=-1), axis=-1)
    return p_SC[:, :ranks], p_SC[:, ranks:].sum(axis=-1)


def _greatest(q_SV: mx.array, ranks: int) -> tuple[mx.array, mx.array]:
    """(ids, probabilities) of so many classes, the greatest first: all of them need not be sorted for that."""
    # Nobody asks for it, but where a step is traced MLX would look for the gradient of these numbers, and there is none.
    q_SV = mx.stop_gradient(q_SV)
    ids_SK = mx.argpartition(-q_SV, ranks - 1, axis=-1)[:, :ranks]
    own_SK = mx.take_along_axis(q_SV, ids_SK, axis=-1)
    order_SK = mx.argsort(-own_SK, axis=-1)
    return mx.take_along_axis(ids_SK, order_SK, axis=-1), mx.take_along_axis(own_SK, order_SK, axis=-1)


def _direction(q: mx.array, p: mx.array) -> mx.array:
    return mx.where(mx.abs(q - p) <= _EQUAL * (q + p), 0.0, mx.sign(q - p))
