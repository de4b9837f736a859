"""A policy so small that everything it can do is listed: the exact gradient of what it earns.

One block is written in random order, `per_step` masks a forward, over a few tokens, of which one ends the text. Every
way to write every text is a row, with its chance.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hildanext.models.attention.dense import install_seam
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.card import Alignment, Card, alignment_fields
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.looks import Look, score

END = 0
"""The token that ends a text."""


@dataclass(frozen=True)
class Enumeration:
    """Every trajectory of a policy."""

    model: DiffusionModel
    batch: RolloutBatch
    chance: Float[Tensor, " rows"]
    """Of each trajectory; they sum to 1."""
    reward: Float[Tensor, " rows"]
    value: float
    """E[r]."""
    gradient: Float[Tensor, " parameters"]
    """Of E[r], exactly."""

    @property
    def advantage(self) -> Float[Tensor, " rows"]:
        """r - E[r]: the baseline that a large group has."""
        return self.reward - self.value


def small_policy(vocab: int, block_size: int, alignment: Alignment, seed: int) -> DiffusionModel:
    """A random policy in fp64 over `vocab` tokens; the mask is the next id."""
    config = LlamaConfig(
        vocab_size=vocab + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4 * block_size,
        tie_word_embeddings=True,
        initializer_range=0.35,
        attn_implementation=install_seam(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        causal_lm = LlamaForCausalLM(config).double().eval()
    for parent, name in [
        (part, name)
        for part in causal_lm.modules()
        for name, child in part.named_children()
        if isinstance(child, LlamaRMSNorm)
    ]:  # Transformers' own computes in fp32 whatever the weights are
        setattr(parent, name, nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=torch.float64))
    convention: dict[str, Any] = dict(alignment_fields(alignment))
    card = Card(mask_id=vocab, vocab_rows=vocab + 1, vocab_real=vocab, block_size=block_size, **convention)
    return DiffusionModel(causal_lm, card).eval()


def enumerate_policy(model: DiffusionModel, per_step: int, seed: int) -> Enumeration:
    """Everything the policy can write behind a prompt of one block. Half of the answers earn 1, drawn by `seed`."""
    card, size = model.card, model.card.block_size
    texts = list(itertools.product(range(card.vocab_real), repeat=size))
    orders = _step_plans(size, per_step)
    answers = sorted({_cut(text) for text in texts})
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(answers), generator=generator).tolist()
    earns = {answer: float(order[number] < len(answers) / 2) for number, answer in enumerate(answers)}
    by_text = _text_batch(model, texts, [tuple([0] * size)] * len(texts))
    logp, entropy = _laws(model, by_text, texts)
    rows = [(number, plan) for number in range(len(texts)) for plan in orders]
    told = {name: torch.zeros(len(rows), size, dtype=torch.float64) for name in ("logp", "entropy")}
    sums = []
    for row, (number, plan) in enumerate(rows):
        terms = []
        for place, when in enumerate(plan):
            hidden = tuple(other >= when for other in plan)
            terms.append(logp[hidden][number, place])
            told["logp"][row, place] = terms[-1].detach()
            told["entropy"][row, place] = entropy[hidden][number, place]
        sums.append(torch.stack(terms).sum())
    chance = torch.stack(sums).exp() / len(orders)
    reward = torch.tensor([earns[_cut(texts[number])] for number, _ in rows], dtype=torch.float64)
    value = (chance * reward).sum()
    gradient = flat_gradient(value, parameters(model))
    batch = _text_batch(model, [texts[number] for number, _ in rows], [plan for _, plan in rows], told)
    return Enumeration(model, batch, chance.detach(), reward, value.item(), gradient)


def parameters(model: DiffusionModel) -> list[Tensor]:
    return [one for one in model.parameters() if one.requires_grad]


def flat_gradient(value: Float[Tensor, ""], wanted: Sequence[Tensor], retain: bool = False) -> Float[Tensor, " all"]:
    """The gradient as one vector; 0 for what `value` does not depend on."""
    parts = torch.autograd.grad(value, wanted, retain_graph=retain, allow_unused=True)
    zeros = (torch.zeros_like(one) if part is None else part for one, part in zip(wanted, parts, strict=True))
    return torch.cat([part.detach().flatten() for part in zeros])


def _step_plans(size: int, per_step: int) -> list[tuple[int, ...]]:
    """Step of each position, for every way that random order can go; all equally likely."""
    orders = itertools.permutations(range(size))
    return sorted({tuple(order.index(place) // per_step for place in range(size)) for order in orders})


def _cut(text: tuple[int, ...]) -> tuple[int, ...]:
    """The answer: up to and including its end."""
    return text[: text.index(END) + 1] if END in text else text


def _laws(
    model: DiffusionModel, batch: RolloutBatch, texts: Sequence[tuple[int, ...]]
) -> tuple[dict[tuple[bool, ...], Tensor], dict[tuple[bool, ...], Tensor]]:
    """By which positions are hidden: log p of each text's hidden tokens, and the entropy there; [texts size] each."""
    size, vocab = model.card.block_size, model.card.vocab_real
    states = [hidden for hidden in itertools.product((False, True), repeat=size) if any(hidden)]
    looks = []
    for hidden in states:
        masked = torch.zeros_like(batch.scored)
        masked[:, size:] = torch.tensor(hidden)
        looks.append(Look(masked, masked, masked.double(), size))
    raw = score(model, batch, looks).raw[:, :, size:]
    logp = dict(zip(states, raw, strict=True))
    place_value = [vocab ** (size - 1 - place) for place in range(size)]
    digits = torch.tensor(texts)
    entropy = {}
    for hidden, told in logp.items():
        found = torch.zeros(len(texts), size, dtype=torch.float64)
        for place in (place for place in range(size) if hidden[place]):
            first = torch.arange(len(texts)) - digits[:, place] * place_value[place]
            law = torch.stack([told.detach()[first + token * place_value[place], place] for token in range(vocab)])
            found[:, place] = -(law.exp() * law).sum(0)
        entropy[hidden] = found
    return logp, entropy


def _text_batch(
    model: DiffusionModel,
    texts: Sequence[tuple[int, ...]],
    steps: Sequence[tuple[int, ...]],
    told: dict[str, Tensor] | None = None,
) -> RolloutBatch:
    """Each text behind a prompt of one block."""
    size, count = model.card.block_size, len(texts)
    prompt = torch.arange(size) % (model.card.vocab_real - 1) + 1
    answer = torch.tensor(texts)
    tokens = torch.cat([prompt.expand(count, size), answer], 1)
    behind = ((answer == END).cumsum(1) - (answer == END).long()) > 0
    nothing = torch.zeros(count, size)
    known = {} if told is None else told
    empty = torch.zeros(count, size, dtype=torch.float64)
    return RolloutBatch(
        tokens=tokens,
        document=torch.zeros_like(tokens),
        position=torch.arange(2 * size).expand(count, -1).contiguous(),
        prompt=torch.full((count,), size),
        scored=torch.cat([nothing.bool(), ~behind], 1),
        after=torch.cat([nothing.bool(), behind], 1),
        step=torch.cat([nothing.long() - 1, torch.tensor(steps)], 1),
        logp=torch.cat([empty, known.get("logp", empty)], 1),
        entropy=torch.cat([empty, known.get("entropy", empty)], 1),
        group=torch.zeros(count, dtype=torch.long),
        edits=torch.zeros(0, 5, dtype=torch.long),
    )
