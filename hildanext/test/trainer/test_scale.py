"""Several processes: Accelerate's configuration files, training in pieces, and who writes and prints."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from conftest import random_model
from hildanext.cli import main
from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import read_metrics
from hildanext.core.runtime import is_main_process
from hildanext.losses import SupervisedStep
from hildanext.losses.mask_to_token import MaskToToken
from hildanext.models.lora import LoraConfig, add_lora
from hildanext.sft_stage1 import sft
from hildanext.trainer.config import TrainConfig
from hildanext.trainer.processes import open_accelerator
from hildanext.trainer.sharded import check_shardable, laid_like, open_shards, wants_shards, whole_tensor
from hildanext.wsd_stage0 import convert
from small_models import small_parent
from training_fixtures import change, corpus, environment, losses, small_checkpoint

FILES = Path(__file__).parents[2] / "runs" / "accelerate"
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
new_torch = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6),
    reason="torch 2.6 is the oldest whose fully_shard is not a prototype",
)


def launch_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch` sets for its processes."""
    arguments = ["--config_file", str(FILES / f"{name}.json"), "-m", "hildanext.cli"]
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    found: dict[str, str] = prepare_multi_gpu_env(options)
    return found


@pytest.mark.parametrize("name", ["cpu", "single", "ddp", "fsdp2", "zero2"])
def test_accelerate_reads_every_configuration(name, monkeypatch):
    config = load_config_from_file(str(FILES / f"{name}.json"))
    assert config.num_processes == (1 if name == "single" else 2) and config.mixed_precision == "no"
    assert config.use_cpu == (name == "cpu")


@new_torch
@pytest.mark.parametrize(
    "name, sharded, reshard",
    [("cpu", False, None), ("ddp", False, None), ("fsdp2", True, "true"), ("zero2", True, "false")],
)
def test_what_the_launcher_says_is_what_the_loop_hears(name, sharded, reshard, monkeypatch):
    said = launch_environment(name, monkeypatch)
    assert wants_shards(said) == sharded and said.get("FSDP_RESHARD_AFTER_FORWARD") == reshard


@pytest.mark.parametrize(
    "said, words",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed was asked for"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM was asked for"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1.*only version 2"),
        ({**SHARDED, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not supported"),
        ({**SHARDED, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        ({**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "1"}, "fsdp_activation_checkpointing"),
    ],
)
def test_an_engine_that_the_loop_has_not_is_refused_before_anything_starts(said, words, monkeypatch):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        open_accelerator("no", "cpu")


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ConfigError, match=r"torch 2\.5\.1\+cpu cannot shard"):
        wants_shards(SHARDED)


def a_step(lora: bool = False) -> SupervisedStep:
    model = random_model(dtype=torch.float32)
    if lora:
        add_lora(model, LoraConfig(rank=2))
    return SupervisedStep(model, {"m2t": MaskToToken()})


@pytest.mark.parametrize(
    "lora, knobs, teacher, words",
    [
        (False, {"optimizer": "adamw8bit"}, False, "adamw8bit"),
        (False, {"offload": "optimizer"}, False, "train.offload"),
        (True, {}, True, "under the adapters"),
    ],
)
def test_what_cannot_be_had_in_pieces_is_refused(lora, knobs, teacher, words):
    with pytest.raises(ConfigError, match=f"{words}.*and a sharded model"):
        check_shardable(a_step(lora), TrainConfig(**knobs), teacher)


def test_a_4_bit_model_is_refused():
    pytest.importorskip("bitsandbytes")
    from hildanext.models.quantize import Nf4Linear

    step = a_step()
    layer = step.model.causal_lm.model.layers[0].mlp
    layer.up_proj = Nf4Linear.of(torch.nn.Linear(64, 2, bias=False), torch.device("cpu"))
    with pytest.raises(ConfigError, match="4-bit"):
        check_shardable(step, TrainConfig(), False)


@new_torch
def test_a_process_alone_shards_nothing(monkeypatch):
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    assert open_shards(open_accelerator("no", "cpu"), a_step(), TrainConfig(), False) is None


def test_a_tensor_in_one_piece_stays_as_it_is():
    tensor = torch.ones(3)
    assert whole_tensor(tensor) is tensor and laid_like(tensor, torch.zeros(3)) is tensor


@pytest.mark.parametrize("said, main_one", [({}, True), ({"RANK": "0"}, True), ({"RANK": "1"}, False)])
def test_the_first_process_is_the_main_one(said, main_one, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert is_main_process() == main_one


CARD = [path for path in sorted((FILES.parent / "configs").glob("qwen3-*-8gb*.json")) if "keep" not in path.stem]
KEPT = FILES.parent / "configs" / "qwen3-0.6b-8gb-keep-parent.json"


@pytest.mark.parametrize("path", CARD, ids=lambda path: path.name)
def test_the_configurations_of_the_8_gb_card_hold_and_fit_it(path, capsys):
    """Both training stages, by what `plan` says; on half the memory neither fits."""
    assert len(CARD) == 2 and main(["check", str(path)]) == 0
    capsys.readouterr()
    for memory, fits in (("8GiB", True), ("4GiB", False)):
        main(["plan", "--config", str(path), "--vram", memory, "--machine", "pascal", "--json"])
        stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
        assert stages["convert"]["fits"] == stages["sft"]["fits"] == fits
        assert stages["convert"]["model"] == json.loads(path.read_text())["parent"]


@pytest.mark.parametrize(
    ("memory", "quantize", "fits"), [("8GiB", None, True), ("4GiB", None, False), ("4GiB", "nf4", True)]
)
def test_a_parent_that_stays_is_planned_by_its_mask_rows(memory, quantize, fits, capsys):
    assert main(["check", str(KEPT)]) == 0
    capsys.readouterr()
    words = ["--set", f"convert.quantize={quantize}"] if quantize else []
    main(["plan", "--config", str(KEPT), "--vram", memory, "--machine", "pascal", "--json", *words])
    stage = json.loads(capsys.readouterr().out)["stages"][0]
    assert stage["stage"] == "convert" and stage["fits"] == fits
    assert stage["parts"]["attention"] > 2 * 1024 * 2 * 1024 * 28 * 4, "keys and values of the clean rows are kept"


def launched(name: str, arguments: list[str]) -> str:
    """What two processes of `accelerate launch` printed; those that hang are told to end."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES / f"{name}.json")]
    launcher = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    try:
        out, words = launcher.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        launcher.terminate()
        launcher.communicate()
        raise
    assert launcher.returncode == 0, words.decode()[-3000:]
    return out.decode()


def evaluations(run: Path) -> list[float]:
    return [line["bound"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "eval"]


def same_weights(one: Path, other: Path, tolerance: float) -> bool:
    """Both are one file, of the same names."""
    a, b = (load_file(run / "checkpoint" / "model.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=tolerance) for name in a)


PHASES = [{"phase": "warmup", "block_size": 4, "tokens": 384}, {"phase": "decay", "block_size": 8, "tokens": 768}]


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Steps of two micro-batches: two of one process, or one of each of two."""
    folder = tmp_path_factory.mktemp("sections")
    data = {"train": str(corpus(folder / "train")), "valid": str(corpus(folder / "valid", 6, 1))}
    training = {"batch_size": 2, "precision": "no", "learning_rate": {"peak": 1e-3}}
    conversion = {
        "parent": str(small_parent(folder / "parent", tied=False)),
        "alignment": "parent",
        "block_size": 8,
        "wsd": PHASES,
        "valid_rows": 4,
        "losses": [{"name": "m2t"}, {"name": "kl"}],
        "complementary": True,
        "turns": 2,
        "train": {**training, "mask_noise": {"deviation": 0.1, "until": 1.0}, "evaluate_every": 3},
    }
    return conversion, {**data, "sequence_length": 32, "pad_to_block": 8}


@pytest.mark.slow
def test_accelerate_launch_converts_with_two_cpu_processes(sections, tmp_path: Path):
    """Tolerance 1e-5 relative: the gradients are summed in another order."""
    conversion, data = sections
    convert(change(conversion, accumulate=2), data, tmp_path / "one", quiet=True)
    (tmp_path / "run.json").write_text(json.dumps({"convert": conversion, "data": data}))
    words = ["convert", "--config", str(tmp_path / "run.json"), "--out", str(tmp_path / "two"), "--quiet", "--json"]
    printed = launched("cpu", ["-m", "hildanext.cli", *words]).splitlines()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    summary = json.loads(printed[0])
    assert len(printed) == 1 and Path(summary["report"]).is_file() and list((tmp_path / "two" / "plots").glob("*.png"))


@pytest.fixture(scope="module")
def tuning(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tuning")
    settings = {
        "model": str(small_checkpoint(folder / "model")),
        "valid_rows": 4,
        "samples": {"count": 1, "max_new_tokens": 8},
        "train": {"batch_size": 4, "precision": "no", "learning_rate": {"peak": 3e-3}, "evaluate_every": 2},
    }
    chat = {"train": {"name": "arithmetic", "count": 48, "steps": 1}, "valid_share": 0.15, "sequence_length": 96}
    sft(change(settings, accumulate=2), chat, folder / "one", quiet=True)
    (folder / "run.json").write_text(json.dumps({"sft": settings, "chat": chat}))
    return {"folder": folder}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", pytest.param("fsdp2", marks=new_torch)])
def test_accelerate_launch_fine_tunes_with_two_cpu_processes(tuning, tmp_path: Path, name: str):
    one, two = tuning["folder"] / "one", tmp_path / "two"
    words = ["sft", "--config", str(tuning["folder"] / "run.json"), "--out", str(two), "--quiet", "--json"]
    printed = launched(name, ["-m", "hildanext.cli", *words]).splitlines()
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert evaluations(two) == pytest.approx(evaluations(one), rel=1e-5)
    assert same_weights(one, two, 1e-5)
    assert len(printed) == 1 and Path(json.loads(printed[0])["report"]).is_file()


def converted(name: str, folder: Path, plan: list[tuple[dict[str, Any], dict[str, Any], Path]]) -> list[dict[str, Any]]:
    """Do a plan (see `in_pieces.py`) in two processes; what the second one held."""
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps([(*sections, str(run)) for *sections, run in plan]))
    launched(name, [str(Path(__file__).parents[1] / "in_pieces.py"), str(folder)])
    found: list[dict[str, Any]] = json.loads((folder / "rank-1.json").read_text())
    return found


@new_torch
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "zero2"])
def test_training_in_pieces_gives_the_losses_of_one_process(sections, tmp_path: Path, name: str):
    """Tolerance 1e-5 relative, as for whole models. Stopped and resumed in pieces, then resumed by one process alone;
    bounds and the checkpoint are the same too."""
    conversion, data = sections
    convert(change(conversion, accumulate=2), data, tmp_path / "one", quiet=True)
    cut = [(change(conversion, stop_after=stop), data, tmp_path / "two") for stop in (3, 6)]
    held = converted(name, tmp_path / "plan", cut)
    assert len(losses(tmp_path / "two")) == 6
    for part in held:
        assert part["parameters"] == pytest.approx(0.5, abs=0.02) and part["states"] == pytest.approx(0.5, abs=0.02)
    convert(change(conversion, accumulate=2), data, tmp_path / "two", quiet=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert evaluations(tmp_path / "two") == pytest.approx(evaluations(tmp_path / "one"), rel=1e-5)
    assert same_weights(tmp_path / "one", tmp_path / "two", 1e-5)


@new_torch
@pytest.mark.slow
def test_pieces_go_with_every_switch_that_is_not_refused(sections, tmp_path: Path):
    """Recomputed layers, the merge of the best, adapters, bf16 (2 % off: it rounds other sums), and a run that was
    begun by one process and is finished, whole, in pieces."""
    conversion, data = sections
    merged = {**change(conversion, gradient_checkpointing=True, evaluate_every=2), "merge_top_k": 2}
    adapted = {**conversion, "lora": {"rank": 2, "alpha": 4}, "losses": [{"name": "m2t"}]}
    narrow = change(conversion, precision="bf16", stop_after=3)
    runs = {"merged": merged, "adapted": adapted, "narrow": narrow}
    for label, settings in runs.items():
        convert(change(settings, accumulate=2), data, tmp_path / f"{label}-one", quiet=True)
    begun = change(conversion, accumulate=2, stop_after=3)
    convert(begun, data, tmp_path / "begun", quiet=True)
    plan = [(settings, data, tmp_path / f"{label}-two") for label, settings in runs.items()]
    converted("fsdp2", tmp_path / "plan", [*plan, (conversion, data, tmp_path / "begun")])
    for label, tolerance in (("merged", 1e-5), ("adapted", 1e-5), ("narrow", 2e-2)):
        one, two = tmp_path / f"{label}-one", tmp_path / f"{label}-two"
        assert losses(two) == pytest.approx(losses(one), rel=tolerance), label
        assert evaluations(two) == pytest.approx(evaluations(one), rel=tolerance), label
        assert label == "narrow" or same_weights(one, two, 1e-5), label
    assert len(list((tmp_path / "merged-two" / "best").iterdir())) == 2
    convert(change(conversion, accumulate=2), data, tmp_path / "whole", quiet=True)
    assert losses(tmp_path / "begun") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert same_weights(tmp_path / "begun", tmp_path / "whole", 1e-5)


@pytest.mark.slow
def test_of_a_recipes_two_processes_one_writes_and_prints(sections, tmp_path: Path):
    conversion, data = sections
    stages = [{"stage": "convert"}, {"stage": "report"}]
    recipe = {"folder": str(tmp_path / "run"), "convert": conversion, "data": data, "stages": stages}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    printed = launched("cpu", ["-m", "hildanext.cli", "run", str(tmp_path / "recipe.json")]).splitlines()
    said = [line.split("]")[0] for line in printed]
    assert said[:4] == ["[convert", "[convert", "[report", "[report"] and len(printed) == 6
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_verb_leaves_plots_and_a_report(sections, tmp_path: Path, capsys):
    conversion, data = sections
    short = {**conversion, "wsd": [{"phase": "decay", "block_size": 8, "tokens": 128}], "turns": 1}
    (tmp_path / "run.json").write_text(json.dumps({"convert": short, "data": data}))
    assert main(["convert", "--config", str(tmp_path / "run.json"), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    made, following = capsys.readouterr().out.splitlines()
    page, checkpoint = (tmp_path / "run" / "report.html").read_text(), tmp_path / "run" / "checkpoint"
    assert made.startswith(f"checkpoint: {checkpoint} after ") and made.endswith(str(tmp_path / "run" / "report.html"))
    assert "Conversion" in page and following.startswith(f"next: hildanext generate --model {checkpoint} --prompt ")
    assert main([*shlex.split(following)[2:], "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Once upon a time"
    assert page.count("data:image/png") == len(list((tmp_path / "run" / "plots").glob("*.png"))) > 0
