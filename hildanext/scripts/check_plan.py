"""Is `hildanext plan` right? Real steps of `convert` and `rl` on a CPU, each case in a process of its own.

python hildanext/scripts/check_plan.py                 every case that has no line yet, then table and picture
python hildanext/scripts/check_plan.py --only tiny     cases whose name begins so
python hildanext/scripts/check_plan.py --list

Models are random, of the real configurations; data are random tokens that fill every row. Measured is what the process
holds at most during two steps (VmHWM, reset before the first), less what it held before it began to load the model:
by then every library has been imported and one small step has been taken. Each block of memory is a mapping of its own
(glibc's MALLOC_MMAP_THRESHOLD_), so that what is held is what lives: the tensors. `--kept` measures what a run really
holds, which keeps what was freed (`runtime.keep_freed_memory`) in pieces. Linux alone tells these numbers.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "plan"
LINES = "measured.jsonl"
MIB = 2**20
STEPS = 2
LOSSES = [{"name": "m2t"}, {"name": "t2t"}]
ADAPTERS = {"lora": {"rank": 16, "alpha": 32}}
QLORA = {**ADAPTERS, "quantize": "nf4"}


def case(parent: str, length: int, batch: int, convert: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    phase = {"phase": "stable", "block_size": 32, "tokens": 10**9}
    return {
        "data": {"sequence_length": length, "pad_to_block": 32},
        "convert": {
            "parent": parent, "alignment": "parent", "block_size": 32, "wsd": [phase], "losses": LOSSES,
            "valid_rows": 1, "device": "cpu", **(convert or {}),
            "train": {"batch_size": batch, "stop_after": STEPS, **train},
        },
    }  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "tiny-full": case("tiny", 256, 8),
    "tiny-full-recompute": case("tiny", 256, 8, gradient_checkpointing=True),
    "smollm2-full": case("smollm2-135m", 256, 2),
    "smollm2-full-recompute": case("smollm2-135m", 256, 2, gradient_checkpointing=True),
    "smollm2-full-adamw8bit": case("smollm2-135m", 256, 2, optimizer="adamw8bit"),
    "smollm2-lora": case("smollm2-135m", 256, 2, ADAPTERS),
    "smollm2-lora-recompute": case("smollm2-135m", 512, 2, ADAPTERS, gradient_checkpointing=True),
    "smollm2-lora-teacher": case("smollm2-135m", 256, 2, {**ADAPTERS, "losses": [{"name": "m2t"}, {"name": "kl"}]}),
    "qwen3-0.6b-qlora-1024": case("qwen3-0.6b", 1024, 1, QLORA, gradient_checkpointing=True),
    "qwen3-0.6b-lora-512": case("qwen3-0.6b", 512, 1, ADAPTERS, gradient_checkpointing=True),
}


def alignment(model: str, objective: dict[str, Any], batch: int, **more: Any) -> dict[str, Any]:
    """Rounds whose answers earn something whatever they say."""
    return {
        "model": model, "problems": {"name": "arithmetic", "steps": 1, "largest": 9, "count": 400},
        "reward": {"name": "letters"}, "objective": objective, "rounds": STEPS, "problems_per_round": 8, "group": 8,
        "rollouts": {"name": "engine", "max_new_tokens": 40, "per_step": 4, "cache_mib": 256},
        "measure": {"problems": 4, "samples": 0}, "prompting": "text", "device": "cpu",
        "train": {"batch_size": batch, "evaluate_every": 99, "checkpoint_every": 99}, **more,
    }  # fmt: skip


FEW = {
    "problems_per_round": 2, "group": 4, "measure": {"problems": 2, "samples": 0},
    "rollouts": {"name": "engine", "max_new_tokens": 64, "per_step": 16, "slots": 8, "cache_mib": 1024},
}  # fmt: skip
RECOMPUTED = {"batch_size": 1, "evaluate_every": 99, "checkpoint_every": 99, "gradient_checkpointing": True}
RL_CASES: dict[str, dict[str, Any]] = {
    "tiny-rl-espo": alignment("tiny", {"name": "espo", "beta": 0.02}, 8),
    "tiny-rl-espo-one-group": alignment("tiny", {"name": "espo"}, 1),
    "tiny-rl-agrpo-lora": alignment("tiny", {"name": "agrpo"}, 4, lora={"rank": 8, "alpha": 16}),
    "smollm2-rl-espo": alignment("smollm2-135m", {"name": "espo", "beta": 0.02}, 1, **FEW),
    "smollm2-rl-espo-lora": alignment("smollm2-135m", {"name": "espo", "beta": 0.02}, 1, **FEW, **ADAPTERS),
    "qwen3-0.6b-rl-espo-lora": alignment(
        "qwen3-0.6b", {"name": "espo", "beta": 0.02}, 1, **{**FEW, "train": RECOMPUTED}, **ADAPTERS
    ),
}
ALL = {**CASES, **RL_CASES}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PREFIX")
    parser.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument("--work", default="build/check_plan", metavar="FOLDER", help="for models and data of the cases")
    parser.add_argument("--out", default=str(OUT), metavar="FOLDER")
    parser.add_argument("--kept", action="store_true", help="measure with freed memory kept, as runs have it")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(ALL))
        return 0
    if options.measure:
        of_kind = measure_alignment if options.measure in RL_CASES else measure
        print(json.dumps(of_kind(options.measure, Path(options.work), options.kept)))
        return 0
    out, work = Path(options.out), Path(options.work)
    out.mkdir(parents=True, exist_ok=True)
    done = {line["name"] for line in read_lines(out) if line["kept"] == options.kept}
    for name in ALL:
        if name in done or not name.startswith(options.only):
            continue
        parent = CASES[name]["convert"]["parent"] if name in CASES else RL_CASES[name]["model"]
        if parent != "tiny" or name in CASES:
            make_model(parent, work)
        found = in_a_process(name, work, options.kept)
        said = predict_alignment(name, found["prompt"], work) if name in RL_CASES else predict(name)
        line = {"name": name, "kept": options.kept, **said, **found}
        line["ratio"] = line["predicted"] / line["measured"]
        with (out / LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: predicted {line['predicted'] / MIB:.0f} MiB, measured {line['measured'] / MIB:.0f} MiB")
    report(read_lines(out), out)
    return 0


def read_lines(out: Path) -> list[dict[str, Any]]:
    path = out / LINES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def predict(name: str) -> dict[str, Any]:
    """What the plan says of a case, the libraries' own memory left out."""
    import torch

    from hildanext.core.runtime import accelerates_bf16
    from hildanext.memory_plan.machine import find_machine
    from hildanext.memory_plan.sections import convert_question
    from hildanext.memory_plan.step import training_peak

    machine = find_machine("cpu-bf16" if accelerates_bf16(torch.device("cpu")) else "cpu")
    asked = CASES[name]
    question = convert_question(asked["convert"], asked["data"], machine)
    peak = training_peak(question.cases[0], 0)
    return {"predicted": peak.total, "moment": peak.moment, "parts": peak.parts, "machine": machine.name}


def predict_alignment(name: str, prompt: int, work: Path) -> dict[str, Any]:
    """The same of rounds of an alignment whose longest prompt has so many tokens; and of its two peaks apart."""
    import torch

    from hildanext.core.registry import under_profile
    from hildanext.core.runtime import accelerates_bf16
    from hildanext.memory_plan.machine import find_machine
    from hildanext.memory_plan.sections import rl_question
    from hildanext.memory_plan.switches import worst_peak

    offer_letters()
    machine = find_machine("cpu-bf16" if accelerates_bf16(torch.device("cpu")) else "cpu")
    with under_profile("FULL"):
        peak = worst_peak(rl_question(started(name, work), machine, prompt=prompt), 0)
    update = max(size for moment, size in peak.moments.items() if moment != "rollouts")
    told = {"predicted_rollouts": peak.moments["rollouts"], "predicted_update": update}
    return {"predicted": peak.total, "moment": peak.moment, "parts": peak.parts, "machine": machine.name, **told}


def started(name: str, work: Path) -> dict[str, Any]:
    """The section, whose model is that of the package or the random one made a diffusion model."""
    section = RL_CASES[name]
    model = section["model"]
    return {**section, "model": model if model == "tiny" else str(diffusion_folder(model, work))}


def offer_letters() -> None:
    """A reward of which any answer earns something: the share of letters before n."""
    from collections.abc import Mapping, Sequence

    from hildanext.core.config import config
    from hildanext.grading.base import Reward, Scores
    from hildanext.grading.rewards import REWARDS

    @config
    class Letters(Reward):
        def check(self, problem: Mapping[str, Any]) -> None:
            pass

        def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
            return [sum(letter < "n" for letter in text) / max(len(text), 1) for text in completions]

    REWARDS["letters"] = Letters


def measure_alignment(name: str, work: Path, kept: bool) -> dict[str, Any]:
    """Some rounds of an alignment; to be called in a fresh process. Before what is measured the same rounds run once:
    oneDNN keeps what it has compiled for each shape of a product, and an update's shapes are as many as its groups."""
    import shutil

    import torch

    import hildanext.rl_stage2 as stage
    import hildanext.training
    from hildanext.core.runtime import machine, set_threads

    set_threads(None)
    if not kept:
        hildanext.training.keep_freed_memory = lambda: True
    offer_letters()
    small = {"rounds": 1, "problems_per_round": 1, "group": 4}
    # Blocks of 32 make the shapes of all rounds of a larger model the same.
    first = [("warm", small), ("again", {})] if RL_CASES[name]["model"] == "tiny" else [("again", {"rounds": 1})]
    found: dict[str, Any] = watched(stage)
    for folder, changes in (*first, ("run", {})):
        run = work / folder
        shutil.rmtree(run, ignore_errors=True)
        if folder == "run":
            hold_what_is_there()
        before = resident("VmRSS")
        found |= {"before_" + folder: before, "rollouts": 0, "update": 0}
        stage.rl({**started(name, work), **changes}, run, "FULL", quiet=True)
        shutil.rmtree(run)
    found["measured"] = max(found["rollouts"], found["update"])
    told = {key: found[key] - before for key in ("loaded", "measured", "rollouts", "update")}
    libraries = before - found["before_again"]
    more = {"libraries": libraries, "prompt": found["prompt"], "seconds": found["seconds"], "baseline": before}
    return {**told, **more, "on": machine(torch.device("cpu"))}


def watched(stage: Any) -> dict[str, Any]:
    """Into it goes what the process holds when the stage begins to train, and at most while answers are written and
    otherwise from there on. Answers do not end before they are as long as they may be."""
    from dataclasses import replace

    from hildanext.rl.rollouts.engine import EngineSampler

    found: dict[str, Any] = {"prompt": 0}
    train, sample, request = stage.train, EngineSampler.sample, EngineSampler._request

    def note(moment: str) -> None:
        found[moment] = max(found.get(moment, 0), resident("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")

    def training(*values: Any, **named: Any) -> Any:
        note("loading")
        found.update({"loaded": resident("VmRSS"), "rollouts": 0, "update": 0, "prompt": 0})
        counters = train(*values, **named)
        note("update")
        found["seconds"] = counters["seconds"] / counters["step"]
        return counters

    def sampling(self: Any, prompts: Any, *values: Any, **named: Any) -> Any:
        note("update")
        found["prompt"] = max(found["prompt"], *(len(prompt) for prompt in prompts))
        answers = sample(self, prompts, *values, **named)
        note("rollouts")
        return answers

    stage.train, EngineSampler.sample = training, sampling  # type: ignore[method-assign]
    EngineSampler._request = lambda *values: replace(request(*values), ignore_eos=True)  # type: ignore[method-assign]
    return found


def in_a_process(name: str, work: Path, kept: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, "--work", str(work), *(["--kept"] if kept else [])]
    environment = dict(os.environ)
    if not kept:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "10000000", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(name: str, work: Path, kept: bool) -> dict[str, Any]:
    """Two steps of a conversion; to be called in a fresh process."""
    import shutil

    import torch

    import hildanext.training
    import hildanext.wsd_stage0 as stage
    from hildanext.core.runtime import machine, set_threads

    set_threads(None)
    if not kept:
        hildanext.training.keep_freed_memory = lambda: True
    asked = CASES[name]
    parent = model_folder(asked["convert"]["parent"], work)
    data = {**asked["data"], **make_data(parent, work, asked["data"]["sequence_length"])}
    warm_up(asked)
    hold_what_is_there()
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    before, found = resident("VmRSS"), {}
    plain_train = stage.train

    def train(*values: Any, **named: Any) -> Any:
        found["loaded"] = resident("VmRSS") - before
        found["loading"] = resident("VmHWM") - before
        Path("/proc/self/clear_refs").write_text("5")
        counters = plain_train(*values, **named)
        found["measured"] = resident("VmHWM") - before
        found["seconds"] = counters["seconds"] / counters["step"]
        return counters

    stage.train = train
    stage.convert({**asked["convert"], "parent": str(parent)}, data, run, quiet=True)
    shutil.rmtree(run)
    return {**found, "baseline": before, "on": machine(torch.device("cpu"))}


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the last reset."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {field}")


def hold_what_is_there() -> None:
    """Keep the libraries' pages resident: the kernel may drop them while it is short of memory, and the count falls."""
    import ctypes

    current, on_fault = 1, 4  # names of mlockall(2)
    if ctypes.CDLL(None, use_errno=True).mlockall(current | on_fault) != 0:
        print("cannot lock pages in memory: on a busy machine the figure may be too low", file=sys.stderr)


def warm_up(asked: dict[str, Any]) -> None:
    """Load what a first step loads lazily: kernels, autocast, checkpointing, the optimiser, bitsandbytes."""
    import torch
    from accelerate import Accelerator

    from hildanext.core.runtime import accelerates_bf16, make_generator
    from hildanext.diffusion import block_index, block_times, mask_tokens
    from hildanext.losses import SupervisedStep, make_losses
    from hildanext.models.lora import LoraConfig, add_lora
    from hildanext.models.start import start_conversion
    from hildanext.trainer.optimizer import build_optimizer

    convert = asked["convert"]
    lora, quantize = convert.get("lora"), convert.get("quantize")
    model, _ = start_conversion("tiny", "parent", 32, mask_delta=lora is not None, quantize=quantize)
    if lora is not None:
        add_lora(model, LoraConfig(rank=4))
    if convert["train"].get("gradient_checkpointing"):
        model.recompute_layers()
    step = SupervisedStep(model, make_losses(LOSSES, "losses")).train()
    learning = {name: value for name, value in step.named_parameters() if value.requires_grad}
    name = convert["train"].get("optimizer", "adamw")
    step, optimizer = Accelerator(cpu=True).prepare(step, build_optimizer(name, learning, 1e-4, (0.9, 0.95), 0.01))
    clean, document = torch.randint(1, 500, (1, 64)), torch.zeros(1, 64, dtype=torch.long)
    position = torch.arange(64)[None]
    time = block_times(block_index(document, position, 32), (0.5, 1.0), make_generator(0))
    view = mask_tokens(clean, document, position, clean > 0, time, 32, model.card.mask_id, make_generator(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=accelerates_bf16(torch.device("cpu"))):
        total = step(view).total
    total.backward()
    optimizer.step()


def model_folder(parent: str, work: Path) -> Path:
    return work / f"random-{parent}"


def diffusion_folder(parent: str, work: Path) -> Path:
    return work / f"random-{parent}-diffusion"


def make_model(parent: str, work: Path) -> None:
    """A folder with random weights of the real configuration, in bf16, and beside it one with the diffusion model that
    begins with them, made in a process of its own."""
    if (diffusion_folder(parent, work) / "hilda.json").is_file():
        return
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import check_plan, pathlib; "
    code += f"check_plan.write_model({parent!r}, pathlib.Path({str(work)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def write_model(parent: str, work: Path) -> None:
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from hildanext.memory_plan.architecture import describe
    from hildanext.models.attention.dense import install_seam
    from hildanext.models.checkpoint import save_causal, save_diffusion
    from hildanext.models.start import start_conversion

    fields = {**describe(parent), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=install_seam())
    torch.set_default_dtype(torch.float32)
    vocab = {word: index for index, word in enumerate(["<s>", "</s>", *(f"w{index}" for index in range(500))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True) for word in ("<s>", "</s>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    work.mkdir(parents=True, exist_ok=True)
    save_causal(model_folder(parent, work), causal_lm.bfloat16(), tokenizer)
    save_diffusion(diffusion_folder(parent, work), *start_conversion(str(model_folder(parent, work)), "block", 32))


def make_data(parent: Path, work: Path, length: int) -> dict[str, str]:
    """Shards of random documents, each of them a whole row (one place is the end of text's)."""
    import random

    from hildanext.datasets import PrepareConfig, prepare
    from hildanext.tokenization import load_tokenizer

    folder, draw = work / f"data-{length}", random.Random(0)
    if not folder.is_dir():
        rows = [[draw.randrange(2, 500) for _ in range(length - 2)] for _ in range(32)]
        prepare(PrepareConfig(source={"name": "list"}, out=str(folder)), load_tokenizer(parent), documents=rows)
    return {"train": str(folder), "valid": str(folder)}


def report(lines: list[dict[str, Any]], out: Path) -> None:
    """The table and the picture of all lines, and all of them in one JSON file."""
    from hildanext.core.plots import save
    from hildanext.core.run_dir import write_atomically
    from hildanext.memory_plan.picture import comparison_figure

    alone = {line["name"]: line for line in lines if not line["kept"]}
    kept = {line["name"]: line for line in lines if line["kept"]}
    rows = [
        "| case | predicted MiB | measured MiB | predicted / measured | as a run holds it, MiB | seconds a step |",
        "|---|---|---|---|---|---|",
    ]
    for name in (name for name in ALL if name in alone):
        line, held = alone[name], kept.get(name)
        numbers = [f"{line[key] / MIB:,.0f}" for key in ("predicted", "measured")] + [f"{line['ratio']:.3f}"]
        numbers += [f"{held['measured'] / MIB:,.0f}" if held else "", f"{line['seconds']:.0f}"]
        rows.append(f"| `{name}` | {' | '.join(numbers)} |")
    rows += ["", *of_alignments([alone[name] for name in RL_CASES if name in alone])]
    write_atomically(out / "table.md", "\n".join(rows) + "\n")
    write_atomically(out / "measured.json", json.dumps(lines, indent=1) + "\n")
    if alone:
        save(comparison_figure([alone[name] for name in ALL if name in alone]), out / "measured.png")


def of_alignments(lines: list[dict[str, Any]]) -> list[str]:
    """The two peaks of each, and what the libraries keep of its shapes beyond the plan."""
    rows = [
        "| case | rollouts, predicted | measured | ratio | update, predicted | measured | ratio | libraries |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        cells = []
        for moment in ("rollouts", "update"):
            said, found = line[f"predicted_{moment}"], line[moment]
            cells += [f"{said / MIB:,.0f}", f"{found / MIB:,.0f}", f"{said / found:.3f}"]
        rows.append(f"| `{line['name']}` | {' | '.join(cells)} | {line['libraries'] / MIB:,.0f} |")
    return rows


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
