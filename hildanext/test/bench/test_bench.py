"""Writing compared, decode and training speed: that the accounting is right, on tiny random models."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hildanext.bench import answer_speed, decode_speed, engine_speed, train_speed
from hildanext.bench.step_memory import added_bytes, standing_bytes
from hildanext.cli import main
from hildanext.core.config import validate
from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import finite
from hildanext.diffusion import targets
from hildanext.eval.generation import (
    ONE_PER_STEP,
    PARENT,
    GenerationBenchConfig,
    compare,
    distinct,
    generative_nats,
    repetition,
)
from hildanext.losses import SupervisedStep
from hildanext.losses.mask_to_token import MaskToToken
from small_models import parent_of, words_tokenizer

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


def test_distinct_and_repetition_by_hand():
    """1 2 1 2 1: unigrams 2 of 5, bigrams {12, 21} of 4, 4-grams 1212 2121 of 2; 1 1 1 1 1: one 4-gram, twice."""
    assert distinct([[1, 2, 1, 2, 1]], 1) == pytest.approx(2 / 5)
    assert distinct([[1, 2, 1, 2, 1]], 2) == pytest.approx(2 / 4)
    assert distinct([[1, 2], [1, 2]], 2) == pytest.approx(1 / 2), "pooled over completions"
    assert distinct([[1]], 2) == 0.0
    assert repetition([[1, 2, 1, 2, 1]]) == 0.0
    assert repetition([[1, 1, 1, 1, 1]]) == pytest.approx(1 / 2)
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0, "within a completion only"


def test_generative_nats_score_the_completion_alone(make_model):
    parent = parent_of(make_model("qwen3", "parent"))
    tokens = torch.tensor([[5, 6, 7, 20, 21]])
    zeros, place = torch.zeros_like(tokens), torch.arange(5)[None]
    wanted = float(parent.token_nll(tokens, zeros, place)[0, 3:].mean())
    assert generative_nats(parent, [[5, 6, 7], [4]], [[20, 21], []]) == pytest.approx(wanted, abs=1e-12)
    assert math.isnan(generative_nats(parent, [[4]], [[]]))


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_every_way_writes_on_the_same_prompts_and_forwards_are_counted(make_model, alignment):
    model = make_model("qwen3", alignment)
    rows = compare(model, None, parent_of(model), PROMPTS, GenerationBenchConfig(new_tokens=8))
    assert [row.name for row in rows] == ["S_MODE", "Q_MODE", "one per step", PARENT]
    for row in rows:
        record = row.to_record()
        assert record["tokens"] == 16 and record["seconds"] > 0
        assert record["generative_perplexity"] == pytest.approx(math.exp(row.nats_per_token))
    stepwise, parent = rows[2].to_record(), rows[3].to_record()
    # One token a forward (canvas rounded up to the block), and the forward that finds the block unchanged.
    assert 0.5 <= stepwise["tokens_per_forward"] <= 1.0 and stepwise["edits"] == 0
    assert parent["forwards"] == 16 and parent["tokens_per_forward"] == 1.0


def test_without_a_parent_there_is_no_perplexity(make_model):
    rows = compare(make_model(), None, None, PROMPTS[:1], GenerationBenchConfig(new_tokens=4))
    assert PARENT not in [row.name for row in rows]
    assert finite(rows[0].to_record())["generative_perplexity"] is None


def test_a_report_holds_no_number_that_json_lacks():
    cleaned = finite({"a": [math.nan, 1.0, {"b": math.inf}], "c": (1, "x")})
    assert cleaned == {"a": [None, 1.0, {"b": None}], "c": [1, "x"]}


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_decode_steps_are_paired_with_bare_forwards(make_model, alignment):
    model = make_model("llama", alignment, dtype=torch.float32)
    settings = decode_speed.DecodeSpeedConfig(
        prompt_tokens=4, new_tokens=8, repeats=1, decoders={"one": dict(ONE_PER_STEP)}
    )
    result = decode_speed.measure(model, parent_of(model), settings)
    kinds = result["steps"]["one"]
    steps = sum(kind["steps"] for kind in kinds.values())
    generation = result["generation"][0]
    assert steps == generation["forwards"] - generation["prefill_forwards"], (
        "each step of the loop, and nothing else, was timed"
    )
    assert all(kind["over_network"] > 0 and kind["backbone_ms"] <= kind["network_ms"] for kind in kinds.values())
    assert len(decode_speed.tables(result)) == 2


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_each_forward_of_the_engine_is_followed_by_one_of_the_same_size(make_model, alignment):
    model = make_model("llama", alignment)
    fed: list[int] = []
    handle = model.register_forward_hook(lambda _, arguments, __: fed.append(arguments[0].shape[1]))
    few = {"name": "threshold_edit", "tau_mask": 0.1, "tau_edit": None}
    settings = engine_speed.EngineSpeedConfig(prompt_tokens=9, new_tokens=7, concurrency=3, repeats=2, decoder=few)
    result = engine_speed.measure(model, words_tokenizer(), parent_of(model), settings)
    handle.remove()
    assert fed and fed[::2] == fed[1::2]
    assert len(result["repeats"]) == 2 and all(value > 0 for value in result["medians"].values())
    assert result["medians"]["loop_over_network"] > 1, "the loop holds the network"
    assert [len(table.columns) for table in engine_speed.tables(result)] == [3, 2]


def test_what_measuring_takes_is_not_counted_as_the_engine_s(make_model, monkeypatch):
    model = make_model("llama", "block")
    real = decode_speed.BareForward.backbone

    def slow(bare, fed, extent):
        time.sleep(0.3)
        return real(bare, fed, extent)

    monkeypatch.setattr(decode_speed.BareForward, "backbone", slow)
    fast = {"name": "threshold_edit", "tau_mask": 0.0, "tau_edit": None}
    settings = engine_speed.EngineSpeedConfig(prompt_tokens=9, new_tokens=3, concurrency=1, repeats=1, decoder=fast)
    medians = engine_speed.measure(model, words_tokenizer(), None, settings)["medians"]
    assert medians["first_block_seconds"] < 0.3 and 3 / medians["alone_tokens_per_second"] < 0.3


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_the_plain_training_step_has_the_fast_ones_loss_and_gradient(make_model, alignment):
    model = make_model("qwen3", alignment)
    view = train_speed._view(model, train_speed.TrainSpeedConfig(sequence_length=16, block_size=4), 0)
    step = SupervisedStep(model, {"m2t": MaskToToken()})
    fast = step(view).total
    fast.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    slow = train_speed.plain_loss(model, view)
    slow.backward()
    assert slow.item() == pytest.approx(fast.item(), rel=1e-6)
    for name, value in model.named_parameters():
        assert torch.allclose(value.grad, gradients[name], rtol=1e-4, atol=1e-5), name


def test_flop_by_hand(make_model):
    """L 16, B 4, no documents: 4^2 * (16 + 4) = 320 pairs; 4 heads of 8; 3 layers. Body: q 32x32, k, v 16x32, o 32x32,
    gate, up 48x32, down 32x48 = 7680 a layer."""
    model = make_model("llama", "block")
    view = train_speed._view(model, train_speed.TrainSpeedConfig(sequence_length=16, block_size=4, batch_size=1), 0)
    flop = train_speed.model_flop(model, view)
    assert flop["attention"] == 12 * 320 * 4 * 8 * 3
    assert flop["body"] == 6 * (3 * 7680) * 32
    supervised = int((view.masked & targets(view.maskable, view.position, "none")).sum())
    assert flop["head"] == 6 * 64 * 32 * supervised


def test_training_speed_reports_both_ways_and_the_products(make_model):
    model = make_model("llama", "block", dtype=torch.float32)
    settings = train_speed.TrainSpeedConfig(sequence_length=16, block_size=4, repeats=1, precision="no")
    result = train_speed.measure(model, settings)
    assert set(result["ways"]) == {"fast", "plain"} and result["speedup"] > 0
    assert result["product_flop_per_second"] > 0
    assert [table.row_count for table in train_speed.tables(result)] == [3, 2]


def test_the_step_of_a_parent_that_stays_is_measured_by_the_mask(make_model):
    """On the same rows: groups of its own number, less memory between steps, and the model under test is left alone."""
    model = make_model("llama", "block", dtype=torch.float32)
    settings = train_speed.TrainSpeedConfig(
        sequence_length=32, block_size=4, batch_size=2, repeats=1, precision="no", plain=False, places=3, groups=5
    )
    kept = train_speed.measure(model, settings)["kept"]
    ways = kept["ways"]
    assert 0 < ways["kept"]["mask_positions"] <= 2 * 5 * 3 and ways["fast"]["mask_positions"] > 0
    assert ways["kept"]["ms_per_mask"] == pytest.approx(ways["kept"]["step_ms"] / ways["kept"]["mask_positions"])
    assert kept["speedup_ms_per_mask"] == pytest.approx(ways["fast"]["ms_per_mask"] / ways["kept"]["ms_per_mask"])
    assert not any("lora" in name for name, _ in model.named_parameters())
    none = train_speed.measure(model, replace(settings, kept=False))
    assert none["kept"] is None and len(train_speed.tables(none)) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system tells no peak")
def test_what_a_step_adds_is_measured_and_what_stands_is_counted():
    layer = torch.nn.Linear(1024, 1024)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    assert standing_bytes(layer, optimizer) == pytest.approx(3 * 4 * (1024 * 1024 + 1024), rel=1e-3)
    size = 64 * 2**20
    added = added_bytes(lambda: torch.ones(size // 4), torch.device("cpu"))
    assert added is not None and 0.9 * size < added < 1.5 * size


def conversations(folder: Path) -> dict[str, str]:
    """Long questions and short answers of words that the tokenizer knows."""
    lines = [
        {"prompt": " ".join(f"w{(seed + i) % 30 + 30}" for i in range(20)), "response": f"w{seed % 30 + 30} w9 w8"}
        for seed in range(40)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {"name": "files", "path": str(folder / "chat.jsonl")}


@pytest.mark.parametrize("alignment", ["block", "parent"])
def test_steps_of_fine_tuning_are_the_same_steps_under_both_layouts(make_model, tmp_path, alignment):
    model = make_model("llama", alignment, dtype=torch.float64)
    before = [parameter.clone() for parameter in model.parameters()]
    data = {"train": conversations(tmp_path), "sequence_length": 64}
    settings = answer_speed.AnswerSpeedConfig(data=data, repeats=1, accumulate=1, precision="no", batch_size=2)
    result = answer_speed.measure(model, words_tokenizer(), settings)
    double, response = result["ways"]["double"], result["ways"]["response"]
    assert double["losses"] == pytest.approx(response["losses"], rel=1e-6) and len(set(double["losses"])) == 2
    assert result["columns_ratio"] == double["columns"] / response["columns"] > 1.3
    assert 0 < result["share_of_answers"] < 0.5 and result["speedup"] > 0 and result["speedup_processor"] > 0
    assert result["settings"]["data"]["sequence_length"] == 64 and str(tmp_path) not in json.dumps(result)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert answer_speed.tables(result)[0].row_count == 2


def test_conversations_are_not_for_decoding(capsys):
    assert main(["bench", "decode", "--chat", "x.jsonl"]) == 2
    assert "--chat is about steps of fine-tuning" in capsys.readouterr().err


@pytest.mark.parametrize("section", [{"block_size": 5}, {"precision": "fp8"}, {"repeat": 3}])
def test_a_wrong_knob_of_a_benchmark_is_refused(section):
    with pytest.raises(ConfigError):
        validate(train_speed.TrainSpeedConfig, section, where="bench")
