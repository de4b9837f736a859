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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hildanext.core.config import Seed, config, merge, plain, validate
from hildanext.core.errors import CheckpointError, ConfigError, DataError, UnknownChoice
from hildanext.core.registry import under_profile
from hildanext.core.run_dir import open_run, read_run, write_atomically
from hildanext.core.runtime import RuntimeConfig, is_main_process, versions

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BESIDES = ("serve",)
"""Sections of a run's file that are no stage's: what its models are served with (`hildanext serve` checks it)."""

WAIT_SECONDS = 0.2
"""Between two looks of a process at what the first one has done."""


@config
class RunConfig:
    """What all stages of a run share."""

    folder: str
    """Where everything of the run goes."""
    name: str = ""
    profile: Literal["SAFE", "FULL"] = "SAFE"
    seed: Seed = Field(default=0, ge=0)
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    parent: str = "tiny"
    """The autoregressive model: a name, a folder, a hub id or a GGUF file."""


@dataclass(frozen=True)
class StageContext:
    """What a stage knows of its run."""

    folder: Path
    key: str
    profile: str = "SAFE"
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    parent: str = "tiny"
    outcomes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the stages before this one returned, by key."""

    @property
    def stage_dir(self) -> Path:
        """The folder this stage writes into."""
        return self.folder / self.key

    def open_device(self) -> "tuple[torch.device, torch.dtype]":
        """Where the stage computes, and in what; from here on with the run's threads."""
        runtime = self.runtime.resolve()
        return runtime.device, runtime.dtype

    @property
    def runtime(self) -> RuntimeConfig:
        """What `LoadedModel.open` takes."""
        return RuntimeConfig(self.device, self.dtype, self.threads)

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
Announce = Callable[[Step, str], None]
"""Told of each step: "done", "start" or "finished"."""


def read_recipe(run: Mapping[str, Any], table: Table) -> tuple[RunConfig, list[Step]]:
    """The shared knobs and the steps of a run.

    Raises `ConfigError` for unknown sections, wrong types and repeated keys.
    """
    if not isinstance(run.get("stages"), list) or not run["stages"]:
        raise ConfigError("the run has no stages", f'give "stages": [{{"stage": ...}}], of {", ".join(table)}')
    entries = [_entry(entry, table) for entry in run["stages"]]
    keys = [key for key, _, _ in entries]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ConfigError(f"stages repeat {', '.join(repeated)}", 'give each its own name: {"stage": ..., "as": ...}')
    read = {stage: tuple(getattr(_module(table, stage), "READS", ())) for stage in table}
    sections = {"stages", *BESIDES, *table, *(name for names in read.values() for name in names)}
    shared = validate(RunConfig, {key: value for key, value in run.items() if key not in sections}, where="run")
    steps: list[Step] = []
    before = ""
    for key, stage, overrides in entries:
        section = merge({**_section(run, stage), **{name: _section(run, name) for name in read[stage]}}, overrides)
        before = fingerprint(shared, stage, section, before)
        steps.append(Step(key, stage, section, before))
    return shared, steps


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
        outcomes[step.key] = json.loads(json.dumps(outcome, default=str))  # as a resumed run will read it
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
    return outcome


def fingerprint(shared: RunConfig, stage: str, section: Mapping[str, Any], before: str) -> str:
    """Hash of what decides a stage's result: its section, the shared choices that change numbers, the stages before."""
    choices = {key: value for key, value in plain(shared).items() if key in ("profile", "seed", "dtype", "parent")}
    text = json.dumps([stage, section, choices, before], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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


def _section(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = run.get(name, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"section {name!r} holds {type(section).__name__}", "a section is a JSON object")
    return section


def _module(table: Table, stage: str) -> Any:
    return importlib.import_module(table[stage])


def _context(shared: RunConfig, key: str, outcomes: Mapping[str, Mapping[str, Any]]) -> StageContext:
    knobs = {name: getattr(shared, name) for name in ("profile", "seed", "device", "dtype", "threads", "parent")}
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
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"marker {str(path)!r} is broken", "delete it to do the stage again") from None
    return value if isinstance(value, dict) else {}


def _write_marker(folder: Path, step: Step, kind: str, **more: Any) -> None:
    record = {"stage": step.stage, "fingerprint": step.fingerprint, **more}
    write_atomically(_marker(folder, step.key, kind), json.dumps(record, indent=2, default=str) + "\n")


def _listed(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [{"key": step.key, "stage": step.stage, "fingerprint": step.fingerprint} for step in steps]


def _log(step: Step, event: str) -> None:
    logger.info("%s: %s", step.key, event)
