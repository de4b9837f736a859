"""What a reward is earned on: problems to ask, the rows that judge the answers, and which of them are held out.

To add one: write the file, add its row, add its case. Read `base` (`ProblemSet.split`), then `gsm8k` or `countdown`.
"""

from hildanext.data.problems.arithmetic import ArithmeticProblems
from hildanext.data.problems.base import Problem, ProblemSet, Split
from hildanext.data.problems.competition_math import MathProblems
from hildanext.data.problems.countdown import CountdownProblems
from hildanext.data.problems.countdown_files import CountdownFiles
from hildanext.data.problems.gsm8k import Gsm8kProblems
from hildanext.data.problems.humaneval import HumanEvalProblems
from hildanext.data.problems.jsonl import JsonlProblems
from hildanext.data.problems.mbpp import MbppProblems
from hildanext.data.problems.sudoku import SudokuProblems
from hildanext.data.problems.sudoku_files import SudokuFiles

PROBLEMS: dict[str, type[ProblemSet]] = {
    "gsm8k": Gsm8kProblems,
    "math": MathProblems,
    "humaneval": HumanEvalProblems,
    "mbpp": MbppProblems,
    "countdown": CountdownProblems,
    "countdown_files": CountdownFiles,
    "sudoku": SudokuProblems,
    "sudoku_files": SudokuFiles,
    "arithmetic": ArithmeticProblems,
    "jsonl": JsonlProblems,
}

__all__ = ["PROBLEMS", "Problem", "ProblemSet", "Split"]
