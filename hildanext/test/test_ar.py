"""The baseline: exact likelihoods inside documents, and a cached generation that equals the uncached one."""

import math

import pytest
import torch

from hildanext.ar import Parent, sample_documents
from hildanext.core.errors import PromptError
from hildanext.models.loading.load import load_parent
from hildanext.models.lora import LoraConfig, add_lora, without_lora
from hildanext.models.sampling import sample, uniforms
from hildanext.models.start import start_conversion
from small_models import FAMILIES, small_causal, small_parent, small_tokenizer

TOKENS = torch.tensor([[0, 5, 9, 33, 21, 7, 40, 12], [0, 8, 3, 50, 0, 17, 22, 4]])
DOCUMENT = torch.tensor([[0] * 8, [0] * 4 + [1] * 3 + [-1]])
POSITION = torch.tensor([list(range(8)), [0, 1, 2, 3, 0, 1, 2, 0]])


def make_parent(family: str = "llama", **changes: object) -> Parent:
    return Parent(small_causal(family, **changes), small_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_causal_models_own(family):
    parent, theirs = make_parent(family), small_causal(family, attention="sdpa")
    ours = parent.logits(parent.hidden(TOKENS[:1], DOCUMENT[:1], POSITION[:1]))
    torch.testing.assert_close(ours, theirs(TOKENS[:1]).logits, atol=1e-5, rtol=1e-5)


def test_the_teacher_is_the_model_with_its_adapters_off(tmp_path):
    folder = small_parent(tmp_path / "parent")
    model, tokenizer = start_conversion(folder, "parent", 1, mask_delta=True)
    add_lora(model, LoraConfig(rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    teacher = Parent(model.causal_lm, tokenizer)
    changed = teacher.hidden(TOKENS, DOCUMENT, POSITION)
    with without_lora(model):
        off = teacher.hidden(TOKENS, DOCUMENT, POSITION)
    want = Parent(*load_parent(folder)).hidden(TOKENS, DOCUMENT, POSITION)
    torch.testing.assert_close(off, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed, want, atol=1e-2)


def test_hidden_states_carry_no_gradient():
    assert not make_parent().hidden(TOKENS, DOCUMENT, POSITION).requires_grad


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_nll_is_the_causal_models_cross_entropy(family, chunk):
    parent, theirs = make_parent(family), small_causal(family, attention="sdpa")
    nll = parent.token_nll(TOKENS, DOCUMENT, POSITION, chunk)
    for row, start, end in ((0, 0, 8), (1, 0, 4), (1, 4, 7)):
        part = TOKENS[row : row + 1, start:end]
        log_p = theirs(part).logits[0, :-1].float().log_softmax(-1)
        want = -log_p.gather(-1, part[0, 1:, None])[:, 0]
        torch.testing.assert_close(nll[row, start + 1 : end], want, atol=1e-5, rtol=1e-5)


def test_the_first_token_of_a_document_and_padding_cost_nothing():
    nll = make_parent().token_nll(TOKENS, DOCUMENT, POSITION)
    assert nll[:, 0].eq(0).all() and nll[1, 4] == 0 and nll[1, 7] == 0
    assert (nll[1, 5:7] > 0).all()


def test_another_document_changes_nothing():
    parent = make_parent()
    other = TOKENS.clone()
    other[1, :4] = torch.tensor([30, 31, 32, 33])
    before, after = (parent.token_nll(tokens, DOCUMENT, POSITION) for tokens in (TOKENS, other))
    assert torch.equal(before[1, 4:], after[1, 4:]) and not torch.equal(before[1, 1:4], after[1, 1:4])


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary():
    causal_lm = small_causal(tied=False).double()
    torch.nn.init.zeros_(causal_lm.get_output_embeddings().weight)
    banned = torch.arange(64) >= 60
    nll = Parent(causal_lm, small_tokenizer(), banned).token_nll(TOKENS, DOCUMENT, POSITION)
    torch.testing.assert_close(nll[0].sum(), torch.tensor(7 * math.log(60), dtype=torch.float64))


def uncached_greedy(causal_lm, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(causal_lm(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prompt", [[0], [0, 5, 9, 33, 21]])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_greedy_is_the_uncached_greedy(family, prompt):
    result = make_parent(family).generate(prompt, 20, stop_ids=[])
    assert result.tokens == uncached_greedy(small_causal(family, attention="sdpa"), prompt, 20)
    stats = result.stats
    assert stats.forwards == 20 and stats.seconds >= stats.prefill_seconds > 0 and result.finish_reason == "length"


def test_generation_ends_with_the_stop_token():
    parent = make_parent()
    free = parent.generate([0, 5], 20, stop_ids=[]).tokens
    stop = free[7]
    assert parent.generate([0, 5], 20, stop_ids=[stop]).tokens == free[: free.index(stop) + 1]
    parent.tokenizer.eos_token = parent.tokenizer.convert_ids_to_tokens(stop)
    assert parent.generate([0, 5], 20).tokens == free[: free.index(stop) + 1]


def test_a_seed_gives_one_text_and_another_seed_another():
    parent = make_parent()
    texts = [parent.generate([0], 30, temperature=1.5, seed=seed, stop_ids=[]).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("prompt, new", [([], 5), ([0] * 90, 7)])
def test_a_prompt_that_does_not_fit_is_refused(prompt, new):
    with pytest.raises(PromptError) as caught:
        make_parent().generate(prompt, new)
    assert caught.value.hint


def test_sampling_frequencies_follow_the_probabilities():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20_000, 4)
    shares = [
        torch.bincount(sample(logits, uniforms(seed, 20_000), *settings), minlength=4) / 20_000
        for seed, settings in enumerate(((1.0,), (1.0, None, 2), (1.0, 0.6), (0.5, 1.0), (1.0, 0.01)))
    ]
    want = torch.tensor(
        [
            [0.5, 0.3, 0.15, 0.05],
            [0.625, 0.375, 0.0, 0.0],
            [0.625, 0.375, 0.0, 0.0],
            [0.6849, 0.2466, 0.0616, 0.0068],
            [1.0, 0.0, 0.0, 0.0],
        ]
    )
    torch.testing.assert_close(torch.stack(shares), want, atol=0.012, rtol=0)


def test_temperature_zero_is_the_argmax():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, uniforms(0, 5), 0.0), logits.argmax(-1))


def end_now_and_then(parent: Parent) -> Parent:
    """Let documents end after some ten tokens, so that rows leave the batch at different times."""
    with torch.no_grad():
        parent.causal_lm.get_input_embeddings().weight.mul_(0.3)
    return parent


def test_documents_are_bounded_and_hold_no_bos_or_eos():
    parent = end_now_and_then(make_parent())
    documents = list(sample_documents(parent, 70, 40, seed=1, batch_size=32))
    assert len(documents) == 70 and {len(document) for document in documents} != {40}
    assert all(len(document) <= 40 and 1 not in document for document in documents)
    assert documents == list(sample_documents(parent, 70, 40, seed=1, batch_size=32))
    assert documents != list(sample_documents(parent, 70, 40, seed=2, batch_size=32))


def test_sampled_text_has_the_entropy_that_the_model_says():
    """Mean surprise of exact samples = mean entropy of the model's own predictions, within 4 standard errors.

    Rows leave the batch at different times: one that went on with another's keys would draw what its own context
    finds unlikely.
    """
    parent = end_now_and_then(make_parent())
    gaps = []
    for document in sample_documents(parent, 300, 30, seed=5):
        tokens = torch.tensor([[0, *document]])
        position = torch.arange(tokens.shape[1])[None]
        zeros = torch.zeros_like(tokens)
        log_p = parent.logits(parent.hidden(tokens, zeros, position)).log_softmax(-1)[0, :-1]
        # Given that the document went on, EOS was not drawn: condition on it.
        log_p = log_p.index_fill(-1, torch.tensor([1]), -math.inf).log_softmax(-1)
        entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)
        gaps.append(-log_p.gather(-1, tokens[0, 1:, None])[:, 0] - entropy)
    gap = torch.cat(gaps).detach()
    assert len(gap) > 1000
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(gap) ** 0.5


PROMPTS = [[0, 5, 9, 33, 21, 7], [0], [0, 40, 12], [0, 8, 3, 50, 17, 22, 4, 31, 6]]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_ragged_batch_is_what_it_is_alone(family, temperature):
    parent = make_parent(family)
    parent.causal_lm.double()
    stop = parent.generate(PROMPTS[2], 20, temperature, seed=12, stop_ids=[]).tokens[5]
    seeds = [10, 11, 12, 13]
    alone = [
        parent.generate(prompt, 20, temperature, seed=seed, stop_ids=[stop]).tokens
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    together = parent.generate_batch(PROMPTS, 20, temperature, seeds=seeds, stop_ids=[stop])
    assert [result.tokens for result in together] == alone
    assert len({len(tokens) for tokens in alone}) > 1  # rows left the batch at different times
    assert [result.stats.forwards for result in together] == [len(tokens) for tokens in alone]


def test_a_long_prompt_is_filled_in_parts(monkeypatch):
    parent = make_parent()
    parent.causal_lm.double()
    whole = [result.tokens for result in parent.generate_batch(PROMPTS, 12, stop_ids=[])]
    monkeypatch.setattr("hildanext.ar.PREFILL_TOKENS", 2)
    pieces = parent.generate_batch(PROMPTS, 12, stop_ids=[])
    assert [result.tokens for result in pieces] == whole


def test_the_forwards_that_only_read_a_long_prompt_are_counted(monkeypatch):
    parent = make_parent()
    monkeypatch.setattr("hildanext.ar.PREFILL_TOKENS", 2)
    alone = [parent.generate(list(range(1, 1 + length)), 3, stop_ids=[]).stats for length in (1, 2, 3, 7)]
    assert [stats.prefill_forwards for stats in alone] == [0, 0, 1, 3]
    assert [stats.forwards for stats in alone] == [3, 3, 4, 6]
    assert {stats.tokens_per_forward for stats in alone} == {1.0}
    # The pieces are cut from the longest prompt; a row has no part in those that hold only its padding.
    together = parent.generate_batch([[1], [1, 2, 3], list(range(1, 8))], 3, stop_ids=[])
    assert [result.stats.prefill_forwards for result in together] == [0, 1, 3]


def test_a_row_ends_where_its_caller_says_and_is_handed_over_at_once():
    parent = make_parent()
    handed_over: list[tuple[int, int]] = []
    results = parent.generate_batch(
        PROMPTS,
        12,
        stop_ids=[],
        ended=lambda row, tokens: row == 2 and len(tokens) == 4,
        on_result=lambda row, result: handed_over.append((row, len(result.tokens))),
    )
    assert [len(result.tokens) for result in results] == [12, 12, 4, 12]
    assert handed_over == [(2, 4), (0, 12), (1, 12), (3, 12)]
