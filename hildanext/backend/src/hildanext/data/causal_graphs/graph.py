"""A causal graph of one example: which number (or phrase) was computed from which, and where each is written.

The format is JSON, version 1. Spans are `[field, start, end)` in characters of the example's prompt and response
**as trained**; edges run from cause to effect. Nothing is repaired: what does not hold is a `DataError` with its place.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from hildanext.core.errors import DataError

VERSION = 1
NODE_KINDS = ("given", "intermediate", "final", "concept")
EDGE_KINDS = ("operand", "copy", "cause")


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive) of a field."""

    field: str
    start: int
    end: int


@dataclass(frozen=True)
class Node:
    """A quantity or a phrase, at every place where it is written."""

    id: str
    kind: str
    value: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Edge:
    """`effect` was computed from `cause`."""

    cause: str
    effect: str
    kind: str = "operand"
    weight: float = 1.0
    ambiguous: bool = False
    """Another node with the same value could have been meant."""


@dataclass(frozen=True)
class CausalGraph:
    """A graph that holds together (see `read_graph`); `source` says what made it."""

    source: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.id == name)

    def to_json(self) -> dict[str, Any]:
        """The record that `read_graph` reads back."""
        return {
            "version": VERSION,
            "source": self.source,
            "nodes": [
                {"id": node.id, "kind": node.kind, "value": node.value, "spans": [list(span) for span in node.spans]}
                for node in self.nodes
            ],
            "edges": [
                {"from": e.cause, "to": e.effect, "kind": e.kind, "weight": e.weight, "ambiguous": e.ambiguous}
                for e in self.edges
            ],
        }


def read_graph(value: Any, fields: Mapping[str, str], where: str = "causal_graph") -> CausalGraph:
    """Read and check a graph against the texts its spans point into.

    Raises `DataError` that names the place: another version, unknown or missing keys, wrong types, an unknown kind,
    ids that repeat or do not exist, a span off its text or empty, spans of one node or of two linked nodes that
    overlap, an edge given twice, a weight that is no positive number, a cycle.
    """
    _keys(value, ("version", "source", "nodes", "edges"), where)
    if value["version"] != VERSION or isinstance(value["version"], bool):
        raise DataError(f"{where}.version is {value['version']!r}", f"this version of hildanext reads {VERSION}")
    _typed(value["source"], str, f"{where}.source")
    nodes = tuple(
        _node(node, fields, f"{where}.nodes[{number}]") for number, node in enumerate(_list(value, "nodes", where))
    )
    ids = [node.id for node in nodes]
    repeated = next((name for name in ids if ids.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{where}.nodes: the id {repeated!r} is given twice", "an id names one node")
    edges = tuple(
        _edge(edge, set(ids), f"{where}.edges[{number}]") for number, edge in enumerate(_list(value, "edges", where))
    )
    graph = CausalGraph(value["source"], nodes, edges)
    check_graph(graph, where)
    return graph


def check_graph(graph: CausalGraph, where: str = "causal_graph") -> None:
    """Raise `DataError` for repeated edges, linked nodes on the same characters, and cycles."""
    by_id = {node.id: node for node in graph.nodes}
    seen: set[tuple[str, str]] = set()
    for number, edge in enumerate(graph.edges):
        place = f"{where}.edges[{number}]"
        if (edge.cause, edge.effect) in seen:
            raise DataError(f"{place}: {edge.cause!r} -> {edge.effect!r} is given twice", "give it once")
        seen.add((edge.cause, edge.effect))
        crossing = overlap(by_id[edge.cause].spans, by_id[edge.effect].spans) if edge.cause != edge.effect else None
        if crossing is not None:
            raise DataError(
                f"{place}: {edge.cause!r} and {edge.effect!r} share the characters {list(crossing)}",
                "a token cannot be its own cause",
            )
    cycle = find_cycle(graph.edges)
    if cycle:
        raise DataError(f"{where}: the edges run in a circle, {' -> '.join(cycle)}", "an effect cannot cause its cause")


def find_cycle(edges: Iterable[Edge]) -> list[str]:
    """The ids along a cycle, the first one repeated at the end; empty where there is none."""
    effects: dict[str, list[str]] = {}
    for edge in edges:
        effects.setdefault(edge.cause, []).append(edge.effect)
    finished: set[str] = set()
    for start in effects:
        path: list[str] = []
        stack = [(start, False)]
        while stack:
            name, leaving = stack.pop()
            if leaving:
                finished.add(path.pop())
            elif name in path:
                return [*path[path.index(name) :], name]
            elif name not in finished:
                path.append(name)
                stack.append((name, True))
                stack.extend((effect, False) for effect in reversed(effects.get(name, [])))
    return []


def overlap(some: Sequence[Span], others: Sequence[Span]) -> Span | None:
    """The characters that a span of each shares, or None."""
    for a in some:
        for b in others:
            if a.field == b.field and max(a.start, b.start) < min(a.end, b.end):
                return Span(a.field, max(a.start, b.start), min(a.end, b.end))
    return None


def _node(value: Any, fields: Mapping[str, str], where: str) -> Node:
    _keys(value, ("id", "kind", "value", "spans"), where)
    for name in ("id", "kind", "value"):
        _typed(value[name], str, f"{where}.{name}")
    _kind(value["kind"], NODE_KINDS, where)
    spans = tuple(
        _span(span, fields, f"{where}.spans[{number}]") for number, span in enumerate(_list(value, "spans", where))
    )
    if not spans:
        raise DataError(f"{where}.spans is empty", "a node is written somewhere, or it is left out")
    for first, second in pairwise(sorted(spans)):
        if overlap([first], [second]):
            raise DataError(f"{where}.spans: {list(first)} and {list(second)} overlap", "give each place once")
    return Node(value["id"], value["kind"], value["value"], spans)


def _span(value: Any, fields: Mapping[str, str], where: str) -> Span:
    whole = isinstance(value, list | tuple) and len(value) == 3 and isinstance(value[0], str)
    if not whole or any(not isinstance(at, int) or isinstance(at, bool) for at in value[1:]):
        raise DataError(f"{where} is {value!r}", 'a span is ["prompt" or "response", start, end]')
    span = Span(*value)
    if span.field not in fields:
        raise DataError(f"{where}: no field {span.field!r}", f"fields of this example: {', '.join(fields)}")
    length = len(fields[span.field])
    if not 0 <= span.start < span.end <= length:
        raise DataError(
            f"{where}: characters {span.start} to {span.end} of {span.field!r}, which has {length}",
            "spans count characters of the text as trained, end exclusive",
        )
    return span


def _edge(value: Any, ids: set[str], where: str) -> Edge:
    _keys(value, ("from", "to"), where, ("kind", "weight", "ambiguous"))
    for name in ("from", "to"):
        _typed(value[name], str, f"{where}.{name}")
        if value[name] not in ids:
            raise DataError(f"{where}.{name}: no node {value[name]!r}", "every edge joins two nodes of the graph")
    kind, weight = value.get("kind", "operand"), value.get("weight", 1.0)
    _kind(kind, EDGE_KINDS, where)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise DataError(f"{where}.weight is {weight!r}", "give a positive number")
    _typed(value.get("ambiguous", False), bool, f"{where}.ambiguous")
    return Edge(value["from"], value["to"], kind, float(weight), value.get("ambiguous", False))


def _keys(value: Any, needed: Sequence[str], where: str, optional: Sequence[str] = ()) -> None:
    _typed(value, dict, where)
    for name in needed:
        if name not in value:
            raise DataError(f"{where} has no {name!r}", f"it holds {', '.join((*needed, *optional))}")
    for name in value:
        if name not in needed and name not in optional:
            raise DataError(f"{where}: unknown key {name!r}", f"it holds {', '.join((*needed, *optional))}")


def _list(value: Mapping[str, Any], name: str, where: str) -> list[Any]:
    _typed(value[name], list, f"{where}.{name}")
    return list(value[name])


def _typed(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind):
        raise DataError(f"{where} is {value!r}"[:200], f"it must be {_WORDS[kind]}")


def _kind(value: str, kinds: Sequence[str], where: str) -> None:
    if value not in kinds:
        raise DataError(f"{where}.kind is {value!r}", f"kinds: {', '.join(kinds)}")


_WORDS = {str: "a string", dict: "an object", list: "a list", bool: "true or false"}
