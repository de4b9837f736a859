"""Stage 1: a diffusion model learns to answer, by filling masks and by mending its own drafts.

`sft` is the whole stage: a checkpoint and conversations in, a run folder with the better checkpoint out.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hildanext.best import Best
from hildanext.chat_dataset import ChatDataKnobs, ChatDataset, chat_identity, prepare_chat
from hildanext.config import build, check_profile, full_methods, plain
from hildanext.conversations import set_template
from hildanext.errors import ConfigError
from hildanext.log import read_metrics
from hildanext.loop.processes import on_main, open_accelerator
from hildanext.loop.state import check_resumes
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.checkpoint import save_diffusion
from hildanext.models.start import start_hash, start_tuning
from hildanext.plots import training_plots
from hildanext.runfolder import RUN_FILE, open_run
from hildanext.runtime import machine, seed_everything
from hildanext.sample_answers import SampleAnswers
from hildanext.schedules import Rung
from hildanext.sft_knobs import SftKnobs, check
from hildanext.supervision import SupervisedStep, Supervision, make_losses
from hildanext.teacher import reader, teacher_for
from hildanext.tokenization import real_ids
from hildanext.training import METRICS, Stage, comparable_train, ready_device, train
from hildanext.validation import EditCheck, Validation, drawn_batches, measure_start
from hildanext.views import Views

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
    check_profile(profile, [dict(sft_section), dict(data_section)], "sft")
    knobs_, data = check(sft_section, data_section)
    run, accelerator = Path(run), open_accelerator(knobs_.train.precision, knobs_.device)
    ready_device(knobs_.train, accelerator.device)
    seed_everything(knobs_.seed)
    model, tokenizer = start_tuning(knobs_.start, accelerator.device, knobs_.lora, knobs_.quantize)
    set_template(tokenizer, data.template, data.template_options)
    model.card = replace(model.card, chat=True)
    _check_model(model, data, int(tokenizer.eos_token_id))
    config = {"profile": profile, "sft": plain(knobs_), "data": plain(data)}
    record: dict[str, Any] = {
        "full": full_methods([dict(sft_section), dict(data_section)]),
        "machine": machine(accelerator.device),
        "processes": accelerator.num_processes,
        "start": start_hash(knobs_.start),
        "chat": chat_identity(data, tokenizer, model.card.block_size),
    }
    on_main(accelerator, lambda: check_resumes(run, {"config": config, **record}, _comparable))
    manifest = on_main(accelerator, lambda: prepare_chat(run / DATA, data, tokenizer, model.card.block_size))
    record["data"] = {name: manifest["parts"][name] for name in ("train", "valid")}
    on_main(accelerator, lambda: open_run(run, config, knobs_.seed, record))
    losses = _losses(knobs_, manifest)
    own = knobs_.parent.name if knobs_.parent is not None else model.card.parent
    name = knobs_.teacher if knobs_.teacher is not None else own
    below = knobs_.parent is not None and knobs_.lora is not None and knobs_.teacher is None
    teacher = teacher_for(losses.values(), model, name, knobs_.train.precision, below)
    real = real_ids(model.card, tokenizer)
    head, special = teacher.head if teacher else None, ~real.to(model.device)
    step = SupervisedStep(model, losses, head, knobs_.train.chunk, special, knobs_.train.layout)
    best = Best(run, model, tokenizer, int(knobs_.keep == "best"), knobs_.select, knobs_.select != "bound")
    stage = _stage(knobs_, data, run, step, tokenizer, real.nonzero()[:, 0], best)
    stage.teacher = reader(teacher, model)
    on_main(accelerator, lambda: measure_start(run / METRICS, stage, step))
    counters = train(step, stage, knobs_.train, run, quiet, accelerator)
    return on_main(accelerator, lambda: _finish(run, counters, stage, step, best, tokenizer, manifest))


def prepare_data(sft_section: Mapping[str, Any], data_section: Mapping[str, Any], run: str | Path) -> dict[str, Any]:
    """Render the conversations into `run`, as `sft` would, and return what there is; `sft` finds them ready."""
    knobs_, data = check(sft_section, data_section)
    model, tokenizer = start_tuning(knobs_.start, torch.device("cpu"))
    set_template(tokenizer, data.template, data.template_options)
    parts: dict[str, Any] = prepare_chat(Path(run) / DATA, data, tokenizer, model.card.block_size)["parts"]
    return parts


def _check_model(model: DiffusionModel, data: ChatDataKnobs, eos: int) -> None:
    """Raise `ConfigError` for rows that the model cannot address, and for an end of text that it never writes."""
    context = model.causal_lm.config.max_position_embeddings
    if data.sequence_length > context:
        raise ConfigError(f"chat.sequence_length {data.sequence_length} exceeds the context of {context}", "lower it")
    if model.banned[eos]:
        raise ConfigError(f"the end of text, id {eos}, is never generated", "give the tokenizer another eos_token")


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of `run.json` decides a fine-tuning's numbers. Sections are built anew, as in conversion."""
    section = plain(build(SftKnobs, record["config"].get("sft", {}), f"{RUN_FILE}: sft"))
    section["train"] = comparable_train(section["train"], record.get("processes", 1))
    for name in ("device", "samples", "model"):
        del section[name]
    if section["parent"] is not None:
        del section["parent"]["name"]  # where its weights lie does not matter, what they are does
    chat = {**record["chat"], "packing": record["config"]["data"].get("packing", True)}
    start = {"start (hash of the weights)": record.get("start")}
    return {"profile": record["config"].get("profile"), "sft": section, **start, "data": chat}


def _losses(knobs_: SftKnobs, manifest: Mapping[str, Any]) -> dict[str, Supervision]:
    losses = make_losses(knobs_.losses, "sft.losses")
    without = [name for name, loss in losses.items() if loss.needs_graphs]
    if without and not manifest["parts"]["train"]["graphs"]:
        raise ConfigError(
            f"sft.losses: {without[0]!r} needs causal graphs, and no example has one",
            "write them with hildanext prepare --graphs, and train on the file it makes",
        )
    return losses


def _stage(
    knobs_: SftKnobs,
    data: ChatDataKnobs,
    run: Path,
    step: SupervisedStep,
    tokenizer: Any,
    real: torch.Tensor,
    best: Best,
) -> Stage:
    model, eos = step.model, int(tokenizer.eos_token_id)
    block_size, batch_size = model.card.block_size, knobs_.train.batch_size
    dataset, valid = (
        ChatDataset(run / DATA, part, data.sequence_length, block_size, eos, data.packing)
        for part in ("train", "valid")
    )
    held_out = drawn_batches(valid, knobs_.valid_rows, batch_size)
    bound, edits = Validation(held_out, eos, model.card), EditCheck(held_out, model.card, real)
    total = max(1, round(knobs_.epochs * dataset.tokens))
    return Stage(
        total_tokens=total,
        rung=lambda tokens: Rung(phase="stable", block_size=block_size, tokens=total),
        views=Views(dataset, batch_size, knobs_, model.card, real, knobs_.seed, dataset.pairs),
        validate=lambda step, number: {**bound(step, number), **edits(step, number)},
        turns=knobs_.turns,
        seed=knobs_.seed,
        on_evaluation=best,
        on_saved=best.tidy,
        samples=SampleAnswers(valid, model, tokenizer, knobs_.samples),
        finished=lambda: best.stuck(knobs_.patience),
        pad_id=eos,
        counters=best.found,
    )


def _finish(
    run: Path,
    counters: Mapping[str, Any],
    stage: Stage,
    step: SupervisedStep,
    best: Best,
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
