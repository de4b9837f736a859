"""The mask token and the real ids."""

import pytest
import torch

from hildanext.models import DiffusionModel
from hildanext.models.attention.dense import MaskedAttention
from hildanext.models.card import Card, alignment_fields
from hildanext.models.start import start_conversion
from hildanext.tokenization import (
    grow_rows,
    initial_row,
    is_tied,
    load_tokenizer,
    never_ids,
    real_ids,
    resolve_mask_id,
    save_tokenizer,
)
from small_models import FAMILIES, small_causal, small_parent, small_tokenizer


def test_a_free_row_becomes_the_mask_and_nothing_is_resized():
    tokenizer, causal_lm = small_tokenizer(60), small_causal(rows=64)
    before = causal_lm.get_input_embeddings().weight.detach().clone()
    assert resolve_mask_id(tokenizer, causal_lm) == (60, 60)
    after = causal_lm.get_input_embeddings().weight
    assert after.shape[0] == 64 and is_tied(causal_lm)
    assert torch.equal(after[:60], before[:60]) and torch.equal(after[61:], before[61:])
    assert not torch.equal(after[60], before[60])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_embedding_grows_to_a_multiple_of_64_and_stays_tied(family, tied):
    tokenizer, causal_lm = small_tokenizer(64), small_causal(family, rows=64, tied=tied)
    heads = [causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight]
    before = [weight.detach().clone() for weight in heads]
    assert resolve_mask_id(tokenizer, causal_lm) == (64, 64)
    after = [causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight]
    for old, new in zip(before, after, strict=True):
        assert new.shape == (128, 32) and torch.equal(new[:64], old)
        assert torch.equal(new[64:], initial_row(old, 64))
    assert is_tied(causal_lm) == tied
    assert causal_lm.config.vocab_size == 128


def test_an_embedding_is_never_shrunk():
    causal_lm = small_causal(rows=192)
    for needed in (3, 64, 100, 192):
        assert grow_rows(causal_lm, needed) == 192
        assert causal_lm.get_input_embeddings().weight.shape[0] == 192
    assert grow_rows(causal_lm, 193) == 256


def test_asking_twice_changes_nothing():
    tokenizer, causal_lm = small_tokenizer(64), small_causal(rows=64)
    first = resolve_mask_id(tokenizer, causal_lm)
    with torch.no_grad():
        causal_lm.get_input_embeddings().weight[64] = 7.0  # a trained mask row must survive
    assert resolve_mask_id(tokenizer, causal_lm) == first
    assert causal_lm.get_input_embeddings().weight.shape[0] == 128
    assert (causal_lm.get_input_embeddings().weight[64] == 7.0).all()


def test_a_mask_that_the_tokenizer_already_has_is_kept():
    tokenizer, causal_lm = small_tokenizer(60), small_causal(rows=64)
    tokenizer.add_special_tokens({"mask_token": "w5"})
    before = causal_lm.get_input_embeddings().weight.detach().clone()
    mask_id, vocab_real = resolve_mask_id(tokenizer, causal_lm)
    assert tokenizer.convert_ids_to_tokens(mask_id) == "w5" and vocab_real == 60
    assert torch.equal(causal_lm.get_input_embeddings().weight, before)


def test_growing_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    resolve_mask_id(small_tokenizer(64), small_causal(rows=64))
    assert torch.equal(torch.rand(2), want)


def test_the_new_row_is_the_mean_plus_the_noise_that_the_rule_names():
    matrix = torch.randn(400, 64, generator=torch.Generator().manual_seed(1)) + 0.5
    row = initial_row(matrix)
    deviation = 0.02 * float(matrix.norm(dim=-1).mean()) / 64**0.5
    rest = (row - matrix.mean(0)) / deviation
    assert 0.7 < float(rest.std()) < 1.3
    assert torch.equal(row, initial_row(matrix))


def test_a_row_that_starts_too_small_is_flagged(caplog):
    initial_row(torch.randn(4000, 64, generator=torch.Generator().manual_seed(1)))
    assert "below 10 %" in caplog.text


def test_qwen3_takes_id_151669_and_keeps_its_rows():
    tokenizer = small_tokenizer(151_669)
    causal_lm = small_causal("qwen3", rows=151_936, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                             num_key_value_heads=1)  # fmt: skip
    assert len(tokenizer) == 151_669
    for _ in range(2):
        assert resolve_mask_id(tokenizer, causal_lm) == (151_669, 151_669)
        assert causal_lm.get_input_embeddings().weight.shape[0] == 151_936
        assert len(tokenizer) == 151_670
    card = Card(mask_id=151_669, vocab_rows=151_936, vocab_real=151_669, block_size=4, **alignment_fields("block"))
    logits = DiffusionModel(causal_lm, card).logits(torch.ones(8))
    assert logits[151_669:].eq(float("-inf")).all() and logits[:151_669].isfinite().all()


def test_the_mask_is_never_emitted_even_where_its_row_would_win(tmp_path):
    model, _ = start_conversion(small_parent(tmp_path / "parent"), "block", 4)
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head[model.card.mask_id] = 1000.0 * hidden.mean(0)
        raw = model.causal_lm.get_output_embeddings()(hidden).argmax(-1)
        shown = model.logits(hidden).argmax(-1)
    assert (raw == model.card.mask_id).any()
    assert (shown < model.card.vocab_real).all() and (shown != model.card.mask_id).all()


def test_a_zero_delta_is_the_base_and_learns_from_masked_positions_alone(make_model):
    base = make_model()
    model = DiffusionModel(base.causal_lm, base.card, mask_delta=True).double()
    for parameter in model.causal_lm.parameters():
        parameter.requires_grad_(False)
    tokens = torch.randint(0, 61, (2, 6), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6).expand(2, 6)
    attention = MaskedAttention(torch.ones(2, 6, 6, dtype=torch.bool))
    for masked in (False, True):
        if masked:
            tokens[0, 2] = base.card.mask_id
        hidden = model(model.embed(tokens), positions, attention)
        assert torch.equal(hidden, base(base.embed(tokens), positions, attention))
        model.mask_delta.grad = None
        hidden.square().sum().backward()
        assert bool(model.mask_delta.grad.any()) == masked


def test_the_delta_has_1024_values_at_hidden_size_1024():
    causal_lm = small_causal("qwen3", hidden_size=1024, intermediate_size=8, num_hidden_layers=1)
    card = Card(mask_id=60, vocab_rows=64, vocab_real=60, block_size=4, **alignment_fields("block"))
    model = DiffusionModel(causal_lm, card, mask_delta=True)
    assert model.mask_delta.numel() == 1024


def test_real_ids_hold_no_special_unused_or_mask():
    tokenizer, causal_lm = small_tokenizer(60, pad=True), small_causal(rows=64)
    mask_id, vocab_real = resolve_mask_id(tokenizer, causal_lm)
    card = Card(mask_id=mask_id, vocab_rows=64, vocab_real=vocab_real, block_size=4, never=(9,),
                **alignment_fields("block"))  # fmt: skip
    real = real_ids(card, tokenizer)
    assert real.shape == (64,) and real.dtype == torch.bool
    assert (~real).nonzero()[:, 0].tolist() == [0, 1, 2, 9, 60, 61, 62, 63]


def test_padding_of_its_own_is_never_emitted_but_padding_that_ends_texts_may_be():
    assert never_ids(small_tokenizer(pad=True), small_causal()) == (2,)
    assert never_ids(small_tokenizer(pad=False), small_causal()) == ()
    shared = small_tokenizer()
    shared.pad_token = "</s>"
    assert never_ids(shared, small_causal()) == ()


def test_a_saved_tokenizer_names_a_class_that_every_version_knows(tmp_path):
    tokenizer = small_tokenizer(60)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>", "additional_special_tokens": ["<call>"]})
    save_tokenizer(tokenizer, tmp_path)
    text = (tmp_path / "tokenizer_config.json").read_text()
    assert '"PreTrainedTokenizerFast"' in text and "TokenizersBackend" not in text
    again = load_tokenizer(tmp_path)
    assert again.mask_token_id == tokenizer.mask_token_id == 60
    assert again("<s> w1 <call> w2")["input_ids"] == tokenizer("<s> w1 <call> w2")["input_ids"]
