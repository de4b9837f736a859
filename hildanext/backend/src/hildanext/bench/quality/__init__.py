"""Benchmarks that judge answers, for a diffusion model and its parent alike.

To add one: write the file, add its row, add its case.
"""

from hildanext.bench.quality.base import ScoringTask, Task, WritingTask
from hildanext.bench.quality.gsm8k import Gsm8k
from hildanext.bench.quality.humaneval import HumanEval
from hildanext.bench.quality.math500 import Math500
from hildanext.bench.quality.multiple_choice import MultipleChoice
from hildanext.bench.quality.tinystories import TinyStories

TASKS: dict[str, type[Task]] = {
    "gsm8k": Gsm8k,
    "humaneval": HumanEval,
    "math500": Math500,
    "tinystories": TinyStories,
    "multiple_choice": MultipleChoice,
}

__all__ = ["TASKS", "ScoringTask", "Task", "WritingTask"]
