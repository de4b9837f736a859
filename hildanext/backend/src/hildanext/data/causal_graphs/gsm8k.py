"""GSM8K's own annotations: `48/2 = <<48/2=24>>24` names expression and result of every computed number."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hildanext.core.config import config
from hildanext.data.causal_graphs.base import Extraction, Extractor, texts
from hildanext.data.causal_graphs.equations import Equation, consistent, link, operands_of, without_annotations
from hildanext.data.causal_graphs.numbers import NUMERAL, Number


@config
class AnnotatedAnswers(Extractor):
    """Operands of each annotation, linked by exact value; the response is the answer without its annotations.

    Paper: GSM8K, arXiv:2110.14168 (the annotations); C2DLM, arXiv:2511.22146 (causal graphs of a response).
    Differs: C2DLM's graphs come from a teacher model; these come from the annotations, at no cost.
    """

    def extract(self, record: Mapping[str, Any]) -> Extraction:
        prompt, answer = texts(record)
        response, annotations = without_annotations(answer)
        counts: Counter[str] = Counter(examples=1, annotations=len(annotations))
        equations = []
        begin = 0
        for expression, result, place in annotations:
            value = consistent(expression, result, counts)
            sign = len(response[place:]) - len(response[place:].lstrip(" $-"))
            match = NUMERAL.match(response, place + sign)
            if match is None:
                counts["results not written"] += value is not None
            elif value is not None:
                written = Number(value, match.start(), match.end())
                equations.append(Equation(operands_of(expression), written, begin))
            begin = match.end() if match is not None else place
        graph = link("rule:gsm8k", prompt, response, equations, self.strict, counts)
        return Extraction(prompt, response, graph, counts)
