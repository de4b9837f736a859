"""Command lines that somebody got wrong: configurations, flags and files of every verb, drawn at random.

Each begins as one that holds and has a few things replaced, misspelt, dropped or added.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from pydantic import TypeAdapter

from hildanext import cli
from hildanext.data.chat_dataset import ChatDataConfig
from hildanext.datasets import PrepareConfig
from hildanext.eval.evaluation import EvalConfig
from hildanext.recipe import RunConfig
from hildanext.serve.settings import ServeConfig
from hildanext.sft_stage1 import SftConfig
from hildanext.stages.bench import BenchConfig
from hildanext.stages.generate import SampleConfig
from hildanext.wsd_stage0 import ConvertConfig, DataConfig

SECTIONS = {"prepare": PrepareConfig, "convert": ConvertConfig, "data": DataConfig, "sft": SftConfig} | {
    "chat": ChatDataConfig, "eval": EvalConfig, "bench": BenchConfig, "generate": SampleConfig, "serve": ServeConfig,
}  # fmt: skip
"""What each section of a run is read as: its fields are what may be given wrongly."""

PHASES = [{"phase": "decay", "block_size": 8, "tokens": 64}]
STEP = {"batch_size": 1, "precision": "no"}
RUN: dict[str, Any] = {
    "folder": "out",
    "parent": "tiny",
    "prepare": {"source": {"name": "text", "path": "text.txt"}, "out": "out/data"},
    "data": {"train": "shards", "valid": "others", "sequence_length": 32},
    "convert": {"wsd": PHASES, "block_size": 8, "valid_rows": 1, "losses": [{"name": "m2t"}], "train": STEP},
    "chat": {"train": {"name": "files", "path": "good.jsonl"}, "valid_share": 0.5, "sequence_length": 64},
    "sft": {"model": "tiny", "valid_rows": 1, "samples": {"count": 0}, "losses": [{"name": "m2t"}], "train": STEP},
    "eval": {"model": "tiny", "parent": "", "data": "shards", "rows": 1, "generation": None, "sequence_length": 32},
    "generate": {"model": "tiny", "prompts": ["The dog"], "modes": ["S_MODE"], "max_new_tokens": 2},
    "bench": {"model": "tiny", "parent": "", "decode": {"prompt_tokens": 8, "new_tokens": 8, "repeats": 1}},
    "serve": {"model": "tiny", "parent": None, "port": 0, "jobs_folder": "out/jobs"},
    "graphs": {"strict": True},
}
"""Each section holds, and asks for next to nothing."""

READS = {
    "prepare": ("prepare", "graphs"),
    "convert": ("convert", "data"),
    "sft": ("sft", "chat"),
    "eval": ("eval",),
    "bench": ("bench",),
    "generate": ("generate",),
    "chat": ("generate",),
    "serve": ("serve",),
    "run": ("convert", "data"),
    "check": tuple(RUN),
    "plan": ("convert", "data", "sft", "chat"),
    "jobs": tuple(RUN),
}
"""The sections of the configuration that a verb is given."""

WORDS: dict[str, tuple[str, ...]] = {
    "convert": ("--out", "out", "--quiet"),
    "sft": ("--out", "out", "--quiet"),
    "prepare": ("--quiet",),
    "eval": ("--quiet",),
    "generate": ("--model", "tiny", "--threads", "1", "--max-new-tokens", "2"),
    "chat": ("--model", "tiny", "--plain", "--threads", "1", "--max-new-tokens", "2"),
    "models": ("show", "nowhere"),
    "bench": ("decode",),
    "explain-graph": ("graphs.jsonl",),
    "pull": ("nowhere",),
    "runs": ("out",),
    "jobs": ("submit", "generate", "--folder", "out/jobs"),
}
"""What a verb is given beside its configuration."""

FILES: dict[str, bytes] = {
    "good.jsonl": b"".join(b'{"id": "%d", "prompt": "1+%d?", "response": "2"}\n' % (n, n) for n in range(6)),
    "text.txt": b"The dog ran.\n<|endoftext|>\nThe cat sat.\n",
    "graphs.jsonl": b'{"id": "a", "prompt": "1", "response": "2", "causal_graph": {"nodes": 3}}\n',
    "empty.json": b"",
    "null.json": b"null",
    "list.json": b"[1, 2]",
    "deep.json": b'{"a":' * 5000,
    "nan.json": b'{"seed": NaN, "threads": 1e999}',
    "twice.json": b'{"seed": 1, "seed": 2}',
    "bytes.bin": bytes(range(256)) * 8,
    "half.jsonl": b'{"prompt": "x \\ud83d", "response": "y"}\n{"prompt"',
    "digits.json": b'{"seed": ' + b"9" * 5000 + b"}",
    "nested/config.json": b'{"model_type": "qwen3"}',
    "card/hilda.json": b'{"mask_id": "5"}',
    "model.gguf": b"GGUF" + bytes(60),
    "model/config.json": b"[]",
}
"""What lies about in the folder where the commands run; `shards` beside them is prepared text."""

PLACES = (*FILES, ".", "..", "nested", "shards", "nowhere/x", "text.txt/x", "/dev/null", "/dev/null/x", "~nobody/x") + (
    "x" * 300, "/proc/self/x", "*.json", "[", "a\nb", "-", "//",
)  # fmt: skip
NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "1.5",
    "-0.5",
    "1e308",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "1_0",
    "0x10",
    str(2**63),
    "9" * 30,
)
TEXTS = ("", " ", "x", "tiny", "none", "off", "null", "true", "auto", "S_MODE", "cuda:9", "meta", "bf16", "fp99") + (
    "owner/name", "\N{FOX FACE}", "\u2028", "a,b", "a=b", "{}", "[1]", '{"name": "x"}', "0/0", "1/0", "é" * 2000,
    "%s", "{x}",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**63, 10**30, 0.5, -0.5, 1e308, "\0", [], {}, [[]], [None], [{}], {"name": "x"},
    {"name": None}, {"name": ["m2t"]}, {"": 1}, {"x": {"y": [1]}}, [1, "x"], {"name": "m2t", "weight": -1},
)  # fmt: skip


def fields_of(schema: Mapping[str, Any], top: Mapping[str, Any], depth: int = 3) -> Iterator[tuple[str, ...]]:
    """Where the fields of a JSON schema are, those of fields included."""
    for option in schema.get("anyOf", []):
        yield from fields_of(option, top, depth)
    if "$ref" in schema and depth:
        yield from fields_of(top["$defs"][schema["$ref"].rpartition("/")[2]], top, depth - 1)
    for name, inner in schema.get("properties", {}).items():
        yield (name,)
        yield from ((name, *rest) for rest in fields_of(inner, top, depth - 1))


def _known(verb: str) -> list[tuple[str, ...]]:
    schemas = {name: TypeAdapter(SECTIONS[name]).json_schema() for name in READS[verb] if name in SECTIONS}
    known = [(section, *rest) for section, schema in schemas.items() for rest in fields_of(schema, schema)]
    run = TypeAdapter(RunConfig).json_schema()
    return sorted(place for place in {*known, *fields_of(run, run)} if place[-1] not in NAMED_OUTPUTS)


def _flags(verb: str) -> list[argparse.Action]:
    """The optional arguments of a verb, or of its actions."""
    parser, _ = cli._parser([verb])
    rows = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    actions = list(rows.choices[verb]._actions)
    for action in [action for action in actions if isinstance(action, argparse._SubParsersAction)]:
        actions += [inner for row in action.choices.values() for inner in row._actions]
    return [action for action in actions if action.option_strings and "--help" not in action.option_strings]


OUTPUTS = ("--out", "--png", "--plot", "--trace", "--samples-out", "--folder", "--jobs-folder")
"""Flags that say where something is written: there they may."""
NAMED_OUTPUTS = ("folder", "out", "jobs_folder")
"""The same in configurations."""
UNTRIED = ("--force", "--follow", "--harness")
"""They fetch, wait or start a program of somebody else's."""
plain_values = st.sampled_from([*TEXTS, *PLACES]) | st.sampled_from(VALUES)


def _flag(action: argparse.Action) -> st.SearchStrategy[list[str]]:
    name = action.option_strings[-1]
    if action.nargs == 0:
        return st.just([name])
    if name in OUTPUTS:
        values = st.sampled_from(["out", "out/x", "out/a/b.png", "/dev/null/x", "text.txt/x", "", "out/" + "x" * 300])
    elif name in ("--url", "--server"):
        values = st.sampled_from(["", "x", "http://127.0.0.1:9", "http://127.0.0.1:99999", "ftp://[::1]", "http://["])
    elif name == "--set":
        names = st.sampled_from(["seed", "x", "", "a.b", "stages", ".", "seed.x"])
        values = st.tuples(names, st.sampled_from(TEXTS)).map("=".join)
    else:
        values = st.sampled_from(TEXTS) | st.sampled_from(PLACES) | st.sampled_from(NUMBERS)
    return values.map(lambda value: [f"{name}={value}"] if value.startswith("-") else [name, value])


@st.composite
def command_lines(draw: st.DrawFn, verb: str) -> tuple[list[str], bytes | None]:
    """The words of one command, and the file `run.json` that it may name."""
    words, run = [verb, *WORDS.get(verb, ())], None
    if verb == "jobs" and draw(st.booleans()):
        action = draw(st.sampled_from(["list", "show", "cancel", "log", "artefacts", "events", "nothing"]))
        words = [verb, action, *([] if action == "list" else [draw(st.sampled_from(TEXTS))]), "--folder", "out/jobs"]
    elif verb in READS and (verb == "bench" or draw(st.integers(0, 9)) != 7):
        run = json.dumps(draw(_run(verb))).encode()
        words += ["--config", "run.json"]
    for action in draw(st.lists(st.sampled_from(_flags(verb)), max_size=2)):
        if action.option_strings[-1] not in UNTRIED:
            words += draw(_flag(action))
    if draw(st.integers(0, 9)) == 7:
        words += [draw(st.sampled_from([*PLACES, "--nothing", "--", "-x", "extra"]))]
    if draw(st.integers(0, 9)) == 7 and len(words) > 2:
        kept = [word for at, word in enumerate(words) if at and not {word, words[at - 1]} & set(OUTPUTS)]
        words.remove(draw(st.sampled_from(kept or words[1:2])))
    return words, run


@st.composite
def _run(draw: st.DrawFn, verb: str) -> dict[str, Any]:
    """A configuration with a few faults."""
    run = json.loads(json.dumps({name: RUN[name] for name in (*READS[verb], "folder", "parent")}))
    if verb == "run":
        run["stages"] = [{"stage": "convert"}]
    places = [*_known(verb), *_places(run)]
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(places))
        inner: Any = run
        for name in parents:
            inner = inner.setdefault(name, {}) if isinstance(inner, dict) else inner
        if not isinstance(inner, dict):
            continue
        match draw(st.sampled_from(["replace", "replace", "replace", "drop", "misspell", "add"])):
            case "replace":
                inner[last] = deepcopy(draw(plain_values))  # the drawn one is everybody's
            case "drop":
                inner.pop(last, None)
            case "misspell":
                inner[last[:-1] or "x"] = inner.pop(last, 1)
            case _:
                inner[draw(st.sampled_from(["x", "name", "", "seed", "\N{FOX FACE}"]))] = deepcopy(draw(plain_values))
    return {"folder": "out", **run} if draw(st.booleans()) else run


def _places(value: Any) -> Iterator[tuple[str, ...]]:
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name not in NAMED_OUTPUTS:
            yield (name,)
        yield from ((name, *rest) for rest in _places(inner))


def lay_out(folder: Path) -> None:
    """Make the files that the commands may name."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
