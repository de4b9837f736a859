"""Which tokens of a batch are padding: the odd ends of documents."""

from pathlib import Path

import pytest
import torch

from hildanext.data.batch import padding_tokens
from hildanext.datasets import PackedDataset, PrepareConfig, prepare
from small_models import small_tokenizer

E = 1
"""The end of text, with which last blocks are filled."""


@pytest.mark.parametrize(
    ("tokens", "document", "padding"),
    [
        pytest.param([5, 6, E, E], [0, 0, 0, 0], [3], id="the first end is the document's own"),
        pytest.param([E, E, E, E], [0, 0, 0, 0], [1, 2, 3], id="a document of a single EOS"),
        pytest.param([5, E, E, E, E, 6, E, E], [0, 0, 0, 0, 1, 1, 1, 1], [2, 3, 7], id="two documents"),
        pytest.param([E, 5, E, E], [0, 0, 0, 0], [3], id="BOS is EOS"),
        pytest.param([5, 6, E, E, E, E, E, E], [0] * 4 + [1] * 4, [3, 5, 6, 7], id="a cut document's rest is its EOS"),
        pytest.param([5, E, E, 6], [0, 0, 0, 0], [], id="two ends of text in the middle are text"),
        pytest.param([5, E, E, E], [0, 0, -1, -1], [], id="what fills the row is no document"),
        pytest.param([5, 6, 7, E], [0, 0, 0, 0], [], id="a block that the document's own end fills"),
        pytest.param([5, 6, 7, 8], [0, 0, 0, 0], [], id="no end at all"),
        pytest.param([E, E, 5, E], [0, 1, 1, 1], [], id="documents of one token"),
    ],
)
def test_padding_is_the_end_of_text_after_the_end_of_text(tokens, document, padding):
    padding_of = padding_tokens(
        torch.tensor([[9] * len(tokens), tokens]), torch.tensor([[0] * len(tokens), document]), E
    )
    assert not padding_of[0].any() and padding_of[1].nonzero()[:, 0].tolist() == padding


def test_a_row_begins_a_document_whatever_ended_the_row_before():
    tokens, document = torch.tensor([[5, E, E, E], [E, E, 5, E]]), torch.zeros(2, 4, dtype=torch.long)
    assert padding_tokens(tokens, document, E).tolist() == [[False, False, True, True], [False] * 4]


def test_without_a_pad_id_nothing_is_padding():
    assert not padding_tokens(torch.tensor([[5, E, E]]), torch.zeros(1, 3, dtype=torch.long), None).any()


@pytest.mark.parametrize("block", [2, 4, 8])
def test_what_is_left_is_what_was_prepared(tmp_path: Path, block: int):
    """Ends of text at the begin and inside of texts, and rows that cut documents; each document ends with EOS."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 7, (60,), generator=generator).tolist()
    documents = [[token for size in range(size) for token in (E, 5 + size)] + [E] for size in sizes]
    settings = PrepareConfig(source={"name": "list"}, out=str(tmp_path), add_bos=False, add_eos=False)
    prepare(settings, small_tokenizer(), documents=documents)
    dataset = PackedDataset(tmp_path, 16, "documents", block)
    batch = dataset.batch(range(len(dataset)))
    real = (batch.document >= 0) & ~padding_tokens(batch.tokens, batch.document, dataset.pad_id)
    assert int(real.sum()) == sum(len(document) for document in documents)
