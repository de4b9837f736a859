"""Causal graphs of examples: their format, what makes them, and the token pairs they mean.

To add an extractor: write the file, add its row, add its case.
"""

from hildanext.data.causal_graphs.base import Extraction, Extractor
from hildanext.data.causal_graphs.free_arithmetic import WrittenEquations
from hildanext.data.causal_graphs.graph import CausalGraph, read_graph
from hildanext.data.causal_graphs.gsm8k import AnnotatedAnswers
from hildanext.data.causal_graphs.teacher import TeacherRecords

EXTRACTORS: dict[str, type[Extractor]] = {
    "rule:gsm8k": AnnotatedAnswers,
    "rule:arith": WrittenEquations,
    "json:teacher": TeacherRecords,
}

__all__ = ["EXTRACTORS", "CausalGraph", "Extraction", "Extractor", "read_graph"]
