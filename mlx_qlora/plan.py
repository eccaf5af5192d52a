"""How a run will compute: which layout, in which pieces. Speed and memory follow from it, the gradient does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.config import RunConfig
from mlx_qlora.data.corpus import Corpus
from mlx_qlora.data.layout import Kind, Layout, lay_out, smaller
from mlx_qlora.data.shapes import Shapes
from mlx_qlora.data.shapes import fit as fit_shapes
from mlx_qlora.data.tree import common, sorted_by_tokens
from mlx_qlora.engine.memory import Fit, Memory, MemoryConfig, fit
from mlx_qlora.engine.optim import OptimConfig
from mlx_qlora.engine.room import Room
from mlx_qlora.errors import ConfigError, ModelError, OutOfMemoryError
from mlx_qlora.foresee import Foresight, longest
from mlx_qlora.look.measure import mean_loss
from mlx_qlora.model import backend
from mlx_qlora.model.full import FullConfig, computes_in
from mlx_qlora.model.trunk import Passage, can_pack, can_share, length_counts, states_before
from mlx_qlora.objectives.lesson import Lesson, answers_only
from mlx_qlora.records import Batch, Example, LossSum

BUDGET = 4096  # positions at once, where nothing says otherwise
SAMPLE = 64  # examples that the layouts are compared on
_FEW = 3  # neighbours among the rows that the layouts are compared on
# How far the losses of two layouts may be apart; half precision rounds more than that by itself.
_TOLERANCE = {mx.float32: 1e-4}
_TOLERANCE_HALF = 1e-2


@dataclass(frozen=True)
class Plan:
    layout: Layout
    passage: Passage
    compiled: bool
    memory: Fit | None = None  # what it will need, where that is foreseen
    notes: tuple[str, ...] = ()  # what fell back to something simpler, and why

    def cache(self, limit: int | None) -> int | None:
        """The bytes of freed buffers that MLX may keep beside the peak; None: as many as it likes by itself.

        On a GPU it would keep them without an end. On the CPU it keeps 32 MB, and with as much as a step needs it is
        some 5 % faster (a step of 400 MB: 2.39 s against 2.50, medians of 3).
        """
        if self.memory is None or limit is None or not self.memory.fits:
            return None
        peak = self.memory.memory.peak
        return min(peak, limit - peak)

    @property
    def roomy(self) -> bool:
        """Whether so much less is foreseen than there is, by a forecast that was measured, that nobody need try it."""
        return backend.on_cpu() and self.memory is not None and self.memory.memory.peak < backend.memory() / 2

    @property
    def describe(self) -> list[str]:
        what = {
            Kind.PACKED: "packed: no padding, what examples have in common is computed once",
            Kind.PADDED: "padded to a few lengths, behind the prefix that the data shares",
            Kind.PLAIN: "plain rows",
        }[self.layout.kind]
        how = ", compiled" if self.compiled else ""
        how += ", layers computed again in the backward" if self.passage.checkpoint else ""
        return [what, f"up to {self.layout.token_budget:,} positions at once{how}"]


def choose(config: RunConfig, model: nn.Module, corpus: Corpus, first: int = 0, lesson: Lesson | None = None) -> Plan:
    """The plan for a configuration, as far as the model can follow it; `first`: the first layer that is computed."""
    foresight = foresight_of(config, model, longest_of(config, corpus), lesson)
    shapes = partial(_shapes, corpus, config.max_seq_length)
    plan = _chosen(config, model, foresight, shapes, alike=corpus.windows is not None)
    return replace(plan, passage=replace(plan.passage, first=first))


def foresight_of(config: RunConfig, model: nn.Module, examples: Sequence[Example], lesson: Lesson | None = None) -> Foresight:
    """What the memory of such updates is foreseen from."""
    return Foresight(
        model,
        examples,
        config.part(OptimConfig),
        lesson or answers_only(config.label_smoothing),
        computes_in(config.part(FullConfig)),
        keeps_best=config.fine_tune_type == "full",
    )


def choose_without_data(config: RunConfig, model: nn.Module, windows: bool = False, lesson: Lesson | None = None) -> Plan:
    """The same before there are data: for updates of examples of max_seq_length tokens, or of windows."""
    examples = longest([config.max_seq_length] * config.examples_per_update)
    foresight = foresight_of(config, model, examples, lesson)
    length = np.array([config.max_seq_length])
    return _chosen(config, model, foresight, lambda _: fit_shapes(length, length), alike=windows)


def _chosen(
    config: RunConfig, model: nn.Module, foresight: Foresight, shapes: Callable[[bool], Shapes], alike: bool = False
) -> Plan:
    """`alike`: examples have one length and no beginning in common, so that plain rows have no padding."""
    compiled = not backend.on_cpu() if config.compile == "auto" else config.compile == "on"
    wanted = config.layout
    if wanted == "packed" and config.compile == "on":
        raise ConfigError("layout: packed came with compile: on; packed rows have no shapes in common. Leave one to auto.")
    best = Kind.PLAIN if alike else Kind.PADDED if compiled else Kind.PACKED
    kind = best if wanted == "auto" else Kind(wanted)
    notes = []
    models = [model, *filter(None, [foresight.lesson.teacher])]
    if kind is Kind.PACKED and (problem := _first_problem(can_pack, models)):
        notes.append(f"not packed, because {problem}")
        kind = Kind.PADDED
    sharing = True
    if kind is Kind.PADDED and (problem := _first_problem(can_share, models)):
        notes.append(f"nothing shared, because {problem}")
        sharing = False
    alone = any(map(length_counts, models))  # each row by itself, without padding
    kind = Kind.PLAIN if alone else kind
    rows = 1 if alone else config.batch_size if kind is Kind.PLAIN and not alike else 1024
    layout = Layout(kind, config.token_budget or BUDGET, rows=rows, step=1 if alone else Layout.step)
    if kind is Kind.PADDED:
        layout = replace(layout, shapes=shapes(sharing))
    plan = Plan(layout, Passage(), compiled and kind is not Kind.PACKED, None, tuple(notes))
    return fitted(plan, config, foresight)


def _first_problem(of: Callable[[nn.Module], str], models: Sequence[nn.Module]) -> str:
    """What keeps a student or its teacher from something."""
    found = [("of the teacher: " if number else "") + problem for number, each in enumerate(models) if (problem := of(each))]
    return found[0] if found else ""


def forward_layout(model: nn.Module, examples: Sequence[Example]) -> Layout:
    """The fastest that this model takes where nothing is trained; `checked` says whether it is exact."""
    if length_counts(model):
        return Layout(Kind.PLAIN, BUDGET, rows=1, step=1)
    if backend.on_cpu() and not can_pack(model):
        return Layout(Kind.PACKED, BUDGET)
    if can_share(model):
        return Layout(Kind.PLAIN, BUDGET)
    lengths = np.array([len(each.tokens) - 1 for each in examples])
    places = np.array([int((each.weights[1:] > 0).sum()) for each in examples])
    return Layout(Kind.PADDED, BUDGET, shapes=fit_shapes(lengths, places, common_prefix(examples[:SAMPLE])))


def longest_of(config: RunConfig, corpus: Corpus) -> list[Example]:
    """The longest examples that could meet in an update."""
    count = config.examples_per_update
    return corpus.longest(count) or longest([config.max_seq_length] * count)


def fitted(plan: Plan, config: RunConfig, foresight: Foresight) -> Plan:
    """The plan with the budget of positions and the checkpointing that fit into the memory; what was set stays."""
    checkpoint = config.grad_checkpoint == "on"
    if config.memory == "off":
        return replace(plan, passage=replace(plan.passage, checkpoint=checkpoint))

    def need(budget: int, checkpoint: bool) -> Memory:
        return foresight.memory(replace(plan.layout, token_budget=budget), replace(plan.passage, checkpoint=checkpoint))

    limit = config.part(MemoryConfig).limit(backend.memory())
    checkpoints = {"auto": (False, True), "on": (True,), "off": (False,)}[config.grad_checkpoint]
    try:
        with mx.stream(mx.cpu):
            found = fit(need, limit, budgets(config, foresight.examples), checkpoints)
    except Exception as error:  # a model's code, or a primitive, that can't be traced
        said = f"memory is not foreseen, because the step can't be traced: {type(error).__name__}: {error}".splitlines()[0]
        return replace(plan, passage=replace(plan.passage, checkpoint=checkpoint), notes=(*plan.notes, said))
    layout = replace(plan.layout, token_budget=found.budget)
    return replace(plan, layout=layout, passage=replace(plan.passage, checkpoint=found.checkpoint), memory=found)


@dataclass(frozen=True)
class Change:
    """Something that can be set otherwise, and what it comes to."""

    what: str
    memory: Memory


def alternatives(plan: Plan, config: RunConfig, foresight: Foresight) -> list[Change]:
    """What else could be set, the mildest first: nothing that changes what is learnt before what does."""
    assert plan.memory is not None, "of a plan with a forecast"
    budget, checkpoint = plan.memory.budget, plan.memory.checkpoint
    ways = [(budget, not checkpoint)]
    ways += [(max(1, budget // 2), each) for each in (False, True)]
    changes = []
    for positions, again in ways:
        layout, passage = replace(plan.layout, token_budget=positions), replace(plan.passage, checkpoint=again)
        what = f"token_budget: {positions}, grad_checkpoint: {'on' if again else 'off'}"
        changes.append(Change(what, foresight.memory(layout, passage)))
    half = [
        replace(each, tokens=each.tokens[-half:], weights=each.weights[-half:], targets=None)
        for each, half in _halves(foresight.examples)
    ]
    smallest = min(budgets(config, half))
    layout, passage = replace(plan.layout, token_budget=smallest), replace(plan.passage, checkpoint=True)
    shorter = replace(foresight, examples=half).memory(layout, passage)
    what = f"max_seq_length: {max(len(each.tokens) for each in half)}, token_budget: {smallest}, grad_checkpoint: on"
    return [*changes, Change(what, shorter)]


def _halves(examples: Sequence[Example]) -> list[tuple[Example, int]]:
    return [(each, max(2, len(each.tokens) // 2)) for each in examples]


def budgets(config: RunConfig, examples: Sequence[Example]) -> list[int]:
    """The budgets of positions that are tried: from the largest by halves, down to about a single example.

    Checkpointing costs a second forward pass, and smaller batches cost little until they get small.
    """
    if config.token_budget is not None:
        return [config.token_budget]
    single = max(len(each.tokens) for each in examples) - 1
    return [BUDGET >> shift for shift in range(6) if shift == 0 or (BUDGET >> shift) * 2 > single]


def _shapes(corpus: Corpus, longest: int, sharing: bool) -> Shapes:
    if corpus.train is None:  # a stream: its lengths are not known
        steps = np.array([longest >> shift for shift in range(6)])
        return fit_shapes(steps, steps)
    prefix = common_prefix(corpus.train_sample()) if sharing else ()
    lengths = corpus.train.lengths - 1
    return fit_shapes(lengths, corpus.train.supervised, prefix)


def common_prefix(examples: Sequence[Example]) -> tuple[int, ...]:
    """What most of the examples begin with, if that is worth a pass of its own."""
    ordered = sorted_by_tokens(examples)
    middle = ordered[len(ordered) // 2]
    reach = np.sort([common(middle, each) for each in ordered if each is not middle])
    size = int(reach[len(reach) // 4]) if len(reach) else 0  # three quarters have as much
    return tuple(middle.tokens[:size].tolist()) if size >= 16 else ()


def _telling(examples: Sequence[Example], prefix: Sequence[int]) -> list[Example]:
    """A few rows that show what a layout does: neighbours with the most in common for their length, some that begin with
    the common prefix, and the longest."""
    ordered = sorted_by_tokens(examples)
    shared = np.array([0, *(common(a, b) for a, b in pairwise(ordered))])
    lengths = np.array([len(each.tokens) for each in ordered])
    windows = range(max(1, len(ordered) - _FEW + 1))
    best = max(windows, key=lambda at: float(shared[at + 1 : at + _FEW].sum() / lengths[at : at + _FEW].sum()))
    begin = [each for each in ordered if prefix and each.tokens[: len(prefix)].tolist() == list(prefix)]
    chosen = [
        *ordered[best : best + _FEW],
        *sorted(begin, key=lambda each: len(each.tokens))[:2],
        ordered[int(lengths.argmax())],
    ]
    return list({id(each): each for each in chosen}.values())


def checked(plan: Plan, model: nn.Module, objective: Callable[[nn.Module, Batch], LossSum], sample: Sequence[Example]) -> Plan:
    """The plan, if it gives a few rows the loss that the model's own code gives one of them at a time; else a simpler
    one, with a note that says so."""
    few = _telling(sample, plan.layout.shapes.prefix)
    plain = _own_loss(model, few, objective)
    tolerance = _TOLERANCE.get(backend.compute_dtype(mx.bfloat16), _TOLERANCE_HALF)

    def problem(layout: Layout, first: int) -> str:
        def of(halvings: int) -> float:
            batches: Sequence[Batch] = lay_out(few, smaller(layout, halvings))
            if first:
                batches = [batch._replace(states=states_before(model, batch, first)) for batch in batches]
            return mean_loss(model, objective, batches)

        try:
            got = Room(layout.token_budget).within(of)
        except OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's code makes of arrays that it did not expect
            return f"{type(error).__name__}: {error}".splitlines()[0]
        if math.isnan(plain) or abs(got - plain) <= tolerance * abs(plain):
            return ""
        return f"its loss on {len(few)} rows was {got:.6g}, that of the model's own code {plain:.6g}"

    while (said := problem(plan.layout, 0)) and plan.layout.kind is not Kind.PLAIN:
        simpler = Kind.PADDED if plan.layout.kind is Kind.PACKED else Kind.PLAIN
        note = f"WARNING: the {plan.layout.kind.value} layout is switched off: {said}. Please report this model."
        plan = replace(plan, layout=replace(plan.layout, kind=simpler), notes=(*plan.notes, note))
    if said:
        raise ModelError(f"This model can't be trained here, even row by row: {said}. Please report it.")
    if plan.passage.first and (said := problem(plan.layout, plan.passage.first)):
        note = f"WARNING: what the layers below the adapters give is not kept: {said}. Please report this model."
        plan = replace(plan, passage=replace(plan.passage, first=0), notes=(*plan.notes, note))
    return plan


def _own_loss(model: nn.Module, examples: Sequence[Example], objective: Callable[[nn.Module, Batch], LossSum]) -> float:
    """The mean loss by the model's own code, one row at a time without padding: the trunk is not taken apart."""

    def whole(model: nn.Module, batch: Batch) -> LossSum:
        return objective(_Whole(model), batch)

    return mean_loss(model, whole, [each for one in examples for each in lay_out([one], Layout(Kind.PLAIN, step=1))])


class _Whole(nn.Module):
    """A model that shows nothing of what it is made of, so that it runs whole."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.whole = model
        self.train(model.training)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.whole(tokens)  # type: ignore[no-any-return]
