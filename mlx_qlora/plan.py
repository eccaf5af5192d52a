"""How a run will compute: which layout, in which pieces. Speed and memory follow from it, the gradient does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.config import RunConfig
from mlx_qlora.data.corpus import Corpus
from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.data.shapes import Shapes, fit
from mlx_qlora.data.tree import common, sorted_by_tokens
from mlx_qlora.errors import ConfigError
from mlx_qlora.look.evaluate import mean_loss
from mlx_qlora.model import backend
from mlx_qlora.model.trunk import Passage, can_pack, can_share
from mlx_qlora.records import Batch, Example, LossSum

_BUDGET = 4096  # positions at once, where nothing says otherwise
_FEW = 4  # rows that the layouts are compared on
# How far the losses of two layouts may be apart; half precision rounds more than that by itself.
_TOLERANCE = {mx.float32: 1e-4}
_TOLERANCE_HALF = 1e-2


@dataclass(frozen=True)
class Plan:
    layout: Layout
    passage: Passage
    compiled: bool
    notes: tuple[str, ...] = ()  # what fell back to something simpler, and why

    @property
    def describe(self) -> str:
        what = {
            Kind.PACKED: "packed: no padding, what examples have in common is computed once",
            Kind.PADDED: "padded to a few lengths, behind the prefix that the data shares",
            Kind.PLAIN: "plain padded rows",
        }[self.layout.kind]
        return f"{what}; up to {self.layout.token_budget:,} positions at once{', compiled' if self.compiled else ''}"


def choose(config: RunConfig, model: nn.Module, corpus: Corpus, first: int = 0) -> Plan:
    """The plan for a configuration, as far as the model can follow it; `first`: the first layer that is computed."""
    compiled = not backend.on_cpu() if config.compile == "auto" else config.compile == "on"
    wanted = config.layout
    if wanted == "packed" and config.compile == "on":
        raise ConfigError("layout: packed came with compile: on; packed rows have no shapes in common. Leave one to auto.")
    kind = (Kind.PADDED if compiled else Kind.PACKED) if wanted == "auto" else Kind(wanted)
    notes = []
    if kind is Kind.PACKED and (problem := can_pack(model)):
        notes.append(f"not packed, because {problem}")
        kind = Kind.PADDED
    sharing = True
    if kind is Kind.PADDED and (problem := can_share(model)):
        notes.append(f"nothing shared, because {problem}")
        sharing = False
    layout = Layout(kind, config.token_budget or _BUDGET, rows=config.batch_size if kind is Kind.PLAIN else 1024)
    if kind is Kind.PADDED:
        layout = replace(layout, shapes=_shapes(corpus, config.max_seq_length, sharing))
    return Plan(layout, Passage(first=first), compiled and kind is not Kind.PACKED, tuple(notes))


def _shapes(corpus: Corpus, longest: int, sharing: bool) -> Shapes:
    if corpus.train is None:  # a stream: its lengths are not known
        steps = np.array([longest >> shift for shift in range(6)])
        return fit(steps, steps)
    prefix = _common_prefix(corpus.train_sample()) if sharing else ()
    lengths = corpus.train.lengths - 1
    return fit(lengths, corpus.train.supervised, prefix)


def _common_prefix(examples: Sequence[Example]) -> tuple[int, ...]:
    """What most of the examples begin with, if that is worth a pass of its own."""
    ordered = sorted_by_tokens(examples)
    middle = ordered[len(ordered) // 2]
    reach = np.sort([common(middle, each) for each in ordered if each is not middle])
    size = int(reach[len(reach) // 4]) if len(reach) else 0  # three quarters have as much
    return tuple(middle.tokens[:size].tolist()) if size >= 16 else ()


def _most_alike(examples: Sequence[Example]) -> Sequence[Example]:
    """A few neighbours that have the most in common for their length."""
    ordered = sorted_by_tokens(examples)
    shared = np.array([0, *(common(a, b) for a, b in pairwise(ordered))])
    lengths = np.array([len(each.tokens) for each in ordered])
    windows = range(max(1, len(ordered) - _FEW + 1))
    best = max(windows, key=lambda at: float(shared[at + 1 : at + _FEW].sum() / lengths[at : at + _FEW].sum()))
    return ordered[best : best + _FEW]


def checked(plan: Plan, model: nn.Module, objective: Callable[[nn.Module, Batch], LossSum], sample: Sequence[Example]) -> Plan:
    """The plan, if it gives a few rows the loss that plain rows give; else a simpler one, with a note that says so."""
    few = _most_alike(sample)
    plain = mean_loss(model, objective, lay_out(few, Layout(Kind.PLAIN, rows=1)))
    tolerance = _TOLERANCE.get(backend.compute_dtype(mx.bfloat16), _TOLERANCE_HALF)
    while plan.layout.kind is not Kind.PLAIN and math.isfinite(plain):
        try:
            got = mean_loss(model, objective, lay_out(few, plan.layout))
            problem = f"its loss on {len(few)} rows was {got:.6g}, that of plain rows {plain:.6g}"
        except Exception as error:  # whatever a model's code makes of arrays that it did not expect
            got, problem = math.nan, f"{type(error).__name__}: {error}".splitlines()[0]
        if abs(got - plain) <= tolerance * abs(plain):
            break
        simpler = Kind.PADDED if plan.layout.kind is Kind.PACKED else Kind.PLAIN
        said = f"WARNING: the {plan.layout.kind.value} layout is switched off: {problem}. Please report this model."
        plan = replace(plan, layout=replace(plan.layout, kind=simpler), notes=(*plan.notes, said))
    return plan
