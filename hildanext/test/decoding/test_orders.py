"""Orders: which masks are filled, and whether what is recorded is the log-probability of what was done."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations, product
from typing import get_args

import pytest
import torch

from conftest import random_model
from decoding_stubs import MASK, VOCAB, ScriptedModel
from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.decoding import Canvas, Ordered, make_decoder
from hildanext.decoding.base import RowFacts
from hildanext.decoding.orders import ORDERS
from hildanext.inference import GenerationConfig, generate

Law = Callable[[list[int]], list[float]]
"""P(token 1) at each position of a block that holds 0, 1 and masks."""

BOS = 20


class Binary(ScriptedModel):
    """Blocks of zeros and ones, by a law; the prompt is one whole block."""

    def __init__(self, law: Law, size: int) -> None:
        super().__init__(lambda tokens, position: [(0, one) for one in law(tokens)], size)

    def logits(self, hidden):
        one = hidden[:, 1]
        logits = torch.full((len(hidden), VOCAB), float("-inf"), dtype=torch.float64)
        logits[:, 0], logits[:, 1] = (1 - one).log(), one.log()
        return logits


def two_coins(tokens: list[int]) -> list[float]:
    """Independent positions, (0.6, 0.4) and (0.55, 0.45)."""
    return [0.4, 0.45]


def entangled(tokens: list[int]) -> list[float]:
    """Every position depends on what is visible elsewhere, and one order says other things than another."""
    ones, zeros = tokens.count(1), tokens.count(0)
    return [1 / (1 + math.exp(-(0.5 - 0.6 * at + 1.4 * ones - 0.9 * zeros * (at + 1)))) for at in range(3)]


def all_paths(law: Law, size: int) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """Random order, one mask a step: probability of each order (of positions) with each text."""
    paths = {}
    for order, text in product(permutations(range(size)), product((0, 1), repeat=size)):
        state, p = [MASK] * size, 1 / math.factorial(size)
        for place in order:
            one = law(state)[place]
            state[place] = text[place]
            p *= one if text[place] else 1 - one
        paths[order, text] = p
    return paths


def fresh_draws(law: Law, size: int) -> dict[tuple[int, ...], float]:
    """LLaDA's sampler, one mask a step: every mask draws anew in every step and the likeliest draw stays."""

    def steps(state: tuple[int, ...], p: float) -> Iterator[tuple[tuple[int, ...], float]]:
        masks = [place for place in range(size) if state[place] == MASK]
        if not masks:
            yield state, p
            return
        one = law(list(state))
        for drawn in product((0, 1), repeat=len(masks)):
            chance = {place: one[place] if token else 1 - one[place] for place, token in zip(masks, drawn, strict=True)}
            place = max(masks, key=lambda place: (chance[place], -place))
            after = (*state[:place], drawn[masks.index(place)], *state[place + 1 :])
            yield from steps(after, p * math.prod(chance.values()))

    texts: Counter[tuple[int, ...]] = Counter()
    for text, p in steps((MASK,) * size, 1.0):
        texts[text] += p
    return dict(texts)


@config
class FreshConfidence(Ordered):
    """By confidence, with candidates that are drawn anew in every step: what is not offered."""

    order: str = "confidence"

    def edit(self, logits, where, canvas):
        drawn = torch.rand(canvas.uniform.shape, generator=GENERATOR, dtype=torch.float64)
        return super().edit(logits, where, replace(canvas, uniform=drawn))


GENERATOR = torch.Generator()


def drawn(law: Law, size: int, decoder, count: int = 4000):
    """The order (by step, from the left inside a step), the text and the recorded log p of `count` blocks."""
    settings = GenerationConfig(max_new_tokens=size, batch_size=500)
    answers = generate(Binary(law, size), None, [[BOS] * size] * count, decoder, settings, trajectories=True)
    for answer in answers:
        kept = answer.trajectory
        order = sorted(range(size), key=lambda place: (kept.step[size + place], place))
        yield tuple(order), tuple(answer.tokens), float(kept.logp.sum())


def chi_square(seen: Counter, wanted: dict) -> float:
    """As a standard normal number (Wilson and Hilferty's cube root): 3 or less where `seen` is drawn by `wanted`."""
    total, degrees = seen.total(), len(wanted) - 1
    assert sum(wanted.values()) == pytest.approx(1.0) and seen.keys() <= wanted.keys()
    statistic = sum((seen[cell] - total * p) ** 2 / (total * p) for cell, p in wanted.items())
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - 1 + spread) / math.sqrt(spread)


def test_v23_fresh_draws_by_confidence_are_not_the_law_of_what_they_draw():
    """0.462, 0.378, 0.088, 0.072: the first position is 0 with 0.84 where its law says 0.6."""
    texts = fresh_draws(two_coins, 2)
    assert [round(texts[text], 12) for text in product((0, 1), repeat=2)] == [0.462, 0.378, 0.088, 0.072]
    assert texts[0, 0] + texts[0, 1] == pytest.approx(0.84)


def test_v23_random_order_reproduces_exp_of_the_recorded_log_p():
    """Of every order and text of an enumerable model, and the recorded number is the path's own."""
    wanted = all_paths(entangled, 3)
    seen: Counter = Counter()
    for order, text, logp in drawn(entangled, 3, Ordered(temperature=1.0)):
        seen[order, text] += 1
        assert math.exp(logp) / 6 == pytest.approx(wanted[order, text], rel=1e-6)
    assert len(wanted) == 48 and chi_square(seen, wanted) < 3


def test_v23_from_left_to_right_the_recorded_log_p_is_the_text_s_own():
    texts: Counter = Counter()
    for (order, text), p in all_paths(entangled, 3).items():
        texts[text] += 6 * p * (order == (0, 1, 2))
    seen: Counter = Counter()
    for order, text, logp in drawn(entangled, 3, Ordered(order="left_to_right", temperature=1.0), 1500):
        seen[text] += 1
        assert order == (0, 1, 2) and math.exp(logp) == pytest.approx(texts[text], rel=1e-6)
    assert chi_square(seen, texts) < 3


def test_v23_fresh_draws_by_confidence_do_not_and_candidates_that_last_for_the_block_do_on_a_product():
    law = {text: (0.4 if text[0] else 0.6) * (0.45 if text[1] else 0.55) for text in product((0, 1), repeat=2)}
    GENERATOR.manual_seed(11)
    fresh, ours = Counter(), Counter()
    for _, text, logp in drawn(two_coins, 2, FreshConfidence(temperature=1.0), 2000):
        fresh[text] += 1
        assert math.exp(logp) == pytest.approx(law[text], rel=1e-6)
    assert chi_square(fresh, law) > 15 and chi_square(fresh, fresh_draws(two_coins, 2)) < 3
    for _, text, _ in drawn(two_coins, 2, Ordered(order="confidence", temperature=1.0), 2000):
        ours[text] += 1
    assert chi_square(ours, law) < 3


def test_several_masks_a_step_are_one_action_whose_log_p_is_recorded():
    """Two of three masks in the first step: the law of both is that of the empty block."""
    wanted: Counter = Counter()
    for first, text in product(range(3), product((0, 1), repeat=3)):
        one = entangled([MASK] * 3)
        pair = [place for place in range(3) if place != first]
        last = entangled([MASK if place == first else text[place] for place in range(3)])
        chances = [one[place] if place in pair else last[place] for place in range(3)]
        wanted[first, text] = math.prod(p if token else 1 - p for p, token in zip(chances, text, strict=True)) / 3
    seen: Counter = Counter()
    for order, text, logp in drawn(entangled, 3, Ordered(per_step=2, temperature=1.0), 2000):
        seen[order[2], text] += 1
        assert math.exp(logp) / 3 == pytest.approx(wanted[order[2], text], rel=1e-6)
    assert chi_square(seen, wanted) < 3


def canvas(count: int, seed: int = 0, start: int = 0, size: int = 4) -> Canvas:
    shape = (count, size)
    masked = torch.ones(shape, dtype=torch.bool)
    rows = tuple(RowFacts(seed + row, start, False) for row in range(count))
    tokens = torch.full(shape, MASK)
    return Canvas(tokens, masked, ~masked, torch.zeros(shape), torch.zeros(count, dtype=torch.long), rows)


def test_random_keys_are_of_the_row_and_the_block_and_every_order_is_as_likely():
    rank = ORDERS["random"]().rank
    every = rank(canvas(3000), None)
    assert torch.equal(every[5], rank(canvas(1, 5), None)[0]), "whoever else is decoded"
    assert not torch.equal(every[0], rank(canvas(1, 0, 4), None)[0]), "another block, another order"
    orders = Counter(tuple(row) for row in every.argsort(-1).tolist())
    assert chi_square(orders, dict.fromkeys(permutations(range(4)), 1 / 24)) < 3


def test_random_keys_are_no_draws_of_tokens():
    """A position that comes late is no likelier to be an unlikely token: both streams are independent."""
    model, decoder = Binary(lambda tokens: [0.5] * 4, 4), Ordered(temperature=1.0)
    settings = GenerationConfig(
        max_new_tokens=3, batch_size=500
    )  # of the first block, whose keys are the stream's first
    answers = generate(model, None, [[BOS]] * 1000, decoder, settings, trajectories=True)
    seen = Counter(
        (int(step), token)
        for answer in answers
        for step, token in zip(answer.trajectory.step[1:], answer.tokens, strict=True)
    )
    assert chi_square(seen, dict.fromkeys(product(range(3), (0, 1)), 1 / 6)) < 3


@pytest.mark.parametrize(("order", "first"), [("left_to_right", [0, 1]), ("confidence", [1, 2]), ("random", None)])
def test_an_order_takes_so_many_masks_and_reads_no_other_where_it_can(order, first):
    state = canvas(1)
    logits = torch.zeros(4, VOCAB, dtype=torch.float64)
    logits[torch.arange(4), 7] = torch.tensor([1.0, 3.0, 2.0, 0.5], dtype=torch.float64)
    decoder = Ordered(order=order, per_step=2)
    where = decoder.needs(state)
    assert int(where.sum()) == (4 if order == "confidence" else 2)
    edit = decoder.edit(logits[where[0]], where, state)
    assert int(edit.write.sum()) == 2 and not edit.final and edit.tokens[edit.write].tolist() == [7, 7]
    if first is not None:
        assert edit.write[0].nonzero()[:, 0].tolist() == first
    assert decoder.biased is (order == "confidence")


def test_fixed_and_filled_positions_are_no_masks():
    state = canvas(1)
    masked = torch.tensor([[False, True, True, False]])
    state = replace(state, masked=masked)
    decoder = Ordered(order="left_to_right", per_step=3)
    assert torch.equal(decoder.needs(state), masked)
    assert bool(decoder.edit(torch.zeros(2, VOCAB), masked, state).final)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_an_order_writes_alone_what_it_writes_in_company(order, alignment):
    """With and without the cache, one row and several; nothing is ever edited; the flag travels."""
    model = random_model("llama", alignment, 4, seed=2)
    decoder = Ordered(order=order, per_step=2, temperature=0.9)
    prompts = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]
    settings = GenerationConfig(max_new_tokens=9)
    together = generate(model, None, prompts, decoder, settings, trajectories=True)
    for number, prompt in enumerate(prompts):
        alone = GenerationConfig(max_new_tokens=9, seed=number, cached=False)
        (answer,) = generate(model, None, [prompt], decoder, alone, trajectories=True)
        kept = together[number].trajectory
        assert answer.tokens == together[number].tokens and answer.trajectory.step.tolist() == kept.step.tolist()
        assert kept.biased is (order == "confidence") and len(kept.edits) == 0
        starts = range(len(prompt) // 4 * 4, len(kept.tokens), 4)
        for start in starts:
            masks = kept.step[start : start + 4]
            assert all((masks == step).sum() <= 2 for step in range(3))


def test_the_knob_offers_what_the_table_has():
    assert set(get_args(Ordered.__pydantic_fields__["order"].annotation)) == set(ORDERS)
    assert {order: ORDERS[order].biased for order in ORDERS} == {
        "random": False,
        "left_to_right": False,
        "confidence": True,
    }
    for wrong in ({"order": "entropy"}, {"per_step": 0}, {"order": "fresh"}):
        with pytest.raises(ConfigError, match="order" if "order" in wrong else "per_step"):
            make_decoder({"name": "ordered", **wrong})
