"""Pictures of an alignment: drawn from its lines, and from lines that lack something."""

from pathlib import Path

import pytest

from hildanext.core.plots import save
from hildanext.core.rl_plots import accuracies_figure, is_rl, reward_figure, time_figure
from hildanext.core.training_plots import training_plots
from rl_lines import evaluation, rl_lines

NAMES = ["reward", "policy", "answers", "distance", "time_split"]


def test_an_alignment_has_its_own_pictures(tmp_path: Path):
    files = training_plots(rl_lines(), tmp_path)
    assert [file.stem for file in files] == NAMES
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_line_and_an_evaluation_are_enough(tmp_path: Path):
    assert [file.stem for file in training_plots(rl_lines(1), tmp_path)] == NAMES


@pytest.mark.parametrize(
    "field", ["entropy", "tokens_per_forward", "losses", "seconds_update", "reward_parts", "unique"]
)
def test_a_field_that_is_not_there_is_left_out(tmp_path: Path, field: str):
    lines = [{name: value for name, value in line.items() if name != field} for line in rl_lines(12)]
    lines += [{**lines[1], "step": 13, field: None}] if field != "reward_parts" else []
    missing = {"entropy": {"policy"}, "losses": {"distance"}, "seconds_update": {"time_split"}}.get(field, set())
    assert {file.stem for file in training_plots(lines, tmp_path)} == set(NAMES) - missing


def test_rounds_without_anything_to_learn_are_drawn(tmp_path: Path):
    lines = [{**line, "losses": {}, "gradient_norm": 0.0, "reward": 0.0, "solved": 0.0} for line in rl_lines(4)]
    assert [file.stem for file in training_plots(lines, tmp_path)] == ["reward", "policy", "answers", "time_split"]


def test_what_the_reward_picture_shows():
    figure = reward_figure(rl_lines())
    assert figure is not None
    above, below = figure.axes
    assert {text.get_text() for text in above.get_legend().get_texts()} == {"reward", "part: right", "part: form"}
    labels = below.get_legend_handles_labels()[1]
    assert {"held out, greedy", "held out, sampled", "held out, pass@8"} <= set(labels)
    assert below.get_xlabel() == "steps of the optimiser"


def test_the_shares_of_time_are_of_all_seconds():
    figure = time_figure(rl_lines(8))
    assert figure is not None
    shares = [int(text.get_text().split(", ")[1].removesuffix(" %")) for text in figure.legends[0].get_texts()]
    assert 98 <= sum(shares) <= 102 and shares[3] == max(shares)


def test_other_lines_are_no_alignment():
    assert not is_rl([{"kind": "train", "step": 1, "tokens": 5, "loss": 2.0}, evaluation(1, 0.5)])
    assert not is_rl([])


def test_several_alignments_beside_one_another(tmp_path: Path):
    figure = accuracies_figure({"espo": rl_lines(20), "agrpo": rl_lines(30)})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["espo", "agrpo"]
    assert save(figure, tmp_path / "both.png").is_file()
