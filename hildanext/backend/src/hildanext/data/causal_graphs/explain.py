"""One graph in words: the texts with nodes marked, the nodes with their causes, the tokens that they become."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hildanext.data.causal_graphs.corpus import GraphExample
from hildanext.data.causal_graphs.graph import CausalGraph, Node
from hildanext.data.causal_graphs.tokens import Offsets, TokenPair, span_tokens, token_pairs


class Piece(NamedTuple):
    """A stretch of text, and the node it belongs to."""

    text: str
    node: str | None = None


def marked(example: GraphExample, field: str) -> list[Piece]:
    """A field's text in pieces; that of a node is in brackets with its id behind: `[24]e0`.

    Where phrases of two nodes overlap, the one that starts first (and is longer) is marked.
    """
    text = example.response if field == "response" else example.prompt
    nodes = example.graph.nodes if example.graph is not None else ()
    spans = sorted((span.start, -span.end, node.id) for node in nodes for span in node.spans if span.field == field)
    pieces: list[Piece] = []
    at = 0
    for start, negative_end, name in spans:
        if start < at:
            continue
        pieces += [Piece(text[at:start]), Piece(f"[{text[start:-negative_end]}]{name}", name)]
        at = -negative_end
    return [piece for piece in (*pieces, Piece(text[at:])) if piece.text]


def node_lines(graph: CausalGraph) -> list[list[Piece]]:
    """A line for each node, in the graph's order: id, kind, value, and what it was made from."""
    wide = max(len(node.id) for node in graph.nodes)
    longest = max(len(shortened(node.value)) for node in graph.nodes)
    lines = []
    for node in graph.nodes:
        causes = [edge for edge in graph.edges if edge.effect == node.id]
        value = shortened(node.value)
        value = f"{value:<{longest}}" if causes else value
        line = [Piece(f"{node.id:<{wide}}", node.id), Piece(f"  {node.kind:<12}  {value}")]
        for number, edge in enumerate(causes):
            line.append(Piece(", " if number else "  <- "))
            line.append(Piece(edge.cause, edge.cause))
            notes = [edge.kind] * (edge.kind != "operand") + ["ambiguous"] * edge.ambiguous
            notes += [f"weight {edge.weight:g}"] * (edge.weight != 1.0)
            line.append(Piece(f" ({', '.join(notes)})" if notes else ""))
        lines.append([piece for piece in line if piece.text])
    return lines


def token_lines(
    graph: CausalGraph, text: str, offsets: Offsets, fields: Mapping[str, tuple[int, int]], block_size: int
) -> list[list[Piece]]:
    """Which tokens each node becomes in the training string `text`, and where blocks let its pairs be seen."""
    wide = max(len(node.id) for node in graph.nodes)
    lines = []
    for node in graph.nodes:
        indices = node_tokens(node, offsets, fields)
        listed = " ".join(f"{index}:{text[slice(*offsets[index])]!r}" for index in indices)
        lines.append([Piece(f"{node.id:<{wide}}", node.id), Piece(f"  {listed}")])
    pairs = token_pairs(graph, offsets, fields)
    places = pair_places(pairs, block_size)
    lines.append([Piece(f"{len(pairs)} token pairs in {len(offsets)} tokens; at block size {block_size} the cause is")])
    for name, count in places.items():
        lines.append([Piece(f"  {count:>5} {name}")])
    return lines


def node_tokens(node: Node, offsets: Offsets, fields: Mapping[str, tuple[int, int]]) -> list[int]:
    """Sorted indices of all tokens of a node."""
    return sorted({index for span in node.spans for index in span_tokens(span, offsets, fields)})


def pair_places(pairs: Sequence[TokenPair], block_size: int) -> dict[str, int]:
    """How many pairs have their cause in an earlier block, in the effect's own, in a later one (which drops them)."""
    counts = Counter(
        (pair.cause // block_size > pair.effect // block_size) - (pair.cause // block_size < pair.effect // block_size)
        for pair in pairs
    )
    return {"in an earlier block": counts[-1], "in the same block": counts[0], "in a later block (unseen)": counts[1]}


def field_tokens(offsets: Offsets, place: tuple[int, int]) -> list[tuple[int, int]]:
    """Characters of the tokens that lie in a field, counted from its start and cut at its edges."""
    begin, end = place
    return [(max(low, begin) - begin, min(high, end) - begin) for low, high in offsets if low < end and high > begin]


def shortened(text: str, most: int = 40) -> str:
    """A phrase on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
