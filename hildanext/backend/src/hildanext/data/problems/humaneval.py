"""HumanEval's rows: a function's head, and a test of it. HumanEval itself is a test set."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hildanext.core.config import config
from hildanext.data.problems.base import FileProblems, Problem, same_words
from hildanext.data.problems.rows import name_of, text_of

INSTRUCTION = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```\n"
)


@config
class HumanEvalProblems(FileProblems):
    """Rows with `prompt`, `entry_point`, `test`. Training on HumanEval is refused unless `allow_test_set` says so; a
    row without a `task_id` is taken for one of it.

    Paper: Evaluating Large Language Models Trained on Code, arXiv:2107.03374.
    """

    reward: ClassVar[str | None] = "code"

    template: str = INSTRUCTION

    def problem(self, record: Mapping[str, Any], where: str) -> Problem:
        prompt, solution = text_of(record, "prompt", where), record.get("canonical_solution")
        answer = f"```python\n{prompt}{solution}\n```" if isinstance(solution, str) else None
        return Problem(name_of(record, where), where, prompt.rstrip(), record, same_words(prompt), answer)

    def test_set(self, problems: Sequence[Problem]) -> str | None:
        if any("task_id" not in problem.row for problem in problems):
            return "a file of HumanEval's rows without task_id"
        return super().test_set(problems)
