"""Drafts are learnt from the kept parent: where groups stand, what they see, and that training and decoding agree."""

import pytest
import torch

from hildanext.ar import Parent
from hildanext.corruption.anchors import DraftGroups, draw_groups, show_tokens
from hildanext.diffusion import NoisedBatch
from hildanext.kv_cache import BlockCache
from hildanext.kv_cache.draft_attention import DraftAttention, DraftSegment
from hildanext.losses.draft import DraftLossConfig, DraftNoise, DraftStep, confirmed
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig
from small_models import small_causal

PLACES = 3


def drafter(enter: int = 0, shared: bool = False, sampler: int | None = None) -> Drafter:
    model = Drafter(small_causal("qwen3").double(), GatedLoraConfig(rank=4), PLACES, enter, shared, sampler).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def view(lengths: list[list[int]], prompt: int = 2) -> NoisedBatch:
    """Rows of documents laid one behind another; all but each document's first `prompt` tokens are learnt."""
    seq = max(sum(row) for row in lengths)
    document = torch.full((len(lengths), seq), -1)
    position = torch.zeros(len(lengths), seq, dtype=torch.int64)
    for row, parts in enumerate(lengths):
        at = 0
        for number, length in enumerate(parts):
            document[row, at : at + length] = number
            position[row, at : at + length] = torch.arange(length)
            at += length
    clean = torch.randint(3, 60, document.shape, generator=torch.Generator().manual_seed(1))
    learnable = (document >= 0) & (position >= prompt)
    nothing = torch.zeros_like(learnable)
    return NoisedBatch(clean, clean, document, position, learnable, nothing, nothing, torch.ones(clean.shape), PLACES)


def test_groups_stand_behind_every_token_that_has_something_to_learn_and_never_reach_into_another_document() -> None:
    batch = view([[7, 5]])
    groups = draw_groups(batch.document, batch.maskable, 12, PLACES, None)
    learnt = {
        int(anchor): [bool(one) for one in row]
        for anchor, row in zip(groups.anchors[0], groups.learnt[0], strict=True)
        if row.any()
    }
    # Mask i of anchor a says the token in column a + 2 + i.
    assert learnt == {
        **{a: [True, True, True] for a in (0, 1, 2)},
        3: [True, True, False],
        4: [True, False, False],
        7: [True, True, True],
        8: [True, True, False],
        9: [True, False, False],
    }


def test_drawn_groups_are_the_seeds_and_do_not_repeat() -> None:
    batch = view([[30], [12, 12]])
    first, again, other = (
        draw_groups(batch.document, batch.maskable, 5, PLACES, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.anchors, again.anchors) and not torch.equal(first.anchors, other.anchors)
    assert all(len(set(row.tolist())) == 5 for row in first.anchors)
    assert first.learnt[:, :, 0].all()


@pytest.mark.parametrize(("enter", "sampler"), [(0, None), (1, None), (0, 5)])
def test_masks_see_in_training_what_they_see_in_decoding(enter: int, sampler: int | None) -> None:
    """The states of mask rows behind every token of a text, from a batch and from an exact forward: fp64, 1e-12."""
    model, batch = drafter(enter, sampler=sampler), view([[9]])
    groups = draw_groups(batch.document, batch.maskable, 9, PLACES, None)
    with torch.no_grad():
        hidden, parent = DraftStep(model, DraftLossConfig()).read(batch, groups)
        hidden = hidden.view(9, PLACES, -1)
        for number, anchor in enumerate(groups.anchors[0].tolist()):
            cache = BlockCache.of_causal(model.causal_lm, 32)
            segment = DraftSegment(0, anchor + 1, (anchor,), PLACES)
            index = torch.tensor(segment.anchors)
            positions = torch.tensor([[*segment.positions[0], *segment.positions[1]]])
            decoded = model(
                batch.clean[:, : anchor + 1], index, torch.arange(PLACES), positions, DraftAttention([cache], [segment])
            )[0, anchor + 1 :]
            before = batch.clean[0, (anchor + 1 + torch.arange(PLACES)).clamp_max(8)]
            torch.testing.assert_close(hidden[number], model.told(decoded, before), rtol=0, atol=1e-12)
    reads = Parent(model.causal_lm, None)
    exact = reads.hidden(batch.clean, batch.document, batch.position)[0]
    columns = groups.columns(9)[0].flatten()
    torch.testing.assert_close(parent, exact[columns], rtol=0, atol=1e-12)


def test_rows_that_attend_a_few_at_a_time_see_what_they_see_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = drafter(), view([[30], [12, 12]])
    groups = draw_groups(batch.document, batch.maskable, 10, PLACES, torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = DraftStep(model, DraftLossConfig()).read(batch, groups)[0].view(2, 10, PLACES, -1)
        monkeypatch.setattr("hildanext.models.attention.kept.TOGETHER", 2 * PLACES)
        few = DraftStep(model, DraftLossConfig()).read(batch, groups)[0].view(2, 10, PLACES, -1)
    torch.testing.assert_close(few, together, rtol=0, atol=1e-12)


def test_layers_that_are_computed_again_have_the_gate_of_their_forward() -> None:
    gradients = []
    for again in (False, True):
        model, batch = drafter(), view([[12]])
        if again:
            model.recompute_layers()
        step = DraftStep(model, DraftLossConfig(groups=4))
        step(batch, generator=torch.Generator().manual_seed(0)).total.backward()
        gradients.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-12)


def test_partly_filled_groups_learn_what_is_not_shown() -> None:
    """A row learns unless the next one shows the token that it is to say; a wrong token is there to be mended."""
    batch = view([[40]] * 8)
    whole = draw_groups(batch.document, batch.maskable, 12, PLACES, torch.Generator().manual_seed(0))
    groups = show_tokens(whole, batch.clean, 0.5, 0.4, 60, torch.Generator().manual_seed(1))
    assert groups.shown is not None and show_tokens(whole, batch.clean, 0.0, 0.4, 60, None) is whole
    assert 0.2 < groups.noised.float().mean() < 0.5
    rows = torch.arange(8)[:, None, None]
    own = batch.clean[rows, groups.columns(40)]
    right = groups.shown == own
    shown = groups.shown >= 0
    assert 0.5 < right[shown].float().mean() < 0.75, "about four in ten are random"
    for place in range(PLACES):
        settled = right[..., place + 1] if place + 1 < PLACES else torch.zeros_like(right[..., 0])
        assert torch.equal(groups.learnt[..., place], whole.learnt[..., place] & ~settled)
    assert torch.equal(groups.learnt[~groups.noised], whole.learnt[~groups.noised])


def test_a_row_that_shows_a_token_starts_from_it_and_counts_apart() -> None:
    model, batch = drafter(), view([[30]])
    step = DraftStep(model, DraftLossConfig(groups=8), noise=DraftNoise(share=1.0))
    assert step.buckets == ("1", "2", "3", "noised")
    groups = step.draw(batch, torch.Generator().manual_seed(3))
    assert groups.shown is not None
    shown = groups.shown.flatten(1)
    states = torch.zeros(1, shown.shape[1], model.head.shape[1], dtype=torch.float64)
    entering = step._entering(states, groups)
    embedding = model.causal_lm.get_input_embeddings().weight
    assert torch.equal(entering[shown >= 0], embedding[shown[shown >= 0]]) and not entering[shown < 0].any()
    outcome = step(batch, generator=torch.Generator().manual_seed(3))
    counted = [int(groups.learnt[~groups.noised][:, place].sum()) for place in range(PLACES)]
    assert outcome.masked.tolist() == [*counted, int(groups.learnt[groups.noised].sum())]


def test_a_draft_is_kept_where_it_and_all_before_it_are_what_the_parent_says() -> None:
    drafts, said = torch.tensor([[1, 2, 3], [1, 5, 3], [4, 2, 3]]), torch.tensor([[1, 2, 3]] * 3)
    assert confirmed(drafts, said).tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_only_adapters_and_vectors_learn_and_what_is_not_learnt_has_no_part() -> None:
    model, batch = drafter(sampler=5), view([[12]])
    step = DraftStep(model, DraftLossConfig(groups=4))
    outcome = step(batch, generator=torch.Generator().manual_seed(0))
    outcome.total.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"place_vectors", "sampler.down", "sampler.up", "sampler.scale"} < learning
    assert all("lora_" in name or name.startswith(("place_vectors", "sampler.")) for name in learning)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == learning
    groups = draw_groups(batch.document, batch.maskable, 4, PLACES, torch.Generator().manual_seed(0))
    assert int(outcome.masked.sum()) == int(groups.learnt.sum())
    hidden, parent = step.read(batch, groups)
    student, teacher = (model.logits(part).log_softmax(-1) for part in (hidden, parent))
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    weight = torch.where(groups.learnt.flatten(), 0.8 ** torch.arange(PLACES).repeat(4), 0.0)
    mean = (divergence * weight).sum() / weight.sum()
    assert float(outcome.total.detach() / batch.maskable.sum()) == pytest.approx(float(mean.detach()), rel=1e-6)


def test_cross_entropy_is_to_the_texts_own_token() -> None:
    model, batch = drafter(shared=True), view([[12]])
    step = DraftStep(model, DraftLossConfig(kind="ce", groups=4))
    outcome = step(batch, generator=torch.Generator().manual_seed(0))
    groups = draw_groups(batch.document, batch.maskable, 4, PLACES, torch.Generator().manual_seed(0))
    labels = torch.stack([batch.clean[0, (groups.anchors[0] + 2 + place).clamp_max(11)] for place in range(PLACES)], -1)
    chance = model.logits(step.read(batch, groups)[0]).log_softmax(-1).gather(1, labels.flatten()[:, None])[:, 0]
    weight = torch.where(groups.learnt.flatten(), 0.8 ** torch.arange(PLACES).repeat(4), 0.0)
    mean = -(chance * weight).sum() / weight.sum()
    assert float(outcome.total.detach() / batch.maskable.sum()) == pytest.approx(float(mean.detach()), rel=1e-6)


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_what_drafts_may_not_say_has_no_part_in_what_they_learn(kind: str) -> None:
    """Both distributions over a part of the vocabulary, in an order of its own; other labels teach nothing."""
    model, batch = drafter(), view([[30]])
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(3))[:40]
    model.draft_tokens = chosen
    step = DraftStep(model, DraftLossConfig(kind=kind, groups=12))  # type: ignore[arg-type]
    outcome = step(batch, generator=torch.Generator().manual_seed(0))
    groups = draw_groups(batch.document, batch.maskable, 12, PLACES, torch.Generator().manual_seed(0))
    labels = step.labels(batch, groups)
    known = groups.learnt.flatten() & torch.isin(labels, chosen)
    assert 0 < int(known.sum()) < int(groups.learnt.sum()) and int(outcome.masked.sum()) == int(known.sum())
    student, teacher = (model.logits(part)[:, chosen].log_softmax(-1) for part in step.read(batch, groups))
    if kind == "kl":
        loss = (teacher.exp() * (teacher - student)).sum(-1)
    else:
        loss = -student[torch.arange(len(labels)), (chosen == labels[:, None]).int().argmax(-1)]
    weight = torch.where(known, 0.8 ** torch.arange(PLACES).repeat(12), 0.0)
    mean = (loss * weight).sum() / weight.sum()
    assert float(outcome.total.detach() / batch.maskable.sum()) == pytest.approx(float(mean.detach()), rel=1e-6)
    right = (chosen[student.argmax(-1)] == labels) & known
    assert int(outcome.correct.sum()) == int(right.sum())


@pytest.mark.parametrize("enter", [0, 1])
def test_clean_rows_that_are_kept_give_the_bits_of_those_that_are_computed(enter: int) -> None:
    """Two batches in turns, with memory for one of them: the parent runs for the other alone."""
    batches = [view([[30]]), view([[12, 14]])]
    outcomes, runs = [], []
    for mib in (0, 1):
        model = drafter(enter)
        step = DraftStep(model, DraftLossConfig(groups=6, kept_mib=mib))
        size = sum(part.numel() * part.element_size() for part in step.kept(model, batches[0], batches[0])[:2])
        assert step.kept.left == 0 if mib == 0 else step.kept.left < 2**20 - size
        step.kept.left = 0  # the second one finds no room
        forwards: list[int] = []
        model.causal_lm.model.layers[0].register_forward_pre_hook(lambda *_: forwards.append(1))  # noqa: B023
        for turn in range(4):
            model.zero_grad()
            outcome = step(batches[turn % 2], generator=torch.Generator().manual_seed(turn))
            outcome.total.backward()
            outcomes.append([outcome.total.detach(), *(part.grad for part in model.parameters() if part.requires_grad)])
        runs.append(len(forwards))
    masks = 4 if enter == 0 else 0  # the first layer runs for mask rows too
    assert runs == [4 + masks, 2 + masks]
    for computed, kept in zip(outcomes[:4], outcomes[4:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(computed, kept, strict=True))


def test_a_batch_without_anything_to_learn_has_a_loss_of_zero() -> None:
    batch = view([[2]])
    outcome = DraftStep(drafter(), DraftLossConfig(groups=4))(batch, generator=torch.Generator().manual_seed(0))
    assert float(outcome.total.detach()) == 0.0
    assert isinstance(draw_groups(batch.document, batch.maskable, 4, PLACES, None), DraftGroups)
