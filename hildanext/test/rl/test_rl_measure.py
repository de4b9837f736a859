"""What is measured on held-out problems, of answers that are made up."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from hildanext.core.config import config
from hildanext.data.problems import Problem
from hildanext.grading.base import Reward, Scores
from hildanext.rl.batch import Answer
from hildanext.rl.measure import Measure, nothing_to_learn, tokens_per_forward
from hildanext.rl.policy import Policy


@config
class Earns(Reward):
    """The number that an answer is, of 2 at most; "?" cannot be judged."""

    @property
    def highest(self) -> float:
        return 2.0

    def check(self, problem: Mapping[str, Any]) -> None:
        pass

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
        for problem, text in zip(problems, completions, strict=True):
            assert problem["at"] == int(text.rpartition(" ")[2]), "an answer is judged by another problem"
        return [None if text.startswith("?") else float(text.partition(" ")[0]) for text in completions]


class Says:
    """A sampler that gives `texts` in turn; None is not whole in time. Each text is followed by its problem."""

    def __init__(self, texts: Sequence[str | None]) -> None:
        self.texts = texts
        self.asked: list[tuple[Any, Any, Any]] = []

    def sample(self, prompts: Any, seeds: Any, temperature: Any = None, wishes: Any = None) -> list[Answer | None]:
        self.asked.append((list(prompts), list(seeds), temperature))
        return [
            None if text is None else Answer(prompt, (1,) * (3 + prompt[0]), f"{text} {prompt[0]}", text != "0", 2, 0)
            for prompt, text in zip(prompts, self.texts, strict=True)
        ]

    def changed(self) -> None: ...
    def close(self) -> None: ...


class Encodes(Policy):
    def __init__(self) -> None:
        pass

    def encode(self, problem: Problem) -> tuple[int, ...]:
        return (int(problem.row["at"]),)


def measure(count: int, texts: Sequence[str | None]) -> tuple[Measure, Says]:
    problems = [Problem(str(at), f"line {at}", f"problem {at}", {"at": at}, str(at)) for at in range(count)]
    says = Says(texts)
    return Measure(Encodes(), says, problems, Earns()), says


def test_greedy_accuracy_counts_the_highest_reward_alone():
    """Of five problems two are right; half a reward is none, nor is what was not whole or could not be judged."""
    made, says = measure(5, ["2", "1", None, "?", "2"])
    told = made.greedy()
    assert told["accuracy"] == 2 / 5 and told["right"] == "10001"
    assert told["accuracy_low"] == pytest.approx(0.1176, abs=1e-4)
    assert told["accuracy_high"] == pytest.approx(0.7693, abs=1e-4)
    assert told["reward"] == pytest.approx(5 / 3) and told["ended"] == 1.0 and told["length"] == (3 + 4 + 6 + 7) / 4
    assert told["tokens_per_forward"] == (3 + 4 + 6 + 7) / 8
    assert made.greedy() == told and says.asked[0] == says.asked[1], "asked in the same way every time"
    prompts, seeds, temperature = says.asked[0]
    assert temperature == 0.0 and prompts == [(0,), (1,), (2,), (3,), (4,)] and len(set(seeds)) == 5


def test_sampled_accuracy_pass_at_k_and_groups_without_variance_by_hand():
    """Three problems of four answers: one right once, one never, one always but for an answer that nobody judged."""
    texts = ["2", "0", "1", "0", "1", "1", "1", "1", "2", "?", "2", "2"]
    made, says = measure(3, texts)
    told = made.sampled(4)
    assert told["sampled_accuracy"] == 4 / 12 and told["sampled_right"] == "1 0 3"
    assert told["pass_at_4"] == pytest.approx(2 / 3)
    assert told["zero_variance"] == pytest.approx(2 / 3), "an answer without a reward makes no variance"
    assert told["unique"] == pytest.approx((3 / 4 + 1 / 4 + 2 / 4) / 3)
    prompts, seeds, temperature = says.asked[0]
    assert temperature is None and prompts == [(0,)] * 4 + [(1,)] * 4 + [(2,)] * 4 and len(set(seeds)) == 12


def test_nobody_tells_forwards():
    assert tokens_per_forward([None, Answer((1,), (1, 2), "a", True, 0, 0)]) == 0.0


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"zero_variance": 0.95, "pass_at_8": 0.5}, "95% of the held-out problems all earn the same"),
        ({"zero_variance": 0.5, "pass_at_8": 0.04}, "of 8 answers one is right for 4%"),
        ({"zero_variance": 0.9, "pass_at_8": 0.05}, None),
    ],
)
def test_a_start_from_which_nothing_is_learnt_is_told(start: dict[str, float], words: str | None):
    told = nothing_to_learn(start, 8)
    assert told is None if words is None else told is not None and words in told
    assert nothing_to_learn(start, 0) is None
