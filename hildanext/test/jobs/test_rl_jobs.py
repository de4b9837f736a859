"""An alignment as a job: killed and killed again, it goes on and comes to what one that was never killed comes to."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hildanext.core.metrics_log import read_metrics
from hildanext.grading.rewards import REWARDS
from hildanext.jobs import processes
from hildanext.jobs.service import JobService
from hildanext.recipe import execute
from hildanext.stages import STAGES
from hildanext.stages.submission import check_submission
from rl_toy import LettersReward, toy_section
from training_fixtures import small_checkpoint

COMMAND = f"""import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from rl_toy import LettersReward
from hildanext.cli import main
from hildanext.grading.rewards import REWARDS
REWARDS["letters"] = LettersReward
sys.exit(main(["run", *sys.argv[1:]]))
"""
"""`hildanext run`, with the reward of the tests."""


def what_came_of_it(run: Path) -> tuple[list[Any], list[Any]]:
    """Lines of the steps and evaluations but for clock and memory; and answers with what each earned."""
    lines = [
        {name: value for name, value in line.items() if not any(word in name for word in ("second", "resident"))}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    answers = [json.loads(file.read_text())["answers"] for file in sorted((run / "rollouts").glob("*/*.json"))]
    return lines, answers


def wait(holds: Callable[[], Any], why: Callable[[], str], seconds: float = 600.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, why()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_alignment_that_is_killed_twice_comes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its command once between two steps, and once its worker, which takes the command with it, inside a round."""
    monkeypatch.setitem(REWARDS, "letters", LettersReward)
    model = str(small_checkpoint(tmp_path / "model"))
    section = toy_section(model, rounds=8, updates=2, objective={"name": "espo", "beta": 0.1})
    config = {"threads": 1, "device": "cpu", "dtype": "fp32", "rl": section}
    script = tmp_path / "run.py"
    script.write_text(COMMAND)
    command = (sys.executable, str(script))
    with JobService(tmp_path / "jobs", kinds=STAGES, check=check_submission, command=command, limit=1) as service:
        job = service.submit("rl", config)
        run = job.folder / "rl"

        def alive(column: str) -> bool:
            row = service.store.row(job.id)
            born = row["born" if column == "pid" else "child_born"]
            return row[column] is not None and processes.alive(row[column], born)

        def told() -> str:
            return f"{service.get(job.id)}, log: {service.log(job.id)}"

        try:
            service.start()
            for attempt, (column, there) in enumerate((("child", "state"), ("pid", "rollouts/round-00002")), 1):
                wait(lambda there=there: (run / there).exists() or service.get(job.id).over, told)
                wait(lambda attempt=attempt: service.get(job.id).attempts == attempt and alive("child"), told)
                assert not service.get(job.id).over, told()
                os.kill(service.store.row(job.id)[column], signal.SIGKILL)
            wait(lambda: service.get(job.id).over, told)
            done = service.get(job.id)
            assert done.state == "succeeded" and done.attempts == 3, told()
        finally:
            row = service.store.row(job.id)
            processes.end_group(row["pid"] or -1, row["born"], row["child"], row["child_born"])
        assert done.progress.step == 16 and 0 < done.progress.reward < 1
        execute({**service.recipe("rl", config), "folder": str(tmp_path / "alone")}, STAGES)
        alone = tmp_path / "alone" / "rl"
        assert what_came_of_it(run) == what_came_of_it(alone)
        one, other = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (run, alone))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert set(service.outcomes(job.id)) == {"rl"}
