"""Pictures of runs: every one that the metrics have the fields for, and no number that is not there."""

import subprocess
import sys
from pathlib import Path

import pytest

from hildanext.core import plots
from hildanext.core.training_plots import training_plots
from training_fixtures import metric_lines


def test_every_picture_is_a_png(tmp_path):
    files = training_plots(metric_lines(), tmp_path / "plots")
    assert [file.stem for file in files] == ["loss", "losses", "masked_accuracy", "learning_rate", "throughput"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000
        assert plots.data_uri(file).startswith("data:image/png;base64,")


def test_phases_touch_without_gaps():
    spans = plots.phase_spans(metric_lines())
    assert [phase for _, _, phase in spans] == ["warmup", "stable", "decay"]
    assert spans[0][0] == 0 and spans[-1][1] == 4000
    assert all(before[1] == after[0] for before, after in zip(spans, spans[1:], strict=False))


def test_the_loss_picture_shows_phases_blocks_and_held_out_bounds():
    figure = plots.loss_figure(metric_lines())
    axes, twin = figure.axes
    assert {text.get_text() for text in axes.texts} == {"warmup", "stable", "decay"}
    assert [tick.get_text() for tick in twin.get_yticklabels()] == ["1", "4", "16", "64"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["training loss (smoothed)", "held out, block 16"]


def test_a_bucket_without_tokens_is_no_point():
    (axes,) = plots.accuracy_figure(metric_lines()).axes
    lengths = {line.get_label(): len(line.get_xdata()) for line in axes.lines}
    assert lengths == {"t in 0.00-0.25": 40, "t in 0.25-0.50": 0, "t in 0.75-1.00": 40}


@pytest.mark.parametrize("lines", [[], [{"kind": "eval", "step": 1, "tokens": 5, "block_size": 4, "bound": 1.0}]])
def test_a_run_that_never_trained_has_no_pictures(tmp_path, lines):
    assert training_plots(lines, tmp_path) == []


def test_one_step_is_enough(tmp_path):
    assert len(training_plots(metric_lines(1), tmp_path)) == 5


def test_smoothing_keeps_constants_length_and_ends():
    assert plots.smoothed([]) == []
    assert plots.smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    assert plots.smoothed([float(i) for i in range(100)]) == pytest.approx([float(i) for i in range(100)])


def test_runs_are_compared_by_block_size_with_levels():
    figure = plots.comparison_figure({"a": metric_lines(), "b": metric_lines(20)}, levels={"parent": 2.39})
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"a, block 16", "b, block 16", "parent: 2.39"}
    assert plots.comparison_figure({"a": metric_lines()}, field="loss").axes


def test_bars_write_their_values():
    (axes,) = plots.bars_figure({"x": 1.234, "y": 5085.2}, "nats", "t", {"x": 0.05, "y": float("nan")}).axes
    assert [text.get_text() for text in axes.texts] == ["1.23 ± 0.05", "5,085"]


def test_importing_plots_loads_no_matplotlib():
    check = "import sys, hildanext.core.plots; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", check], env=environment, check=False).returncode == 0


def test_drafts_are_drawn_by_their_place_over_masks(tmp_path: Path):
    lines: list[dict] = []
    for step in range(1, 21):
        losses = {"place_1": 3 - step / 20, "place_2": 4 - step / 20}
        counted = {"step": step, "tokens": 50 * step, "mask_positions": 30 * step, "loss": 3.0, "losses": losses}
        lines.append({"kind": "train", "phase": "stable", "block_size": 2, "accuracy_by_place": {"1": 0.5}, **counted})
        lines.append({"kind": "eval", **counted, "tokens_per_forward": 1 + step / 40})
    figure = plots.drafts_figure(lines)
    assert figure is not None
    above, below = figure.axes
    assert [line.get_label() for line in above.get_lines()] == ["place 1", "place 2"]
    assert list(below.get_lines()[0].get_xdata())[-1] == 600 and below.get_xlabel() == "masks learnt from"
    assert plots.parts_figure(lines) is None, "they are not drawn twice"
    names = [path.stem for path in training_plots(lines, tmp_path)]
    assert "drafts" in names and "masked_accuracy" not in names
    assert plots.drafts_figure(metric_lines()) is None
