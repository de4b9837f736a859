"""Conversations to batches: rendered once into memory-mapped arrays, then rows as a pure function of their number.

Every conversation's last block is filled with the end of text, supervised like the answer. Prompts and turn boundaries
are never masked and never learnt. Train and held-out parts are told apart by a hash of the example's id.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from hildanext.core.config import RowLength, config, plain
from hildanext.core.errors import ConfigError, DataError
from hildanext.core.json_text import BadJson, as_read_back, parse
from hildanext.core.registry import build
from hildanext.core.run_dir import save_folder_atomically
from hildanext.data.batch import Batch
from hildanext.data.causal_graphs.graph import read_graph
from hildanext.data.causal_graphs.tokens import placed, token_pairs
from hildanext.data.chat_template import BadExample, Example, Rendering, TemplateChoice, render
from hildanext.data.packing import tokenizer_hash
from hildanext.data.packing.ragged import Ragged, RaggedWriter
from hildanext.data.packing.rows import best_fit
from hildanext.data.sources.base import Report
from hildanext.data.sources.chat import CHATS, ChatSource, StrictReport
from hildanext.data.sources.chat.base import refuse, refuse_mostly_bad
from hildanext.diffusion import CausalPairs

logger = logging.getLogger(__name__)

FORMAT = "hildanext-chat-2"
MANIFEST = "manifest.json"
PARTS = ("train", "valid")
ARRAYS = {"tokens": "<u4", "answers": "<u4", "pairs": "<u4", "weights": "<f4", "ids": "|u1"}
"""`answers` are token ranges, `pairs` (effect, cause) tokens of a causal graph with their `weights`, `ids` UTF-8."""


@config
class ChatDataConfig:
    """Which conversations, and how rows are made of them."""

    train: dict[str, Any]
    """`{"name": one of CHATS, config}`."""
    valid: dict[str, Any] | None = None
    """Held-out conversations; None holds out `valid_share` of `train`."""
    valid_share: float = Field(default=0.05, gt=0, lt=1)
    sequence_length: RowLength = 512
    packing: bool = True
    """Lay several short conversations in a row; they do not see each other."""
    template: TemplateChoice = "auto"
    template_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Settings of the template, such as Qwen3's `enable_thinking`; the checkpoint's template keeps them."""
    special_tokens_in_text: bool = False
    """Parse control tokens that a turn spells. Usually they are text."""
    too_long: Literal["cut", "skip", "refuse"] = "cut"
    """An answer that does not fit: cut where the row ends (without an end of text), left out, or an error. A prompt
    that fills the row leaves nothing to learn: it is left out, or an error."""

    def __post_init__(self) -> None:
        for name, section in (("train", self.train), ("valid", self.valid)):
            if section is not None and not isinstance(section.get("name"), str):
                raise ConfigError(f"chat.{name} has no name", f'give {{"name": ...}}, of {", ".join(CHATS)}')


def open_sources(data: ChatDataConfig) -> dict[str, ChatSource]:
    """The sources by part. Raises `ConfigError` for an unknown name or knob."""
    sections = {"train": data.train, "valid": data.valid}
    return {name: build("chat source", CHATS, section) for name, section in sections.items() if section is not None}


def held_out(id: str, share: float) -> bool:
    """Whether an example belongs to the held-out part; its id alone decides, so order and company do not matter."""
    draw = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big")
    return draw < share * 2**64


def chat_identity(data: ChatDataConfig, tokenizer: Any, block_size: int) -> dict[str, Any]:
    """What decides the arrays: the knobs, the input, the tokenizer with its template, the block size."""
    sources = open_sources(data)
    section = plain(data)
    del section["packing"]  # rows are laid out when the arrays are read
    return {
        **section,
        "format": FORMAT,
        "input": {name: source.fingerprint() for name, source in sources.items()},
        "tokenizer": tokenizer_hash(tokenizer),
        "template": tokenizer.chat_template,
        "block_size": block_size,
    }


def prepare_chat(folder: Path, data: ChatDataConfig, tokenizer: Any, block_size: int) -> dict[str, Any]:
    """Render every conversation into arrays below `folder` and return the manifest; what is there already is kept.

    The tokenizer has its template (`set_template`). The folder is written whole or not at all. Raises `DataError`
    where a part is empty, where more is bad than good, and at the first bad record of a `strict` source.
    """
    if data.sequence_length % block_size:
        raise ConfigError(
            f"block size {block_size} does not divide the sequence length {data.sequence_length}",
            "choose a chat.sequence_length that it divides",
        )
    identity = as_read_back(chat_identity(data, tokenizer, block_size))
    stored = _read_manifest(folder)
    if stored is not None and stored["identity"] == identity:
        return stored
    manifest: dict[str, Any] = {"identity": identity}

    def write(fresh: Path) -> None:
        manifest["parts"] = _write_parts(fresh, data, tokenizer, block_size)
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    save_folder_atomically(folder, write)
    return manifest


def chat_rows(folder: Path, part: str) -> Iterator[np.ndarray]:
    """The tokens of each conversation of a part, as they were rendered."""
    arrays = Ragged(folder / part, "tokens", ARRAYS["tokens"])
    return (arrays[number] for number in range(len(arrays)))


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = parse((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, BadJson):
        return None  # made anew from the source
    return manifest if isinstance(manifest, dict) else None


class _Part:
    """The arrays of one part while they are written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.arrays = {name: RaggedWriter(folder, name, dtype) for name, dtype in ARRAYS.items()}
        self.hash = hashlib.sha256()
        self.counts = dict.fromkeys(("examples", "rows", "tokens", "learnt", "graphs"), 0)

    def add(self, example: Example, rows: Sequence[Rendering]) -> None:
        """Raises `BadExample` for a causal graph that does not hold; nothing of the example is then written."""
        pairs = [_pairs(example, row) for row in rows]
        for row, linked in zip(rows, pairs, strict=True):
            self._add_row(example.id, row, linked)
        self.counts["examples"] += 1

    def _add_row(self, id: str, row: Rendering, pairs: Sequence[tuple[int, int, float]]) -> None:
        ids = np.asarray(row.ids, dtype=ARRAYS["tokens"])
        self.hash.update(ids.tobytes())
        self.arrays["tokens"].add(ids)
        self.arrays["answers"].add([end for answer in row.answers for end in answer])
        self.arrays["pairs"].add([token for pair in pairs for token in pair[:2]])
        self.arrays["weights"].add([pair[2] for pair in pairs])
        self.arrays["ids"].add(np.frombuffer(id.encode(), dtype=np.uint8))
        self.counts["rows"] += 1
        self.counts["tokens"] += len(row.ids)
        self.counts["learnt"] += sum(end - begin for begin, end in row.answers)
        self.counts["graphs"] += bool(pairs)

    def close(self) -> dict[str, Any]:
        for array in self.arrays.values():
            array.close()
        return {**self.counts, "hash": self.hash.hexdigest()}


def _write_parts(fresh: Path, data: ChatDataConfig, tokenizer: Any, block_size: int) -> dict[str, Any]:
    """Read the sources once; returns for each part its counts, and for each source what was refused and cut."""
    parts = {name: _Part(fresh / name) for name in PARTS}
    result: dict[str, Any] = {}
    try:
        for name, source in open_sources(data).items():
            share = data.valid_share if name == "train" and data.valid is None else float(name == "valid")
            chosen = parts if 0 < share < 1 else {"train": parts[name], "valid": parts[name]}
            report, cuts = StrictReport() if source.strict else Report(), Report()
            good = 0
            for example, where in source.examples(report):
                part = chosen["valid" if held_out(example.id, share) else "train"]
                try:
                    rows = render(tokenizer, example, block_size, data.special_tokens_in_text)
                    part.add(example, _fitting(rows, data, where, cuts))
                except BadExample as problem:
                    refuse(report, problem, where)
                else:
                    good += 1
            refuse_mostly_bad(good, report.total, report)
            result[f"{name} source"] = {"refused": report.snapshot(), "cut": cuts.snapshot()}
            for refusals in (report, cuts):
                if refusals.total:
                    logger.warning("%s: %s", name, refusals.summary())
    finally:
        counts = {name: part.close() for name, part in parts.items()}
    for name, part_counts in counts.items():
        if not part_counts["rows"]:
            hint = "raise chat.valid_share" if name == "valid" and data.valid is None else f"see chat.{name}"
            raise DataError(f"the {name} part holds no conversation", hint)
    return {**counts, **result}


def _fitting(rows: list[Rendering], data: ChatDataConfig, where: str, cuts: Report) -> list[Rendering]:
    """The rows that fit `sequence_length`, cut where the knobs say so. Raises `BadExample` where nothing is left."""
    limit, kept = data.sequence_length, []
    for row in rows:
        if len(row.ids) <= limit:
            kept.append(row)
            continue
        if data.too_long == "refuse":
            raise DataError(
                f"{where} has {len(row.ids)} tokens, the row {limit}",
                "raise chat.sequence_length, or set chat.too_long to 'cut' or 'skip'",
            )
        shorter = cut(row, limit) if data.too_long == "cut" else None
        if shorter is not None:
            kept.append(shorter)
            cuts.bad(f"answers cut at {limit} tokens", where)
    if not kept:
        kind = "a prompt as long as the row" if data.too_long == "cut" else "longer than the row"
        raise BadExample(kind, f"{len(rows[-1].ids)} tokens, the row {limit}")
    if len(kept) < len(rows):
        cuts.bad("answers left out beyond the row", where)
    return kept


def cut(row: Rendering, limit: int) -> Rendering | None:
    """The row's first `limit` tokens, up to the last one that is learnt; None where none of them is."""
    answers = tuple((begin, min(end, limit)) for begin, end in row.answers if begin < limit)
    if not answers:
        return None
    end = answers[-1][1]
    return Rendering(row.text[: row.offsets[end - 1][1]], row.ids[:end], row.offsets[:end], answers, row.fields)


def _pairs(example: Example, row: Rendering) -> list[tuple[int, int, float]]:
    """The token pairs of the example's causal graph. Raises `BadExample` for a graph that does not hold."""
    if example.graph is None or set(row.fields) != {"prompt", "response"}:
        return []
    try:
        graph = read_graph(example.graph, {"prompt": example.prompt, "response": example.response})
    except DataError as problem:
        raise BadExample("broken causal graph", problem.message) from None
    pairs = token_pairs(graph, row.offsets, row.fields)
    return [(pair.effect, pair.cause, pair.weight) for pair in placed(pairs, 0, len(row.ids))]


@dataclass(frozen=True)
class Conversation:
    """One conversation of a data set, as tokens: what is fed, and the last answer that is wanted."""

    id: str
    prompt: list[int]
    answer: list[int]


class ChatDataset:
    """Rows of one part of what `prepare_chat` wrote, padded with the end of text to whole blocks.

    With `packing` several conversations share a row of `sequence_length`, each a document of its own; without, a row
    is one conversation. A batch is as long as its longest row.
    """

    def __init__(
        self, folder: str | Path, part: str, sequence_length: int, block_size: int, pad_id: int, packing: bool = True
    ) -> None:
        self.block_size, self.pad_id = block_size, pad_id
        arrays = {name: Ragged(Path(folder) / part, name, dtype) for name, dtype in ARRAYS.items()}
        self._tokens, self._answers, self._ids = arrays["tokens"], arrays["answers"], arrays["ids"]
        self._pairs, self._weights = arrays["pairs"], arrays["weights"]
        blocks = -(-self._tokens.lengths // block_size)
        row_of = best_fit(blocks, sequence_length // block_size) if packing else np.arange(len(blocks))
        self._order = np.argsort(row_of, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
        self.tokens = int(blocks.sum()) * block_size
        """Places of all documents, the filling of last blocks included: what one epoch feeds."""

    def __len__(self) -> int:
        return len(self._starts) - 1

    def documents(self, row: int) -> Sequence[int]:
        """Numbers of the conversations in a row."""
        numbers: list[int] = self._order[self._starts[row] : self._starts[row + 1]].tolist()
        return numbers

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given rows. Learnt are the answers, and the filling of a conversation's last block."""
        wide = [sum(self._places(document) for document in self.documents(int(row))) for row in rows]
        shape = (len(rows), max(wide))
        tokens = np.full(shape, self.pad_id, dtype=np.int64)
        document, position = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        maskable, always_masked = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for line, row in enumerate(rows):
            for number, (index, at) in enumerate(self._placed(int(row))):
                ids, places, answers = self._tokens[index], self._places(index), self._answers[index].reshape(-1, 2)
                tokens[line, at : at + len(ids)] = ids
                document[line, at : at + places] = number
                position[line, at : at + places] = np.arange(places)
                for begin, end in answers.tolist():
                    maskable[line, at + begin : at + end] = True
                    always_masked[line, at + end : at - (-end // self.block_size) * self.block_size] = True
                maskable[line, at + len(ids) : at + places] = True
                always_masked[line, at + len(ids) : at + places] = False
        arrays = (tokens, document, position, maskable, always_masked)
        return Batch(*(torch.from_numpy(array) for array in arrays))

    def pairs(self, rows: Sequence[int] | np.ndarray) -> CausalPairs | None:
        """Causes and effects of the same rows as a batch; None where no conversation has a graph."""
        return CausalPairs.collate([self._row_pairs(int(row)) for row in rows])

    def conversation(self, number: int) -> Conversation:
        """Conversation `number` up to its last answer, and that answer."""
        ids = self._tokens[number].tolist()
        begin, end = self._answers[number][-2:].tolist()
        return Conversation(bytes(self._ids[number]).decode(), ids[:begin], ids[begin:end])

    @property
    def conversations(self) -> int:
        return len(self._tokens)

    def _places(self, document: int) -> int:
        length = int(self._tokens.offsets[document + 1] - self._tokens.offsets[document])
        return -(-length // self.block_size) * self.block_size

    def _placed(self, row: int) -> Iterator[tuple[int, int]]:
        """The documents of a row, each with its first index in it."""
        at = 0
        for document in self.documents(row):
            yield document, at
            at += self._places(document)

    def _row_pairs(self, row: int) -> Iterator[tuple[int, int, float]]:
        for document, at in self._placed(row):
            pairs, weights = self._pairs[document].reshape(-1, 2), self._weights[document]
            for (effect, cause), weight in zip(pairs.tolist(), weights.tolist(), strict=True):
                yield effect + at, cause + at, weight
