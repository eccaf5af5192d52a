"""How far a student's distribution is from a teacher's, with the gradient, in one pass: arrays in, arrays out, in float32.

Axes: S places, V classes of the student, K classes of the teacher that are told, C classes that are compared: all V, or K and
one more that has the mass of all others. `log_p` is the teacher, `log_q` the student, both at the same temperature.

Every divergence here is a function of log q over classes. With g its derivative there, the one with respect to the student's
logits z is, where j is a class of its own, (g_j - q_j * sum g) / T, and for those that share the class of the rest
(g_rest * q_j / q_rest - q_j * sum g) / T.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import mlx.core as mx

Kind = Literal["forward_kl", "reverse_kl", "js"]


class Classes(NamedTuple):
    """What a teacher says of each place: of a few classes, and of all others together."""

    ids: mx.array  # [S, K], each at most once in a place
    scores: mx.array  # [S, K]: logits, or log-probabilities: any constant of a place may be in them
    rest: mx.array  # [S]: log of the sum of exp(score / temperature) over all other classes; -inf: there are none


def tempered(logits_SV: mx.array, temperature: mx.array) -> tuple[mx.array, mx.array]:
    """(log-probabilities, probabilities) at a temperature; one pass of exponentials."""
    warm_SV = logits_SV / temperature
    q_SV = mx.softmax(warm_SV, axis=-1)
    # The likeliest class never underflows, so the logarithm of the sum is exact enough from there.
    log_sum_S1 = warm_SV.max(axis=-1, keepdims=True) - mx.log(q_SV.max(axis=-1, keepdims=True))
    return warm_SV - log_sum_S1, q_SV


def clipped(logits_SV: mx.array, limit: float) -> tuple[mx.array, mx.array, mx.array]:
    """(logits in float32 within plus and minus the limit, 1 where one moves with its logit, at which places [S] it bit)."""
    logits_SV = logits_SV.astype(mx.float32)
    if not limit:
        return logits_SV, mx.array(1.0), mx.zeros(logits_SV.shape[0], mx.bool_)
    beyond_SV = mx.abs(logits_SV) > limit
    return mx.clip(logits_SV, -limit, limit), mx.where(beyond_SV, 0.0, 1.0), beyond_SV.any(axis=-1)


def largest(logits_SV: mx.array, k: int, temperature: mx.array) -> Classes:
    """The k likeliest classes of a teacher that is there whole, and the rest."""
    ids_SK = mx.argpartition(-logits_SV, k - 1, axis=-1)[:, :k].astype(mx.int32)
    others_SV = mx.put_along_axis(logits_SV / temperature, ids_SK, mx.array(-mx.inf), axis=-1)
    # logsumexp of nothing is NaN: a constant as low as nothing can be stands in for that.
    rest_S = mx.logsumexp(mx.maximum(others_SV, -1e30), axis=-1)
    return Classes(ids_SK, mx.take_along_axis(logits_SV, ids_SK, axis=-1), mx.where(rest_S < -1e29, -mx.inf, rest_S))


def of_all(
    kind: Kind, student_SV: mx.array, teacher_SV: mx.array, temperature: mx.array, js_weight: float = 0.5
) -> tuple[mx.array, mx.array]:
    """(divergence [S], its gradient with respect to the student's logits [S, V]) over all classes."""
    log_p_SV, p_SV = tempered(teacher_SV, temperature)
    log_q_SV, q_SV = tempered(student_SV, temperature)
    value_S, g_SV = _value_and_slope(kind, log_p_SV, p_SV, log_q_SV, q_SV, js_weight)
    return value_S, (g_SV - q_SV * g_SV.sum(axis=-1, keepdims=True)) / temperature


def of_classes(
    kind: Kind, student_SV: mx.array, teacher: Classes, temperature: mx.array, js_weight: float = 0.5
) -> tuple[mx.array, mx.array]:
    """The same over the classes that the teacher tells apart, and the rest as one more."""
    warm_SK = teacher.scores.astype(mx.float32) / temperature
    scores_SC = mx.concatenate([warm_SK, teacher.rest.astype(mx.float32)[:, None]], axis=-1)
    p_SC = mx.softmax(scores_SC, axis=-1)
    log_p_SC = scores_SC - mx.logsumexp(scores_SC, axis=-1, keepdims=True)
    log_q_SV, q_SV = tempered(student_SV, temperature)
    rest_S1 = mx.put_along_axis(q_SV, teacher.ids, mx.array(0.0), axis=-1).sum(axis=-1, keepdims=True)
    own_SK = mx.take_along_axis(q_SV, teacher.ids, axis=-1)
    log_q_SC = mx.concatenate([mx.take_along_axis(log_q_SV, teacher.ids, axis=-1), mx.log(rest_S1)], axis=-1)
    value_S, g_SC = _value_and_slope(kind, log_p_SC, p_SC, log_q_SC, mx.concatenate([own_SK, rest_S1], axis=-1), js_weight)
    whole_S1, of_rest_S1 = g_SC.sum(axis=-1, keepdims=True), g_SC[:, -1:]
    share_S1 = mx.where(rest_S1 > 0, of_rest_S1 / rest_S1, 0.0)
    gradient_SV = mx.put_along_axis(q_SV * (share_S1 - whole_S1), teacher.ids, g_SC[:, :-1] - own_SK * whole_S1, axis=-1)
    return value_S, gradient_SV / temperature


def of_samples(student_SV: mx.array, ids_SM: mx.array, log_p_SM: mx.array) -> tuple[mx.array, mx.array]:
    """An estimate without bias of the forward divergence at temperature 1, from classes that were drawn from the teacher."""
    log_q_SV, q_SV = tempered(student_SV, mx.array(1.0))
    drawn = ids_SM.shape[-1]
    value_S = (log_p_SM.astype(mx.float32) - mx.take_along_axis(log_q_SV, ids_SM, axis=-1)).mean(axis=-1)
    places = mx.broadcast_to(mx.arange(ids_SM.shape[0])[:, None], ids_SM.shape)
    return value_S, q_SV.at[places, ids_SM].add(-1.0 / drawn)  # a class may have been drawn more than once


def _value_and_slope(
    kind: Kind, log_p: mx.array, p: mx.array, log_q: mx.array, q: mx.array, js_weight: float
) -> tuple[mx.array, mx.array]:
    """(the divergence, its derivative with respect to log q), where 0 * log 0 is 0."""
    if kind == "forward_kl":
        return _sum(p, log_p - log_q), -p
    if kind == "reverse_kl":
        each = mx.where(q > 0, q * (log_q - log_p), 0.0)
        return each.sum(axis=-1), each + q
    log_m = mx.log(js_weight * p + (1 - js_weight) * q)
    towards = mx.where(q > 0, q * (log_q - log_m), 0.0) * (1 - js_weight)
    return js_weight * _sum(p, log_p - log_m) + towards.sum(axis=-1), towards


def _sum(p: mx.array, of: mx.array) -> mx.array:
    return mx.where(p > 0, p * of, 0.0).sum(axis=-1)
