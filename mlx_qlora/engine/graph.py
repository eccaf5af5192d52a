"""The graph of a traced step, and in it what MLX's own graph has where tracing shows something simpler.

`mx.export_function` gives the primitives of a function with the shapes of all arrays, and computes nothing. A step is
traced with marks (model/transforms.py) around the functions whose gradients are not MLX's; `with_repeats` puts in what
the real ones compute again: a checkpointed layer after its first pass is done, a dequantised weight at each use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

# The marks are the last inputs of a traced function, in this order.
MARKS = ("layer begins", "layer ends", "product begins", "product ends")

_VIEWS = {"Transpose", "Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze", "Depends", "StopGradient"}


class Shape(NamedTuple):
    """An array that is not there."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        size = 1
        for each in self.shape:
            size *= each
        return size


class Node(NamedTuple):
    """A primitive: what it takes, and what it gives."""

    name: str
    arguments: Sequence[Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class Graph:
    """Primitives in an order in which they could run; arrays by their names."""

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    arrays: dict[str, Shape] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)

    def made_by(self) -> dict[str, int]:
        """The node that gives each array."""
        return {name: number for number, node in enumerate(self.nodes) for name in node.outputs}

    def used_by(self) -> dict[str, list[int]]:
        """The nodes that take each array."""
        users: dict[str, list[int]] = {}
        for number, node in enumerate(self.nodes):
            for name in node.inputs:
                users.setdefault(name, []).append(number)
        return users


def trace(function: Callable[..., Sequence[mx.array]], inputs: Sequence[mx.array]) -> Graph:
    """The graph of a function of arrays, of which only shapes and dtypes count: nothing is computed.

    MLX simplifies it as `mx.compile` would: what is computed twice in the same way is there once.
    """
    graph = Graph()

    def read(event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "constants":
            for name, array in event["constants"]:
                graph.arrays[name] = Shape(tuple(array.shape), array.dtype.size)
                graph.constants.add(name)
        elif kind == "primitive":
            _learn(graph, [*event["inputs"], *event["outputs"]])
            names = tuple(name for name, *_ in event["inputs"]), tuple(name for name, *_ in event["outputs"])
            graph.nodes.append(Node(event["name"], event["arguments"], *names))
        elif kind in ("inputs", "outputs"):
            _learn(graph, event[kind])
            getattr(graph, kind).extend(name for name, *_ in event[kind])

    mx.export_function(read, function, *inputs)
    return graph


def _learn(graph: Graph, arrays: Iterable[Any]) -> None:
    for name, shape, dtype in arrays:
        graph.arrays[name] = Shape(tuple(shape), dtype.size)


def with_repeats(graph: Graph) -> Graph:
    """The graph with what is computed again, and without its marks."""
    marks = dict(zip(MARKS, graph.inputs[-len(MARKS) :], strict=True))
    graph = Graph(graph.inputs[: -len(MARKS)], graph.outputs, graph.nodes, graph.arrays, graph.constants)
    made = graph.made_by()
    bare = _bare(graph)
    products, layers = (
        [_Marked(begin, end, _inside(graph, made, begin, end)) for begin, end in _pairs(graph, marks[a], marks[b])]
        for a, b in (MARKS[2:], MARKS[:2])
    )
    products = [each._replace(inside=each.inside - bare) for each in products]
    counts = Counter(number for layer in layers for number in layer.inside)  # what several have is made outside of them
    layers = [_Marked(begin, end, {n for n in inside if counts[n] == 1 or n in bare}) for begin, end, inside in layers]
    return _Rewriting(graph, made, products, layers, set(marks.values()), bare).graph()


class _Marked(NamedTuple):
    """A function between two marks: the nodes of these, and those between them."""

    begin: int
    end: int
    inside: set[int]


def _bare(graph: Graph) -> set[int]:
    """The nodes that follow from constants alone; tracing makes one of all that are alike."""
    names = set(graph.constants)
    found = set()
    for number, node in enumerate(graph.nodes):
        if names.issuperset(node.inputs):
            names.update(node.outputs)
            found.add(number)
    return found


def _pairs(graph: Graph, begins: str, ends: str) -> Iterator[tuple[int, int]]:
    """(node where a marked function begins, node where it ends); what begins inside another ends inside it."""
    opened: list[int] = []
    for number, node in enumerate(graph.nodes):
        if begins in node.inputs:
            opened.append(number)
        elif ends in node.inputs:
            begin = next(one for one in reversed(opened) if _reaches(graph, one, number))
            opened.remove(begin)
            yield begin, number


def _reaches(graph: Graph, begin: int, end: int) -> bool:
    """Whether a node goes into a later one."""
    reached = set(graph.nodes[begin].outputs)
    for node in graph.nodes[begin + 1 : end + 1]:
        if not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
    return not reached.isdisjoint(graph.nodes[end].outputs)


def _inside(graph: Graph, made: Mapping[str, int], begin: int, end: int) -> set[int]:
    """The nodes between two marks, and what else goes into them."""
    found: set[int] = set()
    waiting = [made[name] for name in graph.nodes[end].inputs if name in made]
    while waiting:
        number = waiting.pop()
        if number == begin or number in found:
            continue
        found.add(number)
        waiting += [made[name] for name in graph.nodes[number].inputs if name in made]
    return found


class _Rewriting:
    """One pass over the nodes that copies, renames and adds."""

    def __init__(
        self,
        graph: Graph,
        made: Mapping[str, int],
        products: Sequence[_Marked],
        layers: Sequence[_Marked],
        marks: set[str],
        bare: set[int],
    ):
        self._bare = bare
        self._first: dict[int, dict[str, str]] = {}
        self._old, self._made, self._marks = graph, made, marks
        self._users = graph.used_by()
        self._new = Graph(graph.inputs, [], [], dict(graph.arrays), graph.constants)
        self._products: dict[int, list[_Marked]] = {}
        for product in products:
            for number in product.inside:
                self._products.setdefault(number, []).append(product)
        self._layer_of = {number: layer for layer in layers for number in layer.inside if number not in bare}
        self._backward_of: dict[int, _Marked] = {}
        self._begins = {each.end: each.begin for each in (*products, *layers)}
        self._now: dict[str, str] = {}  # what a mark gave is now what it took
        self._again: dict[int, dict[str, str]] = {}  # of each layer, by where it ends: what its second pass gives

    def graph(self) -> Graph:
        for number, node in enumerate(self._old.nodes):
            self._place(number, node)
            self._put(number, node, lambda name, user=number: self._input(user, name), self._now, {})  # type: ignore[misc]
        self._new.outputs = [self._now.get(name, name) for name in self._old.outputs]
        return self._new

    def _place(self, number: int, node: Node) -> None:
        """Which layer a node of the backward belongs to: the first one that anything in it comes from."""
        if number in self._layer_of or number in self._begins or number in self._bare:
            return
        makers = [self._made[name] for name in node.inputs if name in self._made]
        layers = [self._layer_of.get(maker) or self._backward_of.get(maker) for maker in makers]
        known = [layer for layer in layers if layer is not None]
        if known:
            self._backward_of[number] = min(known, key=lambda layer: layer.begin)

    def _put(self, number: int, node: Node, find: Callable[[str], str], began: dict[str, str], fresh: dict[str, str]) -> None:
        """A node with other inputs and outputs. A mark is left out where something begins, and where it ends there
        stands what a custom function leaves in a graph: a view of its outputs that holds on to its inputs."""
        if self._marks.isdisjoint(node.inputs):
            inputs = [self._own(name) for name in map(find, node.inputs)]
            outputs = tuple(fresh.get(name, name) for name in node.outputs)
            self._new.nodes.append(node._replace(inputs=tuple(inputs), outputs=outputs))
            return
        inputs = [find(name) for name in node.inputs if name not in self._marks]
        if number not in self._begins:
            began |= dict(zip(node.outputs, inputs, strict=True))
            return
        entered = [find(name) for name in self._old.nodes[self._begins[number]].outputs]
        stopped = [self._fresh(name) for name in inputs]
        self._new.nodes += [Node("StopGradient", (), (a,), (b,)) for a, b in zip(inputs, stopped, strict=True)]
        outputs = tuple(fresh.get(name, name) for name in node.outputs)
        self._new.nodes.append(Node("CustomTransforms", (), (*entered, *stopped), outputs))

    def _own(self, name: str) -> str:
        """A constant that was broadcast, anew: MLX makes one wherever a number meets an array; tracing makes them one."""
        maker = self._made.get(name)
        if (
            maker is None
            or self._old.nodes[maker].name != "Broadcast"
            or self._old.nodes[maker].inputs[0] not in self._new.constants
        ):
            return name
        node = self._old.nodes[maker]
        self._new.nodes.append(node._replace(outputs=(self._fresh(name),)))
        return self._new.nodes[-1].outputs[0]

    def _input(self, user: int, name: str) -> str:
        """What a node really takes: its own array, or the same computed again."""
        maker = self._made.get(name)
        if maker is None:
            return name
        products = self._products.get(maker, ())
        if products and not any(user in product.inside or user == product.end for product in products):
            return self._copied(name, products[0].inside, {}, self._beside(user, name))
        layer = self._layer_of.get(maker)
        if maker in self._bare and user in self._layer_of:
            return self._copied(name, self._bare, self._first.setdefault(self._layer_of[user].end, {}), None)
        if maker in self._bare and user in self._backward_of:
            return self._computed_again(name, self._backward_of[user])
        if layer is not None and user not in layer.inside and user != layer.end:
            return self._computed_again(name, layer)
        return self._now.get(name, name)

    def _beside(self, user: int, name: str) -> str | None:
        """What a weight is multiplied with in the backward; it is not dequantised before that is there."""
        node = self._old.nodes[user]
        while node.name in _VIEWS and len(self._users.get(node.outputs[0], ())) == 1:
            name, user = node.outputs[0], self._users[node.outputs[0]][0]
            node = self._old.nodes[user]
        return next((self._now.get(each, each) for each in node.inputs if each != name), None)

    def _computed_again(self, name: str, layer: _Marked) -> str:
        if layer.end not in self._again:
            entered, ended = self._old.nodes[layer.begin].outputs, self._old.nodes[layer.end].outputs
            copies = {each: self._fresh(each) for each in entered}
            held = (*(self._now.get(each, each) for each in entered), *ended)
            self._new.nodes.append(Node("Depends", (), held, tuple(copies.values())))
            self._again[layer.end] = copies
        return self._copied(name, layer.inside, self._again[layer.end], None)

    def _copied(self, name: str, inside: set[int], copies: dict[str, str], after: str | None) -> str:
        """The array as a copy of the nodes that give it computes it; `after` says what has to be there before.

        What it is made of comes first, without recursion: a recurrent layer is a chain of thousands of nodes.
        """
        waiting = [name]
        while waiting:
            maker = self._made.get(waiting[-1])
            inputs = self._old.nodes[maker].inputs if maker is not None and maker in inside else ()
            lacking = (each for each in inputs if each not in copies and self._made.get(each, -1) in inside)
            if (first := next(lacking, None)) is not None:
                waiting.append(first)
            else:
                self._copy(waiting.pop(), inside, copies, after)
        return self._copy(name, inside, copies, after)

    def _copy(self, name: str, inside: set[int], copies: dict[str, str], after: str | None) -> str:
        if name in copies:
            return copies[name]
        maker = self._made.get(name)
        if maker is None and after is not None and name not in self._new.constants:
            copies[name] = self._fresh(name)
            self._new.nodes.append(Node("Depends", (), (name, after), (copies[name],)))
            return copies[name]
        if maker is None or maker not in inside:
            return self._now.get(name, name)
        node = self._old.nodes[maker]
        fresh = {each: self._fresh(each) for each in node.outputs}
        began: dict[str, str] = {}
        self._put(maker, node, lambda each: self._copied(each, inside, copies, after), began, fresh)
        copies |= fresh | began
        return copies[name]

    def _fresh(self, name: str) -> str:
        fresh = f"{name}'{len(self._new.arrays)}"
        self._new.arrays[fresh] = self._new.arrays[name]
        return fresh
