"""The parent's own answers to prompts: what is written, what is learnt, and that a kill loses and repeats nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hildanext.ar import Parent
from hildanext.cli import main
from hildanext.core.config import merge
from hildanext.core.errors import ConfigError, DataError, HildaError
from hildanext.data.chat_template import Message, encode_chat
from hildanext.datasets import PackedDataset
from hildanext.inference import eos_ids
from hildanext.models.checkpoint import save_causal
from hildanext.models.loading.load import load_parent
from hildanext.models.loading.names import locate
from hildanext.recipe import open_stage
from hildanext.stages import STAGES
from hildanext.stages.prepare import prepare_parts
from hildanext.tokenization import encode_prompt
from small_models import edit_json, small_causal, small_tokenizer

TEXTS = ["Once upon a time", "Tom and Lily went", "The dog", "One day, a big bear saw", "Sam", "A girl named Mia had"]
NEW = 12


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded parent, as one that has learnt to chat."""
    folder = tmp_path_factory.mktemp("parents") / "parent"
    shutil.copytree(locate("tiny"), folder)
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def parent(home: Path) -> Parent:
    return Parent(*load_parent(home, torch.float32, "cpu"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Five texts, and a conversation in the midst of them."""
    lines: list[Any] = [{"prompt": text} for text in TEXTS]
    lines[2] = {"messages": [{"role": "user", "content": TEXTS[2]}]}
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def source(prompts: Path, **others: Any) -> dict[str, Any]:
    return {"name": "parent", "prompts": str(prompts), "max_tokens": NEW, "batch_size": 2, **others}


def prepared(
    folder: Path, home: Path, section: dict[str, Any], progress: Callable[[int, int], None] | None = None
) -> Any:
    run = {
        "parent": str(home),
        "device": "cpu",
        "dtype": "fp32",
        "prepare": {"source": section, "out": str(folder), "shard_tokens": 30},
    }
    resolved, context = open_stage(run, "prepare", STAGES)
    ((_, _, manifest),) = prepare_parts(resolved, context, progress=progress)
    return manifest


def expected(parent: Parent, text: str, chat: bool = False, **sampling: Any) -> tuple[list[int], list[int]]:
    """A prompt's tokens, and the answer that the parent writes to it alone."""
    tokenizer = parent.tokenizer
    ids = encode_chat(tokenizer, [Message("user", text)]) if chat else encode_prompt(tokenizer, text)
    stops = sorted(eos_ids(parent, tokenizer))
    return ids, parent.generate(ids, NEW, stop_ids=stops, **sampling).tokens


def test_documents_are_prompts_with_the_parents_greedy_answers_and_only_those_are_learnt(
    home: Path, parent: Parent, prompts: Path, tmp_path: Path
) -> None:
    manifest = prepared(tmp_path / "out", home, source(prompts))
    wanted = {tuple(ids + answer): len(ids) for ids, answer in (
        expected(parent, text, chat=number == 2) for number, text in enumerate(TEXTS)
    )}  # fmt: skip
    data = PackedDataset(tmp_path / "out", 64, tokenizer=parent.tokenizer)
    assert {tuple(document.tolist()) for document in data.documents()} == set(wanted)
    learnt: dict[tuple[int, ...], int] = {}
    for index in range(len(data)):
        row = data.row(index)
        for number in range(int(row["document"].max()) + 1):
            here = row["document"] == number
            tokens, maskable = row["tokens"][here], row["maskable"][here]
            learnt[tuple(tokens.tolist())] = int((~maskable).sum())
            assert np.array_equal(maskable, np.arange(len(tokens)) >= (~maskable).sum()), "the prompt, then the answer"
    whole = {document: start for document, start in learnt.items() if document in wanted}
    assert whole and all(wanted[document] == start for document, start in whole.items())
    told = manifest["settings"]["source"]
    assert (told["parent"], told["prompts"], told["greedy"], told["chat"]) == ("parent", 6, True, False)
    assert len(told["weights"]) == 64 and str(tmp_path) not in json.dumps(manifest)


def test_a_document_that_is_cut_keeps_its_prompt_out_of_what_is_learnt(
    home: Path, prompts: Path, tmp_path: Path
) -> None:
    prepared(tmp_path / "out", home, source(prompts))
    for length in (5, 7, 64):
        data = PackedDataset(tmp_path / "out", length)
        learnt = sum(int(data.row(index)["maskable"].sum()) for index in range(len(data)))
        lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
        assert learnt == sum(len(line["answer"]) for line in lines)


def test_the_padding_behind_an_answer_that_was_cut_short_is_no_end_to_learn(
    home: Path, parent: Parent, prompts: Path, tmp_path: Path
) -> None:
    prepared(tmp_path / "out", home, source(prompts))
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert {line["finish_reason"] for line in lines} >= {"length"}
    data = PackedDataset(tmp_path / "out", 64, pad_to_block=64)
    for index, line in enumerate(lines):
        behind = data.row(index)["maskable"][len(line["prompt"]) + len(line["answer"]) :]
        assert behind.all() == (line["answer"][-1] == data.pad_id) and behind.any() == behind.all()


def test_rows_that_stand_for_no_word_are_never_drawn(prompts: Path, tmp_path: Path) -> None:
    """An answer that held one could not be stored: a random model draws them often."""
    save_causal(tmp_path / "parent", small_causal(rows=64), small_tokenizer(60))
    prompts.write_text("".join(json.dumps(f"w{number}") + "\n" for number in range(2, 12)))
    prepared(tmp_path / "out", tmp_path / "parent", source(prompts, temperature=5.0))
    assert max(int(ids.max()) for ids in PackedDataset(tmp_path / "out", 64).documents()) < 60


def test_sampled_answers_are_each_their_own_seeds(home: Path, parent: Parent, prompts: Path, tmp_path: Path) -> None:
    manifest = prepared(
        tmp_path / "out", home, source(prompts, temperature=0.8, top_p=0.9, seed=7, skip=3, documents=2)
    )
    documents = {tuple(document.tolist()) for document in PackedDataset(tmp_path / "out", 64).documents()}
    wanted = [expected(parent, TEXTS[3 + at], temperature=0.8, top_p=0.9, seed=7 + at) for at in range(2)]
    assert documents == {tuple(ids + answer) for ids, answer in wanted}
    told = manifest["settings"]["source"]
    assert (told["temperature"], told["top_p"], told["seed"], told["prompts"]) == (0.8, 0.9, 7, 2)


class Stop(Exception):
    """Raised from a progress callback, to break off anywhere."""


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_a_kill_loses_no_answer_and_asks_for_none_twice(
    home: Path, after: int, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path / "whole", home, source(prompts))
    asked: list[int] = []
    real = Parent.generate_batch

    def counting(self: Parent, batch: Any, *others: Any, **named: Any) -> Any:
        asked.append(len(batch))
        return real(self, batch, *others, **named)

    monkeypatch.setattr(Parent, "generate_batch", counting)
    seen = 0

    def progress(new: int, _: int) -> None:
        nonlocal seen
        seen += new
        if seen > after:
            raise Stop

    with pytest.raises(Stop):
        prepared(tmp_path / "out", home, source(prompts), progress)
    with (tmp_path / "out" / "answers.jsonl").open("a") as file:
        file.write('{"line": 3, "prom')  # as a kill in the middle of a line leaves it
    prepared(tmp_path / "out", home, source(prompts))
    assert sum(asked) == len(TEXTS)
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_prompts_that_leave_no_room_are_counted_by_line(
    home: Path, prompts: Path, tmp_path: Path, parent: Parent
) -> None:
    context = int(parent.causal_lm.config.max_position_embeddings)
    with prompts.open("a") as file:
        file.write(json.dumps("word " * context) + "\n")
    refused = prepared(tmp_path / "out", home, source(prompts))["refused"]
    assert refused["counts"] == {f"prompt and {NEW} new tokens exceed the context": 1}
    assert "line 7" in json.dumps(refused["examples"])
    assert sum(1 for _ in PackedDataset(tmp_path / "out", 64).documents()) == len(TEXTS)


def test_a_key_of_another_name_may_hold_the_question(home: Path, parent: Parent, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question": TEXTS[0], "answer": "#### 3"}) + "\n")
    prepared(tmp_path / "out", home, source(file, prompt_field="question", chat=True))
    ids, answer = expected(parent, TEXTS[0], chat=True)
    (document,) = PackedDataset(tmp_path / "out", 64).documents()
    assert document.tolist() == ids + answer


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"prompts": None, "documents": 3, "chat": True}, ConfigError, "chat without prompts"),
        ({"prompts": "nowhere.txt"}, DataError, "cannot read the prompts"),
        ({"prompts": "empty"}, DataError, "no prompts in"),
        ({"skip": 6}, DataError, "holds 6 prompts, and > 6 are wanted"),
        ({"documents": 7}, DataError, "holds 6 prompts, and 7 behind the first 0 are wanted"),
        ({"temperatur": 1}, ConfigError, "temperatur"),
        ({"temperature": -1}, ConfigError, "temperature"),
        ({"prompt_field": "question"}, DataError, "one of question and messages is needed"),
    ],
)
def test_what_cannot_be_asked_is_said_before_a_model_is_loaded(
    change: dict[str, Any], error: type[HildaError], match: str, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").write_text("\n\n")
    if change.get("prompts") == "empty":
        change = {"prompts": str(tmp_path / "empty")}
    section = {key: value for key, value in merge(source(prompts), change).items() if value is not None}
    with pytest.raises(error, match=match):
        open_stage({"prepare": {"source": section, "out": str(tmp_path / "out")}}, "prepare", STAGES)


def test_a_folder_of_other_prompts_is_never_mixed_in(home: Path, prompts: Path, tmp_path: Path) -> None:
    prepared(tmp_path / "out", home, source(prompts))
    prompts.write_text(json.dumps("Another one") + "\n")
    with pytest.raises(DataError, match="other settings: source"):
        prepared(tmp_path / "out", home, source(prompts))
    for file in (tmp_path / "out").iterdir():
        if file.name != "answers.jsonl":
            file.unlink()
    with pytest.raises(DataError, match="answers to other prompts"):
        prepared(tmp_path / "out", home, source(prompts))


def test_the_verb_asks_the_parent_and_says_how_much_it_wrote(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.txt").write_text("How are you?\n\nWhat is a dog?\n")
    flags = ["--source", "parent", "--parent", str(home), "--prompts", str(tmp_path / "questions.txt"), "--chat"]
    sets = ["--set", "prepare.source.max_tokens=5", "--set", "device=cpu"]
    assert main(["prepare", *flags, *sets, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "2 documents" in printed.out
    assert main(["prepare", *flags, *sets, "--out", str(tmp_path / "new"), "--shard", "0/2"]) == 2
    assert "one process answers them" in capsys.readouterr().err
    assert main(["prepare", *flags, *sets, "--out", str(tmp_path / "new"), "--tokenizer", "tiny"]) == 2
    assert "it has its own" in capsys.readouterr().err
    flags[3] = "tiny"
    assert main(["prepare", *flags, *sets, "--out", str(tmp_path / "new")]) == 2
    assert "no chat template" in capsys.readouterr().err
