"""What a model would have answered on its way to an answer: whole texts, with the states they were predicted in."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext.core.runtime import make_generator
from hildanext.detokenization import Detokenizer
from hildanext.inference import eos_ids
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.sampling import sample, uniforms
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.chunk import ToldAnswer
from hildanext.rl.desk import Desk
from hildanext.rl.likelihoods.predictions import Predictions
from hildanext.rl.looks import Look, states_at
from hildanext.rl.material import Material, widened
from hildanext.rl.replay import Replay

STEPS = 31
"""Stream of the run's seed: which steps are replayed."""
NAME = "predictions"
"""Of the files that keep them."""


def with_predictions(material: Material, desk: Desk, steps: int) -> Material:
    """The answers and `steps` intermediate predictions of each, judged, with one look at every row.

    Row by row: the answers, then the predictions. A look of an answer reads the last step of each block. Raises
    `ConfigError` as the likelihood `predictions`.
    """
    batch, card = material.batch, desk.policy.model.card
    own = Predictions().draw(batch, card, torch.Generator())[0]
    kept = desk.arrays(NAME, lambda: _predicted(batch, desk, steps))
    rows = kept["row"].tolist()
    told = desk.judged(f"{NAME}-texts", _told(material, kept, desk))
    labels = torch.cat([batch.tokens, kept["labels"]])
    masked, read = (torch.cat([getattr(own, name), kept[name].bool()]) for name in ("masked", "read"))
    look = Look(masked, read, read.double(), card.block_size, None, labels)
    right = [answer.reward for answer in told if answer.reward is not None]
    figures = {"predictions": float(len(told)), "predictions_reward_sum": float(sum(right))}
    whole = RolloutBatch.join([batch, batch.rows(rows)]) if rows else batch
    return replace(
        material,
        batch=whole,
        answers=[*material.answers, *told],
        look=look,
        figures={**material.figures, **figures},
    )


def draw_states(steps: Int[Tensor, " rows"], count: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Row and step: `count` different steps of each row but the last one, or all of them where it has fewer."""
    drawn = []
    for row, most in enumerate(steps.tolist()):
        order = torch.randperm(max(most - 1, 0), generator=generator)[:count]
        drawn += [(row, step) for step in sorted(order.tolist())]
    return drawn


@torch.no_grad()
def _predicted(batch: RolloutBatch, desk: Desk, count: int) -> dict[str, Tensor]:
    """The predictions as arrays: `row` they belong to, `labels` (the whole text), `masked`, and `read`."""
    policy, width = desk.policy, batch.tokens.shape[1]
    model, size = policy.model, policy.model.card.block_size
    every = Replay.of(batch, size)
    most = torch.zeros(len(batch.tokens), dtype=torch.long)
    owner = torch.zeros_like(every.steps)
    owner[every.block] = torch.arange(len(most))[:, None].expand_as(every.block)
    most = most.scatter_reduce(0, owner, every.steps, "amax")
    generator = make_generator(desk.seed, STEPS, *sorted(desk.numbers.values())[:1])
    states = draw_states(most, count, generator)
    rows = [row for row, _ in states]
    if not rows:
        nothing = torch.zeros(0, width, dtype=torch.long)
        return {"row": nothing[:, 0], "labels": nothing, "masked": nothing.to(torch.uint8), "read": nothing.byte()}
    part = replace(widened(batch.rows(rows), width), group=torch.arange(len(rows)))
    replay = Replay.of(part, size)
    at = torch.zeros_like(replay.steps)
    at[replay.block] = torch.tensor([step for _, step in states])[:, None].expand_as(replay.block)
    state = replay.look(at, torch.full_like(at, torch.iinfo(torch.long).max))
    uniform = torch.stack(
        [
            uniforms(desk.seed_for(int(batch.group[row]), "predictions", number), width)
            for number, row in enumerate(rows)
        ]
    )
    with policy.sampling():
        labels = part.tokens.clone()
        labels[state.masked] = _drawn(model, part, state, uniform, desk.rollouts.temperature)
    ends = torch.tensor(sorted(eos_ids(model, policy.tokenizer)))
    read = state.masked & ~behind_end(labels, part, ends)
    return {"row": torch.tensor(rows), "labels": labels, "masked": state.masked.byte(), "read": read.byte()}


def _drawn(
    model: DiffusionModel,
    part: RolloutBatch,
    state: Look,
    uniform: Float[Tensor, "rows positions"],
    temperature: float,
    chunk: int = 128,
) -> Int[Tensor, " masked"]:
    """A token for each mask, in row-major order, with logits for `chunk` of them at a time."""
    where = state.masked.nonzero(as_tuple=True)
    hidden, _ = states_at(model, part, state, where, packed=False)
    heights = uniform[where].to(hidden.device)
    tokens = [
        sample(model.logits(some), height, temperature)
        for some, height in zip(hidden.split(chunk), heights.split(chunk), strict=True)
    ]
    return torch.cat(tokens).cpu()


def behind_end(
    labels: Int[Tensor, "rows positions"], part: RolloutBatch, ends: Int[Tensor, " ends"]
) -> Bool[Tensor, "rows positions"]:
    """Positions behind the first end of text of each answer."""
    answering = (part.document >= 0) & (torch.arange(labels.shape[1]) >= part.prompt[:, None])
    end = answering & torch.isin(labels, ends)
    return end.cumsum(-1) - end.long() > 0


def _told(material: Material, kept: dict[str, Tensor], desk: Desk) -> list[ToldAnswer]:
    """Texts of the predictions, not judged yet."""
    tokenizer: Any = desk.policy.tokenizer
    ends, batch, answers = eos_ids(desk.policy.model, tokenizer), material.batch, []
    for row, labels in zip(kept["row"].tolist(), kept["labels"], strict=True):
        first, last = int(batch.prompt[row]), int((batch.document[row] >= 0).sum())
        tokens = labels[first:last].tolist()
        stop = next((place for place, token in enumerate(tokens) if token in ends), None)
        text = Detokenizer(tokenizer, labels[:first].tolist()).text(tokens[:stop])
        of = material.answers[row]
        length = len(tokens) if stop is None else stop + 1
        answers.append(ToldAnswer(of.group, of.problem, text, length, stop is not None, 1))
    return answers
