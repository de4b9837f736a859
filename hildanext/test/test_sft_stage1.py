"""Stage 1: it learns, it resumes, it keeps the best, it stops early, it samples, and it refuses what cannot be."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_model
from corpus import write_jsonl
from hildanext.cli import main
from hildanext.core.errors import CheckpointError, ConfigError, DataError, HildaError, ModelError
from hildanext.core.metrics_log import read_metrics
from hildanext.corruption.noised_batches import NoisedBatches
from hildanext.corruption.noising import NoiseConfig
from hildanext.corruption.schedules import BlockPhase
from hildanext.data.chat_template import Message, encode_chat
from hildanext.decoding import decoder_section, make_decoder
from hildanext.diffusion import NoisedBatch
from hildanext.inference import GenerationConfig, generate
from hildanext.losses import SupervisedStep
from hildanext.models.loading import tiny
from hildanext.models.loading.load import load_diffusion
from hildanext.recipe import check, execute
from hildanext.sft_stage1 import check as check_sft
from hildanext.sft_stage1 import prepare_data, sft
from hildanext.stages import STAGES
from hildanext.tokenization import load_tokenizer
from hildanext.trainer.best_checkpoints import BestCheckpoints
from small_models import small_parent
from training_fixtures import change, environment, losses, small_checkpoint, wait_for_steps

CHAT = {"train": {"name": "arithmetic", "count": 48, "steps": 1}, "valid_share": 0.15, "sequence_length": 96}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    return str(small_checkpoint(tmp_path_factory.mktemp("start") / "model"))


@pytest.fixture(autouse=True)
def quick(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures cost more than all the steps of a small run; one test draws them."""
    if "template" not in request.node.name and "verb" not in request.node.name:
        monkeypatch.setattr("hildanext.trainer.run.training_plots", lambda metrics, folder: [])


@pytest.fixture
def section(start: str) -> dict[str, Any]:
    return {
        "model": start,
        "valid_rows": 4,
        "samples": {"count": 1, "max_new_tokens": 8},
        "train": {
            "batch_size": 4,
            "precision": "no",
            "learning_rate": {"peak": 3e-3},
            "checkpoint_every": 3,
            "evaluate_every": 6,
        },
    }


def weights(summary: dict[str, Any]) -> list[torch.Tensor]:
    return list(load_diffusion(summary["checkpoint"])[0].parameters())


def test_the_embedded_model_learns_from_a_small_budget(tmp_path: Path):
    """On held-out sums of the embedded model: the bound falls, masks are filled better, and wrong tokens mended."""
    settings = {
        "model": "tiny",
        "valid_rows": 8,
        "turns": 2,
        "complementary": False,
        "samples": {"count": 0},
        "train": {"batch_size": 4, "precision": "no", "learning_rate": {"peak": 2e-3}, "evaluate_every": 100},
    }
    chat = {"train": {"name": "arithmetic", "count": 72, "steps": 1}, "valid_share": 0.15, "sequence_length": 96}
    summary = sft(settings, chat, tmp_path / "run", quiet=True)
    before, after = summary["before"], summary["last"]
    assert summary["whole"] and summary["step"] < 40
    assert after["bound"] < before["bound"] - 3
    assert after["masked_accuracy"] > before["masked_accuracy"] + 0.1
    assert after["corrected"] > before["corrected"] + 0.1


def test_what_would_fail_at_the_end_fails_before_the_first_step(section, tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hildanext.models.checkpoint.save_tokenizer", full)
    with pytest.raises(CheckpointError, match="out of disk"):
        sft(section, CHAT, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_teacher_of_other_words_is_refused(section, tmp_path: Path):
    """Its next-token distribution would be about other words."""
    losses = [{"name": "kl"}]
    with pytest.raises(ModelError, match="the parent .* has"):
        sft(
            {**section, "losses": losses, "teacher": str(small_parent(tmp_path / "parent"))},
            CHAT,
            tmp_path / "run",
            quiet=True,
        )


def test_it_leaves_a_checkpoint_that_answers_in_its_own_template(section, tmp_path: Path):
    summary = sft(section, CHAT, tmp_path / "run", quiet=True)
    model, tokenizer = load_diffusion(summary["checkpoint"])
    assert model.card.block_size == 8 and model.card.chat and "Assistant" in tokenizer.chat_template
    prompt = encode_chat(tokenizer, [Message("user", "Lily has 5 apples. How many?")])
    decoder = make_decoder(decoder_section("S_MODE"))
    [done] = generate(model, tokenizer, [prompt], decoder, GenerationConfig(max_new_tokens=8))
    assert len(done.tokens) <= 8
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, *_ = (line for line in lines if line["kind"] == "eval")
    assert first["step"] == 0 and {"bound", "masked_accuracy", "corrected", "kept"} <= set(first)
    samples = [line for line in lines if line["kind"] == "sample"]
    assert samples and {"prompt", "answer", "wanted", "forwards"} <= set(samples[0])
    assert samples[0]["wanted"].strip().startswith(tuple("0123456789"))
    assert {"loss.png", "held_out.png"} <= {path.name for path in (tmp_path / "run" / "plots").iterdir()}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["train"]["examples"] + record["data"]["valid"]["examples"] == 48


@pytest.mark.parametrize("stop", [1, 7])
def test_a_resumed_run_has_the_losses_of_one_that_was_never_stopped(section, tmp_path: Path, stop: int):
    whole = sft(section, CHAT, tmp_path / "whole", quiet=True)
    cut = sft(change(section, stop_after=stop), CHAT, tmp_path / "cut", quiet=True)
    assert not cut["whole"] and len(losses(tmp_path / "cut")) == stop
    again = sft(section, CHAT, tmp_path / "cut", quiet=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    lines = [
        [
            {k: v for k, v in line.items() if "second" not in k}
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_every_switch_at_once(section, tmp_path: Path):
    """LoRA on an autoregressive parent with the parent as teacher, three turns, bounds as losses, several processes'
    worth of accumulation."""
    from hildanext.models.checkpoint import save_causal
    from small_models import small_causal

    tokenizer = load_tokenizer(tiny.folder("ar"))
    save_causal(tmp_path / "parent", small_causal("qwen3", rows=2048, max_position_embeddings=128), tokenizer)
    settings = {
        **change(section, accumulate=2),
        "parent": {"name": str(tmp_path / "parent"), "alignment": "parent", "block_size": 8},
        "losses": [{"name": "m2t", "weighting": "elbo"}, {"name": "t2t"}, {"name": "kl"}, {"name": "ar"}],
        "lora": {"rank": 2},
        "turns": 3,
        "keep": "last",
        "select": "masked_accuracy",
    }
    del settings["model"]
    summary = sft(settings, {**CHAT, "packing": False}, tmp_path / "run", quiet=True)
    trained = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert set(trained[-1]["losses"]) == {"m2t", "t2t", "kl", "ar"}
    model, _ = load_diffusion(summary["checkpoint"])
    assert model.card.alignment == "parent" and all(torch.isfinite(p).all() for p in model.parameters())
    assert "best" not in summary and not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize(
    ("turns", "complementary", "forwards"), [(1, False, 1), (2, False, 2), (2, True, 4), (3, True, 6)]
)
def test_a_step_forwards_every_view_once_a_turn(
    section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int, complementary: bool, forwards: int
):
    """The second turn's noisy tokens are the model's own draft; its labels are still the truth."""
    seen = []

    class Counted(SupervisedStep):
        def forward(self, view: NoisedBatch, *rest: Any, **more: Any) -> Any:
            outcome = super().forward(view, *rest, **more)
            seen.append((self.training, view, outcome))
            return outcome

    monkeypatch.setattr("hildanext.trainer.run.SupervisedStep", Counted)
    section = {**change(section, stop_after=1), "turns": turns, "complementary": complementary, "samples": {"count": 0}}
    sft(section, CHAT, tmp_path / "run", quiet=True)
    trained = [(view, outcome) for training, view, outcome in seen if training]
    assert len(trained) == forwards
    for (before, outcome), (after, _) in zip(trained, trained[1:], strict=False):
        if outcome.draft is not None:
            assert torch.equal(after.noisy[after.maskable], outcome.draft[after.maskable])
            assert torch.equal(after.clean, before.clean) and torch.equal(after.maskable, before.maskable)
            assert torch.equal(after.replaced, after.maskable & ~after.masked & (after.noisy != after.clean))


def test_views_are_a_function_of_their_number_and_differ_between_numbers(section, tmp_path: Path):
    from hildanext.data.chat_dataset import ChatDataset

    prepare_data(section, CHAT, tmp_path / "run")
    dataset = ChatDataset(tmp_path / "run" / "data", "train", 96, 8, 0)
    card = random_model().card
    block_phase = BlockPhase(phase="stable", block_size=8, tokens=1)

    def make(seed: int) -> NoisedBatches:
        return NoisedBatches(dataset, 2, NoiseConfig(), card, torch.arange(9), seed, dataset.pairs)

    one, again, other = make(0), make(0), make(1)
    for number in (7, 0, 3):
        [view], [same], [unlike] = one(number, block_phase), again(number, block_phase), other(number, block_phase)
        assert torch.equal(view.noisy, same.noisy) and view.pairs is not None
        assert view.noisy.shape != unlike.noisy.shape or not torch.equal(view.noisy, unlike.noisy)
    assert one(0, block_phase)[0].time.flatten()[0] != one(1, block_phase)[0].time.flatten()[0]


def test_causal_supervision_takes_the_graphs_of_the_examples(section, tmp_path: Path):
    section = {**section, "losses": [{"name": "m2t"}, {"name": "t2t"}, {"name": "c2dlm", "apply": "both"}]}
    sft(section, CHAT, tmp_path / "run", "FULL", quiet=True)
    trained = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert any(line["losses"]["c2dlm"] > 0 for line in trained)
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["full"] == ["c2dlm"]
    with pytest.raises(ConfigError, match="'c2dlm' is a FULL method"):
        sft(section, CHAT, tmp_path / "safe", quiet=True)
    records = [{"id": str(n), "prompt": f"{n}?", "response": "yes"} for n in range(60)]
    plain = {**CHAT, "train": {"name": "files", "path": str(write_jsonl(tmp_path / "chat.jsonl", records))}}
    with pytest.raises(ConfigError, match="'c2dlm' needs causal graphs, and no example has one"):
        sft(section, plain, tmp_path / "none", "FULL", quiet=True)


def test_the_best_checkpoint_is_kept_and_a_run_that_no_longer_improves_stops(section, tmp_path: Path):
    """A rate that ruins the model after a while: the last weights are worse than the best."""
    section = {
        **change(section, evaluate_every=1, learning_rate={"peak": 0.3, "warmup": 0.5}),
        "patience": 3,
        "epochs": 8,
    }
    summary = sft(section, CHAT, tmp_path / "run", quiet=True)
    bounds = {
        line["step"]: line["bound"]
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if line["kind"] == "eval"
    }
    del bounds[0]
    best = min(bounds, key=bounds.__getitem__)
    assert summary["stopped_early"] and summary["whole"] and summary["step"] == best + 3
    assert summary["best"]["step"] == best and summary["last"]["step"] == best + 3
    kept = load_diffusion(tmp_path / "run" / "best" / f"step-{best}")[0]
    assert all(torch.equal(a, b) for a, b in zip(weights(summary), kept.parameters(), strict=True))
    again = sft(section, CHAT, tmp_path / "run", quiet=True)
    assert again["step"] == summary["step"] and again["stopped_early"]


def test_best_counts_what_brought_nothing(tmp_path: Path):
    for highest, values in ((False, (3.0, 2.0, 2.5, 2.2, 1.0)), (True, (0.1, 0.3, 0.2, 0.3, 0.4))):
        best = BestCheckpoints(tmp_path / str(highest), lambda folder, _: folder.mkdir(parents=True), 2, "x", highest)
        stuck = []
        for step, value in enumerate(values):
            best(step, {"x": value})
            stuck.append(best.plateaued(2))
        assert stuck == [False, False, False, True, False] and not best.plateaued(None)
        assert best.steps() == [4, 1]
        best.prune()
        assert len(list((tmp_path / str(highest) / "best").iterdir())) == 2


def test_a_state_goes_on_only_under_what_it_was_reached_with(section, tmp_path: Path):
    sft(change(section, stop_after=2), CHAT, tmp_path / "run", quiet=True)
    for other, chat, words in (
        ({**section, "turns": 1}, CHAT, "sft.turns was 2 and is 1"),
        (section, {**CHAT, "packing": False}, "data.packing was true and is false"),
        (section, {**CHAT, "train": {**CHAT["train"], "seed": 3}}, "data.train.seed was|data.train"),
    ):
        with pytest.raises(ConfigError, match=words):
            sft(other, chat, tmp_path / "run", quiet=True)
    sft(
        change({**section, "samples": {"count": 0}}, evaluate_every=50, stop_after=3),
        CHAT,
        tmp_path / "run",
        quiet=True,
    )


def test_the_data_can_be_made_before(section, tmp_path: Path):
    parts = prepare_data(section, CHAT, tmp_path / "run")
    stamp = (tmp_path / "run" / "data" / "manifest.json").stat().st_mtime_ns
    summary = sft(change(section, stop_after=1), CHAT, tmp_path / "run", quiet=True)
    assert summary["data"] == parts
    assert (tmp_path / "run" / "data" / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("changes", "chat", "error", "words"),
    [
        ({"model": None}, {}, ConfigError, "sft needs one start"),
        ({"parent": {"name": "tiny"}}, {}, ConfigError, "sft needs one start"),
        ({"losses": []}, {}, ConfigError, "at least one loss"),
        ({"losses": [{"name": "m2t", "weighting": "mean"}]}, {}, ConfigError, "weighting"),
        ({"turns": 9}, {}, ConfigError, "turns"),
        ({"t_range": (0.8, 0.3)}, {}, ConfigError, "t_range"),
        ({"quantize": "nf4"}, {}, ConfigError, "lora"),
        ({"pacience": 1}, {}, ConfigError, "did you mean 'patience'"),
        ({"train": 3}, {}, ConfigError, "train"),
        ({}, {"sequence_length": 512}, ConfigError, "chat.sequence_length 512 exceeds the context of 256"),
        ({}, {"too_long": "burn"}, ConfigError, "chat: too_long"),
        ({}, {"sequence_length": 100}, ConfigError, "block size 8 does not divide"),
        ({}, {"train": {"name": "arithmetic", "count": 1}}, DataError, "holds no conversation"),
        ({}, {"template": "own"}, ConfigError, "no chat template"),
        ({"samples": {"count": 1, "max_new_tokens": 250}}, {}, Exception, "no held-out prompt leaves room"),
    ],
)
def test_what_cannot_be_is_one_line(section, tmp_path: Path, changes, chat, error, words: str):
    with pytest.raises(error, match=words) as problem:
        sft({**section, **changes}, {**CHAT, **chat}, tmp_path / "run", quiet=True)
    assert "\n" not in str(problem.value) and not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("mode", ["fastest", "exact"])
def test_samples_in_a_mode_that_is_not_there_are_refused_before_anything_is_loaded(section, mode: str):
    with pytest.raises(HildaError, match=mode):
        check_sft({**section, "model": "nowhere", "samples": {"mode": mode}}, CHAT)


def test_the_verb_trains_reports_resumes_and_generate_asks_it(section, tmp_path: Path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"sft": section, "chat": CHAT}))
    command = ["sft", "--config", str(path), "--out", str(tmp_path / "run"), "--quiet", "--json"]
    assert main([*command, "--data-only"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["train"]["examples"] > 30
    assert main([*command, "--set", "sft.train.stop_after=2"]) == 0
    capsys.readouterr()
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    page = Path(summary["report"]).read_text(encoding="utf-8")
    assert "Fine-tuning" in page and "wrong tokens mended" in page and "conversations" in page and "#### " in page
    ask = ["generate", "--model", summary["checkpoint"], "--prompt", "How many?", "--max-new-tokens", "8"]
    assert main([*ask, "--chat", "--system", "Be brief."]) == 0
    assert capsys.readouterr().out.startswith("How many?\n")
    assert main([*ask, "--system", "Be brief."]) == 2 and "add --chat" in capsys.readouterr().err
    assert main(["generate", "--model", "tiny", "--prompt", "How many?", "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main([*command, "--set", "sft.turns=5"]) == 2
    assert capsys.readouterr().err.startswith("error: sft")


def test_a_recipe_fine_tunes_what_it_converted(section, tmp_path: Path):
    """The stage takes the model of an earlier one; here the section names it."""
    run = {"folder": str(tmp_path), "device": "cpu", "threads": 1, "sft": section, "chat": CHAT}
    run["stages"] = [{"stage": "sft"}, {"stage": "report"}]
    assert [step.key for step in check(run, STAGES)] == ["sft", "report"]
    outcomes = execute(run, STAGES)
    assert (Path(outcomes["sft"]["model"]) / "hilda.json").exists()
    assert "Fine-tuning" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'valid_share'"):
        check({**run, "chat": {**CHAT, "valid_shares": 1}}, STAGES)
    del run["sft"]["model"]
    check(run, STAGES)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_losses(section, tmp_path: Path):
    section = {**section, "epochs": 6}
    whole = sft(section, CHAT, tmp_path / "whole", quiet=True)
    path, run = tmp_path / "run.json", tmp_path / "killed"
    path.write_text(json.dumps({"sft": section, "chat": CHAT}))
    command = [sys.executable, "-m", "hildanext.cli", "sft", "--config", str(path)]
    command += ["--out", str(run), "--quiet", "--json"]

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())

    chance = random.Random(0)
    for _ in range(5):
        process = begin()
        before = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
        wait_for_steps(run, before + chance.randint(0, 12), process)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = begin()
    out, problem = process.communicate()
    assert process.returncode == 0, problem.decode()
    assert losses(run) == losses(tmp_path / "whole")
    summary = json.loads(out.splitlines()[-1])
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(summary), strict=True))


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_doubled_accumulation(section, tmp_path: Path):
    """Tolerance 1e-5 relative: the gradients are summed in another order. Early stopping is one decision for both."""
    section = {**section, "samples": {"count": 0}, "patience": 2, "epochs": 3}
    sft(change(section, accumulate=2), CHAT, tmp_path / "one", quiet=True)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"sft": section, "chat": CHAT}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "hildanext.cli", "sft", "--config", str(path), "--out", str(tmp_path / "two")]
    command += ["--quiet", "--json"]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len([line for line in done.stdout.splitlines() if line.startswith(b"{")]) == 1
