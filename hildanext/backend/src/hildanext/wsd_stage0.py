"""Stage 0: an autoregressive model becomes an editable diffusion model by Warmup-Stable-Decay.

`convert` is the whole stage: parent and data in, a run folder with a diffusion checkpoint out.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from hildanext.core.config import RowLength, Seed, config, plain, validate
from hildanext.core.errors import ConfigError
from hildanext.core.registry import admit, under_profile
from hildanext.corruption.noised_batches import NoisedBatches
from hildanext.corruption.noising import NoiseConfig
from hildanext.corruption.schedules import BlockPhase, check_padding, check_phases, phase_at, total_tokens
from hildanext.data.overlap import count_overlap
from hildanext.datasets import PackedDataset, Packing
from hildanext.losses import SupervisedStep, TokenLoss, make_losses
from hildanext.losses.residual_inputs import ResidualConfig
from hildanext.models.card import Alignment
from hildanext.models.checkpoint import load_weights, merge_checkpoints, save_diffusion
from hildanext.models.document_edges import adopt_edges
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.models.quantize import Quantize, check_quantize
from hildanext.models.start import start_conversion
from hildanext.tokenization import real_ids
from hildanext.trainer.best_checkpoints import BestCheckpoints
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.residual_reference import reference_hash, with_reference
from hildanext.trainer.run import CHECKPOINT, TrainingRun, comparable_section, refuse_graph_losses
from hildanext.trainer.task import Callbacks, TrainingTask
from hildanext.trainer.validation import Validation, first_batches
from hildanext.training import train


@config
class DataConfig:
    """Packed shards (see `hildanext prepare`) and how rows are cut from them."""

    train: str
    valid: str
    sequence_length: RowLength = 256
    packing: Packing = "documents"
    pad_to_block: int | None = Field(default=32, ge=1)


@config
class ConvertConfig(NoiseConfig):
    """The recipe of a conversion. The defaults are what the project's own comparison favours (docs/results)."""

    parent: str
    alignment: Alignment = "block"
    block_size: int = Field(default=32, ge=1)
    """The block size the checkpoint is meant to decode with; validation measures the bound at it."""
    wsd: tuple[BlockPhase, ...]
    losses: tuple[dict[str, Any], ...] = (
        {"name": "m2t", "weight": 0.5},
        {"name": "kl", "weight": 0.5},
        {"name": "t2t", "keep": 0.1},
    )
    turns: int = Field(default=1, ge=1, le=4)
    """Forwards per view: the second and later ones start from the model's own draft."""
    residual: ResidualConfig | None = None
    """Masks are fed with what a frozen reference thinks of them (FULL); for the decoder `residual`."""
    lora: LoraConfig | None = None
    quantize: Quantize | None = None
    """`nf4`: the frozen linear layers under the adapters in 4 bits (QLoRA). The teacher is then the 4-bit parent."""
    merge_top_k: int = Field(default=1, ge=1)
    valid_rows: int = Field(default=32, ge=1)
    device: str = "auto"
    trust_remote_code: bool = False
    seed: Seed = 0
    train: TrainConfig = TrainConfig()


def convert(
    convert_section: Mapping[str, Any],
    data_section: Mapping[str, Any],
    folder: str | Path,
    profile: str = "SAFE",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run (or resume) a conversion in a folder and return its summary.

    Writes `run.json`, `metrics.jsonl`, `state/` (to resume), `checkpoint/` (the diffusion model) and plots.
    Raises `ConfigError`, `ModelError`, `DataError`, `TrainingStopped` or `CheckpointError`.
    """
    with under_profile(profile, "convert") as full:
        config, data = check(convert_section, data_section)
        losses = _losses(config)
    run = TrainingRun(folder, config)
    model, tokenizer = start_conversion(
        config.parent, config.alignment, config.block_size, torch.float32, run.device,
        mask_delta=config.lora is not None, trust_remote_code=config.trust_remote_code, quantize=config.quantize,
    )  # fmt: skip
    dataset, valid = open_data(data, tokenizer, model.card.vocab_rows)
    adopt_edges(model, tokenizer, [(part.bos_id, part.pad_id) for part in (dataset, valid)])
    if config.residual is not None:
        model.card = replace(model.card, residual=config.residual.card)
    # Adapters draw their weights from the seed that the run has just set: nothing may draw between.
    if config.lora is not None:
        add_lora(model, config.lora)
    resolved = {"profile": profile, "convert": plain(config), "data": plain(data)}
    overlap = run.on_main(lambda: count_overlap(dataset.documents(), valid.documents()))
    shards = {"train": shards_of(dataset), "valid": shards_of(valid)}
    facts = {"reference": reference_hash(config.residual)} if config.residual is not None else {}
    record = run.record(resolved, full=sorted(full), data=shards, held_out=overlap, **facts)
    run.check_resumes(record, _comparable)
    run.write_record(record)
    step, teacher = run.supervised(
        model, tokenizer, losses, config.parent, config.lora is not None, config.trust_remote_code,
        residual=config.residual, adapted=config.lora is not None,
    )  # fmt: skip
    best = BestCheckpoints(
        run.folder,
        lambda folder, measured: save_diffusion(folder, model, tokenizer),
        config.merge_top_k if config.merge_top_k > 1 else 0,
    )
    run.rehearse_save(model, tokenizer, best)
    real = real_ids(model.card, tokenizer).nonzero()[:, 0]
    held_out = first_batches(valid, config.valid_rows, config.train.batch_size)
    task = TrainingTask(
        total=total_tokens(config.wsd),
        block_phase=lambda tokens: phase_at(config.wsd, tokens),
        views=NoisedBatches(dataset, config.train.batch_size, config, model.card, real, config.seed),
        validate=Validation(held_out, valid.pad_id, model.card),
        teacher=teacher,
        turns=config.turns,
        seed=config.seed,
        pad_id=valid.pad_id,
        callbacks=Callbacks(on_evaluation=best, on_saved=best.prune, state=best.state),
    )
    counters = train(step, task, config.train, run.folder, quiet, run.accelerator)
    return run.finish(counters, task, lambda whole: _conclude(run, counters["step"], task, step, best) if whole else {})


def check(convert_section: Mapping[str, Any], data_section: Mapping[str, Any]) -> tuple[ConvertConfig, DataConfig]:
    """Validate the two sections without loading anything heavy. Raises `ConfigError`."""
    config = validate(ConvertConfig, convert_section, "convert")
    _losses(config)
    if config.residual is not None:
        admit("convert", "residual")
    data = validate(DataConfig, data_section, "data")
    check_phases(config.wsd, data.sequence_length)
    if data.sequence_length % config.block_size:
        raise ConfigError(
            f"block size {config.block_size} does not divide the sequence length {data.sequence_length}",
            "choose a block size that divides data.sequence_length",
        )
    if data.packing == "documents":
        check_padding(config.wsd, config.block_size, data.pad_to_block)
    if config.merge_top_k > 1 and config.lora is not None:
        raise ConfigError(
            f"convert.merge_top_k {config.merge_top_k} with lora", "checkpoints of adapters are not merged; set it to 1"
        )
    check_quantize(config.quantize, config.lora is not None)
    return config, data


def _losses(config: ConvertConfig) -> dict[str, TokenLoss]:
    losses = make_losses(config.losses, "convert.losses")
    refuse_graph_losses(losses, "convert.losses", "", "packed text has none; use it in sft")
    return losses


def open_data(data: DataConfig, tokenizer: Any, rows: int) -> tuple[PackedDataset, PackedDataset]:
    """What is trained on and what is held out, for a model with so many rows of the embedding.

    Raises `DataError` where the shards are not whole or were cut by another tokenizer.
    """
    train, valid = (
        PackedDataset(folder, data.sequence_length, data.packing, data.pad_to_block, tokenizer=tokenizer)
        for folder in (data.train, data.valid)
    )
    if max(train.vocab_size, valid.vocab_size) > rows:
        raise ConfigError("the data was prepared with a larger vocabulary", "prepare it with this parent's tokenizer")
    return train, valid


def shards_of(dataset: PackedDataset) -> list[dict[str, Any]]:
    """Every shard's token count and hashes."""
    return [entry for _, manifest in dataset.manifests for entry in manifest["shards"]]


def refuse_other_kind(record: Mapping[str, Any], keeps: bool) -> None:
    """Raise `ConfigError` where `run.json` is of a conversion that keeps its parent, or does not, unlike this one."""
    there = bool(record["config"].get("convert", {}).get("keep_parent"))
    if there != keeps:
        raise ConfigError(
            f"the folder holds the state of another run: convert.keep_parent was {str(there).lower()} and is "
            f"{str(keeps).lower()}",
            "give another folder",
        )


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of `run.json` decides a conversion's numbers. Where the data lies does not, what is in it does."""
    refuse_other_kind(record, keeps=False)
    section = comparable_section(ConvertConfig, record, "convert", ("device", "trust_remote_code"))
    section = with_reference(section, record)
    data = comparable_section(DataConfig, record, "data", ("train", "valid"))
    shards = {**data, "shards": record["data"]}
    return {"profile": record["config"].get("profile"), "convert": section, "data": shards}


def _conclude(
    run: TrainingRun, number: int, task: TrainingTask, step: SupervisedStep, best: BestCheckpoints
) -> dict[str, Any]:
    """Merge the best checkpoints where asked and where that is no worse, and write the checkpoint."""
    assert task.validate is not None
    model, folders = step.eval().model, best.folders()
    with torch.no_grad():
        measured = {"last": task.validate(step, number)}
        if len(folders) > 1:
            last = {name: value.clone() for name, value in model.causal_lm.state_dict().items()}
            load_weights(model, merge_checkpoints(folders))
            measured["merged"] = task.validate(step, number)
            if measured["merged"]["bound"] > measured["last"]["bound"]:
                model.causal_lm.load_state_dict(last)
    best.write(run.folder / CHECKPOINT, measured)
    return {**measured, "checkpoint": str(run.folder / CHECKPOINT)}
