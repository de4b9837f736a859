"""Everything that computes, on a device that is not there: nothing mixes devices, the numbers are the CPU's to the
bit, and the host waits no more often than is written here."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator

from conftest import random_model
from decoding_stubs import StubTokenizer
from device_stand_in import DEVICE, StandInDevice, back, place
from hildanext.ar import Parent, sample_documents
from hildanext.core.registry import build, under_profile
from hildanext.corruption.noised_batches import NoisedBatches
from hildanext.corruption.noising import NoiseConfig
from hildanext.corruption.schedules import BlockPhase, LearningRate
from hildanext.data.batch import Batch
from hildanext.decoding import decoder_section, make_decoder
from hildanext.decoding.base import step as decoding_step
from hildanext.decoding.per_row import PerRow
from hildanext.decoding.state import DecodeState
from hildanext.diffusion import CausalPairs
from hildanext.engine.base import Request, complete
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.engine.runners import ARRunner
from hildanext.eval.generation import generative_nats
from hildanext.inference import GenerationConfig, generate
from hildanext.likelihood import LIKELIHOODS
from hildanext.likelihood.conditional import Pair, score_diffusion, score_parent
from hildanext.likelihood.held_out import LikelihoodConfig, bound, exact, parent_likelihood
from hildanext.losses import LOSSES, SupervisedStep
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.trainer.teacher import reader
from hildanext.trainer.validation import EditCheck, Validation
from hildanext.training import TrainConfig, TrainingTask, train

CPU = torch.device("cpu")
Place = Callable[[Any], Any]
Run = Callable[[torch.device, Place], Any]


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, through lists and dictionaries."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(back(one), back(other))
    return bool(one == other or (one != one and other != other))


def on_both(run: Run) -> StandInDevice:
    """Run on the CPU and on the stand-in; the numbers must be the same. Returns what the stand-in wrote down."""
    device = StandInDevice()
    plain = run(CPU, lambda module: module)
    with device.open():
        shown = run(DEVICE, place)
    assert same(plain, shown), f"\n{plain}\n{shown}"
    return device


class Text:
    """Rows of random tokens: two documents and padding each, the answers maskable alone where asked for."""

    def __init__(self, chat: bool = False, count: int = 8) -> None:
        self.chat, self.count = chat, count

    def __len__(self) -> int:
        return self.count

    def batch(self, rows: Sequence[int]) -> Batch:
        drawn = [torch.randint(0, 60, (24,), generator=torch.Generator().manual_seed(int(row))) for row in rows]
        document = torch.tensor([[0] * 12 + [1] * 8 + [-1] * 4] * len(drawn))
        position = torch.tensor([[*range(12), *range(8), *[0] * 4]] * len(drawn))
        maskable = (document >= 0) & (position > (5 if self.chat else 0))
        hidden = (position == 3) & ~maskable if self.chat else None
        return Batch(torch.stack(drawn), document, position, maskable, hidden)


def small(there: Place, **changes: Any) -> Any:
    return there(random_model(**{"dtype": torch.float32, "layers": 2, **changes}))


# --- decoding


PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17]]
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "S mode": (decoder_section("S_MODE", max_post=2), {}, {}),
    "Q mode": (decoder_section("Q_MODE", tau_mask=0.2, tau_edit=0.1, max_post=2), {}, {}),
    "no edits": (decoder_section("S_MODE", tau_edit=None), {}, {}),
    "sampled": (decoder_section("S_MODE", max_post=2, temperature=1.2, top_p=0.9), {}, {}),
    "window": (decoder_section("S_MODE", tau_edit=0.05, window=1, max_post=2), {}, {}),
    "left shift": (decoder_section("S_MODE", max_post=2), {"alignment": "parent"}, {}),
    "left shift, block 1": (decoder_section("S_MODE", max_post=1), {"alignment": "parent", "block_size": 1}, {}),
    "separate commits": (decoder_section("S_MODE", max_post=2), {"alignment": "parent"}, {"commit": "separate"}),
    "uncached": (decoder_section("S_MODE", max_post=2), {"alignment": "parent"}, {"cached": False}),
    "traced": (decoder_section("S_MODE", max_post=2), {}, {"trace": True}),
}


def steps_and_ends(run: Callable[[], Any]) -> tuple[int, int]:
    """Steps of the sessions within `run`, and those of them that ended a block."""
    steps = ends = 0
    write, settle = DecodeState.write, DecodeState.retire_finished

    def counted_write(session: DecodeState, edit: Any) -> list[int]:
        nonlocal steps
        steps += 1
        return write(session, edit)

    def counted_settle(session: DecodeState) -> Any:
        nonlocal ends
        ends += bool(session._finished)
        return settle(session)

    with (
        mock.patch.object(DecodeState, "write", counted_write),
        mock.patch.object(DecodeState, "retire_finished", counted_settle),
    ):
        run()
    return steps, ends


@pytest.mark.parametrize(("way", "batch_size"), [*((way, 3) for way in WAYS), ("left shift, block 1", 1)])
def test_decoding_waits_once_a_step_and_once_where_blocks_end(way: str, batch_size: int):
    """What ended is read where the device is idle already. A trace reads two tensors more, a window the edited row."""
    section, model_changes, settings = WAYS[way]

    def run(_: torch.device, there: Place) -> Any:
        model = small(there, **model_changes)
        knobs = GenerationConfig(max_new_tokens=6, batch_size=batch_size, **settings)
        done = generate(model, None, PROMPTS, make_decoder(section), knobs)
        revised = sum(answer.stats.revise_forwards for answer in done)
        return [(answer.tokens, answer.stats.forwards, answer.stats.edits, answer.trace) for answer in done], revised

    outcomes: list[Any] = []
    plain, revised = run(CPU, lambda module: module)
    device = StandInDevice()
    with device.open():
        steps, ends = steps_and_ends(lambda: outcomes.append(run(DEVICE, place)))
    assert same(plain, outcomes[0][0])
    most = steps * (3 if way == "traced" else 1) + ends + revised
    assert device.kinds() == {"tolist": most}, device.listed()
    assert revised > 0 if way == "window" else revised == 0
    assert not [copy for copy in device.copies if copy.kind == "copy"], f"the host waits for no copy\n{device.listed()}"


def test_rows_with_decoders_of_their_own_wait_no_more():
    decoders = [make_decoder(WAYS[way][0]) for way in ("S mode", "no edits", "sampled", "S mode")]

    def run(_: torch.device, there: Place) -> Any:
        model = small(there)
        with torch.inference_mode():
            session = DecodeState(model, [*PROMPTS, [5]], [12] * 4, lambda row, tokens: False, seeds=range(4))
            session.prefill()
            rows = list(session.rows)
            for _ in range(3):
                canvas = session.canvas()
                decoding_step(PerRow(decoders), session, canvas)
        return [back(row.tokens).clone() for row in rows]

    device = on_both(run)
    assert device.kinds() == {"tolist": 3}, device.listed()


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_an_engine_with_shared_prefixes_waits_once_a_step(alignment: str):
    """One more wait where blocks end, one for what an ended request leaves to others, one a token of the parent's."""

    def run(_: torch.device, there: Place) -> Any:
        model = small(there, alignment=alignment)
        parent = Parent(model.causal_lm, StubTokenizer(bos=0), banned=model.banned)
        engine = LocalEngine(
            model, StubTokenizer(bos=0), parent, LocalEngineConfig(slots=2, cache_mib=4, prefill_tokens=8)
        )
        shared, answers = tuple(range(1, 14)), []
        for number, section in enumerate((WAYS["S mode"][0], WAYS["window"][0])):
            request = Request(tokens=(*shared, 20 + number), decoder=section, max_new_tokens=9, ignore_eos=True)
            answers.append(complete(engine, request))
        answers.append(complete(engine, Request(tokens=shared, parent=True, max_new_tokens=5, ignore_eos=True)))
        load = engine.load()
        engine.close()
        assert load.cached_tokens == 12, "the second request begins with the first one's blocks"
        revised = sum(answer.stats.revise_forwards for answer in answers)
        return [(answer.tokens, answer.stats.forwards) for answer in answers], revised

    outcomes: list[Any] = []
    plain = run(CPU, lambda module: module)
    device = StandInDevice()
    with device.open():
        steps, ends = steps_and_ends(lambda: outcomes.append(run(DEVICE, place)))
    assert same(plain, outcomes[0])
    assert device.kinds() == {"tolist": steps + ends + 2 + plain[1] + 5}, device.listed()
    assert not [copy for copy in device.copies if copy.kind == "copy"], device.listed()


SAMPLINGS = ({}, {"temperature": 1.1}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {})


def test_the_parent_s_requests_wait_once_a_forward_together():
    def run(_: torch.device, there: Place) -> Any:
        model = small(there, alignment="parent")
        parent = Parent(model.causal_lm, StubTokenizer(bos=0), banned=model.banned)
        settings = LocalEngineConfig(slots=4, cache_mib=4, prefill_tokens=8)
        engine = LocalEngine(model, StubTokenizer(bos=0), parent, settings)
        asked = [
            Request(
                tokens=tuple(range(1 + number, 12 + 3 * number)), parent=True, seed=number, max_new_tokens=6,
                decoder={**WAYS["S mode"][0], **sampling}, ignore_eos=True,
            )
            for number, sampling in enumerate(SAMPLINGS)
        ]  # fmt: skip
        with ThreadPoolExecutor(len(asked)) as threads:
            answers = list(threads.map(lambda request: complete(engine, request), asked))
        engine.close()
        return [answer.tokens for answer in answers]

    device, plain = StandInDevice(), run(CPU, lambda module: module)
    with device.open(), mock.patch.object(ARRunner, "_draw", autospec=True, side_effect=ARRunner._draw) as draws:
        shown = run(DEVICE, place)
    assert same(plain, shown)
    assert device.kinds() == {"tolist": draws.call_count}, device.listed()
    assert not [copy for copy in device.copies if copy.kind == "copy"], device.listed()


# --- training

CONVERSIONS = {
    "m2t": ["m2t"],
    "t2t": ["m2t", "t2t"],
    "t2t means": ["m2t", {"name": "t2t", "weighting": "mean"}],
    "ar": ["m2t", "ar"],
    "kl": ["m2t", "kl"],
    "align": ["m2t", "align"],
    "cap": ["m2t", "cap"],
    "c2dlm": ["m2t", "t2t", {"name": "c2dlm", "apply": "both", "reattention": "v_out_norm"}],
    "few causal rows": ["m2t", "t2t", {"name": "c2dlm", "apply": "both", "max_rows": 2}],
}


class Marks:
    """What had been written down when each optimiser step began."""

    def __init__(self, views: Callable[..., Any], device: StandInDevice | None) -> None:
        self.views, self.device, self.places = views, device, []

    def __call__(self, index: int, phase: BlockPhase) -> Any:
        if self.device is not None:
            self.places.append((len(self.device.waits), len(self.device.copies)))
        return self.views(index, phase)

    def keep_one(self) -> None:
        """Leave what the second step wrote down: the first one makes the optimiser's states."""
        if self.device is not None:
            (waits, copies), (waits_end, copies_end) = self.places[1:3]
            self.device.waits = self.device.waits[waits:waits_end]
            self.device.copies = self.device.copies[copies:copies_end]


def causes(rows: Sequence[int]) -> CausalPairs | None:
    """Every token from the fourth on was computed from the third before it."""
    return CausalPairs.collate([[(at, at - 3, 1.0) for at in range(4, 12)] for _ in rows])


def one_step(
    folder: Path, losses: Sequence[Any], alignment: str, block: int = 4, chat: bool = False, lora: bool = False,
    turns: int = 1, **knobs: Any,
) -> StandInDevice:  # fmt: skip
    """Three steps of training on both devices; what the second one wrote down."""
    sections = [loss if isinstance(loss, dict) else {"name": loss} for loss in losses]
    device = StandInDevice()

    def run(there_device: torch.device, there: Place) -> Any:
        model = small(there, alignment=alignment)
        if lora:
            torch.manual_seed(3)
            add_lora(model, LoraConfig(rank=2, alpha=4, dropout=0.2))
            there(model)
        with under_profile("FULL"):
            made = {section["name"]: build("loss", LOSSES, section) for section in sections}
        parent = None
        if any(loss.needs_parent for loss in made.values()):
            frozen = small(there, alignment=alignment, seed=1).requires_grad_(False)
            parent = Parent(model.causal_lm if lora else frozen.causal_lm, None, frozen.banned)
        step = SupervisedStep(model, made, None if parent is None else parent.head)
        pairs = causes if "c2dlm" in made else None
        views = NoisedBatches(Text(chat), 2, NoiseConfig(replace_rate=0.5), model.card, torch.arange(60), 0, pairs)
        marks = Marks(views, device if there_device == DEVICE else None)
        stage = TrainingTask(
            3 * 40, lambda _: BlockPhase(phase="stable", block_size=block, tokens=120), marks,
            teacher=reader(parent, model), turns=turns, pad_id=1,
        )  # fmt: skip
        settings = TrainConfig(precision="no", learning_rate=LearningRate(peak=1e-3), **knobs)
        out = folder / there_device.type
        train(step, stage, settings, out, True, Accelerator(cpu=True, device_placement=False))
        marks.keep_one()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    plain = run(CPU, lambda module: module)
    with device.open():
        shown = run(DEVICE, place)
    assert same(plain, shown)
    return device


@pytest.mark.parametrize("alignment", ["block", "parent"])
@pytest.mark.parametrize("losses", CONVERSIONS)
def test_a_conversion_step_waits_once(losses: str, alignment: str, tmp_path: Path):
    if (losses, alignment) == ("ar", "block"):
        return  # refused: it would leak its labels
    device = one_step(tmp_path, CONVERSIONS[losses], alignment)
    assert device.kinds() == {"tolist": 1}, device.listed()
    assert not [copy for copy in device.copies if copy.kind == "copy"], device.listed()


STEPS: dict[str, dict[str, Any]] = {
    "sft": {"losses": ["m2t", "t2t"], "alignment": "block", "chat": True},
    "sft, two turns": {"losses": ["m2t", "t2t"], "alignment": "parent", "chat": True, "turns": 2},
    "lora with a parent below": {"losses": ["m2t", "kl"], "alignment": "parent", "lora": True},
    "block 1": {"losses": ["m2t"], "alignment": "parent", "block": 1},
    "one block": {"losses": ["m2t"], "alignment": "block", "block": 24},
    "recomputed": {"losses": ["m2t", {"name": "c2dlm", "apply": "both"}], "alignment": "block",
                   "gradient_checkpointing": True},
    "small chunks": {"losses": ["m2t"], "alignment": "block", "chunk": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_waits_once_and_once_for_each_further_turn(name: str, tmp_path: Path):
    device = one_step(tmp_path, **STEPS[name])
    further = {"cpu": 1} if "turns" in STEPS[name] else {}
    assert device.kinds() == {**further, "tolist": 1}, device.listed()
    assert not [copy for copy in device.copies if copy.kind == "copy"], device.listed()


# --- evaluation and the parent


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_likelihoods_wait_once_a_batch(alignment: str):
    def run(device: torch.device, there: Place) -> Any:
        model = small(there, alignment=alignment)
        parent = Parent(model.causal_lm, None, model.banned)
        batches = [Text().batch([0, 1]), Text().batch([2])]
        likelihoods = [parent_likelihood(parent, batches, 1), exact(model, batches, 1)]
        for estimator in ("count", "time", "coupled"):
            likelihoods.append(bound(model, batches, 4, 1, LikelihoodConfig(estimator=estimator, draws=1)))
        nats = generative_nats(parent, PROMPTS, [[5, 6, 7], [], [8]])
        return [likelihood.plain() for likelihood in likelihoods], nats

    device = on_both(run)
    assert device.kinds() == {"cpu": 5 * 2 + 2}, f"five ways, two batches, two completions\n{device.listed()}"


def test_answers_are_scored_with_one_wait_a_forward():
    pairs = [Pair((1, 2, 3), (4, 5, 6), seed=3), Pair((1, 2, 3), (9,)), Pair((1, 2, 3), (8,)), Pair((7,), (5, 5))]

    def run(device: torch.device, there: Place) -> Any:
        model = small(there)
        scores = [score_diffusion(model, pairs, draws=2, batch_size=8), score_diffusion(model, pairs, 1)]
        scores.append(score_parent(Parent(model.causal_lm, None, model.banned), pairs))
        return [(score.nats, score.variance) for way in scores for score in way]

    device = on_both(run)
    assert device.kinds() == {"tolist": 3}, device.listed()
    assert not [copy for copy in device.copies if copy.kind == "copy"], device.listed()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_policy_s_score_and_its_gradient_wait_for_nothing(name: str):
    def run(device: torch.device, there: Place) -> Any:
        model = small(there, alignment="parent")
        likelihood = LIKELIHOODS[name]()
        scores = likelihood.score(model, Text(True).batch([0, 1]), torch.Generator().manual_seed(5))
        scores.sum().backward()
        return [scores, model.head.grad]

    device = on_both(run)
    assert not device.waits, device.listed()
    assert not [copy for copy in device.copies if copy.kind == "copy"], device.listed()


def test_what_is_measured_while_training_waits_once_a_batch():
    def run(device: torch.device, there: Place) -> Any:
        model = small(there)
        step = SupervisedStep(model, {})
        batches = [Text(True).batch([0, 1]), Text(True).batch([2, 3])]
        bound_, edits = Validation(batches, 1, model.card), EditCheck(batches, model.card, torch.arange(60))
        return bound_(step, 0), edits(step, 0)

    device = on_both(run)
    assert device.kinds() == {"cpu": 4}, device.listed()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_parent_waits_once_a_token(temperature: float):
    def run(device: torch.device, there: Place) -> Any:
        parent = Parent(small(there).causal_lm, None)
        knobs = {"temperature": temperature, "top_k": 20, "top_p": 0.9}
        together = parent.generate_batch(PROMPTS, 5, **knobs, seeds=[1, 2, 3], stop_ids=[3, 4])
        return [answer.tokens for answer in together], parent.generate(PROMPTS[0], 5, **knobs).tokens

    device = on_both(run)
    assert device.kinds() == {"tolist": 5 + 5}, device.listed()
    assert not [copy for copy in device.copies if copy.kind == "copy"], device.listed()


def test_documents_drawn_from_the_parent_wait_once_a_token():
    def run(device: torch.device, there: Place) -> Any:
        parent = Parent(small(there).causal_lm, StubTokenizer(bos=0))
        return list(sample_documents(parent, 6, 4, temperature=1.2))

    device = on_both(run)
    assert device.kinds() == {"cpu": 4}, device.listed()
