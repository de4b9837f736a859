"""Runs tasks: the same prompts for every way, in batches, each answer judged and kept as soon as it is there."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from hildanext.core.config import config, plain
from hildanext.core.errors import ConfigError, PromptError
from hildanext.core.progress import ProgressLine
from hildanext.core.registry import build
from hildanext.core.runtime import machine
from hildanext.data.chat_template import Message, chat_text
from hildanext.decoding import MODES, make_decoder
from hildanext.eval.journal import Journal, Sample
from hildanext.eval.models import Answer, DiffusionEvalModel, EvalModel, GenerationParams, ModelPair
from hildanext.eval.tasks import TASKS
from hildanext.eval.tasks.base import Item, ScoringTask, Task, WritingTask
from hildanext.eval.tasks.rows import fingerprint

FORMAT = 1
"""Of the samples; part of their identity."""


@config
class QualityConfig:
    """Which tasks, answered in which ways, how much of them."""

    tasks: dict[str, dict[str, Any]]
    """Key to knobs; the key is the task's name unless the knobs hold a `name` of their own."""
    decoders: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"S_MODE": dict(MODES["S_MODE"])})
    """The diffusion model's ways to write: a name and a decoder section."""
    limit: int | None = Field(default=None, ge=1)
    """Items of each task, from the first one on; a later run with more goes on where this one ended."""
    batch_size: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("no tasks", f"name some of {', '.join(TASKS)}")
        self.build()
        for section in self.decoders.values():
            make_decoder(dict(section))

    def build(self) -> dict[str, Task]:
        """The tasks. Raises `UnknownChoice`, or `ConfigError` for a knob that a task does not have."""
        return {key: build("task", TASKS, {"name": key, **section}) for key, section in self.tasks.items()}


@dataclass(frozen=True)
class Outcome:
    """All samples of one way on one task, and the sessions in which they were made."""

    way: EvalModel
    samples: list[Sample]
    sessions: list[dict[str, Any]]


@dataclass(frozen=True)
class TaskRun:
    """One task, answered in every way; the parent first where there is one."""

    key: str
    task: Task
    outcomes: list[Outcome]


def run_tasks(
    contestants: ModelPair, settings: QualityConfig, folder: str | Path, quiet: bool = False
) -> list[TaskRun]:
    """Answer every task in every way. Samples go to `folder`; those that are there already are not made again.

    Raises `DataError` for data that cannot be had, `PromptError` for prompts that do not fit (before anything is
    answered), `ConfigError` where the folder holds samples of other settings.
    """
    runs: list[tuple[str, Task, list[Item], list[EvalModel]]] = []
    for key, task in settings.build().items():
        ways = _ways(contestants, task, settings)
        runs.append((key, task, task.items(settings.limit), ways))
    weights = {id(model): weights_hash(model) for model in _networks(contestants)}
    found = []
    for key, task, items, ways in runs:
        prompts = _prompts(task, items, ways)
        outcomes = []
        for way in ways:
            identity = _identity(key, task, way, settings, weights)
            with Journal(Path(folder), key, way.name, identity, _session(way, settings)) as journal:
                _answer(task, way, prompts, journal, settings, f"{key}, {way.name}", quiet)
                wanted = {(item.index, repeat) for item in items for repeat in range(_repeats(task))}
                kept = [journal.samples[at] for at in sorted(wanted)]
                outcomes.append(Outcome(way, kept, journal.sessions))
        found.append(TaskRun(key, task, outcomes))
    return found


def as_taught(settings: QualityConfig, contestants: ModelPair) -> QualityConfig:
    """The same tasks, asked as the diffusion model was taught: one that was fine-tuned on conversations gets the bare
    question in its chat template wherever a task that writes names neither `chat` nor worked examples."""
    if contestants.model is None or not contestants.model.card.chat:
        return settings
    tasks = {key: dict(section) for key, section in settings.tasks.items()}
    for key, task in settings.build().items():
        if isinstance(task, WritingTask) and "chat" not in tasks[key] and not tasks[key].get("few_shot"):
            tasks[key] |= {"chat": True, "few_shot": 0}
    return replace(settings, tasks=tasks)


@dataclass(frozen=True)
class _Prompt:
    item: Item
    text: str
    shots: int


def _ways(contestants: ModelPair, task: Task, settings: QualityConfig) -> list[EvalModel]:
    if isinstance(task, ScoringTask):
        return contestants.scoring(task.block_sizes, task.draws)
    return contestants.writing(settings.decoders)


def _repeats(task: Task) -> int:
    return task.repeats if isinstance(task, WritingTask) else 1


def _prompts(task: Task, items: Sequence[Item], ways: Sequence[EvalModel]) -> list[_Prompt]:
    """One string per item, the same for every way: the way with the least room decides what fits."""
    if isinstance(task, ScoringTask):
        return [_Prompt(item, task.prompt(item), 0) for item in items]
    assert isinstance(task, WritingTask)
    way = min(ways, key=lambda way: way.context)
    room = way.context - task.max_new_tokens
    found = []
    for item in items:
        shots = task.few_shot
        text = _dressed(task, task.prompt(item, shots), way)
        while (length := len(way.encode(text))) > room:
            if task.overlong == "refuse" or shots == 0:
                raise PromptError(
                    f"{item.id}: a prompt of {length} tokens and {task.max_new_tokens} new ones exceed the context of "
                    f"{way.context} ({way.name})",
                    "lower the task's few_shot or max_new_tokens, or set its overlong to 'fewer_shots'",
                )
            shots -= 1
            text = _dressed(task, task.prompt(item, shots), way)
        found.append(_Prompt(item, text, shots))
    return found


def _dressed(task: WritingTask, text: str, way: EvalModel) -> str:
    if not task.chat:
        return text
    return chat_text(way.tokenizer, [Message("user", text)])


def _answer(
    task: Task,
    way: EvalModel,
    prompts: Sequence[_Prompt],
    journal: Journal,
    settings: QualityConfig,
    name: str,
    quiet: bool,
) -> None:
    todo = [(prompt, repeat) for prompt in prompts for repeat in range(_repeats(task))]
    todo = [(prompt, repeat) for prompt, repeat in todo if (prompt.item.index, repeat) not in journal.samples]
    total = len(prompts) * _repeats(task)
    # Long prompts first: what does not fit into memory shows at once, and the time left is not underestimated.
    todo.sort(key=lambda at: (-len(at[0].text), at[0].item.index, at[1]))
    with ProgressLine(total, "answers", name, done=total - len(todo), quiet=quiet) as progress:
        if len(todo) < total:
            progress.say(f"{name}: {total - len(todo)} of {total} are there already")
        for start in range(0, len(todo), settings.batch_size):
            batch = todo[start : start + settings.batch_size]
            if isinstance(task, WritingTask):
                _write(task, way, batch, journal, settings, progress)
            elif isinstance(task, ScoringTask):
                _score(task, way, [prompt for prompt, _ in batch], journal, settings, progress)


def _write(
    task: WritingTask,
    way: EvalModel,
    batch: Sequence[tuple[_Prompt, int]],
    journal: Journal,
    settings: QualityConfig,
    progress: ProgressLine,
) -> None:
    ask = GenerationParams(task.max_new_tokens, task.stops, task.temperature, task.top_p)
    seeds = [_seed(settings.seed, prompt.item.index, repeat) for prompt, repeat in batch]

    def hand(index: int, answer: Answer) -> None:
        prompt, repeat = batch[index]
        judged = task.judge(prompt.item, answer.text)
        cost = asdict(answer)
        head = {"index": prompt.item.index, "repeat": repeat, "id": prompt.item.id, "shots": prompt.shots}
        said = {"prompt": prompt.text, "completion": cost.pop("text")}
        journal.add({**head, **said, "scores": dict(judged.scores), "extraction": dict(judged.extraction), **cost})
        progress.advance(answer.tokens)

    way.write([way.encode(prompt.text) for prompt, _ in batch], ask, seeds, hand)


def _score(
    task: ScoringTask,
    way: EvalModel,
    batch: Sequence[_Prompt],
    journal: Journal,
    settings: QualityConfig,
    progress: ProgressLine,
) -> None:
    asked = [task.pairs(prompt.item, way.encode, _seed(settings.seed, prompt.item.index, 0)) for prompt in batch]
    begun = time.perf_counter()
    scored = way.score([pair for pairs in asked for pair in pairs], settings.batch_size)
    seconds = time.perf_counter() - begun
    for prompt, pairs in zip(batch, asked, strict=True):
        own, scored = scored[: len(pairs)], scored[len(pairs) :]
        judged = task.weigh(prompt.item, own)
        head = {"index": prompt.item.index, "repeat": 0, "id": prompt.item.id, "prompt": prompt.text}
        tokens = sum(len(pair.continuation) for pair in pairs)
        cost = {
            "tokens": tokens,
            "forwards": sum(found.forwards for found in own),
            "seconds": seconds,
            "wall_seconds": seconds / len(batch),
        }
        told = {"scored": [way.tokenizer.decode(list(pair.continuation)) for pair in pairs]}
        journal.add({**head, **told, "scores": dict(judged.scores), "extraction": dict(judged.extraction), **cost})
        progress.advance(tokens)


def _seed(seed: int, index: int, repeat: int) -> int:
    """A sample's own seed: the same whatever batch or session it is made in."""
    return (seed * 1_000_003 + index) * 1009 + repeat


def _identity(
    key: str, task: Task, way: EvalModel, settings: QualityConfig, weights: Mapping[int, str]
) -> dict[str, Any]:
    """What a sample depends on. Data count by what they say, weights by their values: neither by where they lie."""
    network = _network_of(way)
    chosen = {name: value for name, value in plain(task).items() if name not in ("data", "few_shot_data")}
    found = {
        "format": FORMAT,
        "task": {"name": settings.tasks[key].get("name", key), **chosen},
        "data": fingerprint(task.rows()),
        "way": way.settings,
        "weights": weights[id(network)],
        "dtype": str(network.dtype).removeprefix("torch."),
        "device": network.device.type,
        "seed": settings.seed,
    }
    if isinstance(task, WritingTask) and task.chat:
        found["chat_template"] = fingerprint([{"template": way.tokenizer.chat_template}])
    return found


def _session(way: EvalModel, settings: QualityConfig) -> dict[str, Any]:
    network = _network_of(way)
    found = machine(network.device, network.dtype)
    kept = ("device", "device_name", "dtype", "threads")
    return {**{name: found[name] for name in kept}, "batch_size": settings.batch_size}


def _network_of(way: EvalModel) -> PreTrainedModel:
    model = way.model if isinstance(way, DiffusionEvalModel) else way.parent  # type: ignore[attr-defined]
    return model.causal_lm


def _networks(contestants: ModelPair) -> list[PreTrainedModel]:
    return [side.causal_lm for side in (contestants.model, contestants.parent) if side is not None]


def weights_hash(causal_lm: PreTrainedModel) -> str:
    """A hash of 256 values of every tensor: another checkpoint has another, wherever it lies."""
    found = hashlib.sha256()
    for name, tensor in sorted(causal_lm.state_dict().items()):
        flat = tensor.detach().flatten()
        count = min(256, flat.numel())
        places = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)
        found.update(name.encode())
        found.update(flat[places.to(flat.device)].double().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
