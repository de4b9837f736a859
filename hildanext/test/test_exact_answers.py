"""Many answers in exact mode beside their parent's, token for token; and the parent inside a trained checkpoint.

`HILDA_DRAFTS` names a folder of draft adapters (of any parent that is here) whose answers are looked at too:

    HILDA_DRAFTS=runs/keep-parent/drafts python -m pytest -m slow hildanext/test/test_exact_answers.py
"""

import os
from collections.abc import Sequence

import pytest
import torch

from exact_stubs import tiny_drafts
from hildanext.ar import Parent
from hildanext.core.runtime import RuntimeConfig
from hildanext.decoding.exact.policy import ExactConfig
from hildanext.engine.base import Failed, Finished, Request
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.exact import LoadedDrafter, generate_exact
from hildanext.inference import GenerationConfig
from hildanext.models.loading.load import load_parent
from hildanext.tokenization import encode_prompt

SETTINGS = {
    "all": ExactConfig(after="all"),
    "last": ExactConfig(after="last"),
    "auto": ExactConfig(after="auto"),
    "ngram": ExactConfig(drafter="ngram"),
    "both": ExactConfig(after="all", drafter="both"),
    "none": ExactConfig(drafter="none"),
}
BEGINNINGS = (
    "Once upon a time",
    "The capital of",
    "Natalia sold",
    "Question: how many",
    "Dear",
    "In the morning",
    "1, 2,",
)
ENDINGS = ("", " there was", " a friend of mine", " she said that", " of the house", " and then", " 12 of them", " why")


@pytest.fixture(scope="module", params=["fp32", "fp64"])
def tiny(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HILDANEXT_HOME", str(folder / "home"))
        threads = torch.get_num_threads()
        yield LoadedDrafter.open(
            str(tiny_drafts(folder / "drafts", 0.01)), RuntimeConfig("cpu", request.param, threads)
        )


def prompts_of(count: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 14, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def parents_answers(loaded: LoadedDrafter, prompts: Sequence[Sequence[int]], new: int, batch: int) -> list[list[int]]:
    """Of the parent as it is without adapters."""
    card = loaded.card
    assert card is not None
    parent = Parent(load_parent(card.parent, loaded.drafter.dtype)[0], None)
    batches = [prompts[at : at + batch] for at in range(0, len(prompts), batch)]
    return [answer.tokens for some in batches for answer in parent.generate_batch(some, new, stop_ids=[])]


def check(
    loaded: LoadedDrafter, name: str, prompts: Sequence[Sequence[int]], new: int, expected: list[list[int]]
) -> None:
    config = SETTINGS[name]
    settings = GenerationConfig(max_new_tokens=new, ignore_eos=True, batch_size=16)
    placing = loaded.placing(config)
    results = generate_exact(loaded.drafter, loaded.tokenizer, prompts, config, settings, placing)
    differ = [at for at, (result, text) in enumerate(zip(results, expected, strict=True)) if result.tokens != text]
    assert differ == [], f"{len(differ)} of {len(prompts)} answers are not the parent's"


@pytest.mark.parametrize("name", ["all", "auto", "both"])
def test_tens_of_answers_are_the_parents_in_every_setting(tiny: LoadedDrafter, name: str) -> None:
    prompts = prompts_of(10, 1000)
    check(tiny, name, prompts, 16, parents_answers(tiny, prompts, 16, 10))


@pytest.mark.slow
def test_five_hundred_answers_are_the_parents_in_every_setting(tiny: LoadedDrafter) -> None:
    prompts = prompts_of(500, 1000)
    expected = parents_answers(tiny, prompts, 64, 50)
    for name in SETTINGS:
        check(tiny, name, prompts, 64, expected)


@pytest.mark.slow
def test_five_hundred_answers_of_the_engine_are_the_parents(tiny: LoadedDrafter) -> None:
    """Joining, leaving and being cancelled as they come, every setting in turn."""
    prompts = prompts_of(500, 1000)
    expected = parents_answers(tiny, prompts, 64, 50)
    settings = LocalEngineConfig(slots=16, queue=1000)
    engine = LocalEngine(None, tiny.tokenizer, tiny.parent, settings, "drafts", "tiny", drafter=tiny)
    answers: dict[int, list[int]] = {}
    left = {number for number in range(500) if number % 25 == 7}
    try:
        tickets = []
        for number, prompt in enumerate(prompts):
            config = {"name": "exact", **vars(list(SETTINGS.values())[number % len(SETTINGS)])}
            request = Request(tokens=tuple(prompt), decoder=config, max_new_tokens=64, ignore_eos=True)
            tickets.append(engine.submit(request, lambda event, at=number: _note(answers, at, event)))
        for number in left:
            tickets[number].cancel()
        engine.close(drain_seconds=900.0)
    finally:
        engine.close()
    assert [number for number in set(range(500)) - left if answers[number] != expected[number]] == []


def _note(answers: dict[int, list[int]], at: int, event: object) -> None:
    if isinstance(event, Finished):
        answers[at] = event.answer.tokens
    elif isinstance(event, Failed):
        answers[at] = []


def named_checkpoint(dtype: str) -> tuple[LoadedDrafter, list[list[int]]]:
    """What `HILDA_DRAFTS` names, and fifty prompts for it. Skips the test where it names nothing."""
    folder = os.environ.get("HILDA_DRAFTS")
    if not folder:
        pytest.skip("HILDA_DRAFTS names no folder of draft adapters")
    loaded = LoadedDrafter.open(folder, RuntimeConfig("cpu", dtype, torch.get_num_threads()))
    texts = [begin + end for begin in BEGINNINGS for end in ENDINGS][:50]
    return loaded, [encode_prompt(loaded.tokenizer, text) for text in texts]


@pytest.mark.slow
def test_fifty_answers_of_a_named_checkpoint_are_its_parents() -> None:
    loaded, prompts = named_checkpoint("fp32")
    expected = parents_answers(loaded, prompts, 64, 10)
    for name in SETTINGS:
        check(loaded, name, prompts, 64, expected)


@pytest.mark.slow
def test_fifty_answers_of_a_named_checkpoint_are_its_parents_at_one_row_in_bf16() -> None:
    """Where the device's kernels leave rows alone; whoever shares the forward."""
    loaded, prompts = named_checkpoint("bf16")
    if loaded.placing(SETTINGS["all"]).fixed:
        pytest.skip("in bf16 rows depend on each other here")
    alone = GenerationConfig(max_new_tokens=64, ignore_eos=True, batch_size=1)
    placing = loaded.placing(SETTINGS["none"])
    parents = generate_exact(loaded.drafter, loaded.tokenizer, prompts, SETTINGS["none"], alone, placing)
    assert all(result.stats.forwards - result.stats.prefill_forwards == 64 for result in parents)
    for name in ("all", "auto", "both"):
        check(loaded, name, prompts, 64, [result.tokens for result in parents])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_parent_inside_a_trained_checkpoint_has_the_parents_logits_bit_for_bit(
    tmp_path, dtype: torch.dtype
) -> None:
    name = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    loaded = LoadedDrafter.open(
        str(tiny_drafts(tmp_path / "drafts")), RuntimeConfig("cpu", name, torch.get_num_threads())
    )
    tokens = torch.tensor([prompts_of(1, 1000)[0] * 3])
    document, position = torch.zeros_like(tokens), torch.arange(tokens.shape[1])[None]
    inside, plain = loaded.parent, Parent(load_parent("tiny", dtype)[0], None)
    logits = [parent.logits(parent.hidden(tokens, document, position)) for parent in (inside, plain)]
    assert torch.equal(*logits)
