"""How many tokens a forward writes, and what the text is then worth: every setting of a sweep beside one token a step.

Quality is nats per token under the autoregressive parent, which repetitive text flatters: distinct n-grams and
repetition stand beside it. The parent's own text is a row like the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from hildanext.ar import Parent
from hildanext.bench.acceleration.cells import Turns, write_all
from hildanext.bench.acceleration.overhead import OverheadConfig, measure_overhead
from hildanext.bench.acceleration.prompts import beginnings
from hildanext.bench.acceleration.readings import record
from hildanext.bench.acceleration.sweeps import BASE, Sweep, default_sweeps, ways_of
from hildanext.bench.acceleration.ways import PARENT_WAY, Way, Writers
from hildanext.core.config import Seed, config, plain
from hildanext.core.errors import CheckpointError, ConfigError
from hildanext.core.registry import under_profile
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import RuntimeConfig
from hildanext.decoding import make_decoder
from hildanext.detokenization import Detokenizer
from hildanext.models.card import CARD, Fast, card_text, read_card
from hildanext.models.loading.loaded_model import LoadedModel
from hildanext.models.loading.names import locate_diffusion


@config
class FrontierConfig:
    """What is asked, and of which settings."""

    prompts: int = Field(default=32, ge=1)
    prompt_tokens: int = Field(default=16, ge=1)
    """Beginning of a document, BOS included; prompts of a file are taken as they are."""
    new_tokens: int = Field(default=64, ge=1)
    prompts_file: str | None = None
    """A line each, or JSON lines."""
    source: dict[str, Any] | None = None
    """A source of documents, as `prepare` reads them, whose beginnings are the prompts. Without it and a file: what
    the parent draws."""
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    """Of what is sampled; greedy settings write once."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    sweeps: dict[str, Sweep] = Field(default_factory=lambda: default_sweeps("SAFE"))
    """By name; under FULL the research rules are swept, too, where nothing is named."""
    modes: bool = True
    """S_MODE and Q_MODE beside them."""
    part: int = Field(default=4, ge=1)
    """Prompts of a turn."""
    batch: int = Field(default=1, ge=1)
    """Prompts that are written together, of the model and of the parent: what is written stays the same, what it takes
    is then that of a batch."""
    overhead: OverheadConfig = OverheadConfig()

    def __post_init__(self) -> None:
        if self.prompts_file is not None and self.source is not None:
            raise ConfigError("prompts_file and source are both given", "choose one")
        ways_of(self.sweeps, self.modes)


def measure(
    opened: LoadedModel,
    parent: Parent,
    runtime: RuntimeConfig,
    settings: FrontierConfig,
    folder: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """All settings on the same prompts, in turns with the parent.

    Raises `DataError` for prompts that are not there; what was measured lies in `folder`, where one is given.
    """
    asked = beginnings(
        opened.tokenizer, parent, settings.prompts, settings.prompt_tokens, settings.prompts_file, settings.source
    )
    ways = [_tempered(way, settings.temperature) for way in ways_of(settings.sweeps, settings.modes)]
    writers = Writers(opened, parent, runtime, settings.new_tokens, asked[0])
    facts = {"model": opened.name, "new_tokens": settings.new_tokens, "machine": opened.machine()}
    turns = Turns(asked, settings.seeds, settings.part, facts, folder, settings.batch)
    written = write_all([*ways, PARENT_WAY], writers.of, parent, turns, say)
    rows = [record(one, written[0], written[-1], settings.part) for one in written]
    for row in rows:
        row["samples"] = [Detokenizer(opened.tokenizer).text(ids) for ids in row["samples"]]
    return {
        "bench": "frontier",
        "card": plain(opened.card),
        "settings": plain(settings),
        "machine": opened.machine(),
        "prompt_tokens": [len(prompt) for prompt in asked],
        "rows": rows,
        "best": {name: best(rows, name) for name in (BASE, f"{BASE}, left")},
        "overhead": measure_overhead(opened.model, asked[0], settings.overhead) if settings.overhead.steps else None,
    }


def _tempered(way: Way, temperature: float) -> Way:
    section = dict(way.section) if way.section is not None else {}
    return replace(way, section={**section, "temperature": temperature}) if temperature > 0 else way


def best(rows: Sequence[Mapping[str, Any]], base: str) -> str | None:
    """The setting with the most tokens per forward whose nats are those of the row `base` or fewer, of equal ones the
    one with the fewest nats; None where there is no such row. A base is its own where no other is as good."""
    named = {row["name"]: row for row in rows}
    if base not in named:
        return None
    most = named[base]["nats"]["value"]
    good = [row for row in rows if row["decoder"] is not None and row["nats"]["value"] <= most]
    if not good:
        return None
    chosen = max(good, key=lambda row: (row["tokens_per_forward"]["value"], -row["nats"]["value"]))
    return str(chosen["name"])


def fast_of(result: Mapping[str, Any]) -> Fast:
    """What the frontier shows: of the settings that every profile may build, the best beside one token a step.

    Raises `ConfigError` where nothing is as good as that.
    """
    rows = [row for row in result["rows"] if row["decoder"] is not None and _is_safe(row["decoder"])]
    name = best(rows, BASE)
    if name is None:
        raise ConfigError("no setting has the nats of one token a step", "sweep others: bench.sweeps")
    row, base = (next(row for row in rows if row["name"] == one) for one in (name, BASE))
    settings = result["settings"]
    return Fast(
        decoder={knob: value for knob, value in row["decoder"].items() if knob != "temperature"},
        tokens_per_forward=row["tokens_per_forward"]["value"],
        nats=row["nats"]["value"],
        base_tokens_per_forward=base["tokens_per_forward"]["value"],
        base_nats=base["nats"]["value"],
        prompts=len(result["prompt_tokens"]),
        new_tokens=settings["new_tokens"],
    )


def _is_safe(section: Mapping[str, Any]) -> bool:
    try:
        with under_profile("SAFE"):
            make_decoder(section)
    except ConfigError:
        return False
    return True


def save(result: Mapping[str, Any], name: str) -> tuple[Path, Fast]:
    """Write what the frontier shows into the checkpoint's card; returns the file, and what was written.

    Raises `ConfigError` where there is nothing to write, `ModelError` and `CheckpointError` for a checkpoint that
    cannot be had, or be written to.
    """
    chosen = fast_of(result)
    folder = locate_diffusion(name)
    try:
        path = folder / CARD
        write_atomically(path, card_text(replace(read_card(folder), fast=chosen)))
    except PermissionError as problem:
        raise CheckpointError(f"cannot write {folder / CARD} ({problem.strerror})", "copy the checkpoint") from None
    return path, chosen
