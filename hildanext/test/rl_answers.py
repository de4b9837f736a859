"""Answers to learn from: written by an engine, invented, and a toy whose laws are known by heart."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from decoding_stubs import StubTokenizer
from hildanext.decoding.trajectory import Trajectory
from hildanext.engine.base import Finished, Request
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.models import Card, DiffusionModel
from hildanext.rl.batch import Answer, RolloutBatch, collate

RANDOM = {"name": "ordered", "order": "random", "per_step": 2, "temperature": 1.0}
PROMPTS = [(3, 4, 5, 6, 7, 8), (9, 10), (11, 12, 13, 14), (15,) * 9]


def written(model: DiffusionModel, decoder=RANDOM, prompts=PROMPTS, each: int = 3) -> RolloutBatch:
    """`each` answers to every prompt, as a local engine wrote and recorded them."""
    answers = recorded_answers(model, decoder, prompts, each)
    group = [number for number in range(len(prompts)) for _ in range(each)]
    return collate(answers, group, model.card.block_size, fill=0)


def recorded_answers(model: DiffusionModel, decoder, prompts=PROMPTS, each: int = 1, new: int = 13) -> list[Answer]:
    engine = LocalEngine(model, StubTokenizer(bos=0, eos=1), None, LocalEngineConfig(slots=5, quantum=1))
    asked = [
        Request(tokens=prompt, decoder=decoder, max_new_tokens=new, seed=17 * number + at, trajectory=True)
        for number, prompt in enumerate(prompts)
        for at in range(each)
    ]
    ended = {}
    for at, one in enumerate(asked):
        engine.submit(one, lambda event, at=at: ended.update({at: event}) if isinstance(event, Finished) else None)
    engine.close(120.0)
    answers = []
    for at, one in enumerate(asked):
        output = ended[at].answer
        answers.append(
            Answer(one.tokens, tuple(output.tokens), "", False, 0, output.weights, trajectory=output.trajectory)
        )
    return answers


def invented(
    prompts: Sequence[int] = (6, 6, 6, 9, 9, 8, 2), block_size: int = 4, traced: bool = True, per_step: int = 2
) -> RolloutBatch:
    """Random answers of 3 to 13 tokens, of the rows' steps `per_step` positions each. Equal neighbours are a group."""
    chance = np.random.default_rng(5)
    group = np.cumsum([0, *(a != b for a, b in zip(prompts, prompts[1:], strict=False))])
    answers = []
    for number, length in enumerate(prompts):
        prompt = tuple(np.random.default_rng(100 + int(group[number])).integers(2, 60, length).tolist())
        answer = tuple(chance.integers(2, 60, 3 + 2 * (number % 6)).tolist())
        whole = [*prompt, *answer]
        whole += chance.integers(2, 60, -len(whole) % block_size).tolist()
        trace = None
        if traced:
            step = np.full(len(whole), -1)
            for start in range(length // block_size * block_size, len(whole), block_size):
                places = np.arange(max(start, length), start + block_size)
                step[places] = chance.permutation(len(places)) // per_step
            there = step >= 0
            logp, entropy = (np.where(there, sign * chance.random(len(whole)), 0.0) for sign in (-1, 1))
            edits = np.zeros((0, 4), dtype=np.int64)
            trace = Trajectory(np.array(whole), length, step, logp, entropy, edits, np.zeros(0), False)
        answers.append(Answer(prompt, answer, "", True, 0, 0, trajectory=trace))
    return collate(answers, group.tolist(), block_size, fill=0)


def exact_norms(model: DiffusionModel) -> DiffusionModel:
    """The model with norms in its own dtype; Transformers' are computed in fp32, which rounds gradients to 1e-6."""
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__.endswith("RMSNorm") and not isinstance(norm, nn.RMSNorm):
                exact = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(module, name, exact)
    return model


Law = Callable[[Tensor, Tensor], Tensor]
"""Chance of a 1, from how many zeros and ones of the answer are visible."""

PROMPT = 3
MASK = 2
LENGTH = 3


def urn(zeros: Tensor, ones: Tensor) -> Tensor:
    """Toy P: Polya's urn, which is consistent in every order."""
    return (1 + ones) / (2 + zeros + ones)


def by_count(zeros: Tensor, ones: Tensor) -> Tensor:
    """Toy Q: 0.9, 0.7, 0.5 where one, two, three tokens are hidden, whichever those are."""
    return 0.9 - 0.2 * (LENGTH - 1 - zeros - ones)


class Toy(DiffusionModel):
    """Three binary tokens behind three of prompt. It counts what the attention lets each column see: values are
    averaged evenly, and the share of the prompt, which is always seen, gives the scale."""

    device, dtype = torch.device("cpu"), torch.float64
    head = torch.eye(4, dtype=torch.float64)
    banned = torch.tensor([False, False, True, True])

    def __init__(self, law: Law, block_size: int = LENGTH) -> None:
        nn.Module.__init__(self)
        self.law = law
        self.card = Card(
            mask_id=MASK, vocab_rows=4, vocab_real=2, block_size=block_size, shift="none", clean_mask="block_causal"
        )

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(tokens, 4).double()

    def __call__(self, embeddings: Tensor, positions: Tensor, attention) -> Tensor:
        values = embeddings[:, None]
        nothing = torch.zeros_like(values)
        shares = attention.attend(0, nothing, nothing, values, 1.0)[:, 0]
        counts = (shares / shares[..., PROMPT:].clamp_min(1e-9) * LENGTH).round()
        one = self.law(counts[..., 0], counts[..., 1])
        hidden = torch.zeros_like(embeddings)
        hidden[..., 0], hidden[..., 1] = (1 - one).clamp_min(1e-9).log(), one.clamp_min(1e-9).log()
        return hidden


def toy_answers(texts: Sequence[Sequence[int]], steps: Sequence[Sequence[int]] | None = None) -> RolloutBatch:
    """Texts of zeros and ones behind the toy's prompt, written in these steps (None: from left to right)."""
    answers = []
    for number, text in enumerate(texts):
        step = np.array([-1] * LENGTH + list(range(LENGTH) if steps is None else steps[number]))
        nothing, whole = np.zeros(2 * LENGTH), np.array([PROMPT] * LENGTH + list(text))
        trace = Trajectory(whole, LENGTH, step, nothing, nothing, np.zeros((0, 4), dtype=np.int64), np.zeros(0), False)
        answers.append(Answer((PROMPT,) * LENGTH, tuple(text), "", True, 0, 0, trajectory=trace))
    return collate(answers, [0] * len(answers), LENGTH, fill=0)
