"""From equations to a graph: each operand is looked for among earlier results, then the question's numbers.

The order is that of the reference extraction: the latest earlier result with the value, else a numeral of the
question, else one of its number words, else a known constant (no edge), else unresolved (counted).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from hildanext.data.causal_graphs.graph import CausalGraph, Edge, Node, Span
from hildanext.data.causal_graphs.numbers import NUMERAL, Number, evaluate, number, number_words, numerals, written

CONSTANTS = frozenset(map(Fraction, (1, 2, 7, 10, 12, 24, 30, 52, 60, 100, 365)))
"""Values that people use without being told: a pair, a week, a dozen, a year, per cent."""
TOLERANCE = Fraction(1, 100)
ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
FINAL = re.compile(r"####\s*[$]?\s*(-?)\s*")


class Equation(NamedTuple):
    """One computation of a response: its operands' values, and the result with the characters that say it."""

    operands: tuple[Fraction, ...]
    result: Number
    begin: int
    """Where the text of this equation begins: after the result before it."""


def without_annotations(answer: str) -> tuple[str, list[tuple[str, str, int]]]:
    """An answer as trained, and its annotations as (expression, result, place of the number that follows)."""
    pieces: list[str] = []
    annotations: list[tuple[str, str, int]] = []
    at = length = 0
    for annotation in ANNOTATION.finditer(answer):
        piece = answer[at : annotation.start()]
        pieces.append(piece)
        length += len(piece)
        annotations.append((annotation[1], annotation[2], length))
        at = annotation.end()
    return "".join([*pieces, answer[at:]]), annotations


def consistent(expression: str, result: str, counts: Counter[str]) -> Fraction | None:
    """The result's exact value where the expression gives it (to 0.01); what does not hold is counted."""
    value, stated = evaluate(expression), evaluate(result)
    if value is None or stated is None:
        counts["unreadable equations"] += 1
        return None
    if abs(value - stated) > TOLERANCE:
        counts["wrong equations"] += 1
        return None
    return stated


def operands_of(expression: str) -> tuple[Fraction, ...]:
    """The values of an expression's numerals, in order."""
    return tuple(number(match.group()) for match in NUMERAL.finditer(expression))


def final_answer(response: str) -> Number | None:
    """The number after `####`, where there is one."""
    match = FINAL.search(response)
    if match is None:
        return None
    numeral = next(numerals(response, match.end()), None)
    if numeral is None or numeral.start != match.end():
        return None
    return numeral._replace(value=-numeral.value) if match[1] else numeral


def link(
    source: str, prompt: str, response: str, equations: Sequence[Equation], strict: bool, counts: Counter[str]
) -> CausalGraph | None:
    """The graph of an example's equations; None where it would have no edge. Adds to `counts`.

    A result's node holds the place where it is computed and those where a later equation repeats it as an operand.
    """
    linker = _Linker(prompt, response, strict, counts)
    unresolved = counts["operands: unresolved"]
    for equation in equations:
        linker.add(equation)
    linker.finish()
    counts["examples with equations"] += bool(equations)
    counts["examples resolved"] += bool(equations) and counts["operands: unresolved"] == unresolved
    return linker.graph(source)


@dataclass
class _Place:
    """A node in the making."""

    id: str
    kind: str
    value: Fraction
    spans: list[Span]
    ratio: tuple[int, int] = field(init=False)
    """The value again: pairs of integers compare many times faster than Fractions."""

    def __post_init__(self) -> None:
        self.ratio = self.value.as_integer_ratio()


@dataclass
class _Linker:
    prompt: str
    response: str
    strict: bool
    counts: Counter[str]
    givens: list[_Place] = field(init=False)
    words: list[_Place] = field(init=False)
    results: list[_Place] = field(default_factory=list)
    final: list[_Place] = field(default_factory=list)
    edges: dict[tuple[str, str], Edge] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.givens = self._in_prompt("q", numerals(self.prompt))
        self.words = self._in_prompt("w", number_words(self.prompt))

    def _in_prompt(self, letter: str, numbers: Iterable[Number]) -> list[_Place]:
        return [
            _Place(f"{letter}{index}", "given", numeral.value, [Span("prompt", numeral.start, numeral.end)])
            for index, numeral in enumerate(numbers)
        ]

    def add(self, equation: Equation) -> None:
        value, start, end = equation.result
        effect = _Place(f"e{len(self.results)}", "intermediate", value, [Span("response", start, end)])
        mentions = list(numerals(self.response, equation.begin, start))
        self.counts["equations"] += 1
        causes: list[tuple[_Place, bool]] = []
        for operand in reversed(equation.operands):
            level, candidates = self._candidates(operand)
            self._count(operand, level, candidates)
            if not candidates or (self.strict and len(candidates) > 1):
                continue
            cause = candidates[-1]  # the latest result, or the numeral nearest before the response
            if level == "results":
                _mention(cause, operand, mentions)
            causes.append((cause, len(candidates) > 1))
        for cause, ambiguous in reversed(causes):
            self._join(cause, effect, "operand", ambiguous)
        self.results.append(effect)

    def finish(self) -> None:
        """The final answer is a copy of the last result that equals it."""
        answer = final_answer(self.response)
        if answer is None:
            return
        self.counts["examples with an answer"] += 1
        final = _Place("f", "final", answer.value, [Span("response", answer.start, answer.end)])
        self.final.append(final)
        equal = [result for result in self.results if result.value == answer.value]
        if not equal:
            return
        self.counts[
            "answer is the last result" if equal[-1] is self.results[-1] else "answer is an earlier result"
        ] += 1
        self._join(equal[-1], final, "copy", False)

    def graph(self, source: str) -> CausalGraph | None:
        if not self.edges:
            return None
        linked = {name for pair in self.edges for name in pair}
        places = [p for p in (*self.givens, *self.words, *self.results, *self.final) if p.id in linked]
        self.counts["nodes"] += len(places)
        self.counts["edges"] += len(self.edges)
        self.counts["ambiguous edges"] += sum(edge.ambiguous for edge in self.edges.values())
        nodes = tuple(Node(p.id, p.kind, written(p.value), tuple(sorted(p.spans))) for p in places)
        return CausalGraph(source, nodes, tuple(self.edges.values()))

    def _candidates(self, operand: Fraction) -> tuple[str, list[_Place]]:
        ratio = operand.as_integer_ratio()
        levels = {"results": self.results, "question numerals": self.givens, "number words": self.words}
        for level, places in levels.items():
            matching = [place for place in places if place.ratio == ratio]
            if matching:
                return level, matching
        return ("constants" if operand in CONSTANTS else "unresolved"), []

    def _count(self, operand: Fraction, level: str, candidates: list[_Place]) -> None:
        self.counts["operands"] += 1
        self.counts[f"operands: {level}"] += 1
        self.counts["operands: ambiguous"] += len(candidates) > 1
        ratio = operand.as_integer_ratio()
        same = sum(place.ratio == ratio for places in (self.results, self.givens) for place in places)
        self.counts[f"numerals of that value: {'one' if same == 1 else 'several' if same else 'none'}"] += 1

    def _join(self, cause: _Place, effect: _Place, kind: str, ambiguous: bool) -> None:
        key = (cause.id, effect.id)
        ambiguous |= key in self.edges and self.edges[key].ambiguous
        self.edges[key] = Edge(*key, kind, 1.0, ambiguous)


def _mention(cause: _Place, operand: Fraction, mentions: list[Number]) -> None:
    """Give the operand's numeral in the equation's own text, the last one not yet taken, to the result it repeats."""
    for index in range(len(mentions) - 1, -1, -1):
        if mentions[index].value == operand:
            mention = mentions.pop(index)
            cause.spans.append(Span("response", mention.start, mention.end))
            return
