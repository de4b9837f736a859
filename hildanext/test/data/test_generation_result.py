"""One result of a generation and one JSON form of it: the doors show keys of it, under the names they always had."""

import subprocess
import sys
from dataclasses import replace

import pytest

from hildanext import ar, inference
from hildanext.data.generation_result import GenerationResult, GenerationStats
from hildanext.engine.base import RequestOutput
from hildanext.eval.models import EvalAnswer

STATS = GenerationStats(2, 5, 1, 1, tokens=14, edits=3, seconds=2.0, prefill_seconds=0.5)
TIMES = {"queue_seconds": 0.25, "first_piece_seconds": 0.75, "seconds": 3.0}


def test_forwards_are_those_of_all_kinds_and_the_prefill_costs_no_tokens():
    assert STATS.forwards == 9 and STATS.tokens_per_forward == 2.0 and STATS.tokens_per_second == 7.0


def test_rows_stand_beside_forwards_and_a_record_without_them_is_read_as_not_told():
    assert replace(STATS, rows=56).rows_per_token == 4.0 and STATS.rows_per_token == 0.0
    told = {part: value for part, value in STATS.to_record().items() if part in GenerationStats.__annotations__}
    assert GenerationStats(**{part: value for part, value in told.items() if part != "rows"}) == STATS
    assert GenerationStats.total([replace(STATS, rows=5), replace(STATS, rows=7)]).rows == 12


def test_a_server_that_tells_no_forwards_has_no_tokens_per_forward():
    silent = GenerationStats(0, 0, 0, 0, tokens=14, edits=0, seconds=0.0, prefill_seconds=0.0)
    assert silent.tokens_per_forward == 0.0 and silent.tokens_per_second == 0.0


def test_the_record_has_the_names_that_the_command_line_prints():
    record = GenerationResult([5, 6], "a b", "eos", STATS, trace=["step"]).to_record()
    assert list(record) == ["text", "tokens", "finish_reason", "stats"] and record["tokens"] == [5, 6]
    assert list(record["stats"]) == [
        "prefill_forwards", "denoise_forwards", "commit_forwards", "revise_forwards", "tokens", "edits", "seconds",
        "prefill_seconds", "rows", "forwards", "tokens_per_forward", "rows_per_token", "tokens_per_second",
    ]  # fmt: skip


def test_a_line_of_a_table_holds_the_number_of_tokens_and_the_counts_that_were_named():
    line = GenerationResult([5, 6], "a b", "stop", STATS).flat_record("tokens", "edits")
    assert line == {"text": "a b", "finish_reason": "stop", "tokens": 14, "edits": 3}


def test_an_engine_adds_its_times_and_an_evaluation_its_own_to_the_same_result():
    output = RequestOutput([5, 6], "a b", "eos", STATS, prompt_tokens=4, cached_tokens=0, **TIMES)
    record = GenerationResult([5, 6], "a b", "eos", STATS).to_record()
    record["stats"] |= {"first_piece_seconds": 0.75, "total_seconds": 3.0}
    assert output.to_record() == record
    sample = EvalAnswer([5, 6], "a b", "eos", STATS, seconds=1.5, wall_seconds=0.5, mask_tokens=1).sample_record()
    assert sample == {
        "text": "a b", "finish_reason": "eos", "tokens": 14, "forwards": 9, "prefill_forwards": 2, "edits": 3,
        "seconds": 1.5, "wall_seconds": 0.5, "mask_tokens": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Completion", "ArResult"])
def test_promised_names_are_the_one_result(name):
    assert getattr(inference if name == "Completion" else ar, name) is GenerationResult


def test_the_result_loads_no_torch():
    code = "import sys, hildanext.data.generation_result; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
