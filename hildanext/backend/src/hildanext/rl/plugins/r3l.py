"""R3L: what is wrong in an answer is pointed out, and the answer is made again from there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.detokenization import Detokenizer
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.chunk import ToldAnswer
from hildanext.rl.desk import Ask, Desk
from hildanext.rl.material import Material
from hildanext.rl.measure import SOLVED
from hildanext.rl.plugins.base import Around, Plugin
from hildanext.rl.plugins.imitation import Lesson, lessons_of
from hildanext.rl.plugins.reflections import read_reflection, reflection_prompt
from hildanext.rl.plugins.verifiers import VERIFIERS, Fault
from hildanext.rl.rollouts.base import Ids, Wish


@config
class R3l(Plugin):
    """Wrong answers are reflected on, masked again where they are at fault, and denoised with the hint in the prompt,
    at most `retries` times, until one is right. The last attempt joins its group, under the prompt without the hint.

    `again` says what is masked: from the fault to the end (`suffix`), or the tokens of the fault alone (`fault`), which
    then keep their number. What is kept is seen from the first step on. Pivotal credit: neither the attempt nor the
    answer that it began from carries a gradient in what both share, nor counts it in its length.

    With `imitate` what led to a right answer is learnt as well, by fine-tuning: under its own prompt each, the
    reflection of the reflector `model`, and the attempt that the hint guided, in what was made anew. Only attempts that
    are right, and better than what they began from, teach so. These are rows beside the groups, with `imitate` as their
    advantage, and count as answers in what the loss is divided by. Under `shuffled_rewards` there are none.

    The amplification of what is better is the advantage `amplified`; its answers beyond the group's are the retries.

    Paper: R3L, arXiv:2601.03715, an autoregressive method; a diffusion model may mask any set of positions again.
    Differs: the reflector `verifier` is ours, for models too small to reflect. Every wrong answer is tried again, not
    half a group. Fine-tuning is a policy gradient of a constant advantage, with the objective's clip and KL, not a loss
    of its own, and is off unless it is asked for; a reflection is learnt in the tokenizer's tokens of its text. Any
    objective is taken: the ratio is to the policy under the prompt without the hint.
    """

    reflector: Literal["verifier", "model"] = "verifier"
    """Who finds the fault: rules of the task, or the policy, which is asked for a reflection in JSON."""
    retries: int = Field(default=1, ge=1, le=2)
    hint: bool = True
    """Whether the hint stands in the retry's prompt. Without it an attempt keeps its steps, so that a likelihood of
    actions can replay them."""
    again: Literal["suffix", "fault"] = "suffix"
    imitate: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Advantage of reflections and guided attempts that led to a right answer; 0 teaches none."""
    most: int | None = Field(default=None, ge=1)
    """Answers of a group that are tried again; None: all wrong ones."""

    def check(self, around: Around) -> None:
        if not around.rollouts.fills:
            raise ConfigError(
                "r3l keeps a part of an answer and samples the rest, which these rollouts cannot",
                "take rollouts engine",
            )
        if self.reflector == "verifier" and type(around.reward) not in VERIFIERS:
            known = ", ".join(kind.__name__.removesuffix("Reward").lower() for kind in VERIFIERS)
            raise ConfigError(
                f"r3l has no verifier for answers judged by {type(around.reward).__name__}",
                f"take one of the rewards {known}, or the reflector model",
            )
        if around.likelihood.of_actions and self.hint:
            raise ConfigError(
                "r3l samples a retry with a hint that it is not learnt under: its steps cannot be replayed",
                "set r3l's hint to false, or take the likelihood block_elbo",
            )
        if self.imitate:
            self._check_imitation(around)
        if type(around.objective).__name__ == "Wd1pp":
            raise ConfigError(
                "wd1pp learns predictions of whole answers, and r3l parts of them", "leave r3l out, or take wd1"
            )

    def _check_imitation(self, around: Around) -> None:
        if not self.hint and self.reflector == "verifier":
            raise ConfigError(
                f"r3l.imitate {self.imitate:g} has nothing to imitate: no hint guides an attempt, and rules reflect",
                "set r3l's hint to true, or take the reflector model",
            )
        if around.likelihood.of_actions:
            raise ConfigError(
                f"r3l.imitate {self.imitate:g} learns texts, of which this likelihood would replay the steps",
                "set r3l's imitate to 0, or take the likelihood block_elbo",
            )

    def more(self, material: Material, desk: Desk) -> Material:
        highest = desk.reward.highest - SOLVED
        figures = {"r3l_tried": 0.0, "r3l_better": 0.0, "r3l_right": 0.0, "r3l_no_room": 0.0}
        standing = Standing({row: row for row in self._wrong(material.answers, highest)}, material)
        for attempt in range(self.retries):
            faults = self._faults(standing, desk, attempt)
            if not self._try(standing, faults, desk, attempt, figures, highest):
                break
        if self.imitate:
            size, end = desk.policy.model.card.block_size, desk.policy.end
            figures["r3l_imitated"] = float(len(standing.lessons))
            lessons = lessons_of(standing.lessons, self.imitate, size, end)
            material = replace(material, lessons=_both(material.lessons, lessons))
        return _with_retries(material, standing, figures)

    def _wrong(self, answers: Sequence[ToldAnswer], highest: float) -> list[int]:
        counts: dict[int, int] = {}
        rows = []
        for row, answer in enumerate(answers):
            if answer.reward is not None and answer.reward < highest and answer.text:
                counts[answer.group] = counts.get(answer.group, 0) + 1
                if self.most is None or counts[answer.group] <= self.most:
                    rows.append(row)
        return rows

    def _faults(self, standing: "Standing", desk: Desk, attempt: int) -> dict[int, Fault]:
        """Of the answer that stands for each base row that is still wrong."""
        told = {base: standing.told(base) for base in standing.open}
        problems = {base: desk.problems[answer.group] for base, answer in told.items()}
        if self.reflector == "verifier":
            find = VERIFIERS[type(desk.reward)]
            return {base: find(problems[base].row, answer.text) for base, answer in told.items()}
        if not told:
            return {}
        prompts = [
            desk.encode(replace(problems[base], prompt=reflection_prompt(problems[base].prompt, answer.text)))
            for base, answer in told.items()
        ]
        roomy = [base for base, prompt in zip(told, prompts, strict=True) if _fits(desk, prompt)]
        asked = [prompt for prompt in prompts if _fits(desk, prompt)]
        seeds = [desk.seed_for(told[base].group, "r3l reflection", attempt, base) for base in roomy]
        texts = desk.texts(f"r3l-{attempt}-reflections", asked, seeds) if asked else []
        read = {}
        for base, prompt, text in zip(roomy, asked, texts, strict=True):
            if text is not None:
                read[base], standing.said[base] = read_reflection(text, told[base].text), (prompt, text)
        return {base: fault for base, fault in read.items() if fault is not None}

    def _try(
        self,
        standing: "Standing",
        faults: dict[int, Fault],
        desk: Desk,
        attempt: int,
        figures: dict[str, float],
        highest: float,
    ) -> bool:
        """One attempt for each fault; whether anything was asked."""
        asks, bases, kepts = list[Ask](), list[int](), list[list[int]]()
        for base, fault in faults.items():
            answer = standing.told(base)
            problem = desk.problems[answer.group]
            prompt = desk.encode(problem)
            shown = None
            if self.hint:
                shown = desk.encode(replace(problem, prompt=f"{problem.prompt}\n\n{fault.hint}"))
                if not _fits(desk, shown):
                    figures["r3l_no_room"] += 1
                    continue
            tokens = standing.tokens(base)
            kept = kept_places(desk.policy.tokenizer, prompt, tokens, fault, self.again)
            if len(kept) == len(tokens):
                continue
            given = tuple((place, tokens[place]) for place in kept)
            seed = desk.seed_for(answer.group, "r3l", attempt, base)
            asks.append(Ask(problem, answer.group, seed, prompt, shown, Wish(given)))
            bases.append(base)
            kepts.append(kept)
        if not asks:
            return False
        chunk, rows = desk.answers(f"r3l-{attempt}", asks)
        made = None if chunk.batch is None else Material(chunk.batch, chunk.answers)
        for place, number in enumerate(rows):
            assert made is not None
            before, now = standing.told(bases[number]).reward, made.answers[place].reward
            figures["r3l_tried"] += 1
            figures["r3l_better"] += now is not None and before is not None and now > before
            figures["r3l_right"] += now is not None and now >= highest
            if self.imitate and now is not None and now >= highest and before is not None and now > before:
                lessons = _lessons(standing, bases[number], asks[number], made, place, desk)
                standing.lessons += [one for one in lessons if len(one.tokens) <= desk.policy.room(len(one.prompt))]
                figures["r3l_no_room"] += sum(len(one.tokens) > desk.policy.room(len(one.prompt)) for one in lessons)
            standing.put(bases[number], made, place, kepts[number], now is None or now >= highest)
        return True


class Standing:
    """The latest attempt at each answer that was wrong."""

    def __init__(self, rows: dict[int, int], base: Material) -> None:
        self.base = base
        self.latest: dict[int, tuple[Material, int]] = {row: (base, row) for row in rows}
        self.open = list(rows)
        """Base rows that may be tried again."""
        self.said: dict[int, tuple[Ids, str]] = {}
        """Of each base row that the policy reflected on: what it was asked last, and what it said."""
        self.lessons: list[Lesson] = []
        self.kept: dict[int, Sequence[int]] = {}
        """Of each base row that was tried: the places that its first attempt kept of it."""

    def told(self, base: int) -> ToldAnswer:
        material, row = self.latest[base]
        return material.answers[row]

    def tokens(self, base: int) -> list[int]:
        """Of the answer, its end of text among them."""
        material, row = self.latest[base]
        first = int(material.batch.prompt[row])
        return material.batch.tokens[row, first : first + self.told(base).tokens].tolist()

    def put(self, base: int, made: Material, row: int, kept: Sequence[int], over: bool) -> None:
        self.latest[base] = made, row
        self.kept.setdefault(base, kept)
        if over:
            self.open.remove(base)

    def retries(self) -> list[Material]:
        """The last attempts."""
        return [made.rows([row]) for made, row in self.latest.values() if made is not self.base]


def _lessons(standing: Standing, base: int, ask: Ask, made: Material, row: int, desk: Desk) -> list[Lesson]:
    """What led to a right attempt: the reflection where the policy made one, and the attempt where a hint guided it."""
    about, lessons = made.answers[row], []
    if base in standing.said:
        prompt, text = standing.said[base]
        tokens = (*desk.policy.tokenizer(text, add_special_tokens=False).input_ids, desk.policy.end)
        lessons.append(Lesson(prompt, tokens, text, about))
    if ask.shown is not None:
        first = int(made.batch.prompt[row])
        answer = slice(first, first + about.tokens)
        given = (~made.batch.scored[row, answer]).nonzero()[:, 0].tolist()  # kept, or known by another plugin
        tokens = tuple(made.batch.tokens[row, answer].tolist())
        lessons.append(Lesson(ask.shown, tokens, about.text, about, tuple(given)))
    return lessons


def _both(one: Material | None, other: Material | None) -> Material | None:
    there = [lessons for lessons in (one, other) if lessons is not None]
    return Material.join(there) if there else None


def kept_places(
    tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], fault: Fault, again: Literal["suffix", "fault"]
) -> list[int]:
    """Places of an answer's tokens that are not made again: those that end before the fault begins, and, where the
    fault alone is to be made again, those that begin behind it."""
    pieces, place, kept = Detokenizer(tokenizer, prompt).pieces(tokens), 0, []
    for number, piece in enumerate(pieces):
        end = place + len(piece)
        before = end <= fault.begin and (piece != "" or end < fault.begin)
        if before or (again == "fault" and place >= fault.end):
            kept.append(number)
        place = end
    return kept


def credited_after(batch: RolloutBatch, kept: dict[int, Sequence[int]]) -> Bool[Tensor, "rows positions"]:
    """Everything but the places of some rows' answers that an attempt has kept."""
    credited = torch.ones(batch.tokens.shape, dtype=torch.bool)
    for row, places in kept.items():
        credited[row, [int(batch.prompt[row]) + place for place in places]] = False
    return credited


def _fits(desk: Desk, prompt: Sequence[int]) -> bool:
    return desk.policy.room(len(prompt)) >= desk.rollouts.max_new_tokens


def _with_retries(material: Material, standing: Standing, figures: dict[str, float]) -> Material:
    retries = standing.retries()
    if not retries:
        return replace(material, figures={**material.figures, **figures})
    credited = credited_after(material.batch, standing.kept)
    if material.credited is not None:
        credited &= material.credited
    joined = Material.join([replace(material, credited=credited), *retries])
    return replace(joined, figures={**material.figures, **figures})
