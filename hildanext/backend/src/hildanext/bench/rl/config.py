"""What is compared: methods and controls, each a section `rl`, from one start under one budget."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from hildanext.core.config import Seed, config, merge
from hildanext.core.errors import ConfigError
from hildanext.rl.config import RlConfig
from hildanext.rl_stage2 import check

FOLDER_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,63}")
START = "start"
"""Name of the control that measures the start alone."""


@config
class Controls:
    """What a gain must be compared with."""

    shuffled: tuple[str, ...] | None = None
    """Methods that run once more with every group's rewards dealt out anew; None: the first one."""
    no_update: bool = True
    """The start, measured once: step 0 of a run that is there anyway."""
    raft: bool = False
    """Fine-tuning on the successes, at the same budget. A FULL method."""
    parent: str | None = None
    """A checkpoint of alignment `parent` with blocks of 1, which is its autoregressive parent: `just_grpo` from left to
    right is then GRPO of that. A FULL method."""


@dataclass(frozen=True)
class Contender:
    """A method or a control."""

    name: str
    control: bool
    section: Mapping[str, Any]
    """Its section `rl`, but for seed and start."""
    start: str | None
    """Its own start; None: that of all."""
    rate_of: str
    """Whose learning rate it takes, where a grid chooses them."""


@config
class RlComparisonConfig:
    """Methods x seeds. A run's section is `shared`, over it the method's, its seed and the start."""

    start: str | None = None
    """A diffusion checkpoint. None: the model of `bench`."""
    shared: dict[str, Any] = Field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"espo": {"objective": {"name": "espo"}}})
    """Sections `rl` by name. One that names a `model` starts from there."""
    controls: Controls = Controls()
    seeds: tuple[Seed, ...] = (1, 2, 3)
    grid: tuple[float, ...] = ()
    """Learning rates that each method is tried with first, on `grid_seeds`; the best of them is then its own."""
    grid_seeds: tuple[Seed, ...] = ()
    """Seeds of which nothing is reported but what was chosen."""
    grid_shared: dict[str, Any] = Field(default_factory=dict)
    """Over a run's section while the grid is tried, such as fewer rounds."""
    jobs: int = Field(default=1, ge=1)
    """Runs at a time, each a process of `threads_each` threads."""
    threads_each: int = Field(default=1, ge=1)

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("bench rl has no methods", 'give "methods": {"espo": {"objective": {"name": "espo"}}}')
        if not self.seeds:
            raise ConfigError("bench rl has no seeds", 'give "seeds": [1, 2, 3]')
        twice = set(self.seeds) & set(self.grid_seeds)
        if twice:
            raise ConfigError(
                f"seed {min(twice)} is both reported and of the grid", "choose rates on seeds that are not reported"
            )
        if bool(self.grid) != bool(self.grid_seeds):
            have, lack = ("grid", "grid_seeds") if self.grid else ("grid_seeds", "grid")
            raise ConfigError(f"bench rl has {have} and no {lack}", "give both or neither")
        for name in self.controls.shuffled or ():
            if name not in self.methods:
                raise ConfigError(
                    f"no method {name!r} to shuffle the rewards of", f"methods: {', '.join(self.methods)}"
                )
        self._check_sections()

    def _check_sections(self) -> None:
        """Build every section, and hold all to one budget."""
        names, budgets = set(), {}
        for one in self.contenders():
            if not FOLDER_NAME.fullmatch(one.name) or one.name == START or one.name in names:
                raise ConfigError(
                    f"a method named {one.name!r}", "take another name, of small letters, digits, and - _ . +"
                )
            names.add(one.name)
            built, _ = _built(one.section)
            for rate in self.grid:
                _built(self.grid_section(one.section, rate))
            budgets[one.name] = (built.rounds * built.problems_per_round * built.group, built.measure)
        first, wanted = next(iter(budgets.items()))
        for name, budget in budgets.items():
            if budget[0] != wanted[0]:
                raise ConfigError(
                    f"{name} has {budget[0]} rollouts and {first} has {wanted[0]}",
                    "give all the same rounds x problems_per_round x group",
                )
            if budget[1] != wanted[1]:
                raise ConfigError(f"{name} is measured otherwise than {first}", "give measure in shared alone")

    @staticmethod
    def usual() -> dict[str, Any]:
        """What is shared where nothing is said."""
        return {}

    def contenders(self) -> Iterator[Contender]:
        """Methods, then controls that run."""
        for name, over in self.methods.items():
            own = {key: value for key, value in over.items() if key != "model"}
            yield Contender(name, False, merge(self.shared, own), over.get("model"), name)
        shuffled = self.controls.shuffled if self.controls.shuffled is not None else tuple(self.methods)[:1]
        for name in shuffled:
            own = {**self.methods[name], "shuffled_rewards": True}
            start = own.pop("model", None)
            yield Contender(f"{name}-shuffled", True, merge(self.shared, own), start, name)
        usual = {"likelihood": None, "advantage": None}
        if self.controls.raft:
            own = {**usual, "objective": {"name": "raft"}}
            yield Contender("raft", True, merge(self.shared, own), None, "raft")
        if self.controls.parent is not None:
            own = {**usual, "objective": {"name": "just_grpo"}, "likelihood": {"name": "left_to_right"}}
            section = merge(self.shared, own)
            section["rollouts"] = merge(
                section.get("rollouts", {"name": "engine"}),
                {"name": "engine", "order": "left_to_right", "per_step": 1, "decoder": None},
            )
            yield Contender("parent", True, section, self.controls.parent, "parent")

    def grid_section(self, section: Mapping[str, Any], rate: float) -> dict[str, Any]:
        """A section while a rate is tried."""
        return with_rate(merge(section, self.grid_shared), rate)


def with_rate(section: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """A section `rl` with another learning rate."""
    return merge(section, {"train": {"learning_rate": {"peak": rate}}})


def _built(section: Mapping[str, Any]) -> tuple[RlConfig, Any]:
    return check({**section, "model": ""})
