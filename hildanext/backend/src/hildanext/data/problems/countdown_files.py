"""Countdown out of files, in each of the forms that it is published in."""

from collections.abc import Mapping
from typing import Any, ClassVar

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.data.problems.base import FileProblems, Problem
from hildanext.data.problems.puzzle_texts import countdown_identity, countdown_prompt, expression_of, written
from hildanext.data.problems.rows import name_of
from hildanext.grading.answer_place import Place


@config
class CountdownFiles(FileProblems):
    """Rows with `numbers` (or `nums`) and `target`; d1's `input` "30,100,93" and `output` "23"; or Dream's `input`
    "15,44,79,50", whose last number is the target, and `output` "44-15=29,79-29=50".

    Papers: d1, arXiv:2504.12216; Dream, arXiv:2508.15487 (their files).
    """

    reward: ClassVar[str | None] = "countdown"

    answer: Place = "whole"
    """Where the prompt asks for the answer; the reward's `answer` must be the same."""

    def problem(self, record: Mapping[str, Any], where: str) -> Problem:
        numbers, target, solution = _understood(record, where)
        row = {"numbers": numbers, "target": target}
        prompt = countdown_prompt(numbers, target, self.answer)
        identity = countdown_identity(numbers, target)
        answer = None if solution is None else written(solution, self.answer)
        return Problem(name_of(record, where), where, prompt, row, identity, answer)


def _understood(record: Mapping[str, Any], where: str) -> tuple[list[int], int, str | None]:
    """Numbers, target and a solution, if there is one."""
    if "input" not in record:
        numbers, target = record.get("numbers", record.get("nums")), record.get("target")
        if not isinstance(numbers, list) or not all(type(number) is int for number in [*numbers, target]):
            raise DataError(
                f"{where} has no whole 'numbers' and 'target': {numbers!r:.60}, {target!r:.40}",
                'give {"numbers": [3, 5, 7], "target": 22}, or input and output as d1 or Dream do',
            )
        return list(numbers), int(str(target)), None
    given, output = record["input"], record.get("output")
    try:
        listed = [int(number) for number in str(given).split(",")]
        if isinstance(output, str) and "=" in output:
            return listed[:-1], listed[-1], expression_of(output)
        return listed, int(str(output)), None
    except ValueError:
        raise DataError(
            f"{where}: input {given!r:.60} and output {output!r:.60} are no Countdown",
            'give {"input": "30,100,93", "output": "23"}',
        ) from None
