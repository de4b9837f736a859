"""What a sample depends on: a run goes on only with samples of the same identity, wherever data and weights lie."""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from hildanext.core.config import plain
from hildanext.core.runtime import machine
from hildanext.eval.models import EvalModel
from hildanext.eval.tasks.base import Task, WritingTask
from hildanext.eval.tasks.records import fingerprint

FORMAT = 1
"""Of the samples; part of their identity."""


def sample_identity(name: str, task: Task, model: EvalModel, seed: int, weights: str) -> dict[str, Any]:
    """Data count by what they say, weights by their values (`weights_hash`). The keys are those of older runs."""
    chosen = {key: value for key, value in plain(task).items() if key not in ("data", "few_shot_data")}
    identity = {
        "format": FORMAT,
        "task": {"name": name, **chosen},
        "data": fingerprint(task.records()),
        "way": model.settings,
        "weights": weights,
        "dtype": str(model.network.dtype).removeprefix("torch."),
        "device": model.network.device.type,
        "seed": seed,
    }
    if isinstance(task, WritingTask) and task.chat:
        identity["chat_template"] = fingerprint([{"template": model.tokenizer.chat_template}])
    return identity


def session_facts(model: EvalModel, batch_size: int) -> dict[str, Any]:
    """What may differ between the sessions of a run."""
    facts = machine(model.network.device, model.network.dtype)
    kept = ("device", "device_name", "dtype", "threads")
    return {**{name: facts[name] for name in kept}, "batch_size": batch_size}


def weights_hash(causal_lm: PreTrainedModel) -> str:
    """A hash of 256 values of every tensor: another checkpoint has another, wherever it lies."""
    digest = hashlib.sha256()
    for name, tensor in sorted(causal_lm.state_dict().items()):
        flat = tensor.detach().flatten()
        count = min(256, flat.numel())
        places = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)
        digest.update(name.encode())
        digest.update(flat[places.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
