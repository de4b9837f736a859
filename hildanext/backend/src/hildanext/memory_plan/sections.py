"""From the sections of a run to the steps that a plan is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hildanext.core.errors import ConfigError, ModelError
from hildanext.core.run_dir import expand_home
from hildanext.corruption.input_layout import WORTH_WHILE, layout_of
from hildanext.drafts_stage0 import KeepConfig, keeps_parent
from hildanext.drafts_stage0 import check as check_kept
from hildanext.kv_cache.prune import make_prune
from hildanext.losses import make_losses
from hildanext.memory_plan.architecture import Architecture, find_architecture
from hildanext.memory_plan.layer import FLOAT, Feed, Learning, learning
from hildanext.memory_plan.machine import CARD as GPU
from hildanext.memory_plan.machine import Machine
from hildanext.memory_plan.rl import PROMPT, alignment_case, looks_of
from hildanext.memory_plan.rl_time import StepTime, step_time
from hildanext.memory_plan.serving import Serving
from hildanext.memory_plan.step import Case
from hildanext.models.attention.kept import TOGETHER
from hildanext.models.card import CARD, read_card
from hildanext.models.loading.names import locate_diffusion
from hildanext.rl.config import read_config
from hildanext.sft_stage1 import SftConfig
from hildanext.sft_stage1 import check as check_sft
from hildanext.trainer.config import TrainConfig
from hildanext.wsd_stage0 import ConvertConfig, DataConfig
from hildanext.wsd_stage0 import check as check_convert

DEFAULT_BLOCK = 32


@dataclass(frozen=True)
class Question:
    """What is to be planned of one stage: several feeds (block sizes of a conversion), or one for serving."""

    stage: str
    cases: tuple[Case, ...] = ()
    serving: Serving | None = None
    limit: float | None = None
    """`max_vram_fraction` of the section."""
    block_size: int = DEFAULT_BLOCK
    """What the model is to decode with."""
    assumes: tuple[str, ...] = field(default=())
    time: StepTime | None = None
    """Of a step of an alignment on the card that it is meant for."""


def convert_question(section: Mapping[str, Any], data: Mapping[str, Any], machine: Machine) -> Question:
    """Raises `ConfigError` for sections that `convert` would refuse, `ModelError` for an unknown parent."""
    data = {"train": "", "valid": "", **data}
    if keeps_parent(section):
        return _kept_question(*check_kept(section, data), machine)
    config, rows = check_convert({name: value for name, value in section.items() if name != "keep_parent"}, data)
    shape = find_architecture(config.parent)
    feeds = [_rows_fed(config, rows, block) for block in sorted({block_phase.block_size for block_phase in config.wsd})]
    several = config.complementary or config.turns > 1
    cases = tuple(_case(shape, feed, config, machine, several) for feed in feeds)
    limit = config.train.max_vram_fraction
    return Question("convert", cases, None, limit, config.block_size, assumes=("rows without padding",))


def _kept_question(config: KeepConfig, rows: DataConfig, machine: Machine) -> Question:
    """Of a parent that stays: mask rows alone are trained, beside what is kept of the clean ones."""
    shape, train, drafts = find_architecture(config.parent), config.train, config.drafts
    narrow, places, clean = narrow_bytes(train, machine), drafts.places, train.batch_size * rows.sequence_length
    masks, length = drafts.loss.groups * places, rows.sequence_length
    case = Case(
        shape=shape,
        feed=Feed(train.batch_size, masks, 0, places, False, copied_keys(length, drafts.loss.groups, places)),
        how=Learning(narrow, drafts.lora.rank, drafts.lora.targets, config.quantize is not None),
        chunk=train.chunk,
        supervised=train.batch_size * masks,
        teacher="own",
        eight_bit=train.optimizer == "adamw8bit",
        recompute=train.gradient_checkpointing,
        resting=train.offload is not None,
        several=train.accumulate > 1,
        on_cpu=machine.on_cpu,
        frozen=narrow,
        kept=clean * kept_of_a_row(shape, length, drafts.enter, narrow),
    )
    assumes = ["the parent stays: mask rows alone are trained, counted as if all layers had them"]
    if drafts.loss.kept_mib:
        assumes.append(f"up to {drafts.loss.kept_mib:,} MiB of host memory more: rows of the parent (loss.kept_mib)")
    return Question("convert", (case,), None, train.max_vram_fraction, places, tuple(assumes))


def kept_of_a_row(shape: Architecture, length: int, enter: int, narrow: int) -> int:
    """Bytes that stay of one clean row of `length`: keys and values, two states, and its line of the masks."""
    numbers = 2 * shape.key * (shape.layers - enter) + 2 * shape.hidden + length * (shape.heads // shape.kv_heads)
    return numbers * narrow + length


def copied_keys(length: int, groups: int, places: int) -> int:
    """See `Feed.copied`: anchors lie about evenly in the row, and each few groups see what lies before their last."""
    calls = -(-groups // max(TOGETHER // places, 1))
    return length * (calls + 1) // 2 + groups * places


def _rows_fed(config: ConvertConfig, rows: DataConfig, block: int) -> Feed:
    """Both copies of a row, or the one that the layout keeps; by blocks where `pad_to_block` lays them on the grid."""
    length = rows.sequence_length
    reads_clean = any(loss.get("name") == "ar" for loss in config.losses)
    layout = layout_of(block, length, "left" if config.alignment == "parent" else "none", reads_clean)
    noisy, clean = (0 if layout == "clean" else length), (0 if layout == "single" else length)
    on_grid = rows.pad_to_block is not None and rows.pad_to_block % block == 0 and length % block == 0
    return Feed(config.train.batch_size, noisy, clean, block, on_grid and noisy > 0 and clean > 0)


def sft_question(
    section: Mapping[str, Any],
    chat: Mapping[str, Any],
    machine: Machine,
    model: str | None = None,
    block: int | None = None,
    answers: float = 1.0,
) -> Question:
    """`model` and `block` stand for a checkpoint that is not there yet; `answers` is the share of a row that is answer.

    Raises `ConfigError` or `ModelError`.
    """
    started = section.get("parent") is not None or section.get("model") is not None
    config, data = check_sft(section if started else {**section, "model": ""}, chat)  # "" is what a stage before makes
    shape, found_block = _start(config, model)
    block = block if block is not None else found_block
    length = data.sequence_length
    noisy = min(-(-round(length * answers) // block) * block, length)
    noisy = noisy if noisy + length <= WORTH_WHILE * 2 * length else length  # below that the doubled layout is taken
    feed = Feed(config.train.batch_size, noisy, length, block, length % block == 0)
    case = _case(shape, feed, config, machine, config.complementary or config.turns > 1)
    assumes = (f"block size {block}", f"answers fill {answers:.0%} of a row")
    return Question("sft", (case,), None, config.train.max_vram_fraction, block, assumes)


def _start(config: SftConfig, model: str | None) -> tuple[Architecture, int]:
    if config.parent is not None:
        return find_architecture(config.parent.name), config.parent.block_size
    return _checkpoint(config.model or "", model)


def _checkpoint(named: str, model: str | None) -> tuple[Architecture, int]:
    """Of the checkpoint of that name where it is there, else of the model that it is made of."""
    if named:
        try:
            folder: Path | None = locate_diffusion(named)
        except ModelError:
            if expand_home(named).is_dir():
                raise
            folder = None
        if folder is not None and (folder / CARD).is_file():
            return find_architecture(str(folder)), read_card(folder).block_size
    if model is None:
        raise ConfigError(
            f"the checkpoint {named!r} is not there to be looked at",
            "say what it is made of: --model qwen3-0.6b",
        )
    return find_architecture(model), DEFAULT_BLOCK


def rl_question(
    section: Mapping[str, Any],
    machine: Machine,
    model: str | None = None,
    block: int | None = None,
    prompt: int = PROMPT,
) -> Question:
    """`model` and `block` stand for a checkpoint that is not there yet; `prompt` is the tokens of a prompt.

    Raises `ConfigError` or `ModelError`.
    """
    config, seams = read_config({"model": "", **section})
    shape, found_block = _checkpoint(config.model, model)
    block = block if block is not None else found_block
    case = alignment_case(config, seams, shape, block, prompt, narrow_bytes(config.train, machine), machine.on_cpu)
    answer = seams.rollouts.max_new_tokens
    assumes = (
        f"block size {block}",
        f"prompts of {prompt} tokens and answers of {answer}, all of them as long",
        *(("a frozen copy of the weights for the KL",) if seams.objective.wants_reference and not config.lora else ()),
        *(() if case.rollouts is None or case.rollouts.cache_bytes else ("all keys and values are kept (cache_mib)",)),
    )
    time = step_time(config, seams, case, looks_of(seams, block), prompt) if machine.name == GPU[0] else None
    return Question("rl", (case,), None, config.train.max_vram_fraction, block, assumes, time)


def _case(shape: Architecture, feed: Feed, config: ConvertConfig | SftConfig, machine: Machine, several: bool) -> Case:
    train, lora = config.train, config.lora
    losses = make_losses(config.losses, "losses")
    wants_parent = any(loss.needs_parent for loss in losses.values())
    starts_at_teacher = isinstance(config, ConvertConfig) or config.starts_at_teacher
    return Case(
        shape=shape,
        feed=feed,
        how=learning(lora, config.quantize is not None, narrow_bytes(train, machine)),
        chunk=train.chunk,
        supervised=feed.batch * max(feed.noisy, feed.clean if not feed.noisy else 0),
        teacher="none" if not wants_parent else ("own" if lora is not None and starts_at_teacher else "copy"),
        starts_at_teacher=starts_at_teacher,
        eight_bit=train.optimizer == "adamw8bit",
        recompute=train.gradient_checkpointing,
        resting=train.offload is not None,
        streams=2 if "ar" in losses else 1,
        several=several or train.accumulate > 1,
        on_cpu=machine.on_cpu,
        reference=_reference(shape, config),
        own_reference=config.residual is not None and config.residual.reference is None,
    )


def _reference(shape: Architecture, config: ConvertConfig | SftConfig) -> Architecture | None:
    """What residual inputs are read from beside the model; None: nothing, or the weights under its adapters."""
    if config.residual is None or (config.residual.reference is None and config.lora is not None):
        return None
    named = config.residual.reference
    return shape if named is None else _checkpoint(named, shape.name)[0]


def narrow_bytes(train: TrainConfig, machine: Machine) -> int:
    """Of a number that is computed with: 2 where autocast is on."""
    wants = machine.bf16 if train.precision == "auto" else train.precision == "bf16"
    return 2 if wants else FLOAT


def serving_question(
    shape: Architecture,
    machine: Machine,
    batch: int,
    context: int,
    block: int,
    beside: str | None = None,
    cache: Mapping[str, Any] | str | None = None,
) -> Question:
    """Decoding `batch` documents at once, with the parent `beside` where one is named. The weights are bf16 where the
    machine computes in it. `cache` says what is kept of keys and values. Raises `ConfigError`."""
    parent = None if beside is None else find_architecture(beside)
    prune = make_prune(cache)
    case = Serving(shape, batch, context, block, 2 if machine.bf16 else FLOAT, parent, prune)
    more: tuple[str, ...] = (f"its parent {beside} beside it",) if beside is not None else ()
    if prune is not None:
        more += (f"{case.slots} of {case.capacity} slots of each cache, for a document that is nearly all prompt",)
    return Question("generate", serving=case, assumes=(f"{batch} documents of up to {context} tokens", *more))


def cache_of(run: Mapping[str, Any], steps: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """What the run's last stage `generate` keeps of keys and values, or its section `generation`; None: all."""
    sections = [run.get("generation"), *(section.get("generation") for stage, section in steps if stage == "generate")]
    named = [section for section in sections if isinstance(section, Mapping) and "cache" in section]
    return named[-1]["cache"] if named else None


def parent_beside(run: Mapping[str, Any], steps: Sequence[tuple[str, Mapping[str, Any]]], start: str) -> str | None:
    """The parent that a run has in one process with what it made: the one that `serve` answers with, or the one that
    continues the prompts of a stage `generate`. Of a parent that stays there is no second."""
    if any(stage == "convert" and keeps_parent(section) for stage, section in steps):
        return None
    serve = run.get("serve")
    if isinstance(serve, Mapping) and serve.get("parent"):
        return str(serve["parent"])
    samples = [section for stage, section in steps if stage == "generate" and not section.get("prompts_file")]
    named = [start if section.get("parent") is None else section["parent"] for section in samples]
    return next((str(name) for name in named if name), None)
