"""An alignment that a test runs: of a small random model, with a reward that any text earns something of.

As a program it runs the section of a JSON file in a folder, for tests that kill it or start it twice.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hildanext.core.config import config
from hildanext.grading.base import Reward, Scores
from hildanext.grading.rewards import REWARDS


@config
class LettersReward(Reward):
    """The share of letters before n among an answer's letters."""

    def check(self, problem: Mapping[str, Any]) -> None:
        pass

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
        letters = [[letter for letter in text.lower() if letter.isalpha()] for text in completions]
        return [sum(letter < "n" for letter in one) / len(one) if one else 0.0 for one in letters]


def toy_problems(folder: Path) -> Path:
    """Forty beginnings, of which no right answer is known."""
    path = folder / "beginnings.jsonl"
    names = ("Lily", "Tom", "Ben", "Mia", "Sam")
    things = ("a cat", "a red ball", "an old book", "two cars", "a doll", "no toys", "cookies", "one flower")
    lines = [json.dumps({"prompt": f"{name} has {thing}"}) for name in names for thing in things]
    path.write_text("\n".join(lines) + "\n")
    return path


def toy_section(model: str, **more: Any) -> dict[str, Any]:
    """Four rounds of two problems with four answers each."""
    section = {
        "model": model,
        "problems": {"name": "jsonl", "path": str(toy_problems(Path(model).parent)), "held_out": 0.2},
        "reward": {"name": "letters"},
        "rollouts": {"name": "engine", "max_new_tokens": 9, "per_step": 2, "slots": 4},
        "rounds": 4,
        "problems_per_round": 2,
        "group": 4,
        "measure": {"problems": 4, "samples": 2},
        "prompting": "text",
        "train": {
            "batch_size": 1,
            "precision": "no",
            "learning_rate": {"peak": 1e-3},
            "evaluate_every": 2,
            "checkpoint_every": 1,
        },
    }
    return {**section, **more}


if __name__ == "__main__":
    from hildanext.rl_stage2 import rl

    REWARDS["letters"] = LettersReward
    rl(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], "FULL", quiet=True)
