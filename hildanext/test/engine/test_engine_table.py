"""Which engine a section means: the table, what `auto` chooses in each case, and the words it gives for it."""

import json
import subprocess
import sys

import pytest

from hildanext.core.errors import ConfigError, ModelError, UnknownChoice
from hildanext.engine import ENGINES, choose, engine_class, open_engine
from hildanext.engine.base import EngineFailed
from hildanext.engine.dinfer import probe as dinfer_probe
from hildanext.engine.dinfer.config import PINNED
from hildanext.engine.dinfer.probe import ProbeResult

NOTHING_NAMED = "chosen automatically: no address of a server to ask is given (base_url), and "
NO_DINFER = NOTHING_NAMED + "dInfer, for LLaDA models on NVIDIA GPUs, cannot answer: "
USABLE = ProbeResult(
    capabilities=((8, 0),),
    vllm=True,
    sglang=True,
    commit=PINNED,
    parameters={name: sorted(parameters) for name, parameters in dinfer_probe.NEEDED.items()},
)


@pytest.fixture
def llada(tmp_path):
    """A folder that looks like a LLaDA 2 checkpoint."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LLaDA2MoeModelLM"]}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    (tmp_path / "one.safetensors").write_bytes(b"")
    return str(tmp_path)


@pytest.fixture
def dinfer(monkeypatch):
    """dInfer is installed, as far as anybody can tell; a test says what its probe finds."""

    def finds(found: ProbeResult) -> list[float]:
        asked: list[float] = []
        monkeypatch.setattr(dinfer_probe, "installed", lambda: True)
        monkeypatch.setattr(dinfer_probe, "probe", lambda seconds=120.0: (asked.append(seconds), found)[1])
        return asked

    return finds


class TestTheTable:
    def test_every_row_is_a_section_that_opens(self):
        assert list(ENGINES) == ["local", "transformers", "openai", "dinfer"]
        for name in ENGINES:
            assert callable(engine_class(name).open)

    def test_reading_it_and_choosing_load_no_torch(self):
        program = (
            "import sys; from hildanext.engine import choose; choose({}, 'tiny'); choose({'base_url': 'x'}, 'm'); "
            "print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"

    @pytest.mark.parametrize("call", [choose, open_engine])
    def test_a_name_that_nobody_has_is_an_error_with_the_choices(self, call):
        with pytest.raises(
            UnknownChoice, match=r"did you mean 'openai'\? choices: auto, dinfer, local, openai, transformers"
        ):
            call({"name": "opnai"}, "tiny")

    @pytest.mark.parametrize("call", [choose, open_engine])
    def test_a_name_that_is_no_text_is_an_error(self, call):
        with pytest.raises(ConfigError, match="engine name 5 is no text"):
            call({"name": 5}, "tiny")

    @pytest.mark.parametrize("section", [{"name": "transformers", "slot": 1}, {"slot": 1}, {"name": "auto", "slot": 1}])
    def test_a_knob_that_the_engine_does_not_have_is_an_error(self, section):
        with pytest.raises(ConfigError, match="did you mean 'slots'"):
            open_engine(section, "tiny")


class TestWhatAutoChooses:
    @pytest.mark.parametrize("name", [{}, {"name": "auto"}])
    def test_a_server_where_its_address_is_given(self, name, dinfer, llada):
        asked = dinfer(USABLE)
        words = "chosen automatically: base_url gives the address of a server to ask"
        assert choose({**name, "base_url": "http://x"}, llada) == ("openai", words)
        assert not asked  # nobody looks for dInfer then

    def test_dinfer_where_nothing_stands_against_it(self, dinfer, llada):
        asked = dinfer(USABLE)
        words = NOTHING_NAMED + "dInfer is installed, runs this model and passes its checks"
        assert choose({"probe_seconds": 7}, llada) == ("dinfer", words)
        assert asked == [7.0]

    def test_our_own_where_dinfer_is_not_installed(self, llada):
        assert choose({}, llada) == ("transformers", NO_DINFER + "it is not installed")

    @pytest.mark.parametrize(
        ("section", "probed", "words"),
        [
            ({}, ProbeResult(), "no CUDA device"),
            ({}, ProbeResult(capabilities=((6, 1),)), "a GPU of compute capability 6.1, and vLLM needs 7.0"),
            ({}, ProbeResult(died="importing it took more than 120 s"), "importing it took more than 120 s"),
            ({"slots": 4}, USABLE, "the engine's section sets slots, which it does not know"),
        ],
    )
    def test_our_own_with_what_stands_against_dinfer(self, section, probed, words, dinfer, llada):
        dinfer(probed)
        assert choose(section, llada) == ("transformers", NO_DINFER + words)

    def test_our_own_for_a_model_that_dinfer_does_not_run_and_nobody_imports_it(self, dinfer):
        asked = dinfer(USABLE)
        name, reason = choose({}, "tiny")
        assert name == "transformers" and reason == NO_DINFER + "'tiny' is no folder with a config.json"
        assert not asked

    def test_its_words_stand_in_the_facts_of_the_engine(self):
        engine = open_engine({"threads": 1}, "tiny")
        assert engine.facts.engine == "transformers" and engine.facts.reason.startswith(NO_DINFER)
        engine.close()


class TestByName:
    @pytest.mark.parametrize("name", list(ENGINES))
    def test_the_named_one_is_chosen_and_the_reason_says_so(self, name):
        assert choose({"name": name}, "tiny") == (name, "asked for by name")

    def test_one_whose_guard_refuses_is_an_error_and_no_other_takes_its_place(self, dinfer, llada):
        engine_class("dinfer")  # the module that holds the probe is there
        dinfer(ProbeResult())
        with pytest.raises(ConfigError, match="dinfer cannot be used here: no CUDA device") as caught:
            open_engine({"name": "dinfer"}, llada)
        assert "use the engine local" in str(caught.value)
        with pytest.raises(ModelError, match="dinfer cannot run this model"):
            open_engine({"name": "dinfer"}, "tiny")

    def test_a_server_without_an_address_or_that_is_not_there_is_an_error(self):
        with pytest.raises(ConfigError, match="base_url: it is missing"):
            open_engine({"name": "openai"}, "m")
        with pytest.raises(EngineFailed, match="no server answers at"):
            open_engine({"name": "openai", "base_url": "http://127.0.0.1:9"}, "m")
