"""The numbers of docs/results/ablations/kv.md: what pruned caches keep, and what that costs.

python hildanext/scripts/measure_kv.py bytes WAY
python hildanext/scripts/measure_kv.py quality TEXT PROMPT BLOCKS DOCUMENTS
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hildanext.core.registry import under_profile
from hildanext.core.runtime import RuntimeConfig
from hildanext.decoding.state import DecodeState
from hildanext.kv_cache.prune import make_prune
from hildanext.kv_cache.prune.pruned_cache import open_cache
from hildanext.models import Card, DiffusionModel
from hildanext.models.attention.dense import install_seam
from hildanext.models.card import alignment_fields
from hildanext.runtimes.onnx_open import open_diffusion

WAYS = {
    "none": None,
    "none, last half": "window",
    **{name: {"name": name, "ratio": 0.5} for name in ("knorm", "keydiff", "streaming", "noncausal")},
    "mask_guided 0.5": {"name": "mask_guided", "ratio": 0.5},
    "mask_guided 0.75": {"name": "mask_guided", "ratio": 0.75, "newest": 16},
    "mask_guided 0.75, newest 64": {"name": "mask_guided", "ratio": 0.75, "newest": 64},
}
RECALL = 235
NAMES = ["Spot", "Max", "Lily", "Tom", "Sam", "Ben", "Lucy", "Tim", "Anna", "Jack"]


def resident() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def count_bytes(way: str) -> dict:
    """A random model of 8 layers with 8 heads of 64 in fp32, whose keys and values take 32 KiB a token."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, attn_implementation=install_seam(),
    )  # fmt: skip
    torch.manual_seed(0)
    card = Card(mask_id=61, vocab_rows=64, vocab_real=61, block_size=32, **alignment_fields("block"))
    model = DiffusionModel(LlamaForCausalLM(config).eval(), card).eval()
    section = {"none": None, "mask": {"name": "knorm", "ratio": 0.5, "compact": False}}.get(way, {"name": way})
    prompt = torch.randint(0, 61, (2048,), generator=torch.Generator().manual_seed(1)).tolist()
    warm = DecodeState(model, [prompt[:1088]], [1120], lambda *_: False)
    warm.prefill()
    del warm
    before = resident()
    begun = time.perf_counter()
    state = DecodeState(model, [prompt], [2048 + 256], lambda *_: False, prune=make_prune(section))
    (row,) = state.joining
    state.prefill()
    cache = row.cache
    kept = (cache.length - cache.dropped) * 2 * 8 * 8 * 64 * 4
    if getattr(cache, "hidden", None) is not None:
        kept = int((~cache.hidden[:, :, : cache.length]).sum()) * 2 * 64 * 4
    return {
        "way": way, "kept_mib": kept / 2**20, "allocated_mib": (cache.keys.nbytes + cache.values.nbytes) / 2**20,
        "rss_mib": (resident() - before) / 2**20, "seconds": time.perf_counter() - begun,
    }  # fmt: skip


class Session:
    """A document that is fed by hand."""

    def __init__(self, model: DiffusionModel, tokens: torch.Tensor, prompt: int, way: object) -> None:
        self.model, self.tokens, self.block = model, tokens, model.card.block_size
        prune = make_prune(way)
        self.cache = open_cache(model, len(tokens), prompt, prune)
        self.last = torch.zeros(0)
        """Clean hidden state before the active block, from which a `parent`-aligned model reads its first token."""
        self.feed(prompt, tokens[:0])

    def feed(self, clean: int, noisy: torch.Tensor) -> torch.Tensor:
        start = self.cache.length
        context = self.cache.context(clean, len(noisy))
        fed = torch.cat([self.tokens[start : start + clean], noisy])[None]
        hidden = self.model.hidden(fed, context.positions, context)[0]
        self.cache.commit(start + clean)
        before = hidden[:clean][-1:] if clean else self.last
        self.last = before
        own = hidden[clean:]
        return torch.cat([before, own])[: len(own)] if self.model.card.shift == "left" else own

    def logp(self, masked: torch.Tensor) -> torch.Tensor:
        """Of the next block's true tokens where they are masked; its first forward is all masks."""
        start = self.cache.length
        true = self.tokens[start : start + self.block]
        masks = torch.full_like(true, self.model.card.mask_id)
        self.feed(0, masks)
        hidden = self.feed(0, torch.where(masked, masks, true))
        return self.model.logits(hidden).log_softmax(-1).gather(-1, true[:, None])[:, 0][masked]


@torch.inference_mode()
def quality(path: str, prompt: int, blocks: int, documents: int) -> None:
    opened = open_diffusion("tiny", RuntimeConfig("cpu", "fp32", 1))
    model, tokenizer = opened.model, opened.tokenizer
    size = model.card.block_size
    stories = [one.strip() for one in Path(path).read_text().split("<|endoftext|>") if one.strip()]
    told: dict[str, dict[str, list[float]]] = {way: {"nats": [], "recall": []} for way in WAYS}
    length = prompt + size * blocks
    whole = tokenizer.encode(" ".join(stories), add_special_tokens=False)
    rows = [torch.tensor(whole[at : at + length]) for at in range(0, documents * length, length)]
    for number, tokens in enumerate(rows):
        draw = torch.Generator().manual_seed(number)
        masked = torch.rand(blocks, size, generator=draw) < 0.5
        masked[:, 0] = True
        for way, section in WAYS.items():
            if section == "window":  # what a document that simply begins later gives
                session = Session(model, tokens[prompt // 2 :], prompt // 2, None)
            else:
                session = Session(model, tokens, prompt, section)
            for block in range(blocks):
                told[way]["nats"] += [-x for x in session.logp(masked[block]).tolist()]
                session.feed(size, tokens[:0])
    for number, name in enumerate(NAMES):
        filler = [one for one in stories if name not in one]
        for story in range(2):
            head = tokenizer.encode(f"Once upon a time there was a little dog named {name}.", add_special_tokens=False)
            tail = tokenizer.encode(" The name of the little dog was", add_special_tokens=False)
            middle = tokenizer.encode(" ".join(filler[number * 2 + story :][:6]), add_special_tokens=False)
            own = tokenizer.encode(f" {name}", add_special_tokens=False)
            room = RECALL - len(head) - len(tail)
            ids = [*head, *middle[:room], *tail, *own]
            tokens = torch.tensor([*ids, *[model.card.mask_id] * (-len(ids) % size)])
            start = RECALL // size * size
            for way, section in WAYS.items():
                if section == "window":
                    continue
                session = Session(model, tokens, start, section)
                fed = tokens[start : start + size].clone()
                at = RECALL - start
                fed[at:] = model.card.mask_id
                session.feed(0, torch.full_like(fed, model.card.mask_id))
                logits = model.logits(session.feed(0, fed))[at]
                told[way]["recall"].append(float(logits.log_softmax(-1)[own[0]]))
    plain = torch.tensor(told["none"]["nats"])
    for way, numbers in told.items():
        nats, recall = torch.tensor(numbers["nats"]), torch.tensor(numbers["recall"])
        gap = nats - plain
        line = {
            "way": way, "tokens": len(nats), "nats": float(nats.mean()), "more": float(gap.mean()),
            "error": float(gap.std() / len(gap) ** 0.5), "recall_nats": float(-recall.mean()) if len(recall) else None,
        }  # fmt: skip
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with under_profile("FULL"):
        if sys.argv[1] == "bytes":
            with torch.inference_mode():
                print(json.dumps(count_bytes(sys.argv[2])))
        else:
            quality(sys.argv[2], *map(int, sys.argv[3:]))
