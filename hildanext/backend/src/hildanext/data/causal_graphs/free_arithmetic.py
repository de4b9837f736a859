"""Equations in free text: any `48 / 2 = 24` is read as an annotation would be."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hildanext.core.config import config
from hildanext.data.causal_graphs.base import Extraction, Extractor, texts
from hildanext.data.causal_graphs.equations import Equation, consistent, link, operands_of, without_annotations
from hildanext.data.causal_graphs.numbers import NUMERAL, Number, number

_NUMBER = rf"[$]?(?:{NUMERAL.pattern})%?"
_GOES_ON = r"\d|[.,]\d|\s*[-+*/x×÷]\s*[$(]*\.?\d|\s+\d+/\d"
"""What may not follow a result: more digits, or an expression that it is only the beginning of."""
EQUATION = re.compile(
    rf"(?P<expression>(?:\(\s*)*{_NUMBER}(?:\s*\))*(?:\s*[-+*/x×÷]\s*(?:\(\s*)*{_NUMBER}(?:\s*\))*){{1,40}})"
    rf"\s*=\s*[$]?(?P<result>-?(?P<numeral>{NUMERAL.pattern})%?)(?!{_GOES_ON})"
)


@config
class WrittenEquations(Extractor):
    """Operands of each `a op b = c` of a response, linked as `rule:gsm8k` links annotations.

    Paper: C2DLM, arXiv:2511.22146 (causal graphs of a response).
    Differs: made by rule; a result that no equation of the text gives has no cause.
    """

    def extract(self, record: Mapping[str, Any]) -> Extraction:
        prompt, answer = texts(record)
        response, _ = without_annotations(answer)
        counts: Counter[str] = Counter(examples=1)
        equations = []
        begin = 0
        for match in EQUATION.finditer(response):
            if response[: match.start()].rstrip().endswith(tuple("-+*/×÷")):
                continue  # the end of a longer one, with an unknown in it
            counts["annotations"] += 1
            expression = match["expression"].replace("$", "")
            if consistent(expression, match["result"], counts) is not None:
                value = number(match["numeral"]) * (-1 if match["result"].startswith("-") else 1)
                written = Number(value, match.start("numeral"), match.end("numeral"))
                equations.append(Equation(operands_of(expression), written, max(begin, match.start())))
            begin = match.end()
        graph = link("rule:arith", prompt, response, equations, self.strict, counts)
        return Extraction(prompt, response, graph, counts)
