"""Stage 2: a diffusion model gets better at what can be checked, by reinforcement learning on verifiable rewards.

`rl` is the whole stage: a checkpoint, problems and a reward in, a run folder with the aligned checkpoint out.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hildanext.core.config import plain
from hildanext.core.errors import ConfigError
from hildanext.core.registry import under_profile
from hildanext.corruption.schedules import BlockPhase
from hildanext.data.problems import Problem, Split
from hildanext.models.checkpoint import save_diffusion
from hildanext.models.tuning import start_hash, start_tuning
from hildanext.rl.alarms import Watch, facts_of
from hildanext.rl.config import RlConfig, Seams, read_config
from hildanext.rl.editing import EditingMeasure
from hildanext.rl.measure import Measure, nothing_to_learn
from hildanext.rl.policy import Policy
from hildanext.rl.rollouts import Sampler
from hildanext.rl.rounds import Rounds
from hildanext.rl.samples import best_and_worst
from hildanext.rl.step import PolicyStep
from hildanext.trainer.best_checkpoints import BestCheckpoints
from hildanext.trainer.run import CHECKPOINT, TrainingRun, comparable_section
from hildanext.trainer.task import Callbacks, TrainingTask
from hildanext.training import train

logger = logging.getLogger(__name__)


def rl(rl_section: Mapping[str, Any], folder: str | Path, profile: str = "SAFE", quiet: bool = False) -> dict[str, Any]:
    """Run (or resume) an alignment in a folder and return its summary.

    Writes `run.json`, `rollouts/` (every answer and what it earned), `metrics.jsonl`, `state/` (to resume),
    `checkpoint/` (the diffusion model) and plots.
    Raises `ConfigError`, `ModelError`, `DataError`, `RewardError`, `TrainingStopped` or `CheckpointError`.
    """
    with under_profile(profile, "rl") as full:
        config, seams = read_config(rl_section)
    split = seams.problems.split(seams.reward)
    run = TrainingRun(folder, config)
    model, tokenizer = start_tuning(config.model, run.device, config.lora, config.quantize)
    chat = model.card.chat if config.prompting == "auto" else config.prompting == "chat"
    policy = Policy(model, tokenizer, chat, config.lora is not None)
    seams.likelihood.check(model.card)
    if seams.likelihood.caveat is not None:
        logger.warning("%s", seams.likelihood.caveat)
    check_room(policy, split, seams)
    record = run.record(
        {"profile": profile, "rl": plain(config)},
        full=sorted(full),
        start=start_hash(config.model),
        problems=split.facts(),
        reference=None if not seams.objective.wants_reference else "without adapters" if policy.adapters else "a copy",
    )
    run.check_resumes(record, _comparable)
    run.write_record(record)
    best = BestCheckpoints(
        run.folder,
        lambda folder, measured: save_diffusion(folder, model, tokenizer),
        int(config.keep == "best"),
        "accuracy",
        True,
    )
    run.rehearse_save(model, tokenizer, best)
    if seams.objective.wants_reference:
        policy.keep_reference()
    temperature = seams.rollouts.temperature if seams.likelihood.of_actions else 1.0
    step = PolicyStep(
        model, seams.objective, temperature, config.train.chunk, config.packed, seams.likelihood.of_actions
    )
    sampler = seams.rollouts.open(policy, profile)
    try:
        return _learn(run, config, seams, policy, sampler, split, step, best, quiet)
    finally:
        sampler.close()


def check(rl_section: Mapping[str, Any]) -> tuple[RlConfig, Seams]:
    """Validate the section without loading anything heavy. Raises `ConfigError`."""
    return read_config(rl_section)


def check_room(policy: Policy, split: Split, seams: Seams) -> None:
    """Raises `ConfigError` where the context does not hold the longest prompt and its answer, and where the end of text
    is never written; warns where right answers are longer than an answer may be."""
    if policy.model.banned[policy.end]:
        raise ConfigError(
            f"the end of text, id {policy.end}, is never generated", "give the tokenizer another eos_token"
        )
    limit = seams.rollouts.max_new_tokens
    longest = max((*split.train, *split.held_out), key=lambda problem: len(policy.encode(problem)))
    room = policy.room(len(policy.encode(longest)))
    if room < limit:
        raise ConfigError(
            f"the prompt of {longest.where} leaves {max(room, 0)} of the context's tokens, answers may have {limit}",
            "lower rl.rollouts.max_new_tokens, or leave out the longest problems",
        )
    known = [problem.answer for problem in split.train if problem.answer is not None]
    lengths = [len(policy.tokenizer(answer, add_special_tokens=False).input_ids) + 1 for answer in known[:1000]]
    over = sum(length > limit for length in lengths)
    if over:
        logger.warning(
            "%.0f %% of the right answers are longer than the %d tokens that rl.rollouts.max_new_tokens allows",
            100 * over / len(lengths),
            limit,
        )


def _learn(
    run: TrainingRun,
    config: RlConfig,
    seams: Seams,
    policy: Policy,
    sampler: Sampler,
    split: Split,
    step: PolicyStep,
    best: BestCheckpoints,
    quiet: bool,
) -> dict[str, Any]:
    rounds = Rounds(run.folder, config, seams, policy, sampler, split.train, step, run.accelerator)
    held_out: Sequence[Problem] = split.held_out[: config.measure.problems]
    measure = Measure(policy, sampler, held_out, seams.reward)
    editing = EditingMeasure(policy, held_out, config.train.chunk) if config.measure.editing else None

    def validate(_: Any, number: int) -> dict[str, Any]:
        sampler.changed()
        measured = measure.greedy()
        if config.measure.samples and number in (0, config.steps):
            measured |= measure.sampled(config.measure.samples)
        if editing is not None and number in (0, config.steps):
            measured |= editing()
        return measured

    def saved() -> None:
        best.prune()
        rounds.prune()

    block = policy.model.card.block_size
    task = TrainingTask(
        total=config.steps,
        unit="step",
        block_phase=lambda done: BlockPhase(phase="stable", block_size=block, tokens=config.steps),
        windows=rounds,
        validate=validate if held_out else None,
        seed=config.seed,
        callbacks=Callbacks(
            on_evaluation=best if held_out else None,
            on_saved=saved,
            samples=lambda number: best_and_worst(rounds.round),
            watch=Watch(facts_of(seams.reward, config.group, _computed_in(run, policy)), config.guard).open,
            state=best.state,
        ),
        told=_told,
    )
    run.measure_start(task, step)
    start = run.evaluations().get(0)
    if start is not None:
        _say_start(start, config.measure.samples)
    counters = train(step, task, config.train, run.folder, quiet, run.accelerator)
    return run.finish(counters, task, lambda whole: _conclude(run, counters["step"], whole, best))


def _computed_in(run: TrainingRun, policy: Policy) -> torch.dtype:
    return torch.bfloat16 if run.accelerator.mixed_precision == "bf16" else policy.model.dtype


def _say_start(start: Mapping[str, Any], samples: int) -> None:
    logger.info("at the start %.0f %% of the held-out problems are solved greedily", 100 * start["accuracy"])
    problem = nothing_to_learn(start, samples) if "zero_variance" in start else None
    if problem is not None:
        logger.warning("%s", problem)


def _told(line: Mapping[str, Any]) -> str:
    """What is shown of a step."""
    losses = line["losses"]
    more = "".join(f" | {name} {losses[name]:.4f}" for name in ("kl",) if name in losses)
    return (
        f"round {line['round']} | reward {line['reward']:.3f} | right {line['solved']:.0%} | "
        f"equal groups {line['zero_variance']:.0%} | length {line['length']:.0f}{more} | {line['seconds']:.1f} s"
    )


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of `run.json` decides an alignment's numbers."""
    section = comparable_section(RlConfig, record, "rl", ("device", "model", "measure", "keep", "guard"))
    start = {"start (hash of the weights)": record.get("start"), "problems": record.get("problems")}
    return {"profile": record["config"].get("profile"), "rl": section, **start}


def _conclude(run: TrainingRun, number: int, whole: bool, best: BestCheckpoints) -> dict[str, Any]:
    """Put the kept checkpoint in its place, and say what was measured."""
    evaluations, checkpoint = run.evaluations(), run.folder / CHECKPOINT
    summary: dict[str, Any] = {"before": evaluations.get(0), "last": evaluations.get(number)}
    if not whole:
        return summary
    if best.steps():
        best.copy_to(checkpoint)
        summary["best"] = evaluations.get(best.steps()[0])
    else:
        best.write(checkpoint, {})
    return {**summary, "checkpoint": str(checkpoint)}
