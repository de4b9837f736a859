"""The stage as a whole: what it leaves, that it goes on as if never stopped, and what it refuses."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hildanext.cli import main
from hildanext.core.config import config, merge
from hildanext.core.errors import ConfigError, DataError, HildaError, RewardError, TrainingStopped
from hildanext.core.metrics_log import read_metrics
from hildanext.grading.rewards import REWARDS
from hildanext.jobs.progress import look
from hildanext.models.loading.load import load_diffusion
from hildanext.rl.desk import Desk
from hildanext.rl.material import Material
from hildanext.rl.plugins import PLUGINS, Plugin, lens
from hildanext.rl.plugins.imitation import Lesson, lessons_of
from hildanext.rl.rollouts.engine import EngineSampler
from hildanext.rl_stage2 import rl
from hildanext.training import _Loop
from rl_toy import LettersReward, toy_section
from training_fixtures import environment, small_checkpoint

AGRPO = {"objective": {"name": "agrpo"}}
KL = {"objective": {"name": "espo", "beta": 0.1, "kl": "k2"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_checkpoint(tmp_path_factory.mktemp("rl") / "model"))


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "letters", LettersReward)


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's steps and validations, without what is measured by a clock or of the process."""
    lines = read_metrics(run / "metrics.jsonl")
    measured = ("second", "resident")
    return [{name: value for name, value in line.items() if not any(w in name for w in measured)} for line in lines]


def texts(run: Path) -> list[Any]:
    files = sorted((run / "rollouts").glob("*/*.json"))
    told = [json.loads(file.read_text())["answers"] for file in files]
    return [
        (file.parent.name, answer["text"], answer["reward"])
        for file, each in zip(files, told, strict=True)
        for answer in each
    ]


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_file(run / "state" / "weights.safetensors") for run in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_leaves_a_checkpoint_every_answer_and_what_was_measured(model: str, tmp_path: Path):
    summary = rl(toy_section(model), tmp_path / "run", quiet=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4] and [line["round"] for line in train] == [0, 1, 2, 3]
    assert all(line["answers"] == 8 and 0 < line["reward"] < 1 and line["entropy"] > 0 for line in train)
    assert all(line["ratio_max"] == 1.0 and line["gradient_norm"] > 0 for line in train)
    evaluated = {line["step"]: line for line in lines if line["kind"] == "eval"}
    assert sorted(evaluated) == [0, 2, 4]
    assert "pass_at_2" in evaluated[0] and "pass_at_2" in evaluated[4] and "pass_at_2" not in evaluated[2]
    assert evaluated[0]["accuracy_low"] <= evaluated[0]["accuracy"] <= evaluated[0]["accuracy_high"]
    assert len(texts(tmp_path / "run")) == 32
    assert summary["whole"] and load_diffusion(summary["checkpoint"])[0].card.block_size == 8
    samples = [line for line in lines if line["kind"] == "sample"]
    assert samples and samples[0]["advantage"] >= samples[-1]["advantage"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["problems"]["train"] + record["problems"]["held_out"] == 40 and record["full"] == []


def test_learning_raises_a_reward_that_can_be_learnt(model: str, tmp_path: Path):
    section = toy_section(model, rounds=24, problems_per_round=4, group=16, measure={"problems": 4, "samples": 0})
    section["rollouts"] = {**section["rollouts"], "slots": 64, "per_step": 8}
    section["train"] = {**section["train"], "batch_size": 4, "learning_rate": {"peak": 3e-2}, "evaluate_every": 100}
    rl(section, tmp_path / "run", quiet=True)
    rewards = [line["reward"] for line in steps(tmp_path / "run") if line["kind"] == "train"]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.15, rewards


@pytest.mark.parametrize(
    "changes",
    [{}, {"updates": 2, **KL}, {"updates": 2, **AGRPO}, {"lora": {"rank": 2, "alpha": 4}, **KL}],
    ids=["espo", "two updates and a KL", "agrpo", "adapters"],
)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(
    model: str, tmp_path: Path, changes: dict[str, Any], stop: int
):
    section = toy_section(model, **changes)
    rl(section, tmp_path / "whole", "FULL", quiet=True)
    rl(merge(section, {"train": {"stop_after": stop}}), tmp_path / "halves", "FULL", quiet=True)
    rl(section, tmp_path / "halves", "FULL", quiet=True)
    assert steps(tmp_path / "halves") == steps(tmp_path / "whole")
    assert texts(tmp_path / "halves") == texts(tmp_path / "whole")
    assert same_weights(tmp_path / "whole", tmp_path / "halves")


class Killed(Exception):
    pass


@pytest.mark.parametrize("where", ["second chunk", "rewards", "between two updates"])
def test_what_a_group_earned_is_never_computed_twice(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """Killed inside a round, it goes on with the answers, the rewards and the old policy's numbers that it has."""
    section = toy_section(
        model, updates=2, train={**toy_section(model)["train"], "checkpoint_every": 100, "evaluate_every": 100}
    )
    rl(section, tmp_path / "whole", quiet=True)
    asked: list[int] = []
    judged: list[int] = []
    sample, score, step = EngineSampler.sample, LettersReward.score, _Loop._step
    limit = {"second chunk": (3, 99, 99), "rewards": (99, 3, 99), "between two updates": (99, 99, 2)}[where]

    def noted(self: Any, prompts: Any, seeds: Any, temperature: Any = None) -> Any:
        if temperature is None and len(prompts) == 4:
            asked.append(seeds[0])
            if len(asked) == limit[0]:
                raise Killed
        return sample(self, prompts, seeds, temperature)

    def scored(self: Any, problems: Any, completions: Any) -> Any:
        if len(completions) == 4 and asked:
            judged.append(hash(tuple(completions)))
            if len(judged) == limit[1]:
                raise Killed
        return score(self, problems, completions)

    def stepped(self: Any) -> Any:
        if self.counters["step"] == limit[2]:
            raise Killed
        return step(self)

    section = merge(section, {"measure": {"samples": 0, "problems": 3}})
    monkeypatch.setattr(EngineSampler, "sample", noted)
    monkeypatch.setattr(LettersReward, "score", scored)
    monkeypatch.setattr(_Loop, "_step", stepped)
    with pytest.raises(Killed):
        rl(section, tmp_path / "killed", quiet=True)
    limit = (99, 99, 99)
    done = list(asked[:-1] if where == "second chunk" else asked)
    asked.clear()
    rl(section, tmp_path / "killed", quiet=True)
    assert not set(done) & set(asked), "a group was asked twice"
    assert len(done) + len(asked) == 8
    assert texts(tmp_path / "killed") == texts(tmp_path / "whole") and same_weights(
        tmp_path / "whole", tmp_path / "killed"
    )


def test_a_state_goes_on_only_under_what_it_was_reached_with(model: str, tmp_path: Path):
    section = toy_section(model, train={**toy_section(model)["train"], "stop_after": 1})
    rl(section, tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="group"):
        rl({**section, "group": 6}, tmp_path / "run", quiet=True)
    rl(merge(section, {"measure": {"problems": 2}}), tmp_path / "run", quiet=True)


def test_shuffled_rewards_teach_other_answers(model: str, tmp_path: Path):
    rl(toy_section(model, rounds=1), tmp_path / "plain", quiet=True)
    rl(toy_section(model, rounds=1, shuffled_rewards=True), tmp_path / "shuffled", quiet=True)
    assert texts(tmp_path / "plain") == texts(tmp_path / "shuffled"), "the answers and what they earn are the same"
    plain, shuffled = (
        next(line for line in steps(tmp_path / run) if line["kind"] == "train") for run in ("plain", "shuffled")
    )
    assert plain["reward"] == pytest.approx(shuffled["reward"]) and plain["gradient_norm"] != shuffled["gradient_norm"]


def test_groups_that_all_earn_the_same_cost_no_forward(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LettersReward, "score", lambda self, problems, completions: [0.5] * len(completions))
    before = load_file(Path(model) / "model.safetensors")
    summary = rl(toy_section(model), tmp_path / "run", quiet=True)
    train = [line for line in steps(tmp_path / "run") if line["kind"] == "train"]
    assert all(line["columns"] == 0 and line["zero_variance"] == 1.0 and line["losses"] == {} for line in train)
    after = load_file(Path(summary["checkpoint"]) / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_answer_that_cannot_be_judged_is_left_out(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    score = LettersReward.score

    def some(self: Any, problems: Any, completions: Any) -> Any:
        return [None if number == 1 else value for number, value in enumerate(score(self, problems, completions))]

    monkeypatch.setattr(LettersReward, "score", some)
    rl(toy_section(model, rounds=1), tmp_path / "run", quiet=True)
    line = next(line for line in steps(tmp_path / "run") if line["kind"] == "train")
    assert line["unjudged"] == 2 and line["gradient_norm"] > 0


def test_a_group_without_one_judged_answer_is_said_once_and_teaches_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(LettersReward, "score", lambda self, problems, completions: [None] * len(completions))
    section = toy_section(model, rounds=2)
    section["problems"] = {**section["problems"], "held_out": 0.0}
    rl(section, tmp_path / "run", quiet=True)
    said = [record.getMessage() for record in caplog.records if "judged" in record.getMessage()]
    assert said == ["2 of 2 problems of round 0 have not one judged answer"]
    lines = [line for line in steps(tmp_path / "run") if line["kind"] == "train"]
    assert [(line["unjudged"], line["gradient_norm"]) for line in lines] == [(8, 0), (8, 0)]


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"group": 1}, ConfigError, "group 1"),
        ({"objective": {"name": "agrpo"}}, ConfigError, "FULL"),
        ({"objective": {"name": "nothing"}}, HildaError, "nothing"),
        ({"objective": {"name": "espo"}, "likelihood": {"name": "trajectory"}}, ConfigError, "FULL|trajectory"),
        ({"reward": {"name": "nothing"}}, HildaError, "nothing"),
        ({"problems": {"name": "arithmetic", "count": 1}}, DataError, "earns nothing"),
        ({"rollouts": {"name": "engine", "max_new_tokens": 4000}}, ConfigError, "max_new_tokens"),
        ({"rollouts": {"name": "engine", "temperature": 0.0}}, ConfigError, "temperature"),
        ({"prompting": "chat"}, ConfigError, "template"),
        ({"lora": {"dropout": 0.1}}, ConfigError, "dropout"),
        ({"train": {"accumulate": 2}}, ConfigError, "accumulate"),
        ({"unknown": 1}, ConfigError, "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_is_one_line(model: str, tmp_path: Path, changes: dict[str, Any], error: Any, words: str):
    with pytest.raises(error, match=words) as problem:
        rl({**toy_section(model), **changes}, tmp_path / "run", quiet=True)
    assert "\n" not in problem.value.line()


@pytest.mark.parametrize(
    "scores, words", [([float("nan")] * 4, "nan"), ([1.5] * 4, "range"), ([0.5] * 3, "3 scores for 4")]
)
def test_a_reward_that_is_wrong_stops_the_run_and_keeps_the_answers(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], words: str
):
    monkeypatch.setattr(LettersReward, "score", lambda self, problems, completions: scores)
    section = toy_section(model)
    section["problems"] = {**section["problems"], "held_out": 0.0}
    with pytest.raises(RewardError, match=words):
        rl(section, tmp_path / "run", quiet=True)
    assert list((tmp_path / "run" / "rollouts").glob("*/*.safetensors"))


def test_a_round_without_one_whole_answer_stops_the_run(model: str, tmp_path: Path):
    section = toy_section(model)
    section["rollouts"] = {**section["rollouts"], "seconds": 1e-6}
    section["problems"] = {**section["problems"], "held_out": 0.0}
    with pytest.raises(TrainingStopped, match="not one of the 8 answers of round 0"):
        rl(section, tmp_path / "run", quiet=True)


def test_weights_that_are_no_numbers_stop_it(model: str, tmp_path: Path):
    section = toy_section(model)
    section["train"] = {**section["train"], "learning_rate": {"peak": 1e30}, "checkpoint_every": 1}
    with pytest.raises(HildaError) as problem:
        rl(section, tmp_path / "run", quiet=True)
    assert isinstance(problem.value, TrainingStopped) or "finite" in str(problem.value) or "NaN" in str(problem.value)


def test_the_verb_aligns_and_says_what_is_next(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    section = toy_section(model, rounds=1)
    (tmp_path / "run.json").write_text(json.dumps({"rl": section}))
    assert main(["rl", "--config", str(tmp_path / "run.json"), "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint" in shown and "next: hildanext" in shown and (tmp_path / "run" / "report.html").is_file()


def test_espo_over_mean_field_is_allowed_and_said(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    section = toy_section(model, rounds=1, likelihood={"name": "mean_field"})
    rl(section, tmp_path / "run", "FULL", quiet=True)
    assert "neither log p nor a bound" in caplog.text


def test_a_job_tells_its_reward_and_what_is_left(model: str, tmp_path: Path):
    (tmp_path / "job.json").write_text(json.dumps({"stages": [{"stage": "rl"}]}))
    rl(toy_section(model, train={**toy_section(model)["train"], "stop_after": 3}), tmp_path / "rl", quiet=True)
    events, progress = look(tmp_path, {})
    assert (progress.stage, progress.step, progress.done, progress.total, progress.unit) == ("rl", 3, 3, 4, "step")
    assert 0 < progress.reward < 1 and progress.eta_seconds >= 0
    assert any(kind == "metric" and data.get("accuracy") is not None for kind, data in events)


def start(section: dict[str, Any], folder: Path) -> "subprocess.Popen[bytes]":
    (folder / "section.json").write_text(json.dumps(section))
    script = Path(__file__).with_name("rl_toy.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(folder / "section.json"), str(folder / "run")], env=environment()
    )


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_answers_and_weights(model: str, tmp_path: Path):
    section = toy_section(model, rounds=12, updates=2, **KL)
    rl(section, tmp_path / "whole", "FULL", quiet=True)
    draw, kills = random.Random(0), 0
    folder = tmp_path / "killed"
    folder.mkdir()
    while kills < 20:
        process = start(section, folder)
        try:
            process.wait(timeout=draw.uniform(4.0, 9.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        break
    if process.returncode:
        assert start(section, folder).wait() == 0
    assert kills > 1
    assert steps(folder / "run") == steps(tmp_path / "whole") and texts(folder / "run") == texts(tmp_path / "whole")
    assert same_weights(tmp_path / "whole", folder / "run")


@pytest.mark.slow
def test_two_hundred_steps_take_no_more_memory_than_the_first_ones(model: str, tmp_path: Path):
    section = toy_section(model, rounds=200, measure={"problems": 2, "samples": 0})
    process = start(merge(section, {"train": {"checkpoint_every": 20, "evaluate_every": 50}}), tmp_path)
    resident: list[tuple[int, int]] = []
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.2)
        if metrics.is_file():
            status = Path(f"/proc/{process.pid}/status")
            if status.is_file() and "VmRSS" in (said := status.read_text()):
                done = metrics.read_text().count('"kind": "train"')
                resident.append((done, int(said.split("VmRSS:")[1].split()[0])))
    assert process.returncode == 0
    early = [size for done, size in resident if 20 <= done <= 60]
    late = [size for done, size in resident if 150 <= done < 200]  # the pictures at the end load matplotlib
    assert max(late) < 1.05 * max(early), (max(early), max(late))


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_with_twice_the_problems(model: str, tmp_path: Path):
    """Tolerance 1e-5 relative: the gradients are summed in another order."""
    section = toy_section(model, **KL)
    rl({**section, "problems_per_round": 4}, tmp_path / "one", "FULL", quiet=True)
    (tmp_path / "section.json").write_text(json.dumps(section))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).with_name("rl_toy.py")), str(tmp_path / "section.json"), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    for one, two in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        if one["kind"] == "train":
            for name in ("reward", "loss", "gradient_norm", "zero_variance", "unique", "entropy", "length"):
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), (name, one["step"])
            assert one["answers"] == two["answers"] == 16
    said = [sorted(text for _, text, _ in texts(tmp_path / run)) for run in ("one", "two")]
    assert said[0] == said[1]


@config
class Teaches(Plugin):
    """One lesson a chunk: the first answer, under its own prompt."""

    def more(self, material: Material, desk: Desk) -> Material:
        first = int(material.batch.prompt[0])
        tokens = tuple(material.batch.tokens[0, first : first + material.answers[0].tokens].tolist())
        lesson = Lesson(tuple(material.batch.tokens[0, :first].tolist()), tokens, "", material.answers[0])
        size = desk.policy.model.card.block_size
        return replace(material, lessons=lessons_of([lesson], 0.5, size, desk.policy.end))


def test_a_lesson_teaches_where_groups_do_not_and_never_under_shuffled_rewards(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rewards are all the same, so that the lesson is all there is; editing is measured at the start and at the end."""
    monkeypatch.setitem(PLUGINS, "teaches", Teaches)
    problems = {"name": "arithmetic", "count": 40, "steps": 1, "held_out": 0.3, "held_out_by": "story"}
    measured = {"problems": 4, "samples": 0}
    section = toy_section(model, rounds=2, problems=problems, reward=None, measure=measured)
    rl(section | {"plugins": [{"name": "teaches"}]}, tmp_path / "one", "FULL", quiet=True)
    rl(section | {"plugins": [{"name": "teaches"}], "shuffled_rewards": True}, tmp_path / "dealt", "FULL", quiet=True)
    one, dealt = (steps(tmp_path / name) for name in ("one", "dealt"))
    assert all(line["zero_variance"] == 1.0 for line in (*one, *dealt) if line["kind"] == "train")
    assert all(line["gradient_norm"] > 0 for line in one if line["kind"] == "train")
    assert all(line["gradient_norm"] == 0 for line in dealt if line["kind"] == "train")
    ends = [line for line in one if line["kind"] == "eval"]
    assert 0.0 <= ends[0]["corrected"] <= 1.0 and 0.0 <= ends[-1]["kept"] <= 1.0
    rl(section | {"measure": {**measured, "editing": False}}, tmp_path / "off", quiet=True)
    off = [line for line in steps(tmp_path / "off") if line["kind"] == "eval"]
    assert "kept" not in off[0] and off[0]["right"] == ends[0]["right"]


def test_lens_replays_the_steps_of_purified_answers(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """AGRPO with LENS: every answer to a whole prompt is wrong, every one to a purified prompt right."""
    ones = lambda policy, prompts, parts, generator: [torch.ones(len(one), dtype=torch.float64) for one in prompts]  # noqa: E731
    monkeypatch.setattr(lens, "interference", ones)
    monkeypatch.setattr(LettersReward, "score", lambda self, problems, completions: [next(earned) for _ in completions])
    earned = iter([0.0] * 8 + [1.0] * 8 + [0.0] * 8 + [1.0, 1.0, 0.0, 0.0] * 2)
    words = "the small cat and the big dog went to a park with their friends on a very warm day"
    problems = tmp_path / "stories.jsonl"
    problems.write_text(
        "".join(json.dumps({"prompt": f"{name} saw {words}"}) + "\n" for name in ("Lily", "Tom", "Ben"))
    )
    section = toy_section(model, rounds=2, objective={"name": "agrpo", "beta": 0.1}, updates=2, guard=["ratio"])
    section |= {"problems": {"name": "jsonl", "path": str(problems), "held_out": 0.0}, "plugins": [{"name": "lens"}]}
    rl(section, tmp_path / "run", "FULL", quiet=True)
    lines = [line for line in steps(tmp_path / "run") if line["kind"] == "train"]
    assert [(line["lens_low"], line["lens_purified"], line["lens_replaced"]) for line in lines[::2]] == [
        (2, 2, 8),
        (2, 2, 4),
    ]
    assert lines[0]["gradient_norm"] == 0, "all of both groups are right now"
    assert lines[2]["gradient_norm"] > 0 and lines[2]["ratio_max"] < 1.001
