"""How much memory a step will need, from its graph, before anything is computed.

MLX evaluates a graph in an order that follows from the graph alone; each primitive allocates its output, shares the
buffer of an input (a view), or writes into one that nobody else needs any more. All of that is repeated here with
names for arrays. On the CPU the memory is taken when a primitive is handed to the worker, up to 110 dispatches before it
runs, and what it read is given back only when it has run; that is part of the peak and is repeated too. On a GPU the
same is a best estimate: buffers wait for whole command buffers there, and a compiled step needs less.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

import mlx.core as mx

from mlx_qlora.engine.graph import Graph, Node, Shape
from mlx_qlora.errors import require

_WIDTH = 20  # MLX goes so far in breadth before it goes down (MLX_BFS_MAX_WIDTH)
_PER_TASK = 10  # dispatches that are counted as one task
_TASKS = 10  # tasks that may wait; with one more MLX waits for one of them
_SPARE = 16384  # a buffer may be so much larger than what is written into it
_HEADER = 8  # the CPU allocator keeps the size in front of each buffer

Strides = tuple[int, ...]


@dataclass
class _Array:
    """What an array looks like once it is there."""

    buffer: int
    shape: tuple[int, ...]
    strides: Strides
    stored: int  # elements in memory: fewer than its size where it was broadcast
    itemsize: int

    @property
    def rows(self) -> bool:
        return _row_major(self.shape, self.strides)

    @property
    def columns(self) -> bool:
        return _row_major(self.shape[::-1], self.strides[::-1])

    @property
    def dense(self) -> bool:
        return _extent(self.shape, self.strides) == self.stored


@lru_cache(65536)
def _row_major(shape: tuple[int, ...], strides: Strides) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@lru_cache(65536)
def _extent(shape: tuple[int, ...], strides: Strides) -> int:
    """Elements from the first to the last, if there are no holes between them; else -1."""
    extent = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1 and stride):
        if stride != extent:
            return -1
        extent *= size
    return extent


@lru_cache(65536)
def _packed(shape: tuple[int, ...]) -> Strides:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@lru_cache(65536)
def _reshaped(shape: tuple[int, ...], strides: Strides, wanted: tuple[int, ...]) -> Strides | None:
    """The strides of a view in another shape; None where it takes a copy."""
    if _row_major(shape, strides):
        return _packed(wanted)
    sizes: list[int] = []
    steps: list[int] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if sizes and steps[-1] == size * stride:
            sizes[-1], steps[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            steps.append(stride)
    found: list[int] = []
    at = 0
    for size in wanted:
        if at < len(sizes) and sizes[at] % size == 0:
            sizes[at] //= size
            found.append(sizes[at] * steps[at])
            at += sizes[at] == 1
        elif size == 1 and found:
            found.append(found[-1])
        else:
            return None
    return tuple(found)


def evaluation_order(graph: Graph, outputs: Iterable[str], done: set[str]) -> list[int]:
    """The nodes in the order in which MLX hands them out, for outputs that are asked for together."""
    made = graph.made_by()
    wanted = tuple(outputs)

    def needs(number: int) -> list[int]:
        names = wanted if number < 0 else graph.nodes[number].inputs
        return [made[name] for name in names if name in made and name not in done]

    degree: dict[int, int] = {}
    inputs_of: dict[int, list[int]] = {-1: needs(-1)}
    waiting = [-1]
    while waiting:
        for number in inputs_of[waiting.pop()]:
            if number not in degree:
                degree[number] = 0
                inputs_of[number] = needs(number)
                waiting.append(number)
            degree[number] += 1
    tape = [-1]
    deeper: list[tuple[int, int]] = []
    at = 0
    left = len(degree)
    while left and (at < len(tape) or deeper):
        if at >= len(tape):
            number, start = deeper.pop()
        else:
            number, start, at = tape[at], 0, at + 1
        own = inputs_of[number]
        for place in range(start, len(own)):
            if len(tape) - at >= _WIDTH:
                deeper.append((number, place))
                break
            degree[own[place]] -= 1
            if degree[own[place]] == 0:
                left -= 1
                tape.append(own[place])
    return tape[:0:-1]


class _Machine:
    """Buffers, who holds them, and the queue of what was handed out and did not run yet."""

    def __init__(self, ahead: bool):
        self.bytes = self.peak = 0
        self.sizes: list[int] = []
        self.holders: list[int] = []
        self.kinds: list[str] = []
        self.by_kind: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self._ahead = ahead
        self._handed = 0
        self._tasks = 0
        self._queue: deque[tuple[int, ...]] = deque()  # what each dispatch holds until it has run

    def allocate(self, size: int, kind: str) -> int:
        self.sizes.append(size + _HEADER)
        self.holders.append(1)
        self.kinds.append(kind)
        self.bytes += size + _HEADER
        self.by_kind[kind] = self.by_kind.get(kind, 0) + size + _HEADER
        if self.bytes > self.peak:
            self.peak, self.at_peak = self.bytes, dict(self.by_kind)
        return len(self.sizes) - 1

    def drop(self, buffer: int) -> None:
        self.holders[buffer] -= 1
        if self.holders[buffer] == 0:
            self.bytes -= self.sizes[buffer]
            self.by_kind[self.kinds[buffer]] -= self.sizes[buffer]

    def dispatch(self, held: tuple[int, ...] = ()) -> None:
        for buffer in held:
            self.holders[buffer] += 1
        self._queue.append(held)
        self._handed += 1
        self._tasks += self._handed % _PER_TASK == 0

    def catch_up(self) -> None:
        """What MLX waits for after each primitive."""
        if not self._ahead:
            self._run(len(self._queue))
        elif self._tasks > _TASKS:
            done = self._handed - len(self._queue)
            self._run(_PER_TASK - done % _PER_TASK)
            self._tasks -= 1

    def _run(self, dispatches: int) -> None:
        for _ in range(dispatches):
            for buffer in self._queue.popleft():
                self.drop(buffer)


_COPIES = {"AsType", "SliceUpdate", "Scatter", "ScatterAxis", "Full", "Pad", "DynamicSliceUpdate"}  # then written into
_SAME = {"StopGradient", "Copy", "Depends", "CustomTransforms"}
_RESHAPES = {"Reshape", "Flatten", "Unflatten"}
_ELEMENTWISE = {
    "Abs", "Add", "ArcTan2", "BitwiseBinary", "BitwiseInvert", "Ceil", "Cos", "Cosh", "Divide", "Equal", "Erf", "ErfInv", "Exp",
    "Expm1", "Floor", "Greater", "GreaterEqual", "Less", "LessEqual", "Log", "Log1p", "LogAddExp", "LogicalAnd", "LogicalNot",
    "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "NotEqual", "Power", "Remainder", "Round", "Select", "Sigmoid",
    "Sign", "Sin", "Sinh", "Sqrt", "Rsqrt", "Square", "Subtract", "Tan", "Tanh",
}  # fmt: skip


class _Run:
    """The evaluation of a graph."""

    def __init__(self, graph: Graph, machine: _Machine, vocabulary: int, needed: Iterable[int], held: Iterable[str]):
        self._graph, self._machine, self._vocabulary = graph, machine, vocabulary
        self._there: dict[str, _Array] = {}
        self._constant: set[str] = set(graph.constants)  # what follows from constants alone
        self._fixed: set[str] = set(graph.constants)  # what follows from weights and constants
        self._users: dict[str, int] = {}
        for number in needed:
            for name in graph.nodes[number].inputs:
                self._users[name] = self._users.get(name, 0) + 1
        for name in held:
            self._users[name] = self._users.get(name, 0) + 1_000_000

    def bring(self, names: Iterable[str], kind: str, fixed: bool = False) -> None:
        """Arrays that are there before."""
        for name in names:
            own = self._graph.arrays[name]
            buffer = self._machine.allocate(own.size * own.itemsize, kind)
            self._there[name] = _Array(buffer, own.shape, _packed(own.shape), own.size, own.itemsize)
            self._users[name] = self._users.get(name, 0) + 1_000_000
            if fixed:
                self._fixed.add(name)

    def step(self, node: Node) -> None:
        inputs = [self._there[name] for name in node.inputs]
        if self._fixed.issuperset(node.inputs) and node.inputs:
            self._fixed.update(node.outputs)
            if self._constant.issuperset(node.inputs):
                self._constant.update(node.outputs)
        outputs = self._outputs(node, inputs)
        for name, array in zip(node.outputs, outputs, strict=True):
            self._there[name] = array
        own = {outputs[0].buffer} if outputs else set()
        held = {each.buffer for each in (*inputs, *outputs[1:])} - own
        self._machine.dispatch(tuple(held))
        for name in node.inputs:
            self._leave(name)
        for name in node.outputs:
            if self._users.get(name, 0) == 0:
                self._machine.drop(self._there.pop(name).buffer)
        self._machine.catch_up()

    def _leave(self, name: str) -> None:
        self._users[name] -= 1
        if self._users[name] == 0:
            self._machine.drop(self._there.pop(name).buffer)

    def _free(self, name: str, out: Shape) -> bool:
        """Whether the output may be written into an input."""
        array = self._there[name]
        alone = self._users[name] == 1 and self._machine.holders[array.buffer] == 1
        fits = self._machine.sizes[array.buffer] - _HEADER <= out.size * out.itemsize + _SPARE
        return alone and fits and array.itemsize == out.itemsize

    def _kind(self, name: str) -> str:
        shape = self._graph.arrays[name].shape
        if name in self._fixed and name not in self._constant:
            return "dequantised"
        return "logits" if shape and shape[-1] == self._vocabulary else "activations"

    def _new(self, name: str, like: _Array | None = None) -> _Array:
        own = self._graph.arrays[name]
        stored = like.stored if like else own.size
        buffer = self._machine.allocate(stored * own.itemsize, self._kind(name))
        return _Array(buffer, own.shape, like.strides if like else _packed(own.shape), stored, own.itemsize)

    def _shared(self, name: str, source: _Array, strides: Strides, stored: int | None = None) -> _Array:
        self._machine.holders[source.buffer] += 1
        own = self._graph.arrays[name]
        return _Array(source.buffer, own.shape, strides, source.stored if stored is None else stored, own.itemsize)

    def _outputs(self, node: Node, inputs: list[_Array]) -> list[_Array]:
        if node.name == "Split":
            return [self._shared(name, inputs[0], inputs[0].strides, self._graph.arrays[name].size) for name in node.outputs]
        if node.name in _SAME:
            given = inputs[len(inputs) - len(node.outputs) :] if node.name == "CustomTransforms" else inputs
            return [self._shared(name, each, each.strides) for name, each in zip(node.outputs, given, strict=False)]
        if (viewed := self._view(node, inputs)) is not None:
            return [viewed]
        self._machine.dispatch()  # the computation itself
        if node.name in _ELEMENTWISE:
            return [self._written(node, inputs)]
        if node.name in _COPIES:
            return [self._copy(node, inputs[0])]
        if node.name == "Softmax":
            return [self._softmax(node, inputs[0])]
        if node.name == "Matmul":
            return [self._product(node, inputs)]
        if node.name == "Concatenate":
            for _ in inputs[1:]:
                self._machine.dispatch()
        return [self._new(name) for name in node.outputs]

    def _view(self, node: Node, inputs: list[_Array]) -> _Array | None:
        """An output that lies in the buffer of its input; None where it does not."""
        if not inputs:
            return None
        name, source = node.outputs[0], inputs[0]
        shape = self._graph.arrays[name].shape
        if node.name == "Transpose":
            return self._shared(name, source, tuple(source.strides[axis] for axis in node.arguments[0]))
        if node.name in _RESHAPES:
            strides = _reshaped(source.shape, source.strides, shape)
            return None if strides is None else self._shared(name, source, strides)
        if node.name == "ExpandDims":
            expanded = list(source.strides)
            for axis in node.arguments[0]:
                expanded.insert(axis, 1)
            return self._shared(name, source, tuple(expanded))
        if node.name == "Squeeze":
            kept = (stride for axis, stride in enumerate(source.strides) if axis not in node.arguments[0])
            return self._shared(name, source, tuple(kept))
        if node.name in ("Broadcast", "BroadcastAxes"):
            ahead = (0,) * (len(shape) - len(source.shape))
            pairs = zip(source.shape, source.strides, shape[len(ahead) :], strict=True)
            return self._shared(name, source, ahead + tuple(0 if was != now else stride for was, stride, now in pairs))
        if node.name == "Slice":
            strides = tuple(a * b for a, b in zip(source.strides, node.arguments[2], strict=True))
            return self._shared(name, source, strides, self._graph.arrays[name].size)
        if node.name == "Contiguous" and source.rows:
            return self._shared(name, source, source.strides)
        return None

    def _written(self, node: Node, inputs: list[_Array]) -> _Array:
        """An element-wise output: in the place of an input where one is free."""
        name, own = node.outputs[0], self._graph.arrays[node.outputs[0]]
        wide = [(each, array) for each, array in zip(node.inputs, inputs, strict=True) if array.stored != 1]
        if not wide:
            return self._new(name, inputs[0] if inputs[0].stored == 1 and own.shape == inputs[0].shape else None)
        alike = all(array.rows for _, array in wide) or all(array.columns for _, array in wide)
        flat = alike or (len(wide) == 1 and wide[0][1].dense)
        for each, array in wide:
            if (flat or (array.rows and array.stored == own.size)) and self._free(each, own):
                return self._shared(name, array, array.strides)
        return self._new(name, wide[0][1] if flat else None)

    def _copy(self, node: Node, source: _Array) -> _Array:
        name, own = node.outputs[0], self._graph.arrays[node.outputs[0]]
        if node.name != "AsType":
            self._machine.dispatch()
        if source.stored == own.size and source.dense and source.shape == own.shape:
            if self._free(node.inputs[0], own):
                return self._shared(name, source, source.strides)
            return self._new(name, source)
        if node.name == "AsType" and source.dense:
            return self._new(name, source)
        return self._new(name)

    def _softmax(self, node: Node, source: _Array) -> _Array:
        name, own = node.outputs[0], self._graph.arrays[node.outputs[0]]
        if source.dense and source.strides[-1] == 1:
            return self._shared(name, source, source.strides) if self._free(node.inputs[0], own) else self._new(name, source)
        return self._new(name)

    def _product(self, node: Node, inputs: list[_Array]) -> _Array:
        """A matrix product copies an input whose matrices are neither row by row nor column by column."""
        out = self._new(node.outputs[0])
        copies = []
        for name, array in zip(node.inputs, inputs, strict=True):
            rows, columns = array.shape[-2:]
            down, across = array.strides[-2:]
            if not ((across == 1 and (down == columns or rows == 1)) or (down == 1 and (across == rows or columns == 1))):
                size = self._graph.arrays[name].size * array.itemsize
                copies.append(self._machine.allocate(size, self._kind(name)))
                self._machine.dispatch()
        if copies:
            self._machine.dispatch(tuple(copies))
            for buffer in copies:
                self._machine.drop(buffer)
        return out


@dataclass(frozen=True)
class MemoryConfig:
    """How much memory a run may take."""

    memory: str = "auto"
    """Most that it may take, such as 12GB; auto: this machine's less a reserve; off: nothing is planned."""
    grad_checkpoint: Literal["auto", "on", "off"] = "auto"
    """Keep only what goes into each layer and compute it again in the backward; auto: where it does not fit otherwise."""

    def __post_init__(self) -> None:
        known = self.memory in ("auto", "off") or bytes_of(self.memory) > 0
        require(
            (known, "memory", self.memory, "auto, off, or a size such as 12GB or 800MB"),
            (self.grad_checkpoint in ("auto", "on", "off"), "grad_checkpoint", self.grad_checkpoint, "auto or on or off"),
        )

    def limit(self, machine: int) -> int | None:
        """The bytes that may be used on a machine with so many; None: no limit. A tenth stays with the system."""
        if self.memory == "off":
            return None
        return machine - machine // 10 if self.memory == "auto" else bytes_of(self.memory)


_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(text: str) -> int:
    """The bytes of a size; 0 where it is none.

    >>> bytes_of("12GB"), bytes_of("1.5 GiB"), bytes_of("much")
    (12000000000, 1610612736, 0)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    return int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0


@dataclass(frozen=True)
class Memory:
    """The bytes of a run at its peak, by what they are for."""

    weights: int = 0
    adapters: int = 0
    optimizer: int = 0  # its state, and the gradients that are summed
    activations: int = 0  # of the batch: what the layers compute, and their gradients
    logits: int = 0
    dequantised: int = 0
    cache: int = 0  # what MLX keeps for reuse at most; not a part of its peak

    @property
    def peak(self) -> int:
        """What `mx.get_peak_memory` will say."""
        return self.weights + self.adapters + self.optimizer + self.activations + self.logits + self.dequantised

    @property
    def total(self) -> int:
        return self.peak + self.cache

    def to_json(self) -> dict[str, int]:
        return asdict(self) | {"peak": self.peak, "total": self.total}


@contextmanager
def cache_limit(limit: int | None) -> Iterator[None]:
    """MLX keeps at most so many bytes of freed buffers while inside; None: as it is."""
    if limit is None:
        yield
        return
    before = mx.set_cache_limit(limit)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


@dataclass(frozen=True)
class Fit:
    """What was chosen, and what it will need."""

    budget: int
    checkpoint: bool
    memory: Memory
    fits: bool


Need = Callable[[int, bool], Memory]


def fit(need: Need, limit: int | None, budgets: Sequence[int], checkpoints: Sequence[bool]) -> Fit:
    """The largest budget that fits, for the first way of `checkpoints` that leaves one; else what needs least.

    The largest and the smallest budget are looked at first, because every look takes a second or two.
    """
    ordered = sorted(budgets)
    tried: list[Fit] = []

    def fits(at: int, checkpoint: bool) -> bool:
        memory = need(ordered[at], checkpoint)
        tried.append(Fit(ordered[at], checkpoint, memory, limit is None or memory.peak <= limit))
        return tried[-1].fits

    for checkpoint in checkpoints:
        low, high = 0, len(ordered) - 1
        if fits(high, checkpoint):
            return tried[-1]
        if high and fits(low, checkpoint):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle, checkpoint) else (low, middle)
            return max((one for one in tried if one.fits), key=lambda one: one.budget)
    return min(tried, key=lambda one: one.memory.peak)


def simulated(
    graph: Graph, asked: Sequence[Sequence[str]], kinds: Mapping[str, str], vocabulary: int, ahead: bool = True
) -> tuple[int, dict[str, int]]:
    """The peak of bytes over a graph whose outputs are asked for in groups, and what they were; `kinds` says what each
    input is: weights, adapters, optimizer, or batch. What was asked for is kept."""
    machine = _Machine(ahead)
    done: set[str] = set(graph.inputs) | graph.constants
    orders = []
    for group in asked:
        orders.append(evaluation_order(graph, group, done))
        done.update(name for number in orders[-1] for name in graph.nodes[number].outputs)
    needed = [number for order in orders for number in order]
    run = _Run(graph, machine, vocabulary, needed, [name for group in asked for name in group])
    for kind in ("weights", "adapters", "optimizer", "batch"):
        run.bring((name for name in graph.inputs if kinds[name] == kind), kind, fixed=kind == "weights")
    run.bring(graph.constants, "batch")
    for number in needed:
        run.step(graph.nodes[number])
    return machine.peak, machine.at_peak
