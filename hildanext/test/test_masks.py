"""The attention rule against the vectors of its sources, worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext import masks
from hildanext.masks import TokenRows


def picture(mask: torch.Tensor) -> str:
    return " ".join("".join(str(int(cell)) for cell in row) for row in mask.long())


def one_document(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]


def test_two_blocks_of_two_have_the_mask_written_by_hand():
    mask = masks.doubled(*one_document(4), 2)[0]
    assert picture(mask) == "11000000 11000000 00111100 00111100 00001100 00001100 00001111 00001111"
    assert int(mask.sum()) == 24 == 4**2 + 4 * 2


def test_block_size_one_sees_what_an_autoregressive_model_sees():
    mask = masks.doubled(*one_document(4), 1)[0]
    assert picture(mask) == "10000000 01001000 00101100 00011110 00001000 00001100 00001110 00001111"
    assert int(mask.sum()) == 20


def test_one_block_is_the_whole_sequence():
    mask = masks.doubled(*one_document(4), 4)[0]
    assert picture(mask) == " ".join(["11110000"] * 4 + ["00001111"] * 4)
    assert torch.equal(mask[:4, :4], masks.same_document(torch.zeros(1, 4, dtype=torch.long))[0])


def test_blocks_are_counted_from_the_start_of_each_document():
    document = torch.tensor([[0, 0, 0, 1, 1, 1]])
    position = torch.tensor([[0, 1, 2, 0, 1, 2]])
    mask = masks.doubled(document, position, 2)[0]
    noisy = "110000000000 110000000000 001000110000 000110000000 000110000000 000001000110"
    clean = "000000110000 000000110000 000000111000 000000000110 000000000110 000000000111"
    assert picture(mask) == f"{noisy} {clean}"


def test_paper_grid_with_aligned_documents():
    """Aligned documents 0000 11, whose row 4 and 5 see their own block alone."""
    document = torch.tensor([[0, 0, 0, 0, 1, 1]])
    position = torch.tensor([[0, 1, 2, 3, 0, 1]])
    mask = masks.doubled(document, position, 2)[0]
    assert int(mask.sum()) == 32
    assert picture(mask[4:6]) == "000011000000 000011000000"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4))
def test_count_of_visible_cells(blocks: int, block_size: int):
    mask = masks.doubled(*one_document(blocks * block_size), block_size)
    assert int(mask.sum()) == block_size**2 * (blocks**2 + blocks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_rule_equals_brute_force(lengths: list[int], block: int, padding: int, token_causal: bool):
    clean_mask = "token_causal" if token_causal else "block_causal"
    document = [number for number, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    position = [index for length in lengths for index in range(length)] + [0] * padding
    mask = masks.doubled(torch.tensor([document]), torch.tensor([position]), block, clean_mask)[0]
    size = len(document)
    for q in range(2 * size):
        for k in range(2 * size):
            p, r = q % size, k % size
            same = document[p] == document[r] and document[p] >= 0
            q_block, k_block = position[p] // block, position[r] // block
            clean_sees = q_block >= k_block if not token_causal else position[p] >= position[r]
            allowed = same and (
                (q < size and k < size and q_block == k_block)
                or (q < size <= k and q_block > k_block)
                or (q >= size and k >= size and clean_sees)
            )
            allowed = allowed or (document[p] < 0 and q == k)
            assert bool(mask[q, k]) == allowed, (q, k)


def test_no_row_is_empty_with_padding():
    document = torch.tensor([[0, 0, 0, -1, -1]])
    position = torch.tensor([[0, 1, 2, 0, 0]])
    for clean_mask in ("block_causal", "token_causal"):
        assert masks.doubled(document, position, 2, clean_mask).any(-1).all()
    assert masks.same_document(document).any(-1).all()


@pytest.mark.parametrize("clean_mask", ["block_causal", "token_causal"])
def test_inference_is_the_noisy_rows_of_training(clean_mask: str):
    """Block k beside the committed blocks before it: the same rows as in the doubled mask."""
    length, block, k = 12, 4, 2
    document, position = one_document(length)
    training = masks.doubled(document, position, block, clean_mask)[0]
    here = slice(k * block, (k + 1) * block)
    zeros = torch.zeros(1, block, dtype=torch.long)
    active = TokenRows(zeros, position[:, here], torch.ones(1, block, dtype=torch.bool))
    clean = TokenRows(document[:, : k * block], position[:, : k * block], torch.zeros(1, k * block, dtype=torch.bool))
    assert torch.equal(
        masks.may_attend(active, clean, block, clean_mask)[0], training[here, length : length + k * block]
    )
    assert torch.equal(masks.may_attend(active, active, block, clean_mask)[0], training[here, here])
