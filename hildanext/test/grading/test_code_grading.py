"""Code rewards and HumanEval: completions made into programs, verdicts into rewards, and the whole data set."""

import gzip
import json

import pytest

from hildanext.core.config import validate
from hildanext.core.errors import ConfigError, DataError, SandboxError
from hildanext.core.registry import build
from hildanext.core.statistics import pass_at_k
from hildanext.eval.tasks.humaneval import HumanEval
from hildanext.grading import REWARDS
from hildanext.grading.code import assemble, code_block, cut_at_stops, job_for, reward_of
from hildanext.grading.sandbox import levels, run
from hildanext.grading.sandbox.levels import Isolation
from hildanext.grading.sandbox.limits import Limits, Verdict
from hildanext.grading.sandbox.run import Sandbox, probe

isolated = pytest.mark.skipif(probe().level == 0, reason=f"no isolation here: {probe().why_not_higher()}")

PROMPT = '''from typing import List

def double(x):
    """Twice x."""
    return 2 * x

def quadruple(values: List[int]) -> List[int]:
    """Four times each.
    >>> quadruple([1])
    [4]
    """
'''
PROBLEM = {
    "task_id": "Own/0",
    "prompt": PROMPT,
    "entry_point": "quadruple",
    "test": (
        "def check(candidate):\n"
        "    assert candidate([1, 2]) == [double(double(1)), 8]\n    assert candidate([]) == []\n"
    ),
}
RIGHT = "    return [double(double(x)) for x in values]\n"
WHOLE = "def quadruple(values: List[int]):\n" + RIGHT


class TestAssembly:
    @pytest.mark.parametrize("stop", ["\nclass A:", "\ndef f():", "\n# done", "\nif __name__", "\nprint(1)"])
    def test_a_completion_ends_at_the_first_stop(self, stop):
        assert cut_at_stops(RIGHT + stop + "\nclass B") == RIGHT
        assert assemble(PROBLEM, RIGHT + stop) == PROMPT + RIGHT

    def test_a_stop_inside_a_line_is_none(self):
        assert cut_at_stops("    x = 1  # def\n    if x:\n") == "    x = 1  # def\n    if x:\n"

    @pytest.mark.parametrize("language", ["python", "py", "python3", "Python"])
    def test_a_block_with_the_function_follows_imports_and_helpers(self, language):
        program = assemble(PROBLEM, f"Here it is:\n```{language}\n{WHOLE}```\nIt multiplies.\n```python\nprint(1)\n```")
        assert program == PROMPT[: PROMPT.index("def quadruple")] + WHOLE
        assert "Four times" not in program and "from typing" in program

    def test_a_block_without_it_continues_the_prompt(self):
        assert assemble(PROBLEM, f"```python\n{RIGHT}```") == PROMPT + RIGHT

    def test_a_block_that_never_ends_goes_to_the_end(self):
        assert code_block(f"```python\n{WHOLE}", "quadruple") == WHOLE

    def test_a_block_of_no_language_counts_if_it_defines_the_function(self):
        assert code_block(f"So:\n```\n{WHOLE}```", "quadruple") == WHOLE
        assert code_block(f"{RIGHT}```\nThat is all.", "quadruple") is None

    def test_a_completion_that_continues_a_fence_ends_at_the_next(self):
        assert assemble(PROBLEM, f"{RIGHT}```\nThis multiplies.\n```") == PROMPT + RIGHT

    def test_names_are_whole_names(self):
        block = "```python\ndef quadruple_all(x): return x\n```"
        assert assemble(PROBLEM, block).startswith(PROMPT)

    @pytest.mark.parametrize("field", ["prompt", "entry_point", "test"])
    def test_a_row_without_a_field_is_named(self, field):
        with pytest.raises(DataError, match=field):
            job_for({name: value for name, value in PROBLEM.items() if name != field}, RIGHT)


@isolated
class TestReward:
    def test_rewards_what_passes_and_nothing_else(self):
        reward = build("reward", REWARDS, {"name": "code", "limits": {"seconds": 20}, "workers": 2})
        completions = [
            RIGHT,
            "    return [4 * x for x in values]\n",
            f"```python\n{WHOLE}```",
            "    return [3 * x for x in values]\n",
            "    import sys; sys.exit(0)\n",
            "",
            "I cannot do that.",
        ]
        assert reward.score([PROBLEM] * 7, completions) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        assert reward.highest == 1.0

    def test_what_the_sandbox_could_not_judge_is_neither_rewarded_nor_punished(self):
        assert reward_of(Verdict("sandbox_error")) is None
        assert [reward_of(Verdict(kind)) for kind in ("passed", "failed", "timeout", "memory", "crashed")] == [
            1,
            0,
            0,
            0,
            0,
        ]

    def test_redefining_a_helper_does_not_help(self):
        cheat = "    return values\n\n\ndouble = lambda x: x\n"
        program = job_for({**PROBLEM, "prompt": PROMPT}, cheat)
        assert Sandbox(Limits(seconds=20)).run(program).kind == "failed"

    def test_it_refuses_without_isolation(self, monkeypatch):
        monkeypatch.setattr(run, "probe", lambda without=(): Isolation((), {"seccomp": "none here"}))
        with pytest.raises(SandboxError, match="none here"):
            build("reward", REWARDS, {"name": "code"}).score([PROBLEM], [RIGHT])

    def test_knobs_are_strict(self):
        with pytest.raises(ConfigError, match="did you mean 'workers'"):
            build("reward", REWARDS, {"name": "code", "worker": 2})


@pytest.mark.parametrize(
    ("samples", "correct", "k", "value"),
    [
        (10, 3, 1, 0.3),
        (10, 3, 5, 0.9166667),
        (10, 0, 5, 0.0),
        (10, 10, 1, 1.0),
        (5, 1, 5, 1.0),
        (200, 1, 100, 0.5),
        (2, 1, 1, 0.5),
        (10, 6, 5, 1.0),
        (20, 5, 10, 0.9837461),
    ],
)
def test_pass_at_k_of_the_paper(samples, correct, k, value):
    assert pass_at_k(samples, correct, k) == pytest.approx(value, abs=1e-7)


@pytest.fixture
def humaneval(real_data):
    file = real_data / "humaneval" / "HumanEval.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no HumanEval at {file}")
    return file


def rows(file):
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@isolated
class TestHumanEval:
    def task(self, file, **knobs):
        return validate(HumanEval, {"data": str(file), "limits": {"seconds": 20}, **knobs}, where="task")

    def test_helpers_of_the_prompt_run_with_the_tests(self, humaneval):
        """Three tests call helpers that only the prompt defines, one calls the function by its name."""
        chosen = [row for row in rows(humaneval) if row["task_id"].split("/")[1] in ("32", "33", "38", "50")]
        jobs = [job_for(row, row["canonical_solution"]) for row in chosen]
        verdicts = Sandbox(Limits(seconds=20)).run_many(jobs)
        assert len(verdicts) == 4 and all(verdict.passed for verdict in verdicts), verdicts

    @pytest.mark.slow
    def test_all_164_canonical_solutions_pass_through_the_stub(self, humaneval):
        problems = rows(humaneval)
        jobs = [job_for(row, row["canonical_solution"]) for row in problems]
        verdicts = Sandbox(Limits(seconds=20)).run_many(jobs)
        failed = {row["task_id"]: v for row, v in zip(problems, verdicts, strict=True) if not v.passed}
        assert len(problems) == 164 and failed == {}

    @pytest.mark.slow
    def test_no_canonical_solution_passes_another_s_test(self, humaneval):
        problems = rows(humaneval)
        jobs = []
        for row, other in zip(problems, problems[1:] + problems[:1], strict=True):
            alias = f"\n{row['entry_point']} = {other['entry_point']}\n"
            program = other["prompt"] + other["canonical_solution"] + alias
            jobs.append(
                job_for({**row, "prompt": row["prompt"]}, f"```python\ndef {row['entry_point']}(): pass\n{program}```")
            )
        assert not [v for v in Sandbox(Limits(seconds=20)).run_many(jobs) if v.passed]

    def test_a_sample_is_judged_and_told_about(self, humaneval):
        task = self.task(humaneval)
        item = task.items(limit=1)[0]
        right = task.judge(item, item.record["canonical_solution"])
        wrong = task.judge(item, "    return None\n")
        assert right.scores == {"pass@1": 1.0} and right.extraction["verdict"] == "passed"
        assert wrong.scores == {"pass@1": 0.0} and wrong.extraction["verdict"] == "failed"
        assert task.details([{"extraction": right.extraction}, {"extraction": wrong.extraction}]) == {
            "failed": 1.0,
            "passed": 1.0,
        }
        assert item.id == "HumanEval/0" and task.prompt(item, 0) == item.record["prompt"]
        assert "level" in task.facts()["sandbox"]

    def test_pass_at_k_for_every_k_that_there_are_samples_for(self, humaneval):
        task = self.task(humaneval, repeats=10, temperature=0.8)
        assert [metric.name for metric in task.metrics] == ["pass@1", "pass@10"]
        samples = [{"scores": {"pass@1": score}} for score in [1.0] * 3 + [0.0] * 7]
        assert task.values(samples) == {"pass@1": (pytest.approx(0.3), 1.0), "pass@10": (1.0, 1.0)}
        unjudged = [{"scores": {"pass@1": None}}, *samples[:9]]
        assert task.values(unjudged) == {"pass@1": (pytest.approx(1 / 3), 1.0)}

    def test_in_chat_the_block_counts_and_nothing_stops_it_early(self, humaneval):
        task = self.task(humaneval, chat=True)
        item = task.items(limit=1)[0]
        answer = f"Sure:\n```python\n{item.record['prompt']}{item.record['canonical_solution']}```\n"
        assert task.stops == () and "Write a solution" in task.prompt(item, 0)
        assert task.judge(item, answer).scores == {"pass@1": 1.0}

    def test_it_refuses_before_anything_is_written(self, humaneval, monkeypatch):
        monkeypatch.setattr(run, "probe", lambda without=(): Isolation((), dict.fromkeys(levels.MECHANISMS, "gone")))
        with pytest.raises(SandboxError, match="gone"):
            self.task(humaneval).items(limit=1)
        assert len(self.task(humaneval, allow_unsafe_execution=True).items(limit=1)) == 1

    def test_worked_examples_and_bad_rows_are_refused(self, tmp_path, humaneval):
        with pytest.raises(ConfigError, match="worked examples"):
            self.task(humaneval, few_shot=2)
        file = tmp_path / "test.jsonl"
        file.write_text('{"prompt": "def f():", "entry_point": "f"}\n')
        with pytest.raises(DataError, match="'test'"):
            self.task(file).items()
