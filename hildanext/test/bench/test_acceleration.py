"""Frontier and ablations: what is counted, what goes on after a kill, what is refused, and mode `fast`."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from hildanext.bench.acceleration import ablations_report, frontier, frontier_report
from hildanext.bench.acceleration.ablations import AblationsConfig, measure
from hildanext.bench.acceleration.cells import Turns, Written, write_all
from hildanext.bench.acceleration.frontier import FrontierConfig, best, fast_of
from hildanext.bench.acceleration.overhead import OverheadConfig, measure_overhead
from hildanext.bench.acceleration.readings import record
from hildanext.bench.acceleration.sweeps import Sweep, default_sweeps, ways_of
from hildanext.bench.acceleration.ways import PARENT_WAY, Way, Writers
from hildanext.cli import main
from hildanext.core.config import validate
from hildanext.core.errors import ConfigError, HildaError
from hildanext.core.registry import under_profile
from hildanext.core.runtime import Runtime, RuntimeConfig
from hildanext.core.statistics import Values, bootstrap, crossed_interval
from hildanext.decoding import MODES, decoder_section, mode_name
from hildanext.engine.base import EngineFacts
from hildanext.eval.generation import ONE_PER_STEP, PARENT, generative_nats
from hildanext.facade import fast_of as fast_of_name
from hildanext.facade import generate_text
from hildanext.facade import load_model as load
from hildanext.models.card import Card, Fast, card_text, read_card
from hildanext.models.loading.loaded_model import LoadedModel
from hildanext.models.loading.names import locate_diffusion
from hildanext.recipe import StageContext
from hildanext.serve.decoding_params import _decoder
from hildanext.serve.requests import Decoding
from hildanext.stages.generate import SampleConfig, decoder_sections
from small_models import parent_of, words_tokenizer

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [3, 4]]
RUNTIME = RuntimeConfig(device="cpu", dtype="fp64", threads=1)
ONE = Way("one", dict(ONE_PER_STEP))
SMALL = {"prompts": 2, "prompt_tokens": 4, "new_tokens": 6, "part": 1, "overhead": OverheadConfig(steps=0)}
FEW = {"threshold": Sweep(decoder=dict(ONE_PER_STEP), values=(0.4,), fallbacks=("left",))}
FAST = Fast(
    decoder={**ONE_PER_STEP, "tau_mask": 0.3, "fallback": "left"},
    tokens_per_forward=1.2,
    nats=1.0,
    base_tokens_per_forward=1.0,
    base_nats=1.1,
    prompts=2,
    new_tokens=8,
)


def loaded(model) -> LoadedModel:
    return LoadedModel("small", model, words_tokenizer(), Runtime(torch.device("cpu"), torch.float64, 1))


@pytest.fixture
def writers(make_model) -> Writers:
    model = make_model("qwen3", "parent")
    return Writers(loaded(model), parent_of(model), RUNTIME, 8, PROMPTS[0])


def turns(folder=None, seeds=(0, 1), part=2) -> Turns:
    return Turns(PROMPTS, seeds, part, {"model": "small"}, folder)


def test_a_crossed_interval_of_one_seed_is_the_bootstrap_over_items_and_a_difference_is_paired():
    generator = np.random.default_rng(3)
    values, weights = generator.normal(size=(1, 40)), np.ones((1, 40))
    ours = crossed_interval(Values(values, weights))
    assert ours == pytest.approx(bootstrap(Values(values[0], weights[0])), abs=0.06)
    three = Values(np.repeat(values, 3, 0) + 0.5, np.ones((3, 40)))
    assert crossed_interval(three, Values(values, weights)) == pytest.approx((0.5, 0.5), abs=1e-9), "of each prompt"
    apart = Values(values + np.array([[0.0], [4.0]]), np.ones((2, 40)))
    low, high = crossed_interval(apart)
    assert high - low > 3.0, "seeds are drawn, too"
    weighted = Values(np.array([[2.0, 6.0]]), np.array([[1.0, 3.0]]))
    assert crossed_interval(weighted) == pytest.approx((2.0, 2.0)), "sums over sums"


def test_what_is_counted_of_a_way(writers):
    sampled = Way("sampled", {**ONE_PER_STEP, "temperature": 1.0})
    written = write_all([ONE, sampled, PARENT_WAY], writers.of, writers.parent, turns(), None)
    assert [sorted(one.answers) for one in written] == [[0], [0, 1], [0, 1]], "what is greedy writes once"
    one, drawn, parent = (record(row, written[0], written[2], 2) for row in written)
    texts = [list(answer["tokens"]) for answer in written[0].answers[0]]
    assert one["name"] == "one" and one["tokens"] == sum(map(len, texts)) and parent["seeds"] == 2
    assert one["nats"]["value"] == pytest.approx(generative_nats(writers.parent, PROMPTS, texts))
    assert one["tokens_per_forward"]["value"] == one["tokens"] / (one["denoise_forwards"] + one["commit_forwards"])
    assert parent["tokens_per_forward"]["value"] == 1.0 and parent["rows_per_token"]["value"] == 1.0
    assert one["rows_per_token"]["value"] >= 1.0 and "over" not in one["nats"]
    over = drawn["nats"]["over"]
    assert over["low"] <= over["value"] <= over["high"]
    assert over["value"] == pytest.approx(drawn["nats"]["value"] - one["nats"]["value"])
    assert parent["over_parent"] == 1.0 and one["over_parent"] > 0


def test_a_batch_writes_what_its_prompts_write_alone(writers):
    ways = [ONE, Way("sampled", {**ONE_PER_STEP, "temperature": 1.0}), PARENT_WAY]
    alone = write_all(ways, writers.of, writers.parent, turns(part=3), None)
    together = write_all(ways, writers.of, writers.parent, replace(turns(part=3), batch=2), None)
    for one, other in zip(alone, together, strict=True):
        for seed, answers in one.answers.items():
            assert [a["tokens"] for a in answers] == [a["tokens"] for a in other.answers[seed]]
            assert [a["denoise_forwards"] for a in answers] == [a["denoise_forwards"] for a in other.answers[seed]]
        rows = [sum(a["rows"] for a in row.answers[0]) for row in (one, other)]
        assert rows[0] == pytest.approx(rows[1]) or one.way.section is not None


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_rows_are_those_that_were_fed(make_model, alignment):
    """Blocks of 4: 3 tokens of the prompt and 5 new ones are two blocks; each forward feeds one, and the first one is
    committed beside the second one's first step."""
    model = make_model("qwen3", alignment, block_size=4)
    way = Writers(loaded(model), parent_of(model), RUNTIME, 5, [5]).of(ONE)
    (answer,) = way([[5, 6, 7]], 0)
    fed = 4 * answer["denoise_forwards"] + 4 * (answer["commit_forwards"] or 1)
    assert answer["rows"] == fed and answer["prefill_forwards"] == 0
    (whole,) = way([[5, 6, 7, 8]], 0)
    fed = 4 * whole["denoise_forwards"] + 4 * (whole["commit_forwards"] or 1)
    assert whole["rows"] == fed and whole["prefill_forwards"] == 1, "the prompt's whole block is read, and not counted"


def test_a_killed_measurement_goes_on_where_it_was(writers, tmp_path):
    calls = []

    def opened(way):
        write = writers.of(way)

        def counted(prompts, seed):
            calls.append(way.name)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return write(prompts, seed)

        return counted

    with pytest.raises(KeyboardInterrupt):
        write_all([ONE, PARENT_WAY], opened, writers.parent, turns(tmp_path), None)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(kept) == 2, "two whole cells of two prompts"
    again = write_all([ONE, PARENT_WAY], opened, writers.parent, turns(tmp_path), None)
    assert len(calls) == 5 + 9 - 4, "nothing that was whole is written again"
    assert {name: (tmp_path / name).read_text() for name in kept} == kept
    whole = write_all([ONE, PARENT_WAY], writers.of, writers.parent, turns(), None)
    for mine, fresh in zip(again, whole, strict=True):
        assert {seed: [a["tokens"] for a in row] for seed, row in mine.answers.items()} == {
            seed: [a["tokens"] for a in row] for seed, row in fresh.answers.items()
        }
    assert len(again[0].sessions) == 2

    next(tmp_path.iterdir()).write_text("{")
    before = len(calls)
    write_all([ONE, PARENT_WAY], opened, writers.parent, turns(tmp_path), None)
    assert len(calls) - before in (1, 2), "a broken cell is written again"
    other = Turns(PROMPTS, (0, 1), 2, {"model": "another"}, tmp_path)
    write_all([ONE, PARENT_WAY], writers.of, writers.parent, other, None)
    assert len(list(tmp_path.iterdir())) == 12, "another model has cells of its own"


def test_sweeps_name_every_setting_and_refuse_what_a_decoder_does_not_have():
    names = [way.name for way in ways_of(FEW, True)]
    assert names == ["one per step", "one per step, left", "one per step, entropy", "S_MODE", "Q_MODE",
                     "threshold 0.4, left"]  # fmt: skip
    assert "card, run" not in default_sweeps("SAFE") and "card, run" in default_sweeps("FULL")
    rules = {"threshold", "factor", "entropy_bound", "klass", "credit", "hierarchical"}
    assert set(default_sweeps("SAFE")) == rules
    ways_of(default_sweeps("SAFE"), True)
    rule = {**ONE_PER_STEP, "reveal": {"name": "entropy_bound"}}
    (way,) = Sweep(decoder=rule, knob="reveal.gamma", values=(0.5,), fallbacks=()).ways("eb")
    assert way.name == "eb 0.5" and way.section["reveal"] == {"name": "entropy_bound", "gamma": 0.5}
    for knob, values, said in (
        ("reveal.gama", (0.5,), "gama"),
        ("reveal.gamma", (-1.0,), "gamma"),
        ("tau_mask.x", (0.5,), "no section"),
    ):
        with pytest.raises(ConfigError, match=said):
            FrontierConfig(sweeps={"eb": Sweep(decoder=rule, knob=knob, values=values, fallbacks=())})
    with pytest.raises(HildaError, match="unknown decoder 'wino'"):
        FrontierConfig(sweeps={"w": Sweep(decoder={"name": "wino"}, values=(0.5,), fallbacks=())})
    with pytest.raises(ConfigError, match="choose one"):
        FrontierConfig(prompts_file="a", source={"name": "text"})


def rows(*named):
    return [
        {"name": name, "decoder": section, "tokens_per_forward": {"value": most}, "nats": {"value": nats}}
        for name, section, most, nats in named
    ]


def test_the_best_setting_writes_most_at_the_nats_of_one_token_a_step():
    card = {**ONE_PER_STEP, "reveal": {"name": "card", "run": True}}
    left = {**ONE_PER_STEP, "fallback": "left"}
    found = rows(
        ("one per step", ONE_PER_STEP, 1.0, 1.6),
        ("worse", ONE_PER_STEP, 1.4, 1.7),
        ("good", left, 1.1, 1.5),
        ("good, too", ONE_PER_STEP, 1.1, 1.55),
        ("card", card, 1.2, 1.2),
        (PARENT, None, 1.9, 0.7),
    )
    assert best(found, "one per step") == "card" and best(found, "nobody") is None
    result = {"rows": found, "settings": {"new_tokens": 8}, "prompt_tokens": [3, 3]}
    chosen = fast_of(result)
    assert chosen.decoder == left and chosen.tokens_per_forward == 1.1, "every profile may build it"
    with under_profile("FULL"):
        assert fast_of(result).decoder == left, "the profile of the measurement does not matter"


def test_overhead_is_told_beside_the_threshold_and_leaves_the_text_alone(make_model):
    model = make_model("qwen3", "parent")
    told = measure_overhead(model, PROMPTS[1], OverheadConfig(steps=12, turns=1))
    assert told["rules"]["threshold"]["share"] == 0.0 and told["steps"] >= 12
    assert set(told["rules"]) >= {"factor", "entropy_bound", "klass", "credit", "hierarchical", "threshold, left"}
    assert all(rule["ms"] > 0 for rule in told["rules"].values())


def test_an_old_card_loads_and_what_nobody_measured_is_not_written(make_model, tmp_path):
    card = make_model().card
    assert card.fast is None and "fast" not in json.loads(card_text(card))
    measured = replace(card, fast=FAST)
    (tmp_path / "hilda.json").write_text(card_text(measured))
    assert read_card(tmp_path) == measured
    (tmp_path / "hilda.json").write_text(card_text(card))
    assert read_card(tmp_path) == card and isinstance(card, Card)


@pytest.fixture
def measured_tiny(tmp_path):
    """A copy of the embedded checkpoint with a setting in its card."""
    folder = tmp_path / "measured"
    shutil.copytree(locate_diffusion("tiny"), folder)
    folder.chmod(0o755)
    card = folder / "hilda.json"
    text = card_text(replace(read_card(folder), fast=FAST))
    card.unlink()
    card.write_text(text)
    return folder


def test_mode_fast_is_what_the_card_says_and_refused_without(measured_tiny, capsys):
    assert mode_name("FAST") == "fast" and fast_of_name(str(measured_tiny)) == FAST.decoder
    assert decoder_section("fast", None, {"tau_mask": 0.2}, FAST.decoder)["tau_mask"] == 0.2
    with pytest.raises(ConfigError, match="bench frontier"):
        decoder_section("fast")
    ours = load(str(measured_tiny), dtype="fp32", threads=1)
    text = generate_text(ours, "Once", "fast", max_new_tokens=12)
    assert text.tokens == generate_text(ours, "Once", decoder=FAST.decoder, max_new_tokens=12).tokens
    with pytest.raises(ConfigError, match="bench frontier"):
        generate_text(load("tiny", dtype="fp32", threads=1), "Once", "fast", max_new_tokens=2)

    ask = ["generate", "--prompt", "Once", "--max-new-tokens", "12", "--dtype", "fp32", "--threads", "1", "--mode"]
    assert main([*ask, "fast", "--model", str(measured_tiny), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"] == text.text
    for model in ([], ["--model", "tiny"]):
        assert main([*ask, "fast", *model]) == 2
        assert "hildanext bench frontier" in capsys.readouterr().err
    assert main(["generate", "--prompt", "Once", "--mode", "fast", "--server", "http://127.0.0.1:1"]) == 2
    assert "--server asks a service" in capsys.readouterr().err


def test_a_request_may_ask_for_the_mode_of_the_services_checkpoint():
    facts = EngineFacts("scripted", "for a test", "scripted", None, "cpu", "fp32", 1, 4, 512, 1, 1, True, False)
    asked = Decoding(mode="fast", tau_mask=0.25)
    section = _decoder(asked, replace(facts, fast=FAST.decoder), None)
    assert section == {**FAST.decoder, "tau_mask": 0.25}
    with pytest.raises(ConfigError, match="bench frontier"):
        _decoder(asked, facts, None)


def test_a_recipe_reads_the_card_once_the_model_is_there(measured_tiny, tmp_path):
    settings = SampleConfig(modes=("fast",))
    waiting = StageContext(tmp_path, "generate")
    assert decoder_sections(settings, waiting)["fast"] == MODES["S_MODE"], "checked before anything has run"
    made = replace(waiting, outcomes={"convert": {"model": str(measured_tiny)}})
    assert decoder_sections(settings, made)["fast"] == FAST.decoder
    with pytest.raises(ConfigError, match="bench frontier"):
        decoder_sections(replace(settings, model="tiny"), waiting)


def test_a_frontier_is_measured_written_and_saved(measured_tiny, tmp_path, capsys):
    (measured_tiny / "hilda.json").write_text((locate_diffusion("tiny") / "hilda.json").read_text())
    out = tmp_path / "frontier.json"
    sweeps = {"threshold": {"decoder": dict(ONE_PER_STEP), "values": [0.3], "fallbacks": ["left"]}}
    run = tmp_path / "run.json"
    knobs = {"prompts": 2, "prompt_tokens": 6, "part": 1, "overhead": {"steps": 2, "turns": 1}, "sweeps": sweeps}
    run.write_text(json.dumps({"bench": {"model": str(measured_tiny), "frontier": knobs}}))
    asked = ["bench", "frontier", "--config", str(run), "--new-tokens", "8", "--dtype", "fp32", "--threads", "1"]
    assert main([*asked, "--out", str(out), "--save"]) == 0
    result = json.loads(out.read_text())
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "one per step" and names[-2:] == ["threshold 0.3, left", PARENT]
    told = out.with_suffix(".md").read_text()
    assert "threshold 0.3, left" in told and "What a rule costs" in told and out.with_suffix(".png").stat().st_size > 0
    saved = read_card(measured_tiny).fast
    assert saved is not None and saved.prompts == 2 and saved.new_tokens == 8
    assert saved.nats <= saved.base_nats and saved.tokens_per_forward >= saved.base_tokens_per_forward
    assert generate_text(load(str(measured_tiny), dtype="fp32", threads=1), "A", "fast", max_new_tokens=4).tokens
    cells = list(out.with_suffix(".cells").iterdir())
    assert len(cells) == 2 * (6 + 3), "six settings write once, the parent under each of three seeds"
    capsys.readouterr()
    for wrong, said in (
        (["bench", "decode", "--save"], "bench frontier"),
        (["bench", "frontier", "--parent", ""], "--parent"),
        (["bench", "frontier", "--save", "--model", "ar-of-tiny"], "ar-of-tiny"),
        (["bench", "ablations"], "--out"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err


TABLES = {
    "speed": {
        "title": "Rules",
        "rows": {
            "base": {"decoder": dict(ONE_PER_STEP)},
            "left": {"decoder": {**ONE_PER_STEP, "fallback": "left"}},
            "wino": {"decoder": {"name": "wino"}},
            "no such rule": {"decoder": {**ONE_PER_STEP, "reveal": "lopa"}},
        },
    },
    "again": {"title": "The same way", "rows": {"other": {"decoder": dict(ONE_PER_STEP)}}},
}


def ablations(**changes) -> AblationsConfig:
    knobs = {"tables": TABLES, "prompts": 2, "prompt_tokens": 4, "new_tokens": 6, "part": 1, "seeds": [0]}
    return validate(AblationsConfig, {**knobs, **changes}, "bench.ablations")


def test_ablations_tell_of_what_is_not_there_and_write_each_way_once(make_model, tmp_path):
    model = make_model("qwen3", "parent")
    said: list[str] = []
    result = measure(loaded(model), parent_of(model), RUNTIME, ablations(), tmp_path, said.append)
    speed, again = result["tables"]["speed"]["rows"], result["tables"]["again"]["rows"]
    assert "unknown decoder 'wino'" in speed[2]["missing"] and "unknown decoder.reveal 'lopa'" in speed[3]["missing"]
    assert any("wino is not there" in line for line in said)
    assert [row["name"] for row in speed] == ["base", "left", "wino", "no such rule", PARENT]
    assert again[0]["name"] == "other" and again[0]["nats"]["value"] == speed[0]["nats"]["value"]
    assert "over" in speed[1]["nats"] and "over" not in speed[0]["nats"]
    assert len(list((tmp_path / "cells").iterdir())) == 2 * 3, "two ways and the parent, two parts each"
    text = ablations_report.markdown({"model": "small", **result})
    assert "not there: unknown decoder 'wino'" in text
    assert len(ablations_report.tables({"model": "small", **result})) == 2
    assert ablations_report.draw({"model": "small", **result}, tmp_path / "a.png").stat().st_size > 0


def test_a_mistake_in_a_list_is_an_error_and_no_missing_method():
    def table(**row):
        return {"t": {"title": "t", "rows": {"r": row}}}

    for tables, said in (
        (table(decoder={**ONE_PER_STEP, "tau_msk": 0.5}), "tau_msk"),
        (table(decoder={**ONE_PER_STEP, "reveal": "card"}), "FULL"),
        (table(decoder=dict(ONE_PER_STEP), modle="x"), "modle"),
        ({"t": {"title": "t", "rows": {"r": {"decoder": dict(ONE_PER_STEP)}}, "base": "s"}}, "no row"),
    ):
        with pytest.raises(ConfigError, match=said):
            ablations(tables=tables)
    with pytest.raises(HildaError, match="gsm"):
        ablations(tasks={"gsm": {}})


def test_the_shipped_lists_are_read(repository):
    for name in ("ablations-tiny.json", "smollm2/ablations.json"):
        run = json.loads((repository / "hildanext" / "runs" / "configs" / name).read_text())
        with under_profile(run["profile"]):
            built = validate(AblationsConfig, run["bench"]["ablations"], name)
        assert {"quality", "speed", "runtime", "exact"} <= set(built.tables) and len(built.seeds) == 3


@pytest.fixture
def repository(request):
    return request.config.rootpath


def test_every_setting_of_a_frontier_stands_in_its_tables(make_model):
    model = make_model("qwen3", "parent")
    result = frontier.measure(
        loaded(model), parent_of(model), RUNTIME, FrontierConfig(**{**SMALL, "sweeps": FEW, "modes": False})
    )
    text = frontier_report.markdown({"model": "small", **result})
    assert all(name in text for name in ("one per step, left", "threshold 0.4, left", PARENT))
    assert frontier_report.family("threshold 0.4, left") == "threshold, left"
    assert isinstance(Written(ONE).answers, dict)
