"""Graphs that a teacher model wrote: CAT-style records `{"effect phrase": ["cause phrase", ...], ...}`."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.data.causal_graphs.base import Extraction, Extractor, texts
from hildanext.data.causal_graphs.graph import CausalGraph, Edge, Node, Span, find_cycle, overlap


@config
class TeacherRecords(Extractor):
    """Phrases are looked up in both texts by exact string search; every occurrence counts, absent ones are dropped.

    A digit at a phrase's edge must not continue a longer number ("4" is not found in "48"). A link whose phrases
    overlap is dropped. A record whose links run in a circle gives no graph.

    Paper: CAT, arXiv:2509.01535 (the records); C2DLM, arXiv:2511.22146 (a teacher's concept graph).
    Differs: CAT matches the tokens of a phrase and wants the cause before the effect; here characters are matched
    and a cause may stand after its effect, as in C2DLM.
    """

    field: str = "important"
    """Where the record holds the teacher's links: an object, or a list of one-key objects."""

    def extract(self, record: Mapping[str, Any]) -> Extraction:
        prompt, response = texts(record)
        counts: Counter[str] = Counter(examples=1)
        links = list(_links(record.get(self.field), self.field))
        counts["links"] += len(links)
        nodes: dict[str, Node | None] = {}
        for phrase in (phrase for link in links for phrase in link):
            if phrase not in nodes:
                spans = (*occurrences("prompt", prompt, phrase), *occurrences("response", response, phrase))
                nodes[phrase] = Node(f"c{len(nodes)}", "concept", phrase, spans) if spans else None
                counts["phrases"] += 1
                counts["phrases not found"] += not spans
        edges: dict[tuple[str, str], Edge] = {}
        for cause, effect in links:
            source, target = nodes[cause], nodes[effect]
            if source is None or target is None:
                counts["links without a place"] += 1
            elif source is target or overlap(source.spans, target.spans):
                counts["links between overlapping phrases"] += 1
            elif not (self.strict and max(len(source.spans), len(target.spans)) > 1):
                several = len(source.spans) > 1
                edges[source.id, target.id] = Edge(source.id, target.id, "cause", 1.0, several)
        graph = self._graph([node for node in nodes.values() if node is not None], list(edges.values()), counts)
        return Extraction(prompt, response, graph, counts)

    def _graph(self, nodes: list[Node], edges: list[Edge], counts: Counter[str]) -> CausalGraph | None:
        if find_cycle(edges):
            counts["graphs with a circle"] += 1
            return None
        if not edges:
            return None
        linked = {name for edge in edges for name in (edge.cause, edge.effect)}
        kept = tuple(node for node in nodes if node.id in linked)
        counts["nodes"] += len(kept)
        counts["edges"] += len(edges)
        counts["ambiguous edges"] += sum(edge.ambiguous for edge in edges)
        return CausalGraph("json:teacher", kept, tuple(edges))


def occurrences(field: str, text: str, phrase: str) -> tuple[Span, ...]:
    """Every place of `phrase` in `text`, left to right, none overlapping another."""
    spans: list[Span] = []
    at = text.find(phrase) if phrase else -1
    while at >= 0:
        end = at + len(phrase)
        cut = phrase[0].isdigit() and _continues(text[:at], -1) or phrase[-1].isdigit() and _continues(text[end:], 0)
        if not cut:
            spans.append(Span(field, at, end))
        at = text.find(phrase, at + 1 if cut else end)
    return tuple(spans)


def _continues(rest: str, edge: int) -> bool:
    """Whether the text beside a phrase goes on with its number: another digit, or a point or comma and a digit."""
    if not rest:
        return False
    if rest[edge].isdigit():
        return True
    beyond = rest[1:2] if edge == 0 else rest[-2:-1]
    return rest[edge] in ".," and beyond.isdigit()


def _links(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """(cause, effect) of a teacher's record. Raises `DataError` where it is neither of the two shapes."""
    if value is None:
        return
    records = value if isinstance(value, list) else [value]
    for record in records:
        if not isinstance(record, dict):
            raise DataError(f"{name!r} holds {type(record).__name__}", 'write {"effect": ["cause", ...]}')
        for effect, causes in record.items():
            if not isinstance(causes, list) or not all(isinstance(cause, str) for cause in causes):
                raise DataError(f"{name!r}: the causes of {effect!r} are {causes!r}"[:200], "give a list of phrases")
            yield from ((cause, effect) for cause in causes)
