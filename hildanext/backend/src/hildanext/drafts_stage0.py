"""Stage 0, the other way: the parent stays as it is, and adapters on masked rows learn to draft for it.

`convert_kept` is the whole stage: parent and data in, a run folder with draft adapters out. Nothing of the parent is
written; what the adapters draft, the parent keeps or edits (`exact`).
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from hildanext.core.config import Seed, config, merge, plain, validate
from hildanext.core.errors import ConfigError
from hildanext.core.json_text import parse
from hildanext.core.run_dir import expand_home
from hildanext.corruption.noised_batches import CleanBatches
from hildanext.corruption.schedules import BlockPhase, LearningRate, MaskNoise
from hildanext.data.batch import RowDataset
from hildanext.data.chat_dataset import (
    ChatDataConfig,
    ChatDataset,
    chat_identity,
    chat_rows,
    open_sources,
    prepare_chat,
)
from hildanext.data.chat_template import set_template
from hildanext.data.frequent_tokens import frequent_tokens
from hildanext.data.overlap import count_overlap
from hildanext.losses.draft import DraftLossConfig, DraftNoise, DraftStep
from hildanext.models.draft_card import DraftCard
from hildanext.models.draft_checkpoint import rehearse_drafts, save_drafts
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig
from hildanext.models.loading.files import weights_hash
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.names import locate
from hildanext.models.quantize import Quantize, place
from hildanext.trainer.best_checkpoints import BestCheckpoints
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.draft_validation import DraftValidation
from hildanext.trainer.run import CHECKPOINT, TrainingRun, comparable_section
from hildanext.trainer.task import Callbacks, TrainingTask
from hildanext.trainer.validation import drawn_batches
from hildanext.training import train
from hildanext.wsd_stage0 import ConvertConfig, DataConfig, open_data, refuse_other_kind, shards_of

DATA = "data"
"""Of a run's folder: conversations as tokens."""
TRAIN_DEFAULTS = {"learning_rate": {"peak": 2e-3, "warmup": 0.03, "decay": 0.4}, "weight_decay": 0.0}
"""Under what the section says: adapters alone learn, at a higher rate than whole models, and not towards zero."""
INSTEAD = {
    "lora": "drafts.lora",
    "losses": "drafts.loss",
    "block_size": "drafts.places",
    "wsd": "drafts.mask_positions",
}
"""What says here what a key of an ordinary conversion says there."""

UNTOLD = ("name", "weights", "batch_size", "seed")
"""Of a source, in the card's words: what changes nothing that a reader would ask."""


@config
class DraftsConfig:
    """What drafts, and how it learns to."""

    places: int = Field(default=4, ge=1, le=16)
    """Tokens that are drafted at a time. A checkpoint drafts any smaller number too."""
    enter: int = Field(default=0, ge=0)
    """The layer at which masks enter, from the last clean token's state there; 0 is the embedding."""
    shared_place: bool = False
    """One vector for all places of a group, in place of one for each."""
    sampler: int | None = Field(default=512, ge=1)
    """Inner size of a head that tells each mask the token before its own; None: there is none."""
    vocabulary: int | None = Field(default=16_384, ge=1)
    """How many tokens drafts may say, the most frequent of the training data; None, or as many as there are: all."""
    lora: GatedLoraConfig = GatedLoraConfig()
    loss: DraftLossConfig = DraftLossConfig()
    noise: DraftNoise = DraftNoise()
    mask_positions: int = Field(default=2_000_000, ge=1)
    """The length of the run: masks that are learnt. Schedules are shares of it."""

    def __post_init__(self) -> None:
        if self.noise.share and self.enter:
            raise ConfigError(
                f"noise.share {self.noise.share:g} with enter {self.enter}",
                "a row that shows a token begins at its embedding: set enter to 0, or noise.share to 0",
            )


@config
class KeepConfig:
    """The recipe of a conversion that keeps its parent."""

    parent: str
    keep_parent: Literal[True] = True
    drafts: DraftsConfig = DraftsConfig()
    chat: ChatDataConfig | None = None
    """Conversations in place of the section `data`: their answers alone are learnt."""
    quantize: Quantize | None = None
    """`nf4`: the parent's linear layers in 4 bits (QLoRA), which is then who teaches."""
    valid_rows: int = Field(default=32, ge=1)
    device: str = "auto"
    trust_remote_code: bool = False
    seed: Seed = 0
    train: TrainConfig = TrainConfig()


def keeps_parent(convert_section: Mapping[str, Any]) -> bool:
    """Whether a section `convert` is about a parent that stays. Raises `ConfigError` where it says both."""
    keep = convert_section.get("keep_parent", False)
    if not isinstance(keep, bool):
        raise ConfigError(f"convert.keep_parent: {keep!r}", "give true or false")
    if not keep and "drafts" in convert_section:
        raise ConfigError("convert.drafts without keep_parent", "set convert.keep_parent to true, or leave drafts out")
    return keep


def convert_kept(
    convert_section: Mapping[str, Any],
    data_section: Mapping[str, Any],
    folder: str | Path,
    profile: str = "SAFE",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run (or resume) the training of a parent's draft adapters in a folder and return its summary.

    Writes `run.json`, `metrics.jsonl`, `state/` (to resume), `best/`, `checkpoint/` (the adapters) and plots.
    Raises `ConfigError`, `ModelError`, `DataError`, `TrainingStopped` or `CheckpointError`.
    """
    config, data = check(convert_section, data_section)
    run = TrainingRun(folder, config)
    drafter, tokenizer = _start(config, run)
    source = _chat(config.chat, run, tokenizer) if config.chat is not None else _packed(data, tokenizer, drafter)
    card = _card(config, source, drafter)
    resolved = {"profile": profile, "convert": plain(config), "data": plain(data)}
    record = run.record(resolved, full=[], start=card.parent_hash, data=source.identity)
    run.check_resumes(record, _comparable)
    run.on_main(source.prepare)
    dataset, valid = source.open()
    if drafter.draft_tokens is not None:
        chosen = frequent_tokens(source.documents()[0], len(drafter.draft_tokens), len(drafter.head))
        drafter.draft_tokens.copy_(torch.tensor(chosen))
    overlap = run.on_main(lambda: count_overlap(*source.documents()))
    run.write_record({**record, "held_out": overlap})
    run.on_main(lambda: rehearse_drafts(run.folder, drafter, card))
    step = DraftStep(drafter, config.drafts.loss, config.train.chunk, config.drafts.noise)
    best = BestCheckpoints(run.folder, partial(_save, drafter, card), 1, "tokens_per_forward", highest=True)
    task = _task(config, dataset, valid, best)
    run.measure_start(task, step)
    counters = train(step, task, config.train, run.folder, quiet, run.accelerator)
    return run.finish(counters, task, lambda whole: _conclude(run, counters["step"], whole, best))


def check(convert_section: Mapping[str, Any], data_section: Mapping[str, Any]) -> tuple[KeepConfig, DataConfig]:
    """Validate the two sections without loading anything heavy. Raises `ConfigError`."""
    section = _without_strangers(convert_section)
    if isinstance(section.get("train", {}), Mapping):
        section["train"] = merge(TRAIN_DEFAULTS, section.get("train", {}))
    config = validate(KeepConfig, section, "convert")
    if config.train.mask_noise != MaskNoise() or config.train.layout != "auto":
        what = "layout" if config.train.layout != "auto" else "mask_noise"
        raise ConfigError(f"convert.train.{what} means nothing where the parent is kept", "leave it out")
    if data_section.get("pad_to_block") not in (None, 1):
        raise ConfigError(
            f"data.pad_to_block {data_section['pad_to_block']} means nothing where the parent is kept",
            "leave it out, or set it to null: a group of masks may stand anywhere",
        )
    data = replace(validate(DataConfig, {"packing": "best_fit", **data_section}, "data"), pad_to_block=None)
    if config.chat is not None:
        open_sources(config.chat)
    elif data.sequence_length < config.drafts.places + 2:
        raise ConfigError(
            f"data.sequence_length {data.sequence_length} has no room for a group of {config.drafts.places} drafts",
            "raise it, or lower convert.drafts.places",
        )
    return config, data


def _without_strangers(section: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys of an ordinary conversion, where they are at their defaults. Raises `ConfigError` for others."""
    own = {part.name for part in fields(KeepConfig)}  # type: ignore[arg-type]
    theirs = {part.name: part.default for part in fields(ConvertConfig) if part.name not in own}  # type: ignore[arg-type]
    given = {name: value for name, value in section.items() if name in theirs}
    asked = [name for name, value in given.items() if theirs[name] is MISSING or value != _default(theirs[name])]
    if asked:
        instead = [f"{INSTEAD[name]} stands for {name}" for name in asked if name in INSTEAD]
        hint = "leave " + ("it" if len(asked) == 1 else "them") + " out" + "".join(f"; {words}" for words in instead)
        raise ConfigError(f"convert.keep_parent: {', '.join(asked)} would mean nothing", hint)
    return {name: value for name, value in section.items() if name not in given}


def _default(value: Any) -> Any:
    """As JSON has it."""
    default = getattr(value, "default", value)  # pydantic keeps its own object where a field has bounds
    return parse(json.dumps(default))


def _start(config: KeepConfig, run: TrainingRun) -> tuple[Drafter, PreTrainedTokenizerBase]:
    """The frozen parent with untrained adapters, in the dtype that the run computes in."""
    dtype = torch.bfloat16 if run.accelerator.mixed_precision == "bf16" else torch.float32
    drafts = config.drafts
    causal_lm, tokenizer = load_parent(
        config.parent, dtype, run.device, config.trust_remote_code, as_stored=config.quantize is not None
    )
    place(causal_lm, dtype, run.device, config.quantize)
    words = drafts.vocabulary
    if words is not None and words >= len(causal_lm.get_output_embeddings().weight):
        words = None
    shape = (drafts.lora, drafts.places, drafts.enter, drafts.shared_place, drafts.sampler, words)
    return Drafter(causal_lm, *shape), tokenizer


@dataclass(frozen=True)
class _Source:
    """Where the rows come from."""

    identity: dict[str, Any]
    """What decides them."""
    trained_on: str
    prepare: Callable[[], object]
    """Done by one process, once it is known that the run goes on under it."""
    open: Callable[[], tuple[RowDataset, RowDataset]]
    documents: Callable[[], tuple[Iterable[np.ndarray], Iterable[np.ndarray]]]


def _packed(data: DataConfig, tokenizer: PreTrainedTokenizerBase, drafter: Drafter) -> _Source:
    """Raises `DataError` (see `wsd_stage0.open_data`)."""
    train_rows, valid_rows = open_data(data, tokenizer, len(drafter.head))
    return _Source(
        {"train": shards_of(train_rows), "valid": shards_of(valid_rows)},
        "; ".join(dict.fromkeys(_told(manifest["settings"]["source"]) for _, manifest in train_rows.manifests)),
        lambda: None,
        lambda: (train_rows, valid_rows),
        lambda: (train_rows.documents(), valid_rows.documents()),
    )


def _told(source: Mapping[str, Any]) -> str:
    """In words: the parent's own text or somebody else's, and its knobs."""
    name = source.get("name", "?")
    kind = "the parent's own text" if name == "parent" else f"text of the source {name!r}"
    told = {key: value for key, value in source.items() if key not in UNTOLD and value is not None}
    return f"{kind} ({', '.join(f'{key} {value}' for key, value in told.items())})" if told else kind


def _chat(chat: ChatDataConfig, run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> _Source:
    """Answers alone; a group of masks may stand anywhere, so that no block of theirs is filled."""
    set_template(tokenizer, chat.template, chat.template_options)
    folder, end = run.folder / DATA, int(tokenizer.eos_token_id)
    return _Source(
        chat_identity(chat, tokenizer, 1),
        f"answers of conversations of the source {chat.train['name']!r}",
        lambda: prepare_chat(folder, chat, tokenizer, 1),
        lambda: (
            ChatDataset(folder, "train", chat.sequence_length, 1, end, chat.packing),
            ChatDataset(folder, "valid", chat.sequence_length, 1, end, chat.packing),
        ),
        lambda: (chat_rows(folder, "train"), chat_rows(folder, "valid")),
    )


def _card(config: KeepConfig, source: _Source, drafter: Drafter) -> DraftCard:
    """What the adapters are to say of themselves, but for what is measured."""
    drafts, here = config.drafts, expand_home(config.parent)
    return DraftCard(
        parent=str(here.resolve()) if here.exists() else config.parent,
        parent_hash=weights_hash(locate(config.parent)),
        places=drafts.places,
        enter=drafts.enter,
        shared_place=drafts.shared_place,
        sampler=drafts.sampler,
        vocabulary=None if drafter.draft_tokens is None else len(drafter.draft_tokens),
        lora=drafts.lora,
        trained_on=source.trained_on + ("; the parent in 4 bits (nf4)" if config.quantize is not None else ""),
    )


def _save(drafter: Drafter, card: DraftCard, folder: Path, measured: Mapping[str, Any]) -> None:
    """Write the adapters with what was measured of them."""
    seen, acceptance = measured["mask_positions"], tuple(measured["acceptance"])
    save_drafts(folder, drafter, replace(card, acceptance=acceptance, mask_positions=seen))


def _task(config: KeepConfig, dataset: RowDataset, valid: RowDataset, best: BestCheckpoints) -> TrainingTask:
    drafts, rows = config.drafts, config.train.batch_size
    held_out = drawn_batches(valid, config.valid_rows, rows)
    return TrainingTask(
        total=drafts.mask_positions,
        unit="mask_positions",
        block_phase=partial(_phase, config.train.learning_rate, drafts),
        views=CleanBatches(dataset, rows, config.seed),
        validate=DraftValidation(held_out, drafts.places, drafts.loss.groups),
        seed=config.seed,
        pad_id=None,
        callbacks=Callbacks(on_evaluation=best, on_saved=best.prune, state=best.state),
    )


def _phase(rate: LearningRate, drafts: DraftsConfig, done: int) -> BlockPhase:
    """The learning rate's warm-up, stable stretch and decay; the group's size stays."""
    share = done / drafts.mask_positions
    name: Literal["warmup", "stable", "decay"] = "stable"
    if share < rate.warmup:
        name = "warmup"
    elif share > 1.0 - rate.decay:
        name = "decay"
    return BlockPhase(phase=name, block_size=drafts.places, tokens=drafts.mask_positions)


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of `run.json` decides a training's numbers. Where parent and data lie does not, what they are does."""
    refuse_other_kind(record, keeps=True)
    section = comparable_section(KeepConfig, record, "convert", ("device", "trust_remote_code", "parent"))
    data = comparable_section(DataConfig, record, "data", ("train", "valid"))
    start = {"start (hash of the weights)": record.get("start")}
    return {
        "profile": record["config"].get("profile"),
        "convert": section,
        **start,
        "data": data | {"shards": record["data"]},
    }


def _conclude(run: TrainingRun, number: int, whole: bool, best: BestCheckpoints) -> dict[str, Any]:
    """Put the best checkpoint in its place, and say what was measured."""
    evaluations, kept, checkpoint = run.evaluations(), best.steps(), run.folder / CHECKPOINT
    summary: dict[str, Any] = {"before": evaluations.get(0), "last": evaluations.get(number)}
    if not whole:
        return summary
    if kept:
        best.copy_to(checkpoint)
        summary["best"] = evaluations.get(kept[0])
    else:
        best.write(checkpoint, evaluations[number])
    return {**summary, "checkpoint": str(checkpoint)}
