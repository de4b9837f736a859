"""The guarded adapter of dInfer, against a fake of its interface; against its own source where that is at hand."""

import ast
import dataclasses
import importlib
import inspect
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import fake_dinfer
from hildanext.commands import doctor
from hildanext.core.config import plain
from hildanext.core.errors import ConfigError, ModelError, PromptError
from hildanext.decoding import decoder_section
from hildanext.engine import choose
from hildanext.engine.base import (
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    Failed,
    Finished,
    Overloaded,
    Piece,
    Request,
    Started,
    complete,
    stream,
)
from hildanext.engine.dinfer import probe as dinfer_probe
from hildanext.engine.dinfer.adapter import DInferEngine
from hildanext.engine.dinfer.config import PINNED, DInferConfig
from hildanext.engine.dinfer.output import checked
from hildanext.engine.dinfer.probe import ProbeResult, why_not_here, why_not_model

TINY = files("hildanext") / "assets" / "tiny" / "diffusion"
GOOD = ProbeResult(
    capabilities=((8, 0),),
    vllm=True,
    sglang=True,
    commit=PINNED,
    parameters={
        name: list(inspect.signature(getattr(fake_dinfer, name).__init__).parameters)[1:]
        for name in ("SamplingParams", "DiffusionLLMServing")
    },
)
SOURCE = os.environ.get("HILDA_DINFER_SOURCE")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that looks like a LLaDA 2 checkpoint; its tokenizer is the embedded one."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (TINY / name).is_file():
            shutil.copy(str(TINY / name), tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LLaDA2MoeModelLM"]}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    (tmp_path / "one.safetensors").write_bytes(b"")
    return tmp_path


@pytest.fixture
def fake(monkeypatch):
    """The fake as `dinfer`, writing 10, 11, ... behind a prompt of three tokens by default."""
    for name in ("dinfer", "dinfer.decoding"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "dinfer", fake_dinfer)
    monkeypatch.setitem(sys.modules, "dinfer.decoding.serving", fake_dinfer)
    fake_dinfer.script.update(write=lambda position: 7 + position, behaviour="well", seconds=0.0)
    fake_dinfer.made.clear()
    fake_dinfer.asked.clear()
    yield fake_dinfer
    fake_dinfer.handle.groups = []


@pytest.fixture
def start(fake, folder):
    opened: list[DInferEngine] = []

    def engine(**settings) -> DInferEngine:
        known = {"block_length": 8, "max_length": 256, "mask_id": 3, **settings}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        opened.append(DInferEngine(DInferConfig(**known), str(folder), tokenizer, "for a test"))
        return opened[-1]

    yield engine
    for one in opened:
        one.close()


def ask(**more) -> Request:
    return Request(**{"tokens": (5, 6, 7), "max_new_tokens": 12, "decoder": decoder_section("S_MODE"), **more})


class Told:
    """A sink that keeps what it hears; `over` once that is the end."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.events: list[object] = []
        self.begun, self.over, self.seconds = threading.Event(), threading.Event(), seconds

    def __call__(self, event: object) -> None:
        time.sleep(self.seconds)
        self.events.append(event)
        self.begun.set()
        if isinstance(event, Finished | Failed):
            self.over.set()


class TestWhetherItCanBeUsed:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"died": "importing it took more than 1 s"}, "took more than"),
            ({"capabilities": ()}, "no CUDA device"),
            ({"capabilities": ((8, 0), (6, 1))}, r"capability 6\.1"),
            ({"vllm": False}, "vllm is not installed"),
            ({"sglang": False}, "sglang is not installed"),
            (
                {"parameters": None, "errors": {"parameters": "ImportError: x"}},
                r"cannot be imported \(ImportError: x\)",
            ),
            ({"parameters": {**GOOD.parameters, "SamplingParams": ["threshold"]}}, "SamplingParams has no cache"),
            ({"commit": "abc"}, "commit abc"),
            ({"commit": None}, "commit unknown"),
        ],
    )
    def test_whatever_stands_against_it_has_words(self, changes, words):
        assert why_not_here(GOOD, "sglang", PINNED) == ""
        import re

        assert re.search(words, why_not_here(dataclasses.replace(GOOD, **changes), "sglang", PINNED))

    def test_any_commit_and_the_other_backend_ask_for_less(self):
        assert why_not_here(dataclasses.replace(GOOD, commit=None, sglang=False), "vllm", None) == ""

    def test_a_model_s_folder_is_looked_at(self, folder):
        assert why_not_model(str(folder), "sglang") == ""
        (folder / "one.safetensors").unlink()
        assert "lacks one.safetensors" in why_not_model(str(folder), "sglang")
        (folder / "model.safetensors.index.json").unlink()
        assert "model.safetensors.index.json" in why_not_model(str(folder), "sglang")
        (folder / "config.json").write_text(json.dumps({"architectures": ["LLaDAModelLM"]}))
        assert "sglang runs LLaDA2MoeModelLM only" in why_not_model(str(folder), "sglang")
        (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
        assert "unsupported_architecture" in why_not_model(str(folder), "vllm")
        assert "no folder" in why_not_model("tiny", "vllm")

    def test_the_probe_imports_it_elsewhere_and_survives_whatever_it_does(self, tmp_path, monkeypatch):
        package = tmp_path / "dinfer"
        package.mkdir()
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        shutil.copy(fake_dinfer.__file__, package / "__init__.py")
        probed = dinfer_probe.probe_in_subprocess(60.0)
        assert probed.parameters == GOOD.parameters and not probed.vllm and not probed.died
        (package / "__init__.py").write_text("import vllm_that_is_absent")
        assert "ModuleNotFoundError" in dinfer_probe.probe_in_subprocess(60.0).errors["parameters"]
        (package / "__init__.py").write_text("import os; os._exit(11)")
        assert "ended Python with 11" in dinfer_probe.probe_in_subprocess(60.0).died
        (package / "__init__.py").write_text("import time; time.sleep(60)")
        assert "more than 4 s" in dinfer_probe.probe_in_subprocess(4.0).died

    @pytest.mark.parametrize("kind", ["a distribution without a module", "a module without its parts"])
    def test_an_empty_placeholder_is_recognised_and_never_imported(self, folder, tmp_path, monkeypatch, kind):
        if kind == "a distribution without a module":
            (tmp_path / "dinfer-0.1.0.dist-info").mkdir()
            (tmp_path / "dinfer-0.1.0.dist-info" / "METADATA").write_text("Name: dinfer\nVersion: 0.1.0\n")
            words = "the package dinfer 0.1.0 is an empty placeholder"
        else:
            (tmp_path / "dinfer").mkdir()
            (tmp_path / "dinfer" / "__init__.py").write_text("raise AssertionError('imported')")
            words = "the package dinfer that is installed is an empty placeholder"
        assert dinfer_probe.placeholder() == ""
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(dinfer_probe, "_probed", {})
        assert dinfer_probe.installed() and words in dinfer_probe.probe_in_subprocess(60.0).died
        assert words in choose({}, str(folder))[1] and choose({}, str(folder))[0] == "transformers"
        finding = doctor.examine_engines()[-1]
        assert finding.state == "note" and words in finding.value and "github.com/inclusionAI/dInfer" in finding.value
        with pytest.raises(ConfigError, match=words):
            DInferConfig().open(str(folder), None, "")

    def test_many_that_ask_at_once_are_answered_by_one_probe(self, monkeypatch):
        looked = []

        def look(seconds):
            looked.append(seconds)
            time.sleep(0.05)
            return GOOD

        monkeypatch.setattr(dinfer_probe, "_probed", {})
        monkeypatch.setattr(dinfer_probe, "probe_in_subprocess", look)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(dinfer_probe.probe, [120.0] * 8)) == [GOOD] * 8
        assert looked == [120.0]

    def test_a_knob_that_it_does_not_have_keeps_auto_from_it_without_importing_it(self, folder, monkeypatch):
        monkeypatch.setattr(dinfer_probe, "installed", lambda: True)
        monkeypatch.setattr(dinfer_probe, "probe", lambda seconds: GOOD)
        assert dinfer_probe.why_unavailable({"name": "auto", **plain(DInferConfig())}, str(folder)) == ""
        assert "sets slots, which it does not know" in dinfer_probe.why_unavailable({"slots": 2}, str(folder))
        assert "dinfer" not in sys.modules

    def test_doctor_tells_why_without_importing_it_here(self, monkeypatch):
        assert doctor.examine_engines()[-1].value == "not used: it is not installed"
        monkeypatch.setattr(dinfer_probe, "installed", lambda: True)
        monkeypatch.setattr(dinfer_probe, "probe", lambda: ProbeResult(died="importing it took more than 120 s"))
        finding = doctor.examine_engines()[-1]
        assert finding.state == "note" and finding.value == "not used: importing it took more than 120 s"
        monkeypatch.setattr(dinfer_probe, "probe", lambda: GOOD)
        assert doctor.examine_engines()[-1].state == "ok"
        assert "dinfer" not in sys.modules

    def test_opening_it_by_name_says_what_stands_against_it(self, folder, monkeypatch):
        monkeypatch.setattr("hildanext.engine.dinfer.probe.probe", lambda seconds: ProbeResult())
        with pytest.raises(ConfigError, match="no CUDA device"):
            DInferConfig().open(str(folder), None, "")
        with pytest.raises(ModelError, match="no folder"):
            DInferConfig().open("tiny", None, "")
        with pytest.raises(ConfigError, match="no autoregressive parent"):
            DInferConfig().open(str(folder), "tiny", "")


class TestAnswers:
    def test_the_text_is_what_it_wrote_behind_the_prompt_cut_to_the_length(self, start):
        engine = start()
        answer = complete(engine, ask())
        assert answer.tokens == list(range(10, 22)) and answer.finish_reason == "length"
        assert answer.text == engine.tokenizer.decode(answer.tokens)
        assert not answer.edits_supported and answer.stats.edits == 0 and answer.stats.forwards == 7
        assert complete(engine, ask()).stats.forwards == 7  # it counts over all calls

    def test_it_is_started_as_its_traps_demand(self, start, folder):
        start(mode="Q_MODE")
        (made,) = fake_dinfer.made
        params = made["sample_params"]
        assert (params.cache, params.use_bd, params.cont_weight, params.threshold) == ("prefix", True, 0.0, 0.7)
        assert params.mask_id == 3 and made["model_type"] == "llada2" and made["dp_size"] == 1

    def test_text_behind_an_end_of_text_in_the_same_block_is_cut(self, start, fake):
        engine = start()
        fake.script["write"] = lambda position: engine.eos_id if position == 5 else 7 + position
        answer = complete(engine, ask())
        assert answer.tokens == [10, 11, engine.eos_id] and answer.finish_reason == "eos"
        assert answer.text == engine.tokenizer.decode([10, 11])

    def test_an_end_of_text_in_the_prompt_neither_stops_it_nor_gets_lost(self, start):
        engine = start()
        answer = complete(engine, ask(tokens=(engine.eos_id, 6, engine.eos_id)))  # in the block where the text begins
        assert answer.tokens == list(range(10, 22)) and answer.prompt_tokens == 3

    def test_it_is_asked_for_a_few_blocks_at_a_time_and_no_further_than_the_text_goes(self, start, fake):
        engine = start(call_blocks=1)
        pieces = [event.text for event in stream(engine, ask(max_new_tokens=30)) if isinstance(event, Piece)]
        assert [(len(row), more) for row, more, _ in fake.asked] == [(3, 5), (8, 8), (16, 8), (24, 8), (32, 8)]
        assert len(pieces) > 1 and "".join(pieces) == engine.tokenizer.decode(list(range(10, 40)))
        fake.asked.clear()
        fake.script["write"] = lambda position: engine.eos_id if position == 12 else 7 + position
        answer = complete(engine, ask(max_new_tokens=200))
        assert len(fake.asked) == 2 and answer.finish_reason == "eos" and len(answer.tokens) == 10

    def test_what_is_fed_fits_after_rounding_to_whole_blocks(self, start, fake):
        engine = start(max_length=68, block_length=8)
        assert len(complete(engine, ask(max_new_tokens=61)).tokens) == 61  # 64 with the prompt
        with pytest.raises(PromptError, match="take 72 tokens in whole blocks of 8, and there is room for 68"):
            engine.submit(ask(max_new_tokens=62), lambda event: None)
        assert max(len(row) + more for row, more, _ in fake.asked) == 64

    def test_a_stop_string_ends_the_text(self, start):
        engine = start()
        stop = engine.tokenizer.decode([13])
        answer = complete(engine, ask(stop=(stop,)))
        assert answer.finish_reason == "stop" and stop not in answer.text

    def test_another_prompt_another_length_or_masks_are_no_answer(self):
        assert checked([5, 6, 8, 9], [5, 6], 4, 3) == [5, 6, 8, 9]
        for row, words in (([9, 9, 8, 9], "another prompt"), ([5, 6, 8], "3 tokens"), ([5, 6, 3, 9], "left masks")):
            with pytest.raises(EngineFailed, match=words):
                checked(row, [5, 6], 4, 3)

    def test_what_it_would_ignore_is_refused(self, start):
        engine = start(edits="refuse")
        wishes = [
            ask(decoder=decoder_section("Q_MODE", tau_edit=None)),
            ask(decoder=decoder_section("S_MODE")),
            ask(decoder=decoder_section("S_MODE", tau_edit=None, temperature=1.0)),
            ask(decoder=decoder_section("S_MODE", tau_edit=None), steps=True),
            ask(decoder=decoder_section("S_MODE", tau_edit=None), ignore_eos=True),
            ask(decoder=decoder_section("S_MODE", tau_edit=None), scores=True),
            ask(decoder=decoder_section("S_MODE", tau_edit=None), parent=True),
        ]
        for wish in wishes:
            with pytest.raises(ConfigError):
                engine.submit(wish, lambda event: None)
        assert complete(engine, ask(decoder=decoder_section("S_MODE", tau_edit=None))).tokens


class TestWhenItGoesWrong:
    @pytest.mark.parametrize(("behaviour", "words"), [("hangs", "took more than"), ("dies", "processes ended with 1")])
    def test_one_that_hangs_or_dies_is_stopped_and_says_so(self, start, fake, behaviour, words):
        engine = start(request_seconds=0.4)
        workers = [process for group in fake.handle.groups for process in group.procs]
        fake.script["behaviour"] = behaviour
        begun = time.perf_counter()
        with pytest.raises(EngineFailed, match=words):
            complete(engine, ask())
        assert time.perf_counter() - begun < 5
        assert not engine.facts.ready and words in engine.facts.reason and not engine.load().alive
        assert not fake.handle.is_running()
        for worker in workers:
            worker.join(5)
            assert not worker.is_alive()
        with pytest.raises(Overloaded, match="dinfer has stopped"):
            engine.submit(ask(), lambda event: None)

    def test_who_waits_behind_one_that_hangs_hears_of_it(self, start, fake):
        engine = start(request_seconds=0.4)
        fake.script["behaviour"] = "hangs"
        ended = threading.Semaphore(0)
        events: list[object] = []

        def sink(event):
            if isinstance(event, Finished | Failed):
                events.append(event)
                ended.release()

        for _ in range(3):
            engine.submit(ask(), sink)
        for _ in range(3):
            assert ended.acquire(timeout=10)
        assert all(isinstance(event.error, EngineFailed) for event in events)

    @pytest.mark.parametrize("behind", ["one that is slow", "one that hangs"])
    def test_the_deadline_of_one_that_waits_counts_while_another_runs(self, start, fake, behind):
        engine = start(request_seconds=1.0)
        fake.script["behaviour"] = "hangs"
        first, second = Told(), Told()
        engine.submit(ask(), first)
        ticket = engine.submit(ask(deadline_seconds=0.2 if behind == "one that is slow" else 0.95), second)
        begun = time.perf_counter()
        assert second.over.wait(5) and isinstance(second.events[-1].error, DeadlineExceeded)
        if behind == "one that is slow":
            assert time.perf_counter() - begun < 0.8 and not first.over.is_set() and engine.load().waiting == 0
        assert len(second.events) == 1 and engine.load().finished["deadline"] == 1
        ticket.cancel()
        assert first.over.wait(5) and len(second.events) == 1

    @pytest.mark.parametrize("how", ["cancel", "deadline"])
    def test_one_that_ended_while_it_waited_is_neither_started_nor_sent(self, start, fake, how):
        engine = start()
        fake.script["seconds"] = 0.4
        first, second = Told(), Told()
        engine.submit(ask(), first)
        ticket = engine.submit(ask(tokens=(8, 8, 8), deadline_seconds=0.05 if how == "deadline" else None), second)
        if how == "cancel":
            ticket.cancel()
        assert first.over.wait(5) and second.over.wait(5)
        assert complete(engine, ask()).tokens and len(second.events) == 1
        assert isinstance(second.events[0].error, Cancelled if how == "cancel" else DeadlineExceeded)
        assert [8, 8, 8] not in [row for row, _, _ in fake.asked]

    def test_one_that_is_late_when_its_turn_comes_is_not_sent(self, start, fake):
        engine = start()
        sink = Told()
        engine.submit(ask(deadline_seconds=1e-9), sink)
        assert sink.over.wait(5) and len(sink.events) == 1 and isinstance(sink.events[0].error, DeadlineExceeded)
        assert not fake.asked

    def test_as_many_wait_as_the_queue_says_beyond_the_one_that_runs(self, start, fake):
        fake.script["behaviour"] = "hangs"
        for queue in (0, 2):
            engine = start(queue=queue)
            sinks = [Told() for _ in range(queue + 1)]
            for sink in sinks:
                engine.submit(ask(), sink)
                assert sinks[0].begun.wait(5)  # the first has left the queue
            with pytest.raises(Overloaded, match="wait"):
                engine.submit(ask(), lambda event: None)
            engine.close()
            assert all(sink.over.wait(5) for sink in sinks)

    def test_nothing_reaches_a_sink_behind_the_end(self, start, fake):
        engine = start(call_blocks=1)
        fake.script["seconds"] = 0.002
        for turn in range(20):
            sink = Told(seconds=0.002)
            ticket = engine.submit(ask(max_new_tokens=60), sink)
            time.sleep(0.003 * turn / 4)
            ticket.cancel()
            assert sink.over.wait(5)
            time.sleep(0.01)
            ends = [isinstance(event, Finished | Failed) for event in sink.events]
            assert ends.count(True) == 1 and ends[-1]
            assert not any(isinstance(event, Started) for event in sink.events[1:])

    @pytest.mark.parametrize("how", ["cancel", "deadline", "close"])
    def test_who_leaves_hears_at_once(self, start, fake, how):
        engine = start()
        fake.script["behaviour"] = "hangs"
        over, events = threading.Event(), []

        def sink(event):
            if isinstance(event, Finished | Failed):
                events.append(event)
                over.set()

        ticket = engine.submit(ask(deadline_seconds=0.2 if how == "deadline" else None), sink)
        if how == "cancel":
            ticket.cancel()
        elif how == "close":
            engine.close()
        assert over.wait(5)
        kind = {"cancel": Cancelled, "deadline": DeadlineExceeded, "close": Overloaded}[how]
        assert len(events) == 1 and isinstance(events[0].error, kind)
        if how != "close":
            fake.script["behaviour"] = "well"
            assert complete(engine, ask()).tokens  # the thrown away text did not stay in its queue

    def test_there_is_one_in_a_process(self, start, fake):
        engine = start()
        with pytest.raises(ConfigError, match="one for a process"):
            start()
        engine.close()
        again = start()
        assert complete(again, ask()).tokens

    @pytest.mark.parametrize("how", ["half", "child"])
    def test_a_start_that_fails_half_way_leaves_no_process_behind(self, start, fake, how, monkeypatch):
        workers: list[fake_dinfer.Worker] = []
        begin = fake.Worker.start
        monkeypatch.setattr(fake.Worker, "start", lambda worker: (workers.append(worker), begin(worker)))
        children = set(multiprocessing.active_children())
        fake.script["behaviour"] = how
        with pytest.raises(EngineFailed, match="does not start"):
            start()
        for worker in workers:
            worker.join(5)
            assert not worker.is_alive()
        assert not fake.handle.is_running() and len(workers) == (how == "half")
        assert set(multiprocessing.active_children()) == children
        fake.script["behaviour"] = "well"
        assert complete(start(), ask()).tokens

    def test_one_that_does_not_start_is_an_error_and_leaves_the_place_free(self, start, fake):
        fake.script["behaviour"] = "raises"
        with pytest.raises(EngineFailed, match="does not start .AssertionError: num_gpus"):
            start()
        fake.script["behaviour"] = "well"
        assert complete(start(), ask()).tokens


@pytest.mark.skipif(SOURCE is None, reason="HILDA_DINFER_SOURCE names no source tree of dInfer")
class TestAgainstItsSource:
    def test_the_fake_has_its_signatures(self):
        tree = ast.parse((Path(SOURCE) / "python/dinfer/decoding/serving.py").read_text(encoding="utf-8"))
        for name in ("SamplingParams", "DiffusionLLMServing"):
            kind = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
            real = next(node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
            ours = inspect.signature(getattr(fake_dinfer, name).__init__).parameters
            assert [argument.arg for argument in real.args.args] == list(ours)
            defaults = [
                parameter.default for parameter in ours.values() if parameter.default is not inspect.Parameter.empty
            ]
            assert [ast.literal_eval(node) for node in real.args.defaults] == defaults

    @pytest.mark.parametrize("length", [3, 8, 13])
    @pytest.mark.parametrize("eos", [-1, 41, 55, 2])
    def test_the_fake_returns_what_its_loop_over_blocks_returns(self, monkeypatch, length, eos):
        """Its real loop, tokens and iterator; the model and the cache are ours, as they need no GPU then."""
        package = types.ModuleType("dinfer_source")
        package.__path__ = [str(Path(SOURCE) / "python/dinfer/decoding")]
        monkeypatch.setitem(sys.modules, "dinfer_source", package)
        loop, utils = (importlib.import_module(f"dinfer_source.{name}") for name in ("generate_uniform", "utils"))
        mask, row = 99, [2] + list(range(20, 19 + length))

        def write(position):
            return 30 + position

        def model(tokens, position_ids=None, **_):
            logits = torch.nn.functional.one_hot(write(position_ids) % 100, 100).float()
            return types.SimpleNamespace(logits=logits, past_key_values=None)

        def decode(logits, start, end, x):
            here = x[:, start:end]
            x[:, start:end] = torch.where(here == mask, logits.argmax(-1), here)

        model.device = "cpu"
        decoder = types.SimpleNamespace(mask_id=mask, eos_id=eos, decode=decode, block_init=lambda *_: None)
        cache = types.SimpleNamespace(
            extend_cache=lambda *_: None, get_key_values=lambda *_: (None, None), update=lambda *_: None
        )
        blocks = utils.BlockIteratorFactory(start_block_align=True, use_block_diffusion=True)
        made = types.SimpleNamespace(create=lambda: cache)
        llm = loop.BlockDiffusionLLM(model, decoder, blocks, made, maximum_unroll=4, expected_tpf=4)
        real = llm.generate(torch.tensor([row]), gen_length=21, block_length=8)
        assert (real[0].tolist(), llm.num_forwards) == fake_dinfer.generate(row, 21, 8, write, eos, 2)

    def test_it_cannot_be_imported_without_vllm_and_the_probe_says_so(self, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(Path(SOURCE) / "python"))
        probed = dinfer_probe.probe_in_subprocess(120.0)
        if not probed.vllm:
            assert "parameters" in probed.errors and not probed.died and why_not_here(probed, "sglang", None)

    def test_its_tree_is_the_pinned_commit(self):
        done = subprocess.run(["git", "-C", SOURCE, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            assert done.stdout.strip() == PINNED
