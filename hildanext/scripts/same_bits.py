"""Whether two trees of the project compute the same bits: conversion, fine-tuning, generation, evaluation, service.

python hildanext/scripts/same_bits.py record --tree . --out before.json --keep before
python hildanext/scripts/same_bits.py record --tree ../other --out after.json
python hildanext/scripts/same_bits.py compare before.json after.json
python hildanext/scripts/same_bits.py load --tree ../other --made-by before

`record` runs the embedded model through the command line alone, on one thread and with fixed seeds, and keeps of every
step what a time, a machine or a place cannot change. `compare` says which steps differ, and in what. `load` copies the
folder of a record and lets the other tree read it: checkpoints, samples and run folders, and two trainings that the
first tree left half done, which must end as the first tree's own did. Both exit with 1 where anything differs.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path("hildanext/backend/src")
HASHES = "hashes.json"
"""Beside the runs of a kept folder: what `record` wrote to --out."""
RESULTS = ("trace.json", "sampled.json", "eval.json", "quality.json")
"""What a tree that loads has to write anew. The samples of tasks stay: it goes on with them."""
VARIES = re.compile(
    r"(.*_)?seconds|seconds_.*|.*_per_second|created|changed|.*_ms|.*rss.*|.*memory.*|.*vram.*"
    r"|machine|device_name|versions|hildanext|notes"
)
"""Fields that depend on time, memory, machine or version, whatever the numbers are."""
SHOWN = 6
"""Differing values of a step that are printed."""
SERVE_PATIENCE = 180.0

QUESTIONS = (
    ("Tom has 3 apples and buys 4 more. How many does he have?", "He has 3+4=<<3+4=7>>7 apples.\n#### 7"),
    ("A box holds 12 eggs. How many are in 2 boxes?", "There are 2*12=<<2*12=24>>24 eggs.\n#### 24"),
    ("Ann had 9 balls and lost 2. Then she found 1. How many now?", "9-2=<<9-2=7>>7\n7+1=<<7+1=8>>8\n#### 8"),
    ("Sam is 5 degrees below zero. What is it?", "It is <<0-5=-5>>-5.\n#### -5"),
)
STORIES = (
    "Once upon a time there was a little girl named Lily. She had a red ball.",
    "Tom and his mom went to the park. Tom saw a big dog.",
    "The sun was hot.",
)
CHOICES = (
    {"question": "What colour is the sky?", "choices": ["red", "blue", "green"], "answer": 1, "subject": "sky"},
    {"question": "Who barks?", "choices": ["a dog", "the big old cat"], "answer": "A", "subject": "sky"},
)
PROMPTS = ("Once upon a time", "Tom had a red", "", "The dog")

TRAIN = {"batch_size": 2, "precision": "no", "evaluate_every": 4, "checkpoint_every": 3}
CONFIG: dict[str, Any] = {
    "name": "same-bits", "seed": 3, "parent": "tiny", "folder": "data",
    "prepare": {
        part: {"source": {"name": "parent", "documents": count, "max_tokens": 96, "batch_size": 16, "seed": seed}}
        for part, count, seed in (("train", 32, 1), ("valid", 16, 2))
    },
    "data": {
        "train": "data/prepare/train", "valid": "data/prepare/valid", "sequence_length": 128, "pad_to_block": 32,
    },
    "convert": {
        "parent": "tiny", "seed": 3, "block_size": 8, "replace_rate": 0.15, "valid_rows": 4, "train": TRAIN,
        "wsd": [
            {"phase": "warmup", "block_size": 4, "tokens": 512},
            {"phase": "stable", "block_size": 128, "tokens": 512},
            {"phase": "decay", "block_size": 8, "tokens": 1024},
        ],
        "losses": [{"name": "m2t"}, {"name": "t2t", "keep": 0.1}, {"name": "kl", "weight": 0.5}],
    },
    "chat": {
        "train": {"name": "arithmetic", "count": 40, "largest": 9, "steps": 2}, "valid_share": 0.2,
        "sequence_length": 128,
    },
    "sft": {
        "model": "tiny", "seed": 3, "epochs": 1, "valid_rows": 4, "train": {**TRAIN, "layout": "response"},
        "losses": [{"name": "m2t", "weighting": "masked_mean"}, {"name": "t2t"}],
        "samples": {"count": 2, "max_new_tokens": 24},
    },
    "eval": {
        "rows": 4, "sequence_length": 128, "likelihood": {"draws": 2, "block_sizes": [1, 4, 8]},
        "generation": {"prompts": 3, "new_tokens": 24},
    },
    "stages": [{"stage": "prepare"}],
}  # fmt: skip
TASKS: dict[str, Any] = {
    "gsm8k": {"data": "tasks/gsm8k", "few_shot": 1, "max_new_tokens": 16},
    "tinystories": {"data": "tasks/stories.txt"},
    "multiple_choice": {"data": "tasks/choices", "style": "text"},
}
SINGLE = ("--dtype", "fp32", "--threads", "1")


class Failed(Exception):
    """A tree, or a folder, with which nothing can be compared."""


@dataclass(frozen=True)
class Tree:
    """A checkout of the project and the folder it works in."""

    root: Path
    folder: Path

    def command(self, *words: str) -> list[str]:
        if words[0] in ("convert", "sft") and not self._trains_with_json():
            words = tuple(word for word in words if word != "--json")
        return [sys.executable, "-m", "hildanext.cli", *words]

    def _trains_with_json(self) -> bool:
        """Whether a training is asked for its JSON line; in an older tree it ends with one."""
        flags = self.root / SOURCE / "hildanext" / "commands" / "__init__.py"
        return flags.is_file() and '"--json"' in flags.read_text(encoding="utf-8")

    def environment(self) -> dict[str, str]:
        fixed = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        quiet = {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg", "COLUMNS": "120", "PYTHONHASHSEED": "0"}
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
        return {**os.environ, **fixed, **quiet, **offline, "PYTHONPATH": str(self.root / SOURCE)}

    def run(self, words: tuple[str, ...]) -> str:
        """What the command printed to stdout. Raises `Failed` with the end of its stderr."""
        finished = subprocess.run(
            self.command(*words), cwd=self.folder, env=self.environment(), capture_output=True, encoding="utf-8"
        )
        if finished.returncode:
            raise Failed(f"hildanext {' '.join(words)} ended with {finished.returncode}:\n{finished.stderr[-2000:]}")
        return finished.stdout

    def check(self) -> None:
        """Raises `Failed` where another installation would answer in the tree's place."""
        place = subprocess.run(
            [sys.executable, "-c", "import hildanext; print(hildanext.__file__)"],
            cwd=self.folder, env=self.environment(), capture_output=True, encoding="utf-8",
        ).stdout.strip()  # fmt: skip
        if not place or (self.root / SOURCE).resolve() not in Path(place).resolve().parents:
            raise Failed(f"{self.root / SOURCE} has no package hildanext that python would import")


@dataclass(frozen=True)
class Agreed:
    """What may differ: names that changed, and fields that are not compared."""

    renamed: Mapping[str, str]
    without: frozenset[str]

    def apply(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                self.renamed.get(key, key): self.apply(part) for key, part in value.items() if key not in self.without
            }
        if isinstance(value, list):
            return [self.apply(part) for part in value]
        return self.renamed.get(value, value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Step:
    """A command, and what of its output is compared."""

    name: str
    words: tuple[str, ...]
    read: Callable[[Path, str], Any]
    """Of the working folder and what was printed."""
    headline: Callable[[Any], str] = lambda values: ""
    loads: bool = False
    """Reads what other steps made: `load` repeats it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record", help="run everything in one tree")
    recording.add_argument("--tree", type=Path, default=Path(__file__).parents[2])
    recording.add_argument("--out", type=Path, required=True, help="JSON of hashes, values and headlines")
    recording.add_argument("--keep", type=Path, help="leave the runs in this new folder, for `load`")
    comparing = actions.add_parser("compare", help="two records")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    loading = actions.add_parser("load", help="one tree goes on with what another one made")
    loading.add_argument("--tree", type=Path, default=Path(__file__).parents[2])
    loading.add_argument("--made-by", type=Path, required=True, help="the --keep of a record")
    for subparser in (comparing, loading):
        subparser.add_argument(
            "--renamed", nargs="*", default=[], metavar="OLD=NEW", help="names that changed, in fields and values"
        )
        subparser.add_argument("--without", nargs="*", default=[], metavar="FIELD", help="fields that are left out")
    options = parser.parse_args()
    try:
        if options.action == "record":
            return record(options.tree, options.out, options.keep)
        agreed = Agreed(dict(pair.split("=", 1) for pair in options.renamed), frozenset(options.without))
        if options.action == "compare":
            return compare(_read_json(options.before), _read_json(options.after), agreed)
        return load(options.tree, options.made_by, agreed)
    except Failed as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


def record(root: Path, out: Path, keep: Path | None) -> int:
    """Run all steps and write what they gave."""
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise Failed(f"{keep} is not empty: give another folder")
    with _working_folder(keep) as folder:
        tree = Tree(root.resolve(), folder.resolve())
        tree.check()
        _write_inputs(tree.folder)
        items = {step.name: _item(tree, step, step.words) for step in (*STEPS, *HALVES)}
        items["serve"] = _served(tree)
        text = json.dumps(items, indent=1) + "\n"
        (tree.folder / HASHES).write_text(text, encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return 0


def load(root: Path, made_by: Path, agreed: Agreed) -> int:
    """Let the tree read what another one made, and go on where that one stopped."""
    before = _read_json(made_by / HASHES)
    with _working_folder(None) as scratch:
        tree = Tree(root.resolve(), scratch.resolve() / "copy")
        shutil.copytree(made_by, tree.folder, ignore=shutil.ignore_patterns(*RESULTS))
        tree.check()
        after = {step.name: _item(tree, step, step.words) for step in STEPS if step.loads}
        after["serve"] = _served(tree)
        for half in HALVES:
            whole = next(step for step in STEPS if step.name == half.name.removeprefix("half of "))
            out = ("--out", half.words[half.words.index("--out") + 1])
            before[f"{half.name}, resumed"] = before[whole.name]
            there = Step(f"{half.name}, resumed", (), _run_folder(out[1]), whole.headline)
            after[there.name] = _item(tree, there, (*whole.words[: whole.words.index("--out")], *out))
    return compare({name: before[name] for name in after}, after, agreed)


def compare(before: Mapping[str, Any], after: Mapping[str, Any], agreed: Agreed) -> int:
    """Print a row for each step, and what differs. 1 where anything does."""
    different = 0
    width = max(len(name) for name in [*before, *after])
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            print(f"{name:{width}}  ONLY {'BEFORE' if name in before else 'AFTER'}")
            different += 1
            continue
        old, new = agreed.apply(before[name]["values"]), agreed.apply(after[name]["values"])
        if _hash(old) == _hash(new):
            print(f"{name:{width}}  same       {after[name]['sha256'][:16]}  {after[name]['headline']}")
            continue
        different += 1
        print(f"{name:{width}}  DIFFERENT")
        for which, item in (("before", before[name]), ("after", after[name])):
            print(f"    {which:6}  {item['sha256'][:16]}  {item['headline']}")
        changes = list(_differences(old, new))
        for place, was, now in changes[:SHOWN]:
            print(f"    {place}: {was} -> {now}")
        if len(changes) > SHOWN:
            print(f"    and {len(changes) - SHOWN} more values")
    print(f"{different} of {len({*before, *after})} differ" if different else "all the same")
    return 1 if different else 0


def _item(tree: Tree, step: Step, words: tuple[str, ...]) -> dict[str, Any]:
    begun = time.monotonic()
    printed = tree.run(words)
    return _as_item(tree, step, step.read(tree.folder, printed), time.monotonic() - begun)


def _as_item(tree: Tree, step: Step, found: Any, seconds: float) -> dict[str, Any]:
    values = _lasting(found, {str(tree.folder): "FOLDER", str(tree.root): "TREE"})
    headline = step.headline(values)
    print(f"{step.name}: {headline} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return {"sha256": _hash(values), "headline": headline, "values": values}


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _lasting(value: Any, places: Mapping[str, str]) -> Any:
    """The value without fields that vary, and without the places where it was computed."""
    if isinstance(value, Mapping):
        return {key: _lasting(part, places) for key, part in value.items() if not VARIES.fullmatch(key)}
    if isinstance(value, list | tuple):
        return [_lasting(part, places) for part in value]
    if isinstance(value, str):
        for place, name in places.items():
            value = value.replace(place, name)
    return value


def _differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two values differ, down to single ones."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key, "absent"), new.get(key, "absent"), f"{place}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (was, now) in enumerate(zip(old, new, strict=True)):
            yield from _differences(was, now, f"{place}[{number}]")
    elif old != new:
        yield place, json.dumps(old)[:160], json.dumps(new)[:160]


@contextmanager
def _working_folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="same-bits-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise Failed(f"cannot read {path} ({problem}): it is written by `record`") from None
    return content


def _write_inputs(folder: Path) -> None:
    """Configurations, prompts and the small data sets."""
    tasks = {**CONFIG, "eval": {"quality": {"tasks": TASKS, "batch_size": 2}}}
    rows = [{"question": question, "answer": answer} for question, answer in QUESTIONS]
    files = {
        "run.json": json.dumps(CONFIG),
        "tasks.json": json.dumps(tasks),
        "prompts.txt": "".join(f"{prompt}\n" for prompt in PROMPTS),
        "tasks/stories.txt": "\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n",
        "tasks/gsm8k/test.jsonl": _lines(rows),
        "tasks/gsm8k/train.jsonl": _lines(rows[::-1]),
        "tasks/choices/test.jsonl": _lines(CHOICES),
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# What is read of the output


def _tensors(path: Path) -> dict[str, str]:
    """Of every tensor of a safetensors file: dtype, shape and hash. The order in the file does not matter."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name in sorted(header):
        begin, end = header[name]["data_offsets"]
        digest = hashlib.sha256(content[start + begin : start + end]).hexdigest()
        found[name] = f"{header[name]['dtype']} {header[name]['shape']} {digest}"
    return found


def _json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _last_line(printed: str) -> Any:
    return json.loads(printed.strip().splitlines()[-1])


def _arrays(*folders: str) -> Callable[[Path, str], Any]:
    """Hashes of the arrays in folders of prepared data; their manifests as they are."""

    def read(folder: Path, printed: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(path for name in folders for path in (folder / name).rglob("*")):
            if path.suffix == ".json":
                found[path.relative_to(folder).as_posix()] = json.loads(path.read_text(encoding="utf-8"))
            elif path.is_file():
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    return read


def _run_folder(name: str) -> Callable[[Path, str], Any]:
    """Tensors, metrics, samples, card and summary of a run; places inside it are relative to it."""

    def read(folder: Path, printed: str) -> dict[str, Any]:
        run = folder / name
        summary = {key: value for key, value in _last_line(printed).items() if key not in ("checkpoint", "report")}
        found: dict[str, Any] = {"summary": summary, "card": _read_json(run / "checkpoint/hilda.json")}
        for path in sorted(run.rglob("*.safetensors")):
            found[path.relative_to(run).as_posix()] = _tensors(path)
        for path in sorted(run.rglob("*.jsonl")):
            found[path.relative_to(run).as_posix()] = _json_lines(path)
        return found

    return read


def _half_run(name: str) -> Callable[[Path, str], Any]:
    """A run that stopped early: its training state and its metrics."""

    def read(folder: Path, printed: str) -> dict[str, Any]:
        run = folder / name
        states = {path.name: _tensors(path) for path in sorted((run / "state").rglob("*.safetensors"))}
        return {**states, "metrics": _json_lines(run / "metrics.jsonl")}

    return read


def _generated(folder: Path, printed: str) -> list[Any]:
    return [json.loads(line) for line in printed.splitlines() if line.strip()]


def _with_trace(name: str) -> Callable[[Path, str], Any]:
    return lambda folder, printed: {"answers": _generated(folder, printed), "trace": _read_json(folder / name)}


def _results(name: str) -> Callable[[Path, str], Any]:
    """Every JSON and JSON lines file of a folder of results."""

    def read(folder: Path, printed: str) -> dict[str, Any]:
        place = folder / name
        return {
            path.relative_to(place).as_posix(): _json_lines(path) if path.suffix == ".jsonl" else _read_json(path)
            for path in sorted(place.rglob("*.json*"))
        }

    return read


def _runs_compared(folder: Path, printed: str) -> dict[str, Any]:
    """Runs by name, and their settings: the command lists them by the time of their last change."""
    listing = _last_line(printed)
    names = [row["run"] for row in listing["runs"]]
    differences = {
        setting: dict(sorted(zip(names, values, strict=True))) for setting, values in listing["differences"].items()
    }
    return {"runs": {row["run"]: row for row in listing["runs"]}, "differences": differences}


# What is said of it in one line


def _training_headline(values: Any) -> str:
    metrics = values["metrics.jsonl"] if "metrics.jsonl" in values else values["metrics"]
    losses = [line["loss"] for line in metrics if line.get("kind") == "train"]
    last = values.get("summary", {}).get("last") or {}
    held_out = ", ".join(f"{name} {number:.6f}" for name, number in last.items() if isinstance(number, float))
    return f"loss {losses[0]:.6f} ... {losses[-1]:.6f} in {len(losses)} steps; {held_out}"


def _text_headline(values: Any) -> str:
    answers = values["answers"] if isinstance(values, dict) else values
    return f"{sum(len(answer['tokens']) for answer in answers)} tokens, {answers[0]['text'][:60]!r}"


def _eval_headline(values: Any) -> str:
    rows = values["eval.json"]["likelihood"]
    return ", ".join(f"{row['name']} {row['nats_per_token']:.6f}" for row in rows)


def _count_headline(values: Any) -> str:
    return f"{len(values)} files or rows"


def _serve_headline(values: Any) -> str:
    return repr(values["generate"]["text"][:60])


# The steps


def _set(**changes: Any) -> tuple[str, ...]:
    """Flags `--set`; two underlines in a name are a dot."""
    return tuple(
        word for name, value in changes.items() for word in ("--set", f"{name.replace('__', '.')}={json.dumps(value)}")
    )


def _training(stage: str, name: str, *flags: str) -> tuple[str, ...]:
    return (stage, "--config", "run.json", *flags, "--out", name, "--quiet", "--json")


def _generation(model: str, *flags: str) -> tuple[str, ...]:
    return ("generate", "--model", model, *SINGLE, "--max-new-tokens", "32", "--json", *flags)


BLOCK = _set(convert__alignment="block", convert__turns=2)
PARENT = _set(
    convert__alignment="parent", convert__complementary=True, convert__merge_top_k=2,
    convert__losses=[{"name": "m2t"}, {"name": "t2t"}, {"name": "ar", "weight": 0.3}, {"name": "kl"}],
)  # fmt: skip
LORA = _set(convert__lora={"rank": 4, "alpha": 8}, convert__train__gradient_checkpointing=True)
CAUSAL = _set(
    profile="FULL", sft__model="block/checkpoint", sft__lora={"rank": 4, "alpha": 8}, sft__train__layout="double",
    sft__losses=[{"name": "m2t"}, {"name": "t2t"}, {"name": "c2dlm", "apply": "both", "reattention": "v_out_norm"}],
)  # fmt: skip
SAMPLED = (
    "--mode", "Q_MODE", "--window", "2", "--temperature", "0.7", "--top-p", "0.9", "--top-k", "50", "--seed", "5",
)  # fmt: skip
BATCH = ("--batch", "prompts.txt")

STEPS = (
    Step("prepare", ("run", "run.json"), _arrays("data/prepare"), _count_headline, loads=True),
    Step("prepare text", ("prepare", "--source", "tinystories", "--path", "tasks/stories.txt", "--out", "data/text"),
         _arrays("data/text"), _count_headline),
    Step("causal graphs", ("prepare", "--graphs", "rule:gsm8k", "--path", "tasks/gsm8k/train.jsonl", "--out",
         "taught.jsonl"), lambda folder, _: _json_lines(folder / "taught.jsonl"), _count_headline),
    Step("convert block", _training("convert", "block", *BLOCK), _run_folder("block"), _training_headline),
    Step("convert parent", _training("convert", "parent", *PARENT), _run_folder("parent"), _training_headline),
    Step("convert lora", _training("convert", "lora", *LORA), _run_folder("lora"), _training_headline),
    Step("sft", _training("sft", "sft"), _run_folder("sft"), _training_headline),
    Step("sft causal lora", _training("sft", "causal", *CAUSAL), _run_folder("causal"), _training_headline),
    Step("generate S_MODE", _generation("parent/checkpoint", *BATCH, "--trace", "trace.json"),
         _with_trace("trace.json"), _text_headline, loads=True),
    Step("generate Q_MODE", _generation("block/checkpoint", *BATCH, *SAMPLED, "--trace", "sampled.json"),
         _with_trace("sampled.json"), _text_headline, loads=True),
    Step("generate lora", _generation("lora/checkpoint", *BATCH, "--effort", "adaptive"), _generated,
         _text_headline, loads=True),
    Step("generate chat", _generation("sft/checkpoint", "--chat", "--prompt", "Tom has 3 toys. How many?"), _generated,
         _text_headline, loads=True),
    Step("eval", ("eval", "--config", "run.json", "--model", "block/checkpoint", "--data", "data/prepare/valid",
         "--out", "eval", *SINGLE, "--quiet"), _results("eval"), _eval_headline, loads=True),
    Step("eval tasks", ("eval", "--config", "tasks.json", "--model", "tiny", "--out", "quality", *SINGLE, "--quiet"),
         _results("quality"), _count_headline, loads=True),
    Step("runs", ("runs", "block", "parent", "lora", "sft", "causal", "--compare", "--json"), _runs_compared,
         lambda values: f"{len(values['runs'])} runs", loads=True),
)  # fmt: skip
HALVES = (
    Step("half of convert block", _training("convert", "half", *BLOCK, *_set(convert__train__stop_after=3)),
         _half_run("half"), _training_headline),
    Step("half of sft", _training("sft", "half-sft", *_set(sft__train__stop_after=4)),
         _half_run("half-sft"), _training_headline),
)  # fmt: skip


# The service


def _served(tree: Tree) -> dict[str, Any]:
    """Answers of a service on a free port: one by one, streamed, of the parent, and several at the same time."""
    begun = time.monotonic()
    with _service(tree, "parent/checkpoint") as address:
        answers = _ask_everything(address)
    step = Step("serve", (), _generated, _serve_headline)
    return _as_item(tree, step, answers, time.monotonic() - begun)


@contextmanager
def _service(tree: Tree, model: str) -> Iterator[str]:
    """The address of a running service, which ends with the block."""
    words = ("serve", "--model", model, "--parent", "tiny", "--port", "0", "--jobs-folder", "none",
             "--dtype", "fp64", "--threads", "1", *_set(serve__chat_template="plain"))  # fmt: skip
    with (tree.folder / "serve.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            tree.command(*words), cwd=tree.folder, env=tree.environment(),
            stdout=subprocess.PIPE, stderr=log, encoding="utf-8",
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("http"):
                raise Failed(f"serve did not start:\n{(tree.folder / 'serve.log').read_text(encoding='utf-8')[-2000:]}")
            yield line.split()[0]
        finally:
            process.terminate()
            process.communicate(timeout=SERVE_PATIENCE)


def _ask_everything(address: str) -> dict[str, Any]:
    sampled = {"mode": "Q_MODE", "window": 1, "temperature": 0.7, "top_p": 0.9, "seed": 7}
    completion = {"prompt": PROMPTS[0], "max_tokens": 32, "temperature": 0.5, "seed": 7}
    models = json.loads(_post(address + "/v1/models", None))
    served = [entry["id"] for entry in models["data"]]
    return {
        "models": len(served),
        "generate": _answer(address + "/generate", {"prompt": PROMPTS[0], "max_new_tokens": 32, **sampled}),
        "frames": _answer(address + "/generate", {"prompt": PROMPTS[1], "max_new_tokens": 16, "frames": True}),
        "parent": _answer(address + "/generate", {"prompt": PROMPTS[0], "max_new_tokens": 32, "parent": True}),
        "completion": _answer(address + "/v1/completions", {"model": served[0], **completion, "n": 2}),
        "chat": _answer(
            address + "/v1/chat/completions",
            {"model": served[0], "messages": [{"role": "user", "content": "Who is Tom?"}], "max_tokens": 24},
        ),
        "streamed": _streamed(address + "/v1/completions", {"model": served[0], **completion, "stream": True}),
        "together": _together(address),
    }


def _together(address: str) -> list[str]:
    """Texts of requests that are open at the same time: what a batch is made of does not change them in fp64."""
    bodies = [{"prompt": prompt, "max_new_tokens": 24, "seed": number} for number, prompt in enumerate(PROMPTS)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        return [answer["text"] for answer in pool.map(lambda body: _answer(address + "/generate", body), bodies)]


def _answer(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Without the number of the request, which is drawn."""
    answer: dict[str, Any] = json.loads(_post(url, body))
    return {name: value for name, value in answer.items() if name != "id"}


def _streamed(url: str, body: Mapping[str, Any]) -> str:
    """The text of a stream of events, put together again: where it is cut may depend on the time."""
    lines = [line.removeprefix("data: ") for line in _post(url, body).splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


def _post(url: str, body: Mapping[str, Any] | None) -> str:
    """What the service answers; without a body, to a GET. Raises `Failed` with its message."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SERVE_PATIENCE) as response:
            text: str = response.read().decode()
    except urllib.error.HTTPError as problem:
        raise Failed(f"{url} answered {problem.code}: {problem.read().decode()[:500]}") from None
    return text


if __name__ == "__main__":
    sys.exit(main())
