"""`scripts/measure_correction.py`: what it damages, and what it counts after the decoder's own loop."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from conftest import random_model
from hildanext.core.runtime import make_generator
from hildanext.decoding import Decoder, Edit, decoder_section, make_decoder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_correction.py"
PROMPT, PAD = [5, 6, 7], 1


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("measure_correction", SCRIPT)
    module = sys.modules["measure_correction"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["measure_correction"]


def cases(script, rate: float = 0.3, block_size: int = 4):
    """Answers of 21 and of 6 tokens."""
    answers = ([7, 8, 9] * 7, [7, 7, 9, 7, 8, 7])
    pool = torch.arange(2, 40)
    return [
        script.wrong_answer(PROMPT, answer, pool, rate, block_size, PAD, make_generator(0, number))
        for number, answer in enumerate(answers)
    ]


def test_only_the_answer_is_damaged_and_every_damage_is_wrong(script):
    rates = []
    for number in range(200):
        case = script.wrong_answer(PROMPT, [7] * 30, torch.arange(2, 40), 0.2, 4, PAD, make_generator(1, number))
        changed = case.shown != case.truth
        assert len(case.truth) == 36 and case.truth[:3].tolist() == PROMPT and case.truth[33:].tolist() == [PAD] * 3
        assert case.counted.sum() == 30 and not changed[~case.counted].any()
        rates.append(changed.sum() / 30)
    assert 0.18 < float(torch.stack(rates).mean()) < 0.21


class Sevens(Decoder):
    """Writes 7 over everything that may be written, and is content."""

    def edit(self, logits, where, canvas):
        tokens = torch.full_like(canvas.tokens, 7)
        final = torch.ones(len(tokens), dtype=torch.bool)
        return Edit(canvas.editable, tokens, torch.ones(tokens.shape), final)


def test_mended_and_kept_are_what_equals_the_truth_afterwards(script):
    model, shown = random_model(block_size=4), cases(script)
    for case, counts in zip(shown, script.corrected(model, shown, Sevens()), strict=True):
        wrong = case.counted & (case.shown != case.truth)
        sevens = case.truth == 7
        right = case.counted & ~wrong
        expected = [int(places.sum()) for places in (wrong, wrong & sevens, right, right & sevens)]
        assert counts[:4] == expected and expected[1] > 0 and expected[3] > 0
        assert counts[4] == (len(case.truth) - 3 + 3) // 4, "one forward for each block that holds some of the answer"


def test_without_editing_nothing_is_mended_and_all_is_kept(script):
    shown = cases(script)
    counts = script.corrected(random_model(block_size=4), shown, make_decoder(decoder_section("S_MODE", tau_edit=None)))
    for wrong, mended, right, kept, _, edits in counts:
        assert (mended, kept, edits) == (0, right, 0) and wrong > 0


def test_answers_do_not_depend_on_the_others_they_are_edited_with(script):
    model, shown = random_model(block_size=4), cases(script)
    decoder = make_decoder(decoder_section("S_MODE", max_post=3))
    assert script.corrected(model, shown, decoder) == [script.corrected(model, [case], decoder)[0] for case in shown]
