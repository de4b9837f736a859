"""C2DLM off, on masked tokens, on wrong tokens, on both: the same fine-tuning of the embedded model, several seeds.

python hildanext/scripts/ablate_c2dlm.py --folder runs/ablate-c2dlm

The task is made up (data/sources/chat/arithmetic.py): stories of two additions or subtractions, answered by equations,
with exact causal graphs. One warm-up fine-tuning without C2DLM teaches the format; every run then goes on from its
checkpoint with the same data order and noise as the other runs of its seed. Interrupted, the same command goes on.
Writes `ablation.json`, `ablation.md` and `ablation.png` into --out.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hildanext.core.errors import HildaError
from hildanext.core.plots import PALETTE, save
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import machine, make_generator, set_threads
from hildanext.data.chat_dataset import ChatDataConfig, ChatDataset, prepare_chat
from hildanext.data.chat_template import set_template
from hildanext.decoding import decoder_section, make_decoder
from hildanext.detokenization import Detokenizer
from hildanext.diffusion import CausalPairs, NoisedBatch, mask_tokens, targets
from hildanext.grading.gsm8k import strict
from hildanext.inference import GenerationConfig, generate
from hildanext.losses import SupervisedStep
from hildanext.losses.c2dlm import CausalAttention
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.checkpoint import load_diffusion
from hildanext.sft_stage1 import sft

ARMS = ("off", "m2t", "t2t", "both")
MEASURES = {
    "exact": "% of held-out answers exact (decoded)",
    "effects filled": "% of masked results right",
    "effects mended": "% of wrong results mended",
    "effects kept": "% of right results kept",
    "attention ratio": "attention to causes / to the rest",
}
LOSSES = [{"name": "m2t", "weighting": "masked_mean"}, {"name": "t2t", "weighting": "mean"}]
"""Of the warm-up and of every run; written out, so that another default does not change what is compared."""
HELD_OUT = 0.05
LENGTH = 72
HUGE = 1e9
"""An alpha that no row reaches: the log-hinge is then log(alpha) - log(ratio)."""


def main() -> int:
    options = _options()
    set_threads(options.threads)
    folder = Path(options.folder)
    try:
        warm = _warm(folder / "warm", options)
        runs = []
        for seed in range(options.seeds):
            for arm in ARMS:
                runs.append(_run(folder / f"{arm}-{seed}", warm, arm, seed, options))
                print(_line(runs[-1]), flush=True)
        _report(runs, _measured(folder / "warm" / "measured.json", Path(warm), options), options)
    except HildaError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/ablate-c2dlm", help="where the runs go")
    parser.add_argument("--out", default="hildanext/docs/results/c2dlm")
    parser.add_argument("--model", default="tiny", help="a diffusion checkpoint")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--warm-examples", type=int, default=9000)
    parser.add_argument("--examples", type=int, default=2000, help="training examples of each run")
    parser.add_argument("--held-out", type=int, default=300, help="about so many problems to measure with")
    parser.add_argument("--lambda-c", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _data(count: int, seed: int) -> dict[str, Any]:
    """A problem's own hash decides whether it is held out, so that no run trains on what any run is measured with."""
    task = {"name": "arithmetic", "steps": 2, "largest": 9, "count": count, "seed": seed}
    return {"train": task, "valid_share": HELD_OUT, "sequence_length": LENGTH}


def _section(model: str, rate: float, seed: int) -> dict[str, Any]:
    """Two turns, so that the second one mends the model's own errors; results are replaced three times as often."""
    return {
        "model": model, "seed": seed, "turns": 2, "complementary": False, "replace_rate": 0.15, "effect_boost": 3.0,
        "losses": LOSSES, "keep": "last", "valid_rows": 32, "samples": {"count": 0},
        "train": {"batch_size": 16, "learning_rate": {"peak": rate}, "evaluate_every": 10_000, "checkpoint_every": 50},
    }  # fmt: skip


def _warm(folder: Path, options: argparse.Namespace) -> str:
    """The checkpoint that every run starts from."""
    summary = sft(_section(options.model, 1e-3, 0), _data(options.warm_examples, 20_000), folder, "FULL")
    return str(summary["checkpoint"])


def _run(folder: Path, warm: str, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one run, or read what an earlier call measured."""
    section = _section(warm, 5e-4, seed)
    if arm != "off":
        section["losses"] = [*LOSSES, {"name": "c2dlm", "apply": arm, "lambda_c": options.lambda_c}]
    started = time.process_time()
    summary = sft(section, _data(options.examples, seed), folder, "FULL")
    found = _measured(folder / "measured.json", Path(summary["checkpoint"]), options)
    return {
        "arm": arm,
        "seed": seed,
        **found,
        "seconds": summary["seconds"],
        "processor": time.process_time() - started,
    }


def _measured(file: Path, checkpoint: Path, options: argparse.Namespace) -> dict[str, float]:
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    model, tokenizer = load_diffusion(str(checkpoint), torch.float32, "cpu")
    model.eval()
    set_template(tokenizer)
    data = ChatDataConfig(**_data(round(options.held_out / HELD_OUT), 10_000))
    folder = file.parent / "held-out"
    prepare_chat(folder, data, tokenizer, model.card.block_size)
    valid = ChatDataset(folder, "valid", LENGTH, model.card.block_size, int(tokenizer.eos_token_id), packing=False)
    found = {
        "problems": float(valid.conversations),
        "exact": _exact(valid, model, tokenizer),
        **_effects(valid, model, tokenizer),
    }
    write_atomically(file, json.dumps(found, indent=2) + "\n")
    return found


def _exact(valid: ChatDataset, model: DiffusionModel, tokenizer: Any) -> float:
    """Per cent of held-out answers whose number after `####` is the right one."""
    asked = [valid.conversation(number) for number in range(valid.conversations)]
    how = GenerationConfig(max_new_tokens=32, batch_size=50)
    decoder = make_decoder(decoder_section("S_MODE"))
    done = generate(model, tokenizer, [one.prompt for one in asked], decoder, how)
    wanted = [Detokenizer(tokenizer, one.prompt).text(one.answer) for one in asked]
    right = [strict(one.text, gold.split("####")[1].strip()) for one, gold in zip(done, wanted, strict=True)]
    return 100 * sum(right) / len(right)


@torch.no_grad()
def _effects(valid: ChatDataset, model: DiffusionModel, tokenizer: Any) -> dict[str, float]:
    """What one forward says about results: hidden ones, wrong ones (another digit), right ones; and where it looks.

    One result of each answer is hidden or wrong, everything else is right and visible.
    """
    digits = torch.tensor(sorted({tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)}))
    rows = list(range(valid.conversations))
    batch, pairs = valid.batch(rows), valid.pairs(rows)
    assert pairs is not None
    generator = make_generator(7)
    card = model.card
    nothing = torch.zeros(batch.tokens.shape)
    may = targets(batch.maskable, batch.position, card.shift)
    plain = mask_tokens(
        batch.tokens, batch.document, batch.position, may, nothing, card.block_size, card.mask_id, generator
    )
    chosen = _one_effect_each(pairs, plain, digits, generator)
    other = digits[torch.randint(len(digits), plain.clean.shape, generator=generator)]
    following = digits[(torch.searchsorted(digits, other) + 1) % len(digits)]
    other = torch.where(other == plain.clean, following, other)
    views = {
        "hidden": replace(plain, noisy=plain.clean.masked_fill(chosen, card.mask_id), masked=chosen, pairs=pairs),
        "wrong": replace(plain, noisy=torch.where(chosen, other, plain.clean), replaced=chosen, pairs=pairs),
        "right": plain,
    }
    step = SupervisedStep(model, {"m2t": MaskToToken()}).eval()
    right = {name: _drafted(step, view)[chosen] == view.clean[chosen] for name, view in views.items()}
    look = SupervisedStep(model, {"c2dlm": CausalAttention(apply="both", alpha=HUGE, lambda_c=1.0)}).eval()
    ratios = [math.log(HUGE) - float(look(views[name]).averages["c2dlm"]) for name in ("hidden", "wrong")]
    return {
        "effects filled": 100 * float(right["hidden"].float().mean()),
        "effects mended": 100 * float(right["wrong"].float().mean()),
        "effects kept": 100 * float(right["right"].float().mean()),
        "attention ratio": math.exp(statistics.mean(ratios)),
    }


def _drafted(step: SupervisedStep, view: NoisedBatch) -> torch.Tensor:
    """The tokens after one forward with tau_edit = 0; a mask is filled, however unsure the model is."""
    everything = replace(view, masked=torch.zeros_like(view.masked), replaced=view.masked | view.replaced)
    draft = step(everything, generator=make_generator(8), wants_draft=True).draft
    assert draft is not None
    return draft


def _one_effect_each(
    pairs: CausalPairs, view: NoisedBatch, digits: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """One drawn effect token of every row, [batch seq] bool; only those that are digits and may be predicted."""
    effects = torch.zeros_like(view.maskable)
    effects[pairs.row, pairs.effect] = True
    effects &= view.maskable & torch.isin(view.clean, digits)
    draw = torch.rand(effects.shape, generator=generator).masked_fill(~effects, -1.0)
    return effects & (torch.arange(effects.shape[1]) == draw.argmax(-1, keepdim=True))


def _line(run: Mapping[str, Any]) -> str:
    numbers = ", ".join(f"{name} {run[name]:.1f}" for name in MEASURES)
    return f"{run['arm']:>5} seed {run['seed']}: {numbers} ({run['seconds']:.0f} s)"


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """For each measure and arm: mean and deviation over seeds, and the mean difference to `off` of the same seed."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in MEASURES:
        values = {arm: [run[name] for run in runs if run["arm"] == arm] for arm in ARMS}
        found[name] = {}
        for arm in ARMS:
            gaps = [value - base for value, base in zip(values[arm], values["off"], strict=True)]
            several = len(gaps) > 1
            found[name][arm] = {
                "mean": statistics.mean(values[arm]),
                "deviation": statistics.stdev(values[arm]) if several else float("nan"),
                "to off": statistics.mean(gaps),
                "to off, standard error": statistics.stdev(gaps) / len(gaps) ** 0.5 if several else float("nan"),
            }
    return found


def _report(runs: Sequence[Mapping[str, Any]], warm: Mapping[str, float], options: argparse.Namespace) -> None:
    summary = _summary(runs)
    settings = {name: value for name, value in vars(options).items() if name not in ("folder", "out")}
    record = {"settings": settings, "warm": warm, "runs": list(runs), "summary": summary}
    record["machine"] = machine(torch.device("cpu"))
    out = Path(options.out)
    write_atomically(out / "ablation.json", json.dumps(record, indent=2) + "\n")
    table = _table(summary, warm, options)
    write_atomically(out / "ablation.md", table)
    _picture(runs, warm, out / "ablation.png")
    print(table)


def _table(summary: Mapping[str, Any], warm: Mapping[str, float], options: argparse.Namespace) -> str:
    lines = [
        f"Mean of {options.seeds} seeds; in brackets the mean difference to `off` of the same seed, with its standard",
        f"error. {warm['problems']:.0f} held-out problems; lambda_c {options.lambda_c}.",
        "",
        "| | before | " + " | ".join(ARMS) + " |",
        "|---|---|" + "---|" * len(ARMS),
    ]
    for name, words in MEASURES.items():
        cells = []
        for arm in ARMS:
            one = summary[name][arm]
            gap = f" ({one['to off']:+.2f} ± {one['to off, standard error']:.2f})" if arm != "off" else ""
            cells.append(f"{one['mean']:.2f}{gap}")
        lines.append(f"| {words} | {warm[name]:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _picture(runs: Sequence[Mapping[str, Any]], warm: Mapping[str, float], path: Path) -> None:
    """A panel for each measure: every run as a point, seeds joined by lines, the arm's mean as a bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, words) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for place, arm in enumerate(ARMS):
            mean = statistics.mean(run[name] for run in runs if run["arm"] == arm)
            axes.plot((place - 0.3, place + 0.3), (mean, mean), color=PALETTE[0], linewidth=3)
        for seed in sorted({run["seed"] for run in runs}):
            values = [next(run[name] for run in runs if run["arm"] == arm and run["seed"] == seed) for arm in ARMS]
            axes.plot(range(len(ARMS)), values, color="#8a93a0", marker="o", markersize=4, linewidth=0.7)
        axes.axhline(warm[name], color=PALETTE[1], linestyle=":", linewidth=1.2)
        axes.set_xticks(range(len(ARMS)), ARMS)
        axes.set_title(words, fontsize=8.5, loc="left")
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle("C2DLM on made-up arithmetic: points are runs, bars means, dotted the common start", fontsize=10)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
