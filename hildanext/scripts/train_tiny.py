"""Make the embedded models: a tokenizer, a small autoregressive one, its diffusion twin, adapters that draft for it.

    python hildanext/scripts/train_tiny.py ar --data train.txt --work build/tiny
    python hildanext/scripts/train_tiny.py install-ar --work build/tiny
    python hildanext/scripts/train_tiny.py twin
    python hildanext/scripts/train_tiny.py install-twin --checkpoint build/tiny/run/convert/checkpoint
    python hildanext/scripts/train_tiny.py drafts
    python hildanext/scripts/train_tiny.py install-drafts --checkpoint runs/tiny-keep-parent/convert/checkpoint

`ar` wants TinyStories (stories separated by `<|endoftext|>` lines, CDLA-Sharing-1.0) and takes about a quarter
of an hour of one core; killed, it goes on where it was. Same data, same seed, same machine: same weights.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hildanext import masks
from hildanext.ar import Parent
from hildanext.core.run_dir import write_atomically
from hildanext.models.attention.dense import MaskedAttention, install_seam, no_mask
from hildanext.models.checkpoint import save_causal, save_diffusion
from hildanext.models.draft_checkpoint import load_drafts, save_drafts
from hildanext.models.loading.load import load_diffusion, load_parent

SEPARATOR = "<|endoftext|>"
ASSETS = Path(__file__).parents[1] / "backend" / "src" / "hildanext" / "assets" / "tiny"
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})
NO_DOCUMENT_START = 0.25
"""Share of documents shown without BOS, so that a bare prompt is not foreign to the model."""


@dataclass(frozen=True)
class Recipe:
    """One row of the embedding stays free for the mask."""

    vocab_rows: int = 2048
    hidden: int = 192
    layers: int = 5
    inner: int = 448
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    context: int = 1024
    batch: int = 8
    length: int = 256
    tokens: int = 5_000_000
    rate: float = 0.02
    """Of the orthogonalised matrices; the embedding's and the gains' rate is `rate / 5`."""
    weight_decay: float = 0.1
    seed: int = 0


def stories(path: Path) -> list[str]:
    """The texts of a TinyStories file, trimmed, with plain quotation marks."""
    text = path.read_text(encoding="utf-8", errors="replace").translate(QUOTES)
    return [story.strip() for story in text.split(SEPARATOR) if story.strip()]


def make_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<|endoftext|>` (id 0) begins and ends a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
        model_max_length=Recipe.context,
    )


def make_model(recipe: Recipe) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=recipe.vocab_rows,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation=install_seam(),
    )
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(weight)  # every layer starts as the identity
    return model


def rows(documents: list[list[int]], recipe: Recipe) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless packed rows: tokens, document and position, [batch length + 1]; a cut document goes on as a new one."""
    width = recipe.length + 1
    epoch = 0
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    tokens: list[int] = []
    document: list[int] = []
    position: list[int] = []
    while True:
        generator = torch.Generator().manual_seed(recipe.seed * 7919 + epoch)
        order = torch.randperm(len(documents), generator=generator).tolist()
        bare = torch.rand(len(documents), generator=generator) < NO_DOCUMENT_START
        for number, index in enumerate(order):
            text = documents[index] if bare[number] else [0, *documents[index]]
            text = [*text, 0]
            while text:
                taken, text = text[: width - len(tokens)], text[width - len(tokens) :]
                position += range(len(taken))
                document += [number] * len(taken)
                tokens += taken
                if len(tokens) == width:
                    pieces.append((torch.tensor(tokens), torch.tensor(document), torch.tensor(position)))
                    tokens, document, position = [], [], []
                if len(pieces) == recipe.batch:
                    stacked = [torch.stack(part) for part in zip(*pieces, strict=True)]
                    yield stacked[0], stacked[1], stacked[2]
                    pieces = []
        epoch += 1


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly (Newton-Schulz; Muon, K. Jordan 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    turned = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if turned else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if turned else x).float()


class Optimiser:
    """Muon for the matrices, AdamW for the embedding and the gains."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        named = list(model.named_parameters())
        self.matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
        self.momentum = [torch.zeros_like(weight) for weight in self.matrices]
        rest = [weight for name, weight in named if weight.ndim != 2 or "embed" in name]
        self.adam = torch.optim.AdamW(rest, lr=recipe.rate / 5, betas=(0.9, 0.95), weight_decay=0.01)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """`share` of the peak rate."""
        rate = self.recipe.rate * share
        for weight, momentum in zip(self.matrices, self.momentum, strict=True):
            momentum.lerp_(weight.grad, 0.05)
            direction = orthogonalise(weight.grad.lerp(momentum, 0.95))
            scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            weight.mul_(1.0 - rate * self.recipe.weight_decay).add_(direction, alpha=-rate * scale)
            weight.grad = None
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.rate / 5 * share
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def loss_of(model: Qwen3ForCausalLM, batch: tuple[Tensor, Tensor, Tensor], bf16: bool) -> Tensor:
    """Next-token cross-entropy inside documents, nats per token."""
    tokens, document, position = batch
    mask = masks.clean_only(document[:, :-1], position[:, :-1], 1, "token_causal")
    same = document[:, 1:] == document[:, :-1]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.model(
            input_ids=tokens[:, :-1],
            position_ids=position[:, :-1],
            attention_mask=no_mask(tokens.device),
            use_cache=False,
            hilda=MaskedAttention(mask),
        )[0]
        logits = model.lm_head(hidden[same])
    return nn.functional.cross_entropy(logits.float(), tokens[:, 1:][same])


def share_of(done: float) -> float:
    """Warm up over 2 %, hold, go down to 0 over the last 60 %."""
    return min(1.0, done / 0.02, (1.0 - done) / 0.6)


def story(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str = "Once upon a time") -> str:
    result = Parent(model.eval(), tokenizer).generate(tokenizer(prompt)["input_ids"], 120)
    model.train()
    return prompt + result.text


def train_ar(arguments: argparse.Namespace) -> None:
    """Train (or go on training) the autoregressive model; writes `ar/` into the work folder."""
    recipe = Recipe(**json.loads(arguments.recipe))
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / "recipe.json", json.dumps(asdict(recipe), indent=2))
    texts = stories(Path(arguments.data))
    tokenizer = make_tokenizer(texts, recipe.vocab_rows - 1)
    documents = tokenizer(texts)["input_ids"]
    model, first = make_model(recipe), 0
    optimiser = Optimiser(model, recipe)
    state_file = work / "state.pt"
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.adam.load_state_dict(state["adam"])
        optimiser.momentum, first = state["momentum"], int(state["step"])
    per_step = recipe.batch * recipe.length
    steps = math.ceil(recipe.tokens / per_step)
    feed = rows(documents, recipe)
    for _ in range(first):
        next(feed)
    count = sum(len(document) for document in documents)
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{len(documents)} stories, {count} tokens, {steps} steps, {weights} weights")
    average, begun, saved = 0.0, time.perf_counter(), time.perf_counter()
    for step in range(first, steps):
        loss = loss_of(model, next(feed), not arguments.fp32)
        loss.backward()
        optimiser.step(share_of((step + 1) / steps))
        average = loss.item() if average == 0.0 else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps} loss {average:.3f} {time.perf_counter() - begun:.0f} s", flush=True)
        if (step + 1) % 500 == 0:
            print(story(model, tokenizer), flush=True)
        if time.perf_counter() - saved > 60:
            _save_state(state_file, model, optimiser, step + 1)
            saved = time.perf_counter()
    _save_state(state_file, model, optimiser, steps)
    save_causal(work / "ar", model.eval(), tokenizer, torch.float16)
    if arguments.valid:
        valid = tokenizer(stories(Path(arguments.valid)))["input_ids"]
        print(f"validation {validation(model, tokenizer, valid):.3f} nats per token")
    print(story(model, tokenizer))


def _save_state(path: Path, model: nn.Module, optimiser: Optimiser, step: int) -> None:
    state = {
        "model": model.state_dict(),
        "adam": optimiser.adam.state_dict(),
        "momentum": optimiser.momentum,
        "step": step,
    }
    fresh = path.with_suffix(".tmp")
    torch.save(state, fresh)
    fresh.replace(path)


def validation(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[list[int]]) -> float:
    parent = Parent(model, tokenizer)
    total, count = 0.0, 0
    for document in documents:
        tokens = torch.tensor([[0, *document, 0]])[:, : Recipe.context]
        position = torch.arange(tokens.shape[1])[None]
        total += float(parent.token_nll(tokens, torch.zeros_like(tokens), position).sum())
        count += tokens.shape[1] - 1
    return total / count


def install_ar(arguments: argparse.Namespace) -> None:
    """Copy the trained autoregressive half into the package."""
    causal_lm, tokenizer = load_parent(Path(arguments.work) / "ar", torch.float16)
    save_causal(ASSETS / "ar", causal_lm, tokenizer)
    _report()


def train_twin(arguments: argparse.Namespace) -> None:
    """Sample a corpus from the installed autoregressive half and do the project's own stage 0 on it."""
    command = ["run", arguments.config]
    for assignment in arguments.set:
        command += ["--set", assignment]
    subprocess.run([sys.executable, "-m", "hildanext.cli", *command], check=True)


def install_twin(arguments: argparse.Namespace) -> None:
    """Store a converted checkpoint in half precision as the package's diffusion half."""
    model, tokenizer = load_diffusion(arguments.checkpoint, torch.float16)
    save_diffusion(ASSETS / "diffusion", model, tokenizer)
    _report()


def install_drafts(arguments: argparse.Namespace) -> None:
    """Store trained adapters in half precision as the package's drafts."""
    drafter, _, card = load_drafts(arguments.checkpoint)
    save_drafts(ASSETS / "drafts", drafter, card, torch.float16)
    _report()


def _report() -> None:
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    print(f"the embedded pair takes {size / 1e6:.2f} MB in {ASSETS.name}/ (limit 10)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    ar = steps.add_parser("ar")
    ar.add_argument("--data", required=True)
    ar.add_argument("--valid")
    ar.add_argument("--work", default="build/tiny")
    ar.add_argument("--recipe", default="{}", help="JSON of Recipe fields to change")
    ar.add_argument("--fp32", action="store_true", help="no bf16 autocast (for CPUs without AVX512-BF16)")
    ar.set_defaults(run=train_ar)
    step = steps.add_parser("install-ar")
    step.add_argument("--work", default="build/tiny")
    step.set_defaults(run=install_ar)
    for name, config in (("twin", "tiny"), ("drafts", "tiny-keep-parent")):
        step = steps.add_parser(name)
        step.add_argument("--config", default=f"hildanext/runs/configs/{config}.json")
        step.add_argument("--set", action="append", default=[])
        step.set_defaults(run=train_twin)
    for name, install in (("install-twin", install_twin), ("install-drafts", install_drafts)):
        step = steps.add_parser(name)
        step.add_argument("--checkpoint", required=True)
        step.set_defaults(run=install)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
