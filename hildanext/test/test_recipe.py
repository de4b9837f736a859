"""A recipe runs its stages in order, once, and resumes."""

import json
import os
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from hildanext.core.config import config, validate
from hildanext.core.errors import CheckpointError, ConfigError, HildaError, UnknownChoice
from hildanext.core.registry import build
from hildanext.recipe import check, execute, read_recipe


@config
class CookConfig:
    minutes: int = Field(default=3, ge=0)
    fail: bool = False


@pytest.fixture
def kitchen(monkeypatch):
    """Two stages that note what they were asked."""
    module = types.ModuleType("kitchen")
    module.calls = []
    module.broken = False

    def stage(section, context):
        module.calls.append((context.key, section, context))
        if module.broken:
            raise KeyboardInterrupt
        context.stage_dir.mkdir(parents=True, exist_ok=True)
        (context.stage_dir / "meal").write_text(json.dumps(section))
        return {"meal": str(context.stage_dir / "meal")}

    module.stage = stage
    module.check = lambda section, context: validate(CookConfig, section, context.key)
    monkeypatch.setitem(sys.modules, "kitchen", module)
    return module


TABLE = {"cook": "kitchen", "serve": "kitchen"}


def a_run(folder: Path, **more: object) -> dict:
    return {"folder": str(folder), "cook": {"minutes": 5}, "stages": [{"stage": "cook"}, {"stage": "serve"}], **more}


def test_runs_stages_in_order_with_their_sections(tmp_path, kitchen):
    execute(a_run(tmp_path, seed=4), TABLE)
    assert [(key, section) for key, section, _ in kitchen.calls] == [("cook", {"minutes": 5}), ("serve", {})]
    context = kitchen.calls[1][2]
    assert context.seed == 4 and context.outcome("meal").endswith("meal") and list(context.outcomes) == ["cook"]


def test_a_second_run_does_nothing_and_gives_the_same_outcomes(tmp_path, kitchen):
    first = execute(a_run(tmp_path), TABLE)
    assert execute(a_run(tmp_path), TABLE) == first
    assert len(kitchen.calls) == 2


def test_another_process_waits_for_the_first_and_does_only_what_is_done_together(tmp_path, kitchen, monkeypatch):
    """The first process does a stage each time the second one sleeps; which of them calls is told by RANK."""
    shared, ranks, sleeps = types.ModuleType("shared"), [], []
    shared.check, shared.TOGETHER = kitchen.check, True
    note, kitchen.stage = kitchen.stage, lambda *given: (ranks.append(os.environ["RANK"]), note(*given))[1]
    shared.stage = kitchen.stage
    monkeypatch.setitem(sys.modules, "shared", shared)
    table, stages = {"cook": "shared", "serve": "kitchen"}, [{"stage": "cook"}, {"stage": "serve"}]

    def first_process(seconds: float) -> None:
        sleeps.append(seconds)
        monkeypatch.setenv("RANK", "0")
        execute(a_run(tmp_path, stages=stages[: len(sleeps)]), table)
        monkeypatch.setenv("RANK", "1")

    monkeypatch.setattr("hildanext.recipe.time.sleep", first_process)
    monkeypatch.setenv("RANK", "1")
    announced: list[str] = []
    outcomes = execute(a_run(tmp_path), table, lambda step, event: announced.append(event))
    called = [(key, rank) for (key, _, _), rank in zip(kitchen.calls, ranks, strict=True)]
    assert called == [("cook", "1"), ("cook", "0"), ("serve", "0")]
    assert list(outcomes) == ["cook", "serve"] and not announced
    assert execute(a_run(tmp_path), table) == outcomes and len(kitchen.calls) == 3


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path, kitchen):
    execute(a_run(tmp_path, stages=[{"stage": "cook"}]), TABLE)
    kitchen.broken = True
    with pytest.raises(KeyboardInterrupt):
        execute(a_run(tmp_path), TABLE)
    kitchen.broken = False
    execute(a_run(tmp_path), TABLE)
    assert [key for key, _, _ in kitchen.calls] == ["cook", "serve", "serve"]


def test_a_changed_stage_runs_again_with_all_after_it_and_loses_nothing(tmp_path, kitchen):
    execute(a_run(tmp_path), TABLE)
    execute(a_run(tmp_path, cook={"minutes": 6}), TABLE)
    assert [key for key, _, _ in kitchen.calls] == ["cook", "serve", "cook", "serve"]
    kept = [path for path in tmp_path.iterdir() if path.name.startswith("cook.before-")]
    assert len(kept) == 1 and json.loads((kept[0] / "meal").read_text()) == {"minutes": 5}


def test_a_change_after_a_stage_leaves_that_stage_alone(tmp_path, kitchen):
    execute(a_run(tmp_path), TABLE)
    execute(a_run(tmp_path, serve={"minutes": 1}), TABLE)
    assert [key for key, _, _ in kitchen.calls] == ["cook", "serve", "serve"]


def test_a_stage_may_come_twice_under_two_names_with_overrides(tmp_path, kitchen):
    stages = [{"stage": "cook"}, {"stage": "cook", "as": "again", "minutes": 9}]
    execute(a_run(tmp_path, stages=stages), TABLE)
    assert [(key, section) for key, section, _ in kitchen.calls] == [
        ("cook", {"minutes": 5}),
        ("again", {"minutes": 9}),
    ]


def test_everything_is_checked_before_anything_runs(tmp_path, kitchen):
    with pytest.raises(ConfigError, match="unknown key 'minute', did you mean 'minutes'"):
        execute(a_run(tmp_path / "r", serve={"minute": 1}), TABLE)
    assert not kitchen.calls and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "change, word",
    [
        ({"stages": []}, "no stages"),
        ({"stages": ["cook"]}, "write"),
        ({"stages": [{"stage": "cook"}, {"stage": "cook"}]}, "repeat cook"),
        ({"stages": [{"stage": "cook", "as": "../up"}]}, "letters"),
        ({"seed": "one"}, "seed"),
        ({"foldre": "x"}, "unknown key 'foldre', did you mean 'folder'"),
        ({"cook": [1]}, "JSON object"),
        ({"profile": "WILD"}, "profile"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(tmp_path, kitchen, change, word):
    with pytest.raises(HildaError, match=word):
        read_recipe(a_run(tmp_path, **change), TABLE)


@config
class Sous:
    """A research member of the kitchen's family."""

    research: ClassVar[bool] = True
    hours: int = 2


@pytest.fixture
def laboratory(kitchen):
    """The kitchen, whose section names members of a family: built while it is checked, and again while it cooks."""
    note = kitchen.stage

    def built(section, context):
        return [build("oven", {"plain": CookConfig, "sous": Sous}, oven) for oven in section.get("ovens", [])]

    kitchen.check = built
    kitchen.stage = lambda section, context: (built(section, context), note(section, context))[1]
    return kitchen


OVENS = {"ovens": [{"name": "plain"}, {"name": "sous"}]}


def test_a_research_member_is_refused_where_nothing_says_FULL(tmp_path, laboratory):
    with pytest.raises(ConfigError, match='cook: \'sous\' is a FULL method: set "profile": "FULL" to allow it'):
        check(a_run(tmp_path, cook=OVENS), TABLE)
    with pytest.raises(ConfigError, match="cook: 'sous' is a FULL method"):
        execute(a_run(tmp_path / "r", cook=OVENS), TABLE)
    assert not laboratory.calls and not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match="oven: 'sous' is a FULL method"):
        build("oven", {"sous": Sous}, {"name": "sous"})


def test_the_name_of_a_member_means_nothing_elsewhere(tmp_path, laboratory):
    check(a_run(tmp_path, cook={"data": {"sous": "x", "card": "x", "name": "c2dlm"}}), TABLE)


def test_FULL_allows_research_members_and_the_record_of_a_run_names_them(tmp_path, laboratory):
    execute(a_run(tmp_path, profile="FULL", cook=OVENS), TABLE)
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["full"] == ["sous"]
    assert [key for key, _, _ in laboratory.calls] == ["cook", "serve"]
    execute(a_run(tmp_path / "safe"), TABLE)
    assert json.loads((tmp_path / "safe" / "run.json").read_text(encoding="utf-8"))["full"] == []


def test_an_unknown_stage_is_guessed(tmp_path, kitchen):
    with pytest.raises(UnknownChoice, match="did you mean 'cook'"):
        read_recipe(a_run(tmp_path, stages=[{"stage": "cok"}]), TABLE)


def test_check_writes_nothing(tmp_path, kitchen):
    assert [step.key for step in check(a_run(tmp_path / "r"), TABLE)] == ["cook", "serve"]
    assert not (tmp_path / "r").exists() and not kitchen.calls


def test_a_broken_marker_is_an_error_that_says_what_to_do(tmp_path, kitchen):
    execute(a_run(tmp_path), TABLE)
    (tmp_path / "stages" / "cook.done.json").write_text("{")
    with pytest.raises(CheckpointError, match="delete it"):
        execute(a_run(tmp_path), TABLE)


def test_the_run_folder_tells_versions_and_stages(tmp_path, kitchen):
    execute(a_run(tmp_path), TABLE)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["versions"]["torch"] and [step["key"] for step in record["stages"]] == ["cook", "serve"]
