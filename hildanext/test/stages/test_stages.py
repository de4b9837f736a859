"""A whole recipe on a random parent: text to shards, to a diffusion model, to numbers and samples."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hildanext.ar import Parent
from hildanext.core.errors import ConfigError, DataError, HildaError
from hildanext.core.runtime import RuntimeConfig
from hildanext.data.packing import tokenizer_hash
from hildanext.datasets import PackedDataset
from hildanext.inference import eos_ids
from hildanext.models.checkpoint import save_causal
from hildanext.models.draft_card import DraftCard
from hildanext.models.draft_checkpoint import save_drafts
from hildanext.models.drafter import Drafter
from hildanext.models.gated_lora import GatedLoraConfig
from hildanext.models.loading.files import weights_hash
from hildanext.models.loading.load import load_diffusion, load_parent
from hildanext.models.loading.loaded_model import LoadedModel
from hildanext.models.loading.names import locate, locate_diffusion
from hildanext.recipe import check, execute
from hildanext.stages import STAGES
from hildanext.tokenization import encode_prompt
from small_models import small_causal

STORY = "Once upon a time there was a small boat. The boat liked the sea. One day the sea was very big."


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """An untrained autoregressive model with a byte-level tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("parent")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [STORY], trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", bos_token="<eos>")
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    torch.random.set_rng_state(state)
    return folder


def a_run(folder: Path, parent: Path) -> dict:
    return {
        "folder": str(folder),
        "parent": str(parent),
        "device": "cpu",
        "dtype": "fp32",
        "threads": 1,
        "prepare": {
            "train": {"source": {"name": "parent", "documents": 24, "max_tokens": 40, "seed": 1}},
            "valid": {"source": {"name": "parent", "documents": 8, "max_tokens": 40, "seed": 2}},
        },
        "data": {"sequence_length": 32, "pad_to_block": 8},
        "convert": {
            "block_size": 8,
            "wsd": [
                {"phase": "warmup", "block_size": 1, "tokens": 64},
                {"phase": "stable", "block_size": 16, "tokens": 128},
                {"phase": "decay", "block_size": 8, "tokens": 128},
            ],
            "valid_rows": 2,
            "train": {"batch_size": 2, "evaluate_every": 2, "checkpoint_every": 2, "precision": "no"},
        },
        "chat": {"train": {"name": "arithmetic", "count": 40, "steps": 1}, "valid_share": 0.2, "sequence_length": 256},
        "sft": {
            "epochs": 0.2,
            "valid_rows": 4,
            "samples": {"count": 1, "max_new_tokens": 4},
            "train": {"batch_size": 4, "precision": "no"},
        },
        "rl": {
            "problems": {"name": "arithmetic", "count": 40, "steps": 1, "held_out": 0.2},
            "rollouts": {"name": "engine", "max_new_tokens": 8, "per_step": 8},
            "rounds": 1,
            "problems_per_round": 2,
            "group": 2,
            "measure": {"problems": 2, "samples": 0},
            "train": {"precision": "no"},
        },
        "eval": {
            "sequence_length": 32,
            "pad_to_block": 8,
            "rows": 2,
            "batch_size": 2,
            "likelihood": {"block_sizes": [1, 8], "draws": 2},
            "generation": {"prompts": 1, "prompt_tokens": 4, "new_tokens": 8},
        },
        "bench": {"decode": {"prompt_tokens": 4, "new_tokens": 8, "repeats": 1}},
        "generate": {"prompts": ["Once"], "max_new_tokens": 8},
        "stages": [{"stage": name} for name in STAGES],
    }


def test_a_recipe_goes_from_the_parent_to_a_report_and_is_done_once(tmp_path, parent):
    run = a_run(tmp_path / "run", parent)
    outcomes = execute(run, STAGES)
    assert (Path(outcomes["convert"]["model"]) / "hilda.json").is_file()
    numbers = json.loads(Path(outcomes["eval"]["results"]).read_text())
    assert {row["kind"] for row in numbers["likelihood"]} == {"exact", "bound"}
    record = json.loads(Path(outcomes["generate"]["samples"]).read_text())
    samples = record["samples"]
    assert [sample["way"] for sample in samples] == ["S_MODE", "Q_MODE", "AR parent"] and not record["without_parent"]
    assert all(sample["forwards"] > 0 for sample in samples)
    page = Path(outcomes["report"]["report"]).read_text(encoding="utf-8")
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "") and "S_MODE" in page
    assert json.loads(Path(outcomes["bench"]["bench"]).read_text())["steps"]
    before = (tmp_path / "run" / "convert" / "metrics.jsonl").read_bytes()
    assert execute(run, STAGES) == outcomes
    assert (tmp_path / "run" / "convert" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "place, value, word",
    [
        (("convert", "blocksize"), 8, "did you mean 'block_size'"),
        (("convert", "block_size"), "eight", "block_size"),
        (("convert", "block_size"), 7, "does not divide"),
        (("convert", "wsd"), [{"phase": "warmup", "block_size": 5, "tokens": 1}], "does not divide"),
        (("convert", "losses"), [{"name": "m3t"}], "did you mean"),
        (("data", "sequence_lenght"), 32, "did you mean 'sequence_length'"),
        (("data", "pad_to_block"), 12, "pad_to_block 12 is not a multiple of the block size 8"),
        (("data", "pad_to_block"), None, "pad_to_block None is not a multiple of the block size 8"),
        (("prepare", "train"), {"source": {"name": "parent"}}, "documents"),
        (("prepare", "train"), {"source": {"name": "parents", "path": "x"}}, "unknown source"),
        (("prepare", "train"), {}, "source"),
        (("chat", "train"), {"name": "arithmetics"}, "did you mean 'arithmetic'"),
        (("sft", "losses"), [{"name": "m3t"}], "did you mean"),
        (("eval", "likelihood"), {"block_sizes": [5]}, "does not divide"),
        (("bench", "what"), "both", "decode"),
        (("bench", "train"), {"block_size": 7}, "does not divide"),
        (("bench", "decode"), {"decoders": {"mine": {"name": "treshold_edit"}}}, "did you mean 'threshold_edit'"),
        (("generate", "modes"), ["X_MODE"], "unknown mode"),
        (("generate", "decoder"), {"tau_mask": "high"}, "tau_mask"),
        (("generate", "prompts_file"), "prompts.txt", "choose one"),
        (("generate", "prompt"), "Once", "did you mean 'prompts'"),
    ],
)
def test_check_finds_what_is_wrong_without_weights(place, value, word, tmp_path, parent):
    run = a_run(tmp_path, parent)
    run[place[0]][place[1]] = value
    with pytest.raises(HildaError, match=word):
        check(run, STAGES)


def test_prepare_needs_a_part(tmp_path, parent):
    run = a_run(tmp_path, parent) | {"prepare": {}}
    with pytest.raises(ConfigError, match="prepare has no parts"):
        check(run, STAGES)


def test_a_text_source_is_prepared_with_the_parent_s_tokenizer(tmp_path, parent):
    (tmp_path / "text.txt").write_text(STORY + "\n")
    run = a_run(tmp_path / "run", parent)
    run["prepare"] = {"train": {"source": {"name": "text", "path": str(tmp_path / "text.txt")}}}
    run["stages"] = [{"stage": "prepare"}]
    assert execute(run, STAGES)["prepare"]["train_tokens"] > 10


def a_parent(folder: Path, seed: int = 0, **roles: str) -> Path:
    """A parent of words whose tokenizer knows two markers, in the roles that are given."""
    words = ["<start>", "<end>", *STORY.replace(".", " .").split()]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="the"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<start>", "<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    save_causal(
        folder, small_causal("qwen3", len(tokenizer), seed=seed, bos_token_id=None, eos_token_id=None), tokenizer
    )
    return folder


def a_conversion(folder: Path, parent: Path, **prepared: object) -> dict:
    """A short run on the story, cut into sentences, prepared with the given settings."""
    (folder / "text.txt").write_text(STORY.replace(". ", ".\n"))
    run = a_run(folder / "run", parent)
    source = {"name": "text", "path": str(folder / "text.txt"), "document": "line"}
    run["prepare"] = {part: {"source": source, **prepared} for part in ("train", "valid")}
    run["convert"] |= {"wsd": [{"phase": "decay", "block_size": 8, "tokens": 64}]}
    run["stages"] = [{"stage": "prepare"}, {"stage": "convert"}]
    return run


@pytest.mark.parametrize(
    "roles, prepared",
    [
        ({"eos_token": "<end>"}, {"bos_token": "<start>"}),
        ({"eos_token": "<end>"}, {"add_bos": False}),
        ({"eos_token": "<end>", "bos_token": "<start>"}, {"add_bos": False}),
        ({"eos_token": "<end>", "bos_token": "<end>"}, {"bos_token": "<start>"}),
        ({"eos_token": "<start>"}, {"bos_token": "<start>", "eos_token": "<end>"}),
    ],
    ids=["given by hand", "none", "left out", "another", "and another end"],
)
def test_generate_begins_and_ends_as_training_did(roles, prepared, tmp_path):
    run = a_conversion(tmp_path, a_parent(tmp_path / "parent", **roles), **prepared)
    outcomes = execute(run, STAGES)
    dataset = PackedDataset(outcomes["prepare"]["train"], 32, pad_to_block=8)
    model, tokenizer = load_diffusion(outcomes["convert"]["model"])
    row = dataset.row(0)
    trained = row["tokens"][row["document"] == 0].tolist()
    sentence = encode_prompt(tokenizer, STORY.split(". ")[0] + ".")
    assert trained[: len(sentence)] == sentence
    assert trained[len(sentence)] in eos_ids(model, tokenizer)
    assert tokenizer_hash(tokenizer) == dataset.manifests[0][1]["tokenizer_hash"]


@pytest.mark.parametrize(
    "train, valid, words",
    [
        ({"bos_token": "boat"}, {"bos_token": "boat"}, "'boat', an ordinary word"),
        ({"bos_token": "<start>"}, {"add_bos": False}, "differ in how documents begin"),
        (
            {"add_bos": False, "eos_token": "<pad>"},
            {"add_bos": False, "eos_token": "<pad>"},
            "'<pad>', which is padding",
        ),
    ],
)
def test_edges_that_generate_could_not_keep_to_are_refused(train, valid, words, tmp_path):
    run = a_conversion(tmp_path, a_parent(tmp_path / "parent", eos_token="<end>", pad_token="<pad>"))
    run["prepare"]["train"] |= train
    run["prepare"]["valid"] |= valid
    with pytest.raises(ConfigError, match=words):
        execute(run, STAGES)


def test_samples_of_one_parent_are_not_taken_for_those_of_another(tmp_path):
    """The same shapes, the same tokenizer, the same place; only the weights are others. A moved parent is the same."""
    run = a_run(tmp_path / "run", a_parent(tmp_path / "parent", bos_token="<start>", eos_token="<end>"))
    run["prepare"] = {"train": {**run["prepare"]["train"], "out": str(tmp_path / "samples")}}
    run["stages"] = [{"stage": "prepare"}]
    execute(run, STAGES)
    shutil.copytree(tmp_path / "parent", tmp_path / "elsewhere" / "parent")
    again = run | {"parent": str(tmp_path / "elsewhere" / "parent"), "folder": str(tmp_path / "again")}
    execute(again, STAGES)
    shutil.rmtree(tmp_path / "parent")
    a_parent(tmp_path / "parent", seed=1, bos_token="<start>", eos_token="<end>")
    with pytest.raises(DataError, match="other settings: source"):
        execute(run | {"folder": str(tmp_path / "third")}, STAGES)


def samples_of(folder: Path, **section: object) -> dict:
    """What the stage `generate` writes of six tokens after one prompt."""
    section = {"model": "tiny", "modes": ["S_MODE"], "prompts": ["Once upon"], "max_new_tokens": 6, **section}
    run = {"folder": str(folder), "device": "cpu", "dtype": "fp32", "threads": 1, "generate": section}
    outcomes = execute({**run, "stages": [{"stage": "generate"}]}, STAGES)
    return json.loads(Path(outcomes["generate"]["samples"]).read_text())


def test_samples_have_the_parent_s_greedy_text_of_the_same_prompt_beside_them(tmp_path):
    record = samples_of(tmp_path / "usual")
    ours, theirs = record["samples"]
    opened = LoadedModel.open("tiny", RuntimeConfig("cpu", "fp32", 1))
    greedy = Parent(*opened.parent()).generate(encode_prompt(opened.tokenizer, "Once upon"), 6)
    assert (theirs["way"], theirs["text"], theirs["tokens"]) == ("AR parent", greedy.text, 6)
    assert theirs["prompt"] == ours["prompt"] and theirs["prompt_cells"] == ours["prompt_cells"]
    stopped = samples_of(tmp_path / "stopped", stop=[greedy.text[2:4]])["samples"][1]
    assert (stopped["text"], stopped["finish_reason"]) == (greedy.text[:2], "stop")
    alone = samples_of(tmp_path / "alone", parent="")
    assert [one["way"] for one in alone["samples"]] == ["S_MODE"] and alone["without_parent"] == "none was asked for"


def test_samples_are_written_without_a_parent_that_is_gone_unless_it_was_named(tmp_path):
    shutil.copytree(locate_diffusion("tiny"), tmp_path / "moved")
    card = json.loads((tmp_path / "moved" / "hilda.json").read_text())
    (tmp_path / "moved" / "hilda.json").write_text(json.dumps({**card, "parent": "gone"}))
    record = samples_of(tmp_path / "run", model=str(tmp_path / "moved"))
    assert len(record["samples"]) == 1 and "'gone' could not be had: no model 'gone'" in record["without_parent"]
    with pytest.raises(HildaError, match="no model 'gone'"):
        samples_of(tmp_path / "named", model=str(tmp_path / "moved"), parent="gone")
    with pytest.raises(ConfigError, match="no file of prompts"):
        samples_of(tmp_path / "file", parent="tiny", prompts=None, prompts_file="prompts.txt")


def drafts_of_tiny(folder: Path) -> Path:
    """Adapters of the embedded parent that have learnt nothing but to be there."""
    drafter = Drafter(load_parent("tiny")[0], GatedLoraConfig(rank=2), 2)
    card = DraftCard(
        parent="tiny", parent_hash=weights_hash(locate("tiny")), places=2, lora=drafter.lora, acceptance=(0.5, 0.2)
    )
    save_drafts(folder, drafter, card)
    return folder


def test_exact_mode_stands_among_the_samples_with_the_parents_text(tmp_path):
    drafts = str(drafts_of_tiny(tmp_path / "drafts"))
    record = samples_of(tmp_path / "beside", modes=["S_MODE", "exact"], drafts=drafts, max_new_tokens=12)
    blocks, exact, parent = record["samples"]
    assert [one["way"] for one in record["samples"]] == ["S_MODE", "exact", "AR parent"]
    assert exact["text"] == parent["text"] and blocks["trace"]["steps"] != exact["trace"]["steps"]
    assert exact["prompt_cells"] == parent["prompt_cells"] and exact["trace"]["steps"]
    embedded = samples_of(tmp_path / "embedded", modes=["S_MODE", "exact"], drafts="tiny", max_new_tokens=12)
    assert [one["text"] for one in embedded["samples"]][1:] == [parent["text"]] * 2
    alone = samples_of(tmp_path / "alone", model=drafts, modes=["exact"], max_new_tokens=12)
    assert [one["text"] for one in alone["samples"]] == [parent["text"]] * 2
    with pytest.raises(HildaError, match="draft adapters"):
        samples_of(tmp_path / "wrong", model=drafts)
    with pytest.raises(HildaError, match="has no draft adapters|no diffusion|exact"):
        samples_of(tmp_path / "without", model=str(locate_diffusion("tiny")), modes=["exact"])
