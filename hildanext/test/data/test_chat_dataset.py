"""Conversations as batches: what is masked and learnt, padding, packing, the split, long answers, graphs, resuming."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import random_model
from corpus import write_jsonl
from hildanext.core.config import validate
from hildanext.core.errors import ConfigError, DataError
from hildanext.corruption.noising import NoiseConfig, noised
from hildanext.data.batch import Batch
from hildanext.data.chat_dataset import ChatDataConfig, ChatDataset, held_out, open_sources, prepare_chat
from hildanext.data.chat_template import Message, encode_chat, set_template
from hildanext.data.packing.rows import RowOrder, best_fit, row_order
from hildanext.datasets import batches
from hildanext.diffusion import complement, mask_tokens, replace_tokens
from hildanext.models.loading import tiny
from hildanext.tokenization import load_tokenizer

BLOCK = 8


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = load_tokenizer(tiny.folder("diffusion"))
    set_template(tokenizer)
    return tokenizer


def knobs_of(train: dict[str, Any], **more: Any) -> ChatDataConfig:
    return validate(ChatDataConfig, {"train": train, "sequence_length": 128, **more}, "data")


def sums(count: int = 60, **more: Any) -> ChatDataConfig:
    return knobs_of({"name": "arithmetic", "count": count}, valid_share=0.2, **more)


def written(folder: Path, records: list[Any], **more: Any) -> ChatDataConfig:
    """All records in the train part, and one of their own in the held-out part."""
    write_jsonl(folder / "train.jsonl", records)
    write_jsonl(folder / "valid.jsonl", [{"prompt": "Hi", "response": "Hello"}])
    train, valid = ({"name": "files", "path": str(folder / f"{part}.jsonl")} for part in ("train", "valid"))
    return knobs_of(train, valid=valid, **more)


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]}


def opened(folder: Path, data: ChatDataConfig, tokenizer: Any, part: str = "train", block: int = BLOCK) -> ChatDataset:
    prepare_chat(folder / "chat", data, tokenizer, block)
    length, pad = data.sequence_length, tokenizer.eos_token_id
    return ChatDataset(folder / "chat", part, length, block, pad, data.packing)


def whole(dataset: ChatDataset) -> Batch:
    return dataset.batch(range(len(dataset)))


def test_prompts_are_never_masked_and_the_filling_of_the_last_block_is(tmp_path: Path, tokenizer):
    data = written(tmp_path, [{"prompt": "How many apples does Lily have?", "response": "5"}], packing=False)
    batch = whole(opened(tmp_path, data, tokenizer))
    prompt = encode_chat(tokenizer, [Message("user", "How many apples does Lily have?")])
    ids = [*prompt, *tokenizer("5", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    places = -(-len(ids) // BLOCK) * BLOCK
    assert batch.tokens[0].tolist() == ids + [tokenizer.eos_token_id] * (places - len(ids))
    assert batch.maskable[0].tolist() == [False] * len(prompt) + [True] * (places - len(prompt))
    assert batch.position[0].tolist() == list(range(places))
    assert not batch.document.any() and not batch.always_masked.any()


@pytest.mark.parametrize("shift", ["block", "parent"])
def test_noise_touches_answers_only_and_a_pair_masks_each_of_their_tokens_once(tmp_path: Path, tokenizer, shift: str):
    dataset = opened(tmp_path, sums(), tokenizer)
    card = random_model(alignment=shift, block_size=BLOCK).card
    batch = dataset.batch(range(4))
    generator = torch.Generator().manual_seed(0)
    real = torch.arange(3, 60)
    first, second = noised(batch, BLOCK, NoiseConfig(complementary=True, replace_rate=0.5), card, real, generator)
    assert torch.equal(first.masked ^ second.masked, batch.maskable) and not (first.masked & second.masked).any()
    for view in (first, second):
        assert torch.equal(view.noisy[~batch.maskable], batch.tokens[~batch.maskable])
        assert view.replaced.any() and not (view.replaced & ~batch.maskable).any()


def test_the_next_question_in_the_block_of_an_answer_is_shown_as_masks_and_not_learnt(tmp_path: Path, tokenizer):
    turns = ("How many apples does Lily have now?", "She has 5", "And Tom? He likes apples very much too.", "He has 3")
    dataset = opened(tmp_path, written(tmp_path, [chat(*turns)]), tokenizer)
    batch = whole(dataset)
    prompts = [
        encode_chat(tokenizer, [Message(("user", "assistant")[n % 2], t) for n, t in enumerate(turns[:k])])
        for k in (1, 3)
    ]
    first = len(prompts[0]) + len(tokenizer("She has 5", add_special_tokens=False)["input_ids"]) + 1
    tail = list(range(first, -(-first // BLOCK) * BLOCK))
    assert tail and batch.always_masked[0].nonzero()[:, 0].tolist() == tail
    learnt = [*range(len(prompts[0]), first), *range(len(prompts[1]), batch.tokens.shape[1])]
    assert batch.maskable[0].nonzero()[:, 0].tolist() == learnt
    assert batch.tokens[0, : len(prompts[1])].tolist() == prompts[1]
    card = random_model(block_size=BLOCK).card
    for view in noised(batch, BLOCK, NoiseConfig(complementary=True), card, torch.arange(9), torch.Generator()):
        assert (view.noisy[batch.always_masked] == card.mask_id).all() and not (view.masked & batch.always_masked).any()
        assert torch.equal(view.clean, batch.tokens)


def test_a_response_of_no_tokens_is_neither_masked_nor_replaced_nor_an_error():
    """What an empty answer would give. (In data an empty turn is refused by name.)"""
    tokens = torch.arange(16)[None]
    document, nothing = torch.zeros_like(tokens), torch.zeros(1, 16, dtype=torch.bool)
    batch = Batch(tokens, document, tokens, nothing)
    card = random_model(block_size=4).card
    for view in noised(
        batch, 4, NoiseConfig(complementary=True, replace_rate=1.0), card, torch.arange(9), torch.Generator()
    ):
        assert torch.equal(view.noisy, tokens) and not view.masked.any() and not view.replaced.any()
    time = torch.full((1, 16), 0.5)
    view = mask_tokens(tokens, document, tokens, nothing, time, 4, card.mask_id, torch.Generator())
    assert not complement(view, card.mask_id).masked.any()
    assert not replace_tokens(view, 1.0, torch.arange(9), torch.Generator()).replaced.any()


def test_packed_rows_hold_every_conversation_once_at_block_boundaries(tmp_path: Path, tokenizer):
    packed = opened(tmp_path, sums(), tokenizer)
    single = ChatDataset(tmp_path / "chat", "train", 128, BLOCK, tokenizer.eos_token_id, packing=False)
    assert len(packed) < len(single) == packed.conversations and packed.tokens == single.tokens
    alone = {tuple(batch.tokens[0].tolist()) for batch in (single.batch([n]) for n in range(len(single)))}
    documents = []
    for number in range(len(packed)):
        batch = packed.batch([number])
        for document in range(int(batch.document.max()) + 1):
            here = (batch.document[0] == document).nonzero()[:, 0]
            assert int(here[0]) % BLOCK == 0 and len(here) % BLOCK == 0
            assert batch.position[0, here].tolist() == list(range(len(here)))
            documents.append(tuple(batch.tokens[0, here].tolist()))
        assert batch.tokens.shape[1] <= 128
    assert len(documents) == len(single) and set(documents) == alone
    places = int((whole(packed).document >= 0).sum())
    assert places == packed.tokens


def test_batches_are_a_function_of_their_number(tmp_path: Path, tokenizer):
    dataset = opened(tmp_path, sums(), tokenizer)
    order = RowOrder(len(dataset), 3, 7)
    wanted = [dataset.batch(order.batch(number)) for number in range(12)]
    for start, step in ((0, 1), (1, 2), (5, 1)):
        following = batches(dataset, 3, 7, start, step)
        for number in range(start, 12, step):
            assert torch.equal(next(following).tokens, wanted[number].tokens)
    epoch = [row for number in range(len(dataset)) for row in order.batch(number)]
    assert sorted(epoch[: len(dataset)]) == list(range(len(dataset)))
    assert epoch[: len(dataset)] == row_order(len(dataset), 7, 0).tolist()


def test_best_fit_wastes_little_and_never_overfills():
    numbers = np.random.default_rng(0)
    for capacity in (1, 7, 16):
        lengths = numbers.integers(1, capacity + 1, 2000)
        row_of = best_fit(lengths, capacity)
        filled = np.bincount(row_of, weights=lengths)
        assert filled.max() <= capacity and filled.min() > 0
        assert len(filled) <= 1.05 * lengths.sum() / capacity + max(1, (lengths > capacity / 2).sum() * 0.2)


def test_the_split_hangs_on_the_id_alone(tmp_path: Path, tokenizer):
    ids = [f"example-{number}" for number in range(4000)]
    assert [n for n in range(40) if held_out(ids[n], 0.2)] == [6, 9, 11, 16, 19, 21, 25, 26, 29, 35, 38, 39]
    share = sum(held_out(id, 0.1) for id in ids) / len(ids)
    assert abs(share - 0.1) < 3 * (0.1 * 0.9 / 4000) ** 0.5
    records = [{"id": id, "prompt": f"Is this {id}?", "response": "Yes"} for id in ids[:200]]
    parts = []
    for name, rows in (("a", records), ("b", records[::-1])):
        (tmp_path / name).mkdir()
        path = write_jsonl(tmp_path / name / "chat.jsonl", rows)
        data = knobs_of({"name": "files", "path": str(path)}, valid_share=0.1)
        dataset = opened(tmp_path / name, data, tokenizer, "valid")
        parts.append({dataset.conversation(number).id for number in range(dataset.conversations)})
    assert parts[0] == parts[1] == {id for id in ids[:200] if held_out(id, 0.1)}


LONG = {"prompt": "Tell me a story", "response": "Once upon a time there was a dog. " * 30}


def test_an_answer_longer_than_the_row_is_cut_without_an_end_and_reported(tmp_path: Path, tokenizer, caplog):
    data = written(tmp_path, [LONG, {"prompt": "Hi", "response": "Hello"}], packing=False)
    manifest = prepare_chat(tmp_path / "chat", data, tokenizer, BLOCK)
    assert manifest["parts"]["train source"]["cut"]["counts"] == {"answers cut at 128 tokens": 1}
    assert "train.jsonl record 1" in caplog.text and manifest["parts"]["train"]["examples"] == 2
    batch = opened(tmp_path, data, tokenizer).batch([0])
    assert batch.tokens.shape == (1, 128) and batch.maskable[0, -1]
    assert tokenizer.eos_token_id not in batch.tokens[0, 1:].tolist()


def test_it_can_be_left_out_or_refused_instead(tmp_path: Path, tokenizer):
    records = [LONG, {"prompt": "Hi", "response": "Hello"}]
    skipped = prepare_chat(tmp_path / "a", written(tmp_path, records, too_long="skip"), tokenizer, BLOCK)
    assert skipped["parts"]["train source"]["refused"]["counts"] == {"longer than the row": 1}
    assert skipped["parts"]["train"]["examples"] == 1
    with pytest.raises(DataError, match="record 1 has .* tokens, the row 128.*chat.sequence_length.*chat.too_long"):
        prepare_chat(tmp_path / "b", written(tmp_path, records, too_long="refuse"), tokenizer, BLOCK)
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob("b.tmp*"))


def test_a_prompt_that_fills_the_row_is_left_out(tmp_path: Path, tokenizer):
    records = [{"prompt": LONG["response"], "response": "Yes"}, {"prompt": "Hi", "response": "Hello"}]
    manifest = prepare_chat(tmp_path / "chat", written(tmp_path, records), tokenizer, BLOCK)
    assert manifest["parts"]["train source"]["refused"]["counts"] == {"a prompt as long as the row": 1}


def test_of_a_long_conversation_the_answers_that_fit_are_kept(tmp_path: Path, tokenizer):
    turns = ["How are you?", "Fine", "Tell me a story", "Once upon a time there was a dog. " * 30, "Bye", "Bye"]
    data = written(tmp_path, [chat(*turns)], packing=False)
    manifest = prepare_chat(tmp_path / "chat", data, tokenizer, BLOCK)
    cut = manifest["parts"]["train source"]["cut"]["counts"]
    assert "answers cut at 128 tokens" in cut
    batch = whole(opened(tmp_path, data, tokenizer))
    assert batch.tokens.shape[1] == 128 and batch.maskable[0, -1] and batch.tokens[0, -1] != tokenizer.eos_token_id


def test_bad_records_are_counted_in_the_manifest_and_strict_stops_at_the_first(tmp_path: Path, tokenizer):
    good = chat("Hi", "Hello")
    bad = [chat("Hi", ""), chat("Hi"), {"messages": [{"role": "tool", "content": "x"}]}, chat("Hi", "<|mask|>")]
    data = written(tmp_path, [good] * 5 + bad, special_tokens_in_text=True)
    refused = prepare_chat(tmp_path / "a", data, tokenizer, BLOCK)["parts"]["train source"]["refused"]
    assert refused["counts"] == {
        "a special token in a turn": 1, "empty turn": 1, "no assistant turn": 1, "unknown role": 1
    }  # fmt: skip
    assert any("'tool'" in example and "train.jsonl record 8" in example for example in refused["examples"])
    for number, kind in enumerate(("empty turn", "no assistant turn", "unknown role", "a special token"), start=0):
        data = written(tmp_path, [good, bad[number]])
        data = knobs_of({**data.train, "strict": True}, valid=data.valid, special_tokens_in_text=True)
        with pytest.raises(DataError, match=f"record 2.*{kind}"):
            prepare_chat(tmp_path / "b", data, tokenizer, BLOCK)


def graph(effect: list[Any]) -> dict[str, Any]:
    nodes = [
        {"id": "q", "kind": "given", "value": "5", "spans": [["prompt", 9, 10]]},
        {"id": "e", "kind": "intermediate", "value": "8", "spans": [effect]},
    ]
    edge = {"from": "q", "to": "e", "kind": "operand", "weight": 1.0, "ambiguous": False}
    return {"version": 1, "source": "test", "nodes": nodes, "edges": [edge]}


def test_the_pairs_of_a_graph_follow_the_conversation_into_its_row(tmp_path: Path, tokenizer):
    linked = {
        "prompt": "Lily has 5 apples. She gets 3.",
        "response": "5+3=8",
        "causal_graph": graph(["response", 4, 5]),
    }
    plain = {"prompt": "Hi", "response": "Hello"}
    dataset = opened(tmp_path, written(tmp_path, [plain, linked, plain]), tokenizer)
    assert len(dataset) == 1 and dataset.conversations == 3
    pairs, batch = dataset.pairs([0]), dataset.batch([0])
    assert pairs is not None and pairs.weight.tolist() == [1.0] and pairs.row.tolist() == [0]
    assert tokenizer.decode(batch.tokens[0, pairs.effect]).strip() == "8" and bool(batch.maskable[0, pairs.effect])
    assert tokenizer.decode(batch.tokens[0, pairs.cause]).strip() == "5" and not bool(batch.maskable[0, pairs.cause])
    assert batch.document[0, pairs.effect] == batch.document[0, pairs.cause]
    assert opened(tmp_path, written(tmp_path, [plain, plain]), tokenizer).pairs([0]) is None


@pytest.mark.parametrize("effect", [["response", 4, 99], ["answer", 0, 1], ["response", 2, 2]])
def test_a_graph_that_does_not_hold_is_counted_with_its_place(tmp_path: Path, tokenizer, effect: list[Any]):
    linked = {"prompt": "Lily has 5 apples. She gets 3.", "response": "5+3=8", "causal_graph": graph(effect)}
    manifest = prepare_chat(
        tmp_path / "chat", written(tmp_path, [{"prompt": "Hi", "response": "Hello"}, linked]), tokenizer, BLOCK
    )
    refused = manifest["parts"]["train source"]["refused"]
    assert refused["counts"] == {"broken causal graph": 1} and "record 2" in refused["examples"][0]
    assert manifest["parts"]["train"]["rows"] == 1


def test_what_was_prepared_is_kept_until_something_that_decides_it_changes(tmp_path: Path, tokenizer):
    prepare_chat(tmp_path / "chat", sums(), tokenizer, BLOCK)
    stamp = (tmp_path / "chat" / "manifest.json").stat().st_mtime_ns
    prepare_chat(tmp_path / "chat", sums(packing=False), tokenizer, BLOCK)
    assert (tmp_path / "chat" / "manifest.json").stat().st_mtime_ns == stamp
    manifests = [json.loads((tmp_path / "chat" / "manifest.json").read_text())]
    for data, block in ((sums(50), BLOCK), (sums(), 4), (sums(sequence_length=64), BLOCK)):
        manifests.append(prepare_chat(tmp_path / "chat", data, tokenizer, block))
        assert manifests[-1]["identity"] != manifests[-2]["identity"]


@pytest.mark.parametrize(
    ("section", "error", "words"),
    [
        ({"train": {}}, ConfigError, "chat.train has no name"),
        ({"train": {"name": "arithmetic"}, "valid": {"path": "x"}}, ConfigError, "chat.valid has no name"),
        ({"train": {"name": "arithmetic"}, "too_long": "burn"}, ConfigError, "too_long"),
        ({"train": {"name": "arithmetic"}, "sequence_length": 100}, ConfigError, "block size 8 does not divide"),
        ({"train": {"name": "arithmetic", "count": 3}, "valid_share": 0.01}, DataError, "valid part holds no convers"),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, tokenizer, section: dict[str, Any], error: type, words: str):
    with pytest.raises(error, match=words):
        data = validate(ChatDataConfig, section, "data")
        open_sources(data)
        prepare_chat(tmp_path / "chat", data, tokenizer, BLOCK)
