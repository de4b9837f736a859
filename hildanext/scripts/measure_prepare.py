"""How much memory `hildanext prepare` holds on a corpus far larger than that, which cores it uses, and how fast it is.

python hildanext/scripts/measure_prepare.py --folder runs/prepare --text train.txt other.jsonl --gigabytes 5

A corpus of JSON lines is made of the sentences of --text, drawn anew for each document (4 to 60 of them, and a random
number). `prepare` then runs as a process of its own; once a second the resident memory of it and of all its children is
added up, with the processor time they have used. Writes prepare.json and prepare.png into --out.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from hildanext.core.errors import HildaError
from hildanext.core.plots import PALETTE, new_figure, save
from hildanext.core.run_dir import write_atomically
from hildanext.core.runtime import versions
from hildanext.data.packing.folder import read_manifest

MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path, help="of the corpus and the shards, to be deleted")
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="text, or JSON lines with a field 'text'")
    parser.add_argument("--corpus", type=Path, help="a corpus of JSON lines that is there already")
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--tokenizer", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("hildanext/docs/results/prepare"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    corpus = options.corpus
    try:
        if corpus is None:
            corpus = options.folder / "corpus.jsonl"
            make_corpus(options.text, corpus, round(options.gigabytes * 1e9))
        found = measure(corpus, options.folder / "shards", options.tokenizer)
    except HildaError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    _picture(found, options.out / "prepare.png")
    seconds = found.pop("each second")
    print(json.dumps(found, indent=1))
    found["each tenth second"] = seconds[::10]
    write_atomically(options.out / "prepare.json", json.dumps(found, indent=1) + "\n")
    return 0


def make_corpus(files: Sequence[Path], corpus: Path, size: int, seed: int = 1) -> None:
    """Write about `size` bytes of documents. Raises `HildaError` where the files hold too little text."""
    text = " ".join(_text(file) for file in files)
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if 15 < len(part) < 400]
    if len(sentences) < 1000:
        raise HildaError(f"{len(sentences)} sentences are too few for a corpus", "name more files with --text")
    draw, written, number = random.Random(seed), 0, 0
    with corpus.open("w", encoding="utf-8") as stream:
        while written < size:
            chosen = " ".join(draw.choices(sentences, k=draw.randint(4, 60)))
            written += stream.write(json.dumps({"id": number, "text": f"{chosen} {draw.randint(0, 10**9)}"}) + "\n")
            number += 1


def _text(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix not in (".json", ".jsonl"):
        return text
    return " ".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())


def measure(corpus: Path, shards: Path, tokenizer: str) -> dict[str, Any]:
    """Run `prepare` and watch it. Raises `HildaError` where it fails."""
    words = ["prepare", "--source", "jsonl", "--path", str(corpus), "--tokenizer", tokenizer, "--out", str(shards)]
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "hildanext.cli", *words])
    seconds = _watch(psutil.Process(process.pid), begun)
    took = time.monotonic() - begun
    manifest = read_manifest(shards)
    if process.wait() or manifest is None:
        raise HildaError("prepare failed", "see what it said")
    size = corpus.stat().st_size
    cores = [second["processor"] - before["processor"] for before, second in zip(seconds, seconds[1:], strict=False)]
    return {
        "bytes": size,
        "documents": manifest["documents"],
        "tokens": manifest["tokens"],
        "shards": len(manifest["shards"]),
        "tokenizer": tokenizer,
        "seconds": took,
        "processor_seconds": seconds[-1]["processor"],
        "tokens_per_second": manifest["tokens"] / took,
        "tokens_per_processor_second": manifest["tokens"] / seconds[-1]["processor"],
        "megabytes_per_second": size / took / 1e6,
        "peak_rss_mib": max(second["rss_mib"] for second in seconds),
        "cores_used_median": statistics.median(cores),
        "cores": psutil.cpu_count(),
        "versions": versions(),
        "each second": seconds,
    }


def _watch(process: psutil.Process, begun: float) -> list[dict[str, float]]:
    """Once a second until it ends: resident memory and processor time of the process and its children, added up."""
    found: list[dict[str, float]] = []
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        try:
            family = [process, *process.children(recursive=True)]
            memory = sum(one.memory_info().rss for one in family) / MIB
            used = sum(sum(one.cpu_times()[:2]) for one in family)
        except psutil.NoSuchProcess:
            continue
        at = time.monotonic() - begun
        found.append({"at": round(at, 2), "rss_mib": round(memory, 1), "processor": round(used, 2)})
        time.sleep(1.0 - at % 1.0)
    return found


def _picture(found: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(8.0, 3.2)
    seconds = found["each second"]
    axes.plot([one["at"] for one in seconds], [one["rss_mib"] for one in seconds], color=PALETTE[0])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("resident memory, MiB")
    axes.set_title(f"prepare on {found['bytes'] / 1e9:.1f} GB, all processes", loc="left", fontsize=10)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
