"""LENS: where a problem is hardly solved, words that the policy has grown to over-read are left out, and what is solved
without them is learnt with them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.core.runtime import make_generator
from hildanext.rl.chunk import ToldAnswer
from hildanext.rl.desk import Ask, Desk
from hildanext.rl.material import Material
from hildanext.rl.measure import SOLVED
from hildanext.rl.plugins.base import Around, Plugin
from hildanext.rl.plugins.interference import interference
from hildanext.rl.plugins.protected import deletable, numbers_in, text_of

PARTITION = 21
"""Stream of the run's seed: which prompt tokens are masked together."""


@config
class Lens(Plugin):
    """Of a problem solved by less than `threshold` of its answers, the ceil(gamma |x|) tokens of highest score are
    deleted, and `answers` more are sampled from what is left. If more of them are right, they take the places of as
    many wrong ones; all are learnt under the original prompt.

    A token's score is log p under the policy less log p under the reference (`signed`), or the size of that; only
    scores above 0 count, so that a policy which is its reference deletes nothing. Never deleted are digits, operators,
    number words and sentences about the answer's form, nor anything that would change which numbers the prompt holds.

    An answer's ratio is to the policy under the prompt that it was written under, and its advantage is divided by the
    group's weight of its kind: the share solved of the original prompt for what that prompt solved, else the rest.

    A likelihood of actions replays a purified answer's own steps under the original prompt, and log p of the policy
    that took them is that under the purified one. Both must cut the answer into the same blocks: so many tokens are
    deleted that whole blocks are, the count rounded up as far as that many may go.

    Paper: LENS, arXiv:2601.21244, as far as its abstract and reviews say, for autoregressive models.
    Differs: a reconstruction: neither its code nor its full text could be had, and the threshold is ours. A token's
    log p is that of a masked token, given the others, with `parts` of the prompt masked in turn; earlier blocks are
    clean copies, which hold no masks, and later ones are not seen. The weight stands outside the clip: inside it,
    where the paper has it, answers are clipped before the first update. Deleting whole blocks for the sake of steps is
    ours: an autoregressive model has none.
    """

    score: Literal["signed", "absolute"] = "signed"
    gamma: float = Field(default=0.03, gt=0, le=0.5, allow_inf_nan=False)
    """Share of the prompt's tokens that is deleted; weaker models want more."""
    threshold: float = Field(default=0.5, gt=0, le=1, allow_inf_nan=False)
    """Share of right answers below which a problem is purified."""
    parts: int = Field(default=7, ge=2)
    """Of a prompt, masked in turn: twice as many forwards."""
    answers: int | None = Field(default=None, ge=1)
    """To a purified prompt; None: as many as the problem has."""

    def check(self, around: Around) -> None:
        if not around.objective.wants_reference:
            raise ConfigError(
                "lens compares the policy with its reference, and this objective has none",
                "give the objective a KL (beta above 0), or leave lens out",
            )
        if around.objective.level is None:
            raise ConfigError(
                "lens learns answers of another prompt by their ratio, and this objective has none",
                "take espo or diffu_grpo, or leave lens out",
            )
        if getattr(around.likelihood, "edits", None) == "count":
            raise ConfigError(
                "lens learns answers under another prompt than they were written under, where their edits are not "
                "replayed",
                "take a decoder without edits and leave edits: count out, or take the likelihood block_elbo",
            )
        if "r3l" in around.plugins:
            raise ConfigError("lens replaces the wrong answers that r3l makes again", "take one of the two")

    def more(self, material: Material, desk: Desk) -> Material:
        highest = desk.reward.highest - SOLVED
        rows = groups_of(material.answers)
        rights = {group: _rights(material, members, highest) for group, members in rows.items()}
        low = [group for group, right in rights.items() if right and sum(right) / len(right) < self.threshold]
        purified = self._purified(low, desk) if low else {}
        asks = []
        for group, shown in purified.items():
            problem = desk.problems[group]
            prompt, count = desk.encode(problem), self.answers if self.answers is not None else len(rows[group])
            for number in range(count):
                asks.append(Ask(problem, group, desk.seed_for(group, "lens", number), prompt, shown))
        figures = {"lens_low": float(len(low)), "lens_purified": float(len(purified)), "lens_replaced": 0.0}
        if not asks:
            return _with(material, figures)
        chunk, _ = desk.answers("lens", asks)
        if chunk.batch is None:
            return _with(material, figures)
        fresh = Material(chunk.batch, chunk.answers)
        return _rebuilt(material, fresh, purified, highest, figures)

    def _purified(self, groups: Sequence[int], desk: Desk) -> dict[int, tuple[int, ...]]:
        """The shorter prompts, of groups of which something is deleted. Kept: the scores are those of now."""

        def make() -> dict[str, Tensor]:
            prompts = [desk.encode(desk.problems[group]) for group in groups]
            size = desk.policy.model.card.block_size if desk.replays else 1
            generator = make_generator(desk.seed, PARTITION, *(desk.numbers[group] for group in groups[:1]))
            scores = interference(desk.policy, prompts, self.parts, generator)
            gone = [
                (group, place)
                for group, prompt, one in zip(groups, prompts, scores, strict=True)
                for place in self.deleted(desk.policy.tokenizer, prompt, desk.problems[group].prompt, one, size)
            ]
            return {"deleted": torch.tensor(gone, dtype=torch.long).reshape(-1, 2)}

        deleted = desk.arrays("lens-deleted", make)["deleted"].tolist()
        shorter = {}
        for group in groups:
            gone = {place for number, place in deleted if number == group}
            if gone:
                prompt = desk.encode(desk.problems[group])
                shorter[group] = tuple(token for place, token in enumerate(prompt) if place not in gone)
        return shorter

    def deleted(
        self, tokenizer: Any, prompt: Sequence[int], problem: str, scores: Float[Tensor, " tokens"], by: int = 1
    ) -> list[int]:
        """Places of the prompt's tokens that are to go, in order: as many as a multiple of `by`, or none. Raises
        `ConfigError` where the prompt's text does not hold the problem."""
        allowed = deletable(tokenizer, prompt, problem)
        if allowed is None:
            raise ConfigError(
                f"lens does not find the problem {problem!r:.60} in its own prompt",
                "leave lens out: the tokenizer changes the text, so that nobody can tell what may be deleted",
            )
        sizes = scores if self.score == "signed" else scores.abs()
        numbers, gone, most = numbers_in(text_of(tokenizer, prompt)), list[int](), count_of(self.gamma, len(prompt))
        most = -(-most // by) * by
        for place in sizes.argsort(descending=True, stable=True).tolist():
            if len(gone) == most or not float(sizes[place]) > 0:
                break
            left = [token for at, token in enumerate(prompt) if at not in gone and at != place]
            if allowed[place] and numbers_in(text_of(tokenizer, left)) == numbers:
                gone.append(place)
        return sorted(gone[: len(gone) // by * by])


def count_of(gamma: float, tokens: int) -> int:
    """ceil(gamma |x|), rounding of the product aside."""
    return math.ceil(gamma * tokens - 1e-9)


def replaced(right: Sequence[bool], purified: Sequence[bool]) -> int:
    """How many wrong answers make room for right ones of the purified prompt: none unless that is solved more often."""
    if not purified or sum(purified) * len(right) <= sum(right) * len(purified):
        return 0
    return min(sum(purified), len(right) - sum(right))


def mixture_weights(right: Sequence[bool], count: int) -> list[float]:
    """The weight of each answer of a rebuilt group: what the original prompt solved, `count` answers of the purified
    one, then the wrong ones that are left."""
    solved, share = sum(right), sum(right) / len(right)
    return [share] * solved + [1 - share] * (len(right) - solved)


def groups_of(answers: Sequence[ToldAnswer]) -> dict[int, list[int]]:
    """Rows of each group."""
    rows: dict[int, list[int]] = {}
    for row, answer in enumerate(answers):
        rows.setdefault(answer.group, []).append(row)
    return rows


def _rights(material: Material, members: Sequence[int], highest: float) -> list[bool]:
    rewards = [material.answers[row].reward for row in members]
    return [reward >= highest for reward in rewards if reward is not None]


def _with(material: Material, figures: Mapping[str, float]) -> Material:
    return replace(material, figures={**material.figures, **figures})


def _rebuilt(
    material: Material,
    fresh: Material,
    purified: Mapping[int, tuple[int, ...]],
    highest: float,
    figures: dict[str, float],
) -> Material:
    """The groups with right answers of the purified prompts in the places of wrong ones."""
    new, weights, left, taken = groups_of(fresh.answers), [], [], []
    for group, members in groups_of(material.answers).items():
        judged = [row for row in members if material.answers[row].reward is not None]
        good = [row for row in judged if (material.answers[row].reward or 0.0) >= highest]
        bad = [row for row in judged if row not in good]
        fresh_judged = [row for row in new.get(group, []) if fresh.answers[row].reward is not None]
        fresh_good = [row for row in fresh_judged if (fresh.answers[row].reward or 0.0) >= highest]
        right = [row in good for row in judged]
        count = replaced(right, [row in fresh_good for row in fresh_judged])
        figures["lens_replaced"] += count
        if not count:
            left += members
            weights += [1.0] * len(members)
            continue
        stay = [*good, *bad[count:]]
        told = mixture_weights(right, count)
        left += stay
        weights += [1 / weight for weight in (*told[: len(good)], *told[len(good) + count :])]
        taken += [(row, 1 / told[len(good)]) for row in fresh_good[:count]]
    if not taken:
        return _with(material, figures)
    rows = [row for row, _ in taken]
    added = fresh.rows(rows)
    prompts = tuple(purified[fresh.answers[row].group] for row in rows)
    stayed = material.rows(left)
    parts = [
        replace(stayed, factor=torch.tensor(weights, dtype=torch.float64)),
        Material(
            added.batch,
            added.answers,
            factor=torch.tensor([weight for _, weight in taken], dtype=torch.float64),
            asked=prompts,
        ),
    ]
    return _with(Material.join(parts), figures)
