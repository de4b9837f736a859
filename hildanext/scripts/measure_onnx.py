"""What ONNX Runtime gives: forwards by rows beside torch, and how far quantised weights are from the fp32 parent.

python hildanext/scripts/measure_onnx.py DRAFTS TEXT --threads 1 --out hildanext/docs/results/exact

DRAFTS is a folder of draft adapters, TEXT held-out stories (a line <|endoftext|> ends each). Writes `onnx.json` and
`onnx.md`. Sizes and runtimes take turns. Beside each wall clock stands the processor time of the whole process, which
says more on a machine that others use, too.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from hildanext.core.runtime import RuntimeConfig, cpu_name, machine
from hildanext.decoding.exact.network import Network, network_of
from hildanext.exact import LoadedDrafter
from hildanext.kv_cache.draft_attention import DraftSegment

CONTEXT = 128
SHAPES = {
    1: (1, (), 0),
    2: (2, (), 0),
    4: (2, (0, 1), 1),
    7: (3, (0, 1), 2),
    9: (3, (0, 1, 2), 2),
    16: (4, (0, 1, 2, 3), 3),
}
"""Rows: clean ones, the points that masks stand behind, masks of a group."""
STORIES, TOKENS = 40, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafts")
    parser.add_argument("text", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    opened = {
        dtype: LoadedDrafter.open(options.drafts, RuntimeConfig("cpu", dtype, options.threads, runtime))
        for dtype, runtime in (("bf16", "torch"), ("fp32", "onnx"), ("q8", "onnx"), ("q4", "onnx"))
    }
    networks = {name: network_of(each.drafter) for name, each in opened.items()}
    path = options.out / "onnx.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found["machine"] = {**machine(torch.device("cpu")), "name": cpu_name(), "onnxruntime": _version()}
    found[f"forward_{options.threads}"] = _forwards(networks, options.seconds)
    if "distance" not in found:
        stories = options.text.read_text(encoding="utf-8").split("<|endoftext|>")
        tokenizer = opened["fp32"].tokenizer
        texts = [tokenizer(story.strip())["input_ids"][:TOKENS] for story in stories if story.strip()][:STORIES]
        found["distance"] = _distances(networks, texts)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "onnx.md").write_text(_table(found), encoding="utf-8")


@torch.inference_mode()
def _forwards(networks: dict[str, Network], seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of a forward with its head read as exact decoding reads it: medians, wall clock and processor."""
    caches = {name: network.new_cache(CONTEXT + 64) for name, network in networks.items()}
    for name, network in networks.items():
        network.forward(list(range(10, 10 + CONTEXT)), [caches[name]], [DraftSegment(0, CONTEXT, (), 0)])
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    end = time.time() + seconds
    while time.time() < end:
        for name, network in networks.items():
            for rows, (clean, points, places) in SHAPES.items():
                begin = time.perf_counter(), time.process_time()
                hidden = network.forward([7] * clean, [caches[name]], [DraftSegment(CONTEXT, clean, points, places)])
                network.logits(hidden[:clean]).argmax(-1)
                if places:
                    network.logits(hidden[clean : clean + places]).argmax(-1)
                took = time.perf_counter() - begin[0], time.process_time() - begin[1]
                times.setdefault((name, rows), []).append(took)
    return {
        name: {
            str(rows): {
                "wall": round(1e3 * statistics.median(wall for wall, _ in times[name, rows]), 2),
                "processor": round(1e3 * statistics.median(cpu for _, cpu in times[name, rows]), 2),
            }
            for rows in SHAPES
        }
        for name in networks
    }


@torch.inference_mode()
def _distances(networks: dict[str, Network], texts: list[list[int]]) -> dict[str, dict[str, float]]:
    """By token of held-out text: -log p, KL from fp32, share of equal argmax."""
    sums = {name: [0.0, 0.0, 0.0] for name in networks}
    for text in texts:
        laws = {}
        for name, network in networks.items():
            cache = network.new_cache(len(text))
            hidden = network.forward(text, [cache], [DraftSegment(0, len(text), (), 0)])
            laws[name] = network.logits(hidden[:-1]).log_softmax(-1)
        exact = laws["fp32"]
        for name, law in laws.items():
            nats = -law.gather(1, torch.tensor(text[1:])[:, None]).sum()
            kl = (exact.exp() * (exact - law)).sum()
            same = (exact.argmax(-1) == law.argmax(-1)).sum()
            sums[name] = [total + float(more) for total, more in zip(sums[name], (nats, kl, same), strict=True)]
    count = sum(len(text) - 1 for text in texts)
    return {
        name: {"nats": nats / count, "kl": kl / count, "argmax": same / count, "tokens": count}
        for name, (nats, kl, same) in sums.items()
    }


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _table(found: dict[str, Any]) -> str:
    ran = found["machine"]
    lines = [
        f"# ONNX Runtime {ran['onnxruntime']}, {ran['name']}",
        "",
        "Made by `scripts/measure_onnx.py`. Others may have used the machine: ratios say more than times.",
        "",
    ]
    for threads in (1, 2):
        if f"forward_{threads}" not in found:
            continue
        lines += [f"ms of a forward with its head, {threads} thread(s): processor time (wall clock), by rows", ""]
        lines += ["| | " + " | ".join(map(str, SHAPES)) + " |", "|---" * (len(SHAPES) + 1) + "|"]
        for name, times in found[f"forward_{threads}"].items():
            cells = [f"{times[str(rows)]['processor']:.1f} ({times[str(rows)]['wall']:.1f})" for rows in SHAPES]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["| held-out stories | nats | from fp32 | KL | argmax |", "|---|---|---|---|---|"]
    exact = found["distance"]["fp32"]["nats"]
    for name, each in found["distance"].items():
        lines.append(
            f"| {name} | {each['nats']:.4f} | {each['nats'] - exact:+.4f} | {each['kl']:.4f} | {each['argmax']:.1%} |"
        )
    lines.append(f"\n{found['distance']['fp32']['tokens']} tokens. bf16 is torch's.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
