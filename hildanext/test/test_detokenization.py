"""One decoder of new tokens: streams, whole answers and pieces are the same text, whatever the tokenizer."""

import ast
import random
from pathlib import Path

import pytest
import torch

from hildanext.ar import Parent
from hildanext.decoding.detokenizer import IncrementalDetokenizer
from hildanext.detokenization import HALF, Detokenizer, TokenCells, cell_bytes, pieces_of, special_ids
from hildanext.eval.models import GenerationParams, ParentEvalModel
from small_models import small_causal
from text_tokenizers import KINDS, byte_level, sentencepiece

PACKAGE = Path(__import__("hildanext").__file__).parent


def library(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def drawn(tokenizer, count=300):
    """Prompts (some empty, some of control tokens alone) and what follows them; bytes are half of the tokens."""
    numbers = random.Random(0)
    ids, control = sorted(tokenizer.get_vocab().values()), sorted(special_ids(tokenizer))
    for _ in range(count):
        prompt = numbers.choices([*ids, *control * 5], k=numbers.randrange(4))
        yield prompt, numbers.choices(ids, k=numbers.randrange(1, 14)), numbers


@pytest.mark.parametrize("kind", KINDS)
def test_streams_pieces_bytes_and_the_whole_answer_are_one_text(kind):
    tokenizer, compared = KINDS[kind](), 0
    for prompt, new, numbers in drawn(tokenizer):
        text = Detokenizer(tokenizer, prompt).text(new)
        pieces: list[str] = []
        streaming = IncrementalDetokenizer(tokenizer, prompt, frozenset(), (), pieces.append)
        cuts = sorted(numbers.choices(range(len(new)), k=3))
        ending = [streaming.add(new[:cut], full=False) for cut in cuts] and streaming.add(new, full=True)
        assert ending is not None and ending.text == "".join(pieces) == text
        told = Detokenizer(tokenizer, prompt)
        assert len(told.pieces(new)) == len(new) and "".join(told.pieces(new)) == text
        assert b"".join(told.raws(new)).decode("utf-8", "replace") == text
        before, whole = library(tokenizer, prompt), library(tokenizer, prompt + new)
        # A run of bytes that is no text is one sign for each byte in the library, and one for each character here.
        if whole.startswith(before) and HALF not in whole:
            assert text == whole[len(before) :]
            compared += 1
    assert compared > (10 if kind in ("sentencepiece", "byte_level") else 150)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_a_text_cut_inside_a_character_has_one_sign_for_it_and_loses_none(kind):
    tokenizer = KINDS[kind]()
    context = tokenizer("the fox", add_special_tokens=False)["input_ids"]
    ids = tokenizer("the fox says 🦊 é the 🦊🦊.", add_special_tokens=False)["input_ids"]
    assert ids[: len(context)] == context
    whole = Detokenizer(tokenizer, context).text(ids[len(context) :])
    assert whole == " says 🦊 é the 🦊🦊."
    for cut in range(len(context), len(ids)):
        pieces: list[str] = []
        rows = IncrementalDetokenizer(tokenizer, context, frozenset(), (), pieces.append)
        for end in range(len(context), cut):
            rows.add(ids[len(context) : end], full=False)
            assert whole.startswith("".join(pieces)), "nothing is taken back"
        text = rows.add(ids[len(context) : cut], full=True).text
        assert text == "".join(pieces) and text.count(HALF) <= 1 and whole.startswith(text.removesuffix(HALF))


def test_a_space_is_stripped_where_a_document_begins_and_not_where_a_prompt_goes_on():
    tokenizer = sentencepiece()
    ids = tokenizer("the fox", add_special_tokens=False)["input_ids"]
    texts = [Detokenizer(tokenizer, prompt).text(ids) for prompt in ([], [tokenizer.bos_token_id], ids, ids[:1])]
    assert texts == ["the fox", "the fox", " the fox", " the fox"]


def test_clean_up_of_a_tokenizer_s_file_changes_no_text_and_ends_no_stream():
    tokenizer = byte_level(clean_up_tokenization_spaces=True)
    text = "a , b . do n't 's !"
    ids, pieces = tokenizer(text, add_special_tokens=False)["input_ids"], []
    rows = IncrementalDetokenizer(tokenizer, [], frozenset(), (), pieces.append)
    for end in range(len(ids)):
        rows.add(ids[:end], full=False)
    assert rows.add(ids, full=True).text == text == "".join(pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_are_looked_for_in_the_same_text(kind):
    tokenizer = KINDS[kind]()
    for prompt, new, _ in drawn(tokenizer, 60):
        text = Detokenizer(tokenizer, prompt).text(new)
        stop = text[len(text) // 2 :][:2]
        if not stop or HALF in text:
            continue
        pieces: list[str] = []
        rows = IncrementalDetokenizer(tokenizer, prompt, frozenset(), (stop,), pieces.append)
        ending = next(end for cut in range(1, len(new) + 1) if (end := rows.add(new[:cut], full=cut == len(new))))
        assert ending.reason == "stop" and ending.text == "".join(pieces) == text[: text.find(stop)]
        shorter = Detokenizer(tokenizer, prompt)
        assert stop in shorter.text(ending.tokens) and stop not in shorter.text(ending.tokens[:-1], whole=False)


def test_tokens_that_may_still_be_edited_are_not_remembered_as_they_were():
    tokenizer = byte_level()
    one, other = (tokenizer(text)["input_ids"] for text in ("the fox", "the cat sat"))
    told = Detokenizer(tokenizer, [])
    seen = [one, other, one[:2], other, []]
    assert [told.text(ids) for ids in seen] == ["the fox", "the cat sat", "the ", "the cat sat", ""]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level", "metaspace"])
def test_cells_of_a_picture_join_to_the_text(kind):
    tokenizer = KINDS[kind]()
    for prompt, new, _ in drawn(tokenizer, 100):
        cells, hidden = TokenCells(tokenizer, prompt), special_ids(tokenizer)
        told = [cells.cell(at, token) for at, token in enumerate(new, len(prompt))]
        shown = [cell_bytes(cell) for cell, token in zip(told, new, strict=True) if token not in hidden]
        lead = len(prompt) + next((at for at, token in enumerate(new) if token not in hidden), 0)
        if all(token in hidden for token in prompt) and lead > len(prompt):
            continue  # where a document begins is told of its first place alone
        assert "".join(pieces_of(shown)) == Detokenizer(tokenizer, prompt).text(new)
        assert [cell["text"] for cell, token in zip(told, new, strict=True) if token == tokenizer.eos_token_id] == [
            "</s>"
        ] * new.count(tokenizer.eos_token_id)


def test_the_parent_writes_the_same_text_alone_and_in_an_evaluation():
    tokenizer = sentencepiece()
    parent = Parent(small_causal(rows=len(tokenizer)), tokenizer)
    prompts = [tokenizer("the fox", add_special_tokens=False)["input_ids"], [tokenizer.bos_token_id]]
    with torch.inference_mode():
        alone = [parent.generate(prompt, 12, stop_ids=[]) for prompt in prompts]
    texts = [""] * 2
    model = ParentEvalModel(parent, tokenizer, [])
    model.write(prompts, GenerationParams(12), [0, 0], lambda index, answer: texts.__setitem__(index, answer.text))
    expected = [Detokenizer(tokenizer, prompt).text(one.tokens) for prompt, one in zip(prompts, alone, strict=True)]
    assert texts == [one.text for one in alone] == expected


def test_no_other_file_asks_a_tokenizer_to_decode():
    """Bytes are decoded by the name of a code, or by none; everything else with that name would be a tokenizer."""
    for path in [*PACKAGE.rglob("*.py"), *(Path(__file__).parents[1] / "scripts").glob("*.py")]:
        if path.name in ("detokenization.py", "json_text.py"):  # the latter decodes JSON
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name, first = node.func.attr, node.args[0] if node.args else None
            of_bytes = first is None or (isinstance(first, ast.Constant) and isinstance(first.value, str))
            of_bytes = of_bytes or "decoder" in ast.unparse(node.func.value).lower()
            decodes = name in ("batch_decode", "convert_tokens_to_string") or (name == "decode" and not of_bytes)
            assert not decodes, f"{path.name}:{node.lineno} decodes: Detokenizer does"
