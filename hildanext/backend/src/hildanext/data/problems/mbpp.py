"""MBPP's rows: a task in words, and asserts that call the function. Most of the published file is its test set."""

import ast
import builtins
from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import Any, ClassVar

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.data.problems.base import FileProblems, Problem, same_words
from hildanext.data.problems.rows import name_of, text_of

TEST_IDS = range(11, 511)
"""The paper's test split, by `task_id`; 601 to 974 are for training."""


@config
class MbppProblems(FileProblems):
    """Rows with `text` (or `prompt`) and `test_list`; maybe `code`, `test_setup_code`, `test_imports`.

    The prompt shows the asserts, as the paper's does: they alone name the function. The row for the reward is one of
    HumanEval's shape, and the answer is a whole function, in a ```python block or bare.

    Paper: Program Synthesis with Large Language Models, arXiv:2108.07732.
    Differs: the asserts run in a checker apart from the program (docs/sandbox.md).
    """

    reward: ClassVar[str | None] = "code"

    def problem(self, record: Mapping[str, Any], where: str) -> Problem:
        said = text_of(record, "text" if "text" in record else "prompt", where)
        tests = _lines(record, "test_list", where)
        if not tests:
            raise DataError(f"{where} has no 'test_list'", "give rows of MBPP, whose tests are a list of asserts")
        setup = [*_lines(record, "test_imports", where), str(record.get("test_setup_code") or "")]
        test = "\n".join([*setup, "def check(candidate):", *(indent(line, "    ") for line in tests), ""])
        name = entry_point(tests, test, record.get("code"), where)
        row = {"task_id": record.get("task_id"), "prompt": "", "entry_point": name, "test": test}
        prompt = "\n".join([said, "Your code should pass these tests:", *tests, "Write it in a ```python block."])
        code = record.get("code")
        answer = f"```python\n{code}\n```" if isinstance(code, str) else None
        return Problem(name_of(record, where), where, prompt, row, same_words(said), answer)

    def test_set(self, problems: Sequence[Problem]) -> str | None:
        if any(problem.row["task_id"] in TEST_IDS for problem in problems):
            return f"MBPP's task_id {TEST_IDS.start} to {TEST_IDS.stop - 1}"
        return super().test_set(problems)


def _lines(record: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = record.get(name) or []
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise DataError(f"{where}: {name!r} is no list of texts but {value!r:.60}", "give rows of MBPP")
    return value


def entry_point(tests: Sequence[str], test: str, code: Any, where: str) -> str:
    """The function that the tests are about: the first name that they call and that the solution defines, or without
    one, that neither Python nor the set-up does. Raises `DataError` where there is none, or they are no Python."""
    try:
        calls, here = ast.walk(ast.parse("\n".join(tests))), ast.walk(ast.parse(test))
        defined = _defined(ast.walk(ast.parse(code))) if isinstance(code, str) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise DataError(
            f"{where}: its tests or code are no Python ({type(problem).__name__})", "mend the row"
        ) from None
    known = _defined(here) | set(dir(builtins))
    for node in calls:
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        if name is not None and (name not in known if defined is None else name in defined):
            return name
    raise DataError(f"{where}: its tests call no function of the answer", "give asserts that call it by its name")


def _defined(nodes: Any) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names
