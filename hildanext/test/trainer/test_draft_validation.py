"""Tokens per forward of drafts on held-out rows: what is counted, and that it is what exact decoding keeps."""

import pytest
import torch

from hildanext.core.errors import DataError
from hildanext.corruption.anchors import draw_groups
from hildanext.corruption.noised_batches import clean_view
from hildanext.data.batch import Batch
from hildanext.decoding.exact.policy import ExactConfig
from hildanext.exact import generate_exact
from hildanext.inference import GenerationConfig
from hildanext.losses.draft import DraftLossConfig, DraftStep
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig
from hildanext.trainer.draft_validation import DraftValidation
from small_models import small_causal

PLACES = 3


@pytest.fixture
def drafter() -> Drafter:
    """Random adapters, scaled down until some of the drafts are right."""
    model = Drafter(small_causal("qwen3").double(), GatedLoraConfig(rank=4), PLACES).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def rows(texts: list[list[int]], prompt: int) -> Batch:
    tokens = torch.tensor(texts)
    position = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return Batch(tokens, torch.zeros_like(tokens), position.contiguous(), position >= prompt)


def test_on_the_parent_s_own_greedy_text_it_is_what_a_forward_of_exact_decoding_keeps(drafter: Drafter) -> None:
    """Behind every token of the text: the drafts that the parent confirms, counted by asking it token by token."""
    prompts = [[5, 9, 13], [40, 7, 21], [8, 8, 30]]
    settings = GenerationConfig(max_new_tokens=30, ignore_eos=True)
    written = generate_exact(drafter, None, prompts, ExactConfig(drafter="none"), settings)
    texts = [prompt + list(result.tokens) for prompt, result in zip(prompts, written, strict=True)]
    step = DraftStep(drafter, DraftLossConfig(), chunk=7)
    measured = DraftValidation([rows(texts, 3)], PLACES, 64)(step, 0)
    kept, count = torch.zeros(PLACES, dtype=torch.float64), 0
    for text in texts:
        view = clean_view(rows([text], 3), PLACES)
        groups = draw_groups(view.document, view.maskable, len(text), PLACES, None)
        hidden = step.read(view, groups)[0].view(len(text), PLACES, -1)
        for anchor in range(1, len(text) - PLACES - 1):  # from the last token but one of the prompt on
            drafts = drafter.logits(hidden[anchor]).argmax(-1).tolist()
            wanted = text[anchor + 2 : anchor + 2 + PLACES]
            length = next((at for at in range(PLACES) if drafts[at] != wanted[at]), PLACES)
            kept[:length] += 1
            count += 1
    assert measured["groups"] == count
    assert measured["acceptance"] == pytest.approx((kept / count).tolist())
    assert 1.0 < measured["tokens_per_forward"] == pytest.approx(1 + float((kept / count).sum()))
    assert measured["acceptance"] == sorted(measured["acceptance"], reverse=True)


def test_groups_that_do_not_fit_are_not_counted_and_without_any_it_says_so(drafter: Drafter) -> None:
    step = DraftStep(drafter, DraftLossConfig())
    assert DraftValidation([rows([[5, 6, 7, 8, 9, 10]], 0)], PLACES, 64)(step, 0)["groups"] == 2
    with pytest.raises(DataError, match="no room for a group of 3 drafts"):
        DraftValidation([rows([[5, 6, 7, 8]], 0)], PLACES, 64)
