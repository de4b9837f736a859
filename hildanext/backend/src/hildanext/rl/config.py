"""The recipe of an alignment by reinforcement learning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from hildanext.core.config import Seed, config, merge, validate
from hildanext.core.errors import ConfigError
from hildanext.core.registry import build
from hildanext.data.problems import PROBLEMS, ProblemSet
from hildanext.grading.rewards import REWARDS, Reward
from hildanext.models.lora import LoraConfig
from hildanext.models.quantize import Quantize, check_quantize
from hildanext.rl.advantages import ADVANTAGES, Advantage
from hildanext.rl.alarms import check_names
from hildanext.rl.likelihoods import POLICY_LIKELIHOODS, PolicyLikelihood
from hildanext.rl.objectives import OBJECTIVES, Objective
from hildanext.rl.plugins import PLUGINS, Plugin
from hildanext.rl.rollouts import ROLLOUTS, Rollouts
from hildanext.trainer.config import TrainConfig

TRAIN_DEFAULTS = {
    "batch_size": 4,
    "learning_rate": {"peak": 1e-5, "warmup": 0.0, "decay": 0.0},
    "weight_decay": 0.0,
    "evaluate_every": 10,
    "checkpoint_every": 10,
}
"""Under what the section says: a constant rate, as every published recipe but AGRPO's has it."""


@config
class MeasureConfig:
    """What is measured on problems that are never trained on."""

    problems: int = Field(default=100, ge=1)
    """The first so many held-out ones."""
    samples: int = Field(default=8, ge=0)
    """Sampled answers to each, at the start and at the end, for sampled accuracy and pass@k; 0 samples none."""
    editing: bool = True
    """At the start and at the end, in a forward each: what the policy would do to wrong tokens of right answers."""


@config
class RlConfig:
    """Rounds of sampling, judging and learning.

    A round asks `problems_per_round` problems `group` times each, and makes `updates` steps of the optimiser of the
    answers. `train.batch_size` counts the groups of a forward; `train.accumulate` is 1.
    """

    model: str
    """A diffusion checkpoint."""
    problems: dict[str, Any] = Field(default_factory=lambda: {"name": "arithmetic"})
    reward: dict[str, Any] | None = None
    """None: the one that the problems are made for."""
    objective: dict[str, Any] = Field(default_factory=lambda: {"name": "espo"})
    likelihood: dict[str, Any] | None = None
    """None: the objective's usual one."""
    advantage: dict[str, Any] | None = None
    """None: the objective's usual one."""
    rollouts: dict[str, Any] = Field(default_factory=lambda: {"name": "engine"})
    plugins: tuple[dict[str, Any], ...] = ()
    """Sections of plugins, in the order in which their hooks are called; each name once."""
    rounds: int = Field(default=100, ge=1)
    problems_per_round: int = Field(default=8, ge=1)
    """Per process."""
    group: int = Field(default=8, ge=1)
    """Answers to each problem."""
    updates: int = Field(default=1, ge=1)
    """Steps of the optimiser that a round's answers serve (mu)."""
    shuffled_rewards: bool = False
    """The control: each group's rewards are dealt out anew among its answers, so that nothing can be learnt."""
    prompting: Literal["auto", "chat", "text"] = "auto"
    """`chat` puts a problem into the model's chat template; `auto` does where the model was fine-tuned to answer."""
    packed: bool = True
    """Feed a group's prompt once in an update. Changes no number beyond rounding."""
    measure: MeasureConfig = MeasureConfig()
    keep: Literal["last", "best"] = "last"
    """`best` takes the checkpoint with the highest held-out accuracy: chosen by what it is then judged by."""
    guard: tuple[str, ...] = ()
    """Alarms that stop the run (see `rl.alarms`); the others are only said."""
    lora: LoraConfig | None = None
    quantize: Quantize | None = None
    device: str = "auto"
    seed: Seed = 0
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ConfigError("rl.group 1 has nothing to be better than", "give 2 answers or more to each problem")
        check_names(self.guard)
        if self.train.accumulate != 1:
            raise ConfigError(
                f"train.accumulate {self.train.accumulate} means nothing in rl",
                "a step takes a whole round; train.batch_size says how many groups a forward holds",
            )
        if self.lora is not None and self.lora.dropout > 0:
            raise ConfigError(
                f"rl.lora.dropout {self.lora.dropout:g}: old and new policy would not be one law", "leave it out"
            )

    @property
    def steps(self) -> int:
        """Of the optimiser, in the whole run."""
        return self.rounds * self.updates


@dataclass(frozen=True)
class Seams:
    """The parts of a run, built."""

    problems: ProblemSet
    reward: Reward
    objective: Objective
    likelihood: PolicyLikelihood
    advantage: Advantage
    rollouts: Rollouts
    plugins: Mapping[str, Plugin] = field(default_factory=dict)


def read_config(section: Mapping[str, Any]) -> tuple[RlConfig, Seams]:
    """The section understood and its parts built. Raises `ConfigError`, and `UnknownChoice` for a name that is none."""
    settings = dict(section)
    if isinstance(settings.get("train", {}), Mapping):
        settings["train"] = merge(TRAIN_DEFAULTS, settings.get("train", {}))
    config = validate(RlConfig, settings, "rl")
    problems = build("problem set", PROBLEMS, config.problems)
    objective = build("objective", OBJECTIVES, config.objective)
    name = str(config.objective["name"])
    likelihood = config.likelihood if config.likelihood is not None else {"name": objective.likelihoods[0]}
    advantage = config.advantage if config.advantage is not None else {"name": objective.advantage}
    seams = Seams(
        problems=problems,
        reward=build("reward", REWARDS, _reward_section(config, problems)),
        objective=objective,
        likelihood=build("likelihood", POLICY_LIKELIHOODS, likelihood),
        advantage=build("advantage", ADVANTAGES, advantage),
        rollouts=build("rollouts", ROLLOUTS, config.rollouts),
        plugins=_plugins(config.plugins),
    )
    _check_together(config, seams, name, str(likelihood["name"]))
    check_quantize(config.quantize, config.lora is not None)
    return config, seams


def _reward_section(config: RlConfig, problems: ProblemSet) -> Mapping[str, Any]:
    if config.reward is not None:
        return config.reward
    if problems.reward is None:
        raise ConfigError("rl.reward is missing", f"name one for these problems, of {', '.join(REWARDS)}")
    return {"name": problems.reward}


def _plugins(sections: Sequence[Mapping[str, Any]]) -> dict[str, Plugin]:
    plugins: dict[str, Plugin] = {}
    for section in sections:
        plugin, name = build("plugin", PLUGINS, section), str(section["name"])
        if name in plugins:
            raise ConfigError(f"rl.plugins names {name} twice", "give one section for it")
        plugins[name] = plugin
    return plugins


def _check_together(config: RlConfig, seams: Seams, objective: str, likelihood: str) -> None:
    """Refuse combinations that make no sense, with the reason."""
    if likelihood not in seams.objective.likelihoods:
        raise ConfigError(
            f"objective {objective} with likelihood {likelihood}",
            f"it takes {', '.join(seams.objective.likelihoods)}",
        )
    seams.rollouts.check_run(config.rounds)
    for plugin in seams.plugins.values():
        plugin.check(seams)
    if not seams.likelihood.of_actions:
        return
    if not seams.rollouts.traced:
        raise ConfigError(
            f"likelihood {likelihood} replays the steps of an answer, and these rollouts tell none",
            "sample with rollouts engine, or take block_elbo",
        )
    if seams.rollouts.biased and getattr(seams.likelihood, "biased", "allow") != "allow":
        named = getattr(seams.rollouts, "decoder", None) is not None
        instead = "leave rollouts.decoder out" if named else "set rollouts.order to random"
        raise ConfigError(
            "by confidence the recorded log p is not the action's, so that the gradient is biased",
            f'{instead}, or the likelihood\'s "biased": "allow"',
        )
