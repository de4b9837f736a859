"""What is continued: beginnings of documents of a source, lines of a file, or what the parent itself begins with."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from hildanext.ar import Parent, sample_documents
from hildanext.core.errors import DataError
from hildanext.core.registry import build
from hildanext.data.prompts import read_prompts
from hildanext.data.sources import SOURCES
from hildanext.tokenization import begin_document, encode_prompt


def beginnings(
    tokenizer: Any, parent: Parent, count: int, length: int, file: str | None, source: Mapping[str, Any] | None
) -> list[list[int]]:
    """`count` prompts of `length` tokens, of shorter documents all but their last ones; those of a file as they are.

    Raises `DataError` where there are fewer.
    """
    if file is not None:
        texts = (prompt.text if prompt.text is not None else prompt.messages[-1][1] for prompt in read_prompts(file))
        found = [encode_prompt(tokenizer, text) for text in islice(texts, count)]
    else:
        found = list(islice((ids[:length] for ids in _documents(tokenizer, parent, count, source, length)), count))
    if len(found) < count:
        where = f"{file!r}" if file is not None else f"the source {dict(source or {})}"
        raise DataError(f"{where} has {len(found)} prompts and {count} are asked for", f"ask for {len(found)}")
    return found


def _documents(
    tokenizer: Any, parent: Parent, count: int, source: Mapping[str, Any] | None, length: int
) -> Iterator[list[int]]:
    if source is None:
        for ids in sample_documents(parent, count, length):
            yield begin_document(tokenizer, ids)
        return
    for document in build("data.source", SOURCES, source).documents():
        ids = encode_prompt(tokenizer, document.text)
        if len(ids) >= length:
            yield ids
