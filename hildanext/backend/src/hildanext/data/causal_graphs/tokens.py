"""From characters to tokens: which token indices a graph links, after rendering, truncation and packing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hildanext.core.errors import DataError
from hildanext.data.causal_graphs.graph import CausalGraph, Span

Offsets = Sequence[tuple[int, int]]
"""Character range of each token in the exact training string, from the fast tokenizer; (n, n) for special tokens."""


class TokenPair(NamedTuple):
    """Token `effect` was computed from token `cause`."""

    effect: int
    cause: int
    weight: float


def span_tokens(span: Span, offsets: Offsets, fields: Mapping[str, tuple[int, int]]) -> list[int]:
    """Indices of the tokens whose characters overlap a span.

    `fields` says which characters of the training string are the prompt and which the response. Raises `DataError`
    for a span that ends beyond its field: the string was rendered from another text than the graph's.
    """
    if span.field not in fields:
        raise DataError(f"a graph points into {span.field!r}", f"the training string has {', '.join(fields)}")
    begin, end = fields[span.field]
    if begin + span.end > end:
        raise DataError(
            f"a graph points at character {span.end} of {span.field!r}, which has {end - begin} as rendered",
            "the graph was made for another text: extract it again",
        )
    start, stop = begin + span.start, begin + span.end
    return [index for index, (low, high) in enumerate(offsets) if low < high and max(low, start) < min(high, stop)]


def token_pairs(
    graph: CausalGraph, offsets: Offsets, fields: Mapping[str, tuple[int, int]], keep_ambiguous: bool = True
) -> list[TokenPair]:
    """Every token of an effect with every token of each of its causes, sorted; no token with itself.

    A pair that two edges give carries the larger weight.
    """
    indices: dict[str, list[int]] = {}
    for node in graph.nodes:
        indices[node.id] = sorted({index for span in node.spans for index in span_tokens(span, offsets, fields)})
    weights: dict[tuple[int, int], float] = {}
    for edge in graph.edges:
        if edge.ambiguous and not keep_ambiguous:
            continue
        for effect in indices[edge.effect]:
            for cause in indices[edge.cause]:
                if effect != cause:
                    weights[effect, cause] = max(weights.get((effect, cause), 0.0), edge.weight)
    return [TokenPair(*pair, weight) for pair, weight in sorted(weights.items())]


def placed(pairs: Iterable[TokenPair], begin: int, end: int, at: int = 0) -> list[TokenPair]:
    """The pairs of tokens `begin` to `end` of an example, when those tokens lie in a row from index `at` on.

    A pair that lost one of its tokens to truncation, or to another piece of a cut document, is dropped.
    """
    shift = at - begin
    return [
        TokenPair(effect + shift, cause + shift, weight)
        for effect, cause, weight in pairs
        if begin <= effect < end and begin <= cause < end
    ]
