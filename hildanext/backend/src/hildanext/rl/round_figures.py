"""What a round says of itself: the numbers of its line of metrics."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from hildanext.core.runtime import resident_mib
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.chunk import Chunk
from hildanext.rl.measure import SOLVED
from hildanext.trainer.processes import summed

SPENT = ("seconds_rollout", "seconds_reward", "seconds_known")
"""What a round takes before its first update."""


def figures_of(
    chunks: Sequence[Chunk],
    rewards: Float[Tensor, "groups answers"],
    advantage: Float[Tensor, " rows"],
    batch: RolloutBatch,
    highest: float,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Over all processes, but for seconds, which are the main one's."""
    answers = [answer for chunk in chunks for answer in chunk.answers]
    known = ~rewards.isnan()
    told = rewards[known]
    spread = torch.where(known, rewards, -torch.inf).amax(-1) - torch.where(known, rewards, torch.inf).amin(-1)
    texts: dict[int, set[str]] = {}
    for answer in answers:
        texts.setdefault(answer.group, set()).add(answer.text)
    sums = {
        "answers": len(answers),
        "dropped": sum(chunk.dropped for chunk in chunks),
        "unjudged": sum(answer.reward is None for answer in answers),
        "judged": len(told),
        "reward": float(told.sum()),
        "solved": int((told >= highest - SOLVED).sum()),
        "groups": len(rewards),
        "same": int((spread <= 0).sum()),
        "unique": sum(len(each) for each in texts.values()) / rewards.shape[1],
        "ended": sum(answer.ended for answer in answers),
        "tokens": sum(answer.tokens for answer in answers),
        "forwards": sum(answer.forwards for answer in answers),
        "entropy": float(batch.entropy[batch.written].sum()),
        "written": int(batch.written.sum()),
    }
    parts = {
        name: [answer.parts[name] for answer in answers if answer.parts is not None and answer.parts[name] is not None]
        for name in sorted({name for answer in answers for name in answer.parts or {}})
    }
    sums |= {f"part {name}": sum(values) for name, values in parts.items() if values}  # type: ignore[misc, arg-type]
    values = summed(accelerator, torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    total = dict(zip(sums, values, strict=True))
    seconds = {
        "answers_per_second": total["answers"] / max(sum(c.seconds for c in chunks), 1e-9),
        "seconds_rollout": sum(c.seconds for c in chunks),
        "seconds_reward": sum(c.judged_seconds for c in chunks),
    }
    return {**_means(total), **seconds, "resident_mib": resident_mib()}


def _means(total: dict[str, float]) -> dict[str, Any]:
    count, judged, groups = (max(total[name], 1.0) for name in ("answers", "judged", "groups"))
    parts = {name.removeprefix("part "): value / judged for name, value in total.items() if name.startswith("part ")}
    return {
        "reward": total["reward"] / judged,
        "reward_parts": parts,
        "solved": total["solved"] / judged,
        "zero_variance": total["same"] / groups,
        "unique": total["unique"] / groups,
        "length": total["tokens"] / count,
        "ended": total["ended"] / count,
        "entropy": total["entropy"] / max(total["written"], 1.0),
        "tokens_per_forward": total["tokens"] / total["forwards"] if total["forwards"] else None,
        "answers": int(total["answers"]),
        "dropped": int(total["dropped"]),
        "unjudged": int(total["unjudged"]),
    }
