"""How much memory a run will take, before an hour is spent on it: by part, for training and for decoding.

hildanext plan --config hildanext/runs/configs/default.json
hildanext plan --model qwen3-0.6b --vram 8GiB
hildanext plan --config my-run.json --vram 8GiB --machine ampere --out plans/my-run
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.commands import add_recipe_flags, load_run, print_json
from hildanext.commands.check import as_recipe
from hildanext.core.errors import ConfigError
from hildanext.core.metrics_log import to_json
from hildanext.core.plots import save
from hildanext.core.run_dir import expand_home, write_atomically
from hildanext.stages import STAGES

if TYPE_CHECKING:
    from hildanext.memory_plan.machine import Machine
    from hildanext.memory_plan.plan import StagePlan
    from hildanext.memory_plan.sections import Question

EPILOG = """machines: pascal (a GPU without bf16), ampere (a GPU with bf16), cpu, cpu-bf16
Without --machine and --vram it plans for this machine, and, where that has no GPU, for an 8 GiB card (pascal) too.
No weights are read and nothing is allocated: the model's config.json is enough. --model NAME without a run plans a
conversion of that model as hildanext/docs/memory.md does; beside a run it says what a checkpoint is made of.
--model FOLDER of draft adapters (convert.keep_parent) says how fast exact mode is to be with them, by device."""
NEUTRAL: dict[str, Any] = {
    "convert": {
        "wsd": [{"phase": "stable", "block_size": 32, "tokens": 1000000}],
        "losses": [{"name": "m2t"}, {"name": "t2t"}],
        "train": {"batch_size": 1},
    },
    "data": {"sequence_length": 1024},
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_recipe_flags(parser)
    parser.add_argument("--model", help="a known model, a folder, a config.json or a GGUF file")
    parser.add_argument(
        "--vram", metavar="SIZE", help="memory of the GPU (or, with --machine cpu, of the computer): 8GiB, 7500MiB"
    )
    parser.add_argument("--machine", metavar="NAME", help="what it runs on (see below)")
    parser.add_argument("--context", type=int, default=2048, help="decoding: tokens of a document (2048)")
    parser.add_argument("--documents", type=int, default=1, help="decoding: documents at once (1)")
    parser.add_argument("--answers", type=float, default=1.0, help="sft: share of a row that is answer (1.0)")
    parser.add_argument("--prompt", type=int, default=128, help="rl: tokens of a prompt (128)")
    parser.add_argument("--out", metavar="FOLDER", help="write plan.json and plan.png there")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> int:
    """0 when every stage fits, 1 when one does not; a card that is shown beside this machine does not count."""
    from hildanext.memory_plan.machine import CARD, MACHINES, chosen_machine
    from hildanext.memory_plan.picture import plan_figure
    from hildanext.memory_plan.plan import bars, make_plan, record

    if options.config is None and options.recipe is None and options.model is not None:
        from hildanext.models.draft_card import is_draft_folder

        if is_draft_folder(expand_home(options.model)):
            return _plan_drafts(options)
    machine, memory = chosen_machine(options.machine, options.vram)
    if min(options.context, options.documents, options.prompt) < 1 or not 0 < options.answers <= 1:
        raise ConfigError(
            "--context, --documents, --prompt or --answers", "give 1 or more, and a share above 0 and up to 1"
        )
    plans = [make_plan(question, machine, memory) for question in _questions(options, machine)]
    plan_record = record(plans, machine, memory)
    shown_plans = [(plans, machine, memory)]
    if options.machine is None and options.vram is None and machine.on_cpu:
        card, size = MACHINES[CARD[0]], CARD[1]
        beside = [make_plan(question, card, size) for question in _questions(options, card)]
        plan_record["beside"] = record(beside, card, size)
        shown_plans.append((beside, card, size))
    if options.json:
        print_json(plan_record)
    else:
        for planned in shown_plans:
            _print_plans(*planned)
    if options.out is not None:
        folder = Path(options.out)
        write_atomically(folder / "plan.json", to_json(plan_record, indent=2) + "\n")
        shown = {name: parts for plan in plans for name, parts in bars(plan).items()}
        save(plan_figure(shown, memory, plans[0].budget), folder / "plan.png")
    return 0 if all(plan.fits for plan in plans) else 1


def _plan_drafts(options: argparse.Namespace) -> int:
    """What exact mode is to give with these adapters, by device. Raises `CheckpointError`, `ModelError`."""
    from rich.table import Table

    from hildanext.core.config import plain
    from hildanext.core.console import wide_console
    from hildanext.core.runtime import RuntimeConfig
    from hildanext.memory_plan.architecture import find_architecture
    from hildanext.memory_plan.exact_rates import expected
    from hildanext.models.draft_card import read_draft_card

    card = read_draft_card(expand_home(options.model))
    lines = expected(card, find_architecture(card.parent), RuntimeConfig())
    told = {"model": options.model, "card": plain(card), "exact": [line.record() for line in lines]}
    if options.out is not None:
        write_atomically(Path(options.out) / "plan.json", to_json(told, indent=2) + "\n")
    if options.json:
        print_json(told)
        return 0
    table = Table(
        "device", "drafts", "masks behind", "tokens per forward", "rows", "times the parent", "tokens/s", "rate"
    )
    for line in lines:
        every, points, speed = range(line.placement.drafts + 1), line.placement.points, line.tokens_per_second
        behind = "all" if points == tuple(every) else ", ".join(map(str, points))
        table.add_row(
            line.rate.name, str(line.placement.drafts), behind if points else "none", f"{line.tokens_per_forward:.2f}",
            f"{line.rows:.1f}", f"{line.times_parent:.2f}", "" if speed is None else f"{speed:,.0f}", line.rate.source,
        )  # fmt: skip
    console = wide_console()
    right = ", ".join(f"{100 * share:.0f}" for share in card.acceptance)
    console.print(f"exact mode of {card.parent}; drafts right up to place 1, 2, ...: {right} %", highlight=False)
    console.print(table)
    return 0


def _questions(options: argparse.Namespace, machine: "Machine") -> "list[Question]":
    """The stages of the run that train, in order, and decoding what they make."""
    from hildanext.memory_plan.architecture import find_architecture
    from hildanext.memory_plan.sections import (
        DEFAULT_BLOCK,
        cache_of,
        convert_question,
        parent_beside,
        rl_question,
        serving_question,
        sft_question,
    )
    from hildanext.recipe import read_recipe

    if options.recipe is not None:
        options.config = options.recipe
    if options.config is None and options.model is None:
        raise ConfigError("nothing to plan", "hildanext plan --config FILE, or --model qwen3-0.6b")
    start = {"parent": options.model, **NEUTRAL} if options.config is None else {}
    run = load_run(options, start)
    shared, steps = read_recipe(as_recipe(run), STAGES)
    questions: list[Question] = []
    made, block = options.model, None
    shape = find_architecture(made) if made is not None else None
    for step in steps:
        section = dict(step.section)
        if step.stage == "convert":
            section = {"parent": shared.start, **section}
            questions.append(convert_question(section, section.pop("data", {}), machine))
            made, block = section["parent"], questions[-1].block_size
        elif step.stage == "sft":
            chat = section.pop("chat", {})
            questions.append(sft_question(section, chat, machine, made, block, options.answers))
            block = questions[-1].block_size
        elif step.stage == "rl":
            questions.append(rl_question(section, machine, made, block, options.prompt))
            block = questions[-1].block_size
        shape = questions[-1].cases[0].shape if questions else shape
    if not questions or shape is None:
        raise ConfigError("the run has no stage that trains", "plan knows convert, sft and rl; or give --model alone")
    named = [(step.stage, step.section) for step in steps]
    beside = parent_beside(run, named, shared.start)
    asked = (options.documents, options.context, block or DEFAULT_BLOCK)
    return [*questions, serving_question(shape, machine, *asked, beside, cache_of(run, named))]


def _print_plans(plans: "list[StagePlan]", machine: "Machine", memory: int) -> None:
    from rich.table import Table

    from hildanext.core.console import wide_console
    from hildanext.memory_plan.machine import MIB, show_bytes
    from hildanext.memory_plan.plan import host_bytes, verdict

    console = wide_console()
    console.print(f"[italic]for {machine.says}; {show_bytes(memory)}[/italic]", highlight=False)
    table = Table("MiB at the peak")
    for plan in plans:
        table.add_column(f"{plan.stage}\n{plan.shape.name}", justify="right")
    for part in dict.fromkeys(name for plan in plans for name in plan.peak.parts):
        sizes = [plan.peak.parts.get(part, 0) for plan in plans]
        if any(sizes):
            table.add_row(part, *(f"{size / MIB:,.0f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("all", *(f"{plan.peak.total / MIB:,.0f}" for plan in plans))
    table.add_row("largest at", *(plan.peak.moment for plan in plans))
    console.print(table)
    for plan in plans:
        console.print(f"[bold]{plan.stage}[/bold]: {verdict(plan)}", highlight=False)
        if plan.time is not None:
            console.print(f"  {plan.time.sentence()}", highlight=False)
        if plan.fits or plan.longest is not None:
            continue
        for name, price, total in plan.switches:
            mark = "fits" if total <= plan.budget else "    "
            console.print(f"  {mark} {show_bytes(total):>11}  {name}  [dim]{price}[/dim]", highlight=False, markup=True)
    assumptions = "; ".join(dict.fromkeys(f"{plan.stage}: {', '.join(plan.assumes)}" for plan in plans))
    host = show_bytes(max(host_bytes(plan.shape) for plan in plans))
    console.print(
        f"[dim]assumed: {assumptions}; {show_bytes(machine.framework)} for the libraries themselves. "
        f"Saving a checkpoint in fp32 needs {host} of the computer's own memory.[/dim]",
        highlight=False,
    )
