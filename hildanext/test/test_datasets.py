"""Rows hold every token once on whole blocks; batches are a pure function of (seed, number, size)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from corpus import files_of, small_tokenizer
from hildanext.core.errors import ConfigError, DataError
from hildanext.data.batch import Batch
from hildanext.data.packing import row_order, tokenizer_hash
from hildanext.datasets import PackedDataset, PrepareConfig, batches, prepare

BOS, EOS = 0, 1
MakeFolder = Callable[[Sequence[Sequence[int]]], Path]


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Prepares token documents into a fresh folder, by default in shards of about 50 tokens."""

    def make(documents: Sequence[Sequence[int]], shard_tokens: int = 50, edges: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("shards")
        knobs = PrepareConfig(
            source={"name": "test"}, out=str(folder), shard_tokens=shard_tokens, add_bos=edges, add_eos=edges
        )
        prepare(knobs, small_tokenizer(), documents=documents)
        return folder

    return make


def all_rows(dataset: PackedDataset) -> Batch:
    return dataset.batch(range(len(dataset)))


# Ids from 2 up, each used once in the corpus, so that a token that is lost or doubled is seen.
lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) < 290)
grids = st.tuples(st.integers(1, 8), st.integers(1, 6), st.integers(0, 7))  # block, blocks a row, rest of a row


def numbered(lengths: Sequence[int]) -> list[list[int]]:
    ends = np.cumsum(lengths)
    return [list(range(2 + end - length, 2 + end)) for end, length in zip(ends.tolist(), lengths, strict=True)]


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of_documents, grid=grids, edges=st.booleans())
def test_document_packing_keeps_its_promises(
    make_folder: MakeFolder, lengths: list[int], grid: tuple[int, int, int], edges: bool
) -> None:
    block, blocks, rest = grid
    rest = min(rest, block - 1)
    documents = numbered(lengths)
    dataset = PackedDataset(make_folder(documents, edges=edges), block * blocks + rest, "documents", block)
    rows = all_rows(dataset)
    inside = rows.document >= 0

    real = rows.tokens[rows.tokens >= 2].tolist()
    assert sorted(real) == sorted(token for document in documents for token in document), "each token exactly once"
    assert real == sorted(real), "in the order of the corpus"

    assert (
        not rows.maskable[~inside].any() and (rows.tokens[~inside] == EOS).all() and (rows.position[~inside] == 0).all()
    )
    last = rows.document[:-1]
    assert (last[:, : block * blocks] >= 0).all() and (last[:, block * blocks :] == -1).all(), (
        "only the last row is short"
    )
    for tokens, document, position, maskable in zip(
        rows.tokens, rows.document, rows.position, rows.maskable, strict=True
    ):
        for number in range(int(document.max()) + 1):
            here = document == number
            length = int(here.sum())
            assert length % block == 0 and length > 0, "whole blocks"
            assert position[here].tolist() == list(range(length)), "positions restart and count up"
            own = tokens[here].tolist()
            padding = [index for index, token in enumerate(own) if token == EOS]
            assert padding == list(range(length - len(padding), length)), "EOS and padding only at the end"
            assert len(padding) <= block - 1 + edges
            hidden = [not can for can in maskable[here].tolist()]
            assert hidden == [index == 0 and own[0] == BOS for index in range(length)], "all but the BOS is maskable"
            assert (own[0] == BOS) == (
                edges and own[1:2] != [] and (own[1] - 2) in np.cumsum([0, *lengths])
            ) or block == 1


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of_documents, sequence_length=st.integers(1, 50))
def test_stream_packing_is_the_token_stream_in_windows(
    make_folder: MakeFolder, lengths: list[int], sequence_length: int
) -> None:
    documents = numbered(lengths)
    dataset = PackedDataset(make_folder(documents), sequence_length, "stream")
    stream = [token for document in documents for token in [BOS, *document, EOS]]
    rows = all_rows(dataset)
    inside = rows.document == 0
    assert rows.tokens[inside].tolist() == stream
    assert inside.sum() == len(stream) and inside[:-1].all()
    assert set(rows.document.flatten().tolist()) <= {0, -1}
    places = torch.arange(sequence_length).expand_as(rows.position)
    assert (rows.position[inside] == places[inside]).all()
    assert rows.maskable.equal(inside & ~((rows.position == 0) & (rows.tokens == BOS)))


def test_a_layout_written_out_by_hand(make_folder: MakeFolder) -> None:
    """Documents of 3 and 7 tokens with BOS and EOS are 5 and 9 long; blocks of 4, rows of 10 (two blocks and 2 left).

    Row 0: [B 2 3 4 | E p p p] -- the first document fills both blocks.
    Row 1: [B 5 6 7 | 8 9 10 11], row 2: [E p p p] opens a new document with the rest of the second.
    """
    dataset = PackedDataset(make_folder([[2, 3, 4], [5, 6, 7, 8, 9, 10, 11]]), 10, "documents", 4)
    rows = all_rows(dataset)
    assert rows.tokens.tolist() == [
        [0, 2, 3, 4, 1, 1, 1, 1, 1, 1],
        [0, 5, 6, 7, 8, 9, 10, 11, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
    assert rows.document.tolist() == [[0] * 8 + [-1] * 2, [0] * 8 + [-1] * 2, [0] * 4 + [-1] * 6]
    assert rows.position.tolist() == [[*range(8), 0, 0], [*range(8), 0, 0], [0, 1, 2, 3] + [0] * 6]
    assert rows.maskable.tolist() == [
        [False] + [True] * 7 + [False] * 2,
        [False] + [True] * 7 + [False] * 2,
        [True] * 4 + [False] * 6,
    ]


@pytest.fixture(scope="module")
def dataset(make_folder: MakeFolder) -> PackedDataset:
    return PackedDataset(
        make_folder([[2 + number % 290] * (number % 13 + 1) for number in range(60)]), 16, "documents", 4
    )


def same(one: Batch, other: Batch) -> bool:
    return all(
        getattr(one, name).equal(getattr(other, name)) for name in ("tokens", "document", "position", "maskable")
    )


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_batches_from_any_start_are_the_batches_from_zero(dataset: PackedDataset, batch_size: int) -> None:
    expected = list(islice(batches(dataset, batch_size, seed=3), 30))
    for start in (0, 1, 11, 29):
        for one, other in zip(batches(dataset, batch_size, seed=3, start=start), expected[start:], strict=False):
            assert same(one, other)


def test_ranks_that_step_together_see_what_one_process_sees(dataset: PackedDataset) -> None:
    alone = list(islice(batches(dataset, 3, seed=1), 12))
    for rank in range(2):
        mine = list(islice(batches(dataset, 3, seed=1, start=rank, step=2), 6))
        assert all(same(one, other) for one, other in zip(mine, alone[rank::2], strict=True))


def test_an_epoch_holds_every_row_once_and_the_next_one_in_another_order(dataset: PackedDataset) -> None:
    count = len(dataset)
    assert count > 10
    rows = torch.cat([batch.tokens for batch in islice(batches(dataset, 1, seed=5), 2 * count)])
    everything = sorted(all_rows(dataset).tokens.tolist())
    first, second = rows[:count].tolist(), rows[count:].tolist()
    assert sorted(first) == everything and sorted(second) == everything
    assert first != second and first != all_rows(dataset).tokens.tolist()


def test_another_seed_is_another_order(dataset: PackedDataset) -> None:
    assert not same(next(batches(dataset, 8, seed=0)), next(batches(dataset, 8, seed=1)))


def test_the_order_of_an_epoch_is_frozen() -> None:
    """A change here would change every run that is resumed with a newer version."""
    assert row_order(10, seed=7, epoch=2).tolist() == ORDER_OF_7_2


ORDER_OF_7_2 = [8, 6, 4, 0, 5, 7, 1, 3, 9, 2]


def test_another_process_draws_the_same_batches(dataset: PackedDataset) -> None:
    folder = dataset.manifests[0][0]
    program = (
        "import sys, json; from itertools import islice; from hildanext.datasets import PackedDataset, batches;"
        "d = PackedDataset(sys.argv[1], 16, 'documents', 4);"
        "print(json.dumps([b.tokens.tolist() for b in islice(batches(d, 5, seed=9, start=4), 3)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    here = [batch.tokens.tolist() for batch in islice(batches(dataset, 5, seed=9, start=4), 3)]
    assert json.loads(done.stdout) == here


def test_a_batch_has_the_promised_types_and_moves(dataset: PackedDataset) -> None:
    batch = next(batches(dataset, 2, seed=0)).to("cpu")
    assert batch.tokens.shape == (2, 16)
    kinds = [getattr(batch, name).dtype for name in ("tokens", "document", "position", "maskable")]
    assert kinds == [torch.int64, torch.int64, torch.int64, torch.bool]


def test_parts_are_opened_as_one_corpus(tmp_path: Path) -> None:
    documents = numbered([5, 9, 3, 14, 8])
    for part in (0, 1):
        prepare(
            PrepareConfig(source={"name": "test"}, out=str(tmp_path)), small_tokenizer(), (part, 2), documents=documents
        )
        if part == 0:
            with pytest.raises(DataError, match="1 of 2 finished parts"):
                PackedDataset(tmp_path, 16)
    tokens = all_rows(PackedDataset(tmp_path, 16)).tokens
    assert sorted(tokens[tokens >= 2].tolist()) == list(range(2, 2 + 39))


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished shards.*hildanext prepare"):
        PackedDataset(tmp_path, 16)


@pytest.mark.parametrize("row", [0, -1], ids=["before", "beyond"])
def test_a_row_that_does_not_exist_is_an_index_error(dataset: PackedDataset, row: int) -> None:
    with pytest.raises(IndexError):
        dataset.row(len(dataset) if row == 0 else -1)


@pytest.mark.parametrize(("length", "block"), [(0, None), (8, 16), (8, 0)])
def test_a_row_that_cannot_hold_a_block_is_refused(dataset: PackedDataset, length: int, block: int | None) -> None:
    with pytest.raises(ConfigError, match="at least one block"):
        PackedDataset(dataset.manifests[0][0], length, "documents", block)


def test_damage_is_noticed_by_size_by_hash_and_by_vocabulary(make_folder: MakeFolder) -> None:
    folder = make_folder(numbered([30, 30]), 1000)
    shard = folder / "shard-00000.tokens.u32"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(DataError, match="missing or not of"):
        PackedDataset(folder, 16)
    shard.write_bytes(whole[:40] + np.uint32(2**31).tobytes() + whole[44:])
    with pytest.raises(DataError, match="hash differs"):
        PackedDataset(folder, 16, verify=True)
    dataset = PackedDataset(folder, 16)
    with pytest.raises(DataError, match="token id 2147483648, outside the vocabulary of 300"):
        dataset.row(0)
    shard.write_bytes(whole)
    PackedDataset(folder, 16, verify=True).row(0)


def test_data_of_another_tokenizer_is_refused_where_the_tokenizer_is_given(make_folder: MakeFolder) -> None:
    folder = make_folder([[2, 3, 4]])
    PackedDataset(folder, 16, tokenizer=small_tokenizer())
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        PackedDataset(folder, 16, tokenizer=small_tokenizer(310))


def test_a_mask_token_leaves_the_tokenizer_s_hash_as_it_was() -> None:
    """Also where the vocabulary holds the word "None", which a tokenizer without a mask must not take for its mask."""
    hashes = []
    for words in (["<s>", "</s>", "None", "word"], ["<s>", "</s>", "word"]):
        backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="word"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        before = tokenizer_hash(tokenizer)
        assert tokenizer.mask_token is None and tokenizer.add_special_tokens({"mask_token": "<|mask|>"}) == 1
        assert tokenizer_hash(tokenizer) == before
        hashes.append(before)
    assert hashes[0] != hashes[1], "the word itself counts"


def test_offsets_that_were_damaged_are_noticed(make_folder: MakeFolder) -> None:
    folder = make_folder(numbered([30, 30]), 1000)
    file = folder / "shard-00000.offsets.u64"
    offsets = np.fromfile(file, "<u8")
    offsets[1] = 10_000
    offsets.tofile(file)
    with pytest.raises(DataError, match="offsets"):
        PackedDataset(folder, 16).row(0)


def test_the_manifest_follows_the_data(make_folder: MakeFolder) -> None:
    one, again, other = (make_folder(numbered(lengths)) for lengths in ([5, 6], [5, 6], [6, 5]))
    assert files_of(one) == files_of(again)
    first, same, differs = ([manifest for _, manifest in PackedDataset(f, 8).manifests] for f in (one, again, other))
    assert first == same != differs


@pytest.mark.parametrize("block", [1, 4])
def test_best_fit_leaves_documents_whole_and_loses_no_token(
    block: int, tmp_path: Path, make_folder: MakeFolder
) -> None:
    lengths = [9, 3, 30, 5, 16, 1, 7, 12]
    documents = [[2 + (number + at) % 50 for at in range(length)] for number, length in enumerate(lengths)]
    folder = make_folder(documents, edges=False)
    data = PackedDataset(folder, 16, "best_fit", block)
    pieces = []
    for row in map(data.row, range(len(data))):
        for number in range(int(row["document"].max()) + 1):
            here = row["document"] == number
            assert row["position"][here].tolist() == list(range(here.sum()))
            pieces.append(row["tokens"][here].tolist())
    padded = [piece + [data.pad_id] * (-len(piece) % block) for piece in (
        *(document for document in documents if len(document) <= 16), documents[2][:16], documents[2][16:],
    )]  # fmt: skip
    assert sorted(pieces) == sorted(padded)
    assert len(data) <= 7 if block == 4 else len(data) == 6, "83 tokens fill six rows of 16"


def test_a_million_documents_are_laid_out_quickly(tmp_path: Path, make_folder: MakeFolder) -> None:
    """The index of 1,000,000 documents is one vectorised pass: far below a second; a loop would take many."""
    from time import perf_counter

    from hildanext.data.packing import Layout

    lengths = np.random.default_rng(0).integers(1, 400, 1_000_000)
    begun = perf_counter()
    layout = Layout(lengths, 256, 32)
    for index in range(0, len(layout), len(layout) // 200):
        layout.row(index)
    assert perf_counter() - begun < 2
