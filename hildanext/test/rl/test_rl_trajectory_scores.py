"""`trajectory` against what an engine recorded: all steps are exact, drawn steps are so in the mean."""

import math

import pytest
import torch

from conftest import random_model
from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.registry import build, under_profile
from hildanext.diffusion import block_index
from hildanext.losses.linear_log_probs import linear_log_probs
from hildanext.models import DiffusionModel
from hildanext.models.sampling import law
from hildanext.rl.batch import RolloutBatch, collate
from hildanext.rl.likelihoods import POLICY_LIKELIHOODS
from hildanext.rl.likelihoods.trajectory import draw_steps
from hildanext.rl.looks import score
from rl_answers import invented, recorded_answers, written

EDITING = {"name": "threshold_edit", "tau_mask": 0.3, "tau_edit": 0.05, "max_post": 3, "temperature": 1.3}


def made(**knobs):
    with under_profile("FULL"):
        return build("likelihood", POLICY_LIKELIHOODS, {"name": "trajectory", **knobs})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recorded(batch: RolloutBatch) -> torch.Tensor:
    return batch.logp.sum(-1)


def scores_of(model: DiffusionModel, batch: RolloutBatch, likelihood, temperature: float = 1.0):
    with torch.no_grad():
        return score(model, batch, likelihood.draw(batch, model.card, seeded()), temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_all_steps_add_up_to_what_the_engine_recorded(alignment, dtype, tmp_path):
    """Each token by itself, the tokens behind the end of text among them; also when saved, loaded and packed."""
    model = random_model("llama", alignment, 4, seed=1, dtype=dtype)
    batch = written(model)
    assert batch.traced and not bool(batch.biased) and not len(batch.edits)
    assert batch.after.any() and int(batch.step.max()) == 1 and (recorded(batch) < -1).all()
    likelihood, near = made(), 1e-9 if dtype == torch.float64 else 2.5e-5
    scores = scores_of(model, batch, likelihood)
    assert len(scores.raw) == 2, "a forward for each step"
    assert torch.allclose(scores.raw.sum(0).double(), batch.logp, rtol=0, atol=near)
    assert torch.allclose(scores.sequence.double(), recorded(batch), rtol=0, atol=4 * near)
    batch.save(tmp_path / "rollouts.safetensors")
    again = RolloutBatch.load(tmp_path / "rollouts.safetensors")
    assert torch.equal(scores_of(model, again, likelihood).raw, scores.raw) and not bool(again.biased)
    packed = score(model, batch, likelihood.draw(batch, model.card, seeded()), packed=True)
    assert torch.allclose(packed.raw.detach().sum(0).double(), batch.logp, rtol=0, atol=near)


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_other_orders_numbers_and_temperatures_are_exact_too(alignment):
    model = random_model("qwen3", alignment, 4, seed=2)
    for decoder in (
        {"name": "ordered", "order": "left_to_right", "per_step": 1, "temperature": 0.7},
        {"name": "ordered", "order": "random", "per_step": 3, "temperature": 1.4},
    ):
        batch = written(model, decoder, each=1)
        scores = scores_of(model, batch, made(), decoder["temperature"])
        assert torch.allclose(scores.sequence, recorded(batch), rtol=0, atol=1e-9)
        other = scores_of(model, batch, made(), 1.0)
        assert not torch.allclose(other.sequence, recorded(batch), rtol=0, atol=1e-3)


def test_left_to_right_of_a_parent_alignment_is_the_text_s_own_log_probability():
    """At block size 1 the sampler and one clean forward are one model."""
    model = random_model("llama", "parent", 1, seed=4)
    batch = written(model, {"name": "ordered", "order": "left_to_right", "temperature": 1.0})
    with under_profile("FULL"):
        likelihood = build("likelihood", POLICY_LIKELIHOODS, {"name": "left_to_right"})
    with torch.no_grad():
        scores = score(model, batch, likelihood.draw(batch, model.card, seeded()))
    assert torch.allclose(scores.sequence, recorded(batch), rtol=0, atol=1e-9)


@pytest.mark.parametrize("chosen", ["uniform", "entropy"])
@pytest.mark.parametrize("steps", [1, 3])
def test_drawn_steps_have_the_sum_as_their_mean(chosen, steps):
    """Over 2,000 draws, within three standard errors; each draw is of a step's recorded log p, no forward is needed."""
    model = random_model("llama", "parent", 4, seed=1)
    batch = written(model, {"name": "ordered", "per_step": 1, "temperature": 1.0}, each=1)
    likelihood, generator = made(steps=steps, chosen=chosen), seeded(7)
    estimates, draws = [], 2000
    for _ in range(draws):
        looks = likelihood.draw(batch, model.card, generator)
        assert len(looks) == steps
        estimates.append(sum((batch.logp * look.weight).sum(-1) for look in looks))
    drawn = torch.stack(estimates)
    off = (drawn.mean(0) - recorded(batch)).abs()
    assert (off < 3 * drawn.std(0) / math.sqrt(draws)).all() and (drawn.std(0) > 0).all()
    looks = likelihood.draw(batch, model.card, seeded(8))
    with torch.no_grad():
        scores = score(model, batch, looks)
    expected = sum((batch.logp * look.weight).sum(-1) for look in looks)
    assert torch.allclose(scores.sequence, expected, rtol=0, atol=1e-9)


def test_steps_are_drawn_with_low_discrepancy():
    """V9: one uniform number of S in each [k/S, (k+1)/S), so that of T steps each occurs S/T times over all blocks."""
    steps = torch.tensor([4, 0, 4, 4, 0, 4, 4, 4])
    p = torch.full((8, 4), 0.25, dtype=torch.float64) * (steps > 0)[:, None]
    for seed in range(30):
        drawn = draw_steps(p, steps, 2, seeded(seed))
        assert not drawn[steps == 0].any()
        counts = torch.bincount(drawn[steps > 0].flatten(), minlength=4)
        assert counts.tolist() == [3, 3, 3, 3]
    fine = torch.full((6, 12), 1 / 12, dtype=torch.float64)
    for seed in range(30):
        drawn = draw_steps(fine, torch.full((6,), 12), 2, seeded(seed)).flatten()
        assert drawn.sort().values.tolist() == list(range(12)), "one in each interval"
    together = torch.stack([draw_steps(fine, torch.full((6,), 12), 2, seeded(seed)) for seed in range(400)])
    assert float((together[:, 0, 0].double().mean() - 5.5).abs()) < 0.6, "a block's own draw is uniform"


def test_a_block_s_steps_beyond_its_last_have_no_chance():
    batch = invented(per_step=1)
    card = random_model("llama", "block", 4, layers=1).card
    block = block_index(batch.document, batch.position, 4)
    for chosen in ("uniform", "entropy"):
        for seed in range(20):
            for look in made(steps=2, chosen=chosen).draw(batch, card, seeded(seed)):
                for number in block[batch.written].unique().tolist():
                    inside = (block == number) & batch.written
                    assert (look.read & inside).sum() == 1, "each block with steps shows one of them"
    looks = made().draw(batch, card, seeded())
    assert len(looks) == 4
    for number in block[batch.written].unique().tolist():
        inside = (block == number) & batch.written
        read = [int((look.read & inside).sum()) for look in looks]
        assert read == [1] * int(inside.sum()) + [0] * (4 - int(inside.sum()))


def test_steps_of_more_entropy_are_drawn_more_often():
    batch, card = invented(), random_model("llama", "block", 4, layers=1).card
    batch.entropy[batch.step == 0] *= 9.0
    generator = seeded()
    looks = [look for _ in range(200) for look in made(steps=1, chosen="entropy").draw(batch, card, generator)]
    first = [int((look.read & (batch.step == 0)).sum()) for look in looks]
    later = [int((look.read & (batch.step == 1)).sum()) for look in looks]
    assert sum(first) > 4 * sum(later) > 0


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_an_edit_is_an_action_of_its_step(alignment):
    """Counted, every action has the log p that the state before it gave it; refused, the answers are."""
    model = random_model("llama", alignment, 4, seed=1)
    batch = written(model, EDITING)
    assert len(batch.edits) > 20 and bool(batch.biased)
    likelihood = made(edits="count", biased="allow")
    looks = likelihood.draw(batch, model.card, seeded())
    with torch.no_grad():
        scores, packed = (score(model, batch, looks, 1.3, packed=packed) for packed in (False, True))
    edits = {(row, step, position) for row, step, position, *_ in batch.edits.tolist()}
    read = {
        (row, step, position) for step, row, position in torch.stack([look.read for look in looks]).nonzero().tolist()
    }
    fills = {(row, int(batch.step[row, position]), position) for row, position in batch.written.nonzero().tolist()}
    assert not edits & fills and read == edits | fills
    for row, step, position in fills:
        assert float(scores.raw[step, row, position]) == pytest.approx(float(batch.logp[row, position]), abs=1e-9)
    assert torch.allclose(scores.raw, packed.raw, rtol=0, atol=1e-9)
    for number, (row, step, position, old, new) in enumerate(batch.edits.tolist()):
        look = looks[step]
        assert not look.masked[row, position] and int(look.shown[row, position]) == old, number
        assert int(look.labels[row, position]) == new and float(scores.raw[step, row, position]) < 0


def test_edits_have_the_log_probability_that_was_recorded():
    model = random_model("llama", "parent", 4, seed=1)
    answers = recorded_answers(model, EDITING)
    batch = collate(answers, range(len(answers)), 4, fill=0)
    told = torch.cat([torch.from_numpy(answer.trajectory.edit_logp) for answer in answers])
    scores = scores_of(model, batch, made(edits="count", biased="allow"), 1.3)
    ours = torch.stack([scores.raw[step, row, position] for row, step, position, *_ in batch.edits.tolist()])
    assert len(told) > 5 and torch.allclose(ours, told, rtol=0, atol=1e-9)


def enumerated(logits: torch.Tensor, label: int, filters: dict) -> float:
    """log p of a label by the law that a sampler with these filters draws from."""
    return float(law(logits[None], 1.3, filters.get("top_p"), filters.get("top_k"))[0, label].log())


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_what_top_k_and_top_p_left_is_replayed(alignment, filters, tmp_path):
    """The law of the sampler and its gradient; also when saved, loaded, cut, joined and packed."""
    model = random_model("llama", alignment, 4, seed=1)
    batch = written(model, {"name": "ordered", "per_step": 2, "temperature": 1.3, **filters}, each=2)
    assert batch.kept is not None and (batch.kept[batch.written] >= 1).all()
    assert int(batch.kept.max()) <= filters.get("top_k", 10**6) and not batch.kept[~batch.written].any()
    looks = made().draw(batch, model.card, seeded())
    plain = score(model, batch, looks, 1.3)
    scores = score(model, batch, looks, 1.3, actions=True)
    assert torch.allclose(scores.raw.sum(0), batch.logp, rtol=0, atol=1e-9)
    assert not torch.allclose(plain.raw.sum(0), batch.logp, rtol=0, atol=1e-2)
    batch.save(tmp_path / "rollouts.safetensors")
    again = RolloutBatch.join([RolloutBatch.load(tmp_path / "rollouts.safetensors").rows([3, 0]), written(model)])
    assert torch.equal(again.kept[0, : batch.kept.shape[1]], batch.kept[3, : again.kept.shape[1]])
    assert not again.kept[2:].any()
    assert torch.equal(score(model, batch, looks, 1.3, packed=True, actions=True).read, scores.read)
    scores = score(model, batch, looks, 1.3, packed=True, actions=True)
    assert torch.allclose(scores.raw.sum(0), batch.logp, rtol=0, atol=1e-9)


def test_a_sampler_without_filters_records_none():
    model = random_model("llama", "block", 4, seed=1)
    batch = written(model, each=1)
    assert batch.kept is None and "kept" not in batch.arrays()
    looks = made().draw(batch, model.card, seeded())
    assert torch.equal(score(model, batch, looks, actions=True).raw, score(model, batch, looks).raw)


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.7}], ids=str)
def test_the_gradient_of_a_filtered_token_is_that_of_the_sampler_s_law(filters):
    """By differences of the law itself, whose filter is made anew for each."""
    hidden = torch.tensor([[1.0, -0.5, 0.25]], dtype=torch.float64)
    head = torch.tensor(
        [[0.9, 0.1, 0], [0.7, -0.3, 0.4], [0.2, 0.5, 0], [0.6, 0, -0.2], [0, 0, 0.1], [-1, 1, 0]]
    ).double()
    banned = torch.zeros(6, dtype=torch.bool)
    probability = law(hidden @ head.T, 1.3, filters.get("top_p"), filters.get("top_k"))
    kept = (probability > 0).sum(-1)
    assert 1 < int(kept) < 6
    for label in (probability[0] > 0).nonzero()[:, 0].tolist():
        states = hidden.clone().requires_grad_()
        logp = linear_log_probs(states, head, torch.tensor([label]), banned, 4, 1.3, kept)
        assert float(logp.detach()) == pytest.approx(enumerated((hidden @ head.T)[0], label, filters), abs=1e-12)
        (gradient,) = torch.autograd.grad(logp.sum(), states)
        for place in range(3):
            nudge = torch.zeros_like(hidden)
            nudge[0, place] = 1e-6
            above, below = (enumerated(((hidden + sign * nudge) @ head.T)[0], label, filters) for sign in (1, -1))
            assert float(gradient[0, place]) == pytest.approx((above - below) / 2e-6, abs=1e-6)


def test_a_token_that_is_no_longer_left_has_a_finite_log_probability_without_jumps():
    """The last one that is left makes room for it."""
    head, banned, kept = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.bool), torch.tensor([2])

    def logp(third: float) -> float:
        states = torch.tensor([[3.0, 1.0, third, -5.0]], dtype=torch.float64)
        return float(linear_log_probs(states, head, torch.tensor([2]), banned, 4, 1.0, kept))

    assert logp(1.0 + 1e-9) == pytest.approx(logp(1.0 - 1e-9), abs=1e-8)
    assert logp(0.0) == pytest.approx(-math.log1p(math.exp(3.0)))


def test_edits_of_a_filtered_sampler_are_refused():
    model = random_model("llama", "block", 4, seed=1)
    batch = written(model, {**EDITING, "top_k": 5}, each=1)
    with pytest.raises(ConfigError, match=r"edits were drawn under top_k.*leave top_k"):
        made(edits="count", biased="allow").draw(batch, model.card, seeded())


def test_what_cannot_be_scored_is_refused_with_the_reason():
    card = random_model("llama", "block", 4, layers=1).card
    untraced = invented(traced=False)
    assert not untraced.traced
    with pytest.raises(ConfigError, match=r"of 7 answers the steps are not known.*openai"):
        made().draw(untraced, card, seeded())
    model = random_model("llama", "block", 4, seed=1)
    with pytest.raises(ConfigError, match=r"answers hold \d+ edits.*edits: count"):
        made(biased="allow").check_batch(written(model, EDITING, each=1))
    sure = written(model, {"name": "ordered", "order": "confidence", "temperature": 1.0}, each=1)
    assert bool(sure.biased) and bool(sure.rows([1, 0]).biased)
    with pytest.raises(ConfigError, match="biased: allow"):
        made().check_batch(sure)
    allowed = scores_of(model, sure, made(biased="allow"))
    assert torch.allclose(allowed.sequence, recorded(sure), rtol=0, atol=1e-9), "of the tokens, not of the actions"


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"steps": 2, "segments": 2}, "segments 2 and steps 2"),
        ({"chosen": "entropy"}, "reads all steps"),
        ({"edits": "count", "segments": 2}, "counts edits and has segments 2"),
        ({"edits": "count", "steps": 2, "chosen": "entropy"}, "counts edits and draws by entropy"),
        ({"steps": 0}, "steps"),
        ({"steps": "some"}, "steps"),
        ({"segments": 0}, "segments"),
        ({"order": "random"}, "order"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(knobs, says):
    with pytest.raises((ConfigError, UnknownChoice), match=says):
        made(**knobs)
