"""Tables of ways to write, from one list: every way once, on the same prompts, in turns with the parent.

A way that stands in several tables is written once. A row whose method, rule or runtime is not there stays in its table
with what is said about that, and so does one that is refused as its model is opened; any other mistake in a row is an
error before anything is measured.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from hildanext.ar import Parent
from hildanext.bench.acceleration.cells import Turns, Written, write_all
from hildanext.bench.acceleration.prompts import beginnings
from hildanext.bench.acceleration.readings import record
from hildanext.bench.acceleration.ways import PARENT_WAY, Way, Writers
from hildanext.core.config import Seed, config, plain
from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.runtime import QUANTIZED, RuntimeConfig
from hildanext.decoding import DECODERS, make_method
from hildanext.eval import summary
from hildanext.eval.generation import PARENT
from hildanext.eval.models import ModelPair
from hildanext.eval.runner import QualityConfig, as_taught, run_tasks
from hildanext.models.loading.loaded_model import LoadedModel
from hildanext.runtimes.onnx_session import load_onnxruntime

CELLS, SAMPLES = "cells", "tasks"
"""Folders of what is measured, in that of the tables."""


@config
class Row:
    """A way to write."""

    decoder: dict[str, Any]
    """A decoder's section, or exact mode's."""
    model: str | None = None
    """Another one than the tables are about: trained for the method; of exact mode, adapters or a parent."""
    runtime: str = "auto"
    """torch, or onnx."""
    dtype: str | None = None
    """None is the run's; of ONNX fp32, q8 or q4."""

    def way(self, name: str) -> Way:
        return Way(name, self.decoder, self.model, self.runtime, self.dtype)


@config
class TableOfWays:
    """Rows that are set beside its first one, or the one that is named."""

    title: str
    rows: dict[str, Row] = Field(min_length=1)
    base: str | None = None

    def __post_init__(self) -> None:
        if self.base is not None and self.base not in self.rows:
            raise ConfigError(f"the base {self.base!r} is no row of {self.title!r}", f"rows: {', '.join(self.rows)}")


@config
class AblationsConfig:
    """The tables, and what all ways are asked."""

    tables: dict[str, TableOfWays] = Field(min_length=1)
    prompts: int = Field(default=32, ge=1)
    prompt_tokens: int = Field(default=16, ge=1)
    new_tokens: int = Field(default=64, ge=1)
    prompts_file: str | None = None
    source: dict[str, Any] | None = None
    """These five as for a frontier."""
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    part: int = Field(default=4, ge=1)
    """Prompts of a turn, and of a file of what is measured."""
    batch: int = Field(default=1, ge=1)
    """Prompts that are written together, of the model and of the parent: what is written stays the same, what it takes
    is then that of a batch."""
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Benchmark tasks (`eval`), answered by every decoder in torch on the model itself, and by the parent."""
    limit: int | None = Field(default=None, ge=1)
    """Items of each task."""

    def __post_init__(self) -> None:
        if self.prompts_file is not None and self.source is not None:
            raise ConfigError("prompts_file and source are both given", "choose one")
        if self.tasks:
            QualityConfig(tasks=self.tasks, limit=self.limit)
        for _ in missing(self):  # raises for what is wrong and not missing
            pass


def missing(settings: AblationsConfig) -> Iterator[tuple[str, str, str]]:
    """Table and name of every row whose method is not there, and what is said of it.

    Raises `ConfigError` for a knob that a method does not have, and for a research method under SAFE.
    """
    for table, name, row in _rows(settings):
        try:
            make_method(row.decoder)
        except UnknownChoice as problem:
            yield table, name, str(problem)
            continue
        if row.runtime == "onnx" or row.dtype in QUANTIZED:
            try:
                load_onnxruntime()
            except ConfigError as problem:
                yield table, name, str(problem)


def _rows(settings: AblationsConfig) -> Iterator[tuple[str, str, Row]]:
    for table, own in settings.tables.items():
        for name, row in own.rows.items():
            yield table, name, row


def measure(
    opened: LoadedModel,
    parent: Parent,
    runtime: RuntimeConfig,
    settings: AblationsConfig,
    folder: Path,
    say: Callable[[str], None] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """All tables. What is in `folder` is not measured again. Raises `DataError` for prompts that are not there, and
    what opening a row's model raises."""
    absent = {(table, name): said for table, name, said in missing(settings)}
    for (table, name), said in absent.items():
        if say is not None:
            say(f"{table}, {name} is not there: {said}")
    asked = beginnings(
        opened.tokenizer, parent, settings.prompts, settings.prompt_tokens, settings.prompts_file, settings.source
    )
    ways: dict[str, Way] = {}
    for table, name, row in _rows(settings):
        if (table, name) not in absent:
            way = row.way(name)
            ways.setdefault(repr(way.identity()), way)
    writers = Writers(opened, parent, runtime, settings.new_tokens, asked[0])
    facts = {"model": opened.name, "new_tokens": settings.new_tokens, "machine": opened.machine()}
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    turns = Turns(asked, settings.seeds, settings.part, facts, folder / CELLS, settings.batch)
    written = write_all([*ways.values(), PARENT_WAY], writers.of, parent, turns, say, tolerant=True)
    by_way = dict(zip([*ways, PARENT], written, strict=True))
    for table, name, row in _rows(settings):
        refused = None if (table, name) in absent else by_way[repr(row.way(name).identity())].refused
        if refused is not None:
            absent[table, name] = refused
    return {
        "bench": "ablations",
        "card": plain(opened.card),
        "settings": plain(settings),
        "machine": opened.machine(),
        "prompt_tokens": [len(prompt) for prompt in asked],
        "tables": {
            name: _table(table, by_way, {row: said for (of, row), said in absent.items() if of == name}, settings)
            for name, table in settings.tables.items()
        },
        "tasks": _tasks(opened, parent, settings, list(ways.values()), folder, quiet) if settings.tasks else None,
    }


def _table(
    table: TableOfWays, by_way: Mapping[str, Written], absent: Mapping[str, str], settings: AblationsConfig
) -> dict[str, Any]:
    there = {name: by_way[repr(row.way(name).identity())] for name, row in table.rows.items() if name not in absent}
    name = table.base if table.base is not None else next(iter(table.rows))
    base, parent = there.get(name), by_way[PARENT]
    rows: list[dict[str, Any]] = [
        {"name": name, "missing": absent[name]}
        if name in absent
        else {**record(there[name], base, parent, settings.part), "name": name}
        for name in table.rows
    ]
    return {"title": table.title, "base": name, "rows": [*rows, record(parent, base, parent, settings.part)]}


def _tasks(
    opened: LoadedModel,
    parent: Parent,
    settings: AblationsConfig,
    ways: list[Way],
    folder: Path,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Scores of every decoder that writes with the model itself, in torch."""
    own = {
        way.name: dict(way.section)
        for way in ways
        if way.section is not None and way.section["name"] in DECODERS
        and (way.model, way.runtime, way.dtype) == (None, "auto", None)
    }  # fmt: skip
    pair = ModelPair(opened.model, opened.tokenizer, parent)
    quality = QualityConfig(tasks=settings.tasks, decoders=own, limit=settings.limit, seed=settings.seeds[0])
    tasks: list[dict[str, Any]] = summary.summarise(run_tasks(pair, as_taught(quality, pair), folder / SAMPLES, quiet))[
        "tasks"
    ]
    return tasks
