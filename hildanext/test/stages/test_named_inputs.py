"""A submission is looked at before it is queued: models, data, how they fit, seeds; and nothing is fetched for it."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hildanext.core.errors import HildaError
from hildanext.datasets import PrepareConfig, prepare
from hildanext.models.loading.names import locate
from hildanext.stages.named_inputs import MODELS, SHARDS
from hildanext.stages.submission import open_jobs
from hildanext.tokenization import load_tokenizer

WSD = [{"phase": "stable", "block_size": 8, "tokens": 100}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Text, conversations, shards of the embedded model's tokenizer and of another one; relative names begin here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog.\n")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "empty").mkdir()
    words = Tokenizer(WordLevel({"<e>": 0, "Once": 1, "upon": 2, "<u>": 3}, unk_token="<u>"))
    words.pre_tokenizer = Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", bos_token="<e>", unk_token="<u>")
    for name, tokenizer in (("shards", load_tokenizer(locate("tiny"))), ("others", other)):
        prepare(PrepareConfig(source={"name": "text", "path": "text.txt"}, out=name), tokenizer)
    return tmp_path


@pytest.fixture
def jobs(folder):
    with open_jobs(folder / "jobs") as service:
        yield service


def convert(**section):
    return {"convert": {"wsd": WSD, "block_size": 8, **section}, "data": {"train": "shards", "valid": "shards"}}


def sft(train=None, **section):
    source = {"name": "files", "path": "chat.jsonl"} if train is None else train
    return {"sft": {"model": "tiny", **section}, "chat": {"train": source}}


def text(path):
    return {"prepare": {"source": {"name": "text", "path": path}}}


GOOD = [
    ("convert", convert()),
    ("convert", convert(parent="nobody/a-model-of-the-hub")),
    ("sft", sft()),
    ("sft", {**sft(), "sft": {"parent": {"name": "tiny"}, "teacher": "tiny"}}),
    ("eval", {"eval": {"model": "tiny", "data": "shards"}}),
    ("eval", {"eval": {"model": "tiny", "data": "shards", "parent": ""}}),
    ("bench", {"bench": {"model": "tiny"}}),
    ("rl", {"rl": {"model": "tiny"}}),
    ("generate", {"generate": {"model": "tiny", "prompts": ["a"]}, "seed": 2**63 - 1}),
    ("prepare", text("text.txt")),
    ("prepare", text("*.txt")),
]

BAD = [
    ("convert", convert(parent="nothing"), "no model 'nothing'"),
    ("convert", convert(parent="./nothing/there"), "no model './nothing/there'"),
    ("convert", convert(parent="empty"), "has no config.json"),
    ("convert", convert(parent="empty/none"), "no folder 'empty/none'"),
    ("convert", {**convert(), "parent": "nothing"}, "no model 'nothing'"),
    ("convert", {**convert(), "data": {"train": "others", "valid": "shards"}}, "prepared with another tokenizer"),
    ("convert", {**convert(), "data": {"train": "shards", "valid": "others"}}, "prepared with another tokenizer"),
    ("convert", {**convert(), "data": {"train": "gone", "valid": "shards"}}, "'gone' holds no finished shards"),
    ("sft", sft(model="nothing"), "no diffusion checkpoint 'nothing'"),
    ("sft", sft(model="empty"), "hilda.json"),
    ("sft", sft(teacher="nothing"), "no model 'nothing'"),
    ("sft", {**sft(), "sft": {"parent": {"name": "nothing"}}}, "no model 'nothing'"),
    ("sft", sft({"name": "files", "path": "gone.jsonl"}), "no such file or folder 'gone.jsonl'"),
    ("rl", {"rl": {"model": "nothing"}}, "no diffusion checkpoint 'nothing'"),
    ("eval", {"eval": {"model": "tiny", "data": "others"}}, "prepared with another tokenizer"),
    ("eval", {"eval": {"model": "tiny", "data": "gone"}}, "'gone' holds no finished shards"),
    ("eval", {"eval": {"model": "tiny", "data": "shards", "parent": "nothing"}}, "no model 'nothing'"),
    ("eval", {"eval": {"model": "nothing", "data": "shards"}}, "no diffusion checkpoint 'nothing'"),
    ("bench", {"bench": {"model": "nothing"}}, "no model 'nothing'"),
    ("bench", {"bench": {"model": "tiny", "parent": "nothing"}}, "no model 'nothing'"),
    ("generate", {"generate": {"model": "nothing", "prompts": ["a"]}}, "no diffusion checkpoint 'nothing'"),
    ("generate", {"generate": {"model": "tiny", "parent": "nothing", "prompts": ["a"]}}, "no model 'nothing'"),
    ("generate", {"generate": {"model": "tiny", "prompts": ["a"]}, "parent": "nothing"}, "no model 'nothing'"),
    ("generate", {"generate": {"model": "smollm2-135m", "prompts": ["a"]}}, "convert it first"),
    ("generate", {"generate": {"model": "tiny", "prompts_file": "gone.txt"}}, "gone.txt"),
    ("prepare", text("gone.txt"), "no such file or folder 'gone.txt'"),
    ("prepare", {"prepare": {**text("text.txt")["prepare"], "tokenizer": "nothing"}}, "no model 'nothing'"),
    ("prepare", {"prepare": {"train": {"source": {"name": "text", "path": "gone.txt"}}}}, "no such file"),
    ("report", {"report": {"run": "gone"}}, "is no run's folder"),
    ("generate", {"generate": {"model": "tiny", "prompts": ["a"]}, "seed": 2**63}, "seed"),
    ("generate", {"generate": {"model": "tiny", "prompts": ["a"], "seed": 10**30}}, "seed"),
    ("convert", convert(seed=10**30), "seed"),
    ("sft", sft(seed=10**30), "seed"),
    ("eval", {"eval": {"model": "tiny", "data": "shards", "likelihood": {"seed": 2**64}}}, "seed"),
    ("bench", {"bench": {"model": "tiny", "decode": {"seed": 2**64}}}, "seed"),
]


@pytest.mark.parametrize(("kind", "config"), GOOD)
def test_what_can_run_is_queued(jobs, kind, config):
    assert jobs.submit(kind, config).state == "queued"


@pytest.mark.parametrize(("kind", "config", "said"), BAD)
def test_what_cannot_run_is_refused_and_leaves_nothing(jobs, kind, config, said):
    with pytest.raises(HildaError) as caught:
        jobs.submit(kind, config)
    assert said in str(caught.value) and caught.value.status == 400
    assert jobs.list() == [] and [path for path in jobs.folder.iterdir() if path.is_dir()] == []


def test_every_field_that_names_a_model_is_refused_where_it_names_none():
    """The table is complete: each of its rows has a case above."""
    named = {(kind, field) for kind, fields in MODELS.items() for field in fields}
    texts = {kind: [json.dumps(config) for other, config, _ in BAD if other == kind] for kind in MODELS}
    for kind, field in named:
        key = field.split(".")[-1]
        assert any(f'"{key}": "nothing"' in text for text in texts[kind])
    assert set(SHARDS) <= set(MODELS)


def test_what_another_job_has_still_to_make_is_left_to_the_job(jobs):
    first = jobs.submit("prepare", text("text.txt"))
    there = str(first.folder / "prepare" / "train")
    second = jobs.submit("convert", {**convert(), "data": {"train": there, "valid": there}})
    checkpoint = str(second.folder / "convert" / "checkpoint")
    for kind, config in (
        ("sft", sft(model=checkpoint)),
        ("eval", {"eval": {"model": checkpoint, "data": there}}),
        ("prepare", text(str(first.folder / "samples.txt"))),
    ):
        assert jobs.submit(kind, config).state == "queued"
    with pytest.raises(HildaError, match="no diffusion checkpoint"):
        jobs.submit("sft", sft(model=str(jobs.folder / "0099-convert" / "convert" / "checkpoint")))


def test_a_recipe_is_looked_at_stage_by_stage(jobs):
    recipe = {**text("text.txt"), **convert(), "data": {}, "stages": [{"stage": "prepare"}, {"stage": "convert"}]}
    recipe["prepare"]["valid"] = recipe["prepare"]["train"] = {"source": recipe["prepare"].pop("source")}
    assert jobs.submit("run", recipe).state == "queued"
    with pytest.raises(HildaError, match="no diffusion checkpoint 'nothing'"):
        jobs.submit("run", {**recipe, "stages": [*recipe["stages"], {"stage": "generate", "model": "nothing"}]})
