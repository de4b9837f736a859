"""`hildanext runs`: run folders are found, summed up and compared; a wrong folder is said."""

import json

import pytest

from hildanext.cli import main
from hildanext.core.run_dir import open_run
from hildanext.report.compare_runs import differences, find_runs, summarise


def make_run(folder, rate, bounds, kind="convert"):
    open_run(folder, {"profile": "SAFE", kind: {"parent": "tiny", "train": {"rate": rate}}}, seed=3)
    lines = []
    for step, bound in enumerate(bounds, 1):
        lines.append({"kind": "train", "step": step, "tokens": 100 * step, "loss": bound + 0.5})
        lines.append(
            {"kind": "eval", "step": step, "tokens": 100 * step, "block_size": 8, "bound": bound, "bound_se": 0.1}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "a", 0.1, [5.0, 4.0])
    make_run(tmp_path / "deep" / "b", 0.2, [5.0, 4.5, 3.5])
    (tmp_path / "a" / "checkpoint").mkdir()
    return tmp_path


def test_runs_are_found_at_any_depth_with_where_they_ended(runs):
    by_name = {run.folder.name: run for run in find_runs([runs])}
    assert set(by_name) == {"a", "b"}
    assert (by_name["a"].step, by_name["a"].tokens, by_name["a"].loss, by_name["a"].bound) == (2, 200, 4.5, 4.0)
    assert by_name["a"].checkpoint and not by_name["b"].checkpoint
    assert by_name["b"].kind == "convert" and by_name["b"].bound == 3.5


def test_a_run_named_twice_is_listed_once(runs):
    assert len(find_runs([runs, runs / "a"])) == 2


def test_a_run_that_measured_nothing_yet_is_listed(tmp_path):
    open_run(tmp_path / "new", {"profile": "FULL", "sft": {}}, seed=1)
    run = summarise(tmp_path / "new")
    assert (run.kind, run.profile, run.step, run.bound) == ("sft", "FULL", None, None)


def test_only_settings_that_differ_are_compared(runs):
    summaries = sorted(find_runs([runs]), key=lambda run: run.folder.name)
    assert differences(summaries) == {"convert.train.rate": [0.1, 0.2]}


def test_the_verb_lists_compares_and_draws(runs, capsys, tmp_path):
    assert main(["runs", str(runs)]) == 0
    assert "200" in capsys.readouterr().out
    picture = tmp_path / "bounds.png"
    assert main(["runs", str(runs / "a"), str(runs / "deep"), "--compare", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "convert.train.rate" in out and "parent" not in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_holds_what_the_table_shows(runs, capsys):
    assert main(["runs", str(runs), "--json", "--compare"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {run["held_out"]["bound"] for run in printed["runs"]} == {4.0, 3.5}
    assert set(printed["differences"]) == {"convert.train.rate"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "not a folder"),
        (["empty"], "no run in"),
        (["a", "--compare"], "one run cannot be compared"),
        (["a", "--plot", "x.png"], "add --compare"),
        (["broken"], "cannot read"),
    ],
)
def test_what_cannot_be_listed_is_said_in_a_line(runs, capsys, arguments, said):
    (runs / "empty").mkdir()
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{", encoding="utf-8")
    code = main(["runs", str(runs / arguments[0]), *arguments[1:]])
    assert code == 2 and said in capsys.readouterr().err


def test_a_comparison_without_bounds_cannot_be_drawn(tmp_path, capsys):
    for name in "ab":
        open_run(tmp_path / name, {"sft": {}}, seed=1)
    assert main(["runs", str(tmp_path), "--compare", "--plot", str(tmp_path / "x.png")]) == 2
    assert "held-out bound" in capsys.readouterr().err
