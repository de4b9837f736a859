"""Which of the wrong tokens in an answer decoding mends, and which right ones it spoils, for several checkpoints.

python hildanext/scripts/measure_correction.py --data gsm8k/test.jsonl --out results/sft-gsm8k \\
    m2t=runs/sft-m2t/checkpoint t2t=runs/sft-t2t/checkpoint

True answers are shown with a share of their tokens replaced, and the decoder's own loop goes over them, block by block
behind its own edited blocks, as it does after the last mask. All checkpoints see the same wrong tokens; the end of text
that fills the last block is shown right and counts nowhere. Intervals are 95 %, bootstrapped over answers; the last
checkpoint is compared with each of the others on the same answers. What --out holds already is not measured again.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hildanext.core.errors import ConfigError, HildaError
from hildanext.core.plots import PALETTE, new_figure, save
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import machine, make_generator, set_threads
from hildanext.core.statistics import Values, bootstrap, paired_bootstrap
from hildanext.data.chat_dataset import ChatDataConfig, ChatDataset, prepare_chat
from hildanext.data.chat_template import set_template
from hildanext.decoding import Decoder, decoder_section, make_decoder
from hildanext.decoding.base import run
from hildanext.decoding.state import DecodeState
from hildanext.eval.identity import weights_hash
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.checkpoint import load_diffusion
from hildanext.tokenization import real_ids

WAYS: dict[str, dict[str, Any]] = {
    "one pass": decoder_section("S_MODE", max_post=1),
    "S_MODE": decoder_section("S_MODE"),
    "Q_MODE": decoder_section("Q_MODE"),
}
COUNTS = ("wrong", "mended", "right", "kept", "forwards", "edits")
MEASURES = {"mended": ("mended", "wrong"), "kept": ("kept", "right")}
"""Measure -> what is counted over what."""


@dataclass(frozen=True)
class Case:
    """One answer with its wrong tokens. Tensors are [length], in whole blocks."""

    prompt: int
    truth: Tensor
    shown: Tensor
    counted: Tensor
    """True for the answer's own tokens, its end of text included."""


def main() -> int:
    options = _options()
    set_threads(options.threads)
    try:
        checkpoints = dict(_named(text) for text in options.checkpoints)
        record = _read(options)
        for name, folder in checkpoints.items():
            _measure(name, folder, record, options)
        _report(list(checkpoints), record, Path(options.out))
    except HildaError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--data", required=True, help="conversations that none of the checkpoints was trained on")
    parser.add_argument("--out", required=True, help="a folder for correction.json, .md and .png")
    parser.add_argument("--rows", type=int, default=150, help="answers: the data's first ones that fit")
    parser.add_argument("--sequence-length", type=int, default=256, help="longer conversations are left out")
    parser.add_argument("--rate", type=float, default=0.1, help="share of tokens that are replaced")
    parser.add_argument("--by", choices=("random", "answers"), default="random", help="any real token, or an answer's")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    return parser.parse_args()


def _named(text: str) -> tuple[str, str]:
    name, sign, folder = text.partition("=")
    if not sign or not name or not folder:
        raise ConfigError(f"{text!r} names no checkpoint", "give NAME=CHECKPOINT")
    return name, folder


def _read(options: argparse.Namespace) -> dict[str, Any]:
    """The record of --out, or a new one. Raises `ConfigError` where it was measured otherwise."""
    kept = ("rows", "sequence_length", "rate", "by", "seed", "dtype")
    settings = {name: getattr(options, name) for name in kept} | {"data": Path(options.data).name}
    path = Path(options.out) / "correction.json"
    if not path.is_file():
        return {"settings": settings, "machine": machine(torch.device("cpu")), "found": {}}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["settings"] != settings:
        raise ConfigError(f"{path} was measured with {record['settings']}", "give another --out")
    return record


def _measure(name: str, folder: str, record: dict[str, Any], options: argparse.Namespace) -> None:
    """Add the checkpoint's counts to the record, one list per answer and way."""
    model, tokenizer = load_diffusion(folder, getattr(torch, options.dtype), "cpu")
    model.eval()
    weights = weights_hash(model.causal_lm)
    found = record["found"].setdefault(name, {"weights": weights, "ways": {}})
    if found["weights"] != weights:
        raise ConfigError(f"{name} is another checkpoint than the one in {options.out}", "give another name, or --out")
    cases = _cases(model, tokenizer, options)
    for way in options.ways.split(","):
        if way not in WAYS:
            raise ConfigError(f"no way {way!r}", f"choices: {', '.join(WAYS)}")
        if way in found["ways"]:
            continue
        begun, counts = time.process_time(), []
        for first in range(0, len(cases), options.batch_size):
            counts += corrected(model, cases[first : first + options.batch_size], make_decoder(dict(WAYS[way])))
            print(f"{name}, {way}: {len(counts)} of {len(cases)}, {time.process_time() - begun:.0f} s", flush=True)
        found["ways"][way] = {"processor_seconds": time.process_time() - begun, "counts": counts}
        write_atomically(Path(options.out) / "correction.json", json.dumps(record) + "\n")


def _cases(model: DiffusionModel, tokenizer: Any, options: argparse.Namespace) -> list[Case]:
    """The answers, corrupted alike for every checkpoint of one tokenizer and block size."""
    card, eos, length = model.card, int(tokenizer.eos_token_id), options.sequence_length
    set_template(tokenizer)
    source = {"name": "files", "path": options.data}
    data = ChatDataConfig(train=source, valid=source, sequence_length=length, packing=False, too_long="skip")
    with tempfile.TemporaryDirectory() as folder:
        prepare_chat(Path(folder) / "data", data, tokenizer, card.block_size)
        held_out = ChatDataset(Path(folder) / "data", "valid", length, card.block_size, eos, packing=False)
        rows = [held_out.conversation(number) for number in range(min(options.rows, held_out.conversations))]
    real = real_ids(card, tokenizer)
    said = torch.tensor([token for row in rows for token in row.answer])
    pool = real.nonzero()[:, 0] if options.by == "random" else said[real[said]]
    return [
        wrong_answer(row.prompt, row.answer, pool, options.rate, card.block_size, eos, make_generator(options.seed, n))
        for n, row in enumerate(rows)
    ]


def wrong_answer(
    prompt: Sequence[int],
    answer: Sequence[int],
    pool: Tensor,
    rate: float,
    block_size: int,
    pad_id: int,
    generator: torch.Generator,
) -> Case:
    """Replace about `rate` of the answer's tokens by others of `pool`; the last block is filled with `pad_id`."""
    begin, end = len(prompt), len(prompt) + len(answer)
    length = -(-end // block_size) * block_size
    truth = torch.full((length,), pad_id)
    truth[:end] = torch.tensor([*prompt, *answer])
    place = torch.arange(length)
    counted = (place >= begin) & (place < end)
    drawn = pool[torch.randint(len(pool), (length,), generator=generator)]
    chosen = counted & (torch.rand(length, generator=generator) < rate) & (drawn != truth)
    return Case(begin, truth, torch.where(chosen, drawn, truth), counted)


@torch.inference_mode()
def corrected(model: DiffusionModel, cases: Sequence[Case], decoder: Decoder) -> list[list[int]]:
    """Run the decoder over the shown answers; for each, the numbers that `COUNTS` names."""
    session = DecodeState(model, [], [], lambda row, tokens: False)
    rows = []
    for index, case in enumerate(cases):
        row = session.row(case.truth[: case.prompt].tolist(), len(case.truth), 0, index)
        row.tokens.copy_(case.shown)
        session.add(row)
        rows.append(row)
    session.prefill()
    run(decoder, session)
    found = []
    for case, row in zip(cases, rows, strict=True):
        wrong = case.counted & (case.shown != case.truth)
        right = case.counted & ~wrong
        hit = row.tokens.cpu() == case.truth
        sums = [int(part.sum()) for part in (wrong, wrong & hit, right, right & hit)]
        found.append([*sums, row.denoise, row.edits])
    return found


def _values(counts: Sequence[Sequence[int]], measure: str) -> Values:
    table = np.array(counts, dtype=float)
    over, under = (table[:, COUNTS.index(name)] for name in MEASURES[measure])
    return Values(over, under)


def _summary(names: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """way -> checkpoint -> shares with their intervals, and the last checkpoint's difference to each other one."""
    summary: dict[str, Any] = {}
    for way in WAYS:
        counts = {
            name: record["found"][name]["ways"][way]["counts"] for name in names if way in record["found"][name]["ways"]
        }
        summary[way] = {name: _shares(found) for name, found in counts.items()}
        for name in [*counts][:-1] if names[-1] in counts else []:
            for measure in MEASURES:
                ours, theirs = _values(counts[names[-1]], measure), _values(counts[name], measure)
                gap = [ours.mean - theirs.mean, *paired_bootstrap(ours, theirs)]
                summary[way][name][f"{names[-1]} - this, {measure}"] = gap
    return {way: found for way, found in summary.items() if found}


def _shares(counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    sums = dict(zip(COUNTS, np.array(counts).sum(0).tolist(), strict=True))
    shares = {name: [values.mean, *bootstrap(values)] for name in MEASURES for values in [_values(counts, name)]}
    after = (sums["mended"] + sums["kept"]) / (sums["wrong"] + sums["right"])
    return {"answers": len(counts), **sums, "shares": shares, "right afterwards": after}


def _report(names: Sequence[str], record: dict[str, Any], out: Path) -> None:
    record["summary"] = _summary(names, record)
    write_atomically(out / "correction.json", json.dumps(record) + "\n")
    table = _table(names, record)
    write_atomically(out / "correction.md", table)
    _picture(names, record["summary"], out / "correction.png")
    print(table)


def _table(names: Sequence[str], record: Mapping[str, Any]) -> str:
    summary, settings, last = record["summary"], record["settings"], names[-1]
    any_way = next(iter(next(iter(summary.values())).values()))
    tokens = any_way["wrong"] + any_way["right"]
    lines = [
        f"{any_way['answers']} held-out answers, {tokens:,} tokens, {any_way['wrong']:,} of them replaced "
        f"(`{settings['by']}`). Per cent with 95 % intervals, bootstrapped over answers.",
        "",
        f"| decoder | checkpoint | wrong tokens mended | right tokens kept | right afterwards "
        f"(before: {100 * any_way['right'] / tokens:.1f}) | {last} mends more by | {last} keeps more by | forwards |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, found in summary.items():
        for name, one in found.items():
            shares = [_percent(one["shares"][measure]) for measure in MEASURES]
            gaps = [one.get(f"{last} - this, {measure}") for measure in MEASURES]
            told = ["" if gap is None else _percent(gap, sign="+") for gap in gaps]
            cells = [way, name, *shares, f"{100 * one['right afterwards']:.1f}", *told]
            lines.append("| " + " | ".join([*cells, f"{one['forwards'] / one['answers']:.1f}"]) + " |")
    return "\n".join(lines) + "\n"


def _percent(share: Sequence[float], sign: str = "") -> str:
    middle, low, high = (f"{100 * value:{sign}.1f}" for value in share)
    return f"{middle} [{low}, {high}]"


def _picture(names: Sequence[str], summary: Mapping[str, Any], path: Path) -> None:
    """Bars with intervals: left of each pair what is mended, right what is kept."""
    figure, axes = new_figure(9.0, 3.8)
    groups = [(way, measure) for way in summary for measure in MEASURES]
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        own = [(at, way, measure) for at, (way, measure) in enumerate(groups) if name in summary[way]]
        shares = 100 * np.array([summary[way][name]["shares"][measure] for _, way, measure in own])
        places = np.array([at for at, *_ in own]) + (number - (len(names) - 1) / 2) * width
        below, above = shares[:, 0] - shares[:, 1], shares[:, 2] - shares[:, 0]
        axes.bar(places, shares[:, 0], width, color=PALETTE[number], label=name, yerr=(below, above), capsize=2)
    labels = {"mended": "wrong tokens\nmended", "kept": "right tokens\nkept"}
    axes.set_xticks(range(len(groups)), [f"{way}\n{labels[measure]}" for way, measure in groups], fontsize=8)
    axes.set_ylabel("%")
    axes.set_ylim(0, 100)
    axes.set_title("what decoding does to held-out answers with wrong tokens", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=len(names), loc="lower right", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
