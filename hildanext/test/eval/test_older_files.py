"""Files that an earlier version wrote (`older_files`): cards, evaluations, samples and traces are read as before."""

import json
import shutil
from pathlib import Path

import pytest

from hildanext.ar import Parent
from hildanext.core.runtime import RuntimeConfig
from hildanext.eval import models
from hildanext.eval.evaluation import print_result
from hildanext.eval.identity import weights_hash
from hildanext.eval.runner import QualityConfig, run_tasks
from hildanext.eval.summary import mask_tokens, summarise
from hildanext.eval.task_session import open_pair, print_tasks
from hildanext.models.card import read_card
from hildanext.report.html import write_report

OLDER = Path(__file__).parents[1] / "older_files"


def test_a_card_of_before_is_read():
    card = read_card(OLDER)
    assert (card.mask_id, card.shift, card.block_size, card.alignment) == (2047, "left", 8, "parent")


def test_results_of_before_are_shown_as_they_were(capsys):
    print_result(json.loads((OLDER / "eval.json").read_text()))
    tasks = json.loads((OLDER / "quality.json").read_text())
    print_tasks(tasks)
    shown = capsys.readouterr().out
    for words in ("AR parent", "diffusion, block 4", "S_MODE (speed)", "one per step", "gsm8k (4)", "strict"):
        assert words in shown
    assert mask_tokens(tasks) == 0


def test_a_report_is_made_from_results_and_samples_of_before(tmp_path):
    outcomes = {
        "eval": {"results": str(OLDER / "eval.json"), "tasks": str(OLDER / "quality.json")},
        "generate": {"samples": str(OLDER / "samples.json")},
    }
    page = write_report(tmp_path, outcomes, "of before").read_text(encoding="utf-8")
    for words in ("S_MODE (speed)", "gsm8k (4)", "Once", "Step by step (3 forwards)"):
        assert words in page


def test_samples_of_before_are_gone_on_with_and_none_is_made_again(tmp_path, monkeypatch):
    def again(*_: object, **__: object) -> None:
        pytest.fail("a sample was made again")

    shutil.copytree(OLDER / "samples", tmp_path / "samples")
    section = {"data": str(OLDER / "gsm8k"), "few_shot": 1, "max_new_tokens": 16}
    settings = QualityConfig(tasks={"gsm8k": section}, batch_size=2)
    pair, _ = open_pair("tiny", None, RuntimeConfig("cpu", "fp32", 1))
    for name, side in (("ar-parent", pair.parent), ("s-mode-speed", pair.model)):
        head = tmp_path / "samples" / f"gsm8k--{name}.json"
        record = json.loads(head.read_text())
        record["identity"]["weights"] = weights_hash(side.causal_lm)  # the mask's row is computed by this torch
        head.write_text(json.dumps(record))
    monkeypatch.setattr(models, "generate", again)
    monkeypatch.setattr(Parent, "generate_batch", again)
    runs = run_tasks(pair, settings, tmp_path / "samples", quiet=True)
    (older,) = json.loads((OLDER / "quality.json").read_text())["tasks"]
    (newer,) = summarise(runs)["tasks"]
    for before, now in zip(older["ways"], newer["ways"], strict=True):
        assert {key: now[key] for key in ("name", "settings", "scores")} == {
            key: before[key] for key in ("name", "settings", "scores")
        }
        assert now["cost"] == before["cost"]
