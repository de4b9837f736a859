"""What C2DLM adds to a training step: processor seconds of a forward and backward with and without it, interleaved.

python hildanext/scripts/measure_c2dlm.py --data gsm8k/train.jsonl --model smollm2-135m

Each pair of steps has the same rows, the same noise and the same model; which of the two comes first alternates. The
optimiser's own work, the same for both, is left out, so the share is an upper one.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import accelerates_bf16, keep_freed_memory, machine, make_generator
from hildanext.corruption.input_layout import build_layout, layout_of
from hildanext.corruption.noising import NoiseConfig, noised
from hildanext.data.causal_graphs import EXTRACTORS
from hildanext.data.causal_graphs.corpus import write_graphs
from hildanext.data.chat_dataset import ChatDataConfig, ChatDataset, prepare_chat
from hildanext.data.chat_template import set_template
from hildanext.diffusion import NoisedBatch
from hildanext.losses import SupervisedStep
from hildanext.losses.c2dlm import CausalAttention
from hildanext.losses.causal_rows import causal_rows
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.losses.token_to_token import TokenToToken
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.start import start_conversion
from hildanext.tokenization import real_ids

APPLY = ("t2t", "both")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    model, tokenizer = start_conversion(options.model, "block", options.block_size)
    set_template(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        views = _views(Path(folder), options, model, tokenizer)
    plain = {"m2t": MaskToToken(weighting="masked_mean"), "t2t": TokenToToken(weighting="mean")}
    ways = {"without": plain, **{apply: {**plain, "c2dlm": CausalAttention(apply=apply)} for apply in APPLY}}
    special = ~real_ids(model.card, tokenizer)
    steps = {name: SupervisedStep(model.train(), losses, special=special) for name, losses in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number, view in enumerate([views[0], *views]):  # the first pass warms up and is not counted
        for name in list(steps) if number % 2 else list(reversed(steps)):
            spent = _step(steps[name], view)
            if number:
                seconds[name].append(spent)
        print(f"pass {number}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items() if times))
    _report(options, model, views, seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="GSM8K's train.jsonl, or any examples with such annotations")
    parser.add_argument("--model", default="smollm2-135m", help="an autoregressive model to measure with")
    parser.add_argument("--out", default="hildanext/docs/results/c2dlm")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _views(folder: Path, options: argparse.Namespace, model: DiffusionModel, tokenizer: Any) -> list[NoisedBatch]:
    """Noised batches of the data with their pairs: a band of noise as in fine-tuning, a tenth of the rest wrong."""
    with open(options.data, encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(40 * options.passes * options.rows), strict=False)]
    (folder / "some.jsonl").write_text("".join(lines), encoding="utf-8")
    statistics_ = write_graphs(str(folder / "some.jsonl"), EXTRACTORS["rule:gsm8k"](), folder)
    data = ChatDataConfig(train={"name": "files", "path": statistics_["file"]}, sequence_length=options.length)
    prepare_chat(folder / "data", data, tokenizer, options.block_size)
    rows = ChatDataset(folder / "data", "train", options.length, options.block_size, int(tokenizer.eos_token_id))
    noise, real = NoiseConfig(t_range=(0.3, 0.8), replace_rate=0.2), real_ids(model.card, tokenizer).nonzero()[:, 0]
    views = []
    for number in range(options.passes):
        chosen = list(range(number * options.rows, (number + 1) * options.rows))
        generator = make_generator(0, number)
        views += noised(rows.batch(chosen), options.block_size, noise, model.card, real, generator, rows.pairs(chosen))
    return views


def _step(step: SupervisedStep, view: NoisedBatch) -> float:
    """Processor seconds of a forward and backward; autocast where this machine computes in bf16."""
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=accelerates_bf16(torch.device("cpu"))):
        outcome = step(view, generator=make_generator(1))
    total = outcome.total / int(view.maskable.sum())
    (total if outcome.auxiliary is None else total + outcome.auxiliary).backward()
    spent = time.process_time() - started
    step.zero_grad(set_to_none=True)
    return spent


def _looked_at(view: NoisedBatch, apply: str, model: DiffusionModel) -> int:
    """Rows of all sequences that the loss computes a second time."""
    config = CausalAttention(apply=apply)
    fed = build_layout(view, layout_of(view.block_size, view.clean.shape[1], model.card.shift))
    wanted = view.replaced if apply == "t2t" else view.replaced | view.masked
    rows = causal_rows(
        view, fed, model.card.shift, model.card.clean_mask, wanted, model.banned, config.max_rows, make_generator(1)
    )
    return 0 if rows is None else int(rows.real.sum())


def _report(
    options: argparse.Namespace, model: DiffusionModel, views: list[NoisedBatch], seconds: dict[str, list[float]]
) -> None:
    """The median of each pass's share of added time, and the medians themselves."""
    base = seconds["without"]
    found: dict[str, Any] = {
        "what": "processor seconds of a forward and backward",
        "median without": statistics.median(base),
        **{
            apply: {
                "median": statistics.median(seconds[apply]),
                "added, median of pairs": statistics.median(
                    a / b - 1 for a, b in zip(seconds[apply], base, strict=True)
                ),
                "rows looked at, mean": statistics.mean(_looked_at(view, apply, model) for view in views),
            }
            for apply in APPLY
        },
        "seconds": seconds,
        "settings": {name: value for name, value in vars(options).items() if name not in ("data", "out")},
        "bf16": accelerates_bf16(torch.device("cpu")),
        "machine": machine(torch.device("cpu")),
    }
    write_atomically(Path(options.out) / "overhead.json", json.dumps(found, indent=2) + "\n")
    for apply in APPLY:
        share, rows = found[apply]["added, median of pairs"], found[apply]["rows looked at, mean"]
        print(f"{apply}: {100 * share:+.1f} % of a forward and backward ({rows:.0f} rows a step)")


if __name__ == "__main__":
    main()
