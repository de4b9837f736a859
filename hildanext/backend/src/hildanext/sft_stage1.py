"""Stage 1: a diffusion model learns to answer, by filling masks and by mending its own drafts.

`sft` is the whole stage: a checkpoint and conversations in, a run folder with the better checkpoint out.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hildanext.core.config import plain, validate
from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import read_metrics
from hildanext.core.plots import training_plots
from hildanext.core.registry import under_profile
from hildanext.core.run_dir import RUN_FILE, open_run
from hildanext.core.runtime import machine, seed_everything
from hildanext.corruption.noised_batches import NoisedBatches
from hildanext.corruption.schedules import BlockPhase
from hildanext.data.chat_dataset import ChatDataConfig, ChatDataset, chat_identity, prepare_chat
from hildanext.data.chat_template import set_template
from hildanext.losses import SupervisedStep, TokenLoss, make_losses
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.checkpoint import save_diffusion
from hildanext.models.tuning import start_hash, start_tuning
from hildanext.tokenization import real_ids
from hildanext.trainer.best_checkpoints import BestCheckpoints
from hildanext.trainer.config import comparable_train, ready_device
from hildanext.trainer.processes import on_main, open_accelerator
from hildanext.trainer.sample_generations import SampleAnswers
from hildanext.trainer.sft_config import SftConfig, check
from hildanext.trainer.state import check_resumes
from hildanext.trainer.task import TrainingTask
from hildanext.trainer.teacher import reader, teacher_for
from hildanext.trainer.validation import EditCheck, Validation, drawn_batches, measure_start
from hildanext.training import METRICS, train

CHECKPOINT, DATA = "checkpoint", "data"


def sft(
    sft_section: Mapping[str, Any],
    data_section: Mapping[str, Any],
    run: str | Path,
    profile: str = "SAFE",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run (or resume) a fine-tuning in the folder `run` and return its summary.

    Writes `run.json`, `data/` (the conversations as tokens), `metrics.jsonl`, `state/` (to resume), `best/`,
    `checkpoint/` (the diffusion model) and plots.
    Raises `ConfigError`, `ModelError`, `DataError`, `TrainingStopped` or `CheckpointError`.
    """
    with under_profile(profile, "sft") as full:
        config, data = check(sft_section, data_section)
    run, accelerator = Path(run), open_accelerator(config.train.precision, config.device)
    ready_device(config.train, accelerator.device)
    seed_everything(config.seed)
    model, tokenizer = start_tuning(config.start, accelerator.device, config.lora, config.quantize)
    set_template(tokenizer, data.template, data.template_options)
    model.card = replace(model.card, chat=True)
    _check_model(model, data, int(tokenizer.eos_token_id))
    resolved = {"profile": profile, "sft": plain(config), "data": plain(data)}
    record: dict[str, Any] = {
        "full": sorted(full),
        "machine": machine(accelerator.device),
        "processes": accelerator.num_processes,
        "start": start_hash(config.start),
        "chat": chat_identity(data, tokenizer, model.card.block_size),
    }
    on_main(accelerator, lambda: check_resumes(run, {"config": resolved, **record}, _comparable))
    manifest = on_main(accelerator, lambda: prepare_chat(run / DATA, data, tokenizer, model.card.block_size))
    record["data"] = {name: manifest["parts"][name] for name in ("train", "valid")}
    on_main(accelerator, lambda: open_run(run, resolved, config.seed, record))
    with under_profile(profile, "sft"):
        losses = _losses(config, manifest)
    own = config.parent.name if config.parent is not None else model.card.parent
    name = config.teacher if config.teacher is not None else own
    below = config.parent is not None and config.lora is not None and config.teacher is None
    teacher = teacher_for(losses.values(), model, name, config.train.precision, below)
    real = real_ids(model.card, tokenizer)
    head, special = teacher.head if teacher else None, ~real.to(model.device)
    step = SupervisedStep(model, losses, head, config.train.chunk, special, config.train.layout)
    best = BestCheckpoints(run, model, tokenizer, int(config.keep == "best"), config.select, config.select != "bound")
    stage = _stage(config, data, run, step, tokenizer, real.nonzero()[:, 0], best)
    stage.teacher = reader(teacher, model)
    on_main(accelerator, lambda: measure_start(run / METRICS, stage, step))
    counters = train(step, stage, config.train, run, quiet, accelerator)
    return on_main(accelerator, lambda: _finish(run, counters, stage, step, best, tokenizer, manifest))


def prepare_data(sft_section: Mapping[str, Any], data_section: Mapping[str, Any], run: str | Path) -> dict[str, Any]:
    """Render the conversations into `run`, as `sft` would, and return what there is; `sft` finds them ready."""
    config, data = check(sft_section, data_section)
    model, tokenizer = start_tuning(config.start, torch.device("cpu"))
    set_template(tokenizer, data.template, data.template_options)
    parts: dict[str, Any] = prepare_chat(Path(run) / DATA, data, tokenizer, model.card.block_size)["parts"]
    return parts


def _check_model(model: DiffusionModel, data: ChatDataConfig, eos: int) -> None:
    """Raise `ConfigError` for rows that the model cannot address, and for an end of text that it never writes."""
    context = model.causal_lm.config.max_position_embeddings
    if data.sequence_length > context:
        raise ConfigError(f"chat.sequence_length {data.sequence_length} exceeds the context of {context}", "lower it")
    if model.banned[eos]:
        raise ConfigError(f"the end of text, id {eos}, is never generated", "give the tokenizer another eos_token")


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of `run.json` decides a fine-tuning's numbers. Sections are built anew, as in conversion."""
    section = plain(validate(SftConfig, record["config"].get("sft", {}), f"{RUN_FILE}: sft"))
    section["train"] = comparable_train(section["train"], record.get("processes", 1))
    for name in ("device", "samples", "model"):
        del section[name]
    if section["parent"] is not None:
        del section["parent"]["name"]  # where its weights lie does not matter, what they are does
    chat = {**record["chat"], "packing": record["config"]["data"].get("packing", True)}
    start = {"start (hash of the weights)": record.get("start")}
    return {"profile": record["config"].get("profile"), "sft": section, **start, "data": chat}


def _losses(config: SftConfig, manifest: Mapping[str, Any]) -> dict[str, TokenLoss]:
    losses = make_losses(config.losses, "sft.losses")
    without = [name for name, loss in losses.items() if loss.needs_graphs]
    if without and not manifest["parts"]["train"]["graphs"]:
        raise ConfigError(
            f"sft.losses: {without[0]!r} needs causal graphs, and no example has one",
            "write them with hildanext prepare --graphs, and train on the file it makes",
        )
    return losses


def _stage(
    config: SftConfig,
    data: ChatDataConfig,
    run: Path,
    step: SupervisedStep,
    tokenizer: Any,
    real: torch.Tensor,
    best: BestCheckpoints,
) -> TrainingTask:
    model, eos = step.model, int(tokenizer.eos_token_id)
    block_size, batch_size = model.card.block_size, config.train.batch_size
    dataset, valid = (
        ChatDataset(run / DATA, part, data.sequence_length, block_size, eos, data.packing)
        for part in ("train", "valid")
    )
    held_out = drawn_batches(valid, config.valid_rows, batch_size, model.device)
    bound, edits = Validation(held_out, eos, model.card), EditCheck(held_out, model.card, real)
    total = max(1, round(config.epochs * dataset.tokens))
    return TrainingTask(
        total_tokens=total,
        block_phase=lambda tokens: BlockPhase(phase="stable", block_size=block_size, tokens=total),
        views=NoisedBatches(dataset, batch_size, config, model.card, real, model.device, config.seed, dataset.pairs),
        validate=lambda step, number: {**bound(step, number), **edits(step, number)},
        turns=config.turns,
        seed=config.seed,
        on_evaluation=best,
        on_saved=best.prune,
        samples=SampleAnswers(valid, model, tokenizer, config.samples),
        finished=lambda: best.plateaued(config.patience),
        pad_id=eos,
        counters=best.state,
    )


def _finish(
    run: Path,
    counters: Mapping[str, Any],
    stage: TrainingTask,
    step: SupervisedStep,
    best: BestCheckpoints,
    tokenizer: Any,
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Put the kept checkpoint in its place, draw the plots, say what was measured."""
    evaluations = {line["step"]: line for line in read_metrics(run / METRICS) if line["kind"] == "eval"}
    assert stage.finished is not None
    early = counters["tokens"] < stage.total_tokens and stage.finished()
    whole = counters["tokens"] >= stage.total_tokens or early
    told = ("step", "tokens", "real_tokens", "seconds")
    summary: dict[str, Any] = {**{name: counters[name] for name in told}, "whole": whole, "stopped_early": early}
    summary |= {"data": manifest["parts"], "before": evaluations.get(0), "last": evaluations.get(counters["step"])}
    kept = best.steps()
    if whole and kept:
        best.copy_to(run / CHECKPOINT)
        summary |= {"best": evaluations.get(kept[0]), "checkpoint": str(run / CHECKPOINT)}
    elif whole:
        save_diffusion(run / CHECKPOINT, step.model, tokenizer)
        summary["checkpoint"] = str(run / CHECKPOINT)
    training_plots(read_metrics(run / METRICS), run / "plots")
    return summary
