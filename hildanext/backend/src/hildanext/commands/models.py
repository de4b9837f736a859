"""What models are here, what each is, and how to be rid of one: the embedded pair, and what `pull` fetched.

hildanext models list
hildanext models show smollm2-135m
hildanext models remove qwen3-1.7b
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from hildanext.commands import print_json
from hildanext.core.errors import ConfigError

if TYPE_CHECKING:
    from hildanext.models.loading.inventory import Held

EPILOG = """what there is:
  list            the embedded pair, what was pulled, and what could be
  show NAME       a model that is here, or a folder: sizes, card, files
  remove NAME     delete what was pulled under that name, and what an unfinished pull of it left
"""
ELSEWHERE = "see its page"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    rows = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action in ("list", "show", "remove"):
        row = rows.add_parser(action)
        if action != "list":
            row.add_argument("name", metavar="NAME", help="tiny, smollm2-135m, ... or owner/name")
        if action == "remove":
            row.add_argument("--yes", action="store_true", help="do not ask")
        else:
            row.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> int:
    return {"list": _list, "show": _show, "remove": _remove}[options.action](options)


def _list(options: argparse.Namespace) -> int:
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from hildanext.core.console import wide_console
    from hildanext.models.loading.inventory import embedded, pulled
    from hildanext.models.loading.names import KNOWN, models_folder

    here, fetched = embedded(), pulled()
    whole = {held.name for held in fetched if held.kind != "unfinished"}
    missing = {name: known for name, known in KNOWN.items() if name not in whole}
    if options.json:
        rows = [{**_record(held), "pulled": held in fetched} for held in [*here, *fetched]]
        names = ("repository", "licence")
        could = [{"name": name, **{key: getattr(known, key) for key in names}} for name, known in missing.items()]
        print_json({"folder": str(models_folder()), "models": rows, "could_be_pulled": could})
        return 0
    table = Table("model", "kind", "size", "licence", "where", box=None)
    for held in [*here, *fetched]:
        where = "in the package" if held in here else f"{held.folder}{' (a link)' if held.link else ''}"
        table.add_row(held.name, held.kind, decimal(held.size), held.licence or ELSEWHERE, Text(where))
    for name, known in missing.items():
        table.add_row(name, "autoregressive", "-", known.licence, f"not here: hildanext pull {name}")
    wide_console().print(table)
    return 0


def _show(options: argparse.Namespace) -> int:
    from rich.filesize import decimal

    from hildanext.models.loading.inventory import find

    found = [_facts(held) for held in find(options.name)]
    if options.json:
        print_json({"models": found})
        return 0
    for number, facts in enumerate(found):
        files = facts.pop("files")
        print("\n" * bool(number) + "\n".join(f"{name:<16}{_cell(value)}" for name, value in facts.items()))
        for file in files:
            print(f"  {decimal(file['size']):>10}  {file['name']}")
    return 0


def _remove(options: argparse.Namespace) -> int:
    """0 where it is gone, 1 where the answer was no."""
    from rich.filesize import decimal

    from hildanext.models.loading.inventory import find_pulled, remove

    found = find_pulled(options.name)
    for held in found:
        what = "the link" if held.link else held.kind
        print(f"{held.name}: {what}, {decimal(held.size)} in {held.folder}", flush=True)
    if not options.yes:
        if not sys.stdin.isatty():
            raise ConfigError("nobody can be asked whether to delete it", "add --yes")
        try:
            agreed = input("delete? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            agreed = False
        if not agreed:
            print("left as it is")
            return 1
    for held in found:
        remove(held)
    print("deleted")
    return 0


def _record(held: "Held") -> dict[str, Any]:
    return {
        "name": held.name,
        "kind": held.kind,
        "bytes": held.size,
        "licence": held.licence,
        "folder": str(held.folder),
        "link": held.link,
    }


def _facts(held: "Held") -> dict[str, Any]:
    """All there is to say of a model without its weights."""
    from hildanext.core.config import plain
    from hildanext.memory_plan.architecture import find_architecture
    from hildanext.models.card import read_card
    from hildanext.models.loading.inventory import files_of

    facts = _record(held)
    if held.kind != "unfinished":
        shape = find_architecture(str(held.folder))
        names = ("family", "parameters", "layers", "hidden", "inner", "heads", "kv_heads", "head_dim", "vocab", "tied")
        facts |= {name: getattr(shape, name) for name in names}
    if held.kind == "diffusion":
        facts["card"] = plain(read_card(held.folder))
    return {**facts, "files": [{"name": name, "size": size} for name, size in files_of(held.folder)]}


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(part)}" for name, part in value.items() if part not in ("", []))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)
