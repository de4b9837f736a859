"""A policy that reads and writes characters, a sampler that says what it is told to, and a desk between them."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import random_model
from hildanext.data.problems import Problem
from hildanext.decoding.trajectory import Trajectory
from hildanext.grading.gsm8k import Gsm8kReward
from hildanext.rl.batch import Answer
from hildanext.rl.desk import Desk
from hildanext.rl.policy import Policy
from hildanext.rl.rollouts.engine import EngineRollouts

CHARACTERS = "0123456789+-*/=#<>. \nabcdefghijklmnopqrstuvwxyzST?"
END = 1


def characters() -> PreTrainedTokenizerFast:
    """Ids: 0 is `<s>`, 1 is `</s>`, then one for each character."""
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(word, special=True) for word in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def a_policy(alignment: str = "parent", block_size: int = 4) -> Policy:
    model = random_model(alignment=alignment, block_size=block_size, layers=1)
    return Policy(model, characters(), chat=False, adapters=False)


def sums(prompt: str = "two plus 3 so what is it", answer: str = "2+3=5\n#### 5") -> Problem:
    return Problem("a", "line 1", prompt, {"question": prompt, "answer": answer}, "sum", answer)


class Says:
    """A `FillingSampler` that answers what `texts` gives for each call, and remembers what it was asked."""

    def __init__(self, policy: Policy, *texts: list[str | None], traced: bool = False) -> None:
        self.policy, self.texts, self.traced = policy, list(texts), traced
        self.asked: list[tuple] = []

    def sample(self, prompts, seeds, temperature=None, wishes=None):
        self.asked.append((list(prompts), list(seeds), wishes))
        said = self.texts.pop(0)
        assert len(said) == len(prompts), "a test says as many texts as are asked for"
        return [
            None if text is None else self._answer(prompt, text, wishes[row].given if wishes else ())
            for row, (prompt, text) in enumerate(zip(prompts, said, strict=True))
        ]

    def _answer(self, prompt, text, given) -> Answer:
        tokens = [*self.policy.tokenizer(text, add_special_tokens=False).input_ids, END]
        for place, token in given:
            assert tokens[place] == token, f"the text {text!r} does not hold what was given at {place}"
        places = tuple(place for place, _ in given)
        trajectory = self._trajectory(prompt, tokens, places) if self.traced else None
        return Answer(tuple(prompt), tuple(tokens), text, True, len(tokens), 0, trajectory, places)

    def _trajectory(self, prompt, tokens, given) -> Trajectory:
        """From left to right in every block, one token a step."""
        size = self.policy.model.card.block_size
        whole = [*prompt, *tokens]
        whole += [END] * (-len(whole) % size)
        step, first = torch.full((len(whole),), -1), len(prompt)
        for start in range(0, len(whole), size):
            places = [p for p in range(start, start + size) if p >= first and p - first not in given]
            step[places] = torch.arange(len(places))
        zeros = torch.zeros(len(whole), dtype=torch.float64).numpy()
        edits = torch.zeros(0, 4, dtype=torch.long).numpy()
        return Trajectory(torch.tensor(whole).numpy(), first, step.numpy(), zeros, zeros, edits, zeros[:0], False)

    def changed(self) -> None: ...

    def facts(self):
        return {}

    def close(self) -> None: ...


def a_desk(folder: Path, policy: Policy, sampler: Says, problem: Problem, reward=None, **knobs) -> Desk:
    return Desk(
        policy=policy,
        sampler=sampler,
        reward=Gsm8kReward() if reward is None else reward,
        rollouts=EngineRollouts(max_new_tokens=32, **knobs),
        path=folder / "round-00000" / "process-0-from-0000",
        problems={0: problem},
        numbers={0: 0},
        seed=0,
        encode=policy.encode,
    )
