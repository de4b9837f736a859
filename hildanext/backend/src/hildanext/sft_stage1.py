"""Stage 1: a diffusion model learns to answer, by filling masks and by mending its own drafts.

`sft` is the whole stage: a checkpoint and conversations in, a run folder with the better checkpoint out.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from hildanext.core.config import Seed, config, merge, plain, validate
from hildanext.core.errors import ConfigError
from hildanext.core.registry import admit, under_profile
from hildanext.corruption.noised_batches import NoisedBatches
from hildanext.corruption.noising import NoiseConfig
from hildanext.corruption.schedules import BlockPhase
from hildanext.data.chat_dataset import (
    ChatDataConfig,
    ChatDataset,
    chat_identity,
    chat_rows,
    open_sources,
    prepare_chat,
)
from hildanext.data.chat_template import set_template
from hildanext.data.overlap import count_overlap
from hildanext.decoding import decoder_section, make_decoder
from hildanext.losses import SupervisedStep, make_losses
from hildanext.losses.residual_inputs import ResidualConfig
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.checkpoint import save_diffusion
from hildanext.models.lora import LoraConfig
from hildanext.models.quantize import Quantize, check_quantize
from hildanext.models.tuning import ParentConfig, start_hash, start_tuning
from hildanext.tokenization import real_ids
from hildanext.trainer.best_checkpoints import BestCheckpoints
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.residual_reference import reference_hash, with_reference
from hildanext.trainer.run import CHECKPOINT, TrainingRun, comparable_section, refuse_graph_losses
from hildanext.trainer.sample_generations import SampleAnswers, SampleConfig
from hildanext.trainer.task import Callbacks, TrainingTask
from hildanext.trainer.validation import EditCheck, Validation, drawn_batches
from hildanext.training import train

DATA = "data"
TRAIN_DEFAULTS = {"learning_rate": {"peak": 1e-4, "warmup": 0.03, "decay": 0.97}}
"""Under what the section says: fine-tuning wants a lower rate than conversion, falling from the start."""


@config
class SftConfig(NoiseConfig):
    """The recipe of a fine-tuning.

    Paper: LLaDA2.0, arXiv:2512.15745, sec. 5.1 (prompts clean, band of noise levels, complementary masks), band and
    plain mean from its released code; LLaDA2.1, arXiv:2602.08676, sec. 3.1 (M2T and T2T together, multi-turn forward).
    Differs: rates, weights and the number of turns are ours, as none are published.
    """

    model: str | None = None
    """A diffusion checkpoint. This or `parent`."""
    parent: ParentConfig | None = None
    t_range: tuple[float, float] = (0.3, 0.8)
    complementary: bool = True
    losses: tuple[dict[str, Any], ...] = (
        {"name": "m2t", "weighting": "masked_mean"},
        {"name": "t2t"},
    )
    turns: int = Field(default=2, ge=1, le=4)
    """Forwards per view: each mends wrong tokens, in the first random ones, later the model's own; labels are the
    truth."""
    epochs: float = Field(default=1.0, gt=0)
    residual: ResidualConfig | None = None
    """Masks are fed with what a frozen reference thinks of them (FULL); for the decoder `residual`."""
    lora: LoraConfig | None = None
    quantize: Quantize | None = None
    """`nf4`: the frozen linear layers under the adapters in 4 bits (QLoRA)."""
    teacher: str | None = None
    """The parent for losses that need one; None is the parent that the checkpoint's card names."""
    valid_rows: int = Field(default=64, ge=1)
    select: Literal["bound", "masked_accuracy"] = "bound"
    """What the best checkpoint is best in, on held-out rows."""
    keep: Literal["best", "last"] = "best"
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better one."""
    samples: SampleConfig = SampleConfig()
    device: str = "auto"
    seed: Seed = 0
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.parent is None):
            raise ConfigError("sft needs one start", "give model (a diffusion checkpoint) or parent (autoregressive)")

    @property
    def start(self) -> str | ParentConfig:
        """What is trained."""
        return self.parent if self.parent is not None else str(self.model)

    @property
    def starts_at_teacher(self) -> bool:
        """Whether what is trained is, before its first step, the parent that the losses ask for."""
        return self.parent is not None and self.teacher is None


def sft(
    sft_section: Mapping[str, Any],
    data_section: Mapping[str, Any],
    folder: str | Path,
    profile: str = "SAFE",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run (or resume) a fine-tuning in a folder and return its summary.

    Writes `run.json`, `data/` (the conversations as tokens), `metrics.jsonl`, `state/` (to resume), `best/`,
    `checkpoint/` (the diffusion model) and plots.
    Raises `ConfigError`, `ModelError`, `DataError`, `TrainingStopped` or `CheckpointError`.
    """
    with under_profile(profile, "sft") as full:
        config, data = check(sft_section, data_section)
        losses = make_losses(config.losses, "sft.losses")
    run = TrainingRun(folder, config)
    model, tokenizer = start_tuning(config.start, run.device, config.lora, config.quantize)
    set_template(tokenizer, data.template, data.template_options)
    trained_so = model.card.residual if config.residual is None else config.residual.card
    model.card = replace(model.card, chat=True, residual=trained_so)
    _check_model(model, data, int(tokenizer.eos_token_id))
    record = run.record(
        {"profile": profile, "sft": plain(config), "data": plain(data)},
        full=sorted(full),
        start=start_hash(config.start),
        chat=chat_identity(data, tokenizer, model.card.block_size),
        **({} if config.residual is None else {"reference": reference_hash(config.residual)}),
    )
    run.check_resumes(record, _comparable)
    parts = run.on_main(lambda: prepare_chat(run.folder / DATA, data, tokenizer, model.card.block_size))["parts"]
    overlap = run.on_main(lambda: count_overlap(*(chat_rows(run.folder / DATA, part) for part in ("train", "valid"))))
    run.write_record({**record, "data": {name: parts[name] for name in ("train", "valid")}, "held_out": overlap})
    if not parts["train"]["graphs"]:
        hint = "write them with hildanext prepare --graphs, and train on the file it makes"
        refuse_graph_losses(losses, "sft.losses", ", and no example has one", hint)
    own = config.parent.name if config.parent is not None else model.card.parent
    parent_is_base_model = config.lora is not None and config.starts_at_teacher
    real = real_ids(model.card, tokenizer)
    name = config.teacher if config.teacher is not None else own
    step, teacher = run.supervised(
        model, tokenizer, losses, name, parent_is_base_model, special=~real.to(model.device),
        residual=config.residual, adapted=config.lora is not None,
    )  # fmt: skip
    best = BestCheckpoints(
        run.folder,
        lambda folder, measured: save_diffusion(folder, model, tokenizer),
        int(config.keep == "best"),
        config.select,
        config.select != "bound",
    )
    run.rehearse_save(model, tokenizer, best)
    task = _task(config, data, step, tokenizer, real.nonzero()[:, 0], best)
    task.teacher = teacher
    run.measure_start(task, step)
    counters = train(step, task, config.train, run.folder, quiet, run.accelerator)
    return run.finish(counters, task, lambda whole: _conclude(run, counters["step"], whole, best, parts))


def check(sft_section: Mapping[str, Any], data_section: Mapping[str, Any]) -> tuple[SftConfig, ChatDataConfig]:
    """Validate the two sections without loading anything heavy. Raises `ConfigError`."""
    section = dict(sft_section)
    if isinstance(section.get("train", {}), Mapping):
        section["train"] = merge(TRAIN_DEFAULTS, section.get("train", {}))
    config = validate(SftConfig, section, "sft")
    make_losses(config.losses, "sft.losses")
    if config.residual is not None:
        admit("sft", "residual")
    make_decoder(decoder_section(config.samples.mode))
    data = validate(ChatDataConfig, data_section, "chat")
    open_sources(data)
    check_quantize(config.quantize, config.lora is not None)
    return config, data


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
    """What of `run.json` decides a fine-tuning's numbers."""
    section = with_reference(comparable_section(SftConfig, record, "sft", ("device", "samples", "model")), record)
    if section["parent"] is not None:
        del section["parent"]["name"]  # where its weights lie does not matter, what they are does
    chat = {**record["chat"], "packing": record["config"]["data"].get("packing", True)}
    start = {"start (hash of the weights)": record.get("start")}
    return {"profile": record["config"].get("profile"), "sft": section, **start, "data": chat}


def _task(
    config: SftConfig,
    data: ChatDataConfig,
    step: SupervisedStep,
    tokenizer: PreTrainedTokenizerBase,
    real: torch.Tensor,
    best: BestCheckpoints,
) -> TrainingTask:
    model = step.model
    eos, block_size, batch_size = int(tokenizer.eos_token_id), model.card.block_size, config.train.batch_size
    dataset, valid = (
        ChatDataset(best.run / DATA, part, data.sequence_length, block_size, eos, data.packing)
        for part in ("train", "valid")
    )
    held_out = drawn_batches(valid, config.valid_rows, batch_size)
    bound, edits = Validation(held_out, eos, model.card), EditCheck(held_out, model.card, real)
    total = max(1, round(config.epochs * dataset.tokens))
    return TrainingTask(
        total=total,
        block_phase=lambda tokens: BlockPhase(phase="stable", block_size=block_size, tokens=total),
        views=NoisedBatches(dataset, batch_size, config, model.card, real, config.seed, dataset.pairs),
        validate=lambda step, number: {**bound(step, number), **edits(step, number)},
        turns=config.turns,
        seed=config.seed,
        pad_id=eos,
        callbacks=Callbacks(
            on_evaluation=best,
            on_saved=best.prune,
            samples=SampleAnswers(valid, model, tokenizer, config.samples),
            finished=lambda: best.plateaued(config.patience),
            state=best.state,
        ),
    )


def _conclude(
    run: TrainingRun, number: int, whole: bool, best: BestCheckpoints, parts: Mapping[str, Any]
) -> dict[str, Any]:
    """Put the kept checkpoint in its place, and say what was measured."""
    evaluations, kept, checkpoint = run.evaluations(), best.steps(), run.folder / CHECKPOINT
    summary: dict[str, Any] = {"data": parts, "before": evaluations.get(0), "last": evaluations.get(number)}
    if not whole:
        return summary
    if kept:
        best.copy_to(checkpoint)
        summary["best"] = evaluations.get(kept[0])
    else:
        best.write(checkpoint, {})
    return {**summary, "checkpoint": str(checkpoint)}
