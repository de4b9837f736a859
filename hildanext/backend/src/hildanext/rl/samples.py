"""Answers to be read while a policy learns: a round's best and worst."""

from typing import Any

from hildanext.rl.rounds import Round

SHOWN = 2
"""Of either kind."""


def best_and_worst(now: Round | None) -> list[dict[str, Any]]:
    """The answers of the highest and of the lowest advantage, with what they earned."""
    if now is None:
        return []
    order = sorted(range(len(now.answers)), key=lambda row: -float(now.advantage[row]))
    rows = list(dict.fromkeys([*order[:SHOWN], *order[-SHOWN:]]))
    return [
        {
            "problem": now.answers[row].problem,
            "answer": now.answers[row].text,
            "reward": now.answers[row].reward,
            "advantage": round(float(now.advantage[row]), 4),
        }
        for row in rows
    ]
