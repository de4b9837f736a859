"""Exact decoding writes what the parent writes: verdicts, caches, ends, in every setting and on every road."""

import itertools

import pytest
import torch

from exact_stubs import Always, StubDrafter, started
from hildanext.ar import Parent
from hildanext.core.errors import ConfigError, LogitsNotFinite
from hildanext.decoding.exact.expected import Placement, all_points, last_point
from hildanext.decoding.exact.ngram import look_up
from hildanext.decoding.exact.policy import ExactConfig, Placing
from hildanext.decoding.exact.row_costs import RowCosts
from hildanext.decoding.exact.state import ExactState
from hildanext.decoding.sequence import Step
from hildanext.exact import ExactStats, generate_exact, placing_for
from hildanext.inference import GenerationConfig
from hildanext.kv_cache import BlockCache
from hildanext.kv_cache.draft_attention import DraftAttention, DraftSegment
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import AdapterGroup, Gate, GatedLinear, GatedLoraConfig
from hildanext.models.sampling import law
from small_models import small_causal, small_tokenizer

PROMPTS = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14, 20, 21]]
A, B, X, EOS = 11, 12, 13, 1


def trained(
    enter: int = 0,
    places: int = 3,
    dtype: torch.dtype = torch.float64,
    family: str = "qwen3",
    sampler: int | None = None,
    vocabulary: int | None = None,
) -> Drafter:
    """A drafter whose adapters say something, right or wrong."""
    lora = GatedLoraConfig(rank=4)
    causal_lm = small_causal(family).to(dtype)
    drafter = Drafter(causal_lm, lora, places, enter, sampler=sampler, vocabulary=vocabulary).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return drafter.eval()


def parents_text(drafter: Drafter, new: int) -> list[list[int]]:
    """Of the weights as they were before they got adapters."""
    parent = Parent(small_causal("qwen3").to(drafter.dtype), None)
    return [parent.generate(prompt, new, stop_ids=[]).tokens for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("points", "drafts_next"), [((0,), []), ((1,), [A, X]), ((0, 1, 2), [A, X])], ids=["before", "there", "everywhere"]
)
def test_the_first_wrong_draft_becomes_the_parents_token_and_the_rest_is_forgotten(
    points: tuple[int, ...], drafts_next: list[int]
) -> None:
    """EX-1: the parent says A and then B where A and X were drafted."""
    steps: list[Step] = []
    drafter = StubDrafter(lambda _, token: {4: 5, 5: A, A: B, X: X}[token], lambda anchor, place: (A, X)[place])
    state, row = started(drafter, Always(Placement(2, points)), [4, 5], 20, observe=steps.append)
    row.drafts = [A, X]
    state.step()
    assert row.tokens == [4, 5, A, B]
    assert row.cache.length == 3, "the keys of 4, 5 and A stay; those of X do not, and B has none yet"
    assert row.drafts == drafts_next
    assert (row.edits, row.offered, row.confirmed) == (1, [1, 1], [1, 0])
    assert [(at, token) for at, token, _ in steps[0].drafts] == [(2, A)]
    assert [(at, old, new) for at, old, new, _ in steps[0].edits] == [(3, X, B)]


def test_nothing_behind_an_end_of_text_is_written() -> None:
    """EX-2: EOS and A are drafted, and the parent says EOS."""
    drafter = StubDrafter(lambda _, token: {4: 5, 5: EOS, EOS: A, A: A}[token], lambda anchor, place: (EOS, A)[place])
    drafter.causal_lm.generation_config.eos_token_id = EOS
    (result,) = generate_exact(
        drafter, small_tokenizer(), [[4, 5]], ExactConfig(after="all"), GenerationConfig(max_new_tokens=8),
        Always(all_points(2)),
    )  # fmt: skip
    assert (result.tokens, result.finish_reason) == ([EOS], "eos")


@pytest.mark.parametrize(("right", "expected"), [(False, 1.0), (True, 3.0)], ids=["always wrong", "always right"])
def test_tokens_per_forward_lie_between_one_and_drafts_plus_one(right: bool, expected: float) -> None:
    """EX-6."""
    drafter = StubDrafter(
        lambda position, _: (position + 1) % 60, lambda anchor, place: (anchor + 2 + place) % 60 if right else 63
    )
    state, row = started(drafter, Always(all_points(2)), [0], 61)
    state.step()  # without drafts yet
    begin = len(row.tokens)
    for _ in range(10):
        state.step()
    assert row.tokens == [at % 60 for at in range(len(row.tokens))]
    assert (len(row.tokens) - begin) / 10 == expected


@pytest.mark.parametrize("enter", [0, 1])
def test_adapters_change_no_clean_row(enter: int) -> None:
    """EX-7: fp64, exactly equal in the same batch of rows, whatever the adapters hold."""
    drafter = trained(enter)
    cache = BlockCache.of_causal(drafter.causal_lm, 32)
    segment = DraftSegment(0, 4, (0, 3), 3)
    tokens, index = torch.tensor([[3, 4, 5, 6]]), torch.tensor(segment.anchors)
    places = torch.tensor([0, 1, 2, 0, 1, 2])
    positions = torch.tensor([sum(segment.positions, [])])

    def states() -> torch.Tensor:
        return drafter(tokens, index, places, positions, DraftAttention([cache], [segment]))[0]

    with torch.no_grad():
        adapted = states()
        for name, parameter in drafter.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        plain = states()
    assert torch.equal(adapted[:4], plain[:4])
    assert not torch.equal(adapted[4:], plain[4:]), "the masks are adapted, or this test says nothing"


@pytest.mark.parametrize("placement", [all_points(3), last_point(2), Placement(3, (0, 2))], ids=str)
@pytest.mark.parametrize("enter", [0, 1])
def test_the_cache_is_that_of_a_clean_prefill_of_the_text(placement: Placement, enter: int) -> None:
    """EX-8: after every forward, whatever was refused on the way."""
    drafter = trained(enter)
    state, row = started(drafter, Always(placement), PROMPTS[2], 40)
    while state.rows:
        state.step()
        length = row.cache.length
        assert length == len(row.tokens) - 1
        fresh = BlockCache.of_causal(drafter.causal_lm, length)
        with torch.no_grad():
            drafter.clean(
                torch.tensor([row.tokens[:length]]), torch.arange(length)[None],
                DraftAttention([fresh], [DraftSegment(0, length, (), 0)]),
            )  # fmt: skip
        for mine, wanted in ((row.cache.keys, fresh.keys), (row.cache.values, fresh.values)):
            torch.testing.assert_close(mine[:, :, :length], wanted[:, :, :length], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", [None, 5])
@pytest.mark.parametrize(
    ("after", "drafter_name", "batch", "dtype"),
    [
        *((after, "adapters", batch, torch.float64) for after in ("all", "last", "auto") for batch in (1, 3)),
        *(("all", name, 3, torch.float64) for name in ("ngram", "both", "none")),
        *((after, "both", 3, torch.float32) for after in ("all", "last", "auto")),
    ],
)
def test_the_text_is_the_parents_in_every_setting(
    after: str, drafter_name: str, batch: int, dtype: torch.dtype, sampler: int | None
) -> None:
    drafter = trained(enter=1, dtype=dtype, sampler=sampler)
    config = ExactConfig(after=after, drafter=drafter_name)
    placing = Placing(config, 3, (0.6, 0.4, 0.2), RowCosts({1: 1.0, 8: 1.2, 32: 1.6}))
    settings = GenerationConfig(max_new_tokens=40, batch_size=batch)
    results = generate_exact(drafter, None, PROMPTS, config, settings, placing)
    assert [result.tokens for result in results] == parents_text(drafter, 40)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_a_gradient_adapters_say_what_they_say_in_training(dtype: torch.dtype) -> None:
    """Of rows behind clean ones, of noisy rows alone, and in several documents; clean rows are the base's."""
    base = torch.nn.Linear(8, 6, bias=False).to(dtype).requires_grad_(False)
    gate = Gate()
    layer = GatedLinear(base, gate, GatedLoraConfig(rank=2), AdapterGroup())
    generator = torch.Generator().manual_seed(0)
    for part in (base.weight, layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(part, generator=generator)
    rows = torch.randn(2, 5, 8, generator=generator).to(dtype)
    for clean in (0, 2):
        with gate.after(clean):
            wanted = layer(rows)
            with torch.no_grad():
                got = layer(rows)
        assert wanted.requires_grad and torch.equal(got[:, :clean], base(rows)[:, :clean])
        assert torch.allclose(
            got, wanted, rtol=1e-12 if dtype == torch.float64 else 0.05, atol=0.25 * (dtype != torch.float64)
        )
        assert not torch.equal(got[:, clean:], base(rows)[:, clean:])


@pytest.mark.parametrize("sampler", [None, 5])
def test_drafts_are_of_the_draft_vocabulary_and_the_text_is_still_the_parents(sampler: int | None) -> None:
    drafter = trained(sampler=sampler, vocabulary=9)
    assert drafter.draft_tokens is not None
    drafter.draft_tokens.copy_(torch.arange(9) * 7 + 2)
    state, row = started(drafter, Always(all_points(3)), PROMPTS[0], 4 + 40)
    drafted = set()
    while state.rows:
        state.step()
        drafted.update(row.drafts)
    assert len(drafted) > 1 and drafted <= set(drafter.draft_tokens.tolist())
    assert row.tokens[4:44] == parents_text(drafter, 40)[0]


def test_a_shortlist_is_the_likeliest_of_the_draft_vocabulary_with_its_rows_of_the_matrix() -> None:
    drafter = trained(vocabulary=9)
    assert drafter.draft_tokens is not None
    drafter.draft_tokens.copy_(torch.arange(9) * 7 + 2)
    hidden = torch.randn(2, 3, drafter.head.shape[1], dtype=torch.float64)
    with torch.no_grad():
        ids, rows = drafter.shortlist(hidden, 4)
        every = drafter.logits(hidden)[..., drafter.draft_tokens]
    assert torch.equal(ids, drafter.draft_tokens[every.topk(4, -1).indices])
    assert torch.equal(rows, drafter.head[ids])
    assert torch.equal(ids[..., 0], drafter.most_probable(drafter.logits(hidden)))
    drafter.draft_tokens.copy_(torch.arange(9))  # what was made of the tokens before is not kept
    assert drafter.shortlist(hidden, 9)[0].max() == 8


def test_each_draft_is_told_the_token_before_it_and_the_first_one_the_parents() -> None:
    """What follows the drafts of a forward, against the states of its own mask rows, told by hand."""
    drafter = trained(sampler=5)
    assert drafter.sampler is not None
    with torch.no_grad():
        drafter.sampler.up.normal_(generator=torch.Generator().manual_seed(0))
    differs = False
    state, row = started(drafter, Always(all_points(3)), PROMPTS[0], 40)
    states: list[torch.Tensor] = []
    network = state.network
    forward = network.forward
    network.forward = lambda *fed: states.append(forward(*fed)) or states[-1]  # type: ignore[method-assign]
    for _ in range(4):
        clean = 1 + len(row.drafts)
        before, tokens = list(row.drafts), len(row.tokens)
        state.step()
        accepted = len(row.tokens) - tokens - 1
        group = states[-1][clean + accepted * 3 :][:3] if before else states[-1][clean:]
        told, expected = row.tokens[-1], []
        for place in group:
            told = int(drafter.logits(drafter.told(place, torch.tensor(told))).argmax())
            expected.append(told)
        assert row.drafts == expected
        differs |= drafter.logits(group).argmax(-1).tolist() != expected
    assert differs, "the head must matter for this to show anything"


@pytest.mark.parametrize("after", ["all", "last"])
def test_with_fixed_rows_every_forward_has_as_many_and_the_text_is_still_the_parents(after: str) -> None:
    drafter = trained()
    config = ExactConfig(after=after, fixed_rows=True)
    (result, *_) = results = generate_exact(
        drafter, None, PROMPTS, config, GenerationConfig(max_new_tokens=40, batch_size=1)
    )
    assert [each.tokens for each in results] == parents_text(drafter, 40)
    rows = (all_points(3) if after == "all" else last_point(3)).rows
    assert isinstance(result.stats, ExactStats) and result.stats.rows == rows * result.stats.denoise_forwards


def test_between_forwards_the_weights_are_the_parent_whatever_the_adapters_hold() -> None:
    drafter = trained()
    generate_exact(drafter, None, PROMPTS[:1], ExactConfig(after="all"), GenerationConfig(max_new_tokens=4))
    parent = Parent(drafter.causal_lm, None)
    assert [parent.generate(prompt, 20, stop_ids=[]).tokens for prompt in PROMPTS] == parents_text(drafter, 20)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_parent_without_finite_logits_is_an_error(temperature: float) -> None:
    drafter = trained()
    with torch.no_grad():
        drafter.causal_lm.model.norm.weight.fill_(float("nan"))
    with pytest.raises(LogitsNotFinite, match="autoregressive parent"):
        generate_exact(drafter, None, PROMPTS[:1], ExactConfig(after="all", temperature=temperature))


def test_a_row_may_leave_and_others_go_on_with_the_parents_text() -> None:
    drafter = trained()
    state = ExactState(
        drafter, ExactConfig(after="all"), Always(all_points(3)), lambda row: len(row.tokens) >= row.limit
    )
    rows = [state.row(prompt, len(prompt) + 30, 0, number) for number, prompt in enumerate(PROMPTS)]
    for row in rows[:2]:
        state.prefill(row)
    for _ in range(4):
        state.step()
    state.rows.remove(rows[0])
    state.prefill(rows[2])
    while state.rows:
        state.step()
    texts = parents_text(drafter, 30)
    for row, text in zip(rows[1:], texts[1:], strict=True):
        assert row.tokens[row.prompt : row.limit] == text


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("sample_drafts", "sampler", "vocabulary"),
    [(False, None, None), (True, None, None), (True, 5, None), (True, 5, 3)],
    ids=["greedy drafts", "sampled drafts", "sampled drafts that know", "and cannot say all"],
)
def test_sampled_text_has_the_parents_law(
    sample_drafts: bool, sampler: int | None, vocabulary: int | None, count: int
) -> None:
    """EX-9 as a whole: draws of three tokens from a vocabulary of four, by chi-square."""
    small = small_causal("qwen3", rows=4, initializer_range=0.2).double()
    drafter = Drafter(small, GatedLoraConfig(rank=2), 2, sampler=sampler, vocabulary=vocabulary).double().eval()
    with torch.no_grad():
        if drafter.draft_tokens is not None:
            drafter.draft_tokens.copy_(torch.tensor([0, 2, 3]))
        drafter.place_vectors.normal_(generator=torch.Generator().manual_seed(0))
        if drafter.sampler is not None:
            drafter.sampler.up.normal_(generator=torch.Generator().manual_seed(0))
    config = ExactConfig(after="all", temperature=2.0, top_p=0.8, sample_drafts=sample_drafts)
    prompt = [0, 3]
    state = ExactState(drafter, config, Always(all_points(2)), lambda row: len(row.tokens) >= row.limit)
    seen: dict[tuple[int, ...], int] = {}
    for first in range(0, count, 500):
        rows = [state.row(prompt, 5, seed, seed) for seed in range(first, first + 500)]
        for row in rows:
            state.prefill(row)
        while state.rows:
            state.step()
        for row in rows:
            text = tuple(row.tokens[2:5])
            seen[text] = seen.get(text, 0) + 1
    expected = _law(drafter, config, prompt)
    assert seen.keys() <= expected.keys(), "a text that the parent cannot write"
    often = {text: chance for text, chance in expected.items() if chance * count >= 5}
    square = sum((seen.get(text, 0) - count * chance) ** 2 / (count * chance) for text, chance in often.items())
    degrees = len(often) - 1
    assert degrees >= 8
    assert square < degrees + 4.0 * (2.0 * degrees) ** 0.5, "more than four deviations of the chi-square law"


def _law(drafter: Drafter, config: ExactConfig, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """The parent's chances of the next three tokens."""
    chances: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(4), repeat=3):
        tokens = torch.tensor([[*prompt, *text[:2]]])
        cache = BlockCache.of_causal(drafter.causal_lm, 8)
        with torch.no_grad():
            hidden = drafter.clean(tokens, torch.arange(4)[None], DraftAttention([cache], [DraftSegment(0, 4, (), 0)]))[
                0
            ]
            laws = law(drafter.logits(hidden[0, 1:]), config.temperature, config.top_p, config.top_k)
        chance = float(laws[0, text[0]] * laws[1, text[1]] * laws[2, text[2]])
        if chance > 0:
            chances[text] = chance
    return chances


def test_a_look_up_finds_what_followed_the_longest_and_latest_match() -> None:
    assert look_up([1, 2, 3, 9, 1, 2, 3, 4, 1, 2, 3], 2) == [4, 1], "the latest of equally long ones"
    assert look_up([1, 2, 3, 4, 5, 2, 3], 3) == [4, 5, 2], "two tokens in common"
    assert look_up([1, 2, 3], 3) == []
    assert look_up([5, 1, 5], 4) == [1, 5]
    assert look_up([5, 1, 5], 4, shortest=2) == []


def test_more_drafts_than_were_learnt_are_refused() -> None:
    with pytest.raises(ConfigError, match="drafts 4, and the adapters have learnt 3"):
        placing_for(trained(), ExactConfig(drafts=4))
