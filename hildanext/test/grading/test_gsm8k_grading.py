"""GSM8K rewards: every published rule against the conformance table, and what may never cost time or training."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hildanext.core.config import plain
from hildanext.core.errors import ConfigError, DataError, UnknownChoice
from hildanext.core.registry import build
from hildanext.grading import REWARDS
from hildanext.grading.gsm8k import RULES, canonical, cut, gold_answer, official

COLUMNS = ("official", "strict", "flexible", "espo", "d1_reward", "d1_eval", "canonical")

TABLE = [  # gold, completion, what each of COLUMNS says
    ("18", "Janet sells 9 eggs.\n#### 18", "1111001"),
    ("18", "#### 18.", "0110001"),
    ("18", "#### 18.0", "0000001"),
    ("18", "#### 18.00", "0000001"),
    ("18", "#### $18", "0011001"),
    ("18", "####18", "0011001"),
    ("18", "####  18", "0011001"),
    ("2,125", "#### 2,125", "1111001"),
    ("2,125", "#### 2125", "1110001"),
    ("2,125", "#### $2,125.00", "0000001"),
    ("2125", "#### 2,125", "1110001"),
    ("-10", "#### -10", "1111001"),
    ("-10", "#### \N{MINUS SIGN}10", "0000001"),
    ("-10", "#### 10", "0000000"),
    ("-3", "#### - 3", "0000001"),
    ("18", "#### 18 dollars", "1111001"),
    ("18", "#### 18%", "1111001"),
    ("18", "The answer is 18.", "0011000"),
    ("18", "The answer is 18. So she earns 18 dollars.", "0010000"),
    ("18", "The answer is $18", "0011000"),
    ("18", "#### 20\nWait.\n#### 18", "0010000"),
    ("18", "#### 18\n#### 20", "1101001"),
    ("18", "16+2=18", "0011000"),
    ("18", "So 18 dollars in 3 days", "0000000"),
    ("18", "#### eighteen", "0000000"),
    ("18", "", "0000000"),
    ("18", "####", "0000000"),
    ("18", "#### 018", "0000001"),
    ("18", "#### 1.8e1", "0000000"),
    ("18", "#### 36/2", "0000000"),
    ("0.5", "#### .5", "0000001"),
    ("0.5", "#### 1/2", "0000000"),
    ("18", "#### 18,", "1110001"),
    ("1000", "#### 1,00,0", "1110001"),
    ("18", "#### 17.9999999", "0000000"),
    ("18", "#### 18\n\nQuestion: next? #### 5", "1101001"),
    ("18", "<answer>18</answer>", "0011110"),
    ("18", "<answer>\n$18\n</answer>", "0011010"),
    ("18", "<answer>\\boxed{18}</answer>", "0011010"),
    ("18", "\\boxed{16+2=18}", "0011000"),
    ("18", "<answer>5</answer> <answer>18</answer>", "0011100"),
    ("18", "### 18", "0011000"),
    ("5", "#### 5 5", "1111001"),
]
"""Produced by running the published rules."""


@pytest.mark.parametrize("rule", COLUMNS)
@pytest.mark.parametrize(("gold", "completion", "verdicts"), TABLE)
def test_every_rule_says_what_the_published_code_says(rule, gold, completion, verdicts):
    assert RULES[rule](completion, gold) == (verdicts[COLUMNS.index(rule)] == "1")


def test_the_table_is_whole_and_every_rule_is_in_it():
    assert len(TABLE) == 43 and set(COLUMNS) == set(RULES)


pieces = st.sampled_from(
    [
        "####",
        "#### ",
        "#",
        " ",
        "\n",
        "-",
        "+",
        "\N{MINUS SIGN}",
        "$",
        ",",
        ".",
        "0",
        "18",
        "5",
        "e1",
        "/",
        "x",
        "5,000",
    ]
)


@given(st.lists(pieces, max_size=12).map("".join), st.sampled_from(["18", "-18", "5,000", "0.5", "5"]))
def test_whatever_official_accepts_canonical_accepts(completion, gold):
    assert not official(completion, gold) or canonical(completion, gold)


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("####\n#### 18", "18"),
        ("##### 18", "18"),
        ("#### $20\n#### 18", "18"),
        ("#### ,18", "18"),
        ("#### 0.,5", "0.5"),
    ],
)
def test_official_implies_canonical_on_odd_lines(completion, gold):
    assert official(completion, gold) and canonical(completion, gold)


def test_canonical_reads_one_answer_and_the_official_one_where_there_is_one():
    assert not canonical("#### 18\n#### 20", "20")
    assert not canonical("####20\n#### 18", "20")
    assert not canonical("####20 ####18", "18")


@pytest.mark.parametrize(
    ("completion", "gold", "right"),
    [
        ("#### 36/2", "36", True),
        ("#### --18", "18", False),
        ("#### -$-18", "18", False),
        ("#### -$18", "-18", True),
        ("#### $-18", "-18", True),
        ("#### +18", "18", True),
        ("#### \N{EURO SIGN}18.50", "18.5", True),
        ("####\n18", "18", False),
        ("#### " + "9" * 30, "9" * 30, True),
        ("#### " + "9" * 31, "9" * 30, False),
        ("#### " + "0" * 29 + "7", "7", True),
        ("#### " + "0" * 30 + "7", "7", False),
        ("#### 7." + "0" * 29, "7", True),
        ("#### 7." + "0" * 30, "7", False),
        ("####" + " " * 5000 + "18", "18", False),
        ("#### \N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT EIGHT}", "18", False),
    ],
)
def test_canonical_reads_signs_currency_and_decimals_and_nothing_after(completion, gold, right):
    assert canonical(completion, gold) == right


@pytest.mark.parametrize("rule", COLUMNS)
@pytest.mark.parametrize(
    "text",
    [
        "9" * 1_000_000,
        "#### " + "9" * 1_000_000,
        "####" + "9" * 1_000_000,
        "#### " + "," * 1_000_000,
        "####" + " " * 1_000_000 + "$",
        "#" * 1_000_000,
        "-" * 1_000_000,
        "\\boxed{" * 140_000,
        "<answer>" * 120_000,
        "<answer>" + "1." * 500_000,
        "The answer is " + "1" * 1_000_000,
    ],
    ids=lambda text: text[:16],
)
def test_a_megabyte_is_read_at_once(rule, text):
    """50 ms of processor time for the trained rule; the published ones get room, but never a quadratic's."""
    started = time.process_time()
    RULES[rule](text, "18")
    assert time.process_time() - started < (0.05 if rule == "canonical" else 2.0)


def test_d1_s_evaluation_never_grants_a_negative_answer():
    assert not RULES["d1_eval"]("<answer>-10</answer>", "-10") and RULES["d1_reward"]("<answer>-10</answer>", "-10")


def test_gold_is_the_text_after_the_marker():
    assert gold_answer("2 + 3 = <<2+3=5>>5\n#### 2,125") == "2,125"
    for answer in ("no marker", "####  "):
        with pytest.raises(DataError, match="no '#### N'"):
            gold_answer(answer)
    with pytest.raises(DataError, match="not a number"):
        canonical("#### 18", "eighteen")


def test_a_completion_ends_at_the_first_stop():
    assert cut("#### 18<|im_end|>#### 20\nQuestion: x") == "#### 18"
    assert cut("Question:") == "" and cut("plain") == "plain"


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"flexible"}))
def test_every_gold_answer_of_gsm8k_is_right_by_the_rules_that_read_its_form(real_data, rule):
    rows = [json.loads(line) for line in (real_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    right = sum(RULES[rule](row["answer"], gold_answer(row["answer"])) for row in rows)
    assert len(rows) == 1319
    assert right == (0 if rule.startswith("d1") else 1319)


class TestReward:
    problem = {"question": "?", "answer": "so\n#### 18"}

    @pytest.mark.parametrize(
        ("completion", "score"),
        [
            ("so\n#### 18", 1.1),
            ("#### 17", 0.1),
            ("####18", 1.0),
            ("18", 0.0),
            ("#### 18\n#### 18", 1.0),
            ("x<|im_end|>#### 18", 0.0),
        ],
    )
    def test_rewards_the_number_and_a_little_the_form(self, completion, score):
        reward = build("reward", REWARDS, {"name": "gsm8k"})
        assert reward.score([self.problem], [completion]) == [pytest.approx(score)]
        assert 0 <= score <= reward.highest

    def test_other_rules_and_no_form(self):
        reward = build("reward", REWARDS, {"name": "gsm8k", "rule": "official", "format_weight": 0.0})
        assert reward.score([self.problem] * 2, ["#### 18.0", "#### 18"]) == [0.0, 1.0]
        assert plain(reward)["rule"] == "official"

    def test_the_last_number_anywhere_is_no_reward(self):
        with pytest.raises(ConfigError, match="bare number"):
            build("reward", REWARDS, {"name": "gsm8k", "rule": "flexible"})

    def test_bad_knobs_and_rows_are_named(self):
        with pytest.raises(UnknownChoice, match="did you mean 'canonical'"):
            build("reward", REWARDS, {"name": "gsm8k", "rule": "cannonical"})
        with pytest.raises(ConfigError, match="format_weight"):
            build("reward", REWARDS, {"name": "gsm8k", "format_weight": 0.3})
        with pytest.raises(DataError, match="'answer'"):
            build("reward", REWARDS, {"name": "gsm8k"}).score([{"question": "?"}], ["18"])
