"""What a step of an alignment costs, part by part, each beside the same work by hand: `hildanext bench rl-speed`.

Rollouts stand beside the bare decode loop and, forward by forward, the network alone; updates beside a step of
fine-tuning on the same rows and masks; the whole step beside its parts without the training loop. Everything is
measured in turns in one process, the weights stay as they are but in whole steps, and numbers are medians.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from hildanext.bench.engine_speed import beside
from hildanext.bench.train_speed import Seconds, medians
from hildanext.core.config import Seed, config, merge, plain
from hildanext.core.errors import ConfigError, DataError
from hildanext.core.metrics_log import run_metrics
from hildanext.core.progress import Repeats
from hildanext.core.registry import under_profile
from hildanext.core.runtime import machine
from hildanext.corruption.input_layout import choose_layout
from hildanext.corruption.schedules import BlockPhase
from hildanext.decoding import make_decoder
from hildanext.grading.base import checked_scores
from hildanext.inference import GenerationConfig, generate
from hildanext.losses import SupervisedStep
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.models.tuning import start_tuning
from hildanext.rl.config import RlConfig, Seams
from hildanext.rl.looks import noised_view
from hildanext.rl.measure import seed_of
from hildanext.rl.policy import Policy
from hildanext.rl.rollouts.engine import EngineRollouts, EngineSampler
from hildanext.rl.rounds import Rounds
from hildanext.rl.step import PolicyStep, PolicyView
from hildanext.rl_stage2 import check, rl
from hildanext.trainer.run import TrainingRun
from hildanext.trainer.window import Place
from hildanext.training import make_optimizer

USUAL: dict[str, Any] = {
    "problems": {"name": "arithmetic", "largest": 9, "steps": 1},
    "rollouts": {"name": "engine", "max_new_tokens": 24},
    "train": {"batch_size": 8},
}
"""One-step sums."""

UPDATES = ("packed", "unpacked", "sft")


@config
class RlSpeedConfig:
    """A section `rl`, and how often it is measured."""

    start: str | None = None
    """A diffusion checkpoint. None: the model of `bench`."""
    shared: dict[str, Any] = Field(default_factory=lambda: dict(USUAL))
    """The section `rl` of a run; how often it is measured is not its business."""
    rounds: int = Field(default=2, ge=1)
    """Whole steps of a repeat; one before them is not counted."""
    repeats: int = Field(default=3, ge=1)
    seed: Seed = 0

    def __post_init__(self) -> None:
        _, seams = self.built("")
        if not isinstance(seams.rollouts, EngineRollouts):
            raise ConfigError("bench rl-speed measures our own engine", 'give shared.rollouts {"name": "engine"}')

    @staticmethod
    def usual() -> dict[str, Any]:
        """What is shared where nothing is said."""
        return dict(USUAL)

    def section(self, start: str) -> dict[str, Any]:
        short = {"rounds": self.rounds + 1, "updates": 1, "measure": {"problems": 1, "samples": 0}}
        rollouts = {"rollouts": merge({"name": "engine"}, self.shared.get("rollouts", {}))}
        return merge({"seed": self.seed, **self.shared}, {**short, **rollouts, "model": start})

    def built(self, start: str) -> tuple[RlConfig, Seams]:
        return check(self.section(start))


@dataclass
class Opened:
    """An alignment that is set up as its stage does it, and not run."""

    config: RlConfig
    seams: Seams
    run: TrainingRun
    policy: Policy
    sampler: EngineSampler
    rounds: Rounds
    step: PolicyStep

    @classmethod
    def open(cls, section: Mapping[str, Any], folder: Path, profile: str) -> "Opened":
        with under_profile(profile):
            config, seams = check(section)
            run = TrainingRun(folder, config)
            model, tokenizer = start_tuning(config.model, run.device, config.lora, config.quantize)
            chat = model.card.chat if config.prompting == "auto" else config.prompting == "chat"
            policy = Policy(model, tokenizer, chat, config.lora is not None)
            if seams.objective.wants_reference:
                policy.keep_reference()
            assert isinstance(seams.rollouts, EngineRollouts)
            sampler = seams.rollouts.open(policy, profile)
        heat = seams.rollouts.temperature if seams.likelihood.of_actions else 1.0
        step = PolicyStep(model, seams.objective, heat, config.train.chunk, config.packed)
        train = seams.problems.split(seams.reward).train
        rounds = Rounds(folder, config, seams, policy, sampler, train, step, run.accelerator)
        return cls(config, seams, run, policy, sampler, rounds, step)

    def close(self) -> None:
        self.sampler.close()


def measure(
    start: str, settings: RlSpeedConfig, profile: str, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Rollouts, updates and whole steps, in turns. Raises as the stage `rl` does, and `DataError` where no group of the
    first round has different rewards, so that there is nothing to update with."""
    section = settings.section(start)
    with tempfile.TemporaryDirectory(prefix="hilda-rl-speed-") as name:
        folder = Path(name)
        opened = Opened.open(section, folder / "open", profile)
        try:
            rollouts, updates, steps = _Rollouts(opened), _Updates(opened), _Steps(section, folder, profile)
            repeats = Repeats(settings.repeats, say)
            for repeat in range(settings.repeats + 1):
                for part in (rollouts, updates):
                    part.repeat(counted=repeat > 0)  # the first of each pays for allocations
                if repeat > 0:
                    steps.repeat(repeat)
                    repeats.done(repeat)
            return {
                "bench": "rl-speed",
                "start": start,
                "settings": plain(settings),
                "card": plain(opened.policy.model.card),
                "machine": machine(opened.policy.model.device, opened.policy.model.dtype),
                "updates_in": opened.run.accelerator.mixed_precision,
                "decoder": opened.sampler.settings.section(opened.seams.rollouts.temperature),
                "objective": opened.config.objective,
                "likelihood": plain(opened.seams.likelihood) | {"name": type(opened.seams.likelihood).__name__},
                "rollouts": rollouts.result(),
                "updates": updates.result(),
                "steps": steps.result(),
            }
        finally:
            opened.close()


class _Rollouts:
    """A round's answers through the engine, by the bare loop, and beside the network alone."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        chosen = opened.rounds.chosen(0, Place())
        self.problems = [problem for _, problem in chosen for _ in range(opened.config.group)]
        self.prompts = [opened.policy.encode(problem) for problem in self.problems]
        self.seeds = [seed_of(opened.config.seed, number) for number in range(len(self.prompts))]
        self.times: dict[str, list[Seconds]] = {"engine": [], "loop": []}
        self.network: list[float] = []
        self.told: dict[str, dict[str, float]] = {}

    def repeat(self, counted: bool) -> None:
        texts = {}
        for way, work in {"engine": self._engine, "loop": self._loop}.items():
            self.opened.sampler.changed()  # no prefix of the last time is kept
            begun = Seconds.now(self.opened.run.device)
            texts[way], tokens, forwards = work()
            if counted:
                self.times[way].append(Seconds.now(self.opened.run.device).since(begun))
            self.told[way] = self._quality(texts[way]) | {"tokens": float(tokens), "row_forwards": float(forwards)}
        same = sum(a == b for a, b in zip(texts["engine"], texts["loop"], strict=True))
        self.told["loop"]["like_engine"] = same / len(self.prompts)
        self.opened.sampler.changed()
        with beside(self.opened.policy.model) as pairs:
            begun = Seconds.now(self.opened.run.device)
            self._engine()
            whole = Seconds.now(self.opened.run.device).since(begun).wall
        network, pauses = sum(pair.network for pair in pairs), sum(pair.pause for pair in pairs)
        self.told["engine"]["forwards"] = float(len(pairs))
        if counted:
            self.network.append(network / (whole - pauses))

    def _engine(self) -> tuple[list[str], int, int]:
        answers = self.opened.sampler.sample(self.prompts, self.seeds)
        whole = [answer for answer in answers if answer is not None]
        texts = ["" if answer is None else answer.text for answer in answers]
        return texts, sum(len(one.tokens) for one in whole), sum(one.forwards for one in whole)

    def _loop(self) -> tuple[list[str], int, int]:
        rollouts, policy = self.opened.seams.rollouts, self.opened.policy
        assert isinstance(rollouts, EngineRollouts)
        settings = GenerationConfig(max_new_tokens=rollouts.max_new_tokens, batch_size=rollouts.slots)
        decoder = make_decoder(rollouts.section(rollouts.temperature))
        with policy.sampling():
            told = generate(
                policy.model, policy.tokenizer, self.prompts, decoder, settings, seeds=self.seeds, trajectories=True
            )
        return [one.text for one in told], sum(len(one.tokens) for one in told), sum(one.stats.forwards for one in told)

    def _quality(self, texts: Sequence[str]) -> dict[str, float]:
        reward = self.opened.seams.reward
        scores, _ = checked_scores(reward, [problem.row for problem in self.problems], texts)
        known = [score for score in scores if score is not None]
        return {"reward": float(statistics.mean(known)) if known else 0.0, "judged": float(len(known))}

    def result(self) -> dict[str, Any]:
        ways = {}
        for way, times in self.times.items():
            middle, told = medians(times), self.told[way]
            ways[way] = {
                **told,
                "seconds": middle.wall,
                "processor_seconds": middle.processor,
                "answers_per_second": len(self.prompts) / middle.wall,
                "tokens_per_second": told["tokens"] / middle.wall,
                "tokens_per_forward": told["tokens"] / told["row_forwards"] if told["row_forwards"] else None,
            }
        pairs = zip(self.times["engine"], self.times["loop"], strict=True)
        return {
            "answers": len(self.prompts),
            "prompt_tokens": statistics.mean(len(prompt) for prompt in self.prompts),
            "rows": self.opened.seams.rollouts.together,
            "ways": ways,
            "engine_over_loop": statistics.median(loop.wall / engine.wall for engine, loop in pairs),
            "engine_share_of_network": statistics.median(self.network),
        }


class _Updates:
    """An update of the first round's answers, its prompts shared and not, and a step of fine-tuning on the same."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        now = opened.rounds.open(0, Place())
        if not now.groups:
            raise DataError(
                "no group of the first round has different rewards, so that an update has nothing to do",
                "give a start that solves some of the problems",
            )
        self.views = now.views[0]
        self.answers = sum(len(group) for group in now.groups)
        model, chunk = opened.policy.model, opened.config.train.chunk
        heat = opened.step.temperature
        self.steps = {
            name: PolicyStep(model, opened.seams.objective, heat, chunk, name == "packed") for name in UPDATES[:2]
        }
        self.sft = SupervisedStep(model, {"m2t": MaskToToken()}, chunk=chunk, layout="response")
        self.noised = [noised_view(view.batch, look, model.card.mask_id) for view in self.views for look in view.looks]
        self.optimizer = make_optimizer(opened.step, opened.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.times: dict[str, list[Seconds]] = {name: [] for name in UPDATES}
        self.columns: dict[str, float] = {}

    def repeat(self, counted: bool) -> None:
        device, model = self.opened.run.device, self.opened.policy.model
        model.train()
        for name in UPDATES:
            begun = Seconds.now(device)
            step = self.sft if name == "sft" else self.steps[name]
            take_update(self.opened, step, self.noised if name == "sft" else self.views, self.optimizer)
            if counted:
                self.times[name].append(Seconds.now(device).since(begun))
            if name != "sft":
                self.columns[name] = self.steps[name].extremes()["columns"]
        fed = (choose_layout(view, model.card.shift, choice="response") for view in self.noised)
        self.columns["sft"] = float(sum(columns.token.numel() for columns in fed))

    def result(self) -> dict[str, Any]:
        ways = {}
        for name, times in self.times.items():
            middle = medians(times)
            ways[name] = {
                "seconds": middle.wall,
                "processor_seconds": middle.processor,
                "columns": self.columns[name],
                "columns_per_second": self.columns[name] / middle.wall,
                "answers_per_second": self.answers / middle.wall,
            }
        both = list(zip(self.times["packed"], self.times["unpacked"], strict=True))
        return {
            "answers": self.answers,
            "looks": len(self.noised),
            "ways": ways,
            "packed_speedup": statistics.median(b.wall / a.wall for a, b in both),
            "packed_speedup_processor": statistics.median(b.processor / a.processor for a, b in both),
            "columns_ratio": self.columns["unpacked"] / self.columns["packed"],
            "share_of_sft": ways["unpacked"]["columns_per_second"] / ways["sft"]["columns_per_second"],
        }


def take_update(
    opened: Opened, step: PolicyStep | SupervisedStep, views: Sequence[Any], optimizer: torch.optim.Optimizer
) -> None:
    """One step of the optimiser, without a loop around it."""
    count = sum(int(view.maskable.sum() if isinstance(step, SupervisedStep) else view.count) for view in views)
    for view in views:
        with opened.run.accelerator.autocast():
            outcome = step(view)
        (outcome.total / max(count, 1)).backward()
    torch.nn.utils.clip_grad_norm_(step.parameters(), opened.config.train.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class _Steps:
    """Whole steps by the stage, and their parts by hand from the same start under the same seed."""

    def __init__(self, section: Mapping[str, Any], folder: Path, profile: str) -> None:
        self.section, self.folder, self.profile = section, folder, profile
        self.real: list[dict[str, float]] = []
        self.hand: list[dict[str, float]] = []

    def repeat(self, number: int) -> None:
        rl(self.section, self.folder / f"real-{number}", self.profile, quiet=True)
        lines = [line for line in run_metrics(self.folder / f"real-{number}") if line["kind"] == "train"]
        self.real += [_parts(line, line["seconds"]) for line in lines[1:]]
        self.hand += self._by_hand(self.folder / f"hand-{number}")[1:]

    def _by_hand(self, folder: Path) -> list[dict[str, float]]:
        opened = Opened.open(self.section, folder, self.profile)
        optimizer = make_optimizer(opened.step, opened.config.train)
        phase = BlockPhase(phase="stable", block_size=opened.policy.model.card.block_size, tokens=1)
        taken = []
        try:
            opened.policy.model.train()
            for number in range(opened.config.steps):
                for group in optimizer.param_groups:
                    group["lr"] = opened.config.train.learning_rate.at(number / opened.config.steps)
                begun = Seconds.now(opened.run.device)
                window = opened.rounds(number, phase, Place())
                asked = Seconds.now(opened.run.device)
                views: list[PolicyView] = [view for *_, view in window.views]
                if sum(view.count for view in views):
                    take_update(opened, opened.step, views, optimizer)
                ended = Seconds.now(opened.run.device)
                parts = _parts(window.figures, ended.since(begun).wall)
                taken.append({**parts, "update": ended.since(asked).wall, "window": asked.since(begun).wall})
        finally:
            opened.close()
        return taken

    def result(self) -> dict[str, Any]:
        """Seconds of a step; `loop` is what the stage's step takes beyond its parts by hand."""
        real = {name: statistics.median(step[name] for step in self.real) for name in self.real[0]}
        hand = {name: statistics.median(step[name] for step in self.hand) for name in self.hand[0]}
        named = ("rollout", "reward", "known")
        loops = [
            ours["seconds"] - sum(ours[name] for name in named) - theirs["update"]
            for ours, theirs in zip(self.real, self.hand, strict=True)
        ]
        loop = statistics.median(loops)
        shares = {name: real[name] / real["seconds"] for name in named}
        return {
            "steps": len(self.real),
            "seconds": real["seconds"],
            "seconds_by_hand": hand["seconds"],
            "parts": {**{name: real[name] for name in named}, "update": hand["update"], "loop": loop},
            "shares": {**shares, "update": hand["update"] / real["seconds"], "loop": loop / real["seconds"]},
        }


def _parts(figures: Mapping[str, Any], seconds: float) -> dict[str, float]:
    return {"seconds": seconds} | {name: float(figures[f"seconds_{name}"]) for name in ("rollout", "reward", "known")}
