"""Does a program do what a test asks? Completions made into programs, verdicts into rewards.

Problems are HumanEval's rows: `prompt` (imports, perhaps helper functions, a signature and a docstring), `entry_point`,
`test` (defines `check(candidate)`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.grading.answer_place import cut_at
from hildanext.grading.base import Reward, Scores
from hildanext.grading.sandbox.limits import Job, Limits, Verdict
from hildanext.grading.sandbox.run import Sandbox

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where the body of a function has ended: lm-evaluation-harness's stops for HumanEval."""

FENCE = "```"
_OPENING = re.compile(r"```(?:python3?|py)[ \t]*\r?\n", re.IGNORECASE)


def cut_at_stops(completion: str, stops: Sequence[str] = STOPS) -> str:
    """The completion up to the first stop, which is left out."""
    return cut_at(completion, stops)


def defines(code: str, name: str) -> bool:
    return re.search(rf"^[ \t]*def[ \t]+{re.escape(name)}\b", code, re.MULTILINE) is not None


def code_block(completion: str, entry_point: str) -> str | None:
    """The first ```python block; else the first block without a language, if it defines the function; else None.

    A block that was never closed goes to the end.
    """
    opening = _OPENING.search(completion)
    if opening:
        return completion[opening.end() :].partition(FENCE)[0]
    _, fence, rest = completion.partition(FENCE + "\n")
    block = rest.partition(FENCE)[0]
    return block if fence and defines(block, entry_point) else None


def assemble(problem: Mapping[str, Any], completion: str) -> str:
    """The program that a completion stands for.

    A block that defines the function follows what the prompt says before it (imports and helpers); any other block
    continues the prompt. Without a block the completion itself does, up to the first stop or fence.

    Differs: human-eval appends the completion as it is.
    """
    prompt, name = problem["prompt"], problem["entry_point"]
    block = code_block(completion, name)
    if block is None:
        return str(prompt + cut_at_stops(completion.partition(FENCE)[0]))
    if not defines(block, name):
        return str(prompt + block)
    signature = re.search(rf"^def[ \t]+{re.escape(name)}\b", prompt, re.MULTILINE)
    return str(prompt[: signature.start()] if signature else prompt) + block


def check_row(problem: Mapping[str, Any]) -> None:
    """Raises `DataError` where a row lacks a field."""
    for field in ("prompt", "entry_point", "test"):
        if not isinstance(problem.get(field), str):
            raise DataError(f"a problem without {field!r}: {sorted(problem)}", "give rows of HumanEval")


def job_for(problem: Mapping[str, Any], completion: str) -> Job:
    """What the sandbox is to do. Raises `DataError` where a row lacks a field."""
    check_row(problem)
    return Job(assemble(problem, completion), problem["entry_point"], problem["test"], setup=problem["prompt"])


def reward_of(verdict: Verdict) -> float | None:
    """1 for a program that passed, 0 for one that did not, nothing where the sandbox itself failed."""
    return None if verdict.kind == "sandbox_error" else float(verdict.passed)


@config
class CodeReward(Reward):
    """1 for a program that passes its test in the sandbox.

    Differs: published code rewards take the program's exit status or output for the verdict, which `sys.exit(0)` earns.
    """

    limits: Limits = Field(default_factory=Limits)
    workers: int | None = Field(default=None, ge=1)
    """Programs at a time; default: one per usable core."""
    allow_unsafe_execution: bool = False
    """Run them where no isolation can be had: generated programs then act as your own user."""

    def check(self, problem: Mapping[str, Any]) -> None:
        """A row has `prompt`, `entry_point` and `test`, all of them text."""
        check_row(problem)

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
        """Raises `SandboxError` where there is no isolation and unsafe execution is not allowed."""
        jobs = [job_for(problem, completion) for problem, completion in zip(problems, completions, strict=True)]
        sandbox = Sandbox(self.limits, self.allow_unsafe_execution)
        return [reward_of(verdict) for verdict in sandbox.run_many(jobs, self.workers)]
