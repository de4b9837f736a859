"""An extractor: one example in, its texts as trained and a causal graph out, and what was counted on the way."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.data.causal_graphs.graph import CausalGraph

FIELDS = (("prompt", "response"), ("question", "answer"))
"""Names of the two texts of an example; the second pair is GSM8K's."""


@dataclass(frozen=True)
class Extraction:
    """The example as it is to be trained, with its graph; None where there is nothing to link."""

    prompt: str
    response: str
    graph: CausalGraph | None
    counts: Counter[str] = field(default_factory=Counter)
    """What was met; the names are those of `statistics.ROWS`."""


@config
class Extractor:
    """Makes causal graphs out of examples, without a model."""

    strict: bool = False
    """Leave out edges whose cause is one of several nodes with the same value."""

    def extract(self, record: Mapping[str, Any]) -> Extraction:
        """The example of a record. Raises `DataError` for a record that is no example."""
        raise NotImplementedError


def texts(record: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and response of a record. Raises `DataError` where they are missing or not text."""
    if not isinstance(record, Mapping):
        raise DataError(f"an example is {type(record).__name__}", "an example is a JSON object")
    for names in FIELDS:
        if all(name in record for name in names):
            values = [record[name] for name in names]
            wrong = [name for name, text in zip(names, values, strict=True) if not isinstance(text, str)]
            if wrong:
                raise DataError(f"{wrong[0]!r} is no string", "both texts of an example are strings")
            return values[0], values[1]
    raise DataError("an example has no texts", "it needs prompt and response, or question and answer")
