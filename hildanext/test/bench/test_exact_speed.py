"""Ways to write the same answers: exact ones write the parent's, and what is said of them is right."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from hildanext.bench import exact_report, exact_speed, llama_cpp
from hildanext.bench.exact_memory import peak_bytes
from hildanext.bench.exact_prompts import kinds_of_prompts
from hildanext.bench.exact_speed import ExactSpeedConfig, Written, _agreement, measure
from hildanext.bench.exact_ways import Answer, Opened, Way, WaySettings
from hildanext.bench.gguf_writer import write_gguf
from hildanext.cli import main
from hildanext.core.errors import ConfigError, ModelError
from hildanext.core.runtime import RuntimeConfig
from hildanext.models.draft_card import DraftCard
from hildanext.models.draft_checkpoint import save_drafts
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig, gated_layers
from hildanext.models.loading.files import weights_hash
from hildanext.models.loading.gguf_file import load_gguf
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.names import locate
from hildanext.models.packed_linear import packs
from small_models import small_causal, words_tokenizer

FEW = {"prompts": 1, "new_tokens": 6, "memory": False}
DRAFTERS = ("exact, ngram", "exact, adapters", "exact, ngram + adapters")


@pytest.fixture(scope="module")
def drafts(tmp_path_factory) -> Path:
    """Adapters of the embedded parent that draft something, if nothing sensible."""
    folder = tmp_path_factory.mktemp("drafts") / "drafts"
    causal_lm, _ = load_parent("tiny")
    lora = GatedLoraConfig(rank=2)
    drafter = Drafter(causal_lm, lora, 2)
    with torch.no_grad():
        for number, (_, layer) in enumerate(gated_layers(causal_lm)):
            layer.lora_B.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
    card = DraftCard(
        parent="tiny", parent_hash=weights_hash(locate("tiny")), places=2, lora=lora, acceptance=(0.9, 0.8)
    )
    save_drafts(folder, drafter, card)
    return folder


@pytest.fixture(autouse=True)
def a_cache_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HILDANEXT_HOME", str(tmp_path / "home"))


def compared(drafts, dtype, **settings):
    runtime = RuntimeConfig(device="cpu", dtype=dtype, threads=1)
    return measure(str(drafts), None, runtime, ExactSpeedConfig(**{**FEW, **settings}))


def test_in_fp32_every_exact_way_writes_the_parent_s_text(drafts):
    result = compared(drafts, "fp32", after="all", diffusion="tiny")
    ways = {way["name"]: way for way in result["ways"]}
    assert list(ways) == ["parent, transformers", "parent", *DRAFTERS, "blocks, S_MODE", "blocks, Q_MODE"]
    for name in ("parent, transformers", "parent", *DRAFTERS):
        assert ways[name]["like_parent"]["equal"] == 1.0 and ways[name]["like_own_rows"] is None
        assert ways[name]["nats"] == pytest.approx(ways["parent"]["nats"])
    parent = ways["parent"]
    assert parent["over_parent"] == 1.0 and parent["tokens_per_forward"] == 1.0 == parent["rows_per_forward"]
    drafted = ways["exact, adapters"]
    assert drafted["tokens"] == parent["tokens"] and drafted["rows_per_forward"] > 3, "a token, and masks behind it"
    assert set(drafted["kinds"]) == {"questions", "stories", "chat"}
    assert result["distance"]["torch float32"]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert all(took > 0 for took in result["forward_ms"]["torch float32"].values())
    assert json.loads(json.dumps(result))


def test_blocks_are_written_in_every_runtime_and_stand_beside_its_own_parent(drafts):
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    result = compared(drafts, "fp32", diffusion="tiny", new_tokens=20, weights={"onnx": ("fp32", "q8")})
    blocks = {(way["name"], way["runtime"], way["weights"]): way for way in result["ways"] if way["who"] == "blocks"}
    networks = [("torch", "float32"), ("onnx", "fp32"), ("onnx", "q8")]
    assert list(blocks) == [(name, *net) for net in networks for name in ("blocks, S_MODE", "blocks, Q_MODE")]
    for name in ("blocks, S_MODE", "blocks, Q_MODE"):  # in fp32 the same text, by as many forwards
        torch_s, onnx_s = blocks[name, "torch", "float32"], blocks[name, "onnx", "fp32"]
        assert all(torch_s[key] == onnx_s[key] for key in ("tokens", "forwards", "like_parent"))
        assert onnx_s["nats"] == pytest.approx(torch_s["nats"])
    parents = {(way["runtime"], way["weights"]): way for way in result["ways"] if way["name"] == "parent"}
    for (_, *network), way in blocks.items():
        first = next(iter(way["kinds"]))
        ours, beside = (each["kinds"][first]["tokens_per_second"] for each in (way, parents[tuple(network)]))
        assert way["kinds"][first]["over_parent"] == pytest.approx(ours / beside)
    assert [*result["blocks_from_fp32"]] == ["onnx, fp32", "onnx, q8"]
    assert "blocks, onnx, q8: " in exact_report.markdown(result)


@pytest.mark.skipif(not packs(torch.zeros(1, dtype=torch.bfloat16)), reason="no packed matrices in bf16 here")
def test_in_bf16_packed_rows_are_their_own_and_every_text_the_parents(drafts):
    result = compared(drafts, "bf16", after="all")
    ways = {way["name"]: way for way in result["ways"] if way["runtime"] == "torch"}
    assert set(ways) == {"parent, transformers", "parent", *DRAFTERS}
    assert ways["parent"]["rows_per_forward"] == 1.0
    for name in DRAFTERS:
        assert ways[name]["like_parent"]["equal"] == 1.0 and ways[name]["like_own_rows"] is None


def test_in_onnx_runtime_it_is_compared_with_its_own_parent_too(drafts):
    result = compared(drafts, "fp32", weights={"onnx": ["q8"]})
    ways = {way["name"]: way for way in result["ways"] if way["runtime"] == "onnx"}
    assert all(ways[name]["like_own_rows"]["equal"] == 1.0 for name in DRAFTERS)
    assert ways["parent"]["like_own_rows"] is None


def test_in_other_16_bits_it_is_compared_with_the_parent_at_its_own_rows_too(drafts, monkeypatch):
    monkeypatch.setattr("hildanext.exact.pack_linears", lambda causal_lm: None)
    result = compared(drafts, "bf16", after="all")
    ways = {way["name"]: way for way in result["ways"]}
    assert {"parent, rows of ngram", "parent, rows of adapters"} < set(ways)
    for name in DRAFTERS:
        assert ways[name]["like_own_rows"]["equal"] == 1.0 and ways[name]["like_parent"] is not None
    rows = {name: way["rows_per_forward"] for name, way in ways.items()}
    assert rows["parent, rows of adapters"] == rows["exact, adapters"] == 9, "2 drafts and 3 groups of 2 masks"
    assert rows["parent, rows of ngram"] == rows["exact, ngram"] == 3
    assert ways["parent, rows of adapters"]["tokens_per_forward"] == 1.0


def test_rates_and_agreement_by_hand():
    """10 tokens, 4 of them after 2 of 5 seconds: 2 a second. The second answer differs at place 1, the third ends."""
    way = Way("a", "torch", "fp32", "exact")
    mine = Written(way, [Answer(list(range(10)), 5.0, 2.0, 4), Answer([1, 2, 3], 1.0, 0.5), Answer([1], 1.0, 0.5)])
    assert mine.rates()[:2] == [2.0, 4.0] and math.isnan(mine.rates()[2])
    other = Written(
        way, [Answer(list(range(10)), 1.0, 1.0), Answer([1, 9, 3], 1.0, 1.0), Answer([1, 2, 3, 4], 1.0, 1.0)]
    )
    assert _agreement(mine, other, range(3)) == {"answers": 3, "equal": 1 / 3, "first_difference": 1.0}


def test_what_is_shown_holds_every_way(drafts, tmp_path):
    result = compared(drafts, "fp32")
    tables = exact_report.tables(result)
    assert [len(table.rows) for table in tables] == [len(result["ways"]), len(result["ways"]), 1]
    text = exact_report.markdown(result)
    assert text.count("| exact, adapters | torch, float32 |") == 2 and "1 threads" in text
    assert exact_report.draw(result, tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_writes_three_files(drafts, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("Once upon a time\nA dog\n")
    out = tmp_path / "exact.json"
    flags = ["--new-tokens", "4", "--set", "bench.memory=false", "--threads", "1", "--dtype", "fp32", "--device", "cpu"]
    flags += ["--prompts", str(tmp_path / "mine.txt"), "--out", str(out)]
    assert main(["bench", "exact", "--model", str(drafts), *flags]) == 0
    assert json.loads(out.read_text())["prompts"] == {"mine": 2}
    assert out.with_suffix(".md").is_file() and out.with_suffix(".png").is_file()
    assert "exact, ngram" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["decode", "--diffusion", "tiny"], "--diffusion is about ways to write"),
        (["decode", "--new-tokens", "3"], "--new-tokens is about a service"),
        (["exact", "--clients", "3"], "--clients is about a service"),
        (["exact", "--model", "nowhere"], "no model 'nowhere'"),
        (["exact", "--set", "bench.new_tokens=1"], "new_tokens: 1 is below 2"),
        (["peers", "--set", 'bench.llama=["Q5"]'], "no quantisation 'Q5': choices: Q8_0"),
        (["exact", "--set", 'bench.weights={"nothing":["int8"]}'], "no runtime 'nothing' to measure"),
    ],
)
def test_what_is_wrong_is_one_line(flags, says, capsys):
    assert main(["bench", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_prompts_are_three_kinds_or_a_kind_a_file(tmp_path):
    kinds = kinds_of_prompts(None, 2, words_tokenizer())
    assert {kind: len(prompts) for kind, prompts in kinds.items()} == {"questions": 2, "stories": 2, "chat": 2}
    (tmp_path / "a.txt").write_text("w3 w4\n")
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "w5"}]}\n')
    files = f"{tmp_path / 'a.txt'},{tmp_path / 'b.jsonl'}"
    assert kinds_of_prompts(files, 5, words_tokenizer()) == {"a": [[0, 3, 4]], "b": [[0, 5]]}


@pytest.mark.parametrize("weights", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_GGUF_file_holds_the_parent(family, weights, tmp_path):
    """Read back by Transformers, which undoes llama.cpp's order of the rotary halves."""
    if family not in GGUF_CONFIG_MAPPING:
        pytest.skip(f"this Transformers reads no GGUF of a {family}")
    _, tokenizer = load_parent("tiny")
    causal_lm = small_causal(
        family, rows=len(tokenizer), intermediate_size=64, head_dim=128 if family == "qwen3" else 8
    )  # all that Transformers reads
    write_gguf(tmp_path / "m.gguf", causal_lm, tokenizer, weights)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    again, _ = load_gguf(tmp_path / "m.gguf", torch.float32, "cpu")
    tolerance = {"F32": 0.0, "Q8_0": 0.02, "Q4_0": 0.3}[weights]
    for name, tensor in causal_lm.state_dict().items():
        assert torch.allclose(again.state_dict()[name], tensor, atol=tolerance), name


def test_a_GGUF_file_of_words_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no GGUF of a WordLevel tokenizer"):
        write_gguf(tmp_path / "m.gguf", small_causal(), words_tokenizer(), "Q8_0")


def test_where_llama_cpp_is_absent_the_others_are_measured(drafts, monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    said: list[str] = []
    assert exact_speed._llama_ways(ExactSpeedConfig(), said.append) == []
    assert said == ["llama.cpp is not measured: its package is not here (pip install xllamacpp)"]
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    names = [(way.name, way.weights) for way in exact_speed._llama_ways(ExactSpeedConfig(llama=("Q8_0",)), None)]
    assert names == [("llama.cpp", "Q8_0"), ("llama.cpp + ngram", "Q8_0")]


def test_a_wrong_section_is_refused():
    with pytest.raises(ConfigError, match="no runtime 'x'"):
        ExactSpeedConfig(weights={"x": ("fp32",)})


@pytest.mark.slow
def test_memory_is_that_of_the_way_s_own_process(drafts):
    settings = WaySettings(str(drafts), None, None, RuntimeConfig(device="cpu", dtype="fp32", threads=1))
    ballast = torch.zeros(2**28)  # a gigabyte that is ours
    peak = peak_bytes(settings, Way("parent", "torch", "float32", "parent"), [5, 6], 3)
    assert peak is None or 50e6 < peak < ballast.nbytes, "not that of the process that asks"


def test_the_transformers_way_leaves_the_model_as_it_was(drafts):
    opened = Opened(WaySettings(str(drafts), None, None, RuntimeConfig(device="cpu", dtype="fp32", threads=1)))
    before = opened.parent.causal_lm.config._attn_implementation
    answer = opened.writer(Way("t", "torch", "float32", "transformers"))([5, 6, 7], 4)
    assert opened.parent.causal_lm.config._attn_implementation == before
    assert 0 < answer.first_seconds < answer.seconds and answer.tokens == opened.parent.generate([5, 6, 7], 4).tokens
