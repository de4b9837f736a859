"""Benchmarks that judge answers, for a diffusion model and its parent alike.

To add one: write the file, add its row, add its case.
"""

from hildanext.eval.tasks.base import ScoringTask, Task, WritingTask
from hildanext.eval.tasks.gsm8k import Gsm8k
from hildanext.eval.tasks.humaneval import HumanEval
from hildanext.eval.tasks.math500 import Math500
from hildanext.eval.tasks.multiple_choice import MultipleChoice
from hildanext.eval.tasks.tinystories import TinyStories

TASKS: dict[str, type[Task]] = {
    "gsm8k": Gsm8k,
    "humaneval": HumanEval,
    "math500": Math500,
    "tinystories": TinyStories,
    "multiple_choice": MultipleChoice,
}

__all__ = ["TASKS", "ScoringTask", "Task", "WritingTask"]
