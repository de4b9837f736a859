"""Stage 0: an autoregressive model becomes an editable diffusion model by Warmup-Stable-Decay.

`convert` is the whole stage: parent and data in, a run folder with a diffusion checkpoint out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from hildanext.best import Best
from hildanext.config import build, check_profile, knobs, plain
from hildanext.datasets import PackedDataset, Packing
from hildanext.errors import ConfigError
from hildanext.log import read_metrics
from hildanext.loop.processes import on_main, open_accelerator
from hildanext.loop.state import check_resumes
from hildanext.models.adapters import LoraKnobs, add_lora
from hildanext.models.card import Alignment
from hildanext.models.checkpoint import load_weights, merge_checkpoints, save_diffusion
from hildanext.models.quantize import Quantize, check_quantize
from hildanext.models.start import adopt_edges, start_conversion
from hildanext.noising import NoiseKnobs
from hildanext.plots import training_plots
from hildanext.runfolder import RUN_FILE, open_run
from hildanext.runtime import machine, seed_everything
from hildanext.schedules import Rung, check_padding, check_rungs, rung_at, total_tokens
from hildanext.supervision import SupervisedStep, Supervision, make_losses
from hildanext.teacher import reader, teacher_for
from hildanext.tokenization import real_ids
from hildanext.training import METRICS, Stage, TrainKnobs, comparable_train, ready_device, train
from hildanext.validation import Validation, first_batches
from hildanext.views import Views

CHECKPOINT = "checkpoint"


@knobs
class DataKnobs:
    """Packed shards (see `hildanext prepare`) and how rows are cut from them."""

    train: str
    valid: str
    sequence_length: int = Field(default=256, ge=2)
    packing: Packing = "documents"
    pad_to_block: int | None = Field(default=32, ge=1)


@knobs
class ConvertKnobs(NoiseKnobs):
    """The recipe of a conversion. The defaults are what the project's own comparison favours (docs/results)."""

    parent: str
    alignment: Alignment = "block"
    block_size: int = Field(default=32, ge=1)
    """The block size the checkpoint is meant to decode with; validation measures the bound at it."""
    wsd: tuple[Rung, ...]
    losses: tuple[dict[str, Any], ...] = (
        {"name": "m2t", "weight": 0.5},
        {"name": "kl", "weight": 0.5},
        {"name": "t2t", "keep": 0.1},
    )
    turns: int = Field(default=1, ge=1, le=4)
    """Forwards per view: the second and later ones start from the model's own draft."""
    lora: LoraKnobs | None = None
    quantize: Quantize | None = None
    """`nf4`: the frozen linear layers under the adapters in 4 bits (QLoRA). The teacher is then the 4-bit parent."""
    merge_top_k: int = Field(default=1, ge=1)
    valid_rows: int = Field(default=32, ge=1)
    device: str = "auto"
    trust_remote_code: bool = False
    seed: int = 0
    train: TrainKnobs = TrainKnobs()


def convert(
    convert_section: Mapping[str, Any],
    data_section: Mapping[str, Any],
    run: str | Path,
    profile: str = "SAFE",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run (or resume) a conversion in the folder `run` and return its summary.

    Writes `run.json`, `metrics.jsonl`, `state/` (to resume), `checkpoint/` (the diffusion model) and plots.
    Raises `ConfigError`, `ModelError`, `DataError`, `TrainingStopped` or `CheckpointError`.
    """
    check_profile(profile, convert_section, "convert")
    knobs_, data = check(convert_section, data_section)
    run, accelerator = Path(run), open_accelerator(knobs_.train.precision, knobs_.device)
    device = accelerator.device
    ready_device(knobs_.train, device)
    seed_everything(knobs_.seed)
    model, tokenizer = start_conversion(
        knobs_.parent, knobs_.alignment, knobs_.block_size, torch.float32, device,
        mask_delta=knobs_.lora is not None, trust_remote_code=knobs_.trust_remote_code, quantize=knobs_.quantize,
    )  # fmt: skip
    dataset, valid = (open_data(folder, data, tokenizer) for folder in (data.train, data.valid))
    for part in (dataset, valid):
        if part.vocab_size > model.card.vocab_rows:
            raise ConfigError(
                "the data was prepared with a larger vocabulary", "prepare it with this parent's tokenizer"
            )
    adopt_edges(model, tokenizer, [(part.bos_id, part.pad_id) for part in (dataset, valid)])
    if knobs_.lora is not None:
        add_lora(model, knobs_.lora)
    losses = _losses(knobs_)
    teacher = teacher_for(
        losses.values(), model, knobs_.parent, knobs_.train.precision, knobs_.lora is not None, knobs_.trust_remote_code
    )
    step = SupervisedStep(
        model, losses, teacher.head if teacher else None, knobs_.train.chunk, layout=knobs_.train.layout
    )
    real = real_ids(model.card, tokenizer).nonzero()[:, 0]
    held_out = first_batches(valid, knobs_.valid_rows, knobs_.train.batch_size)
    best = Best(run, model, tokenizer, knobs_.merge_top_k if knobs_.merge_top_k > 1 else 0)
    stage = Stage(
        total_tokens=total_tokens(knobs_.wsd),
        rung=lambda tokens: rung_at(knobs_.wsd, tokens),
        views=Views(dataset, knobs_.train.batch_size, knobs_, model.card, real, knobs_.seed),
        validate=Validation(held_out, valid.pad_id, model.card),
        teacher=reader(teacher, model),
        turns=knobs_.turns,
        seed=knobs_.seed,
        on_evaluation=best,
        on_saved=best.tidy,
        pad_id=valid.pad_id,
        counters=best.found,
    )
    config = {"profile": profile, "convert": plain(knobs_), "data": plain(data)}
    hashes = {name: _shards(part) for name, part in (("train", dataset), ("valid", valid))}
    extra = {"machine": machine(device), "data": hashes, "processes": accelerator.num_processes}
    on_main(accelerator, lambda: _open(run, config, knobs_.seed, extra))
    counters = train(step, stage, knobs_.train, run, quiet, accelerator)
    return on_main(accelerator, lambda: _finish(run, counters, stage, step, best, tokenizer))


def check(convert_section: Mapping[str, Any], data_section: Mapping[str, Any]) -> tuple[ConvertKnobs, DataKnobs]:
    """Validate the two sections without loading anything heavy. Raises `ConfigError`."""
    knobs_ = build(ConvertKnobs, convert_section, "convert")
    data = build(DataKnobs, data_section, "data")
    check_rungs(knobs_.wsd, data.sequence_length)
    if data.sequence_length % knobs_.block_size:
        raise ConfigError(
            f"block size {knobs_.block_size} does not divide the sequence length {data.sequence_length}",
            "choose a block size that divides data.sequence_length",
        )
    if data.packing == "documents":
        check_padding(knobs_.wsd, knobs_.block_size, data.pad_to_block)
    if knobs_.merge_top_k > 1 and knobs_.lora is not None:
        raise ConfigError(
            f"convert.merge_top_k {knobs_.merge_top_k} with lora", "checkpoints of adapters are not merged; set it to 1"
        )
    check_quantize(knobs_.quantize, knobs_.lora is not None)
    _losses(knobs_)
    return knobs_, data


def _losses(knobs_: ConvertKnobs) -> dict[str, Supervision]:
    losses = make_losses(knobs_.losses, "convert.losses")
    without = [name for name, loss in losses.items() if loss.needs_graphs]
    if without:
        raise ConfigError(f"convert.losses: {without[0]!r} needs causal graphs", "packed text has none; use it in sft")
    return losses


def open_data(folder: str, data: DataKnobs, tokenizer: Any) -> PackedDataset:
    """Raises `DataError` where the shards are not whole or were cut by another tokenizer."""
    return PackedDataset(folder, data.sequence_length, data.packing, data.pad_to_block, tokenizer=tokenizer)


def _shards(dataset: PackedDataset) -> list[dict[str, Any]]:
    """Every shard's token count and hashes."""
    return [entry for _, manifest in dataset.manifests for entry in manifest["shards"]]


def _open(run: Path, config: Mapping[str, Any], seed: int, extra: Mapping[str, Any]) -> None:
    check_resumes(run, {"config": config, **extra}, _comparable)
    open_run(run, config, seed, extra)


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of `run.json` decides a conversion's numbers. Where the data lies does not, what is in it does.

    Sections are built anew, so that knobs which an older version did not know have their defaults.
    """
    config = record["config"]
    section = plain(build(ConvertKnobs, config.get("convert", {}), f"{RUN_FILE}: convert"))
    data = plain(build(DataKnobs, config.get("data", {}), f"{RUN_FILE}: data"))
    section["train"] = comparable_train(section["train"], record.get("processes", 1))
    for mapping, harmless in ((section, ("device", "trust_remote_code")), (data, ("train", "valid"))):
        for name in harmless:
            del mapping[name]
    return {"profile": config.get("profile"), "convert": section, "data": {**data, "shards": record["data"]}}


def _finish(
    run: Path, counters: dict[str, Any], stage: Stage, step: SupervisedStep, best: Best, tokenizer: Any
) -> dict[str, Any]:
    """Merge where asked, write the checkpoint and the plots."""
    whole = counters["tokens"] >= stage.total_tokens
    told = ("step", "tokens", "real_tokens", "seconds")
    summary: dict[str, Any] = {**{name: counters[name] for name in told}, "whole": whole}
    assert stage.validate is not None
    step.eval()
    if whole:
        with torch.no_grad():
            summary["last"] = stage.validate(step, counters["step"])
            folders = best.folders()
            if len(folders) > 1:
                before = {name: value.clone() for name, value in step.model.causal_lm.state_dict().items()}
                load_weights(step.model, merge_checkpoints(folders))
                summary["merged"] = stage.validate(step, counters["step"])
                if summary["merged"]["bound"] > summary["last"]["bound"]:
                    step.model.causal_lm.load_state_dict(before)
        save_diffusion(run / CHECKPOINT, step.model, tokenizer)
        summary["checkpoint"] = str(run / CHECKPOINT)
    training_plots(read_metrics(run / METRICS), run / "plots")
    return summary
