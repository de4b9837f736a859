"""Rewards by their tables of cases, their ranges, and the sum of several."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hildanext.core.config import plain
from hildanext.core.errors import ConfigError, DataError, RewardError, UnknownChoice
from hildanext.core.registry import build
from hildanext.grading import REWARDS, checked_scores, computer_algebra
from hildanext.grading.answer_place import cut_at, read_answer
from hildanext.grading.base import Reward, check_range
from hildanext.grading.countdown import LONGEST, judge, tokens, value
from hildanext.grading.sudoku import grids, keeps, solutions

needs_math_verify = pytest.mark.skipif(
    computer_algebra.installed_version() is None, reason="math-verify is an extra of evaluation"
)


def earned(problem, completion, **section):
    """What one answer earns, its range checked."""
    scores, _ = checked_scores(build("reward", REWARDS, section), [problem], [completion])
    return scores[0]


@pytest.mark.parametrize(
    ("place", "completion", "answer"),
    [
        ("whole", " 3*5+7\n", "3*5+7"),
        ("whole", "3*5+7<|im_end|>then 9", "3*5+7"),
        ("whole", "", None),
        ("marker", "so\n#### 3*5+7\nand more", "3*5+7"),
        ("marker", "####3*5+7", "3*5+7"),
        ("marker", "3*5+7", None),
        ("marker", "#### 1\n#### 2", None),
        ("marker", "####", None),
        ("tags", "so <answer> 3*5+7 </answer>.", "3*5+7"),
        ("tags", "<answer>1</answer><answer>2</answer>", None),
        ("tags", "</answer>1<answer>", None),
        ("tags", "<answer>1", None),
        ("tags", "<answer></answer>", None),
    ],
)
def test_one_answer_is_read_or_none(place, completion, answer):
    assert read_answer(completion, place) == answer


def test_texts_are_cut_at_the_first_end():
    assert cut_at("a</s>b<|eot_id|>c") == "a" and cut_at("ab", ("b", "a")) == ""


COUNTDOWN = {"numbers": [3, 5, 7], "target": 22}
EXPRESSIONS = [  # of 3, 5, 7 for 22, what it earns
    ("3*5+7", 1.0),
    ("7+3*5", 1.0),
    ("(3*5)+7", 1.0),
    (" ( 5 * 3 ) + 7 ", 1.0),
    ("((((7))))+(3*(5))", 1.0),
    ("3*(5+7)", 0.1),
    ("3+5+7", 0.1),
    ("5/3*7", 0.1),
    ("3-5-7", 0.1),
    ("22", 0.0),
    ("3*5+7=22", 0.0),
    ("3*5+7 = 22", 0.0),
    ("3*5+7.", 0.0),
    ("3*5+7.0", 0.0),
    ("15+7", 0.0),
    ("3*5", 0.0),
    ("3*5+7+0", 0.0),
    ("3*5+7+7-7", 0.0),
    ("3**5+7", 0.0),
    ("7//5*3", 0.0),
    ("-3+5*7", 0.0),
    ("3*-5+7", 0.0),
    ("+3*5+7", 0.0),
    ("3*5+7)", 0.0),
    ("(3*5+7", 0.0),
    ("()3*5+7", 0.0),
    ("3(5+7)", 0.0),
    ("(3)(5)+7", 0.0),
    ("3 5 + 7", 0.0),
    ("3+5 7", 0.0),
    ("35*7", 0.0),
    ("3*5+", 0.0),
    ("*", 0.0),
    ("3*5+7 # right", 0.0),
    ("__import__('os')", 0.0),
    ("3*5+\N{FULLWIDTH DIGIT SEVEN}", 0.0),
    ("3\N{MULTIPLICATION SIGN}5+7", 0.0),
    ("3*5\n+7", 0.0),
    ("3*5+7" + " " * LONGEST + "\n", 1.0),
    ("3*" + " " * LONGEST + "5+7", 0.0),
    ("(" * 90 + "3" + ")" * 90 + "*5+7", 1.0),
    ("(" * 100 + "3" + ")" * 100 + "*5+7", 0.0),
    ("9**9**9", 0.0),
]


class TestCountdown:
    @pytest.mark.parametrize(("expression", "score"), EXPRESSIONS, ids=range(len(EXPRESSIONS)))
    def test_what_each_expression_earns(self, expression, score):
        assert earned(COUNTDOWN, expression, name="countdown") == score

    def test_rationals_are_exact(self):
        assert earned({"numbers": [1, 3, 3], "target": 1}, "1/3*3", name="countdown", use="some") == 1.0
        assert earned({"numbers": [3, 3, 8, 8], "target": 24}, "8/(3-8/3)", name="countdown") == 1.0
        large = {"numbers": [10**9, 10**9, 1, 10**9], "target": 1}
        assert earned(large, "1000000000*1000000000+1-1000000000", name="countdown") == 0.1

    @pytest.mark.parametrize("expression", ["7/(5-3-2)", "1/(3-3)"])
    def test_nothing_is_divided_by_zero(self, expression):
        assert value(tokens(expression)) is None
        assert earned({"numbers": [3, 3, 1], "target": 1}, "1/(3-3)", name="countdown") == 0.0

    def test_some_of_the_numbers_if_that_is_the_rule_but_none_twice(self):
        assert judge("3*5", [3, 5, 7], 15, "some") is True and judge("3*5", [3, 5, 7], 15, "all") is None
        assert judge("3*5*3", [3, 5, 7], 45, "some") is None
        assert judge("3*3", [3, 3, 7], 9, "some") is True

    @given(st.recursive(st.integers(0, 99).map(str), lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner)))
    def test_any_tree_has_the_value_that_it_has_as_a_tree(self, tree):
        def written(node):
            return node if isinstance(node, str) else f"({written(node[0])}{node[1]}{written(node[2])})"

        def worth(node):
            if isinstance(node, str):
                return Fraction(int(node))
            left, right = worth(node[0]), worth(node[2])
            if left is None or right is None or (node[1] == "/" and right == 0):
                return None
            return {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else None}[
                node[1]
            ]

        found = tokens(written(tree))
        assert found is None if len(written(tree)) > LONGEST else value(found) == worth(tree)

    @given(st.text("0123456789+-*/() ", max_size=30))
    def test_what_is_read_is_what_python_reads(self, text):
        found = tokens(text)
        made = None if not found else value(found)
        if made is not None:  # "007" is ours alone
            plainly = "".join(str(int(token)) if token.isdigit() else token for token in found)
            assert eval("".join(f"F({t})" if t.isdigit() else t for t in found_of(plainly)), {"F": Fraction}) == made

    @pytest.mark.parametrize("text", ["9" * 10**6, "(" * 10**6, "3*" * 10**6, " " * 10**6, "3*5+7" + " " * 10**6 + "x"])
    def test_a_megabyte_is_refused_at_once(self, text):
        started = time.process_time()
        assert earned(COUNTDOWN, text, name="countdown") == 0.0
        assert time.process_time() - started < 0.05

    def test_bad_rows_and_knobs_are_named(self):
        for row in (
            {},
            {"numbers": [], "target": 3},
            {"numbers": [1] * 11, "target": 3},
            {"numbers": "3,5", "target": 1},
        ):
            with pytest.raises(DataError, match="without 'numbers'"):
                earned(row, "3", name="countdown")
        for row in (
            {"numbers": [3, 2.5], "target": 3},
            {"numbers": [3], "target": True},
            {"numbers": [3], "target": 10**10},
        ):
            with pytest.raises(DataError, match="whole numbers"):
                earned(row, "3", name="countdown")
        with pytest.raises(DataError, match="no signs"):
            earned({"numbers": [-3, 5], "target": 2}, "5-3", name="countdown")
        with pytest.raises(ConfigError, match="legal"):
            build("reward", REWARDS, {"name": "countdown", "legal": 0.5})


def found_of(text):
    return tokens(text) or []


PUZZLE, SOLVED = "3102200002100320", "3142243142131324"


class TestSudoku:
    row = {"puzzle": PUZZLE, "solution": SOLVED}

    def test_there_are_288_grids(self):
        assert len(grids()) == len(set(grids())) == 288 and SOLVED in grids()

    @pytest.mark.parametrize(
        ("answer", "score"),
        [
            (SOLVED, 1.0),
            ("3142\n2431\n4213\n1324\n", 1.0),
            ("3 1 4 2 2 4 3 1 4 2 1 3 1 3 2 4", 1.0),
            (SOLVED[:-1] + "1", 7 / 8),
            (SOLVED[:-1] + "0", 7 / 8),
            (PUZZLE, 0.0),
            ("4" + SOLVED[1:], 0.0),
            ("0" + SOLVED[1:], 0.0),
            (SOLVED + "1", 0.0),
            (SOLVED[:-1], 0.0),
            (SOLVED[:-1] + "5", 0.0),
            (SOLVED[:-1] + "\N{FULLWIDTH DIGIT FOUR}", 0.0),
            ("3142|2431|4213|1324", 0.0),
            ("The grid is " + SOLVED, 0.0),
            ("", 0.0),
        ],
    )
    def test_what_each_grid_earns(self, answer, score):
        assert earned(self.row, answer, name="sudoku") == pytest.approx(score)

    def test_every_solution_counts_unless_one_is_asked_for(self):
        puzzle = "3142" + "0" * 12
        first, second = solutions(puzzle)[:2]
        row = {"puzzle": puzzle, "solution": first}
        assert keeps(second, puzzle) and earned(row, second, name="sudoku") == 1.0
        assert (
            earned(row, second, name="sudoku", solved="given")
            < 1.0
            == earned(row, first, name="sudoku", solved="given")
        )

    def test_bad_rows_are_named(self):
        for puzzle in (None, 31, "31", "5" * 16, SOLVED, "11" + "0" * 14):
            with pytest.raises(DataError, match="can be solved"):
                earned({"puzzle": puzzle}, SOLVED, name="sudoku")
        with pytest.raises(DataError, match="does not solve"):
            earned({"puzzle": PUZZLE, "solution": grids()[0]}, SOLVED, name="sudoku")
        with pytest.raises(DataError, match="does not solve"):
            earned({"puzzle": PUZZLE}, SOLVED, name="sudoku", solved="given")


class TestMath:
    @pytest.mark.parametrize(
        ("completion", "gold", "official", "canonical"),
        [
            (r"so \boxed{\frac{1}{2}}", r"\frac12", 1, 1),
            (r"\boxed{0.5}", r"\frac12", 1, 1),
            (r"\boxed{0.25}", r"\frac14", 0, 1),
            (r"\boxed{1,000}", "1000", 0, 1),
            (r"\boxed{2+2}", "4", 0, 0),
            (r"\boxed{3} no, \boxed{4}", "4", 1, 1),
            (r"\boxed{4} no, \boxed{3}", "4", 0, 0),
            (r"\boxed{}", "4", 0, 0),
            (r"\boxed{4", "4", 0, 0),
            ("The final answer is 4.", "4", 0, 1),
            (r"The final answer is 4. \boxed{5}", "4", 0, 0),
            ("4", "4", 0, 0),
            (r"x<|im_end|>\boxed{4}", "4", 0, 0),
            ("", "4", 0, 0),
        ],
    )
    def test_what_each_answer_earns(self, completion, gold, official, canonical):
        row = {"problem": "?", "answer": gold}
        assert earned(row, completion, name="math", rule="official") == official
        assert earned(row, completion, name="math") == canonical

    def test_gold_is_the_answer_or_what_the_solution_boxes(self):
        assert earned({"solution": r"so \boxed{7}"}, r"\boxed{7}", name="math") == 1.0
        for row, said in [
            ({"problem": "?"}, "without 'answer'"),
            ({"solution": "no box"}, "without 'answer'"),
            ({"answer": "so\n#### 7"}, "GSM8K"),
            ({"answer": " "}, "empty"),
        ]:
            with pytest.raises(DataError, match=said):
                earned(row, r"\boxed{7}", name="math")

    @needs_math_verify
    def test_math_verify_decides_what_the_rule_does_not_and_no_verdict_is_wrong(self):
        reward = build("reward", REWARDS, {"name": "math", "rule": "math_verify"})
        rows = [{"answer": "4"}, {"answer": "x+1"}, {"answer": "4"}, {"answer": "4"}]
        answers = [r"\boxed{2+2}", r"\boxed{1+x}", r"\boxed{5}", "4"]
        assert reward.score(rows, answers) == [1.0, 1.0, 0.0, 0.0]
        reward._algebra.seconds = 1.0
        assert reward.score([{"answer": "4"}], [r"\boxed{10000000000!}"]) == [0.0]
        reward._algebra.seconds = 60.0  # its program starts anew, on a machine that may be busy
        assert reward.score([{"answer": "4"}], [r"\boxed{2+2}"]) == [1.0]

    def test_without_math_verify_its_rule_is_refused(self, monkeypatch):
        monkeypatch.setattr(computer_algebra, "installed_version", lambda: None)
        with pytest.raises(ConfigError, match="pip install math-verify"):
            build("reward", REWARDS, {"name": "math", "rule": "math_verify"})


class TestFormat:
    @pytest.mark.parametrize(
        ("knobs", "completion", "score"),
        [
            ({}, "so\n#### 18", 1),
            ({}, "#### eighteen\n\n", 1),
            ({}, "so\n#### 18<|im_end|>x", 1),
            ({}, "#### 18\nmore", 0),
            ({}, "####18", 0),
            ({}, "####  18", 0),
            ({}, "#### ", 0),
            ({}, "so #### 18", 0),
            ({}, "#### 18\n#### 18", 0),
            ({}, "", 0),
            ({"form": "tags"}, "<answer>18</answer>", 1),
            ({"form": "tags"}, "so <answer>18</answer>\n", 1),
            ({"form": "tags"}, "<answer></answer>", 0),
            ({"form": "tags"}, "<answer> \n</answer>", 0),
            ({"form": "tags"}, "<answer>18</answer> and", 0),
            ({"form": "tags"}, "<answer>18", 0),
            ({"form": "tags"}, "</answer>18<answer>", 0),
            ({"form": "tags"}, "<answer>1</answer><answer>2</answer>", 0),
            ({"form": "tags", "tags": ("think", "answer")}, "<think>x</think>\n<answer>18</answer>", 1),
            ({"form": "tags", "tags": ("think", "answer")}, "<answer>18</answer><think>x</think>", 0),
            ({"form": "tags", "tags": ("think", "answer")}, "<think>x<answer>18</answer></think>", 0),
            ({"form": "tags", "tags": ("think", "answer")}, "<think>x<answer>y</think>18</answer>", 0),
            ({"form": "boxed"}, r"so \boxed{18}.", 1),
            ({"form": "boxed"}, r"\boxed{}", 0),
            ({"form": "boxed"}, r"\boxed{18", 0),
            ({"form": "boxed"}, r"\boxed{1} \boxed{2}", 0),
        ],
    )
    def test_what_each_form_earns(self, knobs, completion, score):
        assert earned({}, completion, name="format", **knobs) == score

    @pytest.mark.parametrize("tags", [(), ("a b",), ("a", "a"), ("",), ("</a>",)])
    def test_tags_are_names(self, tags):
        with pytest.raises(ConfigError, match="give names"):
            build("reward", REWARDS, {"name": "format", "tags": tags})


class Broken(Reward):
    """Gives what it is told to."""

    def __init__(self, *scores):
        self.scores = list(scores)

    def score(self, problems, completions):
        return self.scores


class TestRange:
    @pytest.mark.parametrize(
        ("scores", "said"),
        [
            ((0.5,), "gave 1 scores for 2 answers"),
            ((0.5, float("nan")), "gave nan for answer 1"),
            ((float("inf"), 0.5), "gave inf for answer 0"),
            ((0.5, 1.1), r"1.1 for answer 1, outside its range \[0, 1\]"),
            ((-0.1, 0.5), "outside its range"),
        ],
    )
    def test_a_reward_that_breaks_its_word_is_named(self, scores, said):
        with pytest.raises(RewardError, match=said):
            checked_scores(Broken(*scores), [{}] * 2, ["a", "b"])

    def test_one_that_keeps_it_passes(self):
        assert checked_scores(Broken(None, 1.0), [{}] * 2, ["a", "b"]) == ([None, 1.0], {"reward": [None, 1.0]})
        with pytest.raises(RewardError, match="2 answers to 1 problems"):
            checked_scores(Broken(0.0), [{}], ["a", "b"])

    def test_gsm8k_s_range_is_that_of_its_knobs(self):
        assert build("reward", REWARDS, {"name": "gsm8k"}).highest == 1.1
        assert build("reward", REWARDS, {"name": "gsm8k", "format_weight": 0.0}).highest == 1.0


class TestWeighted:
    section = {
        "name": "weighted",
        "parts": {
            "right": {"reward": {"name": "countdown", "answer": "marker"}, "weight": 2.0},
            "form": {"reward": {"name": "format"}, "weight": 0.25},
        },
    }

    def test_it_is_the_weighted_sum_and_its_parts_are_told(self):
        reward = build("reward", REWARDS, self.section)
        scores, parts = checked_scores(reward, [COUNTDOWN] * 4, ["#### 3*5+7", "#### 3+5+7", "####3*5+7", "#### ?"])
        assert scores == pytest.approx([2.25, 0.45, 2.0, 0.25])
        assert parts == {"right": [1.0, 0.1, 1.0, 0.0], "form": [1.0, 1.0, 0.0, 1.0]}
        assert reward.highest == 2.25 and reward.score([COUNTDOWN], ["#### 3*5+7"]) == [2.25]
        assert build("reward", REWARDS, {"name": "weighted", **plain(reward)}) == reward

    def test_what_one_part_cannot_judge_is_not_judged(self):
        reward = build("reward", REWARDS, self.section)
        assert reward.total({"right": [1.0, None], "form": [1.0, 1.0]}) == [2.25, None]

    def test_a_declared_range_is_checked(self):
        assert build("reward", REWARDS, {**self.section, "at_most": 3.0}).highest == 3.0
        with pytest.raises(ConfigError, match="sum to 2.25, more than at_most 2"):
            build("reward", REWARDS, {**self.section, "at_most": 2.0})

    def test_a_part_out_of_its_range_is_named(self, monkeypatch):
        reward = build("reward", REWARDS, self.section)
        monkeypatch.setattr(REWARDS["format"], "score", lambda self, problems, completions: [7.0])
        with pytest.raises(RewardError, match="part 'form' gave 7.0"):
            reward.score([COUNTDOWN], ["x"])
        with pytest.raises(RewardError, match="gave 1 scores for 2"):
            check_range("x", [1.0], 1.0, 2)

    def test_the_form_is_worth_a_fifth_at_most(self):
        parts = {**self.section["parts"], "form": {"reward": {"name": "format"}, "weight": 0.5}}
        with pytest.raises(ConfigError, match="the form is worth 0.5 beside 2"):
            build("reward", REWARDS, {"name": "weighted", "parts": parts})
        assert build("reward", REWARDS, {"name": "weighted", "parts": {"form": parts["form"]}}).highest == 0.5

    def test_bad_parts_are_named(self):
        with pytest.raises(UnknownChoice, match="part 'a': reward 'maths'"):
            build("reward", REWARDS, {"name": "weighted", "parts": {"a": {"reward": {"name": "maths"}}}})
        for weight in (0, -1, float("inf")):
            with pytest.raises(ConfigError, match="weight"):
                part = {"reward": {"name": "format"}, "weight": weight}
                build("reward", REWARDS, {"name": "weighted", "parts": {"a": part}})
        with pytest.raises(ConfigError, match="parts"):
            build("reward", REWARDS, {"name": "weighted", "parts": {}})
        with pytest.raises(DataError, match="without 'numbers'"):
            build("reward", REWARDS, self.section).check({})


@pytest.mark.parametrize("name", sorted(set(REWARDS) - {"format", "weighted"}))
def test_every_reward_says_what_a_row_lacks(name):
    with pytest.raises(DataError):
        build("reward", REWARDS, {"name": name}).check({"question": "?"})
