"""The windows of an alignment: rounds of sampling and judging, each the source of `updates` steps of the optimiser."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from hildanext.core.errors import TrainingStopped
from hildanext.core.runtime import make_generator
from hildanext.corruption.schedules import BlockPhase
from hildanext.data.problems import Problem
from hildanext.models.checkpoint import save_tensors
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.chunk import Chunk, ToldAnswer
from hildanext.rl.config import RlConfig, Seams
from hildanext.rl.desk import Ask, Desk
from hildanext.rl.looks import Look
from hildanext.rl.material import Material
from hildanext.rl.measure import seed_of
from hildanext.rl.moved import moved
from hildanext.rl.policy import Policy
from hildanext.rl.rollouts.base import Sampler
from hildanext.rl.round_figures import SPENT, figures_of
from hildanext.rl.step import PolicyStep, PolicyView
from hildanext.trainer.processes import summed
from hildanext.trainer.window import Place, Window

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts"

DRAWS, SHUFFLE, ORDER = 11, 12, 13
"""Streams of the run's seed."""


@dataclass
class Round:
    """A round's answers, and what an update needs of them."""

    number: int
    material: Material
    rewards: Float[Tensor, "groups answers"]
    """NaN where there is none."""
    advantage: Float[Tensor, " rows"]
    valid: Bool[Tensor, " rows"]
    groups: list[list[int]]
    """Rows of each group that teaches something; the others cost no forward."""
    figures: dict[str, Any]
    views: list[list[PolicyView]]
    """Of each update."""

    @property
    def batch(self) -> RolloutBatch:
        return self.material.batch

    @property
    def answers(self) -> list[ToldAnswer]:
        return self.material.answers


class Rounds:
    """A `WindowSource`. See the module; `prune` it when a state was saved."""

    def __init__(
        self,
        run: Path,
        config: RlConfig,
        seams: Seams,
        policy: Policy,
        sampler: Sampler,
        problems: Sequence[Problem],
        step: PolicyStep,
        accelerator: Accelerator,
    ) -> None:
        self.folder = run / ROLLOUTS
        self.config, self.seams, self.policy, self.sampler = config, seams, policy, sampler
        self.problems, self.step, self.accelerator = problems, step, accelerator
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.round: Round | None = None
        self.steps_seen = 0
        self.told_unjudged = False

    def __call__(self, step: int, phase: BlockPhase, place: Place) -> Window:
        number, update = divmod(step, self.config.updates)
        if self.round is None or self.round.number != number:
            self.round = None  # its arrays go before the next round's come
            self.round = self.open(number, place)
        self.steps_seen = step + 1
        now, views = self.round, self.round.views[update]
        inside = sum(int((view.batch.document >= 0).sum()) for view in views)
        real = sum(int(view.batch.written.sum()) for view in views)
        spent = {} if update == 0 else dict.fromkeys(SPENT, 0.0)  # a round is made once, for all its updates
        figures = {**now.figures, **spent, "round": number, "update": update}
        numbered = [(number, index, view) for index, view in enumerate(views)]
        return Window(numbered, torch.tensor(inside), torch.tensor(real), figures)

    def open(self, number: int, place: Place) -> Round:
        """Sample and judge a round, or find it; then all that its updates share."""
        chosen = self.chosen(number, place)
        made = list(self._chunks(number, chosen, place))
        chunks = [chunk for chunk, _ in made]
        whole = [one for one in made if one[0].batch is not None]
        if not whole:
            raise TrainingStopped(
                f"not one of the {sum(chunk.dropped for chunk in chunks)} answers of round {number} was whole in time",
                "give rl.rollouts.seconds more, or rl.rollouts.max_new_tokens less, and delete the round's folder",
            )
        material = Material.join([self._material(*one) for one in whole])
        answers = material.answers
        self.sampler.changed()  # the keys and values that answers have left make room for the update
        rewards = self._rewards(answers, len(chosen))
        rewards = self._shuffled(rewards, number, place) if self.config.shuffled_rewards else rewards
        known = ~rewards.isnan()
        self._say_unjudged(int((~known.any(-1)).sum()), len(chosen), number)
        by_place = self.seams.advantage.of(rewards.nan_to_num(), known & (known.sum(-1, keepdim=True) > 1))
        places = _places(answers)
        index = torch.tensor(places)
        advantage = by_place[index[:, 0], index[:, 1]]
        advantage = advantage if material.factor is None else advantage * material.factor
        valid = (known & (known.sum(-1, keepdim=True) > 1))[index[:, 0], index[:, 1]]
        rows: dict[int, list[int]] = {}
        for row, (group, _) in enumerate(places):
            rows.setdefault(group, []).append(row)
        figures = self._figures(chunks, rewards, advantage, material)
        if material.lessons is not None and not self.config.shuffled_rewards:  # they know what was right
            told, alone = len(places), material.lessons
            material = material.with_lessons(len(chosen))
            assert alone.factor is not None, "a lesson has an advantage"
            advantage, valid = torch.cat([advantage, alone.factor]), torch.cat([valid, alone.factor != 0])
            rows |= {len(chosen) + number: [told + number] for number in range(len(alone.answers))}
        groups = [members for members in rows.values() if bool((advantage[members] != 0).any())]
        now = Round(number, material, rewards, advantage, valid, groups, figures, [])
        started = time.perf_counter()
        now.views = self._views(now, place)
        now.figures["seconds_known"] = time.perf_counter() - started
        return now

    def chosen(self, number: int, place: Place) -> list[tuple[int, Problem]]:
        """The problems of a process in a round, each after its number among all that the run asks: passes over the
        training problems, in a new order each."""
        per_round = self.config.problems_per_round * place.processes
        first = number * per_round + place.process * self.config.problems_per_round
        asked = []
        for at in range(first, first + self.config.problems_per_round):
            lap, index = divmod(at, len(self.problems))
            order = torch.randperm(len(self.problems), generator=make_generator(self.config.seed, ORDER, lap))
            asked.append((at, self.problems[int(order[index])]))
        return asked

    def _chunks(self, number: int, chosen: Sequence[tuple[int, Problem]], place: Place) -> Iterator[tuple[Chunk, Desk]]:
        """Whole groups, as many as are asked in one moment."""
        size, config = max(1, self.seams.rollouts.together // self.config.group), self.config
        for first in range(0, len(chosen), size):
            asked = chosen[first : first + size]
            desk = self._desk(number, asked, first, place)
            asks = [
                Ask(problem, first + index, seed_of(config.seed, at, answer), self._prompt(problem))
                for index, (at, problem) in enumerate(asked)
                for answer in range(config.group)
            ]
            yield desk.chunk(desk.path, asks), desk

    def _desk(self, number: int, asked: Sequence[tuple[int, Problem]], first: int, place: Place) -> Desk:
        seams = self.seams
        desk = Desk(
            policy=self.policy,
            sampler=self.sampler,
            reward=seams.reward,
            rollouts=seams.rollouts,
            path=self.folder / f"round-{number:05d}" / f"process-{place.process}-from-{first:04d}",
            problems={first + index: problem for index, (_, problem) in enumerate(asked)},
            numbers={first + index: at for index, (at, _) in enumerate(asked)},
            seed=self.config.seed,
            encode=self._prompt,
            round=number,
            replays=seams.likelihood.of_actions,
            ready=self._ready,
        )
        return replace(desk, shapes=[partial(plugin.ask, desk=desk) for plugin in seams.plugins.values()])

    def _ready(self) -> None:
        """Before each sampling: what earlier ones have left of prompts is dropped, since a prompt read from kept blocks
        has other last bits, and a run that was killed has none."""
        self.sampler.changed()

    def _material(self, chunk: Chunk, desk: Desk) -> Material:
        assert chunk.batch is not None
        material = Material(chunk.batch, chunk.answers)
        for plugin in self.seams.plugins.values():
            material = plugin.more(material, desk)
        return self.seams.objective.more(material, desk)

    def _figures(
        self, chunks: Sequence[Chunk], rewards: Tensor, advantage: Tensor, material: Material
    ) -> dict[str, Any]:
        """Of what the policy said on its own, and the plugins' own counts."""
        said = [answer for chunk in chunks for answer in chunk.answers]
        highest, batch = self.seams.reward.highest, material.batch
        if said != material.answers:
            batch = RolloutBatch.join([chunk.batch for chunk in chunks if chunk.batch is not None])
            rewards = self._rewards(said, len(rewards))
        figures = figures_of(chunks, rewards, advantage, batch, highest, self.accelerator)
        if material.figures:
            counts = torch.tensor(list(material.figures.values()), dtype=torch.float64)
            figures |= dict(zip(material.figures, summed(self.accelerator, counts).tolist(), strict=True))
        return figures

    def _prompt(self, problem: Problem) -> tuple[int, ...]:
        key = problem.prompt
        if key not in self.prompts:
            self.prompts[key] = self.policy.encode(problem)
        return self.prompts[key]

    def _rewards(self, answers: Sequence[ToldAnswer], groups: int) -> Float[Tensor, "groups answers"]:
        most = max([self.config.group, *Counter(answer.group for answer in answers).values()])
        rewards = torch.full((groups, most), torch.nan, dtype=torch.float64)
        for answer, (group, number) in zip(answers, _places(answers), strict=True):
            rewards[group, number] = torch.nan if answer.reward is None else answer.reward
        return rewards

    def _say_unjudged(self, without: int, groups: int, number: int) -> None:
        """Once; every round's line counts `unjudged` answers."""
        if without and not self.told_unjudged:
            logger.warning("%d of %d problems of round %d have not one judged answer", without, groups, number)
            self.told_unjudged = True

    def _shuffled(self, rewards: Tensor, number: int, place: Place) -> Tensor:
        """Each group's rewards among its judged answers, dealt out anew."""
        dealt = rewards.clone()
        for group, row in enumerate(rewards):
            known = (~row.isnan()).nonzero()[:, 0]
            key = number * self.config.problems_per_round * place.processes
            key += place.process * self.config.problems_per_round + group
            order = torch.randperm(len(known), generator=make_generator(self.config.seed, SHUFFLE, key))
            dealt[group, known] = row[known[order]]
        return dealt

    def _views(self, now: Round, place: Place) -> list[list[PolicyView]]:
        """The micro-batches of each update, with what the policies before it say of them."""
        size, config = self.config.train.batch_size, self.config
        groups = now.groups if now.groups else [[0]]  # of nothing useful: a row that does not count, for the processes
        parts = [groups[at : at + size] for at in range(0, len(groups), size)]
        material = credited(now.batch, now.material.credited)
        about = material.written if self.seams.likelihood.of_actions else material.scored
        count = self.seams.objective.count(now.valid, now.batch.group, about.sum(-1)) if now.groups else 0
        updates = []
        for update in range(config.updates):
            views = [view for part in parts for view in self._micro_batch(now, part, update, place)]
            views = [replace(view, count=count if index == 0 else 0) for index, view in enumerate(views)]
            updates.append(views)
        known = self._known(now, updates, place) if now.groups else {}
        return [
            [
                replace(view, old=known.get(f"old-{u}-{v}"), reference=known.get(f"reference-{u}-{v}"))
                for v, view in enumerate(views)
            ]
            for u, views in enumerate(updates)
        ]

    def _micro_batch(self, now: Round, groups: Sequence[list[int]], update: int, place: Place) -> list[PolicyView]:
        """One view, or one for each look where the objective is a sum over them."""
        rows = [row for group in groups for row in group]
        material = now.material.rows(rows)
        batch = credited(now.batch.rows(rows), material.credited)
        if material.look is None:
            drawn = [self._drawn(now, group, update, place) for group in groups]
            looks = side_by_side(drawn, [len(group) for group in groups], batch)
        else:
            looks = [material.look.rows(range(len(rows)), batch.tokens.shape[1])]
        valid = now.valid[rows] & bool(now.groups)
        apart = [[look] for look in looks] if self.seams.objective.separable else [looks]
        elsewhere = material.asked is not None and any(material.asked)
        # An edit's own log p is not among those of the masks that were filled, nor is this prompt's one of another.
        recorded = update == 0 and self.seams.likelihood.of_actions and not len(batch.edits) and not elsewhere
        return [
            PolicyView(
                batch=batch,
                looks=part,
                advantage=now.advantage[rows],
                valid=valid,
                count=0,
                recorded=torch.stack([batch.logp * look.read for look in part]) if recorded else None,
                asked=material.asked if elsewhere else None,
            )
            for part in apart
        ]

    def _drawn(self, now: Round, group: Sequence[int], update: int, place: Place) -> list[Look]:
        """What the likelihood draws for a group, as the plugins leave it. Tokens without credit are not read."""
        likelihood, per_round = self.seams.likelihood, self.config.problems_per_round * place.processes
        asked = now.number * per_round + place.process * self.config.problems_per_round + int(now.batch.group[group[0]])
        generator = make_generator(self.config.seed, DRAWS, now.number, update, asked)
        part, material = now.batch.rows(group), now.material.rows(group)
        likelihood.check_batch(part)
        if not likelihood.of_actions:  # a text's estimate masks what it reads alone; a step's state is what it was
            part = credited(part, material.credited)
        looks = likelihood.draw(part, self.policy.model.card, generator)
        if likelihood.of_actions and material.credited is not None:
            looks = [_read_within(look, material.credited) for look in looks]
        for plugin in self.seams.plugins.values():
            looks = plugin.looks(part, looks, likelihood.of_actions, generator)
        return looks

    @torch.no_grad()
    def _known(self, now: Round, updates: Sequence[Sequence[PolicyView]], place: Place) -> dict[str, Tensor]:
        """log p under the policy that wrote the answers, where updates move it in between, and under the reference.
        Written down: a run that goes on between two updates has neither any more."""
        old, reference = self.config.updates > 1, self.seams.objective.wants_reference
        elsewhere = any(view.asked is not None for views in updates for view in views)
        if not old and not reference and not elsewhere:
            return {}
        path = self.folder / f"round-{now.number:05d}" / f"process-{place.process}-known.safetensors"
        if path.is_file():
            return load_file(path)
        known: dict[str, Tensor] = {}
        for u, views in enumerate(updates):
            for v, view in enumerate(views):
                if old or view.asked is not None:
                    known[f"old-{u}-{v}"] = self._old(view)
        if reference:
            with self.policy.reference() as model:
                for u, views in enumerate(updates):
                    for v, view in enumerate(views):
                        known[f"reference-{u}-{v}"] = self._raw(model, view)
        save_tensors(known, path)
        return known

    def _raw(self, model: Any, view: PolicyView) -> Tensor:
        with self.accelerator.autocast():
            return self.step.scores(model, view.batch, view.looks).raw.cpu().contiguous()

    def _old(self, view: PolicyView) -> Tensor:
        """Under the policy of now, each answer behind the prompt that it was written under."""
        raw = self._raw(self.policy.model, view)
        if view.asked is None:
            return raw
        away = moved(view.batch, view.looks, view.asked)
        there = self._raw(self.policy.model, replace(view, batch=away.batch, looks=away.looks))
        return away.back(there, raw).contiguous()

    def prune(self) -> None:
        """Remove the arrays of rounds that no state goes back to; what was said and earned stays."""
        done = self.steps_seen // self.config.updates
        for path in self.folder.glob("round-*/*.safetensors"):
            if int(path.parent.name.removeprefix("round-")) < done:
                path.unlink()


def credited(batch: RolloutBatch, where: Bool[Tensor, "rows positions"] | None) -> RolloutBatch:
    """The batch with no answer but the tokens that may carry a gradient; the others are seen as a prompt's are."""
    return batch if where is None else replace(batch, scored=batch.scored & where[:, : batch.scored.shape[1]])


def _read_within(look: Look, where: Bool[Tensor, "rows positions"]) -> Look:
    read = look.read & where[:, : look.read.shape[1]]
    return replace(look, read=read, weight=torch.where(read, look.weight, 0.0))


def _places(answers: Sequence[ToldAnswer]) -> list[tuple[int, int]]:
    """Group of each answer, and its number among those of the group that are there."""
    seen: Counter[int] = Counter()
    places = []
    for answer in answers:
        places.append((answer.group, seen[answer.group]))
        seen[answer.group] += 1
    return places


def side_by_side(drawn: Sequence[Sequence[Look]], groups: Sequence[int], batch: RolloutBatch) -> list[Look]:
    """The looks of several groups, of so many rows of the batch each, as looks at all of them; a group with fewer has
    nothing in the last ones, and one whose looks show and read the text itself goes on doing so."""
    width = batch.tokens.shape[1]
    assert sum(groups) == len(batch.tokens), "every row belongs to a group"
    texts = batch.tokens.split(list(groups))
    looks = []
    for number in range(max(len(one) for one in drawn)):
        parts = [one[number] if number < len(one) else _blank(one[0]) for one in drawn]
        masked, read, weight = (
            torch.cat([_widen(getattr(part, name), width) for part in parts]) for name in ("masked", "read", "weight")
        )
        shown, labels = (
            _beside_texts([getattr(part, name) for part in parts], texts, width) for name in ("shown", "labels")
        )
        looks.append(Look(masked, read, weight, parts[0].block_size, shown, labels))
    return looks


def _beside_texts(parts: Sequence[Tensor | None], texts: Sequence[Tensor], width: int) -> Tensor | None:
    """What looks show or read, the text itself where one does not say; None where none says."""
    if all(part is None for part in parts):
        return None
    return torch.cat([text if part is None else _widen(part, width) for part, text in zip(parts, texts, strict=True)])


def _widen(part: Tensor, width: int) -> Tensor:
    return pad(part, (0, width - part.shape[1]))


def _blank(look: Look) -> Look:
    nothing = torch.zeros_like(look.masked)
    return replace(look, masked=nothing, read=nothing, weight=torch.zeros_like(look.weight))
