"""wd1++: intermediate predictions are kept, judged, and learnt in the state they were made in."""

import pytest
import torch
from plugin_fixtures import END, Says, a_desk, a_policy, sums
from torch import Tensor

from hildanext.core.errors import ConfigError
from hildanext.core.registry import build, under_profile
from hildanext.grading.gsm8k import Gsm8kReward
from hildanext.rl.batch import collate
from hildanext.rl.chunk import judged, told
from hildanext.rl.config import read_config
from hildanext.rl.likelihoods import POLICY_LIKELIHOODS
from hildanext.rl.looks import score
from hildanext.rl.material import Material
from hildanext.rl.objectives import OBJECTIVES
from hildanext.rl.objectives.base import PolicyInputs
from hildanext.rl.predictions import behind_end, draw_states, with_predictions

TEXTS = ["so 2+3=6\n#### 6", "so 2+3=5\n#### 5"]


def answered(policy, problem, traced: bool = True) -> Material:
    sampler = Says(policy, TEXTS, traced=traced)
    answers = sampler.sample([policy.encode(problem)] * 2, [0, 1])
    batch = collate(answers, [0, 0], policy.model.card.block_size, END)
    return Material(batch, judged(told(answers, [problem] * 2, [0, 0]), [problem] * 2, Gsm8kReward()))


def objective(section: dict):
    with under_profile("FULL"):
        return build("objective", OBJECTIVES, section)


@pytest.fixture
def enlarged(tmp_path):
    policy, problem = a_policy(), sums()
    material = answered(policy, problem)
    desk = a_desk(tmp_path, policy, Says(policy), problem)
    return policy, material, desk, objective({"name": "wd1pp", "steps": 2}).more(material, desk)


def test_the_group_holds_the_answers_and_two_predictions_of_each(enlarged):
    _, material, _, made = enlarged
    assert made.answers[:2] == material.answers and len(made.answers) == 6
    assert made.batch.group.tolist() == [0] * 6 and len(made.look.masked) == 6
    assert all(answer.reward is not None for answer in made.answers), "each prediction is judged"
    assert made.figures["predictions"] == 4
    assert torch.equal(made.batch.tokens[2], material.batch.tokens[0]), "the state is that of the answer"


def test_an_intermediate_state_shows_what_was_written_before_its_step_and_no_more(enlarged):
    _, material, _, made = enlarged
    batch, look = made.batch, made.look
    for row, of in zip(range(2, 6), (0, 0, 1, 1), strict=True):
        masked, step = look.masked[row], material.batch.step[of]
        at = int(step[masked].min())
        assert torch.equal(masked, material.batch.written[of] & (step >= at)), "of every block its step `at` and later"
        assert at < int(step.max()), "the last step is the answer's own"
        assert torch.equal(look.labels[row][~masked], batch.tokens[row][~masked])
        assert not (look.read[row] & ~masked).any() and (look.weight[row] == look.read[row].double()).all()
    places = [
        int(material.batch.step[of][look.masked[row]].min()) for row, of in zip(range(2, 6), (0, 0, 1, 1), strict=True)
    ]
    assert places[0] != places[1] and places[2] != places[3], "without replacement"


def test_nothing_is_read_behind_a_predictions_end(enlarged):
    _, _, _, made = enlarged
    part = made.batch.rows([0])
    first, last = int(part.prompt[0]), int((part.document[0] >= 0).sum())
    labels = torch.full_like(part.tokens, 5)
    labels[0, [first - 2, first + 3, first + 6]] = END
    behind = behind_end(labels, part, torch.tensor([END]))
    assert behind[0, :last].nonzero()[:, 0].tolist() == list(range(first + 4, last)), "an end in a prompt is none"
    for row in range(2, 6):
        document = made.batch.document[row] >= 0
        tokens = made.look.labels[row][document][int(made.batch.prompt[row]) :].tolist()
        stop = tokens.index(END) + 1 if END in tokens else len(tokens)
        assert made.answers[row].tokens == stop and made.answers[row].ended == (END in tokens)
        assert not made.look.read[row, int(made.batch.prompt[row]) + stop :].any()


def test_an_answers_own_look_reads_its_last_step(enlarged):
    _, material, _, made = enlarged
    for row in range(2):
        step, read = material.batch.step[row], made.look.read[row]
        blocks = torch.arange(len(step)) // 4
        for block in set(blocks[material.batch.written[row]].tolist()):
            inside = blocks == block
            last = inside & (step == step[inside].max()) & material.batch.scored[row]
            assert torch.equal(read & inside, last)


def test_the_loss_is_wd1s_weights_times_log_p_of_predictions_by_hand(enlarged):
    policy, _, _, made = enlarged
    rewards = torch.tensor([[answer.reward for answer in made.answers]], dtype=torch.float64)
    apart = rewards - rewards.mean()
    expected_advantage = apart.softmax(-1) - (-apart).softmax(-1)
    with under_profile("FULL"):
        advantage = read_config({"model": "tiny", "objective": {"name": "wd1pp"}})[1].advantage.of(
            rewards, torch.ones_like(rewards, dtype=torch.bool)
        )
    assert torch.allclose(advantage, expected_advantage)
    scores = score(policy.model, made.batch, [made.look])
    by_hand = torch.stack([log_p(policy.model, made, row) for row in range(6)])
    assert torch.allclose(scores.sequence, by_hand, atol=1e-9)
    inputs = PolicyInputs(
        scores, scores.detach(), None, advantage[0], torch.ones(6, dtype=torch.bool), made.batch.group
    )
    loss, _ = objective({"name": "wd1pp"}).loss(inputs)
    assert float(loss.detach()) == pytest.approx(float(-(advantage[0] * by_hand).sum()))


def log_p(model, made: Material, row: int) -> Tensor:
    """Of what a look reads, block by block: one forward of the blocks before it and of the noisy block alone."""
    from hildanext.decoding.state import DecodeState

    total = torch.zeros((), dtype=torch.float64)
    batch, look, size = made.batch, made.look, model.card.block_size
    end = int((batch.document[row] >= 0).sum())
    for start in range(0, end, size):
        span = slice(start, start + size)
        read = look.read[row, span]
        if not read.any():
            continue
        tokens = batch.tokens[row, : start + size].clone()
        tokens[span][look.masked[row, span]] = model.card.mask_id
        state = DecodeState(model, [tokens.tolist()], [start + size], lambda row, text: False, cached=False)
        state.rows[0].start = state.rows[0].prompt = start
        logits = state.logits(state.canvas().every).log_softmax(-1)
        total += logits[torch.arange(size), look.labels[row, span]][read].sum()
    return total.detach()


def test_what_was_predicted_and_earned_is_kept(enlarged, monkeypatch):
    policy, material, desk, made = enlarged
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(1.0)  # as a run that goes on between two updates has other weights
    monkeypatch.setattr(type(desk.reward), "score", lambda *_: pytest.fail("judged twice"))
    again = with_predictions(material, desk, 2)
    assert again.answers == made.answers and torch.equal(again.look.labels, made.look.labels)
    assert {path.name for path in desk.path.parent.iterdir()} == {
        "process-0-from-0000-predictions.safetensors",
        "process-0-from-0000-predictions-texts.json",
    }


def test_steps_are_drawn_without_replacement_and_never_the_last():
    drawn = draw_states(torch.tensor([4, 1, 2, 0, 9]), 3, torch.Generator().manual_seed(0))
    of = {row: [step for one, step in drawn if one == row] for row in range(5)}
    assert of[0] == [0, 1, 2] and of[1] == [] and of[2] == [0] and of[3] == []
    assert len(set(of[4])) == 3 and max(of[4]) < 8


def test_the_likelihood_predictions_needs_steps_and_no_edits():
    policy, problem = a_policy(), sums()
    with under_profile("FULL"):
        likelihood = build("likelihood", POLICY_LIKELIHOODS, {"name": "predictions"})
    with pytest.raises(ConfigError, match="steps of these answers are not known"):
        likelihood.check_batch(answered(policy, problem, traced=False).batch)
    batch = answered(policy, problem).batch
    edited = type(batch)(**{**vars(batch), "edits": torch.tensor([[0, 1, 30, 4, 5]])})
    with pytest.raises(ConfigError, match="1 edits"):
        likelihood.check_batch(edited)


def test_wd1pp_is_research_and_takes_its_own_likelihood_alone():
    with under_profile("SAFE"), pytest.raises(ConfigError, match="FULL method"):
        build("objective", OBJECTIVES, {"name": "wd1pp"})
    with under_profile("FULL"), pytest.raises(ConfigError, match="predictions"):
        read_config({"model": "tiny", "objective": {"name": "wd1pp"}, "likelihood": {"name": "mean_field"}})
