"""What `speed` found, for people: tables, and the same as Markdown."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from hildanext.bench.rl.sheets import Sheet, cell, document

WAYS = {
    "engine": "rollouts through the engine",
    "loop": "the bare decode loop",
    "packed": "update, prompts shared",
    "unpacked": "update, each answer with its prompt",
    "sft": "fine-tuning on the same rows and masks",
}


def tables(result: Mapping[str, Any]) -> list[Table]:
    return [sheet.table() for sheet in _sheets(result)]


def markdown(result: Mapping[str, Any]) -> str:
    more = f"Start: `{result['start']}`. Decoder: {result['decoder']}. Updates: autocast {result['updates_in']}."
    return document(_sheets(result), result["machine"], more)


def _sheets(result: Mapping[str, Any]) -> list[Sheet]:
    rollouts, updates, steps = result["rollouts"], result["updates"], result["steps"]
    ran_on, block = result["machine"], result["card"]["block_size"]
    same = 100 * rollouts["ways"]["loop"]["like_engine"]
    where = f"{ran_on['device']}, {ran_on['dtype']}, {ran_on['threads']} threads, block {block}"
    return [
        Sheet(
            f"Rollouts: {rollouts['answers']} answers, {rollouts['rows']} rows at most, {where}",
            ["", "answers/s", "tok/s", "tok/forward", "row forwards", "reward", "s", "processor s"],
            [_rollout_cells(way, row) for way, row in rollouts["ways"].items()],
            f"the engine has {rollouts['engine_over_loop']:.2f} times the loop's speed and spends "
            f"{100 * rollouts['engine_share_of_network']:.0f} % of its time where the network alone would, in "
            f"{rollouts['ways']['engine']['forwards']:.0f} forwards; {same:.0f} % of the texts are the same; "
            f"prompts have {rollouts['prompt_tokens']:.0f} tokens",
        ),
        Sheet(
            f"Updates: {updates['answers']} answers, {updates['looks']} looks, autocast {result['updates_in']}",
            ["", "columns/s", "answers/s", "columns", "s", "processor s"],
            [_update_cells(way, row) for way, row in updates["ways"].items()],
            f"shared prompts: {updates['packed_speedup']:.2f} times as fast ({updates['packed_speedup_processor']:.2f} "
            f"in processor time), {updates['columns_ratio']:.2f} times fewer columns; unpacked, an update feeds "
            f"{updates['share_of_sft']:.2f} of the columns a second that fine-tuning does",
        ),
        Sheet(
            f"A step of the stage: {steps['seconds']:.2f} s, {steps['steps']} of them",
            ["part", "s", "share"],
            [
                [name, cell(seconds, ".3f"), f"{100 * steps['shares'][name]:.1f} %"]
                for name, seconds in steps["parts"].items()
            ],
            "known: what is looked at, and log p under old and reference policy; update: by hand; loop: what the stage "
            "takes beyond its parts; medians of each, which need not add up",
        ),
    ]


def _rollout_cells(way: str, row: Mapping[str, Any]) -> list[str]:
    cells = [cell(row[name], ".1f") for name in ("answers_per_second", "tokens_per_second")]
    cells += [cell(row["tokens_per_forward"]), cell(row["row_forwards"], ".0f"), cell(row["reward"], ".3f")]
    return [WAYS[way], *cells, cell(row["seconds"]), cell(row["processor_seconds"])]


def _update_cells(way: str, row: Mapping[str, Any]) -> list[str]:
    cells = [cell(row["columns_per_second"], ",.0f"), cell(row["answers_per_second"], ".1f")]
    return [WAYS[way], *cells, cell(row["columns"], ",.0f"), cell(row["seconds"]), cell(row["processor_seconds"])]
