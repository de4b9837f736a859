"""Runs tasks: the same prompts for every model, in batches, each answer judged and kept as soon as it is there."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from hildanext.core.config import Seed, config
from hildanext.core.errors import ConfigError, PromptError
from hildanext.core.progress import ProgressLine
from hildanext.core.registry import build
from hildanext.data.chat_template import Message, chat_text, encode_chat
from hildanext.decoding import MODES, make_decoder
from hildanext.detokenization import Detokenizer
from hildanext.eval.identity import sample_identity, session_facts, weights_hash
from hildanext.eval.journal import Journal, Sample
from hildanext.eval.models import EvalAnswer, EvalModel, GenerationParams, ModelPair
from hildanext.eval.tasks import TASKS
from hildanext.eval.tasks.base import Item, ScoringTask, Task, WritingTask
from hildanext.kv_cache.prune import make_prune


@config
class QualityConfig:
    """Which tasks, answered by which decoders, how much of them."""

    tasks: dict[str, dict[str, Any]]
    """Key to knobs; the key is the task's name unless the knobs hold a `name` of their own."""
    decoders: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"S_MODE": dict(MODES["S_MODE"])})
    """How the diffusion model writes: a name and a decoder section."""
    cache: dict[str, Any] | str | None = None
    """What it keeps of its keys and values (FULL), as `inference.GenerationConfig.cache`."""
    limit: int | None = Field(default=None, ge=1)
    """Items of each task, from the first one on; a later run with more goes on where this one ended."""
    batch_size: int = Field(default=8, ge=1)
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("no tasks", f"name some of {', '.join(TASKS)}")
        self.build()
        make_prune(self.cache)
        for section in self.decoders.values():
            make_decoder(dict(section))

    def build(self) -> dict[str, Task]:
        """The tasks. Raises `UnknownChoice`, or `ConfigError` for a knob that a task does not have."""
        return {key: build("task", TASKS, {"name": key, **section}) for key, section in self.tasks.items()}


@dataclass(frozen=True)
class Outcome:
    """All samples of one model on one task, and the sessions in which they were made."""

    model: EvalModel
    samples: list[Sample]
    sessions: list[dict[str, Any]]


@dataclass(frozen=True)
class TaskRun:
    """One task, answered by every model; the parent first where there is one."""

    key: str
    task: Task
    outcomes: list[Outcome]


def run_tasks(pair: ModelPair, settings: QualityConfig, folder: str | Path, quiet: bool = False) -> list[TaskRun]:
    """Answer every task with every model. Samples go to `folder`; those that are there already are not made again.

    Raises `DataError` for data that cannot be had, `PromptError` for prompts that do not fit (before anything is
    answered), `ConfigError` where the folder holds samples of other settings.
    """
    runs: list[tuple[str, Task, list[Item], list[EvalModel]]] = []
    for key, task in settings.build().items():
        models = _models(pair, task, settings)
        runs.append((key, task, task.items(settings.limit), models))
    networks = [side.causal_lm for side in (pair.model, pair.parent) if side is not None]
    weights = {id(network): weights_hash(network) for network in networks}
    finished = []
    for key, task, items, models in runs:
        prompts = _prompts(task, items, models)
        outcomes = []
        for model in models:
            task_name = settings.tasks[key].get("name", key)
            identity = sample_identity(task_name, task, model, settings.seed, weights[id(model.network)])
            with Journal(Path(folder), key, model.name, identity, session_facts(model, settings.batch_size)) as journal:
                _answer(task, model, prompts, journal, settings, f"{key}, {model.name}", quiet)
                places = {(item.index, repeat) for item in items for repeat in range(_repeats(task))}
                kept = [journal.samples[at] for at in sorted(places)]
                outcomes.append(Outcome(model, kept, journal.sessions))
        finished.append(TaskRun(key, task, outcomes))
    return finished


def as_taught(settings: QualityConfig, pair: ModelPair) -> QualityConfig:
    """The same tasks, asked as the diffusion model was taught: one that was fine-tuned on conversations gets the bare
    question in its chat template wherever a task that writes names neither `chat` nor worked examples."""
    if pair.model is None or not pair.model.card.chat:
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
    messages: tuple[Message, ...] = ()
    """Of a task that asks in the chat template, which `text` shows."""

    def encode(self, model: EvalModel) -> list[int]:
        return encode_chat(model.tokenizer, self.messages) if self.messages else model.encode(self.text)


def _models(pair: ModelPair, task: Task, settings: QualityConfig) -> list[EvalModel]:
    if isinstance(task, ScoringTask):
        return pair.scoring(task.block_sizes, task.draws)
    return pair.writing(settings.decoders, settings.cache)


def _repeats(task: Task) -> int:
    return task.repeats if isinstance(task, WritingTask) else 1


def _prompts(task: Task, items: Sequence[Item], models: Sequence[EvalModel]) -> list[_Prompt]:
    """One string per item, the same for every model: the one with the least room decides what fits."""
    if isinstance(task, ScoringTask):
        return [_Prompt(item, task.prompt(item), 0) for item in items]
    assert isinstance(task, WritingTask)
    narrowest = min(models, key=lambda model: model.context)
    longest = narrowest.context - task.max_new_tokens
    fitting = []
    for item in items:
        prompt = _dressed(task, item, task.few_shot, narrowest)
        while (length := len(prompt.encode(narrowest))) > longest:
            if task.overlong == "refuse" or prompt.shots == 0:
                raise PromptError(
                    f"{item.id}: a prompt of {length} tokens and {task.max_new_tokens} new ones exceed the context of "
                    f"{narrowest.context} ({narrowest.name})",
                    "lower the task's few_shot or max_new_tokens, or set its overlong to 'fewer_shots'",
                )
            prompt = _dressed(task, item, prompt.shots - 1, narrowest)
        fitting.append(prompt)
    return fitting


def _dressed(task: WritingTask, item: Item, shots: int, model: EvalModel) -> _Prompt:
    text = task.prompt(item, shots)
    if not task.chat:
        return _Prompt(item, text, shots)
    messages = (Message("user", text),)
    return _Prompt(item, chat_text(model.tokenizer, messages), shots, messages)


def _answer(
    task: Task,
    model: EvalModel,
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
                _write(task, model, batch, journal, settings, progress)
            elif isinstance(task, ScoringTask):
                _score(task, model, [prompt for prompt, _ in batch], journal, settings, progress)


def _write(
    task: WritingTask,
    model: EvalModel,
    batch: Sequence[tuple[_Prompt, int]],
    journal: Journal,
    settings: QualityConfig,
    progress: ProgressLine,
) -> None:
    params = GenerationParams(task.max_new_tokens, task.stops, task.temperature, task.top_p)
    seeds = [_seed(settings.seed, prompt.item.index, repeat) for prompt, repeat in batch]

    def keep(index: int, answer: EvalAnswer) -> None:
        prompt, repeat = batch[index]
        judged = task.judge(prompt.item, answer.text)
        head = {"index": prompt.item.index, "repeat": repeat, "id": prompt.item.id, "shots": prompt.shots}
        cost = answer.sample_record()
        texts = {"prompt": prompt.text, "completion": cost.pop("text")}
        journal.add({**head, **texts, "scores": dict(judged.scores), "extraction": dict(judged.extraction), **cost})
        progress.advance(answer.stats.tokens)

    model.write([prompt.encode(model) for prompt, _ in batch], params, seeds, keep)


def _score(
    task: ScoringTask,
    model: EvalModel,
    batch: Sequence[_Prompt],
    journal: Journal,
    settings: QualityConfig,
    progress: ProgressLine,
) -> None:
    pairs_of_items = [
        task.pairs(prompt.item, model.encode, _seed(settings.seed, prompt.item.index, 0)) for prompt in batch
    ]
    begun = time.perf_counter()
    scored = model.score([pair for pairs in pairs_of_items for pair in pairs], settings.batch_size)
    seconds = time.perf_counter() - begun
    for prompt, pairs in zip(batch, pairs_of_items, strict=True):
        own, scored = scored[: len(pairs)], scored[len(pairs) :]
        judged = task.weigh(prompt.item, own)
        head = {"index": prompt.item.index, "repeat": 0, "id": prompt.item.id, "prompt": prompt.text}
        tokens = sum(len(pair.continuation) for pair in pairs)
        cost = {
            "tokens": tokens,
            "forwards": sum(pair.forwards for pair in own),
            "seconds": seconds,
            "wall_seconds": seconds / len(batch),
        }
        texts = {"scored": [Detokenizer(model.tokenizer, pair.context).text(pair.continuation) for pair in pairs]}
        journal.add({**head, **texts, "scores": dict(judged.scores), "extraction": dict(judged.extraction), **cost})
        progress.advance(tokens)


def _seed(seed: int, index: int, repeat: int) -> int:
    """A sample's own seed: the same whatever batch or session it is made in."""
    return ((seed * 1_000_003 + index) * 1009 + repeat) % 2**63
