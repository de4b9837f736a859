"""What a chunk's further answers are made with: samples, texts and arrays, each kept as soon as it is whole.

Everything here is a pure function of the weights, the problems and the seeds, and is asked for before the round's first
update. So what was kept once stands for ever, and a run that is killed asks for nothing twice.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from safetensors.torch import load_file
from torch import Tensor

from hildanext.core.json_text import parse
from hildanext.core.run_dir import write_atomically
from hildanext.data.problems import Problem
from hildanext.grading.base import Reward
from hildanext.models.checkpoint import save_tensors
from hildanext.rl.batch import Answer, collate
from hildanext.rl.chunk import Chunk, ToldAnswer, judged, read_sampled, told, write
from hildanext.rl.measure import seed_of
from hildanext.rl.policy import Policy
from hildanext.rl.rollouts.base import FillingSampler, Ids, Rollouts, Sampler, Wish


@dataclass(frozen=True)
class Ask:
    """One answer that is to be sampled."""

    problem: Problem
    group: int
    """Which problem of the round it answers."""
    seed: int
    prompt: Ids
    """What it is learnt under."""
    shown: Ids | None = None
    """What the sampler is shown instead. The answer then has no steps, as they were taken in other blocks; but see
    `Desk.replays`."""
    wish: Wish = Wish()


Shape = Callable[[Ask], Ask]


@dataclass(frozen=True)
class Desk:
    """Of one chunk."""

    policy: Policy
    sampler: Sampler
    reward: Reward
    rollouts: Rollouts
    path: Path
    """The chunk's files begin with it; what is kept here is named after it."""
    problems: Mapping[int, Problem]
    """By group."""
    numbers: Mapping[int, int]
    """Of each group, its number among all problems that the run asks."""
    seed: int
    """The run's."""
    encode: Callable[[Problem], Ids]
    round: int = 0
    """Its number, from 0 on."""
    replays: bool = False
    """Whether answers are learnt by their steps. Those of one that was shown another prompt are then kept where its
    blocks are cut alike under both; log p of its actions stays that under what was shown."""
    shapes: Sequence[Shape] = ()
    """What every plugin makes of an answer that is to be sampled."""
    ready: Callable[[], None] = lambda: None
    """Called before anything is sampled: the weights may be others than those that the sampler knows."""

    def seed_for(self, group: int, *keys: object) -> int:
        """Of what is sampled for a group under these keys."""
        return seed_of(self.seed, self.numbers[group], *keys)

    def answers(self, name: str, asks: Sequence[Ask]) -> tuple[Chunk, list[int]]:
        """Judged answers to `asks`, found or made, and of each which ask it answers; one that was not whole in time
        is not there. Their file numbers asks where a chunk's numbers problems."""
        path = self.path.with_name(f"{self.path.name}-{name}")
        numbered = [replace(ask, group=number) for number, ask in enumerate(asks)]
        chunk = self.chunk(path, numbered)
        rows = [answer.group for answer in chunk.answers]
        groups = [asks[row].group for row in rows]
        batch = None
        if chunk.batch is not None:
            batch = replace(chunk.batch, group=chunk.batch.group.new_tensor(groups))
        answers = [replace(answer, group=group) for answer, group in zip(chunk.answers, groups, strict=True)]
        return replace(chunk, batch=batch, answers=answers), rows

    def chunk(self, path: Path, asks: Sequence[Ask]) -> Chunk:
        """The judged answers in a file, sampled and judged first where they are not."""
        chunk = read_sampled(path)
        if chunk is None:
            self.ready()
            write(path, chunk := self._sampled(asks))
        if any(answer.parts is None for answer in chunk.answers):
            started = time.perf_counter()
            problems = {ask.group: ask.problem for ask in asks}
            answers = judged(chunk.answers, [problems[answer.group] for answer in chunk.answers], self.reward)
            chunk = replace(chunk, answers=answers, judged_seconds=time.perf_counter() - started)
            write(path, chunk)
        return chunk

    def judged(self, name: str, answers: Sequence[ToldAnswer]) -> list[ToldAnswer]:
        """Answers with what they earn, found or judged; `answers` must be the same whenever it is asked."""
        path = self.path.with_name(f"{self.path.name}-{name}.json")
        if not path.is_file():
            whole = judged(answers, [self.problems[answer.group] for answer in answers], self.reward)
            _write(path, {"answers": [asdict(answer) for answer in whole]})
        return [ToldAnswer(**answer) for answer in parse(path.read_text(encoding="utf-8"))["answers"]]

    def texts(self, name: str, prompts: Sequence[Ids], seeds: Sequence[int]) -> list[str | None]:
        """What the policy says to other prompts, found or sampled; None where it was not whole in time."""
        path = self.path.with_name(f"{self.path.name}-{name}.json")
        if not path.is_file():
            self.ready()
            answers = self.sampler.sample(prompts, seeds)
            _write(path, {"texts": [None if answer is None else answer.text for answer in answers]})
        return list(parse(path.read_text(encoding="utf-8"))["texts"])

    def arrays(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Arrays, found or made; removed with the chunk's own."""
        path = self.path.with_name(f"{self.path.name}-{name}.safetensors")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({key: array.contiguous() for key, array in make().items()}, path)
        return load_file(path)

    def _sampled(self, asks: Sequence[Ask]) -> Chunk:
        started = time.perf_counter()
        for shape in self.shapes:
            asks = [shape(ask) for ask in asks]
        answers = self._asked(asks)
        size = self.policy.model.card.block_size if self.replays else None
        asked = zip(asks, answers, strict=True)
        whole = [(ask, _under(ask, answer, size)) for ask, answer in asked if answer is not None]
        seconds = time.perf_counter() - started
        if not whole:
            return Chunk(None, [], len(answers), seconds)
        groups, texts = [ask.group for ask, _ in whole], [answer for _, answer in whole]
        batch = collate(texts, groups, self.policy.model.card.block_size, self.policy.end)
        answered = told(texts, [ask.problem for ask, _ in whole], groups)
        return Chunk(batch, answered, len(answers) - len(whole), seconds)

    def _asked(self, asks: Sequence[Ask]) -> list[Answer | None]:
        prompts = [ask.prompt if ask.shown is None else ask.shown for ask in asks]
        seeds = [ask.seed for ask in asks]
        if not any(ask.wish for ask in asks):
            return self.sampler.sample(prompts, seeds)
        assert self.rollouts.fills, "a plugin has wishes that these rollouts cannot meet"
        return cast(FillingSampler, self.sampler).sample(prompts, seeds, wishes=[ask.wish for ask in asks])


def _under(ask: Ask, answer: Answer, size: int | None) -> Answer:
    """The answer under the prompt that it is learnt under; with blocks of `size` it keeps its steps where it can."""
    if ask.shown is None:
        return answer
    alike = size is not None and answer.trajectory is not None and (len(ask.prompt) - len(ask.shown)) % size == 0
    steps = answer.trajectory.behind(ask.prompt) if alike and answer.trajectory is not None else None
    return replace(answer, prompt=ask.prompt, trajectory=steps)


def _write(path: Path, said: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(said, ensure_ascii=False).encode("utf-8"))
