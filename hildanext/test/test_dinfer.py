"""The guarded adapter of dInfer, against a fake of its interface; against its own source where that is at hand."""

import ast
import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import fake_dinfer
from hildanext.decode import decoder_section
from hildanext.engines import choose, guards
from hildanext.engines.base import (
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    Failed,
    Finished,
    Overloaded,
    Request,
    complete,
)
from hildanext.engines.dinfer import DInferEngine, DInferKnobs
from hildanext.engines.dinfer_output import ending_of
from hildanext.engines.guards import PINNED, Found, why_not_here, why_not_model
from hildanext.errors import ConfigError, ModelError
from hildanext.verbs import doctor

TINY = files("hildanext") / "assets" / "tiny" / "diffusion"
GOOD = Found(
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
    """The fake as `dinfer`, writing tokens 10, 11, ... by default."""
    for name in ("dinfer", "dinfer.decoding"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "dinfer", fake_dinfer)
    monkeypatch.setitem(sys.modules, "dinfer.decoding.serving", fake_dinfer)
    fake_dinfer.script.update(write=lambda prompt, length: [10 + i for i in range(length)], behaviour="well")
    fake_dinfer.made.clear()
    yield fake_dinfer
    fake_dinfer.handle.groups = []


@pytest.fixture
def start(fake, folder):
    opened: list[DInferEngine] = []

    def engine(**settings) -> DInferEngine:
        known = {"block_length": 8, "max_length": 256, "mask_id": 3, **settings}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        opened.append(DInferEngine(DInferKnobs(**known), str(folder), tokenizer, "for a test"))
        return opened[-1]

    yield engine
    for one in opened:
        one.close()


def ask(**more) -> Request:
    return Request(**{"tokens": (5, 6, 7), "max_new_tokens": 12, "decoder": decoder_section("S_MODE"), **more})


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
        found = guards.probe(60.0)
        assert found.parameters == GOOD.parameters and not found.vllm and not found.died
        (package / "__init__.py").write_text("import vllm_that_is_absent")
        assert "ModuleNotFoundError" in guards.probe(60.0).errors["parameters"]
        (package / "__init__.py").write_text("import os; os._exit(11)")
        assert "ended Python with 11" in guards.probe(60.0).died
        (package / "__init__.py").write_text("import time; time.sleep(60)")
        assert "more than 4 s" in guards.probe(4.0).died

    def test_auto_says_why_it_is_not_used_and_uses_it_where_nothing_stands_against_it(self, folder, monkeypatch):
        assert choose({}, "tiny") == ("transformers", "auto: dinfer is not used: it is not installed")
        monkeypatch.setattr(guards, "installed", lambda: True)
        monkeypatch.setattr(guards, "probe", lambda seconds: Found())
        assert choose({}, str(folder))[1] == "auto: dinfer is not used: no CUDA device"
        assert "it has no device" in choose({"device": "cpu"}, str(folder))[1]
        monkeypatch.setattr(guards, "probe", lambda seconds: GOOD)
        assert choose({}, str(folder))[0] == "dinfer" and choose({}, "tiny")[0] == "transformers"
        assert {field.name for field in dataclasses.fields(DInferKnobs)} == guards.KNOBS

    def test_doctor_tells_why_without_importing_it_here(self, monkeypatch):
        assert doctor.examine_engines()[-1].value == "not used: it is not installed"
        monkeypatch.setattr(guards, "installed", lambda: True)
        monkeypatch.setattr(guards, "probe", lambda: Found(died="importing it took more than 120 s"))
        finding = doctor.examine_engines()[-1]
        assert finding.state == "note" and finding.value == "not used: importing it took more than 120 s"
        monkeypatch.setattr(guards, "probe", lambda: GOOD)
        assert doctor.examine_engines()[-1].state == "ok"
        assert "dinfer" not in sys.modules

    def test_opening_it_by_name_says_what_stands_against_it(self, folder, monkeypatch):
        monkeypatch.setattr("hildanext.engines.dinfer.probe", lambda seconds: Found())
        with pytest.raises(ConfigError, match="no CUDA device"):
            DInferKnobs().open(str(folder), None, "")
        with pytest.raises(ModelError, match="no folder"):
            DInferKnobs().open("tiny", None, "")
        with pytest.raises(ConfigError, match="no autoregressive parent"):
            DInferKnobs().open(str(folder), "tiny", "")


class TestAnswers:
    def test_the_text_is_what_it_wrote_behind_the_prompt_cut_to_the_length(self, start):
        engine = start()
        answer = complete(engine, ask())
        assert answer.tokens == list(range(10, 22)) and answer.finish_reason == "length"
        assert answer.text == engine.tokenizer.decode(answer.tokens)
        assert not answer.edits_supported and answer.stats.edits == 0 and answer.stats.forwards == 3
        assert complete(engine, ask()).stats.forwards == 3  # it counts over all calls

    def test_it_is_started_as_its_traps_demand(self, start, folder):
        start(mode="Q_MODE")
        (made,) = fake_dinfer.made
        params = made["sample_params"]
        assert (params.cache, params.use_bd, params.cont_weight, params.threshold) == ("prefix", True, 0.0, 0.7)
        assert params.mask_id == 3 and made["model_type"] == "llada2" and made["dp_size"] == 1

    def test_an_end_of_text_that_it_took_out_is_noticed_even_in_the_prompt(self, start, fake):
        engine = start()
        eos = engine.eos_id
        fake.script["write"] = lambda prompt, length: [10, 11, eos] + [12] * (length - 3)
        answer = complete(engine, ask(tokens=(eos, 6, eos, 7)))
        assert answer.tokens == [10, 11] and answer.finish_reason == "eos" and answer.prompt_tokens == 4

    def test_a_stop_string_ends_the_text(self, start):
        engine = start()
        stop = engine.tokenizer.decode([13])
        answer = complete(engine, ask(stop=(stop,)))
        assert answer.finish_reason == "stop" and stop not in answer.text

    def test_another_prompt_or_masks_are_no_answer(self):
        tokenizer = types.SimpleNamespace(eos_token_id=0, decode=lambda ids, **_: "")
        with pytest.raises(EngineFailed, match="another prompt"):
            ending_of([9, 9, 9], [5, 6], 2, tokenizer, 3, ())

    def test_what_it_would_ignore_is_refused(self, start):
        engine = start(edits="refuse")
        wishes = [
            ask(decoder=decoder_section("Q_MODE", tau_edit=None)),
            ask(decoder=decoder_section("S_MODE")),
            ask(decoder=decoder_section("S_MODE", tau_edit=None, temperature=1.0)),
            ask(decoder=decoder_section("S_MODE", tau_edit=None), steps=True),
            ask(decoder=decoder_section("S_MODE", tau_edit=None), ignore_eos=True),
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
            defaults = [one.default for one in ours.values() if one.default is not inspect.Parameter.empty]
            assert [ast.literal_eval(node) for node in real.args.defaults] == defaults

    def test_it_cannot_be_imported_without_vllm_and_the_probe_says_so(self, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(Path(SOURCE) / "python"))
        found = guards.probe(120.0)
        if not found.vllm:
            assert "parameters" in found.errors and not found.died and why_not_here(found, "sglang", None)

    def test_its_tree_is_the_pinned_commit(self):
        done = subprocess.run(["git", "-C", SOURCE, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            assert done.stdout.strip() == PINNED
