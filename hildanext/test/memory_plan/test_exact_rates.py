"""What exact mode is to give, by the card of its adapters and what rows cost: the published numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from hildanext.cli import main
from hildanext.core.config import read_json
from hildanext.core.runtime import RuntimeConfig
from hildanext.decoding.exact.costs import _place
from hildanext.memory_plan.architecture import find_architecture
from hildanext.memory_plan.exact_rates import expected
from hildanext.models.draft_card import DraftCard, draft_card_text

RIGHT = (0.655, 0.366, 0.19, 0.087)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which nothing was measured."""
    monkeypatch.setattr("hildanext.decoding.exact.costs.models_folder", lambda: tmp_path / "cache" / "models")
    return tmp_path


def card(**changes: Any) -> DraftCard:
    return DraftCard(**{"parent": "smollm2-135m", "parent_hash": "0" * 64, "places": 4, "acceptance": RIGHT, **changes})


def by_device(told: DraftCard) -> dict[str, dict[str, Any]]:
    lines = expected(told, find_architecture(told.parent), RuntimeConfig(device="cpu", dtype="fp32", threads=1))
    return {line.record()["device"]: line.record() for line in lines}


def test_the_declared_rates_give_the_numbers_of_the_published_table() -> None:
    """EX-5: two drafts behind every point are best in torch and on the card, one behind each with 8 bits."""
    lines = by_device(card())
    torch, card_1080 = lines["torch bf16, CPU"], lines["GTX 1080"]
    for line, times in ((torch, 1.68), (card_1080, 1.74)):
        assert (line["drafts"], line["points"]) == (2, [0, 1, 2])
        assert line["times_parent"] == pytest.approx(times, abs=5e-3)
        assert line["tokens_per_forward"] == pytest.approx(2.021, abs=5e-4)
        assert 3 < line["rows_per_forward"] <= 9
    assert torch["tokens_per_second"] == pytest.approx(torch["times_parent"] / 0.026)
    assert lines["8 bits, two cores"]["times_parent"] == pytest.approx(1.26, abs=0.02)
    assert lines["8 bits, one core"]["times_parent"] >= 1.18 - 5e-3


def test_times_of_another_model_are_not_made_up() -> None:
    assert by_device(card(parent="qwen3-0.6b"))["torch bf16, CPU"]["tokens_per_second"] is None
    small, large = (
        by_device(card(parent=name))["GTX 1080"]["tokens_per_second"] for name in ("smollm2-135m", "qwen3-0.6b")
    )
    assert 3 < small / large < 6, "the weights are read once a forward"


def test_drafts_that_are_never_right_leave_the_parent_alone() -> None:
    for line in by_device(card(acceptance=(0.0, 0.0, 0.0, 0.0))).values():
        assert (line["drafts"], line["times_parent"], line["rows_per_forward"]) == (0, 1.0, 1.0)


def test_what_exact_mode_measured_here_comes_first(home: Path) -> None:
    shape = find_architecture("smollm2-135m")
    config = type("Config", (), {
        "hidden_size": shape.hidden, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocab,
    })  # fmt: skip
    runtime = RuntimeConfig(device="cpu", dtype="fp32", threads=1).resolve()
    path = _place(config, runtime, card().costs)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"seconds": {"1": 0.05, "9": 0.05, "32": 5.0}}))
    name, line = next(iter(by_device(card()).items()))
    assert name == "here: float32 on cpu, 1 threads" and line["drafts"] == 2
    assert line["tokens_per_second"] == pytest.approx(2.021 / 0.05, abs=0.02)
    assert "here" not in next(iter(by_device(card(enter=15)))), "other adapters cost something else"


def test_the_verb_tells_it_of_a_folder_of_adapters(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = home / "drafts"
    folder.mkdir()
    (folder / "hilda.json").write_text(draft_card_text(card()))
    assert main(["plan", "--model", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "66, 37, 19, 9 %" in shown and "GTX 1080" in shown and "1.74" in shown
    assert main(["plan", "--model", str(folder), "--json", "--out", str(home / "out")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == read_json(home / "out" / "plan.json") and told["exact"][-1]["device"] == "GTX 1080"
    (folder / "hilda.json").write_text(draft_card_text(card(acceptance=())))
    assert main(["plan", "--model", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "no acceptance" in said and said.count("\n") == 1
