"""A file of examples to a file of examples with graphs, and what was met on the way."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from hildanext.core.errors import DataError
from hildanext.core.json_text import BadJson, parse
from hildanext.core.run_dir import disk_errors, write_atomically
from hildanext.data.causal_graphs.base import Extractor
from hildanext.data.causal_graphs.graph import CausalGraph, read_graph
from hildanext.data.json_records import JsonRecords
from hildanext.data.sources import Document, Report
from hildanext.data.sources.base import read_record

GRAPHS = "graphs.jsonl"
STATISTICS = "statistics.json"


class GraphExample(NamedTuple):
    """One line of a file of graphs."""

    id: str
    prompt: str
    response: str
    graph: CausalGraph | None


def write_graphs(path: str | tuple[str, ...], extractor: Extractor, out: str | Path) -> dict[str, Any]:
    """Extract the graph of every example of `path` and write `{"id", "prompt", "response", "causal_graph"}` lines.

    `out` is a folder (the file is then `graphs.jsonl`) or a `.jsonl` file; the counts lie beside it. An id that the
    record lacks is made of folder, file and line: `gsm8k-train-0`. Records that are no example are counted and
    listed. Returns the statistics. Raises `DataError` where there is no example at all.
    """
    target = Path(out) if str(out).endswith(".jsonl") else Path(out) / GRAPHS
    report, counts = Report(), Counter[str]()

    def lines() -> Iterator[str]:
        for file in JsonRecords(path=path).files():
            name = f"{file.resolve().parent.name}-{file.name.split('.')[0]}"
            for number, document in enumerate(JsonRecords(path=str(file)).documents(report=report)):
                line = _extracted(document, extractor, f"{name}-{number}", counts, report)
                if line is not None:
                    yield line

    written = _write_lines(target, lines(), report)
    counts["records refused"] = report.total
    statistics = {"file": target.name, "examples": written, "counts": dict(counts), "refused": report.snapshot()}
    beside = target.with_name(STATISTICS if target.name == GRAPHS else f"{target.stem}.{STATISTICS}")
    write_atomically(beside, json.dumps(statistics, indent=2) + "\n")
    return {**statistics, "file": str(target)}


def read_example(value: Any, where: str) -> GraphExample:
    """An example of a file of graphs, checked. Raises `DataError` with the place for anything that does not hold."""
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("prompt", "response")):
        raise DataError(f"{where} is no example", 'it needs "prompt" and "response", both strings')
    fields = {"prompt": value["prompt"], "response": value["response"]}
    stored = value.get("causal_graph")
    graph = None if stored is None else read_graph(stored, fields, f"{where}: causal_graph")
    return GraphExample(str(value.get("id", where)), graph=graph, **fields)


def find_example(path: str | Path, identity: str | None) -> GraphExample:
    """The example with id `identity`, or the first one with a graph. Raises `DataError` where there is none."""
    report = Report()
    for document in JsonRecords(path=str(path)).documents(report=report):
        try:
            value = parse(document.text, allow_nan=True)
        except BadJson as problem:
            raise DataError(f"{document.id}: {problem}", "a file of graphs holds one JSON object a line") from None
        name = str(value.get("id", document.id)) if isinstance(value, dict) else document.id
        has_graph = isinstance(value, dict) and value.get("causal_graph") is not None
        if has_graph if identity is None else name == identity:
            return read_example(value, document.id)
    looked = f"with id {identity!r}" if identity is not None else "with a graph"
    raise DataError(f"no example {looked} in {str(path)!r}", "hildanext prepare --graphs rule:gsm8k writes them")


def _extracted(document: Document, extractor: Extractor, name: str, counts: Counter[str], report: Report) -> str | None:
    """The line of one record; None (counted in the report) where it is no example."""
    record = read_record(document.text, document.id, report)
    if record is None:
        return None
    try:
        extraction = extractor.extract(record.value)
    except DataError as problem:
        report.bad(problem.message, document.id)
        return None
    counts.update(extraction.counts)
    counts["graphs"] += extraction.graph is not None
    graph = extraction.graph.to_json() if extraction.graph is not None else None
    identity = record.value.get("id", name)
    example = {"id": str(identity), "prompt": extraction.prompt, "response": extraction.response, "causal_graph": graph}
    return json.dumps(example, ensure_ascii=False)


def _write_lines(target: Path, lines: Iterator[str], report: Report) -> int:
    """Write lines under another name, fsync, rename; the number of lines. Raises `DataError` for none, and then
    nothing is there."""
    fresh = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    first, count = next(lines, None), 0
    if first is None:
        raise DataError(f"no example could be read ({report.summary()})", _HINT)
    with disk_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with fresh.open("w", encoding="utf-8", newline="\n") as file:
                for line in chain([first], lines):
                    file.write(line + "\n")
                    count += 1
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)
    return count


_HINT = "give JSONL with prompt and response, or GSM8K's question and answer"
