"""Documents to packed shards (`prepare`), and packed shards to batches (`PackedDataset`, `batches`)."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from hildanext.core.config import config, plain
from hildanext.core.errors import ConfigError, DataError
from hildanext.core.registry import build
from hildanext.data.batch import Batch, RowDataset
from hildanext.data.packing import Encoder, Layout, Piece, RowOrder, ShardWriter, WholeLayout, tokenizer_hash
from hildanext.data.packing.folder import (
    ANSWERS,
    FORMAT,
    Shard,
    open_manifests,
    open_shards,
    part_name,
    read_manifest,
    refuse_other_parts,
    refuse_other_settings,
)
from hildanext.data.packing.shards import drop_journal, locked
from hildanext.data.sources import SOURCES, Cursor, Report, Source

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1 << 20
"""A tokenizer call takes at most this much, so that memory does not grow with the corpus."""

Packing = Literal["documents", "best_fit", "stream"]


class Answered(NamedTuple):
    """A prompt and its answer as tokens, of which the answer alone is learnt; or why there is none."""

    tokens: Sequence[int]
    start: int
    """Tokens of the prompt."""
    where: str
    refused: str = ""


TokenDocuments = Iterable[Sequence[int]] | Callable[[int], Iterable[Sequence[int]]]
"""Documents that are tokens already; a function is called with the number of documents to skip."""
AnsweredDocuments = Callable[[int], Iterable[Answered]]
"""The same of answers."""
OnProgress = Callable[[int, int], None]
"""Called with the numbers of new documents and new tokens."""
OnShare = Callable[[float], None]
"""Called with the share of the input that is read, wherever that is known; at once with where it begins."""


@config
class PrepareConfig:
    """What `prepare` reads and how it writes it."""

    source: dict[str, Any]
    """`{"name": one of SOURCES, config}`; for token documents, any mapping that says what they are."""
    out: str
    shard_tokens: int = Field(default=1 << 24, ge=1)
    """A shard is closed by the document that reaches this; memory holds one shard."""
    add_bos: bool = True
    add_eos: bool = True
    bos_token: str | None = None
    """The token that opens a document, where the tokenizer names none or another is wanted."""
    eos_token: str | None = None
    special_tokens_in_text: bool = False
    """Whether a special token's name inside a text becomes that token; off, it is text like any other."""


PrepareKnobs = PrepareConfig
"""The name under which it was promised."""


class _Read(NamedTuple):
    ids: Sequence[int]
    where: str
    cursor: Cursor
    report: dict[str, Any]
    start: int = 0


def prepare(
    settings: PrepareConfig,
    tokenizer: Any,
    shard: tuple[int, int] = (0, 1),
    documents: TokenDocuments | None = None,
    progress: OnProgress | None = None,
    answers: AnsweredDocuments | None = None,
    reached: OnShare | None = None,
    total: int | None = None,
) -> dict[str, Any]:
    """Tokenise a source into shards and return their manifest. A folder that is whole is returned as it is.

    `shard` (i, n) does part i of n into `out/part-i-of-n`. `documents` replaces the source's texts by token
    documents (BOS and EOS are added to those as well, unless they are there), `answers` by prompts and answers, to
    which nothing is added; `total` says how many there are. Killed at any instant, the same call goes on after the
    last whole shard and ends with the same bytes.

    Raises `DataError` when nothing could be read, for an id outside the vocabulary, and for a folder begun
    with another tokenizer or other settings.
    """
    part, parts = shard
    if not 0 <= part < parts:
        raise ConfigError(f"part {part} of {parts}", "parts are counted from 0: --shard 0/4 to --shard 3/4")
    as_tokens = documents is not None or answers is not None
    source = None if as_tokens else build("source", SOURCES, settings.source)
    encoder = _encoder(settings, tokenizer)
    folder = Path(settings.out) if parts == 1 else Path(settings.out) / part_name(part, parts)
    identity = {"tokenizer": tokenizer_hash(tokenizer), **_identity(settings, encoder, source, shard)}
    if answers is not None:
        identity[ANSWERS] = True
    refuse_other_parts(Path(settings.out), part, parts, identity)
    with locked(folder):
        manifest = read_manifest(folder)
        if manifest is not None:
            refuse_other_settings(folder, manifest["settings"], identity)
            drop_journal(folder)
            return manifest
        writer = ShardWriter(folder, identity, settings.shard_tokens, encoder.vocab_size)
        done = writer.resume()
        report = Report(**done.report) if done is not None else Report()
        cursor = Cursor(*done.cursor) if done is not None else Cursor()
        if answers is not None:
            read = _read_answers(answers, report, shard, cursor)
        elif documents is not None:
            read = _read_tokens(documents, encoder, report, shard, cursor)
        else:
            assert source is not None
            read = _read_texts(source, encoder, report, shard, cursor)
        if reached is not None:
            read = _telling(read, reached, _shares(source, total), cursor)
        _write(read, writer, progress)
        _refuse_nothing(source, writer, report, settings)
        manifest = _manifest(writer, encoder, report, identity)
        writer.finish(manifest)
        return manifest


def _write(read: Iterator[_Read], writer: ShardWriter, progress: OnProgress | None) -> None:
    item = None
    for item in read:
        if writer.add(item.ids, item.where, item.start):
            writer.close_shard(item.cursor, item.report)
        if progress is not None:
            progress(1, len(item.ids))
    if item is not None:
        writer.close_shard(item.cursor, item.report)


def _shares(source: Source | None, total: int | None) -> Callable[[Cursor], float | None]:
    if source is not None:
        return source.share_before()
    return lambda cursor: cursor.record / total if total else None


def _telling(
    read: Iterator[_Read], reached: OnShare, shares: Callable[[Cursor], float | None], start: Cursor
) -> Iterator[_Read]:
    """The same, and the share of the input before each."""
    for cursor, item in chain([(start, None)], ((item.cursor, item) for item in read)):
        share = shares(cursor)
        if share is not None:
            reached(share)
        if item is not None:
            yield item


def _encoder(settings: PrepareConfig, tokenizer: Any) -> Encoder:
    return Encoder(
        tokenizer,
        settings.add_bos,
        settings.add_eos,
        settings.bos_token,
        settings.eos_token,
        settings.special_tokens_in_text,
    )


def _read_texts(
    source: Source, encoder: Encoder, report: Report, shard: tuple[int, int], start: Cursor
) -> Iterator[_Read]:
    held: list[tuple[str, str, Cursor, dict[str, Any]]] = []
    characters = 0
    for document, cursor in source.read(report, shard[0], shard[1], start):
        held.append((document.text, document.id, cursor, report.snapshot()))
        characters += len(document.text)
        if len(held) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield from _encoded(encoder, held)
            held, characters = [], 0
    yield from _encoded(encoder, held)


def _encoded(encoder: Encoder, held: list[tuple[str, str, Cursor, dict[str, Any]]]) -> Iterator[_Read]:
    for ids, (_, name, cursor, report) in zip(encoder.texts([text for text, *_ in held]), held, strict=True):
        yield _Read(ids, f"document {name!r}", cursor, report)


def _read_tokens(
    documents: TokenDocuments, encoder: Encoder, report: Report, shard: tuple[int, int], start: Cursor
) -> Iterator[_Read]:
    rest = documents(start.record) if callable(documents) else islice(documents, start.record, None)
    for record, ids in enumerate(rest, start=start.record):
        if record % shard[1] != shard[0]:
            continue
        if len(ids) == 0:
            report.bad("empty document", f"document {record + 1}")
            continue
        yield _Read(encoder.framed(list(ids)), f"document {record + 1}", Cursor(0, 0, record + 1), report.snapshot())


def _read_answers(answers: AnsweredDocuments, report: Report, shard: tuple[int, int], start: Cursor) -> Iterator[_Read]:
    for record, answer in enumerate(answers(start.record), start=start.record):
        if record % shard[1] != shard[0]:
            continue
        if answer.refused:
            report.bad(answer.refused, answer.where)
            continue
        yield _Read(answer.tokens, answer.where, Cursor(0, 0, record + 1), report.snapshot(), answer.start)


def _identity(
    settings: PrepareConfig, encoder: Encoder, source: Source | None, shard: tuple[int, int]
) -> dict[str, Any]:
    """What makes two runs the same run. Paths stay out, so that a moved folder is still the same data."""
    section = settings.source if source is None else {"name": settings.source["name"], **plain(source)}
    section = {key: value for key, value in section.items() if key != "path"}
    inputs = source.fingerprint() if source is not None else []
    return {
        "source": section,
        "input files": hashlib.sha256(json.dumps(inputs).encode()).hexdigest(),
        "vocab_size": encoder.vocab_size,
        "bos_id": encoder.bos,
        "eos_id": encoder.eos,
        "shard_tokens": settings.shard_tokens,
        "special_tokens_in_text": settings.special_tokens_in_text,
        "shard": list(shard),
    }


def _manifest(writer: ShardWriter, encoder: Encoder, report: Report, identity: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": identity,
        "tokenizer_hash": identity["tokenizer"],
        "vocab_size": encoder.vocab_size,
        "bos_id": encoder.bos,
        "eos_id": encoder.eos,
        "pad_id": encoder.pad,
        "tokens": sum(entry["tokens"] for entry in writer.shards),
        "documents": sum(entry["documents"] for entry in writer.shards),
        "refused": report.snapshot(),
        "shards": writer.shards,
    }


def _refuse_nothing(source: Source | None, writer: ShardWriter, report: Report, settings: PrepareConfig) -> None:
    """Raise `DataError` where the input gave nothing, or its only file broke off."""
    broke_off = source is not None and source.whole() == 1 and "broken gzip" in report.counts
    if not writer.empty and not broke_off:
        return
    place = settings.source.get("path", settings.source.get("dataset", settings.source.get("name", "the documents")))
    if broke_off:
        raise DataError(f"{place!r} is a broken or truncated gzip file", "get the file again (gzip -t tests it)")
    hints = {
        "binary file": "give text, JSONL or gzip of these",
        "broken gzip": "get the files again (gzip -t tests them)",
        "broken JSON": "is it plain text? then use the source 'text'",
        "bad UTF-8": "save it as UTF-8 (iconv -t UTF-8 converts)",
    }
    hint = next((hint for kind, hint in hints.items() if kind in report.counts), "give a corpus with at least one text")
    if any(kind.startswith("longer than") for kind in report.counts):
        hint = "split the lines, or raise the source's max_line_bytes"
    if any(kind.startswith("missing") for kind in report.counts):
        hint = "name the field that holds the text: text_field"
    raise DataError(f"no document could be read from {place!r} ({report.summary()})", hint)


class PackedDataset:
    """Rows of `sequence_length` tokens over the memory-mapped shards of a folder.

    Packing "documents" lays one document after another, each padded with EOS to a multiple of `pad_to_block`
    (same document, maskable); one that does not fit is cut at the row's end, and its rest opens the next row as a
    new document at position 0. What is left of a row is padding (document -1). Every real token is in exactly one row.

    Packing "best_fit" leaves documents whole: each goes into the fullest row that has room for it, and only one that is
    longer than a row is cut.

    Packing "stream" cuts the token stream into windows, each one document. Of prompts with answers (`Answered`) only
    the answers are maskable; they are not laid as a stream.

    `verify` re-hashes the shards on opening; `tokenizer`, where given, must be the one that made them. Raises
    `DataError` for a folder that is not whole or was tampered with, and for ids outside its vocabulary.
    """

    def __init__(
        self,
        folder: str | Path,
        sequence_length: int,
        packing: Packing = "documents",
        pad_to_block: int | None = None,
        verify: bool = False,
        tokenizer: Any = None,
    ) -> None:
        block = pad_to_block if pad_to_block is not None else 1
        if sequence_length < 1 or not 1 <= block <= sequence_length:
            raise ConfigError(
                f"sequence_length {sequence_length}, pad_to_block {pad_to_block}", "a row must hold at least one block"
            )
        self.sequence_length, self.packing, self.pad_to_block = sequence_length, packing, pad_to_block
        self.manifests = open_manifests(Path(folder))
        manifest = self.manifests[0][1]
        if tokenizer is not None and tokenizer_hash(tokenizer) != manifest["tokenizer_hash"]:
            raise DataError(
                f"{str(folder)!r} was prepared with another tokenizer", "prepare the text again with this model's"
            )
        self.vocab_size: int = manifest["vocab_size"]
        self.bos_id: int | None = manifest["bos_id"]
        self.pad_id: int = manifest["pad_id"]
        self._maps = [shard for place, manifest in self.manifests for shard in open_shards(place, manifest, verify)]
        self.tokens = sum(manifest["tokens"] for _, manifest in self.manifests)
        if not self.tokens:
            raise DataError(f"{str(folder)!r} holds no tokens", "prepare it again")
        self._answers = bool(manifest["settings"].get(ANSWERS))
        if packing == "stream" and self._answers:
            raise ConfigError(f"{str(folder)!r} holds answers to prompts", "set data.packing to best_fit or documents")
        self._block = block

    @cached_property
    def _layout(self) -> Layout | WholeLayout:
        if self.packing == "stream":  # the layout's "documents" are then the shards
            lengths = np.array([len(shard.tokens) for shard in self._maps], dtype=np.int64)
            return Layout(lengths, self.sequence_length, 1)
        lengths = np.concatenate([np.diff(shard.offsets.astype(np.int64)) for shard in self._maps])
        if int(lengths.min()) < 1 or int(lengths.sum()) != self.tokens:
            raise DataError("the document offsets do not fit the tokens", "the shards were damaged; prepare them again")
        kind = WholeLayout if self.packing == "best_fit" else Layout
        return kind(lengths, self.sequence_length, self._block)

    @cached_property
    def _first_document(self) -> np.ndarray:
        return np.cumsum([0] + [len(shard.offsets) - 1 for shard in self._maps])

    def __len__(self) -> int:
        return len(self._layout)

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document, as they were prepared."""
        for shard in self._maps:
            for begin, end in pairwise(shard.offsets.tolist()):
                yield shard.tokens[begin:end]

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Row `index` as int64 arrays `tokens`, `document`, `position` and a bool array `maskable`, each [seq]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = np.full(self.sequence_length, self.pad_id, dtype=np.int64)
        document = np.full(self.sequence_length, -1, dtype=np.int64)
        position = np.zeros(self.sequence_length, dtype=np.int64)
        given = np.zeros(self.sequence_length, dtype=bool)
        at = 0
        for number, piece in enumerate(self._layout.row(index)):
            tokens[at : at + piece.end - piece.begin] = self._tokens(piece)
            stream = self.packing == "stream"
            document[at : at + piece.length] = 0 if stream else number
            position[at : at + piece.length] = np.arange(piece.length) + (at if stream else 0)
            given[at : at + min(max(self._start(piece) - piece.begin, 0), piece.length)] = True
            until = at + piece.end - piece.begin
            if self._answers and tokens[until - 1] != self.pad_id:
                given[until : at + piece.length] = True  # an answer that was cut short: nothing ends here
            at += piece.length
        if int(tokens.max()) >= self.vocab_size:
            raise DataError(
                f"row {index} holds token id {int(tokens.max())}, outside the vocabulary of {self.vocab_size}",
                "the shards were damaged; prepare them again",
            )
        maskable = (document >= 0) & ~given
        if self.bos_id is not None:
            maskable &= (position != 0) | (tokens != self.bos_id)
        return {"tokens": tokens, "document": document, "position": position, "maskable": maskable}

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given rows, stacked."""
        arrays = [self.row(int(index)) for index in rows]
        return Batch(**{name: torch.from_numpy(np.stack([row[name] for row in arrays])) for name in arrays[0]})

    def _tokens(self, piece: Piece) -> np.ndarray:
        if self.packing == "stream":
            return self._maps[piece.document].tokens[piece.begin : piece.end]
        shard, number = self._place(piece)
        begin = int(shard.offsets[number])
        return shard.tokens[begin + piece.begin : begin + piece.end]

    def _start(self, piece: Piece) -> int:
        """Tokens of the piece's document that are given and not learnt."""
        if self.packing == "stream":
            return 0
        shard, number = self._place(piece)
        return 0 if shard.starts is None else int(shard.starts[number])

    def _place(self, piece: Piece) -> tuple[Shard, int]:
        """The shard of a piece's document, and the document's number in it."""
        shard = int(np.searchsorted(self._first_document, piece.document, side="right")) - 1
        return self._maps[shard], piece.document - int(self._first_document[shard])


def batches(dataset: RowDataset, batch_size: int, seed: int, start: int = 0, step: int = 1) -> Iterator[Batch]:
    """Endless shuffled batches `start`, `start + step`, ...; each epoch holds every row once.

    Batch k is a pure function of (seed, k, batch_size), so any process can begin anywhere: rank r of n takes
    `start=r, step=n`.
    """
    order, number = RowOrder(len(dataset), batch_size, seed), start
    while True:
        yield dataset.batch(order.batch(number))
        number += step
