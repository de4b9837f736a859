"""Which masks a forward fills. To add one: write the file, add its row, add its case; the knob `reveal` of
`decoding.threshold_edit` names it.

A rule fills masks and nothing else: editing, sampling and the end of a block are the decoder's, the same with every
rule. Where a rule fills nothing, the decoder's `fallback` fills one mask.
"""

from typing import Any

from pydantic import TypeAdapter

from hildanext.decoding.reveal.base import Facts, Reveal
from hildanext.decoding.reveal.card import Card
from hildanext.decoding.reveal.credit import Credit
from hildanext.decoding.reveal.entropy_bound import EntropyBound
from hildanext.decoding.reveal.factor import Factor
from hildanext.decoding.reveal.hierarchical import Hierarchical
from hildanext.decoding.reveal.klass import Klass
from hildanext.decoding.reveal.threshold import Threshold

REVEALS: dict[str, type[Reveal]] = {
    "threshold": Threshold,
    "factor": Factor,
    "entropy_bound": EntropyBound,
    "klass": Klass,
    "credit": Credit,
    "hierarchical": Hierarchical,
    "card": Card,
}


def section_schema() -> dict[str, Any]:
    """JSON Schema of what names a rule: its name, or a section; null is the threshold."""
    members: dict[str, Any] = dict(REVEALS)
    sections = []
    for name, cls in members.items():
        schema = TypeAdapter(cls).json_schema()
        knobs = {"name": {"const": name, "type": "string"}, **schema.get("properties", {})}
        summary = " ".join((cls.__doc__ or name).strip().partition("\n\n")[0].split())
        sections.append({**schema, "title": name, "description": summary, "properties": knobs, "required": ["name"]})
    return {"anyOf": [{"enum": list(REVEALS), "type": "string"}, *sections, {"type": "null"}]}


__all__ = ["REVEALS", "Facts", "Reveal", "Threshold", "section_schema"]
