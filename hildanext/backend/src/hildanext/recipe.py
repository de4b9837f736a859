"""A run's stages, in order, resumable. It knows no stage: each is a module found by name in a table it is handed.

A stage that finished leaves a marker with the hash of its resolved section and of the stages before it; the next
run skips it while that hash stands. A stage whose section changed starts anew; its old folder is kept beside it.
"""

import hashlib
import importlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hildanext.core.config import Seed, config, merge, plain, validate
from hildanext.core.errors import CheckpointError, ConfigError, DataError, TrainingStopped, UnknownChoice
from hildanext.core.json_text import BadJson, as_read_back, parse
from hildanext.core.metrics_log import finite, to_json
from hildanext.core.registry import under_profile
from hildanext.core.run_dir import open_run, read_run, write_atomically
from hildanext.core.runtime import RuntimeConfig, is_main_process, versions

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BESIDES = ("serve", "graphs")
"""Sections of a run's file that no stage reads: of `hildanext serve` and of `hildanext prepare --graphs`."""

EMBEDDED_PARENT = "tiny"
"""The autoregressive model of a run that names none."""

WAIT_SECONDS = 0.2
"""Between two looks of a process at what the first one has done."""


@config
class RunConfig:
    """What all stages of a run share."""

    folder: str = ""
    """Where everything of the run goes. A verb's `--out` stands in its place."""
    name: str = ""
    profile: Literal["SAFE", "FULL"] = "SAFE"
    seed: Seed = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    runtime: Literal["auto", "torch", "onnx"] = "auto"
    """What computes a model that writes: torch, or ONNX Runtime (exact mode, on the CPU)."""
    parent: str | None = None
    """The autoregressive model: a name, a folder, a hub id or a GGUF file. None: of a model that is there already the
    one that its card names, of a conversion the embedded one."""

    @property
    def start(self) -> str:
        """The autoregressive model that a conversion starts from."""
        return self.parent if self.parent is not None else EMBEDDED_PARENT


@dataclass(frozen=True)
class StageContext:
    """What a stage knows of its run. A key of its section wins over the one of that name here."""

    folder: Path
    key: str
    profile: str = "SAFE"
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    runtime: str = "auto"
    parent: str | None = None
    name: str = ""
    outcomes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the stages before this one returned, by key."""
    alone: bool = False
    """A verb's: the stage is all there is, and `folder` its own."""
    quiet: bool = False
    """Show no progress."""

    @property
    def stage_dir(self) -> Path:
        """The folder this stage writes into."""
        return self.folder if self.alone else self.folder / self.key

    @property
    def start(self) -> str:
        """The autoregressive model that a conversion starts from."""
        return self.parent if self.parent is not None else EMBEDDED_PARENT

    def training(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """The section of a stage that trains, over the run's seed, device and dtype."""
        below = {"seed": self.seed, "device": self.device, "train": {"precision": self.precision}}
        return merge(below, section)

    @property
    def precision(self) -> str:
        """The dtype as a training has it, whose weights are fp32 and whose steps autocast."""
        return "no" if self.dtype == "fp32" else self.dtype

    def open_device(self) -> "tuple[torch.device, torch.dtype]":
        """Where the stage computes, and in what; from here on with the run's threads."""
        runtime = self.runtime_config.resolve()
        return runtime.device, runtime.dtype

    @property
    def runtime_config(self) -> RuntimeConfig:
        """What `LoadedModel.open` takes."""
        return RuntimeConfig(self.device, self.dtype, self.threads, self.runtime)

    def outcome(self, name: str) -> Any:
        """The latest value of that name among earlier outcomes. Raises `ConfigError` where no stage gave one."""
        for outcome in reversed(list(self.outcomes.values())):
            if name in outcome:
                return outcome[name]
        raise ConfigError(f"stage {self.key!r} needs {name!r}", "no earlier stage made one; name it in the section")


@dataclass(frozen=True)
class Step:
    """One stage of a run with its resolved section."""

    key: str
    stage: str
    section: dict[str, Any]
    fingerprint: str


Table = Mapping[str, str]
"""Stage name to the module that holds `check(section, context)` and `stage(section, context) -> outcome`, and
maybe `READS`: names of further sections of the run that become part of the stage's own; and `TOGETHER` = True where
several processes do the stage together. Any other stage is the first one's work, for which the others wait."""
Fold = Callable[[dict[str, Any]], dict[str, Any]]
Announce = Callable[[Step, str], None]
"""Told of each step: "done", "start" or "finished"."""


def read_recipe(run: Mapping[str, Any], table: Table) -> tuple[RunConfig, list[Step]]:
    """The shared knobs and the steps of a run.

    Raises `ConfigError` for unknown sections, wrong types and repeated keys.
    """
    entries, shared = _entries(run, table), read_shared(run, table)
    if "folder" not in run:
        raise ConfigError("the run has no folder", 'give "folder": where everything of it goes')
    steps: list[Step] = []
    before = ""
    for key, stage, overrides in entries:
        section = _resolved(run, table, stage, overrides)
        before = fingerprint(shared, stage, section, before)
        steps.append(Step(key, stage, section, before))
    return shared, steps


def read_shared(run: Mapping[str, Any], table: Table) -> RunConfig:
    """What all doors read of a run. Raises `ConfigError` for a key that is none of its sections' and knobs' names."""
    sections = {"stages", *BESIDES, *table, *(name for stage in table for name in _reads(table, stage))}
    own = {key: value for key, value in run.items() if key not in sections}
    return validate(RunConfig, own, where="run", besides=sections)


def read_stage(run: Mapping[str, Any], stage: str, table: Table, fold: Fold | None = None) -> tuple[RunConfig, Step]:
    """The shared knobs of a run and one stage of it, as if there were no other; `fold` gives its section with a verb's
    flags in it.

    Of a run with `stages` it is the entry of that name. Raises `ConfigError` as `read_recipe`, and where several
    entries could be meant.
    """
    shared = read_shared(run, table)
    listed = [entry for entry in _entries(run, table) if entry[1] == stage] if "stages" in run else []
    named = [entry for entry in listed if entry[0] == stage] or listed
    if len(named) > 1:
        keys = ", ".join(key for key, _, _ in named)
        raise ConfigError(f"the run has several stages {stage!r}: {keys}", "run it whole with hildanext run")
    _, _, overrides = named[0] if named else (stage, stage, {})
    section = _resolved(run, table, stage, overrides)
    section = section if fold is None else fold(section)
    return shared, Step(stage, stage, section, fingerprint(shared, stage, section, ""))


def open_stage(
    run: Mapping[str, Any],
    stage: str,
    table: Table,
    fold: Fold | None = None,
    out: str | Path = "",
    quiet: bool = False,
) -> tuple[dict[str, Any], StageContext]:
    """One stage of a run as a verb does it, checked: its section, and what `stage(section, context)` is called with.

    `out` is the stage's folder; what stages that are done left in the run's own `folder` may be read. Raises as
    `read_stage` and `check`.
    """
    shared, step = read_stage(run, stage, table, fold)
    earlier = finished(shared.folder) if shared.folder and read_run(shared.folder) is not None else {}
    context = replace(_context(shared, stage, earlier), folder=Path(out), alone=True, quiet=quiet)
    with under_profile(shared.profile, stage):
        _module(table, stage).check(dict(step.section), context)
    return step.section, context


def run_stage(section: Mapping[str, Any], context: StageContext, table: Table) -> dict[str, Any]:
    """Do what `open_stage` opened; returns the outcome. One that `train.stop_after` ended is no error here."""
    with under_profile(context.profile, context.key):
        outcome: dict[str, Any] = _module(table, context.key).stage(dict(section), context)
    return outcome


def check(run: Mapping[str, Any], table: Table) -> list[Step]:
    """Build every section but the weights. Raises the `HildaError` of the first one that does not hold."""
    return _checked(run, table)[1]


def _checked(run: Mapping[str, Any], table: Table) -> tuple[RunConfig, list[Step], list[str]]:
    """The run's knobs, its steps, and the names of the research members it builds."""
    shared, steps = read_recipe(run, table)
    full: set[str] = set()
    for step in steps:
        with under_profile(shared.profile, step.key) as research:
            _module(table, step.stage).check(dict(step.section), _context(shared, step.key, {}))
        full |= research
    return shared, steps, sorted(full)


def execute(run: Mapping[str, Any], table: Table, announce: Announce | None = None) -> dict[str, dict[str, Any]]:
    """Check the run, then do each stage that is not done. Returns the outcomes by key.

    Stopped at any instant it can be called again; what is done is not done twice. Several processes (which see one
    disk) may call it: the first one writes and announces.
    """
    tell = announce if announce is not None else _log
    shared, steps, full = _checked(run, table)
    extra = {"versions": versions(), "stages": _listed(steps), "full": full}
    if not is_main_process():
        return _follow(shared, steps, table)
    folder = open_run(shared.folder, dict(run), shared.seed, extra)
    outcomes: dict[str, dict[str, Any]] = {}
    for step in steps:
        marker = _read_marker(folder, step.key, "done")
        if marker.get("fingerprint") == step.fingerprint:
            outcomes[step.key] = marker["outcome"]
            tell(step, "done")
            continue
        _begin(folder, step)
        tell(step, "start")
        begun = time.perf_counter()
        outcome = _do(shared, step, table, outcomes)
        outcomes[step.key] = as_read_back(finite(outcome))  # as a resumed run will read it
        _write_marker(folder, step, "done", outcome=outcomes[step.key], seconds=time.perf_counter() - begun)
        tell(step, "finished")
    return outcomes


def finished(folder: str | Path) -> dict[str, dict[str, Any]]:
    """What the finished stages of a run returned, by key, in order. Raises `DataError` where the folder is no run's."""
    record = read_run(folder)
    if record is None:
        raise DataError(f"{str(folder)!r} is no run's folder", "name one that hildanext run or a job has made")
    keys = [str(step["key"]) for step in record.get("stages", [])]
    markers = {key: _read_marker(Path(folder), key, "done") for key in keys}
    return {key: marker["outcome"] for key, marker in markers.items() if "outcome" in marker}


def _follow(shared: RunConfig, steps: Sequence[Step], table: Table) -> dict[str, dict[str, Any]]:
    """What a process beside the first one does: its part of the stages done together, and wait for the rest."""
    outcomes: dict[str, dict[str, Any]] = {}
    for step in steps:
        done = _read_marker(Path(shared.folder), step.key, "done").get("fingerprint") == step.fingerprint
        module = _module(table, step.stage)
        if getattr(module, "TOGETHER", False) and not done:
            _do(shared, step, table, outcomes)
        while (marker := _read_marker(Path(shared.folder), step.key, "done")).get("fingerprint") != step.fingerprint:
            time.sleep(WAIT_SECONDS)
        outcomes[step.key] = marker["outcome"]
    return outcomes


def _do(shared: RunConfig, step: Step, table: Table, outcomes: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    with under_profile(shared.profile, step.key):
        outcome: Mapping[str, Any] = _module(table, step.stage).stage(
            dict(step.section), _context(shared, step.key, outcomes)
        )
    if outcome.get("whole") is False:
        raise TrainingStopped(f"{step.key} stopped before its end", "run again without train.stop_after")
    return outcome


def fingerprint(shared: RunConfig, stage: str, section: Mapping[str, Any], before: str) -> str:
    """Hash of what decides a stage's result: its section, the shared choices that change numbers, the stages before."""
    knobs = {**plain(shared), "parent": shared.start}
    choices = {key: knobs[key] for key in ("profile", "seed", "dtype", "parent")}
    text = json.dumps([stage, section, choices, before], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _entries(run: Mapping[str, Any], table: Table) -> list[tuple[str, str, dict[str, Any]]]:
    """Key, stage and overrides of each entry of `stages`."""
    if not isinstance(run.get("stages"), list) or not run["stages"]:
        raise ConfigError("the run has no stages", f'give "stages": [{{"stage": ...}}], of {", ".join(table)}')
    entries = [_entry(entry, table) for entry in run["stages"]]
    keys = [key for key, _, _ in entries]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ConfigError(f"stages repeat {', '.join(repeated)}", 'give each its own name: {"stage": ..., "as": ...}')
    return entries


def _resolved(run: Mapping[str, Any], table: Table, stage: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that a stage reads of the run, its own one over them, the overrides of its entry on top."""
    read = {name: dict(section_of(run, name)) for name in _reads(table, stage) if name in run}
    return merge(merge(read, section_of(run, stage)), overrides)


def _reads(table: Table, stage: str) -> tuple[str, ...]:
    return tuple(getattr(_module(table, stage), "READS", ()))


def _entry(entry: Any, table: Table) -> tuple[str, str, dict[str, Any]]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("stage"), str):
        raise ConfigError(f"stage {entry!r}", 'write {"stage": "<name>", ...overrides}')
    overrides = dict(entry)
    stage = overrides.pop("stage")
    if stage not in table:
        raise UnknownChoice("stage", stage, table)
    key = overrides.pop("as", stage)
    if not isinstance(key, str) or not key.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"stage {stage!r} is named {key!r}", "use letters, digits, - and _")
    return key, stage, overrides


def section_of(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a run, empty where there is none. Raises `ConfigError` for what is no object."""
    section = run.get(name, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"section {name!r} holds {type(section).__name__}", "a section is a JSON object")
    return section


def _module(table: Table, stage: str) -> Any:
    return importlib.import_module(table[stage])


def _context(shared: RunConfig, key: str, outcomes: Mapping[str, Mapping[str, Any]]) -> StageContext:
    knobs = {name: value for name, value in vars(shared).items() if name != "folder"}
    return StageContext(Path(shared.folder), key, outcomes=dict(outcomes), **knobs)


def _begin(folder: Path, step: Step) -> None:
    """Note that the step began; what another configuration of it left is put aside, never deleted."""
    started = _read_marker(folder, step.key, "started").get("fingerprint", step.fingerprint)
    stage_dir = folder / step.key
    if started != step.fingerprint and stage_dir.exists():
        aside = folder / f"{step.key}.before-{started[:8]}"
        count = 1
        while aside.exists():
            count += 1
            aside = folder / f"{step.key}.before-{started[:8]}-{count}"
        stage_dir.rename(aside)
        logger.info("the configuration of %s changed: its old folder is now %s", step.key, aside)
    _write_marker(folder, step, "started")


def _marker(folder: Path, key: str, kind: str) -> Path:
    return folder / "stages" / f"{key}.{kind}.json"


def _read_marker(folder: Path, key: str, kind: str) -> dict[str, Any]:
    path = _marker(folder, key, kind)
    if not path.exists():
        return {}
    try:
        value = parse(path.read_bytes(), allow_nan=True, allow_duplicates=True)
    except BadJson:
        raise CheckpointError(f"marker {str(path)!r} is broken", "delete it to do the stage again") from None
    return value if isinstance(value, dict) else {}


def _write_marker(folder: Path, step: Step, kind: str, **more: Any) -> None:
    record = {"stage": step.stage, "fingerprint": step.fingerprint, **more}
    write_atomically(_marker(folder, step.key, kind), to_json(record, indent=2) + "\n")


def _listed(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [{"key": step.key, "stage": step.stage, "fingerprint": step.fingerprint} for step in steps]


def _log(step: Step, event: str) -> None:
    logger.info("%s: %s", step.key, event)
