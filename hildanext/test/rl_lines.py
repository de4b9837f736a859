"""Lines of metrics as an alignment writes them, made up: a policy that learns, and is watched."""

import math
from typing import Any


def rl_lines(rounds: int = 60, parts: bool = True) -> list[dict[str, Any]]:
    """One update a round; an evaluation each ten, samples with it, and an alarm at round 45."""
    lines = [evaluation(0, 0.5, sampled=True)]
    for at in range(rounds):
        done, wave = at / max(rounds - 1, 1), math.sin(1.7 * at)
        reward = 0.35 + 0.4 * done + 0.06 * wave
        known = 0.5 + 0.03 * wave
        lines.append({
            "kind": "train", "step": at + 1, "tokens": 4000 * (at + 1), "phase": "stable", "block_size": 8,
            "learning_rate": 2.5e-4, "loss": 0.01 * wave, "losses": {"ratio": 1.0, "clipped": 0.0, "kl": 0.02 * done},
            "gradient_norm": 0.6 + 0.2 * wave, "seconds": 3.9 + known, "seconds_rollout": 1.1 + 0.1 * wave,
            "seconds_reward": 0.05, "seconds_known": known, "seconds_update": 2.4 - 0.3 * wave,
            "round": at, "update": 0,
            "reward": reward, "solved": reward - 0.05, "zero_variance": 0.2 + 0.4 * done, "unique": 0.7 - 0.4 * done,
            "length": 14 + wave, "ended": 0.9 + 0.1 * done, "entropy": 1.1 - 0.8 * done + 0.05 * wave,
            "reward_parts": {"right": reward - 0.05, "form": 0.6 + 0.3 * done} if parts else {"reward": reward},
            "tokens_per_forward": 1.9, "answers": 64, "dropped": 0, "unjudged": 0, "answers_per_second": 60.0,
            "ratio_max": 1.0, "resident_mib": 900.0, "columns": 5200.0,
        })  # fmt: skip
        if (at + 1) % 10 == 0:
            lines.append(evaluation(at + 1, 0.5 + 0.3 * done, sampled=at + 1 == rounds))
            lines += [
                {"kind": "sample", "step": at + 1, "problem": "sum 7", "answer": f"It is {n} < 9.\n#### {n}",
                 "reward": float(n == 4), "advantage": 0.5 if n == 4 else -0.5}
                for n in (4, 5)
            ]  # fmt: skip
        if at == 44:
            words = "55% of the groups of the last 10 rounds earn the same throughout"
            lines.append({"kind": "alarm", "step": at + 1, "alarm": "no_variance", "words": words})
    return lines


def evaluation(step: int, accuracy: float, sampled: bool = False) -> dict[str, Any]:
    right = round(100 * accuracy)
    line = {
        "kind": "eval", "step": step, "tokens": 4000 * step, "mask_positions": 0, "accuracy": accuracy,
        "accuracy_low": accuracy - 0.09, "accuracy_high": accuracy + 0.09, "reward": accuracy, "ended": 1.0,
        "length": 13.0, "tokens_per_forward": 1.9, "right": "1" * right + "0" * (100 - right),
    }  # fmt: skip
    more = {
        "sampled_accuracy": accuracy - 0.15,
        "pass_at_8": min(1.0, accuracy + 0.2),
        "zero_variance": 0.3,
        "unique": 0.6,
    }
    return {**line, **(more if sampled else {})}
