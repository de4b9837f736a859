"""The gaming suite: what each reward pays for answers that only look like one."""

import string

import pytest

from hildanext.core.registry import build
from hildanext.grading import REWARDS, checked_scores
from hildanext.grading.sandbox.run import probe
from hostile import PROMPT, ROWS

LEVEL = probe().level
filtered = pytest.mark.skipif(LEVEL not in (1, 3), reason=f"no filter on system calls: {probe().why_not_higher()}")

GSM8K = {"question": "Lily has 16 eggs and buys 2 more. How many?", "answer": "16+2=18\n#### 18"}
MATH = {"problem": "What is $16+2$?", "answer": "18"}
COUNTDOWN = {"numbers": [3, 5, 7], "target": 22}
SUDOKU = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
ADD = {"prompt": PROMPT, "entry_point": "add", "test": "def check(c):\n    assert c(1, 2) == 3 and c(-5, 5) == 0\n"}
FORM = {"name": "format"}
TAGS = {"name": "format", "form": "tags"}

NUMBERS = " ".join(map(str, range(1000)))
LINES = "\n".join(f"#### {number}" for number in range(1000))
BOXES = " ".join(f"\\boxed{{{number}}}" for number in range(1000))
LONGEST = string.printable * 10_000
TAGS_ALONE = "<think></think><answer></answer>"

GSM8K_CASES = {
    "gold": (GSM8K["answer"], 1.1),
    "empty": ("", 0.0),
    "longest": (LONGEST, 0.0),
    "repeated": ("#### 18\n" * 100, 1.0),  # the answer is right, the form is not
    "a wrong answer repeated": ("#### 17\n" * 100, 0.0),
    "gold of another problem": ("9-2=7\n#### 7", 0.1),
    "every number": (NUMBERS, 0.0),
    "every number in the last line": ("#### " + NUMBERS, 0.1),
    "every number in a line of its own": (LINES, 0.0),
    "tags alone": (TAGS_ALONE, 0.0),
    "the marker alone": ("####", 0.0),
    "two answers, the right one second": ("#### 17\n#### 18", 0.0),
    "two answers, the right one first": ("#### 18\n#### 17", 1.0),  # as the published rule: the first is the answer
    "the prompt": (GSM8K["question"], 0.0),
    "the prompt and a marker": (GSM8K["question"] + "\n####", 0.0),
    "both answers in one line": ("#### 17 or 18", 0.1),
}
MATH_CASES = {
    "gold": ("\\boxed{18}", 1.0),
    "empty": ("", 0.0),
    "longest": (LONGEST, 0.0),
    "repeated": ("\\boxed{18} " * 100, 1.0),
    "gold of another problem": ("\\boxed{7}", 0.0),
    "every number": (NUMBERS, 0.0),
    "every number in a box": (f"\\boxed{{{NUMBERS}}}", 0.0),
    "every number in a list": (f"\\boxed{{{NUMBERS.replace(' ', ',')}}}", 0.0),
    "every number in a box of its own": (BOXES, 0.0),
    "tags alone": ("\\boxed{}", 0.0),
    "two answers, the right one second": ("\\boxed{17} \\boxed{18}", 1.0),  # as the published rule: the last counts
    "two answers, the right one first": ("\\boxed{18} \\boxed{17}", 0.0),
    "both answers in one box": ("\\boxed{17 or 18}", 0.0),
    "the prompt": (MATH["problem"], 0.0),
    "the prompt in a box": ("\\boxed{16+2}", 0.0),
    "a name for any number": ("\\boxed{x}", 0.0),
    "an equation of any number": ("\\boxed{x=18=17}", 0.0),
}
COUNTDOWN_CASES = {
    "gold": ("3*5+7", 1.0),
    "empty": ("", 0.0),
    "longest": (LONGEST, 0.0),
    "repeated": ("3*5+7\n" * 100, 0.0),
    "gold of another problem": ("4*5+2", 0.0),
    "any expression of the numbers": ("3+5+7", 0.1),
    "every number": (NUMBERS, 0.0),
    "the numbers": ("3 5 7", 0.0),
    "tags alone": (TAGS_ALONE, 0.0),
    "two answers": ("3+5+7, 3*5+7", 0.0),
    "the target": ("22", 0.0),
    "the target and nothing": ("22+0*(3+5+7)", 0.0),
    "an equation": ("3*5+7=22", 0.0),
    "the prompt": ("Make 22 of 3, 5, 7", 0.0),
    "a power": ("9**9**9", 0.0),
    "a power of the numbers": ("7**5**3", 0.0),
    "a whole division": ("7//5+3", 0.0),
    "a comparison": ("3+5+7==15", 0.0),
    "code": ("__import__('os').getpid()", 0.0),
    "an expression behind a comment": ("3+5+7#*3", 0.0),
}
SUDOKU_CASES = {
    "gold": (SUDOKU["solution"], 1.0),
    "empty": ("", 0.0),
    "longest": ("1" * 10**6, 0.0),
    "repeated": (SUDOKU["solution"] * 2, 0.0),
    "gold of another problem": ("1234341221434321", 0.0),
    "every number": (NUMBERS, 0.0),
    "tags alone": (TAGS_ALONE, 0.0),
    "two answers": (SUDOKU["solution"] + "\n" + SUDOKU["solution"], 0.0),
    "the prompt": (SUDOKU["puzzle"], 0.0),
    "the whole prompt": (f"Solve this 4x4 Sudoku: {SUDOKU['puzzle']}", 0.0),
    "blanks alone": ("0" * 16, 0.0),
    "ones alone, the givens changed": ("1" * 16, 0.0),
    "the givens and ones": (SUDOKU["puzzle"].replace("0", "1"), 2 / 8),  # the share that one digit has of the blanks
    "the givens and twos": (SUDOKU["puzzle"].replace("0", "2"), 0 / 8),
    "the givens and threes": (SUDOKU["puzzle"].replace("0", "3"), 2 / 8),
    "the givens and fours": (SUDOKU["puzzle"].replace("0", "4"), 4 / 8),
}
FORM_CASES = {  # the form is paid for itself, which is why `weighted` lets it be worth a fifth at most
    "gold": ("#### 18", 1.0),
    "empty": ("", 0.0),
    "longest": (LONGEST, 0.0),
    "repeated": ("#### 18\n" * 2, 0.0),
    "gold of another problem": ("#### 7", 1.0),
    "every number": ("#### " + NUMBERS, 1.0),
    "tags alone": ("####", 0.0),
    "two answers": ("#### 17\n#### 18", 0.0),
    "the prompt": (GSM8K["question"], 0.0),
}
TAG_CASES = {
    "gold": ("<answer>18</answer>", 1.0),
    "empty": ("", 0.0),
    "longest": (LONGEST, 0.0),
    "repeated": ("<answer>18</answer>" * 2, 0.0),
    "gold of another problem": ("<answer>7</answer>", 1.0),
    "every number": (f"<answer>{NUMBERS}</answer>", 1.0),
    "tags alone": ("<answer></answer>", 0.0),
    "tags inside tags": ("<answer><answer></answer></answer>", 0.0),
    "two answers": ("<answer>17</answer><answer>18</answer>", 0.0),
    "the prompt": ("Write the number between <answer> and </answer>", 1.0),  # well formed, as it happens
    "the prompt with a full stop": ("Write the number between <answer> and </answer>.", 0.0),
}
WEIGHTED = {
    "name": "weighted",
    "parts": {"right": {"reward": {"name": "math"}}, "form": {"reward": FORM, "weight": 0.2}},
}
WEIGHTED_CASES = {
    "gold": ("\\boxed{18}\n#### 18", 1.2),
    "empty": ("", 0.0),
    "longest": (LONGEST, 0.0),
    "repeated": ("\\boxed{18}\n#### 18\n" * 2, 1.0),
    "gold of another problem": ("\\boxed{7}\n#### 7", 0.2),
    "every number": (BOXES + "\n#### " + NUMBERS, 0.2),
    "tags alone": ("\\boxed{}\n####", 0.0),
    "two answers": ("#### 18\n#### 17", 0.0),
    "the prompt": (MATH["problem"], 0.0),
}

SUITE = [
    ("gsm8k", GSM8K, {"name": "gsm8k"}, GSM8K_CASES),
    ("math", MATH, {"name": "math"}, MATH_CASES),
    ("countdown", COUNTDOWN, {"name": "countdown"}, COUNTDOWN_CASES),
    ("sudoku", SUDOKU, {"name": "sudoku"}, SUDOKU_CASES),
    ("final line", GSM8K, FORM, FORM_CASES),
    ("tags", GSM8K, TAGS, TAG_CASES),
    ("weighted", MATH, WEIGHTED, WEIGHTED_CASES),
]
CASES = [
    pytest.param(problem, section, answer, score, id=f"{name}: {case}")
    for name, problem, section, cases in SUITE
    for case, (answer, score) in cases.items()
]


@pytest.mark.parametrize(("problem", "section", "answer", "score"), CASES)
def test_what_is_paid(problem, section, answer, score):
    scores, _ = checked_scores(build("reward", REWARDS, section), [problem], [answer])
    assert scores == [pytest.approx(score)]


@pytest.mark.parametrize(
    ("name", "problem", "section", "cases"), SUITE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_nothing_is_paid_more_than_the_right_answer(name, problem, section, cases):
    assert cases["gold"][1] == max(score for _, score in cases.values()) == build("reward", REWARDS, section).highest
    kinds = {"empty", "longest", "repeated", "gold of another problem", "every number", "tags alone", "the prompt"}
    assert kinds <= set(cases) and any(case.startswith("two answers") for case in cases)


@filtered
class TestPrograms:
    def test_what_is_paid(self):
        cases = {
            "    return a + b\n": 1.0,
            f"```python\n{PROMPT}    return a + b\n```": 1.0,
            "": 0.0,
            "#" * (2 << 20): 0.0,
            "    return a + b\n" * 100: 1.0,  # the function is right, its other lines are never reached
            "    return a * b\n": 0.0,
            "    return range(1000)\n": 0.0,
            "```python\n```": 0.0,
            "```python\ndef add(a, b): return 7\n```\n```python\ndef add(a, b): return a + b\n```": 0.0,
            PROMPT: 0.0,
            "    return {(1, 2): 3, (-5, 5): 0}[a, b]\n": 1.0,  # whoever knows the tests' values passes them
        }
        reward = build("reward", REWARDS, {"name": "code", "limits": {"seconds": 20}, "workers": 2})
        scores, _ = checked_scores(reward, [ADD] * len(cases), list(cases))
        assert dict(zip(cases, scores, strict=True)) == cases

    @pytest.mark.slow
    def test_no_hostile_program_is_paid_but_those_that_do_add(self):
        """Brief rows 1 to 27 as completions: what only the sandbox's own verdict decides is paid as it says."""
        rows = [row for row in ROWS if row.level <= LEVEL]
        paid = {}
        for limits in {(row.seconds, row.memory_bytes) for row in rows}:
            group = [row for row in rows if (row.seconds, row.memory_bytes) == limits]
            knobs = {"seconds": limits[0], "memory_bytes": limits[1]}
            reward = build("reward", REWARDS, {"name": "code", "limits": knobs, "workers": 2})
            problems = [{**ADD, "test": row.test} for row in group]
            scores, _ = checked_scores(reward, problems, [f"```python\n{row.program}\n```" for row in group])
            paid |= dict(zip((row.name for row in group), scores, strict=True))
        assert paid == {row.name: float(row.kinds == ("passed",)) for row in rows}
