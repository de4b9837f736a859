"""Plugins of the alignment: what each changes, and that nothing else does."""

import math
from dataclasses import replace

import pytest
import torch
from plugin_fixtures import END, Says, a_desk, a_policy, characters, sums

import hildanext.rl.plugins.lens as lens_module
from hildanext.core.errors import ConfigError, UnknownChoice
from hildanext.core.registry import build, under_profile
from hildanext.data.problems import Problem
from hildanext.engine.base import Finished, Request, refuse_given
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.likelihood import LIKELIHOODS
from hildanext.rl.batch import Answer, RolloutBatch, collate
from hildanext.rl.config import read_config
from hildanext.rl.desk import Ask
from hildanext.rl.likelihoods.block_elbo import BlockElbo
from hildanext.rl.likelihoods.mean_field import MeanField
from hildanext.rl.likelihoods.trajectory import TrajectoryLikelihood
from hildanext.rl.looks import score
from hildanext.rl.material import Material
from hildanext.rl.moved import moved
from hildanext.rl.objectives.base import PolicyInputs
from hildanext.rl.objectives.espo import Espo
from hildanext.rl.plugins import PLUGINS
from hildanext.rl.plugins.hints import sayable
from hildanext.rl.plugins.interference import interference
from hildanext.rl.plugins.lens import Lens, count_of, mixture_weights, replaced
from hildanext.rl.plugins.protected import deletable, numbers_in
from hildanext.rl.plugins.r3l import R3l, kept_places
from hildanext.rl.plugins.reflections import KEYS, read_reflection
from hildanext.rl.plugins.stp import Stp, check_span, raised
from hildanext.rl.plugins.verifiers import Fault, cell_fault, equation_fault, number_fault
from hildanext.rl.rollouts.base import Wish
from hildanext.rl.rollouts.engine import EngineRollouts
from hildanext.rl.rounds import credited

MEMBERS = [{"name": "stp"}, {"name": "lens"}, {"name": "r3l"}]
Q = {1: 0.9, 2: 0.7, 3: 0.5}
"""Toy Q: probability of the token 1 at every mask where so many masks are left."""


def plugin(section: dict):
    with under_profile("FULL"):
        return build("plugin", PLUGINS, section)


def checked(**section):
    base = {"model": "tiny", "objective": {"name": "espo", "beta": 0.1}}
    with under_profile("FULL"):
        return read_config(base | section)


def one_block(given: tuple[int, ...] = (), length: int = 3) -> RolloutBatch:
    """One answer of `length` tokens without a prompt, some of them given."""
    return collate([Answer((), (1,) * length, "", False, 1, 0, given=given)], [0], length, 0)


def single_estimates(batch: RolloutBatch) -> list[float]:
    """The different values of the n/k estimator on toy Q."""
    generator, estimator = torch.Generator().manual_seed(0), LIKELIHOODS["count"](draws=60)
    blocks = torch.zeros(batch.tokens.shape, dtype=torch.long)
    noisings = estimator.noisings(batch.scored, blocks, generator)
    pairs = [(masked, weight) for noising in noisings for masked, weight in noising]
    assert not any((masked & ~batch.scored).any() for masked, _ in pairs)
    return sorted({round(float(weight[masked].sum()) * math.log(Q[int(masked.sum())]), 9) for masked, weight in pairs})


# What holds for all of them


@pytest.mark.parametrize("section", MEMBERS, ids=lambda section: section["name"])
def test_a_plugin_is_research_and_takes_no_unknown_knob(section):
    with under_profile("SAFE"), pytest.raises(ConfigError, match="FULL method"):
        build("plugin", PLUGINS, section)
    with pytest.raises(ConfigError, match="strength"):
        plugin({**section, "strength": 1})


def test_each_name_once_and_none_that_is_not_there():
    with pytest.raises(ConfigError, match="stp twice"):
        checked(plugins=[{"name": "stp"}, {"name": "stp", "share": 0.5}])
    with pytest.raises(UnknownChoice, match="nobody"):
        checked(plugins=[{"name": "nobody"}])
    assert checked()[1].plugins == {} and list(checked(plugins=MEMBERS[::2])[1].plugins) == ["stp", "r3l"]


CONTRADICTIONS = [
    ({"plugins": [{"name": "stp", "template": "#### 5"}]}, "covers the answer's span"),
    ({"plugins": [{"name": "stp", "template": "so "}], "problems": {"name": "countdown"}}, "covers the answer's span"),
    ({"plugins": [{"name": "stp", "temporal": "off"}]}, "prunes nothing"),
    ({"plugins": [{"name": "stp", "hints": 0.1, "template": "so "}]}, "tokens of the same places"),
    (
        {"plugins": [{"name": "stp", "hints": 0.1}], "problems": {"name": "countdown"}},
        "hints 0.1 cover the answer's span",
    ),
    ({"plugins": [{"name": "stp"}], "likelihood": {"name": "left_to_right"}}, "one after another"),
    ({"plugins": [{"name": "stp"}], "rollouts": {"name": "engine", "decoder": {"name": "ordered"}}}, "names another"),
    ({"plugins": [{"name": "lens"}], "objective": {"name": "espo"}}, "has none"),
    (
        {"plugins": [{"name": "lens"}], "likelihood": {"name": "trajectory", "edits": "count"}},
        "edits are not replayed",
    ),
    ({"plugins": [{"name": "lens"}, {"name": "r3l"}]}, "one of the two"),
    ({"plugins": [{"name": "r3l"}], "likelihood": {"name": "trajectory"}}, "hint to false"),
    ({"plugins": [{"name": "r3l"}], "reward": {"name": "format", "form": "final_line"}}, "no verifier"),
    ({"plugins": [{"name": "r3l"}], "objective": {"name": "wd1pp"}}, "take wd1"),
    ({"plugins": [{"name": "r3l", "retries": 3}]}, "retries"),
    ({"plugins": [{"name": "r3l", "imitate": 1, "hint": False}]}, "nothing to imitate"),
    (
        {
            "plugins": [{"name": "r3l", "imitate": 1, "hint": False, "reflector": "model"}],
            "likelihood": {"name": "trajectory"},
        },
        "imitate to 0",
    ),
]


@pytest.mark.parametrize(("section", "said"), CONTRADICTIONS, ids=[said for _, said in CONTRADICTIONS])
def test_what_contradicts_itself_is_refused_in_one_line(section, said):
    with pytest.raises(ConfigError, match=said) as refused:
        checked(**section)
    assert "\n" not in str(refused.value)


def test_r3l_without_its_hint_may_be_replayed():
    checked(plugins=[{"name": "r3l", "hint": False}], likelihood={"name": "trajectory"})
    checked(plugins=[{"name": "r3l", "hint": True}], likelihood={"name": "block_elbo"})


# STP


def test_v11_a_given_token_leaves_the_estimate_and_its_variance():
    free, fixed = single_estimates(one_block()), single_estimates(one_block(given=(2,)))
    assert fixed == pytest.approx(sorted([2 * math.log(0.9), 2 * math.log(0.7)]))
    assert sum(fixed) / 2 == pytest.approx(-0.462035, abs=1e-6)
    spread = [
        sum((value - sum(values) / len(values)) ** 2 for value in values) / len(values) for values in (fixed, free)
    ]
    assert spread == pytest.approx([0.063159, 0.521866], abs=1e-6)


@pytest.mark.parametrize("likelihood", [BlockElbo(draws=3), MeanField()], ids=lambda one: type(one).__name__)
def test_a_given_token_is_never_masked_read_nor_counted(likelihood):
    policy = a_policy()
    batch = collate([Answer((5, 6), (7, 8, 9, 1), "", True, 1, 0, given=(0, 2))], [0], 4, END)
    for look in likelihood.draw(batch, policy.model.card, torch.Generator().manual_seed(0)):
        assert not (look.masked | look.read)[0, [2, 4]].any() and look.weight[0, [2, 4]].sum() == 0
    assert batch.length.tolist() == [2]


def test_raised_looks_have_the_mean_of_the_steps_that_were_made():
    """Blocks of 4 whose last step wrote 2: levels 4, 3, and 2 at once."""
    batch = one_block(length=4)
    batch = replace(batch, step=torch.tensor([[0, 1, 2, 2]]))
    chance = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6}
    values = {}
    generator = torch.Generator().manual_seed(0)
    for pair in LIKELIHOODS["coupled"](draws=50).noisings(batch.scored, torch.zeros(1, 4, dtype=torch.long), generator):
        for masked, weight in pair:
            before = lens_look(masked, torch.where(masked, weight, 0.0))
            look = raised(before, batch, generator)
            count = int(look.masked.sum())
            assert count == 0 or count >= 2, "a state that no step saw"
            assert (look.masked == look.read).all() and (before.masked <= look.masked).all()
            values[int(masked.sum())] = float(look.weight.sum()) * math.log(chance[count]) if count else 0.0
    mean = sum(values[level] for level in range(5)) / 5
    assert mean == pytest.approx(math.log(0.6) + math.log(0.7) + 2 * math.log(0.8))


def lens_look(masked, weight):
    from hildanext.rl.looks import Look

    return Look(masked, masked, weight.double(), 4)


def test_the_answers_span_is_never_given():
    policy, problem = a_policy(), sums()
    tokens = [*policy.tokenizer("so 2+3=5\n#### 5", add_special_tokens=False).input_ids, END]
    batch = collate([Answer(policy.encode(problem), tuple(tokens), "", True, 1, 0)], [0], 4, END)
    check_span(policy.tokenizer, batch, 0, 3)
    check_span(policy.tokenizer, batch, 0, len("so 2+3=5\n#### "))
    with pytest.raises(AssertionError, match="covers the final answer"):
        check_span(policy.tokenizer, batch, 0, len("so 2+3=5\n#### 5"))


def test_stp_asks_for_its_tokens_and_its_decoder(tmp_path):
    policy, problem = a_policy(), sums()
    desk = a_desk(tmp_path, policy, Says(policy), problem)
    ask = Ask(problem, 0, 0, policy.encode(problem), wish=Wish(given=((5, 7),)))
    asked = Stp(template="so ", end_at=20, share=0.5).ask(ask, desk)
    so = policy.tokenizer("so ", add_special_tokens=False).input_ids
    assert asked.wish.given == (*enumerate(so), (5, 7), (20, END))
    assert asked.wish.decoder == {"name": "pruned", "early": 0.5}
    with pytest.raises(ConfigError, match="inside the template"):
        Stp(template="so ", end_at=2).ask(ask, desk)


SPANS = [
    ("2+3=5\n#### 5", "2+3=\n#### "),
    ("5+3=8, 8-5=3\n#### 3", "5+=8, 8-5=\n#### "),
    ("so <answer>4</answer> yes", "so <answer>"),
    ("15 is not 5\n#### 5", "15 is not \n#### "),
]


@pytest.mark.parametrize(("answer", "said"), SPANS, ids=[answer for answer, _ in SPANS])
def test_a_hint_is_nothing_of_the_final_answer_wherever_it_stands(answer, said):
    tokenizer = characters()
    ids = tokenizer(answer, add_special_tokens=False).input_ids
    assert "".join(answer[place] for place in sayable(tokenizer, ids)) == said


def test_hints_are_one_set_a_group_and_fall_to_none(tmp_path):
    policy, problem = a_policy(), sums(answer="so 2+3=5\n#### 5")
    desk = a_desk(tmp_path, policy, Says(policy), problem)
    ids = policy.tokenizer(problem.answer, add_special_tokens=False).input_ids
    plugin, prompt = Stp(hints=0.5, hint_rounds=4, temporal="off"), policy.encode(problem)
    asks = [plugin.ask(Ask(problem, 0, seed, prompt), desk) for seed in (1, 2)]
    assert asks[0].wish == asks[1].wish and len(asks[0].wish.given) == len(ids) // 2
    assert all(ids[place] == token for place, token in asks[0].wish.given)
    counts = [
        len(plugin.ask(Ask(problem, 0, 1, prompt), replace(desk, round=number)).wish.given) for number in range(6)
    ]
    assert counts == [int(len(ids) * share) for share in (0.5, 0.375, 0.25, 0.125, 0, 0)]
    other = plugin.ask(Ask(problem, 0, 1, prompt), replace(desk, numbers={0: 9}))
    assert other.wish.given != asks[0].wish.given
    for bad, words in (
        (replace(problem, answer=None), "line 1 has none"),
        (sums(answer="five"), "marks no final answer"),
    ):
        with pytest.raises(ConfigError, match=words):
            plugin.ask(Ask(bad, 0, 1, prompt), desk)
    text = "so 2+3=5\n#### 5"
    batch = collate([Answer(prompt, (*ids, END), text, True, 1, 0, given=(0, 4))], [0], 4, END)
    made = plugin.more(Material(batch, []), desk)
    assert made.figures == {"stp_given": 2.0}
    assert plugin.ask(Ask(problem, 0, 1, prompt), replace(desk, round=4)) == Ask(problem, 0, 1, prompt)


@pytest.mark.parametrize("alignment", ["parent", "block"])
def test_given_tokens_and_pruned_steps_are_written_and_replayed(alignment):
    policy = a_policy(alignment)
    engine = LocalEngine(policy.model, policy.tokenizer, None, LocalEngineConfig(slots=4))
    heard: list[Finished] = []
    try:
        prompt, given = (5, 6, 7), ((0, 9), (3, 10), (4, 11), (5, 12), (6, 13), (7, 14), (8, 15))
        decoder = {"name": "pruned", "early": 0.5, "temperature": 1.0}
        request = Request(tokens=prompt, decoder=decoder, max_new_tokens=14, seed=3, trajectory=True, given=given)
        import queue

        events: queue.SimpleQueue = queue.SimpleQueue()
        with under_profile("FULL"):
            engine.submit(replace(request, ignore_eos=True), events.put)
            engine.submit(replace(request, ignore_eos=True, given=()), events.put)
            while len(heard) < 2:
                event = events.get(timeout=120)
                assert not hasattr(event, "error"), event
                heard += [event] if isinstance(event, Finished) else []
            for wrong in ((14, 9), (0, policy.model.card.mask_id)):
                with pytest.raises(Exception, match="is given for place"):
                    engine.submit(replace(request, given=(wrong,)), events.put)
    finally:
        engine.close(0.0)
    one, other = sorted((event.answer for event in heard), key=lambda answer: answer.tokens[0] != 9)
    assert [one.tokens[place] for place, _ in given] == [token for _, token in given] and other.tokens != one.tokens
    assert other.trajectory.step[4:8].max() == 2 and (other.trajectory.step[4:8] == 2).sum() == 2
    told = [
        Answer(prompt, tuple(answer.tokens), answer.text, False, 1, 0, answer.trajectory, places)
        for answer, places in ((one, tuple(place for place, _ in given)), (other, ()))
    ]
    batch = collate(told, [0, 1], 4, END)
    assert batch.traced and not batch.scored[0, [3 + place for place, _ in given]].any()
    looks = TrajectoryLikelihood().draw(batch, policy.model.card, torch.Generator())
    scores = score(policy.model, batch, looks)
    assert torch.allclose(scores.sequence, batch.logp.sum(-1), atol=1e-9)


def test_an_engine_elsewhere_refuses_given_tokens():
    with pytest.raises(ConfigError, match="a server cannot write around"):
        refuse_given(Request(prompt="a", given=((0, 5),)), "a server")
    refuse_given(Request(prompt="a"), "a server")


# R3L


def right_and_wrong(policy, texts: list[str], problem: Problem, reward=None) -> Material:
    answers = [
        Answer(
            policy.encode(problem), (*policy.tokenizer(text, add_special_tokens=False).input_ids, END), text, True, 1, 0
        )
        for text in texts
    ]
    from hildanext.grading.gsm8k import Gsm8kReward
    from hildanext.rl.chunk import judged, told

    batch = collate(answers, [0] * len(texts), 4, END)
    answered = told(answers, [problem] * len(texts), [0] * len(texts))
    return Material(batch, judged(answered, [problem] * len(texts), Gsm8kReward() if reward is None else reward))


WRONG, RIGHT, AGAIN = "so 2+3=6\n#### 6", "so 2+3=5\n#### 5", "so 5 yes\n#### 5"


def test_r3l_makes_a_wrong_answer_again_from_its_fault(tmp_path):
    policy, problem = a_policy(), sums()
    sampler = Says(policy, [AGAIN])
    desk = a_desk(tmp_path, policy, sampler, problem)
    material = right_and_wrong(policy, [WRONG, RIGHT], problem)
    made = R3l().more(material, desk)
    (prompts, _, wishes), first = sampler.asked[0], len(policy.encode(problem))
    assert "2+3=6" in policy.tokenizer.decode(prompts[0]).replace(" ", "") and len(prompts[0]) > first
    assert [place for place, _ in wishes[0].given] == [0, 1, 2]
    assert [answer.reward for answer in made.answers] == [0.1, 1.1, 1.1] and made.batch.group.tolist() == [0, 0, 0]
    assert made.batch.prompt.tolist() == [first] * 3, "learnt under the prompt without the hint"
    assert made.batch.scored[2, first : first + 4].tolist() == [False, False, False, True]
    assert made.credited[:, first : first + 4].tolist() == [[False] * 3 + [True], [True] * 4, [True] * 4]
    assert made.figures == {"r3l_tried": 1, "r3l_better": 1, "r3l_right": 1, "r3l_no_room": 0}
    again = R3l().more(material, desk)
    assert len(sampler.asked) == 1 and again.answers == made.answers, "what was sampled is sampled again"


def test_r3l_tries_at_most_twice_and_keeps_the_last_attempt(tmp_path):
    policy, problem = a_policy(), sums()
    sampler = Says(policy, ["so 9=9\n#### 4"], ["no\n#### 8"])
    made = R3l(retries=2, hint=False).more(
        right_and_wrong(policy, [WRONG, RIGHT], problem), a_desk(tmp_path, policy, sampler, problem)
    )
    assert len(sampler.asked) == 2 and sampler.asked[0][0] == [policy.encode(problem)]
    assert [answer.text for answer in made.answers] == [WRONG, RIGHT, "no\n#### 8"]
    with pytest.raises(ConfigError, match="retries"):
        plugin({"name": "r3l", "retries": 3})


def test_v16_no_gradient_before_the_pivot(tmp_path):
    policy, problem = a_policy(), sums()
    desk = a_desk(tmp_path, policy, Says(policy, [AGAIN]), problem)
    made = R3l().more(right_and_wrong(policy, [WRONG, RIGHT], problem), desk)
    batch, card = credited(made.batch, made.credited), policy.model.card
    scores = score(policy.model, batch, BlockElbo(draws=2).draw(batch, card, torch.Generator().manual_seed(1)))
    scores.raw.retain_grad()
    advantage = torch.tensor([-0.25, 0.0, 3.0], dtype=torch.float64)
    inputs = PolicyInputs(scores, scores.detach(), None, advantage, torch.ones(3, dtype=torch.bool), batch.group)
    Espo().loss(inputs)[0].backward()
    first, gradient = int(batch.prompt[0]), scores.raw.grad
    assert (gradient[:, [0, 2], first : first + 3] == 0).all(), "both members of the pair"
    assert (gradient[:, 0, first + 3 :] != 0).any() and (gradient[:, 2, first + 3 :] != 0).any()
    assert batch.length.tolist() == [len(WRONG) + 1 - 3, len(RIGHT) + 1, len(AGAIN) + 1 - 3]


def test_r3l_imitates_the_guided_attempt_under_its_hint(tmp_path):
    policy, problem = a_policy(), sums()
    desk = a_desk(tmp_path, policy, Says(policy, [AGAIN, WRONG]), problem)
    material = right_and_wrong(policy, [WRONG, WRONG, RIGHT], problem)
    made = R3l(imitate=0.5).more(material, desk)
    assert made.lessons is not None and made.figures["r3l_imitated"] == 1, "one attempt stayed wrong"
    (prompts, *_), lesson = desk.sampler.asked[0], made.lessons.batch
    first = int(lesson.prompt[0])
    assert tuple(lesson.tokens[0, :first].tolist()) == prompts[0] and first > len(policy.encode(problem))
    assert lesson.scored[0, first : first + 4].tolist() == [False, False, False, True], "what was made anew alone"
    assert policy.tokenizer.decode(lesson.tokens[0, first : first + len(AGAIN)]) == AGAIN
    assert made.lessons.factor.tolist() == [0.5]
    plain = R3l().more(material, a_desk(tmp_path / "plain", policy, Says(policy, [AGAIN, WRONG]), problem))
    assert plain.lessons is None and "r3l_imitated" not in plain.figures
    assert torch.equal(plain.batch.tokens, made.batch.tokens) and torch.equal(plain.credited, made.credited)


def test_r3l_imitates_a_reflection_that_led_to_a_right_answer(tmp_path):
    policy, problem = a_policy(), sums()
    said = reflection(retry_from_step=1)
    sampler = Says(policy, [said, said], ["so 2+3=6\n#### 5", "so 2+3=6\n#### 7"])
    desk = a_desk(tmp_path, policy, sampler, problem)
    material = right_and_wrong(policy, [WRONG, WRONG, RIGHT], problem)
    tight = R3l(reflector="model", hint=False, imitate=1.0).more(material, desk)
    assert (tight.figures["r3l_imitated"], tight.figures["r3l_no_room"]) == (0, 1) and tight.lessons is None
    policy.model.causal_lm.config.max_position_embeddings = 1024
    made = R3l(reflector="model", hint=False, imitate=1.0).more(material, desk)
    assert made.figures["r3l_imitated"] == 1 and made.figures["r3l_no_room"] == 0 and len(made.lessons.answers) == 1
    batch, first = made.lessons.batch, int(made.lessons.batch.prompt[0])
    assert tuple(batch.tokens[0, :first].tolist()) == sampler.asked[0][0][0], "under the prompt that asked for it"
    ids = policy.tokenizer(said, add_special_tokens=False).input_ids
    assert batch.tokens[0, first : first + len(ids) + 1].tolist() == [*ids, END]
    assert int(batch.length[0]) == len(ids) + 1 and made.lessons.answers[0].text == said


def test_lessons_are_groups_behind_the_round_s(tmp_path):
    policy, problem = a_policy(), sums()
    desk = a_desk(tmp_path, policy, Says(policy, [AGAIN]), problem)
    made = R3l(imitate=0.5).more(right_and_wrong(policy, [WRONG, RIGHT], problem), desk)
    joined = Material.join([made, made])
    whole = joined.with_lessons(7)
    assert whole.batch.group.tolist() == [0, 0, 0] * 2 + [7, 8] and whole.lessons is None
    assert [answer.group for answer in whole.answers[-2:]] == [7, 8] and whole.factor.tolist() == [1.0] * 6 + [0.5] * 2
    assert whole.credited[6:].all() and whole.figures == joined.figures
    plain = right_and_wrong(policy, [WRONG], problem)
    assert plain.with_lessons(3) is plain and made.rows([0]).lessons is None


FAULTS = [
    (equation_fault, {}, "2+3=5, 5*2 = 11\n#### 11", "5*2 = 11"),
    (equation_fault, {}, "1.5+1.5=3, 10/4=2.5, 1,000-1=999, 2-1=2", "2-1=2"),
    (equation_fault, {}, "(2+3)*2=10 #### 10", None),
    (equation_fault, {}, "9**9=1", None),
    (equation_fault, {}, "1/0=1", None),
    (number_fault, {"numbers": [3, 5, 7], "target": 1}, "3+5+5", "5"),
    (number_fault, {"numbers": [3, 5, 7], "target": 1}, "#### 30*5-7", "30"),
    (number_fault, {"numbers": [3, 5], "target": 1}, "3*5", None),
    (cell_fault, {"puzzle": "1000000000000000"}, "1231432121433412", "1"),
    (cell_fault, {"puzzle": "1000000000000000"}, "2", "2"),
    (cell_fault, {"puzzle": "1000000000000000"}, "1234341221434321", None),
]


@pytest.mark.parametrize(
    ("rule", "row", "text", "at_fault"), FAULTS, ids=[f"{one[0].__name__} {one[2][:12]!r}" for one in FAULTS]
)
def test_the_verifier_finds_the_first_fault(rule, row, text, at_fault):
    fault = rule(row, text)
    assert text[fault.begin : fault.end] == (text if at_fault is None else at_fault) and fault.hint
    if rule is number_fault and at_fault == "5":
        assert fault.begin == 4, "the second 5 is one too many"


def test_kept_places_are_those_before_the_fault_or_all_others():
    tokenizer = characters()
    tokens = [*tokenizer("abcdef", add_special_tokens=False).input_ids, END]
    fault = Fault(2, 4, "")
    assert kept_places(tokenizer, (), tokens, fault, "suffix") == [0, 1]
    assert kept_places(tokenizer, (), tokens, fault, "fault") == [0, 1, 4, 5, 6]


def reflection(**changes) -> str:
    said = dict(zip(KEYS, ("a sum", "a slip", "failure", "count again", 1), strict=True)) | changes
    import json

    return "Here: " + json.dumps(said)


def test_a_reflection_is_read_whole_or_not_at_all():
    answer = "one\ntwo\nthree"
    assert read_reflection(reflection(), answer) == Fault(4, 13, "count again")
    assert (
        read_reflection(reflection(trajectory_outcome="success_but_inefficient", retry_from_step=0), answer).begin == 0
    )
    for change in ("success", "fine"):
        assert read_reflection(reflection(trajectory_outcome=change), answer) is None
    for bad in (
        {"retry_from_step": 3},
        {"retry_from_step": -1},
        {"retry_from_step": "1"},
        {"improvement_suggestion": " "},
    ):
        assert read_reflection(reflection(**bad), answer) is None
    assert read_reflection(reflection().replace("root_cause", "cause"), answer) is None
    assert read_reflection("no json {", answer) is None and read_reflection("{broken}", answer) is None


def test_the_model_reflects_and_what_it_said_is_kept(tmp_path):
    policy, problem = a_policy(), sums()
    sampler = Says(policy, [reflection(retry_from_step=1)], ["so 2+3=6\n#### 5"])
    desk = a_desk(tmp_path, policy, sampler, problem)
    material = right_and_wrong(policy, [WRONG, RIGHT], problem)
    made = R3l(reflector="model").more(material, desk)
    assert [answer.reward for answer in made.answers] == [0.1, 1.1, 1.1] and len(sampler.asked) == 2
    assert len(sampler.asked[1][2][0].given) == len("so 2+3=6\n")
    assert R3l(reflector="model").more(material, desk).answers == made.answers and len(sampler.asked) == 2


# LENS


def test_v17_numbers():
    assert count_of(0.03, 50) == 2 and count_of(0.02, 50) == 1
    right, purified = [True] * 2 + [False] * 6, [True] * 5 + [False] * 3
    count = replaced(right, purified)
    assert count == 5 and mixture_weights(right, count) == pytest.approx([0.25] * 2 + [0.75] * 6)
    assert replaced(right, [True] * 2 + [False] * 6) == 0, "not solved more often"
    assert replaced([False] * 4, [True] * 8) == 4


def test_v17_a_policy_that_is_its_reference_deletes_nothing(tmp_path):
    policy, problem = a_policy(), sums()
    policy.keep_reference()
    prompt = policy.encode(problem)
    (scores,) = interference(policy, [prompt], 7, torch.Generator().manual_seed(0))
    assert scores.shape == (len(prompt),) and (scores == 0).all()
    assert Lens(gamma=0.5).deleted(policy.tokenizer, prompt, problem.prompt, scores) == []
    desk = a_desk(tmp_path, policy, Says(policy), problem)
    material = right_and_wrong(policy, [WRONG, WRONG], problem)
    made = Lens(gamma=0.5).more(material, desk)
    assert made.answers == material.answers and made.factor is None and made.asked is None
    assert made.figures == {"lens_low": 1, "lens_purified": 0, "lens_replaced": 0}


def test_deletions_are_of_the_highest_score_and_keep_every_number():
    tokenizer, problem = characters(), "bob has 12 and 7 apples so how many"
    prompt = tokenizer(problem, add_special_tokens=False).input_ids
    scores = torch.linspace(5.0, 0.1, len(prompt), dtype=torch.float64)
    gone = Lens(gamma=0.3).deleted(tokenizer, prompt, problem, scores)
    allowed = deletable(tokenizer, prompt, problem)
    text = "".join(character for place, character in enumerate(problem) if place not in gone)
    assert len(gone) == count_of(0.3, len(prompt)) and all(allowed[place] for place in gone)
    assert numbers_in(text) == numbers_in(problem) and "12" in text and "7" in text
    assert gone == sorted(gone) and gone[0] == 1, "the highest of those that may go"
    lowest = Lens(gamma=0.1, score="absolute").deleted(tokenizer, prompt, problem, -scores)
    assert lowest == Lens(gamma=0.1).deleted(tokenizer, prompt, problem, scores)
    assert Lens(gamma=0.1).deleted(tokenizer, prompt, problem, -scores) == [], "signed: none is above 0"


def test_no_deletion_joins_two_numbers():
    tokenizer, problem = characters(), "a 1 2 b"
    prompt = tokenizer(problem, add_special_tokens=False).input_ids
    scores = torch.ones(len(prompt), dtype=torch.float64)
    assert 3 not in Lens(gamma=0.5).deleted(tokenizer, prompt, problem, scores)


def test_what_is_protected():
    tokenizer = characters()
    problem = "ann has two pens. give the answer behind ####. so how much is it"
    prompt = tokenizer("hello " + problem, add_special_tokens=False).input_ids
    allowed = deletable(tokenizer, prompt, problem)
    text = "hello " + problem
    kept = "".join(c for c, may in zip(text, allowed, strict=True) if not may)
    assert (
        kept == "hello two give the answer behind ####." or kept.replace(" ", "") == "hellotwogivetheanswerbehind####."
    )
    assert deletable(tokenizer, prompt, "another problem") is None


def test_crpo_learns_the_purified_successes_under_the_original_prompt(tmp_path, monkeypatch):
    policy, problem = a_policy(), sums()
    policy.keep_reference()
    monkeypatch.setattr(
        lens_module,
        "interference",
        lambda policy, prompts, parts, generator: [torch.ones(len(p), dtype=torch.float64) for p in prompts],
    )
    texts = [RIGHT] * 2 + [WRONG] * 6
    sampler = Says(policy, [RIGHT] * 5 + [WRONG] * 3)
    desk = a_desk(tmp_path, policy, sampler, problem)
    made = Lens().more(right_and_wrong(policy, texts, problem), desk)
    shown = sampler.asked[0][0][0]
    assert len(shown) == len(policy.encode(problem)) - 1
    assert made.batch.prompt.tolist() == [len(policy.encode(problem))] * 8
    assert [answer.reward for answer in made.answers] == [1.1, 1.1, 0.1, *[1.1] * 5]
    assert made.asked == (None,) * 3 + (shown,) * 5
    assert (1 / made.factor).tolist() == pytest.approx([0.25, 0.25, 0.75, *[0.75] * 5])
    assert made.figures == {"lens_low": 1, "lens_purified": 1, "lens_replaced": 5}
    again = Lens().more(right_and_wrong(policy, texts, problem), a_desk(tmp_path, policy, sampler, problem))
    assert again.asked == made.asked and len(sampler.asked) == 1


def test_an_answer_moved_behind_its_own_prompt_scores_the_same_and_behind_another_as_it_does_there():
    policy, problem = a_policy(), sums()
    made = right_and_wrong(policy, [RIGHT, WRONG], problem)
    card, prompt = policy.model.card, policy.encode(problem)
    looks = BlockElbo().draw(made.batch, card, torch.Generator().manual_seed(0))
    raw = score(policy.model, made.batch, looks).raw.detach()
    away = moved(made.batch, looks, [None, prompt])
    there = score(policy.model, away.batch, away.looks).raw.detach()
    assert torch.allclose(away.back(there, raw), raw, atol=1e-12)
    other = moved(made.batch, looks, [None, prompt[:-3]])
    changed = other.back(score(policy.model, other.batch, other.looks).raw.detach(), raw)
    assert torch.equal(changed[:, 0], raw[:, 0]) and not torch.allclose(changed[:, 1], raw[:, 1])
    assert torch.equal(changed != 0, raw != 0), "the same tokens are read"


@pytest.mark.parametrize("alignment", ["parent", "block"])
def test_a_purified_answer_is_replayed_under_the_original_prompt_where_blocks_are_cut_alike(alignment, tmp_path):
    """CRPO's ratio of each action: under the original prompt to what the sampler recorded under the other."""
    policy, problem = a_policy(alignment), sums("bob has two red and 3 so what is it")
    prompt = policy.encode(problem)
    sampler = EngineRollouts(max_new_tokens=9, per_step=2, slots=4).open(policy, "FULL")
    try:
        desk = replace(a_desk(tmp_path, policy, sampler, problem), replays=True)
        asks = [Ask(problem, 0, seed, prompt, shown) for seed, shown in ((1, prompt[4:]), (2, prompt[3:]), (3, None))]
        batch = desk.answers("lens", asks)[0].batch
        same = replace(desk, replays=False).answers("other", asks)[0].batch
    finally:
        sampler.close()
    known = (batch.step >= 0).any(-1)
    assert known.tolist() == [True, False, True] and (same.step >= 0).any(-1).tolist() == [False, False, True]
    assert torch.equal(batch.scored, same.scored)
    batch = batch.rows([0, 2])
    looks = TrajectoryLikelihood().draw(batch, policy.model.card, torch.Generator())
    here = score(policy.model, batch, looks, actions=True).raw.detach()
    away = moved(batch, looks, [prompt[4:], None])
    there = away.back(score(policy.model, away.batch, away.looks, actions=True).raw.detach(), here)
    assert torch.allclose(there.sum(0), batch.logp, rtol=0, atol=1e-9), "what the sampler did, where it did it"
    assert torch.equal(here[:, 1], there[:, 1]) and not torch.allclose(here[:, 0], there[:, 0], atol=1e-4)


def test_under_steps_so_many_tokens_go_that_whole_blocks_do(tmp_path, monkeypatch):
    tokenizer, problem = characters(), "bob has 12 and 7 apples so how many"
    prompt = tokenizer(problem, add_special_tokens=False).input_ids
    scores = torch.linspace(5.0, 0.1, len(prompt), dtype=torch.float64)
    assert len(Lens(gamma=0.03).deleted(tokenizer, prompt, problem, scores)) == 2
    four = Lens(gamma=0.03).deleted(tokenizer, prompt, problem, scores, by=4)
    assert len(four) == 4 and four[:2] == Lens(gamma=0.03).deleted(tokenizer, prompt, problem, scores)
    few = torch.where(torch.arange(len(prompt)) < 4, 1.0, -1.0).double()
    assert Lens(gamma=0.03).deleted(tokenizer, prompt, problem, few, by=4) == [], "three may go, and four must"
    policy, problem = a_policy(), sums()
    policy.keep_reference()
    ones = lambda policy, prompts, parts, generator: [torch.ones(len(p), dtype=torch.float64) for p in prompts]  # noqa: E731
    monkeypatch.setattr(lens_module, "interference", ones)
    sampler = Says(policy, [RIGHT] * 2, traced=True)
    desk = replace(a_desk(tmp_path, policy, sampler, problem), replays=True)
    made = Lens().more(right_and_wrong(policy, [WRONG] * 2, problem), desk)
    assert len(sampler.asked[0][0][0]) == len(policy.encode(problem)) - 4
    assert made.batch.rows([0, 1]).traced and made.figures["lens_replaced"] == 2
    assert made.batch.prompt.tolist() == [len(policy.encode(problem))] * 2


def test_without_plugins_material_is_the_batch():
    policy, problem = a_policy(), sums()
    made = right_and_wrong(policy, [RIGHT, WRONG, AGAIN], problem)
    joined = Material.join([made])
    for name in ("tokens", "scored", "after", "document", "position", "step", "group"):
        assert torch.equal(getattr(joined.batch, name), getattr(made.batch, name))
    assert (joined.credited, joined.factor, joined.asked, joined.look) == (None,) * 4
