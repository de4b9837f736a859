"""Answers behind one clean prompt: fewer columns, the same numbers, the same gradients."""

from dataclasses import replace

import pytest
import torch

from conftest import random_model
from hildanext.core.errors import ConfigError
from hildanext.core.registry import build, under_profile
from hildanext.masks import TokenRows, among, may_attend
from hildanext.models.attention import branched
from hildanext.models.attention.blockwise import DoubledAttention
from hildanext.models.attention.dense import MaskedAttention
from hildanext.rl.batch import RolloutBatch
from hildanext.rl.likelihoods import POLICY_LIKELIHOODS
from hildanext.rl.looks import Look, noised_view, score
from hildanext.rl.packed import pack
from rl_answers import Toy, by_count, exact_norms, invented, toy_answers

SECTIONS = [{"name": "block_elbo"}, {"name": "mean_field"}, {"name": "trajectory"}, {"name": "left_to_right"}]
PROMPTS = {
    "of three lengths": (6, 6, 6, 9, 9, 8, 2),
    "of whole blocks": (8, 8, 8, 8),
    "less than a block": (3, 3, 2, 2, 2),
    "alone": (9,),
}


def looks_of(section, batch: RolloutBatch, card) -> list[Look]:
    with under_profile("FULL"):
        likelihood = build("likelihood", POLICY_LIKELIHOODS, section)
    return likelihood.draw(batch, card, torch.Generator().manual_seed(2))


def picture(mask: torch.Tensor) -> str:
    return " ".join("".join(str(int(cell)) for cell in row) for row in mask.long())


def test_a_branch_sees_the_beginning_and_itself_alone():
    """Blocks of two: a beginning of one block, and two branches of one; noisy copies first."""
    position = torch.tensor([[2, 3, 2, 3, 0, 1, 2, 3, 2, 3]])
    branch = torch.tensor([[0, 0, 1, 1, -1, -1, 0, 0, 1, 1]])
    noisy = torch.arange(10)[None] < 4
    rows = TokenRows(torch.zeros_like(position), position, noisy, branch)
    noisy_rows = "1100110000 1100110000 0011110000 0011110000"
    clean_rows = "0000110000 0000110000 0000111100 0000111100 0000110011 0000110011"
    assert picture(may_attend(rows, rows, 2)[0]) == f"{noisy_rows} {clean_rows}"
    causal = "0000100000 0000110000 0000111000 0000111100 0000110010 0000110011"
    assert picture(may_attend(rows, rows, 2, "token_causal")[0]) == f"{noisy_rows} {causal}"
    one = replace_branch(rows, torch.zeros_like(branch))
    assert torch.equal(may_attend(one, one, 2), may_attend(replace_branch(rows, None), replace_branch(rows, None), 2))


def replace_branch(rows: TokenRows, branch) -> TokenRows:
    return rows._replace(branch=branch)


@pytest.mark.parametrize("clean_mask", ["block_causal", "token_causal"])
def test_three_executions_of_the_rule_agree_on_branches(clean_mask):
    """Two rows of a beginning of two blocks and two branches, of which one is shorter in each row; filled up."""
    generator = torch.Generator().manual_seed(0)
    position = torch.tensor([[*range(4, 8), *range(4, 6), *range(2, 4), *range(4), *range(4, 6), *range(4, 6), 6]])
    branch = torch.tensor([[0] * 4 + [1] * 2 + [1] * 2 + [-1] * 4 + [0] * 2 + [1] * 2 + [1]])
    position, branch = position.expand(2, -1), branch.expand(2, -1).clone()
    document = torch.zeros_like(position)
    document[1, -1] = document[1, 6:8] = -1
    branch[document < 0] = -1
    position = torch.where(torch.tensor([[False] * 6 + [True] * 2 + [False] * 9]), position + 4, position)
    rows = TokenRows(document, position, torch.arange(17).expand(2, -1) < 8, branch)
    query, key, value = (torch.randn(2, heads, 17, 3, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    dense = MaskedAttention(among(rows, 2, clean_mask)).attend(0, query, key, value, 0.7)
    there = (document >= 0)[:, None, :, None].expand_as(dense)
    for context in (
        DoubledAttention.build(rows, 8, 2, clean_mask, torch.float64),
        branched.BranchedAttention.build(rows, 8, 2, clean_mask, torch.float64, torch.device("cpu")),
    ):
        out = context.attend(0, query, key, value, 0.7)
        assert torch.allclose(out[there], dense[there], rtol=0, atol=1e-12), type(context).__name__


@pytest.mark.parametrize("prompts", PROMPTS, ids=str)
@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["name"])
def test_packed_numbers_and_gradients_are_the_unpacked_ones(section, alignment, prompts, monkeypatch):
    """Whether branches attend apart or together."""
    if (section["name"], alignment) == ("left_to_right", "block"):
        model = random_model("llama", alignment, 1, layers=2)
    else:
        model = random_model("qwen3", alignment, 4, layers=2)
    exact_norms(model)
    batch = invented(PROMPTS[prompts])
    looks = looks_of(section, batch, model.card)
    upstream = torch.randn(len(batch.prompt), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for packed, worth_while in ((False, 1.0), (True, 0.0), (True, 1e9)):
        monkeypatch.setattr(branched, "WORTH_WHILE", worth_while)
        scores = score(model, batch, looks, packed=packed)
        model.zero_grad()
        (scores.sequence * upstream).sum().backward()
        gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
        found.append((scores, gradients))
    plain, of_plain = found[0]
    assert max(float(gradient.abs().max()) for gradient in of_plain.values()) > 1e-2
    assert float(plain.raw.detach().abs().max()) > 1
    for tight, of_tight in found[1:]:
        assert torch.allclose(plain.raw, tight.raw, rtol=0, atol=1e-9)
        assert torch.equal(plain.raw != 0, tight.raw != 0) and tight.columns <= plain.columns
        assert of_plain.keys() == of_tight.keys()
        for name, gradient in of_plain.items():
            assert torch.allclose(gradient, of_tight[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_the_prompt_is_fed_once(alignment):
    """Prompt 40, three blocks of answer, the last of whose clean copies nothing reads: P + G x (24 + 16)."""
    model = random_model("llama", alignment, 8, layers=1)
    batch = invented((40,) * 8, block_size=8)
    full = (batch.document >= 0).sum(1) == batch.tokens.shape[1]
    batch = batch.rows(full.nonzero()[:, 0].tolist() * 8).rows(range(8))
    blocks = batch.tokens.shape[1] // 8 - 5
    (look,) = looks_of({"name": "mean_field"}, batch, model.card)
    columns = score(model, batch, [look], packed=True).columns
    read = int(look.read.any(0).nonzero().max()) // 8 - 4
    assert columns == 40 + 8 * (8 * read + 8 * (read - 1)) and read <= blocks
    assert score(model, batch, [look]).columns >= 8 * (40 + 8 * read + 8 * (read - 1))


def test_another_answer_of_the_group_changes_nothing():
    model, batch = random_model("llama", "parent", 4), invented((6, 6, 6))
    looks = looks_of({"name": "trajectory"}, batch, model.card)
    tokens = torch.where(batch.written & torch.tensor([[True], [False], [False]]), 59, batch.tokens)
    with torch.no_grad():
        before = score(model, batch, looks, packed=True).sequence
        after = score(model, replace(batch, tokens=tokens), looks, packed=True).sequence
    assert torch.allclose(before[1:], after[1:], rtol=0, atol=1e-10) and float((before - after)[0].abs()) > 0.1


def test_the_first_token_is_read_from_the_prompt_that_is_shared():
    """A prompt of whole blocks under the left shift: one column predicts the first token of every answer."""
    batch = invented((8, 8, 8))
    model = random_model("llama", "parent", 4, layers=1)
    (look,) = looks_of({"name": "mean_field"}, batch, model.card)
    columns = pack(noised_view(batch, look, model.card.mask_id), batch.prompt, batch.group, "left")
    first = columns.prediction_index(batch.position, 4, "left")[:, 8]
    assert len(set(first.tolist())) == 1 and int(columns.token[0, first[0]]) == 7
    assert int(columns.branch[0, first[0]]) == -1 and int(first[0]) >= columns.noisy


def test_rows_of_a_group_may_be_cut_and_groups_lie_apart():
    model, batch = random_model("llama", "block", 4), invented()
    looks = looks_of({"name": "block_elbo", "draws": 2}, batch, model.card)
    with torch.no_grad():
        whole = score(model, batch, looks, packed=True).sequence
        for chosen in ([1, 2], [3, 4, 0, 1], [6]):
            part = batch.rows(chosen)
            cut = [look.rows(chosen, part.tokens.shape[1]) for look in looks]
            assert torch.allclose(score(model, part, cut, packed=True).sequence, whole[chosen], rtol=0, atol=1e-10)


def test_a_toy_counts_what_it_sees_when_packed():
    """The prompt once, and no token of another answer: else it would count other numbers."""
    toy, batch = Toy(by_count), toy_answers([(1, 1, 1), (0, 0, 0), (1, 1, 0)])
    looks = looks_of({"name": "trajectory"}, batch, toy.card)
    assert torch.equal(score(toy, batch, looks).raw, score(toy, batch, looks, packed=True).raw)


def test_a_group_of_two_prompts_is_refused():
    model, batch = random_model("llama", "block", 4, layers=1), invented((6, 6, 9))
    looks = looks_of({"name": "mean_field"}, batch, model.card)
    wrong = replace(batch, group=torch.zeros_like(batch.group))
    with pytest.raises(ConfigError, match="answer 2 has another prompt than answer 0"):
        score(model, wrong, looks, packed=True)
    tokens = batch.tokens.clone()
    tokens[1, 2] += 1
    with pytest.raises(ConfigError, match="answer 1 has another prompt than answer 0"):
        score(model, replace(batch, tokens=tokens), looks, packed=True)
